# SPDX-License-Identifier: MPL-2.0
"""Each alert of examples/rules.yml fires for its fault, no other does, and it resolves."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Union

import cmon_agent
import pytest
from support import EXAMPLES

# minutes: all is well, the fault, all is well again
WELL, FAULT, AGAIN = 30, 100, 40
DAY = 86400


class Grows(NamedTuple):
    """A counter, by what is added in a minute."""
    per_minute: float


Value = Union[float, Grows, None]       # None: no such series

ZONE = 'job="containers",instance="z1",alias="web01"'
NIC = f'{ZONE},interface="net0"'
NODE = 'job="nodes",instance="n1",alias="cn07"'
FLEET = 'job="fleet",instance="z1"'
PROXY = 'job="fleet",instance="proxy"'
NS = 60e9                               # a CPU's nanoseconds in a minute

# A container, its node and an account, all well: every series of every rule.
HEALTHY: dict[str, Value] = {
    f"up{{{ZONE}}}": 1, f"up{{{NODE}}}": 1, f"up{{{PROXY}}}": 1,
    f'cmon_instance_info{{{FLEET},alias="web01"}}': 1,
    f'cmon_instance_state{{{FLEET},state="running"}}': 1,
    f'cmon_instance_state{{{FLEET},state="stopped"}}': 0,
    f"cmon_instance_node_reachable{{{FLEET}}}": 1,
    f'cmon_instance_last_scrape_result{{{FLEET},result="ok"}}': 1,
    f'cmon_instance_last_scrape_result{{{FLEET},result="quota"}}': 0,
    f"cmon_quota_limited{{{PROXY}}}": 0,
    f'cmon_client_certificate_expiry_timestamp_seconds{{{PROXY},subject="alice"}}': 365 * DAY,
    f'cmon_collector_up{{{ZONE},collector="tcp"}}': 1,
    f'cmon_collector_up{{{NODE},collector="zpool"}}': 1,
    f'cmon_sample_age_seconds{{{ZONE},collector="tcp"}}': 4,
    f'cmon_sample_age_seconds{{{ZONE},collector="plugin_slow"}}': 86400,
    f"cpucap_cur_usage_percentage{{{ZONE}}}": 100, f"cpucap_limit_percentage{{{ZONE}}}": 200,
    f"cpucap_waiting_threads_count{{{ZONE}}}": 0,
    f'vcpu_seconds_total{{{ZONE},vcpu="0",state="run"}}': Grows(30),
    f'vcpu_seconds_total{{{ZONE},vcpu="0",state="idle"}}': Grows(30),
    f"mem_agg_usage{{{ZONE}}}": 500, f"mem_limit{{{ZONE}}}": 1000,
    f"mem_over_limit_total{{{ZONE}}}": 7, f"mem_anon_pages_in_total{{{ZONE}}}": Grows(60),
    f"mem_fault_throttle_seconds_total{{{ZONE}}}": 3, f"mem_anon_alloc_fail{{{ZONE}}}": 2,
    f"mem_swap{{{ZONE}}}": 100, f"mem_swap_limit{{{ZONE}}}": 1000,
    f"mem_swap_reserved_bytes{{{ZONE}}}": 100, f"mem_swap_reserved_limit_bytes{{{ZONE}}}": 1000,
    f"mem_locked_bytes{{{ZONE}}}": 10, f"mem_locked_limit_bytes{{{ZONE}}}": 1000,
    f"net_agg_bytes_in{{{NIC}}}": Grows(6e6), f"net_agg_bytes_out{{{NIC}}}": Grows(6e6),
    f"net_speed_bytes_per_second{{{NIC}}}": 1e6, f"net_drops_in_total{{{NIC}}}": Grows(1),
    f"net_drops_out_total{{{NIC}}}": 0, f"net_errors_in_total{{{NIC}}}": Grows(1),
    f"net_errors_out_total{{{NIC}}}": 0, f"net_link_up{{{NIC}}}": 1,
    f"tcp_segments_in_total{{{ZONE}}}": Grows(60000),
    f"tcp_segments_out_total{{{ZONE}}}": Grows(60000),
    f"tcp_listen_drop_count{{{ZONE}}}": 4, f"tcp_listen_drop_Qzero_count{{{ZONE}}}": 0,
    f"tcp_retransmitted_segment_count{{{ZONE}}}": Grows(90),
    f"tcp_failed_connection_attempt_count{{{ZONE}}}": Grows(60),
    f"tcp_errors_in_total{{{ZONE}}}": 0,
    f"vfs_run_time_count{{{ZONE}}}": Grows(NS / 2),
    f"vfs_wait_length_time_count{{{ZONE}}}": Grows(NS),
    f'vfs_slow_operations_total{{{ZONE},over="10ms"}}': Grows(100),
    f'vfs_slow_operations_total{{{ZONE},over="1s"}}': 3,
    f"vfs_delay_seconds_total{{{ZONE}}}": Grows(1),
    f"zfs_used{{{ZONE}}}": 50, f"zfs_available{{{ZONE}}}": 50,
    f"proc_processes{{{ZONE}}}": 50, f"proc_processes_limit{{{ZONE}}}": 1000,
    f'proc_fork_failures_total{{{ZONE},reason="cap"}}': 5,
    f"proc_map_failures_total{{{ZONE}}}": 0,
    f"load_average{{{ZONE}}}": 40,          # of a container: no alert
    f'cpu_idle_seconds_total{{{NODE},cpu_id="0"}}': Grows(30),
    f'cpu_idle_seconds_total{{{NODE},cpu_id="1"}}': Grows(30),
    f"load_average{{{NODE}}}": 3, f'cpu_info_cpus{{{NODE},state="on-line"}}': 2,
    f"memory_free_bytes{{{NODE}}}": 300, f"memory_total_bytes{{{NODE}}}": 1000,
    f"memory_low_scans_total{{{NODE}}}": 9, f"memory_throttles_total{{{NODE}}}": 0,
    f"memory_scanned_pages{{{NODE}}}": 0,
    f"swap_available_bytes{{{NODE}}}": 500, f"swap_reserved_bytes{{{NODE}}}": 500,
    f'disk_busy_seconds_total{{{NODE},device="sd0"}}': Grows(30),
    f'disk_wait_length_seconds_total{{{NODE},device="sd0"}}': Grows(60),
    f'disk_waiting_operations{{{NODE},device="sd0"}}': 1,
    f'zpool_health_status{{{NODE},pool="zones"}}': 0,
    f'zpool_allocated_bytes{{{NODE},pool="zones"}}': 50,
    f'zpool_size_bytes{{{NODE},pool="zones"}}': 100,
    f'zpool_fragmentation_percent{{{NODE},pool="zones"}}': 20,
    f'link_bytes_in_total{{{NODE},link="ixgbe0"}}': Grows(6e6),
    f'link_bytes_out_total{{{NODE},link="ixgbe0"}}': Grows(6e6),
    f'link_speed_bytes_per_second{{{NODE},link="ixgbe0"}}': 1e6,
    f'link_drops_in_total{{{NODE},link="ixgbe0"}}': Grows(5),
    f'link_drops_out_total{{{NODE},link="ixgbe0"}}': 0,
    f'link_errors_in_total{{{NODE},link="ixgbe0"}}': 2,
    f'link_errors_out_total{{{NODE},link="ixgbe0"}}': 0,
    f'link_up{{{NODE},link="ixgbe0"}}': 1,
    f"alloc_memory_caps_bytes{{{NODE}}}": 800, f"alloc_memory_bytes{{{NODE}}}": 1000,
    f"alloc_cpu_caps_cpus{{{NODE}}}": 40, f"alloc_cpus{{{NODE}}}": 8,
    f'alloc_uncapped_zones{{{NODE},resource="cpu"}}': 0,
    f"ntp_pll_offset_seconds{{{NODE}}}": -0.002, f"ntp_leap_indicator_status{{{NODE}}}": 0,
    f'ntp_peer_last8_polls_failure_count{{{NODE},remote="a"}}': 0,
    f'ntp_peer_last8_polls_failure_count{{{NODE},remote="b"}}': 8,
    'cmon_agent_lifetime_stretch_ratio{job="agents",instance="n1",alias="cn07"}': 1,
}
OF_FLEET = [series for series in HEALTHY if re.search('job="fleet"', series)
            and not series.startswith("up{")]
ENDS = "cmon_client_certificate_expiry_timestamp_seconds"


def series(name: str) -> str:
    """The healthy series with this prefix."""
    found = [one for one in HEALTHY if one.startswith(name)]
    assert len(found) == 1, (name, found)
    return found[0]


# alert, whose alias it names, and what is not as it should be. Several rows: each fault by itself.
FAULTS: list[tuple[str, str, dict[str, Value]]] = [
    ("ContainerSilent", "web01", {f"up{{{ZONE}}}": 0}),
    ("ContainerStopped", "web01", {
        f"up{{{ZONE}}}": None, f'cmon_instance_state{{{FLEET},state="running"}}': 0,
        f'cmon_instance_state{{{FLEET},state="stopped"}}': 1}),
    ("ContainerNodeGone", "web01", {f"up{{{ZONE}}}": 0, "cmon_instance_node_reachable": 0}),
    ("FiguresMissing", "web01", {f"cmon_collector_up{{{ZONE}": 0}),
    ("FiguresMissing", "cn07", {f"cmon_collector_up{{{NODE}": 0}),
    ("FiguresOld", "web01", {f'cmon_sample_age_seconds{{{ZONE},collector="tcp"': 901}),
    ("AccountOverQuota", "", {"cmon_quota_limited": 1}),
    ("AccountOverQuota", "", {
        "cmon_quota_limited": 1, f"up{{{ZONE}}}": 0,
        f'cmon_instance_last_scrape_result{{{FLEET},result="ok"}}': 0,
        f'cmon_instance_last_scrape_result{{{FLEET},result="quota"}}': 1}),
    ("ProxySilent", "", {f"up{{{PROXY}}}": 0, f"up{{{ZONE}}}": 0,
                         **dict.fromkeys(OF_FLEET, None)}),
    ("CertificateEndsIn30Days", "", {ENDS: 20 * DAY}),
    ("CertificateEndsIn7Days", "", {ENDS: 5 * DAY}),
    ("CertificateEndsIn7Days", "", {ENDS: 0}),
    ("ContainerCpuNearCap", "web01", {"cpucap_cur_usage_percentage": 195}),
    ("ContainerCpuCapped", "web01", {"cpucap_cur_usage_percentage": 200,
                                     "cpucap_waiting_threads_count": 3}),
    ("ContainerVirtualCpusBusy", "web01", {
        f'vcpu_seconds_total{{{ZONE},vcpu="0",state="run"': Grows(59)}),
    ("ContainerMemoryNearCap", "web01", {"mem_agg_usage": 950}),
    ("ContainerMemoryOverCap", "web01", {"mem_over_limit_total": Grows(1)}),
    ("ContainerMemoryOverCap", "web01", {"mem_anon_pages_in_total": Grows(60_000)}),
    ("ContainerMemoryOverCap", "web01", {"mem_fault_throttle_seconds_total": Grows(6)}),
    ("ContainerAllocationsFail", "web01", {"mem_anon_alloc_fail": Grows(1)}),
    ("ContainerSwapNearCap", "web01", {"mem_swap{": 950}),
    ("ContainerSwapReserved", "web01", {"mem_swap_reserved_bytes": 990}),
    ("ContainerLockedMemoryNearCap", "web01", {"mem_locked_bytes": 950}),
    ("ContainerLinkBusy", "web01", {"net_agg_bytes_out": Grows(57e6)}),
    ("ContainerLinkBusy", "web01", {"net_agg_bytes_in": Grows(57e6)}),
    ("ContainerPacketsDropped", "web01", {"net_drops_in_total": Grows(600)}),
    ("ContainerPacketsDropped", "web01", {"net_drops_out_total": Grows(600)}),
    ("ContainerLinkErrors", "web01", {"net_errors_in_total": Grows(600)}),
    ("ContainerLinkErrors", "web01", {"net_errors_out_total": Grows(600)}),
    ("ContainerLinkErrors", "web01", {"net_link_up": 0}),
    ("ContainerTcpBusy", "web01", {"tcp_segments_in_total": Grows(15e6)}),
    ("ContainerTcpBusy", "web01", {"tcp_segments_out_total": Grows(15e6)}),
    ("ContainerDropsConnections", "web01", {"tcp_listen_drop_count": Grows(2)}),
    ("ContainerDropsConnections", "web01", {"tcp_listen_drop_Qzero_count": Grows(2)}),
    ("ContainerTcpErrors", "web01", {"tcp_retransmitted_segment_count": Grows(6000)}),
    ("ContainerTcpErrors", "web01", {"tcp_failed_connection_attempt_count": Grows(900)}),
    ("ContainerTcpErrors", "web01", {"tcp_errors_in_total": Grows(90)}),
    ("ContainerFilesBusy", "web01", {"vfs_run_time_count": Grows(NS * 0.95)}),
    ("ContainerFilesSlow", "web01", {f'vfs_slow_operations_total{{{ZONE},over="1s"': Grows(1)}),
    ("ContainerFilesSlow", "web01", {"vfs_wait_length_time_count": Grows(NS * 20)}),
    ("ContainerFilesSlow", "web01", {"vfs_delay_seconds_total": Grows(20)}),
    ("ContainerDiskNearQuota", "web01", {"zfs_used": 95, "zfs_available": 5}),
    ("ContainerProcessesNearCap", "web01", {"proc_processes{": 950}),
    ("ContainerForksFail", "web01", {"proc_fork_failures_total": Grows(1)}),
    ("ContainerForksFail", "web01", {"proc_map_failures_total": Grows(1)}),
    ("NodeCpuBusy", "cn07", {f'cpu_idle_seconds_total{{{NODE},cpu_id="{number}"': Grows(3)
                             for number in (0, 1)}),
    ("NodeCpuSaturated", "cn07", {f"load_average{{{NODE}": 9}),
    ("NodeCpuOffline", "cn07", {f'cpu_info_cpus{{{NODE},state="faulted"}}': 1}),
    ("NodeMemoryLow", "cn07", {"memory_free_bytes": 20}),
    ("NodeMemoryPressure", "cn07", {"memory_low_scans_total": Grows(5)}),
    ("NodeMemoryPressure", "cn07", {"memory_throttles_total": Grows(5)}),
    ("NodeMemoryPressure", "cn07", {"memory_scanned_pages": 500}),
    ("NodeSwapLow", "cn07", {"swap_available_bytes": 20}),
    ("NodeDiskBusy", "cn07", {"disk_busy_seconds_total": Grows(59)}),
    ("NodeDiskQueue", "cn07", {"disk_wait_length_seconds_total": Grows(600)}),
    ("NodeDiskQueue", "cn07", {"disk_waiting_operations": 9}),
    ("NodePoolUnhealthy", "cn07", {"zpool_health_status": 1}),
    ("NodePoolNearlyFull", "cn07", {"zpool_allocated_bytes": 90}),
    ("NodePoolFragmented", "cn07", {"zpool_fragmentation_percent": 80}),
    ("NodeLinkBusy", "cn07", {"link_bytes_out_total": Grows(57e6)}),
    ("NodeLinkBusy", "cn07", {"link_bytes_in_total": Grows(57e6)}),
    ("NodePacketsDropped", "cn07", {"link_drops_in_total": Grows(1200)}),
    ("NodePacketsDropped", "cn07", {"link_drops_out_total": Grows(1200)}),
    ("NodeLinkErrors", "cn07", {"link_errors_in_total": Grows(1200)}),
    ("NodeLinkErrors", "cn07", {"link_errors_out_total": Grows(1200)}),
    ("NodeLinkErrors", "cn07", {"link_up": 0}),
    ("NodeOversold", "cn07", {"alloc_memory_caps_bytes": 1100}),
    ("NodeOversold", "cn07", {"alloc_cpu_caps_cpus": 140}),
    ("NodeZonesUncapped", "cn07", {"alloc_uncapped_zones": 2}),
    ("NodeClockOff", "cn07", {"ntp_pll_offset_seconds": -0.3}),
    ("NodeClockFree", "cn07", {"ntp_leap_indicator_status": 3}),
    ("NodeClockFree", "cn07", {
        f'ntp_peer_last8_polls_failure_count{{{NODE},remote="a"': 8}),
    ("AgentOverBudget", "cn07", {"cmon_agent_lifetime_stretch_ratio": 2.5}),
]
# USE cells, in the order of docs/METRICS.md, and the alert of each
CELLS = {
    "zone": {
        "CPU": ("ContainerCpuNearCap", "ContainerCpuCapped", None),
        "virtual CPUs": ("ContainerVirtualCpusBusy", None, None),
        "memory": ("ContainerMemoryNearCap", "ContainerMemoryOverCap", "ContainerAllocationsFail"),
        "swap": ("ContainerSwapNearCap", "ContainerSwapReserved", None),
        "locked memory": ("ContainerLockedMemoryNearCap", None, None),
        "network": ("ContainerLinkBusy", "ContainerPacketsDropped", "ContainerLinkErrors"),
        "TCP": ("ContainerTcpBusy", "ContainerDropsConnections", "ContainerTcpErrors"),
        "files": ("ContainerFilesBusy", "ContainerFilesSlow", None),
        "disk space": ("ContainerDiskNearQuota", None, None),
        "processes": ("ContainerProcessesNearCap", None, "ContainerForksFail"),
    },
    "node": {
        "CPU": ("NodeCpuBusy", "NodeCpuSaturated", "NodeCpuOffline"),
        "memory": ("NodeMemoryLow", "NodeMemoryPressure", None),
        "swap": ("NodeSwapLow", None, None),
        "disks": ("NodeDiskBusy", "NodeDiskQueue", "NodePoolUnhealthy"),
        "disk space": ("NodePoolNearlyFull", "NodePoolFragmented", None),
        "network": ("NodeLinkBusy", "NodePacketsDropped", "NodeLinkErrors"),
        "what is sold": ("NodeOversold", "NodeZonesUncapped", None),
        "clock": ("NodeClockOff", None, "NodeClockFree"),
    },
}
ALERTS: list[str] = re.findall(r"alert: (\w+)", (EXAMPLES / "rules.yml").read_text())


def values(healthy: Value, faulty: Value) -> str:
    """A series over the three phases, as promtool writes it."""
    parts, now = [], 0.0
    for value, minutes in ((healthy, WELL), (faulty, FAULT), (healthy, AGAIN)):
        if value is None:
            parts.append(f"_x{minutes}")
        elif isinstance(value, Grows):
            parts.append(f"{now:g}+{value.per_minute:g}x{minutes - 1}")
            now += value.per_minute * minutes
        elif isinstance(healthy, Grows) or isinstance(faulty, Grows):
            now = max(now, value)
            parts.append(f"{now:g}x{minutes - 1}")      # a counter that stands still
        else:
            parts.append(f"{value:g}x{minutes - 1}")
    return " ".join(parts)


def scenario(alert: str, alias: str, changes: Mapping[str, Value]) -> dict[str, object]:
    """One test of promtool: nothing fires before, this alone in the fault, nothing afterwards."""
    faulty = {(name if name.endswith("}") else series(name)): value
              for name, value in changes.items()}
    both = {**dict.fromkeys(faulty), **HEALTHY}
    firing = 'count by (alertname, alias) (ALERTS{alertstate="firing"})'
    labels = f'{{alertname="{alert}"' + (f', alias="{alias}"' if alias else "") + "}"
    return {"interval": "1m", "name": f"{alert}: {' '.join(changes)}", "input_series": [
        {"series": name, "values": values(healthy, faulty.get(name, healthy))}
        for name, healthy in both.items()],
        "promql_expr_test": [
            {"expr": firing, "eval_time": f"{minute}m",
             "exp_samples": [{"labels": labels, "value": 1}] if fires else []}
            for minute, fires in ((WELL - 5, False), (WELL + FAULT - 5, True),
                                  (WELL + FAULT + AGAIN - 5, False))]}


def promtool(tests: Sequence[object], folder: Path) -> str:
    """What promtool says of these tests; "" if all pass."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (prometheus)")
    path = folder / "tests.yml"
    # in steps of 5 minutes: no alert waits for less, and it takes a fifth of the time
    path.write_text(json.dumps({"rule_files": [str(EXAMPLES / "rules.yml")],
                                "evaluation_interval": "5m", "tests": tests}))
    done = subprocess.run([tool, "test", "rules", path], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, check=False)
    return "" if done.returncode == 0 else done.stdout


