# SPDX-License-Identifier: MPL-2.0
"""What the tests share: programs as processes, plain HTTP, a kernel to order (tests/libkstat)."""
from __future__ import annotations

import contextlib
import gzip
import json
import math
import mmap
import os
import re
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, TypeVar

import warm

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
NODE = EXAMPLES / "node.json"
PATIENCE = 30.0         # seconds that a test waits for what must come; it is mostly there at once
T = TypeVar("T")
Address = tuple[str, int]


# --- waiting and ports ----------------------------------------------------------------------------

def wait_until(predicate: Callable[[], T], what: str = "", timeout: float = PATIENCE) -> T:
    """The first true value of `predicate`; fails with its last value when it stays false."""
    end = time.monotonic() + timeout
    pause = 0.002
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what or predicate}: not within {timeout} s, last: {value!r}")
        time.sleep(pause)
        pause = min(pause * 1.3, 0.05)


def free_port(host: str = "127.0.0.1") -> int:
    """A free port, for programs that cannot listen on port 0."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


# --- handlers without sockets ---------------------------------------------------------------------

def respond(routes: Sequence[Any], request: Any) -> Any:
    """Route a request and call its handler: the answer, or a Deferred."""
    from cmon_agent import Refused, Router, call        # scripts import this module without them
    try:
        route, args = Router(routes).find(request)
        return call(route, request, (*args, *route.options(request)))
    except Refused as refusal:
        return refusal.answer()


# --- programs as processes ------------------------------------------------------------------------

class Program:
    """One of our programs, or any other, as a process that a test starts and ends.

    Used as a context manager it is stopped with SIGTERM at the end and must exit with 0 then.
    Subprocess coverage comes by COVERAGE_PROCESS_START in the environment (tests/run.sh).
    """

    def __init__(self, *command: str | Path, env: Mapping[str, str] | None = None,
                 cwd: str | Path | None = None, pass_fds: Sequence[int] = ()) -> None:
        self.command = [str(word) for word in command]
        self._lines: list[str] = []
        self._more = threading.Condition()
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            cwd=cwd, pass_fds=pass_fds, start_new_session=True,
            env=None if env is None else {**os.environ, **env})
        self._stdout = b""
        self._readers = [threading.Thread(target=self._read_stderr, daemon=True),
                         threading.Thread(target=self._read_stdout, daemon=True)]
        for reader in self._readers:
            reader.start()

    @classmethod
    def agent(cls, *arguments: str | Path, listen: str = "127.0.0.1:0",
              **more: Any) -> Program:
        """The agent, isolated and imported as its manifest does it, at a free port."""
        return cls(sys.executable, "-I", "-c", warm.AGENT, "--log-format", "text",
                   "--listen", listen, *arguments, **more)

    @classmethod
    def proxy(cls, config: str | Path, *arguments: str | Path,
              **more: Any) -> Program:
        """The proxy with its configuration file."""
        return cls(sys.executable, "-sE", ROOT / "cmon_proxy.py", "--log-format", "text",
                   "--config", config, *arguments, **more)

    @classmethod
    def forwarder(cls, config: str | Path, *arguments: str | Path, **more: Any) -> Program:
        """The forwarder with its configuration file."""
        return cls(sys.executable, "-sE", ROOT / "cmon_forwarder.py", "--log-format", "text",
                   "--config", config, *arguments, **more)

    @classmethod
    def cmon(cls, *arguments: str | Path, **more: Any) -> Program:
        """The users' command."""
        return cls(sys.executable, ROOT / "cmon.py", *arguments, **more)

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._more:
                self._lines.append(line.decode("utf-8", "replace").rstrip("\n"))
                self._more.notify_all()

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        for piece in iter(lambda: self.process.stdout.read1(65536), b""):  # type: ignore
            with self._more:
                self._stdout += piece
                self._more.notify_all()

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What it wrote to stderr so far."""
        with self._more:
            return "\n".join(self._lines)

    @property
    def output(self) -> str:
        """What it wrote to stdout so far."""
        with self._more:
            return self._stdout.decode("utf-8", "replace")

    def wait_for_log(self, pattern: str, times: int = 1,
                     timeout: float = PATIENCE) -> list[re.Match[str]]:
        """Waits until `pattern` has matched so many lines of stderr; gives the matches."""
        expression = re.compile(pattern)
        hits: list[re.Match[str]] = []
        seen, end = 0, time.monotonic() + timeout
        while True:
            ended = self.process.poll() is not None
            if ended:
                self._join()
            with self._more:
                hits += filter(None, map(expression.search, self._lines[seen:]))
                seen = len(self._lines)
                if len(hits) >= times or ended or time.monotonic() > end:
                    break
                self._more.wait(0.1)
        if len(hits) < times:
            raise AssertionError(f"no {pattern!r} in the log of {' '.join(self.command)[:300]} "
                                 f"(status {self.process.poll()}):\n{self.log}\n{self.output}")
        return hits

    def addresses(self, listeners: int = 1) -> list[Address]:
        """Where it listens, in the order of its log lines."""
        hits = self.wait_for_log(r"listening on \[?([^\s\]\"]+?)\]?:(\d+)", listeners)
        return [(hit.group(1), int(hit.group(2))) for hit in hits]

    @property
    def address(self) -> Address:
        """Where its first listener listens."""
        return self.addresses()[0]

    def _join(self) -> None:
        for reader in self._readers:
            reader.join(PATIENCE)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit status, once it has ended by itself."""
        try:
            if hasattr(os, "pidfd_open") and self.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    ends = os.pidfd_open(self.process.pid)  # Popen.wait() looks every 50 ms
                    waits = select.poll()                   # descriptors beyond 1,024, too
                    waits.register(ends, select.POLLIN)
                    waits.poll(timeout * 1000)
                    os.close(ends)
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.command} did not end:\n{self.log}") from None
        self._join()
        return self.process.returncode

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def stop(self, timeout: float = PATIENCE) -> int:
        """SIGTERM, as SMF does, and its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.wait(timeout)

    def kill(self) -> None:
        """Kill it and all that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(PATIENCE)
        self._join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            self.kill()
            print(f"--- log of {' '.join(self.command)}\n{self.log[-20000:]}")
            return
        status = self.stop()
        self.kill()
        assert status == 0, f"{self.command} ended with {status}:\n{self.log}"


