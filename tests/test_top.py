# SPDX-License-Identifier: MPL-2.0
"""`cmon.py top`: screens of recorded pages, rounds within the quota, terminals that come and go."""
from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cmon
import pytest
from support import PATIENCE, Program, wait_until
from test_cmon import (  # noqa: F401  (fixtures are used by name)
    CMON, CONTAINERS, Answer, Files, StandIn, connection, demo_in, files, one_line, proxy,
)
from test_monitor import GOLDEN, compare, inside, page

WEB01, WEB02, DB = (one["vm_uuid"] for one in CONTAINERS[:3])


def fleet(*rows: tuple[str, str, str], quota: str = "") -> str:
    """A fleet page: UUID, alias and state of each container."""
    text = "".join(f'cmon_instance_info{{instance="{uuid}",alias="{alias}"}} 1\n'
                   for uuid, alias, _ in rows)
    text += "".join(f'cmon_instance_state{{instance="{uuid}",state="{one}"}} {int(one == state)}\n'
                    for uuid, _, state in rows for one in ("running", "stopped"))
    return text + quota


ROWS = ((WEB01, "web01", "running"), (WEB02, "web02", "running"), (DB, "db", "stopped"))


def state(*rows: tuple[str, str, str], quota: str = "", **more: Any) -> cmon.Top:
    top = cmon.Top(**more)
    top.take_fleet(cmon.Figures(page(fleet(*(rows or ROWS), quota=quota))))
    return top


def usage(percent: float, at: float = 1000.0, uuid: str = WEB01) -> cmon.Page:
    return page(f"cpucap_cur_usage_percentage {percent}\ncpucap_limit_percentage 100\n"
                "mem_agg_usage 50\nmem_limit 200\n", at, "x", uuid)


# --- the screen -----------------------------------------------------------------------------------

@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_screen_equals_the_golden(width: int, request: pytest.FixtureRequest) -> None:
    names = {"node-web01": "web01", "node-lb01-two-nics": "lb01", "node-spark01-bhyve": "spark01",
             "node-batch-lx-uncapped": "batch-with-a-name-that-is-long-enough-to-be-cut"}
    uuids = {name: f"{index:08}-0000-0000-0000-000000000000" for index, name in enumerate(names)}
    top = state(*((uuids[name], alias, "running") for name, alias in names.items()),
                ("f" * 8, "old", "stopped"), ("e" * 8, "broken", "running"))
    for name, alias in names.items():
        text = (GOLDEN / f"{name}.prom").read_text()
        later = GOLDEN / f"{name}-later.prom"
        for step in range(4):
            if step == 2 and later.exists():
                text = later.read_text()
            top.take_page(page(text, 1000.0 + 20 * step, alias, uuids[name]), uuids[name])
    top.take_page(cmon.Failure("says 503: the node is silent"), "e" * 8)
    lines = top.screen(width, 14, 1063.0)
    lines[0] = re.sub(r"\d\d:\d\d:\d\d", "HH:MM:SS", lines[0])
    assert len(lines) == 14 and all(cmon.cells_of(line) <= width for line in lines)
    top.keys("\r", 1063.0, 14)
    detail = top.screen(width, 14, 1063.0)[2:]
    both = (*lines, "=" * width, *detail)
    compare(f"top-{width}", "".join(line.rstrip() + "\n" for line in both), request)


def names(top: cmon.Top) -> list[str]:
    return [row.alias for row in top.visible(1000.0)]


def test_rows_are_sorted_by_any_column_those_without_a_value_last() -> None:
    top = state()
    top.take_page(usage(10), WEB01)
    top.take_page(usage(90, uuid=WEB02), WEB02)
    assert names(top) == ["web02", "web01", "db"]
    top.keys("r", 1000.0, 20)
    assert names(top) == ["web01", "web02", "db"]
    top.keys("r<", 1000.0, 20)
    assert top.sort == "NAME" and names(top) == ["db", "web01", "web02"]
    for title in (*cmon.TOP_TITLES[1:], "NAME"):
        top.keys(">", 1000.0, 20)
        assert top.sort == title and names(top)[-1] in ("db", "web02")
    top.keys("\x1b[D", 1000.0, 20)
    assert top.sort == "AGE"


