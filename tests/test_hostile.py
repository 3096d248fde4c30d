# SPDX-License-Identifier: MPL-2.0
"""Random and malformed input to the agent raises only documented errors."""
from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any, Callable

import pytest
from support import NODE

from cmon_agent import (
    DEFAULT_COMMANDS, ConfigError, Recording, RecordedHandle, Refused, Settings, Sysinfo, Vms,
    agent_command_line, load_agent, load_settings, parse_sysinfo, read_opts, vm_of)

WORDS = ["", "global", "10.0.0.1", "dhcp", "-1", "\x00", "é" * 50, "9" * 400, "null", "a:b\\:c",
         "zones"]


def twisted(chance: random.Random, depth: int = 0) -> Any:
    """A JSON value of any shape."""
    kind = chance.randrange(9 if depth < 4 else 6)
    if kind == 0:
        return None
    if kind == 1:
        return chance.random() < 0.5
    if kind == 2:
        return chance.choice([0, -1, 2 ** 64, 10 ** 400, 65536])
    if kind == 3:
        return chance.choice([0.5, -1e308, 1e-300])
    if kind in (4, 5):
        return chance.choice(WORDS)
    if kind == 6:
        return [twisted(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(WORDS): twisted(chance, depth + 1) for _ in range(chance.randrange(4))}


def bent(chance: random.Random, value: Any) -> Any:
    """A good value with some of its parts replaced by anything, or left out."""
    if chance.random() < 0.08:
        return twisted(chance)
    if isinstance(value, dict):
        return {name: bent(chance, item) for name, item in value.items() if chance.random() > 0.05}
    if isinstance(value, list):
        return [bent(chance, item) for item in value]
    return value


CAPTURE = json.loads(NODE.read_text())
FRAME = CAPTURE["frames"][0]
SMALL = {**CAPTURE, "frames": [{**frame, "kstats": frame["kstats"][::40], "vms": frame["vms"][:2]}
                               for frame in CAPTURE["frames"]]}
VM = FRAME["vms"][1]


def settings_of(content: Any, folder: Path) -> None:
    path = folder / "agent.json"
    path.write_text(json.dumps(content))
    load_settings(Settings, str(path), {})


def replayed(content: Any, folder: Path) -> None:
    path = folder / "capture.json"
    path.write_text(json.dumps(content))
    recording = Recording(str(path))
    handle = RecordedHandle(recording)
    handle.update()
    for refs in [*handle.index.modules.values(), *handle.index.zones.values()]:
        for ref in refs:
            handle.read(ref)


def events(content: Any, _folder: Path) -> None:
    Vms("")._take(content)


GOOD_SETTINGS = {
    "listen": "127.0.0.1:9163", "commands": {"zfs": "/usr/sbin/zfs"}, "pool": "zones",
    "collectors": {"zfs": {"enabled": False, "ttl": 5, "timeout": 1.5}}, "cpu_budget": 0.02,
    "plugin_dirs": {"gz": "/x"}, "min_poll_interval": 1, "max_collections": 2, "textfiles": True}
READY = {"type": "ready", "vms": FRAME["vms"]}
TAKERS: list[tuple[str, Any, Callable[[Any, Path], Any], Any]] = [
    ("sysinfo", CAPTURE["host"], lambda value, _: parse_sysinfo(value), ()),
    ("VM objects", VM, lambda value, _: vm_of(value), ()),
    ("vminfod's events", READY, events, ValueError),
    ("settings", GOOD_SETTINGS, settings_of, ConfigError),
    ("captures", SMALL, replayed, ConfigError),
]


@pytest.mark.parametrize("good, take, allowed", [row[1:] for row in TAKERS],
                         ids=[row[0] for row in TAKERS])
def test_malformed_input_is_accepted_or_refused_with_a_message(
        good: Any, take: Callable[[Any, Path], Any], allowed: Any, tmp_path: Path) -> None:
    take(good, tmp_path)
    for seed in range(150):
        chance = random.Random(seed)
        value = bent(chance, good) if seed % 3 else twisted(chance)
        try:
            take(value, tmp_path)
        except allowed or () as error:
            assert str(error) and "\n\n" not in str(error)


@pytest.mark.parametrize("seed", range(100))
def test_the_opts_header_is_read_or_refused_with_400(seed: int) -> None:
    chance = random.Random(seed)
    raw = json.dumps(bent(chance, {"isCoreZone": True}) if seed % 2 else twisted(chance)).encode()
    word = base64.b64encode(raw).decode()
    if seed % 5 == 0:
        word = "".join(chance.choices("abc=+/ \x00é", k=chance.randrange(40)))
    try:
        assert read_opts(word) in (True, False)
    except Refused as refusal:
        assert refusal.status == 400 and "x-joyent-cmon-opts" in str(refusal)


def test_deeply_nested_json_is_refused_and_nothing_more(tmp_path: Path) -> None:
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 200_000)
    arguments = agent_command_line().parse_args(["--config", str(deep)])
    with pytest.raises(ConfigError, match="nested too deeply|not JSON"):
        load_agent(arguments)
    with pytest.raises(Refused):
        read_opts(base64.b64encode(b"[" * 700).decode())


def test_sysinfo_finds_the_admin_address_by_its_tag() -> None:
    host = {**CAPTURE["host"], "Admin IP": "dhcp"}
    assert parse_sysinfo(CAPTURE["host"]) == Sysinfo(
        "4c4c4544-0042-3510-8051-c4c04f4b3533", "cn07", "10.20.0.7", "zones", 65536 << 20, 8)
    assert parse_sysinfo(host).admin_ip == "10.20.0.7"
    assert parse_sysinfo({**host, "Admin NIC Tag": "external"}).admin_ip == ""  # has no address
    odd = {**host, "Network Interfaces": {"x": {"NIC Names": "admin"}}}
    assert parse_sysinfo(odd).admin_ip == ""


def test_commands_and_plugin_folders_are_completed_by_the_defaults(tmp_path: Path) -> None:
    config = tmp_path / "agent.json"
    config.write_text('{"commands": {"zfs": "/tmp/zfs"}, "plugin_dirs": {"vm": "/tmp/vm"}}')
    loaded = load_agent(agent_command_line().parse_args(["--config", str(config)]))
    assert loaded.commands == {**DEFAULT_COMMANDS, "zfs": "/tmp/zfs"}
    assert loaded.plugin_dirs["vm"] == "/tmp/vm" and loaded.plugin_dirs["gz"].startswith("/opt/")
