# SPDX-License-Identifier: MPL-2.0
"""Cache, breaker, pool and own metrics: small lives with a clock of the test's."""
from __future__ import annotations

import threading

import pytest

from cmon_agent import (
    Breaker, Cache, Pool, Registry, parse, register_process_metrics, render)


class Clock:
    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


def test_a_cached_value_lives_for_its_lifetime_and_tells_its_age() -> None:
    clock = Clock()
    cache: Cache[str, int] = Cache(clock)
    built = iter(range(10))
    assert cache.get("a", 8.0, lambda: next(built)) == (0, 0.0)
    clock.at += 7.5
    assert cache.get("a", 8.0, lambda: next(built)) == (0, 7.5)
    clock.at += 0.5
    assert cache.get("a", 8.0, lambda: next(built)) == (1, 0.0)


def test_a_failed_build_is_the_callers_and_the_next_one_tries_again() -> None:
    cache: Cache[str, int] = Cache(Clock())
    with pytest.raises(ZeroDivisionError):
        cache.get("a", 8.0, lambda: 1 // 0)
    assert cache.get("a", 8.0, lambda: 5) == (5, 0.0)


def test_one_thread_builds_while_others_wait_for_that_value_only() -> None:
    cache: Cache[str, int] = Cache()
    begun, go, built, got = threading.Event(), threading.Event(), [], []

    def slow() -> int:
        built.append(1)
        begun.set()
        assert go.wait(10)
        return 7
    threads = [threading.Thread(target=lambda: got.append(cache.get("a", 60.0, slow)[0]))
               for _ in range(8)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    assert cache.get("b", 60.0, lambda: 1) == (1, 0.0)      # not held up by "a"
    go.set()
    for thread in threads:
        thread.join(10)
    assert got == [7] * 8 and len(built) == 1


def test_the_cache_is_bounded_by_use_and_by_what_lives() -> None:
    clock = Clock()
    cache: Cache[int, int] = Cache(clock, limit=2)
    for key in (1, 2):
        clock.at += 1
        cache.get(key, 60.0, lambda: 0)
    clock.at += 1
    cache.get(1, 60.0, lambda: 0)
    cache.get(3, 60.0, lambda: 0)                           # 2 was used the longest ago
    assert cache.get(1, 60.0, lambda: 9)[0] == 0 and cache.get(2, 60.0, lambda: 9)[0] == 9
    cache.retain([1])
    assert cache.get(2, 60.0, lambda: 8)[0] == 8
    cache.drop(2)
    assert cache.get(2, 60.0, lambda: 7)[0] == 7


def test_a_breaker_opens_tries_once_and_heals() -> None:
    clock = Clock()
    breaker = Breaker(clock, lambda: 0.5, failures=3, first=30.0, longest=100.0)
    for _ in range(2):
        breaker.failed("no answer")
        assert breaker.allows() and not breaker.open
    breaker.failed("no answer")
    assert breaker.open and breaker.reason == "no answer" and breaker.since == clock.at
    assert not breaker.allows() and breaker.retry_seconds == pytest.approx(30.0)
    clock.at += 30.0
    assert breaker.allows() and not breaker.allows()        # one try, not all at once
    breaker.failed("still none")
    clock.at += 59.0
    assert not breaker.allows()                             # doubled
    clock.at += 1.0
    assert breaker.allows()
    breaker.failed("still none")
    clock.at += 100.0                                       # never longer than the longest
    assert breaker.allows()
    breaker.succeeded()
    assert breaker.allows() and not breaker.open and breaker.retry_seconds == 0.0
    breaker.failed("once")
    assert not breaker.open                                 # it counts from nothing again


def test_breakers_that_open_together_do_not_try_together() -> None:
    waits = set()
    for chance in (0.0, 0.5, 0.99):
        breaker = Breaker(Clock(), lambda chance=chance: chance, failures=1, first=30.0)
        breaker.failed("x")
        waits.add(round(breaker.retry_seconds, 2))
    assert waits == {27.0, 30.0, 32.94}


def test_a_pool_is_bounded_in_threads_and_queue_and_survives_a_failing_job() -> None:
    pool = Pool("test", 2, limit=3)
    go, done = threading.Event(), threading.Semaphore(0)

    def job() -> None:
        assert go.wait(10)
        done.release()
    before = threading.active_count()
    accepted = [pool.submit(job) for _ in range(9)]
    assert accepted.count(True) <= 5 and accepted[:3] == [True] * 3
    assert threading.active_count() - before <= 2
    go.set()
    for _ in range(accepted.count(True)):
        assert done.acquire(timeout=10)
    assert pool.submit(lambda: 1 // 0)
    assert pool.submit(done.release) and done.acquire(timeout=10)
    pool.close()


def test_own_metrics_are_a_page() -> None:
    registry = Registry()
    asked = registry.counter("cmon_x_asked_total", "Asked.", "who")
    level = registry.gauge("cmon_x_level", "Level.")
    took = registry.histogram("cmon_x_seconds", "Took.", (0.1, 1.0), "who")
    asked.add(2, "a")
    asked.add(1, "b")
    asked.remove("b")
    level.set(-3)
    for value in (0.1, 0.5, 7.0):
        took.observe(value, "a")
    register_process_metrics(registry, "agent")
    page = render(registry.families())
    assert render(parse(page)) == page
    for line in ('cmon_x_asked_total{who="a"} 2', "cmon_x_level -3",
                 'cmon_x_seconds_bucket{who="a",le="0.1"} 1',
                 'cmon_x_seconds_bucket{who="a",le="1.0"} 2',
                 'cmon_x_seconds_bucket{who="a",le="+Inf"} 3', 'cmon_x_seconds_sum{who="a"} 7.6',
                 'cmon_x_seconds_count{who="a"} 3'):
        assert line + "\n" in page
    values = {family.name: family.samples[0].value for family in registry.families()[3:]}
    assert values["process_resident_memory_bytes"] > 5_000_000
    assert values["process_open_fds"] >= 3 and values["process_cpu_seconds_total"] > 0
    assert values["process_start_time_seconds"] > 1.6e9
    assert 'cmon_agent_build_info{version="' in page
