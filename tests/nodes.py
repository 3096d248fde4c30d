# SPDX-License-Identifier: MPL-2.0
"""Compute nodes to order for the agent: whole ones around a process, and one on a test's clock."""
from __future__ import annotations

import io
import json
import re
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable

from support import (
    NODE, PATIENCE, Address, Answer, Kernel, Program, agent_config, http_get, node, read_answer,
    respond, wait_until)

import cmon_agent as agent

WEB01 = "7e39c4fe-1b00-4511-9800-4523b6cac865"      # one NIC, capped; zone 5
LB01 = "181b6f5a-ecc7-4176-8952-19ae87ffa08e"       # two NICs; zone 7
CMON0 = "31218d2f-f98d-402f-b59b-715fad0b5cfd"      # a zone of the platform, metricPorts 8881
STOPPED = "c0b01b6a-4675-4e71-a6ed-557832a15ea0"
SPARK01 = "34ae4463-1872-4c46-aefe-3ef861ae6a23"    # bhyve; zone 12


def collectors(page: str, meta: str = "cmon_collector_up") -> dict[str, float]:
    """A value for each collector of a page: cmon_collector_up or cmon_sample_age_seconds."""
    return {name: float(value) for name, value in
            re.findall(rf'^{meta}{{collector="([^"]+)"}} (\S+)$', page, re.M)}


def down(page: str) -> set[str]:
    """The collectors that a page says are not up."""
    return {name for name, up in collectors(page).items() if not up}


def value(page: str, series: str) -> float:
    """The value of one series, as written on the page."""
    found = re.findall(rf"^{re.escape(series)} (\S+)$", page, re.M)
    assert len(found) == 1, (series, found, page[:3000])
    return float(found[0])


VARIES = re.compile(r"time_of_day|time_metrics|cmon_sample_age_seconds|\w+_metrics_timer_seconds"
                    r"|\w+_metrics_cached_boolean|boot_time_seconds|node_boot_time_seconds"
                    r"|collector_time_|cached_items|cache_get")


def steady(page: str) -> list[str]:
    """The lines of a page that do not depend on the time."""
    return [line for line in page.splitlines() if not VARIES.search(line)]


class Machine:
    """A compute node: kernel, commands, configuration; `start` starts the agent on it."""

    def __init__(self, folder: Path, kernel: Kernel, frame: Mapping[str, Any] | None = None,
                 **settings: Any) -> None:
        self.kernel = kernel
        self.frame = frame if frame is not None else node()["frames"][0]
        folder.mkdir(parents=True, exist_ok=True)
        self.config = agent_config(folder, kernel, self.frame["commands"], **settings)
        self.commands = folder / "commands"
        self.program: Program | None = None

    def start(self, *arguments: str) -> Machine:
        """Start the agent."""
        self.program = Program.agent("--config", self.config, *arguments)
        return self

    @property
    def agent(self) -> Program:
        """The running agent."""
        assert self.program is not None
        return self.program

    def settings(self, **changed: Any) -> None:
        """Rewrite some settings; the agent learns of them by SIGHUP."""
        content = json.loads(self.config.read_text())
        content.update(changed)
        self.config.write_text(json.dumps(content))

    def get(self, path: str, timeout: float | None = None, **headers: str) -> Answer:
        """One scrape; `timeout` is Prometheus' scrape timeout."""
        more = {name.replace("_", "-"): text for name, text in headers.items()}
        if timeout is not None:
            more["X-Prometheus-Scrape-Timeout-Seconds"] = repr(timeout)
        return http_get(self.agent.address, path, more)

    def zone(self, zone: str = WEB01, **more: Any) -> str:
        """A zone's page; it must be one."""
        answer = self.get(f"/v1/{zone}/metrics", **more)
        assert answer.status == 200, answer
        return answer.text

    def node(self, **more: Any) -> str:
        """The compute node's page; it must be one."""
        answer = self.get("/v1/gz/metrics", **more)
        assert answer.status == 200, answer
        return answer.text

    def own(self, series: str) -> float:
        """One of the agent's own metrics."""
        return value(self.get("/metrics").text, series)

    def refresh(self) -> None:
        """POST /v1/refresh."""
        answer = http_get(self.agent.address, "/v1/refresh", method="POST")
        assert (answer.status, answer.body) == (200, b"")

    def hide(self, name: str) -> None:
        """Remove a command."""
        content = json.loads(self.config.read_text())
        content["commands"][name] = "/nonexistent/" + name
        self.config.write_text(json.dumps(content))

    def script(self, name: str, text: str) -> None:
        """Replace a command by a script, from its next run on."""
        path = self.commands / name
        fresh = path.with_suffix(".new")
        fresh.write_text(text)
        fresh.chmod(0o755)
        fresh.replace(path)


