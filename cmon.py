#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""The command of Container Monitor's users and operators.

    cmon.py discover [--groups A,B] [--json]    containers of an account, as the proxy lists them
    cmon.py monitor NAME|UUID [--use]           the page of metrics of one of them, or a table
    cmon.py top                                 all of them, live
    cmon.py check NAME EXPR,WARN,CRIT           a plugin for Nagios and Icinga
    cmon.py certgen --account LOGIN --ssh-key FILE
                                                a certificate for the proxy
    cmon.py doctor [NAME]                       which link to the figures is broken, and what to do
    cmon.py setup DIR --account LOGIN --ssh-key FILE
                                                all that a Prometheus needs
    cmon.py rules | dashboard [NAME]            what to load into Prometheus and Grafana
    cmon.py demo [--once]                       a compute node, a proxy and a tenant on this machine

Where the proxy is and who asks: --url, --cert, --key, --ca, before the command or behind it, or
CMON_URL, CMON_CERT, CMON_KEY, CMON_CA.
Exit status: 0; 1 when something failed, in one line on stderr; 2 for a wrong command line.

Map (`grep '^# ---'`):

    client
    display
    figures
    monitor
    recordings
    top
    check
    discover
    certificates
    doctor
    rules and dashboards
    setup
    demo
    completion
    commands
"""
from __future__ import annotations  # a SyntaxError here: this program needs Python 3.9 or later

import argparse
import base64
import collections
import contextlib
import difflib
import errno
import email.utils
import functools
import getpass
import gzip
import hashlib
import io
import ipaddress
import json
import math
import os
import queue
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import tty
import unicodedata
import urllib.parse
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Callable, NamedTuple, NoReturn, Union

if sys.version_info < (3, 9):       # a traceback is no answer to that
    sys.exit(f"cmon: needs Python 3.9 or later, this is {sys.version.split()[0]}")

try:
    # The agent is the one file that must run alone, so it carries the kit that we share.
    from cmon_agent import (
        COUNTER, Client, ClientError, ClientResponse, CommandLine, ExpositionError, GAUGE, Labels,
        MAX_BODY, Number, SUFFIXES, Sample, USE, USE_BUSY, USE_FROM, USE_FULL, USE_UP, UUID, Use,
        __version__, metadata, number, parse, render, within)
except ImportError as import_error:
    sys.exit(f"cmon: {import_error}: cmon_agent.py of the same version must be beside cmon.py")


# --- client ---------------------------------------------------------------------------------------

PROGRAM = Path(sys.argv[0]).name if Path(sys.argv[0]).name in ("cmon", "cmon.exe") else "cmon.py"
PROXY_PORT = 9163
CERTGEN = f"make a certificate with `{PROGRAM} certgen`"
DISCOVER = f"`{PROGRAM} discover` lists the containers"


class Failure(Exception):
    """What a command cannot do: one line for the user, exit status 1."""


class Usage(Failure):
    """What is wrong with the command line: exit status 2."""


class Container(NamedTuple):
    """One container, as discovery shows it."""
    alias: str
    uuid: str
    brand: str
    state: str
    node: str


class Proxy:
    """The proxy, as one account sees it. Every failure becomes a `Failure` in one line."""

    def __init__(self, url: str, tls: ssl.SSLContext, timeout: float,
                 connect: tuple[str, int] | None = None) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        host = urllib.parse.urlsplit(url).hostname or ""
        self._client = Client(tls, resolve={host: connect} if connect else None)

    def get(self, path: str) -> ClientResponse:
        """The proxy's answer, whatever its status."""
        headers = {"X-Prometheus-Scrape-Timeout-Seconds": f"{self.timeout:g}"}
        try:
            return self._client.request("GET", self.url + path, headers, timeout=self.timeout)
        except ClientError as error:
            raise Failure(str(error) + self._hint(str(error))) from None

    def page(self, path: str) -> bytes:
        """The body of a 200; any other answer is a failure, in the proxy's own words."""
        return self.checked(self.get(path))

    def checked(self, answer: ClientResponse) -> bytes:
        """The same for an answer that is already here."""
        if answer.status != 200:
            words = printable(answer.body[:2000].decode("utf-8", "replace")) or "no reason given"
            raise Failure(f"{urllib.parse.urlsplit(self.url).netloc} says {answer.status}: {words}")
        return answer.body

    def containers(self, groups: str = "") -> tuple[Any, list[Container]]:
        """Discovery: the JSON as it came, and the containers in it by alias."""
        return self.listed(self.page("/v1/discover" + groups_query(groups)))

    def listed(self, body: bytes) -> tuple[Any, list[Container]]:
        """The same from an answer to discovery."""
        try:
            found = json.loads(body)
            return found, sorted(
                Container(*(printable(str(item.get(key) or "-")) for key in (
                    "vm_alias", "vm_uuid", "vm_brand", "vm_state", "server_uuid")))
                for item in found["containers"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Failure(f"{self.url}/v1/discover answers, but not as a proxy: is the URL right?"
                          ) from None

    def find(self, name: str) -> Container:
        """The container of that alias, UUID or beginning of a UUID; a whole UUID needs no look-up:
        it may be a compute node's."""
        if UUID.fullmatch(name.lower()):
            return Container(name.lower(), name.lower(), "-", "-", "-")
        containers = self.containers()[1]
        try:
            return choose(name, containers)
        except Failure:
            for other in self._not_running():
                if name and name == other.alias or \
                        len(name) > 7 and other.uuid.startswith(name.lower()):
                    raise Failure(f"container {describe(other)} is not running: it has metrics "
                                  "while it runs") from None
            raise

    def _not_running(self) -> Iterator[Container]:
        """Containers that discovery leaves out, by the fleet page; none if there is no such."""
        try:
            families = {family.name: family.samples
                        for family in parse(self.fleet().decode("utf-8", "replace"))}
        except (Failure, ExpositionError):
            return
        states = {labels["instance"]: labels["state"] for labels, value in (
            (dict(sample.labels), sample.value) for sample in
            families.get("cmon_instance_state", ())) if value == 1}
        for sample in families.get("cmon_instance_info", ()):
            labels = dict(sample.labels)
            state = states.get(labels["instance"], "")
            if state != "running":
                yield Container(printable(labels["alias"]), printable(labels["instance"]), "-",
                                printable(state) or "not running", "-")

    def scrape(self, uuid: str) -> bytes:
        """The page of a container or, for operators, of a compute node."""
        return self.page(f"/v1/{uuid}/metrics")

    def fleet(self, groups: str = "") -> bytes:
        """The page that says why each container is silent, or not; it asks no node."""
        return self.page("/v1/fleet/metrics" + groups_query(groups))

    def close(self) -> None:
        """End the connections."""
        self._client.close()

    def _hint(self, message: str) -> str:
        parts = urllib.parse.urlsplit(self.url)
        if "mismatch" in message:
            return " give --url with the name that the certificate is for"
        if "certificate is not trusted" in message:
            return "; --ca FILE names the CA of the proxy's certificate, PEM"
        if "wrong version number" in message or "record layer failure" in message:
            return ("; it speaks plain HTTP, as an agent or the proxy's admin_listen does: --url "
                    "is for the proxy's address for tenants")
        if parts.port is None and message.startswith("cannot reach"):
            usual = f"https://{parts.hostname}:{PROXY_PORT}"
            return f"; the proxy's usual port is {PROXY_PORT}: --url {usual}"
        return ""


def groups_query(groups: str) -> str:
    """The query that asks for containers in one of these groups."""
    return "?" + urllib.parse.urlencode({"groups": groups}) if groups else ""


def proxy_url(text: str) -> str:
    """The proxy's URL, or Usage in words."""
    if not text:
        raise Usage("where is the proxy? set CMON_URL or give --url, "
                    f"for example https://cmon.dc.example:{PROXY_PORT}")
    try:
        parts = urllib.parse.urlsplit(text)
        good = parts.scheme == "https" and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or parts.path not in ("", "/") or parts.query or parts.fragment or parts.username:
        raise Usage(f"{text!r} is not the URL of a proxy: https://HOST:PORT and nothing behind it")
    return text


def client_context(cert: str, key: str, ca: str) -> ssl.SSLContext:
    """TLS with the user's certificate; Failure says which file is wrong, and how."""
    for what, path in (("certificate", cert), ("key", key), ("CA", ca)):
        if path:
            try:
                Path(path).read_bytes()
            except OSError as error:
                raise Failure(f"cannot read the {what} {path}: {words_of(error)}") from None
    try:
        context = ssl.create_default_context(cafile=ca or None)
    except ssl.SSLError:
        raise Failure(f"{ca} holds no CA certificate in PEM") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    asked = []

    def passphrase() -> str:
        asked.append(True)
        return ask_passphrase(f"the key {key}")
    try:
        context.load_cert_chain(cert, key, password=passphrase)
    except (OSError, ValueError) as error:      # SSLError is an OSError
        if asked:
            raise Failure(f"wrong passphrase for the key {key}") from None
        if b"BEGIN OPENSSH PRIVATE KEY" in Path(key).read_bytes():
            raise Failure(f"the key {key} is in OpenSSH's format, which TLS does not take: make a "
                          f"certificate with it, `{PROGRAM} certgen --account LOGIN --ssh-key "
                          f"{key}`") from None
        if "KEY_VALUES_MISMATCH" in str(error):
            raise Failure(f"the key {key} does not belong to the certificate {cert}") from None
        if "TOO_SMALL" in str(error) or "TOO_WEAK" in str(error):
            raise Failure(f"the key of {cert} is too short or its digest too weak: {CERTGEN}"
                          ) from None
        raise Failure(f"{cert} and {key} are not a certificate and its key in PEM") from None
    return context


def need_terminal(what: str) -> None:
    """Failure where nobody can be asked for the passphrase of `what`."""
    if not sys.stdin.isatty():
        raise Failure(f"{what} has a passphrase, and there is no terminal to ask for it: "
                      "use a key without one, readable by you alone")


def ask_passphrase(what: str) -> str:
    """What the user types on the terminal, unseen."""
    need_terminal(what)
    try:
        return getpass.getpass(f"Passphrase of {what}: ", sys.stderr)
    except EOFError:
        raise Failure(f"no passphrase for {what}") from None


def words_of(error: OSError) -> str:
    """`no such file or directory`."""
    return (error.strerror or str(error)).lower()


def choose(name: str, containers: Sequence[Container]) -> Container:
    """The container that is meant: by alias, else by the beginning of its UUID."""
    found = [container for container in containers if container.alias == name]
    if not found and len(name) >= 2:
        found = [container for container in containers if container.uuid.startswith(name.lower())]
    if len(found) == 1:
        return found[0]
    if found:
        more = f" or {len(found) - 8} more" if len(found) > 8 else ""
        raise Failure(f"{name!r} may be " + " or ".join(map(describe, found[:8])) + more
                      + ": give the UUID")
    aliases = sorted({container.alias for container in containers})
    near = [alias for alias in aliases if name.lower() in alias.lower()][:5]
    near = near or sorted(difflib.get_close_matches(name, aliases, 5, 0.6))
    if not containers:
        raise Failure(f"no container {name!r}: this account has none that run")
    raise Failure(f"no container {name!r}; " + ("did you mean " + " or ".join(near) + "?" if near
                                                else f"`{PROGRAM} discover` lists them"))


def describe(container: Container) -> str:
    """A container in a message."""
    return f"{container.uuid} ({container.alias}, {container.state})"


def need_credentials(arguments: argparse.Namespace) -> None:
    """Usage where certificate or key is not named."""
    for name in ("cert", "key"):
        if not getattr(arguments, name):
            raise Usage(f"who asks? set CMON_{name.upper()} or give --{name} FILE (PEM)")


def proxy_of(arguments: argparse.Namespace) -> Proxy:
    """The proxy that flags and environment name."""
    url = proxy_url(arguments.url)
    need_credentials(arguments)
    tls = client_context(arguments.cert, arguments.key, arguments.ca)
    return Proxy(url, tls, arguments.timeout)


# --- display --------------------------------------------------------------------------------------

def printable(text: str) -> str:
    """The text on one line, with nothing in it that a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def colours() -> bool:
    """Whether a person looks on, at a terminal with colours, and does not mind them."""
    return (sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb")


def emphasis(text: str) -> str:
    """Bold, where that is wanted."""
    return f"\x1b[1m{text}\x1b[0m" if colours() else text


def coloured(text: str, colour: int) -> str:
    """In a colour of ISO 6429, where that is wanted; 0 is none."""
    return f"\x1b[{colour}m{text}\x1b[0m" if colour and colours() else text


def cells_of(text: str) -> int:
    """How many columns of a terminal the text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(char) else
               2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def clipped(text: str, width: int) -> str:
    """The text, cut with an ellipsis where it is wider."""
    if cells_of(text) <= width:
        return text
    while text and cells_of(text) > width - 1:
        text = text[:-1]
    return text + "…"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()
            ) -> list[str]:
    """Lines with aligned columns, the header first; columns `right` to the right."""
    widths = [max(map(cells_of, column)) for column in zip(header, *rows)]

    def line(row: Sequence[str]) -> str:
        return "  ".join(" " * (width - cells_of(cell)) + cell if index in right else
                         cell + " " * (width - cells_of(cell))
                         for index, (cell, width) in enumerate(zip(row, widths))).rstrip()
    return [line(header), *map(line, rows)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()
          ) -> list[str]:
    """The same, with an emphasised header."""
    lines = aligned(header, rows, right)
    return [emphasis(lines[0]), *lines[1:]]


def fitted(header: Sequence[str], rows: Sequence[Sequence[str]], width: int,
           drop: Sequence[str] = (), left: int = 1, plain: bool = False) -> list[str]:
    """A table with its first `left` columns to the left, the others to the right; where it is too
    wide, columns are dropped in the order of `drop`. `plain`: without emphasis."""
    keep = list(range(len(header)))
    for title in ("", *drop):
        if title in header:
            keep.remove(header.index(title))
        lines = aligned([header[index] for index in keep],
                        [[row[index] for index in keep] for row in rows],
                        [place for place, index in enumerate(keep) if index >= left])
        if max(map(cells_of, lines)) <= width:
            break
    lines = [clipped(line, width) for line in lines]
    return lines if plain else [emphasis(lines[0]), *lines[1:]]


def container_table(containers: Sequence[Container], width: int) -> list[str]:
    """Containers as a table; where it would be too wide, nodes and then aliases are cut."""
    rows: list[Sequence[str]] = [*containers]
    header = ("ALIAS", "UUID", "BRAND", "STATE", "NODE")
    if containers and max(map(cells_of, aligned(header, rows))) > width:
        rows = [(*row[:4], row[4][:8]) for row in rows]
        excess = max(map(cells_of, aligned(header, rows))) - width
        if excess > 0:
            longest = max(max(cells_of(row[0]) for row in rows) - excess, 8)
            rows = [(clipped(row[0], longest), *row[1:]) for row in rows]
    return table(header, rows)


def screen_size() -> os.terminal_size:
    """Columns and lines of the terminal as it is now: COLUMNS stays when the window changes."""
    try:
        found = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):       # no terminal, or no file at all
        found = os.terminal_size((0, 0))
    return found if found.columns and found.lines else os.terminal_size((80, 24))


def screen_width() -> int:
    """Columns of the terminal; a pipe or a file has room for everything."""
    return screen_size().columns if sys.stdout.isatty() else 10_000


def brief(value: Number, step: int = 1000, prefixes: str = "kMGTPE") -> str:
    """A number in a few characters: 0.012, 3.1, 42, 1.37 M."""
    size = abs(quotient(value, 1))
    if not math.isfinite(size):
        return number(float(value)) if isinstance(value, float) else "huge"
    prefix = ""
    for prefix in ("", *prefixes):
        if size < max(step, 10_000 if not prefix and step == 1000 else 0):
            break
        size /= step
    else:
        size *= step
    digits = f"{size:.3g}" if size < 1000 else f"{size:.0f}"
    sign = "-" if value < 0 else ""
    return f"{sign}{digits} {prefix}".rstrip()


def amount(value: Number | None, unit: str) -> str:
    """A value with its unit, for people; "-" where there is none."""
    if value is None:
        return "-"
    rate = "/s" if unit.endswith("/s") else ""
    unit = unit[:-len(rate)] if rate else unit
    if unit in ("bytes", "bytes per second"):
        text = brief(value, 1024, "KMGTPE")
        text += "iB" if text[-1] in "KMGTPE" else " B"
        return text + (rate or ("/s" if unit != "bytes" else ""))
    if unit == "nanoseconds":
        return brief(quotient(value, 10 ** 9)) + " s" + rate
    if unit == "share of ns":
        return f"{quotient(value, 10 ** 7):.1f} %"
    if unit == "sum of ns":
        return brief(quotient(value, 10 ** 9))
    if unit == "share":
        return f"{quotient(value, 1) * 100:.1f} %"
    shown = {"percent": " %", "seconds": " s", "milliseconds": " ms", "ppm": " ppm",
             "days": " days"}.get(unit, "")
    whole = unit == "seconds" and isinstance(value, int) and not rate
    return (str(value) if whole else brief(value)) + shown + rate


