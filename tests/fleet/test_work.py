"""The work that requests bring, and what is learned from its end."""

import unittest

from tests.support.given import give
from tests.support.registry import BLOCKS, D, P, instance, loaded, prompt
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import MetricsSnapshot


class WorkTest(unittest.TestCase):
    def setUp(self) -> None:
        self.registry = Registry()
        self.p0 = self.registry.add(instance("p0", P))
        self.d0 = self.registry.add(instance("d0", D))

    def prefill(self, tokens: int, start: float, seconds: float, cached: int | None = 0) -> None:
        reservation = self.registry.work.reserve(self.p0, prompt(float(tokens), start))
        self.registry.work.prefilled(reservation, tokens, cached, start + seconds)

    def test_what_a_request_brings(self) -> None:
        self.registry.work.reserve(self.p0, prompt(now=5.0))
        self.registry.work.reserve(self.d0, prompt(now=5.0))
        self.assertEqual((self.p0.tokens, self.d0.tokens), (1000.0, 1100.0))
        cost = self.p0.prefill.cost(1000.0, 1000.0)
        self.assertEqual((self.p0.prefill.remaining(5.0), self.d0.prefill.queued), (cost, 0.0))
        second = self.registry.work.reserve(self.p0, prompt(now=5.01))
        self.assertAlmostEqual(second.wait, cost - 0.01)

    def test_cached_tokens_bring_no_work_but_one_token(self) -> None:
        self.registry.work.reserve(self.p0, prompt(registry=self.registry))
        again = self.registry.work.reserve(self.p0, prompt(registry=self.registry))
        self.assertEqual((again.cached, again.tokens), (1000.0, 1.0))
        give(self.p0.prefill, trust=0.25)
        third = self.registry.work.reserve(self.p0, prompt(registry=self.registry))
        self.assertEqual((third.cached, third.tokens), (1000.0, 750.0))

    def test_what_only_a_reservation_reads_is_of_the_time_before_it(self) -> None:
        first = self.registry.work.reserve(self.p0, prompt(registry=self.registry))
        self.assertEqual((first.cached, first.tokens), (0.0, 1000.0))

    def test_it_learns_from_what_a_prefill_took(self) -> None:
        for number in range(60):
            tokens = 1000 + 100 * number
            self.prefill(tokens, 100.0 * number, 0.05 + tokens * 1e-3)
        self.assertAlmostEqual(self.p0.prefill.cost(4000, 4000), 4.05, delta=0.1)
        newcomer = self.registry.add(instance("p1", P, port=1))
        self.assertAlmostEqual(newcomer.prefill.cost(4000, 4000), 4.05, delta=0.1)

    def test_those_that_were_never_used_follow_the_fleet(self) -> None:
        """Else the first that is found to be fast would get all, or one that is slow nothing."""
        p1, d1 = self.registry.add(instance("p1", P, port=1)), self.registry.add(instance("d1", port=1))
        for number in range(30):
            self.prefill(1000, float(number), 0.5)
            self.registry.scraped(self.d0, MetricsSnapshot(float(number), running=4.0, step_time=0.001), 0)
        self.assertAlmostEqual(p1.prefill.cost(1000, 1000), 0.5, delta=0.02)
        self.assertAlmostEqual(d1.decode.step(4, 0), self.d0.decode.step(4, 0), delta=1e-4)
        own = self.registry.work.reserve(p1, prompt(now=100.0))
        self.registry.work.prefilled(own, 1000, 0, 102.0)
        before = p1.prefill.cost(1000, 1000)
        self.prefill(1000, 200.0, 0.5)
        self.assertEqual(p1.prefill.cost(1000, 1000), before, "it knows itself now")

    def test_it_learns_whether_prefixes_are_cached(self) -> None:
        for _ in range(40):
            reservation = self.registry.work.reserve(self.p0, prompt(registry=self.registry))
            self.registry.work.prefilled(reservation, 1000, 0, 1.0)
        self.assertLess(self.p0.prefill.trust, 0.05)
        for told in (None, -5):  # it does not say, or nonsense
            reservation = self.registry.work.reserve(self.p0, prompt(registry=self.registry))
            self.registry.work.prefilled(reservation, 1000, told, 1.0)
        self.assertTrue(0.0 <= self.p0.prefill.trust < 0.05)

    def test_a_prefill_that_costs_nothing_leaves_nothing(self) -> None:
        load = self.p0.prefill
        give(load, overhead=0.0, per_token=0.0, per_pair=0.0)
        free = self.registry.work.reserve(self.p0, prompt())
        give(load, overhead=1.0)
        other = self.registry.work.reserve(self.p0, prompt())
        free.release(0.0)
        self.assertEqual(load.remaining(0.5), 0.5, "the other is under way")
        other.release(1.0)
        self.assertEqual((load.queued, load.remaining(1.0), len(load._pending)), (0.0, 0.0, 0))

    def test_a_prefill_that_failed_teaches_nothing(self) -> None:
        before = self.p0.prefill.cost(1000, 1000)
        for number in range(20):
            self.registry.work.reserve(self.p0, prompt(now=float(number))).release(number + 0.9)
        self.assertEqual(self.p0.prefill.cost(1000, 1000), before)

    def test_a_restart(self) -> None:
        held = [self.registry.work.reserve(self.p0, prompt(registry=self.registry)) for _ in range(2)]
        self.assertFalse(self.registry.started(self.p0, 1.0), "the first time tells nothing")
        self.assertIn(self.p0.holder, self.registry.prefixes.match(BLOCKS))
        self.assertTrue(self.registry.started(self.p0, 2.0))
        self.assertEqual(self.registry.prefixes.match(BLOCKS), {})
        self.assertEqual((self.p0.in_flight, self.p0.tokens, self.p0.prefill.queued), (0, 0.0, 0.0))
        new = self.registry.work.reserve(self.p0, prompt())
        self.registry.work.prefilled(held[0], 1000, 0, 3.0)
        held[1].release(3.0)
        self.assertEqual((self.p0.in_flight, self.p0.tokens), (1, 1000.0))
        new.release(4.0)
        self.assertEqual(self.p0.prefill.fit.samples, 0)

    def test_tokens_of_the_cache(self) -> None:
        self.registry.work.reserve(self.d0, prompt())
        self.assertEqual(self.d0.kv_tokens, 1100.0, "before any scrape, ours")
        self.registry.scraped(self.d0, MetricsSnapshot(0.0, kv_usage=0.5, kv_capacity=10_000.0), 1, 1100.0)
        self.assertEqual(self.d0.kv_tokens, 5000.0, "others have the rest of what was seen")
        self.registry.work.reserve(self.d0, prompt())
        self.assertEqual(self.d0.kv_tokens, 6100.0)
        self.registry.scraped(self.d0, MetricsSnapshot(1.0, kv_usage=0.0), 2, 2200.0)
        self.assertEqual(self.d0.kv_tokens, 2200.0, "ours, also if they have not come there yet")

    def test_the_index_holds_what_the_instance_has_room_for(self) -> None:
        request = prompt(registry=self.registry)
        self.registry.learning.block_tokens = request.block_tokens
        self.registry.work.reserve(self.p0, request)
        self.registry.scraped(self.p0, MetricsSnapshot(0.0, kv_capacity=4 * request.block_tokens), 1)
        self.assertEqual(len(self.p0.holder), 4)

    def test_one_odd_prompt_does_not_resize_every_index(self) -> None:
        usual = MetricsSnapshot(0.0, kv_capacity=256_000.0)
        self.registry.scraped(self.p0, usual, 0)
        before = self.p0.holder.capacity
        for block_tokens in (1e-3, 1024.0):
            odd = prompt(registry=self.registry)
            give(odd, block_tokens=block_tokens)
            self.registry.work.reserve(self.d0, odd)
            self.registry.scraped(self.p0, usual, 0)
            self.assertTrue(before / 2 < self.p0.holder.capacity < before * 2)

    def test_scrapes_are_told(self) -> None:
        heard: list[str] = []
        self.registry.on_scraped = lambda: heard.append("scraped")
        self.registry.scraped(self.p0, loaded(), 0)
        self.assertEqual(heard, ["scraped"])

    def test_only_scrapes_of_decode_teach(self) -> None:
        snapshot = MetricsSnapshot(0.0, step_time=9.0, output_tokens=9e3, finished=1.0, transfer=9.0)
        load = self.registry.load
        before = (load.transfer, load.output_tokens)
        for _ in range(3):
            self.registry.scraped(self.p0, snapshot, 0)
        self.assertEqual((load.decode.samples, load.transfer, load.output_tokens), (0, *before))
        for _ in range(20):  # nothing ran: there is nothing that a step could be of
            self.registry.scraped(self.d0, snapshot, 0)
        self.assertEqual(load.decode.samples, 0)
        self.assertGreater(load.transfer, 1.0)
        self.assertGreater(load.output_tokens, 1000.0)