def test_the_filter_is_typed_and_cleared() -> None:
    top = state()
    top.keys("/Web0q", 1000.0, 20)          # q is a letter here
    assert top.typing and not top.ended and names(top) == []
    assert "/Web0q" in top.screen(80, 20, 1000.0)[1]
    top.keys("\x7f2\r", 1000.0, 20)
    assert names(top) == ["web02"] and not top.typing
    assert "1 of 3 containers" in top.screen(80, 20, 1000.0)[0]
    assert "  1 container  " in state(ROWS[0]).screen(80, 20, 1000.0)[0]
    top.keys("\x1b", 1000.0, 20)
    assert len(names(top)) == 3
    top.keys("/" + DB[:6] + "\r", 1000.0, 20)
    assert names(top) == ["db"]


def test_the_selection_moves_and_the_screen_follows() -> None:
    rows = [(f"{number:08}-0000-0000-0000-000000000000", f"c{number:03}", "running")
            for number in range(100)]
    top = state(*rows, sort="NAME")

    def chosen() -> str:
        marked = [line for line in top.screen(80, 10, 1000.0) if line.startswith("> ")]
        assert len(marked) == 1
        return marked[0].split()[1]
    assert chosen() == "c000"
    top.keys("jj\x1b[B", 1000.0, 10)
    assert chosen() == "c003"
    for _ in range(30):
        top.keys("\x1b[6~", 1000.0, 10)
    assert chosen() == "c099"
    top.keys("k\x1b[5~", 1000.0, 10)
    assert chosen() == "c093"
    top.keys("\r", 1000.0, 10)
    assert top.screen(80, 10, 1000.0)[2].startswith("c093  ")
    top.keys("\x1b", 1000.0, 10)
    assert chosen() == "c093"


def test_the_use_table_of_a_container_can_be_scrolled_and_closed() -> None:
    top = state((WEB01, "web01", "running"))
    top.take_page(page((GOLDEN / "node-web01.prom").read_text()), WEB01)
    top.screen(80, 10, 1000.0)
    top.keys("u", 1000.0, 10)
    first = top.screen(80, 10, 1000.0)
    assert "RESOURCE" in first[3]
    top.keys("j", 1000.0, 10)
    assert top.screen(80, 10, 1000.0)[2] == first[3]
    for _ in range(50):
        top.keys("\x1b[6~", 1000.0, 10)
    assert "proc_fork_failures_total" in "".join(top.screen(80, 10, 1000.0))
    top.keys("q", 1000.0, 10)
    assert not top.ended and not top.detail
    top.keys("q", 1000.0, 10)
    assert top.ended


@pytest.mark.parametrize("title", cmon.TOP_TITLES)
def test_a_narrow_screen_shows_the_column_that_rows_are_sorted_by(title: str) -> None:
    top = state((WEB01, "web01", "running"), sort=title)
    top.take_page(page((GOLDEN / "node-web01.prom").read_text()), WEB01)
    assert title + "▼" in top.screen(40, 10, 1000.0)[2]


def test_a_narrow_screen_shows_keys_and_the_pause() -> None:
    top = state(*many(300))
    top.keys(" ", 1000.0, 10)
    lines = top.screen(40, 10, 1000.0)
    assert "PAUSED" in lines[0] and lines[-1].startswith("q quit") and "enter" in lines[-1]
    for keys, words in (("/", "escape clear"), ("\x1b\r", "q back")):
        top.keys(keys, 1000.0, 10)
        last = top.screen(40, 10, 1000.0)[-1]
        assert words in last and not last.endswith("…")


@pytest.mark.parametrize("width", range(1, 60, 7))
@pytest.mark.parametrize("height", [1, 2, 3, 5])
def test_a_tiny_terminal_is_no_error(width: int, height: int) -> None:
    top = state()
    top.take_page(usage(10), WEB01)
    for keys in ("", "\r", "q", "/x"):
        top.keys(keys, 1000.0, height)
        for line in top.screen(width, height, 1000.0):
            assert cmon.cells_of(line) <= max(width, 20)


def test_the_worst_resource_may_be_full_rather_than_saturated() -> None:
    top = state()
    full = usage(10)
    top.take_page(full._replace(body=full.body.replace(b"mem_agg_usage 50", b"mem_agg_usage 200")),
                  WEB01)
    assert top.rows[WEB01].state_words() == "memory" and top.rows[WEB01].worst[0] == cmon.CRITICAL


