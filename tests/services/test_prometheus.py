# SPDX-License-Identifier: MPL-2.0
"""Debian's Prometheus scrapes a tenant's containers: agent on libkstat's ABI, proxy, mutual TLS."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from datacenter import SERVICE, SUFFIX, DataCenter, live_agent, need_root, same_page, tool

from support import NODE, ROOT, Program, free_port, http_get, samples, wait_until

# What `promtool check metrics` says of our pages, once: all of it is of names that dashboards of
# the original depend on. `CMON_REWRITE=1` writes it anew; then read the diff.
SAID = Path(__file__).with_name("promtool.txt")
INHERITED = {line.split("\t")[2] for line in (ROOT / "tests" / "metrics.tsv").read_text()
             .splitlines()[1:]}
META = re.compile(r"\w+_metrics_(available_boolean|cached_boolean|timer_seconds)")


@pytest.fixture()
def served(center: DataCenter, libkstat: Path, recorded_node: dict[str, Any]) -> DataCenter:
    need_root()
    live_agent(center, libkstat, recorded_node["frames"][0])
    center.start_proxy()
    center.start_name_server()
    return center


def test_prometheus_scrapes_every_running_container_of_a_tenant_and_no_other(
        served: DataCenter) -> None:
    prometheus = served.start_prometheus([served.job("alice"), served.job("bob")])
    for login in ("alice", "bob"):
        mine = {vm["uuid"]: vm for vm in served.vms(login)}
        targets = prometheus.wait_for_up(login, len(mine))
        found = {target["discoveredLabels"]["__meta_triton_machine_id"]: target
                 for target in targets}
        assert set(found) == set(mine)
        for uuid, target in found.items():
            labels = target["discoveredLabels"]
            assert target["scrapeUrl"] == f"https://{uuid}.{SUFFIX}:{served.address[1]}/metrics"
            assert labels["__meta_triton_machine_alias"] == mine[uuid]["alias"]
            assert labels["__meta_triton_machine_brand"] == mine[uuid]["brand"]
            assert labels["__meta_triton_machine_image"] == mine[uuid]["image_uuid"]
            assert labels["__meta_triton_server_id"] == mine[uuid]["server_uuid"]
            groups = mine[uuid]["tags"].get("triton.cmon.groups")
            assert labels.get("__meta_triton_groups") == (f",{groups}," if groups else None)
        # the values are those of the page, one by one
        for uuid in mine:
            page = samples(served.page(uuid, login).text)
            wanted = {series: value for series, value in page.items()
                      if not re.search(r"_timer_seconds|time_of_day|_age_seconds|_cached_", series)}
            assert len(wanted) > 40

            at = f'{{instance="{uuid}.{SUFFIX}:{served.address[1]}",job="{login}"}}'
            got = prometheus.query(at, without=("instance", "job"))
            different = {series: (value, got.get(canonical(series)))
                         for series, value in wanted.items()
                         if got.get(canonical(series)) != pytest.approx(value, rel=1e-12)}
            assert not different, f"{mine[uuid]['alias']}: {different}"
    # nobody sees what is not theirs, by any way
    [stranger] = [vm["uuid"] for vm in served.vms("alice")][:1]
    assert served.page(stranger, "bob").status == 404
    assert served.get(f"/v1/{stranger}/metrics", "bob").status == 404
    assert not {key for key in prometheus.query('{job="bob"}') if stranger in key}


def canonical(series: str) -> str:
    """A page's series with its labels in the order that the query gives them."""
    name, brace, labels = series.partition("{")
    if not brace:
        return name
    pairs = re.findall(r'[a-zA-Z_]\w*="(?:[^"\\]|\\.)*"', labels)
    return f"{name}{{{','.join(sorted(pairs))}}}"


def test_operators_prometheus_scrapes_the_compute_node(served: DataCenter) -> None:
    job = served.job("admin", role="cn")
    prometheus = served.start_prometheus([job])
    [target] = prometheus.wait_for_up("admin", 1)
    assert target["discoveredLabels"]["__meta_triton_machine_alias"] == "cn07"
    page = samples(served.page(served.inventory["servers"][0]["uuid"], "admin").text)
    assert any(series.startswith("cpu_user_seconds_total") for series in page)
    assert served.get("/v1/gz/discover", "alice").status in (401, 403, 404)


