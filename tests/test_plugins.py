# SPDX-License-Identifier: MPL-2.0
"""Plugins of operators, files of tenants, ports of core zones: used safely."""
from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from nodes import (
    CMON0, LB01, WEB01, Desk, Machine, Vminfod, children_of, collectors, down, value)
from support import ROOT, Kernel, free_port, samples, wait_until

import cmon_agent as agent

MakeKernel = Callable[..., Kernel]
MakeMachine = Callable[..., Machine]


@pytest.fixture()
def machine(machine: MakeMachine, tmp_path: Path) -> MakeMachine:
    """Makes machines with folders of plugins for the node and for zones, by file name."""
    numbers = itertools.count()

    def make(gz: Any = (), vm: Any = (), **settings: Any) -> Machine:
        folder = tmp_path / f"machine{next(numbers)}"
        folders = {kind: str(write(folder / f"{kind}-plugins", scripts))
                   for kind, scripts in (("gz", gz), ("vm", vm))}
        return machine(plugin_dirs=folders, **settings)
    return make


def write(folder: Path, scripts: Any) -> Path:
    """A folder of plugins: name -> shell script, or the content of plugin.json."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    for name, script in dict(scripts).items():
        path = folder / name
        if name == "plugin.json":
            path.write_text(script if isinstance(script, str) else json.dumps(script))
            path.chmod(0o644)
        else:
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
    return folder


Plugged = tuple[Desk, Path]


@pytest.fixture()
def plugged(machine: MakeMachine) -> Iterator[Callable[..., Plugged]]:
    """Makes agents on the test's clock with these plugins of the node; returns the folder too."""
    made: list[Desk] = []

    def make(gz: dict[str, Any]) -> Plugged:
        nothing = {name: {"enabled": False} for name in ("zfs", "zpool", "ntp", "zones")}
        one = machine(gz=gz, start=False, collectors=nothing)
        made.append(Desk(one.config))
        folder = one.config.parent / "gz-plugins"
        problems: list[str] = []
        made[-1].scraper._take_plugins({"gz": agent.find_plugins(str(folder), problems), "vm": []},
                                       problems)
        assert not problems
        return made[-1], folder
    yield make
    for one in made:
        one.close()


def page_with(one: Machine, collector: str, ask: Callable[[], str] | None = None) -> str:
    """The page, once the folders have been read and that plugin has run."""
    def found() -> str:
        page = (ask or one.node)()
        return page if f"{collector}_metrics_available_boolean" in page else ""
    return wait_until(found, collector)


# --- what they print ------------------------------------------------------------------------------

TABS = r"""printf 'requests\tcounter\t7\tRequests that were served\n'
printf 'temperature\tgauge\t-3.5\n\nttl\toption\t30\nttl\toption\t45\n'"""
PROM = r"""cat <<'END'
# OPTION ttl 20
# HELP queue_length Jobs that wait.
# TYPE queue_length gauge
queue_length{name="a"} 3
queue_length{name="b\"\\"} 4
# TYPE took_seconds histogram
took_seconds_bucket{le="1"} 1
took_seconds_bucket{le="+Inf"} 2
took_seconds_sum 3.5
took_seconds_count 2
# TYPE exact counter
exact 18446744073709551615
END"""


def test_a_plugin_of_the_node_in_both_forms(machine: MakeMachine) -> None:
    one = machine(gz={"disks.sh": TABS, "jobs.prom.sh": PROM,
                      "args.py": 'printf "n\\tgauge\\t$#\\t$1\\n"'})
    page = page_with(one, "plugin_jobs")
    found = samples(page)
    assert found["plugin_disks_requests"] == 7 and found["plugin_disks_temperature"] == -3.5
    assert "# HELP plugin_disks_requests Requests that were served\n" in page
    assert "# HELP plugin_disks_temperature temperature\n" in page
    assert "# TYPE plugin_disks_requests counter\n" in page
    assert found['queue_length{name="b\\"\\\\"}'] == 4, "the names that the plugin wrote"
    assert "# HELP queue_length Jobs that wait.\n# TYPE queue_length gauge\n" in page
    assert found["took_seconds_count"] == 2
    assert 'took_seconds_bucket{le="+Inf"} 2' in page
    assert "\nexact 18446744073709551615\n" in page
    assert "# HELP plugin_args_n global\n" in page and found["plugin_args_n"] == 1
    ups = collectors(page)
    assert all(ups[name] == 1 for name in ("plugin_disks", "plugin_jobs", "plugin_args"))
    assert value(page, "plugin_disks_metrics_available_boolean") == 1
    assert agent.render(agent.parse(page))      # the whole page is a page
    assert "plugin_" not in one.zone()


def test_a_plugin_of_zones_gets_the_zone_and_may_be_for_some_only(machine: MakeMachine) -> None:
    one = machine(vm={"all.sh": 'printf "x\\tgauge\\t1\\t$1\\n"',
                      "some.sh": 'printf "x\\tgauge\\t2\\n"',
                      "plugin.json": {"some.sh": {"vms": [LB01]}}})
    page = page_with(one, "plugin_some", lambda: one.zone(LB01))
    assert f"# HELP plugin_all_x {LB01}\n" in page and "plugin_some_x 2" in page
    page = one.zone(WEB01)
    assert f"# HELP plugin_all_x {WEB01}\n" in page and "plugin_some" not in page
    assert "plugin_" not in one.node()


