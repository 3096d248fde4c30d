# SPDX-License-Identifier: MPL-2.0
"""The forwarder's spool: bounded, in order, whole after any end; full disks and damaged files."""
from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from forwarding import HttpSink, Source, drained, own, write_config
from support import ROOT, Program, wait_until

from cmon_agent import ConfigError
from cmon_forwarder import (
    ENTRY, MEMORY_BYTES, Batch, FileTransport, Forwarder, ProxySettings, RetryLater, Settings,
    SinkSettings, Spool, read_counters, with_defaults, write_counters)

STOP = threading.Event()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture()
def clock() -> Clock:
    return Clock()


@pytest.fixture()
def make(tmp_path: Path, clock: Clock) -> Callable[..., Spool]:
    def make(limit: int = 1 << 20, form: str = "http lines", folder: Path = tmp_path) -> Spool:
        return Spool(folder / "sink", form, limit, clock)
    return make


def take(spool: Spool, most: int = 1 << 20) -> list[int]:
    """Settles a batch whose records are numbers."""
    batch = spool.take(most, 0.0, STOP)
    assert batch is not None
    spool.settle()
    return [int(record) for record in batch.records]


def put(spool: Spool, *numbers: int, size: int = 0) -> None:
    spool.append([b"%0*d" % (size, number) for number in numbers], 1000.0)


def waiting(spool: Spool) -> int:
    return spool.state()[0]


def everything(spool: Spool, most: int = 1 << 20) -> list[int]:
    found: list[int] = []
    while waiting(spool):
        found += take(spool, most)
    return found


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "sink").glob("*.log"))


def test_records_are_taken_in_order_and_removed(make: Any, tmp_path: Path) -> None:
    spool = make()
    put(spool, 1, 2)
    put(spool, 3)
    assert waiting(spool) == 3
    assert take(spool) == [1, 2, 3]
    assert (spool.state(), segments(tmp_path)) == ((0, 0, 0.0), [])
    put(spool, 4)
    put(spool, 5)
    assert take(spool, 1) == [4]
    assert take(spool, 1) == [5]


def test_a_batch_is_held_until_it_is_settled(make: Any) -> None:
    spool = make()
    put(spool, 1)
    first = spool.take(1, 0.0, STOP)
    put(spool, 2)
    assert spool.take(1, 0.0, STOP) == first and waiting(spool) == 2
    spool.close()
    again = make()                          # as after a crash
    assert everything(again) == [1, 2]


def test_a_batch_in_flight_is_sent_again_unchanged(make: Any) -> None:
    spool = make()
    for number in range(4):
        put(spool, number, size=100)
    assert take(spool, 1) == [0]
    held = spool.take(200, 0.0, STOP)
    assert held is not None and [int(one) for one in held.records] == [1, 2]
    for number in range(4, 300):
        put(spool, number, size=100)
    for _ in range(2):
        spool.close()                       # killed twice
        spool = make()
        assert spool.take(1 << 20, 0.0, STOP).records == held.records
    spool.settle()
    assert take(spool) == list(range(3, 300))
    assert everything(spool) == []


def test_a_batch_waits_for_size_or_age(make: Any, clock: Clock) -> None:
    spool = make()
    found: list[Batch | None] = []
    stop = threading.Event()

    def run() -> None:
        found.append(spool.take(200, 5.0, stop))
    put(spool, 1)
    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.05)
    assert not found
    clock.now += 5.0
    spool.wake()
    thread.join(10)
    assert found[0] is not None and len(found[0].records) == 1
    spool.settle()
    put(spool, *range(100))                 # large enough at once, and young
    spool.append([b"1"], clock.now)
    batch = spool.take(200, 3600.0, stop)
    assert batch is not None and len(batch.records) == 100
    spool.settle()
    stop.set()
    assert spool.take(200, 0.0, stop) is None


def test_age_of_the_oldest(make: Any, clock: Clock) -> None:
    spool = make()
    spool.append([b"1"], 1000.0)
    clock.now = 1010.0
    spool.append([b"2"], 1010.0)
    assert spool.state()[2] == 10.0
    assert take(spool, 1) == [1]
    clock.now = 1012.0
    assert spool.state()[2] == 2.0
    spool.close()
    assert make().state()[2] == 2.0


