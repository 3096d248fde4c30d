# SPDX-License-Identifier: MPL-2.0
"""No byte of a foreign zone's page is ever sent: random inventories, requests and changes."""
from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from agents import NODE_1, NODE_2, uuid, vm
from cmon_agent import Answer, Deferred, Peer, Refused, Registry, Request, Server, wire
from cmon_proxy import (
    COSTS, Account, AgentSettings, AuthorizedKey, Grant, Identity, InventorySettings, Job, Node,
    Proxy, QuotaSettings, Reply, Settings, TlsSettings, Vm, by_owner, first_certificate,
    make_certificate, make_key, may_see, private_key, refused, vm_of)

GROUPS = ("web", "db", "front")


def accounts_with_keys(count: int) -> list[tuple[Account, bytes]]:
    """Accounts, the last one limited to a group, each with a certificate."""
    made = []
    for number in range(count):
        private = make_key()
        login = f"login{number}"
        key = private_key(private)
        limited = frozenset(("web",)) if number == count - 1 else None
        owner = uuid(0xA00 + (number if limited is None else 0))
        pem = make_certificate(private, login if limited is None else "limited")
        made.append((Account(owner, login if limited is None else "limited",
                             {key.md5: AuthorizedKey(key, "", limited)}, number == 1),
                     first_certificate(pem.decode())))
    return made


class Agents:
    """Accept requests in place of an upstream."""
    host = "127.0.0.1:1"

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.silent = False

    def ask(self, job: Job) -> None:
        if self.silent:
            raise refused("node_silent", node=NODE_1, since="", why="test")
        self.jobs.append(job)


