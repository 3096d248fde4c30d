# SPDX-License-Identifier: MPL-2.0
"""Every kind of certificate against every kind of account."""
from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import cmon_proxy
from agents import TLS, key
from cmon_agent import Refused
from cmon_proxy import (
    CLIENT_PURPOSE, CMON_PURPOSE, Account, AuthorizedKey, Identity, Policy, first_certificate,
    grant, key_id_of, make_certificate, public_key)

NOW = 1_795_000_000.0           # November 2026


def identity(name: str) -> Identity:
    return Identity(first_certificate((TLS / f"{name}.pem").read_text()) if name else None)


def account(*names: str, login: str = "alice", **more: Any) -> Account:
    keys = [public_key(key(name)) for name in names]
    return Account("a", login, {one.md5: AuthorizedKey(one) for one in keys}, **more)


def verdict(name: str, who: Any, policy: Policy = Policy(), now: float = NOW) -> str:
    """"ok", or the code of the refusal."""
    try:
        grant(identity(name), who, policy, now)
        return "ok"
    except Refused as refusal:
        assert "\n" not in str(refusal) and str(refusal)[0].islower() and "{" not in str(refusal)
        return dict(refusal.headers)["X-Cmon-Error"]


# certificate, the account's keys, verdict
ROWS = [
    ("old_rsa", ("rsa",), "ok"), ("old_ec", ("ec",), "ok"), ("old_ed25519", ("ed25519",), "ok"),
    ("old_rsa", ("other", "ec", "rsa"), "ok"),
    ("old_rsa", (), "unknown_key"), ("old_rsa", ("other",), "unknown_key"),
    ("old_expired", ("rsa",), "ok"),                        # dates are not enforced
    ("old_sha1", ("rsa",), "weak_signature"),
    ("old_forged", ("rsa",), "unknown_key"),                # the account's key, signed by another
    ("old_forged", ("other",), "unknown_key"),              # signed by the account's, another's key
    ("new_rsa", ("rsa",), "ok"), ("new_ec", ("ec",), "ok"), ("new_ec384", ("ec384",), "ok"),
    ("new_colons", ("rsa",), "ok"), ("new_md5hex", ("rsa",), "ok"),
    ("sshpk_old_rsa", ("rsa",), "ok"), ("sshpk_old_ec", ("ec",), "ok"),     # by node-sshpk
    ("sshpk_new_rsa", ("rsa",), "ok"), ("sshpk_new_ec", ("ec",), "ok"),
    ("sshpk_new_ec384", ("ec384",), "ok"), ("sshpk_new_rsa", ("ec",), "unknown_key"),
    ("new_rsa", ("ec",), "unknown_key"), ("new_rsa", (), "unknown_key"),
    ("new_expired", ("rsa",), "expired"), ("new_future", ("rsa",), "not_yet_valid"),
    ("new_sha1", ("rsa",), "weak_signature"),
    ("new_wrong_issuer", ("rsa",), "unknown_key"), ("new_wrong_issuer", ("other",), "unknown_key"),
    ("no_fingerprint", ("rsa",), "bad_certificate"),
    ("docker", ("rsa",), "unknown_key"),
    ("ca_client", ("rsa",), "unknown_key"),
    ("server", ("rsa",), "unknown_key"),
    ("", ("rsa",), "no_certificate"),
]


@pytest.mark.parametrize("name, keys, expected", ROWS, ids=lambda value: str(value) or "none")
def test_certificate_against_keys(name: str, keys: Any, expected: str) -> None:
    assert verdict(name, account(*keys)) == expected


@pytest.mark.parametrize("name", ["old_rsa", "new_rsa"])
def test_unknown_account_reads_like_one_without_the_key(name: str) -> None:
    def words(who: Any) -> tuple[Any, ...]:
        with pytest.raises(Refused) as caught:
            grant(identity(name), who, Policy(), NOW)
        return caught.value.status, str(caught.value), caught.value.headers
    assert words(None) == words(account("other"))


def test_sha1_is_accepted_only_with_allow_sha1() -> None:
    policy = Policy(allow_sha1=True)
    assert verdict("old_sha1", account("rsa"), policy) == "ok"
    assert verdict("new_sha1", account("rsa"), policy) == "ok"
    assert verdict("new_sha1", account("ec"), policy) == "unknown_key"


@pytest.mark.parametrize("signature, digest, sha1, taken", [
    ("RSA-SHA256", "sha256", False, True), ("RSA-SHA512/256", "sha512-256", False, True),
    ("RSA-SHA512/224", "sha512-224", False, True), ("ecdsa-with-SHA384", "sha384", False, True),
    ("id-rsassa-pkcs1-v1_5-with-sha3-256", "sha3-256", False, True), ("ED25519", "", False, True),
    ("RSA-SHA1", "sha1", False, False), ("RSA-SHA1", "sha1", True, True),
    ("RSA-MD5", "md5", True, False), ("RSA-RIPEMD160", "ripemd160", True, False),
    ("RSA-MD4", "md4", True, False), ("RSA-MDC2", "mdc2", True, False),
    ("RSA-MD5-SHA1", "md5-sha1", True, False), ("", "", True, False),
    ("SM2-SM3", "sm3", True, False),
])
def test_digests_are_accepted_by_name(signature: str, digest: str, sha1: bool, taken: bool) -> None:
    shown = identity("old_rsa")
    assert shown.cert is not None
    shown.cert = shown.cert._replace(signature=signature, digest=digest)
    try:
        grant(shown, account("rsa"), Policy(allow_sha1=sha1), NOW)
        assert taken
    except Refused as refusal:
        assert not taken and dict(refusal.headers)["X-Cmon-Error"] == (
            "weak_signature" if digest else "bad_certificate")


