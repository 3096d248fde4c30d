# SPDX-License-Identifier: MPL-2.0
"""The proxy with VMAPI, the changefeed, CNAPI and mahi, whose stand-ins run as processes."""
from __future__ import annotations

import hashlib
import itertools
import json
import os
import queue
import random
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import cmon_proxy
from agents import (
    ALICE, BOB, BOBS, DB, NAT, NODE_1, NODE_2, OPERATOR, STOPPED, TLS, WEB, Agent, admin,
    client_tls, key, proxy_config, uuid, vm)
from cmon_agent import Backoff, Deferred, Peer, Refused, Registry, Request, Server
from cmon_proxy import (
    Account, Accounts, ChangeFeed, Frames, Inventory, InventorySettings, Proxy, Saved, ServiceError,
    Settings, Snapshot, SnapshotError, TlsSettings, TritonSource, VmReader, account_of,
    first_certificate, frame_of, make_certificate, make_key, nodes_of, public_key, vm_of)
from support import Answer, Program, free_port, http_get, respond, wait_until
from test_tenancy import World

OWNER = ("old_rsa", "rsa")
SERVICES = Path(__file__).parent / "triton" / "services.py"


class Service:
    """A stand-in as a process, and its commands."""

    def __init__(self, kind: str) -> None:
        self.kind, self.port = kind, free_port()
        self.orders: list[dict[str, Any]] = []
        self.process: Any = None
        self.start()

    def start(self) -> None:
        self.process = Program(sys.executable, SERVICES, self.kind, str(self.port))
        self.process.wait_for_log("listening on")
        for order in self.orders:
            self.order(keep=False, **order)

    def stop(self) -> None:
        self.process.kill()

    def order(self, op: str, keep: bool = True, **more: Any) -> Any:
        if keep and op in ("put", "servers", "accounts", "forget"):
            self.orders.append({"op": op, **more})
        request = urllib.request.Request(
            f"{self.url}/-/control", json.dumps({"op": op, **more}).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def mahi_account(number: str, login: str, *keys: str, **more: Any) -> dict[str, Any]:
    found = {public_key(key(name)).md5: (TLS / f"{name}.spki.pem").read_text() for name in keys}
    return {"type": "account", "uuid": number, "login": login, "approved_for_provisioning": True,
            **({"keys": found} if keys else {}), **more}


def sysinfo(address: str) -> dict[str, Any]:
    return {"Admin IP": address, "System Type": "SunOS"}


class Cloud:
    """A whole data center on this machine."""

    def __init__(self) -> None:
        self.agent = Agent()
        self.vmapi, self.cnapi, self.mahi = Service("vmapi"), Service("cnapi"), Service("mahi")
        self.cnapi.order("servers", servers=[
            {"uuid": NODE_1, "hostname": "cn1", "setup": True, "sysinfo": sysinfo("127.0.0.1")},
            {"uuid": NODE_2, "hostname": "cn2", "setup": True, "sysinfo": {"Admin IP": "dhcp"}}])
        self.mahi.order("accounts", accounts={
            "alice": mahi_account(ALICE, "alice", "rsa"),
            "bob": mahi_account(BOB, "bob", "ec", "other", groups=[]),
            "poseidon": mahi_account(OPERATOR, "poseidon", "ec521", isOperator=True)},
            roles={"alice": {uuid(9): {"login": "carol", "keys": {
                "x": (TLS / "ec384.spki.pem").read_text()}}}})
        self.vmapi.order("put", vms=[
            vm(WEB, ALICE, tags={"triton.cmon.groups": "web"}), vm(DB, ALICE, NODE_2, tags=None),
            vm(STOPPED, ALICE, state="stopped"), vm(NAT, ALICE, tags={"smartdc_role": "nat"}),
            vm(BOBS, BOB, image_uuid=None), vm(uuid(50), ALICE, None, state="provisioning"),
            vm(uuid(51), OPERATOR, tags={"manta_role": "moray"}),
            vm(uuid(52), ALICE, state="destroyed"), {"uuid": uuid(53)}])

    def settings(self, **more: Any) -> dict[str, Any]:
        return {"inventory": {"vmapi": self.vmapi.url, "cnapi": self.cnapi.url,
                              "mahi": self.mahi.url, **more},
                "agent": {"port": self.agent.address[1]}}

    def close(self) -> None:
        self.agent.close()
        for service in (self.vmapi, self.cnapi, self.mahi):
            service.stop()


@pytest.fixture()
def cloud() -> Iterator[Cloud]:
    made = Cloud()
    yield made
    made.close()


def start(cloud: Cloud, folder: Path, **more: Any) -> Program:
    program = Program.proxy(proxy_config(folder, **cloud.settings(**more)))
    program.addresses(2)
    return program


@pytest.fixture()
def running(cloud: Cloud, tmp_path: Path) -> Iterator[Program]:
    with start(cloud, tmp_path) as program:
        wait_until(lambda: get(program, "/-/ready").status == 200)
        yield program


def get(program: Program, path: str, who: Any = OWNER) -> Answer:
    return http_get(program.address, path, {"Host": "cmon.test"}, tls=client_tls(*who))


def page(number: str) -> str:
    return f"/v1/{number}/metrics"


def listed(program: Program, who: Any = OWNER) -> dict[str, Any]:
    answer = get(program, "/v1/discover", who)
    assert answer.status == 200, answer
    return {row["vm_uuid"]: row for row in json.loads(answer.text)["containers"]}


def test_bootstrap(running: Program, cloud: Cloud) -> None:
    rows = listed(running)
    assert set(rows) == {WEB, DB} and rows[WEB]["groups"] == ["web"]
    assert rows[WEB]["source"] == "Bootstrapper" and rows[DB]["groups"] == []
    assert get(running, page(WEB)).status == 200
    assert get(running, page(BOBS)).status == 404
    assert get(running, page(WEB), ("new_ec384", "client")).status == 200   # an administrator's key
    assert get(running, page(WEB), ("old_other", "other")).status == 401
    answer = get(running, page(DB))                         # its node has no address
    assert answer.headers["x-cmon-error"] == "node_unknown"
    answer = get(running, page(uuid(50)))
    assert answer.status == 404 and "is provisioning" in answer.text
    registration, = cloud.vmapi.order("stats")["registrations"]
    assert {"owner_uuid", "tags", "state", "server_uuid"} <= set(
        registration["changeKind"]["subResources"])


def test_mantas_role_is_a_group(running: Program, tmp_path: Path) -> None:
    (tmp_path / "poseidon.pem").write_bytes(
        make_certificate((TLS / "ec521.key").read_bytes(), "poseidon"))
    rows = listed(running, (str(tmp_path / "poseidon"), "ec521"))
    row = rows[uuid(51)]        # it selects, but is not listed among the groups
    assert row["groups"] == [] and row["manta_group"] == "moray" and row["has_core_tag"]
    for group, found in (("moray", {uuid(51)}), ("other", set())):
        answer = get(running, f"/v1/discover?groups={group}", (str(tmp_path / "poseidon"), "ec521"))
        assert {one["vm_uuid"] for one in json.loads(answer.text)["containers"]} == found


def change(cloud: Cloud, **members: Any) -> None:
    cloud.vmapi.order("put", vms=[{"uuid": WEB, **members}])


@pytest.mark.parametrize("members, expected", [
    ({"alias": "Ünicode \"x\""}, {"vm_alias": "Ünicode \"x\""}),
    ({"tags": {"triton.cmon.groups": "a,b"}}, {"groups": ["a", "b"]}),
    ({"tags": None}, {"groups": []}), ({"server_uuid": NODE_2}, {"server_uuid": NODE_2}),
    ({"server_uuid": None}, None),
    ({"owner_uuid": BOB}, None), ({"state": "stopped"}, None), ({"state": "destroyed"}, None),
    ({"tags": {"smartdc_role": "nat"}}, None),
], ids=str)
def test_changes_are_followed(running: Program, cloud: Cloud, members: Any, expected: Any) -> None:
    change(cloud, **members)

    def arrived() -> bool:
        row = listed(running).get(WEB)
        if expected is None:
            return row is None
        return row is not None and all(row[name] == value for name, value in expected.items())
    wait_until(arrived)


def test_an_owner_change_takes_effect_for_both(running: Program, cloud: Cloud) -> None:
    assert get(running, page(WEB)).status == 200
    change(cloud, owner_uuid=BOB)
    wait_until(lambda: get(running, page(WEB)).status == 404)
    assert WEB in cloud.agent.paths()[-1]


def test_duplicate_events_cost_one_read(running: Program, cloud: Cloud) -> None:
    before = cloud.vmapi.order("stats")["count"].get("/vms/UUID", 0)
    cloud.vmapi.order("delay", seconds=0.3)
    change(cloud, alias="x", state="stopped", owner_uuid=ALICE, nics=[], tags={"a": "b"},
           customer_metadata={"k": "v"})
    wait_until(lambda: WEB not in listed(running))
    wait_until(lambda: admin(running)["cmon_proxy_changefeed_events_total"] >= 5)
    cloud.vmapi.order("delay", seconds=0)
    cloud.vmapi.order("put", vms=[{"uuid": DB, "alias": "last"}])
    wait_until(lambda: listed(running)[DB]["vm_alias"] == "last")
    assert cloud.vmapi.order("stats")["count"]["/vms/UUID"] - before <= 3


def test_a_new_vm_is_added_and_its_agent_notified(running: Program, cloud: Cloud) -> None:
    cloud.vmapi.order("put", vms=[vm(uuid(70), ALICE, None, state="provisioning")])
    cloud.vmapi.order("put", vms=[{"uuid": uuid(70), "server_uuid": NODE_1, "state": "running"}])
    wait_until(lambda: uuid(70) in listed(running))
    wait_until(lambda: "/v1/refresh" in cloud.agent.paths())
    assert cloud.agent.requests[-1][0] == "POST"
    cloud.vmapi.order("put", vms=[{"uuid": uuid(70), "state": "destroyed"}])
    wait_until(lambda: uuid(70) not in listed(running))
    wait_until(lambda: cloud.agent.paths().count("/v1/refresh") == 2)


def test_changes_missed_while_disconnected_are_found(running: Program, cloud: Cloud) -> None:
    cloud.vmapi.order("put", silent=True, vms=[
        {"uuid": WEB, "alias": "renamed"}, {"uuid": DB, "state": "destroyed"},
        vm(uuid(71), ALICE)])
    assert listed(running)[WEB]["vm_alias"] == "vm1"        # nobody has said anything
    cloud.vmapi.order("cut")
    wait_until(lambda: set(listed(running)) == {WEB, uuid(71)})
    assert listed(running)[WEB]["vm_alias"] == "renamed"
    assert len(cloud.vmapi.order("stats")["registrations"]) == 2


def test_a_flapping_feed_settles(running: Program, cloud: Cloud) -> None:
    for number in range(4):
        cloud.vmapi.order("cut")
        change(cloud, alias=f"flap{number}")
    wait_until(lambda: listed(running)[WEB]["vm_alias"] == "flap3")
    wait_until(lambda: admin(running)["cmon_proxy_changefeed_connected"] == 1)


@pytest.mark.parametrize("text", ["{", "[]", "7", "null", "{}", '{"changedResourceId": 7}',
                                  '{"changedResourceId": "../../x"}'])
def test_unknown_messages_do_no_harm(running: Program, cloud: Cloud, text: str) -> None:
    cloud.vmapi.order("say", text=text)
    change(cloud, alias="after")
    wait_until(lambda: listed(running)[WEB]["vm_alias"] == "after")


@pytest.mark.parametrize("kind", ["vmapi", "cnapi", "mahi"])
@pytest.mark.parametrize("how", ["gone", "503"])
def test_cold_start_with_a_service_down(cloud: Cloud, tmp_path: Path, kind: str, how: str) -> None:
    service: Service = getattr(cloud, kind)
    if how == "gone":
        service.stop()
    else:
        service.order("fail", status=503)
    with start(cloud, tmp_path) as program:
        answer = get(program, "/v1/discover")
        assert answer.status == 503 and answer.headers["content-type"].startswith("text/plain")
        assert answer.headers["retry-after"]
        assert get(program, "/_ping").status == 200
        if how == "gone":
            service.start()
        else:
            service.order("fail", status=0)
        wait_until(lambda: get(program, "/v1/discover").status == 200)
        assert set(listed(program)) == {WEB, DB}


def test_a_service_that_fails_later_keeps_the_old_state(running: Program, cloud: Cloud) -> None:
    assert set(listed(running)) == {WEB, DB}
    for service in (cloud.vmapi, cloud.cnapi, cloud.mahi):
        service.order("fail", status=503)
    cloud.vmapi.order("cut")
    for _ in range(10):
        assert set(listed(running)) == {WEB, DB}
        assert get(running, page(WEB)).status == 200
    answer = get(running, page(BOBS), ("old_ec", "ec"))     # bob was never asked for: not a 401
    assert answer.status in (401, 503)


def test_mahi_down_is_never_a_401(running: Program, cloud: Cloud) -> None:
    cloud.mahi.order("fail", status=503)
    answer = get(running, page(WEB))
    assert (answer.status, answer.headers["x-cmon-error"]) == (503, "accounts_unreachable")
    cloud.mahi.stop()
    assert get(running, page(WEB)).status == 503
    cloud.mahi.start()
    assert get(running, page(WEB)).status == 200


def test_concurrent_requests_share_one_account_read(running: Program, cloud: Cloud) -> None:
    cloud.mahi.order("delay", seconds=0.3)
    before = cloud.mahi.order("stats")["count"].get("/accounts", 0)
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: get(running, page(WEB)).status, range(10)))
    assert answers == [200] * 10
    assert cloud.mahi.order("stats")["count"]["/accounts"] - before == 1
    assert get(running, page(WEB)).status == 200


