# SPDX-License-Identifier: MPL-2.0
"""A small data center of real processes: agents, a proxy, a name server, a tenant's Prometheus."""
from __future__ import annotations

import copy
import json
import os
import re
import select
import shutil
import ssl
import subprocess
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from support import (
    EXAMPLES,
    ROOT,
    Address,
    Answer,
    Connection,
    Kernel,
    Program,
    agent_config,
    free_port,
    http_get,
    node,
    wait_until,
)

TLS = ROOT / "tests" / "tls"            # keys and certificates that openssl and ssh-keygen made
SUFFIX = "cmon.test"
SERVICE = f"cmon.{SUFFIX}"
# resolv.conf has no ports, but loopback has many addresses: one for each run of the tests
NAME_SERVER = f"127.53.{os.getpid() >> 8 & 255}.{os.getpid() & 255 or 1}"
ALICE_KEYS = ("rsa", "ec", "ec384")     # of TLS
LOGINS = ("alice", "bob", "carol", "admin")


def tool(name: str) -> str:
    """The path of a program that the test cannot do without."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def need_root() -> None:
    """Mount namespaces and port 53 need it."""
    if os.geteuid() != 0:
        pytest.skip("not root: no mount namespace, no name server on port 53")


class Credentials:
    """A client certificate and its key."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self.certificate, self.key = certificate, key

    def context(self) -> ssl.SSLContext:
        """For clients in Python; the server is not checked here (curl and Prometheus do)."""
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.load_cert_chain(self.certificate, self.key)
        return context


ALICE = Credentials(TLS / "new_rsa.pem", TLS / "client.key")


def self_signed(folder: Path, login: str, key: Path, name: str = "") -> Credentials:
    """An old-style certificate, made by openssl."""
    path = folder / f"{name or login}.pem"
    subprocess.run([tool("openssl"), "req", "-x509", "-new", "-key", key, "-subj", f"/CN={login}",
                    "-days", "365", "-out", path], check=True, stderr=subprocess.DEVNULL)
    return Credentials(path, key)


