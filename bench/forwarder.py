#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""Benchmarks the forwarder: CPU per sink, then CPU and memory with 5,000 targets against vmagent.

    bench/forwarder.py [TARGETS]

The parser and the encoders run in this process. Then the forwarder and vmagent, in turn, scrape the
same pages from the same proxy and push to a store that accepts everything. Their CPU time is taken
over one whole interval, after the first.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import ROOT, cpu_seconds, resident, table

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cmon_forwarder as forwarder                                              # noqa: E402
from agents import ALICE, NODE_1, TLS, inventory, proxy, uuid, vm, write_inventory  # noqa: E402
from support import NODE, Program, free_port, http_get, samples, wait_until     # noqa: E402

TARGETS = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
INTERVAL = float(os.environ.get("BENCH_INTERVAL", 30))
SECONDS = float(os.environ.get("BENCH_SECONDS", 2))

# An agent and a store: answers every GET with one page and accepts every POST.
AGENT_AND_STORE = """
import socketserver, sys
page = open(sys.argv[1], "rb").read()
whole = b"HTTP/1.1 200 OK\\r\\nContent-Type: text/plain; version=0.0.4; charset=utf-8\\r\\n" \\
    b"Content-Length: %d\\r\\n\\r\\n" % len(page) + page
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        while True:
            line = self.rfile.readline()
            if not line:
                return
            size = 0
            for header in iter(self.rfile.readline, b"\\r\\n"):
                if header.lower().startswith(b"content-length:"):
                    size = int(header[15:])
            self.rfile.read(size)
            self.wfile.write(whole if line.startswith(b"GET") else
                             b"HTTP/1.1 204 No Content\\r\\n\\r\\n")
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 512
server = Server(("127.0.0.1", int(sys.argv[2])), Handler)
server.serve_forever()
"""


def zone_page() -> str:
    """A zone's page as the agent serves it."""
    with Program.agent("--replay", str(NODE)) as agent:
        zone = json.loads(NODE.read_text())["frames"][0]["vms"][0]["uuid"]
        return http_get(agent.address, f"/v1/{zone}/metrics").text


def rate(work: Any, count: int) -> float:
    """Items per CPU second, where each call of `work` handles `count` items."""
    work()
    began, done = time.process_time(), 0
    while time.process_time() - began < SECONDS / 2:
        work()
        done += count
    return done / (time.process_time() - began)


def encoders(page: str) -> None:
    """Samples per CPU second: the parser, and each encoder with its framing and compression."""
    settings = forwarder.Settings(proxy=forwarder.ProxySettings(url="http://x"), sinks={})
    reader = forwarder.PageReader(forwarder.Selector(settings))
    points, count = reader.read(page)
    target = forwarder.Target(uuid(1), "web01", "/x", (("alias", "web01"), ("instance", uuid(1))))
    forwarded = [(series, value) for _, series, value in points]
    scrape = forwarder.Scrape(target, int(time.time() * 1000), forwarded,
                              {series: 1 for series, _ in forwarded if series.counter})
    parsed = rate(lambda: reader.read(page), count)
    rows: list[list[Any]] = [["(parse a page)", f"{parsed:,.0f}", ""]]
    for kind, row in forwarder.SINKS.items():
        for form in row.encoders:
            sink = forwarder.with_defaults(forwarder.SinkSettings(
                type=kind, form=form, url="http://x", database="d", path=Path("x")))
            records = forwarder.encode(sink, scrape)
            speed = rate(lambda: forwarder.encode(sink, scrape), len(records))
            rows.append([f"{kind} {form or ''}", f"{speed:,.0f}",
                         f"{sum(map(len, records)) / max(len(records), 1):.0f}"])
    table("Samples encoded per CPU second", ("sink", "samples/s", "bytes/sample"), rows)


@contextmanager
def agent_and_store(folder: Path, page: str) -> Iterator[int]:
    """An agent and a store in one process; yields their port."""
    (folder / "page").write_text(page)
    port = free_port()
    program = Program(sys.executable, "-c", AGENT_AND_STORE, folder / "page", str(port))
    try:
        wait_until(lambda: subprocess.run(
            ["sh", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}"], executable="/bin/bash",
            stderr=subprocess.DEVNULL).returncode == 0)
        yield port
    finally:
        program.kill()


