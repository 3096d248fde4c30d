# SPDX-License-Identifier: MPL-2.0
"""`cmon.py monitor`: tables of recorded pages, rates, expressions; recordings; as a process."""
from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import cmon
import pytest
from support import PATIENCE, Program, wait_until
from test_cmon import (  # noqa: F401  (fixtures are used by name)
    CMON, CONTAINERS, Answer, Files, StandIn, connection, files, on_terminal, one_line, proxy,
)

GOLDEN = Path(__file__).parent / "golden"
SCREENS = Path(__file__).parent / "screens"
WEB01 = CONTAINERS[0]["vm_uuid"]
PATH = f"/v1/{WEB01}/metrics"


def page(text: str, at: float = 1000.0, alias: str = "web01", uuid: str = WEB01) -> cmon.Page:
    return cmon.Page(at, uuid, alias, text.encode())


def inside(*arguments: Any, env: dict[str, str] | None = None) -> Any:
    """As `run`, in this process, which is faster."""
    streams = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CMON_")}
    with mock.patch.dict(os.environ, {**kept, **(env or {})}, clear=True), \
            contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            status = cmon.main(list(map(str, arguments)))
        except SystemExit as end:       # argparse's
            status = end.code
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())     # type: ignore[attr-defined]
    return subprocess.CompletedProcess(list(arguments), status, *texts)


def reading(value: Any, clock: float, age: float = 0.0, name: str = "tcp_segments_in_total") -> str:
    """A page with one counter of the collector `tcp`, read `age` seconds before `clock`."""
    return (f"# TYPE {name} counter\n{name} {value}\n# TYPE time_of_day counter\n"
            f"time_of_day {clock * 1000:.0f}\ncmon_sample_age_seconds{{collector=\"tcp\"}} {age}\n"
            'cmon_sample_age_seconds{collector="time"} 0\n')


def golden_figures(name: str) -> cmon.Figures:
    """A recorded page, 20 s after an earlier one where that was recorded."""
    first = page((GOLDEN / f"{name}.prom").read_text(), 980.0, alias=name)
    later = GOLDEN / f"{name}-later.prom"
    before = cmon.Figures(first)
    return cmon.Figures(page(later.read_text(), alias=name), before) if later.exists() else before


# --- tables ---------------------------------------------------------------------------------------

