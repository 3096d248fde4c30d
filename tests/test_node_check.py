# SPDX-License-Identifier: MPL-2.0
"""`cmon_agent.py check`: each line, on a correct node and on faulty ones."""
from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
from nodes import WEB01, Machine, Vminfod, zfs_without
from support import ROOT, Kernel, Program, free_port
from support import node as recorded

import cmon_agent as agent

ME = pwd.getpwuid(os.geteuid()).pw_name
SVCS = """\
disabled       svc:/smartdc/agent/cmon-agent:default
online         svc:/system/filesystem/local:default
online         svc:/site/cmon-agent-setup:default
online*        svc:/site/cmon-agent:default
"""
PPRIV = """\
4711:	python3.11 -I cmon_agent.py check
flags = <none>
	E: basic,!file_link_any,!proc_info
	L: basic,!file_link_any,!proc_info
"""
# As kstat(8) selects: -p -m MODULE or -c disk, -i INSTANCE, -n NAME.
KSTAT = """#!/bin/sh
[ "$1" = -p ] || exit 2
module=$3
[ "$2" = -c ] && module='[^:]*'
grep "^$module:$5:$7:" {lines}
"""


def kstat_p(kstats: Any) -> str:
    """What `kstat -p` prints of these."""
    return "".join(f"{one['module']}:{one['instance']}:{one['name']}:{member}\t{value}\n"
                   for one in kstats
                   for member, value in (*one["data"].items(), ("class", one["class"]),
                                         ("crtime", one["crtime"] / 1e9)))


class Result(NamedTuple):
    """The result of a run of `check`."""
    status: int
    text: str
    findings: list[dict[str, str]]

    def of(self, name: str) -> list[tuple[str, str]]:
        """Status and text of one check's findings."""
        return [(row["status"], row["found"]) for row in self.findings if row["check"] == name]

    def bad(self) -> list[str]:
        """What needs attention, by check."""
        return [f"{row['check']}: {row['found']}" for row in self.findings
                if row["status"] == "FAIL"]


class Node:
    """A node to be checked, and what may be wrong with it."""

    def __init__(self, folder: Path, kernel: Kernel, frame: Mapping[str, Any], vminfod: Vminfod,
                 **settings: Any) -> None:
        self.frame = frame
        self.kernel = kernel
        self.machine = Machine(folder, kernel, frame, vminfod=vminfod.url,
                               **{"listen": f"127.0.0.1:{free_port()}", **settings})
        self.lines = folder / "kstat.txt"
        self.lines.write_text(kstat_p(frame["kstats"]))
        self.command("kstat", KSTAT.format(lines=self.lines))
        self.prints("svcs", SVCS)
        self.prints("ppriv", PPRIV)
        vminfod.behave = vminfod.ready(frame["vms"])
        self.vminfod = vminfod

    def command(self, name: str, script: str) -> None:
        """A command as this script."""
        content = json.loads(self.machine.config.read_text())
        content["commands"][name] = str(self.machine.commands / name)
        self.machine.config.write_text(json.dumps(content))
        self.machine.script(name, script)

    def prints(self, name: str, text: str, status: int = 0) -> None:
        """A command that prints this for any arguments."""
        (self.machine.commands / f"{name}.txt").write_text(text)
        self.command(name, f"#!/bin/sh\ncat {self.machine.commands}/{name}.txt\nexit {status}\n")

    def check(self, *arguments: str, user: str = ME) -> Result:
        """Run it, as a report."""
        done = subprocess.run(
            [sys.executable, "-I", str(ROOT / "cmon_agent.py"), "check", "--config",
             str(self.machine.config), "--user", user, *(arguments or ("--json",))],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            timeout=120)
        assert "Traceback" not in done.stderr, done.stderr
        findings = json.loads(done.stdout)["findings"] if not arguments else []
        return Result(done.returncode, done.stdout + done.stderr, findings)


    def port(self) -> list[agent.Finding]:
        """What the check of the port alone finds."""
        arguments = agent.agent_command_line("check").parse_args(
            ["--config", str(self.machine.config)])
        return list(agent.check_port(agent.Examined(arguments, agent.load_agent(arguments))))


MakeNode = Callable[..., Node]


