#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""The Container Monitor agent: one Prometheus page for each zone of a compute node, and one for it.

Runs in the global zone; reads kstats through libkstat and a few commands, from outside the zones,
so that a zone's figures are there when the zone itself is out of CPU, memory or descriptors.

    cmon_agent.py [--config FILE] [--listen HOST:PORT] [--replay CAPTURE] [--libkstat PATH] …
    cmon_agent.py capture FILE

This file runs when copied alone, so it also carries the kit that the proxy and the command share.
Map (`grep '^# ---'`), sections marked [kit] use nothing from the others:

    data types [kit]
    units
    kstats
    host
    collectors
    exposition [kit]
    own metrics [kit]
    cache and throttle [kit]
    HTTP [kit]
    client [kit]
    TLS and certificates [kit]
    scraping and routes
    logging and settings [kit]
    main
"""
from __future__ import annotations

import argparse
import base64
import bisect
import collections
import ctypes
import dataclasses
import datetime
import errno
import hashlib
import heapq
import hmac
import html
import http.client
import http.server
import json
import logging
import logging.handlers
import math
import os
import queue
import random
import re
import resource
import select
import selectors
import signal
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import typing
import urllib.parse
import zlib
from array import array
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import (
    Any, Callable, Dict, Generic, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence,
    Tuple, Type, TypeVar, Union,
)

__version__ = "1.0.0"
__all__ = [
    "ACCEPTS", "Answer", "AnswerReader", "ask_for_any_certificate", "at_least", "BACKLOG",
    "Breaker", "BunyanFormatter", "BUSY", "Cache", "call", "Certificate", "certificate",
    "CertificateError", "Check", "check_any_certificate", "Client", "CLIENT_PURPOSE", "ClientError",
    "ClientResponse", "CMON_PURPOSE", "command_line", "complain", "ConfigError", "Connection",
    "COUNTER", "Counter", "cpu_seconds", "DURATIONS", "escape_label", "EXIT_USAGE",
    "ExpositionError", "Fallback", "Family", "first_certificate", "GAUGE", "Gauge", "gunzip",
    "gzip", "Handler", "HANDSHAKE", "HEADS", "HISTOGRAM", "Histogram", "HTML", "IDLE", "is_address",
    "JSON", "K", "KINDS", "LABEL_NAME", "label_text", "Labels", "Later", "LEVELS", "Limits",
    "Listener", "load_settings", "log", "LOG_QUEUE", "make_certificate", "make_key", "MAX_BODY",
    "MAX_HEAD", "MAX_JSON_BYTES", "merge", "METRIC_NAME", "Number", "number", "one_of", "PACK_FROM",
    "PAGE", "parse", "parse_address", "parse_head", "parse_lines", "Peer", "Pool", "prepare",
    "Prepared", "private_key", "public_key", "PublicKey", "raise_descriptor_limit", "read_json",
    "READ_SIZE", "READING", "Refused", "register_process_metrics", "Registry", "render", "Request",
    "respond", "Response", "Route", "Router", "run_daemon", "S", "Sample", "scrape_deadline",
    "Server", "server_context", "SERVER_PURPOSE", "setting", "signed_by", "SMF_EXIT_ERR_CONFIG",
    "ssh_public_key", "start_logging", "stop_logging", "SUFFIXES", "SUMMARY", "TEXT", "text",
    "TICK_SECONDS", "TokenBucket", "UNTYPED", "V", "valid_label_name", "valid_metric_name", "wire",
    "WRITING",
]

# --- data types [kit] ----------------------------------------------------------------------------

log = logging.getLogger("cmon")

Number = Union[int, float]
COUNTER, GAUGE, HISTOGRAM, SUMMARY, UNTYPED = "counter", "gauge", "histogram", "summary", "untyped"
Labels = Tuple[Tuple[str, str], ...]


class Sample(NamedTuple):
    """One line of a page: labels in their order, a value, and `_bucket`, `_sum` or `_count`."""
    labels: Labels
    value: Number
    suffix: str = ""


class Family(NamedTuple):
    """All samples of one metric, with what HELP and TYPE say of it."""
    name: str
    kind: str
    help: str
    samples: Sequence[Sample]


TEXT = "text/plain; charset=utf-8"
PAGE = "text/plain; version=0.0.4; charset=utf-8"
JSON = "application/json"
HTML = "text/html; charset=utf-8"


class Peer:
    """Who is at the other end of a connection; lives as long as the connection."""
    __slots__ = ("address", "certificate", "identity", "listener")

    def __init__(self, address: str, listener: str, certificate: Optional[bytes] = None) -> None:
        self.address = address              # IP address in text
        self.listener = listener            # name of the listener that it came by
        self.certificate = certificate      # DER, as TLS has proved; None without
        self.identity: Any = None           # the application's: what it made of the certificate


class Request(NamedTuple):
    """One parsed request. Pure: the same bytes on the same connection give an equal one."""
    method: str
    target: str                             # as sent
    path: str                               # percent-decoded, without the query
    query: Mapping[str, str]
    headers: Mapping[str, str]              # names in lower case
    body: bytes
    host: str                               # lower case, without the port
    gzip: bool                              # the client takes gzip
    keep: bool                              # the connection may stay open afterwards
    peer: Peer


class Response(NamedTuple):
    """An answer as a handler gives it; the server adds length, date, connection and gzip."""
    status: int
    body: bytes
    content_type: str = TEXT
    headers: Tuple[Tuple[str, str], ...] = ()


class Prepared(NamedTuple):
    """A whole answer as it goes on the wire, head and body, made once and sent many times."""
    status: int
    plain: bytes
    packed: bytes                           # the same with gzip, or `plain` again


Answer = Union[Response, Prepared]


class Refused(Exception):
    """A handler's refusal: whose fault it is says the status, the text is for the client."""

    def __init__(self, status: int, message: str, *headers: Tuple[str, str], code: str = ""
                 ) -> None:
        super().__init__(message)
        self.status = int(status)
        self.headers = headers + ((("X-Cmon-Error", code),) if code else ())


class Later:
    """An answer that comes later: the connection is parked and no thread waits.

    `finish` may be called from any thread, the first call wins. When the deadline (monotonic
    seconds) passes first, the server sends what `expired` returns. `on_cancel` is called in the
    server's thread when the client has gone away.
    """
    __slots__ = ("deadline", "expired", "on_cancel", "_answer", "_deliver", "_lock")

    def __init__(self, deadline: float, expired: Callable[[], Answer]) -> None:
        self.deadline = deadline
        self.expired = expired
        self.on_cancel: Optional[Callable[[], None]] = None
        self._answer: Optional[Answer] = None
        self._deliver: Optional[Callable[[Answer], None]] = None
        self._lock = threading.Lock()       # _answer and _deliver; the loop and one finisher

    def finish(self, answer: Answer) -> None:
        """Give the answer; later calls are ignored."""
        with self._lock:
            if self._answer is not None:
                return
            self._answer = answer
            deliver = self._deliver
        if deliver is not None:
            deliver(answer)

    def attach(self, deliver: Callable[[Answer], None]) -> None:
        """The server's side: call `deliver` once, at once when the answer is already there."""
        with self._lock:
            self._deliver = deliver
            answer = self._answer
        if answer is not None:
            deliver(answer)

    @property
    def answer(self) -> Optional[Answer]:
        """What was given to `finish`, or None so far."""
        return self._answer


Handler = Callable[..., Union[Answer, Later]]


class Route(NamedTuple):
    """A method and a pattern of segments; `{name}` takes one segment and is handed on as text."""
    method: str                             # GET serves HEAD too
    pattern: str
    handler: Handler
    blocking: bool = False                  # True: run by a worker, not by the server's own thread


def text(status: int, message: str, *headers: Tuple[str, str]) -> Response:
    """A plain answer of one line."""
    return Response(int(status), (message + "\n").encode(), TEXT, headers)

# --- exposition [kit] ----------------------------------------------------------------------------

# https://prometheus.io/docs/instrumenting/exposition_formats/ (text 0.0.4)
METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
KINDS = frozenset((COUNTER, GAUGE, HISTOGRAM, SUMMARY, UNTYPED))
SUFFIXES = {HISTOGRAM: ("_bucket", "_sum", "_count"), SUMMARY: ("_sum", "_count")}
_VALUE = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?)")
_SPECIAL = {"nan": math.nan, "inf": math.inf, "+inf": math.inf, "-inf": -math.inf}
_HEAD_LIMIT = 4096              # remembered HELP and TYPE texts: all our tables, and some plugins'
_MAX_DIGITS = 400               # longer numbers are refused: int() of a huge text takes seconds


class ExpositionError(ValueError):
    """A page, or what was to become one, breaks the text format: its producer is at fault."""


def valid_metric_name(name: str) -> bool:
    """Whether Prometheus takes this as the name of a metric."""
    return METRIC_NAME.fullmatch(name) is not None


def valid_label_name(name: str) -> bool:
    """Whether Prometheus takes this as the name of a label of ours (`__…` is its own)."""
    return LABEL_NAME.fullmatch(name) is not None and not name.startswith("__")


def escape_label(value: str) -> str:
    """A label's value as it stands between quotes."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def number(value: Number) -> str:
    """A value as text: an integer exactly, a float by its shortest form that reads back equal."""
    if isinstance(value, int):
        return str(int(value))
    if value != value:
        return "NaN"
    if value in (math.inf, -math.inf):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)


def label_text(labels: Labels) -> str:
    """Labels in braces, or nothing."""
    if not labels:
        return ""
    return "{" + ",".join([f'{name}="{escape_label(value)}"' for name, value in labels]) + "}"


_heads: Dict[Tuple[str, str, str], str] = {}    # (name, kind, help) -> their two lines


def _head(name: str, kind: str, help_text: str) -> str:
    key = (name, kind, help_text)
    head = _heads.get(key)
    if head is None:
        if not valid_metric_name(name) or kind not in KINDS:
            raise ExpositionError(f"family {name!r} of type {kind!r} is not one of the format")
        escaped = help_text.replace("\\", "\\\\").replace("\n", "\\n")
        head = f"# HELP {name} {escaped}\n# TYPE {name} {kind}\n"
        if len(_heads) >= _HEAD_LIMIT:          # only plugins can bring so many
            _heads.clear()
        _heads[key] = head
    return head


def render(families: Iterable[Family]) -> str:
    """Families as a page, in their order; families without samples are left out."""
    out: List[str] = []
    add = out.append
    for name, kind, help_text, samples in families:
        if not samples:
            continue
        add(_head(name, kind, help_text))
        for labels, value, suffix in samples:
            shown = str(value) if type(value) is int else number(value)
            if labels or suffix:
                add(f"{name}{suffix}{label_text(labels)} {shown}\n")
            else:
                add(f"{name} {shown}\n")
    return "".join(out)


def _value(word: str) -> Number:
    if len(word) > _MAX_DIGITS or not word.isascii():
        raise ExpositionError(f"{word[:40]!r} is not a number")
    if word.isdigit() or (word[:1] in ("-", "+") and word[1:].isdigit()):
        return int(word)
    if word.lower() in _SPECIAL:
        return _SPECIAL[word.lower()]
    if not _VALUE.fullmatch(word):
        raise ExpositionError(f"{word[:40]!r} is not a number")
    return float(word)


_LABEL = re.compile(r'[ \t]*([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*"((?:[^"\\\n]|\\[\\"n])*)"[ \t]*')
_UNESCAPE = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}


def _unescape(value: str) -> str:
    if "\\" not in value:
        return value
    return re.sub(r'\\[\\"n]', lambda match: _UNESCAPE[match.group()], value)


def _labels(line: str, start: int) -> Tuple[Labels, int]:
    """The labels that begin after the brace before `start`; also where the value begins."""
    labels: List[Tuple[str, str]] = []
    position = start
    while True:
        match = _LABEL.match(line, position)
        if match is None:
            break
        labels.append((match.group(1), _unescape(match.group(2))))
        position = match.end()
        if line[position:position + 1] != ",":
            break
        position += 1
    rest = line[position:].lstrip(" \t")
    if not rest.startswith("}"):
        raise ExpositionError("labels are not closed or not quoted")
    names = [name for name, _ in labels]
    if len(set(names)) != len(names):
        raise ExpositionError("a label stands twice")
    return tuple(labels), len(line) - len(rest) + 1


def _sample(line: str) -> Tuple[str, Sample]:
    """Name and sample of one line; a timestamp is checked and dropped (staleness needs none)."""
    match = METRIC_NAME.match(line)
    if match is None:
        raise ExpositionError(f"no metric name at the start of {line[:40]!r}")
    position = match.end()
    labels: Labels = ()
    rest = line[position:].lstrip(" \t")
    if rest.startswith("{"):
        labels, position = _labels(line, len(line) - len(rest) + 1)
    elif rest == line[position:]:
        raise ExpositionError(f"no blank behind the name in {line[:40]!r}")
    words = line[position:].replace("\t", " ").split(" ")
    words = [word for word in words if word]
    if not 1 <= len(words) <= 2:
        raise ExpositionError(f"{match.group()!r} needs one value, and at most a timestamp")
    if len(words) == 2 and not isinstance(_value(words[1]), int):
        raise ExpositionError(f"the timestamp {words[1][:40]!r} is not an integer")
    return match.group(), Sample(labels, _value(words[0]))


class _Parser:
    """Lines in, families out; a line either changes the state as a whole or raises."""

    def __init__(self, max_samples: int) -> None:
        self.kinds: Dict[str, str] = {}
        self.helps: Dict[str, str] = {}
        self.samples: Dict[str, List[Sample]] = {}      # in order of first appearance
        self.seen: set[Tuple[str, str, Labels]] = set()
        self.max_samples = max_samples

    def line(self, line: str) -> None:
        if line.startswith("#"):
            self._comment(line)
        elif line.strip(" \t\r"):
            self._add(*_sample(line.rstrip("\r")))

    def _comment(self, line: str) -> None:
        words = line[1:].lstrip(" \t").split(None, 2)
        if not words or words[0] not in ("HELP", "TYPE"):
            return
        if len(words) < 2 or not valid_metric_name(words[1]):
            raise ExpositionError(f"{words[0]} without a metric's name")
        name = words[1]
        if words[0] == "HELP":
            if name in self.helps:
                raise ExpositionError(f"second HELP of {name}")
            self.helps[name] = re.sub(r"\\([\\n])", lambda match: "\n" if match.group(1) == "n"
                                      else "\\", words[2] if len(words) > 2 else "")
            return
        kind = words[2].strip() if len(words) > 2 else ""
        if kind not in KINDS:
            raise ExpositionError(f"unknown type {kind[:40]!r} of {name}")
        if name in self.kinds or name in self.samples:
            raise ExpositionError(f"TYPE of {name} comes twice or behind its samples")
        self.kinds[name] = kind

    def _family_of(self, name: str) -> Tuple[str, str]:
        if name in self.kinds:
            return name, ""
        for kind, suffixes in SUFFIXES.items():
            for suffix in suffixes:
                base = name[:-len(suffix)]
                if name.endswith(suffix) and self.kinds.get(base) == kind:
                    return base, suffix
        return name, ""

    def _add(self, name: str, sample: Sample) -> None:
        family, suffix = self._family_of(name)
        kind = self.kinds.get(family)
        if kind == HISTOGRAM and suffix == "":
            raise ExpositionError(f"{name} is a histogram and has a sample without suffix")
        key = (family, suffix, tuple(sorted(sample.labels)))
        if key in self.seen:
            raise ExpositionError(f"{name} has the same labels twice")
        if len(self.seen) >= self.max_samples:
            raise ExpositionError(f"more than {self.max_samples} samples")
        self.seen.add(key)
        self.samples.setdefault(family, []).append(sample._replace(suffix=suffix))

    def families(self) -> List[Family]:
        return [Family(name, self.kinds.get(name, UNTYPED), self.helps.get(name, ""), samples)
                for name, samples in self.samples.items()]


def parse(page: str, *, max_samples: int = 100_000) -> List[Family]:
    """A whole page as families; raises ExpositionError that names the first bad line."""
    parser = _Parser(max_samples)
    if page and not page.endswith("\n"):
        raise ExpositionError("the last line has no end: the page is cut off")
    for index, line in enumerate(page.split("\n"), 1):
        try:
            parser.line(line)
        except ExpositionError as error:
            raise ExpositionError(f"line {index}: {error}") from None
    return parser.families()


def parse_lines(page: str, *, max_samples: int = 10_000) -> Tuple[List[Family], List[str]]:
    """What can be read of a page; a bad line costs that line and is told in the second list."""
    parser = _Parser(max_samples)
    problems: List[str] = []
    for index, line in enumerate(page.split("\n"), 1):
        try:
            parser.line(line)
        except ExpositionError as error:
            problems.append(f"line {index}: {error}")
    return parser.families(), problems


def merge(families: Iterable[Family]) -> Tuple[List[Family], List[str]]:
    """Families of one name made one, in order of first appearance; a series that is already there,
    a type that differs and a name that would run into a histogram's are left out and told."""
    merged: Dict[str, Family] = {}
    seen: Dict[str, set[Tuple[str, Labels]]] = {}
    taken: Dict[str, str] = {}              # each name that begins a line -> its family
    problems: List[str] = []
    for family in families:
        present = merged.get(family.name)
        names = [family.name + suffix for suffix in SUFFIXES.get(family.kind, ("",))]
        clash = next((name for name in names if taken.get(name, family.name) != family.name), None)
        if clash is not None:
            problems.append(f"{family.name}: {clash} belongs to {taken[clash]}")
            continue
        if present is not None and present.kind != family.kind:
            problems.append(f"{family.name}: {family.kind}, but it is already a {present.kind}")
            continue
        known = seen.setdefault(family.name, set())
        fresh: List[Sample] = []
        for sample in family.samples:
            key = (sample.suffix, tuple(sorted(sample.labels)))
            if key in known:
                problems.append(f"{family.name}{label_text(sample.labels)}: stands twice")
            else:
                known.add(key)
                fresh.append(sample)
        taken.update(dict.fromkeys(names, family.name))
        merged[family.name] = family._replace(samples=fresh) if present is None else \
            present._replace(samples=[*present.samples, *fresh])
    return list(merged.values()), problems