def made(tmp_path: Path, bits: int, digest: str = "sha256", kind: str = "RSA") -> tuple[str, bytes]:
    """A key of an account and a certificate signed by it, made by openssl."""
    key_file, cert = tmp_path / f"{kind}{bits}.key", tmp_path / f"{kind}{bits}-{digest}.pem"
    config = tmp_path / "openssl.cnf"
    config.write_text("[req]\ndistinguished_name=d\n[d]\n")
    if kind == "DSA":
        parameters = tmp_path / "dsa"
        run("openssl", "genpkey", "-genparam", "-algorithm", "DSA", "-pkeyopt",
            f"dsa_paramgen_bits:{bits}", "-out", parameters)
        run("openssl", "genpkey", "-paramfile", parameters, "-out", key_file)
    else:
        run("openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", f"rsa_keygen_bits:{bits}",
            "-out", key_file)
    # OpenSSL 3.0 makes SHA-512/256 with PKCS#1 padding, too, but cannot check it
    padding = ["-sigopt", "rsa_padding_mode:pss"] if digest.startswith("sha512-") else []
    run("openssl", "req", "-x509", "-config", config, "-key", key_file, "-subj", "/CN=alice",
        f"-{digest}", *padding, "-days", "9", "-out", cert)
    public = run("openssl", "pkey", "-in", key_file, "-pubout")
    return public, first_certificate(cert.read_text())


def run(*command: Any) -> str:
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL).stdout.decode()


def refusal_of(public: str, der: bytes, policy: Policy) -> str:
    one = public_key(public)
    who = Account("a", "alice", {one.md5: AuthorizedKey(one)})
    try:
        grant(Identity(der), who, policy, time.time())
        return ""
    except Refused as refusal:
        assert str(one.bits) in str(refusal)
        return dict(refusal.headers)["X-Cmon-Error"]


@pytest.mark.parametrize("bits, strict, lax", [(512, "weak_key", "weak_key"),
                                               (1024, "weak_key", ""), (2048, "", "")])
def test_short_rsa_keys_are_refused(tmp_path: Path, bits: int, strict: str, lax: str) -> None:
    public, der = made(tmp_path, bits)
    assert public_key(public).bits == bits
    assert refusal_of(public, der, Policy()) == strict
    assert refusal_of(public, der, Policy(allow_rsa1024=True)) == lax


def test_a_short_key_of_the_account_is_refused_whatever_the_certificates_own_is(tmp_path: Path
                                                                                ) -> None:
    """New style: a strong key of its own, signed by an SSH key of 512 bits."""
    public, _ = made(tmp_path, 512)
    pem = make_certificate(
        (TLS / "client.key").read_bytes(), "alice", issuer="MD5:" + public_key(public).md5,
        signing_key=(tmp_path / "RSA512.key").read_bytes(), purposes=(CLIENT_PURPOSE, CMON_PURPOSE))
    assert refusal_of(public, first_certificate(pem.decode()), Policy()) == "weak_key"


def test_a_short_key_of_the_certificate_is_refused_whatever_the_accounts_is(tmp_path: Path) -> None:
    """New style: a key of its own of 512 bits, signed by a strong SSH key; and with a CA."""
    made(tmp_path, 512)
    pem = make_certificate(
        (tmp_path / "RSA512.key").read_bytes(), "alice", issuer="MD5:" + public_key(key("rsa")).md5,
        signing_key=(TLS / "rsa.key").read_bytes(), purposes=(CLIENT_PURPOSE, CMON_PURPOSE))
    for policy in (Policy(), Policy(by_ca=True)):
        with pytest.raises(Refused, match="512 bits is too short"):
            grant(Identity(first_certificate(pem.decode())), account("rsa"), policy, time.time())


@pytest.mark.parametrize("digest", ["sha512-256", "sha512-224", "sha3-256"])
def test_rare_strong_digests_are_accepted(tmp_path: Path, digest: str) -> None:
    assert refusal_of(*made(tmp_path, 2048, digest), Policy()) == ""


def test_dsa_keys_are_rejected(tmp_path: Path) -> None:
    _, der = made(tmp_path, 2048, kind="DSA")
    with pytest.raises(Refused, match="not an RSA, ECDSA or Ed25519 key"):
        grant(Identity(der), account("rsa"), Policy(), NOW)


