# SPDX-License-Identifier: MPL-2.0
"""The page for people: small, closed, escaped, whole without script."""
from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from agents import ALICE, NODE_1, TLS, uuid, vm
from cmon_proxy import (
    Account, QuotaBucket, CSP, FleetRow, Grant, Identity, LastScrape, Node, PAGE_CSS, PAGE_JS,
    QuotaSettings, ROWS_SHOWN, first_certificate, people_page, quota_limits_of, vm_of)

EVIL = "<script>alert('&\"x')</script>"


def rows(count: int, **more: Any) -> list[FleetRow]:
    found = []
    for number in range(count):
        one = vm_of(vm(uuid(number + 1), ALICE, **{"alias": f"machine-{number:04d}-" + "x" * 40,
                                                   **more}), "test", "")
        assert one is not None
        found.append(FleetRow(one, (), number % 3 > 0, LastScrape(0.0, "unreachable")))
    return found


def granted(login: str = "alice", operator: bool = False) -> Grant:
    identity = Identity(first_certificate((TLS / "old_rsa.pem").read_text()))
    return Grant(Account(ALICE, login, {}, operator), None, identity)


def page(found: list[FleetRow], first: int = 0, nodes: Any = (), login: str = "alice",
         **quota: Any) -> str:
    limits = quota_limits_of(QuotaSettings(**quota), login, False)
    allowance = QuotaBucket(login, False, limits, 0.0)
    return people_page(found, first, granted(login), allowance, nodes, 100.0)


class Outline(HTMLParser):
    """Tags that are opened and closed as they should be, and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_largest_page_is_below_60_kb() -> None:
    nodes = [(Node(uuid(n), f"compute-node-{n:04d}.example", None), n % 2 == 0)
             for n in range(ROWS_SHOWN)]
    assert len(page(rows(5000), 160, nodes).encode()) < 60_000
    assert len(PAGE_JS) + len(PAGE_CSS) < 10_000


def test_nothing_comes_from_elsewhere_and_nothing_is_inline() -> None:
    outline = Outline(page(rows(3)))
    assert "unsafe" not in CSP and "*" not in CSP and "default-src 'none'" in CSP
    for name, value in outline.attributes:
        assert name != "style" and not name.startswith("on")
        if name in ("src", "href"):
            assert re.fullmatch(r"/[\w./?=-]*", value), value
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", PAGE_JS + PAGE_CSS)
    assert "innerHTML" not in PAGE_JS and "eval" not in PAGE_JS


def test_what_comes_from_outside_is_escaped() -> None:
    found = rows(2, alias=EVIL, brand=EVIL)
    text = page(found, nodes=[(Node(NODE_1, EVIL, None), True)], login=EVIL)
    assert "<script>alert" not in text and "alert" in text
    assert Outline(text).tags.count("script") == 1


@pytest.mark.parametrize("first, shown, links", [
    (0, ROWS_SHOWN, ["more"]), (ROWS_SHOWN, ROWS_SHOWN, ["before", "more"]),
    (2 * ROWS_SHOWN, 7, ["before"]), (99_999, 0, ["before"])])
def test_long_lists_have_pages(first: int, shown: int, links: list[str]) -> None:
    text = page(rows(2 * ROWS_SHOWN + 7), first)
    assert text.count("<tr data-uuid=") == shown
    assert re.findall(r'href="/\?from=\d+">(\w+)<', text) == links


def test_a_stopped_container_has_neither_link_nor_charts() -> None:
    text = page(rows(1, state="stopped", server_uuid=None))
    assert "stopped" in text and "none yet" in text and "data-uuid" not in text
    assert f"/v1/{uuid(1)}/metrics" not in text


@pytest.mark.parametrize("per_minute, polls", [(1000, "60"), (100, "10"), (1, "1"), (0, "1")])
def test_the_browser_asks_for_a_tenth_of_the_quota_at_the_most(per_minute: float, polls: str
                                                               ) -> None:
    assert f'data-per-minute="{polls}"' in page(rows(1), per_minute=per_minute)
