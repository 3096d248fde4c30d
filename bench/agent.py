#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""The agent over a chain of 50,000 kstats, beside nginx and ThreadingHTTPServer, a core each.

The kstats come from tests/libkstat, which makes them up as they are read; its own memory and time
are told apart where it matters. `python3 bench/agent.py [paced …]` for some tables only.
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
COLUMNS = "name available used logicalused recordsize quota compressratio refcompressratio " \
    "referenced logicalreferenced usedbydataset usedbysnapshots".split()


def zone(number: int) -> str:
    """The name that the made-up zones have."""
    return f"{number:08x}-0000-4000-8000-{number:012x}"


def zfs_list(zones: int) -> str:
    """What `zfs list` says of so many zones."""
    return "".join(f"zones/{zone(n)}\t26417463296\t426524672\t871366144\t131072\t26843545600\t2.11x"
                   "\t2.02x\t1409286144\t2618294272\t419430400\t7094272\n"
                   for n in range(1, zones + 1))


@contextlib.contextmanager
def agent(at: Bench, zones: int, chain: int, **settings: Any) -> Iterator[tuple[Program, Kernel]]:
    """The agent on the server's core, with so many zones."""
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
    """One scrape of each zone."""
    return at.requests(*[at.get(f"/v1/{zone(n)}/metrics", gzip=gzip) for n in range(1, zones + 1)])


def cached(at: Bench) -> None:
    """A page in the cache over kept connections, beside the same bytes from others."""
    port = free_port()
    site = f"server {{ listen 127.0.0.1:{port}; root {at.folder}; }}"
    rows: list[list[Any]] = []
    with agent(at, 500, CHAIN) as (program, _):
        body = http_get(program.address, f"/v1/{zone(1)}/metrics").body
        (at.folder / "page").write_bytes(body)
        (at.folder / "page").chmod(0o644)
        with at.nginx(site, port) as nginx, \
                at.server(python(references.PLAIN, str(at.folder / "page"))) as plain:
            asked = [(f"nginx, the same {len(body):,} bytes as a file", ("127.0.0.1", port), nginx,
                      at.requests(at.get("/page"))),
                     ("agent, one zone", program.address, program.pid, pages(at, 1)),
                     ("agent, one zone, gzip", program.address, program.pid, pages(at, 1, True)),
                     ("agent, 500 zones in turn", program.address, program.pid, pages(at, 500)),
                     ("ThreadingHTTPServer", plain.address, plain.pid,
                      at.requests(at.get("/page")))]
            for connections in (16, 64):
                rows += [[connections, *row] for row in compare(
                    at, [Contender(*one) for one in asked], connections)]
    table("Pages from the cache, chain of 50,000 kstats, 500 zones", ("kept", "server", *RESULTS),
          rows)


def uncached(at: Bench) -> None:
    """Every zone once, none of them in the cache."""
    rows = []
    for zones, chain in ((1, CHAIN), (500, CHAIN)):
        with agent(at, zones, chain) as (program, kernel):
            http_get(program.address, f"/v1/{zone(1)}/metrics")     # the index, the zfs list
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
                time.sleep(9)       # longer than a page lives
            assert kernel["overlaps"] == kernel["stale"] == kernel["lookups"] == 0
    table("Zone pages that are not in the cache", ("case", "pages", "CPU µs each", "kstat_reads",
                                                   "p50 ms", "p99 ms", "failed"), rows)


PACE = 10.0                 # requests a second
PACED_ZONES = 100
PAGES_A_YEAR = PACED_ZONES * 365 * 86400 / 15


class Paced:
    """Requests at an even pace, each on the kept connection of its client."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._clients: dict[str, socket.socket] = {}

    def ask(self, path: str, client: str, gzip: bool) -> None:
        """One request; the answer is read to its end."""
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
        """CPU seconds of the agent for each of these, asked for one after the other."""
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
    """CPU seconds of the agent for each of these, begun evenly within so many seconds whether or
    not others wait; and the median of the seconds until an answer came."""
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
    """As Prometheus asks: evenly, so that each request finds the processor's caches cold."""
    with agent(at, PACED_ZONES, CHAIN, cpu_budget=None) as (program, _):
        client = Paced(program)
        zones = [f"/v1/{zone(n)}/metrics" for n in range(1, PACED_ZONES + 1)]
        client.cost(zones)                                      # the index, the zfs list
        costs: dict[str, list[float]] = {}
        for round_ in range(2, ROUNDS + 2):
            costs.setdefault("/-/healthy", []).append(client.cost(["/-/healthy"] * 50))
            for form in ("", ", gzip"):                         # a page lives 8 s, a turn takes 10
                costs.setdefault("a zone, not in the cache" + form, []).append(
                    client.cost(zones, gzip=bool(form)))
                # from addresses that ask once, so that they do not shorten its life
                costs.setdefault("a zone, in the cache" + form, []).append(client.cost(
                    zones[-60:], f"127.0.{len(form)}.{round_}", bool(form)))
        client.close()
    rows = []
    for name, spent in costs.items():
        cost = statistics.median(spent)
        rows.append([name, cost * 1e6, statistics.median(
            one / base for one, base in zip(spent, costs["/-/healthy"])),
            cost * 100 / 15 * 100, cost * 1000 / 15 * 100, cost * PAGES_A_YEAR / 3600])
    table("Ten requests a second, evenly, 100 zones", (
        "request", "CPU µs", "of /-/healthy", "% of a core: 100 zones each 15 s", "1,000 zones",
        "CPU hours a year for 100"), rows)


