"""The load of an endpoint."""

import unittest

from tests.support.given import give
from tests.support.registry import P, instance, loaded, prompt
from vllm_pd_scheduler.fleet.registry import Registry


class LoadTest(unittest.TestCase):
    def setUp(self) -> None:
        self.registry = Registry()
        self.endpoint = self.registry.add(instance())

    def test_a_release_counts_once(self) -> None:
        one, two = self.registry.work.reserve(self.endpoint), self.registry.work.reserve(self.endpoint)
        self.assertEqual(self.endpoint.in_flight, 2)
        for _ in range(3):
            one.release()
        self.assertEqual(self.endpoint.in_flight, 1)
        two.release()
        self.assertEqual(self.endpoint.in_flight, 0)

    def test_what_fails_is_not_counted(self) -> None:
        prefill = self.registry.add(instance("p0", P, port=8300))
        request = prompt(registry=self.registry)
        give(request, now=None)
        with self.assertRaises(TypeError):
            self.registry.work.reserve(prefill, request)
        self.assertEqual((prefill.in_flight, prefill.tokens, len(prefill.holder)), (0, 0.0, 0))

    def test_without_a_scrape_only_ours_count(self) -> None:
        self.registry.work.reserve(self.endpoint)
        self.assertEqual((self.endpoint.waiting, self.endpoint.requests), (1.0, 1.0))
        self.assertEqual((self.endpoint.kv_usage, self.endpoint.latency), (0.0, None))

    def test_what_was_sent_since_the_scrape_counts_at_once(self) -> None:
        held = [self.registry.work.reserve(self.endpoint) for _ in range(4)]
        self.registry.scraped(self.endpoint, loaded(running=3, waiting=1), 4)
        self.assertEqual((self.endpoint.waiting, self.endpoint.requests), (1.0, 4.0))
        held += [self.registry.work.reserve(self.endpoint) for _ in range(2)]
        self.assertEqual((self.endpoint.waiting, self.endpoint.requests), (3.0, 6.0))
        for reservation in held:
            reservation.release()
        self.assertEqual((self.endpoint.waiting, self.endpoint.requests), (0.0, 0.0))

    def test_requests_of_another_scheduler_count_too(self) -> None:
        self.registry.work.reserve(self.endpoint)
        self.registry.scraped(self.endpoint, loaded(running=5, waiting=2), 1)
        self.assertEqual(self.endpoint.requests, 7.0)
        self.registry.work.reserve(self.endpoint)
        self.assertEqual(self.endpoint.requests, 8.0)

    def test_a_scrape_that_saw_less_than_we_know_of(self) -> None:
        for _ in range(3):
            self.registry.work.reserve(self.endpoint)
        self.registry.scraped(self.endpoint, loaded(running=1), 3)
        self.assertEqual(self.endpoint.requests, 3.0)
