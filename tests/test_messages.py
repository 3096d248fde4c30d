# SPDX-License-Identifier: MPL-2.0
"""Messages of the first day: one line with the object, the expectation and the next step."""
from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from agents import client_tls, inventory, proxy, write_inventory
from cmon_agent import parse
from cmon_proxy import make_key
from support import NODE, ROOT, Connection, Program, free_port, http_get, samples, wait_until

PROGRAMS = ("cmon_agent", "cmon_proxy", "cmon_forwarder", "cmon")


def run(*words: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run one of our programs until it exits."""
    program, *rest = map(str, words)
    return subprocess.run([sys.executable, str(ROOT / program), *rest], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, timeout=120, **more)


@pytest.mark.parametrize("words, said", [
    (("cmon.py", "monitr", "web01"), "no command 'monitr', did you mean monitor?"),
    (("cmon.py", "frobnicate"), "no command 'frobnicate': one of discover, monitor,"),
    (("cmon.py", "demo", "--agent-port", "0"), "--agent-port: '0' is not a port from 1 to 65535"),
    (("cmon.py", "discover", "--timeout", "soon"), "--timeout: 'soon' is not a number of seconds"),
    (("cmon.py", "certgen", "--account", "../a", "--ssh-key", "k"),
     "--account: '../a' is not a login"),
    (("cmon.py", "certgen", "--account", "a", "--ssh-key", "k", "--days", "0"),
     "--days: '0' is not a number of days from 1 to 36500"),
    (("cmon.py", "discover", "--hosts", "x"), "--hosts: 'x' is not an IP address"),
    (("cmon.py", "top", "--speed", "0"), "--speed: '0' is not a factor from 0.001 to 3600"),
    (("cmon_agent.py", "--log-level", "verbose"),
     "--log-level 'verbose' is not known: one of debug"),
    (("cmon_agent.py", "chek"), "no command 'chek', did you mean check?"),
    (("cmon_agent.py", "--listen"), "--listen: expected one argument"),
    (("cmon_agent.py", "capture"), "missing: FILE"),
    (("cmon_agent.py", "capture", "x", "--frames", "0"), "'0' is not a number from 1 to 100"),
    (("cmon_agent.py", "--listen", "foo", "--replay", NODE),
     "listen: must be HOST:PORT, as in 127.0.0.1:9163 or :9163, not \"foo\""),
    (("cmon_proxy.py",), "--config FILE is required"),
], ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, tuple) else None)
def test_a_wrong_command_line_is_one_line_in_our_words(words: Any, said: str) -> None:
    done = run(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert "invalid" not in done.stderr and "usage:" not in done.stderr


@pytest.mark.parametrize("words", [("check", "--json"), ("--check-config", "--replay", str(NODE))],
                         ids=lambda words: words[0])
def test_a_full_disk_is_reported_in_one_line(words: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(ROOT / "cmon_agent.py"), *words], stdout=full,
                              stderr=subprocess.PIPE, universal_newlines=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "cmon_agent: no space left on device\n")


def test_a_check_whose_reader_has_exited_does_not_succeed_in_silence() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, str(ROOT / "cmon_agent.py"), "check"], stdout=write,
                          stderr=subprocess.PIPE, universal_newlines=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_server_starts_without_standard_streams() -> None:
    port = free_port()
    command = " ".join(map(shlex.quote, [
        sys.executable, str(ROOT / "cmon_agent.py"), "--replay", str(NODE),
        "--listen", f"127.0.0.1:{port}"]))
    with Program("/bin/sh", "-c", f"exec {command} <&- >&- 2>&-"):
        wait_until(lambda: is_healthy(port))


def test_a_log_that_nobody_reads_does_not_hold_up_the_end() -> None:
    code = ("import cmon_agent as a; a.LOG_SECONDS = 0.1; a.start_logging('a', 'info', 'text')\n"
            "for number in range(2000): a.log.info('%s', 'x' * 100)\n"
            "a.stop_logging(); print('over', flush=True)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.read() == b"over\n"          # its end of file is the end of all
        assert process.wait(60) == 0
        said = process.stderr.read().splitlines()
        assert said and all(line.endswith(b"x" * 100) for line in said[:-1])
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()


def test_a_log_that_nobody_reads_does_not_hold_up_a_reload() -> None:
    code = ("import cmon_agent as a, os; a.LOG_SECONDS = 3600; a.start_logging('a', 'info', '')\n"
            "for number in range(2000): a.log.info('%s', 'x' * 100)\n"
            "a.start_logging('a', 'warn', 'text'); os._exit(a.log.level)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        assert process.wait(60) == 30           # WARNING
    finally:
        process.kill()
        process.stderr.close()


def is_healthy(port: int) -> bool:
    """Whether a server answers at a port of loopback."""
    try:
        return http_get(("127.0.0.1", port), "/-/healthy").status == 200
    except OSError:
        return False


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_old_python_is_refused_with_the_required_version(program: str) -> None:
    code = (f"import runpy, sys; sys.argv = [{program!r}]; sys.version_info = (3, 8, 1, 'final', 0)"
            f"; runpy.run_path({str(ROOT / program)!r} + '.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT,
                          stderr=subprocess.PIPE, universal_newlines=True, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(rf"{program}: needs Python 3\.9 or later, this is \S+\n", done.stderr)


@pytest.mark.parametrize("program", PROGRAMS[1:])
def test_a_program_without_its_neighbour_says_so(program: str, tmp_path: Path) -> None:
    shutil.copy(str(ROOT / f"{program}.py"), str(tmp_path))
    done = subprocess.run([sys.executable, "-sE", str(tmp_path / f"{program}.py")], timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"cmon_agent.py of the same version must be beside {program}.py" in done.stderr


def test_a_command_reports_that_cmon_proxy_is_missing(tmp_path: Path) -> None:
    for name in ("cmon.py", "cmon_agent.py"):
        shutil.copy(str(ROOT / name), str(tmp_path))
    done = subprocess.run([sys.executable, str(tmp_path / "cmon.py"), "certgen", "--account", "a",
                           "--ssh-key", "k"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"cmon: .+: cmon_proxy.py of the same version must be beside cmon.py\n",
                        done.stderr)


def test_warn_is_a_level_and_a_port_alone_an_address() -> None:
    port = free_port()
    with Program(sys.executable, ROOT / "cmon_agent.py", "--listen", f":{port}", "--replay", NODE,
                 "--log-level", "info") as agent:
        wait_until(lambda: "listening on 0.0.0.0" in agent.log)
        assert http_get(("127.0.0.1", port), "/-/healthy").status == 200
    with Program(sys.executable, ROOT / "cmon_agent.py", "--listen", f":{port}", "--replay", NODE,
                 "--log-level", "warn") as agent:
        wait_until(lambda: is_healthy(port))
        assert "listening" not in agent.log


LIMITED = "unset COVERAGE_PROCESS_START"        # whose file would be limited, too


def capture(file: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Capture the recorded node, after a shell command."""
    code = ("import sys, cmon_agent as a; a.make_host = lambda _, s: a.RecordedHost(sys.argv[1], s)"
            "; sys.exit(a.main(['capture', sys.argv[2], '--frames', '1']))")
    return subprocess.run(["/bin/sh", "-c", before + 'exec "$@"', "sh", sys.executable, "-c", code,
                           str(NODE), file], cwd=ROOT, timeout=120, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True)


def test_capture_on_a_full_disk_leaves_no_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "capture.json"
    done = capture(str(path), f"{LIMITED}; ulimit -f 8; ")
    assert (done.returncode, done.stderr) == (
        1, f"cmon_agent: cannot write {path}: file too large\n")
    assert not path.exists()


def test_capture_writes_to_standard_output(tmp_path: Path) -> None:
    done = capture("-")
    assert done.returncode == 0 and done.stdout.startswith("{")
    assert "standard output: 1 frames" in done.stderr and "confidential" in done.stderr
    (tmp_path / "old.json").write_text("x" * 5_000_000)
    assert capture(str(tmp_path / "old.json")).returncode == 0
    assert (tmp_path / "old.json").read_text() == done.stdout or \
        (tmp_path / "old.json").read_text().endswith("}\n")


def test_capture_refuses_a_bad_path_before_it_reads(tmp_path: Path) -> None:
    done = run("cmon_agent.py", "capture", tmp_path / "no" / "x.json", "--libkstat", "/no/library")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"cmon_agent: cannot write {tmp_path}/no/x.json: " \
        "no such file or directory\n"
    done = run("cmon_agent.py", "capture", tmp_path / "x.json", "--libkstat", "/no/library")
    assert done.returncode and not (tmp_path / "x.json").exists()


def test_a_reload_shows_in_metrics(tmp_path: Path) -> None:
    config = tmp_path / "agent.json"
    config.write_text("{}")
    with Program.agent("--replay", NODE, "--config", config) as agent:
        def metric(name: str) -> float:
            page = http_get(agent.address, "/metrics").text
            return samples(page)[f"cmon_agent_config_last_reload_success{name}"]
        assert metric("ful") == 1
        first = metric("_timestamp_seconds")
        assert abs(first - time.time()) < 600
        config.write_text('{"frobnicate": 1}')
        agent.signal(signal.SIGHUP)
        wait_until(lambda: metric("ful") == 0)
        assert metric("_timestamp_seconds") == first
        config.write_text("{}")
        agent.signal(signal.SIGHUP)
        wait_until(lambda: metric("ful") == 1)
        assert metric("_timestamp_seconds") > first


# --- with a demo that runs ------------------------------------------------------------------------

class Demo(NamedTuple):
    program: Program
    folder: Path
    url: str
    agent: str

    def cmon(self, *words: str, **flags: str) -> subprocess.CompletedProcess[str]:
        given = {"url": self.url, "cert": str(self.folder / "alice-cert.pem"),
                 "key": str(self.folder / "alice-key.pem"), "ca": str(self.folder / "ca.pem"),
                 **flags}
        return run("cmon.py", *words, *(word for name, text in given.items()
                                        for word in (f"--{name}", text)))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("demo")
    program = Program.cmon("demo", env={"TMPDIR": str(folder)})
    try:
        wait_until(lambda: "until Ctrl-C" in program.output
                   or program.process.poll() is not None)
        url, = set(re.findall(r"(?m)^    (https://localhost:\d+)/$", program.output))
        agent, = set(re.findall(r"curl http://(127\.0\.0\.1:\d+)/v1/gz", program.output))
        yield Demo(program, next(folder.iterdir()), url, agent)
    finally:
        program.stop()


def test_a_key_in_openssh_format_leads_to_certgen(demo: Demo, tmp_path: Path) -> None:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    key = tmp_path / "id_rsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", str(key)], check=True)
    done = demo.cmon("discover", key=str(key))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"the key {key} is in OpenSSH's format" in done.stderr and "certgen" in done.stderr


