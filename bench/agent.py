#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""Benchmarks the agent on a chain of 50,000 kstats against nginx and ThreadingHTTPServer.

The kstats come from the stand-in tests/libkstat, which generates them when read; tables show its
memory and CPU time where they matter. `python3 bench/agent.py paced …` runs only these tables.
"""
from __future__ import annotations

import contextlib
import select
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import server as references
from harness import (
    RESULTS,
    ROUNDS,
    Bench,
    Contender,
    Program,
    bench,
    compare,
    cpu_seconds,
    free_port,
    python,
    resident,
    settled,
    table,
    threads,
)

from support import Kernel, agent_config, build_libkstat, http_get, samples

IDLE = 10_000
CHAIN = 50_000


def zone(number: int) -> str:
    """The UUID of the synthetic zone with this number."""
    return f"{number:08x}-0000-4000-8000-{number:012x}"


def zfs_list(zones: int) -> str:
    """Output of `zfs list` for zones 1 to `zones`."""
    return "".join(f"zones/{zone(n)}\t26417463296\t426524672\t871366144\t131072\t26843545600\t2.11x"
                   "\t2.02x\t1409286144\t2618294272\t419430400\t7094272\n"
                   for n in range(1, zones + 1))


@contextlib.contextmanager
def agent(at: Bench, zones: int, chain: int, **settings: Any) -> Iterator[tuple[Program, Kernel]]:
    """The agent, pinned to the server's core, with `zones` zones among `chain` kstats."""
    folder = at.folder / f"agent{len(list(at.folder.glob('agent*')))}"
    folder.mkdir()
    kernel = Kernel(build_libkstat(folder), folder)
    kernel.synthesise(zones, chain)
    script = folder / "zfs"
    (folder / "zfs.out").write_text(zfs_list(zones))
    script.write_text(f"#!/bin/sh\nexec cat {folder}/zfs.out\n")
    script.chmod(0o755)
    config = agent_config(folder, kernel, {}, commands={"zfs": str(script)}, **settings)
    with at.server(Program.agent("--config", config)) as program:
        _ = program.address
        yield program, kernel
    kernel.close()


def pages(at: Bench, zones: int, gzip: bool = False) -> Any:
    """A request file that scrapes each zone once."""
    return at.requests(*[at.get(f"/v1/{zone(n)}/metrics", gzip=gzip) for n in range(1, zones + 1)])


def cached(at: Bench) -> None:
    """Cached pages over keep-alive connections, against the same bytes from other servers."""
    port = free_port()
    site = f"server {{ listen 127.0.0.1:{port}; root {at.folder}; }}"
    rows: list[list[Any]] = []
    with agent(at, 500, CHAIN) as (program, _):
        body = http_get(program.address, f"/v1/{zone(1)}/metrics").body
        (at.folder / "page").write_bytes(body)
        (at.folder / "page").chmod(0o644)
        with at.nginx(site, port) as nginx, \
                at.server(python(references.PLAIN, str(at.folder / "page"))) as plain:
            contenders = [
                Contender(f"nginx, the same {len(body):,} bytes as a file", ("127.0.0.1", port),
                          nginx, at.requests(at.get("/page"))),
                Contender("agent, one zone", program.address, program.pid, pages(at, 1)),
                Contender("agent, one zone, gzip", program.address, program.pid,
                          pages(at, 1, True)),
                Contender("agent, 500 zones in turn", program.address, program.pid,
                          pages(at, 500)),
                Contender("ThreadingHTTPServer", plain.address, plain.pid,
                          at.requests(at.get("/page")))]
            for connections in (16, 64):
                rows += [[connections, *row] for row in compare(at, contenders, connections)]
    table("Cached pages, 500 zones, 50,000 kstats", ("connections", "server", *RESULTS), rows)


def uncached(at: Bench) -> None:
    """Every zone once, none of them cached."""
    rows = []
    for zones, chain in ((1, CHAIN), (500, CHAIN)):
        with agent(at, zones, chain) as (program, kernel):
            http_get(program.address, f"/v1/{zone(1)}/metrics")     # build the index, run zfs
            time.sleep(9)
            requests = pages(at, zones)
            for round_ in range(3):
                reads, before = kernel["reads"], cpu_seconds(program.pid)
                load = at.load(program.address, min(4, zones), requests, f"count={zones}",
                               seconds=20)
                cpu = cpu_seconds(program.pid) - before
                rows.append([f"{zones} zones, round {round_ + 1}", load.requests,
                             cpu / load.requests * 1e6, (kernel["reads"] - reads) / load.requests,
                             load.p50, load.p99, load.errors + load.refused])
                time.sleep(9)       # longer than a page's lifetime
            assert kernel["overlaps"] == kernel["stale"] == kernel["lookups"] == 0
    table("Uncached zone pages", (
        "case", "pages", "CPU µs/page", "kstat_reads/page", "p50 ms", "p99 ms", "failed"), rows)


