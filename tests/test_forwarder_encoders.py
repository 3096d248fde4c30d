# SPDX-License-Identifier: MPL-2.0
"""The forwarder's encoders: pure functions, read back by parsers written from the formats."""
from __future__ import annotations

import json
import math
import random
import re
import struct
import zlib
from typing import Any

import pytest

from cmon_agent import ExpositionError, parse
from cmon_forwarder import (
    PLAIN_NAN, SINKS, STALE_NAN, PageReader, Scrape, Selector, Series, Settings, SinkSettings,
    ProxySettings, Target, encode, gelf_datagrams, increase, octet_counted, packed_lines,
    post_url, read_bulk, read_time_series, snappy, with_defaults)

AT = 1_700_000_000_123
UUID = "8a1e7c6e-0000-4000-8000-000000000001"
WEB = Target(UUID, "web01", f"/v1/{UUID}/metrics", (("alias", "web01"), ("instance", UUID)))
GAUGE = Series("mem_limit", ())
NET = Series("net_in_total", (("interface", "net0"),), True)
ODD = "".join(map(chr, range(1, 256))) + "ſ€😀\u2028\ufeff;~,= \\\"'|#:@{}[]%"


def sink(type: str, **more: Any) -> SinkSettings:
    return with_defaults(SinkSettings(type=type, **more))


def scrape(*points: Any, target: Target = WEB, **more: Any) -> Scrape:
    return Scrape(target, AT, points, **more)


def texts(where: SinkSettings, one: Scrape) -> list[str]:
    return [record.decode() for record in encode(where, one)]


INFLUX_1, INFLUX_2 = sink("influxdb", url="http://x", database="d"), sink(
    "influxdb", url="http://x", org="o", bucket="b")
TAGGED, DOTTED = sink("graphite"), sink("graphite", form="dotted")
STATSD, DOGSTATSD = sink("statsd"), sink("statsd", tags=True)


@pytest.mark.parametrize("where, point, expected", [
    (INFLUX_1, (GAUGE, 5), f"mem_limit,alias=web01,instance={UUID} value=5i {AT}000000"),
    (INFLUX_1, (NET, 2 ** 63 - 1), f"net_in_total,alias=web01,instance={UUID},interface=net0 "
     f"value=9223372036854775807i {AT}000000"),
    (INFLUX_1, (NET, 2 ** 63), f"net_in_total,alias=web01,instance={UUID},interface=net0 "
     f"value=9.223372036854776e+18 {AT}000000"),
    (INFLUX_2, (NET, 2 ** 64 - 1), f"net_in_total,alias=web01,instance={UUID},interface=net0 "
     f"value=18446744073709551615u {AT}000000"),
    (INFLUX_2, (GAUGE, 2 ** 64), f"mem_limit,alias=web01,instance={UUID} "
     f"value=1.8446744073709552e+19 {AT}000000"),
    (INFLUX_1, (GAUGE, 0.5), f"mem_limit,alias=web01,instance={UUID} value=0.5 {AT}000000"),
    (INFLUX_1, (GAUGE, math.nan), None), (INFLUX_1, (GAUGE, -math.inf), None),
    (INFLUX_1, (GAUGE, 10 ** 399), None),
    (TAGGED, (NET, 2 ** 53 + 1), f"net_in_total;alias=web01;instance={UUID};interface=net0 "
     "9007199254740993 1700000000"),
    (TAGGED, (GAUGE, math.inf), None),
    (DOTTED, (NET, 7), "cmon.web01.net_in_total.net0 7 1700000000"),
    (sink("graphite", form="dotted", prefix="a.b"), (GAUGE, -1.5),
     "a.b.web01.mem_limit -1.5 1700000000"),
    (sink("graphite", form="dotted", prefix=""), (GAUGE, 1), "web01.mem_limit 1 1700000000"),
    (STATSD, (GAUGE, 5), "cmon.web01.mem_limit:5|g"),
    (STATSD, (GAUGE, -5), "cmon.web01.mem_limit:0|g\ncmon.web01.mem_limit:-5|g"),
    (STATSD, (GAUGE, math.nan), None),
    (DOGSTATSD, (Series("job:g", ()), 5), f"cmon.job_g:5|g|#alias:web01,instance:{UUID}"),
    (DOGSTATSD, (Series("g", (("cpu", "0"),)), 5),
     f"cmon.g:5|g|#alias:web01,instance:{UUID},cpu:0"),
    (sink("syslog"), (NET, math.nan), f'<134>1 2023-11-14T22:13:20.123Z web01 cmon - metric '
     f'[cmon@38678 name="net_in_total" value="NaN" alias="web01" instance="{UUID}" '
     'interface="net0"]'),
    (sink("gelf"), (GAUGE, math.nan), None),
    (sink("http"), (GAUGE, math.inf), '{"name": "mem_limit", "labels": {"alias": "web01", '
     f'"instance": "{UUID}"}}, "value": "+Inf", "timestamp": 1700000000.123}}'),
    (sink("http"), (GAUGE, 2 ** 64 - 1), '{"name": "mem_limit", "labels": {"alias": "web01", '
     f'"instance": "{UUID}"}}, "value": 18446744073709551615, "timestamp": 1700000000.123}}'),
    (sink("http", form="splunk"), (GAUGE, 1), '{"time": 1700000000.123, "host": "web01", '
     '"source": "cmon", "event": "metric", "fields": {"metric_name:mem_limit": 1, '
     f'"alias": "web01", "instance": "{UUID}"}}}}'),
    (sink("http", form="splunk"), (GAUGE, math.nan), None),
    (sink("http", form="elasticsearch"), (GAUGE, math.nan), None),
])
def test_a_sample_becomes(where: SinkSettings, point: Any, expected: str | None) -> None:
    assert texts(where, scrape(point)) == ([] if expected is None else [expected])


