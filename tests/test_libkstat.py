# SPDX-License-Identifier: MPL-2.0
"""The stand-in for libkstat behaves as the real one."""
from __future__ import annotations

import ctypes
import errno
import threading
import time
from typing import Any, Callable

import pytest
from support import Kernel, wait_until


class Kstat(ctypes.Structure):
    """kstat_t, as <sys/kstat.h> has it for 64-bit programs."""


Kstat._fields_ = [
    ("crtime", ctypes.c_longlong), ("next", ctypes.POINTER(Kstat)), ("kid", ctypes.c_int),
    ("module", ctypes.c_char * 31), ("resv", ctypes.c_ubyte), ("instance", ctypes.c_int),
    ("name", ctypes.c_char * 31), ("type", ctypes.c_ubyte), ("class_", ctypes.c_char * 31),
    ("flags", ctypes.c_ubyte), ("data", ctypes.c_void_p), ("ndata", ctypes.c_uint),
    ("data_size", ctypes.c_size_t), ("snaptime", ctypes.c_longlong),
    ("kernel", ctypes.c_void_p * 4)]


class Control(ctypes.Structure):
    """kstat_ctl_t."""
    _fields_ = [("chain_id", ctypes.c_int), ("chain", ctypes.POINTER(Kstat)), ("kd", ctypes.c_int)]


class Handle:
    """The functions of one loaded library and one open handle."""

    def __init__(self, kernel: Kernel) -> None:
        self.library = ctypes.CDLL(str(kernel.library), use_errno=True)
        self.library.kstat_open.restype = ctypes.POINTER(Control)
        for name in ("kstat_close", "kstat_chain_update", "kstat_read", "kstat_lookup"):
            getattr(self.library, name).argtypes = [ctypes.POINTER(Control)] + {
                "kstat_read": [ctypes.POINTER(Kstat), ctypes.c_void_p],
                "kstat_lookup": [ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p]}.get(name, [])
        self.library.kstat_lookup.restype = ctypes.POINTER(Kstat)
        self.control = self.library.kstat_open()

    def chain(self) -> list[Any]:
        """All headers."""
        found, at = [], self.control.contents.chain
        while at:       # a pointer field is a view of its structure: take the address out of it
            found.append(ctypes.pointer(Kstat.from_address(ctypes.addressof(at.contents))))
            at = at.contents.next
        return found

    def names(self) -> list[str]:
        """module:instance:name of all headers."""
        return [f"{k.contents.module.decode()}:{k.contents.instance}:{k.contents.name.decode()}"
                for k in self.chain()]

    def find(self, module: str, instance: int, name: str) -> Any:
        """By kstat_lookup."""
        return self.library.kstat_lookup(self.control, module.encode(), instance, name.encode())

    def update(self) -> int:
        """kstat_chain_update."""
        result: int = self.library.kstat_chain_update(self.control)
        return result

    def read(self, kstat: Any) -> int | None:
        """None, or the errno of a failed kstat_read."""
        ctypes.set_errno(0)
        failed = self.library.kstat_read(self.control, kstat, None) == -1
        return ctypes.get_errno() if failed else None

    def members(self, kstat: Any) -> dict[str, Any]:
        """The decoded members of a NAMED kstat that was read."""
        found: dict[str, Any] = {}
        header = kstat.contents
        block = ctypes.string_at(header.data, header.data_size)
        for index in range(header.ndata):
            entry = block[index * 48:index * 48 + 48]
            name, kind, value = entry[:31].rstrip(b"\0").decode(), entry[31], entry[32:]
            if kind == 9:
                at = int.from_bytes(value[:8], "little")
                length = int.from_bytes(value[8:12], "little")
                start = at - header.data
                assert at == 0 or header.ndata * 48 <= start <= header.data_size - length
                found[name] = block[start:start + length - 1].decode() if at else None
            elif kind == 0:
                found[name] = value.rstrip(b"\0").decode()
            else:
                width = {1: 4, 2: 4, 3: 8, 4: 8}[kind]
                found[name] = int.from_bytes(value[:width], "little", signed=kind in (1, 3))
        return found


