# SPDX-License-Identifier: MPL-2.0
"""Quotas in two steps, on a clock of our own."""
from __future__ import annotations

import random
from typing import Any

import pytest

from cmon_proxy import (
    ADMITTED, OVER, REFUSED, Account, AccountQuota, QuotaBucket, Quotas, QuotaSettings,
    quota_limits_of)


def allowance(**more: Any) -> QuotaBucket:
    return QuotaBucket("alice", False, quota_limits_of(QuotaSettings(**more), "alice", False), 0.0)


def test_two_steps() -> None:
    one = allowance(per_minute=60, burst=10, hard_per_minute=120)
    assert [one.take(0.0) for _ in range(10)] == [ADMITTED] * 10
    assert [one.take(0.0) for _ in range(10)] == [OVER] * 10
    assert one.take(0.0) == REFUSED and one.limited
    assert (one.wait(False), one.wait(True)) == (2, 1)
    assert one.take(1.0) == ADMITTED
    assert (one.requests, one.over, one.refused) == (22, 10, 1)


def test_rate_over_a_long_time_is_the_limit() -> None:
    one = allowance(per_minute=600, burst=20, hard_per_minute=6000)
    verdicts = [one.take(n * 0.02) for n in range(50 * 60)]        # 50 a second for a minute
    assert verdicts.count(ADMITTED) == pytest.approx(600 + 20, rel=0.02)
    assert REFUSED not in verdicts


@pytest.mark.parametrize("settings, login, operator, expected", [
    ({}, "a", False, (6000, 1000, 60000, "stale", False)),
    ({"per_minute": 60, "burst": 5}, "a", False, (60, 5, 60000, "stale", False)),
    ({"exempt_operators": True}, "a", True, (6000, 1000, 60000, "stale", True)),
    ({"exempt_operators": True}, "a", False, (6000, 1000, 60000, "stale", False)),
    ({"accounts": {"a": AccountQuota(per_minute=5, over_quota="refuse")}}, "a", False,
     (5, 1000, 60000, "refuse", False)),
    ({"accounts": {"a": AccountQuota(exempt=True)}}, "a", False,
     (6000, 1000, 60000, "stale", True)),
    ({"accounts": {"a": AccountQuota(per_minute=70_000)}}, "a", False,
     (70_000, 1000, 70_000, "stale", False)),
    ({"accounts": {"b": AccountQuota(per_minute=5)}}, "a", False,
     (6000, 1000, 60000, "stale", False)),
])
def test_limits(settings: Any, login: str, operator: bool, expected: Any) -> None:
    found = quota_limits_of(QuotaSettings(**settings), login, operator)
    assert (found.per_minute, found.burst, round(found.hard_rate * 60), found.over,
            found.exempt) == expected


def test_limits_with_a_rate_of_zero() -> None:
    one = allowance(per_minute=0, burst=1, hard_per_minute=0)
    assert [one.take(n) for n in (0.0, 1e6)] == [ADMITTED, REFUSED]
    assert one.wait(False) == one.wait(True) == 86400
    assert b"RateLimit-Reset: 86400" in one.header()


def test_an_exempt_account_has_no_limit() -> None:
    limits = quota_limits_of(QuotaSettings(burst=1, per_minute=1), "a", False)._replace(exempt=True)
    one = QuotaBucket("a", False, limits, 0.0)
    assert {one.take(0.0) for _ in range(100)} == {ADMITTED} and not one.limited
    assert one.header() == b""


def test_a_clock_set_back_adds_nothing() -> None:
    one = allowance(per_minute=60, burst=2, hard_per_minute=600)
    assert [one.take(at) for at in (10.0, 10.0, 5.0)] == [ADMITTED, ADMITTED, OVER]


def test_headers() -> None:
    one = allowance(per_minute=60, burst=10)
    one.take(0.0)
    assert one.header() == (b"RateLimit-Limit: 10\r\nRateLimit-Remaining: 9\r\n"
                            b"RateLimit-Reset: 1\r\n")