@pytest.fixture()
def node(kernel: Callable[..., Kernel], tmp_path: Path, recorded_node: dict[str, Any]
         ) -> Iterator[MakeNode]:
    """Makes nodes; `kstats` replaces those of the recorded one."""
    infos: list[Vminfod] = []

    def make(kstats: Any = None, **settings: Any) -> Node:
        frame = dict(recorded_node["frames"][0])
        if kstats is not None:
            frame["kstats"] = kstats
        infos.append(Vminfod())
        return Node(tmp_path / f"node{len(infos)}", kernel(frame["kstats"]), frame, infos[-1],
                    **settings)
    yield make
    for info in infos:
        info.close()


def kstats_less(recorded_node: dict[str, Any], *modules: str) -> list[dict[str, Any]]:
    """The recorded node's kstats without some modules."""
    return [dict(one) for one in recorded_node["frames"][0]["kstats"]
            if one["module"] not in modules]


# --- a node that is right -------------------------------------------------------------------------

def test_a_correct_node_passes(node: MakeNode) -> None:
    one = node()
    before = sorted(path.name for path in one.machine.commands.parent.rglob("*"))
    found = one.check()
    assert not found.bad() and found.status == 0
    assert found.of("sysinfo") == [("ok", "admin address 10.20.0.7, pool zones, 8 CPUs")]
    assert found.of("services") == [
        ("ok", "svc:/site/cmon-agent-setup:default is online"),
        ("ok", "svc:/site/cmon-agent:default is online"),
        ("note", "the original agent is disabled")]
    assert found.of("user") == [
        ("ok", f"{ME}, where the service runs as {ME}"),
        ("note", "effective privileges basic,!file_link_any,!proc_info, "
                 "limit basic,!file_link_any,!proc_info")]
    [(status, text)] = found.of("python")
    assert status == "ok" and "64 bits" in text and "Selector" in text
    total = len(one.frame["kstats"])
    unix = sum(kstat["module"] == "unix" for kstat in one.frame["kstats"])
    assert found.of("libkstat") == [("ok", f"{total} kstats, {unix} of them in module unix")]
    assert found.of("zones") == [("ok", "15 run: 3 bhyve, 7 joyent, 5 lx")]
    last, *others = reversed(found.of("kstats"))
    assert last[0] == "ok" and last[1].endswith("are those of kstat -p")
    values, kstats = (int(word) for word in last[1].split() if word.isdigit())
    assert values > 500 and kstats > 40
    assert ("note", "zfs:*:arcstats: 1, without sync_wait_for_async") in others
    assert ("ok", "memory_cap:*:*: 16") in others and ("ok", "unix:*:vminfo: 1") in others
    assert len(others) == len(agent.ZONE_TABLES + agent.NODE_TABLES)
    assert found.of("guests") == [("ok", "3 bhyve zones, 3 machines in vmm, 3 NICs in viona")]
    assert found.of("caps") == [
        ("ok", "memory_cap physcap: 14 caps, 2 without"),
        ("ok", "memory_cap swapcap: 14 caps, 2 without"), ("ok", "caps value: 1 caps, 15 without")]
    assert found.of("links") == [("ok", "18 links of 15 zones; LX calls them ethN")]
    [(status, text)] = found.of("cost")
    assert status == "ok" and "the node: " in text and "a zone: " in text
    [zfs, zpool] = found.of("commands")
    assert zfs[0] == "ok" and zfs[1].startswith("zfs list: 17 datasets, 'zones\\t1976000000000")
    assert zpool == ("ok", "zpool list: 1 pools, "
                     r"'zones\t1890424586240\t31%\tONLINE\t3985729650688'")
    assert found.of("clock") == [("ok", "ntpd: 5 peers, one is the system peer")]
    assert found.of("vminfod") == [("ok", "16 VMs")]
    address = json.loads(one.machine.config.read_text())["listen"]
    assert found.of("port") == [("ok", f"{address} is free")]
    assert found.of("plugins") == [("ok", "0 plugins")]
    assert sorted(path.name for path in one.machine.commands.parent.rglob("*")) == before, \
        "it changes nothing"


def test_text_output_says_what_to_do(node: MakeNode) -> None:
    one = node()
    one.prints("svcs", SVCS.replace("online* ", "maintenance"))
    found = one.check("--user", ME)
    assert found.status == 1
    lines = found.text.splitlines()
    place = lines.index("FAIL services: svc:/site/cmon-agent:default is maintenance")
    assert lines[place + 1].startswith("     -> see `svcs -xv`")
    assert lines[-1].startswith("1 of ") and "check --json" in lines[-1]
    assert all(line.startswith(("ok   ", "note ", "FAIL ", "     -> ")) for line in lines[:-1])


