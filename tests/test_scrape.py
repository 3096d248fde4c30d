# SPDX-License-Identifier: MPL-2.0
"""Scrapes of a whole agent, with every fault of kernel, commands and vminfod."""
from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from nodes import (
    LB01, NEIGHBOURS, SPARK01, STOPPED, WEB01, Desk, Machine, Vminfod, children_of, collectors,
    down, placed, steady, threads_of, value, zfs_without)
import cmon_agent as agent_module
from support import NODE, Kernel, free_port, http_get, samples, wait_until

MakeKernel = Callable[..., Kernel]
MakeMachine = Callable[..., Machine]


def clean(machine: Machine) -> None:
    """Nothing has failed except what the test caused."""
    assert "Traceback" not in machine.agent.log, machine.agent.log


# --- what a page costs ----------------------------------------------------------------------------

def test_a_page_costs_one_read_for_each_kstat_and_no_walk(machine: MakeMachine) -> None:
    one = machine(start=False)
    one.kernel.log_reads()
    one.start()
    one.zone(LB01)
    assert one.kernel["opens"] == 1
    one.kernel.reads()
    before = one.kernel.counters()
    one.zone(LB01, Accept="*/*")
    assert one.kernel["reads"] == before["reads"], "a page that was just made is made again"
    one.refresh()
    wait_until(lambda: one.kernel["opens"] > before["opens"])       # the last thing that it does
    one.kernel.reads()
    before = one.kernel.counters()
    one.zone(LB01)
    reads = one.kernel.reads()
    after = one.kernel.counters()
    assert len(reads) == len(set(reads)) == after["reads"] - before["reads"]
    refs = [placed(kstat["module"], kstat["instance"], kstat["name"], kstat["class"])
            for kstat in one.frame["kstats"]]
    # the names of guests are read once after a refresh, for all zones
    assert sorted(read for read in reads if not read.startswith("vmm:")) == sorted([
        f"{ref.module}:{ref.instance}:{ref.name}" for ref in refs
        if any(table.zone is not None and table.zone(ref) == 7 for table in ref.tables)])
    assert after["rebuilds"] == before["rebuilds"] and after["opens"] == before["opens"]
    assert after["lookups"] == 0 and after["processes"] == 1
    clean(one)


def test_other_kstats_of_a_module_cost_no_read(machine: MakeMachine) -> None:
    """unix, cpu, zfs and others hold a thousand kstats that no table wants."""
    reads = []
    for more in ((), NEIGHBOURS):
        one = machine([*node_kstats(), *({
            "module": module, "instance": instance, "name": name, "class": klass, "type": 1,
            "crtime": 5, "snaptime": 0, "data": {"x": 1}}
            for module, instance, name, klass in more)])
        one.node()
        one.refresh()
        before = one.kernel["reads"]
        wait_until(lambda: one.kernel["opens"] > 1)         # the last thing that a refresh does
        page = one.node()
        assert not down(page) - {"zones"}
        reads.append(one.kernel["reads"] - before)
    assert reads[1] == reads[0] < 300 < len(NEIGHBOURS)


