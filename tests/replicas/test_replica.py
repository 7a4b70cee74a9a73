"""Replicas that hear of each other late, twice, in any order or not at all."""

from __future__ import annotations

import logging
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.replicas.one import KEY, D, One, sound
from vllm_pd_scheduler.fleet.breaker import BreakerState
from vllm_pd_scheduler.models import MetricsSnapshot
from vllm_pd_scheduler.replicas import AT_ONCE, BATCH_S, SILENT_S, FleetKey, Ignored
from vllm_pd_scheduler.replicas.message import MAX_BYTES, Message, Share
from vllm_pd_scheduler.replicas.plausible import UNSCRAPED

ACTIONS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["prefill-0", "prefill-1", "decode-0", "decode-1", "end", "restart", "publish"]),
        st.integers(0, 20),
    ),
    max_size=60,
)


@given(ACTIONS, st.randoms(use_true_random=False))
def test_any_order_loss_and_doubling_ends_in_the_right_sums(
    actions: list[tuple[int, str, int]], random: Random
) -> None:
    ones = [One("a"), One("b", 1e6), One("c", -500.0)]
    mail: list[tuple[One, bytes]] = []
    now = 1000.0
    for who, what, number in actions:
        one, now = ones[who], now + 0.02
        if what == "end":
            one.end(number, now)
        elif what == "restart":
            for each in ones:
                each.registry.started(each.registry.get("prefill-0"), now)
        elif what == "publish":
            for data in one.publish(now):
                mail += [
                    (other, data) for other in ones if other is not one for _ in range(random.randrange(3))
                ]
        else:
            one.send(what, now, 100 + number)
        random.shuffle(mail)
        for _ in range(random.randrange(1 + len(mail))):
            to, data = mail.pop()
            to.hear([data], now)
            sound(to)
    now += 1.5
    for one in ones:
        told = one.publish(now)
        assert told
        for other in ones:
            if other is not one:
                other.hear(told, now)
    for one in ones:
        sound(one)
    sums = [tuple(map(sum, zip(*each, strict=True))) for each in zip(*(o.ours() for o in ones), strict=True)]
    for one in ones:
        for (requests, tokens, _), expected in zip(one.loads(), sums, strict=True):
            assert requests == expected[0]
            assert abs(tokens - expected[1]) <= 3  # each rounds
        assert [each[2] for each in one.loads()] == [each[2] for each in ones[0].loads()]


def test_a_prefill_that_comes_and_goes_between_two_messages_is_cached_and_never_queued() -> None:
    a, b = One("a"), One("b")
    a.send("decode-0", 0.0, blocks=())
    b.hear(a.publish(0.0), 0.0)
    a.send("prefill-0", 0.001, blocks=(5, 6))
    a.end(1, 0.002)
    a.send("decode-1", 0.002, blocks=(5, 6))
    b.hear(a.publish(0.01), 0.01)
    p, d = (b.registry.get(each) for each in ("prefill-0", "decode-1"))
    assert b.registry.prefixes.match((5, 6)) == {p.holder: 2, d.holder: 2}
    assert not list(p.prefill.pending)
    assert (p.in_flight, d.in_flight) == (0, 1)
    assert b.registry.load.prefill.samples == 0, "it was not seen to run"


def test_what_another_has_counts_as_ours() -> None:
    a, b = One("a"), One("b")
    claim = a.send("prefill-0", 0.0)
    b.hear(a.publish(0.0), 0.01)
    mine, theirs = a.registry.get("prefill-0"), b.registry.get("prefill-0")
    assert (theirs.in_flight, theirs.elsewhere, round(theirs.tokens)) == (1, 1, 1000)
    assert theirs.prefill.queued == pytest.approx(mine.prefill.queued)
    assert b.registry.prefixes.match((1, 2)) == {theirs.holder: 2}
    b.registry.scraped(theirs, MetricsSnapshot(0.02, 1, 0, 0.0), theirs.in_flight, theirs.tokens)
    assert theirs.requests == 1  # as scraped it is the same request
    a.registry.work.prefilled(claim, 1000, 0, 0.5)
    b.hear(a.publish(0.5), 0.51)
    assert (theirs.in_flight, theirs.tokens, theirs.prefill.queued) == (0, 0.0, 0.0)
    assert b.registry.load.prefill.coefficients == a.registry.load.prefill.coefficients


def test_one_that_is_silent_is_forgotten_with_its_requests_and_its_old_messages_count_no_more() -> None:
    a, b = One("a"), One("b")
    a.send("prefill-0", 0.0)
    a.send("decode-0", 0.0)
    told = a.publish(0.0)
    b.hear(told, 0.0)
    assert b.replica.others == ["a"]
    assert b.replica.waiting_elsewhere == (1, 2)
    b.publish(SILENT_S)
    assert b.replica.others == []
    assert b.loads() == [(0, 0, 0)] * 4
    b.hear(told, SILENT_S)
    assert b.replica.others == []
    assert b.replica.ignored == {Ignored.REPLAYED: len(told)}
    b.hear(a.publish(SILENT_S + 1), SILENT_S + 1)
    assert b.loads() == a.loads()


def test_one_that_joins_is_told_all_at_once() -> None:
    a, b = One("a"), One("b")
    a.send("decode-1", 0.0)
    a.publish(0.0)
    a.hear(b.publish(0.1), 0.1)
    assert a.replica.next_publish(0.1) == 0.1
    b.hear(a.publish(0.1), 0.1)
    assert b.loads() == a.loads()


