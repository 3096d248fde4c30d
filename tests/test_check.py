# SPDX-License-Identifier: MPL-2.0
"""`cmon.py check` as Nagios and Icinga run it: one line, exit status, readings kept for rates."""
from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Program, free_port
from test_monitor import inside
from test_cmon import (  # noqa: F401  (fixtures are used by name)
    CMON, CONTAINERS, Answer, Files, StandIn, connection, container, files, proxy, run,
)

UUIDS = [one["vm_uuid"] for one in CONTAINERS]
PAGE = """\
# TYPE load gauge
load 5
# TYPE mem gauge
mem 50
limit 200
# TYPE drops counter
drops{interface="vnic0",tag="a"} 10
drops{interface="vnic1",tag="a"} 40
# TYPE mem_agg_usage gauge
mem_agg_usage 9007199254740993
# TYPE net_agg_bytes_in counter
net_agg_bytes_in 7
# TYPE cpucap_cur_usage_percentage gauge
cpucap_cur_usage_percentage 239
# TYPE mem_fault_throttle_seconds_total counter
mem_fault_throttle_seconds_total 2.5
zero 0
nan NaN
cmon_collector_up{collector="cpucap"} 1
cmon_collector_up{collector="zfs"} 1
"""
FLEET = """\
cmon_client_certificate_expiry_timestamp_seconds{{subject="CN=al ice"}} {}
cmon_quota_used 0.25
"""


@pytest.fixture()
def check(proxy: StandIn, files: Files, tmp_path: Path) -> Callable[..., Any]:  # noqa: F811
    """Runs a check; `check.page` and `check.fleet` set the proxy's answers."""
    def go(*arguments: Any, url: str = "", run: Any = inside, **more: Any) -> tuple[int, str]:
        done = run("check", *arguments, *connection(url or proxy, files), **{
            "env": {"XDG_CACHE_HOME": str(tmp_path / "cache")}, **more})
        assert done.stderr == ""
        assert done.stdout.count("\n") == 1 and done.stdout.startswith("CMON ")
        assert done.stdout.startswith("CMON " + ("OK", "WARNING", "CRITICAL", "UNKNOWN")[
            done.returncode] + ": ")
        return done.returncode, done.stdout[:-1]

    def lay(text: str, index: int = 0, status: int = 200) -> None:
        proxy.answers[f"/v1/{UUIDS[index]}/metrics"] = Answer(status, text.encode())

    def fleet(text: str) -> None:
        proxy.answers["/v1/fleet/metrics"] = Answer(200, text.encode())
    setattr(go, "page", lay)
    setattr(go, "fleet", fleet)
    lay(PAGE)
    fleet(FLEET.format(f"{time.time() + 40 * 86400:.0f}"))
    return go


# --- one container --------------------------------------------------------------------------------

