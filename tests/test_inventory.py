# SPDX-License-Identifier: MPL-2.0
"""The file inventory, the table of states, who may see what."""
from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from agents import (
    ALICE, BOB, BOBS, CORE, DB, NAT, NODE_1, OPERATOR, STOPPED, WEB, inventory, key, uuid, vm)
from cmon_agent import ConfigError
from cmon_proxy import (
    STATES, Account, AuthorizedKey, Directory, Grant, Inventory, Node, Selection, Vm, by_owner,
    groups_of, may_see, read_inventory, shard_of, state_of, vm_of)


def load(folder: Path, content: Any) -> Any:
    path = folder / "inventory.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_inventory(path, 9163)


def test_a_whole_file(tmp_path: Path) -> None:
    found = load(tmp_path, inventory("10.0.0.5", "10.0.0.6:9999"))
    assert set(found.accounts) == {"alice", "bob", "root"}
    assert found.nodes[NODE_1].address == ("10.0.0.5", 9163)
    assert sorted(node.address for node in found.nodes.values())[1] == ("10.0.0.6", 9999)
    assert set(found.owned[ALICE]) == {WEB, DB, STOPPED, NAT} and set(found.owned[BOB]) == {BOBS}
    assert found.vms[WEB].groups == ("web", "front") and found.vms[NAT].hidden
    assert found.vms[CORE].core and not found.vms[WEB].core
    alice = found.accounts["alice"]
    assert not alice.operator and found.accounts["root"].operator
    assert sorted(holder.name for holder in alice.keys.values()) == ["", "", "", "carol"]


def test_optional_and_unknown_members(tmp_path: Path) -> None:
    found = load(tmp_path, {
        "accounts": [{"uuid": ALICE.upper(), "login": "alice", "keys": [], "hobby": "chess"}],
        "servers": [{"uuid": NODE_1}],
        "vms": [{"uuid": WEB, "owner_uuid": ALICE, "alias": None, "tags": None, "state": None,
                 "server_uuid": None, "brand": 7}],
        "more": 1})
    one = found.vms[WEB]
    assert (one.alias, one.server, one.groups, one.brand, one.state) == ("", "", (), "", "unknown")
    assert found.accounts["alice"].uuid == ALICE and found.nodes[NODE_1].address is None


