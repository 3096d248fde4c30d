#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""Benchmarks the proxy's relays and handshakes against nginx as a mutual-TLS reverse proxy.

The upstream of both is an nginx on the load generator's core that serves a page of 12 kB from a
file. Authorisation and quotas are on. `python3 bench/proxy.py relays …` runs only these tables.
"""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import (
    LOAD_CORE,
    RESULTS,
    ROOT,
    Address,
    Bench,
    Contender,
    Program,
    bench,
    compare,
    cpu_seconds,
    free_port,
    on_core,
    resident,
    settled,
    table,
    threads,
)

TLS = ROOT / "tests" / "tls"
CLIENT = ("tls", str(TLS / "new_rsa.pem"), str(TLS / "client.key"))
OLD_CLIENT = ("tls", str(TLS / "old_ec.pem"), str(TLS / "ec.key"))
PAGE = "".join(f'# HELP metric_{n} One of many.\n# TYPE metric_{n} counter\n'
               f'metric_{n}{{zone="web{n % 7}"}} {n * 7919}\n' for n in range(150))
ACCOUNT = "2f6d1c1a-9d3c-4a55-8f0e-2b8f3f3b7a10"
IDLE = 5000
NODES = 20          # compute nodes in the inventory; all have the same address here


def number(kind: int, index: int) -> str:
    """A UUID that is unique for each kind and index."""
    return f"{index:08x}-{kind:04x}-4000-8000-{index:012x}"


def inventory(nodes: list[str], vms: int, accounts: int = 1) -> dict[str, Any]:
    """An inventory of `vms` containers on these nodes, spread over alice and other accounts."""
    key = (TLS / "rsa.pub").read_text(), (TLS / "ec.pub").read_text()
    return {"accounts": [{"uuid": ACCOUNT, "login": "alice", "keys": list(key)}] + [
                {"uuid": number(9, n), "login": f"user{n}", "keys": []}
                for n in range(accounts - 1)],
            "servers": [{"uuid": number(1, n), "hostname": f"cn{n}", "admin_ip": at}
                        for n, at in enumerate(nodes)],
            "vms": [{"uuid": number(2, n), "alias": f"vm{n}", "owner_uuid": ACCOUNT
                     if n % accounts == 0 else number(9, n % accounts - 1),
                     "server_uuid": number(1, n % len(nodes)), "image_uuid": number(3, 1),
                     "brand": "joyent", "state": "running", "tags": {"triton.cmon.groups": "a,b"}}
                    for n in range(vms)]}


@contextlib.contextmanager
def proxy(at: Bench, content: dict[str, Any], **settings: Any) -> Iterator[Program]:
    """Our proxy, pinned to the server's core."""
    folder = at.folder / f"proxy{len(list(at.folder.glob('proxy*')))}"
    folder.mkdir()
    (folder / "inventory.json").write_text(json.dumps(content))
    (folder / "proxy.json").write_text(json.dumps({
        "listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0",
        "tls": {"certificate": str(at.folder / "server.pem"),
                "key": str(at.folder / "server.key")},
        "inventory": {"file": "inventory.json"},
        "quota": {"per_minute": 1e9, "burst": 1e9, "hard_per_minute": 1e10}, **settings}))
    with at.server(Program.proxy(folder / "proxy.json")) as program:
        yield program


@contextlib.contextmanager
def node(at: Bench) -> Iterator[Address]:
    """The compute node of both proxies: nginx, pinned to the load generator's core."""
    port = free_port()
    site = (f"server {{ listen 127.0.0.1:{port}; root {at.folder}; "
            "location / { rewrite ^ /page break; add_header X-Node 1; "
            "types { } default_type 'text/plain; version=0.0.4; charset=utf-8'; } }")
    with at.nginx(site, port, core=LOAD_CORE):
        yield ("127.0.0.1", port)


def reverse(at: Bench, port: int, upstream: Address) -> str:
    """nginx as reverse proxy: requests any client certificate, keeps upstream connections open."""
    return f"""
    upstream node {{ server {upstream[0]}:{upstream[1]}; keepalive 64;
                     keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port} ssl backlog=1024;
        ssl_certificate {at.folder}/server.pem; ssl_certificate_key {at.folder}/server.key;
        ssl_protocols TLSv1.2 TLSv1.3; ssl_session_tickets off; ssl_session_cache off;
        ssl_verify_client optional_no_ca;
        location / {{ proxy_pass http://node; proxy_http_version 1.1;
                      proxy_set_header Connection ""; }}
    }}"""


def relays(at: Bench, upstream: Address) -> None:
    """Relays over keep-alive connections, and full handshakes."""
    requests = at.requests(*[at.get(f"/v1/{number(2, n)}/metrics", "cmon.bench")
                             for n in range(100)])
    port = free_port()
    content = inventory([f"{upstream[0]}:{upstream[1]}"] * NODES, 100)
    rows: list[list[Any]] = []
    with at.nginx(reverse(at, port, upstream), port) as nginx, proxy(at, content) as ours:
        for title, connections, more in (
                ("1", 1, CLIENT), ("16", 16, CLIENT), ("64", 64, CLIENT),
                ("handshake per request, new style", 16, (*CLIENT, "close")),
                ("handshake per request, old style ECDSA", 16, (*OLD_CLIENT, "close"))):
            rows += [[title, *row] for row in compare(at, [
                Contender("nginx", ("127.0.0.1", port), nginx, requests, more),
                Contender("ours", ours.address, ours.pid, requests, more)], connections)]
    table("Relaying a 12 kB page over mutual TLS, and full handshakes",
          ("connections", "proxy", *RESULTS), rows)


