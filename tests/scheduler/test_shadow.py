"""A strategy that is asked and not followed."""

import itertools
import time
import unittest
from collections.abc import Sequence
from typing import Any
from unittest import mock

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.given import give
from vllm_pd_scheduler.admin.collectors import collectors
from vllm_pd_scheduler.admission.queue import Ticket
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole, PDInstance
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.scheduler.shadow import (
    GAIN_BUCKETS_S,
    MAX_DIFFERENCES,
    WARNING_INTERVAL_S,
    Shadow,
    predicted_seconds,
)
from vllm_pd_scheduler.strategies import Strategy, UnknownStrategy

P, D = InstanceRole.PREFILL, InstanceRole.DECODE


class Last(Strategy):
    """The last that is offered, whatever it is; looks up what is cached on the way."""

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        _ = request.cached
        return [endpoints[-1]]


class Odd(Strategy):
    """Returns what ``answer`` is, or raises it."""

    answer: Any = None

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[no-any-return]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


LAST, ODD = f"{__name__}:Last", f"{__name__}:Odd"


def fleet(**config: Any) -> PDRouter:
    """A router with p0, p1, p2 and d0, d1, d2, all healthy."""
    router = PDRouter(SchedulerConfig(**config))
    for role, number in itertools.product(PD_ROLES, range(3)):
        name = f"{role[0]}{number}"
        router.register_instance(PDInstance(name, role, f"10.0.0.{number}", 80))
        router.registry.probed(router.registry.get(name), None)
    return router


