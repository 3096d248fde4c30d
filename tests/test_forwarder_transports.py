# SPDX-License-Identifier: MPL-2.0
"""How the forwarder delivers to each kind of sink: heads, framing, what counts as accepted."""
from __future__ import annotations

import dataclasses
import json
import os
import select
import socket
import ssl
import struct
import threading
import zlib
from pathlib import Path
from typing import Any, Callable

import pytest
from agents import TLS
from forwarding import HttpSink, LineSink, UdpSink, read_request
from support import wait_until
from test_forwarder_encoders import GAUGE, UUID, scrape, unsnappy

from cmon_agent import Client, ConfigError
from cmon_forwarder import (
    Delivery, RetryLater, Rejected, SinkSettings, TooLarge, encode, transport_of, with_defaults)

Keep = Callable[[Any], Any]


def sink(type: str, **more: Any) -> SinkSettings:
    return with_defaults(SinkSettings(type=type, **more))


# --- HTTP -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, path, headers", [
    ({"type": "influxdb", "database": "d", "token": "u:p"}, "/write?db=d&precision=ns",
     {"authorization": "Token u:p", "content-encoding": "gzip"}),
    ({"type": "influxdb", "org": "o", "bucket": "b", "token": "t", "gzip": False},
     "/api/v2/write?org=o&bucket=b&precision=ns", {"authorization": "Token t"}),
    ({"type": "http", "token": "t", "headers": {"X-Scope": "a"}}, "/",
     {"authorization": "Bearer t", "x-scope": "a", "content-type": "application/x-ndjson"}),
    ({"type": "http", "gzip": True}, "/", {"content-encoding": "gzip"}),
    ({"type": "http", "form": "splunk", "token": "t"}, "/services/collector",
     {"authorization": "Splunk t"}),
    ({"type": "http", "form": "elasticsearch", "token": "t"}, "/_bulk",
     {"authorization": "ApiKey t"}),
    ({"type": "remote_write", "headers": {"X-Scope-OrgID": "1"}}, "/api/v1/write",
     {"content-type": "application/x-protobuf", "content-encoding": "snappy",
      "x-prometheus-remote-write-version": "0.1.0", "x-scope-orgid": "1"}),
])
def test_requests_have_the_headers_of_each_sink(keep: Keep, settings: Any, path: str,
                                                headers: dict[str, str]) -> None:
    server = keep(HttpSink())
    where = sink(url=f"http://{server.text}", **settings)
    records = encode(where, scrape((GAUGE, 1)))
    transport = keep(transport_of(where))
    if where.form == "elasticsearch":
        with pytest.raises(RetryLater):         # 204 is no answer of Elasticsearch
            transport.send(records)
    else:
        transport.send(records)
    seen_path, seen, body = server.seen[0]
    assert seen_path == path and headers.items() <= seen.items()
    assert ("content-encoding" in seen) == ("content-encoding" in headers)
    if where.type == "remote_write":
        assert unsnappy(body) == b"".join(records)
    else:
        assert body == b"".join(record + b"\n" for record in records)
    assert seen["user-agent"].startswith("cmon-forwarder/")


def test_the_token_is_read_again_for_each_request(keep: Keep, tmp_path: Path) -> None:
    server = keep(HttpSink())
    token = tmp_path / "token"
    transport = keep(transport_of(sink("http", url=f"http://{server.text}", token_file=token)))
    with pytest.raises(RetryLater, match="no such file"):
        transport.send([b"x"])
    for word in ("one", "two"):
        token.write_text(word + "\n")
        transport.send([b"x"])
    assert [headers["authorization"] for _, headers, _ in server.seen] == ["Bearer one",
                                                                           "Bearer two"]
    token.unlink()
    os.mkfifo(token)
    with pytest.raises(RetryLater, match="is a pipe: use a regular file"):
        transport.send([b"x"])
    token.unlink()
    token.write_text("wört\u2028")
    with pytest.raises(RetryLater):
        transport.send([b"x"])


@pytest.mark.parametrize("answer, error", [
    (200, None), (204, None), (299, None), (400, Rejected), (401, Rejected), (404, Rejected),
    (422, Rejected), (413, TooLarge), (408, RetryLater), (429, RetryLater), (500, RetryLater),
    (503, RetryLater), (302, RetryLater), ("cut", RetryLater)], ids=str)