BAD_LINES = r"""printf 'good\tgauge\t1\n'
printf 'no tabs at all\n'
printf 'two\tfields\n'
printf 'a\tb\tc\td\te\n'
printf 'kind\thistogram\t1\n'
printf 'bad-name\tgauge\t1\n'
printf '\tgauge\t1\n'
printf 'value\tgauge\tmany\n'
printf 'good\tgauge\t2\n'
printf 'ttl\toption\tnever\n'
printf 'what\toption\t1\n'
printf '\377\376\tgauge\t1\n'
printf 'last\tcounter\t9\t\n'"""
BAD_PROM = r"""cat <<'END'
# TYPE good gauge
good 1
untyped_thing 5
good{unclosed="x 3
good 2
# TYPE cpu_info_model counter
cpu_info_model 7
# TYPE two gauge
# TYPE two counter
two 1
good{__name__="cpu_info_model"} 3
= = =
# TYPE last gauge
last 9
END"""


@pytest.mark.parametrize("name, script, prefix", [
    ("p.sh", BAD_LINES, "plugin_p_"), ("p.prom", BAD_PROM, "")], ids=["tabs", "prom"])
def test_a_bad_line_costs_that_line_and_is_counted(machine: MakeMachine, name: str, script: str,
                                                   prefix: str) -> None:
    one = machine(gz={name: script})
    page = page_with(one, "plugin_p")
    found = samples(page)
    assert found[f"{prefix}good"] == 1 and found[f"{prefix}last"] == 9
    assert found["cpu_info_model"] == 79 and not down(page), "the node's own"
    assert agent.render(agent.parse(page))
    assert one.own('cmon_agent_input_problems_total{source="plugin_p"}') >= 5
    assert f"/{name}: line " in one.agent.log
    assert "Traceback" not in one.agent.log


def test_no_plugin_can_break_the_page(machine: MakeMachine) -> None:
    """Names that collide with another plugin's, or with the agent's metrics about it."""
    one = machine(gz={
        "a.sh": r"printf 'b_x\tgauge\t1\nb_y\tgauge\t1\nok\tgauge\t1\n'",
        "a_b.sh": r"printf 'x\tgauge\t2\ny\tcounter\t2\nfine\tgauge\t1\n'",
        "p.sh": r"printf 'metrics_timer_seconds\tgauge\t1\nmetrics_cached_boolean\tgauge\t1\n"
                r"x_metrics_available_boolean\tgauge\t1\nok\tgauge\t1\n'",
        "p_x.sh": r"printf 'ok\tgauge\t1\n'"})
    page = page_with(one, "plugin_p_x")
    assert not down(page)
    found = samples(page)
    assert found["plugin_a_ok"] == found["plugin_a_b_fine"] == found["plugin_p_ok"] == 1
    assert found["plugin_p_x_ok"] == 1
    agent.parse(page)                   # strict: no family twice, no series twice
    types = [line for line in page.splitlines() if line.startswith("# TYPE")]
    assert len({line.split()[2] for line in types}) == len(types)
    assert one.own('cmon_agent_input_problems_total{source="plugin_p"}') >= 3


@pytest.mark.parametrize("name, ours", [
    ("up", True), ("scrape_duration_seconds", True), ("cmon_x", True), ("upper", False)])
def test_plugins_may_not_use_names_that_prometheus_adds(name: str, ours: bool) -> None:
    assert agent.is_ours(name, True) is agent.is_ours(name, False) is ours


def test_a_duplicate_name_is_refused_with_a_reason(machine: MakeMachine) -> None:
    """Names of the node's own metrics, and of another plugin's; the rest of the plugin stays."""
    one = machine(gz={
        "a.prom": "printf '# TYPE shared gauge\nshared 1\n# TYPE mine gauge\nmine 1\n'",
        "b.prom": "printf '# TYPE shared_sum gauge\nshared_sum 1\n# TYPE h histogram\n"
                  "h_sum 1\nh_count 1\nh_bucket{le=\"+Inf\"} 1\n'",
        "c.prom": "printf '# TYPE memory_free_bytes gauge\nmemory_free_bytes 1\n"
                  "# TYPE c_metrics_timer_seconds gauge\nc_metrics_timer_seconds 1\n"
                  "# TYPE h_sum gauge\nh_sum 2\n# TYPE shared gauge\nshared 2\n"
                  "# TYPE other gauge\nother 3\n'",
        "d.prom": "printf '# TYPE collector_time_total_seconds_count gauge\n"
                  "collector_time_total_seconds_count{service=\"cmon-agent\"} 0\n"
                  "# TYPE fourth gauge\nfourth 4\n'"})
    for name in "abcd":
        page = page_with(one, f"plugin_{name}")
    found = samples(page)
    assert found["fourth"] == 4 and page.count("\ncollector_time_total_seconds_count{") == 1
    assert not down(page) and found["mine"] == found["shared_sum"] == 1 and found["other"] == 3
    assert found["memory_free_bytes"] > 1
    assert page.count("# TYPE shared gauge\n") == page.count("# TYPE h_sum gauge\n") + page.count(
        "# TYPE h histogram\n") == 1
    agent.parse(page)
    one.agent.wait_for_log("memory_free_bytes is a name that the page has already")
    one.agent.wait_for_log("plugin_[abc]: shared is already on the page of gz, by plugin_[abc]")


