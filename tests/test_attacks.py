# SPDX-License-Identifier: MPL-2.0
"""Attacks of a tenant on others, and of a malicious node."""
from __future__ import annotations

import dataclasses
import gzip
import json
import re
import resource
import signal
import socket
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

import cmon_agent
import cmon_proxy
from agents import (
    NODE_1, TLS, Agent, client_tls, inventory, proxy, proxy_config, uuid, vm, write_inventory)
from cmon_agent import Deferred, Peer, Refused, Request, reused, wire
from cmon_proxy import (
    Account, AgentSettings, AuthorizedKey, Certificates, Copy, InventorySettings, QuotaSettings,
    Quotas, Reply, Saved, Settings, Snapshot, TlsSettings, Vm, by_owner, first_certificate,
    keep_fixed, make_certificate, make_key, vm_of)
from support import ROOT, Connection, Program, respond, wait_until
from test_proxy import code, connect, get, page
from test_relay import Running
from test_tenancy import World

WEB = uuid(1)
LISTS = ("/v1/discover", "/v1/sd", "/v1/fleet/metrics", "/", "/c/vm1")


class House(World):
    """A proxy without sockets; the first account has so many containers."""

    def __init__(self, containers: int, **quota: Any) -> None:
        super().__init__(1)
        self.owner = self.accounts[0][0]
        self.give(self.owner.uuid, containers)
        if quota:
            self.proxy.quotas.reload(QuotaSettings(**quota))
        self.bucket = self.proxy.quotas.of(self.owner)

    def give(self, owner: str, containers: int) -> None:
        """All containers are this account's."""
        made = [vm_of(vm(uuid(n + 1), owner), "test", 0) for n in range(containers)]
        self.proxy.inventory.replace(*by_owner([one for one in made if one is not None]))

    def request(self, path: str, query: Any = (), which: int = 0, host: str = "cmon.test",
                **headers: str) -> Request:
        """A request of an account on its first connection."""
        return Request("GET", path, path, dict(query), headers, b"", host, True, True,
                       self.peers[which][0])

    def ask(self, path: str, query: Any = (), which: int = 0, **headers: str) -> Any:  # type: ignore
        """An answer, or a Deferred, as the server gets it."""
        return respond(self.proxy.routes(), self.request(path, query, which, **headers))

    def settled(self, answer: Any) -> Any:
        """The answer, once the threads have made it."""
        if not isinstance(answer, Deferred):
            return answer
        later = answer

        def there() -> Any:
            self.server.loop.run_due()
            return later.answer
        return wait_until(there)

    def text(self, path: str, which: int = 0) -> str:
        """The body of an answer, which must be a 200."""
        request = self.request(path, (), which)._replace(gzip=False)
        answer = self.settled(respond(self.proxy.routes(), request))
        assert answer.status == 200, answer
        return wire(answer).partition(b"\r\n\r\n")[2].decode()


@pytest.fixture()
def house() -> Iterator[Callable[..., House]]:
    made: list[House] = []

    def make(*args: Any, **more: Any) -> House:
        made.append(House(*args, **more))
        return made[-1]
    yield make
    for one in made:
        one.close()


def status_of(answer: Any) -> tuple[int, str]:
    """Status and code of a refusal that was given at once."""
    assert not isinstance(answer, Deferred)
    return answer.status, dict(getattr(answer, "headers", ())).get("X-Cmon-Error", "")


# the loop is everybody's

