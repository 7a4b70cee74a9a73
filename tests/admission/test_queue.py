"""The queue: bounded, by priority, in turn by tenant, shortest first, against a plain model."""

import tracemalloc
import unittest
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.given import give
from vllm_pd_scheduler.admission.queue import SHORT_S, RequestQueue, Ticket
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.models import InstanceRole
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.strategies.base import AGEING, Strategy

P = InstanceRole.PREFILL


def ticket(tenant: str = "", cost: float = 1.0, priority: int = 0, size: int = 0) -> Ticket:
    context = RequestContext("/v1/completions", tenant=tenant, priority=priority)
    return Ticket(context, P, size, cost)


def queue_of(size: int = 1000, size_bytes: int = 1 << 30) -> RequestQueue:
    return RequestQueue(size, size_bytes)


def serve(waiting: RequestQueue) -> Ticket:
    first = next(iter(waiting))
    waiting.remove(first, served=True)
    return first


class OrderTest(unittest.TestCase):
    def test_priorities_are_strict(self) -> None:
        waiting = queue_of()
        tickets = [ticket(priority=priority) for priority in (0, -5, 7, 0, 7)]
        for number, one in enumerate(tickets):
            waiting.push(one, -number)
        self.assertEqual([one.request.priority for one in waiting], [7, 7, 0, 0, -5])

    def test_the_least_order_first_and_of_equals_the_first_to_come(self) -> None:
        waiting = queue_of()
        tickets = [ticket() for _ in range(4)]
        for one, order in zip(tickets, (2.0, 1.0, 2.0, 0.5), strict=True):
            waiting.push(one, order)
        self.assertEqual(list(waiting), [tickets[3], tickets[1], tickets[0], tickets[2]])
        self.assertEqual(list(waiting.by_arrival()), tickets)

    def test_one_that_is_deferred_comes_last_but_waits_as_long(self) -> None:
        waiting = queue_of()
        first, second, low = ticket(), ticket(), ticket(priority=-1)
        for one in (first, second, low):
            waiting.push(one, 0.0)
        self.assertTrue(waiting.defer(first))
        self.assertFalse(waiting.defer(first))
        self.assertEqual(list(waiting), [second, low, first])
        self.assertIs(next(waiting.by_arrival()), first)
        waiting.remove(first)
        self.assertEqual(len(waiting), 2)

    def test_it_knows_whether_only_short_ones_wait_for_prefill(self) -> None:
        waiting = queue_of(size=3)
        self.assertTrue(waiting.only_short)
        short, long = ticket(cost=SHORT_S), ticket(cost=2 * SHORT_S)
        whole = Ticket(RequestContext("/v1/completions"), InstanceRole.DECODE, cost=9.0)
        for one, only_short in ((short, True), (whole, True), (long, False)):
            waiting.push(one, 0.0)
            self.assertIs(waiting.only_short, only_short)
        waiting.defer(long)
        self.assertFalse(waiting.only_short)
        waiting.push(ticket(cost=SHORT_S, priority=1), 0.0)  # in place of the deferred one
        self.assertNotIn(long, waiting)
        self.assertTrue(waiting.only_short)

    def test_ageing_bounds_the_wait_of_a_long_one(self) -> None:
        """A new short one every 10 ms, and room for one each 10 ms: the long one is still served."""
        strategy, waiting = Strategy(SchedulerConfig()), queue_of(100_000)
        cost, short, now = 0.5, 0.1, 0.0
        long = ticket(cost=cost)
        waiting.push(long, strategy.order(long.request, cost))
        while long in waiting:
            now += 0.01
            newcomer = ticket(cost=short)
            give(newcomer.request, arrived=now)
            waiting.push(newcomer, strategy.order(newcomer.request, short))
            serve(waiting)
            self.assertLessEqual(now, (cost - short) / AGEING + 0.02)
        self.assertGreater(now, (cost - short) / AGEING / 2, "but not at once")