def zfs_without(column: str, *zones: str) -> str:
    """A zfs of an older platform, which lacks a property and has a dataset for each zone."""
    return f"""#!/bin/sh
case "$*" in *{column}*)
    echo "bad property list: invalid property '{column}'" >&2; exit 2;; esac
for zone in {" ".join(zones)}; do
    printf 'zones/%s' $zone; printf '\\t%s' 1 2 3 4 5 6 7 8 9 10; echo
done
"""


# What module unix and its like hold beside what tables want: kmem caches, task queues, callouts,
# flows of NICs, vopstats, RPC (names as in the sources of illumos).
NEIGHBOURS = [
    *(("unix", 0, f"kmem_alloc_{size}", "kmem_cache") for size in range(8, 4096, 8)),
    *(("unix", number, "taskq_x", "taskq") for number in range(400)),
    *(("unix", number, "callout", "callout") for number in range(64)),
    *(("unix", number, f"z{number}_net0", "flow") for number in range(300)),
    *(("unix", 0, f"vopstats_{number:08x}", "misc") for number in range(200)),
    *(("unix", 0, f"rfsproccnt_v{number}", "misc") for number in range(2, 5)),
    ("unix", 0, "system_miscellany", "misc"), ("unix", 0, "system_page", "misc"),
    ("unix", 0, "var", "misc"), ("unix", 0, "segmap", "vm"), ("unix", 0, "rpc_cots_client", "rpc"),
    *(("cpu", number, name, "misc") for number in range(64) for name in ("vm", "intrstat", "fm")),
    *(("cpu_stat", number, f"cpu_stat{number}", "misc") for number in range(64)),
    *(("zfs", number, name, "misc") for number in range(9) for name in (
        "dmu_tx_stats", "vdev_cache_stats", "zfetchstats")),
    *(("caps", number, f"cpucaps_project_{number}", "project_caps") for number in range(50)),
    *(("tcp", number, "tcpstat", "net") for number in range(50)), ("tcp", 0, "tcpstat_g", "net"),
    *(("vmm", number, "vm_stats", "misc") for number in range(20)),
]


def placed(module: str, instance: int, name: str, klass: str = "") -> agent.Ref:
    """Where a kstat is, with the tables that want it, as the index of a chain has it."""
    ref = agent.Ref(module, instance, name, klass, 1, 0, 0)
    agent.Index().place(ref)
    return ref


def missing_stand_ins() -> list[str]:
    """Kstats that collectors read and the recorded node lacks."""
    host = agent.RecordedHost(str(NODE), agent.Settings())
    missing = []
    for collector in (*agent.ZONE_COLLECTORS, *agent.NODE_COLLECTORS):
        if collector.collect is not None and not collector.foreign:
            try:
                collector.collect(agent.Task(host, host.run, agent.NODE, 1.0, "zones",
                                             lambda work: agent.Reading([], []), time.monotonic))
            except (agent.CommandError, agent.CollectError) as error:
                missing.append(f"{collector.name}: {error}")
    return missing


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