@pytest.mark.parametrize("words, status, line", [
    (["load"], 0, "CMON OK: load is 5 | 'load'=5;;"),
    (["load,10,20"], 0, "CMON OK: load is 5 | 'load'=5;10;20"),
    (["load,4,8"], 1, "CMON WARNING: load is 5 (outside 0:4) | 'load'=5;4;8"),
    (["load,,4"], 2, "CMON CRITICAL: load is 5 (outside 0:4) | 'load'=5;;4"),
    (["load,@4:6"], 1, "CMON WARNING: load is 5 (inside 4:6) | 'load'=5;@4:6;"),
    (["load,~:,6:"], 2, "CMON CRITICAL: load is 5 (outside 6:) | 'load'=5;~:;6:"),
    (["mem/limit,0.2,0.5"], 1,
     "CMON WARNING: mem/limit is 25.0 % (outside 0:0.2) | 'mem/limit'=0.25;0.2;0.5"),
    (['drops{interface="vnic1"},50'], 0, "CMON OK: drops{interface=\"vnic1\"} is 40 | "
     "'drops{interface:vnic1}'=40c;50;"),
    # of several samples the worst counts
    (["drops,20,50"], 1, "CMON WARNING: drops vnic1 is 40 (outside 0:20) | "
     "'drops vnic0'=10c;20;50 'drops vnic1'=40c;20;50"),
    (["load,9", "drops,,20"], 2, "CMON CRITICAL: drops vnic1 is 40 (outside 0:20) | "
     "'load'=5;9; 'drops vnic0'=10c;;20 'drops vnic1'=40c;;20"),
    # units of the metrics, exact numbers
    (["mem_agg_usage"], 0, "CMON OK: mem_agg_usage is 8 PiB | 'mem_agg_usage'=9007199254740993B;;"),
    (["cpucap_cur_usage_percentage,300"], 0, "CMON OK: cpucap_cur_usage_percentage is 239 % | "
     "'cpucap_cur_usage_percentage'=239%;300;"),
    (["net_agg_bytes_in"], 0, "CMON OK: net_agg_bytes_in is 7 B | 'net_agg_bytes_in'=7c;;"),
    # never OK for what is not known
    (["missing"], 3, "CMON UNKNOWN: no sample of missing"),
    (["load,4,8", "missing"], 1, None),
    (["load", "missing"], 3, None),
    (["load/missing"], 3, "CMON UNKNOWN: no sample of missing"),
    (["load/zero"], 3, "CMON UNKNOWN: load/zero has no value: B is zero or has no sample with "
     "the same labels"),
    (["nan"], 3, "CMON UNKNOWN: no sample of nan"),
    (["rate(load)"], 3, "CMON UNKNOWN: load is a gauge: rate() needs a counter"),
    (["load,8:4"], 3, "CMON UNKNOWN: '8:4' is not a range: its start is greater than its end"),
    (["load,x"], 3, "CMON UNKNOWN: 'x' is not a range: 10, 10:, ~:10, 10:20 or @10:20"),
    (["load,1,2,3"], 3, None), (["load;1"], 3, None), ([""], 3, None),
    ([], 0, "CMON OK: cmon_collector_up is 1 (2 samples) | "
     "'cmon_collector_up cpucap'=1;1:; 'cmon_collector_up zfs'=1;1:;"),
], ids=str)
def test_a_container(words: list[str], status: int, line: str | None, check: Any) -> None:
    got = check("web01", *words)
    assert got[0] == status, got
    assert line is None or got[1] == line


def test_a_process_has_the_exit_status_of_its_line(check: Any) -> None:
    assert [check("web01", words, run=run)[0] for words in (
        "load", "load,4", "load,,4", "missing", "load,,x")] == [0, 1, 2, 3, 3]


def test_a_collector_that_failed_is_a_warning(check: Any) -> None:
    check.page(PAGE + 'cmon_collector_up{collector="tcp"} 0\n')
    status, line = check("web01")
    assert status == 1 and "cmon_collector_up tcp is 0 (outside 1:) | " in line


def test_values_of_a_page_cannot_break_the_output_line(check: Any) -> None:
    check.page('x{a="\\n|\'=;é\x1b[2J"} 1\nx{a="b"} 2\n')
    status, line = check("web01", "x")
    assert status == 0 and "\x1b" not in line
    assert line.count("|") == 1
    assert line.endswith("| 'x /:;é?[2J'=1;; 'x b'=2;;")


def test_many_samples_stay_within_one_line_for_nagios(check: Any) -> None:
    check.page("".join(f'x{{a="{number:050}"}} {number}\n' for number in range(1000)))
    status, line = check("web01", "x,,5:")
    assert status == 2 and len(line) <= 8192 and "and 0 more" not in line
    assert re.search(r"x 0{50} is 0 \(outside 5:\), ", line)
    assert re.search(r"=\d+;;5:$", line)


# --- what is not there ----------------------------------------------------------------------------

def test_a_dead_proxy_is_unknown(check: Any) -> None:
    dead = f"https://127.0.0.1:{free_port()}"
    for arguments in (["web01", "load"], [UUIDS[0], "load"], ["--all", "load"], ["--proxy"],
                      ["--certificate"], ["--groups", "a"]):
        status, line = check(*arguments, url=dead)
        assert status == 3 and "connection refused" in line