def test_statsd_gets_the_increase_of_counters() -> None:
    one = scrape((NET, 100), (Series("b", (), True), 5), increases={NET: 7})
    assert texts(STATSD, one) == ["cmon.web01.net_in_total.net0:7|c"]
    assert texts(DOGSTATSD, one) == [
        f"cmon.net_in_total:7|c|#alias:web01,instance:{UUID},interface:net0"]


def test_elasticsearch_documents_have_reproducible_ids() -> None:
    where = sink("http", form="elasticsearch", index="m")
    first, second = encode(where, scrape((GAUGE, 1), (NET, 2 ** 63)))
    action, document = map(json.loads, first.decode().split("\n"))
    assert action["create"]["_index"] == "m"
    assert document == {"name": "mem_limit", "labels": {"alias": "web01", "instance": UUID},
                        "value": 1, "@timestamp": "2023-11-14T22:13:20.123Z"}
    assert json.loads(second.decode().split("\n")[1])["value"] == 2 ** 63
    assert encode(where, scrape((GAUGE, 1)))[0] == first
    other = encode(where, scrape((GAUGE, 1))._replace(at=AT + 1))[0]
    assert other.split(b"\n")[0] != first.split(b"\n")[0]


# --- odd characters, through parsers written from the formats -------------------------------------

def read_influx(line: str) -> tuple[str, dict[str, str], str]:
    """The line protocol's reference: a backslash escapes `,`, `=` and blank, and nothing else."""
    assert "\n" not in line
    parts = re.findall(r"((?:\\[,= ]|\\(?![,= ])|[^\\, =])+|[, =])", line)
    words: list[str] = [re.sub(r"\\([,= ])", r"\1", part) if len(part) > 1 else part
                        for part in parts]
    tags: dict[str, str] = {}
    at = 1
    while words[at] == ",":
        assert words[at + 2] == "="
        tags[words[at + 1]] = words[at + 3]
        at += 4
    assert words[at] == " "
    return words[0], tags, "".join(words[at + 1:])


def read_syslog(message: str) -> dict[str, str]:
    """RFC 5424, 6: header, and one element of structured data."""
    match = re.fullmatch(
        r"<134>1 \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,6}Z ([!-~]{1,255}) cmon - metric "
        r'\[cmon@38678((?: [!#-<>-\\^-~]{1,32}="(?:[^"\\\]]|\\["\\\]])*")+)\]', message, re.S)
    assert match, message
    return {name: re.sub(r'\\(["\\\]])', r"\1", value) for name, value in re.findall(
        r' ([^ =]+)="((?:[^"\\\]]|\\["\\\]])*)"', match.group(2), re.S)}


