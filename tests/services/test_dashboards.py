# SPDX-License-Identifier: MPL-2.0
"""Every expression of rules and dashboards in a real Prometheus with the recorded node's data."""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from datacenter import SERVICE, DataCenter, need_root

from support import EXAMPLES, NODE, wait_until

ALIAS = {"source_labels": ["__meta_triton_machine_alias"], "target_label": "alias"}

# what the recorded node does not have: silence, and a cap on processes
NOTHING = ("cmon_instance_node_reachable == 0)", 'cmon_instance_last_scrape_result{result!="ok"}',
           "proc_processes_limit")


def expressions() -> Iterator[tuple[str, str, str]]:
    """Each with where it is and its legend; Grafana's variables filled in."""
    for path in sorted((EXAMPLES / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"].replace("$__rate_interval", "10s")
                yield (f"{path.name}: {panel['title']}", re.sub(
                    r"\$(alias|job)", ".*", expression), target.get("legendFormat", ""))


def jobs(center: DataCenter) -> list[dict[str, Any]]:
    """What examples/prometheus.yml and prometheus-operator.yml have."""
    containers, nodes = center.http_job("alice"), center.http_job("admin", "/v1/gz/sd")
    guests = center.http_job("bob")         # has virtual machines
    for name, job in (("containers", containers), ("guests", guests), ("nodes", nodes)):
        job.update(job_name=name, relabel_configs=[ALIAS])
    fleet = {"job_name": "fleet", "scheme": "https", "honor_labels": True,
             "metrics_path": "/v1/fleet/metrics", "tls_config": containers["tls_config"],
             "static_configs": [{"targets": [f"{SERVICE}:{center.address[1]}"]}]}
    plain = [{"job_name": name, "static_configs": [{"targets": [f"{host}:{port}"]}]}
             for name, (host, port) in (("agents", center.agents[0].address),
                                        ("proxies", center.admin))]
    return [containers, guests, nodes, fleet, *plain]


def test_every_expression_runs_and_all_draw_something(center: DataCenter) -> None:
    need_root()
    center.start_agent("--replay", NODE)
    center.start_proxy()
    center.start_name_server(SERVICE)
    prometheus = center.start_prometheus(jobs(center), rule_files=[str(EXAMPLES / "rules.yml")])
    for job, count in (("containers", len(center.vms("alice"))), ("nodes", 1), ("fleet", 1),
                       ("agents", 1), ("proxies", 1)):
        prometheus.wait_for_up(job, count)
    everything = list(expressions())
    assert len(everything) > 100
    waiting = {number: one for number, one in enumerate(everything)
               if not any(word in one[1] for word in NOTHING)}

    missing: dict[str, set[str]] = {}           # labels of a legend that series do not have

    def all_drawn() -> bool:
        """Rates need two scrapes, means of the node need two readings of its kernel."""
        for number, (_, expression, legend) in list(waiting.items()):
            drawn = prometheus.api("query", query=expression)["result"]
            if drawn:
                del waiting[number]
            labels = set(re.findall(r"\{\{(\w+)\}\}", legend))
            missing.update({expression: labels - series["metric"].keys() for series in drawn
                            if not labels <= series["metric"].keys()})
        return not waiting
    try:
        wait_until(all_drawn)
    except AssertionError:
        raise AssertionError(f"what draws nothing: {waiting}") from None
    assert missing == {}
    for _, expression, _ in everything:
        prometheus.api("query", query=expression)       # asserts that it is taken
    # the rules have been loaded, and are evaluated without error
    groups = prometheus.api("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(re.findall("(?m)^ +- (?:alert|record):",
                                        (EXAMPLES / "rules.yml").read_text()))
    for rule in rules:
        prometheus.api("query", query=rule["query"])
        assert not rule.get("lastError"), rule