# --- HTTP by hand ---------------------------------------------------------------------------------

class Answer(NamedTuple):
    """One HTTP answer as it came."""
    status: int
    headers: dict[str, str]         # names in lower case
    body: bytes                     # after gzip

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()


def read_answer(reader: Any, head: bool = False) -> Answer:
    """One answer from a file object made from a socket; ConnectionError when there is none."""
    line = reader.readline(65537)
    if not line:
        raise ConnectionError("closed without an answer")
    status = int(line.split(None, 2)[1])
    headers: dict[str, str] = {}
    while True:
        line = reader.readline(65537)
        if line in (b"\r\n", b"\n", b""):
            break
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    body = b""
    if not head and status not in (204, 304):
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while True:
                size = int(reader.readline().split(b";")[0], 16)
                body += reader.read(size)
                reader.readline()
                if size == 0:
                    break
        elif "content-length" in headers:
            body = reader.read(int(headers["content-length"]))
            if len(body) != int(headers["content-length"]):
                raise ConnectionError("cut off in the body")
        else:
            body = reader.read()
    if headers.get("content-encoding") == "gzip":
        body = gzip.decompress(body)
    return Answer(status, headers, body)


class Connection:
    """A kept connection, plain or TLS, on which requests are written as the test says."""

    def __init__(self, address: Address, tls: Any = None, server_name: str | None = None,
                 timeout: float = PATIENCE, source: Address | None = None) -> None:
        raw = socket.create_connection(address, timeout, source)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = tls.wrap_socket(raw, server_hostname=server_name) if tls else raw
        self.address = address
        self._reader = self.socket.makefile("rb")

    def send(self, raw: bytes) -> None:
        """Send bytes unchanged."""
        self.socket.sendall(raw)

    def answer(self, head: bool = False) -> Answer:
        """The next answer."""
        return read_answer(self._reader, head)

    def request(self, path: str, headers: Mapping[str, str] | None = None, method: str = "GET",
                body: bytes = b"") -> Answer:
        """A request and its answer."""
        lines = {"Host": f"{self.address[0]}:{self.address[1]}", **(headers or {})}
        if body:
            lines["Content-Length"] = str(len(body))
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        self.send(head.encode("latin-1") + b"\r\n" + body)
        return self.answer(method == "HEAD")

    def close(self) -> None:
        """Close it."""
        self._reader.close()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def http_get(address: Address, path: str, headers: Mapping[str, str] | None = None,
             method: str = "GET", tls: Any = None, server_name: str | None = None,
             timeout: float = PATIENCE) -> Answer:
    """One request on a connection of its own."""
    with Connection(address, tls, server_name, timeout) as connection:
        return connection.request(path, {"Connection": "close", **(headers or {})}, method)