class TenantsTest(unittest.TestCase):
    def test_work_is_shared_whoever_sends_more(self) -> None:
        waiting, served = queue_of(), {"heavy": 0.0, "light": 0.0}
        for _ in range(200):
            waiting.push(ticket("heavy", 3.0), 0.0)
        for _ in range(200):
            waiting.push(ticket("light", 1.0), 0.0)
        for _ in range(100):
            one = serve(waiting)
            served[one.request.tenant] += one.cost
            self.assertLessEqual(abs(served["heavy"] - served["light"]), 3.0)

    def test_who_comes_later_has_no_claim_on_the_past(self) -> None:
        waiting = queue_of()
        for _ in range(100):
            waiting.push(ticket("early"), 0.0)
        for _ in range(50):
            serve(waiting)
        for _ in range(100):
            waiting.push(ticket("late"), 0.0)
        turns = [serve(waiting).request.tenant for _ in range(20)]
        self.assertEqual((turns.count("early"), turns.count("late")), (10, 10))

    def test_one_who_waits_with_one_request_at_a_time_has_no_more(self) -> None:
        """Its count would begin anew each time that nothing of it waits."""
        waiting, served = queue_of(), {"a": 0.0, "b": 0.0}
        for _ in range(500):
            waiting.push(ticket("b", 1.0), 0.0)
        waiting.push(ticket("a", 10.0), 0.0)
        for _ in range(110):
            one = serve(waiting)
            served[one.request.tenant] += one.cost
            if one.request.tenant == "a":
                waiting.push(ticket("a", 10.0), 0.0)
        self.assertLessEqual(served["a"] - served["b"], 10.0)

    def test_names_are_not_kept_for_ever(self) -> None:
        waiting = queue_of()
        waiting.push(ticket("stays", 1e9), 1e9)
        for number in range(5000):
            one = ticket(f"t{number}")
            waiting.push(one, 0.0)
            waiting.remove(one, served=True)
        self.assertLessEqual(len(waiting._levels[0].served_idle), 1024)


class RoomTest(unittest.TestCase):
    def test_by_number(self) -> None:
        waiting = queue_of(2)
        first, second = ticket(), ticket()
        self.assertEqual([waiting.push(first, 0.0), waiting.push(second, 0.0)], [[], []])
        self.assertIsNone(waiting.push(ticket(), 0.0))
        waiting.remove(first)
        self.assertEqual(waiting.push(ticket(), 0.0), [])

    def test_by_bytes(self) -> None:
        waiting = queue_of(10, 100)
        waiting.push(ticket(size=60), 0.0)
        self.assertIsNone(waiting.push(ticket(size=41), 0.0))
        self.assertEqual(waiting.push(ticket(size=40), 0.0), [])
        self.assertEqual(waiting.bytes, 100)

    def test_a_higher_priority_displaces_the_last_of_a_lower(self) -> None:
        waiting = queue_of(3)
        low, middle, last = ticket(priority=-2), ticket(), ticket()
        for order, one in enumerate((low, middle, last)):
            waiting.push(one, order)
        high = [ticket(priority=5) for _ in range(4)]
        self.assertEqual([waiting.push(one, 0.0) for one in high], [[low], [last], [middle], None])
        self.assertIsNone(waiting.push(ticket(priority=5), 0.0), "its own priority gives no room")

    def test_nobody_goes_if_that_does_not_make_room(self) -> None:
        waiting = queue_of(10, 100)
        kept = [ticket(size=30), ticket(size=30), ticket(size=40, priority=1)]
        for one in kept:
            waiting.push(one, 0.0)
        self.assertIsNone(waiting.push(ticket(size=61, priority=1), 0.0))
        self.assertEqual((len(waiting), waiting.bytes), (3, 100))

    def test_deferred_ones_go_first(self) -> None:
        waiting = queue_of(2)
        hopeless, fresh = ticket(), ticket()
        waiting.push(hopeless, 0.0)
        waiting.push(fresh, 0.0)
        waiting.defer(hopeless)
        self.assertIsNone(waiting.push(ticket(priority=-1), 0.0))
        self.assertEqual(waiting.push(ticket(), 0.0), [hopeless])
        self.assertIsNone(waiting.push(ticket(), 0.0))

    def test_memory(self) -> None:
        """A request that waits takes at most 2 KiB beside its body, and 48 bytes for each KiB of prompt."""
        count, blocks = 2000, 100
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            waiting = queue_of(count)
            for number in range(count):
                context = RequestContext(
                    "/v1/completions",
                    tenant=f"tenant-{number}",
                    session=f"s{number}",
                    arrived=number * 1.5,
                    blocks=tuple((number * blocks + block) << 24 for block in range(blocks)),
                )
                waiting.push(Ticket(context, P, 0, number * 0.5), number * 0.25)
            each = (tracemalloc.get_traced_memory()[0] - before) / count
        finally:
            tracemalloc.stop()
        self.assertEqual(len(waiting), count)
        self.assertLess(each, 2048 + 48 * blocks)
        self.assertGreater(each, 32 * blocks, "the hashes are what takes most")