PACE = 10.0                 # requests a second
PACED_ZONES = 100
PAGES_A_YEAR = PACED_ZONES * 365 * 86400 / 15


class Paced:
    """Sends evenly paced requests, over one keep-alive connection per client address."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._clients: dict[str, socket.socket] = {}

    def ask(self, path: str, client: str, gzip: bool) -> None:
        """Send a request and read the whole response."""
        if client not in self._clients:
            self._clients[client] = socket.create_connection(
                self._program.address, 10, source_address=(client, 0))
        connection = self._clients[client]
        connection.sendall((f"GET {path} HTTP/1.1\r\nHost: bench\r\n"
                            + ("Accept-Encoding: gzip\r\n" if gzip else "") +
                            "X-Prometheus-Scrape-Timeout-Seconds: 10\r\n\r\n").encode())
        head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        left = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0]) - len(body)
        while left:
            left -= len(connection.recv(left))

    def cost(self, paths: Sequence[str], client: str = "127.0.0.1", gzip: bool = False) -> float:
        """The agent's CPU seconds per request, at PACE; a slow response delays later requests."""
        before, began = cpu_seconds(self._program.pid), time.monotonic()
        for number, path in enumerate(paths):
            time.sleep(max(began + number / PACE - time.monotonic(), 0.0))
            self.ask(path, client, gzip)
        return (cpu_seconds(self._program.pid) - before) / len(paths)

    def close(self) -> None:
        """Close the connections."""
        for connection in self._clients.values():
            connection.close()


def cost_at_pace(program: Program, paths: Sequence[str], seconds: float) -> tuple[float, float]:
    """The agent's CPU seconds per request, and the median latency in seconds. Requests start at
    even intervals over `seconds`, whether or not earlier ones are still waiting."""
    idle: list[socket.socket] = []
    waits: list[float] = []
    begun: dict[socket.socket, float] = {}
    before, began = cpu_seconds(program.pid), time.monotonic()
    for number in range(len(paths) + 1):
        until = began + number * seconds / len(paths)
        while (left := until - time.monotonic()) > 0 or begun and number == len(paths):
            for connection in select.select(list(begun), [], [], max(left, 0.0))[0]:
                answer = connection.recv(1 << 20)
                assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\n"), answer
                waits.append(time.monotonic() - begun.pop(connection))
                idle.append(connection)
        if number < len(paths):
            connection = idle.pop() if idle else socket.create_connection(program.address, 10)
            connection.sendall(f"GET {paths[number]} HTTP/1.1\r\nHost: bench\r\n"
                               "X-Prometheus-Scrape-Timeout-Seconds: 10\r\n\r\n".encode())
            begun[connection] = time.monotonic()
    for connection in idle:
        connection.close()
    return (cpu_seconds(program.pid) - before) / len(paths), statistics.median(waits)


def paced(at: Bench) -> None:
    """Evenly paced, as Prometheus scrapes, so that each request finds cold CPU caches."""
    with agent(at, PACED_ZONES, CHAIN, cpu_budget=None) as (program, _):
        client = Paced(program)
        zones = [f"/v1/{zone(n)}/metrics" for n in range(1, PACED_ZONES + 1)]
        client.cost(zones)                                      # build the index, run zfs
        costs: dict[str, list[float]] = {}
        for round_ in range(2, ROUNDS + 2):
            costs.setdefault("/-/healthy", []).append(client.cost(["/-/healthy"] * 50))
            for form in ("", ", gzip"):                         # pages live 8 s, a round takes 10
                costs.setdefault("a zone, uncached" + form, []).append(
                    client.cost(zones, gzip=bool(form)))
                # from a new address, so that these requests do not shorten the pages' lifetime
                costs.setdefault("a zone, cached" + form, []).append(client.cost(
                    zones[-60:], f"127.0.{len(form)}.{round_}", bool(form)))
        client.close()
    rows = []
    for name, rounds in costs.items():
        cost = statistics.median(rounds)
        rows.append([name, cost * 1e6, statistics.median(
            seconds / base for seconds, base in zip(rounds, costs["/-/healthy"])),
            cost * 100 / 15 * 100, cost * 1000 / 15 * 100, cost * PAGES_A_YEAR / 3600])
    table("100 zones, 10 evenly paced requests per second", (
        "request", "CPU µs", "× /-/healthy", "% of a core, 100 zones every 15 s", "1,000 zones",
        "CPU hours per year, 100 zones"), rows)


