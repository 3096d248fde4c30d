# SPDX-License-Identifier: MPL-2.0
"""The SMF manifests against the grammar, against the programs and the README; the set-up script."""
from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from support import ROOT, Program, http_get, samples

import cmon_agent

MANIFESTS = sorted(path.name for path in (ROOT / "smf").glob("*.xml"))
SERVICES = {"site/cmon-agent-setup": "container-monitor-agent.xml",
            "site/cmon-agent": "container-monitor-agent.xml",
            "site/cmon-original-off": "cmon-original-off.xml", "site/cmon-proxy": "cmon-proxy.xml",
            "site/cmon-forwarder": "cmon-forwarder.xml"}
BASIC = {"file_link_any", "proc_info", "proc_session", "proc_fork", "proc_exec", "file_read",
         "file_write", "net_access"}


def service(name: str) -> ET.Element:
    root = ET.parse(ROOT / "smf" / SERVICES[name]).getroot()
    return next(element for element in root if element.get("name") == name)


def method(name: str, which: str) -> ET.Element:
    return next(element for element in service(name).iter("exec_method")
                if element.get("name") == which)


def startd(name: str) -> dict[str, str]:
    return {str(value.get("name")): str(value.get("value"))
            for group in service(name).iter("property_group") if group.get("name") == "startd"
            for value in group.iter("propval")}


def xmllint(*arguments: str) -> "subprocess.CompletedProcess[str]":
    tool = shutil.which("xmllint")
    if tool is None:
        pytest.skip("xmllint is not installed (libxml2-utils): the grammar was not checked")
    return subprocess.run([tool, "--noout", "--nonet", *arguments], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)


# --- grammar --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_follows_the_grammar(name: str) -> None:
    checked = xmllint("--dtdvalid", str(ROOT / "tests" / "smf.dtd"), str(ROOT / "smf" / name))
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("before, after", [
    ('timeout_seconds="30"', ""),
    ('restart_on="none"', 'restart_on="never"'),
    ('name="refresh"', 'name="restart"'),
    (' working_directory="/"', ""),
    ('<propval name="duration" type="astring"', '<propval name="duration"'),
    ("<single_instance/>", "<stability value='Stable'/>"),
], ids=["method without a timeout", "unknown restart_on", "method that startd does not know",
        "no working directory", "property without a type", "wrong order"])
def test_the_grammar_refuses(before: str, after: str, tmp_path: Path) -> None:
    text = (ROOT / "smf" / "container-monitor-agent.xml").read_text()
    assert before in text
    broken = tmp_path / "broken.xml"
    broken.write_text(text.replace(before, after))
    assert xmllint("--dtdvalid", str(ROOT / "tests" / "smf.dtd"), str(broken)).returncode != 0


def test_all_services_are_known() -> None:
    found = {str(element.get("name")): name for name in MANIFESTS
             for element in ET.parse(ROOT / "smf" / name).getroot()}
    assert found == SERVICES


# --- least privilege ------------------------------------------------------------------------------

@pytest.mark.parametrize("name, user", [("site/cmon-agent", "noaccess"),
                                        ("site/cmon-proxy", "cmon"),
                                        ("site/cmon-forwarder", "cmon")])
def test_daemon_has_no_more_than_the_basic_privileges(name: str, user: str) -> None:
    credential = next(service(name).iter("method_credential"))
    assert (credential.get("user"), credential.get("group")) == (user, user)
    for which in ("privileges", "limit_privileges"):
        words = str(credential.get(which)).split(",")
        assert words[0] == "basic"
        assert all(word.startswith("!") and word[1:] in BASIC for word in words[1:])
        assert "!proc_fork" not in words and "!proc_exec" not in words     # startd needs a shell
        if name == "site/cmon-agent":
            assert credential.get(which) == cmon_agent.PRIVILEGES, "`check` looks with these"


def test_only_the_setup_runs_as_root_and_it_exits() -> None:
    root = [name for name in SERVICES for credential in service(name).iter("method_credential")
            if credential.get("user") == "root"]
    assert root == ["site/cmon-agent-setup"]
    assert startd("site/cmon-agent-setup") == {"duration": "transient"}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_working_directory_is_set(name: str) -> None:
    """A context with a user in it would otherwise start in that user's home."""
    folders = [context.get("working_directory") for context in service(name).iter("method_context")]
    assert folders == ["/"]


# --- life -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["site/cmon-agent", "site/cmon-proxy",
                                  "site/cmon-forwarder"])
def test_refresh_sends_sighup_and_stop_sigterm(name: str) -> None:
    assert method(name, "refresh").get("exec") == ":kill -HUP"
    assert method(name, "stop").get("exec") == ":kill"


