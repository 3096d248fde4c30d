#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""Writes examples/dashboards/*.json, for Grafana 9 and later, from the tables below: `make docs`.

fleet       all containers of an account: what each uses, which are silent and why; for tenants
container   one container: utilisation, saturation and errors of each resource; for tenants
node        a compute node, and its agent; for operators
proxy       a proxy: accounts, nodes, quotas; for operators

Each row is a panel: title, width (of 24), Grafana's unit, the queries (expression and legend), and
options. The queries use the metrics themselves, so the dashboards work without the recording rules.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
BYTES, RATE, SHARE, TIME, COUNT, EACH = ("bytes", "Bps", "percentunit", "s", "short", "ops")


class Panel(NamedTuple):
    """One panel; without targets, the title of a row."""
    title: str
    width: int = 12
    unit: str = COUNT
    targets: tuple[tuple[str, str], ...] = ()
    kind: str = "timeseries"
    description: str = ""
    link: str = ""                  # the dashboard that a click on a series opens


def row(title: str) -> Panel:
    """The title above the panels that follow."""
    return Panel(title, 24, kind="row")


def c(name: str, more: str = "") -> str:
    """A metric of the selected containers or nodes."""
    return name + '{alias=~"$alias"' + ("," + more if more else "") + "}"


def per_second(name: str, more: str = "") -> str:
    """A counter of the selected containers or nodes, as a rate."""
    return f"rate({c(name, more)}[$__rate_interval])"


def by_alias(expression: str) -> str:
    """The sum over all NICs, disks, …, for each alias."""
    return f"sum by (alias) ({expression})"


JOIN = " * on (instance) group_left (alias) cmon_instance_info"
CPU = f"({per_second('cpu_user_usage')} + {per_second('cpu_sys_usage')}) / 1e9"