def test_the_chain_is_walked_only_when_it_has_changed(
        desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []
    real = agent_module.Handle._build

    def build(handle: Any) -> Any:
        walks.append(handle)
        return real(handle)
    monkeypatch.setattr(agent_module.Handle, "_build", build)
    one: Any = desk(kstats=node_kstats())
    for _ in range(20):
        one.page(PATH)
        one.page(f"/v1/{LB01}/metrics")
        one.pass_by(10.0, 1.0)
    assert len(walks) == 1
    one.kernel.write(node_kstats()[:-1])
    one.page(PATH)
    assert len(walks) == 2 and one.kernel["opens"] == 1


def test_fifty_concurrent_clients_share_one_collection(machine: MakeMachine) -> None:
    one = machine(start=False)
    one.kernel.log_reads()
    one.kernel.faults(("delay", "zone_vfs:5:*", "200"))
    one.start()
    address = one.agent.address
    one.zone(LB01)                              # the name of the zone has been read once, too
    one.kernel.reads()
    answers: list[Any] = []

    def ask() -> None:
        answers.append(http_get(address, f"/v1/{WEB01}/metrics"))
    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 50 and {answer.status for answer in answers} == {200}
    assert one.kernel.reads().count(f"zone_vfs:5:{WEB01[:30]}") == 1
    assert len({answer.body for answer in answers}) == 1


def test_sixty_zones_and_four_clients(machine: MakeMachine) -> None:
    one = machine(kstats=(), start=False)
    one.kernel.synthesise(60, 10_000)
    one.start()
    address = one.agent.address
    zones = [f"{n:08x}-0000-4000-8000-{n:012x}" for n in range(1, 61)]
    pages: list[dict[str, str]] = []

    def ask() -> None:
        mine: dict[str, str] = {}

        def some(part: list[str]) -> None:
            for zone in part:
                answer = http_get(address, f"/v1/{zone}/metrics")
                assert answer.status == 200
                mine[zone] = answer.text
        parts = [threading.Thread(target=some, args=(zones[n::5],)) for n in range(5)]
        for part in parts:
            part.start()
        for part in parts:
            part.join()
        pages.append(mine)
    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert [len(mine) for mine in pages] == [60] * 4
    for zone in zones:
        page = pages[0][zone]
        assert not down(page) and all(steady(mine[zone]) == steady(page) for mine in pages)
    clean(one)


# --- zones that come, go and change ---------------------------------------------------------------

def rebooted(kstats: list[dict[str, Any]], zone: str, old: int, new: int, **members: Any
             ) -> list[dict[str, Any]]:
    """The same zone after a reboot: another zone id, creation time and values."""
    changed = []
    for kstat in kstats:
        data = kstat["data"]
        mine = data.get("zonename") == zone or (
            kstat["instance"] == old and kstat["module"] in ("tcp", "udp"))
        if not mine:
            changed.append(kstat)
            continue
        changed.append({**kstat, "crtime": kstat["crtime"] + 10 ** 12,
                        "instance": new if kstat["instance"] == old else kstat["instance"],
                        "name": kstat["name"].replace(f"z{old}_", f"z{new}_").replace(
                            f"zone_{old}", f"zone_{new}"),
                        "data": {**data, **{name: value for name, value in members.items()
                                            if name in data}}})
    return changed


@pytest.mark.parametrize("victim", ["memory_cap:7:*", "tcp:7:tcp", "caps:7:cpucaps*", "zones:7:*"])
@pytest.mark.parametrize("new", [33, 7], ids=["under a new id", "under the same id"])
def test_a_zone_that_reboots_during_a_read_is_read_again(machine: MakeMachine, victim: str,
                                                           new: int) -> None:
    one = machine(cpu_budget=None)
    kstats = one.frame["kstats"]
    one.zone(WEB01)                                     # the agent runs and has its chain
    after = rebooted(kstats, LB01, 7, new, rss=4711, inSegs=4712, rbytes64=4713, nsec_user=4714,
                     nread=4715, usage=4716)
    one.kernel.write(after, "next")
    one.kernel.faults(("switch", victim, "next"))
    page = one.zone(LB01)
    one.kernel.faults()
    found = samples(page)
    assert not down(page)
    assert found["mem_agg_usage"] == 4711 and found["tcp_segments_in_total"] == 4712
    assert found["cpu_user_usage"] == 4714 and found["vfs_bytes_read_count"] == 4715
    assert found["cpucap_cur_usage_percentage"] == 4716
    assert [value for name, value in found.items() if name.startswith("net_agg_bytes_in")] \
        == [4713, 4713]
    assert one.zone(WEB01)
    clean(one)


def test_a_zone_that_stops_while_being_read_is_not_found(machine: MakeMachine) -> None:
    one = machine()
    one.zone(WEB01)
    rest = [kstat for kstat in one.frame["kstats"] if kstat["data"].get("zonename") != LB01
            and (kstat["module"], kstat["instance"]) not in (("tcp", 7), ("udp", 7))]
    one.kernel.write(rest, "next")
    one.kernel.faults(("switch", "memory_cap:7:*", "next"))
    answer = one.get(f"/v1/{LB01}/metrics")
    assert answer.status == 404 and answer.headers["x-cmon-error"] == "no_such_zone"
    assert answer.text == (f"zone {LB01} is not running on this compute node; / lists the "
                           "running zones\n")
    assert one.get(f"/vms/{LB01}/metrics").status == 404
    assert not down(one.zone(WEB01))
    one.kernel.faults()
    one.kernel.write(one.frame["kstats"])
    one.refresh()
    assert not down(one.zone(LB01)), "it is back"
    clean(one)


def test_a_zone_with_late_kstats_is_found(machine: MakeMachine) -> None:
    """Created and installed are two steps, and the second one changes no chain id."""
    one = machine([kstat for kstat in node_kstats() if kstat["data"].get("zonename") != LB01])
    one.zone(WEB01)
    opens = one.kernel["opens"]
    one.kernel.faults(("late", "zones:7:*"))
    one.kernel.write(node_kstats())
    assert not down(one.zone(LB01))
    assert one.kernel["opens"] == opens + 1 and one.kernel["closes"] == opens


def test_a_hidden_zone_does_not_reopen_the_chain_for_each_request(machine: MakeMachine) -> None:
    one = machine()
    one.zone(WEB01)
    one.kernel.faults(("hide", "zones:7:*"))
    one.refresh()
    for _ in range(20):
        assert one.get(f"/v1/{LB01}/metrics").status == 404
    assert one.kernel["opens"] <= 3
    one.kernel.faults()

    def found() -> bool:
        one.refresh()
        return one.get(f"/v1/{LB01}/metrics").status == 200
    wait_until(found, "what was installed since, after a refresh")
    clean(one)


def test_a_chain_that_changes_at_every_read(machine: MakeMachine) -> None:
    one = machine()
    one.kernel.faults(("churn",))
    for _ in range(25):
        one.refresh()
        for zone in (WEB01, LB01, SPARK01):
            assert not down(one.zone(zone)) and not down(one.node()) - {"zones"}
    assert one.kernel["stale"] == 0 and one.kernel["rebuilds"] >= 25
    assert one.kernel["headers"] < 4 * len(one.frame["kstats"]), "headers pile up"
    clean(one)


def test_requests_for_missing_zones_do_not_walk_the_chain(desk: Callable[..., Desk]) -> None:
    """A Prometheus with old targets, and a chain that changes all the time."""
    one: Any = desk(kstats=())
    one.kernel.synthesise(10, 30_000)
    one.kernel.faults(("churn",))
    for number in range(30):
        path = f"/v1/{number:08x}-1111-4222-8333-444444444444/metrics"
        assert one.answer(one.ask(path)).status == 404
    assert one.kernel["rebuilds"] <= 4
    one.pass_by(60.0, 1.0)
    assert value(agent_page(one), "cmon_agent_pages") == 0, "nothing is kept of them"


def test_the_chain_is_reopened_once_per_chain_id(desk: Callable[..., Desk]) -> None:
    """No matter how long a missing zone is requested."""
    one: Any = desk()
    missing = f"/v1/{LB01}/metrics"
    for _ in range(60):
        assert one.answer(one.ask(missing)).status == 404
        one.pass_by(2.0, 1.0)
    assert one.kernel["opens"] == 2
    one.kernel.faults(("late", "zones:5:*"))
    one.kernel.write(small(3, LB01))
    one.pass_by(2.0, 1.0)
    assert count_on(one, missing) == 3 and one.kernel["opens"] == 3


def test_a_missing_zone_is_looked_up_once_a_second(desk: Callable[..., Desk]) -> None:
    one: Any = desk()
    missing = f"/v1/{LB01}/metrics"
    assert one.answer(one.ask(missing)).status == 404
    before = one.kernel["updates"]
    for _ in range(50):
        assert one.answer(one.ask(missing)).status == 404
    assert one.kernel["updates"] == before
    one.kernel.write(small(3, LB01))
    one.pass_by(1.2)
    assert count_on(one, missing) == 3


def node_kstats() -> list[dict[str, Any]]:
    """The kstats of the recorded node."""
    kstats: list[dict[str, Any]] = json.loads(NODE.read_text())["frames"][0]["kstats"]
    return kstats


# --- reads that fail, and reads that do not return ------------------------------------------------

@pytest.mark.parametrize("module, collector, errno", [
    ("zone_vfs:7:*", "zone_vfs", 5), ("tcp:7:tcp", "tcp", 2), ("link:0:z7_net1", "link", 11),
    ("memory_cap:7:*", "memcap", 22), ("zones:7:*", "zone_misc", 5), ("caps:7:cpu*", "cpucap", 12),
    ("tcp:7:tcp", "tcp", 4711)])
def test_a_read_that_fails_costs_its_own_collector(machine: MakeMachine, module: str,
                                                   collector: str, errno: int) -> None:
    one = machine()
    healthy = one.zone(LB01)
    one.kernel.faults(("fail", module, errno))
    one.refresh()
    page = one.zone(LB01)
    assert down(page) == {collector}
    assert value(page, f"{collector}_metrics_available_boolean") == 0
    ages = collectors(page, "cmon_sample_age_seconds")
    assert collector not in ages and set(collectors(page)) - set(ages) == {collector}
    assert not down(one.zone(WEB01)), "other zones keep it"
    one.kernel.faults()
    one.refresh()
    assert steady(one.zone(LB01)) == steady(healthy)
    clean(one)


def test_a_vanished_kstat_is_not_a_failure(machine: MakeMachine) -> None:
    """ENXIO: a cap was taken away between look-up and read."""
    one = machine()
    one.kernel.faults(("fail", "caps:7:cpucaps*", 6))
    page = one.zone(LB01)
    assert not down(page) and "cpucap_limit_percentage" not in page
    assert value(page, "cpucap_metrics_available_boolean") == 0


@pytest.mark.parametrize("rule, text", [
    (("fail-open", "13"), "kstat_open: permission denied"),
    (("fail-update", "5"), "kstat_chain_update: input/output error")])
def test_missing_kstats_are_reported_and_recover(machine: MakeMachine, rule: tuple[str, str],
                                                 text: str) -> None:
    one = machine(start=False)
    one.kernel.faults(rule)
    one.start()
    answer = one.get(f"/v1/{WEB01}/metrics")
    assert answer.status == 503 and text in answer.text and answer.text.count("\n") == 1
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers["x-cmon-error"] == "not_collected"
    if rule[0] == "fail-open":
        assert one.get("/-/ready").status == 503
    one.kernel.faults()
    one.refresh()
    assert not down(one.zone(WEB01)) and one.get("/-/ready").status == 200
    clean(one)


def test_a_blocked_read_affects_only_its_collector(machine: MakeMachine) -> None:
    one = machine()
    page = one.zone(LB01)
    one.node()
    idle = threads_of(one.agent)
    one.kernel.faults(("block", "tcp:7:tcp"))
    one.refresh()
    began = time.monotonic()
    page = one.zone(LB01, timeout=5.0)
    assert time.monotonic() - began < 5.0
    assert down(page) == {"tcp"}
    ages = collectors(page, "cmon_sample_age_seconds")
    assert max(age for name, age in ages.items() if name != "zfs") < 2.0 and "tcp" not in ages
    for _ in range(100):
        one.refresh()
        assert down(one.zone(LB01)) == {"tcp"}
        assert not down(one.zone(WEB01))
    one.node()
    assert threads_of(one.agent) <= idle + 2
    assert one.kernel["opens"] - one.kernel["closes"] == 2
    assert one.kernel["blocked"] == 1
    assert one.own("cmon_agent_kstat_blocked_threads") == 1
    assert 'cmon_agent_kstat_quarantine_seconds{kstat="tcp:7:tcp"}' in one.get("/metrics").text
    one.kernel.faults()                                 # the read returns
    wait_until(lambda: one.kernel["opens"] - one.kernel["closes"] == 1)
    one.refresh()
    wait_until(lambda: not down(one.zone(LB01)))
    assert one.own("cmon_agent_kstat_blocked_threads") == 0
    clean(one)


def test_many_blocked_reads_use_three_handles_and_pages_still_arrive(machine: MakeMachine) -> None:
    one = machine()
    first = one.zone(LB01)
    one.kernel.faults(("block", "tcp:*:*"), ("block", "zone_vfs:*:*"), ("block", "memory_cap:*:*"),
                      ("block", "caps:*:*"))
    wait_until(lambda: collectors(one.zone(LB01, timeout=1.0), "cmon_sample_age_seconds")[
        "zone_misc"] > 3.0, "values that are no longer fresh")
    for _ in range(20):
        page = one.zone(LB01, timeout=1.0)
        assert value(page, "mem_agg_usage") == value(first, "mem_agg_usage"), "the last values"
        answer = one.get(f"/v1/{WEB01}/metrics", timeout=1.0)
        assert answer.status == 503 and "retry-after" in answer.headers
    assert one.kernel["opens"] - one.kernel["closes"] <= 3 and one.kernel["blocked"] <= 3
    one.kernel.faults()
    wait_until(lambda: one.kernel["blocked"] == 0)
    one.refresh()
    wait_until(lambda: not down(one.zone(LB01)) and not down(one.zone(WEB01)))
    clean(one)


def test_a_zone_without_values_waits_until_its_deadline_and_gets_retry_after(machine: MakeMachine
                                                                            ) -> None:
    one = machine()
    one.kernel.faults(("delay", "memory_cap:5:*", "400"))
    answer = one.get(f"/v1/{WEB01}/metrics", timeout=0.2)
    assert answer.status == 503 and int(answer.headers["retry-after"]) > 0
    assert answer.text == (f"collecting {WEB01} takes longer than the scrape timeout: try again in "
                           "a few seconds\n")
    wait_until(lambda: one.get(f"/v1/{WEB01}/metrics").status == 200)


def test_loop_owned_objects_are_used_only_in_the_loop(desk: Callable[..., Desk],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools hand over what they bring."""
    one: Any = desk(kstats=node_kstats())
    strangers = set()

    def note(kind: type) -> Any:
        def set_attribute(owner: Any, name: str, value: Any) -> None:
            if not one.server.loop.is_here():
                strangers.add((kind.__name__, name, threading.current_thread().name))
            object.__setattr__(owner, name, value)
        return set_attribute
    for kind in (agent_module.Cell, agent_module.Page, agent_module.Scraper):
        monkeypatch.setattr(kind, "__setattr__", note(kind), raising=False)
    for _ in range(3):
        for path in (PATH, "/v1/gz/metrics", f"/v1/{LB01}/metrics"):
            assert one.answer(one.ask(path)).status == 200
        one.kernel.faults(("fail", "tcp:7:tcp", 5))
        one.pass_by(10.0, 1.0)
        assert one.answer(one.ask("/v1/refresh", method="POST")).status == 200
    assert one.answer(one.ask(f"/v1/{STOPPED}/metrics")).status == 404
    assert not strangers


# --- commands -------------------------------------------------------------------------------------

HANGS = "#!/bin/sh\nexec sleep 1000\n"
STUBBORN = """#!/usr/bin/env python3
import os, signal, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if os.fork() == 0 and os.fork() == 0:
    pass
open(os.path.dirname(os.path.abspath(__file__)) + "/pids", "a").write(f"{os.getpid()}\\n")
time.sleep(1000)
"""
COLLECTOR_OF = {"zfs": "zfs", "zpool": "zpool", "ntpq": "ntp", "zoneadm": "zones"}
ENDS = {
    "exits with 1": ("#!/bin/sh\necho 'no such pool' >&2\nexit 1\n", "no such pool"),
    "is killed": ("#!/bin/sh\nkill -9 $$\n", ""),
    "floods": ("#!/bin/sh\nexec yes a b c d e f g h\n", "more than"),
    "hangs": (HANGS, "timed out"),
    "hangs with its output closed": ("#!/bin/sh\nexec >&- 2>&-\nexec sleep 1000\n",
                                     "timed out"),
    "hangs in children that ignore signals": (STUBBORN, "timed out"),
    "cannot be run": ("no script, no program\n", ""),
}


@pytest.mark.parametrize("command", list(COLLECTOR_OF))
@pytest.mark.parametrize("how", list(ENDS))
def test_a_command_that_fails_costs_its_own_metrics_only(machine: MakeMachine, command: str,
                                                         how: str) -> None:
    # only what hangs anyway has little time: a machine that is slow must not change the outcome
    hasty = {COLLECTOR_OF[command]: {"timeout": 0.3}} if how.startswith("hangs") else {}
    one = machine(start=False, collectors=hasty)
    script, why = ENDS[how]
    one.script(command, script)
    one.start()
    zone = command == "zfs"
    if command == "ntpq" and how == "floods":
        why = ""
    page = one.zone() if zone else one.node()
    assert down(page) == {COLLECTOR_OF[command]}, one.agent.log
    assert not down(one.node() if zone else one.zone())
    log = one.agent.wait_for_log(f"{COLLECTOR_OF[command]} of .* failed: ")
    assert why in log[0].string
    pids = one.commands / "pids"
    if pids.exists():                               # the whole group was killed
        for pid in map(int, pids.read_text().split()):
            wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists())
    wait_until(lambda: not children_of(one.agent), "no child is left, and no zombie")
    clean(one)


@pytest.mark.parametrize("command", list(COLLECTOR_OF))
def test_garbage_from_a_command_is_survived(machine: MakeMachine, command: str) -> None:
    one = machine(start=False)
    one.script(command, "#!/bin/sh\nhead -c 20000 /dev/urandom\necho\n"
               "printf 'zones/%s\\t-\\tnan\\tinf\\n' " + WEB01 + "\n")
    one.start()
    page = one.zone() if command == "zfs" else one.node()
    assert down(page) <= {COLLECTOR_OF[command]}
    clean(one)


def test_a_page_waits_for_a_command_only_until_its_deadline(machine: MakeMachine) -> None:
    one = machine(start=False)
    one.script("zfs", "#!/bin/sh\necho $$ >> " + str(one.commands / "runs") + "\nexec sleep 1000\n")
    one.start()
    page = one.zone(timeout=1.0)
    assert down(page) == {"zfs"} and len(collectors(page)) > 8
    ages = collectors(page, "cmon_sample_age_seconds")
    assert set(collectors(page)) - set(ages) == {"zfs"} and max(ages.values()) < 2.0
    threads = threads_of(one.agent)
    for _ in range(100):                # the next ones do not wait again, and start nothing
        one.refresh()
        assert down(one.zone(timeout=1.0)) == {"zfs"}
        assert down(one.zone(LB01, timeout=1.0)) == {"zfs"}
    assert len((one.commands / "runs").read_text().split()) == 1
    assert threads_of(one.agent) <= threads + 4
    clean(one)


@pytest.mark.parametrize("works", [True, False], ids=["works", "fails"])
def test_zfs_is_run_once_for_all_zones(machine: MakeMachine, works: bool) -> None:
    one = machine(start=False)
    runs = one.commands / "runs"
    real = (one.commands / "zfs").rename(one.commands / "zfs-real")
    one.script("zfs", f"#!/bin/sh\necho \"$*\" >> {runs}\n" + (
        f'exec {real} "$@"\n' if works else "echo 'cannot open' >&2\nexit 1\n"))
    one.start()
    zones = [vm["uuid"] for vm in one.frame["vms"] if vm["state"] == "running"]
    pages = [one.zone(zone) for zone in zones]
    assert {value(page, "zfs_metrics_available_boolean") for page in pages} == {int(works)}
    assert {frozenset(down(page)) for page in pages} == {frozenset() if works else
                                                         frozenset({"zfs"})}
    assert len(runs.read_text().splitlines()) == 1
    clean(one)


def test_a_failing_zfs_opens_one_breaker_for_all_zones(machine: MakeMachine) -> None:
    one = machine(start=False)
    runs = one.commands / "runs"
    works = (one.commands / "zfs").read_text()
    one.script("zfs", f"#!/bin/sh\necho >> {runs}\necho 'cannot open' >&2\nexit 1\n")
    desk = Desk(one.config)
    for _ in range(60):                                 # ten minutes
        for zone in (WEB01, LB01, SPARK01):
            assert down(desk.page(f"/v1/{zone}/metrics")) == {"zfs"}
        desk.pass_by(10.0, 1.0)
    assert 5 <= len(runs.read_text()) <= 10, "3, then after 30 s, 60 s, 120 s, 240 s"
    assert 'cmon_agent_collector_breaker_open{collector="zfs",target="all"' in agent_page(desk)
    one.script("zfs", works)
    for _ in range(50):
        pages = [desk.page(f"/v1/{zone}/metrics") for zone in (WEB01, LB01, SPARK01)]
        desk.pass_by(10.0, 1.0)
    assert not any(map(down, pages)), "it came back by itself"
    desk.close()


def test_a_zone_newer_than_the_dataset_list_requests_a_new_list(machine: MakeMachine) -> None:
    one = machine(start=False)
    desk = Desk(one.config)
    path = f"/v1/{WEB01}/metrics"
    full = (one.commands / "zfs").read_text()
    one.script("zfs", "#!/bin/sh\n"
               "printf 'zones\\t1\\t1\\t1\\t1\\t0\\t1.00\\t1.00\\t1\\t1\\t1\\t0\\n'\n")
    desk.page(f"/v1/{LB01}/metrics")
    one.script("zfs", full)
    desk.pass_by(10.0)
    assert value(desk.page(path), "zfs_metrics_available_boolean") == 0
    desk.pass_by(21.0)
    assert value(desk.page(path), "zfs_metrics_available_boolean") == 1
    desk.close()


def test_datasets_created_by_a_tenant_cost_nobody(machine: MakeMachine) -> None:
    """Ten thousands of datasets, more than is read of a command, which sorts them first."""
    one = machine(start=False)
    (one.commands / "zfs").rename(one.commands / "zfs.real")
    one.script("zfs", f"""#!/bin/sh
case "$*" in
    *" -d 1 "*) exec {one.commands}/zfs.real "$@";;
esac
yes "zones/{LB01}/data/many" | head -c 9000000
exec {one.commands}/zfs.real "$@"
""")
    page = one.start().zone()
    assert not down(page) and value(page, "zfs_metrics_available_boolean") == 1


def test_an_old_zfs_without_a_column_is_run_without_it(machine: MakeMachine) -> None:
    one = machine(start=False)
    one.script("zfs", zfs_without("refcompressratio", WEB01))
    one.start()
    page = one.zone()
    assert not down(page) and value(page, "zfs_metrics_available_boolean") == 1
    assert "zfs_available" in page and "ref_compress" not in page
    one.agent.wait_for_log("this zfs has no property refcompressratio")


def test_a_column_refused_once_is_requested_again(machine: MakeMachine) -> None:
    """The platform may have been updated, or the fault may be over."""
    one = machine(start=False)
    desk = Desk(one.config)
    works = (one.commands / "zfs").read_text()
    one.script("zfs", zfs_without("quota", WEB01))
    before = desk.page(f"/v1/{WEB01}/metrics")
    assert not down(before) and "\nzfs_used 2\n" in before and "zfs_quota" not in before
    one.script("zfs", works)
    desk.pass_by(310.0, 1.0)
    assert "\nzfs_quota " in desk.page(f"/v1/{WEB01}/metrics")
    desk.close()


def test_a_zone_missing_from_a_failing_zfs_list_keeps_its_dataset(machine: MakeMachine) -> None:
    one = machine(start=False)
    desk = Desk(one.config)
    works = (one.commands / "zfs").read_text()
    one.script("zfs", works.replace("exit 0", "").replace("#!/bin/sh\n", "#!/bin/sh\n(\n", 1)
               + f") | grep -v {LB01}\necho 'zones/{LB01}: I/O error' >&2\nexit 1\n")
    assert not down(desk.page(f"/v1/{WEB01}/metrics")), "what was listed counts"
    page = desk.page(f"/v1/{LB01}/metrics")
    assert down(page) == {"zfs"} and value(page, "zfs_metrics_available_boolean") == 0
    one.script("zfs", works)
    desk.pass_by(31.0, 1.0)
    page = desk.page(f"/v1/{LB01}/metrics")
    assert not down(page) and value(page, "zfs_metrics_available_boolean") == 1
    desk.close()


def test_an_unkillable_command_is_not_started_again(desk: Callable[..., Desk],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """It is blocked by a dead disk: thousands of scrapes start no second one."""
    one: Any = desk(collectors={"zfs": {"timeout": 0.2}})
    one.machine.script("zfs", f"#!/bin/sh\necho $$ >> {one.machine.commands}/runs\nexec sleep 60\n")
    monkeypatch.setattr(os, "killpg", lambda *_: None)  # the kernel does not deliver it
    asked = one.ask(PATH)
    assert down(one.answer(asked).text) == {"zfs"}
    idle = threading.active_count()
    for _ in range(4000):
        assert down(one.page(PATH)) == {"zfs"}
        one.pass_by(5.0, 5.0)
    assert threading.active_count() <= idle + 6
    [pid] = (one.machine.commands / "runs").read_text().split()
    assert value(agent_page(one), "cmon_agent_commands_hanging") == 1
    with pytest.raises(agent_module.CommandError, match="an earlier run has hung for .* be killed"):
        one.host.run("zfs", ["list"], 1.0)
    monkeypatch.undo()
    os.killpg(int(pid), signal.SIGKILL)                 # the disk is back
    one.machine.script("zfs", f"#!/bin/sh\nprintf 'zones/{WEB01}" + "\\t1" * 11 + "\\n'\n")
    wait_until(lambda: value(agent_page(one), "cmon_agent_commands_hanging") == 0)

    def came_back() -> bool:                            # the command runs in real time
        one.pass_by(10.0, 1.0)
        page = one.page(PATH)
        return not down(page) and value(page, "zfs_metrics_available_boolean") == 1
    wait_until(came_back)


def test_chrony_replaces_an_absent_ntpq(machine: MakeMachine) -> None:
    one = machine(start=False)
    one.hide("ntpq")
    (one.commands / "chronyc").write_text("""#!/bin/sh
case "$*" in
    *tracking*) echo "0A140001,10.20.0.1,3,1767225600.5,0.000001,0.000002,0.000003,-1.5,0.1,0.2,\
0.03,0.004,64.5,Normal";;
    *) echo "^,*,10.20.0.1,2,6,377,12,0.000010,0.000011,0.000012";;
