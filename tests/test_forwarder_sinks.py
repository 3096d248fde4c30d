# SPDX-License-Identifier: MPL-2.0
"""The forwarder against real servers: what arrives equals what was scraped.

One forwarder pushes to all of them at once; it is restarted, and so are servers, while counters
grow and one starts again at zero. A `file` sink beside them says what was scraped, and when.
"""
from __future__ import annotations

import calendar
import http.client
import json
import math
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
from agents import TLS
from forwarding import Source, drained, own, uuid_of, write_config
from support import ROOT, Program, free_port, wait_until

from cmon_forwarder import (
    _DOTTED_INVALID, _GRAPHITE_INVALID, _INFLUX_INVALID, read_time_series, remote_write_records,
    Scrape, Series, SinkSettings, Target)
from test_forwarder_encoders import read_syslog

ODD = ["a b", "a,b=c", 'say "x"', "back\\slash", "a\\nb", "tab\tx", "ſ€😀", "semi;colon", "~tilde",
       "[x]", "{y}", "a:b|c#d@e", "100%", "'", "dots.and/slashes"]
LINES = ["two\nlines", "end\\", "\\, ", "\u2028"]       # what not every sink can carry


class Page:
    """Counters that grow until stopped, and values that are hard to represent."""

    def __init__(self) -> None:
        self.calls: dict[int, int] = {}
        self.stopped = False
        self.reset = 0

    def __call__(self, number: int) -> str:
        if not self.stopped:
            self.calls[number] = self.calls.get(number, 0) + 1
        calls = self.calls.get(number, 0)

        def escape(value: str) -> str:
            return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        odd = "".join(f'odd{{label="{escape(value)}"}} {place}\n'
                      for place, value in enumerate(ODD + LINES))
        return (f'# TYPE hits_total counter\nhits_total{{if="net0"}} {calls * 7}\n'
                f"# TYPE reset_total counter\nreset_total {(calls - self.reset) * 3}\n"
                f"# TYPE big_total counter\nbig_total {2 ** 63 - 1 - 10_000 + calls}\n"
                f"# TYPE huge_total counter\nhuge_total {2 ** 64 - 1 - 10_000 + calls}\n"
                f"# TYPE ratio gauge\nratio {0.1 + calls / 1000}\n"
                f"# TYPE below gauge\nbelow {-calls}\n# TYPE odd gauge\n{odd}"
                "# TYPE nan gauge\nnan NaN\n# TYPE inf gauge\ninf +Inf\n")


Row = dict[str, Any]
Key = tuple[str, tuple[tuple[str, str], ...]]


def key_of(name: str, labels: dict[str, str]) -> Key:
    return name, tuple(sorted(labels.items()))


class World(NamedTuple):
    """The scraped samples, and the servers that received them."""
    rows: list[Row]
    folder: Path
    servers: dict[str, Any]
    ports: dict[str, int]

    def values(self, alias: str, name: str) -> list[Any]:
        """A container's values of a metric that has one series, in order."""
        return [row["value"] for row in self.rows
                if row["name"] == name and row["labels"]["alias"] == alias]

    def grown(self, alias: str, name: str) -> int:
        """The increase at the source, from the first scrape on."""
        values = self.values(alias, name)
        return sum(now - before if now >= before else now
                   for before, now in zip(values, values[1:]))

    def expected(self, change: Callable[[str], str] = str, finite: bool = True
                 ) -> dict[Key, dict[int, Any]]:
        """Values by series and milliseconds, with label values as a sink changes them."""
        found: dict[Key, dict[int, Any]] = {}
        for row in self.rows:
            value = float(row["value"]) if isinstance(row["value"], str) else row["value"]
            if finite and not math.isfinite(value):
                continue
            labels = {name: change(text) for name, text in row["labels"].items()}
            found.setdefault(key_of(row["name"], labels), {})[
                round(row["timestamp"] * 1000)] = value
        return found


def need(program: str) -> str:
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


def get_json(port: int, path: str, **query: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path + "?" + urllib.parse.urlencode(query))
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body[:500]
        return json.loads(body)
    finally:
        connection.close()


def answers(port: int, path: str) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", path)
        return connection.getresponse().status < 300
    except OSError:
        return False