# --- own metrics [kit] ---------------------------------------------------------------------------

class Counter:
    """A family of counters, one for each combination of label values."""

    def __init__(self, name: str, help_text: str, label_names: Sequence[str], kind: str) -> None:
        self.name, self.help, self.kind = name, help_text, kind
        self.label_names = tuple(label_names)
        self.values: Dict[Tuple[str, ...], Number] = {} if label_names else {(): 0}
        self._lock = threading.Lock()       # values: any thread adds, the scrape copies

    def add(self, amount: Number = 1, *label_values: str) -> None:
        """Count `amount` more."""
        with self._lock:
            self.values[label_values] = self.values.get(label_values, 0) + amount

    def set(self, value: Number, *label_values: str) -> None:
        """Gauges only: the value is now this."""
        with self._lock:
            self.values[label_values] = value

    def remove(self, *label_values: str) -> None:
        """Forget one combination: its zone, node or account is gone."""
        with self._lock:
            self.values.pop(label_values, None)

    def family(self) -> Family:
        """What a scrape sees of it."""
        with self._lock:
            values = list(self.values.items())
        return Family(self.name, self.kind, self.help, [
            Sample(tuple(zip(self.label_names, labels)), value) for labels, value in values])


Gauge = Counter


class Histogram:
    """Counts of observations by upper bound, with their sum; one series a label combination."""

    def __init__(self, name: str, help_text: str, bounds: Sequence[float],
                 label_names: Sequence[str]) -> None:
        self.name, self.help, self.bounds = name, help_text, tuple(bounds)
        self.label_names = tuple(label_names)
        self._series: Dict[Tuple[str, ...], List[Number]] = {}
        self._lock = threading.Lock()       # _series: any thread observes, the scrape copies

    def observe(self, value: float, *label_values: str) -> None:
        """Count one observation."""
        with self._lock:
            series = self._series.get(label_values)
            if series is None:              # a count for each bound, one for +Inf, and the sum
                series = self._series[label_values] = [0] * (len(self.bounds) + 1) + [0.0]
            series[bisect.bisect_left(self.bounds, value)] += 1
            series[-1] += value

    def family(self) -> Family:
        """What a scrape sees of it: cumulative buckets, sum and count."""
        with self._lock:
            copies = [(labels, list(series)) for labels, series in self._series.items()]
        samples: List[Sample] = []
        for values, series in copies:
            labels = tuple(zip(self.label_names, values))
            total = 0
            for bound, count in zip([*map(number, self.bounds), "+Inf"], series):
                total += int(count)
                samples.append(Sample(labels + (("le", bound),), total, "_bucket"))
            samples.append(Sample(labels, series[-1], "_sum"))
            samples.append(Sample(labels, total, "_count"))
        return Family(self.name, HISTOGRAM, self.help, samples)


class Registry:
    """A program's own metrics, in the order in which they were made."""

    def __init__(self) -> None:
        self._sources: List[Callable[[], Iterable[Family]]] = []

    def counter(self, name: str, help_text: str, *label_names: str) -> Counter:
        """A new counter; its name ends in `_total`."""
        return self._keep(Counter(name, help_text, label_names, COUNTER))

    def gauge(self, name: str, help_text: str, *label_names: str) -> Gauge:
        """A new gauge."""
        return self._keep(Counter(name, help_text, label_names, GAUGE))

    def histogram(self, name: str, help_text: str, bounds: Sequence[float],
                  *label_names: str) -> Histogram:
        """A new histogram with these upper bounds, ascending, without +Inf."""
        made = Histogram(name, help_text, bounds, label_names)
        self.collect(lambda: (made.family(),))
        return made

    def collect(self, function: Callable[[], Iterable[Family]]) -> None:
        """Add families that are made when they are asked for."""
        self._sources.append(function)

    def families(self) -> List[Family]:
        """All of them, now."""
        return [family for source in self._sources for family in source()]

    def _keep(self, made: Counter) -> Counter:
        self.collect(lambda: (made.family(),))
        return made


def _resident_bytes() -> Optional[int]:
    """Resident memory now, where a file of /proc tells; illumos' psinfo and Linux' statm differ."""
    try:
        if sys.platform == "linux":
            with open("/proc/self/statm", "rb") as statm:       # pages: size resident …
                return int(statm.read().split()[1]) * resource.getpagesize()
        with open("/proc/self/psinfo", "rb") as psinfo:
            # psinfo_t, LP64, <sys/procfs.h>: pr_rssize (KiB) at 56
            return int(struct.unpack_from("=q", psinfo.read(64), 56)[0]) * 1024
    except (OSError, ValueError, IndexError, struct.error):
        return None


def _open_descriptors() -> Optional[int]:
    for folder in ("/proc/self/fd", "/dev/fd"):
        try:
            return max(len(os.listdir(folder)) - 1, 0)          # less the one that lists
        except OSError:
            continue
    return None