def test_names_given_by_a_tenant_cannot_control_the_terminal() -> None:
    top = state((WEB01, "a\x1b[2J\u202e", "running"))
    top.take_page(cmon.Failure("x\x1b[2J".replace("\x1b", "?")), WEB01)
    assert "\x1b[2J" not in "".join(top.screen(80, 10, 1000.0))


def test_a_missing_page_leaves_the_last_values_with_their_age() -> None:
    top = state()
    top.take_page(usage(10, 1000), WEB01)
    top.take_page(cmon.Failure("says 503: silent"), WEB01)
    line = [line for line in top.screen(120, 10, 1042.0) if "web01" in line][0]
    assert "10.0 %" in line and "no answer" in line and "42s" in line
    top.take_page(usage(20, 1050), WEB01)
    assert "no answer" not in "".join(top.screen(120, 10, 1050.0))
    top.take_page(page("{", 1060, uuid=WEB01), WEB01)
    assert "no answer" in "".join(top.screen(120, 10, 1060.0))


def test_the_sparkline_is_of_the_share_of_the_cap() -> None:
    top = state()
    for step, percent in enumerate((0, 50, 100, 400, 12.5)):
        top.take_page(usage(percent, 1000.0 + step), WEB01)
    row = top.rows[WEB01]
    assert row.spark(10, cmon.SPARKS) == "▁▅██▂" and row.spark(2, cmon.PLAIN_SPARKS) == "#."
    for step in range(4):       # without a cap, of the most that was seen
        text = f"# TYPE cpu_user_usage counter\ncpu_user_usage {step * step}000000000\n"
        top.take_page(page(text, 1000.0 + step, uuid=WEB02), WEB02)
    assert top.rows[WEB02].spark(10, cmon.SPARKS) == "▁▂▅█"


# --- rounds ---------------------------------------------------------------------------------------

def many(number: int) -> list[tuple[str, str, str]]:
    return [(f"{index:08}-0000-0000-0000-000000000000", f"c{index:03}", "running")
            for index in range(number)]


def test_stopped_containers_are_not_scraped() -> None:
    assert {row.alias for row in state().due(0.0)} == {"web01", "web02"}


def test_containers_off_the_screen_are_scraped_less_often() -> None:
    top = state(*many(40), sort="NAME")
    top.screen(80, 14, 1000.0)              # ten rows
    asked = dict.fromkeys(top.rows, 0)
    for step in range(12):
        for row in top.due(step * top.interval):
            asked[row.uuid] += 1
            row.pending = False
    counts = list(asked.values())
    assert counts[:10] == [12] * 10 and counts[10:] == [3] * 30
    assert top.behind == ""


def test_scrapes_stay_within_the_quota() -> None:
    top = state(*many(40), quota="cmon_quota_limit 240\n", sort="NAME")
    top.screen(80, 50, 1000.0)
    asked: list[str] = []
    for step in range(6):       # 2 requests a second are half of the quota, one is the fleet page
        due = top.due(step * top.interval)
        assert len(due) == 9
        asked += [row.uuid for row in due]
        for row in due:
            row.pending = False
    assert len(set(asked[:40])) == 40
    assert top.behind.startswith("falling behind: 9 of 40 pages a round, "
                                 "to use at most half of the quota of 240")
    assert top.behind[:30] in top.screen(80, 50, 1000.0)[1]


def test_slow_rounds_are_reported() -> None:
    top = state()
    top.due(0.0)
    assert top.due(5.0) == []
    assert top.behind == "falling behind: 2 pages of the last round are missing"