def calls_of(function: Callable[[], Any]) -> int:
    """The number of function calls, of Python and C, in this thread."""
    count = 0

    def counted(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")
    sys.setprofile(counted)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("query", [{}, {"shard": "7/1024"}], ids=["all", "shard"])
def test_work_that_grows_with_an_account_is_not_done_in_the_loop(path: str, query: Any, house: Any
                                                                ) -> None:
    if path.startswith("/c/") and query:
        return
    calls = []
    for containers in (100, 4000):
        world = house(containers)
        world.ask("/v1/gz/discover")            # whatever is done once
        calls.append(calls_of(lambda: world.ask(path, query)))
        assert world.settled(world.ask(path, query)).status == 200
    assert max(calls) < 1500, calls     # the start of a thread is counted or not


def test_a_shard_costs_no_hash(house: Any, monkeypatch: Any) -> None:
    world = house(1000)
    hashed: list[int] = []
    real = cmon_proxy.hashlib.blake2b
    monkeypatch.setattr(cmon_proxy.hashlib, "blake2b",
                        lambda *args, **more: hashed.append(1) or real(*args, **more))
    shards = [world.settled(world.ask("/v1/discover", {"shard": f"{k}/1024"})) for k in (1, 2, 3)]
    assert {answer.status for answer in shards} == {200} and not hashed


def test_an_account_with_slow_lists_leaves_a_thread_for_others(house: Any) -> None:
    world = house(100)
    gate = threading.Event()
    builder, proxy_ = world.proxy._builder, world.proxy

    def slow() -> Any:
        gate.wait(30)
        return cmon_proxy.text(200, "slow")
    caller = cmon_proxy.Caller(cmon_proxy.Grant(world.owner, None, cmon_proxy.Identity(
        world.accounts[0][1])), world.bucket, False)
    request = world.request("/")
    for number in range(40):
        builder.answer(request, caller, ("slow", number), None, slow)
    waiting = world.ask("/v1/discover")         # its own: behind the others
    world.give(world.accounts[1][0].uuid, 100)
    other = world.settled(world.ask("/v1/discover", which=1))
    assert other.status == 200 and waiting.answer is None
    with pytest.raises(Refused):
        for number in range(100, 200):
            builder.answer(request, caller, ("slow", number), None, slow)
    gate.set()
    assert proxy_ is world.proxy and world.settled(waiting).status == 200


def test_a_list_is_refused_without_a_thread_and_built_later(house: Any, monkeypatch: Any) -> None:
    world = house(100)

    def no_more(_thread: Any) -> None:
        raise RuntimeError("can't start new thread")
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", no_more)
        for path in LISTS:
            later = world.ask(path)
            assert later.answer is not None and later.answer.status == 503
    for path in LISTS:
        assert world.settled(world.ask(path)).status == 200
    assert not world.proxy._builder._queues and not world.proxy._builder._building


def test_concurrent_requests_for_a_list_share_one_build(house: Any, monkeypatch: Any) -> None:
    world = house(100)
    made: list[int] = []
    real = cmon_proxy.json_answer
    monkeypatch.setattr(cmon_proxy, "json_answer", lambda *args: made.append(1) or real(*args))
    answers = [world.ask("/v1/discover") for _ in range(50)]
    assert {world.settled(answer).status for answer in answers} == {200}
    assert world.ask("/v1/discover").status == 200 and len(made) == 1


# caches

def grown(function: Callable[[], Any]) -> int:
    """The bytes by which Python's memory grows."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    function()
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return held


def test_cached_lists_use_the_memory_that_they_count(house: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(cmon_proxy, "KEPT_ANSWERS_BYTES", 2 << 20)
    world = house(20)
    cache = world.proxy._builder._kept

    def flood() -> None:
        for number in range(600):
            groups = ",".join(f"{number}.{word}" for word in range(1500))       # 10 kB
            assert world.ask("/v1/discover", {"groups": groups}).status == 200
    held = grown(flood)
    assert 1 << 20 < cache.bytes <= 2 << 20 and held < 1.5 * cache.limit
    assert len(cache) < 100


def test_cached_pages_use_the_memory_that_they_count(house: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(cmon_proxy, "KEPT_COPIES_BYTES", 1 << 20)
    monkeypatch.setattr(cmon_proxy, "KEPT_ANSWERS_BYTES", 2 << 20)
    world = house(300)
    bomb = gzip.compress(b"x 1\n" * 100_000)                    # 400 kB in one kB

    def flood() -> None:
        for number in range(300):
            world.proxy.pages._copies.put((uuid(number + 1), False), Copy(
                world.owner.uuid, Reply(200, bytes(bomb), True), 0.0))
        for number in range(300):
            world.bucket.soft = 0.0
            request = world.request(page(uuid(number + 1)))._replace(gzip=False)
            answer = world.settled(respond(world.proxy.routes(), request))
            assert answer.status == 200 and b"cmon_quota_limited 1" in wire(answer)
    held = grown(flood)
    assert held < 5 << 20, held
    assert world.proxy._builder._kept.bytes <= 2 << 20


def test_cached_certificates_use_the_memory_that_they_count(monkeypatch: Any) -> None:
    monkeypatch.setattr(cmon_proxy, "KEPT_CERTIFICATES_BYTES", 1 << 20)
    key = make_key()
    names = [f"{number}.example" for number in range(400)]
    shown = [first_certificate(make_certificate(
        key, "x", names=names, serial=number + 1).decode()) for number in range(300)]
    assert len(shown[0]) > 5000
    certificates = Certificates()
    signer = cmon_proxy.private_key(key)

    def flood() -> None:
        for der in shown:
            assert certificates.signed(certificates.read(bytes(bytearray(der))), signer)
    held = grown(flood)
    assert 1 << 19 < certificates.cache.bytes <= 1 << 20 and held < 2 << 20


def test_cached_heads_of_agents_use_the_memory_that_they_count() -> None:
    running = Running()
    cache = running.upstreams._heads
    for number in range(20_000):
        head = (f"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-{number}: " + "x" * 1500 + "\r\n\r\n")
        assert running.upstreams.known_head(head.encode()).length == 2
    assert 1 << 20 < cache.bytes <= cache.limit
    before = cache.bytes
    running.upstreams.known_head(b"HTTP/1.1 200 OK\r\nX: " + bytes(b"y" * 60_000) + b"\r\n\r\n")
    assert cache.bytes == before
    running.close()


def test_no_string_of_a_client_is_kept_forever() -> None:
    """Python 3.12 never frees what sys.intern() was given: each request's headers, for example."""
    for path in ROOT.glob("cmon*.py"):
        assert "sys.intern(" not in path.read_text().replace("Not sys.intern():", "")
    one, other = ("".join(["x-", str(5)]) for _ in range(2))
    assert one is not other and reused(one) is reused(other) == one

    def flood() -> None:
        for number in range(100_000):
            assert reused(f"x-header-{number}") == f"x-header-{number}"
    held = grown(flood)
    strings = cmon_agent.STRINGS
    assert strings.limit // 2 < strings.bytes <= strings.limit and strings.evicted > 50_000
    assert held < 1.5 * strings.limit, held


def test_every_cache_shows_its_size(house: Any) -> None:
    names = {cache.name for cache in house(1).registry.caches}
    assert {"strings", "answers", "copies", "certificates", "agent heads", "timeouts"} <= names


def test_a_shared_refusal_does_not_accumulate_tracebacks(house: Any) -> None:
    world = house(1)
    peer = Peer("192.0.2.1", "main", None)
    for _ in range(50):
        request = world.request("/v1/discover")._replace(peer=peer)
        assert status_of(respond(world.proxy.routes(), request)) == (401, "no_certificate")
    trace, length = peer.identity.refusal.__traceback__, 0
    while trace is not None:
        trace, length = trace.tb_next, length + 1
    assert length < 10


# one quota

@pytest.mark.parametrize("path", [*LISTS, page(WEB)])
def test_over_quota_refuse_applies_to_every_kind_of_request(path: str, house: Any) -> None:
    world = house(1, per_minute=1, burst=1, hard_per_minute=1000, over_quota="refuse")
    assert world.settled(world.ask("/v1/discover")).status == 200
    assert status_of(world.ask(path)) == (429, "quota")


def test_over_the_quota_stale_refuses_pages_without_a_copy_and_not_lists(house: Any) -> None:
    world = house(1, per_minute=1, burst=1, hard_per_minute=1000)
    assert world.ask("/v1/discover").status == 200
    assert world.ask("/v1/fleet/metrics").status == 200
    assert status_of(world.ask(page(WEB))) == (429, "quota")


@pytest.mark.parametrize("path, cost", [
    ("/v1/discover", 11), ("/v1/sd", 11), ("/v1/fleet/metrics", 41), ("/", 41), (page(WEB), 1)])
def test_a_list_costs_by_its_size(path: str, cost: float, house: Any) -> None:
    world = house(1000, per_minute=60, burst=500)
    world.ask(path)
    assert world.bucket.soft == 500 - cost and world.bucket.hard < world.bucket.limits.hard_burst


def test_a_request_costs_at_most_half_a_burst(house: Any) -> None:
    world = house(1000, per_minute=60, burst=10, over_quota="refuse")
    assert [world.settled(world.ask("/")).status for _ in range(3)] == [200, 200, 429]


def test_an_account_that_becomes_an_operator_is_exempt() -> None:
    quotas = Quotas(QuotaSettings(exempt_operators=True, burst=2), lambda: 0.0)
    account = Account("1", "a", {})
    bucket = quotas.of(account)
    assert not bucket.limits.exempt
    assert quotas.of(account._replace(operator=True)) is bucket and bucket.limits.exempt
    assert not quotas.of(account).limits.exempt


# slots of a node

def test_a_short_timeout_does_not_free_a_slot_while_the_agent_works() -> None:
    running, agent = Running(max_in_flight=2), Agent()
    agent.modes["/v1/x/metrics"] = "hang"
    for _ in range(12):
        running.ask(agent.address, 0.1)
    assert running.wait(12) == ["deadline"] * 12
    for _ in range(12):
        running.ask(agent.address, 0.1)
    assert running.wait(24) == ["deadline"] * 24
    assert len(agent.paths()) == 2
    agent.drop()                                # the agent closes: the slots are free
    agent.modes.clear()
    running.ask(agent.address, 30.0)
    assert running.wait(25)[24] == 200
    running.close()
    agent.close()


def test_a_late_answer_frees_its_slot_and_keeps_the_connection() -> None:
    running, agent = Running(max_in_flight=1), Agent()
    agent.gate.clear()
    running.ask(agent.address, 0.1)
    assert running.wait(1) == ["deadline"]
    running.ask(agent.address, 30.0)
    agent.gate.set()
    assert running.wait(2) == ["deadline", 200]
    assert [path for method, path, _ in agent.requests].count("/v1/x/metrics") == 2
    running.close()
    agent.close()


def test_a_connection_to_a_hanging_agent_is_closed_after_the_maximum_timeout() -> None:
    running, agent = Running(max_in_flight=1, timeout=0.5), Agent()
    agent.modes["/v1/x/metrics"] = "hang"
    running.ask(agent.address, 0.1)
    running.ask(agent.address, 30.0, path="/v1/y/metrics")
    assert running.wait(2) == ["deadline", 200]
    running.close()
    agent.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Program, Agent]]:
    agent = Agent()
    folder = tmp_path_factory.mktemp("proxy")
    write_inventory(folder, inventory(agent.text))
    with proxy(folder) as program:
        yield program, agent
    agent.close()