def test_a_mismatched_key_is_distinguished_from_a_broken_one(demo: Demo, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    other.write_bytes(make_key())
    assert "does not belong to the certificate" in demo.cmon("discover", key=str(other)).stderr


def test_https_to_an_agent_is_named(demo: Demo) -> None:
    done = demo.cmon("discover", url=f"https://{demo.agent}")
    assert done.returncode == 1
    assert "speaks plain HTTP, as an agent" in done.stderr


def test_a_stopped_container_of_the_account_is_not_unknown(demo: Demo) -> None:
    done = demo.cmon("monitor", "old-web")
    assert done.returncode == 1
    assert re.fullmatch(r"cmon: container \S+ \(old-web, stopped\) is not running; metrics are "
                        r"available only while it runs\n", done.stderr)
    assert "no container 'old-wab'" in demo.cmon("monitor", "old-wab").stderr


def test_the_agents_page_shows_a_replay(demo: Demo) -> None:
    host, _, port = demo.agent.partition(":")
    assert "replay of" in http_get((host, int(port)), "/").text


def test_clients_preferring_openmetrics_get_the_same_series(demo: Demo) -> None:
    """OpenMetrics renames counters and types: the page stays the text format that is expected."""
    accept = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
    tls = ssl.create_default_context(cafile=str(demo.folder / "ca.pem"))
    tls.load_cert_chain(str(demo.folder / "alice-cert.pem"), str(demo.folder / "alice-key.pem"))
    host, _, port = demo.agent.partition(":")
    agent, proxy = (host, int(port)), ("127.0.0.1", int(demo.url.rpartition(":")[2]))
    web01, = re.findall(r"/v1/([0-9a-f-]{36})/metrics\">web01<", http_get(agent, "/").text)
    page = f"/v1/{web01}/metrics"
    for answer in (http_get(agent, page, accept), http_get(agent, "/metrics", accept),
                   http_get(proxy, page, accept, tls=tls, server_name="localhost"),
                   http_get(proxy, "/v1/fleet/metrics", accept, tls=tls, server_name="localhost")):
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert "# EOF" not in answer.text and parse(answer.text)


def test_refused_clients_are_in_the_log_at_debug(tmp_path: Path) -> None:
    write_inventory(tmp_path, inventory("127.0.0.1:1"))
    with proxy(tmp_path, log_level="debug") as program:
        with Connection(program.address, client_tls()) as client:
            assert client.request("/v1/discover").status == 401
        line, = wait_until(lambda: re.findall(r"(?m)^.* DEBUG +refused .*$", program.log))
        assert "127.0.0.1" in line and "/v1/discover" in line
        assert "401 no client certificate" in line
        landing = http_get(program.addresses(2)[1], "/")
        assert landing.status == 200 and 'href="/metrics"' in landing.text