# --- nodes that are not ---------------------------------------------------------------------------

Do = Callable[[Node], Any]


def without(name: str) -> Do:
    """A missing command."""
    return lambda one: one.machine.hide(name)


def line(member: str, value: str, kstat: str = "memory_cap:0:") -> Do:
    """`kstat -p` prints another value of a member."""
    def do(one: Node) -> None:
        lines = one.lines.read_text().splitlines(True)
        place = next(index for index, text in enumerate(lines)
                     if text.startswith(kstat) and f":{member}\t" in text)
        lines[place] = lines[place].partition("\t")[0] + f"\t{value}\n" if value else ""
        one.lines.write_text("".join(lines))
    return do


def zone_of(kstat: Any) -> bool:
    return bool(kstat["data"].get("zonename") == WEB01)


def prints(name: str, text: str = "", status: int = 0) -> Do:
    """A command that prints this."""
    return lambda one: one.prints(name, text, status)


def faults(*words: str) -> Do:
    """A kernel with this fault."""
    return lambda one: one.kernel.faults(words)


def settings(**changed: Any) -> Do:
    """Other settings."""
    return lambda one: one.machine.settings(**changed)


def behaves(how: Callable[[Vminfod], Any]) -> Do:
    """Another vminfod."""
    return lambda one: setattr(one.vminfod, "behave", how(one.vminfod))


def open_folder(one: Node) -> None:
    """A plugin folder that is writable by everybody."""
    folder = one.lines.parent / "open"
    folder.mkdir()
    folder.chmod(0o777)
    one.machine.settings(plugin_dirs={"gz": str(folder)})


