#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""The Container Monitor proxy: gives tenants access to the metrics of their zones.

Accepts requests over mutual TLS, identifies the account by its certificate, and relays each request
to the agent on the zone's compute node. Also serves discovery, quotas and a page for browsers.

    cmon_proxy.py --config FILE [--listen HOST:PORT] [--check-config] [--smf] …

Requests, relays, the inventory and the quotas all run in one thread, the server's loop, and need no
locks. Whatever may block (Triton's services, large answers) runs in other threads, which pass
immutable results to the loop. Map (`grep '^# ---'`):

    settings
    refusals
    TLS and certificates
    TLS connections
    identity
    inventory
    Triton
    quotas
    forwarding
    routes
    page for people
    workers
    main
"""
from __future__ import annotations  # a SyntaxError here: this program needs Python 3.9 or later

import argparse
import base64
import collections
import copy
import ctypes
import dataclasses
import datetime
import difflib
import functools
import gc
import hashlib
import heapq
import html
import json
import math
import operator
import os
import random
import re
import selectors
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, TypeVar, Union

if sys.version_info < (3, 9):       # one line instead of a traceback
    sys.exit("cmon_proxy: needs Python 3.9 or later, this is " + sys.version.split()[0])

try:
    # The agent must run as a single file, so it contains the shared kit.
    from cmon_agent import (
        BASE_CSS, COUNTER, GAUGE, HANDSHAKE, HTML, IDLE, JSON, PAGE, SHORTEST_TIMEOUT, USE,
        USE_BUSY, USE_FROM, USE_FULL, USE_UP, UUID, Answer, AnswerReader, Backoff, Breaker,
        Cache, Client, ClientError, ConfigError, Connection, Deferred, Family,
        Labels, Limits, Listener, Loop, Pool, Prepared, Refused, Registry, Request,
        Response, Route, Router, Sample, Server, TooLarge, __version__, admin_address, at_least,
        begin_connect, bracketed, call, command_line, command_settings, complain, gunzip, http_date,
        is_address, is_ip, listening_socket, log, one_of, open_streams, page_headers,
        parse_address, plain_page, prepare, read_file, read_json, reason_of,
        register_process_metrics, render, reused, run_daemon, scrape_seconds, setting, single,
        text, wire)
except ImportError as import_error:
    sys.exit(f"cmon_proxy: {import_error}: cmon_agent.py of the same version must be beside "
             "cmon_proxy.py")

# --- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TlsSettings:
    """The server's certificate, and how clients are authenticated."""
    certificate: Path = setting(dataclasses.MISSING, "PEM file: the server's certificate and chain")
    key: Path = setting(dataclasses.MISSING, "PEM file: its private key")
    client_auth: str = setting(
        "account-keys", "account-keys: by the account's SSH keys; ca: by a certificate authority; "
        "changes need a restart",
        one_of("account-keys", "ca"))
    client_ca: Path | None = setting(None, "PEM file: the CA of client certificates, for ca")
    allow_sha1: bool = setting(False, "accept client certificates signed with SHA-1")
    allow_rsa1024: bool = setting(
        False, "accept RSA keys of 1,024 bits or more instead of 2,048")


@dataclass(frozen=True)
class InventorySettings:
    """The source of accounts, compute nodes and containers: a file, or Triton."""
    file: Path | None = setting(None, "JSON file, checked for changes every second")
    vmapi: str | None = setting(None, "URL of Triton's VMAPI, with its changefeed")
    cnapi: str | None = setting(None, "URL of Triton's CNAPI")
    mahi: str | None = setting(None, "URL of Triton's mahi")
    snapshot: Path | None = setting(None, "file that keeps the last inventory across restarts")
    max_age: float = setting(
        3600.0, "seconds after which unconfirmed ownership is no longer trusted", at_least(1))


@dataclass(frozen=True)
class AgentSettings:
    """How to reach the agents."""
    port: int = setting(9163, "port of the agents", at_least(1))
    connect_timeout: float = setting(0.5, "connect timeout, in seconds", at_least(0.01))
    timeout: float = setting(10.0, "maximum seconds for a page", at_least(0.1))
    max_in_flight: int = setting(
        8, "concurrent requests to one node, per worker; more wait", at_least(1))


@dataclass(frozen=True)
class AccountQuota:
    """The quota of one account; omitted settings are those of all accounts."""
    per_minute: float | None = setting(None, "as above", at_least(0))
    burst: float | None = setting(None, "as above", at_least(1))
    over_quota: str | None = setting(None, "as above", one_of("stale", "refuse", "allow"))
    hard_per_minute: float | None = setting(None, "as above", at_least(0))
    exempt: bool = setting(False, "no quota for this account")


@dataclass(frozen=True)
class QuotaSettings:
    """Limits on an account's requests."""
    per_minute: float = setting(6000.0, "requests a minute, per account", at_least(0))
    burst: float = setting(1000.0, "size of a burst, in requests", at_least(1))
    over_quota: str = setting(
        "stale", "above it: stale (last copy of a page), refuse (429 for all) or allow",
        one_of("stale", "refuse", "allow"))
    replicas: int = setting(1, "proxies behind one name; each admits its share", at_least(1))
    hard_per_minute: float = setting(60000.0, "limit above which all are refused", at_least(0))
    exempt_operators: bool = setting(False, "no quota for operators")
    accounts: dict[str, AccountQuota] = setting({}, "exceptions, by login")


@dataclass(frozen=True)
class Settings:
    """All settings of the proxy."""
    tls: TlsSettings = setting(dataclasses.MISSING, "certificates")
    inventory: InventorySettings = setting(dataclasses.MISSING, "accounts, nodes and containers")
    listen: str = setting("0.0.0.0:9163", "address for tenants", is_address)
    admin_listen: str | None = setting(
        "127.0.0.1:8881", "address for the proxy's metrics, plain HTTP; null: none", is_address)
    host_prefix: str = setting(
        "cmon", "first label of the service's own name; empty: any name")
    agent: AgentSettings = setting(AgentSettings, "the agents on compute nodes")
    quota: QuotaSettings = setting(QuotaSettings, "limits on an account's requests")
    discover_include_stopped: bool = setting(False, "also list stopped containers")
    require_approved: bool = setting(
        False, "refuse accounts that are not approved for provisioning")
    workers: int = setting(1, "processes that share the listening socket", at_least(1))
    log_level: str = setting("info", "lowest level that is logged",
                             one_of("debug", "info", "warning", "error"))
    log_format: str = setting("", "text or bunyan; empty: text on a terminal, bunyan otherwise",
                              one_of("", "text", "bunyan"))


def problems_of(settings: Settings) -> list[str]:
    """Check settings against each other and the files they name; return what is wrong."""
    problems: list[str] = []
    tls, inventory = settings.tls, settings.inventory
    services = {"vmapi": inventory.vmapi, "cnapi": inventory.cnapi, "mahi": inventory.mahi}
    missing = [name for name, url in services.items() if url is None]
    if inventory.file is not None and len(missing) < 3:
        problems.append("inventory: set either file, or vmapi, cnapi and mahi, not both")
    if inventory.file is None and missing:
        problems.append("inventory: needs file, or vmapi, cnapi and mahi; missing: "
                        + ", ".join(["file", *missing] if len(missing) == 3 else missing))
    for name, url in services.items():
        if url is not None and not is_service_url(url):
            problems.append(f"inventory.{name}: {url!r} is not a URL like http://host:port")

    if (tls.client_auth == "ca") != (tls.client_ca is not None):
        problems.append("tls.client_ca: required with client_auth \"ca\", and only with it")
        return problems
    try:
        make_tls(settings)
    except ConfigError as error:
        problems += error.problems
    return problems


def is_service_url(url: str) -> bool:
    """Whether our HTTP client and the changefeed's accept this URL."""
    match = re.fullmatch(r"https?://([^/?#\s]+)/?", url)
    try:
        return match is not None and bool(parse_address(match.group(1), 80))
    except ConfigError:
        return False


def make_tls(settings: Settings) -> ssl.SSLContext:
    """The TLS context of the main listener, tested; raises ConfigError."""
    tls = settings.tls
    for name, path in (("certificate", tls.certificate), ("key", tls.key),
                       ("client_ca", tls.client_ca)):
        try:
            if path is not None:
                read_file(path)
        except OSError as error:
            raise ConfigError(f"tls.{name}: cannot read {path}: {reason_of(error)}") from None
    try:
        ca = str(tls.client_ca) if tls.client_auth == "ca" else None
        context = server_context(str(tls.certificate), str(tls.key), ca)
        if ca is None:
            ask_for_any_certificate(context)
            check_any_certificate(context, str(tls.certificate), str(tls.key))
    except (OSError, ValueError) as error:      # ssl.SSLError is an OSError
        raise ConfigError(*tls_problems(tls) or [
            f"tls: {tls.certificate} with {tls.key}: {error}"]) from None
    return context


def tls_problems(tls: TlsSettings) -> list[str]:
    """What is wrong with the files of `tls`; empty when only OpenSSL can tell."""
    problems: list[str] = []
    of_certificate: PublicKey | None = None
    try:
        of_certificate = server_certificate(tls.certificate).key
    except (OSError, CertificateError) as error:
        problems.append(f"tls.certificate: {tls.certificate}: {error}; it must be a PEM file that "
                        "begins with the server's own certificate")
    pem = read_file(tls.key)
    if b"-----BEGIN OPENSSH PRIVATE KEY-----" in pem:
        problems.append(f"tls.key: {tls.key} is in OpenSSH's own format; convert a copy with "
                        "`ssh-keygen -p -m PEM -f COPY`")
    elif b"ENCRYPTED" in pem:
        problems.append(f"tls.key: {tls.key} has a passphrase, which a service cannot "
                        "enter; remove it with `openssl pkey -in KEY -out NEWKEY`")
    else:
        try:
            if private_key(pem) != of_certificate and of_certificate is not None:
                problems.append(f"tls.key: {tls.key} is not the key of {tls.certificate}: name the "
                                "key that the certificate was made with")
        except CertificateError as error:
            problems.append(f"tls.key: {tls.key}: {error}")
    if tls.client_ca is not None:
        try:
            ssl.create_default_context(cafile=str(tls.client_ca))
        except (OSError, ValueError):
            problems.append(f"tls.client_ca: {tls.client_ca} contains no PEM certificate")
    return problems


# --- refusals -------------------------------------------------------------------------------------

# Every refusal a client can receive: code, status, and one line that says what, why and what to do.
# Another account's container reads the same as one that does not exist.
REFUSALS: dict[str, tuple[int, str]] = {
    "no_certificate": (401, "no client certificate: use the one made by `triton profile "
                       "cmon-certgen` (curl: --cert and --key)"),
    "bad_certificate": (401, "invalid client certificate: {why}; make a new one with "
                        "`triton profile cmon-certgen`"),
    "weak_signature": (401, "the client certificate is signed with {digest}, which is too weak: "
                       "make a new one with `triton profile cmon-certgen`"),
    "expired": (401, "the client certificate expired on {date}: make a new one with `triton "
                "profile cmon-certgen`"),
    "not_yet_valid": (401, "the client certificate is not valid before {date}: check the clock of "
                      "the machine that made it, or wait"),
    "weak_key": (401, "an RSA key of {bits} bits is too short: make a new key with `ssh-keygen -t "
                 "ecdsa`, add it to the account, and make a certificate with it"),
    "unknown_key": (401, "account {login} has no key that matches this client certificate "
                    "(expected: {key}): add that key to the account, use a certificate made with "
                    "one of its keys, or check that the common name, {login}, is your login"),
    "unknown_account": (401, "no account {login}, or it has no access: the certificate's common "
                        "name must be the account's login"),
    "not_approved": (403, "account {login} is not approved for provisioning: ask the operator to "
                     "approve it"),
    "not_operator": (403, "only operators may see compute nodes: /v1/discover lists your "
                     "containers"),
    "no_such_target": (404, "this account has no such container or compute node: /v1/discover "
                       "lists its containers"),
    "no_page": (404, "container {uuid} is {state}: metrics are available only while it runs"),
    "unknown_host": (404, "{host} is not a name of this service: use {prefix}.SUFFIX, or "
                     "UUID.SUFFIX for /metrics"),
    "no_own_page": (404, "there is no /metrics under the service's own name: use "
                    "/v1/UUID/metrics, or UUID.SUFFIX as the host"),
    "bad_shard": (400, "shard must be k/n with 1 <= k <= n <= {most}: for example shard=1/4"),
    "bad_parameter": (400, "unknown parameter {name}: use groups or shard"),
    "quota": (429, "over the quota of {limit:g} requests a minute: send fewer, or ask the operator "
              "for a higher quota"),
    "inventory_not_ready": (503, "the proxy is still loading its inventory: try again in a few "
                            "seconds"),
    "inventory_too_old": (503, "ownership of containers has not been confirmed since {since}: try "
                          "again when the data center's services are back"),
    "accounts_unreachable": (503, "the proxy cannot look up the account at the moment: try again "
                             "in a few seconds"),
    "node_silent": (503, "compute node {node} has not answered since {since} ({why}): other "
                    "nodes are not affected; try again in a minute"),
    "node_unknown": (503, "the address of {node} is not known yet: try again in a minute"),
    "node_busy": (503, "too many requests are waiting for compute node {node}: try again in a few "
                  "seconds"),
    "node_error": (503, "the agent on compute node {node} failed: {why}; try again in a minute"),
    "node_refused": (503, "the agent on compute node {node} refused the request: {why}"),
    "deadline": (504, "compute node {node} did not answer in time: raise scrape_timeout if this "
                 "happens often"),
    "too_busy": (503, "the proxy is too busy: try again in a second"),
}
# Retry-After of each 503, in seconds
RETRY_SECONDS = 5
_RETRY = {"inventory_too_old": 60, "node_silent": 30, "node_unknown": 30, "node_error": 30,
          "too_busy": 1}


def refused(code: str, *headers: tuple[str, str], **fields: Any) -> Refused:
    """A refusal of the table; unprintable characters from the client are escaped."""
    status, message = REFUSALS[code]
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers += (("Retry-After", str(_RETRY.get(code, RETRY_SECONDS))),)
    shown = {name: value if isinstance(value, (int, float)) else
             str(value).encode("unicode_escape").decode()[:200] for name, value in fields.items()}
    return Refused(status, message.format(**shown), *headers, code=code)


def no_page(uuid: str, state: str) -> Refused:
    """The refusal for a container that does not run; the script of the web page reads its state
    from the header."""
    return refused("no_page", ("X-Cmon-State", state), uuid=uuid, state=state)


NOSNIFF = (("X-Content-Type-Options", "nosniff"),)      # browsers must not guess a content type


def utc(seconds: float) -> str:
    """A time in readable form."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "a date out of range"


# --- TLS and certificates -------------------------------------------------------------------------

# Tenants authenticate with certificates that no CA has signed. `ssl` can neither request nor parse
# such certificates, so the OpenSSL that `_ssl` is linked with does both, through ctypes. All
# cryptography and ASN.1 is OpenSSL's. Every name used here exists in OpenSSL 1.1.1 and 3.

CMON_PURPOSE = "1.3.6.1.4.1.38678.1.4.2"        # extended key usage joyentCmon
CLIENT_PURPOSE, SERVER_PURPOSE = "1.3.6.1.5.5.7.3.2", "1.3.6.1.5.5.7.3.1"
_MAX_CERTIFICATE = 8192                         # bytes; 5 kB with RSA keys of 16,384 bits
_MAX_CERTIFICATE_LIST = 16384                   # bytes of a client's chain; OpenSSL allows 100 kB
_MAX_KEY_TEXT = 32768                           # an RSA key of 16,384 bits needs 3 kB
# numbers from <openssl/obj_mac.h> and <openssl/ssl.h>
_NID_CN, _NID_SKI, _NID_USAGE, _NID_SAN, _NID_BASIC, _NID_AKI = 13, 82, 83, 85, 87, 90
_NID_EKU = 126
_NID_RSA, _NID_EC, _NID_ED25519 = 6, 408, 1087
_CURVES = {415: "nistp256", 715: "nistp384", 716: "nistp521"}
_UTF8, _UNCOMPRESSED, _CTRL_SESSION_CACHE, _CTRL_MAX_CERT_LIST = 0x1000, 4, 44, 51
_CTRL_CLEAR_MODE, _MODE_AUTO_RETRY = 78, 4

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
_S, _Z = ctypes.c_char_p, ctypes.c_size_t
# name, result, arguments; pointers are plain addresses, None is NULL
_FUNCTIONS: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("OpenSSL_version", _S, (_I,)),
    ("ERR_clear_error", None, ()), ("ERR_peek_last_error", ctypes.c_ulong, ()),
    ("ERR_reason_error_string", _S, (ctypes.c_ulong,)), ("CRYPTO_free", None, (_P, _S, _I)),
    ("BIO_new_mem_buf", _P, (_S, _I)), ("BIO_new", _P, (_P,)), ("BIO_s_mem", _P, ()),
    ("BIO_read", _I, (_P, _P, _I)), ("BIO_free", _I, (_P,)), ("BIO_ctrl_pending", _Z, (_P,)),
    ("BN_bin2bn", _P, (_S, _I, _P)), ("BN_bn2bin", _I, (_P, _P)), ("BN_num_bits", _I, (_P,)),
    ("BN_free", None, (_P,)),
    ("ASN1_INTEGER_set_uint64", _I, (_P, ctypes.c_uint64)), ("ASN1_STRING_to_UTF8", _I, (_P, _P)),
    ("ASN1_TIME_to_tm", _I, (_P, _P)), ("ASN1_TIME_set", _P, (_P, _L)),
    ("OBJ_obj2txt", _I, (_P, _I, _P, _I)), ("OBJ_nid2sn", _S, (_I,)),
    ("OPENSSL_sk_num", _I, (_P,)), ("OPENSSL_sk_value", _P, (_P, _I)),
    ("OPENSSL_sk_pop", _P, (_P,)), ("SSL_get_peer_cert_chain", _P, (_P,)),
    ("EXTENDED_KEY_USAGE_free", None, (_P,)),
    ("EVP_PKEY_new", _P, ()), ("EVP_PKEY_free", None, (_P,)), ("EVP_sha256", _P, ()),
    ("EVP_sha384", _P, ()), ("EVP_sha512", _P, ()),
    ("ECDSA_SIG_new", _P, ()), ("ECDSA_SIG_free", None, (_P,)),
    ("ECDSA_SIG_set0", _I, (_P, _P, _P)), ("i2d_ECDSA_SIG", _I, (_P, _P)),
    ("EVP_PKEY_get1_RSA", _P, (_P,)), ("EVP_PKEY_set1_RSA", _I, (_P, _P)),
    ("EVP_PKEY_get1_EC_KEY", _P, (_P,)), ("EVP_PKEY_set1_EC_KEY", _I, (_P, _P)),
    ("EVP_PKEY_new_raw_public_key", _P, (_I, _P, _S, _Z)),
    ("EVP_PKEY_get_raw_public_key", _I, (_P, _P, _P)),
    ("EVP_PKEY_CTX_new_id", _P, (_I, _P)), ("EVP_PKEY_CTX_free", None, (_P,)),
    ("EVP_PKEY_keygen_init", _I, (_P,)), ("EVP_PKEY_CTX_ctrl_str", _I, (_P, _S, _S)),
    ("EVP_PKEY_keygen", _I, (_P, _P)),
    ("RSA_new", _P, ()), ("RSA_free", None, (_P,)), ("RSA_set0_key", _I, (_P, _P, _P, _P)),
    ("RSA_get0_key", None, (_P, _P, _P, _P)),
    ("EC_KEY_new_by_curve_name", _P, (_I,)), ("EC_KEY_free", None, (_P,)),
    ("EC_KEY_get0_group", _P, (_P,)), ("EC_GROUP_get_curve_name", _I, (_P,)),
    ("EC_KEY_key2buf", _Z, (_P, _I, _P, _P)), ("EC_KEY_oct2key", _I, (_P, _S, _Z, _P)),
    ("d2i_PUBKEY", _P, (_P, _P, _L)), ("i2d_PUBKEY", _I, (_P, _P)),
    ("PEM_read_bio_PUBKEY", _P, (_P, _P, _P, _S)),
    ("PEM_read_bio_RSAPublicKey", _P, (_P, _P, _P, _S)),
    ("PEM_read_bio_PrivateKey", _P, (_P, _P, _P, _S)),
    ("PEM_write_bio_PKCS8PrivateKey", _I, (_P, _P, _P, _P, _I, _P, _P)),
    ("d2i_X509", _P, (_P, _P, _L)), ("i2d_X509", _I, (_P, _P)), ("X509_new", _P, ()),
    ("X509_free", None, (_P,)), ("X509_set_version", _I, (_P, _L)),
    ("X509_get_serialNumber", _P, (_P,)), ("X509_getm_notBefore", _P, (_P,)),
    ("X509_getm_notAfter", _P, (_P,)), ("X509_get0_notBefore", _P, (_P,)),
    ("X509_get0_notAfter", _P, (_P,)), ("X509_get_subject_name", _P, (_P,)),
    ("X509_get_issuer_name", _P, (_P,)), ("X509_set_issuer_name", _I, (_P, _P)),
    ("X509_NAME_cmp", _I, (_P, _P)), ("X509_NAME_get_index_by_NID", _I, (_P, _I, _I)),
    ("X509_NAME_get_entry", _P, (_P, _I)), ("X509_NAME_ENTRY_get_data", _P, (_P,)),
    ("X509_NAME_add_entry_by_txt", _I, (_P, _S, _I, _S, _I, _I, _I)),
    ("X509_get_pubkey", _P, (_P,)), ("X509_set_pubkey", _I, (_P, _P)),
    ("X509_get_signature_nid", _I, (_P,)),
    ("X509_get_signature_info", _I, (_P, _P, _P, _P, _P)),
    ("X509_get_ext_by_NID", _I, (_P, _I, _I)), ("X509_get_ext", _P, (_P, _I)),
    ("X509V3_EXT_print", _I, (_P, _P, _L, _I)), ("X509_get_ext_d2i", _P, (_P, _I, _P, _P)),
    ("X509_add_ext", _I, (_P, _P, _I)),
    ("X509_EXTENSION_free", None, (_P,)), ("X509V3_set_ctx", None, (_P, _P, _P, _P, _P, _I)),
    ("X509V3_EXT_conf_nid", _P, (_P, _P, _I, _S)), ("X509_sign", _I, (_P, _P, _P)),
    ("i2d_re_X509_tbs", _I, (_P, _P)), ("X509_get0_signature", None, (_P, _P, _P)),
    ("ASN1_STRING_set", _I, (_P, _S, _I)),
    ("X509_verify", _I, (_P, _P)), ("X509_STORE_CTX_set_default", _I, (_P, _S)),
    ("SSL_CTX_get_verify_mode", _I, (_P,)), ("SSL_CTX_get_options", ctypes.c_uint64, (_P,)),
    ("SSL_CTX_set_cert_verify_callback", None, (_P, _P, _P)),
    ("SSL_CTX_set_ciphersuites", _I, (_P, _S)), ("SSL_CTX_ctrl", _L, (_P, _I, _L, _P)),
    ("SSL_ctrl", _L, (_P, _I, _L, _P)),
)


T = TypeVar("T")


class CertificateError(ValueError):
    """A key or certificate that cannot be read or made."""


class _Tm(ctypes.Structure):
    """`struct tm`, with room for members that platforms append."""
    _fields_ = [(name, ctypes.c_int) for name in ("sec", "min", "hour", "mday", "mon", "year")] + [
        ("rest", ctypes.c_byte * 96)]


@functools.lru_cache(maxsize=None)
def _library() -> ctypes.CDLL:
    """The OpenSSL of this Python's `ssl`, all functions declared; OSError if unavailable."""
    import _ssl
    path = getattr(_ssl, "__file__", None)      # built into the interpreter: its own symbols
    library = ctypes.CDLL(path)
    for name, result, arguments in _FUNCTIONS:
        try:
            function = getattr(library, name)
        except AttributeError:
            raise OSError(f"the {ssl.OPENSSL_VERSION} of this Python does not export {name}: "
                          "install a Python that uses a shared OpenSSL 1.1.1 or 3") from None
        function.restype, function.argtypes = result, arguments
    version = library.OpenSSL_version(0).decode()
    if version != ssl.OPENSSL_VERSION:
        raise OSError(f"found {version}, but ssl uses {ssl.OPENSSL_VERSION}")
    return library


class _Scope:
    """The OpenSSL objects of one call: freed together when it ends. Also clears the thread's error
    queue, since OpenSSL would report a stale error for the next TLS connection."""

    def __init__(self) -> None:
        self.library = _library()
        self._owned: list[tuple[Any, Any]] = []

    def __enter__(self) -> _Scope:
        return self

    def __exit__(self, *_: object) -> None:
        for free, pointer in reversed(self._owned):
            free(pointer)
        self.library.ERR_clear_error()

    def own(self, pointer: int | None, free: Any, failure: str) -> int:
        """Register a pointer to be freed at the end; NULL raises CertificateError."""
        if not pointer:
            raise self.error(failure)
        self._owned.append((free, pointer))
        return pointer

    def need(self, result: int, failure: str) -> None:
        """Raise unless the call returned 1 or more."""
        if result < 1:
            raise self.error(failure)

    def error(self, failure: str) -> CertificateError:
        code = self.library.ERR_peek_last_error()
        reason = self.library.ERR_reason_error_string(code) if code else None
        return CertificateError(failure + (f" ({reason.decode()})" if reason else ""))

    def new(self, kind: str) -> int:
        """An empty object."""
        return self.own(getattr(self.library, f"{kind}_new")(),
                        getattr(self.library, f"{kind}_free"), kind)

    def pkey(self, assign: Any, key: int, failure: str) -> int:
        """An EVP_PKEY with this RSA or EC key in it."""
        pkey = self.new("EVP_PKEY")
        self.need(assign(pkey, key), failure)
        return pkey

    def source(self, text: bytes) -> int:
        """A BIO that reads these bytes, which must outlive the scope."""
        return self.own(self.library.BIO_new_mem_buf(text, len(text)), self.library.BIO_free, "BIO")

    def written(self, write: Callable[[int], int], failure: str) -> bytes:
        """The bytes that a function writes to a BIO."""
        library = self.library
        sink = self.own(library.BIO_new(library.BIO_s_mem()), library.BIO_free, "BIO")
        self.need(write(sink), failure)
        text = ctypes.create_string_buffer(library.BIO_ctrl_pending(sink))
        library.BIO_read(sink, text, len(text))
        return text.raw

    def decoded(self, decode: Any, free: Any, der: bytes, failure: str) -> int:
        """Decode DER with a d2i function; data after it is an error."""
        buffer = ctypes.create_string_buffer(der, len(der))
        position = ctypes.c_void_p(ctypes.addressof(buffer))
        pointer = self.own(decode(None, ctypes.byref(position), len(der)), free, failure)
        if position.value != ctypes.addressof(buffer) + len(der):
            raise CertificateError(f"{failure}: followed by extra data")
        return pointer

    def private_key(self, pem: bytes, passphrase: bytes = b"") -> int:
        # always pass a passphrase: without one OpenSSL prompts on the terminal
        pkey = self.library.PEM_read_bio_PrivateKey(self.source(pem), None, None, passphrase)
        return self.own(pkey, self.library.EVP_PKEY_free,
                        "not a PEM private key, or a wrong passphrase")

    def x509(self, der: bytes) -> int:
        if len(der) > _MAX_CERTIFICATE:
            raise CertificateError(f"a certificate of {len(der)} bytes is too long")
        return self.decoded(self.library.d2i_X509, self.library.X509_free, der,
                            "not an X.509 certificate")

    def spki(self, der: bytes) -> int:
        return self.decoded(self.library.d2i_PUBKEY, self.library.EVP_PKEY_free, der,
                            "not a public key")


def _der(encode: Any, pointer: int) -> bytes:
    """The DER that an i2d function writes."""
    buffer = ctypes.create_string_buffer(max(0, encode(pointer, None)))
    position = ctypes.c_void_p(ctypes.addressof(buffer))
    encode(pointer, ctypes.byref(position))
    return buffer.raw


class PublicKey:
    """A public key in SSH and X.509 form; equal when the keys are."""
    __slots__ = ("kind", "blob", "spki")

    def __init__(self, kind: str, blob: bytes, spki: bytes) -> None:
        self.kind = kind                        # "ssh-rsa", "ecdsa-sha2-nistp256", "ssh-ed25519"
        self.blob = blob                        # RFC 4253 section 6.6
        self.spki = spki                        # DER, SubjectPublicKeyInfo

    @property
    def md5(self) -> str:
        """The MD5 fingerprint, mahi's index: colon-separated hex."""
        return hashlib.md5(self.blob, usedforsecurity=False).digest().hex(":")

    @property
    def sha256(self) -> str:
        """The SHA-256 fingerprint, as ssh-keygen prints it."""
        digest = base64.b64encode(hashlib.sha256(self.blob).digest())
        return "SHA256:" + digest.decode().rstrip("=")

    @property
    def bits(self) -> int:
        """The length of an RSA key's modulus; 0 for other kinds."""
        return int.from_bytes(_ssh_fields(self.blob)[2], "big").bit_length() \
            if self.kind == "ssh-rsa" else 0

    @property
    def line(self) -> str:
        """A line of authorized_keys, without comment."""
        return self.kind + " " + base64.b64encode(self.blob).decode()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and other.blob == self.blob

    def __hash__(self) -> int:
        return hash(self.blob)

    def __repr__(self) -> str:
        return f"<PublicKey {self.kind} {self.sha256}>"


def _ssh_string(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


def _ssh_fields(blob: bytes) -> list[bytes]:
    fields: list[bytes] = []
    position = 0
    while position < len(blob):
        if position + 4 > len(blob):
            raise CertificateError("a truncated SSH key")
        length, = struct.unpack_from(">I", blob, position)
        position += 4
        if length > len(blob) - position:
            raise CertificateError("a truncated SSH key")
        fields.append(blob[position:position + length])
        position += length
    return fields


def _mpint(scope: _Scope, number: int) -> bytes:
    """A BIGNUM as an SSH mpint: with a leading zero byte if the top bit is set."""
    bits = scope.library.BN_num_bits(number)
    buffer = ctypes.create_string_buffer((bits + 7) // 8)
    scope.library.BN_bn2bin(number, buffer)
    return _ssh_string((b"\0" if bits % 8 == 0 else b"") + buffer.raw)


def _public_key_of(scope: _Scope, pkey: int) -> PublicKey:
    """The public key of an EVP_PKEY."""
    library = scope.library
    spki = _der(library.i2d_PUBKEY, pkey)
    if not spki:
        raise scope.error("a key that cannot be encoded")
    rsa = library.EVP_PKEY_get1_RSA(pkey)
    if rsa:
        scope.own(rsa, library.RSA_free, "")
        modulus, exponent = ctypes.c_void_p(), ctypes.c_void_p()
        library.RSA_get0_key(rsa, ctypes.byref(modulus), ctypes.byref(exponent), None)
        if not modulus.value or not exponent.value:
            raise CertificateError("an RSA key without modulus or exponent")
        numbers = _mpint(scope, exponent.value) + _mpint(scope, modulus.value)
        return PublicKey("ssh-rsa", _ssh_string(b"ssh-rsa") + numbers, spki)
    curve_key = library.EVP_PKEY_get1_EC_KEY(pkey)
    if curve_key:
        scope.own(curve_key, library.EC_KEY_free, "")
        curve = _CURVES.get(library.EC_GROUP_get_curve_name(library.EC_KEY_get0_group(curve_key)))
        if curve is None:
            raise CertificateError("an elliptic curve that SSH does not support")
        point = ctypes.c_void_p()
        length = library.EC_KEY_key2buf(curve_key, _UNCOMPRESSED, ctypes.byref(point), None)
        if not length or not point.value:
            raise scope.error("an EC key without a public point")
        encoded = ctypes.string_at(point.value, length)
        library.CRYPTO_free(point.value, None, 0)
        kind = "ecdsa-sha2-" + curve
        blob = _ssh_string(kind.encode()) + _ssh_string(curve.encode()) + _ssh_string(encoded)
        return PublicKey(kind, blob, spki)
    size = ctypes.c_size_t(32)
    raw = ctypes.create_string_buffer(32)
    # X25519 keys, which cannot sign, have the same 32-byte form; the OID tells them apart
    if library.EVP_PKEY_get_raw_public_key(pkey, raw, ctypes.byref(size)) == 1 \
            and b"\x2b\x65\x70" in spki[:12]:
        return PublicKey("ssh-ed25519", _ssh_string(b"ssh-ed25519") + _ssh_string(raw.raw), spki)
    raise CertificateError("not an RSA, ECDSA or Ed25519 key")


def _from_ssh(scope: _Scope, blob: bytes) -> int:
    """An EVP_PKEY from the bytes of an SSH key."""
    library = scope.library
    fields = _ssh_fields(blob)
    kind = fields[0] if fields else b""
    if kind == b"ssh-rsa" and len(fields) == 3:
        rsa = scope.new("RSA")
        exponent = library.BN_bin2bn(fields[1], len(fields[1]), None)
        modulus = library.BN_bin2bn(fields[2], len(fields[2]), None)
        if library.RSA_set0_key(rsa, modulus, exponent, None) != 1:     # else the RSA owns them
            library.BN_free(modulus)
            library.BN_free(exponent)
            raise scope.error("not an RSA key")
        return scope.pkey(library.EVP_PKEY_set1_RSA, rsa, "not an RSA key")
    for nid, curve in _CURVES.items():
        name = curve.encode()
        if kind == b"ecdsa-sha2-" + name and len(fields) == 3 and fields[1] == name:
            key = scope.own(library.EC_KEY_new_by_curve_name(nid), library.EC_KEY_free, "EC_KEY")
            scope.need(library.EC_KEY_oct2key(key, fields[2], len(fields[2]), None),
                       "an EC key whose point is not on its curve")
            return scope.pkey(library.EVP_PKEY_set1_EC_KEY, key, "not an EC key")
    if kind == b"ssh-ed25519" and len(fields) == 2 and len(fields[1]) == 32:
        return scope.own(library.EVP_PKEY_new_raw_public_key(_NID_ED25519, None, fields[1], 32),
                         library.EVP_PKEY_free, "not an Ed25519 key")
    raise CertificateError(f"an SSH key of type {kind[:40]!r}: use RSA, ECDSA or Ed25519")


def public_key(text: str) -> PublicKey:
    """A key of an account: an OpenSSH line, or PEM (SPKI or PKCS#1); CertificateError."""
    if len(text) > _MAX_KEY_TEXT:
        raise CertificateError(f"a key of {len(text)} characters is too long")
    with _Scope() as scope:
        library = scope.library
        source = text.strip().encode("utf-8", "replace")
        if source.startswith(b"-----BEGIN RSA PUBLIC KEY-----"):
            rsa = scope.own(
                library.PEM_read_bio_RSAPublicKey(scope.source(source), None, None, b""),
                library.RSA_free, "not a public key in PEM")
            pkey = scope.pkey(library.EVP_PKEY_set1_RSA, rsa, "not an RSA key")
        elif b"PRIVATE KEY-----" in source:
            raise CertificateError(
                "a private key, which must stay with its owner: put the public key here "
                "(`ssh-keygen -y -f KEY`), and have the owner make a new pair")
        elif source.startswith(b"-----BEGIN "):
            pkey = scope.own(library.PEM_read_bio_PUBKEY(scope.source(source), None, None, b""),
                             library.EVP_PKEY_free, "not a public key in PEM")
        else:
            words = source.split()
            if len(words) < 2:
                raise CertificateError("neither an OpenSSH public key nor a PEM public key")
            try:
                blob = base64.b64decode(words[1], validate=True)
            except ValueError:
                raise CertificateError("an OpenSSH public key with invalid base64") from None
            key = _public_key_of(scope, _from_ssh(scope, blob))
            if words[0].decode("utf-8", "replace") != key.kind:
                raise CertificateError(f"a key of type {key.kind} labelled as another type")
            return key
        return _public_key_of(scope, pkey)


class Certificate(NamedTuple):
    """The fields of a certificate, unverified until `signed_by` returns true."""
    subject: str                                # common name; "" without one
    issuer: str
    self_issued: bool                           # subject and issuer are equal
    not_before: int                             # seconds since the epoch
    not_after: int
    purposes: tuple[str, ...]                   # extended key usage, OIDs in dots
    signature: str                              # OpenSSL's name: "RSA-SHA256", "ecdsa-with-SHA256"
    digest: str                                 # "sha256"; "" where it is part of the algorithm
    key: PublicKey
    der: bytes


def _common_name(scope: _Scope, name: int) -> str:
    library = scope.library
    index = library.X509_NAME_get_index_by_NID(name, _NID_CN, -1)
    if index < 0:
        return ""
    if library.X509_NAME_get_index_by_NID(name, _NID_CN, index) >= 0:
        raise CertificateError("a name with more than one common name")
    text = ctypes.c_void_p()
    entry = library.X509_NAME_ENTRY_get_data(library.X509_NAME_get_entry(name, index))
    length = library.ASN1_STRING_to_UTF8(ctypes.byref(text), entry)
    if length < 0 or not text.value:
        raise scope.error("a common name that is not text")
    value = ctypes.string_at(text.value, length)
    library.CRYPTO_free(text.value, None, 0)
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise CertificateError("a common name that is not text") from None


def _time(scope: _Scope, when: int) -> int:
    tm = _Tm()
    scope.need(scope.library.ASN1_TIME_to_tm(when, ctypes.byref(tm)), "an invalid date")
    try:
        stamp = datetime.datetime(tm.year + 1900, tm.mon + 1, tm.mday, tm.hour, tm.min,
                                  min(tm.sec, 59), tzinfo=datetime.timezone.utc)
    except ValueError:
        raise CertificateError("an invalid date") from None
    return int(stamp.timestamp())


def _purposes(scope: _Scope, x509: int) -> tuple[str, ...]:
    library = scope.library
    critical = ctypes.c_int(-1)
    stack = library.X509_get_ext_d2i(x509, _NID_EKU, ctypes.byref(critical), None)
    if not stack:
        if critical.value != -1:               # broken or repeated is not the same as absent
            raise CertificateError("an unreadable extended key usage")
        return ()
    scope.own(stack, library.EXTENDED_KEY_USAGE_free, "")
    oids: list[str] = []
    text = ctypes.create_string_buffer(256)
    for index in range(library.OPENSSL_sk_num(stack)):
        if library.OBJ_obj2txt(text, len(text), library.OPENSSL_sk_value(stack, index), 1) > 0:
            oids.append(text.value.decode("ascii", "replace"))
    return tuple(oids)


def certificate(der: bytes) -> Certificate:
    """Parse a certificate; raises CertificateError."""
    with _Scope() as scope:
        library = scope.library
        x509 = scope.x509(der)
        subject, issuer = library.X509_get_subject_name(x509), library.X509_get_issuer_name(x509)
        pkey = scope.own(library.X509_get_pubkey(x509), library.EVP_PKEY_free,
                         "a certificate with an unreadable key")
        nid = ctypes.c_int(0)
        # fails for unknown algorithms; without a digest the certificate is refused
        library.X509_get_signature_info(x509, ctypes.byref(nid), None, None, None)
        digest = (library.OBJ_nid2sn(nid.value) or b"").decode().lower() if nid.value else ""
        return Certificate(
            subject=_common_name(scope, subject),
            issuer=_common_name(scope, issuer),
            self_issued=library.X509_NAME_cmp(subject, issuer) == 0,
            not_before=_time(scope, library.X509_get0_notBefore(x509)),
            not_after=_time(scope, library.X509_get0_notAfter(x509)),
            purposes=_purposes(scope, x509),
            signature=(library.OBJ_nid2sn(library.X509_get_signature_nid(x509)) or b"").decode(),
            digest=digest,
            key=_public_key_of(scope, pkey),
            der=der,
        )


def names_of(cert: Certificate) -> list[str]:
    """The host names and addresses of a certificate, as OpenSSL prints them."""
    with _Scope() as scope:
        library = scope.library
        x509 = scope.x509(cert.der)
        index = library.X509_get_ext_by_NID(x509, _NID_SAN, -1)
        if index < 0:
            return []
        text = scope.written(lambda sink: int(library.X509V3_EXT_print(
            sink, library.X509_get_ext(x509, index), 0, 0)), "unreadable alternative names")
        return [name.partition(":")[2] for name in text.decode("ascii", "replace").split(", ")]


def signed_by(cert: Certificate, key: PublicKey) -> bool:
    """Whether OpenSSL verifies the certificate's signature with this key."""
    with _Scope() as scope:
        return bool(scope.library.X509_verify(scope.x509(cert.der), scope.spki(key.spki)) == 1)


def server_certificate(path: Path) -> Certificate:
    """The first certificate of a file; raises CertificateError, OSError."""
    return certificate(first_certificate(read_file(path).decode("utf-8", "replace")))


_PEM_CERTIFICATE = re.compile(
    r"-----BEGIN CERTIFICATE-----\s*([A-Za-z0-9+/=\s]+?)-----END CERTIFICATE-----")


def first_certificate(pem: str) -> bytes:
    """DER of the first certificate in a PEM file, whatever else it contains."""
    match = _PEM_CERTIFICATE.search(pem)
    if match is None:
        raise CertificateError("no PEM certificate")
    try:
        return base64.b64decode("".join(match.group(1).split()), validate=True)
    except ValueError:
        raise CertificateError("a PEM certificate with invalid base64") from None


def make_key(kind: str = "ec") -> bytes:
    """A new private key as PKCS#8 PEM: "ec" is P-256, "rsa" has 2,048 bits."""
    nid, options = {
        "ec": (_NID_EC, ((b"ec_paramgen_curve", b"P-256"), (b"ec_param_enc", b"named_curve"))),
        "rsa": (_NID_RSA, ((b"rsa_keygen_bits", b"2048"),)),
    }[kind]
    with _Scope() as scope:
        library = scope.library
        maker = scope.own(library.EVP_PKEY_CTX_new_id(nid, None), library.EVP_PKEY_CTX_free,
                          "cannot make a key")
        scope.need(library.EVP_PKEY_keygen_init(maker), "cannot make a key")
        for name, value in options:
            scope.need(library.EVP_PKEY_CTX_ctrl_str(maker, name, value), "cannot make a key")
        pkey = ctypes.c_void_p()
        scope.need(library.EVP_PKEY_keygen(maker, ctypes.byref(pkey)), "cannot make a key")
        return _pkcs8(scope, scope.own(pkey.value, library.EVP_PKEY_free, "cannot make a key"))


def _pkcs8(scope: _Scope, pkey: int) -> bytes:
    return scope.written(lambda sink: int(scope.library.PEM_write_bio_PKCS8PrivateKey(
        sink, pkey, None, None, 0, None, None)), "cannot write a key")


def plain_key(pem: bytes, passphrase: bytes = b"") -> bytes:
    """A private key as PEM in PKCS#8 without a passphrase; CertificateError."""
    with _Scope() as scope:
        return _pkcs8(scope, scope.private_key(pem, passphrase))


def private_key(pem: bytes, passphrase: bytes = b"") -> PublicKey:
    """The public half of a private key in PEM; CertificateError."""
    with _Scope() as scope:
        return _public_key_of(scope, scope.private_key(pem, passphrase))


def ssh_public_key(key_pem: bytes) -> str:
    """The OpenSSH public key line to add to the account."""
    return private_key(key_pem).line


class Signer(NamedTuple):
    """A private key held elsewhere, for example by ssh-agent."""
    key: PublicKey
    sign: Callable[[bytes], bytes]              # bytes to sign: an SSH signature, RFC 4253 6.6


# RFC 5656 section 6.2.1; all other kinds sign with SHA-256
_DIGESTS = {"ecdsa-sha2-nistp384": "EVP_sha384", "ecdsa-sha2-nistp521": "EVP_sha512"}


def _x509_signature(scope: _Scope, kind: str, blob: bytes) -> bytes:
    """Convert an SSH signature to X.509's form; CertificateError for other types and SHA-1."""
    library = scope.library
    fields = _ssh_fields(blob)
    name = fields[0].decode("ascii", "replace") if fields else ""
    if len(fields) != 2 or name != ("rsa-sha2-256" if kind == "ssh-rsa" else kind):
        raise CertificateError(f"a signature of type {name[:40]!r} by a key of type {kind}")
    if kind == "ssh-rsa":
        return fields[1]
    numbers = _ssh_fields(fields[1])
    if len(numbers) != 2:
        raise CertificateError("a malformed ECDSA signature")
    made = scope.new("ECDSA_SIG")
    first, second = (library.BN_bin2bn(number, len(number), None) for number in numbers)
    scope.need(library.ECDSA_SIG_set0(made, first, second), "not an ECDSA signature")
    return _der(library.i2d_ECDSA_SIG, made)


def _sign_elsewhere(scope: _Scope, x509: int, signer: Signer) -> None:
    """Replace the signature with the signer's. It was made with a temporary key of the same type,
    to set the algorithm."""
    library = scope.library
    tbs = _der(library.i2d_re_X509_tbs, x509)
    signature = _x509_signature(scope, signer.key.kind, signer.sign(tbs))
    place = ctypes.c_void_p()
    library.X509_get0_signature(ctypes.byref(place), None, x509)
    scope.need(library.ASN1_STRING_set(place, signature, len(signature)), "cannot sign")
    if library.X509_verify(x509, scope.spki(signer.key.spki)) != 1:
        raise CertificateError(f"the signature was not made with the key {signer.key.sha256}")


def make_certificate(
    key_pem: bytes, subject: str, *, issuer: str | bytes | None = None,
    signing_key: bytes | Signer | None = None, names: Sequence[str] = (), days: float = 3650,
    not_before: float | None = None, not_after: float | None = None,
    purposes: Sequence[str] = (), is_ca: bool = False, serial: int | None = None,
    passphrase: bytes = b"",
) -> bytes:
    """A PEM certificate for the key, self-signed, or issued by a name or a PEM certificate.

    By default it is valid from an hour ago, because clocks differ. `passphrase` is that of the
    signing key. Names are host names or numeric IP addresses.
    """
    begin = time.time() - 3600 if not_before is None else not_before
    end = begin + days * 86400 if not_after is None else not_after
    with _Scope() as scope:
        library = scope.library
        x509 = scope.new("X509")
        pkey = scope.private_key(key_pem, b"" if signing_key else passphrase)
        if isinstance(signing_key, Signer):
            kind = signing_key.key.kind
            signer = scope.private_key(make_key("rsa" if kind == "ssh-rsa" else "ec"))
        else:
            signer = pkey if signing_key is None else scope.private_key(signing_key, passphrase)
            kind = _public_key_of(scope, signer).kind
        library.X509_set_version(x509, 2)       # counts from 0: version 3
        number = int.from_bytes(os.urandom(8), "big") >> 1 | 1 if serial is None else serial
        library.ASN1_INTEGER_set_uint64(library.X509_get_serialNumber(x509), number)
        library.ASN1_TIME_set(library.X509_getm_notBefore(x509), int(begin))
        library.ASN1_TIME_set(library.X509_getm_notAfter(x509), int(end))
        issued_by = x509
        for name, of in ((subject, library.X509_get_subject_name(x509)),
                         (issuer if isinstance(issuer, str) else subject,
                          library.X509_get_issuer_name(x509))):
            text = name.encode()
            scope.need(library.X509_NAME_add_entry_by_txt(of, b"CN", _UTF8, text, len(text), -1, 0),
                       f"a common name that X.509 does not allow: {name!r}")
        if isinstance(issuer, bytes):
            issued_by = scope.x509(first_certificate(issuer.decode()))
            library.X509_set_issuer_name(x509, library.X509_get_subject_name(issued_by))
        scope.need(library.X509_set_pubkey(x509, pkey), "cannot use the key")
        context = ctypes.create_string_buffer(1024)     # an X509V3_CTX, 72 bytes in OpenSSL 3
        library.X509V3_set_ctx(context, issued_by, x509, None, None, 0)
        rsa = _public_key_of(scope, pkey).kind == "ssh-rsa"
        usage = "keyCertSign,cRLSign" if is_ca else \
            "digitalSignature,nonRepudiation," + ("keyEncipherment" if rsa else "keyAgreement")
        extensions = [
            (_NID_BASIC, "critical,CA:" + ("TRUE" if is_ca else "FALSE")),
            (_NID_USAGE, "critical," + usage),
            (_NID_SKI, "hash"),
        ]
        if isinstance(issuer, bytes):          # Python 3.13 requires it except in roots
            extensions.append((_NID_AKI, "keyid:always"))
        if purposes:
            extensions.append((_NID_EKU, "critical," + ",".join(purposes)))
        if names:
            extensions.append((_NID_SAN, ",".join([_alternative(name) for name in names])))
        for nid, extension_text in extensions:
            extension = scope.own(
                library.X509V3_EXT_conf_nid(None, context, nid, extension_text.encode()),
                library.X509_EXTENSION_free,
                f"an extension that X.509 does not allow: {extension_text!r}")
            scope.need(library.X509_add_ext(x509, extension, -1), "cannot add an extension")
        digest = getattr(library, _DIGESTS.get(kind, "EVP_sha256"))()
        scope.need(library.X509_sign(x509, signer, digest), "cannot sign")
        if isinstance(signing_key, Signer):
            _sign_elsewhere(scope, x509, signing_key)
        return ssl.DER_cert_to_PEM_cert(_der(library.i2d_X509, x509)).encode()


def _alternative(name: str) -> str:
    if re.search(r"[,\s\\]", name):             # would be parsed as several names
        raise CertificateError(f"a host name with an invalid character: {name!r}")
    return ("IP:" if is_ip(name) else "DNS:") + name


_DEFAULT = ctypes.create_string_buffer(b"default")      # must outlive every context that uses it


def _context_pointer(context: ssl.SSLContext) -> int:
    """The SSL_CTX inside a context, verified by reading values back through it.

    In CPython 3.9 to 3.13 it is the first member after the object header.
    """
    library = _library()
    if sys.implementation.name != "cpython" or not isinstance(context, ssl.SSLContext):
        raise OSError(f"client certificates need CPython, not {sys.implementation.name}")
    pointer = ctypes.c_void_p.from_address(id(context) + object.__basicsize__).value
    if not pointer or pointer % ctypes.sizeof(ctypes.c_void_p):
        raise OSError("the TLS context of this Python is not laid out as expected")
    modes = {ssl.CERT_NONE: 0, ssl.CERT_OPTIONAL: 1, ssl.CERT_REQUIRED: 3}
    mask = (1 << 31) - 1                        # OpenSSL 1.1.1 returns 32 bits
    if library.SSL_CTX_get_verify_mode(pointer) != modes[context.verify_mode] \
            or library.SSL_CTX_get_options(pointer) & mask != int(context.options) & mask:
        raise OSError("the TLS context of this Python is not laid out as expected")
    return pointer


def after_handshake(tls: ssl.SSLSocket | ssl.SSLObject) -> None:
    """Bound what a client can cost after its handshake; OSError closes the connection.

    Free the certificates a client sent besides its own: parsed names take ten times their size, for
    the life of the connection. One record a read: `ssl` has OpenSSL read on behind records without
    data, such as key updates, and a client that sends them fast would never let a read return.
    """
    inner = getattr(tls, "_sslobj")
    # PySSLSocket of Modules/_ssl.c, 3.9 to 3.13: head, socket, SSL, context
    _, pointer, context = (ctypes.c_void_p * 3).from_address(id(inner) + object.__basicsize__)
    if context != id(tls.context) or not pointer:
        raise OSError("the TLS connection of this Python is not laid out as expected")
    library = _library()
    library.SSL_ctrl(pointer, _CTRL_CLEAR_MODE, _MODE_AUTO_RETRY, None)
    chain = library.SSL_get_peer_cert_chain(pointer)
    while chain and library.OPENSSL_sk_num(chain) > 0:
        library.X509_free(library.OPENSSL_sk_pop(chain))
    if len(tls.getpeercert(True) or b"") > _MAX_CERTIFICATE:
        raise OSError(f"the client certificate is larger than {_MAX_CERTIFICATE} bytes")


def ask_for_any_certificate(context: ssl.SSLContext) -> None:
    """Accept any client certificate in the handshake; the application decides, not a CA.

    OpenSSL's own X509_STORE_CTX_set_default has the signature of a verify callback and returns 1
    for the name "default", so no Python runs in a handshake. OSError where this is impossible.
    """
    library = _library()
    context.verify_mode = ssl.CERT_OPTIONAL
    pointer = _context_pointer(context)
    callback = ctypes.cast(library.X509_STORE_CTX_set_default, ctypes.c_void_p)
    library.SSL_CTX_set_cert_verify_callback(pointer, callback, ctypes.addressof(_DEFAULT))


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes | None:
    """Perform a handshake in memory; return the certificate that the server received."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server, server_side=False),
            server.wrap_bio(to_server, to_client, server_side=True)]
    waiting = list(ends)
    for _ in range(16):                         # TLS 1.3 takes three rounds, 1.2 four
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
        if not waiting:
            after_handshake(ends[1])
            return ends[1].getpeercert(True)
    raise OSError("the handshake does not complete")


def _test_client() -> ssl.SSLContext:
    """A client's context that accepts any server, for `_handshake`."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    return client


def handshake_hook(context: ssl.SSLContext, by_ca: bool
                   ) -> Callable[[ssl.SSLSocket], None] | None:
    """`after_handshake`, or None where this Python does not support it: a CA does not need it."""
    try:
        if by_ca:
            _handshake(context, _test_client())
    except OSError:
        return None
    return after_handshake


def check_any_certificate(context: ssl.SSLContext, cert_file: str, key_file: str) -> None:
    """Test `ask_for_any_certificate` with handshakes in memory, before the first real one.

    The server's certificate serves as the client's. OSError if it is not received, not requested,
    or if a client without certificate is rejected.
    """
    for shown in (server_certificate(Path(cert_file)).der, None):
        client = _test_client()
        if shown is not None:
            client.load_cert_chain(cert_file, key_file)
        try:
            seen = _handshake(context, client)
        except ssl.SSLError as error:
            raise OSError(f"cannot request client certificates with {ssl.OPENSSL_VERSION} on "
                          f"Python {sys.version.split()[0]}: {error}") from None
        if seen != shown:
            raise OSError(f"no client certificates arrive with {ssl.OPENSSL_VERSION} on Python "
                          f"{sys.version.split()[0]}: use client_auth \"ca\"")


def server_context(certificate_file: str, key_file: str,
                   client_ca: str | None = None) -> ssl.SSLContext:
    """The TLS policy: 1.2 or later, forward secrecy, no session resumption.

    A resumed session would restore a certificate verified long ago, and adds as much to a full
    handshake with client certificates as it saves. With `client_ca`, client certificates must chain
    to it; a client without one completes the handshake and remains anonymous.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= (ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_TICKET
                        | ssl.OP_NO_RENEGOTIATION | getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0))
    # 128 bits first: handshakes take a tenth less, and both are secure
    context.set_ciphers("ECDHE+AES128+AESGCM:ECDHE+AESGCM:ECDHE+CHACHA20")
    context.num_tickets = 0
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(certificate_file, key_file, password="")    # never ask the terminal
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_OPTIONAL
    try:
        library, pointer = _library(), _context_pointer(context)
    except OSError:                             # not needed with a CA
        return context
    library.SSL_CTX_ctrl(pointer, _CTRL_SESSION_CACHE, 0, None)
    library.SSL_CTX_ctrl(pointer, _CTRL_MAX_CERT_LIST, _MAX_CERTIFICATE_LIST, None)
    library.SSL_CTX_set_ciphersuites(
        pointer, b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256")
    return context

# --- TLS connections ------------------------------------------------------------------------------

def network_of(address: str) -> str:
    """The part of an IP address that one machine cannot choose."""
    return socket.inet_pton(socket.AF_INET6, address.partition("%")[0])[:8].hex() \
        if ":" in address else address


@dataclass(frozen=True)
class TlsLimits(Limits):
    """Limits of the server, with those of connections over TLS."""
    handshake_seconds: float = 10.0
    handshakes: int = 2             # threads for handshakes
    stranger_seconds: float = 10.0  # idle, and not let in by the application
    share: float = 0.25             # of all connections, for strangers from one address, and
                                    # when there are no more, for each authorized group


ByHost = Callable[[Request], Optional[tuple[Route, tuple[str, ...]]]]


class HostRouter(Router):
    """Finds the route of a request by its host name, or else by its path."""

    def __init__(self, routes: Sequence[Route], by_host: ByHost) -> None:
        super().__init__(routes)
        self._by_host = by_host         # a pure function of the request's bytes

    def find(self, request: Request) -> tuple[Route, tuple[str, ...]]:
        """Route and captured segments; raises Refused. Pure."""
        return self._by_host(request) or super().find(request)


class TlsListener(Listener):
    """A listening socket whose clients speak TLS."""

    def __init__(self, server: Server, listening: socket.socket, router: Router,
                 tls: ssl.SSLContext, on_handshake: Callable[[ssl.SSLSocket], None] | None
                 ) -> None:
        super().__init__(server, listening, router, "main")
        self.tls = tls                  # of new connections
        self.on_handshake = on_handshake

    def use(self, tls: ssl.SSLContext) -> None:
        """Take another context for new connections. If a CA is no longer trusted, the others end
        after the answer in progress: it may be the one that verified them in the handshake."""
        before, self.tls = self.tls, tls
        if not set(before.get_ca_certs(True)) <= set(tls.get_ca_certs(True)):
            for connection in list(self.server.connections):
                if isinstance(connection, TlsConnection) and connection.is_of(self):
                    connection.retire()


class TlsConnection(Connection):
    """A connection of a TlsServer, over TLS if its listener is. All its methods but `shake` run in
    the loop. The handshake is parked between its steps, each of which a worker takes."""
    __slots__ = ("group", "_tls", "_retired")
    server: TlsServer

    def setup(self) -> None:
        """Make the socket non-blocking, and a TLS one where the listener has TLS."""
        super().setup()
        self.group = ""                 # as the peer's, when the last answer was sent
        self._retired = False           # its handshake no longer counts
        listener = self.server.accepting
        self._tls = listener if isinstance(listener, TlsListener) else None
        if self._tls is not None:
            self.connection = self._tls.tls.wrap_socket(self.connection, server_side=True,
                                                        do_handshake_on_connect=False)

    def handle(self) -> None:
        """Begin, with the handshake if there is TLS."""
        if self._tls is None:
            super().handle()
            return
        self.server.joined(self)
        self.server.regroup(self)
        self._enter(HANDSHAKE)
        self.server.shake(self)

    def ready(self, mask: int) -> None:
        """Called by the loop: the socket can be read or written."""
        if self.state == HANDSHAKE:
            self._wait_for(0)
            self.server.shake(self)
        else:
            super().ready(mask)

    def shake(self) -> None:
        """In a worker: one step of the handshake, which never blocks."""
        wanted: int | Exception = 0
        try:
            self.connection.do_handshake()
        except ssl.SSLWantReadError:
            wanted = selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            wanted = selectors.EVENT_WRITE
        except (OSError, ValueError) as error:
            wanted = error
        self.server.loop.call_soon(self._shaken, wanted)

    def _shaken(self, wanted: int | Exception) -> None:
        if self._retired:
            self.close()
        elif isinstance(wanted, Exception):
            self.server.shook("failed")
            log.debug("TLS handshake with %s failed: %r", self.peer.address, str(wanted)[:200])
            if getattr(wanted, "reason", "") == "HTTP_REQUEST":
                self._say_tls()
            self.close()
        elif wanted:
            self._wait_for(wanted)
        else:
            try:
                if self._tls is not None and self._tls.on_handshake is not None:
                    self._tls.on_handshake(self.connection)
                self.peer.certificate = self.connection.getpeercert(True)
            except OSError as error:
                self._shaken(error)
                return
            self.server.shook("done")
            self.state = IDLE
            self.since = self.server.now()
            self._wait_for(selectors.EVENT_READ)
            self.ready(selectors.EVENT_READ)        # the request often comes with the last step

    def _say_tls(self) -> None:
        """Answer plain HTTP on a TLS port."""
        plain = socket.socket(fileno=self.connection.detach())
        try:
            plain.send(wire(text(400, "this port speaks TLS: use https://"), close=True))
        except OSError:
            pass                            # not deliverable, as with any other server
        plain.close()

    def _deliver(self, answer: Answer) -> None:
        if self.group != self.peer.group and self._head is not None:    # None: it is closed
            self.server.regroup(self)
        super()._deliver(answer)
        if self._retired:
            self.retire()

    def is_of(self, listener: TlsListener) -> bool:
        """Whether this listener has accepted it."""
        return self._tls is listener

    def retire(self) -> None:
        """Close it, after the answer in progress if there is one."""
        self._retired, self._keep = True, False
        self.leave()

    @property
    def is_stranger(self) -> bool:
        """Whether the application has not let its peer in. Without TLS nobody is a stranger."""
        return not self.group and self._tls is not None

    @property
    def limit(self) -> str:
        """The limit of the present state, by its name in TlsLimits; "": none."""
        if self.state == HANDSHAKE:
            return "handshake_seconds"
        return "stranger_seconds" if self.state == IDLE and self.is_stranger else super().limit

    @property
    def is_working(self) -> bool:
        """Whether a handler or a handshake step is in progress. Closing the descriptor under a
        handshake step would let it read from the next connection with that number."""
        return super().is_working or (self.state == HANDSHAKE and not self._events)

    def close(self) -> None:
        """Close it; may be called more than once."""
        if self in self.server.connections:
            self.server.ungroup(self)
            if self._tls is not None and self.state != HANDSHAKE:
                try:
                    self.connection.unwrap()    # sends close_notify, does not wait for theirs
                except (OSError, ValueError):
                    pass                    # the peer is gone, or has not answered
        super().close()


class TlsServer(Server):
    """The kit's server for clients over TLS too, of whom strangers must not displace tenants."""
    limits: TlsLimits

    def __init__(self, program: str, registry: Registry, limits: TlsLimits = TlsLimits(),
                 now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(program, registry, limits, now)
        self.RequestHandlerClass = TlsConnection
        # Connections over TLS, oldest first: those that the application has not let in, by network;
        # the others by group.
        self._strangers: dict[str, dict[TlsConnection, None]] = {}
        self._groups: dict[str, dict[TlsConnection, None]] = {}
        self._shakers = Pool(f"{program}-tls", limits.handshakes, limits.connections)
        self._handshakes: dict[str, int] = {}
        registry.collect(self._tls_families)

    def listen_tls(self, address: tuple[str, int] | socket.socket, router: Router,
                   tls: ssl.SSLContext,
                   on_handshake: Callable[[ssl.SSLSocket], None] | None = None) -> TlsListener:
        """As `listen`, for clients over TLS. `on_handshake` sees each connection after its
        handshake; it may refuse it by OSError."""
        return self.add(TlsListener(self, listening_socket(address), router, tls, on_handshake))

    def server_close(self) -> None:
        """Close all sockets; the threads end after their current job."""
        super().server_close()
        self._shakers.close()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Enforce the limits on strangers from one address and on all connections."""
        if isinstance(self.accepting, TlsListener) and len(self._strangers.get(
                network_of(client_address), ())) >= self._most_of_one():
            self.refused("stranger_share")
            return False
        return super().verify_request(request, client_address)

    def _most_of_one(self) -> float:
        return max(self.most_connections() * self.limits.share, 1)

    def victims(self, count: int) -> Sequence[Connection]:
        """Connections to close where others want their places: the longest inactive of a group that
        has more than its share, the oldest strangers of the network that has most of them, or
        without strangers the longest idle."""
        group = max(self._groups.values(), key=len, default={})
        if len(group) > self._most_of_one():
            return heapq.nsmallest(count, group, key=operator.attrgetter("since"))
        if self._strangers:
            crowd = max(self._strangers.values(), key=len)
            return [connection for connection in crowd if not connection.is_working][:count]
        return super().victims(count)

    def regroup(self, connection: TlsConnection) -> None:
        """It is new, or its peer has been authorized, or is not any more."""
        self.ungroup(connection)
        connection.group = connection.peer.group
        among, name = self._place_of(connection)
        among.setdefault(name, {})[connection] = None

    def ungroup(self, connection: TlsConnection) -> None:
        """It is closed, or changes its group."""
        among, name = self._place_of(connection)
        others = among.get(name)
        if others is not None and others.pop(connection, self) is None and not others:
            del among[name]

    def _place_of(self, connection: TlsConnection
                  ) -> tuple[dict[str, dict[TlsConnection, None]], str]:
        return (self._groups, connection.group) if connection.group else (
            self._strangers, network_of(connection.peer.address))

    def shake(self, connection: TlsConnection) -> None:
        """Take the next step of a handshake in a worker."""
        if not self._shakers.submit(connection.shake):
            self.refused("handshakes")
            connection.close()

    def shook(self, result: str) -> None:
        """Count a handshake."""
        self._handshakes[result] = self._handshakes.get(result, 0) + 1

    def _tls_families(self) -> list[Family]:
        prefix = f"cmon_{self._program}_http"
        return [
            single(f"{prefix}_strangers", GAUGE, "TLS connections whose client is not authorized.",
                   sum(map(len, self._strangers.values()))),
            Family(f"{prefix}_tls_handshakes_total", COUNTER, "TLS handshakes by result.",
                   [Sample((("result", result),), count)
                    for result, count in self._handshakes.items()]),
        ]

# --- identity -------------------------------------------------------------------------------------

KEPT_CERTIFICATES_BYTES = 8 << 20
CLOCK_SKEW_SECONDS = 300.0      # certgen does not backdate, and clocks differ
# Accepted digests, by OpenSSL's names; all others are refused.
STRONG_DIGESTS = frozenset(("sha224", "sha256", "sha384", "sha512", "sha512-224", "sha512-256",
                            "sha3-224", "sha3-256", "sha3-384", "sha3-512"))
RSA_BITS, SHORT_RSA_BITS = 2048, 1024   # least, and least with `allow_rsa1024`
_MD5_BASE64 = re.compile(r"MD5:([A-Za-z0-9+/]{22})(?:==)?")
_MD5_HEX = re.compile(r"(?:MD5:)?([0-9A-Fa-f]{2}(?::?[0-9A-Fa-f]{2}){15})")


def key_id_of(name: str) -> str | None:
    """The MD5 fingerprint that an issuer's name spells, with colons; None for other names."""
    match = _MD5_BASE64.fullmatch(name)
    if match is not None:
        return base64.b64decode(match.group(1) + "==").hex(":")
    match = _MD5_HEX.fullmatch(name)
    return bytes.fromhex(match.group(1).replace(":", "")).hex(":") if match is not None else None


class AuthorizedKey(NamedTuple):
    """A key that authenticates an account, and the part of it that it grants."""
    key: PublicKey
    name: str = ""                              # of the administrator or user; "": the account
    groups: frozenset[str] | None = None     # only containers with one of these; None: all


class Account(NamedTuple):
    """An account: the owner of containers."""
    uuid: str
    login: str
    keys: Mapping[str, AuthorizedKey]                  # by MD5 fingerprint
    operator: bool = False
    approved: bool = True


class Grant(NamedTuple):
    """What a request may do: the account, and the groups it is limited to."""
    account: Account
    groups: frozenset[str] | None
    identity: Identity

    @property
    def sees_nodes(self) -> bool:
        """Operators see compute nodes, unless limited to groups."""
        return self.account.operator and self.groups is None


def deep_size(value: Any) -> int:
    """The size in bytes of a value and everything it references, for caches."""
    size = sys.getsizeof(value)
    if isinstance(value, (tuple, frozenset)):
        return size + sum(map(deep_size, value))
    for name in getattr(type(value), "__slots__", ()):
        size += deep_size(getattr(value, name))
    return size


def entry_size(key: Any, value: Any) -> int:
    """The size of a cache entry in bytes."""
    return deep_size(key) + deep_size(value)


class Certificates:
    """A cache of parsed certificates and verified signatures. A scraper presents one certificate on
    thousands of connections: the cache halves the cost of a new one."""

    def __init__(self) -> None:
        self.cache: Cache[object, Certificate | bool] = Cache(
            "certificates", KEPT_CERTIFICATES_BYTES, entry_size)

    def read(self, der: bytes) -> Certificate:
        """Parse it, or return the cached result; raises CertificateError."""
        known = self.cache.get(der)
        if not isinstance(known, Certificate):
            known = certificate(der)
            self.cache.put(der, known)
        return known

    def signed(self, cert: Certificate, key: PublicKey) -> bool:
        """Whether this key has signed it; cached."""
        known = self.cache.get((cert.der, key))
        if known is None:
            known = signed_by(cert, key)
            self.cache.put((cert.der, key), known)
        return known is True


certificates = Certificates()       # shared by all connections of this process


class Identity:
    """The identity in a connection's certificate, computed once per connection.

    `grant` checks the account, its key and the dates on every request.
    """
    __slots__ = ("login", "key_id", "cert", "dated", "refusal", "header", "granted", "policy")

    def __init__(self, der: bytes | None) -> None:
        self.login = self.key_id = ""
        self.cert: Certificate | None = None
        self.dated = False                      # its dates are enforced
        self.refusal: Refused | None = None
        self.header = b""                       # sent with every answer
        self.granted: Grant | None = None   # the last grant, while its account is the same object
        self.policy: Policy | None = None    # and the policy it was made under
        if der is None:
            self.refusal = refused("no_certificate")
            return
        try:
            self.cert = cert = certificates.read(der)
        except CertificateError as error:
            self.refusal = refused("bad_certificate", why=error)
            return
        self.login = cert.subject
        self.dated = CMON_PURPOSE in cert.purposes
        self.header = (f"X-Cmon-Certificate-Expires: {utc(cert.not_after)}\r\n").encode()
        if self.dated and not cert.self_issued:
            # new style: the issuer's name is the fingerprint of the signing key
            key_id = key_id_of(cert.issuer)
            if key_id is None:
                self.refusal = refused("bad_certificate", why="its issuer is not the MD5 "
                                       "fingerprint of an SSH key")
                return
            self.key_id = key_id
        else:                                   # old style: signed by its own key
            self.key_id = cert.key.md5
        if not self.login:
            self.refusal = refused("bad_certificate", why="its subject has no common name")

    @property
    def wanted(self) -> str:
        """Fingerprints of the key that must be on the account, as ssh-keygen shows them. For a
        new-style certificate only the MD5 fingerprint is known: it is the issuer's name."""
        if self.cert is not None and self.key_id == self.cert.key.md5:
            return f"MD5:{self.key_id} {self.cert.key.sha256}"
        return f"MD5:{self.key_id}, shown by `ssh-keygen -l -E md5 -f KEY.pub`"


def check_key(key: PublicKey, policy: Policy) -> None:
    """Raises Refused for an RSA key that is too short: the verify callback bypasses OpenSSL's
    check."""
    if key.kind == "ssh-rsa" and key.bits < (SHORT_RSA_BITS if policy.allow_rsa1024 else RSA_BITS):
        raise refused("weak_key", bits=key.bits)


def check_strength(cert: Certificate, policy: Policy) -> None:
    """Raises Refused for a digest or a key that is too weak."""
    if not cert.digest and cert.signature.upper() != "ED25519":
        raise refused("bad_certificate", why="its signature algorithm is unknown to OpenSSL"
                      + (f" ({cert.signature})" if cert.signature else ""))
    if cert.digest and cert.digest not in STRONG_DIGESTS and not (
            cert.digest == "sha1" and policy.allow_sha1):
        raise refused("weak_signature", digest=cert.digest.upper())
    check_key(cert.key, policy)


class Policy(NamedTuple):
    """The settings that `grant` applies."""
    by_ca: bool = False
    allow_sha1: bool = False
    allow_rsa1024: bool = False
    require_approved: bool = False


def grant(identity: Identity, account: Account | None, policy: Policy, now: float) -> Grant:
    """Decide what the certificate may do as this account; raises Refused.

    The only access check: called on every request, and again before a delayed answer is sent. While
    the account is the same object, only the dates are checked: accounts are immutable and replaced
    on any change.
    """
    cert = identity.cert
    if cert is None or identity.refusal is not None:
        # with_traceback: a shared exception would accumulate every request's traceback
        raise (identity.refusal or refused("no_certificate")).with_traceback(None)
    if identity.dated or policy.by_ca:
        if now > cert.not_after:
            raise refused("expired", date=utc(cert.not_after))
        if now < cert.not_before - CLOCK_SKEW_SECONDS:
            raise refused("not_yet_valid", date=utc(cert.not_before))
    granted = identity.granted
    if granted is not None and granted.account is account and identity.policy is policy:
        return granted
    identity.granted, identity.policy = None, policy
    check_strength(cert, policy)
    holder: AuthorizedKey | None = None
    if policy.by_ca:
        if account is None:
            raise refused("unknown_account", login=identity.login)
    else:
        # same answer for an unknown account and a missing key, so that logins cannot be probed
        holder = account.keys.get(identity.key_id) if account is not None else None
        if account is None or holder is None or not certificates.signed(cert, holder.key):
            raise refused("unknown_key", login=identity.login, key=identity.wanted)
        check_key(holder.key, policy)
    if policy.require_approved and not account.approved:
        raise refused("not_approved", login=identity.login)
    granted = identity.granted = Grant(account, holder.groups if holder else None, identity)
    return granted


# --- inventory ------------------------------------------------------------------------------------

class State(NamedTuple):
    """How the proxy treats a VM state."""
    listed: bool        # in discovery
    listed_stopped: bool    # in discovery with discover_include_stopped
    page: bool          # its page is requested from the node
    known: bool         # on the fleet page; otherwise treated as absent


class States(dict[str, State]):
    """By name. States unknown to us count as `unknown`: the page is requested, since the node knows
    for certain, and the target stays in discovery."""

    def __missing__(self, _name: str) -> State:
        return self["unknown"]


STATES = States({
    "running": State(True, True, True, True),
    "stopped": State(False, True, False, True),
    "stopping": State(True, True, True, True),      # it has kstats until it is down
    "shutting_down": State(True, True, True, True),
    "down": State(False, True, False, True),
    "halting": State(True, True, True, True),
    "ready": State(False, True, False, True),
    "installed": State(False, True, False, True),
    "configured": State(False, True, False, True),
    "provisioning": State(False, False, False, True),
    "receiving": State(False, False, False, True),  # migrating
    "sending": State(True, True, True, True),
    "incomplete": State(False, False, False, False),
    "failed": State(False, False, False, False),
    "destroyed": State(False, False, False, False),
    "deleted": State(False, False, False, False),
    "unknown": State(True, True, True, True),       # VMAPI's state when the node does not report
})
SHOWN_STATES = ("running", "stopped", "provisioning", "unknown")


class Vm(NamedTuple):
    """A zone in the inventory; immutable."""
    uuid: str
    alias: str
    owner: str
    server: str                     # "" while it has none
    image: str
    brand: str
    state: str
    groups: tuple[str, ...] = ()
    role: str = ""                  # manta_role: one more group, for the owner of manta
    core: bool = False              # has a smartdc_role or manta_role tag
    hidden: bool = False            # a NAT zone: hidden from everybody
    since: int = 0                  # last update, milliseconds since the epoch
    source: str = ""                # the original's names: Bootstrapper or Updater
    number: int = 0                 # 64-bit hash of the UUID, for sharding


def number_of(uuid: str) -> int:
    """A hash that distributes any UUIDs evenly; must never change."""
    return int.from_bytes(hashlib.blake2b(uuid.encode(), digest_size=8).digest(), "big")


COMPARED = Vm._fields.index("since")     # a VM has changed if a member before it has


class Node(NamedTuple):
    """A compute node."""
    uuid: str
    hostname: str
    address: tuple[str, int] | None      # of its agent; None: unknown


MAX_LOGIN = 64                  # characters; ub-common-name of RFC 5280
UUID_EXAMPLE = "7e39c4fe-1b00-4511-9800-4523b6cac865"


def is_login(login: str) -> bool:
    """Whether a login is valid: a certificate must be able to contain it."""
    return 0 < len(login) <= MAX_LOGIN and login.isprintable()


def text_of(value: Any) -> str:
    """A text member; null and other types count as empty. JSON can contain lone surrogates, which
    cannot be encoded in an answer."""
    if not isinstance(value, str):
        return ""
    return reused(value if value.isascii() else value.encode("utf-8", "replace").decode())


def vm_of(record: Any, source: str, since: int) -> Vm | None:
    """A VM from the members of VMAPI or the file; None without a valid uuid or owner.

    Total: any member may be null or missing, other types count as missing.
    """
    if not isinstance(record, dict):
        return None
    uuid, owner = text_of(record.get("uuid")).lower(), text_of(record.get("owner_uuid")).lower()
    if not UUID.fullmatch(uuid) or not UUID.fullmatch(owner):
        return None
    tags = record.get("tags")
    if not isinstance(tags, dict):
        tags = {}
    names = text_of(tags.get("triton.cmon.groups")).split(",")
    server = text_of(record.get("server_uuid")).lower()
    return Vm(
        uuid=uuid, alias=text_of(record.get("alias")), owner=reused(owner),
        server=reused(server) if UUID.fullmatch(server) else "",
        image=text_of(record.get("image_uuid")), brand=text_of(record.get("brand")),
        state=text_of(record.get("state")) or "unknown",
        groups=tuple(dict.fromkeys(name.strip() for name in names if name.strip())),
        role=text_of(tags.get("manta_role")),
        core=bool(tags.get("smartdc_role") or tags.get("manta_role")),
        hidden=tags.get("smartdc_role") == "nat", since=since, source=source,
        number=number_of(uuid))


class Inventory:
    """VMs and compute nodes. Owned by the loop; a new `generation` invalidates caches."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.ready = False                      # has been complete once
        self.vms: dict[str, Vm] = {}
        self.nodes: dict[str, Node] = {}
        self.owned: dict[str, dict[str, Vm]] = {}
        self.generations: dict[str, int] = {}   # by owner; missing: 0
        self.epoch = 0                          # of all owners together
        self.node_generation = 0
        self.confirmed = now()                  # when the source last confirmed it
        self.confirmed_at = time.time()
        self.max_age = float("inf")             # older inventories serve no pages
        self.manta_owner = ""                   # the account whose zones' Manta roles are groups
        self.changed: list[Callable[[Vm | None, Vm | None], None]] = []

    def target(self, uuid: str) -> Vm | Node | None:
        """The VM or node with this UUID."""
        return self.vms.get(uuid) or self.nodes.get(uuid)

    def generation(self, owner: str) -> tuple[int, int]:
        """A version that changes with every change of the owner's VMs."""
        return self.epoch, self.generations.get(owner, 0)

    def put(self, vm: Vm) -> bool:
        """Add or replace a VM; False if nothing changed."""
        before = self.vms.get(vm.uuid)
        if not STATES[vm.state].known:
            return self.drop(vm.uuid)
        if before is not None and before[:COMPARED] == vm[:COMPARED]:
            return False
        self.vms[vm.uuid] = vm
        if before is not None and before.owner != vm.owner:
            self._disown(before)
        self.owned.setdefault(vm.owner, {})[vm.uuid] = vm
        self._bump(vm.owner)
        for notify in self.changed:
            notify(before, vm)
        return True

    def drop(self, uuid: str) -> bool:
        """Remove a VM; False if it was absent."""
        before = self.vms.pop(uuid, None)
        if before is None:
            return False
        self._disown(before)
        for notify in self.changed:
            notify(before, None)
        return True

    def _disown(self, vm: Vm) -> None:
        owned = self.owned.get(vm.owner)
        if owned is not None:
            owned.pop(vm.uuid, None)
            if not owned:
                del self.owned[vm.owner]
        self._bump(vm.owner)

    def _bump(self, owner: str) -> None:
        self.generations[owner] = self.generations.get(owner, 0) + 1
        if len(self.generations) > 10_000:      # owners come and go
            self.generations.clear()
            self.epoch += 1

    def replace(self, vms: dict[str, Vm], owned: dict[str, dict[str, Vm]]) -> None:
        """Replace all VMs by a list prepared in another thread."""
        self.vms, self.owned = vms, owned
        self.generations.clear()
        self.epoch += 1

    def merge(self, vms: Mapping[str, Vm]) -> None:
        """Replace all VMs; unchanged ones keep their dates."""
        for vm in vms.values():
            self.put(vm)
        for uuid in self.vms.keys() - vms.keys():
            self.drop(uuid)

    def replace_nodes(self, nodes: dict[str, Node]) -> None:
        """Replace all compute nodes."""
        if nodes != self.nodes:
            self.nodes = nodes
            self.node_generation += 1

    @property
    def refusal(self) -> Refused | None:
        """The refusal while ownership is unknown or out of date, if it is."""
        if not self.ready:
            return refused("inventory_not_ready")
        if self._now() - self.confirmed > self.max_age:
            return refused("inventory_too_old", since=utc(self.confirmed_at))
        return None

    def confirm(self, age: float = 0.0) -> None:
        """The source confirmed the inventory `age` seconds ago."""
        self.confirmed, self.confirmed_at = self._now() - age, time.time() - age


def by_owner(vms: Iterable[Vm]) -> tuple[dict[str, Vm], dict[str, dict[str, Vm]]]:
    """The two indexes of an inventory, without VMs in a hidden state."""
    known = {vm.uuid: vm for vm in vms if STATES[vm.state].known}
    owned: dict[str, dict[str, Vm]] = {}
    for vm in known.values():
        owned.setdefault(vm.owner, {})[vm.uuid] = vm
    return known, owned


def groups_of(vm: Vm, manta_owner: str) -> tuple[str, ...]:
    """A VM's groups, including the role of Manta's zones."""
    if vm.role and vm.owner == manta_owner and vm.role not in vm.groups:
        return vm.groups + (vm.role,)
    return vm.groups


def may_see(granted: Grant, target: Vm | Node | None, manta_owner: str = "") -> bool:
    """The authorization rule: owners see their containers, operators the compute nodes.

    A user limited to groups sees only the containers in them, and no nodes.
    """
    if isinstance(target, Vm):
        return (target.owner == granted.account.uuid and not target.hidden and (
            granted.groups is None
            or not granted.groups.isdisjoint(groups_of(target, manta_owner))))
    return target is not None and granted.sees_nodes


class Directory:
    """Accounts by login, all in memory."""

    def __init__(self) -> None:
        self.by_login: Mapping[str, Account] = {}
        self._ready = False

    def find(self, login: str, _address: str = "") -> Account | None:
        """The account, or None for an unknown login. Raises Refused (503) until the first inventory
        is loaded: until then no login is unknown."""
        if not self._ready:
            raise refused("inventory_not_ready")
        return self.by_login.get(login)

    def recheck(self, _login: str, _address: str) -> None:
        """Look up an account again after a certificate was refused: never needed here."""

    def recall(self, login: str, default: Account) -> Account | None:
        """The account as last read, without waiting; `default` if it has not been read."""
        return self.by_login.get(login) if self._ready else default

    def replace(self, accounts: Mapping[str, Account]) -> None:
        """Replace all accounts."""
        self.by_login, self._ready = accounts, True


def merged(known: Mapping[str, Account], accounts: Mapping[str, Account]) -> dict[str, Account]:
    """The new accounts; an unchanged account keeps its object (see `grant`)."""
    return {login: known[login] if known.get(login) == account else account
            for login, account in accounts.items()}


class FileContent(NamedTuple):
    """The contents of an inventory file."""
    accounts: dict[str, Account]
    vms: dict[str, Vm]
    owned: dict[str, dict[str, Vm]]
    nodes: dict[str, Node]
    warnings: tuple[str, ...]       # probable mistakes

    def __str__(self) -> str:
        keys = sum(len(account.keys) for account in self.accounts.values())
        return ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for count, name in (
            (len(self.accounts), "account"), (keys, "key"), (len(self.nodes), "server"),
            (len(self.vms), "VM")))


REPORTED = 20                       # problems, and warnings, listed individually
# known members; others are allowed, since other tools may add them
_MEMBERS = {
    "file": ("accounts", "servers", "vms"),
    "accounts": ("uuid", "login", "keys", "operator", "approved_for_provisioning",
                 "administrators", "users"),
    "administrators": ("login", "keys"), "users": ("login", "keys", "groups"),
    "servers": ("uuid", "hostname", "admin_ip"),
    "vms": ("uuid", "alias", "owner_uuid", "server_uuid", "image_uuid", "brand", "state", "tags"),
    "tags": ("triton.cmon.groups", "smartdc_role", "manta_role"),
}


def _shown(value: Any) -> str:
    """A value for a message."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    text = repr(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 60 else text[:59] + "…"


class _FileReader:
    """Turns an inventory file into indexes; collects problems and probable mistakes.

    Total: any JSON results in an inventory, or in a ConfigError with a line for each problem.
    """

    def __init__(self, path: Path, agent_port: int) -> None:
        self.path, self.port = path, agent_port
        self.problems: list[str] = []
        self.warnings: dict[tuple[str, ...], list[Any]] = {}    # by cause: place, text, count

    def wrong(self, where: str, what: str) -> None:
        self.problems.append(f"{self.path}: {where}: {what}")

    def warn(self, cause: tuple[str, ...], where: str, what: str) -> None:
        self.warnings.setdefault(cause, [where, what, 0])[2] += 1

    def read(self) -> FileContent:
        content = read_json(self.path)
        if not isinstance(content, dict):
            raise ConfigError(f"{self.path}: must be an object with accounts, servers and vms")
        self._near_misses("file", content, "file")
        accounts: dict[str, Account] = {}
        for where, record in self._records(content, "accounts", "accounts"):
            account = self._account(record, where)
            self._put(accounts, account.login, account, where, f"login {_shown(account.login)}")
        nodes: dict[str, Node] = {}
        for where, record in self._records(content, "servers", "servers"):
            node = self._node(record, where)
            self._put(nodes, node.uuid, node, where, f"uuid {node.uuid}")
        owners = {account.uuid for account in accounts.values()}
        if len(owners) < len(accounts):
            self.warn(("owners",), "accounts", "two accounts share a uuid, so both own its VMs")
        vms: dict[str, Vm] = {}
        since = milliseconds()
        for where, record in self._records(content, "vms", "vms"):
            vm = self._vm(record, where, since, owners, nodes)
            if vm is not None:
                self._put(vms, vm.uuid, vm, where, f"uuid {vm.uuid}")
        if len(self.problems) > REPORTED:
            more = len(self.problems) - REPORTED + 1
            self.problems[REPORTED - 1:] = [f"{self.path}: and {more} more problems"]
        if self.problems:
            raise ConfigError(*self.problems)
        warnings = [f"{self.path}: {where}: {what}" + (
            f" (and {count - 1} more)" if count > 1 else "")
            for where, what, count in self.warnings.values()]
        return FileContent(accounts, *by_owner(vms.values()), nodes, tuple(warnings))

    def _put(self, into: dict[str, T], key: str, value: T, where: str, what: str) -> None:
        if key in into:
            self.wrong(where, f"{what} is used twice")
        into[key] = value

    def _records(self, record: dict[str, Any], name: str, where: str, required: bool = True
                 ) -> Iterator[tuple[str, dict[str, Any]]]:
        """The objects of a list, each with its location."""
        values = record.get(name)
        if values is None and not required:
            return
        if not isinstance(values, list):
            self.wrong(where, f"must be a list, not {_shown(values)}" if name in record else
                       f"missing: the file needs a list of {name}")
            return
        for index, value in enumerate(values):
            if isinstance(value, dict):
                self._near_misses(name, value, f"{where}[{index}]")
                yield f"{where}[{index}]", value
            else:
                self.wrong(f"{where}[{index}]", f"must be an object, not {_shown(value)}")

    def _near_misses(self, kind: str, record: dict[str, Any], where: str) -> None:
        """Warn of an unknown member that resembles a missing one."""
        known = _MEMBERS[kind]
        for name in record.keys() - set(known):
            cause = ("member", kind, name)
            if cause in self.warnings or len(self.warnings) < 1000:
                near = difflib.get_close_matches(name[:40], known, 1, 0.75)
                if near and near[0] not in record:
                    self.warn(cause, where, f"unknown member {_shown(name)}: did you mean "
                              f"{near[0]!r}?")

    def _text(self, record: dict[str, Any], name: str, where: str) -> str:
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            self.warn(("text", name), where,
                      f"{name} must be a string, not {_shown(value)}: ignored")
        return text_of(value)

    def _uuid(self, record: dict[str, Any], name: str, where: str) -> str:
        value = record.get(name)
        text = value.lower() if isinstance(value, str) else ""
        if name not in record:
            self.wrong(where, f"needs {name}")
        elif not UUID.fullmatch(text):
            self.wrong(where, f"{name} must be a UUID such as {UUID_EXAMPLE}, not {_shown(value)}"
                       + (f" with {len(text)} characters instead of 36"
                          if text and len(text) != 36 else ""))
        return reused(text) if UUID.fullmatch(text) else where

    def _account(self, record: dict[str, Any], where: str) -> Account:
        uuid, login = self._uuid(record, "uuid", where), text_of(record.get("login"))
        if not login:
            self.wrong(where, "needs a login")
            login = where
        elif not is_login(login):
            self.warn(("login", login), where, "no certificate can contain the login "
                      f"{_shown(login)}: it must have 1 to {MAX_LOGIN} printable characters")
        keys: dict[str, AuthorizedKey] = {}
        for kind in ("administrators", "users"):
            for at, member in self._records(record, kind, f"{where}.{kind}", required=False):
                # only users can be limited: an administrator acts as the account
                groups = member.get("groups") if kind == "users" else None
                limited: frozenset[str] | None = frozenset() if kind == "users" else None
                if isinstance(groups, list) and all(isinstance(group, str) for group in groups):
                    limited = frozenset(map(text_of, groups))
                elif groups is not None:
                    self.wrong(f"{at}.groups", "must be a list of strings")
                self._keys(member, at, self._text(member, "login", at), limited, keys)
        self._keys(record, where, "", None, keys)      # last: the account's own key wins
        if not keys:
            self.warn(("keys", where), where, f"account {_shown(login)} has no keys: nobody can "
                      "authenticate as it")
        for member_name in ("operator", "approved_for_provisioning"):
            if not isinstance(record.get(member_name, False), bool):
                self.wrong(f"{where}.{member_name}", "must be true or false")
        return Account(uuid, login, keys, record.get("operator") is True,
                       record.get("approved_for_provisioning") is True)

    def _keys(self, record: dict[str, Any], where: str, name: str,
              groups: frozenset[str] | None, into: dict[str, AuthorizedKey]) -> None:
        texts = record.get("keys")
        if texts is not None and not isinstance(texts, list):
            self.wrong(f"{where}.keys", "must be a list of public keys, such as "
                       f"[\"ssh-ed25519 AAAA…\"], not {_shown(texts)}")
            return
        for index, key_text in enumerate(texts or ()):
            try:
                key = public_key(key_text if isinstance(key_text, str) else "")
                into[key.md5] = AuthorizedKey(key, name, groups)
                if key.kind == "ssh-rsa" and key.bits < RSA_BITS:
                    self.warn(("weak", where), f"{where}.keys[{index}]", f"an RSA key of "
                              f"{key.bits} bits is too short: the minimum is {RSA_BITS}")
            except CertificateError as error:
                self.wrong(f"{where}.keys[{index}]", str(error))

    def _node(self, record: dict[str, Any], where: str) -> Node:
        uuid, shown = self._uuid(record, "uuid", where), record.get("admin_ip")
        address: tuple[str, int] | None = None
        try:
            if shown is not None:       # "fd00::5" is an address without brackets, too
                address = (shown, self.port) if is_ip(shown) else parse_address(
                    shown if isinstance(shown, str) else "", self.port)
        except ConfigError:
            pass
        if shown is not None and (address is None or not is_ip(address[0])):
            self.wrong(where, "admin_ip must be an IP address, with or without a port, not "
                       + _shown(shown))
        return Node(uuid, self._text(record, "hostname", where), address)

    def _vm(self, record: dict[str, Any], where: str, since: int, owners: AbstractSet[str],
            nodes: Mapping[str, Node]) -> Vm | None:
        for name in ("uuid", "owner_uuid"):
            self._uuid(record, name, where)
        for name in ("alias", "image_uuid", "brand", "state", "server_uuid"):
            self._text(record, name, where)
        tags = record.get("tags")
        if isinstance(tags, dict):
            self._near_misses("tags", tags, f"{where}.tags")
            self._text(tags, "triton.cmon.groups", f"{where}.tags")
        elif tags is not None:
            self.warn(("tags",), where, f"tags must be an object, not {_shown(tags)}: ignored")
        vm = vm_of(record, "Bootstrapper", since)
        if vm is None:
            return None
        if vm.owner not in owners:
            self.warn(("owner", vm.owner), where, f"owner_uuid {vm.owner} is not an account in "
                      "this file: nobody can see this VM")
        server = record.get("server_uuid")
        if vm.server not in nodes if vm.server else server:
            self.warn(("server", _shown(server)), where, f"server_uuid {_shown(server)} is not "
                      "a server in this file: this VM has no page")
        if vm.state not in STATES:
            self.warn(("state", vm.state), where, f"unknown state {_shown(vm.state)}: treated as "
                      "running")
        return vm


def read_inventory(path: Path, agent_port: int) -> FileContent:
    """Parse an inventory file; raises ConfigError with all problems."""
    return _FileReader(path, agent_port).read()


def tell_warnings(warnings: Sequence[str]) -> list[str]:
    """The warnings, one per line; the last line counts those left out."""
    if len(warnings) <= REPORTED:
        return list(warnings)
    return [*warnings[:REPORTED - 1], f"and {len(warnings) - REPORTED + 1} more warnings"]


def milliseconds() -> int:
    """The time in milliseconds since the epoch."""
    return int(time.time() * 1000)


class FileWatch:
    """Decides when to reread files: the server's certificate and the inventory.

    Files that differ from those last loaded are read at once when they change, otherwise with
    backoff, since a failure may be temporary (out of descriptors, missing permission).
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._backoff = Backoff(1.0, 30.0)
        self._good: object = None           # state of the files in use
        self._tried: object = None          # state of the files last read
        self._not_before = float("-inf")

    @staticmethod
    def state_of(*paths: Path) -> object:
        """The state of files, different after any change; or the error of stat()."""
        try:
            return [(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
                    for stat in map(os.stat, paths)]
        except (OSError, ValueError) as error:
            return str(error)

    def is_current(self, state: object) -> bool:
        """Whether files in this state are in use."""
        return state == self._good

    def is_due(self, state: object) -> bool:
        """Whether to read files in this state now."""
        return state != self._good and (state != self._tried or self._now() >= self._not_before)

    def was_read(self, state: object, good: bool) -> None:
        """Files with this state were read; `good` says whether they can be used."""
        if state != self._tried or good:
            self._backoff.reset()
        self._tried = state
        self._not_before = self._now() + self._backoff.next()
        if good:
            self._good = state


class FileSource:
    """Loads directory and inventory from a file; a bad file is rejected as a whole and logged once.

    The inventory is confirmed only while the loaded file is in place: when the file is moved or
    unreadable, the inventory ages until it is no longer trusted.
    """

    def __init__(self, path: Path, agent_port: int, inventory: Inventory, server: Server) -> None:
        self._path, self._port = path, agent_port
        self._inventory, self._server = inventory, server
        self.accounts = Directory()
        self._watch = FileWatch(server.now)
        # a separate thread: removing a key must not wait for large answers
        self._pool = Pool("inventory", 1, 1)
        self._reading = False
        self.problems: list[str] = []
        self.warnings: tuple[str, ...] = ()
        self._good_at = 0.0                     # last successful reload, since the epoch

    def start(self) -> None:
        """Read the file, then check it every second."""
        self._read(self._watch.state_of(self._path), self.accounts.by_login)
        self._server.loop.every(1.0, self.tick)

    def tick(self) -> None:
        """Check the file; runs in the loop."""
        state = self._watch.state_of(self._path)
        if self._watch.is_current(state):
            self._inventory.confirm()           # the loaded file is valid until it changes
            self._tell([])
        elif not self._reading and self._watch.is_due(state):
            self._reading = self._pool.submit(self._read, state, self.accounts.by_login)

    def _read(self, state: object, known: Mapping[str, Account]) -> None:
        """Runs in the pool: parsing 10,000 VMs takes a tenth of a second."""
        content: FileContent | None = None
        problems: list[str] = []
        try:
            content = read_inventory(self._path, self._port)
            content = content._replace(accounts=merged(known, content.accounts))
        except ConfigError as error:
            problems = error.problems
        except Exception as error:              # otherwise it would never be read again
            log.exception("cannot read %s", self._path)
            problems = [f"{self._path}: cannot be read: {type(error).__name__}; see the log"]
        self._server.loop.run_here(self._apply, state, content, problems)

    def _apply(self, state: object, content: FileContent | None, problems: list[str]) -> None:
        self._reading = False
        self._watch.was_read(state, content is not None)
        self._tell(problems)
        if content is None:
            return
        self._good_at = time.time()
        manta = content.accounts.get("poseidon")
        self._inventory.manta_owner = manta.uuid if manta is not None else ""
        self.accounts.replace(content.accounts)
        self._inventory.replace(content.vms, content.owned)
        self._inventory.replace_nodes(content.nodes)
        self._inventory.confirm()
        if not self._inventory.ready:
            gc.freeze()     # 10,000 VMs hold no cycles: exempt them from garbage collection
        self._inventory.ready = True
        log.info("inventory: %s from %s", content, self._path)
        if content.warnings != self.warnings:
            for warning in tell_warnings(content.warnings):
                log.warning("%s", warning)
        self.warnings = content.warnings

    def _tell(self, problems: list[str]) -> None:
        """Log problems once, and when they are resolved."""
        if problems and problems != self.problems:
            for problem in problems:
                log.error("%s: %s", "keeping the old inventory" if self._inventory.ready else
                          "no inventory until this is corrected", problem)
        elif self.problems and not problems:
            log.info("the inventory file is valid again")
        self.problems = problems

    def families(self) -> list[Family]:
        """Metrics for `admin_listen`."""
        return [
            single("cmon_proxy_inventory_last_reload_successful", GAUGE, "Whether the last attempt "
                   "to read the inventory succeeded (1) or not (0).", int(not self.problems)),
            single("cmon_proxy_inventory_last_reload_success_timestamp_seconds", GAUGE,
                   "Timestamp of the last successful read of the inventory.", self._good_at),
            single("cmon_proxy_inventory_warnings", GAUGE, "Number of probable mistakes in the "
                   "inventory file; --check-config lists them.", len(self.warnings)),
        ]


# --- Triton ---------------------------------------------------------------------------------------

# VMAPI with its changefeed, CNAPI and mahi. One thread follows the changefeed; all other requests
# run in pools. They pass immutable results to the loop, by `Loop.call_soon` alone: no other thread
# touches the inventory, the accounts or the state of readers. Quirks of the services are described
# where they matter.

SERVICE_TIMEOUT = 20.0              # seconds for one request; a page of 1,000 VMs takes several
PAGE_SIZE = 1000                    # VMAPI's and CNAPI's maximum
MAX_RECORDS = 2_000_000             # of one list: more means that the service repeats itself
HEARTBEAT_SECONDS = 27.817          # what the changefeed's publisher expects
POLL_NODES_SECONDS = 300.0
READ_ALL_SECONDS = 900.0           # between full readings, at most; at least four within max_age
READ_ALL_WITHOUT_FEED = 60.0        # … while the changefeed is down
FETCHERS = 16                       # threads reading single VMs: VMAPI takes 10 to 50 ms for each
MAX_FETCHES = 10_000                # pending single reads; beyond that a full reading is cheaper
MAX_MESSAGE = 1 << 20               # bytes of one changefeed message
REFRESH_SECONDS = 2.0               # minimum seconds between notifications of an agent
SNAPSHOT_SECONDS = 30.0
FRESH_ACCOUNT_SECONDS = 30.0        # younger: used as it is
USABLE_ACCOUNT_SECONDS = 60.0       # younger: used, and refreshed in the background
STALE_ACCOUNT_SECONDS = 300.0       # younger: used while mahi is unreachable
WARM_ACCOUNT_SECONDS = 120.0        # accounts are refreshed this long after their last request
WARM_AT_ONCE = 200                  # accounts refreshed every five seconds
ACCOUNT_TIMEOUT = 3.0               # seconds for one request to mahi: a client waits
ACCOUNTS_DOWN_SECONDS = 5.0         # after a failure, use stale accounts without waiting
DOWN_ACCOUNTS = 3                   # failing known accounts before mahi counts as down
LOOKUPS_BURST, LOOKUPS_PER_SECOND = 60.0, 1.0   # lookups of unknown logins, per address
LEAST_LIST = 0.9                    # fraction of the known VMs; a shorter list is read again
VM_FIELDS = "uuid,alias,owner_uuid,server_uuid,image_uuid,brand,state,tags"
FEED_RESOURCES = ("alias", "customer_metadata", "destroyed", "nics", "owner_uuid", "server_uuid",
                  "state", "tags")


class ServiceError(Exception):
    """A Triton service does not answer or answers incorrectly; the text goes to the log."""

    def __init__(self, message: str, down: bool = False, too_large: bool = False) -> None:
        super().__init__(message)
        self.down = down                # no answer or 5xx: not the fault of this request
        self.too_large = too_large


def attempt(work: Callable[..., T], *args: Any) -> tuple[T | None, ServiceError | None]:
    """Run a job and return its result or its error: every job must end with one of them, since the
    loop waits for it."""
    try:
        return work(*args), None
    except ServiceError as error:
        return None, error
    except Exception as error:
        log.exception("%s failed", work.__qualname__)
        return None, ServiceError(f"{type(error).__name__}: {error}")


def in_thread(pool: Pool, loop: Loop, done: Callable[[T | None, ServiceError | None], object],
              work: Callable[..., T], *args: Any) -> bool:
    """Call `work` in a pool's thread, then `done` in the loop with its result or error; False when
    the pool's queue is full."""
    def run(*args: Any) -> None:
        loop.call_soon(done, *attempt(work, *args))
    return pool.submit(run, *args)


class Service:
    """A Triton HTTP service, for threads that may block."""

    def __init__(self, name: str, url: str, max_body: int = 64 << 20) -> None:
        self.name, self.url = name, url.rstrip("/")
        self._client = Client(max_idle=FETCHERS, max_body=max_body)
        self.page_size = PAGE_SIZE
        self.errors = 0

    def get(self, path: str, allowed: Sequence[int] = (200,), timeout: float = SERVICE_TIMEOUT
            ) -> tuple[int, Any]:
        """Status and JSON of an answer; raises ServiceError for unexpected statuses."""
        shown = path.partition("?")[0]
        try:
            answer = self._client.request("GET", self.url + path, {"Accept": "application/json"},
                                          timeout=timeout)
        except TooLarge as error:
            raise self.wrong(f"{shown}: {error}", too_large=True) from None
        except ClientError as error:
            raise self.wrong(str(error), down=True) from None
        if answer.status not in allowed:
            raise self.wrong(f"{shown} returned status {answer.status}", down=answer.status >= 500)
        if answer.status != 200:
            return answer.status, None      # error bodies claim to be JSON, but not all are
        try:
            return 200, json.loads(answer.body)
        except (ValueError, RecursionError):
            raise self.wrong(f"{shown} did not return JSON") from None

    def pages(self, path: str, behind: Callable[[int, str], str], gentle: bool = False
              ) -> Iterator[list[Any]]:
        """The pages of a list up to an empty one, since a short page need not be the last.

        `behind` returns the query for the next page, given the number of records so far and the
        last uuid. Too large a page is requested again at half the size. Gentle: pause after each
        page for as long as it took.
        """
        position, seen = "", set[str]()
        name = path.partition("?")[0]
        while True:
            began = time.monotonic()
            try:
                _, records = self.get(f"{path}&limit={self.page_size}{position}")
            except ServiceError as error:
                if not error.too_large or self.page_size <= 1:
                    raise
                self.page_size //= 2
                log.info("%s: page too large, reading %d records at a time", error, self.page_size)
                continue
            if not isinstance(records, list):
                raise self.wrong(f"{name} did not return a list")
            if not records:
                return
            uuids = [text_of(record.get("uuid")) if isinstance(record, dict) else ""
                     for record in records]
            if not uuids[-1] or uuids[-1] in seen or len(seen) > MAX_RECORDS:
                raise self.wrong(f"{name} repeats or omits uuids")
            seen.update(uuids)
            yield records
            position = behind(len(seen), uuids[-1])
            if gentle:
                time.sleep(min(time.monotonic() - began, 1.0))

    def wrong(self, what: str, down: bool = False, too_large: bool = False) -> ServiceError:
        """Count an error and return it for raising."""
        self.errors += 1
        return ServiceError(f"{self.name}: {what}", down, too_large)


# WebSocket (RFC 6455), client side

_WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
CONTINUED, TEXT_FRAME, BINARY_FRAME, CLOSE_FRAME, PING_FRAME, PONG_FRAME = 0, 1, 2, 8, 9, 10


def frame_of(opcode: int, payload: bytes, mask: bytes) -> bytes:
    """A complete, masked frame: clients must mask."""
    size = len(payload)
    length = bytes((0x80 | size,)) if size < 126 else (
        b"\xfe" + size.to_bytes(2, "big") if size < 65536 else b"\xff" + size.to_bytes(8, "big"))
    masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    return bytes((0x80 | opcode,)) + length + mask + masked


class Frames:
    """Parses a server's frames: (opcode, final, payload). Raises ServiceError."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, received: bytes) -> list[tuple[int, bool, bytes]]:
        """The complete frames so far."""
        self._buffer += received
        frames: list[tuple[int, bool, bytes]] = []
        while True:
            buffer = self._buffer
            if len(buffer) < 2:
                return frames
            if buffer[0] & 0x70 or buffer[1] & 0x80:
                raise ServiceError("changefeed: a frame with extensions or a mask")
            opcode, final, size, start = buffer[0] & 15, bool(buffer[0] & 0x80), buffer[1], 2
            if opcode >= 8 and (size > 125 or not final):
                raise ServiceError("changefeed: an invalid control frame")
            if size >= 126:
                start = 4 if size == 126 else 10
                if len(buffer) < start:
                    return frames
                size = int.from_bytes(buffer[2:start], "big")
            if size > MAX_MESSAGE:
                raise ServiceError(f"changefeed: a frame of {size} bytes")
            if len(buffer) < start + size:
                return frames
            frames.append((opcode, final, buffer[start:start + size]))
            self._buffer = buffer[start + size:]


class WebSocket:
    """A changefeed connection, used by one thread."""

    def __init__(self, url: str, path: str, headers: Mapping[str, str]) -> None:
        scheme, _, rest = url.partition("://")
        host, port = parse_address(rest.rstrip("/"), 443 if scheme == "https" else 80)
        try:
            self._socket = socket.create_connection((host, port), SERVICE_TIMEOUT)
            if scheme == "https":
                self._socket = ssl.create_default_context().wrap_socket(
                    self._socket, server_hostname=host)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise ServiceError(f"changefeed: cannot reach {bracketed(host)}:{port}: "
                               f"{reason_of(error)}") from None
        self._frames = Frames()
        self._messages: list[bytes] = []
        self._parts: list[bytes] = []       # of a message in fragments
        self.answers_pings = False          # has pinged before: silence then means failure
        self.heard = time.monotonic()
        try:
            self._upgrade(f"{host}:{port}", path, headers)
        except OSError as error:
            self._socket.close()
            raise ServiceError(f"changefeed: {reason_of(error)}") from None
        except ServiceError:
            self._socket.close()
            raise

    def _upgrade(self, host: str, path: str, headers: Mapping[str, str]) -> None:
        nonce = base64.b64encode(os.urandom(16))
        lines = {"Host": host, "Upgrade": "websocket", "Connection": "Upgrade",
                 "Sec-WebSocket-Key": nonce.decode(), "Sec-WebSocket-Version": "13", **headers}
        self._socket.sendall(f"GET {path} HTTP/1.1\r\n".encode() + "".join(
            [f"{name}: {value}\r\n" for name, value in lines.items()]).encode() + b"\r\n")
        head = b""
        while b"\r\n\r\n" not in head:
            received = self._socket.recv(4096)
            if not received or len(head) > 65536:
                raise ServiceError("changefeed: no answer to the upgrade request")
            head += received
        head, _, rest = head.partition(b"\r\n\r\n")
        status, *answered = head.split(b"\r\n")
        if not re.match(rb"HTTP/1\.1 101\b", status):
            raise ServiceError(f"changefeed: upgrade rejected with {status[:60]!r}")
        wanted = base64.b64encode(hashlib.sha1(nonce + _WEBSOCKET_GUID).digest())
        if not any(name.strip().lower() == b"sec-websocket-accept" and value.strip() == wanted
                   for name, _, value in (line.partition(b":") for line in answered)):
            raise ServiceError("changefeed: the server does not speak WebSocket")
        self._take(rest)

    def send(self, opcode: int, payload: bytes) -> None:
        """Send one frame."""
        try:
            self._socket.settimeout(SERVICE_TIMEOUT)
            self._socket.sendall(frame_of(opcode, payload, os.urandom(4)))
        except OSError as error:
            raise ServiceError(f"changefeed: {reason_of(error)}") from None

    def _take(self, received: bytes) -> None:
        for opcode, final, payload in self._frames.feed(received):
            if opcode == PING_FRAME:
                self.send(PONG_FRAME, payload)
            elif opcode == PONG_FRAME:
                self.answers_pings = True
            elif opcode == CLOSE_FRAME:
                reason = payload[2:100].decode("utf-8", "replace")
                raise ServiceError(f"changefeed: closed by the server: {reason or 'no reason'}")
            elif opcode in (CONTINUED, TEXT_FRAME, BINARY_FRAME) \
                    and (opcode == CONTINUED) == bool(self._parts):
                self._parts.append(payload)
                if sum(map(len, self._parts)) > MAX_MESSAGE:
                    raise ServiceError("changefeed: a message is too long")
                if final:
                    self._messages.append(b"".join(self._parts))
                    self._parts = []
            else:
                raise ServiceError(f"changefeed: unexpected frame with opcode {opcode}")

    def receive(self, timeout: float) -> list[bytes]:
        """Wait up to `seconds` for messages and return them; maybe none."""
        if not self._messages:
            try:
                self._socket.settimeout(max(timeout, 0.01))
                received = self._socket.recv(65536)
            except socket.timeout:
                return []
            except OSError as error:
                raise ServiceError(f"changefeed: {reason_of(error)}") from None
            if not received:
                raise ServiceError("changefeed: the connection was closed")
            self.heard = time.monotonic()
            self._take(received)
        messages, self._messages = self._messages, []
        return messages

    def close(self) -> None:
        """Close the connection with a close frame."""
        try:
            self.send(CLOSE_FRAME, b"\x03\xe8")
        except ServiceError:
            pass                            # already closed
        self._socket.close()


# parsing the services' records

def nodes_of(records: Iterable[Any], port: int) -> dict[str, Node]:
    """CNAPI's servers: those without uuid are left out, those without address kept."""
    nodes: dict[str, Node] = {}
    for record in records:
        uuid = text_of(record.get("uuid")).lower() if isinstance(record, dict) else ""
        if UUID.fullmatch(uuid):
            address = admin_address(record.get("sysinfo"))
            nodes[reused(uuid)] = Node(reused(uuid), text_of(record.get("hostname")),
                                           (address, port) if address else None)
    return nodes


def account_of(record: Any, members: Any) -> Account | None:
    """mahi's account with the members of its role `administrator`; None if it is not one.

    `keys` may be absent. So may `groups`; then `isOperator` is absent, too. An absent
    `approved_for_provisioning` means not approved: mahi omits what UFDS does not have.
    """
    account = record.get("account") if isinstance(record, dict) else None
    if not isinstance(account, dict):
        return None
    uuid, login = text_of(account.get("uuid")).lower(), text_of(account.get("login"))
    if not UUID.fullmatch(uuid) or not login:
        return None
    keys: dict[str, AuthorizedKey] = {}
    for member in (members.values() if isinstance(members, dict) else ()):
        if isinstance(member, dict):
            _add_keys(member.get("keys"), text_of(member.get("login")), keys)
    _add_keys(account.get("keys"), "", keys)        # last: the account's own key takes precedence
    return Account(uuid, login, keys, account.get("isOperator") is True,
                   account.get("approved_for_provisioning") is True)


def _add_keys(pems: Any, name: str, into: dict[str, AuthorizedKey]) -> None:
    for pem in (pems.values() if isinstance(pems, dict) else ()):
        try:
            key = public_key(pem if isinstance(pem, str) else "")
        except CertificateError as error:           # a bad key does not affect the others
            log.debug("ignoring a key of %r: %s", name, error)
            continue
        into[key.md5] = AuthorizedKey(key, name)


def read_account(service: Service, login: str) -> Account | None:
    """An account with its administrators, from mahi; None if unknown. Blocks.

    Makes two requests for unknown logins as well, so that the time does not reveal which exist.
    """
    name = urllib.parse.quote(login, safe="")
    status, record = service.get(f"/accounts?login={name}", (200, 404), ACCOUNT_TIMEOUT)
    # without such a role mahi returns 200 without `role`
    _, roles = service.get(f"/roles?account={name}&role=administrator", (200, 404), ACCOUNT_TIMEOUT)
    if status == 404:
        return None
    role = roles.get("role") if isinstance(roles, dict) else None
    account = account_of(record, role.get("members") if isinstance(role, dict) else None)
    if account is None or account.login != login:
        raise service.wrong(f"invalid account returned for {login!r}")
    return account


class CachedAccount:
    """The cache entry of an account."""
    __slots__ = ("account", "at", "used", "failed", "waited", "rechecked")

    def __init__(self, account: Account, at: float) -> None:
        self.account, self.at = account, at         # when it was read
        self.used = float("-inf")                   # last request
        self.failed = float("-inf")                 # last failed refresh
        self.waited = float("-inf")                 # last reading that a request waited for
        self.rechecked = float("-inf")              # last lookup for a refused certificate


def _account_bytes(login: str, known: CachedAccount) -> int:
    # at most, for a key: blob, SPKI, their base64 and the objects around them
    return 1000 + 4 * len(login) + sum(
        600 + 2 * len(holder.key.blob) + 2 * len(holder.key.spki)
        for holder in known.account.keys.values())


def _accounts_unreachable(_: object) -> Answer:
    return refused("accounts_unreachable").answer()


class Accounts:
    """Accounts by login, read from mahi on demand and cached briefly.

    Owned by the loop; its pools read. Known accounts take precedence over unknown logins, which
    have a separate queue and a limit per address. Accounts in use are refreshed in the background,
    so that their requests never wait.
    """

    def __init__(self, service: Service, server: Server) -> None:
        self._service, self._loop = service, server.loop
        self.known: Cache[str, CachedAccount] = Cache("accounts", 64 << 20, _account_bytes)
        self.unknown: Cache[str, float] = Cache("unknown_logins", 1 << 20,
                                                lambda login, _: 4 * len(login))
        self._lookups: Cache[str, tuple[float, float]] = Cache("lookup_addresses", 1 << 20,
                                                               lambda address, _: len(address))
        self.caches = (self.known, self.unknown, self._lookups)
        self._reading: dict[str, list[Deferred]] = {}
        self._rechecking: dict[str, list[Deferred]] = {}
        self._pool, self._unknown_pool = Pool("mahi", 4, 1024), Pool("mahi-unknown", 4, 64)
        self._failing: set[str] = set()     # known accounts, since mahi last answered
        self._down_until = float("-inf")
        self._logged_until = float("-inf")
        self.reads = self.refused = 0

    def find(self, login: str, address: str = "") -> Account | Deferred | None:
        """The account; None if there is none; a Deferred while it is read. Raises Refused (503)."""
        if not is_login(login):                 # no need to ask mahi
            return None
        now = self._loop.now()
        known = self.known.get(login)
        if known is not None:
            known.used = now
            age, account = now - known.at, known.account
            if age < USABLE_ACCOUNT_SECONDS:
                if age >= FRESH_ACCOUNT_SECONDS:
                    self._read(login, "")
                return account
            down = max(self._down_until, known.failed + ACCOUNTS_DOWN_SECONDS)
            if now < down and age < STALE_ACCOUNT_SECONDS:
                return account
        else:
            age = now - (self.unknown.get(login) or float("-inf"))
            if age < USABLE_ACCOUNT_SECONDS:
                if age >= FRESH_ACCOUNT_SECONDS:
                    self._read(login, address)
                return None
        later = Deferred(now + 2 * ACCOUNT_TIMEOUT, _accounts_unreachable)
        if not self._read(login, address):
            raise refused("accounts_unreachable")
        self._reading[login].append(later)
        return later

    def recheck(self, login: str, address: str) -> Deferred | None:
        """Look up a known account again after a certificate was refused. Limit, duration and
        failures are those of unknown logins, so that they do not reveal which logins exist. None:
        it was looked up recently."""
        now, known = self._loop.now(), self.known.get(login)
        if known is None or now - known.rechecked < USABLE_ACCOUNT_SECONDS:
            return None
        waiting = self._rechecking.get(login)
        if waiting is None:
            if not self._may_look_up(address) or now - known.failed < ACCOUNT_TIMEOUT:
                raise refused("accounts_unreachable")
            if now - known.waited < ACCOUNT_TIMEOUT:    # this request has waited for it
                known.rechecked = now
                return None
            if not self._unknown_pool.submit(self._read_again, login):
                self.refused += 1
                raise refused("accounts_unreachable")
            waiting = self._rechecking[login] = []
        later = Deferred(now + 2 * ACCOUNT_TIMEOUT, _accounts_unreachable)
        waiting.append(later)
        return later

    def _read_again(self, login: str) -> None:
        """Runs in a pool."""
        self._loop.call_soon(self._was_read_again, login,
                             *attempt(read_account, self._service, login))

    def _was_read_again(self, login: str, account: Account | None, problem: ServiceError | None
                      ) -> None:
        waiting = self._rechecking.pop(login)
        answer: Answer = refused("accounts_unreachable").answer()
        if problem is None:
            self._arrived(login, account, None)
            known = self.known.get(login)
            if known is not None:
                known.rechecked = self._loop.now()
            answer = text(200, "")              # resume: `find` returns the account
        for later in waiting:
            later.finish(answer)

    def recall(self, login: str, default: Account) -> Account | None:
        """The account as last read, without waiting; `default` if it has not been read."""
        known = self.known.get(login)
        if known is not None:
            return known.account
        return None if self.unknown.get(login) is not None else default

    def keep_warm(self) -> None:
        """Every few seconds: refresh accounts in use that are no longer fresh."""
        now = self._loop.now()
        due = [login for login in self.known if self._is_due(login, now)]
        for login in due[:WARM_AT_ONCE]:
            self._read(login, "")

    def _is_due(self, login: str, now: float) -> bool:
        known = self.known.get(login)
        return known is not None and now - known.at >= FRESH_ACCOUNT_SECONDS and \
            now - known.used < WARM_ACCOUNT_SECONDS and now >= self._down_until

    def _read(self, login: str, address: str) -> bool:
        if login in self._reading:
            return True
        is_known = self.known.get(login) is not None
        if not is_known and not self._may_look_up(address):
            return False
        pool = self._pool if is_known else self._unknown_pool
        if not in_thread(pool, self._loop, functools.partial(self._arrived, login),
                         read_account, self._service, login):
            self.refused += 1
            return False
        self._reading[login] = []
        return True

    def _may_look_up(self, address: str) -> bool:
        now, network = self._loop.now(), network_of(address)
        left, at = self._lookups.get(network) or (LOOKUPS_BURST, now)
        left = min(left + (now - at) * LOOKUPS_PER_SECOND, LOOKUPS_BURST)
        if left < 1:
            self.refused += 1
            return False
        self._lookups.put(network, (left - 1, now))
        return True

    def _arrived(self, login: str, account: Account | None, problem: ServiceError | None) -> None:
        waiting = self._reading.pop(login, [])
        now = self._loop.now()
        known = self.known.get(login)
        answer: Answer = text(200, "")          # resume: `find` returns the account
        if problem is not None:
            self._has_failed(login, known, problem, now)
            if known is None or now - known.at >= STALE_ACCOUNT_SECONDS:
                answer = refused("accounts_unreachable").answer()    # never 401: it may exist
        else:
            self.reads += 1
            self._failing.clear()
            self._down_until = float("-inf")
            if account is None:
                self.known.drop(login)
                self.unknown.put(login, now)
            else:
                self._keep(known, account, now, bool(waiting))
        for later in waiting:
            later.finish(answer)

    def _keep(self, known: CachedAccount | None, account: Account, at: float, waited: bool) -> None:
        if known is not None and known.account == account:
            account = known.account         # the same object keeps connections' grants valid
        fresh = CachedAccount(account, at)
        if known is not None:
            fresh.used, fresh.rechecked = known.used, known.rechecked
            fresh.waited = at if waited else known.waited
        else:
            fresh.used = fresh.rechecked = at
        self.unknown.drop(account.login)
        self.known.put(account.login, fresh)

    def _has_failed(self, login: str, known: CachedAccount | None, problem: ServiceError, now: float
                    ) -> None:
        """A failure affects one login; mahi is down when several known accounts fail."""
        if now >= self._logged_until:
            log.warning("cannot read accounts: %s", problem)
        self._logged_until = now + ACCOUNTS_DOWN_SECONDS
        if known is not None:
            known.failed = now
        if known is not None and problem.down:
            self._failing.add(login)
            if len(self._failing) >= min(DOWN_ACCOUNTS, len(self.known)):
                self._down_until = now + ACCOUNTS_DOWN_SECONDS

    def kept(self) -> tuple[tuple[Account, float], ...]:
        """Accounts and their ages, for the snapshot."""
        now = self._loop.now()
        entries = (self.known.get(login) for login in self.known)
        return tuple((known.account, now - known.at) for known in entries
                     if known is not None and now - known.at < STALE_ACCOUNT_SECONDS)

    def restore(self, accounts: Iterable[tuple[Account, float]]) -> None:
        """Restore accounts from a snapshot."""
        now = self._loop.now()
        for account, age in accounts:
            self.known.put(account.login, CachedAccount(account, now - age))


class SnapshotError(Exception):
    """The snapshot cannot be read or written; the text says why and what to do."""


class Saved(NamedTuple):
    """The contents of a snapshot."""
    vms: tuple[Vm, ...]
    nodes: tuple[Node, ...]
    manta_owner: str
    accounts: tuple[tuple[Account, float], ...]     # with their ages
    confirmed_at: float                             # seconds since the epoch


class Snapshot:
    """The last inventory on disk, loaded at start to avoid an outage after a restart.

    Whoever can write it decides who is an operator, so file and folder must belong to this user
    (the folder may belong to root), nobody else may write them, and symlinks are not followed. The
    first line is the SHA-256 of the rest, which detects truncation.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def check_folder(self) -> None:
        """Raises SnapshotError, OSError where no snapshot can be kept."""
        os.close(self._folder())

    def _folder(self) -> int:
        """Open the folder; raises OSError, SnapshotError."""
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._check(os.fstat(folder), self._path.parent, (os.geteuid(), 0))
        except SnapshotError:
            os.close(folder)
            raise
        return folder

    @staticmethod
    def _check(status: os.stat_result, path: Path, owners: tuple[int, ...]) -> None:
        if status.st_uid not in owners:
            raise SnapshotError(f"{path} belongs to uid {status.st_uid}, not to this user "
                                f"({os.geteuid()}): its owner could make anyone an operator")
        if status.st_mode & 0o022:
            raise SnapshotError(f"{path} can be written by others (mode "
                                f"{stat.S_IMODE(status.st_mode):o}): remove that permission")

    def write(self, saved: Saved) -> None:
        """Write atomically; raises OSError, SnapshotError. Blocks."""
        now = time.time()
        body = json.dumps({
            "format": 3, "confirmed_at": saved.confirmed_at, "manta_owner": saved.manta_owner,
            "vms": saved.vms, "nodes": saved.nodes, "accounts": [
                [account.uuid, account.login, account.operator, account.approved, now - age,
                 [[holder.key.line, holder.name] for holder in account.keys.values()]]
                for account, age in saved.accounts]}, separators=(",", ":")).encode()
        fresh, folder = self._path.name + ".new", self._folder()
        try:
            try:
                os.unlink(fresh, dir_fd=folder)     # left by a killed process
            except FileNotFoundError:
                pass
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                                 | os.O_CLOEXEC, 0o600, dir_fd=folder)
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self._path.name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            os.close(folder)

    def read(self) -> Saved:
        """Read and verify; raises SnapshotError, OSError."""
        folder = self._folder()
        try:
            descriptor = os.open(self._path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                                 | os.O_CLOEXEC, dir_fd=folder)
        finally:
            os.close(folder)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise SnapshotError(f"{self._path} is not a regular file")
            self._check(status, self._path, (os.geteuid(),))
            digest, _, body = file.read().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise SnapshotError("its checksum is wrong")
        now = time.time()
        try:
            content = json.loads(body)
            if content["format"] != 3:
                raise SnapshotError("it was written by another version")
            # as in vm_of: 10,000 VMs share a few strings
            vms = tuple([Vm._make(
                tuple(value) if isinstance(value, list) else
                reused(value) if isinstance(value, str) else value for value in row)
                for row in content["vms"]])
            nodes = tuple([Node(uuid, name, (address[0], address[1]) if address else None)
                           for uuid, name, address in content["nodes"]])
            accounts = []
            for uuid, login, operator, approved, at, keys in content["accounts"]:
                holders = [AuthorizedKey(public_key(line), name) for line, name in keys]
                by_md5 = {holder.key.md5: holder for holder in holders}
                accounts.append((Account(uuid, login, by_md5, operator, approved),
                                 max(now - at, 0.0)))
            confirmed_at = float(content["confirmed_at"])
            if confirmed_at > now + 60:
                raise SnapshotError(f"it is from the future ({utc(confirmed_at)}): is the clock "
                                    "right?")
            return Saved(vms, nodes, str(content["manta_owner"]), tuple(accounts), confirmed_at)
        except (KeyError, TypeError, IndexError, ValueError, RecursionError) as error:
            raise SnapshotError(f"it is not a valid snapshot ({error})") from None


class ChangeFeed:
    """Follows VMAPI's changefeed in a separate thread and calls the loop back: `connected` when
    it is registered (earlier changes must be read), `lost` with the reason, and `changed` with a
    VM's uuid."""

    def __init__(self, url: str, server: Server, random: Callable[[], float],
                 connected: Callable[[], object], lost: Callable[[ServiceError | None], object],
                 changed: Callable[[str], object]) -> None:
        self._url, self._server, self._loop = url, server, server.loop
        self._backoff = Backoff(0.5, 60.0, random, 0.5)
        self._connected, self._lost, self._changed = connected, lost, changed

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._follow, name="changefeed", daemon=True).start()

    # in its thread

    def _follow(self) -> None:
        while not self._server.stopping:
            _, problem = attempt(self._follow_once)
            self._loop.call_soon(self._lost, problem)
            time.sleep(self._backoff.next())

    def _follow_once(self) -> None:
        feed = WebSocket(self._url, "/changefeeds", {"accept-version": "~1"})
        try:
            self._register(feed)
            self._loop.call_soon(self._connected)
            heartbeat = time.monotonic() + HEARTBEAT_SECONDS
            while not self._server.stopping:
                for message in feed.receive(min(heartbeat - time.monotonic(), 1.0)):
                    self._take(message)
                if time.monotonic() >= heartbeat:
                    # not when it connects: each connection has all containers read
                    self._backoff.reset()
                    heartbeat = time.monotonic() + HEARTBEAT_SECONDS
                    if feed.answers_pings and time.monotonic() - feed.heard > 3 * HEARTBEAT_SECONDS:
                        raise ServiceError("changefeed: the server has gone silent")
                    feed.send(TEXT_FRAME, b"heartbeat")
                    feed.send(PING_FRAME, b"cmon")
        finally:
            feed.close()

    @staticmethod
    def _register(feed: WebSocket) -> None:
        # a second client with the same instance id would replace this one
        instance = f"cmon-proxy-{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        feed.send(TEXT_FRAME, json.dumps({
            "instance": instance, "service": "cmon-proxy",
            "changeKind": {"resource": "vm", "subResources": list(FEED_RESOURCES)}}).encode())
        end = time.monotonic() + SERVICE_TIMEOUT
        while time.monotonic() < end:
            for message in feed.receive(1.0):
                if member_of(message, "bootstrapRoute") is not None:
                    return
                raise ServiceError(f"changefeed: registration rejected with {message[:80]!r}")
        raise ServiceError("changefeed: no answer to the registration")

    def _take(self, message: bytes) -> None:
        """A change: read the VM, since the feed does not deliver all members."""
        uuid = member_of(message, "changedResourceId")
        if isinstance(uuid, str) and UUID.fullmatch(uuid.lower()):
            self._loop.call_soon(self._changed, uuid.lower())
        else:
            log.warning("changefeed: ignoring an unknown message: %r", message[:200])


