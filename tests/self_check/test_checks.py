"""Which pairs are checked, when that is skipped, and what a wrong one leads to."""

import asyncio
import time
import unittest
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.support.fleet import D, P, prompt
from tests.support.waiting import until
from vllm_pd_scheduler.config import ConfigError, SchedulerConfig, parse_config
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.models import MetricsSnapshot, PDInstance
from vllm_pd_scheduler.records.events import EventKind
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.self_check import CannotCheck, SelfCheck
from vllm_pd_scheduler.self_check.comparison import Verdict
from vllm_pd_scheduler.self_check.pair_check import Try

MATCH, CLOSE, MISMATCH, FAILED, SKIPPED = Verdict


class Case(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.router = PDRouter(SchedulerConfig(), clock=lambda: 100.0)
        self.registry = self.router.registry
        self.tried: list[tuple[str, str, str]] = []
        self.verdicts: Callable[[str, str], Verdict] = lambda p, d: MATCH
        self.queued = 0
        self.check = SelfCheck(
            self.router.config,
            self.router.scheduler,
            self.router.telemetry,
            self.router.events,
            self.try_pair,
            lambda: self.queued,
            self.router.clock,
            lambda: 1.0,
        )

    async def try_pair(self, model: str, prefill: Endpoint, decode: Endpoint) -> Try:
        self.tried.append((model, prefill.id, decode.id))
        verdict = self.verdicts(prefill.id, decode.id)
        return Try(verdict, "D answers 500" if verdict is FAILED else "")

    def add(self, *names: str, models: tuple[str, ...] = ("m",), **more: Any) -> None:
        for name in names:
            role = P if name[0] == "p" else D
            host = f"10.0.{ord(name[0])}.{len(self.registry.endpoints())}"
            self.router.register_instance(PDInstance(name, role, host, 80, models=frozenset(models), **more))
            endpoint = self.registry.get(name)
            self.registry.probed(endpoint, None)
            self.registry.scraped(endpoint, MetricsSnapshot(100.0), 0)

    def wrong(self) -> set[tuple[str, str]]:
        return {(prefill.id, decode.id) for prefill, decode, _ in self.registry.wrong_pairs}

    def said(self) -> list[str]:
        return [event.text for event in self.router.events.after(0) if event.kind is EventKind.SELF_CHECK]

    def counted(self, result: str) -> float:
        name = "pd_scheduler_self_checks_total"
        return self.router.telemetry.prometheus.get_sample_value(name, {"result": result}) or 0.0

    def served(self) -> set[tuple[str, str]]:
        """Whom requests may go to: P, and D for what it hands over; without a P, D alone."""
        scheduler, request = self.router.scheduler, prompt(model="m")
        found = {
            (prefill.id, decode.id)
            for prefill in scheduler.pick(P, request, count=9)
            for decode in scheduler.pick(D, request, count=9, beside=prefill)
        }
        return found or {("", decode.id) for decode in scheduler.pick(D, request, count=9)}


class TurnsTest(Case):
    async def test_all_pairs_are_checked_each_instance_soon(self) -> None:
        for prefill, decode in ((1, 1), (2, 2), (3, 2), (2, 5), (4, 3)):
            with self.subTest(prefill=prefill, decode=decode):
                self.setUp()
                self.add(*(f"p{n}" for n in range(prefill)), *(f"d{n}" for n in range(decode)))
                for _ in range(prefill * decode):
                    await self.check.round("probe")
                self.assertEqual(set(Counter(self.tried).values()), {1})
                self.assertEqual(len(self.tried), prefill * decode)
                for at in range(len(self.tried) - prefill + 1):
                    self.assertEqual(len({p for _, p, _ in self.tried[at : at + prefill]}), prefill)

    async def test_one_pair_of_each_model_in_a_round(self) -> None:
        self.add("pa", "da", models=("a", "a-too"))
        self.add("pb", "db", models=("b",))
        self.add("pc", models=("c",))
        await self.check.round("probe")
        self.assertEqual(self.tried, [("a", "pa", "da"), ("b", "pb", "db")])

    async def test_adapters_are_not_checked(self) -> None:
        for name in ("p0", "d0"):
            self.router.register_instance(PDInstance(name, P if name == "p0" else D, "10.0.0.1", 80))
            endpoint = self.registry.get(name)
            self.registry.probed(endpoint, None)
            self.registry.scraped(endpoint, MetricsSnapshot(100.0), 0)
        await self.check.round("probe")
        self.assertEqual(self.tried, [], "no model is known")
        for endpoint in self.registry:
            self.registry.models.listed(endpoint, frozenset(("base", "a-lora")), frozenset(("a-lora",)))
        await self.check.round("probe")
        self.assertEqual(self.tried, [("base", "p0", "d0")])

    async def test_only_pairs_that_fit_and_have_weight(self) -> None:
        self.add("p0", "d0", revision="blue")
        self.add("p1", "d1", revision="green")
        self.router.config.take(SchedulerConfig(revisions={"blue": 1}), ["revisions"])
        self.router.scheduler.reconfigured()
        for _ in range(3):
            await self.check.round("probe")
        self.assertEqual(set(self.tried), {("m", "p0", "d0")})
        await self.check.check("p1", "d1", None, "admin")
        self.assertIn(("m", "p1", "d1"), self.tried, "one that is asked for need not be in use")
        for prefill, decode, words in (("p0", "d1", "fit"), ("d0", "d1", "no prefill"), ("p0", "p1", "no d")):
            with self.assertRaisesRegex(CannotCheck, words):
                await self.check.check(prefill, decode, None, "admin")


class VerdictsTest(Case):
    def setUp(self) -> None:
        super().setUp()
        self.add("p0", "p1", "d0", "d1")

    async def rounds(self, count: int = 4) -> None:
        for _ in range(count):
            await self.check.round("probe")

    async def test_a_pair_that_is_always_wrong_is_left_out_and_no_other(self) -> None:
        self.verdicts = lambda p, d: MISMATCH if (p, d) == ("p0", "d1") else MATCH
        await self.rounds()
        self.assertEqual(self.wrong(), {("p0", "d1")})
        self.assertEqual((self.counted("match"), self.counted("mismatch")), (3, 3))
        self.assertIn("WRONG TEXTS: d1 answers wrongly with what p0 hands over", self.said()[0])
        self.assertEqual(self.served(), {("p0", "d0"), ("p1", "d0"), ("p1", "d1")})
        scheduler, p0 = self.router.scheduler, self.registry.get("p0")
        both = self.registry.endpoints(D)
        self.assertEqual(scheduler.fitting(p0, both), [self.registry.get("d0")])
        self.assertIsNone(scheduler.fitting(self.registry.get("p1"), both))

    async def test_a_p_that_is_wrong_with_all_gets_no_prefills(self) -> None:
        self.verdicts = lambda p, d: MISMATCH if p == "p0" else MATCH
        await self.rounds()
        self.assertEqual(self.served(), {("p1", "d0"), ("p1", "d1")})

    async def test_if_all_are_wrong_d_prefills(self) -> None:
        self.verdicts = lambda p, d: MISMATCH
        await self.rounds()
        self.assertEqual(self.served(), {("", "d0"), ("", "d1")})
        self.registry.drain("d1")
        self.assertEqual(self.served(), {("", "d0")})

    async def test_what_says_nothing_or_is_not_always_wrong_leaves_none_out(self) -> None:
        for verdict, again in ((CLOSE, 1), (FAILED, 1), (SKIPPED, 1), (MATCH, 1)):
            for before in range(3):
                self.tried.clear()
                answers = iter([*[MISMATCH] * before, verdict])
                self.verdicts = lambda p, d, answers=answers: next(answers)  # type: ignore[misc]
                found = (await self.check.round("probe"))[0]
                self.assertEqual((len(self.tried), found.tries), (before + again, before + again))
                self.assertEqual((found.verdict, found.left_out, self.wrong()), (verdict, False, set()))
        self.assertEqual(len(self.said()), 8, "each wrong answer is told of")

    async def test_it_is_taken_back_when_it_is_right(self) -> None:
        self.verdicts = lambda p, d: MISMATCH if (p, d) == ("p0", "d1") else MATCH
        await self.rounds()
        answers = iter([MATCH, MATCH, MISMATCH, MATCH, CLOSE, *[MATCH] * 99])
        self.verdicts = lambda p, d: next(answers) if (p, d) == ("p0", "d1") else MATCH
        await self.rounds(8)
        self.assertEqual(self.wrong(), {("p0", "d1")})
        await self.rounds()
        self.assertEqual(self.wrong(), set())
        self.assertIn("d1 answers rightly with what p0 hands over", self.said()[-1])
        self.assertIn(("p0", "d1"), self.served())

    async def test_another_process_begins_anew(self) -> None:
        self.verdicts = lambda p, d: MISMATCH
        await self.rounds()
        p0, d0 = self.registry.get("p0"), self.registry.get("d0")
        self.registry.started(p0, 1.0)
        self.registry.started(p0, 2.0)
        self.assertEqual({pair for pair in self.wrong() if "p0" in pair}, set())
        self.router.unregister_instance(d0.id)
        self.assertEqual(self.wrong(), {("p1", "d1")})

    async def test_one_that_restarts_while_it_is_checked_is_not_left_out(self) -> None:
        p0 = self.registry.get("p0")
        self.registry.started(p0, 1.0)

        def restarts(_: str, __: str) -> Verdict:
            self.registry.started(p0, float(len(self.tried)) + 1)
            return MISMATCH

        self.verdicts = restarts
        await self.check.check("p0", "d0", None, "admin")
        self.assertEqual(self.wrong(), set())

    async def test_those_who_are_busy_are_left_alone(self) -> None:
        p0, d0 = self.registry.get("p0"), self.registry.get("d0")
        quiet = MetricsSnapshot(100.0)

        async def skipped(words: str) -> None:
            found = await self.check.check("p0", "d0", None, "admin")
            self.assertEqual((found.verdict, self.tried), (SKIPPED, []))
            self.assertIn(words, found.reason)

        for endpoint in (p0, d0):
            self.registry.scraped(endpoint, replace(quiet, waiting=1), 0)
            await skipped(f"requests wait at {endpoint.id}")
            self.registry.scraped(endpoint, replace(quiet, kv_usage=0.9), 0)
            await skipped(f"{endpoint.id} is full")
            self.registry.ends.overloaded(endpoint, 100.0)
            self.registry.scraped(endpoint, quiet, 0)
            await skipped(f"{endpoint.id} is full")
            self.registry.ends.overloaded(endpoint, -100.0)
            self.registry.forget_metrics(endpoint)
            await skipped(f"the load of {endpoint.id} is not known")
            self.registry.scraped(endpoint, quiet, 0)
            self.registry.drain(endpoint.id)
            await skipped(f"{endpoint.id} is draining")
            self.registry.undrain(endpoint.id)
        self.queued = 1
        await skipped("requests wait in the scheduler")
        self.queued = 0
        running = self.registry.work.reserve(p0)
        await skipped("requests wait at p0")
        running.release()
        await self.check.check("p0", "d0", None, "admin")
        self.assertEqual(self.tried, [("m", "p0", "d0")])

    async def test_it_begins_and_ends_with_its_interval(self) -> None:
        running = asyncio.ensure_future(self.check.run())
        await asyncio.sleep(0)
        self.assertEqual(self.tried, [])
        self.router.config.__dict__["self_check_interval"] = 0.001
        self.check.reconfigured()

        async def several() -> bool:
            return len(self.tried) > 3

        await until(several)
        self.router.config.__dict__["self_check_interval"] = None
        self.check.reconfigured()
        await asyncio.sleep(0.01)
        count = len(self.tried)
        await asyncio.sleep(0.02)
        self.assertEqual(len(self.tried), count)
        running.cancel()

    async def test_reloads_do_not_put_it_off(self) -> None:
        """Some fleets are configured anew each few seconds."""
        self.check._clock = time.monotonic
        self.router.config.__dict__["self_check_interval"] = 0.2
        running = asyncio.ensure_future(self.check.run())

        async def reloaded() -> bool:
            self.check.reconfigured()
            return bool(self.tried)

        await until(reloaded)
        running.cancel()

    async def test_one_at_a_time(self) -> None:
        most = now = 0

        async def slow(model: str, prefill: Endpoint, decode: Endpoint) -> Try:
            nonlocal most, now
            now += 1
            most = max(most, now)
            await asyncio.sleep(0)
            now -= 1
            return Try(MATCH)

        self.check._try_pair = slow
        await asyncio.gather(*(self.check.round("probe") for _ in range(5)))
        self.assertEqual((most, len(self.check.results)), (1, 5))


class ConfigTest(unittest.TestCase):
    def test_it_needs_a_scheduler_that_calls_p(self) -> None:
        with self.assertRaisesRegex(ConfigError, "self_check_interval: not with"):
            parse_config({"self_check_interval": 60, "prefill_leg": "sidecar"})


if __name__ == "__main__":
    unittest.main()