@pytest.mark.parametrize("content, problem", [
    ("{", "not JSON"), ("[]", "must be an object"), ("{}", "accounts: must be a list"),
    ({"accounts": [], "servers": [], "vms": {}}, "vms: must be a list"),
    ({"accounts": [1], "servers": [], "vms": []}, r"accounts\[0\]: must be an object"),
    ({"accounts": [{"uuid": ALICE}], "servers": [], "vms": []}, r"accounts\[0\]: needs a login"),
    ({"accounts": [{"uuid": "x", "login": "a"}], "servers": [], "vms": []}, "needs a uuid"),
    ({"accounts": [{"uuid": ALICE, "login": "a", "keys": ["ssh-rsa AAAA"]}], "servers": [],
      "vms": []}, r"accounts\[0\].keys\[0\]"),
    ({"accounts": [{"uuid": ALICE, "login": "a", "keys": "x"}], "servers": [], "vms": []},
     r"accounts\[0\].keys\[0\]"),
    ({"accounts": [{"uuid": ALICE, "login": "a", "operator": "yes"}], "servers": [], "vms": []},
     "operator: must be true or false"),
    ({"accounts": [{"uuid": ALICE, "login": "a", "administrators": [3]}], "servers": [],
      "vms": []}, r"administrators\[0\]"),
    ({"accounts": [{"uuid": ALICE, "login": "a"}] * 2, "servers": [], "vms": []}, "stands twice"),
    ({"accounts": [], "servers": [{"uuid": NODE_1}] * 2, "vms": []}, "stands twice"),
    ({"accounts": [], "servers": [], "vms": [vm(WEB, ALICE)] * 2}, "stands twice"),
    ({"accounts": [], "servers": [{"uuid": NODE_1, "admin_ip": "cn1.example"}], "vms": []},
     "must be an IP address"),
    ({"accounts": [], "servers": [{"uuid": NODE_1, "admin_ip": 7}], "vms": []}, "IP address"),
    ({"accounts": [], "servers": [], "vms": [{"uuid": WEB}]}, r"vms\[0\]: needs uuid and owner"),
], ids=lambda value: json.dumps(value)[:50])
def test_a_bad_file_is_refused_whole(content: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(tmp_path, content)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.json: no such file"):
        read_inventory(tmp_path / "absent.json", 9163)


def test_all_problems_are_told_but_not_without_end(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {"accounts": [1] * 3, "servers": [], "vms": [2] * 100})
    assert len(caught.value.problems) == 20


ROWS = {    # state: listed, listed with stopped, page, on the fleet page
    "running": (1, 1, 1, 1), "stopped": (0, 1, 0, 1), "stopping": (1, 1, 1, 1),
    "shutting_down": (1, 1, 1, 1), "down": (0, 1, 0, 1), "halting": (1, 1, 1, 1),
    "ready": (0, 1, 0, 1), "installed": (0, 1, 0, 1), "configured": (0, 1, 0, 1),
    "provisioning": (0, 0, 0, 1), "receiving": (0, 0, 0, 1), "sending": (1, 1, 1, 1),
    "incomplete": (0, 0, 0, 0), "failed": (0, 0, 0, 0), "destroyed": (0, 0, 0, 0),
    "deleted": (0, 0, 0, 0), "unknown": (1, 1, 1, 1),
}


@pytest.mark.parametrize("name", sorted(STATES))
def test_each_state(name: str) -> None:
    assert tuple(map(int, STATES[name])) == ROWS[name]


def test_states_are_all_here_and_a_new_one_does_not_vanish() -> None:
    assert set(ROWS) == set(STATES)
    assert state_of("quantum") == STATES["unknown"]


@pytest.mark.parametrize("record", [None, [], 7, "x", {}, {"uuid": WEB}, {"owner_uuid": ALICE},
                                    {"uuid": 7, "owner_uuid": ALICE},
                                    {"uuid": "../../etc", "owner_uuid": ALICE}])
def test_a_record_that_cannot_be_used_is_none(record: Any) -> None:
    assert vm_of(record, "test", "") is None


def test_odd_members_survive() -> None:
    generator = random.Random(4)
    odd = [None, "", "x", 7, -1.5, True, [], {}, [1], {"a": 1}, "triton.cmon.groups"]
    for _ in range(2000):
        record = {name: generator.choice(odd) for name in (
            "alias", "server_uuid", "image_uuid", "brand", "state", "tags", "nics")}
        if generator.random() < 0.5:
            record["tags"] = {name: generator.choice(odd) for name in (
                "triton.cmon.groups", "smartdc_role", "manta_role")}
        found = vm_of({"uuid": WEB, "owner_uuid": ALICE, **record}, "test", "")
        assert found is not None and all(isinstance(value, (str, bool, tuple)) for value in found)


def made(number: int, owner: str = ALICE, **more: Any) -> Vm:
    found = vm_of(vm(uuid(number), owner, **more), "test", "now")
    assert found is not None
    return found


def test_changes_are_followed_and_told() -> None:
    inventory_ = Inventory()
    told: list[Any] = []
    inventory_.changed.append(lambda before, after: told.append((before, after)))
    first = made(1)
    assert inventory_.put(first) and not inventory_.put(first._replace(since="later"))
    before = inventory_.generation(ALICE)
    assert inventory_.put(first._replace(alias="new")) and inventory_.generation(ALICE) != before
    assert inventory_.owned[ALICE][WEB].alias == "new"
    assert inventory_.put(first._replace(owner=BOB))
    assert ALICE not in inventory_.owned and WEB in inventory_.owned[BOB]
    assert inventory_.put(first._replace(owner=BOB, state="destroyed"))
    assert not inventory_.vms and not inventory_.owned and not inventory_.drop(WEB)
    assert [after.alias if after else None for _, after in told] == ["vm1", "new", "vm1", None]


def test_generations_stay_bounded() -> None:
    inventory_ = Inventory()
    seen = set()
    for number in range(10_050):
        inventory_.put(made(1, owner=uuid(number)))
        seen.add(inventory_.generation(uuid(number)))
    assert len(inventory_.generations) < 10_050
    inventory_.replace(*by_owner([made(2), made(3, state="destroyed")]))
    assert set(inventory_.vms) == {uuid(2)}


def granted(owner: str = ALICE, operator: bool = False, groups: Any = None) -> Grant:
    return Grant(Account(owner, "x", {}, operator), groups, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("who, target, allowed", [
    (granted(), made(1), True), (granted(BOB), made(1), False),
    (granted(BOB, operator=True), made(1), False),                 # operators see nodes, not zones
    (granted(), made(1, tags={"smartdc_role": "nat"}), False),
    (granted(groups=frozenset(("web",))), made(1), False),
    (granted(groups=frozenset(("web",))), made(1, tags={"triton.cmon.groups": "web"}), True),
    (granted(groups=frozenset()), made(1, tags={"triton.cmon.groups": "web"}), False),
    (granted(), Node(NODE_1, "", None), False),
    (granted(operator=True), Node(NODE_1, "", None), True),
    (granted(operator=True, groups=frozenset(("web",))), Node(NODE_1, "", None), False),
    (granted(), None, False), (granted(operator=True), None, False),
])
def test_may_see(who: Grant, target: Any, allowed: bool) -> None:
    assert may_see(who, target) is allowed


def test_mantas_role_is_a_group_of_its_owner_alone() -> None:
    one = made(1, OPERATOR, tags={"manta_role": "moray", "triton.cmon.groups": "a"})
    assert groups_of(one, OPERATOR) == ("a", "moray") and groups_of(one, BOB) == ("a",)
    assert groups_of(one, "") == ("a",)


def test_accounts_that_stay_the_same_stay_the_same_object() -> None:
    directory = Directory()
    first = {"a": Account("1", "a", {}), "b": Account("2", "b", {})}
    directory.replace(first)
    directory.replace(directory.merged(
        {"a": Account("1", "a", {}), "b": Account("2", "b", {}, True)}))
    assert directory.find("a") is first["a"] and directory.find("b") is not first["b"]
    assert directory.find("c") is None


def test_users_of_the_file(tmp_path: Path) -> None:
    content = inventory("10.0.0.1")
    content["accounts"][0]["users"] = [
        {"login": "dave", "keys": [key("ec521")], "groups": ["web"]},
        {"login": "erin", "keys": [key("other")]}]
    holders: dict[str, AuthorizedKey] = {
        holder.name: holder for holder in load(tmp_path, content).accounts["alice"].keys.values()}
    assert holders["dave"].groups == {"web"} and holders["erin"].groups == frozenset()
    assert holders["carol"].groups is None


def test_shards_are_a_partition_and_move_little() -> None:
    names = [uuid(number * 7919) for number in range(2000)]
    for count in (1, 2, 5, 16):
        shards = [{name for name in names if shard_of(name, count) == k} for k in range(count)]
        assert sum(map(len, shards)) == len(names) and set().union(*shards) == set(names)
        assert min(map(len, shards)) > len(names) / count * 0.7
    moved = sum(shard_of(name, 5) != shard_of(name, 6) for name in names)
    assert 0.12 < moved / len(names) < 0.22          # 1/6, none of them between old shards
    assert all(shard_of(name, 6) in (shard_of(name, 5), 5) for name in names)


@pytest.mark.parametrize("query, expected", [
    ({}, Selection()), ({"groups": ""}, Selection()),
    ({"groups": "a,,b"}, Selection(frozenset("ab"))),
    ({"shard": "2/3"}, Selection(shard=1, shards=3)),
])
def test_selections(query: Any, expected: Selection) -> None:
    assert Selection.of(query) == expected