class Painter:
    """Shows tables and pages one after another, or in place of each other."""

    def __init__(self, in_place: bool) -> None:
        self._in_place = in_place and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = False
        self._note = ""

    def raw(self, page: Page) -> None:
        """A page as it came; on a terminal, with nothing in it that would drive the terminal."""
        if self._in_place or sys.stdout.isatty():
            lines = ["".join(char if char.isprintable() else "?" for char in line)
                     for line in page.body.decode("utf-8", "replace").splitlines()]
            if self._in_place:      # there is room for the samples at most
                lines = [clipped(line, screen_width()) for line in lines
                         if not line.startswith("#")]
            self.lines(lines)
        else:
            sys.stdout.buffer.write(page.body)      # whatever the locale
            sys.stdout.flush()
            self._shown = True

    def lines(self, lines: Sequence[str]) -> None:
        """A table."""
        if not self._in_place:
            print("\n".join([*([""] if self._shown else []), *lines]), flush=True)
            self._shown = True
            return
        columns, height = screen_size()
        if self._note:
            lines = [*lines, "", clipped(self._note, columns)]
        if len(lines) >= height:
            lines = [*lines[:height - 2], f"… {len(lines) - height + 2} more lines"]
        # each line is cleared behind its end, and all below: what was there before does not flash
        print(("\x1b[H" if self._shown else "\x1b[2J\x1b[H")
              + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", end="", flush=True)
        self._shown = True
        self._note = ""

    def end(self) -> None:
        """Leave the prompt a line of its own, behind the `^C` that the terminal shows."""
        if self._in_place:
            print(flush=True)

    def line(self, text: str) -> None:
        """One line, as it is."""
        print(text, flush=True)

    def note(self, text: str) -> None:
        """What went wrong meanwhile: below the next table, or on stderr."""
        if self._in_place and self._shown:
            self._note = text
            height = screen_size().lines
            print(f"\x1b7\x1b[{height}H{clipped(text, screen_width())}\x1b[K\x1b8", end="",
                  flush=True)
        else:
            print(text, file=sys.stderr)


# --- figures --------------------------------------------------------------------------------------

LEAST_SPAN = 0.05               # seconds; closer readings are one reading, answered twice
OLDEST_COPY = 60.0              # seconds that another proxy's copy may be older than the last page
_METRIC = r'[a-zA-Z_:][a-zA-Z0-9_:]*(?:\{(?:[^"{}]|"(?:[^"\\]|\\.)*")*\})?'
_OPERAND = rf"rate\(\s*{_METRIC}\s*\)|{_METRIC}"
_EXPRESSION = re.compile(rf"\s*({_OPERAND})\s*(?:/\s*({_OPERAND})\s*)?")
_LIMIT = r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?"
_RANGE = re.compile(rf"(@?)(?:({_LIMIT}|~):)?({_LIMIT})?")
OK, WARNING, CRITICAL, UNKNOWN = range(4)       # of the plugin guidelines, and their exit status


@functools.lru_cache(maxsize=None)
def facts() -> dict[str, dict[str, Any]]:
    """What the agent's tables say of each metric, by name; `collectors` of zones and of nodes."""
    found: dict[str, dict[str, Any]] = {}
    for row in metadata():
        found.setdefault(row["name"], {**row, "collectors": []})["collectors"].append(
            row["collector"])
    return found


class Page(NamedTuple):
    """One scrape of one container."""
    at: float                   # wall clock, when the answer came
    uuid: str
    alias: str
    body: bytes


class Figures:
    """The samples of a page by name and labels; with an earlier page, rates of its counters.

    A rate is taken over the true time between two readings: the node's clock less the age that the
    agent states for the collector. Where a collector was not read again since, its last rates stay.
    A counter that has become smaller began again at 0.
    """

    def __init__(self, page: Page, before: Figures | None = None) -> None:
        self.page = page
        self.values: dict[str, dict[Labels, Number]] = {}
        self.rates: dict[str, dict[Labels, float]] = {}
        self.kinds: dict[str, str] = {}     # of a sample's name: with its suffix
        try:
            self.families = parse(page.body.decode())
        except (ExpositionError, UnicodeDecodeError) as error:
            raise Failure(f"the page of {page.alias} is not in Prometheus' text format: "
                          + printable(str(error))) from None
        for family in self.families:
            for sample in family.samples:
                name = family.name + sample.suffix
                self.kinds[name] = family.kind
                self.values.setdefault(name, {})[tuple(sorted(sample.labels))] = sample.value
        self.ages = {labels[0][1]: age for labels, age in self.values.get(
            "cmon_sample_age_seconds", {}).items() if labels}
        clock = self.values.get("time_of_day", {}).get(())
        self.now = page.at if clock is None else quotient(clock, 1000) + self.ages.get("time", 0)
        self.taken = {"": self.now, **{collector: self.now - age
                                       for collector, age in self.ages.items()}}
        self.compared = before is not None
        if before is not None:
            self._compare(before)

    def _compare(self, before: Figures) -> None:
        ours = self.page.at - before.page.at
        if self.now - before.now >= ours / 2 - 1:
            spans = {collector: taken - before.taken.get(collector, before.now)
                     for collector, taken in self.taken.items()}
        else:       # the node's clock stands still or was set back
            spans = dict.fromkeys(self.taken, ours)
        for collector, span in spans.items():
            if -OLDEST_COPY < span < LEAST_SPAN:
                self.taken[collector] = before.taken.get(collector, before.now)
        for name in self.counters():
            span, values = spans[self.collector(name)], self.values[name]
            earlier = before.values.get(name, {})
            if span < LEAST_SPAN and values != earlier:
                span = ours         # it was read again, whatever the page says
            if span < LEAST_SPAN:
                if name in before.rates and span > -OLDEST_COPY:
                    self.rates[name] = before.rates[name]
                continue
            self.rates[name] = {
                labels: quotient(value - earlier[labels] if value >= earlier[labels] else value,
                                 span)
                for labels, value in values.items() if labels in earlier}

    def counters(self) -> list[str]:
        """The names of all that is no gauge."""
        return [name for name, kind in self.kinds.items() if kind != GAUGE]

    def collector(self, name: str) -> str:
        """Which collector of the page a metric comes from; "" when the page does not say."""
        known = facts().get(name, {}).get("collectors", ())
        return next((one for one in known if one in self.ages), "") or next(
            (one for one in self.ages if name.startswith(one + "_")), "")


def quotient(value: Number, divisor: Number) -> float:
    """A division of numbers of any size; infinite where the result is too large for a float."""
    try:
        return value / divisor
    except OverflowError:
        return math.inf


class Operand(NamedTuple):
    """A metric, some of its samples, or their rate."""
    name: str
    labels: Labels
    rate: bool

    def of(self, figures: Figures) -> dict[Labels, Number]:
        """Its value for each set of labels."""
        found: Mapping[Labels, Number] = (figures.rates if self.rate else figures.values).get(
            self.name, {})
        return {labels: value for labels, value in found.items()
                if set(self.labels) <= set(labels) and math.isfinite(quotient(value, 1))}

    def unit(self) -> str:
        """The unit of its values, as the agent's tables have it."""
        unit = str(facts().get(self.name, {}).get("unit", ""))
        return (unit + "/s").replace("boolean", "") if self.rate else unit


class Expression(NamedTuple):
    """`METRIC`, `METRIC{label="value"}`, `rate(…)`, or one of them divided by another."""
    text: str
    over: Operand
    under: Operand | None

    @classmethod
    def of_text(cls, text: str) -> Expression:
        """The expression; raises Usage."""
        match = _EXPRESSION.fullmatch(text)
        if match is None:
            raise Usage(f"{text!r} is not an expression: METRIC, METRIC{{label=\"value\"}}, "
                        "rate(METRIC) or A/B")
        over, under = match.groups()
        return cls(text.strip(), operand(over), operand(under) if under else None)

    def of(self, figures: Figures) -> dict[Labels, Number]:
        """Its value for each set of labels; divided are samples with the same labels, or by the one
        that there is. What cannot be divided has no value."""
        over = self.over.of(figures)
        if self.under is None:
            return over
        under = self.under.of(figures)
        single = next(iter(under.values())) if len(under) == 1 else 0
        return {labels: quotient(value, under.get(labels, single))
                for labels, value in over.items() if under.get(labels, single)}

    def unit(self) -> str:
        """The unit of its values; "" for a count, "share" for what is divided."""
        return "share" if self.under is not None else self.over.unit()


def operand(text: str) -> Operand:
    """One operand of an expression, its labels read as a page's are."""
    rate = text.startswith("rate(")
    series = text[5:-1].strip() if rate else text
    try:
        family, = parse(f"{series} 0\n")
    except ExpositionError:
        raise Usage(f"{text!r} is not an expression: labels stand as in a page, "
                    "{label=\"value\"}") from None
    return Operand(family.name, tuple(sorted(family.samples[0].labels)), rate)


class Range(NamedTuple):
    """A range of the plugin guidelines: it alerts outside of `low` to `high`, with `@` inside."""
    text: str
    low: float
    high: float
    inverted: bool

    @classmethod
    def of_text(cls, text: str) -> Range:
        """The range; raises Usage. https://www.monitoring-plugins.org/doc/guidelines.html"""
        match = _RANGE.fullmatch(text)
        if match is None or (match.group(2) is None and match.group(3) is None):
            raise Usage(f"{text!r} is not a range: 10, 10:, ~:10, 10:20 or @10:20")
        low = -math.inf if match.group(2) == "~" else float(match.group(2) or 0)
        high = float(match.group(3) or "inf")
        if low > high:
            raise Usage(f"{text!r} is not a range: it begins above its end")
        return cls(text, low, high, match.group(1) == "@")

    def words(self) -> str:
        """What is wrong with a value that it alerts for."""
        text = self.text.lstrip("@")
        return ("inside " if self.inverted else "outside ") + (text if ":" in text else "0:" + text)

    def alerts(self, value: Number) -> bool:
        """Whether the value is one to alert for."""
        return (self.low <= value <= self.high) == self.inverted


class Threshold(NamedTuple):
    """`EXPR,WARN,CRIT`: what to look at, and when to be worried."""
    expression: Expression
    warning: Range | None
    critical: Range | None

    @classmethod
    def of_text(cls, text: str) -> Threshold:
        """From a word of the command line; both ranges may be empty or missing. Raises Usage."""
        match = _EXPRESSION.match(text)
        rest = text[match.end():] if match else ""
        words = rest.split(",") if rest else ["", ""]
        if match is None or words[0] or len(words) > 3:
            raise Usage(f"{text!r} is not EXPR,WARN,CRIT: 'load_average,4,8', "
                        "'rate(net_drops_in_total),0', 'mem_agg_usage/mem_limit,0.8,0.9'")
        ranges = [Range.of_text(word.strip()) if word.strip() else None for word in words[1:]]
        return cls(Expression.of_text(match.group()), *(ranges + [None, None])[:2])

    def status(self, value: Number) -> int:
        """OK, WARNING or CRITICAL."""
        if self.critical is not None and self.critical.alerts(value):
            return CRITICAL
        return WARNING if self.warning is not None and self.warning.alerts(value) else OK


CELLS = ("utilisation", "saturation", "errors")
VERDICT_WORDS = ("ok", "watch", "bad")


class Cell(NamedTuple):
    """One cell of the USE table: its verdict (None: nothing to judge by) and its figures."""
    resource: str
    name: str
    verdict: int | None
    figures: tuple[Expression, ...]
    share: str = ""             # how much of it is used, in words beside the figure of `shared`
    shared: str = ""


@functools.lru_cache(maxsize=None)
def figure_of(name: str) -> Expression:
    """What is shown of a metric: the rate of a counter, the value of a gauge."""
    counts = facts().get(name, {}).get("type") == COUNTER
    return Expression.of_text(f"rate({name})" if counts else name)


@functools.lru_cache(maxsize=None)
def cell_thresholds(use: Use, cell: str) -> tuple[Threshold, ...]:
    """What judges saturation, which is worth a look, and errors, which are bad, from USE_FROM."""
    thresholds: list[Threshold] = []
    for name in use.saturation if cell == "saturation" else use.errors:
        limit = Range.of_text("1:") if name in USE_UP else below(USE_FROM.get(name, 0))
        if USE_FROM.get(name, 0) != math.inf:
            bad = cell == "errors"
            thresholds.append(Threshold(figure_of(name), None if bad else limit,
                                        limit if bad else None))
    return tuple(thresholds)


def share_of(use: Use, figures: Figures) -> float | None:
    """The part of a resource that is used, as the table says; of several, the fullest."""
    if not use.share:
        return None
    used, whole = figure_of(use.share[0]), use.share[1:]
    if whole:
        shares = list(Expression.of_text(f"{used.text}/{whole[0]}").of(figures).values())
    else:
        values = used.of(figures).values()
        shares = [quotient(sum(values), len(values))] if values else []
    return max((1 - share if use.left else share for share in shares), default=None)


def below(limit: float) -> Range:
    """The range that alerts from this value on; for 0, above it."""
    return Range("", -math.inf, math.nextafter(limit, 0) if limit else 0, False)


def scope_of(figures: Figures) -> str:
    """Whether a page is a zone's or a compute node's."""
    return "node" if "alloc_cpus" in figures.values or "cpu_idle_seconds_total" in figures.values \
        else "zone"


def verdict_of(use: Use, cell: str, figures: Figures) -> int | None:
    """The verdict of a cell; None where there is nothing to judge by."""
    if cell == "utilisation":
        share = share_of(use, figures)
        return None if share is None else CRITICAL if share >= USE_FULL else int(share >= USE_BUSY)
    return max((one.status(value) for one in cell_thresholds(use, cell)
                for value in one.expression.of(figures).values()), default=None)


def share_words(use: Use, figures: Figures) -> str:
    """The share of a resource that is used, beside the figure that says so."""
    share = share_of(use, figures)
    if share is None:
        return ""
    whole = f" of {use.share[1]}" if use.share[1:] else ""
    return f" ({amount(share, 'share')}{whole}{'' if whole and not use.left else ' used'})"


def use_cells(figures: Figures) -> list[Cell]:
    """The USE table of a page; resources of which the page says nothing are left out."""
    cells: list[Cell] = []
    scope = scope_of(figures)
    for use in USE:
        metrics = (use.utilisation, use.saturation, use.errors)
        if use.scope != scope or not any(
                name in figures.values for names in metrics for name in names):
            continue
        for cell, names in zip(CELLS, metrics):
            if names:
                shown = tuple(figure_of(name) for name in names if name in figures.values)
                cells.append(Cell(use.resource, cell, verdict_of(use, cell, figures), shown,
                                  share_words(use, figures) if cell == "utilisation" else "",
                                  *use.share[:1]))
    return cells


# --- monitor --------------------------------------------------------------------------------------

ONCE_SECONDS = 2.0              # between the two scrapes of a table with rates, and of --watch
MOST_SCRAPES = 5                # for one table: an agent that saves CPU may repeat its last values
RECORD_SECONDS = 10.0


class Cap(NamedTuple):
    """One row of --caps."""
    resource: str
    cap: str
    used: str
    highest: str = ""
    above: str = ""


CAPS = (
    Cap("cpu", "cpucap_limit_percentage", "cpucap_cur_usage_percentage",
        "cpucap_max_usage_percentage", "cpucap_above_seconds_total"),
    Cap("memory", "mem_limit", "mem_agg_usage"),
    Cap("swap", "mem_swap_limit", "mem_swap"),
    Cap("reserved swap", "mem_swap_reserved_limit_bytes", "mem_swap_reserved_bytes"),
    Cap("locked memory", "mem_locked_limit_bytes", "mem_locked_bytes"),
    Cap("disk space", "zfs_quota", "zfs_used"),
    Cap("processes", "proc_processes_limit", "proc_processes"),
)


class Column(NamedTuple):
    """A column of --net and --disk: an expression, and the unit to show it in, if not its own."""
    title: str
    expression: str
    unit: str = ""


class Layout(NamedTuple):
    """A table with a row for each value of some labels; its last columns are dropped first."""
    labels: tuple[str, ...]
    columns: tuple[Column, ...]


NET = (
    Layout(("interface", "nic_tag"), (
        Column("IN", "rate(net_agg_bytes_in)"), Column("OUT", "rate(net_agg_bytes_out)"),
        Column("DROPS IN", "rate(net_drops_in_total)"),
        Column("DROPS OUT", "rate(net_drops_out_total)"),
        Column("ERRS IN", "rate(net_errors_in_total)"),
        Column("ERRS OUT", "rate(net_errors_out_total)"),
        Column("PKTS IN", "rate(net_agg_packets_in)"),
        Column("PKTS OUT", "rate(net_agg_packets_out)"),
        Column("UP", "net_link_up"), Column("SPEED", "net_speed_bytes_per_second"))),
    Layout(("link",), (
        Column("IN", "rate(link_bytes_in_total)"), Column("OUT", "rate(link_bytes_out_total)"),
        Column("DROPS IN", "rate(link_drops_in_total)"),
        Column("DROPS OUT", "rate(link_drops_out_total)"),
        Column("ERRS IN", "rate(link_errors_in_total)"),
        Column("ERRS OUT", "rate(link_errors_out_total)"),
        Column("UP", "link_up"), Column("SPEED", "link_speed_bytes_per_second"))),
)
DISK = (
    Layout((), (
        Column("READ", "rate(vfs_bytes_read_count)"),
        Column("WRITTEN", "rate(vfs_bytes_written_count)"),
        Column("BUSY", "rate(vfs_run_time_count)", "share of ns"),
        Column("WAITING", "rate(vfs_wait_length_time_count)", "sum of ns"),
        Column(">10MS", 'rate(vfs_slow_operations_total{over="10ms"})'),
        Column(">1S", 'rate(vfs_slow_operations_total{over="1s"})'),
        Column("READS", "rate(vfs_read_operation_count)"),
        Column("WRITES", "rate(vfs_write_operation_count)"))),
    Layout((), (
        Column("USED", "zfs_used"), Column("AVAILABLE", "zfs_available"),
        Column("QUOTA", "zfs_quota"), Column("SHARE", "zfs_used/zfs_quota"),
        Column("COMPRESSION", "zfs_compressratio"))),
    Layout(("device",), (
        Column("READ", "rate(disk_read_bytes_total)"),
        Column("WRITTEN", "rate(disk_written_bytes_total)"),
        Column("BUSY", "rate(disk_busy_seconds_total)", "share"),
        Column("WAITING", "rate(disk_wait_length_seconds_total)", "count"),
        Column("READS", "rate(disk_reads_total)"), Column("WRITES", "rate(disk_writes_total)"))),
    Layout(("pool",), (
        Column("SIZE", "zpool_size_bytes"), Column("USED", "zpool_allocated_bytes"),
        Column("SHARE", "zpool_allocated_bytes/zpool_size_bytes"),
        Column("FRAGMENTED", "zpool_fragmentation_percent"),
        Column("HEALTH", "zpool_health_status"))),
)


def one_value(figures: Figures, text: str) -> Number | None:
    """The value of an expression that has one, for the whole container."""
    return Expression.of_text(text).of(figures).get(()) if text else None


def caps_rows(figures: Figures) -> list[dict[str, Any]]:
    """--caps, exactly; where there is no cap, it and the share are None."""
    rows = []
    for row in CAPS:
        cap, used, highest, above = (one_value(figures, text) for text in row[1:])
        if used is not None:
            rows.append({"resource": row.resource, "cap": cap or None, "used": used,
                         "share": quotient(used, cap) if cap else None, "highest": highest,
                         "above_seconds": above})
    return rows


def caps_lines(figures: Figures, width: int) -> list[str]:
    """--caps for people."""
    rows = []
    for row, spec in ((row, spec) for row in caps_rows(figures) for spec in CAPS
                      if spec.resource == row["resource"]):
        unit = operand(spec.used).unit()
        rows.append((row["resource"], amount(row["cap"], unit) if row["cap"] else "none",
                     amount(row["used"], unit), amount(row["share"], "share"),
                     amount(row["highest"], unit), amount(row["above_seconds"], "seconds")))
    return fitted(("RESOURCE", "CAP", "USED", "SHARE", "HIGHEST", "ABOVE"), rows, width,
                  drop=("HIGHEST", "ABOVE", "CAP")) if rows else []


def use_rows(figures: Figures) -> list[dict[str, Any]]:
    """--use, exactly: a row for each cell."""
    return [{"resource": cell.resource, "cell": cell.name,
             "verdict": None if cell.verdict is None else VERDICT_WORDS[cell.verdict],
             "figures": {one.text: [{"labels": dict(labels), "value": value}
                                    for labels, value in one.of(figures).items()]
                         for one in cell.figures}} for cell in use_cells(figures)]


def use_lines(figures: Figures, width: int) -> list[str]:
    """--use for people: the figures of a cell beside it, or below it where it is narrow."""
    cells = use_cells(figures)
    heads = aligned(("RESOURCE", "CELL", "VERDICT"), [
        (clipped(cell.resource, 16 if width < 100 else 40), cell.name,
         "-" if cell.verdict is None else VERDICT_WORDS[cell.verdict]) for cell in cells])
    indent = max(map(cells_of, heads)) + 2
    beside = width - indent >= 44
    first = heads[0] + " " * (indent - cells_of(heads[0])) + "FIGURES" if beside else heads[0]
    lines = [emphasis(clipped(first, width))]
    for head, cell in zip(heads[1:], cells):
        texts = [f"{one.over.name} {combined(one, figures)}"
                 + (cell.share if one.over.name == cell.shared else "") for one in cell.figures]
        if beside:      # a figure is not torn apart
            words = ", ".join(texts).replace(" ", "\0").replace(",\0", ", ").replace("\0(", " (")
            texts = [clipped(text.replace("\0", " "), width - indent) for text in
                     textwrap.wrap(words, width - indent, break_long_words=False)]
            lines.append(judged(head) + " " * (indent - cells_of(head)) + "".join(texts[:1]))
            lines += [" " * indent + text for text in texts[1:]]
        else:
            lines += [judged(clipped(head, width)),
                      *(clipped("  " + text, width) for text in texts)]
    return [line.rstrip() for line in lines] if cells else []


def judged(line: str) -> str:
    """A line that ends with a verdict, in its colour."""
    word = line.rsplit(" ", 1)[-1]
    return coloured(line, {"watch": 33, "bad": 31}.get(word, 0))


def combined(expression: Expression, figures: Figures) -> str:
    """What an expression says of the whole container: the sum over its samples; of samples that
    contain each other (`over`) the largest, of yes and no whether all say yes."""
    found = expression.of(figures)
    if not found:
        return "-"
    nested = any(name == "over" for labels in found for name, _ in labels)
    combine = max if nested else min if expression.unit() == "boolean" else sum
    return amount(combine(found.values()), expression.unit())


def layout_rows(layouts: Sequence[Layout], figures: Figures
                ) -> list[tuple[Layout, list[tuple[tuple[str, ...], list[Number | None]]]]]:
    """The rows of each layout that the page has something for: label values, then columns."""
    tables = []
    for layout in layouts:
        columns = [Expression.of_text(column.expression) for column in layout.columns]
        rows: dict[tuple[str, ...], list[Number | None]] = {}
        for index, expression in enumerate(columns):
            if expression.over.name not in figures.values:
                continue
            for labels in figures.values[expression.over.name]:
                key = tuple(dict(labels).get(name, "") for name in layout.labels)
                rows.setdefault(key, [None] * len(columns))
            for labels, value in expression.of(figures).items():
                key = tuple(dict(labels).get(name, "") for name in layout.labels)
                rows[key][index] = value
        if rows:
            tables.append((layout, list(rows.items())))
    return tables


def layout_objects(layouts: Sequence[Layout], figures: Figures) -> list[dict[str, Any]]:
    """--net or --disk, exactly: label names and expressions are the keys."""
    return [{**dict(zip(layout.labels, key)),
             **{column.expression: value for column, value in zip(layout.columns, values)}}
            for layout, rows in layout_rows(layouts, figures) for key, values in rows]


def layout_lines(layouts: Sequence[Layout], figures: Figures, width: int) -> list[str]:
    """--net or --disk for people."""
    lines: list[str] = []
    for layout, found in layout_rows(layouts, figures):
        units = [column.unit or Expression.of_text(column.expression).unit()
                 for column in layout.columns]
        header = (*(name.upper().replace("_", " ") for name in layout.labels),
                  *(column.title for column in layout.columns))
        rows = [(*map(printable, key),
                 *(amount(value, unit) for value, unit in zip(values, units)))
                for key, values in found]
        left = len(layout.labels)
        turned = [*zip(header, *rows)]
        upright = aligned(turned[0], turned[1:], range(1, len(rows) + 1))
        lines += [""] * bool(lines)
        if max(map(cells_of, aligned(header, rows))) > width >= max(map(cells_of, upright)):
            lines += upright            # narrow: a line for each column, and none is lost
        else:
            lines += fitted(header, rows, width, left=left, drop=("NIC TAG", *(
                column.title for column in reversed(layout.columns[2:]))))
    return lines


class Table(NamedTuple):
    """One way to look at a page: for people and exactly; `rates`: it takes two scrapes."""
    help: str
    rates: bool
    lines: Callable[[Figures, int], list[str]]
    objects: Callable[[Figures], list[dict[str, Any]]]


TABLES = {
    "caps": Table("its caps: cap, used, share, highest use, seconds above the cap", False,
                  caps_lines, caps_rows),
    "use": Table("utilisation, saturation and errors of each resource, with a verdict", True,
                 use_lines, use_rows),
    "net": Table("its network interfaces, as rates", True,
                 functools.partial(layout_lines, NET), functools.partial(layout_objects, NET)),
    "disk": Table("its file systems, as rates, and disk space", True,
                  functools.partial(layout_lines, DISK), functools.partial(layout_objects, DISK)),
}


def page_objects(figures: Figures) -> dict[str, Any]:
    """A whole page, exactly."""
    return {name: [{"labels": dict(labels), "value": value} for labels, value in found.items()]
            for name, found in figures.values.items()}


def as_json(figures: Figures, table: Table | None, indent: int | None) -> str:
    """One page or table as one object. JSON knows no infinity: what is no number becomes text."""
    page = figures.page

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return number(value) if isinstance(value, float) and not math.isfinite(value) else value
    return json.dumps({"alias": page.alias, "uuid": page.uuid, "at": round(page.at, 3),
                       **({"metrics": plain(page_objects(figures))} if table is None else
                          {"rows": plain(table.objects(figures))})}, indent=indent)


Scrape = Union[Page, Failure]


def live_pages(proxy: Proxy, container: Container, interval: float) -> Iterator[Scrape]:
    """A page of the container every so many seconds; a later one that fails is a Failure."""
    due = time.monotonic()
    first = True
    while True:
        try:
            body = proxy.scrape(container.uuid)
            yield Page(time.time(), container.uuid, container.alias, body)
        except Failure as failure:
            if first:
                raise
            yield failure
        first = False
        due = max(due + interval, time.monotonic())
        time.sleep(max(due - time.monotonic(), 0))


def monitor(arguments: argparse.Namespace) -> int:
    """`cmon.py monitor`"""
    name = next((name for name in TABLES if getattr(arguments, name)), "")
    table = TABLES.get(name)
    if not arguments.container and not arguments.replay:
        raise Usage("whose metrics? give an alias, a UUID or the beginning of one")
    if arguments.record and arguments.replay:
        raise Usage("--record and --replay exclude each other: a recording is already there")
    for flag in ("speed", "count"):
        if getattr(arguments, flag) is not None and not (
                arguments.replay if flag == "speed" else arguments.record or
                arguments.watch is not None):
            raise Usage("--speed goes with --replay" if flag == "speed" else
                        "--count goes with --watch or --record")
    if arguments.replay:
        return show_pages(arguments, table, replayed_pages(arguments), math.inf)
    proxy = proxy_of(arguments)
    container = proxy.find(arguments.container)
    going_on = arguments.watch is not None or bool(arguments.record)
    interval = arguments.watch or (RECORD_SECONDS if arguments.record else ONCE_SECONDS)
    pages = live_pages(proxy, container, interval)
    most = (arguments.count or math.inf) if going_on else 1
    if arguments.record and most == math.inf:
        print(f"cmon: recording {container.alias} every {interval:g} s to {arguments.record}, "
              "until Ctrl-C", file=sys.stderr)
    return show_pages(arguments, table, pages, most)


def show_pages(arguments: argparse.Namespace, table: Table | None, pages: Iterator[Scrape],
               most: float) -> int:
    """Record and show pages until there are `most`, the source ends, or Ctrl-C."""
    several = most > 1
    recorder = Recorder(arguments.record) if arguments.record else None
    painter = Painter(in_place=several and arguments.watch is not None)
    silent = recorder is not None and table is None and arguments.watch is None \
        and not arguments.json
    earlier: dict[str, Figures] = {}        # by container
    waiting: Figures | None = None          # a first page, for which there are no rates yet
    done = shown = 0
    try:
        for page in pages:
            if isinstance(page, Failure):
                painter.note(f"cmon: {page}")
                continue
            done += 1
            if recorder is not None:
                recorder.add(page)
            if not silent and table is None and not arguments.json:
                painter.raw(page)
            elif not silent:
                before = earlier.get(page.uuid)
                waiting = figures = earlier[page.uuid] = Figures(page, before)
                if figures.rates or table is None or not table.rates or not figures.counters() or (
                        before and (several or done >= MOST_SCRAPES)):
                    waiting = None
                    paint(painter, figures, table, arguments, several)
                    shown += 1
            if done >= most and waiting is None:
                break
        if waiting is not None and not shown:
            paint(painter, waiting, table, arguments, several)
    except KeyboardInterrupt:
        if not several:
            raise
        painter.end()
    finally:
        if recorder is not None:
            recorder.close()
            print(f"cmon: {plural(done, 'page')} in {arguments.record}", file=sys.stderr)
    if not done and arguments.replay:
        raise Failure(f"{arguments.replay} has no whole page"
                      + (f" of {arguments.container}" if arguments.container else ""))
    return 0


def paint(painter: Painter, figures: Figures, table: Table | None, arguments: argparse.Namespace,
          several: bool) -> None:
    """Show one table."""
    if arguments.json:
        painter.line(as_json(figures, table, None if several else 2))
        return
    assert table is not None
    lines = table.lines(figures, screen_width()) or ["the page has no figures for this table"]
    if several:
        page = figures.page
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(page.at))
        lines = [clipped(f"{page.alias}  {when}", screen_width()), "", *lines]
    painter.lines(lines)


