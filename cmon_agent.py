#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""The Container Monitor agent: a Prometheus page for each zone of a compute node and for the node.

Runs in the global zone; reads kstats through libkstat and a few commands, from outside the zones,
so that metrics are available even when the zone is out of CPU, memory or descriptors.

    cmon_agent.py [--config FILE] [--listen HOST:PORT] [--replay CAPTURE] [--libkstat PATH] …
    cmon_agent.py capture FILE
    cmon_agent.py check [--json]

This file runs when copied alone, so it also contains the kit shared by the other programs.
Map (`grep '^# ---'`), sections marked [kit] use nothing from the others:

    data types [kit]
    names and addresses [kit]
    units
    kstats
    host
    collectors
    USE [kit]
    exposition [kit]
    own metrics [kit]
    cache and throttle [kit]
    HTTP [kit]
    client [kit]
    scraping and routes
    logging and settings [kit]
    settings
    capture
    check
    text files of zones
    main
"""
from __future__ import annotations  # a SyntaxError here: this program needs Python 3.9 or later

import argparse
import atexit
import base64
import bisect
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import email.utils
import errno
import functools
import hashlib
import heapq
import html
import http.client
import http.server
import io
import itertools
import json
import logging
import math
import operator
import os
import pwd
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
import threading
import time
import types
import typing
import urllib.parse
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Generic, NamedTuple, NoReturn, Optional, Protocol, TypeVar, Union

if sys.version_info < (3, 9):       # one line instead of a traceback
    sys.exit("cmon_agent: needs Python 3.9 or later, this is " + sys.version.split()[0])

__version__ = "1.1.0"
__all__ = [     # what the other programs import
    "admin_address", "Answer", "AnswerReader", "at_least",
    "Backoff", "BASE_CSS", "begin_connect", "bracketed", "Breaker",
    "Cache", "call", "Client", "ClientError", "ClientResponse", "command_line",
    "command_settings", "CommandLine", "complain",
    "ConfigError", "Connection", "COUNTER",
    "Deferred",
    "ExpositionError",
    "Family",
    "GAUGE", "gunzip", "gzip",
    "HANDSHAKE", "HISTOGRAM", "HTML", "http_date",
    "IDLE", "is_address", "is_ip",
    "JSON",
    "label_text", "Labels", "LEVELS", "Limits", "Listener", "listening_socket", "log", "Loop",
    "MAX_BODY", "MAX_JSON_BYTES", "metadata",
    "Number", "number",
    "one_of", "open_regular", "open_streams",
    "PAGE", "page_headers", "page_row", "page_table", "parse", "parse_address", "plain_page",
    "Pool", "prepare", "Prepared", "printing",
    "read_file", "read_json", "READ_SIZE", "reason_of", "Refused", "register_process_metrics",
    "Registry",
    "render", "Request", "Response", "reused", "Route", "Router", "run_daemon",
    "Sample", "scrape_seconds", "Server", "setting", "SHORTEST_TIMEOUT", "single",
    "start_logging", "stop_logging", "SUFFIXES", "SUMMARY",
    "text", "TooLarge",
    "Use", "USE", "USE_BUSY", "USE_FROM", "USE_FULL", "USE_UP", "UUID",
    "valid_label_name", "valid_metric_name",
    "wire", "within",
]

# --- data types [kit] -----------------------------------------------------------------------------

log = logging.getLogger("cmon")

Number = Union[int, float]
COUNTER, GAUGE, HISTOGRAM, SUMMARY, UNTYPED = "counter", "gauge", "histogram", "summary", "untyped"
Labels = tuple[tuple[str, str], ...]
_make = tuple.__new__           # what a NamedTuple's own __new__ calls, a frame of Python earlier


class Sample(NamedTuple):
    """One line of a page: labels in their order, a value, and `_bucket`, `_sum` or `_count`."""
    labels: Labels
    value: Number
    suffix: str = ""


class Family(NamedTuple):
    """All samples of one metric, with its HELP and TYPE."""
    name: str
    kind: str
    help: str
    samples: Sequence[Sample]

def single(name: str, kind: str, help_text: str, value: Number | None) -> Family:
    """A family with one sample without labels; without samples if the value is None."""
    return Family(name, kind, help_text, [] if value is None else [Sample((), value)])


TEXT = "text/plain; charset=utf-8"
PAGE = "text/plain; version=0.0.4; charset=utf-8"
JSON = "application/json"
HTML = "text/html; charset=utf-8"


class Peer:
    """The other end of a connection; lives as long as the connection."""
    __slots__ = ("address", "certificate", "identity", "group", "listener")

    def __init__(self, address: str, listener: str, certificate: bytes | None = None) -> None:
        self.address = address              # IP address in text
        self.listener = listener            # name of the listener that accepted it
        self.certificate = certificate      # DER, verified by the handshake; None without one
        self.identity: object = None        # set by the application: who the certificate says it is
        self.group = ""                     # set by the application: who is authorized; "": nobody


class Request(NamedTuple):
    """One parsed request; the same bytes on the same connection always give an equal one."""
    method: str
    target: str                             # as sent
    path: str                               # percent-decoded, without the query
    query: Mapping[str, str]
    headers: Mapping[str, str]              # names in lower case
    body: bytes
    host: str                               # lower case, without the port
    gzip: bool                              # the client accepts gzip
    keep: bool                              # the connection may stay open afterwards
    peer: Peer


class Response(NamedTuple):
    """A handler's answer; the server adds length, date, connection and gzip."""
    status: int
    body: bytes
    content_type: str = TEXT
    headers: tuple[tuple[str, str], ...] = ()


class Prepared:
    """A complete answer as sent on the wire, head and body, to be sent many times.

    Each form is made when it is first asked for, unless `whole` is all there is. Any thread may
    ask: at worst two make it.
    """
    __slots__ = ("status", "_response", "_forms")

    def __init__(self, status: int, whole: bytes | None = None, response: Response | None = None
                 ) -> None:
        self.status = status
        self._response = response           # what forms are made of
        self._forms = [whole, whole]        # without gzip, and with it

    def form(self, packed: bool) -> bytes:
        """With gzip, if the body is large enough to be worth it, or without."""
        whole = self._forms[packed]
        if whole is None:
            assert self._response is not None
            whole = self._forms[packed] = wire(self._response, packed)
        return whole


Answer = Union[Response, Prepared]


class Refused(Exception):
    """A handler's refusal. The status says whose fault it is; the message goes to the client."""

    def __init__(self, status: int, message: str, *headers: tuple[str, str], code: str = ""
                 ) -> None:
        super().__init__(message)
        self.status = int(status)
        self.headers = headers + ((("X-Cmon-Error", code),) if code else ())

    def answer(self) -> Response:
        """The refusal as a response."""
        return text(self.status, str(self), *self.headers)


class Deferred:
    """An answer that comes later: the connection is parked, and no thread waits.

    `finish` may be called from any thread, the first call wins. When the deadline (monotonic
    seconds) passes first, the server sends what `expired` returns. `on_cancel` is called in the
    server's thread when the client disconnects. Both get this object: neither needs to refer to it.
    """
    __slots__ = ("deadline", "expired", "on_cancel", "answer", "_deliver", "_lock")

    def __init__(self, deadline: float, expired: Callable[[Any], Answer],
                 on_cancel: Callable[[Any], None] | None = None) -> None:
        self.deadline, self.expired, self.on_cancel = deadline, expired, on_cancel
        self.answer: Answer | None = None   # once there is one
        self._deliver: Callable[[Answer], None] | None = None
        self._lock = threading.Lock()       # answer and _deliver; the loop and one finisher

    def finish(self, answer: Answer) -> None:
        """Set the answer; later calls are ignored."""
        with self._lock:
            if self.answer is not None:
                return
            self.answer = answer
            # dropped: it refers to this object, and only the garbage collector ends a cycle
            deliver, self._deliver = self._deliver, None
        if deliver is not None:
            deliver(answer)

    def attach(self, deliver: Callable[[Answer], None]) -> None:
        """For the server: call `deliver` once, immediately if the answer is already there."""
        with self._lock:
            self._deliver = deliver
            answer = self.answer
        if answer is not None:
            deliver(answer)

    def expire(self) -> None:
        """For the server: the deadline has passed; answer with what there is."""
        self.finish(self.expired(self))


Handler = Callable[..., Union[Answer, Deferred]]


def _nothing_else(_request: Request) -> tuple[Any, ...]:
    return ()


class Route(NamedTuple):
    """A method and a path pattern; `{name}` matches one segment, passed to the handler as text.

    `options` gives more arguments for the handler, from nothing but the head; raises Refused. It
    is called once for a head that clients repeat.
    """
    method: str                             # GET serves HEAD too
    pattern: str
    handler: Handler
    options: Callable[[Request], tuple[Any, ...]] = _nothing_else


def text(status: int, message: str, *headers: tuple[str, str]) -> Response:
    """A plain answer of one line."""
    return Response(int(status), (message + "\n").encode(), TEXT, headers)

# --- names and addresses [kit] --------------------------------------------------------------------

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_ADMIN_TAG = re.compile(r"admin|admin_rack_[a-z0-9_-]+", re.IGNORECASE)


def is_ip(value: Any) -> bool:
    """Whether this is the text of an IPv4 or IPv6 address. Total: accepts any value."""
    with contextlib.suppress(OSError, TypeError, ValueError):
        socket.inet_pton(socket.AF_INET6 if ":" in value else socket.AF_INET, value)
        return True
    return False


def bracketed(host: str) -> str:
    """A host before a colon and a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def admin_address(sysinfo: Any) -> str | None:
    """The address of a compute node on the admin network, by its sysinfo; None without one. Total.

    The agent listens on it and the proxy dials it: both ask here. "Admin IP" may be "dhcp" or
    empty; then the NIC with the tag of "Admin NIC Tag" counts, or without such a member the one
    that is tagged admin, else admin_rack_X. Nodes of mockcloud are virtual and share an "Admin IP".
    """
    if not isinstance(sysinfo, dict):
        return None
    keys = ("CN Agent IP", "Admin IP") if sysinfo.get("System Type") == "Virtual" else ("Admin IP",)
    for key in keys:
        if is_ip(sysinfo.get(key)):
            return str(sysinfo[key])
    interfaces = sysinfo.get("Network Interfaces")
    tagged: list[tuple[str, str]] = []
    for nic in interfaces.values() if isinstance(interfaces, dict) else ():
        tags = nic.get("NIC Names") if isinstance(nic, dict) else None
        if isinstance(tags, list) and is_ip(nic.get("ip4addr")):
            tagged += [(tag, nic["ip4addr"]) for tag in tags if isinstance(tag, str)]
    wanted = sysinfo.get("Admin NIC Tag")
    if isinstance(wanted, str) and wanted:
        return next((address for tag, address in tagged if tag == wanted), None)
    return next((address for tag, address in tagged if tag == "admin"), None) or next(
        (address for tag, address in tagged if _ADMIN_TAG.fullmatch(tag)), None)


# --- units ----------------------------------------------------------------------------------------

Convert = Callable[[Any], Optional[Number]]


class Unit(NamedTuple):
    """The kernel's unit of a member, and its conversion to the metric's."""
    name: str                               # of the metric's value, in /v1/metadata
    convert: Convert                        # None: leave the sample out


# How the kernel says "no cap": zero, all ones (2^64 once JavaScript has rounded it), and where it
# counts in pages ptob(UINT32_MAX), here for pages of 4 kB to 64 kB (common/os/zone.c).
UNCAPPED = frozenset((0, 2 ** 64 - 1, 2 ** 64, *(0xFFFFFFFF << shift for shift in range(12, 17))))
INT_MAX = 2 ** 31 - 1                       # zone.max-lwps and zone.max-processes without a cap
FSCALE = 256                                # <sys/param.h>: load averages are fixed point


def whole(value: Any) -> Number | None:
    """A number as it is, exactly."""
    return value if isinstance(value, (int, float)) else None


def cap(value: Any) -> Number | None:
    """A cap; None if there is none."""
    return None if not isinstance(value, int) or value in UNCAPPED else value


def count_cap(value: Any) -> Number | None:
    """A cap on a count; None if there is none."""
    return None if value == INT_MAX else cap(value)


def scaled(divisor: int) -> Convert:
    """A converter that divides; exact where possible."""
    def convert(value: Any) -> Number | None:
        return value / divisor if isinstance(value, (int, float)) else None
    return convert


COUNT = Unit("", whole)
BYTES = Unit("bytes", whole)
CAP = Unit("bytes", cap)
COUNT_CAP = Unit("", count_cap)
PERCENT = Unit("percent", whole)
SECONDS = Unit("seconds", whole)
RAW_NS = Unit("nanoseconds", whole)         # metrics of the original that kept the kernel's unit
NS = Unit("seconds", scaled(10 ** 9))
US = Unit("seconds", scaled(10 ** 6))
LOAD = Unit("", scaled(FSCALE))

# --- kstats ---------------------------------------------------------------------------------------

# <sys/kstat.h>, <kstat.h>; the LP64 layout, which is the only one that shows all 64 bits: the
# driver cuts long members off for 32-bit callers.
KSTAT_STRLEN = 31                   # 30 characters and a NUL; the kernel cuts longer names
RAW, NAMED, INTR, IO, TIMER = range(5)
_CHAR, _INT32, _UINT32, _INT64, _UINT64, _FLOAT, _DOUBLE, _STRING = 0, 1, 2, 3, 4, 5, 6, 9
MAX_KSTAT_BYTES = 4 << 20           # of one kstat's data; the largest that we read has 10 kB
HEADER = struct.Struct("=qQi31sBi31sB31sB")     # kstat_t up to ks_flags
DATA = struct.Struct("=QI4xQq")                 # ks_data, ks_ndata, ks_data_size, ks_snaptime
DATA_OFFSET = 120
NAMED_ENTRY = struct.Struct("=31sBQQ")          # kstat_named_t: name, data_type, value
IO_DATA = struct.Struct("=QQIIqqqqqqII")        # kstat_io_t
IO_MEMBERS = ("nread", "nwritten", "reads", "writes", "wtime", "wlentime", "wlastupdate", "rtime",
              "rlentime", "rlastupdate", "wcnt", "rcnt")
VMINFO = struct.Struct("=QQQQQQ")               # vminfo_t of <sys/sysinfo.h>
VMINFO_MEMBERS = ("freemem", "swap_resv", "swap_alloc", "swap_avail", "swap_free", "updates")
ZONE_LINK = re.compile(r"z([0-9]{1,9})_(.+)")   # what dls calls a zone's link in the global zone


class KstatError(Exception):
    """libkstat or the kernel returned no data; `vanished`: the kstat is gone."""

    def __init__(self, message: str, ref: Ref | None = None, vanished: bool = False) -> None:
        super().__init__(message if ref is None else f"{ref}: {message}")
        self.ref = ref                  # the kstat that could not be read, if it is one
        self.vanished = vanished


class LibraryError(Exception):
    """libkstat cannot be used on this machine; the text is for the operator."""


class Ref:
    """The place of a kstat in the chain, until the chain changes. Belongs to one reader."""
    __slots__ = ("module", "instance", "name", "klass", "type", "crtime", "address", "tables",
                 "shape")

    def __init__(self, module: str, instance: int, name: str, klass: str, kind: int, crtime: int,
                 address: int) -> None:
        # disks go by their class, since each driver has a module of its own
        self.module = "disk" if klass == "disk" else module
        self.instance, self.name, self.klass = instance, name, klass
        self.type, self.crtime = kind, crtime
        self.address = address              # of the kstat_t; or the place in a recorded frame
        self.tables: tuple[Table, ...] = ()     # that want it, all of a zone or all of the node
        self.shape: Shape | None = None     # as of the last read

    def __str__(self) -> str:
        return f"{self.module}:{self.instance}:{self.name}"


class Kstat(NamedTuple):
    """One kstat, copied; nothing refers to C memory."""
    ref: Ref
    shape: Shape
    snaptime: int                   # ns since some time around boot
    raw: bytes                      # ks_data: members, and the strings behind them
    base: int                       # the address that `raw` was copied from

    @property
    def data(self) -> dict[str, Any]:
        """All members by name, as int, float or str. Tables decode theirs from `raw`."""
        if self.shape.type == NAMED:
            return decode_named(self.raw, self.shape.members, self.base)
        layout, members = _FIXED[self.shape.type]
        return dict(zip(members, layout.unpack_from(self.raw)))


class _KstatCtl(ctypes.Structure):
    _fields_ = [("kc_chain_id", ctypes.c_int), ("kc_chain", ctypes.c_void_p),
                ("kc_kd", ctypes.c_int)]


class Libkstat:
    """The library's functions, typed; MT-unsafe, so one thread at a time uses a handle."""

    def __init__(self, path: str) -> None:
        if ctypes.sizeof(ctypes.c_void_p) != 8:
            raise LibraryError("this Python is 32-bit, and the kernel truncates counters for it: "
                               "use a 64-bit Python")
        try:
            library = ctypes.CDLL(path, use_errno=True)
            pointer = ctypes.POINTER(_KstatCtl)
            self.open = library.kstat_open
            self.close = library.kstat_close
            self.update = library.kstat_chain_update
            self.read = library.kstat_read
        except (OSError, AttributeError) as error:
            raise LibraryError(f"cannot use {path}: {error}; on a machine without libkstat, "
                               "--replay FILE serves a recorded node") from None
        self.open.argtypes, self.open.restype = [], pointer
        self.close.argtypes, self.close.restype = [pointer], ctypes.c_int
        self.update.argtypes, self.update.restype = [pointer], ctypes.c_int
        self.read.argtypes = [pointer, ctypes.c_void_p, ctypes.c_void_p]
        self.read.restype = ctypes.c_int


def _name(raw: bytes) -> str:
    """A NUL-padded name as text; the kernel promises no encoding."""
    return reused(raw.split(b"\0", 1)[0].decode("utf-8", "replace"))


_text = functools.lru_cache(maxsize=4096)(_name)    # for those that many kstats have in common


def decode_named(raw: bytes, count: int, base: int) -> dict[str, Any]:
    """The members of a named kstat. `base` is the address that `raw` was copied from, since a
    string is a pointer into the same block; one that points elsewhere is no member."""
    data: dict[str, Any] = {}
    end = count * NAMED_ENTRY.size
    for name, kind, low, high in NAMED_ENTRY.iter_unpack(raw[:end]):
        if kind == _UINT64:
            data[_text(name)] = low
        elif kind == _UINT32:
            data[_text(name)] = low & 0xFFFFFFFF
        elif kind == _STRING:
            start, size = low - base, high & 0xFFFFFFFF
            if low and end <= start and start + size <= len(raw):
                data[_text(name)] = raw[start:start + size].split(b"\0", 1)[0].decode(
                    "utf-8", "replace")
        elif kind == _INT64:
            data[_text(name)] = low - ((low >> 63) << 64)
        elif kind == _INT32:
            low &= 0xFFFFFFFF
            data[_text(name)] = low - ((low >> 31) << 32)
        elif kind == _CHAR:
            data[_text(name)] = struct.pack("=QQ", low, high).split(b"\0", 1)[0].decode(
                "utf-8", "replace")
        elif kind == _DOUBLE:
            data[_text(name)] = struct.unpack("=d", struct.pack("=Q", low))[0]
        elif kind == _FLOAT:
            data[_text(name)] = struct.unpack("=f", struct.pack("=I", low & 0xFFFFFFFF))[0]
    return data


_FIXED = {IO: (IO_DATA, IO_MEMBERS), RAW: (VMINFO, VMINFO_MEMBERS)}


class Shape:
    """What kstats have in common whose members are in the same places, and which are wanted by the
    same tables: how to take from the raw data what the tables want."""
    __slots__ = ("type", "members", "size", "tables", "block", "unpack", "places", "floats",
                 "zonename", "name_place")

    def __init__(self, kind: int, members: int, size: int, tables: tuple[Table, ...]) -> None:
        self.type, self.members, self.size, self.tables = kind, members, size, tables
        self.block = ctypes.c_char * size       # to copy the data by
        self.unpack: Callable[[bytes], tuple[Any, ...]]     # the wanted members, as in memory
        self.places: dict[str, int] = {}        # of members among what that gives
        self.floats: set[str] = set()           # which of them are floating point
        self.zonename: int | None = None        # where the pointer of this STRING is in the data
        self.name_place: int | None = None      # of the string itself among what `unpack` gives

    def look(self, raw: bytes, base: int) -> None:
        """Find the members by the data of one kstat."""
        offsets: dict[str, tuple[int, str]] = {}    # and formats; of equal names the last counts
        strings: list[tuple[int, str]] = []
        if self.type == NAMED:
            for place in range(0, self.members * NAMED_ENTRY.size, NAMED_ENTRY.size):
                name, kind, _, _ = NAMED_ENTRY.unpack_from(raw, place)
                if kind in _CODES:
                    offsets[_text(name)] = place + 32, _CODES[kind]
                elif kind == _STRING:
                    strings.append((place + 32, _text(name)))
        else:
            layout, names = _FIXED[self.type]
            place = 0
            for member, code in zip(names, layout.format[1:]):
                offsets[member] = place, code
                place += struct.calcsize("=" + code)
        wanted = {row.member for table in self.tables for row in table.metrics}
        taken = sorted([(*offsets[name], name) for name in wanted & offsets.keys()])
        self.zonename = next((place for place, name in strings if name == "zonename"), None)
        if self.zonename is not None and len(strings) == 1:     # then its text has one place, too
            start = _POINTER.unpack_from(raw, self.zonename)[0] - base
            if self.members * NAMED_ENTRY.size <= start <= self.size - UUID_SIZE:
                self.name_place = len(taken)    # behind all members
                taken.append((start, f"{UUID_SIZE}s", "zonename"))
        form, end = "=", 0
        for count, (place, code, name) in enumerate(taken):
            form += f"{place - end}x{code}"
            end = place + struct.calcsize("=" + code)
            if count != self.name_place:
                self.places[name] = count
                if code in "fd":
                    self.floats.add(name)
        self.unpack = struct.Struct(form).unpack_from


_CODES = {_INT32: "i", _UINT32: "I", _INT64: "q", _UINT64: "Q", _FLOAT: "f", _DOUBLE: "d"}
_STRING_AT = struct.Struct("=QI")               # kstat_named_t: str.addr, str.len
_POINTER = struct.Struct("=Q")                  # … of these the first
UUID_SIZE = 37                                  # with a NUL
_shapes: dict[tuple[Any, ...], Shape] = {}


def shape_of(ref: Ref, kind: int, raw: bytes, members: int, base: int) -> Shape:
    """Look at names and types of all members; raises KstatError for data that are not read here,
    or lie about their size. This is done again only when the chain or the size has changed: a
    kernel does not rename the members of a kstat that is installed."""
    size = len(raw)
    names = 0
    if kind == NAMED:
        end = members * NAMED_ENTRY.size
        if end > size:
            raise KstatError(f"{members} members do not fit into {size} bytes", ref)
        names = int.from_bytes(raw[:end], "little") & _names_only(members)
    elif kind not in _FIXED or size < _FIXED[kind][0].size \
            or (kind == RAW and ref.name != "vminfo"):
        raise KstatError(f"unsupported type {kind} with {size} bytes", ref)
    key = (kind, members, size, names, ref.tables)
    shape = _shapes.get(key)
    if shape is None:
        if len(_shapes) >= MAX_TEMPLATES:
            _shapes.clear()
        shape = Shape(kind, members, size, ref.tables)
        shape.look(raw, base)
        _shapes[key] = shape
    return shape


@functools.lru_cache(maxsize=256)
def _names_only(members: int) -> int:
    """A mask for names and types of this many members, as one number; it excludes the values."""
    return int.from_bytes((b"\xff" * 32 + bytes(16)) * members, "little")


def pack(ref: Ref, snaptime: int, data: Mapping[str, Any]) -> Kstat:
    """A named kstat with these members, laid out as by the kernel."""
    members = {name: value for name, value in data.items() if isinstance(value, (int, float, str))}
    entries, strings, base = [], b"", 1             # a pointer is not NULL
    for name, value in members.items():
        if isinstance(value, str):
            content = value.encode("utf-8", "replace") + b"\0"
            kind, high = _STRING, len(content)
            low = base + len(members) * NAMED_ENTRY.size + len(strings)
            strings += content
        elif isinstance(value, float):
            kind, (low,), high = _DOUBLE, struct.unpack("=Q", struct.pack("=d", value)), 0
        else:
            kind, high = _INT64 if value < 0 else _UINT64, 0
            low = min(max(value, -2 ** 63), 2 ** 64 - 1) % 2 ** 64
        entries.append(NAMED_ENTRY.pack(name.encode("utf-8", "replace"), kind, low, high))
    raw = b"".join(entries) + strings
    return Kstat(ref, shape_of(ref, NAMED, raw, len(entries), base), snaptime, raw, base)


class Reading(NamedTuple):
    """What was read together, and what could not be; of a zone all of it from a single boot."""
    kstats: list[Kstat]
    errors: list[KstatError]
    zone_id: int = 0


def is_of_zone(kstat: Kstat, zone: bytes) -> bool:
    """Whether a kstat's member `zonename` is this zone's; one without it is."""
    shape, place = kstat.shape, kstat.shape.zonename
    if place is None or shape.name_place is not None \
            and shape.unpack(kstat.raw)[shape.name_place] == zone + b"\0":
        return True
    address, size = _STRING_AT.unpack_from(kstat.raw, place)
    start = address - kstat.base
    if not address or start < shape.members * NAMED_ENTRY.size or start + size > len(kstat.raw):
        return True
    member = kstat.raw[start:start + size]
    return member == zone + b"\0" or member.split(b"\0", 1)[0] == zone


class Wanted(NamedTuple):
    """The tables of a module, and the names of the kstats that they need."""
    tables: tuple[Table, ...]
    whole: frozenset[bytes]
    begins: tuple[bytes, ...]


def wanted_of(tables: Iterable[Table]) -> dict[bytes, Wanted]:
    """By module, what tables want. A module may have thousands of kstats that none does: each kmem
    cache, task queue and flow of the platform is one of `unix`."""
    by_module: dict[str, list[Table]] = {}
    for table in tables:
        by_module.setdefault(table.module, []).append(table)
    return {module.encode(): Wanted(
        tuple(of_module),
        frozenset(table.names.encode() for table in of_module if not table.names.endswith("*")),
        tuple(table.names[:-1].encode() for table in of_module if table.names.endswith("*")))
        for module, of_module in by_module.items()}


class Index:
    """Where the kstats are that tables want, by module and by zone; built again when the chain has
    changed.

    What belongs to a zone is found by the zone's id, the rest by module: a page looks up and never
    walks the chain.
    """

    def __init__(self) -> None:
        self.modules: dict[str, list[Ref]] = {}     # of the compute node itself
        self.zones: dict[int, list[Ref]] = {}       # by zone id: what belongs to that zone
        self.misc: dict[int, Ref] = {}              # by zone id: its zone_misc
        self.by_prefix: dict[str, list[int]] = {}   # first 30 characters of a name -> zone ids
        self.ids: dict[str, int] = {}               # by whole names, those that were looked up
        self.count = 0                              # length of the chain
        self._tables: dict[tuple[Table, ...], tuple[Table, ...]] = {}

    def add(self, raw: bytes, address: int) -> int:
        """Parse one header; return the address of the next."""
        (crtime, following, _kid, module, _resv, instance, name, kind, klass,
         _flags) = HEADER.unpack_from(raw)
        self.count += 1
        wanted = WANTED.get(b"disk" if klass.startswith(b"disk\0") else module.rstrip(b"\0"))
        if wanted is not None and (name.startswith(wanted.begins)
                                   or name.rstrip(b"\0") in wanted.whole):
            self.place(Ref(_text(module), instance, _name(name), _text(klass), kind, crtime,
                           address))
        return int(following)

    def place(self, ref: Ref) -> None:
        """Index one kstat, if a table needs it."""
        wanted = WANTED.get(ref.module.encode())
        tables = [table for table in wanted.tables if table.has(ref.name)] if wanted else []
        if ref.module == "zones":
            self.by_prefix.setdefault(ref.name, []).append(ref.instance)
        for table in tables:
            zone_id = None if table.zone is None else table.zone(ref)
            if zone_id is not None:
                ref.tables = self._shared([table for table in tables if table.zone])
                refs = self.zones.setdefault(zone_id, [])
                if zone_id in self.misc:        # which stays the last, as it is read last
                    refs.insert(-1, ref)
                else:
                    refs.append(ref)
                    if ref.module == "zones":
                        self.misc[zone_id] = ref
                return
        tables = [table for table in tables if table.zone is None]
        if tables:
            ref.tables = self._shared(tables)
            self.modules.setdefault(ref.module, []).append(ref)

    def _shared(self, tables: Sequence[Table]) -> tuple[Table, ...]:
        """The same tuple for all kstats of the same tables."""
        key = tuple(tables)
        return self._tables.setdefault(key, key)


_DataBytes = ctypes.c_char * DATA.size


class Handle:
    """One kstat_ctl_t with its index. Calls come from one thread at a time."""

    def __init__(self, library: Libkstat) -> None:
        self._library = library
        self._open()
        self.rebuilds = 0
        self.rebuild_seconds = 0.0      # CPU time that the last one took
        self.calls = 0

    def _open(self) -> None:
        self._control = self._library.open()
        if not self._control:
            raise KstatError(f"kstat_open: {os.strerror(ctypes.get_errno()).lower()}")
        with contextlib.suppress(OSError):      # a library that has no descriptor of its own
            os.set_inheritable(self._control.contents.kc_kd, False)
        self.index = self._build()

    def close(self) -> None:
        """Free the chain; all addresses become invalid."""
        self._library.close(self._control)

    def reopen(self) -> None:
        """Close and reopen: the only way to see kstats that were created but not yet installed."""
        self.close()
        self._open()
        self.rebuilds += 1

    def update(self) -> bool:
        """Follow the kernel's chain; True when the index is new."""
        result = self._library.update(self._control)
        if result < 0:
            raise KstatError(f"kstat_chain_update: {os.strerror(ctypes.get_errno()).lower()}")
        if result:
            self.index = self._build()
            self.rebuilds += 1
        return bool(result)

    @property
    def chain_id(self) -> int:
        """The kernel's id of the current chain."""
        return int(self._control.contents.kc_chain_id)

    def _build(self) -> Index:
        began = time.thread_time()
        index = Index()
        address = self._control.contents.kc_chain
        copy, size, add = ctypes.string_at, HEADER.size, index.add
        while address:
            address = add(copy(address, size), address)
        self.rebuild_seconds = time.thread_time() - began
        return index

    def read(self, ref: Ref) -> Kstat:
        """Read and copy one kstat; raises KstatError. May block forever."""
        self.calls += 1
        if self._library.read(self._control, ref.address, None) < 0:
            number = ctypes.get_errno()
            raise KstatError(os.strerror(number).lower(), ref, vanished=number == errno.ENXIO)
        pointer, members, size, snaptime = DATA.unpack(_DataBytes.from_address(
            ref.address + DATA_OFFSET))
        shape = ref.shape
        if pointer and shape is not None and shape.size == size and shape.members == members:
            return _make(Kstat, (ref, shape, snaptime, shape.block.from_address(pointer).raw,
                                 pointer))
        if not pointer or size > MAX_KSTAT_BYTES:
            raise KstatError(f"invalid data size of {size} bytes", ref)
        raw = ctypes.string_at(pointer, size)
        ref.shape = shape = shape_of(ref, ref.type, raw, members, pointer)
        return Kstat(ref, shape, snaptime, raw, pointer)

# --- host -----------------------------------------------------------------------------------------

SLOW_SECONDS = 0.1              # a job that takes longer goes on beside the loop
STUCK_SECONDS = 0.5             # a kstat_read that takes longer counts as blocked
MAX_HANDLES = 3                 # open chains, including those of blocked threads
FOLLOW_SECONDS = 1.0            # between two looks for kstats that are new; what is gone says so
REOPEN_SECONDS = 10.0           # between two attempts to find kstats that were not yet installed
REBUILD_SHARE = 20              # an index that took 1 s of CPU is not rebuilt within 20 s
FORCED_SHARE = 4                # … after 4 s if a requested zone is missing
MAX_OUTPUT = 8 << 20            # bytes of a command: a zfs list of 10,000 datasets is 2 MB
POLL_SECONDS = 0.1              # until the exit of a command that leaves its output open is noticed
LEFT_BEHIND_SECONDS = 0.5       # … and the time that its children have to write to it
SYSINFO_MEMBERS = (             # members kept in a capture; boot parameters may contain secrets
    "Live Image", "System Type", "Boot Time", "Datacenter Name", "UUID", "Hostname",
    "Admin NIC Tag", "Admin IP", "CN Agent IP", "CPU Count", "MiB of Memory", "Zpool",
    "Network Interfaces")


class CommandError(Exception):
    """A command cannot be run, fails or hangs; the text names it and the reason."""


class NoSuchZone(Exception):
    """No running zone has this name."""


class Output(NamedTuple):
    """Exit status and output of a command."""
    status: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        """The last line on stderr, the most useful one after a failure, or the exit status; the
        signal if one has killed it."""
        if self.status < 0:
            name = [f" ({one.name})" for one in signal.Signals if one == -self.status]
            return f"killed by signal {-self.status}{''.join(name)}"
        lines = self.stderr.strip().splitlines()
        return lines[-1][:300] if lines else f"exit {self.status} and no message"

    def checked(self, command: str) -> str:
        """The output of a command; raises CommandError if it failed."""
        if self.status:
            raise CommandError(f"{command}: {self.last_line}")
        return self.stdout


class Commands:
    """Runs commands, each with a deadline and in a process group that is killed as a whole.

    A command that survives SIGKILL (it waits in the kernel for a dead disk) is abandoned; until it
    is gone, commands with the same key are refused.
    """
    # `svcadm refresh` sends SIGHUP to every process of the service, commands included. An ignored
    # signal stays ignored across exec; a blocked one does not, as some shells reset the mask.
    DEAF = ("/bin/sh", "-c", 'trap "" HUP; exec "$@"', "sh")

    def __init__(self) -> None:
        self._hanging: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()       # the two above

    def run(self, key: str, argv: Sequence[str], timeout: float, limit: int = MAX_OUTPUT) -> Output:
        """Wait for a command for at most `timeout` seconds; raises CommandError."""
        with self._lock:
            hanging = self._hanging.get(key)
            if hanging is not None and hanging[0].poll() is None:
                raise CommandError(f"{argv[0]}: an earlier run has hung for "
                                   f"{time.monotonic() - hanging[1]:.0f} s and cannot be killed")
            self._hanging.pop(key, None)
        began = time.monotonic()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP,))     # until ignored
        try:
            os.stat(argv[0])                # otherwise the shell prints its own message
            process = subprocess.Popen(
                [*self.DEAF, *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, start_new_session=True, cwd="/",
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"})
        except (OSError, ValueError) as error:
            raise CommandError(f"{argv[0]}: {reason_of(error)}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with self._lock:
            self._running.add(process)
        try:
            stdout, stderr, problem = self._read(process, began + timeout, limit)
        finally:
            with self._lock:
                self._running.discard(process)
            _kill_group(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)           # enough for everything that can be killed
        if process.poll() is None:
            with self._lock:
                self._hanging[key] = (process, began)
            raise CommandError(f"{argv[0]}: {problem or 'timed out'} and cannot be killed")
        if problem:
            raise CommandError(f"{argv[0]}: {problem}")
        return Output(process.returncode, stdout.decode("utf-8", "replace"),
                      stderr.decode("utf-8", "replace"))

    @property
    def hanging(self) -> int:
        """The number of commands that could not be killed and still exist."""
        with self._lock:
            return sum(process.poll() is None for process, _ in self._hanging.values())

    def kill(self) -> None:
        """Kill all running commands: nobody else enforces their deadlines."""
        with self._lock:
            for process in self._running:
                _kill_group(process)

    def _read(self, process: subprocess.Popen[bytes], end: float, limit: int
              ) -> tuple[bytes, bytes, str]:
        """Both outputs until they are closed, too long or too late, and what went wrong. After
        the process has ended, only what arrives soon: a child may hold them open for ever."""
        assert process.stdout is not None and process.stderr is not None
        stdout, stderr, last = bytearray(), bytearray(), math.inf
        with process.stdout, process.stderr, selectors.DefaultSelector() as selector:
            for pipe, output in ((process.stdout, stdout), (process.stderr, stderr)):
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ, output)
            while selector.get_map():
                now = time.monotonic()
                if last == math.inf and process.poll() is not None:
                    last = min(now + LEFT_BEHIND_SECONDS, end)
                if now >= last:
                    break
                if now >= end:
                    return b"", b"", "timed out"
                for key, _ in selector.select(min(end - now, last - now, POLL_SECONDS)):
                    piece = os.read(key.fd, 65536)
                    if not piece:
                        selector.unregister(key.fileobj)
                    key.data.extend(piece)
                if len(stdout) + len(stderr) > limit:
                    return b"", b"", f"writes more than {limit} bytes"
        try:
            process.wait(max(end - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            return b"", b"", "timed out"
        return bytes(stdout), bytes(stderr), ""


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill all remaining processes of a command."""
    with contextlib.suppress(ProcessLookupError, PermissionError):      # nothing is left
        os.killpg(process.pid, signal.SIGKILL)


class Sysinfo(NamedTuple):
    """What the agent needs from sysinfo(8), which runs as root only; "" and 0 where missing."""
    uuid: str = ""
    hostname: str = ""
    admin_ip: str = ""
    pool: str = ""
    memory_bytes: int = 0
    cpus: int = 0


def parse_sysinfo(content: Any) -> Sysinfo:
    """sysinfo's JSON. Any member may be missing or malformed; some numbers are strings."""
    if not isinstance(content, dict):
        return Sysinfo()

    def string(name: str) -> str:
        value = content.get(name)
        return value if isinstance(value, str) else ""

    def count(name: str) -> int:
        digits = str(content.get(name))
        return int(digits) if re.fullmatch("[0-9]{1,15}", digits) else 0
    return Sysinfo(string("UUID"), string("Hostname"), admin_address(content) or "",
                   string("Zpool"), count("MiB of Memory") << 20, count("CPU Count"))


class Reader:
    """A kstat handle: everything that may block in the library happens here."""

    def __init__(self, kstats: KstatThreads) -> None:
        self._kstats = kstats
        self._handle: AnyHandle
        self._is_open = False               # whether there is a handle
        self._updated = -math.inf
        self._reopened = (-math.inf, -1)    # when, and at which chain id
        self.doing: tuple[Ref | str, float] | None = None   # the current library call, since when
        self.job: Job | None = None         # the current one …
        self.began = 0.0                    # … and since when
        self.beside = False                 # another thread runs the loop meanwhile
        self.abandoned = False              # and another reader has the job

    def run(self, job: Job) -> Any:
        """Do the work of a job, with an open handle. The result, or why there is none: KstatError
        or NoSuchZone."""
        try:
            if not self._is_open:
                self._handle = self._watched("kstat_open", self._kstats.open_handle)
                self._is_open = True
            return job.work(self)
        except (KstatError, NoSuchZone) as error:
            return error
        except Exception as error:          # an internal error affects one job
            log.exception("a kstat job failed")
            return KstatError(f"internal error: {error}")

    def note(self) -> None:
        """Add the counts of its handle to those of all."""
        if self._is_open:
            kstats, handle = self._kstats, self._handle
            kstats.chain_length, kstats.rebuild_seconds = handle.index.count, handle.rebuild_seconds
            kstats.rebuilds += handle.rebuilds
            kstats.reads += handle.calls
            handle.rebuilds = handle.calls = 0

    def close(self) -> None:
        """Close the handle."""
        if self._is_open:
            self.note()
            self._handle.close()

    # for jobs

    @property
    def index(self) -> Index:
        """The chain as it was at the last update."""
        return self._handle.index

    def read(self, ref: Ref) -> Kstat:
        """One kstat; raises KstatError."""
        if self.abandoned:                  # it must not block on another one
            raise KstatError("was given up", ref)
        if self._kstats.quarantine:
            self._kstats.check_quarantine(ref)
        self.doing = (ref, self._kstats.now())
        try:
            return self._handle.read(ref)
        finally:
            self.doing = None

    def read_all(self, refs: Iterable[Ref]) -> Reading:
        """These kstats, and the errors of those that cannot be read. Vanished kstats are left out:
        a cap was removed, a link renamed."""
        kstats: list[Kstat] = []
        errors: list[KstatError] = []
        read, now, quarantine = self._handle.read, self._kstats.now, self._kstats.quarantine
        try:
            for ref in refs:
                if self.abandoned:
                    break
                try:
                    if quarantine:
                        self._kstats.check_quarantine(ref)
                    self.doing = (ref, now())
                    kstats.append(read(ref))
                except KstatError as error:
                    if not error.vanished:
                        errors.append(error)
        finally:
            self.doing = None
        return Reading(kstats, errors)

    def follow(self, force: bool = False) -> bool:
        """Update the chain, with a limited rate; True if it has changed."""
        now = self._kstats.now()
        rebuild = self._handle.rebuild_seconds
        pause = max(FOLLOW_SECONDS, REBUILD_SHARE * rebuild)
        if force:                       # for a missing zone: only if cheap, or not too often
            pause = FORCED_SHARE * rebuild if rebuild > 0.01 else 0.0
        if now - self._updated < pause:
            return False
        self._updated = now
        changed = self._watched("the chain", self._handle.update)
        if changed:
            self._kstats.forget_names(self.index)
        return changed

    def reopen(self, force: bool = False) -> bool:
        """Close and open the handle to find a kstat that should be there: once for each chain id
        and not too often; `force`: an operator asks for it."""
        now, chain_id = self._kstats.now(), self._handle.chain_id
        passed = now - self._reopened[0]
        if passed < REBUILD_SHARE * self._handle.rebuild_seconds if force else \
                passed < REOPEN_SECONDS or chain_id == self._reopened[1]:
            return False
        self._reopened = (now, chain_id)
        self._is_open = False               # should it fail, the next job opens a new one
        self._watched("the chain", self._handle.reopen)
        self._is_open = True
        return True

    def zone_id(self, zone: str) -> int | None:
        """The id of a running zone, also where names share their first 30 characters. Raises
        KstatError when that cannot be decided: None means that the zone does not run."""
        known = self.index.ids.get(zone)
        if known is not None:
            return known
        problem: KstatError | None = None
        for zone_id in self.index.by_prefix.get(zone[:KSTAT_STRLEN - 1], ()):
            try:
                if self.zone_name(zone_id) == zone:
                    self.index.ids[zone] = zone_id
                    return zone_id
            except KstatError as error:
                problem = error
        if problem is not None:
            raise problem
        return None

    def zone_name(self, zone_id: int) -> str | None:
        """The whole name of a zone, read once for each boot of it: from its zone_misc or, where
        that cannot be read, from others of its kstats; raises KstatError."""
        misc = self.index.misc.get(zone_id)
        if misc is None:
            return None
        key = (zone_id, misc.name, misc.crtime)
        problems: list[KstatError] = []
        if key not in self._kstats.names:
            for ref in (misc, *[ref for ref in self.index.zones.get(zone_id, ())
                                if ref.module in (MEMCAP.module, ZONE_VFS.module)]):
                try:
                    name = self.read(ref).data.get("zonename")
                except KstatError as error:
                    if ref is misc and error.vanished:
                        return None
                    problems.append(error)
                    continue
                if isinstance(name, str) and name or ref is misc:
                    self._kstats.names[key] = str(name or misc.name)
                    break
            else:
                raise problems[0]
        return self._kstats.names[key]

    def guest(self, name: str) -> int | None:
        """The minor number of a bhyve guest by its name in vmm. Each name is read once."""
        guests = self._kstats.guests
        for ref in self.index.modules.get(GUESTS.module, ()):
            if GUESTS in ref.tables:
                key = (ref.instance, ref.crtime)
                if key not in guests:
                    try:
                        guests[key] = str(self.read(ref).data.get("vm_name", ""))
                    except KstatError:
                        continue            # it is being removed, and so is its zone
                if guests[key] == name:
                    return ref.instance
        return None

    def _watched(self, what: str, call: Callable[[], V]) -> V:
        """Call the library; KstatThreads.watch notices if it does not return."""
        self.doing = (what, self._kstats.now())
        try:
            return call()
        finally:
            self.doing = None


class Job(NamedTuple):
    """Work with kstats, which touches nothing else and runs again if it blocks; and its callback,
    which runs in the loop."""
    work: Callable[[Reader], Any]
    done: Callable[[Any], None]             # with the result, a KstatError or NoSuchZone


class Replaced(BaseException):
    """Another thread runs the loop: this one must touch nothing and end."""


class Runner(Protocol):
    """What threads that read kstats run."""
    alarm: Callable[[float], object]        # cause a call of `watch` in so many seconds; 0: none

    def turn(self) -> bool:
        """One turn of the loop; False when there shall be no other."""

    def resume(self) -> None:
        """Called first by a thread that takes over, perhaps in the middle of a turn."""

    def ended(self) -> None:
        """Called last by the thread; KstatThreads.error has ended it, or is None."""


class KstatThreads:
    """Threads that run a loop and read kstats in it, without handing each read to another thread,
    which would cost as much as the read.

    One runs the loop. When a job takes long, `watch` has a new thread go on with the loop, and the
    old one ends with its job. When a read does not return, its reader is given up as well: another
    one, with a new handle, does the job again without the kstat that blocks.
    """

    def __init__(self, open_handle: Callable[[], AnyHandle], loop: Loop,
                 now: Callable[[], float] = time.monotonic) -> None:
        self.open_handle, self.loop, self.now = open_handle, loop, now
        self.names: dict[tuple[int, str, int], str] = {}    # (id, short name, birth) -> zone name
        self.guests: dict[tuple[int, int], str] = {}        # (minor, birth) -> name of a VM
        self.quarantine: dict[str, float] = {}      # the kstat that blocks a thread -> since when
        self.chain_length = 0
        self.rebuilds = 0
        self.rebuild_seconds = 0.0
        self.reads = 0
        self.given_up = 0
        self._runner: Runner
        self._alarm: Callable[[float], object] = lambda seconds: None
        self._active: Reader | None = None
        self._blocked: list[Reader] = []
        self._waiting: list[Job] = []       # for a reader that is beside the loop
        self._closed = False
        self.error: BaseException | None = None     # what has ended the thread
        self._lock = threading.Lock()       # `quarantine`, the readers, and what is true of them

    def start(self, runner: Runner) -> None:
        """Have a thread run the loop."""
        self._runner, self._alarm = runner, runner.alarm
        self._start(resume=False)

    def submit(self, job: Job) -> None:
        """From any thread: run a job soon."""
        self.loop.call_soon(self.perform, job)

    def perform(self, job: Job) -> None:
        """In the loop: run a job now, or when the reader is free. Raises Replaced."""
        reader = self._active
        if reader is not None and reader.job is not None:
            self._waiting.append(job)
            return
        if reader is None:
            if len(self._blocked) >= MAX_HANDLES:
                job.done(KstatError(f"libkstat blocks {MAX_HANDLES} threads: "
                                    + ", ".join(sorted(self.quarantine))))
                return
            reader = self._active = Reader(self)
        reader.began, reader.job = self.now(), job
        self._alarm(SLOW_SECONDS)           # `watch` may be called before, for the last job
        result = reader.run(job)
        with self._lock:                    # `watch` must see all of this or nothing
            if not reader.beside:
                reader.job = None
                self._alarm(0)
        if reader.beside:
            if reader.abandoned:
                self._gone(reader)
            else:
                self.loop.call_soon(self._back, reader, result)
            raise Replaced
        job.done(result)

    def _back(self, reader: Reader, result: Any) -> None:
        """In the loop: a reader has done its job beside it."""
        with self._lock:
            job, reader.job, reader.beside = reader.job, None, False
            self._alarm(0)
        assert job is not None
        self._do_waiting()
        job.done(result)

    def _do_waiting(self, *jobs: Job) -> None:
        waiting, self._waiting = self._waiting, []
        for job in (*jobs, *waiting):
            self.submit(job)

    def watch(self) -> None:
        """From a thread that waits: have another one run the loop if a job takes long, and give up
        its reader if the library does not return."""
        with self._lock:
            reader, now = self._active, self.now()
            if reader is None or reader.job is None:
                return
            doing = reader.doing
            slow = SLOW_SECONDS - (now - reader.began)
            left = STUCK_SECONDS if doing is None else STUCK_SECONDS - (now - doing[1])
            if not reader.beside and slow <= 0:
                try:
                    self._start(resume=True)        # it waits for the lock
                    reader.beside = True
                except RuntimeError as error:
                    log.error("cannot start a thread while a job with kstats takes long: %s", error)
                    slow = STUCK_SECONDS
            if not reader.beside or left > 0:
                self._alarm(max(left if reader.beside else slow, 0.001))
                return
            assert doing is not None
            reader.abandoned = True
            self._active = None
            self._blocked.append(reader)
            self.given_up += 1
            self.quarantine = {**self.quarantine, str(doing[0]): doing[1]}
            self.loop.call_soon(self._do_waiting, reader.job)
        log.warning("reading kstat %s has not returned; continuing with a new handle", doing[0])

    def check_quarantine(self, ref: Ref) -> None:
        """Raises KstatError for a kstat that another thread is blocked on."""
        since = self.quarantine.get(str(ref))
        if since is not None:
            raise KstatError(f"has been blocked for {self.now() - since:.0f} s", ref)

    def forget_names(self, index: Index) -> None:
        """The chain has changed: from time to time, drop the names of zones that are gone."""
        if len(self.names) > 2 * len(index.zones) + 100:
            born = {(zone_id, ref.name, ref.crtime) for zone_id, ref in index.misc.items()}
            self.names = {key: name for key, name in self.names.items() if key in born}
        self.guests = {}

    def count(self) -> None:
        """Bring the counts for /metrics up to date."""
        reader = self._active               # `watch` may take it away
        if reader is not None:
            reader.note()

    @property
    def blocked(self) -> int:
        """The number of threads blocked in the library."""
        return len(self._blocked)

    def close(self) -> None:
        """End the thread; blocked ones remain until the process exits."""
        self._closed = True
        self.loop.wake()

    def _start(self, resume: bool) -> None:
        threading.Thread(target=self._run, args=(resume,), name="loop", daemon=True).start()

    def _run(self, resume: bool) -> None:
        """A thread; `resume`: it replaces another one."""
        with self._lock:
            self.loop.adopt()
        try:
            if resume:
                self._runner.resume()
            while not self._closed and self._runner.turn():
                pass
            with self._lock:
                reader, self._active = self._active, None
            if reader is not None and reader.job is None:   # otherwise a thread is beside the loop
                reader.close()
        except Replaced:
            return
        except BaseException as error:      # a bug, or no memory: the process must not go on
            self.error = error
        self._runner.ended()

    def _gone(self, reader: Reader) -> None:
        """The library has returned at last: the kstat that blocked it may be read again."""
        with self._lock:
            self._blocked.remove(reader)
            held = {str(other.doing[0]) for other in self._blocked if other.doing is not None}
            self.quarantine = {what: since for what, since in self.quarantine.items()
                               if what in held}
        log.info("a blocked read of kstats has returned")
        reader.close()


def read_zone(reader: Reader, zone: str, debug_id: int | None = None,
              skipped: AbstractSet[str] = frozenset()) -> Reading:
    """Read a zone's kstats, except those of skipped collectors; raises NoSuchZone, KstatError.

    The zone's zone_misc is looked up first and read last: if it is still there, the zone id has
    belonged to this zone all the time.
    """
    reader.follow()
    for _ in range(4):
        zone_id = reader.zone_id(zone)
        index = reader.index
        misc = None if zone_id is None else index.misc.get(zone_id)
        if zone_id is None or misc is None:
            if reader.follow(force=True) or reader.reopen():
                continue
            raise NoSuchZone(zone)
        refs = index.zones[zone_id]
        if skipped:
            refs = [ref for ref in refs if ref is misc or not all(
                [table.collector in skipped for table in ref.tables])]
        if debug_id is not None and VCPU.collector not in skipped:
            refs = [*_guest(reader, debug_id), *refs]
        kstats, errors = reader.read_all(refs)[:2]
        if kstats and kstats[-1].ref is misc and is_of_zone(kstats[-1], zone.encode()) \
                or errors and errors[-1].ref is misc:
            return Reading(kstats, errors, zone_id)
        reader.follow(force=True)           # it has rebooted or stopped in between: read again
    raise KstatError(f"zone {zone} changes faster than it can be read")


GUEST_NAME = "SYSbhyve-{}"                  # zhyve names a guest after its zone's debug id


def _guest(reader: Reader, debug_id: int) -> list[Ref]:
    """vCPUs of a bhyve zone. (viona counts by NIC; its numbers name neither zone nor guest.)"""
    minor = reader.guest(GUEST_NAME.format(debug_id))
    return [] if minor is None else [ref for ref in reader.index.modules.get(VCPU.module, ())
                                     if ref.instance == minor and VCPU in ref.tables]


def read_tables(reader: Reader, *tables: Table) -> Reading:
    """The compute node's kstats of these tables."""
    reader.follow()
    return reader.read_all([
        ref for module in dict.fromkeys([table.module for table in tables])
        for ref in reader.index.modules.get(module, ())
        if any([table in ref.tables for table in tables])])


def read_zones(reader: Reader, *tables: Table) -> tuple[dict[int, str], list[Kstat]]:
    """The running zones by id, and their kstats of these tables; failures are left out."""
    reader.follow()
    zones: dict[int, str] = {}
    kstats: list[Kstat] = []
    for zone_id, refs in reader.index.zones.items():
        try:
            name = reader.zone_name(zone_id)
        except KstatError:
            continue                        # the zone's page tells why
        if name is None:
            continue
        zones[zone_id] = name
        kstats += reader.read_all([ref for ref in refs if any(
            table in ref.tables for table in tables)]).kstats
    return zones, kstats


class Vm(NamedTuple):
    """The used members of a VM object of vminfod."""
    zone: str
    alias: str
    brand: str
    state: str
    owner: str
    nics: Mapping[str, tuple[str, str]]     # link in the zone -> nic_tag, network_uuid
    core: bool                              # has a role in the platform
    ports: tuple[int, ...]                  # metricPorts of a core zone
    addresses: tuple[str, ...]
    zonepath: str


def vm_of(record: Any) -> Vm | None:
    """A VM object, whose members may be missing or malformed; None without a zone name."""
    members = _members(record)

    def string(name: str) -> str:
        value = members.get(name)
        return reused(value) if isinstance(value, str) else ""
    zone = string("zonename") or string("uuid")
    if not zone:
        return None
    # Only the platform's services are scraped: a tenant chooses tags, ports and addresses of his
    # VMs, and must not send the global zone there.
    platform = string("owner_uuid") == ADMIN_UUID
    addresses = tuple([
        ip.split("/")[0] for nic in _nics(record) if _ADMIN_TAG.fullmatch(str(nic.get("nic_tag")))
        for ip in (nic.get("ip"),) if isinstance(ip, str) and is_ip(ip.split("/")[0])])
    return Vm(zone, string("alias"), string("brand"), string("zone_state") or string("state"),
              string("owner_uuid"), nic_labels(record), is_core(record),
              tuple(metric_ports(record)) if platform else (), addresses if platform else (),
              string("zonepath"))


class Vms:
    """The VMs of this node, followed through vminfod's event stream, off the scrape path.

    `answered`: it has listed all VMs; `absent`: nothing listens there (an old platform). VMs are
    kept while vminfod is away.
    """
    READY_SECONDS = 60.0                    # for the first event; later ones may be hours apart
    PROBES = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6))
    MAX_LINE = 64 << 20                     # the first event contains all VMs

    def __init__(self, url: str, random_source: Callable[[], float] = random.random) -> None:
        self._url = url
        self._backoff = Backoff(1.0, 60.0, random_source)
        self.vms: dict[str, Vm] = {}
        self.answered = False
        self.absent = False
        self.problem = ""                   # why vminfod is not being followed
        self._stopping = threading.Event()
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Start following vminfod; waits briefly for the first attempt."""
        first = threading.Event()
        threading.Thread(target=self._follow, args=(first,), name="vminfod", daemon=True).start()
        first.wait(0.2)

    def stop(self) -> None:
        """Stop following it."""
        self._stopping.set()
        stream = self._socket
        if stream is not None:
            with contextlib.suppress(OSError):      # it has just been closed
                stream.shutdown(socket.SHUT_RDWR)

    def _follow(self, first: threading.Event) -> None:
        while not self._stopping.is_set():
            try:
                self._listen(first)
                problem = "it closed the stream of events"
            except ConnectionRefusedError:
                self.absent = not self.answered
                problem = "nothing listens there"
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                self.absent = False
                problem = reason_of(error)
            if problem != self.problem and not self._stopping.is_set():
                log.log(logging.INFO if self.absent else logging.WARNING,
                        "cannot follow vminfod at %s: %s", self._url, problem)
            self.problem = problem
            first.set()
            self._stopping.wait(self._backoff.next())

    def _listen(self, first: threading.Event) -> None:
        parts = urllib.parse.urlsplit(self._url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=5.0)
        connection.connect()
        self.absent = False
        first.set()
        try:
            assert connection.sock is not None
            self._socket = connection.sock
            # The stream has no heartbeat and silence is normal: only TCP keepalives show
            # that the peer is dead.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in self.PROBES:
                # older platforms have fixed intervals
                with contextlib.suppress(AttributeError, OSError):
                    self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            self._socket.settimeout(self.READY_SECONDS)
            connection.request("GET", "/events")
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"it returned status {answer.status}")
            while not self._stopping.is_set():
                line = answer.readline(self.MAX_LINE)
                if not line.endswith(b"\n"):
                    return
                if line.strip():
                    self._take(json.loads(line))
        finally:
            self._socket = None
            connection.close()

    def _take(self, event: Any) -> None:
        if not isinstance(event, dict):
            raise ValueError("an event is not an object")
        kind = event.get("type")
        if kind == "ready":
            vms = event.get("vms")
            records = json.loads(vms) if isinstance(vms, str) else vms
            if not isinstance(records, list):
                raise ValueError("the first event has no list of VMs")
            self.replace(records)
            self._backoff.reset()
            if self._socket is not None:
                self._socket.settimeout(None)
            log.info("vminfod lists %s VMs", len(self.vms))
        elif kind in ("create", "modify"):
            vm = vm_of(event.get("vm"))
            if vm is not None:
                self.vms = {**self.vms, vm.zone: vm}
        elif kind == "delete":
            deleted = event.get("zonename")
            self.vms = {zone: vm for zone, vm in self.vms.items() if zone != deleted}
        self.problem = ""

    def replace(self, records: Iterable[Any]) -> None:
        """Replace the list of VMs."""
        self.vms = {vm.zone: vm for vm in map(vm_of, records) if vm is not None}
        self.answered = True


class Host:
    """The machine that the agent runs on; no other class reads the system."""
    recorded = False

    def __init__(self, settings: Settings, vms: Vms | None = None,
                 open_kstats: Callable[[], AnyHandle] | None = None) -> None:
        self.commands_of = dict(settings.commands)
        self._sysinfo_file = settings.sysinfo_file
        self.commands = Commands()
        self.vms = vms or Vms(settings.vminfod)
        self.page_size = resource.getpagesize()
        self.time = time.time
        # a kstat handle, for one thread; raises KstatError
        self.open_kstats = open_kstats or functools.partial(Handle, Libkstat(settings.libkstat))

    def start(self) -> None:
        """Start following the VMs."""
        self.vms.start()

    def stop(self) -> None:
        """Stop following them, and kill running commands."""
        self.vms.stop()
        self.commands.kill()

    def run(self, name: str, arguments: Sequence[str], timeout: float) -> Output:
        """Run one of the commands of the settings; raises CommandError."""
        return self.commands.run(name, [self.commands_of[name], *arguments], timeout)

    def run_program(self, argv: Sequence[str], timeout: float, limit: int = MAX_OUTPUT) -> Output:
        """Run an operator's plugin, or a part of this program; raises CommandError."""
        return self.commands.run(" ".join(argv), argv, timeout, limit)


    def raw_sysinfo(self) -> Any:
        """sysinfo's JSON, from the file that the set-up service writes or else from the command,
        which works for root only; raises ConfigError."""
        if self._sysinfo_file and os.path.exists(self._sysinfo_file):
            return read_sysinfo_file(self._sysinfo_file)
        try:
            output = self.run("sysinfo", ("-f",), 30.0)
            return json.loads(output.checked(self.commands_of["sysinfo"]))
        except (CommandError, ValueError, RecursionError) as error:
            raise ConfigError(f"neither {self._sysinfo_file} nor sysinfo can be read: {error}"
                              ) from None


def read_sysinfo_file(path: str) -> Any:
    """sysinfo's JSON from a file; raises ConfigError. Keys may be duplicated, since sysinfo folds
    the names of boot parameters."""
    try:
        return json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as error:
        what = "" if isinstance(error, OSError) else "not JSON: "
        raise ConfigError(f"{path}: {what}{reason_of(error)}") from None


class RecordedKstat(NamedTuple):
    """A kstat of a capture."""
    ref: Ref
    snaptime: int
    data: Mapping[str, Any]


class _Frame(NamedTuple):
    at: float                               # seconds since the first frame
    chain: Index
    kstats: list[RecordedKstat]             # by Ref.address
    by_name: Mapping[tuple[str, int], RecordedKstat]    # and by birth
    commands: Mapping[str, Output]
    vms: list[Any]


class Course(NamedTuple):
    """How one member of a kstat moves, in place of or on top of the frames: straight lines between
    points, in a loop. A counter's values are its growth a second."""
    times: tuple[float, ...]                # seconds, from 0
    values: tuple[float, ...]
    sums: tuple[float, ...]                 # growth up to each point

    @classmethod
    def of(cls, points: Sequence[Sequence[float]]) -> Course:
        """From [seconds, value] pairs; raises ConfigError, TypeError or ValueError."""
        times, values = zip(*((float(seconds), float(value)) for seconds, value in points))
        if len(times) < 2 or times[0] != 0 or list(times) != sorted(set(times)) or not all(
                map(math.isfinite, times + values)):
            raise ConfigError("the times of its points do not ascend from 0")
        growth = ((values[index] + values[index - 1]) / 2 * (times[index] - times[index - 1])
                  for index in range(1, len(times)))
        return cls(times, values, tuple(itertools.accumulate(growth, initial=0.0)))

    def at(self, seconds: float) -> tuple[float, float]:
        """The value, and the increase since the start."""
        loops, rest = divmod(seconds, self.times[-1])
        index = bisect.bisect_right(self.times, rest) - 1
        begin, first = self.times[index], self.values[index]
        slope = (self.values[index + 1] - first) / (self.times[index + 1] - begin)
        value = first + slope * (rest - begin)
        return value, (loops * self.sums[-1] + self.sums[index]
                       + (first + value) / 2 * (rest - begin))


class Recording:
    """A capture: frames that are played in a loop, with times moved to the present.

    Counters grow on from loop to loop, by their growth from the first frame to the last (scaled to
    the loop's length), so that rates are right across the seam. A capture with a `load` (see
    Course), as the demo has it, also moves smoothly between its frames.
    """

    def __init__(self, path: str, now: Callable[[], float] = time.monotonic) -> None:
        content = read_json(path)
        self._now, self._began = now, now()
        self._where = ""                    # the current place in the file, for messages
        try:
            self._read(content)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            problem = f"{error} is missing" if isinstance(error, KeyError) else str(error) \
                if isinstance(error, ConfigError) else "a value is not what a capture has there"
            raise ConfigError(f"{path}: {self._where}{problem}; `cmon_agent.py capture FILE` "
                              "writes captures") from None
        starts = self._starts = [frame.at for frame in self.frames]
        gap = starts[-1] / (len(starts) - 1) if len(starts) > 1 else 1.0
        self._period = starts[-1] + gap
        self._stretch = self._period / starts[-1] if starts[-1] else 0.0

    def _each(self, where: str, items: Iterable[Any]) -> Iterator[Any]:
        """Items of a list, each with its place for messages."""
        for index, item in enumerate(items):
            self._where = f"{where}[{index}]: "
            yield item
        self._where = ""

    def _read(self, content: Any) -> None:
        if content["format"] != 1:
            raise ConfigError(f"unknown format {content['format']!r}: only 1 is supported")
        self.host = content["host"]
        self.frames: list[_Frame] = []
        first = math.nan
        for frame in self._each("frames", content["frames"]):
            at = float(frame["at"])
            first = first if self.frames else at
            if not math.isfinite(at) or self.frames and at - first <= self.frames[-1].at:
                raise ConfigError(f"the time {at!r} is not after the previous frame's")
            self.frames.append(self._frame(frame, at - first))
        if not self.frames:
            raise ConfigError("there are no frames")
        self.moved = time.time() - first
        self._load: dict[str, dict[str, Course]] = {}
        for row in self._each("load", content.get("load", ())):
            name = f"{row['module']}:{row['instance']}:{row['name']}"
            self._load.setdefault(name, {})[str(row["member"])] = Course.of(row["points"])

    def _frame(self, frame: Mapping[str, Any], at: float) -> _Frame:
        index, where = Index(), self._where[:-2]
        kstats: list[RecordedKstat] = []
        for record in self._each(f"{where}.kstats", frame["kstats"]):
            ref = Ref(str(record["module"]), int(record["instance"]), str(record["name"])
                         [:KSTAT_STRLEN - 1], str(record["class"]), int(record["type"]),
                         int(record["crtime"]), len(kstats))
            kstats.append(RecordedKstat(ref, int(record["snaptime"]), dict(record["data"])))
            index.count += 1
            index.place(ref)
        commands: dict[str, Output] = {}
        for argv, output in frame["commands"].items():
            self._where = f"{where}.commands[{argv!r}]: "
            commands[argv] = Output(int(output["status"]), str(output["stdout"]),
                                    str(output["stderr"]))
        self._where = f"{where}: "
        by_name = {(str(kstat.ref), kstat.ref.crtime): kstat for kstat in kstats}
        return _Frame(at, index, kstats, by_name, commands, list(frame["vms"]))

    def place(self) -> tuple[int, int]:
        """The current loop and frame."""
        elapsed = max(self._now() - self._began, 0.0)
        loop = int(elapsed // self._period)
        return loop, max(bisect.bisect_right(self._starts, elapsed - loop * self._period) - 1, 0)


    def kstat(self, ref: Ref, frame: int, loop: int) -> Kstat:
        """A kstat of a frame, as of this loop."""
        kstat = self.frames[frame].kstats[ref.address]
        data = self._in_loop(kstat, loop)
        if self._load:
            self._move(ref, data, frame, loop)
        return pack(ref, kstat.snaptime, data)

    def _in_loop(self, kstat: RecordedKstat, loop: int) -> dict[str, Any]:
        """A kstat's data with the growth of earlier loops."""
        data, ref = dict(kstat.data), kstat.ref
        first, last = (frame.by_name.get((str(ref), ref.crtime))
                       for frame in (self.frames[0], self.frames[-1]))
        for member, value in data.items():
            if member == "boot_time" and isinstance(value, int):
                data[member] = value + int(self.moved)
            elif loop and first is not None and last is not None \
                    and (ref.module, member) in COUNTER_MEMBERS and isinstance(value, int):
                ends = (first.data.get(member), last.data.get(member))
                if isinstance(ends[0], int) and isinstance(ends[1], int):
                    data[member] = value + int(loop * max(ends[1] - ends[0], 0) * self._stretch)
        return data

    def _move(self, ref: Ref, data: dict[str, Any], frame: int, loop: int) -> None:
        """Interpolate data between its frame and the next, and apply the load."""
        elapsed = max(self._now() - self._began, 0.0)
        last = frame + 1 == len(self.frames)
        gap = (self._period if last else self._starts[frame + 1]) - self._starts[frame]
        share = min((elapsed - loop * self._period - self._starts[frame]) / gap, 1.0)
        later = self.frames[0 if last else frame + 1].by_name.get((str(ref), ref.crtime))
        ends = self._in_loop(later, loop + last) if later is not None else {}
        for member, value in data.items():
            end = ends.get(member)
            if (ref.module, member) in COUNTER_MEMBERS and isinstance(value, int) \
                    and isinstance(end, int) and end > value:
                data[member] = value + int((end - value) * share)
        for member, course in self._load.get(str(ref), {}).items():
            level, grown = course.at(elapsed)
            if not isinstance(data.get(member), (int, float)):
                continue                # of another platform, or a typo
            data[member] = int(data[member] + grown if (ref.module, member) in COUNTER_MEMBERS
                               else level)


class RecordedHandle:
    """Stands in for `Handle`."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._at = recording.place()
        self.calls = self.rebuilds = 0
        self.rebuild_seconds = 0.0

    @property
    def index(self) -> Index:
        """The chain of this frame."""
        return self._recording.frames[self._at[1]].chain

    @property
    def chain_id(self) -> int:
        """The frame's number."""
        return self._at[1]

    def update(self) -> bool:
        """Move to the current frame."""
        before, self._at = self._at, self._recording.place()
        return before[1] != self._at[1]

    def reopen(self) -> None:
        """Nothing to do: a recording is complete."""
        self.update()

    def close(self) -> None:
        """Nothing to free."""

    def read(self, ref: Ref) -> Kstat:
        """One kstat of this frame."""
        self.calls += 1
        return self._recording.kstat(ref, self._at[1], self._at[0])


AnyHandle = Union[Handle, RecordedHandle]


class RecordedHost(Host):
    """A capture that stands in for a machine."""
    recorded = True

    def __init__(self, path: str, settings: Settings) -> None:
        self._recording, self.path = Recording(path), path
        vms = Vms(settings.vminfod)
        vms.replace(self._recording.frames[0].vms)
        vms.absent = not vms.vms            # recorded where there was no vminfod
        super().__init__(settings, vms, functools.partial(RecordedHandle, self._recording))
        self.page_size = 4096               # of x86, the only architecture of the platform

    def start(self) -> None:
        """Nothing to follow."""

    def run(self, name: str, arguments: Sequence[str], timeout: float) -> Output:
        """The recorded output; raises CommandError if there is none."""
        argv = " ".join((DEFAULT_COMMANDS[name], *arguments))
        commands = self._recording.frames[self._recording.place()[1]].commands
        # captures of version 1.0 contain a list of all datasets at any depth
        output = commands.get(argv) or commands.get(argv.replace(" -d 1 ", " -r "))
        if output is None:
            raise CommandError(f"{argv}: not in the capture")
        return output

    def run_program(self, argv: Sequence[str], timeout: float, limit: int = MAX_OUTPUT) -> Output:
        """No program runs in a replay."""
        raise CommandError(f"{argv[0]}: does not run in a replay")

    def raw_sysinfo(self) -> Any:
        """The recorded sysinfo."""
        return self._recording.host

# --- collectors -----------------------------------------------------------------------------------

# Pure: raw kstats and fields in, a part of a page out. A new metric is a new row in a table below,
# `make golden`, and a look at the difference; one of a module that was not read before is a new
# table, and its place in a collector of ZONE_COLLECTORS or NODE_COLLECTORS: the index and the reads
# follow from the tables. A row without its member on this platform makes no sample; several rows of
# one name, one below the other, make one family and differ in their labels.
#
# A command is a function like collect_zones() and its row in one of these; the path of a new
# command stands in DEFAULT_COMMANDS, and what it prints in examples/make_node.py.

class CollectError(Exception):
    """A collector has failed; the text says which, what and why."""


class Metric(NamedTuple):
    """One row: the metric of a kstat's member, or of a field of a command's output."""
    kind: str
    name: str
    member: str
    unit: Unit
    help: str                               # a sentence; HELP adds the source to it
    source: str = ""                        # if it is not "kstat module:*:name:member"
    labels: Labels = ()                     # of this row's samples, behind those of the kstat
    label_names: tuple[str, ...] = ()       # names of labels whose values a function computes


def gauge(name: str, member: str, unit: Unit, help_text: str, **labels: str) -> Metric:
    """A row for a gauge."""
    return Metric(GAUGE, name, member, unit, help_text, "", tuple(labels.items()))


def counter(name: str, member: str, unit: Unit, help_text: str, **labels: str) -> Metric:
    """A row for a counter."""
    return Metric(COUNTER, name, member, unit, help_text, "", tuple(labels.items()))


def printed(command: str, label_names: tuple[str, ...], *rows: Metric) -> tuple[Metric, ...]:
    """Rows for a command's output; with labels, for each thing that it lists."""
    return tuple([row._replace(source=f"{command}, {row.member}", label_names=label_names)
                  for row in rows])


class Part(NamedTuple):
    """What a collector sends: a template, which is the same object on all pages that are alike,
    and the values of this page. As one text they take a third of the memory of numbers."""
    template: str
    values: str                             # with BETWEEN between them

    def text(self) -> str:
        """The part as text of the page."""
        return self.template % tuple(self.values.split(BETWEEN)) if self.template else ""


BETWEEN = "\n\n"                # no value has an empty line: labels are escaped
APART = BETWEEN.encode()
NOTHING = Part("", "")
MAX_TEMPLATES = 256             # cached, of each kind


@functools.lru_cache(maxsize=MAX_TEMPLATES)
def _joined(templates: tuple[str, ...]) -> str:
    return "".join(templates)


@functools.lru_cache(maxsize=MAX_TEMPLATES)
def _places(count: int) -> str:
    return BETWEEN.join(["%s"] * count)


def joined(values: tuple[Any, ...]) -> str:
    """The values as one text. (`%` writes integers without a string for each.)"""
    return _places(len(values)) % values


def join_parts(parts: Sequence[Part]) -> Part:
    """Concatenate parts."""
    if len(parts) == 1:
        return parts[0]
    return Part(_joined(tuple([part.template for part in parts])),
                BETWEEN.join([part.values for part in parts if part.template]))


def part_of(families: Iterable[Family]) -> Part:
    """Families that no table describes, and some that one does; those without samples are left
    out."""
    template: list[str] = []
    values: list[str] = []
    for name, kind, help_text, samples in families:
        if samples:
            template.append(_head(name, kind, help_text).replace("%", "%%"))
        for labels, value, suffix in samples:
            template.append(f"{name}{suffix}%s %s\n")
            values += (label_text(labels), number(value))
    return Part(reused("".join(template)), BETWEEN.join(values))


def verbatim(page: str) -> Part:
    """Finished text of a page, as a part."""
    return Part("%s", page) if page else NOTHING


Taking = Callable[[Sequence[Any]], "tuple[Any, ...]"]


def taking(places: Sequence[int]) -> Taking:
    """Takes these of a list, in this order."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple([values[place] for place in places])


class Values(NamedTuple):
    """The values of one thing."""
    labels: str                             # as between braces; "" for none
    rows: tuple[int, ...]                   # that have a value
    values: Sequence[Any]                   # theirs


class Rows:
    """Metrics in page order; rows of one name, one below the other, are one family.

    For each set of rows that have a value there is one template, made when it is first met. Any
    thread may make it: all make the same.
    """

    def __init__(self, metrics: tuple[Metric, ...], table: Table | None = None) -> None:
        self.metrics, self._table = metrics, table
        self._templates: dict[Any, tuple[str, Taking]] = {}

    @functools.cached_property
    def _families(self) -> list[tuple[str, list[tuple[int, str, str]]]]:
        """HELP and TYPE of each family, with its rows: number, name, labels."""
        families: list[tuple[str, list[tuple[int, str, str]]]] = []
        for row, metric in enumerate(self.metrics):
            head = _head(metric.name, metric.kind, help_of(metric, self._table)).replace("%", "%%")
            if row == 0 or self.metrics[row - 1].name != metric.name:
                families.append((head, []))
            families[-1][1].append((row, metric.name, label_text(metric.labels)[1:-1]))
        return families

    def of(self, data: Mapping[str, Any], labels: Labels = ()) -> Values:
        """A thing from values by member, such as the fields of a command's output."""
        rows = [(row, value) for row, metric in enumerate(self.metrics) if metric.member in data
                for value in (metric.unit.convert(data[metric.member]),) if value is not None]
        return Values(label_text(labels)[1:-1], tuple([row for row, _ in rows]), tuple(
            [value if type(value) is int else number(value) for _, value in rows]))

    def part(self, things: Sequence[Values]) -> Part:
        """What the page says of these things; only a single one may be without labels."""
        key = tuple([thing.rows for thing in things])
        known = self._templates.get(key)
        if known is None:
            if len(self._templates) >= MAX_TEMPLATES:
                self._templates.clear()
            template, order = self.template(things)
            known = self._templates[key] = (template, taking(order))
        return Part(known[0], joined(known[1](
            [value for thing in things for value in (thing.labels, *thing.values)])))

    def template(self, things: Sequence[Values]) -> tuple[str, list[int]]:
        """The text, and which of labels and values go where."""
        lines: list[str] = []
        order: list[int] = []
        for head, rows in self._families:
            start = len(lines)
            place = 0
            for thing in things:
                for row, name, own in rows:
                    if row in thing.rows:
                        labels = ",".join(filter(None, ("%s" if thing.labels else "", own)))
                        lines.append(name + (f"{{{labels}}}" if labels else "") + " %s\n")
                        order += [place] if thing.labels else []
                        order.append(place + 1 + thing.rows.index(row))
                place += 1 + len(thing.values)
            if len(lines) > start:
                lines.insert(start, head)
        return "".join(lines), order


Label = Callable[[Sequence[Kstat], Any], list[Labels]]


def by_instance(ref: Ref) -> int | None:
    """The zone of a kstat whose instance is its id."""
    return ref.instance


def by_link_name(ref: Ref) -> int | None:
    """The zone of a link, as dls names those of zones."""
    match = ZONE_LINK.fullmatch(ref.name)
    return int(match.group(1)) if match else None


@dataclass(frozen=True, eq=False)
class Table:
    """Rows that are read from one kind of kstat. Kstats that no table needs are never read."""
    collector: str
    module: str
    names: str                              # of the kstats, as in HELP; may end with *
    metrics: tuple[Metric, ...]
    label_names: tuple[str, ...] = ()
    labels: Label | None = None             # for all kstats; None: the first, unlabelled
    values: Callable[[Kstat, Any], Mapping[str, Any]] | None = None     # None: the members
    zone: Callable[[Ref], int | None] | None = None     # its zone; None: of the node
    skip_idle: bool = False                 # leave out kstats whose counters are all 0

    def has(self, name: str) -> bool:
        """Whether this table reads a kstat of the module, by its name."""
        if self.names.endswith("*"):
            return name.startswith(self.names[:-1])
        return name == self.names

    @functools.cached_property
    def rows(self) -> Rows:
        """The metrics in page order."""
        return Rows(self.metrics, self)


class ZoneContext(NamedTuple):
    """Input of a zone's page besides the kstats with the zone's id."""
    zone_id: int
    name: bytes                             # which is its UUID
    # link inside the zone ("net0") -> nic_tag, network_uuid; None where there is no vminfod;
    # raises CollectError when it is not known yet whether there are some
    nics: Callable[[], Mapping[str, tuple[str, str]] | None] = lambda: None


class NodeContext(NamedTuple):
    """Input of the node's page besides kstats."""
    page_size: int = 4096
    vminfo_before: tuple[Kstat, ...] = ()   # earlier readings of unix:0:vminfo, oldest first


Context = Union[ZoneContext, NodeContext, None]


def each(function: Callable[[Kstat], Labels]) -> Label:
    """Labels that depend on one kstat alone."""
    def label(kstats: Sequence[Kstat], _context: Any) -> list[Labels]:
        return [function(kstat) for kstat in kstats]
    return label


# Conversions that only these tables need.

def link_is_up(value: Any) -> Number | None:
    """link_state_t of <sys/mac.h>: down 0, up 1; unknown is -1, or all ones."""
    return value if value in (0, 1) and isinstance(value, int) else None


def divided(value: Number, divisor: int) -> Number:
    """A quotient that stays an integer where it is exact."""
    return int(value) // divisor if value % divisor == 0 else value / divisor


def bytes_of_bits(value: Any) -> Number | None:
    """A link's speed; None for zero, a link without speed."""
    return divided(value, 8) if isinstance(value, int) and value > 0 else None


def cpus_of_percent(value: Any) -> Number | None:
    """Hundredths of a CPU as CPUs."""
    return divided(value, 100) if isinstance(value, (int, float)) else None


UP = Unit("boolean", link_is_up)
BITS = Unit("bytes per second", bytes_of_bits)
PAGES = Unit("bytes", whole)                # table.values has multiplied by the page size
CPUS = Unit("CPUs", cpus_of_percent)

# -- of a zone: the compute time, memory and disk that a kernel counts for it

CPUCAP = Table("cpucap", "caps", "cpucaps_zone_*", (
    counter("cpucap_above_base_seconds_total", "above_base_sec", SECONDS,
            "Seconds in which the zone used more CPU than its baseline."),
    counter("cpucap_above_seconds_total", "above_sec", SECONDS,
            "Seconds in which the zone was above its CPU cap."),
    gauge("cpucap_baseline_percentage", "baseline", PERCENT,
          "CPU baseline in percent of one CPU; usage below it earns burst time."),
    counter("cpucap_below_seconds_total", "below_sec", SECONDS,
            "Seconds in which the zone was below its CPU cap."),
    gauge("cpucap_burst_limit_seconds", "burst_limit_sec", SECONDS,
          "Maximum burst above the CPU baseline in seconds; 0 is unlimited."),
    gauge("cpucap_effective_percentage", "effective", PERCENT,
          "CPU cap in effect, in percent of one CPU."),
    gauge("cpucap_max_usage_percentage", "maxusage", PERCENT,
          "Highest CPU usage so far, in percent of one CPU."),
    gauge("cpucap_waiting_threads_count", "nwait", COUNT,
          "Number of threads waiting because the zone reached its CPU cap."),
    gauge("cpucap_cur_usage_percentage", "usage", PERCENT,
          "Current CPU usage in percent of one CPU."),
    gauge("cpucap_limit_percentage", "value", PERCENT,
          "CPU cap in percent of one CPU."),
    gauge("cpucap_bursting_seconds", "bursting_sec", SECONDS,
          "Duration of the current burst above the CPU baseline in seconds."),
), zone=by_instance)

LIMITS = (
    Table("limits", "caps", "lockedmem_zone_*", (
        gauge("mem_locked_bytes", "usage", BYTES, "Locked memory of the zone in bytes."),
        gauge("mem_locked_limit_bytes", "value", CAP, "Cap on locked memory in bytes, if set."),
    ), zone=by_instance),
    Table("limits", "caps", "nprocs_zone_*", (
        gauge("proc_processes", "usage", COUNT, "Number of processes."),
        gauge("proc_processes_limit", "value", COUNT_CAP,
              "Maximum number of processes, if capped."),
    ), zone=by_instance),
    Table("limits", "caps", "swapresv_zone_*", (
        gauge("mem_swap_reserved_bytes", "usage", BYTES, "Swap reserved by the zone in bytes."),
        gauge("mem_swap_reserved_limit_bytes", "value", CAP,
              "Cap on reserved swap in bytes, if set."),
    ), zone=by_instance),
)


@functools.lru_cache(maxsize=MAX_TEMPLATES)
def interfaces(links: tuple[str, ...]) -> Mapping[str, str]:
    """The label `interface` of a zone's links: net0 is vnic0, as the original says. Of two links
    with one number the first by name has that label, and the other keeps its name inside the zone;
    "": it cannot have that either."""
    holder: dict[str, str] = {}             # label -> link that has it
    shown: dict[str, str] = {}
    for name in sorted(links):
        match = LINK_NUMBER.fullmatch(name)
        label = "vnic" + match.group(1) if match else name
        shown[name] = label if holder.setdefault(label, name) == name else \
            name if name not in holder else ""      # a link that is called vnic0
    return shown


def link_labels(kstats: Sequence[Kstat], context: ZoneContext) -> list[Labels]:
    """Interface, and what vminfod says of it."""
    prefix = f"z{context.zone_id}_"
    names = tuple([ref.name[len(prefix):] if ref.name.startswith(prefix) else ref.name
                   for ref, *_ in kstats])
    shown, nics = interfaces(names), context.nics()
    labels: list[Labels] = []
    for name in names:
        label = ("interface", shown[name] or prefix + name)
        if nics is None:
            labels.append((label,))
        else:
            tag, network = nics.get(name) or _nic_by_number(name, nics)
            labels.append((label, ("nic_tag", tag), ("network_uuid", network)))
    return labels


LINK_NUMBER = re.compile(r"[A-Za-z_]+([0-9]+)")


def _nic_by_number(name: str, nics: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """An LX zone's eth0 is net0 to vmadm on some platforms."""
    match = LINK_NUMBER.fullmatch(name)
    return nics.get("net" + match.group(1), ("", "")) if match else ("", "")


LINK = Table("link", "link", "*", (
    counter("net_agg_packets_in", "ipackets64", COUNT, "Packets received."),
    counter("net_agg_bytes_out", "obytes64", BYTES, "Bytes sent."),
    counter("net_agg_packets_out", "opackets64", COUNT, "Packets sent."),
    counter("net_agg_bytes_in", "rbytes64", BYTES, "Bytes received."),
    counter("net_errors_in_total", "ierrors", COUNT, "Packets received with errors."),
    counter("net_errors_out_total", "oerrors", COUNT, "Packets that could not be sent."),
    counter("net_drops_in_total", "norcvbuf", COUNT,
            "Packets dropped for lack of receive buffers."),
    counter("net_drops_out_total", "noxmtbuf", COUNT, "Packets dropped for lack of send buffers."),
    gauge("net_link_up", "link_state", UP,
          "1 if the link is up, 0 if it is down; absent if unknown."),
    gauge("net_speed_bytes_per_second", "ifspeed", BITS, "Speed of the link in bytes per second."),
), ("interface", "nic_tag", "network_uuid"), link_labels, zone=by_link_name)

MEMCAP = Table("memcap", "memory_cap", "*", (
    gauge("mem_agg_usage", "rss", BYTES, "Resident memory of the zone in bytes."),
    counter("mem_anon_alloc_fail", "anon_alloc_fail", COUNT,
            "Anonymous memory allocations that failed."),
    gauge("mem_limit", "physcap", CAP, "Cap on resident memory in bytes, if set."),
    gauge("mem_swap", "swap", BYTES, "Swap used by the zone in bytes."),
    gauge("mem_swap_limit", "swapcap", CAP, "Cap on swap in bytes, if set."),
    counter("mem_over_limit_total", "nover", COUNT,
            "Number of times the zone exceeded its memory cap."),
    counter("mem_paged_out_bytes_total", "pagedout", BYTES,
            "Bytes paged out because of the memory cap."),
    counter("mem_pages_in_total", "pgpgin", COUNT, "Pages paged in."),
    counter("mem_anon_pages_in_total", "anonpgin", COUNT, "Anonymous pages paged in."),
    counter("mem_exec_pages_in_total", "execpgin", COUNT, "Executable pages paged in."),
    counter("mem_fs_pages_in_total", "fspgin", COUNT, "File system pages paged in."),
    counter("mem_fault_throttles_total", "n_pf_throttle", COUNT,
            "Page faults delayed because the zone was over its memory cap."),
    counter("mem_fault_throttle_seconds_total", "n_pf_throttle_usec", US,
            "Delay of page faults in seconds because the zone was over its memory cap."),
), zone=by_instance)

TCP = Table("tcp", "tcp", "tcp", (
    counter("tcp_failed_connection_attempt_count", "attemptFails", COUNT,
            "Connection attempts that failed."),
    counter("tcp_retransmitted_segment_count", "retransSegs", COUNT, "Segments retransmitted."),
    counter("tcp_duplicate_ack_count", "inDupAck", COUNT, "Duplicate acknowledgements received."),
    counter("tcp_listen_drop_count", "listenDrop", COUNT,
            "Connections refused because a backlog was full."),
    counter("tcp_listen_drop_Qzero_count", "listenDropQ0", COUNT,
            "Half-open connections refused because their queue was full."),
    counter("tcp_half_open_drop_count", "halfOpenDrop", COUNT,
            "Half-open connections that were dropped."),
    counter("tcp_retransmit_timeout_drop_count", "timRetransDrop", COUNT,
            "Connections dropped after the last retransmission."),
    counter("tcp_active_open_count", "activeOpens", COUNT, "Outgoing connections opened."),
    counter("tcp_passive_open_count", "passiveOpens", COUNT, "Incoming connections opened."),
    gauge("tcp_current_established_connections_total", "currEstab", COUNT,
          "Number of established connections."),
    counter("tcp_segments_in_total", "inSegs", COUNT, "Segments received."),
    counter("tcp_segments_out_total", "outSegs", COUNT, "Segments sent, without retransmissions."),
    counter("tcp_errors_in_total", "inErrs", COUNT, "Segments received with errors."),
    counter("tcp_resets_out_total", "outRsts", COUNT, "Resets sent."),
    counter("tcp_established_resets_total", "estabResets", COUNT,
            "Established connections that were reset."),
), zone=by_instance)

VCPU = Table("vcpu", "vmm", "vcpu*", tuple(
    counter("vcpu_seconds_total", member, NS,
            "Time of a virtual CPU by what it did: run the guest, wait for a CPU of the node.",
            state=state)
    for member, state in (("time_run", "run"), ("time_idle", "idle"), ("time_sched", "wait"),
                          ("time_emu_kern", "emulation_kernel"),
                          ("time_emu_user", "emulation_user"))
), ("vcpu",), each(lambda kstat: (("vcpu", str(kstat.data.get("vcpu", kstat.ref.name[4:]))),)),
    skip_idle=True)                         # the kernel creates 32 or more for each guest
GUESTS = Table("vcpu", "vmm", "vm", ())     # has no metrics, but maps guests to zones


LOAD_ROWS = (
    gauge("load_average", "avenrun_1min", LOAD, "Load average over one minute."),
    gauge("load_average_5min", "avenrun_5min", LOAD, "Load average over 5 minutes."),
    gauge("load_average_15min", "avenrun_15min", LOAD, "Load average over 15 minutes."),
)
FORK_FAILURES = "Processes that could not be started, by reason."

ZONE_MISC = Table("zone_misc", "zones", "*", (
    counter("cpu_user_usage", "nsec_user", RAW_NS, "CPU time in user mode, in nanoseconds."),
    counter("cpu_sys_usage", "nsec_sys", RAW_NS, "CPU time in the kernel, in nanoseconds."),
    counter("cpu_wait_time", "nsec_waitrq", RAW_NS,
            "Time that threads have waited for a CPU, in nanoseconds."),
    *LOAD_ROWS,
    counter("proc_fork_failures_total", "forkfail_cap", COUNT, FORK_FAILURES, reason="cap"),
    counter("proc_fork_failures_total", "forkfail_noproc", COUNT, FORK_FAILURES,
            reason="no_process"),
    counter("proc_fork_failures_total", "forkfail_nomem", COUNT, FORK_FAILURES,
            reason="no_memory"),
    counter("proc_fork_failures_total", "forkfail_misc", COUNT, FORK_FAILURES, reason="other"),
    counter("proc_map_failures_total", "mapfail_seglim", COUNT,
            "Mappings refused because the process has too many segments."),
    gauge("boot_time_seconds", "boot_time", SECONDS, "Boot time in seconds since the epoch."),
), zone=by_instance)
SLOW = "File operations that took longer than `over`."

ZONE_VFS = Table("zone_vfs", "zone_vfs", "*", (
    counter("vfs_bytes_read_count", "nread", BYTES, "Bytes read from files."),
    counter("vfs_bytes_written_count", "nwritten", BYTES, "Bytes written to files."),
    counter("vfs_read_operation_count", "reads", COUNT, "Reads of files."),
    counter("vfs_write_operation_count", "writes", COUNT, "Writes to files."),
    counter("vfs_wait_time_count", "wtime", RAW_NS,
            "Time during which operations were waiting, in nanoseconds."),
    counter("vfs_wait_length_time_count", "wlentime", RAW_NS,
            "Number of waiting operations summed over time, in nanoseconds."),
    counter("vfs_run_time_count", "rtime", RAW_NS,
            "Time during which operations were running, in nanoseconds."),
    counter("vfs_run_length_time_count", "rlentime", RAW_NS,
            "Number of running operations summed over time, in nanoseconds."),
    gauge("vfs_elements_wait_state", "wcnt", COUNT, "Number of operations waiting."),
    gauge("vfs_elements_run_state", "rcnt", COUNT, "Number of operations running."),
    counter("vfs_slow_operations_total", "10ms_ops", COUNT, SLOW, over="10ms"),
    counter("vfs_slow_operations_total", "100ms_ops", COUNT, SLOW, over="100ms"),
    counter("vfs_slow_operations_total", "1s_ops", COUNT, SLOW, over="1s"),
    counter("vfs_slow_operations_total", "10s_ops", COUNT, SLOW, over="10s"),
    counter("vfs_delayed_operations_total", "delay_cnt", COUNT,
            "Operations delayed so that other zones get their share of the disks."),
    counter("vfs_delay_seconds_total", "delay_time", US,
            "Seconds that operations were delayed so that other zones get their share."),
), zone=by_instance)

# -- of the compute node

def _size(member: str, help_text: str) -> Metric:
    return gauge(f"arcstats_{member}_bytes", member, BYTES, help_text)


def _total(member: str, help_text: str) -> Metric:
    return counter(f"arcstats_{member}_total", member, COUNT, help_text)


ARCSTATS = Table("arcstats", "zfs", "arcstats", (        # the cache of ZFS: arc_stats_t of arc.c
    _size("anon_evictable_data", "Anonymous data that can be evicted."),
    _size("anon_evictable_metadata", "Anonymous metadata that can be evicted."),
    _size("anon_size", "Buffers that belong to no block yet."),
    _size("arc_meta_limit", "Limit on metadata in the cache."),
    _size("arc_meta_max", "Highest size of metadata in the cache so far."),
    _size("arc_meta_min", "Minimum size of metadata in the cache."),
    _size("arc_meta_used", "Metadata in the cache."),
    gauge("arcstats_target_cache_size_bytes", "c", BYTES, "Target size of the cache."),
    gauge("arcstats_max_target_cache_size_bytes", "c_max", BYTES,
          "Maximum target size of the cache."),
    gauge("arcstats_min_target_cache_size_bytes", "c_min", BYTES,
          "Minimum target size of the cache."),
    _size("compressed_size", "Compressed size of cached blocks."),
    _size("data_size", "Cached data of files."),
    _total("demand_data_hits", "Reads of data found in the cache."),
    _total("demand_data_misses", "Reads of data not found in the cache."),
    _total("demand_hit_predictive_prefetch", "Reads found because they had been prefetched."),
    _total("demand_metadata_hits", "Reads of metadata found in the cache."),
    _total("demand_metadata_misses", "Reads of metadata not found in the cache."),
    counter("arcstats_evict_l2_cached_bytes_total", "evict_l2_cached", BYTES,
            "Bytes evicted that the second level holds."),
    counter("arcstats_evict_l2_eligible_bytes_total", "evict_l2_eligible", BYTES,
            "Bytes evicted that the second level could have held."),
    counter("arcstats_evict_l2_ineligible_bytes_total", "evict_l2_ineligible", BYTES,
            "Bytes evicted that the second level may not hold."),
    _total("evict_l2_skip", "Evictions postponed because of the second level."),
    _total("evict_not_enough", "Evictions that did not free enough."),
    _total("evict_skip", "Buffers that could not be evicted."),
    gauge("arcstats_hash_chain_max", "hash_chain_max", COUNT,
          "Length of the longest hash chain so far."),
    gauge("arcstats_hash_chains", "hash_chains", COUNT, "Number of hash chains."),
    _total("hash_collisions", "Collisions in the hash table."),
    gauge("arcstats_hash_elements", "hash_elements", COUNT,
          "Number of elements in the hash table."),
    gauge("arcstats_hash_elements_max", "hash_elements_max", COUNT,
          "Highest number of elements in the hash table so far."),
    counter("arcstats_hdr_size_bytes", "hdr_size", BYTES, "Size of the headers of cached blocks."),
    _total("hits", "Reads found in the cache."),
    _total("l2_abort_lowmem", "Second-level writes abandoned for lack of memory."),
    _size("l2_asize", "Space used by the second level on its devices."),
    _total("l2_cksum_bad", "Second-level reads with a wrong checksum."),
    _total("l2_evict_l1cached", "Second-level evictions of blocks still in memory."),
    _total("l2_evict_lock_retry", "Second-level evictions retried because of a lock."),
    _total("l2_evict_reading", "Second-level evictions of blocks being read."),
    _total("l2_feeds", "Number of times the second level was fed."),
    _total("l2_free_on_write", "Second-level buffers freed while being written."),
    gauge("arcstats_l2_hdr_bytes", "l2_hdr_size", BYTES,
          "Size of the headers of second-level blocks."),
    _total("l2_hits", "Reads found in the second level."),
    _total("l2_io_error", "Second-level reads that failed."),
    _total("l2_misses", "Reads not found in the second level."),
    gauge("arcstats_l2_read_bytes", "l2_read_bytes", BYTES, "Bytes read from the second level."),
    _total("l2_rw_clash", "Second-level reads that collided with a write."),
    _size("l2_size", "Size of the second level, uncompressed."),
    counter("arcstats_l2_write_bytes", "l2_write_bytes", BYTES,
            "Bytes written to the second level."),
    _total("l2_writes_done", "Second-level writes completed."),
    _total("l2_writes_error", "Second-level writes that failed."),
    _total("l2_writes_lock_retry", "Second-level writes retried because of a lock."),
    _total("l2_writes_sent", "Second-level writes started."),
    counter("arcstats_memory_throttle_count", "memory_throttle_count", COUNT,
            "Number of times the cache throttled writers for lack of memory."),
    _size("metadata_size", "Cached metadata."),
    _size("mfu_evictable_data", "Frequently used data that can be evicted."),
    _size("mfu_evictable_metadata", "Frequently used metadata that can be evicted."),
    gauge("arcstats_mfu_ghost_evictable_data", "mfu_ghost_evictable_data", BYTES,
          "Data remembered as frequently used, in bytes."),
    _size("mfu_ghost_evictable_metadata", "Metadata remembered as frequently used."),
    _total("mfu_ghost_hits", "Reads of blocks remembered as frequently used."),
    _size("mfu_ghost_size", "Size of blocks remembered as frequently used."),
    _total("mfu_hits", "Reads of frequently used blocks."),
    _size("mfu_size", "Size of frequently used blocks."),
    _total("misses", "Reads not found in the cache."),
    _size("mru_evictable_data", "Recently used data that can be evicted."),
    _size("mru_evictable_metadata", "Recently used metadata that can be evicted."),
    _size("mru_ghost_evictable_data", "Data remembered as recently used."),
    _size("mru_ghost_evictable_metadata", "Metadata remembered as recently used."),
    _total("mru_ghost_hits", "Reads of blocks remembered as recently used."),
    _size("mru_ghost_size", "Size of blocks remembered as recently used."),
    _total("mru_hits", "Reads of recently used blocks."),
    _size("mru_size", "Size of recently used blocks."),
    _total("mutex_miss", "Evictions that could not get a lock."),
    _size("other_size", "Other buffers of the cache."),
    _size("overhead_size", "Uncompressed copies of cached blocks."),
    _size("p", "Target size for recently used blocks."),
    _total("prefetch_data_hits", "Prefetches of data found in the cache."),
    _total("prefetch_data_misses", "Prefetches of data not found in the cache."),
    _total("prefetch_metadata_hits", "Prefetches of metadata found in the cache."),
    _total("prefetch_metadata_misses", "Prefetches of metadata not found in the cache."),
    _size("size", "Size of the cache."),
    _total("sync_wait_for_async", "Reads that waited for a prefetch; older platforms."),
    _total("async_upgrade_sync", "Prefetches that became reads; newer platforms."),
    _size("uncompressed_size", "Size of cached blocks, uncompressed."),
))

CPU_INFO = Table("cpu_info", "cpu_info", "cpu_info*", (
    gauge("cpu_info_model", "model", COUNT, "Model number of the first CPU."),
    gauge("cpu_info_clock_hertz", "current_clock_Hz", COUNT, "Clock rate of the first CPU."),
))

CPU_UTIL = Table("cpu_util", "cpu", "sys", (
    counter("cpu_idle_seconds_total", "cpu_nsec_idle", NS, "Idle time of the CPU."),
    counter("cpu_kernel_seconds_total", "cpu_nsec_kernel", NS, "CPU time in the kernel."),
    counter("cpu_user_seconds_total", "cpu_nsec_user", NS, "CPU time in user mode."),
    counter("cpu_dtrace_seconds_total", "cpu_nsec_dtrace", NS, "CPU time in DTrace probes."),
    counter("cpu_interrupt_seconds_total", "cpu_nsec_intr", NS, "CPU time in interrupts."),
), ("cpu_id",), each(lambda kstat: (("cpu_id", str(kstat.ref.instance)),)))

DISK = Table("disk", "disk", "*", (                      # disks, and each pool under its name
    counter("disk_read_bytes_total", "nread", BYTES, "Bytes read."),
    counter("disk_written_bytes_total", "nwritten", BYTES, "Bytes written."),
    counter("disk_reads_total", "reads", COUNT, "Reads."),
    counter("disk_writes_total", "writes", COUNT, "Writes."),
    counter("disk_wait_seconds_total", "wtime", NS,
            "Time during which operations were waiting in the queue."),
    counter("disk_wait_length_seconds_total", "wlentime", NS,
            "Number of waiting operations summed over time."),
    counter("disk_busy_seconds_total", "rtime", NS, "Time during which operations were running."),
    counter("disk_busy_length_seconds_total", "rlentime", NS,
            "Number of running operations summed over time."),
    gauge("disk_waiting_operations", "wcnt", COUNT, "Number of operations waiting."),
    gauge("disk_running_operations", "rcnt", COUNT, "Number of operations running."),
), ("device",), each(lambda kstat: (("device", kstat.ref.name),)))

NODE_LINK = Table("link", "link", "*", (
    counter("link_bytes_in_total", "rbytes64", BYTES, "Bytes received."),
    counter("link_bytes_out_total", "obytes64", BYTES, "Bytes sent."),
    counter("link_packets_in_total", "ipackets64", COUNT, "Packets received."),
    counter("link_packets_out_total", "opackets64", COUNT, "Packets sent."),
    counter("link_errors_in_total", "ierrors", COUNT, "Packets received with errors."),
    counter("link_errors_out_total", "oerrors", COUNT, "Packets that could not be sent."),
    counter("link_drops_in_total", "norcvbuf", COUNT,
            "Packets dropped for lack of receive buffers."),
    counter("link_drops_out_total", "noxmtbuf", COUNT, "Packets dropped for lack of send buffers."),
    gauge("link_up", "link_state", UP,
          "1 if the link is up, 0 if it is down; absent if unknown."),
    gauge("link_speed_bytes_per_second", "ifspeed", BITS, "Speed of the link in bytes per second."),
), ("link",), each(lambda kstat: (("link", kstat.ref.name),)))

NODE_LOAD = Table("load", "unix", "system_misc", LOAD_ROWS)


def in_bytes(kstat: Kstat, context: NodeContext) -> Mapping[str, Any]:
    """What system_pages counts in pages; its counters of events stay as they are."""
    return {member: value * context.page_size if isinstance(value, int) and member in _IN_PAGES
            else value for member, value in kstat.data.items()}


MEMORY = Table("memory", "unix", "system_pages", (
    gauge("memory_total_bytes", "physmem", PAGES, "Memory of the node in bytes."),
    gauge("memory_free_bytes", "freemem", PAGES, "Free memory."),
    gauge("memory_lockable_bytes", "availrmem", PAGES, "Memory that can still be locked."),
    gauge("memory_locked_bytes", "pageslocked", PAGES, "Locked memory, including the kernel's."),
    gauge("memory_kernel_bytes", "pp_kernel", PAGES, "Memory used by the kernel."),
    gauge("memory_lotsfree_bytes", "lotsfree", PAGES,
          "Free memory below which the pageout daemon scans for pages."),
    gauge("memory_desfree_bytes", "desfree", PAGES, "Target for free memory."),
    gauge("memory_minfree_bytes", "minfree", PAGES,
          "Free memory below which allocations are throttled."),
    gauge("memory_scanned_pages", "nscan", COUNT,
          "Pages scanned by the pageout daemon in the last second."),
    counter("memory_low_scans_total", "low_mem_scan", COUNT,
            "Scans because the node was short of memory."),
    counter("memory_zone_cap_scans_total", "zone_cap_scan", COUNT,
            "Scans because a zone was over its cap."),
    counter("memory_throttles_total", "n_throttle", COUNT,
            "Allocations throttled for lack of memory."),
), values=in_bytes)
_IN_PAGES = frozenset(row.member for row in MEMORY.metrics if row.unit is PAGES)

PROC = Table("proc", "unix", "system_misc", (
    gauge("proc_processes", "nproc", COUNT, "Number of processes."),
    gauge("boot_time_seconds", "boot_time", SECONDS, "Boot time in seconds since the epoch."),
))


def mean_since(kstat: Kstat, context: NodeContext) -> Mapping[str, Any]:
    """vminfo adds the present number of pages to its members once a second."""
    updates = kstat.data.get("updates")
    before: Mapping[str, Any] = next((vminfo.data for vminfo in reversed(context.vminfo_before)
                                      if vminfo.data.get("updates") != updates), {})
    growth = {member: value - before[member] for member, value in kstat.data.items()
             if isinstance(value, int) and isinstance(before.get(member), int)}
    seconds = growth.pop("updates", 0)
    if seconds <= 0 or min(growth.values(), default=-1) < 0:
        return {}
    return {member: value * context.page_size // seconds for member, value in growth.items()}


def vminfo_readings(kstats: Iterable[Kstat], before: tuple[Kstat, ...]) -> tuple[Kstat, ...]:
    """What the next reading is compared with: two, in case it comes within the same second."""
    last = next((kstat for kstat in kstats if SWAP in kstat.ref.tables), None)
    if last is None or before and before[-1].data.get("updates") == last.data.get("updates"):
        return before
    return (*before[-1:], last)


SWAP = Table("swap", "unix", "vminfo", (
    gauge("swap_reserved_bytes", "swap_resv", PAGES, "Swap reserved; mean since the last reading."),
    gauge("swap_allocated_bytes", "swap_alloc", PAGES,
          "Swap allocated; mean since the last reading."),
    gauge("swap_available_bytes", "swap_avail", PAGES,
          "Swap that can still be reserved; mean since the last reading."),
    gauge("swap_free_bytes", "swap_free", PAGES,
          "Swap not allocated; mean since the last reading."),
), values=mean_since)

METASLAB = Table("zpool", "zfs_metaslab_group", "*", (
    counter("metaslab_group_loads", "loads", COUNT, "Space maps loaded."),
    counter("metaslab_group_unloads", "unloads", COUNT, "Space maps unloaded."),
), ("pool", "vdev_guid"), each(lambda kstat: (
    ("pool", str(kstat.data.get("spa_name", ""))), ("vdev_guid", kstat.ref.name))))


def _made(kind: str, name: str, unit: Unit, help_text: str, source: str, *label_names: str
          ) -> Metric:
    """A row that a function below computes from several things."""
    return Metric(kind, name, "", unit, help_text, source, (), label_names)


CAPS, MEMCAPS = "kstats caps:*:cpucaps_zone_*:value", "kstats memory_cap:*:*:physcap"
ALLOC = (
    _made(GAUGE, "alloc_cpus", CPUS,
          "Number of CPUs of the node.", "kstat unix:0:system_misc:ncpus"),
    _made(GAUGE, "alloc_cpu_caps_cpus", CPUS, "Sum of the CPU caps of running zones.", CAPS),
    _made(GAUGE, "alloc_memory_bytes", BYTES, "Memory of the node in bytes.",
          "kstat unix:0:system_pages:physmem"),
    _made(GAUGE, "alloc_memory_caps_bytes", BYTES, "Sum of the memory caps of running zones.",
          MEMCAPS),
    _made(GAUGE, "alloc_uncapped_zones", COUNT,
          "Number of running zones without a cap, by resource.",
          f"{CAPS}, {MEMCAPS}", "resource"),
)
CPUS_BY_STATE = _made(GAUGE, "cpu_info_cpus", COUNT,
                      "Number of CPUs by state.", "kstats cpu_info:*:*:state",
                      "state")
ZONES_BY_STATE = _made(GAUGE, "zones_in_state", COUNT,
                       "Number of zones by state, without the global zone.",
                       "zoneadm list -p -c", "state")
TIME_OF_DAY = _made(COUNTER, "time_of_day", Unit("milliseconds", whole),
                    "Clock of the node in milliseconds since the epoch.", "clock")

# -- of commands: the words of their output, by column or name

_DECIMAL = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{0,30})?([eE][+-]?[0-9]{1,3})?")


def number_in(value: Any) -> Number | None:
    """A number in a command's output; None for "-" and anything else."""
    match = _DECIMAL.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    value = int(value) if match.groups() == (None, None) else float(value)
    return value if math.isfinite(value) else None


def marked(factors: Mapping[str, int]) -> Convert:
    """A number in a command's output, times the factor of the mark behind it; "" is no mark."""
    def convert(value: Any) -> Number | None:
        mark = value[-1:] if isinstance(value, str) and value[-1:] in factors else ""
        number_ = number_in(value[:-1] if mark else value)
        return None if number_ is None else number_ * factors.get(mark, 1)
    return convert


def matched(pattern: str, make: Callable[[re.Match[str]], Number]) -> Convert:
    """A conversion of text in this form; None for anything else."""
    form = re.compile(pattern, re.DOTALL)

    def convert(value: Any) -> Number | None:
        match = form.fullmatch(value) if isinstance(value, str) else None
        return None if match is None else make(match)
    return convert


def seconds_from_ms(value: Any) -> Number | None:
    """Milliseconds in a command's output as seconds. The point moves in the text, so that 77.161
    ms are 0.077161 s exactly: a division would change the last digit."""
    if number_in(value) is None:
        return None
    digits, _, exponent = value.lower().partition("e")
    return float(f"{digits}e{int(exponent or 0) - 3}")


def place_in(words: Sequence[str], nothing: str | None = None) -> Convert:
    """A word as its place in a list, -1 for others; `nothing` has no value."""
    def convert(value: Any) -> Number | None:
        if not isinstance(value, str) or value == nothing:
            return None
        return words.index(value) if value in words else -1
    return convert


SIZE = Unit("bytes", matched("[0-9]{1,30}", lambda match: int(match[0])))
RATIO, SHARE = Unit("ratio", marked({"x": 1})), Unit("percent", marked({"%": 1}))
HEALTH = Unit("", place_in(("ONLINE", "DEGRADED", "FAULTED", "OFFLINE", "REMOVED", "UNAVAIL"), "-"))

ZFS = printed("zfs list", (),
    gauge("zfs_available", "available", SIZE, "Space available to the zone in bytes."),
    gauge("zfs_used", "used", SIZE, "Space used by the zone and its child datasets in bytes."),
    gauge("zfs_logicalused", "logicalused", SIZE, "Space used before compression in bytes."),
    gauge("zfs_recordsize", "recordsize", SIZE, "Record size of new files in bytes."),
    gauge("zfs_quota", "quota", SIZE, "Quota of the zone in bytes; 0 is none."),
    gauge("zfs_compressratio", "compressratio", RATIO, "Compression ratio of the used space."),
    gauge("zfs_refcompressratio", "refcompressratio", RATIO,
          "Compression ratio of the referenced space."),
    gauge("zfs_referenced", "referenced", SIZE, "Space referenced by the dataset in bytes."),
    gauge("zfs_logicalreferenced", "logicalreferenced", SIZE,
          "Space referenced before compression in bytes."),
    gauge("zfs_usedbydataset", "usedbydataset", SIZE, "Space used by the dataset itself in bytes."),
    gauge("zfs_usedbysnapshots", "usedbysnapshots", SIZE,
          "Space that destroying all snapshots would free, in bytes."),
)
ZPOOL = printed("zpool list", ("pool",),
    gauge("zpool_allocated_bytes", "allocated", SIZE, "Allocated space of the pool in bytes."),
    gauge("zpool_fragmentation_percent", "fragmentation", SHARE,
          "Fragmentation of the pool's free space."),
    gauge("zpool_health_status", "health", HEALTH,
          "Health: 0 online, 1 degraded, 2 faulted, 3 offline, 4 removed, 5 unavailable."),
    gauge("zpool_size_bytes", "size", SIZE, "Size of the pool in bytes."),
)
ZFS_COLUMNS, ZPOOL_COLUMNS = (tuple([row.member for row in rows]) for rows in (ZFS, ZPOOL))
ZPOOL_COMMAND = ("list", "-Hp", "-o", ",".join(("name", *ZPOOL_COLUMNS)))
APEERS_COMMAND = ("-n", "-c", "apeers")
NTP_COMMAND = ("-n", "-c", "iostats", "-c", "kerninfo", "-c", "monstats", "-c", "sysinfo",
               "-c", "sysstats")                # and "-c", "readvar ASSID" of the system peer
TRACKING_COMMAND, SOURCES_COMMAND = ("-n", "-c", "tracking"), ("-n", "-c", "sources")
ZONEADM_COMMAND = ("list", "-p", "-c")

CODES = ("ACST ACTS AUTH AUTO BCST CHU CRYPT DCFx DENY GAL GOES GPS HBG INIT IRIG JJY LFx LOCL "
         "LORC MCST MSF NIST PPS PTB RATE STEP TDF TIME USNO WWV WWVB WWVH").split()
MODES = ("bclient broadcast client control private server sym_active sym_passive unspec").split()
TALLIES = " x.-+#*o"            # invalid falseticker overflow pruned candidate backup syspeer pps
SINCE_1900 = 2208988800         # seconds from the era of NTP to that of Unix
_ADDRESS = re.compile(          # of IPv4, also in hexadecimal, or of IPv6
    r"[0-9a-f]{8}|[0-9]{1,3}(\.[0-9]{1,3}){3}|[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]{1,44}")


def refid(value: Any) -> Number | None:
    """0 for an address, 1 and more for a known code, or -1."""
    if not isinstance(value, str):
        return None
    if _ADDRESS.fullmatch(value):
        return 0
    code = value[1:-1] if value[:1] == value[-1:] == "." else ""
    return CODES.index(code) + 1 if code in CODES else -1


MS = Unit("seconds", seconds_from_ms)
KIB = Unit("bytes", marked({"": 1024}))
STAMP = Unit("seconds", matched(            # since 1900, a hexadecimal number of fixed point
    r"\s*(?:\(no time\)|(?:0x)?([0-9a-fA-F]{1,8})\.([0-9a-fA-F]{1,8})).*", lambda match:
    int(match[1], 16) + int(match[2].ljust(8, "0"), 16) / 2 ** 32 if match[1] else 0))
FAILED = Unit("", matched(                  # polls: those of 8 bits, in octal, that are not set
    "[0-7]{1,4}", lambda match: 8 - bin(int(match[0], 8) & 0xFF).count("1")))
LEAP = Unit("", matched("[01]{1,2}", lambda match: int(match[0], 2)))
FLAG = Unit("boolean", matched(             # decimal or hexadecimal; 0 is 0 in both
    "0x[0-9a-fA-F]{1,16}|[0-9]{1,20}", lambda match: int(int(match[0], 16) != 0)))
SPAN = Unit("seconds", marked({"m": 60, "h": 3600, "d": 86400}))
LAST_HEARD = Unit("seconds", lambda value: -1 if value == "-" else SPAN.convert(value))  # -1: never
MODE, TYPE, TALLY = (Unit("", place_in(words)) for words in (MODES, "ublsABM", TALLIES))
REFID, WORD, WORD_SECONDS = Unit("", refid), Unit("", number_in), Unit("seconds", number_in)
WORD_PPM, WORD_MS = Unit("ppm", number_in), Unit("milliseconds", number_in)

NTP_PEER = printed("ntpq apeers", ("remote",),     # by column
    gauge("ntp_peer_delay_seconds", "delay", MS, "Round-trip delay to the peer."),
    gauge("ntp_peer_jitter_ppm", "jitter", WORD_MS,
          "Jitter of the peer, in milliseconds despite the name."),
    gauge("ntp_peer_offset_seconds", "offset", MS, "Offset of the clock from the peer's."),
    gauge("ntp_peer_poll_interval_seconds", "poll", SPAN, "Poll interval of the peer in seconds."),
    gauge("ntp_peer_last8_polls_failure_count", "reach", FAILED,
          "Number of the last 8 polls without an answer."),
    gauge("ntp_peer_refid_number", "refid", REFID,
          "Type of the peer's reference: 0 address, -1 unknown, else its number in the list."),
    gauge("ntp_peer_connection_type", "t", TYPE,
          "Type of the association: its index in u b l s A B M, or -1."),
    gauge("ntp_peer_stratum_number", "st", WORD, "Stratum of the peer."),
    gauge("ntp_peer_state", "state", TALLY,
          "Selection state of the peer: 6 is the system peer."),
    gauge("ntp_peer_last_query_seconds", "when", LAST_HEARD,
          "Seconds since the last packet from the peer; -1 is never."),
)
NTP_SYSTEM_PEER = printed("ntpq readvar", (),       # by variable of the system peer
    gauge("ntp_syspeer_delay_seconds", "delay", MS, "Round-trip delay to the system peer."),
    gauge("ntp_syspeer_dispersion_seconds", "dispersion", MS, "Dispersion of the system peer."),
    gauge("ntp_syspeer_headway_seconds", "headway", WORD_SECONDS,
          "Seconds until the next poll of the system peer is allowed."),
    gauge("ntp_syspeer_hmode_number", "hmode", WORD, "Mode of this side towards the system peer."),
    gauge("ntp_syspeer_hpoll_interval_log2s", "hpoll", WORD,
          "Poll interval of this side, as a power of two."),
    gauge("ntp_syspeer_jitter_ppm", "jitter", WORD_MS,
          "Jitter of the system peer, in milliseconds despite the name."),
    gauge("ntp_syspeer_leap_indicator_status", "leap", LEAP,
          "Leap indicator of the system peer."),
    gauge("ntp_syspeer_offset_seconds", "offset", MS,
          "Offset of the clock from the system peer's."),
    gauge("ntp_syspeer_pmode_number", "pmode", WORD, "Mode of the system peer."),
    gauge("ntp_syspeer_ppoll_interval_log2s", "ppoll", WORD,
          "Poll interval of the system peer, as a power of two."),
    gauge("ntp_syspeer_precision_log2s", "precision", WORD,
          "Precision of the system peer, as a power of two."),
    gauge("ntp_syspeer_rec_seconds", "rec", STAMP,
          "Time of the last packet from the system peer, in seconds since 1900."),
    gauge("ntp_syspeer_reftime_seconds", "reftime", STAMP,
          "Time at which the system peer's clock was last set, in seconds since 1900."),
    gauge("ntp_syspeer_root_delay_seconds", "rootdelay", MS,
          "Round-trip delay from the system peer to its primary source."),
    gauge("ntp_syspeer_root_dispersion_seconds", "rootdisp", MS,
          "Dispersion from the system peer to its primary source."),
    gauge("ntp_syspeer_stratum_number", "stratum", WORD, "Stratum of the system peer."),
    counter("ntp_syspeer_unreach_total", "unreach", WORD,
            "Unanswered polls of the system peer."),
    gauge("ntp_syspeer_xleave_seconds", "xleave", MS, "Interleave delay of the system peer."),
)
NTP = printed("ntpq", (),       # by the words of iostats, kerninfo, monstats, sysinfo, sysstats
    counter("ntp_dropped_packets_total", "dropped packets", WORD,
            "Packets dropped for lack of buffers."),
    gauge("ntp_free_receive_buffers_count", "free receive buffers", WORD,
          "Number of free receive buffers."),
    counter("ntp_ignored_packets_total", "ignored packets", WORD, "Packets ignored."),
    counter("ntp_input_wakeups_total", "input wakeups", WORD,
            "Number of times ntpd woke up for input."),
    counter("ntp_low_water_refill_count", "low water refills", WORD,
            "Number of times receive buffers were added."),
    counter("ntp_packet_send_failures_total", "packet send failures", WORD,
            "Packets that could not be sent."),
    counter("ntp_packet_sent_total", "packets sent", WORD, "Packets sent."),
    gauge("ntp_receive_buffers_count", "receive buffers", WORD, "Total number of receive buffers."),
    counter("ntp_packet_received_total", "received packets", WORD, "Packets received."),
    counter("ntp_time_since_reset_seconds", "time since reset", WORD_SECONDS,
            "Seconds since these counters were reset."),
    gauge("ntp_used_receive_buffers_count", "used receive buffers", WORD,
          "Number of receive buffers in use."),
    counter("ntp_useful_input_wakeups_total", "useful input wakeups", WORD,
            "Number of times ntpd woke up and found input."),
    counter("ntp_calibration_cycles_total", "calibration cycles", WORD,
            "Calibrations with a PPS signal."),
    gauge("ntp_calibration_interval_seconds", "calibration interval", WORD_SECONDS,
          "Length of a calibration."),
    gauge("ntp_estimated_error_seconds", "estimated error", MS, "Estimated error of the clock."),
    gauge("ntp_frequency_tolerance_ppm", "frequency tolerance", WORD_PPM,
          "Frequency tolerance of the kernel."),
    counter("ntp_jitter_exceeded_seconds_total", "jitter exceeded", WORD,
            "Number of PPS signals with too much jitter."),
    counter("ntp_stability_exceeded_seconds_total", "stability exceeded", WORD,
            "Number of PPS signals that were too unstable."),
    gauge("ntp_maximum_error_seconds", "maximum error", MS, "Maximum error of the clock."),
    gauge("ntp_frequency_offset_ppm", "pll frequency", WORD_PPM, "Frequency offset of the clock."),
    gauge("ntp_pll_offset_seconds", "pll offset", MS, "Offset that the kernel has yet to correct."),
    gauge("ntp_pll_time_const", "pll time constant", WORD,
          "Time constant of the phase-locked loop."),
    gauge("ntp_pps_frequency_ppm", "pps frequency", WORD_PPM, "Frequency of the PPS signal."),
    gauge("ntp_pps_jitter_ppm", "pps jitter", WORD_MS,
          "Jitter of the PPS signal, in milliseconds despite the name."),
    gauge("ntp_pps_stability_ppm", "pps stability", WORD_PPM, "Stability of the PPS signal."),
    gauge("ntp_precision", "precision", MS, "Precision of the kernel's clock."),
    gauge("ntp_mru_monitor_enabled_boolean", "enabled", FLAG,
          "1 if monitoring of clients is on, 0 if it is off."),
    gauge("ntp_mru_monitor_address_count", "addresses", WORD,
          "Number of addresses that the monitor holds."),
    gauge("ntp_mru_monitor_max_address_count", "peak addresses", WORD,
          "Highest number of addresses that the monitor has held."),
    gauge("ntp_mru_monitor_max_address_limit", "maximum addresses", WORD,
          "Maximum number of addresses that the monitor holds."),
    gauge("ntp_mru_monitor_min_address_limit", "reclaim above count", WORD,
          "Number of addresses above which old ones are replaced."),
    gauge("ntp_mru_monitor_max_age_limit", "reclaim older than", WORD_SECONDS,
          "Age in seconds above which addresses are replaced."),
    gauge("ntp_mru_monitor_memory_bytes", "kilobytes", KIB, "Memory used by the monitor in bytes."),
    gauge("ntp_mru_monitor_max_memory_bytes", "maximum kilobytes", KIB,
          "Maximum memory of the monitor in bytes."),
    gauge("ntp_broadcast_delay_seconds", "broadcast delay", MS, "Assumed delay of broadcasts."),
    gauge("ntp_clock_jitter_ppm", "clock jitter", WORD_MS,
          "Jitter of the clock, in milliseconds despite the name."),
    gauge("ntp_clock_frequency_wander_ppm", "clock wander", WORD_PPM,
          "Wander of the clock's frequency."),
    gauge("ntp_leap_indicator_status", "leap indicator", LEAP,
          "Leap indicator: 1 and 2 announce a leap second, 3 is no synchronisation."),
    gauge("ntp_precision_log2s", "log2 precision", WORD,
          "Precision of the clock, as a power of two."),
    gauge("ntp_stratum_number", "stratum", WORD, "Stratum of this node."),
    gauge("ntp_sys_jitter_ppm", "system jitter", WORD_MS,
          "Jitter of the system, in milliseconds despite the name."),
    gauge("ntp_syspeer_mode_number", "system peer mode", MODE,
          "Mode of the association with the system peer."),
    gauge("ntp_reftime_seconds", "reference time", STAMP,
          "Time at which the clock was last set, in seconds since 1900."),
    gauge("ntp_root_delay_seconds", "root delay", MS, "Round-trip delay to the primary source."),
    gauge("ntp_root_dispersion_seconds", "root dispersion", MS,
          "Dispersion to the primary source."),
    counter("ntp_authentication_failures_total", "authentication failed", WORD,
            "Packets whose authentication failed."),
    counter("ntp_bad_length_or_format_total", "bad length or format", WORD,
            "Packets with an invalid length or format."),
    counter("ntp_same_version_total", "current version", WORD, "Packets of the current version."),
    counter("ntp_declined_total", "declined", WORD, "Packets declined."),
    counter("ntp_kod_responses_total", "kod responses", WORD, "Kiss-of-death packets sent."),
    counter("ntp_old_version_total", "older version", WORD, "Packets of an older version."),
    counter("ntp_packets_processed_total", "processed for time", WORD,
            "Packets used to set the clock."),
    counter("ntp_packets_rate_limited_total", "rate limited", WORD,
            "Packets rejected by the rate limit."),
    counter("ntp_access_denied_packets_total", "restricted", WORD,
            "Packets rejected by access restrictions."),
    counter("ntp_sysstats_reset_seconds", "sysstats reset", WORD_SECONDS,
            "Seconds since the system's counters were reset."),
    counter("ntp_uptime_seconds", "uptime", WORD_SECONDS, "Seconds since ntpd started."),
)

# -- metadata of metrics

def source_of(metric: Metric, table: Table | None) -> str:
    """The source of the value."""
    return metric.source or table and f"kstat {table.module}:*:{table.names}:{metric.member}" or ""


def help_of(metric: Metric, table: Table | None = None) -> str:
    """The HELP text: the sentence and the source of the value."""
    return f"{metric.help[:-1]} ({source_of(metric, table)})."


def family_of(metric: Metric, samples: Sequence[Sample]) -> Family:
    """Samples of a row that no table has."""
    return Family(metric.name, metric.kind, help_of(metric), samples)


ZFS_ROWS, ZPOOL_ROWS = Rows(ZFS), Rows(ZPOOL)
NTP_PEER_ROWS, NTP_SYSTEM_PEER_ROWS, NTP_ROWS = Rows(NTP_PEER), Rows(NTP_SYSTEM_PEER), Rows(NTP)


def _by_state(metric: Metric, counts: Mapping[str, int]) -> Family:
    return family_of(metric, [Sample((("state", state),), counts[state])
                              for state in sorted(counts)])


def cpu_part(reading: Reading) -> Part:
    """CPUs by state, and of which kind the first is."""
    cpus = sorted(reading.kstats, key=lambda kstat: kstat.ref.instance)
    states = collections.Counter(str(cpu.data["state"]) for cpu in cpus if "state" in cpu.data)
    return join_parts([part_of([_by_state(CPUS_BY_STATE, states)]),
                       kstat_part(reading._replace(kstats=cpus), CPU_INFO)])


def alloc_families(kstats: Sequence[Kstat], page_size: int) -> list[Family]:
    """The sums of zones' caps beside what the node has."""
    def values(table: Table, member: str, convert: Convert) -> list[Number | None]:
        return [convert(kstat.data.get(member)) for kstat in kstats if table in kstat.ref.tables
                and (table.zone is None or kstat.ref.instance != 0)]

    memory_caps = values(MEMCAP, "physcap", cap)
    cpu_capped, capped = ([value for value in caps if value is not None]
                          for caps in (values(CPUCAP, "value", cap), memory_caps))
    [cpus], [pages] = (values(table, member, whole)[:1] or [None] for table, member in (
        (PROC, "ncpus"), (MEMORY, "physmem")))
    uncapped = {"cpu": max(0, len(memory_caps) - len(cpu_capped)),
                "memory": len(memory_caps) - len(capped)}
    made: list[tuple[Metric, Number | None]] = [
        (ALLOC[0], cpus), (ALLOC[1], cpus_of_percent(sum(cpu_capped))),
        (ALLOC[2], None if pages is None else pages * page_size), (ALLOC[3], sum(capped))]
    return [family_of(metric, [Sample((), value)])
            for metric, value in made if value is not None] + [
        family_of(ALLOC[4], [Sample((("resource", name),), count)
                             for name, count in uncapped.items()])]


def zone_states(zones: Sequence[ZoneLine]) -> list[Family]:
    """The number of zones by state."""
    return [_by_state(ZONES_BY_STATE, collections.Counter(
        zone.state for zone in zones if zone.name != "global"))]


# -- what commands print; a parser takes any text and raises nothing but CollectError

MAX_LINES = 100_000


def _lines(output: str) -> list[str]:
    return output.split("\n", MAX_LINES)[:MAX_LINES]


def zfs_command(columns: Sequence[str], pool: str) -> tuple[str, ...]:
    """Arguments for these columns of the datasets of all zones. Not of datasets below: a tenant
    can make any number of them in a delegated dataset."""
    return ("list", "-Hp", "-t", "filesystem,volume", "-o", ",".join(("name", *columns)),
            "-d", "1", pool)


def parse_list(command: str, output: str, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Words by column by name, of `zfs list` or `zpool list` with -H and these columns."""
    rows: dict[str, dict[str, str]] = {}
    for line in _lines(output):
        name, *words = line.split("\t")
        if len(words) == len(columns):
            rows.setdefault(name, dict(zip(columns, words)))
    if not rows and output.strip() and not re.match(r"no \w+ available", output):
        raise CollectError(f"{command}: no line has {len(columns) + 1} columns")
    return rows


def zfs_part(words: Mapping[str, str]) -> Part:
    """A zone's dataset as parse_list gives it."""
    return ZFS_ROWS.part([ZFS_ROWS.of(words)])


def zpool_part(pools: Mapping[str, Mapping[str, str]], groups: Reading) -> Part:
    """Pools as parse_list gives them, with the kstats of their metaslab groups."""
    return join_parts([kstat_part(groups, METASLAB), ZPOOL_ROWS.part([
        ZPOOL_ROWS.of(words, (("pool", name),)) for name, words in pools.items()])])


class NtpPeer(NamedTuple):
    """A line of apeers."""
    remote: str
    assid: str
    words: dict[str, str]


_APEER_COLUMNS = ("st", "t", "when", "poll", "reach", "delay", "offset", "jitter")
_ASSID = re.compile(r"(?:.*[ )])?([0-9]{1,5})")


def parse_apeers(output: str) -> list[NtpPeer]:
    """The peers. Neither blanks nor columns alone separate the fields: tally and remote go by
    column, the last eight are words, and refid and assid are what is left between."""
    peers: list[NtpPeer] = []
    taken: set[str] = set()
    for line in _lines(output):
        words = line[16:].rsplit(None, len(_APEER_COLUMNS))
        if len(words) != len(_APEER_COLUMNS) + 1 or number_in(words[1]) is None:
            continue                        # the heading, the ruler, an empty line
        match = _ASSID.fullmatch(words[0].rstrip())
        assid = match.group(1) if match else ""
        fields = dict(zip(_APEER_COLUMNS, words[1:]))
        fields["state"] = line[0]
        fields["refid"] = words[0].rstrip()[:-len(assid) or None].strip()
        remote = line[1:16].strip()
        if remote in taken:                 # cut to 15 characters, so not unique with IPv6
            remote = f"{remote} {assid}"
        if remote not in taken:
            taken.add(remote)
            peers.append(NtpPeer(remote, assid, fields))
    return peers


def system_peer(peers: Sequence[NtpPeer]) -> str | None:
    """The association id of the system peer, for readvar."""
    return next((peer.assid for peer in peers
                 if peer.words["state"] in ("*", "o") and peer.assid), None)


class NtpDetails(NamedTuple):
    """Words of the second command: about ntpd, and about the system peer."""
    system: dict[str, str]
    peer: dict[str, str]


_UNMARKED = re.compile(r"(calibration interval)\s+(\S+)")       # the one line without a colon


def parse_ntp_details(output: str) -> NtpDetails:
    """Lines of `name: value`; below the heading of an association, lists of `name=value`."""
    details = NtpDetails({}, {})
    of_peer = False
    for line in _lines(output):
        if line.startswith("associd="):
            of_peer = not line.startswith(("associd=0 ", "associd=0,"))
            continue
        if of_peer:
            for variable in line.split(","):
                name, _, value = variable.partition("=")
                details.peer.setdefault(name.strip().lower(), value.strip())
            continue
        name, colon, value = line.partition(":")
        match = None if colon else _UNMARKED.match(line)
        if match:
            name, value = match.groups()
        if colon or match:
            details.system.setdefault(name.strip().lower(), value.strip())
    return details


def ntp_part(peers: Sequence[NtpPeer], details: NtpDetails) -> Part:
    """The clock's synchronisation by ntpd; raises CollectError when ntpq printed nothing."""
    if not peers and not details.system:
        raise CollectError("ntp: no output from ntpq; is ntpd running?")
    return join_parts([
        NTP_PEER_ROWS.part([NTP_PEER_ROWS.of(peer.words, (("remote", peer.remote),))
                            for peer in peers]),
        NTP_SYSTEM_PEER_ROWS.part([NTP_SYSTEM_PEER_ROWS.of(details.peer)]),
        NTP_ROWS.part([NTP_ROWS.of(details.system)])])


MAX_SOURCES = 200
_CHRONY_LEAP = {"Normal": 0, "Insert second": 1, "Delete second": 2, "Not synchronised": 3}
_CHRONY_STATES = {"*": 6, "+": 4, "-": 3, "?": 0, "x": 1, "~": 1}
ChronyFields = Mapping[int, tuple[str, Convert]]    # place -> metric of the same meaning
_CHRONY_TRACKING: ChronyFields = {
    2: ("ntp_stratum_number", number_in), 4: ("ntp_pll_offset_seconds", number_in),
    7: ("ntp_frequency_offset_ppm", number_in), 10: ("ntp_root_delay_seconds", number_in),
    11: ("ntp_root_dispersion_seconds", number_in),
    3: ("ntp_reftime_seconds", matched(r"[0-9]{1,12}(\.[0-9]*)?", lambda match:
                                       float(match[0]) + SINCE_1900)),
    13: ("ntp_leap_indicator_status", lambda value: _CHRONY_LEAP.get(value.strip())),
}
_CHRONY_SOURCES: ChronyFields = {
    1: ("ntp_peer_state", lambda value: _CHRONY_STATES.get(value, -1)),
    3: ("ntp_peer_stratum_number", number_in),
    4: ("ntp_peer_poll_interval_seconds", matched("[12]?[0-9]|3[0-2]", lambda match:
                                                  2 ** int(match[0]))),
    5: ("ntp_peer_last8_polls_failure_count", FAILED.convert),
    6: ("ntp_peer_last_query_seconds", number_in), 7: ("ntp_peer_offset_seconds", number_in),
}


def chrony_families(tracking: str, sources: str) -> list[Family]:
    """The same metrics from chronyd, as far as it has them; raises CollectError."""
    values: dict[str, dict[Labels, Number]] = {}

    def add(line: str, least: int, metrics: ChronyFields, label: bool) -> None:
        fields = line.split(",")
        for place, (name, convert) in metrics.items() if len(fields) >= least else ():
            value = convert(fields[place])
            if value is not None:
                labels = (("remote", fields[2]),) if label else ()
                values.setdefault(name, {}).setdefault(labels, value)
    add(tracking.strip(), 14, _CHRONY_TRACKING, False)
    for line in sources.split("\n", MAX_SOURCES)[:MAX_SOURCES]:
        add(line, 10, _CHRONY_SOURCES, True)
    if not values:
        raise CollectError("ntp: no usable output from chronyc; is chronyd running?")
    known = {row.name: row for row in NTP_PEER + NTP}
    return [Family(name, known[name].kind, f"{known[name].help[:-1]} (chronyc).",
                   list(itertools.starmap(Sample, samples.items())))
            for name, samples in values.items()]


class ZoneLine(NamedTuple):
    """A line of `zoneadm list -p -c`."""
    zone_id: int | None                  # None: it is not running
    name: str
    state: str
    zonepath: str
    uuid: str
    brand: str
    ip_type: str
    debug_id: int | None                 # Joyent's; "SYSbhyve-<debug id>" is its machine


_FIELDS = re.compile(r"((?:[^:\\]|\\.)*)(?::|$)")


def parse_zoneadm(output: str) -> list[ZoneLine]:
    """The zones. Colons within a field are escaped by a backslash; bad lines are left out."""
    zones: list[ZoneLine] = []
    for line in _lines(output):
        fields = [re.sub(r"\\(.)", r"\1", field) for field in _FIELDS.findall(line)] \
            if "\\" in line else line.split(":")
        if len(fields) < 7 or not fields[1]:
            continue
        number_, debug = number_in(fields[0]), number_in(fields[7]) if len(fields) > 7 else None
        running = isinstance(number_, int) and number_ >= 0 and \
            fields[2] in ("running", "shutting_down", "down", "ready", "mounted")
        zones.append(ZoneLine(int(number_) if running and number_ is not None else None,
                              fields[1], fields[2], fields[3], fields[4], fields[5], fields[6],
                              debug if isinstance(debug, int) else None))
    return zones


# -- what operators' plugins and applications in zones bring

MAX_FOREIGN_SAMPLES = 10_000    # of one plugin
MAX_TEXTFILE_SAMPLES = 1_000    # of one zone's file
MAX_FOREIGN_LINES = 20_000
_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_:]")
_OPTION = re.compile(r"#\s*OPTION\s+ttl\s+(\S+)\s*")


class Foreign(NamedTuple):
    """A family of a plugin, text file or core zone, as it goes on the page."""
    name: str
    kind: str
    text: str

    def names(self) -> set[str]:
        """The valid names of its samples."""
        return {self.name + suffix for suffix in ("", *SUFFIXES.get(self.kind, ()))}


def foreign(families: Iterable[Family]) -> list[Foreign]:
    """Families as text."""
    return [Foreign(family.name, family.kind, render([family])) for family in families]


# A sample as Prometheus reads it: name, labels, value, timestamp (model/textparse/promlex.l).
_LABEL_PAIR = r'[ \t]*([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*"((?:[^"\\]|\\.)*)"[ \t]*'
_LABEL_PAIRS = re.compile(_LABEL_PAIR)
_FOREIGN_SAMPLE = re.compile(
    r"([a-zA-Z_:][a-zA-Z0-9_:]*)"
    r"(?:[ \t]*(\{(?:" + _LABEL_PAIR + r"(?:,|(?=\})))*[ \t]*\})|(?=[ \t]))"
    r"[ \t]*([^ \t]+)(?:[ \t]+([0-9]{1,18}))?[ \t\r]*")
_FOREIGN_VALUE = re.compile(r"[+-]?(inf(inity)?|([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?)|nan",
                            re.IGNORECASE | re.ASCII)
MAX_CORE_SAMPLES = 50_000


class CorePage:
    """The pages of a core zone's ports, sorted by family and otherwise verbatim. A line that
    Prometheus would refuse is left out: it would cost the whole page."""

    def __init__(self, is_taken: Callable[[str], bool]) -> None:
        self._is_taken = is_taken               # whether the agent uses this name
        self._kinds: dict[str, str] = {}
        self._helps: dict[str, str] = {}
        self._lines: dict[str, list[str]] = {}  # by family
        self._seen: set[tuple[str, frozenset[tuple[str, str]]]] = set()
        self._refused: set[tuple[str, str]] = set()     # port, family
        self.problems: list[str] = []

    def add(self, source: str, body: bytes) -> None:
        """Add one port's page."""
        lines = body.split(b"\n", MAX_FOREIGN_LINES)
        for index, raw in enumerate(lines[:MAX_FOREIGN_LINES], 1):
            try:
                self._line(source, raw.decode())
            except UnicodeDecodeError:
                self.problems.append(f"{source}: line {index}: not UTF-8")
            except ExpositionError as error:
                self.problems.append(f"{source}: line {index}: {error}")
        if len(lines) > MAX_FOREIGN_LINES:
            self.problems.append(f"{source}: more than {MAX_FOREIGN_LINES} lines")

    def families(self) -> list[Foreign]:
        """All families added so far."""
        return [Foreign(name, kind, f"# HELP {name} {self._helps.get(name, name)}\n"
                        f"# TYPE {name} {kind}\n" + "".join(lines))
                for name, lines in self._lines.items()
                for kind in (self._kinds.get(name, UNTYPED),)]

    def _line(self, source: str, line: str) -> None:
        if line.startswith("#"):
            words = line[1:].rstrip("\r").split(None, 2)
            if len(words) == 3 and words[0] in ("HELP", "TYPE") and valid_metric_name(words[1]):
                _, name, rest = words
                if words[0] == "HELP":          # of several ports, the first
                    self._helps.setdefault(name, rest)
                elif rest.strip() in KINDS and name not in self._lines:
                    self._kinds.setdefault(name, rest.strip())
        elif line.strip():
            self._sample(source, line)

    def _sample(self, source: str, line: str) -> None:
        match = _FOREIGN_SAMPLE.fullmatch(line)
        if match is None:
            raise ExpositionError(f"{line[:40]!r} is not a sample")
        name, labels, _, _, value, timestamp = match.groups()
        if _FOREIGN_VALUE.fullmatch(value) is None or (
                math.isinf(float(value)) and "inf" not in value.lower()):
            raise ExpositionError(f"{value[:40]!r} is not a number")
        pairs = _LABEL_PAIRS.findall(labels or "")
        if len({label for label, _ in pairs}) < len(pairs) or any(
                label.startswith("__") for label, _ in pairs):
            raise ExpositionError("a label is duplicated or reserved")
        family, _ = family_name(name, self._kinds)
        if self._is_taken(name) or self._is_taken(family):
            if (source, family) not in self._refused:
                self._refused.add((source, family))
                self.problems.append(f"{source}: {family} is a name that the page has already")
            return
        key = (name, frozenset(pairs))
        if key in self._seen or len(self._seen) >= MAX_CORE_SAMPLES:
            raise ExpositionError(f"{name} has the same labels twice" if key in self._seen else
                                  f"more than {MAX_CORE_SAMPLES} samples")
        self._seen.add(key)
        self._lines.setdefault(family, []).append(
            f"{name}{labels or ''} {value}{' ' + timestamp if timestamp else ''}\n")


def foreign_families(prefix: str, content: str, limit: int) -> tuple[list[Family], list[str]]:
    """The families of a page in the text format, under a prefix, and problems."""
    lines = content.split("\n", MAX_FOREIGN_LINES)
    families, problems = parse_lines("\n".join(lines[:MAX_FOREIGN_LINES]), max_samples=limit)
    if len(lines) > MAX_FOREIGN_LINES:
        problems.insert(0, f"more than {MAX_FOREIGN_LINES} lines; the rest is left out")
    kept: list[Family] = []
    for name, kind, help_text, samples in families:
        if kind == UNTYPED:
            problems.append(f"{name} has no TYPE")
            continue
        good = [all(valid_label_name(label) for label, _ in sample.labels) for sample in samples]
        problems += [f"{name}{label_text(sample.labels)}: a label's name is reserved"
                     for sample, is_good in zip(samples, good) if not is_good]
        kept.append(Family(prefix + name, kind, help_text or name,
                           list(itertools.compress(samples, good))))
    return kept, problems


def _ttl(value: str) -> float | None:
    seconds = number_in(value.strip())
    return None if seconds is None or seconds < 0 else float(seconds)


def plugin_families(plugin: str, output: str, prom: bool
                    ) -> tuple[list[Family], float | None, list[str]]:
    """The families that a plugin printed, the lifetime if it gave one, and problems; a bad line is
    left out. Plain lines are named `plugin_<plugin>_…`. The text format keeps its names: the
    original does so, and dashboards know them."""
    prefix = f"plugin_{_NOT_IN_NAMES.sub('_', plugin)}_"
    if prom:
        families, problems = foreign_families("", output, MAX_FOREIGN_SAMPLES)
        option = _OPTION.fullmatch(output.split("\n", 1)[0])
        return families, _ttl(option.group(1)) if option else None, problems
    ttl: float | None = None
    problems = []
    made: dict[str, tuple[str, str, list[Sample]]] = {}     # name -> type, help, samples
    seen: set[tuple[str, Labels]] = set()

    def take(name: str, kind: str, value: str, help_text: str) -> None:
        base, brace, _ = name.partition("{")                # the name may contain labels
        labels, end = _labels(name, len(base) + 1) if brace else ((), len(name))
        sample, full = Sample(labels, _value(value.strip())), prefix + base
        series = (full, tuple(sorted(labels)))              # their order does not matter
        family = made.get(full) or (kind, help_text or base, [])
        for wrong, problem in (
                (not valid_metric_name(full) or name[end:], " is not a valid metric name"),
                (family[0] != kind, f" is already a {family[0]}"),
                (series in seen, " is duplicated"),
                (not all(valid_label_name(label) for label, _ in labels),
                 ": a label's name is reserved")):
            if wrong:
                raise ExpositionError(f"{name[:40]!r}{problem}")
        if len(seen) >= MAX_FOREIGN_SAMPLES:
            raise ExpositionError(f"more than {MAX_FOREIGN_SAMPLES} samples")
        seen.add(series)
        made.setdefault(full, family)[2].append(sample)

    for index, line in enumerate(output.split("\n", MAX_FOREIGN_LINES)[:MAX_FOREIGN_LINES], 1):
        fields = line.rstrip("\r").split("\t")
        try:
            if not line.strip():
                continue
            if not 3 <= len(fields) <= 4:
                raise ExpositionError(f"{len(fields)} fields instead of 3 or 4, separated by TAB")
            name, kind, value, help_text = (*fields, "")[:4]
            if kind in (GAUGE, COUNTER):
                take(name, kind, value, help_text)
            elif kind != "option":
                raise ExpositionError(f"type {kind[:40]!r} is neither gauge nor counter")
            elif name != "ttl" or _ttl(value) is None:
                raise ExpositionError(f"unknown option {name[:40]!r} or bad value {value[:40]!r}")
            else:
                ttl = _ttl(value)
        except ExpositionError as error:
            problems.append(f"line {index}: {error}")
    return [Family(name, *family) for name, family in made.items()], ttl, problems



# -- VM objects of vminfod, of which any member may be missing or malformed

def _members(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _label(value: Any) -> str:
    """Text that a page can contain: JSON may have lone surrogates, which UTF-8 cannot encode."""
    return value[:256].encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _nics(vm: Any) -> list[Mapping[str, Any]]:
    nics = _members(vm).get("nics")
    return [nic for nic in nics if isinstance(nic, dict)] if isinstance(nics, list) else []


def nic_labels(vm: Any) -> dict[str, tuple[str, str]]:
    """Link inside the zone -> nic_tag and network_uuid, "" where missing."""
    return {nic["interface"]: (_label(nic.get("nic_tag")), _label(nic.get("network_uuid")))
            for nic in _nics(vm) if isinstance(nic.get("interface"), str)}


def metric_ports(vm: Any) -> list[int]:
    """The ports of a core zone's application metrics: customer_metadata.metricPorts."""
    ports = _members(_members(vm).get("customer_metadata")).get("metricPorts")
    if type(ports) is int:
        ports = [str(ports)] if abs(ports) < 65536 else []
    elif isinstance(ports, str):
        ports = re.split(r"[\s,]+", ports)[:1000]
    else:
        ports = []
    numbers = [int(port) for port in ports if re.fullmatch("[0-9]{1,5}", port)]
    return [port for port in dict.fromkeys(numbers) if 0 < port < 65536]


# The operator's account, the same in every Triton installation. Tags alone prove nothing: tenants
# set those of their VMs.
ADMIN_UUID = "930896af-bf8c-48d4-885c-6573a94b1853"


def is_core(vm: Any) -> bool:
    """Whether a zone is one of Triton's services; used where the proxy does not say."""
    members = _members(vm)
    role = _members(members.get("tags")).get("smartdc_role")
    return isinstance(role, str) and role != "" and members.get("owner_uuid") == ADMIN_UUID

# -- collectors: each is a row; those that do not read kstats alone have a function

class Brought(NamedTuple):
    """Foreign text, before its names are checked against the rest of the page."""
    families: Sequence[Foreign]
    problems: Sequence[str] = ()
    ttl: float | None = None                # the lifetime that it requests


class Shared(NamedTuple):
    """The parts of all zones."""
    parts: Mapping[str, Part]
    complete: bool                          # False: a zone that is not listed may have values
    problems: Sequence[str] = ()


Found = Union[Part, Shared, Brought]


class Task(NamedTuple):
    """The input of a collector's function, which runs in a thread of a pool and shares nothing
    else with other threads."""
    host: Host
    run: Callable[[str, Sequence[str], float], Output]  # the host's; a capture keeps the output
    zone: str                               # or NODE
    timeout: float                          # of each command
    pool: str                               # where the datasets of zones are
    read: Callable[[Callable[[Reader], Any]], Any]      # runs in a reader of kstats
    now: Callable[[], float]

    def command(self, name: str, *arguments: str) -> Output:
        """Run one of the commands of the settings; raises CommandError."""
        return self.run(name, arguments, self.timeout)


def collect_alloc(task: Task) -> Found:
    """What zones may use, and what the node has."""
    reading = task.read(lambda reader: Reading([*read_tables(reader, PROC, MEMORY).kstats,
                                                *read_zones(reader, MEMCAP, CPUCAP)[1]], []))
    return part_of(alloc_families(reading.kstats, task.host.page_size))


def collect_cpu_info(task: Task) -> Found:
    """How many CPUs are in which state, and of which kind the first is."""
    return cpu_part(task.read(lambda reader: read_tables(reader, CPU_INFO)))


def list_datasets(run: Callable[..., Output], pool: str) -> tuple[Output, tuple[str, ...]]:
    """`zfs list` of all zones with the columns that this platform knows, and which these are."""
    columns = ZFS_COLUMNS
    while True:
        output = run("zfs", *zfs_command(columns, pool))
        refused = [name for name in columns if output.status and not output.stdout
                   and re.search(rf"\b(bad|invalid)\b.*\b{name}\b", output.stderr)]
        if not refused:
            return output, columns
        columns = tuple([name for name in columns if name not in refused])


def collect_zfs(task: Task) -> Found:
    """One `zfs list` for all zones. A dataset that cannot be read makes it fail and leaves the
    others on the list."""
    output, columns = list_datasets(task.command, task.pool)
    problem = f"zfs list: {output.last_line}"
    if output.status and not output.stdout:
        raise CollectError(problem)
    parts = {name[len(task.pool) + 1:]: zfs_part(words) for name, words
             in parse_list("zfs list", output.stdout, columns).items()
             if name.startswith(task.pool + "/")}
    return Shared(parts, not output.status, [
        *(f"this zfs has no property {name}" for name in ZFS_COLUMNS if name not in columns),
        *([problem] if output.status else [])])


def collect_zpool(task: Task) -> Found:
    """The pools, with the kstats of their metaslab groups."""
    output = task.command("zpool", *ZPOOL_COMMAND).checked("zpool list")
    groups = task.read(lambda reader: read_tables(reader, METASLAB))
    pools = parse_list("zpool list", output, ZPOOL_COLUMNS)
    return zpool_part(pools, groups)


def query_ntpd(run: Callable[..., Output]) -> tuple[list[NtpPeer], NtpDetails]:
    """Values from ntpq; raises CommandError if it is absent, CollectError if ntpd is down."""
    output = run("ntpq", *APEERS_COMMAND)
    if not output.stdout.strip():           # exit 0, and a line on stderr
        raise CollectError(f"ntpq: {output.last_line}")
    peers = parse_apeers(output.stdout)
    peer = system_peer(peers)
    output = run("ntpq", *NTP_COMMAND, *(("-c", f"readvar {peer}") if peer else ()))
    return peers, parse_ntp_details(output.stdout)


def query_chronyd(run: Callable[..., Output]) -> list[Family]:
    """Values from chronyc; raises CommandError, CollectError."""
    tracking, sources = (run("chronyc", *words) for words in (TRACKING_COMMAND, SOURCES_COMMAND))
    return chrony_families(tracking.stdout, sources.stdout)


def collect_ntp(task: Task) -> Found:
    """Values from ntpd, or from chrony if ntpq is absent."""
    try:
        return ntp_part(*query_ntpd(task.command))
    except CommandError as error:
        try:
            return part_of(query_chronyd(task.command))
        except CommandError:
            raise CollectError(str(error)) from None


def collect_zones(task: Task) -> Found:
    """The number of zones by state."""
    zones = parse_zoneadm(task.command("zoneadm", *ZONEADM_COMMAND).checked("zoneadm list"))
    if not zones:                           # the global zone is always there
        raise CollectError("zoneadm list: no line has 7 fields")
    return part_of(zone_states(zones))


LEAST_PORT_SECONDS = 0.2        # for a core zone's port after others have used up the time


def collect_core(task: Task) -> Found:
    """The metricPorts of a platform zone: a connection for each port, no retry."""
    vm = task.host.vms.vms.get(task.zone)
    if vm is None or not vm.ports or not vm.addresses or task.host.recorded:
        return NOTHING      # a recording's addresses belong to somebody's network
    page = CorePage(lambda name: is_ours(name, False))
    client, address = Client(max_body=2 << 20, max_idle=0), bracketed(vm.addresses[0])
    end = task.now() + task.timeout         # for all ports, but each gets LEAST_PORT_SECONDS
    for port in vm.ports:
        try:
            answer = client.request(
                "GET", f"http://{address}:{port}/metrics", {"Connection": "close"},
                timeout=max(end - task.now(), LEAST_PORT_SECONDS))
            if answer.status != 200:
                raise CollectError(f"returned status {answer.status}")
            page.add(f"port {port} of {task.zone}", answer.body)
        except (ClientError, CollectError) as error:
            page.problems.append(f"port {port} of {task.zone}: {error}")
    families = page.families()
    if page.problems and not families:
        raise CollectError("; ".join(page.problems)[:1000])
    return Brought(families, page.problems)


def collect_textfiles(task: Task) -> Found:
    """A tenant's text files, read in a separate process: the file system may hang."""
    zone, vm = task.zone, task.host.vms.vms.get(task.zone)
    root = (vm.zonepath if vm is not None and vm.zonepath else f"/{task.pool}/{zone}") + "/root"
    output = task.host.run_program((sys.executable, "-I", "-S", os.path.abspath(__file__),
                                    "textfiles", root), task.timeout)
    families: list[Family] = []
    problems: list[str] = []
    for name, content in json.loads(output.checked(f"text files of {zone}")).items():
        if isinstance(content, str):
            written, wrong = foreign_families("app_", content, MAX_TEXTFILE_SAMPLES)
            families += written
            problems += [f"{zone}: {name}: {problem}" for problem in wrong]
        else:
            problems.append(f"{zone}: {name}: {content[0]}")
    merged, more = merge(families)
    return Brought(foreign(merged), problems + more)


def collect_plugin(plugin: Plugin, others: tuple[str, ...], task: Task) -> Found:
    """The output of a plugin; `others`: prefixes of other plugins' names."""
    output = task.host.run_program((plugin.path, "global" if task.zone == NODE else task.zone),
                                   task.timeout, PLUGIN_OUTPUT)
    if output.stderr:
        log.debug("%s: %s", plugin.path, output.stderr[:1000])
    printed, ttl, problems = plugin_families(
        plugin.name, output.checked(plugin.path + (f": exit {output.status}" if output.stderr
                                                   and output.status > 0 else "")), plugin.prom)
    families: list[Family] = []
    for family in printed:
        if family.name.startswith(others) or is_ours(family.name, task.zone == NODE):
            problems.append(f"{family.name} is a name that the page has already")
        else:
            families.append(family)
    if problems and not families:
        raise CollectError(f"{plugin.path}: no valid line: {problems[0]}")
    return Brought(foreign(families), [f"{plugin.path}: {problem}" for problem in problems], ttl)


class Collector(NamedTuple):
    """One collector of a page."""
    name: str
    collect: Callable[[Task], Found] | None     # None: from kstats that are read with the page
    lifetime: float                         # maximum seconds that a value is used
    tables: tuple[Table, ...] = ()
    metrics: tuple[Metric, ...] = ()        # beside those of the tables
    timeout: float = 10.0                   # seconds, of each command
    shared: bool = False                    # one job returns the parts of all zones
    foreign: bool = False                   # programs of others: run in a separate pool
    patient: bool = False                   # also cached after a failure: it is expensive


KSTAT_SECONDS, CORE_SECONDS, PLUGIN_SECONDS = 8.0, 5.0, 60.0
NODE = "gz"
TIME = Collector("time", None, 0.0, metrics=(TIME_OF_DAY,))
ZONE_COLLECTORS = (             # in page order
    Collector("cpucap", None, KSTAT_SECONDS, (CPUCAP,)),
    Collector("limits", None, KSTAT_SECONDS, LIMITS),
    Collector("link", None, KSTAT_SECONDS, (LINK,)),
    Collector("memcap", None, KSTAT_SECONDS, (MEMCAP,)),
    Collector("tcp", None, KSTAT_SECONDS, (TCP,)),
    Collector("textfile", collect_textfiles, PLUGIN_SECONDS, foreign=True),
    Collector("triton_core", collect_core, CORE_SECONDS, timeout=2.0, foreign=True),
    Collector("vcpu", None, KSTAT_SECONDS, (VCPU,)),
    Collector("zfs", collect_zfs, 300.0, metrics=ZFS, timeout=60.0, shared=True),
    Collector("zone_misc", None, KSTAT_SECONDS, (ZONE_MISC,)),
    Collector("zone_vfs", None, KSTAT_SECONDS, (ZONE_VFS,)),
    TIME,
)
NODE_COLLECTORS = (             # in page order
    Collector("alloc", collect_alloc, 60.0, metrics=ALLOC),
    Collector("arcstats", None, KSTAT_SECONDS, (ARCSTATS,)),
    Collector("cpu_info", collect_cpu_info, KSTAT_SECONDS, (CPU_INFO,), (CPUS_BY_STATE,)),
    Collector("cpu_util", None, KSTAT_SECONDS, (CPU_UTIL,)),
    Collector("disk", None, KSTAT_SECONDS, (DISK,)),
    Collector("link", None, KSTAT_SECONDS, (NODE_LINK,)),
    Collector("load", None, KSTAT_SECONDS, (NODE_LOAD,)),
    Collector("memory", None, KSTAT_SECONDS, (MEMORY,)),
    Collector("ntp", collect_ntp, 64.0, metrics=NTP_PEER + NTP_SYSTEM_PEER + NTP),
    Collector("proc", None, KSTAT_SECONDS, (PROC,)),
    Collector("swap", None, KSTAT_SECONDS, (SWAP,)),
    Collector("zones", collect_zones, 30.0, metrics=(ZONES_BY_STATE,), timeout=20.0),
    Collector("zpool", collect_zpool, 30.0, (METASLAB,), ZPOOL, timeout=20.0),
    TIME,
)
ZONE_TABLES, NODE_TABLES = (
    tuple([table for collector in collectors for table in collector.tables])
    for collectors in (ZONE_COLLECTORS, NODE_COLLECTORS))
TABLES = (*ZONE_TABLES, GUESTS, *NODE_TABLES)
PROOFS = frozenset(table.collector for table in ZONE_TABLES)
WANTED = wanted_of(TABLES)      # the part of the chain that is indexed


# -- from raw kstats to values on a page

class Form:
    """Collectors whose values came together: their templates, and which values are whose. One
    object for all that are alike: pages find their layout by it."""
    __slots__ = ("names", "templates", "places", "size")

    def __init__(self, names: tuple[str, ...], templates: tuple[str, ...],
                 places: tuple[range, ...], size: int) -> None:
        self.names, self.templates, self.places = names, templates, places
        self.size = size                        # how many values there are; no text is one, too


@functools.lru_cache(maxsize=MAX_TEMPLATES)
def form_of(names: tuple[str, ...], templates: tuple[str, ...]) -> Form:
    """The form of the parts of these collectors, whose values are joined in this order."""
    places: list[range] = []
    size = 0
    for template in templates:
        count = template.replace("%%", "").count("%s")
        places.append(range(size, size + count))
        size += count
    return Form(names, templates, tuple(places), size or 1)


class Came(NamedTuple):
    """What a piece of work has brought: values of some collectors, errors of others."""
    form: Form
    values: str                                 # with BETWEEN between them
    failed: Mapping[str, Exception]


NO_FORM = form_of((), ())
Wants = tuple[tuple[str, tuple[Table, ...]], ...]       # collectors by name, with their tables


@functools.lru_cache(maxsize=MAX_TEMPLATES)
def wants_of(collectors: tuple[Collector, ...]) -> Wants:
    """What these collectors read."""
    return tuple([(collector.name, collector.tables) for collector in collectors])


def _as_text(convert: Convert, value: float) -> Any:
    """Floating point, which no kernel sends any more: it may be no number."""
    converted = convert(value)
    return None if converted is None else number(converted)


class Plan:
    """How kstats of these shapes become values on a page: worked out once for all zones alike.

    The place of a value is its number in one list: the members of all kstats as `Shape.unpack`
    gives them, then a label text for each kstat of a table with labels, then what is converted.
    """

    def __init__(self, wants: Wants, shapes: tuple[Shape, ...]) -> None:
        self.wants = wants
        starts, size = [], 0
        for shape in shapes:
            starts.append(size)
            size += len(shape.places) + (shape.name_place is not None)
        self.named = [index for index, shape in enumerate(shapes) if shape.zonename is not None]
        places = [starts[index] + place for index in self.named
                  for place in (shapes[index].name_place,) if place is not None]
        # takes the names; None: some are in places of their own in each kstat
        self.names = taking(places) if len(places) == len(self.named) else None
        self.labelled: list[tuple[Label, list[int]]] = []   # for these kstats
        self.idle: list[tuple[int, list[int]]] = []     # kstats, to be left out if these are all 0
        self.wrong: list[tuple[str, int]] = []          # collectors, with kstats of a wrong type
        kstats: dict[Table, list[int]] = {}
        label_places: dict[tuple[Table, int], int] = {}
        for _, tables in wants:
            for table in tables:
                mine = kstats[table] = [index for index, shape in enumerate(shapes)
                                        if table in shape.tables]
                if table.labels is not None:
                    self.labelled.append((table.labels, mine))
                    for index in mine:
                        label_places[table, index] = size
                        size += 1
        self.converts: list[tuple[int, Convert]] = []
        self.things: dict[Table, list[Thing]] = {}
        for name, tables in wants:
            for table in tables:
                self.things[table] = []
                for index in kstats[table]:
                    shape = shapes[index]
                    rows: list[tuple[int, int]] = []
                    for row, metric in enumerate(table.metrics):
                        if metric.member not in shape.places:
                            continue
                        place = starts[index] + shape.places[metric.member]
                        convert = metric.unit.convert
                        if metric.member in shape.floats:
                            convert = functools.partial(_as_text, convert)
                        if convert is not whole:
                            self.converts.append((place, convert))
                            place = size + len(self.converts) - 1
                        rows.append((row, place))
                    if not rows and shape.type != NAMED:    # names may be missing, types not
                        self.wrong.append((name, index))
                    if table.skip_idle:
                        self.idle.append((index, [starts[index] + place for place
                                                  in shape.places.values()]))
                    self.things[table].append(Thing(index, label_places.get((table, index)), rows))
        self.first_made = size


class Thing(NamedTuple):
    """What a table says of one kstat."""
    kstat: int                                  # its number
    label: int | None                           # place of its label text
    rows: list[tuple[int, int]]                 # rows that have a member, and its place


@functools.lru_cache(maxsize=MAX_TEMPLATES)
def plan_of(wants: Wants, shapes: tuple[Shape, ...]) -> Plan:
    """The plan for these."""
    return Plan(wants, shapes)


@functools.lru_cache(maxsize=MAX_TEMPLATES)
def planned_form(plan: Plan, dropped: frozenset[int], absent: tuple[bool, ...]
                 ) -> tuple[Form, Taking]:
    """The form without kstats that are dropped and conversions that gave no value, and how its
    values are taken from all."""
    without = set(itertools.compress(itertools.count(plan.first_made), absent))
    templates: list[str] = []
    order: list[int] = []
    for _, tables in plan.wants:
        text_ = ""
        for table in tables:
            shown: list[Values] = []
            places: list[int] = []
            for thing in plan.things[table]:
                if thing.kstat in dropped or table.labels is None and shown:    # the first counts
                    continue
                rows = [(row, place) for row, place in thing.rows if place not in without]
                shown.append(Values("" if thing.label is None else "%s",
                                    tuple([row for row, _ in rows]), rows))
                places += (thing.label or 0, *[place for _, place in rows])
            part, taken = table.rows.template(shown)
            text_ += part
            order += [places[place] for place in taken]
        templates.append(reused(text_))
    return form_of(tuple([name for name, _ in plan.wants]), tuple(templates)), taking(order)


_is_none = functools.partial(operator.is_, None)
_kstat_labels = functools.lru_cache(maxsize=1024)(lambda labels: label_text(labels)[1:-1])


def from_kstats(wants: Wants, reading: Reading, context: Context = None) -> Came:
    """What collectors send of what was read of a zone, or of the node; raises CollectError when
    one of them cannot."""
    for error in reading.errors:
        for name, tables in wants:
            if error.ref is not None and not set(tables).isdisjoint(error.ref.tables):
                raise CollectError(f"{name}: {error}")
    kstats = reading.kstats
    zone = context.name if isinstance(context, ZoneContext) else None
    if zone is None:
        kstats = [derived(kstat, wants, context) for kstat in kstats]
    shapes: list[Shape] = []
    values: list[Any] = []
    for _, shape, _, raw, _ in kstats:
        shapes.append(shape)
        values += shape.unpack(raw)
    plan = plan_of(wants, tuple(shapes))
    for name, index in plan.wrong:
        raise CollectError(f"{name}: {kstats[index].ref}: has the wrong type {shapes[index].type}")
    dropped: set[int] = set()
    if zone is not None:
        if plan.names is None or plan.names(values) != (zone + b"\0",) * len(plan.named):
            dropped.update([index for index in plan.named if not is_of_zone(kstats[index], zone)])
    for index, places in plan.idle:
        if not any([values[place] for place in places]):
            dropped.add(index)
    for labels_of, indices in plan.labelled:
        labels = iter(labels_of([kstats[index] for index in indices if index not in dropped],
                                context))
        used: set[str] = set()
        for index in indices:
            text_ = ""
            if index not in dropped:
                text_ = _kstat_labels(next(labels))
                if text_ in used:           # of duplicate labels the first is used
                    dropped.add(index)
                used.add(text_)
            values.append(text_)
    made = [convert(values[place]) for place, convert in plan.converts]
    form, order = planned_form(plan, frozenset(dropped), tuple(map(_is_none, made)))
    values += made
    return Came(form, joined(order(values)), {})


def derived(kstat: Kstat, wants: Wants, context: Context) -> Kstat:
    """The kstat with the values that a table makes of its members, if it does and there are some:
    of a wrong type there are none."""
    for table in kstat.ref.tables:
        if table.values is not None and kstat.shape.places \
                and any([table in tables for _, tables in wants]):
            return pack(kstat.ref, kstat.snaptime, table.values(kstat, context))
    return kstat


def _bug(collector: str, error: Exception) -> CollectError:
    log.exception("collector %s failed", collector)
    return CollectError(f"internal error: {type(error).__name__}")


def each_from_kstats(wants: Wants, reading: Reading, context: Context) -> Came:
    """As `from_kstats`, but what one collector cannot send costs that collector alone."""
    try:
        return from_kstats(wants, reading, context)
    except Exception as error:
        if len(wants) == 1:
            [(name, _)] = wants
            return Came(NO_FORM, "", {
                name: error if isinstance(error, CollectError) else _bug(name, error)})
    each_came = [each_from_kstats((want,), reading, context) for want in wants]
    good = [came for came in each_came if not came.failed]
    return Came(form_of(tuple([came.form.names[0] for came in good]),
                        tuple([came.form.templates[0] for came in good])),
                BETWEEN.join([came.values for came in good if came.form.templates[0]]),
                {name: error for came in each_came for name, error in came.failed.items()})


def kstat_part(reading: Reading, *tables: Table) -> Part:
    """What the node's page says of these kstats; raises CollectError."""
    came = from_kstats(((tables[0].collector, tables),), reading)
    return Part(came.form.templates[0], came.values)

# -- the endpoint explains itself: what /v1/metadata and docs/METRICS.md say

QUIRKS: Mapping[str, str] = {
    "time_of_day": "milliseconds, and a counter, as in the original",
    "cpu_user_usage": "nanoseconds, as in the original",
    "cpu_sys_usage": "nanoseconds, as in the original",
    "cpu_wait_time": "nanoseconds, as in the original",
    "vfs_run_length_time_count": "the original reads wlentime here by mistake",
    "mem_limit": "no sample for a zone without a cap",
    "mem_swap_limit": "no sample for a zone without a cap",
    "tcp_current_established_connections_total": "a gauge despite its name",
    "tcp_retransmitted_segment_count": "the kernel counts with 32 bits: it starts again at 0",
    "arcstats_hdr_size_bytes": "typed counter as in the original, and is a gauge",
    "arcstats_l2_read_bytes": "typed gauge as in the original, and is a counter",
    "cpu_info_model": "a model number, of one CPU",
    "collector_time_seconds": "buckets without _bucket, as in the original",
    "collector_time_total_seconds": "buckets without _bucket, as in the original",
    "vfs_slow_operations_total": "an operation of 2 s counts in 10ms, 100ms and 1s",
    "ntp_syspeer_headway_seconds": "the original divides the seconds by 1000000",
    **dict.fromkeys((
        "ntp_syspeer_offset_seconds", "ntp_syspeer_xleave_seconds", "ntp_estimated_error_seconds",
        "ntp_maximum_error_seconds", "ntp_pll_offset_seconds", "ntp_precision",
        "ntp_broadcast_delay_seconds"), "the original's value is 1000 times too small"),
    **{row.name: quirk for row in NTP_PEER + NTP_SYSTEM_PEER + NTP for unit, quirk in (
        (KIB, "the original divides KiB by 1024"),
        (STAMP, "seconds since 1900; the original joins the fraction wrongly"),
        (WORD_MS, "milliseconds despite the name")) if row.unit is unit},
}


def _own(name: str, unit: Unit, help_text: str, *label_names: str) -> Metric:
    return _made(GAUGE, name, unit, help_text, "agent", *label_names)


META = (                        # of every collector, plugins included
    _own("{}_metrics_available_boolean", FLAG, "Whether the collector has values (1) or not (0)."),
    _own("{}_metrics_cached_boolean", FLAG,
         "Whether the values came from the cache (1) or not (0)."),
    _own("{}_metrics_timer_seconds", SECONDS, "Duration of the collection in seconds."),
)
META_NAMES = tuple(metric.name.format("") for metric in META)
SAMPLE_AGE = _own("cmon_sample_age_seconds", SECONDS, "Age of the collector's values in seconds.",
                  "collector")
COLLECTOR_UP = _own("cmon_collector_up", FLAG, "Whether the collector succeeded (1) or failed (0).",
                    "collector")


# The last lines of the original's node page, which its dashboards query: about the agent itself.
TIMES = "Duration of the collection in seconds."
OWN_NODE = (
    _made(HISTOGRAM, "collector_time_seconds", SECONDS, TIMES, "agent", "service", "collector",
          "le"),
    _made(HISTOGRAM, "collector_time_total_seconds", SECONDS,
          "Time from a scrape to its answer in seconds.", "agent", "service", "le"),
    _made(GAUGE, "cached_items", COUNT,
          "Number of collector results in the cache.", "agent", "service"),
    _made(COUNTER, "cache_gets_total", COUNT, "Number of pages requested.", "agent", "service"),
    _made(COUNTER, "cache_get_hits_total", COUNT, "Number of pages served from the cache.", "agent",
          "service"),
)


def _use_cells() -> dict[tuple[str, str], str]:
    cells: dict[tuple[str, str], str] = {}
    for use in USE:
        for column in ("utilisation", "saturation", "errors"):
            for name in getattr(use, column):
                cells.setdefault((use.scope, name), f"{use.resource}: {column}")
    return cells


def metadata() -> list[dict[str, Any]]:
    """A row for each metric of the pages, for /v1/metadata and the documents."""
    cells = _use_cells()
    rows: list[dict[str, Any]] = []

    def add(scope: str, metric: Metric, collector: Collector | None = None,
            table: Table | None = None) -> None:
        of_agent = metric.source == "agent"
        name = metric.name.format(collector.name if collector else "")
        rows.append({
            "name": name, "collector": collector.name if collector else "", "scope": scope,
            "type": metric.kind, "unit": metric.unit.name, "help": metric.help,
            "source": source_of(metric, table),
            "lifetime": 0.0 if collector is None or of_agent else collector.lifetime,
            "labels": [*(table.label_names if table else metric.label_names),
                       *(label for label, _ in metric.labels)], "use": cells.get((scope, name), ""),
            "quirk": QUIRKS.get(name, "")})
    for scope, collectors in (("zone", ZONE_COLLECTORS), ("node", NODE_COLLECTORS)):
        for collector in collectors:
            listed = [(row, table) for table in collector.tables for row in table.metrics]
            known: set[str] = set()
            for metric, table in [*listed, *((row, None) for row in collector.metrics)]:
                if metric.name not in known:
                    known.add(metric.name)
                    add(scope, metric, collector, table)
            for metric in META:
                add(scope, metric, collector)
        for metric in (*(OWN_NODE if scope == "node" else ()), COLLECTOR_UP, SAMPLE_AGE):
            add(scope, metric)
    return rows


# Members that only grow: in a replay they keep growing when it starts over.
COUNTER_MEMBERS: frozenset[tuple[str, str]] = frozenset(
    (table.module, row.member) for table in ZONE_TABLES + NODE_TABLES for row in table.metrics
    if row.kind == COUNTER and row.member != "hdr_size") | frozenset(
    ("unix", member) for member in VMINFO_MEMBERS) | {("zfs", "l2_read_bytes")}

# --- USE [kit] ------------------------------------------------------------------------------------

class Use(NamedTuple):
    """What to look at first for a resource: utilisation, saturation and errors."""
    scope: str
    resource: str
    utilisation: tuple[str, ...]
    saturation: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    share: tuple[str, ...] = ()             # what is used, and of how much; counters a second;
    #                                         a single counter of seconds: of its number of samples
    left: bool = False                      # the share is what is left, not what is used


USE = (                         # https://www.brendangregg.com/usemethod.html
    Use("zone", "CPU", ("cpu_user_usage", "cpu_sys_usage", "cpucap_cur_usage_percentage"),
        ("cpu_wait_time", "cpucap_waiting_threads_count", "load_average"),
        share=("cpucap_cur_usage_percentage", "cpucap_limit_percentage")),
    Use("zone", "virtual CPUs", ("vcpu_seconds_total",)),
    Use("zone", "memory", ("mem_agg_usage", "mem_limit"),
        ("mem_over_limit_total", "mem_anon_pages_in_total", "mem_fault_throttle_seconds_total"),
        ("mem_anon_alloc_fail",), ("mem_agg_usage", "mem_limit")),
    Use("zone", "swap", ("mem_swap", "mem_swap_limit"), ("mem_swap_reserved_bytes",),
        share=("mem_swap", "mem_swap_limit")),
    Use("zone", "locked memory", ("mem_locked_bytes", "mem_locked_limit_bytes"),
        share=("mem_locked_bytes", "mem_locked_limit_bytes")),
    Use("zone", "network", ("net_agg_bytes_in", "net_agg_bytes_out", "net_speed_bytes_per_second"),
        ("net_drops_in_total", "net_drops_out_total"),
        ("net_errors_in_total", "net_errors_out_total", "net_link_up"),
        ("net_agg_bytes_out", "net_speed_bytes_per_second")),
    Use("zone", "TCP", ("tcp_segments_in_total", "tcp_segments_out_total"),
        ("tcp_listen_drop_count", "tcp_listen_drop_Qzero_count"),
        ("tcp_retransmitted_segment_count", "tcp_failed_connection_attempt_count",
         "tcp_errors_in_total")),
    Use("zone", "files", ("vfs_run_time_count", "vfs_bytes_read_count", "vfs_bytes_written_count"),
        ("vfs_wait_length_time_count", "vfs_slow_operations_total", "vfs_delay_seconds_total")),
    Use("zone", "disk space", ("zfs_used", "zfs_available", "zfs_quota"),
        share=("zfs_available", "zfs_quota"), left=True),
    Use("zone", "processes", ("proc_processes", "proc_processes_limit"), (),
        ("proc_fork_failures_total", "proc_map_failures_total"),
        ("proc_processes", "proc_processes_limit")),
    Use("node", "CPU", ("cpu_idle_seconds_total", "cpu_kernel_seconds_total",
                        "cpu_user_seconds_total"), ("load_average",), ("cpu_info_cpus",),
        ("cpu_idle_seconds_total",), left=True),
    Use("node", "memory", ("memory_free_bytes", "memory_total_bytes"),
        ("memory_scanned_pages", "memory_low_scans_total", "memory_throttles_total")),
    Use("node", "swap", ("swap_available_bytes", "swap_reserved_bytes")),
    Use("node", "disks", ("disk_busy_seconds_total",),
        ("disk_wait_length_seconds_total", "disk_waiting_operations"), ("zpool_health_status",),
        ("disk_busy_seconds_total",)),
    Use("node", "disk space", ("zpool_allocated_bytes", "zpool_size_bytes"),
        ("zpool_fragmentation_percent",), share=("zpool_allocated_bytes", "zpool_size_bytes")),
    Use("node", "network", ("link_bytes_in_total", "link_bytes_out_total",
                            "link_speed_bytes_per_second"),
        ("link_drops_in_total", "link_drops_out_total"),
        ("link_errors_in_total", "link_errors_out_total", "link_up"),
        ("link_bytes_out_total", "link_speed_bytes_per_second")),
    Use("node", "what is sold", ("alloc_cpu_caps_cpus", "alloc_cpus", "alloc_memory_caps_bytes",
                                 "alloc_memory_bytes"), ("alloc_uncapped_zones",)),
    Use("node", "clock", ("ntp_pll_offset_seconds",), (), ("ntp_leap_indicator_status",
                                                           "ntp_peer_last8_polls_failure_count")),
)
USE_BUSY, USE_FULL = 0.8, 0.95      # shares above which a resource is busy or full
# The value from which a metric of saturation or errors is trouble; counters per second. Those that
# are not listed: any value above 0. Infinity: depends on the size of the zone, so it is not judged.
USE_FROM = {
    "cpu_wait_time": 2e8, "load_average": math.inf, "cpu_info_cpus": math.inf,
    "net_drops_in_total": 1, "net_drops_out_total": 1, "tcp_listen_drop_count": 1,
    "tcp_listen_drop_Qzero_count": 1, "mem_anon_pages_in_total": 10,
    "mem_fault_throttle_seconds_total": 0.01, "mem_swap_reserved_bytes": math.inf,
    "tcp_retransmitted_segment_count": 20, "tcp_failed_connection_attempt_count": 1,
    "vfs_wait_length_time_count": 1e9, "vfs_slow_operations_total": 10,
    "vfs_delay_seconds_total": 0.01, "disk_wait_length_seconds_total": 4,
    "disk_waiting_operations": 16, "zpool_fragmentation_percent": 70,
    "ntp_leap_indicator_status": 3, "ntp_peer_last8_polls_failure_count": math.inf,
    "memory_scanned_pages": 100, "alloc_uncapped_zones": math.inf,
}
USE_UP = ("net_link_up", "link_up")         # trouble where these are 0

# --- exposition [kit] -----------------------------------------------------------------------------

# https://prometheus.io/docs/instrumenting/exposition_formats/ (text 0.0.4)
METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
KINDS = frozenset((COUNTER, GAUGE, HISTOGRAM, SUMMARY, UNTYPED))
SUFFIXES = {HISTOGRAM: ("_bucket", "_sum", "_count"), SUMMARY: ("_sum", "_count")}
_VALUE = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?)")
_SPECIAL = {"nan": math.nan, "inf": math.inf, "+inf": math.inf, "-inf": -math.inf}

_MAX_DIGITS = 400               # longer numbers are refused: int() of a huge text takes seconds


class ExpositionError(ValueError):
    """Text or families that break the exposition format; the producer is at fault."""


def valid_metric_name(name: str) -> bool:
    """Whether Prometheus accepts this as a metric name."""
    return METRIC_NAME.fullmatch(name) is not None


def valid_label_name(name: str) -> bool:
    """Whether Prometheus accepts this as a label name (`__…` is reserved)."""
    return LABEL_NAME.fullmatch(name) is not None and not name.startswith("__")


def escape_label(value: str) -> str:
    """A label value as written between quotes."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def number(value: Number) -> str:
    """A value as text: an integer exactly, a float by its shortest form that reads back equal."""
    if type(value) is int:
        return str(value)
    if isinstance(value, int):
        return str(int(value))          # a truth value
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


@functools.lru_cache(maxsize=4096)      # all our tables, and some plugins'
def _head(name: str, kind: str, help_text: str) -> str:
    """The lines HELP and TYPE."""
    if not valid_metric_name(name) or kind not in KINDS:
        raise ExpositionError(f"family {name!r} of type {kind!r} is not valid")
    escaped = help_text.replace("\\", "\\\\").replace("\n", "\\n")
    return f"# HELP {name} {escaped}\n# TYPE {name} {kind}\n"


def render(families: Iterable[Family]) -> str:
    """Families as a page, in their order; families without samples are left out."""
    return "".join([_head(name, kind, help_text) + "".join(
        [f"{name}{suffix}{label_text(labels)} {number(value)}\n"
         for labels, value, suffix in samples])
        for name, kind, help_text, samples in families if samples])


def _value(token: str) -> Number:
    if len(token) > _MAX_DIGITS or not token.isascii():
        raise ExpositionError(f"{token[:40]!r} is not a number")
    if token.isdigit() or (token[:1] in ("-", "+") and token[1:].isdigit()):
        return int(token)
    if token.lower() in _SPECIAL:
        return _SPECIAL[token.lower()]
    if not _VALUE.fullmatch(token):
        raise ExpositionError(f"{token[:40]!r} is not a number")
    return float(token)


_LABEL = re.compile(r'[ \t]*([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*"((?:[^"\\\n]|\\[\\"n])*)"[ \t]*')
_UNESCAPE = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}


def _unescape(value: str) -> str:
    if "\\" not in value:
        return value
    return re.sub(r'\\[\\"n]', lambda match: _UNESCAPE[match.group()], value)


def _labels(line: str, start: int) -> tuple[Labels, int]:
    """The labels that begin after the brace before `start`; also where the value begins."""
    labels: list[tuple[str, str]] = []
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
        raise ExpositionError("duplicate label")
    return tuple(labels), len(line) - len(rest) + 1


def _sample(line: str) -> tuple[str, Sample]:
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
        raise ExpositionError(f"no space after the name in {line[:40]!r}")
    tokens = line[position:].replace("\t", " ").split(" ")
    tokens = [token for token in tokens if token]
    if not 1 <= len(tokens) <= 2:
        raise ExpositionError(f"{match.group()!r} must have one value and at most a timestamp")
    if len(tokens) == 2 and not isinstance(_value(tokens[1]), int):
        raise ExpositionError(f"the timestamp {tokens[1][:40]!r} is not an integer")
    return match.group(), Sample(labels, _value(tokens[0]))


def family_name(name: str, kinds: Mapping[str, str]) -> tuple[str, str]:
    """The family of a sample by the types of families, and its suffix there."""
    if name not in kinds:
        for kind, suffixes in SUFFIXES.items():
            for suffix in suffixes:
                base = name[:-len(suffix)]
                if name.endswith(suffix) and kinds.get(base) == kind:
                    return base, suffix
    return name, ""


class _Parser:
    """Lines in, families out; a line either changes the state as a whole or raises."""

    def __init__(self, max_samples: int) -> None:
        self.kinds: dict[str, str] = {}
        self.helps: dict[str, str] = {}
        self.samples: dict[str, list[Sample]] = {}      # in order of first appearance
        self.seen: set[tuple[str, str, Labels]] = set()
        self.max_samples = max_samples

    def read(self, page: str) -> Iterator[str]:
        """Read all lines; the bad ones are described and left out."""
        for index, line in enumerate(page.split("\n"), 1):
            try:
                if line.startswith("#"):
                    self._comment(line)
                elif line.strip(" \t\r"):
                    self._add(*_sample(line.rstrip("\r")))
            except ExpositionError as error:
                yield f"line {index}: {error}"

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
            raise ExpositionError(f"second TYPE of {name}, or TYPE after its samples")
        self.kinds[name] = kind

    def _add(self, name: str, sample: Sample) -> None:
        family, suffix = family_name(name, self.kinds)
        key = (family, suffix, tuple(sorted(sample.labels)))
        if key in self.seen:
            raise ExpositionError(f"{name} has the same labels twice")
        if len(self.seen) >= self.max_samples:
            raise ExpositionError(f"more than {self.max_samples} samples")
        self.seen.add(key)
        self.samples.setdefault(family, []).append(sample._replace(suffix=suffix))

    def families(self) -> list[Family]:
        return [Family(name, self.kinds.get(name, UNTYPED), self.helps.get(name, ""), samples)
                for name, samples in self.samples.items()]


def parse(page: str, *, max_samples: int = 100_000) -> list[Family]:
    """Parse a page into families; raises ExpositionError naming the first bad line."""
    if page and not page.endswith("\n"):
        raise ExpositionError("the last line has no newline: the page is truncated")
    parser = _Parser(max_samples)
    for problem in parser.read(page):
        raise ExpositionError(problem)
    return parser.families()


def parse_lines(page: str, *, max_samples: int = 10_000) -> tuple[list[Family], list[str]]:
    """Parse what is valid of a page; a bad line is reported in the second list."""
    parser = _Parser(max_samples)
    problems = list(parser.read(page))
    return parser.families(), problems


def merge(families: Iterable[Family]) -> tuple[list[Family], list[str]]:
    """Merge families of the same name, in order of first appearance. Duplicate series, conflicting
    types and names that clash with a histogram's are dropped and reported."""
    merged: dict[str, Family] = {}
    seen: dict[str, set[tuple[str, Labels]]] = {}
    taken: dict[str, str] = {}              # each name that begins a line -> its family
    problems: list[str] = []
    for family in families:
        present = merged.get(family.name)
        names = [family.name + suffix for suffix in ("", *SUFFIXES.get(family.kind, ()))]
        clash = next((name for name in names if taken.get(name, family.name) != family.name), None)
        if clash is not None:
            problems.append(f"{family.name}: {clash} belongs to {taken[clash]}")
            continue
        if present is not None and present.kind != family.kind:
            problems.append(f"{family.name}: {family.kind}, but it is already a {present.kind}")
            continue
        known = seen.setdefault(family.name, set())
        fresh: list[Sample] = []
        for sample in family.samples:
            key = (sample.suffix, tuple(sorted(sample.labels)))
            if key in known:
                problems.append(f"{family.name}{label_text(sample.labels)}: appears more than once")
            else:
                known.add(key)
                fresh.append(sample)
        taken.update(dict.fromkeys(names, family.name))
        merged[family.name] = family._replace(samples=fresh) if present is None else \
            present._replace(samples=[*present.samples, *fresh])
    return list(merged.values()), problems

# --- own metrics [kit] ----------------------------------------------------------------------------

class Counter:
    """A family of counters, one for each combination of label values."""

    def __init__(self, name: str, help_text: str, label_names: Sequence[str]) -> None:
        self.name, self.help, self.label_names = name, help_text, label_names
        self._values: dict[tuple[str, ...], Number] = {} if label_names else {(): 0}
        self._lock = threading.Lock()       # _values: any thread adds, the scrape copies

    def add(self, amount: Number = 1, *label_values: str) -> None:
        """Add `amount`."""
        with self._lock:
            self._values[label_values] = self._values.get(label_values, 0) + amount

    def family(self) -> Family:
        """The family for a scrape."""
        with self._lock:
            values = list(self._values.items())
        return Family(self.name, COUNTER, self.help, [
            Sample(tuple(zip(self.label_names, labels)), value) for labels, value in values])


class Histogram:
    """Counts of observations by upper bound, with their sum; one series per label combination.
    Belongs to one thread."""

    def __init__(self, name: str, help_text: str, bounds: Sequence[float],
                 label_names: Sequence[str]) -> None:
        self.name, self.help, self.bounds, self.label_names = name, help_text, bounds, label_names
        self._series: dict[tuple[str, ...], list[Number]] = {}

    def series(self, *label_values: str) -> list[Number]:
        """The counts for each bound and +Inf, and the sum."""
        return self._series.setdefault(label_values, [0] * (len(self.bounds) + 1) + [0.0])

    def observe(self, value: float, *label_values: str) -> None:
        """Count one observation."""
        series = self._series.get(label_values) or self.series(*label_values)
        series[bisect.bisect_left(self.bounds, value)] += 1
        series[-1] += value

    def family(self) -> Family:
        """The family for a scrape: cumulative buckets, sum and count."""
        samples: list[Sample] = []
        for values, series in self._series.items():
            labels = tuple(zip(self.label_names, values))
            total = 0
            for bound, count in zip([*map(number, self.bounds), "+Inf"], series):
                total += int(count)
                samples.append(Sample(labels + (("le", bound),), total, "_bucket"))
            samples.append(Sample(labels, series[-1], "_sum"))
            samples.append(Sample(labels, total, "_count"))
        return Family(self.name, HISTOGRAM, self.help, samples)


class Registry:
    """A program's own metrics, in order of registration."""

    def __init__(self) -> None:
        self._sources: list[Callable[[], Iterable[Family]]] = []
        self.caches: list[Cache[Any, Any]] = [STRINGS]      # shown with the process

    def counter(self, name: str, help_text: str, *label_names: str) -> Counter:
        """A new counter; its name ends in `_total`."""
        made = Counter(name, help_text, label_names)
        self.collect(lambda: (made.family(),))
        return made

    def collect(self, function: Callable[[], Iterable[Family]]) -> None:
        """Add a function that returns families at each scrape."""
        self._sources.append(function)

    def families(self) -> list[Family]:
        """All families with their current values."""
        return [family for source in self._sources for family in source()]




def _resident_bytes() -> int | None:
    """Resident memory from /proc: illumos has psinfo, Linux statm; None elsewhere."""
    try:
        if sys.platform == "linux":
            with open("/proc/self/statm", "rb") as statm:       # pages: size resident …
                return int(statm.read().split()[1]) * resource.getpagesize()
        with open("/proc/self/psinfo", "rb") as psinfo:
            # psinfo_t, LP64, <sys/procfs.h>: pr_rssize (KiB) at 56
            return int(struct.unpack_from("=q", psinfo.read(64), 56)[0]) * 1024
    except (OSError, ValueError, IndexError, struct.error):
        return None


def _open_descriptors() -> int | None:
    for folder in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return max(len(os.listdir(folder)) - 1, 0)          # less the one that lists
    return None


def cpu_seconds() -> float:
    """CPU time of this process and of its finished children, user and system."""
    this, children = (resource.getrusage(who)
                     for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return this.ru_utime + this.ru_stime + children.ru_utime + children.ru_stime


def register_process_metrics(registry: Registry, program: str) -> None:
    """The usual `process_…` families and `cmon_<program>_build_info`."""
    started = time.time()

    def families() -> list[Family]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        version = "%d.%d.%d" % sys.version_info[:3]
        return [
            Family(f"cmon_{program}_build_info", GAUGE, "Version of the program and of Python.",
                   [Sample((("version", __version__), ("python", version),
                            ("openssl", ssl.OPENSSL_VERSION)), 1)]),
            single("process_cpu_seconds_total", COUNTER, "Total user and system CPU time spent in "
                   "seconds, without child processes.", usage.ru_utime + usage.ru_stime),
            single("process_start_time_seconds", GAUGE, "Start time of the process since unix "
                   "epoch in seconds.", started),
            single("process_resident_memory_bytes", GAUGE, "Resident memory size in bytes.",
                   _resident_bytes()),
            single("process_open_fds", GAUGE, "Number of open file descriptors.",
                   _open_descriptors()),
            single("process_max_fds", GAUGE, "Maximum number of open file descriptors.",
                   resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
            single("process_threads", GAUGE, "Number of threads of the process.",
                   threading.active_count()),
            *(Family(f"cmon_{program}_cache_{name}", kind, help_text, [
                Sample((("cache", cache.name),), getattr(cache, value))
                for cache in registry.caches]) for name, kind, help_text, value in (
                    ("bytes", GAUGE, "Size of a cache in bytes.", "bytes"),
                    ("limit_bytes", GAUGE, "Maximum size of a cache in bytes.", "limit"),
                    ("evictions_total", COUNTER, "Total number of entries evicted to make "
                     "room.", "evicted"))),
        ]
    registry.collect(families)

# --- cache and throttle [kit] ---------------------------------------------------------------------

K = TypeVar("K")
V = TypeVar("V")


class Cache(Generic[K, V]):
    """A dictionary bounded in bytes; the oldest entries are evicted first.

    `size_of` returns the bytes of an entry, with its key and all derived forms; ENTRY is added for
    the dictionary itself. A value above the limit is not kept. Not locked: one thread owns it.
    """
    ENTRY = 300             # bytes: a slot, a hash, the size and the objects' heads

    def __init__(self, name: str, limit: int, size_of: Callable[[K, V], int]) -> None:
        self.name, self.limit = name, limit
        self.bytes = 0
        self.evicted = 0
        self._size_of = size_of
        self._entries: dict[K, V] = {}
        self._sizes: dict[K, int] = {}
        # dict.get itself: lookups are on the path of each request
        self.get: Callable[[K], V | None] = self._entries.get

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)

    def put(self, key: K, value: V) -> None:
        """Store a value, replacing the old one; evicts the oldest entries to make room."""
        self.drop(key)
        size = self._size_of(key, value) + self.ENTRY
        if size > self.limit:
            self.evicted += 1
            return
        while self.bytes + size > self.limit:
            self.drop(next(iter(self._entries)))
            self.evicted += 1
        self._entries[key], self._sizes[key] = value, size
        self.bytes += size

    def drop(self, key: K) -> None:
        """Remove an entry, if present."""
        size = self._sizes.pop(key, None)
        if size is not None:
            del self._entries[key]
            self.bytes -= size

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()
        self._sizes.clear()
        self.bytes = 0


STRINGS: Cache[str, str] = Cache("strings", 8 << 20, lambda value, _: len(value))
_strings_lock = threading.Lock()            # STRINGS: any thread adds


def reused(value: str) -> str:
    """An equal string that is in use already, if one is known: what comes from outside repeats
    itself. Not sys.intern(): Python 3.12 never frees what it interns."""
    known = STRINGS.get(value)
    if known is None:
        with _strings_lock:
            STRINGS.put(value, value)
    return known or value


class Backoff:
    """Pauses between attempts: `first` seconds, then doubled each time, up to `longest`.

    Each varies by the fraction `jitter`, so that what failed together does not return together.
    """

    def __init__(self, first: float, longest: float,
                 random_source: Callable[[], float] = random.random, jitter: float = 0.25) -> None:
        self._first, self._longest = first, longest
        self._random, self._jitter = random_source, jitter
        self._pause = first

    def next(self) -> float:
        """Seconds to wait before the next attempt."""
        pause, self._pause = self._pause, min(self._pause * 2, self._longest)
        return pause * (1 + self._jitter * (2 * self._random() - 1))

    def reset(self) -> None:
        """The attempt succeeded."""
        self._pause = self._first


class Breaker:
    """Stops work that keeps failing, and retries it.

    After `failures` in a row it opens for `first` seconds, then allows one try; each failed try
    doubles the time, up to `longest`. Times vary by a tenth, so that breakers that opened together
    do not retry together. Not locked: its owner is one thread or holds a lock.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic,
                 random: Callable[[], float] = random.random,
                 failures: int = 3, first: float = 30.0, longest: float = 480.0) -> None:
        self._now = now
        self._failures, self._first = failures, first
        self._backoff = Backoff(first, longest, random, 0.1)
        self._count = 0
        self._until = 0.0
        self.open = False
        self.reason = ""

    def allows(self) -> bool:
        """Whether to try now; while open, only one caller is allowed at the end of each wait."""
        if not self.open:
            return True
        if self._now() < self._until:
            return False
        self._until = self._now() + self._first     # one try at a time
        return True

    def succeeded(self) -> None:
        """The work succeeded: close the breaker."""
        self._count, self.open, self.reason = 0, False, ""
        self._backoff.reset()

    def failed(self, reason: str) -> None:
        """The work failed; `reason` is shown to users."""
        self._count += 1
        self.reason = reason
        if self.open or self._count >= self._failures:
            self.open = True
            self._until = self._now() + self._backoff.next()

    @property
    def retry_seconds(self) -> float:
        """Seconds until the next attempt; 0 when closed."""
        return max(self._until - self._now(), 0.0) if self.open else 0.0


class Pool:
    """A bounded number of threads, started on demand, with a bounded queue."""

    def __init__(self, name: str, size: int, limit: int = 1024) -> None:
        self.name, self.size = name, size
        self._jobs: queue.SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]] | None] = \
            queue.SimpleQueue()
        self._limit = limit
        self._lock = threading.Lock()       # the three counts below
        self.threads = 0
        self.idle = 0
        self.waiting = 0

    def submit(self, function: Callable[..., object], *args: Any) -> bool:
        """Call it in a thread; False when the queue is full."""
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
            except RuntimeError:            # no more threads: the existing ones do the work
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
                elif self.threads > self.size:
                    self.threads -= 1
                    return
            if job is None:
                continue
            function, args = job
            try:
                function(*args)
            except Exception:               # jobs handle their own errors; this is a bug
                log.exception("job %s failed", getattr(function, "__qualname__", function))

    def resize(self, size: int) -> None:
        """Change the number of threads. Surplus threads end at their next job."""
        with self._lock:
            self.size, excess = size, self.threads - size
        for _ in range(excess):
            self._jobs.put(None)

    def close(self) -> None:
        """Stop the threads once the queue is empty."""
        self.resize(0)

# --- HTTP [kit] -----------------------------------------------------------------------------------

READ_SIZE = 16384       # one TLS record: nothing is left inside OpenSSL, where no selector sees it
ACCEPTS = 64            # connections accepted in a row before others are served
HEADS_BYTES = 8 << 20   # of parsed request heads kept by a listener
BACKLOG = 1024          # socketserver's 5 costs a second when many connect at once
PACK_FROM = 512         # bytes; smaller bodies are not compressed
TICK_SECONDS = 0.05     # precision of the deadlines of parked answers
DURATIONS = (0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)


@dataclass(frozen=True)
class Limits:
    """Limits per client or for all clients; refusals are counted by the limit's name."""
    connections: int = 16_384       # fewer if descriptors are scarce; see `_make_room`
    head_bytes: int = 16_384        # request line and headers
    header_count: int = 100
    body_bytes: int = 65_536
    head_seconds: float = 10.0      # from a request's first byte to its last
    idle_seconds: float = 360.0     # longer than the 300 s for which Prometheus keeps connections
    write_seconds: float = 30.0     # for a client to read its answer
    unsent_bytes: int = 128 << 20   # of all answers that clients have not read yet
    empty_reads: int = 100          # in a row: TLS records without data cost the peer nothing
    workers: int = 8                # threads for handlers that may block
    grace_seconds: float = 10.0     # at shutdown, for requests in flight


_LINE = re.compile(rb"([A-Z]{1,20}) ([!-~]+) HTTP/([0-9])\.([0-9])\r\n")
# blanks before a value are matched in one place only: two would take quadratic time
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*(?:([!-~\x80-\xff](?:[\t -~\x80-\xff]*"
                     rb"[!-~\x80-\xff])?)[ \t]*)?\r\n")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._~-]*)(?::[0-9]{0,5})?")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_NO_GZIP = re.compile(r"\s*q\s*=\s*0(\.0*)?\s*")
_LENGTH = re.compile(r"[0-9]{1,18}")


def _header_fields(head: bytes, start: int, count: int) -> dict[str, str]:
    """The header lines of a head as a dictionary; raises Refused."""
    headers: dict[str, str] = {}
    position = start
    end = len(head) - 2                     # the empty line
    while position < end:
        match = _HEADER.match(head, position)
        if match is None:
            line = head[position:position + 60].split(b"\r\n")[0]
            raise Refused(400, f"bad request: {line!r} is not a header line")
        position = match.end()
        # the heads that are kept differ little
        name = reused(match.group(1).decode("ascii").lower())
        value = reused((match.group(2) or b"").decode("latin-1"))
        if name in headers:
            if name in ("host", "content-length", "transfer-encoding"):
                raise Refused(400, f"bad request: more than one {name} header")
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
            return not _NO_GZIP.fullmatch(parameter)
    return False


def parse_head(head: bytes, limits: Limits) -> tuple[Any, ...]:
    """The fields of a Request except its peer, from a head that ends with an empty line.

    A pure function of the bytes, strict on purpose (RFC 9112): what two parsers could read in two
    ways is refused. Raises Refused.
    """
    line = _LINE.match(head)
    if line is None:
        raise Refused(400, "bad request: the first line is not 'METHOD target HTTP/1.1'")
    if line.group(3) != b"1" or line.group(4) not in (b"0", b"1"):
        raise Refused(505, "only HTTP/1.1 and HTTP/1.0 are supported")
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
        raise Refused(400, "bad request: a parameter is given more than once")
    connection = [option.strip() for option in headers.get("connection", "").lower().split(",")]
    keep = "close" not in connection and (line.group(4) == b"1" or "keep-alive" in connection)
    return (line.group(1).decode("ascii"), target, path, query, headers, b"",
            named.group(1).lower(), _takes_gzip(headers.get("accept-encoding", "")), keep)


def _body_length(headers: Mapping[str, str], limits: Limits) -> int:
    length = headers.get("content-length")
    if "transfer-encoding" in headers:
        if length is not None:
            raise Refused(400, "bad request: both Content-Length and Transfer-Encoding")
        raise Refused(411, "a request body needs a Content-Length")
    if length is None:
        return 0
    if not _LENGTH.fullmatch(length):
        raise Refused(400, "bad request: Content-Length is not a number")
    if int(length) > limits.body_bytes:
        raise Refused(413, f"the request body is larger than {limits.body_bytes} bytes")
    return int(length)


SHORTEST_TIMEOUT = 0.1      # seconds; nothing is done in less but begun in vain
_SECONDS = re.compile(r"(?=.{1,32}$)[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?")


def scrape_seconds(request: Request, default: float = 9.0) -> float:
    """The seconds that a scrape may take.

    Prometheus says how long it waits; a tenth of it, half a second at most, is for the way back.
    The proxy has taken that margin already. A tenth of a second is the least that is kept to.
    Raises Refused for a header that is no number.
    """
    header = request.headers.get("x-prometheus-scrape-timeout-seconds")
    if header is None:
        return default
    seconds = float(header) if _SECONDS.fullmatch(header) else math.nan
    if not 0 < seconds < math.inf:
        raise Refused(400, "X-Prometheus-Scrape-Timeout-Seconds is not a number of seconds above 0",
                      code="bad_timeout")
    seconds = min(max(seconds, SHORTEST_TIMEOUT), 3600.0)
    return seconds if "x-joyent-cmon-opts" in request.headers else \
        seconds - min(0.1 * seconds, 0.5)


_phrases = {status: entry[0] for status, entry in
            http.server.BaseHTTPRequestHandler.responses.items()}
@functools.lru_cache(maxsize=1)
def _date(second: int) -> str:
    return email.utils.formatdate(second, usegmt=True)


def http_date() -> str:
    """The time in the format of a Date header."""
    return _date(int(time.time()))


def gzip(body: bytes) -> bytes:
    """The body as a gzip stream (RFC 1952): level 2 takes a third of level 6's time and 10 % more
    bytes. With memLevel 8 zlib's tables are so large that malloc maps and unmaps them for each
    page, which takes longer than compressing it."""
    packer = zlib.compressobj(2, zlib.DEFLATED, 31, 7)
    return packer.compress(body) + packer.flush()


def _wire(response: Response, body: bytes, extra: str) -> bytes:
    more = "".join([f"{name}: {value}\r\n" for name, value in response.headers]) \
        if response.headers else ""
    return (f"HTTP/1.1 {response.status} {_phrases.get(response.status, 'Unknown')}\r\n"
            f"Date: {http_date()}\r\nContent-Type: {response.content_type}\r\n{more}{extra}"
            f"Content-Length: {len(body)}\r\n\r\n").encode("latin-1") + body


def _packs(response: Response) -> bool:
    return len(response.body) >= PACK_FROM and (not response.headers or "content-encoding" not in
                                                [name.lower() for name, _ in response.headers])


_VARIES = "Vary: Accept-Encoding\r\n"
_PACKED = _VARIES + "Content-Encoding: gzip\r\n"


def prepare(response: Response) -> Prepared:
    """An encoded answer that can be sent many times."""
    return Prepared(response.status, response=response)


def wire(answer: Answer, packed: bool = False, head_only: bool = False,
         close: bool = False) -> bytes:
    """An answer as bytes for the wire."""
    if isinstance(answer, Prepared):
        whole = answer.form(packed)
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
    """Counts of one route; used only in the loop."""
    __slots__ = ("statuses", "durations")

    def __init__(self, durations: list[Number]) -> None:
        self.statuses: dict[int, int] = {}
        self.durations = durations          # a series of a Histogram

    def count(self, status: int, seconds: float) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.durations[bisect.bisect_left(DURATIONS, seconds)] += 1
        self.durations[-1] += seconds


class _Head(NamedTuple):
    """A parsed and routed request head, kept by its bytes."""
    fields: tuple[Any, ...]         # of Request, but for its peer
    route: Route
    args: tuple[Any, ...]
    stats: _Stats
    simple: bool                    # GET on a connection that stays open: prepared bytes fit as is
    packed: bool


class Router:
    """Finds the route of a request."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._patterns = [(re.compile(re.sub(r"\\{\w+\\}", "([^/]+)", re.escape(route.pattern))),
                           route) for route in routes]
        paths = list(dict.fromkeys(route.pattern for route in routes))
        self._listed = ("/ lists what there is" if "/" in paths else
                        "there are " + ", ".join(paths))

    def find(self, request: Request) -> tuple[Route, tuple[str, ...]]:
        """Route and captured segments; raises Refused (404, 405). Pure."""
        method = "GET" if request.method == "HEAD" else request.method
        allowed: list[str] = []
        for pattern, route in self._patterns:
            match = pattern.fullmatch(request.path)
            if match is not None and route.method == method:
                return route, match.groups()
            if match is not None:
                allowed += ["GET", "HEAD"] if route.method == "GET" else [route.method]
        if allowed:
            shown = ", ".join(dict.fromkeys(allowed))
            raise Refused(405, f"{request.method} is not allowed for this path; allowed: {shown}",
                          ("Allow", shown), code="method_not_allowed")
        raise Refused(404, f"no such path; {self._listed}", code="no_such_path")


def call(route: Route, request: Request, args: Sequence[Any]) -> Answer | Deferred:
    """Call the handler; refusals and errors become answers."""
    try:
        return route.handler(request, *args)
    except Refused as refusal:
        log.debug("refused %s: %s %r: %d %s", request.peer.address, request.method,
                  request.target[:200], refusal.status, refusal)
        return refusal.answer()
    except Exception:
        log.exception("%s %r failed", request.method, request.target[:200])
        return text(500, "internal error; see the log", ("X-Cmon-Error", "internal"))





class Watcher(Protocol):
    """Anything that waits for a socket."""

    def ready(self, __mask: int) -> None:
        """The socket is readable or writable, according to the mask of events."""


class Loop:
    """One thread's sockets, timers, and calls from other threads.

    Everything but `call_soon`, `run_here` and `wake` belongs to the thread that runs it (before it
    runs: that made it). Errors are logged; `on_error` gets the object they belong to.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic,
                 on_error: Callable[[object], None] = lambda owner: None) -> None:
        self.now = now
        self._on_error = on_error
        self._selector = selectors.DefaultSelector()
        # any thread appends, the loop alone takes
        self._calls: collections.deque[tuple[Callable[..., object], tuple[Any, ...]]] = \
            collections.deque()
        self._timers: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._cancelled: set[int] = set()   # serial numbers of timers
        self._serial = 0
        self._thread = threading.get_ident()
        self._wake_read, self.waker = socket.socketpair()
        self._wake_read.setblocking(False)
        self.waker.setblocking(False)
        self._woken = False
        self.watch(self._wake_read, selectors.EVENT_READ, self)

    # turns

    def run(self, until: Callable[[], bool]) -> None:
        """Run until `until()` is true."""
        self.adopt()
        while not until():
            self.select()
            self.run_due()

    def adopt(self) -> None:
        """From now on the calling thread runs this loop."""
        self._thread = threading.get_ident()

    def select(self, latest: float = math.inf) -> None:
        """Wait for sockets, the next timer or the time `latest`; call what is ready."""
        while self._timers and self._timers[0][1] in self._cancelled:
            self._cancelled.remove(heapq.heappop(self._timers)[1])
        until = min(self._timers[0][0] if self._timers else math.inf, latest)
        wait = 0.0 if self._calls else max(0.0, until - self.now())
        ready = self._selector.select(None if wait == math.inf else wait)
        for key, mask in ready:
            try:
                key.data.ready(mask)
            except Exception:               # of one socket; the others continue
                log.exception("a connection failed")
                self._on_error(key.data)

    def run_due(self) -> None:
        """Run pending calls and due timers."""
        for _ in range(len(self._calls)):
            self.guarded(*self._calls.popleft())
        while self._timers and self._timers[0][0] <= self.now():
            _, serial, function, args = heapq.heappop(self._timers)
            if serial in self._cancelled:
                self._cancelled.remove(serial)
            else:
                self.guarded(function, args)

    def guarded(self, function: Callable[..., object], args: tuple[Any, ...] = ()) -> None:
        """Call it; errors are logged."""
        try:
            function(*args)
        except Exception:
            log.exception("%s failed", getattr(function, "__qualname__", function))
            self._on_error(getattr(function, "__self__", None))

    def close(self) -> None:
        """Close the selector."""
        self._selector.close()
        self._wake_read.close()
        self.waker.close()

    # calls and timers

    def call_soon(self, function: Callable[..., object], *args: Any) -> None:
        """From any thread: call it in the loop, soon and in order."""
        self._calls.append((function, args))
        if not self.is_here():
            self.wake()

    def run_here(self, function: Callable[..., object], *args: Any) -> None:
        """From any thread: call it in the loop, immediately if this thread runs the loop."""
        if self.is_here():
            function(*args)
        else:
            self.call_soon(function, *args)

    def is_here(self) -> bool:
        """Whether this thread runs the loop."""
        return threading.get_ident() == self._thread

    def call_later(self, seconds: float, function: Callable[..., object], *args: Any) -> int:
        """Call it after a delay, unless the returned timer is cancelled."""
        self._serial += 1
        heapq.heappush(self._timers, (self.now() + seconds, self._serial, function, args))
        return self._serial

    def cancel(self, timer: int) -> None:
        """Do not wake up for a timer that has not fired yet: waking a process that was asleep
        takes as long as answering from the cache."""
        self._cancelled.add(timer)

    def every(self, seconds: float, function: Callable[[], object]) -> None:
        """Call it repeatedly."""
        def again() -> None:
            self.call_later(seconds, again)
            function()
        self.call_later(seconds, again)

    def wake(self) -> None:
        """From any thread and from signal handlers: wake up the loop."""
        if not self._woken:
            self._woken = True
            try:
                self.waker.send(b"!")
            except OSError:
                pass                # full: it will wake; closed: nothing to wake

    def ready(self, _mask: int) -> None:
        """The loop was woken up."""
        try:
            self._wake_read.recv(4096)
        except _AGAIN:
            pass                    # another call has read it
        self._woken = False         # after the read, which may take the byte of a later wake;
        # calls queued until here without a byte run in this turn

    # sockets

    def watch(self, watched: socket.socket, events: int, owner: Watcher) -> None:
        """Call `owner.ready` whenever a non-blocking socket is ready; no events: as `unwatch`."""
        if not events:
            self.unwatch(watched)
            return
        try:
            self._selector.modify(watched, events, owner)
        except KeyError:
            self._selector.register(watched, events, owner)

    def unwatch(self, watched: socket.socket) -> None:
        """Stop watching, if the socket is watched."""
        try:
            self._selector.unregister(watched)
        except (KeyError, ValueError):
            pass


def _refusing(refusal: Refused) -> Handler:
    def refuse(_request: Request) -> Answer:
        raise refusal.with_traceback(None)
    return refuse


def _head_size(raw: bytes, head: _Head) -> int:
    # The fields hold the same text again, as str in a dictionary and in a list of arguments.
    return 3 * len(raw) + 300 * len(head.fields[4]) + 1000


class Listener:
    """A listening socket with its routes."""

    def __init__(self, server: Server, listening: socket.socket, router: Router, name: str
                 ) -> None:
        self.server, self.socket, self.name = server, listening, name
        self.router = router
        self.heads: Cache[bytes, _Head] = Cache(f"{name} request heads", HEADS_BYTES, _head_size)
        self.address: tuple[str, int] = listening.getsockname()[:2]

    def ready(self, _mask: int) -> None:
        """Called by the loop: accept connections."""
        self.server.accept_from(self)

    def head(self, raw: bytes, fields: tuple[Any, ...], peer: Peer) -> _Head:
        """Route a parsed head; kept if it has no body."""
        request = _make(Request, (*fields, peer))
        pattern = "none"
        args: tuple[Any, ...] = ()
        try:
            route, args = self.router.find(request)
            pattern = route.pattern
            args += route.options(request)
        except Refused as refusal:
            route, args = Route(request.method, pattern, _refusing(refusal)), ()
        stats = self.server.stats(route.pattern)
        head = _Head(fields, route, args, stats, request.method == "GET" and request.keep,
                      request.gzip)
        if "content-length" not in request.headers:
            self.heads.put(raw, head)
        return head


# States of a connection, and what leads from one to the next (HANDSHAKE is of TLS, which the proxy
# adds):
#
#     HANDSHAKE --done--> IDLE --bytes--> READING --whole head--> BUSY --answer--> WRITING
#                         ^ |                                     ^ |                |
#                         | +---- a remembered head, in one read -+ |                |
#                         +-- taken at once ------------------------+-- all taken ---+
#
# Any state ends in a close when the peer disconnects or the limit of the state has passed, WRITING
# also after the last answer. BUSY has no limit of its own: its answer has a deadline.
IDLE, HANDSHAKE, READING, BUSY, WRITING = range(5)
STATE_NAMES = ("idle", "handshake", "reading", "busy", "writing")
_STATE_LIMITS = {IDLE: "idle_seconds", READING: "head_seconds", WRITING: "write_seconds"}
_AGAIN = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Connection(http.server.BaseHTTPRequestHandler):
    """One client connection, from `finish_request` on. All its methods run in the loop.

    `setup` and `handle` are socketserver's hooks. The loop calls for each further step, so `handle`
    returns immediately and `finish` has nothing to do.
    """
    __slots__ = ("request", "client_address", "server", "connection", "peer", "_listener",
                 "_buffer", "state", "since", "_head", "_rest", "_keep", "_events", "_deferred",
                 "_end", "_empty", "_wanted")
    server: Server

    def setup(self) -> None:
        """Make the socket non-blocking."""
        self._listener = listener = self.server.accepting
        self.connection = self.request
        self.connection.setblocking(False)
        if self.connection.family != getattr(socket, "AF_UNIX", None):
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = Peer(str(self.client_address), listener.name)
        self._buffer = b""              # of an incomplete request, or of the next one
        self.state = IDLE               # or one of the others above
        self.since = self.server.now()  # when this state began
        self._head: _Head | None = None  # of the request that is being answered
        self._rest: bytes | memoryview = b""    # of an answer, not written yet
        self._keep = True               # the connection stays open after this answer
        self._events = 0                # what the selector waits for
        self._deferred: Deferred | None = None
        self._end = False               # the client has closed its side
        self._empty = 0                 # reads in a row that brought nothing
        self._wanted = 0                # bytes of a request whose head is complete

    def handle(self) -> None:
        """Start reading."""
        self.server.joined(self)
        self._wait_for(selectors.EVENT_READ)

    def finish(self) -> None:
        """Nothing to do: the connection lives until `close`."""

    # reading

    def ready(self, mask: int) -> None:
        """Called by the loop: the socket can be read or written."""
        if self.state == WRITING:
            self._send(self._rest)
            return
        try:
            received = self.connection.recv(READ_SIZE)
        except _AGAIN:
            self._empty += 1
            if self._empty > self.server.limits.empty_reads:
                self.server.refused("empty_reads")
                self.close()
            return
        except OSError:
            self.close()
            return
        self._empty = 0
        if self.state == IDLE and not self._buffer:
            head = self._listener.heads.get(received)
            if head is not None:
                self.since = self.server.now()
                self._answer(head, _make(Request, (*head.fields, self.peer)))
                return
        self._received(received)

    def _received(self, received: bytes) -> None:
        self._buffer += received
        if not received:
            self._end = True                # a client may close its side and wait for the answer
        if self.state == BUSY:
            if self._end or len(self._buffer) > self.server.limits.head_bytes:
                self._wait_for(0)
        elif self._end:
            self.close()
        else:
            if self.state == IDLE:
                self._enter(READING)
            self.parse()

    def parse(self) -> None:
        """Answer the request in the buffer, if it is complete."""
        try:
            whole = self._take()
        except Refused as refusal:          # nothing that follows can be trusted
            self.server.stats("bad request").count(refusal.status, 0.0)
            self._send(wire(refusal.answer(), close=True), keep=False)
        except _AGAIN:
            return
        except OSError:
            self.close()
        else:
            if whole is not None:
                self._answer(*whole)

    def _take(self) -> tuple[_Head, Request] | None:
        """Take one request from the buffer; None while it is incomplete; raises Refused."""
        limits = self.server.limits
        if len(self._buffer) < self._wanted:    # the head is not parsed again for each byte
            return None
        end = self._buffer.find(b"\r\n\r\n") + 4
        if end < 4 or end > limits.head_bytes:
            if len(self._buffer) > limits.head_bytes:
                self.server.refused("head_bytes")
                raise Refused(431, f"the request's head is larger than {limits.head_bytes} bytes")
            if self._buffer[0] in (0x16, 0x80):         # a TLS or SSLv2 record
                raise Refused(400, "bad request: this port speaks HTTP, not TLS")
            if _BARE_LF.search(self._buffer):
                raise Refused(400, "bad request: lines must end in CR LF")
            return None
        raw = self._buffer[:end]
        head = self._listener.heads.get(raw)
        body = b""
        if head is None:
            fields = parse_head(raw, limits)
            length = _body_length(fields[4], limits)
            body = self._buffer[end:end + length]
            self._wanted = end + length if len(body) < length else 0
            if self._wanted:
                if not body and fields[4].get("expect", "").lower() == "100-continue":
                    self.connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                return None
            end += length
            head = self._listener.head(raw, fields, self.peer)
        self._buffer = self._buffer[end:]
        request = _make(Request, (*head.fields, self.peer))
        return head, request._replace(body=body) if body else request

    # answering

    def _answer(self, head: _Head, request: Request) -> None:
        self._head = head
        self.state = BUSY
        answer = call(head.route, request, head.args)
        if isinstance(answer, Deferred):
            self._park(answer)
        else:
            self._deliver(answer)

    def resume(self) -> None:
        """Another thread runs the loop: answer the request that the one before was answering."""
        if self.state == BUSY and self._deferred is None and self._head is not None:
            self._answer(self._head, _make(Request, (*self._head.fields, self.peer)))

    def _park(self, deferred: Deferred) -> None:
        """Park the connection: no thread waits."""
        self._deferred = deferred
        self.server.park(self, deferred)
        deferred.attach(functools.partial(self.server.loop.run_here, self._deferred_done, deferred))

    def expire(self, now: float) -> None:
        """Send what there is once a parked answer's deadline has passed."""
        deferred = self._deferred
        if deferred is not None and now >= deferred.deadline:
            deferred.expire()

    def _deferred_done(self, deferred: Deferred, answer: Answer) -> None:
        if self._deferred is deferred:
            self._deferred = None
            self.server.unpark(self)
            self._deliver(answer)

    def _deliver(self, answer: Answer) -> None:
        head = self._head
        if head is None:                   # closed meanwhile
            return
        self._head = None
        now = self.server.now()
        head.stats.count(answer.status, now - self.since)
        self.since = now
        if head.simple and type(answer) is Prepared and not self.server.stopping:
            self._send(answer.form(head.packed))
            return
        keep = bool(head.fields[8]) and not self.server.stopping
        self._send(wire(answer, head.packed, head.fields[0] == "HEAD", not keep), keep)

    # writing

    def _send(self, whole: bytes | memoryview, keep: bool | None = True) -> None:
        """One write for head and body; the rest waits until the socket is writable."""
        try:
            sent = self.connection.send(whole)
        except _AGAIN:
            sent = 0
        except OSError:
            self.close()
            return
        if self.state != WRITING:
            self._keep = bool(keep)
        if sent < len(whole):
            self._rest = memoryview(whole)[sent:]
            if self.state != WRITING:
                self._enter(WRITING)
                self._wait_for(selectors.EVENT_WRITE)
                self.server.holds(self, len(whole))
            return
        if self.state == WRITING:
            self.server.released(self)
        if self._keep and (not self._end or self._buffer):
            self._rest = b""
            self.state = IDLE
            if self._buffer:                # pipelined: in its turn, and before more is read
                self._wait_for(0)
                self._enter(READING)
                self.server.loop.call_soon(self._again)
            else:
                self._wait_for(selectors.EVENT_READ)
        else:
            self.close()

    def _again(self) -> None:
        if self.state == READING and self in self.server.connections:
            self._wait_for(selectors.EVENT_READ)
            self.parse()

    # life

    def overdue(self, now: float) -> None:
        """Close it if its state has lasted too long."""
        name = self.limit
        if name and not self.is_working \
                and now - self.since > getattr(self.server.limits, name):
            if name != "idle_seconds":
                self.server.refused(name)
            if self.state == READING:
                with contextlib.suppress(OSError):      # closed next in any case
                    self.connection.send(wire(text(408, "the request did not arrive in time"),
                                              close=True))
            self.close()

    def leave(self) -> None:
        """The server is stopping: close, unless an answer is in progress."""
        if self.state != WRITING and not self.is_working:
            self.close()

    @property
    def limit(self) -> str:
        """The name in Limits of the current state's limit; "": none."""
        return _STATE_LIMITS.get(self.state, "")

    @property
    def is_working(self) -> bool:
        """Whether a handler is working for it, so that it must not be closed."""
        return self.state == BUSY

    def _enter(self, state: int) -> None:
        self.state = state
        self.since = self.server.now()
        self.server.watch_deadline(self)

    def _wait_for(self, events: int) -> None:
        if events != self._events:
            self.server.loop.watch(self.connection, events, self)
            self._events = events

    def close(self) -> None:
        """Close the connection; may be called more than once."""
        deferred, self._deferred = self._deferred, None
        self._head = None
        if self.server.forget(self):
            self._wait_for(0)
            if deferred is not None and deferred.on_cancel is not None:
                deferred.on_cancel(deferred)
            self.server.close_request(self.connection)


ListenerType = TypeVar("ListenerType", bound=Listener)


def listening_socket(address: tuple[str, int] | socket.socket) -> socket.socket:
    """A listening socket for an address, or the given one; raises OSError."""
    if isinstance(address, socket.socket):
        listening = address
    else:
        try:
            listening = socket.create_server(
                address, family=socket.AF_INET6 if ":" in address[0] else socket.AF_INET,
                backlog=BACKLOG)
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on {bracketed(address[0])}:{address[1]}: "
                          + (error.strerror or str(error)).partition(" (while")[0].lower()
                          ) from None
    listening.setblocking(False)
    return listening


class Reload(NamedTuple):
    """The result of the last reload of the settings."""
    good: bool
    at: float                       # wall clock of the last success


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """HTTP on the hooks of `socketserver`, with a loop instead of a thread per connection.

    An idle connection costs 0.6 kB in the loop (22 kB with TLS), and 31 kB (100 kB) with a thread;
    10,000 threads reserve 80 GB of address space, and 64 that are active have a p99 of 100 ms
    instead of 5. Threads, in bounded number, are for what may block: `spawn`.

    The hooks: `get_request` accepts, `verify_request` holds the limits, `process_request` hands the
    connection to the loop where the mix-in starts a thread, `finish_request` makes a Connection,
    `service_actions` runs calls and timers, `close_request` and `handle_error` end connections.
    """

    def __init__(self, program: str, registry: Registry, limits: Limits = Limits(),
                 now: Callable[[], float] = time.monotonic) -> None:
        socketserver.BaseServer.__init__(self, ("", 0), Connection)
        self.limits = limits
        self.now = now
        self.loop = Loop(now, self._broken)
        self.listeners: list[Listener] = []
        self.accepting: Listener        # the one that accepts right now
        self.connections: set[Connection] = set()
        self._timed: set[Connection] = set()        # in a state with a limit of seconds
        self._parked: dict[Connection, float] = {}  # with a deferred answer -> its deadline
        self.stopping = False
        self.resuming = False           # a handler is called again for the same request
        self._workers = Pool(f"{program}-worker", limits.workers)
        self._done = threading.Event()
        self._end = math.inf                        # when the grace time ends
        self._ticking = 0                           # the timer for `_tick`, or 0 …
        self._ticks = math.inf                      # … and when it fires
        self._sweeping = False                      # whether the other timer is set
        self._drained = False           # no connection is waiting to be accepted
        self._scarce = False            # descriptors have run out since the last sweep
        self._unsent: dict[Connection, int] = {}    # bytes of answers, oldest first
        self._unsent_bytes = 0                      # their sum
        self._program = program
        self.reload = Reload(True, time.time())
        self._registry = registry
        self._refusals: dict[str, int] = {}
        self._accepted = 0
        self._stats: dict[str, _Stats] = {}         # by the route's pattern
        self._durations = Histogram(
            f"cmon_{program}_http_request_duration_seconds", "Time in seconds from the "
            "arrival of a request to its answer.", DURATIONS, ("route",))
        registry.collect(self._families)
        self.loop.every(5.0, self._sweep_idle)

    def listen(self, address: tuple[str, int] | socket.socket, routes: Sequence[Route],
               name: str = "main") -> Listener:
        """Listen on another address, or on a given listening socket; raises OSError."""
        return self.add(Listener(self, listening_socket(address), Router(routes), name))

    def add(self, listener: ListenerType) -> ListenerType:
        """Accept connections of another listener."""
        self.listeners.append(listener)
        self._registry.caches.append(listener.heads)
        self._resume(listener)
        return listener

    def _resume(self, listener: Listener) -> None:
        if not self.stopping:
            self.loop.watch(listener.socket, selectors.EVENT_READ, listener)

    # life

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until `stop`, then finish what is in flight within the grace time."""
        self.loop.adopt()
        while self.turn():
            pass

    def turn(self) -> bool:
        """One turn of the loop; False at the end, when all sockets are closed."""
        self.loop.select(self._end)
        self.service_actions()
        if not self.stopping:
            return True
        if self._end == math.inf:
            self._end = self.now() + self.limits.grace_seconds
            self._wind_up()
        if self.connections and self.now() < self._end:
            return True
        self.server_close()
        self._done.set()
        return False

    @property
    def wakeup(self) -> socket.socket:
        """A byte that is sent here wakes the thread that is in `serve_forever`."""
        return self.loop.waker

    def resume(self) -> None:
        """Another thread runs the loop: answer what the one before was answering."""
        self.resuming = True
        for connection in list(self.connections):
            self.loop.guarded(connection.resume)
        self.resuming = False

    def service_actions(self) -> None:
        """After each turn: calls from other threads, and timers."""
        self.loop.run_due()

    def stop(self) -> None:
        """Stop gracefully; from any thread and from signal handlers."""
        self.stopping = True
        self.loop.wake()

    def shutdown(self) -> None:
        """Stop, and wait until it has."""
        self.stop()
        self._done.wait()

    def server_close(self) -> None:
        """Close all sockets; threads end after their current job."""
        for connection in list(self.connections):
            connection.close()
        self._close_listeners()
        self._workers.close()
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)        # before the loop's sockets are closed
        self.loop.close()

    def _wind_up(self) -> None:
        self._close_listeners()
        for connection in list(self.connections):
            connection.leave()

    def _close_listeners(self) -> None:
        for listener in self.listeners:
            self.loop.unwatch(listener.socket)
            listener.socket.close()

    def spawn(self, function: Callable[..., object], *args: Any) -> bool:
        """Call it in a worker thread; False when the queue is full."""
        return self._workers.submit(function, *args)

    # connections

    def accept_from(self, listener: Listener) -> None:
        """Accept a bounded number of connections, so that others are served in between."""
        self.accepting = listener
        self._drained = False
        for _ in range(1 if self._scarce else ACCEPTS):
            self._handle_request_noblock()  # type: ignore[attr-defined]  # BaseServer's
            if self._drained:
                return

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept one; OSError if none is waiting."""
        try:
            accepted, address = self.accepting.socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            self._drained = True
            raise
        except OSError as error:            # out of descriptors or memory
            self.refused("descriptors")
            # accept() fails even if none is waiting: only the selector can tell
            self._scarce = self._drained = True
            if not self._make_room():
                log.warning("cannot accept connections, retrying in a second: %s", error)
                self.loop.unwatch(self.accepting.socket)
                self.loop.call_later(1.0, self._resume, self.accepting)
            raise
        self._accepted += 1
        return accepted, reused(str(address[0])) if address else ""

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Enforce the limit on all connections."""
        if len(self.connections) >= self.most_connections():
            self.refused("connections")
            return self._make_room()
        return True

    def most_connections(self) -> int:
        """The limit of connections; a quarter of the descriptors is reserved for other uses."""
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return self.limits.connections if soft == resource.RLIM_INFINITY else \
            min(self.limits.connections, max(soft * 3 // 4, 1))

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand the connection to the loop."""
        self.finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection could not be set up: the client is gone, or there is a bug."""
        error = sys.exc_info()[1]
        if isinstance(error, (OSError, ValueError)):
            log.debug("a connection from %r ended at once: %s", client_address, error)
        else:
            log.exception("a connection failed")

    def _broken(self, owner: object) -> None:
        if isinstance(owner, Connection):
            owner.close()

    def _make_room(self) -> bool:
        """Close a few connections, so that one search makes room for several; returns whether
        there is room."""
        victims = self.victims(1 + len(self.connections) // 1024)
        for connection in victims:
            connection.close()
        return bool(victims)

    def victims(self, count: int) -> Sequence[Connection]:
        """Connections to close when others need a place: the longest idle."""
        return heapq.nsmallest(
            count, (connection for connection in self.connections if connection.state == IDLE),
            key=operator.attrgetter("since"))

    def joined(self, connection: Connection) -> None:
        """Register a new connection."""
        self.connections.add(connection)

    def forget(self, connection: Connection) -> bool:
        """Remove a closed connection; returns whether it was still open."""
        known = connection in self.connections
        self.connections.discard(connection)
        self._timed.discard(connection)
        self._parked.pop(connection, None)
        self.released(connection)
        return known

    def holds(self, connection: Connection, size: int) -> None:
        """Its client reads slowly. When too much is held, the address that holds most of it loses
        its oldest answers: those of others are not its to lose."""
        self._unsent[connection] = size
        self._unsent_bytes += size
        if self._unsent_bytes <= self.limits.unsent_bytes:
            return
        by_address: dict[str, int] = collections.defaultdict(int)
        for holder, held in self._unsent.items():
            by_address[holder.peer.address] += held
        worst = max(by_address, key=by_address.__getitem__)
        for holder in [holder for holder in self._unsent if holder.peer.address == worst]:
            self.refused("unsent_bytes")
            holder.close()
            if self._unsent_bytes < self.limits.unsent_bytes * 7 // 8:  # not for each answer
                return

    def released(self, connection: Connection) -> None:
        """Its answer has been sent, or it was closed."""
        self._unsent_bytes -= self._unsent.pop(connection, 0)

    def refused(self, limit: str) -> None:
        """Count a refusal by a limit."""
        self._refusals[limit] = self._refusals.get(limit, 0) + 1

    def park(self, connection: Connection, deferred: Deferred) -> None:
        """Enforce the deadline of a deferred answer."""
        self._parked[connection] = deferred.deadline
        if deferred.deadline < self._ticks:
            if self._ticking:
                self.loop.cancel(self._ticking)
            self._tick_at(deferred.deadline)

    def unpark(self, connection: Connection) -> None:
        """Its answer has arrived. The timer stays set: most connections park again."""
        self._parked.pop(connection, None)

    def _tick_at(self, deadline: float) -> None:
        self._ticks = deadline
        self._ticking = self.loop.call_later(max(deadline - self.now(), 0.0), self._tick)

    def _tick(self) -> None:
        self._ticking, self._ticks = 0, math.inf
        now = self.now()
        for connection in list(self._parked):
            self.loop.guarded(connection.expire, (now,))
        if self._parked:
            self._tick_at(max(min(self._parked.values()), now + TICK_SECONDS))

    def watch_deadline(self, connection: Connection) -> None:
        """Check the time limit of its state until it is met or exceeded."""
        self._timed.add(connection)
        if not self._sweeping:
            self._sweeping = True
            self.loop.call_later(0.25, self._sweep_timed)

    def _sweep_timed(self) -> None:
        now = self.now()
        for connection in list(self._timed):
            connection.overdue(now)
            if connection.state in (IDLE, BUSY):
                self._timed.discard(connection)
        self._sweeping = bool(self._timed)
        if self._sweeping:
            self.loop.call_later(0.25, self._sweep_timed)

    def _sweep_idle(self) -> None:
        now = self.now()
        self._scarce = False
        for connection in list(self.connections):
            connection.overdue(now)

    # own metrics

    def stats(self, route: str) -> _Stats:
        """The counts of a route by its pattern."""
        stats = self._stats.get(route)
        if stats is None:
            stats = self._stats[route] = _Stats(self._durations.series(route))
        return stats

    def _families(self) -> list[Family]:
        config = f"cmon_{self._program}_config_last_reload_success"
        prefix = f"cmon_{self._program}_http"

        states = collections.Counter(connection.state for connection in self.connections)

        def labelled(label: str, counts: Mapping[str, int]) -> list[Sample]:
            return [Sample(((label, key),), count) for key, count in counts.items()]
        return [
            single(f"{config}ful", GAUGE, "Whether the last reload of the settings succeeded.",
                   int(self.reload.good)),
            single(f"{config}_timestamp_seconds", GAUGE, "Timestamp of the last successful reload "
                   "of the settings.", self.reload.at),
            Family(f"{prefix}_requests_total", COUNTER, "Total number of requests answered.",
                   [Sample((("route", route), ("code", str(status))), count) for route, stats in
                    self._stats.items() for status, count in stats.statuses.items()]),
            self._durations.family(),
            Family(f"{prefix}_connections", GAUGE, "Number of open connections, by state.",
                   labelled("state", {name: states[state]
                                      for state, name in enumerate(STATE_NAMES)})),
            single(f"{prefix}_unsent_bytes", GAUGE, "Bytes of answers that clients have not "
                   "read yet.", self._unsent_bytes),
            single(f"{prefix}_connections_limit", GAUGE, "Maximum number of open connections.",
                   self.most_connections()),
            single(f"{prefix}_connections_accepted_total", COUNTER, "Total number of accepted "
                   "connections.", self._accepted),
            Family(f"{prefix}_limit_refusals_total", COUNTER, "Total number of requests and "
                   "connections refused or closed by a limit.",
                   labelled("limit", self._refusals)),
        ]


# Common parts of all HTML pages. A page without script or files is plain_page().
BASE_CSS = """\
:root { color-scheme: light dark; --back: #fff; --card: #f6f7f9; --text: #1c2128; --dim: #5c6670;
  --line: #d7dce2; --link: #0550ae; --good: #1a7f37; --warn: #8a5a00; --bad: #b3261e;
  --bad-back: #fdecea; --warn-back: #fff6e0; --ink: #2563a8; --grid: #e4e8ec; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171b; --card: #1d2126; --text: #e3e6ea; --dim: #9aa4ae; --line: #363d45;
    --link: #79b8ff; --good: #57c37a; --warn: #e0b252; --bad: #ff8a80; --bad-back: #3a1b1a;
    --warn-back: #33290f; --ink: #6fb1f5; --grid: #2a3037; } }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 84rem; padding: 1rem;
  background: var(--back); color: var(--text); }
h1 { font-size: 1.15rem; margin: 0; } h2 { font-size: 1.25rem; margin: 1rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
h1 a { color: inherit; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
header { display: flex; flex-wrap: wrap; gap: .2rem 1.5rem; align-items: baseline;
  border-bottom: 1px solid var(--line); padding-bottom: .5rem; }
.facts { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; margin: 0; padding: 0;
  list-style: none; color: var(--dim); font-size: .9rem; }
.dim, small { color: var(--dim); } small { font-size: .82rem; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
code, pre { font: 12.5px/1.5 ui-monospace, monospace; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; font-weight: normal; }
thead th { vertical-align: bottom; white-space: nowrap; font-size: .88rem; }
tbody th { font-weight: 600; overflow-wrap: anywhere; min-width: 8rem; }
@media (max-width: 44rem) {
  body { padding: .6rem; }
  .rows thead { position: absolute; clip-path: inset(50%); height: 1px; overflow: hidden; }
  .rows tr { display: grid; grid-template-columns: 1fr 1fr; gap: .1rem .8rem;
    padding: .5rem .2rem; border-bottom: 1px solid var(--line); }
  .rows td, .rows th { display: block; border-bottom: 0; padding: .1rem 0;
    max-width: none; }
  .rows tr > :first-child { grid-column: span 2; } .rows td:empty { display: none; }
  .rows td[data-title]::before { content: attr(data-title) " "; color: var(--dim);
    font-size: .8rem; } }
"""


def page_headers(sources: str) -> tuple[tuple[str, str], ...]:
    """Headers of an HTML page, which may load only what `sources` allows."""
    return (("Content-Security-Policy", f"default-src 'none'; {sources}; base-uri 'none'; "
             "form-action 'none'; frame-ancestors 'none'"), ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"))


def plain_page(title: str, facts: Iterable[str], main: str) -> Response:
    """An HTML page: `facts` are text, `main` is HTML."""
    digest = base64.b64encode(hashlib.sha256(BASE_CSS.encode()).digest()).decode()
    items = "</li><li>".join(map(html.escape, facts))
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>{BASE_CSS}</style></head>
<body><header><h1><a href="/">{html.escape(title)}</a></h1>
<ul class="facts"><li>{items}</li></ul></header>
<main>
{main}</main></body></html>
"""
    return Response(200, page.encode("utf-8", "replace"), HTML,
                    page_headers(f"style-src 'sha256-{digest}'"))


def page_row(first: str, cells: Iterable[tuple[str, str]]) -> str:
    """An HTML table row; on a phone each cell shows its title."""
    return f'<tr><th scope="row">{first}</th>' + "".join(
        [f'<td data-title="{title}">{cell}</td>' if cell else "<td></td>"
         for title, cell in cells]) + "</tr>\n"


def page_table(titles: Iterable[str], rows: Iterable[str]) -> str:
    """An HTML table of the rows."""
    head = "".join([f'<th scope="col">{title}</th>' for title in titles])
    return (f'<table class="rows"><thead><tr>{head}</tr></thead><tbody>\n{"".join(rows)}'
            "</tbody></table>\n")

# --- client [kit] ---------------------------------------------------------------------------------

MAX_BODY = 16 << 20             # bytes of an answer that our clients accept
MAX_HEAD = 65536
MOST_PARTS = 1000               # chunks and such of an answer, and one more for so many bytes
LEAST_PART = 16
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t -~\x80-\xff]*)?\r\n")
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})(?:[ \t]*;[\t -~]*)?\r\n")


class ClientError(Exception):
    """The server cannot be reached or does not speak HTTP; the message is for users."""


class TooLarge(ClientError):
    """An answer is larger than the client allows, or a request than the server does."""


class AnswerReader:
    """Parses one HTTP/1.1 answer from bytes in any pieces; strict and bounded."""

    def __init__(self, head_request: bool = False, max_body: int = MAX_BODY) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.keep_alive = False
        self.done = False
        self.begun = False                  # a byte of it has come
        self._head_request = head_request
        self._max_body = max_body
        self._buffer = b""
        self._at = 0                        # what comes before it in the buffer has been read
        self._body = bytearray()
        self._size = 0
        self._parts = 0                     # answers before this one, chunks, trailer lines
        self._left: int | None = None    # bytes of the body, or of this chunk, that are missing
        self._next: Callable[[], bool] = self._read_head

    @property
    def body(self) -> bytes:
        """The body, with chunks joined."""
        return bytes(self._body)

    def feed(self, received: bytes) -> bool:
        """Parse received bytes; True when the answer is complete. Raises ClientError."""
        self.begun = self.begun or bool(received)
        self._buffer, self._at = self._buffer[self._at:] + received, 0
        while not self.done and self._next():
            pass
        if self.done and self._at < len(self._buffer):
            raise ClientError("the answer is longer than its Content-Length")
        return self.done

    def end(self) -> None:
        """The server has closed; raises ClientError if the answer is incomplete."""
        if self.done:
            return
        if self._next == self._read_to_end:
            self.done = True
            return
        raise ClientError("the connection was closed in the middle of the answer" if self.begun
                          else "the connection was closed without an answer")

    def _count(self) -> None:
        """Limit the number of parts: small ones cost the sender less than us."""
        self._parts += 1
        if self._parts > MOST_PARTS + self._size // LEAST_PART:
            raise ClientError("the answer is in too many parts")

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n", self._at) + 4
        if end < 4 or end - self._at > MAX_HEAD:
            if len(self._buffer) - self._at > MAX_HEAD:
                raise ClientError(f"the answer's head is larger than {MAX_HEAD} bytes")
            return False
        head, self._at = self._buffer[self._at:end], end
        line = _STATUS.match(head)
        if line is None:
            raise ClientError(f"the answer is not HTTP: {head[:40]!r}")
        try:
            self.headers = _header_fields(head, line.end(), 1000)
        except Refused as error:
            raise ClientError(f"the answer is not HTTP: {error}") from None
        self.status = int(line.group(2))
        if self.status < 200:               # 100 Continue and its like come before the answer
            self._count()
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
                raise ClientError(f"the answer's transfer encoding {coding[:40]!r} is unknown")
            self._next = self._read_chunk_size
        elif length is None:
            self.keep_alive = False
            self._next = self._read_to_end
        elif not _LENGTH.fullmatch(length):
            raise ClientError(f"the answer's length {length[:40]!r} is not a number")
        else:
            self._expect(int(length))
            self._next = self._read_sized

    def _expect(self, size: int) -> None:
        self._size += size
        if self._size > self._max_body:
            raise TooLarge(f"the answer is larger than {self._max_body} bytes")
        self._left = size

    def _take(self, most: int) -> int:
        """Move at most this many bytes to the body."""
        size = min(most, len(self._buffer) - self._at)
        self._body += memoryview(self._buffer)[self._at:self._at + size]
        self._at += size
        return size

    def _read_sized(self) -> bool:
        assert self._left is not None
        self._left -= self._take(self._left)
        self.done = self._left == 0
        return self.done

    def _read_to_end(self) -> bool:
        size = len(self._buffer) - self._at
        self._expect(size)
        self._take(size)
        return False

    def _read_chunk_size(self) -> bool:
        match = _CHUNK.match(self._buffer, self._at)
        if match is None:
            if len(self._buffer) - self._at > 256 or self._buffer.find(b"\n", self._at) >= 0:
                raise ClientError("the answer's chunked encoding is invalid")
            return False
        self._at = match.end()
        size = int(match.group(1), 16)
        self._expect(size)
        self._count()
        self._next = self._read_chunk if size else self._read_trailer
        return True

    def _read_chunk(self) -> bool:
        assert self._left is not None
        self._left -= self._take(self._left)
        end = self._buffer[self._at:self._at + 2]
        if self._left or len(end) < 2:
            return False
        if end != b"\r\n":
            raise ClientError("the answer's chunked encoding is invalid")
        self._at += 2
        self._next = self._read_chunk_size
        return True

    def _read_trailer(self) -> bool:
        end = self._buffer.find(b"\r\n", self._at)
        if end < 0:
            if len(self._buffer) - self._at > MAX_HEAD:
                raise ClientError("the answer's trailer is too large")
            return False
        self._count()
        self.done = end == self._at
        self._at = end + 2
        return True


class ClientResponse(NamedTuple):
    """An answer: status, headers by lower-case name, decompressed body."""
    status: int
    headers: Mapping[str, str]
    body: bytes


def gunzip(body: bytes, max_body: int) -> bytes:
    """The content of a gzip stream, bounded in size; raises ClientError."""
    unpacker = zlib.decompressobj(31)
    try:
        content = unpacker.decompress(body, max_body + 1)
    except zlib.error:
        raise ClientError("the answer's gzip is broken") from None
    if len(content) > max_body:
        raise TooLarge(f"the answer is larger than {max_body} bytes")
    if not unpacker.eof:
        raise ClientError("the answer's gzip is truncated")
    return content


class _Origin(NamedTuple):
    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Client:
    """HTTP/1.1 for programs: keeps connections, one deadline for the whole exchange.

    `resolve` maps host names to other addresses (as curl's --connect-to); the name stays in the
    Host header and in TLS. Any thread may use it.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, max_idle: int = 8,
                 max_body: int = MAX_BODY,
                 resolve: Mapping[str, tuple[str, int]] | None = None,
                 now: Callable[[], float] = time.monotonic) -> None:
        self._tls, self._max_idle, self._max_body = tls, max_idle, max_body
        self._resolve = resolve or {}
        self._now = now
        self._idle: dict[_Origin, list[socket.socket]] = {}
        self._lock = threading.Lock()       # _idle

    def request(self, method: str, url: str, headers: Mapping[str, str] | None = None,
                body: bytes = b"", timeout: float = 10.0) -> ClientResponse:
        """Send a request and wait at most `timeout` seconds for the answer; raises ClientError."""
        origin, target = self._origin(url)
        deadline = self._now() + timeout
        lines = {"Host": origin.host if origin.port in (80, 443) else str(origin),
                 "Accept-Encoding": "gzip", **(headers or {})}
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
            except ClientError:             # the server may have closed it while it was idle
                if reader.begun or method not in ("GET", "HEAD") or self._now() >= deadline:
                    raise
            reader = AnswerReader(method == "HEAD", self._max_body)
        return self._exchange(origin, self._connect(origin, deadline), whole, reader, deadline)

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for connection in itertools.chain(*idle.values()):
            connection.close()

    def _origin(self, url: str) -> tuple[_Origin, str]:
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            raise ClientError(f"{url!r} is not a URL") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClientError(f"{url!r} is not an http or https URL")
        return (_Origin(parts.scheme, bracketed(parts.hostname), port),
                (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))

    def _take(self, origin: _Origin) -> socket.socket | None:
        with self._lock:
            connections = self._idle.get(origin, [])
            while connections:
                connection = connections.pop()
                poll = select.poll()        # select() fails beyond 1,024 descriptors
                poll.register(connection, select.POLLIN)
                if not poll.poll(0):
                    return connection
                connection.close()          # the server has closed it while it was idle
        return None

    def _connect(self, origin: _Origin, deadline: float) -> socket.socket:
        address = self._resolve.get(origin.host, (origin.host.strip("[]"), origin.port))
        try:
            plain = socket.create_connection(address, self._left(deadline, origin))
        except (OSError, UnicodeError) as error:        # UnicodeError: the name is impossible
            raise ClientError(f"cannot reach {origin}: {reason_of(error)}") from None
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if origin.scheme == "http":
                return plain
            context = self._tls if self._tls is not None else ssl.create_default_context()
            plain.settimeout(self._left(deadline, origin))
            return context.wrap_socket(plain, server_hostname=origin.host.strip("[]"))
        except (OSError, ValueError) as error:
            plain.close()
            raise ClientError(f"TLS handshake with {origin} failed: {reason_of(error)}") from None

    def _exchange(self, origin: _Origin, connection: socket.socket, whole: bytes,
                  reader: AnswerReader, deadline: float) -> ClientResponse:
        good = sent = False
        try:
            connection.settimeout(self._left(deadline, origin))
            # a server may refuse a request, as with 413, and close before it has read it all
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(whole)
                sent = True
            while not reader.done:
                connection.settimeout(self._left(deadline, origin))
                received = connection.recv(65536)
                if received:
                    reader.feed(received)
                else:
                    reader.end()
            if not sent and reader.status < 400:
                raise ClientError("the connection was closed in the middle of the request")
            good = reader.keep_alive and sent
        except ClientError as error:
            raise type(error)(f"{origin}: {error}") from None
        except OSError as error:
            raise ClientError(f"request to {origin} failed: {reason_of(error)}") from None
        finally:
            self._give_back(origin, connection, good)
        body = reader.body
        if body and reader.headers.get("content-encoding", "").lower() == "gzip":
            body = gunzip(body, self._max_body)
        return ClientResponse(reader.status, reader.headers, body)

    def _give_back(self, origin: _Origin, connection: socket.socket, good: bool) -> None:
        with self._lock:
            kept = self._idle.setdefault(origin, [])
            if good and len(kept) < self._max_idle:
                kept.append(connection)
                return
        connection.close()

    def _left(self, deadline: float, origin: _Origin) -> float:
        left = deadline - self._now()
        if left <= 0:
            raise ClientError(f"cannot reach {origin}: timed out")
        return left


def begin_connect(connection: socket.socket, address: Any) -> int:
    """Connect without waiting; the number of an error that came at once, which SO_ERROR does not
    repeat (no route, no free port), or 0."""
    number_of = connection.connect_ex(address)
    return 0 if number_of in (errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EINTR) else number_of


def reason_of(error: Exception) -> str:
    """The reason why a connection or a system call failed, in readable form."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    if isinstance(error, (socket.timeout, TimeoutError)):
        return "timed out"
    if isinstance(error, socket.gaierror):
        return "the name does not resolve"
    # by getaddrinfo(); each Python has its own text around these words
    if isinstance(error, UnicodeError) and re.search("label (empty|too long)", str(error)):
        return "not a host name: a part between dots is empty or too long"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__

# --- scraping and routes --------------------------------------------------------------------------

KSTATS = "kstats"               # the cell of all collectors that read them
BUSY_RATE = 40                  # reads a second, of zones and the node: above this rate those that
GATHER_SECONDS = 0.1            # arrive within this time, or this many clients, start together:
GATHER_MOST = 8                 # after the first, they find the processor's caches warm. At lower
                                # rates the timer costs as much as it saves
HURRY_SECONDS = 1.0             # clients that wait no longer than this are served at once
LOOK_SECONDS = 2.0              # between two looks at what the agent uses
PREPARED_SECONDS = 0.5          # how long a complete answer is reused: its ages are exact to this
LEAST_LIFETIME = 1.0            # seconds; more frequent scrapes get the same samples
INTERVAL_SHARE = 0.8            # of the scrape interval, so that each scrape gets new samples
STALE_SECONDS = 300.0           # last values older than this and three lifetimes are left out
UNKNOWN_SECONDS = 1.0           # how long a failed lookup is cached
NEW_DATASET_SECONDS = 30.0      # a zone missing from an older zfs list causes a new one
NICS_SECONDS = 60.0             # how long links wait if vminfod is followed and does not
                                # know their zone: vmadm does not manage it
FORGET_SECONDS = 900.0          # unused pages are dropped
BURST_SECONDS = 30.0            # of the CPU budget may be used in one burst
LONGEST_STRETCH = 64.0          # factor for lifetimes, by the governor
NO_UUID = "not a zone's UUID in lower case; / lists the running zones"


class NotYet(CollectError):
    """A collector has no values yet, but has not failed: no breaker opens."""


@functools.lru_cache(maxsize=MAX_TEMPLATES)
def rest_of(form: Form, newer: Form) -> Form | None:
    """What one form has and a newer one lacks."""
    kept = [place for place, name in enumerate(form.names) if name not in newer.names]
    return Form(tuple([form.names[place] for place in kept]),
                tuple([form.templates[place] for place in kept]),
                tuple([form.places[place] for place in kept]), form.size) if kept else None


class Source(NamedTuple):
    """Values on a page that were collected together."""
    form: Form
    values: bytes                               # with APART between them
    at: float                                   # when they came …
    seconds: bytes                              # … and how long that took, as the page has it
    up: bool                                    # no later attempt has failed

    @classmethod
    def of(cls, form: Form, values: str, at: float, seconds: bytes, up: bool) -> Source:
        """As for a page. The JSON of a capture may have lone surrogates, which UTF-8 cannot
        encode: they become question marks."""
        return cls(form, values.encode("utf-8", "replace"), at, seconds, up)


class Trouble:
    """A failing collector."""
    __slots__ = ("why", "tried", "breaker")

    def __init__(self) -> None:
        self.why = ""
        self.tried = 0.0                        # when
        self.breaker: Breaker | None = None     # None: it has no values yet

    @property
    def is_stopped(self) -> bool:
        """Whether its breaker is open."""
        return self.breaker is not None and self.breaker.open

    @property
    def note(self) -> str:
        """A comment for the page if there are no values yet without a failure (NotYet)."""
        return "" if self.breaker is not None else "".join(filter(str.isprintable, self.why))


NO_NAMES: AbstractSet[str] = frozenset()        # one object for all cells


class Cell:
    """Collectors that do their work together, of a page or of all pages: what they have brought
    last, which of them fail now, whether they are at work. Belongs to the loop."""
    __slots__ = ("name", "collectors", "wants", "lifetime", "shared", "sources", "proved",
                 "by_zone", "of_zones", "at", "seconds", "claims", "troubles", "began", "late",
                 "pages")

    def __init__(self, collectors: tuple[Collector, ...]) -> None:
        self.use(collectors)
        self.sources: tuple[Source, ...] = ()   # the newest first, others are of those that fail
        self.proved = False                     # whether these are of a running zone
        self.by_zone = Shared({}, True)         # of a collector that is shared …
        self.of_zones: dict[str, tuple[Source, ...]] = {}   # … in the form of `sources`
        self.at = -math.inf                     # when the newest came …
        self.seconds = b""                      # … and how long that took, as the page has it
        self.claims = NO_NAMES                  # of foreign text: its part of the page
        self.troubles: dict[str, Trouble] = {}  # by collector
        self.began: float | None = None         # when the current job started …
        self.late = False                       # … too long ago: new clients do not wait for it
        self.pages: tuple[Page, ...] = ()       # … and the pages to notify when it ends

    def use(self, collectors: tuple[Collector, ...]) -> None:
        """Set the collectors, with lifetimes and timeouts of the settings."""
        self.collectors = collectors            # one with a function, or all that read kstats
        self.name = collectors[0].name if collectors[0].collect else KSTATS
        self.wants = wants_of(collectors)
        self.lifetime = min([collector.lifetime for collector in collectors
                             if collector.tables or collector.collect])
        self.shared = collectors[0].shared      # whether one job serves all zones

    def mend(self) -> None:
        """Forget failures: the cause may have been repaired."""
        self.troubles.clear()
        self.of_zones = {}

    def forget(self) -> None:
        """Collect it again, regardless of its age."""
        self.mend()
        self.sources, self.proved, self.at = (), False, -math.inf


class Kind:
    """The names of a page's collectors, in page order. One object for all pages that are alike, so
    that they find their layout without a look at each name."""
    __slots__ = ("names",)

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names


kind_of = functools.lru_cache(maxsize=MAX_TEMPLATES)(Kind)


class Page:
    """One page: its collectors and its waiters. Owned by the loop."""
    __slots__ = ("key", "zone", "core", "kind", "cells", "proof", "generation", "waiting",
                 "waiting_since", "prepared", "until", "asked", "used", "since", "checked")

    def __init__(self, zone: str, core: bool, since: float) -> None:
        self.key = (zone, core)
        self.since = since                      # when it was asked for first
        self.zone, self.core = zone, core
        self.kind = kind_of(())
        self.cells: tuple[Cell, ...] = ()
        self.proof: Cell | None = None          # has values only if the zone runs
        self.generation = -1
        # Per waiter: the cells it waits for. A client that arrived after a cell was late does
        # not wait for it.
        self.waiting: dict[Deferred, set[Cell]] = {}
        self.waiting_since = 0.0
        self.prepared: Prepared | None = None
        self.until = 0.0
        self.asked: dict[str, tuple[float, float]] = {}     # client -> last time, interval
        self.used = -math.inf
        self.checked = since                    # when the zone was last known to run

    def has_values(self) -> bool:
        """Whether there is something to send; of a zone only what its kstats have proved to run."""
        if self.proof is not None:
            return self.proof.proved
        return self.zone != NODE or any([cell.sources for cell in self.cells])

    def is_proved(self) -> bool:
        """Whether its zone is known to run; until then, no command is run for it."""
        return self.proof is None or self.proof.proved

    def seen(self, client: str, now: float) -> None:
        """Record a client's request, to know its interval."""
        last = self.asked.get(client)
        self.used = now
        if last is None:
            if len(self.asked) >= 16:
                self.asked = {who: seen for who, seen in self.asked.items()
                              if seen[1] < math.inf and now - seen[0] <= 4 * seen[1] + 5}
                if len(self.asked) >= 16:
                    self.asked.clear()
            self.asked[client] = (now, math.inf)
        elif now - last[0] > 0.05:              # less: one client on two connections
            self.asked[client] = (now, now - last[0])

    def interval(self, now: float) -> float:
        """The shortest scrape interval of a client; inf if none has scraped twice."""
        shortest = math.inf
        for last, interval in self.asked.values():
            if interval < shortest and now - last <= 4 * interval + 5:
                shortest = interval
        return shortest


class Governor:
    """Limits the CPU time of the agent and its commands to a share of one CPU.

    Over the budget it stretches the lifetimes of all values, so that less is collected; under it
    they shrink back. A burst as large as 30 s of the budget goes through.
    """

    def __init__(self, cpu: Callable[[], float] = cpu_seconds,
                 now: Callable[[], float] = time.monotonic) -> None:
        self._cpu, self._now = cpu, now
        self._last = (now(), cpu())
        self.used = 0.0                 # share of one CPU, over the last seconds
        self.debt = 0.0                 # CPU seconds above the budget, to be saved
        self.stretch = 1.0

    def look(self, budget: float | None) -> None:
        """Measure, and adapt."""
        now, cpu = self._now(), self._cpu()
        passed = now - self._last[0]
        if passed <= 0:
            return
        share = (cpu - self._last[1]) / passed
        self._last = (now, cpu)
        self.used += (share - self.used) * min(passed / 5.0, 1.0)
        if budget is None:
            self.debt, self.stretch = 0.0, 1.0
            return
        most = BURST_SECONDS * budget
        self.debt = min(max(self.debt + (share - budget) * passed, 0.0), 2 * most)
        if self.used > budget and self.debt > most:     # as far as `used` remembers
            grown = min(self.used / budget, 1.5) ** min(passed, 5.0)
            self.stretch = min(self.stretch * grown, LONGEST_STRETCH)
        elif self.used < 0.8 * budget and self.debt <= most:    # not between two scrapes
            self.stretch = max(self.stretch * 0.9 ** min(passed, 60.0), 1.0)


class Plugin(NamedTuple):
    """An operator's program, as its folder and plugin.json describe it."""
    name: str
    path: str
    prom: bool
    timeout: float
    ttl: float
    zones: frozenset[str] | None     # None: all


class Inherited:
    """What OWN_NODE says: counted by the server's thread, sent at the end of the node's page."""
    BOUNDS = (0.001, 0.01, 0.1, 1, 10)
    LABELS: Labels = (("service", "cmon-agent"),)

    def __init__(self) -> None:
        collected, total = OWN_NODE[:2]
        self.collected = Histogram(collected.name, help_of(collected), self.BOUNDS, ("collector",))
        self.total = Histogram(total.name, help_of(total), self.BOUNDS, ())
        self.asked = self.ready = 0

    def families(self, kept: int) -> list[Family]:
        """The families; buckets are named as the original's library does, without `_bucket`."""
        made = [Family(name, kind, help_text, [
            Sample(self.LABELS + labels, value, suffix.replace("_bucket", ""))
            for labels, value, suffix in sorted(samples, key=lambda sample: [
                pair for pair in sample.labels if pair[0] != "le"])])
            for name, kind, help_text, samples in (self.collected.family(), self.total.family())]
        return made + [
            family_of(metric, [Sample(self.LABELS, value)])
            for metric, value in zip(OWN_NODE[2:], (kept, self.asked, self.ready))]


PLUGIN_OUTPUT = 500 << 10
PLUGINS_MOST = 100
PLUGIN_CONFIG = "plugin.json"


def find_plugins(folder: str, problems: list[str]) -> list[Plugin]:
    """The plugins of a folder; unsafe ones are left out and reported."""
    try:
        status = os.stat(folder)
        names = set(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{folder}: {reason_of(error)}")
        return []
    if not stat.S_ISDIR(status.st_mode) or not _is_owned(status):
        problems.append(f"{folder}: must be a folder that root owns and nobody else can write to")
        return []
    options: Any = {}
    if PLUGIN_CONFIG in names:
        try:
            options = read_json(os.path.join(folder, PLUGIN_CONFIG))
        except ConfigError as error:
            problems += error.problems
    plugins: dict[str, Plugin] = {}
    for file_name in sorted(names - {PLUGIN_CONFIG}):
        path = os.path.join(folder, file_name)
        try:
            status = os.stat(path)
        except OSError as error:
            problems.append(f"{path}: {reason_of(error)}")
            continue
        plugin = _plugin(path, file_name, options)
        if not stat.S_ISREG(status.st_mode) or not status.st_mode & 0o111:
            continue                        # notes and unfinished files
        if not _is_owned(status):
            problems.append(f"{path}: must belong to root, and nobody else may write to it")
        elif plugin is None:
            problems.append(f"{path}: its name, or what {PLUGIN_CONFIG} says of it, cannot be used")
        elif plugin.name in plugins:
            problems.append(f"{path}: there is another plugin {plugin.name}")
        elif len(plugins) >= PLUGINS_MOST:
            problems.append(f"{folder}: more than {PLUGINS_MOST} plugins; {file_name} does not run")
        else:
            plugins[plugin.name] = plugin
    return list(plugins.values())


def _is_owned(status: os.stat_result) -> bool:
    """Whether it belongs to root or the agent's user, and is not writable by others."""
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def _plugin(path: str, file_name: str, options: Any) -> Plugin | None:
    name = file_name.rpartition(".")[0] or file_name
    name = name[:-5] if name.endswith(".prom") else name
    if not re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", name):
        return None
    name = re.sub(r"[.-]", "_", name)
    options_of_file = options.get(file_name, {}) if isinstance(options, dict) else None
    if not isinstance(options_of_file, dict):
        return None
    timeout, ttl = options_of_file.get("timeout", 3000), options_of_file.get("ttl", 60)
    zones = options_of_file.get("vms")
    if type(timeout) not in (int, float) or not 0 < timeout <= 3_600_000:
        return None
    if type(ttl) not in (int, float) or not 0 <= ttl < math.inf:    # 0: never cached
        return None
    if zones is not None and not (isinstance(zones, list)
                                  and all(isinstance(zone, str) for zone in zones)):
        return None
    return Plugin(name, path, ".prom" in file_name, timeout / 1000, float(ttl),
                  None if zones is None else frozenset(zones))


TIME_TEMPLATE = render([family_of(TIME_OF_DAY, [Sample((), 0)])]).replace(" 0\n", " %s\n")


class PageLayout(NamedTuple):
    """A page but for its values. They are put between the texts: `%` looks at each character of a
    template, which takes 50 times as long."""
    texts: list[bytes]                          # and at each odd place one for a value
    order: Taking                               # the values as they are on the page
    missing: tuple[str, ...]                    # collectors without values


@functools.lru_cache(maxsize=MAX_TEMPLATES)
def page_layout(kind: Kind, shown: tuple[Any, ...], notes: tuple[tuple[str, str], ...]
                ) -> PageLayout:
    """A whole page: the parts of its collectors, each with its meta-metrics; then the time, ages,
    and which collectors work.

    `shown` are forms, each followed by whether its collectors work. The time and its age come first
    among the values; then those of each form and after them whether they were cached, the seconds
    that they took, and their age. `notes` say why some collectors have nothing yet.
    """
    by_name: dict[str, tuple[str, range, int, bool]] = {}
    size = 2
    for form, up in zip(shown[::2], shown[1::2]):
        for name, template, place in zip(form.names, form.templates, form.places):
            by_name.setdefault(name, (template, range(size + place.start, size + place.stop),
                                      size + form.size, up))
        size += form.size + 3
    text_: list[str] = []
    order: list[int] = []

    def meta(collector: str, *values: str) -> None:
        for metric, value in zip(META, values):
            name = metric.name.format(collector)
            text_.append(_head(name, metric.kind, metric.help) + f"{name} {value}\n")
    for collector in kind.names:
        if collector in by_name:
            template, places, cached, _ = by_name[collector]
            text_.append(template)
            meta(collector, "1" if template else "0", "%s", "%s")
            order += (*places, cached, cached + 1)
        else:
            meta(collector, "0", "0", "0.0")
    text_.append(TIME_TEMPLATE)
    order.append(0)
    meta("time", "1", "0", "0.0")
    text_.append(_head(SAMPLE_AGE.name, SAMPLE_AGE.kind, SAMPLE_AGE.help))
    for collector in kind.names:
        if collector in by_name:
            text_.append(f'{SAMPLE_AGE.name}{{collector="{collector}"}} %s\n')
            order.append(by_name[collector][2] + 2)
    text_.append(f'{SAMPLE_AGE.name}{{collector="time"}} %s\n')
    order.append(1)
    text_.append(_head(COLLECTOR_UP.name, COLLECTOR_UP.kind, COLLECTOR_UP.help))
    missing = tuple([name for name in kind.names if name not in by_name or not by_name[name][3]])
    why = dict(notes)
    for name in (*kind.names, "time"):
        text_.append(f'{COLLECTOR_UP.name}{{collector="{name}"}} {0 if name in missing else 1}\n')
        if name in missing and why.get(name):   # as a comment: a label would make it another series
            text_.append(f"# {name}: {why[name]}\n".replace("%", "%%"))
    texts = [b""] * (2 * len(order) + 1)
    texts[::2] = [piece.replace("\0", "%").encode()
                  for piece in "".join(text_).replace("%%", "\0").split("%s")]
    return PageLayout(texts, operator.itemgetter(*order), missing)


class KstatParts:
    """From raw kstats to parts of pages, and what has to be remembered for that."""

    def __init__(self, host: Host, now: Callable[[], float]) -> None:
        self._host, self._now = host, now
        # Boots of zones: labels of their links, None for links that go without.
        self._labels: dict[tuple[str, int], Mapping[str, tuple[str, str]] | None] = {}
        self._unlabelled: dict[tuple[str, int], float] = {}     # zones without labels yet -> since
        self._vminfo: tuple[Kstat, ...] = ()    # of the last node pages: it counts by the second

    def zone(self, wants: Wants, zone: str, reading: Reading) -> Came:
        """What collectors send of a zone."""
        return each_from_kstats(wants, reading, ZoneContext(
            reading.zone_id, zone.encode(),
            functools.partial(self._nics, zone, reading.zone_id)))

    def node(self, wants: Wants, reading: Reading) -> Came:
        """What collectors send of the node."""
        context = NodeContext(self._host.page_size, self._vminfo)
        self._vminfo = vminfo_readings(reading.kstats, self._vminfo)
        return each_from_kstats(wants, reading, context)

    def _nics(self, zone: str, zone_id: int) -> Mapping[str, tuple[str, str]] | None:
        """The labels of a zone's links; None: none; raises NotYet while that is not decided.

        Labels that are known stay for the boot of the zone, since such as come and go break every
        rate. Without them links wait as long as vminfod can be expected to know them.
        """
        vms, key, now = self._host.vms, (zone, zone_id), self._now()
        vm = vms.vms.get(zone)
        if vm is not None and (vm.nics or key not in self._labels):
            if len(self._labels) > 20_000:
                self._labels.clear()
            self._unlabelled.pop(key, None)
            self._labels[key] = vm.nics
        elif key not in self._labels and not vms.absent:
            problem = vms.problem
            if len(self._unlabelled) > 20_000:
                self._unlabelled.clear()
            if problem or not vms.answered:             # unavailable: it may know the zone later
                self._unlabelled[key] = now
            if now - self._unlabelled.setdefault(key, now) < NICS_SECONDS:
                raise NotYet("vminfod has not reported this zone's NICs yet"
                             + (f" ({problem})" if problem else ""))
        return self._labels.get(key)


class Scraper:
    """All pages, and the work that fills them. Belongs to the loop; pools hand over what they bring
    by `call_soon`."""

    def __init__(self, settings: Settings, host: Host, server: Server,
                 registry: Registry, sysinfo: Sysinfo) -> None:
        self.settings, self.host, self.server = settings, host, server
        self.kstats = KstatThreads(host.open_kstats, server.loop)
        self.governor = Governor()
        self._commands = Pool("command", 6)     # zfs, zpool, ntp, zoneadm: each has a thread
        self._foreign = Pool("plugin", settings.max_collections, 10_000)
        self._pages: dict[tuple[str, bool], Page] = {}
        self._shared: dict[str, Cell] = {}      # those of all pages, by collector
        self._running = 0                       # running jobs
        self._unknown: dict[str, float] = {}    # failed lookups of zones -> until when
        self._plugins: dict[str, list[Plugin]] = {"gz": [], "vm": []}
        self._lifetimes: dict[str, float] = {}  # requested by plugins
        self._told: dict[str, set[str]] = {}    # logged problems, by source
        self.sysinfo = sysinfo
        self.inherited = Inherited()
        self._debug_ids: dict[str, int] = {}    # zone -> its debug id, from zoneadm
        self._rereading = False                 # whether zoneadm is running for them
        self.generation = 0                     # of the collectors of pages
        # of pages that are alike
        self._collectors: dict[tuple[Any, ...], tuple[tuple[Collector, ...], Kind]] = {}
        self._collections: dict[tuple[tuple[str, ...], str], int] = {}  # by collectors and result
        self.problems = registry.counter(
            "cmon_agent_input_problems_total", "Lines and families of plugins, text files and "
            "core zones that were left out.", "source")
        self._parts = KstatParts(host, server.now)
        registry.collect(self._own_families)
        self._reads: list[Job] = []             # gathered reads
        self._reads_begin = -math.inf           # when they begin, if they are not too many before,
        self._gathering: int | None = None      # and the timer for that
        self._waiters = 0                       # clients that wait meanwhile: one a read, or more
        self._rate = 0.0                        # reads a second before the last look …
        self._rate_now = 0                      # … and reads since
        self._next_look = self._last_look = 0.0
        self._sent: list[Page] = []             # pages whose whole answer is kept
        server.loop.every(60.0, self._forget)

    # settings and periodic work

    def start(self) -> None:
        """Read what scrapes do not read."""
        self.host.start()
        self._reread_plugins()
        self.server.loop.every(60.0, self._reread_plugins)
        self._reread_zones()
        self.server.loop.every(60.0, self._reread_zones)

    def use(self, settings: Settings) -> None:
        """Apply new settings."""
        self.settings = settings
        self._foreign.resize(settings.max_collections)
        self.host.commands_of = dict(settings.commands)
        for cell in self.all_cells():           # the cause of a failure may have been repaired
            cell.mend()
        self._renew()
        self._reread_plugins()

    def _renew(self) -> None:
        """The collectors of pages may have changed."""
        self.generation += 1

    def _reread_plugins(self) -> None:
        if not self.host.recorded:
            self.server.spawn(self._look_for_plugins, dict(self.settings.plugin_dirs))

    def _look_for_plugins(self, folders: Mapping[str, str]) -> None:
        problems: list[str] = []
        plugins = {kind: find_plugins(folder, problems) for kind, folder in folders.items()}
        self.server.loop.call_soon(self._take_plugins, plugins, problems)

    def _take_plugins(self, plugins: dict[str, list[Plugin]], problems: list[str]) -> None:
        self.tell("plugin", problems)
        if plugins != self._plugins:
            self._plugins = plugins
            for page in self._pages.values():   # a name may now belong to another plugin
                page.cells = tuple([cell for cell in page.cells
                                    if not cell.name.startswith("plugin_")])
            self._lifetimes = {}
            self._renew()

    def _reread_zones(self) -> None:
        """Debug ids of bhyve zones, off the scrape path."""
        timeout = self._configured(next(row for row in NODE_COLLECTORS
                                        if row.collect is collect_zones)).timeout

        def read() -> None:
            debug_ids: dict[str, int] = {}
            try:
                output = self.host.run("zoneadm", ZONEADM_COMMAND, timeout)
                debug_ids = {row.name: row.debug_id for row in parse_zoneadm(output.stdout)
                         if row.debug_id is not None}
            except (CommandError, CollectError) as error:
                self.server.loop.call_soon(self.tell, "zoneadm", [str(error)])
            self.server.loop.call_soon(take, debug_ids)

        def take(debug_ids: Mapping[str, int]) -> None:
            self._debug_ids = dict(debug_ids) or self._debug_ids
            self._rereading = False
        if not self._rereading:             # once, even with many refresh requests
            self._rereading = self._commands.submit(read)

    def tell(self, source: str, problems: Sequence[str]) -> None:
        """Count problems in foreign text, and log each once."""
        if problems:
            self.problems.add(len(problems), source)
        for problem in problems:
            told = self._told.setdefault(source, set())
            if len(told) < 100 and problem not in told:
                told.add(problem)
                log.warning("%s", problem)

    # requests for pages

    def ask(self, zone: str, core: bool | None, client: str, seconds: float) -> Answer | Deferred:
        """The page of a zone, or NODE's: at once, or within so many seconds. `core`: whether the
        zone's own ports are asked, too; None: as vminfod says. Raises Refused."""
        now = self.server.now()
        page = self._page(zone, core, now)
        often = now - page.used < PREPARED_SECONDS      # asked for just before
        if not self.server.resuming:
            self.inherited.asked += 1
            page.seen(client, now)
        if page.prepared is not None and now < page.until:
            self.inherited.ready += 1
            return page.prepared
        awaited = self._collect(page, now)
        if self._pages.get(page.key) is not page:
            raise self._no_zone(zone)
        if awaited:
            return self._wait(page, awaited, now, now + seconds)
        if not page.has_values():
            raise Refused(503, f"cannot collect metrics of {zone}: " + self._why(page),
                          ("Retry-After", "5"), code="not_collected")
        if page.checked >= now:                 # its kstats have been read just now
            after = self.server.now()
            self.inherited.total.observe(after - now)
            return self._answer(page, after, now)
        self.inherited.ready += 1
        if now - page.checked >= KSTAT_SECONDS and zone != NODE:
            self._check_that_it_runs(page, now)
        answer = self._answer(page, now, now)
        return self._keep(page, answer, now) if often else answer

    def bring(self, zone: str, deadline: float) -> Deferred | None:
        """As `ask`, for the page of all zones: the answer to wait for, if any."""
        now = self.server.now()
        page = self._page(zone, None, now)
        page.seen("all zones", now)
        awaited = self._collect(page, now, at_once=False)
        return self._wait(page, awaited, now, deadline) if awaited else None

    def _page(self, zone: str, core: bool | None, now: float) -> Page:
        """The page that somebody asks for."""
        if now >= self._next_look:
            self.look(now)
        key = (zone, self._is_core(zone) if core is None else core)
        page = self._pages.get(key)
        if page is None:
            if zone != NODE and not UUID.fullmatch(zone):
                raise Refused(404, NO_UUID, code="no_such_zone")
            if self._unknown.get(zone, 0.0) > now:
                raise self._no_zone(zone)
            page = self._pages[key] = Page(*key, now)
        return page

    def _wait(self, page: Page, awaited: set[Cell], now: float, deadline: float) -> Deferred:
        """The page, once these cells have values."""
        if self._reads:
            self._waiters += 1
            if deadline - now <= HURRY_SECONDS or self._waiters == GATHER_MOST:
                self._begin_reads()
        later = Deferred(deadline, lambda later: self._partial(page, later))
        if not page.waiting:
            page.waiting_since = now
        page.waiting[later] = awaited
        return later

    def _is_core(self, zone: str) -> bool:
        vm = self.host.vms.vms.get(zone)
        return vm is not None and vm.core

    def _check_that_it_runs(self, page: Page, now: float) -> None:
        """Lifetimes may be long by settings or by the governor: drop the page of a zone that has
        stopped all the same. It takes no read of a kstat."""
        page.checked = now

        zone = page.zone

        def look(reader: Reader) -> int | None:
            reader.follow()
            return reader.zone_id(zone)

        def drop(zone_id: Any) -> None:
            if zone_id is None and not page.waiting:
                self._pages.pop(page.key, None)
        self.kstats.submit(Job(look, drop))

    def _no_zone(self, zone: str) -> Refused:
        return Refused(404, f"zone {zone} is not running on this compute node; / lists the "
                       "running zones", code="no_such_zone")

    def _why(self, page: Page) -> str:
        return "; ".join(sorted({trouble.why for cell in page.cells
                                 for trouble in cell.troubles.values()}))[:500] \
            or "it is not due yet"

    def _collect(self, page: Page, now: float, at_once: bool = True) -> set[Cell]:
        """Start what is due; return the cells that this page waits for. Kstats are read at once, or
        soon."""
        if page.generation != self.generation:
            self._furnish(page)
        awaited: set[Cell] = set()
        for cell in page.cells:
            if cell.began is None:
                if not self._is_due(cell, page, now) or not (
                        cell.name == KSTATS or cell.shared or page.is_proved()):
                    continue
                cell.pages = (page,)
                self._begin(cell, page, now, at_once)
                if cell.began is None:          # and done
                    continue
            elif page not in cell.pages:
                cell.pages += (page,)
            if not cell.late:
                awaited.add(cell)
        return awaited

    def lifetime(self, cell: Cell, page: Page, now: float) -> float:
        """The lifetime of a cell's values; for kstats it depends on the clients' intervals."""
        seconds = cell.lifetime
        if cell.name == KSTATS:
            seconds = max(min(seconds, INTERVAL_SHARE * page.interval(now)), LEAST_LIFETIME)
        return max(seconds * self.governor.stretch, self.settings.min_poll_interval)

    def _is_due(self, cell: Cell, page: Page, now: float) -> bool:
        if cell.troubles:
            if any([self._may_retry(trouble, cell, now) for trouble in cell.troubles.values()]):
                return True
            if len(cell.troubles) == len(cell.collectors):
                return False
        if cell.shared and page.zone not in cell.by_zone.parts and self._is_older(cell, page, now):
            return True
        age = now - cell.at
        return (age >= cell.lifetime or cell.name == KSTATS) \
            and age >= self.lifetime(cell, page, now)

    def _may_retry(self, trouble: Trouble, cell: Cell, now: float) -> bool:
        if trouble.breaker is not None and trouble.breaker.retry_seconds > 0:
            return False
        seconds = max(LEAST_LIFETIME, cell.lifetime if cell.collectors[0].patient else 0.0)
        return now - trouble.tried >= max(seconds * self.governor.stretch,
                                          self.settings.min_poll_interval)

    @staticmethod
    def _is_older(cell: Cell, page: Page, now: float) -> bool:
        """Whether a list that lacks this zone is incomplete, or was made before the zone came."""
        return (not cell.by_zone.complete or cell.at < page.since) \
            and now - cell.at > NEW_DATASET_SECONDS

    # results

    def _begin(self, cell: Cell, page: Page, now: float, at_once: bool) -> None:
        """Start the work of a cell."""
        cell.began = now
        self._running += 1
        if cell.name != KSTATS:
            self._begin_function(cell, page)
            return
        self._rate_now += 1
        job = self._job(cell, page)
        if not at_once:
            self.kstats.submit(job)
        elif self._rate < BUSY_RATE or now >= self._reads_begin:
            self._reads_begin = now + GATHER_SECONDS
            self.kstats.perform(job)
        else:
            self._reads.append(job)
            if len(self._reads) == 1:
                self._gathering = self.server.loop.call_later(
                    self._reads_begin - now, self._have_gathered)

    def _have_gathered(self) -> None:
        self._gathering = None
        if len(self._reads) == 1:       # gathering had no effect, as with a sequential client
            self._rate = 0.0
        self._begin_reads()

    def _begin_reads(self) -> None:
        """Do the gathered reads."""
        if self._gathering is not None:
            self.server.loop.cancel(self._gathering)
            self._gathering = None
        jobs, self._reads, self._waiters = self._reads, [], 0
        self._reads_begin = self.server.now() + GATHER_SECONDS
        for job in jobs:
            self.kstats.submit(job)

    def _job(self, cell: Cell, page: Page) -> Job:
        """Reading what the page's tables want."""
        zone, wants, parts = page.zone, cell.wants, self._parts
        skipped = NO_NAMES
        if cell.troubles:
            skipped = frozenset([name for name, trouble in cell.troubles.items()
                                 if trouble.breaker is not None and not trouble.breaker.allows()])
            wants = tuple([want for want in wants if want[0] not in skipped])
        vm = self.host.vms.vms.get(zone)
        debug_id = self._debug_ids.get(zone) if vm is None or vm.brand == "bhyve" else None

        def work(reader: Reader) -> Reading:
            return read_zone(reader, zone, debug_id, skipped) if zone != NODE else \
                read_tables(reader, *[table for _, tables in wants for table in tables])

        def done(read: Any) -> None:
            came: Came | NoSuchZone
            if isinstance(read, NoSuchZone):
                came = read
            elif isinstance(read, Exception):
                came = Came(NO_FORM, "", {name: read for name, _ in cell.wants})
            else:
                came = parts.node(wants, read) if zone == NODE else parts.zone(wants, zone, read)
            self._arrived(cell, came, self.server.now())
        return Job(work, done)

    def _begin_function(self, cell: Cell, page: Page) -> None:
        """Run a collector's function in a pool and report any outcome."""
        collector = cell.collectors[0]
        assert collector.collect is not None
        task = Task(self.host, self.host.run, page.zone, collector.timeout, self.pool,
                    self._wait_for, self.server.now)

        def work() -> None:
            result: Found | Exception
            try:
                assert collector.collect is not None
                result = collector.collect(task)
            except (CollectError, CommandError, ClientError, KstatError) as error:
                result = error
            except Exception as error:      # an internal error affects one collector
                result = _bug(collector.name, error)
            self.server.loop.call_soon(self._arrived, cell, result, self.server.now())
        if not (self._foreign if collector.foreign else self._commands).submit(work):
            self.server.loop.call_soon(self._arrived, cell, CollectError(
                "too many collections wait already"), self.server.now())

    def _wait_for(self, work: Callable[[Reader], Any]) -> Any:
        """In a pool: kstats that belong to a command's output."""
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.kstats.submit(Job(work, done.put))
        try:
            result = done.get(timeout=5.0)
        except queue.Empty:
            raise CollectError("reading kstats took longer than 5 s") from None
        if isinstance(result, Exception):
            raise CollectError(str(result))
        return result

    def _arrived(self, cell: Cell, brought: Came | Found | Exception, at: float) -> None:
        """A job has ended: store its result, and answer clients that waited only for it."""
        now, pages, began = self.server.now(), cell.pages, cell.began or 0.0
        self._running -= 1
        self.inherited.collected.observe(
            now - began, "plugin" if cell.name.startswith("plugin_") else cell.name)
        cell.began, cell.late, cell.pages = None, False, ()
        if isinstance(brought, NoSuchZone):
            for page in pages:
                self._gone(page, now)
            return
        was_proved = cell.proved
        self._take(cell, pages[0], brought, at, b"%.6f" % (at - began))
        for page in pages:
            if cell.name == KSTATS:
                page.checked = now
            if page.waiting:
                if cell.proved > was_proved:
                    more = self._collect(page, now)     # its plugins, its files, its ports
                    for needed in page.waiting.values():
                        needed |= more
                self._release(page, cell, now)

    def _gone(self, page: Page, now: float) -> None:
        """The zone is not running."""
        waiting, page.waiting = page.waiting, {}
        self._pages.pop(page.key, None)
        if len(self._unknown) > 1000:
            self._unknown.clear()
        self._unknown[page.zone] = now + UNKNOWN_SECONDS
        for later in waiting:
            later.finish(self._no_zone(page.zone).answer())

    def _take(self, cell: Cell, page: Page, brought: Came | Found | Exception, at: float,
              seconds: bytes) -> None:
        """Store new values; keep the old ones of collectors that failed or were left out."""
        where = "all zones" if cell.shared else page.zone
        form, values, failed = brought if isinstance(brought, Came) else \
            self._came(cell, page, brought)
        if form.names and values.count(BETWEEN) != form.size - 1:   # a bug: drop the values
            failed = {**failed, **dict.fromkeys(form.names, CollectError("values do not fit"))}
            form = NO_FORM
        sources = [Source.of(form, values, at, seconds, True)] if form.names else []
        for source in cell.sources:
            rest = None if source.form is form else rest_of(source.form, form)
            if rest is not None:
                sources.append(Source(rest, source.values, source.at, source.seconds, False))
        cell.sources, cell.of_zones = tuple(sources), {}
        cell.proved = cell.proved or not PROOFS.isdisjoint(form.names)
        if form.names:
            cell.at, cell.seconds = at, seconds
            self._count(form.names, "ok")
        for name in form.names if cell.troubles else ():
            if cell.troubles.pop(name, None) is not None:
                log.info("collector %s of %s works again", name, where)
        for name, error in failed.items():
            self._failed(cell, name, where, error)

    def _came(self, cell: Cell, page: Page, brought: Found | Exception) -> Came:
        """The result of a collector's function."""
        if isinstance(brought, Exception):
            return Came(NO_FORM, "", {cell.name: brought})
        if isinstance(brought, Brought):
            brought = self._admitted(cell, page, brought)
        elif isinstance(brought, Shared):
            self.tell(cell.name, brought.problems)
            cell.by_zone, brought = brought, NOTHING
        return Came(form_of((cell.name,), (brought.template,)), brought.values, {})

    def _admitted(self, cell: Cell, page: Page, brought: Brought) -> Part:
        """Foreign metrics, without names that another source uses on this page."""
        name = cell.name
        taken = {taken: other.name for other in page.cells if other is not cell
                 for taken in other.claims}
        problems = list(brought.problems)
        kept: list[Foreign] = []
        for family in brought.families:
            other = next((taken[claim] for claim in family.names() if claim in taken), None)
            if other is None:
                kept.append(family)
            else:
                problems.append(f"{name}: {family.name} is already on the page of {page.zone}, "
                                f"by {other}")
        self.tell(name, problems)
        if brought.ttl is not None and self._lifetimes.get(name) != brought.ttl:
            self._lifetimes[name] = brought.ttl
            self._renew()
        cell.claims = frozenset().union(*(family.names() for family in kept))
        return verbatim("".join(family.text for family in kept))

    def _count(self, names: tuple[str, ...], result: str) -> None:
        key = (names, result)
        self._collections[key] = self._collections.get(key, 0) + 1

    def _failed(self, cell: Cell, name: str, where: str, error: Exception) -> None:
        trouble, now = cell.troubles.setdefault(name, Trouble()), self.server.now()
        before, trouble.why, trouble.tried = trouble.why, str(error), now
        if isinstance(error, NotYet):
            return
        self._count((name,), "failed")
        if not before:
            log.warning("collector %s of %s failed: %s", name, where, trouble.why)
        if trouble.breaker is None:
            trouble.breaker = Breaker(self.server.now)
        trouble.breaker.failed(trouble.why)

    # answers

    def _release(self, page: Page, cell: Cell, now: float) -> None:
        """Answer the clients that waited only for this cell, with the same bytes."""
        for needed in page.waiting.values():
            needed.discard(cell)
        ready = [later for later, needed in page.waiting.items() if not needed]
        if not ready:
            return
        for later in ready:
            del page.waiting[later]
        self.inherited.total.observe(now - page.waiting_since)
        answer: Answer
        if page.has_values():
            answer = prepare(self._answer(page, now, page.waiting_since))
        else:
            answer = text(503, f"cannot collect metrics of {page.zone}: {self._why(page)}; "
                          "try again in a few seconds", ("Retry-After", "5"),
                          ("X-Cmon-Error", "not_collected"))
        page.prepared = None
        for later in ready:
            later.finish(answer)

    def give_up(self, page: Page, later: Deferred) -> None:
        """A client's deadline has passed: mark the cells it waited for as late."""
        for cell in page.waiting.pop(later, ()):
            cell.late = cell.began is not None

    def _partial(self, page: Page, later: Deferred) -> Answer:
        """Deadline passed: answer with what there is."""
        now, since = self.server.now(), page.waiting_since
        self.give_up(page, later)
        if not page.has_values():
            return text(503, f"collecting {page.zone} takes longer than the scrape timeout: "
                        "try again in a few seconds", ("Retry-After", "5"),
                        ("X-Cmon-Error", "not_collected"))
        return self._answer(page, now, since)

    def _answer(self, page: Page, now: float, since: float) -> Response:
        shown, missing = self.body(page, now, since)
        # lets the proxy report incomplete scrapes without parsing the page
        headers = (("X-Cmon-Partial", ",".join(missing)),) if missing else ()
        return _make(Response, (200, shown, PAGE, headers))

    def body(self, page: Page, now: float, since: float) -> tuple[bytes, tuple[str, ...]]:
        """The page, and which of its collectors do not work; what came after `since` was
        not in the cache."""
        forms: list[Any] = []
        values = [b"%d" % (self.host.time() * 1000), b"0.0"]
        notes: tuple[tuple[str, str], ...] = ()
        for cell in page.cells:
            if cell.troubles:
                notes += tuple([(name, trouble.note) for name, trouble in cell.troubles.items()])
            for form, raw, at, seconds, up in (
                    cell.sources if not cell.shared else
                    cell.of_zones.get(page.zone) or self._of_zone(cell, page, now)):
                age = now - at
                if age > STALE_SECONDS and age > 3 * self.lifetime(cell, page, now):
                    continue
                forms += (form, up and not cell.late)
                values += raw.split(APART)
                values += (b"1" if at < since else b"0", seconds, b"%.3f" % age)
        texts, order, missing = page_layout(page.kind, tuple(forms), notes)
        texts = texts.copy()
        texts[1::2] = order(values)
        shown = b"".join(texts)
        if page.zone == NODE:
            shown += render(self.inherited.families(sum(
                [len(source.form.names) for cell in self.all_cells() for source in cell.sources])
                )).encode()
        return shown, missing

    def _of_zone(self, cell: Cell, page: Page, now: float) -> tuple[Source, ...]:
        """This zone's part of a collector for all zones."""
        part = cell.by_zone.parts.get(page.zone)
        if not cell.sources or part is None and (
                not cell.by_zone.complete or self._is_older(cell, page, now)):
            return ()
        template, values = part or NOTHING
        found = (Source.of(form_of((cell.name,), (template,)), values, cell.at, cell.seconds,
                           not cell.troubles),)
        if part is not None:
            cell.of_zones[page.zone] = found
        return found

    # the collectors of pages

    def _furnish(self, page: Page) -> None:
        """Update a page's collectors; those that remain keep their values."""
        plugins = [plugin for plugin in self._plugins["gz" if page.zone == NODE else "vm"]
                   if plugin.zones is None or page.zone in plugin.zones]
        key = (self.generation, page.zone == NODE, page.core, *(plugin.name for plugin in plugins))
        known = self._collectors.get(key)
        if known is None:
            if len(self._collectors) > 100:
                self._collectors.clear()
            rows = tuple(self._rows(page, plugins))
            known = self._collectors[key] = (rows, kind_of(tuple([row.name for row in rows])))
        rows, page.kind = known
        reading = tuple([row for row in rows if row.collect is None])
        groups = [reading] if any([row.tables for row in reading]) else []
        groups += [(row,) for row in rows if row.collect is not None]
        before = {cell.name: cell for cell in page.cells}
        cells: list[Cell] = []
        for group in groups:
            known_cells = self._shared if group[0].shared else before
            name = group[0].name if group[0].collect else KSTATS
            if name in known_cells:
                known_cells[name].use(group)
            else:
                known_cells[name] = Cell(group)
            cells.append(known_cells[name])
        page.cells = tuple(cells)
        page.proof = None if page.zone == NODE else next(
            (cell for cell in cells if cell.name == KSTATS), None)
        page.generation = self.generation

    def _rows(self, page: Page, plugins: Sequence[Plugin]) -> Iterator[Collector]:
        """The collectors of a page in page order, according to the settings."""
        rows = [*(NODE_COLLECTORS if page.zone == NODE else ZONE_COLLECTORS)]
        rows.remove(TIME)
        for plugin in sorted(plugins):
            others = tuple(f"plugin_{other.name}_" for other in plugins
                           if other.name.startswith(plugin.name + "_"))
            name = f"plugin_{plugin.name}"
            rows.append(Collector(
                name, functools.partial(collect_plugin, plugin, others),
                self._lifetimes.get(name, plugin.ttl), timeout=plugin.timeout, foreign=True,
                patient=True))
        for row in rows:
            configured = self.settings.collectors.get(row.name)
            if configured is not None and not configured.enabled or (
                    row.collect is collect_textfiles and not self.settings.textfiles):
                continue
            if row.collect is collect_core and not page.core:
                row = row._replace(collect=None)        # empty
            yield self._configured(row)

    def _configured(self, row: Collector) -> Collector:
        """A collector with the lifetime and the timeout of the settings."""
        configured = self.settings.collectors.get(row.name, CollectorSettings())
        ttl, timeout = configured.ttl, configured.timeout
        return row._replace(lifetime=row.lifetime if ttl is None else ttl,
                            timeout=row.timeout if timeout is None else timeout)

    # housekeeping

    @property
    def pool(self) -> str:
        """The system pool."""
        return self.settings.pool or self.sysinfo.pool or "zones"

    def refresh(self) -> None:
        """For an operator, or the proxy after a change: collect everything again."""
        for cell in self._shared.values():
            cell.forget()
        for page in [page for page in self._pages.values() if page.zone != NODE]:
            cells = [cell for cell in page.cells if not cell.shared]
            page.prepared = None
            if not page.waiting and all(cell.began is None for cell in cells):
                del self._pages[page.key]
            for cell in cells:
                if page.waiting:
                    cell.mend()
                else:
                    cell.forget()
        self._unknown.clear()
        self._reread_zones()
        self.kstats.submit(Job(
            lambda reader: reader.follow(force=True) or reader.reopen(force=True),
            lambda _result: None))

    def pages_of(self, zone: str) -> list[Page]:
        """The cached pages of a zone: with and without its own ports."""
        return [page for core in (False, True) for page in (self._pages.get((zone, core)),)
                if page is not None]

    def all_cells(self) -> Iterator[Cell]:
        """The cells of all cached pages."""
        yield from self._shared.values()
        for page in self._pages.values():
            yield from [cell for cell in page.cells if not cell.shared]

    def broken(self) -> list[tuple[str, str, Trouble]]:
        """The failing collectors, and where they fail."""
        places = [("all zones", cell) for cell in self._shared.values()] + [
            (page.zone, cell) for page in self._pages.values() for cell in page.cells
            if not cell.shared]
        return [(where, name, trouble) for where, cell in places
                for name, trouble in cell.troubles.items()]

    def texts(self, zones: Iterable[str]) -> dict[str, str]:
        """The pages of these zones as text, if they have values."""
        now = self.server.now()
        pages = ((zone, self._pages.get((zone, self._is_core(zone)))) for zone in zones)
        return {zone: self.body(page, now, math.inf)[0].decode() for zone, page in pages
                if page is not None and page.has_values()}

    def look(self, now: float) -> None:
        """Now and then, and only when somebody asks: look at the budget, and how much is read. An
        idle agent sleeps."""
        if now < self._next_look:
            return
        self.governor.look(self.settings.cpu_budget)
        passed = now - self._last_look
        self._rate, self._rate_now = self._rate_now / passed if passed < 2 * LOOK_SECONDS else 0, 0
        self._last_look, self._next_look = now, now + LOOK_SECONDS

    def _keep(self, page: Page, answer: Response, now: float) -> Prepared:
        """Send a whole answer again for a while."""
        page.prepared, page.until = prepare(answer), now + PREPARED_SECONDS
        if not self._sent:
            self.server.loop.call_later(1.0, self._drop)
        self._sent.append(page)
        return page.prepared

    def _drop(self) -> None:
        """Let go of answers that are too old to send."""
        now, sent, self._sent = self.server.now(), self._sent, []
        for page in sent:
            if now >= page.until:
                page.prepared = None
            elif page.prepared is not None:
                self._sent.append(page)
        if self._sent:
            self.server.loop.call_later(1.0, self._drop)

    def _forget(self) -> None:
        """Let go of pages that nobody wants."""
        now = self.server.now()
        for key, page in list(self._pages.items()):
            if now - page.used > FORGET_SECONDS and not page.waiting:
                del self._pages[key]

    def _own_families(self) -> list[Family]:
        self.look(self.server.now())
        kstats, governor = self.kstats, self.governor
        kstats.count()
        opened = [Sample((("collector", name),
                          ("target", "all" if where == "all zones" else where),
                          ("reason", trouble.why[:200])), 1)
                  for where, name, trouble in self.broken() if trouble.is_stopped]
        collected: collections.Counter[tuple[str, str]] = collections.Counter()
        for (names, result), count in self._collections.items():
            collected.update(dict.fromkeys([(name, result) for name in names], count))
        now = self.server.now()

        def metric(name: str, kind: str, help_text: str, value: Number | None) -> Family:
            return single(f"cmon_agent_{name}", kind, help_text, value)
        return [
            Family("cmon_agent_collections_total", COUNTER, "Total number of collections, by "
                   "result.", [Sample((("collector", name), ("result", result)), count)
                               for (name, result), count in collected.items()]),
            Family("cmon_agent_collector_breaker_open", GAUGE, "Collectors that are not run for "
                   "a while (1) because they kept failing.", opened),
            Family("cmon_agent_kstat_quarantine_seconds", GAUGE, "Time in seconds for which a read "
                   "of this kstat has been blocked.", [
                       Sample((("kstat", what),), now - since)
                       for what, since in kstats.quarantine.items()]),
            metric("pages", GAUGE, "Number of pages in memory.", len(self._pages)),
            metric("collections_running", GAUGE, "Number of collections in progress.",
                   self._running),
            metric("kstat_chain_length", GAUGE, "Number of kstats in the chain.",
                   kstats.chain_length),
            metric("kstat_index_rebuilds_total", COUNTER, "Total number of rebuilds of the kstat "
                   "index.", kstats.rebuilds),
            metric("kstat_index_rebuild_seconds", GAUGE, "CPU time of the last rebuild of the "
                   "kstat index in seconds.", kstats.rebuild_seconds),
            metric("kstat_reads_total", COUNTER, "Total number of calls of kstat_read.",
                   kstats.reads),
            metric("kstat_handles_given_up_total", COUNTER, "Total number of kstat handles given "
                   "up because a read blocked.", kstats.given_up),
            metric("kstat_blocked_threads", GAUGE, "Number of threads blocked in libkstat.",
                   kstats.blocked),
            metric("commands_hanging", GAUGE, "Number of commands that hang and cannot be "
                   "killed.", self.host.commands.hanging),
            metric("cpu_usage_ratio", GAUGE, "CPU usage of the agent and its commands, in CPUs.",
                   governor.used),
            metric("cpu_budget_ratio", GAUGE, "CPU budget of the agent and its commands, in "
                   "CPUs.", self.settings.cpu_budget),
            metric("lifetime_stretch_ratio", GAUGE, "Factor by which lifetimes are extended to "
                   "stay within the CPU budget.", governor.stretch),
            metric("vminfod_up", GAUGE, "Whether the agent receives events from vminfod (1) or "
                   "not (0).", int(self.host.vms.answered and not self.host.vms.problem)),
        ]


class AllZones:
    """The page of all running zones: each zone's own page, with its name as one more label.

    The server's thread does it a few zones at a time, so that others are answered in between.
    """
    AT_ONCE = 20

    def __init__(self, scraper: Scraper, zones: Sequence[str], later: Deferred) -> None:
        self._scraper, self._zones, self._later = scraper, zones, later
        self._server = scraper.server
        left = max(later.deadline - self._server.now(), 0.0)
        self._end = later.deadline - min(0.2 * left, 1.0)
        self._open: dict[Deferred, str] = {}   # missing pages -> their zones
        self._begun = self._joined = False
        self._pages: dict[str, str] = {}

    def begin(self, start: int = 0) -> None:
        """Ask for every zone's page; join them when the last has come, or shortly before the
        deadline: what is late goes out with its last values."""
        for zone in self._zones[start:start + self.AT_ONCE]:
            try:
                later = self._scraper.bring(zone, self._end)
            except Refused:
                continue                    # the zone has just stopped
            if later is not None:
                self._open[later] = zone
                later.attach(functools.partial(self._has_soon, later))
        if start + self.AT_ONCE < len(self._zones):
            self._server.loop.call_soon(self.begin, start + self.AT_ONCE)
            return
        self._begun = True
        self._server.loop.call_later(max(self._end - self._server.now(), 0.0), self._end_waiting)
        self._has(None)

    def _has_soon(self, later: Deferred, _answer: Answer) -> None:
        self._server.loop.run_here(self._has, later)

    def _has(self, later: Deferred | None) -> None:
        if later is not None:
            self._open.pop(later, None)
        if self._begun and not self._open:
            self._end_waiting()

    def _end_waiting(self) -> None:
        if self._joined:
            return
        self._joined = True
        for later, zone in self._open.items():
            for page in self._scraper.pages_of(zone):
                self._scraper.give_up(page, later)
        self._gather(0)

    def _gather(self, start: int) -> None:
        self._pages.update(self._scraper.texts(self._zones[start:start + self.AT_ONCE]))
        if start + self.AT_ONCE < len(self._zones):
            self._server.loop.call_soon(self._gather, start + self.AT_ONCE)
        elif not self._server.spawn(self._join):
            self._later.finish(text(503, "the agent is too busy: try again in a few seconds",
                                    ("Retry-After", "5"), ("X-Cmon-Error", "too_busy")))

    def _join(self) -> None:
        """In a worker: a thousand zones take a tenth of a second."""
        self._later.finish(prepare(Response(200, join_pages(self._pages).encode(), PAGE)))


def join_pages(pages: Mapping[str, str]) -> str:
    """Join pages, with contiguous families and the label `zonename` on each sample."""
    families: dict[str, tuple[str, list[str]]] = {}     # two comment lines, samples of all zones
    for zone, page in pages.items():
        label = f'zonename="{zone}"'
        head, lines = "", list[str]()
        for line in page.split("\n"):       # splitlines() would end lines within others' labels
            if line.startswith("# HELP "):
                head = line
            elif line.startswith("# TYPE "):    # of several descriptions, the first
                _, lines = families.setdefault(line.split(" ", 3)[2], (f"{head}\n{line}\n", []))
            elif line and line[0] != "#":
                name, brace, rest = line.partition("{")
                if brace:
                    lines.append(f"{name}{{{label},{_exported(rest, 'zonename')}")
                else:
                    name, _, value = line.partition(" ")
                    lines.append(f"{name}{{{label}}} {value}")
    return "".join(head + "\n".join(lines) + "\n" for head, lines in families.values())


def _exported(labels: str, name: str) -> str:
    """Labels that others may have written, as text, with this name given up: Prometheus calls such
    a label exported_NAME, too."""
    if name not in labels:
        return labels
    fresh, names = name, {other for other, _ in _LABEL_PAIRS.findall(labels)}
    while fresh in names:
        fresh = "exported_" + fresh
    return _LABEL_PAIRS.sub(lambda pair: pair[0] if pair[1] != name else
                            f'{fresh}="{pair[2]}"', labels)


# -- HTTP answers

HEALTHY = "Container Monitor agent is healthy."
OUR_NAMES = {node: frozenset(row["name"] + suffix for row in metadata() if row["scope"] == scope
                             for suffix in ("", *SUFFIXES.get(row["type"], ())))
             for node, scope in ((True, "node"), (False, "zone"))}


# What Prometheus writes of a scrape: a page that has it wins, and `up 0` there is a false alarm.
OF_PROMETHEUS = ("up", "scrape_duration_seconds", "scrape_samples_scraped", "scrape_series_added",
                 "scrape_samples_post_metric_relabeling", "scrape_timeout_seconds",
                 "scrape_sample_limit", "scrape_body_size_bytes")


def is_ours(name: str, node: bool) -> bool:
    """Whether a family that others wrote would run into one of the agent's own on a page, or into
    what Prometheus adds to it."""
    return name in OF_PROMETHEUS or name.startswith("cmon_") or name.endswith(META_NAMES) or any(
        name + suffix in OUR_NAMES[node] for suffix in ("", "_bucket", "_sum", "_count"))


class Agent:
    """The agent's routes."""

    def __init__(self, scraper: Scraper, registry: Registry) -> None:
        self.scraper, self.registry = scraper, registry
        self.routes = (
            Route("GET", "/v1/gz/metrics", self.node_page, scrape_options),
            Route("GET", "/v1/zones/metrics", self.all_zones,
                  lambda request: (scrape_seconds(request),)),
            Route("GET", "/v1/{zone}/metrics", self.zone_page, scrape_options),
            Route("GET", "/vms/{zone}/metrics", self.zone_page, scrape_options),
            Route("POST", "/v1/refresh", self.refresh),
            Route("GET", "/v1/metadata", self.metadata),
            Route("GET", "/metrics", self.own_metrics),
            Route("GET", "/-/healthy", lambda request: text(200, HEALTHY)),
            Route("GET", "/-/ready", self.ready),
            Route("GET", "/", self.overview),
        )

    def zone_page(self, request: Request, zone: str, core: bool | None, seconds: float
                  ) -> Answer | Deferred:
        """The metrics of one running zone."""
        if zone == NODE:                    # which has its own path
            raise Refused(404, NO_UUID, code="no_such_zone")
        return self.scraper.ask(zone, core, request.peer.address, seconds)

    def node_page(self, request: Request, _core: bool | None, seconds: float) -> Answer | Deferred:
        """The metrics of the compute node."""
        return self.scraper.ask(NODE, False, request.peer.address, seconds)

    def all_zones(self, _request: Request, seconds: float) -> Deferred:
        """The metrics of all running zones."""
        later = Deferred(self.scraper.server.now() + seconds, lambda _: text(
            503, "collecting all zones takes longer than the scrape timeout: raise scrape_timeout",
            ("Retry-After", "5"), ("X-Cmon-Error", "not_collected")))

        def listed(result: Any) -> None:
            if isinstance(result, Exception):
                later.finish(text(503, f"cannot list zones: {result}",
                                  ("Retry-After", "5"), ("X-Cmon-Error", "not_collected")))
                return
            zones = sorted(name for name in result[0].values() if UUID.fullmatch(name))
            AllZones(self.scraper, zones, later).begin()
        self.scraper.kstats.submit(Job(read_zones, listed))
        return later

    def refresh(self, _request: Request) -> Answer:
        """Drop cached pages and indexes of zones."""
        self.scraper.refresh()
        return Response(200, b"")

    def metadata(self, _request: Request) -> Answer:
        """The source of each metric."""
        return Response(200, json.dumps(metadata(), indent=1).encode() + b"\n", JSON)

    def own_metrics(self, _request: Request) -> Answer:
        """The agent's own metrics."""
        return Response(200, render(self.registry.families()).encode(), PAGE)

    def ready(self, _request: Request) -> Deferred:
        """Whether kstats can be read."""
        later = Deferred(self.scraper.server.now() + 5.0, lambda _: text(
            503, "not ready: kstats are not read in time", ("X-Cmon-Error", "not_ready")))

        def read(result: Any) -> None:
            later.finish(text(503, f"not ready: {result}", ("X-Cmon-Error", "not_ready"))
                         if isinstance(result, Exception) else
                         text(200, "Container Monitor agent is ready."))
        self.scraper.kstats.submit(Job(lambda reader: reader.index.count, read))
        return later

    def overview(self, _request: Request) -> Deferred:
        """The HTML page."""
        scraper = self.scraper
        later = Deferred(scraper.server.now() + 5.0, lambda _: text(
            503, "the zones cannot be listed in time", ("X-Cmon-Error", "not_collected")))

        def listed(result: Any) -> None:
            zones = {} if isinstance(result, Exception) else result[0]
            problem = str(result) if isinstance(result, Exception) else ""
            later.finish(overview_page(scraper, zones, problem))
        scraper.kstats.submit(Job(read_zones, listed))
        return later


def scrape_options(request: Request) -> tuple[bool | None, float]:
    """The proxy's flag for the zone, None without the header; and the seconds that the scrape may
    take. Raises Refused."""
    word = request.headers.get("x-joyent-cmon-opts")
    return read_opts(word) if word else None, scrape_seconds(request)


def read_opts(word: str) -> bool:
    """isCoreZone of the proxy's header; raises Refused."""
    try:
        opts = json.loads(base64.b64decode(word + "=" * (-len(word) % 4), validate=True)) \
            if len(word) <= 1000 else None
    except (ValueError, RecursionError):
        opts = None
    if not isinstance(opts, dict) or not isinstance(opts.get("isCoreZone"), bool):
        raise Refused(400, 'x-joyent-cmon-opts must be base64 of {"isCoreZone": true or false}',
                      code="bad_opts")
    return bool(opts["isCoreZone"])


def overview_page(scraper: Scraper, zones: Mapping[int, str], problem: str) -> Response:
    """The status page: zones with their ages, failures, the budget."""
    escape, now = html.escape, scraper.server.now()
    scraper.look(now)
    vms, governor = scraper.host.vms.vms, scraper.governor
    rows: list[str] = []
    for zone_id, zone in sorted(zones.items(), key=lambda pair: (
            vms[pair[1]].alias if pair[1] in vms else "~", pair[1])):
        if not UUID.fullmatch(zone):
            continue
        vm = vms.get(zone)
        cells = [cell for page in scraper.pages_of(zone) for cell in page.cells]
        ages = [now - cell.at for cell in cells if cell.sources and not cell.shared]
        bad = sorted({name for cell in cells for name in cell.troubles})
        rows.append(page_row(
            f'<a href="/v1/{zone}/metrics">{escape(vm.alias) if vm and vm.alias else zone}</a>',
            (("zone", f"<code>{zone}</code>"), ("id", str(zone_id)),
             ("brand", escape(vm.brand) if vm else ""),
             ("age", f"{min(ages):.0f} s" if ages else '<span class="dim">not scraped</span>'),
             ("failing", f'<span class="bad">{escape(", ".join(bad))}</span>' if bad else ""))))
    broken = [page_row(escape(where), (
        ("collector", escape(name)),
        ("reason", f'<span class="bad">{escape(trouble.why)}</span>'),
        ("last try", f"{now - trouble.tried:.0f} s ago"),
        ("next", "paused, then retried" if trouble.is_stopped else "retried")))
        for where, name, trouble in scraper.broken()]
    budget, info = scraper.settings.cpu_budget, scraper.sysinfo
    scraper.kstats.count()
    facts = [f"compute node {info.hostname or '?'} {info.uuid}", f"version {__version__}",
             f"zones {len(rows)}", f"kstats {scraper.kstats.chain_length}",
             f"using {governor.used:.2%} of one CPU",
             "no CPU budget" if budget is None else f"CPU budget {budget:.2%}",
             f"lifetimes stretched by {governor.stretch:.1f}",
             f"blocked kstat reads {scraper.kstats.blocked}",
             f"vminfod {scraper.host.vms.problem or 'connected'}"]
    if isinstance(scraper.host, RecordedHost):
        facts.insert(0, f"replay of {scraper.host.path}")
    trouble = broken and ("<h2>Failing collectors</h2>\n" + page_table(
        ("page", "collector", "reason", "last try", "next"), broken))
    return plain_page("Container Monitor agent", facts, (
        f'<p class="bad" role="alert">{escape(problem)}</p>' if problem else "") + f"""\
<p><a href="/v1/gz/metrics">Compute node</a> · <a href="/v1/zones/metrics">all zones</a> ·
<a href="/metrics">this agent</a> · <a href="/v1/metadata">metadata of all metrics</a></p>
{trouble or ""}<h2>Zones</h2>
{page_table(("alias", "zone", "id", "brand", "age", "failing"), rows)}""")

class AgentServer(Server):
    """Its loop reads kstats, in threads of its own. The main thread waits for signals; one is the
    alarm that says that a read of a kstat blocks."""

    def __init__(self, registry: Registry) -> None:
        super().__init__("agent", registry)
        self.kstats: KstatThreads
        self.alarm: Callable[[float], object] = functools.partial(
            signal.setitimer, signal.ITIMER_REAL)
        self._waking, self._wakeup = socket.socketpair()    # left open: signals may come late
        self._wakeup.setblocking(False)

    @property
    def wakeup(self) -> socket.socket:
        """A byte that is sent here wakes the main thread."""
        return self._wakeup

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Have the loop run until `stop`, and replace a thread that is blocked."""
        signal.signal(signal.SIGALRM, lambda *_: None)      # it wakes this thread up
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM,))
        try:
            self.kstats.start(self)
            while not self._done.is_set():
                self._waking.recv(64)
                self.kstats.watch()
                if self.kstats.error is not None:
                    raise self.kstats.error
        finally:
            self.alarm(0)

    def ended(self) -> None:
        """The loop has ended."""
        with contextlib.suppress(BlockingIOError):      # full of signals
            self._wakeup.send(b"!")

# --- logging and settings [kit] -------------------------------------------------------------------

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING,
          "warn": logging.WARNING, "error": logging.ERROR}
LOG_QUEUE = 10_000          # records; more are dropped and counted: logging must not block
LOG_SECONDS = 1.0           # for queued records at exit: the reader of the log may hang
EXIT_USAGE = 2
SMF_EXIT_ERR_CONFIG = 96    # /lib/svc/share/smf_include.sh


class BunyanFormatter(logging.Formatter):
    """One JSON object per line, as the platform's `bunyan` reads it."""

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
            fields["err"] = {"name": type(error).__name__, "message": str(error),
                             "stack": self.formatException(record.exc_info)}
        return json.dumps(fields)


class TextFormatter(logging.Formatter):
    """A line for each record; control characters are escaped."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line; a traceback follows on separate lines."""
        if not record.message.isprintable():
            record.message = "".join([
                letter if letter.isprintable() else letter.encode("unicode_escape").decode()
                for letter in record.message])
        return super().formatMessage(record)


class _Queued(logging.Handler):
    """Hands records to a thread that writes them, so that a slow log file never slows an answer."""

    def __init__(self) -> None:
        super().__init__()
        self._records: queue.Queue[logging.LogRecord | None] = queue.Queue(LOG_QUEUE)
        self.dropped = 0
        self._patience = LOG_SECONDS
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
            self._print(record)
            if self.dropped > told:
                told = self.dropped
                self._print(log.makeRecord(
                    log.name, logging.WARNING, "", 0, "dropped %s log records so far: the log "
                    "is too slow or its disk is full", (told,), None))

    def _print(self, record: logging.LogRecord) -> None:
        """Write past the buffer of sys.stderr: a write that blocks would hold its lock, for which
        Python waits at exit."""
        try:
            line = f"{self.format(record)}\n".encode(sys.stderr.encoding or "utf-8",
                                                     "backslashreplace")
            while line:
                line = line[os.write(2, line):]
        except OSError:
            self.dropped += 1
        except Exception:                   # wrong arguments of a message
            self.handleError(record)

    def close(self) -> None:
        """Write what is queued, for LOG_SECONDS at most; `logging` calls this again at exit."""
        patience, self._patience = self._patience, 0.0
        try:
            self._records.put_nowait(None)
            self._thread.join(patience)
        except queue.Full:
            self.dropped += 1
        super().close()


def start_logging(program: str, level: str, form: str) -> None:
    """Log to stderr: text on a terminal, bunyan JSON otherwise, unless `form` says which. A reload
    changes level and form only: it must not wait for records that are still queued."""
    target = log.handlers[0] if log.handlers else _Queued()
    if (form or ("text" if sys.stderr.isatty() else "bunyan")) == "text":
        target.setFormatter(TextFormatter("%(asctime)s %(levelname)-7s %(message)s"))
    else:
        target.setFormatter(BunyanFormatter(program))
    log.addHandler(target)
    log.propagate = False
    log.setLevel(LEVELS[level])


def stop_logging() -> None:
    """Write the queued records."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


class ConfigError(ValueError):
    """Invalid settings, for the operator to correct: all problems at once, a line each."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


Check = Callable[[Any], Optional[str]]      # what is wrong with a value other than null, or None


def setting(default: Any, help_text: str, check: Check | None = None) -> Any:
    """A field of a settings class: its default, what it means, and what may be wrong with it."""
    metadata = {"help": help_text, "check": check}
    if isinstance(default, (dict, list)) or callable(default):
        return dataclasses.field(
            default_factory=default if callable(default) else lambda: type(default)(default),
            metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def at_least(lowest: float) -> Check:
    """A check for numbers."""
    return lambda value: None if value >= lowest else f"must be at least {lowest}"


def one_of(*words: str) -> Check:
    """A check for one of several strings."""
    return lambda value: None if value in words else "must be one of " + ", ".join(
        word or '""' for word in words)


def is_address(value: str) -> str | None:
    """A check for HOST:PORT."""
    try:
        parse_address(value)
    except ConfigError:
        return "must be HOST:PORT, as in 127.0.0.1:9163 or :9163"
    return None


_JSON_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text",
               list: "a list", tuple: "a list", dict: "an object", Path: "a path"}


def _field_types(wanted: type) -> dict[str, Any]:
    """The types of a settings class; Python 3.9 cannot evaluate `X | None` in an annotation."""
    words = {field.name: re.sub(r"^(.+) \| None$", r"Optional[\1]", str(field.type))
             for field in dataclasses.fields(wanted)}
    return typing.get_type_hints(types.SimpleNamespace(__annotations__=words),
                                 vars(sys.modules[wanted.__module__]), {"Optional": Optional})


class _Loader:
    """Converts JSON to settings; collects all problems instead of stopping at the first."""

    def __init__(self, origin: str, folder: Path) -> None:
        self.origin, self.folder = origin, folder
        self.flags: AbstractSet[str] = frozenset()      # settings given on the command line
        self.problems: list[str] = []

    def wrong(self, where: str, what: str) -> None:
        origin = "command line" if where in self.flags else self.origin
        # a name may be any string: "\ud800" cannot even be printed
        where = where.encode("unicode_escape").decode() if not where.isprintable() else where
        self.problems.append(f"{origin}: {where}: {what}" if where else f"{origin}: {what}")

    def convert(self, value: Any, wanted: Any, where: str) -> Any:
        """Convert the value to the field's annotated type."""
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
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            self.wrong(where, "must be without NUL and lone surrogates, not "
                       + json.dumps(value)[:60])
            return None
        if base is Path and isinstance(value, str) and value:
            return self.folder / value
        if base is float and type(value) is int and abs(value) < 1 << 63:
            return float(value)
        if type(value) is base and not (base is float and not math.isfinite(value)):
            return value
        self.wrong(where, f"must be {_JSON_NAMES[base]}, not {json.dumps(value)[:60]}")
        return None

    def record(self, wanted: Any, value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            self.wrong(where, f"must be an object, not {json.dumps(value)[:60]}")
            return None
        kinds = _field_types(wanted)
        fields = {field.name: field for field in dataclasses.fields(wanted)}
        values: dict[str, Any] = {}
        before = len(self.problems)
        for key, item in value.items():
            path = f"{where}.{key}" if where else key
            if key not in fields:
                near = difflib.get_close_matches(key.lower().replace("-", "_"), fields, 1, 0.75)
                self.wrong(path, "unknown setting" + (f", did you mean {near[0]!r}?" if near else
                                                      f"; there are {', '.join(sorted(fields))}"))
                continue
            count = len(self.problems)
            values[key] = self.convert(item, kinds[key], path)
            check = fields[key].metadata.get("check")
            # report unknown keys besides problems inside a table
            problem = check(values[key]) if check and values[key] is not None and (
                len(self.problems) == count or isinstance(values[key], dict)) else None
            if problem:
                self.wrong(path, problem + ("" if isinstance(item, dict) else
                                            f", not {json.dumps(item)[:60]}"))
        for name, field in fields.items():
            if (name not in values and field.default is dataclasses.MISSING
                    and field.default_factory is dataclasses.MISSING):
                self.wrong(f"{where}.{name}" if where else name, "is missing")
        return wanted(**values) if len(self.problems) == before else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears more than once in an object")
    return content


MAX_FILE_BYTES = 16 << 20       # of a key, a certificate or a CA bundle
MAX_JSON_BYTES = 64 << 20       # an inventory of 100,000 VMs is 50 MB
_KINDS = {stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}


def open_regular(path: str | Path, flags: int, mode: int = 0o600) -> int:
    """Open or create a regular file. Raises OSError, also for anything else: a pipe may block, and
    a device never end."""
    with contextlib.suppress(FileNotFoundError):
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind != stat.S_IFREG:
            raise OSError(errno.EINVAL,
                          f"is a {_KINDS.get(kind, 'device')}: use a regular file")
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode)


def read_file(path: str | Path, most: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file, at most `most` bytes; raises OSError."""
    with open(path, "rb", opener=open_regular) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most} bytes")
    return content


def read_json(path: str | Path) -> Any:
    """A JSON file's content, strict: no name twice, no NaN; raises ConfigError."""
    def no_constant(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")
    try:
        content = read_file(path, MAX_JSON_BYTES)
    except (OSError, ValueError) as error:      # ValueError: no path at all
        raise ConfigError(f"{path}: {reason_of(error)}") from None
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique,
                          parse_constant=no_constant)
    except RecursionError:
        raise ConfigError(f"{path}: not JSON: nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None


S = TypeVar("S")
N = TypeVar("N", int, float)


def load_settings(wanted: type[S], path: str | None, flags: Mapping[str, Any]) -> S:
    """Settings of the class `wanted` from a JSON file (or none), with flags over it.

    Raises ConfigError with all problems, each with file and key. Flags that are None are not given.
    """
    content = read_json(path) if path is not None else {}
    loader = _Loader(path or "settings", Path(path).resolve().parent if path else Path.cwd())
    given = {key: value for key, value in flags.items() if value is not None}
    if isinstance(content, dict):
        content, loader.flags = {**content, **given}, given.keys()
    loaded = loader.record(wanted, content, "")
    if loader.problems:
        raise ConfigError(*loader.problems)
    return typing.cast(S, loaded)


def command_settings(wanted: type[S], arguments: argparse.Namespace,
                     problems_of: Callable[[S], Iterable[str]] = lambda settings: ()) -> S:
    """The settings of a command: the file of --config, with flags of a setting's name over it.

    `problems_of` checks them against each other. Raises ConfigError.
    """
    flags = {field.name: getattr(arguments, field.name, None)
             for field in dataclasses.fields(typing.cast(Any, wanted))}
    settings = load_settings(wanted, arguments.config, flags)
    problems = [f"{arguments.config}: {problem}" for problem in problems_of(settings)]
    if problems:
        raise ConfigError(*problems)
    return settings


def parse_address(value: str, default_port: int | None = None) -> tuple[str, int]:
    """`HOST:PORT` or `[IPv6]:PORT` as a pair; where no port is meant by default, `:PORT` is that of
    all IPv4 addresses. Raises ConfigError."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([^:\[\]\s]*))(?::([0-9]{1,5}))?", value)
    host = match and (match.group(1) or match.group(2) or ("" if default_port else "0.0.0.0"))
    if match is None or not host or not value or re.search(r"^\.|\.\.|[^.]{64}", host):
        raise ConfigError(f"{value!r} is not HOST:PORT, as in 127.0.0.1:9163 or :9163")
    port = int(match.group(3)) if match.group(3) else default_port
    if port is None or port > 65535:
        raise ConfigError(f"{value!r} needs a port from 0 to 65535, as in 127.0.0.1:9163 or :9163")
    return host, port


def within(convert: Callable[[str], N], least: float, most: float, what: str
           ) -> Callable[[str], N]:
    """A type for argparse: a number within a range; our own error message."""
    def value(word: str) -> N:
        with contextlib.suppress(ValueError):
            parsed = convert(word)
            if least <= parsed <= most:
                return parsed
        raise argparse.ArgumentTypeError(f"{word!r} is not {what}")
    return value


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are one line, the same on every Python."""

    CHOICE = re.compile(
        r"argument ([^:]+): invalid choice: ['\"]?([^'\"]*)['\"]? \(choose from (.*)\)")

    def error(self, message: str) -> NoReturn:
        """Print the problem and where to find help on stderr; exit status 2."""
        self.exit(EXIT_USAGE, f"{self.prog}: {self.reworded(message)}; "
                  f"`{self.prog} --help` explains\n")

    def reworded(self, message: str) -> str:
        """Omit argparse's list of a hundred choices."""
        wrong = self.CHOICE.fullmatch(message)
        if wrong is None:
            return message.replace("argument ", "", 1) if message.startswith("argument ") \
                else message.replace("the following arguments are required:", "missing:")
        name, value, listed = wrong.groups()
        return not_known(name, value, re.findall(r"[\w.-]+", listed))


def not_known(name: str, value: str, choices: Sequence[str]) -> str:
    """What is wrong with a command or a flag's value that is none of the choices."""
    near = difflib.get_close_matches(value, choices, 1)
    what = f"no command {value!r}" if name == "COMMAND" else f"{name} {value!r} is not known"
    return what + (f", did you mean {near[0]}?" if near else
                   ": one of " + ", ".join(choices) if len(choices) < 20 else "")


def command_line(program: str, description: str) -> argparse.ArgumentParser:
    """The flags that all servers have."""
    parser = CommandLine(prog=program, description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--config", metavar="FILE", help="settings file (JSON); flags override it")
    add("--listen", metavar="HOST:PORT", help="listen address; :PORT listens on all IPv4 "
        "addresses, [::]:PORT on all IPv6 addresses")
    add("--check-config", action="store_true",
        help="check the settings, report all errors and exit")
    add("--smf", action="store_true", help="start as an SMF service: return once it listens, "
        f"with {SMF_EXIT_ERR_CONFIG} if the settings are invalid")
    add("--print-addresses", action="store_true", help="print where it listens, as one line of "
        "JSON, once it does; port 0 is any free port")
    add("--log-level", choices=sorted(LEVELS), metavar="LEVEL",
        help="lowest level that is logged: debug, info, warn or error (info)")
    add("--log-format", choices=("text", "bunyan"),
        help="text (on a terminal) or bunyan's JSON lines (otherwise)")
    add("--version", action="version", version=f"{program} {__version__}")
    return parser


def complain(program: str, problems: Iterable[str]) -> None:
    """Print messages to stderr, a line each; if it is full, the exit status must suffice."""
    with contextlib.suppress(OSError):
        for problem in problems:
            print(f"{program}: {problem}", file=sys.stderr)


def open_streams() -> None:
    """Open what the parent has closed of stdin, stdout and stderr, lest a socket takes its number;
    on stdout, `?` stands for what the locale lacks (stderr has escapes)."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def printing(program: str, work: Callable[[], int], unread: int = 1, failed: int = 1) -> int:
    """The status of `work`, which prints to stdout; `unread` if the reader has exited, as `head`
    does, and `failed` with a line on stderr if the disk is full."""
    try:
        status = work()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        status = unread
    except OSError as error:            # of stdout or the temporary folder
        complain(program, [reason_of(error) + (f": {error.filename}" if error.filename else "")])
        status = failed
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # buffered output goes there
    return status


class _Parent:
    """The process that SMF started: exits when the child serves, or with the child's status."""

    def __init__(self) -> None:
        self._write: int | None = None

    def fork(self) -> int | None:
        """None in the child; in the parent the exit status, once the child is ready or dead."""
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
        """In the child: the parent may exit."""
        if self._write is not None:
            os.write(self._write, b"+")
            os.close(self._write)
            self._write = None


def raise_descriptor_limit() -> None:
    """Raise the limit of descriptors as far as the system allows: a connection needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run_daemon(program: str, arguments: argparse.Namespace, load: Callable[[], S],
               start: Callable[[S], "Server"], reload: Callable[[S], None],
               check: Callable[[S], list[str]]) -> int:
    """A server's life: settings, --check-config, --smf, signals, reload; returns the exit status.

    `start` builds the server and listens; what it raises as ConfigError or OSError is told in one
    line. SIGHUP calls `load` and `reload`; a bad file keeps the running settings and says so.
    """
    full = f"cmon_{program}"
    bad = SMF_EXIT_ERR_CONFIG if arguments.smf else EXIT_USAGE
    try:
        settings = load()
        if arguments.check_config:
            def show() -> int:
                problems = check(settings)
                complain(full, problems)
                if not problems:
                    print(f"{full}: the settings are good")
                return bad if problems else 0
            return printing(full, show)
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
    except (ConfigError, OSError) as error:
        stop_logging()
        wrong = error.problems if isinstance(error, ConfigError) else [
            f"cannot start: {error.strerror or error}"
            + (f": {error.filename}" if error.filename else "")]
        complain(full, wrong)
        return bad if isinstance(error, ConfigError) else 1

    def on_hangup(*_: object) -> None:
        try:
            fresh = load()
            reload(fresh)
            start_logging(program, getattr(fresh, "log_level"), getattr(fresh, "log_format"))
            log.info("settings reloaded")
            server.reload = Reload(True, time.time())
        except ConfigError as error:
            server.reload = server.reload._replace(good=False)
            for problem in error.problems:
                log.error("keeping the old settings: %s", problem)

    def hangup() -> None:
        server.loop.call_soon(on_hangup)
        server.loop.wake()              # should this be the loop's thread, it may be in select()

    # A signal may reach any thread, but is handled by this one, which must wake up for it.
    signal.set_wakeup_fd(server.wakeup.fileno(), warn_on_full_buffer=False)
    handlers: dict[int, Callable[[], None]] = {
        signal.SIGTERM: server.stop, signal.SIGINT: server.stop, signal.SIGHUP: hangup}
    for number_of_signal, handler in handlers.items():
        signal.signal(number_of_signal, lambda *_, handler=handler: handler())
    addresses = {listener.name: "{}:{}".format(bracketed(listener.address[0]), listener.address[1])
                 for listener in server.listeners}
    for address in addresses.values():
        log.info("listening on %s", address)
    if arguments.print_addresses:
        def show_addresses() -> int:
            print(json.dumps(addresses))
            return 0
        status = printing(full, show_addresses)
        if status:
            stop_logging()
            return status
    parent.ready()
    server.serve_forever()              # logging stops at exit: later code may log, too
    return 0

# --- settings -------------------------------------------------------------------------------------

PORT = 9163
DEFAULT_COMMANDS = {
    "zfs": "/usr/sbin/zfs", "zpool": "/usr/sbin/zpool", "ntpq": "/usr/sbin/ntpq",
    "chronyc": "/usr/bin/chronyc", "sysinfo": "/usr/bin/sysinfo", "vmadm": "/usr/sbin/vmadm",
    "zoneadm": "/usr/sbin/zoneadm", "kstat": "/usr/bin/kstat", "svcs": "/usr/bin/svcs",
    "ppriv": "/usr/bin/ppriv"}
DEFAULT_PLUGIN_DIRS = {"gz": "/opt/custom/cmon/gz-plugins", "vm": "/opt/custom/cmon/vm-plugins"}
SYSINFO_FILE = "/var/run/cmon/sysinfo.json"


@dataclass(frozen=True)
class CollectorSettings:
    """Exceptions for one collector."""
    enabled: bool = setting(True, "run this collector")
    ttl: float | None = setting(
        None, "lifetime of its values, in seconds; null: its default", at_least(0))
    timeout: float | None = setting(
        None, "timeout, in seconds; null: its default", at_least(0.01))


def known_keys(known: Mapping[str, str]) -> Check:
    """A check for tables whose keys are fixed."""
    def check(value: Mapping[str, str]) -> str | None:
        unknown = ", ".join(map(repr, sorted(set(value) - set(known))))
        return f"{unknown} is not one of {', '.join(known)}" if unknown else None
    return check


def known_collectors(value: Mapping[str, CollectorSettings]) -> str | None:
    """A check for the names of collectors."""
    names = {collector.name for collector in ZONE_COLLECTORS + NODE_COLLECTORS} - {"time"}
    unknown = sorted(name for name in value
                     if name not in names and not name.startswith("plugin_"))
    return f"{', '.join(map(repr, unknown))} is not a collector; there are " \
        f"{', '.join(sorted(names))} and plugin_NAME" if unknown else None


def is_http(value: str) -> str | None:
    """A check for URLs."""
    try:
        parts = urllib.parse.urlsplit(value)
        good = bool(re.fullmatch(r"http://[^/?#\s]+/?", value) and parts.hostname) \
            and parts.port != 0
    except ValueError:                      # brackets, or the port
        good = False
    return None if good else "must be http://HOST:PORT"


@dataclass(frozen=True)
class Settings:
    """All settings of the agent."""
    listen: str | None = setting(
        None, "listen address; null: port 9163 of the admin IP", is_address)
    libkstat: str = setting("libkstat.so.1", "path of libkstat")
    commands: dict[str, str] = setting(
        DEFAULT_COMMANDS, "paths of the commands that it runs", known_keys(DEFAULT_COMMANDS))
    vminfod: str = setting("http://127.0.0.1:9090", "URL of vminfod", is_http)
    sysinfo_file: str = setting(
        SYSINFO_FILE, "output of sysinfo, written by the set-up service, which runs as root")
    pool: str | None = setting(None, "ZFS pool of the zones; null: the one sysinfo names, or zones")
    plugin_dirs: dict[str, str] = setting(
        DEFAULT_PLUGIN_DIRS, "plugin folders, for the node and for zones",
        known_keys(DEFAULT_PLUGIN_DIRS))
    collectors: dict[str, CollectorSettings] = setting(
        {}, "exceptions, by collector", known_collectors)
    min_poll_interval: float = setting(
        0.0, "minimum lifetime of all values, in seconds", at_least(0))
    max_collections: int = setting(
        4, "maximum concurrent plugins and core-zone requests", at_least(1))
    cpu_budget: float | None = setting(
        0.01, "CPUs that the agent may use before it lengthens lifetimes; null: unlimited",
        at_least(0.0001))
    textfiles: bool = setting(False, "serve the metric files that tenants write in their zones")
    log_level: str = setting("info", "lowest level that is logged", one_of(*LEVELS))
    log_format: str = setting("", "text or bunyan; empty: text on a terminal, bunyan otherwise",
                              one_of("", "text", "bunyan"))


def load_agent(arguments: argparse.Namespace) -> Settings:
    """Settings from the file and the flags; raises ConfigError."""
    loaded = command_settings(Settings, arguments)
    return dataclasses.replace(loaded, commands={**DEFAULT_COMMANDS, **loaded.commands},
                               plugin_dirs={**DEFAULT_PLUGIN_DIRS, **loaded.plugin_dirs})


def make_host(arguments: argparse.Namespace, settings: Settings) -> Host:
    """The machine, or a capture in its place; raises ConfigError."""
    if arguments.replay is not None:
        return RecordedHost(arguments.replay, settings)
    try:
        return Host(settings)
    except LibraryError as error:
        raise ConfigError(str(error)) from None


def known_address(settings: Settings, admin_ip: str | None) -> tuple[str, int] | None:
    """Where the agent listens, if that is known."""
    if settings.listen is not None:
        return parse_address(settings.listen)
    return (admin_ip, PORT) if admin_ip else None


def address_of(settings: Settings, host: Host, sysinfo: Sysinfo, problem: str) -> tuple[str, int]:
    """Where to listen; raises ConfigError when a compute node has no known address."""
    address = known_address(settings, "" if host.recorded else sysinfo.admin_ip)
    if address is not None:
        return address
    if sys.platform.startswith("sunos") and not host.recorded:
        raise ConfigError(f"the admin IP is unknown ({problem or 'sysinfo has none'}): set "
                          "listen, or see `svcs -xv cmon-agent-setup`")
    return "127.0.0.1", PORT


def read_sysinfo(host: Host) -> tuple[Sysinfo, str]:
    """The node's sysinfo, or why it is unknown."""
    try:
        return parse_sysinfo(host.raw_sysinfo()), ""
    except ConfigError as error:
        return Sysinfo(), str(error)


class Running:
    """The parts of a running agent: makes them and applies new settings."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._scraper: Scraper | None = None
        self._settings: Settings | None = None

    def load(self) -> Settings:
        """The current settings."""
        return load_agent(self._arguments)

    def check(self, settings: Settings) -> list[str]:
        """Problems that --check-config finds beyond the settings themselves."""
        problems: list[str] = []
        try:
            host = make_host(self._arguments, settings)
            address_of(settings, host, *read_sysinfo(host))
            host.open_kstats().close()
        except ConfigError as error:
            problems += error.problems
        except KstatError as error:
            problems.append(str(error))
        for folder in settings.plugin_dirs.values():
            find_plugins(folder, problems)
        return problems

    def start(self, settings: Settings) -> Server:
        """Create everything and listen; raises ConfigError, OSError."""
        host = make_host(self._arguments, settings)
        sysinfo, problem = read_sysinfo(host)
        registry = Registry()
        register_process_metrics(registry, "agent")
        server = AgentServer(registry)
        scraper = Scraper(settings, host, server, registry, sysinfo)
        server.kstats = scraper.kstats
        agent = Agent(scraper, registry)
        server.listen(address_of(settings, host, sysinfo, problem), agent.routes)
        if problem:
            log.warning("cannot read the node's name and pool: %s", problem)
        scraper.start()
        self._scraper, self._settings = scraper, settings
        atexit.register(host.stop)
        return server

    def reload(self, settings: Settings) -> None:
        """Apply new settings; raises ConfigError for one that needs a restart."""
        assert self._scraper is not None and self._settings is not None
        fixed = [name for name in ("listen", "libkstat", "vminfod", "sysinfo_file") if
                 getattr(settings, name) != getattr(self._settings, name)]
        if fixed:
            raise ConfigError(f"{', '.join(fixed)}: cannot change while the agent runs: restart it")
        self._settings = settings
        self._scraper.use(settings)

# --- capture --------------------------------------------------------------------------------------


def capture(arguments: argparse.Namespace, settings: Settings) -> int:
    """`cmon_agent.py capture FILE`: what the collectors read on this host, for --replay."""
    output = sys.stdout
    try:
        if arguments.file != "-":           # before reading for minutes
            output = open(os.open(arguments.file, os.O_WRONLY | os.O_CREAT, 0o600), "w",
                          encoding="utf-8")
    except OSError as error:
        complain("cmon_agent", [f"cannot write {arguments.file}: {reason_of(error)}"])
        return 1
    try:
        host = make_host(arguments, settings)
        frames = []
        for number in range(arguments.frames):
            if number:
                time.sleep(arguments.interval)
            frames.append(capture_frame(host, settings))
        try:
            raw = host.raw_sysinfo()
        except ConfigError as error:
            complain("cmon_agent", [f"{error}; the capture goes without"])
            raw = {}
        content = {"format": 1, "host": {name: raw[name] for name in SYSINFO_MEMBERS
                                         if isinstance(raw, dict) and name in raw},
                   "frames": frames}
        if output is not sys.stdout:
            output.truncate()
        output.write(spread(content))
        output.flush()
    except KstatError as error:
        complain("cmon_agent", [f"cannot capture: {reason_of(error)}"])
        return 1
    except OSError as error:
        if output is sys.stdout:
            raise
        complain("cmon_agent", [f"cannot write {arguments.file}: {reason_of(error)}"])
        if os.path.isfile(arguments.file):
            os.unlink(arguments.file)               # an incomplete capture is useless
        return 1
    finally:
        if output is not sys.stdout:
            with contextlib.suppress(OSError):      # reported above
                output.close()
            if os.path.isfile(arguments.file) and not os.path.getsize(arguments.file):
                os.unlink(arguments.file)           # created by us, and empty
    name = "standard output" if output is sys.stdout else arguments.file
    print(f"{name}: {len(frames)} frames, {len(frames[-1]['kstats'])} kstats each; it "
          "holds aliases and addresses of zones, so treat it as confidential",
          file=sys.stderr if output is sys.stdout else sys.stdout)
    return 0


def spread(content: Any) -> str:
    """A capture as JSON, a line for each kstat, command and VM, so that it can be diffed."""
    def lines(value: Any, depth: int) -> str:
        if not depth or not value or not isinstance(value, (dict, list)):
            return json.dumps(value, separators=(",", ":"))
        inner = [f"{json.dumps(name)}:{lines(item, depth - 1)}" for name, item in value.items()] \
            if isinstance(value, dict) else [lines(item, depth - 1) for item in value]
        begin, end = "{}" if isinstance(value, dict) else "[]"
        return f"{begin}\n" + ",\n".join(inner) + f"\n{end}"
    return lines(content, 4) + "\n"


def capture_frame(host: Host, settings: Settings) -> dict[str, Any]:
    """One frame of a capture: kstats, and what collectors ask of commands; raises KstatError."""
    kstats = [{"module": kstat.ref.module, "instance": kstat.ref.instance, "name": kstat.ref.name,
               "type": kstat.ref.type, "crtime": kstat.ref.crtime, "snaptime": kstat.snaptime,
               "data": kstat.data, "class": kstat.ref.klass} for kstat in _captured_kstats(host)]
    commands: dict[str, dict[str, Any]] = {}

    def run(name: str, arguments: Sequence[str], timeout: float) -> Output:
        try:
            output = host.run(name, arguments, timeout)
        except CommandError as error:
            complain("cmon_agent", [f"{error}; the capture goes without"])
            raise
        commands[" ".join((DEFAULT_COMMANDS[name], *arguments))] = output._asdict()
        return output
    pool = settings.pool or read_sysinfo(host)[0].pool or "zones"
    task = Task(host, run, NODE, 30.0, pool, lambda work: Reading([], []), time.monotonic)
    for collector in (*ZONE_COLLECTORS, *NODE_COLLECTORS):
        if collector.collect is not None and not collector.foreign:
            with contextlib.suppress(CommandError, CollectError):
                collector.collect(task)     # failures show in the recorded output
    return {"at": host.time(), "kstats": kstats, "commands": commands,
            "vms": _captured_vms(settings) if not host.recorded else []}


def _captured_kstats(host: Host) -> list[Kstat]:
    """All kstats that the collectors read, except those that block."""
    readers = kstat_threads(host.open_kstats)
    try:
        reading: Reading = kstat_job(readers, lambda reader: reader.read_all(itertools.chain(
            *reader.index.modules.values(), *reader.index.zones.values())))
        return reading.kstats
    finally:
        readers.close()


CAPTURED_VM = ("uuid", "zonename", "alias", "brand", "state", "zone_state", "owner_uuid", "tags",
               "zpool", "zfs_filesystem", "zonepath")
CAPTURED_NIC = ("interface", "nic_tag", "network_uuid", "ip")


def _captured_vms(settings: Settings) -> list[dict[str, Any]]:
    """VM objects, without private data of tenants."""
    try:
        answer = Client().request("GET", settings.vminfod.rstrip("/") + "/vms", timeout=30.0)
        if answer.status != 200:
            raise ValueError(f"answers {answer.status}")
        records = json.loads(answer.body)
        if not isinstance(records, list):
            raise ValueError("its answer is not a list")
    except (ClientError, ValueError, RecursionError) as error:
        complain("cmon_agent", [f"vminfod: {error}; the capture will not contain VMs"])
        return []
    vms = []
    for record in records:
        vm = {name: value for name, value in _members(record).items() if name in CAPTURED_VM}
        vm["nics"] = [{name: nic.get(name) for name in CAPTURED_NIC} for nic in _nics(record)]
        customer = _members(_members(record).get("customer_metadata"))
        if "metricPorts" in customer:
            vm["customer_metadata"] = {"metricPorts": customer["metricPorts"]}
        if isinstance(record, dict):
            vms.append(vm)
    return vms


# --- check ----------------------------------------------------------------------------------------

# Whether everything that the agent needs is there, and its values are those of `kstat -p`.

GOOD, BAD, NOTE = "ok", "FAIL", "note"
CHECK_SECONDS = 55.0                        # in total: an operator waits a minute
READS_A_TABLE = 3                           # kstats of one kind that are read and compared
ORIGINAL = "svc:/smartdc/agent/cmon-agent:default"
OURS = ("svc:/site/cmon-agent-setup:default", "svc:/site/cmon-agent:default")
PRIVILEGES = "basic,!file_link_any,!proc_info"      # of the service, as its manifest has them
# Kstats that may be missing, and what that means.
ABSENT = {"cpucaps_zone_*": "no zone has a CPU cap, or no zone runs",
          "vcpu*": "no bhyve zone runs",
          "lockedmem_zone_*": "no zone runs", "nprocs_zone_*": "no zone runs",
          "swapresv_zone_*": "no zone runs"}
ABSENT_MODULES = {"zfs_metaslab_group": "this platform does not count them"}

# GOOD, BAD or NOTE, the finding, and advice if it differs from the check's own
Finding = Union[tuple[str, str], tuple[str, str, str]]


class Header(NamedTuple):
    """A kstat of the chain, needed by a table or not."""
    module: str
    instance: int
    name: str
    type: int


def listed(begin: str, names: Iterable[str], most: int = 5) -> str:
    """A prefix and the first of the names; "" without names."""
    shown = ", ".join(itertools.islice(names, most))
    return begin + shown if shown else ""


class Examined:
    """State shared by the checks: settings, results of earlier ones, the time limit."""

    def __init__(self, arguments: argparse.Namespace, settings: Settings) -> None:
        self.arguments, self.settings = arguments, settings
        self.sysinfo: Any = {}
        self.headers: list[Header] = []
        self.zones: list[ZoneLine] = []
        self.commands = Commands()
        self.readers: KstatThreads | None = None
        self._end = time.monotonic() + CHECK_SECONDS

    def left(self, most: float = 10.0) -> float:
        """Remaining seconds for the next step."""
        return max(min(self._end - time.monotonic(), most), 0.1)

    @property
    def late(self) -> bool:
        """Whether the time limit has passed."""
        return time.monotonic() >= self._end

    def run(self, name: str, *arguments: str) -> Output:
        """Run a command of the settings; raises CommandError."""
        return self.commands.run(name, [self.settings.commands[name], *arguments],
                                 self.left(30.0 if name == "sysinfo" else 10.0))

    def job(self, work: Callable[[Reader], Any]) -> Any:
        """Run a job in a kstat reader; raises KstatError."""
        if self.readers is None:
            raise KstatError("kstats cannot be read: see libkstat")
        return kstat_job(self.readers, work, self.left(CHECK_SECONDS))

    @property
    def pool(self) -> str:
        """The pool of the zones."""
        return self.settings.pool or parse_sysinfo(self.sysinfo).pool or "zones"

    def address(self) -> tuple[str, int] | None:
        """The address on which the agent will listen, if known."""
        return known_address(self.settings, admin_address(self.sysinfo))


class KstatLoop:
    """A loop that does nothing but read kstats."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.alarm: Callable[[float], object] = lambda seconds: None    # `kstat_job` looks itself

    def turn(self) -> bool:
        """One turn."""
        self.loop.select()
        self.loop.run_due()
        return True

    def resume(self) -> None:
        """Nothing was in progress but a job."""

    def ended(self) -> None:
        """Nobody waits for the thread."""
        self.loop.close()


def kstat_threads(open_handle: Callable[[], AnyHandle]) -> KstatThreads:
    """Threads for `kstat_job`."""
    alone = KstatLoop()
    threads = KstatThreads(open_handle, alone.loop)
    threads.start(alone)
    return threads


def kstat_job(readers: KstatThreads, work: Callable[[Reader], Any], timeout: float = math.inf
              ) -> Any:
    """Read kstats outside of the server; a blocked read is given up, as there."""
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    readers.submit(Job(work, done.put))
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            result = done.get(timeout=0.1)
        except queue.Empty:
            readers.watch()
            if readers.error is not None:
                raise readers.error from None
            continue
        if isinstance(result, Exception):
            raise result
        return result
    raise KstatError("reading kstats took too long")


def check_sysinfo(node: Examined) -> Iterator[Finding]:
    """sysinfo's output: as root from the command, else from the set-up service's file."""
    keys = collections.Counter[str]()

    def counted(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys.update(key for key, count in collections.Counter(key for key, _ in pairs).items()
                    if count > 1)
        return dict(pairs)
    if os.geteuid() == 0:
        content = node.run("sysinfo", "-f").checked("sysinfo -f")
    else:
        try:
            content = read_file(node.settings.sysinfo_file).decode("utf-8", "replace")
        except OSError as error:
            yield NOTE, f"{node.settings.sysinfo_file}: {reason_of(error)}; root can run sysinfo"
            return
    node.sysinfo = json.loads(content, object_pairs_hook=counted)
    sysinfo = parse_sysinfo(node.sysinfo)
    for key in sorted(keys):
        yield NOTE, f"the key {key!r} is duplicated, the last one counts"
    if node.address() is None:
        yield BAD, "no address on the admin network, and no listen in the settings"
    missing = [name for name, value in (
        ("UUID", sysinfo.uuid), ("Hostname", sysinfo.hostname),
        ("Zpool", sysinfo.pool or node.settings.pool)) if not value]
    yield (NOTE if missing else GOOD), f"admin address {sysinfo.admin_ip or None}, pool " \
        f"{sysinfo.pool or '?'}, {sysinfo.cpus} CPUs" + listed("; without ", missing)


def check_services(node: Examined) -> Iterator[Finding]:
    """Whether the services are imported, and whether the original agent runs."""
    output = node.run("svcs", "-a", "-H", "-o", "state,fmri").checked("svcs")
    states = {words[1]: words[0].rstrip("*") for words in map(str.split, output.splitlines())
              if len(words) == 2}
    status = {"maintenance": BAD, "degraded": BAD, "not imported yet": NOTE}
    for fmri in OURS:
        state = states.get(fmri, "not imported yet")
        yield status.get(state, GOOD), f"{fmri} is {state}"
    state = states.get(ORIGINAL, "absent")
    taken = state == "online" and (node.address() or ("", PORT))[1] == PORT
    yield (BAD if taken else NOTE), f"the original agent is {state}" + (
        f", and has port {PORT}" if state == "online" else "")


def check_user(node: Examined) -> Iterator[Finding]:
    """Switch to the user and the privileges of the service."""
    wanted = node.arguments.user
    if os.geteuid() == 0:
        try:
            entry = pwd.getpwnam(wanted)
        except KeyError:
            yield BAD, f"there is no user {wanted!r}: the rest is checked as root", \
                "give --user the user in the service's manifest"
            return
        "x".encode("idna")              # loads the codec, which this user may not be able to read
        if entry.pw_uid:                # setuid takes the effective ones from the inheritable ones
            try:
                node.run("ppriv", "-s", f"IL={PRIVILEGES}", str(os.getpid())).checked("ppriv")
            except CommandError as error:
                yield NOTE, f"{wanted} keeps all basic privileges: {error}"
        os.setgroups([])
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        name = str(os.geteuid())
    yield (GOOD if name == wanted else NOTE), f"{name}, where the service runs as {wanted}"
    try:
        sets = dict(line.strip().split(": ", 1) for line in node.run(
            "ppriv", str(os.getpid())).stdout.splitlines() if ": " in line)
        yield NOTE, f"effective privileges {sets.get('E', '?')}, limit {sets.get('L', '?')}"
    except CommandError as error:
        yield NOTE, f"privileges are not known: {error}"
    for path in (node.arguments.config, os.path.abspath(__file__), sys.executable, os.__file__):
        if path is not None and not os.access(path, os.R_OK):
            yield BAD, f"{path} is not readable for {name}"


def check_python(_node: Examined) -> Iterator[Finding]:
    """The interpreter, its selector and its OpenSSL."""
    yield GOOD, f"Python {sys.version.split()[0]} at {sys.executable}, " \
        f"{8 * ctypes.sizeof(ctypes.c_void_p)} bits, on {sys.platform}, " \
        f"{selectors.DefaultSelector.__name__}, {ssl.OPENSSL_VERSION}"


def check_libkstat(node: Examined) -> Iterator[Finding]:
    """The library, the layout of its structures, and the chain."""
    library = Libkstat(node.settings.libkstat)
    control = library.open()
    if not control:
        raise KstatError(f"kstat_open: {os.strerror(ctypes.get_errno()).lower()}")
    kids: list[int] = []
    address = control.contents.kc_chain
    while address and len(kids) < 1_000_000:
        (_crtime, following, kid, module, _resv, instance, name, kind, _class,
         _flags) = HEADER.unpack_from(ctypes.string_at(address, HEADER.size))
        kids.append(kid)
        node.headers.append(Header(_text(module), instance, _text(name), kind))
        address = following
    chain_id = control.contents.kc_chain_id
    library.close(control)
    node.readers = kstat_threads(functools.partial(Handle, library))
    if not node.headers or chain_id <= 0 or kids != sorted(set(kids)) or any(
            not header.module or not header.name or header.type > TIMER for header in node.headers):
        yield BAD, f"the chain is inconsistent: {len(kids)} headers, id {chain_id}; this library " \
            "has another layout than <sys/kstat.h>"
        return
    by_module = collections.Counter(header.module for header in node.headers)
    yield GOOD, f"{len(kids)} kstats, {by_module['unix']} of them in module unix"


def check_zones(node: Examined) -> Iterator[Finding]:
    """The running zones, and whether each has its kstat."""
    zones = parse_zoneadm(node.run("zoneadm", *ZONEADM_COMMAND).checked("zoneadm list"))
    node.zones = [zone for zone in zones if zone.zone_id]
    if all(zone.name != "global" for zone in zones):
        raise CommandError("zoneadm list: the global zone is missing")
    known = {(header.module, header.instance) for header in node.headers}
    unnamed = [zone.name for zone in node.zones if ("zones", zone.zone_id) not in known]
    if unnamed and node.headers:
        yield BAD, listed("no kstat zones:ID for ", unnamed)
    brands = collections.Counter(zone.brand for zone in node.zones)
    yield GOOD, f"{len(node.zones)} run" + listed(": ", [
        f"{count} {brand}" for brand, count in sorted(brands.items())], 20)


def _chosen_refs(reader: Reader) -> dict[Table, list[Ref]]:
    """The kstats that each table names."""
    refs: dict[Table, list[Ref]] = {}
    for ref in itertools.chain(*reader.index.modules.values(), *reader.index.zones.values()):
        for table in ref.tables:
            refs.setdefault(table, []).append(ref)
    return refs


def _same(before: Any, said: str, after: Any) -> bool:
    """Whether `kstat -p`, run between two reads, agrees with them."""
    if isinstance(before, str) or isinstance(after, str):
        return said.strip() in (str(before).strip(), str(after).strip())
    number_ = number_in(said.strip())
    if number_ is None:
        return False
    low, high = min(before, after), max(before, after)
    if "." in said:                         # older platforms print disk times in seconds
        return bool(low / 1e9 - 1e-6 <= number_ <= high / 1e9 + 1e-6)
    return bool(low <= number_ <= high)


def check_kstats(node: Examined) -> Iterator[Finding]:
    """Each table's kstats: whether they exist, with all members and the values of `kstat -p`."""
    # one job, restarted with a new handle if a read blocks
    yield from node.job(lambda reader: list(_check_tables(node, reader)))


def _check_tables(node: Examined, reader: Reader) -> Iterator[Finding]:
    chosen = _chosen_refs(reader)
    compared = values = 0
    problem = ""                            # why kstat -p cannot be used
    for table in dict.fromkeys(ZONE_TABLES + NODE_TABLES):
        what = f"{table.module}:*:{table.names}"
        refs = chosen.get(table, [])
        if not refs:
            why = ABSENT.get(table.names) or ABSENT_MODULES.get(table.module)
            yield (NOTE if why else BAD), f"{what}: none" + (f": {why}" if why else "")
            continue
        wanted = IO if table.module == "disk" else RAW if table.names == "vminfo" else NAMED
        others = sorted({ref.type for ref in refs} - {wanted})
        if others:
            yield BAD, f"{what}: of type {others[0]}, not {wanted}"
        missing: set[str] = set()
        for ref in refs[:READS_A_TABLE]:
            try:
                data = reader.read(ref).data
                wrong = [] if problem else _differing(node, reader, ref)
            except KstatError as error:
                if not error.vanished:
                    yield BAD, str(error)
                continue
            except CommandError as error:
                problem, wrong = str(error), []
            if wrong:
                yield BAD, listed(f"{what}: kstat -p differs: ", wrong, 3)
            elif not problem:
                compared, values = compared + 1, values + len(data)
            missing |= {row.member for row in table.metrics} - set(data)
        yield (NOTE if missing else GOOD), f"{what}: {len(refs)}" + listed(
            ", without ", sorted(missing), 100)
    yield (GOOD if compared and not problem else BAD), (
        f"values were not compared: {problem}" if problem else
        f"{values} values of {compared} kstats are those of kstat -p")


def _differing(node: Examined, reader: Reader, ref: Ref) -> list[str]:
    """Members with another value in `kstat -p`; raises CommandError, KstatError. A gauge may
    differ once, not three times."""
    which = ("-c", "disk") if ref.module == "disk" else ("-m", ref.module)
    begin = f":{ref.instance}:{ref.name}:"
    wrong: list[str] = []
    for _ in range(3):
        before = reader.read(ref).data
        output = node.run("kstat", "-p", *which, "-i", str(ref.instance), "-n", ref.name)
        if output.status > 1:               # 1: no such kstat
            output.checked("kstat -p")
        after = reader.read(ref).data
        said = {line.partition("\t")[0].partition(begin)[2]: line.partition("\t")[2]
                for line in output.stdout.splitlines()}
        wrong = [f"{ref}:{member} ({said.get(member, 'nothing')}, not {value!r})"
                 for member, value in before.items()
                 if member not in said or not _same(value, said[member], after.get(member, value))]
        if not wrong:
            break
    return wrong


def check_guests(node: Examined) -> Iterator[Finding]:
    """Virtual machines: vmm goes by the debug id, viona by numbers of its own."""
    guests = {zone.debug_id: zone.name for zone in node.zones if zone.brand == "bhyve"}
    names = node.job(lambda reader: {
        str(reader.read(ref).data.get("vm_name")) for ref in reader.index.modules.get("vmm", ())
        if ref.name == "vm"})
    missing = [name for debug_id, name in guests.items()
               if GUEST_NAME.format(debug_id) not in names]
    if missing:
        yield BAD, listed("no vmm kstat of ", missing) + ": no vcpu metrics there; vmm has " \
            f"{listed('', sorted(names)) or 'none'}"
    viona = sum(header.module == "viona" for header in node.headers)
    yield GOOD, f"{len(guests)} bhyve zones, {len(names)} machines in vmm, {viona} NICs in viona"


def check_caps(node: Examined) -> Iterator[Finding]:
    """Whether "no cap" is reported in a known form."""
    memory = parse_sysinfo(node.sysinfo).memory_bytes
    rows = ((MEMCAP, "physcap", CAP.convert, 16 * memory or 2 ** 62),
            (MEMCAP, "swapcap", CAP.convert, 64 * memory or 2 ** 62),
            (LIMITS[1], "value", COUNT_CAP.convert, 10 ** 7))

    def read(reader: Reader) -> list[list[Any]]:
        refs = _chosen_refs(reader)
        return [[kstat.data.get(member) for kstat in reader.read_all(
            refs.get(table, ())[:500]).kstats] for table, member, _, _ in rows]
    for (table, member, convert, most), values in zip(rows, node.job(read)):
        caps = [value for value in map(convert, values) if value is not None]
        huge = sorted({str(value) for value in caps if value > most})
        if huge:
            yield BAD, listed(f"{table.module}:*:{table.names}:{member} is ", huge, 3) + \
                ", which looks like an unknown form of no cap"
        yield GOOD, f"{table.module} {member}: {len(caps)} caps, {len(values) - len(caps)} without"


def check_links(node: Examined) -> Iterator[Finding]:
    """Names of zones' links; those of LX differ between platforms."""
    links: dict[int, list[str]] = {}
    for header in node.headers:
        match = ZONE_LINK.fullmatch(header.name) if header.module == "link" else None
        if match:
            links.setdefault(int(match.group(1)), []).append(match.group(2))
    bare = [zone.name for zone in node.zones if zone.ip_type == "excl"
            and zone.zone_id not in links]
    lx = sorted({re.sub(r"[0-9]+$", "N", name) for zone in node.zones if zone.brand == "lx"
                 for name in links.get(zone.zone_id or 0, ())})
    yield GOOD, f"{sum(map(len, links.values()))} links of {len(links)} zones" + listed(
        "; LX calls them ", lx) + listed(f"; {len(bare)} zones have none: ", bare, 3)


def check_cost(node: Examined) -> Iterator[Finding]:
    """The cost of reading a page."""
    def read(reader: Reader) -> list[str]:
        chosen = _chosen_refs(reader)
        pages = {"the node": [ref for table in NODE_TABLES for ref in chosen.get(table, ())],
                 "a zone": next(iter(reader.index.zones.values()), [])}
        costs = []
        for page, refs in pages.items():
            began = time.thread_time()
            for kstat in reader.read_all(refs).kstats:
                len(kstat.data)             # decode it, too
            milliseconds = 1000 * (time.thread_time() - began)
            costs.append(f"{page}: {len(refs)} kstats read in {milliseconds:.1f} ms of CPU")
        return costs
    yield GOOD, "; ".join(node.job(read))


def check_commands(node: Examined) -> Iterator[Finding]:
    """Each command of a page: exit status, columns, form."""
    output, columns = list_datasets(node.run, node.pool)
    refused = [name for name in ZFS_COLUMNS if name not in columns]
    if refused:
        yield NOTE, listed("zfs list: this platform has no property ", refused, 20)
    datasets = parse_list("zfs list", output.stdout, columns)
    missing = [zone.name for zone in node.zones if f"{node.pool}/{zone.name}" not in datasets]
    if output.status or not datasets:
        yield BAD, f"zfs list: {output.last_line}"
    elif missing:
        yield BAD, listed(f"zfs list: no dataset {node.pool}/ZONE of ", missing, 3) + \
            ": is it in another pool?"
    else:
        yield GOOD, f"zfs list: {len(datasets)} datasets, {output.stdout.splitlines()[0][:200]!r}"
    printed = node.run("zpool", *ZPOOL_COMMAND).checked("zpool list")
    pools = parse_list("zpool list", printed, ZPOOL_COLUMNS)
    unknown = sorted({row.member for words in pools.values() for row in ZPOOL
                      if row.unit.convert(words[row.member]) in (None, -1)})
    first_line = printed.split("\n", 1)[0]
    yield (GOOD if pools else BAD), f"zpool list: {len(pools)} pools" + listed(
        ", without ", unknown) + f", {first_line[:200]!r}"


def check_clock(node: Examined) -> Iterator[Finding]:
    """ntpd, or chronyd."""
    try:
        peers, details = query_ntpd(node.run)
    except CommandError:
        yield GOOD, f"chronyd: {len(query_chronyd(node.run))} metrics"
        return
    missing = [row.member for row in NTP
               if row.unit.convert(details.system.get(row.member)) is None]
    yield GOOD, f"ntpd: {len(peers)} peers, {'one' if system_peer(peers) else 'none'} is the " \
        "system peer" + listed("; not printed: ", missing, 100)


def check_vminfod(node: Examined) -> Iterator[Finding]:
    """Whether vminfod sends its first event."""
    vms, end = Vms(node.settings.vminfod), time.monotonic() + node.left()
    vms.start()
    while not (vms.answered or vms.problem) and time.monotonic() < end:
        time.sleep(0.05)
    vms.stop()
    if vms.absent:
        yield NOTE, f"nothing listens at {node.settings.vminfod}: links have no NIC labels"
    elif not vms.answered:
        yield BAD, f"no event `ready` at {node.settings.vminfod}: {vms.problem or 'it is silent'}"
    else:
        unknown = [zone.name for zone in node.zones if zone.name not in vms.vms]
        yield GOOD, f"{len(vms.vms)} VMs" + listed("; not ", unknown, 3)


def check_port(node: Examined) -> Iterator[Finding]:
    """Whether the address can be listened on."""
    address = node.address()
    if address is None:
        yield NOTE, "not tried: the address is not known"
        return
    shown = f"{bracketed(address[0])}:{address[1]}"
    try:
        with listening_socket(address):
            yield GOOD, f"{shown} is free"
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            yield BAD, reason_of(error)
            return
        try:
            healthy = Client(max_idle=0).request("GET", f"http://{shown}/-/healthy",
                                                 timeout=node.left(3.0)).body
        except ClientError:
            healthy = b""
        ours = healthy.strip() == HEALTHY.encode()
        yield (GOOD if ours else BAD), f"{shown} is in use" + (" by this agent" if ours else "")


def check_plugins(node: Examined) -> Iterator[Finding]:
    """The plugins that the agent would run."""
    problems: list[str] = []
    plugins = [plugin.name for folder in node.settings.plugin_dirs.values()
               for plugin in find_plugins(folder, problems)]
    yield from ((BAD, problem) for problem in problems)
    yield GOOD, f"{len(plugins)} plugins" + listed(", ", plugins, 20)


class Item(NamedTuple):
    """A check, and the advice for what needs attention."""
    name: str
    look: Callable[[Examined], Iterator[Finding]]
    todo: str


CHECKS = (                                  # in this order: the first two need root
    Item("sysinfo", check_sysinfo, "run `sysinfo -f` as root, or set listen and pool"),
    Item("services", check_services, "see `svcs -xv`; import smf/cmon-original-off.xml to keep "
         "the original off, or set listen to another port to try both"),
    Item("user", check_user, "let the service's user read the agent's files: chmod -R a+rX"),
    Item("python", check_python, "install a 64-bit Python 3.9 or later"),
    Item("libkstat", check_libkstat, "use a 64-bit Python of this platform; send this report"),
    Item("zones", check_zones, "run `zoneadm list -p -c` as the service's user; send this report"),
    Item("kstats", check_kstats, "send this report with the platform's version (uname -v)"),
    Item("guests", check_guests, "send this report, with `kstat -p -m vmm -n vm`"),
    Item("caps", check_caps, "send this report: such a zone would seem to have a cap"),
    Item("links", check_links, "send this report"),
    Item("cost", check_cost, "send this report"),
    Item("commands", check_commands, "run the command as the service's user; see commands and pool "
         "in the settings"),
    Item("clock", check_clock, "see whether ntpd or chronyd runs; no ntp_ metrics without"),
    Item("vminfod", check_vminfod, "see `svcs -x vminfod`"),
    Item("port", check_port, "set listen, or stop what has the port"),
    Item("plugins", check_plugins, "chown root and chmod go-w what is named"),
)


def check(arguments: argparse.Namespace, settings: Settings) -> int:
    """`cmon_agent.py check`: whether the agent will work on this machine; changes nothing."""
    node = Examined(arguments, settings)
    logging.getLogger().addHandler(logging.NullHandler())
    rows: list[dict[str, str]] = []

    def tell(item: Item, status: str, found: str, todo: str = "") -> None:
        todo = (todo or item.todo) if status == BAD else ""
        rows.append({"check": item.name, "status": status, "found": found,
                     **({"todo": todo} if todo else {})})
        if not arguments.json:
            print(f"{status:4} {item.name}: {found}" + (f"\n     -> {todo}" if todo else ""),
                  flush=True)
    for item in CHECKS:
        try:
            if node.late:
                tell(item, BAD, "not checked: the minute is over")
                continue
            for finding in item.look(node):
                tell(item, *finding)
        except (KstatError, LibraryError, CommandError, CollectError, ConfigError, OSError,
                ValueError, RecursionError) as error:
            tell(item, BAD, str(error) or type(error).__name__)
    node.commands.kill()
    bad = sum(row["status"] == BAD for row in rows)
    if arguments.json:
        print(json.dumps({"format": 1, "version": __version__, "python": sys.version.split()[0],
                          "platform": " ".join(os.uname()), "findings": rows}, indent=1))
    else:
        print("nothing needs attention" if not bad else f"{bad} of {len(rows)} findings need "
              "attention; `check --json` makes a report to send")
    return 1 if bad else 0

# --- text files of zones --------------------------------------------------------------------------

TEXTFILES = ("var", "triton", "metrics")    # below the root of a zone
TEXTFILE_BYTES = 256 << 10
TEXTFILE_MOST = 16


def read_textfiles(root: str) -> int:
    """In a separate process: print a zone's text files as JSON, each its text or [problem].

    The tenant owns everything below `root`: links are not followed, only regular files on the
    zone's file system are opened, and the parent's deadline holds.
    """
    files: dict[str, Any] = {}
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    device = os.fstat(folder).st_dev
    try:
        for component in TEXTFILES:
            folder = os.open(component, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                             | os.O_NONBLOCK, dir_fd=folder)
            if os.fstat(folder).st_dev != device:
                raise OSError(errno.EXDEV, "another file system is mounted there")
        names = sorted(name for name in os.listdir(folder) if name.endswith(".prom"))
    except FileNotFoundError:
        names = []
    for place, name in enumerate(names):
        shown = name.encode("utf-8", "replace").decode()
        if place >= TEXTFILE_MOST:
            files[shown] = [f"more than {TEXTFILE_MOST} files"]
            break
        try:
            files[shown] = _textfile(folder, name, device)
        except OSError as error:
            files[shown] = [reason_of(error)]
    json.dump(files, sys.stdout)
    return 0


def _textfile(folder: int, name: str, device: int) -> str:
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_dev != device:
        raise OSError(errno.EINVAL, "not a regular file")
    with os.fdopen(file, "rb") as stream:
        content = stream.read(TEXTFILE_BYTES + 1)       # regardless of its size: it may grow
    if len(content) > TEXTFILE_BYTES:
        raise OSError(errno.EFBIG, f"larger than {TEXTFILE_BYTES} bytes")
    return content.decode("utf-8", "replace")

# --- main -----------------------------------------------------------------------------------------


def print_address(arguments: argparse.Namespace, settings: Settings) -> int:
    """`cmon_agent.py address FILE`, for the set-up service: where the agent will listen."""
    try:
        address = settings.listen or admin_address(read_sysinfo_file(arguments.file))
        if address is None:
            raise ConfigError(f"{arguments.file}: no address on the admin network")
    except ConfigError as error:
        complain("cmon_agent", error.problems)
        return 1
    print(address)
    return 0


class Command(NamedTuple):
    """A subcommand of the agent: its function, help and flags."""
    run: Callable[[argparse.Namespace, Settings], int]
    description: str
    flags: tuple[tuple[str, Mapping[str, Any]], ...]


CONFIG = ("--config", {"metavar": "FILE", "help": "settings file (JSON)"})
LIBKSTAT = ("--libkstat", {"metavar": "PATH", "help": "path of libkstat"})
COMMANDS = {
    "capture": Command(
        capture, "Write what the collectors read on this host, for --replay and bug reports.", (
            ("file", {"metavar": "FILE", "help": "output file; - for standard output"}),
            ("--frames", {
                "type": within(int, 1, 100, "a number from 1 to 100"), "default": 2,
                "metavar": "N", "help": "number of readings (2)"}),
            ("--interval", {
                "type": within(float, 0.001, 86400, "a number of seconds, at most 86400"),
                "default": 5.0, "metavar": "SECONDS", "help": "time between two readings (5)"}),
            CONFIG, LIBKSTAT)),
    "check": Command(
        check, "Check, in the global zone, that everything the agent needs is present and that its "
        "values are those of `kstat -p`. Changes nothing; takes a minute at most. Exit 1: "
        "something needs attention.", (
            CONFIG,
            ("--json", {"action": "store_true", "help": "print a JSON report for a bug report"}),
            ("--user", {
                "default": "noaccess", "metavar": "NAME",
                "help": "user of the service; root switches to it (noaccess)"}),
            LIBKSTAT)),
    "address": Command(
        print_address, "Print where the agent would listen; exit 1 while there is no address.", (
            ("file", {"metavar": "FILE", "help": "what `sysinfo -f` printed"}), CONFIG)),
}


def agent_command_line(command: str = "") -> argparse.ArgumentParser:
    """The agent's flags, or those of one of its commands."""
    if command:
        parser: argparse.ArgumentParser = CommandLine(
            prog=f"cmon_agent.py {command}", allow_abbrev=False,
            description=COMMANDS[command].description)
        parser.set_defaults(replay=None)
        flags = COMMANDS[command].flags
    else:
        parser = command_line("cmon_agent.py", "Serve the metrics of this compute node and its "
                              "zones; `cmon_agent.py capture FILE` writes what --replay serves.")
        flags = (("--replay", {"metavar": "CAPTURE", "help":
                               "serve a capture in place of this host"}), LIBKSTAT)
    for name, options in flags:
        parser.add_argument(name, **options)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the agent or one of its subcommands; return the exit status."""
    open_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["textfiles"] and len(words) == 2:      # for the agent itself
        try:
            return read_textfiles(words[1])
        except OSError as error:
            complain("cmon_agent", [f"{words[1]}: {reason_of(error)}"])
            return 1
    if words[:1] and words[0] in COMMANDS:
        arguments = agent_command_line(words[0]).parse_args(words[1:])
        try:
            settings = load_agent(arguments)
            return printing("cmon_agent", lambda: COMMANDS[words[0]].run(arguments, settings))
        except ConfigError as error:
            complain("cmon_agent", error.problems)
            return EXIT_USAGE
    parser = agent_command_line()
    if words[:1] and not words[0].startswith("-"):
        parser.error(not_known("COMMAND", words[0], list(COMMANDS)))
    arguments = parser.parse_args(words)
    running = Running(arguments)
    return run_daemon("agent", arguments, running.load, running.start, running.reload,
                      running.check)


if __name__ == "__main__":
    sys.exit(main())
