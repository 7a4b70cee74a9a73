"""A move is made when it was advised often enough, and long enough after the last one."""

from typing import Any

import pytest

from vllm_pd_scheduler.advice.observation import Observation
from vllm_pd_scheduler.advice.question import Learned, Outcome, Question, Size, Times
from vllm_pd_scheduler.advice.turns import Turns
from vllm_pd_scheduler.advice.verdict import Advice, Kind
from vllm_pd_scheduler.config.turning import TurningConfig
from vllm_pd_scheduler.models import InstanceRole

P, D = InstanceRole.PREFILL, InstanceRole.DECODE
NOW, TIMES = Size(3, 3), Times(1.0, 1.0, 1.0)
KEEP = Advice(Kind.KEEP, "keep")
UNKNOWN = Advice(Kind.UNKNOWN, "who knows")


def move(prefill: int, gain: float = 3.0) -> Advice:
    """Advise a fleet of six with so many P."""
    question = Question([NOW], Learned(*[1.0] * 10), 1.0, 0.0, {}, 1.0)
    seen = Observation(question, None, [], [], 60.0, 1.0, 1.0, None, None)
    outcome = Outcome(Size(prefill, 6 - prefill), TIMES, TIMES, 0.5, 0.5, 0, 100)
    return Advice(Kind.MOVE, "move", [], seen, [], outcome, gain)


def looks(turns: Turns, *advice: Advice, now: float = 0.0, **limits: Any) -> list[InstanceRole | None]:
    return [turns.looked(each, TurningConfig(**{"looks": 3, **limits}), now) for each in advice]


def test_the_same_move_must_be_advised_again_and_again() -> None:
    assert looks(Turns(), move(2), move(2), move(2)) == [None, None, P]
    assert looks(Turns(), move(4), looks=1) == [D]


@pytest.mark.parametrize("between", [KEEP, UNKNOWN, move(4), move(2, gain=1.5)])
def test_another_advice_between_begins_anew(between: Advice) -> None:
    assert looks(Turns(), move(2), move(2), between, move(2), move(2)) == [None] * 5


def test_a_move_that_promises_too_little_is_none() -> None:
    assert looks(Turns(), *[move(2, gain=1.9)] * 5) == [None] * 5
    assert looks(Turns(), *[move(2, gain=1.9)] * 3, gain=1.5) == [None, None, P]


def test_the_next_move_of_the_kind_needs_no_new_looks_and_one_back_a_pause() -> None:
    turns = Turns()
    assert looks(turns, move(2), move(2), move(2))[-1] is P
    turns.turned(P, 0.0, 300.0)
    assert looks(turns, move(1), now=60.0) == [P]
    assert looks(turns, *[move(3, 100.0)] * 3, now=299.0) == [None] * 3
    assert looks(turns, move(3), now=300.0) == [D]


def test_none_begins_during_a_pause() -> None:
    turns = Turns()
    turns.pause(0.0, 300.0)
    assert looks(turns, *[move(2)] * 4, now=299.0) == [None] * 4
    assert looks(turns, move(2), now=300.0) == [P]


def test_a_pause_begins_anew() -> None:
    turns = Turns()
    looks(turns, move(2), move(2))
    turns.pause(0.0, 0.0)
    assert looks(turns, move(2), move(2), move(2)) == [None, None, P]