def test_a_plain_plugin_may_put_labels_in_the_name(machine: MakeMachine) -> None:
    one = machine(gz={"mako.sh": r"""cat <<'END'
instructions{storageId="1.stor"}	counter	5	Instructions that were done
instructions{storageId="2.stor",kind="a b"}	counter	6
instructions{storageId="1.stor"}	counter	7
instructions{storageId="3.stor"}	gauge	8
instructions{broken	counter	1
instructions	counter	9
END"""})
    page = page_with(one, "plugin_mako")
    assert [line for line in page.splitlines() if "plugin_mako_instructions" in line] == [
        "# HELP plugin_mako_instructions Instructions that were done",
        "# TYPE plugin_mako_instructions counter",
        'plugin_mako_instructions{storageId="1.stor"} 5',
        'plugin_mako_instructions{storageId="2.stor",kind="a b"} 6',
        "plugin_mako_instructions 9"]
    assert one.own('cmon_agent_input_problems_total{source="plugin_mako"}') == 3


def test_the_order_of_labels_does_not_matter() -> None:
    [family], _, problems = agent.plugin_families(
        "p", 'm{a="1",b="2"}\tgauge\t1\nm{b="2",a="1"}\tgauge\t2\n', False)
    assert [sample.value for sample in family.samples] == [1]
    assert len(problems) == 1 and "duplicated" in problems[0]


def test_a_plugin_of_lines_is_bounded() -> None:
    families, _, problems = agent.plugin_families(
        "p", "".join(f"m{number}\tgauge\t1\n" for number in range(10_001)), False)
    assert len(families) == 10_000 and problems == ["line 10001: more than 10000 samples"]


@pytest.mark.parametrize("output, prom, ttl", [
    ("ttl\toption\t90201\n", False, 90201.0), ("# OPTION ttl 90201\n", True, 90201.0),
    ("ttl\toption\t0\n", False, 0.0), ("ttl\toption\t-1\n", False, None)])
def test_a_lifetime_has_no_upper_bound(output: str, prom: bool, ttl: float | None) -> None:
    assert agent.plugin_families("p", output, prom)[1] == ttl


def test_a_plugin_with_a_lifetime_of_zero_is_never_kept(
        plugged: Callable[..., Plugged]) -> None:
    one, folder = plugged({"p.sh": "echo x >> $0.runs; printf 'n\tgauge\t1\n'",
                           "plugin.json": {"p.sh": {"ttl": 0}}})
    for _ in range(3):
        assert "plugin_p_n 1" in one.page("/v1/gz/metrics")
        one.pass_by(0.2)
    assert len((folder / "p.sh.runs").read_text().split()) == 3


def test_a_plugin_that_failed_is_tried_again_after_its_lifetime(
        plugged: Callable[..., Plugged]) -> None:
    """As in the original, a failure is cached as long as a success."""
    one, folder = plugged({"p.sh": "echo x >> $0.runs; exit 1",
                           "plugin.json": {"p.sh": {"ttl": 40}}})

    def runs() -> int:
        assert "plugin_p" in down(one.page("/v1/gz/metrics"))
        return len((folder / "p.sh.runs").read_text().split())
    assert runs() == 1
    one.pass_by(39.0)
    assert runs() == 1
    one.pass_by(2.0)
    assert runs() == 2


LONG = f"sleep 1000.{os.getpid()}"       # to be found again among all processes
FAILS = {
    "prints garbage": ("echo 'Segmentation fault'; head -c 300 /dev/zero",
                       "no valid line: line 1: 1 fields"),
    "exits with 3": ("echo 'x\tgauge\t1'; echo broken >&2; exit 3", "exit 3: broken"),
    "exits without a message": ("exit 4", r"p\.sh: exit 4 and no message"),
    "is killed": ("echo wait >&2; kill -9 $$", r"p\.sh: killed by signal 9 \(SIGKILL\)"),
    "is killed by a signal without a name": ("kill -40 $$", r"p\.sh: killed by signal 40$"),
    "hangs": (f"exec {LONG}", "timed out"),
    "hangs in grandchildren": (f"trap '' TERM INT HUP; ({LONG} & {LONG}) & {LONG}",
                               "timed out"),
    "writes 500 KiB and more": ("yes 'xxxxxxxxxxxx\tgauge\t1'", "more than 512000 bytes"),
    "writes to stderr without end": ("yes >&2", "more than 512000 bytes"),
}


@pytest.mark.parametrize("how", list(FAILS))
def test_a_plugin_that_fails_costs_its_own_metrics(machine: MakeMachine, how: str) -> None:
    script, why = FAILS[how]
    one = machine(gz={"p.sh": script, "good.sh": "printf 'x\\tgauge\\t1\\n'",
                      "plugin.json": {"p.sh": {"timeout": 300}}})
    page = page_with(one, "plugin_p")
    assert down(page) == {"plugin_p"} and "plugin_good_x 1" in page
    assert value(page, "plugin_p_metrics_available_boolean") == 0
    one.agent.wait_for_log("plugin_p of gz failed: .*" + why)
    nothing_is_left(one)


