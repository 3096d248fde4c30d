#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""Writes what the documents say from what the programs do: `make docs`.

README.md      the blocks between `<!-- generated: NAME -->` and `<!-- end -->`
docs/METRICS.md    every metric of the agent, and the table of what to look at
docs/COMMANDS.md   every command with its flags

tests/test_layout.py fails while a file on disk differs from what this would write.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import typing
from pathlib import Path
from typing import Any, Callable, Union
from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cmon             # noqa: E402  (after the path)
import cmon_agent       # noqa: E402
import cmon_proxy       # noqa: E402

BLOCK = re.compile(r"(<!-- generated: ([a-z ]+) -->\n).*?(<!-- end -->)", re.S)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n"
                   for line in lines)


def code(text: str) -> str:
    """Text as code, or nothing."""
    return f"`{text}`" if text else ""


# --- settings -------------------------------------------------------------------------------------

TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}


def type_in_words(kind: Any) -> str:
    """How a user of JSON calls a type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Union:
        return type_in_words(next(one for one in inner if one is not type(None))) + " or null"
    if origin in (list, tuple):
        return f"list of {type_in_words(inner[0])}"
    if origin is dict or kind is dict:
        return "object"
    return TYPES.get(kind, "object")


def default_in_json(value: Any) -> str:
    """A default as it would stand in the file."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {key: item for key, item in dataclasses.asdict(value).items() if item is not None}
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, default=str)