class Asked:
    """Replaces the scraping threads."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self.answers: Any = cmon.queue.SimpleQueue()

    def ask(self, row: Any) -> None:
        self.jobs.append(row)

    def fleet(self, text: str) -> None:
        self.answers.put((None, page(text)))


def test_a_round_is_one_fleet_page_and_then_the_pages() -> None:
    top, asked = cmon.Top(), Asked()
    rounds = cmon.Rounds(top, asked)        # type: ignore[arg-type]
    rounds.work(0.0)
    rounds.work(1.0)
    assert asked.jobs == [None]
    asked.fleet(fleet(*ROWS))
    rounds.work(1.5)
    assert [row and row.alias for row in asked.jobs] == [None, "web01", "web02"]
    asked.answers.put((asked.jobs[1], usage(10)))
    asked.answers.put((asked.jobs[2], cmon.Failure("silent")))
    rounds.work(4.9)
    assert top.rows[WEB01].values["CPU%"] == 0.1 and top.rows[WEB02].failure == "silent"
    rounds.work(5.0)
    assert len(asked.jobs) == 4             # the next one
    asked.answers.put((None, cmon.Failure("cannot reach the proxy")))
    rounds.work(5.1)
    assert len(asked.jobs) == 4             # nobody is asked when the proxy is silent
    assert "cannot reach the proxy" in top.screen(80, 10, 1000.0)[1]
    assert WEB01 in top.rows
    rounds.work(10.0)
    asked.fleet(fleet(*ROWS[:1], quota="cmon_quota_limited 1\n"))
    rounds.work(10.1)
    assert list(top.rows) == [WEB01] and "over the account's quota" in top.failure
    top.paused = True
    rounds.work(99.0)
    assert len(asked.jobs) == 6


# --- as a process, in a pipe ----------------------------------------------------------------------

class Cloud:
    """Three containers behind the stand-in proxy, and their fleet page."""

    def __init__(self, standin: StandIn) -> None:
        self.standin = standin
        self.lay("/v1/fleet/metrics", fleet(*ROWS))
        self.lay(f"/v1/{WEB01}/metrics", usage(10).body.decode())
        self.lay(f"/v1/{WEB02}/metrics", usage(90).body.decode())

    def lay(self, path: str, text: str, status: int = 200) -> None:
        self.standin.answers[path] = Answer(status, text.encode())

    def asked(self, path: str) -> int:
        return sum(path in one for one, _ in list(self.standin.requests))


@pytest.fixture()
def cloud(proxy: StandIn) -> Cloud:  # noqa: F811
    return Cloud(proxy)


def test_in_a_pipe_it_is_one_table(cloud: Cloud, files: Files) -> None:  # noqa: F811
    done = inside("top", *connection(cloud.standin, files))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == """\
