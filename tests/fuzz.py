#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""Properties of the parsers of hostile input, tried with random input.

    python3 tests/fuzz.py [NAME [COUNT [SEED]]]

Each property takes a random generator, makes one input and fails when the program does what it
promises not to. tests/test_fuzz_source.py runs some thousands of each; by hand it may be a million.
A failure prints its seed: the property with `Random(SEED)` is the failing case.
"""
from __future__ import annotations

import copy
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from agents import TLS, inventory, key, uuid, vm  # noqa: E402  (it needs the path)
import cmon_agent  # noqa: E402
import cmon_forwarder  # noqa: E402
import cmon_proxy  # noqa: E402
from cmon_agent import (  # noqa: E402
    AnswerReader, ClientError, ConfigError, ExpositionError, Limits, Peer, Refused, Request,
    load_settings, merge, parse, parse_head, parse_lines, render)
from cmon_proxy import (  # noqa: E402
    STATES, UUID, Account, AuthorizedKey, FileContent, Frames, Identity, Policy, ServiceError,
    WebSocket, certificate, container_labels, container_row, first_certificate, grant, is_ip,
    member_of, nodes_of, public_key, read_account, read_inventory, vm_of)

Property = Callable[[random.Random], None]

TEXTS = ("", "x", "\0", "\ud800", "é\n\r", "a" * 70, "10.0.0.1", "10.0.0.1\0", "[::1]:7", "::1",
         "1.2.3.4:99999", "7e39c4fe-1b00-4511-9800-4523b6cac865", "ssh-rsa AAAA", "ssh-rsa",
         "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "running", "<b>", "{why}",
         "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTY=", "triton.cmon.groups", "%s")


def odd_value(chance: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = chance.randrange(9 if depth < 3 else 7)
    if kind == 7:
        return [odd_value(chance, depth + 1) for _ in range(chance.randrange(3))]
    if kind == 8:
        return {chance.choice(TEXTS): odd_value(chance, depth + 1)
                for _ in range(chance.randrange(3))}
    return (None, True, False, chance.choice((0, -1, 5, 1 << 80)),
            chance.choice((0.5, 1e308, -0.0)), chance.choice(TEXTS), chance.choice(TEXTS))[kind]


def spoil(chance: random.Random, content: Any, times: int) -> Any:
    """A copy in which some values, at any depth, are gone, odd or under another name."""
    content = {"": copy.deepcopy(content)}
    for _ in range(times):
        inside: Any = content
        while True:
            places = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            if not places:
                break
            place = chance.choice(places)
            if isinstance(inside[place], (dict, list)) and chance.random() < 0.85:
                inside = inside[place]
                continue
            what = chance.randrange(8)
            if what == 0 and place != "":
                del inside[place]
            elif what == 1 and isinstance(inside, dict) and place:
                inside[place[:-1] or "x"] = inside.pop(place)
            elif what == 2 and isinstance(inside, list):
                inside.append(inside[place])
            else:
                inside[place] = odd_value(chance)
            break
    return content[""]


_FOLDER = tempfile.TemporaryDirectory()
_INVENTORY = inventory("10.0.0.1")
_INVENTORY["accounts"][0]["users"] = [{"login": "dave", "keys": [], "groups": ["web"]}]


def inventory_file(chance: random.Random) -> None:
    """Whatever an inventory file holds: an inventory, or a line with file and place for each
    problem."""
    path = Path(_FOLDER.name) / "inventory.json"
    raw = json.dumps(spoil(chance, _INVENTORY, chance.randrange(4))).encode()
    if chance.random() < 0.3:
        at, raw_bytes = chance.randrange(len(raw)), bytearray(raw)
        raw_bytes[at:at + chance.randrange(3)] = chance.choice(
            (b"", b"\0", b"\xff", b"[" * chance.randrange(3000), b'"', b"}", b"1e999", b"NaN",
             b"\\ud800"))
        raw = bytes(raw_bytes)
    path.write_bytes(raw)
    try:
        found = read_inventory(path, 9163)
    except ConfigError as error:
        lines = error.problems
        assert 1 <= len(lines) <= 20
    else:
        assert isinstance(found, FileContent) and str(found)
        json.dumps(found[:4], default=repr, ensure_ascii=False).encode()
        lines = list(found.warnings)
    for line in lines:
        assert line.startswith(f"{path}: ") and len(line) < 500, line
        assert line.isprintable() and line.encode(), line


HEAD = (b"GET /v1/a/metrics?groups=a%2Cb&shard=1/4 HTTP/1.1\r\nHost: cmon.example:9163\r\n"
        b"Accept-Encoding: gzip\r\nX-Prometheus-Scrape-Timeout-Seconds: 10\r\n\r\n")
ANSWER = (b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
          b"5\r\nhello\r\n0\r\n\r\n")
PIECES = (b"", b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"%", b"%00", b"%ff", b"/../", b"?",
          b"\xff", b"\r\n ", b"Host: b\r\n", b"Content-Length: 5\r\n", b"Content-Length: 1_0\r\n",
          b"Transfer-Encoding: chunked\r\n", b"HTTP/9.9", b"a" * 300, b"1e9", b"ffffffffff\r\n",
          b"HTTP/1.1 100 Continue\r\n\r\n", b"Connection: close\r\n", b"-1", b"[::1]", b"#", b"{")


def cut_up(chance: random.Random, raw: bytes) -> bytes:
    """Bytes with some pieces gone, doubled or put in between."""
    for _ in range(chance.randrange(1, 5)):
        at, size = chance.randrange(len(raw) + 1), chance.randrange(20)
        raw = raw[:at] + chance.choice((chance.choice(PIECES), raw[at:at + size] * 2)) \
            + raw[at + size:]
    return raw


def request_head(chance: random.Random) -> None:
    """A head is refused with 4xx or 5xx in one line, or is what its bytes say."""
    raw = cut_up(chance, HEAD)
    try:
        fields = parse_head(raw, Limits())
    except Refused as refusal:
        assert 400 <= refusal.status < 600 and str(refusal).isprintable(), refusal
    else:
        request = Request._make((*fields, Peer("127.0.0.1", "main")))
        assert raw.startswith(request.method.encode() + b" " + request.target.encode())
        assert raw.lower().count(b"\r\nhost:") <= 1
        assert "\n" not in "".join(request.headers.values())


def agent_answer(chance: random.Random) -> None:
    """An answer, in whatever pieces, is whole, waits for more, or is refused in words."""
    raw, reader = cut_up(chance, ANSWER), AnswerReader(max_body=1000)
    try:
        while raw and not reader.done:
            size = chance.randrange(1, 60)
            reader.feed(raw[:size])
            raw = raw[size:]
        reader.end()
    except ClientError as error:
        assert str(error).isprintable()
    else:
        assert 200 <= reader.status < 1000 and len(reader.body) <= 1000


PAGE = """# HELP a_total Help \\\\ with \\n escapes.
# TYPE a_total counter
a_total{b="c",d="\\"e\\\\f\\n"} 12 1700000000000
# TYPE h histogram
h_bucket{le="0.1"} 1
h_bucket{le="+Inf"} 2
h_sum 0.3
h_count 2
x NaN
"""


def exposition(chance: random.Random) -> None:
    """A page is refused with its line, or renders to one that parses to the same."""
    page = cut_up(chance, PAGE.encode()).decode("utf-8", "replace")
    try:
        families = parse(page)
    except ExpositionError as error:
        assert str(error)
    else:
        again = render(families)
        assert render(parse(again)) == again
    families, problems = parse_lines(page)
    assert render(merge(families)[0]) or not families or problems


def settings_file(chance: random.Random) -> None:
    """Settings are good, or each problem is a line with its place."""
    path = Path(_FOLDER.name) / "settings.json"
    good = chance.choice(SETTINGS)
    path.write_text(json.dumps(spoil(chance, json.loads(good.read_text()), chance.randrange(4))))
    wanted: Any = {"agent": cmon_agent.Settings, "proxy": cmon_proxy.Settings,
                   "forwarder": cmon_forwarder.Settings}[good.name.partition("-")[0]]
    try:
        settings = load_settings(wanted, str(path), {})
        if isinstance(settings, cmon_forwarder.Settings):
            problems = cmon_forwarder.problems_of(settings)
            assert all(line.isprintable() for line in problems)
            if not problems:
                cmon_forwarder.discovery_path(settings.groups, settings.shard).encode()
                for sink in filter(lambda one: one.url, settings.sinks.values()):
                    cmon_forwarder.post_url(cmon_forwarder.with_defaults(sink)).encode()
    except ConfigError as error:
        assert error.problems
        for line in error.problems:
            assert line.startswith(f"{path}: ") and line.isprintable(), line


_VM = vm(uuid(1), uuid(2), tags={"triton.cmon.groups": "a,b", "manta_role": "x"})
_NODE = {"uuid": uuid(3), "hostname": "cn1", "sysinfo": {
    "System Type": "Virtual", "CN Agent IP": "10.0.0.1", "Admin IP": "dhcp", "Admin NIC Tag": "a",
    "Network Interfaces": {"i": {"NIC Names": ["admin", "a"], "ip4addr": "10.0.0.2"}}}}
_ACCOUNT = {"account": {"uuid": uuid(4), "login": "alice", "isOperator": True,
                        "approved_for_provisioning": True, "groups": ["operators"],
                        "keys": {"x": key("ec"), "y": key("ed25519")}},
            "role": {"members": {uuid(5): {"login": "carol", "keys": {"z": key("ec384")}}}}}


class Answering:
    """mahi's answers, one after the other."""

    def __init__(self, answers: list[Any]) -> None:
        self._answers = iter(answers)

    def get(self, *_: Any) -> tuple[int, Any]:
        return next(self._answers)

    def wrong(self, what: str) -> ServiceError:
        return ServiceError(what)


def triton_json(chance: random.Random) -> None:
    """Whatever VMAPI, CNAPI, mahi and the changefeed answer: values of the right types that can be
    sent, nothing, or ServiceError."""
    record = spoil(chance, _VM, chance.randrange(4))
    found = vm_of(record, "Updater", 1)
    if found is not None:
        assert UUID.fullmatch(found.uuid) and UUID.fullmatch(found.owner)
        assert not found.server or UUID.fullmatch(found.server)
        json.dumps([container_row(found), container_labels(found)], ensure_ascii=False).encode()
        assert STATES[found.state]
    for node in nodes_of([spoil(chance, _NODE, chance.randrange(4)), odd_value(chance)],
                         9163).values():
        assert UUID.fullmatch(node.uuid) and node.hostname.encode() is not None
        assert node.address is None or is_ip(node.address[0])
    try:
        account = read_account(Answering([  # type: ignore[arg-type]
            (chance.choice((200, 200, 404)), spoil(chance, _ACCOUNT, chance.randrange(4))),
            (200, spoil(chance, _ACCOUNT, chance.randrange(4)))]), "alice")
        if account is not None:
            assert account.login == "alice" and UUID.fullmatch(account.uuid)
            assert isinstance(account.operator, bool) and isinstance(account.approved, bool)
            assert all(md5 == one.key.md5 for md5, one in account.keys.items())
    except ServiceError:
        pass
    message = spoil(chance, {"changedResourceId": uuid(1)}, chance.randrange(3))
    raw = json.dumps(message).encode()
    member_of(cut_up(chance, raw) if chance.random() < 0.5 else raw, "changedResourceId")


def server_frame(opcode: int, payload: bytes, final: bool) -> bytes:
    """As a server sends it: not masked."""
    size = len(payload)
    length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big") \
        if size < 65536 else b"\x7f" + size.to_bytes(8, "big")
    return bytes([(0x80 if final else 0) | opcode]) + length + payload


def websocket_frames(chance: random.Random) -> None:
    """Frames come out as they went in, however the bytes are cut; garbage is a ServiceError, and
    no more is kept than one frame may have."""
    sent = [(chance.choice((0, 1, 2, 8, 9, 10)), True, chance.choice(
        (b"", b"x", b"y" * 125)) if chance.random() < 0.8 else b"z" * chance.choice((126, 70_000)))
        for _ in range(chance.randrange(5))]
    sent = [(opcode, True, payload if opcode < 8 else payload[:125])
            for opcode, _, payload in sent]
    raw = b"".join(server_frame(opcode, payload, final) for opcode, final, payload in sent)
    good = chance.random() < 0.4
    if not good and raw:
        raw = cut_up(chance, raw)
    elif not good:
        raw = chance.randbytes(chance.randrange(200)) if hasattr(chance, "randbytes") else b"\x81"
    frames, found, at = Frames(), [], 0
    try:
        while at < len(raw):
            size = chance.choice((1, 3, 200, 65536))
            found += frames.feed(raw[at:at + size])
            at += size
            assert len(frames._buffer) <= cmon_proxy.MAX_MESSAGE + 65536 + 10
        assert not good or found == sent
    except ServiceError:
        assert not good
    feed = WebSocket.__new__(WebSocket)         # messages of the same frames, fragments and all
    feed._frames, feed._messages, feed._parts = Frames(), [], []
    feed.answers_pings = False
    feed.send = lambda opcode, payload: None  # type: ignore[method-assign]
    try:
        feed._take(raw)
        assert all(len(message) <= cmon_proxy.MAX_MESSAGE + 65536 for message in feed._messages)
    except ServiceError:
        pass


_PEMS = [first_certificate((TLS / f"{name}.pem").read_text()) for name in (
    "old_rsa", "old_ec", "old_ed25519", "new_rsa", "new_ec", "new_ec384", "new_colons")]
_KEYS = [public_key(key(name)) for name in ("rsa", "ec", "ec384", "ec521", "ed25519", "other")]
_OWNER = Account(uuid(4), "alice", {one.md5: AuthorizedKey(one) for one in _KEYS})


def signed_part(der: bytes) -> bytes:
    """The part of a certificate that its signature covers."""
    start = 4 if der[1] == 0x82 else 3
    size = int.from_bytes(der[start + 2:start + 4], "big") + 4 if der[start + 1] == 0x82 else \
        der[start + 2] + 3
    return der[start:start + size]


_SIGNED = [signed_part(der) for der in _PEMS]
assert all(certificate(der).der.find(part) for der, part in zip(_PEMS, _SIGNED))


def client_certificate(chance: random.Random) -> None:
    """Whatever a client shows: a refusal in words, or, with what is signed as it was, the grant."""
    der = chance.choice(_PEMS)
    for _ in range(chance.randrange(4)):
        at = chance.randrange(len(der))
        kind = chance.randrange(6)
        if kind <= 1:
            der = der[:at] + bytes([der[at] ^ 1 << chance.randrange(8)]) + der[at + 1:]
        elif kind == 2:
            der = der[:at] + der[at + chance.randrange(20):]
        elif kind == 3:
            other = chance.choice(_PEMS)
            der = der[:at] + other[at:at + chance.randrange(300)] + der[at:]
        elif kind == 4:
            der = der[:at] + bytes(chance.randrange(256) for _ in range(chance.randrange(8))) \
                + der[at:]
        else:
            der = chance.choice((b"", der * 2, der[:at], b"0" * at))
        der = der or b"\0"
    try:
        granted = grant(Identity(der), _OWNER, Policy(), 1_795_000_000.0)
        assert granted.account is _OWNER and any(part in der for part in _SIGNED)
    except Refused as refusal:
        assert refusal.status == 401 and str(refusal).isprintable() and len(str(refusal)) < 600
        json.dumps(str(refusal), ensure_ascii=False).encode()


SETTINGS = sorted(path for program in ("agent", "proxy", "forwarder")
                  for path in (HERE / "settings").glob(f"{program}*.good.json"))
PROPERTIES: dict[str, Property] = {
    "agent_answer": agent_answer,
    "client_certificate": client_certificate,
    "exposition": exposition,
    "inventory_file": inventory_file,
    "request_head": request_head,
    "settings_file": settings_file,
    "triton_json": triton_json,
    "websocket_frames": websocket_frames,
}


def run(name: str, count: int, seed: int) -> None:
    """Try one property so often; fails with the seed of the first failure."""
    for number in range(seed, seed + count):
        try:
            PROPERTIES[name](random.Random(number))
        except Exception as error:
            raise AssertionError(f"{name}, seed {number}: {type(error).__name__}: {error}"
                                 ) from error


def main() -> None:
    """The command."""
    name = sys.argv[1] if len(sys.argv) > 1 else "all"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 100_000
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else int.from_bytes(os.urandom(4), "big")
    for one in PROPERTIES if name == "all" else [name]:
        began = time.monotonic()
        run(one, count, seed)
        print(f"{one}: {count} inputs from seed {seed} in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
