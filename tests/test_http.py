# SPDX-License-Identifier: MPL-2.0
"""The server: routing without sockets, then raw connections, honest, slow and hostile."""
from __future__ import annotations

import _ssl
import ctypes
import dataclasses
import gzip
import http.server
import os
import resource
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest
from support import Connection, http_get, respond, samples, wait_until

import cmon_agent
from cmon_agent import (
    PAGE, Answer, Deferred, Limits, Peer, Refused, Registry, Request, Response, Route, Router,
    Server, _header_fields, parse_head, prepare, render, scrape_seconds, text, wire)
from cmon_proxy import (
    TlsLimits, TlsServer, _library, after_handshake, ask_for_any_certificate,
    check_any_certificate, make_certificate, make_key, network_of, server_context)

BIG = b"# a comment that repeats itself\n" * 400


def request(method: str = "GET", path: str = "/", **headers: str) -> Request:
    return Request(method, path, path, {}, {name.replace("_", "-"): value
                                            for name, value in headers.items()},
                   b"", "", False, True, Peer("192.0.2.1", "main"))


# --- without sockets ---

def refuse(_request: Request) -> Answer:
    raise Refused(429, "too often; try again in 3 s", ("Retry-After", "3"), code="quota")


def fail(_request: Request) -> Answer:
    raise ValueError("not for the client")


PLAIN = (
    Route("GET", "/", lambda request: text(200, "root")),
    Route("GET", "/v1/{zone}/metrics", lambda request, zone: text(200, zone)),
    Route("POST", "/v1/refresh", lambda request: Response(200, b"")),
    Route("GET", "/refused", refuse),
    Route("GET", "/fault", fail),
)
ROUTED = [
    ("the root", "GET", "/", 200, b"root\n"),
    ("HEAD is GET to a handler", "HEAD", "/", 200, b"root\n"),
    ("a segment is captured", "GET", "/v1/a.b/metrics", 200, b"a.b\n"),
    ("a segment is never two", "GET", "/v1/a/b/metrics", 404, b"no such path"),
    ("a segment is never empty", "GET", "/v1//metrics", 404, b"no such path"),
    ("a pattern is the whole path", "GET", "/v1/a/metrics/", 404, b"no such path"),
    ("a pattern's other letters are letters", "GET", "/v1x", 404, b"no such path"),
    ("another method", "PUT", "/v1/refresh", 405,
     b"PUT is not allowed for this path; allowed: POST\n"),
    ("OPTIONS", "OPTIONS", "/", 405, b"OPTIONS is not allowed for this path; allowed: GET, HEAD\n"),
    ("a refusal says what the handler says", "GET", "/refused", 429, b"too often; try again"),
    ("a fault tells the client nothing", "GET", "/fault", 500, b"internal error; see the log\n"),
]


@pytest.mark.parametrize("method, path, status, body", [row[1:] for row in ROUTED],
                         ids=[row[0] for row in ROUTED])
def test_a_request_is_routed(method: str, path: str, status: int, body: bytes) -> None:
    answer = respond(PLAIN, request(method, path))
    assert isinstance(answer, Response)
    assert answer.status == status and answer.body.startswith(body)
    assert dict(answer.headers).get("Allow") == {
        "/v1/refresh": "POST", "/": "GET, HEAD"}.get(path if status == 405 else "")
    assert dict(answer.headers).get("Retry-After") == ("3" if status == 429 else None)


DEADLINES = [
    ("without the header", {}, 9.0),
    ("a tenth less", {"x_prometheus_scrape_timeout_seconds": "1"}, 0.9),
    ("half a second less at the most", {"x_prometheus_scrape_timeout_seconds": "10"}, 9.5),
    ("the proxy has taken the margin", {"x_prometheus_scrape_timeout_seconds": "10",
                                        "x_joyent_cmon_opts": "e30="}, 10.0),
    ("an hour at the most", {"x_prometheus_scrape_timeout_seconds": "1e9"}, 3599.5),
]


@pytest.mark.parametrize("headers, seconds", [row[1:] for row in DEADLINES],
                         ids=[row[0] for row in DEADLINES])
def test_a_scrape_has_a_deadline(headers: dict[str, str], seconds: float) -> None:
    assert scrape_seconds(request(**headers)) == pytest.approx(seconds)


@pytest.mark.parametrize("word", ["", "0", "-1", "nan", "inf", "soon", "1,5", "9" * 100])
def test_an_invalid_deadline_is_refused(word: str) -> None:
    with pytest.raises(Refused, match="X-Prometheus-Scrape-Timeout-Seconds") as refusal:
        scrape_seconds(request(x_prometheus_scrape_timeout_seconds=word))
    assert refusal.value.status == 400


def test_accept_encoding_is_parsed() -> None:
    def packed(value: str) -> bool:
        head = f"GET / HTTP/1.1\r\nHost: a\r\nAccept-Encoding: {value}\r\n\r\n".encode()
        return bool(parse_head(head, Limits())[7])
    for value in ("gzip", "br, gzip;q=0.5", "x-gzip", "deflate,GZIP", "gzip;q=0.001"):
        assert packed(value), value
    for value in ("identity", "gzip;q=0", "gzip; q=0.0", "gzipped", ""):
        assert not packed(value), value


