# SPDX-License-Identifier: MPL-2.0
"""Runs a program with a checker: what belongs to a loop is touched by the thread that runs it.

    python tests/owned.py PROGRAM.py ARGUMENTS…

Each access to an attribute of a loop-owned object from another thread is a line on stderr that
begins with `owned:`.
"""
from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Classes whose objects belong to the loop, and what other threads may read of them: what never
# changes after the constructor, and the ways into the loop.
OWNED: dict[str, dict[str, set[str]]] = {
    "cmon_agent": {
        "Connection": {"connection", "server"},
        # a flag, from any thread; and what the agent's main thread has, which waits for signals
        "Server": {"loop", "now", "limits", "_workers", "stopping", "kstats", "_done", "_waking",
                   "_wakeup", "alarm"},
        "Listener": set(), "Governor": set(), "Page": set(), "Cell": set(),
        "Scraper": {"server", "host", "kstats"},
    },
    "cmon_proxy": {
        "Proxy": {"server"}, "Inventory": set(), "Directory": set(), "Quotas": set(),
        "QuotaBucket": set(), "Upstreams": set(), "Upstream": set(), "UpstreamConnection": set(),
        "Discovery": set(), "Pages": set(), "LastScrapes": set(), "Relay": set(), "Waiter": set(),
        "Builder": {"_proxy", "_pool"}, "Build": set(), "TritonSource": set(),
        "Accounts": {"_service", "_loop"}, "FileSource": {"_server", "_path", "_port"},
        "AgentNotices": set(), "Cache": set(),
    },
}
_seen: set[tuple[str, str, int]] = set()
_loops: list[Any] = []


def watch(owned: type, allowed: set[str], locked: object = None) -> None:
    """Report threads without a loop that touch an object of this class, but for the one object that
    has a lock."""
    plain: Callable[[Any, str], Any] = owned.__getattribute__
    write: Callable[[Any, str, Any], None] = owned.__setattr__

    def check(self: Any, name: str) -> None:
        if self is locked or name in allowed or name.startswith("__") \
                or any([loop.is_here() for loop in _loops]) \
                or not _loops and threading.current_thread() is threading.main_thread():
            return
        frame = sys._getframe(2)
        place = (owned.__name__, name, frame.f_lineno)
        if place not in _seen:
            _seen.add(place)
            print(f"owned: {owned.__name__}.{name} touched by {threading.current_thread().name} in "
                  f"{frame.f_code.co_name}, line {frame.f_lineno}", file=sys.stderr, flush=True)

    def read(self: Any, name: str) -> Any:
        value = plain(self, name)
        if not callable(value):             # a method may be handed over; what it touches counts
            check(self, name)
        return value

    def assign(self: Any, name: str, value: Any) -> None:
        check(self, name)
        write(self, name, value)
    setattr(owned, "__getattribute__", read)
    setattr(owned, "__setattr__", assign)


def main() -> int:
    """Watch the classes of the program and of the kit, and run it."""
    program = importlib.import_module(Path(sys.argv[1]).stem)
    del sys.argv[0]
    kit = importlib.import_module("cmon_agent")
    begin = kit.Loop.__init__

    def note(loop: Any, *arguments: Any) -> None:
        _loops.append(loop)
        begin(loop, *arguments)
    kit.Loop.__init__ = note
    for module in {"cmon_agent", program.__name__}:
        for name, allowed in OWNED[module].items():
            watch(getattr(importlib.import_module(module), name), allowed, kit.STRINGS)
    return int(program.main() or 0)


if __name__ == "__main__":
    sys.exit(main())
