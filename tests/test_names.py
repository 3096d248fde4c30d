# SPDX-License-Identifier: MPL-2.0
"""Every row of every table: the original's names to the letter, ours by Prometheus's rules."""
from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

import cmon_agent as agent

ORIGINAL = list(csv.DictReader(Path(__file__).with_name("metrics.tsv").open(encoding="utf-8"),
                               delimiter="\t"))
METADATA = agent.metadata()
OWN = [row for row in METADATA if row["source"] != "agent"]
SCOPES = {"vm": ("zone",), "gz": ("node",), "both": ("zone", "node")}

# Names of the original that break the rules; dashboards depend on them.
TOTAL_ON_A_GAUGE = {"tcp_current_established_connections_total"}
NO_TOTAL_ON_A_COUNTER = {row["metric"] for row in ORIGINAL if row["type"] == "counter"
                         and not row["metric"].endswith("_total")}
INHERITED = {row["metric"] for row in ORIGINAL}
NO_BASE_UNIT = re.compile(r"_(milliseconds|millis|ms|microseconds|us|nanoseconds|ns|kilobytes|kb|"
                          r"megabytes|mb|minutes|hours|bits|percent)(_|$)")


@pytest.mark.parametrize("row", ORIGINAL, ids=[f"{row['scope']} {row['metric']}"
                                               for row in ORIGINAL])
def test_metrics_of_the_original_exist(row: dict[str, str]) -> None:
    for scope in SCOPES[row["scope"]]:
        found = [one for one in METADATA if one["name"] == row["metric"]
                 and one["scope"] == scope]
        assert [(one["type"], one["collector"], ",".join(one["labels"])) for one in found] == \
            [(row["type"], row["collector"], row["labels"])]


def tables() -> list[tuple[str, agent.Metric]]:
    return [(f"{table.collector} {metric.name} {metric.member}", metric)
            for table in agent.ZONE_TABLES + agent.NODE_TABLES for metric in table.metrics] + [
        (f"{collector.name} {metric.name}", metric)
        for collector in agent.ZONE_COLLECTORS + agent.NODE_COLLECTORS
        for metric in collector.metrics]


@pytest.mark.parametrize("metric", [row[1] for row in tables()], ids=[row[0] for row in tables()])
def test_rows_follow_the_rules(metric: agent.Metric) -> None:
    assert agent.valid_metric_name(metric.name) and metric.name.lower() == metric.name or \
        metric.name in INHERITED
    assert metric.kind in (agent.COUNTER, agent.GAUGE)
    assert re.fullmatch(r"[A-Z1].*[^ .]\.", metric.help), "help is a sentence"
    assert "(" not in metric.help
    if metric.name.endswith("_total"):
        assert metric.kind == agent.COUNTER or metric.name in TOTAL_ON_A_GAUGE
    elif metric.kind == agent.COUNTER:
        assert metric.name in NO_TOTAL_ON_A_COUNTER
    for name, value in metric.labels:
        assert agent.valid_label_name(name) and value
    if metric.name not in INHERITED:
        assert not NO_BASE_UNIT.search(metric.name)
        stem = re.sub(r"(_in|_out)?(_total)?$", "", metric.name)
        unit = metric.unit.name
        if unit in ("bytes", "seconds"):
            assert stem.endswith("_" + unit)
        else:
            assert not stem.endswith(("_bytes", "_seconds"))


def test_rows_of_one_name_agree_and_are_adjacent() -> None:
    for table in agent.ZONE_TABLES + agent.NODE_TABLES:
        seen: dict[str, agent.Metric] = {}
        last = ""
        for metric in table.metrics:
            if metric.name in seen:
                assert last == metric.name
                assert metric.labels != seen[metric.name].labels
                assert (metric.kind, metric.help) == (seen[metric.name].kind,
                                                      seen[metric.name].help)
            seen[metric.name], last = metric, metric.name


def test_a_name_belongs_to_one_collector_of_a_page() -> None:
    names = [(row["scope"], row["name"]) for row in METADATA]
    assert len(names) == len(set(names))


def test_help_ends_with_the_source() -> None:
    assert agent.help_of(agent.MEMCAP.metrics[0], agent.MEMCAP) == \
        "Resident memory of the zone in bytes (kstat memory_cap:*:*:rss)."
    assert all(row["source"] for row in METADATA)


def test_pages_are_ordered_by_name_with_time_last() -> None:
    for collectors in (agent.ZONE_COLLECTORS, agent.NODE_COLLECTORS):
        names = [one.name for one in collectors]
        assert names[-1] == "time"
        assert names[:-1] == sorted(names[:-1])


def test_use_tables_name_existing_metrics() -> None:
    names = {(row["scope"], row["name"]) for row in OWN}
    for use in agent.USE:
        for name in use.utilisation + use.saturation + use.errors + use.share:
            assert (use.scope, name) in names
        assert len(use.share) in (0, 1, 2)
    judged = {name for use in agent.USE for name in use.saturation + use.errors}
    assert {*agent.USE_FROM, *agent.USE_UP} <= judged


def test_quirks_name_existing_metrics() -> None:
    assert set(agent.QUIRKS) <= {row["name"] for row in METADATA}


@pytest.mark.parametrize("member, grows", [
    (("zones", "nsec_user"), True), (("zones", "avenrun_1min"), False),
    (("zones", "boot_time"), False), (("memory_cap", "rss"), False), (("disk", "nread"), True),
    (("zfs", "hdr_size"), False), (("zfs", "l2_read_bytes"), True), (("unix", "updates"), True),
    (("vmm", "time_run"), True), (("tcp", "currEstab"), False)])
def test_counters_are_known_by_member(member: tuple[str, str], grows: bool) -> None:
    assert (member in agent.COUNTER_MEMBERS) is grows


def test_metadata_is_valid_json() -> None:
    kinds: dict[str, Any] = {"name": str, "collector": str, "scope": str, "type": str,
                             "unit": str, "help": str, "source": str, "lifetime": float,
                             "labels": list, "use": str, "quirk": str}
    for row in METADATA:
        assert {name: type(value) for name, value in row.items()} == kinds