def start_influx(folder: Path, ports: dict[str, int]) -> Program:
    (folder / "influx.conf").write_text(f"""
reporting-disabled = true
bind-address = "127.0.0.1:{ports['influx_rpc']}"
[meta]
  dir = "{folder}/influx/meta"
[data]
  dir = "{folder}/influx/data"
  wal-dir = "{folder}/influx/wal"
  query-log-enabled = false
[http]
  bind-address = "127.0.0.1:{ports['influx']}"
  log-enabled = false
[monitor]
  store-enabled = false
""")
    return Program(need("influxd"), "-config", folder / "influx.conf",
                   env={"HOME": str(folder)})


def start_carbon(folder: Path, ports: dict[str, int]) -> Program:
    conf = folder / "carbon"
    conf.mkdir(exist_ok=True)
    user = subprocess.run(["id", "-un"], stdout=subprocess.PIPE).stdout.decode().strip()
    (conf / "carbon.conf").write_text(f"""[cache]
STORAGE_DIR = {conf}
LOCAL_DATA_DIR = {conf}/whisper
CONF_DIR = {conf}
LOG_DIR = {conf}
PID_DIR = {conf}
USER = {user if user != 'root' else ''}
MAX_CACHE_SIZE = inf
MAX_UPDATES_PER_SECOND = inf
MAX_CREATES_PER_MINUTE = inf
MIN_TIMESTAMP_RESOLUTION = 1
LINE_RECEIVER_INTERFACE = 127.0.0.1
LINE_RECEIVER_PORT = {ports['carbon']}
PICKLE_RECEIVER_INTERFACE = 127.0.0.1
PICKLE_RECEIVER_PORT = 0
CACHE_QUERY_INTERFACE = 127.0.0.1
CACHE_QUERY_PORT = {ports['carbon_query']}
ENABLE_TAGS = False
TAG_RELAY_NORMALIZED = False
""")
    (conf / "storage-schemas.conf").write_text("[all]\npattern = .*\nretentions = 1s:1h\n")
    return Program(need("carbon-cache"), f"--config={conf}/carbon.conf", "--nodaemon", "start")


def start_rsyslog(folder: Path, ports: dict[str, int]) -> Program:
    (folder / "rsyslog.conf").write_text(f"""
global(workDirectory="{folder}" parser.escapeControlCharactersOnReceive="off"
  parser.dropTrailingLFOnReception="off"
  defaultNetstreamDriverCAFile="{TLS}/ca.pem" defaultNetstreamDriverCertFile="{TLS}/server.pem"
  defaultNetstreamDriverKeyFile="{TLS}/server.key")
module(load="imudp")
module(load="imtcp" streamDriver.name="gtls" streamDriver.mode="1" streamDriver.authMode="anon")
module(load="imptcp")
template(name="parts" type="list" option.jsonf="on") {{
  property(outname="time" name="timestamp" dateFormat="rfc3339" format="jsonf")
  property(outname="host" name="hostname" format="jsonf")
  property(outname="app" name="app-name" format="jsonf")
  property(outname="msgid" name="msgid" format="jsonf")
  property(outname="priority" name="pri" format="jsonf")
  property(outname="data" name="structured-data" format="jsonf")
  property(outname="raw" name="rawmsg" format="jsonf") }}
ruleset(name="udp") {{ action(type="omfile" file="{folder}/udp.log" template="parts") }}
ruleset(name="tcp") {{ action(type="omfile" file="{folder}/tcp.log" template="parts") }}
ruleset(name="tls") {{ action(type="omfile" file="{folder}/tls.log" template="parts") }}
input(type="imudp" address="127.0.0.1" port="{ports['udp']}" ruleset="udp" rcvbufSize="4m")
input(type="imptcp" address="127.0.0.1" port="{ports['tcp']}" ruleset="tcp")
input(type="imtcp" address="127.0.0.1" port="{ports['tls']}" ruleset="tls")
""")
    return Program(need("rsyslogd"), "-n", "-f", folder / "rsyslog.conf", "-i",
                   folder / "rsyslog.pid")


def start_prometheus(folder: Path, ports: dict[str, int]) -> Program:
    (folder / "empty.yml").write_text("global: {}\n")
    return Program(need("prometheus"), f"--config.file={folder}/empty.yml",
                   f"--storage.tsdb.path={folder}/prometheus", "--web.enable-remote-write-receiver",
                   f"--web.listen-address=127.0.0.1:{ports['prometheus']}")


