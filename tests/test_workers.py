# SPDX-License-Identifier: MPL-2.0
"""Several processes that are one proxy: quotas, metrics, replacement, stop."""
from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents import (
    NODE_1, WEB, Agent, admin, client_tls, inventory, proxy, proxy_config, write_inventory)
from cmon_agent import COUNTER, GAUGE, HISTOGRAM, Family, Sample
from cmon_proxy import ADMIN_PAGES, Account, Quotas, QuotaSettings, interpreter_command, summed
from support import Answer, Connection, Program, http_get, samples, wait_until

TLS_OF_OWNER = ("old_rsa", "rsa")


@pytest.fixture()
def folder(tmp_path: Path) -> Iterator[Path]:
    agent = Agent()
    write_inventory(tmp_path, inventory(agent.text))
    yield tmp_path
    agent.close()


def ready(program: Program) -> bool:
    return http_get(program.addresses(2)[1], "/-/ready").status == 200


def get(program: Program, path: str = f"/v1/{WEB}/metrics") -> Answer:
    return http_get(program.address, path, {"Host": "cmon.test"}, tls=client_tls(*TLS_OF_OWNER))


def children(program: Program) -> list[int]:
    found = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    return [int(word) for word in found]


def test_several_processes_are_one_proxy(folder: Path) -> None:
    with proxy(folder, workers=3) as program:
        wait_until(lambda: ready(program))
        assert len(children(program)) == 3
        for _ in range(60):
            assert get(program).status == 200
        found = admin(program)
        assert found["cmon_proxy_workers"] == 3
        for path in (*ADMIN_PAGES, "/", "/-/healthy"):
            assert http_get(program.addresses(2)[1], path).status == 200
        assert found['cmon_proxy_http_requests_total{route="/v1/{uuid}/metrics",code="200"}'] == 60
        assert found['cmon_proxy_account_requests_total{account="alice",result="asked"}'] == 60
        assert found[f'cmon_proxy_node_up{{server="{NODE_1}"}}'] == 1
        assert found["cmon_proxy_inventory_nodes"] == 2
        # whoever answers knows of the scrapes of all
        state = f'cmon_instance_last_scrape_result{{instance="{WEB}",result="ok"}}'
        wait_until(lambda: all(samples(get(program, "/v1/fleet/metrics").text).get(state) == 1
                               for _ in range(8)))


def test_only_the_first_process_prints_the_addresses(folder: Path) -> None:
    config = proxy_config(folder, workers=2)
    with Program.proxy(config, "--print-addresses") as program:
        wait_until(lambda: ready(program))
        assert json.loads(program.output) == {
            name: "%s:%d" % address
            for name, address in zip(("main", "admin"), program.addresses(2))}


def test_the_quota_is_the_accounts_not_the_workers(folder: Path) -> None:
    quota = {"per_minute": 1, "burst": 30, "hard_per_minute": 1, "over_quota": "refuse"}
    with proxy(folder, workers=3, quota=quota) as program:
        wait_until(lambda: ready(program))
        statuses: list[int] = []
        for _ in range(12):                 # slower than the exchange between them
            for _ in range(8):
                statuses.append(get(program).status)
            before = statuses.count(200)
        # without exchange it would be 90; what they admit in a quarter of a second is the error
        assert 30 <= before <= 70 and statuses[-8:] == [429] * 8


def test_a_dead_worker_is_replaced(folder: Path) -> None:
    with proxy(folder, workers=2) as program:
        wait_until(lambda: ready(program))
        victim = children(program)[0]
        os.kill(victim, signal.SIGKILL)
        program.wait_for_log(r"worker \d \(pid \d+\) exited with status -9")
        wait_until(lambda: len(children(program)) == 2 and ready(program))
        assert get(program).status == 200
        assert admin(program)["cmon_proxy_worker_restarts_total"] == 1


