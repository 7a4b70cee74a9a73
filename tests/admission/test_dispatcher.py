"""Who is served next: late binding, admission control, and that nobody is forgotten."""

import json
import unittest
from typing import Any
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fleet import D, P, prompt, scheduler_of
from tests.support.given import give
from vllm_pd_scheduler.admission.dispatcher import NEARLY_FREE_S, SHORT_PROMPT_OVERHEADS, Dispatcher
from vllm_pd_scheduler.admission.queue import Ticket
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot
from vllm_pd_scheduler.records.events import Events
from vllm_pd_scheduler.request.errors import Reject
from vllm_pd_scheduler.telemetry import log_lines


class Case(unittest.TestCase):
    def start(self, prefill: int = 1, decode: int = 1, *, overhead: float = 0.0, **config: Any) -> None:
        """Have a fleet in which each prefill takes 0.1 ms a token and ``overhead`` seconds."""
        self.scheduler = scheduler_of(prefill, decode, **config)
        self.registry = self.scheduler.registry
        for endpoint in self.registry.endpoints(P):
            give(endpoint.prefill, overhead=overhead)
        self.dispatcher = Dispatcher(self.scheduler)
        self.settled: list[Ticket] = []

    def submit(
        self, now: float = 0.0, tokens: float = 1000.0, role: InstanceRole = P, size: int = 0, **more: Any
    ) -> Ticket:
        ticket = Ticket(prompt(tokens, arrived=now, **more), role, size, on_settled=self.settled.append)
        self.dispatcher.submit(ticket, now)
        return ticket

    def claim(self, ticket: Ticket) -> Reservation:
        assert isinstance(ticket.outcome, Reservation), ticket.outcome
        return ticket.outcome

    def served(self, ticket: Ticket) -> str:
        return self.claim(ticket).endpoint.id

    def end(self, ticket: Ticket, now: float) -> None:
        self.claim(ticket).release(now)
        self.dispatcher.dispatch(now)

    def assertRefused(self, ticket: Ticket, reason: str) -> None:
        outcome = ticket.outcome
        assert isinstance(outcome, Reject), outcome
        self.assertEqual((outcome.status, outcome.reason), (429, reason))
        self.assertTrue(1 <= int(outcome.headers["retry-after"]) <= 60)
        self.assertIn(f"{outcome.headers['retry-after']} s", json.loads(outcome.body)["error"]["message"])

    def assertWaits(self, *tickets: Ticket) -> None:
        for ticket in tickets:
            self.assertFalse(ticket.settled)
            self.assertIn(ticket, self.dispatcher.queue)


class AtOnceTest(Case):
    def test_without_limits_nobody_waits(self) -> None:
        self.start(2, 1)
        names = [self.served(self.submit()) for _ in range(6)]
        self.assertEqual((names.count("p0"), names.count("p1")), (3, 3))
        self.assertIsNone(self.dispatcher.next_wake(0.0))

    def test_without_an_instance_there_is_nothing_to_wait_for(self) -> None:
        self.start(0, 1, late_binding=True, max_waiting=1)
        ticket = self.submit()
        self.assertEqual((ticket.settled, ticket.outcome), (True, None))


class RaisingTest(Case):
    def test_requests_wait_and_are_served_though_every_call_of_the_strategy_raises(self) -> None:
        self.start(late_binding=True)
        strategy = self.scheduler.strategies.of(P).strategy
        for name in ("rank", "order", "hopeless"):
            patcher = mock.patch.object(strategy, name, side_effect=ZeroDivisionError)
            patcher.start()
            self.addCleanup(patcher.stop)
        with self.assertLogs("vllm_pd_scheduler", "ERROR"):
            first, second, third = self.submit(), self.submit(tokens=10.0), self.submit(tokens=2000.0)
            self.assertWaits(second, third)
            self.end(first, 1.0)
            self.assertEqual(self.served(second), "p0")
            self.end(second, 2.0)
        self.assertEqual(self.served(third), "p0")
        self.assertEqual(len(self.dispatcher.queue), 0)


