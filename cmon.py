#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""The command of Container Monitor's users and operators.

    cmon.py discover [--groups A,B] [--json]    list the account's containers
    cmon.py monitor NAME|UUID [--use]           show one container's metrics: its page, or a table
    cmon.py top                                 watch all containers, live
    cmon.py check NAME EXPR,WARN,CRIT           run as a plugin of Nagios or Icinga
    cmon.py certgen --account LOGIN --ssh-key FILE
                                                make a client certificate
    cmon.py doctor [NAME]                       find what keeps metrics from arriving
    cmon.py setup DIR --account LOGIN --ssh-key FILE
                                                write everything that Prometheus needs
    cmon.py rules | dashboard [NAME]            print rules for Prometheus, dashboards for Grafana
    cmon.py demo [--once]                       run a compute node, a proxy and a tenant here

--url, --cert, --key and --ca, before or after the command, or CMON_URL, CMON_CERT, CMON_KEY and
CMON_CA name the proxy and the client's certificate.
Exit status: 0 on success, 1 on failure (with one line on stderr), 2 for a wrong command line;
`check` exits 0 to 3, as the plugin guidelines say.

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

if sys.version_info < (3, 9):       # one line instead of a traceback
    sys.exit(f"cmon: needs Python 3.9 or later, this is {sys.version.split()[0]}")

try:
    # The agent must run as a single file, so it contains the shared kit.
    from cmon_agent import (
        COUNTER, Client, ClientError, ClientResponse, CommandLine, ExpositionError, GAUGE, Labels,
        MAX_BODY, MAX_JSON_BYTES, Number, SUFFIXES, Sample, USE, USE_BUSY, USE_FROM, USE_FULL,
        USE_UP, UUID, Use, __version__, bracketed, metadata, number, open_streams, parse,
        parse_address, printing, read_file, render, within)
except ImportError as import_error:
    sys.exit(f"cmon: {import_error}: cmon_agent.py of the same version must be beside cmon.py")


# --- client ---------------------------------------------------------------------------------------

PROGRAM = Path(sys.argv[0]).name if Path(sys.argv[0]).name in ("cmon", "cmon.exe") else "cmon.py"
PROXY_PORT = 9163
CERTGEN = f"make a certificate with `{PROGRAM} certgen`"
DISCOVER = f"`{PROGRAM} discover` lists the containers"


class Failure(Exception):
    """A command failed: one line for the user, exit status 1."""


class Usage(Failure):
    """The command line is wrong: exit status 2."""


class Container(NamedTuple):
    """One container, as discovery shows it."""
    alias: str
    uuid: str
    brand: str
    state: str
    node: str