@pytest.mark.parametrize("answer, words", [
    (Answer(503, b"the node is silent\n"), "says 503: the node is silent"),
    (Answer(429, b"quota\n"), "says 429: quota"), (Answer(401, b"who?\n"), "says 401"),
    (Answer(200, b"<html>"), "not in Prometheus' text format"),
    (Answer(200, b""), "no sample of load")])
def test_a_missing_page_is_unknown(answer: Answer, words: str, check: Any,
                                              proxy: StandIn) -> None:  # noqa: F811
    proxy.answers[f"/v1/{UUIDS[0]}/metrics"] = answer
    status, line = check("web01", "load")
    assert status == 3 and words in line


@pytest.mark.parametrize("arguments, words", [
    ([], "nothing to check"), (["--all", "--proxy"], "not allowed with argument"),
    (["web01", "--nonsense"], "unrecognized arguments: --nonsense"),
    (["web01", "--certifcate"], "--certifcate; did you mean --certificate?"),
    (["web01", "load", "--timeout", "0"], "is not a number of seconds"),
    (["nobody"], "no container 'nobody'"), (["db"], "use the UUID"),
    (["--all", "web01"], "web01 is a container: with --all or --groups, say only what to check"),
    (["web01", "-w", "4", "-c", "8"], "no -c: append the ranges to the metric"),
    (["web01", "net_agg_byte_in"], "no sample of net_agg_byte_in; did you mean net_agg_bytes_in?"),
    (["--groups", "a,b"], "no running containers in a,b")])
def test_a_wrong_command_line_is_unknown(arguments: list[str], words: str, check: Any) -> None:
    status, line = check(*arguments)
    assert status == 3 and words in line


def test_flags_may_come_between_the_container_and_what_to_check(
        check: Any, proxy: StandIn) -> None:  # noqa: F811
    proxy.answers[f"/v1/{UUIDS[0]}/metrics"] = Answer(200, b"load 5\n")
    status, line = check("web01", "--timeout", "9", "load,1")
    assert status == 1 and "load" in line


@pytest.mark.parametrize("words", [["load,1,2"], ["--nonsense"]])
def test_a_line_that_is_lost_is_unknown(words: list[str], proxy: StandIn,  # noqa: F811
                                        files: Files) -> None:  # noqa: F811
    with open("/dev/full", "w") as full:
        done = run("check", "web01", *words, *connection(proxy, files), stdout=full)
    assert (done.returncode, done.stderr) == (3, "cmon: no space left on device\n")


def test_no_connection_flags_is_unknown() -> None:
    done = run("check", "web01", "load")
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == ("CMON UNKNOWN: no proxy given: set CMON_URL or use --url, for "
                           "example https://cmon.dc.example:9163\n")


@pytest.mark.parametrize("age, status", [(299, 0), (301, 3)])
def test_old_values_are_unknown(age: int, status: int, check: Any) -> None:
    """The proxy answers with old copies to an account that is over its quota."""
    check.page(f'load_average 1\ncmon_sample_age_seconds{{collector="zone_misc"}} {age}\n'
               f'zfs_used 1\ncmon_sample_age_seconds{{collector="zfs"}} {age}\n')
    got = check("web01", "load_average,4")
    assert got[0] == status
    assert not status or got[1] == "CMON UNKNOWN: load_average is 5m old"
    assert check("web01", "zfs_used,4")[0] == 0     # is read every 300 s


# --- several --------------------------------------------------------------------------------------

def test_all_running_containers(check: Any, proxy: StandIn) -> None:  # noqa: F811
    for index in (1, 2):
        check.page(PAGE.replace("load 5", f"load {index}"), index)
    status, line = check("--all", "load,4")
    assert status == 1      # the second db is stopped and has no page
    assert line == ("CMON WARNING: web01 load is 5 (outside 0:4) | 'db load'=2;4; "
                    "'web01 load'=5;4; 'web02 load'=1;4;")
    assert check("--all", "load,9")[1].startswith("CMON OK: 3 containers, ")
    check.page("", 1, 503)
    assert check("--all", "load,9") == (3, "CMON UNKNOWN: web02: 127.0.0.1:%d says 503: no reason "
                                           "given | 'db load'=2;9; 'web01 load'=5;9;" % proxy.port)
    assert check("--all", "load,,4")[0] == 2        # what is known to be bad outweighs it