def test_a_prepared_answer_equals_the_rendered_one() -> None:
    response = Response(200, BIG, PAGE, (("X-Test", "1"),))
    prepared = prepare(response)
    for packed in (False, True):
        assert wire(prepared, packed) == wire(response, packed)
        assert wire(prepared, packed, head_only=True).endswith(b"\r\n\r\n")
        assert b"Connection: close\r\n" in wire(prepared, packed, close=True)
    head, _, body = prepared.form(True).partition(b"\r\n\r\n")
    assert gzip.decompress(body) == BIG and b"Content-Encoding: gzip" in head
    assert b"Vary: Accept-Encoding" in head and len(body) < len(BIG) / 5
    already = Response(200, gzip.compress(BIG), PAGE, (("Content-Encoding", "gzip"),))
    assert gzip.decompress(prepare(already).form(True).partition(b"\r\n\r\n")[2]) == BIG


# --- with sockets ---

LIMITS = TlsLimits(
    connections=40, head_bytes=2000, header_count=20, body_bytes=100, workers=2, head_seconds=0.3,
    idle_seconds=30.0, write_seconds=0.5, handshake_seconds=0.3, grace_seconds=5.0, share=1.0)


UNSENT = "cmon_agent_http_unsent_bytes"
SHED = 'cmon_agent_http_limit_refusals_total{limit="unsent_bytes"}'


class Served:
    """A server in a thread, with the events its handlers wait for."""

    def __init__(self, tls: ssl.SSLContext | None = None, limits: TlsLimits = LIMITS) -> None:
        self.go = threading.Event()
        self.cancelled = threading.Event()
        self.inside = threading.Semaphore(0)
        self.laters: list[Deferred] = []
        self.registry = Registry()
        self.server = TlsServer("agent", self.registry, limits) if tls else Server(
            "agent", self.registry, limits)
        page = prepare(Response(200, BIG, PAGE))
        routes = (*PLAIN,
                  Route("GET", "/page", lambda request: page),
                  Route("GET", "/large", lambda request: Response(200, b"x" * 30_000_000)),
                  Route("GET", "/block", self.block),
                  Route("GET", "/later", self.later),
                  Route("POST", "/echo", lambda request: Response(200, request.body)),
                  Route("GET", "/host", lambda request: text(200, request.host)),
                  Route("GET", "/query", lambda request: text(200, repr(dict(request.query)))),
                  Route("GET", "/who", lambda request: text(200, repr(request.peer.certificate))),
                  Route("GET", "/own", lambda request: Response(
                      200, render(self.registry.families()).encode(), PAGE)))
        self.listener = self.server.listen_tls(("127.0.0.1", 0), Router(routes), tls) \
            if tls is not None and isinstance(self.server, TlsServer) else \
            self.server.listen(("127.0.0.1", 0), routes)
        self.address = self.listener.address
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def block(self, _request: Request) -> Deferred:
        def work() -> None:
            self.inside.release()
            assert self.go.wait(20)
            later.finish(text(200, "done"))
        later = Deferred(time.monotonic() + 30, lambda _: text(503, "too late"))
        if not self.server.spawn(work):
            raise Refused(503, "too busy")
        return later

    def later(self, request: Request) -> Deferred:
        later = Deferred(time.monotonic() + scrape_seconds(request),
                         lambda _: text(503, "too late"))
        later.on_cancel = lambda _: self.cancelled.set()
        self.laters.append(later)
        self.inside.release()
        return later

    def own(self) -> dict[str, float]:
        return samples(http_get(self.address, "/own").text)


@pytest.fixture()
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.go.set()
    made.server.shutdown()
    made.thread.join(10)
    assert not made.thread.is_alive()


def test_the_base_classes_are_those_of_the_standard_library() -> None:
    assert issubclass(Server, socketserver.ThreadingMixIn)
    assert issubclass(Server, http.server.HTTPServer)


