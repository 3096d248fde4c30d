#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""Everything at once, for as long as you like: `python3 tests/soak.py SECONDS [SEED]`.

Two real agents on kernels to order; one proxy of two workers with an inventory file, one with
Triton's services; four tenants with certificates of both styles. Meanwhile containers change hands
and come and go, files and settings are reloaded good and bad, `zfs` hangs, fails and prints
garbage, agents are stopped and killed, a worker is killed, services flap, and strangers send
garbage to every port. Each answer is checked; the last line of output is a summary in JSON.
"""
from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import signal
import socket
import ssl
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from agents import client_tls, proxy_config, uuid, write_inventory  # noqa: E402  (needs the path)
from cmon_proxy import (  # noqa: E402
    CLIENT_PURPOSE, CMON_PURPOSE, make_certificate, make_key, private_key)
from nodes import Machine  # noqa: E402
from support import (  # noqa: E402
    Connection, Kernel, Program, build_libkstat, free_port, node, wait_until)
from test_triton import Service  # noqa: E402

LATE = 5.0              # seconds after a change of owner until the former one sees nothing
MAX_AGE = 10.0          # of the ownership that Triton's services have not confirmed
SLACK = 5.0             # seconds beyond a deadline: this machine is busy with all that runs here
ALLOWED = {200, 404, 429, 503, 504}
TIMEOUTS = ("0.1", "0.5", "1", "2", "5")
ZFS_FAULTS = ("exec sleep 600", "echo no such pool >&2; exit 1",
              "head -c 100000 /dev/urandom", "printf 'zones\\t-1\\tx\\n\\n\\0'", "exit 0")
FILE, TRITON = "file", "triton"


class Tenant:
    """An account with its certificate."""

    def __init__(self, number: int, folder: Path) -> None:
        self.login, self.uuid = f"tenant{number}", uuid(0xA00 + number)
        account_key = make_key("rsa" if number % 2 else "ec")
        self.key = private_key(account_key)
        shown = account_key if number < 2 else make_key()
        made = make_certificate(shown, self.login) if number < 2 else make_certificate(
            shown, self.login, issuer=self.key.md5, signing_key=account_key, days=2,
            purposes=(CLIENT_PURPOSE, CMON_PURPOSE))
        (folder / f"{self.login}.pem").write_bytes(made)
        (folder / f"{self.login}.key").write_bytes(shown)
        self.tls = client_tls()
        self.tls.load_cert_chain(folder / f"{self.login}.pem", folder / f"{self.login}.key")


class Truth:
    """Who owns what, and since when; guarded by a lock, since all threads read it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owners: dict[str, str] = {}
        self.lost: dict[tuple[str, str], float] = {}    # (container, former owner): when

    def give(self, zone: str, owner: str) -> None:
        """A container changes hands now."""
        with self.lock:
            before = self.owners.get(zone)
            if before is not None and before != owner:
                self.lost[zone, before] = time.monotonic()
            self.owners[zone] = owner

    def unseen(self, since: float) -> None:
        """What has changed since then may not have been seen: its time begins now.

        The proxy looks at the file once a second, so bad files can hide a good one between them.
        """
        with self.lock:
            for lost, at in self.lost.items():
                if at >= since:
                    self.lost[lost] = time.monotonic()

    def may_show(self, zone: str, owner: str, late: float) -> bool:
        """Whether the owner may see it now, or could a moment ago."""
        with self.lock:
            return self.owners.get(zone) == owner or \
                time.monotonic() - self.lost.get((zone, owner), -1e9) < late


