#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""Scrapes a tenant's containers through the proxy and pushes their metrics to other systems.

    cmon_forwarder.py --config FILE [--check-config] [--dry-run] [--once] [--smf] …

For systems that cannot pull: InfluxDB, Graphite, StatsD, syslog, Graylog, Elasticsearch, Splunk,
Prometheus remote write, files. Each scrape is encoded for every sink and appended to the sink's
spool; a thread per sink reads the spool and delivers. Samples are on disk before they are sent, and
a slow or dead sink does not delay the others.

The server's loop owns discovery, scraping and encoding. It shares each spool with the thread of its
sink, under the spool's lock.

Map (`grep '^# ---'`):

    settings
    discovery
    scraping
    encoders
    spool
    delivery
    main
"""
from __future__ import annotations  # a SyntaxError here: this program needs Python 3.9 or later

import argparse
import base64
import collections
import dataclasses
import email.utils
import errno
import fcntl
import fnmatch
import functools
import hashlib
import html
import json
import math
import os
import random
import re
import select
import selectors
import socket
import ssl
import struct
import sys
import threading
import time
import urllib.parse
import zlib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple, Union

if sys.version_info < (3, 9):       # one line instead of a traceback
    sys.exit("cmon_forwarder: needs Python 3.9 or later, this is " + sys.version.split()[0])

try:
    # The agent must run as a single file, so it contains the shared kit.
    from cmon_agent import (
        Answer, AnswerReader, Backoff, COUNTER, Client, ClientError, ConfigError, ExpositionError,
        Family, GAUGE, HISTOGRAM, LEVELS, Labels, Loop, MAX_JSON_BYTES, Number, PAGE, Pool,
        READ_SIZE, Registry, Request, Response, Route, SUFFIXES, SUMMARY, Sample, Server, TooLarge,
        __version__, at_least, begin_connect, bracketed, command_line, command_settings, complain,
        gunzip, gzip, is_address, label_text, log, number, one_of, open_regular,
        open_streams, page_row, page_table, parse, parse_address, plain_page, printing, read_file,
        reason_of, register_process_metrics, render, run_daemon, setting, single, start_logging,
        stop_logging, text, valid_label_name, valid_metric_name)
except ImportError as import_error:
    sys.exit(f"cmon_forwarder: {import_error}: cmon_agent.py of the same version must be beside "
             "cmon_forwarder.py")

# --- settings -------------------------------------------------------------------------------------

USER_AGENT = f"cmon-forwarder/{__version__}"


@dataclass(frozen=True)
class ProxySettings:
    """The proxy whose containers are scraped."""
    url: str = setting(dataclasses.MISSING, "https://HOST:PORT of the proxy")
    cert: Path | None = setting(None, "PEM file: the tenant's certificate")
    key: Path | None = setting(None, "PEM file: its private key")
    ca: Path | None = setting(None, "PEM file: CA of the proxy's certificate; null: the system's")


@dataclass(frozen=True)
class SinkSettings:
    """Where samples go; the table SINKS lists the keys of each type."""
    type: str = setting(dataclasses.MISSING, "type of the sink")
    url: str | None = setting(None, "http or https URL")
    database: str | None = setting(None, "InfluxDB 1: the database")
    org: str | None = setting(None, "InfluxDB 2: the organisation")
    bucket: str | None = setting(None, "InfluxDB 2: the bucket")
    token: str | None = setting(None, "API token")
    token_file: Path | None = setting(None, "file that contains the token; read for each request")
    headers: dict[str, str] | None = setting(None, "additional HTTP headers")
    gzip: bool | None = setting(None, "compress requests (InfluxDB: true, else false)")
    address: str | None = setting(None, "HOST:PORT", lambda value: None
                                  if value is None else is_address(value))
    transport: str | None = setting(None, "udp, tcp or tls")
    form: str | None = setting(None, "format, for types that have several")
    prefix: str | None = setting(None, "prefix of dotted names (cmon)")
    tags: bool | None = setting(None, "StatsD: send DogStatsD tags (false)")
    index: str | None = setting(None, "Elasticsearch: index or data stream (cmon)")
    path: Path | None = setting(None, "path of the file")
    rotate_bytes: int | None = setting(None, "rotate the file at this size (64 MiB)",
                                       at_least(1))
    keep: int | None = setting(None, "rotated files to keep (5)", at_least(0))
    cert: Path | None = setting(None, "PEM file: client certificate for the sink")
    key: Path | None = setting(None, "PEM file: its private key")
    ca: Path | None = setting(None, "PEM file: CA of the sink's certificate; null: the system's")
    timeout: float = setting(10.0, "timeout of a delivery in seconds", at_least(0.1))
    batch_bytes: int = setting(1 << 20, "approximate maximum size of a delivery",
                               at_least(1))
    batch_age: float = setting(1.0, "maximum seconds that a sample waits for a full batch",
                               at_least(0))


@dataclass(frozen=True)
class Settings:
    """All settings of the forwarder."""
    proxy: ProxySettings = setting(dataclasses.MISSING, "the proxy to scrape")
    sinks: dict[str, SinkSettings] = setting(dataclasses.MISSING, "sinks by name")
    interval: float = setting(15.0, "scrape interval in seconds", at_least(0.1))
    groups: list[str] = setting([], "only containers in these groups; empty: all")
    shard: str | None = setting(None, "k/n: this forwarder's share of the containers, k from 1")
    timeout: float = setting(10.0, "timeout of a scrape in seconds, at most the interval",
                             at_least(0.1))
    max_in_flight: int = setting(32, "maximum concurrent scrapes and connections", at_least(1))
    spool: Path | None = setting(None, "folder of the spools; null: `spool` beside this file")
    spool_bytes: int = setting(256 << 20, "maximum size of a sink's spool", at_least(4096))
    listen: str = setting("127.0.0.1:9164", "address for health checks and the forwarder's own "
                          "metrics", is_address)
    labels: dict[str, str] = setting({}, "labels added to every sample")
    include: list[str] = setting([], "globs: only these metrics; empty: all")
    exclude: list[str] = setting([], "globs: not these metrics")
    rename: dict[str, str] = setting({}, "new metric names by old name")
    log_level: str = setting("info", "lowest level that is logged", one_of(*LEVELS))
    log_format: str = setting("", "text or bunyan; empty: text on a terminal, bunyan otherwise",
                              one_of("", "text", "bunyan"))


def problems_of(settings: Settings) -> list[str]:
    """Check what the types of the settings cannot express; return what is wrong."""
    problems: list[str] = []

    def check(failed: object, message: str) -> None:
        if failed:
            problems.append(message)
    for name, value in dataclasses.asdict(settings).items():
        check(re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False, default=str)),
              f"{name}: contains a lone surrogate (\\ud800 to \\udfff), which is not Unicode text")
    check(not re.fullmatch(r"https?://[^/?#]+/?", settings.proxy.url)
          or not is_url(settings.proxy.url), "proxy.url: must be https://HOST:PORT")
    check((settings.proxy.cert is None) != (settings.proxy.key is None),
          "proxy: set both cert and key, or neither")
    check(is_url(settings.proxy.url) and settings.proxy.url.startswith("https:")
          and settings.proxy.cert is None, "proxy.cert: is missing: https needs cert and key")
    if settings.shard is not None:
        match = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", settings.shard)
        check(match is None or not 1 <= int(match.group(1)) <= int(match.group(2)),
              f"shard: must be k/n with k from 1 to n, not {settings.shard!r}")
    for group in settings.groups:
        check(not group or "," in group, f"groups: {group!r} is not a group name: it must not be "
              "empty or contain a comma")
    for name in settings.labels:
        check(not valid_label_name(name), f"labels: {name!r} is not a label name")
        check(name in OWN_LABELS, f"labels: {name} is reserved")
    for name in ("include", "exclude"):
        for pattern in getattr(settings, name):
            check(Pattern.read(pattern) is None,
                  f"{name}: {pattern!r} is not NAME or NAME{{LABEL=GLOB,…}}")
    for old, new in settings.rename.items():
        check(not valid_metric_name(new), f"rename.{old}: {new!r} is not a metric name")
    check(not settings.sinks, "sinks: at least one is required")
    for name, sink in settings.sinks.items():
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", name):
            problems.append(f"sinks: {name!r}: a name has at most 64 letters, digits, _ and -")
        problems += [f"sinks.{name}{problem}" for problem in problems_of_sink(sink)]
    return problems


SINK_KEYS_OF_ALL = frozenset(("type", "timeout", "batch_bytes", "batch_age"))
TLS_KEYS = ("cert", "key", "ca")


def problems_of_sink(sink: SinkSettings) -> list[str]:
    """Keys that are missing, wrong, or not for this type; each problem begins with its key."""
    row = SINKS.get(sink.type)
    if row is None:
        return [f".type: must be one of {', '.join(SINKS)}, not {sink.type!r}"]
    problems: list[str] = []
    taken = SINK_KEYS_OF_ALL.union(row.required, row.optional)
    for field in dataclasses.fields(sink):
        if field.name not in taken and getattr(sink, field.name) is not None:
            problems.append(f".{field.name}: not a setting of {sink.type}, which has "
                            f"{', '.join(sorted(taken))}")
    problems += [f".{key}: is missing" for key in row.required if getattr(sink, key) is None]
    if sink.url is not None and not is_url(sink.url):
        problems.append(".url: must be an http or https URL, without user and password")
    if not re.fullmatch(r"[A-Za-z0-9_.-]*", sink.prefix or ""):
        problems.append(f".prefix: {sink.prefix!r} may contain only letters, digits, _, - and .")
    for key, valid in (("form", row.forms), ("transport", row.transports)):
        if valid and getattr(sink, key) not in (None, *valid):
            problems.append(f".{key}: must be one of {', '.join(valid)}")
    if (sink.cert is None) != (sink.key is None):
        problems.append(": set both cert and key, or neither")
    if sink.token is not None and sink.token_file is not None:
        problems.append(": set either token or token_file, not both")
    if sink.type == "influxdb" and (sink.database is None) == (
            sink.org is None or sink.bucket is None):
        problems.append(": needs database (InfluxDB 1), or org and bucket (InfluxDB 2)")
    for name, value in (sink.headers or {}).items():
        if not re.fullmatch(r"[A-Za-z0-9-]+", name) or not re.fullmatch(r"[\t -~]*", value):
            problems.append(f".headers: {name!r}: not a valid HTTP header")
    return problems


def is_url(value: str) -> bool:
    """Whether our HTTP clients accept this URL."""
    try:
        parts = urllib.parse.urlsplit(value)
        parse_address(parts.netloc, 80)
        return (parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
                and "@" not in parts.netloc     # a password in the URL would not be sent
                and re.fullmatch(r"[!-~]+", value) is not None)
    except ValueError:
        return False


def client_context(cert: Path | None, key: Path | None, ca: Path | None) -> ssl.SSLContext:
    """TLS as a client, with a certificate if there is one; raises ConfigError."""
    def refuse_passphrase() -> str:
        raise ConfigError(f"{key}: has a passphrase, which a service cannot enter; remove it with "
                          "`openssl pkey -in KEY -out NEWKEY`")
    for path in (cert, key, ca):
        if path is not None:
            try:
                read_file(path)
            except OSError as error:
                raise ConfigError(f"{path}: {reason_of(error)}") from None
    try:
        context = ssl.create_default_context(cafile=None if ca is None else str(ca))
    except (OSError, ValueError):
        raise ConfigError(f"{ca}: contains no CA certificate in PEM") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Python 3.13 rejects CAs without a key usage extension, which curl and Go accept.
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    if cert is not None and key is not None:
        try:
            context.load_cert_chain(cert, key, password=refuse_passphrase)
        except ConfigError:
            raise
        except (OSError, ValueError):       # SSLError is an OSError; its message does not help
            raise ConfigError(f"{cert}, {key}: not a certificate and its key in PEM") from None
    return context

# --- discovery ------------------------------------------------------------------------------------

OWN_LABELS = ("alias", "instance")      # every sample has them, before all others


class Target(NamedTuple):
    """A container: its identity, the path of its page, and the labels of all its samples."""
    instance: str                           # UUID
    alias: str
    path: str                               # of its page, at the proxy
    labels: Labels                          # alias, instance, and those of the settings


class DiscoveryError(ValueError):
    """The proxy's answer is not a list of targets; known targets stay."""


def discovery_path(groups: Sequence[str], shard: str | None) -> str:
    """Path and query of discovery."""
    query = {name: value for name, value in (("groups", ",".join(groups)), ("shard", shard))
             if value}
    return "/v1/sd" + ("?" + urllib.parse.urlencode(query) if query else "")


def read_targets(body: bytes, static: Mapping[str, str]) -> dict[str, Target]:
    """An answer of HTTP service discovery as targets by UUID; raises DiscoveryError."""
    try:
        groups = json.loads(body.decode())
    except (ValueError, RecursionError):
        raise DiscoveryError("not JSON") from None
    if not isinstance(groups, list):
        raise DiscoveryError("not a list of targets")
    targets: dict[str, Target] = {}
    for group in groups:
        labels = group.get("labels") if isinstance(group, dict) else None
        if not isinstance(labels, dict) or not all(
                isinstance(value, str) for value in labels.values()):
            raise DiscoveryError("a target has no labels")
        # JSON may contain lone surrogates, UTF-8 may not
        labels = {name: value.encode("utf-8", "replace").decode()
                  for name, value in labels.items()}
        instance = labels.get("instance") or labels.get("__meta_triton_machine_id")
        path = labels.get("__metrics_path__", "")
        if not instance or not re.fullmatch(r"/[!-~]*", path):
            raise DiscoveryError("a target has no instance or no __metrics_path__")
        alias = labels.get("__meta_triton_machine_alias") or instance
        targets[instance] = Target(instance, alias, path, (
            ("alias", alias), ("instance", instance),
            *((name, value) for name, value in static.items() if value)))
    return targets

# --- scraping -------------------------------------------------------------------------------------


class Series(NamedTuple):
    """Name and labels of a sample, without the labels of its target."""
    name: str
    labels: Labels
    counter: bool = False                   # it only increases, or restarts at zero


class Scrape(NamedTuple):
    """One scrape of one target: the input of encoders."""
    target: Target
    at: int                                 # when it began, milliseconds since 1970
    points: Sequence[tuple[Series, Number]]
    increases: Mapping[Series, Number] = {}     # of counters, since the previous scrape
    gone: Sequence[Series] = ()             # series that only the previous scrape had


UP = Series("up", ())
DURATION = Series("scrape_duration_seconds", ())
SCRAPED = Series("scrape_samples_scraped", ())
SCRAPE_SERIES = (UP, DURATION, SCRAPED)
SHAPES = 65_536             # cached lines; the pages of all zones share most of them