def cpu_seconds() -> float:
    """CPU time of this process and of its finished children, user and system."""
    own, children = (resource.getrusage(who)
                     for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def register_process_metrics(registry: Registry, program: str) -> None:
    """The usual `process_…` families and `cmon_<program>_build_info`."""
    started = time.time()

    def one(name: str, kind: str, help_text: str, value: Optional[Number]) -> Family:
        return Family(name, kind, help_text, [] if value is None else [Sample((), value)])

    def families() -> List[Family]:
        own = resource.getrusage(resource.RUSAGE_SELF)
        version = "%d.%d.%d" % sys.version_info[:3]
        return [
            Family(f"cmon_{program}_build_info", GAUGE, "Version of the program and of Python.",
                   [Sample((("version", __version__), ("python", version),
                            ("openssl", ssl.OPENSSL_VERSION)), 1)]),
            one("process_cpu_seconds_total", COUNTER, "CPU time of the process in seconds, its "
                "children left out.", own.ru_utime + own.ru_stime),
            one("process_start_time_seconds", GAUGE, "Start of the process, seconds since 1970.",
                started),
            one("process_resident_memory_bytes", GAUGE, "Resident memory in bytes.",
                _resident_bytes()),
            one("process_open_fds", GAUGE, "Open file descriptors.", _open_descriptors()),
            one("process_max_fds", GAUGE, "Limit of open file descriptors.",
                resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
            one("process_threads", GAUGE, "Threads of the process.", threading.active_count()),
        ]
    registry.collect(families)

# --- cache and throttle [kit] --------------------------------------------------------------------

K = TypeVar("K")
V = TypeVar("V")


class _Entry(Generic[V]):
    __slots__ = ("lock", "value", "at", "used")

    def __init__(self) -> None:
        self.lock = threading.Lock()        # held by the thread that builds this value
        self.value: Optional[Tuple[V]] = None
        self.at = 0.0
        self.used = 0.0


class Cache(Generic[K, V]):
    """Values with a lifetime, each built by one thread while others wait for it, not for others."""

    def __init__(self, now: Callable[[], float] = time.monotonic, limit: int = 10_000) -> None:
        self._now = now
        self._limit = limit
        self._entries: Dict[K, _Entry[V]] = {}
        self._lock = threading.Lock()       # _entries, never held while a value is built

    def get(self, key: K, lifetime: float, build: Callable[[], V]) -> Tuple[V, float]:
        """The value and its age in seconds; what `build` raises is the caller's."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._make_room()
                entry = self._entries[key] = _Entry()
            entry.used = self._now()
        with entry.lock:
            if entry.value is not None and self._now() - entry.at < lifetime:
                return entry.value[0], self._now() - entry.at
            value = build()
            entry.value, entry.at = (value,), self._now()
            return value, 0.0

    def drop(self, key: K) -> None:
        """Forget one value."""
        with self._lock:
            self._entries.pop(key, None)

    def retain(self, keys: Iterable[K]) -> None:
        """Forget all but these: zones, accounts and nodes that are gone."""
        kept = set(keys)
        with self._lock:
            self._entries = {key: entry for key, entry in self._entries.items() if key in kept}

    def _make_room(self) -> None:
        if len(self._entries) >= self._limit:
            del self._entries[min(self._entries, key=lambda key: self._entries[key].used)]


class Breaker:
    """Stops work that keeps failing, and tries it again by itself.

    After `failures` in a row it is open for `first` seconds, then one try is let through; each
    failed try doubles the time, to `longest`. Times vary by a tenth so that breakers that opened
    together do not try together. Not locked: its owner is one thread or holds a lock.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic,
                 random: Callable[[], float] = random.random,
                 failures: int = 3, first: float = 30.0, longest: float = 480.0) -> None:
        self._now, self._random = now, random
        self._failures, self._first, self._longest = failures, first, longest
        self._count = 0
        self._wait = first
        self._until = 0.0
        self.open = False
        self.reason = ""
        self.since = 0.0                    # when it opened, on the clock that it was given

    def allows(self) -> bool:
        """Whether to try now; while it is open, one caller is told yes at the end of each wait."""
        if not self.open:
            return True
        if self._now() < self._until:
            return False
        self._until = self._now() + self._first     # one try at a time
        return True

    def succeeded(self) -> None:
        """The work went well: closed again."""
        self._count, self._wait, self.open, self.reason = 0, self._first, False, ""

    def failed(self, reason: str) -> None:
        """The work failed; `reason` is kept for people."""
        self._count += 1
        self.reason = reason
        if not self.open and self._count < self._failures:
            return
        if not self.open:
            self.open, self.since = True, self._now()
        else:
            self._wait = min(self._wait * 2, self._longest)
        self._until = self._now() + self._wait * (0.9 + 0.2 * self._random())

    @property
    def retry_seconds(self) -> float:
        """How long until the next try; 0 when closed."""
        return max(self._until - self._now(), 0.0) if self.open else 0.0


class TokenBucket:
    """So many a second, and a burst at once. Not locked: its owner is one thread."""
    __slots__ = ("rate", "burst", "level", "_at", "_now")

    def __init__(self, rate_per_second: float, burst: float,
                 now: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst, self.level = rate_per_second, burst, burst
        self._now = now
        self._at = now()

    def refill(self) -> None:
        """Bring the level up to now; a clock that went back adds nothing."""
        at = self._now()
        self.level = min(self.burst, self.level + max(at - self._at, 0.0) * self.rate)
        self._at = at

    def take(self, amount: float = 1.0) -> float:
        """0.0 when admitted, else the seconds until `amount` would be there (inf: never)."""
        self.refill()
        if self.level >= amount:
            self.level -= amount
            return 0.0
        return (amount - self.level) / self.rate if self.rate > 0 else math.inf


class Pool:
    """A bounded number of threads, started when there is work, and a bounded queue before them."""

    def __init__(self, name: str, size: int, limit: int = 1024) -> None:
        self.name, self.size = name, size
        self._jobs: queue.SimpleQueue[Optional[Tuple[Callable[..., object], Tuple[Any, ...]]]] = \
            queue.SimpleQueue()
        self._limit = limit
        self._lock = threading.Lock()       # the three counts below
        self.threads = 0
        self.idle = 0
        self.waiting = 0

    def submit(self, function: Callable[..., object], *args: Any) -> bool:
        """Have a thread call it; False when the queue is full."""
        with self._lock:
            if self.waiting >= self._limit:
                return False
            self.waiting += 1
            start = self.waiting > self.idle and self.threads < self.size
            if start:
                self.threads += 1
        self._jobs.put((function, args))
        if start:
            try:
                threading.Thread(target=self._run, name=f"{self.name}-{self.threads}",
                                 daemon=True).start()
            except RuntimeError:            # no more threads: those that are there do the work
                with self._lock:
                    self.threads -= 1
                    if not self.threads:
                        raise
        return True

    def _run(self) -> None:
        while True:
            with self._lock:
                self.idle += 1
            job = self._jobs.get()
            with self._lock:
                self.idle -= 1
                if job is not None:
                    self.waiting -= 1
            if job is None:
                return
            function, args = job
            try:
                function(*args)
            except Exception:               # a job answers for itself; this is a bug of ours
                log.exception("job %s failed", getattr(function, "__qualname__", function))

    def close(self) -> None:
        """Let the threads end when the queue is empty."""
        for _ in range(self.size):
            self._jobs.put(None)

# --- HTTP [kit] ----------------------------------------------------------------------------------

READ_SIZE = 16384       # one TLS record: nothing stays inside OpenSSL, where no selector sees it
ACCEPTS = 64            # connections taken at once before others are served
HEADS = 1024            # parsed request heads that a listener remembers
BACKLOG = 1024          # socketserver's 5 costs a second when many connect at once
PACK_FROM = 512         # bytes; smaller bodies are not worth gzip's head and time
TICK_SECONDS = 0.05     # how exactly the deadlines of parked answers are kept
DURATIONS = (0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)


@dataclass(frozen=True)
class Limits:
    """What one client, or all together, may cost; each refusal is counted under its name."""
    connections: int = 16_384       # beyond, the longest idle one is closed for the new one
    head_bytes: int = 16_384        # request line and headers
    header_count: int = 100
    body_bytes: int = 65_536
    head_seconds: float = 10.0      # from a request's first byte to its last
    idle_seconds: float = 360.0     # longer than the 300 s for which Prometheus keeps connections
    write_seconds: float = 30.0     # for a client that does not read its answer
    handshake_seconds: float = 10.0
    workers: int = 8                # threads for handlers that may block
    handshakes: int = 2             # threads for TLS handshakes, which are mostly arithmetic
    grace_seconds: float = 10.0     # at a stop, for what is in flight


_LINE = re.compile(rb"([A-Z]{1,20}) ([!-~]+) HTTP/([0-9])\.([0-9])\r\n")
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*((?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*"
                     rb"[!-~\x80-\xff])?)?)[ \t]*\r\n")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._~-]*)(?::[0-9]{0,5})?")
_BARE_LF = re.compile(rb"(?<!\r)\n")


def _header_fields(head: bytes, start: int, count: int) -> Dict[str, str]:
    """The header lines of a head as a dictionary; raises Refused."""
    headers: Dict[str, str] = {}
    position = start
    end = len(head) - 2                     # the empty line
    while position < end:
        match = _HEADER.match(head, position)
        if match is None:
            line = head[position:position + 60].split(b"\r\n")[0]
            raise Refused(400, f"bad request: {line!r} is not a header line")
        position = match.end()
        name = match.group(1).decode("ascii").lower()
        value = match.group(2).decode("latin-1")
        if name in headers:
            if name in ("host", "content-length", "transfer-encoding"):
                raise Refused(400, f"bad request: {name} stands twice")
            value = f"{headers[name]}, {value}"
        headers[name] = value
        count -= 1
        if count < 0:
            raise Refused(431, "too many header lines")
    return headers


def _takes_gzip(accept_encoding: str) -> bool:
    for item in accept_encoding.lower().split(","):
        coding, _, parameter = item.partition(";")
        if coding.strip() in ("gzip", "x-gzip"):
            return not re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", parameter)
    return False


def parse_head(head: bytes, limits: Limits) -> Tuple[Any, ...]:
    """The fields of a Request but for its peer, from a head that ends in an empty line.

    A pure function of the bytes, strict on purpose (RFC 9112): what two parsers could read in two
    ways is refused. Raises Refused.
    """
    line = _LINE.match(head)
    if line is None:
        raise Refused(400, "bad request: the first line is not 'METHOD target HTTP/1.1'")
    if line.group(3) != b"1" or line.group(4) not in (b"0", b"1"):
        raise Refused(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
    target = line.group(2).decode("ascii")
    headers = _header_fields(head, line.end(), limits.header_count)
    host = headers.get("host")
    if host is None and line.group(4) == b"1":
        raise Refused(400, "bad request: no Host header")
    path = target
    if not path.startswith("/"):
        absolute = re.fullmatch(r"https?://([^/?#]+)(/[^#]*)?", path, re.IGNORECASE)
        if absolute is None:
            raise Refused(400, "bad request: the target must be a path")
        host, path = absolute.group(1), absolute.group(2) or "/"
    named = _HOST.fullmatch(host or "")
    if named is None:
        raise Refused(400, "bad request: the Host header is not a host name")
    path, _, query_text = path.partition("?")
    try:
        pairs = urllib.parse.parse_qsl(query_text, keep_blank_values=True, errors="strict",
                                       max_num_fields=32)
        path = urllib.parse.unquote(path, errors="strict")
    except ValueError:
        raise Refused(400, "bad request: the target is not UTF-8, or has too many parameters"
                      ) from None
    query = dict(pairs)
    if len(query) != len(pairs):
        raise Refused(400, "bad request: a parameter stands twice")
    connection = [word.strip() for word in headers.get("connection", "").lower().split(",")]
    keep = "close" not in connection and (line.group(4) == b"1" or "keep-alive" in connection)
    return (line.group(1).decode("ascii"), target, path, query, headers, b"",
            named.group(1).lower(), _takes_gzip(headers.get("accept-encoding", "")), keep)


def _body_length(headers: Mapping[str, str], limits: Limits) -> int:
    length = headers.get("content-length")
    if "transfer-encoding" in headers:
        if length is not None:
            raise Refused(400, "bad request: Content-Length and Transfer-Encoding together")
        raise Refused(411, "a request body needs a Content-Length here")
    if length is None:
        return 0
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise Refused(400, "bad request: Content-Length is not a number")
    if int(length) > limits.body_bytes:
        raise Refused(413, f"the request body is larger than {limits.body_bytes} bytes")
    return int(length)


def scrape_deadline(request: Request, now: float, default: float = 9.0) -> float:
    """Until when this scrape must be answered, on the clock of `now`.

    Prometheus says how long it waits; a tenth of it, half a second at most, is for the way back.
    The proxy has taken that margin already. Raises Refused for a header that is no number.
    """
    word = request.headers.get("x-prometheus-scrape-timeout-seconds")
    if word is None:
        return now + default
    try:
        seconds = float(word) if len(word) <= 32 else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise Refused(400, "X-Prometheus-Scrape-Timeout-Seconds is not a number of seconds above 0")
    seconds = min(seconds, 3600.0)
    if "x-joyent-cmon-opts" in request.headers:
        return now + seconds
    return now + seconds - min(0.1 * seconds, 0.5)


_phrases = {status: entry[0] for status, entry in
            http.server.BaseHTTPRequestHandler.responses.items()}
_date = (0, "")                             # the second and its text; any thread may renew it


def _http_date() -> str:
    global _date
    second = int(time.time())
    if _date[0] != second:
        day = time.gmtime(second)
        _date = (second, time.strftime("%%s, %d %%s %Y %H:%M:%S GMT", day) % (
            ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[day.tm_wday],
            ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
            [day.tm_mon - 1]))
    return _date[1]


def gzip(body: bytes) -> bytes:
    """The body as a gzip stream (RFC 1952), level 1: a third of level 6's time, 10 % larger."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return packer.compress(body) + packer.flush()


def _wire(response: Response, body: bytes, extra: str) -> bytes:
    more = "".join([f"{name}: {value}\r\n" for name, value in response.headers])
    return (f"HTTP/1.1 {response.status} {_phrases.get(response.status, 'Unknown')}\r\n"
            f"Date: {_http_date()}\r\nContent-Type: {response.content_type}\r\n{more}{extra}"
            f"Content-Length: {len(body)}\r\n\r\n").encode("latin-1") + body


def _packs(response: Response) -> bool:
    return len(response.body) >= PACK_FROM and not any(
        name.lower() == "content-encoding" for name, _ in response.headers)


_VARIES = "Vary: Accept-Encoding\r\n"
_PACKED = _VARIES + "Content-Encoding: gzip\r\n"


def prepare(response: Response) -> Prepared:
    """A whole answer for the wire, to be sent many times."""
    if not _packs(response):
        whole = _wire(response, response.body, "")
        return Prepared(response.status, whole, whole)
    return Prepared(response.status, _wire(response, response.body, _VARIES),
                    _wire(response, gzip(response.body), _PACKED))


def wire(answer: Answer, packed: bool = False, head_only: bool = False,
         close: bool = False) -> bytes:
    """An answer as the bytes that are sent."""
    if isinstance(answer, Prepared):
        whole = answer.packed if packed else answer.plain
    elif not _packs(answer):
        whole = _wire(answer, answer.body, "")
    elif packed:
        whole = _wire(answer, gzip(answer.body), _PACKED)
    else:
        whole = _wire(answer, answer.body, _VARIES)
    if head_only:
        whole = whole[:whole.index(b"\r\n\r\n") + 4]
    if close:
        whole = whole.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    return whole


class _Stats:
    """Counts of one route; the server's thread alone writes and reads them."""
    __slots__ = ("route", "statuses", "buckets", "seconds")

    def __init__(self, route: str) -> None:
        self.route = route
        self.statuses: Dict[int, int] = {}
        self.buckets = [0] * (len(DURATIONS) + 1)
        self.seconds = 0.0

    def count(self, status: int, seconds: float) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.buckets[bisect.bisect_left(DURATIONS, seconds)] += 1
        self.seconds += seconds


class _Head(NamedTuple):
    """What a listener remembers of a request's bytes: parsed and routed once."""
    fields: Tuple[Any, ...]         # of Request, but for its peer
    route: Route
    args: Tuple[str, ...]
    stats: _Stats
    simple: bool                    # GET on a connection that stays open: prepared bytes fit as is
    packed: bool


Fallback = Callable[[Request], Optional[Tuple[Route, Tuple[str, ...]]]]


class Router:
    """Finds the route of a request: a table for plain paths, patterns for the rest."""

    def __init__(self, routes: Sequence[Route], fallback: Optional[Fallback] = None) -> None:
        self._patterns = [(re.compile(re.sub(r"\\{\w+\\}", "([^/]+)", re.escape(route.pattern))),
                           route) for route in routes]
        self._fallback = fallback

    def find(self, request: Request) -> Tuple[Route, Tuple[str, ...]]:
        """Route and captured segments; raises Refused (404, 405). Pure."""
        special = self._fallback(request) if self._fallback is not None else None
        if special is not None:
            return special
        method = "GET" if request.method == "HEAD" else request.method
        allowed: List[str] = []
        for pattern, route in self._patterns:
            match = pattern.fullmatch(request.path)
            if match is not None and route.method == method:
                return route, match.groups()
            if match is not None:
                allowed += ["GET", "HEAD"] if route.method == "GET" else [route.method]
        if allowed:
            shown = ", ".join(allowed)
            raise Refused(405, f"{request.method} is not for this path; it takes {shown}",
                          ("Allow", shown), code="method_not_allowed")
        raise Refused(404, "no such path; / lists what there is", code="no_such_path")


def call(route: Route, request: Request, args: Sequence[str]) -> Union[Answer, Later]:
    """A handler's answer; refusals and faults become answers, too."""
    try:
        return route.handler(request, *args)
    except Refused as refusal:
        return text(refusal.status, str(refusal), *refusal.headers)
    except Exception:
        log.exception("%s %r failed", request.method, request.target[:200])
        return text(500, "internal error; see the log", ("X-Cmon-Error", "internal"))


def respond(routes: Sequence[Route], request: Request) -> Union[Answer, Later]:
    """Route and answer a request, without any socket."""
    try:
        route, args = Router(routes).find(request)
    except Refused as refusal:
        return text(refusal.status, str(refusal), *refusal.headers)
    return call(route, request, args)


class _Watch:
    """A socket of the application in the server's selector."""
    __slots__ = ("ready",)

    def __init__(self, callback: Callable[[int], None]) -> None:
        self.ready = callback


def _refusing(refusal: Refused) -> Handler:
    def refuse(_request: Request) -> Answer:
        raise refusal.with_traceback(None)
    return refuse


class Listener:
    """A listening socket with its routes; its connections remember where they came from."""

    def __init__(self, server: Server, listening: socket.socket, routes: Sequence[Route],
                 tls: Optional[ssl.SSLContext], name: str, fallback: Optional[Fallback]) -> None:
        self.server, self.socket, self.tls, self.name = server, listening, tls, name
        self.router = Router(routes, fallback)
        self.heads: Dict[bytes, _Head] = {}
        self.address: Tuple[str, int] = listening.getsockname()[:2]
        self._stats: Dict[str, _Stats] = {}
        self._paused = False

    def set_tls(self, context: ssl.SSLContext) -> None:
        """New connections use this; those that are open stay as they are."""
        self.tls = context

    def ready(self, _mask: int) -> None:
        """Take what waits, but not for ever: others are served in between."""
        for _ in range(ACCEPTS):
            try:
                accepted, peer = self.socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:        # out of descriptors or memory: leave it in the queue
                log.warning("cannot accept connections for a second: %s", error)
                self.server.refused("descriptors")
                self.server.unwatch(self.socket)
                self.server.call_later(1.0, self.server.register, self.socket, self)
                return
            self.server.welcome(self, accepted, peer)

    def head(self, raw: bytes, fields: Tuple[Any, ...], peer: Peer) -> _Head:
        """Route a parsed head. Remembered when it has no body."""
        request = Request._make((*fields, peer))
        args: Tuple[str, ...] = ()
        try:
            route, args = self.router.find(request)
        except Refused as refusal:
            route = Route(request.method, "none", _refusing(refusal))
        stats = self.stats(route.pattern)
        found = _Head(fields, route, args, stats, request.method == "GET" and request.keep,
                      request.gzip)
        if "content-length" not in request.headers:
            if len(self.heads) >= HEADS:
                self.heads.clear()
            self.heads[raw] = found
        return found

    def stats(self, route: str) -> _Stats:
        """The counts of a route by its pattern."""
        stats = self._stats.get(route)
        if stats is None:
            stats = self._stats[route] = _Stats(route)
        return stats

    def all_stats(self) -> List[_Stats]:
        """The counts of all routes that were asked for."""
        return list(self._stats.values())


IDLE, HANDSHAKE, READING, BUSY, WRITING = range(5)      # what a connection is about
_LIMIT_NAMES = {IDLE: "idle_seconds", HANDSHAKE: "handshake_seconds", READING: "head_seconds",
                WRITING: "write_seconds"}
_AGAIN = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Connection(http.server.BaseHTTPRequestHandler):
    """One client connection. All its methods run in the server's thread, but for `shake`.

    `http.server` brings the interface; reading, dispatch and writing are replaced, since a thread
    and two buffered files for each connection are what they would cost.
    """
    __slots__ = ("_socket", "_server", "_listener", "_peer", "_buffer", "_state", "_since", "_head",
                 "_rest", "_keep", "_events", "_later", "_end")

    def __init__(self, accepted: socket.socket, peer: Peer, server: Server, listener: Listener
                 ) -> None:
        self._socket = accepted
        self._server = server
        self._listener = listener
        self._peer = peer
        self._buffer = b""              # bytes of a request that is not complete, or of the next
        self._state = IDLE
        self._since = server.now()      # when this state began
        self._head: Optional[_Head] = None      # of the request that is being answered
        self._rest: Union[bytes, memoryview] = b""    # of an answer that was not taken whole
        self._keep = True               # the connection stays open after this answer
        self._events = 0                # what the selector waits for
        self._later: Optional[Later] = None
        self._end = False               # the client has sent all that it will

    # reading

    def ready(self, mask: int) -> None:
        """The selector's call: the socket can be read or written."""
        if self._state == WRITING:
            self._send(self._rest)
            return
        if self._state == HANDSHAKE:
            self._wait_for(0)
            self._server.shake(self)
            return
        try:
            received = self._socket.recv(READ_SIZE)
        except _AGAIN:
            return
        except OSError:
            self.close()
            return
        if self._state == IDLE and not self._buffer:
            found = self._listener.heads.get(received)
            if found is not None:
                self._since = self._server.now()
                self._answer(found, Request._make((*found.fields, self._peer)))
                return
        self._received(received)

    def _received(self, received: bytes) -> None:
        self._buffer += received
        if not received:
            self._end = True                # a client may close its side and wait for the answer
        if self._state == BUSY:
            if self._end or len(self._buffer) > self._server.limits.head_bytes:
                self._wait_for(0)
        elif self._end:
            self.close()
        else:
            if self._state == IDLE:
                self._enter(READING)
            self.parse()

    def parse(self) -> None:
        """Answer the request in the buffer, if it is whole."""
        try:
            whole = self._take()
        except Refused as refusal:          # nothing that follows can be trusted
            self._listener.stats("bad request").count(refusal.status, 0.0)
            self._send(wire(text(refusal.status, str(refusal), *refusal.headers), close=True),
                       keep=False)
        except _AGAIN:
            return
        except OSError:
            self.close()
        else:
            if whole is not None:
                self._answer(*whole)

    def _take(self) -> Optional[Tuple[_Head, Request]]:
        """Take one request from the buffer; None while it is not whole; raises Refused."""
        limits = self._server.limits
        end = self._buffer.find(b"\r\n\r\n") + 4
        if end < 4 or end > limits.head_bytes:
            if len(self._buffer) > limits.head_bytes:
                self._server.refused("head_bytes")
                raise Refused(431, f"the request's head is larger than {limits.head_bytes} bytes")
            if self._buffer[0] in (0x16, 0x80):         # a TLS record, of today or of SSLv2
                raise Refused(400, "bad request: this port speaks HTTP, not TLS")
            if _BARE_LF.search(self._buffer):
                raise Refused(400, "bad request: lines must end in CR LF")
            return None
        raw = self._buffer[:end]
        found = self._listener.heads.get(raw)
        body = b""
        if found is None:
            fields = parse_head(raw, limits)
            length = _body_length(fields[4], limits)
            body = self._buffer[end:end + length]
            if len(body) < length:
                if not body and fields[4].get("expect", "").lower() == "100-continue":
                    self._socket.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                return None
            end += length
            found = self._listener.head(raw, fields, self._peer)
        self._buffer = self._buffer[end:]
        request = Request._make((*found.fields, self._peer))
        return found, request._replace(body=body) if body else request

    # answering

    def _answer(self, found: _Head, request: Request) -> None:
        self._head = found
        self._state = BUSY
        if found.route.blocking:
            if not self._server.spawn(self._work, found, request):
                self._server.refused("workers")
                self._deliver(text(503, "too busy; try again in a second", ("Retry-After", "1")))
            return
        answer = call(found.route, request, found.args)
        if isinstance(answer, Later):
            self._park(answer)
        else:
            self._deliver(answer)

    def _work(self, found: _Head, request: Request) -> None:
        """In a worker: run a handler that may block."""
        answer = call(found.route, request, found.args)
        if isinstance(answer, Later):
            self._server.call_soon(self._park, answer)
        else:
            self._server.call_soon(self._deliver, answer)

    def _park(self, later: Later) -> None:
        """Wait without a thread."""
        if self._head is None:              # closed while a worker made it
            return
        self._later = later
        self._server.park(self, later)
        later.attach(lambda answer: self._server.soon(self._later_done, later, answer))

    def expire(self, now: float) -> None:
        """When a parked answer's deadline has passed, send what there is."""
        later = self._later
        if later is not None and now >= later.deadline:
            try:
                answer = later.expired()
            except Refused as refusal:
                answer = text(refusal.status, str(refusal), *refusal.headers)
            later.finish(answer)

    def _later_done(self, later: Later, answer: Answer) -> None:
        if self._later is later:
            self._later = None
            self._server.unpark(self)
            self._deliver(answer)

    def _deliver(self, answer: Answer) -> None:
        found = self._head
        if found is None:                   # closed in the meantime
            return
        self._head = None
        now = self._server.now()
        found.stats.count(answer.status, now - self._since)
        self._since = now
        if found.simple and type(answer) is Prepared and not self._server.stopping:
            self._send(answer.packed if found.packed else answer.plain)
            return
        keep = bool(found.fields[8]) and not self._server.stopping
        self._send(wire(answer, found.packed, found.fields[0] == "HEAD", not keep), keep)

    # writing

    def _send(self, whole: Union[bytes, memoryview], keep: Optional[bool] = True) -> None:
        """One write for head and body; what the socket does not take waits for it."""
        try:
            sent = self._socket.send(whole)
        except _AGAIN:
            sent = 0
        except OSError:
            self.close()
            return
        if self._state != WRITING:
            self._keep = bool(keep)
        if sent < len(whole):
            self._rest = memoryview(whole)[sent:]
            if self._state != WRITING:
                self._enter(WRITING)
                self._wait_for(selectors.EVENT_WRITE)
        elif self._keep and not self._end:
            self._rest = b""
            self._state = IDLE
            self._wait_for(selectors.EVENT_READ)
            if self._buffer:                # pipelined: in its turn
                self._enter(READING)
                self._server.call_soon(self._again)
        else:
            self.close()

    def _again(self) -> None:
        if self._state == READING:
            self.parse()

    # life

    def begin(self) -> None:
        """After the accept: the handshake first, where there is one."""
        if self._listener.tls is not None:
            self._enter(HANDSHAKE)
            self._server.shake(self)
        else:
            self._wait_for(selectors.EVENT_READ)

    def shake(self) -> None:
        """In a worker: one step of the handshake, which never blocks."""
        wanted: Union[int, Exception] = 0
        try:
            typing.cast(ssl.SSLSocket, self._socket).do_handshake()
        except ssl.SSLWantReadError:
            wanted = selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            wanted = selectors.EVENT_WRITE
        except (OSError, ValueError) as error:
            wanted = error
        self._server.call_soon(self._shaken, wanted)

    def _shaken(self, wanted: Union[int, Exception]) -> None:
        if isinstance(wanted, Exception):
            self._server.shook("failed")
            log.debug("no TLS with %s: %r", self._peer.address, str(wanted)[:200])
            if getattr(wanted, "reason", "") == "HTTP_REQUEST":
                self._say_tls()
            self.close()
        elif wanted:
            self._wait_for(wanted)
        else:
            self._server.shook("done")
            self._peer.certificate = typing.cast(ssl.SSLSocket, self._socket).getpeercert(True)
            self._state = IDLE
            self._since = self._server.now()
            self._wait_for(selectors.EVENT_READ)
            self.ready(selectors.EVENT_READ)        # the request often comes with the last step

    def _say_tls(self) -> None:
        """Tell who speaks plain HTTP to a TLS port what is wrong."""
        plain = socket.socket(fileno=self._socket.detach())
        try:
            plain.send(wire(text(400, "this port speaks TLS: use https://"), close=True))
        except OSError:
            pass                            # they hear nothing, as with any other server
        plain.close()

    def overdue(self, now: float) -> None:
        """Close when this state has lasted too long."""
        name = _LIMIT_NAMES.get(self._state)
        with_worker = self._state == HANDSHAKE and not self._events
        if name and not with_worker and now - self._since > getattr(self._server.limits, name):
            if self._state != IDLE:
                self._server.refused(name)
            if self._state == READING:
                try:
                    self._socket.send(wire(text(408, "the request did not arrive in time"),
                                           close=True))
                except OSError:
                    pass                    # it is closed next in any case
            self.close()

    def leave(self) -> None:
        """The server stops: stay only for an answer that is under way."""
        if self._state in (IDLE, READING) or (self._state == HANDSHAKE and self._events):
            self.close()

    @property
    def idle_since(self) -> Optional[float]:
        """Since when nothing is asked; None while something is."""
        return self._since if self._state == IDLE else None

    @property
    def state(self) -> int:
        """IDLE, HANDSHAKE, READING, BUSY or WRITING."""
        return self._state

    def _enter(self, state: int) -> None:
        self._state = state
        self._since = self._server.now()
        self._server.pressing.add(self)

    def _wait_for(self, events: int) -> None:
        if events != self._events:
            self._server.select(self._socket, self._events, events, self)
            self._events = events

    def close(self) -> None:
        """End it; may be called twice."""
        later, self._later = self._later, None
        self._head = None
        if self._server.forget(self):
            self._wait_for(0)
            if later is not None and later.on_cancel is not None:
                later.on_cancel()
            if isinstance(self._socket, ssl.SSLSocket) and self._state != HANDSHAKE:
                try:
                    self._socket.unwrap()   # says goodbye, and does not wait for theirs
                except (OSError, ValueError):
                    pass                    # they are gone, or have not answered yet
            self._socket.close()


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """An HTTP server in one thread with workers beside it.

    The thread in `serve_forever` owns all sockets: it reads, routes, answers what is at hand and
    parks the rest. A connection that is idle, or whose answer comes later, holds no thread.
    """
    daemon_threads = True

    def __init__(self, program: str, registry: Registry, limits: Limits = Limits(),
                 now: Callable[[], float] = time.monotonic) -> None:
        socketserver.BaseServer.__init__(self, ("", 0), Connection)  # type: ignore[arg-type]
        self.limits = limits
        self.now = now
        self.listeners: List[Listener] = []
        self.connections: set[Connection] = set()
        self.pressing: set[Connection] = set()      # those with a limit of seconds
        self.stopping = False
        self._selector = selectors.DefaultSelector()
        self._parked: set[Connection] = set()
        self._calls: collections.deque[Tuple[Callable[..., object], Tuple[Any, ...]]] = \
            collections.deque()
        self._timers: List[Tuple[float, int, Callable[..., object], Tuple[Any, ...]]] = []
        self._serial = 0
        self._thread = threading.get_ident()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._woken = False
        self._selector.register(self._wake_read, selectors.EVENT_READ, _Watch(self._drain))
        self._workers = Pool(f"{program}-worker", limits.workers)
        self._shakers = Pool(f"{program}-tls", limits.handshakes, limits.connections)
        self._done = threading.Event()
        self._ticking = False
        self._program = program
        self._refusals: Dict[str, int] = {}
        self._handshakes: Dict[str, int] = {}
        self._accepted = 0
        registry.collect(self._families)
        self.every(0.25, self._sweep_pressing)
        self.every(5.0, self._sweep_idle)

    # set-up

    def listen(self, address: Union[Tuple[str, int], socket.socket], routes: Sequence[Route],
               tls: Optional[ssl.SSLContext] = None, name: str = "main",
               fallback: Optional[Fallback] = None) -> Listener:
        """Listen on one more address, or on a socket that listens already; raises OSError.

        `fallback` is asked first and must be a pure function of the request's bytes.
        """
        if isinstance(address, socket.socket):
            listening = address
        else:
            try:
                listening = socket.create_server(
                    address, family=socket.AF_INET6 if ":" in address[0] else socket.AF_INET,
                    backlog=BACKLOG)
            except OSError as error:
                raise OSError(error.errno, f"cannot listen on {address[0]}:{address[1]}: "
                              f"{(error.strerror or str(error)).lower()}") from None
        listening.setblocking(False)
        listener = Listener(self, listening, routes, tls, name, fallback)
        self.listeners.append(listener)
        self.register(listening, listener)
        return listener

    def register(self, listening: socket.socket, listener: Listener) -> None:
        """Begin, or begin again, to accept."""
        if not self.stopping:
            self._selector.register(listening, selectors.EVENT_READ, listener)

    # the loop

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until `stop`, then finish what is in flight within the grace time."""
        self._thread = threading.get_ident()
        end = math.inf
        while not (self.stopping and (not self.connections or self.now() >= end)):
            for key, mask in self._selector.select(self._until_next(end)):
                try:
                    key.data.ready(mask)
                except Exception:           # of one request; the others go on
                    log.exception("a connection failed")
                    if isinstance(key.data, Connection):
                        key.data.close()
            self._run_due()
            if self.stopping and end == math.inf:
                end = self.now() + self.limits.grace_seconds
                self._leave()
        self.server_close()
        self._done.set()

    def _until_next(self, end: float) -> float:
        if self._calls:
            return 0.0
        due = self._timers[0][0] if self._timers else math.inf
        return max(0.0, min(due, end) - self.now())

    def _run_due(self) -> None:
        for _ in range(len(self._calls)):
            function, args = self._calls.popleft()
            self._guarded(function, args)
        while self._timers and self._timers[0][0] <= self.now():
            _, _, function, args = heapq.heappop(self._timers)
            self._guarded(function, args)

    def _guarded(self, function: Callable[..., object], args: Tuple[Any, ...]) -> None:
        try:
            function(*args)
        except Exception:
            log.exception("%s failed", getattr(function, "__qualname__", function))
            owner = getattr(function, "__self__", None)
            if isinstance(owner, Connection):
                owner.close()

    def stop(self) -> None:
        """Stop gracefully; from any thread and from signal handlers."""
        self.stopping = True
        self._wake()

    def shutdown(self) -> None:
        """Stop, and wait until it has."""
        self.stop()
        self._done.wait()

    def server_close(self) -> None:
        """Close all sockets; the threads end when they are done."""
        for connection in list(self.connections):
            connection.close()
        for listener in self.listeners:
            self.unwatch(listener.socket)
            listener.socket.close()
        self._workers.close()
        self._shakers.close()
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()

    def _leave(self) -> None:
        for listener in self.listeners:
            self.unwatch(listener.socket)
            listener.socket.close()
        for connection in list(self.connections):
            connection.leave()

    # calls and timers

    def call_soon(self, function: Callable[..., object], *args: Any) -> None:
        """From any thread: call it in the server's thread, soon and in order."""
        self._calls.append((function, args))
        if threading.get_ident() != self._thread:
            self._wake()

    def soon(self, function: Callable[..., object], *args: Any) -> None:
        """As `call_soon`, but at once when this is the server's thread already."""
        if threading.get_ident() == self._thread:
            function(*args)
        else:
            self.call_soon(function, *args)

    def call_later(self, seconds: float, function: Callable[..., object], *args: Any) -> None:
        """In the server's thread or before it runs: call it there after so many seconds."""
        self._serial += 1
        heapq.heappush(self._timers, (self.now() + seconds, self._serial, function, args))

    def every(self, seconds: float, function: Callable[[], object]) -> None:
        """Call it in the server's thread again and again."""
        def again() -> None:
            self.call_later(seconds, again)
            function()
        self.call_later(seconds, again)

    def spawn(self, function: Callable[..., object], *args: Any) -> bool:
        """Have a worker call it; False when too much waits already."""
        return self._workers.submit(function, *args)

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            try:
                self._wake_write.send(b"!")
            except OSError:
                pass                # full: it will wake; closed: there is nothing left to wake

    def _drain(self, _mask: int) -> None:
        try:
            self._wake_read.recv(4096)
        except _AGAIN:
            pass                    # the other call of two had it
        self._woken = False         # after the read, which might take a later wake's byte; what
        # was queued until here without a byte is run by this turn of the loop

    # sockets

    def watch(self, watched: socket.socket, events: int, callback: Callable[[int], None]) -> None:
        """Call `callback(mask)` when a non-blocking socket of the application is ready."""
        try:
            self._selector.modify(watched, events, _Watch(callback))
        except KeyError:
            self._selector.register(watched, events, _Watch(callback))

    def unwatch(self, watched: socket.socket) -> None:
        """Watch it no more; nothing happens when it is not watched."""
        try:
            self._selector.unregister(watched)
        except (KeyError, ValueError):
            pass

    def select(self, watched: socket.socket, before: int, events: int, data: Connection) -> None:
        """A connection's change of what it waits for."""
        if not before:
            self._selector.register(watched, events, data)
        elif not events:
            self._selector.unregister(watched)
        else:
            self._selector.modify(watched, events, data)

    # connections

    def welcome(self, listener: Listener, accepted: socket.socket, address: Any) -> None:
        """Begin to serve one more connection."""
        self._accepted += 1
        if len(self.connections) >= self.limits.connections and not self._make_room():
            accepted.close()
            return
        accepted.setblocking(False)
        try:
            if accepted.family != getattr(socket, "AF_UNIX", None):
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if listener.tls is not None:
                accepted = listener.tls.wrap_socket(accepted, server_side=True,
                                                    do_handshake_on_connect=False)
        except (OSError, ValueError) as error:          # gone before we looked
            log.debug("a connection ended at once: %s", error)
            accepted.close()
            return
        peer = Peer(sys.intern(str(address[0])) if address else "", listener.name)
        connection = Connection(accepted, peer, self, listener)
        self.connections.add(connection)
        connection.begin()

    def _make_room(self) -> bool:
        """At the limit: close the connection that has been idle the longest."""
        self.refused("connections")
        idle = [(connection.idle_since, id(connection), connection)
                for connection in self.connections if connection.idle_since is not None]
        if idle:
            min(idle)[2].close()
        return bool(idle)

    def forget(self, connection: Connection) -> bool:
        """Whether it was still open."""
        known = connection in self.connections
        self.connections.discard(connection)
        self.pressing.discard(connection)
        self._parked.discard(connection)
        return known

    def shake(self, connection: Connection) -> None:
        """Take the next step of a handshake in a worker."""
        if not self._shakers.submit(connection.shake):
            self.refused("handshakes")
            connection.close()

    def shook(self, result: str) -> None:
        """Count a handshake."""
        self._handshakes[result] = self._handshakes.get(result, 0) + 1

    def refused(self, limit: str) -> None:
        """Count what a limit has refused."""
        self._refusals[limit] = self._refusals.get(limit, 0) + 1

    def park(self, connection: Connection, later: Later) -> None:
        """Keep the deadline of an answer that comes later."""
        self._parked.add(connection)
        wait = later.deadline - self.now()
        if wait < TICK_SECONDS:
            self.call_later(max(wait, 0.0), lambda: connection.expire(self.now()))
        elif not self._ticking:
            self._ticking = True
            self.call_later(TICK_SECONDS, self._tick)

    def unpark(self, connection: Connection) -> None:
        """Its answer is there."""
        self._parked.discard(connection)

    def _tick(self) -> None:
        now = self.now()
        for connection in list(self._parked):
            self._guarded(connection.expire, (now,))
        self._ticking = bool(self._parked)
        if self._ticking:
            self.call_later(TICK_SECONDS, self._tick)

    def _sweep_pressing(self) -> None:
        now = self.now()
        for connection in list(self.pressing):
            connection.overdue(now)
            if connection.state in (IDLE, BUSY):
                self.pressing.discard(connection)

    def _sweep_idle(self) -> None:
        now = self.now()
        for connection in list(self.connections):
            connection.overdue(now)

    # own metrics

    def _families(self) -> List[Family]:
        prefix = f"cmon_{self._program}_http"
        stats = [stats for listener in self.listeners for stats in listener.all_stats()]
        merged: Dict[str, _Stats] = {}
        for one in stats:
            into = merged.setdefault(one.route, _Stats(one.route))
            for status, count in one.statuses.items():
                into.statuses[status] = into.statuses.get(status, 0) + count
            into.buckets = [a + b for a, b in zip(into.buckets, one.buckets)]
            into.seconds += one.seconds
        requests = [Sample((("route", name), ("code", str(status))), count)
                    for name, one in merged.items() for status, count in one.statuses.items()]
        durations: List[Sample] = []
        for name, one in merged.items():
            total = 0
            for bound, count in zip([*map(str, DURATIONS), "+Inf"], one.buckets):
                total += count
                durations.append(Sample((("route", name), ("le", bound)), total, "_bucket"))
            durations.append(Sample((("route", name),), one.seconds, "_sum"))
            durations.append(Sample((("route", name),), total, "_count"))
        names = ("idle", "handshake", "reading", "busy", "writing")
        states = [0] * len(names)
        for connection in self.connections:
            states[connection.state] += 1

        def labelled(label: str, counts: Mapping[str, int]) -> List[Sample]:
            return [Sample(((label, key),), count) for key, count in counts.items()]
        return [
            Family(f"{prefix}_requests_total", COUNTER, "Requests answered.", requests),
            Family(f"{prefix}_request_duration_seconds", HISTOGRAM, "Seconds from a request's "
                   "arrival to its answer.", durations),
            Family(f"{prefix}_connections", GAUGE, "Open connections by what they are about.",
                   labelled("state", dict(zip(names, states)))),
            Family(f"{prefix}_connections_accepted_total", COUNTER, "Connections accepted.",
                   [Sample((), self._accepted)]),
            Family(f"{prefix}_limit_refusals_total", COUNTER, "What a limit has refused or ended.",
                   labelled("limit", self._refusals)),
            Family(f"{prefix}_tls_handshakes_total", COUNTER, "TLS handshakes ended.",
                   labelled("result", self._handshakes)),
        ]

# --- client [kit] --------------------------------------------------------------------------------

MAX_BODY = 16 << 20             # bytes of an answer that a client of ours takes
MAX_HEAD = 65536
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t -~\x80-\xff]*)?\r\n")
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})(?:[ \t]*;[\t -~]*)?\r\n")