esac
""")
    (one.commands / "chronyc").chmod(0o755)
    content = json.loads(one.config.read_text())
    content["commands"]["chronyc"] = str(one.commands / "chronyc")
    one.config.write_text(json.dumps(content))
    one.start()
    page = one.node()
    assert not down(page) and value(page, "ntp_stratum_number") == 3
    assert 'ntp_peer_state{remote="10.20.0.1"} 6' in page


def test_commands_get_no_environment_and_no_terminal(machine: MakeMachine) -> None:
    one = machine(start=False)
    seen = one.commands / "seen"
    one.script("zpool", f"#!/bin/sh\n(env; pwd; readlink /proc/self/fd/0) > {seen}\nexit 1\n")
    os.environ["CMON_TEST_SECRET"] = "x"
    try:
        one.start()
    finally:
        del os.environ["CMON_TEST_SECRET"]
    one.node()
    text = seen.read_text()
    assert "CMON_TEST_SECRET" not in text and "LC_ALL=C" in text and "/dev/null" in text
    assert "\n/\n" in text


# --- lifetimes, on a clock of the test's ----------------------------------------------------------

def small(count: int = 0, zone: str = WEB01) -> list[dict[str, Any]]:
    """A kernel with one zone that has done something `count` times."""
    common = {"instance": 5, "type": 1, "crtime": 5, "snaptime": 0}
    return [
        {**common, "module": "zones", "name": zone[:30], "class": "zone_misc",
         "data": {"zonename": zone, "nsec_user": count, "boot_time": 1763769600}},
        {**common, "module": "memory_cap", "name": zone[:30], "class": "zone_memory_cap",
         "data": {"zonename": zone, "rss": count}}]


@pytest.fixture()
def desk(machine: MakeMachine) -> Iterator[Callable[..., Desk]]:
    """Makes agents on the test's clock; by default on the small kernel, without commands."""
    made: list[Desk] = []

    def make(kstats: Any = None, **settings: Any) -> Desk:
        nothing = {name: {"enabled": False} for name in ("zfs", "zpool", "ntp", "zones")}
        one = machine(kstats=small() if kstats is None else kstats, start=False,
                      **{"collectors": nothing, **settings})
        made.append(Desk(one.config))
        made[-1].kernel = one.kernel            # type: ignore[attr-defined]
        made[-1].machine = one                  # type: ignore[attr-defined]
        return made[-1]
    yield make
    for one in made:
        one.close()
        assert one.kernel["overlaps"] == one.kernel["stale"] == 0   # type: ignore[attr-defined]