class Proxy:
    """The proxy as one account sees it. Every error becomes a `Failure` of one line."""

    def __init__(self, url: str, tls: ssl.SSLContext, timeout: float,
                 connect: tuple[str, int] | None = None) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        host = urllib.parse.urlsplit(url).hostname or ""
        self._client = Client(tls, resolve={host: connect} if connect else None)

    def get(self, path: str) -> ClientResponse:
        """GET a path; returns the response, whatever its status. Failure if none arrives."""
        headers = {"X-Prometheus-Scrape-Timeout-Seconds": f"{self.timeout:g}"}
        try:
            return self._client.request("GET", self.url + path, headers, timeout=self.timeout)
        except ClientError as error:
            raise Failure(str(error) + self._hint(str(error))) from None

    def page(self, path: str) -> bytes:
        """GET a path; returns the body of a 200. Any other status is a Failure with its text."""
        return self.checked(self.get(path))

    def checked(self, answer: ClientResponse) -> bytes:
        """As `page`, for a response already received."""
        if answer.status != 200:
            reason = printable(answer.body[:2000].decode("utf-8", "replace")) or "no reason given"
            netloc = urllib.parse.urlsplit(self.url).netloc
            raise Failure(f"{netloc} says {answer.status}: {reason}")
        return answer.body

    def containers(self, groups: str = "") -> tuple[Any, list[Container]]:
        """Discovery: the JSON as received, and its containers sorted by alias."""
        return self.listed(self.page("/v1/discover" + groups_query(groups)))

    def listed(self, body: bytes) -> tuple[Any, list[Container]]:
        """As `containers`, from the body of a response."""
        try:
            discovered = json.loads(body)
            return discovered, sorted(
                Container(*(printable(str(item.get(key) or "-")) for key in (
                    "vm_alias", "vm_uuid", "vm_brand", "vm_state", "server_uuid")))
                for item in discovered["containers"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Failure(f"{self.url}/v1/discover is not a proxy's answer: check the URL"
                          ) from None

    def find(self, name: str) -> Container:
        """The container with this alias, UUID or UUID prefix; Failure if there is none or several.
        A whole UUID is not looked up: it may be a compute node's."""
        if UUID.fullmatch(name.lower()):
            return Container(name.lower(), name.lower(), "-", "-", "-")
        containers = self.containers()[1]
        try:
            return choose(name, containers)
        except Failure:
            for other in self._not_running():
                if name and name == other.alias or \
                        len(name) > 7 and other.uuid.startswith(name.lower()):
                    raise Failure(f"container {describe(other)} is not running; metrics are "
                                  "available only while it runs") from None
            raise

    def _not_running(self) -> Iterator[Container]:
        """Containers that discovery leaves out, from the fleet page if there is one."""
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
        """The fleet page: the state of each container. The proxy asks no node for it."""
        return self.page("/v1/fleet/metrics" + groups_query(groups))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _hint(self, message: str) -> str:
        parts = urllib.parse.urlsplit(self.url)
        if "mismatch" in message:
            return "; use --url with a name that the certificate is valid for"
        if "certificate is not trusted" in message:
            return "; give the CA of the proxy's certificate with --ca FILE (PEM)"
        if "wrong version number" in message or "record layer failure" in message:
            return ("; this port speaks plain HTTP, as an agent or the proxy's admin_listen does; "
                    "give --url the proxy's address for tenants")
        if parts.port is None and message.startswith("cannot reach"):
            usual = f"https://{parts.hostname}:{PROXY_PORT}"
            return f"; the proxy's default port is {PROXY_PORT}: try --url {usual}"
        return ""


def groups_query(groups: str) -> str:
    """The query string that selects containers in one of these groups."""
    return "?" + urllib.parse.urlencode({"groups": groups}) if groups else ""


def proxy_url(text: str) -> str:
    """Return the proxy's URL; raises Usage if it is missing or wrong."""
    if not text:
        raise Usage("no proxy given: set CMON_URL or use --url, "
                    f"for example https://cmon.dc.example:{PROXY_PORT}")
    try:
        parts = urllib.parse.urlsplit(text)
        good = parts.scheme == "https" and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or parts.path not in ("", "/") or parts.query or parts.fragment or parts.username:
        raise Usage(f"{text!r} is not the URL of a proxy: use https://HOST:PORT without a path")
    return text


def file_content(path: str, what: str) -> bytes:
    """Read a regular file, before OpenSSL does; a Failure names it."""
    try:
        return read_file(path)
    except OSError as error:
        raise Failure(f"cannot read the {what} {path}: {words_of(error)}") from None


def client_context(cert: str, key: str, ca: str) -> ssl.SSLContext:
    """A TLS context with the user's certificate; a Failure names the file and what is wrong."""
    for what, path in (("certificate", cert), ("key", key), ("CA", ca)):
        if path:
            file_content(path, what)
    try:
        context = ssl.create_default_context(cafile=ca or None)
    except ssl.SSLError:
        raise Failure(f"{ca} contains no CA certificate in PEM form") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    prompts = []

    def passphrase() -> str:
        prompts.append(key)
        return ask_passphrase(f"the key {key}")
    try:
        context.load_cert_chain(cert, key, password=passphrase)
    except (OSError, ValueError) as error:      # SSLError is an OSError
        if prompts:
            raise Failure(f"wrong passphrase for the key {key}") from None
        if b"BEGIN OPENSSH PRIVATE KEY" in file_content(key, "key"):
            raise Failure(f"the key {key} is in OpenSSH's format, which TLS cannot use: make a "
                          f"certificate from it with `{PROGRAM} certgen --account LOGIN --ssh-key "
                          f"{key}`") from None
        if "KEY_VALUES_MISMATCH" in str(error):
            raise Failure(f"the key {key} does not belong to the certificate {cert}") from None
        if "TOO_SMALL" in str(error) or "TOO_WEAK" in str(error):
            raise Failure(f"the key of {cert} is too short, or its digest too weak: {CERTGEN}"
                          ) from None
        raise Failure(f"{cert} and {key} are not a certificate and its key in PEM form") from None
    return context


def need_terminal(what: str) -> None:
    """Raise Failure if there is no terminal to ask for the passphrase of `what`."""
    if not sys.stdin.isatty():
        raise Failure(f"{what} has a passphrase, and there is no terminal to ask for it: "
                      "use a key without one, readable by you alone")


def ask_passphrase(what: str) -> str:
    """Read a passphrase from the terminal, without echo."""
    need_terminal(what)
    try:
        return getpass.getpass(f"Passphrase of {what}: ", sys.stderr)
    except EOFError:
        raise Failure(f"no passphrase for {what}") from None


def words_of(error: OSError) -> str:
    """The system's message, in lower case: `no such file or directory`."""
    return (error.strerror or str(error)).lower()


def choose(name: str, containers: Sequence[Container]) -> Container:
    """The only container with this alias or, failing that, UUID prefix; otherwise Failure."""
    matches = [container for container in containers if container.alias == name]
    if not matches and len(name) >= 2:
        matches = [container for container in containers if container.uuid.startswith(name.lower())]
    if len(matches) == 1:
        return matches[0]
    if matches:
        more = f" and {len(matches) - 8} more" if len(matches) > 8 else ""
        raise Failure(f"{name!r} matches " + " and ".join(map(describe, matches[:8])) + more
                      + ": use the UUID")
    aliases = sorted({container.alias for container in containers})
    near = [alias for alias in aliases if name.lower() in alias.lower()][:5]
    near = near or sorted(difflib.get_close_matches(name, aliases, 5, 0.6))
    if not containers:
        raise Failure(f"no container {name!r}: this account has no running containers")
    raise Failure(f"no container {name!r}; " + ("did you mean " + " or ".join(near) + "?" if near
                                                else f"`{PROGRAM} discover` lists them"))


def describe(container: Container) -> str:
    """A container, for a message."""
    return f"{container.uuid} ({container.alias}, {container.state})"


def need_credentials(arguments: argparse.Namespace) -> None:
    """Raise Usage if the certificate or the key is not given."""
    for name, noun in (("cert", "certificate"), ("key", "key")):
        if not getattr(arguments, name):
            raise Usage(f"no client {noun} given: set CMON_{name.upper()} or use --{name} FILE "
                        "(PEM)")


def proxy_of(arguments: argparse.Namespace) -> Proxy:
    """The proxy that the flags and the environment name."""
    url = proxy_url(arguments.url)
    need_credentials(arguments)
    tls = client_context(arguments.cert, arguments.key, arguments.ca)
    return Proxy(url, tls, arguments.timeout)


# --- display --------------------------------------------------------------------------------------

def printable(text: str) -> str:
    """The text on one line, with control characters replaced."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def colours() -> bool:
    """Whether to use colours: only on a terminal that has them, unless NO_COLOR is set."""
    return (sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb")


def emphasis(text: str) -> str:
    """Bold, if colours are used."""
    return f"\x1b[1m{text}\x1b[0m" if colours() else text


def coloured(text: str, colour: int) -> str:
    """In a colour of ISO 6429 (0: none), if colours are used."""
    return f"\x1b[{colour}m{text}\x1b[0m" if colour and colours() else text


def cells_of(text: str) -> int:
    """The width of the text in terminal columns."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(char) else
               2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def clipped(text: str, width: int) -> str:
    """The text, cut with an ellipsis if it is wider than `width` columns."""
    if cells_of(text) <= width:
        return text
    while text and cells_of(text) > width - 1:
        text = text[:-1]
    return text + "…"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()
            ) -> list[str]:
    """Lines with aligned columns, the header first; columns in `right` are right-aligned."""
    widths = [max(map(cells_of, column)) for column in zip(header, *rows)]

    def line(row: Sequence[str]) -> str:
        return "  ".join(" " * (width - cells_of(cell)) + cell if index in right else
                         cell + " " * (width - cells_of(cell))
                         for index, (cell, width) in enumerate(zip(row, widths))).rstrip()
    return [line(header), *map(line, rows)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()
          ) -> list[str]:
    """As `aligned`, with an emphasised header."""
    lines = aligned(header, rows, right)
    return [emphasis(lines[0]), *lines[1:]]


def fitted(header: Sequence[str], rows: Sequence[Sequence[str]], width: int,
           drop: Sequence[str] = (), left: int = 1, plain: bool = False) -> list[str]:
    """A table with its first `left` columns left-aligned and the others right-aligned. If it is too
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
    """Containers as a table; if it is too wide, nodes and then aliases are cut."""
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
    """Columns and lines of the terminal now; COLUMNS does not follow a resized window."""
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):       # no terminal, or no file descriptor
        size = os.terminal_size((0, 0))
    return size if size.columns and size.lines else os.terminal_size((80, 24))


def screen_width() -> int:
    """Columns of the terminal; practically unlimited for a pipe or a file."""
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
    """A value with its unit, for people; "-" for no value."""
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
    """Prints tables and pages one after the other or, in place, each over the last."""

    def __init__(self, in_place: bool) -> None:
        self._in_place = in_place and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = False
        self._note = ""

    def raw(self, page: Page) -> None:
        """Print a page as received; on a terminal, with control characters replaced."""
        if self._in_place or sys.stdout.isatty():
            lines = ["".join(char if char.isprintable() else "?" for char in line)
                     for line in page.body.decode("utf-8", "replace").splitlines()]
            if self._in_place:      # the screen has no room for comments
                lines = [clipped(line, screen_width()) for line in lines
                         if not line.startswith("#")]
            self.lines(lines)
        else:
            sys.stdout.buffer.write(page.body)      # whatever the locale
            sys.stdout.flush()
            self._shown = True

    def lines(self, lines: Sequence[str]) -> None:
        """Print a table."""
        if not self._in_place:
            print("\n".join([*([""] if self._shown else []), *lines]), flush=True)
            self._shown = True
            return
        columns, height = screen_size()
        if self._note:
            lines = [*lines, "", clipped(self._note, columns)]
        if len(lines) >= height:
            lines = [*lines[:height - 2], f"… {len(lines) - height + 2} more lines"]
        # Clear the end of each line and the rest of the screen; a cleared screen would flicker.
        print(("\x1b[H" if self._shown else "\x1b[2J\x1b[H")
              + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", end="", flush=True)
        self._shown = True
        self._note = ""

    def end(self) -> None:
        """End the line on which the terminal shows `^C`, so that the prompt starts a new one."""
        if self._in_place:
            print(flush=True)

    def line(self, text: str) -> None:
        """Print one line as it is."""
        print(text, flush=True)

    def note(self, text: str) -> None:
        """Report a problem: on the last line and below the next table, or on stderr."""
        if self._in_place and self._shown:
            self._note = text
            height = screen_size().lines
            print(f"\x1b7\x1b[{height}H{clipped(text, screen_width())}\x1b[K\x1b8", end="",
                  flush=True)
        else:
            print(text, file=sys.stderr)


# --- figures --------------------------------------------------------------------------------------

LEAST_SPAN = 0.05               # seconds; closer readings are the same reading
OLDEST_COPY = 60.0              # seconds; another proxy may answer with a copy this much older
_METRIC = r'[a-zA-Z_:][a-zA-Z0-9_:]*(?:\{(?:[^"{}]|"(?:[^"\\]|\\.)*")*\})?'
_OPERAND = rf"rate\(\s*{_METRIC}\s*\)|{_METRIC}"
_EXPRESSION = re.compile(rf"\s*({_OPERAND})\s*(?:/\s*({_OPERAND})\s*)?")
_LIMIT = r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?"
_RANGE = re.compile(rf"(@?)(?:({_LIMIT}|~):)?({_LIMIT})?")
OK, WARNING, CRITICAL, UNKNOWN = range(4)       # exit statuses in the plugin guidelines


@functools.lru_cache(maxsize=None)
def facts() -> dict[str, dict[str, Any]]:
    """The agent's metadata of each metric, by name; `collectors` lists all that export it."""
    metrics: dict[str, dict[str, Any]] = {}
    for row in metadata():
        metrics.setdefault(row["name"], {**row, "collectors": []})["collectors"].append(
            row["collector"])
    return metrics


class Page(NamedTuple):
    """One scrape of one container."""
    at: float                   # when it arrived, wall clock
    uuid: str
    alias: str
    body: bytes


class Figures:
    """The samples of a page by name and labels; with an earlier page, also rates of counters.

    A rate covers the time between two readings. The time of a reading is the node's clock minus the
    age that the agent reports for the collector. A collector that has not been read again keeps its
    last rates. A counter that is lower than before was reset to 0. Raises Failure for a bad page.
    """

    def __init__(self, page: Page, before: Figures | None = None) -> None:
        self.page = page
        self.values: dict[str, dict[Labels, Number]] = {}
        self.rates: dict[str, dict[Labels, float]] = {}
        self.kinds: dict[str, str] = {}     # by sample name, with its suffix
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
        else:       # the node's clock stopped or was set back
            spans = dict.fromkeys(self.taken, ours)
        for collector, span in spans.items():
            if -OLDEST_COPY < span < LEAST_SPAN:
                self.taken[collector] = before.taken.get(collector, before.now)
        for name in self.counters():
            span, values = spans[self.collector(name)], self.values[name]
            earlier = before.values.get(name, {})
            if span < LEAST_SPAN and values != earlier:
                span = ours         # the values changed, so this is a new reading
            if span < LEAST_SPAN:
                if name in before.rates and span > -OLDEST_COPY:
                    self.rates[name] = before.rates[name]
                continue
            self.rates[name] = {
                labels: quotient(value - earlier[labels] if value >= earlier[labels] else value,
                                 span)
                for labels, value in values.items() if labels in earlier}

    def counters(self) -> list[str]:
        """The names of all samples that are not gauges."""
        return [name for name, kind in self.kinds.items() if kind != GAUGE]

    def collector(self, name: str) -> str:
        """The collector that a metric comes from; "" if the page does not show it."""
        known = facts().get(name, {}).get("collectors", ())
        return next((collector for collector in known if collector in self.ages), "") or next(
            (collector for collector in self.ages if name.startswith(collector + "_")), "")


def quotient(value: Number, divisor: Number) -> float:
    """Divide numbers of any size; infinite if the result is too large for a float."""
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
        """Its value for each set of labels; only finite values."""
        values: Mapping[Labels, Number] = (figures.rates if self.rate else figures.values).get(
            self.name, {})
        return {labels: value for labels, value in values.items()
                if set(self.labels) <= set(labels) and math.isfinite(quotient(value, 1))}

    def unit(self) -> str:
        """The unit of its values, from the agent's metadata."""
        unit = str(facts().get(self.name, {}).get("unit", ""))
        return (unit + "/s").replace("boolean", "") if self.rate else unit


class Expression(NamedTuple):
    """`METRIC`, `METRIC{label="value"}`, `rate(…)`, or one of them divided by another."""
    text: str
    over: Operand
    under: Operand | None

    @classmethod
    def of_text(cls, text: str) -> Expression:
        """Parse an expression; raises Usage if it is not one."""
        match = _EXPRESSION.fullmatch(text)
        if match is None:
            raise Usage(f"{text!r} is not an expression: METRIC, METRIC{{label=\"value\"}}, "
                        "rate(METRIC) or A/B")
        over, under = match.groups()
        return cls(text.strip(), operand(over), operand(under) if under else None)

    def of(self, figures: Figures) -> dict[Labels, Number]:
        """Its value for each set of labels. A/B divides samples with the same labels, or all by the
        only sample of B; without a divisor, or with 0, there is no value."""
        over = self.over.of(figures)
        if self.under is None:
            return over
        under = self.under.of(figures)
        single = next(iter(under.values())) if len(under) == 1 else 0
        return {labels: quotient(value, under.get(labels, single))
                for labels, value in over.items() if under.get(labels, single)}

    def unit(self) -> str:
        """The unit of its values; "" for a count, "share" for a quotient."""
        return "share" if self.under is not None else self.over.unit()


def operand(text: str) -> Operand:
    """Parse one operand of an expression, with labels as on a page; raises Usage."""
    rate = text.startswith("rate(")
    series = text[5:-1].strip() if rate else text
    try:
        family, = parse(f"{series} 0\n")
    except ExpositionError:
        raise Usage(f"{text!r} is not an expression: write labels as on a page, "
                    "{label=\"value\"}") from None
    return Operand(family.name, tuple(sorted(family.samples[0].labels)), rate)


class Range(NamedTuple):
    """A range of the plugin guidelines: alerts outside `low` to `high`, or inside with `@`."""
    text: str
    low: float
    high: float
    inverted: bool

    @classmethod
    def of_text(cls, text: str) -> Range:
        """Parse a range; raises Usage. https://www.monitoring-plugins.org/doc/guidelines.html"""
        match = _RANGE.fullmatch(text)
        if match is None or (match.group(2) is None and match.group(3) is None):
            raise Usage(f"{text!r} is not a range: 10, 10:, ~:10, 10:20 or @10:20")
        low = -math.inf if match.group(2) == "~" else float(match.group(2) or 0)
        high = float(match.group(3) or "inf")
        if low > high:
            raise Usage(f"{text!r} is not a range: its start is greater than its end")
        return cls(text, low, high, match.group(1) == "@")

    def words(self) -> str:
        """Why a value alerts: `outside 0:10`."""
        text = self.text.lstrip("@")
        return ("inside " if self.inverted else "outside ") + (text if ":" in text else "0:" + text)

    def alerts(self, value: Number) -> bool:
        """Whether this value alerts."""
        return (self.low <= value <= self.high) == self.inverted


class Threshold(NamedTuple):
    """`EXPR,WARN,CRIT`: an expression, and the ranges that its values must stay in."""
    expression: Expression
    warning: Range | None
    critical: Range | None

    @classmethod
    def of_text(cls, text: str) -> Threshold:
        """Parse an argument; either range may be empty or missing. Raises Usage."""
        match = _EXPRESSION.match(text)
        rest = text[match.end():] if match else ""
        parts = rest.split(",") if rest else ["", ""]
        if match is None or parts[0] or len(parts) > 3:
            raise Usage(f"{text!r} is not EXPR,WARN,CRIT, such as 'load_average,4,8', "
                        "'rate(net_drops_in_total),0' or 'mem_agg_usage/mem_limit,0.8,0.9'")
        ranges = [Range.of_text(part.strip()) if part.strip() else None for part in parts[1:]]
        return cls(Expression.of_text(match.group()), *(ranges + [None, None])[:2])

    def status(self, value: Number) -> int:
        """OK, WARNING or CRITICAL."""
        if self.critical is not None and self.critical.alerts(value):
            return CRITICAL
        return WARNING if self.warning is not None and self.warning.alerts(value) else OK


CELLS = ("utilisation", "saturation", "errors")
VERDICT_WORDS = ("ok", "watch", "bad")


class Cell(NamedTuple):
    """One cell of the USE table: its verdict (None: cannot be judged) and its figures."""
    resource: str
    name: str
    verdict: int | None
    figures: tuple[Expression, ...]
    share: str = ""             # the used share, shown beside the metric `shared`
    shared: str = ""


@functools.lru_cache(maxsize=None)
def figure_of(name: str) -> Expression:
    """The figure shown for a metric: the rate of a counter, the value of a gauge."""
    counts = facts().get(name, {}).get("type") == COUNTER
    return Expression.of_text(f"rate({name})" if counts else name)


@functools.lru_cache(maxsize=None)
def cell_thresholds(use: Use, cell: str) -> tuple[Threshold, ...]:
    """The thresholds of a cell, from USE_FROM: `watch` for saturation, `bad` for errors."""
    thresholds: list[Threshold] = []
    for name in use.saturation if cell == "saturation" else use.errors:
        limit = Range.of_text("1:") if name in USE_UP else below(USE_FROM.get(name, 0))
        if USE_FROM.get(name, 0) != math.inf:
            bad = cell == "errors"
            thresholds.append(Threshold(figure_of(name), None if bad else limit,
                                        limit if bad else None))
    return tuple(thresholds)


def share_of(use: Use, figures: Figures) -> float | None:
    """The used share of a resource from 0 to 1, as its table row defines it; of several, the
    highest. None if the page lacks the metrics."""
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
    """The range that alerts at this value and above; for 0, only above."""
    return Range("", -math.inf, math.nextafter(limit, 0) if limit else 0, False)


def scope_of(figures: Figures) -> str:
    """`zone` or `node`: whose page it is."""
    return "node" if "alloc_cpus" in figures.values or "cpu_idle_seconds_total" in figures.values \
        else "zone"


def verdict_of(use: Use, cell: str, figures: Figures) -> int | None:
    """The verdict of a cell; None if it cannot be judged."""
    if cell == "utilisation":
        share = share_of(use, figures)
        return None if share is None else CRITICAL if share >= USE_FULL else int(share >= USE_BUSY)
    return max((threshold.status(value) for threshold in cell_thresholds(use, cell)
                for value in threshold.expression.of(figures).values()), default=None)


def share_words(use: Use, figures: Figures) -> str:
    """The used share of a resource, in words."""
    share = share_of(use, figures)
    if share is None:
        return ""
    whole = f" of {use.share[1]}" if use.share[1:] else ""
    return f" ({amount(share, 'share')}{whole}{'' if whole and not use.left else ' used'})"


def use_cells(figures: Figures) -> list[Cell]:
    """The USE table of a page, without resources that have no metrics on it."""
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

ONCE_SECONDS = 2.0              # between scrapes, for a table with rates and for --watch
MOST_SCRAPES = 5                # for one table; a throttled agent may repeat its last values
RECORD_SECONDS = 10.0


class Cap(NamedTuple):
    """One row of --caps: a resource, and its metrics."""
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
    """A column of --net or --disk: an expression, and a unit if not the metric's own."""
    title: str
    expression: str
    unit: str = ""


class Layout(NamedTuple):
    """A table with a row per set of label values; on a narrow screen its last columns go first."""
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
    """The value of an expression without labels, for the whole container."""
    return Expression.of_text(text).of(figures).get(()) if text else None


def caps_rows(figures: Figures) -> list[dict[str, Any]]:
    """--caps as exact values; cap and share are None without a cap."""
    rows = []
    for row in CAPS:
        cap, used, highest, above = (one_value(figures, text) for text in row[1:])
        if used is not None:
            rows.append({"resource": row.resource, "cap": cap or None, "used": used,
                         "share": quotient(used, cap) if cap else None, "highest": highest,
                         "above_seconds": above})
    return rows


def caps_lines(figures: Figures, width: int) -> list[str]:
    """--caps as text."""
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
    """--use as exact values: a row for each cell."""
    return [{"resource": cell.resource, "cell": cell.name,
             "verdict": None if cell.verdict is None else VERDICT_WORDS[cell.verdict],
             "figures": {figure.text: [{"labels": dict(labels), "value": value}
                                       for labels, value in figure.of(figures).items()]
                         for figure in cell.figures}} for cell in use_cells(figures)]


def use_lines(figures: Figures, width: int) -> list[str]:
    """--use as text: figures beside their cell or, on a narrow screen, below it."""
    cells = use_cells(figures)
    heads = aligned(("RESOURCE", "CELL", "VERDICT"), [
        (clipped(cell.resource, 16 if width < 100 else 40), cell.name,
         "-" if cell.verdict is None else VERDICT_WORDS[cell.verdict]) for cell in cells])
    indent = max(map(cells_of, heads)) + 2
    beside = width - indent >= 44
    first = heads[0] + " " * (indent - cells_of(heads[0])) + "FIGURES" if beside else heads[0]
    lines = [emphasis(clipped(first, width))]
    for head, cell in zip(heads[1:], cells):
        texts = [f"{figure.over.name} {combined(figure, figures)}"
                 + (cell.share if figure.over.name == cell.shared else "")
                 for figure in cell.figures]
        if beside:      # never break a line inside a figure
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
    """A line that ends with a verdict, in the verdict's colour."""
    verdict = line.rsplit(" ", 1)[-1]
    return coloured(line, {"watch": 33, "bad": 31}.get(verdict, 0))


def combined(expression: Expression, figures: Figures) -> str:
    """An expression for the whole container: the sum of its samples; the largest if they are
    cumulative (label `over`); for booleans, whether all are true."""
    values = expression.of(figures)
    if not values:
        return "-"
    cumulative = any(name == "over" for labels in values for name, _ in labels)
    combine = max if cumulative else min if expression.unit() == "boolean" else sum
    return amount(combine(values.values()), expression.unit())


def layout_rows(layouts: Sequence[Layout], figures: Figures
                ) -> list[tuple[Layout, list[tuple[tuple[str, ...], list[Number | None]]]]]:
    """The rows of each layout that the page has metrics for: label values, then columns."""
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
    """--net or --disk as exact values: label names and expressions are the keys."""
    return [{**dict(zip(layout.labels, key)),
             **{column.expression: value for column, value in zip(layout.columns, values)}}
            for layout, rows in layout_rows(layouts, figures) for key, values in rows]


def layout_lines(layouts: Sequence[Layout], figures: Figures, width: int) -> list[str]:
    """--net or --disk as text."""
    lines: list[str] = []
    for layout, table_rows in layout_rows(layouts, figures):
        units = [column.unit or Expression.of_text(column.expression).unit()
                 for column in layout.columns]
        header = (*(name.upper().replace("_", " ") for name in layout.labels),
                  *(column.title for column in layout.columns))
        rows = [(*map(printable, key),
                 *(amount(value, unit) for value, unit in zip(values, units)))
                for key, values in table_rows]
        left = len(layout.labels)
        columns = [*zip(header, *rows)]
        transposed = aligned(columns[0], columns[1:], range(1, len(rows) + 1))
        lines += [""] * bool(lines)
        if max(map(cells_of, aligned(header, rows))) > width >= max(map(cells_of, transposed)):
            lines += transposed         # narrow screen: a line for each column, so that all fit
        else:
            lines += fitted(header, rows, width, left=left, drop=("NIC TAG", *(
                column.title for column in reversed(layout.columns[2:]))))
    return lines


class Table(NamedTuple):
    """A view of a page, as text and as exact values; with `rates` it needs two scrapes."""
    help: str
    rates: bool
    lines: Callable[[Figures, int], list[str]]
    objects: Callable[[Figures], list[dict[str, Any]]]


TABLES = {
    "caps": Table("show caps: cap, used, share, highest usage, seconds above the cap", False,
                  caps_lines, caps_rows),
    "use": Table("show utilisation, saturation and errors of each resource, with verdicts", True,
                 use_lines, use_rows),
    "net": Table("show network interfaces, as rates", True,
                 functools.partial(layout_lines, NET), functools.partial(layout_objects, NET)),
    "disk": Table("show file systems, as rates, and disk space", True,
                  functools.partial(layout_lines, DISK), functools.partial(layout_objects, DISK)),
}


def page_objects(figures: Figures) -> dict[str, Any]:
    """All samples of a page as exact values, by metric name."""
    return {name: [{"labels": dict(labels), "value": value} for labels, value in samples.items()]
            for name, samples in figures.values.items()}


def as_json(figures: Figures, table: Table | None, indent: int | None) -> str:
    """A page or table as a JSON object. JSON has no infinities or NaN, so they become strings."""
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
    """Scrape the container every `interval` seconds. The first scrape may raise Failure; later
    failures are yielded."""
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
        raise Usage("no container given: use an alias, a UUID or the beginning of a UUID")
    if arguments.record and arguments.replay:
        raise Usage("--record and --replay cannot be used together")
    for flag in ("speed", "count"):
        if getattr(arguments, flag) is not None and not (
                arguments.replay if flag == "speed" else arguments.record or
                arguments.watch is not None):
            raise Usage("--speed requires --replay" if flag == "speed" else
                        "--count requires --watch or --record")
    if arguments.replay:
        return show_pages(arguments, table, replayed_pages(arguments), math.inf)
    proxy = proxy_of(arguments)
    container = proxy.find(arguments.container)
    repeated = arguments.watch is not None or bool(arguments.record)
    interval = arguments.watch or (RECORD_SECONDS if arguments.record else ONCE_SECONDS)
    pages = live_pages(proxy, container, interval)
    most = (arguments.count or math.inf) if repeated else 1
    if arguments.record and most == math.inf:
        print(f"cmon: recording {container.alias} every {interval:g} s to {arguments.record}, "
              "until Ctrl-C", file=sys.stderr)
    return show_pages(arguments, table, pages, most)


def show_pages(arguments: argparse.Namespace, table: Table | None, pages: Iterator[Scrape],
               most: float) -> int:
    """Record and show at most `most` pages, until the source ends or Ctrl-C."""
    several = most > 1
    recorder = Recorder(arguments.record) if arguments.record else None
    painter = Painter(in_place=several and arguments.watch is not None)
    silent = recorder is not None and table is None and arguments.watch is None \
        and not arguments.json
    earlier: dict[str, Figures] = {}        # by container
    waiting: Figures | None = None          # a first page, which has no rates yet
    done = shown = 0
    try:
        for page in pages:
            if isinstance(page, Failure):
                painter.note(f"cmon: {page}")
                continue
            if recorder is not None:
                recorder.add(page)
            done += 1
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
        aliases = sorted({page.alias for page in recording(arguments.replay)})
        raise Failure(f"{arguments.replay} contains no complete page"
                      + (f" of {arguments.container}" if arguments.container else "")
                      + (f", but pages of {', '.join(aliases)}" if aliases else ""))
    return 0


def paint(painter: Painter, figures: Figures, table: Table | None, arguments: argparse.Namespace,
          several: bool) -> None:
    """Show one table."""
    if arguments.json:
        painter.line(as_json(figures, table, None if several else 2))
        return
    assert table is not None
    lines = table.lines(figures, screen_width()) or ["the page has no metrics for this table"]
    if several:
        page = figures.page
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(page.at))
        lines = [clipped(f"{page.alias}  {when}", screen_width()), "", *lines]
    painter.lines(lines)


