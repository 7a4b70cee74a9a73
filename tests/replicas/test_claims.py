"""What replicas know of each other's claims, and of a P that two of them have claimed."""

import pytest

from tests.replicas.one import KEY, D, One, P, make_registry, make_request
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


def test_a_prefill_begins_elsewhere_when_it_is_sent_and_not_when_it_is_claimed() -> None:
    a, b, endpoint = pair()
    made = claim(a, endpoint, 1.0)
    b.hear(a.publish(1.0), 1.01)
    a.registry.work.confirm(made, 1.0 + HEARD_S)
    b.hear(a.publish(1.0 + HEARD_S), 1.01 + HEARD_S)
    there = b.registry.get(endpoint).prefill
    assert there.remaining(101.01 + HEARD_S) == pytest.approx(there.queued)
    a.registry.work.prefilled(made, 1000, 0, 1.5 + HEARD_S)
    b.hear(a.publish(1.5 + HEARD_S), 1.51 + HEARD_S)
    assert b.registry.load.prefill.samples == 1
    assert b.registry.load.prefill.coefficients == pytest.approx(a.registry.load.prefill.coefficients)


def test_a_claim_that_is_given_up_has_kept_those_behind_it_from_nothing_elsewhere() -> None:
    a, b, endpoint = pair()
    made = claim(a, endpoint, 1.0)
    b.hear(a.publish(1.0), 1.01)
    b.send(endpoint, 1.01)
    made.release(1.0 + HEARD_S)
    b.hear(a.publish(1.0 + HEARD_S), 1.01 + HEARD_S)
    there = b.registry.get(endpoint).prefill
    assert there.remaining(101.01 + HEARD_S) == pytest.approx(there.queued - HEARD_S)


def test_a_lost_message_that_a_claim_stands_is_mended_by_the_summary() -> None:
    a, b, endpoint = pair()
    made = claim(a, endpoint, 1.0)
    b.hear(a.publish(1.0), 1.01)
    a.registry.work.confirm(made, 1.0 + HEARD_S)
    a.publish(1.0 + HEARD_S)
    b.hear([a.replica.snapshot(1.1)], 1.11)
    there = b.registry.get(endpoint).prefill
    assert there.remaining(101.11) == pytest.approx(there.queued)
    (known,) = there.pending
    assert isinstance(known, Reservation)
    assert not known.tentative


def test_a_claim_that_stands_before_it_is_told_is_told_once() -> None:
    a, _, endpoint = pair()
    a.registry.work.confirm(claim(a, endpoint, 0.1), 0.1)
    told, _ = (KEY.decode(each) for each in a.publish(0.1))
    assert [(each.claimed, len(each.blocks)) for each in told.prefills] == [(False, 16)]
    assert not told.sent
    assert not told.placed


def test_the_blocks_of_a_claimed_prompt_are_told_once() -> None:
    a, b, endpoint = pair()
    made = claim(a, endpoint, 0.1)
    said = a.publish(0.1)
    a.registry.work.confirm(made, 0.2)
    said += a.publish(0.2)
    a.registry.work.prefilled(made, 1000, 0, 0.5)
    a.send(f"{D}-0", 0.5)
    said += a.publish(0.5)
    told = [message for each in said if not (message := KEY.decode(each)).summary]
    assert [len(each.blocks) for message in told for each in (*message.prefills, *message.sent)] == [0, 16]
    assert [len(each.blocks) for message in told for each in message.placed] == [0]
    b.hear(said, 0.51)
    assert len(b.registry.prefixes) == 4