class DataCenter:
    """A folder, an inventory, and the processes that serve it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs: list[Program] = []
        self.agents: list[Program] = []
        self.proxy: Program
        self.address: Address
        self.admin: Address
        self.inventory: dict[str, Any] = json.loads((EXAMPLES / "inventory.json").read_text())
        self.settings: dict[str, Any] = {}
        self.credentials = {"alice": ALICE}
        for login in LOGINS[1:]:
            key = folder / f"{login}.key"
            subprocess.run([tool("openssl"), "ecparam", "-name", "prime256v1", "-genkey", "-noout",
                            "-out", key], check=True)
            self.credentials[login] = self_signed(folder, login, key)
        for account in self.inventory["accounts"]:
            account["keys"] = self.public_keys(account["login"])
        self._server_certificate()

    def public_keys(self, login: str) -> list[str]:
        """What the account has registered."""
        if login == "alice":
            return [(TLS / f"{name}.pub").read_text() for name in ALICE_KEYS]
        pem = subprocess.run([tool("openssl"), "pkey", "-in", self.credentials[login].key,
                              "-pubout"], check=True, stdout=subprocess.PIPE).stdout
        return [pem.decode()]

    def _server_certificate(self) -> None:
        names = f"subjectAltName=DNS:*.{SUFFIX},DNS:{SERVICE},DNS:localhost,IP:127.0.0.1"
        subprocess.run([tool("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt",
                        "ec_paramgen_curve:P-256", "-nodes", "-keyout", self.folder / "server.key",
                        "-out", self.folder / "server.pem", "-days", "30", "-subj",
                        f"/CN={SERVICE}", "-addext", names], check=True, stderr=subprocess.DEVNULL)

    # --- agents and proxy -------------------------------------------------------------------------

    def keep(self, program: Program) -> Program:
        """Ends it with the rest."""
        self.programs.append(program)
        return program

    def start_agent(self, *arguments: str | Path) -> Program:
        """One more compute node, on a port of its own."""
        agent = self.keep(Program.agent(*arguments))
        self.agents.append(agent)
        return agent

    def write_inventory(self) -> None:
        """Whole or not at all, as anyone who feeds the proxy has to do it."""
        (self.folder / "inventory.new").write_text(json.dumps(self.inventory))
        os.replace(self.folder / "inventory.new", self.folder / "inventory.json")

    def start_proxy(self, listen: str = "127.0.0.1:0", **settings: Any) -> Program:
        """The proxy over what `inventory` says; the servers' addresses are those of the agents."""
        for server, agent in zip(self.inventory["servers"], self.agents):
            server["admin_ip"] = f"{agent.address[0]}:{agent.address[1]}"
        self.write_inventory()
        self.settings = {"admin_listen": "127.0.0.1:0", "inventory": {"file": "inventory.json"},
                         "tls": {"certificate": "server.pem", "key": "server.key"}, **settings}
        (self.folder / "proxy.json").write_text(json.dumps(self.settings))
        self.proxy = self.keep(Program.proxy(self.folder / "proxy.json", "--listen", listen))
        self.address, self.admin = self.proxy.addresses(2)[:2]
        return self.proxy

    def vms(self, login: str, state: str = "running") -> list[dict[str, Any]]:
        """The containers of an account that its Prometheus should see."""
        [owner] = [a["uuid"] for a in self.inventory["accounts"] if a["login"] == login]
        return [vm for vm in self.inventory["vms"] if vm["owner_uuid"] == owner
                and vm["state"] == state and vm["tags"].get("smartdc_role") != "nat"]

    # --- asking -----------------------------------------------------------------------------------

    def connect(self, login: str = "alice") -> Connection:
        """A kept connection to the proxy as an account."""
        return Connection(self.address, self.credentials[login].context(), SERVICE)

    def get(self, path: str, login: str = "alice", host: str = SERVICE) -> Answer:
        """One request as an account."""
        return http_get(self.address, path, {"Host": f"{host}:{self.address[1]}"},
                        tls=self.credentials[login].context(), server_name=host)

    def page(self, uuid: str, login: str = "alice") -> Answer:
        """A container's page by its host name."""
        return self.get("/metrics", login, f"{uuid}.{SUFFIX}")

    def curl(self, url_path: str, credentials: Credentials | None, host: str = SERVICE,
             *more: str) -> tuple[int, str]:
        """curl, which checks our certificate; its last status and the body (0: no HTTP at all)."""
        command = [tool("curl"), "-sS", "--max-time", "20", "--cacert", self.folder / "server.pem",
                   "--resolve", f"{host}:{self.address[1]}:{self.address[0]}",
                   "-w", "\n%{http_code}", *more]
        if credentials is not None:
            command += ["--cert", credentials.certificate, "--key", credentials.key]
        # the OpenSSL of today's clients does not show a SHA-1 certificate unless it is told to
        lenient = self.folder / "openssl.cnf"
        lenient.write_text("openssl_conf = a\n[a]\nssl_conf = b\n[b]\nsystem_default = c\n"
                           "[c]\nCipherString = DEFAULT@SECLEVEL=0\n")
        done = subprocess.run([*command, f"https://{host}:{self.address[1]}{url_path}"],
                              check=False, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env={**os.environ, "OPENSSL_CONF": str(lenient)})
        body, _, status = done.stdout.decode().rpartition("\n")
        return int(status or 0), body or done.stderr.decode()

    # --- Prometheus -------------------------------------------------------------------------------

    def start_name_server(self, *names: str) -> None:
        """dnsmasq for our suffix (every name under it), or for the given names only."""
        need_root()
        addresses = [f"--address=/{name}/127.0.0.1" for name in names or (SUFFIX,)]
        if names:
            addresses.append(f"--local=/{SUFFIX}/")
        self.keep(Program(
            tool("dnsmasq"), "--no-daemon", "--conf-file=/dev/null", "--no-resolv", "--no-hosts",
            f"--listen-address={NAME_SERVER}", "--bind-interfaces", "--pid-file=", "--user=root",
            *addresses)).wait_for_log("started|failed|cannot")
        (self.folder / "resolv.conf").write_text(f"nameserver {NAME_SERVER}\n")

    def with_our_names(self, *command: str) -> Program:
        """A program that asks our name server alone."""
        need_root()
        inside = 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'
        return Program(tool("unshare"), "-m", "sh", "-c", inside, "sh",
                       self.folder / "resolv.conf", *command)

    def start_prometheus(self, jobs: list[dict[str, Any]], name: str = "prometheus",
                         **more: Any) -> Prometheus:
        """Debian's Prometheus, which sees only our names; `more` goes into its configuration."""
        need_root()
        return Prometheus(self, jobs, name, more)

    def job(self, login: str, **discovery: Any) -> dict[str, Any]:
        """A scrape job as the README has it; `triton` or `http` discovery."""
        tls = {"ca_file": str(self.folder / "server.pem"),
               "cert_file": str(self.credentials[login].certificate),
               "key_file": str(self.credentials[login].key)}
        triton = {"account": login, "dns_suffix": SUFFIX, "endpoint": SERVICE, "version": 1,
                  "port": self.address[1], "refresh_interval": "1s", "tls_config": tls}
        return {"job_name": login, "scheme": "https", "tls_config": tls,
                "triton_sd_configs": [{**triton, **discovery}]}

    def http_job(self, login: str, path: str = "/v1/sd") -> dict[str, Any]:
        """The same by HTTP discovery: one host name, no wildcard."""
        job = self.job(login)
        del job["triton_sd_configs"]
        job["job_name"] = f"{login}-http"
        job["http_sd_configs"] = [{"url": f"https://{SERVICE}:{self.address[1]}{path}",
                                   "refresh_interval": "1s", "tls_config": job["tls_config"]}]
        return job

    def stop(self, failed: bool) -> None:
        """Ends all; our own programs must end well."""
        ours = [p for p in self.programs if any("cmon_" in word for word in p.command)]
        statuses = {}
        for program in reversed(self.programs):
            if program in ours and program.process.poll() is None:
                statuses[" ".join(program.command)] = program.stop()
            program.kill()
        if failed:
            for program in ours:
                print(f"--- {' '.join(program.command)}\n{program.log[-5000:]}")
        assert not any(statuses.values()), statuses