@pytest.mark.parametrize("name, words", [
    ("old_rsa", ("MD5:", "SHA256:", "check that the common name, alice, is your login")),
    ("new_rsa", ("MD5:", "`ssh-keygen -l -E md5 -f KEY.pub`", "is your login")),
])
def test_an_unknown_key_refusal_names_key_and_login(name: str, words: Any) -> None:
    with pytest.raises(Refused) as caught:
        grant(identity(name), account("other"), Policy(), NOW)
    shown = str(caught.value)
    assert all(word in shown for word in words)
    if name == "old_rsa":
        assert all(one in shown for one in (TLS / "rsa.fingerprints.txt").read_text().split())


def test_new_settings_apply_to_open_connections() -> None:
    shown, who = identity("old_sha1"), account("rsa", approved=False)
    lax = Policy(allow_sha1=True)
    assert grant(shown, who, lax, NOW).account is who
    for strict in (Policy(), Policy(allow_sha1=True, require_approved=True)):
        with pytest.raises(Refused):
            grant(shown, who, strict, NOW)
    assert grant(shown, who, lax, NOW).account is who


def test_approval_is_required_only_with_require_approved() -> None:
    waiting = account("rsa", approved=False)
    assert verdict("old_rsa", waiting) == "ok"
    assert verdict("old_rsa", waiting, Policy(require_approved=True)) == "not_approved"


def test_with_a_ca_the_name_suffices_and_dates_are_checked() -> None:
    policy = Policy(by_ca=True)
    assert verdict("ca_client", account(), policy) == "ok"
    assert verdict("ca_client", None, policy) == "unknown_account"
    assert verdict("ca_expired", account(), policy) == "expired"
    assert verdict("", account(), policy) == "no_certificate"


@pytest.mark.parametrize("der, why", [(b"junk", "not an X.509"), (b"", "not an X.509")])
def test_garbage_is_refused(der: bytes, why: str) -> None:
    with pytest.raises(Refused, match=why):
        grant(Identity(der), account("rsa"), Policy(), NOW)


def test_a_removed_key_or_passed_date_applies_to_the_next_request() -> None:
    who, shown = account("rsa"), identity("new_rsa")
    policy = Policy()
    first = grant(shown, who, policy, NOW)
    assert grant(shown, who, policy, NOW) is first
    with pytest.raises(Refused):
        grant(shown, account("ec"), Policy(), NOW)
    again = grant(shown, who, Policy(), NOW)
    assert again.account is who
    with pytest.raises(Refused, match="expired on"):
        grant(shown, who, Policy(), 5e9)
    with pytest.raises(Refused):
        grant(shown, None, Policy(), NOW)


def test_a_signature_is_verified_once(monkeypatch: Any) -> None:
    calls: list[int] = []
    real = cmon_proxy.signed_by
    monkeypatch.setattr(cmon_proxy, "certificates", cmon_proxy.Certificates())
    monkeypatch.setattr(cmon_proxy, "signed_by", lambda *both: calls.append(1) or real(*both))
    shown = identity("new_rsa")
    for _ in range(5):
        grant(shown, account("rsa"), Policy(), NOW)         # each time a new account object
    assert len(calls) == 1


def test_a_certificate_signed_by_another_key_is_rejected() -> None:
    # bob's name, signed by alice's key: good for neither
    assert verdict("new_bob", account("other", login="bob")) == "unknown_key"


def test_users_are_limited_to_groups_and_administrators_are_not() -> None:
    one = public_key(key("rsa"))
    for groups in (None, frozenset(("web",))):
        who = Account("a", "alice", {one.md5: AuthorizedKey(one, "carol", groups)})
        assert grant(identity("old_rsa"), who, Policy(), NOW).groups == groups


@pytest.mark.parametrize("name, expected", [
    ("MD5:HqIuWPXu6fGqbnkwfUD7Ag", "1e:a2:2e:58:f5:ee:e9:f1:aa:6e:79:30:7d:40:fb:02"),
    ("MD5:HqIuWPXu6fGqbnkwfUD7Ag==", "1e:a2:2e:58:f5:ee:e9:f1:aa:6e:79:30:7d:40:fb:02"),
    ("MD5:1ea22e58f5eee9f1aa6e79307d40fb02", "1e:a2:2e:58:f5:ee:e9:f1:aa:6e:79:30:7d:40:fb:02"),
    ("1E:A2:2E:58:F5:EE:E9:F1:AA:6E:79:30:7D:40:FB:02",
     "1e:a2:2e:58:f5:ee:e9:f1:aa:6e:79:30:7d:40:fb:02"),
    ("MD5:1e:a2:2e:58:f5:ee:e9:f1:aa:6e:79:30:7d:40:fb:02",
     "1e:a2:2e:58:f5:ee:e9:f1:aa:6e:79:30:7d:40:fb:02"),
    ("", None), ("SHA256:HqIuWPXu6fGqbnkwfUD7Ag", None), ("MD5:short", None), ("Some CA", None),
    ("MD5:*", None), ("**", None),
])
def test_spellings_of_a_fingerprint(name: str, expected: Any) -> None:
    assert key_id_of(name) == expected


def test_the_header_contains_the_expiry_of_the_certificate() -> None:
    assert identity("old_expired").header == b"X-Cmon-Certificate-Expires: 2019-01-01 00:00:00Z\r\n"