def start_words(name: str) -> list[str]:
    return shlex.split(str(method(name, "start").get("exec")))


@pytest.mark.parametrize("name, program, python, isolation", [
    ("site/cmon-agent", "cmon_agent", "/opt/tools/bin/python3.11", "-I"),
    ("site/cmon-proxy", "cmon_proxy", "/opt/local/bin/python3.11", "-sE"),
    ("site/cmon-forwarder", "cmon_forwarder", "/opt/local/bin/python3.11", "-sE"),
])
def test_start_returns_when_ready(name: str, program: str, python: str, isolation: str) -> None:
    """As the README installs it; --smf is what makes "online" mean "listening"."""
    words = start_words(name)
    assert words[:4] == [python, isolation, "-X", "utf8"]
    assert program in " ".join(words[4:-3])
    assert words[-3:-1] == ["--smf", "--config"]
    readme = (ROOT / "README.md").read_text("utf-8")
    assert words[-1] in readme and python in readme


def test_the_agent_as_the_manifest_starts_it_keeps_no_syntax_tree(tmp_path: Path) -> None:
    """Imported from its compiled file it takes 20 MB less than as a script."""
    shutil.copy(ROOT / "cmon_agent.py", tmp_path)
    subprocess.run([sys.executable, "-I", "-m", "py_compile", tmp_path / "cmon_agent.py"],
                   check=True)
    words = start_words("site/cmon-agent")
    line = [sys.executable, *(word.replace("/opt/custom/cmon", str(tmp_path))
                              for word in words[1:words.index("--smf")])]
    assert len(line) == 6, "python, -I, -X, utf8, -c, what it runs"
    sizes = []
    for command in (line, [sys.executable, "-I", tmp_path / "cmon_agent.py"]):
        with Program(*command, "--replay", ROOT / "examples" / "node.json", "--listen",
                     "127.0.0.1:0", "--log-format", "text") as program:
            assert http_get(program.address, "/v1/gz/metrics").status == 200
            page = samples(http_get(program.address, "/metrics").text)
            sizes.append(page["process_resident_memory_bytes"])
    assert sizes[0] < sizes[1] - 8e6


def test_agent_waits_for_the_setup() -> None:
    setup = next(dependency for dependency in service("site/cmon-agent").iter("dependency")
                 if dependency.get("name") == "setup")
    assert [fmri.get("value") for fmri in setup] == ["svc:/site/cmon-agent-setup:default"]
    assert (setup.get("grouping"), setup.get("restart_on")) == ("require_all", "restart")


def test_the_original_agent_is_disabled_by_a_separate_service() -> None:
    """Triton's agent: cmon-agent.xml, svc:/smartdc/agent/cmon-agent, its log rotation."""
    [dependent] = service("site/cmon-original-off").iter("dependent")
    assert [fmri.get("value") for fmri in dependent] == ["svc:/smartdc/agent/cmon-agent"]
    assert (dependent.get("grouping"), dependent.get("restart_on")) == ("exclude_all", "none")
    assert startd("site/cmon-original-off") == {"duration": "transient"}
    for name in ("site/cmon-agent-setup", "site/cmon-agent"):
        assert not list(service(name).iter("dependent")), "both can run side by side"
    assert "cmon-agent.xml" not in MANIFESTS
    assert "-w cmon-agent " not in SETUP.read_text()


def test_core_of_a_plugin_does_not_restart_the_agent() -> None:
    assert startd("site/cmon-agent") == {"duration": "contract", "ignore_error": "core"}


# --- the set-up script ----------------------------------------------------------------------------

SETUP = ROOT / "smf" / "cmon-agent-setup"


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)


def run_setup(tmp_path: Path, sysinfo: str, logadm: str = "echo \"$*\" >> \"$0.log\"\n",
              *command: str) -> "subprocess.CompletedProcess[str]":
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    stand_in(tools, "sysinfo", sysinfo)
    stand_in(tools, "logadm", logadm)
    stand_in(tools, "chown", "echo \"$*\" >> \"$0.log\"\n")
    stand_in(tools, "sleep", "echo \"$*\" >> \"$0.log\"\n")
    return subprocess.run(
        ["/bin/sh", str(SETUP), str(tmp_path / "run"), "noaccess", "/var/svc/log/x.log",
         *(command or ("true",))],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, universal_newlines=True)


