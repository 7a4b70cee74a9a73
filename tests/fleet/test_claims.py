"""Whose choice stands when several schedulers choose one P at the same time."""

from collections import Counter

import pytest

from tests.support.fleet import P, prompt, registry_of
from vllm_pd_scheduler.fleet.claims import HEARD_S
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.fleet.reservation import Reservation

NAMES = "a", "b", "c", "d"


def among(name: str, prefill: int = 8) -> Registry:
    registry = registry_of(prefill)
    registry.claims.among(name, [each for each in NAMES if each != name])
    return registry


def busy(registry: Registry) -> list[Endpoint]:
    """All P, each with some work."""
    for endpoint in registry.endpoints(P):
        registry.work.reserve(endpoint, prompt(100_000.0))
    return list(registry.endpoints(P))


def claimed_by(replica: str, endpoint: Endpoint, registry: Registry, now: float) -> Reservation:
    return registry.elsewhere.enqueue(endpoint, 1000.0, (0.0, 0), (), now, replica)


def claim(registry: Registry, endpoint: Endpoint, now: float = 1.0) -> Reservation:
    made = registry.work.reserve(endpoint, prompt(now=now), tentative=True)
    registry.claims.made(made)
    return made


def test_alone_nothing_is_contested() -> None:
    registry = registry_of()
    assert not any(registry.claims.contested(each, 0.0) for each in busy(registry))
    registry.claims.among("a", [])
    assert not any(registry.claims.contested(each, 0.0) for each in busy(registry))


def test_at_each_p_one_need_not_ask_and_all_agree_who() -> None:
    firsts = Counter[str]()
    for name in NAMES:
        registry = among(name, 400)
        firsts.update(each.id for each in busy(registry) if not registry.claims.contested(each, 0.0))
        assert 60 < sum(not registry.claims.contested(each, 0.0) for each in registry.endpoints(P)) < 140
    assert len(firsts) == 400
    assert set(firsts.values()) == {1}


def test_one_of_two_keeps_a_p_that_both_have_claimed() -> None:
    for number in range(8):
        overtaken = []
        for name, other in (("a", "b"), ("b", "a")):
            registry = among(name)
            endpoint = registry.endpoints(P)[number]
            ours = claim(registry, endpoint)
            claimed_by(other, endpoint, registry, 1.0 + HEARD_S / 2)
            overtaken.append(registry.claims.overtaken(ours))
        assert sorted(overtaken) == [False, True]


@pytest.mark.parametrize("at", [0.9, 1.0 + 2 * HEARD_S])
def test_what_was_known_before_or_came_later_overtakes_nobody(at: float) -> None:
    for name in NAMES:
        registry = among(name)
        for endpoint in registry.endpoints(P):
            for other in NAMES:
                if at < 1.0:
                    claimed_by(other, endpoint, registry, at)
            ours = claim(registry, endpoint)
            for other in NAMES:
                if at > 1.0:
                    claimed_by(other, endpoint, registry, at)
            assert not registry.claims.overtaken(ours)


def test_at_an_idle_p_it_waits_only_if_that_pays() -> None:
    registry = among("a")
    claims = registry.claims
    idle = registry.endpoints(P)
    assert not any(claims.contested(each, 0.0) for each in idle)
    now = 1.0
    for _ in range(20):  # each time somebody else was there too
        for endpoint in idle:
            ours = claim(registry, endpoint, now)
            others = [claimed_by(other, endpoint, registry, now + 0.01) for other in "bcd"]
            now += 1.0
            claims.contested(endpoint, now)
            for each in others:
                registry.elsewhere.cancel(each, now)
            ours.release(now)
    assert 0 < sum(claims.contested(each, now) for each in idle) < len(idle)
    for _ in range(40):  # and now nobody is
        for endpoint in idle:
            claim(registry, endpoint, now).release(now)
            now += 1.0
    assert not any(claims.contested(each, now) for each in idle)


def test_a_claim_places_no_prefix_before_it_is_confirmed() -> None:
    registry = among("a")
    endpoint = registry.endpoints(P)[0]
    request = prompt(blocks=(1, 2), now=1.0)
    ours = registry.work.reserve(endpoint, request, tentative=True)
    assert len(registry.prefixes) == 0
    registry.work.confirm(ours, 1.0)
    assert len(registry.prefixes) == 2


def test_what_a_prefill_takes_counts_from_when_it_is_sent() -> None:
    registry = among("a")
    ours = claim(registry, registry.endpoints(P)[0])
    behind = claim(registry, ours.endpoint)
    registry.work.confirm(ours, 1.0 + HEARD_S)
    registry.work.confirm(behind, 1.5)
    assert ours.finish(2.0) == pytest.approx(1.0 - HEARD_S)


def test_a_claim_that_is_given_up_has_kept_nobody_waiting() -> None:
    registry = among("a")
    endpoint = registry.endpoints(P)[0]
    ours, theirs = claim(registry, endpoint), claimed_by("b", endpoint, registry, 1.01)
    ours.release(1.0 + HEARD_S)
    assert endpoint.prefill.complete(theirs, 1.5) == pytest.approx(0.5)
