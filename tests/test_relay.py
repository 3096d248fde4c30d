# SPDX-License-Identifier: MPL-2.0
"""The parts of the relay: pages, copies, a node's queue and breaker."""
from __future__ import annotations

import gzip
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import cmon_proxy
from agents import NODE_1, Agent
from cmon_agent import Refused, Registry, Server, parse
from cmon_proxy import (
    MAX_PAGE, AgentHead, AgentSettings, Copy, Job, Node, Reply, Upstreams)
from support import wait_until


HEAD = "HTTP/1.1 200 OK\r\nDate: Fri, 20 Nov 2026 14:00:00 GMT\r\n"


@pytest.mark.parametrize("lines, expected", [
    ("Content-Type: text/plain\r\nContent-Length: 12", AgentHead(12)),
    ("content-length:12\r\nVary: Cookie\r\nContent-Encoding: gzip", AgentHead(12, True)),
    ("Content-Length: 12\r\nX-Cmon-Partial: zfs, ntp", AgentHead(12, False, "zfs, ntp")),
    ("Content-Length: 12\r\nX-Cmon-Partial: <b>", AgentHead(12)),
    ("Content-Length: 12\r\nSet-Cookie: a\r\nLocation: /", AgentHead(12)),
    # these are read the long way, where they are an answer or an error
    ("Content-Type: text/plain", AgentHead(-1)), ("Content-Length: -1", AgentHead(-1)),
    ("Content-Length: 12\r\nContent-Length: 12", AgentHead(-1)),
    ("Content-Length: 1e3", AgentHead(-1)), ("Content-Length: 9999999999", AgentHead(-1)),
    ("Content-Length: 1_0", AgentHead(-1)), ("Content-Length: \xb2", AgentHead(-1)),
    (f"Content-Length: {MAX_PAGE + 1}", AgentHead(-1)),
    ("Content-Length: 12\r\nConnection: close", AgentHead(-1)),
    ("Transfer-Encoding: chunked", AgentHead(-1)),
    ("Content-Length: 12\r\nTransfer-Encoding: chunked", AgentHead(-1)),
    ("Content-Length: 12\r\nContent-Encoding: br", AgentHead(-1)),
    ("Content-Length: 12\r\n folded", AgentHead(-1)), ("garbage", AgentHead(-1)),
])
def test_accepted_parts_of_an_agents_head(lines: str, expected: AgentHead) -> None:
    running = Running()
    head = f"{HEAD}{lines}\r\n\r\n".encode("latin-1")
    assert running.upstreams.known_head(head)[:3] == expected[:3]
    later = head.replace(b"14:00:00", b"15:01:02")
    assert running.upstreams.known_head(later) is running.upstreams.known_head(head)
    running.close()


@pytest.mark.parametrize("packed", [False, True])
def test_a_copy_contains_its_age(packed: bool) -> None:
    body = b"x 1"
    page = Copy("owner", Reply(200, gzip.compress(body) if packed else body, packed), 0).page(7)
    assert page is not None and ("Age", "7") in page.headers
    families = {family.name: family.samples[0].value for family in parse(page.body.decode())}
    assert families == {"x": 1, "cmon_quota_limited": 1, "cmon_page_age_seconds": 7}


class Running:
    """Upstreams in a loop of its own; calls into it are made there."""

    def __init__(self, **settings: Any) -> None:
        self.server = Server("proxy", Registry())
        self.upstreams = Upstreams(
            self.server, Registry(), AgentSettings(**settings), random.random)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.results: list[Any] = []

    def ask(self, address: Any, seconds: float = 5.0, path: str = "/v1/x/metrics",
            given_up: bool = False, owner: str = "a") -> Job:
        """Send a request; its result goes to `results`: a status, or a refusal's code."""
        def done(found: Any, refusal: Any) -> None:
            self.results.append(found.status if found else dict(refusal.headers)["X-Cmon-Error"])
        job = Job(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
                  self.server.now() + seconds, done, owner)
        job.given_up = given_up

        def go() -> None:
            try:
                self.port(address).ask(job)
            except Refused as refusal:
                self.results.append("at once: " + dict(refusal.headers)["X-Cmon-Error"])
        self.server.loop.call_soon(go)
        return job

    def port(self, address: Any) -> Any:
        return self.upstreams.to(Node(NODE_1, "", address))

    def wait(self, count: int) -> list[Any]:
        wait_until(lambda: len(self.results) >= count)
        return self.results

    def close(self) -> None:
        self.server.stop()
        self.thread.join()


