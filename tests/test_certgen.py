# SPDX-License-Identifier: MPL-2.0
"""`cmon.py certgen`: keys by ssh-keygen, a real ssh-agent, openssl's opinion of the result."""
from __future__ import annotations

import base64
import json
import os
import pty
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cmon_proxy import certificate, first_certificate, make_certificate, make_key
from support import PATIENCE, ROOT, Program, http_get, wait_until

CMON = ROOT / "cmon.py"
SECRET = "correct horse"
Done = subprocess.CompletedProcess
# name, flags of ssh-keygen
KEYS = {
    "rsa": ("-t", "rsa", "-b", "2048", "-N", ""),
    "pem": ("-t", "rsa", "-b", "2048", "-N", "", "-m", "PEM"),
    "pkcs8": ("-t", "ecdsa", "-N", "", "-m", "PKCS8"),
    "ecdsa": ("-t", "ecdsa", "-N", ""),
    "ecdsa384": ("-t", "ecdsa", "-b", "384", "-N", ""),
    "ecdsa521": ("-t", "ecdsa", "-b", "521", "-N", ""),
    "short": ("-t", "rsa", "-b", "1024", "-N", ""),
    "ed25519": ("-t", "ed25519", "-N", ""),
    "secret": ("-t", "ecdsa", "-N", SECRET),
    "secret-pem": ("-t", "rsa", "-b", "2048", "-N", SECRET, "-m", "PEM"),
}
GOOD = ("rsa", "pem", "pkcs8", "ecdsa", "ecdsa384", "ecdsa521")


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def printed(*command: str | Path, **more: Any) -> str:
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, timeout=PATIENCE, **more)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name, flags in KEYS.items():
        printed(tool("ssh-keygen"), "-q", "-C", name, "-f", folder / name, *flags)
    return folder


