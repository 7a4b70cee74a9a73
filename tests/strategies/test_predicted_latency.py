import unittest
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fleet import D, P, prompt, registry_of
from tests.support.given import give
from tests.support.predicted_times import BLOCKS, fleet, loads, step, ttft
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.prediction.transfer_rates import HandOffs
from vllm_pd_scheduler.scheduler import Scheduler
from vllm_pd_scheduler.strategies.predicted_latency import (
    LATE_PENALTY,
    TOLERANCE,
    WORK_WEIGHT,
    PredictedLatency,
)
from vllm_pd_scheduler.strategies.slo import Slo


class FormulaTest(unittest.TestCase):
    @given(described=loads, now=st.sampled_from([0.0, 0.05, 3.0]), tokens=st.integers(1, 9000))
    @settings(derandomize=True, deadline=None, max_examples=200)
    def test_scores_are_as_written(self, described: list[dict[str, Any]], now: float, tokens: int) -> None:
        registry = fleet(described)
        request = prompt(float(tokens), now=now, blocks=BLOCKS, block_tokens=tokens / 10)
        request.look_up_in(registry.prefixes)
        strategy = PredictedLatency(SchedulerConfig())
        for role, naive in ((P, lambda e: ttft(e, request, WORK_WEIGHT)), (D, lambda e: step(e, request))):
            endpoints = registry.routable(role)
            expected = [naive(endpoint) for endpoint in endpoints]
            found = strategy.scores(endpoints, request)
            for one, other in zip(found, expected, strict=True):
                self.assertAlmostEqual(one, other, places=5)
            ordered = sorted(found)
            for count in (1, 3):
                ranked = strategy.rank(endpoints, request, count)
                chosen = [found[endpoints.index(one)] for one in ranked]
                if role is P and count == 1:
                    self.assertLessEqual(chosen[0], ordered[0] * (1 + TOLERANCE))
                else:
                    self.assertEqual(chosen, ordered[:count])
                self.assertEqual(len(set(ranked)), min(count, len(endpoints)))


class NoCalls(dict[str, float]):
    """As what is learned of pairs, but for one that is not known."""

    def __missing__(self, key: str) -> float:
        raise AssertionError(f"a Python call for {key}")


class HandOffTest(unittest.TestCase):
    def setUp(self) -> None:
        self.registry = registry_of(1, 3)
        [self.p0], self.decode = self.registry.routable(P), self.registry.routable(D)
        rates = self.registry.load.transfers
        for _ in range(40):
            for endpoint, seconds in zip(self.decode, (0.05, 0.5, 0.05), strict=True):
                rates.learn(self.p0.id, endpoint.id, 2000.0, seconds)
        self.scheduler = Scheduler(SchedulerConfig(strategy="predicted_latency"), self.registry)

    def test_the_seconds_of_a_hand_off_count_twice_over_the_answer(self) -> None:
        request = prompt(2000.0, blocks=BLOCKS, block_tokens=100.0)
        self.decode[2].holder.store(BLOCKS)
        self.scheduler.pick(D, request, beside=self.p0)
        strategy, rates = PredictedLatency(SchedulerConfig()), self.registry.load.transfers
        for endpoint, found in zip(self.decode, strategy.scores(self.decode, request), strict=True):
            fetched = 2000.0 - 100.0 * len(BLOCKS) * (endpoint is self.decode[2])
            handoffs = rates.of(self.p0.id)
            assert handoffs is not None
            seconds = (handoffs.overhead + handoffs.per_token * fetched) * handoffs.times[endpoint.id]
            expected = step(endpoint, request) + (1 + WORK_WEIGHT) * seconds / request.output_tokens
            self.assertAlmostEqual(found, expected)
            terms = strategy.terms(endpoint, request)
            self.assertAlmostEqual(terms["handoff"], seconds)

    def test_an_unknown_pair_has_what_is_usual_of_its_d_without_a_call(self) -> None:
        strategy, [d0, d1, d2] = PredictedLatency(SchedulerConfig()), self.decode
        for blocks in ((), BLOCKS):
            request, found = prompt(2000.0, blocks=blocks, block_tokens=100.0), []
            d2.holder.store(blocks)
            request.look_up_in(self.registry.prefixes)
            for times, usual in (
                ({d0.id: 2.0, d1.id: 3.0, d2.id: 1.0}, {}),
                ({d0.id: 2.0}, {d0.id: 9.0, d1.id: 3.0}),
            ):
                request.prefilled_by(HandOffs(0.01, 1e-5, NoCalls(times), usual))
                found.append(strategy.scores(self.decode, request))
            self.assertEqual(found[0], found[1])

    def test_what_is_handed_over_goes_where_that_is_fast_and_what_is_not_goes_anywhere(self) -> None:
        for beside, goes_there in ((self.p0, False), (None, True)):
            picked = [self.scheduler.pick(D, prompt(4000.0), beside=beside)[0] for _ in range(6)]
            self.assertEqual(self.decode[1] in picked, goes_there)

    def test_a_slow_link_does_not_miss_a_limit_of_the_time_per_token(self) -> None:
        request = prompt(2000.0, tpot_slo=1.1 * self.decode[1].decode.step(1, 2300))
        self.scheduler.pick(D, request, beside=self.p0)
        self.assertLess(max(Slo(SchedulerConfig()).scores(self.decode, request)), LATE_PENALTY)