@pytest.fixture()
def agent() -> Iterator[Agent]:
    made = Agent()
    yield made
    made.close()


@pytest.fixture()
def running() -> Iterator[Running]:
    made = Running(max_in_flight=2)
    yield made
    made.close()


def test_the_queue_of_a_node_is_bounded(running: Running, agent: Agent, monkeypatch: Any) -> None:
    monkeypatch.setattr(cmon_proxy, "WAITING_PER_NODE", 4)
    agent.gate.clear()
    for owner in "aaaaaabbbb":              # two under way, two of a's and two of b's wait
        running.ask(agent.address, owner=owner)
    assert running.wait(4) == ["at once: node_busy"] * 4
    agent.gate.set()
    assert running.wait(10)[4:] == [200] * 6


def test_one_account_cannot_use_all_slots_of_a_node(agent: Agent) -> None:
    running = Running(max_in_flight=4)
    agent.modes["/slow"] = "hang"
    for _ in range(10):
        running.ask(agent.address, 30.0, "/slow", owner="a")
    wait_until(lambda: len(agent.paths()) == 3)             # the last quarter is for others
    for _ in range(20):
        running.ask(agent.address, owner="b")
    assert running.wait(20) == [200] * 20
    port = running.upstreams.by_node[NODE_1]
    assert port.load == {"a": 3} and port.busy == 3 and len(port.waiting) == 7
    running.close()