class ShadowTest(unittest.TestCase):
    def setUp(self) -> None:
        self.router = fleet(strategy="least_load", shadow_strategy="predicted_latency")
        self.registry = self.router.registry
        self.now = 0.0

    def shadow(self, name: str) -> Shadow:
        """Use a shadow whose clock is ours."""
        found = self.router.scheduler.strategies.shadow = Shadow(name, self.router.config, lambda: self.now)
        return found

    def request(self, tokens: float = 1000.0, now: float = 0.0) -> RequestContext:
        return RequestContext("/", prompt_tokens=tokens, output_tokens=100.0, now=now)

    def decide(self, name: str, request: RequestContext | None = None) -> None:
        endpoint = self.registry.get(name)
        self.router.scheduler.compare_shadow(endpoint.instance.role, request or self.request(), endpoint)

    def test_none_by_default(self) -> None:
        router = fleet()
        self.assertIsNone(router.scheduler.strategies.shadow)
        self.assertFalse(router.scheduler.reads_prefixes)
        self.assertNotIn(b"pd_scheduler_shadow", generate_latest(collectors(router, time.monotonic)))

    def test_prompts_are_hashed_for_it(self) -> None:
        self.assertTrue(self.router.scheduler.reads_prefixes)
        self.router.scheduler.strategies.use_shadow("weighted")
        self.assertFalse(self.router.scheduler.reads_prefixes)

    def test_agreement_and_difference(self) -> None:
        shadow = self.shadow(LAST)
        for name in ("p2", "p0", "p1", "d2"):
            self.decide(name)
        prefill, decode = shadow.tallies[P], shadow.tallies[D]
        self.assertEqual((prefill.agreed, prefill.differed, prefill.failed), (1, 2, 0))
        self.assertEqual((decode.agreed, decode.differed, decode.failed), (1, 0, 0))
        found = [(each.role, each.live, each.shadow) for each in shadow.differences]
        self.assertEqual(found, [(P, "p0", "p2"), (P, "p1", "p2")])

    def test_what_it_would_have_meant_for_the_first_token(self) -> None:
        shadow = self.shadow("predicted_latency")
        p0 = self.registry.get("p0")
        busy = self.request(50_000.0)
        self.registry.work.reserve(p0, busy)
        queued = p0.prefill.cost(50_000.0, 50_000.0)
        own = p0.prefill.cost(1000.0, 1000.0)
        request = self.request(now=1.0)
        self.decide("p0", request)
        (found,) = shadow.differences
        self.assertAlmostEqual(found.live_seconds, queued - 1.0 + own)
        self.assertAlmostEqual(found.shadow_seconds, own)
        report = shadow.report()["prefill"]
        self.assertAlmostEqual(report["live_predicted_seconds"], queued - 1.0 + own)
        self.assertAlmostEqual(report["shadow_predicted_seconds"], own)

    def test_a_cached_prefix_counts(self) -> None:
        p0, request = self.registry.get("p0"), self.request(1000.0)
        give(request, blocks=(1, 2, 3), block_tokens=250.0)
        p0.holder.store(request.blocks)
        request.look_up_in(self.registry.prefixes)
        give(p0.prefill, trust=0.5)
        self.assertAlmostEqual(predicted_seconds(p0, request), p0.prefill.cost(625.0, 1000.0))
        shadow = self.shadow("predicted_latency")
        self.decide("p1", request)
        self.assertEqual(shadow.differences[0].shadow, "p0")

    def test_what_it_reads_is_looked_up_once(self) -> None:
        """The live strategy reads no prefixes; what it picks is judged and reserved by them all the same."""
        request, index = self.request(), self.registry.prefixes
        give(request, blocks=(1, 2, 3), block_tokens=250.0)
        with mock.patch.object(index, "match", wraps=index.match) as match:
            (picked,) = self.router.scheduler.pick(P, request)
            self.router.scheduler.compare_shadow(P, request, picked)
            self.registry.work.reserve(picked, request)
            self.assertEqual(match.call_count, 1)

    def test_what_it_would_have_meant_for_decode(self) -> None:
        shadow = self.shadow("predicted_latency")
        d0 = self.registry.get("d0")
        self.registry.work.reserve(d0, self.request())
        self.decide("d0")
        (found,) = shadow.differences
        self.assertAlmostEqual(found.live_seconds, d0.decode.step(2, 2200.0))
        self.assertAlmostEqual(found.shadow_seconds, d0.decode.step(1, 1100.0))

    def test_it_is_asked_the_same(self) -> None:
        """Only those that are routable, not tried and not saturated."""
        self.router = fleet(strategy="least_load", max_waiting=1)
        self.registry = self.router.registry
        shadow = self.shadow(LAST)
        self.registry.work.reserve(self.registry.get("p2"))
        self.decide("p1")
        self.assertEqual(shadow.tallies[P].agreed, 1, "p2 is saturated")
        p0, p1 = self.registry.get("p0"), self.registry.get("p1")
        self.router.scheduler.compare_shadow(P, self.request(), p0, [p1])
        self.assertEqual(shadow.tallies[P].agreed, 2, "p1 was tried")

    def test_differences_are_bounded_and_the_newest_come_first(self) -> None:
        shadow = self.shadow(LAST)
        for second in range(MAX_DIFFERENCES + 10):
            self.now = float(second)
            self.decide("p0")
        found = shadow.report()["differences"]
        self.assertEqual(len(found), MAX_DIFFERENCES)
        self.assertEqual([each["seconds_ago"] for each in found], [float(n) for n in range(MAX_DIFFERENCES)])

    def test_the_live_request_is_not_written_to(self) -> None:
        self.shadow(LAST)
        request = self.request()
        cached = {self.registry.get("p0").holder: 3}
        give(request, _cached=cached)
        self.decide("p0", request)
        self.assertIs(request.cached, cached, "what the shadow is offered is its own")

    def test_whatever_it_does_is_counted_and_not_raised(self) -> None:
        shadow = self.shadow(ODD)
        stranger = fleet().registry.get("p0")
        answers: list[Any] = [ValueError("odd"), Unprintable(), RecursionError(), None, 5, [], [None]]
        answers += [[stranger], [self.registry.get("d0")], {}]
        with (
            self.assertLogs("vllm_pd_scheduler.scheduler.shadow", "WARNING") as logged,
            mock.patch.object(Odd, "answer", None),
        ):
            for count, answer in enumerate(answers, 1):
                Odd.answer = answer
                self.decide("p0")
                self.assertEqual(shadow.tallies[P].failed, count)
        self.assertEqual(len(logged.output), 1, "once a minute")
        self.assertIn(
            "strategy tests.scheduler.test_shadow:Odd failed to pick a prefill instance: ValueError: odd",
            logged.output[0],
        )
        self.assertEqual((shadow.tallies[P].agreed, shadow.tallies[P].differed), (0, 0))

    def test_once_a_minute(self) -> None:
        self.shadow(ODD)
        with self.assertLogs("vllm_pd_scheduler.scheduler.shadow", "WARNING") as logged:
            for now in (0.0, WARNING_INTERVAL_S - 1, WARNING_INTERVAL_S, WARNING_INTERVAL_S + 1):
                self.now = now
                self.decide("p0")
        self.assertEqual(len(logged.output), 2)
        self.assertIn("3 failures so far", logged.output[1])

    def test_one_that_is_none(self) -> None:
        before = self.router.scheduler.strategies.shadow
        for name in ("fastest", "no.such:Module"):
            with self.assertRaises(UnknownStrategy):
                self.router.scheduler.strategies.use_shadow(name)
        self.assertIs(self.router.scheduler.strategies.shadow, before)

    def test_live_choices_are_the_same_with_and_without(self) -> None:
        """Ranked one by one, also by strategies that take turns or choose at random."""
        for strategy, shadow in itertools.product(
            ("round_robin", "least_load", "power_of_two", "session", "predicted_latency"),
            (None, "power_of_two", "predicted_latency", LAST, ODD),
        ):
            with self.subTest(strategy=strategy, shadow=shadow), mock.patch("logging.Logger.warning"):
                if shadow is None:
                    expected = self.picks(strategy, None)
                self.assertEqual(self.picks(strategy, shadow), expected)

    def picks(self, strategy: str, shadow: str | None) -> list[str]:
        router = fleet(strategy=strategy, shadow_strategy=shadow)
        router.scheduler.strategies.of(P).strategy.random.seed(1)
        chosen = []
        for number in range(100):
            request = self.request(100.0 * (number % 7 + 1), now=float(number))
            give(request, session=str(number % 5))
            picked = router.scheduler.pick(P, request)[0]
            router.scheduler.compare_shadow(P, request, picked)
            claim = router.registry.work.reserve(picked, request)
            if number % 3:
                claim.release(request.now)
            chosen.append(picked.id)
        return chosen

    def test_a_request_that_waits_is_compared_once(self) -> None:
        """When it is sent, however often it was looked at before."""
        self.router = fleet(strategy="predicted_latency", shadow_strategy="least_load", late_binding=True)
        registry, dispatcher = self.router.registry, self.router.dispatcher
        claims = [registry.work.reserve(e, self.request(50_000.0)) for e in registry.endpoints(P)]
        ticket = Ticket(self.request(), P)
        shadow = self.router.scheduler.strategies.shadow
        assert shadow is not None
        dispatcher.submit(ticket, 0.1)
        for now in (0.2, 0.3, 0.4):
            dispatcher.dispatch(now)
        tally = shadow.tallies[P]
        self.assertEqual((ticket.settled, tally.agreed + tally.differed), (False, 0))
        claims[1].release(0.5)
        dispatcher.dispatch(0.5)
        self.assertEqual((ticket.settled, tally.agreed + tally.differed), (True, 1))

    def test_metrics(self) -> None:
        shadow = self.shadow("predicted_latency")
        self.registry.work.reserve(self.registry.get("p0"), self.request(1000.0))
        self.decide("p0")
        self.decide("d0")
        self.decide("d1")
        families = {
            family.name: family
            for family in text_string_to_metric_families(
                generate_latest(collectors(self.router, time.monotonic)).decode()
            )
        }
        picks = {
            (sample.labels["role"], sample.labels["outcome"]): sample.value
            for sample in families["pd_scheduler_shadow_picks"].samples
        }
        self.assertEqual(picks[("prefill", "differed")], 1.0)
        self.assertEqual(picks[("decode", "agreed")] + picks[("decode", "differed")], 2.0)
        buckets = {
            sample.labels["le"]: sample.value
            for sample in families["pd_scheduler_shadow_gain_seconds"].samples
            if sample.labels["role"] == "prefill"
        }
        gain = shadow.differences[0].live_seconds - shadow.differences[0].shadow_seconds
        self.assertGreater(gain, 0.1)
        self.assertEqual((buckets["0.1"], buckets["0.5"], buckets["+Inf"]), (0.0, 1.0, 1.0))
        self.assertEqual(len(buckets), len(GAIN_BUCKETS_S) + 1)


if __name__ == "__main__":
    unittest.main()
