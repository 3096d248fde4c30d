# SPDX-License-Identifier: MPL-2.0
"""Around a forwarder: a source in the place of the proxy, sinks that misbehave to order."""
from __future__ import annotations

import gzip
import json
import socket
import threading
from pathlib import Path
from typing import Any, Callable

from support import Address, Program, http_get, samples, wait_until


def uuid_of(number: int) -> str:
    return f"{number:08x}-0000-4000-8000-{number:012x}"


class Listening:
    """Accepts connections and serves each in a thread; can be closed and reopened."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.address: Address = ("127.0.0.1", 0)
        self._sockets: list[socket.socket] = []
        self._listening: socket.socket | None = None
        self.connections = 0
        self.open()

    def open(self) -> None:
        """Listen, at the same port as before."""
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(self.address)
        listening.listen(256)
        self.address = listening.getsockname()[:2]
        self._listening = listening
        threading.Thread(target=self._accept, args=(listening,), daemon=True).start()

    def close(self) -> None:
        """Refuse connections, and cut those that are open."""
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.shutdown(socket.SHUT_RDWR)
            listening.close()
        with self.lock:
            sockets, self._sockets = self._sockets, []
        for one in sockets:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    @property
    def text(self) -> str:
        """HOST:PORT"""
        return "%s:%d" % self.address

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                accepted, _ = listening.accept()
            except OSError:
                return
            self.connections += 1
            with self.lock:
                self._sockets.append(accepted)
            threading.Thread(target=self._run, args=(accepted,), daemon=True).start()

    def _run(self, accepted: socket.socket) -> None:
        with accepted:
            try:
                self.serve(accepted)
            except (OSError, ValueError):
                pass
            with self.lock:
                if accepted in self._sockets:
                    self._sockets.remove(accepted)

    def serve(self, accepted: socket.socket) -> None:
        """Serve one connection."""
        raise NotImplementedError


def read_request(reader: Any) -> tuple[str, str, dict[str, str], bytes] | None:
    """Method, path, headers and body; None at the end."""
    line = reader.readline()
    if not line:
        return None
    method, path, _ = line.decode().split()
    headers: dict[str, str] = {}
    for line in iter(reader.readline, b"\r\n"):
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    body = reader.read(int(headers.get("content-length", 0)))
    return method, path, headers, body


class Source(Listening):
    """Stands in for the proxy: a function makes each container's page from its number."""

    def __init__(self, count: int = 1, page: Callable[[int], str] | None = None) -> None:
        self.containers = {number: f"web{number}" for number in range(count)}
        self.counters: dict[int, int] = {}
        self.step = 1                           # counters grow by it with each scrape
        self.page = page or self.counting
        self.scrapes = 0
        self.status: dict[str, int] = {}        # by path
        self.requests: list[tuple[str, dict[str, str]]] = []
        super().__init__()

    def counting(self, number: int) -> str:
        """A counter that grows, and a gauge."""
        with self.lock:
            value = self.counters[number] = self.counters.get(number, 0) + self.step
        return f"# TYPE hits_total counter\nhits_total {value}\n# TYPE level gauge\nlevel -1.5\n"

    def serve(self, accepted: socket.socket) -> None:
        """HTTP/1.1, kept open."""
        reader = accepted.makefile("rb")
        while True:
            request = read_request(reader)
            if request is None:
                return
            _, path, headers, _ = request
            with self.lock:
                self.requests.append((path, headers))
            status = self.status.get(path.partition("?")[0], 200)
            if path.startswith("/v1/sd"):
                body = json.dumps([{"targets": [self.text], "labels": {
                    "__meta_triton_machine_id": uuid_of(number),
                    "__meta_triton_machine_alias": alias, "instance": uuid_of(number),
                    "__metrics_path__": f"/v1/{uuid_of(number)}/metrics"}}
                    for number, alias in self.containers.items()])
            else:
                number = int(path[4:12], 16)
                body = self.page(number)
                self.scrapes += 1
            packed = gzip.compress(body.encode(), 1)
            accepted.sendall(f"HTTP/1.1 {status} X\r\nContent-Encoding: gzip\r\nContent-Length: "
                             f"{len(packed)}\r\n\r\n".encode() + packed)