def samples(page: str) -> dict[str, float]:
    """A page as `name{labels}` (as written) and value. Only for pages that are known to be good."""
    found: dict[str, float] = {}
    for line in page.splitlines():
        if line and not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            found[series] = float(value)
    return found


# --- a kernel to order ----------------------------------------------------------------------------

COUNTERS = ("generation", "opens", "closes", "reads", "updates", "rebuilds", "lookups", "overlaps",
            "stale", "blocked", "failed", "bytes", "peak_bytes", "headers", "chain_id", "processes")

# How wide the kernel's members are, by module or class; what is not named is 64 bits wide.
_U32 = {
    "zone_misc": {"avenrun_1min", "avenrun_5min", "avenrun_15min", "forkfail_cap",
                  "forkfail_noproc", "forkfail_nomem", "forkfail_misc", "mapfail_seglim",
                  "nested_interp", "init_pid"},
    "net": {"rbytes", "obytes", "ipackets", "opackets", "ierrors", "oerrors", "norcvbuf",
            "noxmtbuf", "collisions", "multircv", "multixmt", "brdcstrcv", "brdcstxmt", "unknowns",
            "link_state", "link_duplex"},
}
_I32 = {"rtoAlgorithm", "rtoMin", "rtoMax", "maxConn", "connTableSize", "connTableSize6"}
_WIDE_MIB2 = {"inSegs", "outSegs", "inDatagrams", "outDatagrams"}
_CHARS = {"state", "cpu_type", "fpu_type"}
NAMED, RAW, IO = 1, 0, 3


def member_type(kstat: Mapping[str, Any], member: str, value: Any) -> str:
    """The type that the kernel gives a member, as the kstats file of tests/libkstat names it."""
    kind = kstat["class"]
    if value is None:
        return "null"
    if isinstance(value, str):
        return "char" if kstat["module"] == "cpu_info" and member in _CHARS else "str"
    if isinstance(value, float):
        return "d"
    if member in _I32:
        return "i32"
    if member in _U32.get(kind, ()) or (kstat["name"] == "system_misc"):
        return "u32"
    if kind == "mib2" and member not in _WIDE_MIB2:
        return "u32"
    return "u64" if value >= 0 else "i64"


def kstats_file(kstats: Iterable[Mapping[str, Any]]) -> str:
    """The kstats of a capture's frame in the form that tests/libkstat reads."""
    lines: list[str] = []
    for kstat in kstats:
        head = ("K", kstat["module"], kstat["instance"], kstat["name"], kstat["class"],
                kstat.get("type", NAMED), ns(kstat.get("crtime", 0)), ns(kstat.get("snaptime", 0)))
        lines.append("\t".join(map(str, head)))
        members = kstat["data"]
        if kstat.get("type", NAMED) == RAW:
            raw = struct.pack(f"={len(members)}Q", *members.values())
            lines.append(f"R\t{len(raw)}\t{raw.hex()}")
            continue
        for member, value in members.items():
            kind = member_type(kstat, member, value)
            lines.append(f"M\t{kind}\t{member}\t{'' if value is None else value}")
    return "\n".join(lines) + "\n"


def ns(value: float) -> int:
    """A time of a kstat in nanoseconds: captures may have seconds as a float."""
    return value if isinstance(value, int) else math.floor(value * 1e9)


