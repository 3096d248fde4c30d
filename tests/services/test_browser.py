# SPDX-License-Identifier: MPL-2.0
"""The pages for people in headless Chromium, the proxy's with a client certificate."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
from datacenter import SERVICE, Browser, DataCenter, need_root

from support import NODE, http_get

OUTSIDE = re.compile(rb"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//|@import"""
                     rb"""|url\(\s*["']?http""")


@pytest.fixture()
def served(center: DataCenter) -> DataCenter:
    need_root()
    center.start_agent("--replay", NODE)
    center.start_proxy()
    return center


def looks_like_a_picture(path: Path) -> bool:
    """A PNG that is not of one colour: those pack to a few kB."""
    content = path.read_bytes()
    return content.startswith(b"\x89PNG") and len(content) > 12_000


def test_agents_page_lists_zones_with_links_that_work(served: DataCenter) -> None:
    address = served.agents[0].address
    raw = http_get(address, "/")
    assert raw.headers["content-type"].startswith("text/html") and not OUTSIDE.search(raw.body)
    url = f"http://{address[0]}:{address[1]}/"
    browser = Browser(served)
    dom = browser.dom(url)
    for vm in served.inventory["vms"]:
        if vm["state"] == "running":
            assert vm["uuid"] in dom and vm["alias"] in dom, vm["alias"]
    links = set(re.findall(r'href="(/[^"]*)"', dom))
    assert len(links) > 15
    for link in links:
        assert http_get(address, link).status == 200, link
    assert looks_like_a_picture(browser.picture(url, "agent"))


def test_tenants_page_shows_its_containers_with_charts_and_nobody_elses(
        served: DataCenter) -> None:
    raw = served.get("/")
    assert raw.status == 200 and raw.headers["content-type"].startswith("text/html")
    assert len(raw.body) < 60_000 and not OUTSIDE.search(raw.body)
    policy = raw.headers["content-security-policy"]
    assert "default-src" in policy and "unsafe-eval" not in policy and "*" not in policy
    url = f"https://{SERVICE}:{served.address[1]}/"
    browser = Browser(served, "alice")
    dom = browser.dom(url, 30_000)
    for vm in served.vms("alice"):
        assert vm["alias"] in dom, vm["alias"]
    for login in ("bob", "carol"):
        for vm in served.vms(login):
            assert vm["uuid"] not in dom and vm["alias"] not in dom
    assert "<svg" in dom or "<canvas" in dom, "no chart was drawn"
    assert looks_like_a_picture(browser.picture(url, "tenant", 30_000))


def test_tenants_page_is_a_plain_table_without_script(served: DataCenter) -> None:
    raw = served.get("/").text
    assert "<table" in raw
    for vm in served.vms("alice"):
        assert vm["alias"] in raw and vm["uuid"] in raw


def test_browser_without_a_certificate_is_told_what_is_missing(served: DataCenter) -> None:
    dom = Browser(served).dom(f"https://{SERVICE}:{served.address[1]}/")
    assert "no client certificate" in dom
