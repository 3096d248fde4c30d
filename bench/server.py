#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""Benchmarks the kit's HTTP server against nginx and ThreadingHTTPServer, with a page of 7 kB."""
from __future__ import annotations

import sys
import threading

from harness import (
    RESULTS,
    ROOT,
    Bench,
    Contender,
    bench,
    compare,
    free_port,
    python,
    settled,
    table,
    threads,
)

PAGE = "".join(f'# TYPE metric_{n} counter\nmetric_{n}{{zone="web{n % 7}"}} {n * 7919}\n'
               for n in range(110))
IDLE = 10_000

KIT = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from cmon_agent import Deferred, Limits, PAGE, Registry, Response, Route, Server, prepare
page = open(sys.argv[1], "rb").read()
ready = prepare(Response(200, page, PAGE))
server = Server("bench", Registry(), Limits())
def worker(request):
    later = Deferred(server.now() + 9, lambda: Response(503, b""))
    server.spawn(lambda: later.finish(Response(200, page, PAGE)))
    return later
listener = server.listen(("127.0.0.1", 0), [
    Route("GET", "/page", lambda request: ready),
    Route("GET", "/made", lambda request: Response(200, page, PAGE)),
    Route("GET", "/worker", worker)])
import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (r.getrlimit(r.RLIMIT_NOFILE)[1],) * 2)
print("listening on %s:%s" % listener.address, file=sys.stderr, flush=True)
server.serve_forever()
"""

PLAIN = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
page = open(sys.argv[1], "rb").read()
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)
    def log_message(self, *arguments):
        pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print("listening on %s:%s" % server.server_address, file=sys.stderr, flush=True)
server.serve_forever()
"""


def measure(at: Bench, page: str) -> None:
    """Compare nginx, the kit with three kinds of route, and ThreadingHTTPServer."""
    port = free_port()
    site = f"server {{ listen 127.0.0.1:{port}; root {at.folder}; }}"
    with at.nginx(site, port) as nginx, at.server(python(KIT, page)) as kit, \
            at.server(python(PLAIN, page)) as plain:
        for title, connections, more in (
                ("16 keep-alive connections", 16, ()), ("64 keep-alive connections", 64, ()),
                ("One connection per request, 16 concurrent", 16, ("close",))):
            contenders = [Contender("nginx, the page as a file", ("127.0.0.1", port), nginx,
                                  at.requests(at.get("/page")), more)]
            contenders += [Contender(name, kit.address, kit.pid, at.requests(at.get(path)), more)
                         for path, name in (("/page", "kit, prepared response"),
                                            ("/made", "kit, response built each time"),
                                            ("/worker", "kit, response by a worker"))]
            contenders.append(Contender("ThreadingHTTPServer", plain.address, plain.pid,
                                      at.requests(at.get("/page")), more))
            table(title, ("server", *RESULTS), compare(at, contenders, connections))


def idle(at: Bench, page: str) -> None:
    """Memory and threads of idle connections."""
    rows = []
    port = free_port()

    def hold(name: str, address: tuple[str, int], pid: int) -> None:
        request = at.requests(at.get("/page"))
        at.load(address, 16, request, seconds=1)
        before = settled(pid)
        with at.idle(address, IDLE, request) as load:
            rows.append([name, load.open, (settled(pid) - before) / load.open / 1000, threads(pid)])

    with at.nginx(f"server {{ listen 127.0.0.1:{port}; root {at.folder}; }}", port) as pid:
        hold("nginx", ("127.0.0.1", port), pid)
    with at.server(python(KIT, page)) as kit:
        hold("kit", kit.address, kit.pid)
    table("Idle connections, after one response each", (
        "server", "connections", "resident kB each", "threads"), rows)


def main() -> int:
    """Run all benchmarks."""
    with bench() as at:
        page = at.folder / "page"
        page.write_text(PAGE)
        page.chmod(0o644)
        measure(at, str(page))
        idle(at, str(page))
    assert threading.active_count() < 10
    return 0


if __name__ == "__main__":
    sys.exit(main())
