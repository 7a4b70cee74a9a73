"""Whose hand-offs fail at a D that only counts the transfers that failed."""

from __future__ import annotations

from random import Random

import pytest

from tests.fleet.test_pairs import blamed, started
from tests.support.registry import instance
from vllm_pd_scheduler.fleet.failed_transfers import _MAX_PREFILLS
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot

P, D = InstanceRole.PREFILL, InstanceRole.DECODE


def run(
    registry: Registry, broken: dict[tuple[str, str], float], scrapes: int, seed: int = 1, begin: int = 0
) -> None:
    """Have streams be answered, with a scrape of each D a second; hand-offs of broken pairs fail so often."""
    random = Random(seed)
    for second in range(begin, begin + scrapes):
        now = 100.0 + second
        failed = dict.fromkeys(registry.endpoints(D), 0)
        for _ in range(30):
            prefills = [
                p for p in registry.endpoints(P) if not registry.pairs.useless(p, registry.routable(D), now)
            ]
            prefill = random.choice(prefills)
            barred = registry.pairs.barred(prefill, now)
            decode = random.choice([d for d in registry.routable(D) if d not in barred])
            reservation = registry.work.reserve(decode)
            registry.pairs.tried(prefill, decode, reservation)
            registry.failed_transfers.handed_over(prefill, decode)
            registry.ends.succeeded(decode, prefill)  # as far as its status tells
            reservation.release()
            failed[decode] += random.random() < broken.get((prefill.id, decode.id), 0.0)
        for decode, count in failed.items():
            snapshot = MetricsSnapshot(now, failed_transfers=float(count))
            registry.scraped(decode, snapshot, 0)


@pytest.mark.parametrize("seed", range(5))
def test_a_pair_of_which_all_fail_is_found_and_no_other(seed: int) -> None:
    registry = started()
    run(registry, {("p1", "d2"): 1.0}, 40, seed)
    assert [(p.id, d and d.id) for p, d, _ in registry.pairs.out()] == [("p1", "d2")]
    assert all(e.routable for e in registry)


def test_it_returns_when_its_trial_succeeds() -> None:
    registry = started()
    run(registry, {("p1", "d2"): 1.0}, 40)
    run(registry, {}, 60, begin=40)
    assert blamed(registry) == ""
    run(registry, {}, 40, begin=100)
    assert not registry.pairs.in_doubt
    assert not registry.failed_transfers._shares


def test_a_p_of_which_all_fail_everywhere() -> None:
    registry = started()
    run(registry, {("p1", f"d{number}"): 1.0 for number in range(3)}, 60)
    assert {p.id for p, _, _ in registry.pairs.out()} == {"p1"}


def test_a_few_accidents_are_nobodys_fault() -> None:
    registry = started()
    run(registry, {(f"p{p}", f"d{d}"): 0.03 for p in range(3) for d in range(3)}, 60)
    assert blamed(registry) == ""


def test_failures_that_nobody_can_have_caused_are_nobodys() -> None:
    registry = started()
    decode = registry.get("d0")
    for second in range(9):
        registry.scraped(decode, MetricsSnapshot(float(second), failed_transfers=7.0), 0)
    assert not registry.pairs.in_doubt


def test_a_d_that_does_not_count_them_keeps_nothing() -> None:
    registry = started()
    prefill, decode = registry.get("p0"), registry.get("d0")
    registry.scraped(decode, MetricsSnapshot(0.0), 0)
    registry.failed_transfers.handed_over(prefill, decode)
    assert not registry.failed_transfers._handed


def test_the_p_that_are_told_apart_are_bounded() -> None:
    """To learn of a thousand P would hold up the event loop for a second with each scrape."""
    registry = started(1)
    for number in range(1000):
        registry.add(instance(f"x{number}", P, f"10.1.{number // 250}.{1 + number % 250}"))
    decode = registry.get("d0")
    for second, prefill in enumerate(registry.endpoints(P)):
        registry.work.handed_over(prefill, decode)
        registry.scraped(decode, MetricsSnapshot(float(second), failed_transfers=1.0), 0)
    assert len(registry.failed_transfers._shares[decode].mean) <= _MAX_PREFILLS + 2