# --- recordings -----------------------------------------------------------------------------------

# A recording is a sequence of pages, each preceded by a line with its time, container and length.
# In a .gz file each page is a gzip member of its own, so that pages can be appended and a truncated
# recording is valid up to the cut.
LONGEST_PAUSE = 60.0            # seconds; --replay shortens longer gaps of the recording to this
HEAD = re.compile(rb"# cmon page at=([0-9]{1,12}(?:\.[0-9]{1,6})?) uuid=(" + UUID.pattern.encode()
                  + rb") alias=(\S{1,1500}) bytes=([0-9]{1,9})\n")
LONGEST_HEAD = 2000


class Recorder:
    """Appends pages to a file, after removing the partial page that an interruption left."""

    def __init__(self, path: str) -> None:
        self.path, self.packed = path, path.endswith(".gz")
        try:
            self._file = open(path, "a+b")
            size = self._complete()
            self._file.truncate(size)
            self._file.seek(size)
        except OSError as error:
            raise Failure(f"cannot record to {path}: {words_of(error)}") from None
        except Failure as failure:
            raise Failure(f"will not append to {path}: {failure}") from None

    def _complete(self) -> int:
        """Bytes of the complete pages; Failure if anything but a partial page follows them."""
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
            raise Failure("it is not a recording")
        return end

    def add(self, page: Page) -> None:
        """Append one page and flush it; raises Failure."""
        record = recorded_page(page)
        try:
            self._file.write(gzip.compress(record) if self.packed else record)
            self._file.flush()
        except OSError as error:        # the next recording removes the partial page
            raise Failure(f"cannot record to {self.path}: {words_of(error)}") from None

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):      # `add` has reported it
            self._file.close()


def recorded_page(page: Page) -> bytes:
    """A page as it is stored in a recording."""
    return (f"# cmon page at={page.at:.3f} uuid={page.uuid} alias={urllib.parse.quote(page.alias)} "
            f"bytes={len(page.body)}\n").encode() + page.body


def whole_members(file: IO[bytes]) -> int:
    """The offset at which the last complete member of a gzip file ends."""
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
    """The pages of a recording, up to the first that is incomplete or invalid."""
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
    """The pages of a recording; Failure if the file cannot be read."""
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            yield from recorded(file)
    except OSError as error:
        raise Failure(f"cannot read {path}: {words_of(error)}") from None


def replayed_pages(arguments: argparse.Namespace) -> Iterator[Scrape]:
    """The pages of --replay: with --watch SECONDS at this interval, with --watch alone at the
    recording's own pace times --speed, otherwise without pauses."""
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
OFF_SCREEN = 4                  # rounds between scrapes of a container that is off the screen
QUOTA_SHARE = 0.5               # of the account's quota; the rest is for its other clients
READINGS = 60                   # kept for a sparkline
LEAST_DRAW = 0.2                # seconds between redraws, except after a key
LEAST_SPARK = 8                 # columns; a narrower sparkline is left out
SPARKS = "▁▂▃▄▅▆▇█"
PLAIN_SPARKS = "_.:-=+*#"       # for encodings without these characters
FAST = ("cpucap", "memcap", "link", "zone_vfs", "zone_misc")    # collectors of the columns
KEYS = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|\x1bO[A-Za-z]|.", re.S)
KEY_NAMES = {"\x1b[A": "up", "\x1bOA": "up", "k": "up", "\x1b[B": "down", "\x1bOB": "down",
             "j": "down", "\x1b[5~": "page up", "\x1b[6~": "page down", "\x1b[D": "<",
             "\x1bOD": "<", "\x1b[C": ">", "\x1bOC": ">", "\r": "enter", "\n": "enter",
             "u": "enter", "\x1b": "escape", "\x7f": "backspace", "\b": "backspace"}
TOP_HELP = ("q quit  < > sort  r reverse  / filter  space pause  enter USE",
            "q quit <> sort r / filter space enter")        # if that is too wide
DETAIL_HELP = ("q back  arrows, page up, page down scroll  space pause",
               "q back  j k scroll  space")
FILTER_HELP = ("enter keeps the filter  escape clears it", "enter keep  escape clear")


class TopColumn(NamedTuple):
    """A column of top: its title, its unit, and its value from a page."""
    title: str
    unit: str
    value: Callable[[Figures], Number | None]


def total(*texts: str) -> Callable[[Figures], Number | None]:
    """The sum of all samples of these expressions; None if there are none."""
    def value(figures: Figures) -> Number | None:
        values = [sample for text in texts
                  for sample in Expression.of_text(text).of(figures).values()]
        return sum(values) if values else None
    return value


def cpus_used(figures: Figures) -> Number | None:
    """CPUs in use: from the usage that the cap counts, as CPU% is; without a cap, from the
    counters."""
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
# Dropped in this order on a narrow screen, except the sort column, so `>` shows each in turn.
TOP_DROP = ("CPU", "MEM", "AGE", "DISK", "NET", "MEM%", "WORST")


class Row:
    """One container in top."""

    def __init__(self, uuid: str) -> None:
        self.uuid = self.alias = uuid
        self.state = "running"
        self.figures: Figures | None = None
        self.failure = ""
        self.requested = -math.inf          # when its page was last requested, monotonic
        self.pending = False                # a request is in flight
        self.values: dict[str, Number | None] = {}
        self.worst: tuple[int, str] = (-1, "")      # verdict and resource
        self.history: collections.deque[float] = collections.deque(maxlen=READINGS)

    def take(self, answer: Scrape) -> None:
        """Take a page, or the Failure to get it."""
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
                          if cell.verdict is not None),
                         key=lambda verdict: verdict[0], default=(-1, ""))
        used = self.values["CPU%"] if self.values["CPU%"] is not None else self.values["CPU"]
        self.history.append(quotient(used or 0, 1))

    def age(self, now: float) -> float | None:
        """Seconds since the agent read the values that are shown."""
        if self.figures is None:
            return None
        ages = [age for collector, age in self.figures.ages.items() if collector in FAST]
        return max(now - self.figures.page.at + max(map(float, ages), default=0.0), 0.0)

    def state_words(self) -> str:
        """The cell of column WORST."""
        if self.state != "running":
            return self.state
        if self.failure:
            return "no answer"
        verdict, resource = self.worst
        return "-" if verdict < 0 else "ok" if verdict == OK else resource

    def rank(self, title: str, now: float) -> tuple[bool, Any]:
        """The sort key of a column; rows without a value come last."""
        if title == "NAME":
            return False, self.alias
        value = (self.worst[0] + 4 * bool(self.failure)) if title == "WORST" else \
            self.age(now) if title == "AGE" else self.values.get(title)
        return value is None, -quotient(value or 0, 1)

    def spark(self, width: int, letters: str) -> str:
        """CPU over time; full height is the cap or, without one, the highest value so far."""
        usage = list(self.history)[-width:]
        full = 1.0 if self.values.get("CPU%") is not None else max(usage, default=0.0)
        return "".join(letters[min(max(int(value / full * len(letters)), 0), len(letters) - 1)]
                       if full > 0 and math.isfinite(value) else letters[0] for value in usage)