@dataclass
class Model:
    """The same by plain lists: each question is answered by looking at everything."""

    size: int
    size_bytes: int
    here: list[tuple[Ticket, float]] = field(default_factory=list)
    deferred: list[Ticket] = field(default_factory=list)
    served: dict[tuple[int, str], float] = field(default_factory=dict)

    def waiting(self, priority: int, tenant: str | None = None) -> list[tuple[Ticket, float]]:
        return [
            (one, order)
            for one, order in self.here
            if one not in self.deferred
            and one.request.priority == priority
            and tenant in (None, one.request.tenant)
        ]

    def order(self) -> list[Ticket]:
        found: list[Ticket] = []
        for priority in sorted({one.request.priority for one, _ in self.here}, reverse=True):
            left = self.waiting(priority)
            served = dict(self.served)
            while left:
                tenant = min({one.request.tenant for one, _ in left}, key=lambda t: (served[priority, t], t))
                mine = [each for each in left if each[0].request.tenant == tenant]
                first = min(mine, key=lambda each: each[1])
                left.remove(first)
                served[priority, tenant] += first[0].cost
                found.append(first[0])
        return found + self.deferred

    def push(self, new: Ticket, order: float) -> list[Ticket] | None:
        priority = new.request.priority
        last_first = [one for one in reversed(self.deferred) if one.request.priority <= priority]
        below = [one for one in self.order() if one not in self.deferred and one.request.priority < priority]
        for level in sorted({one.request.priority for one in below}):
            last_first += [one for one in reversed(below) if one.request.priority == level]
        total = sum(one.size for one, _ in self.here)
        for count in range(len(last_first) + 1):
            victims = last_first[:count]
            fits = len(self.here) - count < self.size
            if fits and total - sum(v.size for v in victims) + new.size <= self.size_bytes:
                break
        else:
            return None
        for victim in victims:
            self.remove(victim, False)
        key = (priority, new.request.tenant)
        active = {one.request.tenant for one, _ in self.waiting(priority)}
        if new.request.tenant not in active:
            level = min((self.served[priority, tenant] for tenant in active), default=0.0)
            if not active:
                self.served = {k: v for k, v in self.served.items() if k[0] != priority}
            self.served[key] = max(level, self.served.get(key, 0.0))
        self.here.append((new, order))
        return victims

    def remove(self, one: Ticket, served: bool) -> None:
        if one in self.deferred:
            self.deferred.remove(one)
        elif served:
            self.served[one.request.priority, one.request.tenant] += one.cost
        self.here = [each for each in self.here if each[0] is not one]

    def defer(self, one: Ticket) -> None:
        if one not in self.deferred:
            self.deferred.append(one)


calls = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "push", "serve", "remove", "defer"]),
        st.sampled_from("abc"),
        st.integers(-1, 1),
        st.integers(0, 40),
        st.sampled_from([0.5, 1.0, 2.0, 4.0]),
        st.integers(0, 9),
    ),
    max_size=60,
)


class ModelTest(unittest.TestCase):
    @given(calls=calls, size=st.integers(0, 8), size_bytes=st.integers(0, 150))
    @settings(derandomize=True, deadline=None, max_examples=300)
    def test_it_does_what_the_model_does(self, calls: list[Any], size: int, size_bytes: int) -> None:
        waiting, model = queue_of(size, size_bytes), Model(size, size_bytes)
        for what, tenant, priority, number, cost, order in calls:
            if what == "push":
                new = ticket(tenant, cost, priority, number)
                displaced = waiting.push(new, order)
                self.assertEqual(displaced, model.push(new, order))
                self.assertEqual(new in waiting, displaced is not None)
            elif model.here:
                one = model.order()[0] if what == "serve" else model.here[number % len(model.here)][0]
                if what == "defer":
                    waiting.defer(one)
                    model.defer(one)
                else:
                    waiting.remove(one, served=what == "serve")
                    model.remove(one, what == "serve")
                    self.assertNotIn(one, waiting)
            everyone = list(waiting)
            self.assertEqual(everyone, model.order())
            self.assertEqual(list(waiting.by_arrival()), [one for one, _ in model.here])
            self.assertEqual(len(waiting), len(everyone))
            self.assertEqual(waiting.bytes, sum(one.size for one in everyone))
            self.assertAlmostEqual(waiting.work, sum(one.cost for one in everyone))
            self.assertLessEqual(len(waiting), size)
            self.assertLessEqual(waiting.bytes, size_bytes)
            on_time = [one.request.priority for one in everyone if one not in model.deferred]
            self.assertTrue(all(a >= b for a, b in pairwise(on_time)))


if __name__ == "__main__":
    unittest.main()
