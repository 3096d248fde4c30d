# SPDX-License-Identifier: MPL-2.0
"""Settings: what loads, what does not and in which words; flags, --check-config, reload by SIGHUP.

tests/settings holds PROGRAM-NAME.good.json and PROGRAM-NAME.bad.json; beside a bad one stands
PROGRAM-NAME.bad.txt: each line of it occurs in a line of its own of what the program says, in any
order, and no line is left over. FILE stands for the file's path.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cmon_agent
import cmon_forwarder
import cmon_proxy
import pytest
from cmon_agent import (
    ConfigError, at_least, is_address, load_settings, one_of, parse_address, read_json, setting,
)
from support import NODE, ROOT, Program, wait_until

CASES = ROOT / "tests" / "settings"


def words_of(case: Path) -> list[str]:
    return case.with_suffix(".txt").read_text("utf-8").splitlines()


def check(program: str, path: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    replay = ["--replay", str(NODE)] if program == "agent" else []
    return subprocess.run([sys.executable, "-sE", str(ROOT / f"cmon_{program}.py"), "--config",
                           str(path), "--check-config", *replay, *more], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, timeout=60)


def cases(kind: str) -> list[Any]:
    return [pytest.param(path.name.split("-")[0], path, id=path.name.split(".")[0])
            for path in sorted(CASES.glob(f"*.{kind}.json"))]


# --- the programs' files --------------------------------------------------------------------------

@pytest.mark.parametrize("program, path", [case for case in cases("good")
                                           if case.values[0] != "forwarder"])
def test_good_file_loads(program: str, path: Path) -> None:
    done = check(program, path)
    assert done.returncode == 0 and all(
        line.startswith(f"cmon_{program}: warning: ") for line in done.stderr.splitlines())
    assert done.stdout.splitlines()[-1] == f"cmon_{program}: the settings are good"


def names_of(settings: Any, prefix: str = "") -> set[str]:
    """Dotted names of all settings."""
    names = set()
    for field in dataclasses.fields(settings):
        kind = cmon_agent._field_types(settings)[field.name]
        names |= names_of(kind, f"{prefix}{field.name}.") if dataclasses.is_dataclass(kind) \
            else {prefix + field.name}
    return names


def given(content: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of what a file says, inner objects included."""
    return set().union(*({prefix + name} | (given(value, f"{prefix}{name}.") if isinstance(
        value, dict) else set()) for name, value in content.items()))


@pytest.mark.parametrize("path", [case.values[1] for case in cases("good")
                                  if case.values[0] == "forwarder"])
def test_good_file_of_the_forwarder_loads(path: Path) -> None:
    """Separate: its --check-config contacts the proxy and the sinks."""
    settings = cmon_forwarder.load_forwarder(argparse.Namespace(
        config=path, listen=None, log_level=None, log_format=None))
    for name, row in cmon_forwarder.SINKS.items():
        shown = set().union(*(sink for sink in json.loads(path.read_text())["sinks"].values()
                              if sink["type"] == name))
        assert shown >= {*row.required, *row.optional}
    assert {form for sink in settings.sinks.values() if (form := sink.form)} >= {
        "dotted", "lines", "elasticsearch", "splunk"}


@pytest.mark.parametrize("program", [cmon_agent, cmon_proxy, cmon_forwarder])
def test_each_setting_is_in_a_good_file(program: Any) -> None:
    name = program.__name__.partition("_")[2]
    files = CASES.glob(f"{name}-*.good.json")
    shown = set().union(*(given(json.loads(path.read_text())) for path in files))
    assert names_of(program.Settings) <= shown


