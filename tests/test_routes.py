# SPDX-License-Identifier: MPL-2.0
"""Every route for every kind of user in every kind of outage: one table."""
from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agents import (
    BOBS, DB, NODE_1, NODE_2, STOPPED, STRANGE, TLS, WEB, Agent, client_tls, inventory, proxy,
    write_inventory)
from cmon_agent import PAGE, Registry, Response, Server, prepare
from cmon_proxy import (
    InventorySettings, Proxy, REFUSALS, Settings, TlsSettings, make_certificate, make_key,
    ssh_public_key, with_headers)
from support import Answer, Program, http_get

USERS = ("owner", "other", "limited", "operator", "unknown", "expired", "nobody")
NOT_IN = ("unknown_key", "expired", "no_certificate")       # of the last three users
FAULTS = ("well", "node down", "no inventory", "over quota")


def row(*verdicts: str, bad: Any = NOT_IN) -> dict[str, str]:
    """Verdicts by user; the first one is the default."""
    first = list(verdicts) + [verdicts[0]] * (4 - len(verdicts))
    return dict(zip(USERS, [*first, *bad]))


OPEN = row("200", bad=("200",) * 3)
KNOWN = row("200")
HIDDEN = "no_such_target"
QUOTA = row("quota")
# until there is an inventory nobody can be told apart but those whose certificate is of no use
EARLY = row("inventory_not_ready", bad=("inventory_not_ready", "inventory_not_ready",
                                        "no_certificate"))


def page(*verdicts: str, down: tuple[str, ...] = ()) -> dict[str, dict[str, str]]:
    """The rows of a page: the same in an outage, except for who gets it otherwise."""
    return {"well": row(*verdicts), "node down": row(*(down or verdicts)), "no inventory": EARLY,
            "over quota": QUOTA}


def steady(well: dict[str, str]) -> dict[str, dict[str, str]]:
    """What does not depend on nodes."""
    return {"well": well, "node down": well, "no inventory": EARLY, "over quota": QUOTA}