def test_ejection_and_the_one_trial_are_of_all() -> None:
    a, b = One("a"), One("b")
    a.hear(b.publish(0.0), 0.0)
    b.hear(a.publish(0.0), 0.0)
    mine, theirs = a.registry.get("decode-0"), b.registry.get("decode-0")
    for _ in range(3):
        a.registry.ends.failed(mine, "it fails", 1.0)
    b.hear(a.publish(1.0), 1.0)
    assert theirs.ejected
    a.hear(b.publish(1.1), 1.1)  # what b took over is no news to a
    for one, endpoint in ((a, mine), (b, theirs)):
        one.registry.probed(endpoint, None, 2.5)
        assert endpoint.breaker.state is BreakerState.HALF_OPEN
    trial = a.send("decode-0", 2.6)
    b.hear(a.publish(2.6), 2.6)
    assert theirs.on_trial
    assert not theirs.on_our_trial
    assert mine.on_our_trial
    a.registry.ends.succeeded(mine)
    trial.release(2.7)
    b.hear(a.publish(2.7), 2.7)
    assert theirs.breaker.state is BreakerState.CLOSED
    assert not theirs.on_trial


def test_no_more_are_ejected_than_may_be() -> None:
    a, b = One("a"), One("b")
    a.hear(b.publish(0.0), 0.0)
    b.hear(a.publish(0.0), 0.0)
    for name in ("decode-0", "decode-1"):
        for _ in range(3):
            a.registry.ends.failed(a.registry.get(name), "it fails", 1.0)
    b.hear(a.publish(1.0), 1.0)
    assert len(b.registry.ejected(D)) == 1


def _message(number: int = 1, **what: object) -> Message:
    fields: dict[str, object] = {
        "replica": "x", "number": number, "summary": True, "waiting": (0, 0), "endpoints": ["decode-0"],
    }  # fmt: skip
    return Message(**(fields | what))  # type: ignore[arg-type]


BAD = {
    "empty": (b"", Ignored.GARBAGE),
    "no message": (b"hello, this is no message at all", Ignored.GARBAGE),
    "cut": (KEY.encode(_message())[:-1], Ignored.GARBAGE),
    "more": (KEY.encode(_message()) + b"x", Ignored.GARBAGE),
    "long": (b"PDR\2" + bytes(MAX_BYTES), Ignored.TOO_LONG),
    "version": (b"PDR\1" + KEY.encode(_message())[4:], Ignored.VERSION),
    "fleet": (FleetKey("another").encode(_message()), Ignored.FLEET),
    "negative": (KEY.encode(_message(shares=[Share(0, -1, 0)])), Ignored.GARBAGE),
    "huge": (KEY.encode(_message(shares=[Share(0, 1 << 63, 0)])), Ignored.GARBAGE),
    "no such place": (KEY.encode(_message(shares=[Share(1, 1, 0)])), Ignored.GARBAGE),
    "no name": (KEY.encode(_message(replica="")), Ignored.GARBAGE),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_message_for_us_is_ignored_counted_and_said_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    one, (data, reason) = One("a"), BAD[name]
    with caplog.at_level(logging.WARNING):
        one.hear([data, data], 0.0)
    assert one.replica.ignored == {reason: 2}
    assert one.loads() == [(0, 0, 0)] * 4
    assert [reason.value in record.getMessage() for record in caplog.records] == [True]


@given(st.binary(max_size=80))
def test_bytes_never_raise(tail: bytes) -> None:
    one = One("a")
    one.hear([tail, KEY.encode(_message())[:12] + tail], 0.0)
    sound(one)


def test_a_number_from_the_future_blocks_nothing() -> None:
    one = One("a")
    one.hear([KEY.encode(_message(number)) for number in (5, 1 << 40, 6, 6, 5)], 0.0)
    assert one.replica.received == 2
    assert one.replica.ignored == {Ignored.FUTURE: 1, Ignored.REPLAYED: 2}


def test_nonsense_is_bounded_and_gone_with_the_next_summary() -> None:
    one = One("a")
    one.send("decode-0", 0.0)
    one.hear([KEY.encode(_message(1, shares=[Share(0, 1 << 61, 1 << 61)]))], 0.0)
    assert one.registry.get("decode-0").in_flight == UNSCRAPED + 1
    one.hear([KEY.encode(_message(2, endpoints=[]))], 0.0)
    assert one.loads()[1][0] == 1
    sound(one)


def test_nothing_is_told_twice() -> None:
    a = One("a")
    a.send("prefill-0", 0.0)
    assert len(a.publish(0.0)) == 2  # the changes and the summary
    assert a.publish(0.5) == []
    assert a.replica.next_publish(0.5) == 1.0


def test_what_happens_is_told_at_once_where_little_has_happened_and_else_in_batches() -> None:
    a, now = One("a"), 0.0
    a.publish(now)
    waits = []
    for _ in range(2 * AT_ONCE):
        a.send("prefill-0", now)
        waits.append(a.replica.next_publish(now) - now)
        now += waits[-1]
        assert a.publish(now)
    assert waits[:AT_ONCE] == pytest.approx([0.0] * AT_ONCE)
    assert waits[AT_ONCE:] == pytest.approx([BATCH_S] * AT_ONCE)
    assert a.replica.next_publish(now) > now + BATCH_S, "nothing has happened"
    now += AT_ONCE * BATCH_S
    a.send("prefill-0", now)
    assert a.replica.next_publish(now) == now
