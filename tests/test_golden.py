# SPDX-License-Identifier: MPL-2.0
"""Whole pages of recorded nodes, byte for byte; `make golden` writes them, a person reads the diff.

A golden proves that output has not changed, not that it is right: that is for the other tests.
"""
from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from nodes import LB01, SPARK01, WEB01, Clock, collectors, down
from support import NODE, PATIENCE

import cmon_agent as agent

HERE = Path(__file__).parent
BATCH = "d78844da-e906-4993-8de3-ad8fb28f32d2"      # LX, without caps


class Row(NamedTuple):
    """One page of one recorded node."""
    capture: str            # in tests/captures; "node" is that of the examples
    second: float           # after its beginning; what was due before is asked for, too
    target: str
    expected: str           # in tests/golden
    fails: frozenset[str] = frozenset()     # collectors that are not up on this page


def fails(*names: str) -> frozenset[str]:
    """For a row."""
    return frozenset(names)


ROWS = (
    Row("node", 0, "gz", "node-gz"),
    Row("node", 20, "gz", "node-gz-later"),
    Row("node", 0, WEB01, "node-web01"),
    Row("node", 20, WEB01, "node-web01-later"),
    Row("node", 50, WEB01, "node-web01-next-loop"),
    Row("node", 0, LB01, "node-lb01-two-nics"),
    Row("node", 0, BATCH, "node-batch-lx-uncapped"),
    Row("node", 0, SPARK01, "node-spark01-bhyve"),
    Row("old", 0, "gz", "old-gz-chrony"),
    Row("old", 0, WEB01, "old-web01-no-vminfod"),
    Row("failing", 0, "gz", "failing-gz", fails("zones", "zpool", "ntp")),
    Row("failing", 0, WEB01, "failing-web01", fails("zfs")),
    Row("failing", 20, "gz", "recovered-gz"),
    Row("failing", 20, WEB01, "recovered-web01"),
)


# Commands that these nodes do not have, or that fail there. What other collectors run is as on
# the node of the examples: a new collector needs no more than its stand-in there.
WITHOUT = {"old": ("ntpq", "sysinfo"), "failing": ("ntpq", "sysinfo", "zfs", "zoneadm", "zpool")}


def completed(name: str, frame: Any, node: Any) -> Any:
    """A frame of a capture with the commands that it is older than."""
    more = {argv: output for argv, output in node.commands.items()
            if argv.split()[0].rpartition("/")[2] not in WITHOUT.get(name, ())}
    return frame._replace(commands={**more, **frame.commands})


def capture(name: str) -> Path:
    """The file of a capture."""
    return NODE if name == "node" else HERE / "captures" / f"{name}.json"


class Recorded:
    """The agent on a recorded node, on the capture's own clock."""

    def __init__(self, path: Path) -> None:
        self.clock = Clock()
        settings = agent.Settings(cpu_budget=None)
        self.host: Any = agent.RecordedHost(str(path), settings)
        example = agent.RecordedHost(str(NODE), settings)._recording.frames[0]
        self.host._recording.frames = [completed(path.stem, frame, example)
                                       for frame in self.host._recording.frames]
        began = json.loads(path.read_text())["frames"][0]["at"]
        self.host._recording._now, self.host._recording._began = self.clock, self.clock.at
        self.host._recording.moved = 0.0
        self.host.time = lambda: began + self.clock.at - 1000.0
        registry = agent.Registry()
        self.server = agent.Server("agent", registry, now=self.clock)
        info, _ = agent.read_sysinfo(self.host)
        self.scraper = agent.Scraper(settings, self.host, self.server, registry, info)
        self.scraper.kstats.now = self.clock
        self.scraper.start()
        end = time.monotonic() + PATIENCE       # zoneadm tells which guest is whose
        while self.scraper._rereading and time.monotonic() < end:
            self.server.loop.run_due()
            time.sleep(0.001)

    def page(self, target: str) -> str:
        """A page as it is now."""
        asked = self.scraper.ask(target, None, "golden", 9.0)
        if isinstance(asked, agent.Deferred):
            end = time.monotonic() + PATIENCE
            while asked.answer is None and time.monotonic() < end:
                self.server.loop.run_due()
                time.sleep(0.0005)
            assert asked.answer is not None, "no answer"
            asked = asked.answer
        head, _, body = agent.wire(asked).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), (head, body)
        return body.decode()

    def close(self) -> None:
        """Let its thread end."""
        self.scraper.kstats.close()