def test_the_status_decides(keep: Keep, answer: Any, error: Any) -> None:
    server = keep(HttpSink())
    server.default = answer
    transport = keep(transport_of(sink("http", url=f"http://{server.text}")))
    if error is None:
        transport.send([b"x"])
    else:
        with pytest.raises(error):
            transport.send([b"x"])


def test_closing_idle_connections_is_not_a_failure(keep: Keep) -> None:
    class Brief(HttpSink):
        def serve(self, accepted: socket.socket) -> None:
            self.seen.append(("", {}, read_request(accepted.makefile("rb"))[3]))
            accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            accepted.close()
            ended.set()
    ended = threading.Event()
    server = keep(Brief())
    transport = keep(transport_of(sink("http", url=f"http://{server.text}")))
    for body in (b"1", b"2", b"3"):
        transport.send([body])
        ended.wait(10)
        ended.clear()
    assert [body for _, _, body in server.seen] == [b"1\n", b"2\n", b"3\n"]


def test_a_silent_sink_times_out(keep: Keep) -> None:
    server = keep(HttpSink())
    server.default = "hang"
    transport = keep(transport_of(sink("http", url=f"http://{server.text}", timeout=0.2)))
    with pytest.raises(RetryLater, match="timed out"):
        transport.send([b"x"])


def test_documents_of_elasticsearch_are_judged_one_by_one(keep: Keep, tmp_path: Path) -> None:
    """Refused documents are set aside, throttled ones sent again."""
    answers = [
        {"errors": True, "items": [{"create": {"status": 201}}, {"create": {"status": 400,
                                   "error": {"type": "mapper"}}}, {"create": {"status": 429}}]},
        {"errors": True, "items": [{"create": {"status": 503}}]},
        {"errors": False, "items": [{"create": {"status": 201}}]}]
    requests: list[int] = []

    class Elastic(HttpSink):
        def serve(self, accepted: socket.socket) -> None:
            reader = accepted.makefile("rb")
            for request in iter(lambda: read_request(reader), None):
                requests.append(request[3].count(b"\n"))
                body = json.dumps(answers[len(requests) - 1]).encode()
                accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (
                    len(body), body))
    server = keep(Elastic())
    delivery = Delivery("e", SinkSettings(type="http", form="elasticsearch", batch_age=0,
                                          url=f"http://{server.text}"), tmp_path, 1 << 20)
    delivery.give(scrape((GAUGE, 1), (GAUGE, 2), (GAUGE, 3)))
    delivery.start()
    wait_until(lambda: delivery.spool.state()[0] == 0)
    delivery.stop()
    delivery.join(10)
    assert requests == [6, 2, 2]
    assert (delivery.sent, delivery.refused) == (2, 1)
    reason, = (tmp_path / "e" / "refused").glob("*.reason")
    assert "400" in reason.read_text() and "mapper" in reason.read_text()