def kstat(module: str, instance: int, name: str, **members: Any) -> dict[str, Any]:
    """One kstat as a capture has it."""
    return {"module": module, "instance": instance, "name": name, "class": "misc", "type": 1,
            "crtime": 5, "snaptime": 0, "data": members}


A, B, C = kstat("a", 1, "a", x=1), kstat("b", 2, "b", x=2), kstat("c", 3, "c", x=3)
Make = Callable[..., Kernel]


def test_sizes_and_offsets_are_those_of_the_real_header() -> None:
    assert ctypes.sizeof(Control) == 24 and Control.chain.offset == 8 and Control.kd.offset == 16
    offsets = {"crtime": 0, "next": 8, "kid": 16, "module": 20, "resv": 51, "instance": 52,
               "name": 56, "type": 87, "class_": 88, "flags": 119, "data": 120, "ndata": 128,
               "data_size": 136, "snaptime": 144}
    assert {name: getattr(Kstat, name).offset for name in offsets} == offsets
    assert ctypes.sizeof(Kstat) == 184


def test_members_of_every_type_arrive(kernel: Make) -> None:
    members = {"zonename": "z" * 36, "big": 2 ** 64 - 1, "negative": -5, "none": None,
               "full": "x" * 16}
    handle = Handle(kernel([kstat("m", 7, "n" * 40, **members)]))
    [header] = handle.chain()
    assert header.contents.name == b"n" * 30, "names are cut to 30 characters"
    assert handle.read(header) is None
    assert handle.members(header) == members
    assert header.contents.snaptime > 0


def test_chain_update_reports_only_changes(kernel: Make) -> None:
    kern = kernel([A, B])
    handle = Handle(kern)
    assert handle.update() == 0
    kern.write([{**A, "data": {"x": 100}}, B])
    assert handle.update() == 0, "other values are no other chain"
    first = handle.chain()[0]
    assert handle.read(first) is None and handle.members(first) == {"x": 100}
    kern.write([A, B, C])
    assert handle.update() == handle.control.contents.chain_id > 1
    assert handle.names() == ["a:1:a", "b:2:b", "c:3:c"]
    kern.write([A, C])
    assert handle.update() > 0 and handle.names() == ["a:1:a", "c:3:c"]
    kids = [k.contents.kid for k in handle.chain()]
    kern.write([A, {**C, "crtime": 6}])
    assert handle.update() > 0 and handle.chain()[1].contents.kid > kids[1], "a new one, a new kid"


def test_reading_what_has_gone_is_enxio_and_stale_pointers_are_counted(kernel: Make) -> None:
    kern = kernel([A, B])
    handle = Handle(kern)
    gone = handle.find("b", 2, "b")
    kern.write([A])
    assert handle.read(gone) == errno.ENXIO
    assert handle.update() > 0
    assert kern["stale"] == 0
    assert handle.read(gone) == errno.EFAULT and kern["stale"] == 1
    assert not handle.find("b", 2, "b")


def test_merge_frees_pointers_that_still_exist(kernel: Make) -> None:
    kern = kernel([A, B, C])
    kern.faults(("hide", "b:2:b"))
    handle = Handle(kern)
    third = handle.find("c", 3, "c")
    kern.faults()
    assert handle.update() == 0, "installing changes no chain id"
    kern.write([A, B, C, kstat("d", 4, "d")])
    assert handle.update() > 0 and handle.names() == ["a:1:a", "b:2:b", "c:3:c", "d:4:d"]
    assert handle.read(third) == errno.EFAULT, "c is still there, but its old header is not"


