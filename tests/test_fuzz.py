# SPDX-License-Identifier: MPL-2.0
"""Seeded garbage from commands, plugins, zones and daemons raises only CollectError."""
from __future__ import annotations

import json
import random
import time
from typing import Any, Callable

import pytest
from nodes import placed

import cmon_agent as agent

Parser = Callable[[str], Any]


def ntp(output: str) -> Any:
    peers = agent.parse_apeers(output)
    agent.system_peer(peers)
    return agent.ntp_part(peers, agent.parse_ntp_details(output))


PARSERS: dict[str, Parser] = {
    "zfs list": lambda text: next((agent.zfs_part(row) for row in agent.parse_list(
        "zfs list", text, agent.ZFS_COLUMNS).values()), agent.NOTHING),
    "zpool list": lambda text: agent.zpool_part(
        agent.parse_list("zpool list", text, agent.ZPOOL_COLUMNS), agent.Reading([], [])),
    "zoneadm list": lambda text: agent.zone_states(agent.parse_zoneadm(text)),
    "ntpq": ntp,
    "chronyc": lambda text: agent.chrony_families(text, text),
    "plugin": lambda text: agent.plugin_families("p-1", text, False)[0],
    "plugin in Prometheus's format": lambda text: agent.plugin_families("p.1", text, True)[0],
    "text file": lambda text: agent.foreign_families("app_", text, 1000)[0],
}
WORDS = ["zones", "\t", "\n", " ", ":", "-", "*", "+", "x", ",", "=", "#", "0", "12", "0x1", "377",
         "1.58x", "31%", "ONLINE", "gauge", "counter", "option", "ttl", "# TYPE ", "# HELP ", "{",
         "}", '"', "\\", "\\n", "a", 'a{b="c"} ', "associd=0 status", "associd=41210 status",
         "calibration interval   4", "reference time:", "ed07c400.40000000", "(no time)",
         ".GPS.", "u", "1e999", "9" * 500, "NaN", "\x00", "\u00e9", "\u0661", "\ud800", "\r\n",
         "# OPTION ttl 5\n", "offset", "leap", "\x1c", "\x85", "2001:db8:0:643:"]


def mutated(source: random.Random, text: str) -> str:
    """Valid output with parts removed, duplicated or replaced."""
    for _ in range(source.randrange(1, 6)):
        at, size = source.randrange(len(text) + 1), source.randrange(12)
        text = text[:at] + source.choice(["", source.choice(WORDS), text[at:at + size] * 2]) \
            + text[at + size:]
    return text


@pytest.fixture(scope="module")
def outputs(recorded_node: dict[str, Any]) -> list[str]:
    found = [output["stdout"] for output in recorded_node["frames"][0]["commands"].values()]
    return [*found, "a\tgauge\t1\thelp\nttl\toption\t5\n", "# TYPE a gauge\na{b=\"c\"} 1\n",
            "7F7F0101,,1,1767225600.1,0.000001,0.0,0.0,-1.2,0.0,0.1,0.01,0.002,64.2,Normal\n"
            "^,*,192.0.2.1,2,6,377,33,0.0001,0.0002,0.01\n"]


@pytest.mark.parametrize("name", PARSERS)
def test_garbage_is_survived(name: str, outputs: list[str]) -> None:
    source = random.Random(name)
    for turn in range(600):
        text = "".join(source.choices(WORDS, k=source.randrange(80))) if turn % 2 else \
            mutated(source, source.choice(outputs))
        try:
            found = PARSERS[name](text)
        except agent.CollectError as error:
            assert str(error)
            continue
        page = found.text() if isinstance(found, agent.Part) else \
            agent.render(agent.merge(found)[0])
        assert agent.render(agent.parse(page)) == page


HOSTILE = ["\n" * 400_000, "\t" * 400_000, "a\n" * 200_000, ":" * 400_000, "=" * 400_000,
           "a=" * 200_000, "\\" * 400_000, "\\:" * 200_000, " " * 400_000, "9" * 400_000,
           "associd=1 \n" + "a" * 400_000, "a{" * 200_000, 'a{b="' + "\\\\" * 200_000,
           "calibration interval" + " " * 400_000, "# OPTION ttl" + " " * 400_000 + "x",
           " " * 16 + " )" * 100_000 + " 1 2 3 4 5 6 7 8", "# TYPE " * 50_000, "1," * 200_000,
           "a" * 17 + "1 " * 100_000]


@pytest.mark.parametrize("name", PARSERS)
def test_huge_input_is_parsed_quickly(name: str) -> None:
    for text in HOSTILE:
        began = time.process_time()
        try:
            PARSERS[name](text)
        except agent.CollectError:
            pass
        assert time.process_time() - began < 3.0, (name, text[:20])


VALUES: list[Any] = [None, True, 0, -1, 2 ** 70, 1.5, float("nan"), "", "x", "8881", "8881,x",
                     "\ud800", [], {}, [None], [[]], [{}], {"tags": None}]


def value(source: random.Random, depth: int) -> Any:
    if depth == 0 or source.random() < 0.3:
        return source.choice(VALUES)
    if source.random() < 0.3:
        return [value(source, depth - 1) for _ in range(source.randrange(3))]
    names = ["nics", "interface", "nic_tag", "network_uuid", "tags", "customer_metadata",
             "metricPorts", "smartdc_role", "owner_uuid"]
    return {name: value(source, depth - 1) for name in source.sample(names, source.randrange(9))}


def test_any_answer_of_vminfod_is_survived() -> None:
    source = random.Random(7)
    for _ in range(4000):
        vm = value(source, 4)
        for tag, network in agent.nic_labels(vm).values():
            (tag + network).encode()
        assert all(0 < port < 65536 for port in agent.metric_ports(vm))
        assert agent.is_core(vm) in (True, False)


def test_any_kstat_is_survived(recorded_node: dict[str, Any]) -> None:
    """Values of a wrong type cost their samples only."""
    source = random.Random(8)
    kstats = json.loads(json.dumps(recorded_node["frames"][0]["kstats"]))
    for record in kstats:
        for member in record["data"]:
            if member != "zonename" and source.random() < 0.4:
                record["data"][member] = source.choice([None, "x", -1, 2 ** 70, 1.5, ""])
    read = [agent.pack(placed(one["module"], one["instance"], one["name"], one["class"]), 0,
                       one["data"]) for one in kstats]
    came = [agent.from_kstats(((one.name, one.tables),), agent.Reading(read, []),
                              agent.NodeContext()) for one in agent.NODE_COLLECTORS]
    for zone_id in range(20):
        mine = agent.Reading([kstat for kstat in read if kstat.ref.instance == zone_id], [])
        context = agent.ZoneContext(zone_id, b"global")
        came += [agent.from_kstats(((one.name, one.tables),), mine, context)
                 for one in agent.ZONE_COLLECTORS]
    parts = [agent.Part(one.form.templates[0], one.values) for one in came]
    assert sum(bool(part.text() and agent.parse(part.text())) for part in parts) > 20
