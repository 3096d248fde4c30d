# SPDX-License-Identifier: MPL-2.0
"""The HTML pages: small, self-contained, escaped, complete without script."""
from __future__ import annotations

import base64
import gzip
import hashlib
import html
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from cmon_agent import BASE_CSS, USE, page_headers, plain_page
from agents import ALICE, NODE_1, TLS, uuid, vm
from cmon_proxy import (
    PAGE_CSS, PAGE_HEADERS, PAGE_JS, ROWS_SHOWN, Account, Caller, FleetRow, Grant, Identity,
    LastScrape, Node, QuotaBucket, QuotaSettings, compact, container_page, first_certificate,
    node_page, page_files, people_page, quota_limits_of, vm_of)

EVIL = "<script>alert('&\"x')</script>"


def rows(count: int, **more: Any) -> list[FleetRow]:
    found = []
    for number in range(count):
        one = vm_of(vm(uuid(number + 1), ALICE, **{"alias": f"machine-{number:04d}-" + "x" * 40,
                                                   **more}), "test", "")
        assert one is not None
        found.append(FleetRow(one, (), number % 3 > 0, LastScrape(0.0, "unreachable")))
    return found


def caller(login: str = "alice", operator: bool = False, **quota: Any) -> Caller:
    identity = Identity(first_certificate((TLS / "old_rsa.pem").read_text()))
    limits = quota_limits_of(QuotaSettings(**quota), login, False)
    return Caller(Grant(Account(ALICE, login, {}, operator), None, identity),
                  QuotaBucket(login, False, limits, 0.0), False)


def page(found: list[FleetRow], first: int = 0, nodes: Any = (), login: str = "alice",
         operator: bool = False, **more: Any) -> str:
    return people_page(found, first, caller(login, operator), nodes, 100.0, **more)


class Outline(HTMLParser):
    """Checks that tags are balanced; collects their attributes."""

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
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_largest_page_is_below_40_kb() -> None:
    nodes = [(Node(uuid(n), f"compute-node-{n:04d}.example", None), n % 2 == 0)
             for n in range(10)]
    assert len(page(rows(5000), 160, nodes, operator=True).encode()) < 40_000
    sent = [page(rows(5000)), *(content for _, content in page_files())]
    assert len(gzip.compress("".join(sent).encode())) < 20_000, "all of it, as browsers get it"


def every_page() -> dict[str, str]:
    """Each kind of page, with hostile names."""
    found = rows(2, alias=EVIL, brand=EVIL, image_uuid=None)
    found[0] = found[0]._replace(groups=(EVIL,))
    node = Node(NODE_1, EVIL, ("10.0.0.1", 9163))
    operator = caller(EVIL, True)
    return {"overview": page(found, nodes=[(node, True), (node, False)], login=EVIL, operator=True,
                             query={"groups": EVIL}, proxy=[(EVIL, EVIL)]),
            "container": container_page(found[0], operator, EVIL),
            "node": node_page(node, False, [row.vm for row in found], operator)}


@pytest.mark.parametrize("kind", ["overview", "container", "node"])
def test_pages_load_nothing_foreign_and_nothing_inline(kind: str) -> None:
    outline = Outline(every_page()[kind])
    for name, value in outline.attributes:
        assert name != "style" and not name.startswith("on")
        if name in ("src", "href"):
            assert re.fullmatch(r"/[\w./?=&%+-]*", value), value
    assert outline.tags.count("script") == 1


def test_script_and_style_come_only_from_this_server() -> None:
    policy = dict(PAGE_HEADERS)["Content-Security-Policy"]
    assert "unsafe" not in policy and "*" not in policy and "default-src 'none'" in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(",
                         PAGE_JS + BASE_CSS + PAGE_CSS)
    assert "innerHTML" not in PAGE_JS and "eval" not in PAGE_JS


def test_a_page_without_files_allows_only_its_own_style() -> None:
    """That of the agent and that of `admin_listen`; the colours are those of the tenants' page."""
    page = plain_page(f"An {EVIL}", [EVIL], "<p>text</p>\n")
    style, = re.findall("<style>(.*?)</style>", page.body.decode(), re.S)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert dict(page.headers) == dict(page_headers(f"style-src 'sha256-{digest}'"))
    assert "script" not in Outline(page.body.decode()).tags
    css = dict(page_files())["page.css"]
    for rule in re.findall("(?m)^[^ @].*{", style):
        assert rule in css


@pytest.mark.parametrize("kind", ["overview", "container", "node"])
def test_foreign_text_is_escaped(kind: str) -> None:
    text = every_page()[kind]
    assert "<script>alert" not in text and "alert" in text


@pytest.mark.parametrize("first, shown, links", [
    (0, ROWS_SHOWN, ["next"]), (ROWS_SHOWN, ROWS_SHOWN, ["previous", "next"]),
    (2 * ROWS_SHOWN, 7, ["previous"]), (99_999, 0, ["previous"])])
def test_long_lists_have_pages(first: int, shown: int, links: list[str]) -> None:
    text = page(rows(2 * ROWS_SHOWN + 7), first, query={"groups": "web"})
    assert text.count("<tr data-uuid=") == shown
    assert re.findall(r'href="/\?groups=web&amp;from=\d+">(\w+)<', text) == links


def test_containers_on_a_silent_node_come_first() -> None:
    text = page(rows(6))
    silent = [name for name in re.findall(r"machine-(\d+)-", text)]
    assert silent == ["0000", "0003", "0001", "0002", "0004", "0005"]
    assert "2 of 6 containers are on compute nodes that do not answer" in text


def test_a_stopped_container_is_not_scraped() -> None:
    text = page(rows(1, state="stopped", server_uuid=None))
    assert "stopped" in text and "none yet" in text and "data-asks" not in text


@pytest.mark.parametrize("per_minute, polls", [
    (6000, "600"), (60_000, "600"), (1000, "100"), (100, "10"), (1, "1"), (0, "1")])
def test_the_browser_uses_at_most_a_tenth_of_the_quota(per_minute: float, polls: str) -> None:
    text = people_page(rows(1), 0, caller(per_minute=per_minute), (), 100.0)
    assert f'data-per-minute="{polls}"' in text


def test_tenants_see_nothing_of_nodes_and_the_proxy() -> None:
    assert "Compute nodes" not in page(rows(1)) and "This proxy" not in page(rows(1))


def test_the_scrape_configuration_is_for_this_container() -> None:
    row = rows(1, alias="db: #1")[0]
    text = html.unescape(container_page(row, caller(), "cmon.example:9163"))
    config = text.partition("<pre")[2].partition("</pre>")[0]
    assert 'targets: ["cmon.example:9163"]' in config and 'job_name: "db: #1"' in config
    assert f"metrics_path: /v1/{row.vm.uuid}/metrics" in config


def test_the_use_table_is_complete_without_script() -> None:
    text = container_page(rows(1)[0], caller(), "cmon.example")
    names = set(re.findall(r"<li>(\w+)</li>", text))
    for use in USE:
        if use.scope == "zone":
            assert {*use.utilisation, *use.saturation, *use.errors} <= names


def test_compact_removes_comments_and_indentation() -> None:
    assert compact("a {\n  // why\n  b: 'x//y';  // kept\n\n}\n") == "a {\nb: 'x//y';  // kept\n}\n"
    assert "`\n" not in PAGE_JS, "text over several lines would change"