@pytest.mark.parametrize("word, expected", [
    ("0.001", "0.1"), ("0.1", "0.1"), ("1e0", "0.9"), ("2.", "1.8"), ("1_0", ""), ("+1", ""),
    ("0x1", ""), ("1e1_0", ""), ("\u00b2", ""), ("infinity", ""), ("1" * 33, "")])
def test_timeouts_are_plain_numbers_with_a_floor(word: str, expected: str, shared: Any) -> None:
    program, agent = shared
    answer = get(program, page(WEB), headers={"X-Prometheus-Scrape-Timeout-Seconds": word})
    assert answer.status == (200 if expected else 400)
    if expected:
        assert agent.requests[-1][2]["x-prometheus-scrape-timeout-seconds"] == expected


# what was true when it was asked

def without_key(world: House) -> None:
    world.proxy.directory.replace({world.owner.login: world.owner._replace(keys={})})


def without_account(world: House) -> None:
    world.proxy.directory.replace({})


def limited_to_a_group(world: House) -> None:
    keys = {md5: AuthorizedKey(holder.key, "", frozenset(("db",)))
            for md5, holder in world.owner.keys.items()}
    world.proxy.directory.replace({world.owner.login: world.owner._replace(keys=keys)})


def another_owner(world: House) -> None:
    world.give(world.accounts[1][0].uuid, 100)


