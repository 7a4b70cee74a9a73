"""What a broken replica says moves the choices of the others within bounds, and no further."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.replicas.one import KEY, D, One, P, make_registry, make_request, sound
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.models import MetricsSnapshot
from vllm_pd_scheduler.replicas import SILENT_S, Disbelieved, Ignored
from vllm_pd_scheduler.replicas.message import (
    Ask,
    Drawn,
    Ended,
    Handed,
    Held,
    Learned,
    Message,
    PairVerdict,
    Placement,
    Prefill,
    Rates,
    Share,
    pack_blocks,
)
from vllm_pd_scheduler.replicas.plausible import GROWTH, SLACK, UNSCRAPED, most_requests
from vllm_pd_scheduler.scheduler import Scheduler

EACH = 4
PLACE = st.integers(0, 2 * EACH - 1)
HUGE = st.one_of(st.integers(0, 40), st.integers(0, (1 << 62) - 1))
COUNT = st.integers(0, 65535)
PROMPT = st.integers(0, 10_000_000)
BLOCKS = st.lists(st.integers(0, 12), max_size=6).map(pack_blocks)
LIES = st.fixed_dictionaries(
    {},
    optional={
        "shares": st.lists(
            st.builds(Share, PLACE, HUGE, HUGE, st.booleans(), COUNT, COUNT, st.booleans(), HUGE), max_size=8
        ),
        "prefills": st.lists(
            st.builds(Prefill, st.integers(0, 9), PLACE, PROMPT, PROMPT, PROMPT, BLOCKS), max_size=8
        ),
        "ended": st.lists(
            st.builds(Ended, st.integers(0, 9), PROMPT, st.integers(-1, 10_000_000)), max_size=8
        ),
        "placed": st.lists(st.builds(Placement, PLACE, BLOCKS, st.integers(0, 9)), max_size=8),
        "drawn": st.lists(st.builds(Drawn, st.integers(-2, 2), st.just(bytes(8)), st.floats(0, 1e9))),
        "pairs": st.lists(
            st.builds(
                PairVerdict,
                PLACE,
                st.integers(-1, 2 * EACH - 1),
                st.booleans(),
                COUNT,
                COUNT,
                st.booleans(),
            ),
            max_size=8,
        ),
        "handed": st.lists(st.builds(Handed, PLACE, PLACE, st.integers(1, 10_000)), max_size=4),
        "waiting": st.tuples(HUGE, HUGE),
        "blocks": HUGE,
        "asks": st.lists(
            st.builds(Ask, st.sampled_from("ab"), HUGE, HUGE, st.lists(PLACE, max_size=8), st.booleans()),
            max_size=4,
        ),
        "held": st.builds(Held, PLACE, BLOCKS, HUGE, st.booleans()),
        "rates": st.builds(
            Rates,
            st.tuples(st.floats(0, 10), st.floats(0, 0.1)),
            st.lists(st.tuples(PLACE, st.floats(-3, 3)), max_size=4),
            st.lists(st.tuples(PLACE, PLACE, st.floats(-3, 3)), max_size=4),
        ),
        "learned": st.builds(
            Learned, *2 * [st.tuples(st.floats(0, 10), st.floats(0, 0.1), st.floats(0, 0.1))]
        ),
        "summary": st.booleans(),
    },
)


def _lie(number: int, names: list[str], what: dict[str, Any]) -> bytes:
    fields: dict[str, Any] = {"replica": "liar", "number": number, "summary": False, "waiting": (0, 0)}
    return KEY.encode(Message(**(fields | {"endpoints": names} | what)))


def _scrape(one: One, name: str, requests: int, now: float, usage: float = 0.1) -> None:
    endpoint = one.registry.get(name)
    snapshot = MetricsSnapshot(now, requests, 0, usage, kv_capacity=100_000)
    one.registry.scraped(endpoint, snapshot, endpoint.in_flight, endpoint.tokens)


@settings(max_examples=60)
@given(st.lists(LIES, max_size=12), st.randoms(use_true_random=False))
def test_two_honest_ones_and_a_liar(lies: list[dict[str, Any]], random: Random) -> None:
    ones = [One("a", registry=make_registry(EACH)), One("b", registry=make_registry(EACH))]
    names, now = [e.id for e in ones[0].endpoints], 0.0
    for number, lie in enumerate(lies, 1):
        now += 0.3
        for one in ones:
            for _ in range(random.randrange(3)):
                one.send(random.choice(names), now)
            one.end(random.randrange(5), now)
        for one, other in (ones, ones[::-1]):
            other.hear(one.publish(now), now)
            one.hear([_lie(number, names, lie)], now)
        for one in ones:
            sound(one)
            for role in (P, D):
                out = [e for e in one.registry.endpoints(role) if not e.routable]
                assert len(out) <= EACH / 4
            for endpoint in one.endpoints:
                assert endpoint.in_flight <= UNSCRAPED + 40
        if number % 3:
            continue
        for place, name in enumerate(names):
            there = sum(each.ours()[place][0] for each in ones)
            for one in ones:
                _scrape(one, name, there, now)
                endpoint = one.registry.get(name)
                assert endpoint.requests <= most_requests(there)
                assert endpoint.tokens_elsewhere <= 100_000 * (most_requests(there) if "pre" in name else 1)
                assert endpoint.handoffs <= UNSCRAPED
    now += SILENT_S + 0.1
    for one, other in (ones, ones[::-1]):
        told = one.publish(now)
        other.hear(told, now)
    for one, other in (ones, ones[::-1]):
        other.hear(one.publish(now + 0.1), now + 0.1)
        one.publish(now + 0.1)
    sums = [(a[0] + b[0]) for a, b in zip(ones[0].ours(), ones[1].ours(), strict=True)]
    for one in ones:
        for place, name in enumerate(names):
            _scrape(one, name, sum(each.ours()[place][0] for each in ones), now + 0.2)
        assert one.replica.others == ["b" if one.name == "a" else "a"]
        assert [each[0] for each in one.loads()] == sums


def _share_of_favoured(lie: Callable[[int, list[str]], dict[str, Any]] | None) -> float:
    """Return which part of an honest one's requests goes to the D of which a liar claims nothing."""
    config = SchedulerConfig(strategy="least_load")
    a = One("a", registry=make_registry(EACH))
    scheduler, names = Scheduler(config, a.registry, seed=1), [e.id for e in a.endpoints]
    running: list[tuple[float, Reservation]] = []
    gets: Counter[str] = Counter()
    for step in range(3000):
        now = step / 50
        if lie is not None and step % 5 == 0:
            a.hear([_lie(step + 1, names, lie(step, names))], now)
        while running and running[0][0] <= now:
            running.pop(0)[1].release(now)
        request = make_request(now)
        reservation = a.registry.work.reserve(scheduler.pick(D, request)[0], request)
        running.append((now + 4.0, reservation))
        if now > 10.0:
            gets[reservation.endpoint.id] += 1
        if step % 50 == 0:
            there = Counter(each.endpoint.id for _, each in running)
            for name in names:
                _scrape(a, name, there[name], now)
    return gets["decode-0"] / gets.total()