def nothing_is_left(one: Machine) -> None:
    """No child, no zombie and no process of the group is left."""
    wait_until(lambda: not children_of(one.agent), "no child and no zombie is left")
    wait_until(lambda: LONG not in subprocess.run(
        ["ps", "-eo", "args"], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines(),
        "the whole group was killed")


def test_output_counts_even_if_a_child_keeps_the_pipe_open(machine: MakeMachine) -> None:
    one = machine(gz={"p.sh": f"{LONG} & printf 'x\\tgauge\\t1\\n'",
                      "plugin.json": {"p.sh": {"timeout": 60_000}}})
    page = page_with(one, "plugin_p")
    assert not down(page) and "\nplugin_p_x 1\n" in page
    nothing_is_left(one)


def test_500_kib_are_allowed(machine: MakeMachine) -> None:
    one = machine(gz={"p.sh": "i=0; while [ $i -lt 5000 ]; do i=$((i+1)); "
                      "printf 'x%d\\tgauge\\t1\\t" + "h" * 80 + "\\n' $i; done"})
    assert "plugin_p_x5000 1\n" in page_with(one, "plugin_p")


def test_a_ttl_printed_by_a_plugin_takes_precedence(machine: MakeMachine) -> None:
    one = machine(gz={"own.sh": "printf 'x\\tgauge\\t1\\nttl\\toption\\t45\\n'",
                      "file.sh": "printf 'x\\tgauge\\t1\\n'",
                      "none.sh": "printf 'x\\tgauge\\t1\\n'",
                      "plugin.json": {"own.sh": {"ttl": 5}, "file.sh": {"ttl": 7}}}, start=False)
    problems: list[str] = []
    found = {plugin.name: plugin for plugin in agent.find_plugins(
        str(one.config.parent / "gz-plugins"), problems)}
    assert (found["own"].ttl, found["file"].ttl, found["none"].ttl) == (5.0, 7.0, 60.0)
    assert found["none"].timeout == 3.0 and not problems
    assert agent.plugin_families("own", "ttl\toption\t9\nttl\toption\t45\n", False)[1] == 45.0


def test_a_plugin_runs_as_often_as_its_lifetime_says(machine: MakeMachine) -> None:
    one = machine(gz={"own.sh": "echo >> $0.runs; printf 'x\\tgauge\\t1\\nttl\\toption\\t45\\n'",
                      "file.prom.sh": "echo >> $0.runs; printf '# TYPE x gauge\\nx 1\\n'",
                      "plugin.json": {"own.sh": {"ttl": 5}, "file.prom.sh": {"ttl": 7}}},
                  start=False)
    desk = Desk(one.config)
    desk.scraper._reread_plugins()
    wait_until(lambda: (desk.pump(), desk.scraper._plugins["gz"])[1])
    seen = []
    for _ in range(12):                                 # two minutes
        assert "plugin_own_x 1" in desk.page("/v1/gz/metrics")
        seen.append(tuple(len((one.config.parent / "gz-plugins" / f"{name}.runs").read_bytes())
                          for name in ("own.sh", "file.prom.sh")))
        desk.pass_by(10.0, 1.0)
    desk.close()
    assert [own for own, _ in seen] == [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3]
    assert [file for _, file in seen] == list(range(1, 13))


# --- which files are plugins ----------------------------------------------------------------------

def plugins_in(folder: Path) -> tuple[set[str], list[str]]:
    """The names of the plugins of a folder, and what is wrong with it."""
    problems: list[str] = []
    return {plugin.name for plugin in agent.find_plugins(str(folder), problems)}, problems


def test_plugins_writable_by_others_do_not_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", {"good.sh": "", "group.sh": "", "world.sh": "", "plain.txt": ""})
    (folder / "group.sh").chmod(0o775)
    (folder / "world.sh").chmod(0o757)
    (folder / "plain.txt").chmod(0o644)
    (folder / "sub").mkdir()
    (folder / "dangling").symlink_to("/nonexistent")
    (folder / ".hidden").mkdir()
    names, problems = plugins_in(folder)
    assert names == {"good"}
    assert sorted(problem.split("/")[-1].split(":")[0] for problem in problems) == [
        "dangling", "group.sh", "world.sh"]
    folder.chmod(0o777)
    assert plugins_in(folder) == (set(), [f"{folder}: must be a folder that root owns and nobody "
                                          "else can write to"])
    assert plugins_in(tmp_path / "none") == (set(), [])
    assert plugins_in(folder / "good.sh")[0] == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_plugins_owned_by_others_do_not_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", {"mine.sh": "", "theirs.sh": "", "linked.sh": ""})
    os.chown(folder / "theirs.sh", 12345, 0)
    (folder / "linked.sh").unlink()
    (folder / "linked.sh").symlink_to(folder / "theirs.sh")
    names, problems = plugins_in(folder)
    assert names == {"mine"} and len(problems) == 2
    os.chown(folder, 12345, 0)
    assert plugins_in(folder)[0] == set()


def test_plugin_names_and_their_maximum_number(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", {"a-b.c.sh": "", "a_b.c.py": "", "x y.sh": "", "z": ""})
    names, problems = plugins_in(folder)
    assert names == {"a_b_c", "z"} and len(problems) == 2
    many = write(tmp_path / "many", {f"p{number}": "" for number in range(103)})
    names, problems = plugins_in(many)
    assert len(names) == 100 and len(problems) == 3 and "more than 100" in problems[0]


@pytest.mark.parametrize("content", [
    "{", "[]", "7", '{"p.sh": 7}', '{"p.sh": {"timeout": 0}}', '{"p.sh": {"timeout": "x"}}',
    '{"p.sh": {"ttl": -1}}', '{"p.sh": {"vms": "all"}}', '{"p.sh": {"timeout": true}}',
    '{"p.sh": {"timeout": NaN}}', '{"p.sh": {}, "p.sh": {}}'])
def test_a_bad_plugin_json_is_reported(tmp_path: Path, content: str) -> None:
    folder = write(tmp_path / "p", {"p.sh": "", "plugin.json": content})
    _, problems = plugins_in(folder)
    assert problems and all(str(folder) in problem for problem in problems)


def test_sighup_rereads_plugin_folders(machine: MakeMachine) -> None:
    one = machine(gz={"a.sh": "printf 'x\\tgauge\\t1\\n'"})
    page_with(one, "plugin_a")
    folder = one.config.parent / "gz-plugins"
    (folder / "a.sh").unlink()
    write(folder, {"b.sh": "printf 'x\\tgauge\\t2\\n'"})
    one.agent.signal(1)
    one.agent.wait_for_log("settings reloaded")
    page = page_with(one, "plugin_b")
    assert "plugin_b_x 2" in page and "plugin_a" not in page


def test_a_plugin_can_be_switched_off_and_at_most_so_many_run_at_once(machine: MakeMachine) -> None:
    busy = ('echo $$ >> "$0.pids"; n=$(ls -d "$(dirname "$0")"/*.running 2>/dev/null | wc -l); '
            'touch "$0.running"; echo $n >> "$(dirname "$0")/../counts"; sleep 0.2; '
            'rm "$0.running"; printf "x\\tgauge\\t1\\n"')
    one = machine(gz={**{f"p{number}": busy for number in range(8)}, "off": "exit 0"},
                  max_collections=2, collectors={"plugin_off": {"enabled": False}}, start=False)
    one.start()
    page = page_with(one, "plugin_p7")
    assert not down(page) and "plugin_off" not in page
    counts = [int(word) for word in (one.config.parent / "counts").read_text().split()]
    assert len(counts) == 8 and max(counts) <= 1, "besides itself one more"


# --- text files of tenants ------------------------------------------------------------------------

GOOD = "# TYPE jobs_total counter\njobs_total{queue=\"a\"} 3\n# TYPE busy gauge\nbusy 1\n"


@pytest.fixture()
def tenant(tmp_path: Path) -> Path:
    """The root of a zone, with the folder of text files in it."""
    folder = tmp_path / "zone" / "root" / "var" / "triton" / "metrics"
    folder.mkdir(parents=True)
    return folder


def textfiles(folder: Path) -> Any:
    """What the agent's process reads from a zone's root."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", ROOT / "cmon_agent.py", "textfiles", folder.parents[2]],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30)
    assert b"Traceback" not in done.stderr, done.stderr
    if done.returncode:
        return done.stderr.decode().strip()
    return json.loads(done.stdout)


def test_regular_files_are_read(tenant: Path) -> None:
    (tenant / "app.prom").write_text(GOOD)
    (tenant / "other.txt").write_text("no metrics")
    (tenant / "b.prom").write_bytes(b"\xff\xfe\n")
    assert textfiles(tenant) == {"app.prom": GOOD, "b.prom": "\ufffd\ufffd\n"}


def test_no_folder_is_no_file_and_no_zone_is_an_error(tenant: Path) -> None:
    assert textfiles(tenant) == {}
    tenant.rmdir()
    assert textfiles(tenant) == {}
    tenant.parent.rmdir()
    tenant.parent.parent.rmdir()
    assert textfiles(tenant) == {}
    tenant.parents[2].rmdir()
    assert "no such file" in textfiles(tenant)


def test_only_regular_files_are_opened(tenant: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.prom"
    secret.write_text("# TYPE secret gauge\nsecret 42\n")
    (tenant / "link.prom").symlink_to(secret)
    (tenant / "folder.prom").mkdir()
    os.mkfifo(tenant / "fifo.prom")
    with socket.socket(socket.AF_UNIX) as listening:
        before = os.getcwd()
        os.chdir(tenant)                # a socket's path must be short
        listening.bind("socket.prom")
        os.chdir(before)
        with open(tenant / "sparse.prom", "wb") as sparse:
            sparse.truncate(10 << 30)
        (tenant / "good.prom").write_text(GOOD)
        found = textfiles(tenant)
    assert found.pop("good.prom") == GOOD
    assert set(found) == {"link.prom", "folder.prom", "fifo.prom", "socket.prom", "sparse.prom"}
    assert all(isinstance(why, list) for why in found.values())
    assert "larger than" in found["sparse.prom"][0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make devices")
def test_a_device_is_not_read(tenant: Path) -> None:
    try:
        os.mknod(tenant / "zero.prom", 0o20666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("this machine lets not even root make devices")
    assert isinstance(textfiles(tenant)["zero.prom"], list)


@pytest.mark.parametrize("component", [0, 1, 2], ids=["metrics", "triton", "var"])
def test_a_link_in_the_path_is_not_followed(tenant: Path, tmp_path: Path, component: int) -> None:
    elsewhere = tmp_path / "elsewhere"
    target = [tenant, tenant.parent, tenant.parent.parent][component]
    target.rename(elsewhere)
    target.symlink_to(elsewhere)
    below = elsewhere / Path(*["triton", "metrics"][2 - component:])
    (below / "x.prom").write_text(GOOD)
    answer = textfiles(tenant)
    assert isinstance(answer, str) and "jobs" not in answer


def test_a_link_in_place_of_a_file_is_not_followed(tenant: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(GOOD)
    (tenant / "x.prom").symlink_to(tmp_path / "elsewhere")
    assert isinstance(textfiles(tenant)["x.prom"], list)


def test_another_file_system_is_refused(tenant: Path) -> None:
    """It may be an NFS server of the tenant that never answers."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", tenant], stderr=subprocess.PIPE)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        (tenant / "x.prom").write_text(GOOD)
        assert "another file system" in textfiles(tenant)
    finally:
        subprocess.run(["umount", tenant], check=True)