def run(program: Program, scraped: Any) -> tuple[float, float, float]:
    """CPU in percent of a core, resident memory in MiB, and scrapes per second over an interval."""
    try:
        wait_until(lambda: scraped() >= TARGETS, timeout=INTERVAL * 4)
        cpu, began, before = cpu_seconds(program.pid), time.monotonic(), scraped()
        time.sleep(INTERVAL)
        seconds = time.monotonic() - began
        return ((cpu_seconds(program.pid) - cpu) / seconds * 100, resident(program.pid) / 2 ** 20,
                (scraped() - before) / seconds)
    finally:
        program.kill()


def at_scale(folder: Path, page: str, port: int) -> None:
    """The forwarder with one sink and with three, against vmagent."""
    content = inventory(f"127.0.0.1:{port}")
    content["vms"] = [vm(uuid(number), ALICE, NODE_1) for number in range(1000, 1000 + TARGETS)]
    write_inventory(folder, content)
    rows: list[list[Any]] = []
    store = f"127.0.0.1:{port}"
    contenders = {
        "remote_write": {"rw": {"type": "remote_write", "url": f"http://{store}"}},
        "influxdb": {"i": {"type": "influxdb", "url": f"http://{store}", "database": "d"}},
        "statsd": {"s": {"type": "statsd", "address": "127.0.0.1:9"}},
        "influxdb, http and file": {
            "i": {"type": "influxdb", "url": f"http://{store}", "database": "d"},
            "h": {"type": "http", "url": f"http://{store}"},
            "f": {"type": "file", "path": "samples.log"}},
    }
    chosen = os.environ.get("BENCH_SINKS")
    with proxy(folder, host_prefix="", quota={"over_quota": "allow"}) as running:
        url = f"https://127.0.0.1:{running.address[1]}"
        for name, sinks in contenders.items():
            if chosen and name not in chosen.split(";"):
                continue
            path = folder / "forwarder.json"
            path.write_text(json.dumps({
                "proxy": {"url": url, "cert": str(TLS / "new_rsa.pem"),
                          "key": str(TLS / "client.key"), "ca": str(TLS / "ca.pem")},
                "interval": INTERVAL, "listen": "127.0.0.1:0", "sinks": sinks,
                "spool": f"spool-{len(rows)}"}))
            program = Program.forwarder(path)

            def scraped(program: Program = program) -> float:
                metrics = samples(http_get(program.address, "/metrics").text)
                return metrics.get('cmon_forwarder_scrapes_total{result="ok"}', 0.0)
            rows.append([f"forwarder: {name}", *run(program, scraped)])
        vmagent = folder / "vmagent.yml"
        vmagent.write_text(f"""
global: {{scrape_interval: {INTERVAL:g}s}}
scrape_configs:
  - job_name: containers
    scheme: https
    tls_config: &tls {{ca_file: {TLS}/ca.pem, cert_file: {TLS}/new_rsa.pem,
                      key_file: {TLS}/client.key}}
    http_sd_configs: [{{url: "{url}/v1/sd", tls_config: *tls}}]
""")
        listen = free_port()
        program = Program("vmagent", f"-promscrape.config={vmagent}",
                          f"-remoteWrite.tmpDataPath={folder}/vmagent",
                          f"-httpListenAddr=127.0.0.1:{listen}",
                          f"-remoteWrite.url=http://{store}/api/v1/write")

        def scraped_by_vmagent() -> float:
            try:
                metrics = samples(http_get(("127.0.0.1", listen), "/metrics").text)
            except OSError:
                return 0.0
            return metrics.get("vm_promscrape_scraped_samples_count", 0.0)
        rows.append(["vmagent: remote write", *run(program, scraped_by_vmagent)])
    series = page.count("\n") - page.count("#")
    table(f"{TARGETS} targets of {series} samples every {INTERVAL:g} s",
          ("", "CPU, % of a core", "memory, MiB", "scrapes/s"),
          [[name, f"{cpu:.0f}", f"{memory:.0f}", f"{scrapes:.0f}"]
           for name, cpu, memory, scrapes in rows])


def main() -> int:
    """Run all benchmarks."""
    page = zone_page()
    encoders(page)
    with tempfile.TemporaryDirectory() as name, agent_and_store(Path(name), page) as port:
        at_scale(Path(name), page, port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