class Top:
    """The state of top and its screen; does no input or output."""

    def __init__(self, sort: str = "CPU%", interval: float = TOP_SECONDS) -> None:
        self.sort, self.interval = sort, interval
        self.rows: dict[str, Row] = {}
        self.reverse = self.paused = self.typing = self.ended = False
        self.filter = ""
        self.selected = ""                  # a UUID
        self.moved = False                  # by the user; until then the first row is selected
        self.detail = False                 # show its USE table instead of all containers
        self.first = 0                      # row or line at the top of the screen
        self.failure = ""                   # why the last round failed
        self.behind = ""                    # why rounds fall behind
        self.quota: Number | None = None    # requests a minute
        self._shown: list[Row] = []         # on the screen when it was last drawn

    # data

    def take_fleet(self, figures: Figures) -> None:
        """Take the account's containers and quota from the fleet page."""
        rows: dict[str, Row] = {}
        for labels in figures.values.get("cmon_instance_info", {}):
            uuid, alias = dict(labels).get("instance", ""), dict(labels).get("alias", "")
            row = rows[uuid] = self.rows.get(uuid) or Row(uuid)
            row.alias = printable(alias) or uuid
        for labels, value in figures.values.get("cmon_instance_state", {}).items():
            if value == 1 and dict(labels).get("instance") in rows:
                rows[dict(labels)["instance"]].state = printable(dict(labels).get("state", "-"))
        self.rows = rows
        self.quota = one_value(figures, "cmon_quota_limit")
        limited = one_value(figures, "cmon_quota_limited")
        self.failure = "over the account's quota: metrics may be old" if limited else ""

    def take_page(self, answer: Scrape, uuid: str) -> None:
        """Take a container's page, or the Failure to get it."""
        row = self.rows.get(uuid)
        if row is not None:
            row.take(answer)

    def due(self, now: float) -> list[Row]:
        """The rows to scrape in this round: all on the screen and an equal part of the others,
        oldest first, as far as QUOTA_SHARE allows. Marks them pending."""
        shown = {row.uuid for row in self._shown}
        running = [row for row in self.rows.values() if row.state == "running"]
        waiting = [row for row in running if row.pending]
        patience = (OFF_SCREEN - 0.5) * self.interval
        wanted = sorted((row for row in running if not row.pending and (
            not shown or row.uuid in shown or now - row.requested >= patience)),
            key=lambda row: (row.uuid not in shown, row.requested))
        most = len(wanted)
        self.behind = ""
        if self.quota is not None:
            most = max(int(self.quota * QUOTA_SHARE * self.interval / 60) - 1, 1)
        if waiting:
            self.behind = f"falling behind: {len(waiting)} pages of the last round are missing"
        elif most < len(wanted):
            self.behind = (f"falling behind: {most} of {len(wanted)} pages a round, to use at most "
                           f"half of the quota of {brief(self.quota or 0)} requests a minute")
        for row in wanted[:most]:
            row.requested, row.pending = now, True
        return wanted[:most]

    # keys

    def visible(self, now: float) -> list[Row]:
        """The rows that match the filter, sorted."""
        text = self.filter.lower()
        rows = sorted((row for row in self.rows.values() if text in row.alias.lower()
                       or row.uuid.startswith(text)), key=lambda row: (row.alias, row.uuid))
        rows.sort(key=lambda row: row.rank(self.sort, now)[1], reverse=self.reverse)
        return sorted(rows, key=lambda row: row.rank(self.sort, now)[0])

    def keys(self, text: str, now: float, height: int) -> None:
        """Handle typed keys."""
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

    # screen

    def table(self, rows: Sequence[Row], width: int, now: float, marked: bool = False
              ) -> list[str]:
        """Rows with a header; the sparkline takes the remaining width. `marked`: mark the sort
        column."""
        longest = max(10, min(40, width // 5))
        cells = [[clipped(row.alias, longest),
                  *(amount(row.values.get(column.title), column.unit) for column in TOP_COLUMNS),
                  row.state_words(), seconds_words(row.age(now))] for row in rows]
        mark = sparks()[1][self.reverse] if marked else ""
        titles = [title + mark * (title == self.sort) for title in TOP_TITLES]
        drop = [titles[TOP_TITLES.index(title)] for title in TOP_DROP if title != self.sort]
        blank = [["-"] * len(titles)]
        for room, columns in ((width - 4 - LEAST_SPARK, drop[:2]), (width - 2, drop)):
            lines = fitted(titles, cells or blank, room, columns, plain=True)
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
        selected = f"{len(visible)} of " if self.filter else ""
        when = time.strftime("%H:%M:%S", time.localtime(now))
        title = (f"cmon top  {'PAUSED  ' * self.paused}{when}  {selected}"
                 f"{plural(len(self.rows), 'container')}  every {self.interval:g} s")
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
    """Characters for sparklines and for the sort order, as far as stdout's encoding has them."""
    try:
        SPARKS.encode(sys.stdout.encoding or "ascii")
        return SPARKS, "▼▲"
    except (UnicodeEncodeError, LookupError):
        return PLAIN_SPARKS, "v^"


class Poller:
    """Sends requests in the background, AT_ONCE at a time; puts results into `answers` and calls
    `wake`."""

    def __init__(self, proxy: Proxy, groups: str, wake: Callable[[], None]) -> None:
        self._proxy, self._groups, self._wake = proxy, groups, wake
        self._jobs: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[tuple[Row | None, Scrape]] = queue.SimpleQueue()
        for _ in range(AT_ONCE):        # daemon threads: a hanging request must not block exit
            threading.Thread(target=self._work, daemon=True).start()

    def ask(self, row: Row | None) -> None:
        """Request a container's page or, with None, the fleet page."""
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
    """Updates a Top: once a round the fleet page, then the pages that are due."""

    def __init__(self, top: Top, poller: Poller) -> None:
        self.top, self.poller = top, poller
        self.next = -math.inf               # monotonic; start of the next round
        self._fleet = False                 # the fleet page is in flight

    def work(self, now: float) -> None:
        """Take the answers that have arrived; start the next round when it is due."""
        while not self.poller.answers.empty():
            row, answer = self.poller.answers.get()
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
                self.poller.ask(due)
        if now >= self.next and not self._fleet and not self.top.paused:
            self.next = now + self.top.interval
            self._fleet = True
            self.poller.ask(None)


class Terminal:
    """The user's terminal while top runs: alternate screen, single keys; always restored.

    Signals and threads wake the loop through a pipe, with a signal's number or 0.
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
            signal.signal(number, signal.SIG_IGN)       # nothing may interrupt this
        self.give_back()

    def take(self) -> None:
        """Switch to the alternate screen, without echo and without a cursor."""
        tty.setcbreak(self._keys)
        self._write("\x1b[?1049h\x1b[?25l")

    def give_back(self) -> None:
        """Restore the terminal, if it still exists."""
        try:
            self._write("\x1b[?25h\x1b[?1049l")
            termios.tcsetattr(self._keys, termios.TCSADRAIN, self._saved)
        except (OSError, termios.error):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def wake(self) -> None:
        """Wake the loop, from any thread."""
        with contextlib.suppress(OSError):      # a full pipe wakes it too
            os.write(self._wake, b"\0")

    def draw(self, lines: Sequence[str]) -> None:
        """Write a whole screen at once."""
        self._write("\x1b[H" + "\x1b[K\n".join(lines) + "\x1b[K\x1b[J")

    def wait(self, seconds: float) -> str | None:
        """Wait up to `seconds` for keys; returns them, "" for none, None to quit."""
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
        raise Usage("--speed requires --replay")
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
    """Work, draw and wait, until the user quits or the terminal is gone."""
    drawn, pressed = -math.inf, ""
    try:
        while not state.ended:
            now = time.monotonic()
            work(now)
            if pressed or now - drawn >= LEAST_DRAW:    # not for every page
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
    """Print one table, from two scrapes of each container."""
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
    """Print the table of all containers; problems go to stderr."""
    rows = state.visible(now)
    lines = state.table(rows, screen_width() + 2, now)
    print("\n".join([emphasis(lines[0]), *lines[1:]]))
    for row in rows:
        if row.failure and row.state == "running":
            print(f"cmon: {row.alias}: {row.failure}", file=sys.stderr)
    if state.failure:
        print(f"cmon: {state.failure}", file=sys.stderr)
    elif not rows:
        print("cmon: no containers to show", file=sys.stderr)
    return 0


def top_replayed(state: Top, arguments: argparse.Namespace, live: bool) -> int:
    """Replay a recording at its own pace times --speed or, without a terminal, at once."""
    pages = recording(arguments.replay)
    last = next(pages, None)
    if last is None:
        raise Failure(f"{arguments.replay} contains no complete page")
    began, first, shown = time.monotonic(), last.at, last.at
    waiting: Page | None = last

    def work(now: float) -> None:
        nonlocal waiting, shown, began
        if state.paused:                        # to continue from here
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
GRAVITY = (OK, UNKNOWN, WARNING, CRITICAL)      # ascending; the gravest finding counts
UOMS = {"bytes": "B", "seconds": "s", "milliseconds": "ms", "percent": "%"}
AT_ONCE = 8                     # concurrent requests for pages
LONGEST_OUTPUT = 8000           # characters; Nagios takes 8192
MOST_PROBLEMS = 5               # in the text; exit status and performance data cover all
OLDEST_FIGURES = 300.0          # seconds; older is UNKNOWN, except for what is read less often
COLLECTORS_UP = "cmon_collector_up,1:"
RESPONSE = "response_seconds"           # added to the metrics of the fleet page
DAYS_LEFT = "certificate_days_left"
DAYS_LEFT_LIMITS = f"{DAYS_LEFT},30:,7:"


class Finding(NamedTuple):
    """The result for one sample, or for a missing one; no words if another finding reports it."""
    status: int
    words: str
    perfdata: str = ""


def check(arguments: argparse.Namespace) -> int:
    """`cmon.py check`: one line, with the exit status of a plugin."""
    try:
        findings = check_findings(arguments)
    except (Failure, OSError, KeyboardInterrupt) as error:
        findings = [Finding(UNKNOWN, str(error) or type(error).__name__)]
    except Exception as error:  # Python's exit status for a traceback is 1, which is WARNING here
        findings = [Finding(UNKNOWN, f"internal error: {error!r}")]
    return report(findings)


def report(findings: Sequence[Finding]) -> int:
    """Print the line of a plugin; returns its exit status, UNKNOWN if the line is lost."""
    status = max((finding.status for finding in findings), key=GRAVITY.index)
    reported = sorted((finding for finding in findings if finding.status != OK) if status != OK
                      else findings, key=lambda finding: -GRAVITY.index(finding.status))
    words = [printable(finding.words) for finding in reported if finding.words]
    if len(words) > MOST_PROBLEMS:
        words[MOST_PROBLEMS:] = [f"and {len(words) - MOST_PROBLEMS} more"]
    line = f"CMON {STATUS_WORDS[status]}: " + ", ".join(words).replace("|", "/")
    line = clipped(line, LONGEST_OUTPUT // 4)
    data = ""
    for finding in findings:
        if len(line) + len(data) + len(finding.perfdata) + 4 <= LONGEST_OUTPUT:
            data += f" {finding.perfdata}" if finding.perfdata else ""

    def show() -> int:
        print(line + (f" |{data}" if data else ""))
        return status
    return printing("cmon", show, unread=UNKNOWN, failed=UNKNOWN)


def check_findings(arguments: argparse.Namespace) -> list[Finding]:
    """Scrape what the flags select and apply the thresholds; raises Failure."""
    positional = list(arguments.words)
    selected = arguments.all or arguments.groups or arguments.proxy or arguments.certificate
    name = "" if selected else (positional.pop(0) if positional else "")
    if not selected and not name:
        raise Usage("nothing to check: give NAME, --all, --groups, --proxy or --certificate")
    default = RESPONSE if arguments.proxy else DAYS_LEFT_LIMITS if arguments.certificate \
        else COLLECTORS_UP
    thresholds = [Threshold.of_text(text) for text in positional or [default]]
    proxy = proxy_of(arguments)
    state = RateState(arguments, thresholds)
    if arguments.proxy or arguments.certificate:
        findings = check_page(state.figures(fleet_page(proxy)), thresholds, "")
        state.save()
        return findings
    chosen = [proxy.find(name)] if name else proxy.containers(arguments.groups)[1]
    surplus = set() if name else {container.alias for container in chosen} & set(positional)
    if surplus:
        raise Usage(f"{min(surplus)} is a container: with --all or --groups, say only what to check"
                    )
    running = [container for container in chosen if name or container.state == "running"]
    if not running:
        raise Failure("no running containers" + (
            f" in {arguments.groups}" if arguments.groups else ""))
    findings = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for container, page in zip(running, pool.map(functools.partial(scraped, proxy), running)):
            who = "" if name else container.alias
            if isinstance(page, Failure):
                findings.append(Finding(UNKNOWN, f"{who}: {page}" if who else str(page)))
                continue
            try:
                findings += check_page(state.figures(page), thresholds, who)
            except Failure as failure:      # not a valid page
                findings.append(Finding(UNKNOWN, str(failure)))
    state.save()
    if not name and all(finding.status == OK for finding in findings):
        findings.insert(0, Finding(OK, plural(len(running), "container")))
    return findings


def plural(quantity: int, noun: str) -> str:
    """1 page, 2 pages."""
    return f"{quantity} {noun}" + "s" * (quantity != 1)


def scraped(proxy: Proxy, container: Container) -> Scrape:
    """Scrape a page; a Failure is returned, not raised."""
    try:
        body = proxy.scrape(container.uuid)
        return Page(time.time(), container.uuid, container.alias, body)
    except Failure as failure:
        return failure


def fleet_page(proxy: Proxy) -> Page:
    """The fleet page, with the response time and the days until the certificate expires."""
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
    """Apply the thresholds to a page: a finding for each sample, or for a missing one. `who` begins
    each text."""
    findings: list[Finding] = []
    for threshold in thresholds:
        expression, warning, critical = threshold
        values = expression.of(figures)
        why = too_old(expression, figures)
        if not values or why:
            why = why or missing(expression, figures)
            findings.append(Finding(UNKNOWN, f"{who}: {why}" if who else why))
            continue
        names = telling(list(values))
        for labels, value in values.items():
            name = " ".join((*([who] if who else []), expression.text,
                             *(text for label, text in labels if label in names)))
            status = threshold.status(value)
            violated = critical if status == CRITICAL else warning
            words = f"{name} is {amount(value, unit_of(expression))}"
            if status != OK and violated is not None:
                words += f" ({violated.words()})"
            label = printable(name).translate(PERFDATA_LABEL)
            findings.append(Finding(status, words, f"'{label}'={number(value)}"
                                    f"{uom(expression, figures)};"
                                    f"{warning.text if warning else ''};"
                                    f"{critical.text if critical else ''}"))
        if len(values) > 1 and all(threshold.status(value) == OK for value in values.values()):
            first = len(findings) - len(values)
            least, most = (amount(value, unit_of(expression))
                           for value in (min(values.values()), max(values.values())))
            words = " ".join((*([who] if who else []), expression.text, "is", least,
                              *([] if least == most else ["to", most]),
                              f"({len(values)} samples)"))
            findings[first:] = [finding._replace(words="") for finding in findings[first:]]
            findings[first] = findings[first]._replace(words=words)
    return findings


def telling(series: Sequence[Labels]) -> set[str]:
    """The labels that distinguish samples: a single one if it suffices, else all that differ."""
    if len(series) < 2:
        return set()
    names = {name for labels in series for name, _ in labels}
    values = {name: {dict(labels).get(name) for labels in series} for name in names}
    unique = sorted(name for name in names if len(values[name]) == len(series))
    return set(unique[:1]) or {name for name in names if len(values[name]) > 1}


# In performance data a label is in single quotes and must not contain an equals sign.
PERFDATA_LABEL = {ord("'"): None, ord('"'): None, ord("="): ":", ord("|"): "/"}


def unit_of(expression: Expression) -> str:
    """The unit of a value in the text."""
    return {RESPONSE: "seconds", DAYS_LEFT: "days"}.get(expression.text, expression.unit())


def uom(expression: Expression, figures: Figures) -> str:
    """The unit of measurement in performance data; the guidelines have none for a rate."""
    if expression.under is None and not expression.over.rate \
            and figures.kinds.get(expression.over.name) == COUNTER:
        return "c"
    return UOMS.get(unit_of(expression), "")


def too_old(expression: Expression, figures: Figures) -> str:
    """Why the figures are too old to judge, or "": an account over its quota gets old copies."""
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
                return f"{part.name} is a gauge: rate() needs a counter"
            return f"{expression.text} " + (
                "has not been read again since the last run: wait for the next run"
                if figures.compared else "needs an earlier reading: wait for the next run")
        near = [] if part.name in figures.values else difflib.get_close_matches(
            part.name, figures.values, 1, 0.8)
        return "no sample of " + (expression.text if part is expression.over and
                                  expression.under is None else part.name) + (
            f"; did you mean {near[0]}?" if near else "")
    return f"{expression.text} has no value: B is zero or has no sample with the same labels"


class RateState:
    """The last two readings of the counters in rate(), kept in a file: a recording of only these
    metrics. Two, because a run may see the same reading as the last run."""

    def __init__(self, arguments: argparse.Namespace, thresholds: Sequence[Threshold]) -> None:
        self._names = {part.name for threshold in thresholds
                       for part in (threshold.expression.over, threshold.expression.under)
                       if part is not None and part.rate}
        self._pages: dict[str, list[Page]] = {}     # by container
        self._kept: list[Page] = []
        if not self._names:
            return
        # Each check has its own file, because checks run at different intervals.
        check_id = "\0".join((arguments.url, arguments.cert, str(arguments.all), arguments.groups,
                              str(arguments.proxy), str(arguments.certificate), *arguments.words))
        self._path = cache_folder(arguments.state) / (
            "check-" + hashlib.sha256(check_id.encode()).hexdigest()[:20])
        if self._path.exists():
            for page in recording(str(self._path)):
                self._pages.setdefault(page.uuid, []).append(page)

    def figures(self, page: Page) -> Figures:
        """The figures of a page, with the rates that the thresholds need."""
        if not self._names:
            return Figures(page)
        last: Figures | None = None
        known = self._pages.get(page.uuid or NO_UUID, [])[-2:]
        try:
            for earlier in known:
                last = Figures(earlier, last)
        except Failure:                     # the file is damaged: start over
            last, known = None, []
        figures = Figures(page, last)
        collectors = {figures.collector(name) for name in self._names}
        if last is None or any(figures.taken[collector] > last.taken.get(collector, -math.inf)
                               for collector in collectors):
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


NO_UUID = "00000000-0000-0000-0000-000000000000"       # stands for the fleet page in recordings


def cache_folder(chosen: str) -> Path:
    """The folder for readings, created if missing; raises Failure."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(chosen) if chosen else (
            Path(base) if base.startswith("/") else Path.home() / ".cache") / "cmon"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        words = words_of(error) if isinstance(error, OSError) else str(error)
        raise Failure(f"rate() needs a folder for its readings: {words}; "
                      "use --state DIR") from None
    return folder


def write_whole(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file, whole or not at all; raises Failure."""
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
        raise Usage("--every requires --file-sd FILE")
    if arguments.suffix and not (arguments.hosts or arguments.zone):
        raise Usage("--suffix requires --hosts or --zone")
    proxy = proxy_of(arguments)
    if arguments.file_sd:
        return keep_file_sd(proxy, arguments)
    suffix = suffix_of(arguments, proxy.url) if arguments.hosts or arguments.zone else ""
    discovered, containers = proxy.containers(arguments.groups)
    if arguments.json:
        print(json.dumps(discovered, indent=2, ensure_ascii=False))
    elif not containers:
        print("cmon: no containers" + (f" in {arguments.groups}" if arguments.groups else
                                       ": this account has no running containers"), file=sys.stderr)
    elif suffix:
        host = urllib.parse.urlsplit(proxy.url).hostname or ""
        print("\n".join(name_lines(containers, host, suffix, arguments.hosts or "")))
    else:
        print("\n".join(container_table(containers, screen_width())))
    return 0


def suffix_of(arguments: argparse.Namespace, url: str) -> str:
    """The suffix of the containers' host names: --suffix, or the host name of the URL; raises
    Usage."""
    suffix = arguments.suffix or urllib.parse.urlsplit(url).hostname or ""
    if is_address(suffix):
        raise Usage(f"host names cannot end in the address {suffix}: use --suffix NAME")
    if not re.fullmatch(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*", suffix):
        raise Usage(f"{suffix!r} is not a host name, such as cmon.dc.example: use --suffix NAME")
    return suffix


def name_lines(containers: Sequence[Container], host: str, suffix: str,
               address: str) -> Iterator[str]:
    """The containers' host names, for sites without wildcard DNS: lines of /etc/hosts with this
    address or, without one, records for a zone file."""
    for container in containers:
        if not UUID.fullmatch(container.uuid):
            raise Failure(f"the proxy lists a container with an invalid UUID: {container.uuid!r}")
        name = f"{container.uuid}.{suffix}"
        if address:
            yield f"{address}\t{name}\t# {container.alias}"
        elif is_address(host):
            kind = "AAAA" if ":" in host else "A"
            yield f"{name}.\t60\tIN\t{kind}\t{host}\t; {container.alias}"
        else:
            yield f"{name}.\t60\tIN\tCNAME\t{host}.\t; {container.alias}"


def is_address(text: str) -> bool:
    """Whether the text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def keep_file_sd(proxy: Proxy, arguments: argparse.Namespace) -> int:
    """`--file-sd FILE`: write the file once or repeatedly. A failure leaves it unchanged."""
    path = Path(arguments.file_sd)
    while True:
        try:
            write_file_sd(path, proxy.page("/v1/sd" + groups_query(arguments.groups)))
        except Failure as failure:
            if not arguments.every:
                raise
            print(f"cmon: {failure}; {path} is unchanged", file=sys.stderr, flush=True)
        if not arguments.every:
            return 0
        time.sleep(arguments.every)


def write_file_sd(path: Path, body: bytes) -> None:
    """Write targets for Prometheus' file_sd_configs, whole or not at all; raises Failure."""
    try:
        groups = json.loads(body)
        good = isinstance(groups, list) and all(
            all(isinstance(text, str) for text in (*group["targets"], *group["labels"],
                                                   *group["labels"].values())) for group in groups)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise Failure("the proxy's answer to /v1/sd is not a list of targets")
    content = (json.dumps(groups, indent=1, ensure_ascii=False) + "\n").encode()
    try:
        if read_file(path, MAX_JSON_BYTES) == content:
            return                          # a rewrite would make Prometheus reload it
    except FileNotFoundError:
        pass
    except OSError as error:                # a folder or a device must not be replaced
        raise Failure(f"cannot write {path}: {words_of(error)}") from None
    write_whole(path, content, 0o644)       # Prometheus may run as another user
    if not groups:
        print(f"cmon: no running containers: {path} has no targets", file=sys.stderr, flush=True)


# --- certificates ---------------------------------------------------------------------------------

LOGIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,63}")    # in file names, too; X.509 allows 64
DAYS = 3650                 # as in `triton profile cmon-certgen`
BACKDATED_SECONDS = 300     # the original proxy does not allow for clock skew
RENEW_DAYS = 30             # --renew keeps a certificate that lasts longer; as in the alert
AGENT_SECONDS = 120.0       # ssh-agent may ask its user to confirm
AGENT_MESSAGE = 262_144     # bytes; ssh-agent's own limit
ANOTHER_KEY = "make one with `ssh-keygen -t ecdsa`, add it to the account, and use it here"
WRONG_KIND = "is of type {kind}, but certificates need an RSA or ECDSA key: " + ANOTHER_KEY


class SshAgent:
    """A client of the user's ssh-agent (draft-miller-ssh-agent)."""
    IDENTITIES, SIGN, SHA256 = 11, 13, 2        # requests, and the flag for RSA with SHA-256
    ANSWERS = {IDENTITIES: 12, SIGN: 14}

    def __init__(self, path: str) -> None:
        self.path = path

    def keys(self) -> list[tuple[Any, str]]:
        """The public keys of supported types, each with its comment; raises Failure."""
        from cmon_proxy import CertificateError, public_key
        rest = self._ask(self.IDENTITIES, b"")
        count, = struct.unpack(">I", rest[:4])
        fields = self._fields(rest[4:])
        if len(fields) != 2 * count:
            raise Failure("ssh-agent's answer is not a list of keys")
        keys = []
        for blob, comment in zip(fields[::2], fields[1::2]):
            kind = b"".join(self._fields(blob)[:1]).decode("ascii", "replace")
            try:
                key = public_key(f"{kind} {base64.b64encode(blob).decode()}")
            except CertificateError:            # of a security token, or an SSH certificate
                continue
            keys.append((key, printable(comment.decode("utf-8", "replace"))))
        return keys

    def sign(self, blob: bytes, message: bytes) -> bytes:
        """Sign the message with the key `blob`; returns an SSH signature."""
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
            raise Failure("ssh-agent refused" + (
                " to sign: check with `ssh-add -l` whether it is locked" if kind == self.SIGN
                else " to list its keys"))
        return answer[1:]

    @staticmethod
    def _fields(content: bytes) -> list[bytes]:
        fields = []
        while content:
            length = int.from_bytes(content[:4], "big")
            if len(content) < 4 + length:
                raise Failure("ssh-agent's answer is truncated")
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
        raise Failure(f"{taken[0]} exists: use --renew to replace it when it is about to expire, "
                      "or --force to replace it now")
    try:
        cert, key, signer = make_credentials(arguments)
    except (CertificateError, OSError) as error:
        raise Failure(f"cannot make a certificate: {error}") from None
    write_both(list(zip(paths, (cert, key))), replace=bool(taken))
    made = certificate(first_certificate(cert.decode()))
    print(f"wrote {paths[0]} and {paths[1]}, valid until {utc(made.not_after)}; "
          f"make sure that the account has the key {signer.sha256}")
    return 0


def make_credentials(arguments: argparse.Namespace) -> tuple[bytes, bytes, Any]:
    """A certificate and its key (PEM), and the public key of the signer."""
    from cmon_proxy import (
        CLIENT_PURPOSE, CMON_PURPOSE, SERVER_PURPOSE, Signer, make_certificate, make_key,
        private_key)
    login, now = arguments.account, time.time()
    dates = {"not_before": now - BACKDATED_SECONDS, "not_after": now + arguments.days * 86400}
    if arguments.agent:
        if arguments.old_style:
            raise Usage("--old-style needs the SSH key itself, which ssh-agent does not give out: "
                        "use --ssh-key FILE without --agent")
        agent = SshAgent(os.environ.get("SSH_AUTH_SOCK", ""))
        signer = agent_key(agent, arguments.ssh_key)
        holder: Any = Signer(signer, lambda message: agent.sign(signer.blob, message))
    elif not arguments.ssh_key:
        raise Usage("no SSH key given: use --ssh-key FILE, or --agent for a key of ssh-agent")
    else:
        holder = account_key(Path(arguments.ssh_key))
        signer = private_key(holder)
    if arguments.old_style:
        return make_certificate(holder, login, **dates), holder, signer
    key = make_key()
    digest = base64.b64encode(bytes.fromhex(signer.md5.replace(":", "")))
    # As the original's certgen writes it, serverAuth included.
    cert = make_certificate(
        key, login, issuer="MD5:" + digest.decode().rstrip("="), signing_key=holder, serial=1,
        names=[login], purposes=[CLIENT_PURPOSE, SERVER_PURPOSE, CMON_PURPOSE], **dates)
    return cert, key, signer


def agent_key(agent: SshAgent, wanted: str) -> Any:
    """ssh-agent's key that a file or fingerprint names; without either, its only key."""
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
        except Failure:                 # OpenSSH's format contains the public key as well
            tool = shutil.which("ssh-keygen")
            done = tool and subprocess.run([tool, "-l", "-f", wanted], stdin=subprocess.DEVNULL,
                                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                           check=False)
            match = done and re.search(r"SHA256:\S+", done.stdout.decode("utf-8", "replace"))
            if not match:
                raise
            fingerprint = match.group(0)
    matches = [key for key, _ in keys if fingerprint in (key.sha256, "MD5:" + key.md5)
               or not fingerprint and key.kind != "ssh-ed25519"]
    if not matches:
        raise Failure(f"ssh-agent has no {'key ' + fingerprint if wanted else 'RSA or ECDSA key'}: "
                      "list its keys with `ssh-add -l`, add one with `ssh-add FILE`")
    if len(matches) > 1:
        raise Failure("ssh-agent has several keys: choose one with --ssh-key, "
                      + " or ".join(key.sha256 for key in matches[:8]))
    check_signing_key(f"the key {matches[0].sha256}", matches[0])
    return matches[0]


def check_signing_key(what: str, key: Any) -> None:
    """Raise Failure for a key that certificates cannot use or proxies refuse."""
    from cmon_proxy import RSA_BITS
    if key.kind == "ssh-ed25519":
        raise Failure(f"{what} " + WRONG_KIND.format(kind="Ed25519"))
    if key.kind == "ssh-rsa" and key.bits < RSA_BITS:
        raise Failure(f"{what} is an RSA key of {key.bits} bits, which is too short: {ANOTHER_KEY}")


def account_key(path: Path) -> bytes:
    """The private key in a file, as PEM without a passphrase; asks for the passphrase."""
    from cmon_proxy import CertificateError, plain_key, private_key
    pem = read_text(path, "SSH key").encode()
    if b"-----BEGIN OPENSSH PRIVATE KEY-----" in pem:
        pem = openssh_key(path, pem)
    elif b"PRIVATE KEY-----" not in pem:
        raise Failure(f"{path} is not a private key; " + (
            "it is a public key: use the file without .pub" if pem.startswith((b"ssh-", b"ecdsa-"))
            else "use a key in OpenSSH's format or PEM"))
    secret = b"ENCRYPTED" in pem
    try:
        pem = plain_key(pem, ask_passphrase(f"the key {path}").encode() if secret else b"")
    except CertificateError as error:
        raise Failure(f"wrong passphrase for {path}" if secret
                      else f"{path} cannot be read: {error}") from None
    check_signing_key(str(path), private_key(pem))
    return pem


def openssh_key(path: Path, content: bytes) -> bytes:
    """Convert a private key from OpenSSH's format to PEM; ssh-keygen asks for its passphrase."""
    tool = shutil.which("ssh-keygen")
    if tool is None:
        raise Failure(f"{path} is in OpenSSH's format, and ssh-keygen, which reads it, is not "
                      "installed: install OpenSSH's client, or use a key in PEM form")
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
            # let ssh-keygen ask: as an argument, the passphrase would be visible to all users
            if not run(*to_pem, stdin=None)[0]:
                raise Failure(f"wrong passphrase for {path}")
        return copied.read_bytes()


def write_both(files: Sequence[tuple[Path, bytes]], replace: bool) -> None:
    """Write all of the files, with mode 600, or none; replace existing ones only with `replace`."""
    written: list[tuple[Path, Path | None]] = []    # each with a link to the file it replaced
    try:
        folder = files[0][0].parent
        if folder.exists() and not folder.is_dir():
            raise Failure(f"cannot write to {folder}: it is not a folder")
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
                        os.link(Path(work) / path.name, path)   # fails if the file exists
                    written.append((path, old))
            except OSError:
                for path, old in written:
                    if old is not None and os.path.lexists(old):
                        os.replace(old, path)
                    else:
                        path.unlink()
                raise
    except OSError as error:
        raise Failure(f"cannot write {files[0][0]} and {files[-1][0]}: {words_of(error)}"
                      ) from None


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can ever read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_text(path: Path, what: str) -> str:
    """Read a small file; a Failure names it."""
    try:
        with path.open("rb") as file:       # also a pipe, as in --ssh-key <(…)
            return file.read(1_000_000).decode("utf-8", "replace")
    except OSError as error:
        raise Failure(f"cannot read the {what} {path}: {words_of(error)}") from None


# --- doctor ---------------------------------------------------------------------------------------

PROMETHEUS_URL = "http://localhost:9090"
CLOCK_SECONDS = 30.0        # more makes metrics look old; certificates allow for 300
OLD_SECONDS = 60.0          # kernel statistics are kept for 8 s
OLD_SLOWLY_SECONDS = 900.0  # for collectors in SLOWLY; `zfs list` runs every 300 s
SLOWLY = ("zfs", "zpool", "ntp", "triton_core")
DOCKER_PURPOSE = "1.3.6.1.4.1.38678.1.4.1"
OVER_QUOTA = ("the account is over its quota: pages are old copies",
              "scrape less often, or ask the operator for a higher quota")


class Broken(Exception):
    """A link is broken: what is wrong, and the step that mends it."""

    def __init__(self, what: str, step: str, link: str = "") -> None:
        super().__init__(what)
        self.step = step
        self.link = link        # the link at fault, if it is a later one


class Skipped(Exception):
    """A link that cannot be checked, and why."""


class Doctor:
    """The chain from the user's files to Prometheus. Each link is a method that returns a short
    result or raises Broken, Skipped or Failure. It may rely on the links before it."""

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
        """The files exist, and only the user can read the key."""
        for what, path in (("certificate", self.arguments.cert), ("key", self.arguments.key),
                           ("CA", self.arguments.ca)):
            if path:
                file_content(path, what)
        mode = os.stat(self.arguments.key).st_mode & 0o777
        if mode & 0o077:
            raise Broken(f"other users can read the key {self.arguments.key} (mode {mode:o})",
                         f"run `chmod 600 {self.arguments.key}`")
        return f"{self.arguments.cert} and {self.arguments.key}"

    def key(self) -> str:
        """The certificate and the key are a pair, and strong enough."""
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
        if weak:                                    # before OpenSSL refuses to load it
            raise Broken(f"the certificate {weak}", f"{CERTGEN}, with another SSH key if this one "
                         "is too short", "signature")
        self.tls = client_context(self.arguments.cert, self.arguments.key, self.arguments.ca)
        return f"fits the certificate, {self.cert.key.kind}"

    def style(self) -> str:
        """The certificate has one of the two styles, or is issued by a CA."""
        from cmon_proxy import CMON_PURPOSE, key_id_of
        cert = self.cert
        if not cert.subject:
            raise Broken("the certificate's subject has no common name", CERTGEN)
        if CMON_PURPOSE in cert.purposes and not cert.self_issued:
            self.new_style = True
            if key_id_of(cert.issuer) is None:
                raise Broken(f"the certificate's issuer {printable(cert.issuer)!r} is not the MD5 "
                             "fingerprint of an SSH key", CERTGEN)
            return f"new style, for {printable(cert.subject)}, issued by {cert.issuer}"
        kind = "old style" if cert.self_issued else f"issued by the CA {printable(cert.issuer)}"
        return f"{kind}, for {printable(cert.subject)}"

    def purpose(self) -> str:
        """The certificate is for clients of this service."""
        from cmon_proxy import CLIENT_PURPOSE
        purposes = self.cert.purposes
        if DOCKER_PURPOSE in purposes and not self.new_style:
            raise Broken("the certificate is for Docker", CERTGEN)
        if purposes and CLIENT_PURPOSE not in purposes:
            raise Broken("the certificate is not for clients (it lacks clientAuth)", CERTGEN)
        return "for clients" if purposes else "not restricted"

    def dates(self) -> str:
        """The certificate is valid now."""
        from cmon_proxy import CLOCK_SKEW_SECONDS, utc
        cert, now = self.cert, time.time()
        if now < cert.not_before - CLOCK_SKEW_SECONDS:
            raise Broken(f"the certificate is not valid before {utc(cert.not_before)}",
                         "check this machine's clock, or wait")
        if now > cert.not_after and (self.new_style or not cert.self_issued):
            raise Broken(f"the certificate expired on {utc(cert.not_after)}",
                         f"make a new one with `{PROGRAM} certgen --renew`")
        return ("valid until " if now <= cert.not_after else
                "expired, which the proxy accepts in the old style: ") + utc(cert.not_after)

    def signature(self) -> str:
        """The certificate is signed with the key that it names, if that key is in ~/.ssh."""
        from cmon_proxy import CertificateError, key_id_of, public_key, signed_by
        cert = self.cert
        if cert.self_issued and not signed_by(cert, cert.key):
            raise Broken("the certificate claims to be self-signed, but its signature is wrong",
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
                    raise Broken(f"the certificate names {path} as its issuer, but is not signed "
                                 "with it", CERTGEN)
        return str(cert.digest or cert.signature)

    def name(self) -> str:
        """The proxy's name resolves."""
        try:
            addresses = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise Broken(f"{self.host} cannot be resolved", "check the host name in --url or "
                         "CMON_URL, and this machine's DNS") from None
        return ", ".join(dict.fromkeys(str(entry[4][0]) for entry in addresses))

    def tcp(self) -> str:
        """Something listens on the port."""
        with self._connect() as connection:
            return f"connected to {connection.getpeername()[0]}"

    def handshake(self) -> str:
        """The port speaks a current version of TLS."""
        lenient = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        lenient.check_hostname = False
        lenient.verify_mode = ssl.CERT_NONE
        try:
            with self._connect() as raw, lenient.wrap_socket(
                    raw, server_hostname=self.host) as connection:
                return connection.version() or "TLS"
        except OSError as error:                    # SSLError is one
            plain = re.search("wrong version number|record layer failure", tls_words(error))
            raise Broken(f"TLS handshake with {self.netloc} failed: {tls_words(error)}",
                         "give --url the proxy's address for tenants: this port speaks plain HTTP, "
                         "as an agent or the proxy's admin_listen does" if plain else
                         "check that the port in --url is the proxy's") from None

    def server(self) -> str:
        """The proxy's certificate is trusted, valid, and for this name."""
        from cmon_proxy import utc
        try:
            with self._connect() as raw, self.tls.wrap_socket(
                    raw, server_hostname=self.host) as connection:
                shown: Any = connection.getpeercert()
        except ssl.SSLCertVerificationError as error:
            step = "give the CA of the proxy's certificate with --ca FILE or CMON_CA (PEM)"
            if "mismatch" in str(error) or "not valid for" in error.verify_message:
                step = "use --url with a name that the certificate is valid for"
            elif error.verify_code in (9, 10):      # X509_V_ERR_CERT_NOT_YET_VALID, _HAS_EXPIRED
                step = "tell the operator, or check this machine's clock"
            raise Broken(f"the proxy's certificate is not accepted: {error.verify_message}", step
                         ) from None
        except OSError as error:
            raise Broken(f"the proxy ended the TLS handshake: {tls_words(error)}",
                         "ask the operator what the proxy's log says") from None
        return f"valid until {utc(ssl.cert_time_to_seconds(shown['notAfter']))}"

    def discovery(self) -> str:
        """The proxy accepts the account."""
        self.proxy = Proxy(self.url, self.tls, self.arguments.timeout)
        self.discovered = self._ask("/v1/discover").body
        return "the proxy accepts the account"

    def listed(self) -> str:
        """The account has running containers."""
        _, self.containers = self.proxy.listed(self.discovered)
        if not self.containers:
            raise Broken("the account has no running containers", "start one, or check that the "
                         f"certificate is for the right account (it is for {self.cert.subject})")
        if self.arguments.container:
            self.chosen = self.proxy.find(self.arguments.container)
        else:
            running = [container for container in self.containers
                       if container.state in ("running", "-")]
            self.chosen = (running or self.containers)[0]
        return plural(len(self.containers), "container")

    def scrape(self) -> str:
        """The page of one container can be scraped."""
        before = time.time()
        answer = self._ask(f"/v1/{self.chosen.uuid}/metrics")
        try:
            parsed = parse(answer.body.decode())
        except (ExpositionError, UnicodeDecodeError) as error:
            raise Broken(f"the page of {self.chosen.alias} cannot be parsed: {error}",
                         "tell the operator") from None
        for family in parsed:
            self.families.setdefault(family.name, []).extend(family.samples)
        clock = self.families.get("time_of_day")
        if clock:                                   # milliseconds
            self.node_clock = float(clock[0].value) / 1000 - (before + time.time()) / 2
        return f"{sum(map(len, self.families.values()))} samples of {self.chosen.alias}"

    def whole(self) -> str:
        """No collector of the page has failed."""
        ups = self.families.get("cmon_collector_up")
        if ups is None:                             # the original's agent
            raise Skipped("this agent does not report it")
        failed = [dict(sample.labels).get("collector", "?") for sample in ups if sample.value == 0]
        if failed:
            raise Broken(f"on the page of {self.chosen.alias}, collectors have failed: "
                         f"{', '.join(failed)}",
                         "tell the operator; the agent's log on the compute node says why")
        return f"all {len(ups)} collectors"

    def age(self) -> str:
        """The metrics are current."""
        if self._limited():
            raise Broken(*OVER_QUOTA, "quota")
        ages = [(float(sample.value), dict(sample.labels).get("collector", "?"))
                for sample in self.families.get("cmon_sample_age_seconds", ())]
        old = sorted((age, name) for age, name in ages if not name.startswith("plugin_") and
                     age > (OLD_SLOWLY_SECONDS if name in SLOWLY else OLD_SECONDS))
        if old:
            raise Broken(f"{old[-1][1]} of {self.chosen.alias} is {old[-1][0]:.0f} s old", "tell "
                         "the operator: the agent is over its CPU budget, or a command hangs")
        if not ages:
            raise Skipped("this agent does not report it")
        return f"at most {max(ages)[0]:.0f} s"

    def quota(self) -> str:
        """The account is within its quota."""
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
        """The clocks of this machine, the proxy and the node agree."""
        proxy = self.clock if math.isfinite(self.clock) else 0.0    # no Date header: unknown
        for whose, apart in (("proxy", proxy), ("compute node", self.node_clock)):
            if abs(apart) > CLOCK_SECONDS:
                raise Broken(f"this machine's clock is {abs(apart):.0f} s "
                             f"{'behind' if apart > 0 else 'ahead of'} the {whose}'s",
                             "check the clocks of both (NTP)")
        return f"at most {max(abs(proxy), abs(self.node_clock)):.0f} s apart"

    def configuration(self) -> str:
        """Prometheus' configuration names the same files and proxy."""
        if not self.arguments.prometheus:
            raise Skipped("no --prometheus FILE")
        path = Path(self.arguments.prometheus)
        settings = scalars(read_text(path, "configuration"))
        tool = shutil.which("promtool")
        if tool is not None:
            done = subprocess.run([tool, "check", "config", str(path)], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, check=False, stdin=subprocess.DEVNULL)
            if done.returncode:
                lines = done.stdout.decode("utf-8", "replace").strip().splitlines() or ["no reason"]
                raise Broken(f"promtool refuses {path}: {printable(lines[-1])}",
                             f"run `promtool check config {path}`")
        hosts = {urllib.parse.urlsplit(url).hostname for key, url in settings if key == "url"}
        hosts |= {value for key, value in settings if key == "endpoint"}
        if self.host not in hosts:
            raise Broken(f"{path} has no job that discovers containers from {self.host}",
                         f"add one; `{PROGRAM} setup` writes a complete file")
        for key, mine in (("cert_file", self.arguments.cert), ("key_file", self.arguments.key)):
            named = {(path.parent / value).resolve() for name, value in settings if name == key}
            if Path(mine).resolve() not in named:
                raise Broken(f"{path} does not use {mine}, but " + (
                    " and ".join(sorted(map(str, named))) or f"no {key}"),
                    f"use the same {key} in both places")
        for suffix in (value for name, value in settings if name == "dns_suffix"):
            self._container_name(f"{self.chosen.uuid}.{suffix}", suffix)
        return f"{path} uses the same files and {self.host}"

    def targets(self) -> str:
        """Prometheus has targets at this proxy, and none is down."""
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
            mine = [(str(target["health"]), str(target["scrapeUrl"]), str(target["lastError"]))
                    for target in active
                    if (urllib.parse.urlsplit(target["scrapeUrl"]).hostname or "")
                    .endswith(self.host)]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Broken(f"{base} is not a Prometheus", "check --prometheus-url"
                         ) from None
        if not mine:
            raise Broken(f"Prometheus at {base} has no target at {self.host}", "start it with this "
                         "configuration, or reload it (SIGHUP)")
        down = [(url, why) for health, url, why in mine if health == "down"]
        if down:
            raise Broken(f"{len(down)} of {len(mine)} targets are down, for example "
                         + printable(f"{down[0][0]}: {down[0][1]}"),
                         "reload Prometheus (SIGHUP), then run this command again")
        return f"{plural(len(mine), 'target')}, none down"

    def _container_name(self, name: str, suffix: str) -> None:
        """The proxy's certificate and DNS cover a container's own host name."""
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
            raise Broken(f"{name} cannot be resolved", f"let *.{suffix} resolve to the proxies "
                         f"(`{PROGRAM} discover --zone` prints DNS records), {instead}") from None

    def _connect(self) -> socket.socket:
        try:
            return socket.create_connection((self.host, self.port), self.arguments.timeout)
        except OSError as error:
            step = "check the port in --url, and the firewalls on the way"
            if urllib.parse.urlsplit(self.url).port is None:
                step = f"the proxy's default port is {PROXY_PORT}: " \
                    f"try --url https://{self.host}:{PROXY_PORT}"
            raise Broken(f"cannot connect to {self.host}:{self.port}: {words_of(error)}", step
                         ) from None

    def _limited(self) -> bool:
        return any(sample.value == 1 for sample in self.families.get("cmon_quota_limited", ()))

    def _ask(self, path: str, missing: Skipped | None = None) -> ClientResponse:
        """GET a path; Broken unless the status is 200. The Date header shows the proxy's clock."""
        before = time.time()
        answer = self.proxy.get(path)
        try:
            date = email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp()
        except (LookupError, ValueError, TypeError, OverflowError):
            date = -math.inf
        if not path.startswith("/v1/" + self.chosen.uuid):      # a page has the agent's Date
            # a cached answer can be older than its request, so the latest Date counts
            self.clock = max(self.clock, date + 0.5 - (before + time.time()) / 2)
        if answer.status == 200:
            return answer
        if answer.status == 404 and missing is not None:
            raise missing
        reason = printable(answer.body[:2000].decode("utf-8", "replace")) or "no reason given"
        raise Broken(f"the proxy says {answer.status}: {reason}", {
            401: "add the SSH key to the account, or make a certificate with a key of the account",
            404: f"check the name: {DISCOVER}",
            429: "scrape less often, or ask the operator for a higher quota",
        }.get(answer.status, "try again in a minute; if it fails again, tell the operator"),
            "quota" if answer.status == 429 else "")


# Each link depends on those before it.
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
    chain = Doctor(arguments)
    broken: Broken | None = None
    for name, link in LINKS:
        verdict, detail = "ok", ""
        if broken is not None:
            verdict, detail = ("FAIL", str(broken)) if broken.link == name else ("skip", "")
        else:
            try:
                detail = link(chain)
            except Skipped as why:
                verdict, detail = "skip", str(why)
            except Broken as error:
                broken = error
                verdict, detail = ("skip", f"see {error.link}") if error.link not in (
                    "", name) else ("FAIL", str(error))
            except Failure as failure:
                broken = Broken(str(failure), {
                    "list": DISCOVER if arguments.container
                    else "check that --url is the proxy's address",
                    "files": f"{CERTGEN}, or name existing files with --cert, --key and --ca",
                    "configuration": "give --prometheus the file that Prometheus reads",
                    "key": CERTGEN}.get(
                        name, "check the files and the URL given to this command"))
                verdict, detail = "FAIL", str(failure)
        print(coloured(f"{verdict:<4}", {"ok": 32, "FAIL": 31}.get(verdict, 0))
              + f"  {name}" + (f": {detail}" if detail else ""), flush=True)
    print(f"Next: {broken.step}." if broken else "All checks passed.")
    return 1 if broken else 0


def tls_words(error: OSError) -> str:
    """OpenSSL's reason, in words: `wrong version number`."""
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else words_of(error)


def scalars(text: str) -> list[tuple[str, str]]:
    """The settings `key: value` of a YAML or JSON file, in order. The standard library has no YAML
    parser, and only names of files and hosts matter here."""
    settings = re.findall(r"""["']?\b(\w+)["']?\s*:\s+("[^"\n]*"|'[^'\n]*'|[^\s,{}\[\]]+)""",
                       re.sub(r"(?m)(^|\s)#.*$", "", text))
    return [(key, value.strip("\"'")) for key, value in settings]


# --- rules and dashboards -------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
DASHBOARDS = ("fleet", "container", "node", "proxy")


def example(name: str) -> Path:
    """The path of a file of examples/, in a checkout or an installed package; raises Failure."""
    for folder in (HERE / "examples", Path(sys.prefix) / "share" / "cmon" / "examples"):
        if (folder / name).is_file():
            return folder / name
    raise Failure(f"{HERE / 'examples' / name} is missing: run cmon.py from a copy of the whole "
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
    """The useful part of a profile of node-triton (~/.triton)."""
    account: str = ""
    key_id: str = ""            # fingerprint, MD5 or SHA256
    url: str = ""               # of the proxy, derived from CloudAPI's name


def triton_profile(home: Path) -> Profile:
    """The profile that TRITON_PROFILE or ~/.triton/config.json names, else the only one, else an
    empty one."""
    folder = home / ".triton"
    try:
        profiles = {path.stem: path for path in sorted(folder.glob("profiles.d/*.json"))}
        name = os.environ.get("TRITON_PROFILE", "")
        config = folder / "config.json"
        if not name and config.exists():
            name = str(json.loads(config.read_bytes()).get("profile", ""))
        if name not in profiles and len(profiles) == 1:
            name = next(iter(profiles))
        if name not in profiles:
            return Profile()
        profile = json.loads(profiles[name].read_bytes())
        account, key_id, cloudapi = (str(profile.get(key) or "") for key in (
            "actAsAccount", "keyId", "url"))
        account = account or str(profile.get("account") or "")
        host = urllib.parse.urlsplit(cloudapi).hostname or ""
    except (OSError, ValueError, AttributeError, RecursionError):
        return Profile()                    # unusable: the flags are needed
    if re.fullmatch("(?:[0-9a-f]{2}:){15}[0-9a-f]{2}", key_id):
        key_id = "MD5:" + key_id
    service = re.sub(r"^cloudapi\.", "cmon.", host)
    return Profile(account if LOGIN.fullmatch(account) else "", key_id,
                   f"https://{service}:{PROXY_PORT}" if service != host else "")


def key_of_profile(home: Path, key_id: str) -> str:
    """The private key in ~/.ssh whose public key has this fingerprint; "" without one."""
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
        raise Usage("no account given: use --account LOGIN")
    if arguments.suffix and not arguments.dns:
        raise Usage("--suffix requires --dns")
    if not arguments.ssh_key:
        arguments.ssh_key = key_of_profile(home, profile.key_id)
        if not arguments.ssh_key and profile.key_id and os.environ.get("SSH_AUTH_SOCK"):
            arguments.ssh_key, arguments.agent = profile.key_id, True
    arguments.url = proxy_url(arguments.url or profile.url)
    suffix = suffix_of(arguments, arguments.url) if arguments.dns else ""
    config = folder / "prometheus.yml"
    if os.path.lexists(config) and not arguments.force:
        raise Failure(f"{config} exists: use --force to replace the files of an earlier setup, or "
                      "another folder")
    ca = read_text(Path(arguments.ca), "CA") if arguments.ca else ""
    cert, key = (folder / f"{arguments.account}-{kind}.pem" for kind in ("cert", "key"))
    if cert.exists() and key.exists():
        print(f"using the existing {cert} and {key}")
    else:
        arguments.out, arguments.renew = str(folder), False
        certgen(arguments)
    arguments.cert, arguments.key = str(cert), str(key)
    if ca:
        arguments.ca = str(folder / "ca.pem")
        write_plain(folder / "ca.pem", ca)
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
    print(f"wrote {config} and, beside it, rules.yml, dashboards/ and grafana/\n", flush=True)
    arguments.container, arguments.prometheus = "", str(config)
    status = doctor(arguments)
    quoted = shlex.quote(str(config))
    data = shlex.quote(str(folder / "data"))
    print(f"\n{'Then start' if status else 'Start'} Prometheus:\n\n"
          f"    prometheus --config.file={quoted} --storage.tsdb.path={data}\n\n"
          "and Grafana, if you use it:\n\n"
          f"    GF_PATHS_PROVISIONING={shlex.quote(str(provisioning.resolve()))} grafana server")
    return status


def operates(arguments: argparse.Namespace) -> bool:
    """Whether the account may see compute nodes; False if the proxy cannot be asked."""
    try:
        proxy = Proxy(arguments.url, client_context(arguments.cert, arguments.key, arguments.ca),
                      arguments.timeout)
        return proxy.get("/v1/gz/discover").status == 200
    except Failure:
        return False                        # doctor, which follows, says why


def prometheus_yml(url: str, account: str, ca: bool, suffix: str = "", nodes: bool = False) -> str:
    """The example configuration for this proxy and account. `ca`: use ca.pem; `suffix`: use Triton
    discovery and host names below it; `nodes`: add compute nodes. All files are in one folder."""
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname or "", parts.port or 443
    text = example("prometheus-dns.yml" if suffix else "prometheus.yml").read_text("utf-8")
    if nodes:
        operator = example("prometheus-operator.yml").read_text("utf-8")
        job = operator[operator.index("  - job_name: nodes"):operator.index("  - job_name: agents")]
        text += job.replace("admin-", "alice-")
    text = text.replace("cmon.dc.example:9163", f"{bracketed(host)}:{port}")
    text = text.replace("endpoint: cmon.dc.example", f"endpoint: {json.dumps(host)}\n        "
                        f"port: {port}")
    text = text.replace("cmon.dc.example", suffix or host)
    text = text.replace("account: alice", f"account: {json.dumps(account)}")
    text = re.sub(r"alice-(cert|key)\.pem", rf"{account}-\1.pem", text)
    if ca:
        text = re.sub(r"(?m)^( +)(cert_file: .*)$", r"\1ca_file: ca.pem\n\1\2", text)
    return text


def write_plain(path: Path, text: str) -> None:
    """Write a file that anyone may read, and create its folders; raises Failure."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    except OSError as error:
        raise Failure(f"cannot write {path}: {words_of(error)}") from None


# --- demo -----------------------------------------------------------------------------------------

LOOPBACK = "127.0.0.1"
SUFFIX = "demo.localhost"       # OpenSSL rejects wildcards directly below a top-level name
SILENT_NODE = "5a5a5a5a-0008-4000-8000-00000000cafe"
SILENT_VM = "5a5a5a5a-0008-4000-8000-000000000001"
DEMO_DAYS = 90                  # validity of its certificates; no alert fires
START_SECONDS = 30.0            # for a child to listen; a small machine may compile for ten
STOP_SECONDS = 5.0


class Program:
    """One of the servers as a child process, with its log in a file."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name, self.log = name, log
        with log.open("wb") as sink:
            # Its own session, so that Ctrl-C reaches only us and we stop the children in order.
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL,
                                             stdout=subprocess.PIPE, stderr=sink,
                                             start_new_session=True)
        # When we exit, even if killed, the pipe closes and the guard ends the child.
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", f"read -r _; kill {self._process.pid}"], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def port(self) -> int:
        """Wait until the program listens; returns its port. Raises Failure."""
        assert self._process.stdout is not None
        with self._process.stdout as output:
            if select.select([output], [], [], START_SECONDS)[0]:
                line = output.readline()
                if line:
                    return parse_address(json.loads(line)["main"])[1]
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(STOP_SECONDS)    # its output has ended: it is exiting
        self.check()
        raise Failure(f"the {self.name} did not listen within {START_SECONDS:g} s; "
                      + self.last_words())

    def check(self) -> None:
        """Raise Failure if the program has exited."""
        status = self._process.poll()
        if status is not None:
            how = f"was killed by signal {-status}" if status < 0 else \
                f"exited with status {status}"
            raise Failure(f"the {self.name} {how}; {self.last_words()}")

    def last_words(self) -> str:
        """The last line of its log, for a message."""
        lines = self.log.read_text("utf-8", "replace").strip().splitlines()
        return f"last line of its log: {printable(lines[-1])}" if lines else "its log is empty"

    def stop(self) -> None:
        """Stop the program; kill it if it does not stop in time."""
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
    """An agent that replays a recorded node, a proxy, and certificates, all in one folder."""

    def __init__(self, folder: Path, agent_port: int, proxy_port: int) -> None:
        self.folder = folder
        self._programs: list[Program] = []
        self._wanted = {"agent": agent_port, "proxy": proxy_port, "forwarder": 0}
        self.agent_port = self.proxy_port = 0
        self.inventory: dict[str, Any] = {}

    def start(self) -> None:
        """Make the certificates, start the agent and then the proxy."""
        from cmon_proxy import CertificateError
        recording, inventory = example("node.json"), example("inventory.json")
        for program, port in self._wanted.items():
            require_free(program, port)
        self.inventory = json.loads(inventory.read_text("utf-8"))
        try:
            self._certificates()
        except (OSError, CertificateError) as error:
            raise Failure("the demo cannot make certificates with the OpenSSL of this Python: "
                          f"{error}") from None
        recorded = json.loads(recording.read_text("utf-8"))
        recorded["load"] = json.loads(example("load.json").read_text("utf-8"))
        self._write("node.json", json.dumps(recorded).encode())
        self.agent_port = self._run("agent", ["-I"], "--replay", str(self.folder / "node.json"))
        for server in self.inventory["servers"]:        # one agent stands in for all nodes
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
        """Start the forwarder as this account; returns how many samples the sink has accepted."""
        self._write("forwarder.json", json.dumps({
            "proxy": {"url": f"https://localhost:{self.proxy_port}", "ca": "ca.pem",
                      "cert": f"{login}-cert.pem", "key": f"{login}-key.pem"},
            "interval": 5, "sinks": {"demo": sink}}, indent=2).encode())
        url = "http://{}:{}/metrics".format(LOOPBACK, self._run(
            "forwarder", ["-sE"], "--config", str(self.folder / "forwarder.json")))
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            values = {family.name: family.samples[0].value
                      for family in parse(fetch(url).decode()) if family.samples}
            if not values["cmon_forwarder_sink_up"]:
                raise Failure(f"the forwarder cannot deliver; {self._programs[-1].last_words()}")
            if values["cmon_forwarder_sink_samples_sent_total"]:
                return int(values["cmon_forwarder_sink_samples_sent_total"])
            time.sleep(0.1)
        raise Failure(f"nothing was delivered within {START_SECONDS:g} s; "
                      + self._programs[-1].last_words())

    def _add_silent_node(self) -> None:
        """Add a node that does not answer, with a container of the last ordinary account."""
        owner = [account for account in self.inventory["accounts"]
                 if not account.get("operator")][-1]["uuid"]
        mine = next(vm for vm in self.inventory["vms"] if vm["owner_uuid"] == owner)
        self.inventory["servers"].append({"uuid": SILENT_NODE, "hostname": "cn08",
                                          "admin_ip": f"{LOOPBACK}:1"})
        self.inventory["vms"].append({
            **mine, "uuid": SILENT_VM, "alias": "reports", "server_uuid": SILENT_NODE,
            "state": "running"})

    def stop(self) -> None:
        """Stop all programs."""
        for program in reversed(self._programs):
            program.stop()

    def check(self) -> None:
        """Raise Failure if one of the programs has exited."""
        for program in self._programs:
            program.check()

    def proxy(self, login: str) -> Proxy:
        """The proxy as this account sees it."""
        tls = client_context(str(self.folder / f"{login}-cert.pem"),
                             str(self.folder / f"{login}-key.pem"), str(self.folder / "ca.pem"))
        return Proxy(f"https://localhost:{self.proxy_port}", tls, 10.0, (LOOPBACK, self.proxy_port))

    def credentials(self, login: str, flags: Sequence[str], between: str = " ") -> str:
        """Flags or variables that let a command act as this account."""
        files = ("ca.pem", f"{login}-cert.pem", f"{login}-key.pem")
        return " ".join(f"{flag}{between}{shlex.quote(str(self.folder / file))}"
                        for flag, file in zip(flags, files))

    def curl(self, login: str, url: str, curl: str = "curl") -> str:
        """A command that requests this URL as this account, for any shell on this machine."""
        flags = self.credentials(login, ("--cacert", "--cert", "--key"))
        return f"{curl} {flags} --connect-to ::{LOOPBACK}: {url}"

    def bundle(self, login: str) -> str:
        """A command that makes a PKCS#12 file for a browser."""
        cert, key, bundle = (shlex.quote(str(self.folder / f"{login}{end}"))
                             for end in ("-cert.pem", "-key.pem", ".p12"))
        return f"openssl pkcs12 -export -passout pass: -in {cert} -inkey {key} -out {bundle}"

    def _run(self, name: str, python: Sequence[str], *arguments: str) -> int:
        command = [sys.executable, *python, str(HERE / f"cmon_{name}.py"), *arguments,
                   "--listen", f"{LOOPBACK}:{self._wanted[name]}", "--print-addresses",
                   "--log-format", "text"]
        self._programs.append(Program(name, command, self.folder / f"{name}.log"))
        return self._programs[-1].port()

    def _write(self, name: str, content: bytes) -> None:
        write_private(self.folder / name, content)

    def _certificates(self) -> None:
        """Make a CA, the proxy's certificate and, for each account, a key and the certificate that
        `triton profile cmon-certgen` would make with it."""
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
    """Raise Failure if another program listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            why = ("is in use" if error.errno == errno.EADDRINUSE
                   else f"cannot be used: {words_of(error)}")
            raise Failure(f"port {port} for the {program} {why}: choose another with "
                          f"--{program}-port PORT, or omit the flag to use a free one") from None


class Forward(NamedTuple):
    """A sink for the demo: its default address, and a command that shows what has arrived."""
    where: str
    key: str                        # the setting for the address
    look: str                       # WHERE stands for the address
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
    "http": Forward("http://127.0.0.1:8080/", "url", "# see the log of that server"),
    "remote_write": Forward("http://127.0.0.1:9090/api/v1/write", "url",
                            f"curl -G http://127.0.0.1:9090/api/v1/query {QUERY} "
                            "query=mem_agg_usage"),
    "file": Forward("samples.log", "path", "tail -f WHERE"),
}


def forwarding(text: str) -> tuple[str, str]:
    """A flag's value: `TYPE` or `TYPE=WHERE` of --forward."""
    kind, _, where = text.partition("=")
    if kind not in FORWARDS:
        raise argparse.ArgumentTypeError(
            f"{kind!r} is not one of {', '.join(FORWARDS)}, optionally with =WHERE")
    if where and FORWARDS[kind].key == "url" and not where.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(
            f"{where!r} is not a URL such as {FORWARDS[kind].where}")
    if where and kind == "file":
        where = os.path.abspath(where)      # the default is a file in the demo's folder
    return kind, where or FORWARDS[kind].where


def demo(arguments: argparse.Namespace) -> int:
    """`cmon.py demo`"""
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt
    ends = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    for number in ends:
        signal.signal(number, interrupt)
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)      # until the folder is sure to be removed
    folder = Path(tempfile.mkdtemp(prefix="cmon-demo-"))
    running = Demo(folder, arguments.agent_port, arguments.proxy_port)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
        running.start()
        show(running, arguments.forward)
        if arguments.once:
            print("All steps succeeded. The demo's files have been removed; without --once, it "
                  "runs until\nCtrl-C, so that you can repeat the steps.")
            return 0
        print("The demo runs until Ctrl-C.", flush=True)
        while True:
            time.sleep(0.5)
            running.check()
    except KeyboardInterrupt:
        return 0
    finally:
        for number in ends:
            signal.signal(number, signal.SIG_IGN)       # nothing may interrupt the cleanup
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)


