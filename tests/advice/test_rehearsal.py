"""Requests are replayed on fleets of several sizes, with engines as the load model has learned them."""

import itertools
import unittest
from typing import Any

from tests.support.traffic import Traffic
from vllm_pd_scheduler.advice.question import Learned, Question, Size
from vllm_pd_scheduler.advice.rehearsal import TooSlow, profiles, rehearse
from vllm_pd_scheduler.models import InstanceRole
from vllm_pd_scheduler.records.traffic import Recorded

LEARNED = Learned(0.005, 1e-4, 0.0, 0.015, 2e-4, 2e-8, 0.01, 1e-6, 1e6, 1e6)
SETTINGS = {
    "prefill_strategy": "least_load",
    "decode_strategy": "least_load",
    "queue_timeout": 30.0,
}


def question(*sizes: tuple[int, int], **more: Any) -> Question:
    settings = {**SETTINGS, **more.pop("settings", {})}
    learned = more.pop("learned", LEARNED)
    rate, shared = more.pop("rate", 1.0), more.pop("shared", 0.0)
    return Question([Size(*each) for each in sizes], learned, rate, shared, settings, 1e9)


class RehearsalTest(unittest.TestCase):
    def test_more_prefill_helps_where_prompts_are_long_and_decode_where_answers_are(self) -> None:
        asks = question((2, 2), (1, 3), (3, 1))
        prompts = rehearse(asks, Traffic(4.0, 4000.0, 10.0).requests(200)).outcomes
        p90 = {each.size: each.whole.ttft or 0.0 for each in prompts}
        self.assertLess(p90[Size(3, 1)], p90[Size(2, 2)])
        self.assertLess(p90[Size(2, 2)], p90[Size(1, 3)])
        answers = rehearse(asks, Traffic(4.0, 200.0, 500.0).requests(200)).outcomes
        tpot = {each.size: each.whole.tpot or 0.0 for each in answers}
        self.assertLess(tpot[Size(1, 3)], tpot[Size(2, 2)])
        self.assertLess(tpot[Size(2, 2)], tpot[Size(3, 1)])

    def test_a_lone_request_takes_what_was_learned(self) -> None:
        requests = [Recorded(10.0 * at, 1000.0, True, output_tokens=11) for at in range(10)]
        (found,) = rehearse(question((1, 1)), requests).outcomes
        assert found.whole.ttft is not None
        assert found.whole.tpot is not None
        prefill, step = 0.005 + 0.1, 0.015 + 2e-4 + 1000 * 2e-8
        self.assertAlmostEqual(found.whole.ttft, prefill + 0.01 + 0.001 + step, delta=0.01)
        self.assertAlmostEqual(found.whole.tpot, step, delta=0.001)
        self.assertEqual((found.requests, found.rejected), (8, 0))

    def test_the_rate_of_all_schedulers_is_replayed(self) -> None:
        requests = Traffic(4.0, 2000.0, 10.0).requests(200)
        (once,) = rehearse(question((2, 2)), requests).outcomes
        (twice,) = rehearse(question((2, 2), rate=2.0), requests).outcomes
        self.assertAlmostEqual(twice.prefill_busy, 2 * once.prefill_busy, delta=0.1)

    def test_what_was_cached_is_cached(self) -> None:
        """Where prompts are not hashed, by the share of their tokens that P had cached."""
        requests = Traffic(4.0, 8000.0, 10.0).requests(200)
        (none,) = rehearse(question((4, 2)), requests).outcomes
        (half,) = rehearse(question((4, 2), shared=0.5), requests).outcomes
        self.assertAlmostEqual(half.prefill_busy, none.prefill_busy / 2, delta=0.1)

    def test_those_within_the_limits_are_counted(self) -> None:
        requests = Traffic(4.0, 4000.0, 50.0).requests(200)
        (found,) = rehearse(question((2, 2), settings={"ttft_slo": 0.5}), requests).outcomes
        self.assertTrue(0.1 < found.whole.in_limits < 0.9, found)

    def test_a_refused_request_counts_as_a_late_one(self) -> None:
        requests = Traffic(20.0, 4000.0, 10.0).requests(200)
        settings = {"max_waiting": 1, "queue_size": 1}
        (found,) = rehearse(question((1, 1), settings=settings), requests).outcomes
        self.assertGreater(found.rejected, 20)
        self.assertEqual(found.whole.ttft, 30.0)

    def test_with_little_time_it_leaves_out_the_oldest_and_then_sizes(self) -> None:
        requests = Traffic(4.0, 1000.0, 50.0).requests(200)
        sizes = [Size(2, 2), Size(1, 3), Size(3, 1), Size(2, 3)]
        asks = Question(sizes, LEARNED, 1.0, 0.0, SETTINGS, 1000.0)
        for seconds, sizes_left, requests_left_out in ((1.0, 4, False), (2.0, 3, True)):
            # A request that ends takes so long by this clock.
            ticks = itertools.count(0.0, seconds)
            answer = rehearse(asks, requests, lambda ticks=ticks: next(ticks))
            self.assertEqual([each.size for each in answer.outcomes], sizes[:sizes_left])
            self.assertEqual(answer.skipped_seconds > 10.0, requests_left_out)
        with self.assertRaises(TooSlow):
            ticks = itertools.count(0.0, 50.0)
            rehearse(asks, requests, lambda: next(ticks))

    def test_requests_before_those_that_count_load_the_fleet(self) -> None:
        requests = Traffic(4.0, 200.0, 400.0).requests(300)
        alone = question((1, 1))
        later = Question([Size(1, 1)], LEARNED, 1.0, 0.0, SETTINGS, 1e9, requests[200].arrived)
        (without,) = rehearse(alone, requests[200:]).outcomes
        (with_lead,) = rehearse(later, requests).outcomes
        self.assertEqual(with_lead.requests, 100)
        self.assertLess(without.requests, 100)
        assert without.whole.tpot is not None
        assert with_lead.whole.tpot is not None
        self.assertGreater(with_lead.whole.tpot, without.whole.tpot)

    def test_nothing_learned_is_zero_cost_and_not_an_error(self) -> None:
        free = profiles(Learned(*[0.0] * 10))
        self.assertEqual(set(free), {InstanceRole.PREFILL, InstanceRole.DECODE})