def test_a_large_answer_blocks_nothing(keep: Keep, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """As Elasticsearch answers when it refuses each document of a batch."""
    server = keep(HttpSink())
    server.default, server.said = 200, lambda body: body * 30
    delivery = Delivery("h", SinkSettings(type="http", batch_age=0, url=f"http://{server.text}"),
                        tmp_path, 1 << 20)
    records = encode(delivery.sink, scrape(*[(GAUGE, number) for number in range(40)]))
    most = 16 * sum(map(len, records))
    monkeypatch.setattr(delivery._transport, "_client", Client(max_body=most))
    delivery.give(scrape(*[(GAUGE, number) for number in range(40)]))
    delivery.start()
    wait_until(lambda: delivery.spool.state()[0] == 0)
    delivery.stop()
    delivery.join(10)
    assert (delivery.sent, delivery.refused, delivery.failures) == (40, 0, 0)


# --- streams --------------------------------------------------------------------------------------

def test_streams_are_framed(keep: Keep) -> None:
    server = keep(LineSink())
    one = scrape((GAUGE, 1), (GAUGE, 2))
    for type, more in (("graphite", {}), ("syslog", {"transport": "tcp"}),
                       ("gelf", {"transport": "tcp"})):
        where = sink(type, address=server.text, **more)
        keep(transport_of(where)).send(encode(where, one))
    graphite, syslog, gelf = server.received
    assert graphite.count(b"\n") == 2 and graphite.endswith(b"\n")
    messages = []
    while syslog:
        length, _, rest = syslog.partition(b" ")
        messages.append(rest[:int(length)])
        syslog = rest[int(length):]
    assert len(messages) == 2 and all(one.startswith(b"<134>1 ") for one in messages)
    assert [json.loads(one)["_value"] for one in gelf.split(b"\0")[:-1]] == [1, 2]


@pytest.mark.parametrize("mode", ["cut", "slow"])
def test_a_partially_read_stream_is_sent_again(keep: Keep, mode: str) -> None:
    server = keep(LineSink())
    server.mode = mode
    transport = keep(transport_of(sink("graphite", address=server.text, timeout=0.5)))
    with pytest.raises(RetryLater):
        transport.send([b"x" * 1000] * 20_000)


class Ending(LineSink):
    """Closes each connection at its start, or resets it after the first byte."""

    def serve(self, accepted: socket.socket) -> None:
        if self.mode == "reset":
            accepted.recv(1)
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("mode", ["reset", "closed"])
def test_a_sink_that_closes_before_reading_everything_did_not_accept(keep: Keep, mode: str,
                                                                     monkeypatch: pytest.MonkeyPatch
                                                                    ) -> None:
    server = keep(Ending())
    server.mode = mode
    transport = keep(transport_of(sink("graphite", address=server.text)))
    ended = []

    class Connection(socket.socket):
        def sendall(self, content: Any, flags: int = 0) -> None:
            poll = select.poll()
            poll.register(self, select.POLLRDHUP)
            if mode == "reset":             # after the data, before we end our side
                super().sendall(content)
            ended.append(poll.poll(10_000))
            if mode == "closed":
                super().sendall(content)

    def connect(_deadline: float) -> socket.socket:
        connection = Connection()
        connection.connect(server.address)
        return connection
    monkeypatch.setattr(transport, "_connect", connect)
    with pytest.raises(RetryLater, match="connection reset by peer|broken pipe"):
        transport.send([b"x"])
    assert ended[0]


def test_an_incomplete_line_never_looks_complete(keep: Keep) -> None:
    """A failed delivery ends with a reset, which no sink takes for a normal end."""
    ends: list[Any] = []
    go = threading.Event()

    class Late(LineSink):
        def serve(self, accepted: socket.socket) -> None:
            go.wait(10)
            try:
                while accepted.recv(65536):
                    pass
                ends.append("end")
            except ConnectionResetError:
                ends.append("reset")
    server = keep(Late())
    transport = keep(transport_of(sink("graphite", address=server.text, timeout=0.5)))
    with pytest.raises(RetryLater, match="timed out"):
        transport.send([b"x" * 1000] * 20_000)
    go.set()
    wait_until(lambda: ends == ["reset"])


def test_silence_of_a_confirming_sink_is_a_failure(keep: Keep) -> None:
    """The process hangs: bytes that its kernel accepted would be lost."""
    server = keep(LineSink())
    transport = keep(transport_of(sink("graphite", address=server.text)))
    transport.send([b"a"])
    patient, server.mode = transport.sink, "mute"
    transport.sink = dataclasses.replace(patient, timeout=0.2)
    with pytest.raises(RetryLater, match="timed out"):
        transport.send([b"b"])
    transport.sink, server.mode = patient, "all"
    transport.send([b"b"])
    # how much of the second delivery was read does not matter
    assert (server.lines()[0], server.lines()[-1]) == ("a", "b")


def test_an_absent_sink_is_retried_with_all_its_data() -> None:
    for where in (sink("graphite", address="127.0.0.1:1"), sink("statsd", address="127.0.0.1:1"),
                  sink("graphite", address="no.such.host.invalid:1"),
                  sink("statsd", address="no.such.host.invalid:1"),
                  sink("http", url="http://no..such.host"),      # the settings refuse this name
                  sink("statsd", address="no.\u3002such:1")):        # but not this one
        with pytest.raises(RetryLater, match="connection refused|does not resolve|not a host name"
                           ) as caught:
            transport_of(where).send([b"x"])
        assert caught.value.left == [b"x"]


@pytest.fixture()
def tls_sink(keep: Keep) -> Any:
    """Closes each connection, with or without close_notify."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.pem", TLS / "server.key")
    context.load_verify_locations(TLS / "ca.pem")

    class Tls(LineSink):
        def serve(self, accepted: socket.socket) -> None:
            if self.mode == "strict":
                context.verify_mode = ssl.CERT_REQUIRED
            with context.wrap_socket(accepted, server_side=True) as wrapped:
                content = b""
                if self.mode == "chatty":
                    wrapped.sendall(b"welcome")
                for piece in iter(lambda: wrapped.recv(65536), b""):
                    content += piece
                    if self.mode == "reset":
                        wrapped.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                           b"\1\0\0\0\0\0\0\0")
                        return
                if self.mode == "polite":
                    wrapped.unwrap()
                with self.lock:
                    self.received.append(content)
    return keep(Tls())


@pytest.mark.parametrize("mode", ["polite", "rude", "chatty"])
def test_tls_deliveries_are_confirmed_however_the_sink_closes(tls_sink: Any, mode: str) -> None:
    tls_sink.mode = mode
    transport = transport_of(sink("syslog", transport="tls", ca=TLS / "ca.pem",
                                  address=f"localhost:{tls_sink.address[1]}"))
    transport.send([b"hello"])
    wait_until(lambda: tls_sink.received == [b"5 hello"])


def test_reset_or_untrusted_tls_is_retried(tls_sink: Any) -> None:
    tls_sink.mode = "reset"
    trusted = sink("syslog", transport="tls", ca=TLS / "ca.pem", timeout=5,
                   address=f"localhost:{tls_sink.address[1]}")
    with pytest.raises(RetryLater):
        transport_of(trusted).send([b"x" * 100_000] * 300)
    with pytest.raises(RetryLater, match="not trusted"):
        transport_of(sink("syslog", transport="tls", address=trusted.address)).send([b"x"])
    with pytest.raises(ConfigError, match="no.pem"):
        transport_of(sink("syslog", transport="tls", ca=Path("no.pem"), address="x:1"))


def test_a_client_certificate_rejected_after_the_data_is_a_failure(tls_sink: Any) -> None:
    """With TLS 1.3 the client has sent all before the server's alert comes."""
    tls_sink.mode = "strict"
    transport = transport_of(sink("syslog", transport="tls", ca=TLS / "ca.pem",
                                  address=f"localhost:{tls_sink.address[1]}"))
    with pytest.raises(RetryLater, match="certificate required|connection reset|broken pipe|"
                       "eof occurred"):
        transport.send([b"hello"])


def test_a_reload_reads_certificates_again(tls_sink: Any, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes((TLS / "old_ec.pem").read_bytes())
    settings = SinkSettings(type="syslog", transport="tls", ca=ca, batch_age=0,
                            address=f"localhost:{tls_sink.address[1]}")
    delivery = Delivery("s", settings, tmp_path, 1 << 20, random=lambda: 600.0)
    delivery.give(scrape((GAUGE, 1)))
    delivery.start()
    wait_until(lambda: "not trusted" in delivery.problem)
    ca.write_bytes((TLS / "ca.pem").read_bytes())
    delivery.use(settings, 1 << 20)
    wait_until(lambda: delivery.sent == 1)
    delivery.stop()
    delivery.join(10)


# --- datagrams ------------------------------------------------------------------------------------

def test_datagrams_arrive(keep: Keep) -> None:
    server = keep(UdpSink())
    for type, count in (("statsd", 1), ("syslog", 40), ("gelf", 40)):
        server.datagrams.clear()
        where = sink(type, address=server.text)
        records = encode(where, scrape(*[(GAUGE, number) for number in range(40)]))
        transport_of(where).send(records)
        wait_until(lambda: len(server.datagrams) >= count)
        if type == "statsd":
            assert b"\n".join(server.datagrams) == b"\n".join(records)
        elif type == "syslog":
            assert server.datagrams == records
        else:
            assert [zlib.decompress(one) for one in server.datagrams] == records


def test_many_datagrams_are_paced(keep: Keep) -> None:
    """More than a receiver's buffer would hold at once."""
    server = keep(UdpSink())
    records = [b"%06d:1|c" % number + b"x" * 1000 for number in range(1500)]
    transport_of(sink("statsd", address=server.text)).send(records)
    wait_until(lambda: len(server.datagrams) == 1500)
    assert server.datagrams == records


def test_only_a_record_too_large_for_a_datagram_is_set_aside(keep: Keep) -> None:
    server = keep(UdpSink())
    records = [b"a", b"b" * 65_508, b"c" * 65_507, b"d"]
    with pytest.raises(Rejected) as caught:
        transport_of(sink("statsd", address=server.text)).send(records)
    assert (caught.value.records, caught.value.left) == ([records[1]], records[2:])
    transport_of(sink("statsd", address=server.text)).send(caught.value.left)
    wait_until(lambda: len(server.datagrams) == 3)
    assert server.datagrams == [records[0], records[2], records[3]]


def test_a_listener_that_disappears_is_noticed(keep: Keep) -> None:
    server = keep(UdpSink())
    transport = transport_of(sink("syslog", address=server.text))
    transport.send([b"1"])
    server.close()
    wait_until(lambda: _refused(transport))
    server.open()
    transport.send([b"2"])
    wait_until(lambda: b"2" in server.datagrams)


def test_the_next_address_of_a_name_is_tried(keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with localhost, which is also ::1."""
    server = keep(UdpSink())
    dead = keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    dead.bind(("127.0.0.1", 0))
    gone = dead.getsockname()
    dead.close()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [
        (socket.AF_INET, socket.SOCK_DGRAM, 0, "", address) for address in (gone, server.address)])
    transport = transport_of(sink("statsd", address="localhost:1"))
    with pytest.raises(RetryLater):
        transport.send([b"x"])
    transport.send([b"x"])
    wait_until(lambda: server.datagrams == [b"x"])


def _refused(transport: Any) -> bool:
    try:
        transport.send([b"x"] * 50)
    except RetryLater as error:
        return error.left == [b"x"] * 50
    return False


# --- faults of our own ----------------------------------------------------------------------------

def test_a_bug_loses_one_batch_and_not_the_sink(tmp_path: Path, keep: Keep,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    server = keep(HttpSink())
    delivery = Delivery("h", SinkSettings(type="http", url=f"http://{server.text}", batch_age=0),
                        tmp_path, 1 << 20)
    real = delivery._transport.send
    bugs = [RuntimeError("bug")]

    def send(records: Any) -> None:
        if bugs:
            raise bugs.pop()
        real(records)
    monkeypatch.setattr(delivery._transport, "send", send)
    delivery.give(scrape((GAUGE, 1)))
    delivery.start()
    wait_until(lambda: delivery.refused == 1)
    delivery.give(scrape((GAUGE, 2)))
    wait_until(lambda: delivery.sent == 1)
    delivery.stop()
    delivery.join(10)
    assert [row["value"] for row in server.rows()] == [2]
    assert server.rows()[0]["labels"]["instance"] == UUID


def test_a_batch_in_flight_at_the_end_is_delivered_or_kept(tmp_path: Path, keep: Keep) -> None:
    server = keep(HttpSink())
    began, go = threading.Event(), threading.Event()

    def slow(_body: bytes) -> int:
        began.set()
        go.wait(10)
        return 204
    server.default = slow
    settings = SinkSettings(type="http", url=f"http://{server.text}", batch_age=0)
    delivery = Delivery("h", settings, tmp_path, 1 << 20)
    delivery.give(scrape((GAUGE, 1)))
    delivery.start()
    began.wait(10)
    delivery.give(scrape((GAUGE, 2)))
    delivery.stop()
    delivery.join(0.01)
    assert delivery.is_alive
    go.set()
    delivery.join(10)
    assert not delivery.is_alive and delivery.sent == 1
    again = Delivery("h", settings, tmp_path, 1 << 20)
    assert again.spool.state()[0] == 1
    again.start()
    wait_until(lambda: [row["value"] for row in server.rows()] == [1, 2])
    again.stop()
    again.join(10)


def test_halves_of_a_batch_keep_its_order(tmp_path: Path, keep: Keep) -> None:
    server = keep(HttpSink())
    server.default = lambda body: 413 if body.count(b"\n") > 2 else 204
    delivery = Delivery("h", SinkSettings(type="http", url=f"http://{server.text}", batch_age=0),
                        tmp_path, 1 << 20)
    for number in range(30):
        delivery.give(scrape((GAUGE, number)))
    delivery.start()
    wait_until(lambda: delivery.spool.state()[0] == 0)
    delivery.stop()
    delivery.join(10)
    assert [row["value"] for row in server.rows()] == list(range(30))


def test_pauses_grow_and_retry_after_is_obeyed(tmp_path: Path, keep: Keep,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    server = keep(HttpSink())
    server.answers = [500, 500, 500, (429, "Retry-After: 7\r\n"), (503, "Retry-After: x\r\n"),
                      (429, "Retry-After: 0\r\n")]
    delivery = Delivery("h", SinkSettings(type="http", url=f"http://{server.text}", batch_age=0),
                        tmp_path, 1 << 20, random=lambda: 0.5)
    pauses: list[float] = []
    monkeypatch.setattr(delivery._wake, "wait", pauses.append)
    delivery.give(scrape((GAUGE, 1)))
    delivery.start()
    wait_until(lambda: delivery.sent == 1)
    delivery.stop()
    delivery.join(10)
    assert pauses == [1.0, 2.0, 4.0, 7.05, 16.0, 32.0]


def test_settings_that_change_back_keep_the_pauses(tmp_path: Path, keep: Keep,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    server = keep(HttpSink())
    server.answers = [500]
    settings = SinkSettings(type="http", url=f"http://{server.text}", batch_age=0)
    delivery = Delivery("h", settings, tmp_path, 1 << 20)
    woken: list[bool] = []
    monkeypatch.setattr(delivery._wake, "wait",
                        lambda _pause: woken.append(delivery._wake.is_set()))
    delivery.use(dataclasses.replace(settings, timeout=9.0), 1 << 20)
    delivery.use(settings, 1 << 20)
    delivery.give(scrape((GAUGE, 1)))
    delivery.start()
    wait_until(lambda: delivery.sent == 1)
    delivery.stop()
    delivery.join(10)
    assert woken == [False]


def test_a_sink_that_refuses_everything_is_logged_once(tmp_path: Path, keep: Keep,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    server = keep(HttpSink())
    server.default = 413
    delivery = Delivery("h", SinkSettings(type="http", url=f"http://{server.text}", batch_age=0),
                        tmp_path, 1 << 20)
    delivery.give(scrape(*[(GAUGE, number) for number in range(20)]))
    with caplog.at_level("ERROR", "cmon"):
        delivery.start()
        wait_until(lambda: delivery.refused == 20)
        delivery.stop()
        delivery.join(10)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        f"sink h refused samples for good (1, saved in {tmp_path}/h/refused)"]


def test_a_sink_that_refuses_now_and_then_is_logged_once_in_a_while(
        tmp_path: Path, keep: Keep, caplog: pytest.LogCaptureFixture) -> None:
    server, clock = keep(HttpSink()), [0.0]
    delivery = Delivery("h", SinkSettings(type="http", url=f"http://{server.text}", batch_age=0),
                        tmp_path, 1 << 20, now=lambda: clock[0])
    delivery.start()
    for number, (hours, logged) in enumerate(((0.0, 1), (0.9, 1), (1.8, 1), (3.0, 2), (3.0, 2))):
        clock[0] = hours * 3600
        server.answers = [400]
        delivery.give(scrape((GAUGE, 1)))
        wait_until(lambda number=number: delivery.refused == number + 1)  # type: ignore[misc]
        delivery.give(scrape((GAUGE, 2)))
        wait_until(lambda number=number: delivery.sent == number + 1)  # type: ignore[misc]
        assert len(caplog.records) == logged and not delivery.refusal
    delivery.stop()
    delivery.join(10)
