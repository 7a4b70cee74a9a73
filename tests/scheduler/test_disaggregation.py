"""Who prefills: an instance for it, or decode itself."""

import unittest
from typing import Any

from tests.support.fleet import D, P, prompt, scheduler_of
from vllm_pd_scheduler.models import MetricsSnapshot
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.scheduler.disaggregation import SLACK_SHARE, STALL_WEIGHT, Disaggregation

BLOCKS = tuple(range(1, 41))


class DisaggregationTest(unittest.TestCase):
    def start(self, setting: str | int, prefill: int = 2, decode: int = 2, **config: Any) -> None:
        config = {"strategy": "predicted_latency", **config}
        self.scheduler = scheduler_of(prefill, decode, disaggregation=setting, **config)
        self.registry = self.scheduler.registry
        self.decides = Disaggregation(self.scheduler.config, self.scheduler)

    def local(self, tokens: float, **more: Any) -> str | None:
        found = self.decides.local_endpoint(prompt(tokens, **more))
        return None if found is None else found.id

    def test_by_the_setting(self) -> None:
        for setting, tokens, is_local in (
            ("always", 1, False),
            ("never", 1e6, True),
            (1000, 999, True),
            (1000, 1000, False),
        ):
            with self.subTest(setting, tokens=tokens):
                self.start(setting)
                self.assertEqual(self.local(tokens) is not None, is_local)

    def test_without_decode_it_is_left_to_others(self) -> None:
        for setting in ("never", 1000, "auto"):
            self.start(setting, decode=0)
            self.assertIsNone(self.local(1))

    def busy(self, requests: int) -> None:
        for endpoint in self.registry.endpoints(D):
            self.registry.scraped(endpoint, MetricsSnapshot(0.0, running=float(requests)), 0)

    def queue_at_prefill(self) -> None:
        for endpoint in self.registry.endpoints(P):
            for _ in range(9):
                self.registry.work.reserve(endpoint, prompt(20_000))

    def test_by_cost_a_busy_decode_gets_no_prompt(self) -> None:
        self.start("auto")
        self.busy(50)
        self.assertIsNone(self.local(5000))

    def test_by_cost_an_idle_one_does(self) -> None:
        self.start("auto")
        self.assertIsNotNone(self.local(100))

    def test_by_cost_a_queue_at_prefill_makes_it_local(self) -> None:
        self.start("auto")
        self.busy(3)
        self.assertIsNone(self.local(5000))
        self.queue_at_prefill()
        self.assertIsNotNone(self.local(5000))

    def test_by_cost_the_one_that_has_it_cached(self) -> None:
        self.start("auto")
        self.busy(10)
        known: dict[str, Any] = {"blocks": BLOCKS, "block_tokens": 250.0}
        self.assertIsNone(self.local(10_050, **known))
        d1 = self.registry.get("d1")
        d1.holder.store(BLOCKS)
        self.registry.work.reserve(d1, RequestContext("/"))
        self.assertEqual(self.local(10_050, **known), "d1")

    def test_by_tpot_only_what_the_answers_there_can_bear(self) -> None:
        self.start("tpot")
        self.busy(10)
        self.queue_at_prefill()
        taken = sum(self.local(2000) is not None for _ in range(50))
        self.assertGreater(taken, 0)
        self.assertLess(taken, 50)

    def test_by_tpot_what_is_beyond_the_slack_costs_each_answer_there(self) -> None:
        """However many come at once: beyond the slack a D takes only what P is far slower with."""
        for tokens in (200, 1000, 3000):
            with self.subTest(tokens=tokens):
                self.start("tpot", decode=1, tpot_slo=0.05)
                self.busy(10)
                self.queue_at_prefill()
                request = prompt(tokens, tpot_slo=0.05)
                prefill, now = self.scheduler.preview(P, request)[0], request.now
                remote = prefill.prefill.remaining(now) + 2 * prefill.prefill_cost(request) + 1.0
                taken = 0
                while taken < 1000 and self.decides.local_endpoint(request) is not None:
                    taken += 1
                cost = self.registry.load.prefill.predict((1.0, tokens, tokens * tokens / 2))
                step = self.registry.get("d0").decode.step(10, 0)
                slack = SLACK_SHARE * (0.05 - step) * 100
                self.assertLessEqual(taken * cost, slack + remote / (STALL_WEIGHT * 10))
                self.assertGreater(taken, 0)

    def test_by_tpot_a_long_conversation_is_not_read_anew_to_save_a_short_stall(self) -> None:
        self.start("tpot", decode=1, tpot_slo=0.05)
        self.busy(10)
        known: dict[str, Any] = {"blocks": BLOCKS, "block_tokens": 5000.0, "tpot_slo": 0.05}
        self.registry.get("d0").holder.store(BLOCKS[:-1])
        while self.local(5000, tpot_slo=0.05) is not None:  # until its answers can bear no more
            pass
        self.assertEqual(self.local(200_000, **known), "d0")

    def test_by_tpot_a_limit_that_is_missed_already_makes_it_split(self) -> None:
        self.start("tpot")
        self.busy(10)
        self.assertIsNone(self.local(100, tpot_slo=0.001))

    def test_a_turn_that_goes_on_with_an_answer_is_local_where_that_was_written(self) -> None:
        for setting in ("auto", "tpot"):
            with self.subTest(setting):
                self.start(setting)
                self.busy(10)
                d1 = self.registry.get("d1")
                d1.holder.store(BLOCKS[:10])
                self.registry.work.reserve(d1, RequestContext("/"))
                known: dict[str, Any] = {"blocks": BLOCKS, "block_tokens": 250.0}
                self.assertIsNone(self.local(10_050, **known))
                self.registry.work.answered(d1, BLOCKS[:10], 250.0, 2500, 7501)
                self.assertEqual(self.local(10_050, **known), "d1")

    def test_to_ask_takes_no_turn(self) -> None:
        """Else every second instance would never be used: each request asks, and then picks."""
        for setting in ("never", 10_000, "auto"):
            with self.subTest(setting):
                self.start(setting, strategy="round_robin")
                names = []
                for _ in range(8):
                    request = prompt(100.0)
                    self.decides.local_endpoint(request)
                    names += [self.scheduler.pick(role, request)[0].id for role in (P, D)]
                self.assertEqual([names.count(one) for one in ("p0", "p1", "d0", "d1")], [4] * 4)


if __name__ == "__main__":
    unittest.main()