def test_containers_of_groups(check: Any, proxy: StandIn) -> None:  # noqa: F811
    proxy.answers["/v1/discover?groups=web"] = Answer(
        200, json.dumps({"containers": CONTAINERS[:1]}).encode())
    assert check("--groups", "web", "load")[1] == "CMON OK: 1 container, web01 load is 5 | " \
                                                  "'web01 load'=5;;"


# --- the proxy and the certificate ----------------------------------------------------------------

def test_the_proxy(check: Any) -> None:
    status, line = check("--proxy")
    assert status == 0
    assert re.fullmatch(r"CMON OK: response_seconds is \S+ s \| 'response_seconds'=[\d.]+s;;", line)
    assert check("--proxy", "cmon_quota_used,0.2,0.8") == (
        1, "CMON WARNING: cmon_quota_used is 0.25 (outside 0:0.2) | 'cmon_quota_used'=0.25;0.2;0.8")


@pytest.mark.parametrize("days, status", [(40, 0), (29, 1), (6, 2), (-1, 2)])
def test_the_certificate(days: int, status: int, check: Any) -> None:
    check.fleet(FLEET.format(f"{time.time() + days * 86400:.0f}"))
    got = check("--certificate")
    assert got[0] == status
    assert re.search(r"\| 'certificate_days_left'=-?[\d.]+;30:;7:$", got[1])
    assert check("--certificate", "certificate_days_left,50:")[0] == 1


def test_an_expired_certificate_is_critical(check: Any, proxy: StandIn) -> None:  # noqa: F811
    """The proxy rejects the certificate, so no page can report it."""
    proxy.answers["/v1/fleet/metrics"] = Answer(401, b"the certificate ended\n", "text/plain\r\n"
                                                     "X-Cmon-Error: expired")
    assert check("--certificate") == (
        2, "CMON CRITICAL: certificate_days_left is 0 days (outside 7:) | "
           "'certificate_days_left'=0;30:;7:")
    assert check("--proxy", "cmon_quota_used")[0] == 3


def test_a_missing_expiry_date_is_unknown(check: Any) -> None:
    check.fleet("cmon_quota_limited 0\n")
    assert check("--certificate") == (3, "CMON UNKNOWN: no sample of certificate_days_left")


# --- rates ----------------------------------------------------------------------------------------

def at(value: float, clock: float, age: float = 0) -> str:
    return (f"# TYPE net_drops_in_total counter\nnet_drops_in_total {value}\n# TYPE time_of_day "
            f"counter\ntime_of_day {clock * 1000:.0f}\n"
            f"cmon_sample_age_seconds{{collector=\"link\"}} {age}\nother 1\n")


DROPS = "rate(net_drops_in_total),2,20"


def test_a_rate_is_computed_between_two_runs(check: Any, tmp_path: Path) -> None:
    check.page(at(100, 1000))
    first = check("web01", DROPS)
    assert first == (3, "CMON UNKNOWN: rate(net_drops_in_total) needs an earlier reading: "
                        "wait for the next run")
    check.page(at(100, 1003, 3))
    assert "has not been read again since the last run" in check("web01", DROPS)[1]
    check.page(at(130, 1010))
    assert check("web01", DROPS) == (
        1, "CMON WARNING: rate(net_drops_in_total) is 3/s (outside 0:2) | "
           "'rate(net_drops_in_total)'=3.0;2;20")
    check.page(at(135, 1020))
    assert check("web01", DROPS)[1].endswith("'rate(net_drops_in_total)'=0.5;2;20")
    # the same reading once more, as "check now" may see it: its rate stays
    check.page(at(135, 1022, 2))
    assert check("web01", DROPS)[1].endswith("'rate(net_drops_in_total)'=0.5;2;20")
    check.page(at(145, 1030))
    assert check("web01", DROPS)[1].endswith("'rate(net_drops_in_total)'=1.0;2;20")
    check.page(at(10, 1040))        # began again
    assert check("web01", DROPS)[1].endswith("'rate(net_drops_in_total)'=1.0;2;20")
    file, = (tmp_path / "cache" / "cmon").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert b"other" not in file.read_bytes()


