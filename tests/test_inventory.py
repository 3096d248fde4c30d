# SPDX-License-Identifier: MPL-2.0
"""The file inventory, the table of states, who may see what."""
from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agents import (
    ALICE, BOB, BOBS, CORE, DB, NAT, NODE_1, NODE_2, OPERATOR, STOPPED, TLS, WEB, admin, client_tls,
    inventory, key, proxy, proxy_config, uuid, vm, write_inventory)
from cmon_agent import ConfigError, Registry, Server
from cmon_proxy import (
    STATES, Account, AuthorizedKey, Directory, Grant, Inventory, Node, Selection, Vm, by_owner,
    FileSource, ServerCertificate, Settings, TlsSettings, InventorySettings, groups_of, may_see,
    merged, number_of, read_inventory, shard_of, vm_of)


from support import Program, http_get, wait_until


def load(folder: Path, content: Any) -> Any:
    path = folder / "inventory.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_inventory(path, 9163)


def test_a_whole_file(tmp_path: Path) -> None:
    found = load(tmp_path, inventory("10.0.0.5", "10.0.0.6:9999"))
    assert set(found.accounts) == {"alice", "bob", "root"}
    assert found.nodes[NODE_1].address == ("10.0.0.5", 9163)
    assert sorted(node.address for node in found.nodes.values())[1] == ("10.0.0.6", 9999)
    assert set(found.owned[ALICE]) == {WEB, DB, STOPPED, NAT} and set(found.owned[BOB]) == {BOBS}
    assert found.vms[WEB].groups == ("web", "front") and found.vms[NAT].hidden
    assert found.vms[CORE].core and not found.vms[WEB].core
    alice = found.accounts["alice"]
    assert not alice.operator and found.accounts["root"].operator
    assert sorted(holder.name for holder in alice.keys.values()) == ["", "", "", "carol"]


@pytest.mark.parametrize("shown, address", [
    ("fd00::5", ("fd00::5", 9163)), ("[fd00::5]", ("fd00::5", 9163)),
    ("[fd00::5]:99", ("fd00::5", 99)), ("::ffff:10.0.0.5", ("::ffff:10.0.0.5", 9163))])
def test_nodes_may_have_ipv6_addresses(tmp_path: Path, shown: str, address: Any) -> None:
    found = load(tmp_path, inventory(shown))
    assert found.nodes[NODE_1].address == address


def test_a_start_without_a_valid_file_keeps_no_old_inventory(tmp_path: Path) -> None:
    (tmp_path / "inventory.json").write_text("{")
    with Program.proxy(proxy_config(tmp_path)) as program:
        program.wait_for_log("listening on")
        program.wait_for_log("ERROR +no inventory until this is corrected: .*: not JSON")


def test_optional_and_unknown_members(tmp_path: Path) -> None:
    found = load(tmp_path, {
        "accounts": [{"uuid": ALICE.upper(), "login": "alice", "keys": [], "hobby": "chess"}],
        "servers": [{"uuid": NODE_1}],
        "vms": [{"uuid": WEB, "owner_uuid": ALICE, "alias": None, "tags": None, "state": None,
                 "server_uuid": None, "brand": 7}],
        "more": 1})
    one = found.vms[WEB]
    assert (one.alias, one.server, one.groups, one.brand, one.state) == ("", "", (), "", "unknown")
    assert found.accounts["alice"].uuid == ALICE and found.nodes[NODE_1].address is None