def destroyed(world: House) -> None:
    world.proxy.inventory.drop(WEB)


@pytest.mark.parametrize("change, status", [
    (without_key, 401), (without_account, 401), (limited_to_a_group, 503), (another_owner, 404),
    (destroyed, 404), (lambda world: None, 200)])
def test_a_page_in_flight_goes_only_to_clients_that_may_see_it_on_arrival(
        change: Callable[[House], None], status: int, house: Any) -> None:
    world = house(100)
    later = world.ask(page(WEB))
    assert isinstance(later, Deferred) and later.answer is None
    change(world)
    world.agents.jobs.pop().finish(Reply(200, b"secret 1\n"), None)
    assert later.answer is not None and later.answer.status == status
    assert (b"secret" in wire(later.answer)) == (status == 200)


@pytest.mark.parametrize("change, status", [
    (without_key, 401), (without_account, 401), (limited_to_a_group, 503)])
@pytest.mark.parametrize("path", LISTS)
def test_a_list_goes_only_to_clients_that_may_see_it_when_it_is_ready(
        path: str, change: Callable[[House], None], status: int, house: Any) -> None:
    world = house(100)
    later = world.ask(path)
    assert isinstance(later, Deferred)
    change(world)
    assert world.settled(later).status == status


def test_a_slow_list_is_refused_if_containers_have_changed_meanwhile(house: Any) -> None:
    world = house(100)
    later = world.ask("/v1/discover")
    world.clock[0] += 4.0
    another_owner(world)
    assert world.settled(later).status == 503


