# SPDX-License-Identifier: MPL-2.0
"""Objects of the loop are touched by the loop's thread alone: the programs run under tests/owned.py
through scrapes, discovery, reloads and the services of a data center."""
from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Any, Callable

import pytest
from agents import NODE_1, WEB, Agent, client_tls, inventory, proxy_config, write_inventory
from nodes import LB01, WEB01, Machine
from support import NODE, Program, http_get, wait_until
from test_triton import Cloud, cloud, vm  # noqa: F401  (a fixture)

import owned

CHECKED = Path(__file__).with_name("owned.py")
ALICE_PATHS = ("/", "/v1/discover", "/v1/discover?groups=web&shard=1/2", "/v1/sd",
               "/v1/fleet/metrics", f"/c/{WEB}", f"/v1/{WEB}/metrics")


def touched(program: Program) -> list[str]:
    """What other threads have touched; and errors, which a broken checker would cause."""
    return [line for line in program.log.splitlines() if line.startswith(("owned:", "Traceback"))]


def ask_as_alice(program: Program) -> None:
    for path in ALICE_PATHS:
        answer = wait_until(lambda: [found for found in [http_get(
            program.address, path, {"Host": "cmon.test"}, tls=client_tls("old_rsa", "rsa"))]
            if found.status == 200], path)
        assert answer


def test_the_checker_sees_another_thread(capfd: pytest.CaptureFixture[str]) -> None:
    class Thing:
        def __init__(self) -> None:
            self.fixed, self.state = 1, 2
    thing = Thing()
    owned.watch(Thing, {"fixed"})

    def touch() -> None:
        thing.state = thing.fixed + thing.state
    touch()
    assert capfd.readouterr().err == ""
    thread = threading.Thread(target=touch, name="stranger")
    thread.start()
    thread.join()
    assert capfd.readouterr().err.startswith("owned: Thing.state touched by stranger in touch")


def test_agent_on_a_live_node(kernel: Callable[..., Any], tmp_path: Path,
                              recorded_node: dict[str, Any]) -> None:
    frame = recorded_node["frames"][0]
    machine = Machine(tmp_path, kernel(frame["kstats"]), frame)
    program = machine.program = Program(sys.executable, CHECKED, "cmon_agent.py", "--log-format",
                                        "text", "--listen", "127.0.0.1:0", "--config",
                                        machine.config)
    with program:
        machine.zone(WEB01), machine.zone(LB01), machine.node()
        assert http_get(program.address, "/v1/zones/metrics").status == 200
        machine.refresh()
        program.process.send_signal(signal.SIGHUP)
        program.wait_for_log("settings reloaded")
        machine.zone(WEB01), machine.node()
        assert http_get(program.address, "/").status == 200
        assert http_get(program.address, "/metrics").status == 200
        assert not touched(program)


def test_agent_with_a_recording() -> None:
    with Program(sys.executable, CHECKED, "cmon_agent.py", "--log-format", "text", "--listen",
                 "127.0.0.1:0", "--replay", NODE) as program:
        for path in ("/", f"/v1/{WEB01}/metrics", "/v1/gz/metrics", "/v1/zones/metrics"):
            assert http_get(program.address, path).status == 200
        assert not touched(program)


def test_proxy_with_an_inventory_file(tmp_path: Path) -> None:
    agent = Agent()
    write_inventory(tmp_path, inventory(agent.text))
    with Program(sys.executable, CHECKED, "cmon_proxy.py", "--log-format", "text", "--config",
                 proxy_config(tmp_path)) as program:
        program.addresses(2)
        ask_as_alice(program)
        changed = inventory(agent.text)
        changed["vms"][0]["alias"] = "renamed"
        write_inventory(tmp_path, changed)
        wait_until(lambda: b"renamed" in http_get(
            program.address, "/v1/discover", {"Host": "cmon.test"},
            tls=client_tls("old_rsa", "rsa")).body)
        program.process.send_signal(signal.SIGHUP)
        program.wait_for_log("settings reloaded")
        ask_as_alice(program)
        assert http_get(program.addresses(2)[1], "/metrics").status == 200
        assert not touched(program)
    agent.close()


def test_proxy_in_a_data_center(cloud: Cloud, tmp_path: Path) -> None:      # noqa: F811
    folder = tmp_path / "snapshot"
    folder.mkdir(mode=0o700)
    with Program(sys.executable, CHECKED, "cmon_proxy.py", "--log-format", "text", "--config",
                 proxy_config(tmp_path, **cloud.settings(snapshot=str(folder / "inventory")))
                 ) as program:
        program.addresses(2)
        ask_as_alice(program)
        cloud.vmapi.order("put", vms=[vm(WEB, inventory("")["accounts"][0]["uuid"], NODE_1,
                                         alias="renamed")])
        wait_until(lambda: b"renamed" in http_get(
            program.address, "/v1/discover", {"Host": "cmon.test"},
            tls=client_tls("old_rsa", "rsa")).body)
        wait_until((folder / "inventory").exists)
        assert not touched(program)