FLEET = (
    Panel("Running", 4, COUNT, (
        ('sum(cmon_instance_state{state="running"})', ""),), "stat"),
    Panel("Stopped", 4, COUNT, (('sum(cmon_instance_state{state="stopped"})', ""),), "stat"),
    Panel("On a silent compute node", 4, COUNT, (
        ("count(cmon_instance_node_reachable == 0) or vector(0)", ""),), "stat"),
    Panel("Not scraped", 4, COUNT, (('count(up{job="containers"} == 0) or vector(0)', ""),),
          "stat"),
    Panel("Quota used", 4, SHARE, (("max(cmon_quota_used)", ""),), "stat",
          "Share of the burst that is used. At 1 the proxy serves old copies or refuses requests."),
    Panel("Certificate expires in", 4, TIME, (
        ("min(cmon_client_certificate_expiry_timestamp_seconds) - time()", ""),), "stat"),
    Panel("CPU, share of the cap", 12, SHARE, ((
        f"{c('cpucap_cur_usage_percentage')} / {c('cpucap_limit_percentage')}", "{{alias}}"),),
        link="container"),
    Panel("Memory, share of the cap", 12, SHARE, (
        (f"{c('mem_agg_usage')} / {c('mem_limit')}", "{{alias}}"),), link="container"),
    Panel("CPUs in use", 12, COUNT, ((CPU, "{{alias}}"),), link="container"),
    Panel("Memory in use", 12, BYTES, ((c("mem_agg_usage"), "{{alias}}"),), link="container"),
    Panel("Network received", 12, RATE, (
        (by_alias(per_second("net_agg_bytes_in")), "{{alias}}"),), link="container"),
    Panel("Network sent", 12, RATE, (
        (by_alias(per_second("net_agg_bytes_out")), "{{alias}}"),), link="container"),
    Panel("Disk space, share of the quota", 12, SHARE, ((
        f"{c('zfs_used')} / ({c('zfs_used')} + {c('zfs_available')})", "{{alias}}"),),
        link="container"),
    Panel("Closest to a cap", 12, SHARE, ((
        "topk(10, max by (alias) ("
        f"{c('cpucap_cur_usage_percentage')} / {c('cpucap_limit_percentage')}"
        f" or {c('mem_agg_usage')} / {c('mem_limit')}"
        f" or {c('mem_swap')} / {c('mem_swap_limit')}))", "{{alias}}"),), "bargauge",
        link="container"),
    Panel("Silent containers", 24, COUNT, ((
        "(cmon_instance_node_reachable == 0)" + JOIN, "{{alias}}: its compute node is silent"), (
        '(cmon_instance_state{state!="running"} == 1)' + JOIN, "{{alias}}: {{state}}"), (
        '(cmon_instance_last_scrape_result{result!="ok"} == 1)' + JOIN, "{{alias}}: {{result}}")),
        description="Why a container has no metrics."),
)
CONTAINER = (
    row("CPU"),
    Panel("CPUs in use and cap", 8, COUNT, (
        (f"{per_second('cpu_user_usage')} / 1e9", "{{alias}} user"),
        (f"{per_second('cpu_sys_usage')} / 1e9", "{{alias}} kernel"),
        (f"{c('cpucap_limit_percentage')} / 100", "{{alias}} cap")),
        description="1 means one CPU."),
    Panel("Waiting for CPU", 8, COUNT, (
        (f"{per_second('cpu_wait_time')} / 1e9", "{{alias}}"),),
        description="Threads that wait for a CPU, on average."),
    Panel("Threads", 8, COUNT, (
        (c("load_average"), "{{alias}} load average"),
        (c("cpucap_waiting_threads_count"), "{{alias}} held back by the cap")),
        description="Runnable threads, not CPUs."),
    Panel("Virtual CPUs by state", 8, COUNT, (
        ("sum by (alias, state) (" + per_second("vcpu_seconds_total") + ")",
         "{{alias}} {{state}}"),),
        description="Only for virtual machines; 1 means one virtual CPU."),
    Panel("Time above the CPU cap", 8, SHARE, (
        (per_second("cpucap_above_seconds_total"), "{{alias}}"),),
        description="Share of the time."),
    row("Memory"),
    Panel("Resident memory and cap", 8, BYTES, (
        (c("mem_agg_usage"), "{{alias}}"), (c("mem_limit"), "{{alias}} cap"))),
    Panel("Swap and cap", 8, BYTES, (
        (c("mem_swap"), "{{alias}} used"),
        (c("mem_swap_reserved_bytes"), "{{alias}} reserved"),
        (c("mem_swap_limit"), "{{alias}} cap"))),
    Panel("Paging and throttling at the cap", 8, EACH, (
        (per_second("mem_anon_pages_in_total"), "{{alias}} pages in"),
        (per_second("mem_fault_throttles_total"), "{{alias}} faults delayed"),
        (per_second("mem_over_limit_total"), "{{alias}} times over the cap"))),
    Panel("Allocations refused", 8, EACH, (
        (per_second("mem_anon_alloc_fail"), "{{alias}}"),)),
    Panel("Locked memory and cap", 8, BYTES, (
        (c("mem_locked_bytes"), "{{alias}}"), (c("mem_locked_limit_bytes"), "{{alias}} cap"))),
    row("Network"),
    Panel("Traffic", 8, RATE, (
        (per_second("net_agg_bytes_in"), "{{alias}} {{interface}} received"),
        ("-" + per_second("net_agg_bytes_out"), "{{alias}} {{interface}} sent"))),
    Panel("Packets", 8, "pps", (
        (per_second("net_agg_packets_in"), "{{alias}} {{interface}} received"),
        ("-" + per_second("net_agg_packets_out"), "{{alias}} {{interface}} sent"))),
    Panel("Drops and errors", 8, "pps", (
        (per_second("net_drops_in_total"), "{{alias}} {{interface}} inbound drops"),
        (per_second("net_drops_out_total"), "{{alias}} {{interface}} outbound drops"),
        (per_second("net_errors_in_total"), "{{alias}} {{interface}} inbound errors"),
        (per_second("net_errors_out_total"), "{{alias}} {{interface}} outbound errors"))),
    Panel("TCP connections", 8, COUNT, (
        (c("tcp_current_established_connections_total"), "{{alias}} established"),)),
    Panel("TCP connections dropped", 8, EACH, (
        (per_second("tcp_listen_drop_count"), "{{alias}} listen queue full"),
        (per_second("tcp_listen_drop_Qzero_count"), "{{alias}} half-open queue full"),
        (per_second("tcp_failed_connection_attempt_count"), "{{alias}} attempts failed"))),
    Panel("TCP retransmissions", 8, SHARE, (
        (f"{per_second('tcp_retransmitted_segment_count')} / "
         f"{per_second('tcp_segments_out_total')}", "{{alias}}"),)),
    row("Files"),
    Panel("Reads and writes", 8, RATE, (
        (per_second("vfs_bytes_read_count"), "{{alias}} read"),
        ("-" + per_second("vfs_bytes_written_count"), "{{alias}} written"))),
    Panel("Busy", 8, SHARE, (
        (f"{per_second('vfs_run_time_count')} / 1e9", "{{alias}}"),)),
    Panel("Slow operations", 8, EACH, (
        (per_second("vfs_slow_operations_total"), "{{alias}} over {{over}}"),)),
    Panel("Disk space and quota", 8, BYTES, (
        (c("zfs_used"), "{{alias}} used"), (c("zfs_quota"), "{{alias}} quota"))),
    Panel("Delayed by the I/O throttle", 8, SHARE, (
        (per_second("vfs_delay_seconds_total"), "{{alias}}"),)),
    row("Processes"),
    Panel("Processes and cap", 8, COUNT, (
        (c("proc_processes"), "{{alias}}"), (c("proc_processes_limit"), "{{alias}} cap"))),
    Panel("Failed forks and mappings", 8, EACH, (
        (per_second("proc_fork_failures_total"), "{{alias}} {{reason}}"),
        (per_second("proc_map_failures_total"), "{{alias}} mappings"))),
    Panel("Age of samples", 8, TIME, (
        (f"max by (alias, collector) ({c('cmon_sample_age_seconds')})",
         "{{alias}} {{collector}}"),)),
)
NODE = (
    row("CPU"),
    Panel("CPUs by mode", 8, COUNT, (
        (by_alias(per_second("cpu_user_seconds_total")), "{{alias}} user"),
        (by_alias(per_second("cpu_kernel_seconds_total")), "{{alias}} kernel"),
        (by_alias(per_second("cpu_interrupt_seconds_total")), "{{alias}} interrupts"),
        (f"sum by (alias) ({c('cpu_info_cpus')})", "{{alias}} CPUs")),
        description="1 means one CPU."),
    Panel("Threads", 8, COUNT, (
        (c("load_average", 'job=~"$job"'), "{{alias}} load average"),),
        description="Runnable threads, not CPUs."),
    Panel("CPUs by state", 8, COUNT, ((c("cpu_info_cpus"), "{{alias}} {{state}}"),)),
    row("Memory"),
    Panel("Memory", 8, BYTES, (
        (c("memory_total_bytes"), "{{alias}} total"), (c("memory_free_bytes"), "{{alias}} free"),
        (c("memory_kernel_bytes"), "{{alias}} kernel"),
        (c("arcstats_size_bytes"), "{{alias}} ARC"))),
    Panel("Memory pressure", 8, EACH, (
        (per_second("memory_low_scans_total"), "{{alias}} scans"),
        (per_second("memory_throttles_total"), "{{alias}} allocations delayed"))),
    Panel("Swap", 8, BYTES, (
        (c("swap_available_bytes"), "{{alias}} available"),
        (c("swap_reserved_bytes"), "{{alias}} reserved"))),
    row("Disks"),
    Panel("Busy", 8, SHARE, (
        (per_second("disk_busy_seconds_total"), "{{alias}} {{device}}"),)),
    Panel("Waiting operations", 8, COUNT, (
        (per_second("disk_wait_length_seconds_total"), "{{alias}} {{device}}"),),
        description="Mean length of the queue."),
    Panel("Reads and writes", 8, RATE, (
        (per_second("disk_read_bytes_total"), "{{alias}} {{device}} read"),
        ("-" + per_second("disk_written_bytes_total"), "{{alias}} {{device}} written"))),
    Panel("Pool space used", 8, SHARE, (
        (f"{c('zpool_allocated_bytes')} / {c('zpool_size_bytes')}", "{{alias}} {{pool}}"),)),
    Panel("Pool fragmentation", 8, "percent", (
        (c("zpool_fragmentation_percent"), "{{alias}} {{pool}}"),)),
    Panel("Pool health", 8, COUNT, ((c("zpool_health_status"), "{{alias}} {{pool}}"),),
          description="0 is online; for any other value see `zpool status`."),
    row("Network"),
    Panel("Traffic", 8, RATE, (
        (per_second("link_bytes_in_total"), "{{alias}} {{link}} received"),
        ("-" + per_second("link_bytes_out_total"), "{{alias}} {{link}} sent"))),
    Panel("Drops and errors", 8, "pps", (
        (per_second("link_drops_in_total"), "{{alias}} {{link}} inbound drops"),
        (per_second("link_drops_out_total"), "{{alias}} {{link}} outbound drops"),
        (per_second("link_errors_in_total"), "{{alias}} {{link}} inbound errors"),
        (per_second("link_errors_out_total"), "{{alias}} {{link}} outbound errors"))),
    Panel("Clock offset", 8, TIME, ((c("ntp_pll_offset_seconds"), "{{alias}}"),)),
    row("Sold to zones"),
    Panel("CPU sold and available", 8, COUNT, (
        (c("alloc_cpu_caps_cpus"), "{{alias}} sold"), (c("alloc_cpus"), "{{alias}} available")),
        description="Sold: the sum of the zones' CPU caps."),
    Panel("Memory sold and available", 8, BYTES, (
        (c("alloc_memory_caps_bytes"), "{{alias}} sold"),
        (c("alloc_memory_bytes"), "{{alias}} available")),
        description="Sold: the sum of the zones' memory caps."),
    Panel("Zones by state", 8, COUNT, ((c("zones_in_state"), "{{alias}} {{state}}"),)),
    row("The agent"),
    Panel("Agent CPU and budget", 8, SHARE, (
        ("cmon_agent_cpu_usage_ratio", "{{instance}}"),
        ("cmon_agent_cpu_budget_ratio", "{{instance}} budget")), description="Share of one CPU."),
    Panel("Lifetime stretch", 8, COUNT, (
        ("cmon_agent_lifetime_stretch_ratio", "{{instance}}"),),
        description="Above 1, the agent is over its budget and renews samples less often."),
    Panel("Agent memory", 8, BYTES, (
        ("process_resident_memory_bytes * on (instance, job) cmon_agent_build_info",
         "{{instance}}"),)),
)
PROXY = (
    Panel("Inventory ready", 4, COUNT, (("min(cmon_proxy_inventory_ready)", ""),), "stat",
          "1 means that the proxy has loaded a complete inventory."),
    Panel("Inventory age", 4, TIME, (("max(cmon_proxy_inventory_age_seconds)", ""),),
          "stat"),
    Panel("Containers", 4, COUNT, (("max(sum by (instance) (cmon_proxy_inventory_vms))", ""),),
          "stat"),
    Panel("Compute nodes", 4, COUNT, (("max(cmon_proxy_inventory_nodes)", ""),), "stat"),
    Panel("Silent nodes", 4, COUNT, (
        ("count(min by (server) (cmon_proxy_node_up) == 0) or vector(0)", ""),), "stat"),
    Panel("Server certificate expires in", 4, TIME, ((
        "min(cmon_proxy_server_certificate_expiry_timestamp_seconds) - time()", ""),), "stat"),
    Panel("Relayed pages by result", 12, "reqps", (
        ("sum by (result) (rate(cmon_proxy_relays_total[$__rate_interval]))", "{{result}}"),)),
    Panel("Requests by account", 12, "reqps", (
        ("topk(10, sum by (account) (rate(cmon_proxy_account_requests_total[$__rate_interval])))",
         "{{account}}"),)),
    Panel("Bytes by account", 12, RATE, (
        ("topk(10, sum by (account) "
         "(rate(cmon_proxy_account_response_bytes_total[$__rate_interval])))", "{{account}}"),)),
    Panel("CPU by account", 12, SHARE, (
        ("topk(10, sum by (account) "
         "(rate(cmon_proxy_account_cpu_seconds_total[$__rate_interval])))", "{{account}}"),),
        description="Share of one CPU."),
    Panel("Requests to nodes in flight", 12, COUNT, (
        ("topk(10, sum by (server) (cmon_proxy_node_in_flight))", "{{server}}"),
        ("topk(10, sum by (server) (cmon_proxy_node_waiting))", "{{server}} waiting"))),
    Panel("Connections by state", 12, COUNT, (
        ("sum by (state) (cmon_proxy_http_connections)", "{{state}}"),)),
    Panel("Proxy CPU", 12, SHARE, (
        ("rate(process_cpu_seconds_total[$__rate_interval]) * on (instance, job) "
         "cmon_proxy_build_info", "{{instance}}"),), description="Share of one CPU."),
    Panel("Proxy memory", 12, BYTES, (
        ("process_resident_memory_bytes * on (instance, job) cmon_proxy_build_info",
         "{{instance}}"),)),
)
# name, title, query of the variable `alias` ("": no such variable), panels
DASHBOARDS = (
    ("fleet", "Containers: fleet", "label_values(mem_agg_usage, alias)", FLEET),
    ("container", "Containers: one container", "label_values(mem_agg_usage, alias)", CONTAINER),
    ("node", "Compute node", "label_values(cpu_info_cpus, alias)", NODE),
    ("proxy", "Proxy", "", PROXY),
)


