# SPDX-License-Identifier: MPL-2.0
"""The forwarder's connections to the proxy, on a loop in this process."""
from __future__ import annotations

import gzip
import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any, Callable

import pytest
from agents import TLS
from forwarding import Listening, read_request

import cmon_forwarder as forwarder
from cmon_agent import Loop, Registry
from cmon_forwarder import (
    Fetcher, ProxySettings, Reply, Scrape, Scraper, Series, Settings, Target, TargetState,
    client_context)

BIG = b"x" * 300_000


def http(body: bytes, *lines: str, status: str = "200 OK") -> bytes:
    head = "".join(line + "\r\n" for line in (f"Content-Length: {len(body)}", *lines))
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


class Peer(Listening):
    """Answers each request with the bytes for its path, and closes after those in `ends`."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.bytes: dict[str, bytes] = {"/big": http(BIG), "/": http(b"ok"), "/hang": b""}
        self.ends: set[str] = set()
        self.paths: list[str] = []
        self.read = read_request
        super().__init__()

    def serve(self, accepted: socket.socket) -> None:
        if self.tls is not None:
            accepted = self.tls.wrap_socket(accepted, server_side=True)
        with accepted:
            reader = accepted.makefile("rb")
            for request in iter(lambda: self.read(reader), None):
                path = request[1]
                self.paths.append(path)
                if path == "/hang":
                    threading.Event().wait(30)
                accepted.sendall(self.bytes[path])
                if path in self.ends:
                    return


@pytest.fixture()
def peer() -> Iterator[Peer]:
    one = Peer()
    yield one
    one.close()


Run = Callable[..., list[Reply]]


@pytest.fixture()
def run() -> Run:
    def run(fetcher: Fetcher, *paths: str, timeout: float = 10.0) -> list[Reply]:
        """Replies to requests that are made at once, in the order of the requests."""
        replies: dict[int, Reply] = {}
        for place, path in enumerate(paths):
            fetcher.fetch(path, timeout, lambda reply, place=place: replies.setdefault(
                place, reply), 1 << 20)
        fetcher.loop.run(lambda: len(replies) == len(paths))
        return [replies[place] for place in range(len(paths))]
    return run


def fetcher_of(address: str, scheme: str = "http", most: int = 2,
               context: ssl.SSLContext | None = None) -> Fetcher:
    settings = Settings(proxy=ProxySettings(url=f"{scheme}://{address}"), sinks={},
                        max_in_flight=most)
    return Fetcher(Loop(), settings, context)


def test_connections_are_few_and_persistent(peer: Peer, run: Run) -> None:
    fetcher = fetcher_of(peer.text)
    for _ in range(3):
        assert run(fetcher, *["/"] * 20) == [Reply(200, b"ok")] * 20
    assert peer.connections == 2
    fetcher.close()


def test_after_an_unreachable_address_the_next_is_tried(peer: Peer, run: Run,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [
        (socket.AF_INET, socket.SOCK_STREAM, 0, "", address)
        for address in (("255.255.255.255", 9), peer.address)])
    fetcher = fetcher_of("cmon.example:9163")
    assert run(fetcher, "/") == [Reply(200, b"ok")]
    fetcher.close()


@pytest.mark.parametrize("answer, ends, expected", [
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", False, b"ok"),
    (b"HTTP/1.0 200 OK\r\n\r\nok", True, b"ok"),
    (http(b"ok", "Connection: close"), True, b"ok"),
    (http(gzip.compress(b"ok"), "Content-Encoding: gzip"), False, b"ok"),
    (http(b"no", "Content-Encoding: gzip"), False, "gzip is broken"),
    (http(gzip.compress(b"0" * (2 << 20)), "Content-Encoding: gzip"), False, "is larger than"),
    (http(b"half")[:-2], True, "middle of the answer"),
    (b"", True, "without an answer"),
    (b"SSH-2.0-OpenSSH\r\n\r\n", False, "not HTTP"),
    (http(b"ok") + b"more", False, "longer than its"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n", False, "is larger than"),
])
def test_answers(peer: Peer, run: Run, answer: bytes, ends: bool, expected: Any) -> None:
    peer.bytes["/it"] = answer
    peer.ends = {"/it"} if ends else set()
    fetcher = fetcher_of(peer.text)
    for _ in range(2):
        reply, = run(fetcher, "/it")
        if isinstance(expected, bytes):
            assert reply == Reply(200, expected)
        else:
            assert reply.status == 0 and expected in reply.problem
    assert run(fetcher, "/") == [Reply(200, b"ok")]
    fetcher.close()


def test_a_request_on_a_closing_connection_is_retried(peer: Peer, run: Run) -> None:
    fetcher = fetcher_of(peer.text, most=1)
    run(fetcher, "/")
    for _ in range(3):
        peer.close()                            # as a proxy that restarts
        peer.open()
        assert run(fetcher, "/") == [Reply(200, b"ok")]
    peer.bytes["/gone"], peer.ends = b"", {"/gone"}
    assert run(fetcher, "/gone")[0].problem     # once more, and no more
    assert peer.paths.count("/gone") == 2
    fetcher.close()


def test_a_dead_address_costs_no_request(peer: Peer, run: Run, monkeypatch: pytest.MonkeyPatch
                                        ) -> None:
    """As with localhost, which is also ::1, or a name with a dead address."""
    dead = socket.socket()
    dead.bind(("127.0.0.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [
        (socket.AF_INET, 0, 0, "", address) for address in (dead.getsockname(), peer.address)])
    fetcher = fetcher_of(peer.text, most=4)
    peer.ends = {"/"}
    for _ in range(3):
        assert run(fetcher, *["/"] * 4) == [Reply(200, b"ok")] * 4
    peer.close()
    assert [reply.problem for reply in run(fetcher, "/", "/")] == ["connection refused"] * 2
    peer.open()
    assert run(fetcher, "/") == [Reply(200, b"ok")]
    fetcher.close()
    dead.close()


def test_requests_do_not_queue_for_longer_than_the_interval(peer: Peer, run: Run) -> None:
    fetcher = fetcher_of(peer.text, most=1)
    run(fetcher, "/")                       # the name is resolved now
    fetcher._queue_timeout = 0.2
    replies = run(fetcher, "/hang", "/", "/", timeout=0.5)
    assert [reply.problem for reply in replies] == [
        "timed out", *2 * ("no connection was free in time: raise max_in_flight",)]
    assert run(fetcher, "/") == [Reply(200, b"ok")]
    fetcher.close()


def test_a_request_lost_while_settings_change_is_retried(peer: Peer, run: Run) -> None:
    fetcher = fetcher_of(peer.text, most=1)
    asked, changed = threading.Event(), threading.Event()

    def read(reader: Any) -> Any:
        request = read_request(reader)
        if request is None or len(peer.paths) != 1 or changed.is_set():
            return request
        asked.set()                         # the second one, on a kept connection
        fetcher.loop.call_soon(lambda: None)
        changed.wait(10)
        return None
    peer.read = read
    run(fetcher, "/")
    replies: list[Reply] = []
    fetcher.fetch("/", 10.0, replies.append, 1 << 20)
    fetcher.loop.run(asked.is_set)
    fetcher.use(Settings(proxy=ProxySettings(url=f"http://{peer.text}"), sinks={}), None)
    changed.set()
    fetcher.loop.run(lambda: bool(replies))
    assert replies == [Reply(200, b"ok")]
    fetcher.close()


def test_deadlines_are_kept_and_free_the_connection(peer: Peer, run: Run) -> None:
    fetcher = fetcher_of(peer.text, most=1)
    replies = run(fetcher, "/hang", "/", "/", timeout=1.0)
    assert replies == [Reply(0, b"", "timed out"), Reply(200, b"ok"), Reply(200, b"ok")]
    assert fetcher.in_flight == 0
    fetcher.close()


def test_an_absent_proxy_is_reported_and_recovers(peer: Peer, run: Run) -> None:
    peer.close()
    fetcher = fetcher_of(peer.text)
    assert [reply.problem for reply in run(fetcher, "/", "/", "/")] == ["connection refused"] * 3
    peer.open()
    assert run(fetcher, "/") == [Reply(200, b"ok")]
    unknown = fetcher_of("no.such.host.invalid:1")
    assert "does not resolve" in run(unknown, "/", "/")[1].problem
    for one in (fetcher, unknown):
        one.close()


def test_new_settings_apply_and_old_connections_are_closed(peer: Peer, run: Run) -> None:
    other = Peer()
    other.bytes["/"] = http(b"other")
    try:
        fetcher = fetcher_of(peer.text)
        run(fetcher, "/", "/")
        fetcher.use(Settings(proxy=ProxySettings(url=f"http://{other.text}"), sinks={}), None)
        assert run(fetcher, "/", "/") == [Reply(200, b"other")] * 2
        assert {link.generation for link in fetcher.links} == {fetcher.generation}
        fetcher.close()
    finally:
        other.close()


def test_idle_connections_are_closed(peer: Peer, run: Run, monkeypatch: pytest.MonkeyPatch
                                     ) -> None:
    monkeypatch.setattr(forwarder, "IDLE_SECONDS", 0.2)
    fetcher = fetcher_of(peer.text)
    run(fetcher, "/")
    fetcher.loop.run(lambda: not fetcher.links)
    fetcher.close()


def test_pages_of_many_records_come_over_tls(run: Run) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.pem", TLS / "server.key")
    peer = Peer(context)
    try:
        fetcher = fetcher_of(f"localhost:{peer.address[1]}", "https",
                             context=client_context(None, None, TLS / "ca.pem"))
        for _ in range(2):
            assert [reply.body for reply in run(fetcher, "/big", "/", "/big", "/big")] == [
                BIG, b"ok", BIG, BIG]
        assert peer.connections == 2
        fetcher.close()
        for name, trusted, message in (("127.0.0.1", None, "not trusted"),
                                       ("127.0.0.2", TLS / "ca.pem", "")):
            strict = fetcher_of(f"{name}:{peer.address[1]}", "https",
                                context=client_context(None, None, trusted))
            reply, = run(strict, "/")
            assert reply.status == 0 and reply.problem and message in reply.problem
            strict.close()
    finally:
        peer.close()


def test_a_server_without_tls(peer: Peer, run: Run) -> None:
    fetcher = fetcher_of(peer.text, "https", context=client_context(None, None, TLS / "ca.pem"))
    peer.bytes = {}
    reply, = run(fetcher, "/", timeout=2.0)
    assert reply.status == 0 and reply.problem
    fetcher.close()




# --- one scrape beside the one before -------------------------------------------------------------

def test_series_end_and_counters_grow(peer: Peer) -> None:
    delivered: list[Scrape] = []
    settings = Settings(proxy=ProxySettings(url=f"http://{peer.text}"), sinks={})
    scraper = Scraper(Loop(), settings, None, delivered.append, Registry())
    state = TargetState(Target("i", "a", "/x", (("alias", "a"), ("instance", "i"))))
    head = "# TYPE c counter\n"
    a, b = Series("c", (("k", "a"),), True), Series("c", (("k", "b"),), True)
    for page, increases, gone in (
            ('c{k="a"} 5\nc{k="b"} 1\n', {}, []),
            ('c{k="a"} 7\n', {a: 2}, [b]),
            (None, {}, [a]),                            # a scrape that failed
            ('c{k="a"} 9\nc{k="b"} 4\n', {a: 2, b: 3}, []),
            ('c{k="a"} 1\nc{k="b"} 4\n', {a: 1, b: 0}, [])):
        scraper._scraped(state, Reply(503, b"") if page is None else Reply(
            200, (head + page).encode()))
        assert (delivered[-1].increases, list(delivered[-1].gone)) == (increases, gone)
        up = {series.name: value for series, value in delivered[-1].points}["up"]
        assert up == int(page is not None)
    scraper.fetcher.close()


def test_counters_of_removed_containers_are_forgotten(peer: Peer) -> None:
    settings = Settings(proxy=ProxySettings(url=f"http://{peer.text}"), sinks={})
    scraper = Scraper(Loop(), settings, None, lambda _: None, Registry())
    scraper.baseline = {"gone": {"c": 1}, "here": {"c": 2}}
    scraper.targets["here"] = TargetState(Target("here", "a", "/x", ()))
    assert scraper.counters() == scraper.baseline       # who is there is not known yet
    scraper.ready = True
    assert scraper.counters() == {"here": {"c": 2}}
    scraper.fetcher.close()


@pytest.mark.parametrize("page", [b"c{ 5\n", b"c 5", b"\xff 1\n", b"c 1\nc 1\n"])
def test_an_invalid_page_is_a_failed_scrape(peer: Peer, page: bytes) -> None:
    delivered: list[Scrape] = []
    settings = Settings(proxy=ProxySettings(url=f"http://{peer.text}"), sinks={})
    scraper = Scraper(Loop(), settings, None, delivered.append, Registry())
    scraper._scraped(TargetState(Target("i", "a", "/x", ())), Reply(200, page))
    assert [(series.name, value) for series, value in delivered[0].points][0] == ("up", 0)
    scraper.fetcher.close()