class ClientError(Exception):
    """The other side cannot be reached, or answers what is not HTTP; the text is for people."""


class AnswerReader:
    """Reads one HTTP/1.1 answer from the bytes that come, in any pieces; strict and bounded."""

    def __init__(self, head_request: bool = False, max_body: int = MAX_BODY) -> None:
        self.status = 0
        self.headers: Dict[str, str] = {}
        self.keep_alive = False
        self.done = False
        self.begun = False                  # a byte of it has come
        self._head_request = head_request
        self._max_body = max_body
        self._buffer = b""
        self._body: List[bytes] = []
        self._size = 0
        self._left: Optional[int] = None    # bytes of the body, or of this chunk, that are missing
        self._next: Callable[[], bool] = self._read_head

    @property
    def body(self) -> bytes:
        """The body, its chunks joined; as it came otherwise."""
        return self._body[0] if len(self._body) == 1 else b"".join(self._body)

    def feed(self, received: bytes) -> bool:
        """Take what came; True when the answer is whole. Raises ClientError."""
        self.begun = self.begun or bool(received)
        self._buffer = self._buffer + received if self._buffer else received
        while not self.done and self._next():
            pass
        if self.done and self._buffer:
            raise ClientError("the answer is longer than it says")
        return self.done

    def end(self) -> None:
        """The other side has closed; raises ClientError when that cuts the answer off."""
        if self.done:
            return
        if self._next == self._read_to_end:
            self.done = True
            return
        raise ClientError("the connection was closed in the middle of the answer" if self.begun
                          else "the connection was closed without an answer")

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n") + 4
        if end < 4 or end > MAX_HEAD:
            if len(self._buffer) > MAX_HEAD:
                raise ClientError(f"the answer's head is larger than {MAX_HEAD} bytes")
            return False
        head, self._buffer = self._buffer[:end], self._buffer[end:]
        line = _STATUS.match(head)
        if line is None:
            raise ClientError(f"the answer is not HTTP: {head[:40]!r}")
        try:
            self.headers = _header_fields(head, line.end(), 1000)
        except Refused as error:
            raise ClientError(f"the answer is not HTTP: {error}") from None
        self.status = int(line.group(2))
        if self.status < 200:               # 100 Continue and its like come before the answer
            return True
        words = self.headers.get("connection", "").lower()
        self.keep_alive = "close" not in words and (line.group(1) == b"1" or "keep-alive" in words)
        self._choose_body()
        return True

    def _choose_body(self) -> None:
        length = self.headers.get("content-length")
        coding = self.headers.get("transfer-encoding")
        if self._head_request or self.status in (204, 304):
            self.done = True
        elif coding is not None:
            if coding.strip().lower() != "chunked" or length is not None:
                raise ClientError(f"the answer's transfer encoding {coding[:40]!r} is not taken")
            self._next = self._read_chunk_size
        elif length is None:
            self.keep_alive = False
            self._next = self._read_to_end
        elif not re.fullmatch(r"[0-9]{1,18}", length):
            raise ClientError(f"the answer's length {length[:40]!r} is not a number")
        else:
            self._expect(int(length))
            self._next = self._read_sized

    def _expect(self, size: int) -> None:
        self._size += size
        if self._size > self._max_body:
            raise ClientError(f"the answer is larger than {self._max_body} bytes")
        self._left = size

    def _read_sized(self) -> bool:
        assert self._left is not None
        piece, self._buffer = self._buffer[:self._left], self._buffer[self._left:]
        if piece:
            self._body.append(piece)
            self._left -= len(piece)
        self.done = self._left == 0
        return self.done

    def _read_to_end(self) -> bool:
        if self._buffer:
            self._expect(len(self._buffer))
            self._body.append(self._buffer)
            self._buffer = b""
        return False

    def _read_chunk_size(self) -> bool:
        match = _CHUNK.match(self._buffer)
        if match is None:
            if len(self._buffer) > 256 or b"\n" in self._buffer:
                raise ClientError("the answer's chunks are broken")
            return False
        self._buffer = self._buffer[match.end():]
        size = int(match.group(1), 16)
        self._expect(size)
        self._next = self._read_chunk if size else self._read_trailer
        return True

    def _read_chunk(self) -> bool:
        assert self._left is not None
        if len(self._buffer) < self._left + 2:
            return False
        if self._buffer[self._left:self._left + 2] != b"\r\n":
            raise ClientError("the answer's chunks are broken")
        self._body.append(self._buffer[:self._left])
        self._buffer = self._buffer[self._left + 2:]
        self._next = self._read_chunk_size
        return True

    def _read_trailer(self) -> bool:
        line, found, rest = self._buffer.partition(b"\r\n")
        if not found:
            if len(line) > MAX_HEAD:
                raise ClientError("the answer's trailer is too large")
            return False
        self._buffer = rest
        self.done = not line
        return True