def member_of(message: bytes, name: str) -> Any:
    """A member of a JSON object, or None. Total."""
    try:
        content = json.loads(message)
    except (ValueError, RecursionError):
        return None
    return content.get(name) if isinstance(content, dict) else None


class AllVms(NamedTuple):
    """The result of reading all VMs."""
    vms: dict[str, Vm]
    owned: dict[str, dict[str, Vm]]
    manta_owner: str | None             # None: mahi did not answer
    began: float                        # when the reading began, by the loop's clock


class VmReader:
    """Reads VMs: all periodically, single ones when they change. Owned by the loop; pools read.

    Only reading all confirms ownership: the feed is silent while its publisher fails, and with
    several VMAPIs each publishes a part. A single VM read during a full reading is newer than the
    list and takes precedence.
    """

    def __init__(self, vmapi: Service, mahi: Service, inventory: Inventory, loop: Loop,
                 random: Callable[[], float]) -> None:
        self._vmapi, self._mahi, self._inventory = vmapi, mahi, inventory
        self._loop, self._random = loop, random
        most = min(READ_ALL_SECONDS, inventory.max_age / 4)
        self._interval, self._without_feed = most, min(most, READ_ALL_WITHOUT_FEED)
        self._backoff = Backoff(0.5, min(60.0, most), random, 0.5)
        self._lister = Pool("vmapi-list", 1, 1)
        self._fetchers = Pool("vmapi", FETCHERS, MAX_FETCHES)
        self._fetching: dict[str, bool] = {}        # True: has changed again meanwhile
        self._newer: dict[str, Vm | None] = {}      # read singly during a full reading
        self._began = self._complete = 0            # number of full readings
        self._reading = False
        self._due = loop.now() + 5.0                # the feed reports changes earlier
        self._short = 0                             # consecutive lists that were much too short
        self.follows = False                        # the changefeed is connected
        self.bootstraps = self.events = self.fetched = 0
        self.problem = ""

    def start(self) -> None:
        """Start reading."""
        self._loop.every(min(0.25, self._interval / 4), self._tick)

    def feed_begins(self) -> None:
        """The feed is connected; earlier changes must be read."""
        self.follows = True
        self._due = self._loop.now()

    def feed_ends(self, problem: ServiceError | None) -> None:
        """The feed is lost."""
        if problem is not None:
            log.warning("%s; reconnecting", problem)
        self.follows = False
        self._due = min(self._due, self._loop.now() + self._without_feed)

    def _tick(self) -> None:
        if self._reading or self._loop.now() < self._due:
            return
        gentle = self._inventory.ready
        if in_thread(self._lister, self._loop, self._all_arrived, self._list, self._loop.now(),
                     gentle):
            self._reading, self._began = True, self._began + 1
            self._newer = {}

    def _list(self, began: float, gentle: bool) -> AllVms:
        manta: str | None = None
        try:
            account = read_account(self._mahi, "poseidon")
            manta = account.uuid if account is not None else ""
        except ServiceError as error:
            log.debug("cannot look up the owner of Manta: %s", error)
        listed: list[Vm] = []
        since = milliseconds()
        for records in self._vmapi.pages(
                f"/vms?state=active&fields={VM_FIELDS}",
                lambda _, last: "&marker=" + urllib.parse.quote(json.dumps({"uuid": last}),
                                                                safe=""), gentle):
            vms = [vm_of(record, "Bootstrapper", since) for record in records]
            listed += [vm for vm in vms if vm is not None]
        return AllVms(*by_owner(listed), manta, began)

    def _all_arrived(self, listed: AllVms | None, problem: ServiceError | None) -> None:
        self._reading = False
        now, had = self._loop.now(), len(self._inventory.vms)
        if listed is not None and had and not listed.vms:
            problem = self._vmapi.wrong("/vms returned an empty list")
        if listed is None or problem is not None:
            log.warning("keeping the old inventory: %s", problem)
            self.problem, self._due = str(problem), now + self._backoff.next()
            return
        if len(listed.vms) < had * LEAST_LIST - 1 and self._short < 2:
            # a glitch in VMAPI's store must not remove targets from discovery: an empty page ends
            # the list, and the feed has reported what was destroyed
            self._short += 1
            log.warning("vmapi lists %d containers instead of %d: reading again",
                        len(listed.vms), had)
            self._due = now + self._backoff.next()
            return
        self._short, self.problem = 0, ""
        self._backoff.reset()
        interval = self._interval if self.follows else self._without_feed
        self._due = now + interval * (0.8 + 0.4 * self._random())
        self._complete = self._began
        if listed.manta_owner is not None:
            self._inventory.manta_owner = listed.manta_owner
        if self._inventory.ready or self.bootstraps:
            self._inventory.merge(listed.vms)
        else:
            self._inventory.replace(listed.vms, listed.owned)
            gc.freeze()                     # as in FileSource
        for uuid, vm in self._newer.items():
            self._put(uuid, vm)
        self._newer = {}
        self.bootstraps += 1
        self._inventory.confirm(now - listed.began)

    # single VMs

    def changed(self, uuid: str) -> None:
        """Read a VM that has changed. The feed repeats a change for each subresource: one more read
        after the current one is enough."""
        self.events += 1
        if uuid in self._fetching:
            self._fetching[uuid] = True
        elif len(self._fetching) < MAX_FETCHES and in_thread(
                self._fetchers, self._loop, functools.partial(self._arrived, uuid, self._began),
                self._fetch_one, uuid):
            self._fetching[uuid] = False
        else:
            self._due = min(self._due, self._loop.now())

    def _fetch_one(self, uuid: str) -> Vm | None:
        status, record = self._vmapi.get(f"/vms/{uuid}", (200, 404))
        vm = vm_of(record, "Updater", milliseconds()) if status == 200 else None
        return vm if vm is not None and vm.uuid == uuid else None

    def _arrived(self, uuid: str, began: int, vm: Vm | None, problem: ServiceError | None) -> None:
        again = self._fetching.pop(uuid, False)
        if problem is not None:
            log.warning("cannot read container %s, reading all: %s", uuid, problem)
            self._due = min(self._due, self._loop.now() + self._backoff.next())
            return
        self.fetched += 1
        # requested before a full reading that is now complete and newer
        if began >= self._complete:
            self._put(uuid, vm)
        if self._reading and began == self._began:
            self._newer[uuid] = vm
        if again:
            self.events -= 1
            self.changed(uuid)

    def _put(self, uuid: str, vm: Vm | None) -> None:
        if vm is None:
            self._inventory.drop(uuid)
        else:
            self._inventory.put(vm)