ALWAYS = dict.fromkeys(FAULTS, OPEN)
# pattern, path as it is asked, host; verdicts by fault and user
TABLE: list[tuple[str, str, str, dict[str, dict[str, str]]]] = [
    ("/_ping", "/_ping", "cmon.test", ALWAYS),
    ("/v1/_ping", "/v1/_ping", "cmon.test", ALWAYS),
    ("/-/healthy", "/-/healthy", "anything.example", ALWAYS),
    ("/-/ready", "/-/ready", "cmon.test", {
        **ALWAYS, "no inventory": row("inventory_not_ready", bad=("inventory_not_ready",) * 3)}),
    ("/v1/discover", "/v1/discover", "cmon.test", steady(KNOWN)),
    ("/v1/sd", "/v1/sd", "cmon.test", steady(KNOWN)),
    ("/v1/fleet/metrics", "/v1/fleet/metrics", "cmon.test", steady(KNOWN)),
    ("/", "/", "cmon.test", steady(KNOWN)),
    ("/c/{name}", f"/c/{WEB}", "cmon.test", steady(row("200", HIDDEN, "200", HIDDEN))),
    ("/c/{name}", f"/c/{BOBS}", "cmon.test", steady(row(HIDDEN, "200", HIDDEN, HIDDEN))),
    ("/c/{name}", f"/c/{STRANGE}", "cmon.test", steady(row(HIDDEN))),
    ("/n/{name}", f"/n/{NODE_1}", "cmon.test", steady(row(HIDDEN, HIDDEN, HIDDEN, "200"))),
    ("/page.css", "/page.css", "cmon.test", ALWAYS),
    ("/page.js", "/page.js", "cmon.test", ALWAYS),
    ("/v1/gz/discover", "/v1/gz/discover", "cmon.test",
     steady(row("not_operator", "not_operator", "not_operator", "200"))),
    ("/v1/gz/sd", "/v1/gz/sd", "cmon.test",
     steady(row("not_operator", "not_operator", "not_operator", "200"))),
    ("/v1/{uuid}/metrics", f"/v1/{WEB}/metrics", "cmon.test",
     page("200", HIDDEN, "200", HIDDEN, down=("node_silent", HIDDEN, "node_silent", HIDDEN))),
    ("/v1/{uuid}/metrics", f"/v1/{DB}/metrics", "cmon.test",
     page("200", HIDDEN, HIDDEN, HIDDEN, down=("node_silent", HIDDEN, HIDDEN, HIDDEN))),
    ("/v1/{uuid}/metrics", f"/v1/{STOPPED}/metrics", "cmon.test",
     page("no_page", HIDDEN, HIDDEN, HIDDEN)),
    ("/v1/{uuid}/metrics", f"/v1/{BOBS}/metrics", "cmon.test",
     page(HIDDEN, "200", HIDDEN, HIDDEN, down=(HIDDEN, "node_silent", HIDDEN, HIDDEN))),
    ("/v1/{uuid}/metrics", f"/v1/{STRANGE}/metrics", "cmon.test", page(HIDDEN)),
    ("/v1/{uuid}/metrics", f"/v1/{NODE_1}/metrics", "cmon.test",
     page(HIDDEN, HIDDEN, HIDDEN, "200", down=(HIDDEN, HIDDEN, HIDDEN, "node_silent"))),
    ("/metrics", "/metrics", f"{WEB}.cmon.test",
     page("200", HIDDEN, "200", HIDDEN, down=("node_silent", HIDDEN, "node_silent", HIDDEN))),
    ("/metrics", "/metrics", f"{NODE_2}.cmon.test",
     page(HIDDEN, HIDDEN, HIDDEN, "200", down=(HIDDEN, HIDDEN, HIDDEN, "node_silent"))),
    ("none", "/metrics", "cmon.test",
     dict.fromkeys(FAULTS, row("no_own_page", bad=("no_own_page",) * 3))),
    ("none", "/v1/discover", "www.example",
     dict.fromkeys(FAULTS, row("unknown_host", bad=("unknown_host",) * 3))),
    ("none", "/nothing", "cmon.test",
     dict.fromkeys(FAULTS, row("no_such_path", bad=("no_such_path",) * 3))),
]


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A TLS context for each kind of user, and keys of those whose certificates are made here."""
    folder = tmp_path_factory.mktemp("users")
    found: dict[str, Any] = {
        "owner": client_tls("old_rsa", "rsa"), "other": None, "unknown": client_tls(
            "new_other", "client"), "expired": client_tls("new_expired", "client"),
        "nobody": client_tls(), "keys": {}}
    for user, login in (("other", "bob"), ("limited", "alice"), ("operator", "root")):
        private = make_key()
        (folder / f"{user}.key").write_bytes(private)
        (folder / f"{user}.pem").write_bytes(make_certificate(private, login))
        found[user] = client_tls()
        found[user].load_cert_chain(folder / f"{user}.pem", folder / f"{user}.key")
        found["keys"][user] = ssh_public_key(private)
    return found


def accounts(node: str, keys: dict[str, str]) -> Any:
    content = inventory(node, node)
    content["accounts"][0]["users"] = [{"login": "dave", "keys": [keys["limited"]],
                                        "groups": ["web"]}]
    content["accounts"][1]["keys"].append(keys["other"])
    content["accounts"][1]["keys"].remove((TLS / "other.pub").read_text())
    content["accounts"][2]["keys"].append(keys["operator"])
    return content


@pytest.fixture(scope="module")
def proxies(tmp_path_factory: pytest.TempPathFactory, users: Any) -> Iterator[dict[str, Program]]:
    """One proxy in each kind of outage."""
    agent, dead = Agent(), Agent()
    dead.close()
    found: dict[str, Any] = {}
    contexts = []
    for fault in FAULTS:
        folder = tmp_path_factory.mktemp(re.sub(r"\W", "", fault))
        if fault != "no inventory":
            node = dead.text if fault == "node down" else agent.text
            write_inventory(folder, accounts(node, users["keys"]))
        quota = {"per_minute": 0, "burst": 1, "hard_per_minute": 0} if fault == "over quota" else {}
        contexts.append(proxy(folder, quota=quota))
        found[fault] = contexts[-1].__enter__()
    for user in USERS[:4]:              # the one request that each may make
        for _ in range(2):
            last = get(found["over quota"], "/v1/discover", "cmon.test", users[user])
        assert last.status == 429
    for fault in FAULTS:
        for _ in range(4):              # until the breaker is open
            get(found[fault], f"/v1/{WEB}/metrics", "cmon.test", users["owner"])
    yield found
    for context in contexts:
        context.__exit__(None, None, None)
    agent.close()


def get(program: Program, path: str, host: str, tls: Any, method: str = "GET") -> Answer:
    return http_get(program.address, path, {"Host": host}, tls=tls, method=method)


def label(entry: Any) -> str:
    return f"{entry[1]} at {entry[2][:20]}"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("entry", TABLE, ids=label)
def test_each_route_for_each_user(entry: Any, fault: str, proxies: Any, users: Any) -> None:
    _, path, host, verdicts = entry
    for user in USERS:
        answer = get(proxies[fault], path, host, users[user])
        expected = verdicts[fault][user]
        if expected == "200":
            assert answer.status == 200, (user, answer)
            continue
        assert answer.headers.get("x-cmon-error") == expected, (user, answer)
        check_refusal(answer, expected)
        for foreign in (BOBS, DB, STOPPED):
            assert foreign not in answer.text or foreign in path, user
        head = get(proxies[fault], path, host, users[user], "HEAD")
        assert (head.status, head.body) == (answer.status, b"")


def check_refusal(answer: Answer, code: str) -> None:
    """One line of plain text that Prometheus cannot take for an empty list (F1, F9)."""
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text.endswith("\n") and answer.text.count("\n") == 1 and len(answer.text) < 400
    if code in REFUSALS:
        assert answer.status == REFUSALS[code][0]
    try:
        json.loads(answer.text)
    except ValueError:
        return
    raise AssertionError(f"{answer.text!r} is JSON: Prometheus would drop all its targets")


@pytest.mark.parametrize("entry", TABLE, ids=label)
def test_other_methods_are_refused(entry: Any, proxies: Any, users: Any) -> None:
    pattern, path, host, _ = entry
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        answer = get(proxies["well"], path, host, users["owner"], method)
        assert answer.status == (404 if pattern in ("none", "/metrics") else 405)


def test_every_route_has_a_row() -> None:
    server = Server("proxy", Registry())
    made = Proxy(Settings(TlsSettings(Path("x"), Path("y")), InventorySettings()), server,
                 Registry(), random.random)
    routes = {route.pattern for route in made.routes()} | {"/metrics", "none"}
    server.server_close()
    assert routes == {entry[0] for entry in TABLE}
    for entry in TABLE:
        assert set(entry[3]) == set(FAULTS)
        assert all(set(verdicts) == set(USERS) for verdicts in entry[3].values())


def test_every_refusal_says_what_why_and_what_next() -> None:
    for code, (status, message) in REFUSALS.items():
        assert 400 <= status <= 504 and "\n" not in message, code
        assert message[0].islower() or message.startswith("{"), code
        assert ":" in message or "/v1/" in message, f"{code}: what next?"


def test_a_cached_answer_has_the_current_date() -> None:
    """It may have been made an hour ago; a client's clock and cache go by this header."""
    made = prepare(Response(200, b"x" * 9, PAGE, (("X-A", "b"),))).form(False)
    kept = re.sub(rb"Date: [^\r]+", b"Date: Thu, 01 Jan 1970 00:00:00 GMT", made)
    sent = with_headers(200, kept, b"X-Own: c\r\n").form(False)
    assert b"1970" not in sent and sent.count(b"\r\nDate: ") == 1
    lines = sent.split(b"\r\n")
    assert b"X-Own: c" in lines and b"X-A: b" in lines and lines[-1] == b"x" * 9
