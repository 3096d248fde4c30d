# SPDX-License-Identifier: MPL-2.0
"""A stand-in for agents, written against the protocol with sockets alone, and proxies around it."""
from __future__ import annotations

import base64
import gzip
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import Address, Program, http_get, samples

TLS = Path(__file__).parent / "tls"
PAGE = "# HELP mem_limit x\n# TYPE mem_limit gauge\n"


class Agent:
    """Answers pages; `mode` says how: ok, hang, close, half, garbage, chunked, drip, error, …"""

    def __init__(self, page: str = PAGE) -> None:
        self.page = page
        self.mode = "ok"
        self.modes: dict[str, str] = {}         # by path; else `mode`
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.connections = 0
        self.gate = threading.Event()           # while it is clear, answers wait
        self.gate.set()
        self.lock = threading.Lock()
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address: Address = self.socket.getsockname()[:2]
        self.sockets: list[socket.socket] = []
        self.closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def text(self) -> str:
        """For an inventory."""
        return "%s:%d" % self.address

    def paths(self) -> list[str]:
        """The requests received, without probes."""
        with self.lock:
            return [path for method, path, _ in self.requests if path != "/-/healthy"]

    def _accept(self) -> None:
        while not self.closed:
            try:
                accepted, _ = self.socket.accept()
            except OSError:
                return
            self.connections += 1
            with self.lock:
                self.sockets.append(accepted)
            threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, accepted: socket.socket) -> None:
        reader = accepted.makefile("rb")
        try:
            while self._one(accepted, reader):
                pass
        except (OSError, ValueError):
            pass
        finally:
            reader.close()
            accepted.close()

    def _one(self, accepted: socket.socket, reader: Any) -> bool:
        line = reader.readline()
        if not line:
            return False
        method, path, _ = line.decode().split()
        headers: dict[str, str] = {}
        while True:
            line = reader.readline()
            if line in (b"\r\n", b""):
                break
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        with self.lock:
            self.requests.append((method, path, headers))
        mode = self.modes.get(path, self.mode)
        self.gate.wait(30)
        if mode == "hang":
            threading.Event().wait(60)
        if mode == "close":
            return False
        if mode == "half":
            accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
            return False
        if mode == "garbage":
            accepted.sendall(b"SSH-2.0-OpenSSH_9.0\r\n")
            return False
        options = headers.get("x-joyent-cmon-opts", "")
        core = json.loads(base64.b64decode(options))["isCoreZone"] if options else None
        body = f"{self.page}mem_limit{{path=\"{path}\",core=\"{core}\"}} 1\n".encode()
        if path == "/-/healthy":
            body = b"OK\n"
        status, extra = "200 OK", ""
        if mode == "error":
            status, body = "500 Internal Server Error", b"internal error; see the log\nmore\n"
        if mode == "busy":
            status, body = "503 Service Unavailable", b"busy: try again in a second\n"
        if mode == "gone":
            status, body = "404 Not Found", b"no such zone\n"
        if "gzip" in headers.get("accept-encoding", "") and mode != "plain":
            body, extra = gzip.compress(body, 1), "Content-Encoding: gzip\r\n"
        date = "Date: Fri, 20 Nov 2026 14:00:00 GMT\r\n"
        if mode == "other":             # no agent of ours, but good HTTP
            date = f"Server: nginx\r\n{date}Connection: keep-alive\r\nETag: \"5\"\r\n"
        kind = "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
        if mode == "partial":
            extra += "X-Cmon-Partial: zfs\r\n"
        if mode == "chunked":
            whole = (f"HTTP/1.1 {status}\r\n{kind}{extra}Connection: keep-alive\r\nKeep-Alive: "
                     "timeout=5\r\nSet-Cookie: a=b\r\nTransfer-Encoding: chunked\r\n\r\n").encode()
            for at in range(0, len(body), 40):
                piece = body[at:at + 40]
                whole += b"%x\r\n%s\r\n" % (len(piece), piece)
            whole += b"0\r\n\r\n"
        else:
            whole = (f"HTTP/1.1 {status}\r\n{date}{kind}{extra}Content-Length: {len(body)}\r\n\r\n"
                     ).encode() + body
        if mode == "drip":
            for at in range(0, len(whole), 97):
                accepted.sendall(whole[at:at + 97])
        else:
            accepted.sendall(whole)
        return mode != "once"

    def drop(self) -> None:
        """Close all connections, as an agent does that restarts."""
        with self.lock:
            for one in self.sockets:
                try:
                    one.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
            self.sockets.clear()

    def close(self) -> None:
        """Stop."""
        self.closed = True
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.socket.close()
        self.drop()
        self.gate.set()