class World:
    """A proxy without sockets, and the expected ownership."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        settings = Settings(
            TlsSettings(Path("x"), Path("y")), InventorySettings(), agent=AgentSettings(),
            quota=QuotaSettings(per_minute=1e6, burst=1e6, hard_per_minute=1e9))
        self.clock = [0.0]
        self.server = Server("proxy", Registry(), now=lambda: self.clock[0])
        self.registry = Registry()
        self.proxy = Proxy(settings, self.server, self.registry, self.random.random)
        self.accounts = accounts_with_keys(4)
        self.proxy.directory.replace({account.login: account for account, _ in self.accounts})
        self.agents = Agents()
        setattr(self.proxy.upstreams, "to", lambda node: self.agents)
        self.peers = [[self.peer(der) for _ in range(2)] for _, der in self.accounts]
        self.uuids = [uuid(number) for number in range(1, 9)]
        self.proxy.inventory.replace_nodes({
            number: Node(number, number, ("127.0.0.1", 1)) for number in (NODE_1, NODE_2)})
        self.proxy.inventory.ready = True
        self.reload()
        self.sent: dict[int, tuple[str, str]] = {}      # job -> page's uuid and its owner then
        self.served = self.hidden = 0
        self.pending: list[Any] = []

    def page(self, request: Request, number: str) -> Any:
        """As the route of a page does."""
        return self.proxy.enter(self.proxy.pages.page, COSTS["page"], request, number)

    def list(self, request: Request) -> Any:
        """As the route of discovery does."""
        return self.proxy.enter(self.proxy.discovery.containers, COSTS["list"], request)

    @staticmethod
    def peer(der: bytes) -> Peer:
        return Peer("127.0.0.1", "main", der)

    def any_vm(self, number: str) -> Vm:
        pick = self.random.choice
        found = vm_of(vm(number, pick(self.accounts[:3])[0].uuid, pick((NODE_1, NODE_2)),
                         pick(("running", "running", "running", "stopped", "unknown")),
                         tags={"triton.cmon.groups": ",".join(self.random.sample(GROUPS, 2)),
                               **({"smartdc_role": pick(("nat", "vmapi"))}
                                  if self.random.random() < 0.15 else {})}), "test", "")
        assert found is not None
        return found

    def reload(self) -> None:
        self.proxy.inventory.replace(*by_owner(
            self.any_vm(number) for number in self.uuids if self.random.random() < 0.9))

    def ask(self) -> None:
        which = self.random.randrange(len(self.accounts))
        account = self.accounts[which][0]
        peer = self.random.choice(self.peers[which])
        number = self.random.choice([*self.uuids, NODE_1, uuid(999)])
        by_host = self.random.random() < 0.5
        path = "/metrics" if by_host else f"/v1/{number}/metrics"
        request = Request(
            "GET", path, path, {}, {"x-prometheus-scrape-timeout-seconds": "10"}, b"",
            f"{number}.cmon.test" if by_host else "cmon.test", self.random.random() < 0.5, True,
            peer)
        if self.random.random() < 0.3:
            self.proxy.quotas.of(account).soft = 0.0            # over its quota: a copy, or 429
        before = len(self.agents.jobs)
        try:
            found = self.proxy.by_host(request)
            if found is not None:
                answer = found[0].handler(request, *found[1])
            else:
                answer = self.page(request, number)
        except Refused:
            self.hidden += 1
            return
        finally:
            self.proxy.quotas.of(account).soft = 1e6
        for job in self.agents.jobs[before:]:
            known = self.proxy.inventory.vms.get(number)
            self.sent[id(job)] = (number, known.owner if known else "")
        if isinstance(answer, Deferred):
            answer.attach(lambda done: self.check(account, number, done))
            self.pending.append(answer)
        else:
            self.check(account, number, answer)

    def check(self, account: Account, number: str, answer: Answer) -> None:
        """Check an answer when it is sent: may the account see it, and is it the right page?"""
        whole = wire(answer)
        if answer.status != 200:
            assert b"page of" not in whole
            return
        self.served += 1
        text = whole.decode()
        assert f"page of {number} " in text and text.count("page of") == 1
        inventory = self.proxy.inventory
        target = inventory.vms.get(number) or inventory.nodes.get(number)
        holder, = account.keys.values()
        identity = Identity(None)
        assert may_see(Grant(account, holder.groups, identity), target)
        if isinstance(target, Vm):
            assert f"owned by {account.uuid}" in text, "a page of the former owner's time"

    def finish(self) -> None:
        if not self.agents.jobs:
            return
        job = self.agents.jobs.pop(self.random.randrange(len(self.agents.jobs)))
        number, owner = self.sent.pop(id(job))
        if self.random.random() < 0.1:
            job.finish(None, refused("node_silent", node=NODE_1, since="", why="test"))
            return
        body = f"page of {number} owned by {owner}\n".encode()
        job.finish(Reply(200, body), None)

    def change(self) -> None:
        inventory = self.proxy.inventory
        roll = self.random.random()
        number = self.random.choice(self.uuids)
        if roll < 0.6:
            inventory.put(self.any_vm(number))
        elif roll < 0.75:
            inventory.drop(number)
        elif roll < 0.85:
            self.reload()
        elif roll < 0.95:                               # the key is taken away and comes back
            account, _ = self.random.choice(self.accounts)
            self.proxy.directory.replace({
                one.login: one if one is not account else one._replace(keys={})
                for one, _ in self.accounts})
            self.ask()
            self.proxy.directory.replace({one.login: one for one, _ in self.accounts})
        else:
            self.agents.silent = not self.agents.silent
        self.clock[0] += self.random.random()

    def close(self) -> None:
        self.server.server_close()


@pytest.mark.parametrize("seed", range(12))
def test_random_histories(seed: int) -> None:
    world = World(seed)
    for _ in range(8000):
        world.random.choice((world.ask, world.ask, world.finish, world.change))()
    while world.agents.jobs:
        world.finish()
    world.close()
    assert all(later.answer is not None for later in world.pending), "one was never answered"
    assert world.served > 50 and world.hidden > 50      # both kinds happen


def test_discovery_lists_exactly_what_may_be_seen() -> None:
    for seed in range(20):
        world = World(seed)
        for which, (account, _) in enumerate(world.accounts):
            request = Request("GET", "/v1/discover", "/v1/discover", {}, {}, b"", "cmon.test",
                              False, True, world.peers[which][0])
            answer = world.list(request)
            assert not isinstance(answer, Deferred)
            rows = json.loads(wire(answer).partition(b"\r\n\r\n")[2])["containers"]
            holder, = account.keys.values()
            expected = {
                one.uuid for one in world.proxy.inventory.vms.values()
                if one.owner == account.uuid and not one.hidden and one.state != "stopped"
                and (holder.groups is None or not holder.groups.isdisjoint(one.groups))}
            assert {row["vm_uuid"] for row in rows} == expected
        world.close()


def test_an_abandoned_relay_is_not_joined() -> None:
    world = World(2)
    number = next(one.uuid for one in world.proxy.inventory.vms.values()
                  if one.owner == world.accounts[0][0].uuid and one.state == "running"
                  and not one.hidden)

    def ask() -> Deferred:
        request = Request("GET", "", "", {}, {}, b"", "cmon.test", False, True, world.peers[0][0])
        later = world.page(request, number)
        assert isinstance(later, Deferred) and later.on_cancel is not None
        return later
    left, joined = ask(), ask()
    assert len(world.agents.jobs) == 1
    for later in (left, joined):
        assert later.on_cancel is not None and not world.agents.jobs[0].given_up
        later.on_cancel(later)
    assert world.agents.jobs[0].given_up      # the port may drop it without a word
    fresh = ask()
    assert len(world.agents.jobs) == 2
    body = b"page"
    world.agents.jobs[1].finish(Reply(200, body), None)
    assert fresh.answer is not None and fresh.answer.status == 200
    world.agents.jobs[0].finish(Reply(200, body), None)
    assert left.answer is None and not world.proxy.pages.relays
    world.close()


def test_one_expired_waiter_leaves_the_others_waiting() -> None:
    world = World(2)
    number = next(one.uuid for one in world.proxy.inventory.vms.values()
                  if one.owner == world.accounts[0][0].uuid and one.state == "running"
                  and not one.hidden)
    request = Request("GET", "", "", {}, {}, b"", "cmon.test", False, True, world.peers[0][0])
    first, second = (world.page(request, number) for _ in range(2))
    assert isinstance(first, Deferred) and isinstance(second, Deferred)
    assert first.expired(first).status == 504 and not world.agents.jobs[0].given_up
    world.agents.jobs[0].finish(Reply(200, b"page"), None)
    assert first.answer is None and second.answer is not None
    world.close()