class NodeReader:
    """Reads compute nodes from CNAPI periodically. Owned by the loop; a pool reads."""

    def __init__(self, cnapi: Service, inventory: Inventory, loop: Loop, port: int,
                 random: Callable[[], float]) -> None:
        self._cnapi, self._inventory, self._loop, self._port = cnapi, inventory, loop, port
        self._random = random
        self._pool = Pool("cnapi", 1, 1)
        self._backoff, self._soon = (Backoff(0.5, 60.0, random, 0.5) for _ in range(2))
        self._missing: frozenset[str] = frozenset()     # nodes missing in the last list
        self._reading = self._wanted = False
        self._due = loop.now()
        self.complete = False                           # has had a complete list

    def start(self) -> None:
        """Start reading."""
        self._loop.every(0.25, self._tick)

    def want(self) -> None:
        """Read nodes soon: a VM is on an unknown one. With backoff, since CNAPI may never list
        it."""
        if not self._wanted:
            self._wanted = True
            self._due = min(self._due, self._loop.now() + self._soon.next())

    def _tick(self) -> None:
        if not self._reading and self._loop.now() >= self._due:
            if not self._wanted:
                self._soon.reset()
            self._wanted = False
            self._reading = in_thread(self._pool, self._loop, self._arrived, self._list)

    def _list(self) -> dict[str, Node]:
        nodes: dict[str, Node] = {}
        for records in self._cnapi.pages("/servers?setup=true&extras=sysinfo",
                                         lambda count, _: f"&offset={count}"):
            nodes.update(nodes_of(records, self._port))
        return nodes

    def _arrived(self, nodes: Mapping[str, Node] | None, problem: ServiceError | None) -> None:
        self._reading = False
        before = self._inventory.nodes
        if nodes is not None and before and not nodes:
            problem = self._cnapi.wrong("/servers returned an empty list")
        if nodes is None or problem is not None:
            log.warning("keeping the old list of compute nodes: %s", problem)
            self._due = self._loop.now() + self._backoff.next()
            return
        self._backoff.reset()
        self._due = self._loop.now() + POLL_NODES_SECONDS * (0.8 + 0.4 * self._random())
        # paging by offset can skip servers while the list changes: remove those missing twice
        missing = frozenset(before.keys() - nodes.keys())
        kept = {uuid: before[uuid] for uuid in missing - self._missing}
        self._missing = missing
        for node in nodes.values():
            known = before.get(node.uuid)
            if node.address is None and (known is None or known.address is not None):
                log.warning("compute node %s (%s) has no address on the admin network", node.uuid,
                            node.hostname)
        self._inventory.replace_nodes({**kept, **nodes})
        self.complete = True