def uid(name: str) -> str:
    """The UID of a dashboard, which links use; the same in every Grafana."""
    return f"cmon-{name}"


def panel(number: int, wanted: Panel, x: int, y: int) -> dict[str, Any]:
    """A panel as Grafana's JSON."""
    height = {"row": 1, "stat": 4}.get(wanted.kind, 8)
    made: dict[str, Any] = {"id": number, "type": wanted.kind, "title": wanted.title,
                            "gridPos": {"x": x, "y": y, "w": wanted.width, "h": height}}
    if wanted.kind == "row":
        return {**made, "collapsed": False, "panels": []}
    defaults: dict[str, Any] = {"unit": wanted.unit}
    if wanted.kind == "timeseries":
        defaults["custom"] = {"fillOpacity": 10, "showPoints": "never"}
        made["options"] = {"legend": {"displayMode": "list", "placement": "bottom"},
                           "tooltip": {"mode": "multi"}}
    if not any(expression.startswith("-") for expression, _ in wanted.targets) \
            and wanted.title != "Clock offset":
        defaults["min"] = 0
    if wanted.unit == SHARE and wanted.kind == "bargauge":
        defaults["max"] = 1
    if wanted.link:
        defaults["links"] = [{"title": "This container", "url": f"/d/{uid(wanted.link)}?"
                              "var-alias=${__field.labels.alias}&${datasource:queryparam}"}]
    if wanted.description:
        made["description"] = wanted.description
    return {**made, "datasource": SOURCE, "fieldConfig": {"defaults": defaults, "overrides": []},
            "targets": [{"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expression,
                         "legendFormat": legend, **({"instant": True} if wanted.kind in (
                             "stat", "bargauge") else {})}
                        for index, (expression, legend) in enumerate(wanted.targets)]}