def test_too_many_files(tenant: Path) -> None:
    for number in range(20):
        (tenant / f"{number:02}.prom").write_text(GOOD)
    found = textfiles(tenant)
    assert sum(isinstance(text, str) for text in found.values()) == 16
    assert found["16.prom"] == ["more than 16 files"] and len(found) == 17


def zone_with_files(machine: MakeMachine, tenant: Path, **settings: Any) -> Machine:
    """A machine whose web01 has its root in a test folder, as reported by vminfod."""
    info = Vminfod()
    info.behave = info.ready([{"zonename": WEB01, "uuid": WEB01, "alias": "web01", "nics": [],
                               "zonepath": str(tenant.parents[3])}])
    one = machine(vminfod=info.url, **settings)
    wait_until(lambda: one.own("cmon_agent_vminfod_up") == 1)
    return one


def test_text_files_are_off_by_default(machine: MakeMachine, tenant: Path) -> None:
    (tenant / "app.prom").write_text(GOOD)
    one = zone_with_files(machine, tenant)
    assert "app_" not in one.zone() and "textfile" not in one.zone()


def test_text_files_are_on_the_zones_page(machine: MakeMachine, tenant: Path) -> None:
    (tenant / "a.prom").write_text(GOOD)
    (tenant / "b.prom").write_text(
        "# TYPE jobs_total counter\njobs_total{queue=\"b\"} 4\njobs_total{queue=\"a\"} 99\n"
        "# TYPE cpu_user_usage counter\ncpu_user_usage 1\nnot a line\n")
    one = zone_with_files(machine, tenant, textfiles=True)
    page = one.zone()
    found = samples(page)
    assert found['app_jobs_total{queue="a"}'] == 3 and found['app_jobs_total{queue="b"}'] == 4
    assert found["app_busy"] == 1 and found["app_cpu_user_usage"] == 1
    assert found["cpu_user_usage"] > 1, "a tenant cannot speak for the kernel"
    assert not down(page) and agent.render(agent.parse(page))
    assert one.own('cmon_agent_input_problems_total{source="textfile"}') >= 2
    assert "app_" not in one.zone(LB01)