def test_groups_choose_targets(served: DataCenter) -> None:
    prometheus = served.start_prometheus([served.job("alice", groups=["web", "database"])])
    chosen = [vm for vm in served.vms("alice")
              if {"web", "database"} & set(vm["tags"].get("triton.cmon.groups", "").split(","))]
    assert 0 < len(chosen) < len(served.vms("alice"))
    prometheus.wait_for_up("alice", len(chosen))


def test_http_discovery_needs_one_name_and_gives_the_same_labels(
        center: DataCenter, libkstat: Path, recorded_node: dict[str, Any]) -> None:
    need_root()
    live_agent(center, libkstat, recorded_node["frames"][0])
    center.start_proxy()
    center.start_name_server(SERVICE)           # and no other name under the suffix
    prometheus = center.start_prometheus([center.http_job("alice"), center.http_job(
        "admin", "/v1/gz/sd")])
    mine = {vm["uuid"]: vm for vm in center.vms("alice")}
    targets = prometheus.wait_for_up("alice-http", len(mine))
    for target in targets:
        labels = target["discoveredLabels"]
        uuid = labels["__meta_triton_machine_id"]
        assert labels["__meta_triton_machine_alias"] == mine[uuid]["alias"]
        assert labels["__metrics_path__"] == f"/v1/{uuid}/metrics"
        assert target["labels"]["instance"] == uuid
        assert target["scrapeUrl"].startswith(f"https://{SERVICE}:")
    prometheus.wait_for_up("admin-http", 1)


def test_rates_of_a_replay_look_right_across_its_seam(center: DataCenter) -> None:
    need_root()
    center.start_agent("--replay", NODE)
    center.start_proxy()
    center.start_name_server()
    prometheus = center.start_prometheus([center.job("alice")])
    prometheus.wait_for_up("alice", len(center.vms("alice")))
    wait_until(lambda: len(prometheus.query("rate(cpu_user_usage[8s]) > 0")) >= 4, "rates")
    assert not prometheus.query("rate(cpu_user_usage[8s]) < 0")
    assert not prometheus.query("resets(cpu_user_usage[1h]) > 0")


# --- faults: the target count never falls ---

def test_target_count_never_falls(served: DataCenter, tmp_path: Path) -> None:
    port = free_port()
    served.proxy.stop()
    served.start_proxy(f"127.0.0.1:{port}", quota={"per_minute": 100000, "burst": 100000})
    prometheus = served.start_prometheus([served.job("alice")])
    count = len(served.vms("alice"))
    prometheus.wait_for_up("alice", count)

    def refreshed() -> float:
        own = http_get(prometheus.address, "/metrics").text.replace(" NaN", " 0")
        return samples(own)['prometheus_sd_refresh_duration_seconds_count{mechanism="triton"}']

    def hold(what: str) -> None:
        """The targets stay through refreshes, and longer than the 5 s for which Prometheus
        gathers news of its discoveries. Time must pass: it is what does not happen that counts."""
        before, end = refreshed(), time.monotonic() + 5.5
        while time.monotonic() < end or refreshed() < before + 3:
            assert len(prometheus.targets("alice")) == count, what
            time.sleep(0.2)

    [alice] = [a for a in served.inventory["accounts"] if a["login"] == "alice"]
    keys, alice["keys"] = alice["keys"], []
    served.write_inventory()
    wait_until(lambda: served.get("/v1/discover").status == 401)
    hold("401: the key is gone")
    alice["keys"] = keys
    served.write_inventory()
    prometheus.wait_for_up("alice", count)

    (served.folder / "inventory.json").write_text('{"accounts": [')
    hold("a broken inventory file")
    served.write_inventory()

    served.proxy.kill()
    hold("the proxy is gone")
    bad = dict(served.settings, inventory={"file": "not-there.json"})
    (served.folder / "broken.json").write_text(json.dumps(bad))
    with_none = Program.proxy(served.folder / "broken.json", "--listen", f"127.0.0.1:{port}")
    try:
        with_none.addresses(2)
        served.address = with_none.address
        assert served.get("/v1/discover").status == 503
        hold("503: no inventory yet")
    except AssertionError as error:
        # refusing to start without an inventory file is as good: nothing answers, targets stay
        if with_none.process.poll() is None:
            raise
        assert "not-there.json" in with_none.log + str(error)
        hold("no proxy without an inventory")
    finally:
        with_none.kill()

    served.start_proxy(f"127.0.0.1:{port}", quota={
        "per_minute": 0, "burst": 1, "over_quota": "refuse", "hard_per_minute": 0})
    wait_until(lambda: served.get("/v1/discover").status == 429, "429")
    hold("429: over quota")
    served.proxy.stop()
    served.start_proxy(f"127.0.0.1:{port}")
    prometheus.wait_for_up("alice", count)
    served.proxy.signal(signal.SIGHUP)
    served.proxy.wait_for_log("settings were reread")
    for agent in served.agents:
        agent.signal(signal.SIGSTOP)
    try:
        hold("the node hangs")
    finally:
        for agent in served.agents:
            agent.signal(signal.SIGCONT)
    prometheus.wait_for_up("alice", count)