class AgentNotices:
    """Tells agents that a VM on their node was created, moved or destroyed. Owned by the loop."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._wanted: set[str] = set()
        self._told: dict[str, float] = {}

    def changed(self, servers: AbstractSet[str]) -> None:
        """The VMs of these nodes have changed."""
        self._wanted |= servers

    def tell(self) -> None:
        """Twice a second."""
        now = self._proxy.server.now()
        for uuid in list(self._wanted):
            node = self._proxy.inventory.nodes.get(uuid)
            if node is not None and now - self._told.get(uuid, -60.0) < REFRESH_SECONDS:
                continue
            self._wanted.discard(uuid)
            if node is None:
                continue
            self._told[uuid] = now
            try:
                upstream = self._proxy.upstreams.to(node)
                head = (f"POST /v1/refresh HTTP/1.1\r\nHost: {upstream.host}\r\n"
                        "Content-Length: 0\r\n\r\n").encode()
                upstream.ask(Job(head, now + 5.0))
            except Refused:
                pass                        # the agent notices by itself, later


class TritonSource:
    """Keeps the inventory in sync with VMAPI and CNAPI, and the accounts with mahi. Owned by the
    loop."""

    def __init__(self, settings: Settings, proxy: Proxy, random: Callable[[], float],
                 first: bool = True) -> None:
        urls = settings.inventory
        self._first = first                # the only worker to notify agents and write the snapshot
        assert urls.vmapi is not None and urls.cnapi is not None and urls.mahi is not None
        self._loop, self._inventory = proxy.server.loop, proxy.inventory
        self._services = (Service("vmapi", urls.vmapi), Service("cnapi", urls.cnapi),
                          Service("mahi", urls.mahi, 16 << 20))
        vmapi, cnapi, mahi = self._services
        self.accounts = Accounts(mahi, proxy.server)
        self.nodes = NodeReader(cnapi, proxy.inventory, self._loop, settings.agent.port, random)
        self.vms = VmReader(vmapi, mahi, proxy.inventory, self._loop, random)
        self._feed = ChangeFeed(vmapi.url, proxy.server, random, self.vms.feed_begins,
                                self.vms.feed_ends, self.vms.changed)
        self._notices = AgentNotices(proxy)
        self._snapshot = Snapshot(urls.snapshot) if urls.snapshot is not None else None
        self._writer = Pool("snapshot", 1, 1)
        self._writing = False
        self._saved_at = 0.0                # last write of the snapshot, since the epoch
        self._unsaved = ""                  # the error of the last write

    def start(self) -> None:
        """Load the snapshot, then start reading."""
        self._restore()
        self._inventory.changed.append(self._vm_changed)
        self.vms.start()
        self.nodes.start()
        self._feed.start()
        self._loop.every(0.1, self._tick)
        self._loop.every(5.0, self.accounts.keep_warm)
        if self._first:
            self._loop.every(0.5, self._notices.tell)
            if self._snapshot is not None:
                self._loop.call_later(1.0, self._save)

    def _restore(self) -> None:
        if self._snapshot is None:
            return
        try:
            saved = self._snapshot.read()
        except FileNotFoundError:
            return
        except (OSError, SnapshotError) as error:
            log.warning("ignoring the snapshot: %s", error)
            return
        age = max(time.time() - saved.confirmed_at, 0.0)
        if age > self._inventory.max_age:
            log.warning("ignoring the snapshot: it is %d seconds old", age)
            return
        self._inventory.manta_owner = saved.manta_owner
        self._inventory.replace(*by_owner(saved.vms))
        self._inventory.replace_nodes({node.uuid: node for node in saved.nodes})
        self._inventory.confirm(age)
        self._inventory.ready = True
        self.accounts.restore(saved.accounts)
        log.info("inventory: %d containers from a snapshot %d seconds old", len(saved.vms), age)

    def _tick(self) -> None:
        inventory = self._inventory
        if not inventory.ready and self.nodes.complete and self.vms.bootstraps:
            inventory.ready = True
            log.info("inventory: %d containers on %d compute nodes", len(inventory.vms),
                     len(inventory.nodes))
            if any(vm.server and vm.server not in inventory.nodes for vm in inventory.vms.values()):
                self.nodes.want()

    def _vm_changed(self, before: Vm | None, after: Vm | None) -> None:
        servers = {vm.server for vm in (before, after) if vm is not None and vm.server}
        if before is None or after is None or before.server != after.server \
                or before.owner != after.owner:
            self._notices.changed(servers)
        if after is not None and after.server and after.server not in self._inventory.nodes:
            self.nodes.want()

    # the snapshot

    def _save(self) -> None:
        self._loop.call_later(SNAPSHOT_SECONDS if self._saved_at else 1.0, self._save)
        inventory, snapshot, loop = self._inventory, self._snapshot, self._loop
        if snapshot is None or not inventory.ready or self._writing:
            return
        saved = Saved(tuple(inventory.vms.values()), tuple(inventory.nodes.values()),
                      inventory.manta_owner, self.accounts.kept(), inventory.confirmed_at)

        def write() -> None:
            """In the writer's thread."""
            problem = ""
            try:
                snapshot.write(saved)
            except (OSError, SnapshotError) as error:
                problem = str(error)
            loop.call_soon(self._written, problem)
        self._writing = self._writer.submit(write)

    def _written(self, problem: str) -> None:
        self._writing = False
        if problem and problem != self._unsaved:
            log.error("cannot write the snapshot: %s", problem)
        if not problem:
            self._saved_at = time.time()
        self._unsaved = problem

    def families(self) -> list[Family]:
        """Metrics for `admin_listen`."""
        vms, accounts = self.vms, self.accounts
        return [
            single("cmon_proxy_changefeed_connected", GAUGE, "Whether the changefeed is connected "
                   "(1) or not (0).", int(vms.follows)),
            single("cmon_proxy_changefeed_events_total", COUNTER, "Total number of changes "
                   "received from the changefeed.", vms.events),
            single("cmon_proxy_inventory_bootstraps_total", COUNTER, "Total number of times that "
                   "all containers were read.", vms.bootstraps),
            single("cmon_proxy_inventory_reads_total", COUNTER, "Total number of containers read "
                   "individually after a change.", vms.fetched),
            single("cmon_proxy_inventory_last_reload_successful", GAUGE, "Whether the last attempt "
                   "to read the inventory succeeded (1) or not (0).", int(not vms.problem)),
            single("cmon_proxy_inventory_last_reload_success_timestamp_seconds", GAUGE,
                   "Timestamp of the last successful read of the inventory.",
                   self._inventory.confirmed_at if self._inventory.ready else 0),
            single("cmon_proxy_account_reads_total", COUNTER, "Total number of accounts read from "
                   "mahi.", accounts.reads),
            single("cmon_proxy_account_lookups_refused_total", COUNTER, "Total number of account "
                   "lookups refused because there were too many.", accounts.refused),
            single("cmon_proxy_snapshot_last_write_timestamp_seconds", GAUGE, "Timestamp of the "
                   "last write of the snapshot; 0 if there was none.", self._saved_at),
            Family("cmon_proxy_service_errors_total", COUNTER, "Total number of failed requests "
                   "to Triton's services.", [Sample((("service", service.name),), service.errors)
                                             for service in self._services]),
        ]


