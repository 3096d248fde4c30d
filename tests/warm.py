# SPDX-License-Identifier: MPL-2.0
"""Starts programs warm: the suite starts them a thousand times, mostly spent on imports.

`install()` lets subprocess.Popen hand the commands that start one of our programs to a process that
has run the program's file up to its last statement, the call of main(). For each command it forks,
and the child takes the command's arguments, environment, folder and descriptors and runs that
statement. CLONE_PARENT makes it a child of the tests like any other: process ids, signals, exit
statuses and zombies are the real ones. What differs is /proc/PID/cmdline.

All else starts cold: a copy of a program elsewhere, other flags, `--smf`, a preexec_fn, an
environment or limits that Python itself heeds at its start. CMON_TESTS_COLD=1 starts all so.
"""
from __future__ import annotations

import ast
import atexit
import ctypes
import fcntl
import inspect
import io
import json
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import threading
import types
from typing import Any, Callable

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = {os.path.join(ROOT, name) for name in
           ("cmon.py", "cmon_agent.py", "cmon_proxy.py", "cmon_forwarder.py")}
# As the manifest imports the agent: only then is its compiled code kept.
AGENT = f"import sys; sys.path[:0] = [{ROOT!r}]; import cmon_agent; sys.exit(cmon_agent.main())"
FLAGS = {"-I", "-s", "-E", "-sE"}
SYS_CLONE = {"x86_64": 56, "aarch64": 220}.get(platform.machine(), 0)
CLONE_PARENT = 0x8000
FREE = 400                  # descriptors from here on are in nobody's way
HEEDED = ("PYTHON", "COVERAGE", "LC_", "LANG", "LD_", "TZ", "SSL", "OPENSSL", "MALLOC", "GLIBC")
LIMITS = [number for name, number in sorted(vars(resource).items()) if name.startswith("RLIMIT_")]


# --- in the tests ---------------------------------------------------------------------------------

def surroundings(environment: Any) -> Any:
    """What a process takes over at its start, and a fork of another one would not."""
    return (sorted((name, text) for name, text in environment.items() if name.startswith(HEEDED)),
            [resource.getrlimit(number) for number in LIMITS],
            [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP,
                                                     signal.SIGTERM)])


class Nursery:
    """The process that forks the children of one program with one set of flags."""

    def __init__(self, flags: list[str], what: str) -> None:
        self.lock = threading.Lock()            # one order at a time
        self.socket, other = socket.socketpair()
        self.around = surroundings(os.environ)
        with other:
            self.process = subprocess.Popen(
                [sys.executable, *flags, os.path.abspath(__file__), str(other.fileno()), what],
                stdin=subprocess.DEVNULL, pass_fds=[other.fileno()])

    def order(self, order: dict[str, Any], descriptors: list[int]) -> int:
        """Fork a child; return its process id."""
        raw = json.dumps(order).encode()
        with self.lock:
            socket.send_fds(self.socket, [len(raw).to_bytes(4, "big")], descriptors)
            self.socket.sendall(raw)
            pid = int.from_bytes(self.socket.recv(4, socket.MSG_WAITALL), "big")
        if pid == 0:
            raise OSError("the process that starts programs warm could not fork")
        return pid

    def close(self) -> None:
        """Stop it: it exits when its socket closes."""
        self.socket.close()
        self.process.wait(30)


_nurseries: dict[tuple[str, ...], Nursery] = {}
_lock = threading.Lock()        # guards _nurseries; any thread of a test may start a program


def nursery(call: dict[str, Any]) -> tuple[Nursery, list[str]] | None:
    """The warm starter and the program's sys.argv; None for a cold start."""
    if call["preexec_fn"] or call["shell"] or not call["close_fds"] or isinstance(
            call["args"], (str, bytes)) or call["executable"]:
        return None
    words = [os.fsdecode(word) for word in call["args"]]
    if words[:1] != [sys.executable] or "--smf" in words:
        return None
    rest = words[1:]
    while rest and rest[0] in FLAGS:
        rest = rest[1:]
    flags = words[1:len(words) - len(rest)]
    if rest[:2] == ["-c", AGENT]:
        what, arguments = AGENT, ["-c", *rest[2:]]
    elif rest and rest[0] in SCRIPTS:
        what, arguments = rest[0], rest
    else:
        return None
    with _lock:
        key = (*flags, what)
        found = _nurseries.get(key)
        if found is None:
            found = _nurseries[key] = Nursery(flags, what)
    environment = os.environ if call["env"] is None else {
        os.fsdecode(name): os.fsdecode(text) for name, text in call["env"].items()}
    return (found, arguments) if surroundings(environment) == found.around else None


