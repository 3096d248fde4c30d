# SPDX-License-Identifier: MPL-2.0
"""The client against servers that are honest, slow, broken and hostile."""
from __future__ import annotations

import gzip
import random
import socket
import threading
from collections.abc import Iterator
from typing import Callable

import pytest

from cmon_agent import AnswerReader, Client, ClientError, gunzip

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"

WHOLE = [
    ("with a length", OK, b"hello", True),
    ("no reason phrase", b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", b"", True),
    ("chunked", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n"
     b"0\r\nTrailer: 1\r\n\r\n", b"hello", True),
    ("to the end", b"HTTP/1.1 200 OK\r\n\r\nhello", b"hello", False),
    ("HTTP/1.0", b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello", False),
    ("HTTP/1.0 kept", b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 5\r\n\r\n"
     b"hello", b"hello", True),
    ("to be closed", b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello",
     b"hello", False),
    ("100 Continue first", b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"hello", True),
    ("204", b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
]
BROKEN = [
    ("not HTTP", b"SSH-2.0-OpenSSH\r\n\r\n", "not HTTP"),
    ("HTTP/2", b"HTTP/2 200\r\n\r\n", "not HTTP"),
    ("a status of letters", b"HTTP/1.1 abc OK\r\n\r\n", "not HTTP"),
    ("a folded header", b"HTTP/1.1 200 OK\r\nA: 1\r\n b\r\n\r\n", "not a header line"),
    ("two lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
     "more than one"),
    ("a negative length", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "not a number"),
    ("too large a length", b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n", "larger than 1000"),
    ("too much to the end", b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001, "larger than 1000"),
    ("too much in chunks", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n",
     "larger than 1000"),
    ("chunks without size", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
     "chunked encoding is invalid"),
    ("a chunk without end", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc",
     "chunked encoding is invalid"),
    ("chunks of a byte", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
     + b"0001\r\nx\r\n" * 2000, "too many parts|larger than 1000"),
    ("trailers for ever", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
     + b"a\r\n" * 2000, "too many parts"),
    ("100 Continue for ever", b"HTTP/1.1 100 Continue\r\n\r\n" * 2000, "too many parts"),
    ("another coding", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", "is unknown"),
    ("chunks and a length", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 1"
     b"\r\n\r\n", "is unknown"),
    ("more than it says", OK + b"!", "longer than its Content-Length"),
    ("a head without end", b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70_000, "head is larger"),
    ("truncated", OK[:-1], "in the middle"),
    ("nothing", b"", "without an answer"),
]


def read(raw: bytes, pieces: Callable[[bytes], Iterator[bytes]]) -> AnswerReader:
    reader = AnswerReader(max_body=1000)
    for piece in pieces(raw):
        reader.feed(piece)
    reader.end()
    return reader


def at_once(raw: bytes) -> Iterator[bytes]:
    yield raw


def bytewise(raw: bytes) -> Iterator[bytes]:
    yield from (raw[index:index + 1] for index in range(len(raw)))


@pytest.mark.parametrize("pieces", [at_once, bytewise])
@pytest.mark.parametrize("raw, body, kept", [row[1:] for row in WHOLE], ids=[r[0] for r in WHOLE])
def test_an_answer_is_read(raw: bytes, body: bytes, kept: bool,
                           pieces: Callable[[bytes], Iterator[bytes]]) -> None:
    reader = read(raw, pieces)
    assert (reader.body, reader.keep_alive, reader.done) == (body, kept, True)


@pytest.mark.parametrize("raw, problem", [row[1:] for row in BROKEN],
                         ids=[row[0] for row in BROKEN])
def test_a_broken_answer_is_reported(raw: bytes, problem: str) -> None:
    with pytest.raises(ClientError, match=problem):
        read(raw, at_once)


def test_small_chunks_are_bounded_and_ordinary_ones_are_not() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"%x\r\n" % 64 + b"x" * 64 + b"\r\n"
    assert len(read_all(head + piece * 20_000 + b"0\r\n\r\n").body) == 64 * 20_000
    with pytest.raises(ClientError, match="too many parts"):
        read_all(head + b"2\r\nxy\r\n" * 20_000 + b"0\r\n\r\n")


def read_all(raw: bytes) -> AnswerReader:
    reader = AnswerReader()
    for at in range(0, len(raw), 65536):
        reader.feed(raw[at:at + 65536])
    return reader


def test_an_answer_to_head_has_no_body() -> None:
    reader = AnswerReader(head_request=True)
    assert reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n") and reader.body == b""


@pytest.mark.parametrize("seed", range(40))
def test_garbage_is_an_answer_or_a_client_error(seed: int) -> None:
    chance = random.Random(seed)
    raw = bytearray(WHOLE[seed % len(WHOLE)][1])
    for _ in range(chance.randrange(1, 6)):
        raw[chance.randrange(len(raw))] = chance.randrange(256)
    try:
        read(bytes(raw), bytewise)
    except ClientError:
        pass


class Scripted:
    """A server that answers each connection with the next script: bytes, or seconds of silence."""

    def __init__(self, *scripts: list[bytes]) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/x?y=1"
        self.requests: list[bytes] = []
        self.scripts = list(scripts)
        self.held: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        for script in self.scripts:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            for answer in script:
                self.requests.append(connection.recv(65536))
                connection.sendall(answer)
            if script and script[-1].endswith(b"HOLD"):
                self.held.append(connection)
            else:
                connection.close()


@pytest.fixture()
def client() -> Iterator[Client]:
    made = Client(max_body=1000)
    yield made
    made.close()


def test_a_connection_is_reused(client: Client) -> None:
    server = Scripted([OK, OK])
    for _ in range(2):
        assert client.request("GET", server.url, {"X-A": "b"}).body == b"hello"
    assert server.requests[0] == server.requests[1]
    assert server.requests[0].startswith(
        f"GET /x?y=1 HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n".encode())
    assert b"X-A: b\r\n" in server.requests[0]


def test_a_closed_idle_connection_is_replaced(client: Client) -> None:
    server = Scripted([OK], [OK])
    assert client.request("GET", server.url).status == 200
    assert client.request("GET", server.url).status == 200


def test_a_post_is_never_sent_twice(client: Client) -> None:
    server = Scripted([OK, b""], [OK])
    assert client.request("POST", server.url, body=b"1").status == 200
    with pytest.raises(ClientError, match="without an answer"):
        client.request("POST", server.url, body=b"2")
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [413, 200])
def test_a_server_may_refuse_a_request_before_it_has_read_it(client: Client, status: int) -> None:
    server = Scripted([b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status])
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = b"x" * (32 << 20)                # more than the buffers of both sides
    if status == 413:
        assert client.request("POST", server.url, body=body).status == 413
    else:
        with pytest.raises(ClientError, match="closed in the middle of the request"):
            client.request("POST", server.url, body=body)


def test_the_deadline_is_for_the_whole_exchange(client: Client) -> None:
    server = Scripted([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nHOLD"])
    with pytest.raises(ClientError, match="timed out"):
        client.request("GET", server.url, timeout=0.2)


def test_gzip_is_decompressed_within_a_limit(client: Client) -> None:
    def packed(body: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(
            body) + body
    server = Scripted([packed(gzip.compress(b"page"))], [packed(gzip.compress(b"\0" * 100_000))],
                      [packed(b"no gzip")], [packed(gzip.compress(b"page")[:-9])])
    assert client.request("GET", server.url).body == b"page"
    for problem in ("larger than 1000", "gzip is broken", "truncated"):
        client.close()
        with pytest.raises(ClientError, match=problem):
            client.request("GET", server.url)
    assert gunzip(gzip.compress(b""), 0) == b""


@pytest.mark.parametrize("method, status", [("HEAD", 200), ("POST", 204), ("POST", 200)])
def test_an_answer_without_a_body_may_have_a_coding(client: Client, method: str, status: int
                                                    ) -> None:
    server = Scripted([b"HTTP/1.1 %d OK\r\nContent-Encoding: gzip\r\nContent-Length: 0\r\n\r\n"
                       % status])
    assert client.request(method, server.url).body == b""


UNREACHABLE = [
    ("a closed port", "http://127.0.0.1:1/", r"cannot reach 127.0.0.1:1: connection refused"),
    ("no such name", "http://nowhere.invalid/", "cannot reach nowhere.invalid:80: the name does"),
    ("another scheme", "ftp://a/", "not an http or https URL"),
    ("no host", "http:///x", "not an http or https URL"),
    ("a port of letters", "http://a:b/", "is not a URL"),
    ("a blank in the path", "http://127.0.0.1:1/a b", "cannot be sent"),
]


@pytest.mark.parametrize("url, problem", [row[1:] for row in UNREACHABLE],
                         ids=[row[0] for row in UNREACHABLE])
def test_invalid_urls_and_headers_are_reported(client: Client, url: str, problem: str) -> None:
    with pytest.raises(ClientError, match=problem):
        client.request("GET", url)


def test_a_header_cannot_smuggle_a_line(client: Client) -> None:
    with pytest.raises(ClientError, match="cannot be sent"):
        client.request("GET", "http://127.0.0.1:1/", {"A": "b\nC: d"})


def test_a_name_can_be_mapped_to_another_address() -> None:
    server = Scripted([OK])
    client = Client(resolve={"zone.example": ("127.0.0.1", server.port)})
    assert client.request("GET", "http://zone.example/").body == b"hello"
    assert b"Host: zone.example\r\n" in server.requests[0]