def test_a_connection_counts_for_the_account_last_authenticated_on_it(house: Any) -> None:
    world = house(1)
    peers = [world.request("/", which=which).peer for which in (0, 1)]
    for which in (0, 1):
        assert world.ask("/v1/discover", which=which).status == 200
    assert [peer.group for peer in peers] == [account.uuid for account, *_ in world.accounts[:2]]
    without_key(world)
    assert world.ask("/v1/discover").status == 401 and peers[0].group == ""


def test_a_former_operator_sees_no_compute_nodes(house: Any) -> None:
    world = house(10)
    operator = world.accounts[1][0]
    later = world.ask(page(NODE_1), which=1)
    world.proxy.directory.replace({operator.login: operator._replace(operator=False)})
    world.agents.jobs.pop().finish(Reply(200, b"secret 1\n"), None)
    assert later.answer.status in (404, 503)


def test_a_new_owner_sees_nothing_of_the_former_owners_scrapes(house: Any) -> None:
    world = house(3)
    later = world.ask(page(WEB))
    world.agents.jobs.pop().finish(Reply(200, b"x 1\n"), None)
    assert later.answer.status == 200
    assert "last_scrape_timestamp_seconds{" in world.text("/v1/fleet/metrics")
    world.give(world.accounts[1][0].uuid, 3)
    assert "last_scrape_timestamp_seconds{" not in world.text("/v1/fleet/metrics", 1)
    fresh = world.proxy.pages.scrapes
    fresh.learn([(world.owner.uuid, WEB, 5.0, "ok")])           # another worker tells it late
    assert "last_scrape_timestamp_seconds{" not in world.text("/v1/fleet/metrics", 1)
    fresh.learn([(uuid(7), uuid(n), 5.0, "ok") for n in range(2000)])
    fresh.retain(world.proxy.inventory.vms)
    assert not fresh.of(uuid(7)) and not fresh.of(world.owner.uuid)