def test_checks_do_not_share_their_readings(check: Any, tmp_path: Path) -> None:
    check.page(at(100, 1000))
    check("web01", DROPS)
    assert check("web01", "rate(net_drops_in_total),9")[0] == 3
    assert check("web01", DROPS, "--state", tmp_path / "elsewhere")[0] == 3
    assert len(list((tmp_path / "cache" / "cmon").iterdir())) == 2


def test_rates_of_several_containers_and_of_the_proxy(check: Any) -> None:
    for clock in (1000, 1010):
        for index in range(3):
            check.page(at(100 + index * (clock - 1000), clock), index)
        got = check("--all", DROPS)
    assert got[0] == 0
    assert "'db rate(net_drops_in_total)'=2.0;2;20" in got[1]
    # With a clock of its own, however quickly the two runs follow each other.
    text = "# TYPE asked counter\nasked {}\ntime_of_day {}\n"
    check.fleet(text.format(1, 1_000_000))
    assert check("--proxy", "rate(asked)")[0] == 3
    check.fleet(text.format(2, 1_010_000))
    assert check("--proxy", "rate(asked)")[0] == 0


@pytest.mark.parametrize("content", [b"", b"rubbish\n", b"\x00" * 100, None])
def test_broken_readings_count_as_absent(content: bytes | None, check: Any, tmp_path: Path) -> None:
    check.page(at(100, 1000))
    check("web01", DROPS)
    file, = (tmp_path / "cache" / "cmon").iterdir()
    body = b"net_drops_in_total 1 2 3\n"
    file.write_bytes(content if content is not None else (
        f"# cmon page at=1 uuid={UUIDS[0]} alias=web01 bytes={len(body)}\n".encode() + body))
    check.page(at(130, 1010))
    assert "needs an earlier reading" in check("web01", DROPS)[1]
    check.page(at(160, 1020))
    assert check("web01", DROPS)[0] == 1


def test_an_unusable_folder_is_unknown(check: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, line = check("web01", DROPS, "--state", tmp_path / "file" / "x")
    assert status == 3 and "rate() needs a folder for its readings" in line


def test_a_missing_home_is_unknown(check: Any) -> None:
    status, line = check("web01", DROPS, env={"HOME": "/dev/null", "XDG_CACHE_HOME": "relative"})
    assert status == 3 and "use --state DIR" in line
    assert check("web01", "net_agg_bytes_in", env={"HOME": "/dev/null"})[0] == 0


def test_an_interrupted_check_is_unknown(files: Files) -> None:  # noqa: F811
    """Nagios ends a plugin that takes too long by a signal; ours ends by itself, in time."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(5)
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        program = Program.cmon("check", "web01", "x", *connection(url, files))
        accepted, _ = silent.accept()
        assert accepted.recv(1)
        program.signal(signal.SIGINT)
        assert program.wait() == 3
        assert program.output == "CMON UNKNOWN: KeyboardInterrupt\n"
        accepted.close()


# --- examples -------------------------------------------------------------------------------------

def test_the_examples_run_commands_that_exist() -> None:
    """Each expression of examples/ is one, on metrics that exist."""
    import cmon
    for name in ("icinga2.conf", "nagios.cfg"):
        text = (ROOT / "examples" / name).read_text()
        words = re.findall(r"[a-z_]+\([a-z_]+\),[^\s'\"!]+|[a-z]+_[a-z_/]+,[\d.:~@,]+", text)
        assert len(words) >= 3, name
        for word in words:
            one = cmon.Threshold.of_text(word)
            for part in (one.expression.over, one.expression.under):
                assert part is None or part.name in cmon.facts() or part.name.startswith(
                    ("cmon_quota", "certificate_days")), word
        assert os.path.basename(str(CMON)) in text
