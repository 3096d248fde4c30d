# SPDX-License-Identifier: MPL-2.0
"""Cache, breaker, pool and own metrics, on the test's clock."""
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


def a_cache(limit: int = 10 * Cache.ENTRY) -> Cache[str, bytes]:
    return Cache("pages", limit, lambda key, value: len(key) + len(value))


def test_a_cache_counts_keys_and_values_and_evicts_the_oldest() -> None:
    cache = a_cache(3 * Cache.ENTRY)
    for key in "abc":
        cache.put(key, b"")
    assert list(cache) == ["b", "c"] and cache.evicted == 1     # the keys did not fit beside it
    assert cache.bytes == 2 * Cache.ENTRY + 2
    cache.put("b", b"12345")                                    # now it is the youngest
    cache.put("k" * 290, b"")
    assert [key[0] for key in cache] == ["b", "k"] and cache.get("b") == b"12345"
    cache.drop("b")
    cache.drop("b")
    assert cache.get("b") is None and cache.bytes == Cache.ENTRY + 290 and len(cache) == 1
    cache.clear()
    assert len(cache) == cache.bytes == 0


def test_a_value_larger_than_the_cache_is_not_stored() -> None:
    cache = a_cache()
    cache.put("a", b"old")
    cache.put("b", b"x" * cache.limit)
    cache.put("a", b"x" * cache.limit)
    assert list(cache) == [] and cache.evicted == 2     # and no old value in the place of a new one


def test_a_breaker_opens_tries_once_and_recovers() -> None:
    clock = Clock()
    breaker = Breaker(clock, lambda: 0.5, failures=3, first=30.0, longest=100.0)
    for _ in range(2):
        breaker.failed("no answer")
        assert breaker.allows() and not breaker.open
    breaker.failed("no answer")
    assert breaker.open and breaker.reason == "no answer"
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
    cache = a_cache()
    cache.put("a", b"")
    registry.caches.append(cache)
    asked.add(1, "a")
    asked.add(1, "a")
    register_process_metrics(registry, "agent")
    page = render(registry.families())
    assert render(parse(page)) == page
    for line in ('cmon_x_asked_total{who="a"} 2', 'cmon_agent_cache_bytes{cache="pages"} 301',
                 'cmon_agent_cache_limit_bytes{cache="pages"} 3000',
                 'cmon_agent_cache_evictions_total{cache="pages"} 0'):
        assert line + "\n" in page
    values = {family.name: family.samples[0].value
              for family in registry.families()[1:] if family.samples}
    assert values["process_resident_memory_bytes"] > 5_000_000
    assert values["process_open_fds"] >= 3 and values["process_cpu_seconds_total"] > 0
    assert values["process_start_time_seconds"] > 1.6e9
    assert 'cmon_agent_build_info{version="' in page