def setting_rows(wanted: Any, prefix: str = "") -> Iterator[list[str]]:
    """One row for each setting, those of inner objects with a dotted name."""
    kinds = cmon_agent._field_types(wanted)
    for field in dataclasses.fields(wanted):
        kind = kinds[field.name]
        name = prefix + field.name
        inner = [one for one in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(one)]
        help_text = str(field.metadata.get("help", ""))
        by_name = typing.get_origin(kind) is dict
        if field.default is not dataclasses.MISSING:
            default = default_in_json(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = default_in_json(field.default_factory())
        else:
            default = "must be given"
        if inner:
            yield [code(name), "object for each name" if by_name else "object",
                   code(default) if by_name else "", help_text]
            yield from setting_rows(inner[0], name + (".NAME." if by_name else "."))
        else:
            shown = default if default == "must be given" else code(default)
            yield [code(name), type_in_words(kind), shown, help_text]


def settings_of(module: Any) -> str:
    """The table of a program's settings: its one dataclass that has `listen`."""
    found = [value for value in vars(module).values() if isinstance(value, type)
             and dataclasses.is_dataclass(value) and value.__module__ == module.__name__
             and {"listen", "log_level"} <= {field.name for field in dataclasses.fields(value)}]
    assert len(found) == 1, found
    return table(("setting", "type", "default", "meaning"), list(setting_rows(found[0])))


# --- commands -------------------------------------------------------------------------------------

def invocation(action: argparse.Action) -> str:
    """A flag as it is typed."""
    if not action.option_strings:
        return str(action.metavar or action.dest)
    value = "" if action.nargs == 0 else " " + str(action.metavar or (
        "|".join(map(str, action.choices)) if action.choices else action.dest.upper()))
    return ", ".join(name + value for name in action.option_strings)


def manual(name: str, parser: argparse.ArgumentParser) -> str:
    """A command's section; its own layout, since argparse's differs from Python to Python."""
    actions = [action for action in parser._actions
               if not isinstance(action, argparse._SubParsersAction)]
    rows = [[code(invocation(action)), action.help or ""]
            for action in actions if action.help != argparse.SUPPRESS]
    return (f"## {name}\n\n{parser.description or ''}\n\n"
            + table(("argument", "meaning"), rows) + "\n")


def commands() -> str:
    """docs/COMMANDS.md"""
    parser = cmon.command_line()
    inner = next(action for action in parser._actions
                 if isinstance(action, argparse._SubParsersAction))
    text = ["# Commands and their flags\n\n"
            "<!-- generated by tests/make_docs.py; edit the programs -->\n\n"
            "Exit status of all: 0; 1 when something failed; 2 for a wrong command line or bad\n"
            "settings (the servers as SMF services: 96).\n\n"]
    text += [manual(f"cmon.py {name}", one) for name, one in inner.choices.items()]
    text += [manual("cmon_agent.py", parser_of(cmon_agent.main, [])),
             manual("cmon_agent.py capture", parser_of(cmon_agent.main, ["capture"])),
             manual("cmon_proxy.py", parser_of(cmon_proxy.main, []))]
    return "".join(text).rstrip("\n") + "\n"


class _Caught(Exception):
    """Carries a program's parser out of its main()."""


def parser_of(main: Callable[[list[str]], int], words: list[str]) -> argparse.ArgumentParser:
    """A server's parser as its main() makes it for these words."""
    def catch(self: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        raise _Caught(self)
    real = argparse.ArgumentParser.parse_args
    try:
        setattr(argparse.ArgumentParser, "parse_args", catch)
        main(words)
    except _Caught as caught:
        parser: argparse.ArgumentParser = caught.args[0]
        return parser
    finally:
        setattr(argparse.ArgumentParser, "parse_args", real)
    raise AssertionError("no parser")


# --- refusals -------------------------------------------------------------------------------------

def refusals() -> str:
    """What the proxy may answer instead of a page."""
    return table(("code", "status", "text"), [
        [code(name), str(status),
         re.sub(r"\{(\w+)(:g)?\}", lambda field: field.group(1).upper(), text)]
        for name, (status, text) in cmon_proxy.REFUSALS.items()])


# --- metrics --------------------------------------------------------------------------------------

METRICS = """\
# Metrics

<!-- generated by tests/make_docs.py from the agent's tables; edit those -->

Names, types and labels of the original agent stay as they were, also where they break today's
rules for names; what is new stands beside them, in base units and with `_total` on counters.
Integers are exact to 64 bits. A sample that the platform does not have is left out; so is a limit
where there is none.

The agent tells the same as JSON at `/v1/metadata`, and each page in its HELP lines. The programs'
own metrics (`cmon_agent_…`, `cmon_proxy_…`, `process_…`) explain themselves at `/metrics`.

With every page come, for each collector: `NAME_metrics_available_boolean`,
`NAME_metrics_cached_boolean`, `NAME_metrics_timer_seconds`, `cmon_collector_up` and
`cmon_sample_age_seconds`.
"""
SCOPES = (("zone", "a zone"), ("node", "the compute node"))
CELLS = ("utilisation", "saturation", "errors")


def use_table(scope: str) -> str:
    """Resources by utilisation, saturation and errors."""
    return table(("resource", *CELLS), [
        [use.resource, *(", ".join(map(code, getattr(use, cell))) for cell in CELLS)]
        for use in cmon_agent.USE if use.scope == scope])


def metrics() -> str:
    """docs/METRICS.md"""
    text = [METRICS]
    everything = [row for row in cmon_agent.metadata() if row["collector"]]
    for scope, words in SCOPES:
        text.append(f"\n## What to look at: {words}\n\n{use_table(scope)}")
    for scope, words in SCOPES:
        text.append(f"\n## Metrics of {words}\n")
        rows = [row for row in everything if row["scope"] == scope]
        for collector in dict.fromkeys(row["collector"] for row in rows):
            ours = [row for row in rows if row["collector"] == collector
                    and not row["name"].startswith(collector + "_metrics_")]
            if not ours:
                continue
            text.append(f"\n### {collector}\n\n" + table(
                ("metric", "type", "labels", "unit", "meaning", "source"),
                [[code(row["name"]), row["type"], ", ".join(row["labels"]), row["unit"],
                  row["help"] + (f" *{row['quirk']}*" if row["quirk"] else ""),
                  code(row["source"])]
                 for row in ours]))
    return "".join(text)


# --- files ----------------------------------------------------------------------------------------

BLOCKS: dict[str, Callable[[], str]] = {
    "agent settings": lambda: settings_of(cmon_agent),
    "proxy settings": lambda: settings_of(cmon_proxy),
    "refusals": refusals,
}


def readme() -> str:
    """README.md with its generated blocks anew."""
    return BLOCK.sub(lambda match: match.group(1) + BLOCKS[match.group(2)]() + match.group(3),
                     (ROOT / "README.md").read_text("utf-8"))


GENERATED: dict[str, Callable[[], str]] = {
    "README.md": readme,
    "docs/COMMANDS.md": commands,
    "docs/METRICS.md": metrics,
}


def main() -> int:
    """Write what has changed, and say so."""
    for name, make in GENERATED.items():
        path, text = ROOT / name, make()
        if not path.exists() or path.read_text("utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
            print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