class LogTest(Case):
    def test_lines_about_one_that_waited_have_its_id_and_not_that_of_the_one_before(self) -> None:
        self.start(late_binding=True)
        first = self.submit(headers={"x-request-id": "first"})
        second = self.submit(headers={"x-request-id": "second"})
        seen = []
        pick = self.scheduler.pick

        def picked(*arguments: Any) -> Any:
            seen.append(log_lines.request_id.get())
            return pick(*arguments)

        token = log_lines.request_id.set("first")
        with mock.patch.object(self.scheduler, "pick", picked):
            self.end(first, 1.0)
        self.assertEqual(self.served(second), "p0")
        self.assertEqual((seen, log_lines.request_id.get()), (["second"], "first"))
        log_lines.request_id.reset(token)


class LateBindingTest(Case):
    def setUp(self) -> None:
        self.start(late_binding=True, strategy="predicted_latency")

    def test_what_waits_is_served_when_the_instance_is_about_to_be_free(self) -> None:
        first, second = self.submit(), self.submit()
        self.served(first)
        self.assertWaits(second)
        left = self.registry.get("p0").prefill.remaining(0.0)
        wake = self.dispatcher.next_wake(0.0)
        assert wake is not None
        self.assertAlmostEqual(wake, left - NEARLY_FREE_S)
        self.dispatcher.dispatch(wake - 0.01)
        self.assertWaits(second)
        self.dispatcher.dispatch(wake + 1e-6)
        self.assertEqual(self.served(second), "p0")

    def test_short_ones_go_where_they_can_share_a_step(self) -> None:
        self.start(late_binding=True, overhead=0.01)
        first, long = self.submit(tokens=5000), self.submit(tokens=2000)
        short = self.submit(tokens=100)  # 20 ms, if it has a step for itself
        self.assertWaits(long, short)
        load = self.registry.get("p0").prefill
        wake = self.dispatcher.next_wake(0.0)
        assert wake is not None
        self.assertAlmostEqual(wake, load.remaining(0.0) - SHORT_PROMPT_OVERHEADS * 0.01)
        self.dispatcher.dispatch(wake - 0.001)
        self.assertWaits(short)
        self.dispatcher.dispatch(wake + 1e-6)
        self.assertEqual(self.served(short), "p0")
        self.assertWaits(long)  # it would have a step for itself anyway
        more = [self.submit(now=wake + 1e-6, tokens=100) for _ in range(10)]
        self.assertWaits(*more)  # they make no endless queue there
        self.end(first, 0.5)
        self.assertIn(
            sum(ticket.settled for ticket in more),
            (SHORT_PROMPT_OVERHEADS // 2 - 1, SHORT_PROMPT_OVERHEADS // 2),
        )
        self.assertWaits(long)

    def test_a_crowd_of_short_ones_fills_the_next_step(self) -> None:
        """However little the fixed cost of a step is believed to be."""
        first = self.submit()  # for 0.1 s
        short = [self.submit(tokens=400) for _ in range(12)]
        self.assertEqual([ticket.settled for ticket in short], [True] * 4 + [False] * 8)
        wake = self.dispatcher.next_wake(0.0)
        assert wake is not None
        self.assertTrue(0.0 < wake < 0.1)
        self.end(first, 0.1)
        self.assertEqual(sum(ticket.settled for ticket in short), 7)
        long = self.submit(0.1, tokens=2000)
        self.end(short[0], 0.14)
        self.end(short[1], 0.18)
        self.assertEqual(sum(ticket.settled for ticket in short), 7, "a long one would have to wait for them")
        self.dispatcher.withdraw(long)
        self.dispatcher.dispatch(0.18)
        self.assertEqual(sum(ticket.settled for ticket in short), 9)

    def test_a_few_are_no_crowd(self) -> None:
        self.submit()
        self.assertWaits(self.submit(tokens=400))

    def test_nor_are_those_that_are_not_short(self) -> None:
        self.submit()
        self.assertWaits(*[self.submit(tokens=1100) for _ in range(12)])

    def test_the_shortest_first(self) -> None:
        first, long, short = self.submit(), self.submit(tokens=9000), self.submit(tokens=500)
        self.end(first, 0.01)
        self.assertTrue(short.settled)
        self.assertWaits(long)

    def test_cached_tokens_make_it_short_also_for_who_comes_second(self) -> None:
        blocks = tuple(range(1, 31))
        self.registry.get("p0").holder.store(blocks)
        self.registry.get("d0").holder.store(tuple(range(101, 131)))  # decode's cache is no help
        known: dict[str, Any] = {"block_tokens": 256.0}
        first = self.submit()
        self.submit(tokens=20_000)  # somebody waits before them
        plain = self.submit(tokens=2000)
        elsewhere = self.submit(tokens=8000, blocks=tuple(range(101, 131)), **known)
        cached = self.submit(tokens=8000, blocks=blocks, **known)
        self.assertLess(cached.cost, plain.cost)
        self.assertLess(plain.cost, elsewhere.cost)
        self.end(first, 0.01)
        self.assertTrue(cached.settled)

    def test_not_all_wait_for_the_one_that_has_their_prefix(self) -> None:
        """Those before them in the queue will be there when their turn comes."""
        self.start(2, late_binding=True, strategy="predicted_latency")
        p0 = self.registry.get("p0")
        blocks = tuple(range(1, 31))
        p0.holder.store(blocks)
        self.registry.work.reserve(p0, prompt(12_000))  # for 1.2 s
        left = p0.prefill.remaining(0.0)
        tickets = [self.submit(tokens=8000, blocks=blocks, block_tokens=256.0) for _ in range(16)]
        served = [ticket for ticket in tickets if ticket.settled]
        self.assertEqual([self.served(ticket) for ticket in served], ["p1"])  # 0.8 s there, 0.03 s on p0
        self.assertEqual(p0.prefill.remaining(0.0), left)  # and nothing is left of the counting

    def test_an_instance_that_hangs_causes_no_busy_loop(self) -> None:
        for _ in range(3):  # more than one is there, as after a change of the setting
            self.registry.work.reserve(self.registry.get("p0"), prompt(1000.0))
        waiting = self.submit(now=10.0)
        self.assertWaits(waiting)
        now, pumps = 10.0, 0
        while not waiting.settled:
            wake = self.dispatcher.next_wake(now)
            assert wake is not None
            now, pumps = wake, pumps + 1
            self.dispatcher.dispatch(now)
        self.assertRefused(waiting, "queue_timeout")
        self.assertLessEqual(pumps, 3)

    def test_what_gives_up_makes_no_way_by_itself(self) -> None:
        self.submit()
        second, third = self.submit(), self.submit()
        self.dispatcher.withdraw(second)
        self.dispatcher.withdraw(second)
        self.assertNotIn(second, self.dispatcher.queue)
        self.assertWaits(third)


class AdmissionTest(Case):
    def test_each_limit(self) -> None:
        for limit in ({"max_waiting": 1}, {"max_in_flight_tokens": 100}, {"max_kv_usage": 0.5}):
            with self.subTest(limit):
                self.start(**limit)
                if "max_kv_usage" in limit:
                    p0 = self.registry.get("p0")
                    self.registry.scraped(p0, MetricsSnapshot(0.0, kv_capacity=2000.0), 0)
                first, second = self.submit(tokens=1000), self.submit()
                self.assertEqual(self.served(first), "p0")
                self.assertWaits(second)
                self.end(first, 1.0)
                self.assertEqual(self.served(second), "p0")

    def test_prefill_waits_for_decode_too(self) -> None:
        self.start(max_in_flight_tokens=1)
        busy = self.registry.work.reserve(self.registry.get("d0"), prompt())
        ticket = self.submit()
        self.assertWaits(ticket)
        busy.release()
        self.dispatcher.dispatch(1.0)
        self.served(ticket)

    def test_one_free_place_at_decode_lets_one_pass(self) -> None:
        self.start(max_in_flight_tokens=100)
        tickets = [self.submit(role=D) for _ in range(5)]
        for number, ticket in enumerate(tickets):
            self.assertEqual([one.settled for one in tickets], [True] * (number + 1) + [False] * (4 - number))
            self.end(ticket, 1.0)
        self.assertEqual(self.registry.get("d0").in_flight, 0)

    def test_many_that_wait_for_prefill_do_not_keep_a_request_from_a_free_decode(self) -> None:
        self.start(late_binding=True, max_in_flight_tokens=20_000)
        busy = self.registry.work.reserve(self.registry.get("d0"), prompt(30_000))
        for _ in range(40):
            self.submit(tokens=5000)
        alone = [self.submit(tokens=9000, role=D) for _ in range(20)]
        self.assertWaits(*alone)
        busy.release()
        self.dispatcher.dispatch(0.1)
        self.assertEqual(sum(one.settled for one in alone), 3, "all that fit there")
        self.assertEqual(self.dispatcher.queue.waiting(P), 39)

    def test_the_queue_is_bounded(self) -> None:
        self.start(max_waiting=1, queue_size=2, queue_bytes=100)
        self.submit()
        self.assertRefused(self.submit(size=101), "queue_full")
        low = self.submit(priority=-1)
        self.submit()
        self.assertRefused(self.submit(priority=-1), "queue_full")
        self.assertWaits(low)
        self.submit()
        self.assertRefused(low, "queue_displaced")

    def test_a_burst_of_refusals_is_one_event(self) -> None:
        self.start(max_waiting=1, queue_size=1)
        events = Events(lambda: 0.0)
        self.dispatcher = Dispatcher(self.scheduler, events)
        for now in (0.0, 0.0, 0.0, 1.0, 30.0):
            self.submit(now)
        self.submit(80.0, priority=1)  # it takes the place of another
        texts = [event.text for event in events.after(0)]
        self.assertEqual(texts, ["the queue is full (1 requests, 0 bytes): others get a 429"])
        self.dispatcher.queue.max_requests = 2
        self.submit(81.0)
        self.submit(200.0, priority=1)
        self.submit(200.0)
        self.assertEqual(len(events.after(0)), 2)

    def test_without_a_queue_who_cannot_be_served_is_refused(self) -> None:
        self.start(max_waiting=1, queue_size=0)
        self.served(self.submit())
        self.assertRefused(self.submit(), "queue_full")

    def test_who_waits_too_long_is_refused(self) -> None:
        self.start(max_waiting=1, queue_timeout=5.0)
        self.submit()
        early, late = self.submit(now=1.0), self.submit(now=2.0)
        self.assertEqual(self.dispatcher.next_wake(2.0), 6.0)
        self.dispatcher.dispatch(5.9)
        self.assertWaits(early, late)
        self.dispatcher.dispatch(6.0)
        self.assertRefused(early, "queue_timeout")
        self.assertWaits(late)

    def test_retry_after_grows_with_the_queue(self) -> None:
        self.start(max_waiting=1, queue_size=30)
        self.submit()
        for _ in range(30):
            self.submit(tokens=10_000)
        outcome = self.submit().outcome
        assert isinstance(outcome, Reject)
        self.assertAlmostEqual(int(outcome.headers["retry-after"]), 30 * 1.17, delta=1)

    def test_an_endpoint_on_trial_is_no_free_place(self) -> None:
        """Nothing goes there, so that the other one would get more than it may have."""
        self.start(2, 1, max_in_flight_tokens=100)
        p0, p1 = self.registry.endpoints(P)
        for _ in range(5):
            self.registry.ends.failed(p0, "test", 0.0)
        self.registry.probed(p0, None, 100.0)
        trial = self.registry.work.reserve(p0)
        self.assertTrue(p0.on_trial)
        self.registry.work.reserve(p1, prompt())
        self.assertWaits(self.submit())
        trial.release()


class SloTest(Case):
    def setUp(self) -> None:
        self.start(strategy="slo", max_waiting=1)
        self.busy = self.submit()

    def test_what_is_too_late_lets_the_others_pass(self) -> None:
        hopeless = self.submit(tokens=5000, ttft_slo=0.001)
        longer = self.submit(tokens=9000, ttft_slo=100.0)
        self.end(self.busy, 0.1)
        self.assertTrue(longer.settled)
        self.assertWaits(hopeless)
        self.end(longer, 0.2)
        self.served(hopeless)

    def test_so_does_what_became_too_late_while_it_waited(self) -> None:
        was_good = self.submit(tokens=1000, ttft_slo=1.0)
        longer = self.submit(tokens=9000, ttft_slo=100.0)
        self.end(self.busy, 5.0)
        self.assertTrue(longer.settled)
        self.assertWaits(was_good)

    def test_with_a_priority_below_zero_it_is_refused(self) -> None:
        self.assertRefused(self.submit(tokens=5000, ttft_slo=0.001, priority=-1), "slo_missed")

    def test_many_that_are_too_late_block_nobody(self) -> None:
        many = [self.submit(tokens=100, ttft_slo=0.001) for _ in range(40)]
        good = self.submit(tokens=9000, ttft_slo=100.0)
        self.end(self.busy, 0.1)
        self.assertTrue(good.settled)
        self.assertWaits(*many)


CALLS = ["submit"] * 3 + [
    "whole",
    "finish",
    "give_up",
    "withdraw",
    "scrape",
    "wake",
    "time",
    "drain",
    "restart",
]


class AnyOrderTest(unittest.TestCase):
    @given(
        settings_=st.fixed_dictionaries(
            {
                "late_binding": st.booleans(),
                "max_waiting": st.sampled_from([None, 1, 3]),
                "max_in_flight_tokens": st.sampled_from([None, 1500]),
                "queue_size": st.sampled_from([0, 3, 50]),
                "queue_timeout": st.sampled_from([0.5, 30.0]),
                "strategy": st.sampled_from(["least_load", "predicted_latency", "slo", "session"]),
            }
        ),
        calls=st.lists(
            st.tuples(
                st.sampled_from(CALLS),
                st.integers(0, 30),
                st.floats(0, 2),
            ),
            max_size=50,
        ),
    )
    @settings(derandomize=True, deadline=None, max_examples=250)
    def test_nobody_is_lost_or_settled_twice(self, settings_: dict[str, Any], calls: list[Any]) -> None:
        scheduler = scheduler_of(2, 2, **settings_)
        registry, dispatcher = scheduler.registry, Dispatcher(scheduler)
        now, tickets, withdrawn = 0.0, list[Ticket](), set[Ticket]()
        settled: dict[Ticket, int] = {}

        def settle(ticket: Ticket) -> None:
            settled[ticket] = settled.get(ticket, 0) + 1

        def claims() -> list[Reservation]:
            outcomes = [ticket.outcome for ticket in tickets]
            return [one for one in outcomes if isinstance(one, Reservation) and one.active]

        for what, number, seconds in calls:
            if what in ("submit", "whole"):
                request = prompt(
                    50.0 + 100 * number, priority=number % 3 - 1, tenant=str(number % 2), arrived=now,
                    ttft_slo=seconds or None, session=str(number),
                )  # fmt: skip
                ticket = Ticket(request, P if what == "submit" else D, 1, on_settled=settle)
                tickets.append(ticket)
                dispatcher.submit(ticket, now)
            elif what in ("finish", "give_up") and (active := claims()):
                one = active[number % len(active)]
                if what == "finish" and one.endpoint.instance.role is P:
                    registry.work.prefilled(one, 1000, None, now)
                one.release(now)
                dispatcher.dispatch(now)
            elif what == "withdraw" and tickets:
                ticket = tickets[number % len(tickets)]
                if not ticket.settled:
                    withdrawn.add(ticket)
                dispatcher.withdraw(ticket)
            elif what == "scrape":
                endpoint = list(registry)[number % 4]
                registry.scraped(endpoint, MetricsSnapshot(now), endpoint.in_flight, endpoint.tokens)
                dispatcher.dispatch(now)
            elif what == "wake" and (wake := dispatcher.next_wake(now)) is not None:
                now = wake
                dispatcher.dispatch(now)
            elif what == "time":
                now += seconds
            elif what == "drain":
                one_id = list(registry)[number % 4].id
                (registry.drain if number < 15 else registry.undrain)(one_id)
            elif what == "restart":
                registry.started(list(registry)[number % 4], now + number)
            for ticket in tickets:
                self.assertEqual(settled.get(ticket, 0), ticket.settled)
                here = ticket in dispatcher.queue
                self.assertEqual(here, not ticket.settled and ticket not in withdrawn)
            wake = dispatcher.next_wake(now)
            self.assertEqual(wake is None, not len(dispatcher.queue))
            self.assertTrue(wake is None or now < wake <= now + 30.0)
            self.assertLessEqual(len(dispatcher.queue), settings_["queue_size"])
        for _ in range(len(tickets) + 1):  # everything ends, one after the other
            for claim in claims()[:1]:
                claim.release(now)
            now += 0.001
            for endpoint in registry:
                registry.scraped(endpoint, MetricsSnapshot(now), endpoint.in_flight, endpoint.tokens)
            dispatcher.dispatch(now)
        self.assertEqual(len(dispatcher.queue), 0)
        for claim in claims():
            claim.release(now)
        self.assertEqual({e.in_flight for e in registry} | {e.tokens for e in registry}, {0})
        self.assertEqual({e.prefill.queued for e in registry}, {0.0})


if __name__ == "__main__":
    unittest.main()
