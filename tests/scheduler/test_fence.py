"""A strategy of the operator's may do what it likes: requests are served, and the failure is seen."""

import asyncio
import itertools
import unittest
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from prometheus_client import generate_latest

from tests.support.fleet import D, P, prompt, registry_of, scheduler_of
from vllm_pd_scheduler.admin.collectors import collectors
from vllm_pd_scheduler.admission.queue import Ticket
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole, PDInstance
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.scheduler import Scheduler
from vllm_pd_scheduler.scheduler.disaggregation import Disaggregation
from vllm_pd_scheduler.strategies import Strategy

LOG = "vllm_pd_scheduler.telemetry.failures"


class Custom(Strategy):
    """Does as the base class, but for the method ``bad``: that returns ``answer``, or raises it."""

    bad: ClassVar[str] = ""
    answer: ClassVar[Any] = None

    def _or_bad(self, method: str, good: Any) -> Any:
        if method != self.bad:
            return good
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    @property
    def reads_prefixes(self) -> bool:  # type: ignore[override]
        return bool(self._or_bad("reads_prefixes", False))

    def accepts_sample(self, request: RequestContext) -> bool:
        return bool(self._or_bad("accepts_sample", True))

    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        return self._or_bad("score", endpoint.requests)

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> Any:
        return self._or_bad("scores", super().scores(endpoints, request))

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        return self._or_bad("rank", super().rank(endpoints, request, count))  # type: ignore[no-any-return]

    def order(self, request: RequestContext, cost: float) -> Any:
        return self._or_bad("order", super().order(request, cost))

    def hopeless(self, request: RequestContext, cost: float) -> Any:
        return self._or_bad("hopeless", False)

    @contextmanager
    def same_turn(self) -> Iterator[None]:
        self._or_bad("same_turn", None)
        with super().same_turn():
            yield
        self._or_bad("after_the_turn", None)


class CustomOfAll(Custom):
    """Accepts no sample."""

    def accepts_sample(self, request: RequestContext) -> bool:
        return False


class Unfinished(Strategy):
    """Does not call the constructor of the base class, so it has no ``random`` and no turn."""

    def __init__(self, config: SchedulerConfig) -> None:
        pass

    def score(self, endpoint: Endpoint, request: RequestContext) -> float:
        return endpoint.requests


NAME = f"{__name__}:Custom"
METHODS = (
    "reads_prefixes", "accepts_sample", "score", "scores", "rank", "order", "hopeless", "same_turn",
    "after_the_turn",
)  # fmt: skip