class HttpSink(Listening):
    """Accepts requests; `answers` are for the next ones: a status, or a function."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.default: Any = 204
        self.accepted: list[bytes] = []         # bodies of requests that were answered with 2xx
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.said: Callable[[bytes], bytes] = lambda body: b""      # an answer's body
        super().__init__()

    def serve(self, accepted: socket.socket) -> None:
        """Answers as told: a status, (status, headers), "cut", "hang", or a function of the
        body."""
        reader = accepted.makefile("rb")
        while True:
            request = read_request(reader)
            if request is None:
                return
            _, path, headers, body = request
            if headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            with self.lock:
                answer = self.answers.pop(0) if self.answers else self.default
                self.seen.append((path, headers, body))
            if callable(answer):
                answer = answer(body)
            if answer == "cut":
                accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Le")
                return
            if answer == "hang":
                threading.Event().wait(60)
                return
            status, extra = answer if isinstance(answer, tuple) else (answer, "")
            if 200 <= status < 300:
                with self.lock:
                    self.accepted.append(body)
            said = self.said(body)
            accepted.sendall(f"HTTP/1.1 {status} X\r\n{extra}Content-Length: {len(said)}\r\n\r\n"
                             .encode() + said)

    def lines(self) -> list[str]:
        """All lines that were accepted, in order."""
        with self.lock:
            return [line for body in self.accepted for line in body.decode().splitlines()]

    def rows(self) -> list[dict[str, Any]]:
        """The accepted lines as JSON."""
        return [json.loads(line) for line in self.lines()]


class LineSink(Listening):
    """Reads lines from TCP; `read`: "all", "slow" (a byte a second), "cut" or "mute"."""

    def __init__(self) -> None:
        self.mode = "all"
        self.received: list[bytes] = []         # a connection each
        super().__init__()

    def serve(self, accepted: socket.socket) -> None:
        """Read until the other side ends, then end."""
        mode = self.mode
        if mode == "slow":
            while accepted.recv(1):
                threading.Event().wait(1.0)
            return
        if mode == "cut":
            accepted.recv(10)
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            return
        content = b""
        while True:
            piece = accepted.recv(65536)
            if not piece:
                break
            content += piece
        with self.lock:
            self.received.append(content)
        if mode == "mute":
            threading.Event().wait(30)

    def lines(self) -> list[str]:
        """All lines, in order."""
        with self.lock:
            return b"".join(self.received).decode().splitlines()


class UdpSink:
    """Receives datagrams; can be closed and reopened."""

    def __init__(self) -> None:
        self.address: Address = ("127.0.0.1", 0)
        self.lock = threading.Lock()
        self.datagrams: list[bytes] = []
        self._socket: socket.socket | None = None
        self.open()

    def open(self) -> None:
        """Bind, to the same port as before."""
        bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        bound.bind(self.address)
        bound.settimeout(0.1)
        self.address = bound.getsockname()[:2]
        self._socket = bound
        self._reader = threading.Thread(target=self._read, args=(bound,), daemon=True)
        self._reader.start()

    def close(self) -> None:
        """Stop listening; what has arrived is read."""
        bound, self._socket = self._socket, None
        if bound is not None:
            bound.connect(("127.0.0.1", 9))     # from now on others are refused
            self._reader.join()

    def _read(self, bound: socket.socket) -> None:
        with bound:
            while True:
                try:
                    datagram = bound.recv(65536)
                except socket.timeout:
                    if self._socket is not bound:
                        return
                    continue
                with self.lock:
                    self.datagrams.append(datagram)

    @property
    def text(self) -> str:
        """HOST:PORT"""
        return "%s:%d" % self.address

    def lines(self) -> list[str]:
        """Lines of all datagrams, in order."""
        with self.lock:
            return [line for one in self.datagrams for line in one.decode().split("\n")]


def write_config(folder: Path, source: Source, sinks: Any, name: str = "forwarder.json",
                 **more: Any) -> Path:
    """A configuration file that works."""
    path = folder / name
    path.write_text(json.dumps({
        "proxy": {"url": f"http://{source.text}"}, "listen": "127.0.0.1:0", "interval": 0.1,
        "sinks": {name: {"batch_age": 0.05, **sink} for name, sink in sinks.items()}, **more}))
    return path


def own(program: Program, name: str, **labels: str) -> float:
    """One of the forwarder's own metrics; 0 when it is not there."""
    page = samples(http_get(program.address, "/metrics").text)
    return sum(value for series, value in page.items()
               if series.partition("{")[0] == f"cmon_forwarder_{name}"
               and all(f'{label}="{text}"' in series for label, text in labels.items()))


def increases_seen(lines: list[str], name: str) -> int:
    """The sum of StatsD's differences of a counter."""
    return sum(int(line.split(":")[1].split("|")[0]) for line in lines
               if line.startswith(f"{name}:") and line.endswith("|c"))


def drained(program: Program, sink: str) -> None:
    """Wait until nothing waits for a sink."""
    wait_until(lambda: own(program, "sink_spool_samples", sink=sink) == 0)