# --- quotas ---------------------------------------------------------------------------------------

ADMITTED, OVER, REFUSED = 0, 1, 2       # below the limit, above it, above the hard limit
KEPT_BUCKETS = 20_000              # beyond that, full buckets are dropped and counts summed


class Cost(NamedTuple):
    """The cost of a request: a base, plus one for every so many containers of the account. At most
    half a burst, so that a full bucket always admits it."""
    base: float
    containers: float = math.inf


# By kind, in relayed requests. A list of a thousand containers takes as much CPU as ten relays; the
# fleet page and the page for people take as much as forty.
COSTS = {"page": Cost(1), "list": Cost(1, 100), "fleet": Cost(1, 25), "people": Cost(1, 25)}


class QuotaLimits(NamedTuple):
    """An account's limits in this process."""
    per_minute: float           # of all replicas together, for display
    rate: float                 # a second
    burst: float
    hard_rate: float
    hard_burst: float
    over: str                   # stale, refuse or allow
    exempt: bool


def quota_limits_of(settings: QuotaSettings, login: str, operator: bool) -> QuotaLimits:
    """An account's limits; each of N replicas admits an N-th, so their sum stays within them."""
    exception = settings.accounts.get(login, AccountQuota())
    limits = {**vars(settings), **{name: value for name, value in vars(exception).items()
                                   if value is not None}}
    per_minute, burst = limits["per_minute"], limits["burst"]
    hard = max(limits["hard_per_minute"], per_minute)
    # the hard burst is larger in proportion: otherwise both would be used up together
    hard_burst = burst * (hard / per_minute if per_minute > 0 else 1.0)
    share = settings.replicas
    return QuotaLimits(per_minute, per_minute / 60 / share, max(burst / share, 1.0),
                       hard / 60 / share, max(hard_burst / share, 1.0),
                       limits["over_quota"],
                       exception.exempt or (operator and settings.exempt_operators))