def page_of(row: Row) -> str:
    """The page of a row: asked for every 10 s until its time has come."""
    recorded = Recorded(capture(row.capture))
    try:
        while recorded.clock.at - 1000.0 < row.second:
            recorded.page(row.target)
            for _ in range(100):
                recorded.clock.at += 0.1
                recorded.server.loop.run_due()
        return recorded.page(row.target)
    finally:
        recorded.close()


@pytest.mark.parametrize("row", ROWS, ids=[row.expected for row in ROWS])
def test_pages_of_recorded_nodes_equal_the_goldens(row: Row, request: Any) -> None:
    page = page_of(row)
    path = HERE / "golden" / f"{row.expected}.prom"
    if request.config.getoption("--rewrite"):
        path.write_text(page)
    assert down(page) == row.fails, "a healthy golden has no cmon_collector_up … 0"
    assert page == path.read_text()


def test_every_golden_belongs_to_a_row() -> None:
    assert {path.name for path in (HERE / "golden").iterdir()} == {
        f"{row.expected}.prom" for row in ROWS}
    assert {path.stem for path in (HERE / "captures").iterdir()} == {
        row.capture for row in ROWS} - {"node"}


def test_healthy_goldens_have_no_failed_collector() -> None:
    for row in ROWS:
        text = (HERE / "golden" / f"{row.expected}.prom").read_text()
        bad = re.findall(r'^cmon_collector_up{collector="(\w+)"} 0$', text, re.M)
        assert set(bad) == row.fails, row.expected
        assert bool(bad) == row.expected.startswith("failing")


def test_pages_have_the_labels_of_the_metadata() -> None:
    told = {(entry["scope"], entry["name"]): set(entry["labels"]) for entry in agent.metadata()}
    for row in (row for row in ROWS if row.capture == "node"):     # others have fewer
        scope = "node" if row.target == "gz" else "zone"
        for family in agent.parse((HERE / "golden" / f"{row.expected}.prom").read_text()):
            shown = {name for sample in family.samples for name, _ in sample.labels}
            assert shown == told[scope, family.name], (row.expected, family.name)


def test_a_failing_collector_loses_only_its_own_families() -> None:
    """What fails on the page is missing there, and all else is as on the page that recovered."""
    for target in ("gz", "web01"):
        bad, good = (agent.parse((HERE / "golden" / f"{how}-{target}.prom").read_text())
                     for how in ("failing", "recovered"))
        lost = {family.name for family in good} - {family.name for family in bad}
        row = next(row for row in ROWS if row.expected == f"failing-{target}")
        owners = {entry["name"]: entry["collector"] for entry in agent.metadata()}
        missing = {"arcstats"}          # this kernel has none: no failure
        assert lost and {owners[name] for name in lost} <= row.fails | {"swap"} | missing


def test_counters_grow_between_frames_and_when_a_replay_starts_over() -> None:
    earlier, later, again = (
        {(family.name, sample.labels): (family.kind, sample.value)
         for family in agent.parse((HERE / "golden" / f"node-web01{when}.prom").read_text())
         for sample in family.samples} for when in ("", "-later", "-next-loop"))
    grown = 0
    for key, (kind, number) in earlier.items():
        if kind == "counter":
            assert number <= later[key][1] <= again[key][1], key
            grown += number < later[key][1] < again[key][1]
    assert grown >= 8
    assert collectors((HERE / "golden" / "node-web01.prom").read_text())