# --- recordings -----------------------------------------------------------------------------------

# A recording is pages, each behind a line that says when and of whom it is and how long. With .gz
# each page is a gzip member of its own, so that a recording that was cut off is good up to the cut,
# and pages can be appended to it.
LONGEST_PAUSE = 60.0            # seconds that --replay waits where the recording has a gap
HEAD = re.compile(rb"# cmon page at=([0-9]{1,12}(?:\.[0-9]{1,6})?) uuid=(" + UUID.pattern.encode()
                  + rb") alias=(\S{1,1500}) bytes=([0-9]{1,9})\n")
LONGEST_HEAD = 2000


class Recorder:
    """Appends pages to a file; what an interrupted recording has left of a page is cut away."""

    def __init__(self, path: str) -> None:
        self.packed = path.endswith(".gz")
        try:
            self._file = open(path, "a+b")
            whole = self._whole()
            self._file.truncate(whole)
            self._file.seek(whole)
        except OSError as error:
            raise Failure(f"cannot record to {path}: {words_of(error)}") from None
        except Failure as failure:
            raise Failure(f"will not append to {path}: {failure}") from None

    def _whole(self) -> int:
        """How many bytes of the file are whole pages; Failure if what follows is no cut-off one."""
        self._file.seek(0)
        end = 0
        if self.packed:
            end = whole_members(self._file)
        else:
            for _ in recorded(self._file):
                end = self._file.tell()
        self._file.seek(end)
        magic = b"\x1f\x8b" if self.packed else b"# cmon page "
        if not magic.startswith(self._file.read(len(magic))):
            raise Failure("it holds something else than a recording")
        return end

    def add(self, page: Page) -> None:
        """Append one page, at once."""
        whole = recorded_page(page)
        self._file.write(gzip.compress(whole) if self.packed else whole)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def recorded_page(page: Page) -> bytes:
    """A page as it stands in a recording."""
    return (f"# cmon page at={page.at:.3f} uuid={page.uuid} alias={urllib.parse.quote(page.alias)} "
            f"bytes={len(page.body)}\n").encode() + page.body


def whole_members(file: IO[bytes]) -> int:
    """Where the last whole member of a gzip file ends."""
    end = position = 0
    unpacker = zlib.decompressobj(31)
    while True:
        piece = file.read(65536)
        if not piece:
            return end
        while piece:
            try:
                unpacker.decompress(piece)
            except zlib.error:
                return end
            if not unpacker.eof:
                position += len(piece)
                break
            position += len(piece) - len(unpacker.unused_data)
            piece, end, unpacker = unpacker.unused_data, position, zlib.decompressobj(31)


def recorded(file: Union[IO[bytes], gzip.GzipFile]) -> Iterator[Page]:
    """The pages of a recording, up to where it is cut off."""
    try:
        while True:
            match = HEAD.fullmatch(file.readline(LONGEST_HEAD))
            size = int(match.group(4)) if match else MAX_BODY + 1
            if match is None or size > MAX_BODY:
                return
            body = file.read(size)
            if len(body) < size:
                return
            yield Page(float(match.group(1)), match.group(2).decode(),
                       printable(urllib.parse.unquote(match.group(3).decode("latin-1"))), body)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return


def recording(path: str) -> Iterator[Page]:
    """The pages of a file; Failure if it cannot be read or is none."""
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            yield from recorded(file)
    except OSError as error:
        raise Failure(f"cannot read {path}: {words_of(error)}") from None


def replayed_pages(arguments: argparse.Namespace) -> Iterator[Scrape]:
    """The pages of --replay: with --watch at the pace of the recording times --speed, or at the one
    that --watch gives; else at once."""
    name = (arguments.container or "").lower()
    last: Page | None = None
    for page in recording(arguments.replay):
        if name and name != page.alias.lower() and not page.uuid.startswith(name):
            continue
        if last is not None and arguments.watch is not None:
            pause = arguments.watch or min(max(page.at - last.at, 0), LONGEST_PAUSE) / (
                arguments.speed or 1)
            time.sleep(pause)
        last = page
        yield page


# --- top ------------------------------------------------------------------------------------------

TOP_SECONDS = 5.0               # between two rounds
OFF_SCREEN = 4                  # rounds in which what is off the screen is asked for once
QUOTA_SHARE = 0.5               # of the account's quota: others of the account ask, too
READINGS = 60                   # that are kept for a sparkline
LEAST_DRAW = 0.2                # seconds between two screens, but for keys
LEAST_SPARK = 8                 # columns of it, before it is worth its place
SPARKS = "▁▂▃▄▅▆▇█"
PLAIN_SPARKS = "_.:-=+*#"       # for terminals without the letters
FAST = ("cpucap", "memcap", "link", "zone_vfs", "zone_misc")    # collectors of what is shown
KEYS = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|\x1bO[A-Za-z]|.", re.S)
KEY_NAMES = {"\x1b[A": "up", "\x1bOA": "up", "k": "up", "\x1b[B": "down", "\x1bOB": "down",
             "j": "down", "\x1b[5~": "page up", "\x1b[6~": "page down", "\x1b[D": "<",
             "\x1bOD": "<", "\x1b[C": ">", "\x1bOC": ">", "\r": "enter", "\n": "enter",
             "u": "enter", "\x1b": "escape", "\x7f": "backspace", "\b": "backspace"}
TOP_HELP = ("q quit  < > sort  r reverse  / filter  space pause  enter USE",
            "q quit <> sort r / filter space enter")        # where that is too wide
DETAIL_HELP = ("q back  arrows, page up, page down scroll  space pause",
               "q back  j k scroll  space")
FILTER_HELP = ("enter keeps the filter  escape clears it", "enter keep  escape clear")


class TopColumn(NamedTuple):
    """A column of top: its title, the unit of its values, and how they come from a page."""
    title: str
    unit: str
    value: Callable[[Figures], Number | None]


def total(*texts: str) -> Callable[[Figures], Number | None]:
    """The sum of all samples of some expressions; None where there are none."""
    def value(figures: Figures) -> Number | None:
        found = [number for text in texts
                 for number in Expression.of_text(text).of(figures).values()]
        return sum(found) if found else None
    return value


def cpus_used(figures: Figures) -> Number | None:
    """CPUs in use: by the cap's usage as CPU%; without a cap by the counters."""
    percent = one_value(figures, "cpucap_cur_usage_percentage")
    if percent is not None:
        return quotient(percent, 100)
    nanoseconds = total("rate(cpu_user_usage)", "rate(cpu_sys_usage)")(figures)
    return None if nanoseconds is None else quotient(nanoseconds, 10 ** 9)


TOP_COLUMNS = (
    TopColumn("CPU%", "share", total("cpucap_cur_usage_percentage/cpucap_limit_percentage")),
    TopColumn("CPU", "", cpus_used),
    TopColumn("MEM%", "share", total("mem_agg_usage/mem_limit")),
    TopColumn("MEM", "bytes", total("mem_agg_usage")),
    TopColumn("NET", "bytes/s", total("rate(net_agg_bytes_in)", "rate(net_agg_bytes_out)")),
    TopColumn("DISK", "bytes/s", total("rate(vfs_bytes_read_count)",
                                       "rate(vfs_bytes_written_count)")),
)
TOP_TITLES = ("NAME", *(column.title for column in TOP_COLUMNS), "WORST", "AGE")
# In this order where it is narrow; what rows are sorted by stays, so `>` shows each in turn.
TOP_DROP = ("CPU", "MEM", "AGE", "DISK", "NET", "MEM%", "WORST")


class Row:
    """One container in top."""

    def __init__(self, uuid: str) -> None:
        self.uuid = self.alias = uuid
        self.state = "running"
        self.figures: Figures | None = None
        self.failure = ""
        self.asked = -math.inf              # monotonic
        self.pending = False
        self.values: dict[str, Number | None] = {}
        self.worst: tuple[int, str] = (-1, "")      # verdict and resource
        self.history: collections.deque[float] = collections.deque(maxlen=READINGS)

    def take(self, answer: Scrape) -> None:
        """A page, or why there is none."""
        self.pending = False
        try:
            if isinstance(answer, Failure):
                raise answer
            self.figures = Figures(answer, self.figures)
        except Failure as failure:
            self.failure = str(failure)
            return
        self.failure = ""
        self.values = {column.title: column.value(self.figures) for column in TOP_COLUMNS}
        self.worst = max(((cell.verdict, cell.resource) for cell in use_cells(self.figures)
                          if cell.name == "saturation" and cell.verdict is not None),
                         key=lambda one: one[0], default=(-1, ""))
        used = self.values["CPU%"] if self.values["CPU%"] is not None else self.values["CPU"]
        self.history.append(quotient(used or 0, 1))

    def age(self, now: float) -> float | None:
        """Seconds since what is shown was read in the kernel."""
        if self.figures is None:
            return None
        ages = [age for collector, age in self.figures.ages.items() if collector in FAST]
        return max(now - self.figures.page.at + max(map(float, ages), default=0.0), 0.0)

    def state_words(self) -> str:
        """The column WORST."""
        if self.state != "running":
            return self.state
        if self.failure:
            return "no answer"
        verdict, resource = self.worst
        return "-" if verdict < 0 else "ok" if verdict == OK else resource

    def rank(self, title: str, now: float) -> tuple[bool, Any]:
        """What rows are sorted by; without a value they come last."""
        if title == "NAME":
            return False, self.alias
        value = (self.worst[0] + 4 * bool(self.failure)) if title == "WORST" else \
            self.age(now) if title == "AGE" else self.values.get(title)
        return value is None, -quotient(value or 0, 1)

    def spark(self, width: int, letters: str) -> str:
        """Its CPU over time; full height is the cap, without a cap the most that was seen."""
        found = list(self.history)[-width:]
        full = 1.0 if self.values.get("CPU%") is not None else max(found, default=0.0)
        return "".join(letters[min(max(int(value / full * len(letters)), 0), len(letters) - 1)]
                       if full > 0 and math.isfinite(value) else letters[0] for value in found)