PATH = f"/v1/{WEB01}/metrics"


def count_on(desk: Any, path: str = PATH, **more: Any) -> float:
    """The value on the page for `small(count)`."""
    return value(desk.page(path, **more), "mem_agg_usage")


@pytest.mark.parametrize("interval", [10.0, 5.0, 15.0, 60.0, 1.5])
def test_consecutive_scrapes_get_different_samples(desk: Callable[..., Desk], interval: float
                                                  ) -> None:
    """The original's cache of 10 s made 36 % of the samples of a 10 s scrape a copy."""
    one: Any = desk()
    seen = []
    for number in range(1000 if interval == 10.0 else 60):
        one.kernel.write(small(number))
        one.clock.at += interval * (0.985 + 0.03 * ((number * 7919) % 101) / 100)   # some jitter
        one.pump()
        seen.append(count_on(one))
    fresh = seen[3:]                # the first ones of an interval below 8 s do not know it yet
    assert fresh == [float(number) for number in range(3, len(seen))]


def test_a_client_that_polls_all_the_time_gets_a_new_sample_each_second(desk: Callable[..., Desk]
                                                                   ) -> None:
    one: Any = desk()
    seen = []
    for number in range(100):
        one.kernel.write(small(number))
        one.clock.at += 0.1
        one.pump()
        seen.append(count_on(one))
    assert 9 <= len(set(seen)) <= 14
    before = one.kernel["reads"]
    for _ in range(50):
        one.clock.at += 0.001
        count_on(one)
    assert one.kernel["reads"] - before <= 3


