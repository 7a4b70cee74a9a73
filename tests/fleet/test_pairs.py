"""Whose fault it is that D fails a request with a hand-off: the pair's, P's or D's."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.registry import D, P, instance
from vllm_pd_scheduler.fleet.breaker import BreakerPolicy, BreakerState
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.pairs import MAX_DOUBTS, PairChange, Pairs
from vllm_pd_scheduler.fleet.registry import HealthPolicy, Registry

NOW = 100.0


def started(count: int = 3) -> Registry:
    registry = Registry(HealthPolicy(breaker=BreakerPolicy(failures=3, pause=1.0)))
    for number in range(count):
        registry.add(instance(f"p{number}", P, f"10.0.1.{number + 1}"))
        registry.add(instance(f"d{number}", D, f"10.0.2.{number + 1}"))
    for endpoint in registry:
        registry.probed(endpoint, None)
    return registry


def play(registry: Registry, history: str) -> None:
    """Have a history happen: at ``01-`` D 1 fails with a hand-off of P 0, at ``.1+`` it serves without."""
    for prefill, decode, end in history.split():
        endpoint = registry.get(f"d{decode}")
        by = None if prefill == "." else registry.get(f"p{prefill}")
        if end == "+":
            registry.ends.succeeded(endpoint, by)
        else:
            registry.ends.failed(endpoint, "status", NOW, by)


def blamed(registry: Registry) -> str:
    """Return who is out, as ids: pairs, then P, then D."""
    out = [f"{p.id}/{d.id if d else '*'}" for p, d, _ in registry.pairs.out()]
    return " ".join(sorted(out) + [e.id for e in registry if e.breaker.state is not BreakerState.CLOSED])


@pytest.mark.parametrize(
    ("history", "who"),
    [
        ("00- 00-", ""),
        ("00- 10+ 00- 10+ 00-", "p0/d0"),
        ("00- 10+ 00- 00+ 00- 00-", ""),
        ("00- .0+ 00- 00-", "p0/d0"),
        ("00- 00- 00-", "d0"),  # nobody has seen it work
        ("00- 10+ 00- 20- 00-", "d0"),
        ("00- 10+ 20- 00- 10-", "d0"),
        ("00- 10- 20-", "d0"),
        ("00- .0- .0-", "d0"),
        ("00- 10+ 01- 11+ 02- 12+ 00-", "p0/*"),
        ("00- .0+ 01- .1+ 01-", "p0/*"),
        ("00- .0+ 01- .1+ 02+ 00- 01-", ""),  # it works with another one
        ("00- .0+ 01- 11- 02- 12+", ""),  # of d1 nobody knows
    ],
)
def test_who_is_to_blame(history: str, who: str) -> None:
    registry = started()
    play(registry, history)
    assert blamed(registry) == who


def test_a_pair_that_is_out_gets_one_trial_after_a_pause() -> None:
    registry = started()
    p0, d0 = registry.get("p0"), registry.get("d0")
    told: list[PairChange] = []
    registry.pairs.on_change = told.append
    play(registry, "00- 10+ 00- 00-")
    pairs = registry.pairs
    assert list(pairs.barred(p0, NOW)) == [d0]
    assert not pairs.barred(registry.get("p1"), NOW)
    assert list(pairs.barred(p0, NOW + 1.1)) == []
    reservation = registry.work.reserve(d0)
    pairs.tried(p0, d0, reservation)
    assert list(pairs.barred(p0, NOW + 1.1)) == [d0], "one at a time"
    reservation.release()
    assert list(pairs.barred(p0, NOW + 1.1)) == [], "its client has left: it shows nothing"
    registry.ends.failed(d0, "status", NOW + 1.2, p0)
    assert list(pairs.barred(p0, NOW + 3.1)) == [d0], "twice as long"
    assert list(pairs.barred(p0, NOW + 3.3)) == []
    registry.ends.succeeded(d0, p0)
    assert blamed(registry) == ""
    assert [(each.out, each.pause) for each in told] == [(True, 1.0), (True, 2.0), (False, 0.0)]
    for _ in range(20):
        registry.ends.succeeded(d0, p0)
    assert not pairs.in_doubt
    assert not pairs._of_prefill, "nothing is left of it"


def test_doubts_cost_requests_nothing() -> None:
    """In a large fleet some requests always fail: only what is left out is looked at for each request."""
    registry = started()
    play(registry, "00- 10+ 01- 11+ 22- 12+ 20- 20+")
    assert not registry.pairs.in_doubt
    assert not registry.pairs.suspects
    play(registry, "10+ 00- 10+ 00-")
    assert [each.id for each in registry.pairs.suspects] == ["p0"]
    assert not registry.pairs.useless(registry.get("p0"), registry.routable(D), NOW + 1.1)
    play(registry, "00+")
    assert not registry.pairs.in_doubt


def test_a_p_without_a_d_that_may_take_over() -> None:
    registry = started()
    p0, d0, d1 = (registry.get(name) for name in ("p0", "d0", "d1"))
    play(registry, "00- 10+ 00- 00-")
    assert registry.pairs.useless(p0, [d0], NOW)
    assert not registry.pairs.useless(p0, [d0, d1], NOW)
    assert not registry.pairs.useless(p0, [], NOW), "that there is no D at all is another matter"


def test_what_was_the_requests_fault_is_taken_back() -> None:
    registry = started()
    d0, d1, p0 = (registry.get(name) for name in ("d0", "d1", "p0"))
    play(registry, ".0+ 10+ 00- 10+ 00- 00+")
    for _ in range(9):
        registry.ends.errored(d0, (), "status", NOW, p0)
        registry.ends.errored(d1, (d0,), "status", NOW, p0)
        registry.ends.succeeded(d1)
    assert all(decode is not d0 for _, decode, _ in registry.pairs.out())


@pytest.mark.parametrize("gone", ["p0", "d0"])
@pytest.mark.parametrize("how", ["removed", "restarted"])
def test_entries_end_with_their_instances(gone: str, how: str) -> None:
    registry = started()
    play(registry, "00- 10+ 00- 00-")
    if how == "removed":
        registry.remove(gone)
    else:
        registry.started(registry.get(gone), 1.0)
        registry.started(registry.get(gone), 2.0)
    assert blamed(registry) == ""
    assert not registry.pairs.in_doubt


def test_the_number_of_doubts_is_bounded() -> None:
    pairs, ends = Pairs(BreakerPolicy()), [Endpoint(instance(f"e{number}")) for number in range(100)]
    for prefill in ends:
        for decode in ends:
            pairs.failed(prefill, decode, NOW)
    assert sum(map(len, pairs._doubts.values())) <= MAX_DOUBTS


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["pair", "prefill", "decode", "nobody"]), st.integers(2, 5))
def test_in_the_end_who_is_broken_is_out_and_nobody_else(seed: int, broken: str, count: int) -> None:
    registry, random, now = started(count), Random(seed), NOW
    prefills, decodes = registry.endpoints(P), registry.endpoints(D)
    p0, d0 = prefills[0], decodes[0]

    def fails(prefill: Endpoint | None, decode: Endpoint) -> bool:
        return {
            "pair": prefill is p0 and decode is d0,
            "prefill": prefill is p0,
            "decode": decode is d0,
            "nobody": False,
        }[broken]

    wrong = 0
    for number in range(600):
        now += 0.05
        for endpoint in registry:
            registry.probed(endpoint, None, now)
        able = [p for p in prefills if not registry.pairs.useless(p, registry.routable(D), now)]
        prefill = random.choice(able) if able else None
        barred = registry.pairs.barred(prefill, now) if prefill else ()
        left = [d for d in registry.routable(D) if d not in barred and not d.on_trial]
        if not left:
            continue
        decode = random.choice(left)
        reservation = registry.work.reserve(decode)
        if prefill is not None:
            registry.pairs.tried(prefill, decode, reservation)
        reservation.release()
        if not fails(prefill, decode):
            registry.ends.succeeded(decode, prefill)
            continue
        wrong += number >= 300
        registry.ends.failed(decode, "status", now, prefill)
        other = random.choice([d for d in decodes if d is not decode])
        if not fails(None, other):
            registry.ends.succeeded(other, None)
    assert wrong <= 15, "only trials, ever fewer"
    healthy = [d for d in decodes if not (broken == "decode" and d is d0)]
    assert all(d.breaker.state is not BreakerState.OPEN for d in healthy)
    out = {(p, d) for p, d, _ in registry.pairs.out()}
    assert out <= {"pair": {(p0, d0)}, "prefill": {(p0, None)}}.get(broken, set()), out


def test_instances_that_are_gone_leave_nothing_behind() -> None:
    """Their last requests end after them."""
    registry = started()
    p0, d0 = registry.get("p0"), registry.get("d0")
    play(registry, "00- 10- 11- 01-")
    registry.remove("p0")
    for _ in range(9):
        registry.ends.failed(registry.get("d1"), "status", NOW, p0)
        registry.ends.failed(registry.get("d1"), "status", NOW, registry.get("p1"))
        registry.ends.succeeded(registry.get("d1"))
    registry.remove("d0")
    for _ in range(9):
        registry.ends.failed(d0, "status", NOW, registry.get("p1"))
        registry.work.handed_over(p0, registry.get("d1"))
    pairs = registry.pairs
    known = {*pairs._of_prefill, *pairs._failed_with, *pairs._doubts}
    known |= {each for failed in pairs._failed_with.values() for each in failed if each}
    known |= {each for doubts in pairs._doubts.values() for each in doubts}
    assert known <= set(registry)


def test_a_d_is_not_ejected_for_what_a_p_that_is_gone_has_handed_over() -> None:
    registry = started()
    p0, d0 = registry.get("p0"), registry.get("d0")
    play(registry, "10+ 00- 00-")
    registry.remove("p0")
    for _ in range(3):
        registry.ends.failed(d0, "status", NOW, p0)
    assert d0.routable


def test_a_pair_is_one_of_processes() -> None:
    """Whatever ranks of the two hand over to each other, and D serves the ranks of another one."""
    registry = Registry(HealthPolicy(breaker=BreakerPolicy(failures=3, pause=1.0)))
    for name, role, host in (
        ("p0", P, "10.0.1.1"),
        ("p1", P, "10.0.1.2"),
        ("d0", D, "10.0.2.1"),
        ("d1", D, "10.0.2.2"),
    ):
        registry.add(replace(instance(name, role, host), data_parallel_size=4))
        registry.probed(registry.get(name), None)
    ranks = {name: registry.ranks_of(registry.get(name)) for name in ("p0", "p1", "d0", "d1")}
    for rank in range(4):
        registry.ends.failed(ranks["d0"][rank], "status", NOW, ranks["p0"][3 - rank])
        registry.ends.succeeded(ranks["d0"][-rank], ranks["p1"][rank])
    pairs = registry.pairs
    assert [(p.instance.instance_id, d and d.instance.instance_id) for p, d, _ in pairs.out()] == [
        ("p0", "d0")
    ]
    assert all(each.routable for each in registry)
    for prefill in ranks["p0"]:
        assert set(pairs.barred(prefill, NOW)) == set(ranks["d0"])
        assert pairs.useless(prefill, ranks["d0"], NOW)
        assert not pairs.useless(prefill, (*ranks["d0"], ranks["d1"][2]), NOW)
    assert set(ranks["p0"]) <= set(pairs.suspects)
    reservation = registry.work.reserve(ranks["d0"][2])
    pairs.tried(ranks["p0"][1], ranks["d0"][2], reservation)
    assert not pairs.barred(ranks["p1"][0], NOW)
    for prefill in ranks["p0"]:
        assert set(pairs.barred(prefill, NOW + 1.1)) in (set(ranks["d0"]), set())
    registry.ends.succeeded(ranks["d0"][2], ranks["p0"][1])
    registry.remove("d0")
    registry.remove("p0")
    assert not pairs.in_doubt