@pytest.mark.parametrize("content, problem", [
    ("{", "not JSON"), ("[]", "must be an object"), ("{}", "accounts: missing: the file needs"),
    ({"accounts": [], "servers": [], "vms": {}}, "vms: must be a list"),
    ({"accounts": [1], "servers": [], "vms": []}, r"accounts\[0\]: must be an object"),
    ({"accounts": [{"uuid": ALICE}], "servers": [], "vms": []}, r"accounts\[0\]: needs a login"),
    ({"accounts": [{"uuid": "x", "login": "a"}], "servers": [], "vms": []}, "uuid must be a UUID"),
    ({"accounts": [{"login": "a"}], "servers": [], "vms": []}, r"accounts\[0\]: needs uuid"),
    ({"accounts": [{"uuid": ALICE[:-1], "login": "a"}], "servers": [], "vms": []},
     f"not '{ALICE[:-1]}' with 35 characters instead of 36"),
    ({"accounts": [{"uuid": ALICE, "login": "a", "keys": [(TLS / "ec.key").read_text()]}],
      "servers": [], "vms": []}, r"keys\[0\]: a private key, which must stay"),
    ({"accounts": [], "servers": [], "vms": [{"uuid": "x", "owner_uuid": ALICE}]},
     r"vms\[0\]: uuid must be a UUID"),
    ({"accounts": [{"uuid": ALICE, "login": "a", "administrators": 5}], "servers": [], "vms": []},
     r"accounts\[0\].administrators: must be a list, not 5"),
    ({"accounts": [{"uuid": ALICE, "login": "a", "users": True}], "servers": [], "vms": []},
     r"users: must be a list, not True"),
    ({"accounts": [{"uuid": ALICE, "login": "a", "users": [{"groups": "web"}]}], "servers": [],
      "vms": []}, r"users\[0\].groups: must be a list of strings"),
    ({"accounts": [], "servers": [{"uuid": NODE_1, "admin_ip": "10.0.0.1\0"}], "vms": []},
     r"admin_ip must be an IP address, with or without a port, not '10.0.0.1\\x00'"),
    ({"accounts": [], "servers": [{"uuid": NODE_1, "admin_ip": "\ud800"}], "vms": []},
     "admin_ip must be an IP address"),
    ({"accounts": [{"uuid": ALICE, "login": "a", "keys": ["ssh-rsa AAAA"]}], "servers": [],
      "vms": []}, r"accounts\[0\].keys\[0\]"),
    ({"accounts": [{"uuid": ALICE, "login": "a", "keys": "ssh-rsa A"}], "servers": [], "vms": []},
     r"accounts\[0\].keys: must be a list of public keys, such as \[.*\], not 'ssh-rsa A'"),
    ({"accounts": [{"uuid": ALICE, "login": "a", "operator": "yes"}], "servers": [], "vms": []},
     "operator: must be true or false"),
    ({"accounts": [{"uuid": ALICE, "login": "a", "administrators": [3]}], "servers": [],
      "vms": []}, r"administrators\[0\]"),
    ({"accounts": [{"uuid": ALICE, "login": "a"}] * 2, "servers": [], "vms": []}, "is used twice"),
    ({"accounts": [], "servers": [{"uuid": NODE_1}] * 2, "vms": []}, "is used twice"),
    ({"accounts": [], "servers": [], "vms": [vm(WEB, ALICE)] * 2}, "is used twice"),
    ({"accounts": [], "servers": [{"uuid": NODE_1, "admin_ip": "cn1.example"}], "vms": []},
     "must be an IP address"),
    ({"accounts": [], "servers": [{"uuid": NODE_1, "admin_ip": 7}], "vms": []}, "IP address"),
    ({"accounts": [], "servers": [], "vms": [{"uuid": WEB}]}, r"vms\[0\]: needs owner_uuid"),
], ids=lambda value: json.dumps(value)[:50])
def test_a_bad_file_is_rejected_as_a_whole(content: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(tmp_path, content)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.json: no such file"):
        read_inventory(tmp_path / "absent.json", 9163)


def test_problems_are_reported_up_to_a_limit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {"accounts": [1] * 3, "servers": [], "vms": [2] * 100})
    assert len(caught.value.problems) == 20
    assert caught.value.problems[-1].endswith("and 84 more problems")