def test_a_malicious_folder_affects_only_text_files(machine: MakeMachine, tenant: Path) -> None:
    tenant.rmdir()
    tenant.symlink_to("/etc")
    one = zone_with_files(machine, tenant, textfiles=True)
    page = one.zone()
    assert down(page) == {"textfile"} and "app_" not in page
    began = time.monotonic()
    assert down(one.zone(timeout=1.0)) == {"textfile"} and time.monotonic() - began < 5


def test_tenants_cannot_write_to_the_log(machine: MakeMachine, tenant: Path) -> None:
    (tenant / "a\nforged \x1b[2J\u2028.prom").write_text("not a line\n")
    one = zone_with_files(machine, tenant, textfiles=True)
    one.zone()
    [line] = [hit.string for hit in one.agent.wait_for_log("forged")]
    assert re.match(r"20[-0-9]+ .*a\\nforged \\x1b\[2J\\u2028\.prom: line 1", line), line


def test_tenants_cannot_forge_samples_of_other_zones(machine: MakeMachine, tenant: Path) -> None:
    claims = f'mem_agg_usage{{zonename="{LB01}"}} 0'
    (tenant / "a.prom").write_text("".join(
        f"# HELP help{place} a{separator}{claims}\n# TYPE help{place} gauge\nhelp{place} 1\n"
        f'# TYPE label{place} gauge\nlabel{place}{{a="{separator}{place}"}} 1\n'
        for place, separator in enumerate("\v\f\r\x1c\x85\u2028\u2029")))
    (tenant / "b.prom").write_text(
        "# TYPE busy gauge\n" + f'busy{{a="zonename=",zonename="{LB01}"}} 1\n'
        + f'busy{{exported_zonename="x",zonename="{LB01}"}} 2\n')
    one = zone_with_files(machine, tenant, textfiles=True)
    assert "app_busy" in one.zone()
    page = one.get("/v1/zones/metrics").text
    families = {family.name: family for family in agent.parse(page)}
    assert [sample.value > 0 for sample in families["mem_agg_usage"].samples
            if ("zonename", LB01) in sample.labels] == [True]
    app = [sample for name in families if name.startswith("app_")
           for sample in families[name].samples]
    assert len(app) == 2 * 7 + 2
    assert {dict(sample.labels)["zonename"] for sample in app} == {WEB01}
    assert [dict(sample.labels) for sample in families["app_busy"].samples] == [
        {"zonename": WEB01, "a": "zonename=", "exported_zonename": LB01},
        {"zonename": WEB01, "exported_zonename": "x", "exported_exported_zonename": LB01}]


def test_one_family_stays_one_when_zones_describe_it_differently() -> None:
    page = agent.join_pages({
        WEB01: "# HELP app_a One.\n# TYPE app_a gauge\napp_a 1\n",
        LB01: '# HELP app_a Two.\n# TYPE app_a counter\napp_a{x="1"} 2\n'})
    assert page == ("# HELP app_a One.\n# TYPE app_a gauge\n"
                    f'app_a{{zonename="{WEB01}"}} 1\napp_a{{zonename="{LB01}",x="1"}} 2\n')


