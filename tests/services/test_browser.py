# SPDX-License-Identifier: MPL-2.0
"""The pages for people in headless Chromium, the proxy's with a client certificate."""
from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from datacenter import SERVICE, TLS, Browser, Credentials, DataCenter, Session, need_root

from cmon_proxy import CLIENT_PURPOSE, CMON_PURPOSE, make_certificate, public_key
from support import NODE, http_get, wait_until

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


NAMES = ("[...document.querySelectorAll('table[data-scope=zone] tbody tr')]"
         ".filter(row => !row.hidden).map(row => row.cells[0].textContent)")


# Half a CPU by the node's clock, answered at once and late in turn.
SLOW_ANSWERS = r"""void (window.answers = 0, window.real = fetch, window.fetch = async () => {
    const number = ++answers;
    await new Promise(done => setTimeout(done, number % 2 * 900));
    return new Response(`# TYPE time_of_day counter
time_of_day ${1e12 + number * 2000}
# TYPE cpu_user_usage counter
cpu_user_usage ${number * 1e9}
# TYPE cpu_sys_usage counter
cpu_sys_usage 0\n`);
})"""


def test_a_person_sorts_filters_opens_and_comes_back(served: DataCenter) -> None:
    """And the proxy goes away and comes back; no fault of the script, within what it declares."""
    page = Session(Browser(served, "alice"), f"https://{SERVICE}:{served.address[1]}/")
    try:
        page.wait_for("document.querySelectorAll('td[data-column=cpu] .line[d]').length > 3")
        assert page.value("document.querySelector('main .static:not(:empty)') !== null")
        page.value("document.querySelector('thead button[value=name]').click()")
        names = page.value(NAMES)
        assert names == sorted(names) and len(names) == len(served.vms("alice")) + 1
        assert page.value("document.querySelector('th[aria-sort]').textContent") == "Container"
        page.value("document.querySelector('thead button[value=name]').click()")
        assert page.value(NAMES) == sorted(names, reverse=True)
        page.value("(field => { field.value = 'web0'; field.dispatchEvent(new Event('input', "
                   "{bubbles: true})) })(document.querySelector('input[name=text]'))")
        assert sorted(page.value(NAMES)) == ["web01", "web02"]

        def hover() -> bool:            # again while what is above the row still moves it
            x, y = page.value(
                "(box => [box.left + box.width / 2, box.top + box.height / 2])(document."
                "querySelector('tr:not([hidden]) td[data-column=cpu] svg')"
                ".getBoundingClientRect())")
            page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
            return bool(page.value("!document.querySelector('#tip').hidden"))
        wait_until(hover, "the value under the pointer")
        assert re.match(r"[\d.]+ % at \d", page.value("document.querySelector('#tip').textContent"))
        page.value("[...document.querySelectorAll('tbody a')].find("
                   "link => link.textContent === 'web01').click()")
        page.wait_for("location.pathname.startsWith('/c/') "
                      "&& document.querySelector('h2').textContent === 'web01'")
        page.wait_for("document.querySelectorAll('.verdict.good').length > 3")
        assert page.value("document.querySelectorAll('figure svg').length") == 8
        assert page.value("document.querySelector('#missing').textContent")
        # asked every two seconds; an answer that takes its time does not change a rate
        page.value(SLOW_ANSWERS)
        page.wait_for("window.answers > 5")
        said = page.value("document.querySelector('figure svg').getAttribute('aria-label')")
        assert re.match("CPU of web01: 50 %; from 50 % to ", said)
        page.value("void (window.fetch = async () => new Response('no page', {status: 404, headers:"
                   " {'X-Cmon-Error': 'no_page', 'X-Cmon-State': 'stopped'}}))")
        page.wait_for("document.querySelector('#summary').textContent === 'stopped'")
        page.value("void (window.fetch = window.real)")
        page.value("history.back()")
        page.wait_for("location.pathname === '/' && document.querySelector('.rows') !== null")
        assert sorted(page.value(NAMES)) == ["web01", "web02"], "the filter is kept"
        address = served.address
        served.proxy.stop()
        page.wait_for("!document.querySelector('#banner').hidden")
        assert "has not answered since" in page.value(
            "document.querySelector('#banner').textContent")
        served.start_proxy(f"{address[0]}:{address[1]}")
        page.wait_for("document.querySelector('#banner').hidden")
        assert page.faults == []
        assert page.requests < float(page.value("document.body.dataset.perMinute"))
    finally:
        page.close()


def test_a_certificate_that_is_no_longer_good_is_named_on_the_page(served: DataCenter) -> None:
    page = Session(Browser(served, "alice"), f"https://{SERVICE}:{served.address[1]}/")
    try:
        page.wait_for("document.querySelectorAll('td[data-column=cpu] .line[d]').length > 0")
        [alice] = [a for a in served.inventory["accounts"] if a["login"] == "alice"]
        alice["keys"] = []
        served.write_inventory()
        page.wait_for("!document.querySelector('#banner').hidden")
        said = page.value("document.querySelector('#banner').textContent")
        assert "The proxy refuses this browser: account alice has no key" in said
        asked = page.requests
        assert page.value("new Promise(done => setTimeout(() => done(true), 3000))")
        assert page.requests <= asked + 4, "those in flight, and then it rests"
        assert page.faults == []
    finally:
        page.close()


def test_a_certificate_that_ends_while_the_page_is_open_is_named(served: DataCenter) -> None:
    short, key = served.folder / "short.pem", TLS / "client.key"
    short.write_bytes(make_certificate(
        key.read_bytes(), "alice", issuer="MD5:" + public_key((TLS / "rsa.pub").read_text()).md5,
        signing_key=(TLS / "rsa.key").read_bytes(), purposes=(CLIENT_PURPOSE, CMON_PURPOSE),
        not_after=time.time() + 10))
    served.credentials["alice"] = Credentials(short, key)
    page = Session(Browser(served, "alice"), f"https://{SERVICE}:{served.address[1]}/")
    try:    # a browser that starts slowly has the same words instead of the page
        page.wait_for("document.body.textContent.includes('the client certificate expired on 2')")
        assert page.faults == []
    finally:
        page.close()
