# SPDX-License-Identifier: MPL-2.0
"""Keys, certificates and the TLS policy, against files that openssl and ssh-keygen have made."""
from __future__ import annotations

import base64
import itertools
import os
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import cmon_proxy
from cmon_proxy import (
    CLIENT_PURPOSE, CMON_PURPOSE, CertificateError, SERVER_PURPOSE, ask_for_any_certificate,
    certificate, check_any_certificate, first_certificate, make_certificate, make_key, private_key,
    public_key, server_context, signed_by, ssh_public_key)

FILES = Path(__file__).parent / "tls"
KEYS = ("rsa", "ec", "ec384", "ec521", "other", "ed25519")


def read(name: str) -> str:
    return (FILES / name).read_text()


def load(name: str) -> Any:
    return certificate(first_certificate(read(f"{name}.pem")))


@pytest.mark.parametrize("name", KEYS)
def test_fingerprints_are_those_that_ssh_keygen_shows(name: str) -> None:
    md5, sha256 = read(f"{name}.fingerprints.txt").split()
    for form in (f"{name}.pub", f"{name}.spki.pem"):
        key = public_key(read(form))
        assert ("MD5:" + key.md5, key.sha256) == (md5, sha256)
        assert key.line == " ".join(read(f"{name}.pub").split()[:2])


@pytest.mark.parametrize("name", KEYS)
def test_spki_is_what_openssl_writes(name: str) -> None:
    der = subprocess.run(["openssl", "pkey", "-in", FILES / f"{name}.key", "-pubout", "-outform",
                          "DER"], check=True, stdout=subprocess.PIPE).stdout
    assert public_key(read(f"{name}.pub")).spki == der


def test_all_forms_of_a_key_are_equal() -> None:
    forms = [public_key(read(name)) for name in ("rsa.pub", "rsa.spki.pem", "rsa.pkcs1.pem")]
    forms.append(public_key(read("rsa.pub").strip() + " a comment of more words\n"))
    forms.append(private_key((FILES / "rsa.key").read_bytes()))
    assert len(set(forms)) == 1 and forms[0] != public_key(read("other.pub")) and forms[0] != "rsa"
    assert repr(forms[0]).startswith("<PublicKey ssh-rsa SHA256:")


def test_key_with_short_numbers_gets_its_leading_zeros_right(tmp_path: Path) -> None:
    # a modulus always has its top bit set, a point may begin with zeros; many keys meet both
    for index in range(8):
        pem = tmp_path / f"{index}.key"
        pem.write_bytes(make_key("ec"))
        pem.chmod(0o600)
        shown = subprocess.run(["ssh-keygen", "-y", "-f", pem], check=True, stdout=subprocess.PIPE)
        assert shown.stdout.decode().split()[:2] == ssh_public_key(pem.read_bytes()).split()


LINE = read("rsa.pub").split()[1]
P256 = base64.b64decode(read("ec.pub").split()[1])


@pytest.mark.parametrize("text, problem", [
    ("", "neither an OpenSSH public key nor"),
    ("ssh-rsa", "neither an OpenSSH public key nor"),
    ("ssh-rsa !!!!", "invalid base64"),
    ("ssh-rsa " + LINE[:-8], "truncated SSH key"),
    ("ssh-rsa " + LINE[:4], "truncated SSH key"),
    ("ssh-ed25519 " + LINE, "labelled as another type"),
    ("ssh-dss " + base64.b64encode(b"\0\0\0\7ssh-dss").decode(), "ssh-dss"),
    ("ecdsa-sha2-nistp256 " + base64.b64encode(P256[:-1] + b"\0").decode(), "not on its curve"),
    ("ssh-ed25519 " + base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\1x").decode(), "ssh-ed25519"),
    ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "not a public key in PEM"),
    ("-----BEGIN RSA PUBLIC KEY-----\nAAAA\n-----END RSA PUBLIC KEY-----", "not a public key"),
    ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "not a public key in PEM"),
    ("ssh-rsa " + "A" * 40_000, "too long"),
], ids=lambda value: value[:30] or "nothing")
def test_bad_keys_are_refused_with_a_reason(text: str, problem: str) -> None:
    with pytest.raises(CertificateError, match=problem):
        public_key(text)


def test_an_encrypted_key_never_prompts_on_the_terminal() -> None:
    locked = subprocess.run(["openssl", "pkey", "-in", FILES / "ec.key", "-aes128", "-passout",
                             "pass:secret"], check=True, stdout=subprocess.PIPE).stdout
    with pytest.raises(CertificateError, match="wrong passphrase"):
        private_key(locked)
    assert private_key(locked, b"secret") == public_key(read("ec.pub"))


