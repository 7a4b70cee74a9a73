"""What a replica learns of prefills, its own and others', though it hears late how the others' have ended."""

import pytest

from tests.replicas.one import One, P, make_request
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.models import MetricsSnapshot

TRUE = (0.01, 2e-5, 0.0)
"""What prefills really take: seconds for each, each token and each pair."""
LATE = 0.015
LONG, SHORT = 150_000, 1000


def seconds(tokens: int) -> float:
    return TRUE[0] + TRUE[1] * tokens


def send(one: One, now: float, tokens: int, to: str = "prefill-0") -> Reservation:
    return one.registry.work.reserve(one.registry.get(to), make_request(now, tokens, ()))


def learned(one: One, tokens: int) -> float:
    return one.registry.load.prefill.predict((1.0, float(tokens), tokens * tokens / 2))


@pytest.fixture
def two() -> tuple[One, One]:
    """Two replicas that know each other, and what prefills take."""
    both = One("a"), One("b")
    for one in both:
        one.registry.load.prefill.adopt(TRUE)
        for each in one.registry.endpoints(P):
            each.prefill.adopt(one.registry.load.prefill)
    for one, other in (both, both[::-1]):
        other.hear(one.publish(0.0), 0.0)
    return both


def test_a_short_one_that_ends_with_another_replicas_long_one(two: tuple[One, One]) -> None:
    """In one step of the engine: the long one's end is told when that of the short one is long known."""
    now = 1.0
    for turn in range(80):
        ours, theirs = two if turn % 2 else two[::-1]
        long = send(theirs, now, LONG)
        ours.hear(theirs.publish(now), now + LATE)
        short = send(ours, now + 2 * LATE, SHORT)
        theirs.hear(ours.publish(now + 2 * LATE), now + 3 * LATE)
        end = now + seconds(LONG) + seconds(SHORT)
        ours.registry.work.prefilled(short, SHORT, 0, end)
        assert not ours.registry.get("prefill-0").prefill.queued, "it is done with both"
        theirs.registry.work.prefilled(long, LONG, 0, end)
        told = theirs.publish(end), ours.publish(end)
        ours.hear(told[0], end + LATE)
        theirs.hear(told[1], end + LATE)
        now = end + 1.0
    for one in two:
        assert learned(one, SHORT) == pytest.approx(seconds(SHORT), abs=LATE)
        assert learned(one, LONG) == pytest.approx(seconds(LONG), rel=0.1)
        assert not one.replica.disbelieved
        assert not any(e.in_flight or e.prefill.queued for e in one.registry.endpoints(P))


def test_each_of_many_is_learned_from_as_one_would() -> None:
    """Nothing that honest ones have seen is left out, however many they are."""
    ones = [One(name) for name in "abcdefgh"]
    tell_all(ones, 0.0)
    for turn in range(1, 41):
        for one in ones:
            claim = send(one, float(turn), 10_000, f"prefill-{turn % 2}")
            tell_all(ones, float(turn))
            one.registry.work.prefilled(claim, 10_000, 0, turn + seconds(10_000))
            tell_all(ones, turn + seconds(10_000))
    for one in ones:
        assert one.registry.load.prefill.samples == 40 * len(ones)
        assert not one.replica.disbelieved


def tell_all(ones: list[One], now: float) -> None:
    for one in ones:
        told = one.publish(now)
        for other in ones:
            if other is not one:
                other.hear(told, now)


def test_an_instance_is_held_to_what_the_fleet_has_learned_when_it_is_scraped() -> None:
    one = One("a")
    first, load = one.registry.get("prefill-0"), one.registry.load.prefill
    load.adopt((0.0, 1e-6, 0.0))
    first.prefill.adopt(load)
    one.registry.work.prefilled(send(one, 0.0, 1000), 1000, 0, seconds(1000))
    for turn in range(1, 41):
        claim = send(one, 10.0 * turn, LONG, "prefill-1")
        one.registry.work.prefilled(claim, LONG, 0, 10.0 * turn + seconds(LONG))
    expected = learned(one, LONG)
    assert abs(first.prefill.cost(LONG, LONG) / expected - 1.0) > 0.3
    one.registry.scraped(first, MetricsSnapshot(500.0, 0, 0, 0.0), 0)
    assert first.prefill.cost(LONG, LONG) == pytest.approx(expected, rel=0.2)
