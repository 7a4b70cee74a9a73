"""What replicas know of each other's claims, and of a P that two of them have claimed."""

import pytest

from tests.replicas.one import One, P, make_registry, make_request
from vllm_pd_scheduler.fleet.claims import HEARD_S
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.replicas import SILENT_S


def pair(number: int = 0) -> tuple[One, One, str]:
    """Two that have heard of each other, and a P."""
    a, b = One("a", registry=make_registry(8)), One("b", 100.0, make_registry(8))
    for one, other in ((a, b), (b, a)):
        other.hear(one.publish(0.0), 0.0)
    return a, b, f"{P}-{number}"


def claim(one: One, endpoint: str, now: float) -> Reservation:
    request = make_request(now + one.skew)
    return one.registry.work.reserve(one.registry.get(endpoint), request, tentative=True)


@pytest.mark.parametrize("number", range(8))
def test_one_of_two_that_claim_a_p_in_the_same_instant_keeps_it(number: int) -> None:
    a, b, endpoint = pair(number)
    claims = {one: claim(one, endpoint, 1.0) for one in (a, b)}
    said = {one: one.publish(1.0) for one in (a, b)}
    a.hear(said[b], 1.01)
    b.hear(said[a], 1.01)
    overtaken = [one.registry.claims.overtaken(made) for one, made in claims.items()]
    assert sorted(overtaken) == [False, True]


def test_a_claim_is_load_elsewhere_at_once_and_a_cached_prompt_when_it_stands() -> None:
    a, b, endpoint = pair()
    made = claim(a, endpoint, 1.0)
    b.hear(a.publish(1.0), 1.01)
    there = b.registry.get(endpoint)
    assert there.prefill.queued > 0
    assert len(b.registry.prefixes) == 0
    a.registry.work.confirm(made, 1.0 + HEARD_S)
    b.hear(a.publish(1.0 + HEARD_S), 1.0 + HEARD_S)
    assert len(b.registry.prefixes) == 2
    assert len(list(there.prefill.pending)) == 1


def test_a_claim_that_is_given_up_leaves_nothing_elsewhere() -> None:
    a, b, endpoint = pair()
    made = claim(a, endpoint, 1.0)
    b.hear(a.publish(1.0), 1.01)
    made.release(1.0 + HEARD_S)
    b.hear(a.publish(1.0 + HEARD_S), 1.0 + HEARD_S)
    assert not list(b.registry.get(endpoint).prefill.pending)
    assert len(a.registry.prefixes) == len(b.registry.prefixes) == 0


def test_one_that_is_left_alone_waits_for_nobody() -> None:
    a, b, _ = pair()
    busy = a.registry.endpoints(P)
    for endpoint in busy:
        for _ in range(100):
            a.send(endpoint.id, 1.0)
    assert any(a.registry.claims.contested(each, 1.0) for each in busy)
    assert b.publish(1.0)
    a.publish(1.0 + SILENT_S)
    assert a.replica.others == []
    assert not any(a.registry.claims.contested(each, 1.0 + SILENT_S) for each in busy)