NAME     CPU%  CPU    MEM%   MEM  NET  DISK    WORST  AGE
web02  90.0 %  0.9  25.0 %  50 B    -     -      CPU   0s
web01  10.0 %  0.1  25.0 %  50 B    -     -       ok   0s
db          -    -       -     -    -     -  stopped    -
"""
    assert [cloud.asked(path) for path in ("fleet", WEB01, WEB02, DB)] == [1, 2, 2, 0]


def test_failures_are_shown_beside_the_table(cloud: Cloud, files: Files) -> None:  # noqa: F811
    cloud.lay(f"/v1/{WEB02}/metrics", "silent\n", 503)
    done = inside("top", "--once", "--sort", "name", *connection(cloud.standin, files))
    assert done.returncode == 0
    assert re.search(r"(?m)^web02 .* no answer ", done.stdout)
    assert re.fullmatch(r"cmon: web02: 127.0.0.1:\d+ says 503: silent\n", done.stderr)


def test_without_a_fleet_page_there_is_no_table(cloud: Cloud, files: Files) -> None:  # noqa: F811
    cloud.lay("/v1/fleet/metrics", "no certificate\n", 401)
    one_line(inside("top", *connection(cloud.standin, files)), 1, "says 401: no certificate")


def test_groups_are_requested(cloud: Cloud, files: Files) -> None:  # noqa: F811
    cloud.lay("/v1/fleet/metrics?groups=a%2Cb", fleet(ROWS[2]))
    done = inside("top", "--groups", "a,b", *connection(cloud.standin, files))
    assert done.stdout.count("\n") == 2 and "\ndb " in done.stdout
    cloud.lay("/v1/fleet/metrics?groups=none", "")
    done = inside("top", "--groups", "none", *connection(cloud.standin, files))
    assert (done.returncode, done.stderr) == (0, "cmon: no containers to show\n")


@pytest.mark.parametrize("arguments, words", [
    (["--sort", "colour"], "'colour' is not one of NAME, CPU%"),
    (["--interval", "0"], "--interval"),
    (["--speed", "2"], "--speed requires --replay"), (["web01"], "unrecognized")])
def test_wrong_command_lines_of_top(arguments: list[str], words: str) -> None:
    done = inside("top", *arguments)
    assert done.returncode == 2 and words in done.stderr


def test_a_recording_in_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pages.gz"
    recorder = cmon.Recorder(str(path))
    for step in range(4):
        for uuid, percent in ((WEB01, 10 + step), (WEB02, 90)):
            recorder.add(usage(percent, 1000.0 + step, uuid)._replace(alias=f"c-{uuid[:4]}"))
    recorder.close()
    done = inside("top", "--replay", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        ["c-0b7e", "90.0"], ["c-0b7e", "13.0"]]
    assert "CPU TREND" in done.stdout and "▁▁▁▂" in done.stdout
    path.write_bytes(b"")
    one_line(inside("top", "--replay", path), 1, "contains no complete page")


# --- on a terminal --------------------------------------------------------------------------------

class Pty:
    """cmon on a terminal of its own, as its controlling one; what it draws is read at once."""

    def __init__(self, *arguments: Any, env: dict[str, str] | None = None, columns: int = 80,
                 lines: int = 20) -> None:
        self.master, slave = pty.openpty()
        self.slave = os.dup(slave)
        self.before = termios.tcgetattr(slave)
        self.resize(columns, lines)
        clean = {name: value for name, value in os.environ.items()
                 if not name.startswith("CMON_") and name not in ("NO_COLOR", "COLUMNS", "LINES")}

        def own() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        self.process = subprocess.Popen(
            [sys.executable, str(CMON), *map(str, arguments)], stdin=slave, stdout=slave,
            stderr=slave, preexec_fn=own,
            env={**clean, "TERM": "xterm", "LANG": "C.UTF-8", **(env or {})})
        os.close(slave)
        self.seen = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while True:
                piece = os.read(self.master, 65536)
                if not piece:
                    return
                self.seen += piece
        except OSError as error:
            assert error.errno in (errno.EIO, errno.EBADF)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    @property
    def screen(self) -> str:
        """The last complete screen."""
        drawn = self.seen.decode("utf-8", "replace").split("\x1b[H")
        whole = [one for one in drawn[1:] if "\x1b[J" in one]
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", whole[-1]).replace("\r", "") if whole else ""

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.screen or self.process.poll() is not None, text)
        assert self.process.poll() is None, self.seen[-2000:]

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def end(self, status: int = 0) -> None:
        """It has exited and restored the terminal."""
        assert self.process.wait(PATIENCE) == status, self.seen[-2000:]
        assert termios.tcgetattr(self.slave) == self.before
        wait_until(lambda: self.seen.rstrip().endswith(b"\x1b[?25h\x1b[?1049l"))
        assert b"Traceback" not in self.seen
        self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for descriptor in (self.master, self.slave):
            os.close(descriptor)


@pytest.fixture()
def screen(cloud: Cloud, files: Files) -> Iterator[Pty]:  # noqa: F811
    terminal = Pty("top", "--interval", "0.2", *connection(cloud.standin, files))
    terminal.wait_for("90.0 %")
    yield terminal
    if terminal.process.poll() is None:
        terminal.close()


@pytest.mark.parametrize("how", ["q", "\x03"], ids=["q", "Ctrl-C"])
def test_the_terminal_is_restored(how: str, screen: Pty) -> None:
    screen.type(how)
    screen.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_stops_it_cleanly(number: signal.Signals, screen: Pty) -> None:
    screen.process.send_signal(number)
    screen.end()


def test_a_lost_terminal_stops_it(screen: Pty) -> None:
    os.close(screen.slave)
    os.close(screen.master)
    screen.slave, screen.master = os.open(os.devnull, 0), os.open(os.devnull, 0)
    assert screen.process.wait(PATIENCE) in (0, 1)


def test_ctrl_z_restores_the_terminal_until_fg(screen: Pty) -> None:
    screen.type("\x1a")
    wait_until(lambda: b"\x1b[?1049l" in screen.seen)
    wait_until(lambda: f"\n{screen.process.pid} T" in "\n" + subprocess.run(
        ["ps", "-o", "pid=,stat=", "-p", str(screen.process.pid)], stdout=subprocess.PIPE,
        universal_newlines=True).stdout.replace(" " * 2, " ").replace("\n ", "\n").lstrip())
    screen.process.send_signal(signal.SIGCONT)
    wait_until(lambda: screen.seen.count(b"\x1b[?1049h") == 2)
    screen.type("q")
    screen.end()


def test_keys_work_and_a_new_size_is_drawn(screen: Pty) -> None:
    screen.type("/web01\r")
    screen.wait_for("1 of 3 containers")
    screen.type("\r")
    screen.wait_for(WEB01)
    screen.type("q\x1b")
    screen.wait_for("> web01")
    screen.resize(40, 8)
    screen.process.send_signal(signal.SIGWINCH)
    wait_until(lambda: screen.screen.count("\n") == 7
               and max(map(len, screen.screen.split("\n"))) <= 40)
    screen.type(" ")
    screen.type("q")
    screen.end()


def test_a_proxy_that_dies_and_comes_back(screen: Pty, cloud: Cloud) -> None:
    cloud.lay("/v1/fleet/metrics", "starting\n", 503)
    screen.wait_for("says 503: starting")
    assert "90.0 %" in screen.screen
    cloud.lay("/v1/fleet/metrics", fleet(*ROWS))
    wait_until(lambda: "503" not in screen.screen)
    cloud.standin.answers = None            # type: ignore[assignment]  (kept connections end)
    cloud.standin.close()
    screen.wait_for("cannot reach 127.0.0.1")
    assert "90.0 %" in screen.screen
    screen.type("q")
    screen.end()


def test_colour_can_be_disabled(cloud: Cloud, files: Files) -> None:  # noqa: F811
    cloud.lay(f"/v1/{WEB02}/metrics", "silent\n", 503)
    for env, coloured in (({"NO_COLOR": "1"}, False), ({}, True)):
        terminal = Pty("top", *connection(cloud.standin, files), env=env)
        terminal.wait_for("no answer")
        assert (re.search(rb"\x1b\[[0-9;]*m", terminal.seen) is not None) == coloured
        terminal.type("q")
        terminal.end()


def test_a_dumb_terminal_gets_a_table(cloud: Cloud, files: Files) -> None:  # noqa: F811
    terminal = Pty("top", *connection(cloud.standin, files), env={"TERM": "dumb"})
    assert terminal.process.wait(PATIENCE) == 0
    wait_until(lambda: b"stopped" in terminal.seen)
    assert b"\x1b" not in terminal.seen
    terminal.close()


def test_a_recording_on_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    recorder = cmon.Recorder(str(path))
    for step in range(3):
        recorder.add(usage(10 + step, 1000.0 + 10 * step)._replace(alias="web01"))
    recorder.close()
    terminal = Pty("top", "--replay", path, "--speed", "100")
    terminal.wait_for("12.0 %")
    terminal.type(" ")
    terminal.wait_for("PAUSED")
    terminal.type("q")
    terminal.end()


# --- in tmux, on the demo's programs --------------------------------------------------------------

def test_top_on_the_demo_in_a_real_terminal(tmp_path: Path) -> None:
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    tmux = ["tmux", "-S", str(tmp_path / "socket"), "-f", "/dev/null"]

    def do(*words: str) -> str:
        return subprocess.run([*tmux, *words], stdout=subprocess.PIPE, universal_newlines=True,
                              check=True, timeout=PATIENCE).stdout
    demo: Program = demo_in(tmp_path)
    try:
        shown = [line for line in demo.output.replace("\\\n", "").splitlines()
                 if "cmon.py mon" in line]
        command = re.sub(r"monitor \S+", "top --interval 1", shown[0].strip())
        do("new-session", "-d", "-x", "80", "-y", "20", "-s", "t",
           f"sh -c {shlex.quote(f'LANG=C.UTF-8 {command}; echo status $?; exec sleep 600')}")
        expected = json.loads((Path(CMON).parent / "examples" / "inventory.json").read_text())
        assert any(vm["alias"] == "web01" for vm in expected["vms"])
        wait_until(lambda: re.search(r"web01 +\d+\.\d %", do("capture-pane", "-p", "-t", "t")))
        for width in (40, 200, 80):
            do("resize-window", "-t", "t", "-x", str(width), "-y", "16")
            wait_until(lambda: re.search(r"> \S+ +\d+\.\d %", do("capture-pane", "-p", "-t", "t")))
            lines = do("capture-pane", "-p", "-t", "t").rstrip("\n").split("\n")
            assert lines[0].startswith("cmon top") and lines[-1].startswith("q quit")
        do("send-keys", "-t", "t", "Enter")
        wait_until(lambda: "RESOURCE" in do("capture-pane", "-p", "-t", "t"))
        do("send-keys", "-t", "t", "q")
        do("send-keys", "-t", "t", "q")
        wait_until(lambda: "status 0" in do("capture-pane", "-p", "-t", "t"))
        assert "cmon top" not in do("capture-pane", "-p", "-t", "t")
    finally:
        subprocess.run([*tmux, "kill-server"], stderr=subprocess.DEVNULL)
        demo.stop()