def test_claims_of_load_move_little() -> None:
    def lie(step: int, names: list[str]) -> dict[str, Any]:
        shares = [Share(place, 10_000, 10**9) for place, name in enumerate(names) if name != "decode-0"]
        return {"shares": shares, "summary": step % 50 == 0}

    assert _share_of_favoured(None) == pytest.approx(0.25, abs=0.02)
    # Each other seems to have a quarter more than it says, and 16: 200 requests are spread as 68 and 3 * 44.
    assert _share_of_favoured(lie) < 0.42


def test_prefills_that_a_p_does_not_have_are_dropped() -> None:
    one = One("a")
    names = [e.id for e in one.endpoints]
    leak = [Prefill(number, 0, 10_000_000) for number in range(1000)]
    one.hear([_lie(1, names, {"prefills": leak, "summary": True})], 0.0)
    endpoint = one.registry.get("prefill-0")
    _scrape(one, "prefill-0", 4, 1.0)
    assert len(list(endpoint.prefill.pending)) <= 5
    assert endpoint.prefill.queued <= 5.1 * endpoint.prefill.cost(LONGEST, LONGEST)
    _scrape(one, "prefill-0", 0, 4.0)
    assert endpoint.prefill.queued == 0.0
    assert one.replica.disbelieved[Disbelieved.PREFILLS] >= 995
    one.hear([_lie(2, names, {"prefills": leak, "summary": True})], 5.0)  # the same again
    assert endpoint.prefill.queued == 0.0