@pytest.mark.parametrize("path", LISTS[:4])
def test_users_limited_to_groups_do_not_share_lists_with_others(path: str, house: Any) -> None:
    """Concurrent requests, with certificates that differ only in the key."""
    world = house(0)
    owner = world.owner
    keys, peers = [make_key(), make_key()], []
    publics = [cmon_proxy.private_key(one) for one in keys]
    world.proxy.directory.replace({owner.login: owner._replace(keys={
        publics[0].md5: AuthorizedKey(publics[0]),
        publics[1].md5: AuthorizedKey(publics[1], "user", frozenset(("db",)))})})
    for one in keys:
        pem = make_certificate(one, owner.login, not_before=0, not_after=2e9)
        peers.append(Peer("192.0.2.1", "main", first_certificate(pem.decode())))
    made = [vm_of(vm(uuid(n + 500), owner.uuid, tags={"triton.cmon.groups": "db" if n else "web"}),
                  "test", 0) for n in range(100)]
    world.proxy.inventory.replace(*by_owner([one for one in made if one is not None]))
    answers = [respond(world.proxy.routes(), world.request(path)._replace(peer=peer, gzip=False))
               for peer in peers]
    shown = [uuid(500).encode() in wire(world.settled(answer)) for answer in answers]
    assert shown == [True, False]


@pytest.mark.parametrize("which, core", [(0, b"eyJpc0NvcmVab25lIjogZmFsc2V9"),
                                         (1, b"eyJpc0NvcmVab25lIjogdHJ1ZX0=")])
def test_a_tag_does_not_make_a_tenants_container_a_core_zone(which: int, core: bytes, house: Any
                                                            ) -> None:
    world = house(0)
    made = vm_of(vm(WEB, world.accounts[which][0].uuid, tags={"smartdc_role": "vmapi"}), "test", 0)
    world.proxy.inventory.replace(*by_owner([made]))
    world.ask(page(WEB), which=which)
    assert b"x-joyent-cmon-opts: " + core + b"\r\n" in world.agents.jobs[-1].wire


def test_a_new_owner_over_the_quota_gets_no_copy_of_the_former_owners_page(house: Any) -> None:
    world = house(1)
    last = Copy(world.owner.uuid, Reply(200, b"secret 1\n"), 0.0)
    world.proxy.pages._copies.put((WEB, False), last)
    statuses = []
    for which in (0, 1, 0):
        account = world.accounts[which][0]
        world.give(account.uuid, 1)
        world.proxy.quotas.of(account).soft = 0.0
        answer = world.settled(world.ask(page(WEB), which=which))
        statuses.append(answer.status)
        assert (b"secret" in wire(answer)) == (answer.status == 200)
    assert statuses == [200, 429, 200]


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("alias", ["\ud800", "a\udfffb", "\0", "</script>\n\r"])
def test_no_alias_causes_a_500(path: str, alias: str, house: Any) -> None:
    world = house(1)
    known = world.proxy.inventory.vms[WEB]
    for fresh in (known._replace(alias=alias, groups=(alias,)), vm_of(
            vm(WEB, world.owner.uuid, alias=alias, tags={"triton.cmon.groups": alias}), "", "")):
        assert isinstance(fresh, Vm)
        world.proxy.inventory.replace(*by_owner([fresh]))
        answer = world.settled(world.ask(path if "/c/" not in path else f"/c/{WEB}"))
        assert answer.status == 200
    json.dumps(vm_of(vm(WEB, world.owner.uuid, alias=alias), "", 0), ensure_ascii=False).encode()


@pytest.mark.parametrize("body", [b"", b"garbage", gzip.compress(b"x 1\n")[:-4],
                                  gzip.compress(bytes(2 << 20))])
def test_a_copy_with_broken_gzip_is_not_used(body: bytes, house: Any) -> None:
    world = house(1, per_minute=1, burst=1, hard_per_minute=1000)
    world.bucket.soft = 0.0
    world.proxy.pages._copies.put((WEB, False), Copy(world.owner.uuid, Reply(200, body, True), 0.0))
    assert world.settled(world.ask(page(WEB))).status == 429


