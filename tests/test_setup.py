# SPDX-License-Identifier: MPL-2.0
"""From a folder to a Prometheus: `discover`, `setup` and `doctor` against the real programs, and
`doctor` against every fault."""
from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable

import cmon
import pytest
from cmon_proxy import (
    CLIENT_PURPOSE, CMON_PURPOSE, SERVER_PURPOSE, make_certificate, make_key, public_key,
    ssh_public_key)
from support import EXAMPLES, NODE, PATIENCE, ROOT, Program, free_port, http_get, wait_until

TLS = ROOT / "tests" / "tls"
CAPTURES = ROOT / "tests" / "captures"
LINKS = [name for name, _ in cmon.LINKS]
Done = subprocess.CompletedProcess


class Site:
    """An agent, a proxy, and the files of accounts, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs: list[Program] = []
        self.ca_key = make_key()
        self.write("ca.pem", make_certificate(self.ca_key, "a CA", is_ca=True))
        self.server_certificate("server")
        self.inventory: dict[str, Any] = json.loads((EXAMPLES / "inventory.json").read_text())
        self.inventory["accounts"].append({
            "uuid": "0a0a0a0a-0000-4000-8000-000000000001", "login": "dave", "keys": []})
        for account in self.inventory["accounts"]:
            key = make_key()
            self.write(f"{account['login']}.ssh", key)
            account["keys"] = [ssh_public_key(key)]
            self.credentials(account["login"], key)
        self.stranger = make_key()
        self.agent = self.start_agent(NODE)

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(0o600)
        return path

    def server_certificate(self, name: str, **more: Any) -> None:
        key = make_key()
        self.write(f"{name}.key", key)
        self.write(f"{name}.pem", make_certificate(
            key, "localhost", issuer=(self.folder / "ca.pem").read_bytes(),
            signing_key=self.ca_key, names=["localhost", "*.cmon.invalid"],
            purposes=["serverAuth"], **more))

    def credentials(self, login: str, ssh_key: bytes, name: str = "", **more: Any) -> None:
        """NAME-cert.pem and NAME-key.pem, new style, by this SSH key."""
        key = make_key()
        self.write(f"{name or login}-key.pem", key)
        self.write(f"{name or login}-cert.pem", make_certificate(
            key, login, issuer="MD5:" + public_key(ssh_public_key(ssh_key)).md5,
            signing_key=ssh_key, **{"purposes": [CLIENT_PURPOSE, CMON_PURPOSE], **more}))

    def keep(self, program: Program) -> Program:
        self.programs.append(program)
        return program

    def start_agent(self, capture: Path) -> tuple[str, int]:
        return self.keep(Program.agent("--replay", capture)).address

    def start_proxy(self, name: str = "proxy", agent: tuple[str, int] | None = None,
                    **settings: Any) -> int:
        """Start another proxy; return its port."""
        host, port = agent or self.agent
        for server in self.inventory["servers"]:
            server["admin_ip"] = f"{host}:{port}"
        self.write(f"{name}.inventory", json.dumps(self.inventory))
        config = self.write(f"{name}.json", json.dumps({
            "tls": {"certificate": "server.pem", "key": "server.key"},
            "admin_listen": "127.0.0.1:0", "inventory": {"file": f"{name}.inventory"}, **settings}))
        proxy = self.keep(Program.proxy(config, "--listen", "127.0.0.1:0"))
        port = proxy.addresses(2)[0][1]
        if "inventory" not in settings:
            self.wait_for_inventory(port)
        return port

    def wait_for_inventory(self, port: int) -> None:
        context = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        wait_until(lambda: http_get(("127.0.0.1", port), "/-/ready", tls=context,
                                    server_name="localhost").status == 200, "the inventory")

    def flags(self, port: int, name: str = "alice") -> dict[str, str]:
        return {"--url": f"https://localhost:{port}",
                "--cert": str(self.folder / f"{name}-cert.pem"),
                "--key": str(self.folder / f"{name}-key.pem"),
                "--ca": str(self.folder / "ca.pem")}

    def mine(self, login: str = "alice") -> dict[str, dict[str, Any]]:
        """The account's running containers by UUID."""
        [uuid] = [one["uuid"] for one in self.inventory["accounts"] if one["login"] == login]
        return {vm["uuid"]: vm for vm in self.inventory["vms"]
                if vm["owner_uuid"] == uuid and vm["state"] == "running"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("site"))
    yield made
    for program in reversed(made.programs):
        program.kill()


@pytest.fixture(scope="module")
def port(site: Site) -> int:
    return site.start_proxy()


def run(*arguments: Any, env: Mapping[str, str] | None = None, cwd: Path | None = None
        ) -> "Done[str]":
    clean = {name: value for name, value in os.environ.items()
             if not name.startswith("CMON_") and name != "SSH_AUTH_SOCK"}
    return subprocess.run([sys.executable, str(ROOT / "cmon.py"), *map(str, arguments)],
                          env={**clean, "HOME": "/nonexistent", **(env or {})}, cwd=cwd,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=PATIENCE * 2)