class ClientResponse(NamedTuple):
    """An answer: status, headers by lower-case name, body with its gzip taken off."""
    status: int
    headers: Mapping[str, str]
    body: bytes


def gunzip(body: bytes, max_body: int = MAX_BODY) -> bytes:
    """The content of a gzip stream, of bounded size; raises ClientError."""
    unpacker = zlib.decompressobj(31)
    try:
        content = unpacker.decompress(body, max_body + 1)
    except zlib.error:
        raise ClientError("the answer's gzip is broken") from None
    if len(content) > max_body:
        raise ClientError(f"the answer is larger than {max_body} bytes")
    if not unpacker.eof:
        raise ClientError("the answer's gzip is cut off")
    return content


class _Origin(NamedTuple):
    scheme: str
    host: str
    port: int


class Client:
    """HTTP/1.1 for programs: keeps connections, one deadline for the whole exchange.

    `resolve` maps host names to other addresses (as curl's --connect-to); the name stays in the
    Host header and in TLS. Any thread may use it.
    """

    def __init__(self, tls: Optional[ssl.SSLContext] = None, max_idle: int = 8,
                 max_body: int = MAX_BODY,
                 resolve: Optional[Mapping[str, Tuple[str, int]]] = None,
                 now: Callable[[], float] = time.monotonic) -> None:
        self._tls, self._max_idle, self._max_body = tls, max_idle, max_body
        self._resolve = resolve or {}
        self._now = now
        self._idle: Dict[_Origin, List[socket.socket]] = {}
        self._lock = threading.Lock()       # _idle

    def request(self, method: str, url: str, headers: Optional[Mapping[str, str]] = None,
                body: bytes = b"", timeout: float = 10.0) -> ClientResponse:
        """Ask and wait for the whole answer, `timeout` seconds at the most; raises ClientError."""
        origin, target = self._origin(url)
        deadline = self._now() + timeout
        lines = {"Host": origin.host if origin.port in (80, 443) else
                 f"{origin.host}:{origin.port}", "Accept-Encoding": "gzip", **(headers or {})}
        if body or method in ("POST", "PUT"):
            lines["Content-Length"] = str(len(body))
        head = "".join([f"{name}: {value}\r\n" for name, value in lines.items()])
        if "\n" in head.replace("\r\n", "") or not target.isascii() or " " in target:
            raise ClientError(f"{url!r} or a header cannot be sent")
        whole = f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body
        kept = self._take(origin)
        reader = AnswerReader(method == "HEAD", self._max_body)
        if kept is not None:
            try:
                return self._exchange(origin, kept, whole, reader, deadline)
            except ClientError:             # it may have been closed while it was idle
                if reader.begun or method not in ("GET", "HEAD") or self._now() >= deadline:
                    raise
            reader = AnswerReader(method == "HEAD", self._max_body)
        return self._exchange(origin, self._connect(origin, deadline), whole, reader, deadline)

    def close(self) -> None:
        """Close what is idle."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def _origin(self, url: str) -> Tuple[_Origin, str]:
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            raise ClientError(f"{url!r} is not a URL") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClientError(f"{url!r} is not an http or https URL")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return (_Origin(parts.scheme, host, port),
                (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))

    def _take(self, origin: _Origin) -> Optional[socket.socket]:
        with self._lock:
            connections = self._idle.get(origin)
            return connections.pop() if connections else None

    def _connect(self, origin: _Origin, deadline: float) -> socket.socket:
        address = self._resolve.get(origin.host, (origin.host.strip("[]"), origin.port))
        shown = f"{origin.host}:{origin.port}"
        try:
            plain = socket.create_connection(address, self._left(deadline, shown))
        except OSError as error:
            raise ClientError(f"cannot reach {shown}: {_reason(error)}") from None
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if origin.scheme == "http":
                return plain
            context = self._tls if self._tls is not None else ssl.create_default_context()
            plain.settimeout(self._left(deadline, shown))
            return context.wrap_socket(plain, server_hostname=origin.host.strip("[]"))
        except (OSError, ValueError) as error:
            plain.close()
            raise ClientError(f"no TLS with {shown}: {_reason(error)}") from None

    def _exchange(self, origin: _Origin, connection: socket.socket, whole: bytes,
                  reader: AnswerReader, deadline: float) -> ClientResponse:
        shown = f"{origin.host}:{origin.port}"
        good = False
        try:
            connection.settimeout(self._left(deadline, shown))
            connection.sendall(whole)
            while not reader.done:
                connection.settimeout(self._left(deadline, shown))
                received = connection.recv(65536)
                if received:
                    reader.feed(received)
                else:
                    reader.end()
            good = reader.keep_alive
        except ClientError as error:
            raise ClientError(f"{shown}: {error}") from None
        except OSError as error:
            raise ClientError(f"cannot talk to {shown}: {_reason(error)}") from None
        finally:
            self._give_back(origin, connection, good)
        body = reader.body
        if reader.headers.get("content-encoding", "").lower() == "gzip":
            body = gunzip(body, self._max_body)
        return ClientResponse(reader.status, reader.headers, body)

    def _give_back(self, origin: _Origin, connection: socket.socket, good: bool) -> None:
        with self._lock:
            kept = self._idle.setdefault(origin, [])
            if good and len(kept) < self._max_idle:
                kept.append(connection)
                return
        connection.close()

    def _left(self, deadline: float, shown: str) -> float:
        left = deadline - self._now()
        if left <= 0:
            raise ClientError(f"cannot reach {shown}: timed out")
        return left


def _reason(error: Exception) -> str:
    """Why a connection failed, in the words that people know."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    if isinstance(error, (socket.timeout, TimeoutError)):
        return "timed out"
    if isinstance(error, socket.gaierror):
        return "the name does not resolve"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__