class PrefillTest(unittest.TestCase):
    def setUp(self) -> None:
        self.registry = registry_of(2, 2)
        self.p0, self.p1 = self.registry.routable(P)
        self.d0, self.d1 = self.registry.routable(D)
        self.strategy = PredictedLatency(SchedulerConfig())

    def best(self, endpoints: tuple[Endpoint, ...], request: Any) -> str:
        request.look_up_in(self.registry.prefixes)
        return self.strategy.rank(endpoints, request, 1)[0].id

    def test_a_hair_makes_no_difference(self) -> None:
        """No two fits are quite equal, and yet an idle fleet is used evenly."""
        give(self.p0.prefill, overhead=self.p0.prefill.overhead * (1 + TOLERANCE / 2))
        chosen = [self.best((self.p0, self.p1), prompt()) for _ in range(6)]
        self.assertEqual((chosen.count("p0"), chosen.count("p1")), (3, 3))
        give(self.p0.prefill, overhead=self.p0.prefill.overhead * 100)
        self.assertEqual([self.best((self.p0, self.p1), prompt()) for _ in range(3)], ["p1"] * 3)

    def test_a_queue_of_short_ones_is_less_than_one_long(self) -> None:
        for _ in range(5):
            self.registry.work.reserve(self.p0, prompt(100.0))
        self.registry.work.reserve(self.p1, prompt(50_000.0))
        self.assertEqual(self.best((self.p0, self.p1), prompt()), "p0")

    def test_a_cache_is_worth_a_wait_that_it_saves(self) -> None:
        self.p0.holder.store(BLOCKS)
        long = prompt(20_000.0, blocks=BLOCKS, block_tokens=2000.0)
        for queued, expected in ((10_000.0, "p0"), (100_000.0, "p1")):
            held = self.registry.work.reserve(self.p0, prompt(queued))
            self.assertEqual(self.best((self.p0, self.p1), long), expected)
            held.release(0.0)
        give(self.p0.prefill, trust=0.0)  # it has no prefix caching
        self.registry.work.reserve(self.p0, prompt(1000.0))
        self.assertEqual(self.best((self.p0, self.p1), long), "p1")

    def test_equal_ones_take_turns(self) -> None:
        for endpoints in ((self.p0, self.p1), (self.d0, self.d1)):
            names = [self.best(endpoints, prompt()) for _ in range(6)]
            self.assertEqual(len({*names[::2]}), 1)
            self.assertNotEqual(names[0], names[1])

    def test_decode_without_room_comes_last(self) -> None:
        give(self.d0, kv_capacity=1050.0)
        for _ in range(20):
            self.registry.work.reserve(self.d1, prompt(10.0))
        self.assertEqual(self.best((self.d0, self.d1), prompt(1000.0)), "d1")
        self.assertEqual(self.best((self.d0, self.d1), prompt(900.0)), "d0")


if __name__ == "__main__":
    unittest.main()