OLD_ZFS = zfs_without("logicalused", *(vm["uuid"] for vm in recorded()["frames"][0]["vms"]))
ALIEN = f"0:global:running:/::liveimg:shared:0\n99:{WEB01}:running:/zones/x:x:bhyve:excl:77\n"
# What is wrong with one node, each with the beginning of what is told of it and a part of the rest.
FAULTS: dict[str, tuple[tuple[Do, str, str], ...]] = {
    "commands fail": (
        (prints("sysinfo", status=1), "FAIL sysinfo", "sysinfo -f: exit 1"),
        (prints("svcs"), "note services", "svc:/site/cmon-agent:default is not imported yet"),
        (prints("svcs"), "note services", "the original agent is absent"),
        (without("ppriv"), "note user", "privileges are not known: "),
        (line("rss", "12"), "FAIL kstats",
         "memory_cap:*:*: kstat -p differs: memory_cap:0:global:rss (12, not "),
        (prints("zfs", status=1), "FAIL commands", "zfs list: exit 1"),
        (prints("zpool"), "FAIL commands", "zpool list: 0 pools"),
        (prints("ntpq"), "FAIL clock", "ntpq: exit 0 and no message"),
        (lambda one: one.vminfod.close(), "note vminfod", "nothing listens at http://127.0.0.1:"),
        (settings(listen="192.0.2.1:9164"), "FAIL port",
         "cannot listen on 192.0.2.1:9164: cannot assign requested address"),
        (open_folder, "FAIL plugins", "nobody else can write to")),
    "commands are odd": (
        (prints("sysinfo", '{"UUID": "x", "Hostname": "n", "Zpool": "zones", '
                '"Admin IP": "10.0.0.1", "Boot_a": 1, "Boot_a": 2}'),
         "note sysinfo", "the key 'Boot_a' is duplicated"),
        (prints("svcs", "online svc:/smartdc/agent/cmon-agent:default\n"),
         "note services", "the original agent is online, and has port 9163"),
        (line("nover", ""), "FAIL kstats", "nover (nothing, not "),
        (faults("fail", "zfs:0:arcstats", "5"), "FAIL kstats", "arcstats: input/output error"),
        (prints("zfs", "\t".join(["tank"] + ["1"] * 11) + "\n"), "FAIL commands",
         "zfs list: no dataset zones/ZONE of "),
        (prints("zpool", "zones\t1\t-\tSUSPENDED\t2\n"), "ok   commands",
         "zpool list: 1 pools, without fragmentation, health"),
        (without("ntpq"), "FAIL clock", "chronyc: "),
        (behaves(lambda info: lambda stream: info.head(stream, "500 Oops")), "FAIL vminfod",
         "no event `ready` at ")),
    "nobody says": (
        (prints("sysinfo", '{"Admin IP": "dhcp", "Zpool": "zones"}'), "note sysinfo",
         "admin address None, pool zones, 0 CPUs; without UUID, Hostname"),
        (settings(listen=None), "FAIL sysinfo", "no address on the admin network"),
        (settings(listen=None), "note port", "not tried"),
        (without("svcs"), "FAIL services", "/nonexistent/svcs: no such file"),
        (line("zonename", "other"), "FAIL kstats", ":zonename (other, not 'global'"),
        (faults("block", "unix:0:system_pages"), "FAIL kstats", "unix:0:system_pages"),
        (prints("zoneadm", status=1), "FAIL zones", "zoneadm list: "),
        (behaves(lambda info: info.ready([])), "ok   vminfod", "0 VMs")),
    "no library": (
        (prints("sysinfo", "{"), "FAIL sysinfo", "line 1"),
        (prints("svcs", "online svc:/smartdc/agent/cmon-agent:default\n"), "FAIL services",
         "the original agent is online, and has port 9163"),
        (settings(listen="127.0.0.1:9163"), "     port", "127.0.0.1:9163 is "),
        (settings(libkstat="/nonexistent.so"), "FAIL libkstat", "cannot use /nonexistent.so"),
        (settings(), "FAIL kstats", "kstats cannot be read: see libkstat"),
        (settings(), "FAIL guests", "kstats cannot be read"),
        (settings(), "FAIL caps", "kstats cannot be read"),
        (settings(), "FAIL cost", "kstats cannot be read")),
    "no device": ((faults("fail-open", "13"), "FAIL libkstat", "kstat_open: permission denied"),
                  (settings(), "FAIL kstats", "cannot be read"),
                  (settings(), "FAIL guests", "cannot be read"),
                  (settings(), "FAIL caps", "cannot be read"),
                  (settings(), "FAIL cost", "cannot be read")),
    "no kstat command": (
        (without("kstat"), "FAIL kstats", "not compared: /nonexistent/kstat: no such file"),),
    "an old platform": (
        (lambda one: one.command("zfs", OLD_ZFS), "note commands",
         "zfs list: this platform has no property logicalused"),
        (settings(), "ok   commands", "zfs list: 16 datasets"),
        (prints("svcs", status=1), "FAIL services", "svcs: exit 1")),
    "an alien zone": (
        (prints("kstat", status=3), "FAIL kstats", "values were not compared: kstat -p: exit 3"),
        (prints("zoneadm", ALIEN), "FAIL zones", f"no kstat zones:ID for {WEB01}"),
        (settings(), "FAIL guests", f"no vmm kstat of {WEB01}"),
        (settings(), "ok   links", f"1 zones have none: {WEB01}")),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_each_fault_is_reported_and_the_rest_is_checked(name: str, node: MakeNode) -> None:
    one = node()
    for do, _, _ in FAULTS[name]:
        do(one)
    found = one.check()
    shown = [f"{row['status']:4} {row['check']}: {row['found']}" for row in found.findings]
    for _, begin, part in FAULTS[name]:
        assert any(told.startswith(begin.strip()) and part in told or not begin.strip().startswith(
            ("FAIL", "note", "ok")) and part in told for told in shown), (begin, part, shown)
    assert "(while" not in str(shown)           # what Python adds for programmers
    expected = {begin[5:] for _, begin, _ in FAULTS[name] if begin.startswith("FAIL")}
    assert {row["check"] for row in found.findings if row["status"] == "FAIL"} - {"port"} == \
        expected - {"port"}, shown
    assert found.status == 1
    assert {row["check"] for row in found.findings} == {item.name for item in agent.CHECKS}
    assert all(("todo" in row) == (row["status"] == "FAIL") for row in found.findings)


def test_missing_kstats(node: MakeNode, recorded_node: dict[str, Any]) -> None:
    """An older platform: optional kstats are a note, required ones a fault."""
    kstats = kstats_less(recorded_node, "zfs_metaslab_group", "vmm", "tcp")
    for one in kstats:
        if one["module"] == "memory_cap":
            one["data"] = {name: value for name, value in one["data"].items()
                           if not name.startswith("n_pf")}
    found = node(kstats).check()
    said = found.of("kstats")
    assert ("note", "zfs_metaslab_group:*:*: none: this platform does not count them") in said
    assert ("note", "vmm:*:vcpu*: none: no bhyve zone runs") in said
    assert ("FAIL", "tcp:*:tcp: none") in said
    assert ("note", "memory_cap:*:*: 16, without n_pf_throttle, n_pf_throttle_usec") in said
    assert any(text.startswith("no vmm kstat of ") for _, text in found.of("guests"))


def test_an_unknown_form_of_no_cap_is_reported(
        node: MakeNode, recorded_node: dict[str, Any]) -> None:
    kstats = json.loads(json.dumps(recorded_node["frames"][0]["kstats"]))
    for one in kstats:
        if one["module"] == "memory_cap" and zone_of(one):
            one["data"]["physcap"] = 2 ** 63 - 4096
        if one["name"] == "nprocs_zone_5":
            one["data"]["value"] = 2 ** 31
    assert node(kstats).check().bad() == [
        "caps: memory_cap:*:*:physcap is 9223372036854771712, which looks like an unknown form of "
        "no cap", "caps: caps:*:nprocs_zone_*:value is 2147483648, which looks like an unknown "
        "form of no cap"]


def test_a_chain_of_another_layout_is_reported(
        node: MakeNode, recorded_node: dict[str, Any]) -> None:
    kstats = [*recorded_node["frames"][0]["kstats"], {
        "module": "x", "instance": 0, "name": "x", "class": "x", "type": 9, "crtime": 10 ** 18,
        "snaptime": 0, "data": {}}]
    assert any(text.startswith("libkstat: the chain is inconsistent: ")
               for text in node(kstats).check().bad())


def test_a_kstat_of_another_type_is_reported(node: MakeNode, recorded_node: dict[str, Any]) -> None:
    """zone_vfs looks like a disk, but has named values."""
    kstats = [{**one, "type": 3} if one["module"] == "zone_vfs" else one
              for one in recorded_node["frames"][0]["kstats"]]
    assert "kstats: zone_vfs:*:*: of type 3, not 1" in node(kstats).check().bad()


def test_times_of_disks_may_be_in_seconds(node: MakeNode) -> None:
    """kstat(1M) in Perl printed them so."""
    one = node()
    disk = next(kstat for kstat in one.frame["kstats"] if kstat["name"] == "sd0")
    line("rtime", f"{disk['data']['rtime'] / 1e9:.9f}", "sd:0:sd0:")(one)
    assert not one.check().bad()
    line("rtime", f"{disk['data']['rtime'] / 1e9 + 1:.9f}", "sd:0:sd0:")(one)
    assert "disk:0:sd0:rtime" in one.check().bad()[0]


@pytest.mark.parametrize("before, said, after, same", [
    (5, "5", 5, True), (5, "7", 9, True), (9, "7", 5, True), (5, "4", 9, False),
    (5, "10", 9, False), (2 ** 64 - 1, "18446744073709551615", 2 ** 64 - 1, True),
    (1_500_000_000, "1.500000000", 1_500_000_000, True), (15 * 10 ** 8, "2.5", 15 * 10 ** 8, False),
    ("on-line", "on-line", "on-line", True), ("on-line", "off-line", "off-line", True),
    ("on-line", "spare", "off-line", False), (5, "", 5, False), (5, "five", 5, False)])
def test_kstat_output_between_two_reads(before: Any, said: str, after: Any, same: bool) -> None:
    """A counter may have grown, a gauge moved; text must equal either value."""
    assert agent._same(before, said, after) is same


def test_a_port_in_use_may_be_our_own(node: MakeNode) -> None:
    one = node()
    address = json.loads(one.machine.config.read_text())["listen"]
    with Program(sys.executable, "-I", ROOT / "cmon_agent.py", "--log-format", "text", "--config",
                 one.machine.config) as program:
        program.addresses()
        assert one.port() == [("ok", f"{address} is in use by this agent")]
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        assert one.port() == [("FAIL", f"{address} is in use")]


def test_chrony_without_ntpq(node: MakeNode) -> None:
    one = node()
    one.machine.hide("ntpq")
    one.command("chronyc", "#!/bin/sh\nfor last; do :; done\n[ $last = sources ] || echo "
                "C0000201,ntp1,2,1767225600.1,0.0001,0.0002,0.0003,-17.3,0.0,0.1,0.002,0.03,64.1,"
                "Normal\n")
    [(status, text)] = one.check().of("clock")
    assert status == "ok" and text.startswith("chronyd: ")


def test_as_root_the_check_runs_as_the_services_user(node: MakeNode) -> None:
    if os.geteuid():
        pytest.skip("only root can become somebody else")
    one = node()
    stranger = one.check(user="nobody-at-all")
    assert stranger.bad() == [
        "user: there is no user 'nobody-at-all': the rest is checked as root"]
    assert [row["todo"] for row in stranger.findings if "todo" in row] == [
        "give --user the user in the service's manifest"]
    public = Path(tempfile.mkdtemp())
    try:
        public.chmod(0o755)
        program, config = public / "cmon_agent.py", public / "agent.json"
        shutil.copy(ROOT / "cmon_agent.py", program)
        asked, ppriv = public / "asked", public / "ppriv"
        ppriv.write_text(f"#!/bin/sh\necho $* >> {asked}\n[ $1 = -s ] && exec >&2\n"
                         f"echo '{PPRIV}'\n[ $1 != -s ]\n")
        ppriv.chmod(0o755)
        asked.touch()
        asked.chmod(0o666)
        content = json.loads(one.machine.config.read_text())
        content["commands"]["ppriv"] = str(ppriv)
        config.write_text(json.dumps(content))
        config.chmod(0o600)
        done = subprocess.run([sys.executable, "-I", str(program), "check", "--json", "--config",
                               str(config), "--user", "nobody"], stdout=subprocess.PIPE, text=True)
        found = Result(done.returncode, "", json.loads(done.stdout)["findings"])
        assert found.of("sysinfo")[0][0] == "ok", "still as root"
        assert ("ok", "nobody, where the service runs as nobody") in found.of("user")
        assert f"user: {config} is not readable for nobody" in found.bad()
        assert [words.split()[:2] for words in asked.read_text().splitlines()][0] == [
            "-s", f"IL={agent.PRIVILEGES}"], "less than what basic users have, as in the manifest"
        assert any(text.startswith("nobody keeps all basic privileges: ppriv: ")
                   for _, text in found.of("user")), "the stand-in refuses it"
        assert any(text.startswith("libkstat: cannot use ") for text in found.bad()), \
            "the folder of the tests is root's"
    finally:
        shutil.rmtree(public)


def test_other_users_are_told_what_only_root_can_check(node: MakeNode,
                                                       monkeypatch: pytest.MonkeyPatch,
                                                       tmp_path: Path) -> None:
    """The file of the set-up service is read instead of sysinfo, if it is there."""
    one = node()
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    arguments = agent.agent_command_line("check").parse_args(["--config", str(one.machine.config)])

    def found(look: Callable[[agent.Examined], Iterator[agent.Finding]]) -> list[agent.Finding]:
        return list(look(agent.Examined(arguments, agent.load_agent(arguments))))
    [(status, text)] = found(agent.check_sysinfo)
    assert status == "note" and text.endswith("no such file or directory; root can run sysinfo")
    (tmp_path / "sysinfo.json").write_text(json.dumps(node_host := {"Admin IP": "10.0.0.5"}))
    one.machine.settings(sysinfo_file=str(tmp_path / "sysinfo.json"))
    assert node_host and found(agent.check_sysinfo)[0][1].startswith("admin address 10.0.0.5")
    assert ("note", f"{pwd.getpwuid(65534).pw_name}, where the service runs as noaccess") in found(
        agent.check_user)


def test_bad_settings_are_reported_as_by_the_servers(node: MakeNode) -> None:
    one = node()
    one.machine.config.write_text('{"listne": 1}')
    found = one.check("--user", ME)
    assert found.status == 2 and "unknown setting" in found.text


def test_a_check_takes_at_most_a_minute(node: MakeNode, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    one = node()
    monkeypatch.setattr(agent, "CHECK_SECONDS", 0.0)
    arguments = agent.agent_command_line("check").parse_args(["--config", str(one.machine.config)])
    assert agent.check(arguments, agent.load_agent(arguments)) == 1
    said = capsys.readouterr().out
    assert said.count("not checked: the minute is over") == len(agent.CHECKS)