class Soak:
    """The whole; its threads end when `over` is set."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.over = threading.Event()
        self.truth = Truth()
        self.violations: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.events: collections.deque[str] = collections.deque(maxlen=30)
        self.latest = 0.0                       # seconds beyond a deadline, the worst
        self.writing = threading.Lock()         # the inventory file and VMAPI
        self.tenants = [Tenant(number, folder) for number in range(4)]
        self.numbers: dict[str, int] = {}       # container -> its memory, which no other has
        self.programs: list[Program] = []       # all that ever ran, for their logs
        self.usage: dict[str, list[tuple[float, list[int]]]] = collections.defaultdict(list)
        library = build_libkstat(folder)
        self.port = free_port()
        self.machines = [self.machine(library, number) for number in range(2)]
        for zone in self.numbers:
            self.truth.give(zone, self.random.choice(self.tenants).uuid)
        self.vmapi, self.cnapi, self.mahi = Service("vmapi"), Service("cnapi"), Service("mahi")
        self.services = (self.vmapi, self.cnapi, self.mahi)
        self.begin_services()
        self.proxies = {FILE: self.proxy(FILE, workers=2, inventory={"file": "inventory.json"}),
                        TRITON: self.proxy(TRITON, inventory={
                            "vmapi": self.vmapi.url, "cnapi": self.cnapi.url,
                            "mahi": self.mahi.url, "max_age": MAX_AGE,
                            "snapshot": str(folder / "snapshot")})}

    # what runs

    def machine(self, library: Path, number: int) -> Machine:
        """A compute node whose zones have UUIDs and a memory of their own."""
        whole = json.dumps(node()["frames"][0])
        for zone in {vm["uuid"] for vm in node()["frames"][0]["vms"]}:
            whole = whole.replace(zone[:8] + "-", f"{int(zone[:8], 16) ^ number:08x}-")
        frame = json.loads(whole)
        for kstat in frame["kstats"]:
            zone = kstat["data"].get("zonename", "")
            if kstat["module"] == "memory_cap" and len(zone) == 36:
                self.numbers[zone] = kstat["data"]["rss"] = 4096 * (1000 + 7 * len(self.numbers))
        made = Machine(self.folder / f"node{number}",
                       Kernel(library, self.folder / f"kernel{number}", frame["kstats"]), frame,
                       collectors={"zfs": {"ttl": 1, "timeout": 1}})
        self.good_zfs = (made.commands / "zfs").read_text()
        self.start_agent(made, number)
        return made

    def start_agent(self, machine: Machine, number: int) -> None:
        """At the same address as before."""
        machine.start("--listen", f"127.0.0.{number + 1}:{self.port}")
        self.programs.append(machine.agent)
        _ = machine.agent.address

    def servers(self) -> list[str]:
        """The compute nodes' UUIDs."""
        return [uuid(0xC1), uuid(0xC2)]

    def vms(self) -> list[dict[str, Any]]:
        """All containers as both sources know them."""
        zones = list(self.numbers)
        with self.truth.lock:
            return [{"uuid": zone, "alias": f"vm-{zone[:8]}", "owner_uuid": self.truth.owners[zone],
                     "server_uuid": self.servers()[at >= len(zones) // 2], "state": "running",
                     "brand": "joyent", "tags": {"triton.cmon.groups": "a,b"}}
                    for at, zone in enumerate(zones)]

    def begin_services(self) -> None:
        """What VMAPI, CNAPI and mahi know."""
        self.cnapi.order("servers", servers=[
            {"uuid": server, "hostname": f"cn{number}", "setup": True,
             "sysinfo": {"Admin IP": f"127.0.0.{number + 1}", "System Type": "SunOS"}}
            for number, server in enumerate(self.servers())])
        self.mahi.order("accounts", roles={}, accounts={tenant.login: {
            "type": "account", "uuid": tenant.uuid, "login": tenant.login,
            "approved_for_provisioning": True, "keys": {tenant.key.md5: pem_of(tenant.key.spki)}}
            for tenant in self.tenants})
        self.vmapi.order("put", vms=self.vms())
        self.vmapi.orders.clear()               # it is never restarted here

    def inventory(self) -> dict[str, Any]:
        """The file."""
        return {"accounts": [{"uuid": tenant.uuid, "login": tenant.login,
                              "keys": [tenant.key.line]} for tenant in self.tenants],
                "servers": [{"uuid": server, "hostname": f"cn{number}",
                             "admin_ip": f"127.0.0.{number + 1}:{self.port}"}
                            for number, server in enumerate(self.servers())],
                "vms": self.vms()}

    def config(self, kind: str, **more: Any) -> Path:
        """A proxy's settings; the last tenant soon meets its quota."""
        folder = self.folder / kind
        folder.mkdir(exist_ok=True)
        write_inventory(folder, self.inventory())
        self.settings = more
        return proxy_config(folder, agent={"port": self.port, "timeout": 5}, quota={
            "per_minute": 60_000, "burst": 60_000, "hard_per_minute": 1_000_000, "accounts": {
                "tenant3": {"per_minute": 300, "burst": 50, "hard_per_minute": 600}}}, **more)

    def proxy(self, kind: str, **more: Any) -> Program:
        """A running proxy."""
        program = Program.proxy(self.config(kind, **more))
        self.programs.append(program)
        program.addresses(2)
        return program

    # what is done to them

    def wait(self, least: float, most: float) -> bool:
        """Sleep for a random time; False when the test is over."""
        return not self.over.wait(self.random.uniform(least, most))

    def hand_over(self) -> None:
        """Containers change hands, for both sources."""
        while self.wait(0.3, 1.5):
            zone = self.random.choice(list(self.numbers))
            owner = self.random.choice(self.tenants).uuid
            with self.writing:
                begun = time.monotonic()
                self.truth.give(zone, owner)
                write_inventory(self.folder / FILE, self.inventory())
                self.vmapi.order("put", keep=False, vms=[{"uuid": zone, "owner_uuid": owner}])
                self.truth.unseen(begun)            # before, nobody could know
            self.happened("changes of owner", zone)

    def trouble(self) -> None:
        """Cause one fault after the other, and repair each soon."""
        faults: list[Callable[[], Iterator[None]]] = [
            self.zfs, self.stopped_agent, self.killed_agent, self.churn, self.bad_inventory,
            self.bad_settings, self.killed_worker, self.failing_service, self.cut_feed]
        while self.wait(0.1, 0.8):
            fault = self.random.choice(faults)
            self.happened(fault.__name__.replace("_", " "))
            for _ in fault():
                self.wait(0.3, 2.5)

    def zfs(self) -> Iterator[None]:
        """Hangs, fails, prints garbage."""
        machine = self.random.choice(self.machines)
        machine.script("zfs", "#!/bin/sh\n" + self.random.choice(ZFS_FAULTS) + "\n")
        yield
        machine.script("zfs", self.good_zfs.replace(
            str(self.machines[-1].commands), str(machine.commands)))

    def stopped_agent(self) -> Iterator[None]:
        """SIGSTOP: it accepts and says nothing."""
        program = self.random.choice(self.machines).agent
        program.signal(signal.SIGSTOP)
        yield
        program.signal(signal.SIGCONT)

    def killed_agent(self) -> Iterator[None]:
        """SIGKILL, and later a new one."""
        number = self.random.randrange(2)
        self.machines[number].agent.kill()
        yield
        self.start_agent(self.machines[number], number)

    def churn(self) -> Iterator[None]:
        """Some zones are gone, then back."""
        machine = self.random.choice(self.machines)
        gone = set(self.random.sample(sorted(self.numbers), 8))
        machine.kernel.write([kstat for kstat in machine.frame["kstats"]
                              if kstat["data"].get("zonename") not in gone])
        yield
        machine.kernel.write(machine.frame["kstats"])

    def bad_inventory(self) -> Iterator[None]:
        """A file that is no good; owners do not change meanwhile."""
        with self.writing:
            begun = time.monotonic()
            write_inventory(self.folder / FILE, self.random.choice(
                ["{", "\0" * 1000, '{"accounts": 7}', json.dumps({**self.inventory(), "vms": [7]})
                 ]))
            yield
            write_inventory(self.folder / FILE, self.inventory())
            # the bad file may have come before the proxy had looked at the last good one
            self.truth.unseen(begun - LATE)

    def bad_settings(self) -> Iterator[None]:
        """SIGHUP with bad settings, then with good ones."""
        path = self.folder / FILE / "proxy.json"
        good = path.read_text()
        path.write_text(self.random.choice(["{", '{"nonsense": 1}', ""]))
        self.proxies[FILE].signal(signal.SIGHUP)
        yield
        path.write_text(good)
        self.proxies[FILE].signal(signal.SIGHUP)
        self.proxies[TRITON].signal(signal.SIGHUP)

    def killed_worker(self) -> Iterator[None]:
        """One of two; the first process starts another one."""
        workers = children(self.proxies[FILE].pid)
        if len(workers) == 2:
            os.kill(self.random.choice(workers), signal.SIGKILL)
        yield

    def failing_service(self) -> Iterator[None]:
        """503, or nonsense, or slow."""
        service = self.random.choice(self.services)
        kind = self.random.choice(("fail", "delay"))
        service.order(kind, keep=False, **({"status": 503} if kind == "fail" else {"seconds": 1.0}))
        yield
        service.order("fail", keep=False, status=0)
        service.order("delay", keep=False, seconds=0)

    def cut_feed(self) -> Iterator[None]:
        """The changefeed's connection ends, after a message that is none."""
        self.vmapi.order("say", keep=False, text=self.random.choice(["{", "[]", "null", "\\ud800"]))
        self.vmapi.order("cut", keep=False)
        yield

    def stranger(self, seed: int) -> None:
        """Garbage for every port, from an address of its own."""
        chance = random.Random(seed)
        addresses = [address for program in self.proxies.values()
                     for address in program.addresses(2)]
        addresses += [(f"127.0.0.{number + 1}", self.port) for number in range(2)]
        heads = (b"GET / HTTP/1.1\r\nHost: cmon.test\r\n\r\n", b"GET /v1/discover HTTP/1.1\r\n",
                 b"POST /v1/refresh HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", b"\x16\x03\x01",
                 b"GET /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
        anybody = client_tls()
        while not self.over.wait(chance.uniform(0.0, 0.1)):
            self.counts["strangers"] += 1
            try:
                with socket.create_connection(chance.choice(addresses), 5,
                                              ("127.0.0.9", 0)) as plain:
                    plain.settimeout(chance.uniform(0.01, 1.0))
                    raw = chance.choice((*heads, chance.randbytes(chance.randrange(3000))))
                    if chance.random() < 0.4:
                        with anybody.wrap_socket(plain) as connection:
                            connection.sendall(raw)
                            connection.recv(100)
                    else:
                        plain.sendall(raw)
                        plain.recv(100)
            except (OSError, ValueError):
                pass                            # whatever they do with it

    # what must hold

    def happened(self, what: str, about: str = "") -> None:
        """Count an event, and remember it for the first violation."""
        self.counts[what] += 1
        self.events.append(f"{time.strftime('%H:%M:%S')} {what} {about}")

    def violation(self, what: str) -> None:
        """Report a violation; the first one with the preceding events."""
        before = "" if self.violations else f" after {list(self.events)}"
        self.violations.append(f"{time.strftime('%H:%M:%S')} {what}{before}")

    def scrape(self, tenant: Tenant, kind: str, seed: int) -> None:
        """A tenant's client: its own containers and others', lists and pages."""
        chance = random.Random(seed)
        connection: Connection | None = None
        while not self.over.wait(chance.uniform(0.0, 0.05)):
            zone = chance.choice(sorted(self.numbers))
            timeout = chance.choice(TIMEOUTS)
            path = chance.choice((f"/v1/{zone}/metrics",) * 12 + (
                "/v1/discover", "/v1/discover?shard=1/3", "/v1/sd?groups=a", "/v1/fleet/metrics",
                "/", f"/c/{zone}", "/v1/gz/discover"))
            headers = {"Host": "cmon.test", "X-Prometheus-Scrape-Timeout-Seconds": timeout}
            if chance.random() < 0.5:
                headers["Accept-Encoding"] = "gzip"
            try:
                if connection is None:
                    connection = Connection(self.proxies[kind].address, tenant.tls, timeout=40)
                begun = time.monotonic()
                answer = connection.request(path, headers)
            except (OSError, ssl.SSLError):
                self.counts["broken connections"] += 1
                connection = None
                continue
            if chance.random() < 0.1:
                connection.close()
                connection = None
            elapsed = time.monotonic() - begun
            self.check(tenant, kind, path, answer, elapsed - (
                float(timeout) if path.endswith("metrics") and "fleet" not in path else 9.0))
        if connection is not None:
            connection.close()

    def check(self, tenant: Tenant, kind: str, path: str, answer: Any, beyond: float) -> None:
        """Check one answer."""
        self.counts[f"{kind} {answer.status}"] += 1
        self.latest = max(self.latest, beyond)
        where = f"{kind}: {tenant.login} {path}: {answer.status}"
        if answer.status not in ALLOWED and not (answer.status == 403 and "/gz/" in path):
            self.violation(f"{where} {answer.body[:200]!r}")
        if beyond > SLACK:
            self.violation(f"{where} came {beyond:.1f} s after its deadline")
        late = LATE if kind == FILE else MAX_AGE + LATE
        if answer.status != 200:
            return
        for zone in set(re.findall(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", answer.body)):
            if zone.decode() in self.numbers and not self.truth.may_show(
                    zone.decode(), tenant.uuid, late):
                self.violation(f"{where} names {zone.decode()}")
        if path.startswith("/v1/") and path.endswith("/metrics") and "fleet" not in path:
            zone = path.split("/")[2]
            if not self.truth.may_show(zone, tenant.uuid, late):
                self.violation(f"{where}: a page of somebody else's")
            for number in re.findall(rb"^mem_agg_usage(?:{[^}]*})? (\d+)", answer.body, re.M):
                if int(number) != self.numbers[zone]:
                    self.violation(f"{where}: the memory of another container")

    def watch(self) -> None:
        """Memory, descriptors, threads and processes of everything."""
        while not self.over.wait(1.0):
            for name, pid in [*((kind, program.pid) for kind, program in self.proxies.items()),
                              *((f"agent{number}", machine.agent.pid)
                                for number, machine in enumerate(self.machines))]:
                used = usage_of(pid)
                if used[0]:
                    self.usage[name].append((time.monotonic(), used))

    def levels(self, begun: float) -> dict[str, Any]:
        """Medians of the second and the last third; more in the last one is a leak."""
        end = time.monotonic()
        found: dict[str, Any] = {}
        for name, series in self.usage.items():
            thirds = [[used for at, used in series if begun + (end - begun) * part / 3 <= at
                       <= begun + (end - begun) * (part + 1) / 3] for part in (1, 2)]
            if not all(thirds):
                continue
            middle, last = ([statistics.median(values) for values in zip(*third)]
                            for third in thirds)
            found[name] = {what: [round(one), round(two)] for what, one, two in zip(
                ("kB", "descriptors", "threads", "processes"), middle, last)}
            allowed = (middle[0] * 1.2 + 12_000, middle[1] * 1.2 + 40, middle[2] + 8, middle[3] + 4)
            for what, one, two in zip(found[name], allowed, last):
                if two > one:
                    self.violation(f"{name}: {what} grew: {found[name][what]}")
        return found

    def run(self, seconds: float) -> dict[str, Any]:
        """Run everything; return the summary."""
        for kind, program in self.proxies.items():
            for tenant in self.tenants:
                wait_until(lambda: self.works(tenant, kind), f"{tenant.login} at {kind}")
            _ = program.addresses(2)
        begun = time.monotonic()
        threads = [threading.Thread(target=target, args=args, daemon=True) for target, args in [
            (self.hand_over, ()), (self.trouble, ()), (self.watch, ()), (self.stranger, (1,)),
            (self.stranger, (2,)), *((self.scrape, (tenant, kind, number))
                                     for number, tenant in enumerate(self.tenants)
                                     for kind in self.proxies)]]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        levels = self.levels(begun)
        self.over.set()
        for thread in threads:
            thread.join(60)
            if thread.is_alive():
                self.violation(f"{thread} does not end")
        for kind in self.proxies:               # when all is mended, all works
            for tenant in self.tenants[:3]:
                wait_until(lambda: self.works(tenant, kind), f"{tenant.login} at {kind}", 60)
        self.close()
        for program in self.programs:
            if "Traceback" in program.log:
                self.violation(f"{program.command[1:4]}: {program.log[-3000:]}")
        requests = sum(count for name, count in self.counts.items() if name[-3:].isdigit())
        if self.counts["broken connections"] > requests / 10 + 20:
            self.violation("too many broken connections")
        return {"seconds": seconds, "requests": requests, "counts": dict(self.counts),
                "worst_beyond_deadline": round(self.latest, 3), "levels": levels,
                "violations": self.violations[:20]}

    def works(self, tenant: Tenant, kind: str) -> bool:
        """Whether a tenant gets its list, and the page of what it owns, if anything."""
        try:
            with Connection(self.proxies[kind].address, tenant.tls) as connection:
                host = {"Host": "cmon.test"}
                answer = connection.request("/v1/discover", host)
                if answer.status != 200:
                    return False
                rows = json.loads(answer.text)["containers"]
                return not rows or connection.request(
                    f"/v1/{rows[0]['vm_uuid']}/metrics", host).status == 200
        except OSError:
            return False

    def close(self) -> None:
        """Send SIGTERM to all; each must exit 0."""
        for program in [*self.proxies.values(), *(machine.agent for machine in self.machines)]:
            status = program.stop()
            if status != 0:
                self.violation(f"{program.command[1:4]} ended with {status}")
        for service in self.services:
            service.stop()
        for machine in self.machines:
            machine.kernel.close()


def pem_of(spki: bytes) -> str:
    """A public key as mahi has it."""
    return ssl.DER_cert_to_PEM_cert(spki).replace("CERTIFICATE", "PUBLIC KEY")


def children(pid: int) -> list[int]:
    """Direct children of a process."""
    try:
        return [int(word) for word in
                Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def usage_of(pid: int) -> list[int]:
    """Resident kB, descriptors, threads and processes of a process and its children."""
    total = [0, 0, 0, 0]
    for one in (pid, *children(pid)):
        try:
            status = Path(f"/proc/{one}/status").read_text()
            resident = re.search(r"VmRSS:\s+(\d+)", status)
            threads = re.search(r"Threads:\s+(\d+)", status)
            found = [int(resident.group(1)) if resident else 0, len(os.listdir(f"/proc/{one}/fd")),
                     int(threads.group(1)) if threads else 0, 1]
        except OSError:
            continue
        total = [a + b for a, b in zip(total, found)]
    return total


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Everything at once; each answer is checked.")
    parser.add_argument("seconds", type=float, nargs="?", default=60.0)
    parser.add_argument("seed", type=int, nargs="?", default=random.randrange(1 << 32))
    options = parser.parse_args()
    seconds, seed = options.seconds, options.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), seed)
        try:
            summary = soak.run(seconds)
        finally:
            for program in soak.programs:
                program.kill()
            for service in soak.services:
                service.stop()
    for violation in soak.violations[:20]:
        print("VIOLATION", violation)
    print(json.dumps(summary, indent=1))
    return 1 if soak.violations else 0


if __name__ == "__main__":
    sys.exit(main())