# --- promtool ---

def check_metrics(page: str) -> list[str]:
    """What promtool says of a page; it must be able to parse it."""
    done = subprocess.run([tool("promtool"), "check", "metrics"], input=page.encode(), check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said = (done.stderr + done.stdout).decode()
    assert "error while linting" not in said and "parse" not in said, said
    return [line for line in said.splitlines() if line.strip()]


def test_promtool_parses_every_page_and_complains_of_inherited_names_only(
        center: DataCenter, libkstat: Path, recorded_node: dict[str, Any]) -> None:
    agent, _ = live_agent(center, libkstat, recorded_node["frames"][0])
    center.start_proxy()
    pages = {"node": http_get(agent.address, "/v1/gz/metrics"),
             "agent": http_get(agent.address, "/metrics"),
             "zones": http_get(agent.address, "/v1/zones/metrics"),
             "proxy": http_get(center.admin, "/metrics"),
             "fleet": center.get("/v1/fleet/metrics")}
    for vm in center.inventory["vms"]:
        if vm["state"] == "running":
            pages[vm["alias"]] = http_get(agent.address, f"/v1/{vm['uuid']}/metrics")
    complaints: set[str] = set()
    for name, answer in pages.items():
        assert answer.status == 200, f"{name}: {answer.status} {answer.text[:200]}"
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        complaints |= set(check_metrics(answer.text))
    for line in complaints:
        name = line.split()[0]
        assert name in INHERITED or META.fullmatch(name), f"a name of ours: {line}"
    if os.environ.get("CMON_REWRITE"):
        SAID.write_text("".join(f"{line}\n" for line in sorted(complaints)))
    assert complaints == set(SAID.read_text().splitlines())


def test_libkstat_replay_and_proxy_give_the_same_page(
        center: DataCenter, libkstat: Path, recorded_node: dict[str, Any], tmp_path: Path) -> None:
    one = dict(recorded_node, frames=recorded_node["frames"][:1])
    (tmp_path / "one.json").write_text(json.dumps(one))
    live, kernel = live_agent(center, libkstat, one["frames"][0])
    replayed = center.keep(Program.agent("--replay", tmp_path / "one.json"))
    center.start_proxy()
    for vm in center.vms("alice"):
        page = http_get(live.address, f"/v1/{vm['uuid']}/metrics").text
        relayed = center.page(vm["uuid"]).text
        assert same_page(page, relayed), vm["alias"]
        # the recorded one knows the NICs' networks from its VM objects; the live one has no vminfod
        other = re.sub(r',(nic_tag|network_uuid)="[^"]*"', "",
                       http_get(replayed.address, f"/v1/{vm['uuid']}/metrics").text)
        assert same_page(page, other, ["boot_time"]), vm["alias"]
    assert kernel["stale"] == kernel["overlaps"] == kernel["lookups"] == 0