def show(running: Demo, forward: tuple[str, str] | None = None) -> None:
    """Send the requests that a tenant's Prometheus sends, and print each as a command. Raises
    Failure if an answer is wrong."""
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
    accounts = len(running.inventory["accounts"])
    print(f"""
Container Monitor is running on this machine: an agent that replays a recorded compute node with
{len(vms)} zones of {accounts} accounts ({run} running), and a proxy in front of it.

To see the containers in a browser, open

    {base}/

The browser needs {login}'s certificate: make {login}.p12 with the command below, import it
(Firefox: Settings, Certificates, Your Certificates; Chrome: Settings, Security, Manage
certificates), and accept the demo's CA. Within minutes db01 reaches its CPU cap, web02 runs out of
memory and lb01 drops packets. Among carol's containers is one on a silent compute node.

    {wrapped(running.bundle(login)).strip()}

The demo has just sent the requests below. To repeat one, run its command in any shell.
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
    step("the same page by host name: each container looks like its own node exporter",
         running.curl(login, named), [f"{samples(by_name(running, login, named))} samples"])
    refused = proxy.get(f"/v1/{foreign['uuid']}/metrics")
    if refused.status != 404:
        raise Failure(f"a request for a foreign container got {refused.status} instead of 404")
    step(f"for {login}, another account's container ({foreign['alias']}) does not exist",
         running.curl(login, f"{base}/v1/{foreign['uuid']}/metrics", "curl -i"),
         textwrap.wrap(f"{refused.status}: {printable(refused.body.decode())}", 74))
    direct = f"http://{LOOPBACK}:{running.agent_port}"
    step(f"the operator asks the agent directly (web page: {direct}/)",
         f"curl {direct}/v1/gz/metrics", summary(fetch(f"{direct}/v1/gz/metrics")))
    config = running.folder / "prometheus.yml"
    write_plain(config, prometheus_yml(proxy.url, login, ca=True))
    write_plain(running.folder / "rules.yml", example("rules.yml").read_text("utf-8"))
    python = shlex.quote(sys.executable)
    flags = running.credentials(login, ("--ca", "--cert", "--key"))
    step(f"{login} scrapes {mine['alias']} with cmon.py",
         f"{python} {shlex.quote(str(HERE / 'cmon.py'))} monitor {shlex.quote(mine['alias'])} "
         f"--url {base} {flags}", [])
    variables = running.credentials(login, ("CMON_CA", "CMON_CERT", "CMON_KEY"), "=")
    step("with these variables set, the other commands need no flags",
         f"export CMON_URL={base} {variables}",
         [f"{python} {shlex.quote(str(HERE / 'cmon.py'))} {words}" for words in (
             "top", "doctor", "check --all")])
    step("Prometheus, if installed, scrapes everything; then see http://127.0.0.1:9090/targets",
         f"prometheus --config.file={shlex.quote(str(config))} "
         f"--storage.tsdb.path={shlex.quote(str(running.folder.parent / 'cmon-prometheus'))} "
         "--web.listen-address=127.0.0.1:9090", [])
    if forward is not None:
        kind, where = forward
        sink = FORWARDS[kind]
        if kind == "file":
            where = str(running.folder / where)
        if kind == "influxdb":      # version 1 needs an existing database
            try:
                Client().request("POST", f"{where}/query", {
                    "Content-Type": "application/x-www-form-urlencoded"},
                    b"q=CREATE DATABASE cmon")
            except ClientError as error:
                raise Failure(f"InfluxDB: {error}") from None
        sent = running.forward(login, {"type": kind, sink.key: where, **sink.more})
        step(f"the forwarder pushes {login}'s metrics to {where}; this shows what has arrived",
             sink.look.replace("WHERE", shlex.quote(where)),
             [f"{sent} samples sent; its settings: {running.folder / 'forwarder.json'}"])
    proxy.close()


def cast(inventory: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The demo's roles: an ordinary account, one of its running zones, and a foreign zone."""
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
    """GET a URL; returns the body of a 200, otherwise raises Failure."""
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
    """The page at a container's own host name, without DNS."""
    tls = client_context(*(str(running.folder / name) for name in (
        f"{login}-cert.pem", f"{login}-key.pem", "ca.pem")))
    host = urllib.parse.urlsplit(url).hostname or ""
    return fetch(url, tls, {host: (LOOPBACK, running.proxy_port)})


def samples(page: bytes) -> int:
    """The number of samples on a page; raises Failure if Prometheus would refuse it."""
    try:
        return sum(len(family.samples) for family in parse(page.decode()))
    except (ExpositionError, UnicodeDecodeError) as error:
        raise Failure(f"a page that Prometheus would refuse: {error}") from None


SHOWN = ("cpucap_cur_usage_percentage", "mem_agg_usage", "mem_limit", "net_agg_bytes_in",
         "load_average", "zfs_used", "cpu_idle_seconds_total", "arcstats_size_bytes")


def summary(page: bytes) -> list[str]:
    """A few well-known samples of a page, and its size."""
    count = samples(page)
    families = {family.name: family.samples for family in parse(page.decode())}
    lines = [f"{name}{short_labels(families[name][0])} {families[name][0].value}"
             for name in SHOWN if families.get(name)]
    return [*lines[:5], f"… {count} samples, {len(page)} bytes"]


def short_labels(sample: Sample) -> str:
    """`{interface="vnic0"}`, shortened to fit on a line."""
    inner = ",".join(f'{name}="{value}"' for name, value in sample.labels)
    return "{" + (inner if len(inner) <= 36 else inner[:35] + "…") + "}" if inner else ""


def wrapped(command: str) -> str:
    """A shell command on several lines, joined by backslashes."""
    lines = [""]
    for unit in re.split(r" (?=--|-in |-inkey |-out |CMON_)|(?<!--url) (?=https?:)", command):
        if not lines[-1] or len(lines[-1]) + len(unit) < 66:
            lines[-1] = f"{lines[-1]} {unit}".strip()
        else:
            lines.append(unit)
    return "    " + " \\\n      ".join(lines)


# --- completion -----------------------------------------------------------------------------------

PROGRAMS = "cmon cmon.py"               # as installed by pip, and in a checkout
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
    """A completion script, for bash to source."""
    commands = parsers_of(parser)
    kinds: dict[str, set[str]] = {"FILES": set(), "FOLDERS": set(), "VALUES": set()}
    lines = []
    for name, command in (("", parser), *commands.items()):
        words = list(commands) if not name else []
        for action in actions_of(command):
            words += action.option_strings or list(action.choices or ())
            if action.option_strings and action.nargs is None:      # needs a value
                kind = {"FILE": "FILES", "DIR": "FOLDERS"}.get(str(action.metavar), "VALUES")
                kinds[kind] |= set(action.option_strings)
        if any(action.metavar == "DIR" and not action.option_strings
               for action in actions_of(command)):
            words.append("$(compgen -d -- $current)")
        lines.append(f'    "{name}") words="{" ".join(words)}" ;;')
    text = BASH.replace("COMMANDS", "|".join(commands)).replace("PROGRAMS", PROGRAMS)
    for kind, flags in kinds.items():
        text = text.replace(kind, "|".join(sorted(flags)))
    return re.sub(r"(?m)^WORDS$", lambda _: "\n".join(lines), text)


def zsh_completion(parser: argparse.ArgumentParser) -> str:
    """A completion function, for a folder of zsh's $fpath."""
    def quoted(text: str) -> str:
        return "'" + text.replace("'", "'\\''") + "'"

    def plain(text: str) -> str:        # brackets and colons are special in specs
        return re.sub(r"([\[\]:\\])", r"\\\1", text)

    def specs(command: argparse.ArgumentParser, indent: str) -> str:
        lines = []
        for action in actions_of(command):
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
            ("ARGUMENTS", "\n".join(f"        {name}) _arguments \\\n{specs(command, ' ' * 12)} ;;"
                                    for name, command in commands.items()))):
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