class QuotaBucket:
    """An account's remaining quota and its usage: for limits, billing and operators."""
    __slots__ = ("login", "operator", "limits", "soft", "hard", "at", "requests", "over", "refused",
                 "stale", "relays", "bytes", "cpu", "spent", "weighed")

    def __init__(self, login: str, operator: bool, limits: QuotaLimits, now: float) -> None:
        self.login, self.operator, self.limits, self.at = login, operator, limits, now
        self.soft, self.hard = limits.burst, limits.hard_burst
        self.requests = self.over = self.refused = self.stale = self.relays = self.bytes = 0
        self.cpu = 0.0
        self.spent = 0.0            # since the last report to other workers
        self.weighed = 0.0          # work already accounted as CPU time

    def take(self, now: float, cost: float = 1.0) -> int:
        """Count one request of this cost: ADMITTED, OVER or REFUSED."""
        limits = self.limits
        elapsed = now - self.at
        self.requests += 1
        if limits.exempt:
            return ADMITTED
        if elapsed > 0:
            self.at = now
            self.soft = min(limits.burst, self.soft + elapsed * limits.rate)
            self.hard = min(limits.hard_burst, self.hard + elapsed * limits.hard_rate)
        if cost > 1:
            cost = max(1.0, min(cost, limits.burst / 2))
        if self.hard < cost:
            self.refused += 1
            return REFUSED
        self.hard -= cost
        self.spent += cost
        if self.soft >= cost:
            self.soft -= cost
            return ADMITTED
        self.over += 1
        return OVER

    def add(self, other: QuotaBucket) -> None:
        """Add another account's usage."""
        for name in ("requests", "over", "refused", "stale", "relays", "bytes", "cpu"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def limit_to(self, limits: QuotaLimits) -> None:
        """Change the limits; used quota stays used."""
        self.limits = limits
        self.soft = min(self.soft, limits.burst)
        self.hard = min(self.hard, limits.hard_burst)

    def debit(self, requests: float) -> None:
        """Count requests that other workers have admitted; debt is limited to one burst."""
        self.soft = max(self.soft - requests, -self.limits.burst)
        self.hard = max(self.hard - requests, -self.limits.hard_burst)

    @property
    def limited(self) -> bool:
        """Whether the next request would be over the limit."""
        return not self.limits.exempt and self.soft < 1

    @property
    def used(self) -> float:
        """The used part of the burst, from 0 to 1."""
        return 1 - max(self.soft, 0) / self.limits.burst

    def wait(self, hard: bool) -> int:
        """Whole seconds until the next request is admitted; a day where the rate is zero."""
        missing, rate = (1 - self.hard, self.limits.hard_rate) if hard else (
            1 - self.soft, self.limits.rate)
        return max(1, min(int(missing / rate) + 1, 86400)) if rate > 0 else 86400

    def refusal(self, hard: bool) -> Refused:
        """The refusal of a request over the limit, or over the hard limit."""
        limit = (self.limits.hard_rate if hard else self.limits.rate) * 60
        return refused("quota", ("Retry-After", str(self.wait(hard))), limit=round(limit, 3))

    def header(self) -> bytes:
        """The remaining quota, as header lines."""
        limits = self.limits
        if limits.exempt:
            return b""
        left = self.soft if self.soft > 0 else 0
        return b"RateLimit-Limit: %d\r\nRateLimit-Remaining: %d\r\nRateLimit-Reset: %d\r\n" % (
            limits.burst, left, (limits.burst - left) / limits.rate if limits.rate > 0 else 86400)

    def weight(self) -> float:
        """The work it has caused so far, in small relays; 50 kB count as one."""
        return self.requests + self.relays + self.bytes / 50_000


class Quotas:
    """All accounts' buckets."""

    def __init__(self, settings: QuotaSettings, now: Callable[[], float]) -> None:
        self._settings, self._now = settings, now
        self._buckets: dict[str, QuotaBucket] = {}
        self._elsewhere: dict[str, tuple[float, float]] = {}    # other workers' accounts: debt, at
        self._forgotten = QuotaBucket("", False, quota_limits_of(settings, "", False), now())
        self._cpu = time.process_time()

    def of(self, account: Account) -> QuotaBucket:
        """The account's bucket; a new one is full."""
        bucket = self._buckets.get(account.uuid)
        if bucket is None:
            if len(self._buckets) >= KEPT_BUCKETS:
                self._forget()
            bucket = self._buckets[account.uuid] = QuotaBucket(
                account.login, account.operator, self._limits(account), self._now())
            debt, at = self._elsewhere.pop(account.uuid, (0.0, 0.0))
            bucket.debit(max(debt - (self._now() - at) * bucket.limits.rate, 0.0))
        elif bucket.operator is not account.operator or bucket.login != account.login:
            bucket.login, bucket.operator = account.login, account.operator
            bucket.limit_to(self._limits(account))
        return bucket

    def _limits(self, account: Account | QuotaBucket) -> QuotaLimits:
        return quota_limits_of(self._settings, account.login, account.operator)

    def reload(self, settings: QuotaSettings) -> None:
        """Change the limits of all accounts."""
        self._settings = settings
        for bucket in self._buckets.values():
            bucket.limit_to(self._limits(bucket))

    def _forget(self) -> None:
        for uuid, bucket in list(self._buckets.items()):
            if self._now() - bucket.at > 600:
                self._forgotten.add(self._buckets.pop(uuid))
        if len(self._buckets) >= KEPT_BUCKETS:      # all in use: start over rather than grow
            self._buckets.clear()

    def book(self) -> None:
        """Divide the CPU time since the last call among accounts, by work."""
        now = time.process_time()
        elapsed, self._cpu = now - self._cpu, now
        shares = [(bucket, bucket.weight() - bucket.weighed) for bucket in self._buckets.values()]
        total = sum(share for _, share in shares)
        if total <= 0:
            self._forgotten.cpu += elapsed      # the loop itself
            return
        for bucket, share in shares:
            if share:
                bucket.weighed += share
                bucket.cpu += elapsed * share / total

    def spent(self) -> dict[str, float]:
        """Requests admitted since the last call, by account, for the other workers."""
        spent = {uuid: bucket.spent for uuid, bucket in self._buckets.items() if bucket.spent}
        for uuid in spent:
            self._buckets[uuid].spent = 0.0
        return spent

    def debit(self, spent: Mapping[str, float]) -> None:
        """Count requests that other workers have admitted, of accounts new to this one too."""
        now = self._now()
        for uuid, requests in spent.items():
            bucket = self._buckets.get(uuid)
            if bucket is not None:
                bucket.debit(requests)
                continue
            if len(self._elsewhere) >= KEPT_BUCKETS:
                self._elsewhere.clear()
            debt, at = self._elsewhere.get(uuid, (0.0, now))
            left = max(debt - (now - at) * self._settings.per_minute / 60, 0.0)
            self._elsewhere[uuid] = (left + requests, now)

    def families(self, most: int = 500) -> list[Family]:
        """Metrics: usage by account, the largest by name, the rest summed."""
        ranked = sorted(self._buckets.values(), key=QuotaBucket.weight, reverse=True)
        rest = copy.copy(self._forgotten)
        for bucket in ranked[most:]:
            rest.add(bucket)
        shown = [*((bucket.login, bucket) for bucket in ranked[:most]), ("", rest)]

        def family(name: str, help_text: str, **members: Labels) -> Family:
            return Family(name, COUNTER, help_text, [
                Sample((("account", login), *labels), getattr(bucket, member))
                for login, bucket in shown for member, labels in members.items()
                if login or getattr(bucket, member)])
        return [
            family("cmon_proxy_account_requests_total", "Total number of requests by account and "
                   "outcome; the empty account stands for all others.",
                   requests=(("result", "asked"),), relays=(("result", "relayed"),),
                   stale=(("result", "stale"),), over=(("result", "over_quota"),),
                   refused=(("result", "refused"),)),
            family("cmon_proxy_account_response_bytes_total", "Total size of the pages sent to an "
                   "account, in bytes.", bytes=()),
            family("cmon_proxy_account_cpu_seconds_total", "Total CPU time of the proxy in "
                   "seconds, by the account that caused it.", cpu=()),
        ]


# --- forwarding -----------------------------------------------------------------------------------

READ_BYTES = 65536              # most pages arrive in one read
MAX_PAGE = 16 << 20             # bytes of a page as received
WAITING_PER_NODE = 512          # waiting requests; at most half of them for one account
IDLE_CONNECTION_SECONDS = 120.0     # shorter than the 360 s of agents
SWEEP_SECONDS = 0.05
SUSPECT_SECONDS = 2.0           # without a byte of an answer: probe the agent
PROBE_SECONDS = 1.0
KEPT_HEADS_BYTES = 8 << 20      # of agents' answers
LONGEST_KEPT_HEAD = 2048        # bytes; ours have some 200
KEPT_COPIES_BYTES = 64 << 20    # last pages, for accounts that are over their quota
MAX_COPY = 1 << 20              # bytes of an uncompressed copy; larger pages are not kept
KEEP_COPIES_BELOW = 0.9         # fraction of the burst left; accounts above it need no copies
_DATE = b"\r\nDate: "
_DATE_END = len(_DATE) + 29     # RFC 9110 fixes the length of a date
_PARTIAL = re.compile(r"[a-z0-9_]{1,64}(?:, ?[a-z0-9_]{1,64}){0,63}")


class Reply(NamedTuple):
    """An agent's answer. No other header is passed on: a malicious node cannot send headers to a
    tenant."""
    status: int
    body: bytes
    gzip: bool = False
    partial: str = ""               # names of failed collectors
    lines: bytes = b""              # our header lines for it, if cached


def page_lines(packed: bool, partial: str, length: int) -> bytes:
    """The header lines of a page, always as plain text."""
    return (f"Content-Type: {PAGE}\r\nX-Content-Type-Options: nosniff\r\nVary: Accept-Encoding\r\n"
            + ("Content-Encoding: gzip\r\n" if packed else "")
            + (f"X-Cmon-Partial: {partial}\r\n" if partial else "")
            + f"Content-Length: {length}\r\n").encode()


class AgentHead(NamedTuple):
    """The used part of an agent's head."""
    length: int                     # of the body; -1: needs the full parser
    gzip: bool = False
    partial: str = ""
    lines: bytes = b""              # our header lines for such a page


def read_head(reader: AnswerReader) -> AgentHead:
    """The used part of a parsed head; raises ClientError."""
    coding = reader.headers.get("content-encoding", "").lower()
    if coding not in ("", "identity", "gzip", "x-gzip"):
        raise ClientError(f"it sent content coding {coding[:40]!r}, which was not requested")
    partial = reader.headers.get("x-cmon-partial", "")
    partial = partial if _PARTIAL.fullmatch(partial) else ""
    packed = coding in ("gzip", "x-gzip")
    if reader.status != 200 or not reader.keep_alive or "transfer-encoding" in reader.headers:
        return AgentHead(-1, packed, partial)
    length = int(reader.headers["content-length"])      # checked by the reader, as is MAX_PAGE
    return AgentHead(length, packed, partial, page_lines(packed, partial, length))


class Job:
    """One request to an agent; `done` is called once, in the loop."""
    __slots__ = ("wire", "deadline", "done", "owner", "retried", "given_up", "slow")

    def __init__(self, wire: bytes, deadline: float,
                 done: Callable[[Reply | None, Refused | None], None] = lambda reply, refusal: None,
                 owner: str = "") -> None:
        self.wire, self.deadline = wire, deadline
        self.done: Callable[[Reply | None, Refused | None], None] | None = done
        self.owner = owner              # the account it is for; "": the proxy itself
        self.retried = False
        self.given_up = False           # has no waiters left
        self.slow = False               # its node was probed

    def finish(self, reply: Reply | None, refusal: Refused | None) -> None:
        """Report the result once. Dropping `done` avoids a reference cycle."""
        done, self.done = self.done, None
        if done is not None:
            done(reply, refusal)


class UpstreamConnection:
    """One connection to an agent, in the server's selector."""
    __slots__ = ("upstream", "socket", "job", "since", "connecting", "used", "_error", "_pieces",
                 "_missing", "_head", "_reader")

    def __init__(self, upstream: Upstream, job: Job, now: float) -> None:
        self.upstream, self.since = upstream, now
        self.job: Job | None = job
        self.used = False               # has received an answer
        self._pieces: list[bytes] = []
        self._missing = 0
        self._head = AgentHead(-1)
        self._reader: AnswerReader | None = None
        family = socket.AF_INET6 if ":" in upstream.address[0] else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connecting = True
        self._error = begin_connect(self.socket, upstream.address)
        upstream.all.server.loop.watch(self.socket, selectors.EVENT_WRITE, self)

    def ready(self, _mask: int) -> None:
        """Called by the selector."""
        if self.connecting:
            self._connected()
            return
        try:
            data = self.socket.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.upstream.lost(self, reason_of(error))
            return
        if self.job is None:            # idle: the agent closed it, or sent unrequested data
            self.upstream.lost(self, "")
        elif self._missing:
            self._more(data)
        elif self._reader is not None:
            self._read(data)
        elif not data:
            self.upstream.lost(self, "it closed the connection without answering")
        else:
            self._first(data)

    def _connected(self) -> None:
        error = self._error or self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self.upstream.lost(self, os.strerror(error).lower())
            return
        self.connecting = False
        self.upstream.all.server.loop.watch(self.socket, selectors.EVENT_READ, self)
        if self.job is not None:                # without a job it has been closed
            self.send(self.job)

    def send(self, job: Job) -> None:
        """Send a request; it is shorter than any socket's buffer."""
        self.job = job
        self.since = self.upstream.all.now()
        try:
            sent = self.socket.send(job.wire)
        except OSError as error:
            self.upstream.lost(self, reason_of(error))
            return
        if sent != len(job.wire):
            self.upstream.lost(self, "it does not read the request")

    def _first(self, data: bytes) -> None:
        """The first bytes of an answer: usually all of it, with a known head."""
        end = data.find(b"\r\n\r\n") + 4
        if end > 4:
            head = self.upstream.all.known_head(data[:end])
            missing = head.length - (len(data) - end)
            if head.length >= 0 and missing == 0:
                self.upstream.answered(self, Reply(200, data[end:], *head[1:]))
                return
            if head.length >= 0 and missing > 0:
                self._pieces, self._missing, self._head = [data[end:]], missing, head
                return
        self._reader = AnswerReader(max_body=MAX_PAGE)
        self._read(data)

    def _more(self, data: bytes) -> None:
        self._missing -= len(data)
        if not data or self._missing < 0:
            self.upstream.lost(self, "it closed the connection in the middle of an answer")
            return
        self._pieces.append(data)
        if not self._missing:
            body, self._pieces = b"".join(self._pieces), []
            self.upstream.answered(self, Reply(200, body, *self._head[1:]))

    def _read(self, data: bytes) -> None:
        """The general case: chunks, unknown header lines, refusals."""
        reader = self._reader
        assert reader is not None
        try:
            if data:
                done = reader.feed(data)
            else:
                reader.end()
                done = True
            if not done:
                return
            head = read_head(reader)
        except ClientError as error:
            self.upstream.lost(self, str(error))
            return
        self._reader = None
        self.upstream.answered(
            self, Reply(reader.status, reader.body, head.gzip, head.partial), reader.keep_alive)

    def close(self) -> None:
        """Close the connection."""
        self.upstream.all.server.loop.unwatch(self.socket)
        self.socket.close()


class Upstream:
    """One node's agent: its connections, waiting requests and health."""

    def __init__(self, upstreams: Upstreams, uuid: str, address: tuple[str, int]) -> None:
        self.all, self.uuid, self.address = upstreams, uuid, address
        self.host = f"{bracketed(address[0])}:{address[1]}"
        self.idle: list[UpstreamConnection] = []    # most recently used last: used next
        self.busy = 0                           # requests the agent is working on
        self.load: dict[str, int] = {}          # of these, by account
        self.waiting: list[Job] = []
        self.breaker = Breaker(upstreams.now, upstreams.random, 3, first=5.0, longest=60.0)
        self.suspect = False                    # a request has failed since the last answer
        self.failed_at = 0.0                    # wall clock, for messages
        self.probing: UpstreamConnection | None = None
        self.probe_after = 0.0

    def ask(self, job: Job) -> None:
        """Send it now, or when a request in flight ends; raises Refused if the node is known to be
        silent or too many requests are waiting."""
        if self.breaker.open:
            raise self.silent()
        if self._admits(job):
            self._start(job)
            return
        waiting = len(self.waiting)
        if waiting >= WAITING_PER_NODE or (waiting >= WAITING_PER_NODE // 2 and sum(
                other.owner == job.owner for other in self.waiting) >= WAITING_PER_NODE // 2):
            raise refused("node_busy", node=self.uuid)
        self.waiting.append(job)
        self.all.troubled.add(self)

    def _admits(self, job: Job) -> bool:
        """Whether it may be sent now. No single account gets the last quarter of a node's slots, so
        that its slow containers do not block others."""
        most = self.all.settings.max_in_flight
        return self.busy < most and (
            self.load.get(job.owner, 0) < most - most // 4 or not job.owner)

    def _start(self, job: Job) -> None:
        self.busy += 1
        self.load[job.owner] = self.load.get(job.owner, 0) + 1
        if self.idle:
            connection = self.idle.pop()
            self.all.active.add(connection)
            connection.send(job)
        else:
            self._connect(job)

    def _connect(self, job: Job) -> None:
        try:
            self.all.active.add(UpstreamConnection(self, job, self.all.now()))
        except OSError as error:                # out of descriptors: not the node's fault
            self._release(job)
            log.warning("cannot open a connection to %s: %s", self.host, error)
            job.finish(None, refused("too_busy"))

    def silent(self) -> Refused:
        """The refusal for a silent node."""
        return refused("node_silent", node=self.uuid, since=utc(self.failed_at),
                       why=self.breaker.reason)

    # what connections report

    def answered(self, connection: UpstreamConnection, reply: Reply, keep: bool = True) -> None:
        """A complete answer has arrived."""
        job = self._taken_from(connection)
        connection.used = True
        if connection is self.probing:
            connection.close()
            self._probed(None)
            return
        self._release(job)
        if self.suspect:
            self._recovered()
        if keep:
            connection.since = self.all.now()
            self.idle.append(connection)
        else:
            connection.close()
        if self.waiting:
            self._next()
        if job is not None:
            job.finish(reply, None)

    def _taken_from(self, connection: UpstreamConnection) -> Job | None:
        """Detach and return a connection's request."""
        job, connection.job = connection.job, None
        self.all.active.discard(connection)
        return job

    def _release(self, job: Job | None) -> None:
        """The agent no longer works on a request."""
        if job is not None:
            self.busy -= 1
            left = self.load[job.owner] - 1
            if left:
                self.load[job.owner] = left
            else:
                del self.load[job.owner]

    def _next(self) -> None:
        """Send waiting requests; accounts with the fewest in flight go first."""
        self.waiting = [job for job in self.waiting if not job.given_up]
        while self.waiting:
            at = min(range(len(self.waiting)),
                     key=lambda index: self.load.get(self.waiting[index].owner, 0))
            if not self._admits(self.waiting[at]):
                return
            self._start(self.waiting.pop(at))

    def lost(self, connection: UpstreamConnection, why: str) -> None:
        """A connection has failed or was closed. A request lost on a reused connection is retried
        once."""
        job = self._taken_from(connection)
        connection.close()
        if connection is self.probing:
            self._probed(why)
            return
        if job is None:
            if connection in self.idle:
                self.idle.remove(connection)
            return
        if connection.used and not job.retried and not job.given_up and job.done is not None:
            job.retried = True
            self._connect(job)
            return
        self._release(job)
        self._failed(why)
        job.finish(None, self.silent() if self.breaker.open or connection.connecting else
                   refused("node_error", node=self.uuid, why=why))
        self._next()

    def late(self, job: Job) -> None:
        """Deadline passed: answer the waiters. The slot stays in use until the answer arrives or
        the connection closes, since the agent is still working on it."""
        job.finish(None, refused("deadline", node=self.uuid))
        self.probe()

    def abandon(self, connection: UpstreamConnection) -> None:
        """No answer within the maximum timeout: close the connection."""
        job = self._taken_from(connection)
        connection.close()
        self._release(job)
        if job is not None:
            self.late(job)
        self._next()

    # health

    @property
    def is_current(self) -> bool:
        """Whether the node still exists and has this address."""
        return self.all.by_node.get(self.uuid) is self

    def _recovered(self) -> None:
        if self.breaker.open:
            log.info("node %s (%s) answers again", self.uuid, self.host)
        self.suspect = False
        self.breaker.succeeded()

    def _failed(self, why: str) -> None:
        if not self.suspect:
            self.failed_at = time.time()
        self.suspect = True
        was_open = self.breaker.open
        self.breaker.failed(why)
        if self.breaker.open and not was_open:
            log.warning("node %s (%s) does not answer: %s", self.uuid, self.host, why)
            waiting, self.waiting = self.waiting, []
            for job in waiting:
                job.finish(None, self.silent())
            self.close()
        self.all.troubled.add(self)

    def probe(self) -> None:
        """Probe the agent on a separate connection."""
        if self.probing is not None:
            return
        now = self.all.now()
        head = f"GET /-/healthy HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\n\r\n"
        job = Job(head.encode(), now + PROBE_SECONDS)
        try:
            self.probing = UpstreamConnection(self, job, now)
        except OSError as error:
            log.warning("cannot probe %s: %s", self.host, error)
            return
        self.all.active.add(self.probing)
        self.all.troubled.add(self)

    def _probed(self, why: str | None) -> None:
        """The end of a probe: any answer counts as success."""
        self.probing = None
        self.probe_after = self.all.now() + PROBE_SECONDS / 4
        if why is None:
            self._recovered()
        else:
            self._failed(why)

    def sweep(self, now: float) -> bool:
        """Enforce deadlines; False when there is nothing left to watch."""
        if self.waiting:
            kept: list[Job] = []
            for job in self.waiting:
                if job.given_up or now > job.deadline:
                    job.finish(None, refused("deadline", node=self.uuid))
                else:
                    kept.append(job)
            self.waiting = kept
        watched = self.suspect and self.is_current
        if self.probing is None and watched:
            if self.breaker.open:
                if self.breaker.allows():
                    self.probe()
            elif now >= self.probe_after:
                self.probe()            # until it recovers, or the breaker opens
        return bool(self.waiting or watched or self.probing is not None)

    def close(self) -> None:
        """Close idle connections: the node is gone, silent or has moved. Requests in flight may
        finish."""
        for connection in self.idle:
            connection.close()
        self.idle = []


class Upstreams:
    """The upstreams of all nodes, and the sweep that enforces their deadlines."""

    def __init__(self, server: Server, registry: Registry, settings: AgentSettings,
                 random: Callable[[], float]) -> None:
        self.server, self.settings, self.random = server, settings, random
        self.now = server.now
        self.by_node: dict[str, Upstream] = {}
        self.active: set[UpstreamConnection] = set()    # those with a request in flight
        self.troubled: set[Upstream] = set()            # those that need the sweep
        self._heads: Cache[bytes, AgentHead] = Cache("agent heads", KEPT_HEADS_BYTES, entry_size)
        registry.caches.append(self._heads)
        server.loop.every(SWEEP_SECONDS, self._sweep)
        server.loop.every(5.0, self._sweep_idle)

    def to(self, node: Node) -> Upstream:
        """The upstream of a node; raises Refused while its address is unknown."""
        upstream = self.by_node.get(node.uuid)
        if upstream is None or upstream.address != node.address:
            if node.address is None:
                raise refused("node_unknown", node=f"compute node {node.uuid}")
            if upstream is not None:
                upstream.close()
            upstream = self.by_node[node.uuid] = Upstream(self, node.uuid, node.address)
        return upstream

    def suspects(self) -> frozenset[str]:
        """Nodes that have not answered recently."""
        return frozenset([upstream.uuid for upstream in self.troubled
                          if upstream.suspect and upstream.is_current])

    def known_head(self, raw: bytes) -> AgentHead:
        """A parsed head, cached without its date."""
        at = raw.find(_DATE)
        if at > 0 and raw[at + _DATE_END:at + _DATE_END + 2] == b"\r\n":
            raw = raw[:at] + raw[at + _DATE_END:]
        known = self._heads.get(raw)
        if known is not None:
            return known
        reader = AnswerReader(max_body=MAX_PAGE)
        try:
            reader.feed(raw)
            head = read_head(reader)
        except ClientError:
            head = AgentHead(-1)            # the full parser reports the error
        if len(raw) <= LONGEST_KEPT_HEAD:
            self._heads.put(raw, head)
        return head

    def retain(self, nodes: Mapping[str, Node]) -> None:
        """Forget nodes that are gone, and those that have a new address."""
        for uuid, upstream in list(self.by_node.items()):
            node = nodes.get(uuid)
            if node is None or node.address != upstream.address:
                self.by_node.pop(uuid).close()

    def _sweep(self) -> None:
        now = self.now()
        connect_before = now - self.settings.connect_timeout
        sent_before = now - self.settings.timeout - SWEEP_SECONDS
        for connection in list(self.active):
            job, upstream = connection.job, connection.upstream
            if job is None:
                continue
            if connection.connecting and connection.since < connect_before:
                upstream.lost(connection, "connection timed out")
            elif connection is upstream.probing:
                if now > job.deadline:
                    upstream.lost(connection, "no answer")
            elif connection.since < sent_before:
                upstream.abandon(connection)
            elif now > job.deadline and job.done is not None:
                if connection.connecting:
                    upstream.abandon(connection)
                else:
                    upstream.late(job)
            elif not job.slow and now - connection.since > SUSPECT_SECONDS:
                job.slow = True
                upstream.probe()
        for upstream in list(self.troubled):
            if not upstream.sweep(now):
                self.troubled.discard(upstream)

    def _sweep_idle(self) -> None:
        before = self.now() - IDLE_CONNECTION_SECONDS
        for upstream in self.by_node.values():
            if upstream.idle and upstream.idle[0].since < before:
                for connection in upstream.idle:
                    if connection.since < before:
                        connection.close()
                upstream.idle = [connection for connection in upstream.idle
                                 if connection.since >= before]

    def families(self) -> list[Family]:
        """Metrics for `admin_listen`."""
        upstreams = sorted(self.by_node.values(), key=lambda upstream: upstream.uuid)

        def family(name: str, help_text: str, value: Callable[[Upstream], float]) -> Family:
            return Family(name, GAUGE, help_text, [
                Sample((("server", upstream.uuid),), value(upstream)) for upstream in upstreams])
        return [
            family("cmon_proxy_node_up", "Whether the node's agent answers (1) or its circuit "
                   "breaker is open (0).", lambda upstream: int(not upstream.breaker.open)),
            family("cmon_proxy_node_in_flight", "Number of requests that the node's agent is "
                   "working on.", lambda upstream: upstream.busy),
            family("cmon_proxy_node_waiting", "Number of requests waiting for a free slot of the "
                   "node.", lambda upstream: len(upstream.waiting)),
            family("cmon_proxy_node_idle_connections", "Number of idle connections to the node's "
                   "agent.", lambda upstream: len(upstream.idle)),
        ]


class Copy(NamedTuple):
    """The last page of a container, for an account that is over its quota."""
    owner: str
    reply: Reply
    at: float

    def page(self, age: int) -> Response | None:
        """The page with its age; None if its gzip is invalid. Thread-safe."""
        body = self.reply.body
        if self.reply.gzip:
            try:
                body = gunzip(body, MAX_COPY)
            except ClientError:
                return None
        more = render([
            single("cmon_quota_limited", GAUGE, "Whether this page is an old copy (1) because the "
                   "account is over its quota.", 1),
            single("cmon_page_age_seconds", GAUGE, "Age of this copy in seconds; add it to the "
                   "sample ages on this page.", age)])
        between = b"" if body.endswith(b"\n") else b"\n"
        return Response(200, body + between + more.encode(), PAGE, (("Age", str(age)), *NOSNIFF))


# --- routes ---------------------------------------------------------------------------------------

MOST_SHARDS = 1024
INLINE_ROWS = 50                # longer lists are made in a thread, to keep the loop responsive
BUILDERS = 2                    # threads for them; an account has one at a time
BUILDS_WAITING = 64             # of one account
BUILD_SECONDS = 9.0             # until a list that is not ready is refused
BUILD_STALE_SECONDS = 3.0       # lists that took longer are refused if the inventory has changed
KEPT_ANSWERS_BYTES = 16 << 20   # of lists and old copies as they are sent
KEPT_TIMEOUTS_BYTES = 64 << 10

RESULTS = ("ok", "partial", "timeout", "unreachable", "quota", "refused")


def shard_of(number: int, count: int) -> int:
    """The shard, from 0, of a 64-bit hash: jump consistent hashing (Lamping, Veach 2014). Adding a
    shard moves one target in count + 1; time is logarithmic in the count."""
    shard, next_shard = 0, 0
    while next_shard < count:
        shard = next_shard
        number = (number * 2862933555777941757 + 1) & 0xFFFFFFFFFFFFFFFF
        next_shard = int((shard + 1) * (2 ** 31 / ((number >> 33) + 1)))
    return shard


class Selection(NamedTuple):
    """The parameters of a discovery request."""
    groups: frozenset[str] = frozenset()
    shard: int = 0              # from 0
    shards: int = 1

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Selection:
        """From the parameters; raises Refused."""
        for name in query:
            if name not in ("groups", "shard"):
                raise refused("bad_parameter", name=name)
        groups = frozenset(group for group in query.get("groups", "").split(",") if group)
        if "shard" not in query:
            return cls(groups)
        match = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", query["shard"])
        shard, count = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
        if not 1 <= shard <= count <= MOST_SHARDS:
            raise refused("bad_shard", most=MOST_SHARDS)
        return cls(groups, shard - 1, count)

    def takes(self, number: int) -> bool:
        """Whether a target with this hash is in the shard."""
        return self.shards == 1 or shard_of(number, self.shards) == self.shard


def container_row(vm: Vm) -> dict[str, Any]:
    """A container in the original's discovery, member for member: absent members are left out, the
    date is in milliseconds, and a Manta role selects but is not listed as a group."""
    row = {"server_uuid": vm.server, "source": vm.source, "vm_alias": vm.alias,
           "vm_brand": vm.brand, "vm_image_uuid": vm.image, "vm_owner_uuid": vm.owner,
           "vm_uuid": vm.uuid, "vm_state": vm.state, "groups": list(vm.groups),
           "has_core_tag": vm.core, "manta_group": vm.role, "cached_date": vm.since}
    return {name: value for name, value in row.items() if value != ""}


def container_labels(vm: Vm) -> dict[str, str]:
    """A container with the labels of Prometheus' triton_sd, addressed by the service's name."""
    labels = {"__meta_triton_machine_id": vm.uuid, "__meta_triton_machine_alias": vm.alias,
              "__meta_triton_machine_brand": vm.brand, "__meta_triton_machine_image": vm.image,
              "__meta_triton_server_id": vm.server}
    if vm.groups:
        labels["__meta_triton_groups"] = "," + ",".join(vm.groups) + ","
    return {**labels, "instance": vm.uuid, "__scheme__": "https",
            "__metrics_path__": f"/v1/{vm.uuid}/metrics"}


def node_labels(node: Node) -> dict[str, str]:
    """The same for a compute node."""
    return {"__meta_triton_machine_id": node.uuid, "__meta_triton_machine_alias": node.hostname,
            "instance": node.uuid, "__scheme__": "https",
            "__metrics_path__": f"/v1/{node.uuid}/metrics"}


def json_answer(before: str, rows: Iterable[Any], after: str) -> Response:
    """A JSON list of rows, encoded one by one: a single call would hold the GIL."""
    body = before + ",".join([json.dumps(row, separators=(",", ":"), ensure_ascii=False)
                              for row in rows]) + after
    return Response(200, utf8(body), JSON, NOSNIFF)


def utf8(page: str) -> bytes:
    """Encode text; a lone surrogate becomes a question mark."""
    return page.encode("utf-8", "replace")


def with_headers(status: int, whole: bytes, extra: bytes) -> Prepared:
    """A cached answer with the current date and the client's header lines."""
    begin = whole.index(b"\r\nDate: ") + 2
    end = whole.index(b"\r\n", begin) + 2
    whole = b"".join((whole[:begin], b"Date: ", http_date().encode(), b"\r\n", extra,
                      memoryview(whole)[end:]))
    return Prepared(status, whole)


class LastScrape(NamedTuple):
    """Time and outcome of the last request for a page."""
    at: float                   # wall clock
    result: str                 # one of RESULTS


class LastScrapes:
    """The last request for each container's page, by owner: a new owner does not see those of the
    previous one."""

    def __init__(self, clock: Callable[[], float], shared: bool) -> None:
        self._clock, self._shared = clock, shared
        self._by_owner: dict[str, dict[str, LastScrape]] = {}
        self._fresh: dict[tuple[str, str], LastScrape] = {}     # not yet sent to other workers
        self.results: dict[str, int] = dict.fromkeys(RESULTS, 0)

    def note(self, target: Vm | Node, result: str) -> None:
        """Record the outcome of a request for a page."""
        self.results[result] += 1
        if isinstance(target, Vm):
            scrape = LastScrape(self._clock(), result)
            scrapes = self._by_owner.get(target.owner)
            if scrapes is None:
                scrapes = self._by_owner[target.owner] = {}
            scrapes[target.uuid] = scrape
            if self._shared:
                self._fresh[target.owner, target.uuid] = scrape

    def of(self, owner: str) -> dict[str, LastScrape]:
        """A copy of an owner's entries, by container, for any thread."""
        return dict(self._by_owner.get(owner, ()))

    def fresh(self) -> list[tuple[str, str, float, str]]:
        """Changes since the last call, for the other workers."""
        fresh, self._fresh = self._fresh, {}
        return [(*key, *scrape) for key, scrape in fresh.items()]

    def learn(self, fresh: Iterable[tuple[str, str, float, str]]) -> None:
        """Merge the changes of another worker."""
        for owner, uuid, at, result in fresh:
            known = self._by_owner.setdefault(owner, {}).get(uuid)
            if known is None or known.at < at:
                self._by_owner[owner][uuid] = LastScrape(at, result)

    def retain(self, vms: Mapping[str, Vm]) -> None:
        """If there are too many, drop containers that are gone or have a new owner."""
        if sum(map(len, self._by_owner.values())) > 2 * len(vms) + 1000:
            for owner, scrapes in list(self._by_owner.items()):
                kept = {uuid: scrape for uuid, scrape in scrapes.items()
                        if uuid in vms and vms[uuid].owner == owner}
                if kept:
                    self._by_owner[owner] = kept
                else:
                    del self._by_owner[owner]


class FleetRow(NamedTuple):
    """A container on the fleet page."""
    vm: Vm
    groups: tuple[str, ...]
    reachable: bool
    last: LastScrape | None


def fleet_families(rows: Sequence[FleetRow], caller: Caller) -> list[Family]:
    """The fleet page: why each silent container is silent. Contacts no node."""
    info: list[Sample] = []
    state: list[Sample] = []
    reachable: list[Sample] = []
    scraped: list[Sample] = []
    results: list[Sample] = []
    for vm, _, up, last in rows:
        instance = (("instance", vm.uuid),)
        info.append(Sample(instance + (("alias", vm.alias), ("brand", vm.brand),
                                       ("image", vm.image), ("server", vm.server)), 1))
        shown = vm.state if vm.state in SHOWN_STATES else (
            "running" if STATES[vm.state].page else "stopped")
        state += [Sample(instance + (("state", name),), int(name == shown))
                  for name in SHOWN_STATES]
        reachable.append(Sample(instance, int(up)))
        if last is not None:
            scraped.append(Sample(instance, round(last.at, 3)))
            results += [Sample(instance + (("result", name),), int(name == last.result))
                        for name in RESULTS]
    cert, bucket = caller.grant.identity.cert, caller.bucket
    limits = bucket.limits
    return [
        Family("cmon_instance_info", GAUGE, "Properties of a container; join by instance.",
               info),
        Family("cmon_instance_state", GAUGE, "State of a container: 1 for the current one, 0 for "
               "the others.", state),
        Family("cmon_instance_node_reachable", GAUGE, "Whether the agent of the container's "
               "compute node answers (1) or not (0).", reachable),
        Family("cmon_instance_last_scrape_timestamp_seconds", GAUGE, "Timestamp of the last "
               "request for the container's page.", scraped),
        Family("cmon_instance_last_scrape_result", GAUGE, "Outcome of the last request for the "
               "container's page: 1 for the actual one, 0 for the others.", results),
        Family("cmon_client_certificate_expiry_timestamp_seconds", GAUGE, "Timestamp at which the "
               "client certificate of this request expires.",
               [] if cert is None else [Sample((("subject", cert.subject),), cert.not_after)]),
        single("cmon_quota_limit", GAUGE, "Number of requests a minute that the account may make; "
               "absent without a limit.", None if limits.exempt else limits.per_minute),
        single("cmon_quota_used", GAUGE, "Fraction of the burst that is used, from 0 to 1.",
               None if limits.exempt else round(bucket.used, 6)),
        single("cmon_quota_limited", GAUGE, "Whether the account is over its quota (1) or not "
               "(0).", int(bucket.limited)),
    ]


class Caller(NamedTuple):
    """The client of a request: what its certificate grants, and its quota."""
    grant: Grant
    bucket: QuotaBucket
    over: bool                  # this request is over the quota

    @property
    def account(self) -> Account:
        """The client's account."""
        return self.grant.account

    def header(self) -> bytes:
        """Header lines of every answer to this client."""
        return self.grant.identity.header + self.bucket.header()

    def frozen(self) -> Caller:
        """A copy with its own bucket, for other threads to display."""
        return self._replace(bucket=copy.copy(self.bucket))


class Waiter(Deferred):
    """A client waiting for an answer, authorized again before it is sent."""
    __slots__ = ("caller", "target")

    def __init__(self, caller: Caller, target: Vm | Node | None, deadline: float,
                 work: Relay | Build) -> None:
        super().__init__(deadline, work.expired, work.gone)
        self.caller = caller
        self.target = target            # what the answer is about; None: several
        work.waiters.append(self)


class Relay:
    """A page requested from an agent, and its waiters."""
    __slots__ = ("pages", "key", "target", "node", "core", "packed", "waiters", "job")

    def __init__(self, pages: Pages, key: tuple[object, ...], target: Vm | Node, node: Node,
                 core: bool, packed: bool, wire: bytes, deadline: float, owner: str) -> None:
        self.pages, self.key, self.target, self.node = pages, key, target, node
        self.core, self.packed = core, packed
        self.waiters: list[Waiter] = []
        self.job = Job(wire, deadline, functools.partial(pages.relayed, self), owner)

    def expired(self, waiter: Waiter) -> Answer:
        """A waiter's deadline has passed."""
        self.gone(waiter)
        self.pages.scrapes.note(self.target, "timeout")
        return refused("deadline", node=self.node.uuid).answer()

    def gone(self, waiter: Waiter) -> None:
        """A client has stopped waiting."""
        if waiter in self.waiters:
            self.waiters.remove(waiter)
        if not self.waiters:                # it may be dropped now, so no client may join it
            self.job.given_up = True
            self.pages.forget(self)


class Pages:
    """Pages of containers and compute nodes: relayed, or the last copy. Owned by the loop."""

    def __init__(self, proxy: Proxy, builder: Builder, registry: Registry) -> None:
        self._proxy, self._builder = proxy, builder
        self.scrapes = LastScrapes(proxy.clock, proxy.settings.workers > 1)
        self.relays: dict[tuple[object, ...], Relay] = {}
        self.shared = 0
        self._copies: Cache[tuple[str, bool], Copy] = Cache("copies", KEPT_COPIES_BYTES, entry_size)
        # seconds for the agent, by the header's text
        self._timeouts: Cache[str, float] = Cache("timeouts", KEPT_TIMEOUTS_BYTES, entry_size)
        registry.caches += [self._copies, self._timeouts]

    def use(self) -> None:
        """Apply changed settings."""
        self._timeouts.clear()

    def page(self, request: Request, caller: Caller, uuid: str) -> Answer | Deferred:
        """A container's or a compute node's page, relayed."""
        uuid = uuid.lower()
        proxy, inventory = self._proxy, self._proxy.inventory
        target = inventory.target(uuid)
        if target is None or not may_see(caller.grant, target, inventory.manta_owner):
            raise refused("no_such_target")
        now = proxy.server.now()
        refusal = inventory.refusal
        if refusal is not None:
            raise refusal
        core = False
        if isinstance(target, Vm):
            if not STATES[target.state].page:
                raise no_page(uuid, target.state)
            core = target.core and caller.grant.sees_nodes
            node = inventory.nodes.get(target.server)
            if node is None:
                raise refused("node_unknown", node=f"compute node {target.server}"
                              if target.server else "the container's compute node")
        else:
            node = target
        if caller.over and caller.bucket.limits.over != "allow":
            return self._last_copy(request, caller, target, core, now)
        return self._relay(request, caller, target, node, core, now)

    def _last_copy(self, request: Request, caller: Caller, target: Vm | Node, core: bool, now: float
              ) -> Answer | Deferred:
        """Over the quota: serve the last copy, at no cost to a node."""
        last = self._copies.get((target.uuid, core))
        self.scrapes.note(target, "quota")
        if last is None or last.owner != owner_of(target):
            raise caller.bucket.refusal(False)
        age = int(now - last.at)
        caller.bucket.stale += 1
        caller.bucket.bytes += len(last.reply.body)
        refusal = caller.bucket.refusal(False).answer()
        return self._builder.answer(request, caller, ("copy", target.uuid, core), (last.at, age),
                                    lambda: last.page(age) or refusal, target=target)

    def _relay(self, request: Request, caller: Caller, target: Vm | Node, node: Node, core: bool,
               now: float) -> Deferred:
        """Request the page, or join a request for the same page."""
        header = request.headers.get("x-prometheus-scrape-timeout-seconds", "")
        given = self._timeouts.get(header) or self._time_given(header, request)
        # half of the margin is for the agent's answer to reach us
        deadline = now + given + min(given / 9, 0.5) / 2
        key = (target.uuid, core, request.gzip, given)
        relay = self.relays.get(key)
        if relay is not None and relay.target is target:
            self.shared += 1
            relay.job.deadline = max(relay.job.deadline, deadline)
            return Waiter(caller, target, deadline, relay)
        upstream = self._proxy.upstreams.to(node)
        relay = self.relays[key] = Relay(
            self, key, target, node, core, request.gzip,
            relay_head(target, upstream.host, core, request.gzip, given), deadline,
            caller.grant.account.uuid)
        waiter = Waiter(caller, target, deadline, relay)
        try:
            upstream.ask(relay.job)
        except Refused:
            self.forget(relay)
            self.scrapes.note(target, "unreachable")
            raise
        return waiter

    def _time_given(self, header: str, request: Request) -> float:
        """The agent's timeout, from the request's header; raises Refused."""
        timeout = self._proxy.settings.agent.timeout
        given = min(scrape_seconds(request, timeout - min(0.1 * timeout, 0.5)), timeout)
        given = max(round(given, 3), SHORTEST_TIMEOUT)
        self._timeouts.put(header, given)
        return given

    def forget(self, relay: Relay) -> None:
        """Stop clients from joining it."""
        if self.relays.get(relay.key) is relay:
            del self.relays[relay.key]

    def relayed(self, relay: Relay, reply: Reply | None, refusal: Refused | None) -> None:
        """Answer all waiters, except those that have lost access: refuse them."""
        self.forget(relay)
        if reply is not None and (reply.status != 200 or reply.gzip and not relay.packed):
            refusal = agent_refusal(relay, reply)
        waiters, relay.waiters = relay.waiters, []
        target = relay.target
        if reply is None or refusal is not None:
            assert refusal is not None
            code = dict(refusal.headers).get("X-Cmon-Error", "")
            self.scrapes.note(target, {"deadline": "timeout", "no_page": "refused"}.get(
                code, "unreachable"))
            for waiter in waiters:
                waiter.finish(refusal.answer())
            return
        self.scrapes.note(target, "partial" if reply.partial else "ok")
        start = b"HTTP/1.1 200 OK\r\nDate: %s\r\n%s" % (http_date().encode(), reply.lines or (
            page_lines(reply.gzip, reply.partial, len(reply.body))))
        for waiter in waiters:
            try:
                self._proxy.check_again(waiter)
            except Refused as refused_now:
                waiter.finish(refused_now.answer())
                continue
            identity, bucket = waiter.caller.grant.identity, waiter.caller.bucket
            bucket.relays += 1
            bucket.bytes += len(reply.body)
            if len(reply.body) <= MAX_COPY \
                    and bucket.soft < bucket.limits.burst * KEEP_COPIES_BELOW:
                self._copies.put((target.uuid, relay.core), Copy(
                    owner_of(target), reply, self._proxy.server.now()))
            whole = b"".join((start, identity.header, bucket.header(), b"\r\n", reply.body))
            waiter.finish(Prepared(200, whole))

    def families(self) -> list[Family]:
        """Metrics for `admin_listen`."""
        return [
            Family("cmon_proxy_relays_total", COUNTER, "Total number of requests for pages, by "
                   "outcome.",
                   [Sample((("result", name),), count)
                    for name, count in self.scrapes.results.items()]),
            single("cmon_proxy_relays_shared_total", COUNTER, "Total number of requests that "
                   "joined a request in flight for the same page.", self.shared),
            single("cmon_proxy_relays_in_flight", GAUGE, "Number of pages being requested from "
                   "agents.", len(self.relays)),
        ]


def owner_of(target: Vm | Node) -> str:
    """The owner; compute nodes have none."""
    return target.owner if isinstance(target, Vm) else ""


def relay_head(target: Vm | Node, host: str, core: bool, packed: bool, given: float) -> bytes:
    """The request to the agent."""
    path = "gz" if isinstance(target, Node) else target.uuid
    # the original agent requires a JSON boolean; base64 of {"isCoreZone": …}
    options = "eyJpc0NvcmVab25lIjogdHJ1ZX0=" if core else "eyJpc0NvcmVab25lIjogZmFsc2V9"
    return (f"GET /v1/{path}/metrics HTTP/1.1\r\nHost: {host}\r\nx-joyent-cmon-opts: {options}\r\n"
            f"X-Prometheus-Scrape-Timeout-Seconds: {given:g}\r\n"
            + ("Accept-Encoding: gzip\r\n\r\n" if packed else "\r\n")).encode()


def agent_refusal(relay: Relay, reply: Reply) -> Refused:
    """The refusal for an agent's answer that is not the requested page."""
    if reply.gzip and not relay.packed:
        return refused("node_error", node=relay.node.uuid, why="it sent gzip, which was not "
                       "requested")
    body = b"compressed message" if reply.gzip else reply.body
    why = body.split(b"\n")[0][:150].decode("utf-8", "replace").strip() or "no message"
    if reply.status == 404 and isinstance(relay.target, Vm):
        return no_page(relay.target.uuid, "not running on its node")
    if reply.status == 503:         # the agent is healthy and explains the refusal
        return refused("node_refused", node=relay.node.uuid, why=why)
    return refused("node_error", node=relay.node.uuid, why=f"{reply.status} {why}")


class Build(NamedTuple):
    """An answer being built, and its waiters."""
    key: tuple[object, ...]
    version: object
    make: Callable[[], Response]
    packed: bool
    account: str
    generation: object              # of the account's containers at the start
    started: float
    waiters: list[Waiter]

    def expired(self, _waiter: Waiter) -> Answer:
        """A waiter's deadline has passed."""
        return refused("too_busy").answer()

    def gone(self, waiter: Waiter) -> None:
        """A client has stopped waiting."""
        if waiter in self.waiters:
            self.waiters.remove(waiter)


class Built(NamedTuple):
    """An encoded answer, and the version of its source."""
    version: object
    status: int
    whole: bytes


class Builder:
    """Builds and caches answers whose size grows with the account, in separate threads.

    Owned by the loop. Identical requests share a build. An account uses one thread at a time and
    its other builds queue, so that it cannot occupy all threads.
    """

    def __init__(self, proxy: Proxy, registry: Registry) -> None:
        self._proxy = proxy
        self._pool = Pool("builder", BUILDERS, 1 << 20)     # bounded by account: BUILDS_WAITING
        self._kept: Cache[object, Built] = Cache("answers", KEPT_ANSWERS_BYTES, entry_size)
        registry.caches.append(self._kept)
        self._building: dict[object, Build] = {}            # by key and version
        self._queues: dict[str, collections.deque[Build]] = {}      # the first is being built

    def clear(self) -> None:
        """Empty the cache: the settings have changed."""
        self._kept.clear()

    def answer(self, request: Request, caller: Caller, key: tuple[object, ...], version: object,
               make: Callable[[], Response], *, small: bool = False,
               target: Vm | Node | None = None) -> Answer | Deferred:
        """The cached answer of this version, or the result of `make`, which runs in another thread.
        Version None is never cached. Raises Refused when too many wait."""
        packed = request.gzip
        key += (packed,)
        kept = self._kept.get(key)
        if kept is not None and kept.version == version is not None:
            return with_headers(kept.status, kept.whole, caller.header())
        if small:
            built = build_answer(version, make, packed)
            self._keep(key, built)
            return with_headers(built.status, built.whole, caller.header())
        known = self._building.get((key, version))
        build = known or self._queue(key, version, make, packed, caller.account.uuid)
        waiter = Waiter(caller, target, self._proxy.server.now() + BUILD_SECONDS, build)
        if known is None and len(self._queues[build.account]) == 1:
            self._begin(build.account)
        return waiter

    def _queue(self, key: tuple[object, ...], version: object, make: Callable[[], Response],
               packed: bool, account: str) -> Build:
        queue = self._queues.setdefault(account, collections.deque())
        if len(queue) >= BUILDS_WAITING:
            raise refused("too_busy")
        build = Build(key, version, make, packed, account,
                      self._proxy.inventory.generation(account), self._proxy.server.now(), [])
        queue.append(build)
        self._building[key, version] = build
        return build

    def _begin(self, account: str) -> None:
        """Start the account's first build that has waiters; drop those before it."""
        queue = self._queues[account]
        while queue:
            build = queue[0]
            if build.waiters:
                try:
                    self._pool.submit(self._make, build)
                    return
                except RuntimeError:            # no thread can be started
                    for waiter in list(build.waiters):
                        waiter.finish(refused("too_busy").answer())
            queue.popleft()
            del self._building[build.key, build.version]
        del self._queues[account]

    def _make(self, build: Build) -> None:
        """Runs in the pool."""
        try:
            built = build_answer(build.version, build.make, build.packed)
        except Exception:
            log.exception("building the answer %s failed", build.key[0])
            built = Built(None, 500, wire(
                text(500, "internal error; see the log", ("X-Cmon-Error", "internal"))))
        self._proxy.server.loop.call_soon(self._made, build, built)

    def _made(self, build: Build, built: Built) -> None:
        """Cache it, answer the waiters, and start the account's next build."""
        self._keep(build.key, built)
        if self._building.get((build.key, build.version)) is not build:
            return                              # abandoned: too late
        del self._building[build.key, build.version]
        self._queues[build.account].popleft()
        self._begin(build.account)
        proxy = self._proxy
        outdated = (proxy.server.now() - build.started > BUILD_STALE_SECONDS
                    and proxy.inventory.generation(build.account) != build.generation)
        for waiter in list(build.waiters):
            try:
                if outdated:
                    raise refused("too_busy")
                proxy.check_again(waiter)
            except Refused as refusal:
                waiter.finish(refusal.answer())
            else:
                waiter.finish(with_headers(built.status, built.whole, waiter.caller.header()))
        build.waiters.clear()               # they refer to it

    def _keep(self, key: object, built: Built) -> None:
        if built.version is not None and built.status == 200:
            self._kept.put(key, built)


def build_answer(version: object, make: Callable[[], Response], packed: bool) -> Built:
    """Build and encode an answer. Thread-safe."""
    try:
        response = make()
    except Refused as refusal:
        response = refusal.answer()
    return Built(version, response.status, wire(response, packed))


class View(NamedTuple):
    """The input of a list of containers: immutable, for any thread."""
    grant: Grant
    selection: Selection
    vms: Sequence[Vm]
    manta_owner: str
    stopped: bool = False           # include stopped containers

    def seen(self) -> list[tuple[Vm, tuple[str, ...]]]:
        """Requested containers that the client may see, with their groups, by UUID."""
        groups, manta = self.selection.groups, self.manta_owner
        rows = []
        for vm in self.vms:
            vm_groups = groups_of(vm, manta)
            if may_see(self.grant, vm, manta) and not (groups and groups.isdisjoint(vm_groups)) \
                    and self.selection.takes(vm.number):
                rows.append((vm, vm_groups))
        return sorted(rows, key=lambda row: row[0].uuid)

    def listed(self) -> Iterator[Vm]:
        """Those that discovery lists: a container without compute node cannot be scraped."""
        for vm, _ in self.seen():
            state = STATES[vm.state]
            if vm.server and (state.listed_stopped if self.stopped else state.listed):
                yield vm


class Discovery:
    """Lists of what an account may see: the original's and Prometheus' discovery, the fleet page,
    the page for people. Owned by the loop, which copies references; the builder makes the lists."""

    def __init__(self, proxy: Proxy, builder: Builder) -> None:
        self._proxy, self._builder = proxy, builder

    def _view(self, caller: Caller, selection: Selection) -> View:
        proxy = self._proxy
        return View(caller.grant, selection, list(proxy.inventory.owned.get(
            caller.account.uuid, {}).values()), proxy.inventory.manta_owner,
            proxy.settings.discover_include_stopped)

    def _containers(self, kind: str, request: Request, caller: Caller, address: str,
                    make: Callable[[View], Response]) -> Answer | Deferred:
        """A list of containers, cached until one of them changes."""
        selection = Selection.of(request.query)
        view = self._view(caller, selection)
        owner = caller.account.uuid
        return self._builder.answer(
            request, caller, (kind, owner, caller.grant.groups, selection, address),
            (self._proxy.inventory.generation(owner), view.manta_owner, view.stopped),
            lambda: make(view), small=len(view.vms) <= INLINE_ROWS)

    def containers(self, request: Request, caller: Caller) -> Answer | Deferred:
        """The original's list of containers."""
        return self._containers("discover", request, caller, "", lambda view: json_answer(
            '{"containers":[', (container_row(vm) for vm in view.listed()), "]}"))

    def container_targets(self, request: Request, caller: Caller) -> Answer | Deferred:
        """The same for Prometheus' HTTP service discovery, all under the service's name."""
        address = request.headers.get("host", "")
        return self._containers("sd", request, caller, address, lambda view: json_answer("[", (
            {"targets": [address], "labels": container_labels(vm)}
            for vm in view.listed()), "]"))

    def _nodes(self, kind: str, request: Request, caller: Caller, address: str,
               make: Callable[[list[Node]], Response]) -> Answer | Deferred:
        """A list of compute nodes, for operators."""
        if not caller.grant.sees_nodes:
            raise refused("not_operator")
        # groups are ignored, as in the original
        selection = Selection.of(request.query)._replace(groups=frozenset())
        nodes = list(self._proxy.inventory.nodes.values())
        return self._builder.answer(
            request, caller, (kind, selection, address), self._proxy.inventory.node_generation,
            lambda: make([node for node in sorted(nodes) if may_see(caller.grant, node)
                          and selection.takes(number_of(node.uuid))]),
            small=len(nodes) <= INLINE_ROWS)

    def nodes(self, request: Request, caller: Caller) -> Answer | Deferred:
        """The original's list of compute nodes."""
        return self._nodes("gz", request, caller, "", lambda nodes: json_answer('{"cns":[', (
            {"server_uuid": node.uuid, "server_hostname": node.hostname} for node in nodes), "]}"))

    def node_targets(self, request: Request, caller: Caller) -> Answer | Deferred:
        """The same for HTTP service discovery."""
        address = request.headers.get("host", "")
        return self._nodes("gz/sd", request, caller, address, lambda nodes: json_answer("[", (
            {"targets": [address], "labels": node_labels(node)} for node in nodes), "]"))

    def _answer(self, kind: str, request: Request, caller: Caller, more: object,
                make: Callable[[], Response], rows: int) -> Answer | Deferred:
        """An answer that is never cached: it shows times, the quota and the certificate."""
        cert = caller.grant.identity.cert
        return self._builder.answer(
            request, caller, (kind, caller.account.uuid, caller.grant.groups, more,
                              cert and (cert.subject, cert.not_after)),
            None, make, small=rows <= INLINE_ROWS)

    def _fleet(self, view: View) -> Callable[[], list[FleetRow]]:
        """A thread-safe function that returns the containers with their status."""
        down = self._proxy.upstreams.suspects()
        last = self._proxy.pages.scrapes.of(view.grant.account.uuid)
        return lambda: [FleetRow(vm, groups, vm.server not in down, last.get(vm.uuid))
                        for vm, groups in view.seen()]

    def fleet(self, request: Request, caller: Caller) -> Answer | Deferred:
        """The fleet page: why each silent container is silent."""
        view = self._view(caller, Selection.of(request.query))
        rows, shown = self._fleet(view), caller.frozen()
        return self._answer("fleet", request, caller, view.selection, lambda: Response(
            200, utf8(render(fleet_families(rows(), shown))), PAGE, NOSNIFF), len(view.vms))

    def people(self, request: Request, caller: Caller) -> Answer | Deferred:
        """The overview: the account's containers, and for operators the compute nodes."""
        query = dict(request.query)
        number = query.pop("from", "0")
        first = int(number) if re.fullmatch(r"[0-9]{1,6}", number) else 0
        proxy, shown = self._proxy, caller.frozen()
        view = self._view(caller, Selection.of(query))
        rows, now = self._fleet(view), proxy.clock()
        nodes: list[Node] = []
        facts: list[tuple[str, str]] = []
        if caller.grant.sees_nodes:
            nodes, facts = list(proxy.inventory.nodes.values()), proxy.facts()
        down = proxy.upstreams.suspects()

        def make() -> Response:
            machines = [(node, node.uuid not in down) for node in sorted(
                nodes, key=lambda node: node.hostname)[:ROWS_SHOWN]]
            return html_answer(people_page(rows(), first, shown, machines, now, query, facts))
        return self._answer("people", request, caller, (view.selection, first), make,
                            max(len(view.vms), len(nodes)))

    def container(self, request: Request, caller: Caller, name: str) -> Answer | Deferred:
        """The HTML page of one container, by UUID or alias."""
        view = self._view(caller, Selection())
        rows, now, shown = self._fleet(view), self._proxy.clock(), caller.frozen()
        host = request.headers.get("host", "")

        def make() -> Response:
            named = [row for row in rows() if name in (row.vm.uuid, row.vm.alias)]
            if not named:
                raise refused("no_such_target")
            return html_answer(
                container_page(named[0], shown, host) if len(named) == 1 else
                people_page(named, 0, shown, (), now))      # an alias of several
        return self._answer("container", request, caller, (name, host), make, len(view.vms))

    def machine(self, request: Request, caller: Caller, name: str) -> Answer | Deferred:
        """The HTML page of one compute node, by UUID or host name."""
        if not caller.grant.sees_nodes:
            raise refused("no_such_target")
        proxy, shown = self._proxy, caller.frozen()
        nodes, vms = list(proxy.inventory.nodes.values()), list(proxy.inventory.vms.values())
        down = proxy.upstreams.suspects()

        def make() -> Response:
            for node in nodes:
                if name in (node.uuid, node.hostname) and may_see(caller.grant, node):
                    here = sorted((vm for vm in vms if vm.server == node.uuid),
                                  key=lambda vm: vm.alias)
                    return html_answer(node_page(node, node.uuid not in down, here, shown))
            raise refused("no_such_target")
        return self._answer("machine", request, caller, name, make, len(vms))


def html_answer(page: str) -> Response:
    """An HTML page as a response."""
    return Response(200, utf8(page), HTML, PAGE_HEADERS)


def page_file(prepared: Prepared, request: Request) -> Prepared:
    """A style sheet or script of the pages, which browsers may cache for a day."""
    return with_headers(prepared.status, prepared.form(request.gzip), b"")


Action = Callable[..., Union[Answer, Deferred]]


class Proxy:
    """Authenticates requests, enforces quotas and dispatches. Owned by the loop."""

    def __init__(self, settings: Settings, server: Server, registry: Registry,
                 random: Callable[[], float], clock: Callable[[], float] = time.time) -> None:
        self.settings, self.server, self.clock = settings, server, clock
        self.inventory = Inventory(server.now)
        self.inventory.max_age = settings.inventory.max_age     # fixed until a restart
        self.directory: Directory | Accounts = Directory()
        self.quotas = Quotas(settings.quota, server.now)
        self.upstreams = Upstreams(server, registry, settings.agent, random)
        self.policy = Policy()
        self._builder = Builder(self, registry)
        self.pages = Pages(self, self._builder, registry)
        self.discovery = Discovery(self, self._builder)
        self.listener: TlsListener | None = None
        self._retained = 0              # generation of nodes to which upstreams are limited
        kept = (("Cache-Control", "max-age=86400"), *NOSNIFF)
        types = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
        self._css, self._js = (
            prepare(Response(200, content.encode(), types[name.partition(".")[2]], kept))
            for name, content in page_files())
        self.use(settings)
        registry.collect(self.families)
        registry.caches.append(certificates.cache)
        server.loop.every(1.0, self._each_second)

    def use(self, settings: Settings) -> None:
        """Apply settings, at start and after SIGHUP; drop what was derived from the old ones."""
        self.settings = settings
        tls = settings.tls
        self.policy = Policy(tls.client_auth == "ca", tls.allow_sha1, tls.allow_rsa1024,
                             settings.require_approved)
        self.quotas.reload(settings.quota)
        self.upstreams.settings = settings.agent
        self._builder.clear()
        self.pages.use()
        if self.listener is not None:
            self.listener.heads.clear()     # their routes depend on host_prefix

    def routes(self) -> tuple[Route, ...]:
        """The routes for tenants."""
        lists, entered = self.discovery, self._entered
        return (
            Route("GET", "/_ping", self.ping), Route("GET", "/v1/_ping", self.ping),
            Route("GET", "/-/healthy", self.ping), Route("GET", "/-/ready", self.is_ready),
            Route("GET", "/v1/discover", entered(lists.containers, "list")),
            Route("GET", "/v1/gz/discover", entered(lists.nodes, "list")),
            Route("GET", "/v1/sd", entered(lists.container_targets, "list")),
            Route("GET", "/v1/gz/sd", entered(lists.node_targets, "list")),
            Route("GET", "/v1/fleet/metrics", entered(lists.fleet, "fleet")),
            Route("GET", "/v1/{uuid}/metrics", entered(self.pages.page, "page")),
            Route("GET", "/", entered(lists.people, "people")),
            Route("GET", "/c/{name}", entered(lists.container, "people")),
            Route("GET", "/n/{name}", entered(lists.machine, "people")),
            Route("GET", "/page.css", lambda request: page_file(self._css, request)),
            Route("GET", "/page.js", lambda request: page_file(self._js, request)),
        )

    def by_host(self, request: Request) -> tuple[Route, tuple[str, ...]] | None:
        """Routes that depend on the request's host name. Pure; raises Refused."""
        if request.path in ("/_ping", "/v1/_ping", "/-/healthy", "/-/ready"):
            return None
        label = request.host.partition(".")[0]
        if UUID.fullmatch(label):
            if request.path != "/metrics" or request.method not in ("GET", "HEAD"):
                return None
            return Route("GET", "/metrics", self._entered(self.pages.page, "page")), (label,)
        prefix = self.settings.host_prefix
        if prefix and label != prefix and not _is_own_name(request.host):
            raise refused("unknown_host", host=request.host, prefix=prefix)
        if request.path == "/metrics":
            raise refused("no_own_page")
        return None

    # authentication

    def _entered(self, action: Action, kind: str) -> Action:
        """A handler for authenticated clients; `kind` is one of COSTS."""
        return functools.partial(self.enter, action, COSTS[kind])

    def enter(self, action: Action, cost: Cost, request: Request, *args: str) -> Answer | Deferred:
        """Authenticate and charge the quota; runs on every request. Raises Refused."""
        peer = request.peer
        identity = peer.identity
        if not isinstance(identity, Identity):      # None at first
            identity = peer.identity = Identity(peer.certificate)
            peer.certificate = None         # kept in the identity, shared by its clients
        if identity.refusal is not None:    # shared by requests: do not accumulate tracebacks
            raise identity.refusal.with_traceback(None)
        account = self.directory.find(identity.login, peer.address)
        if isinstance(account, Deferred):          # being looked up; returns here
            return self._after(account, action, cost, request, args)
        peer.group = ""
        try:
            granted = grant(identity, account, self.policy, self.clock())
        except Refused as refusal:
            again = self.directory.recheck(identity.login, peer.address) if account is not None \
                and ("X-Cmon-Error", "unknown_key") in refusal.headers else None
            if again is None:
                raise
            return self._after(again, action, cost, request, args)
        peer.group = granted.account.uuid
        bucket = self.quotas.of(granted.account)
        price = cost.base
        if cost.containers != math.inf:
            price += len(self.inventory.owned.get(granted.account.uuid, ())) / cost.containers
        verdict = bucket.take(self.server.now(), price)
        if verdict != ADMITTED and (verdict == REFUSED or bucket.limits.over == "refuse"):
            raise bucket.refusal(verdict == REFUSED)
        if not self.inventory.ready:
            raise refused("inventory_not_ready")
        return action(request, Caller(granted, bucket, verdict == OVER), *args)

    def _after(self, account: Deferred, action: Action, cost: Cost, request: Request,
               args: Sequence[str]) -> Deferred:
        """Continue the request once the account has been looked up."""
        again = Route("GET", "", functools.partial(self.enter, action, cost))
        outer = Deferred(account.deadline, _accounts_unreachable)

        def go_on(answer: Answer) -> None:
            if outer.answer is not None:
                return
            result = call(again, request, args) if answer.status == 200 else answer
            if isinstance(result, Deferred):
                expired, cancel = result.expired, result.on_cancel
                outer.deadline, outer.expired = result.deadline, lambda _: expired(result)
                outer.on_cancel = cancel and (lambda _: cancel(result))
                result.attach(outer.finish)
            else:
                outer.finish(result)
        account.attach(go_on)
        return outer

    def check_again(self, waiter: Waiter) -> None:
        """Check before a delayed answer is sent; raises Refused if the client has lost access since
        its request."""
        before = waiter.caller.grant
        identity, target = before.identity, waiter.target
        account = self.directory.recall(identity.login, before.account)
        granted = grant(identity, account, self.policy, self.clock())
        if granted is not before and (granted.account.uuid, granted.groups, granted.sees_nodes) \
                != (before.account.uuid, before.groups, before.sees_nodes):
            raise refused("too_busy")       # its access has changed: the client must retry
        if target is None:
            return
        inventory = self.inventory
        if inventory.vms.get(target.uuid) is not target:
            current, manta = inventory.target(target.uuid), inventory.manta_owner
            if not (may_see(granted, current, manta) and may_see(granted, target, manta)):
                raise refused("no_such_target")

    def ping(self, _request: Request) -> Answer:
        """The process is alive."""
        return text(200, "OK")

    def is_ready(self, _request: Request) -> Answer:
        """The inventory is loaded and recent enough to serve pages."""
        refusal = self.inventory.refusal
        if refusal is not None:
            raise refusal
        return text(200, "OK")

    def facts(self) -> list[tuple[str, str]]:
        """The proxy's own state, for operators."""
        inventory = self.inventory
        return [("compute nodes", f"{len(inventory.nodes)}, {len(self.upstreams.suspects())} of "
                                  "them silent"),
                ("containers", str(len(inventory.vms))),
                ("inventory confirmed", utc(inventory.confirmed_at)),
                ("pages in flight", str(len(self.pages.relays))),
                *((f"relayed, {name}", str(count))
                  for name, count in self.pages.scrapes.results.items() if count),
                ("version", __version__)]

    # housekeeping

    def _each_second(self) -> None:
        self.quotas.book()
        self.pages.scrapes.retain(self.inventory.vms)
        if self._retained != self.inventory.node_generation:
            self._retained = self.inventory.node_generation
            self.upstreams.retain(self.inventory.nodes)

    def families(self) -> list[Family]:
        """Metrics for `admin_listen`."""
        age = self.server.now() - self.inventory.confirmed
        states: dict[str, int] = {}
        for vm in self.inventory.vms.values():
            states[vm.state] = states.get(vm.state, 0) + 1
        return [
            *self.pages.families(),
            single("cmon_proxy_inventory_ready", GAUGE, "Whether an inventory is loaded and recent "
                   "enough to be trusted (1) or not (0).", int(not self.inventory.refusal)),
            single("cmon_proxy_inventory_age_seconds", GAUGE, "Time in seconds since the source "
                   "last confirmed the inventory.", round(age, 3)),
            Family("cmon_proxy_inventory_vms", GAUGE, "Number of known containers, by state.",
                   [Sample((("state", name),), count) for name, count in sorted(states.items())]),
            single("cmon_proxy_inventory_nodes", GAUGE, "Number of known compute nodes.",
                   len(self.inventory.nodes)),
            *self.upstreams.families(), *self.quotas.families(),
        ]


def _is_own_name(host: str) -> bool:
    """Whether the host is an address or this machine's name, never a container."""
    return host in ("localhost", "") or re.fullmatch(r"\[.*|[0-9.]+", host) is not None


# --- page for people ------------------------------------------------------------------------------

# The server renders plain tables that work without a script. The script (PAGE_JS, below) makes them
# live: it reads the same pages as Prometheus, one for each container on the screen and at most
# `data-per-minute` a minute, judges them by the kit's USE table (`RULES`) and keeps an hour of
# figures in the browser. The server stores nothing; nothing is loaded from other hosts or inline.
# To change it, edit the text below and restart the proxy.

ROWS_SHOWN = 75                 # a row has up to 350 bytes; the page stays below 40 kB
POLLS_PER_MINUTE = 600.0        # at most, and at most a tenth of the account's quota
MOST_LISTED = 200               # containers on the page of a compute node
PAGE_HEADERS = page_headers("script-src 'self'; style-src 'self'; connect-src 'self'")


def use_rules() -> str:
    """The kit's USE table for the script, as JSON; null for values without verdict."""
    return json.dumps({
        "busy": USE_BUSY, "full": USE_FULL, "up": USE_UP,
        "from": {name: None if value == math.inf else value for name, value in USE_FROM.items()},
        "use": {scope: [use._asdict() for use in USE if use.scope == scope]
                for scope in ("zone", "node")}}, separators=(",", ":"))


def framed(main: str, title: str, caller: Caller) -> str:
    """A complete page around <main>: adds account, quota and the script's request rate."""
    cert, limits = caller.grant.identity.cert, caller.bucket.limits
    facts = [f"account {html.escape(caller.account.login)}"]
    if cert is not None:
        facts.append(f"certificate until {utc(cert.not_after)[:10]}")
    polls = POLLS_PER_MINUTE
    if not limits.exempt:
        polls = min(polls, max(limits.per_minute / 10, 1))
        facts.append(f"quota {limits.per_minute:g} requests a minute, "
                     f"{100 * caller.bucket.used:.0f} % of the burst used")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}Container Monitor</title>
<meta name="viewport" content="width=device-width">
<link rel="stylesheet" href="/page.css?{__version__}">
<script src="/page.js?{__version__}" defer></script></head>
<body data-per-minute="{polls:g}">
<header><h1><a href="/">Container Monitor</a></h1>
<ul class="facts"><li>{"</li><li>".join(facts)}</li></ul></header>
<p id="banner" class="banner" role="alert" hidden></p>
{main}
</body></html>
"""


def people_page(rows: Sequence[FleetRow], first: int, caller: Caller,
                nodes: Sequence[tuple[Node, bool]], now: float,
                query: Mapping[str, str] | None = None,
                proxy: Sequence[tuple[str, str]] = ()) -> str:
    """The overview: containers, for operators also compute nodes and facts about the proxy."""
    rows = sorted(rows, key=lambda row: (not _silent(row), row.vm.alias, row.vm.uuid))

    def link(start: int, words: str, rel: str) -> str:
        there = urllib.parse.urlencode({**(query or {}), "from": start})
        return f'<a rel="{rel}" href="/?{html.escape(there)}">{words}</a>'
    links = [link(max(first - ROWS_SHOWN, 0), "previous", "prev")] if first else []
    if first + ROWS_SHOWN < len(rows):
        links.append(link(first + ROWS_SHOWN, "next", "next"))
    silent = sum(map(_silent, rows))
    known = (f"{silent} of {len(rows)} containers are on compute nodes that do not answer."
             if silent else f"{len(rows)} containers. Live values need JavaScript; "
             "this table is complete without it.")
    body = "".join([_row(row, now) for row in rows[first:first + ROWS_SHOWN]])
    machines = "".join([_node_row(node, up) for node, up in nodes])
    machines = machines and f"""<h3>Compute nodes</h3>
<table class="rows" data-scope="node" aria-label="Compute nodes"><thead><tr><th>compute node</th>\
<th class="static">agent</th></tr></thead><tbody>
{machines}</tbody></table>
"""
    items = "".join([f"<li>{html.escape(name)}: {html.escape(value)}</li>"
                     for name, value in proxy])
    about_proxy = items and f'<h3>This proxy</h3>\n<ul class="facts" id="proxy">{items}</ul>\n'
    return framed(f"""<main><h2 tabindex="-1">Containers</h2>
<div id="summary" role="status" class="{"bad" if silent else ""}">{known}</div>
<form hidden>
<label>Name <input type="search" name="text"></label>
<label>Group <select name="group"><option value="">all</option></select></label>
<label>State <select name="state"><option value="">all</option>\
<option value="!">with problems</option></select></label>
<label>Sort by <select name="sort"></select></label>
<label>Shown <output></output></label>
<p class="dim">Charts show the last 15 minutes; dashed lines are limits.</p></form>
<table class="rows" data-scope="zone" aria-label="Containers"><thead><tr><th>container</th>\
<th class="static">state</th>\
<th class="static">compute node</th><th class="static">last scrape</th></tr></thead><tbody>
{body}</tbody></table>
<p>{" · ".join(links)}</p>
{machines}{about_proxy}<p class="dim">As text: <a href="/v1/fleet/metrics">fleet metrics</a> ·
<a href="/v1/discover">Triton discovery</a> · <a href="/v1/sd">HTTP discovery</a></p>
</main>""", "", caller)


def _silent(row: FleetRow) -> bool:
    return STATES[row.vm.state].page and bool(row.vm.server) and not row.reachable


def _mark(good: bool, words: str) -> str:
    return f'<span class="{"good" if good else "bad"}">{html.escape(words)}</span>'


def _data(**data: str) -> str:
    """Attributes for the script; those without a value are left out."""
    return "".join([f' data-{name}="{html.escape(value)}"' for name, value in data.items()
                    if value])


def _vm_data(row: FleetRow) -> str:
    vm = row.vm
    return _data(uuid=vm.uuid, state=vm.state, groups=" ".join(row.groups),
                 asks="1" if STATES[vm.state].page else "",
                 silent=vm.server[:8] if _silent(row) else "")


def _alias(vm: Vm) -> str:
    return vm.alias[:40] or vm.uuid[:8]


def _row(row: FleetRow, now: float) -> str:
    vm = row.vm
    last = "none yet"
    if row.last is not None:
        last = (_mark(row.last.result in ("ok", "partial"), row.last.result)
                + f" <small>{max(now - row.last.at, 0):.0f} s ago</small>")
    node = "none yet"
    if vm.server:
        node = vm.server[:8] + " " + _mark(row.reachable,
                                           "answers" if row.reachable else "does not answer")
    return (f'<tr{_vm_data(row)}><th scope="row"><a href="/c/{vm.uuid}">'
            f'{html.escape(_alias(vm))}</a></th><td class="static">{html.escape(vm.state)}</td>'
            f'<td class="static">{node}</td><td class="static">{last}</td></tr>\n')


def _node_row(node: Node, up: bool) -> str:
    return (f'<tr{_data(uuid=node.uuid, asks="1", silent="" if up else node.hostname)}>'
            f'<th scope="row"><a href="/n/{node.uuid}">{html.escape(node.hostname)}</a></th>'
            f'<td class="static">{_mark(up, "answers" if up else "does not answer")}</td></tr>\n')


def _use_table(scope: str) -> str:
    """A table of metric names; the script adds values and verdicts."""
    cells = ("utilisation", "saturation", "errors")
    rows = [f'<tr><th scope="row">{use.resource}</th>' + "".join([
        f'<td data-cell="{cell}" data-resource="{number}"><span class="verdict"></span><ul>'
        + "".join([f"<li>{name}</li>" for name in getattr(use, cell)]) + "</ul></td>"
        if getattr(use, cell) else "<td></td>"
        for cell in cells]) + "</tr>\n"
        for number, use in enumerate(use for use in USE if use.scope == scope)]
    return ('<h3>Utilisation, saturation, errors</h3>\n<table class="use"><thead><tr>'
            + "".join([f'<th scope="col">{cell}</th>' for cell in ("resource", *cells)])
            + f'</tr></thead><tbody>\n{"".join(rows)}</tbody></table>\n')


def _details(data: str, name: str, facts: Sequence[str], scope: str, uuid: str, rest: str) -> str:
    """The <main> of a container's or a compute node's page."""
    return f"""<main data-scope="{scope}"{data}{_data(name=name)}>
<p><a href="/">All containers</a></p>
<h2 tabindex="-1">{html.escape(name)}</h2>
<ul class="facts"><li>{"</li><li>".join(map(html.escape, facts))}</li></ul>
<div id="summary" role="status">Live values need JavaScript;
<a href="/v1/{uuid}/metrics">all metrics as text</a> do not.</div>
<div class="charts"></div>
{_use_table(scope)}<h3>Missing metrics</h3>
<ul id="missing"><li>Those of collectors whose <code>cmon_collector_up</code> is 0.</li></ul>
{rest}<p class="dim">As text: <a href="/v1/{uuid}/metrics">all metrics</a></p>
</main>"""


SCRAPE_YML = """\
scrape_configs:
  - job_name: {name}
    scheme: https
    metrics_path: /v1/{uuid}/metrics
    tls_config:
      cert_file: {login}-cert.pem
      key_file: {login}-key.pem
    static_configs:
      - targets: [{host}]
        labels: {{instance: {uuid}, alias: {name}}}
"""


def container_page(row: FleetRow, caller: Caller, host: str) -> str:
    """The page of a container: charts, USE table, missing metrics, scrape configuration."""
    vm, name = row.vm, _alias(row.vm)
    facts = [vm.state, vm.brand, f"compute node {vm.server[:8] or 'none yet'}",
             f"image {vm.image[:8]}", vm.uuid]
    if row.groups:
        facts.insert(2, "groups " + ", ".join(row.groups))
    config = SCRAPE_YML.format(name=json.dumps(name), uuid=vm.uuid, host=json.dumps(host),
                               login=caller.account.login)
    return framed(_details(_vm_data(row), name, facts, "zone", vm.uuid, f"""\
<h3>Scrape configuration</h3>
<p>For this container only; <a href="/v1/sd">discovery</a> finds all containers of the account.
<button type="button" id="copy" hidden>Copy</button></p>
<pre tabindex="0">{html.escape(config)}</pre>
"""), f"{name} – ", caller)


def node_page(node: Node, up: bool, rows: Sequence[Vm], caller: Caller) -> str:
    """The page of a compute node, for operators: the same, with its containers."""
    address = f"agent at {node.address[0]}:{node.address[1]}" if node.address else "no address yet"
    items = "".join([f"<li>{html.escape(_alias(vm))} <span class=\"dim\">{html.escape(vm.state)}"
                     "</span></li>" for vm in rows[:MOST_LISTED]])
    more = f"<li>and {len(rows) - MOST_LISTED} more</li>" if len(rows) > MOST_LISTED else ""
    data = _data(uuid=node.uuid, asks="1", silent="" if up else node.hostname)
    return framed(_details(data, node.hostname, [address, node.uuid], "node", node.uuid, f"""\
<h3>Containers ({len(rows)})</h3>
<ul class="facts">{items}{more}</ul>
"""), f"{node.hostname} – ", caller)


def page_files() -> Iterator[tuple[str, str]]:
    """The files that the pages load: name and content."""
    yield "page.css", compact(BASE_CSS + PAGE_CSS)
    yield "page.js", f"const RULES={use_rules()};\n{compact(PAGE_JS)}"


def compact(source: str) -> str:
    """A style sheet or script without comment lines and indentation; no string in it may span
    lines."""
    return re.sub(r"(?m)^[ \t]*(//.*)?\n?", "", source)


PAGE_CSS = r"""
h2:focus { outline: none; } #summary a, p a { text-decoration: underline; }
pre { background: var(--card); border: 1px solid var(--line); padding: .7rem; overflow-x: auto; }
[hidden] { display: none !important; }
.banner, #summary { border-left: 4px solid var(--line); background: var(--card);
  padding: .5rem .8rem; margin: .8rem 0; }
