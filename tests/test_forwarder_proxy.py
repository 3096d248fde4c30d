# SPDX-License-Identifier: MPL-2.0
"""The forwarder and other collectors in front of the real proxy, with TLS and shards."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cmon
import pytest
from agents import ALICE, BOB, NODE_1, TLS, Agent, inventory, proxy, uuid, vm, write_inventory
from forwarding import own
from support import EXAMPLES, ROOT, Address, Program, free_port, http_get, wait_until
from test_forwarder_sinks import answers, get_json, need, start_influx

TARGETS = int(os.environ.get("CMON_TARGETS", 450))     # by hand: 3000
INTERVAL = max(TARGETS // 60, 3)    # a rate that one slow processor sustains for all programs


@pytest.fixture()
def agent() -> Iterator[Agent]:
    one = Agent("# TYPE hits_total counter\nhits_total 5\n# TYPE mem_limit gauge\n")
    yield one
    one.close()


def config(folder: Path, address: Address, **more: Any) -> Path:
    path = folder / "forwarder.json"
    path.write_text(json.dumps({
        "proxy": {"url": f"https://127.0.0.1:{address[1]}", "cert": str(TLS / "new_rsa.pem"),
                  "key": str(TLS / "client.key"), "ca": str(TLS / "ca.pem")},
        "interval": 0.5, "listen": "127.0.0.1:0",
        "sinks": {"f": {"type": "file", "path": "samples.log", "batch_age": 0}}, **more}))
    return path


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "samples.log"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_containers_of_the_account_are_forwarded_over_tls(tmp_path: Path, agent: Agent) -> None:
    vms = inventory(agent.text)
    vms["servers"][1]["admin_ip"] = agent.text
    write_inventory(tmp_path, vms)
    with proxy(tmp_path, host_prefix="") as door:
        path = config(tmp_path, door.address)
        check = Program.forwarder(path, "--check-config")
        assert check.wait() == 0, check.log
        with Program.forwarder(path) as program:
            wait_until(lambda: len([row for row in rows(tmp_path) if row["name"] == "up"]) >= 6)
            assert own(program, "proxy_connections") <= 3
            door.stop()
            wait_until(lambda: rows(tmp_path)[-3]["name"] == "up"
                       and rows(tmp_path)[-3]["value"] == 0)
        seen = {(row["labels"]["alias"], row["labels"]["instance"]) for row in rows(tmp_path)}
    assert seen == {("vm1", uuid(1)), ("vm2", uuid(2))}         # those that run, and alice's
    assert {row["value"] for row in rows(tmp_path) if row["name"] == "hits_total"} == {5}


@pytest.mark.parametrize("change, message", [
    ({"ca": None}, "its certificate is not trusted"),
    ({"cert": str(TLS / "new_other.pem"), "key": str(TLS / "client.key")}, ": 401 "),
    ({"key": str(TLS / "ca.key")}, "not a certificate and its key"),
    ({"key": "none.key"}, "none.key: no such file"),
    ({"ca": str(TLS / "ca.key")}, "contains no CA certificate"),
    ({"url": "https://127.0.0.1:1"}, "connection refused"),
    ({"url": "https://no.such.host.invalid:1"}, "does not resolve"),
])
def test_problems_with_the_proxy_are_reported(tmp_path: Path, agent: Agent, change: Any,
                                              message: str) -> None:
    write_inventory(tmp_path, inventory(agent.text))
    with proxy(tmp_path, host_prefix="") as door:
        path = config(tmp_path, door.address)
        content = json.loads(path.read_text())
        content["proxy"].update(change)
        path.write_text(json.dumps(content))
        done = subprocess.run([sys.executable, str(ROOT / "cmon_forwarder.py"), "--config",
                               str(path), "--once"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, universal_newlines=True, timeout=60)
    print(done.stderr)
    assert done.returncode in (1, 2) and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_three_sharded_collectors_store_every_series_once(tmp_path: Path, agent: Agent) -> None:
    """The forwarder, vmagent and Prometheus in agent mode, as in examples/, and one store."""
    numbers = range(1000, 1000 + TARGETS)
    content = inventory(agent.text)
    content["vms"] = [vm(uuid(number), ALICE, NODE_1) for number in numbers]
    content["vms"].append(vm(uuid(6), BOB))
    write_inventory(tmp_path, content)
    store, agent_port = free_port(), free_port()
    programs: list[Program] = []
    try:
        programs.append(Program(
            need("victoria-metrics"), f"-storageDataPath={tmp_path}/store",
            f"-httpListenAddr=127.0.0.1:{store}", "-memory.allowedBytes=64MB"))
        wait_until(lambda: answers(store, "/health"))
        with proxy(tmp_path, host_prefix="", quota={"per_minute": 10 ** 6, "burst": 10 ** 6,
                                                       "hard_per_minute": 10 ** 6}) as door:
            def example(name: str, shard: str) -> Path:
                text = (EXAMPLES / name).read_text()
                for before, after in (
                        ("cmon.dc.example:9163", f"127.0.0.1:{door.address[1]}"),
                        ("cert_file: alice-cert.pem", f"ca_file: {TLS}/ca.pem\nINDENTcert_file: "
                         f"{TLS}/new_rsa.pem"),
                        ("alice-key.pem", f"{TLS}/client.key"), ("shard=1/3", f"shard={shard}"),
                        ("store.example:8428", f"127.0.0.1:{store}"),
                        ("scrape_interval: 15s", f"scrape_interval: {INTERVAL}s")):
                    text = text.replace(before, after)
                text = re.sub(r"(?m)^( *)(ca_file.*)\nINDENT", r"\1\2\n\1", text)
                path = tmp_path / name
                path.write_text(text)
                return path
            programs.append(Program.forwarder(config(
                tmp_path, door.address, shard="1/3", interval=INTERVAL, sinks={
                    "store": {"type": "remote_write", "url": f"http://127.0.0.1:{store}"}})))
            programs.append(Program(
                need("vmagent"), f"-promscrape.config={example('vmagent.yml', '2/3')}",
                f"-remoteWrite.tmpDataPath={tmp_path}/vmagent", "-httpListenAddr=",
                f"-remoteWrite.url=http://127.0.0.1:{store}/api/v1/write"))
            programs.append(Program(
                need("prometheus"), "--enable-feature=agent",
                f"--config.file={example('prometheus-agent.yml', '3/3')}",
                f"--storage.agent.path={tmp_path}/prometheus",
                f"--web.listen-address=127.0.0.1:{agent_port}"))

            def series(name: str) -> list[str]:
                http_get(("127.0.0.1", store), "/internal/force_flush")
                answer = get_json(store, "/api/v1/series", **{"match[]": name, "start": "-1h"})
                return sorted(one["instance"] for one in answer["data"])

            def complete() -> bool:
                time.sleep(0.5)             # the answer is large, and the processors are busy
                return {uuid(number) for number in numbers} <= set(series("hits_total"))
            wait_until(complete, f"{len(series('hits_total'))} of {TARGETS}", 60 + INTERVAL)
            wanted = sorted(uuid(number) for number in numbers)
            assert series("hits_total") == series("up") == series("mem_limit") == wanted
    finally:
        for program in programs:
            program.kill()


# --- the demo -------------------------------------------------------------------------------------

def test_the_demo_forwards_to_influxdb_and_shows_how_to_see_it(tmp_path: Path) -> None:
    ports = {"influx": free_port(), "influx_rpc": free_port()}
    server = start_influx(tmp_path, ports)
    demo = None
    try:
        wait_until(lambda: answers(ports["influx"], "/ping"))
        demo = Program.cmon("demo", "--forward", f"influxdb=http://127.0.0.1:{ports['influx']}")
        wait_until(lambda: "The demo runs until Ctrl-C." in demo.output
                   or demo.process.poll() is not None)
        assert re.search(r"\n    [1-9][0-9]* samples sent", demo.output), demo.output + demo.log
        command, = re.findall(r"(?m)^    (curl -G (?:.*\\\n)*.*)$", demo.output)

        def seen() -> str:
            return subprocess.run(command, shell=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, check=True).stdout.decode()
        wait_until(lambda: '"alias":"' in seen())
    finally:
        if demo is not None:
            demo.stop()
            demo.kill()
        server.kill()


def test_the_file_of_the_demo_is_where_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                   ) -> None:
    monkeypatch.chdir(tmp_path)
    assert cmon.forwarding("file=out.json") == ("file", str(tmp_path / "out.json"))
    assert cmon.forwarding("file") == ("file", "samples.log"), "in the demo's folder"


@pytest.mark.parametrize("where, message", [
    ("graphite=127.0.0.1:1", "cmon: the forwarder cannot deliver"),
    ("carbon", "'carbon' is not one of influxdb, graphite"),
])
def test_the_demo_says_when_nothing_listens(where: str, message: str) -> None:
    program = Program.cmon("demo", "--once", "--forward", where)
    assert program.wait() in (1, 2)
    assert message in program.log and "Traceback" not in program.log
