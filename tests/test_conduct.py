# SPDX-License-Identifier: MPL-2.0
"""How the agent treats waiting clients and its child processes, and how it stops."""
from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from nodes import STOPPED, WEB01, Desk, Machine, down
from support import NODE, ROOT, wait_until

import cmon_agent as agent

MakeMachine = Callable[..., Machine]
FOREVER = "#!/bin/sh\nexec sleep 1000\n"
PATH = f"/v1/{WEB01}/metrics"


@pytest.fixture()
def machine(kernel: Callable[..., Any], tmp_path: Path, recorded_node: dict[str, Any]
            ) -> Iterator[MakeMachine]:
    """Makes machines with the recorded node's kernel."""
    made: list[Machine] = []

    def make(**settings: Any) -> Machine:
        frame = recorded_node["frames"][0]
        made.append(Machine(tmp_path / f"machine{len(made)}", kernel(frame["kstats"]), frame,
                            **settings))
        return made[-1]
    yield make
    for one in made:
        if one.program is not None:
            one.program.kill()
            print(one.program.log[-5000:])


def plugin(folder: Path, text: str) -> str:
    """A folder with one plugin."""
    folder.mkdir(mode=0o755)
    (folder / "note.sh").write_text("#!/bin/sh\n" + text)
    (folder / "note.sh").chmod(0o755)
    return str(folder)


# -- those who wait

@pytest.mark.parametrize("path", [PATH, "/v1/zones/metrics"])
def test_only_the_first_scrape_waits_for_a_command_that_hangs(machine: MakeMachine, path: str
                                                              ) -> None:
    one = machine()
    one.script("zfs", FOREVER)
    one.start()
    assert one.get(path, timeout=1.0).status == 200
    for _ in range(2):
        time.sleep(1.1)                     # kstats are due again
        began = time.monotonic()
        answer = one.get(path, timeout=25.0)
        assert answer.status == 200 and time.monotonic() - began < 15.0
    assert down(one.zone()) == {"zfs"}


def test_a_client_with_a_later_deadline_keeps_waiting(machine: MakeMachine) -> None:
    one = machine()
    go = one.commands / "go"
    slow = (one.commands / "zfs").read_text().replace(
        "#!/bin/sh\n", f"#!/bin/sh\nwhile ! [ -e {go} ]; do sleep 0.02; done\n")
    one.script("zfs", slow)
    one.start()
    address = one.agent.address
    script = ("import sys; sys.path[:0] = sys.argv[1:3]; import support; sys.stdout.write("
              "support.http_get((sys.argv[3], int(sys.argv[4])), sys.argv[5]).text)")
    patient = subprocess.Popen(
        [sys.executable, "-c", script, str(ROOT / "tests"), str(ROOT), address[0],
         str(address[1]), PATH], stdout=subprocess.PIPE, text=True)
    wait_until(lambda: one.own("cmon_agent_collections_running"))
    assert down(one.zone(timeout=1.0)) == {"zfs"}
    go.touch()
    page, _ = patient.communicate(timeout=30)
    assert patient.returncode == 0 and down(page) == set() and "zfs_used" in page


# -- zones