def test_new_settings_apply_to_repeated_requests(tmp_path: Path) -> None:
    agent = Agent()
    write_inventory(tmp_path, inventory(agent.text))
    with proxy(tmp_path) as program, connect(program) as connection:
        def ask() -> Any:
            return connection.request("/v1/discover", {"Host": "cmon.test"})
        assert [ask().status for _ in range(3)] == [200] * 3
        proxy_config(tmp_path, host_prefix="metrics")
        program.signal(signal.SIGHUP)
        program.wait_for_log("settings reloaded")
        assert code(ask()) == "unknown_host"
        assert connection.request("/v1/discover", {"Host": "metrics.test"}).status == 200
    agent.close()


def test_new_settings_apply_to_a_list_that_is_being_built(house: Any) -> None:
    """Its answer is of the old settings, and must not be kept for requests after the reload."""
    world = house(100)
    world.proxy.inventory.put(vm_of(vm(uuid(1), world.owner.uuid, state="stopped"), "test", 0))

    def length(answer: Any) -> int:
        return len(gzip.decompress(wire(world.settled(answer)).partition(b"\r\n\r\n")[2]))
    before = world.ask("/v1/discover")
    world.proxy.use(dataclasses.replace(world.proxy.settings, discover_include_stopped=True))
    assert length(before) < length(world.ask("/v1/discover"))


def test_settings_that_need_a_restart_are_those_that_differ_from_what_runs() -> None:
    running = Settings(TlsSettings(Path("x"), Path("y")), InventorySettings())
    asked = dataclasses.replace(running, listen="127.0.0.1:1", workers=2)
    kept, fixed = keep_fixed(running, asked)
    assert (kept, fixed) == (running, ["listen", "workers"])
    assert keep_fixed(kept, asked)[1] == ["listen", "workers"]      # told again
    assert keep_fixed(kept, running)[1] == []
    asked = dataclasses.replace(running, tls=TlsSettings(Path("x"), Path("z"), client_auth="ca"),
                                agent=AgentSettings(port=9164, timeout=5.0))
    kept, fixed = keep_fixed(running, asked)
    assert fixed == ["tls.client_auth", "agent.port"]
    assert kept == dataclasses.replace(running, tls=TlsSettings(Path("x"), Path("z")),
                                       agent=AgentSettings(timeout=5.0))


def test_a_self_signed_certificate_stays_rejected_after_a_change_to_ca(tmp_path: Path) -> None:
    """A connection made without a CA keeps an unverified certificate."""
    key = make_key()
    (tmp_path / "mallory.key").write_bytes(key)
    (tmp_path / "mallory.pem").write_bytes(make_certificate(key, "alice"))
    tls = client_tls()
    tls.load_cert_chain(tmp_path / "mallory.pem", tmp_path / "mallory.key")
    write_inventory(tmp_path, inventory("127.0.0.1:1"))
    path = proxy_config(tmp_path)
    with Program.proxy(path) as program, Connection(program.address, tls) as connection:
        def ask() -> Any:
            return connection.request("/v1/discover", {"Host": "cmon.test"})
        assert code(ask()) == "unknown_key"
        settings = json.loads(path.read_text())
        settings["tls"] |= {"client_auth": "ca", "client_ca": str(TLS / "ca.pem")}
        path.write_text(json.dumps(settings))
        program.signal(signal.SIGHUP)
        program.wait_for_log("tls.client_auth, tls.client_ca: changes take effect after a restart")
        program.wait_for_log("settings reloaded")
        assert code(ask()) == "unknown_key"


# a node that lies

OURS = {"date", "content-type", "x-content-type-options", "vary", "content-length",
        "x-cmon-certificate-expires", "ratelimit-limit", "ratelimit-remaining", "ratelimit-reset"}
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Liar:
    """Answers every request with these bytes."""

    def __init__(self) -> None:
        self.raw = b""
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.text = "%s:%d" % self.socket.getsockname()[:2]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, accepted: socket.socket) -> None:
        with accepted:
            while accepted.recv(65536):
                accepted.sendall(self.raw)