# name, subject, issuer, self-issued, digest, key, signed by, purposes
CERTIFICATES = [
    ("old_rsa", "alice", "alice", True, "sha256", "rsa", "rsa", ()),
    ("old_ec", "alice", "alice", True, "sha256", "ec", "ec", ()),
    ("old_ed25519", "alice", "alice", True, "", "ed25519", "ed25519", ()),
    ("old_sha1", "alice", "alice", True, "sha1", "rsa", "rsa", ()),
    ("old_forged", "alice", "alice", True, "sha256", "rsa", "other", ()),
    ("new_rsa", "alice", "MD5:", False, "sha256", "client", "rsa", (CLIENT_PURPOSE, CMON_PURPOSE)),
    ("new_ec", "alice", "MD5:", False, "sha256", "client", "ec", (CLIENT_PURPOSE, CMON_PURPOSE)),
    ("new_ec384", "alice", "MD5:", False, "sha256", "client", "ec384",
     (CLIENT_PURPOSE, CMON_PURPOSE)),
    ("docker", "alice", "MD5:", False, "sha256", "client", "rsa",
     (CLIENT_PURPOSE, "1.3.6.1.4.1.38678.1.4.1")),
    ("server", "localhost", "Test CA", False, "sha256", "server", "ca", (SERVER_PURPOSE,)),
]


@pytest.mark.parametrize("row", CERTIFICATES, ids=lambda row: row[0])
def test_certificates_are_read_as_openssl_reads_them(row: Any) -> None:
    name, subject, issuer, self_issued, digest, key, signer, purposes = row
    found = load(name)
    assert (found.subject, found.self_issued, found.digest) == (subject, self_issued, digest)
    assert found.issuer.startswith(issuer) and found.purposes == purposes
    assert found.key == private_key((FILES / f"{key}.key").read_bytes())
    for candidate in ("rsa", "ec", "ec384", "ed25519", "other", "client", "ca"):
        spoken = private_key((FILES / f"{candidate}.key").read_bytes())
        assert signed_by(found, spoken) is (candidate == signer), candidate


@pytest.mark.parametrize("name, begin, end", [
    ("old_rsa", 1577836800, 4733510400), ("new_expired", 1514764800, 1546300800),
    ("new_future", 4417977600, 4733510400)])
def test_dates_are_seconds_of_the_epoch(name: str, begin: int, end: int) -> None:
    assert load(name)[3:5] == (begin, end)


def test_damaged_certificates_are_rejected_or_no_longer_verify() -> None:
    good = first_certificate(read("new_rsa.pem"))
    signer = public_key(read("rsa.pub"))
    for position in range(0, len(good), 3):
        damaged = good[:position] + bytes([good[position] ^ 0x41]) + good[position + 1:]
        try:
            found = certificate(damaged)
        except CertificateError:
            continue
        assert not signed_by(found, signer), position
    for cut in range(0, len(good), 7):
        with pytest.raises(CertificateError):
            certificate(good[:cut])
    with pytest.raises(CertificateError, match="followed by extra data"):
        certificate(good + b"\0")
    with pytest.raises(CertificateError, match="too long"):
        certificate(good + bytes(70_000))


def made_with(tmp_path: Path, subject: str, extensions: str) -> Any:
    """A certificate with unusual content, made by openssl."""
    config = tmp_path / "config"
    config.write_text(f"[req]\ndistinguished_name=d\nprompt=no\nx509_extensions=e\n[d]\n{subject}\n"
                      f"[e]\n{extensions}\n", encoding="utf-8")
    made = subprocess.run(
        ["openssl", "req", "-x509", "-utf8", "-new", "-key", FILES / "ec.key", "-config", config,
         "-outform", "DER"], check=True, stdout=subprocess.PIPE)
    return certificate(made.stdout)


def test_names_are_read_completely_or_rejected(tmp_path: Path) -> None:
    plain = "basicConstraints=CA:FALSE"
    assert made_with(tmp_path, "O=Somebody", plain).subject == ""
    assert made_with(tmp_path, "CN=Jürgen Ω", plain).subject == "Jürgen Ω"
    with pytest.raises(CertificateError, match="more than one common name"):
        made_with(tmp_path, "0.CN=alice\n1.CN=bob", plain)


def test_a_broken_purpose_is_not_treated_as_absent(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="extended key usage"):
        made_with(tmp_path, "CN=alice", "extendedKeyUsage=DER:0500")


