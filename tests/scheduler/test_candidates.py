"""Whom a strategy may choose from: exactly the rule in a small fleet and a large one, at a bounded cost."""

import random
import unittest
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fleet import D, P, prompt, scheduler_of
from vllm_pd_scheduler.admission.dispatcher import Dispatcher
from vllm_pd_scheduler.admission.queue import Ticket
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.models import MetricsSnapshot
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.scheduler import Scheduler, availability, candidates, remaining
from vllm_pd_scheduler.scheduler.candidates import LARGE_FLEET, LONGEST, SAMPLE
from vllm_pd_scheduler.strategies import Strategy

SAMPLING = ("least_load", "weighted", "prefix_cache", "predicted_latency", "slo")
ALL = (*SAMPLING, "round_robin", "power_of_two", "session")
SIZE = 200
BLOCKS = tuple(range(1, 21))


class Asked(Strategy):
    """Ranks what comes first, and keeps what it was offered."""

    offered: Sequence[Endpoint] = ()
    cached: Any = None

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        self.offered, self.cached = endpoints, dict(request.cached)
        return list(endpoints[:count])


class AskedSome(Asked):
    """The same, and a sample is enough for it."""

    reads_prefixes = True

    def accepts_sample(self, request: RequestContext) -> bool:
        return True


class Stubborn(Strategy):
    """Always the first, whatever the count."""

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        return [endpoints[0]]


def expected(
    scheduler: Scheduler, now: float, exclude: Sequence[Endpoint], model: str | None = None
) -> list[Endpoint]:
    """The rule, read from all endpoints."""
    endpoints = scheduler.registry.endpoints(P)
    known = any(model in (e.models.names or ()) for e in endpoints)
    chosen = list(scheduler.registry.routable(P))
    if model is not None:
        serve = [e for e in chosen if not e.models.names or model in e.models.names]
        chosen = serve if known or serve or all(e.models.names for e in endpoints) else chosen
    chosen = [e for e in chosen if e not in exclude]
    chosen = [e for e in chosen if not e.on_trial] or chosen
    return [e for e in chosen if not scheduler.limits.saturated(e, now)] or chosen


