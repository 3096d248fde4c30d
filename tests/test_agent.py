# SPDX-License-Identifier: MPL-2.0
"""The agent as a program: routes, command line, captures and replays."""
from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Callable

import pytest
from nodes import (
    LB01, SPARK01, STOPPED, WEB01, Clock, Desk, Machine, Vminfod, collectors, down, steady,
    value, zfs_without)
from support import (
    EXAMPLES, NODE, ROOT, Connection, Kernel, Program, http_get, node, samples, wait_until)

import cmon_agent as agent

RUNNING = [vm["uuid"] for vm in node()["frames"][0]["vms"] if vm["state"] == "running"]


@pytest.fixture(scope="module")
def replay() -> Iterator[Program]:
    """An agent that replays the recorded node."""
    with Program.agent("--replay", NODE) as program:
        yield program


def opts(content: Any) -> dict[str, str]:
    """The proxy's header."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return {"x-joyent-cmon-opts": base64.b64encode(raw).decode()}


# --- routes ---------------------------------------------------------------------------------------

UNKNOWN = "11111111-2222-4333-8444-555555555555"
MISSING = f"zone {UNKNOWN} is not running on this compute node; / lists the running zones\n"
ROUTES = [
    ("GET", f"/v1/{WEB01}/metrics", {}, 200, "# HELP cpucap_"),
    ("GET", f"/vms/{WEB01}/metrics", {}, 200, "# HELP cpucap_"),
    ("GET", "/v1/gz/metrics", {}, 200, "# HELP "),
    ("GET", "/v1/zones/metrics", {}, 200, "# HELP "),
    ("GET", f"/v1/{WEB01}/metrics", opts({"isCoreZone": False}), 200, "# HELP "),
    ("GET", f"/v1/{WEB01}/metrics", opts({"isCoreZone": True}), 200, "# HELP "),
    ("GET", f"/v1/{WEB01}/metrics", opts({"isCoreZone": True, "more": 1}), 200, "# HELP "),
    ("POST", "/v1/refresh", {}, 200, ""),
    ("GET", "/metrics", {}, 200, "# HELP "),
    ("GET", "/v1/metadata", {}, 200, "["),
    ("GET", "/-/healthy", {}, 200, "Container Monitor agent is healthy.\n"),
    ("GET", "/-/ready", {}, 200, "Container Monitor agent is ready.\n"),
    ("GET", "/", {}, 200, "<!DOCTYPE html>"),
    ("GET", f"/v1/{UNKNOWN}/metrics", {}, 404, MISSING),
    ("GET", f"/vms/{UNKNOWN}/metrics", {}, 404, MISSING),
    ("GET", f"/v1/{STOPPED}/metrics", {}, 404, f"zone {STOPPED} is not running"),
    ("GET", f"/v1/{WEB01.upper()}/metrics", {}, 404, "not a zone's UUID"),
    ("GET", "/v1/global/metrics", {}, 404, "not a zone's UUID"),
    ("GET", "/v1/../metrics", {}, 404, ""),
    ("GET", "/vms/gz/metrics", {}, 404, "not a zone's UUID"),
    ("GET", "/nothing", {}, 404, ""),
    ("GET", f"/v1/{WEB01}", {}, 404, ""),
    ("GET", f"/v1/{WEB01}/metrics/", {}, 404, ""),
    ("GET", f"/v1/{WEB01}/metrics", {"x-joyent-cmon-opts": "!!!"}, 400, "x-joyent-cmon-opts must"),
    ("GET", f"/v1/{WEB01}/metrics", opts(b"{"), 400, "x-joyent-cmon-opts must"),
    ("GET", f"/v1/{WEB01}/metrics", opts([]), 400, "x-joyent-cmon-opts must"),
    ("GET", f"/v1/{WEB01}/metrics", opts({}), 400, "x-joyent-cmon-opts must"),
    ("GET", f"/v1/{WEB01}/metrics", opts({"isCoreZone": 1}), 400, "x-joyent-cmon-opts must"),
    ("GET", f"/v1/{WEB01}/metrics", opts({"isCoreZone": "true"}), 400, "x-joyent-cmon-opts must"),
    ("GET", f"/v1/{WEB01}/metrics", opts({"isCoreZone": None}), 400, "x-joyent-cmon-opts must"),
    ("GET", f"/v1/{WEB01}/metrics", opts(b"[" * 5000), 400, "x-joyent-cmon-opts must"),
    ("GET", f"/v1/{WEB01}/metrics", opts(b"\xff\xfe"), 400, "x-joyent-cmon-opts must"),
    ("GET", f"/v1/{WEB01}/metrics", {"x-joyent-cmon-opts": ""}, 200, "# HELP "),
    ("GET", f"/v1/{WEB01}/metrics", {"x-joyent-cmon-opts": opts({"isCoreZone": True})[
        "x-joyent-cmon-opts"].rstrip("=")}, 200, "# HELP "),
    ("GET", "/v1/gz/metrics", {"x-joyent-cmon-opts": "?"}, 400, "x-joyent-cmon-opts must"),
    ("GET", f"/v1/{WEB01}/metrics", {"X-Prometheus-Scrape-Timeout-Seconds": "soon"}, 400,
     "X-Prometheus-Scrape-Timeout-Seconds is not"),
    ("GET", f"/v1/{WEB01}/metrics", {"X-Prometheus-Scrape-Timeout-Seconds": "-1"}, 400,
     "X-Prometheus-Scrape-Timeout-Seconds is not"),
    ("GET", "/v1/gz/metrics", {"X-Prometheus-Scrape-Timeout-Seconds": "nan"}, 400,
     "X-Prometheus-Scrape-Timeout-Seconds is not"),
]


@pytest.mark.parametrize("method, path, headers, status, text", ROUTES,
                         ids=[f"{row[0]} {row[1].replace(WEB01, 'ZONE')} {row[3]} {number}"
                              for number, row in enumerate(ROUTES)])
def test_requests_get_the_documented_answers(replay: Program, method: str, path: str, headers: Any,
                                             status: int, text: str) -> None:
    answer = http_get(replay.address, path, headers, method)
    assert (answer.status, answer.text[:len(text)]) == (status, text)
    if status == 200 and "/metrics" in path:
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    if status >= 400:
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.text.count("\n") == 1, "a refusal is one line"


ALLOW = {path: "GET, HEAD" for path in (
    f"/v1/{WEB01}/metrics", "/v1/gz/metrics", "/v1/zones/metrics", "/metrics", "/v1/metadata",
    "/-/healthy", "/-/ready", "/")}
ALLOW["/v1/refresh"] = "POST"


@pytest.mark.parametrize("path", list(ALLOW))
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_an_unsupported_method_is_refused_with_the_allowed_ones(replay: Program, path: str,
                                                                method: str) -> None:
    if method in ALLOW[path]:
        return
    answer = http_get(replay.address, path, method=method)
    assert answer.status == 405 and answer.headers["allow"] == ALLOW[path]
    assert answer.text.count("\n") == 1


@pytest.mark.parametrize("path", [path for path in ALLOW if path != "/v1/refresh"])
def test_head_is_get_without_the_body(replay: Program, path: str) -> None:
    with Connection(replay.address) as connection:
        head = connection.request(path, method="HEAD")
        get = connection.request(path)
        assert connection.request("/-/healthy").status == 200, "nothing was left on the way"
    assert head.status == get.status == 200 and head.body == b"" and get.body
    assert head.headers["content-type"] == get.headers["content-type"]
    assert int(head.headers["content-length"]) > 0


def test_pages_are_compressed_for_clients_that_accept_gzip(replay: Program) -> None:
    path = f"/v1/{WEB01}/metrics"
    packed = http_get(replay.address, path, {"Accept-Encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < len(packed.body) / 3
    assert steady(packed.text) == steady(http_get(replay.address, path).text)
    assert "content-encoding" not in http_get(
        replay.address, path, {"Accept-Encoding": "gzip;q=0, identity"}).headers


def test_the_old_path_is_the_same_page(replay: Program) -> None:
    assert steady(http_get(replay.address, f"/vms/{LB01}/metrics").text) \
        == steady(http_get(replay.address, f"/v1/{LB01}/metrics").text)


# --- pages ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pages(replay: Program) -> dict[str, str]:
    """All pages that the agent has."""
    found = {zone: http_get(replay.address, f"/v1/{zone}/metrics").text for zone in RUNNING}
    found["gz"] = http_get(replay.address, "/v1/gz/metrics").text
    found["own"] = http_get(replay.address, "/metrics").text
    found["all"] = http_get(replay.address, "/v1/zones/metrics").text
    return found


def test_pages_parse_strictly_and_families_are_contiguous(pages: dict[str, str]) -> None:
    for name, page in pages.items():
        families = agent.parse(page)            # refuses what comes twice or apart
        assert len({family.name for family in families}) == len(families), name
        heads = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE ")]
        assert len(heads) == len(set(heads)) == len(families), name
        assert page.endswith("\n") and "\r" not in page
        assert all(family.help for family in families), name


def test_promtool_reads_every_page(pages: dict[str, str]) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    for name, page in pages.items():
        done = subprocess.run(["promtool", "check", "metrics"], input=page.encode(),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        # 3: it dislikes some names, which are the original's; 1: it cannot read the page
        assert done.returncode in (0, 3), (name, done.stdout.decode()[-2000:])


def test_all_collectors_of_a_healthy_node_are_up(pages: dict[str, str]) -> None:
    for name, page in pages.items():
        if name != "own":
            assert not re.search(r"^cmon_collector_up.* 0$", page, re.M), name
            assert not down(page)


def test_every_collector_has_its_meta_metrics(pages: dict[str, str]) -> None:
    for name in (WEB01, "gz"):
        page = pages[name]
        ups, ages = collectors(page), collectors(page, "cmon_sample_age_seconds")
        assert list(ups) == list(ages) and "time" in ups
        for collector in ups:
            for form in ("available_boolean", "cached_boolean", "timer_seconds"):
                assert f"\n# TYPE {collector}_metrics_{form} gauge\n" in page
    for one in ("cpucap", "link", "memcap", "tcp", "triton_core", "zfs", "zone_misc", "zone_vfs"):
        assert one in collectors(pages[WEB01])
    for one in ("arcstats", "cpu_info", "cpu_util", "ntp", "zpool"):
        assert one in collectors(pages["gz"])


def test_the_page_of_all_zones_joins_their_pages_with_a_zonename_label(pages: dict[str, str]
                                                                      ) -> None:
    together: dict[str, str] = {}
    for line in pages["all"].splitlines():
        if not line.startswith("#"):
            series, _, number = line.rpartition(" ")
            together[series] = number
    expected: dict[str, str] = {}
    for zone in RUNNING:
        for line in pages[zone].splitlines():
            if not line.startswith("#"):
                series, _, number = line.rpartition(" ")
                name, brace, labels = series.partition("{")
                expected[f'{name}{{zonename="{zone}"' + ("," + labels if brace else "}")] = number
    assert set(together) == set(expected)
    changing = re.compile("time_of_day|_age_seconds|_timer_seconds|_cached_boolean|boot_time")
    different = {series for series in expected if together[series] != expected[series]
                 and not changing.match(series.partition("{")[0]) and not
                 changing.search(series.partition("{")[0])}
    # the recording goes on every 15 s, so between the pages a frame may have begun
    assert len(different) == 0 or not different - {
        series for series in expected if float(together[series]) >= float(expected[series])}


def test_metadata_describes_exactly_the_metrics_on_the_pages(replay: Program, pages: dict[str, str]
                                                            ) -> None:
    rows = json.loads(http_get(replay.address, "/v1/metadata").text)
    told = {(row["scope"], row["name"]): row for row in rows}
    assert len(told) == len(rows)
    shown: dict[tuple[str, str], agent.Family] = {}
    for zone in RUNNING:
        shown.update({("zone", family.name): family for family in agent.parse(pages[zone])})
    shown.update({("node", family.name): family for family in agent.parse(pages["gz"])})
    assert set(shown) <= set(told), set(shown) - set(told)
    for key, family in shown.items():
        assert told[key]["type"] == family.kind, key
    # what is told and not shown must be what this node has no values for
    absent = {name for scope, name in set(told) - set(shown)}
    quiet = re.compile(r"(swap_|textfile_|ntp_|arcstats_|mem_locked|cpucap_|app_)")
    assert not {name for name in absent if not quiet.match(name)}, sorted(absent)


def test_the_node_page_ends_with_the_metrics_of_the_original_dashboard(replay: Program) -> None:
    """collector_time_seconds and four more, all of service="cmon-agent", on this page alone."""
    def said(series: str) -> float:
        return value(http_get(replay.address, "/v1/gz/metrics").text, series)
    asked = said('cache_gets_total{service="cmon-agent"}')
    http_get(replay.address, f"/v1/{WEB01}/metrics")
    http_get(replay.address, f"/v1/{WEB01}/metrics")
    # a page that has just been made goes out again for a moment
    wait_until(lambda: said('cache_gets_total{service="cmon-agent"}') >= asked + 2)
    page = http_get(replay.address, "/v1/gz/metrics").text
    assert value(page, 'cache_get_hits_total{service="cmon-agent"}') >= 1
    assert value(page, 'cached_items{service="cmon-agent"}') >= 12
    for name, more in (("collector_time_seconds", ',collector="kstats"'),
                       ("collector_time_total_seconds", "")):
        counts = [float(count) for count in re.findall(
            rf'^{name}{{service="cmon-agent"{more},le="[^"]+"}} (\S+)$', page, re.M)]
        assert len(counts) == 6 and counts == sorted(counts) and counts[-1] > 0
        assert value(page, f'{name}_count{{service="cmon-agent"{more}}}') == counts[-1]
    assert "cached_items" not in http_get(replay.address, f"/v1/{WEB01}/metrics").text


def test_the_agents_own_metrics_are_not_on_pages_of_zones(pages: dict[str, str]) -> None:
    for zone in RUNNING:
        assert not re.search("^(process_|cmon_agent_)", pages[zone], re.M)
    assert "process_cpu_seconds_total" in pages["own"]
    assert re.search(r'^cmon_agent_build_info{version="[0-9.]+".*} 1$', pages["own"], re.M)


# --- the page for people --------------------------------------------------------------------------

class Elements(HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_landing_page_lists_zones_and_needs_nothing_from_elsewhere(replay: Program) -> None:
    answer = http_get(replay.address, "/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = Elements(answer.text)
    links = [attributes["href"] or "" for tag, attributes in page.tags if tag == "a"]
    assert {f"/v1/{zone}/metrics" for zone in RUNNING} <= set(links)
    assert all(link.startswith("/") and not link.startswith("//") for link in links)
    for link in links:
        assert http_get(replay.address, link).status == 200, link
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "link", "object", "form"}
    assert not [attributes for _, attributes in page.tags
                if any(name.startswith("on") or name == "src" for name in attributes)]
    for alias in ("web01", "db01", "spark01", "jump"):
        assert alias in page.text
    assert "old-web" not in page.text and "cn07" in page.text


def test_aliases_are_escaped_in_html(tmp_path: Path) -> None:
    content = node()
    for frame in content["frames"]:
        for vm in frame["vms"]:
            vm["alias"] = "<script>alert('&')</script>"
            vm["brand"] = "<b>"
    capture = tmp_path / "capture.json"
    capture.write_text(json.dumps(content))
    with Program.agent("--replay", capture) as program:
        page = http_get(program.address, "/").text
        assert "<script" not in page and "<b>" not in page
        assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in page


# --- captures and replays -------------------------------------------------------------------------

def test_a_capture_replays_as_the_same_pages(kernel: Callable[..., Kernel], tmp_path: Path,
                                             recorded_node: dict[str, Any]) -> None:
    """C library, capture of it, and the recorded node that both come from."""
    frame = recorded_node["frames"][0]
    sysinfo = tmp_path / "sysinfo.json"
    sysinfo.write_text(json.dumps(recorded_node["host"]))
    one = Machine(tmp_path / "m", kernel(frame["kstats"]), frame, sysinfo_file=str(sysinfo))
    capture = tmp_path / "capture.json"
    done = subprocess.run([sys.executable, "-I", ROOT / "cmon_agent.py", "capture", capture,
                           "--config", one.config, "--frames", "1"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 frames" in done.stdout and "confidential" in done.stdout
    content = json.loads(capture.read_text())
    assert content["format"] == 1 and set(content) == {"format", "host", "frames"}
    assert content["host"]["Hostname"] == "cn07"
    assert not {"Manufacturer", "Boot Parameters"} & set(content["host"])
    # the recorded one without what the capture has no source for: vminfod did not run
    bare = {**recorded_node, "frames": [{**frame, "vms": []}]}
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    one.start()
    with one.agent, Program.agent("--replay", capture) as again, \
            Program.agent("--replay", tmp_path / "bare.json") as recorded:
        for path in (f"/v1/{WEB01}/metrics", f"/v1/{LB01}/metrics", f"/v1/{SPARK01}/metrics",
                     "/v1/gz/metrics"):
            def settled(program: Program, path: str = path) -> list[str]:
                """After zoneadm has reported the owner of each guest."""
                text = wait_until(lambda: (lambda page: page if path.find(SPARK01) < 0 or
                                           "vcpu_seconds_total" in page else "")(
                    (http_get(program.address, "/v1/refresh", method="POST"),
                     http_get(program.address, path).text)[1]))
                return [line for line in steady(text) if not line.startswith("swap_")]
            pages = [settled(program) for program in (one.agent, again, recorded)]
            assert len(pages[0]) > 100
            assert pages[1] == pages[2], path
            assert pages[0] == pages[1], path


def test_pages_read_through_libkstat_equal_the_goldens(kernel: Callable[..., Kernel],
                                                       tmp_path: Path, recorded_node: dict[str, Any]
                                                      ) -> None:
    frame = recorded_node["frames"][0]
    sysinfo = tmp_path / "sysinfo.json"
    sysinfo.write_text(json.dumps(recorded_node["host"]))
    info = Vminfod()
    info.behave = info.ready(frame["vms"])
    one = Machine(tmp_path / "m", kernel(frame["kstats"]), frame, sysinfo_file=str(sysinfo),
                  vminfod=info.url).start()
    with one.agent:
        wait_until(lambda: one.own("cmon_agent_vminfod_up") == 1)
        wait_until(lambda: (one.refresh(), "vcpu_seconds_total" in one.zone(SPARK01))[1])
        for target, golden in ((WEB01, "node-web01"), (LB01, "node-lb01-two-nics"),
                               (SPARK01, "node-spark01-bhyve"), ("gz", "node-gz")):
            text = (ROOT / "tests" / "golden" / f"{golden}.prom").read_text()
            page = one.get(f"/v1/{target}/metrics").text
            assert steady(page) == steady(text), target
            assert [line for line in page.splitlines() if line.startswith("boot_time_seconds")] \
                == [line for line in text.splitlines() if line.startswith("boot_time_seconds")]
    info.close()


def test_the_page_of_all_zones_has_exactly_the_samples_of_their_pages(kernel: Callable[..., Kernel],
                                                                      tmp_path: Path) -> None:
    """On a kernel with constant values."""
    one = Machine(tmp_path / "m", kernel(node()["frames"][0]["kstats"])).start()
    with one.agent:
        expected = set()
        for zone in RUNNING:
            for line in steady(one.zone(zone)):
                if not line.startswith("#"):
                    series, _, number = line.rpartition(" ")
                    name, brace, labels = series.partition("{")
                    expected.add(f'{name}{{zonename="{zone}"' + ("," + labels if brace else "}")
                                 + " " + number)
        answer = one.get("/v1/zones/metrics")
        assert {line for line in steady(answer.text) if not line.startswith("#")} == expected
        assert len(expected) > 100 * len(RUNNING)
        one.kernel.faults(("block", "memory_cap:7:*"), ("block", "tcp:5:*"))
        one.refresh()
        answer = one.get("/v1/zones/metrics", timeout=4.0)
        assert answer.status == 200, "what is late does not keep the rest"
        assert 'cmon_collector_up{zonename="%s",collector="memcap"} 0' % LB01 in answer.text
        assert 'cmon_collector_up{zonename="%s",collector="memcap"} 1' % WEB01 in answer.text
        agent.parse(answer.text)


def test_a_capture_of_a_replay_is_that_replay() -> None:
    """What is kept is what collectors read; nothing is added by capturing."""
    recording = agent.RecordedHost(str(NODE), agent.Settings())
    frame = agent.capture_frame(recording, agent.Settings())
    kept = {(k["module"], k["instance"], k["name"], k["crtime"]): k["data"]
            for k in frame["kstats"]}
    for kstat in node()["frames"][0]["kstats"]:
        module = "disk" if kstat["class"] == "disk" else kstat["module"]
        key = (module, kstat["instance"], kstat["name"], kstat["crtime"])
        alike = (kstat["module"], *key[1:])
        if key in kept or alike in kept:
            data = kept.get(key) or kept[alike]
            same = {name for name in kstat["data"] if name != "boot_time"}
            assert {name: data[name] for name in same} == {
                name: kstat["data"][name] for name in same}


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_counters_keep_growing_when_a_replay_starts_over(tmp_path: Path, frames: int) -> None:
    content = node()
    content["frames"] = content["frames"][:frames]
    path = tmp_path / "capture.json"
    path.write_text(json.dumps(content))
    clock = Clock()
    recording = agent.Recording(str(path), clock)
    before: dict[Any, Any] = {}
    grown: dict[Any, list[int]] = {}
    for _ in range(4 * frames + 1):
        loop, place = recording.place()
        for ref in [ref for refs in recording.frames[place].chain.zones.values() for ref in refs]:
            kstat = recording.kstat(ref, place, loop)
            for member, number in kstat.data.items():
                if (ref.module, member) in agent.COUNTER_MEMBERS and isinstance(number, int):
                    key = (ref.module, ref.instance, ref.name, member)
                    assert number >= before.get(key, 0), key
                    grown.setdefault(key, []).append(number - before.get(key, number))
                    before[key] = number
        clock.at += 15.0
    if frames > 1:
        busy = [steps[1:] for key, steps in grown.items() if key[3] in ("nsec_user", "inSegs")
                and sum(steps) > 1000]
        assert len(busy) > 5
        for steps in busy:              # at the seam they grow about as much as elsewhere
            assert max(steps) < 20 * (sum(steps) / len(steps)), steps


def test_a_load_changes_gauges_and_counters_every_second(tmp_path: Path) -> None:
    content = node()
    content["load"] = json.loads((EXAMPLES / "load.json").read_text())
    path = tmp_path / "capture.json"
    path.write_text(json.dumps(content))
    clock = Clock()
    recording = agent.Recording(str(path), clock)
    keys = {(row["module"], row["instance"], row["name"], row["member"]): row["points"]
            for row in content["load"]}
    before: dict[Any, Any] = {}
    steady = set()
    began = clock.at
    for second in [*range(0, 100), 2699, 2701, 3599, 3600, 3601, 7200]:
        clock.at = began + second
        loop, place = recording.place()
        for ref in [kstat.ref for kstat in recording.frames[place].kstats]:
            if not any(key[:3] == (ref.module, ref.instance, ref.name) for key in keys):
                continue
            for member, number in recording.kstat(ref, place, loop).data.items():
                key = (ref.module, ref.instance, ref.name, member)
                if key not in keys:
                    continue
                if key[::3] in agent.COUNTER_MEMBERS:
                    assert number >= before.get(key, 0), (second, key)
                    if 0 < second < 100 and number == before[key]:
                        steady.add(key)
                elif second % 3600 == 0:
                    assert number == keys[key][0][1], key
                before[key] = number
    assert {key for key in steady if key[3] == "nsec_user"} == set()
    assert set(before) == set(keys), "the load is of kstats that the node has"


@pytest.mark.parametrize("points", [[], [[0, 1]], [[1, 1], [2, 1]], [[0, 1], [0, 2]], [["x", 1]],
                                    [[0, 1], ["inf", 1]], [[0, 1], [1, "nan"]]])
def test_an_invalid_load_is_refused(points: Any, tmp_path: Path) -> None:
    path = tmp_path / "capture.json"
    path.write_text(json.dumps({**node(), "load": [
        {"module": "caps", "instance": 1, "name": "x", "member": "usage", "points": points}]}))
    with pytest.raises(agent.ConfigError, match=r"load\[0\]: .*writes captures"):
        agent.Recording(str(path), Clock())


def test_a_replay_is_moved_to_the_current_time(replay: Program) -> None:
    found = samples(http_get(replay.address, f"/v1/{WEB01}/metrics").text)
    import time
    assert abs(found["time_of_day"] / 1000 - time.time()) < 60
    assert found["boot_time_seconds"] < time.time()


def frame_with(**changed: Any) -> str:
    """A capture of one frame."""
    frame = {"at": 1, "kstats": [], "commands": {}, "vms": [], **changed}
    return json.dumps({"format": 1, "host": {}, "frames": [frame]})


def kstat_with(**changed: Any) -> str:
    """A capture of two kstats, the second one with this."""
    good = {"module": "m", "instance": 0, "name": "x", "class": "", "type": 1, "crtime": 0,
            "snaptime": 0, "data": {}}
    return frame_with(kstats=[good, {**good, **changed}])


def load_with(*points: Any) -> str:
    """A capture with a load."""
    row = {"module": "m", "instance": 0, "name": "x", "member": "y", "points": points}
    return json.dumps({**json.loads(frame_with()), "load": [row]})


WRONG = "a value is not what a capture has there"
BAD_CAPTURES = {
    "": "not JSON", "[]": WRONG, "{}": "'format' is missing", '{"format": 1}': "'host' is missing",
    '{"format": 2, "host": {}, "frames": []}': "unknown format 2: only 1",
    '{"format": 1, "host": {}, "frames": []}': "there are no frames",
    '{"format": 1, "host": {}, "frames": [7]}': f"frames[0]: {WRONG}",
    frame_with(at="x"): f"frames[0]: {WRONG}",
    frame_with(at="nan"): "frames[0]: the time nan is not after",
    frame_with().replace('"at": 1', '"at": 1e400'): "frames[0]: the time inf is not after",
    frame_with(vms=7): f"frames[0]: {WRONG}",
    frame_with(commands={"zfs list": {"status": 0}}):
        "frames[0].commands['zfs list']: 'stdout' is missing",
    frame_with(kstats=[{}]): "frames[0].kstats[0]: 'module' is missing",
    kstat_with(instance="x"): f"frames[0].kstats[1]: {WRONG}",
    kstat_with(data=[1]): f"frames[0].kstats[1]: {WRONG}",
    kstat_with(data=["abc"]): f"frames[0].kstats[1]: {WRONG}",
    kstat_with(instance=7).replace("7", "1e400"): f"frames[0].kstats[1]: {WRONG}",
    load_with(): f"load[0]: {WRONG}", load_with([0], [1, 2]): f"load[0]: {WRONG}",
    load_with([0, 1], [0, 2]): "load[0]: the times of its points do not ascend",
    '{"format": 1, "host": {}, "frames": [{"at": 2, "kstats": [], "commands": {}, "vms": []}, '
    '{"at": 1, "kstats": [], "commands": {}, "vms": []}]}':
        "frames[1]: the time 1.0 is not after",
}


@pytest.mark.parametrize("content", list(BAD_CAPTURES))
def test_a_bad_capture_prevents_the_start_with_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "capture.json"
    path.write_text(content)
    done = run("--replay", path, "--listen", "127.0.0.1:0")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"cmon_agent: {path}: {BAD_CAPTURES[content]}")
    assert done.stderr.count("\n") == 1 and (
        BAD_CAPTURES[content] == "not JSON" or "; `cmon_agent.py capture FILE` " in done.stderr)


def test_a_capture_of_a_node_without_running_zones_is_served(tmp_path: Path) -> None:
    path = tmp_path / "capture.json"
    path.write_text('{"format": 1, "host": 7, "frames": [{"at": 1, "kstats": [], "commands": {}, '
                    '"vms": []}]}')
    with Program.agent("--replay", path) as program:
        assert http_get(program.address, "/v1/gz/metrics").status in (200, 503)
        assert http_get(program.address, f"/v1/{WEB01}/metrics").status == 404
        assert http_get(program.address, "/v1/zones/metrics").text == ""
        assert http_get(program.address, "/").status == 200


# --- the command line -----------------------------------------------------------------------------

def run(*arguments: str | Path, cwd: Path | None = None) -> Any:
    """Run the agent until it exits."""
    return subprocess.run([sys.executable, "-I", ROOT / "cmon_agent.py", *arguments],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, timeout=60, cwd=cwd)


def test_without_libkstat_one_line_names_the_replay() -> None:
    done = run("--listen", "127.0.0.1:0")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("cmon_agent: cannot use libkstat.so.1: ")
    assert "--replay FILE serves a recorded node" in done.stderr and done.stderr.count("\n") == 1


def test_the_agent_runs_when_copied_alone(tmp_path: Path) -> None:
    shutil.copy(ROOT / "cmon_agent.py", tmp_path)
    with Program(sys.executable, "-I", "-S", tmp_path / "cmon_agent.py", "--replay", NODE,
                 "--listen", "127.0.0.1:0", "--log-format", "text", cwd=tmp_path) as program:
        assert not down(http_get(program.address, f"/v1/{WEB01}/metrics").text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cmon_agent.py"]


@pytest.mark.parametrize("arguments, status", [
    (["--nonsense"], 2), (["capture"], 2), (["capture", "x", "--frames", "0"], 2),
    (["--listen", "nowhere"], 2), (["--config", "/nonexistent.json"], 2),
    (["--replay", "/nonexistent.json"], 2), (["--log-level", "loud"], 2)])
def test_a_bad_command_line_is_status_2(arguments: list[str], status: int) -> None:
    done = run(*arguments)
    assert done.returncode == status and "Traceback" not in done.stderr and done.stderr


def test_version_and_help() -> None:
    done = run("--version")
    assert done.returncode == 0 and done.stdout == f"cmon_agent.py {agent.__version__}\n"
    done = run("--help")
    assert done.returncode == 0
    for flag in ("--config", "--listen", "--replay", "--libkstat", "--log-level", "--log-format",
                 "--check-config", "--smf", "--version"):
        assert flag in done.stdout
    assert "FILE" in run("capture", "--help").stdout


def test_check_config_reports_problems_of_the_host(kernel: Callable[..., Kernel], tmp_path: Path
                                                  ) -> None:
    one = Machine(tmp_path / "m", kernel(node()["frames"][0]["kstats"]))
    done = run("--check-config", "--config", one.config)
    assert (done.returncode, done.stdout) == (0, "cmon_agent: the settings are good\n"), done.stderr
    one.kernel.faults(("fail-open", "13"))
    done = run("--check-config", "--config", one.config)
    assert done.returncode == 2 and "kstat_open: permission denied" in done.stderr
    done = run("--check-config")
    assert done.returncode == 2 and "--replay" in done.stderr
    folder = tmp_path / "plugins"
    folder.mkdir()
    folder.chmod(0o777)
    one.kernel.faults()
    one.settings(plugin_dirs={"gz": str(folder)})
    done = run("--check-config", "--config", one.config)
    assert done.returncode == 2 and "must be a folder that root owns" in done.stderr


def test_a_port_in_use_is_reported_in_one_line(replay: Program) -> None:
    done = run("--replay", NODE, "--listen", "%s:%d" % replay.address)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "cannot listen on" in done.stderr and "address already in use" in done.stderr


def test_print_addresses_says_where_it_listens_and_nothing_else() -> None:
    with Program.agent("--replay", NODE, "--print-addresses") as one:
        wait_until(lambda: "\n" in one.output)
        host, port = json.loads(one.output)["main"].split(":")
        assert http_get((host, int(port)), "/-/healthy").status == 200
    assert one.output.count("\n") == 1


def test_print_addresses_to_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-I", ROOT / "cmon_agent.py", "--replay", NODE, "--listen",
             "127.0.0.1:0", "--print-addresses"], stdout=full, stderr=subprocess.PIPE,
            universal_newlines=True, timeout=60)
    assert done.returncode == 1
    *logged, problem = sorted(done.stderr.splitlines(), key=lambda line: line.startswith("cmon_"))
    assert problem == "cmon_agent: no space left on device"
    assert all(map(json.loads, logged))


def test_smf_start_returns_once_listening_and_the_child_stops_on_a_signal(tmp_path: Path) -> None:
    from support import free_port
    port = free_port()
    log = open(tmp_path / "log", "wb")
    done = subprocess.run([sys.executable, "-I", ROOT / "cmon_agent.py", "--smf", "--replay", NODE,
                           "--listen", f"127.0.0.1:{port}"], stdin=subprocess.DEVNULL, stdout=log,
                          stderr=log, timeout=60)
    assert done.returncode == 0, (tmp_path / "log").read_text()
    assert http_get(("127.0.0.1", port), "/-/healthy").status == 200, "at once, no waiting"
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert lines and all(line["name"] == "cmon-agent" or line["pid"] for line in lines)
    child = lines[-1]["pid"]
    os.kill(child, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{child}").exists() or
               "State:\tZ" in Path(f"/proc/{child}/status").read_text())


def test_smf_start_exits_96_on_bad_settings(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"listen": 7, "unknown": 1}')
    done = run("--smf", "--config", bad)
    assert done.returncode == 96 and done.stderr.count("\n") == 2
    done = run("--smf", "--listen", "127.0.0.1:0")
    assert done.returncode == 96 and "--replay" in done.stderr


def test_sigterm_finishes_requests_in_flight(kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    one = Machine(tmp_path / "m", kernel(node()["frames"][0]["kstats"]))
    one.kernel.faults(("block", "memory_cap:5:*"))
    one.start()
    with Connection(one.agent.address) as connection:
        connection.send(f"GET /v1/{WEB01}/metrics HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        wait_until(lambda: one.kernel["blocked"] == 1)
        one.agent.signal(signal.SIGTERM)
        answer = connection.answer()
    assert answer.status == 200 and answer.headers["connection"] == "close"
    assert one.agent.wait() == 0


def test_sigterm_stops_the_agent_while_a_read_is_blocked(kernel: Callable[..., Kernel],
                                                         tmp_path: Path) -> None:
    one = Machine(tmp_path / "m", kernel(node()["frames"][0]["kstats"]))
    one.kernel.faults(("block", "memory_cap:5:*"))
    one.start()
    assert down(one.zone()) == {"memcap"}
    assert one.agent.stop() == 0


def test_the_default_address_is_the_admin_address() -> None:
    settings = agent.Settings()
    host = agent.RecordedHost(str(NODE), settings)
    info, problem = agent.read_sysinfo(host)
    assert (info.admin_ip, info.pool, info.hostname, info.cpus) == ("10.20.0.7", "zones", "cn07", 8)
    assert info.memory_bytes == 64 << 30 and problem == ""
    assert agent.address_of(settings, host, info, "") == ("127.0.0.1", 9163), "a replay is local"

    class Real:
        recorded = False
    assert agent.address_of(settings, Real(), info, "") == ("10.20.0.7", 9163)  # type: ignore
    assert agent.address_of(settings, Real(), agent.Sysinfo(), "x") == (        # type: ignore
        "127.0.0.1", 9163)


def test_without_sysinfo_smartos_has_no_default_address(monkeypatch: pytest.MonkeyPatch) -> None:
    class Real:
        recorded = False
    monkeypatch.setattr(sys, "platform", "sunos5")
    with pytest.raises(agent.ConfigError) as caught:
        agent.address_of(agent.Settings(), Real(), agent.Sysinfo(), "no sysinfo")   # type: ignore
    assert "the admin IP is unknown (no sysinfo): set listen" in str(caught.value)


def test_our_gzip_is_readable_by_gzip(replay: Program) -> None:
    with Connection(replay.address) as connection:
        connection.send(f"GET /v1/{WEB01}/metrics HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip\r\n"
                        "Connection: close\r\n\r\n".encode())
        raw = connection._reader.read()
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"Content-Encoding: gzip" in head and b"# HELP" in gzip.decompress(body)


def test_the_page_of_all_zones_ignores_the_proxys_core_flag(kernel: Callable[..., Kernel],
                                                            tmp_path: Path) -> None:
    """A page cached for the header is not used: vminfod decides."""
    one = Machine(tmp_path / "m", kernel(node()["frames"][0]["kstats"]))
    desk = Desk(one.config)
    desk.page(f"/v1/{WEB01}/metrics", x_joyent_cmon_opts=opts({"isCoreZone": True})[
        "x-joyent-cmon-opts"])
    desk.pass_by(100.0, 1.0)
    page = desk.page("/v1/zones/metrics")
    ages = re.findall(r'^cmon_sample_age_seconds{zonename="%s",collector="memcap"} (\S+)$' % WEB01,
                      page, re.M)
    assert [float(age) for age in ages] == [0.0]
    desk.close()


def captured(one: Machine, path: Path, *arguments: str) -> Any:
    """Run `capture` on a machine."""
    return subprocess.run([sys.executable, "-I", ROOT / "cmon_agent.py", "capture", path,
                           "--config", one.config, *arguments], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120)


SECRETS = {"customer_metadata": {"root_authorized_keys": "ssh-rsa SECRET", "metricPorts": "8881",
                                 "user-script": "SECRET"},
           "internal_metadata": {"passwords": "SECRET"}, "cmdline": "SECRET",
           "nics": [{"interface": "net0", "nic_tag": "admin", "network_uuid": "n", "ip": "10.0.0.1",
                     "mac": "SECRET"}]}


class Answers:
    """A vminfod that answers /vms."""

    def __init__(self, body: str, status: str = "200 OK") -> None:
        self.info = Vminfod()

        def behave(stream: Any) -> None:
            stream.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n"
                           f"Connection: close\r\n\r\n{body}".encode())
            stream.close()
        self.info.behave = behave


def test_a_capture_contains_what_collectors_need_and_no_secrets(kernel: Callable[..., Kernel],
                                                                tmp_path: Path) -> None:
    info = Answers(json.dumps([{"uuid": WEB01, "zonename": WEB01, "alias": "web01", **SECRETS}, 7,
                               {"uuid": LB01, "nics": 7, "customer_metadata": "x"}]))
    sysinfo = tmp_path / "sysinfo.json"
    sysinfo.write_text(json.dumps({"Hostname": "cn07", "Zpool": "zones", "Boot Parameters":
                                   {"root_shadow": "SECRET"}, "Manufacturer": "SECRET"}))
    one = Machine(tmp_path / "m", kernel(node()["frames"][0]["kstats"]), sysinfo_file=str(sysinfo),
                  vminfod=info.info.url)
    path = tmp_path / "capture.json"
    done = captured(one, path, "--frames", "2", "--interval", "0.01")
    assert done.returncode == 0, done.stderr
    text = path.read_text()
    assert "SECRET" not in text and path.stat().st_mode & 0o077 == 0
    content = json.loads(text)
    assert content["host"] == {"Hostname": "cn07", "Zpool": "zones"}
    vm, bare = content["frames"][1]["vms"]
    assert bare == {"uuid": LB01, "nics": []}
    assert vm == {"uuid": WEB01, "zonename": WEB01, "alias": "web01",
                  "customer_metadata": {"metricPorts": "8881"},
                  "nics": [{"interface": "net0", "nic_tag": "admin", "network_uuid": "n",
                            "ip": "10.0.0.1"}]}
    assert content["frames"][1]["at"] > content["frames"][0]["at"]
    with Program.agent("--replay", path) as program:
        page = http_get(program.address, f"/v1/{WEB01}/metrics").text
        assert 'interface="vnic0",nic_tag="admin",network_uuid="n"' in page
    info.info.close()


@pytest.mark.parametrize("body, status", [("no JSON", "200 OK"), ("[]", "500 Oops"),
                                          ("{}", "200 OK")])
def test_a_capture_is_written_without_vms_if_vminfod_fails(kernel: Callable[..., Kernel],
                                                           tmp_path: Path, body: str, status: str
                                                          ) -> None:
    info = Answers(body, status)
    one = Machine(tmp_path / "m", kernel(node()["frames"][0]["kstats"]), vminfod=info.info.url)
    done = captured(one, tmp_path / "capture.json", "--frames", "1")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "capture.json").read_text())["frames"][0]["vms"] == []
    assert "the capture will not contain VMs" in done.stderr
    info.info.close()


def test_lone_surrogates_in_a_capture_are_replaced_on_pages(tmp_path: Path) -> None:
    content = json.loads(NODE.read_text())
    frame = content["frames"][0]
    for line, output in frame["commands"].items():
        if "zpool" in line:
            output["stdout"] = output["stdout"].replace("zones", "zo\ud800nes")
    for kstat in frame["kstats"]:
        if kstat["module"] == "link":
            kstat["name"] += "\udfff"
    path = tmp_path / "capture.json"
    path.write_text(json.dumps({**content, "frames": [frame]}))
    with Program.agent("--replay", path) as program:
        pages = [http_get(program.address, f"/v1/{target}/metrics") for target in ("gz", LB01)]
        assert [(answer.status, down(answer.text)) for answer in pages] == [(200, set())] * 2
        assert 'zo?nes"' in pages[0].text and 'net0?"' in pages[1].text
        assert "Traceback" not in program.log


def test_a_capture_skips_a_blocked_and_a_failing_kstat(kernel: Callable[..., Kernel], tmp_path: Path
                                                      ) -> None:
    one = Machine(tmp_path / "m", kernel(node()["frames"][0]["kstats"]))
    one.kernel.faults(("block", "tcp:7:tcp"), ("fail", "zone_vfs:7:*", "5"))
    done = captured(one, tmp_path / "capture.json", "--frames", "1")
    assert done.returncode == 0, done.stderr
    names = {(k["instance"], k["name"].rpartition("_")[2]) for k in json.loads(
        (tmp_path / "capture.json").read_text())["frames"][0]["kstats"]
        if k["module"] in ("tcp", "zone_vfs", "memory_cap")}
    modules = {(k["module"], k["instance"]) for k in json.loads(
        (tmp_path / "capture.json").read_text())["frames"][0]["kstats"]}
    assert (5, "tcp") in names and ("memory_cap", 7) in modules
    assert (7, "tcp") not in names and ("zone_vfs", 7) not in modules


def test_a_capture_that_fails_is_reported_in_one_line(kernel: Callable[..., Kernel], tmp_path: Path
                                                     ) -> None:
    one = Machine(tmp_path / "m", kernel(node()["frames"][0]["kstats"]))
    done = captured(one, tmp_path / "nowhere" / "x.json", "--frames", "1")
    assert done.returncode == 1 and "cannot write" in done.stderr
    one.kernel.faults(("fail-open", "13"))
    done = captured(one, tmp_path / "x.json", "--frames", "1")
    assert done.returncode == 1 and "cannot capture: kstat_open: permission denied" in done.stderr
    assert run("capture", tmp_path / "x.json").returncode == 2, "no libkstat"


def test_a_capture_of_an_old_zfs_replays(kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    one = Machine(tmp_path / "m", kernel(node()["frames"][0]["kstats"]))
    one.script("zfs", zfs_without("refcompressratio", WEB01))
    done = captured(one, tmp_path / "capture.json", "--frames", "1")
    assert done.returncode == 0, done.stderr
    with Program.agent("--replay", tmp_path / "capture.json") as program:
        page = http_get(program.address, f"/v1/{WEB01}/metrics").text
        assert "\nzfs_used 2\n" in page and not down(page)