def test_the_scrape_interval_is_measured_per_client(desk: Callable[..., Desk]) -> None:
    """Two Prometheus servers at 15 s each, half a second apart, are not one at half a second."""
    one: Any = desk()
    collections = []
    for number in range(20):
        one.kernel.write(small(number))
        for address, pause in (("10.0.0.1", 0.5), ("10.0.0.2", 14.5)):
            before = one.kernel["reads"]
            first = count_on(one, address=address)
            collections.append(one.kernel["reads"] - before)
            one.clock.at += pause
            one.pump()
            assert first == number
    assert all(collections[2::2]) and not any(collections[3::2]), collections


def test_many_clients_are_forgotten_but_not_a_frequent_one(desk: Callable[..., Desk]
                                                                       ) -> None:
    one: Any = desk()
    seen = []
    for number in range(100):
        one.kernel.write(small(number))
        for stranger in range(20 if number == 50 else 1):
            one.page(PATH, address=f"10.1.{number}.{stranger}")
        seen.append(count_on(one))
        one.clock.at += 5.0
        one.pump()
    assert len(set(seen)) >= 95


def test_a_zone_is_found_while_its_own_kstat_cannot_be_read(desk: Callable[..., Desk]) -> None:
    """Other kstats of the zone contain its name, too."""
    one: Any = desk()
    one.kernel.faults(("fail", "*:5:*", 5))
    answer = one.answer(one.ask(PATH))
    assert answer.status == 503 and "retry-after" in answer.headers
    one.kernel.faults(("fail", "zones:5:*", 5))
    one.pass_by(2.0)
    page = one.page(PATH)
    assert down(page) == {"zone_misc"} and value(page, "mem_agg_usage") == 0
    one.kernel.faults()
    one.pass_by(2.0)
    assert not down(one.page(PATH))


def test_a_request_that_another_thread_answers_counts_once(desk: Callable[..., Desk]) -> None:
    """Otherwise it would look like a client that asks ten times a second."""
    one: Any = desk()
    one.page(PATH)
    [page], asked = one.scraper.pages_of(WEB01), one.scraper.inherited.asked
    one.clock.at += 0.3
    one.server.resuming = True
    one.page(PATH)
    assert page.interval(one.clock.at) == math.inf and one.scraper.inherited.asked == asked
    one.server.resuming = False
    one.page(PATH)
    assert page.interval(one.clock.at) < 0.4 and one.scraper.inherited.asked == asked + 1


def test_the_kstat_thread_survives_a_bug_in_a_job(desk: Callable[..., Desk]) -> None:
    one: Any = desk()
    one.scraper.kstats.submit(agent_module.Job(lambda reader: 1, lambda result: [][1]))
    one.scraper.kstats.submit(agent_module.Job(lambda reader: [][1], lambda result: None))
    assert not down(one.page(PATH))


def test_the_sample_age_and_the_cached_flag_are_shown(desk: Callable[..., Desk]) -> None:
    one: Any = desk()
    page = one.page(PATH)
    assert value(page, 'cmon_sample_age_seconds{collector="memcap"}') == 0
    assert value(page, "memcap_metrics_cached_boolean") == 0
    one.clock.at += 5
    page = one.page(PATH, address="10.0.0.8")           # not the one who asks every 5 s
    assert value(page, 'cmon_sample_age_seconds{collector="memcap"}') == 5
    assert value(page, "memcap_metrics_cached_boolean") == 1
    assert value(page, 'cmon_collector_up{collector="memcap"}') == 1
    assert value(page, 'cmon_sample_age_seconds{collector="time"}') == 0


def test_min_poll_interval_is_respected(desk: Callable[..., Desk]) -> None:
    one: Any = desk(min_poll_interval=30.0)
    seen = []
    for number in range(20):
        one.kernel.write(small(number))
        seen.append(count_on(one))
        one.clock.at += 10.0
        one.pump()
    assert seen == [number - number % 3 for number in range(20)]


def test_a_collector_may_have_its_own_lifetime(desk: Callable[..., Desk]) -> None:
    one: Any = desk(collectors={**{name: {"enabled": False} for name in ("zfs", "link")},
                                "memcap": {"ttl": 100}, "zone_misc": {"ttl": 100}})
    one.page(PATH)
    assert "link_metrics" not in one.page(PATH), "a collector that does not run is not there"


@pytest.mark.parametrize("step", [-3600.0, 3600.0 * 24], ids=["back", "forth"])
def test_steps_of_the_wall_clock_change_time_of_day_only(desk: Callable[..., Desk], step: float
                                                         ) -> None:
    one: Any = desk()
    wall = [1_763_769_600.0]
    one.host.time = lambda: wall[0]
    first = one.page(PATH)
    wall[0] += step
    one.clock.at += 2.0
    second = one.page(PATH, address="10.0.0.8")
    assert value(second, "time_of_day") - value(first, "time_of_day") == step * 1000
    assert set(steady(first)) == set(steady(second))
    assert max(collectors(second, "cmon_sample_age_seconds").values()) == 2.0


