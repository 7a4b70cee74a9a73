"""What a scaler is told of each role: a backlog, what is in use, and what is left of the limits."""

import unittest
from typing import Any

from tests.support.fleet import D, P, prompt, scheduler_of
from tests.support.given import give
from vllm_pd_scheduler.admission.dispatcher import Dispatcher
from vllm_pd_scheduler.admission.queue import Ticket
from vllm_pd_scheduler.models import MetricsSnapshot
from vllm_pd_scheduler.scheduler.role_load import LEAST_ROOM, RoleLoad


class RoleLoadTest(unittest.TestCase):
    def start(self, prefill: int = 2, decode: int = 2, **config: Any) -> None:
        self.scheduler = scheduler_of(prefill, decode, **config)
        self.registry = self.scheduler.registry
        self.dispatcher = Dispatcher(self.scheduler)
        self.load = RoleLoad(self.scheduler, self.dispatcher.queue)
        self.p = self.registry.endpoints(P)
        self.d = self.registry.endpoints(D)
        for each in self.p:
            give(each.prefill, overhead=0.0, per_token=1e-3, per_pair=0.0)
        for each in self.d:
            give(each.decode, base=0.02, per_seq=0.001, per_kv_token=0.0)

    def scraped(self, running: float, waiting: float, kv_usage: float = 0.0) -> None:
        for each in self.d:
            seen = MetricsSnapshot(0.0, running, waiting, kv_usage, kv_capacity=10_000.0)
            self.registry.scraped(each, seen, each.in_flight, each.tokens)

    def test_a_backlog_is_the_work_by_instance_and_shrinks_with_time(self) -> None:
        self.start()
        self.assertEqual(self.load.prefill_backlog(0.0), 0.0)
        for _ in range(3):
            self.registry.work.reserve(self.p[0], prompt(1000.0))
        self.assertAlmostEqual(self.load.prefill_backlog(0.0), 3.0 / 2)
        self.assertAlmostEqual(self.load.prefill_backlog(0.4), 2.6 / 2)
        self.assertAlmostEqual(self.load.prefill_backlog(9.0), 2.0 / 2, msg="a late one is about to end")

    def test_what_other_schedulers_have_sent_is_theirs_to_tell(self) -> None:
        self.start()
        self.registry.elsewhere.enqueue(self.p[0], 5000.0, (0.0, 0), (), 0.0)
        self.registry.work.reserve(self.p[0], prompt(1000.0))
        self.assertAlmostEqual(self.load.prefill_backlog(0.0), 1.0 / 2)
        self.d[0].sent_elsewhere(4, 8000)
        self.registry.work.reserve(self.d[0], prompt(900.0))
        self.scraped(running=5.0, waiting=0.0)
        self.assertAlmostEqual(dict(self.load.decode_use())["kv_cache"], 1000.0 / 20_000.0)

    def test_the_sum_over_schedulers_is_the_backlog_of_the_fleet(self) -> None:
        """As two schedulers see a P with work of both, and a D where requests of both wait."""
        found = []
        for own, other in ((1000.0, 3000.0), (3000.0, 1000.0)):
            self.start(prefill=1, decode=1)
            self.registry.work.reserve(self.p[0], prompt(own))
            self.registry.elsewhere.enqueue(self.p[0], other, (0.0, 0), (), 0.0)
            ours = int(own) // 1000
            for _ in range(ours):
                self.registry.work.reserve(self.d[0], prompt())
            self.d[0].sent_elsewhere(4 - ours, 4000)
            self.scraped(running=2.0, waiting=2.0)
            found.append((self.load.prefill_backlog(0.0), self.load.decode_backlog(0.0)))
        self.assertAlmostEqual(sum(prefill for prefill, _ in found), 4.0)
        ends = 2.0 / (self.registry.load.output_tokens * self.d[0].decode_step)
        self.assertAlmostEqual(sum(decode for _, decode in found), 2.0 / ends)

    def test_what_waits_here_counts_for_the_role_it_waits_for(self) -> None:
        """Prefills that wait since D are full are D's backlog: more P would not help."""
        for full, prefill_waits in ((False, True), (True, False)):
            with self.subTest(decode_is_full=full):
                self.start(max_waiting=1, queue_timeout=1000.0)
                self.scraped(running=9.0, waiting=5.0 if full else 0.0)
                for each in self.p:
                    seen = MetricsSnapshot(0.0, 1.0, 0.0 if full else 5.0)
                    self.registry.scraped(each, seen, 0)
                before = self.load.decode_backlog(0.0)
                self.dispatcher.submit(Ticket(prompt(1000.0), P), 0.0)
                self.assertEqual(len(self.dispatcher.queue), 1)
                self.assertEqual(self.load.prefill_backlog(0.0) > 0.0, prefill_waits)
                self.assertEqual(self.load.decode_backlog(0.0) > before, not prefill_waits)

    def test_the_use_of_decode_is_proportional_to_the_load(self) -> None:
        self.start(tpot_slo=0.05)
        self.scraped(0.0, 0.0)
        found = []
        for _ in range(2):
            for _ in range(6):
                self.registry.work.reserve(self.d[0], prompt(400.0))
            found.append(dict(self.load.decode_use()))
        self.assertAlmostEqual(found[0]["kv_cache"], 6 * 500 / 20_000)
        self.assertAlmostEqual(found[0]["step"], 6 * 0.001 / 0.03 / 2)
        for resource, share in found[0].items():
            self.assertAlmostEqual(found[1][resource], 2 * share)

    def test_a_limit_that_no_step_keeps_gives_a_number(self) -> None:
        self.start(tpot_slo=0.01)
        self.registry.work.reserve(self.d[0], prompt())
        self.assertAlmostEqual(dict(self.load.decode_use())["step"], 0.001 / (0.01 * LEAST_ROOM) / 2)
        slack = self.load.tpot_slack()
        assert slack is not None
        self.assertLess(slack, 0.0)

    def test_slack_is_what_a_request_would_have_left(self) -> None:
        self.start(ttft_slo=5.0, tpot_slo=0.05)
        self.assertIsNone(self.load.ttft_slack(0.0), "no prefill is known yet")
        for each in self.p:
            self.registry.work.reserve(each, prompt(1000.0))
        slack = self.load.ttft_slack(0.0)
        assert slack is not None
        transfer, step = self.registry.load.transfer, 0.021
        self.assertAlmostEqual(slack, 5.0 - 1.0 - 1.0 - transfer - step)
        tpot = self.load.tpot_slack()
        assert tpot is not None
        self.assertAlmostEqual(tpot, 0.05 - step)

    def test_without_limits_there_is_no_slack(self) -> None:
        self.start()
        self.registry.work.reserve(self.p[0], prompt())
        self.assertEqual((self.load.ttft_slack(0.0), self.load.tpot_slack()), (None, None))

    def test_without_instances_there_are_numbers(self) -> None:
        self.start(prefill=0, decode=0, ttft_slo=1.0, tpot_slo=0.1)
        self.assertEqual((self.load.prefill_backlog(0.0), self.load.decode_backlog(0.0)), (0.0, 0.0))
        self.assertEqual(list(self.load.decode_use()), [])
        self.assertEqual((self.load.ttft_slack(0.0), self.load.tpot_slack()), (None, None))

    def test_a_p_is_busy_with_our_prefills(self) -> None:
        self.start()
        claim = self.registry.work.reserve(self.p[0], prompt(1000.0))
        other = self.registry.elsewhere.enqueue(self.p[0], 1000.0, (0.0, 0), (), 0.0)
        self.registry.work.prefilled(claim, 1000, 0, 1.5)
        self.registry.elsewhere.done(other, 1000, 0, 2.5)
        self.assertAlmostEqual(self.p[0].prefill.busy, 1.5)
