#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""Stand-ins for VMAPI with its changefeed, CNAPI and mahi, each a process of its own.

    services.py vmapi|cnapi|mahi PORT

They follow what is known of the real ones, quirks included, and share no code with our client.
POST /-/control takes one JSON object {"op": …}; see `control`.
"""
from __future__ import annotations

import base64
import hashlib
import http.server
import json
import socket
import struct
import sys
import threading
import time
import urllib.parse
from typing import Any

SUBRESOURCES = ("alias", "customer_metadata", "destroyed", "internal_metadata", "nics",
                "owner_uuid", "server_uuid", "state", "tags")
VM_PARAMETERS = {"limit", "marker", "offset", "sort", "state", "predicate", "fields", "uuid",
                 "owner_uuid", "server_uuid", "alias"}
SERVER_PARAMETERS = {"uuids", "setup", "headnode", "reserved", "reservoir", "hostname", "fields",
                     "limit", "offset", "extras"}
POLL = 0.05         # seconds; the real publisher takes 2


class State:
    """All that a service knows, and how it fails."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.lock = threading.RLock()
        self.vms: dict[str, dict[str, Any]] = {}
        self.servers: list[dict[str, Any]] = []
        self.accounts: dict[str, dict[str, Any]] = {}
        self.roles: dict[str, dict[str, Any]] = {}      # by login: members of administrator
        self.fail = 0                   # status for everything
        self.delay = 0.0
        self.nonsense = ""
        self.count: dict[str, int] = {}
        self.feeds: dict[str, Feed] = {}                # by instance
        self.registrations: list[Any] = []
        self.heartbeats = 0
        self.pending: list[tuple[str, str]] = []        # (subresource, uuid)

    def change(self, vm: dict[str, Any], announce: bool) -> None:
        """A VM is different now; differences of known fields are what is announced."""
        before = self.vms.get(vm["uuid"])
        self.vms[vm["uuid"]] = {**(before or {}), **vm}
        if before is None or not announce:
            return                      # a new record is not a change
        changed = [name for name in SUBRESOURCES if name in vm and before.get(name) != vm[name]]
        if vm.get("state") == "destroyed" and before.get("state") != "destroyed":
            changed.append("destroyed")
        self.pending += [(name, vm["uuid"]) for name in changed]

    def publish(self) -> None:
        """For ever: send what is pending, once for each matching subresource and listener."""
        while True:
            time.sleep(POLL)
            with self.lock:
                pending, self.pending = self.pending, []
                feeds = list(self.feeds.values())
            for subresource, uuid in pending:
                message = json.dumps({
                    "changeKind": {"resource": "vm", "subResources": [subresource]},
                    "changedResourceId": uuid, "resourceObject": {"uuid": uuid},
                    "published": str(int(time.time() * 1000))})
                for feed in feeds:
                    if subresource in feed.subresources:
                        feed.send_text(message)