@pytest.fixture()
def agent(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A real ssh-agent without keys, as its environment."""
    path = tmp_path / "agent"
    process = subprocess.Popen([tool("ssh-agent"), "-D", "-a", str(path)],
                               stdout=subprocess.DEVNULL)

    def listens() -> bool:              # a moment after its socket is there
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(path)) == 0
    try:
        wait_until(listens, "ssh-agent")
        yield {"SSH_AUTH_SOCK": str(path)}
    finally:
        process.terminate()
        process.wait(PATIENCE)


def add(agent: Mapping[str, str], *files: Path) -> None:
    printed(tool("ssh-add"), "-q", *files, env={**os.environ, **agent})


def certgen(*arguments: Any, env: Mapping[str, str] | None = None) -> "Done[str]":
    clean = {name: value for name, value in os.environ.items() if name != "SSH_AUTH_SOCK"}
    return subprocess.run([sys.executable, str(CMON), "certgen", "--account", "alice",
                           *map(str, arguments)], env={**clean, **(env or {})},
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=PATIENCE * 2)


def on_terminal(answer: str, *arguments: Any) -> tuple[int, str]:
    """The command on its own terminal; the first question is answered."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, str(CMON), *map(str, arguments)])
    seen, answered = b"", False
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:         # Linux: the other side is closed
            break
        if not piece:
            break
        seen += piece
        if not answered and re.search(rb"(?i)passphrase[^\n]*: ?$", seen):
            os.write(terminal, answer.encode() + b"\n")
            answered = True
    status = os.waitpid(child, 0)[1]
    os.close(terminal)
    return os.WEXITSTATUS(status), seen.decode().replace("\r\n", "\n")


def one_line(done: "Done[str]", status: int, *words: str) -> None:
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert re.fullmatch(r"cmon: [^\n]+\n", done.stderr), done.stderr
    for word in words:
        assert word in done.stderr


def issuer_of(keys: Path, name: str, folder: Path) -> Path:
    """A certificate for the account's key, made by openssl."""
    pem = folder / "signing.pem"
    shutil.copy(str(keys / name), str(pem))
    pem.chmod(0o600)
    old = SECRET if name.startswith("secret") else ""
    printed(tool("ssh-keygen"), "-p", "-q", "-P", old, "-N", "", "-m", "PEM", "-f", pem)
    md5 = printed(tool("ssh-keygen"), "-l", "-E", "md5", "-f", keys / f"{name}.pub").split()[1]
    digest = base64.b64encode(bytes.fromhex(md5[4:].replace(":", ""))).decode().rstrip("=")
    subject = "/CN=MD5:" + digest.replace("/", "\\/").replace("+", "\\+")
    printed(tool("openssl"), "req", "-x509", "-new", "-key", pem, "-subj", subject, "-days", "1",
            "-addext", "basicConstraints=critical,CA:TRUE", "-out", folder / "issuer.pem")
    return folder / "issuer.pem"


def verify(cert: Path, issuer: Path) -> None:
    """openssl accepts the chain and the signature."""
    said = printed(tool("openssl"), "verify", "-CAfile", issuer, cert)
    assert said == f"{cert}: OK\n"


def fields(cert: Path) -> str:
    return printed(tool("openssl"), "x509", "-in", cert, "-noout", "-text")


# --- what is made ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", GOOD)
def test_openssl_verifies_certificates_signed_by_each_kind_of_key(name: str, keys: Path,
                                                                  tmp_path: Path) -> None:
    done = certgen("--ssh-key", keys / name, "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    verify(tmp_path / "alice-cert.pem", issuer_of(keys, name, tmp_path))


@pytest.mark.parametrize("name, by", [
    ("rsa", "file"), ("ecdsa", "public file"), ("ecdsa384", "fingerprint"), ("ecdsa521", "MD5")])
def test_openssl_verifies_certificates_signed_by_ssh_agent(name: str, by: str, keys: Path,
                                                           tmp_path: Path, agent: dict[str, str]
                                                          ) -> None:
    add(agent, *(keys / one for one in ("rsa", "ecdsa", "ecdsa384", "ecdsa521", "ed25519")))
    wanted = {"file": str(keys / name), "public file": str(keys / f"{name}.pub")}.get(by)
    if wanted is None:
        flags = ("-E", "md5") if by == "MD5" else ()
        wanted = printed(tool("ssh-keygen"), "-l", *flags, "-f", keys / f"{name}.pub").split()[1]
    done = certgen("--agent", "--ssh-key", wanted, "--out", tmp_path, env=agent)
    assert (done.returncode, done.stderr) == (0, "")
    verify(tmp_path / "alice-cert.pem", issuer_of(keys, name, tmp_path))


def test_the_only_usable_key_of_ssh_agent_is_used(keys: Path, tmp_path: Path, agent: dict[str, str]
                                                 ) -> None:
    add(agent, keys / "ed25519", keys / "ecdsa")
    assert certgen("--agent", "--out", tmp_path, env=agent).returncode == 0
    verify(tmp_path / "alice-cert.pem", issuer_of(keys, "ecdsa", tmp_path))


def test_certificates_have_the_fields_of_the_original(keys: Path, tmp_path: Path) -> None:
    certgen("--ssh-key", keys / "rsa", "--out", tmp_path)
    text = fields(tmp_path / "alice-cert.pem")
    for pattern in (
            r"Version: 3 ", r"Serial Number: 1 ", r"Subject: CN ?= ?alice\n",
            r"Issuer: CN ?= ?\"?MD5:[A-Za-z0-9+/]{22}\"?\n", r"Signature Algorithm: sha256WithRSA",
            r"NIST CURVE: P-256", r"Basic Constraints: critical\n +CA:FALSE",
            r"Key Usage: critical\n +Digital Signature, Non Repudiation, Key Agreement\n",
            r"Extended Key Usage: critical\n.*Client Auth.*1\.3\.6\.1\.4\.1\.38678\.1\.4\.2\n",
            r"Alternative Name: \n +DNS:alice\n"):
        assert re.search(pattern, text), f"{pattern} in {text}"
    made = certificate(first_certificate((tmp_path / "alice-cert.pem").read_text()))
    assert made.not_after - made.not_before == 3650 * 86400 + 300
    key = (tmp_path / "alice-key.pem").read_text()
    assert key.startswith("-----BEGIN PRIVATE KEY-----\n")
    for name in ("cert", "key"):
        assert (tmp_path / f"alice-{name}.pem").stat().st_mode & 0o7777 == 0o600
    # both in one TLS context, as any client loads them
    ssl.create_default_context().load_cert_chain(tmp_path / "alice-cert.pem",
                                                 tmp_path / "alice-key.pem")


def test_old_style_is_the_ssh_key_itself(keys: Path, tmp_path: Path) -> None:
    done = certgen("--ssh-key", keys / "rsa", "--old-style", "--days", "10", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    cert = tmp_path / "alice-cert.pem"
    assert printed(tool("openssl"), "x509", "-in", cert, "-noout", "-subject", "-issuer").split(
        )[-1] == "alice"
    verify(cert, cert)
    own = printed(tool("ssh-keygen"), "-y", "-f", tmp_path / "alice-key.pem").split()[1]
    assert own in (keys / "rsa.pub").read_text()


def test_the_proxy_accepts_every_style(keys: Path, tmp_path: Path, agent: dict[str, str]) -> None:
    add(agent, keys / "ecdsa")
    made = {"new": ("--ssh-key", keys / "rsa"), "old": ("--ssh-key", keys / "pkcs8", "--old-style"),
            "by agent": ("--agent",), "strange": ("--ssh-key", keys / "pem")}
    for name, flags in made.items():
        done = certgen(*flags, "--out", tmp_path / name, env=agent)
        assert done.returncode == 0, done.stderr
    key = make_key()
    (tmp_path / "server.key").write_bytes(key)
    (tmp_path / "server.pem").write_bytes(make_certificate(key, "localhost", names=["localhost"]))
    (tmp_path / "inventory.json").write_text(json.dumps({"servers": [], "vms": [], "accounts": [
        {"uuid": "0a0a0a0a-0000-4000-8000-000000000001", "login": "alice",
         "keys": [(keys / f"{name}.pub").read_text() for name in ("rsa", "pkcs8", "ecdsa")]}]}))
    (tmp_path / "proxy.json").write_text(json.dumps({
        "tls": {"certificate": "server.pem", "key": "server.key"}, "admin_listen": "127.0.0.1:0",
        "inventory": {"file": "inventory.json"}}))
    with Program.proxy(tmp_path / "proxy.json", "--listen", "127.0.0.1:0") as proxy:
        got = {}
        for name in made:
            context = ssl.create_default_context(cafile=str(tmp_path / "server.pem"))
            context.load_cert_chain(tmp_path / name / "alice-cert.pem",
                                    tmp_path / name / "alice-key.pem")
            got[name] = http_get(proxy.addresses(2)[0], "/v1/discover", tls=context,
                                 server_name="localhost").status
    assert got == {"new": 200, "old": 200, "by agent": 200, "strange": 401}


# --- files ----------------------------------------------------------------------------------------

def pair(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "alice-cert.pem").read_bytes(), (folder / "alice-key.pem").read_bytes()


def test_files_are_overwritten_only_with_force(keys: Path, tmp_path: Path) -> None:
    certgen("--ssh-key", keys / "ecdsa", "--out", tmp_path)
    before = pair(tmp_path)
    one_line(certgen("--ssh-key", keys / "ecdsa", "--out", tmp_path), 1,
             "alice-cert.pem exists: use --renew to replace it when it is about to expire, or "
             "--force to replace it now")
    assert pair(tmp_path) == before
    (tmp_path / "alice-cert.pem").unlink()
    one_line(certgen("--ssh-key", keys / "ecdsa", "--out", tmp_path), 1, "alice-key.pem exists")
    assert [path.name for path in tmp_path.iterdir()] == ["alice-key.pem"]
    assert certgen("--ssh-key", keys / "ecdsa", "--out", tmp_path, "--force").returncode == 0
    after = pair(tmp_path)
    assert after[0] != before[0] and after[1] != before[1]
    verify(tmp_path / "alice-cert.pem", issuer_of(keys, "ecdsa", tmp_path))


@pytest.mark.parametrize("days, renewed", [(29, True), (31, False)])
def test_renew_replaces_a_certificate_that_expires_soon(days: int, renewed: bool, keys: Path,
                                                        tmp_path: Path) -> None:
    flags = ("--ssh-key", keys / "ecdsa", "--out", tmp_path)
    assert certgen(*flags, "--renew", "--days", days).returncode == 0
    before = pair(tmp_path)
    done = certgen(*flags, "--renew")
    assert done.returncode == 0
    assert (pair(tmp_path) != before) == renewed
    assert ("nothing to do yet" in done.stdout) != renewed


def test_renew_does_not_replace_a_file_that_is_not_a_certificate(keys: Path, tmp_path: Path
                                                                ) -> None:
    for name in ("cert", "key"):
        (tmp_path / f"alice-{name}.pem").write_text("mine")
    one_line(certgen("--ssh-key", keys / "ecdsa", "--out", tmp_path, "--renew"), 1,
             "alice-cert.pem is not a certificate: --force replaces it")


def test_certificate_and_key_are_both_written_or_neither(keys: Path, tmp_path: Path) -> None:
    """With a folder in place of the key, the existing certificate stays."""
    certgen("--ssh-key", keys / "ecdsa", "--out", tmp_path)
    before = (tmp_path / "alice-cert.pem").read_bytes()
    (tmp_path / "alice-key.pem").unlink()
    (tmp_path / "alice-key.pem").mkdir()
    one_line(certgen("--ssh-key", keys / "ecdsa", "--out", tmp_path, "--force"), 1, "cannot write")
    assert (tmp_path / "alice-cert.pem").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alice-cert.pem", "alice-key.pem"]


def test_folder_that_cannot_be_made(keys: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one_line(certgen("--ssh-key", keys / "ecdsa", "--out", tmp_path / "file"), 1,
             "/file: it is not a folder")


# --- keys that cannot be used ---------------------------------------------------------------------

def test_wrong_keys(keys: Path, tmp_path: Path) -> None:
    (tmp_path / "garbage").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n")
    (tmp_path / "text").write_text("my key")
    (tmp_path / "garbage.pem").write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n")
    ed25519 = tmp_path / "ed25519.pem"
    printed(tool("openssl"), "genpkey", "-algorithm", "ED25519", "-out", ed25519)
    what_to_do = "with `ssh-keygen -t ecdsa`, add it to the account, and use it here"
    for path, words in ((keys / "ed25519", f"is of type Ed25519, but .*{what_to_do}"),
                        (ed25519, f"is of type Ed25519, but .*{what_to_do}"),
                        (keys / "short", "is an RSA key of 1024 bits, which is too short: make"),
                        (keys / "rsa.pub", "it is a public key: use the file without .pub"),
                        (tmp_path / "text", "is not a private key; use a key in OpenSSH's format"),
                        (tmp_path / "garbage", "not a private key that ssh-keygen can read"),
                        (tmp_path / "garbage.pem", "cannot be read: "),
                        (tmp_path / "none", "cannot read the SSH key .*: no such file"),
                        (keys / "secret", "has a passphrase, and there is no terminal"),
                        (keys / "secret-pem", "has a passphrase, and there is no terminal")):
        done = certgen("--ssh-key", path, "--out", tmp_path / "out")
        one_line(done, 1)
        assert re.search(words, done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ("secret", "secret-pem"))
def test_passphrase_is_asked_for_on_a_terminal(name: str, keys: Path, tmp_path: Path) -> None:
    flags = ("certgen", "--account", "alice", "--ssh-key", keys / name, "--out", tmp_path)
    status, seen = on_terminal("wrong", *flags)
    assert status == 1 and seen.endswith(f"cmon: wrong passphrase for {keys / name}\n"), seen
    status, seen = on_terminal(SECRET, *flags)
    assert status == 0 and SECRET not in seen, seen
    verify(tmp_path / "alice-cert.pem", issuer_of(keys, name, tmp_path))


def test_other_commands_also_ask_for_the_passphrase(keys: Path, tmp_path: Path) -> None:
    cert = tmp_path / "cert.pem"
    printed(tool("openssl"), "req", "-x509", "-new", "-key", keys / "secret-pem", "-passin",
            f"pass:{SECRET}", "-subj", "/CN=alice", "-out", cert)
    flags = ("discover", "--url", "https://127.0.0.1:1", "--cert", cert, "--key",
             keys / "secret-pem")
    status, seen = on_terminal("wrong", *flags)
    assert status == 1 and "cmon: wrong passphrase for the key" in seen, seen
    status, seen = on_terminal(SECRET, *flags)
    assert status == 1 and "cannot reach 127.0.0.1:1" in seen and SECRET not in seen, seen


def test_without_ssh_keygen(keys: Path, tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path)}
    one_line(certgen("--ssh-key", keys / "rsa", "--out", tmp_path, env=env), 1,
             "ssh-keygen, which reads it, is not installed: install OpenSSH's client")
    assert certgen("--ssh-key", keys / "pem", "--out", tmp_path, env=env).returncode == 0


# --- agents that do not help ----------------------------------------------------------------------

def test_agent_that_cannot_be_used(keys: Path, tmp_path: Path, agent: dict[str, str]) -> None:
    one_line(certgen("--agent"), 1, "no ssh-agent: SSH_AUTH_SOCK is not set")
    one_line(certgen("--agent", env={"SSH_AUTH_SOCK": str(tmp_path / "none")}), 1,
             "cannot talk to ssh-agent", "no such file")
    one_line(certgen("--agent", env=agent), 1,
             "ssh-agent has no RSA or ECDSA key: list its keys with `ssh-add -l`")
    add(agent, keys / "ed25519", keys / "rsa", keys / "ecdsa")
    one_line(certgen("--agent", env=agent), 1, "several keys: choose one with --ssh-key, SHA256:")
    one_line(certgen("--agent", "--ssh-key", keys / "ecdsa384", env=agent), 1,
             "ssh-agent has no key SHA256:")
    one_line(certgen("--agent", "--ssh-key", keys / "ed25519", env=agent), 1, "of type Ed25519")
    one_line(certgen("--agent", "--ssh-key", CMON, env=agent), 1, "cannot read the public key")
    shutil.copy(str(keys / "ecdsa"), str(tmp_path / "alone"))       # its public half is inside
    done = certgen("--agent", "--ssh-key", tmp_path / "alone", "--out", tmp_path / "out", env=agent)
    assert done.returncode == 0, done.stderr
    (tmp_path / "odd.pub").write_text("odd")
    one_line(certgen("--agent", "--ssh-key", tmp_path / "odd.pub", env=agent), 1,
             "odd.pub is not a public key")
    one_line(certgen("--agent", "--old-style", env=agent), 2, "which ssh-agent does not give out")
    one_line(certgen(), 2, "use --ssh-key FILE, or --agent")


def frame(kind: int, content: bytes) -> bytes:
    return struct.pack(">IB", len(content) + 1, kind) + content


def ssh(*parts: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def blob_of(keys: Path, name: str) -> bytes:
    return base64.b64decode((keys / f"{name}.pub").read_text().split()[1])


# name, what it answers to the list of keys and to the request for a signature, what we say
HOSTILE = [
    ("hangs up", b"", b"", "ssh-agent refused"),
    ("says failure", frame(5, b""), b"", "ssh-agent refused"),
    ("is huge", struct.pack(">IB", 1 << 30, 12), b"", "ssh-agent refused"),
    ("counts wrongly", frame(12, struct.pack(">I", 7)), b"", "is not a list of keys"),
    ("is cut off", frame(12, struct.pack(">I", 1) + b"\0\0\0\x09abc"), b"", "truncated"),
    ("has odd keys only", frame(12, struct.pack(">I", 1) + ssh(ssh(b"x"), b"c")), b"",
     "no RSA or ECDSA key"),
    ("is locked", None, frame(5, b""), "refused to sign: check with `ssh-add -l`"),
    ("signs with SHA-1", None, frame(14, ssh(ssh(b"ssh-rsa", b"x"))), "a signature of type"),
    ("signs something else", None, frame(14, ssh(ssh(b"rsa-sha2-256", b"x" * 256))),
     "the signature was not made with the key SHA256:"),
]


@pytest.mark.parametrize("what, listed, signed, words", HOSTILE, ids=[row[0] for row in HOSTILE])
def test_invalid_answers_of_ssh_agent_are_refused(what: str, listed: bytes | None, signed: bytes,
                                                  words: str, keys: Path, tmp_path: Path) -> None:
    if listed is None:
        listed = frame(12, struct.pack(">I", 1) + ssh(blob_of(keys, "rsa"), b"comment"))
    path = str(tmp_path / "odd-agent")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(2)

        def serve() -> None:
            for answer in (listed, signed):
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer or b"")
        threading.Thread(target=serve, daemon=True).start()
        done = certgen("--agent", "--out", tmp_path / "out", env={"SSH_AUTH_SOCK": path})
    one_line(done, 1, words)
    assert not (tmp_path / "out").exists()


# --- command line ---------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [
    ["--account", "../x"], ["--account", ""], ["--account", "a" * 65], ["--days", "0"],
    ["--days", "1.5"], ["--days", "99999"]])
def test_wrong_command_lines(flags: list[str]) -> None:
    done = certgen(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