class Top:
    """What top knows and shows; it asks nobody and knows no terminal."""

    def __init__(self, sort: str = "CPU%", interval: float = TOP_SECONDS) -> None:
        self.sort, self.interval = sort, interval
        self.rows: dict[str, Row] = {}
        self.reverse = self.paused = self.typing = self.ended = False
        self.filter = ""
        self.selected = ""                  # a UUID
        self.moved = False                  # by the user; until then it is the first row
        self.detail = False                 # its USE table, instead of all containers
        self.first = 0                      # row or line at the top of the screen
        self.failure = ""                   # why the last round came to nothing
        self.behind = ""                    # why it cannot keep up
        self.quota: Number | None = None    # requests a minute
        self._shown: list[Row] = []         # on the screen when it was last drawn

    # what is known

    def take_fleet(self, figures: Figures) -> None:
        """The containers that there are, and what the account may ask."""
        found: dict[str, Row] = {}
        for labels in figures.values.get("cmon_instance_info", {}):
            uuid, alias = dict(labels).get("instance", ""), dict(labels).get("alias", "")
            row = found[uuid] = self.rows.get(uuid) or Row(uuid)
            row.alias = printable(alias) or uuid
        for labels, value in figures.values.get("cmon_instance_state", {}).items():
            if value == 1 and dict(labels).get("instance") in found:
                found[dict(labels)["instance"]].state = printable(dict(labels).get("state", "-"))
        self.rows = found
        self.quota = one_value(figures, "cmon_quota_limit")
        limited = one_value(figures, "cmon_quota_limited")
        self.failure = "over the account's quota: figures may be old" if limited else ""

    def take_page(self, answer: Scrape, uuid: str) -> None:
        """A container's page, or why there is none."""
        row = self.rows.get(uuid)
        if row is not None:
            row.take(answer)

    def due(self, now: float) -> list[Row]:
        """Whom to ask in this round: all on the screen, and an equal part of the others; within a
        share of the quota, those first whose figures are oldest."""
        shown = {row.uuid for row in self._shown}
        running = [row for row in self.rows.values() if row.state == "running"]
        waiting = [row for row in running if row.pending]
        patience = (OFF_SCREEN - 0.5) * self.interval
        wanted = sorted((row for row in running if not row.pending and (
            not shown or row.uuid in shown or now - row.asked >= patience)),
            key=lambda row: (row.uuid not in shown, row.asked))
        most = len(wanted)
        self.behind = ""
        if self.quota is not None:
            most = max(int(self.quota * QUOTA_SHARE * self.interval / 60) - 1, 1)
        if waiting:
            self.behind = f"cannot keep up: {len(waiting)} of the last round's pages have not come"
        elif most < len(wanted):
            self.behind = (f"cannot keep up: {most} of {len(wanted)} pages a round, half of the "
                           f"quota of {brief(self.quota or 0)} a minute")
        for row in wanted[:most]:
            row.asked, row.pending = now, True
        return wanted[:most]

    # what is asked for by keys

    def visible(self, now: float) -> list[Row]:
        """The rows that the filter lets through, sorted."""
        word = self.filter.lower()
        found = sorted((row for row in self.rows.values() if word in row.alias.lower()
                        or row.uuid.startswith(word)), key=lambda row: (row.alias, row.uuid))
        found.sort(key=lambda row: row.rank(self.sort, now)[1], reverse=self.reverse)
        return sorted(found, key=lambda row: row.rank(self.sort, now)[0])

    def keys(self, text: str, now: float, height: int) -> None:
        """What was typed."""
        for key in KEYS.findall(text):
            name = KEY_NAMES.get(key, key)
            if self.typing:
                self._type(key, name)
            else:
                self._press(name, now, max(height - 5, 1))

    def _type(self, key: str, name: str) -> None:
        if name in ("enter", "escape") and key != "u":
            self.typing = False
            self.filter = "" if name == "escape" else self.filter
        elif name == "backspace":
            self.filter = self.filter[:-1]
        elif len(key) == 1 and key.isprintable():
            self.filter = (self.filter + key)[:60]

    def _press(self, name: str, now: float, page: int) -> None:
        steps = {"up": -1, "down": 1, "page up": -page, "page down": page}
        if name == "q" and not self.detail:
            self.ended = True
        elif name in ("q", "escape", "enter") and self.detail:
            self.detail, self.first = False, 0
        elif name == "enter" and self.selected in self.rows:
            self.detail = self.moved = True
            self.first = 0
        elif name in steps and self.detail:
            self.first = max(self.first + steps[name], 0)
        elif name in steps:
            order = [row.uuid for row in self.visible(now)]
            at = order.index(self.selected) if self.selected in order else -1
            if order:
                self.moved = True
                self.selected = order[min(max(at + steps[name], 0), len(order) - 1)]
        elif name in ("<", ">"):
            at = TOP_TITLES.index(self.sort) + (1 if name == ">" else -1)
            self.sort = TOP_TITLES[at % len(TOP_TITLES)]
        elif name == "r":
            self.reverse = not self.reverse
        elif name == "/":
            self.typing, self.filter, self.detail = True, "", False
        elif name == "escape":
            self.filter = ""
        elif name == " ":
            self.paused = not self.paused

    # what is shown

    def table(self, rows: Sequence[Row], width: int, now: float, marked: bool = False
              ) -> list[str]:
        """Rows with a header; the sparkline takes what is left of the width. `marked`: the column
        that they are sorted by says so."""
        longest = max(10, min(40, width // 5))
        cells = [[clipped(row.alias, longest),
                  *(amount(row.values.get(column.title), column.unit) for column in TOP_COLUMNS),
                  row.state_words(), seconds_words(row.age(now))] for row in rows]
        mark = sparks()[1][self.reverse] if marked else ""
        titles = [title + mark * (title == self.sort) for title in TOP_TITLES]
        drop = [titles[TOP_TITLES.index(title)] for title in TOP_DROP if title != self.sort]
        blank = [["-"] * len(titles)]
        for room, words in ((width - 4 - LEAST_SPARK, drop[:2]), (width - 2, drop)):
            lines = fitted(titles, cells or blank, room, words, plain=True)
            if not any(line.endswith("…") for line in lines):
                break
        edge = max(map(cells_of, lines))
        room = min(width - 4 - edge, READINGS)
        if room >= LEAST_SPARK and any(len(row.history) > 2 for row in rows):
            letters = sparks()[0]
            trends = ["CPU TREND"[:room], *(row.spark(room, letters) for row in rows)]
            lines = [line + " " * (edge - cells_of(line)) + "  " + trend
                     for line, trend in zip(lines, trends)]
        return lines if rows else lines[:1]

    def screen(self, width: int, height: int, now: float) -> list[str]:
        """All lines of the screen."""
        visible = self.visible(now)
        count = f"{len(visible)} of {len(self.rows)}" if self.filter else str(len(self.rows))
        when = time.strftime("%H:%M:%S", time.localtime(now))
        title = (f"cmon top  {'PAUSED  ' * self.paused}{when}  {count} containers  "
                 f"every {self.interval:g} s")
        note = f"/{self.filter}_" if self.typing else self.failure or self.behind or (
            f"filter: {self.filter}" if self.filter else "")
        head = [emphasis(clipped(title, width)), coloured(clipped(note, width), 33)]
        row = self.rows.get(self.selected)
        if self.detail and row is not None:
            lines = [clipped(f"{row.alias}  {row.uuid}", width)]
            lines += [clipped(row.failure, width)] if row.failure else []
            lines += use_lines(row.figures, width) if row.figures is not None else ["no page yet"]
            self.first = min(self.first, max(len(lines) - (height - 3), 0))
            body = lines[self.first:self.first + height - 3]
        else:
            body = self._list(visible, width, height - 3, now)
        lines = [*head, *body]
        lines += [""] * (height - 1 - len(lines))
        long, short = FILTER_HELP if self.typing else DETAIL_HELP if self.detail else TOP_HELP
        return [*lines[:height - 1], clipped(long if cells_of(long) <= width else short, width)]

    def _list(self, visible: Sequence[Row], width: int, height: int, now: float) -> list[str]:
        room = max(height - 1, 1)
        order = [row.uuid for row in visible]
        if not self.moved or self.selected not in order:
            self.selected = order[0] if order else ""
        at = order.index(self.selected) if order else 0
        self.first = min(max(self.first, at - room + 1, 0), at)
        rows = self._shown = list(visible[self.first:self.first + room])
        header, *lines = self.table(rows, width, now, marked=True)
        marked = [emphasis("  " + header)]
        for row, line in zip(rows, lines):
            marked.append(coloured(("> " if row.uuid == self.selected else "  ") + line,
                                   31 if row.failure or row.worst[0] == CRITICAL else
                                   33 if row.worst[0] == WARNING else 0))
        return marked


def seconds_words(value: float | None) -> str:
    """An age: 3s, 4m, 2h."""
    if value is None:
        return "-"
    return f"{value:.0f}s" if value < 100 else f"{value / 60:.0f}m" if value < 6000 else \
        f"{value / 3600:.0f}h"


def sparks() -> tuple[str, str]:
    """Letters for sparklines and for the order of a column, as far as the terminal has them."""
    try:
        SPARKS.encode(sys.stdout.encoding or "ascii")
        return SPARKS, "▼▲"
    except (UnicodeEncodeError, LookupError):
        return PLAIN_SPARKS, "v^"


class Poller:
    """Asks in the background, AT_ONCE at a time; `answers` has what came, and `wake` is called."""

    def __init__(self, proxy: Proxy, groups: str, wake: Callable[[], None]) -> None:
        self._proxy, self._groups, self._wake = proxy, groups, wake
        self._jobs: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[tuple[Row | None, Scrape]] = queue.SimpleQueue()
        for _ in range(AT_ONCE):        # daemons: what hangs does not keep anybody from leaving
            threading.Thread(target=self._work, daemon=True).start()

    def ask(self, row: Row | None) -> None:
        """For a container's page; None is the fleet page."""
        self._jobs.put(row)

    def _work(self) -> None:
        while True:
            row = self._jobs.get()
            try:
                body = self._proxy.fleet(self._groups) if row is None else \
                    self._proxy.scrape(row.uuid)
                answer: Scrape = Page(time.time(), row.uuid if row else "",
                                      row.alias if row else "the proxy", body)
            except Failure as failure:
                answer = failure
            self.answers.put((row, answer))
            self._wake()


class Rounds:
    """Keeps a Top fresh: the fleet page once a round, then the pages that are due."""

    def __init__(self, top: Top, poller: Poller) -> None:
        self.top, self.poller = top, poller
        self.next = -math.inf               # monotonic; when the next round begins
        self.asked = 0                      # answers that have not come
        self._fleet = False                 # its page is on its way

    def work(self, now: float) -> None:
        """Take what has come; begin a round when it is time."""
        while not self.poller.answers.empty():
            row, answer = self.poller.answers.get()
            self.asked -= 1
            if row is not None:
                self.top.take_page(answer, row.uuid)
                continue
            self._fleet = False
            try:
                if isinstance(answer, Failure):
                    raise answer
                self.top.take_fleet(Figures(answer))
            except Failure as failure:
                self.top.failure = str(failure)
                continue
            for due in self.top.due(now):
                self._ask(due)
        if now >= self.next and not self._fleet and not self.top.paused:
            self.next = now + self.top.interval
            self._fleet = True
            self._ask(None)

    def _ask(self, row: Row | None) -> None:
        self.asked += 1
        self.poller.ask(row)


class Terminal:
    """The user's terminal while top has it: alternate screen, keys one by one; always given back.

    Signals and threads wake the loop by a byte in a pipe: a signal's number, or 0.
    """
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH, signal.SIGTSTP)

    def __init__(self) -> None:
        self._keys = sys.stdin.fileno()
        self._saved = termios.tcgetattr(self._keys)
        self._wakes, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._wakes, False)

    def __enter__(self) -> Terminal:
        for number in self.SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_IGN)       # nothing may cut the restoring short
        self.give_back()

    def take(self) -> None:
        """Switch to the alternate screen, without echo and without a cursor."""
        tty.setcbreak(self._keys)
        self._write("\x1b[?1049h\x1b[?25l")

    def give_back(self) -> None:
        """As it was before; a terminal that is gone needs nothing."""
        try:
            self._write("\x1b[?25h\x1b[?1049l")
            termios.tcsetattr(self._keys, termios.TCSADRAIN, self._saved)
        except (OSError, termios.error):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def wake(self) -> None:
        """From any thread."""
        with contextlib.suppress(OSError):      # full: it wakes anyway
            os.write(self._wake, b"\0")

    def draw(self, lines: Sequence[str]) -> None:
        """A whole screen, in one write."""
        self._write("\x1b[H" + "\x1b[K\n".join(lines) + "\x1b[K\x1b[J")

    def wait(self, seconds: float) -> str | None:
        """The keys that were pressed meanwhile; None when it is time to leave."""
        ready, _, _ = select.select([self._keys, self._wakes], [], [], max(seconds, 0))
        numbers = os.read(self._wakes, 4096) if self._wakes in ready else b""
        if signal.SIGTSTP in numbers:
            self.give_back()
            os.kill(os.getpid(), signal.SIGSTOP)
            self.take()                         # in the foreground again
        if {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} & set(numbers):
            return None
        if self._keys in ready:
            pressed = os.read(self._keys, 4096)
            return pressed.decode("utf-8", "ignore") if pressed else None
        return ""

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def top(arguments: argparse.Namespace) -> int:
    """`cmon.py top`"""
    state = Top(arguments.sort, arguments.interval)
    live = not arguments.once and sys.stdin.isatty() and sys.stdout.isatty() \
        and os.environ.get("TERM") != "dumb"
    if arguments.speed is not None and not arguments.replay:
        raise Usage("--speed goes with --replay")
    if arguments.replay:
        return top_replayed(state, arguments, live)
    proxy = proxy_of(arguments)
    if not live:
        return top_once(state, proxy, arguments.groups)
    state.take_fleet(Figures(Page(time.time(), "", "the proxy", proxy.fleet(arguments.groups))))
    with Terminal() as terminal:
        rounds = Rounds(state, Poller(proxy, arguments.groups, terminal.wake))
        return top_loop(state, terminal, rounds.work, time.time)


def top_loop(state: Top, terminal: Terminal, work: Callable[[float], None],
             clock: Callable[[], float]) -> int:
    """Work, draw, wait, until the user has seen enough or the terminal is gone."""
    drawn, pressed = -math.inf, ""
    try:
        while not state.ended:
            now = time.monotonic()
            work(now)
            if pressed or now - drawn >= LEAST_DRAW:    # not for each page of hundreds
                drawn = now
                width, height = screen_size()
                terminal.draw(state.screen(width, height, clock()))
            keys = terminal.wait(1.0 if drawn == now else drawn + LEAST_DRAW - now)
            if keys is None:
                break
            pressed = keys
            state.keys(pressed, clock(), screen_size().lines)
    except OSError:                             # EIO: the terminal is gone
        pass
    return 0


def top_once(state: Top, proxy: Proxy, groups: str) -> int:
    """One table, from two scrapes of each container."""
    state.take_fleet(Figures(Page(time.time(), "", "the proxy", proxy.fleet(groups))))
    poller = Poller(proxy, groups, lambda: None)
    for scrape in range(2):
        due = [row for row in state.rows.values() if row.state == "running"]
        for row in due:
            poller.ask(row)
        for _ in due:
            row_or_fleet, answer = poller.answers.get()
            assert row_or_fleet is not None
            row_or_fleet.take(answer)
        if due and not scrape:
            time.sleep(ONCE_SECONDS)
    return top_table(state, time.time())


def top_table(state: Top, now: float) -> int:
    """The table of all containers, and what went wrong on stderr."""
    rows = state.visible(now)
    lines = state.table(rows, screen_width() + 2, now)
    print("\n".join([emphasis(lines[0]), *lines[1:]]))
    for row in rows:
        if row.failure and row.state == "running":
            print(f"cmon: {row.alias}: {row.failure}", file=sys.stderr)
    if state.failure:
        print(f"cmon: {state.failure}", file=sys.stderr)
    return 0


def top_replayed(state: Top, arguments: argparse.Namespace, live: bool) -> int:
    """top on a recording: at its pace times --speed; at once where nobody looks on."""
    pages = recording(arguments.replay)
    last = next(pages, None)
    if last is None:
        raise Failure(f"{arguments.replay} has no whole page")
    began, first, shown = time.monotonic(), last.at, last.at
    waiting: Page | None = last

    def work(now: float) -> None:
        nonlocal waiting, shown, began
        if state.paused:                        # goes on from here
            began = now - (shown - first) / (arguments.speed or 1)
            return
        at = first + (now - began) * (arguments.speed or 1)
        while waiting is not None and (not live or waiting.at <= at):
            row = state.rows.setdefault(waiting.uuid, Row(waiting.uuid))
            row.alias = waiting.alias
            row.take(waiting)
            shown, waiting = waiting.at, next(pages, None)
        shown = shown if waiting is None else max(min(at, waiting.at), shown)
    if not live:
        work(began)
        return top_table(state, shown)
    with Terminal() as terminal:
        return top_loop(state, terminal, work, lambda: shown)


# --- check ----------------------------------------------------------------------------------------

# https://www.monitoring-plugins.org/doc/guidelines.html
STATUS_WORDS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
GRAVITY = (OK, UNKNOWN, WARNING, CRITICAL)      # of several findings the gravest counts
UOMS = {"bytes": "B", "seconds": "s", "milliseconds": "ms", "percent": "%"}
AT_ONCE = 8                     # pages that are asked for at the same time
LONGEST_OUTPUT = 8000           # characters; Nagios takes 8192
MOST_PROBLEMS = 5               # told in words; all are in the exit status and the performance data
OLDEST_FIGURES = 300.0          # seconds; older ones are UNKNOWN, but for what is read less often
COLLECTORS_UP = "cmon_collector_up,1:"
RESPONSE = "response_seconds"           # what is known beside the fleet page's metrics
DAYS_LEFT = "certificate_days_left"
DAYS_LEFT_LIMITS = f"{DAYS_LEFT},30:,7:"


class Finding(NamedTuple):
    """What came of one sample, or of one that is missing; no words: another finding tells it."""
    status: int
    words: str
    perfdata: str = ""


def check(arguments: argparse.Namespace) -> int:
    """`cmon.py check`: one line, and an exit status of its own."""
    try:
        findings = check_findings(arguments)
    except (Failure, OSError, KeyboardInterrupt) as error:
        findings = [Finding(UNKNOWN, str(error) or type(error).__name__)]
    except Exception as error:  # Python's exit status for a traceback is 1, which is WARNING here
        findings = [Finding(UNKNOWN, f"internal error: {error!r}")]
    return report(findings)


def report(findings: Sequence[Finding]) -> int:
    """Print the line of a plugin; returns its exit status."""
    status = max((finding.status for finding in findings), key=GRAVITY.index)
    told = sorted((finding for finding in findings if finding.status != OK) if status != OK
                  else findings, key=lambda one: -GRAVITY.index(one.status))
    words = [printable(finding.words) for finding in told if finding.words]
    if len(words) > MOST_PROBLEMS:
        words[MOST_PROBLEMS:] = [f"and {len(words) - MOST_PROBLEMS} more"]
    line = f"CMON {STATUS_WORDS[status]}: " + ", ".join(words).replace("|", "/")
    line = clipped(line, LONGEST_OUTPUT // 4)
    data = ""
    for finding in findings:
        if len(line) + len(data) + len(finding.perfdata) + 4 <= LONGEST_OUTPUT:
            data += f" {finding.perfdata}" if finding.perfdata else ""
    print(line + (f" |{data}" if data else ""))
    return status


def check_findings(arguments: argparse.Namespace) -> list[Finding]:
    """Ask what was chosen, and judge it."""
    words = list(arguments.words)
    selected = arguments.all or arguments.groups or arguments.proxy or arguments.certificate
    name = "" if selected else (words.pop(0) if words else "")
    if not selected and not name:
        raise Usage("what is to be checked? NAME, --all, --groups, --proxy or --certificate")
    default = RESPONSE if arguments.proxy else DAYS_LEFT_LIMITS if arguments.certificate \
        else COLLECTORS_UP
    thresholds = [Threshold.of_text(word) for word in words or [default]]
    proxy = proxy_of(arguments)
    state = RateState(arguments, thresholds)
    if arguments.proxy or arguments.certificate:
        found = check_page(state.figures(fleet_page(proxy)), thresholds, "")
        state.save()
        return found
    chosen = [proxy.find(name)] if name else proxy.containers(arguments.groups)[1]
    running = [one for one in chosen if name or one.state == "running"]
    if not running:
        raise Failure("no container runs" + (f" in {arguments.groups}" if arguments.groups else ""))
    findings: list[Finding] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for one, page in zip(running, pool.map(functools.partial(scraped, proxy), running)):
            who = "" if name else one.alias
            if isinstance(page, Failure):
                findings.append(Finding(UNKNOWN, f"{who}: {page}" if who else str(page)))
                continue
            try:
                findings += check_page(state.figures(page), thresholds, who)
            except Failure as failure:      # the page is none
                findings.append(Finding(UNKNOWN, str(failure)))
    state.save()
    if not name and all(finding.status == OK for finding in findings):
        findings.insert(0, Finding(OK, plural(len(running), "container")))
    return findings


def plural(number: int, word: str) -> str:
    """1 page, 2 pages."""
    return f"{number} {word}" + "s" * (number != 1)


def scraped(proxy: Proxy, container: Container) -> Scrape:
    """One page, or why there is none."""
    try:
        body = proxy.scrape(container.uuid)
        return Page(time.time(), container.uuid, container.alias, body)
    except Failure as failure:
        return failure


def fleet_page(proxy: Proxy) -> Page:
    """The fleet page with what was learnt on the way; no day is left of an expired certificate."""
    begin = time.monotonic()
    answer = proxy.get("/v1/fleet/metrics")
    elapsed = time.monotonic() - begin
    if answer.status == 401 and answer.headers.get("x-cmon-error") == "expired":
        return Page(time.time(), "", "the proxy", f"{DAYS_LEFT} 0\n{RESPONSE} {elapsed}\n".encode())
    body = proxy.checked(answer)
    ends = re.search(rb"(?m)^cmon_client_certificate_expiry_timestamp_seconds\{.*\} (\S+)$", body)
    if ends is not None:
        left = (float(ends.group(1)) - time.time()) / 86400
        body += f"{DAYS_LEFT} {left:.3f}\n".encode()
    return Page(time.time(), "", "the proxy", body + f"{RESPONSE} {elapsed:.6f}\n".encode())


def check_page(figures: Figures, thresholds: Sequence[Threshold], who: str) -> list[Finding]:
    """A finding for each sample of each expression."""
    findings: list[Finding] = []
    for one in thresholds:
        found = one.expression.of(figures)
        why = too_old(one.expression, figures)
        if not found or why:
            why = why or missing(one.expression, figures)
            findings.append(Finding(UNKNOWN, f"{who}: {why}" if who else why))
            continue
        names = telling(list(found))
        for labels, value in found.items():
            name = " ".join((*([who] if who else []), one.expression.text,
                             *(text for label, text in labels if label in names)))
            status = one.status(value)
            broken = one.critical if status == CRITICAL else one.warning
            words = f"{name} is {amount(value, unit_of(one.expression))}"
            if status != OK and broken is not None:
                words += f" ({broken.words()})"
            label = printable(name).translate(PERFDATA_LABEL)
            findings.append(Finding(status, words, f"'{label}'={number(value)}"
                                    f"{uom(one.expression, figures)};"
                                    f"{one.warning.text if one.warning else ''};"
                                    f"{one.critical.text if one.critical else ''}"))
        if len(found) > 1 and all(one.status(value) == OK for value in found.values()):
            first = len(findings) - len(found)
            least, most = (amount(value, unit_of(one.expression))
                           for value in (min(found.values()), max(found.values())))
            words = " ".join((*([who] if who else []), one.expression.text, "is", least,
                              *([] if least == most else ["to", most]),
                              f"({len(found)} samples)"))
            findings[first:] = [finding._replace(words="") for finding in findings[first:]]
            findings[first] = findings[first]._replace(words=words)
    return findings


def telling(found: Sequence[Labels]) -> set[str]:
    """The names of labels that tell samples apart: one that does so alone, or all that differ."""
    if len(found) < 2:
        return set()
    names = {name for labels in found for name, _ in labels}
    values = {name: {dict(labels).get(name) for labels in found} for name in names}
    alone = sorted(name for name in names if len(values[name]) == len(found))
    return set(alone[:1]) or {name for name in names if len(values[name]) > 1}


# A label stands between single quotes and ends at the equals sign.
PERFDATA_LABEL = {ord("'"): None, ord('"'): None, ord("="): ":", ord("|"): "/"}


def unit_of(expression: Expression) -> str:
    """The unit of a value that is told in words."""
    return {RESPONSE: "seconds", DAYS_LEFT: "days"}.get(expression.text, expression.unit())


def uom(expression: Expression, figures: Figures) -> str:
    """The unit of measurement in performance data; the guidelines know none for a rate."""
    if expression.under is None and not expression.over.rate \
            and figures.kinds.get(expression.over.name) == COUNTER:
        return "c"
    return UOMS.get(unit_of(expression), "")


def too_old(expression: Expression, figures: Figures) -> str:
    """Why the figures say nothing of the present: the proxy answers with old copies to an account
    that is over its quota."""
    for part in (expression.over, expression.under):
        if part is not None:
            age = figures.ages.get(figures.collector(part.name), 0)
            if age > max(OLDEST_FIGURES, 3 * float(facts().get(part.name, {}).get("lifetime", 0))):
                return f"{part.name} is {seconds_words(float(age))} old"
    return ""


def missing(expression: Expression, figures: Figures) -> str:
    """Why an expression has no value."""
    for part in (expression.over, expression.under):
        if part is None or part.of(figures):
            continue
        if part.rate and part._replace(rate=False).of(figures):
            if figures.kinds.get(part.name) == GAUGE:
                return f"{part.name} is a gauge: a rate is for counters"
            return f"{expression.text} " + (
                "was not read again since the last run: the next one has two readings"
                if figures.compared else "has no earlier reading yet: the next run has")
        return f"no sample of {expression.text}" if part is expression.over and \
            expression.under is None else f"no sample of {part.name}"
    return f"{expression.text} cannot be divided: by zero, or no sample with the same labels"


class RateState:
    """The last two readings of the counters whose rates are asked for, in a file of the user's: a
    recording of those metrics alone. Two, since a run may see the reading that the last run saw."""

    def __init__(self, arguments: argparse.Namespace, thresholds: Sequence[Threshold]) -> None:
        self._names = {part.name for one in thresholds
                       for part in (one.expression.over, one.expression.under)
                       if part is not None and part.rate}
        self._pages: dict[str, list[Page]] = {}     # by container
        self._kept: list[Page] = []
        if not self._names:
            return
        # each check has a file of its own: they run at intervals of their own
        what = "\0".join((arguments.url, arguments.cert, str(arguments.all), arguments.groups,
                          str(arguments.proxy), str(arguments.certificate), *arguments.words))
        self._path = cache_folder(arguments.state) / (
            "check-" + hashlib.sha256(what.encode()).hexdigest()[:20])
        if self._path.exists():
            for page in recording(str(self._path)):
                self._pages.setdefault(page.uuid, []).append(page)

    def figures(self, page: Page) -> Figures:
        """The figures of a page, with the rates that are asked for."""
        if not self._names:
            return Figures(page)
        last: Figures | None = None
        known = self._pages.get(page.uuid or NO_UUID, [])[-2:]
        try:
            for one in known:
                last = Figures(one, last)
        except Failure:                     # not what we wrote: as if it were not there
            last, known = None, []
        figures = Figures(page, last)
        collectors = {figures.collector(name) for name in self._names}
        if last is None or any(figures.taken[one] > last.taken.get(one, -math.inf)
                               for one in collectors):
            wanted = self._names | {"time_of_day", "cmon_sample_age_seconds"}
            body = render([family for family in figures.families
                           if {family.name, *(family.name + suffix for suffix in SUFFIXES.get(
                               family.kind, ()))} & wanted])
            known = [*known[-1:], page._replace(uuid=page.uuid or NO_UUID, body=body.encode())]
        self._kept += known
        return figures

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self._names:
            write_whole(self._path, b"".join(map(recorded_page, self._kept)))


NO_UUID = "00000000-0000-0000-0000-000000000000"       # of the fleet page


def cache_folder(chosen: str) -> Path:
    """Where readings are kept; made if it is not there. Failure when it cannot be."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(chosen) if chosen else (
            Path(base) if base.startswith("/") else Path.home() / ".cache") / "cmon"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        words = words_of(error) if isinstance(error, OSError) else str(error)
        raise Failure(f"no folder for the readings that rates need: {words}; "
                      "--state DIR names one") from None
    return folder


def write_whole(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file, whole or not at all."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=str(path.parent))
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, mode)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise Failure(f"cannot write {path}: {words_of(error)}") from None


# --- discover -------------------------------------------------------------------------------------

def discover(arguments: argparse.Namespace) -> int:
    """`cmon.py discover`"""
    if arguments.every and not arguments.file_sd:
        raise Usage("--every goes with --file-sd FILE")
    proxy = proxy_of(arguments)
    if arguments.file_sd:
        return keep_file_sd(proxy, arguments)
    found, containers = proxy.containers(arguments.groups)
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    elif not containers:
        print("cmon: no containers" + (f" in {arguments.groups}" if arguments.groups else
                                       ": this account has none that run"), file=sys.stderr)
    elif arguments.hosts or arguments.zone:
        host = urllib.parse.urlsplit(proxy.url).hostname or ""
        print("\n".join(name_lines(containers, host, arguments.suffix or host,
                                   arguments.hosts or "")))
    else:
        print("\n".join(container_table(containers, screen_width())))
    return 0


def name_lines(containers: Sequence[Container], host: str, suffix: str,
               address: str) -> Iterator[str]:
    """The containers' own names, for sites without wildcard DNS: for /etc/hosts with an address,
    else records to include in a zone file."""
    for container in containers:
        if not UUID.fullmatch(container.uuid):
            raise Failure(f"the proxy lists a container whose UUID is none: {container.uuid!r}")
        name = f"{container.uuid}.{suffix}"
        if address:
            yield f"{address}\t{name}\t# {container.alias}"
        elif is_address(host):
            kind = "AAAA" if ":" in host else "A"
            yield f"{name}.\t60\tIN\t{kind}\t{host}\t; {container.alias}"
        else:
            yield f"{name}.\t60\tIN\tCNAME\t{host}.\t; {container.alias}"


def is_address(text: str) -> bool:
    """Whether it is an IP address in digits."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def keep_file_sd(proxy: Proxy, arguments: argparse.Namespace) -> int:
    """`--file-sd FILE`: write it once, or again and again. A failure leaves the file as it is."""
    path = Path(arguments.file_sd)
    while True:
        try:
            write_file_sd(path, proxy.page("/v1/sd" + groups_query(arguments.groups)))
        except Failure as failure:
            if not arguments.every:
                raise
            print(f"cmon: {failure}; {path} stays as it is", file=sys.stderr, flush=True)
        if not arguments.every:
            return 0
        time.sleep(arguments.every)


def write_file_sd(path: Path, body: bytes) -> None:
    """Targets as Prometheus' file_sd_configs read them, whole or not at all."""
    try:
        groups = json.loads(body)
        good = isinstance(groups, list) and all(
            all(isinstance(one, str) for one in (*group["targets"], *group["labels"],
                                                 *group["labels"].values())) for group in groups)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise Failure("the proxy answers /v1/sd with something else than targets")
    content = (json.dumps(groups, indent=1, ensure_ascii=False) + "\n").encode()
    try:
        if path.is_file() and path.read_bytes() == content:
            return                          # Prometheus reads again what is written
    except OSError as error:
        raise Failure(f"cannot write {path}: {words_of(error)}") from None
    write_whole(path, content, 0o644)       # Prometheus may be another user


# --- certificates ---------------------------------------------------------------------------------

LOGIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,63}")    # also a file's name; X.509 takes 64
DAYS = 3650                 # as `triton profile cmon-certgen`
BACKDATED_SECONDS = 300     # clocks differ, and the original proxy makes no allowance for that
RENEW_DAYS = 30             # --renew leaves alone what lasts longer; also when the alert fires
AGENT_SECONDS = 120.0       # ssh-agent may ask its owner to confirm
AGENT_MESSAGE = 262_144     # bytes; ssh-agent's own limit
ANOTHER_KEY = ("make one with `ssh-keygen -t ecdsa`, add it to the account, and use it here")
WRONG_KIND = "is of kind {kind}, and certificates are signed with RSA or ECDSA: " + ANOTHER_KEY


