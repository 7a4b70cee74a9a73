"""The order of a publisher's batches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_scheduler.kv_events.in_order import InOrder


def batch(number: int) -> bytes:
    return b"%d" % number


def test_without_replay_what_was_before_is_not_missed() -> None:
    order = InOrder(can_replay=False)
    order.began()
    assert order.live(500, batch(500)) == (False, [batch(500)])
    assert order.live(503, batch(503)) == (False, [batch(503)])
    assert (order.lost, order.asks_from) == (2, None)


def test_what_was_lost_is_asked_for() -> None:
    order = InOrder(can_replay=True)
    order.began()
    assert order.asks_from == 0
    order.asks_from = None
    assert order.live(2, batch(2)) == (False, [])
    assert order.replayed(0, batch(0)) == [batch(0)]
    assert order.replayed(1, batch(1)) == [batch(1), batch(2)]
    assert order.replayed(-1, b"") == []
    assert order.live(5, batch(5)) == (False, [])
    assert order.asks_from == 3
    assert order.replayed(3, batch(3)) == [batch(3)]
    assert order.replayed(-1, b"") == []
    assert order.asks_from == 4, "it may have come while the publisher answered"
    assert order.replayed(-1, b"") == [batch(5)]  # it has no more of them
    assert order.lost == 1


def test_a_ring_that_has_forgotten_the_beginning() -> None:
    order = InOrder(can_replay=True)
    order.began()
    assert order.replayed(7, batch(7)) == [batch(7)]
    assert order.replayed(-1, b"") == []
    assert order.lost == 0


def test_a_publisher_that_begins_anew() -> None:
    order = InOrder(can_replay=False)
    order.began()
    order.live(7, batch(7))
    assert order.live(0, batch(0)) == (True, [batch(0)])
    assert (order.restarts, order.lost) == (1, 0)


@given(st.sets(st.integers(0, 30)), st.integers(0, 10), st.booleans())
def test_each_comes_once_and_in_order(dropped: set[int], oldest: int, replays: bool) -> None:
    """Whatever is dropped on the way, and however much the ring has forgotten."""
    order = InOrder(can_replay=replays)
    order.began()
    seen: list[int] = []

    def serve() -> None:
        while order.asks_from is not None:
            first, order.asks_from = order.asks_from, None
            for number in range(max(first, oldest), now + 1):
                seen.extend(map(int, order.replayed(number, batch(number))))
            seen.extend(map(int, order.replayed(-1, b"")))

    for now in range(31):
        serve() if now == 3 else None
        if now not in dropped:
            seen.extend(map(int, order.live(now, batch(now))[1]))
            serve()
    assert seen == sorted(set(seen))
    assert set(range(31)) - dropped <= set(seen)
    if replays and seen:
        assert set(range(max(oldest, 0), max(seen) + 1)) <= set(seen)
        assert order.lost == 0 or oldest


def test_what_is_lost_while_a_replay_ends_is_asked_for_too() -> None:
    order = InOrder(can_replay=True)
    order.began()
    assert order.asks_from == 0
    order.asks_from = None
    assert order.replayed(0, b"0") == [b"0"]
    assert order.live(2, b"2") == (False, [])
    assert order.replayed(-1, b"") == []
    assert order.asks_from == 1
    order.asks_from = None
    assert order.replayed(1, b"1") == [b"1", b"2"]
    assert order.replayed(2, b"2") == []
    assert order.replayed(-1, b"") == []
    assert (order.lost, order.asks_from) == (0, None)


def test_what_a_replay_does_not_have_is_not_asked_for_again() -> None:
    order = InOrder(can_replay=True)
    order.began()
    order.replayed(0, b"0")
    order.live(2, b"2")
    order.replayed(-1, b"")
    assert order.asks_from == 1
    assert order.replayed(-1, b"") == [b"2"]
    assert (order.lost, order.asks_from) == (1, None)
