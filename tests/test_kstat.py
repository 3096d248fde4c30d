# SPDX-License-Identifier: MPL-2.0
"""Kstats from C memory: the decoder and the index, on structures that the test builds itself."""
from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
from typing import Any, Callable

import pytest
from nodes import NEIGHBOURS
from support import Kernel, node

import cmon_agent as agent
from cmon_agent import Handle, KstatError, LibraryError, Ref

RAW, NAMED, INTR, IO, TIMER = range(5)
CHAR, INT32, UINT32, INT64, UINT64, FLOAT, DOUBLE, STRING = 0, 1, 2, 3, 4, 5, 6, 9
POISON = b"\xdb"


# --- a library in memory: <sys/kstat.h> in LP64, written down here once more, by hand -------------

class Memory:
    """What kstat_open and kstat_read of a real library would leave in memory."""

    def __init__(self) -> None:
        self.keep: list[Any] = []
        self.reads: list[int] = []
        self.errno = 0
        self.pending: dict[int, tuple[int, int, int, int]] = {}
        self.updated = 0
        self.headers: list[int] = []

    def block(self, content: bytes) -> int:
        """Bytes at a stable address."""
        buffer = ctypes.create_string_buffer(content, max(len(content), 1))
        self.keep.append(buffer)
        return ctypes.addressof(buffer)

    def header(self, module: str, instance: int, name: str | bytes, kind: int = NAMED,
               data: bytes = b"", count: int = 0, klass: str = "misc", crtime: int = 5,
               following: int = 0, size: int | None = None, base: int | None = None) -> int:
        """A kstat_t of 184 bytes; its data appear when it is read."""
        raw = name if isinstance(name, bytes) else name.encode()
        at = self.block(struct.pack("<qQi31sBi31sB31sBQIxxxxQqQQQQ", crtime, following,
                                    len(self.headers) + 1, module.encode(), 0, instance, raw,
                                    kind, klass.encode(), 0, 0, 0, 0, 0, 1, 2, 3, 4))
        self.pending[at] = (self.block(data) if base is None else base, count,
                            len(data) if size is None else size, 77)
        self.headers.append(at)
        return at

    def link(self) -> int:
        """The headers as a chain; its first address."""
        for at, following in zip(self.headers, [*self.headers[1:], 0]):
            ctypes.memmove(at + 8, struct.pack("<Q", following), 8)
        return self.headers[0] if self.headers else 0

    # the library's functions

    def open(self) -> Any:
        control = agent._KstatCtl(1, self.link() or None, -1)
        self.keep.append(control)
        return ctypes.pointer(control)

    def close(self, _control: Any) -> int:
        return 0

    def update(self, control: Any) -> int:
        control.contents.kc_chain = self.link() or None
        return self.updated

    def read(self, _control: Any, address: int, _buffer: Any) -> int:
        self.reads.append(address)
        if self.errno:
            ctypes.set_errno(self.errno)
            return -1
        ctypes.memmove(address + 120, struct.pack("<QIxxxxQq", *self.pending[address]), 32)
        return 1


def member(name: str | bytes, kind: int, value: bytes) -> bytes:
    """A kstat_named_t of 48 bytes."""
    raw = name if isinstance(name, bytes) else name.encode()
    return struct.pack("<31sB16s", raw, kind, value)