def test_setup_writes_sysinfo_readable_by_the_agent_only(tmp_path: Path) -> None:
    done = run_setup(tmp_path, "echo '{\"Admin IP\": \"10.0.0.5\"}'\n")
    assert (done.returncode, done.stdout) == (0, "")
    left = tmp_path / "run" / "sysinfo.json"
    assert left.read_text() == '{"Admin IP": "10.0.0.5"}\n'
    assert stat.S_IMODE(left.stat().st_mode) == 0o400
    assert [path.name for path in left.parent.iterdir()] == ["sysinfo.json"]
    assert (tmp_path / "bin" / "chown.log").read_text() == f"noaccess {left}.new\n"


def test_setup_bounds_the_log(tmp_path: Path) -> None:
    run_setup(tmp_path, "echo '{}'\n")
    assert (tmp_path / "bin" / "logadm.log").read_text() == (
        "-w container-monitor-agent -C 10 -s 5m -c /var/svc/log/x.log\n")
    log = shlex.split(str(method("site/cmon-agent-setup", "start").get("exec")))[4]
    assert log == "/var/svc/log/site-cmon-agent:default.log"


def test_setup_waits_for_a_late_address(tmp_path: Path) -> None:
    """DHCP: the third sysinfo has an address. The agent detects it, as in the manifest."""
    config = tmp_path / "agent.json"
    config.write_text("{}")
    words = shlex.split(str(method("site/cmon-agent-setup", "start").get("exec")))[5:]
    assert words[:5] == ["/opt/tools/bin/python3.11", "-I", "-X", "utf8",
                         "/opt/custom/cmon/cmon_agent.py"] and words[5:7] == ["address", "--config"]
    assert method("site/cmon-agent-setup", "start").get("timeout_seconds") == "0"
    done = run_setup(tmp_path, """[ "$1" = -f ] || exit 1
echo x >> "$0.count"
[ "$(wc -l < "$0.count")" -lt 3 ] && echo '{"Admin IP": "dhcp"}' || echo '{"Admin IP": "10.0.0.5"}'
""", ":\n", sys.executable, "-I", str(ROOT / "cmon_agent.py"), "address", "--config", str(config))
    assert done.returncode == 0
    assert done.stdout.count("waiting for the node's address: ") == 1, done.stdout
    assert "no address on the admin network" in done.stdout
    assert (tmp_path / "bin" / "sleep.log").read_text() == "5\n5\n"
    assert (tmp_path / "run" / "sysinfo.json").read_text() == '{"Admin IP": "10.0.0.5"}\n'


@pytest.mark.parametrize("config, sysinfo, status, said", [
    ("{}", '{"Admin IP": "10.0.0.5", "Boot_x": 1, "Boot_x": 2}', 0, "10.0.0.5"),
    ('{"listen": "10.0.0.9:9164"}', '{"Admin IP": "dhcp"}', 0, "10.0.0.9:9164"),
    ("{}", '{"Admin IP": "dhcp"}', 1, "no address on the admin network"),
    ("{}", "no JSON", 1, "not JSON"), ("{}", "[]", 1, "no address on the admin network"),
    ('{"listne": 1}', "{}", 2, "unknown setting"), ("", "{}", 2, "not JSON")],
    ids=["a key twice", "listen says it", "DHCP", "no JSON", "a list", "a typing error", "empty"])
def test_setup_detects_an_address(config: str, sysinfo: str, status: int, said: str, tmp_path: Path
                                 ) -> None:
    (tmp_path / "agent.json").write_text(config)
    (tmp_path / "sysinfo.json").write_text(sysinfo)
    done = subprocess.run(
        [sys.executable, "-I", str(ROOT / "cmon_agent.py"), "address", "--config",
         str(tmp_path / "agent.json"), str(tmp_path / "sysinfo.json")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    assert done.returncode == status and said in done.stdout and "Traceback" not in done.stdout


def test_setup_continues_without_logadm(tmp_path: Path) -> None:
    done = run_setup(tmp_path, "echo '{}'\n", "exit 1\n")
    assert done.returncode == 0
    assert "logadm failed" in done.stdout


@pytest.mark.parametrize("sysinfo", ["exit 1\n", "echo partial; exit 1\n", ":\n"],
                         ids=["fails", "fails halfway", "prints nothing"])
def test_setup_keeps_the_old_file_when_sysinfo(sysinfo: str, tmp_path: Path) -> None:
    run_setup(tmp_path, "echo '{\"old\": 1}'\n")
    done = run_setup(tmp_path, sysinfo)
    assert done.returncode == 1
    assert re.search("cmon-agent-setup: sysinfo failed", done.stdout)
    left: list[Path] = list((tmp_path / "run").iterdir())
    assert [(path.name, path.read_text()) for path in left] == [("sysinfo.json", '{"old": 1}\n')]