def start_victoria(folder: Path, ports: dict[str, int]) -> Program:
    return Program(need("victoria-metrics"), f"-storageDataPath={folder}/victoria",
                   f"-httpListenAddr=127.0.0.1:{ports['victoria']}",
                   f"-graphiteListenAddr=127.0.0.1:{ports['victoria_graphite']}",
                   "-retentionPeriod=1", "-memory.allowedBytes=64MB")


def start_collectd(folder: Path, ports: dict[str, int]) -> Program:
    (folder / "collectd.conf").write_text(f"""
BaseDir "{folder}/collectd"
PIDFile "{folder}/collectd.pid"
Hostname "here"
FQDNLookup false
Interval 1
LoadPlugin statsd
LoadPlugin csv
<Plugin statsd>
  Host "127.0.0.1"
  Port "{ports['statsd']}"
  CounterSum true
</Plugin>
<Plugin csv>
  DataDir "{folder}/collectd"
  StoreRates false
</Plugin>
""")
    return Program(need("collectd"), "-f", "-C", folder / "collectd.conf")


STATSD = "statsd@0.9.0"


def statsd_script() -> Path:
    """Of npm's statsd, installed once, beside the tests' Pythons."""
    npm = need("npm")
    folder = Path(os.environ.get("CMON_TEST_ENVS", ROOT / ".test-envs")) / STATSD
    problem = ""
    for _ in range(3):
        if folder.exists():
            return folder / "statsd" / "stats.js"
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
            done = subprocess.run(
                [npm, "install", "--prefix", fresh, "--no-audit", "--no-fund", "--ignore-scripts",
                 "--omit=optional", STATSD], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                universal_newlines=True, timeout=120)
            problem = done.stdout
            if done.returncode == 0:
                Path(fresh, "node_modules").rename(folder)      # whole or not at all
    pytest.fail(f"npm cannot install {STATSD}: {problem}")


def start_statsd(folder: Path, ports: dict[str, int]) -> Program:
    """It sums until queried: the first flush is in an hour."""
    (folder / "statsd.js").write_text(json.dumps({
        "address": "127.0.0.1", "port": ports["npm"], "mgmt_address": "127.0.0.1",
        "mgmt_port": ports["npm_control"], "flushInterval": 3_600_000, "backends": []}))
    return Program(need("node"), statsd_script(), folder / "statsd.js")


def ask_statsd(port: int, what: str) -> dict[str, float]:
    """What it holds: counters or gauges, by name."""
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        connection.sendall(f"{what}\n".encode())
        said = b""
        while not said.endswith(b"END\n\n"):
            piece = connection.recv(65536)
            assert piece, said
            said += piece
    return {name: float(value)
            for name, value in re.findall(r"'([^']+)': (-?[0-9.e+]+)", said.decode())}