class Prometheus:
    """A running Prometheus and its API."""

    def __init__(self, center: DataCenter, jobs: list[dict[str, Any]], name: str,
                 more: Mapping[str, Any]) -> None:
        folder = center.folder / name
        folder.mkdir()
        config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
                  "scrape_configs": jobs, **more}
        (folder / "prometheus.yml").write_text(json.dumps(config))      # JSON is YAML
        subprocess.run([tool("promtool"), "check", "config", folder / "prometheus.yml"], check=True,
                       stdout=subprocess.PIPE)
        self.folder = folder
        self.address = ("127.0.0.1", free_port())
        self.program = center.keep(center.with_our_names(
            tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.address[0]}:{self.address[1]}", "--log.level=warn"))
        wait_until(self._ready, "Prometheus")

    def _ready(self) -> bool:
        try:
            return http_get(self.address, "/-/ready").status == 200
        except OSError:
            assert self.program.process.poll() is None, self.program.log
            return False

    def api(self, path: str, **parameters: str) -> Any:
        """The data of an API call."""
        query = urllib.parse.urlencode(parameters)
        answer = http_get(self.address, f"/api/v1/{path}?{query}")
        assert answer.status == 200, answer.text
        return json.loads(answer.body)["data"]

    def targets(self, job: str | None = None) -> list[dict[str, Any]]:
        """The active targets."""
        return [target for target in self.api("targets", state="active")["activeTargets"]
                if job in (None, target["labels"]["job"])]

    def query(self, expression: str, without: Iterable[str] = ()) -> dict[str, float]:
        """An instant query as `name{labels}` (sorted, but for those `without`) and value."""
        found = {}
        for item in self.api("query", query=expression)["result"]:
            labels = dict(item["metric"])
            name = labels.pop("__name__", "")
            inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items())
                              if key not in without)
            found[f"{name}{{{inside}}}" if inside else name] = float(item["value"][1])
        return found

    def wait_for_up(self, job: str, count: int) -> list[dict[str, Any]]:
        """Its targets, once there are so many and all are up."""
        def up() -> list[dict[str, Any]] | None:
            targets = self.targets(job)
            good = [target for target in targets if target["health"] == "up"]
            return targets if len(good) == len(targets) == count else None
        try:
            return wait_until(up, f"{count} targets of {job}") or []
        except AssertionError as error:
            shown = [(t["scrapeUrl"], t["health"], t["lastError"]) for t in self.targets(job)]
            raise AssertionError(f"{error}\n{shown}\n{self.program.log[-3000:]}") from None


def live_agent(center: DataCenter, library: Path, frame: Mapping[str, Any],
               **settings: Any) -> tuple[Program, Kernel]:
    """An agent over the stand-in library and programs, as on a compute node, without vminfod."""
    folder = center.folder / f"node{len(center.agents)}"
    kernel = Kernel(library, folder, frame["kstats"])
    config = agent_config(folder, kernel, frame["commands"], **settings)
    return center.start_agent("--config", config), kernel


def same_page(one: str, other: str, without: Iterable[str] = ()) -> bool:
    """Whether two pages differ only in what always differs: times and ages."""
    moving = re.compile("|".join([r"_metrics_timer_seconds ", r"^time_of_day ", "_age_seconds",
                                  "_metrics_cached_boolean ", *without]))

    def fixed(page: str) -> list[str]:
        return [line for line in page.splitlines() if not moving.search(line)]
    return fixed(one) == fixed(other)


def nodes(count: int) -> list[dict[str, Any]]:
    """The recorded node several times, each with its own zones: for data centers of more nodes."""
    made = []
    for number in range(count):
        recorded = json.dumps(node())
        for vm in node()["frames"][0]["vms"]:
            recorded = recorded.replace(vm["uuid"], f"{number:02x}{vm['uuid'][2:]}")
        made.append(json.loads(recorded))
    return copy.deepcopy(made)