# --- TLS and certificates [kit] ------------------------------------------------------------------

# Tenants prove themselves with certificates that no CA has signed, and `ssl` can neither ask for
# such a one nor look into it. Both are done by the very OpenSSL that `_ssl` is linked with, through
# ctypes: nothing of cryptography or ASN.1 is ours. All names here are in OpenSSL 1.1.1 and in 3.

CMON_PURPOSE = "1.3.6.1.4.1.38678.1.4.2"        # extended key usage joyentCmon
CLIENT_PURPOSE, SERVER_PURPOSE = "1.3.6.1.5.5.7.3.2", "1.3.6.1.5.5.7.3.1"
_MAX_CERTIFICATE = 65536                        # bytes; OpenSSL itself takes chains up to 100 kB
_MAX_KEY_TEXT = 32768                           # an RSA key of 16,384 bits needs 3 kB
# numbers from <openssl/obj_mac.h> and <openssl/ssl.h>
_NID_CN, _NID_SKI, _NID_USAGE, _NID_SAN, _NID_BASIC, _NID_AKI = 13, 82, 83, 85, 87, 90
_NID_EKU = 126
_NID_RSA, _NID_EC, _NID_ED25519 = 6, 408, 1087
_CURVES = {415: "nistp256", 715: "nistp384", 716: "nistp521"}
_UTF8, _UNCOMPRESSED, _CTRL_SESSION_CACHE = 0x1000, 4, 44

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
_S, _Z = ctypes.c_char_p, ctypes.c_size_t
# name, result, arguments; pointers are plain addresses, None is NULL
_FUNCTIONS: Tuple[Tuple[str, Any, Tuple[Any, ...]], ...] = (
    ("OpenSSL_version", _S, (_I,)),
    ("ERR_clear_error", None, ()), ("ERR_peek_last_error", ctypes.c_ulong, ()),
    ("ERR_reason_error_string", _S, (ctypes.c_ulong,)), ("CRYPTO_free", None, (_P, _S, _I)),
    ("BIO_new_mem_buf", _P, (_S, _I)), ("BIO_new", _P, (_P,)), ("BIO_s_mem", _P, ()),
    ("BIO_read", _I, (_P, _P, _I)), ("BIO_free", _I, (_P,)), ("BIO_ctrl_pending", _Z, (_P,)),
    ("BN_bin2bn", _P, (_S, _I, _P)), ("BN_bn2bin", _I, (_P, _P)), ("BN_num_bits", _I, (_P,)),
    ("BN_free", None, (_P,)), ("ASN1_INTEGER_to_BN", _P, (_P, _P)),
    ("ASN1_INTEGER_set_uint64", _I, (_P, ctypes.c_uint64)), ("ASN1_STRING_to_UTF8", _I, (_P, _P)),
    ("ASN1_TIME_to_tm", _I, (_P, _P)), ("ASN1_TIME_set", _P, (_P, _L)),
    ("OBJ_obj2txt", _I, (_P, _I, _P, _I)), ("OBJ_nid2sn", _S, (_I,)),
    ("OPENSSL_sk_num", _I, (_P,)), ("OPENSSL_sk_value", _P, (_P, _I)),
    ("EXTENDED_KEY_USAGE_free", None, (_P,)),
    ("EVP_PKEY_new", _P, ()), ("EVP_PKEY_free", None, (_P,)), ("EVP_sha256", _P, ()),
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
    ("X509_get_ext_d2i", _P, (_P, _I, _P, _P)), ("X509_add_ext", _I, (_P, _P, _I)),
    ("X509_EXTENSION_free", None, (_P,)), ("X509V3_set_ctx", None, (_P, _P, _P, _P, _P, _I)),
    ("X509V3_EXT_conf_nid", _P, (_P, _P, _I, _S)), ("X509_sign", _I, (_P, _P, _P)),
    ("X509_verify", _I, (_P, _P)), ("X509_STORE_CTX_set_default", _I, (_P, _S)),
    ("SSL_CTX_get_verify_mode", _I, (_P,)), ("SSL_CTX_get_options", ctypes.c_uint64, (_P,)),
    ("SSL_CTX_set_cert_verify_callback", None, (_P, _P, _P)),
    ("SSL_CTX_set_ciphersuites", _I, (_P, _S)), ("SSL_CTX_ctrl", _L, (_P, _I, _L, _P)),
)


class CertificateError(ValueError):
    """A key or certificate that cannot be read or made: whoever brought it is at fault."""


class _Tm(ctypes.Structure):
    """`struct tm`, with room for what platforms add behind."""
    _fields_ = [(name, ctypes.c_int) for name in ("sec", "min", "hour", "mday", "mon", "year")] + [
        ("rest", ctypes.c_byte * 96)]


_openssl: Optional[ctypes.CDLL] = None          # set once; making it twice does no harm


def _library() -> ctypes.CDLL:
    """The OpenSSL of this Python's `ssl`, every function declared; OSError in words without it."""
    global _openssl
    if _openssl is None:
        import _ssl
        path = getattr(_ssl, "__file__", None)  # built into the interpreter: its own symbols
        library = ctypes.CDLL(path)
        for name, result, arguments in _FUNCTIONS:
            try:
                function = getattr(library, name)
            except AttributeError:
                raise OSError(f"the {ssl.OPENSSL_VERSION} of this Python does not show {name}: "
                              "install a Python that uses a shared OpenSSL 1.1.1 or 3") from None
            function.restype, function.argtypes = result, arguments
        version = library.OpenSSL_version(0).decode()
        if version != ssl.OPENSSL_VERSION:
            raise OSError(f"found {version} beside the {ssl.OPENSSL_VERSION} that ssl uses")
        _openssl = library
    return _openssl


class _Scope:
    """The OpenSSL objects of one call: freed together when it ends, with no error left behind
    (a stale one in the thread's queue would be taken for one of the next TLS connection)."""

    def __init__(self) -> None:
        self.library = _library()
        self._owned: List[Tuple[Any, Any]] = []

    def __enter__(self) -> _Scope:
        return self

    def __exit__(self, *_: object) -> None:
        for free, pointer in reversed(self._owned):
            free(pointer)
        self.library.ERR_clear_error()

    def own(self, pointer: Optional[int], free: Any, failure: str) -> int:
        """The pointer, to be freed at the end; NULL is the failure, in words."""
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

    def source(self, text: bytes) -> int:
        """A BIO that reads these bytes; they must live as long as the scope."""
        return self.own(self.library.BIO_new_mem_buf(text, len(text)), self.library.BIO_free, "BIO")

    def private_key(self, pem: bytes, passphrase: bytes = b"") -> int:
        # the passphrase is always given: with none OpenSSL would ask for one on the terminal
        found = self.library.PEM_read_bio_PrivateKey(self.source(pem), None, None, passphrase)
        return self.own(found, self.library.EVP_PKEY_free,
                        "not a private key in PEM, or a wrong passphrase")

    def x509(self, der: bytes) -> int:
        if len(der) > _MAX_CERTIFICATE:
            raise CertificateError(f"a certificate of {len(der)} bytes is too long")
        buffer = ctypes.create_string_buffer(der, len(der))
        position = ctypes.c_void_p(ctypes.addressof(buffer))
        found = self.own(self.library.d2i_X509(None, ctypes.byref(position), len(der)),
                         self.library.X509_free, "not an X.509 certificate")
        if position.value != ctypes.addressof(buffer) + len(der):
            raise CertificateError("there is something behind the certificate")
        return found

    def spki(self, der: bytes) -> int:
        buffer = ctypes.create_string_buffer(der, len(der))
        position = ctypes.c_void_p(ctypes.addressof(buffer))
        return self.own(self.library.d2i_PUBKEY(None, ctypes.byref(position), len(der)),
                        self.library.EVP_PKEY_free, "not a public key")


def _der(encode: Any, pointer: int) -> bytes:
    """What an i2d function writes."""
    buffer = ctypes.create_string_buffer(max(0, encode(pointer, None)))
    position = ctypes.c_void_p(ctypes.addressof(buffer))
    encode(pointer, ctypes.byref(position))
    return buffer.raw


class PublicKey:
    """A public key as SSH and X.509 know it; equal when the keys are."""
    __slots__ = ("kind", "blob", "spki")

    def __init__(self, kind: str, blob: bytes, spki: bytes) -> None:
        self.kind = kind                        # "ssh-rsa", "ecdsa-sha2-nistp256", "ssh-ed25519"
        self.blob = blob                        # RFC 4253 section 6.6
        self.spki = spki                        # DER, SubjectPublicKeyInfo

    @property
    def md5(self) -> str:
        """The fingerprint that mahi indexes by: colon-separated hex."""
        return hashlib.md5(self.blob, usedforsecurity=False).digest().hex(":")

    @property
    def sha256(self) -> str:
        """The fingerprint that ssh-keygen shows."""
        digest = base64.b64encode(hashlib.sha256(self.blob).digest())
        return "SHA256:" + digest.decode().rstrip("=")

    @property
    def line(self) -> str:
        """As in authorized_keys, without a comment."""
        return self.kind + " " + base64.b64encode(self.blob).decode()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and other.blob == self.blob

    def __hash__(self) -> int:
        return hash(self.blob)

    def __repr__(self) -> str:
        return f"<PublicKey {self.kind} {self.sha256}>"


