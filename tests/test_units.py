# SPDX-License-Identifier: MPL-2.0
"""Each conversion at points computed by hand."""
from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest

import cmon_agent as agent

BIG = 2 ** 53 + 1                   # a double loses its last bit
ROWS: list[tuple[str, agent.Convert, Any, int | float | None]] = [
    ("a counter above 2^53 is exact", agent.COUNT.convert, BIG, BIG),
    ("the largest counter", agent.BYTES.convert, 2 ** 64 - 1, 2 ** 64 - 1),
    ("text is no number", agent.COUNT.convert, "7", None),
    ("nothing is no number", agent.COUNT.convert, None, None),
    ("nanoseconds", agent.NS.convert, 1_500_000_000, 1.5),
    ("microseconds", agent.US.convert, 118644, 0.118644),
    ("a load of 256/256", agent.LOAD.convert, 256, 1.0),
    ("a load of 12/256", agent.LOAD.convert, 12, 0.046875),
    ("text is no load", agent.LOAD.convert, "1", None),
    ("a cap", agent.CAP.convert, 134217728, 134217728),
    ("a cap of all ones is none", agent.CAP.convert, 2 ** 64 - 1, None),
    ("a cap that JavaScript has rounded is none", agent.CAP.convert, 2 ** 64, None),
    ("a cap of zero is none", agent.CAP.convert, 0, None),
    ("a cap of all pages is none", agent.CAP.convert, 4096 * (2 ** 32 - 1), None),
    ("a cap of all pages of 8 kB is none", agent.CAP.convert, 8192 * (2 ** 32 - 1), None),
    ("a cap on processes", agent.COUNT_CAP.convert, 2000, 2000),
    ("a cap on processes of INT_MAX is none", agent.COUNT_CAP.convert, 2 ** 31 - 1, None),
    ("a cap on memory may be INT_MAX", agent.CAP.convert, 2 ** 31 - 1, 2 ** 31 - 1),
    ("a link that is up", agent.UP.convert, 1, 1),
    ("a link that is down", agent.UP.convert, 0, 0),
    ("a link of unknown state", agent.UP.convert, 2 ** 32 - 1, None),
    ("10 Gbit/s", agent.BITS.convert, 10_000_000_000, 1_250_000_000),
    ("a link without speed", agent.BITS.convert, 0, None),
    ("three and a half CPUs", agent.CPUS.convert, 350, 3.5),
    ("four CPUs", agent.CPUS.convert, 400, 4),
    ("an exact size in text", agent.SIZE.convert, "9223372036854775807", 9223372036854775807),
    ("a dash is no size", agent.SIZE.convert, "-", None),
    ("a size is not negative", agent.SIZE.convert, "-1", None),
    ("a ratio with its x", agent.RATIO.convert, "2.11x", 2.11),
    ("a ratio without", agent.RATIO.convert, "2.11", 2.11),
    ("a share with its %", agent.SHARE.convert, "31%", 31),
    ("a share without", agent.SHARE.convert, "31", 31),
    ("a dash is no share", agent.SHARE.convert, "-", None),
    ("a healthy pool", agent.HEALTH.convert, "ONLINE", 0),
    ("a pool that is gone", agent.HEALTH.convert, "UNAVAIL", 5),
    ("a pool's state of newer platforms", agent.HEALTH.convert, "SUSPENDED", -1),
    ("a pool without state", agent.HEALTH.convert, "-", None),
    ("milliseconds in text", agent.MS.convert, "-0.118", -0.000118),
    ("milliseconds with a sign", agent.MS.convert, "+0.204", 0.000204),
    ("milliseconds move the point in the text", agent.MS.convert, "77.161", 0.077161),
    ("milliseconds with an exponent", agent.MS.convert, "1e-06", 1e-09),
    ("milliseconds of a dash", agent.MS.convert, "-", None),
    ("a peer that was never heard", agent.LAST_HEARD.convert, "-", -1),
    ("a peer that was heard two hours ago", agent.LAST_HEARD.convert, "2h", 7200),
    ("KiB", agent.KIB.convert, "1024", 1048576),
    ("a number with an exponent", agent.WORD.convert, "1e-06", 1e-06),
    ("a number too large", agent.WORD.convert, "1e999", None),
    ("other digits are no number", agent.WORD.convert, "\u0661\u0662", None),
    ("underscores are no number", agent.WORD.convert, "1_000", None),
    ("infinity is no number", agent.WORD.convert, "inf", None),
    ("seconds", agent.SPAN.convert, "33", 33),
    ("five hours", agent.SPAN.convert, "5h", 18000),
    ("two days", agent.SPAN.convert, "2d", 172800),
    ("three minutes", agent.SPAN.convert, "3m", 180),
    ("never", agent.SPAN.convert, "-", None),
    ("a unit alone", agent.SPAN.convert, "h", None),
    ("eight answers", agent.FAILED.convert, "377", 0),
    ("one answer of eight", agent.FAILED.convert, "1", 7),
    ("a hole in the answers: 357 is 11101111", agent.FAILED.convert, "357", 1),
    ("no answer", agent.FAILED.convert, "0", 8),
    ("reach is octal", agent.FAILED.convert, "8", None),
    ("an address in hexadecimal", agent.REFID.convert, "c0000217", 0),
    ("an address", agent.REFID.convert, "192.0.2.23", 0),
    ("an address of IPv6", agent.REFID.convert, "2001:db8::1", 0),
    ("the first code", agent.REFID.convert, ".ACST.", 1),
    ("GPS is the twelfth", agent.REFID.convert, ".GPS.", 12),
    ("a code that is not in the list", agent.REFID.convert, ".POOL.", -1),
    ("a clock's driver", agent.REFID.convert, "GPS_NMEA(1)", -1),
    ("unicast", agent.TYPE.convert, "u", 0),
    ("a pool of servers", agent.TYPE.convert, "p", -1),
    ("the system peer", agent.TALLY.convert, "*", 6),
    ("a rejected peer", agent.TALLY.convert, " ", 0),
    ("a falseticker", agent.TALLY.convert, "x", 1),
    ("an unknown tally", agent.TALLY.convert, "!", -1),
    ("client mode", agent.MODE.convert, "client", 2),
    ("an unknown mode", agent.MODE.convert, "guest", -1),
    ("no leap second", agent.LEAP.convert, "00", 0),
    ("not synchronised", agent.LEAP.convert, "11", 3),
    ("not a leap indicator", agent.LEAP.convert, "12", None),
    ("a flag in hexadecimal", agent.FLAG.convert, "0x1", 1),
    ("a flag that is off", agent.FLAG.convert, "0", 0),
    ("a quarter second in NTP's era", agent.STAMP.convert,
     "ed003780.40000000  Thu, Jan  1 2026  0:00:00.250", 3976214400.25),
    ("a time that never was", agent.STAMP.convert, "(no time)", 0),
    ("no time at all", agent.STAMP.convert, "soon", None),
]


@pytest.mark.parametrize("convert, value, expected", [row[1:] for row in ROWS],
                         ids=[row[0] for row in ROWS])
def test_a_value_is_converted(convert: agent.Convert, value: Any,
                              expected: int | float | None) -> None:
    assert convert(value) == expected
    assert type(convert(value)) is type(expected)


def test_the_era_of_ntp_begins_in_1900() -> None:
    new_year = datetime(2026, 1, 1, tzinfo=timezone.utc).timestamp()
    assert 0xed003780 - agent.SINCE_1900 == new_year