@pytest.mark.parametrize("change, warning", [
    (lambda content: content["vms"][0].update(alais=content["vms"][0].pop("alias")),
     "vms[0]: unknown member 'alais': did you mean 'alias'?"),
    (lambda content: [one.update(tag=one.pop("tags")) for one in content["vms"]],
     "vms[0]: unknown member 'tag': did you mean 'tags'? (and 5 more)"),
    (lambda content: content["accounts"][2].update(operater=content["accounts"][2].pop("operator")),
     "accounts[2]: unknown member 'operater': did you mean 'operator'?"),
    (lambda content: content["accounts"][0].update(key=content["accounts"][0].pop("keys")),
     "accounts[0]: unknown member 'key': did you mean 'keys'?"),
    (lambda content: content["vms"][1]["tags"].update({"triton.cmon.group": "x"})
     or content["vms"][1]["tags"].pop("triton.cmon.groups"),
     "vms[1].tags: unknown member 'triton.cmon.group': did you mean 'triton.cmon.groups'?"),
    (lambda content: content["accounts"].pop(1),
     f"vms[5]: owner_uuid {BOB} is not an account in this file: nobody can see this VM"),
    (lambda content: content["servers"].pop(1),
     f"vms[1]: server_uuid '{NODE_2}' is not a server in this file: this VM has no page"),
    (lambda content: content["vms"][0].update(server_uuid=NODE_1[:-1]),
     f"vms[0]: server_uuid '{NODE_1[:-1]}' is not a server in this file: this VM has no page"),
    (lambda content: content["accounts"][1].update(keys=[]),
     "accounts[1]: account 'bob' has no keys: nobody can authenticate as it"),
    (lambda content: content["vms"][0].update(brand=7),
     "vms[0]: brand must be a string, not 7: ignored"),
    (lambda content: content["vms"][0].update(tags="web"),
     "vms[0]: tags must be an object, not 'web': ignored"),
    (lambda content: content["vms"][0].update(state="runing"),
     "vms[0]: unknown state 'runing': treated as running"),
    (lambda content: content["accounts"][1].update(login="b" * 65),
     "accounts[1]: no certificate can contain the login '" + "b" * 58),
    (lambda content: content["accounts"][1].update(uuid=ALICE),
     "accounts: two accounts share a uuid, so both own its VMs"),
])
def test_probable_mistakes_are_warnings(change: Any, warning: str, tmp_path: Path) -> None:
    content = inventory("10.0.0.1")
    assert not load(tmp_path, content).warnings
    change(content)
    path = tmp_path / "inventory.json"
    assert any(line.startswith(f"{path}: {warning}") for line in load(tmp_path, content).warnings)


def test_members_of_other_tools_are_allowed(tmp_path: Path) -> None:
    content = inventory("10.0.0.1")
    for record in content["vms"]:
        record.update(zone_state="running", ram=7, role_tags={}, nics=[], datasets=[], quota=1)
        record["tags"].update(role="web", name="x")
    for record in content["servers"]:
        record.update(datacenter="a", status="running", setup=True, sysinfo={})
    for record in content["accounts"]:
        record.update(email="a@b", cn="x", company="y", hobby="chess")
    assert not load(tmp_path, content).warnings


def test_a_lone_surrogate_is_replaced_on_reading(tmp_path: Path) -> None:
    content = inventory("10.0.0.1")
    content["vms"][0].update(alias="a\ud800b", tags={"triton.cmon.groups": "\udfff,x"})
    found = load(tmp_path, content).vms[WEB]
    assert (found.alias, found.groups) == ("a?b", ("?", "x"))


# --- the file as it changes -----------------------------------------------------------------------

class Desk:
    """A file source on the test's clock: `pass_by` advances it."""

    def __init__(self, folder: Path) -> None:
        self.at = 1000.0
        self.folder, self.path = folder, folder / "inventory.json"
        write_inventory(folder, inventory("10.0.0.1"))
        self.server = Server("proxy", Registry(), now=lambda: self.at)
        self.inventory = Inventory(self.server.now)
        self.inventory.max_age = 100.0
        self.source = FileSource(self.path, 9163, self.inventory, self.server)
        self.directory = self.source.accounts
        self.source._pool = self  # type: ignore[assignment]
        self.reads = 0
        self.jobs: list[Any] = []
        self.source.start()
        self.server.loop.run_due()

    def submit(self, function: Any, *args: Any) -> bool:
        """Read after the tick, in this thread."""
        self.reads += 1
        self.jobs.append((function, args))
        return True

    def pass_by(self, seconds: int) -> None:
        for _ in range(seconds):
            self.at += 1.0
            self.source.tick()
            while self.jobs:
                function, args = self.jobs.pop()
                function(*args)
            self.server.loop.run_due()

    @property
    def metrics(self) -> dict[str, Any]:
        return {family.name[len("cmon_proxy_inventory_"):]: family.samples[0].value
                for family in self.source.families()}

    @property
    def age(self) -> float:
        return self.at - self.inventory.confirmed


@pytest.fixture()
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def without_alice() -> Any:
    content = inventory("10.0.0.1")
    del content["accounts"][0]
    return content