def test_nothing_is_run_for_a_zone_that_does_not_run(machine: MakeMachine, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    folder = plugin(tmp_path / "vm", f"echo $1 >> {ran}\nprintf 'x\\tgauge\\t1\\n'\n")
    one = machine(plugin_dirs={"vm": folder}).start()
    wait_until(lambda: "plugin_note_x 1" in one.zone())
    assert one.get(f"/v1/{STOPPED}/metrics").status == 404
    assert one.get("/v1/00000000-0000-4000-8000-000000000000/metrics").status == 404
    assert set(ran.read_text().split()) == {WEB01}


def test_the_first_page_has_values_of_plugins(machine: MakeMachine, tmp_path: Path) -> None:
    folder = plugin(tmp_path / "vm", "sleep 0.3; printf 'x\\tgauge\\t1\\n'\n")
    one = machine(plugin_dirs={"vm": folder}).start()
    own = "cmon_agent_collections_total"
    one.zone()
    wait_until(lambda: own in one.get("/metrics").text)
    assert "plugin_note_x 1" in one.zone("181b6f5a-ecc7-4176-8952-19ae87ffa08e")


@pytest.mark.parametrize("fault", [("fail", "zones:5:*", 5), ("block", "zones:5:*")])
def test_a_zone_with_an_unreadable_kstat_is_not_reported_missing(machine: MakeMachine,
                                                                 fault: tuple[str, ...]) -> None:
    one = machine()
    one.kernel.faults(fault)
    one.start()
    page = one.zone()
    assert down(page) == {"zone_misc"} and "mem_agg_usage" in page
    one.kernel.faults(fault, ("fail", "memory_cap:5:*", 5), ("fail", "zone_vfs:5:*", 5))
    one.refresh()
    assert one.get(PATH).status in (200, 503)       # by now its name may be known
    assert one.get(f"/v1/{STOPPED}/metrics").status == 404


def test_an_ambiguous_zone_is_not_reported_missing(machine: MakeMachine) -> None:
    one = machine()
    one.kernel.faults(("fail", "*:5:7e39*", 5))
    one.start()
    answer = one.get(PATH)
    assert answer.status == 503 and "input/output error" in answer.text


def test_a_chain_that_cannot_be_reopened_recovers(machine: MakeMachine) -> None:
    one = machine().start()
    one.zone()
    one.kernel.faults(("fail-open", 24))
    assert one.get(f"/v1/{STOPPED}/metrics").status == 503      # it closes, and cannot open
    assert one.get("/-/ready").status == 503
    one.kernel.faults()
    wait_until(lambda: one.get("/-/ready").status == 200)
    one.refresh()
    assert down(one.zone()) == set()


# -- settings while it runs

def test_sighup_lowers_max_collections(machine: MakeMachine, tmp_path: Path) -> None:
    folder, began, ended, least = (tmp_path / name for name in ("gz", "began", "ended", "least"))
    folder.mkdir(mode=0o755)
    least.write_text("1")
    for number in range(4):
        path = folder / f"p{number}"        # it waits until so many have begun
        path.write_text(f"""#!/bin/sh
echo $(wc -l < {ended}) >> {began}
while [ $(wc -l < {began}) -lt $(cat {least}) ]; do sleep 0.02; done
sleep 0.1
echo >> {ended}
printf 'x\\tgauge\\t1\\nttl\\toption\\t1\\n'
""")
        path.chmod(0o755)
    began.touch()
    ended.touch()
    one = machine(plugin_dirs={"gz": str(folder)}, max_collections=4).start()
    wait_until(lambda: "plugin_p3_x 1" in one.node())

    def ended_before(most: int) -> list[str]:
        one.settings(max_collections=most)
        times = one.agent.log.count("settings reloaded")
        one.agent.signal(signal.SIGHUP)
        one.agent.wait_for_log("settings reloaded", times + 1)
        time.sleep(1.1)                     # plugins are due again
        least.write_text(str(most))
        began.write_text("")
        ended.write_text("")
        assert down(one.node()) == set()
        return began.read_text().split()
    assert ended_before(1) == ["0", "1", "2", "3"], "one after the other"
    assert ended_before(4) == ["0", "0", "0", "0"], "all at once"


def test_corrected_settings_apply_at_once(machine: MakeMachine) -> None:
    one = machine()
    one.hide("zfs")
    one.start()
    for _ in range(3):
        one.zone()
        time.sleep(1.1)                     # three failures open a breaker for 30 s
    one.settings(commands={**json.loads(one.config.read_text())["commands"],
                           "zfs": str(one.commands / "zfs")})
    one.agent.signal(signal.SIGHUP)
    one.agent.wait_for_log("settings reloaded")
    assert down(one.zone()) == set()


def test_a_plugin_uses_the_timeout_of_the_settings(machine: MakeMachine, tmp_path: Path) -> None:
    folder = plugin(tmp_path / "gz", "sleep 100\n")
    one = machine(plugin_dirs={"gz": folder}, collectors={"plugin_note": {"timeout": 0.2}}).start()
    wait_until(lambda: "plugin_note" in one.node())
    wait_until(lambda: "plugin_note of gz failed" in one.agent.log, timeout=8.0)     # not 10 s


def test_a_failing_collector_respects_min_poll_interval(machine: MakeMachine) -> None:
    one = machine(min_poll_interval=60)
    one.kernel.faults(("fail", "tcp:5:tcp", 5))
    one.start()
    one.zone()
    before = one.own("cmon_agent_kstat_reads_total")
    time.sleep(1.2)
    one.zone()
    assert one.own("cmon_agent_kstat_reads_total") == before


def test_every_problem_is_reported_with_its_key(tmp_path: Path) -> None:
    path = tmp_path / "agent.json"
    path.write_text(json.dumps({"collectors": {"zfs": {"ttl": -1}, "zsf": {}, "mem": {}},
                                "commands": {"zfss": "x", "npt": 5}, "cpu_budget": 0}))
    ended = subprocess.run(
        [sys.executable, "-I", str(ROOT / "cmon_agent.py"), "--config", str(path), "--replay",
         str(NODE), "--listen", "nowhere"], stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2
    for words in (f"{path}: collectors.zfs.ttl: ", "'mem', 'zsf' is not a collector",
                  "'npt', 'zfss' is not one of", "commands.npt: must be a text",
                  f"{path}: cpu_budget: ", "command line: listen: "):
        assert words in ended.stderr


# -- what it starts, and its end

def alive(file: Path) -> bool:
    """Whether the process whose number is in a file lives (and is more than a zombie)."""
    try:
        return "Z" not in Path(f"/proc/{file.read_text().strip()}/stat").read_text().split()[2]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_no_child_process_outlives_the_agent(machine: MakeMachine, tmp_path: Path) -> None:
    one, pid = machine(), tmp_path / "pid"
    one.script("zfs", f"#!/bin/sh\ntrap '' TERM\necho $$ > {pid}.new\nmv {pid}.new {pid}\n"
                      "sleep 1000\nsleep 1000\n")
    one.start()
    assert one.get(PATH, timeout=1.0).status == 200
    assert alive(pid)
    assert one.agent.stop() == 0
    wait_until(lambda: not alive(pid))


def test_a_capture_skips_what_blocks(machine: MakeMachine, tmp_path: Path) -> None:
    one, path = machine(), tmp_path / "capture.json"
    one.kernel.faults(("block", "tcp:5:tcp"), ("fail", "memory_cap:5:*", 5))
    ended = subprocess.run(
        [sys.executable, "-I", str(ROOT / "cmon_agent.py"), "capture", str(path), "--config",
         str(one.config), "--frames", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, timeout=60, check=False)
    assert ended.returncode == 0 and "tcp:5:tcp has not returned" in ended.stderr
    names = {(kstat["module"], kstat["instance"]) for kstat
             in json.loads(path.read_text())["frames"][0]["kstats"]
             if kstat["name"] != "tcpstat"}
    assert ("zone_vfs", 5) in names and ("tcp", 7) in names
    assert not {("tcp", 5), ("memory_cap", 5)} & names


@pytest.mark.parametrize("interval", ["-1", "0", "nan", "soon"])
def test_a_capture_refuses_absurd_pauses(interval: str) -> None:
    with pytest.raises(SystemExit) as ended:
        agent.main(["capture", os.devnull, "--interval", interval])
    assert ended.value.code == 2


# -- a reader that is given up just as it comes back

class Handle:
    """A handle without kstats."""
    index, rebuild_seconds = agent.Index(), 0.0
    calls = rebuilds = 0

    def close(self) -> None:
        """Nothing to close."""


class Halting:
    """A queue whose reader stops for a while after it has taken a job."""

    def __init__(self) -> None:
        self.jobs: Any = queue.SimpleQueue()
        self.put, self.empty = self.jobs.put, self.jobs.empty
        self.taken, self.go = threading.Event(), threading.Event()

    def get(self) -> Any:
        """The next job."""
        job = self.jobs.get()
        self.taken.set()
        self.go.wait(60.0)
        return job


def test_no_job_is_lost_when_a_reader_is_given_up_between_two() -> None:
    readers, halting = agent.KstatThreads(Handle), Halting()
    done: list[Any] = []
    readers.submit(agent.Job(lambda reader: setattr(reader, "jobs", halting), done.append))
    wait_until(lambda: done)
    assert readers.is_idle and readers.watch() is None
    readers.submit(agent.Job(lambda reader: 1, done.append))
    assert halting.taken.wait(60.0)
    assert not readers.is_idle and readers.watch() is not None, "it is looked at again"
    # It is about to begin, but `watch` has seen it blocked.
    old = readers._active
    assert old is not None
    old.doing = ("tcp:5:tcp", readers.now() - 60.0)
    readers.watch()
    assert readers.blocked
    halting.go.set()
    wait_until(lambda: done == [None, 1])
    wait_until(lambda: not readers.blocked)
    readers.close()


def test_pools_shrink_and_grow() -> None:
    pool, done = agent.Pool("test", 4), []
    for _ in range(20):
        pool.submit(time.sleep, 0.01)
    wait_until(lambda: pool.idle == pool.threads > 1)
    pool.resize(1)
    wait_until(lambda: pool.threads == 1)
    pool.resize(2)
    for number in range(20):
        pool.submit(done.append, number)
    wait_until(lambda: len(done) == 20)
    pool.close()
    wait_until(lambda: pool.threads == 0)


# -- core zones

@pytest.mark.parametrize(("nics", "expected"), [
    ([{"ip": "10.99.0.4", "nic_tag": "external"}, {"ip": "10.20.0.4", "nic_tag": "admin"}],
     ("10.20.0.4",)),
    ([{"ip": "10.99.0.4", "nic_tag": "x"}, {"ip": "10.20.0.4", "nic_tag": "admin_rack_A1"}],
     ("10.20.0.4",)),
    ([{"ip": "dhcp", "nic_tag": "admin"}, {"ip": "10.99.0.4"}, {"ip": "fd00::1"}, 7], ()),
    ([{"ip": "10.99.0.4", "nic_tag": "sysadmin"}, {"ip": "10.99.0.5", "nic_tag": None}], ()),
    (7, ())])
def test_a_core_zone_is_asked_on_the_admin_network(nics: Any, expected: tuple[str, ...]) -> None:
    vm = agent.vm_of({"uuid": WEB01, "nics": nics, "owner_uuid": agent.ADMIN_UUID})
    assert vm is not None and vm.addresses == expected


@pytest.mark.parametrize("tags", [{"manta_role": "loadbalancer"}, {"smartdc_role": "cmon"}])
def test_a_tenant_cannot_send_the_global_zone_anywhere(tags: dict[str, str]) -> None:
    """Tags, ports and the NIC's tag match, but the owner is not the platform."""
    vm = agent.vm_of({
        "uuid": WEB01, "owner_uuid": "2f6d1c1a-9d3c-4a55-8f0e-2b8f3f3b7a10", "tags": tags,
        "customer_metadata": {"metricPorts": "8881"},
        "nics": [{"ip": "10.20.0.4", "nic_tag": "admin"}]})
    assert vm is not None and (vm.addresses, vm.ports, vm.core) == ((), (), False)


def test_a_stopped_zone_is_gone_soon_even_with_long_lifetimes(
        machine: MakeMachine, recorded_node: dict[str, Any]) -> None:
    one = machine(min_poll_interval=3600.0)
    desk = Desk(one.config)
    desk.page(PATH)
    one.kernel.write([kstat for kstat in recorded_node["frames"][0]["kstats"]
                      if kstat["data"].get("zonename") != WEB01])
    desk.clock.at += 5.0
    assert desk.answer(desk.ask(PATH)).status == 200        # its values are not old yet
    desk.clock.at += 5.0
    desk.page(PATH)                                         # and this one looks for the zone
    wait_until(lambda: desk.pump() or desk.answer(desk.ask(PATH)).status == 404)
    desk.close()