def influx_ready(port: int) -> bool:
    return answers(port, "/ping")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("sinks")
    ports = {name: free_port() for name in (
        "influx", "influx_rpc", "carbon", "carbon_query", "udp", "tcp", "tls", "prometheus",
        "victoria", "victoria_graphite", "statsd", "npm", "npm_control")}
    servers: dict[str, Any] = {}
    starters = {"influx": start_influx, "carbon": start_carbon, "rsyslog": start_rsyslog,
                "prometheus": start_prometheus, "victoria": start_victoria,
                "collectd": start_collectd, "statsd": start_statsd}
    source = Source(2)
    page = source.page = Page()
    try:
        for name, starter in starters.items():
            servers[name] = starter(folder, ports)
        wait_until(lambda: influx_ready(ports["influx"]))
        wait_until(lambda: answers(ports["prometheus"], "/-/ready"))
        wait_until(lambda: answers(ports["victoria"], "/health"))
        get_json(ports["influx"], "/query", q="CREATE DATABASE cmon")

        def local(name: str) -> str:
            return f"127.0.0.1:{ports[name]}"
        config = write_config(folder, source, {
            "file": {"type": "file", "path": "samples.log"},
            "influx": {"type": "influxdb", "url": f"http://{local('influx')}", "database": "cmon"},
            "graphite": {"type": "graphite", "address": local("carbon")},
            "dotted": {"type": "graphite", "address": local("carbon"), "form": "dotted"},
            "statsd": {"type": "statsd", "address": local("statsd")},
            "npm": {"type": "statsd", "address": local("npm")},
            "udp": {"type": "syslog", "address": local("udp")},
            "tcp": {"type": "syslog", "address": local("tcp"), "transport": "tcp"},
            "tls": {"type": "syslog", "address": f"localhost:{ports['tls']}", "transport": "tls",
                    "ca": str(TLS / "ca.pem")},
            "prometheus": {"type": "remote_write", "url": f"http://{local('prometheus')}"},
            "victoria": {"type": "remote_write",
                         "url": f"http://{local('victoria')}/api/v1/write?extra_label=by=write"},
            "victoria_influx": {"type": "influxdb", "database": "d",
                                "url": f"http://{local('victoria')}?extra_label=by=influx"},
            "victoria_graphite": {"type": "graphite", "address": local("victoria_graphite")},
        }, interval=0.25)

        problems = [""]

        def reached() -> bool:
            check = Program.forwarder(config, "--check-config")
            status = check.wait()
            problems[0] = check.log
            return status == 0
        try:
            wait_until(reached)
        except AssertionError:
            raise AssertionError(problems[0]) from None

        def rounds(count: int) -> None:
            until = {number: calls + count for number, calls in page.calls.items()}
            wait_until(lambda: all(page.calls[number] >= calls
                                   for number, calls in until.items()))
        with Program.forwarder(config) as program:
            wait_until(lambda: len(page.calls) == 2)
            rounds(3)
            for name in ("influx", "victoria"):             # away for some rounds
                assert servers[name].stop() == 0
            rounds(3)
            wait_until(lambda: own(program, "sink_spool_samples", sink="influx") > 0)
            page.reset = max(page.calls.values())
            for name in ("influx", "victoria"):
                servers[name] = starters[name](folder, ports)
            rounds(3)
        page.calls[0] += 1000                               # while the forwarder is away
        with Program.forwarder(config) as program:
            rounds(3)
            page.stopped = True
            before = source.scrapes
            wait_until(lambda: source.scrapes > before + 4)
            del source.containers[1]
            wait_until(lambda: own(program, "targets") == 1)
            source.close()                                  # nothing more is scraped
            wait_until(lambda: own(program, "scrapes_in_flight") == 0)
            for name in json.loads(config.read_text())["sinks"]:
                drained(program, name)
                assert own(program, "sink_samples_refused_total", sink=name) == 0, program.log
                assert own(program, "sink_samples_dropped_total", sink=name) == 0
        rows = [json.loads(line) for line in (folder / "samples.log").read_text().splitlines()]
        yield World(rows, folder, servers, ports)
    finally:
        source.close()
        for server in servers.values():
            server.kill()


def same(found: dict[Key, dict[int, Any]], expected: dict[Key, dict[int, Any]]) -> None:
    """With a message that names what differs."""
    assert sorted(set(expected) - set(found))[:5] == []
    assert sorted(set(found) - set(expected))[:5] == []
    for key, values in expected.items():
        assert found[key] == values, key


def test_the_run_covered_all_cases(world: World) -> None:
    names = {row["name"] for row in world.rows}
    assert {"up", "scrape_duration_seconds", "scrape_samples_scraped", "hits_total", "nan",
            "odd"} <= names
    values = [row["value"] for row in world.rows if row["name"] == "reset_total"
              and row["labels"]["alias"] == "web0"]
    assert any(now < before for before, now in zip(values, values[1:]))
    assert {row["labels"]["instance"] for row in world.rows} == {uuid_of(0), uuid_of(1)}


def test_influxdb_has_every_value_exactly(world: World) -> None:
    expected = world.expected(lambda text: _INFLUX_INVALID.sub("_", text))
    for (name, labels), values in expected.items():
        if name == "huge_total":        # beyond 2^63: version 1 has floating point for it
            expected[name, labels] = {at: float(value) for at, value in values.items()}
    found: dict[Key, dict[int, Any]] = {}
    for name in sorted({name for name, _ in expected}):
        answer = get_json(world.ports["influx"], "/query", db="cmon", epoch="ns",
                          q=f'SELECT value FROM "{name}" GROUP BY *')
        for series in answer["results"][0].get("series", []):
            labels = {label: text for label, text in series["tags"].items() if text}
            found[key_of(name, labels)] = {
                at // 10 ** 6: float(value) if name == "huge_total" else value
                for at, value in series["values"]}
    same(found, expected)
    big = next(values for (name, _), values in found.items() if name == "big_total")
    assert all(isinstance(value, int) for value in big.values())