seconds = within(float, 0.001, 3600, "a number of seconds up to 3600")
count = within(int, 1, 10 ** 9, "a whole number, at least 1")
factor = within(float, 0.001, 3600, "a factor from 0.001 to 3600")
days = within(int, 1, 36500, "a number of days from 1 to 36500")
port_number = within(int, 1, 65535, "a port from 1 to 65535")


def connection_arguments(parser: argparse.ArgumentParser, first: bool = False) -> None:
    """The flags for the proxy and the client's certificate. They may come before the command
    (`first`) or after it; the latter win, and both override the environment."""
    def add(flag: str, default: Any, **more: Any) -> None:
        parser.add_argument(flag, default=default if first else argparse.SUPPRESS, **more)
    environment = os.environ.get
    add("--url", environment("CMON_URL", ""), metavar="URL",
        help=f"the proxy, as https://HOST:{PROXY_PORT} (CMON_URL)")
    add("--cert", environment("CMON_CERT", ""), metavar="FILE",
        help="your certificate, PEM (CMON_CERT)")
    add("--key", environment("CMON_KEY", ""), metavar="FILE", help="its key, PEM (CMON_KEY)")
    add("--ca", environment("CMON_CA", ""), metavar="FILE", help="the CA of the proxy's "
        "certificate, PEM; needed if this system does not trust it (CMON_CA)")
    add("--timeout", 10.0, metavar="SECONDS", type=seconds, help="timeout of a request (10)")