def test_waiting_requests_are_served_fairly(running: Running, agent: Agent,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []              # they may arrive in another order: by two connections
    start = cmon_proxy.Upstream._start

    def noted(upstream: Any, job: Any) -> None:
        sent.append(job.wire.split()[1])
        start(upstream, job)
    monkeypatch.setattr(cmon_proxy.Upstream, "_start", noted)
    agent.gate.clear()
    for path, owner in [("/a1", "a"), ("/a2", "a"), ("/a3", "a"), ("/a4", "a"), ("/b1", "b")]:
        running.ask(agent.address, path=path, owner=owner)
    wait_until(lambda: len(agent.paths()) == 2
               and len(running.upstreams.by_node[NODE_1].waiting) == 3)
    agent.gate.set()
    assert running.wait(5) == [200] * 5
    assert sent[:3] == [b"/a1", b"/a2", b"/b1"]
    wait_until(lambda: not running.upstreams.by_node[NODE_1].load)


def test_waiting_requests_expire_and_abandoned_ones_are_dropped(running: Running, agent: Agent
                                                               ) -> None:
    agent.modes["/v1/x/metrics"] = "hang"
    running.ask(agent.address, 30.0)
    running.ask(agent.address, 30.0)
    running.ask(agent.address, 0.2)
    running.ask(agent.address, 30.0, given_up=True)
    assert running.wait(2) == ["deadline", "deadline"]
    assert agent.paths() == ["/v1/x/metrics"] * 2


def test_a_node_with_a_new_address_gets_new_connections(running: Running, agent: Agent) -> None:
    running.ask(agent.address)
    assert running.wait(1) == [200]
    other = Agent()
    running.ask(other.address)
    assert running.wait(2) == [200, 200] and other.connections == 1
    other.close()


def test_ipv6(running: Running) -> None:
    try:
        listening = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    address = listening.getsockname()[:2]
    running.ask(address)
    accepted, _ = listening.accept()
    assert accepted.recv(4096)
    accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert running.wait(1) == [200]
    accepted.close()
    listening.close()


def test_a_connection_with_unrequested_data_is_closed(running: Running) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    running.ask(listening.getsockname())
    accepted, _ = listening.accept()
    accepted.recv(4096)
    accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert running.wait(1) == [200]
    accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")
    wait_until(lambda: accepted.recv(10) == b"")            # ours has been closed
    running.ask(listening.getsockname())
    fresh, _ = listening.accept()
    assert fresh.recv(4096)
    fresh.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert running.wait(2) == [200, 200]
    for one in (accepted, fresh, listening):
        one.close()


def test_a_request_lost_on_a_closing_connection_is_retried_once(running: Running) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    running.ask(listening.getsockname())
    first, _ = listening.accept()
    assert first.recv(4096)
    first.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    running.wait(1)
    running.ask(listening.getsockname())
    assert first.recv(4096)                 # it has the request, and closes without an answer
    first.close()
    second, _ = listening.accept()
    assert second.recv(4096)
    second.close()                          # a fresh one that does the same is an error
    assert running.wait(2) == [200, "node_error"]
    listening.close()


@pytest.mark.parametrize("raw", [
    b"HTTP/1.1 200 OK\r\nDate: Fri, 20 Nov 2026 14:00:00 GMT\r\nContent-Length: 2\r\n\r\nlong",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc", b"HTTP/9.9 200 OK\r\n\r\n",
    b"\0" * 100 + b"\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"],
    ids=lambda raw: str(raw[-20:]))
def test_an_answer_that_is_not_http_is_a_node_error(running: Running, raw: bytes) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    running.ask(listening.getsockname())
    accepted, _ = listening.accept()
    accepted.recv(4096)
    accepted.sendall(raw)
    assert running.wait(1) == ["node_error"]
    accepted.close()
    listening.close()


def test_a_refusing_node_opens_its_breaker(running: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
    wait_until(lambda: (running.ask(address), "at once: node_silent" in running.results)[1])
    assert set(running.results) == {"node_silent", "at once: node_silent"}
    families = {family.name: family for family in running.upstreams.families()}
    assert families["cmon_proxy_node_up"].samples[0].value == 0


def test_a_node_without_a_route_is_silent(running: Running) -> None:
    running.ask(("255.255.255.255", 9))     # connect() fails at once, and SO_ERROR has nothing
    assert running.wait(1) == ["node_silent"]


def test_upstreams_of_removed_nodes_are_forgotten(running: Running, agent: Agent) -> None:
    running.ask(agent.address)
    running.wait(1)
    running.server.loop.call_soon(running.upstreams.retain, {})
    wait_until(lambda: not running.upstreams.by_node)


@pytest.mark.parametrize("address", [None, ("127.0.0.1", 1)], ids=["removed", "moved"])
def test_a_silent_node_that_is_removed_or_moved_is_no_longer_probed(running: Running, address: Any
                                                                    ) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        silent = listening.getsockname()
    running.ask(silent)
    assert running.wait(1) == ["node_silent"]
    assert running.upstreams.suspects() == {NODE_1}
    running.server.loop.call_soon(running.upstreams.retain, {
        NODE_1: Node(NODE_1, "cn1", address)} if address else {})
    wait_until(lambda: not running.upstreams.by_node and not running.upstreams.troubled)
    assert running.upstreams.suspects() == set()


def test_idle_connections_are_closed_in_time(running: Running, agent: Agent, monkeypatch: Any
                                            ) -> None:
    running.ask(agent.address)
    running.wait(1)
    port = running.upstreams.by_node[NODE_1]
    wait_until(lambda: port.idle)
    monkeypatch.setattr(cmon_proxy, "IDLE_CONNECTION_SECONDS", 0.0)
    running.server.loop.call_soon(running.upstreams._sweep_idle)
    wait_until(lambda: not port.idle)


def test_without_descriptors_the_node_is_not_blamed(running: Running, agent: Agent,
                                                    monkeypatch: Any) -> None:
    def no_more(*_: Any) -> Any:
        raise OSError(24, "Too many open files")
    monkeypatch.setattr(cmon_proxy, "UpstreamConnection", no_more)
    running.ask(agent.address)
    assert running.wait(1) == ["too_busy"]
    port = running.upstreams.by_node[NODE_1]
    running.server.loop.call_soon(port.probe)
    monkeypatch.undo()
    running.ask(agent.address)
    assert running.wait(2)[1] == 200 and not port.suspect