@pytest.fixture(scope="module")
def lied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Program, Liar]]:
    liar = Liar()
    folder = tmp_path_factory.mktemp("proxy")
    write_inventory(folder, inventory(liar.text))
    with proxy(folder) as program:
        yield program, liar
    liar.socket.close()


@pytest.mark.parametrize("lines", [
    "Content-Type: text/html", "Content-Type: text/html\r\nContent-Type: text/plain",
    "Set-Cookie: a=b\r\nLocation: https://evil.example\r\nRefresh: 0", "X-Cmon-Partial: <script>",
    "X-Cmon-Partial: a\tb", "RateLimit-Limit: 7\r\nAge: 5", "Date: <script>alert(1)</script>xxxxxx",
    "Date: Fri, 20 Nov 2026 14:00:00 GMT", "X-Content-Type-Options: none",
    "Vary: *\r\nCache-Control: public\r\nX-Cmon-Error: quota", "\x01: b", "X: a\nSet-Cookie: b=c",
    "X: a\rSet-Cookie: b=c", "X: a\0b", "Content-Type: text/plain\nX-Evil: 1", " X: folded"],
    ids=repr)
@pytest.mark.parametrize("chunked", [False, True])
def test_no_header_line_of_an_agent_reaches_a_tenant(lines: str, chunked: bool, lied: Any) -> None:
    program, liar = lied
    body = b"<html>x 1\n"
    form, sent = "Content-Length: 10", body
    if chunked:
        form, sent = "Transfer-Encoding: chunked", b"a\r\n" + body + b"\r\n0\r\n\r\n"
    for order in (f"{lines}\r\n{form}", f"{form}\r\n{lines}"):
        liar.raw = f"HTTP/1.1 200 OK\r\n{order}\r\n\r\n".encode("latin-1") + sent
        with connect(program) as connection:
            connection.send(f"GET {page(WEB)} HTTP/1.1\r\nHost: cmon.test\r\n\r\n".encode())
            answer = connection.answer()
        if answer.status == 200:
            assert set(answer.headers) == OURS and answer.body == body
            assert answer.headers["content-type"] == TYPE
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["vary"] == "Accept-Encoding"
            assert answer.headers["date"] not in lines
        else:
            assert code(answer) in ("node_error", "node_silent")
            assert "evil" not in str(answer.headers).lower()
        liar.raw = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"       # it is well again
        wait_until(lambda: get(program, page(WEB)).status == 200)


@pytest.mark.parametrize("lines", ["Content-Encoding: gzip", "Content-Encoding: br"])
def test_an_unrequested_content_coding_is_rejected(lines: str, lied: Any) -> None:
    program, liar = lied
    liar.raw = f"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n{lines}\r\n\r\nok".encode()
    answer = get(program, page(WEB))
    assert (answer.status, code(answer)) == (503, "node_error")
    liar.raw = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    wait_until(lambda: get(program, page(WEB)).status == 200)


# a disk that is full

def test_a_full_disk_leaves_the_old_snapshot(tmp_path: Path) -> None:
    shelf = Snapshot(tmp_path / "snapshot")
    made = vm_of(vm(WEB, uuid(7)), "test", "")
    assert made is not None
    good = Saved((made,), (), "", (), 5.0)
    shelf.write(good)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))      # no file may be larger
    try:
        with pytest.raises(OSError):
            shelf.write(good._replace(manta_owner="x" * 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert shelf.read() == good
    shelf.write(good._replace(confirmed_at=6.0))
    assert shelf.read().confirmed_at == 6.0


def test_every_test_named_in_the_security_document_exists() -> None:
    document = (ROOT / "docs" / "SECURITY.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", document))
    there = {name for path in (ROOT / "tests").rglob("test_*.py")
             for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    assert len(named) > 60 and named <= there, named - there
    for paragraph in document.partition("## What each")[2].partition("## Known")[0].split("\n\n"):
        assert not paragraph.startswith("**") or "test_" in paragraph or paragraph.endswith(":")