class Desk:
    """The agent without sockets or a loop: requests in, answers out, on a clock of the test's.

    Threads of kstats and pools are real, so an answer is waited for, but time is not.
    """

    def __init__(self, config: Path, **changed: Any) -> None:
        self.clock = Clock()
        content = {**json.loads(config.read_text()), **changed}
        config.write_text(json.dumps(content))
        arguments = agent.agent_command_line().parse_args(["--config", str(config)])
        self.settings = agent.load_agent(arguments)
        self.registry = agent.Registry()
        self.server = agent.Server("agent", self.registry, now=self.clock)
        self.host = agent.Host(self.settings)
        self.scraper = agent.Scraper(self.settings, self.host, self.server, self.registry,
                                     agent.Sysinfo(pool="zones"))
        self.scraper.kstats.now = self.clock
        self.host.vms.absent = True             # nobody listens where vminfod should
        self.routes = agent.Agent(self.scraper, self.registry).routes

    def pump(self) -> None:
        """Run what is due in the loop, after letting other threads finish their calls."""
        time.sleep(0.0002)
        self.server.loop.run_due()

    def pass_by(self, seconds: float, step: float = 0.1) -> None:
        """Let time pass, with the server's timers."""
        end = self.clock.at + seconds
        while self.clock.at < end - 1e-9:
            self.clock.at = min(self.clock.at + step, end)
            self.pump()

    def ask(self, path: str, address: str = "10.0.0.9", timeout: float | None = None,
            method: str = "GET", **headers: str) -> Any:
        """A request; its answer, or the Deferred that will have it."""
        fields = {name.lower().replace("_", "-"): text for name, text in headers.items()}
        if timeout is not None:
            fields["x-prometheus-scrape-timeout-seconds"] = repr(timeout)
        request = agent.Request(method, path, path, {}, fields, b"", "node", False, True,
                                agent.Peer(address, "main"))
        return respond(self.routes, request)

    def answer(self, asked: Any) -> Answer:
        """The answer to a request, once it is there or its deadline has passed."""
        if isinstance(asked, agent.Deferred):
            end = time.monotonic() + PATIENCE
            while asked.answer is None and time.monotonic() < end:
                self.pump()
            assert asked.answer is not None, "no answer"
            asked = asked.answer
        return read_answer(io.BytesIO(agent.wire(asked)))

    def page(self, path: str, **more: Any) -> str:
        """A page that must come."""
        answer = self.answer(self.ask(path, **more))
        assert answer.status == 200, answer
        return answer.text

    def close(self) -> None:
        """Close the handle of libkstat."""
        self.scraper.kstats.close()


def threads_of(program: Program) -> int:
    """How many threads a process has."""
    return len(list(Path(f"/proc/{program.pid}/task").iterdir()))


def children_of(program: Program) -> list[int]:
    """Its direct children, zombies included."""
    found = []
    for task in Path(f"/proc/{program.pid}/task").iterdir():
        try:
            found += [int(pid) for pid in (task / "children").read_text().split()]
        except FileNotFoundError:
            continue
    return found


class Vminfod:
    """Stands in for vminfod and sends what the test wants."""

    def __init__(self, port: int = 0, first: Callable[[socket.socket], None] | None = None) -> None:
        self.socket = socket.create_server(("127.0.0.1", port), backlog=16)
        self.address: Address = self.socket.getsockname()[:2]
        self.url = "http://%s:%d" % self.address
        self.streams: list[socket.socket] = []
        self.asked: list[str] = []
        self.behave: Callable[[socket.socket], None] = first or (lambda stream: None)
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                stream, _ = self.socket.accept()
            except OSError:
                return
            self.streams.append(stream)
            threading.Thread(target=self._serve, args=(stream,), daemon=True).start()

    def _serve(self, stream: socket.socket) -> None:
        try:
            self.asked.append(stream.recv(65536).decode().split("\r\n")[0])
            self.behave(stream)
        except OSError:
            pass

    @staticmethod
    def head(stream: socket.socket, status: str = "200 OK") -> None:
        """The head of an endless answer."""
        stream.sendall(f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
                       "Transfer-Encoding: chunked\r\n\r\n".encode())

    @staticmethod
    def line(stream: socket.socket, event: Any) -> None:
        """One event, in a chunk; text goes out as it is."""
        raw = (event if isinstance(event, str) else json.dumps(event)).encode() + b"\n"
        stream.sendall(b"%x\r\n%s\r\n" % (len(raw), raw))

    def ready(self, vms: Any) -> Callable[[socket.socket], None]:
        """Begins as vminfod does: all VMs, as JSON in a string."""
        def behave(stream: socket.socket) -> None:
            self.head(stream)
            self.line(stream, {"type": "ready", "date": "2026-01-01T00:00:00.000Z", "uuid": "x",
                               "vms": json.dumps(vms)})
        return behave

    def tell(self, event: Any) -> None:
        """One more event on the newest stream."""
        wait_until(lambda: self.streams, "a stream of events")
        self.line(self.streams[-1], event)

    def close(self) -> None:
        """Stop listening and close all connections."""
        self._closed = True
        # accept() in another thread keeps the socket alive: wake it up
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.socket.close()
        for stream in self.streams:
            try:
                stream.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            stream.close()