# --- the platform's own zones ---------------------------------------------------------------------

CORE = base64.b64encode(b'{"isCoreZone": true}').decode()
OTHER = base64.b64encode(b'{"isCoreZone":false}').decode()
CORE_PAGE = """# HELP cmon_core_requests Requests.
# TYPE cmon_core_requests counter
cmon_core_requests 1
# HELP http_requests_completed Requests that were answered.
# TYPE http_requests_completed counter
http_requests_completed{route="a"} 5
# TYPE cpu_user_usage counter
cpu_user_usage 1
# TYPE vfs_bytes_read summary
vfs_bytes_read_sum 1
vfs_bytes_read_count 1
# TYPE took_seconds histogram
took_seconds_bucket{le="+Inf"} 2
took_seconds_sum 3.5
took_seconds_count 2
"""


ARTEDI = """\
# HELP http_request_duration_seconds time to process a request
# TYPE http_request_duration_seconds histogram
http_request_duration_seconds{method="GET",route="ping",le="0.01"} 3
http_request_duration_seconds{method="GET",route="ping",le="+Inf"} 4
http_request_duration_seconds_count{method="GET",route="ping"} 4
http_request_duration_seconds_sum{method="GET",route="ping"} 0.0931
"""
NO_LINE = "is not a sample"
LINES: list[tuple[str, bytes, str | None]] = [      # the line, what is wrong with it
    ("no labels", b"a 1", None), ("labels", b'a{x="1",y="2"} 1', None),
    ("a comma at the end", b'a{x="1",} 1', None), ("empty braces", b"a{} 1", None),
    ("a timestamp", b"a 1 1700000000000", None),
    ("a time before 1970", b"a 1 -5", NO_LINE), ("Prometheus' own", b"up 0", "already"),
    ("a TAB", b"a\t1", None),
    ("an escape of any sort", rb'a{x="\t\\\"\d"} 1', None),
    ("a brace in a label", b'a{x="} 7 {"} 1', None), ("no blank behind labels", b'a{x="1"}1', None),
    ("a value of many forms", b"a +1.5e-3", None), ("infinity", b"a Infinity", None),
    ("not a number", b"a NaN", None), ("digits that are kept", b"a 1.50", None),
    ("an underscore", b"a 1_000", "not a number"), ("hexadecimal", b"a 0x1p4", "not a number"),
    ("too large", b"a 1e999", "not a number"), ("signed nan", b"a -nan", "not a number"),
    ("no value", b"a", NO_LINE), ("a name alone", b"a ", NO_LINE), ("glued", b"a1", NO_LINE),
    ("an open label", b'a{x="1 1', NO_LINE), ("an unquoted label", b"a{x=1} 1", NO_LINE),
    ("a label's odd name", b'a{x-y="1"} 1', NO_LINE), ("an odd name", b"a-b 1", NO_LINE),
    ("a label twice", b'a{x="1",x="2"} 1', "duplicated"),
    ("a name within", b'a{__name__="cpu_user_usage"} 1', "reserved"),
    ("three words", b"a 1 2 3", NO_LINE), ("no UTF-8", b'a{x="\xff"} 1', "not UTF-8"),
    ("a series twice", b'good{b="1",a="2"} 1', "same labels twice"),
    ("one of ours", b"cpu_user_usage 7", "already"), ("a meta-metric", b"x_metrics_timer_seconds 1",
                                                      "already"),
    ("a family of ours", b"load_average_sum 7", None), ("our prefix", b"cmon_x 1", "already")]


@pytest.mark.parametrize("line, problem", [row[1:] for row in LINES], ids=[row[0] for row in LINES])
def test_lines_of_a_core_zone_are_passed_on_or_dropped_singly(line: bytes, problem: str | None
                                                             ) -> None:
    page = agent.CorePage(lambda name: agent.is_ours(name, False))
    page.add("port 1", b'good{a="2",b="1"} 1\n' + line + b"\nlast 2")     # and no newline
    text = "".join(family.text for family in page.families())
    assert 'good{a="2",b="1"} 1\n' in text and "last 2\n" in text
    assert text.count("# TYPE") == len(page.families()) == (3 if problem is None else 2)
    if problem is None:
        assert not page.problems
        assert re.sub(r"[ \t]+", " ", line.decode().replace("}1", "} 1")) + "\n" in text
    else:
        assert len(page.problems) == 1 and problem in page.problems[0]
        assert page.problems[0].startswith("port 1: ")


def test_histograms_of_a_core_zone_keep_the_form_that_dashboards_query() -> None:
    page = agent.CorePage(lambda name: agent.is_ours(name, False))
    page.add("port 1", ARTEDI.encode())
    page.add("port 2", ARTEDI.replace("ping", "list").encode())
    [family] = page.families()
    assert not page.problems and family.kind == "histogram"
    assert family.text == ARTEDI + "".join(
        line.replace("ping", "list") for line in ARTEDI.splitlines(True)[2:])
    assert family.names() >= {"http_request_duration_seconds", "http_request_duration_seconds_sum"}