def read(data: bytes, count: int | None = None, kind: int = NAMED, name: str = "k",
         **more: Any) -> Any:
    """The agent's decoded form of a kstat with this data."""
    memory = Memory()
    memory.header("zones", 1, name, kind, data, len(data) // 48 if count is None else count, **more)
    handle = Handle(memory)         # type: ignore[arg-type]
    [ref] = [ref for refs in (*handle.index.zones.values(), *handle.index.modules.values())
             for ref in refs]
    return handle.read(ref)


def q(value: int) -> bytes:
    """64 bits."""
    return struct.pack("<Q", value % 2 ** 64)


# --- the decoder ----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, value, expected", [
    (UINT64, q(2 ** 64 - 1), 2 ** 64 - 1), (UINT64, q(2 ** 53 + 1), 2 ** 53 + 1), (UINT64, q(0), 0),
    (INT64, q(-1), -1), (INT64, q(-2 ** 63), -2 ** 63), (INT64, q(2 ** 63 - 1), 2 ** 63 - 1),
    (UINT32, b"\xff\xff\xff\xff" + POISON * 12, 2 ** 32 - 1), (UINT32, bytes(16), 0),
    (INT32, b"\xff\xff\xff\xff" + POISON * 12, -1),
    (INT32, b"\x00\x00\x00\x80" + POISON * 12, -2 ** 31),
    (INT32, b"\xff\xff\xff\x7f" + POISON * 12, 2 ** 31 - 1),
    (DOUBLE, struct.pack("<d", 0.1) + POISON * 8, 0.1),
    (FLOAT, struct.pack("<f", 0.25) + POISON * 12, 0.25),
    (CHAR, b"on-line" + bytes(9), "on-line"), (CHAR, b"0123456789abcdef", "0123456789abcdef"),
    (CHAR, bytes(16), ""), (CHAR, b"\xff\xfe" + bytes(14), "\ufffd\ufffd"),
], ids=repr)
def test_members_are_decoded_exactly(kind: int, value: bytes, expected: Any) -> None:
    found = read(member("m", kind, value.ljust(16, b"\0"))).data
    assert found == {"m": expected} and type(found["m"]) is type(expected)


def test_members_of_unknown_types_are_left_out() -> None:
    assert read(b"".join(member(f"m{kind}", kind, q(1)) for kind in (4, 7, 8, 10, 200))).data \
        == {"m4": 1}


def test_names_without_nul_or_with_invalid_text() -> None:
    found = read(member("n" * 31, UINT64, q(1)) + member(b"caf\xe9", UINT64, q(2))
                 + member("snow☃", UINT64, q(3)) + member(b"a\0junk", UINT64, q(4))).data
    assert found == {"n" * 31: 1, "caf\ufffd": 2, "snow☃": 3, "a": 4}


def strings(*places: tuple[int, int], tail: bytes) -> Any:
    """A kstat of STRING members: (offset from the block's begin, length), behind them `tail`."""
    size = 48 * len(places) + len(tail)
    block = ctypes.create_string_buffer(size)
    base = ctypes.addressof(block)
    raw = b"".join(member(f"s{index}", STRING, struct.pack(
        "<QI", 0 if offset == 0 else base + offset, length) + POISON * 4)
        for index, (offset, length) in enumerate(places)) + tail
    ctypes.memmove(base, raw, size)
    found = read(raw, len(places), base=base, size=size).data
    del block
    return found


def test_strings_are_read_only_from_the_kstats_own_data() -> None:
    tail = b"first\0second\0\xff\0"
    found = strings((4 * 48, 6), (4 * 48 + 6, 7), (4 * 48 + 13, 2), (0, 0), tail=tail)
    assert found == {"s0": "first", "s1": "second", "s2": "\ufffd"}, "a NULL pointer is no member"


@pytest.mark.parametrize("offset, length", [
    (-16, 4), (8, 4), (47, 4), (48 + 8, 9), (48 + 200, 1), (2 ** 40, 4), (48, 2 ** 32 - 1),
], ids=["before the block", "within the members", "a byte before the strings",
        "over the end by one", "behind the end", "far away", "4 GB long"])
def test_a_string_pointing_outside_the_data_is_ignored(offset: int, length: int) -> None:
    assert strings((offset, length), tail=b"12345678\0"[:8]) == {}
    assert strings((48, 8), tail=b"12345678") == {"s0": "12345678"}, "all of the tail without NUL"


@pytest.mark.parametrize("data, count", [(bytes(47), 1), (bytes(48), 2), (b"", 1),
                                         (bytes(96), 2 ** 32 - 1)])