def full(at: Bench) -> None:
    """Nodes of 100 and of 1,000 zones, each scraped once in 15 s, evenly."""
    rows = []
    for zones in (100, 1000):
        with agent(at, zones, CHAIN, cpu_budget=None) as (program, _):
            paths = [f"/v1/{zone(n)}/metrics" for n in range(1, zones + 1)]
            cost_at_pace(program, paths, 15.0)
            for name, asked in (("/-/healthy", ["/-/healthy"] * zones),
                                ("a zone, not in the cache", paths)):
                found = [cost_at_pace(program, asked, 15.0) for _ in range(ROUNDS)]
                cost, wait = (statistics.median(each) for each in zip(*found))
                rows.append([zones, name, cost * 1e6, wait * 1e3, cost * zones / 15 * 100])
    table("Each zone once in 15 s, evenly", (
        "zones", "request", "CPU µs", "ms until the answer", "% of a core"), rows)


def rebuild(at: Bench) -> None:
    """The chain changes by one kstat; the next scrape has to find out."""
    with agent(at, 500, CHAIN) as (program, kernel):
        for n in range(1, 10):
            http_get(program.address, f"/v1/{zone(n)}/metrics")
        with_change = []
        for n in range(10, 20):
            time.sleep(4)           # the agent does not rebuild all the time
            kernel.bump()
            rebuilt = kernel["rebuilds"]
            before = cpu_seconds(program.pid)
            http_get(program.address, f"/v1/{zone(n)}/metrics")
            if kernel["rebuilds"] > rebuilt:
                with_change.append(cpu_seconds(program.pid) - before)
        own = samples("\n".join(line for line in http_get(program.address, "/metrics").text
                                .splitlines() if "NaN" not in line))
        shown = {name: value for name, value in own.items() if "rebuild" in name}
    rows: list[list[Any]] = [
        ["a scrape that finds a new chain, CPU (with the stand-in's merge)",
         statistics.median(with_change) * 1000, "ms"],
        ["the worst of them", max(with_change) * 1000, "ms"], ["of how many", len(with_change), ""]]
    rows += [[name, value, ""] for name, value in shown.items()]
    table("The index after a change, 50,000 kstats", ("what", "value", "unit"), rows)


def memory(at: Bench) -> None:
    """1,000 zones, all scraped, over 20,000 kstats and over 50,000."""
    rows = []
    for zones, chain in ((1, 1_000), (1000, 20_020), (1000, CHAIN)):
        with agent(at, zones, chain) as (program, kernel):
            requests = pages(at, zones)
            for _ in range(3):
                at.load(program.address, 4, requests, f"count={zones}", seconds=60)
                time.sleep(8.5)
            at.load(program.address, 4, requests, f"count={zones}", seconds=60)
            size, own = settled(program.pid), kernel["bytes"]
            rows.append([zones, chain, size / 1e6, own / 1e6, (size - own) / 1e6,
                         threads(program.pid)])
    table("Resident memory after all zones were scraped, four times",
          ("zones", "kstats", "MB", "of it the stand-in's", "the agent's", "threads"), rows)


def idle(at: Bench) -> None:
    """10,000 connections that have had a page."""
    with agent(at, 500, CHAIN) as (program, _):
        requests = pages(at, 1)
        at.load(program.address, 16, requests, seconds=1)
        before = settled(program.pid)
        with at.idle(program.address, IDLE, requests) as load:
            rows = [[load.open, (settled(program.pid) - before) / load.open / 1000,
                     threads(program.pid), resident(program.pid) / 1e6]]
    table("Idle connections, each after one page", ("connections", "kB resident each", "threads",
                                                    "MB in all"), rows)


def main() -> int:
    """All tables, or those that are named."""
    known = {"cached": cached, "uncached": uncached, "paced": paced, "full": full,
             "rebuild": rebuild,
             "memory": memory, "idle": idle}
    with bench() as at:
        for name in sys.argv[1:] or known:
            known[name](at)
    return 0


if __name__ == "__main__":
    sys.exit(main())