.banner, #summary.bad { border-color: var(--bad); background: var(--bad-back);
  color: var(--text); }
#summary.warn { border-color: var(--warn); background: var(--warn-back); color: var(--text); }
#summary.good { border-color: var(--good); color: var(--text); }
#summary ul { margin: .2rem 0 0; padding: 0; list-style: none; columns: 22rem; }
form { display: flex; flex-wrap: wrap; gap: .5rem .8rem; align-items: end; margin: .6rem 0; }
label { font-size: .85rem; color: var(--dim); }
input, select, button { font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: 4px; padding: .2rem .5rem; display: block; }
button { cursor: pointer; } form p { margin: 0 0 0 auto; font-size: .85rem; }
thead button { border: 0; background: none; padding: 0; font-weight: 600; }
thead [aria-sort] button::after { content: " ▾"; }
thead [aria-sort=ascending] button::after { content: " ▴"; }
tr[data-level="3"] { background: linear-gradient(90deg, var(--bad-back), transparent 60%); }
tr[data-level="2"] { background: linear-gradient(90deg, var(--warn-back), transparent 60%); }
tr[data-level] > :first-child { border-left: 4px solid transparent; padding-left: .6rem; }
tr[data-level="3"] > :first-child { border-left-color: var(--bad); }
tr[data-level="2"] > :first-child { border-left-color: var(--warn); }
td[data-column=trouble] { min-width: 9rem; max-width: 18rem; }
td[data-column] { font-variant-numeric: tabular-nums; }
.on .static { display: none; }
.stale td, .stale th { opacity: .6; }
svg { display: block; width: 100%; height: 30px; overflow: visible; background: var(--card); }
td svg { width: 8.5rem; margin-bottom: .1rem; }
svg .grid { stroke: var(--grid); } svg .cap { stroke: var(--bad); stroke-dasharray: 4 3; }
svg .line { stroke: var(--ink); fill: none; stroke-width: 1.6; }
svg .area { fill: var(--ink); opacity: .14; }
svg .at { stroke: var(--text); }
svg * { vector-effect: non-scaling-stroke; }
#tip { position: fixed; pointer-events: none; background: var(--text); color: var(--back);
  padding: .1rem .45rem; border-radius: 3px; font-size: .82rem; white-space: nowrap; z-index: 2; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr));
  gap: 1rem 1.4rem; }
figure { margin: 0; } figure svg { height: 90px; }
figcaption { display: flex; justify-content: space-between; gap: 1rem; }
#copy { display: inline; } figcaption small { flex: 1; }
figcaption b { font-variant-numeric: tabular-nums; }
.axis { display: flex; justify-content: space-between; color: var(--dim); font-size: .75rem; }
.use td { width: 28%; } .use ul { margin: 0; padding: 0; list-style: none; font-size: .88rem; }
.use .verdict { font-weight: 600; }
@media (max-width: 44rem) {
  .rows .wide { display: none; }
  .rows td[data-column=trouble] { grid-column: span 2; max-width: none; }
  .rows td[data-column=trouble]::before { content: none; }
  .use thead { display: none; } .use tr, .use th, .use td { display: block; }
  .use td { border: 0; padding: 0 0 .2rem .8rem; } .use td:empty { display: none; }
  .use td::before { content: attr(data-cell) " "; color: var(--dim); }
  td svg { width: 100%; } .use td { width: auto; }
  .charts { grid-template-columns: 1fr; } }
