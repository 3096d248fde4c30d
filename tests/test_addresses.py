# SPDX-License-Identifier: MPL-2.0
"""The address of a compute node: where its agent listens is where the proxy dials."""
from __future__ import annotations

from typing import Any

import pytest

from agents import NODE_1
from cmon_agent import Backoff, admin_address, is_ip, parse_sysinfo
from cmon_proxy import nodes_of


def nics(*interfaces: Any) -> dict[str, Any]:
    return {"Network Interfaces": {f"net{number}": nic for number, nic in enumerate(interfaces)}}


def nic(address: Any, *tags: Any) -> dict[str, Any]:
    return {"NIC Names": list(tags), "ip4addr": address}


A, B = "10.0.0.1", "10.0.0.2"
CASES: list[tuple[str, Any, Any]] = [
    ("nothing", None, None), ("a list", [], None), ("empty", {}, None),
    ("as it says", {"Admin IP": A}, A), ("IPv6", {"Admin IP": "fd00::1"}, "fd00::1"),
    ("dhcp without a NIC", {"Admin IP": "dhcp"}, None), ("no text", {"Admin IP": ""}, None),
    ("a number", {"Admin IP": 7}, None), ("a NUL", {"Admin IP": "10.0.0.1\0"}, None),
    ("a surrogate", {"Admin IP": "\ud800"}, None), ("not quite", {"Admin IP": "10.0.0"}, None),
    ("it wins over NICs", {"Admin IP": A, **nics(nic(B, "admin"))}, A),
    ("a virtual node", {"System Type": "Virtual", "CN Agent IP": B, "Admin IP": A}, B),
    ("a virtual node without its own", {"System Type": "Virtual", "Admin IP": A}, A),
    ("a real node ignores it", {"CN Agent IP": B}, None),
    ("dhcp", {"Admin IP": "dhcp", **nics(nic(B, "external"), nic(A, "admin"))}, A),
    ("one NIC, two tags", nics(nic(A, "external", "admin")), A),
    ("a rack", {"Admin IP": "dhcp", **nics(nic(A, "ADMIN_rack_A01"))}, A),
    ("admin before a rack", nics(nic(B, "admin_rack_a"), nic(A, "admin")), A),
    ("another word", nics(nic(A, "administration")), None),
    ("the tag that it names", {"Admin NIC Tag": "mgmt",
                               **nics(nic(B, "admin"), nic(A, "mgmt"))}, A),
    ("no other than the one that it names", {"Admin NIC Tag": "mgmt", **nics(nic(B, "admin"))},
     None),
    ("a rack's tag", {"Admin NIC Tag": "admin_rack_b", **nics(
        nic(B, "admin_rack_a"), nic(A, "admin_rack_b"))}, A),
    ("a NIC without an address", nics(nic("", "admin"), nic(A, "admin")), A),
    ("odd NICs", nics(None, {"NIC Names": "admin", "ip4addr": B}, nic(B, 7, None), nic(A, "admin")),
     A),
    ("odd interfaces", {"Network Interfaces": [7]}, None),
    ("an odd tag", {"Admin NIC Tag": 7, **nics(nic(A, "admin"))}, A),
]


@pytest.mark.parametrize("sysinfo, expected", [case[1:] for case in CASES],
                         ids=[case[0] for case in CASES])
def test_the_agent_listens_where_the_proxy_dials(sysinfo: Any, expected: Any) -> None:
    assert admin_address(sysinfo) == expected
    assert parse_sysinfo(sysinfo).admin_ip == (expected or "")
    node = nodes_of([{"uuid": NODE_1, "sysinfo": sysinfo}], 9163)[NODE_1]
    assert node.address == ((expected, 9163) if expected else None)


@pytest.mark.parametrize("value, expected", [
    ("127.0.0.1", True), ("::1", True), ("", False), ("1.2.3", False), ("1.2.3.4 ", False),
    ("host", False), (b"1.2.3.4", False), (None, False), ([], False), (1.5, False),
], ids=repr)
def test_addresses(value: Any, expected: bool) -> None:
    assert is_ip(value) is expected


def test_pauses_double_with_jitter_to_a_bound() -> None:
    backoff = Backoff(1.0, 10.0, lambda: 0.5)
    assert [backoff.next() for _ in range(6)] == [1, 2, 4, 8, 10, 10]
    backoff.reset()
    assert backoff.next() == 1
    assert [Backoff(1.0, 10.0, lambda chance=chance: chance, 0.5).next() for chance in (0.0, 0.5)
            ] == [0.5, 1.0]