def test_late_kstat_needs_a_new_handle(kernel: Make) -> None:
    kern = kernel([A])
    first = Handle(kern)
    kern.faults(("late", "b:*:*"))
    kern.write([A, B])
    assert first.update() > 0 and first.names() == ["a:1:a"]
    assert first.update() == 0
    assert Handle(kern).names() == ["a:1:a", "b:2:b"]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO, errno.ENOMEM])
def test_reads_fail_on_demand_and_recover(kernel: Make, number: int) -> None:
    kern = kernel([A, B])
    handle = Handle(kern)
    kern.faults(("fail", "a:*:*", number, 2))
    first, second = handle.chain()
    assert [handle.read(first) for _ in range(3)] == [number, number, None]
    assert handle.read(second) is None


def test_blocked_read_waits_and_overlapping_calls_are_counted(kernel: Make) -> None:
    kern = kernel([A, B])
    handle = Handle(kern)
    kern.faults(("block", "a:*:*"))
    first, second = handle.chain()
    thread = threading.Thread(target=handle.read, args=(first,))
    thread.start()
    wait_until(lambda: kern["blocked"] == 1, "the blocked read")
    assert kern["overlaps"] == 0
    assert handle.read(second) is None
    assert kern["overlaps"] == 1
    kern.faults()
    thread.join(5)
    assert not thread.is_alive() and kern["blocked"] == 0


def test_switch_happens_between_look_up_and_read(kernel: Make) -> None:
    kern = kernel([A, B])
    handle = Handle(kern)
    kern.write([A], name="later")
    kern.faults(("switch", "b:*:*", "later"))
    assert handle.update() == 0
    assert [handle.read(k) for k in handle.chain()] == [None, errno.ENXIO]


def test_churn_frees_every_header(kernel: Make) -> None:
    kern = kernel([A, B])
    handle = Handle(kern)
    before = handle.chain()[0]
    kern.faults(("churn",))
    assert handle.update() > 0 and handle.update() > 0
    assert handle.read(before) == errno.EFAULT


@pytest.mark.parametrize("fault", ["fail-open", "fail-update"])
def test_open_and_update_fail_on_demand(kernel: Make, fault: str) -> None:
    kern = kernel([A])
    handle = Handle(kern)
    kern.faults((fault, errno.EACCES))
    assert (handle.update() == -1) == (fault == "fail-update")
    assert bool(Handle(kern).control) == (fault == "fail-update")


def test_duplicates_of_a_triple_and_the_reads_are_logged(kernel: Make) -> None:
    kern = kernel([A, {**A, "data": {"x": 9}}])
    kern.log_reads()
    handle = Handle(kern)
    values = [(handle.read(k), handle.members(k)["x"]) for k in handle.chain()]
    assert values == [(None, 1), (None, 9)] and kern.reads() == ["a:1:a", "a:1:a"]


def test_recorded_node_survives_the_round_trip(kernel: Make, recorded_node: dict[str, Any]) -> None:
    kstats = recorded_node["frames"][0]["kstats"]
    handle = Handle(kernel(kstats))
    headers = handle.chain()
    assert len(headers) == len(kstats)
    for header, expected in zip(headers, kstats):
        assert handle.read(header) is None
        if expected["type"] == 1:
            assert handle.members(header) == expected["data"]


def test_a_synthetic_chain_is_fast_and_bounded(kernel: Make) -> None:
    kern = kernel()
    kern.synthesise(zones=500, kstats=50_000)
    before = time.process_time()
    handle = Handle(kern)
    assert time.process_time() - before < 1.0
    assert kern["headers"] == 50_001 and kern["bytes"] < 20_000_000
    first = handle.control.contents.chain
    assert handle.read(first) is None
    assert handle.members(first)["zonename"] == "00000001-0000-4000-8000-000000000001"
    kern.bump()
    assert handle.update() > 0 and kern["headers"] == 50_001


def test_two_kernels_in_one_process_are_independent(kernel: Make) -> None:
    one, two = Handle(kernel([A])), Handle(kernel([B]))
    assert one.names() == ["a:1:a"] and two.names() == ["b:2:b"]