"""
PAGE_JS = r"""
'use strict';
// Live values for the tables, from the same pages of metrics that Prometheus scrapes, with at most
// data-per-minute (an attribute of body) requests a minute. The browser keeps them for an hour.
(() => {

// --- settings

const MINUTE = 60000, HOUR = 60 * MINUTE, FRAME = 15 * MINUTE;
const LIST_PACE = 5000, ONE_PACE = 2000;    // milliseconds between scrapes of a container
const SLOW_PACE = MINUTE;                   // for containers off the screen
const AT_ONCE = 4;                          // requests in flight
const HOLD = MINUTE;                        // how long a problem stays listed after it ends
const MOST_ROWS = 2000;                     // the rest stays on further pages
const perMinute = Number(document.body.dataset.perMinute);
const rules = RULES;                        // the kit's USE table; the server prepends it

// --- formatting

const scaled = (number, base, units, last) => {
  let step = 0;
  while (Math.abs(number) >= 1000 && step < units.length - 1) { number /= base; step++; }
  if (number && Math.abs(number) < 1) return `${Number(number.toPrecision(2))} ${units[0]}${last}`;
  const digits = Math.abs(number) < 10 && (step || !Number.isInteger(number)) ? 1 : 0;
  return number.toFixed(digits) + ' ' + units[step] + last;
};
const bytes = number => scaled(number, 1024, ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'], '');
const perSecond = number => bytes(number) + '/s';
const count = number => scaled(number, 1000, ['', 'k', 'M', 'G', 'T'], '').trim();
const rate = number => count(number) + '/s';
const percent = number => number.toFixed(number < 10 ? 1 : 0) + ' %';
const clock = at => new Date(at).toLocaleTimeString();
const seconds = n => n < 120 ? n.toFixed(0) + ' s' : n < 7200 ? (n / 60).toFixed(0) + ' min' :
  (n / 3600).toFixed(0) + ' h';
const sum = (...parts) => parts.some(part => part === null) ? null : parts.reduce((a, b) => a + b);

// --- a page of metrics

// For each name: kind, help, and the sum, minimum and number of its samples. For the agent's own
// metrics (cmon_…) also each sample with its labels.
const parse = text => {
  const families = {};
  for (const line of text.split('\n')) {
    if (line.startsWith('#')) {
      const [, keyword, name, kind] = line.split(' ', 4);
      if (keyword !== 'TYPE' && keyword !== 'HELP') continue;
      const family = families[name] ||
        (families[name] = {sum: 0, least: Infinity, count: 0, samples: []});
      if (keyword === 'TYPE') family.kind = kind;
      if (keyword === 'HELP') family.help = line.slice(8 + name.length);
    } else if (line) {
      const end = line.search(/[{ ]/), name = line.slice(0, end);
      const value = Number(line.slice(line.lastIndexOf(' ') + 1));
      const family = families[name];
      if (!family || !Number.isFinite(value)) continue;
      family.sum += value;
      family.least = Math.min(family.least, value);
      family.count++;
      if (name.startsWith('cmon_')) family.samples.push([line.slice(end), value]);
    }
  }
  return families;
};

// A page and the one before it. Each method returns a number, or null if there is no value.
class Reading {
  constructor(page, before, elapsed) {
    this.page = page;
    this.before = before;
    this.elapsed = elapsed;
  }
  family(name) { const family = this.page[name]; return family && family.count ? family : null; }
  now(name) { const family = this.family(name); return family ? family.sum : null; }
  least(name) { const family = this.family(name); return family ? family.least : null; }
  count(name) { const family = this.family(name); return family ? family.count : null; }
  increase(name) {                          // of a counter; null after a reset
    const now = this.family(name), before = this.before && this.before[name];
    return now && before && now.sum >= before.sum ? now.sum - before.sum : null;
  }
  rate(name) {
    const increase = this.increase(name);
    return increase === null ? null : increase / this.elapsed;
  }
  value(name) {
    const family = this.family(name);
    return family && family.kind === 'counter' ? this.rate(name) : this.now(name);
  }
}

// --- problems: utilisation, saturation and errors, by the rules of the USE table

const shareOf = (use, reading) => {
  if (!use.share.length) return null;
  const used = reading.value(use.share[0]);
  const whole = use.share.length > 1 ? reading.now(use.share[1]) : reading.count(use.share[0]);
  if (used === null || !whole) return null;
  return use.left ? 1 - used / whole : used / whole;
};

const isTrouble = (name, reading) => {
  if (rules.up.includes(name)) return reading.least(name) === 0;
  const value = reading.value(name), from = name in rules.from ? rules.from[name] : 0;
  return value !== null && from !== null && value > 0 && value >= from;
};

// For one resource: [level, words] for each cell. Levels: 0 good, 2 warning, 3 bad.
const judge = (use, reading) => {
  const share = shareOf(use, reading);
  const full = share !== null && share >= rules.full;
  const busy = share !== null && share >= rules.busy;
  const named = cell => use[cell].filter(name => isTrouble(name, reading));
  const saturated = named('saturation'), failing = named('errors');
  return {
    utilisation: [full ? 3 : busy ? 2 : 0, full ? use.resource + ' limit reached' :
      busy ? `${use.resource} at ${percent(share * 100)}` : '', share],
    saturation: [saturated.length ? 2 : 0, saturated.length ? use.resource +
      (saturated.every(name => name.includes('drop')) ? ' drops' : ' saturated') : '', saturated],
    errors: [failing.length ? 3 : 0, failing.length ? use.resource + ' errors' : '', failing],
  };
};
const CELLS = ['utilisation', 'saturation', 'errors'];

// --- charts by scope; `cap` is the limit of a value

const LOST = ['net_drops_in_total', 'net_drops_out_total', 'net_errors_in_total',
  'net_errors_out_total'];
const SERIES = {
  zone: {
    cpu: {title: 'CPU', show: percent, cap: reading => reading.now('cpucap_limit_percentage'),
      of: reading => {
        const used = sum(reading.rate('cpu_user_usage'), reading.rate('cpu_sys_usage'));
        return used === null ? reading.now('cpucap_cur_usage_percentage') : used / 1e7;
      }},
    mem: {title: 'Memory', show: bytes, of: reading => reading.now('mem_agg_usage'),
      cap: reading => reading.now('mem_limit')},
    swap: {title: 'Swap', show: bytes, of: reading => reading.now('mem_swap'),
      cap: reading => reading.now('mem_swap_limit')},
    net: {title: 'Network', show: perSecond,
      of: reading => sum(reading.rate('net_agg_bytes_in'), reading.rate('net_agg_bytes_out'))},
    disk: {title: 'File I/O', show: perSecond, of: reading =>
      sum(reading.rate('vfs_bytes_read_count'), reading.rate('vfs_bytes_written_count'))},
    lost: {title: 'Network drops and errors', show: rate,
      of: reading => sum(...LOST.map(name => reading.rate(name)))},
    retransmitted: {title: 'TCP retransmissions', show: rate,
      of: reading => reading.rate('tcp_retransmitted_segment_count')},
    processes: {title: 'Processes', show: count, of: reading => reading.now('proc_processes'),
      cap: reading => reading.now('proc_processes_limit')},
  },
  node: {
    cpu: {title: 'CPU', show: percent, cap: () => 100, of: reading => {
      const idle = reading.rate('cpu_idle_seconds_total');
      return idle === null ? null :
        Math.max(0, 100 - 100 * idle / reading.count('cpu_idle_seconds_total'));
    }},
    load: {title: 'Load', show: number => number.toFixed(1),
      of: reading => reading.now('load_average'), cap: reading => reading.now('alloc_cpus')},
    mem: {title: 'Memory', show: bytes, cap: reading => reading.now('memory_total_bytes'),
      of: reading => reading.now('memory_free_bytes') === null ? null :
        reading.now('memory_total_bytes') - reading.now('memory_free_bytes')},
    disk: {title: 'Disks busy', show: percent, cap: () => 100, of: reading => {
      const busy = reading.rate('disk_busy_seconds_total');
      return busy === null ? null : 100 * busy / reading.count('disk_busy_seconds_total');
    }},
    net: {title: 'Network', show: perSecond,
      of: reading =>
        sum(reading.rate('link_bytes_in_total'), reading.rate('link_bytes_out_total'))},
    pool: {title: 'Pool', show: bytes, of: reading => reading.now('zpool_allocated_bytes'),
      cap: reading => reading.now('zpool_size_bytes')},
    soldcpu: {title: 'CPUs sold', show: count, of: reading => reading.now('alloc_cpu_caps_cpus'),
      cap: reading => reading.now('alloc_cpus')},
    soldmem: {title: 'Memory sold', show: bytes,
      of: reading => reading.now('alloc_memory_caps_bytes'),
      cap: reading => reading.now('alloc_memory_bytes')},
  },
};
// Counters that grow with every sample, and the collector whose age dates the sample.
const ALWAYS_GROW = {zone: ['cpu_user_usage', 'cpu_sys_usage'], node: ['cpu_idle_seconds_total']};
const DATED_BY = {zone: '"zone_misc"', node: '"cpu_util"'};

// --- one container or compute node

const COLUMNS = {
  zone: {name: 'Container', trouble: 'Problems', cpu: 'CPU', mem: 'Memory', net: 'Network',
    disk: 'Files', lost: 'Drops, errors', age: 'Age'},
  node: {name: 'Compute node', trouble: 'Problems', cpu: 'CPU', load: 'Load', mem: 'Memory',
    disk: 'Disks busy', soldcpu: 'CPUs sold', soldmem: 'Memory sold', age: 'Age'},
};
const WIDE = ['disk', 'load', 'soldcpu'];   // columns that a phone leaves out
const targets = new Map();

class Target {
  constructor(uuid, scope) {
    Object.assign(this, {uuid, scope, name: '', points: [], caps: {}, seen: new Map(), lost: 0,
      row: null, visible: false, asked: 0, retry: 0, waiting: false, page: null, at: 0, clock: 0,
      reading: null, refusal: '', refusalLevel: 0, partial: ''});
  }

  // From the server. data-asks: the target has a page; data-silent: its node does not answer.
  facts(element) {
    this.asks = 'asks' in element.dataset;
    this.silent = element.dataset.silent || '';
    this.state = element.dataset.state || '';
    this.groups = (element.dataset.groups || '').split(' ');
    this.name = element.dataset.name || element.querySelector('a').textContent;
  }

  take(text, partial) {
    const page = parse(text), now = Date.now(), before = this.page;
    const age = name => {
      const sample = page.cmon_sample_age_seconds &&
        page.cmon_sample_age_seconds.samples.find(([labels]) => labels.includes(name));
      return sample ? sample[1] * 1000 : 0;
    };
    const at = now - age(DATED_BY[this.scope]), timeOfDay = page.time_of_day;
    // The node's clock when it read the counters, so that rates do not depend on response times.
    const clock = timeOfDay && timeOfDay.count ?
      timeOfDay.sum + age('"time"') - age(DATED_BY[this.scope]) : at;
    this.refusal = '';
    this.silent = '';
    this.partial = partial;
    const same = before && at - this.at < 30000 && ALWAYS_GROW[this.scope].every(name =>
      page[name] && before[name] && page[name].sum === before[name].sum);
    if (before && (same || at <= this.at)) {        // a repeated sample is not a rate of zero
      const {before, elapsed} = this.reading || {};
      this.reading = new Reading(page, before, elapsed);
      return;
    }
    const ours = at - this.at, theirs = clock - this.clock;     // theirs jumps if it is set
    const elapsed = theirs > 0 && Math.abs(theirs - ours) < 5000 + ours / 2 ? theirs : ours;
    const reading = new Reading(page, before, elapsed / 1000);
    const point = {at};
    for (const [name, series] of Object.entries(SERIES[this.scope])) {
      point[name] = series.of(reading);
      this.caps[name] = series.cap ? series.cap(reading) : null;
    }
    this.points.push(point);
    while (this.points[0].at < now - HOUR) this.points.shift();
    for (const name of LOST) this.lost += reading.increase(name) || 0;
    Object.assign(this, {page, reading, at, clock});
    for (const use of rules.use[this.scope] || []) {
      const cells = judge(use, reading);
      for (const cell of CELLS)
        if (cells[cell][0]) this.seen.set(use.resource + ' ' + cell, [cells[cell], now]);
    }
  }

  // [level, words] of each current problem, worst first.
  troubles() {
    if (this.silent) return [[3, 'compute node does not answer']];
    if (this.refusal) return [[this.refusalLevel, this.refusal]];
    if (!this.asks) return [[0, this.state]];
    const troubles = [];
    for (const [key, [[level, words], at]] of this.seen)
      if (at < Date.now() - HOLD) this.seen.delete(key); else troubles.push([level, words]);
    if (this.partial) troubles.push([2, 'incomplete: ' + this.partial]);
    return troubles.sort((a, b) => b[0] - a[0]);
  }
  level() { return Math.max(0, ...this.troubles().map(trouble => trouble[0])); }
  words() { return this.troubles().map(trouble => trouble[1]).join('; '); }
  value(name) {
    for (let i = this.points.length - 1; i >= Math.max(0, this.points.length - 3); i--)
      if (this.points[i][name] !== null) return this.points[i][name];
    return null;
  }
  // The sort key of a column: for values with a cap, the share of it.
  rank(name) {
    const value = this.value(name), cap = this.caps[name];
    return value === null || value === undefined ? -1 : cap ? value / cap : value / 1e15;
  }
  display(name) {
    const value = this.value(name), cap = this.caps[name], show = SERIES[this.scope][name].show;
    if (value === null || value === undefined) return this.points.length ? 'none' : '';
    return cap ? `${show(value)} of ${show(cap)}` : show(value);
  }
}

// --- requests

const sent = [];                            // when the requests of the last minute were sent
let inFlight = 0, unansweredSince = 0, failures = 0, pausedUntil = 0;

const left = () => {
  while (sent.length && sent[0] < Date.now() - MINUTE) sent.shift();
  return perMinute - sent.length;
};

const banner = document.getElementById('banner');
const showBanner = words => {
  banner.hidden = !words;
  if (banner.textContent !== words) banner.textContent = words;
  document.body.classList.toggle('stale', Boolean(words));
};

const pause = (milliseconds, words) => {
  pausedUntil = Date.now() + milliseconds;
  showBanner(words);
};

// The answer, or null if there is none. Handles refusals and failures that concern all requests.
const request = async path => {
  sent.push(Date.now());
  inFlight++;
  const stop = new AbortController(), timer = setTimeout(() => stop.abort(), 15000);
  try {
    const answer = await fetch(path, {signal: stop.signal, cache: 'no-store'});
    const body = await answer.text();
    failures = unansweredSince = 0;
    if (answer.status === 401 || answer.status === 403)
      pause(MINUTE, 'The proxy refuses this browser: ' + body.trim());
    else if (answer.status === 429)
      pause(1000 * Number(answer.headers.get('Retry-After') || 10), 'Paused: ' + body.trim());
    else if (Date.now() > pausedUntil) showBanner('');
    return {status: answer.status, body, headers: answer.headers};
  } catch (error) {
    unansweredSince = unansweredSince || Date.now();
    const delay = Math.min(MINUTE, 2500 * Math.pow(2, failures++));
    pause(delay, `The proxy has not answered since ${clock(unansweredSince)}. ` +
      'The values below are old; retrying automatically.');
    return null;
  } finally {
    clearTimeout(timer);
    inFlight--;
  }
};

const poll = async target => {
  target.asked = Date.now();
  target.waiting = true;
  const answer = await request(`/v1/${target.uuid}/metrics`);
  target.waiting = false;
  if (!answer) return;
  if (answer.status === 200) {
    target.retry = 0;
    target.take(answer.body, answer.headers.get('X-Cmon-Partial') || '');
  } else if (![401, 403, 429].includes(answer.status)) {
    const code = answer.headers.get('X-Cmon-Error') || '', silent = code.startsWith('node_');
    target.refusal = silent ? 'compute node: ' + answer.body.trim() : answer.body.trim();
    if (code === 'node_silent') target.refusal = 'compute node does not answer';
    if (code === 'no_page') target.refusal = answer.headers.get('X-Cmon-State');
    target.refusalLevel = silent || answer.status === 504 ? 3 : 2;
    target.retry = 20000;
  }
  paint(target);
};

const next = () => {
  const now = Date.now(), open = left();
  const all = [...targets.values()].filter(target => target.asks);
  const seen = all.filter(target => target.visible);
  const pace = Math.max(shown.uuid ? ONE_PACE : LIST_PACE,
    seen.length * MINUTE / (perMinute * .75));
  const mostOverdue = (some, interval) => some.reduce((best, target) => {
    const late = target.waiting ? 0 : now - target.asked - Math.max(interval, target.retry);
    return late > best[0] ? [late, target] : best;
  }, [0, null])[1];
  const spare = open >= perMinute * .25;    // the last quarter is for what is on the screen
  return open <= 0 ? null : mostOverdue(seen.filter(target => !target.asked), 0) ||
    spare && mostOverdue(all.filter(target => !target.asked), 0) || mostOverdue(seen, pace) ||
    spare && mostOverdue(all, SLOW_PACE);
};

// --- charts

const WIDTH = 300, HEIGHT = 60;
const make = (name, attributes) => {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const key of Object.keys(attributes)) made.setAttribute(key, attributes[key]);
  return made;
};

const chart = (target, name, span) => {
  const svg = make('svg', {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: 'none',
    role: 'img'});
  for (const third of [0, 1, 2, 3])
    svg.append(make('path', {class: 'grid', d: `M${third * WIDTH / 3} 0V${HEIGHT}`}));
  svg.append(make('path', {class: 'area'}), make('path', {class: 'line'}),
    make('path', {class: 'cap'}), make('path', {class: 'at'}));
  svg.chart = {target, name, span};
  return svg;
};

const draw = svg => {
  const {target, name, span} = svg.chart, now = Date.now(), cap = target.caps[name];
  const points = target.points.filter(point => point.at > now - span && point[name] !== null);
  const top = 1.06 * Math.max(cap || 0, ...points.map(point => point[name])) || 1;
  const y = value => (HEIGHT - value / top * HEIGHT).toFixed(1);
  let line = '', area = '', last = null, from = 0;
  points.forEach((point, index) => {
    const x = WIDTH - (now - point.at) / span * WIDTH, gap = !last || point.at - last > 3 * MINUTE;
    if (gap && last) area += `V${HEIGHT}H${from}Z`;
    if (gap) from = x.toFixed(1);
    line += `${gap ? 'M' : 'L'}${x.toFixed(1)} ${y(point[name])}`;
    area += `${gap ? `M${from} ${HEIGHT}L` : 'L'}${x.toFixed(1)} ${y(point[name])}`;
    last = point.at;
    if (index === points.length - 1) area += `V${HEIGHT}H${from}Z`;
    if (gap) line += 'h1.5';                // draw a single point as a dot
  });
  svg.querySelector('.line').setAttribute('d', line);
  svg.querySelector('.area').setAttribute('d', area);
  svg.querySelector('.cap').setAttribute('d', cap ? `M0 ${y(cap)}H${WIDTH}` : '');
  const values = points.map(point => point[name]), show = SERIES[target.scope][name].show;
  svg.highest = values.length ? 'max. ' + show(Math.max(...values)) : '';
  svg.setAttribute('aria-label', `${SERIES[target.scope][name].title} of ${target.name}: ` +
    (values.length ? `${target.display(name)}; from ${show(Math.min(...values))} to ` +
      `${show(Math.max(...values))} in ${span / MINUTE} minutes` : 'no values yet'));
};

// Value and time at the pointer, or at the position chosen with the arrow keys.
const tip = document.createElement('div');
tip.id = 'tip';
tip.hidden = true;
tip.setAttribute('role', 'status');
document.body.append(tip);
let marked = null;
const unmark = () => {
  if (marked) marked.querySelector('.at').setAttribute('d', '');
  marked = null;
  tip.hidden = true;
};
const mark = (svg, share) => {
  if (marked !== svg) unmark();
  const {target, name, span} = svg.chart, now = Date.now();
  const wanted = now - (1 - share) * span;
  let best = null;
  for (const point of target.points)
    if (point[name] !== null && point.at > now - span &&
        (!best || Math.abs(point.at - wanted) < Math.abs(best.at - wanted))) best = point;
  if (!best) return;
  marked = svg;
  svg.share = 1 - (now - best.at) / span;
  svg.querySelector('.at').setAttribute('d', `M${(svg.share * WIDTH).toFixed(1)} 0V${HEIGHT}`);
  tip.textContent = `${SERIES[target.scope][name].show(best[name])} at ${clock(best.at)}`;
  tip.hidden = false;
  const box = svg.getBoundingClientRect();
  const x = Math.min(Math.max(box.left + svg.share * box.width - tip.offsetWidth / 2, 4),
    document.documentElement.clientWidth - tip.offsetWidth - 4);
  tip.style.left = x + 'px';
  tip.style.top = Math.max(box.top - tip.offsetHeight - 3, 2) + 'px';
};
for (const event of ['pointermove', 'pointerdown'])
  document.addEventListener(event, ({target, clientX}) => {
    const svg = target.closest && target.closest('svg');
    if (!svg || !svg.chart) { unmark(); return; }
    const box = svg.getBoundingClientRect();
    mark(svg, (clientX - box.left) / box.width);
  });
document.addEventListener('keydown', event => {
  const svg = document.activeElement, step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (event.key === 'Escape') unmark();
  if (!step || !svg.chart) return;
  event.preventDefault();
  mark(svg, Math.min(1, Math.max(0, (svg.share === undefined ? 1 : svg.share) + step / 60)));
});

// --- the screen: the overview, or one container or compute node

let shown = {};                             // {main, uuid, figures}

const put = (element, text) => {
  if (element && element.textContent !== text) element.textContent = text;
};

const paint = target => {
  if (shown.uuid) {
    if (shown.uuid === target.uuid) paintOne(target);
    return;
  }
  const row = target.row, level = target.level();
  if (!row || (!target.visible && row.dataset.level === String(level))) return;
  row.dataset.level = level;
  const words = target.words();
  for (const cell of row.querySelectorAll('[data-column]')) {
    const name = cell.dataset.column;
    if (name === 'trouble') {
      put(cell, words || (target.page ? 'none' : target.asks ? '…' : target.state));
      cell.className = level > 2 ? 'bad' : level > 1 ? 'warn' : 'dim';
    } else if (name === 'lost') {
      put(cell, target.page && target.asks ? count(target.lost) : '');
      cell.classList.toggle('warn', target.lost > 0);
    } else if (name !== 'age' && target.points.length) {
      if (!cell.firstChild)
        cell.append(chart(target, name, FRAME), document.createElement('small'));
      draw(cell.firstChild);
      put(cell.lastChild, target.display(name));
    }
  }
};

const paintAge = target => {
  const cell = target.row && target.row.querySelector('[data-column=age]');
  if (target.at) put(cell, seconds((Date.now() - target.at) / 1000));
};

const value = (name, reading) => {
  const number = reading.value(name), family = reading.family(name);
  if (number === null) return family ? '…' : 'none';
  if (/nanosecond/.test(family.help)) return (number / 1e9).toFixed(2) + ' s/s';
  const show = /byte|zfs_(used|avail|quota)|mem_(agg|limit|swap)/.test(name) ? bytes : count;
  return show(number) + (family.kind === 'counter' ? '/s' : '');
};

const paintOne = target => {
  const {main, figures} = shown;
  for (const {svg, current, highest} of figures) {
    draw(svg);
    put(current, target.display(svg.chart.name));
    put(highest, svg.highest);
  }
  const summary = main.querySelector('#summary'), level = target.level();
  put(summary, target.words() || (target.page ? 'No problems found.' : 'Loading …'));
  summary.className = level > 2 ? 'bad' : level > 1 ? 'warn' : 'good';
  const reading = target.reading;
  if (!reading) return;
  for (const cell of main.querySelectorAll('[data-cell]')) {
    const use = rules.use[target.scope][Number(cell.dataset.resource)];
    const [level, , detail] = judge(use, reading)[cell.dataset.cell];
    const names = use[cell.dataset.cell], known = names.filter(name => reading.family(name));
    const verdict = cell.querySelector('.verdict');
    const words = !known.length ? '' :
      cell.dataset.cell !== 'utilisation' ? (level ? 'yes' : 'no') :
        detail !== null ? percent(detail * 100) : use.share.length ? 'no limit' : '';
    put(verdict, words);
    verdict.className = 'verdict ' + (level > 2 ? 'bad' : level > 1 ? 'warn' :
      words === 'no limit' ? 'dim' : 'good');
    cell.parentNode.hidden = !CELLS.some(cell => use[cell].some(name => reading.family(name)));
    cell.querySelectorAll('li').forEach((item, index) => {
      const name = names[index], family = reading.family(name);
      item.hidden = !family;
      if (!family) return;
      item.title = family.help;
      put(item, name + ': ' + value(name, reading));
    });
  }
  const samples = (name, test) => ((reading.page[name] || {samples: []}).samples)
    .filter(([, number]) => test(number))
    .map(([labels, number]) => [labels.split('"')[1], number]);
  const missing = [
    ...samples('cmon_collector_up', number => number === 0).map(([name]) =>
      `${name}: the agent cannot read it; see the agent's log or web page`),
    ...samples('cmon_sample_age_seconds', number => number > 60).map(([name, age]) =>
      `${name}: last read ${seconds(age)} ago`),
    ...Object.keys(reading.page).filter(name => name.endsWith('_metrics_available_boolean') &&
      reading.now(name) === 0).map(name => name.replace('_metrics_available_boolean', '') +
      ': not available on this ' + (target.scope === 'zone' ? 'container' : 'node')),
    ...rules.use[target.scope].filter(({share}) => share.length > 1 && !reading.family(share[1]) &&
      reading.family(share[0])).map(use => `${use.resource}: no limit is set (${use.share[1]})`),
  ];
  if (!missing.length) missing.push('Nothing.');
  const list = main.querySelector('#missing');
  if (list.textContent !== missing.join('')) list.replaceChildren(...missing.map(words => {
    const item = document.createElement('li');
    item.textContent = words;
    return item;
  }));
};

const onScreen = new IntersectionObserver(entries => {
  for (const entry of entries) {
    const target = targets.get(entry.target.dataset.uuid);
    if (!target || shown.uuid) continue;    // the list is no longer shown
    target.visible = entry.isIntersecting;
    if (target.visible) paint(target);
  }
}, {rootMargin: '60px'});

// Create or update targets from the rows of a page from the server.
const adopt = (main, fresh) => {
  for (const row of main.querySelectorAll('tr[data-uuid]')) {
    const {uuid} = row.dataset, scope = row.closest('table').dataset.scope;
    let target = targets.get(uuid);
    if (!target) targets.set(uuid, target = new Target(uuid, scope));
    target.facts(row);
    if (fresh && target.row) {              // keep the displayed row, update its data
      Object.assign(target.row.dataset, {state: target.state, groups: row.dataset.groups || ''});
      const old = target.row.querySelectorAll('.static'), now = row.querySelectorAll('.static');
      old.forEach((cell, index) => now[index] && cell.replaceWith(now[index]));
    } else if (target.row !== row) {
      target.row = row;
      for (const name of Object.keys(COLUMNS[scope]).slice(1)) {
        const cell = row.insertCell();
        Object.assign(cell.dataset, {column: name, title: COLUMNS[scope][name]});
        if (WIDE.includes(name)) cell.className = 'wide';
      }
      const body = fresh && document.querySelector(`table[data-scope=${scope}] tbody`);
      if (body) body.append(row);
      onScreen.observe(row);
    }
  }
};

// --- the overview: sort, filter, summary

const form = () => shown.main.querySelector('form');
let sortBy = 'trouble', upwards = false;

const ranked = () => {
  const rank = {trouble: t => t.level() * 2 + (t.asks ? 1 : 0), age: t => t.at ? -t.at : -Infinity,
    lost: t => t.lost, name: null};
  const of = rank[sortBy] || (target => target.rank(sortBy)), sign = upwards ? 1 : -1;
  const byName = (a, b) => a.name.localeCompare(b.name, undefined, {numeric: true});
  const keys = sortBy === 'name' ? null : new Map([...targets.values()].map(t => [t, of(t)]));
  return [...targets.values()].filter(target => target.row).sort((a, b) =>
    (keys ? sign * (keys.get(a) - keys.get(b)) : sign * byName(a, b)) || byName(a, b));
};

const arrange = () => {
  if (shown.uuid || !form()) return;
  const {text, group, state} = form().elements, wanted = text.value.trim().toLowerCase();
  let count = 0, all = 0;
  for (const target of ranked()) {
    const row = target.row, body = row.parentNode;
    body.append(row);
    if (target.scope !== 'zone') continue;
    all++;
    row.hidden = !((!wanted || target.name.toLowerCase().includes(wanted) ||
      target.uuid.startsWith(wanted)) && (!group.value || target.groups.includes(group.value)) &&
      (!state.value || (state.value === '!' ? target.level() > 1 : target.state === state.value)));
    if (!row.hidden) count++;
  }
  put(form().querySelector('output'), count < all ? `${count} of ${all}` : `${all}`);
  for (const head of shown.main.querySelectorAll('thead th')) {
    const button = head.querySelector('button');
    if (button && button.value === sortBy)
      head.setAttribute('aria-sort', upwards ? 'ascending' : 'descending');
    else head.removeAttribute('aria-sort');
  }
  form().elements.sort.value = sortBy;
};

const summarise = () => {
  if (shown.uuid) return;
  const all = [...targets.values()].filter(target => target.row);
  const known = all.filter(target => target.page || target.refusal || !target.asks).length;
  const troubled = all.filter(target => target.level() > 1).sort((a, b) => b.level() - a.level());
  const summary = shown.main.querySelector('#summary');
  const named = troubled.slice(0, matchMedia('(max-width: 44rem)').matches ? 5 : 12);
  const words = (troubled.length ? `${troubled.length} of ${all.length} need attention. ` : '') +
    (known < all.length ? `Loaded ${known} of ${all.length} …` :
      troubled.length ? '' : 'No problems found.');
  const lines = named.map(target => `${target.name}\n${target.words()}`);
  const key = words + lines.join('\n');
  if (summary.key === key) return;
  summary.key = key;
  summary.className = troubled.some(target => target.level() > 2) ? 'bad' :
    troubled.length ? 'warn' : 'good';
  const list = document.createElement('ul');
  for (const target of named) {
    const item = document.createElement('li'), link = document.createElement('a');
    link.href = (target.scope === 'zone' ? '/c/' : '/n/') + target.uuid;
    link.textContent = target.name;
    item.append(link, ': ' + target.words());
    list.append(item);
  }
  summary.replaceChildren(words, list);
  const hidden = troubled.length - named.length;
  if (hidden) summary.append(`and ${hidden} more, below`);
  document.title = (troubled.length ? `(${troubled.length}) ` : '') + 'Container Monitor';
};

// Sort buttons: one replaces the first heading, the others follow the existing headings.
const headings = table => {
  const columns = COLUMNS[table.dataset.scope], row = table.tHead.rows[0];
  for (const name of Object.keys(columns)) {
    const head = name === 'name' ? row.cells[0] : document.createElement('th');
    const button = document.createElement('button');
    Object.assign(button, {type: 'button', value: name, textContent: columns[name]});
    button.addEventListener('click', () => {
      upwards = sortBy === name ? !upwards : name === 'name';
      sortBy = name;
      arrange();
    });
    head.setAttribute('scope', 'col');
    if (WIDE.includes(name)) head.className = 'wide';
    head.replaceChildren(button);
    row.append(head);
    if (name === 'name') row.prepend(head);
  }
};

const options = (select, values) => {
  for (const value of Object.keys(values)) {
    if (!value || [...select.options].some(option => option.value === value)) continue;
    select.append(new Option(values[value], value));
  }
  select.parentNode.hidden = select.options.length < 2;
};

const fill = () => {
  if (!form()) return;
  const all = [...targets.values()].filter(target => target.scope === 'zone');
  const present = values => values.sort().reduce((a, v) => Object.assign(a, {[v]: v}), {});
  options(form().elements.group, present([].concat(...all.map(target => target.groups))));
  options(form().elements.state, present(all.map(target => target.state)));
};

const home = '/' + (location.pathname === '/' ? location.search : '');

// Loads the other pages of a long list and, each minute, what has changed on the server.
let renewed = Date.now(), renewing = false;
const renew = async first => {
  renewing = true;
  const present = new Set();
  for (let path = home, rows = 0, whole = true; ; ) {
    let page = document;
    if (!first || path !== home) {
      const answer = left() > 0 ? await request(path) : null;
      if (!answer || answer.status !== 200) break;
      page = new DOMParser().parseFromString(answer.body, 'text/html');
    }
    const nextLink = page.querySelector('a[rel=next]');
    for (const row of page.querySelectorAll('tr[data-uuid]')) present.add(row.dataset.uuid);
    if (page !== document) adopt(page.querySelector('main'), true);
    for (const facts of path === home ? ['header .facts', '#proxy'] : []) {
      const old = document.querySelector(facts), now = page.querySelector(facts);
      if (old && now && old !== now) old.replaceWith(now);
    }
    rows = present.size;
    if (nextLink && rows < MOST_ROWS) { path = nextLink.getAttribute('href'); continue; }
    whole = !nextLink;
    for (const target of whole ? targets.values() : [])
      if (!present.has(target.uuid)) {
        if (target.row) target.row.remove();
        targets.delete(target.uuid);
      }
    for (const link of document.querySelectorAll('.pages')) link.hidden = whole;
    break;
  }
  fill();
  arrange();
  renewed = Date.now();
  renewing = false;
};

// --- one container or compute node

const openOne = main => {
  const {uuid, scope} = main.dataset;
  let target = targets.get(uuid);
  if (!target) targets.set(uuid, target = new Target(uuid, scope));
  target.facts(main);
  target.visible = true;
  const charts = main.querySelector('.charts'), figures = [];
  for (const name of Object.keys(SERIES[scope])) {
    const figure = document.createElement('figure'), caption = document.createElement('figcaption');
    const svg = chart(target, name, HOUR), current = document.createElement('b');
    const axis = document.createElement('div');
    axis.className = 'axis';
    for (const words of ['60 min ago', '40', '20', 'now']) {
      const tick = document.createElement('span');
      tick.textContent = words;
      axis.append(tick);
    }
    const highest = document.createElement('small');
    svg.setAttribute('tabindex', '0');
    caption.append(SERIES[scope][name].title, highest, current);
    figure.append(caption, svg, axis);
    charts.append(figure);
    figures.push({svg, current, highest});
  }
  shown = {main, uuid, figures};
  const copy = main.querySelector('#copy');
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.onclick = () => navigator.clipboard.writeText(main.querySelector('pre').textContent)
      .then(() => put(copy, 'Copied'), () => put(copy, 'Copying failed: select the text'));
  }
  paintOne(target);
};

const openList = main => {
  shown = {main};
  if (!main.adopted) {
    main.adopted = true;
    adopt(main, false);
    form().hidden = false;
    form().addEventListener('input', event => {
      if (event.target.name === 'sort') {
        sortBy = event.target.value;
        upwards = sortBy === 'name';
      }
      arrange();
    });
    form().addEventListener('submit', event => event.preventDefault());
    for (const table of main.querySelectorAll('table')) headings(table);
    options(form().elements.sort, COLUMNS.zone);
    renew(true);
  }
  for (const target of targets.values()) {
    if (target.row) { onScreen.unobserve(target.row); onScreen.observe(target.row); }
    else target.visible = false;
  }
  arrange();
};

const open = main => {
  unmark();
  for (const target of targets.values()) target.visible = false;
  document.title = (main.dataset.name ? main.dataset.name + ' – ' : '') + 'Container Monitor';
  if (main.dataset.uuid) openOne(main); else openList(main);
};

// Links between the pages only replace <main>, so that the values so far are kept.
let list = null, scrolled = 0;
const go = async path => {
  let main = path === '/' ? list : null;
  if (!main) {
    const answer = await request(path);
    if (!answer || answer.status !== 200) {
      if (answer) showBanner(answer.body.trim());
      return false;
    }
    main = new DOMParser().parseFromString(answer.body, 'text/html').querySelector('main');
    document.adoptNode(main);
  }
  if (shown.main === list) scrolled = window.scrollY;
  if (path === '/') list = main;
  shown.main.replaceWith(main);
  open(main);
  window.scrollTo(0, main === list ? scrolled : 0);
  main.querySelector('h2').focus({preventScroll: true});
  return true;
};

document.addEventListener('click', async event => {
  const link = event.target.closest && event.target.closest('a');
  if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey ||
      !/^\/(([cn]\/.+)|$)/.test(link.getAttribute('href'))) return;
  event.preventDefault();
  if (await go(link.getAttribute('href'))) history.pushState(null, '', link.getAttribute('href'));
});
window.addEventListener('popstate', () => go(location.pathname));

// --- keep values and the request count across a reload

const KEPT = 'cmon-figures';
window.addEventListener('pagehide', () => {
  const points = {};
  for (const target of targets.values())
    points[target.uuid] = target.points.filter(point => point.at > Date.now() - FRAME);
  for (const kept of [{sent, points}, {sent, points: {}}])
    try {
      sessionStorage.setItem(KEPT, JSON.stringify(kept));
      return;
    } catch (error) { /* too large: try without the values */ }
});

// --- start

document.body.classList.add('on');
const main = document.querySelector('main');
if (location.pathname === '/') list = main;
open(main);
try {
  const kept = JSON.parse(sessionStorage.getItem(KEPT));
  sent.push(...kept.sent);
  for (const target of targets.values()) target.points = kept.points[target.uuid] || [];
} catch (error) { /* none */ }

setInterval(() => {
  if (document.hidden || Date.now() < pausedUntil) return;
  while (inFlight < AT_ONCE) {
    const target = next();
    if (!target) break;
    poll(target);
  }
}, 200);
setInterval(() => {
  if (document.hidden) return;
  for (const target of targets.values()) if (target.visible) paintAge(target);
  summarise();
}, 1000);
setInterval(() => {                         // never move rows under the pointer or focus
  if (document.hidden || shown.uuid) return;
  for (const target of targets.values()) paint(target);
  const rows = shown.main.querySelector('tbody');
  if (!shown.main.querySelector('tbody:hover') && !(rows && rows.contains(document.activeElement)))
    arrange();
  if (Date.now() - renewed > MINUTE && !renewing && Date.now() > pausedUntil) renew(false);
}, 3000);

})();
"""


# --- workers --------------------------------------------------------------------------------------

# With `workers: N` the first process opens the listening socket, serves the admin listener and
# starts N workers, which accept on that socket. Four times a second each worker reports over a
# socket pair what accounts have used: together they enforce one quota, exact to what they admit in
# a quarter of a second.

FamiliesPage = Callable[[Iterable[Family]], Response]       # made from a whole proxy's metrics
EXCHANGE_SECONDS = 0.25
METRICS_SECONDS = 2.0               # workers that do not answer in time are left out
WORKER_GRACE_SECONDS = 15.0         # longer than the server's own grace time
MAX_BACKLOG = 8 << 20               # bytes queued for a worker that does not read; more is dropped
# gauges that combine by minimum; those below are equal in all workers and combine by maximum; all
# others are summed
LEAST = frozenset(("cmon_proxy_node_up", "cmon_proxy_inventory_ready", "process_max_fds",
                   "cmon_proxy_config_last_reload_successful",
                   "cmon_proxy_config_last_reload_success_timestamp_seconds",
                   "cmon_proxy_inventory_last_reload_successful",
                   "cmon_proxy_inventory_last_reload_success_timestamp_seconds",
                   "cmon_proxy_changefeed_connected", "process_start_time_seconds",
                   "cmon_proxy_server_certificate_expiry_timestamp_seconds"))
GREATEST = frozenset(("cmon_proxy_build_info", "cmon_proxy_inventory_age_seconds",
                      "cmon_proxy_inventory_vms", "cmon_proxy_inventory_nodes",
                      "cmon_proxy_inventory_warnings"))


class Channel:
    """JSON messages, a line each, over a socket pair; in the loop, never blocking."""

    def __init__(self, server: Server, end: socket.socket, heard: Callable[[Any], None],
                 ended: Callable[[], None]) -> None:
        self._server, self._socket, self._heard, self._ended = server, end, heard, ended
        self._received = b""
        self._unsent = b""
        self.open = True
        end.setblocking(False)
        server.loop.watch(end, selectors.EVENT_READ, self)

    def say(self, message: Any) -> None:
        """Send a message, now or when the other side reads."""
        line = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
        if self.open and len(self._unsent) < MAX_BACKLOG:
            self._unsent += line
            self._send()

    def _send(self) -> None:
        try:
            while self._unsent:
                sent = self._socket.send(self._unsent)
                self._unsent = self._unsent[sent:]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        self._server.loop.watch(self._socket, selectors.EVENT_READ | (
            selectors.EVENT_WRITE if self._unsent else 0), self)

    def ready(self, mask: int) -> None:
        """Called by the selector."""
        if mask & selectors.EVENT_WRITE:
            self._send()
        if not mask & selectors.EVENT_READ or not self.open:
            return
        try:
            received = self._socket.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self.close()
            self._ended()
            return
        *lines, self._received = (self._received + received).split(b"\n")
        for line in lines:
            self._heard(json.loads(line))

    def close(self) -> None:
        """Close the connection."""
        if self.open:
            self.open = False
            self._server.loop.unwatch(self._socket)
            self._socket.close()


class WorkerSide:
    """Exchanges usage with the other workers."""

    def __init__(self, proxy: Proxy, registry: Registry, end: socket.socket) -> None:
        self._proxy, self._registry = proxy, registry
        # stop with the first process: nothing else would replace or stop this worker
        self._channel = Channel(proxy.server, end, self._heard, proxy.server.stop)
        proxy.server.loop.every(EXCHANGE_SECONDS, self._tell)

    def _tell(self) -> None:
        proxy = self._proxy
        self._channel.say({"spent": proxy.quotas.spent(), "last": proxy.pages.scrapes.fresh(),
                           "ready": proxy.inventory.refusal is None})

    def _heard(self, message: Any) -> None:
        if "ask" in message:
            self._channel.say({"answer": message["ask"], "families": self._registry.families()})
            return
        self._proxy.quotas.debit(message["spent"])
        self._proxy.pages.scrapes.learn(message["last"])


class Worker:
    """A worker, in the first process."""

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel, started: float) -> None:
        self.process, self.channel, self.started = process, channel, started
        self.ready = False


class Workers:
    """Starts workers, replaces those that die, relays their messages."""

    def __init__(self, server: Server, count: int, listening: socket.socket,
                 command: Sequence[str]) -> None:
        self._server, self._listening, self._command = server, listening, list(command)
        self._workers: dict[int, Worker] = {}
        self._backoffs = [Backoff(1.0, 30.0) for _ in range(count)]
        self._not_before = [0.0] * count
        self._asked: dict[int, tuple[set[int], list[list[Family]], Callable[[], None]]] = {}
        self._serial = 0
        self._count = count
        self.restarts = 0
        for number in range(count):
            self._start(number)
        server.loop.every(0.5, self._supervise)

    def _start(self, number: int) -> None:
        ours, theirs = socket.socketpair()
        passed = self._listening.fileno(), theirs.fileno()
        try:
            process = subprocess.Popen(
                [*self._command, "--worker", "%d,%d,%d" % (number, *passed)], pass_fds=passed,
                stdin=subprocess.DEVNULL)
        except OSError as error:
            log.error("cannot start worker %d: %s", number, error)
            ours.close()
            return
        finally:
            theirs.close()
        channel = Channel(self._server, ours, lambda message: self._heard(number, message),
                          lambda: None)
        self._workers[number] = Worker(process, channel, self._server.now())

    def _supervise(self) -> None:
        if self._server.stopping:
            return
        now = self._server.now()
        for number in range(self._count):
            worker = self._workers.get(number)
            if worker is not None and worker.process.poll() is not None:
                log.error("worker %d (pid %d) exited with status %s: starting a new one", number,
                          worker.process.pid, worker.process.returncode)
                worker.channel.close()
                del self._workers[number]
                if now - worker.started > 10:
                    self._backoffs[number].reset()
                    self._not_before[number] = now
                else:
                    self._not_before[number] = now + self._backoffs[number].next()
                self.restarts += 1
            if number not in self._workers and now >= self._not_before[number]:
                self._start(number)

    def _heard(self, number: int, message: Any) -> None:
        if "answer" in message:
            waiting, pages, finish = self._asked.get(message["answer"], (set(), [], lambda: None))
            if number in waiting:
                waiting.discard(number)
                pages.append([Family(name, kind, text, [Sample(
                    tuple((str(label), str(value)) for label, value in labels), value, suffix)
                    for labels, value, suffix in samples])
                    for name, kind, text, samples in message["families"]])
                if not waiting:
                    finish()
            return
        self._workers[number].ready = message["ready"]
        if message["spent"] or message["last"]:
            line = json.dumps(message).encode() + b"\n"
            for other, worker in self._workers.items():
                if other != number:
                    worker.channel.say(line)

    @property
    def ready(self) -> bool:
        """Whether all workers run and have an inventory."""
        return len(self._workers) == self._count and all(
            worker.ready for worker in self._workers.values())

    def gather(self, families: list[Family], make: FamiliesPage) -> Deferred:
        """A page made from the metrics of all processes."""
        self._serial += 1
        serial, waiting = self._serial, set(self._workers)
        pages: list[list[Family]] = [families]

        def page(_: object) -> Response:
            self._asked.pop(serial, None)
            return make(summed(pages))
        later = Deferred(self._server.now() + METRICS_SECONDS, page)
        self._asked[serial] = (waiting, pages, later.expire)
        for worker in self._workers.values():
            worker.channel.say({"ask": serial})
        if not waiting:
            later.expire()
        return later

    def families(self) -> list[Family]:
        """Metrics for `admin_listen`."""
        return [single("cmon_proxy_workers", GAUGE, "Number of running worker processes.",
                       len(self._workers)),
                single("cmon_proxy_worker_restarts_total", COUNTER, "Total number of workers that "
                       "were replaced.", self.restarts)]

    def reload(self) -> None:
        """Have all workers reread their settings."""
        for worker in self._workers.values():
            worker.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """Stop all workers after they finish their requests. Blocks."""
        for worker in self._workers.values():
            if worker.process.poll() is None:
                worker.process.terminate()
        end = time.monotonic() + WORKER_GRACE_SECONDS
        for worker in self._workers.values():
            try:
                worker.process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


def summed(pages: Iterable[Iterable[Family]]) -> list[Family]:
    """Merge the metrics of several processes."""
    merged: dict[str, Family] = {}
    values: dict[str, dict[tuple[Any, str], Any]] = {}
    for page in pages:
        for family in page:
            merged.setdefault(family.name, family)
            into = values.setdefault(family.name, {})
            for labels, value, suffix in family.samples:
                key = (tuple(labels), suffix)
                if key not in into:
                    into[key] = value
                elif family.kind == GAUGE and family.name in LEAST:
                    into[key] = min(into[key], value)
                elif family.kind == GAUGE and family.name in GREATEST:
                    into[key] = max(into[key], value)
                else:
                    into[key] += value
    return [family._replace(samples=[Sample(labels, value, suffix) for (labels, suffix), value
                                     in values[name].items()])
            for name, family in merged.items()]


def interpreter_command() -> list[str]:
    """The interpreter with its flags: a worker must not import more than the first process."""
    flags = sys.flags
    return [sys.executable, *[flag for flag, given in (
        ("-I", flags.isolated), ("-s", flags.no_user_site and not flags.isolated),
        ("-E", flags.ignore_environment and not flags.isolated), ("-S", flags.no_site)) if given],
        "-X", "utf8"]


# --- main -----------------------------------------------------------------------------------------


WARN_DAYS = (30.0, 7.0, 1.0)    # before the server's certificate expires


def metrics_page(families: Iterable[Family]) -> Response:
    """The proxy's own metrics."""
    return Response(200, render(families).encode(), PAGE)


# Pages of `admin_listen`, each made from the metrics of all processes: the answer does not depend
# on the number of workers.
ADMIN_PAGES: dict[str, FamiliesPage] = {"/metrics": metrics_page}


def admin_routes(gather: Callable[[FamiliesPage], Answer | Deferred], is_ready: Action
                 ) -> tuple[Route, ...]:
    """The routes of `admin_listen`; `gather` calls a page with the metrics."""
    def route(path: str, page: FamiliesPage) -> Route:
        return Route("GET", path, lambda request: gather(page))
    pages = [route(*item) for item in ADMIN_PAGES.items()]
    return (*pages, Route("GET", "/-/healthy", lambda request: text(200, "OK")),
            Route("GET", "/-/ready", is_ready), Route("GET", "/", landing))


def landing(_request: Request) -> Answer:
    """The page of `admin_listen`."""
    links = " ·\n".join(f'<a href="{path}">{path}</a>'
                        for path in (*ADMIN_PAGES, "/-/healthy", "/-/ready"))
    return plain_page("Container Monitor proxy", (f"version {__version__}",), f"""\
<p>{links}</p>
<p>Tenants use the other address, <code>listen</code>, with their certificates.</p>
""")


class ServerCertificate:
    """Reloads the server's certificate when its files change, and warns before it expires."""

    def __init__(self, proxy: Proxy, listener: TlsListener) -> None:
        self._proxy, self._listener = proxy, listener
        self._watch = FileWatch(proxy.server.now)
        self._watch.was_read(self._state(), True)
        self._problems: list[str] = []
        self._warned = float("inf")
        self.not_after = self._end()
        proxy.server.loop.every(1.0, self.tick)

    def _state(self) -> object:
        tls = self._proxy.settings.tls
        return self._watch.state_of(tls.certificate, tls.key)

    def _end(self) -> int:
        try:
            return server_certificate(self._proxy.settings.tls.certificate).not_after
        except (OSError, CertificateError):
            return 0

    def tick(self) -> None:
        """Once a second: reload changed files, completely or not at all."""
        state = self._state()
        if self._watch.is_due(state):
            problems: list[str] = []
            try:
                self._listener.use(make_tls(self._proxy.settings))
                self._warned, self.not_after = float("inf"), self._end()
                log.info("reloaded the server certificate")
            except ConfigError as error:        # the key may be replaced after the certificate
                problems = error.problems
            self._watch.was_read(state, not problems)
            for problem in problems if problems != self._problems else ():
                log.warning("keeping the old certificate: %s", problem)
            self._problems = problems
        left = (self.not_after - self._proxy.clock()) / 86400
        due = [days for days in WARN_DAYS if left <= days]
        if due and min(due) < self._warned:
            self._warned = min(due)
            log.warning("the server certificate expires on %s: replace it",
                        utc(self.not_after))

    def families(self) -> list[Family]:
        """Metrics for `admin_listen`."""
        return [single("cmon_proxy_server_certificate_expiry_timestamp_seconds", GAUGE,
                       "Timestamp at which the server's certificate expires.", self.not_after)]


class Place(NamedTuple):
    """A worker's number, and its descriptors of the listening socket and the socket pair."""
    number: int
    listening: int
    channel: int


def start(settings: Settings, place: Place | None = None) -> tuple[Server, Proxy]:
    """Build everything and listen; raises ConfigError and OSError."""
    context = make_tls(settings)
    registry = Registry()
    server = TlsServer("proxy", registry)
    register_process_metrics(registry, "proxy")
    proxy = Proxy(settings, server, registry, random.random)
    source: FileSource | TritonSource
    if settings.inventory.file is not None:
        source = FileSource(settings.inventory.file, settings.agent.port, proxy.inventory, server)
    else:
        source = TritonSource(settings, proxy, random.random, place is None or place.number == 0)
        registry.caches.extend(source.accounts.caches)
    proxy.directory = source.accounts
    registry.collect(source.families)
    source.start()

    def listen(address: tuple[str, int] | socket.socket) -> None:
        proxy.listener = server.listen_tls(address, HostRouter(proxy.routes(), proxy.by_host),
                                           context, handshake_hook(context, proxy.policy.by_ca))
        registry.collect(ServerCertificate(proxy, proxy.listener).families)
    if place is not None:
        WorkerSide(proxy, registry, socket.socket(fileno=place.channel))
        # later: only the first process logs where the proxy listens
        server.loop.call_soon(listen, socket.socket(fileno=place.listening))
        return server, proxy
    listen(parse_address(settings.listen))
    if settings.admin_listen is not None:
        server.listen(parse_address(settings.admin_listen), admin_routes(
            lambda page: page(registry.families()), proxy.is_ready), "admin")
    return server, proxy


def start_workers(settings: Settings, arguments: Sequence[str]) -> tuple[Server, Workers]:
    """Start the first of several processes: it listens, workers serve; raises as `start`."""
    registry = Registry()
    server = Server("proxy", registry)
    register_process_metrics(registry, "proxy")
    listener = server.listen(parse_address(settings.listen), ())
    server.loop.unwatch(listener.socket)
    # the path as a separate argument: `-I` and `-s` keep their effect on the script's folder
    workers = Workers(server, settings.workers, listener.socket,
                      [*interpreter_command(), os.path.abspath(__file__), *arguments])
    registry.collect(workers.families)
    if settings.admin_listen is not None:
        def ready(_request: Request) -> Answer:
            if not workers.ready:
                raise refused("inventory_not_ready")
            return text(200, "OK")
        server.listen(parse_address(settings.admin_listen), admin_routes(
            lambda page: workers.gather(registry.families(), page), ready), "admin")
    return server, workers


def summary_of(settings: Settings, now: float) -> tuple[list[str], list[str]]:
    """The lines and warnings of --check-config; raises ConfigError."""
    lines: list[str] = []
    warnings: list[str] = []
    source, tls = settings.inventory, settings.tls
    if source.file is not None:
        content = read_inventory(source.file, settings.agent.port)
        lines.append(f"{source.file}: {content}")
        warnings += tell_warnings(content.warnings)
    else:
        lines.append(f"inventory from {source.vmapi}, {source.cnapi} and {source.mahi} (not "
                     "contacted)")
        try:
            if source.snapshot is not None:
                Snapshot(source.snapshot).check_folder()
        except (OSError, SnapshotError) as error:
            warnings.append(f"inventory.snapshot: cannot keep a snapshot: {error}")
    try:
        shown = server_certificate(tls.certificate)
    except (OSError, CertificateError) as error:
        raise ConfigError(f"tls.certificate: {tls.certificate}: {error}") from None
    names = names_of(shown)
    lines.append(f"{tls.certificate}: certificate for {', '.join(names) or shown.subject} until "
                f"{utc(shown.not_after)}")
    if shown.not_after < now:
        warnings.append(f"{tls.certificate}: expired on {utc(shown.not_after)}: clients refuse "
                        "it; replace it")
    if not any(name.startswith("*.") for name in names):
        warnings.append(f"{tls.certificate}: has no name such as *.cmon.dc.example: clients can "
                        "use paths below /v1, but not UUID.SUFFIX as the host")
    return lines, warnings


# Settings that need a restart. With another `client_auth` or `client_ca`, open connections could
# have certificates that the new setting rejects in the handshake.
FIXED = {"": ("listen", "admin_listen", "inventory", "workers"),
         "tls.": ("client_auth", "client_ca"), "agent.": ("port",)}


def keep_fixed(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """The new settings, with old values for those that need a restart, and the names of these that
    changed."""
    changed: list[str] = []

    def keep(table: str, before: Any, after: Any) -> Any:
        names = FIXED[table]
        changed.extend(table + name for name in names
                       if getattr(before, name) != getattr(after, name))
        return dataclasses.replace(after, **{name: getattr(before, name) for name in names})
    kept = keep("", old, new)
    return dataclasses.replace(kept, tls=keep("tls.", old.tls, new.tls),
                               agent=keep("agent.", old.agent, new.agent)), changed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    open_streams()
    given = list(sys.argv[1:] if argv is None else argv)
    parser = command_line("cmon_proxy.py", "Serves the metrics of zones to the tenants who own "
                          "them.")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.config is None:
        parser.error("--config FILE is required: it names the certificate and the inventory")
    place = Place(*map(int, arguments.worker.split(","))) if arguments.worker else None
    running: list[Proxy] = []
    groups: list[Workers] = []

    def load() -> Settings:
        return command_settings(Settings, arguments, problems_of)

    def begin(settings: Settings) -> Server:
        if settings.workers > 1 and place is None:
            server, workers = start_workers(settings, [
                flag for flag in given if flag not in ("--smf", "--print-addresses")])
            groups.append(workers)
            return server
        server, proxy = start(settings, place)
        running.append(proxy)
        return server

    def check(settings: Settings) -> list[str]:
        try:
            lines, warnings = summary_of(settings, time.time())
        except ConfigError as error:
            return error.problems
        complain("cmon_proxy", [f"warning: {warning}" for warning in warnings])
        for line in lines:
            print(f"cmon_proxy: {line}")
        return []

    def reload(settings: Settings) -> None:
        for workers in groups:
            workers.reload()
        for proxy in running:
            settings, fixed = keep_fixed(proxy.settings, settings)
            if fixed:
                log.warning("%s: changes take effect after a restart", ", ".join(fixed))
            context = make_tls(settings)
            if proxy.listener is not None:
                proxy.listener.use(context)
            proxy.use(settings)
    try:
        return run_daemon("proxy", arguments, load, begin, reload, check)
    finally:
        for workers in groups:
            workers.stop()


if __name__ == "__main__":
    sys.exit(main())
