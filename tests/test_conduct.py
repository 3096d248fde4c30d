# SPDX-License-Identifier: MPL-2.0
"""How the agent treats waiting clients and its child processes, and how it stops."""
from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable
from unittest.mock import Mock, patch

import pytest
import warm
from agents import inventory, proxy_config, write_inventory
from nodes import STOPPED, WEB01, Desk, Machine, down
from support import NODE, ROOT, Program, http_get, wait_until

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


# -- threads that the library blocks

class Handle:
    """A handle without kstats."""
    index, rebuild_seconds = agent.Index(), 0.0
    calls = rebuilds = 0
    closed = 0

    def close(self) -> None:
        """Count it."""
        Handle.closed += 1

    def read(self, ref: agent.Ref) -> agent.Kstat:
        """Nobody asks for one."""
        raise AssertionError(ref)


class Blocking:
    """Work that takes long when it is done for the first time, in the library or elsewhere."""

    def __init__(self, in_library: bool) -> None:
        self.in_library = in_library
        self.runs = 0
        self.inside, self.go = threading.Event(), threading.Event()

    def __call__(self, reader: agent.Reader) -> int:
        self.runs += 1
        run = self.runs
        if run == 1:
            reader.doing = ("tcp:5:tcp", 100.0) if self.in_library else None
            self.inside.set()
            assert self.go.wait(60.0)
            reader.doing = None
        return run


class Watched:
    """Threads that read kstats, their alarms, and what jobs have brought."""

    def __init__(self, *jobs: Any) -> None:
        self.at, self.alarms, self.done = 100.0, list[float](), list[Any]()
        self.threads = agent.kstat_threads(Handle)
        self.threads.now = lambda: self.at
        self.threads._alarm = self.alarms.append
        self.submit(*jobs)

    def submit(self, *jobs: Any) -> None:
        """Have these done."""
        for job in jobs:
            self.threads.submit(agent.Job(job, self.done.append))

    def look(self, seconds: float) -> None:
        """What the alarm causes, after so many seconds."""
        self.at = 100.0 + seconds
        self.threads.watch()

    def is_served(self) -> bool:
        """Whether a thread runs the loop."""
        served = threading.Event()
        self.threads.loop.call_soon(served.set)
        return served.wait(60.0)


@pytest.fixture
def watched() -> Iterator[Callable[..., Watched]]:
    """Makes such, and ends their threads."""
    made: list[Watched] = []

    def make(*jobs: Any) -> Watched:
        made.append(Watched(*jobs))
        return made[-1]
    yield make
    for one in made:
        one.threads.close()


def test_a_job_that_blocks_is_done_without_its_thread_and_only_once(
        watched: Callable[..., Watched]) -> None:
    work = Blocking(in_library=True)
    one = watched(work, lambda reader: "next")
    assert work.inside.wait(60.0)
    one.look(0.2)
    assert one.is_served() and not one.done and not one.threads.given_up
    one.look(0.6)
    wait_until(lambda: len(one.done) == 2)
    assert sorted(map(str, one.done)) == ["2", "next"]
    assert one.threads.blocked == one.threads.given_up == 1
    assert list(one.threads.quarantine) == ["tcp:5:tcp"]
    work.go.set()                           # the library returns: too late
    wait_until(lambda: not one.threads.blocked)
    assert not one.threads.quarantine
    one.submit(lambda reader: "last")
    wait_until(lambda: one.done[2:] == ["last"])


def test_a_job_that_takes_long_goes_on_beside_the_loop(watched: Callable[..., Watched]) -> None:
    work = Blocking(in_library=False)
    one = watched(work)
    assert work.inside.wait(60.0)
    one.look(0.2)
    assert one.is_served()
    one.submit(lambda reader: "next")
    assert one.is_served() and not one.done, "one job at a time"
    one.look(100.0)
    assert not one.threads.given_up, "it is not in the library"
    work.go.set()
    wait_until(lambda: one.done == [1, "next"])
    assert one.alarms[-1] == 0, "it would end the process while that ends"
    one.submit(lambda reader: "last")
    wait_until(lambda: one.done[2:] == ["last"])
    assert work.runs == 1


class Contended:
    """A lock that tells when somebody has to wait for it."""

    def __init__(self) -> None:
        self._lock, self.waited_for = threading.Lock(), threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.waited_for.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_a_job_that_returns_while_it_is_watched_leaves_one_thread_to_the_loop(
        watched: Callable[..., Watched]) -> None:
    work, lock, hold = Blocking(in_library=False), Contended(), threading.Event()
    one = watched(work)
    threads: Any = one.threads
    threads._lock = lock
    assert work.inside.wait(60.0)
    one.look(0.2)                           # the loop has another thread …
    reader = threads._active
    threads.loop.call_soon(hold.wait, 60.0)
    wait_until(lambda: not threads.loop._calls)
    work.go.set()
    wait_until(lambda: threads.loop._calls)     # … which will hear of the result

    class Now(float):
        def __sub__(self, other: float) -> float:
            """Called in the middle of `watch`."""
            hold.set()
            wait_until(lambda: lock.waited_for.is_set() or reader.job is None)
            return float(self) - other
    threads.now = lambda: Now(100.3)
    lock.waited_for.clear()
    with patch.object(threads, "_start") as start:
        threads.watch()
    assert not start.called
    wait_until(lambda: one.done == [1])
    assert one.alarms[-1] == 0