def odd_texts() -> list[str]:
    source = random.Random(12)
    made = ["\\", "a\\", "\\,", "a\\ b", "\n", "~", "]", '"', " ", "=", ODD]
    return made + ["".join(source.choices(ODD, k=source.randint(1, 8))) for _ in range(400)]


@pytest.mark.parametrize("value", odd_texts(), ids=lambda value: ascii(value)[:40])
def test_unusual_characters_are_preserved(value: str) -> None:
    target = WEB._replace(alias=value, labels=(("alias", value), ("instance", UUID)))
    labels = {"alias": value, "instance": UUID, "label": value}
    one = scrape((Series("m", (("label", value),)), 1.5), target=target)

    def near(pattern: str, sent: str = value) -> str:
        return re.sub(pattern, "_", sent)
    name, tags, rest = read_influx(texts(INFLUX_1, one)[0])
    odd = near(r"[\n\r\0]|\\(?=[\\,= ]|\Z)")
    assert (name, tags) == ("m", {"alias": odd, "instance": UUID, "label": odd})
    assert rest == f"value=1.5 {AT}000000"
    path, number, at = texts(TAGGED, one)[0].split(" ")
    assert (number, at) == ("1.5", "1700000000") and not re.search(r"\s", path)
    tag = near(r"[\s;\x00-\x1f\x7f]|^~")
    assert path.split(";") == ["m", f"alias={tag}", f"instance={UUID}", f"label={tag}"]
    word = near("[^A-Za-z0-9_-]")
    assert texts(DOTTED, one)[0].split(" ")[0].split(".") == ["cmon", word, "m", word]
    assert texts(STATSD, one) == [f"cmon.{word}.m.{word}:1.5|g"]
    dog = near(r"[\s,|#\x00-\x1f\x7f]")
    assert texts(DOGSTATSD, one) == [f"cmon.m:1.5|g|#alias:{dog},instance:{UUID},label:{dog}"]
    assert read_syslog(texts(sink("syslog"), one)[0]) == {"name": "m", "value": "1.5", **labels}
    gelf = json.loads(texts(sink("gelf"), one)[0])
    assert gelf == {"version": "1.1", "host": value, "short_message": "m", "level": 6,
                    "timestamp": AT / 1000, "_value": 1.5,
                    **{f"_{name}": text for name, text in labels.items()}}
    assert json.loads(texts(sink("http"), one)[0])["labels"] == labels
    assert json.loads(texts(sink("http", form="elasticsearch"), one)[0].split("\n")[1])[
        "labels"] == labels
    assert json.loads(texts(sink("http", form="splunk"), one)[0])["fields"] == {
        "metric_name:m": 1.5, **labels}
    written = encode(sink("remote_write"), one)[0]
    assert read_time_series(written).endswith(f"1.5 {AT}")
    read = parse(read_time_series(written) + "\n")[0].samples[0]
    assert dict(read.labels) == labels


@pytest.mark.parametrize("where", [TAGGED, DOTTED])
def test_a_line_that_carbon_does_not_read_is_left_out(where: SinkSettings) -> None:
    def of_length(extra: int) -> Scrape:
        return scrape((Series("m", (("k", "x" * extra),)), 1), (GAUGE, 2))
    room = 16_384 - len(texts(where, of_length(1))[0]) + 1
    assert [len(line) for line in texts(where, of_length(room))][0] == 16_384
    assert texts(where, of_length(room + 1)) == texts(where, of_length(1))[1:]


def test_reserved_labels_are_renamed() -> None:
    one = scrape((Series("m", (("id", "1"), ("value", "2"), ("name", "3"), ("x" * 40, "4"))), 0))
    assert read_syslog(texts(sink("syslog"), one)[0]) == {
        "name": "m", "value": "0", "alias": "web01", "instance": UUID, "id": "1",
        "exported_value": "2", "exported_name": "3", "x" * 32: "4"}
    gelf = json.loads(texts(sink("gelf"), one)[0])
    assert (gelf["_exported_id"], gelf["_exported_value"], gelf["_name"]) == ("1", "2", "3")
    assert "_id" not in gelf and gelf["_value"] == 0
    one = scrape((Series("m", (("name", "1"), ("time", "2"), ("exported_time", "3"))), 0))
    assert ";exported_name=1;" in texts(sink("graphite"), one)[0]
    assert ",exported_exported_time=2,exported_time=3 " in texts(INFLUX_1, one)[0]