def uuid(number: int) -> str:
    """A UUID made from a number."""
    return f"{number:08x}-0000-4000-8000-{number:012x}"


ALICE, BOB, OPERATOR = uuid(0xA11CE), uuid(0xB0B), uuid(0x0FE)
NODE_1, NODE_2 = uuid(0xC1), uuid(0xC2)
WEB, DB, STOPPED, CORE, NAT, BOBS = (uuid(number) for number in (1, 2, 3, 4, 5, 6))
STRANGE = uuid(99)                      # nobody has this one


def key(name: str) -> str:
    """A public key as an account has it."""
    return (TLS / f"{name}.pub").read_text()


def vm(number: str, owner: str, server: str = NODE_1, state: str = "running", **more: Any) -> Any:
    """A container of an inventory."""
    return {"uuid": number, "alias": f"vm{int(number[:8], 16)}", "owner_uuid": owner,
            "server_uuid": server, "state": state, "image_uuid": uuid(0x1), "brand": "joyent",
            "tags": {}, **more}


def inventory(node_1: str, node_2: str = "127.0.0.1:1") -> dict[str, Any]:
    """Two tenants and an operator; one node that answers, one that may not."""
    return {
        "accounts": [
            {"uuid": ALICE, "login": "alice", "keys": [key("rsa"), key("ec"), key("ed25519")],
             "administrators": [{"login": "carol", "keys": [key("ec384")]}]},
            {"uuid": BOB, "login": "bob", "keys": [key("other")]},
            {"uuid": OPERATOR, "login": "root", "operator": True, "keys": [key("ec521")]},
        ],
        "servers": [{"uuid": NODE_1, "hostname": "cn1", "admin_ip": node_1},
                    {"uuid": NODE_2, "hostname": "cn2", "admin_ip": node_2}],
        "vms": [
            vm(WEB, ALICE, tags={"triton.cmon.groups": "web, front"}),
            vm(DB, ALICE, NODE_2, tags={"triton.cmon.groups": "db"}),
            vm(STOPPED, ALICE, state="stopped"),
            vm(NAT, ALICE, tags={"smartdc_role": "nat"}),
            vm(CORE, OPERATOR, tags={"smartdc_role": "vmapi"}),
            vm(BOBS, BOB),
        ],
    }


def client_tls(cert: str = "", private: str = "") -> ssl.SSLContext:
    """What a client needs: the test CA, and a certificate if it has one."""
    context = ssl.create_default_context(cafile=str(TLS / "ca.pem"))
    context.check_hostname = False
    if hasattr(ssl, "VERIFY_X509_STRICT"):
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if "sha1" in cert:          # a client of today does not even load such a one
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
    if cert:
        context.load_cert_chain(TLS / f"{cert}.pem", TLS / f"{private}.key")
    return context


def proxy_config(folder: Path, **more: Any) -> Path:
    """A configuration file that works, in a folder that has an inventory.json."""
    config = {"listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0",
              "tls": {"certificate": str(TLS / "server.pem"), "key": str(TLS / "server.key")},
              "inventory": {"file": "inventory.json"}, **more}
    path = folder / "proxy.json"
    path.write_text(json.dumps(config))
    return path


def write_inventory(folder: Path, content: Any) -> None:
    """Write the file atomically, as a careful operator does."""
    fresh = folder / "inventory.new"
    fresh.write_text(content if isinstance(content, str) else json.dumps(content))
    fresh.replace(folder / "inventory.json")


@contextmanager
def proxy(folder: Path, **more: Any) -> Iterator[Program]:
    """The proxy as a process."""
    with Program.proxy(proxy_config(folder, **more)) as program:
        program.addresses(2 if more.get("admin_listen", "") is not None else 1)
        yield program


def admin(program: Program) -> dict[str, float]:
    """The proxy's own metrics."""
    return samples(http_get(program.addresses(2)[1], "/metrics").text)