RAW = [
    ("a good request", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 200, b"root"),
    ("HTTP/1.0 needs no Host", b"GET / HTTP/1.0\r\n\r\n", 200, b"root"),
    ("an absolute target", b"GET http://b:9/host HTTP/1.1\r\nHost: a\r\n\r\n", 200, b"b\n"),
    ("a host without its port, in lower case", b"GET /host HTTP/1.1\r\nHost: A.b:99\r\n\r\n", 200,
     b"a.b\n"),
    ("an IPv6 host", b"GET /host HTTP/1.1\r\nHost: [::1]:9\r\n\r\n", 200, b"[::1]\n"),
    ("escapes in the path", b"GET /%71uery HTTP/1.1\r\nHost: a\r\n\r\n", 200, b"{}"),
    ("a query", b"GET /query?a=1%2C2&b= HTTP/1.1\r\nHost: a\r\n\r\n", 200,
     b"{'a': '1,2', 'b': ''}"),
    ("a body", b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", 200, b"abc"),
    ("no Host", b"GET / HTTP/1.1\r\n\r\n", 400, b"bad request: no Host header"),
    ("Host twice", b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400,
     b"more than one host header"),
    ("Host with blanks", b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400, b"Host header is not"),
    ("a folded header", b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n 2\r\n\r\n", 400, b"not a header"),
    ("a blank before the colon", b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400, b"not a header"),
    ("a NUL in a value", b"GET / HTTP/1.1\r\nHost: a\r\nX: \x00\r\n\r\n", 400, b"not a header"),
    ("a bare CR in a value", b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n", 400, b"not a head"),
    ("bare LF", b"GET / HTTP/1.1\nHost: a\n\n", 400, b"lines must end in CR LF"),
    ("two blanks", b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400, b"first line"),
    ("no version", b"GET /\r\n\r\n", 400, b"first line"),
    ("a blank in the target", b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400, b"first line"),
    ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\n", 505, b"only HTTP/1.1"),
    ("a small method", b"get / HTTP/1.1\r\nHost: a\r\n\r\n", 400, b"first line"),
    ("no path", b"GET x HTTP/1.1\r\nHost: a\r\n\r\n", 400, b"target must be a path"),
    ("broken UTF-8", b"GET /%ff HTTP/1.1\r\nHost: a\r\n\r\n", 400, b"not UTF-8"),
    ("a parameter twice", b"GET /query?a=1&a=2 HTTP/1.1\r\nHost: a\r\n\r\n", 400,
     b"given more than once"),
    ("too many headers", b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: 1\r\n" * 21 + b"\r\n", 431,
     b"too many"),
    ("too large a head", b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 2000 + b"\r\n\r\n", 431,
     b"larger than 2000"),
    ("too large a head without end", b"GET /" + b"x" * 2100, 431, b"larger than 2000"),
    ("too large a body", b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 101\r\n\r\n", 413,
     b"larger than 100"),
    ("a body's length that is none", b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n"
     b"\r\nabc", 400, b"not a number"),
    ("two lengths", b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 3\r\n"
     b"\r\nabc", 400, b"more than one content-length header"),
    ("length and chunks", b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n"
     b"Transfer-Encoding: chunked\r\n\r\nabc", 400, b"both"),
    ("chunks", b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 411,
     b"needs a Content-Length"),
    ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00", 400, b"this port speaks HTTP, not TLS"),
]


@pytest.mark.parametrize("raw, status, body", [row[1:] for row in RAW], ids=[row[0] for row in RAW])
def test_raw_requests(served: Served, raw: bytes, status: int, body: bytes) -> None:
    with Connection(served.address) as connection:
        connection.send(raw)
        answer = connection.answer()
        assert answer.status == status and body in answer.body
        assert "x-powered-by" not in answer.headers and answer.headers["date"].endswith("GMT")
        if status >= 400:                   # nothing behind a broken request can be trusted
            assert answer.headers["connection"] == "close"
            assert connection.socket.recv(1) == b""
    with Connection(served.address) as connection:      # the same in single bytes
        for index in range(len(raw)):
            try:
                connection.send(raw[index:index + 1])
            except OSError:
                break
        try:
            assert connection.answer().status == status
        except ConnectionError:             # it answered and closed while we still sent
            assert status >= 400


def test_a_connection_is_kept_and_repeats_are_equal(served: Served) -> None:
    with Connection(served.address) as connection:
        first = connection.request("/page")
        for _ in range(3):
            again = connection.request("/page")
            assert (again.status, again.body) == (200, BIG) == (first.status, first.body)
        assert connection.request("/nowhere").status == 404
        assert connection.request("/page", method="HEAD").headers["content-length"] == str(len(BIG))
        assert connection.request("/page", {"Accept-Encoding": "gzip"}).body == BIG
        assert connection.request("/page", {"Connection": "close"}).headers["connection"] == "close"
        assert connection.socket.recv(1) == b""


def test_http_1_0_is_closed_after_its_answer(served: Served) -> None:
    with Connection(served.address) as connection:
        connection.send(b"GET /page HTTP/1.0\r\n\r\n")
        assert connection.answer().body == BIG and connection.socket.recv(1) == b""


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    with Connection(served.address) as connection:
        lines = [b"GET /v1/%d/metrics HTTP/1.1\r\nHost: a\r\n\r\n" % n for n in range(200)]
        connection.send(b"".join(lines))
        assert [connection.answer().text for _ in lines] == [f"{n}\n" for n in range(200)]


def test_pipelined_requests_are_not_read_before_their_turn(served: Served) -> None:
    held = []
    served.listener.router = Router([Route("GET", "/", lambda request: text(200, str(held.append(
        max(len(one._buffer) for one in list(served.server.connections))))))])
    line = b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 1500 + b"\r\n\r\n"
    with Connection(served.address) as connection:
        sender = threading.Thread(target=connection.send, args=(line * 400,))
        sender.start()
        assert [connection.answer().status for _ in range(400)] == [200] * 400
        sender.join(20)
    assert len(held) == 400 and max(held) < 3 * 16384


def test_a_head_is_not_parsed_for_each_byte_of_its_body(served: Served, monkeypatch: Any) -> None:
    parsed: list[bytes] = []
    monkeypatch.setattr(cmon_agent, "parse_head",
                        lambda head, limits: parsed.append(head) or parse_head(head, limits))
    head = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"
    with Connection(served.address) as connection:
        for _ in range(2):
            connection.send(head)
            for count in range(9):
                wait_until(lambda: [len(one._buffer) for one in list(served.server.connections)]
                           == [len(head) + count])
                connection.send(b"x")
            assert connection.answer().body == b"x" * 9
    assert parsed == [head] * 4         # at the head's end, and at the body's


def test_a_header_line_takes_linear_time() -> None:
    for value in (b" " * 400_000 + b"\1", b"a" + b" " * 400_000 + b"\1", b"a " * 200_000 + b"\1"):
        began = time.process_time()
        with pytest.raises(Refused, match="not a header line"):
            _header_fields(b"X:" + value + b"\r\n\r\n", 0, 9)
        assert time.process_time() - began < 10     # 0.02; in quadratic time 80


def test_a_request_after_a_parked_one_waits(served: Served) -> None:
    with Connection(served.address) as connection:
        connection.send(b"GET /later HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert served.inside.acquire(timeout=10)
        served.laters[0].finish(text(200, "first"))
        served.laters[0].finish(text(200, "never"))
        assert [connection.answer().text for _ in range(2)] == ["first\n", "root\n"]


def test_a_client_may_close_its_side_and_wait(served: Served) -> None:
    with Connection(served.address) as connection:
        connection.send(b"GET /later HTTP/1.1\r\nHost: a\r\n\r\n")
        assert served.inside.acquire(timeout=10)
        connection.socket.shutdown(socket.SHUT_WR)
        served.laters[0].finish(text(200, "still here"))
        assert connection.answer().text == "still here\n" and connection.socket.recv(1) == b""


def has_ended(served: Served) -> bool:
    """Whether the server knows that its client has closed its side."""
    return [one._end for one in list(served.server.connections)] == [True]


def test_a_client_may_close_its_side_and_wait_for_several_answers(served: Served) -> None:
    later, root = (b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n" % path for path in (b"/later", b"/"))
    with Connection(served.address) as connection:
        connection.send(later + root + later + root)
        connection.socket.shutdown(socket.SHUT_WR)
        for number in range(2):
            assert served.inside.acquire(timeout=10)
            wait_until(lambda: has_ended(served))
            served.laters[number].finish(text(200, f"{number}"))
        answers = [connection.answer().text for _ in range(4)]
        assert answers == ["0\n", "root\n", "1\n", "root\n"] and connection.socket.recv(1) == b""


def test_requests_of_a_client_that_is_gone_are_dropped(served: Served) -> None:
    with Connection(served.address) as connection:
        connection.send(b"GET /later HTTP/1.1\r\nHost: a\r\n\r\n" * 200)
        assert served.inside.acquire(timeout=10)
    wait_until(lambda: has_ended(served))

    def gone() -> bool:
        for later in served.laters:
            later.finish(text(200, "nobody reads this"))
        return not served.server.connections
    wait_until(gone)
    assert len(served.laters) < 10          # the answer to the first one brings a reset


def test_parked_answers_hold_no_thread_and_expire_at_their_deadline(served: Served) -> None:
    before = threading.active_count()
    connections = [Connection(served.address) for _ in range(30)]
    for connection in connections:
        connection.send(b"GET /later HTTP/1.1\r\nHost: a\r\n"
                        b"X-Prometheus-Scrape-Timeout-Seconds: 0.5\r\n\r\n")
    for _ in connections:
        assert served.inside.acquire(timeout=10)
    assert threading.active_count() <= before
    for connection in connections:
        answer = connection.answer()
        assert (answer.status, answer.text) == (503, "too late\n")
        connection.close()


def test_a_disconnected_client_cancels_its_request(served: Served) -> None:
    connection = Connection(served.address)
    connection.send(b"GET /later HTTP/1.1\r\nHost: a\r\n\r\n")
    assert served.inside.acquire(timeout=10)
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()                      # a reset
    assert served.cancelled.wait(10)
    served.laters[0].finish(text(200, "nobody hears"))
    assert http_get(served.address, "/").status == 200


def test_blocking_handlers_do_not_hold_up_the_rest_and_are_bounded(served: Served) -> None:
    connections = [Connection(served.address) for _ in range(4)]
    for connection in connections:
        connection.send(b"GET /block HTTP/1.1\r\nHost: a\r\n\r\n")
    for _ in range(LIMITS.workers):
        assert served.inside.acquire(timeout=10)
    assert http_get(served.address, "/page").body == BIG        # while all workers are taken
    served.go.set()
    for connection in connections:
        assert connection.answer().text == "done\n"
        connection.close()


def test_no_answer_of_a_worker_waits_for_the_next_event(served: Served) -> None:
    served.go.set()
    served.server._sweeping = True          # as if its timer were set: no event comes by itself
    slowest: list[float] = []

    def ask() -> None:
        with Connection(served.address) as connection:
            for _ in range(300):
                before = time.monotonic()
                connection.request("/block")
                slowest.append(time.monotonic() - before)
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    # A wake-up that gets lost costs what is left of the 5 s of idle connections, again and again.
    assert sum(seconds > 1.5 for seconds in slowest) < 5, sorted(slowest)[-9:]


def test_a_large_answer_waits_for_a_slow_reader_without_holding_up_others(served: Served) -> None:
    with Connection(served.address) as connection:
        connection.send(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        assert http_get(served.address, "/page").body == BIG
        assert len(connection.answer().body) == 30_000_000
        assert connection.request("/").status == 200


LIMITED = [
    ("a head that does not end", b"GET / HT", "head_seconds", 408),
    ("an answer that nobody reads", b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n", "write_seconds", 0),
]


def test_the_client_with_the_most_unread_bytes_is_closed_first(served: Served) -> None:
    served.server.limits = dataclasses.replace(LIMITS, write_seconds=60.0, unsent_bytes=100 << 20)
    clients: list[Connection] = []
    with Connection(served.address) as quick:
        assert len(quick.request("/large").body) == 30_000_000 and served.own()[UNSENT] == 0
    for address in ("127.0.0.5", *["127.0.0.6"] * 6):
        connection = Connection(served.address, source=(address, 0))
        connection.send(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        clients.append(connection)
        wait_until(lambda: served.own()[UNSENT] + served.own().get(SHED, 0) * 30e6 >=
                   len(clients) * 30e6)
    assert served.own()[UNSENT] < 100 << 20 and served.own()[SHED] >= 3
    assert len(clients[0].answer().body) == 30_000_000          # the oldest, of somebody else
    assert len(clients[-1].answer().body) == 30_000_000
    with pytest.raises(OSError):
        clients[1].answer()
    for connection in clients:
        connection.close()
    wait_until(lambda: served.own()[UNSENT] == 0)


@pytest.mark.parametrize("raw, limit, status", [row[1:] for row in LIMITED],
                         ids=[row[0] for row in LIMITED])
def test_a_slow_client_is_closed_and_counted(served: Served, raw: bytes, limit: str, status: int
                                            ) -> None:
    with Connection(served.address) as connection:
        connection.send(raw)
        name = f'cmon_agent_http_limit_refusals_total{{limit="{limit}"}}'
        wait_until(lambda: served.own().get(name) == 1.0)
        if status:
            assert connection.answer().status == status


def test_idle_connections_hold_no_thread_and_the_oldest_makes_room(served: Served) -> None:
    before = threading.active_count()
    connections = [Connection(served.address) for _ in range(LIMITS.connections)]
    for connection in connections:
        assert connection.request("/").status == 200
    assert threading.active_count() == before
    assert http_get(served.address, "/").status == 200          # the 41st
    assert connections[0].socket.recv(1) == b""                 # closed for it
    assert connections[-1].request("/").status == 200
    for connection in connections:
        connection.close()


def test_100_continue(served: Served) -> None:
    with Connection(served.address) as connection:
        connection.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n"
                        b"Expect: 100-continue\r\n\r\n")
        assert connection.answer(head=True).status == 100
        connection.send(b"abc")
        assert connection.answer().body == b"abc"


def test_requests_are_counted_by_route_and_timed(served: Served) -> None:
    for path in ("/page", "/page", "/v1/a/metrics", "/nowhere", "/refused"):
        http_get(served.address, path)
    own = served.own()
    prefix = "cmon_agent_http_request"
    assert own[f'{prefix}s_total{{route="/page",code="200"}}'] == 2
    assert own[f'{prefix}s_total{{route="/v1/{{zone}}/metrics",code="200"}}'] == 1
    assert own[f'{prefix}s_total{{route="none",code="404"}}'] == 1
    assert own[f'{prefix}s_total{{route="/refused",code="429"}}'] == 1
    assert own[f'{prefix}_duration_seconds_count{{route="/page"}}'] == 2
    assert own[f'{prefix}_duration_seconds_bucket{{route="/page",le="+Inf"}}'] == 2


def test_stopping_finishes_requests_in_flight(served: Served) -> None:
    idle, busy = Connection(served.address), Connection(served.address)
    assert idle.request("/").status == 200
    busy.send(b"GET /later HTTP/1.1\r\nHost: a\r\n\r\n")
    assert served.inside.acquire(timeout=10)
    served.server.stop()
    assert idle.socket.recv(1) == b""
    with pytest.raises(OSError):
        wait_until(lambda: Connection(served.address).close())
    served.laters[0].finish(text(200, "in time"))
    answer = busy.answer()
    assert answer.text == "in time\n" and answer.headers["connection"] == "close"
    served.thread.join(10)
    assert not served.thread.is_alive()


def test_an_address_in_use_is_reported(served: Served) -> None:
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{served.address[1]}: address"):
        Server("agent", Registry()).listen(served.address, PLAIN)
    with pytest.raises(OSError, match=r"cannot listen on \[2001:db8::1\]:9: "):
        Server("agent", Registry()).listen(("2001:db8::1", 9), PLAIN)


def test_timers_and_calls_run_in_the_servers_thread(served: Served) -> None:
    seen: list[Any] = []
    served.server.loop.call_soon(lambda: seen.append(threading.get_ident()))
    served.server.loop.call_soon(served.server.loop.call_later, 0.0, lambda: seen.append("timer"))
    served.server.loop.call_soon(served.server.loop.every, 0.01, lambda: seen.append("tick"))
    served.server.loop.call_soon(lambda: 1 // 0)                 # logged, and nothing else happens
    wait_until(lambda: seen.count("tick") >= 2)
    assert served.thread.ident in seen and "timer" in seen


def test_sockets_of_the_application_are_watched(served: Served) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    seen: list[bytes] = []
    loop = served.server.loop
    loop.call_soon(loop.watch, ours, 1, SimpleNamespace(
        ready=lambda mask: seen.append(ours.recv(9))))
    theirs.send(b"hello")
    wait_until(lambda: seen == [b"hello"])
    loop.call_soon(loop.unwatch, ours)
    loop.call_soon(loop.unwatch, ours)          # a second time does nothing
    done = threading.Event()
    served.server.loop.call_soon(done.set)
    assert done.wait(10)
    ours.close()
    theirs.close()


# --- TLS ---

@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    for name in ("localhost", "alice"):
        key = make_key()
        (folder / f"{name}.key").write_bytes(key)
        (folder / f"{name}.pem").write_bytes(make_certificate(key, name, names=(name,), days=1))
    return folder


@pytest.fixture()
def secure(pems: Path) -> Iterator[Served]:
    context = server_context(str(pems / "localhost.pem"), str(pems / "localhost.key"))
    ask_for_any_certificate(context)
    check_any_certificate(context, str(pems / "localhost.pem"), str(pems / "localhost.key"))
    made = Served(context)
    yield made
    made.server.shutdown()


def client(pems: Path, name: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(pems / "localhost.pem"))
    if name:
        context.load_cert_chain(str(pems / f"{name}.pem"), str(pems / f"{name}.key"))
    return context


def test_tls_with_and_without_a_client_certificate(secure: Served, pems: Path) -> None:
    with Connection(secure.address, client(pems, "alice"), "localhost") as connection:
        for _ in range(3):
            shown = connection.request("/who").text
            assert b"alice" in eval(shown)          # the DER holds the name as it is
        assert connection.request("/page").body == BIG
        assert len(connection.request("/large").body) == 30_000_000
    with Connection(secure.address, client(pems), "localhost") as connection:
        assert connection.request("/who").text == "None\n"


def test_silent_clients_do_not_delay_handshakes_and_are_closed(secure: Served, pems: Path) -> None:
    silent = [Connection(secure.address) for _ in range(16)]
    assert http_get(secure.address, "/page", tls=client(pems), server_name="localhost").body == BIG
    for connection in silent:
        assert connection.socket.recv(1) == b""     # handshake_seconds later
        connection.close()


def test_plain_http_to_a_tls_port_is_reported(secure: Served) -> None:
    with Connection(secure.address) as connection:
        connection.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = connection.answer()
        assert answer.status == 400 and b"this port speaks TLS" in answer.body


def test_garbage_ends_a_handshake_and_is_counted(secure: Served, pems: Path) -> None:
    with Connection(secure.address) as connection:
        connection.send(b"\x16\x03\x01\x00\x05hello")
        while connection.socket.recv(100):
            pass
    own = samples(http_get(secure.address, "/own", tls=client(pems), server_name="localhost").text)
    assert own['cmon_agent_http_tls_handshakes_total{result="failed"}'] == 1
    assert own['cmon_agent_http_tls_handshakes_total{result="done"}'] == 1


def test_concurrent_handshakes_do_not_mix_certificates(secure: Served, pems: Path) -> None:
    contexts = [client(pems, "alice"), client(pems, "localhost"), client(pems)]
    names = [b"alice", b"localhost", b"None"]
    failures: list[str] = []

    def one(index: int) -> None:
        shown = http_get(secure.address, "/who", tls=contexts[index % 3], server_name="localhost")
        if names[index % 3] not in shown.body:
            failures.append(shown.text)
    threads = [threading.Thread(target=one, args=(index,)) for index in range(36)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failures


def letting_in(request: Request) -> Answer:
    request.peer.group = request.query.get("as", "somebody")
    return text(200, "come in")


@pytest.fixture()
def crowded(pems: Path) -> Iterator[Callable[..., tuple[TlsServer, Any]]]:
    """A TLS server with few connections; `/` authenticates its client."""
    servers: list[TlsServer] = []

    def start(**limits: Any) -> tuple[TlsServer, Any]:
        server = TlsServer("agent", Registry(), TlsLimits(**limits))
        servers.append(server)
        listener = server.listen_tls(("127.0.0.1", 0), Router([
            Route("GET", "/", letting_in), Route("GET", "/who", lambda request: text(200, "?"))]),
            server_context(str(pems / "localhost.pem"), str(pems / "localhost.key")))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server, listener.address
    yield start
    for server in servers:
        server.shutdown()


def is_open(connection: Connection) -> bool:
    connection.socket.settimeout(0.2)
    try:
        return bool(connection.socket.recv(1))
    except (socket.timeout, ssl.SSLWantReadError):
        return True
    except OSError:
        return False


def test_at_the_limit_unauthenticated_clients_are_closed_first(crowded: Any, pems: Path) -> None:
    server, address = crowded(connections=6, share=1.0)
    tls = client(pems, "alice")
    tenants = [Connection(address, tls, "localhost") for _ in range(3)]
    for tenant in tenants:
        assert tenant.request("/").status == 200
    silent = [Connection(address) for _ in range(3)]            # never say a word of TLS
    wait_until(lambda: len(server.connections) == 6 and not any(
        connection.is_working for connection in list(server.connections)))
    late = Connection(address, tls, "localhost")
    assert late.request("/").status == 200
    wait_until(lambda: [is_open(one) for one in silent] == [False, True, True], "the oldest goes")
    more = [Connection(address) for _ in range(8)]
    wait_until(lambda: sum(map(is_open, more)) <= 2)            # of six, four are tenants
    for tenant in [*tenants, late]:
        assert tenant.request("/who").status == 200
    for connection in [*tenants, late, *silent, *more]:
        connection.close()


def test_among_authenticated_clients_the_longest_idle_is_closed(crowded: Any, pems: Path) -> None:
    _, address = crowded(connections=3, share=1.0)
    tls = client(pems, "alice")
    tenants = [Connection(address, tls, "localhost") for _ in range(3)]
    for index in (0, 1, 2, 0):
        assert tenants[index].request("/").status == 200
    with Connection(address, tls, "localhost") as late:
        assert late.request("/").status == 200
    wait_until(lambda: [is_open(one) for one in tenants] == [True, False, True])
    for tenant in tenants:
        tenant.close()


def test_a_client_above_its_share_is_closed_before_all_others(crowded: Any, pems: Path) -> None:
    """Otherwise an account with all connections would leave one place to strangers, where each
    newcomer, a stranger until its handshake is done, would push out the one before."""
    _, address = crowded(connections=8, share=0.25)
    tls = client(pems, "alice")

    def enter(group: str, host: str = "127.0.0.1") -> Connection:
        connection = Connection(address, tls, "localhost", source=(host, 0))
        assert connection.request(f"/?as={group}").status == 200
        return connection
    other = enter("other")
    greedy = [enter("greedy") for _ in range(7)]
    silent = Connection(address, source=("127.0.0.9", 0))
    late = enter("late", "127.0.0.8")
    for connection in (other, late, *greedy[2:]):
        assert connection.request("/who").status == 200
    wait_until(lambda: not is_open(greedy[0]) and not is_open(greedy[1]))
    assert is_open(silent)
    for connection in (other, late, silent, *greedy):
        connection.close()


def test_a_client_that_loses_access_counts_as_unauthenticated(crowded: Any, pems: Path) -> None:
    server, address = crowded()
    with Connection(address, client(pems, "alice"), "localhost") as connection:
        for group, strangers in (("a", 0), ("b", 0), ("", 1), ("a", 0)):
            assert connection.request(f"/?as={group}").status == 200
            page = render(server._tls_families())
            assert f"cmon_agent_http_strangers {strangers}\n" in page
            assert list(server._groups) == [group] * bool(group)
    wait_until(lambda: not server._groups and not server.connections)


def test_a_network_is_what_one_machine_cannot_choose() -> None:
    assert network_of("192.0.2.1") == "192.0.2.1"
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:1") != network_of("2001:db9::1")
    assert network_of("fe80::1%net0") == network_of("fe80::2")


def test_unauthenticated_connections_of_one_address_are_limited(crowded: Any, pems: Path) -> None:
    server, address = crowded(connections=16)
    silent = [Connection(address) for _ in range(12)]
    wait_until(lambda: [is_open(one) for one in silent] == [True] * 4 + [False] * 8)
    for connection in silent:
        connection.close()
    wait_until(lambda: not server.connections)
    with Connection(address, client(pems, "alice"), "localhost") as tenant:
        assert tenant.request("/").status == 200
    assert "cmon_agent_http_strangers" in render(server._tls_families())


def test_unauthenticated_connections_have_a_shorter_idle_timeout(crowded: Any, pems: Path) -> None:
    _, address = crowded(stranger_seconds=0.0, idle_seconds=60.0)
    tls = client(pems, "alice")
    with Connection(address, tls, "localhost") as tenant, \
            Connection(address, tls, "localhost") as stranger:
        assert tenant.request("/").status == stranger.request("/who").status == 200
        stranger.socket.settimeout(20)
        assert stranger.socket.recv(1) == b""
        assert tenant.request("/who").status == 200


@pytest.mark.parametrize("names, copies, welcome", [
    (1, 1, True), (300, 1, True),       # 0.3 kB, 4 kB
    (1, 4, True),                       # with three more behind it, which are freed
    (700, 1, False),                    # a certificate of 10 kB: larger than any that could be good
    (300, 4, False),                    # a list of 18 kB
], ids=["small", "large", "a list", "too large", "a list that is too large"])
def test_client_certificates_in_a_handshake_are_bounded(names: int, copies: int, welcome: bool,
                                                        pems: Path, tmp_path: Path) -> None:
    """Parsed names take ten times their size: 100 kB of them held 1.3 MB for each connection."""
    key = make_key()
    pem = make_certificate(key, "alice", names=[f"a{index:03}.example" for index in range(names)])
    (tmp_path / "key").write_bytes(key)
    (tmp_path / "pem").write_bytes(pem * copies)
    context = server_context(str(pems / "localhost.pem"), str(pems / "localhost.key"))
    ask_for_any_certificate(context)
    server = TlsServer("agent", Registry())
    chains: list[int] = []

    def look(tls: ssl.SSLSocket) -> None:
        after_handshake(tls)
        after_handshake(tls)               # nothing is left, nothing is freed twice
        library, inner = _library(), getattr(tls, "_sslobj")
        _, pointer = (ctypes.c_void_p * 2).from_address(id(inner) + object.__basicsize__)
        chain = library.SSL_get_peer_cert_chain(pointer)
        assert not chain or library.OPENSSL_sk_num(chain) == 0
        chains.append(len(tls.getpeercert(True) or b""))
    listener = server.listen_tls(("127.0.0.1", 0), Router(PLAIN), context, on_handshake=look)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tls = client(pems)
    tls.load_cert_chain(str(tmp_path / "pem"), str(tmp_path / "key"))
    try:
        status = http_get(listener.address, "/", tls=tls, server_name="localhost").status
    except OSError:
        status = 0
    assert (status == 200) is welcome is bool(chains)
    assert http_get(listener.address, "/", tls=client(pems), server_name="localhost").status == 200
    server.shutdown()


def key_updates(connection: Connection, count: int) -> None:
    """This many TLS records without data."""
    library = ctypes.CDLL(_ssl.__file__)
    library.SSL_key_update.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.SSL_do_handshake.argtypes = [ctypes.c_void_p]
    inner = connection.socket._sslobj
    _, pointer = (ctypes.c_void_p * 2).from_address(id(inner) + object.__basicsize__)
    for _ in range(count):
        assert library.SSL_key_update(pointer, 0) == 1
        if library.SSL_do_handshake(pointer) != 1:
            library.ERR_clear_error()       # else the next connection would fail with it
            raise ConnectionError


def test_a_client_that_sends_endless_empty_records_is_closed(pems: Path) -> None:
    """OpenSSL would keep reading as long as more arrive, and block the loop."""
    context = server_context(str(pems / "localhost.pem"), str(pems / "localhost.key"))
    secure = Served(context, dataclasses.replace(LIMITS, empty_reads=40))
    secure.listener.on_handshake = after_handshake
    with Connection(secure.address, client(pems), "localhost") as connection:
        for _ in range(3):
            key_updates(connection, 30)
            assert connection.request("/page").body == BIG
        with pytest.raises(OSError):
            key_updates(connection, 60)
            connection.request("/page")
    with Connection(secure.address, client(pems), "localhost") as connection:
        own = samples(connection.request("/own").text)
    assert own['cmon_agent_http_limit_refusals_total{limit="empty_reads"}'] == 1
    secure.server.shutdown()


def test_the_connection_limit_follows_the_available_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    server = Server("agent", Registry(), Limits())
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
        assert server.most_connections() == 300
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        server.server_close()


def test_without_descriptors_unauthenticated_clients_are_closed(crowded: Any, pems: Path) -> None:
    """EMFILE below the limit: the rest of the process uses the descriptors."""
    server, address = crowded(connections=200, share=1.0)
    tls = client(pems, "alice")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Connection(address, tls, "localhost") as tenant:
        assert tenant.request("/").status == 200
        silent = [socket.create_connection(address) for _ in range(20)]
        wait_until(lambda: len(server.connections) == 21)
        late = socket.socket()
        try:
            highest = max(int(name) for name in os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
            fillers = []
            try:
                while True:
                    fillers.append(os.dup(0))
            except OSError:
                pass
            late.connect(address)
            late.settimeout(20)
            wait_until(lambda: server._refusals.get("descriptors", 0) > 0)
            wait_until(lambda: len(server.connections) == 21 and server._accepted == 22)
            assert silent[0].recv(1) == b""
            assert tenant.request("/who").status == 200
        finally:
            for number in fillers:
                os.close(number)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for one in [*silent, late]:
                one.close()


def test_a_new_certificate_serves_new_connections(secure: Served, pems: Path) -> None:
    fresh = server_context(str(pems / "alice.pem"), str(pems / "alice.key"))
    secure.listener.tls = fresh
    trusting = ssl.create_default_context(cafile=str(pems / "alice.pem"))
    assert http_get(secure.address, "/page", tls=trusting, server_name="alice").body == BIG


def test_without_descriptors_new_connections_wait(served: Served) -> None:
    calls: list[int] = []
    accept: Callable[[], Any] = served.listener.socket.accept

    class Full:
        """A listening socket whose first accept finds no descriptor left."""

        def accept(self) -> Any:
            calls.append(1)
            if len(calls) == 1:
                raise OSError(24, "Too many open files")
            return accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)
    real = served.listener.socket
    served.listener.socket = Full()  # type: ignore[assignment]
    assert http_get(served.address, "/").status == 200
    assert len(calls) > 1
    served.listener.socket = real
    assert served.own()['cmon_agent_http_limit_refusals_total{limit="descriptors"}'] == 1