def test_a_handle_stays_open_while_a_job_uses_it_beside_a_loop_that_ends(
        watched: Callable[..., Watched]) -> None:
    work = Blocking(in_library=False)
    one, closed = watched(work), Handle.closed
    assert work.inside.wait(60.0)
    one.look(0.2)
    assert one.is_served()
    one.threads.close()
    wait_until(lambda: one.threads._active is None)
    assert Handle.closed == closed
    work.go.set()


def test_a_job_without_its_thread_reads_nothing_more() -> None:
    threads = agent.KstatThreads(Handle, agent.Loop())
    ref, readings = agent.Ref("tcp", 5, "tcp", "net", 1, 0, 0), list[Any]()

    def work(reader: agent.Reader) -> None:
        reader.abandoned = True
        readings.append(reader.read_all([ref]))
        with pytest.raises(agent.KstatError, match="given up"):
            reader.read(ref)
    reader = agent.Reader(threads)
    assert reader.run(agent.Job(work, print)) is None and readings == [agent.Reading([], [])]


def test_an_error_that_ends_the_loop_of_a_capture_is_raised() -> None:
    def open_handle() -> Any:
        raise MemoryError("none left")

    def out(reader: agent.Reader) -> None:
        raise SystemExit(7)
    assert isinstance(agent.Reader(agent.KstatThreads(open_handle, agent.Loop())).run(
        agent.Job(out, print)), agent.KstatError)
    with pytest.raises(SystemExit):
        agent.kstat_job(agent.kstat_threads(Handle), out)


def test_the_alarm_is_set_for_each_job_and_not_longer(watched: Callable[..., Watched]) -> None:
    work = Blocking(in_library=False)
    one = watched()
    one.look(1.0)                           # before the first job
    assert not one.alarms
    one.at = 100.0
    one.submit(work)
    assert work.inside.wait(60.0) and one.alarms == [0.1]
    one.look(0.04)                          # an alarm of the job before
    assert one.alarms == [0.1, pytest.approx(0.06)]
    work.go.set()
    wait_until(lambda: one.done == [1])
    one.look(1.0)                           # too late
    assert one.alarms[2:] == [0]


def test_a_machine_without_threads_waits_for_the_one_that_is_blocked(
        watched: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    work = Blocking(in_library=True)
    one = watched(work)
    assert work.inside.wait(60.0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("no more")))
        one.look(0.6)
    assert not one.threads.given_up and one.alarms[-1] == 0.5, "another try"
    one.look(0.7)
    wait_until(lambda: one.done == [2])
    work.go.set()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM], ids=["SIGHUP", "SIGTERM"])
def test_a_signal_that_reaches_another_thread_is_handled_at_once(number: int) -> None:
    """Which thread gets it is the system's choice."""
    with Program.agent("--replay", NODE) as program:
        assert http_get(program.address, "/-/healthy").status == 200
        others = [int(task.name) for task in Path(f"/proc/{program.pid}/task").iterdir()
                  if int(task.name) != program.pid]
        assert ctypes.CDLL(None).tgkill(program.pid, others[0], number) == 0
        if number == signal.SIGHUP:
            wait_until(lambda: "settings reloaded" in program.log)
        else:
            assert program.wait() == 0


@pytest.mark.parametrize("program", ["agent", "proxy"])
def test_a_second_signal_while_the_process_exits_is_ignored(program: str, tmp_path: Path) -> None:
    """With a closed descriptor for signals Python prints an error, or another file gets a byte."""
    write_inventory(tmp_path, inventory("127.0.0.1:1"))
    settings = ["--replay", NODE] if program == "agent" else ["--config", proxy_config(tmp_path)]
    with Program(sys.executable, "-c", "import atexit, gc, os, signal, sys\n"
                 "def again():\n    gc.collect()\n    os.kill(os.getpid(), signal.SIGTERM)\n"
                 f"atexit.register(again)\nsys.path[:0] = [{str(ROOT)!r}]\n"
                 f"import cmon_{program}\nsys.exit(cmon_{program}.main())",
                 "--listen", "127.0.0.1:0", "--log-format", "text", *settings) as one:
        assert one.address and one.stop() == 0
    assert "ignored" not in one.log and "Error" not in one.log


@pytest.mark.parametrize("state", [
    "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})",
    "signal.signal(signal.SIGALRM, signal.SIG_IGN)"], ids=["blocked", "ignored"])
def test_a_blocked_read_is_noticed_whatever_the_parent_did_with_the_alarm(
        state: str, machine: MakeMachine) -> None:
    one = machine()
    one.kernel.faults(("block", "memory_cap:5:*"))
    one.program = Program(
        sys.executable, "-c",
        f"import os, signal, sys; {state}\nos.execv(sys.argv[1], sys.argv[1:])",
        sys.executable, "-I", "-c", warm.AGENT, "--listen", "127.0.0.1:0", "--log-format", "text",
        "--config", str(one.config))
    with one.program:
        assert down(one.zone()) == {"memcap"}


def test_a_byte_for_a_signal_wakes_the_loop() -> None:
    server = agent.Server("test", agent.Registry())
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    wait_until(lambda: not server.loop.is_here())
    time.sleep(0.1)                         # it is in select() by now, most likely
    server.stopping = True
    server.wakeup.send(b"!")
    thread.join(3.0)                        # the next timer fires after 5 s
    assert not thread.is_alive()


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
