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

from agents import inventory  # noqa: E402  (it needs the path)
from cmon_agent import ConfigError  # noqa: E402
from cmon_proxy import Whole, read_inventory  # noqa: E402

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
        assert isinstance(found, Whole) and str(found)
        json.dumps(found[:4], default=repr, ensure_ascii=False).encode()
        lines = list(found.warnings)
    for line in lines:
        assert line.startswith(f"{path}: ") and len(line) < 500, line
        assert line.isprintable() and line.encode(), line


PROPERTIES: dict[str, Property] = {"inventory_file": inventory_file}


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