def groups_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that selects containers by group."""
    parser.add_argument("--groups", metavar="A,B", default="",
                        help="only containers in one of these groups (tag triton.cmon.groups)")


def discover_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `discover`."""
    groups_argument(parser)
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print the proxy's answer as JSON")
    forms.add_argument("--file-sd", metavar="FILE", default="", help="write targets for "
                       "Prometheus' file_sd_configs; a failure leaves the file unchanged")
    forms.add_argument("--hosts", metavar="ADDRESS", type=address, help="print the "
                       "containers' host names as lines of /etc/hosts, with the proxy's ADDRESS")
    forms.add_argument("--zone", action="store_true",
                       help="print the containers' host names as records for a DNS zone file")
    parser.add_argument("--every", metavar="SECONDS", type=seconds,
                        help="with --file-sd: rewrite the file at this interval, until Ctrl-C")
    parser.add_argument("--suffix", metavar="NAME", default="", help="suffix of the containers' "
                        "host names (the host name of the URL)")
    connection_arguments(parser)


def monitor_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `monitor`."""
    add = parser.add_argument
    add("container", metavar="NAME|UUID", nargs="?", default="",
        help="the container: its alias, its UUID, or an unambiguous beginning of its UUID")
    tables = parser.add_mutually_exclusive_group()
    for name, view in TABLES.items():
        tables.add_argument(f"--{name}", action="store_true", help=view.help)
    add("--json", action="store_true", help="print JSON with exact numbers")
    add("--watch", metavar="SECONDS", nargs="?", type=seconds, const=0.0,
        help=f"repeat at this interval, in place on a terminal, until Ctrl-C ({ONCE_SECONDS:g})")
    add("--record", metavar="FILE", default="",
        help="append pages to FILE until Ctrl-C, compressed if its name ends with .gz; every "
             f"{RECORD_SECONDS:g} s without --watch")
    add("--count", metavar="N", type=count, help="end --watch or --record after N pages")
    add("--replay", metavar="FILE", default="", help="show a recording: with --watch at its own "
        "pace, with --watch SECONDS at this interval, otherwise without pauses")
    add("--speed", metavar="FACTOR", type=factor,
        help="with --replay and --watch: play FACTOR times as fast (1)")
    connection_arguments(parser)


def login(text: str) -> str:
    """A flag's value: an account's login."""
    if LOGIN.fullmatch(text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a login")
    return text


def certgen_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `certgen`."""
    signing_arguments(parser, required=True)
    add = parser.add_argument
    add("--out", metavar="DIR", default=".", help="folder for LOGIN-cert.pem and LOGIN-key.pem (.)")
    add("--force", action="store_true", help="replace existing files")
    add("--renew", action="store_true", help="replace an existing certificate if it "
        f"expires within {RENEW_DAYS} days")


