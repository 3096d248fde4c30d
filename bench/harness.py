# SPDX-License-Identifier: MPL-2.0
"""Shared by the benchmarks: load generator, reference servers, CPU pinning, tables."""
from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import Program, free_port, wait_until  # noqa: E402  (it needs the path)

Address = tuple[str, int]
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = CORES[0], CORES[-1]
SECONDS = float(os.environ.get("BENCH_SECONDS", "4"))   # of each run
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))       # of each comparison; medians are shown
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")


class Load(NamedTuple):
    """Result of one run of the load generator; latencies in milliseconds."""
    requests: int
    seconds: float
    rate: float
    errors: int
    refused: int
    bytes: int
    p50: float
    p99: float
    max: float
    cpu: float
    open: int


class Bench:
    """Builds the load generator in a folder, and runs it against servers on their own core."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._load = folder / "load"
        library = [f"-l:lib{name}.so.3" for name in ("ssl", "crypto")]
        subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-o", self._load,
                        ROOT / "bench" / "load.c", *library], check=True)

    def requests(self, *requests: str) -> Path:
        """Write requests to a file for the load generator; LF becomes CR LF."""
        path = self.folder / f"requests{len(list(self.folder.glob('requests*')))}"
        path.write_bytes(b"\0".join(request.replace("\n", "\r\n").encode() for request in requests))
        return path

    def get(self, path: str, host: str = "bench", gzip: bool = False) -> str:
        """A scrape as Prometheus sends it."""
        return (f"GET {path} HTTP/1.1\nHost: {host}\nUser-Agent: Prometheus/2.42.0\n"
                "Accept: application/openmetrics-text;version=1.0.0,*/*;q=0.1\n"
                + ("Accept-Encoding: gzip\n" if gzip else "")
                + "X-Prometheus-Scrape-Timeout-Seconds: 10\n\n")

    def command(self, address: Address, connections: int, requests: Path, *more: str,
                seconds: float = SECONDS) -> list[str]:
        """The load generator's argv."""
        return [str(self._load), address[0], str(address[1]), str(connections), str(seconds),
                str(requests), *map(str, more)]

    def load(self, address: Address, connections: int, requests: Path, *more: str,
             seconds: float = SECONDS) -> Load:
        """Run the load generator, pinned to LOAD_CORE."""
        done = subprocess.run(self.command(address, connections, requests, *more, seconds=seconds),
                              check=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                              preexec_fn=on_core(LOAD_CORE))
        return Load(**json.loads(done.stdout))

    @contextlib.contextmanager
    def idle(self, address: Address, connections: int, requests: Path,
             *more: str) -> Iterator[Load]:
        """Hold connections open, after one response each, while the context lasts."""
        with subprocess.Popen(
                self.command(address, connections, requests, "idle", *more, seconds=120),
                stdout=subprocess.PIPE, stdin=subprocess.PIPE,
                preexec_fn=on_core(LOAD_CORE)) as process:
            assert process.stdout is not None
            yield Load(**json.loads(process.stdout.readline()))
            process.communicate()

    @contextlib.contextmanager
    def server(self, program: Program) -> Iterator[Program]:
        """Pin a program, and the children it will start, to SERVER_CORE; kill it at the end."""
        pin(program.pid, SERVER_CORE)
        try:
            yield program
        finally:
            program.kill()

    @contextlib.contextmanager
    def nginx(self, http: str, port: int, core: int = SERVER_CORE) -> Iterator[int]:
        """Run nginx with one worker, pinned to `core`; yields the worker's pid."""
        nginx = shutil.which("nginx") or "/usr/sbin/nginx"
        if not os.path.exists(nginx):
            raise SystemExit("nginx, the reference, is not installed (apt install nginx-light)")
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="nginx"))
        os.chmod(folder, 0o755)
        (folder / "nginx.conf").write_text(f"""
user root;
worker_processes 1;
worker_rlimit_nofile {resource.getrlimit(resource.RLIMIT_NOFILE)[1]};
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 19000; multi_accept on; }}
http {{
    access_log off;
    default_type text/plain;
    sendfile on; tcp_nopush on; tcp_nodelay on;
    open_file_cache max=100; open_file_cache_valid 60s;
    keepalive_requests 1000000000; keepalive_timeout 600s;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {http}
}}
""")
        process = subprocess.Popen([nginx, "-c", folder / "nginx.conf", "-g", "daemon off;"],
                                   preexec_fn=on_core(core))
        try:
            wait_until(lambda: can_connect(("127.0.0.1", port)), "nginx")
            yield wait_until(lambda: children(process.pid), "nginx's worker")[0]
        finally:
            process.terminate()
            process.wait(10)