def test_a_worker_killed_under_load_affects_no_other_and_revocation_applies_everywhere(folder: Path
                                                                                      ) -> None:
    with proxy(folder, workers=2) as program:
        wait_until(lambda: ready(program))
        over = threading.Event()
        answers: list[tuple[float, int]] = []
        broken: list[float] = []

        def ask() -> None:
            while not over.is_set():
                try:
                    status = get(program).status
                except OSError:
                    broken.append(time.monotonic())
                else:
                    answers.append((time.monotonic(), status))
        # kept connections, some of them to the worker that stays
        kept = [Connection(program.address, client_tls(*TLS_OF_OWNER)) for _ in range(12)]
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()

        def alive(connection: Connection) -> bool:
            try:
                return connection.request(f"/v1/{WEB}/metrics", {"Host": "cmon.test"}).status == 200
            except OSError:
                return False
        assert all(map(alive, kept))
        wait_until(lambda: len(answers) > 50)
        os.kill(children(program)[0], signal.SIGKILL)
        before = len(answers)
        lost = sum(not alive(connection) for connection in kept)
        wait_until(lambda: len(answers) > before + 50)          # others go on
        program.wait_for_log("exited with status -9")
        wait_until(lambda: len(children(program)) == 2 and ready(program))
        assert {status for _, status in answers} == {200}
        assert lost < len(kept) and len(broken) <= len(threads) + 2
        content = inventory("127.0.0.1:1")
        content["accounts"][0]["keys"] = []
        written = time.monotonic()
        write_inventory(folder, content)
        wait_until(lambda: [status for _, status in answers[-60:]] == [401] * 60)
        over.set()
        for thread in threads:
            thread.join()
        for connection in kept:
            connection.close()
        last = max(at for at, status in answers if status != 401)
        # 3 s are promised; more only where this machine stands still
        assert last - written < 10, last - written


def test_workers_reload_settings_and_stop_with_the_first_process(folder: Path) -> None:
    with proxy(folder, workers=2) as program:
        wait_until(lambda: ready(program))
        workers = children(program)
        program.signal(signal.SIGHUP)
        program.wait_for_log("settings reloaded", 3)
        with Connection(program.address, client_tls(*TLS_OF_OWNER)) as kept:
            assert kept.request(f"/v1/{WEB}/metrics", {"Host": "cmon.test"}).status == 200
            assert program.stop() == 0
        for pid in workers:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_workers_do_not_outlive_a_first_process_that_is_killed(folder: Path) -> None:
    with proxy(folder, workers=2) as program:
        wait_until(lambda: ready(program))
        workers = children(program)
        os.kill(program.pid, signal.SIGKILL)

        def gone(pid: int) -> bool:
            try:
                return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"
            except OSError:
                return True
        wait_until(lambda: all(map(gone, workers)))
        program.process.returncode = 0


def test_metrics_of_workers_are_merged() -> None:
    def page(up: int, count: int) -> list[Family]:
        return [
            Family("a_total", COUNTER, "", [Sample((("x", "1"),), count)]),
            Family("h", HISTOGRAM, "", [Sample((("le", "1"),), count, "_bucket"),
                                        Sample((), 0.5, "_sum")]),
            Family("cmon_proxy_node_up", GAUGE, "", [Sample((), up)]),
            Family("cmon_proxy_inventory_nodes", GAUGE, "", [Sample((), 7)]),
            Family("cmon_proxy_node_in_flight", GAUGE, "", [Sample((), count)])]
    found = {family.name: [sample.value for sample in family.samples]
             for family in summed([page(1, 3), page(0, 4)])}
    assert found == {"a_total": [7], "h": [7, 1.0], "cmon_proxy_node_up": [0],
                     "cmon_proxy_inventory_nodes": [7], "cmon_proxy_node_in_flight": [7]}


def test_debts_apply_to_accounts_seen_later() -> None:
    clock = [0.0]
    quotas = Quotas(QuotaSettings(per_minute=60, burst=10), lambda: clock[0])
    quotas.debit({"a": 4})
    clock[0] = 2.0
    quotas.debit({"a": 4})
    allowance = quotas.of(Account("a", "alice", {}))
    assert allowance.soft == 4              # 10 - (4 - 2 s + 4)
    quotas.debit({"a": 100})
    assert allowance.soft == -10            # the debt is bounded by one burst


def test_a_worker_gets_the_flags_of_the_first_process() -> None:
    assert interpreter_command()[0] and "utf8" in interpreter_command()