def _ssh_string(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


def _ssh_fields(blob: bytes) -> List[bytes]:
    fields: List[bytes] = []
    position = 0
    while position < len(blob):
        if position + 4 > len(blob):
            raise CertificateError("an SSH key is cut off")
        length, = struct.unpack_from(">I", blob, position)
        position += 4
        if length > len(blob) - position:
            raise CertificateError("an SSH key is cut off")
        fields.append(blob[position:position + length])
        position += length
    return fields


def _mpint(scope: _Scope, number: int) -> bytes:
    """A BIGNUM as SSH writes it: a leading zero byte where the top bit is set."""
    bits = scope.library.BN_num_bits(number)
    buffer = ctypes.create_string_buffer((bits + 7) // 8)
    scope.library.BN_bn2bin(number, buffer)
    return _ssh_string((b"\0" if bits % 8 == 0 else b"") + buffer.raw)


def _described(scope: _Scope, pkey: int) -> PublicKey:
    """An EVP_PKEY in words."""
    library = scope.library
    spki = _der(library.i2d_PUBKEY, pkey)
    if not spki:
        raise scope.error("a key that cannot be written")
    rsa = library.EVP_PKEY_get1_RSA(pkey)
    if rsa:
        scope.own(rsa, library.RSA_free, "")
        modulus, exponent = ctypes.c_void_p(), ctypes.c_void_p()
        library.RSA_get0_key(rsa, ctypes.byref(modulus), ctypes.byref(exponent), None)
        if not modulus.value or not exponent.value:
            raise CertificateError("an RSA key without its numbers")
        numbers = _mpint(scope, exponent.value) + _mpint(scope, modulus.value)
        return PublicKey("ssh-rsa", _ssh_string(b"ssh-rsa") + numbers, spki)
    curve_key = library.EVP_PKEY_get1_EC_KEY(pkey)
    if curve_key:
        scope.own(curve_key, library.EC_KEY_free, "")
        curve = _CURVES.get(library.EC_GROUP_get_curve_name(library.EC_KEY_get0_group(curve_key)))
        if curve is None:
            raise CertificateError("an elliptic curve that SSH does not know")
        point = ctypes.c_void_p()
        length = library.EC_KEY_key2buf(curve_key, _UNCOMPRESSED, ctypes.byref(point), None)
        if not length or not point.value:
            raise scope.error("an EC key without its point")
        encoded = ctypes.string_at(point.value, length)
        library.CRYPTO_free(point.value, None, 0)
        kind = "ecdsa-sha2-" + curve
        blob = _ssh_string(kind.encode()) + _ssh_string(curve.encode()) + _ssh_string(encoded)
        return PublicKey(kind, blob, spki)
    size = ctypes.c_size_t(32)
    raw = ctypes.create_string_buffer(32)
    # the raw form of 32 bytes is also X25519's, which cannot sign: the OID says which it is
    if library.EVP_PKEY_get_raw_public_key(pkey, raw, ctypes.byref(size)) == 1 \
            and b"\x2b\x65\x70" in spki[:12]:
        return PublicKey("ssh-ed25519", _ssh_string(b"ssh-ed25519") + _ssh_string(raw.raw), spki)
    raise CertificateError("a kind of key that is neither RSA, ECDSA nor Ed25519")


def _from_ssh(scope: _Scope, blob: bytes) -> int:
    """An EVP_PKEY from the bytes of an SSH key."""
    library = scope.library
    fields = _ssh_fields(blob)
    kind = fields[0] if fields else b""
    if kind == b"ssh-rsa" and len(fields) == 3:
        rsa = scope.own(library.RSA_new(), library.RSA_free, "RSA")
        exponent = library.BN_bin2bn(fields[1], len(fields[1]), None)
        modulus = library.BN_bin2bn(fields[2], len(fields[2]), None)
        if library.RSA_set0_key(rsa, modulus, exponent, None) != 1:     # else the RSA owns them
            library.BN_free(modulus)
            library.BN_free(exponent)
            raise scope.error("not an RSA key")
        pkey = scope.own(library.EVP_PKEY_new(), library.EVP_PKEY_free, "EVP_PKEY")
        scope.need(library.EVP_PKEY_set1_RSA(pkey, rsa), "not an RSA key")
        return pkey
    for nid, curve in _CURVES.items():
        name = curve.encode()
        if kind == b"ecdsa-sha2-" + name and len(fields) == 3 and fields[1] == name:
            key = scope.own(library.EC_KEY_new_by_curve_name(nid), library.EC_KEY_free, "EC_KEY")
            scope.need(library.EC_KEY_oct2key(key, fields[2], len(fields[2]), None),
                       "an EC key whose point is not on its curve")
            pkey = scope.own(library.EVP_PKEY_new(), library.EVP_PKEY_free, "EVP_PKEY")
            scope.need(library.EVP_PKEY_set1_EC_KEY(pkey, key), "not an EC key")
            return pkey
    if kind == b"ssh-ed25519" and len(fields) == 2 and len(fields[1]) == 32:
        return scope.own(library.EVP_PKEY_new_raw_public_key(_NID_ED25519, None, fields[1], 32),
                         library.EVP_PKEY_free, "not an Ed25519 key")
    raise CertificateError(f"an SSH key of kind {kind[:40]!r}: RSA, ECDSA and Ed25519 can be used")


def public_key(text: str) -> PublicKey:
    """A key as accounts have it: an OpenSSH line, or PEM as SPKI or PKCS#1; CertificateError."""
    if len(text) > _MAX_KEY_TEXT:
        raise CertificateError(f"a key of {len(text)} characters is too long")
    with _Scope() as scope:
        library = scope.library
        source = text.strip().encode("utf-8", "replace")
        if source.startswith(b"-----BEGIN RSA PUBLIC KEY-----"):
            rsa = scope.own(
                library.PEM_read_bio_RSAPublicKey(scope.source(source), None, None, b""),
                library.RSA_free, "not a public key in PEM")
            pkey = scope.own(library.EVP_PKEY_new(), library.EVP_PKEY_free, "EVP_PKEY")
            scope.need(library.EVP_PKEY_set1_RSA(pkey, rsa), "not an RSA key")
        elif source.startswith(b"-----BEGIN "):
            pkey = scope.own(library.PEM_read_bio_PUBKEY(scope.source(source), None, None, b""),
                             library.EVP_PKEY_free, "not a public key in PEM")
        else:
            words = source.split()
            if len(words) < 2:
                raise CertificateError("neither an OpenSSH line nor a public key in PEM")
            try:
                blob = base64.b64decode(words[1], validate=True)
            except ValueError:
                raise CertificateError("an OpenSSH line whose second word is not base64") from None
            pkey = _from_ssh(scope, blob)
            key = _described(scope, pkey)
            if words[0].decode("utf-8", "replace") != key.kind:
                raise CertificateError(f"a key of kind {key.kind} that says it is another")
            return key
        return _described(scope, pkey)


class Certificate(NamedTuple):
    """What a certificate says; nothing of it is believed until `signed_by` agrees."""
    subject: str                                # common names; "" without one
    issuer: str
    self_issued: bool                           # subject and issuer are the same name
    not_before: int                             # seconds since the epoch
    not_after: int
    purposes: Tuple[str, ...]                   # extended key usage, OIDs in dots
    signature: str                              # OpenSSL's name: "RSA-SHA256", "ecdsa-with-SHA256"
    digest: str                                 # "sha256"; "" where it is part of the algorithm
    key: PublicKey
    serial: int
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
    scope.need(scope.library.ASN1_TIME_to_tm(when, ctypes.byref(tm)), "a date that is none")
    try:
        stamp = datetime.datetime(tm.year + 1900, tm.mon + 1, tm.mday, tm.hour, tm.min,
                                  min(tm.sec, 59), tzinfo=datetime.timezone.utc)
    except ValueError:
        raise CertificateError("a date that is none") from None
    return int(stamp.timestamp())


def _purposes(scope: _Scope, x509: int) -> Tuple[str, ...]:
    library = scope.library
    critical = ctypes.c_int(-1)
    stack = library.X509_get_ext_d2i(x509, _NID_EKU, ctypes.byref(critical), None)
    if not stack:
        if critical.value != -1:                # there, but broken or twice: not the same as absent
            raise CertificateError("an extended key usage that cannot be read")
        return ()
    scope.own(stack, library.EXTENDED_KEY_USAGE_free, "")
    found: List[str] = []
    text = ctypes.create_string_buffer(256)
    for index in range(library.OPENSSL_sk_num(stack)):
        if library.OBJ_obj2txt(text, len(text), library.OPENSSL_sk_value(stack, index), 1) > 0:
            found.append(text.value.decode("ascii", "replace"))
    return tuple(found)


def certificate(der: bytes) -> Certificate:
    """Read a certificate; CertificateError says in words why it cannot be."""
    with _Scope() as scope:
        library = scope.library
        x509 = scope.x509(der)
        subject, issuer = library.X509_get_subject_name(x509), library.X509_get_issuer_name(x509)
        pkey = scope.own(library.X509_get_pubkey(x509), library.EVP_PKEY_free,
                         "a certificate whose key cannot be read")
        nid = ctypes.c_int(0)
        # fails for algorithms it does not know; then there is no digest, and no account takes it
        library.X509_get_signature_info(x509, ctypes.byref(nid), None, None, None)
        digest = (library.OBJ_nid2sn(nid.value) or b"").decode().lower() if nid.value else ""
        number = scope.own(library.ASN1_INTEGER_to_BN(library.X509_get_serialNumber(x509), None),
                           library.BN_free, "a serial number that is none")
        serial = ctypes.create_string_buffer((library.BN_num_bits(number) + 7) // 8)
        library.BN_bn2bin(number, serial)
        return Certificate(
            subject=_common_name(scope, subject),
            issuer=_common_name(scope, issuer),
            self_issued=library.X509_NAME_cmp(subject, issuer) == 0,
            not_before=_time(scope, library.X509_get0_notBefore(x509)),
            not_after=_time(scope, library.X509_get0_notAfter(x509)),
            purposes=_purposes(scope, x509),
            signature=(library.OBJ_nid2sn(library.X509_get_signature_nid(x509)) or b"").decode(),
            digest=digest,
            key=_described(scope, pkey),
            serial=int.from_bytes(serial.raw, "big"),
            der=der,
        )


def signed_by(found: Certificate, key: PublicKey) -> bool:
    """Whether the certificate's signature was made with this key, as OpenSSL sees it."""
    with _Scope() as scope:
        return bool(scope.library.X509_verify(scope.x509(found.der), scope.spki(key.spki)) == 1)


_PEM_CERTIFICATE = re.compile(
    r"-----BEGIN CERTIFICATE-----\s*([A-Za-z0-9+/=\s]+?)-----END CERTIFICATE-----")


def first_certificate(pem: str) -> bytes:
    """DER of the first certificate in a PEM file, whatever stands around it."""
    match = _PEM_CERTIFICATE.search(pem)
    if match is None:
        raise CertificateError("no certificate in PEM")
    try:
        return base64.b64decode("".join(match.group(1).split()), validate=True)
    except ValueError:
        raise CertificateError("a certificate in PEM that is not base64") from None


def make_key(kind: str = "ec") -> bytes:
    """A fresh private key, PEM in PKCS#8: "ec" is P-256, "rsa" has 2,048 bits."""
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
        scope.own(pkey.value, library.EVP_PKEY_free, "cannot make a key")
        sink = scope.own(library.BIO_new(library.BIO_s_mem()), library.BIO_free, "BIO")
        scope.need(library.PEM_write_bio_PKCS8PrivateKey(sink, pkey, None, None, 0, None, None),
                   "cannot write a key")
        text = ctypes.create_string_buffer(library.BIO_ctrl_pending(sink))
        library.BIO_read(sink, text, len(text))
        return text.raw


def private_key(pem: bytes, passphrase: bytes = b"") -> PublicKey:
    """The public half of a private key in PEM; CertificateError."""
    with _Scope() as scope:
        return _described(scope, scope.private_key(pem, passphrase))


def ssh_public_key(key_pem: bytes) -> str:
    """The line that a private key's owner puts on the account."""
    return private_key(key_pem).line


def make_certificate(
    key_pem: bytes, subject: str, *, issuer: Optional[Union[str, bytes]] = None,
    signing_key: Optional[bytes] = None, names: Sequence[str] = (), days: float = 3650,
    not_before: Optional[float] = None, not_after: Optional[float] = None,
    purposes: Sequence[str] = (), is_ca: bool = False, serial: Optional[int] = None,
    passphrase: bytes = b"",
) -> bytes:
    """A certificate in PEM for the key; self-signed, or issued by a name or a certificate in PEM.

    Without dates it is valid from an hour ago, because clocks differ. `passphrase` is the signing
    key's. Names are host names, or IP addresses in digits.
    """
    begin = time.time() - 3600 if not_before is None else not_before
    end = begin + days * 86400 if not_after is None else not_after
    with _Scope() as scope:
        library = scope.library
        x509 = scope.own(library.X509_new(), library.X509_free, "X509")
        pkey = scope.private_key(key_pem, b"" if signing_key else passphrase)
        signer = pkey if signing_key is None else scope.private_key(signing_key, passphrase)
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
                       f"a common name that X.509 does not take: {name!r}")
        if isinstance(issuer, bytes):
            issued_by = scope.x509(first_certificate(issuer.decode()))
            library.X509_set_issuer_name(x509, library.X509_get_subject_name(issued_by))
        scope.need(library.X509_set_pubkey(x509, pkey), "cannot use the key")
        context = ctypes.create_string_buffer(1024)     # an X509V3_CTX, 72 bytes in OpenSSL 3
        library.X509V3_set_ctx(context, issued_by, x509, None, None, 0)
        rsa = _described(scope, pkey).kind == "ssh-rsa"
        usage = "keyCertSign,cRLSign" if is_ca else \
            "digitalSignature,nonRepudiation," + ("keyEncipherment" if rsa else "keyAgreement")
        extensions = [
            (_NID_BASIC, "critical,CA:" + ("TRUE" if is_ca else "FALSE")),
            (_NID_USAGE, "critical," + usage),
            (_NID_SKI, "hash"),
        ]
        if isinstance(issuer, bytes):           # Python 3.13 wants it of all that are not roots
            extensions.append((_NID_AKI, "keyid:always"))
        if purposes:
            extensions.append((_NID_EKU, "critical," + ",".join(purposes)))
        if names:
            extensions.append((_NID_SAN, ",".join([_alternative(name) for name in names])))
        for nid, extension_text in extensions:
            extension = scope.own(
                library.X509V3_EXT_conf_nid(None, context, nid, extension_text.encode()),
                library.X509_EXTENSION_free,
                f"an extension that X.509 does not take: {extension_text!r}")
            scope.need(library.X509_add_ext(x509, extension, -1), "cannot add an extension")
        scope.need(library.X509_sign(x509, signer, library.EVP_sha256()), "cannot sign")
        return ssl.DER_cert_to_PEM_cert(_der(library.i2d_X509, x509)).encode()


def _alternative(name: str) -> str:
    if re.search(r"[,\s\\]", name):             # would be read as more than one
        raise CertificateError(f"a host name with an odd character: {name!r}")
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in name else socket.AF_INET, name)
    except OSError:
        return "DNS:" + name
    return "IP:" + name


_DEFAULT = ctypes.create_string_buffer(b"default")      # lives as long as any context may use it


def _context_pointer(context: ssl.SSLContext) -> int:
    """The SSL_CTX inside a context, proved by what is read back through it.

    In CPython 3.9 to 3.13 it is the first member behind the object's head.
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


def ask_for_any_certificate(context: ssl.SSLContext) -> None:
    """Let clients show whatever certificate they have; the application decides, not a CA.

    OpenSSL's own X509_STORE_CTX_set_default has the shape of a verify callback and returns 1 for
    the name "default", so no Python runs in a handshake. OSError in words where it is impossible.
    """
    library = _library()
    context.verify_mode = ssl.CERT_OPTIONAL
    pointer = _context_pointer(context)
    callback = ctypes.cast(library.X509_STORE_CTX_set_default, ctypes.c_void_p)
    library.SSL_CTX_set_cert_verify_callback(pointer, callback, ctypes.addressof(_DEFAULT))


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> Optional[bytes]:
    """Shake hands in memory; the certificate that the server has seen."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server, server_side=False),
            server.wrap_bio(to_server, to_client, server_side=True)]
    waiting = list(ends)
    for _ in range(16):                         # TLS 1.3 takes three turns, 1.2 four
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
        if not waiting:
            return ends[1].getpeercert(True)
    raise OSError("the handshake does not end")