def test_a_vmapi_that_forgets_everything_does_not_empty_discovery(running: Program, cloud: Cloud
                                                                  ) -> None:
    cloud.vmapi.order("fail", status=200)                   # an answer of the wrong shape
    cloud.vmapi.order("cut")
    running.wait_for_log("changefeed: upgrade rejected with b'HTTP/1.1 200 OK'")
    assert set(listed(running)) == {WEB, DB}


def test_restart_with_everything_down_answers_from_the_snapshot(cloud: Cloud, tmp_path: Path
                                                                ) -> None:
    with start(cloud, tmp_path, snapshot="state.json") as program:
        wait_until(lambda: get(program, "/-/ready").status == 200)
        assert get(program, page(WEB)).status == 200
        wait_until((tmp_path / "state.json").exists)
        wait_until(lambda: b'"alice"' in (tmp_path / "state.json").read_bytes(), timeout=60)
    for service in (cloud.vmapi, cloud.cnapi, cloud.mahi):
        service.stop()
    assert (tmp_path / "state.json").stat().st_mode & 0o077 == 0
    with start(cloud, tmp_path, snapshot="state.json") as program:
        assert get(program, page(WEB)).status == 200
        assert set(listed(program)) == {WEB, DB}
    content = (tmp_path / "state.json").read_bytes()
    (tmp_path / "state.json").write_bytes(content[:-10])
    with start(cloud, tmp_path, snapshot="state.json") as program:
        assert "ignoring the snapshot: its checksum is wrong" in program.log
        assert get(program, page(WEB)).status == 503


