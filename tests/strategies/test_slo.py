import unittest
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fleet import D, P, prompt
from tests.support.predicted_times import BLOCKS, fleet, loads, step, ttft
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.strategies.predicted_latency import (
    NO_ROOM_PENALTY,
    TOLERANCE,
    WORK_WEIGHT,
    PredictedLatency,
)
from vllm_pd_scheduler.strategies.slo import Slo


class MeetsTest(unittest.TestCase):
    @given(described=loads, slo=st.sampled_from([None, 0.01, 0.3, 2.0]), tokens=st.integers(1, 9000))
    @settings(derandomize=True, deadline=None, max_examples=200)
    def test_slo_takes_one_that_meets_it_if_there_is_one(
        self, described: list[dict[str, Any]], slo: float | None, tokens: int
    ) -> None:
        registry = fleet(described)
        request = prompt(
            float(tokens), now=0.2, arrived=0.1, ttft_slo=slo, tpot_slo=slo and slo / 10,
            blocks=BLOCKS, block_tokens=tokens / 10,
        )  # fmt: skip
        request.look_up_in(registry.prefixes)
        strategy = Slo(SchedulerConfig())
        endpoints = registry.routable(P)
        chosen = strategy.rank(endpoints, request, 1)[0]
        meeting = [e for e in endpoints if slo is None or ttft(e, request, 0.0) <= slo - 0.1]
        among = meeting or list(endpoints)
        self.assertIn(chosen, among)
        best = min(ttft(e, request, WORK_WEIGHT) for e in among)
        self.assertLessEqual(ttft(chosen, request, WORK_WEIGHT), best * (1 + TOLERANCE) + 1e-5)
        endpoints = registry.routable(D)
        chosen = strategy.rank(endpoints, request, 1)[0]
        fast = [e for e in endpoints if slo is None or step(e, request) <= slo / 10]
        roomy = [e for e in endpoints if step(e, request) < NO_ROOM_PENALTY]
        among = fast or roomy or list(endpoints)
        self.assertIn(chosen, among)
        self.assertAlmostEqual(step(chosen, request), min(step(e, request) for e in among), places=5)


class HopelessTest(unittest.TestCase):
    def test_when_even_an_idle_endpoint_is_too_late(self) -> None:
        strategy = Slo(SchedulerConfig())
        for slo, now, cost, expected in (
            (None, 1e9, 1e9, False),
            (1.0, 10.0, 1.0, False),
            (1.0, 10.0, 1.001, True),
            (1.0, 10.5, 0.6, True),
            (1.0, 11.1, 0.0, True),
        ):
            request = prompt(arrived=10.0, now=now, ttft_slo=slo)
            self.assertIs(strategy.hopeless(request, cost), expected)
            self.assertFalse(PredictedLatency(SchedulerConfig()).hopeless(request, cost))


class OrderTest(unittest.TestCase):
    def test_the_less_time_is_left_the_earlier(self) -> None:
        strategy = Slo(SchedulerConfig())

        def order(slo: float | None, cost: float = 1.0, arrived: float = 0.0) -> float:
            return strategy.order(prompt(arrived=arrived, ttft_slo=slo), cost)

        self.assertLess(order(1.0), order(5.0))
        self.assertLess(order(1.0, cost=1.5), order(5.0))
        self.assertLess(order(5.0), order(1.0, cost=2.0))  # the shortest still goes first, by and large
        self.assertLess(order(29.0), order(None))
        self.assertEqual(order(1e9), order(None))
        self.assertLess(order(None), order(1e-3, arrived=30.0))  # and nobody waits for ever


if __name__ == "__main__":
    unittest.main()