def test_a_change_applies_within_a_second(desk: Desk) -> None:
    desk.pass_by(5)
    assert desk.directory.find("alice") and desk.age <= 1 and desk.reads == 0
    assert desk.metrics == {"last_reload_successful": 1, "warnings": 0,
                            "last_reload_success_timestamp_seconds": desk.source._good_at}
    write_inventory(desk.folder, without_alice())
    desk.pass_by(1)
    assert desk.directory.find("alice") is None and desk.metrics["warnings"] == 1


@pytest.mark.parametrize("failure", [
    PermissionError(13, "Permission denied"), OSError(24, "Too many open files"),
    MemoryError(), TypeError("a fault of the program")], ids=repr)
def test_a_failed_read_of_an_unchanged_file_is_retried(desk: Desk, failure: Exception,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is valid all the time; reading it fails."""
    def refuse(*_: Any) -> Any:
        raise failure
    write_inventory(desk.folder, without_alice())
    with monkeypatch.context() as broken:
        broken.setattr("cmon_proxy.read_json", refuse)
        desk.pass_by(10)
        assert desk.directory.find("alice") and desk.age >= 10      # confirmed by nothing
        assert desk.metrics["last_reload_successful"] == 0
        assert 2 <= desk.reads <= 5                                 # with growing pauses
    desk.pass_by(40)
    assert desk.directory.find("alice") is None and desk.age <= 1
    assert desk.metrics["last_reload_successful"] == 1


def test_a_temporarily_unreadable_file_is_retried(desk: Desk) -> None:
    """chmod changes neither size nor date of the content."""
    write_inventory(desk.folder, without_alice())
    desk.path.chmod(0)
    desk.pass_by(1)
    desk.path.chmod(0o644)
    desk.pass_by(1)
    assert desk.directory.find("alice") is None


@pytest.mark.parametrize("spoil, log", [
    (lambda desk: desk.path.unlink(), "no such file"),
    (lambda desk: desk.path.write_text("{"), "not JSON"),
    (lambda desk: desk.path.write_bytes(b"\xff"), "not JSON"),
    (lambda desk: (desk.path.unlink(), desk.path.mkdir()), "is a directory"),
    (lambda desk: (desk.path.unlink(), os.mkfifo(desk.path)), "is a pipe: use a regular file"),
    (lambda desk: write_inventory(desk.folder, {"accounts": 5}), "must be a list"),
], ids=["gone", "cut off", "garbage", "a folder", "a pipe", "wrong"])
def test_a_bad_file_keeps_the_old_inventory_which_ages(desk: Desk, spoil: Any, log: str,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    spoil(desk)
    desk.pass_by(50)
    assert desk.directory.find("alice") and desk.age >= 50 and not desk.inventory.refusal
    assert desk.metrics["last_reload_successful"] == 0
    told = [record.getMessage() for record in caplog.records if log in record.getMessage()]
    assert len(told) == len(set(told)) > 0                          # once, not each time
    desk.pass_by(51)
    assert desk.inventory.refusal
    assert dict(desk.inventory.refusal.headers)["X-Cmon-Error"] == "inventory_too_old"
    if desk.path.is_dir():
        desk.path.rmdir()
    elif desk.path.is_fifo():
        desk.path.unlink()
    write_inventory(desk.folder, without_alice())
    desk.pass_by(1)
    assert desk.directory.find("alice") is None and not desk.inventory.refusal


def test_restoring_the_old_content_is_valid_again(desk: Desk) -> None:
    good = desk.path.rename(desk.folder / "aside")
    desk.pass_by(3)
    good.rename(desk.path)
    desk.pass_by(40)
    assert desk.age <= 1 and desk.metrics["last_reload_successful"] == 1


def test_a_missing_inventory_is_logged(tmp_path: Path) -> None:
    write_inventory(tmp_path, inventory("127.0.0.1:1"))
    with proxy(tmp_path, inventory={"file": "inventory.json", "max_age": 2}) as program:
        wait_until(lambda: admin(program)["cmon_proxy_inventory_ready"] == 1)
        (tmp_path / "inventory.json").rename(tmp_path / "aside.json")
        wait_until(lambda: admin(program)["cmon_proxy_inventory_last_reload_successful"] == 0)
        wait_until(lambda: admin(program)["cmon_proxy_inventory_ready"] == 0)
        assert admin(program)["cmon_proxy_inventory_age_seconds"] > 2
        for address in program.addresses(2):
            tls = client_tls() if address == program.address else None
            answer = http_get(address, "/-/ready", {"Host": "cmon.test"}, tls=tls)
            assert (answer.status, answer.headers["x-cmon-error"]) == (503, "inventory_too_old")
        (tmp_path / "aside.json").rename(tmp_path / "inventory.json")
        wait_until(lambda: admin(program)["cmon_proxy_inventory_ready"] == 1)


# --- the server's certificate ---------------------------------------------------------------------

def test_an_unreadable_certificate_is_retried(tmp_path: Path) -> None:
    for name in ("server.pem", "server.key"):
        (tmp_path / name).write_bytes((TLS / name).read_bytes())
    settings = Settings(TlsSettings(tmp_path / "server.pem", tmp_path / "server.key"),
                        InventorySettings(file=tmp_path / "x"))
    given: list[Any] = []
    at = [1000.0]

    class Stub:
        """The parts of the proxy that are used."""
        server = Server("proxy", Registry(), now=lambda: at[0])

        @staticmethod
        def clock() -> float:
            return 1.8e9

    class Listening:
        """Records each context."""

        @staticmethod
        def use(context: Any) -> None:
            given.append(context)
    Stub.settings = settings  # type: ignore[attr-defined]
    watched = ServerCertificate(Stub, Listening())  # type: ignore[arg-type]
    watched.tick()
    assert not given
    key = tmp_path / "server.key"
    right = key.read_bytes()
    key.write_bytes((TLS / "rsa.key").read_bytes())
    at[0] += 1
    watched.tick()
    assert not given
    key.write_bytes(right)
    at[0] += 1
    watched.tick()
    assert len(given) == 1


# --- --check-config -------------------------------------------------------------------------------

def check(folder: Path, **more: Any) -> Program:
    program = Program.proxy(proxy_config(folder, **more), "--check-config")
    program.wait()
    return program


def test_check_config_reports_what_it_loaded(tmp_path: Path) -> None:
    content = inventory("10.0.0.1")
    content["vms"][0]["alais"] = content["vms"][0].pop("alias")
    write_inventory(tmp_path, content)
    done = check(tmp_path)
    assert done.wait() == 0
    assert done.output.splitlines() == [
        f"cmon_proxy: {tmp_path}/inventory.json: 3 accounts, 6 keys, 2 servers, 6 VMs",
        f"cmon_proxy: {TLS}/server.pem: certificate for localhost, *.cmon.test, cmon.test, "
        "127.0.0.1 until 2120-01-01 00:00:00Z", "cmon_proxy: the settings are good"]
    assert done.log.splitlines() == [
        f"cmon_proxy: warning: {tmp_path}/inventory.json: vms[0]: unknown member 'alais': did you "
        "mean 'alias'?"]


@pytest.mark.parametrize("cert, private, said", [
    ("old_rsa", "rsa", "old_rsa.pem: has no name such as *.cmon.dc.example"),
    ("old_expired", "rsa", "old_expired.pem: expired on 2019-01-01 00:00:00Z"),
])
def test_check_config_warns_about_the_certificate(cert: str, private: str, said: str, tmp_path: Path
                                                 ) -> None:
    write_inventory(tmp_path, inventory("10.0.0.1"))
    done = check(tmp_path, tls={"certificate": str(TLS / f"{cert}.pem"),
                                "key": str(TLS / f"{private}.key")})
    assert done.wait() == 0 and said in done.log


@pytest.mark.parametrize("tls, said", [
    ({"key": "rsa.key"}, "tls.key: DIR/rsa.key is not the key of DIR/server.pem: name the key"),
    ({"key": "openssh"}, "is in OpenSSH's own format; convert a copy with `ssh-keygen -p -m PEM"),
    ({"key": "locked"}, "has a passphrase, which a service cannot enter"),
    ({"key": "rsa.pub"}, "tls.key: DIR/rsa.pub: not a PEM private key"),
    ({"certificate": "rsa.pub"}, "tls.certificate: DIR/rsa.pub: no PEM certificate; it must be"),
    ({"certificate": "server.key", "key": "server.pem"}, "tls.certificate: DIR/server.key: no"),
    ({"client_auth": "ca", "client_ca": "rsa.pub"}, "tls.client_ca: DIR/rsa.pub contains no PEM"),
    ({"certificate": "pipe"}, "/pipe: is a pipe: use a regular file"),
], ids=str)
def test_mismatched_tls_files_are_named(tls: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "openssh").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n"
                                      "-----END OPENSSH PRIVATE KEY-----\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "locked").write_bytes(subprocess.run(
        ["openssl", "pkey", "-in", TLS / "ec.key", "-aes128", "-passout", "pass:x"], check=True,
        stdout=subprocess.PIPE).stdout)

    def path(name: str) -> str:
        return str(tmp_path / name if (tmp_path / name).exists() else TLS / name)
    write_inventory(tmp_path, inventory("10.0.0.1"))
    done = check(tmp_path, tls={
        "certificate": path("server.pem"), "key": path("server.key"),
        **{name: path(value) if name != "client_auth" else value for name, value in tls.items()}})
    assert done.wait() == 2 and said.replace("DIR", str(TLS)) in done.log, done.log
    assert "_ssl.c" not in done.log and "Traceback" not in done.log


ROWS = {    # state: listed, listed with stopped, page, on the fleet page
    "running": (1, 1, 1, 1), "stopped": (0, 1, 0, 1), "stopping": (1, 1, 1, 1),
    "shutting_down": (1, 1, 1, 1), "down": (0, 1, 0, 1), "halting": (1, 1, 1, 1),
    "ready": (0, 1, 0, 1), "installed": (0, 1, 0, 1), "configured": (0, 1, 0, 1),
    "provisioning": (0, 0, 0, 1), "receiving": (0, 0, 0, 1), "sending": (1, 1, 1, 1),
    "incomplete": (0, 0, 0, 0), "failed": (0, 0, 0, 0), "destroyed": (0, 0, 0, 0),
    "deleted": (0, 0, 0, 0), "unknown": (1, 1, 1, 1),
}


@pytest.mark.parametrize("name", sorted(STATES))
def test_each_state(name: str) -> None:
    assert tuple(map(int, STATES[name])) == ROWS[name]


def test_all_states_are_known_and_a_new_one_stays_visible() -> None:
    assert set(ROWS) == set(STATES)
    assert STATES["quantum"] is STATES["unknown"]


@pytest.mark.parametrize("record", [None, [], 7, "x", {}, {"uuid": WEB}, {"owner_uuid": ALICE},
                                    {"uuid": 7, "owner_uuid": ALICE},
                                    {"uuid": "../../etc", "owner_uuid": ALICE}])
def test_an_unusable_record_counts_as_absent(record: Any) -> None:
    assert vm_of(record, "test", 0) is None


def test_unexpected_members_are_survived() -> None:
    generator = random.Random(4)
    odd = [None, "", "x", 7, -1.5, True, [], {}, [1], {"a": 1}, "triton.cmon.groups"]
    for _ in range(2000):
        record = {name: generator.choice(odd) for name in (
            "alias", "server_uuid", "image_uuid", "brand", "state", "tags", "nics")}
        if generator.random() < 0.5:
            record["tags"] = {name: generator.choice(odd) for name in (
                "triton.cmon.groups", "smartdc_role", "manta_role")}
        found = vm_of({"uuid": WEB, "owner_uuid": ALICE, **record}, "test", 0)
        assert found is not None and all(
            isinstance(value, (str, bool, tuple, int)) for value in found)


def made(number: int, owner: str = ALICE, **more: Any) -> Vm:
    found = vm_of(vm(uuid(number), owner, **more), "test", 1)
    assert found is not None
    return found


def test_changes_are_applied_and_notified() -> None:
    inventory_ = Inventory()
    told: list[Any] = []
    inventory_.changed.append(lambda before, after: told.append((before, after)))
    first = made(1)
    assert inventory_.put(first) and not inventory_.put(first._replace(since=2))
    before = inventory_.generation(ALICE)
    assert inventory_.put(first._replace(alias="new")) and inventory_.generation(ALICE) != before
    assert inventory_.owned[ALICE][WEB].alias == "new"
    assert inventory_.put(first._replace(owner=BOB))
    assert ALICE not in inventory_.owned and WEB in inventory_.owned[BOB]
    assert inventory_.put(first._replace(owner=BOB, state="destroyed"))
    assert not inventory_.vms and not inventory_.owned and not inventory_.drop(WEB)
    assert [after.alias if after else None for _, after in told] == ["vm1", "new", "vm1", None]


def test_generations_stay_bounded() -> None:
    inventory_ = Inventory()
    seen = set()
    for number in range(10_050):
        inventory_.put(made(1, owner=uuid(number)))
        seen.add(inventory_.generation(uuid(number)))
    assert len(inventory_.generations) < 10_050
    inventory_.replace(*by_owner([made(2), made(3, state="destroyed")]))
    assert set(inventory_.vms) == {uuid(2)}


def granted(owner: str = ALICE, operator: bool = False, groups: Any = None) -> Grant:
    return Grant(Account(owner, "x", {}, operator), groups, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("who, target, allowed", [
    (granted(), made(1), True), (granted(BOB), made(1), False),
    (granted(BOB, operator=True), made(1), False),                 # operators see nodes, not zones
    (granted(), made(1, tags={"smartdc_role": "nat"}), False),
    (granted(groups=frozenset(("web",))), made(1), False),
    (granted(groups=frozenset(("web",))), made(1, tags={"triton.cmon.groups": "web"}), True),
    (granted(groups=frozenset()), made(1, tags={"triton.cmon.groups": "web"}), False),
    (granted(), Node(NODE_1, "", None), False),
    (granted(operator=True), Node(NODE_1, "", None), True),
    (granted(operator=True, groups=frozenset(("web",))), Node(NODE_1, "", None), False),
    (granted(), None, False), (granted(operator=True), None, False),
])
def test_may_see(who: Grant, target: Any, allowed: bool) -> None:
    assert may_see(who, target) is allowed


def test_mantas_role_is_a_group_of_its_owner_alone() -> None:
    one = made(1, OPERATOR, tags={"manta_role": "moray", "triton.cmon.groups": "a"})
    assert groups_of(one, OPERATOR) == ("a", "moray") and groups_of(one, BOB) == ("a",)
    assert groups_of(one, "") == ("a",)


def test_unchanged_accounts_keep_their_object() -> None:
    directory = Directory()
    first = {"a": Account("1", "a", {}), "b": Account("2", "b", {})}
    directory.replace(first)
    directory.replace(merged(
        first, {"a": Account("1", "a", {}), "b": Account("2", "b", {}, True)}))
    assert directory.find("a") is first["a"] and directory.find("b") is not first["b"]
    assert directory.find("c") is None


def test_users_of_the_file(tmp_path: Path) -> None:
    content = inventory("10.0.0.1")
    content["accounts"][0]["users"] = [
        {"login": "dave", "keys": [key("ec521")], "groups": ["web"]},
        {"login": "erin", "keys": [key("other")]}]
    holders: dict[str, AuthorizedKey] = {
        holder.name: holder for holder in load(tmp_path, content).accounts["alice"].keys.values()}
    assert holders["dave"].groups == {"web"} and holders["erin"].groups == frozenset()
    assert holders["carol"].groups is None


def test_shards_are_a_partition_and_move_little() -> None:
    names = [number_of(uuid(number * 7919)) for number in range(2000)]
    for count in (1, 2, 5, 16):
        shards = [{name for name in names if shard_of(name, count) == k} for k in range(count)]
        assert sum(map(len, shards)) == len(names) and set().union(*shards) == set(names)
        assert min(map(len, shards)) > len(names) / count * 0.7
    moved = sum(shard_of(name, 5) != shard_of(name, 6) for name in names)
    assert 0.12 < moved / len(names) < 0.22          # 1/6, none of them between old shards
    assert all(shard_of(name, 6) in (shard_of(name, 5), 5) for name in names)


@pytest.mark.parametrize("query, expected", [
    ({}, Selection()), ({"groups": ""}, Selection()),
    ({"groups": "a,,b"}, Selection(frozenset("ab"))),
    ({"shard": "2/3"}, Selection(shard=1, shards=3)),
])
def test_selections(query: Any, expected: Selection) -> None:
    assert Selection.of(query) == expected