def test_renamed_labels_never_collide() -> None:
    """Duplicate names or __name__: stores reject the whole request."""
    reader = PageReader(selector(labels={"exported_site": "x"}))
    page = ('a{alias="1",exported_alias="2",exported_exported_alias="3"} 1\n'
            'a{__name__="b",__x="c",site="d"} 2\na{exported_site="e"} 3\n')
    assert [series.labels for _, series, _ in reader.read(page)[0]] == [
        (("exported_exported_exported_alias", "1"), ("exported_alias", "2"),
         ("exported_exported_alias", "3")),
        (("exported___name__", "b"), ("exported___x", "c"), ("site", "d")),
        (("exported_exported_site", "e"),)]


def test_a_page_cannot_replace_our_up() -> None:
    reader = PageReader(selector())
    page = 'up 7\nup{job="x"} 8\nscrape_samples_scraped 9\n# TYPE x untyped\nx 1 1700000000\n'
    for _ in range(2):
        points, count = reader.read(page)
        assert [(series.name, value) for _, series, value in points] == [("up", 8), ("x", 1)]
        assert count == 4


# --- remote write ---------------------------------------------------------------------------------

def test_remote_write_sorts_labels_and_marks_what_has_ended() -> None:
    records = encode(sink("remote_write"), scrape(
        (Series("z", (("A", "1"), ("zone", "2"))), 2 ** 64), (GAUGE, math.nan), (GAUGE, 10 ** 400),
        (GAUGE, -10 ** 400), gone=[NET]))
    assert [read_time_series(record) for record in records] == [
        f'z{{A="1",alias="web01",instance="{UUID}",zone="2"}} 1.8446744073709552e+19 {AT}',
        f'mem_limit{{alias="web01",instance="{UUID}"}} NaN {AT}',
        f'mem_limit{{alias="web01",instance="{UUID}"}} +Inf {AT}',
        f'mem_limit{{alias="web01",instance="{UUID}"}} -Inf {AT}',
        f'net_in_total{{alias="web01",instance="{UUID}",interface="net0"}} StaleNaN {AT}']
    assert b"\x0a\x0d\x0a\x08__name__\x12\x01z" in records[0]
    assert PLAIN_NAN in records[1] and STALE_NAN in records[4]
    assert struct.unpack("<d", STALE_NAN)[0] != struct.unpack("<d", STALE_NAN)[0]


def unsnappy(block: bytes) -> bytes:
    """The format's description: a length, then literals (and copies, which we never write)."""
    at = shift = size = 0
    while True:
        byte = block[at]
        at += 1
        size |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    out = b""
    while at < len(block):
        tag = block[at]
        assert tag & 3 == 0, "a copy"
        length = tag >> 2
        at += 1
        if length >= 60:
            extra = length - 59
            length = int.from_bytes(block[at:at + extra], "little")
            at += extra
        out += block[at:at + length + 1]
        assert at + length + 1 <= len(block)
        at += length + 1
    assert len(out) == size
    return out


@pytest.mark.parametrize("size", [0, 1, 59, 60, 61, 255, 256, 65535, 65536, 65537, 200_000])
def test_snappy_is_read_back(size: int) -> None:
    content = random.Random(size).randbytes(size) if hasattr(random, "randbytes") else bytes(size)
    assert unsnappy(snappy(content)) == content


# --- framing --------------------------------------------------------------------------------------

def test_octet_counting_counts_octets() -> None:
    assert octet_counted(["ä".encode(), b"bc"]) == b"2 \xc3\xa42 bc"


def test_gelf_messages_are_compressed_and_chunked() -> None:
    small = gelf_datagrams(b"{}")
    assert [zlib.decompress(one) for one in small] == [b"{}"]
    content = random.Random(3).getrandbits(8 * 5000).to_bytes(5000, "big")
    chunks = gelf_datagrams(content)
    assert {one[:2] for one in chunks} == {b"\x1e\x0f"} and len({one[2:10] for one in chunks}) == 1
    assert [one[10] for one in chunks] == list(range(len(chunks)))
    assert {one[11] for one in chunks} == {len(chunks)} and max(map(len, chunks)) <= 1420
    assert zlib.decompress(b"".join(one[12:] for one in chunks)) == content
    huge = random.Random(4).getrandbits(8 * 200_000).to_bytes(200_000, "big")
    assert gelf_datagrams(huge) == []