def idle(at: Bench, upstream: Address) -> None:
    """Memory of idle TLS connections, after one response each."""
    requests = at.requests(*[at.get(f"/v1/{number(2, n)}/metrics", "cmon.bench")
                             for n in range(100)])
    rows = []
    port = free_port()
    with at.nginx(reverse(at, port, upstream), port) as pid:
        at.load(("127.0.0.1", port), 16, requests, *CLIENT, seconds=1)
        before = settled(pid)
        with at.idle(("127.0.0.1", port), IDLE, requests, *CLIENT, "window=32") as load:
            rows.append(["nginx", load.open, (settled(pid) - before) / load.open / 1000,
                         threads(pid)])
    with proxy(at, inventory([f"{upstream[0]}:{upstream[1]}"] * NODES, 100)) as program:
        at.load(program.address, 16, requests, *CLIENT, seconds=1)
        before = settled(program.pid)
        with at.idle(program.address, IDLE, requests, *CLIENT, "window=32") as load:
            rows.append(["ours", load.open, (settled(program.pid) - before) / load.open / 1000,
                         threads(program.pid)])
    table("Idle TLS connections, after one response each",
          ("proxy", "connections", "resident kB each", "threads"), rows)


@contextlib.contextmanager
def silent() -> Iterator[Address]:
    """A node that accepts connections and never answers."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    accepted: list[socket.socket] = []

    def hold() -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted.append(listening.accept()[0])
    threading.Thread(target=hold, daemon=True).start()
    yield listening.getsockname()[:2]
    listening.close()
    for connection in accepted:
        connection.close()


def bulkhead(at: Bench, upstream: Address) -> None:
    """Requests to 19 healthy nodes while one of 20 hangs."""
    healthy = at.requests(*[at.get(f"/v1/{number(2, n)}/metrics", "cmon.bench")
                            for n in range(200) if n % 20])
    hanging = at.requests(*[at.get(f"/v1/{number(2, n)}/metrics", "cmon.bench").replace(
        "Seconds: 10", "Seconds: 1") for n in range(0, 200, 20)])
    rows = []
    for name, dead in (("all 20 nodes answer", False), ("one of 20 hangs", True)):
        with silent() as hung:
            good = f"{upstream[0]}:{upstream[1]}"
            nodes = [f"{hung[0]}:{hung[1]}" if dead else good] + [good] * 19
            with proxy(at, inventory(nodes, 200)) as program:
                waiting = subprocess.Popen(
                    at.command(program.address, 16, hanging, *CLIENT), stdout=subprocess.PIPE,
                    preexec_fn=on_core(LOAD_CORE)) if dead else None
                time.sleep(0.5)
                load = at.load(program.address, 16, healthy, *CLIENT)
                rows.append([name, load.rate, load.p50, load.p99, load.max,
                             load.errors + load.refused])
                if waiting is not None:
                    waiting.communicate()
    table("Healthy nodes on 16 connections, while 16 more request the hung node",
          ("case", "requests/s", "p50 ms", "p99 ms", "max ms", "failed"), rows)


def big(at: Bench, upstream: Address) -> None:
    """An inventory of 10,000 containers."""
    nodes = [f"{upstream[0]}:{upstream[1]}"] * 200
    content = inventory(nodes, 10_000, accounts=10)
    with proxy(at, inventory(nodes[:1], 10)) as program:
        _ = program.address
        small = settled(program.pid)
    with proxy(at, content) as program:
        address = program.address
        size = settled(program.pid)
        discover = at.requests(at.get("/v1/discover", "cmon.bench", gzip=True))
        load = at.load(address, 16, discover, *CLIENT)
        rows = [["resident with 10 containers", small / 1e6, "MB"],
                ["resident with 10,000 containers on 200 nodes", size / 1e6, "MB"],
                ["the same, after discovery requests", resident(program.pid) / 1e6, "MB"],
                ["discovery of 1,000 containers, gzip, 16 connections", load.rate, "requests/s"],
                ["p99 of discovery", load.p99, "ms"]]
        folder = Path(program.command[program.command.index("--config") + 1]).parent
        before = cpu_seconds(program.pid)
        for round_ in range(5):
            for vm in content["vms"][:1]:
                vm["alias"] = f"renamed{round_}"
            (folder / "new").write_text(json.dumps(content))
            os.replace(folder / "new", folder / "inventory.json")
            time.sleep(2.5)
        rows.append(["reloading a changed inventory file", (cpu_seconds(program.pid) - before) / 5,
                     "CPU seconds"])
    table("A large inventory", ("what", "value", "unit"), rows)


def main() -> int:
    """Run all benchmarks, or those named on the command line."""
    with bench() as at:
        (at.folder / "page").write_text(PAGE)
        (at.folder / "page").chmod(0o644)
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                        "ec_paramgen_curve:P-256", "-nodes", "-keyout", at.folder / "server.key",
                        "-out", at.folder / "server.pem", "-days", "30", "-subj", "/CN=cmon.bench"],
                       check=True, stderr=subprocess.DEVNULL)
        chosen = sys.argv[1:] or ["relays", "idle", "bulkhead", "big"]
        with node(at) as upstream:
            for name in chosen:
                {"relays": relays, "idle": idle, "bulkhead": bulkhead, "big": big}[name](
                    at, upstream)
    return 0


if __name__ == "__main__":
    assert shutil.which("cc")
    sys.exit(main())