def words(flags: Mapping[str, str]) -> list[str]:
    return [word for pair in flags.items() for word in pair]


def one_line(done: "Done[str]", status: int, *said: str) -> None:
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert re.fullmatch(r"cmon: [^\n]+\n", done.stderr), done.stderr
    for word in said:
        assert word in done.stderr


# --- discover -------------------------------------------------------------------------------------

def test_file_sd_equals_http_discovery(site: Site, port: int, tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    done = run("discover", "--file-sd", path, *words(site.flags(port)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    written = json.loads(path.read_text())
    assert {one["labels"]["__meta_triton_machine_id"] for one in written} == set(site.mine())
    for one in written:
        uuid = one["labels"]["__meta_triton_machine_id"]
        assert one["targets"] == [f"localhost:{port}"]
        assert one["labels"]["__metrics_path__"] == f"/v1/{uuid}/metrics"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [one.name for one in tmp_path.iterdir()] == ["targets.json"]
    done = run("discover", "--groups", "database", "--file-sd", path, *words(site.flags(port)))
    assert done.returncode == 0
    assert 0 < len(json.loads(path.read_text())) < len(written)
    done = run("discover", "--groups", "none", "--file-sd", path, *words(site.flags(port)))
    assert (done.returncode, path.read_text()) == (0, "[]\n")
    assert done.stderr == f"cmon: no running containers: {path} has no targets\n"


def test_file_sd_stays_as_it_is_when_discovery_fails(site: Site, port: int, tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    path.write_text("mine")
    site.credentials("alice", site.stranger, "stranger")
    one_line(run("discover", "--file-sd", path, *words(site.flags(port, "stranger"))), 1, "401")
    one_line(run("discover", "--file-sd", path, *words(site.flags(free_port()))), 1, "refused")
    assert path.read_text() == "mine"
    one_line(run("discover", "--file-sd", tmp_path / "no" / "x", *words(site.flags(port))), 1,
             "cannot write", "no such file or directory")
    (tmp_path / "folder").mkdir()
    one_line(run("discover", "--file-sd", tmp_path / "folder", *words(site.flags(port))), 1,
             "cannot write", "is a directory")
    os.mkfifo(tmp_path / "pipe")
    one_line(run("discover", "--file-sd", tmp_path / "pipe", *words(site.flags(port))), 1,
             "cannot write", "is a pipe: use a regular file")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder", "pipe", "targets.json"]


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b'[{"targets": [1], "labels": {}}]',
                                  b'[{"targets": [], "labels": {"a": 1}}]', b'[{"targets": []}]',
                                  b"[" * 100_000])
def test_file_sd_is_written_from_targets_only(body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    with pytest.raises(cmon.Failure, match="is not a list of targets"):
        cmon.write_file_sd(path, body)
    assert not path.exists()


def test_file_sd_is_updated_until_stopped(site: Site, tmp_path: Path) -> None:
    """Changes are applied; a failure is reported and survived."""
    port = site.start_proxy("changing")
    path = tmp_path / "targets.json"
    program = Program.cmon("discover", "--file-sd", path, "--every", "0.2",
                           *words(site.flags(port)))

    def listed() -> int:
        return len(json.loads(path.read_text())) if path.exists() else 0
    try:
        count = len(site.mine())
        wait_until(lambda: listed() == count, "the targets")
        inventory = json.loads((site.folder / "changing.inventory").read_text())
        gone = next(iter(site.mine()))
        inventory["vms"] = [vm for vm in inventory["vms"] if vm["uuid"] != gone]
        site.write("changing.new", json.dumps(inventory))
        os.replace(site.folder / "changing.new", site.folder / "changing.inventory")
        wait_until(lambda: listed() == count - 1, "one target less")
        site.programs[-1].kill()
        program.wait_for_log("connection refused; .*targets.json is unchanged")
        assert listed() == count - 1
        program.signal(signal.SIGINT)
        assert program.wait() == 130
    finally:
        program.kill()


def test_names_for_sites_without_wildcard_dns(site: Site, port: int) -> None:
    flags = words(site.flags(port))
    hosts = run("discover", "--hosts", "10.0.0.9", "--suffix", "cmon.dc.example", *flags)
    lines = [line.split() for line in hosts.stdout.splitlines()]
    assert {line[1] for line in lines} == {f"{uuid}.cmon.dc.example" for uuid in site.mine()}
    assert {line[0] for line in lines} == {"10.0.0.9"} and {"#"} == {line[2] for line in lines}
    zone = run("discover", "--zone", *flags).stdout.splitlines()
    assert [line.split("\t")[:5] for line in zone] == [
        [f"{line[1].partition('.')[0]}.localhost.", "60", "IN", "CNAME", "localhost."]
        for line in lines]
    for wrong in (["--hosts", "nowhere"], ["--hosts", "10.0.0.9", "--zone"], ["--every", "5"],
                  ["--suffix", "dc.example"], ["--zone", "--suffix", "dc example"]):
        done = run("discover", *wrong, *flags)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr


def test_no_name_ends_in_an_address(site: Site, port: int, tmp_path: Path) -> None:
    flags = [flag.replace("https://localhost:", "https://127.0.0.1:")
             for flag in words(site.flags(port))]
    for command in (["discover", "--zone"], ["setup", str(tmp_path / "x"), "--dns",
                                             "--account", "alice", "--ssh-key", "none"]):
        done = run(*command, *flags)
        assert (done.returncode, done.stderr) == (
            2, "cmon: host names cannot end in the address 127.0.0.1: use --suffix NAME\n")


def test_names_point_to_an_address_where_the_proxy_has_no_name() -> None:
    one = cmon.Container("web01", "7e39c4fe-1b00-4511-9800-4523b6cac865", "joyent", "running", "-")
    for host, kind in (("10.0.0.9", "A"), ("fd00::9", "AAAA")):
        assert list(cmon.name_lines([one], host, "cmon.dc.example", "")) == [
            f"{one.uuid}.cmon.dc.example.\t60\tIN\t{kind}\t{host}\t; web01"]
    with pytest.raises(cmon.Failure, match="with an invalid UUID"):
        list(cmon.name_lines([one._replace(uuid="a\nb")], "h", "s", ""))


# --- setup ----------------------------------------------------------------------------------------

class Prometheus:
    """Debian's Prometheus on a file."""

    def __init__(self, config: Path, data: Path) -> None:
        tool = shutil.which("prometheus")
        if tool is None:
            pytest.skip("prometheus is not installed")
        self.address = ("127.0.0.1", free_port())
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.program = Program(tool, f"--config.file={config}", f"--storage.tsdb.path={data}",
                               f"--web.listen-address=127.0.0.1:{self.address[1]}")
        wait_until(self.ready, "Prometheus")

    def ready(self) -> bool:
        try:
            return http_get(self.address, "/-/ready").status == 200
        except OSError:
            assert self.program.process.poll() is None, self.program.log
            return False

    def api(self, path: str) -> Any:
        return json.loads(http_get(self.address, f"/api/v1/{path}").body)["data"]

    def health(self) -> dict[str, str]:
        """URL and health of each target; Prometheus asks for each within one interval."""
        return {one["scrapeUrl"]: one["health"] + one["lastError"]
                for one in self.api("targets?state=active")["activeTargets"]}


def setup_flags(site: Site, port: int, login: str = "alice") -> list[str]:
    return ["--account", login, "--ssh-key", str(site.folder / f"{login}.ssh"),
            "--url", f"https://localhost:{port}", "--ca", str(site.folder / "ca.pem")]


def test_from_an_empty_folder_to_a_prometheus_with_all_targets_up(site: Site, port: int,
                                                                  tmp_path: Path) -> None:
    done = run("setup", "monitoring", *setup_flags(site, port), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "All checks passed.\n" in done.stdout
    command = re.search(r"(?m)^    prometheus (.*)$", done.stdout)
    assert command is not None
    config = tmp_path / command.group(1).split()[0].partition("=")[2]
    assert str(tmp_path) not in config.read_text(), "the folder may be moved"
    prometheus = Prometheus(config, tmp_path / "data")
    try:
        wanted = {f"https://localhost:{port}/v1/{uuid}/metrics" for uuid in site.mine()}
        wanted.add(f"https://localhost:{port}/v1/fleet/metrics")
        wait_until(lambda: prometheus.health() == dict.fromkeys(wanted, "up"), "all targets up")
        rules = [rule["name"] for group in prometheus.api("rules")["groups"]
                 for rule in group["rules"]]
        assert "ContainerSilent" in rules and "cmon:cpu_usage:cpus" in rules
        # with it running, doctor looks at its targets, too
        folder = tmp_path / "monitoring"
        flags = {"--url": f"https://localhost:{port}", "--cert": str(folder / "alice-cert.pem"),
                 "--key": str(folder / "alice-key.pem"), "--ca": str(folder / "ca.pem")}
        done = run("doctor", "--prometheus", config, "--prometheus-url", prometheus.url,
                   *words(flags))
        assert done.returncode == 0 and "skip" not in done.stdout, done.stdout
        assert f"ok    targets: {len(wanted)} targets, none down" in done.stdout
        warnings = [line for line in prometheus.program.log.splitlines()
                    if re.search("level=(warn|error)", line)]
        assert not warnings
    finally:
        prometheus.program.kill()


def test_setup_writes_valid_files_for_grafana_and_promtool(site: Site, port: int, tmp_path: Path
                                                          ) -> None:
    done = run("setup", tmp_path / "x y", "--dns", "--suffix", "cmon.dc.example",
               *setup_flags(site, port))
    assert done.returncode == 1 and "Then start Prometheus" in done.stdout, done.stdout
    assert "the proxy's certificate is not for *.cmon.dc.example" in done.stdout
    folder = tmp_path / "x y"
    text = (folder / "prometheus.yml").read_text()
    assert ('account: "alice"\n        dns_suffix: cmon.dc.example\n        endpoint: "localhost"\n'
            f'        port: {port}\n') in text
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed")
    subprocess.run([tool, "check", "config", folder / "prometheus.yml"], check=True)
    for name in cmon.DASHBOARDS:
        assert json.loads((folder / "dashboards" / f"{name}.json").read_text())["panels"]
    provided = (folder / "grafana" / "provisioning" / "dashboards" / "cmon.yml").read_text()
    assert json.dumps(str(folder / "dashboards")) in provided


def test_operators_prometheus_gets_compute_nodes(site: Site, port: int, tmp_path: Path) -> None:
    for login, operator in (("admin", True), ("bob", False)):
        run("setup", tmp_path / login, *setup_flags(site, port, login))
        text = (tmp_path / login / "prometheus.yml").read_text()
        assert ("job_name: nodes" in text and f"https://localhost:{port}/v1/gz/sd" in text
                and "admin-cert.pem" in text) == operator
        assert "dc.example" not in text


def test_setup_can_be_repeated(site: Site, port: int, tmp_path: Path) -> None:
    """It replaces files only with --force, and never the certificate."""
    flags = setup_flags(site, port)
    assert run("setup", tmp_path, *flags).returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    one_line(run("setup", tmp_path, *flags), 1, "prometheus.yml exists: use --force to replace")
    (tmp_path / "rules.yml").write_text("old")
    done = run("setup", tmp_path, "--force", *flags)
    assert done.returncode == 0 and "using the existing" in done.stdout
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_setup_says_what_is_broken_and_leaves_its_files(site: Site, tmp_path: Path) -> None:
    done = run("setup", tmp_path, *setup_flags(site, free_port()))
    assert done.returncode == 1 and "FAIL  TCP" in done.stdout
    assert (tmp_path / "prometheus.yml").exists()


def test_setup_uses_a_triton_profile(site: Site, port: int, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".triton" / "profiles.d").mkdir(parents=True)
    shutil.copy(str(site.folder / "alice.ssh"), str(home / ".ssh" / "id_own"))
    line = ssh_public_key((site.folder / "alice.ssh").read_bytes())
    (home / ".ssh" / "id_own.pub").write_text(line)
    (home / ".ssh" / "odd.pub").write_text("odd")
    for name, account, key_id in (("mine", "alice", public_key(line).md5),
                                  ("b", "bob", "SHA256:x")):
        (home / ".triton" / "profiles.d" / f"{name}.json").write_text(json.dumps({
            "name": name, "account": account, "keyId": key_id,
            "url": "https://cloudapi.nowhere.invalid"}))
    (home / ".triton" / "config.json").write_text('{"profile": "mine"}')
    done = run("setup", tmp_path / "a", "--ca", site.folder / "ca.pem",
               "--url", f"https://localhost:{port}", env={"HOME": str(home)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "a" / "alice-cert.pem").exists()
    done = run("setup", tmp_path / "c", env={"HOME": str(home)})
    assert "FAIL  name: cmon.nowhere.invalid cannot be resolved" in done.stdout, done.stderr
    done = run("setup", tmp_path / "b", env={"HOME": str(home), "TRITON_PROFILE": "b"})
    one_line(done, 2, "no SSH key given: use --ssh-key FILE")
    (home / ".triton" / "config.json").write_text("garbage")
    one_line(run("setup", tmp_path / "d", env={"HOME": str(home)}), 2, "use --account LOGIN")
    one_line(run("setup", tmp_path / "d"), 2, "no account given: use --account LOGIN")


# --- doctor ---------------------------------------------------------------------------------------

Flags = dict[str, str]
FAULTS: list[tuple[str, str, str, Callable[[Site, Flags, Path], Any]]] = []


def fault(link: str, said: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A row of the table: the link that breaks, what doctor says, and how it is broken (the flags
    may be changed; what is returned is a positional argument, and closed in the end)."""
    def add(make: Callable[[Site, Flags, Path], Any]) -> Callable[..., Any]:
        FAULTS.append((link, said, make.__name__, make))
        return make
    return add


def shown(flags: Flags, tmp: Path, certificate: str, key: str = "client") -> None:
    """Use a certificate of tests/tls, which openssl made."""
    copied = tmp / "shown.key"
    shutil.copy(str(TLS / f"{key}.key"), str(copied))
    copied.chmod(0o600)
    flags["--cert"], flags["--key"] = str(TLS / f"{certificate}.pem"), str(copied)


SHOWN = [       # what doctor says of these certificates of tests/tls: link, words, name, key
    ("style", "is not the MD5 fingerprint of an SSH key", "no_fingerprint", "client"),
    ("purpose", "is for Docker", "docker", "client"),
    ("dates", "expired on 2019-01-01 .*\nNext: make a new one with `cmon.py certgen --renew`",
     "new_expired", "client"),
    ("dates", "not valid before 2110-01-01", "new_future", "client"),
    ("signature", "signed with SHA1", "new_sha1", "client"),
    ("signature", "claims to be self-signed, but its signature is wrong", "old_forged", "rsa"),
]
FAULTS += [(link, said, name, lambda site, flags, tmp, name=name, key=key: shown(
    flags, tmp, name, key)) for link, said, name, key in SHOWN]


def act_as(site: Site, flags: Flags, name: str) -> None:
    """Use NAME's certificate."""
    flags["--cert"], flags["--key"] = (
        str(site.folder / f"{name}-{kind}.pem") for kind in ("cert", "key"))


@fault("files", "cannot read the certificate .*none.pem: no such file.*\nNext: make a certificate")
def no_certificate(site: Site, flags: Flags, tmp: Path) -> None:
    flags["--cert"] = str(tmp / "none.pem")


@fault("files", r"other users can read the key .* \(mode 644\)\nNext: run `chmod 600 ")
def key_for_all_to_read(site: Site, flags: Flags, tmp: Path) -> None:
    shutil.copy(flags["--key"], str(tmp / "key.pem"))
    (tmp / "key.pem").chmod(0o644)
    flags["--key"] = str(tmp / "key.pem")


@fault("key", "does not belong to the certificate")
def key_of_another_certificate(site: Site, flags: Flags, tmp: Path) -> None:
    flags["--key"] = str(site.folder / "bob-key.pem")


@fault("key", "cannot be used: no PEM certificate")
def certificate_that_is_none(site: Site, flags: Flags, tmp: Path) -> None:
    flags["--cert"] = flags["--key"]


@fault("purpose", "not for clients")
def certificate_for_a_server(site: Site, flags: Flags, tmp: Path) -> None:
    site.credentials("alice", (site.folder / "alice.ssh").read_bytes(), "for-servers",
                     purposes=[SERVER_PURPOSE, CMON_PURPOSE])
    act_as(site, flags, "for-servers")


@fault("signature", "has an RSA key of 1024 bits, which is too short")
def short_key(site: Site, flags: Flags, tmp: Path) -> None:
    tool = shutil.which("openssl")
    if tool is None:
        pytest.skip("openssl is not installed")
    key, cert = tmp / "short.key", tmp / "short.pem"
    subprocess.run([tool, "req", "-x509", "-newkey", "rsa:1024", "-nodes", "-keyout", key, "-out",
                    cert, "-subj", "/CN=alice"], check=True, stderr=subprocess.DEVNULL)
    key.chmod(0o600)
    flags.update({"--cert": str(cert), "--key": str(key)})


@fault("signature", r"names .*id_rsa.pub as its issuer, but is not signed with it")
def signature_of_another_key(site: Site, flags: Flags, tmp: Path) -> None:
    (tmp / ".ssh").mkdir()
    shutil.copy(str(TLS / "rsa.pub"), str(tmp / ".ssh" / "id_rsa.pub"))
    shown(flags, tmp, "new_wrong_issuer")


@fault("name", "no-such-host.invalid cannot be resolved")
def unknown_name(site: Site, flags: Flags, tmp: Path) -> None:
    flags["--url"] = "https://no-such-host.invalid:9163"


@fault("TCP", "connection refused")
def nobody_listens(site: Site, flags: Flags, tmp: Path) -> None:
    flags["--url"] = f"https://localhost:{free_port()}"


@fault("TLS", "TLS handshake with localhost.* failed.*\nNext: give --url .* speaks plain HTTP")
def port_of_something_else(site: Site, flags: Flags, tmp: Path) -> None:
    flags["--url"] = f"https://localhost:{site.agent[1]}"


@fault("TLS", "timed out")
def silence(site: Site, flags: Flags, tmp: Path) -> Any:
    silent = socket.create_server(("127.0.0.1", 0))
    flags.update({"--url": f"https://localhost:{silent.getsockname()[1]}", "--timeout": "0.5"})
    return silent


@fault("server certificate", "not accepted: .*\nNext: give the CA of .* with --ca FILE")
def unknown_ca(site: Site, flags: Flags, tmp: Path) -> None:
    flags["--ca"] = str(TLS / "ca.pem")


@fault("server certificate", "not accepted: .*\nNext: use --url with a name that")
def another_name(site: Site, flags: Flags, tmp: Path) -> None:
    flags["--url"] = flags["--url"].replace("localhost", "127.0.0.1")


@fault("server certificate", "certificate has expired\nNext: tell the operator")
def server_certificate_that_has_ended(site: Site, flags: Flags, tmp: Path) -> None:
    site.server_certificate("ended", not_before=1e9, not_after=1.1e9)
    port = site.start_proxy("ended-proxy", inventory={"file": "proxy.inventory"},
                            tls={"certificate": "ended.pem", "key": "ended.key"})
    flags["--url"] = f"https://localhost:{port}"


@fault("discovery", "says 401: account alice has no key .*\nNext: add the SSH key to the account")
def key_that_is_not_on_the_account(site: Site, flags: Flags, tmp: Path) -> None:
    site.credentials("alice", site.stranger, "stranger")
    act_as(site, flags, "stranger")


@fault("discovery", "says 503: .*inventory.*\nNext: try again in a minute")
def proxy_without_inventory(site: Site, flags: Flags, tmp: Path) -> None:
    port = site.start_proxy("empty", inventory={"file": "not-there"})
    flags["--url"] = f"https://localhost:{port}"


@fault("list", "has no running containers")
def account_without_containers(site: Site, flags: Flags, tmp: Path) -> None:
    act_as(site, flags, "dave")


@fault("list", "no container 'wbe01'; did you mean .*web01.*\nNext: `cmon.py discover`")
def unknown_container(site: Site, flags: Flags, tmp: Path) -> str:
    return "wbe01"


@fault("list", "container .*old-web, stopped.* is not running; metrics are available")
def stopped_container(site: Site, flags: Flags, tmp: Path) -> str:
    return "old-web"


@fault("scrape", "says 503: compute node .* has not answered")
def silent_node(site: Site, flags: Flags, tmp: Path) -> None:
    port = site.start_proxy("silent-node", ("127.0.0.1", free_port()))
    flags["--url"] = f"https://localhost:{port}"


@fault("page", "on the page of web01, collectors have failed: ")
def failed_collectors(site: Site, flags: Flags, tmp: Path) -> str:
    port = site.start_proxy("failing", site.start_agent(CAPTURES / "failing.json"))
    flags["--url"] = f"https://localhost:{port}"
    return "web01"


class FakeProxy:
    """Anything else that speaks TLS with a good certificate."""

    def __init__(self, site: Site, answers: Mapping[str, bytes]) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = answers.get(self.path, b"")
                self.send_response(200)
                self.send_header("Date", "Fri, 31 Dec 9999 23:59:59 -2359")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def date_time_string(self, timestamp: Any = None) -> str:
                return "yesterday"

            def log_message(self, *_: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:        # a client that leaves is no news
                pass
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(site.folder / "server.pem", site.folder / "server.key")
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"https://localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


LISTED = json.dumps({"containers": [{
    "vm_alias": "web01", "vm_uuid": "7e39c4fe-1b00-4511-9800-4523b6cac865", "vm_state": "running",
    "vm_brand": "joyent", "server_uuid": "s"}]}).encode()
PAGE = "/v1/7e39c4fe-1b00-4511-9800-4523b6cac865/metrics"


def fake(site: Site, flags: Flags, answers: Mapping[str, bytes]) -> FakeProxy:
    proxy = FakeProxy(site, answers)
    flags["--url"] = proxy.url
    return proxy


@fault("list", "is not a proxy's answer: check the URL\nNext: check that --url")
def another_service(site: Site, flags: Flags, tmp: Path) -> FakeProxy:
    return fake(site, flags, {"/v1/discover": b"<html>"})


@fault("scrape", "the page of web01 cannot be parsed")
def page_that_is_none(site: Site, flags: Flags, tmp: Path) -> FakeProxy:
    return fake(site, flags, {"/v1/discover": LISTED, PAGE: b"<html>\xff"})


@fault("quota", "the fleet page cannot be parsed")
def fleet_page_that_is_none(site: Site, flags: Flags, tmp: Path) -> FakeProxy:
    return fake(site, flags, {"/v1/discover": LISTED, PAGE: page_of().encode(),
                              "/v1/fleet/metrics": b"a b c\n"})


class FakeAgent:
    """An agent with values set by the test, behind a real proxy."""

    def __init__(self, page: str, date: str = "") -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = page.encode() if "metrics" in self.path else b""
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = ("127.0.0.1", self.server.server_port)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def page_of(age: float = 1.0, now: float = 0.0) -> str:
    return ("# TYPE cmon_collector_up gauge\n" 'cmon_collector_up{collector="cpucap"} 1\n'
            "# TYPE cmon_sample_age_seconds gauge\n"
            f'cmon_sample_age_seconds{{collector="cpucap"}} {age}\n'
            f"# TYPE time_of_day counter\ntime_of_day {round((now or time.time()) * 1000)}\n")


@fault("age", "cpucap of .* is 500 s old")
def old_figures(site: Site, flags: Flags, tmp: Path) -> FakeAgent:
    agent = FakeAgent(page_of(age=500))
    flags["--url"] = f"https://localhost:{site.start_proxy('old', agent.address)}"
    return agent


@fault("clock", r"this machine's clock is 7\d\d\d s behind the compute node's")
def clock_of_the_node(site: Site, flags: Flags, tmp: Path) -> FakeAgent:
    agent = FakeAgent(page_of(now=time.time() + 7200 + PATIENCE))
    flags["--url"] = f"https://localhost:{site.start_proxy('clock', agent.address)}"
    return agent


@fault("clock", r"this machine's clock is 3\d\d\d s ahead of the proxy's")
def clock_of_the_proxy(site: Site, flags: Flags, tmp: Path) -> Program:
    """The proxy with a clock that is an hour slow."""
    slow = site.write("slow.py", f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
real = time.time
time.time = lambda: real() - 3600
import cmon_proxy
sys.exit(cmon_proxy.main(sys.argv[1:]))
""")
    program = Program(sys.executable, slow, "--config", site.folder / "proxy.json", "--listen",
                      "127.0.0.1:0", "--log-format", "text")
    port = program.addresses(2)[0][1]
    site.wait_for_inventory(port)
    site.credentials("alice", (site.folder / "alice.ssh").read_bytes(), "early",
                     not_before=time.time() - 86400)
    flags.update({**site.flags(port, "early")})
    site.keep(program)
    return program


@fault("quota", "says 429: .*\nNext: scrape less often, or ask the operator for a higher quota")
def quota_used_up(site: Site, flags: Flags, tmp: Path) -> None:
    port = site.start_proxy("refusing", quota={"per_minute": 0, "burst": 1, "over_quota": "refuse",
                                               "hard_per_minute": 0})
    flags["--url"] = f"https://localhost:{port}"
    run("discover", *words(flags))
    run("discover", *words(flags))


@fault("quota", "the account is over its quota: pages are old copies")
def old_copies(site: Site, flags: Flags, tmp: Path) -> None:
    port = site.start_proxy("stale", quota={"per_minute": 0.001, "burst": 3,
                                            "hard_per_minute": 60000})
    flags["--url"] = f"https://localhost:{port}"
    for _ in range(2):
        run("doctor", *words(flags))


def configuration(flags: Flags, tmp: Path, change: tuple[str, str]) -> None:
    url = flags["--url"].partition("//")[2]
    text = f"""\
scrape_configs:
  - job_name: containers
    scheme: https
    tls_config: &tls
      ca_file: {flags['--ca']}
      cert_file: {flags['--cert']}     # ours
      key_file: '{flags['--key']}'
    http_sd_configs:
      - url: "https://{url}/v1/sd"
        tls_config: *tls
"""
    assert change[0] in text
    (tmp / "prometheus.yml").write_text(text.replace(*change))
    flags["--prometheus"] = str(tmp / "prometheus.yml")


@fault("configuration", "does not use .*alice-cert.pem, but .*bob-cert.pem")
def configuration_with_another_certificate(site: Site, flags: Flags, tmp: Path) -> None:
    configuration(flags, tmp, ("alice-cert.pem", "bob-cert.pem"))


@fault("configuration", "has no job that discovers containers from localhost")
def configuration_for_another_proxy(site: Site, flags: Flags, tmp: Path) -> None:
    configuration(flags, tmp, ("//localhost", "//elsewhere.example"))


def by_name(flags: Flags, tmp: Path, suffix: str) -> None:
    configuration(flags, tmp, ("    http_sd_configs:\n", f"""\
    triton_sd_configs:
      - {{account: alice, dns_suffix: {suffix}, endpoint: localhost, version: 1}}
    http_sd_configs:
"""))


@fault("configuration", r"certificate is not for \*\.elsewhere\.invalid: .*\nNext: ask the op")
def names_that_the_certificate_does_not_have(site: Site, flags: Flags, tmp: Path) -> None:
    by_name(flags, tmp, "elsewhere.invalid")


@fault("configuration", r"-.*\.cmon\.invalid cannot be resolved\nNext: let \*\.cmon\.inv.*DNS")
def names_that_are_not_in_dns(site: Site, flags: Flags, tmp: Path) -> None:
    by_name(flags, tmp, "cmon.invalid")


@fault("configuration", "promtool refuses")
def configuration_that_is_broken(site: Site, flags: Flags, tmp: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    configuration(flags, tmp, ("scheme:", "schema:"))


@fault("configuration", "cannot read the configuration .*: no such file")
def configuration_that_is_not_there(site: Site, flags: Flags, tmp: Path) -> None:
    flags["--prometheus"] = str(tmp / "none.yml")


class Closing:
    """Ends a Prometheus."""

    def __init__(self, prometheus: Prometheus) -> None:
        self.close = prometheus.program.kill


@fault("targets", "has no target at localhost")
def prometheus_with_another_file(site: Site, flags: Flags, tmp: Path) -> Closing:
    (tmp / "other.yml").write_text("scrape_configs: []\n")
    configuration(flags, tmp, ("", ""))
    prometheus = Prometheus(tmp / "other.yml", tmp / "data")
    flags["--prometheus-url"] = prometheus.url
    return Closing(prometheus)


@fault("targets", "1 of 1 targets are down, for example https://localhost:.*401")
def prometheus_that_is_refused(site: Site, flags: Flags, tmp: Path) -> Closing:
    host = flags["--url"].partition("//")[2]
    (tmp / "other.yml").write_text(json.dumps({"scrape_configs": [{
        "job_name": "x", "scheme": "https", "metrics_path": "/v1/fleet/metrics",
        "scrape_interval": "1s", "scrape_timeout": "1s", "tls_config": {"ca_file": flags["--ca"]},
        "static_configs": [{"targets": [host]}]}]}))
    configuration(flags, tmp, ("", ""))
    prometheus = Prometheus(tmp / "other.yml", tmp / "data")
    wait_until(lambda: any("down" in one for one in prometheus.health().values()), "a failure")
    flags["--prometheus-url"] = prometheus.url
    return Closing(prometheus)


@fault("targets", "is not a Prometheus")
def prometheus_that_is_none(site: Site, flags: Flags, tmp: Path) -> FakeAgent:
    configuration(flags, tmp, ("", ""))
    agent = FakeAgent("")
    flags["--prometheus-url"] = f"http://127.0.0.1:{agent.address[1]}"
    return agent


def lines_of(done: "Done[str]") -> dict[str, str]:
    """Each link's first word, in the order of the lines."""
    found = {}
    for line in done.stdout.splitlines():
        match = re.match(r"(ok|FAIL|skip) +([A-Za-z ]+)", line)
        if match is not None:
            found[match.group(2).strip()] = match.group(1)
    return found


@pytest.mark.parametrize("link, said, what, make", FAULTS, ids=[row[2] for row in FAULTS])
def test_doctor_names_the_broken_link_and_no_other(
        link: str, said: str, what: str, make: Callable[..., Any], site: Site, port: int,
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
        ) -> None:
    """In this process, which takes half the time; the tests below run it as users do."""
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = site.flags(port)
    made = make(site, flags, tmp_path)
    try:
        positional = [made] if isinstance(made, str) else []
        status = cmon.main(["doctor", *positional, *words(flags)])
        done = Done((), status, *capsys.readouterr())
    finally:
        if hasattr(made, "close"):
            made.close()
    assert (done.returncode, done.stderr) == (1, ""), done.stdout + done.stderr
    found = lines_of(done)
    assert list(found) == LINKS
    assert [name for name, word in found.items() if word == "FAIL"] == [link], done.stdout
    assert set(list(found.values())[LINKS.index(link) + 1:]) <= {"skip"}
    assert re.search(said, re.sub("(?m)^skip.*\n", "", done.stdout)), done.stdout
    assert re.search(r"\nNext: [^\n]+\.\n$", done.stdout)


def test_other_commands_say_that_a_certificate_is_weak(site: Site, port: int, tmp_path: Path
                                                       ) -> None:
    flags = site.flags(port)
    shown(flags, tmp_path, "new_sha1")
    one_line(run("discover", *words(flags)), 1, "its digest too weak: make a certificate")


def test_doctor_of_a_healthy_chain(site: Site, port: int, tmp_path: Path) -> None:
    flags = site.flags(port)
    configuration(flags, tmp_path, ("", ""))
    (tmp_path / ".ssh").mkdir()
    key = (site.folder / "alice.ssh").read_bytes()
    (tmp_path / ".ssh" / "own.pub").write_text(ssh_public_key(key))
    done = run("doctor", "db01", *words(flags), "--prometheus-url",
               f"http://127.0.0.1:{free_port()}", env={"HOME": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    found = lines_of(done)
    assert list(found) == LINKS
    assert [name for name, word in found.items() if word != "ok"] == ["targets"]
    assert "samples of db01" in done.stdout and f"by {tmp_path}/.ssh/own.pub" in done.stdout
    assert done.stdout.endswith("\nAll checks passed.\n")


def test_doctor_accepts_an_expired_old_style_certificate(site: Site, port: int) -> None:
    key = (site.folder / "alice.ssh").read_bytes()
    site.write("old-key.pem", key)
    site.write("old-cert.pem", make_certificate(key, "alice", not_before=1e9, not_after=1.1e9))
    done = run("doctor", *words(site.flags(port, "old")))
    assert done.returncode == 0 and "expired, which the proxy accepts" in done.stdout, done.stdout


def test_doctor_requires_a_url(site: Site) -> None:
    one_line(run("doctor"), 2, "set CMON_URL or use --url")
    one_line(run("doctor", "--url", "https://localhost:1"), 2, "set CMON_CERT or use --cert")