def test_lines_fill_datagrams_and_are_never_split() -> None:
    records = [b"x" * size for size in (700, 700, 40, 1432, 5000, 1, 1)]
    packets = packed_lines(records)
    assert [count for _, count in packets] == [2, 1, 1, 1, 2]
    assert b"\n".join(one for many, _ in packets for one in many).split(b"\n") == records


@pytest.mark.parametrize("where, url", [
    (INFLUX_1, "http://x/write?db=d&precision=ns"),
    (INFLUX_2, "http://x/api/v2/write?org=o&bucket=b&precision=ns"),
    (sink("influxdb", url="http://x/base/", database="a b"),
     "http://x/base/write?db=a+b&precision=ns"),
    (sink("http", url="http://x"), "http://x/"),
    (sink("http", url="http://x/y?z=1"), "http://x/y?z=1"),
    (sink("http", url="http://x:1/", form="elasticsearch"), "http://x:1/_bulk"),
    (sink("http", url="https://x", form="splunk"), "https://x/services/collector"),
    (sink("remote_write", url="http://x"), "http://x/api/v1/write"),
    (sink("remote_write", url="http://x/api/v1/push"), "http://x/api/v1/push"),
])
def test_request_urls(where: SinkSettings, url: str) -> None:
    assert post_url(where) == url


@pytest.mark.parametrize("body, again, never", [
    ({"errors": False, "items": []}, "", ""),
    ({"errors": True, "items": [{"create": {"status": 201}}, {"create": {"status": 409}},
                                {"create": {"status": 400, "error": "bad"}}]}, "", "c"),
    ({"errors": True, "items": [{"create": {"status": 429, "error": "slow"}},
                                {"create": {"status": 503}}, {"create": {"status": 200}}]},
     "ab", ""),
    ([], "abc", ""), ({"errors": True, "items": [{}]}, "abc", ""),
])
def test_each_document_of_a_bulk_request_is_judged_separately(body: Any, again: str, never: str
                                                             ) -> None:
    said = read_bulk([b"a", b"b", b"c"], json.dumps(body).encode())
    assert (b"".join(said.again).decode(), b"".join(said.never).decode()) == (again, never)
    assert bool(said.reason) == bool(again or never)


# --- pages ----------------------------------------------------------------------------------------

def selector(**more: Any) -> Selector:
    return Selector(Settings(proxy=ProxySettings(url="http://x"), sinks={}, **more))


PAGE = """# HELP a_total x
# TYPE a_total counter
a_total{if="net0"} 5
a_total{if="net1",alias="mine"} 18446744073709551615
# TYPE g gauge
g -1.5
# TYPE h histogram
h_bucket{le="1"} 1
h_bucket{le="+Inf"} 2
h_sum 3.5
h_count 2
# TYPE s summary
s{quantile="0.5"} 4
s_sum 1
s_count 1
u 7
"""


def test_a_page_is_read_the_same_with_and_without_cache() -> None:
    reader = PageReader(selector())
    first, count = reader.read(PAGE)
    assert count == 11
    assert [(series.name, series.counter) for _, series, _ in first] == [
        ("a_total", True), ("a_total", True), ("g", False), ("h_bucket", True),
        ("h_bucket", True), ("h_sum", True), ("h_count", True), ("s", False), ("s_sum", True),
        ("s_count", True), ("u", False)]
    assert first[1][1].labels == (("if", "net1"), ("exported_alias", "mine"))
    assert first[1][2] == 2 ** 64 - 1
    assert reader.read(PAGE) == (first, count)


def kit_reading(page: str) -> Any:
    return sorted((family.name + one.suffix, one.labels, repr(one.value))
                  for family in parse(page) for one in family.samples)


