# SPDX-License-Identifier: MPL-2.0
"""The recorded node of the examples: current and plausible."""
from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from support import EXAMPLES, NODE, Program, http_get

COUNTERS = {"nsec_user", "nsec_sys", "nsec_waitrq", "nread", "nwritten", "reads", "writes",
            "cpu_nsec_user", "cpu_nsec_idle", "rbytes64", "obytes64", "ipackets64", "inSegs",
            "above_sec", "below_sec", "pgpgin", "hits", "misses", "time_run", "updates"}


def test_the_recorded_node_is_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, EXAMPLES / "make_node.py", tmp_path], check=True)
    for name in ("node.json", "inventory.json", "load.json"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes(), name
    assert NODE.stat().st_size < 1_000_000


def test_it_has_the_zones_that_matter(recorded_node: dict[str, Any]) -> None:
    for frame in recorded_node["frames"]:
        vms = frame["vms"]
        running = [vm for vm in vms if vm["state"] == "running"]
        owners = Counter(vm["owner_uuid"] for vm in running)
        assert len(running) >= 12 and len([o for o in owners if owners[o] >= 3]) >= 3
        assert {vm["brand"] for vm in running} == {"joyent", "lx", "bhyve"}
        assert [vm["alias"] for vm in vms if vm["state"] == "stopped"] == ["old-web"]
        assert any(len(vm["nics"]) == 2 for vm in running)
        assert any(vm["tags"].get("smartdc_role") for vm in running)
        names = [k["data"]["zonename"] for k in frame["kstats"] if k["module"] == "zones"]
        assert sorted(names) == sorted(["global", *(vm["zonename"] for vm in running)])
        uncapped = [k["data"]["zonename"] for k in frame["kstats"] if k["module"] == "memory_cap"
                    and k["data"]["physcap"] == 4096 * (2 ** 32 - 1)]
        capped = {k["data"]["zonename"] for k in frame["kstats"]
                  if k["name"].startswith("cpucaps")}
        assert len(uncapped) == 2 and not capped & set(uncapped)       # batch and the global zone


def test_counters_never_fall_and_the_busy_ones_grow(recorded_node: dict[str, Any]) -> None:
    frames = recorded_node["frames"]
    assert len(frames) >= 2
    grown = 0
    for before, after in zip(frames, frames[1:]):
        assert after["at"] - before["at"] == 15
        assert len(before["kstats"]) == len(after["kstats"])
        for old, new in zip(before["kstats"], after["kstats"]):
            assert (old["module"], old["instance"], old["name"], old["crtime"]) == \
                (new["module"], new["instance"], new["name"], new["crtime"])
            assert new["snaptime"] - old["snaptime"] == 15 * 10 ** 9
            assert old["crtime"] < old["snaptime"]
            for member in COUNTERS & set(old["data"]):
                assert new["data"][member] >= old["data"][member], (old["name"], member)
                grown += new["data"][member] > old["data"][member]
    assert grown > 200


def test_names_are_cut_and_kstats_unique(recorded_node: dict[str, Any]) -> None:
    kstats = recorded_node["frames"][0]["kstats"]
    assert all(len(kstat["name"]) <= 30 for kstat in kstats)
    triples = Counter((k["module"], k["instance"], k["name"]) for k in kstats)
    assert max(triples.values()) == 1


def test_inventory_matches_the_node(recorded_node: dict[str, Any]) -> None:
    inventory = json.loads((EXAMPLES / "inventory.json").read_text())
    vms = {vm["uuid"]: vm for vm in recorded_node["frames"][0]["vms"]}
    assert {vm["uuid"] for vm in inventory["vms"]} == set(vms)
    for vm in inventory["vms"]:
        assert all(vms[vm["uuid"]][name] == value for name, value in vm.items())
    assert {vm["owner_uuid"] for vm in vms.values()} <= {a["uuid"] for a in inventory["accounts"]}
    assert [server["uuid"] for server in inventory["servers"]] == [recorded_node["host"]["UUID"]]


def test_a_replay_contacts_no_recorded_address(recorded_node: dict[str, Any]) -> None:
    [core] = [vm["uuid"] for vm in recorded_node["frames"][0]["vms"]
              if vm["customer_metadata"].get("metricPorts")]
    with Program.agent("--replay", NODE) as agent:
        opts = {"x-joyent-cmon-opts": base64.b64encode(b'{"isCoreZone":true}').decode()}
        page = http_get(agent.address, f"/v1/{core}/metrics", opts)
        assert page.status == 200
        assert 'cmon_collector_up{collector="triton_core"} 0' not in page.text