class Feed:
    """One listener of the changefeed."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.subresources: set[str] = set()
        self.lock = threading.Lock()
        self.sent = 0
        self.silent = False

    def frame(self, opcode: int, payload: bytes, final: bool = True) -> None:
        if self.silent:
            return
        size = len(payload)
        head = bytes([(0x80 if final else 0) | opcode])
        head += bytes([size]) if size < 126 else b"\x7e" + struct.pack(">H", size)
        try:
            with self.lock:
                self.connection.sendall(head + payload)
        except OSError:
            pass

    def send_text(self, text: str) -> None:
        """In fragments, with a ping between them, every third time."""
        raw = text.encode()
        self.sent += 1
        if self.sent % 3:
            self.frame(1, raw)
        else:
            self.frame(1, raw[:10], False)
            self.frame(9, b"are you there")
            self.frame(0, raw[10:])


def read_exactly(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        piece = connection.recv(count - len(found))
        if not piece:
            raise OSError("closed")
        found += piece
    return found


def read_frame(connection: socket.socket) -> tuple[int, bytes]:
    first, second = read_exactly(connection, 2)
    if not second & 0x80:
        raise OSError("a client must mask its frames")
    size = second & 0x7F
    if size == 126:
        size, = struct.unpack(">H", read_exactly(connection, 2))
    elif size == 127:
        size, = struct.unpack(">Q", read_exactly(connection, 8))
    mask = read_exactly(connection, 4)
    payload = read_exactly(connection, size)
    return first & 15, bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


class Handler(http.server.BaseHTTPRequestHandler):
    """Requests of all three."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True      # head and body are two writes: 40 ms otherwise
    state: State

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        order = json.loads(self.rfile.read(length))
        with self.state.lock:
            result = control(self.state, order)
        self.answer(200, result)

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        state = self.state
        with state.lock:
            name = "/vms/UUID" if url.path.startswith("/vms/") else url.path
            state.count[name] = state.count.get(name, 0) + 1
            fail, delay = state.fail, state.delay
        if delay:
            time.sleep(delay)
        if fail:
            code = "ReplicatorNotReady" if state.kind == "mahi" else "ServiceUnavailable"
            self.answer(fail, {"code": code, "message": "not ready"})
            return
        if state.nonsense and url.path != "/changefeeds":
            self.send_response(200)
            self.send_header("Content-Length", str(len(state.nonsense)))
            self.end_headers()
            self.wfile.write(state.nonsense.encode())
            return
        with state.lock:
            if url.path == "/changefeeds" and state.kind == "vmapi":
                pass
            elif state.kind == "vmapi":
                self.answer(*vmapi(state, url.path, query))
                return
            else:
                self.answer(*(cnapi if state.kind == "cnapi" else mahi)(state, url.path, query))
                return
        if self.headers.get("Upgrade", "").lower() == "websocket":
            self.feed()
        else:
            self.answer(200, [{"resource": "vm", "subResources": SUBRESOURCES,
                               "bootstrapRoute": "/vms"}])

    def feed(self) -> None:
        """The WebSocket of one listener, until it ends."""
        state, connection = self.state, self.connection
        self.close_connection = True
        if self.headers.get("Sec-WebSocket-Version") != "13" \
                or self.headers.get("accept-version") not in ("~1", "~2"):
            self.answer(400, {"code": "BadRequest"})
            return
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        connection.sendall((
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n\r\n").encode())
        feed = Feed(connection)
        try:
            opcode, payload = read_frame(connection)
            registration = json.loads(payload)
            kind = registration["changeKind"]
            if opcode != 1 or not registration["instance"] or not registration["service"] \
                    or kind["resource"] != "vm" or set(kind["subResources"]) - set(SUBRESOURCES):
                feed.frame(8, b"\x03\xf3invalid registration")
                return
            feed.subresources = set(kind["subResources"])
            with state.lock:
                state.registrations.append(registration)
                state.feeds[registration["instance"]] = feed
            feed.frame(1, json.dumps({"resource": "vm", "subResources": kind["subResources"],
                                      "bootstrapRoute": "/vms"}).encode())
            while True:
                opcode, payload = read_frame(connection)
                if opcode == 8:
                    return
                if opcode == 9:
                    feed.frame(10, payload)
                if opcode == 1 and payload == b"heartbeat":
                    state.heartbeats += 1
        except (OSError, ValueError, KeyError):
            pass
        finally:
            with state.lock:
                for instance, one in list(state.feeds.items()):
                    if one is feed:
                        del state.feeds[instance]


Reply = tuple


def invalid(message: str) -> Reply:
    return 409, {"code": "ValidationFailed", "message": message, "errors": []}


def vmapi(state: State, path: str, query: dict[str, str]) -> Reply:
    if path == "/ping":
        return 200, {"pingErrors": {}, "pid": 1, "status": "OK", "healthy": True}
    if path.startswith("/vms/"):
        vm = state.vms.get(path[5:])
        return (200, vm) if vm else (404, {"code": "ResourceNotFound", "message": "not found"})
    if path != "/vms":
        return 404, {"code": "ResourceNotFound", "message": path}
    if set(query) - VM_PARAMETERS:
        return invalid("Invalid parameters")
    if "marker" in query and "offset" in query:
        return invalid("offset and marker cannot both be used")
    limit = int(query.get("limit", 1000))
    if not 1 <= limit <= 1000:
        return invalid("limit")
    vms = sorted(state.vms.values(), key=lambda vm: str(vm.get("uuid")), reverse=True)
    wanted = query.get("state")
    if wanted == "active":
        vms = [vm for vm in vms if vm.get("state") not in ("destroyed", "failed")]
    elif wanted:
        vms = [vm for vm in vms if vm.get("state") == wanted]
    if "marker" in query:
        marker = json.loads(query["marker"])["uuid"]
        vms = [vm for vm in vms if vm["uuid"] < marker]
    else:
        vms = vms[int(query.get("offset", 0)):]
    vms = vms[:limit]
    if "fields" in query:
        fields = query["fields"].split(",")
        vms = [{name: vm[name] for name in fields if name in vm} for vm in vms]
    return 200, vms


def cnapi(state: State, path: str, query: dict[str, str]) -> Reply:
    if path != "/servers":
        return 404, {"code": "ResourceNotFound", "message": path}
    if set(query) - SERVER_PARAMETERS:
        return 500, {"code": "ValidationError", "message": "unknown parameter"}
    limit, offset = int(query.get("limit", 1000)), int(query.get("offset", 0))
    if not 1 <= limit <= 1000:
        return 500, {"code": "ValidationError", "message": "limit"}
    extras = query.get("extras", "").split(",")
    servers = [server for server in state.servers
               if query.get("setup") is None or str(server.get("setup", True)).lower()
               == query["setup"]]
    if "sysinfo" not in extras and "all" not in extras:
        servers = [{name: value for name, value in server.items() if name != "sysinfo"}
                   for server in servers]
    return 200, servers[offset:offset + limit]


def mahi(state: State, path: str, query: dict[str, str]) -> Reply:
    if path == "/accounts":
        if "login" not in query:
            return 400, {"code": "BadRequest", "message": "login is required"}
        account = state.accounts.get(query["login"])
        if account is None:
            return 404, {"code": "AccountDoesNotExist",
                         "message": f"{query['login']} does not exist"}
        return 200, {"roles": {}, "account": account}
    if path == "/roles":
        account = state.accounts.get(query.get("account", ""))
        if account is None:
            return 404, {"code": "AccountDoesNotExist", "message": "no"}
        found: dict[str, Any] = {"account": account}
        if query.get("role") == "administrator" and query["account"] in state.roles:
            found["role"] = {"uuid": "r", "name": "administrator",
                             "members": state.roles[query["account"]]}
        return 200, found               # a role that does not exist: 200 without it
    return 404, {"code": "ResourceNotFound", "message": path}


def control(state: State, order: dict[str, Any]) -> Any:
    """One order of a test."""
    op = order["op"]
    if op == "put":                     # announce: by the feed; silent: nobody hears of it
        for vm in order["vms"]:
            state.change(vm, not order.get("silent"))
    elif op == "forget":                # moray has lost it
        for uuid in order["uuids"]:
            state.vms.pop(uuid, None)
    elif op == "servers":
        state.servers = order["servers"]
    elif op == "accounts":
        state.accounts, state.roles = order["accounts"], order.get("roles", {})
    elif op == "fail":
        state.fail = order["status"]
    elif op == "delay":
        state.delay = order["seconds"]
    elif op == "cut":                   # all feeds are cut off
        for feed in list(state.feeds.values()):
            try:
                feed.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
    elif op == "silence":               # the feeds that are there say nothing more
        for feed in list(state.feeds.values()):
            feed.silent = True
    elif op == "nonsense":              # this is what all answers are; "": no more
        state.nonsense = order["text"]
    elif op == "say":                   # raw text by the feed
        for feed in list(state.feeds.values()):
            feed.send_text(order["text"])
    elif op == "churn":                 # so many changes a second, for so many seconds
        threading.Thread(target=churn, args=(state, order), daemon=True).start()
    return {"count": state.count, "feeds": len(state.feeds), "heartbeats": state.heartbeats,
            "registrations": state.registrations, "vms": len(state.vms)}


def churn(state: State, order: dict[str, Any]) -> None:
    uuids = list(state.vms)
    end = time.monotonic() + order["seconds"]
    number = 0
    while time.monotonic() < end:
        with state.lock:
            for _ in range(order["rate"] // 20):
                number += 1
                state.change({"uuid": uuids[number % len(uuids)], "alias": f"churn{number}"}, True)
        time.sleep(0.05)


class Threads(http.server.ThreadingHTTPServer):
    """Closing must not wait for feeds."""
    daemon_threads = True
    request_queue_size = 256


def main() -> None:
    state = Handler.state = State(sys.argv[1])
    server = Threads(("127.0.0.1", int(sys.argv[2])), Handler)
    if state.kind == "vmapi":
        threading.Thread(target=state.publish, daemon=True).start()
    print(f"listening on 127.0.0.1:{server.server_address[1]}", file=sys.stderr, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