class Pattern(NamedTuple):
    """`NAME` or `NAME{LABEL=GLOB,…}`, all of them globs; a missing label is empty."""
    name: str
    labels: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, pattern: str) -> Pattern | None:
        """Parse a setting; None if it is not a pattern."""
        match = re.fullmatch(r"([^{}=,]*)(?:\{([^{}]+)\})?", pattern)
        if match is None or not pattern:
            return None
        pairs = [pair.partition("=") for pair in match.group(2).split(",")] \
            if match.group(2) else []
        if not all(name and equals for name, equals, _ in pairs):
            return None
        return cls(match.group(1) or "*", tuple((name, glob) for name, _, glob in pairs))

    def fits(self, name: str, labels: Mapping[str, str]) -> bool:
        """Whether a sample matches."""
        return fnmatch.fnmatchcase(name, self.name) and all(
            fnmatch.fnmatchcase(labels.get(label, ""), glob) for label, glob in self.labels)


def exported(labels: Labels, reserved: Container[str]) -> Labels:
    """Labels with `exported_` before names reserved by us or by Prometheus (`__…`)."""
    if not any(name in reserved or name.startswith("__") for name, _ in labels):
        return labels
    taken = {name for name, _ in labels}
    renamed = []
    for name, value in labels:
        if name in reserved or name.startswith("__"):
            while name in reserved or name in taken or name.startswith("__"):
                name = f"exported_{name}"
            taken.add(name)
        renamed.append((name, value))
    return tuple(renamed)


class Selector:
    """Which samples are forwarded, and under which name."""

    def __init__(self, settings: Settings) -> None:
        self.include, self.exclude = ([pattern for pattern in map(Pattern.read, words) if pattern]
                                      for words in (settings.include, settings.exclude))
        self.rename = dict(settings.rename)
        self.reserved = frozenset((*OWN_LABELS, *settings.labels))
        self.scrape_names = {series: self.series(series) for series in SCRAPE_SERIES}
        self.reserved_series = {(series.name, series.labels)
                                for series in self.scrape_names.values()}
        # patterns on the target's labels must be matched for each target
        self.by_target = any(name in self.reserved for pattern in (*self.include, *self.exclude)
                             for name, _ in pattern.labels)

    def takes(self, name: str, labels: Mapping[str, str]) -> bool:
        """Whether a sample of a page is forwarded."""
        return ((not self.include or any(pattern.fits(name, labels) for pattern in self.include))
                and not any(pattern.fits(name, labels) for pattern in self.exclude))

    def scrape_series(self, target: Target, points: Iterable[tuple[Series, Number]]
                  ) -> list[tuple[Series, Number]]:
        """`up` and the other series about the scrape: only `exclude` applies to them."""
        labels = dict(target.labels)
        return [(self.scrape_names[series], value) for series, value in points
                if not any(pattern.fits(series.name, labels) for pattern in self.exclude)]

    def series(self, series: Series) -> Series:
        """The series as it is forwarded: `exported_…` for labels that the target has."""
        labels = exported(tuple([label for label in series.labels if label[1]]), self.reserved)
        return Series(self.rename.get(series.name, series.name), labels, series.counter)

    def points(self, target: Target, points: Sequence[tuple[Series, Series, Number]]
               ) -> list[tuple[Series, Number]]:
        """Samples to forward, of a page's (series on the page, series as forwarded, value)."""
        if self.by_target:
            labels = dict(target.labels)
            return [(series, value) for bare, series, value in points
                    if self.takes(bare.name, {**dict(bare.labels), **labels})]
        return [(series, value) for _, series, value in points]


_PLAIN_FLOAT = re.compile(r"-?[0-9]{1,40}\.[0-9]{1,40}", re.ASCII)


class PageReader:
    """Parses pages; a known line costs one dict lookup.

    Pages of zones differ mostly in their values. The kit's parser decides what is valid: it reads
    the whole page if a line is new or the lines are in an unusual order.
    """

    def __init__(self, selector: Selector) -> None:
        self.selector = selector
        # `NAME{LABELS}` as written -> name and TYPE, series, series as forwarded (None: dropped)
        self._shapes: dict[str, tuple[tuple[str, str], Series, Series | None]] = {}
        self._heads: dict[str, tuple[str, str] | None] = {}     # comment -> name and TYPE
        # Series that `rename`, or labels without a value, may make equal: name and labels as
        # forwarded -> the first series that becomes that; name as forwarded -> names on the page
        self._origins: dict[tuple[str, Labels], Series] = {}
        self._shared: dict[str, set[str]] = {}
        self._reported: set[str] = set()

    def read(self, page: str) -> tuple[list[tuple[Series, Series, Number]], int]:
        """Samples to forward, and how many the page has; raises ExpositionError."""
        samples = self._quick(page)
        if samples is None:
            self._learn(page)
            samples = self._quick(page)
        if samples is None:                 # too many shapes, or an unusual order
            samples = self._slow(page)
        return samples

    def _quick(self, page: str) -> tuple[list[tuple[Series, Series, Number]], int] | None:
        """`read` for pages of known lines; None for others."""
        if not page.endswith("\n"):
            return None
        shapes, heads = self._shapes, self._heads
        family = ("", "")
        points: list[tuple[Series, Series, Number]] = []
        seen: set[str] = set()
        count = 0
        for line in page.split("\n"):
            if line[:1] == "#":
                head = heads.get(line, family)
                if head is family or head is not None and f"#{head[0]}" in seen:
                    return None
                if head is not None:
                    family = head
                    seen.add(f"#{family[0]}")
                continue
            if not line:
                continue
            key, _, value_text = line.rpartition(" ")
            shape = shapes.get(key)
            if shape is None or shape[0] != family or key in seen:
                return None
            seen.add(key)
            if value_text.isdigit() and len(value_text) <= 20 and value_text.isascii():
                value: Number = int(value_text)
            elif _PLAIN_FLOAT.fullmatch(value_text):
                value = float(value_text)
            else:
                try:
                    value = self._value(value_text)
                except ExpositionError:
                    return None
            count += 1
            if shape[2] is not None:
                points.append((shape[1], shape[2], value))
        return points, count

    @staticmethod
    @functools.lru_cache(4096)
    def _value(value_text: str) -> Number:
        """A value as the kit parses it."""
        return parse(f"x {value_text}\n")[0].samples[0].value

    def _learn(self, page: str) -> None:
        """Have the kit parse the page, and cache its lines; raises ExpositionError."""
        parse(page)
        if max(len(self._shapes), len(self._heads), len(self._origins)) > SHAPES:
            self._shapes.clear()
            self._heads.clear()
            self._origins.clear()
            self._shared.clear()
        family, kind = "", ""
        for line in page.split("\n"):
            if line[:1] == "#":
                words = line[1:].split()
                if words[:1] == ["TYPE"]:
                    family, kind = words[1], words[2]
                self._heads[line] = (family, kind) if words[:1] == ["TYPE"] else None
            elif line.strip(" \t\r"):
                name, _, _, (sample,) = parse(line + "\n")[0]
                key = line.rpartition(" ")[0]
                # `_slow` handles lines with a timestamp or outside of their family
                if (key == name or key.endswith("}")) and name in [family] + [
                        family + suffix for suffix in SUFFIXES.get(kind, ())]:
                    self._shapes[key] = ((family, kind), *self._series(name, kind, sample.labels))

    def _series(self, name: str, kind: str, labels: Labels) -> tuple[Series, Series | None]:
        counter = kind == COUNTER or kind in (HISTOGRAM, SUMMARY) and name.endswith(
            SUFFIXES[kind])
        bare = Series(name, labels, counter)
        if not (self.selector.by_target or self.selector.takes(name, dict(labels))):
            return bare, None
        series = self.selector.series(bare)
        # drop a page's own `up`: ours has the same name
        if (series.name, series.labels) in self.selector.reserved_series:
            return bare, None
        origin = self._origins.setdefault((series.name, tuple(sorted(series.labels))), bare)
        if origin != bare:
            self._shared.setdefault(series.name, {origin.name}).add(name)
        return bare, series

    def distinct(self, target: Target, points: list[tuple[Series, Number]]
                 ) -> list[tuple[Series, Number]]:
        """Without samples that became the same series as another one of the page; the first stays.
        Prometheus refuses such batches, and StatsD adds the values up."""
        if not self._shared:
            return points
        seen: set[tuple[str, Labels]] = set()
        kept = []
        for series, value in points:
            if series.name in self._shared:
                key = (series.name, tuple(sorted(series.labels)))
                if key in seen:
                    if series.name not in self._reported:
                        self._reported.add(series.name)
                        log.warning(
                            "%r: several samples (of %s) become %s%s: only the first is sent; give "
                            "them different names in `rename`", target.alias,
                            ", ".join(sorted(self._shared[series.name])), series.name,
                            label_text(series.labels))
                    continue
                seen.add(key)
            kept.append((series, value))
        return kept

    def _slow(self, page: str) -> tuple[list[tuple[Series, Series, Number]], int]:
        points = []
        count = 0
        for family in parse(page):
            for sample in family.samples:
                count += 1
                bare, series = self._series(family.name + sample.suffix, family.kind,
                                            sample.labels)
                if series is not None:
                    points.append((bare, series, sample.value))
        return points, count


class Reply(NamedTuple):
    """The result of a fetch: an answer, or why there is none."""
    status: int
    body: bytes
    problem: str = ""


def raise_error_of(connection: socket.socket, error: int = 0) -> None:
    """Raise the pending error of a connection, if there is one."""
    error = error or connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


Finish = Callable[[Reply], None]
IDLE_SECONDS = 60.0         # unused connections to the proxy are closed after this


class Fetch:
    """A GET request; its timeout starts when it gets a connection."""
    __slots__ = ("path", "timeout", "finish", "done", "began", "started", "again", "tried",
                 "max_body")

    def __init__(self, path: str, timeout: float, finish: Finish, max_body: int,
                 began: Callable[[], None] | None) -> None:
        self.path, self.timeout, self.finish, self.max_body = path, timeout, finish, max_body
        self.began = began
        self.started = self.done = False
        self.again = False                  # lost on a reused connection and retried
        self.tried: tuple[Any, ...] = ()    # addresses that failed


class ProxyConnection:
    """One connection to the proxy, in the loop's selector; never blocks, TLS included."""

    def __init__(self, fetcher: Fetcher, address: Any, family: int, fetch: Fetch) -> None:
        self.fetcher, self.fetch = fetcher, fetch
        self.address = address
        self.connected = False
        self.used = False                   # it has carried an answer
        self.idle_since = 0.0
        self.generation = fetcher.generation
        self._reader: AnswerReader | None = None
        self._unsent = b""
        self._step = self._connected
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._error = begin_connect(self.socket, address)
        fetcher.loop.watch(self.socket, selectors.EVENT_WRITE, self)

    def ready(self, _mask: int) -> None:
        """Called by the selector."""
        try:
            self._step()
        except ssl.SSLWantReadError:
            self._watch(selectors.EVENT_READ)
        except ssl.SSLWantWriteError:
            self._watch(selectors.EVENT_WRITE)
        except (BlockingIOError, InterruptedError):
            pass
        except (OSError, ValueError) as error:      # SSLError is an OSError
            self.fetcher.lost(self, reason_of(error))
        except ClientError as error:
            self.fetcher.lost(self, str(error))

    def _watch(self, events: int) -> None:
        self.fetcher.loop.watch(self.socket, events, self)

    def _connected(self) -> None:
        raise_error_of(self.socket, self._error)
        self.connected = True
        context = self.fetcher.context
        if context is None:
            self.send(self.fetch)
            return
        self.fetcher.loop.unwatch(self.socket)    # wrap_socket() detaches it
        self.socket = context.wrap_socket(self.socket, do_handshake_on_connect=False,
                                          server_hostname=self.fetcher.host)
        self._step = self._shake
        self._watch(selectors.EVENT_WRITE)
        self._shake()

    def _shake(self) -> None:
        assert isinstance(self.socket, ssl.SSLSocket)
        self.socket.do_handshake()
        self.send(self.fetch)

    def send(self, fetch: Fetch) -> None:
        """Start a request."""
        self.fetch = fetch
        self._reader = AnswerReader(max_body=fetch.max_body)
        self._unsent = self.fetcher.head_of(fetch)
        self._step = self._send
        self.ready(selectors.EVENT_WRITE)

    def _send(self) -> None:
        while self._unsent:
            try:
                sent = self.socket.send(self._unsent)
            except BlockingIOError:
                self._watch(selectors.EVENT_WRITE)
                return
            self._unsent = self._unsent[sent:]
        self._step = self._read
        self._watch(selectors.EVENT_READ)

    def _read(self) -> None:
        reader = self._reader
        while True:
            received = self.socket.recv(READ_SIZE)
            if reader is None:
                raise ClientError("")       # closed while idle, or unrequested data
            if received:
                reader.feed(received)
            else:
                reader.end()
            if reader.done:
                break
            if not isinstance(self.socket, ssl.SSLSocket) or not self.socket.pending():
                self._watch(selectors.EVENT_READ)
                return
        self._reader, self.used = None, True
        self._watch(selectors.EVENT_READ)
        self.fetcher.answered(self, reader)

    @property
    def begun(self) -> bool:
        """Whether the answer has begun."""
        return self._reader is not None and self._reader.begun

    def close(self) -> None:
        """Close the connection."""
        self.fetcher.loop.unwatch(self.socket)
        self.socket.close()


class Fetcher:
    """Gets pages from the proxy over a few persistent connections. Owned by the loop."""

    def __init__(self, loop: Loop, settings: Settings, context: ssl.SSLContext | None) -> None:
        self.loop = loop
        self._resolver = Pool("resolver", 1)
        self.links: set[ProxyConnection] = set()
        self._idle: list[ProxyConnection] = []
        self._queue: collections.deque[Fetch] = collections.deque()
        self._active: dict[Fetch, ProxyConnection] = {}
        self._addresses: collections.deque[tuple[int, Any]] = collections.deque()   # round robin
        self._dead: set[Any] = set()        # addresses that failed recently
        self._resolving = False
        self._queue_timeout = 0.0                # seconds that a request waits for a connection
        self.generation = 0                 # of settings; connections of older ones are not reused
        self.host, self.port, self.context, self.most = "", 0, context, 1
        self.use(settings, context)
        loop.every(IDLE_SECONDS / 4, self._close_idle)
        loop.every(IDLE_SECONDS, self._dead.clear)

    def use(self, settings: Settings, context: ssl.SSLContext | None) -> None:
        """Apply new settings; requests in flight finish with the old ones."""
        parts = urllib.parse.urlsplit(settings.proxy.url)
        self.context = context
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if context is not None else 80)
        shown = bracketed(self.host)
        self._host_line = shown if parts.port is None else f"{shown}:{self.port}"
        self.most = settings.max_in_flight
        self._queue_timeout = settings.interval
        self.generation += 1
        for link in self._idle:
            link.close()
            self.links.discard(link)
        self._idle.clear()
        self._addresses.clear()
        self.resolve()

    @property
    def in_flight(self) -> int:
        """Requests that have a connection."""
        return len(self._active)

    def resolve(self) -> None:
        """Resolve the proxy's name in a thread, since it may block."""
        if not self._resolving:
            self._resolving = self._resolver.submit(self._look_up, self.host, self.port)

    def _look_up(self, host: str, port: int) -> None:
        addresses: list[tuple[int, Any]] = []
        problem = ""
        try:
            addresses = [(family, address) for family, _, _, _, address in
                         socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except (OSError, ValueError) as error:
            problem = reason_of(error)
        self.loop.call_soon(self._looked_up, host, port, addresses, problem)

    def _looked_up(self, host: str, port: int, addresses: list[tuple[int, Any]], problem: str
                   ) -> None:
        self._resolving = False
        if (host, port) != (self.host, self.port):
            self.resolve()
            return
        if addresses:
            self._addresses = collections.deque(addresses)
        elif not self._addresses:
            for fetch in list(self._queue):
                self._end(fetch, Reply(0, b"", f"{host}: {problem}"))
            self._queue.clear()
        self._start_next()

    def fetch(self, path: str, timeout: float, finish: Finish, max_body: int,
              began: Callable[[], None] | None = None) -> None:
        """Get a page; calls `began` when its timeout starts and `finish` once, with the result."""
        fetch = Fetch(path, timeout, finish, max_body, began)
        self._queue.append(fetch)
        self.loop.call_later(self._queue_timeout, self._give_up, fetch)
        if not self._addresses:
            self.resolve()
        self._start_next()

    def head_of(self, fetch: Fetch) -> bytes:
        """The request."""
        return (f"GET {fetch.path} HTTP/1.1\r\nHost: {self._host_line}\r\nUser-Agent: {USER_AGENT}"
                "\r\nAccept: text/plain;version=0.0.4;q=1,application/json;q=0.9\r\n"
                f"Accept-Encoding: gzip\r\nX-Prometheus-Scrape-Timeout-Seconds: {fetch.timeout:g}"
                "\r\n\r\n").encode("ascii", "replace")

    def _start_next(self) -> None:
        while self._queue and self._addresses and len(self._active) < self.most:
            fetch = self._queue.popleft()
            if fetch.done:
                continue
            if not fetch.started:
                fetch.started = True
                self.loop.call_later(fetch.timeout, self._expire, fetch)
                if fetch.began is not None:
                    fetch.began()
            link = self._idle.pop() if self._idle else None
            if link is None:
                self._connect(fetch)
            else:
                self._active[fetch] = link
                link.send(fetch)

    def _connect(self, fetch: Fetch) -> None:
        untried = [candidate for candidate in self._addresses
                   if candidate[1] not in fetch.tried]
        if not untried:                     # the settings have just changed
            self._queue.appendleft(fetch)
            self.resolve()
            return
        family, address = min(untried, key=lambda candidate: candidate[1] in self._dead)
        self._addresses.rotate(-1)
        try:
            fresh = ProxyConnection(self, address, family, fetch)
        except OSError as error:            # out of descriptors
            self._end(fetch, Reply(0, b"", reason_of(error)))
            return
        self.links.add(fresh)
        self._active[fetch] = fresh

    def _expire(self, fetch: Fetch) -> None:
        link = self._active.get(fetch)
        if not fetch.done:
            if link is not None:
                if not link.connected:
                    self._dead.add(link.address)
                self._drop(link)
            self._end(fetch, Reply(0, b"", "timed out"))

    def _give_up(self, fetch: Fetch) -> None:
        if not fetch.started:
            self._end(fetch, Reply(0, b"", "no connection was free in time: raise max_in_flight"))
        while self._queue and self._queue[0].done:
            self._queue.popleft()

    def _drop(self, link: ProxyConnection) -> None:
        link.close()
        self.links.discard(link)
        if link in self._idle:
            self._idle.remove(link)

    def lost(self, link: ProxyConnection, problem: str) -> None:
        """A connection failed: try the next address, or retry once if it was a reused one."""
        fetch = link.fetch
        self._drop(link)
        if self._active.get(fetch) is not link:
            return
        if not link.connected:
            self._dead.add(link.address)
            fetch.tried += (link.address,)
            again = any(address not in fetch.tried for _, address in self._addresses)
        else:
            again = link.used and not link.begun and not fetch.again
            fetch.again, fetch.tried = True, ()
        if again:
            del self._active[fetch]
            self._connect(fetch)
            return
        self.resolve()                      # its address may have changed
        self._end(fetch, Reply(0, b"", problem))

    def answered(self, link: ProxyConnection, reader: AnswerReader) -> None:
        """A complete answer arrived."""
        fetch = link.fetch
        body, problem = reader.body, ""
        if reader.headers.get("content-encoding", "").lower() == "gzip":
            try:
                body = gunzip(body, fetch.max_body)
            except ClientError as error:
                problem = str(error)
        if reader.keep_alive and len(self.links) <= self.most and \
                link.generation == self.generation:
            link.idle_since = self.loop.now()
            self._idle.append(link)
        else:
            self._drop(link)
        self._end(fetch, Reply(0 if problem else reader.status, body, problem))

    def _end(self, fetch: Fetch, reply: Reply) -> None:
        self._active.pop(fetch, None)
        if not fetch.done:
            fetch.done = True
            try:
                fetch.finish(reply)
            finally:
                self.loop.call_soon(self._start_next)

    def _close_idle(self) -> None:
        end = self.loop.now() - IDLE_SECONDS
        for link in [link for link in self._idle if link.idle_since < end]:
            self._drop(link)

    def close(self) -> None:
        """Close all connections."""
        self._resolver.close()
        for link in list(self.links):
            self._drop(link)


MAX_PAGE = 16 << 20
SETS = 4096                 # shared sets of series
FORGET_AFTER = 4            # counters that a target keeps, in pages: some come back


class TargetState:
    """State of a target from one scrape to the next."""
    __slots__ = ("target", "busy", "started", "began", "values", "live", "removed")

    def __init__(self, target: Target) -> None:
        self.target = target
        self.busy = self.removed = False
        self.started = 0.0                  # monotonic
        self.began = 0                      # milliseconds since 1970
        self.values: dict[Series, Number] = {}      # counters' last values
        self.live: frozenset[Series] = frozenset()      # of the previous scrape


def is_finite(value: Number) -> bool:
    """Neither NaN nor infinite; whole numbers always are."""
    return type(value) is int or math.isfinite(value)


def offset_of(instance: str, interval: float) -> float:
    """A target's place in the interval: stable over restarts, spread evenly."""
    digest = hashlib.blake2b(instance.encode(), digest_size=8).digest()
    return interval * (int.from_bytes(digest, "big") / 2 ** 64)


def increase(value: Number, before: Number) -> Number:
    """The increase of a counter; a lower value means that it restarted at zero."""
    try:
        return value - before if value >= before else value
    except OverflowError:                   # an integer beyond 10^308 less a float
        return math.inf


class Scraper:
    """Discovers and scrapes; passes each scrape to `deliver`. Owned by the loop."""

    def __init__(self, loop: Loop, settings: Settings, context: ssl.SSLContext | None,
                 deliver: Callable[[Scrape], None], registry: Registry,
                 clock: Callable[[], float] = time.time) -> None:
        self.loop, self.settings, self.clock = loop, settings, clock
        self.deliver = deliver
        self.fetcher = Fetcher(loop, settings, context)
        self.targets: dict[str, TargetState] = {}
        self.ready = False                  # targets are known
        self.reader = PageReader(Selector(settings))
        self.baseline: dict[str, dict[str, Number]] = {}    # counters before the restart
        self.differences = self.stale = True    # whether a sink uses them
        self.once: Callable[[str], None] | None = None      # called when a round ends
        self._discovered = b""
        self._problem = ""
        self._waiting = 0                   # targets of `--once` still to be scraped
        self._sets: dict[frozenset[Series], frozenset[Series]] = {}     # shared by like targets
        self._results = registry.counter(
            "cmon_forwarder_scrapes_total", "Total number of scrapes, by result.", "result")
        self._samples = registry.counter(
            "cmon_forwarder_samples_scraped_total", "Total number of samples on scraped pages.")
        self._skipped = registry.counter(
            "cmon_forwarder_scrapes_skipped_total", "Total number of scrapes skipped because the "
            "previous one was still in progress.")
        self._discoveries = registry.counter(
            "cmon_forwarder_discoveries_total", "Total number of discoveries, by result.",
            "result")
        registry.collect(self._families)

    def _families(self) -> list[Family]:
        return [
            single("cmon_forwarder_targets", GAUGE, "Number of containers that are scraped.",
                   len(self.targets)),
            single("cmon_forwarder_scrapes_in_flight", GAUGE, "Number of scrapes in progress.",
                   self.fetcher.in_flight),
            single("cmon_forwarder_proxy_connections", GAUGE, "Number of open connections to the "
                   "proxy.", len(self.fetcher.links))]

    def start(self) -> None:
        """Discover now and every interval."""
        self.discover()
        if self.once is None:
            self.loop.call_later(self.settings.interval, self._again)

    def _again(self) -> None:
        self.discover()
        self.loop.call_later(self.settings.interval, self._again)

    def use(self, settings: Settings, context: ssl.SSLContext | None) -> None:
        """Apply new settings."""
        before, self.settings = self.settings, settings
        self.fetcher.use(settings, context)
        self.reader = PageReader(Selector(settings))
        self._discovered = b""
        if settings.interval != before.interval:
            for state in self.targets.values():
                state.removed = True        # ends its timer
                fresh = TargetState(state.target)
                fresh.values, fresh.live = state.values, state.live
                self.targets[state.target.instance] = fresh
                self._schedule(fresh)
        self.discover()

    # discovery

    def discover(self) -> None:
        """Request the targets."""
        self.fetcher.fetch(discovery_path(self.settings.groups, self.settings.shard),
                           max(self.settings.timeout, 10.0), self._targets_arrived, MAX_JSON_BYTES)

    def _targets_arrived(self, reply: Reply) -> None:
        problem = reply.problem
        targets: dict[str, Target] | None = None
        if not problem and reply.status != 200:
            line = reply.body.decode("utf-8", "replace").partition("\n")[0]
            problem = f"{reply.status} {line[:200]!r}"
        if not problem and reply.body != self._discovered:
            try:
                targets = read_targets(reply.body, self.settings.labels)
            except DiscoveryError as error:
                problem = str(error)
        self._discoveries.add(1, "failed" if problem else "ok")
        if problem:
            if problem != self._problem:
                log.warning("discovery at %s failed, keeping %d targets: %s",
                            self.settings.proxy.url, len(self.targets), problem)
            self._problem = problem
            if self.once is not None:
                self.once(f"discovery at {self.settings.proxy.url}: {problem}")
            return
        if self._problem or not self.ready:
            log.info("discovery succeeded: %d targets", len(self.targets if targets is None
                                                            else targets))
        self._problem, self.ready = "", True
        if targets is not None:
            self._discovered = reply.body
            self._update(targets)

    def _update(self, targets: Mapping[str, Target]) -> None:
        for instance in [known for known in self.targets if known not in targets]:
            self._remove(self.targets.pop(instance))
        fresh = []
        for instance, target in targets.items():
            state = self.targets.get(instance)
            if state is None:
                state = self.targets[instance] = TargetState(target)
                fresh.append(state)
            elif state.target != target:
                self._end_series(state)
                state.target = target
        if self.once is not None:
            self._waiting = len(fresh)
            for state in fresh:
                self._scrape(state)
            if not fresh:
                self.once("")
            return
        for state in fresh:
            self._schedule(state)

    def _remove(self, state: TargetState) -> None:
        state.removed = True
        self._end_series(state)

    def _end_series(self, state: TargetState) -> None:
        """End all series of a target that is gone or was renamed."""
        if state.live:
            self.deliver(Scrape(state.target, int(self.clock() * 1000), (),
                                gone=[*state.live]))
            state.live = frozenset()

    # scraping

    def _schedule(self, state: TargetState) -> None:
        """Schedule the next scrape at the target's offset in the interval."""
        interval = self.settings.interval
        wait = (offset_of(state.target.instance, interval) - self.clock()) % interval
        if wait < interval * 0.01:          # this scrape has just been started
            wait += interval
        self.loop.call_later(wait, self._due, state)

    def _due(self, state: TargetState) -> None:
        if state.removed:
            return
        self._schedule(state)
        if state.busy:
            self._skipped.add()
        else:
            self._scrape(state)

    def _scrape(self, state: TargetState) -> None:
        state.busy = True

        def began() -> None:
            state.started, state.began = self.loop.now(), int(self.clock() * 1000)
        self.fetcher.fetch(state.target.path, min(self.settings.timeout, self.settings.interval),
                           lambda reply: self._scraped(state, reply), MAX_PAGE, began)

    def _scraped(self, state: TargetState, reply: Reply) -> None:
        state.busy = False
        points: Sequence[tuple[Series, Series, Number]] = ()
        count = 0
        problem = reply.problem or ("" if reply.status == 200 else f"status {reply.status}")
        if not state.began:                 # it never got a connection
            state.started, state.began = self.loop.now(), int(self.clock() * 1000)
        if not problem:
            try:
                points, count = self.reader.read(reply.body.decode())
            except (ExpositionError, UnicodeDecodeError) as error:
                problem = str(error)
        self._results.add(1, "failed" if problem else "ok")
        self._samples.add(count)
        if problem:
            log.debug("scrape of %s (%r): %s", state.target.instance, state.target.alias, problem)
        if not state.removed:
            self.deliver(self._compared(state, points, count, not problem))
        if self.once is not None:
            self._waiting -= 1
            if not self._waiting:
                self.once("")

    def _compared(self, state: TargetState, page: Sequence[tuple[Series, Series, Number]],
                  count: int, good: bool) -> Scrape:
        """A scrape, compared with the previous one of the same target."""
        selector = self.reader.selector
        target = state.target
        points = self.reader.distinct(target, selector.points(target, page))
        increases: dict[Series, Number] = {}
        if self.differences and good:
            baseline = self.baseline.pop(target.instance, None)
            values = state.values
            for series, value in points:
                if series.counter:
                    before = values.get(series)
                    if before is None and baseline is not None:
                        before = baseline.get(series.name + label_text(series.labels))
                    if not is_finite(value):
                        continue
                    if before is not None:
                        increases[series] = increase(value, before)
                    values[series] = value
            if len(values) > FORGET_AFTER * (len(points) + 100):
                kept = {series for series, _ in points}
                state.values = {series: value for series, value in values.items()
                                if series in kept}
        points += selector.scrape_series(target, (
            (UP, int(good)), (DURATION, round(self.loop.now() - state.started, 6)),
            (SCRAPED, count)))
        gone: Sequence[Series] = ()
        if self.stale:
            live = frozenset([series for series, _ in points])
            if state.live != live:
                gone = sorted(state.live - live)
                if len(self._sets) > SETS:
                    self._sets.clear()
                state.live = self._sets.setdefault(live, live)
        at, state.began = state.began, 0
        return Scrape(target, at, points, increases, gone)

    # counters across a restart

    def counters(self) -> dict[str, dict[str, Number]]:
        """Counter values to continue from after a restart."""
        waiting = {instance: values for instance, values in self.baseline.items()
                   if instance in self.targets or not self.ready}       # the others are gone
        return {**waiting, **{
            instance: {series.name + label_text(series.labels): value
                       for series, value in state.values.items()}
            for instance, state in self.targets.items() if state.values}}

# --- encoders -------------------------------------------------------------------------------------

# An encoder is a pure function from a sink's settings and a scrape to records, one per sample.
# Characters that a format cannot represent become `_`; NaN and infinities are left out where it has
# none (docs/FORWARDER.md). To add a sink, write its encoder (and `stream` or `packets`, if its
# records are framed), then a row in SINKS.

Records = list[bytes]
Encoder = Callable[[SinkSettings, Scrape], Records]
MAX_INT64, MAX_UINT64 = 2 ** 63 - 1, 2 ** 64 - 1
REMEMBERED = 65_536         # cached encodings of names and labels; as many as SHAPES


def lines(records: Iterable[bytes]) -> bytes:
    """Records, each followed by a newline."""
    return b"".join([record + b"\n" for record in records])


def replace_invalid(value: str, invalid: re.Pattern[str]) -> str:
    """Replace what a format cannot represent by `_`."""
    return invalid.sub("_", value)


# InfluxDB: https://docs.influxdata.com/influxdb/v1/write_protocols/line_protocol_reference/

_INFLUX_RESERVED = frozenset(("time", "_time", "_field", "_measurement"))
# Nothing escapes a line end, and a backslash before one of `,= ` or at the end is an escape itself.
_INFLUX_INVALID = re.compile(r"[\n\r\0]|\\(?=[\\,= ]|$)")
_INFLUX_ESCAPE = re.compile(r"([,= ])")


@functools.lru_cache(REMEMBERED)
def _influx_tags(labels: Labels) -> str:
    return "".join([
        f",{name}=" + _INFLUX_ESCAPE.sub(r"\\\1", replace_invalid(value, _INFLUX_INVALID))
        for name, value in exported(labels, _INFLUX_RESERVED)])


def influx_value(value: Number, unsigned: bool) -> str | None:
    """A field's value; None for what the line protocol cannot express."""
    if isinstance(value, int):
        if -MAX_INT64 - 1 <= value <= MAX_INT64:
            return f"{value}i"
        if unsigned and 0 <= value <= MAX_UINT64:
            return f"{value}u"
        try:
            value = float(value)
        except OverflowError:
            return None
    return repr(value) if math.isfinite(value) else None


def influx_records(sink: SinkSettings, scrape: Scrape) -> Records:
    """`NAME,alias=…,instance=…,label=… value=123i TIMESTAMP`"""
    target = _influx_tags(scrape.target.labels)
    end = f" {scrape.at}000000"
    records: Records = []
    for series, value in scrape.points:
        field = influx_value(value, sink.bucket is not None)
        if field is not None:
            records.append(f"{series.name}{target}{_influx_tags(series.labels)} value={field}{end}"
                           .encode())
    return records


# Graphite: https://graphite.readthedocs.io/en/latest/tags.html

# After a longer line carbon closes the connection and reads nothing more (Twisted's MAX_LENGTH).
GRAPHITE_LINE = 16_384
_GRAPHITE_INVALID = re.compile(r"[\s;\x00-\x1f\x7f]|^~")
_DOTTED_INVALID = re.compile(r"[^A-Za-z0-9_-]")


@functools.lru_cache(REMEMBERED)
def _graphite_tags(labels: Labels) -> str:
    return "".join([f";{name}={replace_invalid(value, _GRAPHITE_INVALID)}"
                    for name, value in exported(labels, ("name",))])    # carbon's for the metric


@functools.lru_cache(REMEMBERED)
def dotted(*parts: str) -> str:
    """A path; dots within a part become `_`."""
    return ".".join([replace_invalid(part, _DOTTED_INVALID) or "_" for part in parts])


def _path(sink: SinkSettings, scrape: Scrape, series: Series) -> str:
    """PREFIX.ALIAS.NAME.LABELVALUES; the prefix may have levels."""
    prefix = "cmon" if sink.prefix is None else sink.prefix
    path = f"{dotted(scrape.target.alias)}.{dotted(series.name, *[v for _, v in series.labels])}"
    return f"{prefix}.{path}" if prefix else path


def graphite_records(sink: SinkSettings, scrape: Scrape) -> Records:
    """`NAME;alias=…;instance=…;label=… VALUE TIMESTAMP`, or dotted."""
    end = f" {scrape.at // 1000}"
    points = [(series, value) for series, value in scrape.points if is_finite(value)]
    if sink.form == "dotted":
        records = [f"{_path(sink, scrape, series)} {number(value)}{end}".encode()
                   for series, value in points]
    else:
        target = _graphite_tags(scrape.target.labels)
        records = [f"{series.name}{target}{_graphite_tags(series.labels)} {number(value)}{end}"
                   .encode() for series, value in points]
    return [record for record in records if len(record) <= GRAPHITE_LINE]


# StatsD: https://github.com/statsd/statsd/blob/master/docs/metric_types.md

_STATSD_TAG_INVALID = re.compile(r"[\s,|#\x00-\x1f\x7f]")


@functools.lru_cache(REMEMBERED)
def _statsd_tags(labels: Labels) -> str:
    return ",".join([f"{name}:{replace_invalid(value, _STATSD_TAG_INVALID)}"
                     for name, value in labels])


def statsd_records(sink: SinkSettings, scrape: Scrape) -> Records:
    """`cmon.ALIAS.NAME.LABELVALUES:VALUE|g`, or `cmon.NAME:VALUE|g|#alias:…`; counters as their
    increase since the previous scrape."""
    records: Records = []
    tags = "|#" + _statsd_tags(scrape.target.labels) if sink.tags else ""
    prefix = "cmon" if sink.prefix is None else sink.prefix
    for series, value in scrape.points:
        if sink.tags:
            name = dotted(series.name)
            name = f"{prefix}.{name}" if prefix else name
            end = tags + ("," + _statsd_tags(series.labels) if series.labels else "")
        else:
            name, end = _path(sink, scrape, series), ""
        if series.counter:
            grown = scrape.increases.get(series)
            if grown is not None and is_finite(grown):
                records.append(f"{name}:{number(grown)}|c{end}".encode())
        elif is_finite(value):
            line = f"{name}:{number(value)}|g{end}"
            if value < 0:       # a sign would make it a change: set it to zero first
                line = f"{name}:0|g{end}\n{line}"
            records.append(line.encode())
    return records


# Syslog: RFC 5424; octet counting: RFC 6587, 3.4.1

SYSLOG_PRIORITY = 16 * 8 + 6        # local0, informational
_SD_ESCAPE = re.compile(r'(["\\\]])')


@functools.lru_cache(REMEMBERED)
def _syslog_parameters(labels: Labels) -> str:
    # the element already has `name` and `value`; names have at most 32 characters
    return "".join([f' {name[:32]}="' + _SD_ESCAPE.sub(r"\\\1", value) + '"'
                    for name, value in exported(labels, ("name", "value"))])


def utc(milliseconds: int) -> str:
    """A time of RFC 3339."""
    when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{when}.{milliseconds % 1000:03d}Z"


def syslog_records(_sink: SinkSettings, scrape: Scrape) -> Records:
    """`<134>1 TIME HOST cmon - metric [cmon@38678 name="…" value="…" alias="…" …]`"""
    host = re.sub(r"[^!-~]", "_", scrape.target.alias)[:255]
    head = f"<{SYSLOG_PRIORITY}>1 {utc(scrape.at)} {host} cmon - metric [cmon@38678 name=\""
    target = _syslog_parameters(scrape.target.labels)
    return [f'{head}{series.name}" value="{number(value)}"{target}'
            f"{_syslog_parameters(series.labels)}]".encode() for series, value in scrape.points]


def octet_counted(records: Iterable[bytes]) -> bytes:
    """Messages, each preceded by its length."""
    return b"".join([b"%d %s" % (len(record), record) for record in records])


# GELF 1.1: https://go2docs.graylog.org/current/getting_in_log_data/gelf.html

GELF_CHUNK = 1420                   # bytes of a datagram that fits in any network's packets
GELF_CHUNKS = 128
_GELF_RESERVED = frozenset(("id", "value"))     # `_id` is not allowed, `_value` is ours


@functools.lru_cache(REMEMBERED)
def _gelf_fields(labels: Labels) -> str:
    return "".join([f', "_{name}": {json.dumps(value)}'
                    for name, value in exported(labels, _GELF_RESERVED)])


def gelf_records(_sink: SinkSettings, scrape: Scrape) -> Records:
    """One JSON object a sample: short_message is the name, `_value` the value."""
    head = f'{{"version": "1.1", "host": {json.dumps(scrape.target.alias)}, "short_message": "'
    middle = f'", "timestamp": {scrape.at / 1000!r}, "level": 6, "_value": '
    target = _gelf_fields(scrape.target.labels)
    return [f"{head}{series.name}{middle}{number(value)}{target}{_gelf_fields(series.labels)}}}"
            .encode() for series, value in scrape.points if is_finite(value)]


def gelf_datagrams(record: bytes) -> list[bytes]:
    """A message as compressed datagrams, in chunks if it is large; none if it is too large."""
    packed = zlib.compress(record, 6)
    if len(packed) <= GELF_CHUNK:
        return [packed]
    size = GELF_CHUNK - 12
    pieces = [packed[at:at + size] for at in range(0, len(packed), size)]
    if len(pieces) > GELF_CHUNKS:
        return []
    name = hashlib.blake2b(record, digest_size=8).digest()
    return [b"\x1e\x0f" + name + bytes((place, len(pieces))) + piece
            for place, piece in enumerate(pieces)]


def nul_ended(records: Iterable[bytes]) -> bytes:
    """Messages, each followed by a NUL."""
    return b"".join([record + b"\0" for record in records])


# JSON over HTTP, and files

@functools.lru_cache(REMEMBERED)
def _json_members(labels: Labels) -> str:
    return ", ".join([f"{json.dumps(name)}: {json.dumps(value)}" for name, value in labels])


def _json_labels(target: Labels, series: Series) -> str:
    of_target = _json_members(target)
    return f"{of_target}, {_json_members(series.labels)}" if series.labels else of_target


def json_value(value: Number) -> str:
    """A number; NaN and infinities, which JSON lacks, as strings."""
    return number(value) if is_finite(value) else f'"{number(value)}"'


def json_records(_sink: SinkSettings, scrape: Scrape) -> Records:
    """`{"name": …, "labels": {…}, "value": …, "timestamp": SECONDS}`"""
    target, end = scrape.target.labels, f', "timestamp": {scrape.at / 1000!r}}}'
    return [f'{{"name": "{series.name}", "labels": {{{_json_labels(target, series)}}}, "value": '
            f"{json_value(value)}{end}".encode() for series, value in scrape.points]


def elasticsearch_records(sink: SinkSettings, scrape: Scrape) -> Records:
    """Two lines of a bulk request; the id keeps a retry from duplicating the document."""
    index = json.dumps("cmon" if sink.index is None else sink.index)
    end = f', "@timestamp": "{utc(scrape.at)}"}}'
    records: Records = []
    for series, value in scrape.points:
        if is_finite(value):
            labels = _json_labels(scrape.target.labels, series)
            name = hashlib.blake2b(f"{series.name}{{{labels}}} {scrape.at}".encode(),
                                   digest_size=15).digest()
            action = (f'{{"create": {{"_index": {index}, "_id": '
                      f'"{base64.urlsafe_b64encode(name).decode()}"}}}}')
            records.append(f'{action}\n{{"name": "{series.name}", "labels": {{{labels}}}, "value": '
                           f"{number(value)}{end}".encode())
    return records


def splunk_records(_sink: SinkSettings, scrape: Scrape) -> Records:
    """An event of the HTTP event collector, in its form for metrics."""
    host = json.dumps(scrape.target.alias)
    head = f'{{"time": {scrape.at / 1000!r}, "host": {host}, "source": "cmon", "event": "metric", '
    return [f'{head}"fields": {{"metric_name:{series.name}": {number(value)}, '
            f"{_json_labels(scrape.target.labels, series)}}}}}".encode()
            for series, value in scrape.points if is_finite(value)]


# Prometheus remote write 1.0: https://prometheus.io/docs/specs/prw/remote_write_spec/
#   WriteRequest { repeated TimeSeries timeseries = 1; }
#   TimeSeries { repeated Label labels = 1; repeated Sample samples = 2; }
#   Label { string name = 1; string value = 2; }  Sample { double value = 1; int64 timestamp = 2; }

STALE_NAN = struct.pack("<Q", 0x7ff0000000000002)       # "this series ends here"
PLAIN_NAN = struct.pack("<Q", 0x7ff8000000000001)


def varint(value: int) -> bytes:
    """A non-negative number in the variable-length encoding of protobuf and snappy."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(place: int, content: bytes) -> bytes:
    """A length-delimited protobuf field (wire type 2)."""
    return bytes((place << 3 | 2,)) + varint(len(content)) + content


@functools.lru_cache(REMEMBERED)
def _pb_label(name: str, value: str) -> bytes:
    return field(1, field(1, name.encode()) + field(2, value.encode()))


def time_series(labels: Iterable[tuple[str, str]], value: bytes, at: int) -> bytes:
    """One series with one sample, as a field of the request; labels are sorted."""
    content = b"".join([_pb_label(name, text) for name, text in sorted(labels)])
    return field(1, content + field(2, b"\x09" + value + b"\x10" + varint(at)))


def remote_write_records(_sink: SinkSettings, scrape: Scrape) -> Records:
    """A TimeSeries for each sample, and a stale marker for each series that has ended."""
    records: Records = []
    for series, value in scrape.points:
        try:
            packed = PLAIN_NAN if value != value else struct.pack("<d", float(value))
        except OverflowError:               # beyond 10^308
            packed = struct.pack("<d", math.inf if value > 0 else -math.inf)
        records.append(time_series((("__name__", series.name), *scrape.target.labels,
                                    *series.labels), packed, scrape.at))
    records += [time_series((("__name__", series.name), *scrape.target.labels, *series.labels),
                            STALE_NAN, scrape.at) for series in scrape.gone]
    return records


SNAPPY_LITERAL = 65_536


def snappy(content: bytes) -> bytes:
    """Snappy's block format (format_description.txt), only literals: no compression."""
    out = [varint(len(content))]
    for at in range(0, len(content), SNAPPY_LITERAL):
        piece = content[at:at + SNAPPY_LITERAL]
        out += [b"\xf4" + struct.pack("<H", len(piece) - 1), piece]     # 61 << 2: two bytes follow
    return b"".join(out)


def read_time_series(record: bytes) -> str:
    """For --dry-run: a series as a line of text, `NAME{labels} VALUE MILLISECONDS`."""
    def fields(content: bytes) -> Iterable[tuple[int, Any]]:
        at = 0

        def integer() -> int:
            nonlocal at
            value = shift = 0
            while True:
                byte = content[at]
                at += 1
                value |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    return value
        while at < len(content):
            key = integer()
            if key & 7 == 0:
                yield key >> 3, integer()
            elif key & 7 == 1:
                at += 8
                yield key >> 3, content[at - 8:at]
            else:
                size = integer()
                at += size
                yield key >> 3, content[at - size:at]
    labels: list[tuple[str, str]] = []
    name, value, when = "", b"", 0
    for place, part in fields(next(iter(fields(record)))[1]):
        members = dict(fields(part))
        if place == 2:
            value, when = members[1], members[2]
        elif members[1] == b"__name__":
            name = members[2].decode()
        else:
            labels.append((members[1].decode(), members[2].decode()))
    shown = "StaleNaN" if value == STALE_NAN else number(struct.unpack("<d", value)[0])
    return f"{name}{label_text(tuple(labels))} {shown} {when}"


class Refusal(NamedTuple):
    """Records that a sink did not accept: those to retry, and those rejected for good."""
    again: Records
    never: Records
    reason: str


def read_bulk(records: Sequence[bytes], body: bytes) -> Refusal:
    """Elasticsearch's answer to a bulk request; its status is 200 even if documents failed."""
    again: Records = []
    never: Records = []
    reason = ""
    try:
        content = json.loads(body)
        items = content["items"] if content["errors"] else []
        for record, item in zip(records, items):
            result = next(iter(item.values()))
            status = int(result["status"])
            if status == 429 or status >= 500:
                again.append(record)
            elif status >= 400 and status != 409:   # 409: the document exists already
                never.append(record)
            if status >= 400 and status != 409:
                reason = reason or f"{status} {json.dumps(result.get('error'))[:200]}"
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):
        return Refusal([*records], [], f"not an answer of Elasticsearch: {body[:80]!r}")
    return Refusal(again, never, reason)


class Post(NamedTuple):
    """How to send records in an HTTP request."""
    path: str                               # if the URL of the settings has none
    body: Callable[[Sequence[bytes]], bytes]
    headers: Mapping[str, str]
    authorization: str                      # scheme before the token
    packs: bool = False                     # gzip unless the settings say otherwise
    judge: Callable[[Sequence[bytes], bytes], Refusal] | None = None


JSON_LINES = {"Content-Type": "application/x-ndjson"}
POSTS = {       # (type, form)
    ("influxdb", None): Post("", lines, {"Content-Type": "text/plain; charset=utf-8"}, "Token",
                             packs=True),
    ("http", "lines"): Post("/", lines, JSON_LINES, "Bearer"),
    ("http", "elasticsearch"): Post("/_bulk", lines, JSON_LINES, "ApiKey", judge=read_bulk),
    ("http", "splunk"): Post("/services/collector", lines, {"Content-Type": "application/json"},
                             "Splunk"),
    ("remote_write", None): Post(
        "/api/v1/write", lambda records: snappy(b"".join(records)),
        {"Content-Type": "application/x-protobuf", "Content-Encoding": "snappy",
         "X-Prometheus-Remote-Write-Version": "0.1.0"}, "Bearer"),
}


def post_url(sink: SinkSettings) -> str:
    """The URL of a sink's requests."""
    url = sink.url or ""
    parts = urllib.parse.urlsplit(url)
    if sink.type == "influxdb":
        if sink.database is not None:
            path, query = "/write", {"db": sink.database, "precision": "ns"}
        else:
            path, query = "/api/v2/write", {"org": sink.org or "", "bucket": sink.bucket or "",
                                            "precision": "ns"}
        base = parts.path.rstrip("/")
        return parts._replace(
            path=base if base.endswith(path) else base + path, fragment="",
            query="&".join(filter(None, (parts.query, urllib.parse.urlencode(query))))).geturl()
    if parts.path in ("", "/"):
        return parts._replace(path=POSTS[sink.type, sink.form].path).geturl()
    return url


DATAGRAM_BYTES = 1432       # of lines in one datagram: fits in one Ethernet frame
Packet = tuple[list[bytes], int]        # datagrams of one packet, and how many records they hold


def packed_lines(records: Sequence[bytes]) -> list[Packet]:
    """Lines in as few datagrams as fit; a record is never split."""
    packets: list[Packet] = []
    waiting: list[bytes] = []
    size = 0
    for record in records:
        if waiting and size + len(record) + 1 > DATAGRAM_BYTES:
            packets.append(([b"\n".join(waiting)], len(waiting)))
            waiting, size = [], 0
        waiting.append(record)
        size += len(record) + 1
    if waiting:
        packets.append(([b"\n".join(waiting)], len(waiting)))
    return packets


def one_by_one(records: Sequence[bytes]) -> list[Packet]:
    """A datagram for each record."""
    return [([record], 1) for record in records]


def gelf_packets(records: Sequence[bytes]) -> list[Packet]:
    """Each record in as many datagrams as it needs."""
    return [(gelf_datagrams(record), 1) for record in records]


class SinkType(NamedTuple):
    """Everything that is specific to a type of sink."""
    required: tuple[str, ...]
    optional: tuple[str, ...]
    encoders: Mapping[str | None, Encoder]          # by form; the first is the default
    transports: tuple[str, ...] = ()                # for sinks with an address; first: default
    stream: Callable[[Iterable[bytes]], bytes] = lines      # framing in a stream
    packets: Callable[[Sequence[bytes]], list[Packet]] = one_by_one     # framing in datagrams
    differences: bool = False                       # uses increases of counters
    stale: bool = False                             # uses series that have ended
    inexact: str = ""                               # what does not arrive exactly, for the log

    @property
    def forms(self) -> tuple[str, ...]:
        """Valid values of `form`."""
        return tuple(form for form in self.encoders if form is not None)


DOUBLES = "integers above 2^53 are rounded, since it stores 64-bit floating point"
SINKS = {
    "influxdb": SinkType(
        ("url",), ("database", "org", "bucket", "token", "token_file", "headers", "gzip",
                    *TLS_KEYS),
        {None: influx_records},
        inexact="NaN and infinities are left out; InfluxDB 1 gets integers of 2^63 and above as "
                "floating point"),
    "graphite": SinkType(("address",), ("form", "prefix"),
                         {"tagged": graphite_records, "dotted": graphite_records}, ("tcp",),
                         inexact=DOUBLES + "; NaN and infinities are left out"),
    "statsd": SinkType(("address",), ("tags", "prefix"), {None: statsd_records}, ("udp",),
                       packets=packed_lines, differences=True,
                       inexact=DOUBLES + "; datagrams can be lost, or duplicated after a failure"),
    "syslog": SinkType(("address",), ("transport", *TLS_KEYS), {None: syslog_records},
                       ("udp", "tcp", "tls"), octet_counted,
                       inexact="messages can be duplicated after a failure, datagrams lost"),
    "gelf": SinkType(("address",), ("transport",), {None: gelf_records}, ("udp", "tcp"),
                     nul_ended, gelf_packets,
                     inexact="messages can be duplicated after a failure, datagrams lost; NaN and "
                             "infinities are left out"),
    "http": SinkType(("url",), ("form", "headers", "token", "token_file", "index", "gzip",
                                *TLS_KEYS),
                     {"lines": json_records, "elasticsearch": elasticsearch_records,
                      "splunk": splunk_records},
                     inexact="lines can be duplicated after a failure"),
    "remote_write": SinkType(("url",), ("headers", "token", "token_file", *TLS_KEYS),
                             {None: remote_write_records}, stale=True, inexact=DOUBLES),
    "file": SinkType(("path",), ("rotate_bytes", "keep"), {None: json_records}),
}


def with_defaults(sink: SinkSettings) -> SinkSettings:
    """Settings with form and transport filled in."""
    row = SINKS[sink.type]
    return dataclasses.replace(
        sink, form=sink.form or next(iter(row.encoders)),
        transport=sink.transport or next(iter(row.transports), None))


def encode(sink: SinkSettings, scrape: Scrape) -> Records:
    """A scrape as records for a sink."""
    return SINKS[sink.type].encoders[sink.form](sink, scrape)


def shown(sink: SinkSettings, record: bytes) -> str:
    """A record as --dry-run prints it."""
    return read_time_series(record) if sink.type == "remote_write" else record.decode()

# --- spool ----------------------------------------------------------------------------------------

# A folder for each sink. `0000000000000007.log` is a segment: entries of a header and records, each
# record preceded by its length. `cursor` is the position up to which everything is delivered. An
# entry is written with one call and never changed, so a killed process leaves at most one torn
# entry, at the end of a segment; a new process starts a new segment. There is no fsync (see
# docs/FORWARDER.md): after a power failure, checksums show what was written.

ENTRY = struct.Struct(">IIId")          # bytes of the records, CRC-32, how many, and when
COVERED = struct.Struct(">Id")          # of the header, the CRC covers these before the records
# Segment and offset of the end of what is delivered, then of the batch in flight; their CRC-32.
CURSOR = struct.Struct(">QQQQI")
LENGTH = struct.Struct(">I")
SEGMENT_BYTES = 8 << 20
MAX_ENTRY = 1 << 30
MEMORY_BYTES = 4 << 20                  # of entries kept in memory while the disk is full
REFUSED_FILES = 100                     # kept in a sink's `refused`: the newest
REFUSED_BYTES = 64 << 20


def entry_of(body: bytes, samples: int, at: float) -> bytes:
    """Records, preceded by their header."""
    return ENTRY.pack(len(body), zlib.crc32(body, zlib.crc32(COVERED.pack(samples, at))), samples,
                      at) + body


def body_of(header: bytes, read: Callable[[int], bytes]) -> tuple[bytes, int] | None:
    """The records after a header, and how many; None if they are torn or damaged."""
    if len(header) < ENTRY.size:
        return None
    size, check, samples, at = ENTRY.unpack(header)
    if size > MAX_ENTRY:
        return None
    body = read(size)
    if len(body) != size or zlib.crc32(body, zlib.crc32(COVERED.pack(samples, at))) != check:
        return None
    return body, samples


class SpoolError(Exception):
    """The spool cannot be used; the message is for the operator."""


class Batch(NamedTuple):
    """Records to deliver together."""
    records: Records
    oldest: float                           # when the first was scraped, seconds since 1970
    end: tuple[int, int]                    # segment and offset of its end
    unwritten: int                          # of its samples, those kept only in memory


class _Segment:
    __slots__ = ("number", "size", "samples")

    def __init__(self, number: int) -> None:
        self.number = number
        self.size = 0                       # up to the last whole entry
        self.samples = 0                    # of entries that have not been taken


class Spool:
    """The queue of one sink: the server's thread appends, the sink's thread takes."""

    def __init__(self, folder: Path, form: str, limit: int,
                 clock: Callable[[], float] = time.time) -> None:
        self.folder, self._form, self._clock = folder, form, clock
        self._limit = limit
        self._lock = threading.Condition()      # all below; the sink's thread waits on it
        self._segments: list[_Segment] = []     # the oldest first
        self._writer: int | None = None         # descriptor of the last segment
        self._reader: tuple[int, int] | None = None     # number and descriptor of a segment
        self._head = (0, 0)                     # end of what was taken last
        self._delivered = (0, 0)                # end of what was settled last
        # The end of a batch that was in flight when an earlier process ended. It is sent again
        # unchanged: a sink that has it may reject it as a whole, with anything added to it.
        self._again: tuple[int, int] | None = None
        self._memory: collections.deque[tuple[bytes, int, float]] = collections.deque()
        self._memory_bytes = 0
        self._held: Batch | None = None
        self._oldest: float | None = None       # of what is at the head
        self.dropped: dict[str, int] = {}       # samples by reason
        self._failing = ""                      # why the disk did not take the last entry
        self._unreadable = False                # nor give the next one
        self._open()

    # at start

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.chmod(self.folder, 0o700)
            self._check_form()
            self._cursor = os.open(self.folder / "cursor", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
                                   0o600)
            self._delivered, under_way = self._read_cursor()
            self._head = self._delivered
            self._again = under_way if under_way > self._head else None
            self._write_cursor(under_way)       # allocate it now: the disk may be full later
            numbers = sorted(int(path.name[:16], 16) for path in self.folder.glob("*.log")
                             if re.fullmatch(r"[0-9a-f]{16}\.log", path.name))
            for number_of in numbers:
                if number_of < self._head[0]:
                    self._path(number_of).unlink()
                    continue
                segment = self._scan(number_of)
                if segment.samples:
                    self._segments.append(segment)
                else:
                    self._path(number_of).unlink()
        except OSError as error:
            raise SpoolError(f"spool {self.folder}: {reason_of(error)}") from None
        self._next = max([self._head[0], *numbers], default=0) + 1
        self._find_head()
        self._peek()

    def _check_form(self) -> None:
        """Set aside records written for another type of sink: this one cannot accept them."""
        mark = self.folder / "form"
        waiting = [path for path in self.folder.glob("*.log")]
        before = mark.read_text("utf-8", "replace") if mark.exists() else ""
        if before not in ("", self._form) and waiting:
            aside = self.folder / "refused" / f"spool-{self._clock():.0f}"
            aside.mkdir(parents=True)
            for path in waiting:
                path.rename(aside / path.name)
            (aside / "reason.txt").write_text(
                f"written for {before}, but the sink is now {self._form}\n")
            log.warning("spool %s: %d segments were written for another type of sink; moved them "
                        "to %s", self.folder, len(waiting), aside)
        if before != self._form:
            mark.write_text(self._form)

    def _read_cursor(self) -> tuple[tuple[int, int], tuple[int, int]]:
        content = os.pread(self._cursor, CURSOR.size, 0)
        if len(content) == CURSOR.size:
            segment, offset, end_segment, end_offset, check = CURSOR.unpack(content)
            if zlib.crc32(content[:-LENGTH.size]) == check:
                return (segment, offset), (end_segment, end_offset)
        return (0, 0), (0, 0)               # none, or torn by a power failure: send everything

    def _write_cursor(self, under_way: tuple[int, int]) -> None:
        packed = CURSOR.pack(*self._delivered, *under_way, 0)[:-LENGTH.size]
        try:
            os.pwrite(self._cursor, packed + LENGTH.pack(zlib.crc32(packed)), 0)
        except OSError as error:
            log.warning("spool %s: cannot write the cursor, a restart would send samples again: %s",
                        self.folder, reason_of(error))

    def _scan(self, number_of: int) -> _Segment:
        """Read a segment of an earlier process: its size, and its samples after the cursor."""
        segment = _Segment(number_of)
        with open(self._path(number_of), "rb") as file:
            while True:
                entry = body_of(file.read(ENTRY.size), file.read)
                if entry is None:
                    break
                if (number_of, segment.size) >= self._head:
                    segment.samples += entry[1]
                segment.size = file.tell()
            rest = os.fstat(file.fileno()).st_size - segment.size
        if rest:
            log.warning("spool %s: ignoring an incomplete entry of %d bytes at the end of segment "
                        "%016x", self.folder, rest, number_of)
        return segment

    # the server's side

    def append(self, records: Sequence[bytes], at: float) -> None:
        """Queue the records of a scrape; never raises, drops are counted."""
        if not records:
            return
        body = b"".join([part for record in records
                         for part in (LENGTH.pack(len(record)), record)])
        entry = entry_of(body, len(records), at)
        with self._lock:
            self._memory.append((entry, len(records), at))
            self._memory_bytes += len(entry)
            self._to_disk()
            while self._memory_bytes > MEMORY_BYTES:
                if self._drop_oldest("disk full", 1):
                    self._to_disk()
                else:
                    self._forget("disk full")
            if self._oldest is None:
                self._oldest = at
            self._lock.notify_all()

    def _forget(self, reason: str) -> None:
        entry, samples, _ = self._memory.popleft()
        self._memory_bytes -= len(entry)
        self._drop(samples, reason)

    def _drop(self, samples: int, reason: str) -> None:
        if samples:
            if reason not in self.dropped:
                log.error("spool %s: %s: dropping samples, the oldest first", self.folder, reason)
            self.dropped[reason] = self.dropped.get(reason, 0) + samples

    def _to_disk(self) -> None:
        """Write what is in memory, the oldest first."""
        while self._memory:
            entry, samples, _ = self._memory[0]
            problem = self._write(entry, samples)
            if problem is not None:
                if not self._failing:
                    log.error("spool %s: %s; keeping up to %d MiB of samples in memory",
                              self.folder, problem, MEMORY_BYTES >> 20)
                self._failing = problem
                return
            self._memory.popleft()
            self._memory_bytes -= len(entry)
            if self._failing:
                log.info("spool %s: writable again", self.folder)
            self._failing = ""
            while sum(segment.size for segment in self._segments) > self._limit:
                if not self._drop_oldest("spool full", 2):
                    break

    def _write(self, entry: bytes, samples: int) -> str | None:
        """Write an entry, whole or not at all; None, or what is wrong."""
        most = max(min(self._limit // 8, SEGMENT_BYTES), 1024)
        if self._writer is not None and self._segments and \
                self._segments[-1].size + len(entry) > most:
            self._end_writer()
        try:
            if self._writer is None:
                self._writer = os.open(self._path(self._next), os.O_WRONLY | os.O_CREAT
                                       | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
                self._segments.append(_Segment(self._next))
                self._next += 1
                self._find_head()
            segment = self._segments[-1]
            view = memoryview(entry)
            while view:
                view = view[os.write(self._writer, view):]
        except OSError as error:
            if self._writer is not None:
                try:
                    os.ftruncate(self._writer, self._segments[-1].size)
                except OSError:             # the torn entry is never read: what follows
                    self._end_writer()      # goes to a new segment
            return reason_of(error)
        segment.size += len(entry)
        segment.samples += samples
        return None

    def _end_writer(self) -> None:
        if self._writer is not None:
            os.close(self._writer)
            self._writer = None

    def _drop_oldest(self, reason: str, least: int) -> bool:
        """Drop the oldest segment, if there are at least `least` and it is not empty."""
        if len(self._segments) < least or not self._segments[0].size:
            return False
        if self._segments[0] is self._last():
            self._end_writer()
        segment = self._segments.pop(0)
        self._drop(segment.samples, reason)
        self._unlink(segment.number)
        self._find_head()
        self._peek()
        return True

    # the sink's side

    def take(self, most_bytes: int, age: float, stop: threading.Event) -> Batch | None:
        """Wait for a batch that is large or old enough; None after `stop` is set.

        The batch is held until `settle`: a second call returns the same one.
        """
        with self._lock:
            while not stop.is_set():
                if self._held is not None:
                    return self._held
                if self._oldest is not None:
                    past = self._clock() - self._oldest
                    # a negative age: the clock was set back
                    if not 0 <= past < age or self._waiting_bytes() >= most_bytes:
                        batch = self._take(most_bytes)
                        if batch.records:
                            self._held = batch
                            self._write_cursor(batch.end)
                            return batch
                        if self._unreadable:
                            self._lock.wait(1.0)
                        continue
                    self._lock.wait(min(age - past, 1.0))
                else:
                    self._lock.wait(1.0)
            return None

    def wake(self) -> None:
        """Have `take` check its `stop`."""
        with self._lock:
            self._lock.notify_all()

    def settle(self) -> None:
        """Remove the batch taken last: it is delivered or set aside."""
        with self._lock:
            assert self._held is not None
            end, self._held = self._held.end, None
            self._delivered = end
            self._write_cursor(end)
            for segment in list(self._segments):
                if segment.number < end[0] or (segment.number == end[0] and end[1] >= segment.size
                                               and segment is not self._last()):
                    self._segments.remove(segment)
                    self._unlink(segment.number)
            last = self._last()
            if last is not None and last.size and (last.number, last.size) <= end:
                self._end_writer()          # everything is delivered: free the space
                self._segments.remove(last)
                self._unlink(last.number)
            self._find_head()

    def _last(self) -> _Segment | None:
        return self._segments[-1] if self._writer is not None and self._segments else None

    def _waiting_bytes(self) -> int:
        return (sum(segment.size for segment in self._segments if segment.number >= self._head[0])
                - self._head[1] + self._memory_bytes)

    def _take(self, most_bytes: int) -> Batch:
        records: Records = []
        oldest = self._oldest or 0.0
        size = 0
        again, self._again = self._again, None

        def is_full() -> bool:
            return self._head >= again if again is not None else bool(
                records) and size >= most_bytes
        for segment in list(self._segments):
            if segment.number < self._head[0]:
                continue
            offset = self._head[1] if segment.number == self._head[0] else 0
            self._head = (segment.number, offset)
            while offset < segment.size and not is_full():
                try:
                    entry_read = self._read(segment, offset)
                except OSError as error:    # a temporary one: the samples stay
                    if not self._unreadable:
                        log.error("spool %s: cannot read segment %016x, retrying: %s", self.folder,
                                  segment.number, reason_of(error))
                    self._unreadable = True
                    self._again = again
                    break
                self._unreadable = False
                if entry_read is None:
                    log.error("spool %s: segment %016x is damaged at offset %d; dropping the rest "
                              "of it", self.folder, segment.number, offset)
                    self._drop(segment.samples, "damaged")
                    segment.samples = 0
                    offset = segment.size
                    if segment is self._last():
                        self._end_writer()
                    break
                entry_records, end = entry_read
                records += entry_records
                segment.samples -= len(entry_records)
                size += end - offset
                offset = end
                self._head = (segment.number, offset)
            self._head = (segment.number, offset)
            if offset < segment.size:
                break
        unwritten = 0
        while self._memory and not is_full() and not self._on_disk():
            entry, samples, _ = self._memory.popleft()
            self._memory_bytes -= len(entry)
            records += self._split(entry[ENTRY.size:])
            size += len(entry)
            unwritten += samples
        self._find_head()
        self._peek()
        return Batch(records, oldest, self._head, unwritten)

    def _on_disk(self) -> bool:
        """Whether a segment has entries that have not been taken."""
        return any((segment.number, segment.size) > self._head and segment.size
                   for segment in self._segments if segment.number >= self._head[0])

    def _read(self, segment: _Segment, offset: int) -> tuple[Records, int] | None:
        """The entry at an offset, and where the next begins; None for a damaged one. Raises OSError
        if it may be readable later: without descriptors, or without permission."""
        try:
            if self._reader is None or self._reader[0] != segment.number:
                self._end_reader()
                self._reader = (segment.number, os.open(self._path(segment.number),
                                                        os.O_RDONLY | os.O_CLOEXEC))
            file, at = self._reader[1], offset + ENTRY.size
            entry = body_of(os.pread(file, ENTRY.size, offset),
                            lambda size: os.pread(file, size, at))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EIO):
                raise
            log.error("spool %s: %s", self.folder, reason_of(error))
            return None
        return None if entry is None else (self._split(entry[0]), at + len(entry[0]))

    @staticmethod
    def _split(body: bytes) -> Records:
        records: Records = []
        at = 0
        while at < len(body):
            size = LENGTH.unpack_from(body, at)[0]
            records.append(body[at + 4:at + 4 + size])
            at += 4 + size
        return records

    def _find_head(self) -> None:
        """Move the head to the next entry, or to where it will be written."""
        for segment in self._segments:
            if segment.number > self._head[0]:
                self._head = (segment.number, 0)
                return
            if segment.number == self._head[0] and (
                    self._head[1] < segment.size or segment is self._last()):
                return

    def _peek(self) -> None:
        """Note the age of the next entry."""
        self._oldest = self._memory[0][2] if self._memory else None
        for segment in self._segments:
            if segment.number < self._head[0]:
                continue
            offset = self._head[1] if segment.number == self._head[0] else 0
            if offset < segment.size:
                try:
                    with open(self._path(segment.number), "rb") as file:
                        file.seek(offset)
                        self._oldest = ENTRY.unpack(file.read(ENTRY.size))[3]
                except (OSError, struct.error):
                    self._oldest = 0.0
                return

    def _end_reader(self) -> None:
        if self._reader is not None:
            os.close(self._reader[1])
            self._reader = None

    def _unlink(self, number_of: int) -> None:
        if self._reader is not None and self._reader[0] == number_of:
            self._end_reader()
        try:
            self._path(number_of).unlink()
        except OSError as error:
            log.warning("spool %s: %s", self.folder, reason_of(error))

    def _path(self, number_of: int) -> Path:
        return self.folder / f"{number_of:016x}.log"

    # for both

    def state(self) -> tuple[int, int, float]:
        """Samples waiting, bytes on disk, and the age of the oldest sample."""
        with self._lock:
            held = self._held
            samples = (sum(segment.samples for segment in self._segments)
                       + sum(count for _, count, _ in self._memory)
                       + (len(held.records) if held else 0))
            oldest = held.oldest if held else self._oldest
            return (samples, sum(segment.size for segment in self._segments),
                    0.0 if oldest is None else max(self._clock() - oldest, 0.0))

    def set_limit(self, limit: int) -> None:
        """Change the limit; applies from the next append."""
        with self._lock:
            self._limit = limit

    def close(self) -> None:
        """Close the files; samples kept only in memory count as dropped."""
        with self._lock:
            self._to_disk()
            before = self.dropped.get("disk full", 0)
            while self._memory:
                self._forget("disk full")
            if self._held is not None:
                self._drop(self._held.unwritten, "disk full")
            lost = self.dropped.get("disk full", 0) - before
            if lost:
                log.error("spool %s: %d samples that the disk did not take are lost", self.folder,
                          lost)
            self._end_writer()
            self._end_reader()
            os.close(self._cursor)

    def set_aside(self, records: Sequence[bytes], reason: str) -> None:
        """Save records that a sink rejected for good, with the reason; bounded."""
        folder = self.folder / "refused"
        try:
            folder.mkdir(exist_ok=True)
            stem = f"{self._clock():.6f}"
            (folder / f"{stem}.records").write_bytes(lines(records))
            (folder / f"{stem}.reason").write_text(
                f"{len(records)} samples: {reason}\n", "utf-8")
            kept = sorted(folder.glob("*.records"))
            sizes = [path.stat().st_size for path in kept]
            while len(kept) > REFUSED_FILES or sum(sizes) > REFUSED_BYTES:
                kept[0].with_suffix(".reason").unlink(missing_ok=True)
                kept.pop(0).unlink()
                sizes.pop(0)
        except OSError as error:
            log.error("%s: %s; lost %d refused samples", folder, reason_of(error), len(records))

# --- delivery -------------------------------------------------------------------------------------

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0      # seconds between attempts
MOST_RETRY_AFTER = 3600.0
SILENT_SECONDS = 1.0        # to wait for a sink that does not confirm deliveries
GRACE_SECONDS = 3.0         # at the end, for deliveries in flight
QUIET_SECONDS = 3600.0      # without a refusal, until the next one of the same status is logged


class RetryLater(Exception):
    """A delivery failed and is retried; `left` are the records that were not accepted."""

    def __init__(self, reason: str, left: Sequence[bytes], after: float | None = None) -> None:
        super().__init__(reason)
        self.left, self.after = [*left], after


class Rejected(Exception):
    """The sink rejects `records` for good; `left` are those still to be sent."""

    def __init__(self, reason: str, records: Sequence[bytes], left: Sequence[bytes] = ()) -> None:
        super().__init__(reason)
        self.records, self.left = [*records], [*left]


def retry_after(value: str, now: float) -> float | None:
    """Seconds to wait by a Retry-After header, bounded; None if it is invalid, zero or past: a sink
    with another clock, or one that always sends 0, gets growing pauses."""
    try:
        if re.fullmatch(r"[0-9]{1,9}", value.strip()):
            seconds = float(value)
        else:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return min(seconds, MOST_RETRY_AFTER) if seconds > 0 else None


class HttpTransport:
    """Requests to an HTTP sink, on a persistent connection."""

    def __init__(self, sink: SinkSettings) -> None:
        self.sink = sink
        self.post = POSTS[sink.type, sink.form]
        self.url = post_url(sink)
        tls = client_context(sink.cert, sink.key, sink.ca) \
            if self.url.startswith("https:") else None
        self._client = Client(tls, max_idle=1)

    def headers(self) -> dict[str, str]:
        """Headers of a request; the token file is read each time."""
        headers = {"User-Agent": USER_AGENT, **self.post.headers}
        token = self.sink.token
        if self.sink.token_file is not None:
            try:
                token = read_file(self.sink.token_file).decode("utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ClientError(f"{self.sink.token_file}: {reason_of(error)}") from None
        if token is not None:
            headers["Authorization"] = f"{self.post.authorization} {token}"
        return {**headers, **(self.sink.headers or {})}

    def send(self, records: Sequence[bytes]) -> None:
        """Deliver, or raise RetryLater, TooLarge or Rejected."""
        body = self.post.body(records)
        try:
            headers = self.headers()
            if self.post.packs if self.sink.gzip is None else self.sink.gzip:
                body, headers["Content-Encoding"] = gzip(body), "gzip"
            answer = self._client.request("POST", self.url, headers, body, self.sink.timeout)
        except TooLarge:                # the answer: fewer records have a shorter one
            raise
        except (ClientError, UnicodeEncodeError) as error:
            raise RetryLater(str(error), records) from None
        reason = f"{answer.status} {answer.body[:200].decode('utf-8', 'replace').strip()!r}"
        if 200 <= answer.status < 300:
            if self.post.judge is not None:
                refusal = self.post.judge(records, answer.body)
                if refusal.never:
                    raise Rejected(refusal.reason, refusal.never, refusal.again)
                if refusal.again:
                    raise RetryLater(refusal.reason, refusal.again)
            return
        if answer.status == 413:
            raise TooLarge(reason)
        if 400 <= answer.status < 500 and answer.status not in (408, 429):
            raise Rejected(reason, records)
        raise RetryLater(reason, records, retry_after(answer.headers.get("retry-after", ""),
                                                 time.time()))

    def check(self) -> None:
        """Reach the sink; raises OSError, ClientError."""
        parts = urllib.parse.urlsplit(self.url)
        self.headers()
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname or "", port), self.sink.timeout) as plain:
            if parts.scheme == "https":
                context = client_context(self.sink.cert, self.sink.key, self.sink.ca)
                context.wrap_socket(plain, server_hostname=parts.hostname).close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class StreamTransport:
    """A connection for each delivery, TCP or TLS.

    These protocols have no acknowledgement. So we shut down our side and wait until the sink closes
    its own, which it does after reading everything. A sink that dies with unread bytes, or before
    they arrive, resets the connection, and the delivery is retried.
    """

    def __init__(self, sink: SinkSettings) -> None:
        self.sink = sink
        self.address = parse_address(sink.address or "")
        self._context = client_context(sink.cert, sink.key, sink.ca) \
            if sink.transport == "tls" else None
        self._frame = SINKS[sink.type].stream
        # Whether it closes its side after ours. Once it has, silence is a failure; before that, it
        # may be a sink that never does.
        self._confirms: bool | None = None

    def _connect(self, deadline: float) -> socket.socket:
        plain = socket.create_connection(self.address, _left(deadline))
        if self._context is None:
            return plain
        try:
            plain.settimeout(_left(deadline))
            return self._context.wrap_socket(plain, server_hostname=self.address[0])
        except (OSError, ValueError):
            plain.close()
            raise

    def send(self, records: Sequence[bytes]) -> None:
        """Deliver, or raise RetryLater."""
        deadline = time.monotonic() + self.sink.timeout
        shown_address = "%s:%d" % self.address
        try:
            with self._connect(deadline) as connection:
                try:
                    connection.settimeout(_left(deadline))
                    connection.sendall(self._frame(records))
                    if self._confirms is False:
                        deadline = min(deadline, time.monotonic() + SILENT_SECONDS)
                    confirmed = self._confirmed(connection, deadline)
                except OSError:             # reset, so that no sink uses an incomplete line
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                          struct.pack("ii", 1, 0))
                    raise
        except (OSError, ValueError) as error:
            raise RetryLater(f"{shown_address}: {reason_of(error)}", records) from None
        if not confirmed and self._confirms is None:
            log.warning("%s keeps connections open after we have closed our side: cannot tell "
                        "whether deliveries arrive", shown_address)
        self._confirms = confirmed

    def _confirmed(self, connection: socket.socket, deadline: float) -> bool:
        """Whether the sink has read everything; False if it does not confirm. Raises OSError."""
        try:
            if isinstance(connection, ssl.SSLSocket):
                connection.settimeout(_left(deadline))
                try:
                    connection.unwrap()
                except ssl.SSLEOFError:     # without close_notify: the end of TCP decides
                    pass
                except ssl.SSLError as error:       # an alert; with TLS 1.3 it may follow the data
                    if error.reason != "APPLICATION_DATA_AFTER_CLOSE_NOTIFY":
                        raise
            connection.shutdown(socket.SHUT_WR)
            while True:
                connection.settimeout(_left(deadline))
                if not connection.recv(READ_SIZE):
                    break
            while True:                     # if it closed first, a reset may follow
                raise_error_of(connection)
                if not unacknowledged(connection):
                    return True
                _left(deadline)
                time.sleep(0.01)
        except socket.timeout:
            if self._confirms or unacknowledged(connection):
                raise socket.timeout("timed out") from None
            return False
        except OSError as error:
            if error.errno == errno.ENOTCONN:       # shutdown() after a reset
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)) \
                    from None
            raise

    def check(self) -> None:
        """Reach the sink; raises OSError."""
        self._connect(time.monotonic() + self.sink.timeout).close()

    def close(self) -> None:
        """Nothing to close."""


def unacknowledged(connection: socket.socket) -> bool:
    """Whether the peer's machine has not acknowledged all bytes, where the system tells."""
    try:                                    # SIOCOUTQ, <linux/sockios.h>; the same as TIOCOUTQ
        packed = fcntl.ioctl(connection.fileno(), 0x5411, b"\0" * 4)
        return sys.platform == "linux" and packed != b"\0" * 4
    except OSError:
        return False


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise socket.timeout("timed out")
    return left


MAX_DATAGRAM = 65_507               # IPv4
BURST = 16                          # datagrams between pauses: receivers' buffers are small
BURST_PAUSE = 0.002
REFUSAL_PAUSE = 0.02                # in which a nearby machine reports a closed port


class DatagramTransport:
    """UDP: unconfirmed, but a closed port is noticed where ICMP reports it."""

    def __init__(self, sink: SinkSettings) -> None:
        self.sink = sink
        self.address = parse_address(sink.address or "")
        self._packets = SINKS[sink.type].packets
        self._address_index = 0             # moves to the next after a failure

    def _connect(self) -> socket.socket:
        addresses = socket.getaddrinfo(*self.address, type=socket.SOCK_DGRAM)
        index = self._address_index % len(addresses)
        family, kind, protocol, _, address = addresses[index]
        connection = socket.socket(family, kind, protocol)
        try:
            connection.connect(address)
            connection.settimeout(self.sink.timeout)
        except OSError:
            connection.close()
            raise
        return connection

    def send(self, records: Sequence[bytes]) -> None:
        """Deliver, or raise RetryLater or Rejected."""
        done = sure = 0                     # records sent; those before the last check for errors
        count = 0
        try:
            with self._connect() as connection:
                for place, (datagrams, count) in enumerate(self._packets(records)):
                    if not datagrams or max(map(len, datagrams)) > MAX_DATAGRAM:
                        raise OSError(errno.EMSGSIZE, "")
                    for datagram in datagrams:
                        connection.send(datagram)
                    done += count
                    if place % BURST == 0:
                        _await_errors(connection, BURST_PAUSE if place else REFUSAL_PAUSE)
                        sure = done
                _await_errors(connection, REFUSAL_PAUSE)
        except (OSError, UnicodeError) as error:    # UnicodeError: the name is impossible
            if isinstance(error, OSError) and error.errno == errno.EMSGSIZE:    # of this system
                raise Rejected("does not fit in a datagram", records[done:done + count],
                               records[done + count:]) from None
            self._address_index += 1
            reason = "%s:%d: %s" % (*self.address, reason_of(error))
            raise RetryLater(reason, records[sure:]) from None

    def check(self) -> None:
        """The name resolves and there is a route: UDP allows no further check."""
        self._connect().close()

    def close(self) -> None:
        """Nothing to close."""


def _await_errors(connection: socket.socket, seconds: float) -> None:
    """Wait for ICMP errors; raises OSError when the port is closed."""
    poll = select.poll()                # select() fails beyond 1,024 descriptors
    poll.register(connection, select.POLLIN)
    poll.poll(seconds * 1000)
    raise_error_of(connection)


RECORD_START = b'{"name": "'                # how a sample of ours begins


class FileTransport:
    """JSON lines in a file with rotation; removes a line that a crash left incomplete."""

    def __init__(self, sink: SinkSettings) -> None:
        assert sink.path is not None
        self.sink, self.path = sink, sink.path
        self._most = sink.rotate_bytes or 64 << 20
        self._keep = 5 if sink.keep is None else sink.keep
        self._file: int | None = None

    def _open(self) -> int:
        file = open_regular(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o640)
        size = os.fstat(file).st_size
        end = size
        while end:
            at = max(end - 65536, 0)
            newline = os.pread(file, end - at, at).rfind(b"\n")
            end = at + newline + 1 if newline >= 0 else at
            if newline >= 0:
                break
        if end < size:
            if not RECORD_START.startswith(os.pread(file, len(RECORD_START), end)):
                os.close(file)
                raise OSError(errno.EINVAL, "its last line is incomplete and not a sample; is this "
                              "the right file?")
            os.ftruncate(file, end)
        return file

    def send(self, records: Sequence[bytes]) -> None:
        """Append, or raise RetryLater."""
        try:
            if self._file is not None and not self._same(self._file):
                self.close()                # it was rotated by another program
            if self._file is None:
                self._file = self._open()
            size = os.fstat(self._file).st_size
            content = lines(records)
            if size and size + len(content) > self._most:
                self._rotate()
                self._file, size = self._open(), 0
            view = memoryview(content)
            try:
                while view:
                    view = view[os.write(self._file, view):]
            except OSError:
                try:
                    os.ftruncate(self._file, size)
                except OSError:
                    self.close()            # _open() removes the torn line
                raise
        except OSError as error:
            raise RetryLater(f"{self.path}: {reason_of(error)}", records) from None

    def _same(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _rotate(self) -> None:
        self.close()
        names = [self.path] + [self.path.with_name(f"{self.path.name}.{place}")
                               for place in range(1, self._keep + 1)]
        for older, newer in zip(reversed(names), reversed(names[:-1])):
            if newer.exists():
                newer.replace(older)
        if not self._keep:
            self.path.unlink()

    def check(self) -> None:
        """It can be opened; raises OSError."""
        fresh = not self.path.exists()
        os.close(open_regular(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640))
        if fresh:
            self.path.unlink()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


Transport = Union[HttpTransport, StreamTransport, DatagramTransport, FileTransport]


def transport_of(sink: SinkSettings) -> Transport:
    """The transport of a sink; raises ConfigError."""
    if sink.url is not None:
        return HttpTransport(sink)
    if sink.path is not None:
        return FileTransport(sink)
    return DatagramTransport(sink) if sink.transport == "udp" else StreamTransport(sink)


def form_of(sink: SinkSettings) -> str:
    """The format of the records in a sink's spool."""
    return f"{sink.type} {sink.form or ''}".strip()


class Delivery:
    """One sink: its spool, and the thread that delivers from it."""

    def __init__(self, name: str, sink: SinkSettings, folder: Path, limit: int,
                 random: Callable[[], float] = random.random,
                 now: Callable[[], float] = time.monotonic) -> None:
        self.name, self.sink = name, with_defaults(sink)
        self._random, self._now = random, now
        self._transport = transport_of(self.sink)
        self.form = form_of(self.sink)
        self.spool = Spool(folder / name, self.form, limit)
        self._stop = threading.Event()
        self._wake = threading.Event()      # set with _stop, and when settings change
        # written by the sink's thread, read by the server's
        self.sent = self.refused = self.failures = 0
        self.problem = ""                   # why the last delivery failed, if it did
        self.refusal = ""                   # why the sink refused the last one, if it did
        self._refused = ""                  # status of the last refusal, and until when the log has
        self._quiet_until = 0.0             # no other one of that status
        self._thread = threading.Thread(target=self._run, name=f"sink-{name}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def use(self, sink: SinkSettings, limit: int) -> None:
        """Apply new settings of the same form, to waiting samples too; read certificates again."""
        self.spool.set_limit(limit)
        fresh = with_defaults(sink)
        if fresh != self.sink or fresh.cert is not None or fresh.ca is not None:
            self.sink = fresh
            self._wake.set()

    @property
    def is_alive(self) -> bool:
        """Whether its thread is still running."""
        return self._thread.is_alive()

    def give(self, scrape: Scrape) -> None:
        """Encode a scrape and queue it."""
        self.spool.append(encode(self.sink, scrape), scrape.at / 1000)

    def stop(self) -> None:
        """Stop after the current delivery; the rest stays in the spool."""
        self._stop.set()
        self._wake.set()
        self.spool.wake()

    def join(self, seconds: float) -> None:
        """Wait for the thread to end, then close the spool."""
        self._thread.join(seconds)
        if not self._thread.is_alive():
            self._transport.close()
            self.spool.close()

    def _run(self) -> None:
        while True:
            batch = self.spool.take(self.sink.batch_bytes, self.sink.batch_age, self._stop)
            if batch is None:
                return
            try:
                done = self._deliver(batch.records)
            except Exception:               # a bug must not stop deliveries
                log.exception("sink %s: a delivery failed", self.name)
                self.spool.set_aside(batch.records, "internal error; see the log")
                self.refused += len(batch.records)
                done = True
            if done:
                self.spool.settle()

    def _deliver(self, records: Records) -> bool:
        """Deliver until everything is accepted or set aside; False if stopped before that."""
        work: list[Records] = [records]
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE, self._random)
        while work:
            self._wake.clear()
            if self._stop.is_set():
                return False
            part = work.pop(0)
            left: Records = []
            try:
                if self._transport.sink is not self.sink:
                    self._replace_transport(part)
                self._transport.send(part)
                self._succeeded()
            except TooLarge as error:
                if len(part) > 1:
                    work[:0] = [part[:len(part) // 2], part[len(part) // 2:]]
                    continue
                self._refuse(part, str(error))
                continue
            except Rejected as error:
                self._refuse(error.records, str(error))
                left = error.left
                self.sent += len(part) - len(error.records) - len(left)
                backoff.reset()
            except RetryLater as error:
                left = error.left
                self.sent += len(part) - len(left)
                self._failed(str(error), sum(map(len, work)) + len(left))
                pause = backoff.next()
                if error.after is not None:
                    pause = max(error.after, 0.1) + 0.1 * self._random()
                self._wake.wait(pause)
            else:
                self.sent += len(part)
                backoff.reset()
            if left:
                work.insert(0, left)
        return True

    def _replace_transport(self, records: Records) -> None:
        """Apply new settings."""
        try:
            fresh = transport_of(self.sink)
        except ConfigError as error:        # a certificate has disappeared since the reload
            raise RetryLater(str(error), records) from None
        self._transport.close()
        self._transport = fresh

    def _refuse(self, records: Records, reason: str) -> None:
        self.refused += len(records)
        self.refusal = reason
        status, now = reason.partition(" ")[0], self._now()
        if status != self._refused or now > self._quiet_until:
            log.error("sink %s refused samples for good (%d, saved in %s): %s", self.name,
                      len(records), self.spool.folder / "refused", reason)
        self._refused, self._quiet_until = status, now + QUIET_SECONDS
        self.spool.set_aside(records, reason)

    def _failed(self, reason: str, waiting: int) -> None:
        self.failures += 1
        if not self.problem:
            log.warning("sink %s: delivery failed, retrying (%d samples waiting): %s", self.name,
                        waiting, reason)
        self.problem, self.refusal = reason, ""

    def _succeeded(self) -> None:
        if self.problem:
            log.info("sink %s: delivery works again", self.name)
        self.problem = self.refusal = ""

# --- main -----------------------------------------------------------------------------------------


# Columns of the HTML page, after the sink's name.
SINK_TITLES = ("type", "sent", "spooled", "dropped", "refused", "oldest", "state")


class SinkState(NamedTuple):
    """State of a sink, for the HTML page and the metrics."""
    name: str
    type: str
    sent: int
    spooled: int
    dropped: int
    refused: int
    oldest: float
    problem: str


class Forwarder:
    """All parts of a running forwarder. Owned by the loop."""

    def __init__(self, settings: Settings, once: bool = False) -> None:
        self.settings = settings
        self.registry = Registry()
        self.server = Server("forwarder", self.registry)
        register_process_metrics(self.registry, "forwarder")
        self.deliveries: dict[str, Delivery] = {}
        self._leaving: dict[str, Delivery] = {}     # sinks that are no longer in the settings
        self._lock = self._lock_spool(settings)
        self.scraper = Scraper(self.server.loop, settings, proxy_context(settings), self.deliver,
                               self.registry)
        self.scraper.baseline = read_counters(self._state_path)
        self._use_sinks(settings, once)
        self.registry.collect(self._families)

    @property
    def _state_path(self) -> Path:
        return spool_of(self.settings) / "counters.json"

    @staticmethod
    def _lock_spool(settings: Settings) -> int:
        """Lock the spool: one process uses it at a time. Raises ConfigError."""
        folder = spool_of(settings)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_spool(folder)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"spool {folder}: {reason_of(error)}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(f"spool {folder}: in use by another forwarder; stop it or set "
                              "another spool") from None
        except OSError as error:            # some network file systems have no locks
            raise ConfigError(f"spool {folder}: cannot lock it: {reason_of(error)}") from None
        return lock

    def deliver(self, scrape: Scrape) -> None:
        """Give a scrape to each sink."""
        for delivery in self.deliveries.values():
            self.server.loop.guarded(delivery.give, (scrape,))      # a failure affects one sink

    def _use_sinks(self, settings: Settings, once: bool = False) -> None:
        """Start new sinks, stop old ones; raises ConfigError before it changes anything."""
        fresh: dict[str, Delivery] = {}
        for name, sink in settings.sinks.items():
            if name not in self.deliveries:
                if name in self._leaving:
                    self._leaving.pop(name).join(0.0)
                if once:
                    sink = dataclasses.replace(sink, batch_age=0.0)
                try:
                    fresh[name] = Delivery(name, sink, spool_of(settings), settings.spool_bytes)
                except SpoolError as error:
                    for delivery in fresh.values():
                        delivery.spool.close()
                    raise ConfigError(str(error)) from None
        for name, delivery in list(self.deliveries.items()):
            if name in settings.sinks:
                delivery.use(settings.sinks[name], settings.spool_bytes)
            else:
                delivery.stop()
                self._leaving[name] = self.deliveries.pop(name)
        for name, delivery in fresh.items():
            self.deliveries[name] = delivery
            if SINKS[delivery.sink.type].inexact:
                log.info("sink %s (%s): %s", name, delivery.sink.type,
                         SINKS[delivery.sink.type].inexact)
            delivery.start()
        rows = [SINKS[sink.type] for sink in settings.sinks.values()]
        self.scraper.differences = any(row.differences for row in rows)
        self.scraper.stale = any(row.stale for row in rows)

    def reload(self, settings: Settings) -> None:
        """Apply new settings; raises ConfigError for those that need a restart."""
        fixed = [name for name in ("listen",) if getattr(settings, name) != getattr(
            self.settings, name)]
        if spool_of(settings) != spool_of(self.settings):
            fixed.append("spool")
        if fixed:
            raise ConfigError(f"{', '.join(fixed)}: cannot change while the forwarder runs: "
                              "restart it to apply the new value")
        context = proxy_context(settings)
        for name, sink in settings.sinks.items():
            transport_of(with_defaults(sink))       # check certificates before anything changes
            known = self.deliveries.get(name)
            if known is not None and known.form != form_of(with_defaults(sink)):
                raise ConfigError(f"sinks.{name}: cannot change type or form while the forwarder "
                                  "runs: rename the sink or restart the forwarder")
            if name in self._leaving and self._leaving[name].is_alive:
                raise ConfigError(f"sinks.{name}: still stopping; try again in a few seconds")
        self._use_sinks(settings)
        self.settings = settings
        self.scraper.use(settings, context)

    def finish(self) -> None:
        """Stop the sinks and save the counters; spools keep what is not delivered."""
        ending = [*self.deliveries.values(), *self._leaving.values()]
        for delivery in ending:
            delivery.stop()
        end = time.monotonic() + GRACE_SECONDS
        for delivery in ending:
            delivery.join(max(end - time.monotonic(), 0.0))
        if self.scraper.differences:
            write_counters(self._state_path, self.scraper.counters())

    # pages and metrics

    def states(self) -> list[SinkState]:
        """The current state of all sinks."""
        states = []
        for name, delivery in self.deliveries.items():
            spooled, _, oldest = delivery.spool.state()
            states.append(SinkState(name, delivery.sink.type, delivery.sent, spooled,
                                    sum(delivery.spool.dropped.values()), delivery.refused,
                                    oldest, f"refuses samples: {delivery.refusal}"
                                    if delivery.refusal else delivery.problem))
        return states

    def _families(self) -> list[Family]:
        states = self.states()

        def family(name: str, kind: str, help_text: str, values: Iterable[Number]) -> Family:
            return Family(f"cmon_forwarder_sink_{name}", kind, help_text, [
                Sample((("sink", state.name), ("type", state.type)), value)
                for state, value in zip(states, values)])
        dropped = [Sample((("sink", name), ("reason", reason)), count)
                   for name, delivery in self.deliveries.items()
                   for reason, count in delivery.spool.dropped.copy().items()]
        return [
            family("up", GAUGE, "Whether the sink accepted the last delivery (1) or not (0); 1 "
                   "before the first.", [int(not state.problem) for state in states]),
            family("samples_sent_total", COUNTER, "Total number of samples that the sink accepted.",
                   [state.sent for state in states]),
            family("samples_refused_total", COUNTER, "Total number of samples that the sink "
                   "refused for good.", [state.refused for state in states]),
            family("spool_samples", GAUGE, "Number of samples waiting in the spool.",
                   [state.spooled for state in states]),
            family("spool_bytes", GAUGE, "Size of the spool on disk in bytes.",
                   [delivery.spool.state()[1] for delivery in self.deliveries.values()]),
            family("spool_oldest_seconds", GAUGE, "Age of the oldest waiting sample in seconds.",
                   [round(state.oldest, 3) for state in states]),
            family("failures_total", COUNTER, "Total number of deliveries that failed and were "
                   "retried.", [delivery.failures for delivery in self.deliveries.values()]),
            Family("cmon_forwarder_sink_samples_dropped_total", COUNTER,
                   "Total number of samples dropped from the spool, by reason.", dropped)]

    def routes(self) -> tuple[Route, ...]:
        """Routes of `listen`."""
        return (Route("GET", "/", self._overview), Route("GET", "/metrics", self._metrics),
                Route("GET", "/-/healthy", lambda _: text(200, "OK")),
                Route("GET", "/-/ready", self._is_ready))

    def _metrics(self, _request: Request) -> Answer:
        return Response(200, render(self.registry.families()).encode(), PAGE)

    def _is_ready(self, _request: Request) -> Answer:
        return text(200, "OK") if self.scraper.ready else text(
            503, "no targets yet: the proxy has not answered; see the log")

    def _overview(self, _request: Request) -> Answer:
        rows = [page_row(html.escape(state.name), [
            (title, html.escape(str(cell))) for title, cell in zip(SINK_TITLES, (
                state.type, state.sent, state.spooled, state.dropped, state.refused,
                f"{state.oldest:.0f} s", state.problem or "delivers"))])
            for state in self.states()]
        return plain_page("Container Monitor forwarder", (
            f"version {__version__}", f"{len(self.scraper.targets)} containers"), f"""\
<p><a href="/metrics">Metrics</a> · <a href="/-/healthy">healthy</a> ·
<a href="/-/ready">ready</a></p>
{page_table(("sink", *SINK_TITLES), rows)}""")


def spool_of(settings: Settings) -> Path:
    """The folder of the spools."""
    assert settings.spool is not None       # load_forwarder
    return settings.spool


def check_spool(folder: Path) -> None:
    """Raises ConfigError where other users could change the spool; OSError."""
    owners = {os.lstat(folder).st_uid, os.stat(folder).st_uid}      # a link may lead there
    if owners - {os.geteuid(), 0} or os.stat(folder).st_mode & 0o002:
        raise ConfigError(f"spool {folder}: other users can write there; set a folder that only "
                          "this user can write to")


def proxy_context(settings: Settings) -> ssl.SSLContext | None:
    """TLS towards the proxy; None for plain HTTP. Raises ConfigError."""
    if not settings.proxy.url.startswith("https:"):
        return None
    return client_context(settings.proxy.cert, settings.proxy.key, settings.proxy.ca)


def read_counters(path: Path) -> dict[str, dict[str, Number]]:
    """Counters of the previous process; removes the file, so that no increase counts twice."""
    try:
        content = json.loads(path.read_bytes())
        path.unlink()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s: %s; increases since the last run are lost", path,
                    reason_of(error) if isinstance(error, OSError) else "not JSON")
        return {}
    if not isinstance(content, dict):
        return {}
    return {instance: {series: value for series, value in counters.items()
                       if type(value) in (int, float)}
            for instance, counters in content.items() if isinstance(counters, dict)}


def write_counters(path: Path, counters: Mapping[str, Mapping[str, Number]]) -> None:
    """Save counters for the next process, atomically."""
    fresh = path.with_suffix(".new")
    try:
        fresh.write_text(json.dumps(counters, separators=(",", ":")))
        fresh.replace(path)
    except OSError as error:
        log.error("%s: %s; increases until the next start will be lost", path, reason_of(error))


def load_forwarder(arguments: argparse.Namespace) -> Settings:
    """The settings; raises ConfigError."""
    settings = command_settings(Settings, arguments, problems_of)
    if settings.spool is None:
        settings = dataclasses.replace(
            settings, spool=Path(arguments.config).resolve().parent / "spool")
    return settings


def reach(settings: Settings) -> list[str]:
    """For --check-config: contact the proxy and the sinks; return what is wrong."""
    problems: list[str] = []
    try:
        client = Client(proxy_context(settings), max_body=MAX_JSON_BYTES)
        answer = client.request("GET", settings.proxy.url.rstrip("/") + discovery_path(
            settings.groups, settings.shard), timeout=max(settings.timeout, 1.0))
        client.close()
        if answer.status != 200:
            line = answer.body.decode("utf-8", "replace").partition("\n")[0]
            raise ClientError(f"{answer.status} {line[:200]!r}")
        read_targets(answer.body, {})
    except ConfigError as error:
        problems += error.problems
    except (ClientError, DiscoveryError) as error:
        problems.append(f"proxy: {error}")
    for name, sink in settings.sinks.items():
        try:
            transport = transport_of(with_defaults(sink))
            transport.check()
            transport.close()
        except ConfigError as error:
            problems += [f"sinks.{name}: {problem}" for problem in error.problems]
        except (OSError, ValueError, ClientError) as error:
            where = sink.url or sink.address or sink.path
            problems.append(f"sinks.{name}: cannot use {where}: {reason_of(error)}")
    folder = spool_of(settings)
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if nearest == folder:
            check_spool(folder)
    except ConfigError as error:
        problems += error.problems
    except OSError as error:
        problems.append(f"spool {folder}: {reason_of(error)}")
    return problems


def run_round(scraper: Scraper) -> str:
    """Discover and scrape everything once; return the problem, or an empty string."""
    problems: list[str] = []
    scraper.once = problems.append
    scraper.start()
    scraper.loop.run(lambda: bool(problems))
    scraper.fetcher.close()
    return problems[0]


def dry_run(settings: Settings) -> int:
    """`--dry-run`: print what one round would send."""
    sinks = {name: with_defaults(sink) for name, sink in settings.sinks.items()}
    scrapes: list[Scrape] = []
    problem = run_round(Scraper(Loop(), settings, proxy_context(settings), scrapes.append,
                                Registry()))
    if problem:
        complain("cmon_forwarder", [problem])
        return 1
    for name, sink in sinks.items():
        records = [record for scrape in scrapes for record in encode(sink, scrape)]
        where = post_url(sink) if sink.url else sink.address or sink.path
        print(f"cmon_forwarder: sink {name} ({sink.type}): {len(records)} samples to {where}",
              file=sys.stderr)
        sys.stdout.write("".join([shown(sink, record) + "\n" for record in records]))
    sys.stdout.flush()
    return 0


def once(settings: Settings) -> int:
    """`--once`: one round; 0 when every sink accepted all."""
    forwarder = Forwarder(settings, once=True)
    try:
        problem = run_round(forwarder.scraper)
        problems = [problem] if problem else []
        for delivery in forwarder.deliveries.values():
            while not delivery.problem and delivery.spool.state()[0]:
                time.sleep(0.01)
    finally:
        forwarder.finish()
    for state in forwarder.states():
        print(f"{state.name}: {state.sent} samples sent, {state.spooled} waiting, {state.refused} "
              f"refused, {state.dropped} dropped")
        if state.problem:
            problems.append(f"sink {state.name}: {state.problem}")
        elif state.refused or state.dropped or state.spooled:
            problems.append(f"sink {state.name}: did not accept all samples")
    complain("cmon_forwarder", problems)
    return 1 if problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    open_streams()
    parser = command_line("cmon_forwarder.py", "Scrapes a tenant's containers through the proxy "
                          "and pushes their metrics to other systems.")
    parser.add_argument("--dry-run", action="store_true",
                        help="scrape once and print what would be sent, one sample a line")
    parser.add_argument("--once", action="store_true",
                        help="scrape and send once; exit 0 only if every sink accepted everything")
    arguments = parser.parse_args(argv)
    if arguments.config is None:
        parser.error("--config FILE is required: it names the proxy and the sinks")
    running: list[Forwarder] = []

    def start(settings: Settings) -> Server:
        forwarder = Forwarder(settings)
        running.append(forwarder)
        forwarder.server.listen(parse_address(settings.listen), forwarder.routes())
        forwarder.server.loop.call_soon(forwarder.scraper.start)
        return forwarder.server

    def reload(settings: Settings) -> None:
        for forwarder in running:
            forwarder.reload(settings)
    if not (arguments.dry_run or arguments.once) or arguments.check_config:
        try:
            return run_daemon("forwarder", arguments, lambda: load_forwarder(arguments), start,
                              reload, reach)
        finally:
            for forwarder in running:
                forwarder.finish()
    try:
        settings = load_forwarder(arguments)
        start_logging("forwarder", arguments.log_level or "warning", settings.log_format)
        return printing("cmon_forwarder",
                        lambda: dry_run(settings) if arguments.dry_run else once(settings))
    except ConfigError as error:
        complain("cmon_forwarder", error.problems)
        return 2
    finally:
        stop_logging()


if __name__ == "__main__":
    sys.exit(main())