def test_the_fast_parser_and_the_kits_parser_agree() -> None:
    """Lines of a page are moved, doubled, cut and changed: both read the same, or both refuse."""
    source = random.Random(5)
    reader = PageReader(selector())
    reader.read(PAGE)
    refused = 0
    for _ in range(3000):
        lines = PAGE.splitlines(keepends=True)
        for _ in range(source.randint(0, 3)):
            at = source.randrange(len(lines))
            what = source.randrange(6)
            if what == 0:
                lines.insert(source.randrange(len(lines)), lines[at])
            elif what == 1:
                lines.insert(source.randrange(len(lines)), lines.pop(at))
            elif what == 2:
                lines[at] = lines[at].replace(source.choice("01235g#"), source.choice("0 .\tx#"))
            elif what == 3:
                lines[at] = lines[at][:source.randrange(len(lines[at]) + 1)] + "\n"
            elif what == 4:
                lines[at] = lines[at].rstrip("\n") + " 1700000000000\n"
            else:
                lines[at] = lines[at].replace("counter", "gauge")
        page = "".join(lines)
        try:
            expected = kit_reading(page)
        except ExpositionError:
            refused += 1
            with pytest.raises(ExpositionError):
                reader.read(page)
            continue
        points, count = reader.read(page)
        assert count == len(expected)
        assert sorted((bare.name, bare.labels, repr(value))
                      for bare, _, value in points) == expected
    assert 200 < refused < 2800


@pytest.mark.parametrize("settings, names", [
    ({}, "a b c"), ({"include": ["a"]}, "a"), ({"exclude": ["a", "b"]}, "c"),
    ({"include": ["[ab]"], "exclude": ["b"]}, "a"), ({"include": ["{k=1}"]}, "b"),
    ({"exclude": ["*{k=?}"]}, "a c"), ({"exclude": ["*{alias=web*}"]}, ""),
    ({"include": ["*{alias=db*}", "c"]}, "c"), ({"include": ["*{site=s}"], "labels":
                                                 {"site": "s"}}, "a b c"),
    ({"rename": {"a": "z"}, "exclude": ["z"]}, "z b c"),
])
def test_metrics_are_selected_by_name_and_label(settings: Any, names: str) -> None:
    chosen = selector(**settings)
    target = WEB._replace(labels=WEB.labels + tuple(settings.get("labels", {}).items()))
    page, _ = PageReader(chosen).read('a 1\nb{k="1"} 2\nc{k="12"} 3\n')
    assert [series.name for series, _ in chosen.points(target, page)] == names.split()


@pytest.mark.parametrize("settings, sent, said", [
    ({"rename": {"a": "z", "b": "z"}}, "z{} 1|z{i=1} 3|z{i=2} 4", "(of a, b) become z:"),
    ({"rename": {"a": "b"}}, "b{} 1|b{i=1} 3|b{i=2} 4", "(of a, b) become b:"),
    ({"rename": {"a": "z", "b": "z"}, "exclude": ["a", "*{alias=none}"]},
     "z{} 2|z{i=1} 3|z{i=2} 4", ""),
    ({"rename": {"a": "c"}}, "c{} 1|b{} 2|b{i=1} 3|b{i=2} 4", ""),
], ids=str)
def test_of_samples_that_become_one_series_the_first_is_sent(
        settings: Any, sent: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    chosen = selector(**settings)
    reader = PageReader(chosen)
    for _ in range(3):
        page, _ = reader.read('# TYPE a counter\na 1\nb{e=""} 2\nb{i="1"} 3\nb{i="2"} 4\n')
        assert sent == "|".join([
            f"{series.name}{{{','.join(map('='.join, series.labels))}}} {value}"
            for series, value in reader.distinct(WEB, chosen.points(WEB, page))])
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (said != "") and all(said in words for words in told), "once"


@pytest.mark.parametrize("before, now, grown", [
    (5, 8, 3), (5, 5, 0), (2 ** 63, 2 ** 64 - 1, 2 ** 63 - 1), (5, 2, 2), (1.5, 2.0, 0.5),
    (1.5, 10 ** 400, math.inf), (10 ** 400, 1.5, 1.5)])
def test_a_counter_never_shrinks(before: Any, now: Any, grown: Any) -> None:
    assert increase(now, before) == grown


def test_every_sink_type_is_documented() -> None:
    from support import ROOT
    text = (ROOT / "docs" / "FORWARDER.md").read_text("utf-8")
    assert [name for name in SINKS if f"| `{name}`" not in text] == []


