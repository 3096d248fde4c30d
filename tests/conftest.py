# SPDX-License-Identifier: MPL-2.0
"""Fixtures that all tests share; in CI nothing may be skipped."""
from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, Union

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from nodes import Machine, missing_stand_ins  # noqa: E402  (it needs the path)
import warm  # noqa: E402  (it needs the path)
from support import Kernel, Program, build_libkstat, node  # noqa: E402  (it needs the path)

# Where this is set, all that tests need has been installed: a skip is then a hole in the net.
NO_SKIPS = os.environ.get("CI", "").lower() in ("1", "true", "yes")


def pytest_configure(config: pytest.Config) -> None:
    """A shell lets what runs in its background ignore SIGINT, and so would all that we start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.add_cleanup(warm.install())


def pytest_sessionstart() -> None:
    """One line for a collector whose command nobody has recorded, instead of a failure in each
    test that looks at a whole page."""
    missing = missing_stand_ins()
    if missing:
        pytest.exit(f"add to examples/make_node.py what these collectors ask for: {missing}", 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--units and --fewer, for the Pythons before the newest (tests/run.sh), and --rewrite."""
    parser.addoption("--rewrite", action="store_true",
                     help="rewrite tests/golden (make golden); then read the diff")
    parser.addoption("--units", action="store_true",
                     help="only the modules that start none of the programs")
    parser.addoption("--fewer", action="store_true",
                     help="of the tests that start programs, the first case of each")


def is_unit(item: pytest.Item) -> bool:
    """Whether the module of a test starts none of the programs."""
    return (isinstance(item, pytest.Function) and item.path.parent == HERE
            and not {"Program", "Machine"} & set(vars(item.module)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselected, not skipped: it was asked for."""
    if config.getoption("--units"):
        kept = {item for item in items if is_unit(item)}
    elif config.getoption("--fewer"):
        first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
        kept = {item for item in items if is_unit(item)} | set(first.values())
    else:
        return
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    """In CI a skipped test is a failed one (but not one that is expected to fail)."""
    outcome = yield
    report = outcome.get_result()
    if NO_SKIPS and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and in CI nothing may be skipped: {report.longrepr}"


@pytest.fixture(scope="session")
def libkstat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for libkstat, built once; each test copies it (`kernel`)."""
    try:
        return build_libkstat(tmp_path_factory.mktemp("libkstat"))
    except FileNotFoundError as error:
        pytest.skip(str(error))


Kstats = Union[str, Iterable[Mapping[str, Any]]]


@pytest.fixture()
def kernel(libkstat: Path, tmp_path: Path) -> Iterator[Callable[..., Kernel]]:
    """Makes kernels: `kernel(kstats)`, in a folder of their own."""
    made: list[Kernel] = []

    def make(kstats: Kstats = ()) -> Kernel:
        made.append(Kernel(libkstat, tmp_path / f"kernel{len(made)}", kstats))
        return made[-1]
    yield make
    for one in made:
        one.close()


@pytest.fixture()
def machine(kernel: Callable[..., Kernel], tmp_path: Path, recorded_node: dict[str, Any]
            ) -> Iterator[Callable[..., Machine]]:
    """Makes machines with the recorded node's kernel and starts the agent on them."""
    made: list[Machine] = []

    def make(kstats: Any = None, start: bool = True, **settings: Any) -> Machine:
        frame = recorded_node["frames"][0]
        kern = kernel(frame["kstats"] if kstats is None else kstats)
        one = Machine(tmp_path / f"machine{len(made)}", kern, frame, **settings)
        made.append(one)
        return one.start() if start else one
    yield make
    for one in made:
        if one.program is not None:
            status = one.program.stop()
            one.program.kill()
            print(one.program.log[-10_000:])
            assert status == 0
            assert one.kernel["overlaps"] == 0, "two threads in one handle of libkstat"
            assert one.kernel["stale"] == 0, "a pointer was used after its chain had gone"


@pytest.fixture()
def start() -> Iterator[Callable[[Program], Program]]:
    """Takes a started program and ends it after the test: `agent = start(Program.agent(…))`."""
    started: list[Program] = []

    def keep(program: Program) -> Program:
        started.append(program)
        return program
    yield keep
    for program in reversed(started):
        program.kill()


@pytest.fixture(scope="session")
def recorded_node() -> dict[str, Any]:
    """examples/node.json."""
    return node()


@pytest.fixture()
def keep() -> Iterator[Callable[[Any], Any]]:
    """Closes what a test opens."""
    kept: list[Any] = []

    def add(one: Any) -> Any:
        kept.append(one)
        return one
    yield add
    for one in kept:
        one.close()