class Kernel:
    """A folder with the stand-in library, the kstats that it serves, its faults and counters."""

    def __init__(self, library: Path, folder: Path,
                 kstats: str | Iterable[Mapping[str, Any]] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.library = folder / "libkstat.so.1"
        shutil.copy(str(library), str(self.library))
        self._stats = open(folder / "stats", "w+b")
        self._stats.truncate(4096)
        self._map = mmap.mmap(self._stats.fileno(), 4096)
        self._bump = 0
        self._rules: list[str] = []
        if kstats:
            self.write(kstats)

    def _replace(self, name: str, content: str) -> None:
        with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False) as file:
            file.write(content)
        os.replace(file.name, self.folder / name)
        struct.pack_into("=Q", self._map, 0, self["generation"] + 1)

    def write(self, kstats: str | Iterable[Mapping[str, Any]], name: str = "kstats") -> None:
        """Set the kernel's kstats (or, under another name, those after a `switch`)."""
        self._replace(name, kstats if isinstance(kstats, str) else kstats_file(kstats))

    def synthesise(self, zones: int, kstats: int) -> None:
        """Synthetic zones, and this many kstats in total; see `synth` in the library."""
        self.write(f"synth zones={zones} kstats={kstats}\n")

    def faults(self, *rules: Sequence[str | int]) -> None:
        """Replace the faults: ("block", "tcp:7:tcp"), …"""
        self._rules = ["\t".join(map(str, rule)) for rule in rules]
        self._replace("control", "\n".join(self._rules) + "\n")

    def bump(self) -> None:
        """The chain id changes, and one kstat with it (only for synthesised ones)."""
        self._bump += 1
        self._replace("control", "\n".join([*self._rules, f"bump\t{self._bump}"]) + "\n")

    def __getitem__(self, counter: str) -> int:
        value: int = struct.unpack_from("=Q", self._map, 8 * COUNTERS.index(counter))[0]
        return value

    def counters(self) -> dict[str, int]:
        """All counters."""
        return {name: self[name] for name in COUNTERS}

    def log_reads(self) -> None:
        """Log each kstat_read from now on; call before the program starts."""
        (self.folder / "reads").write_text("")

    def reads(self, clear: bool = True) -> list[str]:
        """module:instance:name of each kstat_read since the last time."""
        path = self.folder / "reads"
        lines = path.read_text().splitlines()
        if clear:
            os.truncate(path, 0)
        return lines

    def close(self) -> None:
        """Close the counters."""
        self._map.close()
        self._stats.close()


def stand_ins(folder: Path, commands: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Programs that print what a capture has recorded, by their arguments; where each is."""
    folder.mkdir(parents=True, exist_ok=True)
    cases: dict[str, str] = {}
    for number, (line, result) in enumerate(commands.items()):
        program, _, arguments = line.partition(" ")
        name = Path(program).name
        shown = ""
        for stream, to in (("stdout", ""), ("stderr", " >&2")):
            if result.get(stream):
                path = folder / f"{name}.{number}.{stream}"
                path.write_text(result[stream])
                shown += f"cat {shlex.quote(str(path))}{to}; "
        cases[name] = cases.get(name, "") + \
            f"{shlex.quote(arguments)}) {shown}exit {result.get('status', 0)};;\n"
    for name, known in cases.items():
        script = folder / name
        script.write_text(f'#!/bin/sh\ncase "$*" in\n{known}esac\n'
                          f'echo "{name}: nothing recorded for $*" >&2; exit 2\n')
        script.chmod(0o755)
    return {name: str(folder / name) for name in cases}


def agent_config(folder: Path, kernel: Kernel, recorded: Mapping[str, Mapping[str, Any]],
                 **settings: Any) -> Path:
    """A configuration of the agent: that kernel, those commands, no vminfod, no CPU budget.

    Nobody listens on port 1; a port that is free now may be that of another test soon."""
    programs = stand_ins(folder / "commands", recorded)
    nowhere = str(folder / "nothing-here")
    path = folder / "agent.json"
    path.write_text(json.dumps({
        "libkstat": str(kernel.library), "commands": programs, "cpu_budget": None,
        "vminfod": "http://127.0.0.1:1", "sysinfo_file": nowhere,
        "plugin_dirs": {"gz": nowhere, "vm": nowhere}, **settings}))
    return path


def build_libkstat(folder: Path) -> Path:
    """Compile the stand-in; FileNotFoundError without a C compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc)")
    library = folder / "libkstat-built.so"
    source = ROOT / "tests" / "libkstat" / "libkstat.c"
    subprocess.run([compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC",
                    "-shared", "-o", library, source, "-lpthread", "-ldl"], check=True)
    return library


def node(path: Path = NODE) -> dict[str, Any]:
    """The recorded compute node."""
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded
