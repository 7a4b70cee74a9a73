"""Requests whose P another replica of the scheduler may have chosen at the same time."""

import asyncio
import time
from unittest import mock

import pytest

from tests.support.fleet import P, prompt, scheduler_of
from tests.support.given import give
from vllm_pd_scheduler.admission.controller import AdmissionController
from vllm_pd_scheduler.admission.dispatcher import Dispatcher
from vllm_pd_scheduler.admission.queue import Ticket
from vllm_pd_scheduler.fleet.claims import HEARD_S
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.scheduler import Scheduler

HEARD = 1.0 + HEARD_S


class Burst:
    """A scheduler, busy P, and a request that is given the P it likes best, where others come first."""

    def __init__(self, now: float = 1.0, **config: object) -> None:
        self.scheduler: Scheduler = scheduler_of(4, 1, strategy="predicted_latency", **config)
        self.registry = self.scheduler.registry
        self.dispatcher = Dispatcher(self.scheduler)
        self.registry.claims.among("a", ["b", "c", "d", "e", "f", "g"])
        self.liked = next(e for e in self.registry.endpoints(P) if self.is_contested(e))
        for endpoint in self.registry.endpoints(P):
            give(endpoint.prefill, per_token=1e-3)
            self.registry.work.reserve(
                endpoint, prompt(1000.0 if endpoint is self.liked else 3000.0, now=now)
            )

    def is_contested(self, endpoint: Endpoint) -> bool:
        claim = self.registry.work.reserve(endpoint, prompt(9000.0))
        try:
            return self.registry.claims.contested(endpoint, 0.0)
        finally:
            claim.release(0.0)

    def submit(self, now: float = 1.0) -> Ticket:
        ticket = Ticket(prompt(500.0, arrived=now, blocks=(1, 2)), P)
        self.dispatcher.submit(ticket, now)
        return ticket

    def others_claim(self, endpoint: Endpoint, now: float = 1.01) -> None:
        for other in "bcdefg":
            self.registry.elsewhere.enqueue(endpoint, 3000.0, (0.0, 0), (), now, other)


@pytest.fixture
def burst() -> Burst:
    return Burst()


def test_a_claim_counts_at_once_and_is_sent_when_the_others_were_heard(burst: Burst) -> None:
    before = burst.liked.in_flight
    ticket = burst.submit()
    assert not ticket.settled
    assert burst.liked.in_flight == before + 1
    assert burst.dispatcher.pending
    assert burst.dispatcher.next_wake(1.0) == HEARD
    burst.dispatcher.dispatch(HEARD - 0.001)
    assert not ticket.settled
    burst.dispatcher.dispatch(HEARD)
    assert isinstance(ticket.outcome, Reservation)
    assert ticket.outcome.endpoint is burst.liked
    assert burst.liked.in_flight == before + 1
    assert not burst.dispatcher.pending
    assert burst.dispatcher.next_wake(HEARD) is None
    assert len(burst.registry.prefixes) == 2


def test_one_that_is_overtaken_is_given_another_p(burst: Burst) -> None:
    before = burst.liked.in_flight
    ticket = burst.submit()
    burst.others_claim(burst.liked)
    for turn in range(1, 6):
        burst.dispatcher.dispatch(1.0 + turn * HEARD_S + 0.001 * turn)
    assert isinstance(ticket.outcome, Reservation)
    assert ticket.outcome.endpoint is not burst.liked
    assert burst.liked.in_flight == before
    assert sum(e.in_flight for e in burst.registry.endpoints(P)) == 5


def test_it_stays_at_last_however_often_it_is_overtaken(burst: Burst) -> None:
    ticket, now = burst.submit(), 1.0
    for _ in range(10):
        for endpoint in burst.registry.endpoints(P):
            burst.others_claim(endpoint, now + 0.01)
        now += HEARD_S + 0.001
        burst.dispatcher.dispatch(now)
    assert ticket.settled
    assert now < 2.0


def test_a_client_that_leaves_gives_its_claim_back(burst: Burst) -> None:
    before = burst.liked.in_flight
    burst.dispatcher.withdraw(burst.submit())
    assert burst.liked.in_flight == before
    assert not burst.dispatcher.pending
    burst.dispatcher.dispatch(HEARD)


def test_a_p_that_drains_meanwhile_is_not_sent_the_request(burst: Burst) -> None:
    ticket = burst.submit()
    burst.registry.drain(burst.liked.id, True)
    for turn in range(1, 6):
        burst.dispatcher.dispatch(1.0 + turn * (HEARD_S + 0.001))
    assert isinstance(ticket.outcome, Reservation)
    assert ticket.outcome.endpoint is not burst.liked


def test_one_that_is_overtaken_waits_if_all_are_full_meanwhile() -> None:
    burst = Burst(max_waiting=2)
    ticket = burst.submit()
    for endpoint in burst.registry.endpoints(P):
        burst.others_claim(endpoint)
        endpoint.sent_elsewhere(6, 0)
    burst.dispatcher.dispatch(HEARD)
    assert not ticket.settled
    assert ticket in burst.dispatcher.queue
    for endpoint in burst.registry.endpoints(P):
        endpoint.sent_elsewhere(-7, 0)
    for turn in range(1, 6):
        burst.dispatcher.dispatch(HEARD + turn * (HEARD_S + 0.001))
    assert ticket.settled


def test_one_that_must_wait_after_all_is_charged_to_its_tenant_once() -> None:
    burst = Burst(max_waiting=2)
    burst.registry.journal = journal = mock.Mock()
    ticket = burst.submit()
    assert ticket.claim is not None
    journal.drawn.assert_not_called()  # nobody waits: there are no turns
    for endpoint in burst.registry.endpoints(P):
        burst.others_claim(endpoint)
        endpoint.sent_elsewhere(6, 0)
    burst.dispatcher.dispatch(HEARD)
    assert ticket in burst.dispatcher.queue
    for endpoint in burst.registry.endpoints(P):
        endpoint.sent_elsewhere(-7, 0)
    for turn in range(1, 6):
        burst.dispatcher.dispatch(HEARD + turn * (HEARD_S + 0.001))
    assert ticket.settled
    ((_, _, work),) = [each.args for each in journal.drawn.call_args_list]
    assert work == ticket.cost > 0


def test_a_p_that_starts_again_meanwhile_has_the_request_counted(burst: Burst) -> None:
    ticket = burst.submit()
    burst.liked.started(1.0)
    burst.liked.started(2.0)
    assert burst.liked.in_flight == 0
    for turn in range(1, 6):
        burst.dispatcher.dispatch(1.0 + turn * (HEARD_S + 0.001))
    assert isinstance(ticket.outcome, Reservation)
    assert ticket.outcome.generation == ticket.outcome.endpoint.generation
    assert ticket.outcome.endpoint.in_flight >= 1


def test_many_claims_of_one_burst_are_confirmed_together(burst: Burst) -> None:
    tickets = [burst.submit() for _ in range(2000)]
    for turn in range(1, 6):
        burst.dispatcher.dispatch(1.0 + turn * (HEARD_S + 0.001))
    assert all(isinstance(each.outcome, Reservation) for each in tickets)
    assert sum(e.in_flight for e in burst.registry.endpoints(P)) == 2004


def test_a_request_in_the_event_loop_goes_on_by_itself() -> None:
    async def admit() -> None:
        burst = Burst(time.monotonic())
        controller = AdmissionController(burst.dispatcher, time.monotonic)
        ticket = Ticket(prompt(500.0, arrived=time.monotonic()), P)
        outcome = await controller.admit(ticket)
        assert isinstance(outcome, Reservation)
        assert ticket.claims == 1
        before = burst.liked.in_flight
        leaves = asyncio.create_task(controller.admit(Ticket(prompt(500.0, arrived=time.monotonic()), P)))
        await asyncio.sleep(0)
        assert burst.liked.in_flight == before + 1
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
        assert burst.liked.in_flight == before
        assert not burst.dispatcher.pending

    asyncio.run(admit())