def signing_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """The flags for making a certificate."""
    add = parser.add_argument
    profile = "" if required else " (from your triton profile)"
    add("--account", metavar="LOGIN", type=login, required=required,
        help="the account's login" + profile)
    add("--ssh-key", metavar="FILE", default="", help="a private RSA or ECDSA key of the account, "
        "in OpenSSH's format or PEM; with --agent its public key or its fingerprint")
    add("--agent", action="store_true", help="let ssh-agent sign, with the key that --ssh-key "
        "names or its only key")
    add("--old-style", action="store_true", help="make a self-signed certificate for the SSH "
        "key itself, as sdc-docker-setup.sh does")
    add("--days", metavar="N", type=days, default=DAYS,
        help=f"days that the certificate is valid ({DAYS})")


def address(text: str) -> str:
    """A flag's value: an IP address."""
    if not is_address(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address")
    return text


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `doctor`."""
    parser.add_argument("container", metavar="NAME|UUID", nargs="?", default="",
                        help="the container to scrape (the first that is running)")
    parser.add_argument("--prometheus", metavar="FILE", default="",
                        help="check that this prometheus.yml uses the same files and proxy")
    prometheus_url_argument(parser)
    connection_arguments(parser)


def prometheus_url_argument(parser: argparse.ArgumentParser) -> None:
    """The flag for Prometheus' own URL."""
    parser.add_argument("--prometheus-url", metavar="URL", default=PROMETHEUS_URL,
                        help=f"URL of Prometheus ({PROMETHEUS_URL})")


def setup_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `setup`."""
    add = parser.add_argument
    add("dir", metavar="DIR", help="folder for the files")
    signing_arguments(parser)
    add("--dns", action="store_true", help="use Triton discovery with a host name for each "
        "container, which needs wildcard DNS, instead of HTTP discovery")
    add("--suffix", metavar="NAME", default="", help="with --dns: suffix of those host names "
        "(the host name of the URL)")
    add("--force", action="store_true", help="replace the files of an earlier setup, except the "
        "certificate")
    prometheus_url_argument(parser)
    connection_arguments(parser)


def dashboard_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `dashboard`."""
    parser.add_argument("name", metavar="NAME", nargs="?", choices=DASHBOARDS,
                        help=", ".join(DASHBOARDS) + "; without NAME, list them")


def completion_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `completion`."""
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh"), help="bash or zsh")


def no_arguments(parser: argparse.ArgumentParser) -> None:
    """A command without flags."""


def top_column(text: str) -> str:
    """A flag's value: a column of top."""
    if text.upper() not in TOP_TITLES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of " + ", ".join(TOP_TITLES))
    return text.upper()


def top_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `top`."""
    add = parser.add_argument
    groups_argument(parser)
    add("--sort", metavar="COLUMN", type=top_column, default="CPU%",
        help="sort by " + ", ".join(TOP_TITLES).replace("%", "%%") + " (CPU%%)")
    add("--interval", metavar="SECONDS", type=seconds, default=TOP_SECONDS,
        help=f"seconds between rounds ({TOP_SECONDS:g})")
    add("--once", action="store_true", help="print one table and exit, as when writing to a pipe")
    add("--replay", metavar="FILE", default="", help="show a recording made by `monitor`")
    add("--speed", metavar="FACTOR", type=factor,
        help="with --replay: play FACTOR times as fast (1)")
    connection_arguments(parser)


def check_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `check`."""
    add = parser.add_argument
    add("words", metavar="NAME EXPR,WARN,CRIT", nargs="*",
        help="a container (omitted with --all, --groups, --proxy and --certificate), then what to "
             "check: METRIC, METRIC{label=\"value\"}, rate(METRIC) or A/B, with ranges as in the "
             "plugin guidelines, which may be empty; of several samples the worst counts. Default: "
             f"that all collectors work ({COLLECTORS_UP})")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--all", action="store_true", help="check every container of your account")
    chosen.add_argument("--groups", metavar="A,B", default="",
                        help="check every container in one of these groups")
    chosen.add_argument("--proxy", action="store_true", help=f"check the proxy: {RESPONSE}, and "
                        "metrics of its fleet page, such as cmon_quota_used")
    chosen.add_argument("--certificate", action="store_true",
                        help=f"check how long your certificate is valid ({DAYS_LEFT_LIMITS})")
    add("--state", metavar="DIR", default="", help="folder for the readings that rate() needs "
        "(cmon in your cache folder)")
    connection_arguments(parser)


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `demo`."""
    parser.add_argument("--once", action="store_true",
                        help="exit after the steps instead of running until Ctrl-C")
    parser.add_argument("--forward", metavar="TYPE[=WHERE]", type=forwarding,
                        help="also start the forwarder and push to a running server: "
                        + ", ".join(FORWARDS) + "; at its default address, or at WHERE")
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
    Command("check", "check metrics against thresholds, as a plugin of Nagios or Icinga", check,
            check_arguments, "cmon.py check web01 mem_agg_usage/mem_limit,0.8,0.9 "
            "'rate(net_drops_in_total),0'"),
    Command("certgen", "make a certificate for the proxy with an SSH key of your account", certgen,
            certgen_arguments, "cmon.py certgen --account alice --ssh-key ~/.ssh/id_rsa"),
    Command("doctor", "check every step from your files to Prometheus, and say what to fix", doctor,
            doctor_arguments, "cmon.py doctor web01 --prometheus prometheus.yml"),
    Command("setup", "write everything that Prometheus needs: certificate, configuration, rules",
            setup, setup_arguments,
            "cmon.py setup monitoring --account alice --ssh-key ~/.ssh/id_rsa"),
    Command("rules", "print recording rules and alerts for Prometheus", rules,
            no_arguments, "cmon.py rules > rules.yml"),
    Command("dashboard", "print a dashboard for Grafana", dashboard, dashboard_arguments,
            "cmon.py dashboard fleet > fleet.json"),
    Command("completion", "print a completion script for your shell", completion,
            completion_arguments, "source <(cmon.py completion bash)"),
    Command("demo", "run an agent, a proxy and a tenant on this machine; installs nothing", demo,
            demo_arguments, "cmon.py demo"),
)


class Parser(CommandLine):
    """A parser; for `check`, its errors are valid plugin output."""
    words: Sequence[str] = ()           # the arguments, as given

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Keep the arguments: a misspelt flag may explain why another is missing. For `check`,
        flags may come between NAME and EXPR, where argparse takes no more words."""
        self.words = sys.argv[1:] if args is None else args
        known, rest = super().parse_known_args(args, namespace)
        if self.prog.endswith(" check"):
            known.words += [word for word in rest if not word.startswith("-")]
            rest = [word for word in rest if word.startswith("-")]
        return known, rest

    def unrecognized(self, words: Sequence[str]) -> str:
        """The message for unknown arguments, with similar flags."""
        near = [flag for word in words for flag in difflib.get_close_matches(
            word.partition("=")[0], self._option_string_actions, 1, 0.7)]
        if self.prog.endswith(" check") and {"-w", "-c"} & set(words):
            return "there is no -w and no -c: append the ranges to the metric, as in " \
                "load_average,4,8"
        return "unrecognized arguments: " + " ".join(words) + (
            f"; did you mean {' and '.join(near)}?" if near else "")

    def error(self, message: str) -> NoReturn:
        """Exit 2 with a line on stderr; `check`: 3 (2 is CRITICAL) with a line on stdout."""
        unknown = [word for word in self.words if word.startswith("--")
                   and word.partition("=")[0] not in (*self._option_string_actions, "--")]
        if unknown and "are required" in message:
            message = self.unrecognized(unknown)
        if self.prog.endswith(" check"):
            sys.exit(report([Finding(UNKNOWN, self.reworded(message))]))
        super().error(message)


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog=PROGRAM, description="Container Monitor: metrics of containers, for their owners.",
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
    """Run a command; an error is one line on stderr."""
    open_streams()
    arguments, rest = command_line().parse_known_args(argv)
    if rest:
        arguments.parser.error(arguments.parser.unrecognized(rest))
    try:
        return printing("cmon", lambda: arguments.run(arguments), unread=0)
    except Failure as failure:
        print(f"cmon: {failure}", file=sys.stderr)
        return 2 if isinstance(failure, Usage) else 1
    except ImportError as error:        # of cmon_proxy, which has the code for certificates
        print(f"cmon: {error}: cmon_proxy.py of the same version must be beside cmon.py",
              file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
