"""Which request continues which, as far as prompts tell."""

from vllm_pd_scheduler.replay.conversations import linked
from vllm_pd_scheduler.replay.trace import Trace, TraceRequest


def link(*requests: tuple[int, int, tuple[int, ...]], size: int = 10) -> list[TraceRequest]:
    """Of tokens in, tokens out and blocks, a second apart."""
    made = [TraceRequest(float(at), *each) for at, each in enumerate(requests)]
    return linked(Trace(made, size)).requests


def test_a_turn_tells_the_answer_before_it() -> None:
    first, other, second, third = link(
        (25, 20, (1, 2)), (31, 5, (1, 8, 9)), (60, 3, (1, 2, 3, 4, 5, 6)), (79, 1, (1, 2, 3, 4, 5, 6, 7))
    )
    assert (first.answer, second.answer, third.answer, other.answer) == ((3, 4), (), (), ())
    assert first.session == second.session == third.session != other.session
    assert (second.after, third.after) == ((first.name,), (second.name,))
    assert first.after == other.after == ()


def test_what_many_begin_with_is_no_conversation() -> None:
    requests = link(*((15, 2, (1,)) for _ in range(4)), (40, 2, (1, 2, 3, 4)))
    assert {each.after for each in requests[1:4]} == {()}
    # The first prompt was new, so it may be the one that goes on. The others were not.
    assert requests[4].after == (requests[0].name,)


def test_a_prompt_that_has_no_room_for_the_answer_does_not_continue() -> None:
    first, second = link((20, 30, (1, 2)), (40, 2, (1, 2, 3, 4)))
    assert first.session != second.session


def test_a_prompt_is_continued_once_and_the_longest_one() -> None:
    first, longer, second, fork = link(
        (20, 1, (1, 2)), (40, 1, (1, 2, 3, 4)), (60, 1, (1, 2, 3, 4, 5, 6)), (60, 1, (1, 2, 3, 4, 7, 8))
    )
    assert longer.after == (first.name,)
    assert second.after == (longer.name,)
    assert fork.after == ()


def test_what_the_trace_says_is_kept() -> None:
    said = [
        TraceRequest(0.0, 20, 10, (1, 2), "a", "one"),
        TraceRequest(1.0, 40, 1, (1, 2, 3, 4), "b", "two", ("zero",), 3.0),
    ]
    first, second = linked(Trace(said, 10)).requests
    assert (first.name, first.session, first.answer) == ("one", "a", (3,))
    assert (second.name, second.session, second.after, second.pause) == ("two", "b", ("zero",), 3.0)


def test_requests_without_blocks_are_alone() -> None:
    assert [each.after for each in link((5, 1, ()), (5, 1, ()))] == [(), ()]