def test_a_bug_in_a_collector_affects_only_that_collector(desk: Callable[..., Desk],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    one: Any = desk()
    real = agent_module.from_kstats

    def buggy(wants: Any, *arguments: Any) -> Any:
        return [][1] if "memcap" in dict(wants) else real(wants, *arguments)
    monkeypatch.setattr(agent_module, "from_kstats", buggy)
    page = one.page(PATH)
    assert down(page) == {"memcap"} and value(page, "cpu_user_usage") == 0
    monkeypatch.setattr(agent_module, "from_kstats", real)
    one.pass_by(2.0)
    assert not down(one.page(PATH))


def test_a_stopped_monotonic_clock_is_survived(desk: Callable[..., Desk]) -> None:
    one: Any = desk()
    for _ in range(5):
        one.page(PATH)
        one.pump()


# --- the breaker ----------------------------------------------------------------------------------

def test_a_failing_collector_is_paused_and_recovers(desk: Callable[..., Desk]) -> None:
    one: Any = desk()
    one.kernel.log_reads()
    one.kernel.faults(("fail", "memory_cap:5:*", 5))
    tries = []
    for _ in range(60):                                 # ten minutes
        one.page(PATH)
        tries.append(sum("memory_cap" in read for read in one.kernel.reads()))
        one.pass_by(10.0, 0.5)
    assert tries[:3] == [1, 1, 1], "three failures in a row"
    assert 3 <= sum(tries[3:]) <= 6, "then after 30 s, 60 s, 120 s, 240 s, …"
    own = agent_page(one)
    assert ('cmon_agent_collector_breaker_open{collector="memcap",target="%s",reason="memcap: '
            'memory_cap:5' % WEB01) in own
    page = one.page(PATH)
    assert down(page) == {"memcap"} and value(page, "cpu_user_usage") == 0
    one.kernel.faults()
    one.answer(one.ask("/v1/refresh", method="POST"))
    assert not down(one.page(PATH)), "a refresh tries at once"
    assert "breaker_open{" not in agent_page(one)


def test_a_breaker_heals_by_itself(desk: Callable[..., Desk]) -> None:
    one: Any = desk()
    one.kernel.faults(("fail", "memory_cap:5:*", 5))
    for _ in range(5):
        assert down(one.page(PATH)) == {"memcap"}
        one.pass_by(10.0, 0.5)
    one.kernel.faults()
    for _ in range(9):
        one.pass_by(10.0, 0.5)
        page = one.page(PATH)
    assert not down(page)


def test_last_values_are_kept_for_a_while_when_a_collector_fails(desk: Callable[..., Desk]) -> None:
    one: Any = desk()
    one.kernel.write(small(7))
    one.page(PATH)
    one.kernel.faults(("fail", "memory_cap:5:*", 5))
    one.pass_by(10.0)
    page = one.page(PATH)
    assert down(page) == {"memcap"} and value(page, "mem_agg_usage") == 7
    assert value(page, 'cmon_sample_age_seconds{collector="memcap"}') >= 10
    assert value(page, "memcap_metrics_cached_boolean") == 1
    one.pass_by(400.0, 1.0)
    page = one.page(PATH)
    assert "mem_agg_usage" not in page and value(page, "memcap_metrics_available_boolean") == 0


# --- the governor ---------------------------------------------------------------------------------

class Cpu:
    """CPU seconds that a test spends."""

    def __init__(self) -> None:
        self.used = 0.0

    def __call__(self) -> float:
        return self.used


def test_above_the_cpu_budget_less_is_collected(desk: Callable[..., Desk]) -> None:
    """Each collection costs 30 ms of a budget of 10 ms a second; scrapes come every second."""
    one: Any = desk(cpu_budget=0.01)
    cpu = Cpu()
    one.scraper.governor = agent_module.Governor(cpu, one.clock)
    shares = []
    reads = one.kernel["reads"]
    for number in range(240):
        before = cpu.used
        page = one.page(PATH)
        cpu.used += 0.015 * (one.kernel["reads"] - reads)   # two reads a page
        reads = one.kernel["reads"]
        shares.append(cpu.used - before)
        one.pass_by(1.0, 0.5)
        if number == 100:
            assert value(page, 'cmon_sample_age_seconds{collector="memcap"}') >= 0
    late = sum(shares[60:240]) / 180
    assert 0.005 < late < 0.012, late
    own = agent_page(one)
    assert value(own, "cmon_agent_lifetime_stretch_ratio") > 1.5
    assert value(own, "cmon_agent_cpu_budget_ratio") == 0.01
    assert 0.005 < value(own, "cmon_agent_cpu_usage_ratio") < 0.02
    for _ in range(120):                            # the load goes away
        one.pass_by(1.0, 1.0)
    assert value(agent_page(one), "cmon_agent_lifetime_stretch_ratio") == 1.0


@pytest.mark.parametrize("interval, load, most", [(5, 10, 1.3), (10, 4, 1.3), (15, 4, 1.5)])
def test_the_budget_holds_for_clients_that_come_seldom(interval: int, load: int, most: float
                                                       ) -> None:
    """Who collects `load` times the budget when nothing is stretched; looked at once a scrape."""
    cpu, now, collected = Cpu(), 0.0, -math.inf
    governor = agent_module.Governor(cpu, lambda: now)
    while now < 7200:
        governor.look(0.05)
        if now - collected >= 0.8 * interval * governor.stretch:
            collected = now
            cpu.used += 0.05 * load * interval
        now += interval
    assert cpu.used / now < most * 0.05


def test_without_a_budget_nothing_is_stretched(desk: Callable[..., Desk]) -> None:
    one: Any = desk(cpu_budget=None)
    cpu = Cpu()
    one.scraper.governor = agent_module.Governor(cpu, one.clock)
    for _ in range(30):
        cpu.used += 1.0
        one.pass_by(1.0)
    own = agent_page(one)
    assert value(own, "cmon_agent_lifetime_stretch_ratio") == 1.0
    assert value(own, "cmon_agent_cpu_usage_ratio") > 0.9 and "cpu_budget_ratio" not in own


def test_a_throttled_agent_still_serves_a_new_zone(desk: Callable[..., Desk]) -> None:
    one: Any = desk(cpu_budget=0.0001)
    cpu = Cpu()
    one.scraper.governor = agent_module.Governor(cpu, one.clock)
    for _ in range(30):
        cpu.used += 1.0
        one.pass_by(1.0)
        agent_page(one)
    assert value(agent_page(one), "cmon_agent_lifetime_stretch_ratio") == 64.0
    assert count_on(one) == 0
    one.kernel.write(small(5))
    for _ in range(60):
        cpu.used += 1.0
        one.pass_by(1.0)
        agent_page(one)
    page = one.page(PATH)
    assert value(page, "mem_agg_usage") == 0, "the last values, and their age"
    assert value(page, 'cmon_sample_age_seconds{collector="memcap"}') == pytest.approx(60, abs=1)
    assert not down(page)


# --- what blocks for ever, ten thousand times -----------------------------------------------------

class Blocked(threading.Thread):
    """Runs the loop of a desk, asks for a page, and is blocked in the library."""
    alarm = staticmethod(lambda seconds: None)

    def __init__(self, one: Desk) -> None:
        super().__init__(daemon=True)
        self.one, self.replaced = one, threading.Event()
        self.start()

    def run(self) -> None:
        """The thread."""
        self.one.server.loop.adopt()
        with contextlib.suppress(agent_module.Replaced):
            self.one.ask(PATH)

    def give_up(self) -> None:
        """The test's thread goes on with the loop."""
        kstats: Any = self.one.scraper.kstats
        kstats._runner = self
        kstats.watch()
        assert self.replaced.wait(60.0)
        self.one.server.loop.adopt()

    def turn(self) -> bool:
        """Of the thread that takes over."""
        return False

    def resume(self) -> None:
        """Nobody waits for the request."""

    def ended(self) -> None:
        """The thread that took over has nothing to do."""
        self.replaced.set()


def test_ten_thousand_scrapes_beside_a_blocked_read(desk: Callable[..., Desk]) -> None:
    one: Any = desk()
    one.page(PATH)
    idle = threading.active_count()
    one.kernel.faults(("block", "memory_cap:5:*"))
    one.clock.at += 10.0
    blocked = Blocked(one)
    wait_until(lambda: one.kernel["blocked"] == 1)
    one.clock.at += 1.0
    blocked.give_up()
    assert down(one.page(PATH)) == {"memcap"}
    reads = one.kernel["reads"]
    for number in range(10_000):
        one.clock.at += 10.0
        if number % 10 == 0:
            one.pump()
        answer = one.page(PATH)
        assert 'cmon_collector_up{collector="memcap"} 0' in answer
        assert 'cmon_collector_up{collector="zone_misc"} 1' in answer
    assert one.kernel["reads"] - reads >= 10_000, "the rest was read all the time"
    assert one.kernel["blocked"] == 1 and one.kernel["opens"] - one.kernel["closes"] == 2
    assert threading.active_count() <= idle + 1
    one.kernel.faults()
    wait_until(lambda: one.kernel["opens"] - one.kernel["closes"] == 1)
    one.pass_by(1000.0, 10.0)
    assert not down(one.page(PATH))


def test_on_a_busy_node_reads_of_several_zones_begin_together(desk: Callable[..., Desk],
                                                              monkeypatch: Any) -> None:
    monkeypatch.setattr(agent_module, "BUSY_RATE", 4)
    monkeypatch.setattr(agent_module, "LOOK_SECONDS", 1.0)
    zones = [f"{number:08x}-0000-4000-8000-000000000000" for number in range(40)]
    one: Any = desk([{**kstat, "instance": number, "data": {**kstat["data"]}}
                     for number, zone in enumerate(zones, 1) for kstat in small(number, zone)])
    paths = iter([f"/v1/{zone}/metrics" for zone in zones])

    def ask(**more: Any) -> tuple[bool, Any]:
        """Whether the read of another zone begins, and what was asked."""
        reads = one.kernel["reads"]
        asked = one.ask(next(paths), **more)
        for _ in range(30):
            one.pump()
        return one.kernel["reads"] > reads, asked

    def busy() -> None:
        """Simulate many reads within a second, the last of them long ago."""
        for _ in range(5):
            one.page(next(paths))
        one.pass_by(1.05)
    assert all(ask()[0] for _ in range(3)), "each by itself"
    busy()
    assert ask()[0], "none was just before"
    begun, second = ask()
    assert not begun
    begun, third = ask()
    assert not begun and second.answer is None
    one.pass_by(0.15, 0.05)
    assert value(one.answer(second).text, "mem_agg_usage") == 10
    assert value(one.answer(third).text, "mem_agg_usage") == 11
    assert not ask()[0]
    begun, hurried = ask(timeout=0.5)
    assert begun and one.answer(hurried).status == 200
    waiting = [ask() for _ in range(agent_module.GATHER_MOST)]
    assert [begun for begun, _ in waiting] == [False] * (agent_module.GATHER_MOST - 1) + [True]
    assert {one.answer(asked).status for _, asked in waiting} == {200}
    assert not ask()[0]
    one.pass_by(0.15, 0.05)             # in vain: it was the only one
    assert ask()[0]
    busy()
    one.pass_by(2.0)                    # quiet again
    assert ask()[0] and ask()[0]


def test_many_clients_of_a_zone_do_not_wait_for_those_of_others(desk: Callable[..., Desk],
                                                                monkeypatch: Any) -> None:
    monkeypatch.setattr(agent_module, "BUSY_RATE", 0)
    one: Any = desk(kstats=node_kstats())
    one.page(PATH)                      # so that the next read is gathered
    asked = [one.ask(f"/v1/{LB01}/metrics") for _ in range(agent_module.GATHER_MOST - 1)]
    for _ in range(30):
        one.pump()
    assert not any(later.answer for later in asked)
    asked.append(one.ask(f"/v1/{LB01}/metrics"))
    assert {one.answer(later).status for later in asked} == {200}, "and no time has passed"


def agent_page(desk: Any) -> str:
    """The agent's own metrics."""
    text: str = desk.answer(desk.ask("/metrics")).text
    return text


# --- vminfod --------------------------------------------------------------------------------------

NET = {"nic_tag": "external", "network_uuid": "5f1e6b2c-8d43-4d1e-8b3a-6c9d7e52a002"}
OVERLAY = {"nic_tag": "sdc_overlay/5318008", "network_uuid": "ae4c0b7d-3e9f-4b62-a6d1-7f0c8d93a003"}


def vm(zone: str = LB01, *nics: dict[str, str], **more: Any) -> dict[str, Any]:
    """A VM object as vminfod has it."""
    return {"uuid": zone, "zonename": zone, "alias": "lb01", "brand": "joyent", "state": "running",
            "zone_state": "running", "nics": [{"interface": f"net{index}", **nic}
                                              for index, nic in enumerate(nics)], **more}


def links(page: str) -> set[str]:
    """The labels of the links on a page, as they are written."""
    return {series.partition("{")[2] for series in samples(page)
            if series.startswith("net_agg_bytes_in")}


BARE = {'interface="vnic0"}', 'interface="vnic1"}'}
LABELLED = {
    'interface="vnic0",nic_tag="external",network_uuid="%s"}' % NET["network_uuid"],
    'interface="vnic1",nic_tag="sdc_overlay/5318008",network_uuid="%s"}' % OVERLAY["network_uuid"]}


@pytest.fixture()
def vminfod() -> Iterator[Callable[..., Vminfod]]:
    """Makes stand-ins for vminfod."""
    made: list[Vminfod] = []

    def make(*arguments: Any) -> Vminfod:
        made.append(Vminfod(*arguments))
        return made[-1]
    yield make
    for one in made:
        one.close()


MakeVminfod = Callable[..., Vminfod]


def test_links_have_the_labels_of_vminfod(machine: MakeMachine, vminfod: MakeVminfod) -> None:
    info = vminfod()
    info.behave = info.ready([vm(LB01, NET, OVERLAY)])
    one = machine(vminfod=info.url)
    wait_until(lambda: one.own("cmon_agent_vminfod_up") == 1)
    assert links(one.zone(LB01)) == LABELLED
    assert info.asked == ["GET /events HTTP/1.1"], "off the scrape path, one stream for all"
    info.tell({"type": "modify", "zonename": LB01, "uuid": LB01, "changes": [],
               "vm": vm(LB01, NET, {**OVERLAY, "nic_tag": "other"})})

    def relabelled() -> bool:
        one.refresh()
        return any('nic_tag="other"' in link for link in links(one.zone(LB01)))
    wait_until(relabelled)
    assert len(info.asked) == 1
    info.close()                                    # vminfod restarts: what is known stays
    wait_until(lambda: one.own("cmon_agent_vminfod_up") == 0)
    one.refresh()
    assert any('nic_tag="other"' in link for link in links(one.zone(LB01)))
    clean(one)


def test_the_rest_of_vminfods_events(machine: MakeMachine, vminfod: MakeVminfod) -> None:
    info = vminfod()
    info.behave = info.ready([])
    one = machine(vminfod=info.url)
    wait_until(lambda: one.own("cmon_agent_vminfod_up") == 1)
    info.tell({"type": "create", "zonename": LB01, "uuid": LB01, "vm": vm(LB01, NET, OVERLAY)})
    wait_until(lambda: "lb01" in one.get("/").text)
    assert links(one.zone(LB01)) == LABELLED
    info.tell({"type": "something new", "x": 1})
    info.tell({"type": "delete", "zonename": LB01, "uuid": LB01})
    wait_until(lambda: "lb01" not in one.get("/").text)
    one.refresh()
    assert links(one.zone(LB01)) == LABELLED, "kept for as long as the zone runs"
    assert one.own("cmon_agent_vminfod_up") == 1
    clean(one)


def test_links_wait_a_limited_time_for_labels_of_a_new_zone(desk: Callable[..., Desk]) -> None:
    one: Any = desk(kstats=node_kstats())
    one.host.vms.absent, one.host.vms.answered = False, True
    path = f"/v1/{LB01}/metrics"
    page = one.page(path)
    assert down(page) == {"link"}
    assert '\ncmon_collector_up{collector="link"} 0\n' \
        "# link: vminfod has not reported this zone's NICs yet\n" in page
    assert agent_module.parse(page) and "vminfod" not in agent_module.join_pages({LB01: page})
    one.pass_by(50.0)
    assert down(one.page(path)) == {"link"}
    one.pass_by(45.0)
    page = one.page(path)
    assert not down(page) and links(page) == BARE
    one.host.vms.vms = {LB01: agent_module.vm_of(vm(LB01, NET, OVERLAY))}
    one.pass_by(45.0)
    assert links(one.page(path)) == LABELLED, "as soon as they are known"
    one.host.vms.vms = {}
    one.pass_by(45.0)
    assert links(one.page(path)) == LABELLED, "and so it stays"


def test_links_of_a_new_zone_wait_until_vminfod_is_back(desk: Callable[..., Desk]) -> None:
    one: Any = desk(kstats=node_kstats())
    vms = one.host.vms
    vms.absent, vms.answered, vms.problem = False, True, "it closed the stream of events"
    path = f"/v1/{LB01}/metrics"
    for _ in range(5):
        assert down(one.page(path)) == {"link"}
        one.pass_by(45.0)
    assert "reported this zone&#x27;s NICs yet (it closed the stream of events)" in one.page("/")
    vms.vms, vms.problem = {LB01: agent_module.vm_of(vm(LB01, NET, OVERLAY))}, ""
    one.pass_by(10.0)
    page = one.page(path)
    assert not down(page) and links(page) == LABELLED


def test_a_quiet_vminfod_is_still_followed(vminfod: MakeVminfod, monkeypatch: pytest.MonkeyPatch,
                                           caplog: pytest.LogCaptureFixture) -> None:
    """The stream has no heartbeat, so only the first event has a time limit."""
    info = vminfod()
    info.behave = info.ready([])
    vms = agent_module.Vms(info.url)
    monkeypatch.setattr(vms, "READY_SECONDS", 0.2)
    vms.start()
    wait_until(lambda: vms.answered)
    assert vms._socket is not None and vms._socket.gettimeout() is None
    assert vms._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    wait_until(lambda: info.streams)
    info.tell({"type": "create", "zonename": LB01, "uuid": LB01, "vm": vm(LB01, NET)})
    wait_until(lambda: LB01 in vms.vms)
    assert len(info.asked) == 1 and not vms.problem
    caplog.clear()
    vms.stop()
    wait_until(lambda: vms._socket is None)
    assert not caplog.records, "an end that is wanted is no problem"


def test_a_vminfod_that_never_answers_is_given_up(vminfod: MakeVminfod,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    info = vminfod()                                # it accepts, and says nothing
    vms = agent_module.Vms(info.url)
    monkeypatch.setattr(vms, "READY_SECONDS", 0.05)
    vms.start()
    wait_until(lambda: vms.problem)
    assert not vms.answered and not vms.absent
    vms.stop()


def test_the_retry_pause_resets_after_a_good_stream(vminfod: MakeVminfod) -> None:
    info = vminfod()
    pauses: list[float] = []
    vms = agent_module.Vms(info.url, lambda: 0.5)
    ready = info.ready([])

    def behave(stream: Any) -> None:
        if len(info.asked) == 4:
            ready(stream)
        stream.shutdown(socket.SHUT_RDWR)
    info.behave = behave

    def wait(seconds: float) -> bool:
        pauses.append(seconds)
        if len(pauses) == 6:
            vms.stop()
        return vms._stopping.is_set()
    vms._stopping.wait = wait                       # type: ignore[method-assign,assignment]
    vms._follow(threading.Event())
    assert pauses == [1.0, 2.0, 4.0, 1.0, 2.0, 4.0]


def test_labels_wait_for_a_vminfod_that_is_slow(machine: MakeMachine, vminfod: MakeVminfod
                                                ) -> None:
    """With a vminfod, links never appear first without labels."""
    go = threading.Event()
    info = vminfod()

    def slow(stream: Any) -> None:
        info.head(stream)
        go.wait(30)
        info.ready([vm(LB01, NET, OVERLAY)])(stream)
    plain = info.ready([vm(LB01, NET, OVERLAY)])

    def behave(stream: Any) -> None:
        go.wait(30)
        plain(stream)
    info.behave = behave
    one = machine(vminfod=info.url)
    for _ in range(3):
        page = one.zone(LB01, timeout=1.0)
        assert links(page) == set() and down(page) == {"link"}
        one.refresh()
    go.set()

    def there() -> bool:
        one.refresh()
        return not down(one.zone(LB01))
    wait_until(there)
    assert links(one.zone(LB01)) == LABELLED


def test_links_have_no_labels_without_vminfod(machine: MakeMachine, vminfod: MakeVminfod) -> None:
    port = free_port()
    one = machine(vminfod=f"http://127.0.0.1:{port}")
    assert links(one.zone(LB01)) == BARE
    ready = [vm(LB01, NET, OVERLAY), vm(WEB01, NET)]
    info = vminfod(port)                            # and now somebody does
    info.behave = info.ready(ready)
    wait_until(lambda: one.own("cmon_agent_vminfod_up") == 1)
    one.refresh()
    assert links(one.zone(LB01)) == LABELLED, "asked for again, and known now"
    assert links(one.zone(WEB01)) == {link for link in LABELLED if "vnic0" in link}


GARBAGE: dict[str, Any] = {
    "no JSON": "this is no JSON",
    "a number": "7",
    "a list": [],
    "ready without VMs": {"type": "ready"},
    "ready with a number": {"type": "ready", "vms": 7},
    "ready with JSON that is none": {"type": "ready", "vms": "[{"},
    "ready with odd objects": {"type": "ready", "vms": json.dumps([
        None, 7, [], {}, {"zonename": 7},
        {"zonename": LB01, "nics": 7, "alias": [], "tags": "x"}])},
    "modify without a VM": {"type": "modify", "zonename": LB01},
    "nested deeply": "[" * 100_000,
}


@pytest.mark.parametrize("event", list(GARBAGE))
def test_a_lying_vminfod_costs_no_page(machine: MakeMachine, vminfod: MakeVminfod, event: str
                                      ) -> None:
    info = vminfod()

    def behave(stream: Any) -> None:
        info.head(stream)
        info.line(stream, GARBAGE[event])
    info.behave = behave
    one = machine(vminfod=info.url)
    wait_until(lambda: info.asked)
    page = one.zone(LB01)
    assert down(page) <= {"link"} and len(collectors(page)) > 8
    assert links(page) in (set(), {link.split(",")[0] + ',nic_tag="",network_uuid=""}'
                                   for link in LABELLED})
    assert not down(one.node())
    assert one.get("/").status == 200
    clean(one)


@pytest.mark.parametrize("raw", [
    b"", b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", b"\xff" * 1000 + b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n"],
    ids=["closes", "answers 500", "speaks no HTTP", "ends at once", "bad chunk", "500 headers"])
def test_garbage_from_vminfod_costs_no_page(machine: MakeMachine, vminfod: MakeVminfod, raw: bytes
                                           ) -> None:
    info = vminfod()

    def behave(stream: Any) -> None:
        stream.sendall(raw)
        stream.shutdown(2)
    info.behave = behave
    one = machine(vminfod=info.url)
    wait_until(lambda: info.asked)
    assert down(one.zone(LB01)) == {"link"}
    one.agent.wait_for_log("cannot follow vminfod at .*: ")
    info.behave = info.ready([vm(LB01, NET, OVERLAY)])

    def healed() -> bool:
        one.refresh()
        return links(one.zone(LB01)) == LABELLED
    wait_until(healed)
    clean(one)


def test_two_links_with_one_number_are_both_shown(machine: MakeMachine, vminfod: MakeVminfod
                                                 ) -> None:
    kstats = node_kstats()
    net0 = next(kstat for kstat in kstats if kstat["name"] == "z7_net0")
    net1 = next(kstat for kstat in kstats if kstat["name"] == "z7_net1")
    kstats[kstats.index(net1)] = {**net1, "name": "z7_eth0"}
    info = vminfod()
    info.behave = info.ready([vm(LB01, NET)])
    one = machine(kstats, vminfod=info.url)
    wait_until(lambda: one.own("cmon_agent_vminfod_up") == 1)
    found = {series: number for series, number in samples(one.zone(LB01)).items()
             if series.startswith("net_agg_bytes_in")}
    assert set(found.values()) == {net0["data"]["rbytes64"], net1["data"]["rbytes64"]}
    # by name: eth0 comes first, so it has the label that the original gives
    first = [series for series in found if 'interface="vnic0"' in series]
    assert [found[series] for series in first] == [net1["data"]["rbytes64"]]
    assert any('interface="net0"' in series and 'nic_tag="external"' in series for series in found)


# --- settings while it runs -----------------------------------------------------------------------

def test_sighup_applies_good_settings_and_ignores_bad_ones(machine: MakeMachine) -> None:
    one = machine(cpu_budget=0.5)
    assert one.own("cmon_agent_cpu_budget_ratio") == 0.5 and "zfs_metrics" in one.zone()
    one.settings(cpu_budget=0.25, collectors={"zfs": {"enabled": False}})
    one.agent.signal(1)
    one.agent.wait_for_log("settings reloaded")
    assert one.own("cmon_agent_cpu_budget_ratio") == 0.25
    one.refresh()
    assert "zfs" not in collectors(one.zone())
    one.settings(cpu_budget="much")
    one.agent.signal(1)
    one.agent.wait_for_log("keeping the old settings: .*cpu_budget")
    assert one.own("cmon_agent_cpu_budget_ratio") == 0.25
    one.config.write_text("{")
    one.agent.signal(1)
    one.agent.wait_for_log("keeping the old settings: .*not JSON")
    assert not down(one.zone())
    one.config.write_text(json.dumps({"libkstat": "/elsewhere"}))
    one.agent.signal(1)
    one.agent.wait_for_log("keeping the old settings: libkstat.*restart")
    assert not down(one.zone(LB01))
    clean(one)


def test_sighup_to_all_processes_of_the_service_kills_no_command(machine: MakeMachine) -> None:
    """As `svcadm refresh` does it: `:kill -HUP` goes to every process of the contract."""
    one = machine(start=False)
    words = {name: (one.commands / name).read_text() for name in ("zpool", "ntpq")}
    gates = {name: one.commands / f"{name}.go" for name in words}
    for name, script in words.items():
        started = one.commands / f"{name}.started"
        one.script(name, f"#!/bin/sh\n: > {started}\n(while ! [ -e {gates[name]} ]; do "
                         f"sleep 0.02; done) || exit 9\n{script}")
    one.start()
    asked = threading.Thread(target=one.node, kwargs={"timeout": 1.0})
    asked.start()
    wait_until(lambda: all((one.commands / f"{name}.started").exists() for name in words))
    tree = [one.agent.pid]
    for pid in tree:
        with contextlib.suppress(OSError):          # a sleep that was over
            for task in Path(f"/proc/{pid}/task").iterdir():
                tree += [int(child) for child in (task / "children").read_text().split()]
    assert len(tree) >= 5, "two shells and what they run"
    for pid in tree:
        try:
            os.kill(pid, signal.SIGHUP)
        except ProcessLookupError:
            continue                                # a sleep that was over
    one.agent.wait_for_log("settings reloaded")
    for gate in gates.values():
        gate.touch()
    asked.join()
    wait_until(lambda: not {"zpool", "ntp"} & down(one.node()))
    assert not one.agent.log.count(" of gz failed: "), one.agent.log


def test_a_budget_of_null_is_none(machine: MakeMachine) -> None:
    one = machine(cpu_budget=None)
    own = one.get("/metrics").text
    assert "cmon_agent_cpu_budget_ratio" not in own
    assert value(own, "cmon_agent_lifetime_stretch_ratio") == 1.0


def test_a_running_agent_keeps_its_budget(machine: MakeMachine) -> None:
    """Not timed: after enough load the lifetimes are stretched, and go back when it is over."""
    one = machine(cpu_budget=0.002, start=False)
    one.start()
    zones = [record["uuid"] for record in one.frame["vms"] if record["state"] == "running"]

    def stretched() -> bool:
        for zone in zones:
            one.zone(zone)
        return one.own("cmon_agent_lifetime_stretch_ratio") > 2
    wait_until(stretched)
    assert not down(one.zone()), "answers keep coming, with the last values"
    clean(one)