def test_core_pages_are_bounded() -> None:
    page = agent.CorePage(lambda name: False)
    page.add("port 1", b"\n" * 30_000 + b"late 1\n")
    assert not page.families() and page.problems == ["port 1: more than 20000 lines"]
    for port in range(4):
        page.add(f"port {port}", b"".join(b'a%d{x="%d"} 1\n' % (port, number)
                                          for number in range(15_000)))
    assert sum(family.text.count("\n") - 2 for family in page.families()) == 50_000


class Port:
    """One of a core zone's metricPorts."""

    def __init__(self, page: str | bytes, status: str = "200 OK", hang: bool = False) -> None:
        self.page = page.encode() if isinstance(page, str) else page
        self.status, self.hang = status, hang
        self.asked: list[bytes] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.number = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                accepted, _ = self.socket.accept()
            except OSError:
                return
            with accepted, contextlib.suppress(ConnectionError):    # it may have given up
                self.asked.append(accepted.recv(65536))
                if self.hang:
                    accepted.recv(1)
                accepted.sendall(b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
                                 % (self.status.encode(), len(self.page), self.page))


@pytest.fixture()
def core(machine: MakeMachine) -> Iterator[Callable[..., Machine]]:
    """Makes machines whose cmon0 has these ports."""
    infos: list[Vminfod] = []

    def make(*ports: int, **settings: Any) -> Machine:
        info = Vminfod()
        infos.append(info)
        info.behave = info.ready([{
            "zonename": CMON0, "uuid": CMON0, "alias": "cmon0", "tags": {"smartdc_role": "cmon"},
            "owner_uuid": agent.ADMIN_UUID,
            "nics": [{"interface": "net0", "ip": "127.0.0.1", "nic_tag": "admin"}],
            "customer_metadata": {"metricPorts": ",".join(map(str, ports))}}, {
            "zonename": WEB01, "uuid": WEB01, "alias": "web01", "tags": {"manta_role": "x"},
            "owner_uuid": "2f6d1c1a-9d3c-4a55-8f0e-2b8f3f3b7a10",
            "nics": [{"interface": "net0", "ip": "127.0.0.1", "nic_tag": "admin"}],
            "customer_metadata": {"metricPorts": ",".join(map(str, ports))}}])
        one = machine(vminfod=info.url, **settings)
        wait_until(lambda: one.own("cmon_agent_vminfod_up") == 1)
        return one
    yield make
    for info in infos:
        info.close()


def test_a_core_zones_own_metrics_are_on_its_page(core: Callable[..., Machine]) -> None:
    port = Port(CORE_PAGE)
    one = core(port.number)
    page = one.zone(CMON0, x_joyent_cmon_opts=CORE)
    found = samples(page)
    assert found['http_requests_completed{route="a"}'] == 5 and found["took_seconds_count"] == 2
    assert found["cpu_user_usage"] > 1 and "cmon_core_requests" not in page
    assert found["vfs_bytes_read_count"] > 1 and "vfs_bytes_read_sum" not in page
    agent.parse(page)
    assert not down(page) and value(page, "triton_core_metrics_available_boolean") == 1
    assert b"GET /metrics HTTP/1.1\r\n" in port.asked[0] and b"Connection: close" in port.asked[0]
    assert one.own('cmon_agent_input_problems_total{source="triton_core"}') == 3
    assert 'zonename="%s",route="a"' % CMON0 in one.get("/v1/zones/metrics").text
    asked = len(port.asked)
    page = one.zone(CMON0, x_joyent_cmon_opts=OTHER)
    assert "http_requests_completed" not in page and len(port.asked) == asked, "as the proxy says"
    assert value(page, "triton_core_metrics_available_boolean") == 0
    page = one.zone(CMON0)
    assert "http_requests_completed" in page, "nobody says: by role and owner"
    asked = len(port.asked)
    page = one.zone(WEB01, x_joyent_cmon_opts=CORE)
    assert "http_requests_completed" not in page and len(port.asked) == asked, "a tenant's"


def test_a_core_zone_with_20_ports_has_all_of_them(core: Callable[..., Machine]) -> None:
    ports = [Port(ARTEDI.replace("ping", f"r{number}")) for number in range(20)]
    page = core(*(port.number for port in ports)).zone(CMON0)
    assert not down(page)
    for number in range(20):
        assert f'_duration_seconds{{method="GET",route="r{number}",le="0.01"}} 3\n' in page
    assert page.count("# TYPE http_request_duration_seconds histogram\n") == 1


def test_a_port_that_fails_costs_that_port(core: Callable[..., Machine]) -> None:
    good = Port(CORE_PAGE)
    one = core(free_port(), Port("no page {").number, Port("", "500 Oops").number, good.number)
    page = one.zone(CMON0)
    assert "http_requests_completed" in page and not down(page)
    assert one.own('cmon_agent_input_problems_total{source="triton_core"}') >= 3


@pytest.mark.parametrize("port", [Port(b"\xff\xfe"), Port("x" * 3_000_000), Port("<html>\n"),
                                  Port("", "302 Found"), Port("", hang=True)],
                         ids=["no text", "3 MB", "a page for people", "elsewhere", "hangs"])
def test_the_collector_fails_if_all_ports_fail(core: Callable[..., Machine], port: Port) -> None:
    one = core(port.number, collectors={"triton_core": {"timeout": 0.3}})
    page = one.zone(CMON0)
    assert down(page) == {"triton_core"} and len(samples(page)) > 50
    assert down(one.zone(WEB01)) <= {"link"}, "which this vminfod does not tell of"