class RuleTest(unittest.TestCase):
    @given(
        limits=st.sampled_from([{}, {"max_waiting": 2}, {"max_in_flight_tokens": 2500, "max_kv_usage": 0.5}]),
        large=st.sampled_from([2, LARGE_FLEET]),
        kept=st.sampled_from([1, 3, 64]),
        few=st.sampled_from([0, 32]),
        steps=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.booleans()), max_size=60),
    )
    @settings(derandomize=True, deadline=None, max_examples=100)
    def test_it_is_kept_whatever_happens(
        self, limits: dict[str, Any], large: int, kept: int, few: int, steps: list[tuple[int, int, bool]]
    ) -> None:
        with (
            mock.patch.object(candidates, "LARGE_FLEET", large),
            mock.patch.object(availability, "KEPT_MOVES", kept),
            mock.patch.object(remaining, "_FEW", few),
        ):
            self.run_steps(scheduler_of(6, 1, strategy=f"{__name__}:Asked", **limits), steps)

    def run_steps(self, scheduler: Scheduler, steps: list[tuple[int, int, bool]]) -> None:
        registry, now, draw = scheduler.registry, 0.0, random.Random(1)
        endpoints = registry.endpoints(P)
        claims: list[Reservation] = []
        for step, which, look in steps:
            endpoint = endpoints[which]
            if step == 0:
                claims.append(registry.work.reserve(endpoint, prompt(now=now)))
            elif step == 1 and claims:
                claims.pop(which % len(claims)).release(now)
            elif step == 2:
                snapshot = MetricsSnapshot(now, waiting=float(which), kv_usage=which / 5, kv_capacity=9000.0)
                registry.scraped(endpoint, snapshot, endpoint.in_flight, endpoint.tokens)
            elif step == 3:
                registry.ends.overloaded(endpoint, now, float(which))
            elif step == 4:
                for _ in range(3):
                    registry.ends.failed(endpoint, "reset", now)
            elif step == 5:
                registry.probed(endpoint, None, now)
            elif step == 6:
                (registry.undrain if endpoint.draining else registry.drain)(endpoint.id)
            elif step == 7:
                registry.forget_metrics(endpoint)
            elif step == 8:
                lists = (None, frozenset[str](), *map(frozenset, ("a", "b", "ab", "abc")))
                registry.models.listed(endpoints[draw.randrange(6)], lists[which])
            now += 0.4
            if look:
                for model in (None, "a", "b", "c", "unheard of"):
                    self.check(scheduler, now, endpoints[: which // 2], model)

    def check(self, scheduler: Scheduler, now: float, exclude: Sequence[Endpoint], model: str | None) -> None:
        found = scheduler._pools[P].of(model)
        self.assertEqual(list(found.all(now)), expected(scheduler, now, (), model))
        self.assertEqual(
            [e for e in scheduler.registry if e in found.all(now)], expected(scheduler, now, (), model)
        )
        self.assertEqual(list(found.all(now, exclude)), expected(scheduler, now, exclude, model))
        everyone = expected(scheduler, now, (), model)
        room = not everyone or not all(scheduler.limits.saturated(e, now) for e in everyone)
        self.assertIs(scheduler.has_room(P, now, model), room)
        self.assertEqual([e for e in scheduler.registry if e in found], everyone)
        busy = [e.pause.until for e in scheduler.registry.routable(P) if e.pause.until > now]
        self.assertLessEqual(scheduler.room_at(now), min(busy, default=float("inf")))
        self.assertGreater(scheduler.room_at(now), now)
        allowed = expected(scheduler, now, exclude, model)
        picked = scheduler.pick(P, prompt(now=now, model=model), count=2, exclude=exclude)
        self.assertLessEqual(set(picked), set(allowed))
        self.assertEqual(bool(picked), bool(allowed))


class LargeFleetTest(unittest.TestCase):
    def start(self, name: str, prefill: int = SIZE, decode: int = 2, **config: Any) -> None:
        self.scheduler = scheduler_of(prefill, decode, strategy=name, **config)
        self.registry = self.scheduler.registry
        self.endpoints = self.registry.endpoints(P)

    def offered(self, **more: Any) -> Sequence[Endpoint]:
        self.scheduler.pick(P, prompt(**more))
        asked = self.scheduler.strategies.of(P).strategy
        assert isinstance(asked, Asked)
        return asked.offered

    def test_a_small_fleet_is_offered_whole(self) -> None:
        self.start(f"{__name__}:AskedSome", LARGE_FLEET)
        self.assertEqual(list(self.offered()), self.endpoints)

    def test_a_strategy_is_offered_all_unless_it_accepts_a_sample(self) -> None:
        self.start(f"{__name__}:Asked")
        self.assertEqual(list(self.offered()), self.endpoints)
        self.start(f"{__name__}:AskedSome")
        sizes = [len(self.offered(now=float(now))) for now in range(100)]
        self.assertLessEqual(max(sizes), SAMPLE)
        self.assertGreater(min(sizes), SAMPLE / 2)

    def test_everyone_comes_into_a_sample(self) -> None:
        self.start(f"{__name__}:AskedSome")
        seen = Counter(e for now in range(1000) for e in self.offered(now=float(now)))
        self.assertEqual(set(seen), set(self.endpoints))
        self.assertLess(max(seen.values()), 2 * seen.total() / SIZE)

    def test_it_is_the_same_for_one_request_at_one_time(self) -> None:
        """So a shadow ranks what the live strategy has ranked, and a preview tells what will be."""
        self.start(f"{__name__}:AskedSome")
        request = prompt(now=1.0)
        asked = self.scheduler.strategies.of(P).strategy
        assert isinstance(asked, Asked)
        found = []
        for now in (1.0, 1.0, 2.0):
            request.at(now)
            self.scheduler.pick(P, request)
            found.append(asked.offered)
        self.assertEqual(found[0], found[1])
        self.assertNotEqual(found[1], found[2])

    def test_the_longest_cached_prefixes_are_in_it(self) -> None:
        self.start(f"{__name__}:AskedSome")
        for endpoint in self.endpoints:
            endpoint.holder.store(BLOCKS[:3])
        known = self.endpoints[100:104]
        for endpoint in (*known, *self.registry.endpoints(D)):
            endpoint.holder.store(BLOCKS)
        for now in range(20):
            offered = self.offered(blocks=BLOCKS, block_tokens=16.0, now=float(now))
            self.assertLessEqual(set(known), set(offered))
            self.assertLessEqual(len(offered), SAMPLE + LONGEST)
            asked = self.scheduler.strategies.of(P).strategy
            assert isinstance(asked, Asked)
            self.assertEqual(asked.cached, {e.holder: 20 if e in known else 3 for e in offered})

    def test_of_many_with_the_longest_prefix_some(self) -> None:
        self.start(f"{__name__}:AskedSome")
        known = self.endpoints[50:100]
        for endpoint in known:
            endpoint.holder.store(BLOCKS)
        counted: Counter[Endpoint] = Counter()
        for now in range(200):
            offered = self.offered(blocks=BLOCKS, block_tokens=16.0, now=float(now))
            counted.update(set(known).intersection(offered))
        self.assertEqual(set(counted), set(known), "not always the same ones")

    def test_a_cached_prefix_wins_as_in_a_small_fleet(self) -> None:
        for name in ("prefix_cache", "predicted_latency", "slo"):
            self.start(name)
            self.endpoints[77].holder.store(BLOCKS)
            for now in range(20):
                request = prompt(320.0, blocks=BLOCKS, block_tokens=16.0, now=float(now))
                self.assertEqual(self.scheduler.pick(P, request), [self.endpoints[77]], name)

    def test_whom_a_strategy_that_samples_chooses_has_little_to_do(self) -> None:
        draw = random.Random(1)
        for name in SAMPLING:
            self.start(name)
            order = draw.sample(self.endpoints, SIZE)
            for place, endpoint in enumerate(order):
                self.registry.scraped(endpoint, MetricsSnapshot(0.0, waiting=float(place)), 0)
                for _ in range(place // 10):
                    self.registry.work.reserve(endpoint, prompt())
            picks = [self.scheduler.pick(P, prompt(now=float(now)))[0] for now in range(100)]
            places = sorted(map(order.index, picks))
            self.assertLess(places[95], SIZE / 8, name)

    def test_the_saturated_are_never_offered_while_there_are_others(self) -> None:
        for name in ALL:
            self.start(name, max_in_flight_tokens=1000)
            room = self.endpoints[17]
            for endpoint in self.endpoints:
                if endpoint is not room:
                    self.registry.work.reserve(endpoint, prompt(2000.0))
            for now in range(5):
                request = prompt(session=str(now), now=float(now))
                self.assertEqual(self.scheduler.pick(P, request), [room], name)
            self.registry.work.reserve(room, prompt(2000.0))
            self.assertFalse(self.scheduler.has_room(P, 9.0))
            self.assertEqual(len(self.scheduler.pick(P, prompt(now=9.0))), 1)

    def test_excluded_ones_are_not_chosen(self) -> None:
        for name in (*ALL, f"{__name__}:Stubborn"):
            self.start(name)
            tried: list[Endpoint] = []
            for attempt in range(6):
                (picked,) = self.scheduler.pick(P, prompt(session="a", now=float(attempt)), exclude=tried)
                self.assertNotIn(picked, tried, name)
                tried.append(picked)

    def test_a_pick_looks_at_few(self) -> None:
        """Counted, since times depend on the machine."""
        for name in ALL:
            self.start(name, max_waiting=5, max_in_flight_tokens=9000)
            self.scheduler.has_room(P, 0.0)
            found = self.scheduler._availability[P]
            with (
                mock.patch.object(found, "_look_at", wraps=found._look_at) as looked,
                mock.patch.object(self.scheduler.strategies.of(P).strategy, "scores") as scored,
            ):
                scored.side_effect = type(self.scheduler.strategies.of(P).strategy).scores.__get__(
                    self.scheduler.strategies.of(P).strategy
                )
                for now in range(10):
                    request = prompt(now=float(now))
                    self.scheduler.has_room(P, request.now)
                    (picked,) = self.scheduler.pick(P, request)
                    self.registry.work.reserve(picked, request)
                self.assertLessEqual(looked.call_count, 10, name)
                for call in scored.call_args_list:
                    self.assertLessEqual(len(call.args[0]), SAMPLE + LONGEST, name)

    def test_a_shadow_agrees_with_itself(self) -> None:
        self.start("least_load", shadow_strategy="least_load")
        for place, endpoint in enumerate(self.endpoints):  # no two are equal, and so none take turns
            self.registry.scraped(endpoint, MetricsSnapshot(0.0, waiting=float(place)), 0)
        shadow = self.scheduler.strategies.shadow
        assert shadow is not None
        for now in range(30):
            request = prompt(now=float(now))
            (picked,) = self.scheduler.pick(P, request)
            self.scheduler.compare_shadow(P, request, picked)
        self.assertEqual((shadow.tallies[P].agreed, shadow.tallies[P].differed), (30, 0))

    def test_a_session_stays_and_its_endpoint_is_bounded(self) -> None:
        self.start("session")
        homes = {name: self.scheduler.pick(P, prompt(session=str(name)))[0] for name in range(50)}
        again = {name: self.scheduler.pick(P, prompt(session=str(name)))[0] for name in range(50)}
        self.assertEqual(homes, again)
        held = [
            self.registry.work.reserve(self.scheduler.pick(P, prompt(session="a"))[0])
            for _ in range(SIZE * 4)
        ]
        most = max(Counter(claim.endpoint for claim in held).values())
        self.assertLessEqual(most, 1.25 * 4 * 1.25, "the mean is estimated")

    def test_all_that_wait_are_served(self) -> None:
        """Late binding in a fleet of which nobody looks at all."""
        self.start("predicted_latency", late_binding=True)
        dispatcher, now = Dispatcher(self.scheduler), 0.0
        tickets = [Ticket(prompt(30_000.0), P) for _ in range(SIZE + 20)]
        for ticket in tickets:
            dispatcher.submit(ticket, now)
        running = [ticket.outcome for ticket in tickets if isinstance(ticket.outcome, Reservation)]
        self.assertGreater(len(running), SIZE * 0.8)
        while not all(ticket.settled for ticket in tickets):
            self.assertTrue(running, "somebody waits while nothing runs")
            now += 0.01
            running.pop(0).release(now)
            dispatcher.dispatch(now)
            done = [ticket.outcome for ticket in tickets if isinstance(ticket.outcome, Reservation)]
            running += [claim for claim in done if claim.active and claim not in running]
        self.assertEqual(len(dispatcher.queue), 0)


class RepeatableTest(unittest.TestCase):
    def test_the_same_seed_draws_the_same(self) -> None:
        drawn = []
        for _ in range(2):
            scheduler = scheduler_of(SIZE, 1, strategy="least_load")
            drawn.append([scheduler.pick(P, prompt(now=float(now)))[0].id for now in range(20)])
        self.assertEqual(drawn[0], drawn[1])
        self.assertGreater(len(set(drawn[0])), 10)

    def test_schedulers_share_a_registry(self) -> None:
        """Each has seen for itself what has changed."""
        first = scheduler_of(3, 1, max_waiting=1)
        second = Scheduler(SchedulerConfig(max_waiting=1), first.registry)
        for endpoint in first.registry.endpoints(P):
            first.registry.work.reserve(endpoint)
            self.assertEqual(first.has_room(P, 0.0), second.has_room(P, 0.0))
        self.assertFalse(second.has_room(P, 0.0))


if __name__ == "__main__":
    unittest.main()