def test_members_that_do_not_fit_cost_the_kstat(data: bytes, count: int) -> None:
    with pytest.raises(KstatError, match="do not fit|invalid data size"):
        read(data, count)


def test_io_is_decoded_with_its_mixed_widths() -> None:
    raw = struct.pack("<QQIIqqqqqqII", 2 ** 64 - 1, 2, 2 ** 32 - 1, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    assert len(raw) == 80
    assert read(raw, 1, IO).data == dict(
        nread=2 ** 64 - 1, nwritten=2, reads=2 ** 32 - 1, writes=4, wtime=5, wlentime=6,
        wlastupdate=7, rtime=8, rlentime=9, rlastupdate=10, wcnt=11, rcnt=12)
    with pytest.raises(KstatError, match="type 3"):
        read(raw[:79], 1, IO)


def test_vminfo_is_the_only_raw_kstat_that_is_read() -> None:
    raw = struct.pack("<6Q", *range(2 ** 63, 2 ** 63 + 6))
    assert read(raw, 1, RAW, "vminfo").data == dict(zip((
        "freemem", "swap_resv", "swap_alloc", "swap_avail", "swap_free", "updates"),
        range(2 ** 63, 2 ** 63 + 6)))
    with pytest.raises(KstatError, match="type 0"):
        read(raw[:40], 1, RAW, "vminfo")
    for kind in (RAW, INTR, TIMER):
        with pytest.raises(KstatError, match=f"type {kind}"):
            read(raw, 1, kind)


def test_a_kstat_with_no_or_absurd_data_is_refused() -> None:
    for more in ({"base": 0}, {"size": 2 ** 40}, {"size": 2 ** 63}):
        with pytest.raises(KstatError, match="invalid data size"):
            read(member("m", UINT64, q(1)), **more)


def test_decoded_kstats_keep_no_pointer_to_c_memory() -> None:
    memory = Memory()
    at = memory.header("zones", 1, "z", NAMED, member("m", UINT64, q(9)) +
                       member("c", CHAR, b"abc".ljust(16, b"\0")), 2)
    handle = Handle(memory)         # type: ignore[arg-type]
    kstat = handle.read(handle.index.zones[1][0])
    for buffer in memory.keep:
        if isinstance(buffer, ctypes.Array):
            ctypes.memset(buffer, 0xdb, len(buffer))
    assert memory.reads == [at] and kstat.snaptime == 77 and kstat.ref.crtime == 5
    assert kstat.data == {"m": 9, "c": "abc"} and kstat.ref.name == "z"


@pytest.mark.parametrize("number", [errno.ENXIO, errno.EIO, errno.ENOENT, errno.EAGAIN, 12345])
def test_a_failed_read_says_which_kstat_and_why(number: int) -> None:
    memory = Memory()
    memory.header("zones", 7, "z", NAMED)
    handle = Handle(memory)         # type: ignore[arg-type]
    memory.errno = number
    with pytest.raises(KstatError) as caught:
        handle.read(handle.index.zones[7][0])
    assert str(caught.value) == f"zones:7:z: {os.strerror(number).lower()}"
    assert caught.value.vanished == (number == errno.ENXIO)


def test_failures_of_open_and_update_are_reported() -> None:
    class Broken(Memory):
        def open(self) -> Any:
            ctypes.set_errno(errno.EACCES)
            return None
    with pytest.raises(KstatError, match="^kstat_open: permission denied$"):
        Handle(Broken())            # type: ignore[arg-type]
    memory = Memory()
    handle = Handle(memory)         # type: ignore[arg-type]
    memory.updated = -1
    ctypes.set_errno(errno.EIO)
    with pytest.raises(KstatError, match="^kstat_chain_update: "):
        handle.update()


# --- the layout -----------------------------------------------------------------------------------

class KstatT(ctypes.Structure):
    """kstat_t of <sys/kstat.h>, laid out as C does."""
    _fields_ = [
        ("ks_crtime", ctypes.c_longlong), ("ks_next", ctypes.c_void_p), ("ks_kid", ctypes.c_int),
        ("ks_module", ctypes.c_char * 31), ("ks_resv", ctypes.c_ubyte),
        ("ks_instance", ctypes.c_int), ("ks_name", ctypes.c_char * 31),
        ("ks_type", ctypes.c_ubyte), ("ks_class", ctypes.c_char * 31),
        ("ks_flags", ctypes.c_ubyte), ("ks_data", ctypes.c_void_p), ("ks_ndata", ctypes.c_uint),
        ("ks_data_size", ctypes.c_size_t), ("ks_snaptime", ctypes.c_longlong),
        ("ks_update", ctypes.c_void_p), ("ks_private", ctypes.c_void_p),
        ("ks_snapshot", ctypes.c_void_p), ("ks_lock", ctypes.c_void_p)]


def test_the_layout_is_that_of_the_header_file() -> None:
    offsets = [getattr(KstatT, name).offset for name, _ in KstatT._fields_]
    codes = re.findall("[0-9]*[a-z]", agent.HEADER.format, re.IGNORECASE)
    assert [struct.calcsize("=" + "".join(codes[:place])) for place in range(len(codes) + 1)] \
        == offsets[:len(codes) + 1]
    assert agent.DATA_OFFSET == KstatT.ks_data.offset == agent.HEADER.size
    kstat = KstatT(ks_data=1, ks_ndata=2, ks_data_size=3, ks_snaptime=4)
    assert agent.DATA.unpack_from(bytes(kstat), agent.DATA_OFFSET) == (1, 2, 3, 4)
    assert ctypes.sizeof(KstatT) == 184


def test_a_32_bit_python_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ctypes.sizeof
    monkeypatch.setattr(ctypes, "sizeof", lambda kind: 4 if kind is ctypes.c_void_p else real(kind))
    with pytest.raises(LibraryError) as caught:
        agent.Libkstat("libkstat.so.1")
    assert str(caught.value) == ("this Python is 32-bit, and the kernel truncates counters for it: "
                                 "use a 64-bit Python")


@pytest.mark.parametrize("path", ["libkstat.so.1", "/nonexistent/libkstat.so", "libc.so.6"])
def test_what_is_not_libkstat_is_refused_with_a_hint_at_replay(path: str) -> None:
    with pytest.raises(LibraryError) as caught:
        agent.Libkstat(path)
    assert path in str(caught.value) and "--replay FILE" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the index ------------------------------------------------------------------------------------

def index_of(*headers: tuple[Any, ...]) -> agent.Index:
    """The index of a chain of (module, instance, name[, class])."""
    memory = Memory()
    for module, instance, name, *klass in headers:
        memory.header(module, instance, name, klass=klass[0] if klass else "misc")
    handle = Handle(memory)         # type: ignore[arg-type]
    assert handle.index.count == len(headers)
    return handle.index


def names(refs: list[Ref]) -> list[str]:
    return [str(ref) for ref in refs]


def test_links_of_a_zone_are_found_by_name() -> None:
    index = index_of(("link", 0, "z7_net0"), ("link", 0, "z7_net1"), ("link", 0, "z70_net0"),
                     ("link", 0, "net0"), ("link", 0, "ixgbe0"), ("link", 0, "z_net0"),
                     ("link", 0, "zx7_net0"), ("link", 0, "z7_"), ("link", 0, "external0"))
    assert names(index.zones[7]) == ["link:0:z7_net0", "link:0:z7_net1"]
    assert names(index.zones[70]) == ["link:0:z70_net0"]
    assert sorted(names(index.modules["link"])) == [
        "link:0:external0", "link:0:ixgbe0", "link:0:net0", "link:0:z7_", "link:0:z_net0",
        "link:0:zx7_net0"]
    assert set(index.zones) == {7, 70}


def test_duplicate_kstats_are_all_indexed() -> None:
    """The global zone sees tcp:0:tcp of each stack; a triple is no key."""
    index = index_of(("tcp", 3, "tcp", "mib2"), ("tcp", 3, "tcp", "mib2"), ("cpu", 0, "sys"),
                     ("cpu", 0, "sys"))
    assert len(index.zones[3]) == 2 and len(index.modules["cpu"]) == 2
    assert {ref.tables for ref in index.modules["cpu"]} == {(agent.CPU_UTIL,)}


def test_a_kstat_of_two_tables_is_read_once_for_both() -> None:
    [ref] = index_of(("unix", 0, "system_misc")).modules["unix"]
    assert set(ref.tables) == {agent.NODE_LOAD, agent.PROC}


def test_the_index_keeps_nothing_that_no_table_wants() -> None:
    index = index_of(*NEIGHBOURS, ("unix", 0, "system_misc"), ("cpu", 1, "sys"))
    assert names([*index.modules["unix"], *index.modules["cpu"]]) == [
        "unix:0:system_misc", "cpu:1:sys"]
    assert set(index.modules) == {"unix", "cpu"} and not index.zones


def test_a_new_module_needs_only_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = agent.Table("fresh", "newmod", "stat*", (
        agent.gauge("fresh_things", "things", agent.COUNT, "Things."),), zone=agent.by_instance)
    monkeypatch.setattr(agent, "WANTED", agent.wanted_of((*agent.TABLES, fresh)))
    index = index_of(("newmod", 4, "stat7"), ("newmod", 4, "other"))
    assert names(index.zones[4]) == ["newmod:4:stat7"] and index.zones[4][0].tables == (fresh,)


def part(table: agent.Table, *kstats: agent.Kstat) -> agent.Part:
    return agent.kstat_part(agent.Reading(list(kstats), []), table)


def test_moved_members_are_found_again() -> None:
    """Members are located at the first read, and when size or count changes."""
    memory = Memory()
    rss = member("rss", UINT64, q(11))
    at = memory.header("memory_cap", 3, "z", NAMED, rss, 1)
    handle = Handle(memory)         # type: ignore[arg-type]
    [ref] = handle.index.zones[3]

    def shown() -> str:
        return part(agent.MEMCAP, handle.read(ref)).text().splitlines()[-1]
    assert shown() == "mem_agg_usage 11"
    moved = member("swap", UINT32, q(7)) + member("rss", UINT64, q(12))
    memory.pending[at] = (memory.block(moved), 2, len(moved), 77)
    assert shown() == "mem_swap 7"
    assert "mem_agg_usage 12\n" in part(agent.MEMCAP, handle.read(ref)).text()


def test_a_member_that_comes_twice_moves_no_other_value() -> None:
    memory = Memory()
    for link, names in enumerate((("rbytes64", "ipackets64", "", "ipackets64", "oerrors"),
                                  ("ipackets64", "oerrors"))):
        data = b"".join([member(name, UINT64, q(10 * link + number))
                         for number, name in enumerate(names)])
        memory.header("link", 0, f"net{link}", NAMED, data, len(names))
    handle = Handle(memory)         # type: ignore[arg-type]
    text = part(agent.NODE_LINK, *map(handle.read, handle.index.modules["link"])).text()
    assert [line for line in text.splitlines() if line[0] != "#"] == [
        'link_bytes_in_total{link="net0"} 0',
        'link_packets_in_total{link="net0"} 3', 'link_packets_in_total{link="net1"} 10',
        'link_errors_out_total{link="net0"} 4', 'link_errors_out_total{link="net1"} 11']


@pytest.mark.parametrize("kind, value, shown", [
    (UINT64, q(2 ** 64 - 1), "18446744073709551615"), (INT64, q(-1), "-1"),
    (UINT32, b"\xff\xff\xff\xff" + POISON * 12, "4294967295"),
    (INT32, b"\xff\xff\xff\xff" + POISON * 12, "-1"),
    (DOUBLE, struct.pack("<d", 0.1) + POISON * 8, "0.1"),
    (DOUBLE, struct.pack("<d", float("nan")) + POISON * 8, "NaN"),
    (FLOAT, struct.pack("<f", float("inf")) + POISON * 12, "+Inf"),
    (CHAR, b"12".ljust(16, b"\0"), None), (STRING, bytes(16), None), (200, q(1), None)],
    ids=repr)
def test_numbers_are_exact_on_the_page(kind: int, value: bytes, shown: str | None) -> None:
    memory = Memory()
    data = member("rss", kind, value.ljust(16, b"\0"))
    memory.header("memory_cap", 3, "z", NAMED, data, 1)
    handle = Handle(memory)         # type: ignore[arg-type]
    text = part(agent.MEMCAP, handle.read(handle.index.zones[3][0])).text()
    assert text.splitlines()[2:] == ([] if shown is None else [f"mem_agg_usage {shown}"])


def test_io_and_vminfo_are_taken_from_their_structures() -> None:
    memory = Memory()
    raw = struct.pack("<QQIIqqqqqqII", 2 ** 64 - 1, 2, 2 ** 32 - 1, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    memory.header("sd", 1, "sd1", IO, raw, 1, klass="disk")
    handle = Handle(memory)         # type: ignore[arg-type]
    kstat = handle.read(handle.index.modules["disk"][0])
    shown = {line.split("{")[0]: line.split(" ")[1] for line in part(
        agent.DISK, kstat).text().splitlines() if not line.startswith("#")}
    assert shown["disk_read_bytes_total"] == str(2 ** 64 - 1)
    assert shown["disk_reads_total"] == str(2 ** 32 - 1) and shown["disk_writes_total"] == "4"
    assert shown["disk_busy_seconds_total"] == "8e-09"
    assert shown["disk_running_operations"] == "12"


@pytest.mark.parametrize("table, module, name", [
    (agent.ARCSTATS, "zfs", "arcstats"), (agent.MEMORY, "unix", "system_pages"),
    (agent.SWAP, "unix", "vminfo")], ids=["as read", "in pages", "since the last"])
def test_a_kstat_of_another_type_is_a_failure_and_not_empty(table: agent.Table, module: str,
                                                            name: str) -> None:
    memory = Memory()
    memory.header(module, 0, name, IO, bytes(agent.IO_DATA.size), 1)
    handle = Handle(memory)         # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(agent.CollectError, match=f"{module}:0:{name}: has the wrong type 3"):
            part(table, handle.read(handle.index.modules[module][0]))


def test_only_caps_of_zones_belong_to_zones() -> None:
    index = index_of(("caps", 5, "cpucaps_zone_5"), ("caps", 5, "nprocs_zone_5"),
                     ("caps", 5, "cpucaps_project_5"), ("tcp", 5, "tcpstat"))
    assert names(index.zones[5]) == ["caps:5:cpucaps_zone_5", "caps:5:nprocs_zone_5"]


def test_disks_are_recognised_by_class() -> None:
    index = index_of(("sd", 0, "sd0", "disk"), ("blkdev", 1, "blkdev1", "disk"),
                     ("vmem", 1, "x"), ("zfs", 0, "arcstats"))
    assert names(index.modules["disk"]) == ["disk:0:sd0", "disk:1:blkdev1"]
    assert set(index.modules) == {"disk", "zfs"} and not index.zones


def test_names_of_30_invalid_characters_are_survived() -> None:
    index = index_of(("zones", 4, b"\xff" * 30), ("zones", 5, "a" * 30))
    assert names(index.zones[4]) == ["zones:4:" + "\ufffd" * 30]


# --- from a zone's name to its kstats, with the library as C code ---------------------------------

class Reading:
    """A `Reader` without a thread, so that a test may step through it."""

    def __init__(self, kernel: Kernel) -> None:
        library = agent.Libkstat(str(kernel.library))
        self.kstats = agent.KstatThreads(lambda: Handle(library), agent.Loop(), self.now)
        self.at = 100.0
        self.reader = agent.Reader(self.kstats)
        self.reader._handle = self.kstats.open_handle()

    def now(self) -> float:
        """Ten minutes pass at each call, so that no pause applies."""
        return self.at

    def zone(self, name: str) -> Any:
        """The kstats of a zone by module and name."""
        self.at += 60.0
        reading = agent.read_zone(self.reader, name)
        return {f"{kstat.ref.module}:{kstat.ref.name}": kstat for kstat in reading.kstats}


TWIN_A = "0a1b2c3d-0000-4000-8000-00aa11223344"
TWIN_B = "0a1b2c3d-0000-4000-8000-00aa11223399"
MakeKernel = Callable[..., Kernel]


def zone(zone_id: int, name: str, crtime: int = 5, **values: int) -> list[dict[str, Any]]:
    """The kstats of a small zone as a capture has them."""
    common = {"class": "zone_misc", "type": 1, "crtime": crtime, "snaptime": 0}
    return [
        {**common, "module": "zones", "instance": zone_id, "name": name[:30],
         "data": {"zonename": name, "nsec_user": values.get("user", zone_id)}},
        {**common, "module": "memory_cap", "instance": zone_id, "name": name[:30],
         "class": "zone_memory_cap",
         "data": {"zonename": name, "rss": values.get("rss", zone_id * 1000)}},
        {**common, "module": "link", "instance": 0, "name": f"z{zone_id}_net0", "class": "net",
         "data": {"rbytes64": values.get("bytes", zone_id * 10), "zonename": name}}]


def test_uuids_with_the_same_30_characters_are_distinguished(kernel: MakeKernel) -> None:
    assert TWIN_A[:30] == TWIN_B[:30]
    reading = Reading(kernel([*zone(3, TWIN_A), *zone(9, TWIN_B)]))
    assert reading.zone(TWIN_A)[f"memory_cap:{TWIN_A[:30]}"].data["rss"] == 3000
    assert reading.zone(TWIN_B)[f"memory_cap:{TWIN_B[:30]}"].data["rss"] == 9000
    with pytest.raises(agent.NoSuchZone):
        reading.zone(TWIN_A[:-2] + "00")


def test_a_reused_zone_id_is_not_confused(kernel: MakeKernel) -> None:
    other = "ffffffff-0000-4000-8000-00aa11223344"
    kern = kernel(zone(3, TWIN_A, crtime=5))
    reading = Reading(kern)
    assert reading.zone(TWIN_A)
    kern.write(zone(3, other, crtime=6, rss=42))
    with pytest.raises(agent.NoSuchZone):
        reading.zone(TWIN_A)
    assert reading.zone(other)[f"memory_cap:{other[:30]}"].data["rss"] == 42


def test_a_zone_with_the_id_of_its_twin_is_not_confused(kernel: MakeKernel) -> None:
    """The cut names are equal: only creation time and full name distinguish them."""
    kern = kernel(zone(3, TWIN_A, crtime=5))
    reading = Reading(kern)
    assert reading.zone(TWIN_A)
    kern.write(zone(3, TWIN_B, crtime=6, rss=42))
    assert reading.zone(TWIN_B)[f"memory_cap:{TWIN_B[:30]}"].data["rss"] == 42
    with pytest.raises(agent.NoSuchZone):
        reading.zone(TWIN_A)


def test_the_recorded_node_comes_through_c_as_it_is(kernel: MakeKernel) -> None:
    kstats = node()["frames"][0]["kstats"]
    kern = kernel(kstats)
    handle = Handle(agent.Libkstat(str(kern.library)))
    refs = [ref for refs in (*handle.index.modules.values(), *handle.index.zones.values())
            for ref in refs]
    wanted = {(k["module"], k["instance"], k["name"], k["crtime"]):
              {name: value for name, value in k["data"].items() if value is not None}
              for k in kstats}
    for ref in refs:
        module = {"disk": None}.get(ref.module, ref.module)
        key = next(key for key in wanted if key[1:] == (ref.instance, ref.name, ref.crtime)
                   and module in (None, key[0]))
        assert handle.read(ref).data == wanted[key], key
    assert len(refs) > 250 and kern["stale"] == kern["overlaps"] == 0
