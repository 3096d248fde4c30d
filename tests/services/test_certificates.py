# SPDX-License-Identifier: MPL-2.0
"""Every kind of client certificate at the real proxy, shown by curl as a person would."""
from __future__ import annotations

import json
import ssl
import subprocess
from pathlib import Path

import pytest
from datacenter import SERVICE, SUFFIX, TLS, Credentials, DataCenter, tool

from support import http_get, wait_until

# what is shown, certificate, key, the status that it gets, and a word of the reason
SHOWN = [
    ("old style, RSA", "old_rsa", "rsa", 200, "containers"),
    ("old style, ECDSA", "old_ec", "ec", 200, "containers"),
    ("old style, run out long ago, as the original takes it", "old_expired", "rsa", 200,
     "containers"),
    ("new style, signed by an RSA key", "new_rsa", "client", 200, "containers"),
    ("new style, signed by an ECDSA key", "new_ec", "client", 200, "containers"),
    ("new style, signed by a P-384 key", "new_ec384", "client", 200, "containers"),
    ("new style, issuer as colons", "new_colons", "client", 200, "containers"),
    ("new style, run out", "new_expired", "client", 401, "expired on 2019"),
    ("new style, not yet begun", "new_future", "client", 401, "not valid before 2110"),
    ("new style, signed with SHA-1", "new_sha1", "client", 401, "SHA1"),
    ("old style, a key that is not on the account", "old_other", "other", 401, "has no key"),
    ("old style, says one key and was signed by another", "old_forged", "rsa", 401, "has no key"),
    ("new style, names one key and was signed by another", "new_wrong_issuer", "client", 401,
     "has no key that matches"),
    ("new style, signed by a key that is not on the account", "new_other", "client", 401, "no key"),
    ("new style, another account's name", "new_bob", "client", 401, "account bob has no key"),
    ("new style, an issuer that is no fingerprint", "no_fingerprint", "client", 401, "fingerprint"),
    ("made for docker", "docker", "client", 401, "has no key that matches"),
    ("of an ordinary CA", "ca_client", "client", 401, "has no key that matches"),
    ("none", "", "", 401, "no client certificate"),
]


@pytest.fixture()
def served(center: DataCenter) -> DataCenter:
    center.start_proxy()
    return center


def test_every_kind_of_certificate_gets_what_it_should(served: DataCenter) -> None:
    for what, certificate, key, status, word in SHOWN:
        shown = Credentials(TLS / f"{certificate}.pem", TLS / f"{key}.key") if certificate else None
        got, body = served.curl("/v1/discover", shown)
        assert got == status and word in body, f"{what}: {got} {body}"
    # curl does not send a key that is not the certificate's, nor a certificate that is none
    (served.folder / "garbage.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n"
                                               "-----END CERTIFICATE-----\n")
    for certificate in (served.folder / "garbage.pem", TLS / "new_rsa.pem"):
        got, body = served.curl("/v1/discover", Credentials(certificate, TLS / "other.key"))
        assert got == 0, body
    assert served.curl("/_ping", None)[0] == 200


def test_bytes_that_are_no_certificate_end_the_handshake_and_nothing_else(
        served: DataCenter, tmp_path: Path) -> None:
    # a client that signs with one key and shows the certificate of another
    context = ssl.create_default_context(cafile=str(served.folder / "server.pem"))
    context.check_hostname = False
    context.load_cert_chain(TLS / "old_rsa.pem", TLS / "rsa.key")
    assert http_get(served.address, "/v1/discover", {"Host": f"cmon.{SUFFIX}"},
                    tls=context).status == 200
    broken = tmp_path / "broken"
    broken.write_bytes(bytes(range(256)) * 40)
    with broken.open("rb") as file:
        subprocess.run([tool("openssl"), "s_client", "-quiet", "-connect",
                        f"{served.address[0]}:{served.address[1]}"], check=False,
                       stdin=file, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL, timeout=20)
    assert served.get("/v1/discover").status == 200


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_both_versions_of_tls_are_spoken_and_older_ones_are_not(served: DataCenter,
                                                                version: str) -> None:
    status, _ = served.curl("/v1/discover", served.credentials["alice"], SERVICE,
                            f"--tlsv{version}", "--tls-max", version)
    assert status == 200
    status, _ = served.curl("/v1/discover", served.credentials["alice"], SERVICE,
                            "--tlsv1.0", "--tls-max", "1.1", "--ciphers", "DEFAULT@SECLEVEL=0")
    assert status == 0


def test_key_that_is_removed_while_a_connection_is_open_is_refused_on_the_next_request(
        served: DataCenter) -> None:
    host = {"Host": f"cmon.{SUFFIX}"}
    with served.connect("alice") as connection:
        assert connection.request("/v1/discover", host).status == 200
        [alice] = [a for a in served.inventory["accounts"] if a["login"] == "alice"]
        keys, alice["keys"] = alice["keys"], []
        served.write_inventory()
        refused = wait_until(lambda: (lambda answer: answer if answer.status != 200 else None)(
            connection.request("/v1/discover", host)), "the refusal on the open connection")
        assert refused.status == 401 and "account alice has no key" in refused.text
        assert served.get("/v1/discover").status == 401
        assert served.get("/v1/discover", "bob").status == 200
        alice["keys"] = keys
        served.write_inventory()
        wait_until(lambda: connection.request("/v1/discover", host).status == 200, "its return")


def test_openssl_resumes_no_session(served: DataCenter) -> None:
    context = served.credentials["alice"].context()
    with served.connect("alice") as connection:
        connection.request("/v1/discover")
        session = connection.socket.session
    assert session is None or not session.has_ticket
    assert context.session_stats()["hits"] == 0


def test_discovery_lists_an_accounts_own_containers(served: DataCenter) -> None:
    status, body = served.curl("/v1/discover", served.credentials["alice"])
    listed = {vm["vm_uuid"] for vm in json.loads(body)["containers"]}
    assert status == 200 and listed == {vm["uuid"] for vm in served.vms("alice")}