def compare(name: str, text: str, request: pytest.FixtureRequest) -> None:
    """Compare with a screen of tests/screens; `make golden` rewrites it for review."""
    path = SCREENS / f"{name}.txt"
    if request.config.getoption("--rewrite"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    assert text == path.read_text("utf-8")


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("name", sorted(cmon.TABLES))
@pytest.mark.parametrize("recorded", ["node-web01", "node-gz", "node-spark01-bhyve"])
def test_tables_equal_the_goldens(recorded: str, name: str, width: int,
                                  request: pytest.FixtureRequest) -> None:
    lines = cmon.TABLES[name].lines(golden_figures(recorded), width)
    assert all(cmon.cells_of(line) <= width and line == line.rstrip() for line in lines)
    compare(f"{name}-{recorded}-{width}", "".join(line + "\n" for line in lines), request)


def test_every_column_and_cap_is_a_metric_that_exists() -> None:
    texts = [column.expression for layout in cmon.NET + cmon.DISK for column in layout.columns]
    texts += [text for row in cmon.CAPS for text in row[1:] if text]
    for text in texts:
        one = cmon.Expression.of_text(text)
        assert one.over.name in cmon.facts(), text


@pytest.mark.parametrize("metric, value, cell, verdict", [
    ("mem_agg_usage", 50, "utilisation", "ok"), ("mem_agg_usage", 85, "utilisation", "watch"),
    ("mem_agg_usage", 99, "utilisation", "bad")])
def test_a_verdict_follows_the_share_of_the_cap(metric: str, value: int, cell: str,
                                                verdict: str) -> None:
    figures = cmon.Figures(page(f"{metric} {value}\nmem_limit 100\n"))
    found, = [one for one in cmon.use_cells(figures)
              if one.resource == "memory" and one.name == cell]
    assert found.verdict is not None and cmon.VERDICT_WORDS[found.verdict] == verdict


def test_without_a_cap_there_is_no_verdict() -> None:
    found = cmon.use_cells(cmon.Figures(page("mem_agg_usage 50\n")))
    assert [cell.verdict for cell in found if cell.resource == "memory"] == [None, None, None]
    row, = cmon.caps_rows(cmon.Figures(page("mem_agg_usage 50\n")))
    assert (row["cap"], row["used"], row["share"]) == (None, 50, None)


def test_any_error_is_bad() -> None:
    before = cmon.Figures(page("# TYPE mem_anon_alloc_fail counter\nmem_anon_alloc_fail 3\n", 10))
    now = page("# TYPE mem_anon_alloc_fail counter\nmem_anon_alloc_fail 4\n", 20)
    cells = {cell.name: cell.verdict for cell in cmon.use_cells(cmon.Figures(now, before))}
    assert cells["errors"] == cmon.CRITICAL


@pytest.mark.parametrize("value, unit, text", [
    (None, "bytes", "-"), (0, "bytes", "0 B"), (1023, "bytes", "1023 B"),
    (1536, "bytes", "1.5 KiB"),
    (2 ** 31, "bytes", "2 GiB"), (1023.99 * 2 ** 20, "bytes/s", "1024 MiB/s"),
    (125_000_000, "bytes per second", "119 MiB/s"), (239, "percent", "239 %"),
    (0.5975, "share", "59.8 %"), (19007, "seconds", "19007 s"),
    (0.00123, "seconds/s", "0.00123 s/s"),
    (15_000_000, "nanoseconds/s", "0.015 s/s"), (9999, "", "9999"), (12345, "", "12.3 k"),
    (-3, "", "-3"), (math.nan, "", "NaN"), (10 ** 400, "bytes", "huge B"), (2.02, "ratio", "2.02"),
])
def test_amounts_are_short(value: Any, unit: str, text: str) -> None:
    assert cmon.amount(value, unit) == text


def test_wide_and_combining_characters_are_measured() -> None:
    assert cmon.cells_of("日本") == 4 and cmon.cells_of("e\u0301") == 1
    assert cmon.clipped("日本語", 5) == "日本…"
    lines = cmon.aligned(("A", "B"), [("日本", "1"), ("abcd", "2")])
    assert lines == ["A     B", "日本  1", "abcd  2"]


# --- rates ----------------------------------------------------------------------------------------

def rate(*readings: str, at: Any = ()) -> dict[str, float]:
    """Rates on the last of some pages; each came when the node's clock says, or `at`."""
    figures: cmon.Figures | None = None
    for index, text in enumerate(readings):
        clock = re.search(r"(?m)^time_of_day (\d+)", text)
        came = at[index] if at else int(clock.group(1)) / 1000 if clock else 1000.0 + index
        figures = cmon.Figures(page(text, came), figures)
    assert figures is not None
    return {name: found[()] for name, found in figures.rates.items() if () in found}


def test_a_rate_uses_the_time_between_the_samples_not_the_answers() -> None:
    """Scrapes 10 s apart, but the first values were 6 s old: 16 s lie between them."""
    assert rate(reading(100, 1000, 6), reading(260, 1010, 0))["tcp_segments_in_total"] == 10


def test_without_the_nodes_clock_ours_is_used() -> None:
    text = "# TYPE tcp_segments_in_total counter\ntcp_segments_in_total {}\n"
    assert rate(text.format(5), text.format(7)) == {"tcp_segments_in_total": 2}


def test_a_stopped_clock_is_ignored() -> None:
    readings = (reading(100, 1000), reading(160, 1000))
    assert rate(*readings, at=(1000, 1060))["tcp_segments_in_total"] == 1
    assert rate(readings[0], readings[0], at=(1000, 1060))["tcp_segments_in_total"] == 0
    assert rate(reading(100, 90000), reading(160, 1060), at=(1000, 1060)) == {
        "tcp_segments_in_total": 1, "time_of_day": 1060000 / 60}


def test_changed_values_count_as_read_again() -> None:
    pages = (reading(100, 1000, 0), reading(130, 1003, 3))
    assert rate(*pages)["tcp_segments_in_total"] == 10


def test_a_restarted_counter_is_never_negative() -> None:
    assert rate(reading(10 ** 6, 1000), reading(30, 1010))["tcp_segments_in_total"] == 3


def test_values_not_read_again_keep_their_rate() -> None:
    readings = (reading(100, 1000), reading(200, 1010), reading(200, 1012, 2.001))
    assert rate(*readings)["tcp_segments_in_total"] == 10
    assert "tcp_segments_in_total" not in rate(readings[0], reading(100, 1003, 3))
    # and the next reading is compared with the last one, not with its copy
    assert rate(*readings, reading(230, 1015))["tcp_segments_in_total"] == 6


def test_a_rate_of_numbers_beyond_a_float_is_no_error() -> None:
    huge = "9" * 390
    assert rate(reading(1, 1000), reading(huge, 1010))["tcp_segments_in_total"] == math.inf
    assert rate(reading(huge, 1000), reading(int(huge) + 10, 1010))["tcp_segments_in_total"] == 1


def test_gauges_have_no_rates() -> None:
    assert rate("# TYPE load_average gauge\nload_average 1\n",
                "# TYPE load_average gauge\nload_average 2\n") == {}


# --- expressions and ranges -----------------------------------------------------------------------

PAGE = """\
# TYPE net counter
net{interface="vnic0",tag="a,b}"} 100
net{interface="vnic1",tag="x"} 300
# TYPE speed gauge
speed{tag="a,b}",interface="vnic0"} 1000
speed{interface="vnic1",tag="x"} 0
# TYPE one gauge
one 50
nan NaN
# TYPE h histogram
h_bucket{le="+Inf"} 3
h_count 3
h_sum 7
"""


@pytest.mark.parametrize("text, expected", [
    ("one", [50]), (" one ", [50]), ("net", [100, 300]), ('net{interface="vnic1"}', [300]),
    ('net{ interface = "vnic0" , tag="a,b}" }', [100]), ('net{interface="none"}', []),
    ("net/speed", [0.1]), ("net / one", [2, 6]), ("one/net", []), ("missing", []),
    ("one/missing", []), ("nan", []), ("h_bucket", [3]), ("h_sum/h_count", [7 / 3]),
    ('one/net{interface="vnic0"}', [0.5]), ("rate(net)", []), ("net{}", [100, 300]),
])
def test_expressions(text: str, expected: list[float]) -> None:
    assert list(cmon.Expression.of_text(text).of(cmon.Figures(page(PAGE))).values()) == expected


@pytest.mark.parametrize("text", [
    "", "1", "a b", "a//b", "a/b/c", "rate(a", "rate()", "rate(a)/", "a{", "a{b}", 'a{b="c}',
    'a{b="c",b="d"}', "a+b", "rate(rate(a))", "é"])
def test_invalid_expressions(text: str) -> None:
    with pytest.raises(cmon.Usage):
        cmon.Expression.of_text(text)


@pytest.mark.parametrize("text, quiet, loud", [
    ("10", [0, 5, 10], [-0.1, 10.1]), ("10:", [10, 1e9], [9.9, -1]), ("~:10", [-1e9, 10], [10.1]),
    ("10:20", [10, 15, 20], [9, 21]), ("@10:20", [9, 21], [10, 15, 20]), ("~:", [-1e9, 1e9], []),
    ("0", [0], [0.001, -1]), ("@5", [-1, 6], [0, 5]), ("-5:-1", [-3], [0, -6]),
    (".5", [0.5], [0.6]),
    ("1e3", [1000], [1001]), ("@~:3", [4], [3, -9])])
def test_ranges_of_the_plugin_guidelines(text: str, quiet: list[float], loud: list[float]) -> None:
    one = cmon.Range.of_text(text)
    assert [value for value in quiet if one.alerts(value)] == []
    assert [value for value in loud if not one.alerts(value)] == []


@pytest.mark.parametrize("text", ["", ":", "@", "a", "20:10", "1:2:3", "10-20", "1,5", "inf",
                                  "nan:", "~", "::", "@@1", "10:~", " "])
def test_invalid_ranges(text: str) -> None:
    with pytest.raises(cmon.Usage):
        cmon.Range.of_text(text)


# --- as a process ---------------------------------------------------------------------------------

class Container:
    """A container behind the stand-in proxy whose counter grows by 10 with each answer."""

    def __init__(self, standin: StandIn) -> None:
        outer = self
        self.asked = 0
        self.broken: set[int] = set()       # answers that are a refusal instead

        class Answers(dict):    # type: ignore[type-arg]
            def get(self, path: str, default: Any = None) -> Any:
                return outer.answer() if path == PATH else super().get(path, default)
        standin.answers = Answers(standin.answers)

    def answer(self) -> Answer:
        self.asked += 1
        if self.asked in self.broken:
            return Answer(503, b"the node is silent\n")
        return Answer(200, (reading(10 * self.asked, 1000 + 5 * self.asked) + "# TYPE x gauge\n"
                            "x 9007199254740993\ny NaN\nmem_agg_usage 50\nmem_limit 200\n"
                            'net_link_up{interface="vnic0\\n"} 1\n').encode())


@pytest.fixture()
def web01(proxy: StandIn) -> Container:  # noqa: F811
    return Container(proxy)


@pytest.fixture()
def monitor(proxy: StandIn, files: Files) -> Callable[..., Any]:  # noqa: F811
    return lambda *arguments, **more: inside("monitor", *arguments, *connection(proxy, files),
                                             **more)


def test_a_table_of_rates_takes_two_scrapes(web01: Container, monitor: Any) -> None:
    done = monitor("web01", "--use")
    assert (done.returncode, done.stderr) == (0, "")
    assert "tcp_segments_in_total 2/s" in done.stdout
    assert web01.asked == 2


def test_caps_need_only_one_scrape(web01: Container, monitor: Any) -> None:
    done = monitor("web01", "--caps")
    assert done.stdout == """\
RESOURCE    CAP  USED   SHARE  HIGHEST  ABOVE
memory    200 B  50 B  25.0 %        -      -
"""
    assert web01.asked == 1


def test_json_is_one_object_with_exact_numbers(web01: Container, monitor: Any) -> None:
    found = json.loads(monitor("web01", "--json").stdout)
    assert (found["alias"], found["uuid"]) == ("web01", WEB01)
    assert found["metrics"]["x"] == [{"labels": {}, "value": 2 ** 53 + 1}]
    assert found["metrics"]["y"] == [{"labels": {}, "value": "NaN"}]
    caps = json.loads(monitor("web01", "--caps", "--json").stdout)
    assert caps["rows"] == [{"resource": "memory", "cap": 200, "used": 50, "share": 0.25,
                             "highest": None, "above_seconds": None}]
    use = json.loads(monitor("web01", "--use", "--json").stdout)["rows"]
    tcp, = [row for row in use if (row["resource"], row["cell"]) == ("TCP", "utilisation")]
    assert tcp["figures"]["rate(tcp_segments_in_total)"] == [{"labels": {}, "value": 2.0}]
    net = json.loads(monitor("web01", "--net", "--json").stdout)["rows"]
    assert net[0]["interface"] == "vnic0\n" and net[0]["net_link_up"] == 1


def test_a_table_without_values_says_so(monitor: Any) -> None:
    done = monitor("web01", "--disk")
    assert (done.returncode, done.stdout) == (0, "the page has no metrics for this table\n")


def test_watch_in_a_pipe_is_one_table_after_another(web01: Container, monitor: Any) -> None:
    web01.broken = {3}
    done = monitor("web01", "--net", "--watch", "0.1", "--count", "3")
    assert done.returncode == 0
    assert done.stdout.count("INTERFACE") == 2 and "\x1b" not in done.stdout
    assert re.search(r"^web01  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n\n", done.stdout)
    assert done.stderr.startswith("cmon: 127.0.0.1:") and "the node is silent" in done.stderr


def test_watch_fails_without_any_page(web01: Container, monitor: Any) -> None:
    web01.broken = {1}
    one_line(monitor("web01", "--use", "--watch"), 1, "says 503: the node is silent")


@pytest.mark.parametrize("body", [b"\xff", b"a{b 1\n", b"cut off", b"a 1\na 2\n"])
def test_an_invalid_page_is_refused_in_one_line(body: bytes, proxy: StandIn,  # noqa: F811
                                                    monitor: Any) -> None:
    proxy.answers[PATH] = Answer(200, body)
    one_line(monitor("web01", "--caps"), 1, "the page of web01 is not in Prometheus' text format")


@pytest.mark.parametrize("arguments, words", [
    ([], "no container given"),
    (["web01", "--record", "a", "--replay", "b"], "cannot be used together"),
    (["web01", "--count", "2"], "--count requires"),
    (["web01", "--speed", "2"], "--speed requires"),
])
def test_flags_that_do_not_go_together(arguments: list[str], words: str, monitor: Any) -> None:
    one_line(monitor(*arguments), 2, words)


@pytest.mark.parametrize("arguments", [
    ["web01", "--caps", "--use"], ["web01", "--watch", "0"], ["web01", "--watch", "x"],
    ["web01", "--count", "0"], ["web01", "--json", "--cap"]])
def test_wrong_flags(arguments: list[str], monitor: Any) -> None:
    done = monitor(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr


# --- recordings -----------------------------------------------------------------------------------

@pytest.fixture(params=["pages.txt", "pages.txt.gz"])
def recording(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def test_a_recording_replays_as_it_was(recording: Path, web01: Container, monitor: Any) -> None:
    done = monitor("web01", "--record", recording, "--watch", "0.05", "--count", "3", "--json")
    live = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, len(live)) == (0, 3)
    assert done.stderr == f"cmon: 3 pages in {recording}\n"
    back = inside("monitor", "--replay", recording, "--json")      # no proxy is asked
    assert [json.loads(line) for line in back.stdout.splitlines()] == live
    raw = inside("monitor", "web01", "--replay", recording)
    assert raw.stdout.count("# TYPE tcp_segments_in_total") == 3
    use = inside("monitor", WEB01[:6], "--replay", recording, "--use")
    assert use.stdout.count("tcp_segments_in_total 2/s") == 2
    assert use.stderr == raw.stderr == ""


def test_recording_appends_to_an_existing_file(recording: Path, web01: Container, monitor: Any
                                              ) -> None:
    for _ in range(2):
        monitor("web01", "--record", recording, "--watch", "0.05", "--count", "2")
    assert inside("monitor", "--replay", recording).stdout.count("x 9007199254740993") == 4


def test_a_recording_on_a_full_disk_says_what_it_has(tmp_path: Path, web01: Container,
                                                     proxy: StandIn, files: Files  # noqa: F811
                                                     ) -> None:
    path = tmp_path / "web01"
    command = " ".join(map(shlex.quote, [
        sys.executable, str(CMON), "monitor", "web01", "--record", str(path), "--watch", "0.05",
        "--count", "3", "--use", *connection(proxy, files)]))
    # the file of the coverage tool would be limited, too
    done = subprocess.run(["/bin/sh", "-c",
                           f"unset COVERAGE_PROCESS_START; ulimit -f 1; {command}"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                          timeout=60)
    assert (done.returncode, done.stderr.splitlines()) == (1, [
        f"cmon: 1 page in {path}", f"cmon: cannot record to {path}: file too large"])
    assert inside("monitor", "--replay", path).stdout.count("x 9007199254740993") == 1


def test_a_truncated_recording_replays_up_to_the_cut(recording: Path, web01: Container, monitor: Any
                                                    ) -> None:
    monitor("web01", "--record", recording, "--watch", "0.05", "--count", "3")
    whole = recording.read_bytes()
    if recording.suffix != ".gz":
        assert len(re.findall(rb"(?m)^# cmon page at=", whole)) == 3
    for end in (len(whole) * 9 // 10, len(whole) * 6 // 10):
        recording.write_bytes(whole[:end])
        pages = inside("monitor", "--replay", recording).stdout.count("x 9007199254740993\n")
        assert pages == (1 if end < len(whole) * 2 // 3 else 2)
    # and what is recorded then stands behind the last whole page
    monitor("web01", "--record", recording, "--count", "1")
    assert inside("monitor", "--replay", recording).stdout.count("x 9007199254740993\n") == 2


def test_other_files_are_not_overwritten_or_replayed(tmp_path: Path, web01: Container, monitor: Any
                                                    ) -> None:
    for name, content in (("a.txt", b"my thesis\n"), ("a.gz", b"my thesis\n")):
        path = tmp_path / name
        path.write_bytes(content)
        one_line(monitor("web01", "--record", path, "--count", "1"), 1, "it is not a recording")
        assert path.read_bytes() == content
        one_line(inside("monitor", "--replay", path), 1, "contains no complete page")
    packed = tmp_path / "b.gz"
    packed.write_bytes(gzip.compress(b"my thesis\n"))
    one_line(inside("monitor", "--replay", packed), 1, "contains no complete page")


def test_unusable_recordings(tmp_path: Path, web01: Container, monitor: Any) -> None:
    one_line(inside("monitor", "--replay", tmp_path / "none"), 1, "cannot read", "no such file")
    one_line(inside("monitor", "--replay", tmp_path), 1, "cannot read", "is a directory")
    one_line(monitor("web01", "--record", tmp_path / "no" / "x", "--count", "1"), 1,
             "cannot record to", "no such file")
    good = tmp_path / "good"
    monitor("web01", "--record", good, "--count", "1")
    one_line(inside("monitor", "db01", "--replay", good), 1,
             "no complete page of db01, but pages of web01")


def test_a_recording_ends_at_ctrl_c(tmp_path: Path, web01: Container, proxy: StandIn,  # noqa: F811
                                    files: Files) -> None:  # noqa: F811
    path = tmp_path / "pages"
    program = Program.cmon("monitor", "web01", "--record", path, "--watch", "0.05",
                           *connection(proxy, files))
    wait_until(lambda: web01.asked > 2)
    program.signal(signal.SIGINT)
    assert program.wait() == 0
    assert re.fullmatch(r"cmon: recording web01 .*\ncmon: \d+ pages in .*", program.log)


# --- on a terminal --------------------------------------------------------------------------------

def test_watch_redraws_in_place_and_ends_cleanly(web01: Container, proxy: StandIn,  # noqa: F811
                                                 files: Files) -> None:  # noqa: F811
    master, slave = pty.openpty()
    with subprocess.Popen([sys.executable, str(CMON), "monitor", "web01", "--use", "--watch", "0.1",
                           *connection(proxy, files)], stdin=slave, stdout=slave, stderr=slave,
                          env={**os.environ, "TERM": "xterm"}) as process:
        os.close(slave)
        seen = b""
        while seen.count(b"\x1b[H") < 4:
            seen += os.read(master, 65536)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
    os.close(master)
    assert seen.count(b"\x1b[2J") == 1 and b"Traceback" not in seen


def test_replay_on_a_terminal_fits_it(recording: Path, web01: Container, monitor: Any) -> None:
    monitor("web01", "--record", recording, "--watch", "0.05", "--count", "3")
    seen = on_terminal(["monitor", "--replay", str(recording), "--use", "--watch", "--speed",
                        "1000"], columns=40)
    screens = re.split(r"\x1b\[2J\x1b\[H|\x1b\[H", seen)[1:]
    assert len(screens) == 2
    for line in screens[-1].splitlines():
        assert len(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line)) <= 40


def test_a_raw_page_in_place_fits_the_terminal(recording: Path, web01: Container,
                                               monitor: Any) -> None:
    monitor("web01", "--record", recording, "--watch", "0.05", "--count", "2")
    seen = on_terminal(["monitor", "--replay", str(recording), "--watch", "--speed", "1000"],
                       columns=40)
    for one in re.split(r"\x1b\[2J\x1b\[H|\x1b\[H", seen)[1:]:
        lines = re.sub(r"\x1b\[[0-9;]*[KJ]", "", one).strip("\n").split("\n")
        assert max(map(cmon.cells_of, lines)) <= 40 and len(lines) < 25
        assert "# HELP" not in one