class FenceTest(unittest.TestCase):
    def setUp(self) -> None:
        self.addCleanup(self.be, "")
        self.be("")

    def be(self, bad: str, answer: Any = None) -> None:
        Custom.bad, Custom.answer = bad, answer

    def failures(self, scheduler: Scheduler, role: InstanceRole = P) -> int:
        return scheduler.strategies.failures.counts[NAME, role.value]

    def test_every_method_may_raise(self) -> None:
        for method, large in itertools.product(METHODS, (False, True)):
            with self.subTest(method, large=large), self.assertLogs(LOG, "ERROR"):
                self.be("")
                scheduler = scheduler_of(*(2, 2) if not large else (200, 2), strategy=NAME)
                self.be(method, ZeroDivisionError("odd"))
                least = scheduler.registry.endpoints(P)[1]
                for endpoint in scheduler.registry.endpoints(P):
                    if endpoint is not least:
                        scheduler.registry.work.reserve(endpoint)
                _ = scheduler.reads_prefixes
                request = prompt(priority=-1)
                for choice in (scheduler.preview(P, request), scheduler.pick(P, request)):
                    self.assertEqual(len(choice), 1)
                    self.assertTrue(large or choice == [least])
                strategy = scheduler.strategies.of(P)
                self.assertIs(strategy.hopeless(request, 1.0), False)
                self.assertEqual(strategy.order(request, 1.0), 1.0)
                if large or method != "accepts_sample":  # which a small fleet does not ask for
                    self.assertGreater(self.failures(scheduler), 0)
                else:
                    logging_something(scheduler)

    def test_what_is_no_ranking(self) -> None:
        scheduler, stranger = scheduler_of(3, 3, strategy=NAME), registry_of().endpoints(P)[0]
        p0, p1, p2 = scheduler.registry.endpoints(P)
        d0 = scheduler.registry.endpoints(D)[0]
        answers: list[Any] = [None, 5, [], {}, [None], "p0", [stranger], [d0], [p2], [p0, p0], [p0, p1, p0]]
        answers += [[p0, p1, p2], [[p0]], itertools.repeat(p0)]
        with self.assertLogs(LOG, "ERROR") as logged:
            for number, answer in enumerate(answers, 1):
                with self.subTest(answer=answer):
                    self.be("rank", answer)
                    picked = scheduler.pick(P, prompt(), count=2, exclude=[p2])
                    self.assertEqual({e.id for e in picked}, {"p0", "p1"})
                    self.assertEqual(self.failures(scheduler), number)
        self.assertEqual(len(logged.output), 1, "once a minute")

    def test_a_ranking_need_not_be_a_list(self) -> None:
        scheduler = scheduler_of(3, 3, strategy=NAME)
        p0, p1, _ = scheduler.registry.endpoints(P)
        kept = [p1]
        for answer in (kept, (p1,), iter([p1]), {p1: None}):
            self.be("rank", answer)
            picked = scheduler.pick(P, prompt())
            self.assertEqual(picked, [p1])
            picked.append(p0)
        self.assertEqual(kept, [p1], "what it keeps is not written to")
        self.assertEqual(self.failures(scheduler), 0)

    def test_after_fewer_than_it_was_asked_for_come_those_with_the_least_load(self) -> None:
        for size in (4, 200):
            scheduler = scheduler_of(2, size, strategy=f"{NAME}OfAll")
            d0, d1, d2, d3, *others = scheduler.registry.endpoints(D)
            for endpoint in (d2, d1, d1, d3, d3, d3, *others, *others, *others):
                scheduler.registry.work.reserve(endpoint)
            for answer, exclude, expected in (
                ([d3], (), [d3, d0, d2, d1]),
                ([d3, d0], (), [d3, d0, d2, d1]),
                ([d3], (d2,), [d3, d0, d1]),
                ([d3], (d0, d1, d2), [d3]),
            ):
                with self.subTest(size=size, answer=answer, exclude=exclude):
                    self.be("rank", answer)
                    picked = scheduler.pick(D, prompt(), count=4, exclude=exclude)
                    self.assertEqual(
                        (len(picked), len(set(picked))), (min(4, size - len(exclude)), len(picked))
                    )
                    self.assertFalse(set(picked) & set(exclude))
                    if size == 4:
                        self.assertEqual(picked, expected)
                    else:
                        self.assertEqual(picked[: len(answer)], answer)
                        rest = picked[len(answer) :]
                        self.assertEqual(rest, sorted(rest, key=lambda e: e.requests))
            self.assertEqual(sum(scheduler.strategies.failures.counts.values()), 0)

    def test_those_that_are_full_are_no_rest(self) -> None:
        scheduler = scheduler_of(3, 1, strategy=NAME, max_in_flight_tokens=500)
        p0, p1, p2 = scheduler.registry.endpoints(P)
        scheduler.registry.work.reserve(p2, prompt())
        self.be("rank", [p1])
        self.assertEqual(scheduler.pick(P, prompt(), count=3), [p1, p0])

    def test_no_score_that_cannot_be_compared(self) -> None:
        scheduler = scheduler_of(3, 3, strategy=NAME)
        with self.assertLogs(LOG, "ERROR"):
            nan = float("nan")
            answers: list[Any] = [[None, 1.0, "x"], [1j, 2j, 3j], [], [1.0, 2.0], [1.0] * 4, None]
            answers += [[nan] * 3, [0.0, nan, 1.0], [(1, 0.0), (0, nan), (2, 0.0)]]
            for number, answer in enumerate(answers, 1):
                for count in (1, 2):
                    with self.subTest(answer=answer, count=count):
                        self.be("scores", answer)
                        self.assertEqual(len(set(scheduler.pick(P, prompt(), count=count))), count)
                        self.assertEqual(self.failures(scheduler), 2 * (number - 1) + count)

    def test_an_order_that_is_no_number(self) -> None:
        scheduler = scheduler_of(strategy=NAME)
        with self.assertLogs(LOG, "ERROR"):
            for number, answer in enumerate((None, "first", float("nan"), 1j, [1.0]), 1):
                self.be("order", answer)
                self.assertEqual(scheduler.strategies.of(P).order(prompt(arrived=10.0), 3.0), 5.0)
                self.assertEqual(self.failures(scheduler), number)

    def test_what_is_no_exception_passes(self) -> None:
        scheduler = scheduler_of(strategy=NAME)
        for error in (KeyboardInterrupt(), SystemExit(), asyncio.CancelledError(), GeneratorExit()):
            for method in ("rank", "order", "hopeless", "same_turn"):
                with self.subTest(error=error, method=method), self.assertRaises(type(error)):
                    self.be(method, error)
                    scheduler.preview(P, prompt())
                    scheduler.strategies.of(P).order(prompt(), 1.0)
                    scheduler.strategies.of(P).hopeless(prompt(), 1.0)
        self.assertEqual(self.failures(scheduler), 0)

    def test_the_log_says_who_where_and_what(self) -> None:
        scheduler = scheduler_of(strategy=NAME)
        self.be("score", ZeroDivisionError("odd"))
        with self.assertLogs(LOG, "ERROR") as logged:
            for role in (P, D, P, D):
                scheduler.pick(role, prompt())
        self.assertEqual(len(logged.output), 2, "once a minute for each role")
        for role, line in zip((P, D), logged.output, strict=True):
            self.assertRegex(
                line,
                rf"strategy {NAME} failed for {role}: ZeroDivisionError: odd, at .*test_fence\.py:\d+ in ",
            )

    def test_it_is_counted_for_prometheus(self) -> None:
        router = PDRouter(SchedulerConfig(strategy=NAME))
        for number, role in enumerate(PD_ROLES):
            router.register_instance(PDInstance(f"{role}", role, f"10.0.0.{number}", 80))
            router.registry.probed(router.registry.get(role), None)

        def page() -> str:
            return generate_latest(collectors(router, lambda: 0.0)).decode()

        series = f'pd_scheduler_strategy_failures_total{{role="prefill",strategy="{NAME}"}}'
        self.assertIn(f"{series} 0.0", page(), "from the start, so that rate() has a first value")
        self.assertIn(
            'pd_scheduler_connector_failures_total{call="can_split",connector="AutoConnector"} 0.0', page()
        )
        self.be("rank", ValueError())
        with self.assertLogs(LOG, "ERROR"):
            router.scheduler.pick(P, prompt())
        self.assertIn(f"{series} 1.0", page())
        router.scheduler.strategies.use("least_load")
        self.assertIn(f"{series} 1.0", page(), "a counter does not go away with its strategy")

    def test_one_that_is_not_made_whole(self) -> None:
        with self.assertLogs(LOG, "ERROR"):
            scheduler = scheduler_of(strategy=f"{__name__}:Unfinished")
            self.assertEqual(len(scheduler.pick(P, prompt(), count=2)), 2)