READ_WHISPER = """
import json, os, sys, whisper
from carbon.util import TaggedSeries
for line in sys.stdin:
    metric = json.loads(line)
    for path in (TaggedSeries.encode(metric, os.sep), TaggedSeries.encode(metric, os.sep, True)):
        path = os.path.join(sys.argv[1], path + ".wsp")
        if os.path.exists(path):
            (start, end, step), values = whisper.fetch(path, 0)
            print(json.dumps({start + step * place: value for place, value in enumerate(values)
                              if value is not None}))
            break
    else:
        print("null")
"""


def by_second(values: dict[int, Any]) -> dict[int, set[float]]:
    found: dict[int, set[float]] = {}
    for at, value in values.items():
        found.setdefault(at // 1000, set()).add(float(value))
    return found


def test_graphite_has_a_value_of_each_second(world: World) -> None:
    def tag(text: str) -> str:
        return _GRAPHITE_INVALID.sub("_", text)
    wanted: dict[str, dict[int, set[float]]] = {}
    for (name, labels), values in world.expected().items():
        tags = "".join(f";{label}={tag(text)}" for label, text in sorted(labels))
        wanted[name + tags] = by_second(values)
        alias, _, *rest = [text for _, text in sorted(
            labels, key=lambda pair: (pair[0] not in ("alias", "instance"), pair[0]))]
        path = ".".join(_DOTTED_INVALID.sub("_", part) for part in (alias, name, *rest))
        for at, those in by_second(values).items():     # `a b` and `a_b` are one word there
            wanted.setdefault(f"cmon.{path}", {}).setdefault(at, set()).update(those)

    def missing() -> list[Any]:
        done = subprocess.run(
            ["/usr/bin/python3", "-c", READ_WHISPER, str(world.folder / "carbon" / "whisper")],
            stdout=subprocess.PIPE, check=True,
            input="".join(json.dumps(name) + "\n" for name in wanted).encode())
        found = []
        for (name, values), line in zip(wanted.items(), done.stdout.splitlines()):
            kept = {int(at): value for at, value in (json.loads(line) or {}).items()}
            found += [(name, at) for at in {*values, *kept}
                      if kept.get(at) not in values.get(at, ())]
        return found
    wait_until(lambda: not missing(), "written to disk")


def test_statsd_sums_equal_the_increase_at_the_source(world: World) -> None:
    def total(name: str) -> int:
        files = (world.folder / "collectd" / "here" / "statsd").glob(f"count-cmon.{name}-20*")
        return sum(int(float(line.split(",")[1])) for path in files
                   for line in path.read_text().splitlines() if not line.startswith("epoch"))

    for alias in ("web0", "web1"):
        for name, path in (("hits_total", "hits_total.net0"), ("reset_total", "reset_total"),
                           ("big_total", "big_total"), ("huge_total", "huge_total")):
            wait_until(lambda: total(f"{alias}.{path}") == world.grown(alias, name),
                       f"{alias} {name}: {world.grown(alias, name)}")
    assert world.grown("web0", "hits_total") > 7000

    def gauge(name: str) -> float:
        files = (world.folder / "collectd" / "here" / "statsd").glob(f"gauge-cmon.{name}-20*")
        return float([path.read_text().splitlines()[-1] for path in files][0].split(",")[1])
    assert gauge("web0.below") == world.values("web0", "below")[-1] < -1000


def test_the_statsd_of_npm_counts_the_same(world: World) -> None:
    port = world.ports["npm_control"]
    for alias in ("web0", "web1"):
        wanted = {f"cmon.{alias}.{path}": world.grown(alias, name) for name, path in (
            ("hits_total", "hits_total.net0"), ("reset_total", "reset_total"),
            ("big_total", "big_total"), ("huge_total", "huge_total"))}
        wait_until(lambda: wanted.items() <= ask_statsd(port, "counters").items(), str(wanted))
    assert ask_statsd(port, "counters")["statsd.bad_lines_seen"] == 0
    gauges = ask_statsd(port, "gauges")
    assert gauges["cmon.web0.below"] == world.values("web0", "below")[-1] < -1000
    assert gauges["cmon.web0.ratio"] == world.values("web0", "ratio")[-1]


@pytest.mark.parametrize("transport", ["udp", "tcp", "tls"])
def test_rsyslog_reads_every_message(world: World, transport: str) -> None:
    def messages() -> list[Row]:
        path = world.folder / f"{transport}.log"
        return [json.loads(line) for line in path.read_bytes().split(b"\n") if line] \
            if path.exists() else []
    wait_until(lambda: len(messages()) >= len(world.rows))
    found = messages()
    assert len(found) == len(world.rows)
    for message in found:
        assert (message["app"], message["msgid"], message["priority"]) == ("cmon", "metric", "134")
    texts = sorted((round(row["timestamp"], 3), row["name"], str(row["value"]) if isinstance(
        row["value"], str) else json.dumps(row["value"]), sorted(row["labels"].items()))
        for row in world.rows)
    read = []
    for message in found:
        data = read_syslog(message["raw"])
        assert message["data"] and message["host"] == data["alias"]
        name, value = data.pop("name"), data.pop("value")
        read.append((stamp(message["time"]), name, value, sorted(data.items())))
    assert sorted(read) == texts


def stamp(text: str) -> float:
    match = re.fullmatch(r"(\S+T\S+?)(\.\d+)?(Z|\+00:00)", text)
    assert match, text
    seconds = calendar.timegm(time.strptime(match.group(1), "%Y-%m-%dT%H:%M:%S"))
    return round(seconds + float(match.group(2) or 0), 3)


def test_prometheus_has_every_sample_by_remote_write(world: World) -> None:
    answer = get_json(world.ports["prometheus"], "/api/v1/query", query='{__name__=~".+"}[1h]')
    found = {}
    for series in answer["data"]["result"]:
        labels = series["metric"]
        name = labels.pop("__name__")
        found[key_of(name, labels)] = {round(at * 1000): float(value)
                                       for at, value in series["values"]}
    expected = {key: {at: float(value) for at, value in values.items()}
                for key, values in world.expected(finite=False).items()}
    for one in (found, expected):
        for (name, _), values in one.items():
            if name == "nan":           # which equals nothing
                assert all(math.isnan(value) for value in values.values())
                values.update(dict.fromkeys(values, 0.0))
    same(found, expected)


def test_a_container_that_is_gone_ends_at_once_in_prometheus(world: World) -> None:
    answer = get_json(world.ports["prometheus"], "/api/v1/query", query="up")
    assert [one["metric"]["alias"] for one in answer["data"]["result"]] == ["web0"]


def victoria(world: World) -> list[tuple[dict[str, str], dict[int, float]]]:
    connection = http.client.HTTPConnection("127.0.0.1", world.ports["victoria"], timeout=60)
    connection.request("GET", "/internal/force_flush")
    connection.getresponse().read()
    connection.request("GET", "/api/v1/export?" + urllib.parse.urlencode(
        {"match[]": '{__name__!~"inf|nan|inf_value"}', "reduce_mem_usage": "1"}))
    lines = connection.getresponse().read().splitlines()
    connection.close()
    found = []
    for line in lines:
        one = json.loads(line)
        found.append((one["metric"], {at: value for at, value in zip(
            one["timestamps"], one["values"]) if value is not None and value == value}))
    return found


def close_to(found: dict[int, float], values: dict[int, Any]) -> bool:
    """VictoriaMetrics keeps about 15 digits."""
    return set(found) == set(values) and all(
        math.isclose(found[at], values[at], rel_tol=1e-14) for at in values)


@pytest.mark.parametrize("by", ["write", "influx", ""])
def test_victoriametrics_accepts_three_formats(world: World, by: str) -> None:
    found: dict[Key, dict[int, float]] = {}
    for labels, values in victoria(world):
        labels = dict(labels)
        if labels.pop("by", "") == by:
            name = labels.pop("__name__")
            labels.pop("db", "")
            found.setdefault(key_of(name[:-6] if by == "influx" else name, labels), {}).update(
                values)         # a series comes in several lines
    change = {"write": str, "influx": lambda text: _INFLUX_INVALID.sub("_", text),
              "": lambda text: _GRAPHITE_INVALID.sub("_", text)}[by]
    expected = world.expected(change)
    assert set(found) == set(expected)
    for key, values in expected.items():
        if by:
            assert close_to(found[key], values), (key, found[key].items() ^ values.items())
        else:                           # whole seconds; of one second it keeps one or more
            assert {at // 1000 for at in found[key]} == {at // 1000 for at in values}


def test_stale_markers_are_those_of_prometheus() -> None:
    target = Target("i", "a", "/", (("alias", "a"), ("instance", "i")))
    record, = remote_write_records(SinkSettings(type="remote_write"),
                                   Scrape(target, 1, (), gone=[Series("m", ())]))
    assert read_time_series(record) == 'm{alias="a",instance="i"} StaleNaN 1'


