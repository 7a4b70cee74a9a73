"""What follows from the replays."""

import unittest
from typing import Any

from vllm_pd_scheduler.advice.observation import Observation
from vllm_pd_scheduler.advice.question import Answer, Learned, Outcome, Question, Size, Times
from vllm_pd_scheduler.advice.verdict import Advice, Kind, gain, judge

NOW = Size(4, 4)


def outcome(
    size: Size, ttft: float | None, tpot: float | None, in_limits: float = 1.0, **more: Any
) -> Outcome:
    times = Times(ttft, tpot, in_limits)
    return Outcome(size, times, more.get("latest", times), more.get("busy", 0.5), 0.5, 0, 500)


def observed(*sizes: Size, asked: Size | None = None, rate: float = 1.0, **limits: float) -> Observation:
    learned = Learned(0.005, 1e-4, 0.0, 0.015, 2e-4, 2e-8, 0.01, 0.0, 1e6, 1e6)
    question = Question([NOW, *sizes], learned, rate, 0.0, dict(limits), 20.0)
    return Observation(question, asked, [], [], 300.0, 2000.0, 200.0, None, 0.8)


def advised(*outcomes: Outcome, asked: Size | None = None, **more: Any) -> Advice:
    now, *others = outcomes
    return judge(observed(*(each.size for each in others), asked=asked, **more), Answer([now, *others]))


class VerdictTest(unittest.TestCase):
    def test_the_better_move_is_advised(self) -> None:
        found = advised(
            outcome(NOW, 1.0, 0.03), outcome(Size(3, 5), 2.0, 0.029), outcome(Size(5, 3), 0.69, 0.031)
        )
        self.assertEqual(found.kind, Kind.MOVE)
        self.assertEqual(found.text, "move one D to P: -31 % p90 TTFT, +3 % p90 TPOT at this load")
        assert found.move is not None
        self.assertEqual(found.move.size, Size(5, 3))
        self.assertIn("the model says 1 s", " ".join(found.why))

    def test_what_is_hardly_better_is_not(self) -> None:
        for other in (outcome(Size(3, 5), 0.95, 0.03), outcome(Size(3, 5), 0.5, 0.06)):
            found = advised(outcome(NOW, 1.0, 0.03), other)
            self.assertEqual((found.kind, found.move), (Kind.KEEP, None))
            self.assertIn("keep 4 P + 4 D", found.text)

    def test_a_load_that_changes_is_waited_for(self) -> None:
        latest = Times(3.0, 0.03, 1.0)
        found = advised(outcome(NOW, 1.0, 0.03), outcome(Size(5, 3), 0.5, 0.03, latest=latest))
        self.assertEqual(found.kind, Kind.KEEP)
        self.assertIn("changing", found.text)

    def test_with_limits_those_within_count(self) -> None:
        limits = {"ttft_slo": 1.0}
        now, moved = outcome(NOW, 3.0, 0.03, 0.8), outcome(Size(5, 3), 1.1, 0.06, 0.89)
        found = advised(now, moved, **limits)
        self.assertEqual(found.kind, Kind.MOVE)
        self.assertIn("+9.0 % of the requests within the limits", found.text)
        self.assertEqual(advised(outcome(NOW, 0.9, 0.03, 0.995), moved, **limits).kind, Kind.KEEP)
        fewer = outcome(Size(3, 5), 0.5, 0.01, 0.7)
        self.assertEqual(advised(now, fewer, **limits).kind, Kind.KEEP)

    def test_where_as_many_are_late_the_times_count(self) -> None:
        self.assertGreater(gain(Times(9.0, 0.03, 0.0), Times(5.0, 0.03, 0.0), True), 1.0)

    def test_answers_of_one_token_have_no_tpot(self) -> None:
        found = advised(outcome(NOW, 1.0, None), outcome(Size(5, 3), 0.5, None))
        self.assertEqual(found.text, "move one D to P: -50 % p90 TTFT at this load")

    def test_another_fleet_is_compared(self) -> None:
        asked = Size(6, 10)
        found = advised(outcome(NOW, 1.0, 0.03), outcome(asked, 0.2, 0.02), asked=asked)
        self.assertEqual(found.kind, Kind.KEEP, "it is no move")
        self.assertIn("6 P + 10 D: -80 % p90 TTFT, -33 % p90 TPOT", found.why)
        moved = outcome(Size(5, 3), 0.7, 0.03)
        found = advised(outcome(NOW, 1.0, 0.03), outcome(asked, 0.2, 0.02), moved, asked=asked)
        self.assertEqual(found.move, moved)
        self.assertFalse(any("better still" in each for each in found.why))

    def test_further_moves_are_hinted_at(self) -> None:
        found = advised(
            outcome(NOW, 9.0, 0.03), outcome(Size(5, 3), 5.0, 0.03), outcome(Size(6, 2), 1.0, 0.03)
        )
        assert found.move is not None
        self.assertEqual(found.move.size, Size(5, 3))
        self.assertTrue(any(each.startswith("6 P + 2 D would be better still") for each in found.why))

    def test_the_last_of_a_role_is_not_moved(self) -> None:
        observation = Observation(
            Question([Size(1, 1)], observed().question.learned, 1.0, 0.0, {}, 20.0),
            None, [], [], 300.0, 2000.0, 200.0, None, None,
        )  # fmt: skip
        found = judge(observation, Answer([outcome(Size(1, 1), 9.0, 0.1)]))
        self.assertEqual(found.kind, Kind.KEEP)
        self.assertIn("each role needs one", found.text)

    def test_what_there_was_no_time_for_is_said(self) -> None:
        observation = observed(Size(3, 5))
        found = judge(observation, Answer([outcome(NOW, 1.0, 0.03, busy=0.99)], 100.0))
        self.assertEqual(found.kind, Kind.UNKNOWN)
        self.assertTrue(any("no room" in each for each in found.why))
        self.assertTrue(any("100 s were left out" in each for each in found.why))

    def test_other_schedulers_are_told_of(self) -> None:
        found = advised(outcome(NOW, 1.0, 0.03), rate=3.0)
        self.assertTrue(any("3.0 times as many" in each for each in found.why))