def check_any_certificate(context: ssl.SSLContext, cert_file: str, key_file: str) -> None:
    """Prove `ask_for_any_certificate` by handshakes in memory, before the first real one.

    The server's own certificate serves as the client's. OSError in words when it is not seen, when
    nothing is asked for, or when a client without certificate cannot come in.
    """
    with open(cert_file, encoding="utf-8", errors="replace") as file:
        own = first_certificate(file.read())
    for shown in (own, None):
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_mode = ssl.CERT_NONE
        if shown is not None:
            client.load_cert_chain(cert_file, key_file)
        try:
            seen = _handshake(context, client)
        except ssl.SSLError as error:
            raise OSError(f"client certificates cannot be asked for with {ssl.OPENSSL_VERSION} on "
                          f"Python {sys.version.split()[0]}: {error}") from None
        if seen != shown:
            raise OSError(f"client certificates do not arrive with {ssl.OPENSSL_VERSION} on Python "
                          f"{sys.version.split()[0]}: use client_auth \"ca\"")


def server_context(certificate_file: str, key_file: str,
                   client_ca: Optional[str] = None) -> ssl.SSLContext:
    """The one TLS policy: 1.2 or later, forward secrecy, nothing to resume a session with.

    A resumed session would bring back a certificate that was seen long ago, and costs a full
    handshake with client certificates as much as it saves. With `client_ca`, certificates are asked
    for and must chain to it; a client without one still comes in and is nobody.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= (ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_TICKET
                        | ssl.OP_NO_RENEGOTIATION | getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0))
    # 128 bits first: a handshake takes a tenth less, and nobody breaks either
    context.set_ciphers("ECDHE+AES128+AESGCM:ECDHE+AESGCM:ECDHE+CHACHA20")
    context.num_tickets = 0
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(certificate_file, key_file, password="")    # never ask the terminal
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_OPTIONAL
    try:
        library, pointer = _library(), _context_pointer(context)
    except OSError:                             # with a CA nothing depends on what follows
        return context
    library.SSL_CTX_ctrl(pointer, _CTRL_SESSION_CACHE, 0, None)
    library.SSL_CTX_set_ciphersuites(
        pointer, b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256")
    return context

# --- logging and settings [kit] ------------------------------------------------------------------

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING,
          "error": logging.ERROR}
LOG_QUEUE = 10_000          # records; beyond, they are dropped and counted: a log must not block
EXIT_USAGE = 2
SMF_EXIT_ERR_CONFIG = 96    # /lib/svc/share/smf_include.sh


class BunyanFormatter(logging.Formatter):
    """One JSON object a line, as `bunyan` of the platform reads it."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._fixed = {"name": f"cmon-{program}", "hostname": socket.gethostname(), "v": 0}

    def format(self, record: logging.LogRecord) -> str:
        """Levels are bunyan's: 20 debug, 30 info, 40 warn, 50 error."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        fields = {**self._fixed, "pid": os.getpid(), "level": record.levelno + 10,
                  "msg": record.getMessage(),
                  "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z")}
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            fields["err"] = {"name": type(error).__name__, "message": str(error), "stack": "".join(
                traceback.format_exception(type(error), error, error.__traceback__))}
        return json.dumps(fields)


class _Queued(logging.Handler):
    """Hands records to a thread that writes them, so that a slow log file never slows an answer."""

    def __init__(self, target: logging.Handler) -> None:
        super().__init__()
        self._target = target
        self._records: queue.Queue[Optional[logging.LogRecord]] = queue.Queue(LOG_QUEUE)
        self.dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def _write(self) -> None:
        told = 0
        while True:
            record = self._records.get()
            if record is None:
                return
            self._target.handle(record)
            if self.dropped > told:
                told = self.dropped
                self._target.handle(log.makeRecord(
                    log.name, logging.WARNING, "", 0, "%s log records were dropped so far: the log "
                    "is too slow", (told,), None))

    def close(self) -> None:
        """Write what is queued, for a second at the most: what reads our log may hang."""
        try:
            self._records.put_nowait(None)
            self._thread.join(1.0)
        except queue.Full:
            self.dropped += 1
        super().close()


def start_logging(program: str, level: str, form: str = "") -> None:
    """Log to stderr: text on a terminal, bunyan JSON otherwise, unless `form` says which."""
    target = logging.StreamHandler(sys.stderr)
    if (form or ("text" if sys.stderr.isatty() else "bunyan")) == "text":
        target.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    else:
        target.setFormatter(BunyanFormatter(program))
    stop_logging()
    log.addHandler(_Queued(target))
    log.propagate = False
    log.setLevel(LEVELS[level])


def stop_logging() -> None:
    """Write out what is queued."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


class ConfigError(ValueError):
    """Settings that cannot be used: the operator's to mend. All problems at once, a line each."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


Check = Callable[[Any], Optional[str]]      # what is wrong with a value, in words, or None


def setting(default: Any, help_text: str, check: Optional[Check] = None) -> Any:
    """A field of a settings class: its default, what it means, and what may be wrong with it."""
    metadata = {"help": help_text, "check": check}
    if isinstance(default, (dict, list)) or callable(default):
        return dataclasses.field(
            default_factory=default if callable(default) else lambda: type(default)(default),
            metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def at_least(lowest: float) -> Check:
    """A check for numbers."""
    return lambda value: None if value is None or value >= lowest else f"must be at least {lowest}"


def one_of(*words: str) -> Check:
    """A check for words."""
    return lambda value: None if value in words else f"must be one of {', '.join(words)}"


def is_address(value: str) -> Optional[str]:
    """A check for HOST:PORT."""
    try:
        parse_address(value)
    except ConfigError as error:
        return str(error)
    return None


_JSON_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text",
               list: "a list", tuple: "a list", dict: "an object", Path: "a path"}


class _Loader:
    """Turns JSON into settings, and collects what is wrong instead of stopping at the first."""

    def __init__(self, origin: str, folder: Path) -> None:
        self.origin, self.folder = origin, folder
        self.problems: List[str] = []

    def wrong(self, where: str, what: str) -> None:
        self.problems.append(f"{self.origin}: {where}: {what}" if where else
                             f"{self.origin}: {what}")

    def convert(self, value: Any, wanted: Any, where: str) -> Any:
        """The value as the type that the field is annotated with."""
        if typing.get_origin(wanted) is Union:
            inner = [kind for kind in typing.get_args(wanted) if kind is not type(None)]
            return None if value is None else self.convert(value, inner[0], where)
        base = typing.get_origin(wanted) or wanted
        if dataclasses.is_dataclass(base):
            return self.record(base, value, where)
        if base is dict and isinstance(value, dict):
            kind = typing.get_args(wanted)[1]
            return {key: self.convert(item, kind, f"{where}.{key}") for key, item in value.items()}
        if base in (list, tuple) and isinstance(value, list):
            kind = typing.get_args(wanted)[0]
            return base(self.convert(item, kind, f"{where}[{index}]")
                        for index, item in enumerate(value))
        if base is Path and isinstance(value, str) and value:
            return self.folder / value
        if base is float and type(value) is int:
            return float(value)
        if type(value) is base and not (base is float and not math.isfinite(value)):
            return value
        self.wrong(where, f"must be {_JSON_NAMES[base]}, not {json.dumps(value)[:60]}")
        return None

    def record(self, wanted: Any, value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            self.wrong(where, f"must be an object, not {json.dumps(value)[:60]}")
            return None
        kinds = typing.get_type_hints(wanted)
        fields = {field.name: field for field in dataclasses.fields(wanted)}
        found: Dict[str, Any] = {}
        before = len(self.problems)
        for key, item in value.items():
            path = f"{where}.{key}" if where else key
            if key not in fields:
                near = [name for name in fields if name.replace("_", "") == key.lower()
                        .replace("-", "").replace("_", "")]
                self.wrong(path, "unknown setting" + (f", did you mean {near[0]!r}?" if near else
                                                      f"; there are {', '.join(sorted(fields))}"))
                continue
            count = len(self.problems)
            found[key] = self.convert(item, kinds[key], path)
            check = fields[key].metadata.get("check")
            problem = check(found[key]) if check and len(self.problems) == count else None
            if problem:
                self.wrong(path, f"{problem}, not {json.dumps(item)[:60]}")
        for name, field in fields.items():
            if (name not in found and field.default is dataclasses.MISSING
                    and field.default_factory is dataclasses.MISSING):
                self.wrong(f"{where}.{name}" if where else name, "is missing")
        return wanted(**found) if len(self.problems) == before else None


def _unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return found


MAX_JSON_BYTES = 64 << 20       # an inventory of 100,000 VMs is 50 MB


def read_json(path: Union[str, Path]) -> Any:
    """A JSON file's content, strict: no name twice, no NaN; raises ConfigError."""
    def no_constant(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique,
                          parse_constant=no_constant)
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not JSON: nested too deeply") from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not JSON: {error}") from None


S = TypeVar("S")


def load_settings(wanted: Type[S], path: Optional[str], flags: Mapping[str, Any]) -> S:
    """Settings of the class `wanted` from a JSON file (or none), with flags over it.

    Raises ConfigError with all problems, each with file and key. Flags that are None are not given.
    """
    content: Any = {}
    problems: List[str] = []
    if path is not None:
        content = read_json(path)
    loader = _Loader(path or "settings", Path(path).resolve().parent if path else Path.cwd())
    if isinstance(content, dict):
        content = {**content, **{key: value for key, value in flags.items() if value is not None}}
    loaded = loader.record(wanted, content, "")
    problems += loader.problems
    if problems:
        raise ConfigError(*problems)
    return typing.cast(S, loaded)


def parse_address(value: str, default_port: Optional[int] = None) -> Tuple[str, int]:
    """`HOST:PORT` or `[IPv6]:PORT` as a pair; raises ConfigError."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([^:\[\]\s]*))(?::([0-9]{1,5}))?", value)
    if match is None or not (match.group(1) or match.group(2)):
        raise ConfigError(f"{value!r} is not HOST:PORT")
    port = int(match.group(3)) if match.group(3) else default_port
    if port is None or port > 65535:
        raise ConfigError(f"{value!r} needs a port from 0 to 65535")
    return match.group(1) or match.group(2), port


def command_line(program: str, description: str) -> argparse.ArgumentParser:
    """The flags that both servers have."""
    parser = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--config", metavar="FILE", help="settings as JSON; flags win over it")
    add("--listen", metavar="HOST:PORT", help="address to serve on")
    add("--check-config", action="store_true", help="check the settings, say what is wrong, end")
    add("--smf", action="store_true", help="start as an SMF service: return when it listens, "
        f"{SMF_EXIT_ERR_CONFIG} when the settings are bad")
    add("--log-level", choices=sorted(LEVELS), help="least level that is logged (info)")
    add("--log-format", choices=("text", "bunyan"),
        help="text (on a terminal) or bunyan's JSON lines (otherwise)")
    add("--version", action="version", version=f"{program} {__version__}")
    return parser


def complain(program: str, problems: Iterable[str]) -> None:
    """Tell people what is wrong, a line each."""
    for problem in problems:
        print(f"{program}: {problem}", file=sys.stderr)


class _Parent:
    """The process that SMF started: it ends when the child serves, or with the child's status."""

    def __init__(self) -> None:
        self._write: Optional[int] = None

    def fork(self) -> Optional[int]:
        """None in the child; in the parent the exit status, when the child is ready or dead."""
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            os.setsid()
            self._write = write
            return None
        os.close(write)
        ready = os.read(read, 1)
        if ready:
            return 0
        _, status = os.waitpid(child, 0)
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1

    def ready(self) -> None:
        """In the child: the parent may end."""
        if self._write is not None:
            os.write(self._write, b"+")
            os.close(self._write)
            self._write = None


def raise_descriptor_limit() -> None:
    """A connection is a descriptor: take as many as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run_daemon(program: str, arguments: argparse.Namespace, load: Callable[[], S],
               start: Callable[[S], "Server"], reload: Callable[[S], None],
               check: Optional[Callable[[S], List[str]]] = None) -> int:
    """A server's life: settings, --check-config, --smf, signals, reload; returns the exit status.

    `start` builds the server and listens; what it raises as ConfigError or OSError is told in one
    line. SIGHUP calls `load` and `reload`; a bad file keeps the running settings and says so.
    """
    full = f"cmon_{program}"
    bad = SMF_EXIT_ERR_CONFIG if arguments.smf else EXIT_USAGE
    try:
        settings = load()
        if arguments.check_config:
            problems = check(settings) if check else []
            complain(full, problems)
            if not problems:
                print(f"{full}: the settings are good")
            return bad if problems else 0
    except ConfigError as error:
        complain(full, error.problems)
        return bad
    parent = _Parent()
    if arguments.smf:
        status = parent.fork()
        if status is not None:
            return status
    start_logging(program, getattr(settings, "log_level"), getattr(settings, "log_format"))
    raise_descriptor_limit()
    try:
        server = start(settings)
    except ConfigError as error:
        stop_logging()
        complain(full, error.problems)
        return bad
    except OSError as error:
        stop_logging()
        complain(full, [f"cannot start: {error.strerror or error}"
                        + (f": {error.filename}" if error.filename else "")])
        return 1

    def on_hangup(*_: object) -> None:
        try:
            fresh = load()
            start_logging(program, getattr(fresh, "log_level"), getattr(fresh, "log_format"))
            reload(fresh)
            log.info("settings were reread")
        except ConfigError as error:
            for problem in error.problems:
                log.error("the old settings stay: %s", problem)

    handlers: Dict[int, Callable[[], None]] = {
        signal.SIGTERM: server.stop, signal.SIGINT: server.stop,
        signal.SIGHUP: lambda: server.call_soon(on_hangup)}
    for number_of_signal, handler in handlers.items():
        signal.signal(number_of_signal, lambda *_, handler=handler: handler())
    for listener in server.listeners:
        host, port = listener.address[:2]
        log.info("listening on %s:%s", f"[{host}]" if ":" in host else host, port)
    parent.ready()
    try:
        server.serve_forever()
    finally:
        stop_logging()
    return 0