def test_the_oldest_segment_goes_when_the_spool_is_full(make: Any, tmp_path: Path) -> None:
    spool = make(limit=16_384)
    for number in range(100):
        put(spool, number, size=1000)
    used = sum(path.stat().st_size for path in segments(tmp_path))
    assert used <= 16_384 and used == spool.state()[1]
    left = everything(spool)
    assert left == list(range(100 - len(left), 100)) and len(left) >= 10
    assert spool.dropped == {"spool full": 100 - len(left)}


def test_a_held_batch_is_not_dropped_with_its_segment(make: Any) -> None:
    spool = make(limit=8192)
    put(spool, 0, size=1000)
    held = spool.take(1, 0.0, STOP)
    for number in range(1, 50):
        put(spool, number, size=1000)
    assert spool.take(1, 0.0, STOP) == held
    spool.settle()
    left = everything(spool)
    assert 1 + len(left) + spool.dropped["spool full"] == 50
    assert left == list(range(50 - len(left), 50))


def test_a_file_truncated_at_any_byte_is_recovered(make: Any, tmp_path: Path) -> None:
    """Cut at every byte: entries before are there, the torn one is not, nothing is invented."""
    spool = make()
    for number in range(5):
        put(spool, number)
    spool.close()
    path, = segments(tmp_path)
    whole = path.read_bytes()
    one = len(whole) // 5
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        (tmp_path / "sink" / "cursor").unlink()
        again = make()
        put(again, 99)
        assert everything(again) == [*range(cut // one), 99]
        again.close()
        for left in segments(tmp_path):
            left.unlink()


def test_damage_drops_its_segment_and_is_counted(make: Any, tmp_path: Path) -> None:
    source = random.Random(7)
    spool = make(limit=64_000)
    for number in range(200):
        put(spool, number, size=100)
    spool.close()
    files = segments(tmp_path)
    assert len(files) > 2
    contents = {path: path.read_bytes() for path in files}
    for _ in range(60):
        for path, content in contents.items():
            path.write_bytes(content)
        (tmp_path / "sink" / "cursor").unlink()
        path = source.choice(files)
        content = bytearray(contents[path])
        content[source.randrange(len(content))] ^= 1 << source.randrange(8)
        path.write_bytes(content)
        again = make()
        found = everything(again, 500)
        assert found == sorted(found) and set(found) <= set(range(200))
        assert len(found) >= 200 - len(contents[path]) // (ENTRY.size + 104) - 1
        assert len(found) + sum(again.dropped.values()) <= 200
        again.close()


def test_samples_that_cannot_be_read_at_the_moment_are_kept(
        make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without descriptors, or without permission."""
    spool = make(limit=8192)
    for number in range(20):
        put(spool, number, size=100)
    stop = threading.Event()

    def fails(*_: Any) -> Any:
        stop.set()
        threading.Thread(target=spool.wake).start()
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    with monkeypatch.context() as context:
        context.setattr(os, "open", fails)
        assert spool.take(1, 0.0, stop) is None
    assert "cannot read segment 0000000000000001, retrying: permission denied" in caplog.text
    assert everything(spool, 500) == [*range(20)] and not spool.dropped


def test_a_damaged_cursor_sends_everything_again(make: Any, tmp_path: Path) -> None:
    spool = make()
    put(spool, 1)
    put(spool, 2)
    assert take(spool, 1) == [1]
    spool.close()
    assert everything(make()) == [2]
    spool = make()
    put(spool, 3)
    put(spool, 4)
    assert take(spool, 1) == [3]
    spool.close()
    (tmp_path / "sink" / "cursor").write_bytes(b"x" * 20)
    assert everything(make()) == [3, 4]


def test_records_of_another_sink_type_are_set_aside(make: Any, tmp_path: Path) -> None:
    spool = make()
    put(spool, 1)
    spool.close()
    other = make(form="graphite tagged")
    assert waiting(other) == 0
    reason, = (tmp_path / "sink" / "refused").glob("*/reason.txt")
    assert reason.read_text() == "written for http lines, but the sink is now graphite tagged\n"
    assert len(list(reason.parent.glob("*.log"))) == 1
    other.close()
    (tmp_path / "sink" / "form").write_bytes(b"\xff")       # damaged
    assert waiting(make()) == 0


def test_appending_while_taking_loses_nothing(make: Any) -> None:
    spool = make(limit=1 << 30)
    found: list[int] = []

    def consume() -> None:
        while len(found) < 3000:
            found.extend(take(spool, 300))
    thread = threading.Thread(target=consume)
    thread.start()
    for number in range(3000):
        put(spool, number, size=50)
    thread.join(30)
    assert found == list(range(3000))


def test_refused_records_are_bounded(make: Any, tmp_path: Path, clock: Clock) -> None:
    spool = make()
    for number in range(120):
        clock.now += 1
        spool.set_aside([b"%d" % number], "400 bad")
    folder = tmp_path / "sink" / "refused"
    assert len(list(folder.glob("*.records"))) == len(list(folder.glob("*.reason"))) == 100
    newest = max(folder.glob("*.records"))
    assert newest.read_bytes() == b"119\n"
    assert newest.with_suffix(".reason").read_text() == "1 samples: 400 bad\n"


def test_refused_records_without_reason_are_also_bounded(make: Any, tmp_path: Path, clock: Clock
                                                        ) -> None:
    spool = make()
    for number in range(105):
        clock.now += 1
        spool.set_aside([b"%d" % number], "400 bad")
        for path in (tmp_path / "sink" / "refused").glob("*.reason"):
            path.unlink()
    assert len(list((tmp_path / "sink" / "refused").glob("*.records"))) == 100


def test_a_reason_is_saved_in_any_locale(tmp_path: Path) -> None:
    said = "Gr\u00f6\u00dfe \u2026"                # by a server that speaks German
    script = ("import pathlib, cmon_forwarder; cmon_forwarder.Spool(pathlib.Path("
              f"{str(tmp_path)!r}), 'x', 9999).set_aside([b'a'], {ascii(said)})")
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True,
                   env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    path, = (tmp_path / "refused").glob("*.reason")
    assert path.read_text("utf-8") == f"1 samples: {said}\n"


# --- disks ----------------------------------------------------------------------------------------

@pytest.fixture()
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)],
                          stderr=subprocess.PIPE)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_drops_the_oldest_samples(make: Any, small_disk: Path) -> None:
    spool = make(limit=1 << 30, folder=small_disk)
    count = MEMORY_BYTES // 1000 + 3000
    for number in range(count):
        put(spool, number, size=1000)
    left = everything(spool)
    assert left == list(range(count - len(left), count))
    assert spool.dropped == {"disk full": count - len(left)}


def test_the_log_says_what_is_dropped_and_what_is_lost_at_the_end(
        make: Any, small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "cmon")
    spool = make(limit=1 << 30, folder=small_disk)
    fill(small_disk / "others")
    for number in range(MEMORY_BYTES // 1000 + 200):
        put(spool, number, size=1000)
    spool.close()
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "dropping samples" in line] == [
        f"spool {spool.folder}: disk full: dropping samples, the oldest first"]
    assert re.fullmatch(r"spool \S+: 4\d\d\d samples that the disk did not take are lost", said[-1])


def test_samples_wait_in_memory_while_the_disk_is_full(make: Any, small_disk: Path) -> None:
    spool = make(limit=1 << 30, folder=small_disk)
    other = small_disk / "others"
    fill(other)
    for number in range(100):
        put(spool, number, size=1000)
    assert waiting(spool) == 100 and spool.state()[1] < 10_000
    assert take(spool, 1) == [0]
    for number in range(100, MEMORY_BYTES // 1000 + 200):
        put(spool, number, size=1000)
    assert set(spool.dropped) == {"disk full"}
    other.unlink()
    put(spool, 10 ** 6)                     # now it goes to disk, the old ones first
    left = everything(spool)
    assert left == sorted(left) and left[-1] == 10 ** 6
    assert len(left) + sum(spool.dropped.values()) == MEMORY_BYTES // 1000 + 200
    fill(other)
    put(spool, *range(100), size=1000)
    assert spool.take(1 << 30, 0.0, STOP) is not None
    before = sum(spool.dropped.values())
    lost = waiting(spool)
    spool.close()                           # a batch that is under way, and on no disk
    assert sum(spool.dropped.values()) - before == lost - waiting(make(folder=small_disk))


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass


@pytest.mark.parametrize("seed", range(40))
def test_sent_waiting_and_dropped_samples_always_add_up(make: Any, tmp_path: Path, seed: int,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Full disks, crashes that leave torn entries, limits: all is delivered once and in order,
    counted as dropped, or there still. A held batch alone may go with its segment and a crash."""
    chance, real = random.Random(seed), os.write
    full = False

    def write(file: int, content: Any) -> int:
        if full and chance.random() < 0.7:
            raise OSError(errno.ENOSPC, "no space")
        return real(file, content[:chance.randrange(1, len(content) + 1)] if full else content)
    monkeypatch.setattr(os, "write", write)
    limit = chance.choice((4096, 8192, 20_000, 1 << 20))
    spool = make(limit)
    appended = dropped = 0
    delivered: list[int] = []
    for _ in range(200):
        action = chance.random()
        if action < 0.5:
            numbers = range(appended, appended + chance.randrange(1, 5))
            put(spool, *numbers, size=chance.choice((8, 50, 300, 1500)))
            appended = numbers[-1] + 1
        elif action < 0.75 and waiting(spool):
            batch = spool.take(chance.choice((1, 1000, 1 << 20)), 0.0, STOP)
            if chance.random() < 0.8:
                delivered += [int(record) for record in batch.records]
                spool.settle()
        elif action < 0.85:
            held, before = spool._held, waiting(spool)
            lost = sum(spool.dropped.values())
            if chance.random() < 0.5:
                spool.close()
                dropped += sum(spool.dropped.values())
                lost = sum(spool.dropped.values()) - lost
            else:                           # a crash: what is in memory only goes with it
                unwritten = sum(count for _, count, _ in spool._memory) + (
                    held.unwritten if held else 0)
                dropped, lost = dropped + lost + unwritten, unwritten
                for file in (spool._writer, spool._cursor, spool._reader and spool._reader[1]):
                    if file is not None:
                        os.close(file)
                if segments(tmp_path):
                    with open(segments(tmp_path)[-1], "ab") as torn:
                        torn.write(bytes(chance.randrange(40)))
            spool = make(limit)
            gap = before - lost - waiting(spool)
            assert 0 <= gap <= (len(held.records) if held else 0)
            dropped += gap
        else:
            full = not full
        assert appended == len(delivered) + waiting(spool) + dropped + sum(spool.dropped.values())
    full = False
    delivered += everything(spool)
    assert delivered == sorted(set(delivered))
    assert appended == len(delivered) + dropped + sum(spool.dropped.values())
    assert sum(path.stat().st_size for path in segments(tmp_path)) == 0
    spool.close()


def test_a_forwarder_continues_on_a_full_disk(small_disk: Path) -> None:
    source, sink = Source(5), HttpSink()
    try:
        config = write_config(small_disk, source, {
            "h": {"type": "http", "url": f"http://{sink.text}"}})
        with Program.forwarder(config) as program:
            wait_until(lambda: own(program, "sink_samples_sent_total") > 20)
            fill(small_disk / "others")
            sent = own(program, "sink_samples_sent_total")
            wait_until(lambda: own(program, "sink_samples_sent_total") > sent + 50)
            sink.close()
            program.wait_for_log("keeping up to 4 MiB of samples in memory")
            wait_until(lambda: own(program, "sink_spool_samples") > 50)
            (small_disk / "others").unlink()
            program.wait_for_log("writable again")
            sink.open()
            drained(program, "h")
            assert own(program, "sink_samples_dropped_total") == 0
    finally:
        source.close()
        sink.close()
    for number in range(5):
        values = [row["value"] for row in sink.rows() if row["name"] == "hits_total"
                  and row["labels"]["alias"] == f"web{number}"]
        assert sorted(set(values)) == list(range(1, values[-1] + 1))


def test_what_fails_at_the_end_is_in_the_log_like_everything_else(tmp_path: Path) -> None:
    source = Source()
    (tmp_path / "spool" / "counters.json").mkdir(parents=True)
    try:
        config = write_config(tmp_path, source, {
            "s": {"type": "statsd", "address": "127.0.0.1:1"}}, spool="spool")
        with Program.forwarder(config) as program:
            program.wait_for_log("listening on")
        assert re.fullmatch(r"[0-9-]{10} \S+ ERROR +\S+counters.json: is a directory.*",
                            program.log.splitlines()[-1])
    finally:
        source.close()


def test_an_unusable_spool_is_reported_at_start(tmp_path: Path) -> None:
    source = Source()
    try:
        (tmp_path / "taken").write_text("")
        for spool in ("taken", "taken/spool"):
            config = write_config(tmp_path, source, {"f": {"type": "file", "path": "x"}},
                                  spool=spool)
            program = Program.forwarder(config)
            assert program.wait() == 2
            assert f"spool {tmp_path / spool}: " in program.log and "Traceback" not in program.log
        (tmp_path / "s" / "f").mkdir(parents=True)
        (tmp_path / "s" / "f" / "cursor").mkdir()
        program = Program.forwarder(write_config(
            tmp_path, source, {"f": {"type": "file", "path": "x"}}, spool="s"))
        assert program.wait() == 2 and "spool" in program.log
    finally:
        source.close()


# --- files ----------------------------------------------------------------------------------------

def test_files_are_rotated_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "samples.log"
    transport = FileTransport(with_defaults(SinkSettings(
        type="file", path=path, rotate_bytes=10, keep=2)))
    for number in range(5):
        transport.send([b"%07d" % number])
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "samples.log", "samples.log.1", "samples.log.2"]
    assert [path.with_name(name).read_text() for name in (
        "samples.log", "samples.log.1", "samples.log.2")] == [
        "0000004\n", "0000003\n", "0000002\n"]
    os.rename(path, tmp_path / "elsewhere")         # by logadm
    transport.send([b"5"])
    assert path.read_text() == "5\n"
    transport.close()
    none = FileTransport(with_defaults(SinkSettings(
        type="file", path=path, rotate_bytes=3, keep=0)))
    none.send([b"6"])
    none.send([b"7"])
    assert path.read_text() == "7\n"
    none.close()


@pytest.mark.parametrize("before, after", [
    (b"", b"new\n"), (b"a\n", b"a\nnew\n"), (b'a\n{"na', b"a\nnew\n"),
    (b'{"name": "torn', b"new\n"), (b'a\n{"name": "' + b"x" * 200_000, b"a\nnew\n")])
def test_a_line_truncated_by_a_crash_is_removed(tmp_path: Path, before: bytes, after: bytes
                                               ) -> None:
    path = tmp_path / "samples.log"
    path.write_bytes(before)
    transport = FileTransport(with_defaults(SinkSettings(type="file", path=path)))
    transport.send([b"new"])
    transport.close()
    assert path.read_bytes() == after


def test_a_line_that_a_full_disk_has_cut_off_and_that_stays_is_taken_away_later(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "samples.log"
    transport = FileTransport(with_defaults(SinkSettings(type="file", path=path)))
    transport.send([b'{"name": "a"}'])
    write = os.write

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as disk:
        disk.setattr(os, "write", lambda file, view: write(file, view[:11]) if len(view) > 14
                     else full())
        disk.setattr(os, "ftruncate", full)
        with pytest.raises(RetryLater, match="no space left"):
            transport.send([b'{"name": "bbbbbbb"}'])
    transport.send([b'{"name": "c"}'])
    transport.close()
    assert path.read_bytes() == b'{"name": "a"}\n{"name": "c"}\n'


def test_a_foreign_file_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "report"
    path.write_bytes(b"a\nno newline at its end")
    transport = FileTransport(with_defaults(SinkSettings(type="file", path=path)))
    with pytest.raises(RetryLater, match="not a sample"):
        transport.send([b"new"])
    assert path.read_bytes() == b"a\nno newline at its end"


def test_a_file_system_without_locks_is_not_another_forwarder(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match="spool .*: cannot lock it: no locks available"):
        Forwarder(Settings(ProxySettings("http://127.0.0.1:1"), {}, spool=tmp_path))


# --- counters over a restart ----------------------------------------------------------------------

def test_saved_counters_are_used_once(tmp_path: Path) -> None:
    path = tmp_path / "counters.json"
    counters = {"a": {"x{b=\"1\"}": 2 ** 64 - 1, "y": 1.5}}
    write_counters(path, counters)
    assert read_counters(path) == counters
    assert read_counters(path) == {}
    for content in (b"", b"[]", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        assert read_counters(path) == {}
    path.write_bytes(b'{"a": {"x": "1", "y": 2}, "b": 3}')
    assert read_counters(path) == {"a": {"y": 2}}
    path.unlink(missing_ok=True)
    path.mkdir()
    assert read_counters(path) == {}
    write_counters(tmp_path / "no" / "counters.json", counters)