class AroundTest(unittest.IsolatedAsyncioTestCase):
    """What would break if a strategy's error got through."""

    def setUp(self) -> None:
        Custom.bad, Custom.answer = "", None
        self.addCleanup(setattr, Custom, "bad", "")

    async def test_a_drain_reaches_all_who_listen(self) -> None:
        """With a request waiting, since that is looked at first."""
        router = PDRouter(SchedulerConfig(strategy=NAME, max_waiting=1), clock=lambda: 1.0)
        registry, dispatcher = router.registry, router.dispatcher
        for role, number in itertools.product(PD_ROLES, range(2)):
            name = f"{role[0]}{number}"
            router.register_instance(PDInstance(name, role, f"10.0.0.{number}", 80))
            registry.probed(registry.get(name), None)
        for endpoint in registry.endpoints(P):
            registry.work.reserve(endpoint)
        ticket = Ticket(prompt(), P)
        dispatcher.submit(ticket, 1.0)
        self.assertFalse(ticket.settled)
        told: list[str] = []
        registry.changes.subscribe(lambda: told.append("Envoy"))
        Custom.bad, Custom.answer = "hopeless", ZeroDivisionError()
        with self.assertLogs(LOG, "ERROR"):
            router.drain_instance("p0")
        self.assertEqual(told, ["Envoy"])

    async def test_who_prefills_is_still_decided(self) -> None:
        for setting in ("auto", "never", 10_000):
            scheduler = scheduler_of(strategy=NAME, disaggregation=setting)
            Custom.bad, Custom.answer = "rank", ZeroDivisionError()
            with self.subTest(setting), self.assertLogs(LOG, "ERROR"):
                local = Disaggregation(scheduler.config, scheduler).local_endpoint(prompt(100.0))
                self.assertIn(local, scheduler.registry.endpoints(D))


def logging_something(scheduler: Scheduler) -> None:
    """Make ``assertLogs`` content."""
    scheduler.strategies.failures.add("other", "prefill", None, ValueError())


if __name__ == "__main__":
    unittest.main()