class SshAgent:
    """The user's ssh-agent (draft-miller-ssh-agent), asked over its socket."""
    IDENTITIES, SIGN, SHA256 = 11, 13, 2        # requests, and the flag for RSA with SHA-256
    ANSWERS = {IDENTITIES: 12, SIGN: 14}

    def __init__(self, path: str) -> None:
        self.path = path

    def keys(self) -> list[tuple[Any, str]]:
        """Public keys of the kinds that we know, each with its comment."""
        from cmon_proxy import CertificateError, public_key
        rest = self._ask(self.IDENTITIES, b"")
        count, = struct.unpack(">I", rest[:4])
        fields = self._fields(rest[4:])
        if len(fields) != 2 * count:
            raise Failure("ssh-agent answers with something else than a list of keys")
        found = []
        for blob, comment in zip(fields[::2], fields[1::2]):
            kind = b"".join(self._fields(blob)[:1]).decode("ascii", "replace")
            try:
                key = public_key(f"{kind} {base64.b64encode(blob).decode()}")
            except CertificateError:            # of a security token, or an SSH certificate
                continue
            found.append((key, printable(comment.decode("utf-8", "replace"))))
        return found

    def sign(self, blob: bytes, message: bytes) -> bytes:
        """An SSH signature of the message by this key."""
        request = b"".join(struct.pack(">I", len(part)) + part for part in (blob, message))
        signature, = self._fields(self._ask(self.SIGN, request + struct.pack(">I", self.SHA256)))
        return signature

    def _ask(self, kind: int, content: bytes) -> bytes:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(AGENT_SECONDS)
                connection.connect(self.path)
                connection.sendall(struct.pack(">IB", len(content) + 1, kind) + content)
                with connection.makefile("rb") as reader:
                    length, = struct.unpack(">I", reader.read(4))
                    answer = reader.read(length) if length <= AGENT_MESSAGE else b""
        except OSError as error:
            raise Failure(f"cannot talk to ssh-agent at {self.path}: {words_of(error)}") from None
        except struct.error:
            answer = b""
        if answer[:1] != bytes([self.ANSWERS[kind]]):
            raise Failure("ssh-agent refuses" + (
                " to sign: `ssh-add -l` shows whether it is locked" if kind == self.SIGN else ""))
        return answer[1:]

    @staticmethod
    def _fields(content: bytes) -> list[bytes]:
        fields = []
        while content:
            length = int.from_bytes(content[:4], "big")
            if len(content) < 4 + length:
                raise Failure("ssh-agent answers with a message that is cut off")
            fields.append(content[4:4 + length])
            content = content[4 + length:]
        return fields


def certgen(arguments: argparse.Namespace) -> int:
    """`cmon.py certgen`"""
    from cmon_proxy import CertificateError, certificate, first_certificate, utc
    folder = Path(arguments.out)
    paths = [folder / f"{arguments.account}-{kind}.pem" for kind in ("cert", "key")]
    taken = [path for path in paths if os.path.lexists(path)]
    if arguments.renew and len(taken) == 2 and not arguments.force:
        try:
            end = certificate(first_certificate(read_text(paths[0], "certificate"))).not_after
        except CertificateError:
            raise Failure(f"{paths[0]} is not a certificate: --force replaces it") from None
        if end - time.time() > RENEW_DAYS * 86400:
            print(f"{paths[0]} is valid until {utc(end)}: nothing to do yet")
            return 0
    elif taken and not arguments.force:
        raise Failure(f"{taken[0]} exists: --renew replaces it when it is about to end, --force "
                      "at once")
    try:
        cert, key, signer = make_credentials(arguments)
    except (CertificateError, OSError) as error:
        raise Failure(f"cannot make a certificate: {error}") from None
    write_both(list(zip(paths, (cert, key))), replace=bool(taken))
    made = certificate(first_certificate(cert.decode()))
    print(f"wrote {paths[0]} and {paths[1]}, valid until {utc(made.not_after)}; "
          f"the account must have the key {signer.sha256}")
    return 0


def make_credentials(arguments: argparse.Namespace) -> tuple[bytes, bytes, Any]:
    """A certificate and its key, PEM, and the public key that signed it."""
    from cmon_proxy import (
        CLIENT_PURPOSE, CMON_PURPOSE, SERVER_PURPOSE, Signer, make_certificate, make_key,
        private_key)
    login, now = arguments.account, time.time()
    dates = {"not_before": now - BACKDATED_SECONDS, "not_after": now + arguments.days * 86400}
    if arguments.agent:
        if arguments.old_style:
            raise Usage("--old-style uses the SSH key itself, which ssh-agent does not hand out: "
                        "give --ssh-key FILE without --agent")
        agent = SshAgent(os.environ.get("SSH_AUTH_SOCK", ""))
        signer = agent_key(agent, arguments.ssh_key)
        holder: Any = Signer(signer, lambda message: agent.sign(signer.blob, message))
    elif not arguments.ssh_key:
        raise Usage("with which key? give --ssh-key FILE, or --agent for a key of ssh-agent")
    else:
        holder = account_key(Path(arguments.ssh_key))
        signer = private_key(holder)
    if arguments.old_style:
        return make_certificate(holder, login, **dates), holder, signer
    key = make_key()
    digest = base64.b64encode(bytes.fromhex(signer.md5.replace(":", "")))
    # what the original's certgen writes; serverAuth is there, too
    cert = make_certificate(
        key, login, issuer="MD5:" + digest.decode().rstrip("="), signing_key=holder, serial=1,
        names=[login], purposes=[CLIENT_PURPOSE, SERVER_PURPOSE, CMON_PURPOSE], **dates)
    return cert, key, signer


def agent_key(agent: SshAgent, wanted: str) -> Any:
    """The key of ssh-agent that a file, a fingerprint or nothing names."""
    from cmon_proxy import CertificateError, public_key
    if not agent.path:
        raise Failure("no ssh-agent: SSH_AUTH_SOCK is not set; start one with "
                      "`eval $(ssh-agent)` and add the key with `ssh-add`")
    keys = agent.keys()
    fingerprint = wanted
    if wanted and not re.match(r"(MD5|SHA256):", wanted):
        public = Path(wanted if wanted.endswith(".pub") else wanted + ".pub")
        try:
            fingerprint = public_key(read_text(public, "public key")).sha256
        except CertificateError as error:
            raise Failure(f"{public} is not a public key: {error}") from None
        except Failure:                 # OpenSSH's form has the public half beside the private one
            tool = shutil.which("ssh-keygen")
            done = tool and subprocess.run([tool, "-l", "-f", wanted], stdin=subprocess.DEVNULL,
                                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                           check=False)
            match = done and re.search(r"SHA256:\S+", done.stdout.decode("utf-8", "replace"))
            if not match:
                raise
            fingerprint = match.group(0)
    found = [key for key, _ in keys if fingerprint in (key.sha256, "MD5:" + key.md5)
             or not fingerprint and key.kind != "ssh-ed25519"]
    if not found:
        raise Failure(f"ssh-agent has no {'key ' + fingerprint if wanted else 'RSA or ECDSA key'}: "
                      "`ssh-add -l` lists those it has, `ssh-add FILE` adds one")
    if len(found) > 1:
        raise Failure("ssh-agent has several keys: give one as --ssh-key, "
                      + " or ".join(key.sha256 for key in found[:8]))
    check_signing_key(f"the key {found[0].sha256}", found[0])
    return found[0]


def check_signing_key(what: str, key: Any) -> None:
    """Failure for a kind of key that CMON does not know, and for one that proxies refuse."""
    from cmon_proxy import RSA_BITS
    if key.kind == "ssh-ed25519":
        raise Failure(f"{what} " + WRONG_KIND.format(kind="Ed25519"))
    if key.kind == "ssh-rsa" and key.bits < RSA_BITS:
        raise Failure(f"{what} is an RSA key of {key.bits} bits, which is too short: {ANOTHER_KEY}")


def account_key(path: Path) -> bytes:
    """The private key in a file as PEM without a passphrase, which is asked for if there is one."""
    from cmon_proxy import CertificateError, plain_key, private_key
    pem = read_text(path, "SSH key").encode()
    if b"-----BEGIN OPENSSH PRIVATE KEY-----" in pem:
        pem = openssh_key(path, pem)
    elif b"PRIVATE KEY-----" not in pem:
        raise Failure(f"{path} is not a private key; " + (
            "it is the public one: give the other file" if pem.startswith((b"ssh-", b"ecdsa-"))
            else "OpenSSH's form and PEM can be read"))
    secret = b"ENCRYPTED" in pem
    try:
        pem = plain_key(pem, ask_passphrase(f"the key {path}").encode() if secret else b"")
    except CertificateError as error:
        raise Failure(f"wrong passphrase for {path}" if secret
                      else f"{path} cannot be read: {error}") from None
    check_signing_key(str(path), private_key(pem))
    return pem


def openssh_key(path: Path, content: bytes) -> bytes:
    """A private key of ssh-keygen's own form as PEM; ssh-keygen asks for its passphrase."""
    tool = shutil.which("ssh-keygen")
    if tool is None:
        raise Failure(f"{path} has OpenSSH's own form, and ssh-keygen is not here to read it: "
                      "install OpenSSH's client, or give a key in PEM")
    with tempfile.TemporaryDirectory(prefix="cmon-") as folder:     # mode 700
        copied = Path(folder) / "key"
        write_private(copied, content)

        def run(*flags: str, stdin: int | None = subprocess.DEVNULL) -> tuple[bool, str]:
            done = subprocess.run([tool, *flags, "-f", str(copied)], stdin=stdin, check=False,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            return done.returncode == 0, done.stdout.decode("utf-8", "replace")

        readable, listed = run("-l")
        kind = listed.rpartition("(")[2].strip().rstrip(")")
        if not readable:
            raise Failure(f"{path} is not a private key that ssh-keygen can read")
        if kind not in ("RSA", "ECDSA"):
            raise Failure(f"{path} " + WRONG_KIND.format(kind=kind.capitalize()))
        to_pem = ("-p", "-N", "", "-m", "PEM")
        if not run(*to_pem, "-P", "")[0]:
            need_terminal(f"the key {path}")
            print(f"cmon: the key {path} has a passphrase", file=sys.stderr)
            # it asks on the terminal by itself: a flag would show the passphrase to everybody
            if not run(*to_pem, stdin=None)[0]:
                raise Failure(f"wrong passphrase for {path}")
        return copied.read_bytes()


def write_both(files: Sequence[tuple[Path, bytes]], replace: bool) -> None:
    """All of the files, mode 600, or none of them; what is there is replaced only if asked for."""
    done: list[tuple[Path, Path | None]] = []       # written, with what was there before
    try:
        folder = files[0][0].parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".cmon-", dir=folder) as work:
            for path, content in files:
                write_private(Path(work) / path.name, content)
            try:
                for path, _ in files:
                    old = Path(work) / f"old {path.name}" if replace else None
                    if old is not None and os.path.lexists(path):
                        os.link(path, old, follow_symlinks=False)
                    if replace:
                        os.replace(Path(work) / path.name, path)
                    else:
                        os.link(Path(work) / path.name, path)   # fails if it has come meanwhile
                    done.append((path, old))
            except OSError:
                for path, old in done:
                    if old is not None and os.path.lexists(old):
                        os.replace(old, path)
                    else:
                        path.unlink()
                raise
    except OSError as error:
        raise Failure(f"cannot write {files[0][0]} and {files[-1][0]}: {words_of(error)}"
                      ) from None


def write_private(path: Path, content: bytes) -> None:
    """A file that is its owner's alone from the start."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_text(path: Path, what: str) -> str:
    """A small file; Failure says which."""
    try:
        return path.read_bytes()[:1_000_000].decode("utf-8", "replace")
    except OSError as error:
        raise Failure(f"cannot read the {what} {path}: {words_of(error)}") from None


# --- doctor ---------------------------------------------------------------------------------------

PROMETHEUS_URL = "http://localhost:9090"
CLOCK_SECONDS = 30.0        # more makes figures look old; certificates stand 300
OLD_SECONDS = 60.0          # kernel statistics are kept for 8 s
OLD_SLOWLY_SECONDS = 900.0  # what is asked for less often, as `zfs list` is: 300 s
SLOWLY = ("zfs", "zpool", "ntp", "triton_core")
DOCKER_PURPOSE = "1.3.6.1.4.1.38678.1.4.1"
OVER_QUOTA = ("the account is over its quota: pages are old copies",
              "scrape less often, or ask the operator for a larger quota")


class Broken(Exception):
    """A link that does not hold: what is wrong, and what to do about it."""

    def __init__(self, what: str, step: str, link: str = "") -> None:
        super().__init__(what)
        self.step = step
        self.link = link        # of a later link, if it is that one that this one has found broken


class Skipped(Exception):
    """A link that is not there to be looked at, and why."""


class Doctor:
    """The chain from the user's files to Prometheus. Each link is a method that returns a few words
    on what is well, or raises Broken, Skipped or Failure; it may rely on the links before it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.url = proxy_url(arguments.url)
        parts = urllib.parse.urlsplit(self.url)
        self.host, self.port = parts.hostname or "", parts.port or 443
        self.netloc = parts.netloc
        self.arguments = arguments
        need_credentials(arguments)
        self.tls: ssl.SSLContext
        self.proxy: Proxy
        self.cert: Any = None                       # a cmon_proxy.Certificate
        self.new_style = False
        self.chosen = Container("-", "-", "-", "-", "-")
        self.containers: list[Container] = []
        self.families: dict[str, list[Sample]] = {}
        self.discovered = b""
        self.clock = -math.inf                      # of the proxy, less this machine's
        self.node_clock = 0.0                       # of the compute node

    def files(self) -> str:
        """Files that are there, and a key that is nobody else's."""
        for what, path in (("certificate", self.arguments.cert), ("key", self.arguments.key),
                           ("CA", self.arguments.ca)):
            if path:
                read_text(Path(path), what)
        mode = os.stat(self.arguments.key).st_mode & 0o777
        if mode & 0o077:
            raise Broken(f"others may read the key {self.arguments.key} (mode {mode:o})",
                         f"`chmod 600 {self.arguments.key}`")
        return f"{self.arguments.cert} and {self.arguments.key}"

    def key(self) -> str:
        """The key is the certificate's."""
        from cmon_proxy import (
            RSA_BITS, STRONG_DIGESTS, CertificateError, certificate, first_certificate)
        try:
            self.cert = certificate(first_certificate(
                read_text(Path(self.arguments.cert), "certificate")))
        except (CertificateError, OSError) as error:
            raise Broken(f"{self.arguments.cert} cannot be used: {error}",
                         CERTGEN) from None
        bits, digest = self.cert.key.bits, self.cert.digest
        weak = f"has an RSA key of {bits} bits, which is too short" if 0 < bits < RSA_BITS else (
            "" if digest in (*STRONG_DIGESTS, "") else f"is signed with {digest.upper()}")
        if weak:                                    # OpenSSL does not even load it
            raise Broken(f"the certificate {weak}", f"{CERTGEN}, and "
                         "with another SSH key if that is the short one", "signature")
        self.tls = client_context(self.arguments.cert, self.arguments.key, self.arguments.ca)
        return f"fits the certificate, {self.cert.key.kind}"

    def style(self) -> str:
        """One of the two styles that proxies know, or a CA's."""
        from cmon_proxy import CMON_PURPOSE, key_id_of
        cert = self.cert
        if not cert.subject:
            raise Broken("the certificate's subject has no common name", CERTGEN)
        if CMON_PURPOSE in cert.purposes and not cert.self_issued:
            self.new_style = True
            if key_id_of(cert.issuer) is None:
                raise Broken(f"the certificate's issuer {printable(cert.issuer)!r} is not the MD5 "
                             "fingerprint of an SSH key", CERTGEN)
            return f"new, for {printable(cert.subject)}, issued by {cert.issuer}"
        kind = "old" if cert.self_issued else f"of the CA {printable(cert.issuer)}"
        return f"{kind}, for {printable(cert.subject)}"

    def purpose(self) -> str:
        """Made for clients, and for this service."""
        from cmon_proxy import CLIENT_PURPOSE
        purposes = self.cert.purposes
        if DOCKER_PURPOSE in purposes and not self.new_style:
            raise Broken("the certificate is made for Docker", CERTGEN)
        if purposes and CLIENT_PURPOSE not in purposes:
            raise Broken("the certificate is not made for clients (clientAuth)", CERTGEN)
        return "for clients" if purposes else "not restricted"

    def dates(self) -> str:
        """Begun, and not ended."""
        from cmon_proxy import CLOCK_SKEW_SECONDS, utc
        cert, now = self.cert, time.time()
        if now < cert.not_before - CLOCK_SKEW_SECONDS:
            raise Broken(f"the certificate begins on {utc(cert.not_before)}",
                         "check this machine's clock, or wait")
        if now > cert.not_after and (self.new_style or not cert.self_issued):
            raise Broken(f"the certificate ended on {utc(cert.not_after)}",
                         f"`{PROGRAM} certgen --renew` makes a new one")
        return ("valid until " if now <= cert.not_after else
                "ended, which the proxy allows in the old style: ") + utc(cert.not_after)

    def signature(self) -> str:
        """Strong, and by the key that the certificate names where that key is at hand."""
        from cmon_proxy import CertificateError, key_id_of, public_key, signed_by
        cert = self.cert
        if cert.self_issued and not signed_by(cert, cert.key):
            raise Broken("the certificate says that it is signed by its own key, and is not",
                         CERTGEN)
        if self.new_style:
            for path in sorted(Path.home().glob(".ssh/*.pub")):
                try:
                    key = public_key(read_text(path, "public key"))
                except (CertificateError, Failure):
                    continue
                if key.md5 == key_id_of(cert.issuer):
                    if signed_by(cert, key):
                        return f"by {path}"
                    raise Broken(f"the certificate names {path} as its issuer, which has not "
                                 "signed it", CERTGEN)
        return str(cert.digest or cert.signature)

    def name(self) -> str:
        """DNS knows the proxy."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise Broken(f"{self.host} cannot be resolved", "check the host name in --url or "
                         "CMON_URL, and this machine's DNS") from None
        return ", ".join(dict.fromkeys(str(one[4][0]) for one in found))

    def tcp(self) -> str:
        """Something listens."""
        with self._connect() as connection:
            return f"connected to {connection.getpeername()[0]}"

    def handshake(self) -> str:
        """It speaks TLS, in a version of today."""
        lenient = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        lenient.check_hostname = False
        lenient.verify_mode = ssl.CERT_NONE
        try:
            with self._connect() as raw, lenient.wrap_socket(
                    raw, server_hostname=self.host) as connection:
                return connection.version() or "TLS"
        except OSError as error:                    # SSLError is one
            plain = re.search("wrong version number|record layer failure", tls_words(error))
            raise Broken(f"no TLS with {self.netloc}: {tls_words(error)}",
                         "give --url the proxy's address for tenants: this one speaks plain HTTP, "
                         "as an agent or the proxy's admin_listen" if plain else
                         "check that the port is the proxy's") from None

    def server(self) -> str:
        """Its certificate is for this name, by a CA that we trust, and valid."""
        from cmon_proxy import utc
        try:
            with self._connect() as raw, self.tls.wrap_socket(
                    raw, server_hostname=self.host) as connection:
                shown: Any = connection.getpeercert()
        except ssl.SSLCertVerificationError as error:
            step = "--ca FILE or CMON_CA names the CA of the proxy's certificate, PEM"
            if "mismatch" in str(error) or "not valid for" in error.verify_message:
                step = "give --url with a name that the certificate is for"
            elif error.verify_code in (9, 10):      # X509_V_ERR_CERT_NOT_YET_VALID, _HAS_EXPIRED
                step = "tell the operator, or check this machine's clock"
            raise Broken(f"the proxy's certificate is not accepted: {error.verify_message}", step
                         ) from None
        except OSError as error:
            raise Broken(f"the proxy ends the handshake: {tls_words(error)}",
                         "ask the operator what the proxy's log says") from None
        return f"valid until {utc(ssl.cert_time_to_seconds(shown['notAfter']))}"

    def discovery(self) -> str:
        """The proxy knows the account."""
        self.proxy = Proxy(self.url, self.tls, self.arguments.timeout)
        self.discovered = self._ask("/v1/discover").body
        return "the proxy knows the account"

    def listed(self) -> str:
        """There is something to scrape."""
        _, self.containers = self.proxy.listed(self.discovered)
        if not self.containers:
            raise Broken("the account has no container that runs", "start one, or check that the "
                         f"certificate is for the right account, {self.cert.subject}")
        if self.arguments.container:
            self.chosen = self.proxy.find(self.arguments.container)
        else:
            running = [one for one in self.containers if one.state in ("running", "-")]
            self.chosen = (running or self.containers)[0]
        return f"{len(self.containers)} containers"

    def scrape(self) -> str:
        """One page comes."""
        before = time.time()
        answer = self._ask(f"/v1/{self.chosen.uuid}/metrics")
        try:
            parsed = parse(answer.body.decode())
        except (ExpositionError, UnicodeDecodeError) as error:
            raise Broken(f"the page of {self.chosen.alias} cannot be parsed: {error}",
                         "tell the operator") from None
        for family in parsed:
            self.families.setdefault(family.name, []).extend(family.samples)
        told = self.families.get("time_of_day")
        if told:                                    # milliseconds
            self.node_clock = float(told[0].value) / 1000 - (before + time.time()) / 2
        return f"{sum(map(len, self.families.values()))} samples of {self.chosen.alias}"

    def whole(self) -> str:
        """No collector has failed."""
        ups = self.families.get("cmon_collector_up")
        if ups is None:                             # the original's agent
            raise Skipped("this agent does not say")
        failed = [dict(one.labels).get("collector", "?") for one in ups if one.value == 0]
        if failed:
            raise Broken(f"the page of {self.chosen.alias} lacks {', '.join(failed)}",
                         "tell the operator: the agent's log on the compute node says why")
        return f"all {len(ups)} collectors"

    def age(self) -> str:
        """Its figures are of now."""
        if self._limited():
            raise Broken(*OVER_QUOTA, "quota")
        ages = [(float(one.value), dict(one.labels).get("collector", "?"))
                for one in self.families.get("cmon_sample_age_seconds", ())]
        old = sorted((age, name) for age, name in ages if not name.startswith("plugin_") and
                     age > (OLD_SLOWLY_SECONDS if name in SLOWLY else OLD_SECONDS))
        if old:
            raise Broken(f"{old[-1][1]} of {self.chosen.alias} is {old[-1][0]:.0f} s old", "tell "
                         "the operator: the compute node is short of time, or a command hangs")
        if not ages:
            raise Skipped("this agent does not say")
        return f"at most {max(ages)[0]:.0f} s"

    def quota(self) -> str:
        """The account may ask as often as it does."""
        answer = self._ask("/v1/fleet/metrics", Skipped("this proxy has no fleet page"))
        try:
            values = {family.name: family.samples[0].value
                      for family in parse(answer.body.decode()) if family.samples}
        except (ExpositionError, UnicodeDecodeError) as error:
            raise Broken(f"the fleet page cannot be parsed: {error}", "tell the operator") from None
        if values.get("cmon_quota_limited") == 1 or self._limited():
            raise Broken(*OVER_QUOTA)
        limit = values.get("cmon_quota_limit")
        return "no limit" if limit is None else f"{limit:g} requests a minute"

    def clocks(self) -> str:
        """This machine, the proxy and the node agree on the time."""
        proxy = self.clock if math.isfinite(self.clock) else 0.0    # without a date: who knows
        for whose, apart in (("proxy", proxy), ("compute node", self.node_clock)):
            if abs(apart) > CLOCK_SECONDS:
                raise Broken(f"this machine's clock is {abs(apart):.0f} s "
                             f"{'behind' if apart > 0 else 'ahead of'} the {whose}'s",
                             "check the clocks of both (NTP)")
        return f"{max(abs(proxy), abs(self.node_clock)):.0f} s apart"

    def configuration(self) -> str:
        """The file of Prometheus names the same files and the same proxy."""
        if not self.arguments.prometheus:
            raise Skipped("no --prometheus FILE")
        path = Path(self.arguments.prometheus)
        said = scalars(read_text(path, "configuration"))
        tool = shutil.which("promtool")
        if tool is not None:
            done = subprocess.run([tool, "check", "config", str(path)], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, check=False, stdin=subprocess.DEVNULL)
            if done.returncode:
                lines = done.stdout.decode("utf-8", "replace").strip().splitlines() or ["no reason"]
                raise Broken(f"promtool refuses {path}: {printable(lines[-1])}",
                             f"`promtool check config {path}` says more")
        hosts = {urllib.parse.urlsplit(url).hostname for key, url in said if key == "url"}
        hosts |= {value for key, value in said if key == "endpoint"}
        if self.host not in hosts:
            raise Broken(f"{path} has no job that discovers containers from {self.host}",
                         f"`{PROGRAM} setup` writes one that does")
        for key, mine in (("cert_file", self.arguments.cert), ("key_file", self.arguments.key)):
            named = {(path.parent / value).resolve() for name, value in said if name == key}
            if Path(mine).resolve() not in named:
                raise Broken(f"{path} does not use {mine}, but " + (
                    " and ".join(sorted(map(str, named))) or f"no {key}"),
                    f"use the same {key} there, or give that one to this command")
        for suffix in (value for name, value in said if name == "dns_suffix"):
            self._own_name(f"{self.chosen.uuid}.{suffix}", suffix)
        return f"{path} uses the same files and {self.host}"

    def targets(self) -> str:
        """Prometheus has targets of this proxy, and all are up."""
        if not self.arguments.prometheus:
            raise Skipped("no --prometheus FILE")
        base = self.arguments.prometheus_url.rstrip("/")
        client = Client()
        try:
            answer = client.request("GET", f"{base}/api/v1/targets?state=active")
        except ClientError as error:
            if "refused" in str(error):
                raise Skipped(f"no Prometheus runs at {base}") from None
            raise Broken(f"no answer from Prometheus: {error}", "check --prometheus-url") from None
        finally:
            client.close()
        try:
            active = json.loads(answer.body)["data"]["activeTargets"]
            mine = [(str(one["health"]), str(one["scrapeUrl"]), str(one["lastError"]))
                    for one in active if (urllib.parse.urlsplit(one["scrapeUrl"]).hostname or "")
                    .endswith(self.host)]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Broken(f"{base} does not answer as Prometheus does", "check --prometheus-url"
                         ) from None
        if not mine:
            raise Broken(f"Prometheus at {base} has no target of {self.host}", "give it the file, "
                         "or reload it (SIGHUP)")
        down = [(url, why) for health, url, why in mine if health == "down"]
        if down:
            raise Broken(f"{len(down)} of {len(mine)} targets are down, the first: "
                         + printable(f"{down[0][0]}: {down[0][1]}"),
                         "if the other links hold, reload Prometheus (SIGHUP) and look again")
        return f"{len(mine)} targets, none down"

    def _own_name(self, name: str, suffix: str) -> None:
        """Where each container is a host of its own: certificate and DNS cover its name."""
        instead = f"or run `{PROGRAM} setup` without --dns"
        try:
            with self._connect() as raw, self.tls.wrap_socket(raw, server_hostname=name):
                pass
        except OSError as error:
            raise Broken(f"the proxy's certificate is not for *.{suffix}: {tls_words(error)}",
                         f"ask the operator for a certificate with *.{suffix}, {instead}"
                         ) from None
        try:
            socket.getaddrinfo(name, self.port, type=socket.SOCK_STREAM)
        except OSError:
            raise Broken(f"{name} cannot be resolved", f"let *.{suffix} lead to the proxies in "
                         f"DNS (`{PROGRAM} discover --zone` prints records), {instead}") from None

    def _connect(self) -> socket.socket:
        try:
            return socket.create_connection((self.host, self.port), self.arguments.timeout)
        except OSError as error:
            step = "check the port in --url, and firewalls between here and there"
            if urllib.parse.urlsplit(self.url).port is None:
                step = f"the proxy's usual port is {PROXY_PORT}: " \
                    f"--url https://{self.host}:{PROXY_PORT}"
            raise Broken(f"cannot connect to {self.host}:{self.port}: {words_of(error)}", step
                         ) from None

    def _limited(self) -> bool:
        return any(one.value == 1 for one in self.families.get("cmon_quota_limited", ()))

    def _ask(self, path: str, missing: Skipped | None = None) -> ClientResponse:
        """An answer with status 200; its date tells the proxy's clock, in whole seconds."""
        before = time.time()
        answer = self.proxy.get(path)
        try:
            date = email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp()
        except (LookupError, ValueError, TypeError, OverflowError):
            date = -math.inf
        if not path.startswith("/v1/" + self.chosen.uuid):      # a page has the agent's date
            # an answer may have been made before it was asked for: the latest counts
            self.clock = max(self.clock, date + 0.5 - (before + time.time()) / 2)
        if answer.status == 200:
            return answer
        if answer.status == 404 and missing is not None:
            raise missing
        words = printable(answer.body[:2000].decode("utf-8", "replace")) or "no reason given"
        raise Broken(f"the proxy says {answer.status}: {words}", {
            401: "add the SSH key to the account, or make a certificate with a key that it has",
            404: f"check the name: {DISCOVER}",
            429: "scrape less often, or ask the operator for a larger quota",
        }.get(answer.status, "try again in a minute; if it stays so, tell the operator"),
            "quota" if answer.status == 429 else "")


# in the order in which they depend on each other
LINKS: tuple[tuple[str, Callable[[Doctor], str]], ...] = (
    ("files", Doctor.files), ("key", Doctor.key), ("style", Doctor.style),
    ("purpose", Doctor.purpose), ("dates", Doctor.dates), ("signature", Doctor.signature),
    ("name", Doctor.name), ("TCP", Doctor.tcp), ("TLS", Doctor.handshake),
    ("server certificate", Doctor.server), ("discovery", Doctor.discovery),
    ("list", Doctor.listed), ("scrape", Doctor.scrape), ("page", Doctor.whole),
    ("age", Doctor.age), ("quota", Doctor.quota), ("clock", Doctor.clocks),
    ("configuration", Doctor.configuration), ("targets", Doctor.targets),
)


def doctor(arguments: argparse.Namespace) -> int:
    """`cmon.py doctor`"""
    patient = Doctor(arguments)
    broken: Broken | None = None
    for name, link in LINKS:
        word, said = "ok", ""
        if broken is not None:
            word, said = ("FAIL", str(broken)) if broken.link == name else ("skip", "")
        else:
            try:
                said = link(patient)
            except Skipped as why:
                word, said = "skip", str(why)
            except Broken as error:
                broken = error
                word, said = ("skip", f"see {error.link}") if error.link not in ("", name) else (
                    "FAIL", str(error))
            except Failure as failure:
                broken = Broken(str(failure), {
                    "list": DISCOVER if arguments.container
                    else "check that the URL is the proxy's",
                    "files": f"{CERTGEN}, or give --cert, --key and --ca the files that are there",
                    "configuration": "give --prometheus the file that Prometheus reads",
                    "key": CERTGEN}.get(
                        name, "check the files and the URL that the command was given"))
                word, said = "FAIL", str(failure)
        print(coloured(f"{word:<4}", {"ok": 32, "FAIL": 31}.get(word, 0))
              + f"  {name}" + (f": {said}" if said else ""), flush=True)
    print(f"Next: {broken.step}." if broken else "All is well.")
    return 1 if broken else 0


def tls_words(error: OSError) -> str:
    """`wrong version number`."""
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else words_of(error)


def scalars(text: str) -> list[tuple[str, str]]:
    """The settings `key: value` of a YAML or JSON file in their order. The standard library has no
    parser for YAML, and which files and names occur is all that is asked here."""
    found = re.findall(r"""["']?\b(\w+)["']?\s*:\s+("[^"\n]*"|'[^'\n]*'|[^\s,{}\[\]]+)""",
                       re.sub(r"(?m)(^|\s)#.*$", "", text))
    return [(key, value.strip("\"'")) for key, value in found]


# --- rules and dashboards -------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
DASHBOARDS = ("fleet", "container", "node", "proxy")


def example(name: str) -> Path:
    """A file of examples/, from a checkout or from an installed package."""
    for folder in (HERE / "examples", Path(sys.prefix) / "share" / "cmon" / "examples"):
        if (folder / name).is_file():
            return folder / name
    raise Failure(f"{HERE / 'examples' / name} is missing: run cmon.py in a copy of the whole "
                  "project, or install it with pip")


def rules(arguments: argparse.Namespace) -> int:
    """`cmon.py rules`"""
    print(example("rules.yml").read_text("utf-8"), end="")
    return 0


def dashboard(arguments: argparse.Namespace) -> int:
    """`cmon.py dashboard`"""
    if arguments.name:
        print(example(f"dashboards/{arguments.name}.json").read_text("utf-8"), end="")
    else:
        rows = [(name, json.loads(example(f"dashboards/{name}.json").read_text("utf-8"))["title"])
                for name in DASHBOARDS]
        print("\n".join(table(("NAME", "TITLE"), rows)))
    return 0


# --- setup ----------------------------------------------------------------------------------------

DATASOURCE_YML = """\
apiVersion: 1
datasources:
  - {name: Prometheus, type: prometheus, access: proxy, url: URL, isDefault: true}
"""
DASHBOARDS_YML = """\
apiVersion: 1
providers:
  - {name: Container Monitor, type: file, options: {path: DASHBOARDS}}
"""


class Profile(NamedTuple):
    """What a profile of node-triton (~/.triton) tells."""
    account: str = ""
    key_id: str = ""            # a fingerprint, MD5 or SHA256
    url: str = ""               # of the proxy, as CloudAPI's name suggests


def triton_profile(home: Path) -> Profile:
    """The profile that TRITON_PROFILE or ~/.triton/config.json names, else the only one."""
    folder = home / ".triton"
    try:
        found = {path.stem: path for path in sorted(folder.glob("profiles.d/*.json"))}
        name = os.environ.get("TRITON_PROFILE", "")
        config = folder / "config.json"
        if not name and config.exists():
            name = str(json.loads(config.read_bytes()).get("profile", ""))
        if name not in found and len(found) == 1:
            name = next(iter(found))
        if name not in found:
            return Profile()
        said = json.loads(found[name].read_bytes())
        account, key_id, cloudapi = (str(said.get(key) or "") for key in (
            "actAsAccount", "keyId", "url"))
        account = account or str(said.get("account") or "")
        host = urllib.parse.urlsplit(cloudapi).hostname or ""
    except (OSError, ValueError, AttributeError, RecursionError):
        return Profile()                    # whatever is wrong with it, the flags serve
    if re.fullmatch("(?:[0-9a-f]{2}:){15}[0-9a-f]{2}", key_id):
        key_id = "MD5:" + key_id
    service = re.sub(r"^cloudapi\.", "cmon.", host)
    return Profile(account if LOGIN.fullmatch(account) else "", key_id,
                   f"https://{service}:{PROXY_PORT}" if service != host else "")


def key_of_profile(home: Path, key_id: str) -> str:
    """The private key in ~/.ssh whose public half has that fingerprint; "" without one."""
    from cmon_proxy import CertificateError, public_key
    for path in sorted(home.glob(".ssh/*.pub")) if key_id else ():
        try:
            key = public_key(read_text(path, "public key"))
        except (CertificateError, Failure):
            continue
        if key_id in (key.sha256, "MD5:" + key.md5) and path.with_suffix("").exists():
            return str(path.with_suffix(""))
    return ""


def setup(arguments: argparse.Namespace) -> int:
    """`cmon.py setup`"""
    home, folder = Path.home(), Path(arguments.dir)
    profile = triton_profile(home)
    arguments.account = arguments.account or profile.account
    if not arguments.account:
        raise Usage("for which account? give --account LOGIN")
    if not arguments.ssh_key:
        arguments.ssh_key = key_of_profile(home, profile.key_id)
        if not arguments.ssh_key and profile.key_id and os.environ.get("SSH_AUTH_SOCK"):
            arguments.ssh_key, arguments.agent = profile.key_id, True
    arguments.url = proxy_url(arguments.url or profile.url)
    config = folder / "prometheus.yml"
    if os.path.lexists(config) and not arguments.force:
        raise Failure(f"{config} exists: --force replaces what setup wrote; give another folder to "
                      "start afresh")
    ca = read_text(Path(arguments.ca), "CA") if arguments.ca else ""
    cert, key = (folder / f"{arguments.account}-{kind}.pem" for kind in ("cert", "key"))
    if cert.exists() and key.exists():
        print(f"using {cert} and {key}, which are there")
    else:
        arguments.out, arguments.renew = str(folder), False
        certgen(arguments)
    arguments.cert, arguments.key = str(cert), str(key)
    if ca:
        arguments.ca = str(folder / "ca.pem")
        write_plain(folder / "ca.pem", ca)
    suffix = (arguments.suffix or urllib.parse.urlsplit(arguments.url).hostname or "") \
        if arguments.dns else ""
    write_plain(config, prometheus_yml(arguments.url, arguments.account, bool(ca), suffix,
                                       operates(arguments)))
    write_plain(folder / "rules.yml", example("rules.yml").read_text("utf-8"))
    for name in DASHBOARDS:
        write_plain(folder / "dashboards" / f"{name}.json",
                    example(f"dashboards/{name}.json").read_text("utf-8"))
    provisioning = folder / "grafana" / "provisioning"
    write_plain(provisioning / "datasources" / "prometheus.yml",
                DATASOURCE_YML.replace("URL", json.dumps(arguments.prometheus_url)))
    write_plain(provisioning / "dashboards" / "cmon.yml", DASHBOARDS_YML.replace(
        "DASHBOARDS", json.dumps(str((folder / "dashboards").resolve()), ensure_ascii=False)))
    print(f"wrote {config}, rules.yml, dashboards/ and grafana/ beside it\n", flush=True)
    arguments.container, arguments.prometheus = "", str(config)
    status = doctor(arguments)
    quoted = shlex.quote(str(config))
    data = shlex.quote(str(folder / "data"))
    print(f"\n{'Then start' if status else 'Start'} Prometheus:\n\n"
          f"    prometheus --config.file={quoted} --storage.tsdb.path={data}\n\n"
          "and Grafana, if there is one:\n\n"
          f"    GF_PATHS_PROVISIONING={shlex.quote(str(provisioning.resolve()))} grafana server")
    return status


def operates(arguments: argparse.Namespace) -> bool:
    """Whether the account may see compute nodes; where nobody can be asked, no."""
    try:
        proxy = Proxy(arguments.url, client_context(arguments.cert, arguments.key, arguments.ca),
                      arguments.timeout)
        return proxy.get("/v1/gz/discover").status == 200
    except Failure:
        return False                        # doctor says why, in a moment


def prometheus_yml(url: str, account: str, ca: bool, suffix: str = "", nodes: bool = False) -> str:
    """The example for Prometheus, with this proxy and account: with ca.pem, by names below a suffix
    instead of by HTTP, with compute nodes, if so. Its files lie beside it."""
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname or "", parts.port or 443
    text = example("prometheus-dns.yml" if suffix else "prometheus.yml").read_text("utf-8")
    if nodes:
        operator = example("prometheus-operator.yml").read_text("utf-8")
        job = operator[operator.index("  - job_name: nodes"):operator.index("  - job_name: agents")]
        text += job.replace("admin-", "alice-")
    text = text.replace("cmon.dc.example:9163", f"[{host}]:{port}" if ":" in host
                        else f"{host}:{port}")
    text = text.replace("endpoint: cmon.dc.example", f"endpoint: {json.dumps(host)}\n        "
                        f"port: {port}")
    text = text.replace("cmon.dc.example", suffix or host)
    text = text.replace("account: alice", f"account: {json.dumps(account)}")
    text = re.sub(r"alice-(cert|key)\.pem", rf"{account}-\1.pem", text)
    if ca:
        text = re.sub(r"(?m)^( +)(cert_file: .*)$", r"\1ca_file: ca.pem\n\1\2", text)
    return text


def write_plain(path: Path, text: str) -> None:
    """A file for everybody to read, in folders that are made for it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    except OSError as error:
        raise Failure(f"cannot write {path}: {words_of(error)}") from None


# --- demo -----------------------------------------------------------------------------------------

LOOPBACK = "127.0.0.1"
SUFFIX = "demo.localhost"       # OpenSSL takes no wildcard right below a top-level name
SILENT_NODE = "5a5a5a5a-0008-4000-8000-00000000cafe"
SILENT_VM = "5a5a5a5a-0008-4000-8000-000000000001"
DEMO_DAYS = 90                  # of its certificates: longer than what alerts ask for
START_SECONDS = 30.0            # for a child to listen: a small machine may compile for ten
STOP_SECONDS = 5.0


class Program:
    """One of our servers as a process, with its log in a file."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name, self.log = name, log
        with log.open("wb") as sink:
            # in a session of its own, so that Ctrl-C reaches us alone and we stop it in order
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink,
                                             stderr=sink, start_new_session=True)
        # its end of the pipe closes with us, also when we are killed: then it ends the program
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", f"read -r _; kill {self._process.pid}"], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def port(self) -> int:
        """The port it listens on, as it says itself."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            heard = re.search(rb"listening on 127\.0\.0\.1:([0-9]+)", self.log.read_bytes())
            if heard:
                return int(heard.group(1))
            self.check()
            time.sleep(0.02)
        raise Failure(f"the {self.name} does not listen after {START_SECONDS:g} s; "
                      + self.last_words())

    def check(self) -> None:
        """Failure with its last words if it has ended."""
        status = self._process.poll()
        if status is not None:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise Failure(f"the {self.name} {how}; {self.last_words()}")

    def last_words(self) -> str:
        """The end of its log, on one line."""
        lines = self.log.read_text("utf-8", "replace").strip().splitlines()
        return f"its last words: {printable(lines[-1])}" if lines else "it left no word"

    def stop(self) -> None:
        """End it, by force when it does not."""
        self._guard.kill()
        self._guard.communicate()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class Demo:
    """A recorded compute node with its agent, a proxy and accounts' certificates, in one folder."""

    def __init__(self, folder: Path, agent_port: int, proxy_port: int) -> None:
        self.folder = folder
        self._programs: list[Program] = []
        self._wanted = {"agent": agent_port, "proxy": proxy_port, "forwarder": 0}
        self.agent_port = self.proxy_port = 0
        self.inventory: dict[str, Any] = {}

    def start(self) -> None:
        """Make the certificates, start the agent and then the proxy."""
        from cmon_proxy import CertificateError     # no other command needs the proxy's code
        recording, inventory = example("node.json"), example("inventory.json")
        for program, port in self._wanted.items():
            require_free(program, port)
        self.inventory = json.loads(inventory.read_text("utf-8"))
        try:
            self._certificates()
        except (OSError, CertificateError) as error:
            raise Failure("the demo makes certificates with the OpenSSL of this Python, and "
                          f"cannot: {error}") from None
        recorded = json.loads(recording.read_text("utf-8"))
        recorded["load"] = json.loads(example("load.json").read_text("utf-8"))
        self._write("node.json", json.dumps(recorded).encode())
        self.agent_port = self._run("agent", ["-I"], "--replay", str(self.folder / "node.json"))
        for server in self.inventory["servers"]:        # one agent plays all the nodes
            server["admin_ip"] = f"{LOOPBACK}:{self.agent_port}"
        self._add_silent_node()
        self._write("inventory.json", json.dumps(self.inventory, indent=2).encode())
        self._write("proxy.json", json.dumps({
            "tls": {"certificate": "server-cert.pem", "key": "server-key.pem"},
            "admin_listen": f"{LOOPBACK}:0",
            "inventory": {"file": "inventory.json"},
            "agent": {"port": self.agent_port},
        }, indent=2).encode())
        self.proxy_port = self._run("proxy", ["-sE"], "--config", str(self.folder / "proxy.json"))

    def forward(self, login: str, sink: Mapping[str, Any]) -> int:
        """Start the forwarder as this account; samples that the sink has taken, or Failure."""
        self._write("forwarder.json", json.dumps({
            "proxy": {"url": f"https://localhost:{self.proxy_port}", "ca": "ca.pem",
                      "cert": f"{login}-cert.pem", "key": f"{login}-key.pem"},
            "interval": 5, "sinks": {"demo": sink}}, indent=2).encode())
        url = "http://{}:{}/metrics".format(LOOPBACK, self._run(
            "forwarder", ["-sE"], "--config", str(self.folder / "forwarder.json")))
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            found = {family.name: family.samples[0].value
                     for family in parse(fetch(url).decode()) if family.samples}
            if not found["cmon_forwarder_sink_up"]:
                raise Failure(f"the forwarder cannot deliver; {self._programs[-1].last_words()}")
            if found["cmon_forwarder_sink_samples_sent_total"]:
                return int(found["cmon_forwarder_sink_samples_sent_total"])
            time.sleep(0.1)
        raise Failure(f"nothing was delivered within {START_SECONDS:g} s; "
                      + self._programs[-1].last_words())

    def _add_silent_node(self) -> None:
        """A compute node that does not answer, with a container of the last ordinary account."""
        owner = [account for account in self.inventory["accounts"]
                 if not account.get("operator")][-1]["uuid"]
        mine = next(vm for vm in self.inventory["vms"] if vm["owner_uuid"] == owner)
        self.inventory["servers"].append({"uuid": SILENT_NODE, "hostname": "cn08",
                                          "admin_ip": f"{LOOPBACK}:1"})
        self.inventory["vms"].append({
            **mine, "uuid": SILENT_VM, "alias": "reports", "server_uuid": SILENT_NODE,
            "state": "running"})

    def stop(self) -> None:
        """End all programs."""
        for program in reversed(self._programs):
            program.stop()

    def check(self) -> None:
        """Failure if one of the programs has ended."""
        for program in self._programs:
            program.check()

    def proxy(self, login: str) -> Proxy:
        """The proxy, seen by this account."""
        tls = client_context(str(self.folder / f"{login}-cert.pem"),
                             str(self.folder / f"{login}-key.pem"), str(self.folder / "ca.pem"))
        return Proxy(f"https://localhost:{self.proxy_port}", tls, 10.0, (LOOPBACK, self.proxy_port))

    def credentials(self, login: str, flags: Sequence[str], between: str = " ") -> str:
        """Flags or variables of a command that is to act as this account."""
        files = ("ca.pem", f"{login}-cert.pem", f"{login}-key.pem")
        return " ".join(f"{flag}{between}{shlex.quote(str(self.folder / file))}"
                        for flag, file in zip(flags, files))

    def curl(self, login: str, url: str, curl: str = "curl") -> str:
        """A command that asks the proxy as this account, from any shell on this machine."""
        flags = self.credentials(login, ("--cacert", "--cert", "--key"))
        return f"{curl} {flags} --connect-to ::{LOOPBACK}: {url}"

    def bundle(self, login: str) -> str:
        """A command that makes what a browser imports."""
        cert, key, bundle = (shlex.quote(str(self.folder / f"{login}{end}"))
                             for end in ("-cert.pem", "-key.pem", ".p12"))
        return f"openssl pkcs12 -export -passout pass: --in {cert} --inkey {key} --out {bundle}"

    def _run(self, name: str, python: Sequence[str], *arguments: str) -> int:
        command = [sys.executable, *python, str(HERE / f"cmon_{name}.py"), *arguments,
                   "--listen", f"{LOOPBACK}:{self._wanted[name]}", "--log-format", "text"]
        self._programs.append(Program(name, command, self.folder / f"{name}.log"))
        return self._programs[-1].port()

    def _write(self, name: str, content: bytes) -> None:
        write_private(self.folder / name, content)

    def _certificates(self) -> None:
        """A CA with the proxy's certificate; and for each account a key and, signed by it, the
        certificate that `triton profile cmon-certgen` would make."""
        from cmon_proxy import (
            CMON_PURPOSE, make_certificate, make_key, public_key, ssh_public_key)
        ca_key, server_key = make_key(), make_key()
        ca = make_certificate(ca_key, "Container Monitor demo CA", days=DEMO_DAYS, is_ca=True)
        names = ("localhost", SUFFIX, f"*.{SUFFIX}", LOOPBACK)
        self._write("ca.pem", ca)
        self._write("server-key.pem", server_key)
        self._write("server-cert.pem", make_certificate(
            server_key, "localhost", issuer=ca, signing_key=ca_key, names=names, days=DEMO_DAYS,
            purposes=["serverAuth"]))
        for account in self.inventory["accounts"]:
            login = account["login"]
            account_key, key = make_key(), make_key()
            line = ssh_public_key(account_key)
            account["keys"] = [line]
            digest = bytes.fromhex(public_key(line).md5.replace(":", ""))
            issuer = "MD5:" + base64.b64encode(digest).decode().rstrip("=")
            self._write(f"{login}-key.pem", key)
            self._write(f"{login}-cert.pem", make_certificate(
                key, login, issuer=issuer, signing_key=account_key, days=DEMO_DAYS,
                purposes=["clientAuth", CMON_PURPOSE]))


def require_free(program: str, port: int) -> None:
    """Failure if another program listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            why = ("is taken" if error.errno == errno.EADDRINUSE
                   else f"cannot be had: {words_of(error)}")
            raise Failure(f"port {port} for the {program} {why}; another: --{program}-port PORT, "
                          "and without the flag a free one is found") from None


class Forward(NamedTuple):
    """A sink for the demo: where it mostly listens, and a command that shows what has arrived."""
    where: str
    key: str                        # the setting that says where
    look: str                       # WHERE stands for it
    more: Mapping[str, Any] = {}


QUERY = "--data-urlencode"
FORWARDS = {
    "influxdb": Forward("http://127.0.0.1:8086", "url", f"curl -G WHERE/query -d db=cmon {QUERY} "
                        "'q=SELECT last(value) FROM mem_agg_usage GROUP BY alias'",
                        {"database": "cmon"}),
    "graphite": Forward("127.0.0.1:2003", "address",
                        "find /var/lib/graphite/whisper/_tagged -name 'mem_agg_usage*'"),
    "statsd": Forward("127.0.0.1:8125", "address", "echo gauges | nc 127.0.0.1 8126"),
    "syslog": Forward("127.0.0.1:514", "address", "grep cmon@38678 /var/log/syslog"),
    "gelf": Forward("127.0.0.1:12201", "address", "# search for short_message:mem_agg_usage"),
    "http": Forward("http://127.0.0.1:8080/", "url", "see what listens there"),
    "remote_write": Forward("http://127.0.0.1:9090/api/v1/write", "url",
                            f"curl -G http://127.0.0.1:9090/api/v1/query {QUERY} "
                            "query=mem_agg_usage"),
    "file": Forward("samples.log", "path", "tail -f WHERE"),
}


def forwarding(word: str) -> tuple[str, str]:
    """`TYPE` or `TYPE=WHERE` of --forward."""
    kind, _, where = word.partition("=")
    if kind not in FORWARDS:
        raise argparse.ArgumentTypeError(
            f"{kind!r} is not one of {', '.join(FORWARDS)}, or one of them with =WHERE")
    return kind, where or FORWARDS[kind].where


def demo(arguments: argparse.Namespace) -> int:
    """`cmon.py demo`"""
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, interrupt)
    folder = Path(tempfile.mkdtemp(prefix="cmon-demo-"))
    running = Demo(folder, arguments.agent_port, arguments.proxy_port)
    try:
        running.start()
        show(running, arguments.forward)
        if arguments.once:
            print("All of it works. Its files are gone now; without --once everything stays up "
                  "until\nCtrl-C, so that you can repeat the steps.")
            return 0
        print("Everything runs until Ctrl-C.", flush=True)
        while True:
            time.sleep(0.5)
            running.check()
    except KeyboardInterrupt:
        return 0
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)       # nothing may cut the cleaning short
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)


def show(running: Demo, forward: tuple[str, str] | None = None) -> None:
    """Do as a tenant what a tenant's Prometheus does; print each step as a command. Failure if the
    product does not do what it promises."""
    vms = running.inventory["vms"]
    login, mine, foreign = cast(running.inventory)
    proxy = running.proxy(login)
    base = proxy.url
    steps: list[tuple[str, str, list[str]]] = []

    def step(title: str, command: str, result: list[str]) -> None:
        steps.append((title, command, result))
        print(f"{emphasis(f'{len(steps)}. {title}')}\n\n{wrapped(command)}\n")
        print("".join(f"    {line}\n" for line in result), end="\n" if result else "", flush=True)

    run = sum(vm["state"] == "running" for vm in vms)
    print(f"""
Container Monitor on one machine: an agent that replays a recorded compute node, {len(vms)} zones
of {len(running.inventory["accounts"])} accounts ({run} running), and the proxy in front of it.

    {base}/

is the page for people. A browser needs {login}'s certificate: make {login}.p12 as below, import it
(Firefox: Settings, Certificates, Your Certificates; Chrome: Settings, Security, Manage
certificates), and accept the demo's CA. Within minutes db01 reaches its CPU cap, web02 runs out
of memory and lb01 loses packets; the page of carol has a container on a silent compute node.

    {wrapped(running.bundle(login)).strip()}

Each step below has just been done; its command repeats it from any shell.
""")
    _, containers = proxy.containers()
    if mine["uuid"] not in [container.uuid for container in containers]:
        raise Failure(f"discovery as {login} does not show {mine['alias']}")
    step(f"{login} asks the proxy for the account's containers, as Prometheus does",
         running.curl(login, f"{base}/v1/discover"), container_table(containers, 76))
    page = proxy.page(f"/v1/{mine['uuid']}/metrics")
    step(f"{login} scrapes {mine['alias']}, from outside the zone",
         running.curl(login, f"{base}/v1/{mine['uuid']}/metrics"), summary(page))
    named = f"https://{mine['uuid']}.{SUFFIX}:{running.proxy_port}/metrics"
    step("the same page by host name: one node exporter for each container",
         running.curl(login, named), [f"{samples(by_name(running, login, named))} samples"])
    refused = proxy.get(f"/v1/{foreign['uuid']}/metrics")
    if refused.status != 404:
        raise Failure(f"a foreign container is answered with {refused.status} instead of 404")
    step(f"another account's container, {foreign['alias']}, is not there for {login}",
         running.curl(login, f"{base}/v1/{foreign['uuid']}/metrics", "curl -i"),
         textwrap.wrap(f"{refused.status}: {printable(refused.body.decode())}", 74))
    direct = f"http://{LOOPBACK}:{running.agent_port}"
    step(f"the operator asks the agent itself; {direct}/ is for a browser",
         f"curl {direct}/v1/gz/metrics", summary(fetch(f"{direct}/v1/gz/metrics")))
    config = running.folder / "prometheus.yml"
    write_plain(config, prometheus_yml(proxy.url, login, ca=True))
    write_plain(running.folder / "rules.yml", example("rules.yml").read_text("utf-8"))
    python = shlex.quote(sys.executable)
    flags = running.credentials(login, ("--ca", "--cert", "--key"))
    step("the same with our own command",
         f"{python} {shlex.quote(str(HERE / 'cmon.py'))} monitor {shlex.quote(mine['alias'])} "
         f"--url {base} {flags}", [])
    variables = running.credentials(login, ("CMON_CA", "CMON_CERT", "CMON_KEY"), "=")
    step("its other commands, without flags once a shell has these variables",
         f"export CMON_URL={base} {variables}",
         [f"{python} {shlex.quote(str(HERE / 'cmon.py'))} {words}" for words in (
             "top", "doctor", "check --all")])
    step("and a Prometheus, if there is one; see http://127.0.0.1:9090/targets then",
         f"prometheus --config.file={shlex.quote(str(config))} "
         f"--storage.tsdb.path={shlex.quote(str(running.folder.parent / 'cmon-prometheus'))} "
         "--web.listen-address=127.0.0.1:9090", [])
    if forward is not None:
        kind, where = forward
        sink = FORWARDS[kind]
        if kind == "file":
            where = str(running.folder / where)
        if kind == "influxdb":      # version 1 wants the database to be there
            try:
                Client().request("POST", f"{where}/query", {
                    "Content-Type": "application/x-www-form-urlencoded"},
                    b"q=CREATE DATABASE cmon")
            except ClientError as error:
                raise Failure(f"InfluxDB: {error}") from None
        sent = running.forward(login, {"type": kind, sink.key: where, **sink.more})
        step(f"the forwarder pushes {login}'s containers to {where}; this shows what has arrived",
             sink.look.replace("WHERE", shlex.quote(where)),
             [f"{sent} samples sent; {running.folder / 'forwarder.json'} is its configuration"])
    proxy.close()


def cast(inventory: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Who plays: the first ordinary account with a running zone, that zone, and a foreign one."""
    ordinary = {account["uuid"]: account["login"] for account in inventory["accounts"]
                if not account.get("operator")}
    running = [vm for vm in inventory["vms"] if vm["state"] == "running"]
    for uuid, login in ordinary.items():
        mine = [vm for vm in running if vm["owner_uuid"] == uuid]
        foreign = [vm for vm in running if vm["owner_uuid"] in ordinary.keys() - {uuid}]
        if mine and foreign:
            return login, mine[0], foreign[0]
    raise Failure("examples/inventory.json needs two accounts with running zones")


