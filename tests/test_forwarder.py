# SPDX-License-Identifier: MPL-2.0
"""The forwarder as a process: scrapes, failing sinks, stops and restarts."""
from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from forwarding import (
    HttpSink, LineSink, Source, UdpSink, drained, increases_seen, own, uuid_of, write_config)
from support import ROOT, Program, http_get, wait_until

from cmon_forwarder import offset_of, read_targets, retry_after, DiscoveryError

Keep = Callable[[Any], Any]


def run(config: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-sE", str(ROOT / "cmon_forwarder.py"), "--config", str(config), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=60)


def named(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return [row["value"] for row in rows if row["name"] == name]


# --- discovery and scraping -----------------------------------------------------------------------

def test_every_sample_arrives_with_its_target(tmp_path: Path, keep: Keep) -> None:
    source, sink = keep(Source(3)), keep(HttpSink())
    config = write_config(tmp_path, source, {"h": {"type": "http", "url": f"http://{sink.text}"}},
                          groups=["a b", "c"], shard="1/2", labels={"site": "s1"}, interval=0.2)
    with Program.forwarder(config) as program:
        wait_until(lambda: len(named(sink.rows(), "up")) >= 9)
        assert http_get(program.address, "/-/ready").status == 200
    rows = sink.rows()
    assert {row["labels"]["instance"] for row in rows} == {uuid_of(one) for one in range(3)}
    for number in range(3):
        mine = [row for row in rows if row["labels"] == {
            "alias": f"web{number}", "instance": uuid_of(number), "site": "s1"}]
        assert named(mine, "hits_total") == list(range(1, len(named(mine, "hits_total")) + 1))
        assert set(named(mine, "level")) == {-1.5} and set(named(mine, "up")) == {1}
        assert set(named(mine, "scrape_samples_scraped")) == {2}
        assert all(0 <= value < 10 for value in named(mine, "scrape_duration_seconds"))
        times = [row["timestamp"] for row in mine if row["name"] == "up"]
        assert times == sorted(times) and abs(times[-1] - time.time()) < 60
    paths = {path for path, _ in source.requests}
    assert "/v1/sd?groups=a+b%2Cc&shard=1%2F2" in paths
    headers = dict(next(headers for path, headers in source.requests if "metrics" in path))
    assert headers["x-prometheus-scrape-timeout-seconds"] == "0.2"
    assert headers["host"] == source.text and headers["accept-encoding"] == "gzip"
    assert source.connections <= 4      # kept


def test_a_silent_container_is_down_and_a_removed_one_sends_nothing(tmp_path: Path, keep: Keep
                                                                   ) -> None:
    source, sink = keep(Source(2)), keep(HttpSink())
    config = write_config(tmp_path, source, {"h": {"type": "http", "url": f"http://{sink.text}"}})
    with Program.forwarder(config) as program:
        wait_until(lambda: len(named(sink.rows(), "up")) >= 4)
        source.status[f"/v1/{uuid_of(0)}/metrics"] = 503
        wait_until(lambda: 0 in named(sink.rows(), "up"))
        down = [row for row in sink.rows() if row["name"] == "up" and row["value"] == 0]
        assert {row["labels"]["alias"] for row in down} == {"web0"}
        at = down[0]["timestamp"]
        assert not [row for row in sink.rows() if row["timestamp"] == at
                    and row["name"] in ("hits_total", "level")]
        # discovery that fails changes nothing
        source.status["/v1/sd"] = 500
        program.wait_for_log("discovery at .* failed, keeping 2 targets: 500")
        count = len(named(sink.rows(), "up"))
        wait_until(lambda: len(named(sink.rows(), "up")) >= count + 4)
        source.status.clear()
        del source.containers[0]
        wait_until(lambda: own(program, "targets") == 1)
        drained(program, "h")
        count = len(sink.rows())
        wait_until(lambda: len(sink.rows()) >= count + 10)
        assert {row["labels"]["alias"] for row in sink.rows()[count:]} == {"web1"}


@pytest.mark.parametrize("body", [
    b"", b"{}", b"[1]", b'[{"labels": {"instance": 5}}]', b'[{"labels": {"instance": "a"}}]',
    b'[{"labels": {"instance": "a", "__metrics_path__": "x"}}]', b"\xff", b"[" * 10 ** 6,
    b'[{"labels": {"instance": "a", "__metrics_path__": "/x\\r\\ny"}}]',
    b'[{"labels": {"__metrics_path__": "/x"}}]'])
def test_an_invalid_list_of_targets_is_rejected(body: bytes) -> None:
    with pytest.raises(DiscoveryError):
        read_targets(body, {})


def test_a_lone_surrogate_in_an_alias_is_replaced() -> None:
    target = read_targets(b'[{"labels": {"instance": "a", "__metrics_path__": "/x", '
                          b'"__meta_triton_machine_alias": "web\\ud800"}}]', {})["a"]
    assert target.alias == "web?" and target.labels == (("alias", "web?"), ("instance", "a"))


def test_targets_are_spread_over_the_interval() -> None:
    offsets = sorted(offset_of(uuid_of(number), 30.0) for number in range(5000))
    assert all(0 <= offset < 30 for offset in offsets)
    for second in range(30):
        assert 100 < sum(second <= offset < second + 1 for offset in offsets) < 240


def test_concurrent_scrapes_are_bounded_and_late_ones_skipped(tmp_path: Path, keep: Keep) -> None:
    source, sink = keep(Source(6)), keep(HttpSink())
    flying = most = 0

    def page(number: int) -> str:
        nonlocal flying, most
        with source.lock:
            flying += 1
            most = max(most, flying)
        time.sleep(0.15)
        with source.lock:
            flying -= 1
        return "# TYPE a gauge\na 1\n"
    source.page = page
    config = write_config(tmp_path, source, {"h": {"type": "http", "url": f"http://{sink.text}"}},
                          max_in_flight=2, interval=0.2)
    with Program.forwarder(config) as program:
        wait_until(lambda: own(program, "scrapes_skipped_total") > 3)
        wait_until(lambda: len(named(sink.rows(), "up")) > 6)
    assert most <= 2


def test_a_hanging_page_is_down_after_its_timeout(tmp_path: Path, keep: Keep) -> None:
    source, sink = keep(Source(2)), keep(HttpSink())
    real = source.page

    def page(number: int) -> str:
        if number == 0:
            time.sleep(5)
        return real(number)
    source.page = page
    config = write_config(tmp_path, source, {"h": {"type": "http", "url": f"http://{sink.text}"}})
    with Program.forwarder(config):
        wait_until(lambda: {(row["labels"]["alias"], row["value"]) for row in sink.rows()
                            if row["name"] == "up"} >= {("web0", 0), ("web1", 1)})
    assert not [row for row in sink.rows() if row["name"] == "up" and row["value"] == 1
                and row["labels"]["alias"] == "web0"]


# --- delivery -------------------------------------------------------------------------------------

def check_account(rows: list[dict[str, Any]], first: int = 1) -> None:
    """Each value of the counter is there, in order; some may be there twice."""
    values = named(rows, "hits_total")
    assert values == sorted(values)
    assert sorted(set(values)) == list(range(first, values[-1] + 1))


def test_temporary_failures_are_retried_in_order(tmp_path: Path, keep: Keep) -> None:
    source = keep(Source())
    sinks: dict[str, HttpSink] = {}
    for name, answers in (
            ("busy", [500, 503]), ("soon", [(429, "Retry-After: 0\r\n")]),
            ("later", [(503, "Retry-After: 1\r\n"), 408]), ("cut", ["cut", 204, "cut"]),
            ("moved", [301])):
        sinks[name] = keep(HttpSink())
        sinks[name].answers = list(answers)
    config = write_config(tmp_path, source, {
        name: {"type": "http", "url": f"http://{sink.text}"} for name, sink in sinks.items()})
    with Program.forwarder(config) as program:
        for name, sink in sinks.items():
            wait_until(lambda: not sink.answers and len(named(sink.rows(), "hits_total")) > 8)
            assert own(program, "sink_failures_total", sink=name) >= 1
            program.wait_for_log(f"sink {name}: delivery failed")
            program.wait_for_log(f"sink {name}: delivery works again")
        assert own(program, "sink_samples_dropped_total") == 0
    for sink in sinks.values():
        check_account(sink.rows())


def test_refused_records_are_set_aside_and_large_batches_halved(tmp_path: Path, keep: Keep) -> None:
    source = keep(Source(8))
    refusing, small, picky = keep(HttpSink()), keep(HttpSink()), keep(HttpSink())
    refusing.answers = [204, (400, "X: y\r\n"), 204, 403]
    small.default = lambda body: 413 if body.count(b"\n") > 3 else 200
    picky.default = lambda body: 413 if b"level" in body else 200
    config = write_config(tmp_path, source, {
        name: {"type": "http", "url": f"http://{sink.text}"} for name, sink in (
            ("refusing", refusing), ("small", small), ("picky", picky))})
    with Program.forwarder(config) as program:
        wait_until(lambda: len(named(refusing.rows(), "hits_total")) > 40
                   and not refusing.answers)
        wait_until(lambda: len(named(small.rows(), "hits_total")) > 24)
        wait_until(lambda: len(named(picky.rows(), "hits_total")) > 24)
        refused = own(program, "sink_samples_refused_total", sink="refusing")
        assert own(program, "sink_samples_refused_total", sink="small") == 0
        assert own(program, "sink_samples_refused_total", sink="picky") > 2
        program.wait_for_log("sink refusing refused samples for good .*saved in .*refused.: 400", 1)
    folder = tmp_path / "spool" / "refusing" / "refused"
    reasons = sorted(folder.glob("*.reason"))
    assert [path.read_text().split(": ")[1][:3] for path in reasons] == ["400", "403"]
    aside = [json.loads(line) for path in sorted(folder.glob("*.records"))
             for line in path.read_text().splitlines()]
    assert len(aside) == refused
    for rows in (sorted(refusing.rows() + aside, key=lambda row: row["timestamp"]),
                 small.rows(), picky.rows()):
        for number in range(8):
            check_account([row for row in rows if row["labels"]["alias"] == f"web{number}"])
    assert max(body.count(b"\n") for body in small.accepted) <= 3
    assert "level" not in {row["name"] for row in picky.rows()}


def test_a_sink_that_refuses_samples_is_not_up(tmp_path: Path, keep: Keep) -> None:
    source, sink = keep(Source()), keep(HttpSink())
    sink.default = 401
    config = write_config(tmp_path, source, {"h": {"type": "http", "url": f"http://{sink.text}"}})
    with Program.forwarder(config) as program:
        wait_until(lambda: own(program, "sink_up", sink="h") == 0)
        assert "refuses samples: 401" in http_get(program.address, "/").text
        sink.default = 204
        wait_until(lambda: own(program, "sink_up", sink="h") == 1)


def test_dead_and_slow_sinks_delay_nobody(tmp_path: Path, keep: Keep) -> None:
    source, sink, hanging = keep(Source(3)), keep(HttpSink()), keep(HttpSink())
    slow, mute = keep(LineSink()), keep(LineSink())
    hanging.default, slow.mode, mute.mode = "hang", "slow", "mute"
    config = write_config(tmp_path, source, {
        "hanging": {"type": "http", "url": f"http://{hanging.text}"},
        "slow": {"type": "graphite", "address": slow.text, "timeout": 1},
        "mute": {"type": "graphite", "address": mute.text, "timeout": 1},
        "dead": {"type": "influxdb", "url": "http://127.0.0.1:1", "database": "d"},
        "h": {"type": "http", "url": f"http://{sink.text}"}})
    began = time.monotonic()
    with Program.forwarder(config) as program:
        wait_until(lambda: len(named(sink.rows(), "up")) >= 30)
        assert own(program, "sink_spool_samples", sink="dead") > 0
        assert own(program, "sink_spool_oldest_seconds", sink="dead") > 0
        page = http_get(program.address, "/").text
        for name in ("hanging", "slow", "mute", "dead", "h"):
            assert f'<th scope="row">{name}</th>' in page
        assert "connection refused" in page
        # it has all, although it never ends its side
        program.wait_for_log("cannot tell whether deliveries arrive")
        wait_until(lambda: own(program, "sink_samples_sent_total", sink="mute") > 0)
        for one in (hanging, slow, mute):   # the end waits some seconds for what is under way
            one.close()
    for number in range(3):
        check_account([row for row in sink.rows() if row["labels"]["alias"] == f"web{number}"])
    assert time.monotonic() - began < 60


def graphite_values(sink: LineSink) -> list[int]:
    return [int(line.split()[1]) for line in sink.lines() if line.startswith("hits_total")]


def test_lines_unread_by_a_dying_sink_are_sent_again(tmp_path: Path, keep: Keep) -> None:
    source, sink = keep(Source()), keep(LineSink())
    sink.mode = "cut"
    config = write_config(tmp_path, source, {"g": {"type": "graphite", "address": sink.text}})
    with Program.forwarder(config) as program:
        program.wait_for_log("sink g: delivery failed")
        sink.mode = "all"
        wait_until(lambda: len(graphite_values(sink)) > 5)
        sink.close()
        wait_until(lambda: own(program, "sink_spool_samples") > 20)
        sink.open()
        count = len(graphite_values(sink))
        wait_until(lambda: len(graphite_values(sink)) > count + 5)
    values = graphite_values(sink)
    assert values == list(range(1, len(values) + 1))


# --- counters -------------------------------------------------------------------------------------

def test_increases_add_up_across_restarts_resets_and_outages(tmp_path: Path, keep: Keep) -> None:
    source, sink = keep(Source()), keep(UdpSink())
    source.step = 7
    config = write_config(tmp_path, source, {
        "s": {"type": "statsd", "address": sink.text},
        "f": {"type": "file", "path": "samples.log"}})

    def grown() -> int:
        """The values in the file; the first value after a reset counts from zero."""
        values = named([json.loads(line) for line in (tmp_path / "samples.log").read_text(
            ).splitlines()], "hits_total")
        return sum(now - before if now >= before else now
                   for before, now in zip(values, values[1:]))
    with Program.forwarder(config) as program:
        wait_until(lambda: len(sink.lines()) > 10)
        sink.close()                                        # away
        program.wait_for_log("sink s: delivery failed")
        wait_until(lambda: own(program, "sink_spool_samples", sink="s") > 20)
        sink.open()
        program.wait_for_log("sink s: delivery works again")
    source.counters[0] += 1_000_000                         # while the forwarder is away
    with Program.forwarder(config) as program:
        wait_until(lambda: increases_seen(sink.lines(), "cmon.web0.hits_total") > 1_000_000)
        source.counters[0] = 0                              # a reset
        count = len(sink.lines())
        wait_until(lambda: len(sink.lines()) > count + 10)
    with Program.forwarder(config) as program:
        source.step = 0
        count = len(sink.lines())
        wait_until(lambda: len(sink.lines()) > count + 20)
        drained(program, "s")
        drained(program, "f")
    wait_until(lambda: increases_seen(sink.lines(), "cmon.web0.hits_total") == grown())
    lines = sink.lines()
    assert grown() > 1_000_000
    assert "-" not in "".join(line for line in lines if line.endswith("|c"))
    assert [line for line in lines if "level" in line][:2] == [
        "cmon.web0.level:0|g", "cmon.web0.level:-1.5|g"]


# --- ends and restarts ----------------------------------------------------------------------------

def test_waiting_samples_survive_sigterm(tmp_path: Path, keep: Keep) -> None:
    source, sink = keep(Source()), keep(HttpSink())
    sink.close()
    config = write_config(tmp_path, source, {"h": {"type": "http", "url": f"http://{sink.text}"}})
    for _ in range(2):
        with Program.forwarder(config) as program:
            before = own(program, "sink_spool_samples")
            wait_until(lambda: own(program, "sink_spool_samples") > before + 20)
    sink.open()
    with Program.forwarder(config):
        wait_until(lambda: len(named(sink.rows(), "hits_total")) > 12)
    check_account(sink.rows())


def test_scraped_samples_survive_kill_9(tmp_path: Path, keep: Keep) -> None:
    """At random moments under load; run by hand with CMON_KILLS=50."""
    source, sink = keep(Source(20)), keep(HttpSink())
    sink.default = lambda body: 503 if len(body) % 3 == 0 else 204
    seed = int(os.environ.get("CMON_SEED", time.time_ns() % 10 ** 6))
    print("CMON_SEED", seed)
    chance = random.Random(seed)
    config = write_config(tmp_path, source, {
        "h": {"type": "http", "url": f"http://{sink.text}", "batch_bytes": 2000},
        "f": {"type": "file", "path": "samples.log"}}, interval=0.1)
    kills = int(os.environ.get("CMON_KILLS", 4))
    for _ in range(kills):
        program = Program.forwarder(config)
        program.addresses()
        time.sleep(chance.random() * 0.7)
        program.kill()
    sink.default = 204
    source.page = lambda number: "# TYPE last gauge\nlast 1\n"
    with Program.forwarder(config) as program:
        wait_until(lambda: {row["labels"]["alias"] for row in sink.rows()
                            if row["name"] == "last"} == set(source.containers.values()))
        drained(program, "h")
        drained(program, "f")
    for rows in (sink.rows(), [json.loads(line) for line in (
            tmp_path / "samples.log").read_text().splitlines()]):
        for number in range(20):
            mine = [row for row in rows if row["labels"]["alias"] == f"web{number}"]
            values = named(mine, "hits_total")
            # not scraped: what was on its way when the process was killed, or came too late
            missing = set(range(1, source.counters[number] + 1)) - set(values)
            assert len(missing) <= kills + named(mine, "up").count(0)
            # sent again after a failure: a run of values may repeat, as a whole
            seen: set[float] = set()
            fresh = [row["timestamp"] for row in mine if row["name"] == "up"
                     and not (row["timestamp"] in seen or seen.add(row["timestamp"]))]
            assert fresh == sorted(fresh)


def test_sighup_applies_settings_without_loss(tmp_path: Path, keep: Keep) -> None:
    source, first, second = keep(Source()), keep(HttpSink()), keep(HttpSink())

    def config(**more: Any) -> Path:
        return write_config(tmp_path, source, more.pop("sinks"), **more)
    path = config(sinks={"h": {"type": "http", "url": f"http://{first.text}"}})
    with Program.forwarder(path) as program:
        wait_until(lambda: len(named(first.rows(), "hits_total")) > 3)
        first.close()
        program.wait_for_log("sink h: delivery failed")
        config(sinks={"h": {"type": "http", "url": f"http://{second.text}"},
                      "new": {"type": "file", "path": "new.log"}}, labels={"site": "x"},
               interval=0.3)
        program.signal(signal.SIGHUP)
        program.wait_for_log("settings reloaded")
        wait_until(lambda: len(named(second.rows(), "hits_total")) > 5)
        wait_until(lambda: any(row["labels"].get("site") == "x" for row in second.rows()))
        wait_until((tmp_path / "new.log").exists)
        (tmp_path / "spool" / "blocked").write_text("")
        for sinks, more, message in [
                ({"h": {"type": "file", "path": "x"}}, {}, "cannot change type or form"),
                ({"h": {"type": "nope"}}, {}, "must be one of"),
                ({"blocked": {"type": "file", "path": "x"}}, {}, "spool .*blocked"),
                ({"h": {"type": "file", "path": "x"}}, {"spool": "elsewhere"}, "spool: cannot"),
                ({"h": {"type": "http", "url": "https://x", "ca": "no.pem"}}, {}, "no.pem")]:
            config(sinks=sinks, **more)
            program.signal(signal.SIGHUP)
            program.wait_for_log(f"keeping the old settings: .*{message}")
        config(sinks={"h": {"type": "http", "url": f"http://{second.text}"}})
        program.signal(signal.SIGHUP)
        program.wait_for_log("settings reloaded", 2)
        wait_until(lambda: own(program, "sink_up", sink="h") == 1)
        assert "new" not in http_get(program.address, "/metrics").text.split("sink=")[1]
    check_account(first.rows() + second.rows())


@pytest.mark.parametrize("prepare", [
    lambda spool: spool.chmod(0o777), lambda spool: os.chown(spool, 12345, -1),
    lambda spool: (spool.rename(spool.with_name("s")), spool.symlink_to("s"),
                   os.chown(spool, 12345, -1, follow_symlinks=False))],
    ids=["writable by all", "another user's", "another user's link"])
def test_a_spool_that_other_users_can_write_to_is_refused(
        prepare: Callable[[Path], Any], tmp_path: Path, keep: Keep) -> None:
    config = write_config(tmp_path, keep(Source()), {"f": {"type": "file", "path": "x.log"}})
    spool = tmp_path / "spool"
    spool.mkdir()
    prepare(spool)
    for flag in ("--once", "--check-config"):
        done = run(config, flag)
        assert (done.returncode, list(spool.iterdir())) == (2, [])
        assert done.stderr == (f"cmon_forwarder: spool {spool}: other users can write there; set a "
                               "folder that only this user can write to\n")


def test_two_forwarders_do_not_share_a_spool(tmp_path: Path, keep: Keep) -> None:
    source = keep(Source())
    config = write_config(tmp_path, source, {"f": {"type": "file", "path": "x.log"}})
    with Program.forwarder(config) as program:
        program.addresses()
        done = run(config, "--once")
        assert done.returncode == 2 and "in use by another forwarder" in done.stderr


# --- a round by hand ------------------------------------------------------------------------------

def test_dry_run_prints_what_would_be_sent(tmp_path: Path, keep: Keep) -> None:
    source = keep(Source(2))
    config = write_config(tmp_path, source, {
        "i": {"type": "influxdb", "url": "http://127.0.0.1:1", "database": "d"},
        "r": {"type": "remote_write", "url": "http://127.0.0.1:1"}})
    done = run(config, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 20
    assert [line for line in lines if line.startswith("hits_total,alias=web0,instance=")]
    assert [line for line in lines if line.startswith('hits_total{alias="web1",instance=')]
    assert "sink i (influxdb): 10 samples to http://127.0.0.1:1/write?db=d" in done.stderr
    assert not (tmp_path / "spool").exists()


def test_once_succeeds_only_when_all_is_accepted(tmp_path: Path, keep: Keep) -> None:
    source, sink = keep(Source(2)), keep(HttpSink())
    sinks = {"h": {"type": "http", "url": f"http://{sink.text}"}}
    config = write_config(tmp_path, source, sinks)
    done = run(config, "--once")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "h: 10 samples sent, 0 waiting, 0 refused, 0 dropped\n"
    assert len(sink.rows()) == 10
    sink.default = 400
    done = run(config, "--once")
    assert done.returncode == 1 and "sink h: refuses samples: 400" in done.stderr
    sink.close()
    done = run(config, "--once")
    assert done.returncode == 1 and "connection refused" in done.stderr
    assert "10 waiting" in done.stdout
    sink.default = 204
    sink.open()
    assert run(config, "--once").returncode == 0        # and what waited
    assert len(sink.rows()) == 30
    source.close()
    done = run(config, "--once")
    assert done.returncode == 1 and "discovery at" in done.stderr


def test_repeated_runs_with_once_give_increases(tmp_path: Path, keep: Keep) -> None:
    source, sink = keep(Source()), keep(UdpSink())
    source.step = 5
    config = write_config(tmp_path, source, {"s": {"type": "statsd", "address": sink.text}})
    for _ in range(3):
        assert run(config, "--once").returncode == 0
    wait_until(lambda: increases_seen(sink.lines(), "cmon.web0.hits_total") == 10)


def test_check_config_reaches_the_proxy_and_every_sink(tmp_path: Path, keep: Keep) -> None:
    source, sink, lines, udp = keep(Source()), keep(HttpSink()), keep(LineSink()), keep(UdpSink())
    good = {"h": {"type": "http", "url": f"http://{sink.text}"},
            "g": {"type": "graphite", "address": lines.text},
            "s": {"type": "statsd", "address": udp.text}, "f": {"type": "file", "path": "x.log"}}
    done = run(write_config(tmp_path, source, good, spool="new/spool"), "--check-config")
    assert (done.returncode, done.stdout, done.stderr) == (
        0, "cmon_forwarder: the settings are good\n", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forwarder.json"]
    sink.close()
    lines.close()
    source.status["/v1/sd"] = 401
    os.mkfifo(tmp_path / "pipe")
    bad = {**good, "f": {"type": "file", "path": "no/x.log"},
           "p": {"type": "file", "path": "pipe"},
           "n": {"type": "statsd", "address": "no.such.host.invalid:1"},
           "t": {"type": "http", "url": f"http://{sink.text}", "token_file": "none"},
           "c": {"type": "http", "url": "https://127.0.0.1:1", "ca": "none.pem"}}
    done = run(write_config(tmp_path, source, bad, spool="pipe/spool"), "--check-config")
    assert done.returncode == 2
    said = done.stderr.splitlines()
    for part in ("proxy: 401", "sinks.h: cannot use http://", "sinks.g: cannot use 127.0.0.1",
                 "sinks.f: cannot use ", "sinks.n: cannot use no.such.host.invalid:1: the name",
                 "sinks.t: cannot use ", "sinks.c: ",
                 f"spool {tmp_path}/pipe/spool: not a directory",
                 f"sinks.p: cannot use {tmp_path}/pipe: is a pipe: use a regular file"):
        assert [line for line in said if line.startswith(f"cmon_forwarder: {part}")], part
    assert len(said) == 9


@pytest.mark.parametrize("value, seconds", [
    ("5", 5), ("0", None), ("999999", 3600), ("Thu, 01 Jan 1970 00:01:40 GMT", 90),
    ("Thu, 01 Jan 1970 00:00:01 GMT", None), ("soon", None), ("", None), ("-5", None),
    ("1e9", None)])
def test_retry_after_is_read(value: str, seconds: float | None) -> None:
    assert retry_after(value, 10.0) == seconds


def test_smf_start_returns_when_it_listens(tmp_path: Path, keep: Keep) -> None:
    source = keep(Source())
    config = write_config(tmp_path, source, {"f": {"type": "file", "path": "x.log"}},
                          log_format="text")
    started = subprocess.Popen([sys.executable, str(ROOT / "cmon_forwarder.py"), "--smf",
                                "--config", str(config)], stderr=subprocess.PIPE)
    assert started.wait(30) == 0
    assert started.stderr is not None
    wait_until((tmp_path / "x.log").exists)
    held = []
    for words in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(config).encode() in words.read_bytes():
                held.append(int(words.parent.name))
    for pid in held:
        os.kill(pid, signal.SIGTERM)
    assert b"listening on 127.0.0.1:" in started.stderr.read() and len(held) == 1
    config.write_text("{}")
    done = run(config, "--smf")
    assert done.returncode == 96 and "proxy: is missing" in done.stderr