@pytest.mark.parametrize("program, path", cases("bad"))
def test_bad_file_is_refused_with_all_its_problems(program: str, path: Path) -> None:
    done = check(program, path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    said = done.stderr.replace(str(path), "FILE").splitlines()
    missing = [line for line in words_of(path) if not any(line in one for one in said)]
    surplus = [one for one in said if not any(line in one for line in words_of(path))]
    assert (missing, surplus) == ([], []), done.stderr
    assert len(said) == len(words_of(path))
    assert all(one.startswith(f"cmon_{program}: ") for one in said)


@pytest.mark.parametrize("program, path", cases("bad")[:1] + cases("bad")[-1:])
def test_smf_gets_its_own_status_for_a_bad_file(program: str, path: Path) -> None:
    """96: maintenance at once, since trying again would not help."""
    assert check(program, path, "--smf").returncode == 96


@pytest.mark.parametrize("program", ["agent", "proxy"])
def test_file_that_is_not_there(program: str, tmp_path: Path) -> None:
    done = check(program, tmp_path / "none.json")
    assert (done.returncode, done.stderr) == (
        2, f"cmon_{program}: {tmp_path}/none.json: no such file or directory\n")


# --- what a file may say --------------------------------------------------------------------------

@dataclass(frozen=True)
class Inner:
    depth: int = setting(1, "How deep.", at_least(0))
    ratio: float = setting(0.5, "How much.")


@dataclass(frozen=True)
class Outer:
    name: str = setting("x", "A word.", one_of("x", "y"))
    listen: str = setting("127.0.0.1:9163", "Where.", is_address)
    on: bool = setting(False, "Whether.")
    limit: float | None = setting(None, "At most.", at_least(1))
    words: tuple[str, ...] = setting(("a",), "Several.")
    file: Path | None = setting(None, "A file.")
    inner: Inner = setting(Inner, "A group.")
    many: dict[str, Inner] = setting(dict, "Groups by name.")


GOOD = [
    ({}, Outer()),
    ({"name": "y", "on": True, "limit": 2, "words": ["b", "c"]},
     Outer(name="y", on=True, limit=2.0, words=("b", "c"))),
    ({"limit": None}, Outer()),
    ({"inner": {"depth": 3}}, Outer(inner=Inner(depth=3))),
    ({"many": {"one": {"ratio": 1}, "two": {}}},
     Outer(many={"one": Inner(ratio=1.0), "two": Inner()})),
    ({"listen": "[::1]:0"}, Outer(listen="[::1]:0")),
]


@pytest.mark.parametrize("content, expected", GOOD, ids=lambda value: json.dumps(
    value) if isinstance(value, dict) else "")
def test_valid_values(content: dict[str, Any], expected: Outer, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(content))
    assert load_settings(Outer, str(path), {}) == expected


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text('{"file": "key.pem"}')
    assert load_settings(Outer, str(path), {}).file == tmp_path / "key.pem"
    path.write_text('{"file": "/etc/key.pem"}')
    assert load_settings(Outer, str(path), {}).file == Path("/etc/key.pem")


BAD = [
    ('{"name": "z"}', ["name: must be one of x, y, not \"z\""]),
    ('{"Name": "x"}', ["Name: unknown setting, did you mean 'name'?"]),
    ('{"colour": 1}', ["colour: unknown setting; there are file, inner, limit"]),
    ('{"on": 1}', ["on: must be true or false, not 1"]),
    ('{"on": null}', ["on: must be true or false, not null"]),
    ('{"limit": "2"}', ["limit: must be a number, not \"2\""]),
    ('{"limit": true}', ["limit: must be a number, not true"]),
    ('{"limit": 0.5}', ["limit: must be at least 1, not 0.5"]),
    ('{"limit": 1e999}', ["limit: must be a number"]),
    ('{"limit": NaN}', ["NaN is not JSON"]),
    ('{"words": "a"}', ["words: must be a list, not \"a\""]),
    ('{"words": ["a", 1]}', ["words[1]: must be a text, not 1"]),
    ('{"file": ""}', ["file: must be a path, not \"\""]),
    ('{"inner": {"depth": -1, "deep": 1}}', ["inner.depth: must be at least 0, not -1",
                                             "inner.deep: unknown setting; there are depth, "]),
    ('{"inner": {"depth": 1.5}}', ["inner.depth: must be a whole number, not 1.5"]),
    ('{"inner": []}', ["inner: must be an object, not []"]),
    ('{"many": {"one": 1, "two": {"x": 1}}}', ["many.one: must be an object, not 1",
                                               "many.two.x: unknown setting"]),
    ('{"listen": "localhost"}', [
        "listen: must be HOST:PORT, as in 127.0.0.1:9163 or :9163, not \"localhost\""]),
    ('{"listen": "a:99999"}', ["listen: must be HOST:PORT"]),
    ('{"listen": "a b:1"}', ["listen: must be HOST:PORT"]),
    ('{"name": "x", "name": "y"}', ["not JSON: 'name' appears more than once in an object"]),
    ("[]", ["must be an object, not []"]),
    ("", ["not JSON"]),
    ("{", ["not JSON"]),
    ('{"a": 1} x', ["not JSON"]),
    ("\udcff", ["not JSON"]),
    ("[" * 100_000, ["not JSON: nested too deeply"]),
]


@pytest.mark.parametrize("content, expected", BAD, ids=[content[:40].encode(
    "ascii", "replace").decode() or "empty" for content, _ in BAD])
def test_invalid_values(content: str, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(content, "utf-8", "surrogateescape")
    with pytest.raises(ConfigError) as caught:
        load_settings(Outer, str(path), {})
    assert len(caught.value.problems) == len(expected)
    for problem, words in zip(caught.value.problems, expected):
        assert problem.startswith(f"{path}: ")
        assert words in problem


def test_flags_take_precedence(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text('{"name": "y", "on": true}')
    loaded = load_settings(Outer, str(path), {"name": "x", "on": None, "limit": None})
    assert (loaded.name, loaded.on) == ("x", True)
    assert load_settings(Outer, None, {"name": "y"}).name == "y"
    with pytest.raises(ConfigError, match="listen"):
        load_settings(Outer, None, {"listen": "nowhere"})


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(Outer(), "name", "y")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in (tmp_path, "directory"), (tmp_path / "pipe", "pipe"), ("/dev/zero", "device"):
        with pytest.raises(ConfigError, match=f"^{path}: is a {kind}: use a regular file$"):
            read_json(path)


@pytest.mark.parametrize("text, port, expected", [
    ("127.0.0.1:80", None, ("127.0.0.1", 80)), ("[::1]:80", None, ("::1", 80)),
    ("host", 9163, ("host", 9163)), ("[fe80::1%net0]:1", None, ("fe80::1%net0", 1)),
    ("host:0", 9163, ("host", 0))])
def test_addresses(text: str, port: int | None, expected: tuple[str, int]) -> None:
    assert parse_address(text, port) == expected


@pytest.mark.parametrize("text", ["", ":", "a:", "a:b", "::1:80", "[::1", "[]:80", "a:-1",
                                  "a:123456", "a:1 ", "a\n:1"])
def test_invalid_addresses(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_address(text)


# --- reload ---------------------------------------------------------------------------------------

def test_sighup_reloads_and_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "agent.json"
    path.write_text('{"log_level": "info"}')
    with Program.agent("--replay", NODE, "--config", path) as agent:
        agent.wait_for_log("listening on")
        path.write_text('{"log_level": "loud", "color": 1}')
        agent.signal(signal.SIGHUP)
        agent.wait_for_log(f"keeping the old settings: {path}: log_level: must be one of")
        agent.wait_for_log(f"keeping the old settings: {path}: color: unknown setting")
        path.write_text('{"log_level": "debug"}')
        agent.signal(signal.SIGHUP)
        agent.wait_for_log("settings reloaded")
        assert wait_until(lambda: agent.process.poll() is None)
