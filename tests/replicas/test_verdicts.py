"""What one replica finds of instances and pairs holds for all, but not more of it than one may say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pytest

from tests.replicas.one import KEY, D, One, P, make_registry
from vllm_pd_scheduler.fleet.breaker import BreakerState
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.models import MetricsSnapshot
from vllm_pd_scheduler.replicas import SILENT_S, Disbelieved
from vllm_pd_scheduler.replicas.message import Message, PairVerdict, Share


class Tried(NamedTuple):
    """Two replicas, and what each has of one instance."""

    a: One
    b: One
    mine: Endpoint
    """That of ``a``."""
    theirs: Endpoint


def _introduce(*ones: One) -> None:
    for one in ones:
        told = one.publish(0.0)
        for other in ones:
            if other is not one:
                other.hear(told, 0.0)


def _tell(one: One, others: Iterable[One], now: float) -> None:
    told = one.publish(now)
    for other in others:
        other.hear(told, now)


def _eject(one: One, name: str, now: float) -> None:
    while one.registry.get(name).breaker.state is not BreakerState.OPEN:
        one.registry.ends.failed(one.registry.get(name), "it fails", now)


def _half_open(now: float, *ones: One) -> list[Endpoint]:
    found = [one.registry.get("decode-0") for one in ones]
    for one, endpoint in zip(ones, found, strict=True):
        one.registry.probed(endpoint, None, now)
        assert endpoint.breaker.state is BreakerState.HALF_OPEN
    return found


@pytest.fixture
def tried() -> Tried:
    """One that ``a`` has ejected and of which it has told ``b``, and whose pause is over for both."""
    a, b = One("a"), One("b")
    _introduce(a, b)
    _eject(a, "decode-0", 1.0)
    _tell(a, [b], 1.0)
    return Tried(a, b, *_half_open(2.5, a, b))


# -- instances


def test_two_trials_that_begin_at_once_may_both_run_and_either_decides() -> None:
    a, b, c = One("a"), One("b"), One("c")
    _introduce(a, b, c)
    _eject(a, "decode-0", 1.0)
    _tell(a, (b, c), 1.0)
    mine, theirs, third = _half_open(2.5, a, b, c)
    first, second = a.send("decode-0", 2.6), b.send("decode-0", 2.6)
    _tell(a, (b, c), 2.61)
    _tell(b, (a, c), 2.61)
    assert mine.on_our_trial
    assert theirs.on_our_trial
    assert third.on_trial
    assert not third.on_our_trial
    first.release(2.7)  # a client that left: it says nothing
    _tell(a, (b, c), 2.7)
    assert mine.breaker.state is BreakerState.HALF_OPEN
    b.registry.ends.succeeded(theirs)
    second.release(2.8)
    _tell(b, (a, c), 2.8)
    assert {e.breaker.state for e in (mine, theirs, third)} == {BreakerState.CLOSED}


def test_a_trial_that_fails_has_all_wait_again(tried: Tried) -> None:
    a, b, mine, theirs = tried
    a.send("decode-0", 2.6)
    _tell(a, [b], 2.6)
    a.registry.ends.failed(mine, "it fails", 2.7)
    _tell(a, [b], 2.7)
    assert theirs.breaker.state is BreakerState.OPEN
    assert theirs.breaker.not_before == pytest.approx(mine.breaker.not_before)


def test_the_trial_of_a_replica_that_dies_is_anothers(tried: Tried) -> None:
    a, b, _, theirs = tried
    a.send("decode-0", 2.6)
    _tell(a, [b], 2.6)
    assert theirs.on_trial
    b.publish(2.7 + SILENT_S)
    assert not theirs.on_trial
    b.send("decode-0", 6.0)
    assert theirs.on_our_trial


def test_a_trial_that_never_ends_keeps_nobody_away_for_ever() -> None:
    b = One("b")
    names = ["decode-0"]
    b.hear([KEY.encode(Message("x", 1, True, (0, 0), names, [Share(0, 0, 0)]))], 0.9)
    _eject(b, "decode-0", 1.0)
    (theirs,) = _half_open(2.5, b)
    for number in range(2, 70):
        b.hear([KEY.encode(Message("x", number, True, (0, 0), names, [Share(0, 1, 9, True)]))], 2.0 + number)
        assert theirs.on_trial is (number <= 62)
    assert b.replica.disbelieved == {Disbelieved.TRIALS: 1}


def test_an_instance_that_serves_us_is_not_ejected_again_by_one_that_cannot_reach_it(tried: Tried) -> None:
    a, b, mine, theirs = tried
    b.send("decode-0", 2.6)
    b.registry.ends.succeeded(theirs)
    assert theirs.breaker.state is BreakerState.CLOSED
    _eject(a, "decode-0", 2.7)
    _tell(a, [b], 2.7)
    assert theirs.breaker.state is BreakerState.CLOSED
    assert b.replica.disbelieved == {Disbelieved.EJECTIONS: 1}
    a.registry.probed(mine, None, 9.0)
    a.registry.ends.succeeded(mine)
    _tell(a, [b], 9.0)
    _eject(a, "decode-0", 9.1)
    _tell(a, [b], 9.1)
    assert theirs.breaker.state is BreakerState.OPEN  # it was well for both, and is not any more


def test_by_the_word_of_one_no_more_than_a_quarter_is_out() -> None:
    one = One("a", registry=make_registry(8))
    names = [e.id for e in one.endpoints]
    shares = [Share(place, 0, 0, False, 1, 0, True) for place in range(len(names))]
    one.hear([KEY.encode(Message("x", 1, True, (0, 0), names, shares))], 1.0)
    assert [len(one.registry.ejected(role)) for role in (P, D)] == [2, 2]
    assert one.replica.disbelieved == {Disbelieved.EJECTIONS: 12}


def test_a_recovery_before_there_can_be_a_trial_is_not_believed() -> None:
    a = One("a")
    a.hear([KEY.encode(Message("x", 1, True, (0, 0), ["decode-0"], [Share(0, 0, 0)]))], 0.9)
    _eject(a, "decode-0", 1.0)
    for number in range(2, 6):
        share = Share(0, 0, 0, False, 0, number)
        a.hear([KEY.encode(Message("x", number, False, (0, 0), ["decode-0"], [share]))], 1.0 + number / 100)
    assert a.registry.get("decode-0").breaker.state is BreakerState.OPEN
    assert a.replica.disbelieved == {Disbelieved.RECOVERIES: 4}


def test_a_drain_waits_for_what_others_have_there() -> None:
    a, b = One("a"), One("b")
    _introduce(a, b)
    claim = b.send("prefill-0", 1.0)
    theirs, mine = b.registry.get("prefill-0"), a.registry.get("prefill-0")
    _tell(b, [a], 1.0)
    for one in (a, b):
        one.registry.drain("prefill-0")
    assert not mine.drained
    theirs.keep_handoff()
    claim.release(1.1)
    _tell(b, [a], 1.1)
    assert (mine.in_flight, mine.handoffs, mine.pending_handoffs) == (0, 1, 0)
    assert not mine.drained
    theirs.end_handoff()
    _tell(b, [a], 1.2)
    assert mine.drained


# -- pairs


def _fail_pair(one: One, now: float) -> tuple[Endpoint, Endpoint]:
    prefill, decode = one.registry.get("prefill-0"), one.registry.get("decode-0")
    for _ in range(3):
        one.registry.ends.failed(decode, "no hand-off", now, handed_over_by=prefill)
        one.registry.ends.succeeded(decode)
        one.registry.pairs.failed(prefill, decode, now, served=True)
    return prefill, decode


def test_a_pair_that_fails_is_left_out_by_all_and_one_trial_has_it_back() -> None:
    a, b, c = One("a"), One("b"), One("c")
    _introduce(a, b)
    prefill, decode = _fail_pair(a, 1.0)
    assert a.registry.left_out.barred(prefill, 1.1) == (decode,)
    _tell(a, [b], 1.1)
    theirs = b.registry.get("prefill-0"), b.registry.get("decode-0")
    assert b.registry.left_out.barred(theirs[0], 1.2) == (theirs[1],)
    assert not [pair for data in b.publish(1.15) for pair in KEY.decode(data).pairs]  # it is no news of b's
    for one in (a, b):
        c.hear(one.publish(2.2), 2.2)  # it joins
    assert c.registry.pairs.is_out(c.registry.get("prefill-0"), c.registry.get("decode-0"))
    assert not b.registry.left_out.barred(theirs[0], 3.0)  # on trial
    b.registry.pairs.succeeded(*theirs)
    _tell(b, [a, c], 3.0)
    for one in (a, b, c):
        assert not list(one.registry.pairs.out())


def test_a_pair_with_wrong_texts_too() -> None:
    a, b = One("a"), One("b")
    _introduce(a, b)
    mine = a.registry.get("prefill-0"), a.registry.get("decode-1")
    theirs = b.registry.get("prefill-0"), b.registry.get("decode-1")
    a.registry.wrong_pairs.leave_out(*mine, "4 of 4")
    _tell(a, [b], 1.0)
    assert [each[:2] for each in b.registry.wrong_pairs] == [theirs]
    b.registry.wrong_pairs.take_back(*theirs)
    _tell(b, [a], 1.1)
    assert not a.registry.wrong_pairs


def test_transfers_that_fail_at_a_d_are_put_down_to_the_pair_that_another_uses() -> None:
    a, b = One("a"), One("b")
    _introduce(a, b)
    now = 0.0
    for turn in range(60):
        now += 1.0
        if any(one.registry.left_out for one in (a, b)):
            break
        failed = 1 + turn % 5
        for one, prefill, count in ((a, "prefill-0", 1 + turn % 3), (b, "prefill-1", failed)):
            for _ in range(count):
                one.registry.work.handed_over(one.registry.get(prefill), one.registry.get("decode-0"))
            _tell(one, [a if one is b else b], now)
        for one in (a, b):
            decode = one.registry.get("decode-0")
            snapshot = MetricsSnapshot(now, 1, 0, 0.1, failed_transfers=float(failed))  # all of b's
            one.registry.scraped(decode, snapshot, 0)
    _tell(a, [b], now + 0.1)
    _tell(b, [a], now + 0.1)
    for one in (a, b):
        assert [(p.id, d and d.id) for p, d, _ in one.registry.pairs.out()] == [("prefill-1", "decode-0")]


def test_no_more_pairs_are_left_out_by_the_word_of_one_than_may_be() -> None:
    one = One("a", registry=make_registry(4))
    names = [e.id for e in one.endpoints]
    pairs = [
        PairVerdict(p, d, wrong, 1, 0, True)
        for p in range(0, 8, 2)
        for d in (-1, *range(1, 8, 2))
        for wrong in (False, True)
        if d >= 0 or not wrong
    ]
    one.hear([KEY.encode(Message("x", 1, True, (0, 0), names, pairs=pairs))], 1.0)
    registry = one.registry
    useless = [p for p in registry.endpoints(P) if registry.left_out.useless(p, registry.endpoints(D), 1.0)]
    assert len(useless) <= 1
    for decode in registry.endpoints(D):
        barred = [p for p in registry.endpoints(P) if decode in registry.left_out.barred(p, 1.0)]
        assert len(barred) <= 2
    assert one.replica.disbelieved[Disbelieved.PAIRS] > 10
