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
# the original depend on. `CMON_REWRITE=1` rewrites it; then read the diff.
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

def another_proxy(served: DataCenter, name: str, port: int = 0, **settings: Any) -> Program:
    """One more proxy over the same agents, with an inventory file of its own."""
    (served.folder / f"{name}.inventory.json").write_text(json.dumps(served.inventory))
    config = served.folder / f"{name}.json"
    config.write_text(json.dumps({**served.settings, "quota": {"per_minute": 1e6, "burst": 1e6},
                                  "inventory": {"file": f"{name}.inventory.json"}, **settings}))
    proxy = served.keep(Program.proxy(config, "--listen", f"127.0.0.1:{port}"))
    proxy.addresses(2)
    return proxy


def status(served: DataCenter, proxy: Program) -> int:
    """What alice's Prometheus is answered when it wants to discover."""
    return http_get(proxy.address, "/v1/discover", {"Host": SERVICE}, server_name=SERVICE,
                    tls=served.credentials["alice"].context()).status


def test_target_count_never_falls(served: DataCenter) -> None:
    """Six proxies, a job of one Prometheus for each, and a fault for each, all at once."""
    names = ("key removed", "bad inventory", "killed", "restarted with nothing", "over quota",
             "node hangs")
    count = len(served.vms("alice"))
    proxies = {name: another_proxy(served, name.replace(" ", "-")) for name in names}
    jobs = []
    for name, proxy in proxies.items():
        job = served.job("alice", port=proxy.address[1])
        job["job_name"] = name
        jobs.append(job)
    prometheus = served.start_prometheus(jobs)
    for name in names:
        prometheus.wait_for_up(name, count)

    def inventory_of(name: str) -> Path:
        return served.folder / f"{name.replace(' ', '-')}.inventory.json"

    def refreshed() -> float:
        own = http_get(prometheus.address, "/metrics").text.replace(" NaN", " 0")
        return samples(own)['prometheus_sd_refresh_duration_seconds_count{mechanism="triton"}']

    # the faults
    without = json.loads(json.dumps(served.inventory))
    for account in without["accounts"]:
        account["keys"] = []
    inventory_of("key removed").write_text(json.dumps(without))
    inventory_of("bad inventory").write_text('{"accounts": [')
    proxies["killed"].kill()
    nothing = proxies["restarted with nothing"]
    port = nothing.address[1]
    assert nothing.stop() == 0
    config = served.folder / "restarted-with-nothing.json"
    settings = json.loads(config.read_text())
    settings["inventory"] = {"file": "not-there.json"}
    config.write_text(json.dumps(settings))
    proxies["restarted with nothing"] = served.keep(
        Program.proxy(config, "--listen", f"127.0.0.1:{port}"))
    proxies["restarted with nothing"].addresses(2)
    config = served.folder / "over-quota.json"
    settings = json.loads(config.read_text())
    settings["quota"] = {"per_minute": 0, "burst": 1, "over_quota": "refuse", "hard_per_minute": 0}
    config.write_text(json.dumps(settings))
    proxies["over quota"].signal(signal.SIGHUP)
    proxies["over quota"].wait_for_log("settings reloaded")
    for name, wanted in (("key removed", 401), ("bad inventory", 200),
                         ("restarted with nothing", 503), ("over quota", 429), ("node hangs", 200)):
        wait_until(lambda name=name, wanted=wanted:     # type: ignore[misc]
                   status(served, proxies[name]) == wanted, f"{wanted}: {name}")
    served.agents[0].signal(signal.SIGSTOP)
    try:
        # longer than the 5 s for which Prometheus gathers news of its discoveries
        before, end = refreshed(), time.monotonic() + 7
        while time.monotonic() < end or refreshed() < before + 3 * len(names):
            found = {name: len(prometheus.targets(name)) for name in names}
            assert found == dict.fromkeys(names, count)
            time.sleep(0.2)     # time must pass: it is what does not happen that counts
    finally:
        served.agents[0].signal(signal.SIGCONT)
    # and all comes back
    for name in ("key removed", "bad inventory"):
        inventory_of(name).write_text(json.dumps(served.inventory))
    for name in ("key removed", "bad inventory", "node hangs"):
        prometheus.wait_for_up(name, count)


# --- vmagent, which has no Triton discovery ---

def test_vmagent_scrapes_by_http_discovery(served: DataCenter) -> None:
    folder = served.folder / "vmagent"
    folder.mkdir()
    job = served.http_job("alice")
    (folder / "scrape.yml").write_text(json.dumps({
        "global": {"scrape_interval": "1s"}, "scrape_configs": [
            {**job, "http_sd_configs": [{name: value for name, value in one.items()
                                         if name != "refresh_interval"}
                                        for one in job["http_sd_configs"]]}]}))
    port = free_port()
    served.keep(served.with_our_names(
        tool("vmagent"), f"-promscrape.config={folder / 'scrape.yml'}",
        f"-httpListenAddr=127.0.0.1:{port}", "-promscrape.httpSDCheckInterval=1s",
        f"-remoteWrite.tmpDataPath={folder}", "-remoteWrite.url=http://127.0.0.1:9/write"))
    mine = {vm["uuid"] for vm in served.vms("alice")}

    def up() -> set[str]:
        try:
            found = json.loads(http_get(("127.0.0.1", port), "/api/v1/targets").body)
        except OSError:
            return set()
        return {target["labels"]["instance"] for target in found["data"]["activeTargets"]
                if target["health"] == "up"}
    wait_until(lambda: up() == mine, "vmagent's targets")


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