def can_connect(address: Address) -> bool:
    """Whether a server accepts connections at this address."""
    import socket
    try:
        socket.create_connection(address, 1).close()
    except OSError:
        return False
    return True


def on_core(core: int) -> Any:
    """A `preexec_fn` that pins the child to a core."""
    return lambda: os.sched_setaffinity(0, {core})


def pin(pid: int, core: int) -> None:
    """Pin all threads of a process to a core."""
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task), {core})


def children(pid: int) -> list[int]:
    """The pids of a process' children."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(field) for field in text.split()]


def threads(pid: int) -> int:
    """The number of threads of a process."""
    return len(os.listdir(f"/proc/{pid}/task"))


def cpu_seconds(pid: int) -> float:
    """CPU seconds used so far, with ended threads. The number of the clock is made as by
    clock_getcpuclockid(3)."""
    return time.clock_gettime(~pid << 3 | 2)


def resident(pid: int) -> int:
    """Resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_SIZE


def settled(pid: int, seconds: float = 1.0) -> int:
    """Resident memory in bytes, after `seconds` of rest."""
    time.sleep(seconds)
    return resident(pid)


class Contender(NamedTuple):
    """A server in a comparison, and the requests it gets."""
    name: str
    address: Address
    pid: int
    requests: Path
    more: tuple[str, ...] = ()


RESULTS = ("requests/s", "× nginx", "p50 ms", "p99 ms", "CPU µs/request", "CPU × nginx",
           "failed")


def compare(at: Bench, contenders: Sequence[Contender], connections: int) -> list[list[Any]]:
    """A row per contender: its name, then RESULTS; the first contender is the reference.

    Each of ROUNDS rounds runs all contenders in turn; rates and latencies are medians. On a busy
    machine, the ratio of CPU times is more reliable than that of rates.
    """
    runs: list[list[Load]] = [[] for _ in contenders]
    spent = [0.0] * len(contenders)
    for _ in range(ROUNDS):
        for index, contender in enumerate(contenders):
            before = cpu_seconds(contender.pid)
            runs[index].append(at.load(contender.address, connections, contender.requests,
                                       *contender.more))
            spent[index] += cpu_seconds(contender.pid) - before
    rows: list[list[Any]] = []
    costs = [cpu / max(sum(load.requests for load in loads), 1) * 1e6
             for cpu, loads in zip(spent, runs)]
    for contender, loads, cost in zip(contenders, runs, costs):
        ratio = statistics.median(load.rate / reference.rate
                                  for load, reference in zip(loads, runs[0]))
        rows.append([contender.name, statistics.median(load.rate for load in loads), ratio,
                     statistics.median(load.p50 for load in loads),
                     statistics.median(load.p99 for load in loads), cost, cost / costs[0],
                     sum(load.errors + load.refused for load in loads)])
    return rows


def python(code: str, *arguments: str) -> Program:
    """Run Python code as a server."""
    return Program(sys.executable, "-c", code, *arguments)


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """A Bench in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="cmon-bench") as folder:
        os.chmod(folder, 0o755)
        yield Bench(Path(folder))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a Markdown table, to paste into README.md."""
    print(f"\n### {title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(f"{cell:,.0f}" if isinstance(cell, float) and cell >= 1000 else
                                f"{cell:.3g}" if isinstance(cell, float) else
                                f"{cell:,}" if isinstance(cell, int) else str(cell)
                                for cell in row) + " |", flush=True)


__all__ = ["LOAD_CORE", "RESULTS", "ROOT", "ROUNDS", "SECONDS", "Address", "Bench", "Contender",
           "Load", "Program", "bench", "children", "compare", "cpu_seconds", "free_port", "on_core",
           "pin", "python", "resident", "settled", "table", "threads", "wait_until"]