class Browser:
    """Headless Chromium with a client certificate, as a tenant's browser has it."""

    def __init__(self, center: DataCenter, login: str = "") -> None:
        self.center = center
        self.folder = center.folder / f"browser-{login or 'nobody'}"
        database = self.folder / "home" / ".pki" / "nssdb"
        database.mkdir(parents=True)
        managed = self.folder / "chromium" / "policies" / "managed"
        managed.mkdir(parents=True)
        (managed / "certificates.json").write_text(json.dumps({
            "AutoSelectCertificateForUrls": ['{"pattern":"https://*","filter":{}}']}))
        store = f"sql:{database}"
        subprocess.run([tool("certutil"), "-N", "-d", store, "--empty-password"], check=True)
        if login:
            mine = center.credentials[login]
            bundle = self.folder / "bundle.p12"
            subprocess.run([tool("openssl"), "pkcs12", "-export", "-in", mine.certificate, "-inkey",
                            mine.key, "-out", bundle, "-passout", "pass:", "-name", login],
                           check=True)
            subprocess.run([tool("pk12util"), "-i", bundle, "-d", store, "-W", ""], check=True,
                           stdout=subprocess.DEVNULL)

    def run(self, url: str, *flags: str, seconds: float = 90) -> str:
        """What Chromium prints. It trusts any server: the test is not about that."""
        need_root()         # its policies lie in /etc: a mount namespace gives it some of its own
        command = [tool("chromium"), "--headless=new", "--no-sandbox", "--disable-gpu",
                   "--disable-dev-shm-usage", "--no-first-run", "--ignore-certificate-errors",
                   "--disable-background-networking", "--disable-component-update",
                   f"--user-data-dir={self.folder / 'profile'}", "--window-size=1280,900",
                   f"--host-resolver-rules=MAP *.{SUFFIX} 127.0.0.1", *flags, url]
        done = subprocess.run(
            [tool("unshare"), "-m", "sh", "-c",
             'mount --bind "$1" /etc/chromium && shift && exec "$@"', "sh",
             self.folder / "chromium", *command], check=False, timeout=seconds,
            env={**os.environ, "HOME": str(self.folder / "home")},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        return done.stdout.decode()

    def dom(self, url: str, milliseconds: int = 5000, *flags: str) -> str:
        """The page after its script has run for so long."""
        return self.run(url, "--dump-dom", f"--virtual-time-budget={milliseconds}", *flags)

    def picture(self, url: str, name: str, milliseconds: int = 5000) -> Path:
        """A screenshot, to be looked at by a person; CMON_PICTURES says where to leave it."""
        path = Path(os.environ.get("CMON_PICTURES", str(self.folder))) / f"{name}.png"
        self.run(url, f"--screenshot={path}", f"--virtual-time-budget={milliseconds}")
        return path


class Session:
    """A page in Chromium, driven over DevTools' pipe: JSON that ends in NUL, on 3 and 4."""

    def __init__(self, browser: Browser, url: str) -> None:
        need_root()
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [tool("chromium"), "--headless=new", "--no-sandbox", "--disable-gpu",
                   "--disable-dev-shm-usage", "--no-first-run", "--ignore-certificate-errors",
                   "--disable-background-networking", "--disable-component-update",
                   f"--user-data-dir={browser.folder / 'session'}", "--window-size=1280,900",
                   f"--host-resolver-rules=MAP *.{SUFFIX} 127.0.0.1", "--remote-debugging-pipe",
                   "about:blank"]
        self._process = subprocess.Popen(
            [tool("bash"), "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash",
             tool("unshare"), "-m", "sh", "-c", 'mount --bind "$1" /etc/chromium && shift && '
             'exec "$@"', "sh", browser.folder / "chromium", *command],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env={**os.environ, "HOME": str(browser.folder / "home")})
        os.close(theirs_in)
        os.close(theirs_out)
        self._rest, self._number, self._session = b"", 0, ""
        self.faults: list[str] = []         # exceptions of the page's script
        self.requests = 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True
                                  )["sessionId"]
        for domain in ("Runtime", "Page", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)

    def call(self, method: str, **parameters: Any) -> Any:
        """One command of the protocol and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("method") == "Runtime.exceptionThrown":
                self.faults.append(json.dumps(answer["params"])[:2000])
            self.requests += answer.get("method") == "Network.requestWillBeSent"
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> Any:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], 60)
            assert ready, "Chromium does not answer"
            more = os.read(self._in, 65536)
            assert more, "Chromium has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def value(self, expression: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Wait until it is true; while a page loads, what it asks for may not be there."""
        guarded = f"(() => {{ try {{ return {expression} }} catch (error) {{ return false }} }})()"
        return wait_until(lambda: self.value(guarded), expression, 90)

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