def test_each_alert_fires_for_its_fault_and_for_no_other_and_resolves(tmp_path: Path) -> None:
    assert promtool([scenario(*fault) for fault in FAULTS], tmp_path) == ""


def test_the_alert_tests_can_fail(tmp_path: Path) -> None:
    """The fault of one alert, expected of another."""
    wrong = scenario("ContainerSilent", "web01", {"mem_agg_usage": 950})
    assert "ContainerMemoryNearCap" in promtool([wrong], tmp_path)


def test_every_alert_has_a_fault_and_every_fault_an_alert() -> None:
    assert len(set(ALERTS)) == len(ALERTS)
    assert {fault[0] for fault in FAULTS} == set(ALERTS)


def test_every_cell_of_the_use_tables_has_an_alert() -> None:
    """A cell without metrics has none, and no two cells have the same."""
    mine = [(use.scope, use.resource, *(bool(getattr(use, cell)) for cell in (
        "utilisation", "saturation", "errors"))) for use in cmon_agent.USE]
    assert mine == [(scope, resource, *(alert is not None for alert in cells))
                    for scope, rows in CELLS.items() for resource, cells in rows.items()]
    alerts = [alert for rows in CELLS.values() for cells in rows.values() for alert in cells
              if alert is not None]
    assert len(set(alerts)) == len(alerts) and set(alerts) <= set(ALERTS)