def full(at: Bench) -> None:
    """Nodes with 100 and 1,000 zones: each zone every 15 s, evenly paced."""
    rows = []
    for zones in (100, 1000):
        with agent(at, zones, CHAIN, cpu_budget=None) as (program, _):
            paths = [f"/v1/{zone(n)}/metrics" for n in range(1, zones + 1)]
            cost_at_pace(program, paths, 15.0)
            for name, requests in (("/-/healthy", ["/-/healthy"] * zones),
                                   ("a zone, uncached", paths)):
                rounds = [cost_at_pace(program, requests, 15.0) for _ in range(ROUNDS)]
                cost, latency = map(statistics.median, zip(*rounds))
                rows.append([zones, name, cost * 1e6, latency * 1e3, cost * zones / 15 * 100])
    table("Each zone every 15 s, evenly paced", (
        "zones", "request", "CPU µs", "median latency ms", "% of a core"), rows)


def rebuild(at: Bench) -> None:
    """One kstat changes; the next scrape must rebuild the index."""
    with agent(at, 500, CHAIN) as (program, kernel):
        for n in range(1, 10):
            http_get(program.address, f"/v1/{zone(n)}/metrics")
        with_change = []
        for n in range(10, 20):
            time.sleep(4)           # the agent limits how often it rebuilds
            kernel.bump()
            rebuilt = kernel["rebuilds"]
            before = cpu_seconds(program.pid)
            http_get(program.address, f"/v1/{zone(n)}/metrics")
            if kernel["rebuilds"] > rebuilt:
                with_change.append(cpu_seconds(program.pid) - before)
        metrics = samples("\n".join(line for line in http_get(program.address, "/metrics").text
                                    .splitlines() if "NaN" not in line))
        rebuilds = {name: value for name, value in metrics.items() if "rebuild" in name}
    rows: list[list[Any]] = [
        ["CPU of a scrape that rebuilds (with the stand-in's merge), median",
         statistics.median(with_change) * 1000, "ms"],
        ["maximum", max(with_change) * 1000, "ms"],
        ["number of these scrapes", len(with_change), ""]]
    rows += [[name, value, ""] for name, value in rebuilds.items()]
    table("Index rebuilds, 50,000 kstats", ("what", "value", "unit"), rows)


def memory(at: Bench) -> None:
    """Resident memory with 1,000 zones, on 20,020 and on 50,000 kstats, after scraping all."""
    rows = []
    for zones, chain in ((1, 1_000), (1000, 20_020), (1000, CHAIN)):
        with agent(at, zones, chain) as (program, kernel):
            requests = pages(at, zones)
            for _ in range(3):
                at.load(program.address, 4, requests, f"count={zones}", seconds=60)
                time.sleep(8.5)
            at.load(program.address, 4, requests, f"count={zones}", seconds=60)
            size, kstats = settled(program.pid), kernel["bytes"]
            rows.append([zones, chain, size / 1e6, kstats / 1e6, (size - kstats) / 1e6,
                         threads(program.pid)])
    table("Resident memory after scraping all zones four times",
          ("zones", "kstats", "MB", "stand-in MB", "agent MB", "threads"), rows)


def idle(at: Bench) -> None:
    """10,000 idle connections, after one page each."""
    with agent(at, 500, CHAIN) as (program, _):
        requests = pages(at, 1)
        at.load(program.address, 16, requests, seconds=1)
        before = settled(program.pid)
        with at.idle(program.address, IDLE, requests) as load:
            rows = [[load.open, (settled(program.pid) - before) / load.open / 1000,
                     threads(program.pid), resident(program.pid) / 1e6]]
    table("Idle connections, after one page each", ("connections", "resident kB each", "threads",
                                                    "resident MB in total"), rows)


def main() -> int:
    """Run all benchmarks, or those named on the command line."""
    benchmarks = {"cached": cached, "uncached": uncached, "paced": paced, "full": full,
                  "rebuild": rebuild, "memory": memory, "idle": idle}
    with bench() as at:
        for name in sys.argv[1:] or benchmarks:
            benchmarks[name](at)
    return 0


if __name__ == "__main__":
    sys.exit(main())