def variable(name: str, query: str, label: str) -> dict[str, Any]:
    """A drop-down list above the panels, filled by a query."""
    return {"name": name, "type": "query", "label": label, "datasource": SOURCE, "query": query,
            "refresh": 2, "sort": 1, "includeAll": True, "multi": True, "allValue": ".*"}


def dashboard(name: str) -> dict[str, Any]:
    """A dashboard as Grafana imports it."""
    title, query, panels = next(row[1:] for row in DASHBOARDS if row[0] == name)
    variables: list[dict[str, Any]] = [{"name": "datasource", "type": "datasource",
                                        "query": "prometheus", "label": "Prometheus"}]
    if query:
        variables.append(variable("alias", query, "node" if name == "node" else "container"))
    if name == "node":
        variables.append(variable("job", "label_values(cpu_info_cpus, job)", "job"))
    placed, x, y, height = [], 0, 0, 0
    for number, wanted in enumerate(panels, 1):
        if x + wanted.width > 24:
            x, y = 0, y + height
        placed.append(panel(number, wanted, x, y))
        x, height = x + wanted.width, placed[-1]["gridPos"]["h"]
    return {
        "uid": uid(name), "title": title, "tags": ["container-monitor"], "schemaVersion": 38,
        "version": 1, "editable": True, "refresh": "30s", "time": {"from": "now-1h", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["container-monitor"], "asDropdown": True,
                   "title": "Container Monitor", "includeVars": True, "keepTime": True}],
        "templating": {"list": variables}, "panels": placed}


def text(name: str) -> str:
    """The file's content."""
    return json.dumps(dashboard(name), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in DASHBOARDS:
        (FOLDER / f"{each[0]}.json").write_text(text(each[0]), "utf-8")
