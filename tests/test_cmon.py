# SPDX-License-Identifier: MPL-2.0
"""The users' command as a process, with a faulty stand-in proxy; and the real demo."""
from __future__ import annotations

import errno
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, NamedTuple
from collections.abc import Iterator, Mapping

import pytest
from cmon_agent import parse
from cmon_proxy import make_certificate, make_key
from support import EXAMPLES, PATIENCE, ROOT, Program, free_port, wait_until

CMON = ROOT / "cmon.py"
Done = subprocess.CompletedProcess
ADDRESS = "127.0.0.1"
NODE_ID = "4c4c4544-0042-3510-8051-c4c04f4b3533"


class Answer(NamedTuple):
    status: int
    body: bytes
    type: str = "text/plain"


def container(alias: Any, uuid: str, state: str = "running", brand: str = "joyent",
              **more: Any) -> dict[str, Any]:
    return {"vm_alias": alias, "vm_uuid": uuid, "vm_state": state, "vm_brand": brand,
            "server_uuid": NODE_ID, "groups": [], **more}


CONTAINERS = [
    container("web01", "0b7e2c1a-5d44-4f0e-9c3a-7f21d8aa6b10"),
    container("web02", "0b7e9999-5d44-4f0e-9c3a-7f21d8aa6b11", brand="lx"),
    container("db", "aaaaaaaa-0000-4f0e-9c3a-7f21d8aa6b12"),
    container("db", "bbbbbbbb-0000-4f0e-9c3a-7f21d8aa6b13", state="stopped"),
]
PAGE = b"# HELP load_average One minute.\n# TYPE load_average gauge\nload_average 0.5\n"
GOOD = {
    "/v1/discover": Answer(200, json.dumps({"containers": CONTAINERS}).encode(),
                           "application/json"),
    "/v1/discover?groups=a%2Cb": Answer(200, b'{"containers": []}', "application/json"),
    f"/v1/{CONTAINERS[0]['vm_uuid']}/metrics": Answer(200, PAGE),
    f"/v1/{CONTAINERS[1]['vm_uuid']}/metrics": Answer(200, b"two 2\n"),
}