LONGEST = 1_000_000


def test_growth_between_two_scrapes_is_bounded() -> None:
    one = One("a")
    _scrape(one, "decode-0", 3, 0.0)
    one.hear([_lie(1, ["decode-0"], {"shares": [Share(0, 10_000, 10**9)], "summary": True})], 0.1)
    endpoint = one.registry.get("decode-0")
    assert endpoint.in_flight == GROWTH
    _scrape(one, "decode-0", 3, 1.0)
    assert endpoint.in_flight == 3 + SLACK
    one.hear([_lie(2, ["decode-0"], {"shares": [Share(0, 20_000, 10**9)]})], 1.1)
    assert endpoint.in_flight == 3 + SLACK
    one.hear([_lie(3, ["decode-0"], {"shares": [Share(0, 3, 3000)]})], 1.2)
    _scrape(one, "decode-0", 3, 2.0)
    one.hear([_lie(4, ["decode-0"], {"shares": [Share(0, 9, 9000)]})], 2.1)
    assert endpoint.in_flight == 9  # it is believed again


def test_times_that_cannot_be_teach_nothing_beyond_bounds() -> None:
    one, now = One("a"), 0.0
    load = one.registry.load.prefill

    def serve(now: float) -> None:
        claim = one.send("prefill-0", now, 10_000)
        one.registry.work.prefilled(claim, 10_000, 0, now + 1.0)
        one.claims.clear()

    for _ in range(50):
        serve(now := now + 2.0)
    assert load.predict((1.0, 10_000.0, 5e7)) == pytest.approx(1.0, rel=0.05)
    number = 0
    for _ in range(300):
        serve(now := now + 2.0)
        for _ in range(4):
            number += 2
            begun = {"prefills": [Prefill(number, 0, 1_000_000)], "summary": number == 2}
            one.hear([_lie(number, ["prefill-1"], begun)], now)
            one.hear([_lie(number + 1, ["prefill-1"], {"ended": [Ended(number, 1_000_000, 0)]})], now + 0.01)
    assert load.predict((1.0, 10_000.0, 5e7)) == pytest.approx(1.0, rel=0.2)
    assert one.replica.disbelieved[Disbelieved.TIMES] > 100


def test_times_that_could_be_teach_within_bounds() -> None:
    """It always says half of what is predicted here, and says it ten times as often as we have prefills."""
    one, now, number = One("a"), 0.0, 0
    load = one.registry.load.prefill
    for _ in range(200):
        claim = one.send("prefill-0", now := now + 2.0, 10_000)
        one.registry.work.prefilled(claim, 10_000, 0, now + 1.0)
        one.claims.clear()
        for _ in range(10):
            number, now = number + 2, now + 1.0
            takes = load.predict((1.0, 10_000.0, 5e7)) / 1.9
            begun = {"prefills": [Prefill(number, 0, 10_000)], "summary": number == 2}
            one.hear([_lie(number, ["prefill-1"], begun)], now)
            one.hear([_lie(number + 1, ["prefill-1"], {"ended": [Ended(number, 10_000, 0)]})], now + takes)
    assert load.predict((1.0, 10_000.0, 5e7)) > 0.4


def test_a_storm_is_cut_off_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    one = One("a")
    storm = [_lie(number, [], {"summary": True}) for number in range(1, 3000)]
    with caplog.at_level(logging.WARNING):
        one.hear(storm, 0.0)
    assert one.replica.received == 1000
    assert one.replica.ignored == {Ignored.TOO_OFTEN: 1999}
    assert len(caplog.records) == 1
    one.hear([_lie(4000, [], {})], 1.0)
    assert one.replica.received == 1001


def test_what_is_not_believed_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    one = One("a")
    with caplog.at_level(logging.WARNING):
        for number in range(1, 51):
            drawn = [Drawn(0, bytes(8), 1e7 * number)]
            one.hear([_lie(number, [], {"drawn": drawn, "summary": number == 1})], number / 10)
    assert one.replica.disbelieved == {Disbelieved.DRAWS: 49}
    assert ["draws" in each.getMessage() for each in caplog.records] == [True]