def test_outdated_ownership_is_not_trusted(cloud: Cloud, tmp_path: Path) -> None:
    with start(cloud, tmp_path, snapshot="state.json", max_age=2) as program:
        wait_until(lambda: get(program, page(WEB)).status == 200)
        wait_until((tmp_path / "state.json").exists)
        cloud.vmapi.stop()
        wait_until(lambda: get(program, page(WEB)).headers.get("x-cmon-error")
                   == "inventory_too_old")
        assert set(listed(program)) == {WEB, DB}            # discovery keeps its targets
    with start(cloud, tmp_path, snapshot="state.json", max_age=2) as program:
        assert "ignoring the snapshot: it is" in program.log
        assert get(program, "/-/ready").status == 503


@pytest.mark.parametrize("how", ["blind", "down"])
def test_a_connected_feed_confirms_nothing(cloud: Cloud, tmp_path: Path, how: str) -> None:
    """The publisher's own database poll may fail while the connection stays open."""
    with start(cloud, tmp_path, max_age=4) as program:
        wait_until(lambda: get(program, page(WEB)).status == 200)
        if how == "blind":              # the change is there, but nobody announces it
            cloud.vmapi.order("put", silent=True, vms=[{"uuid": WEB, "owner_uuid": BOB}])
            wait_until(lambda: get(program, page(WEB)).status == 404)
            assert WEB not in listed(program)
        else:                           # nor can it be read
            cloud.vmapi.order("fail", status=503)
            wait_until(lambda: get(program, page(WEB)).headers.get("x-cmon-error")
                       == "inventory_too_old")
            assert admin(program)["cmon_proxy_inventory_last_reload_successful"] == 0
            assert get(program, "/-/ready").status == 503
            cloud.vmapi.order("fail", status=0)
            wait_until(lambda: get(program, page(WEB)).status == 200)
        assert admin(program)["cmon_proxy_changefeed_connected"] == 1
        assert len(cloud.vmapi.order("stats")["registrations"]) == 1


def test_ten_thousand_vms_and_five_hundred_changes_a_second(cloud: Cloud, tmp_path: Path) -> None:
    nodes = [uuid(0x20000 + n) for n in range(200)]
    cloud.cnapi.order("servers", servers=[
        {"uuid": number, "hostname": f"cn{n}", "sysinfo": sysinfo("127.0.0.1")}
        for n, number in enumerate(nodes)])
    cloud.vmapi.order("put", vms=[
        vm(uuid(0x10000 + n), ALICE if n % 10 == 0 else uuid(0x30000 + n % 500), nodes[n % 200])
        for n in range(10_000)])
    with start(cloud, tmp_path) as program:
        wait_until(lambda: get(program, "/-/ready").status == 200)
        # at most 60 MB resident; nothing of it per request
        assert admin(program)["process_resident_memory_bytes"] < 90e6
        assert len(listed(program)) > 1000
        cloud.vmapi.order("churn", rate=500, seconds=3)
        statuses = set()
        while admin(program)["cmon_proxy_inventory_reads_total"] < 1000:
            statuses.add(get(program, page(uuid(0x10000))).status)
        assert statuses == {200}


def test_a_much_shorter_list_is_read_again_and_an_empty_one_rejected(running: Program, cloud: Cloud
                                                                    ) -> None:
    cloud.vmapi.order("forget", uuids=[DB, STOPPED, NAT])
    cloud.vmapi.order("cut")
    running.wait_for_log("vmapi lists 4 containers instead of 7: reading again", 2)
    wait_until(lambda: set(listed(running)) == {WEB})
    cloud.vmapi.order("forget", uuids=[WEB, BOBS, uuid(50), uuid(51)])
    cloud.vmapi.order("cut")
    running.wait_for_log("/vms returned an empty list", 2)
    assert set(listed(running)) == {WEB}


def test_a_container_that_cannot_be_read_leads_to_reading_all(running: Program, cloud: Cloud
                                                              ) -> None:
    cloud.vmapi.order("fail", status=500)
    change(cloud, alias="later")
    running.wait_for_log(f"cannot read container {WEB}, reading all")
    cloud.vmapi.order("fail", status=0)
    wait_until(lambda: listed(running)[WEB]["vm_alias"] == "later")


# in this process, with shorter times