def install() -> Callable[[], None]:
    """Start programs warm from now on; returns a function that ends that."""
    if (not SYS_CLONE or not sys.platform.startswith("linux")
            or os.environ.get("CMON_TESTS_COLD") == "1"):
        return lambda: None
    cold = subprocess.Popen._execute_child                          # type: ignore[attr-defined]
    names = inspect.signature(cold)

    def execute_child(self: Any, *args: Any) -> None:
        call = names.bind(self, *args).arguments
        cwd = os.path.abspath(os.fsdecode(call["cwd"] or "."))
        warm = nursery(call) if os.path.isdir(cwd) else None
        if warm is None:
            cold(self, *args)
            return
        places = {0: call["p2cread"], 1: call["c2pwrite"], 2: call["errwrite"]}
        places = {place: place if held == -1 else held for place, held in places.items()}
        places.update((number, number) for number in call["pass_fds"])
        environment = os.environ if call["env"] is None else call["env"]
        self.pid = warm[0].order({
            "argv": warm[1], "cwd": cwd, "places": list(places),
            "session": bool(call["start_new_session"]),
            "environ": {os.fsdecode(name): os.fsdecode(text)
                        for name, text in environment.items()}}, list(places.values()))
        self._child_created = True
        self._close_pipe_fds(*(call[name] for name in (
            "p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")))

    subprocess.Popen._execute_child = execute_child                 # type: ignore[attr-defined]

    def end() -> None:
        subprocess.Popen._execute_child = cold                      # type: ignore[attr-defined]
        while _nurseries:
            _nurseries.popitem()[1].close()
    atexit.register(end)
    return end


# --- in the process that forks --------------------------------------------------------------------

def fork() -> int:
    """Fork a child of this process' parent; only one thread runs here."""
    python, libc = ctypes.pythonapi, ctypes.PyDLL(None, use_errno=True)
    libc.syscall.argtypes, libc.syscall.restype = [ctypes.c_long] * 6, ctypes.c_long
    python.PyOS_BeforeFork()
    pid: int = libc.syscall(SYS_CLONE, CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    return pid


def stream(name: str, number: int) -> None:
    """A standard stream as Python makes it at its start, on what the descriptor is now."""
    old = getattr(sys, name)
    reads = name == "stdin"
    raw = open(number, "rb" if reads else "wb", closefd=False)
    new = io.TextIOWrapper(raw, encoding=old.encoding, errors=old.errors,
                           newline=None if reads else "\n",
                           line_buffering=name == "stderr" or raw.isatty())
    setattr(sys, name, new)
    setattr(sys, f"__{name}__", new)


def become(order: dict[str, Any], descriptors: list[int]) -> None:
    """Apply what a new process inherits from its parent."""
    if order["session"]:
        os.setsid()
    os.chdir(order["cwd"])
    high = [fcntl.fcntl(number, fcntl.F_DUPFD, FREE) for number in descriptors]
    for number in descriptors:
        os.close(number)
    for place, number in zip(order["places"], high):
        os.dup2(number, place)
        os.close(number)
    os.environ.clear()
    os.environ.update(order["environ"])
    sys.argv = order["argv"]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream(name, number)


def serve(orders: socket.socket) -> bool:
    """Fork for each request. True in a child, False when the socket has closed."""
    while True:
        raw, descriptors, _, _ = socket.recv_fds(orders, 4, 64, socket.MSG_WAITALL)
        if len(raw) < 4:
            return False
        order = json.loads(orders.recv(int.from_bytes(raw, "big"), socket.MSG_WAITALL))
        pid = fork()
        if pid == 0:
            orders.close()
            become(order, descriptors)
            return True
        orders.sendall(max(pid, 0).to_bytes(4, "big"))
        for number in descriptors:
            os.close(number)


def main() -> None:
    """Run a program except its last statement; each child runs that one too."""
    orders, what = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    os.set_inheritable(orders.fileno(), False)
    if not sys.flags.isolated:
        sys.path[0] = "" if what == AGENT else os.path.dirname(what)
    program = types.ModuleType("__main__")
    text = what
    if what != AGENT:
        program.__file__ = what
        with open(what, encoding="utf-8") as file:
            text = file.read()
    tree = ast.parse(text)
    last = ast.Module([tree.body.pop()], [])
    name = what if what != AGENT else "<string>"
    sys.argv = [what if what != AGENT else "-c"]
    sys.modules["__main__"] = program
    exec(compile(tree, name, "exec"), vars(program))
    call = compile(last, name, "exec")
    del tree, last, text
    if serve(orders):
        exec(call, vars(program))


if __name__ == "__main__":
    main()