def test_pem_is_found_among_other_text() -> None:
    pem = read("old_ec.pem")
    assert first_certificate("subject=x\n" + pem + pem) == ssl.PEM_cert_to_DER_cert(pem)
    with pytest.raises(CertificateError, match="no PEM certificate"):
        first_certificate("nothing")
    with pytest.raises(CertificateError, match="invalid base64"):
        first_certificate("-----BEGIN CERTIFICATE-----\nA=AAA\n-----END CERTIFICATE-----\n")


# making

@pytest.mark.parametrize("kind, shown", [("ec", "id-ecPublicKey"), ("rsa", "rsaEncryption")])
def test_made_keys_and_certificates_are_read_by_openssl(kind: str, shown: str) -> None:
    key = make_key(kind)
    made = make_certificate(key, "alice", issuer="MD5:abc", signing_key=make_key("ec"), serial=1,
                            names=("alice", "127.0.0.1", "::1"),
                            purposes=(CLIENT_PURPOSE, CMON_PURPOSE),
                            not_before=1_700_000_000, not_after=1_800_000_000)
    text = subprocess.run(["openssl", "x509", "-noout", "-text"], input=made, check=True,
                          stdout=subprocess.PIPE).stdout.decode()
    for part in ("Serial Number: 1 ", "Issuer: CN = MD5:abc", "Subject: CN = alice", shown,
                 "Not Before: Nov 14 22:13:20 2023", "Not After : Jan 15 08:00:00 2027", "CA:FALSE",
                 "DNS:alice, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1",
                 "TLS Web Client Authentication, " + CMON_PURPOSE, "Version: 3"):
        assert part in text, part
    assert b"BEGIN PRIVATE KEY" in key
    subprocess.run(["openssl", "pkey", "-noout", "-check"], input=key, check=True)


def test_made_chain_is_verified_by_openssl_strictly(tmp_path: Path) -> None:
    ca_key, key = make_key(), make_key()
    ca = make_certificate(ca_key, "our CA", is_ca=True, days=2)
    leaf = make_certificate(key, "host", issuer=ca, signing_key=ca_key, names=("host.example",),
                            purposes=(SERVER_PURPOSE,), days=1)
    (tmp_path / "ca").write_bytes(ca)
    (tmp_path / "leaf").write_bytes(leaf)
    subprocess.run(
        ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname",
         "host.example", "-CAfile", tmp_path / "ca", tmp_path / "leaf"], check=True)


@pytest.mark.parametrize("arguments, problem", [
    ({"subject": "x" * 65}, "common name"),
    ({"subject": "a", "names": ("a,b",)}, "invalid character"),
    ({"subject": "a", "purposes": ("no such purpose",)}, "does not allow"),
    ({"subject": "a", "signing_key": b"nothing"}, "not a PEM private key"),
    ({"subject": "a", "issuer": b"nothing"}, "no PEM certificate"),
], ids=lambda value: str(value)[:40])
def test_impossible_certificates_are_reported(arguments: Any, problem: str) -> None:
    with pytest.raises(CertificateError, match=problem):
        make_certificate(make_key(), **arguments)


# TLS

def context_of(name: str) -> ssl.SSLContext:
    return server_context(str(FILES / f"{name}.pem"), str(FILES / f"{name}.key"))


