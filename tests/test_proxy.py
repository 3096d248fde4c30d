# SPDX-License-Identifier: MPL-2.0
"""The proxy as a process, with real certificates of tenants and stand-in agents."""
from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest

from agents import (
    ALICE, BOBS, CORE, DB, NODE_1, NODE_2, STOPPED, STRANGE, TLS, WEB, Agent, client_tls, inventory,
    key, proxy, proxy_config, uuid, vm, write_inventory)
from nodes import WEB01, Machine
from support import Answer, Connection, Program, http_get, samples, wait_until

OWNER = ("old_rsa", "rsa")


@pytest.fixture()
def agent() -> Iterator[Agent]:
    made = Agent()
    yield made
    made.close()


@pytest.fixture()
def folder(tmp_path: Path, agent: Agent) -> Path:
    write_inventory(tmp_path, inventory(agent.text))
    return tmp_path


@pytest.fixture()
def running(folder: Path) -> Iterator[Program]:
    with proxy(folder) as program:
        yield program


@pytest.fixture(scope="session")
def operator(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An operator's certificate, made with the account's own key."""
    from cmon_proxy import make_certificate
    folder = tmp_path_factory.mktemp("operator")
    private = (TLS / "ec521.key").read_bytes()
    (folder / "root.pem").write_bytes(make_certificate(private, "root"))
    return str(folder / "root"), str(TLS / "ec521")


def get(program: Program, path: str, who: Any = OWNER, headers: Any = None, **more: Any) -> Answer:
    return http_get(program.address, path, {"Host": "cmon.test", **(headers or {})},
                    tls=client_tls(*who), **more)


def page(number: str) -> str:
    return f"/v1/{number}/metrics"


def code(answer: Answer) -> str:
    """X-Cmon-Error of a refusal, which is one line of plain text."""
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text.endswith("\n") and answer.text.count("\n") == 1
    return answer.headers["x-cmon-error"]


def connect(program: Program, who: Any = OWNER) -> Connection:
    return Connection(program.address, client_tls(*who))


def admin(program: Program) -> dict[str, float]:
    return samples(http_get(program.addresses(2)[1], "/metrics").text)


# whose page

@pytest.mark.parametrize("cert, private, status", [
    ("old_rsa", "rsa", 200), ("old_ec", "ec", 200), ("old_ed25519", "ed25519", 200),
    ("old_expired", "rsa", 200), ("new_rsa", "client", 200), ("new_ec", "client", 200),
    ("new_ec384", "client", 200),           # by an administrator's key
    ("new_colons", "client", 200), ("new_md5hex", "client", 200),
    ("new_expired", "client", 401), ("new_future", "client", 401), ("new_sha1", "client", 401),
    ("new_wrong_issuer", "client", 401), ("new_other", "client", 401), ("docker", "client", 401),
    ("old_forged", "rsa", 401), ("old_other", "other", 401), ("old_sha1", "rsa", 401),
    ("no_fingerprint", "client", 401), ("ca_client", "client", 401), ("", "", 401)])
def test_certificates_over_the_wire(shared: Program, cert: str, private: str, status: int) -> None:
    answer = get(shared, page(WEB), (cert, private))
    assert answer.status == status
    assert (WEB in answer.text) == (status == 200)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    agent = Agent()
    folder = tmp_path_factory.mktemp("proxy")
    write_inventory(folder, inventory(agent.text))
    with proxy(folder) as program:
        yield program
    agent.close()


@pytest.mark.parametrize("host, path, status", [
    ("cmon.test", page(WEB), 200), ("cmon.test:9163", page(WEB.upper()), 200),
    (f"{WEB}.cmon.test", "/metrics", 200), (f"{WEB}.cmon.test:9163", "/metrics", 200),
    (f"{WEB.upper()}.CMON.TEST", "/metrics", 200), ("127.0.0.1:9163", page(WEB), 200),
    ("localhost", page(WEB), 200), ("[::1]:9163", page(WEB), 200),
    (f"{WEB}.cmon.test", "/v1/discover", 200), (f"{BOBS}.cmon.test", "/metrics", 404),
    (f"{STRANGE}.cmon.test", "/metrics", 404), ("cmon.test", "/metrics", 404),
    ("www.example", page(WEB), 404), ("www.example", "/v1/discover", 404),
    ("www.example", "/_ping", 200), (f"{STRANGE}.x", "/v1/_ping", 200), ("a", "/-/healthy", 200),
    ("cmon.test", "/v1/gz/metrics", 404), ("cmon.test", "/v1/../metrics", 404),
    ("cmon.test", f"/v1/{WEB}%2fmetrics", 200), ("cmon.test", f"/v1/{WEB}/metrics/", 404),
])
def test_names_and_paths(shared: Program, host: str, path: str, status: int) -> None:
    assert get(shared, path, headers={"Host": host}).status == status


def test_a_foreign_container_is_like_a_missing_one_byte_for_byte(shared: Program) -> None:
    def raw(number: str, by_host: bool) -> bytes:
        with connect(shared) as connection:
            path, host = page(number), "cmon.test"
            if by_host:
                path, host = "/metrics", f"{number}.cmon.test"
            connection.send(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            whole = b""
            while b"\r\n\r\n" not in whole:
                whole += connection.socket.recv(65536)
            head = [line for line in whole.split(b"\r\n") if not line.startswith(b"Date:")]
            return b"\r\n".join(head)
    for by_host in (False, True):
        missing = raw(STRANGE, by_host)
        assert b" 404 " in missing and STRANGE.encode() not in missing
        for foreign in (BOBS, CORE, NODE_1, uuid(5)):
            assert raw(foreign, by_host) == missing


def test_compute_nodes_are_for_operators(shared: Program, operator: Any) -> None:
    tls = client_tls()
    tls.load_cert_chain(operator[0] + ".pem", operator[1] + ".key")

    def ask(path: str, host: str = "cmon.test") -> Answer:
        return http_get(shared.address, path, {"Host": host}, tls=tls)
    assert 'path="/v1/gz/metrics"' in ask(page(NODE_1)).text
    assert 'path="/v1/gz/metrics"' in ask("/metrics", f"{NODE_1}.cmon.test").text
    assert code(ask(page(WEB))) == "no_such_target"
    assert 'core="True"' in ask(page(CORE)).text
    found = json.loads(ask("/v1/gz/discover").text)
    assert found == {"cns": [{"server_uuid": NODE_1, "server_hostname": "cn1"},
                             {"server_uuid": NODE_2, "server_hostname": "cn2"}]}
    targets = json.loads(ask("/v1/gz/sd").text)
    assert targets[0]["labels"]["__meta_triton_machine_alias"] == "cn1"
    for path in ("/v1/gz/discover", "/v1/gz/sd"):
        assert code(get(shared, path)) == "not_operator"


@pytest.mark.parametrize("who", [("sshpk_old_rsa", "rsa"), ("sshpk_old_ec", "ec"),
                                 ("sshpk_new_rsa", "client"), ("sshpk_new_ec384", "client")])
def test_certificates_made_by_node_sshpk_are_accepted(shared: Program, who: Any) -> None:
    answer = http_get(shared.address, "/v1/discover", {"Host": "cmon.test"}, tls=client_tls(*who))
    assert answer.status == 200, answer


def test_discovery_equals_the_originals(shared: Program) -> None:
    answer = get(shared, "/v1/discover")
    assert answer.headers["content-type"] == "application/json"
    rows = json.loads(answer.text)["containers"]
    assert [row["vm_uuid"] for row in rows] == [WEB, DB]        # neither stopped nor NAT
    when = rows[0].pop("cached_date")
    assert isinstance(when, int) and abs(when - time.time() * 1000) < 600_000
    assert rows[0] == {                     # members that are absent are left out: manta_group
        "server_uuid": NODE_1, "source": "Bootstrapper", "vm_alias": "vm1", "vm_brand": "joyent",
        "vm_image_uuid": uuid(1), "vm_owner_uuid": ALICE, "vm_uuid": WEB, "vm_state": "running",
        "groups": ["web", "front"], "has_core_tag": False}


@pytest.mark.parametrize("query, expected", [
    ("groups=web", [WEB]), ("groups=db%2Cweb", [WEB, DB]), ("groups=none", []),
    ("groups=", [WEB, DB]), ("shard=1/1", [WEB, DB])])
def test_discovery_by_groups(shared: Program, query: str, expected: list[str]) -> None:
    rows = json.loads(get(shared, f"/v1/discover?{query}").text)["containers"]
    assert [row["vm_uuid"] for row in rows] == expected


def test_http_discovery_leads_back_to_the_page(shared: Program) -> None:
    found = json.loads(get(shared, "/v1/sd", headers={"Host": "cmon.test:9163"}).text)
    labels = found[0]["labels"]
    assert found[0]["targets"] == ["cmon.test:9163"]
    assert labels["__meta_triton_groups"] == ",web,front," and labels["instance"] == WEB
    assert labels["__meta_triton_machine_id"] == WEB and labels["__meta_triton_server_id"] == NODE_1
    assert all(isinstance(value, str) for value in labels.values())
    assert get(shared, labels["__metrics_path__"]).status == 200
    halves = [json.loads(get(shared, f"/v1/sd?shard={k}/2").text) for k in (1, 2)]
    assert sorted(row["labels"]["instance"] for half in halves for row in half) == [WEB, DB]


@pytest.mark.parametrize("query, expected", [
    ("shard=0/2", "bad_shard"), ("shard=3/2", "bad_shard"), ("shard=x", "bad_shard"),
    ("shard=1/99999", "bad_shard"), ("shard=1/2000", "bad_shard"), ("color=red", "bad_parameter")])
def test_bad_parameters(shared: Program, query: str, expected: str) -> None:
    for path in ("/v1/discover", "/v1/sd", "/v1/fleet/metrics"):
        assert code(get(shared, f"{path}?{query}")) == expected


def test_fleet_page(running: Program) -> None:
    get(running, page(WEB))
    assert get(running, page(DB)).status == 503
    found = samples(get(running, "/v1/fleet/metrics").text)

    def value(name: str, number: str, more: str = "") -> Any:
        return found.get(f'{name}{{instance="{number}"{more}}}')
    assert value("cmon_instance_state", WEB, ',state="running"') == 1
    assert value("cmon_instance_state", STOPPED, ',state="stopped"') == 1
    assert value("cmon_instance_node_reachable", WEB) == 1
    assert value("cmon_instance_node_reachable", DB) == 0
    assert value("cmon_instance_last_scrape_result", WEB, ',result="ok"') == 1
    assert value("cmon_instance_last_scrape_result", DB, ',result="unreachable"') == 1
    assert abs(value("cmon_instance_last_scrape_timestamp_seconds", WEB) - time.time()) < 60
    assert value("cmon_instance_last_scrape_timestamp_seconds", STOPPED) is None
    assert found['cmon_client_certificate_expiry_timestamp_seconds{subject="alice"}'] == 4733510400
    assert found["cmon_quota_limit"] == 6000 and found["cmon_quota_limited"] == 0
    assert 0 < found["cmon_quota_used"] < 0.1 and BOBS not in str(found)


def test_answers_tell_expiry_and_quota(shared: Program) -> None:
    for path in (page(WEB), "/v1/discover", "/v1/fleet/metrics"):
        headers = get(shared, path).headers
        assert headers["x-cmon-certificate-expires"] == "2120-01-01 00:00:00Z"
        assert headers["ratelimit-limit"] == "1000" and int(headers["ratelimit-remaining"]) < 1000


# relaying

@pytest.mark.parametrize("mode", ["ok", "chunked", "drip", "once", "plain", "partial", "other"])
@pytest.mark.parametrize("packed", [False, True])
def test_pages_are_relayed_unchanged(shared_agent: Any, mode: str, packed: bool) -> None:
    program, agent = shared_agent
    agent.mode = mode
    headers = {"Accept-Encoding": "gzip"} if packed else {}
    for _ in range(3):
        answer = get(program, page(WEB), headers=headers)
        assert answer.status == 200 and f'path="{page(WEB)}",core="False"' in answer.text
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert ("content-encoding" in answer.headers) == (packed and mode != "plain")
        assert answer.headers["connection"] == "close"      # ours
        for hop in ("set-cookie", "keep-alive", "transfer-encoding", "etag", "server"):
            assert hop not in answer.headers


@pytest.fixture(scope="module")
def shared_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    agent = Agent("# TYPE x counter\n" + "".join(f"x{{n=\"{n}\"}} {n}\n" for n in range(4000)))
    folder = tmp_path_factory.mktemp("proxy")
    write_inventory(folder, inventory(agent.text))
    with proxy(folder) as program:
        yield program, agent
    agent.close()


def test_requests_to_the_agent(running: Program, agent: Agent) -> None:
    get(running, page(WEB), headers={"X-Prometheus-Scrape-Timeout-Seconds": "10",
                                     "Cookie": "secret", "Accept-Encoding": "gzip"})
    get(running, page(WEB), headers={"X-Prometheus-Scrape-Timeout-Seconds": "2"})
    get(running, page(WEB))
    (_, _, first), (_, _, second), (_, _, third) = agent.requests
    assert first["x-prometheus-scrape-timeout-seconds"] == "9.5"
    assert second["x-prometheus-scrape-timeout-seconds"] == "1.8"
    assert third["x-prometheus-scrape-timeout-seconds"] == "9.5"
    assert first["accept-encoding"] == "gzip" and "accept-encoding" not in second
    assert first["x-joyent-cmon-opts"] == "eyJpc0NvcmVab25lIjogZmFsc2V9" and "cookie" not in first
    assert agent.connections == 1


@pytest.mark.parametrize("word", ["0", "-1", "x", "nan", "inf", "1e999"])
def test_bad_deadlines(shared: Program, word: str) -> None:
    answer = get(shared, page(WEB), headers={"X-Prometheus-Scrape-Timeout-Seconds": word})
    assert answer.status == 400


@pytest.mark.parametrize("mode, expected, status", [
    ("close", "node_error", 503), ("half", "node_error", 503), ("garbage", "node_error", 503),
    ("error", "node_error", 503), ("busy", "node_refused", 503), ("gone", "no_page", 404)])
def test_faults_of_an_agent(running: Program, agent: Agent, mode: str, expected: str,
                            status: int) -> None:
    agent.mode = mode
    answer = get(running, page(WEB))
    assert (code(answer), answer.status) == (expected, status)
    assert answer.headers.get("x-cmon-state") == ("not running on its node" if mode == "gone"
                                                  else None)
    assert "127.0.0.1" not in answer.text                   # tenants do not learn addresses
    agent.mode = "ok"
    assert get(running, page(WEB)).status == 200


def test_a_closed_idle_connection_causes_no_failure(running: Program, agent: Agent) -> None:
    for _ in range(5):
        assert get(running, page(WEB)).status == 200
        agent.drop()
    agent.modes[page(WEB)] = "ok"
    with connect(running) as connection:
        for _ in range(20):
            assert connection.request(page(WEB), {"Host": "cmon.test"}).status == 200
            agent.drop()


def test_a_late_page_is_a_504_in_time(running: Program, agent: Agent) -> None:
    agent.modes[page(WEB)] = "hang"
    answer = get(running, page(WEB), headers={"X-Prometheus-Scrape-Timeout-Seconds": "0.5"})
    assert (answer.status, code(answer)) == (504, "deadline")
    agent.modes.clear()
    assert get(running, page(WEB)).status == 200            # the node itself is well


def test_identical_scrapes_share_one_relay(running: Program, agent: Agent) -> None:
    agent.gate.clear()
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(get, running, page(WEB)) for _ in range(20)]
        wait_until(lambda: admin(running)["cmon_proxy_relays_shared_total"] == 19)
        agent.gate.set()
        assert {answer.result().status for answer in answers} == {200}
    assert agent.paths() == [page(WEB)]


def test_requests_to_a_node_are_limited(folder: Path, agent: Agent) -> None:
    content = inventory(agent.text)
    content["vms"] += [vm(uuid(100 + n), ALICE) for n in range(12)]
    write_inventory(folder, content)
    agent.gate.clear()
    with proxy(folder, agent={"max_in_flight": 3}) as program, ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(get, program, page(uuid(100 + n))) for n in range(12)]
        wait_until(lambda: admin(program).get(
            f'cmon_proxy_node_waiting{{server="{NODE_1}"}}') == 9)
        assert len(agent.paths()) == 3
        agent.gate.set()
        assert {answer.result().status for answer in answers} == {200}
        assert agent.connections == 3


def test_a_silent_node_is_reported_at_once_and_recovers(folder: Path, agent: Agent) -> None:
    hole = socket.create_server(("127.0.0.1", 0), backlog=1)
    address = hole.getsockname()
    fill = [socket.socket() for _ in range(4)]              # its backlog is full: nothing answers
    for one in fill:
        one.setblocking(False)
        one.connect_ex(address)
    write_inventory(folder, inventory(agent.text, "%s:%d" % address))
    with proxy(folder, agent={"connect_timeout": 0.1}) as program:
        answers = [get(program, page(DB)) for _ in range(4)]
        assert {(answer.status, code(answer)) for answer in answers} == {(503, "node_silent")}
        assert "has not answered since 2" in answers[-1].text
        wait_until(lambda: admin(program)[f'cmon_proxy_node_up{{server="{NODE_2}"}}'] == 0)
        assert get(program, page(WEB)).status == 200
        for one in fill:
            one.close()
        hole.close()
        fresh = Agent()
        write_inventory(folder, inventory(agent.text, fresh.text))
        wait_until(lambda: get(program, page(DB)).status == 200)
        reachable = f'cmon_instance_node_reachable{{instance="{DB}"}}'      # at its new address
        assert samples(get(program, "/v1/fleet/metrics").text)[reachable] == 1
        fresh.close()


def test_a_hanging_node_is_detected_and_recovers(folder: Path, agent: Agent) -> None:
    other = Agent()
    other.mode = "hang"
    write_inventory(folder, inventory(agent.text, other.text))
    with proxy(folder, agent={"timeout": 2}) as program:
        assert get(program, page(DB)).status == 504
        wait_until(lambda: code(get(program, page(DB))) == "node_silent")
        assert get(program, page(WEB)).status == 200
        other.mode = "ok"
        wait_until(lambda: get(program, page(DB)).status == 200)
    other.close()


def test_a_disconnected_client_does_no_harm(running: Program, agent: Agent) -> None:
    agent.gate.clear()
    for _ in range(5):
        with connect(running) as connection:
            connection.send(f"GET {page(WEB)} HTTP/1.1\r\nHost: cmon.test\r\n\r\n".encode())
            wait_until(lambda: admin(running)["cmon_proxy_relays_in_flight"] >= 1)
    agent.gate.set()
    assert get(running, page(WEB)).status == 200


def test_head_and_other_methods(shared: Program) -> None:
    answer = get(shared, page(WEB), method="HEAD")
    assert answer.status == 200 and not answer.body and int(answer.headers["content-length"]) > 50
    for path in (page(WEB), "/v1/discover"):
        answer = get(shared, path, method="POST")
        assert answer.status == 405 and answer.headers["allow"] == "GET, HEAD"


# changes

def without_key(content: Any) -> None:
    content["accounts"][0]["keys"] = [key("other")]


def without_account(content: Any) -> None:
    del content["accounts"][0]


@pytest.mark.parametrize("change", [without_key, without_account])
@pytest.mark.parametrize("who", [("old_rsa", "rsa"), ("new_rsa", "client")], ids=["old", "new"])
def test_a_removed_key_applies_to_the_next_request(running: Program, folder: Path, agent: Agent,
                                                   change: Callable[[Any], None], who: Any) -> None:
    with connect(running, who) as connection:
        assert connection.request(page(WEB), {"Host": "cmon.test"}).status == 200
        content = inventory(agent.text)
        change(content)
        write_inventory(folder, content)
        running.wait_for_log("inventory: ", 2)
        for path in (page(WEB), "/v1/discover", "/v1/sd", "/v1/fleet/metrics"):
            answer = connection.request(path, {"Host": "cmon.test"})
            assert (answer.status, code(answer)) == (401, "unknown_key")
        write_inventory(folder, inventory(agent.text))
        running.wait_for_log("inventory: ", 3)
        assert connection.request(page(WEB), {"Host": "cmon.test"}).status == 200


def test_the_owner_changes_while_the_page_is_in_flight(running: Program, folder: Path, agent: Agent
                                                      ) -> None:
    agent.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(get, running, page(WEB))
        wait_until(agent.paths)
        content = inventory(agent.text)
        content["vms"][0]["owner_uuid"] = content["accounts"][1]["uuid"]
        write_inventory(folder, content)
        running.wait_for_log("inventory: ", 2)
        agent.gate.set()
        answer = late.result()
    assert (answer.status, code(answer)) == (404, "no_such_target")
    assert code(get(running, page(WEB))) == "no_such_target"


def test_a_bad_inventory_is_rejected_and_logged_once(running: Program, folder: Path, agent: Agent
                                                    ) -> None:
    write_inventory(folder, "{")
    running.wait_for_log("keeping the old inventory: .*not JSON")
    content = inventory(agent.text)
    content["vms"].append({"uuid": "x"})
    content["vms"][0]["owner_uuid"] = content["accounts"][1]["uuid"]
    write_inventory(folder, content)
    running.wait_for_log(r"keeping the old inventory: .*vms\[6\]: needs owner_uuid")
    assert get(running, page(WEB)).status == 200
    assert running.log.count("keeping the old inventory") == 3     # two lines the second time
    (folder / "inventory.json").unlink()
    running.wait_for_log("keeping the old inventory: .*no such file")
    assert get(running, "/v1/discover").status == 200


def test_everything_is_503_until_an_inventory_is_loaded(tmp_path: Path, agent: Agent) -> None:
    with proxy(tmp_path) as program:
        assert get(program, "/_ping").text == "OK\n"
        ready = get(program, "/-/ready")
        assert (ready.status, code(ready)) == (503, "inventory_not_ready")
        answer = get(program, "/v1/discover")
        assert answer.status in (401, 503) and code(answer)
        write_inventory(tmp_path, inventory(agent.text))
        wait_until(lambda: get(program, "/-/ready").status == 200)
        assert get(program, "/v1/discover").status == 200


def test_settings_are_reloaded(running: Program, folder: Path) -> None:
    assert get(running, page(WEB), ("old_sha1", "rsa")).status == 401
    tls = {"certificate": str(TLS / "server.pem"), "key": str(TLS / "server.key"),
           "allow_sha1": True}
    proxy_config(folder, tls=tls, quota={"per_minute": 1, "burst": 1, "hard_per_minute": 1},
                 discover_include_stopped=True)
    running.signal(signal.SIGHUP)
    running.wait_for_log("settings reloaded")
    assert get(running, page(WEB), ("old_sha1", "rsa")).status == 200
    assert get(running, page(WEB)).status == 429
    proxy_config(folder, nonsense=1)
    running.signal(signal.SIGHUP)
    running.wait_for_log("keeping the old settings: .*nonsense: unknown setting")
    assert get(running, "/_ping").status == 200


def test_stopped_containers_are_listed_with_discover_include_stopped(folder: Path) -> None:
    with proxy(folder, discover_include_stopped=True) as program:
        rows = json.loads(get(program, "/v1/discover").text)["containers"]
        assert [row["vm_uuid"] for row in rows] == [WEB, DB, STOPPED]
        answer = get(program, page(STOPPED))
        assert code(answer) == "no_page" and "is stopped" in answer.text
        assert answer.headers["x-cmon-state"] == "stopped"      # the web page shows it


def test_quota_in_two_steps(folder: Path, agent: Agent) -> None:
    quota = {"per_minute": 60, "burst": 3, "hard_per_minute": 120}
    with proxy(folder, quota=quota) as program, connect(program) as connection:
        def ask(number: str = WEB) -> Answer:
            return connection.request(page(number), {"Host": "cmon.test"})
        assert [ask().status for _ in range(3)] == [200] * 3
        before = len(agent.paths())
        copy = ask()
        assert copy.status == 200 and samples(copy.text)["cmon_quota_limited"] == 1
        assert "cmon_page_age_seconds" in copy.text and WEB in copy.text
        assert len(agent.paths()) == before                 # the node was not asked
        refused = ask()
        while refused.status == 200:
            refused = ask()
        assert (refused.status, code(refused)) == (429, "quota")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert get(program, page(BOBS), ("old_other", "other")).status == 401
        found = admin(program)
        assert found['cmon_proxy_account_requests_total{account="alice",result="stale"}'] >= 1
        assert found['cmon_proxy_account_requests_total{account="alice",result="refused"}'] >= 1


# start

@pytest.mark.parametrize("change, problem", [
    ({"tls": {"certificate": "absent.pem", "key": "absent.key"}}, "tls.certificate: cannot read"),
    ({"tls": {"certificate": str(TLS / "server.pem"), "key": str(TLS / "ca.key")}},
     "is not the key of"),
    ({"tls": {"certificate": str(TLS / "server.key"), "key": str(TLS / "server.key")}},
     "tls.certificate: "),
    ({"inventory": {}}, "inventory: needs file, or vmapi, cnapi and mahi"),
    ({"inventory": {"vmapi": "http://x"}}, "missing: cnapi, mahi"),
    ({"inventory": {"file": "a", "vmapi": "http://x", "cnapi": "http://x", "mahi": "http://x"}},
     "inventory: set either file"),
    ({"inventory": {"vmapi": "ftp://x", "cnapi": "http://x", "mahi": "http://x"}}, "is not a URL"),
    ({"listen": "nowhere"}, "listen"), ({"admin_listen": "x:y"}, "admin_listen"),
    ({"tls": {"certificate": str(TLS / "server.pem"), "key": str(TLS / "server.key"),
              "client_auth": "ca"}}, "client_ca: required with"),
    ({"quota": {"over_quota": "maybe"}}, "quota.over_quota: must be one of"),
    ({"workers": 0}, "workers: must be at least 1"),
], ids=lambda value: str(value)[:40])
def test_bad_settings_are_reported_with_exit_status_2_or_96(change: Any, problem: str, folder: Path
                                                    ) -> None:
    path = proxy_config(folder, **change)
    for flags, status in (((), 2), (("--check-config",), 2), (("--smf",), 96)):
        program = Program.proxy(path, *flags)
        assert program.wait() == status
        assert problem in program.log


def test_check_config_reads_the_inventory(folder: Path) -> None:
    path = proxy_config(folder)
    good = Program.proxy(path, "--check-config")
    assert good.wait() == 0 and "the settings are good" in good.output
    write_inventory(folder, {"accounts": [], "servers": [], "vms": [{}]})
    bad = Program.proxy(path, "--check-config")
    assert bad.wait() == 2 and "vms[0]: needs uuid" in bad.log


def test_an_address_in_use(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "127.0.0.1:%d" % taken.getsockname()[1]
        program = Program.proxy(proxy_config(folder, listen=address))
        assert program.wait() == 1
        assert "cannot listen on 127.0.0.1" in program.log


def test_with_a_ca(folder: Path) -> None:
    tls = {"certificate": str(TLS / "server.pem"), "key": str(TLS / "server.key"),
           "client_auth": "ca", "client_ca": str(TLS / "ca.pem")}
    with proxy(folder, tls=tls) as program:
        assert get(program, page(WEB), ("ca_client", "client")).status == 200
        assert get(program, "/_ping", ("", "")).status == 200
        assert code(get(program, page(WEB), ("", ""))) == "no_certificate"
        for who in (("old_rsa", "rsa"), ("ca_expired", "client")):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                get(program, page(WEB), who)


def test_connections_verified_by_a_ca_that_is_no_longer_trusted_are_closed(
        folder: Path, agent: Agent) -> None:
    from cmon_proxy import make_certificate, make_key
    client_ca = folder / "clients.pem"
    shutil.copy(TLS / "ca.pem", client_ca)
    tls = {"certificate": str(TLS / "server.pem"), "key": str(TLS / "server.key"),
           "client_auth": "ca", "client_ca": str(client_ca)}
    who = ("ca_client", "client")
    with proxy(folder, tls=tls) as program, connect(program, who) as idle, \
            connect(program, who) as busy, ThreadPoolExecutor(1) as pool:
        def ask(connection: Connection) -> Answer:
            return connection.request(page(WEB), {"Host": "cmon.test"})

        def reload(times: int) -> None:
            program.signal(signal.SIGHUP)
            program.wait_for_log("settings reloaded", times)
        reload(1)                               # the same CA
        assert ask(idle).status == ask(busy).status == 200
        agent.gate.clear()
        later = pool.submit(ask, busy)
        wait_until(lambda: len(agent.paths()) == 3)
        client_ca.write_bytes(make_certificate(make_key(), "another CA", is_ca=True))
        reload(2)
        agent.gate.set()
        assert later.result().status == 200
        for connection in (idle, busy):
            with pytest.raises(OSError):
                ask(connection)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            get(program, page(WEB), who)


def test_the_server_certificate_is_reloaded(tmp_path: Path, agent: Agent) -> None:
    write_inventory(tmp_path, inventory(agent.text))
    for name in ("pem", "key"):
        shutil.copy(TLS / f"server.{name}", tmp_path / f"own.{name}")
    tls = {"certificate": "own.pem", "key": "own.key"}
    with proxy(tmp_path, tls=tls) as program:
        def serial() -> Any:
            context = client_tls()
            with socket.create_connection(program.address) as raw, \
                    context.wrap_socket(raw) as connection:
                return connection.getpeercert(True)
        before = serial()
        from cmon_proxy import make_certificate
        fresh = make_certificate((TLS / "server.key").read_bytes(), "localhost",
                                 issuer=(TLS / "ca.pem").read_bytes(), days=5,
                                 signing_key=(TLS / "ca.key").read_bytes(), names=("localhost",))
        (tmp_path / "own.pem").write_text("not finished")
        program.wait_for_log("keeping the old certificate")
        assert serial() == before
        (tmp_path / "own.pem").write_bytes(fresh)
        program.wait_for_log("reloaded the server certificate")
        assert serial() != before
        program.wait_for_log("the server certificate expires on")
        assert "cmon_proxy_server_certificate_expiry_timestamp_seconds" in admin(program)


def test_sigterm_finishes_open_requests(folder: Path, agent: Agent) -> None:
    agent.gate.clear()
    with proxy(folder) as program, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(get, program, page(WEB))
        wait_until(agent.paths)
        program.signal(signal.SIGTERM)
        threading.Timer(0.2, agent.gate.set).start()
        assert answer.result().status == 200
        assert program.wait() == 0


def test_an_incomplete_page_is_reported_from_kernel_to_fleet_page(tmp_path: Path,
                                                                  kernel: Callable[..., Any],
                                                                  recorded_node: Any) -> None:
    machine = Machine(tmp_path / "node", kernel(recorded_node["frames"][0]["kstats"])).start()
    content = inventory("%s:%d" % machine.agent.address)
    content["vms"] = [vm(WEB01, ALICE)]
    write_inventory(tmp_path, content)
    with machine.agent, proxy(tmp_path) as program:
        def result() -> set[str]:
            found = samples(get(program, "/v1/fleet/metrics").text)
            return {name for name in ("ok", "partial") if found.get(
                f'cmon_instance_last_scrape_result{{instance="{WEB01}",result="{name}"}}') == 1}
        answer = get(program, page(WEB01))
        assert answer.status == 200 and "x-cmon-partial" not in answer.headers
        assert result() == {"ok"}
        machine.kernel.faults(("fail", "memory_cap:*:*", 5))
        machine.refresh()
        answer = get(program, page(WEB01))
        assert answer.status == 200 and answer.headers["x-cmon-partial"] == "memcap"
        assert result() == {"partial"}