def test_alerts_of_a_cell_use_its_metrics() -> None:
    text = (EXAMPLES / "rules.yml").read_text()
    recorded = dict(re.findall(r"record: (\S+)\n +expr: (.*)", text))
    for use in cmon_agent.USE:
        for cell, alert in zip(("utilisation", "saturation", "errors"),
                               CELLS[use.scope][use.resource]):
            if alert is None:
                continue
            rule = text.partition(f"alert: {alert}\n")[2].partition("annotations")[0]
            for name, expression in recorded.items():
                rule = rule.replace(name, expression)
            assert set(re.findall(r"\w+", rule)) & set(getattr(use, cell)), alert


def test_alerts_name_the_alias() -> None:
    text = (EXAMPLES / "rules.yml").read_text()
    for alert, alias, _ in FAULTS:
        rule = text.partition(f"alert: {alert}\n")[2].partition("- alert:")[0]
        summary = re.search(r"summary: (.*)", rule)
        assert summary is not None and ("$labels.alias" in summary.group(1)) == bool(alias), alert


def test_alerts_say_what_to_do() -> None:
    """Each has a description: the likely cause, and the next step."""
    text = (EXAMPLES / "rules.yml").read_text()
    assert [alert for alert in ALERTS if not re.search(r"description: .{40,}", text.partition(
        f"alert: {alert}\n")[2].partition("- alert:")[0])] == []