class StandIn:
    """A TLS server whose answers the test sets."""

    def __init__(self, certificate: Path, key: Path, address: str = ADDRESS) -> None:
        self.answers: dict[str, Answer] = dict(GOOD)
        self.requests: list[tuple[str, Mapping[str, str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.requests.append((self.path, dict(self.headers)))
                answer = outer.answers.get(self.path, Answer(404, b"no such container\n"))
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.type)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                pass

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.server = Server((address, 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        self.url = f"https://{address}:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Files(NamedTuple):
    ca: Path
    cert: Path
    key: Path
    other_key: Path
    secret_key: Path        # has a passphrase
    folder: Path


# an EC key that is protected by a passphrase, which nobody needs to know; made with
# `openssl ecparam -genkey -name prime256v1 | openssl ec -aes128`
SECRET_KEY = """\
-----BEGIN EC PRIVATE KEY-----
Proc-Type: 4,ENCRYPTED
DEK-Info: AES-128-CBC,{iv}

{body}
-----END EC PRIVATE KEY-----
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("certificates")
    key, ca_key = make_key(), make_key()
    made = {
        "ca.pem": make_certificate(ca_key, "a CA", is_ca=True),
        "key.pem": key, "other.pem": make_key(),
        "cert.pem": make_certificate(key, "alice"),
        "server-key.pem": make_key(),
    }
    made["server.pem"] = make_certificate(
        made["server-key.pem"], "localhost", issuer=made["ca.pem"], signing_key=ca_key,
        names=["localhost", ADDRESS], purposes=["serverAuth"])
    made["secret.pem"] = SECRET_KEY.format(iv="00112233445566778899AABBCCDDEEFF",
                                           body="\n".join(["A" * 64, "B" * 64, "C" * 32])).encode()
    for name, content in made.items():
        (folder / name).write_bytes(content)
    return Files(*(folder / name for name in ("ca.pem", "cert.pem", "key.pem", "other.pem",
                                              "secret.pem")), folder)


@pytest.fixture()
def proxy(files: Files) -> Iterator[StandIn]:
    server = StandIn(files.folder / "server.pem", files.folder / "server-key.pem")
    yield server
    server.close()


def run(*arguments: Any, env: Mapping[str, str] | None = None, stdout: Any = subprocess.PIPE,
        python: str = sys.executable) -> "Done[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CMON_")}
    return subprocess.run([python, str(CMON), *map(str, arguments)], env={**clean, **(env or {})},
                          stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=PATIENCE * 2)


def connection(proxy: Any, files: Files) -> list[str]:
    url = proxy if isinstance(proxy, str) else proxy.url
    return ["--url", url, "--cert", str(files.cert), "--key", str(files.key), "--ca", str(files.ca)]


def one_line(done: "Done[str]", status: int, *words: str) -> str:
    """An error as we promise it: exit status, nothing on stdout, one line on stderr."""
    assert done.returncode == status, done.stderr
    assert not done.stdout
    assert re.fullmatch(r"cmon: [^\n]+\n", done.stderr), done.stderr
    for word in words:
        assert word in done.stderr
    return done.stderr


# --- discover -------------------------------------------------------------------------------------

def test_discover_is_a_table(proxy: StandIn, files: Files) -> None:
    done = run("discover", *connection(proxy, files))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"""\
ALIAS  UUID                                  BRAND   STATE    NODE
db     aaaaaaaa-0000-4f0e-9c3a-7f21d8aa6b12  joyent  running  {NODE_ID}
db     bbbbbbbb-0000-4f0e-9c3a-7f21d8aa6b13  joyent  stopped  {NODE_ID}
web01  0b7e2c1a-5d44-4f0e-9c3a-7f21d8aa6b10  joyent  running  {NODE_ID}
web02  0b7e9999-5d44-4f0e-9c3a-7f21d8aa6b11  lx      running  {NODE_ID}
"""


def test_discover_json_is_the_proxys_answer(proxy: StandIn, files: Files) -> None:
    done = run("discover", "--json", *connection(proxy, files))
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"containers": CONTAINERS}


def test_discover_asks_for_groups(proxy: StandIn, files: Files) -> None:
    done = run("discover", "--groups", "a,b", *connection(proxy, files))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "cmon: no containers in a,b\n")
    assert proxy.requests[0][0] == "/v1/discover?groups=a%2Cb"


def test_discover_without_containers_says_so(proxy: StandIn, files: Files) -> None:
    proxy.answers["/v1/discover"] = Answer(200, b'{"containers": []}')
    done = run("discover", *connection(proxy, files))
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "cmon: no containers: this account has no running containers\n"


def test_environment_names_proxy_and_user_and_flags_win(proxy: StandIn, files: Files) -> None:
    env = {"CMON_URL": proxy.url, "CMON_CERT": str(files.cert), "CMON_KEY": str(files.key)}
    assert run("discover", "--ca", files.ca, env=env).returncode == 0
    env["CMON_URL"] = "https://127.0.0.1:1"
    assert run("discover", "--ca", files.ca, "--url", proxy.url + "/", env=env).returncode == 0
    one_line(run("discover", "--ca", files.ca, env=env), 1, "cannot reach 127.0.0.1:1")


def test_names_given_by_a_tenant_cannot_control_the_terminal(proxy: StandIn, files: Files) -> None:
    odd = container("a\x1b[31m\nb\u202e", CONTAINERS[0]["vm_uuid"], brand=None, new=[{}])
    proxy.answers["/v1/discover"] = Answer(200, json.dumps({"containers": [odd]}).encode())
    done = run("discover", *connection(proxy, files), env={"PYTHONIOENCODING": "utf-8"})
    line = done.stdout.splitlines()[1]
    assert line.startswith("a?[31m b?  0b7e2c1a-5d44-4f0e-9c3a-7f21d8aa6b10  -")


def test_connection_flags_work_before_and_after_the_command(proxy: StandIn, files: Files) -> None:
    good = connection(proxy, files)
    assert run(*good, "discover").returncode == 0
    assert run("--url", "https://127.0.0.1:1", "--timeout", "5", "discover", *good).returncode == 0
    env = dict(zip(("CMON_URL", "CMON_CERT", "CMON_KEY", "CMON_CA"), good[1::2]))
    assert run("discover", env=env).returncode == 0


@pytest.mark.parametrize("body", [
    b"<html>", b"{}", b"[]", b'{"containers": 1}', b'{"containers": [1]}', b"\xff", b'{"cns": []}',
    b"[" * 100_000,
], ids=["html", "empty", "a list", "a number", "numbers", "not UTF-8", "nodes", "deep"])
def test_discovery_of_something_else_is_refused(body: bytes, proxy: StandIn, files: Files) -> None:
    proxy.answers["/v1/discover"] = Answer(200, body)
    one_line(run("discover", *connection(proxy, files)), 1, "not a proxy's answer: check the URL")


# --- monitor --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [
    "web01", CONTAINERS[0]["vm_uuid"], CONTAINERS[0]["vm_uuid"].upper(), "0b7e2", "0B7E2C1A-5d44",
], ids=["alias", "uuid", "uuid in capitals", "prefix", "prefix in capitals"])
def test_monitor_prints_the_page(name: str, proxy: StandIn, files: Files) -> None:
    done = run("monitor", name, *connection(proxy, files))
    assert (done.returncode, done.stderr, done.stdout) == (0, "", PAGE.decode())


def test_monitor_copies_bytes_unchanged_in_any_locale(proxy: StandIn, files: Files) -> None:
    page = 'a{b="é→😀"} 1\n'.encode()
    proxy.answers[f"/v1/{CONTAINERS[0]['vm_uuid']}/metrics"] = Answer(200, page)
    command = [sys.executable, str(CMON), "monitor", "web01", *connection(proxy, files)]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert subprocess.run(command, stdout=subprocess.PIPE, env=env).stdout == page


def test_table_in_a_locale_without_the_letters(proxy: StandIn, files: Files) -> None:
    odd = container("caf\u00e9", CONTAINERS[0]["vm_uuid"])
    proxy.answers["/v1/discover"] = Answer(200, json.dumps({"containers": [odd]}).encode())
    done = run("discover", *connection(proxy, files), env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "caf?" in done.stdout


def test_monitor_of_a_uuid_does_without_discovery(proxy: StandIn, files: Files) -> None:
    run("monitor", CONTAINERS[0]["vm_uuid"], "--timeout", "7.5", *connection(proxy, files))
    (path, headers), = proxy.requests
    assert path == f"/v1/{CONTAINERS[0]['vm_uuid']}/metrics"
    assert headers["X-Prometheus-Scrape-Timeout-Seconds"] == "7.5"


def test_monitor_requires_a_name(proxy: StandIn, files: Files) -> None:
    one_line(run("monitor", "", *connection(proxy, files)), 2, "no container given")


@pytest.mark.parametrize("name, words", [
    ("web03", "no container 'web03'; did you mean web01 or web02?"),
    ("WEB", "did you mean web01 or web02?"),
    ("ngnix", "no container 'ngnix'; `cmon.py discover` lists them"),
    ("0b7e", "'0b7e' matches 0b7e2c1a-5d44-4f0e-9c3a-7f21d8aa6b10 (web01, running) and 0b7e9999-"),
    ("db", "(db, running) and bbbbbbbb-0000-4f0e-9c3a-7f21d8aa6b13 (db, stopped): use the UUID"),
    ("a", "no container 'a'"),
])
def test_monitor_names_the_candidates(name: str, words: str, proxy: StandIn, files: Files) -> None:
    one_line(run("monitor", name, *connection(proxy, files)), 1, words)


def test_monitor_of_many_namesakes_names_some(proxy: StandIn, files: Files) -> None:
    many = [container("x", f"{number:08d}-5d44-4f0e-9c3a-7f21d8aa6b10") for number in range(12)]
    proxy.answers["/v1/discover"] = Answer(200, json.dumps({"containers": many}).encode())
    one_line(run("monitor", "x", *connection(proxy, files)), 1, "and 4 more: use the UUID")


def test_monitor_without_any_container(proxy: StandIn, files: Files) -> None:
    proxy.answers["/v1/discover"] = Answer(200, b'{"containers": []}')
    one_line(run("monitor", "web01", *connection(proxy, files)), 1,
             "account has no running containers")


@pytest.mark.parametrize("answer, words", [
    (Answer(404, b"no such container\n"), "says 404: no such container"),
    (Answer(429, b"quota of alice is used up; again in 3 s\n"), "says 429: quota of alice"),
    (Answer(503, b""), "says 503: no reason given"),
    (Answer(500, b"a\nb\x1b[2Jc\xff"), "says 500: a b?[2Jc"),
])
def test_refusals_are_shown_in_the_proxys_words(answer: Answer, words: str, proxy: StandIn,
                                                files: Files) -> None:
    proxy.answers[f"/v1/{CONTAINERS[0]['vm_uuid']}/metrics"] = answer
    done = run("monitor", "web01", *connection(proxy, files), env={"PYTHONIOENCODING": "utf-8"})
    one_line(done, 1, f"127.0.0.1:{proxy.port} {words}")


# --- the way to the proxy -------------------------------------------------------------------------

def test_nobody_listens(files: Files) -> None:
    port = free_port()
    assert one_line(run("discover", *connection(f"https://{ADDRESS}:{port}", files)), 1) == (
        f"cmon: cannot reach {ADDRESS}:{port}: connection refused\n")


def test_port_left_out(files: Files) -> None:
    one_line(run("discover", *connection("https://proxy.invalid", files)), 1,
             "cannot reach proxy.invalid:443",
             "default port is 9163: try --url https://proxy.invalid:9163")


def test_silent_proxy(files: Files) -> None:
    with socket.socket() as silent:
        silent.bind((ADDRESS, 0))
        silent.listen(5)
        port = silent.getsockname()[1]
        begin = time.monotonic()
        done = run("discover", "--timeout", "0.5", *connection(f"https://{ADDRESS}:{port}", files))
        assert time.monotonic() - begin < 10
    one_line(done, 1, f"{ADDRESS}:{port}", "timed out")


def test_unknown_authority(proxy: StandIn, files: Files) -> None:
    arguments = connection(proxy, files)[:-2]
    one_line(run("discover", *arguments), 1, "certificate is not trusted", "with --ca FILE")


def test_certificate_for_another_name(files: Files) -> None:
    """The advice differs from that for an unknown authority."""
    server = StandIn(files.folder / "server.pem", files.folder / "server-key.pem", "127.0.0.2")
    try:
        url = f"https://127.0.0.2:{server.port}"
        one_line(run("discover", *connection(url, files)), 1, "certificate is not trusted",
                 "use --url with a name that the certificate is valid for")
    finally:
        server.close()


def test_plain_http_port(files: Files) -> None:
    server = ThreadingHTTPServer((ADDRESS, 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        url = f"https://{ADDRESS}:{server.server_port}"
        one_line(run("discover", *connection(url, files)), 1,
                 f"TLS handshake with {url[8:]} failed")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("url", [
    "cmon.dc.example", "http://cmon.dc.example", "https://", "https://a:b", "https://a:99999",
    "https://a/v1", "https://u@a", "https://a?x", "x y", "https://[::1"])
def test_invalid_urls(url: str, files: Files) -> None:
    one_line(run("discover", *connection(url, files)), 2,
             "not the URL of a proxy: use https://HOST:PORT")


# --- files ----------------------------------------------------------------------------------------

def test_no_url() -> None:
    one_line(run("discover"), 2, "set CMON_URL or use --url")


@pytest.mark.parametrize("flags, words", [
    ([], "set CMON_CERT or use --cert"), (["--cert", "x"], "set CMON_KEY or use --key")])
def test_no_certificate(flags: list[str], words: str) -> None:
    one_line(run("discover", "--url", "https://a:1", *flags), 2, words)


@pytest.mark.parametrize("change, words", [
    ({"cert": "none.pem"}, "cannot read the certificate none.pem: no such file"),
    ({"key": "none.pem"}, "cannot read the key none.pem: no such file"),
    ({"ca": "none.pem"}, "cannot read the CA none.pem: no such file"),
    ({"key": "/"}, "cannot read the key /: is a directory"),
    ({"cert": "/dev/zero"}, "cannot read the certificate /dev/zero: is a device: use a regular"),
    ({"key": "other_key"}, "does not belong to the certificate"),
    ({"key": "cert"}, "are not a certificate and its key in PEM"),
    ({"cert": "key"}, "are not a certificate and its key in PEM"),
    ({"ca": "key"}, "contains no CA certificate in PEM form"),
    ({"key": "secret_key"}, "has a passphrase, and there is no terminal to ask for it"),
])
def test_wrong_files(change: Mapping[str, str], words: str, files: Files) -> None:
    chosen = {"cert": str(files.cert), "key": str(files.key), "ca": str(files.ca)}
    for flag, value in change.items():
        chosen[flag] = str(getattr(files, value, value))
    flags = [word for flag, value in chosen.items() for word in (f"--{flag}", value)]
    one_line(run("discover", "--url", "https://127.0.0.1:1", *flags), 1, words)


# --- command line ---------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments", [
    [], ["unknown"], ["monitor"], ["discover", "--js"], ["discover", "--timeout", "0"],
    ["discover", "--timeout", "nan"], ["demo", "--agent-port", "0"],
    ["demo", "--proxy-port", "65536"], ["demo", "--forward", "http=x"]])
def test_wrong_command_lines(arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_version_is_the_kits() -> None:
    from cmon_agent import __version__
    assert run("--version").stdout == f"cmon {__version__}\n"


def test_alone_it_says_what_is_missing(tmp_path: Path) -> None:
    shutil.copy(str(CMON), str(tmp_path))
    done = subprocess.run([sys.executable, str(tmp_path / "cmon.py")], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True)
    one_line(done, 1, "cmon_agent.py of the same version must be beside cmon.py")


# --- pipes and terminals --------------------------------------------------------------------------

def test_a_closed_pipe_is_quiet(proxy: StandIn, files: Files) -> None:
    proxy.answers[f"/v1/{CONTAINERS[0]['vm_uuid']}/metrics"] = Answer(200, b"x 1\n" * 500_000)
    command = " ".join(map(shlex.quote, [sys.executable, str(CMON), "monitor", "web01",
                                         *connection(proxy, files)]))
    done = subprocess.run(["/bin/sh", "-c", f"{{ {command}; echo status $? >&2; }} | head -n 1"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=PATIENCE)
    assert (done.stdout, done.stderr) == (b"x 1\n", b"status 0\n")


def test_full_disk(proxy: StandIn, files: Files) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "w") as full:
        done = run("monitor", "web01", *connection(proxy, files), stdout=full)
    assert (done.returncode, done.stderr) == (1, "cmon: no space left on device\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_outputs(closed: str, proxy: StandIn, files: Files) -> None:
    command = " ".join(map(shlex.quote, [sys.executable, str(CMON), "discover",
                                         *connection(proxy, files)]))
    done = subprocess.run(["/bin/sh", "-c", f"{command} {closed}"], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=PATIENCE)
    assert done.returncode == 0
    assert b"Traceback" not in done.stdout


def on_terminal(arguments: list[str], columns: int = 80,
                env: Mapping[str, str] | None = None) -> str:
    """What a terminal of that width gets to see."""
    import fcntl
    import struct
    import termios
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    clean = {name: value for name, value in os.environ.items()
             if not name.startswith("CMON_") and name not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen([sys.executable, str(CMON), *arguments], stdin=slave, stdout=slave,
                               stderr=slave, env={**clean, "TERM": "xterm", "LANG": "C.UTF-8",
                                                  **(env or {})})
    os.close(slave)
    seen = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError as error:        # Linux: the other side is closed
            assert error.errno == errno.EIO
            break
        if not piece:
            break
        seen += piece
    process.wait(PATIENCE)
    os.close(master)
    return seen.decode().replace("\r\n", "\n")


def test_table_fits_a_terminal(proxy: StandIn, files: Files) -> None:
    longer = container("an-alias-that-is-long-enough-to-be-cut", CONTAINERS[0]["vm_uuid"])
    proxy.answers["/v1/discover"] = Answer(200, json.dumps(
        {"containers": [*CONTAINERS, longer]}).encode())
    lines = on_terminal(["discover", *connection(proxy, files)]).splitlines()
    assert lines[0].startswith("\x1b[1mALIAS ") and lines[0].endswith("\x1b[0m")
    assert max(map(len, lines[1:])) <= 80
    assert all("-7f21d8aa6b1" in line for line in lines[1:]), "UUIDs stay whole"
    assert any(re.match("an-alias-[a-z-]*…  0b7e", line) for line in lines)
    wide = on_terminal(["discover", *connection(proxy, files)], 200)
    assert NODE_ID in wide and longer["vm_alias"] in wide


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colour_can_be_disabled(env: Mapping[str, str], proxy: StandIn, files: Files) -> None:
    assert "\x1b" not in on_terminal(["discover", *connection(proxy, files)], env=env)


def test_page_on_a_terminal_is_harmless(proxy: StandIn, files: Files) -> None:
    proxy.answers[f"/v1/{CONTAINERS[0]['vm_uuid']}/metrics"] = Answer(
        200, 'a{b="\x1b]0;owned\x07"} 1\nc 2\n'.encode())
    arguments = ["monitor", "web01", *connection(proxy, files)]
    assert on_terminal(arguments) == 'a{b="?]0;owned?"} 1\nc 2\n'
    assert "\x1b]0;owned" in run(*arguments).stdout     # a pipe gets what was served


def test_interrupt_is_quiet(files: Files) -> None:
    with socket.socket() as silent:
        silent.bind((ADDRESS, 0))
        silent.listen(5)
        url = f"https://{ADDRESS}:{silent.getsockname()[1]}"
        with subprocess.Popen([sys.executable, str(CMON), "discover", *connection(url, files)],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            accepted, _ = silent.accept()
            assert accepted.recv(1)             # its hello: now it waits for ours
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 130
            assert process.stdout is not None and process.stdout.read() == b""
            accepted.close()


# --- demo -----------------------------------------------------------------------------------------

def temporary_folders() -> list[str]:
    return sorted(name for name in os.listdir(tempfile.gettempdir())
                  if name.startswith("cmon-demo-"))


def test_demo_once_needs_nothing_on_the_path(tmp_path: Path) -> None:
    """Without tools, DNS or a writable folder except the temporary one; leaves nothing."""
    done = run("demo", "--once", env={"PATH": str(tmp_path / "empty"), "TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    assert "says 404" not in done.stdout and re.search(r"^    404: ", done.stdout, re.M)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture()
def start_demo(tmp_path: Path) -> Iterator[Callable[[], Program]]:
    """Starts a demo with its files below `tmp_path`; it ends with the test, its children too."""
    started: list[Program] = []

    def go() -> Program:
        started.append(demo_in(tmp_path))
        return started[-1]
    yield go
    for program in started:
        program.stop()


def demo_in(folder: Path) -> Program:
    """A demo that is up."""
    program = Program.cmon("demo", env={"TMPDIR": str(folder)})
    wait_until(lambda: "until Ctrl-C" in program.output or program.process.poll() is not None)
    assert program.process.poll() is None, program.log
    return program


class Running(NamedTuple):
    program: Program
    commands: list[str]


def demo_commands(output: str) -> list[str]:
    """The commands that the demo printed, as a person would copy them."""
    blocks = re.findall(r"(?m)^    ((?:curl|prometheus|\S*python\S*) (?:.*\\\n)*.*)$", output)
    return [block for block in blocks]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    program = demo_in(tmp_path_factory.mktemp("demo"))
    try:
        yield Running(program, demo_commands(program.output))
    finally:
        program.signal(signal.SIGINT)
        status = program.wait()
        program.kill()
    assert (status, program.log) == (0, "")


def paste(command: str, timeout: float = PATIENCE) -> "Done[str]":
    return subprocess.run(["/bin/sh", "-c", command], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, timeout=timeout)


def test_demo_prints_commands_that_work_when_pasted(running: Running) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    curls = [command for command in running.commands if command.startswith("curl")]
    assert len(curls) == 5
    answers = [paste(command + " --silent --show-error --max-time 20") for command in curls]
    assert [answer.returncode for answer in answers] == [0] * 5, [a.stderr for a in answers]
    discovered, page, named, foreign, node = (answer.stdout for answer in answers)
    found = json.loads(discovered)["containers"]
    assert found
    for text in (page, named, node):
        assert parse(text)
    assert foreign.startswith("HTTP/1.1 404 ") and "no such container" in foreign.splitlines()[-1]


def test_demo_prints_our_own_command(running: Running) -> None:
    command, = [command for command in running.commands if " monitor " in command]
    done = paste(command)
    assert (done.returncode, done.stderr) == (0, "")
    assert parse(done.stdout)
    export, = re.findall(r"(?m)^    (export (?:.*\\\n)*.*)$", running.program.output)
    check, = re.findall(r"(?m)^    (\S.*cmon\.py check --all)$", running.program.output)
    assert paste(f"{export}\n{check}").stdout.startswith("CMON OK: 5 containers, ")


def test_demo_shows_a_tenant_only_its_own(running: Running) -> None:
    inventory = json.loads((EXAMPLES / "inventory.json").read_text())
    owners = {vm["uuid"]: vm["owner_uuid"] for vm in inventory["vms"]}
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    asked = json.loads(paste(running.commands[0] + " --silent").stdout)["containers"]
    assert len({owners[item["vm_uuid"]] for item in asked}) == 1


def test_demo_configures_prometheus(running: Running) -> None:
    """promtool takes the file, and a real Prometheus has all targets of the tenant up."""
    command, = [command for command in running.commands if command.startswith("prometheus")]
    config = shlex.split(command.replace("\\\n", " "))[1].partition("=")[2]
    if shutil.which("promtool") is None or shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    checked = paste(f"promtool check config {shlex.quote(config)}")
    assert checked.returncode == 0, checked.stderr
    port = free_port()
    command = command.replace("127.0.0.1:9090", f"127.0.0.1:{port}")
    process = subprocess.Popen(["/bin/sh", "-c", "exec " + command], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        def targets() -> list[dict[str, Any]] | None:
            import urllib.request
            url = f"http://127.0.0.1:{port}/api/v1/targets"
            try:
                with urllib.request.urlopen(url, timeout=5) as got:
                    active = json.load(got)["data"]["activeTargets"]
            except OSError:
                return None
            return active if active and all(one["health"] != "unknown" for one in active) else None
        active = wait_until(targets, "targets in Prometheus", 90)
        assert active is not None
        assert {one["health"] for one in active} == {"up"}, [one["lastError"] for one in active]
        assert all(one["labels"]["alias"] for one in active if one["labels"]["job"] != "fleet")
    finally:
        process.terminate()
        process.wait(PATIENCE)


def demo_children(program: Program) -> dict[str, int]:
    """Process ids of agent and proxy."""
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], stdout=subprocess.PIPE,
                            universal_newlines=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return {name: int(row[0]) for row in rows if int(row[1]) == program.pid
            for name in ("agent", "proxy") if f"cmon_{name}.py" in row[2]}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
                         ids=["Ctrl-C", "SIGTERM", "closed terminal"])
def test_demo_cleans_up(how: signal.Signals, tmp_path: Path, start_demo: Any) -> None:
    program = start_demo()
    children = demo_children(program)
    assert sorted(children) == ["agent", "proxy"]
    program.signal(how)
    assert (program.wait(), program.log) == (0, "")
    assert list(tmp_path.iterdir()) == []
    for pid in children.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_demo_interrupted_while_it_starts(tmp_path: Path) -> None:
    program = Program.cmon("demo", env={"TMPDIR": str(tmp_path)})
    wait_until(lambda: list(tmp_path.iterdir()))
    program.signal(signal.SIGINT)
    assert (program.wait(), program.log) == (0, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["agent", "proxy"])
def test_demo_says_which_child_died(name: str, tmp_path: Path, start_demo: Any) -> None:
    program = start_demo()
    os.kill(demo_children(program)[name], signal.SIGKILL)
    assert program.wait() == 1
    assert re.fullmatch(f"cmon: the {name} was killed by signal 9; last line of its log: .+",
                        program.log)
    assert list(tmp_path.iterdir()) == []


def test_demo_that_is_killed_takes_its_children_along(start_demo: Any) -> None:
    program = start_demo()
    children = demo_children(program)
    assert sorted(children) == ["agent", "proxy"]
    program.kill()

    def gone() -> bool:
        for pid in children.values():
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                continue
            state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], stdout=subprocess.PIPE,
                                   universal_newlines=True).stdout
            if not state.startswith("Z"):       # in a container nobody may reap the orphan
                return False
        return True
    wait_until(gone)


def test_demo_begins_with_the_page_and_its_certificate(running: Running) -> None:
    output = running.program.output
    assert re.search(r"(?m)^    https://localhost:\d+/$", output)
    assert "17 zones of 4 accounts (16 running)" in output
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    command = re.findall(r"(?m)^    (openssl (?:.*\\\n)*.*)$", output)[0]
    done = paste(command)
    assert (done.returncode, done.stderr) == (0, "")
    bundle = Path(shlex.split(command.replace("\\\n", " "))[-1])
    assert bundle.stat().st_size > 500


def test_demo_removes_no_file_that_a_running_prometheus_needs(running: Running) -> None:
    command, = [command for command in running.commands if command.startswith("prometheus")]
    words = shlex.split(command.replace("\\\n", " "))
    config, storage = (word.partition("=")[2] for word in words[1:3])
    assert Path(config).parent not in Path(storage).parents


def test_demo_once_says_that_its_files_are_gone() -> None:
    assert "The demo's files have been removed" in run("demo", "--once").stdout


@pytest.mark.parametrize("name", ["agent", "proxy"])
def test_demo_says_which_port_is_taken(name: str) -> None:
    before = temporary_folders()
    with socket.socket() as taken:
        taken.bind((ADDRESS, 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        done = run("demo", "--once", f"--{name}-port", port)
    one_line(done, 1, f"port {port} for the {name} is in use: choose another with "
             f"--{name}-port PORT")
    assert temporary_folders() == before


def test_demo_uses_the_ports_it_is_given() -> None:
    port = free_port()
    done = run("demo", "--once", "--proxy-port", port)
    assert done.returncode == 0, done.stderr
    assert f"https://localhost:{port}/v1/discover" in done.stdout


@pytest.fixture()
def copy(tmp_path: Path) -> Callable[..., "Done[str]"]:
    """Runs the demo in a copy of the project with something changed."""
    def go(change: Callable[[Path], Any]) -> "Done[str]":
        for name in ("cmon.py", "cmon_agent.py", "cmon_proxy.py"):
            shutil.copy(str(ROOT / name), str(tmp_path))
        shutil.copytree(str(EXAMPLES), str(tmp_path / "examples"))
        change(tmp_path)
        return subprocess.run([sys.executable, str(tmp_path / "cmon.py"), "demo", "--once"],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True, timeout=PATIENCE * 3)
    return go


@pytest.mark.parametrize("name", ["node.json", "inventory.json", "load.json"])
def test_demo_without_examples(name: str, copy: Any) -> None:
    one_line(copy(lambda folder: (folder / "examples" / name).unlink()), 1,
             f"examples/{name} is missing: run cmon.py from a copy of the whole project")


def test_demo_with_a_program_that_does_not_start(copy: Any) -> None:
    def break_it(folder: Path) -> None:
        proxy, entry = folder / "cmon_proxy.py", 'if __name__ == "__main__":'
        text = proxy.read_text("utf-8")
        assert entry in text
        proxy.write_text(text.replace(entry, f"{entry}\n    raise SystemExit('no luck')"), "utf-8")
    done = copy(break_it)
    one_line(done, 1, "the proxy exited with status 1; last line of its log: no luck")


def test_demo_without_openssl(copy: Any) -> None:
    def break_it(folder: Path) -> None:
        proxy = folder / "cmon_proxy.py"
        text = proxy.read_text("utf-8")
        assert "OpenSSL_version" in text
        proxy.write_text(text.replace('"OpenSSL_version"', '"OpenSSL_version_of_nobody"'), "utf-8")
    one_line(copy(break_it), 1,
             "the demo cannot make certificates with the OpenSSL of this Python", "install")