def connect(server: ssl.SSLContext, cert: str = "", key: str = "", **settings: Any) -> Any:
    """Both ends of a connection in memory."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    for setting, value in settings.items():
        setattr(client, setting, value)
    if cert:
        client.load_cert_chain(FILES / f"{cert}.pem", FILES / f"{key}.key")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_side=False)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    pending = [near, far]
    for _ in range(20):
        for end in list(pending):
            try:
                end.do_handshake()
                pending.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert not pending
    return near, far


VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.mark.parametrize("version", VERSIONS, ids=["1.2", "1.3"])
@pytest.mark.parametrize("cert, key", [
    ("old_rsa", "rsa"), ("old_ec", "ec"), ("old_expired", "rsa"), ("new_rsa", "client"),
    ("new_future", "client"), ("ca_client", "client"), ("", "")])
def test_whatever_certificate_arrives(version: Any, cert: str, key: str) -> None:
    context = context_of("server")
    ask_for_any_certificate(context)
    _, far = connect(context, cert, key, maximum_version=version)
    assert far.getpeercert(True) == (first_certificate(read(f"{cert}.pem")) if cert else None)
    assert far.session_reused is False


@pytest.mark.parametrize("version", VERSIONS, ids=["1.2", "1.3"])
def test_no_session_can_be_resumed(version: Any) -> None:
    context = context_of("server")
    ask_for_any_certificate(context)
    near, far = connect(context, "old_ec", "ec", maximum_version=version)
    far.write(b"x")
    near.read(1)
    session = near.session
    assert session is None or not session.has_ticket
    if session is not None and version == ssl.TLSVersion.TLSv1_2:
        client = near.context
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        again = client.wrap_bio(to_client, to_server, server_side=False, session=session)
        other = context.wrap_bio(to_server, to_client, server_side=True)
        for _, end in itertools.product(range(6), (again, other)):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
        assert not other.session_reused


def test_policy() -> None:
    context = context_of("server")
    near, _ = connect(context)
    assert near.version() == "TLSv1.3" and near.cipher()[0] == "TLS_AES_128_GCM_SHA256"
    near, _ = connect(context, maximum_version=ssl.TLSVersion.TLSv1_2)
    assert near.cipher()[0] == "ECDHE-RSA-AES128-GCM-SHA256"
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert all("ECDHE" in cipher["name"] or cipher["name"].startswith("TLS_")
               for cipher in context.get_ciphers())


def test_a_handshake_in_memory_proves_that_any_certificate_arrives() -> None:
    context = context_of("server")
    files = str(FILES / "server.pem"), str(FILES / "server.key")
    with pytest.raises(OSError, match="arrive with"):
        check_any_certificate(context, *files)          # nobody has asked
    context.verify_mode = ssl.CERT_OPTIONAL
    with pytest.raises(OSError, match="cannot request client certificates"):
        check_any_certificate(context, *files)          # asked, and chained to a CA
    ask_for_any_certificate(context)
    check_any_certificate(context, *files)
    check_any_certificate(context, *files)


def test_with_a_ca_foreign_certificates_fail_the_handshake() -> None:
    context = server_context(str(FILES / "server.pem"), str(FILES / "server.key"),
                             str(FILES / "ca.pem"))
    _, far = connect(context, "ca_client", "client")
    assert far.getpeercert(True) == first_certificate(read("ca_client.pem"))
    assert connect(context)[1].getpeercert(True) is None
    for cert, key in (("old_rsa", "rsa"), ("ca_expired", "client")):
        with pytest.raises(ssl.SSLCertVerificationError):
            connect(context, cert, key)


def test_an_unsupported_interpreter_is_reported(monkeypatch: Any) -> None:
    with pytest.raises(OSError, match="need CPython"):
        cmon_proxy._context_pointer(object())           # type: ignore[arg-type]
    class Other(ssl.SSLContext):
        """Reports other values than the SSL_CTX inside."""
        @property
        def options(self) -> Any:
            return 0
    with pytest.raises(OSError, match="not laid out"):
        cmon_proxy._context_pointer(Other(ssl.PROTOCOL_TLS_SERVER))
    cmon_proxy._library.cache_clear()
    monkeypatch.setattr(cmon_proxy, "_FUNCTIONS", (("no_such_function", None, ()),))
    with pytest.raises(OSError, match="does not export no_such_function: install a Python"):
        make_key()
    context_of("server")                                # with a CA it still works
    monkeypatch.undo()
    cmon_proxy._library.cache_clear()
    monkeypatch.setattr(ssl, "OPENSSL_VERSION", "OpenSSL 0.9.7")
    with pytest.raises(OSError, match="but ssl uses OpenSSL 0.9.7"):
        make_key()


def test_threads_may_use_openssl_concurrently_without_leaks() -> None:
    der, keys = first_certificate(read("new_rsa.pem")), [public_key(read("rsa.pub")),
                                                         public_key(read("ec.pub"))]
    failures: list[str] = []

    def work() -> None:
        for _ in range(150):
            found = certificate(der)
            if [signed_by(found, key) for key in keys] != [True, False]:
                failures.append("wrong")
            try:
                certificate(der[:-1])
                failures.append("cut off")
            except CertificateError:
                pass

    def resident() -> int:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def run() -> None:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run()
    if sys.platform == "linux":
        before = resident()
        run()
        run()
        # 2,400 certificates of 2 kB, parsed twice each: a leak of one would show
        assert resident() - before < 3 << 20
    assert not failures


def test_the_error_queue_of_the_thread_is_left_empty() -> None:
    for bad in (b"", b"junk", first_certificate(read("old_rsa.pem"))[:-3]):
        with pytest.raises(CertificateError):
            certificate(bad)
    signed_by(load("new_rsa"), public_key(read("ec.pub")))
    assert cmon_proxy._library().ERR_peek_last_error() == 0