@pytest.fixture()
def inside(cloud: Cloud, monkeypatch: Any) -> Iterator[Any]:
    """The source with its threads and a loop, without the server's sockets."""
    monkeypatch.setattr(cmon_proxy, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(cmon_proxy, "POLL_NODES_SECONDS", 0.2)
    monkeypatch.setattr(cmon_proxy, "Backoff", lambda *_: Backoff(0.02, 0.1))
    settings = Settings(TlsSettings(Path("x"), Path("y")), InventorySettings(
        vmapi=cloud.vmapi.url, cnapi=cloud.cnapi.url, mahi=cloud.mahi.url))
    server = Server("proxy", Registry())
    proxy = Proxy(settings, server, Registry(), random.random)
    source = TritonSource(settings, proxy, random.random)

    loop = threading.Thread(target=server.serve_forever)
    loop.start()
    server.loop.call_soon(source.start)
    wait_until(lambda: proxy.inventory.ready)
    yield source, proxy
    server.stop()
    loop.join()


def test_heartbeats_and_pings(inside: Any, cloud: Cloud) -> None:
    source, _ = inside
    wait_until(lambda: cloud.vmapi.order("stats")["heartbeats"] > 5)
    assert source.vms.follows
    cloud.vmapi.order("silence")            # it takes everything and says nothing more
    wait_until(lambda: len(cloud.vmapi.order("stats")["registrations"]) > 1)


@pytest.mark.parametrize("lasting, expected", [(True, [0.5] * 4), (False, [0.5, 1, 2, 4])])
def test_a_feed_that_ends_soon_is_connected_again_with_growing_pauses(
        lasting: bool, expected: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connection has all containers read."""
    class Ending:
        answers_pings, heard = False, 0.0

        def __init__(self, *_: Any) -> None:
            self.messages: list[list[bytes]] = [[b'{"bootstrapRoute": "/vms"}'], []]

        def receive(self, _timeout: float) -> list[bytes]:
            if not self.messages:
                raise ServiceError("closed")
            return self.messages.pop(0)

        def send(self, *_: Any) -> None:
            pass

        def close(self) -> None:
            pass
    monkeypatch.setattr(cmon_proxy, "WebSocket", Ending)
    monkeypatch.setattr(cmon_proxy, "HEARTBEAT_SECONDS", 0.0 if lasting else 1000.0)
    feed = ChangeFeed("http://vmapi", Server("proxy", Registry()), lambda: 0.5, *(
        lambda *_: None for _ in range(3)))
    pauses = []
    for _ in expected:
        with pytest.raises(ServiceError, match="closed"):
            feed._follow_once()
        pauses.append(feed._backoff.next())
    assert pauses == expected


def test_nodes_missing_from_two_lists_are_removed(inside: Any, cloud: Cloud) -> None:
    _, proxy = inside
    assert set(proxy.inventory.nodes) == {NODE_1, NODE_2}
    cloud.cnapi.order("servers", servers=[
        {"uuid": NODE_1, "hostname": "renamed", "sysinfo": sysinfo("127.0.0.1")}])
    wait_until(lambda: set(proxy.inventory.nodes) == {NODE_1})
    assert proxy.inventory.nodes[NODE_1].hostname == "renamed"


def test_services_that_answer_nonsense_change_nothing(inside: Any, cloud: Cloud) -> None:
    source, proxy = inside
    before = dict(proxy.inventory.vms), dict(proxy.inventory.nodes)
    for text in ("{", "{}", "7", "[7, null]", '[{"uuid": null}]', "[]"):
        for service in (cloud.vmapi, cloud.cnapi):
            service.order("nonsense", text=text)
        errors = [service.errors for service in source._services[:2]]
        cloud.vmapi.order("cut")
        wait_until(lambda errors=errors: all(  # type: ignore[misc]
            service.errors > before + 1 for service, before in zip(source._services, errors)))
        assert (proxy.inventory.vms, proxy.inventory.nodes) == before
    for service in (cloud.vmapi, cloud.cnapi):
        service.order("nonsense", text="")
    wait_until(lambda: source.vms.follows)
    assert set(proxy.inventory.vms) == set(before[0])


def test_nothing_of_the_loop_is_touched_by_another_thread(
        cloud: Cloud, monkeypatch: pytest.MonkeyPatch, inside: Any) -> None:
    """Results cross threads only as immutable values, through calls."""
    source, proxy = inside
    watched = [proxy.inventory, source.vms, source.nodes, source.accounts, source._notices]
    allowed = {VmReader: {"_list", "_read_all", "_fetch"}, type(source.nodes): {"_read"},
               Accounts: {"_read"}}
    strangers: list[str] = []
    ours: list[int] = []
    proxy.server.loop.call_soon(lambda: ours.append(threading.get_ident()))
    wait_until(lambda: ours)

    def guard(kind: type, handed: set[str]) -> None:
        """Each access of an attribute that is not a job's or never changes is checked."""
        def look(self: Any, name: str, real: Any = kind.__getattribute__) -> Any:
            value = real(self, name)
            if threading.get_ident() not in (ours[0], threading.main_thread().ident) and \
                    name not in handed and isinstance(
                        value, (dict, set, list, int, float, str, bool, cmon_proxy.Cache)):
                strangers.append(f"{kind.__name__}.{name}")
            return value
        monkeypatch.setattr(kind, "__getattribute__", look)
    for one in watched:
        guard(type(one), allowed.get(type(one), set()) | {"_port"})
    for number in range(30):
        cloud.vmapi.order("put", vms=[{"uuid": WEB, "alias": f"a{number}"}])
        proxy.server.loop.call_soon(source.accounts.find, "alice")
        if number % 10 == 0:
            cloud.vmapi.order("cut")
    wait_until(lambda: proxy.inventory.vms[WEB].alias == "a29")
    monkeypatch.undo()
    assert not strangers


def test_large_records_are_read_in_smaller_pages(cloud: Cloud) -> None:
    """Metadata is left out; a page that is still too large is requested in halves."""
    cloud.vmapi.order("put", vms=[
        vm(uuid(0x500 + number), ALICE, customer_metadata={"x": "y" * 70_000}, alias="z" * 2000)
        for number in range(40)])
    service = cmon_proxy.Service("vmapi", cloud.vmapi.url, max_body=20_000)
    pages = list(service.pages(f"/vms?state=active&fields={cmon_proxy.VM_FIELDS}", lambda _, last:
                               "&marker=" + urllib.parse.quote(json.dumps({"uuid": last}))))
    found = [record["uuid"] for records in pages for record in records]
    assert len(found) == len(set(found)) and {uuid(0x500 + n) for n in range(40)} <= set(found)
    assert service.page_size < 10
    service = cmon_proxy.Service("vmapi", cloud.vmapi.url, max_body=100)
    with pytest.raises(ServiceError, match="larger than 100 bytes"):
        list(service.pages("/vms?state=active", lambda count, last: ""))


@pytest.mark.parametrize("pages, said", [
    ([{"a": 1}], "did not return a list"), ([[7]], "repeats or omits uuids"),
    ([[{"uuid": WEB}], [{"uuid": WEB}]], "repeats or omits uuids"),
    ([[{"uuid": None}]], "repeats or omits uuids"),
    ([[{"uuid": WEB}], [{"uuid": DB}], [{"uuid": WEB}]], "repeats or omits uuids"),
], ids=str)
def test_a_list_that_does_not_end_is_refused(pages: list[Any], said: str) -> None:
    service = cmon_proxy.Service("vmapi", "http://127.0.0.1:1")
    left = iter(pages)
    service.get = lambda *_, **__: (200, next(left))  # type: ignore[method-assign,misc]
    with pytest.raises(ServiceError, match=said):
        list(service.pages("/vms?x=y", lambda count, last: ""))


class Readings:
    """A VmReader whose jobs run and answer as the test says."""

    def __init__(self) -> None:
        self.at, self.jobs, self.loop = 0.0, [], self
        self.inventory = Inventory(self.now)
        self.inventory.max_age = 400.0
        self.stored: dict[str, Any] = {}
        self.fails = False
        self.reader = VmReader(self, self, self.inventory,  # type: ignore[arg-type]
                               self, lambda: 0.5)  # type: ignore[arg-type]
        self.reader._lister = self.reader._fetchers = self  # type: ignore[assignment]

    def now(self) -> float:
        return self.at

    def call_soon(self, function: Any, *args: Any) -> None:
        function(*args)

    def every(self, seconds: float, function: Any) -> None:
        self.tick = function

    def submit(self, function: Any, *args: Any) -> bool:
        self.jobs.append((function, args))
        return True

    def get(self, path: str, *_: Any) -> Any:
        if self.fails:
            raise ServiceError("vmapi: down", down=True)
        record = self.stored.get(path.rpartition("/")[2])
        return (200, record) if record else (404, None)

    def pages(self, path: str, behind: Any, gentle: bool) -> Any:
        if self.fails:
            raise ServiceError("vmapi: down", down=True)
        return [list(self.stored.values())]

    def wrong(self, what: str) -> ServiceError:
        return ServiceError(what)

    def store(self, *vms: Any) -> None:
        self.stored = {one["uuid"]: one for one in vms}

    def go(self, job: int = 0) -> None:
        function, args = self.jobs.pop(job)
        function(*args)

    def pass_by(self, seconds: int) -> None:
        for _ in range(seconds):
            self.at += 1
            self.tick()


@pytest.fixture()
def readings() -> Readings:
    made = Readings()
    made.reader.start()
    made.store(vm(WEB, ALICE), vm(DB, ALICE))
    made.reader.feed_begins()
    made.pass_by(1)
    made.go()
    assert set(made.inventory.vms) == {WEB, DB}
    return made


def test_full_reads_happen_well_within_max_age(readings: Readings) -> None:
    for _ in range(5):
        before = readings.at
        readings.pass_by(125)
        assert len(readings.jobs) == 1 and readings.at - readings.inventory.confirmed > 100
        readings.at = before + 130          # reading takes a while: it confirms when it began
        readings.go()
        assert 20 <= readings.at - readings.inventory.confirmed <= 60


def test_a_failed_read_confirms_nothing_and_is_retried(readings: Readings) -> None:
    readings.fails = True
    readings.pass_by(130)
    assert len(readings.jobs) == 1
    for _ in range(6):
        readings.go()
        assert readings.reader.problem
        readings.pass_by(61)
        assert len(readings.jobs) == 1
    assert readings.inventory.refusal is not None
    readings.fails = False
    readings.inventory.ready = True
    readings.go()
    assert readings.inventory.refusal is None and not readings.reader.problem


def test_reading_one_container_confirms_no_other(readings: Readings) -> None:
    readings.inventory.ready = True
    for _ in range(50):
        readings.pass_by(10)
        del readings.jobs[:]                    # the list of all does not come
        readings.reader.changed(WEB)
        readings.go()
    assert readings.reader.fetched == 50 and readings.inventory.refusal is not None


def test_an_internal_error_does_not_stop_the_reads(readings: Readings,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(cmon_proxy, "vm_of", lambda *_: 1 // 0)
        readings.reader.changed(WEB)
        readings.go()
        readings.pass_by(60)
        readings.go()
        assert "ZeroDivisionError" in readings.reader.problem
    readings.stored[WEB] = vm(WEB, BOB)
    readings.pass_by(60)
    readings.go()
    assert readings.inventory.vms[WEB].owner == BOB and not readings.reader.problem


def test_without_a_feed_all_containers_are_read_every_minute(readings: Readings) -> None:
    readings.reader.feed_ends(ServiceError("gone"))
    readings.pass_by(61)
    assert len(readings.jobs) == 1
    readings.go()
    readings.pass_by(73)
    assert len(readings.jobs) == 1


def test_a_single_read_during_a_full_read_takes_precedence(readings: Readings) -> None:
    readings.pass_by(125)
    assert len(readings.jobs) == 1
    old = dict(readings.stored)
    readings.stored[WEB] = vm(WEB, BOB)
    del readings.stored[DB]
    readings.reader.changed(WEB)
    readings.reader.changed(DB)
    readings.go(1)
    readings.go(1)
    assert readings.inventory.vms[WEB].owner == BOB and DB not in readings.inventory.vms
    readings.stored = old                   # as the pages had been before the changes
    readings.go()
    assert readings.inventory.vms[WEB].owner == BOB and DB not in readings.inventory.vms


def test_a_single_read_requested_before_a_full_read_is_discarded(readings: Readings) -> None:
    readings.reader.changed(WEB)
    slow = readings.jobs.pop()
    function, args = slow
    readings.pass_by(125)
    readings.stored[WEB] = vm(WEB, BOB)
    readings.go()
    assert readings.inventory.vms[WEB].owner == BOB
    readings.stored[WEB] = vm(WEB, ALICE)   # what the slow answer had seen
    function(*args)
    assert readings.inventory.vms[WEB].owner == BOB


def test_unchanged_vms_keep_their_date_and_cached_answers(readings: Readings) -> None:
    before, generation = readings.inventory.vms[WEB], readings.inventory.generation(ALICE)
    readings.pass_by(125)
    readings.go()
    assert readings.inventory.vms[WEB] is before
    assert readings.inventory.generation(ALICE) == generation


class Clock:
    """A server and its loop for `Accounts`: a clock, and calls that are made at once."""

    def __init__(self) -> None:
        self.at = 0.0
        self.loop = self

    def now(self) -> float:
        return self.at

    def call_soon(self, function: Any, *args: Any) -> None:
        function(*args)


class Shelf:
    """A service and a pool: requests wait until the test releases them."""

    def __init__(self) -> None:
        self.account: Any = {"account": mahi_account(ALICE, "alice", "rsa")}
        self.fails = False
        self.error: ServiceError | None = None
        self.full = False
        self.jobs: list[Any] = []
        self.asked = self.requests = 0

    def get(self, path: str, allowed: Any = (200,), timeout: float = 0) -> Any:
        self.asked += path.startswith("/accounts")
        self.requests += 1
        if self.fails:
            raise ServiceError("mahi: down", down=True)
        if self.error is not None:
            raise self.error
        if path.startswith("/roles"):
            return 200, {}
        return (200, self.account) if self.account else (404, None)

    def wrong(self, what: str) -> ServiceError:
        return ServiceError(what)

    def submit(self, function: Any, *args: Any) -> bool:
        if not self.full:
            self.jobs.append((function, args))
        return not self.full

    def go(self) -> None:
        jobs, self.jobs = self.jobs, []
        for function, args in jobs:
            function(*args)


@pytest.fixture()
def desk() -> Any:
    shelf, clock = Shelf(), Clock()
    mahi = Accounts(shelf, clock)  # type: ignore[arg-type]
    mahi._pool = mahi._unknown_pool = shelf  # type: ignore[assignment]
    return mahi, shelf, clock


def known(desk: Any) -> Any:
    """After the first request."""
    mahi, shelf, _ = desk
    later = mahi.find("alice")
    shelf.go()
    assert later.answer.status == 200
    return mahi.find("alice")


def test_an_account_is_used_refreshed_or_read_again_by_its_age(desk: Any) -> None:
    mahi, shelf, clock = desk
    first = known(desk)
    assert first.login == "alice" and shelf.asked == 1
    clock.at = 29.0
    assert mahi.find("alice") is first and not shelf.jobs
    clock.at = 31.0
    assert mahi.find("alice") is first and mahi.find("alice") is first
    assert len(shelf.jobs) == 1                     # read again behind the request's back, once
    shelf.go()
    assert mahi.find("alice") is first              # unchanged: the same object
    clock.at = 100.0
    shelf.account = {"account": mahi_account(ALICE, "alice", "ec")}
    later = mahi.find("alice")                      # too old: the request waits
    assert isinstance(later, Deferred) and later.answer is None
    shelf.go()
    assert later.answer.status == 200 and mahi.find("alice") is not first


def test_a_removed_key_is_soon_rejected(desk: Any) -> None:
    mahi, shelf, clock = desk
    known(desk)
    shelf.account = None
    clock.at = 61.0
    later = mahi.find("alice")
    shelf.go()
    assert later.answer.status == 200 and mahi.find("alice") is None
    assert shelf.asked == 2
    clock.at = 90.0
    assert mahi.find("alice") is None and shelf.asked == 2      # also what is not there is kept
    clock.at = 122.0
    assert isinstance(mahi.find("alice"), Deferred)


def test_while_mahi_is_down_old_accounts_serve_and_then_no_more(desk: Any) -> None:
    mahi, shelf, clock = desk
    first = known(desk)
    shelf.fails = True
    clock.at = 100.0
    later = mahi.find("alice")
    shelf.go()
    assert later.answer.status == 200               # go on: what is known is young enough
    assert mahi.find("alice") is first              # and nobody waits for five seconds
    clock.at = 106.0
    assert isinstance(mahi.find("alice"), Deferred)
    clock.at = 301.0
    shelf.go()
    later = mahi.find("alice")
    shelf.go()
    assert later.answer.status == 503
    stranger = mahi.find("bob")
    shelf.go()
    assert stranger.answer.status == 503            # never 401: we do not know
    shelf.fails = False
    later = mahi.find("alice")
    shelf.go()
    assert later.answer.status == 200 and mahi.find("alice") is first


def test_requests_to_mahi_are_bounded(desk: Any, monkeypatch: Any) -> None:
    mahi, shelf, clock = desk
    assert mahi.find("") is None
    shelf.full = True
    with pytest.raises(Refused):
        mahi.find("alice")
    shelf.full = False
    monkeypatch.setattr(mahi.unknown, "limit", 1000)
    for number in range(6):
        mahi.find(f"nobody{number}")
        shelf.account = None
        shelf.go()
    assert len(mahi.unknown) == 3
    shelf.account = {"account": mahi_account(BOB, "bob", "rsa")}    # not the one that was asked for
    later = mahi.find("alice")
    shelf.go()
    assert later.answer.status == 503


@pytest.mark.parametrize("login", ["x" * 65, "x" * 60_000, "a\nb", "\0", "a\ud800", ""])
def test_an_impossible_login_is_not_looked_up(desk: Any, login: str) -> None:
    accounts, shelf, _ = desk
    assert accounts.find(login) is None and not shelf.jobs


def both_known(desk: Any) -> Any:
    accounts, shelf, clock = desk
    first = known(desk)
    for number, login in ((ALICE, "alice"), (BOB, "bob"), (OPERATOR, "root"), (uuid(7), "dave")):
        shelf.account = {"account": mahi_account(number, login, "rsa")}
        accounts.find(login)
        shelf.go()
    assert len(accounts.known) == 4
    return first


def test_a_failure_for_one_login_affects_only_that_login(desk: Any) -> None:
    """Every 2 s a stranger's login is answered 414; and one tenant's account cannot be read."""
    accounts, shelf, clock = desk
    both_known(desk)
    clock.at = 45.0
    for number in range(40):                        # strangers, then bob
        clock.at += 2
        shelf.error = ServiceError("mahi: /accounts answers 414")
        assert isinstance(accounts.find(f"stranger{number}"), Deferred)
        shelf.go()
        accounts.find("bob")
        shelf.go()
    shelf.error, shelf.account = None, None         # alice's account is gone
    later = accounts.find("alice")
    shelf.go()
    assert isinstance(later, Deferred) and accounts.find("alice") is None


@pytest.mark.parametrize("logins, down", [
    (("alice", "bob"), False), (("alice", "bob", "root"), True), (("x1", "x2", "x3", "x4"), False)])
def test_mahi_counts_as_down_when_several_known_accounts_fail(desk: Any, logins: Any, down: bool
                                                             ) -> None:
    accounts, shelf, clock = desk
    both_known(desk)
    clock.at = 100.0
    shelf.error = ServiceError("mahi: down", down=True)
    for login in logins:
        accounts.find(login)
        shelf.go()
    assert isinstance(accounts.find("dave"), Deferred) is not down


def test_the_current_account_decides_whether_an_answer_is_sent(desk: Any) -> None:
    accounts, shelf, clock = desk
    default = Account(BOB, "bob", {})
    assert accounts.recall("alice", default) is default         # nothing is known: what it was
    first = known(desk)
    assert accounts.recall("alice", default) is first
    clock.at, shelf.account = 100.0, None
    accounts.find("alice")
    shelf.go()
    assert accounts.recall("alice", default) is None


def test_known_accounts_do_not_wait_for_unknown_logins(desk: Any) -> None:
    accounts, shelf, clock = desk
    both_known(desk)
    shelf.jobs.clear()
    accounts._pool, strangers = Shelf(), shelf
    strangers.full = True                           # their queue is full
    clock.at = 100.0
    with pytest.raises(Refused):
        accounts.find("stranger")
    assert isinstance(accounts.find("alice"), Deferred) and len(accounts._pool.jobs) == 1


def test_a_flood_of_unknown_logins_does_not_affect_known_accounts() -> None:
    """Their lookups hang; a known account is still read, in its own pool."""
    go = threading.Event()

    class Slow(Shelf):
        def get(self, path: str, *more: Any) -> Any:
            if "stranger" in path:
                go.wait(30)
            return super().get(path, *more)

    class Loop(Clock):
        """Calls of other threads wait for `turn`."""

        def __init__(self) -> None:
            super().__init__()
            self.calls: Any = queue.SimpleQueue()

        def call_soon(self, function: Any, *args: Any) -> None:
            self.calls.put((function, args))

        def turn(self) -> bool:
            while not self.calls.empty():
                function, args = self.calls.get()
                function(*args)
            return True
    shelf, clock = Slow(), Loop()
    accounts = Accounts(shelf, clock)  # type: ignore[arg-type]
    accounts.find("alice")
    wait_until(lambda: clock.turn() and len(accounts.known) == 1)
    clock.at, verdicts = 100.0, []
    for number in range(200):
        try:
            accounts.find(f"stranger{number}", f"10.0.{number}.1")
            verdicts.append(True)
        except Refused:
            verdicts.append(False)
    assert 64 <= verdicts.count(True) <= 72             # the rest find a full queue
    later = accounts.find("alice")
    assert isinstance(later, Deferred)
    wait_until(lambda: clock.turn() and later.answer)
    assert later.answer is not None and later.answer.status == 200
    go.set()
    wait_until(lambda: clock.turn() and not accounts._reading)


def test_lookups_of_unknown_logins_are_limited_by_address(desk: Any) -> None:
    accounts, shelf, clock = desk
    both_known(desk)
    clock.at = 100.0
    numbers = itertools.count()

    def lets_in(address: str, count: int = 100) -> int:
        admitted = 0
        for _ in range(count):
            try:
                accounts.find(f"stranger{next(numbers)}", address)
                admitted += 1
            except Refused as refusal:
                assert refusal.status == 503        # never 401: we do not know
        return admitted
    assert lets_in("10.0.0.1") == 60 and lets_in("10.0.0.1") == 0 and accounts.refused == 140
    assert lets_in("10.0.0.2") == 60
    assert lets_in("2001:db8::1", 50) + lets_in("2001:db8::2", 50) == 60    # one network
    clock.at += 10
    assert lets_in("10.0.0.1") == 10
    assert isinstance(accounts.find("alice", "10.0.0.1"), Deferred)         # a known one


def test_an_unknown_login_costs_as_many_requests_as_a_known_one(desk: Any) -> None:
    accounts, shelf, _ = desk
    counts = []
    for account in (shelf.account, None):
        before = shelf.requests
        shelf.account = account
        accounts.find("alice" if account else "nobody")
        shelf.go()
        counts.append(shelf.requests - before)
    assert counts == [2, 2]


def test_known_and_unknown_logins_are_indistinguishable() -> None:
    """Not by the answer, by waiting for mahi, or by the limit of lookups of an address."""
    class Mahi(Shelf):
        def get(self, path: str, *more: Any) -> Any:
            self.account = {"account": mahi_account(ALICE, "alice", "rsa")} \
                if "alice" in path else None
            return super().get(path, *more)
    seen = []
    for login, idle in (("nobody", False), ("alice", False), ("alice", True), ("bob", False)):
        world, shelf = World(1), Mahi()
        accounts = Accounts(shelf, world.server)  # type: ignore[arg-type]
        accounts._pool = accounts._unknown_pool = shelf  # type: ignore[assignment]
        world.proxy.directory = accounts
        certificate = first_certificate(make_certificate(make_key(), login).decode())
        told: list[Any] = []

        def probe(address: str) -> None:
            path, before = "/v1/discover", shelf.requests
            request = Request("GET", path, path, {}, {}, b"", "cmon.test", False, True,
                              Peer(address, "main", certificate))
            answer = respond(world.proxy.routes(), request)
            waited = isinstance(answer, Deferred)
            while isinstance(answer, Deferred):
                shelf.go()
                world.server.loop.run_due()
                answer = answer.answer or answer
            told.append((waited, shelf.requests - before, answer.status,
                         dict(answer.headers).get("X-Cmon-Error"), sorted(
                             left for left, _ in map(accounts._lookups.get, accounts._lookups))))

        def step(seconds: float) -> None:
            world.clock[0] += seconds
        step(1000)
        accounts.find("alice", "10.9.9.9")              # she is here, and others look her up
        accounts._lookups.clear()
        shelf.go()
        world.server.loop.run_due()
        step(100 if idle else 65)
        if not idle:
            accounts.keep_warm()
            shelf.go()
            world.server.loop.run_due()
        for wait, address in ((0, "10.0.0.1"), (1, "10.0.0.1"), (1, "10.0.0.2"), (62, "10.0.0.1")):
            step(wait)
            probe(address)
        step(62)
        for number in range(100):
            try:
                accounts.find(f"x{number}", "10.0.0.1")
            except Refused:
                pass
        shelf.go()
        world.server.loop.run_due()
        probe("10.0.0.1")                               # no lookups are left
        step(62)
        shelf.fails = True
        probe("10.0.0.3")
        seen.append(told)
        world.close()
    assert [row[:4] for row in seen[0]] == [
        (True, 2, 401, "unknown_key"), (False, 0, 401, "unknown_key"),
        (False, 0, 401, "unknown_key"), (True, 2, 401, "unknown_key"),
        (False, 0, 503, "accounts_unreachable"), (True, 1, 503, "accounts_unreachable")]
    for told in seen:           # a known account is read whoever its client is: that takes a moment
        told[4] = told[4][2:]
    assert seen[0] == seen[1] == seen[2] == seen[3]


def test_accounts_in_use_are_refreshed_and_others_are_not(desk: Any) -> None:
    accounts, shelf, clock = desk
    both_known(desk)
    shelf.account = {"account": mahi_account(ALICE, "alice", "rsa")}
    for _ in range(60):                             # a scrape each minute, looked after each 5 s
        for _ in range(12):
            clock.at += 5
            accounts.keep_warm()
            jobs = [args[-1:] for _, args in shelf.jobs]
            assert clock.at < 125 or jobs in ([], [("alice",)])
            shelf.jobs = [job for job in shelf.jobs if job[1][-1] == "alice"]
            for login in ("bob", "root", "dave"):
                accounts._reading.pop(login, None)
            shelf.go()
        assert accounts.find("alice").login == "alice"      # nobody waits


# the parts, without processes

def test_nodes_with_unexpected_members() -> None:
    found = nodes_of([None, {}, {"uuid": 7}, {"uuid": NODE_1.upper(), "hostname": None},
                      {"uuid": NODE_2, "hostname": "b", "sysinfo": {"Admin IP": "10.0.0.1"}}], 9163)
    assert found[NODE_1].address is None and found[NODE_2].address == ("10.0.0.1", 9163)


@pytest.mark.parametrize("record", [None, {}, {"account": None}, {"account": {"uuid": "x"}},
                                    {"account": {"uuid": ALICE}}, []])
def test_no_account(record: Any) -> None:
    assert account_of(record, None) is None


def test_account_without_keys_and_groups() -> None:
    found = account_of({"account": {"uuid": ALICE, "login": "a"}}, {"u": None, "v": {"keys": 7}})
    assert found is not None and not found.keys and not found.operator and not found.approved
    found = account_of({"account": {"uuid": ALICE, "login": "a", "approved_for_provisioning": False,
                                    "isOperator": True, "keys": {"a": "junk", "b": key("rsa")}}}, 7)
    assert found is not None and len(found.keys) == 1 and found.operator and not found.approved


def test_frames_are_parsed_in_any_pieces() -> None:
    def server_frame(opcode: int, payload: bytes, final: bool = True) -> bytes:
        size = len(payload)
        length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big") \
            if size < 65536 else b"\x7f" + size.to_bytes(8, "big")
        return bytes([(0x80 if final else 0) | opcode]) + length + payload
    payloads = [b"", b"x" * 125, b"y" * 126, b"z" * 70_000]
    whole = b"".join(server_frame(1, payload) for payload in payloads) + server_frame(9, b"p")
    generator = random.Random(5)
    for _ in range(20):
        frames, found, at = Frames(), [], 0
        while at < len(whole):
            size = generator.choice((1, 2, 3, 1000, 40_000))
            found += frames.feed(whole[at:at + size])
            at += size
        assert found == [(1, True, payload) for payload in payloads] + [(9, True, b"p")]


@pytest.mark.parametrize("raw", [b"\xc1\x00", b"\x81\x80\0\0\0\0", b"\x89\x7e\x00\xff", b"\x09\x00",
                                 b"\x81\x7f\x00\x00\x00\x00\x7f\xff\xff\xff"])
def test_bad_frames(raw: bytes) -> None:
    with pytest.raises(ServiceError):
        Frames().feed(raw)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
def test_sent_frames_are_masked(size: int) -> None:
    payload, mask = bytes(index % 251 for index in range(size)), b"\x01\x02\x03\x04"
    frame = frame_of(1, payload, mask)
    assert frame[0] == 0x81 and frame[1] & 0x80
    start = {126: 4, 127: 10}.get(frame[1] & 127, 2)
    assert frame[start:start + 4] == mask
    assert bytes(b ^ mask[i % 4] for i, b in enumerate(frame[start + 4:])) == payload


def test_snapshots_read_back_what_was_written(tmp_path: Path) -> None:
    one = vm_of(vm(WEB, ALICE, tags={"triton.cmon.groups": "a,b"}), "x", 1)
    who = account_of({"account": mahi_account(ALICE, "alice", "rsa", "ec")}, None)
    assert one is not None and who is not None
    nodes = list(nodes_of([{"uuid": NODE_1, "sysinfo": sysinfo("10.0.0.1")}, {"uuid": NODE_2}],
                          9163).values())
    snapshot = Snapshot(tmp_path / "s")
    saved = Saved((one,), tuple(nodes), OPERATOR, ((who, 5.0),), 12.0)
    snapshot.write(saved)
    found = snapshot.read()
    assert found[:3] == saved[:3] and found.confirmed_at == 12.0
    assert found.accounts[0][0] == who and 5 <= found.accounts[0][1] < 60
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    for body in (b"[]", b"{}", b'{"format":2}', b'{"format":3,"vms":7}', b"7", b"[" * 100_000,
                 json.dumps({"format": 3, "vms": [], "nodes": [], "accounts": [],
                             "manta_owner": "", "confirmed_at": 1e300}).encode()):
        (tmp_path / "s").write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        with pytest.raises(SnapshotError):
            snapshot.read()
    for content in (b"", b"x\ny", b"[]"):
        (tmp_path / "s").write_bytes(content)
        with pytest.raises(SnapshotError, match="checksum"):
            snapshot.read()


@pytest.fixture()
def saved(tmp_path: Path) -> Any:
    """A folder with a snapshot as the proxy makes it."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    who = account_of({"account": mahi_account(ALICE, "mallory", "rsa", isOperator=True)}, None)
    assert who is not None
    content = Saved((), (), OPERATOR, ((who, 5.0),), 12.0)
    Snapshot(folder / "s").write(content)
    return folder, content


@pytest.mark.parametrize("attack, said", [
    (lambda folder: (folder / "s").chmod(0o666), r"/s can be written by others \(mode 666\)"),
    (lambda folder: (folder / "s").chmod(0o620), "can be written by others"),
    (lambda folder: os.chown(folder / "s", 65534, -1), "/s belongs to uid 65534, not to this user"),
    (lambda folder: os.chown(folder, 65534, -1), "/folder belongs to uid 65534"),
    (lambda folder: folder.chmod(0o777), "/folder can be written by others"),
    (lambda folder: folder.chmod(0o1777), "/folder can be written by others"),
    (lambda folder: (folder / "s").rename(folder / "t") and (folder / "s").symlink_to("t"),
     "Too many levels of symbolic links"),
    (lambda folder: (folder / "s").unlink() or os.mkfifo(folder / "s"), "is not a regular file"),
], ids=["666", "620", "chown", "chown folder", "777", "sticky", "symlink", "fifo"])
def test_a_snapshot_writable_by_others_is_refused(saved: Any, attack: Any, said: str) -> None:
    folder, content = saved
    attack(folder)
    with pytest.raises((SnapshotError, OSError), match=said):
        Snapshot(folder / "s").read()
    if said.startswith("/folder"):          # nor is one written there
        with pytest.raises(SnapshotError, match=said):
            Snapshot(folder / "s").write(content)


@pytest.mark.parametrize("name", ["s", "s.new"])
def test_writing_a_snapshot_follows_no_symlink(saved: Any, name: str, tmp_path: Path) -> None:
    folder, content = saved
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (folder / "s").unlink()
    (folder / name).symlink_to(victim)
    Snapshot(folder / "s").write(content)
    assert victim.read_text() == "precious" and not (folder / "s").is_symlink()
    assert Snapshot(folder / "s").read().manta_owner == OPERATOR


def test_a_symlink_created_during_the_write_is_not_followed(saved: Any, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch
                                                           ) -> None:
    folder, content = saved
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(cmon_proxy.os, "unlink",
                        lambda *_, **more: (folder / "s.new").symlink_to(victim))
    with pytest.raises(FileExistsError):
        Snapshot(folder / "s").write(content)
    assert victim.read_text() == "precious"


def test_check_config_reports_an_unusable_snapshot_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    urls = dict.fromkeys(("vmapi", "cnapi", "mahi"), "http://127.0.0.1:1")
    done = Program.proxy(proxy_config(tmp_path, inventory={**urls, "snapshot": "s"}),
                         "--check-config")
    assert done.wait() == 0
    assert f"warning: inventory.snapshot: cannot keep a snapshot: {tmp_path} can be" in done.log
    assert "inventory from http://127.0.0.1:1" in done.output


def test_an_ignored_snapshot_is_logged(cloud: Cloud, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with start(cloud, tmp_path, snapshot="open/state.json") as program:
        assert "ignoring the snapshot: " in program.log
        program.wait_for_log("cannot write the snapshot: .*/open can be written by others")
        wait_until(lambda: get(program, "/-/ready").status == 200)
        assert admin(program)["cmon_proxy_snapshot_last_write_timestamp_seconds"] == 0