@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
@pytest.mark.parametrize("spread", ["even", "random", "one"])
def test_replicas_keep_to_one_limit(replicas: int, spread: str) -> None:
    """Each admits its share: evenly spread requests get all of the limit, others less, never more
    but for what a share below one is rounded up to."""
    generator = random.Random(replicas)
    limits = quota_limits_of(QuotaSettings(per_minute=600, burst=70, replicas=replicas), "a", False)
    ones = [QuotaBucket("a", False, limits, 0.0) for _ in range(replicas)]
    admitted = 0
    for number in range(30 * 60):               # three times the limit for a minute
        which = {"even": number % replicas, "random": generator.randrange(replicas), "one": 0}
        admitted += ones[which[spread]].take(number / 30) == ADMITTED
    most = 600 + 70
    assert admitted <= most * 1.01
    if spread != "one":
        assert admitted >= most * 0.9
    else:
        assert admitted >= most / replicas * 0.95


def test_accounts_are_kept_apart_and_counted() -> None:
    clock = [0.0]
    quotas = Quotas(QuotaSettings(per_minute=60, burst=2), lambda: clock[0])
    first, second = quotas.of(Account("1", "alice", {})), quotas.of(Account("2", "bob", {}))
    assert quotas.of(Account("1", "alice", {})) is first
    for _ in range(3):
        first.take(0.0)
    assert second.take(0.0) == ADMITTED
    assert quotas.spent() == {"1": 3, "2": 1} and quotas.spent() == {}
    found = {family.name: family for family in quotas.families()}
    asked = {sample.labels[0][1]: sample.value
             for sample in found["cmon_proxy_account_requests_total"].samples
             if ("result", "asked") in sample.labels}
    assert asked == {"alice": 3, "bob": 1}


def test_new_limits_apply_at_once() -> None:
    quotas = Quotas(QuotaSettings(burst=100, exempt_operators=True), lambda: 0.0)
    one, root = quotas.of(Account("1", "a", {})), quotas.of(Account("2", "root", {}, True))
    quotas.reload(QuotaSettings(burst=5, per_minute=1))
    assert one.soft == 5 and root.limits.exempt is False and root.soft == 5
    quotas.reload(QuotaSettings(exempt_operators=True))
    assert root.limits.exempt and not one.limits.exempt


def test_the_largest_accounts_are_named_and_the_rest_summed() -> None:
    quotas = Quotas(QuotaSettings(), lambda: 0.0)
    for number in range(20):
        one = quotas.of(Account(str(number), f"login{number}", {}))
        for _ in range(number + 1):
            one.take(0.0)
    samples = quotas.families(most=5)[0].samples
    by_login = {sample.labels[0][1]: sample.value for sample in samples
                if ("result", "asked") in sample.labels}
    assert set(by_login) == {"", *(f"login{number}" for number in range(15, 20))}
    assert sum(by_login.values()) == sum(range(1, 21))


def test_the_proxys_cpu_time_is_charged_to_the_accounts_that_cause_it(monkeypatch: Any) -> None:
    clock = [10.0]
    monkeypatch.setattr("cmon_proxy.time.process_time", lambda: clock[0])
    quotas = Quotas(QuotaSettings(), lambda: 0.0)
    first, second = quotas.of(Account("1", "a", {})), quotas.of(Account("2", "b", {}))
    clock[0] = 11.0
    quotas.book()                               # nobody has asked: it is nobody's
    for one, requests in ((first, 100), (second, 900)):
        for _ in range(requests):
            one.take(0.0)
            one.relays += 1
            one.bytes += 7000
    clock[0] = 13.0
    quotas.book()
    assert first.cpu == pytest.approx(0.2) and second.cpu == pytest.approx(1.8)
    family = quotas.families()[2]
    assert sum(sample.value for sample in family.samples) == pytest.approx(3.0)


def test_forgotten_accounts_stay_counted(monkeypatch: Any) -> None:
    monkeypatch.setattr("cmon_proxy.KEPT_BUCKETS", 3)
    clock = [0.0]
    quotas = Quotas(QuotaSettings(), lambda: clock[0])
    for number in range(3):
        quotas.of(Account(str(number), f"l{number}", {})).take(0.0)
    clock[0] = 10_000.0
    quotas.of(Account("9", "l9", {})).take(clock[0])
    total = sum(sample.value for sample in quotas.families()[0].samples
                if ("result", "asked") in sample.labels)
    assert total == 4
    for number in range(20, 26):                # all in use: it does not grow
        quotas.of(Account(str(number), f"l{number}", {})).take(clock[0])
    quotas.debit({str(number): 1 for number in range(50)})