def fetch(url: str, tls: ssl.SSLContext | None = None,
          resolve: Mapping[str, tuple[str, int]] | None = None) -> bytes:
    """The body of a 200; Failure otherwise."""
    client = Client(tls, resolve=resolve)
    try:
        answer = client.request("GET", url)
    except ClientError as error:
        raise Failure(str(error)) from None
    finally:
        client.close()
    if answer.status != 200:
        raise Failure(f"{url} answers {answer.status}: {printable(answer.body[:500].decode())}")
    return answer.body


def by_name(running: Demo, login: str, url: str) -> bytes:
    """The page of a container's own name, without DNS."""
    tls = client_context(*(str(running.folder / name) for name in (
        f"{login}-cert.pem", f"{login}-key.pem", "ca.pem")))
    host = urllib.parse.urlsplit(url).hostname or ""
    return fetch(url, tls, {host: (LOOPBACK, running.proxy_port)})


def samples(page: bytes) -> int:
    """How many samples a page has; Failure if it is none."""
    try:
        return sum(len(family.samples) for family in parse(page.decode()))
    except (ExpositionError, UnicodeDecodeError) as error:
        raise Failure(f"a page that Prometheus would refuse: {error}") from None


SHOWN = ("cpucap_cur_usage_percentage", "mem_agg_usage", "mem_limit", "net_agg_bytes_in",
         "load_average", "zfs_used", "cpu_idle_seconds_total", "arcstats_size_bytes")


def summary(page: bytes) -> list[str]:
    """The size of a page, and a few samples that everybody understands."""
    count = samples(page)
    found = {family.name: family.samples for family in parse(page.decode())}
    lines = [f"{name}{short_labels(found[name][0])} {found[name][0].value}"
             for name in SHOWN if found.get(name)]
    return [*lines[:5], f"… {count} samples, {len(page)} bytes"]


def short_labels(sample: Sample) -> str:
    """`{interface="vnic0"}`, cut to what a line has room for."""
    inner = ",".join(f'{name}="{value}"' for name, value in sample.labels)
    return "{" + (inner if len(inner) <= 36 else inner[:35] + "…") + "}" if inner else ""


def wrapped(command: str) -> str:
    """A command over several lines, which a shell takes as they are."""
    lines = [""]
    for unit in re.split(r" (?=--|CMON_)|(?<!--url) (?=https?:)", command):
        if not lines[-1] or len(lines[-1]) + len(unit) < 66:
            lines[-1] = f"{lines[-1]} {unit}".strip()
        else:
            lines.append(unit)
    return "    " + " \\\n      ".join(lines)


# --- completion -----------------------------------------------------------------------------------

PROGRAMS = "cmon cmon.py"               # as pip installs it, and as it lies in a checkout
BASH = """\
# bash completion of cmon: in ~/.bashrc, `source <(cmon.py completion bash)`
_cmon() {
    local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" word command=
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case "$word" in
        COMMANDS) command="$word"; break ;;
        esac
    done
    COMPREPLY=()
    case "$before" in
    FILES) mapfile -t COMPREPLY < <(compgen -f -- "$current"); return ;;
    FOLDERS) mapfile -t COMPREPLY < <(compgen -d -- "$current"); return ;;
    VALUES) return ;;
    esac
    local words=
    case "$command" in
WORDS
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
}
complete -o filenames -F _cmon PROGRAMS
"""
ZSH = """\
#compdef PROGRAMS
# zsh completion of cmon: `cmon.py completion zsh > _cmon` in a folder of $fpath
_cmon() {
    local -a commands
    local context state state_descr line
    typeset -A opt_args
    commands=(
COMMANDS
    )
    _arguments -C \\
GLOBAL
        '1:command:->command' '*::argument:->argument'
    case $state in
    command) _describe command commands ;;
    argument)
        case $words[1] in
ARGUMENTS
        esac ;;
    esac
}
if [ "$funcstack[1]" = _cmon ]; then _cmon "$@"; else compdef _cmon PROGRAMS; fi
"""


def completion(arguments: argparse.Namespace) -> int:
    """`cmon.py completion`"""
    print({"bash": bash_completion, "zsh": zsh_completion}[arguments.shell](command_line()), end="")
    return 0


def parsers_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Flags and arguments, without the commands."""
    return [action for action in parser._actions
            if not isinstance(action, argparse._SubParsersAction)
            and action.help != argparse.SUPPRESS]


def bash_completion(parser: argparse.ArgumentParser) -> str:
    """What bash has to source."""
    commands = parsers_of(parser)
    kinds: dict[str, set[str]] = {"FILES": set(), "FOLDERS": set(), "VALUES": set()}
    lines = []
    for name, one in (("", parser), *commands.items()):
        words = list(commands) if not name else []
        for action in actions_of(one):
            words += action.option_strings or list(action.choices or ())
            if action.option_strings and action.nargs is None:      # needs a value
                kind = {"FILE": "FILES", "DIR": "FOLDERS"}.get(str(action.metavar), "VALUES")
                kinds[kind] |= set(action.option_strings)
        if any(action.metavar == "DIR" and not action.option_strings for action in actions_of(one)):
            words.append("$(compgen -d -- $current)")
        lines.append(f'    "{name}") words="{" ".join(words)}" ;;')
    text = BASH.replace("COMMANDS", "|".join(commands)).replace("PROGRAMS", PROGRAMS)
    for kind, flags in kinds.items():
        text = text.replace(kind, "|".join(sorted(flags)))
    return re.sub(r"(?m)^WORDS$", lambda _: "\n".join(lines), text)


def zsh_completion(parser: argparse.ArgumentParser) -> str:
    """What zsh has to find in its $fpath."""
    def quoted(text: str) -> str:
        return "'" + text.replace("'", "'\\''") + "'"

    def plain(text: str) -> str:        # brackets and colons have a meaning
        return re.sub(r"([\[\]:\\])", r"\\\1", text)

    def specs(one: argparse.ArgumentParser, indent: str) -> str:
        lines = []
        for action in actions_of(one):
            help_text = plain((action.help or "").replace("%%", "%"))
            metavar = str(action.metavar or action.dest)
            values = "(" + " ".join(map(str, action.choices)) + ")" if action.choices else (
                {"FILE": "_files", "DIR": "_files -/"}.get(metavar, " "))
            for flag in action.option_strings:
                takes = "" if action.nargs == 0 else \
                    (":" if action.nargs is None else "::") + plain(metavar) + ":" + values
                lines.append(quoted(f"{flag}[{help_text}]{takes}"))
            if not action.option_strings:
                lines.append(quoted(f"{'*' if action.nargs in ('*', '+') else ''}:"
                                    f"{plain(metavar)}:{values}"))
        return " \\\n".join(indent + line for line in lines)

    commands = parsers_of(parser)
    helps = {command.name: command.help for command in COMMANDS}
    text = ZSH.replace("PROGRAMS", PROGRAMS)
    for word, value in (
            ("COMMANDS", "\n".join(f"        {quoted(f'{name}:{plain(helps[name])}')}"
                                   for name in commands)),
            ("GLOBAL", specs(parser, " " * 8) + " \\"),
            ("ARGUMENTS", "\n".join(f"        {name}) _arguments \\\n{specs(one, ' ' * 12)} ;;"
                                    for name, one in commands.items()))):
        text = re.sub(rf"(?m)^{word}$", lambda _, value=value: value, text)     # type: ignore[misc]
    return text


# --- commands -------------------------------------------------------------------------------------

class Command(NamedTuple):
    """One row of the table of commands."""
    name: str
    help: str
    run: Callable[[argparse.Namespace], int]
    arguments: Callable[[argparse.ArgumentParser], None]
    example: str


seconds = within(float, 0.001, 3600, "a number of seconds, at most 3600")
count = within(int, 1, 10 ** 9, "a whole number from 1")
port_number = within(int, 1, 65535, "a port from 1 to 65535")


def connection_arguments(parser: argparse.ArgumentParser, first: bool = False) -> None:
    """Where the proxy is and who asks. They may be given before the command (`first`) and behind
    it, which wins; both win over the environment."""
    def add(flag: str, default: Any, **more: Any) -> None:
        parser.add_argument(flag, default=default if first else argparse.SUPPRESS, **more)
    environment = os.environ.get
    add("--url", environment("CMON_URL", ""), metavar="URL",
        help=f"the proxy, as https://HOST:{PROXY_PORT} (CMON_URL)")
    add("--cert", environment("CMON_CERT", ""), metavar="FILE",
        help="your certificate, PEM (CMON_CERT)")
    add("--key", environment("CMON_KEY", ""), metavar="FILE", help="its key, PEM (CMON_KEY)")
    add("--ca", environment("CMON_CA", ""), metavar="FILE", help="the CA of the proxy's "
        "certificate, PEM, where it is not one that this system trusts (CMON_CA)")
    add("--timeout", 10.0, metavar="SECONDS", type=seconds, help="for one answer (10)")


def groups_argument(parser: argparse.ArgumentParser) -> None:
    """Which of the account's containers."""
    parser.add_argument("--groups", metavar="A,B", default="",
                        help="only containers in one of these groups (tag triton.cmon.groups)")


def discover_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `discover`."""
    groups_argument(parser)
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="the proxy's answer as JSON")
    forms.add_argument("--file-sd", metavar="FILE", default="", help="write targets for "
                       "Prometheus' file_sd_configs; a failure leaves the file as it is")
    forms.add_argument("--hosts", metavar="ADDRESS", type=address, help="the "
                       "containers' own names as lines of /etc/hosts, with the proxy's address")
    forms.add_argument("--zone", action="store_true",
                       help="the same as records to include in a zone file")
    parser.add_argument("--every", metavar="SECONDS", type=seconds,
                        help="with --file-sd: write it again and again, until Ctrl-C")
    parser.add_argument("--suffix", metavar="NAME", default="", help="what the containers' own "
                        "names end with (the host name of the URL)")
    connection_arguments(parser)


def monitor_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `monitor`."""
    add = parser.add_argument
    add("container", metavar="NAME|UUID", nargs="?", default="",
        help="an alias, a UUID, or the beginning of a UUID that only one has")
    tables = parser.add_mutually_exclusive_group()
    for name, one in TABLES.items():
        tables.add_argument(f"--{name}", action="store_true", help=one.help)
    add("--json", action="store_true", help="as one JSON object, numbers exact")
    add("--watch", metavar="SECONDS", nargs="?", type=seconds, const=0.0,
        help=f"again and again, in place on a terminal, until Ctrl-C ({ONCE_SECONDS:g})")
    add("--record", metavar="FILE", default="",
        help="append pages with their time, until Ctrl-C; gzip if it ends with .gz; every "
             f"{RECORD_SECONDS:g} s without --watch")
    add("--count", metavar="N", type=count, help="end --watch or --record after so many pages")
    add("--replay", metavar="FILE", default="", help="show a recording instead; with --watch at "
        "its own pace, without at once")
    add("--speed", metavar="FACTOR", type=seconds, help="of --replay with --watch (1)")
    connection_arguments(parser)


def days(text: str) -> int:
    """A flag's value: how long a certificate is valid."""
    value = int(text)
    if not 0 < value <= 36500:
        raise ValueError
    return value


def login(text: str) -> str:
    """A flag's value: an account's login."""
    if LOGIN.fullmatch(text) is None:
        raise ValueError
    return text


def certgen_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `certgen`."""
    signing_arguments(parser, required=True)
    add = parser.add_argument
    add("--out", metavar="DIR", default=".", help="where LOGIN-cert.pem and LOGIN-key.pem go (.)")
    add("--force", action="store_true", help="replace what is there")
    add("--renew", action="store_true", help="replace what is there if it ends within "
        f"{RENEW_DAYS} days; otherwise leave it")


def signing_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Whose certificate is to be made, how and with which key."""
    add = parser.add_argument
    profile = "" if required else " (the one of your triton profile)"
    add("--account", metavar="LOGIN", type=login, required=required,
        help="the account's login" + profile)
    add("--ssh-key", metavar="FILE", default="", help="a private key of the account, RSA or ECDSA, "
        "as ssh-keygen makes it or PEM; with --agent its public half or its fingerprint")
    add("--agent", action="store_true", help="let ssh-agent sign, with the one key that it has or "
        "with --ssh-key")
    add("--old-style", action="store_true", help="the SSH key itself, self-signed, as "
        "sdc-docker-setup.sh makes it, instead of a key of its own")
    add("--days", metavar="N", type=days, default=DAYS, help=f"how long it is valid ({DAYS})")


def address(text: str) -> str:
    """A flag's value: an IP address."""
    return str(ipaddress.ip_address(text))


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `doctor`."""
    parser.add_argument("container", metavar="NAME|UUID", nargs="?", default="",
                        help="the container to scrape (the first that runs)")
    parser.add_argument("--prometheus", metavar="FILE", default="",
                        help="a prometheus.yml that should use the same files and proxy")
    prometheus_url_argument(parser)
    connection_arguments(parser)


def prometheus_url_argument(parser: argparse.ArgumentParser) -> None:
    """Where Prometheus answers."""
    parser.add_argument("--prometheus-url", metavar="URL", default=PROMETHEUS_URL,
                        help=f"where its API answers ({PROMETHEUS_URL})")


def setup_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `setup`."""
    add = parser.add_argument
    add("dir", metavar="DIR", help="where the files go")
    signing_arguments(parser)
    add("--dns", action="store_true", help="discover by names of the containers' own, where "
        "wildcard DNS leads to the proxy, instead of by HTTP")
    add("--suffix", metavar="NAME", default="", help="with --dns: what those names end with (the "
        "host name of the URL)")
    add("--force", action="store_true", help="replace the files that setup wrote, but not the "
        "certificate")
    prometheus_url_argument(parser)
    connection_arguments(parser)


def dashboard_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `dashboard`."""
    parser.add_argument("name", metavar="NAME", nargs="?", choices=DASHBOARDS,
                        help=" or ".join(DASHBOARDS) + "; without it, a list of them")


def completion_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `completion`."""
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh"), help="bash or zsh")


def no_arguments(parser: argparse.ArgumentParser) -> None:
    """A command without flags."""


def top_column(text: str) -> str:
    """A flag's value: a column of top."""
    if text.upper() not in TOP_TITLES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of " + ", ".join(TOP_TITLES))
    return text.upper()


def top_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `top`."""
    add = parser.add_argument
    groups_argument(parser)
    add("--sort", metavar="COLUMN", type=top_column, default="CPU%",
        help=", ".join(TOP_TITLES).replace("%", "%%") + " (CPU%%)")
    add("--interval", metavar="SECONDS", type=seconds, default=TOP_SECONDS,
        help=f"between two rounds ({TOP_SECONDS:g})")
    add("--once", action="store_true", help="one table, then end; so does a pipe")
    add("--replay", metavar="FILE", default="", help="show a recording of `monitor` instead")
    add("--speed", metavar="FACTOR", type=seconds, help="of --replay (1)")
    connection_arguments(parser)


def check_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `check`."""
    add = parser.add_argument
    add("words", metavar="NAME EXPR,WARN,CRIT", nargs="*",
        help="a container (not with --all and its like), then what to look at: METRIC, "
             "METRIC{label=\"value\"}, rate(METRIC) or A/B, with the ranges of the plugin "
             "guidelines, which may be empty; of several samples the worst counts. Default: "
             f"whether all collectors work ({COLLECTORS_UP})")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--all", action="store_true", help="every container of your account")
    chosen.add_argument("--groups", metavar="A,B", default="",
                        help="every container in one of these groups")
    chosen.add_argument("--proxy", action="store_true", help=f"the proxy: {RESPONSE}, and metrics "
                        "of its fleet page, as cmon_quota_used")
    chosen.add_argument("--certificate", action="store_true",
                        help=f"how long your certificate is good ({DAYS_LEFT_LIMITS})")
    add("--state", metavar="DIR", default="", help="where the last readings for rates are kept "
        "(cmon in the cache folder of the user)")
    connection_arguments(parser)


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `demo`."""
    parser.add_argument("--once", action="store_true",
                        help="end after the check instead of at Ctrl-C")
    parser.add_argument("--forward", metavar="TYPE[=WHERE]", type=forwarding,
                        help="also start the forwarder, to a server that listens: "
                        + ", ".join(FORWARDS) + " at its usual address, or WHERE")
    for program in ("agent", "proxy"):
        parser.add_argument(f"--{program}-port", metavar="PORT", type=port_number, default=0,
                            help=f"the {program}'s port on {LOOPBACK} (a free one)")


COMMANDS = (
    Command("discover", "list the containers of your account", discover, discover_arguments,
            "cmon.py discover --groups web,db"),
    Command("monitor", "show the metrics of one container: its page, or a table", monitor,
            monitor_arguments, "cmon.py monitor web01 --use --watch 5"),
    Command("top", "watch all containers of your account, live", top, top_arguments,
            "cmon.py top --groups web --sort mem%"),
    Command("check", "be a plugin of Nagios and Icinga: one line, exit status 0, 1, 2 or 3", check,
            check_arguments, "cmon.py check web01 mem_agg_usage/mem_limit,0.8,0.9 "
            "'rate(net_drops_in_total),0'"),
    Command("certgen", "make a certificate for the proxy with an SSH key of your account", certgen,
            certgen_arguments, "cmon.py certgen --account alice --ssh-key ~/.ssh/id_rsa"),
    Command("doctor", "walk from your files to a page and say which link is broken", doctor,
            doctor_arguments, "cmon.py doctor web01 --prometheus prometheus.yml"),
    Command("setup", "make all that a Prometheus needs: certificate, configuration, rules", setup,
            setup_arguments, "cmon.py setup monitoring --account alice --ssh-key ~/.ssh/id_rsa"),
    Command("rules", "print rules for Prometheus: what to record, and when to alert", rules,
            no_arguments, "cmon.py rules > rules.yml"),
    Command("dashboard", "print a dashboard for Grafana", dashboard, dashboard_arguments,
            "cmon.py dashboard fleet > fleet.json"),
    Command("completion", "print what makes a shell complete this command", completion,
            completion_arguments, "source <(cmon.py completion bash)"),
    Command("demo", "see all of it work on this machine, with nothing installed", demo,
            demo_arguments, "cmon.py demo"),
)


class Parser(CommandLine):
    """A parser whose errors a monitoring system understands, too."""
    words: Sequence[str] = ()           # that it was given

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Keep the words: a misspelt flag explains why another is missing."""
        self.words = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def unrecognized(self, words: Sequence[str]) -> str:
        """What is wrong with words that mean nothing here."""
        near = [flag for word in words for flag in difflib.get_close_matches(
            word.partition("=")[0], self._option_string_actions, 1, 0.7)]
        return "unrecognized arguments: " + " ".join(words) + (
            f"; did you mean {' and '.join(near)}?" if near else "")

    def error(self, message: str) -> NoReturn:
        """A line on stderr and 2; for `check` on stdout and 3, since 2 is CRITICAL there."""
        strange = [word for word in self.words if word.startswith("--")
                   and word.partition("=")[0] not in (*self._option_string_actions, "--")]
        if strange and "are required" in message:
            message = self.unrecognized(strange)
        if self.prog.endswith(" check"):
            sys.exit(report([Finding(UNKNOWN, self.reworded(message))]))
        super().error(message)


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog=PROGRAM, description="Container Monitor: metrics of zones, for their owners.",
        allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"cmon {__version__}")
    connection_arguments(parser, first=True)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        inner = commands.add_parser(
            command.name, help=command.help, allow_abbrev=False,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog="Example: " + command.example.replace("cmon.py", PROGRAM))
        command.arguments(inner)
        inner.set_defaults(run=command.run, parser=inner)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what goes wrong is one line on stderr."""
    sys.stdout = sys.stdout or open(os.devnull, "w")    # closed by who started us
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")        # a locale without "…" is no reason to end
    arguments, rest = command_line().parse_known_args(argv)
    if rest:
        arguments.parser.error(arguments.parser.unrecognized(rest))
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except Failure as failure:
        print(f"cmon: {failure}", file=sys.stderr)
        return 2 if isinstance(failure, Usage) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:             # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:            # a full disk below stdout or the temporary folder
        print(f"cmon: {words_of(error)}" + (f": {error.filename}" if error.filename else ""),
              file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


if __name__ == "__main__":
    sys.exit(main())
