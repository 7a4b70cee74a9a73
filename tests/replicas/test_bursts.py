"""Requests that come to several schedulers in one burst, whatever becomes of what these tell each other."""

from __future__ import annotations

from functools import partial
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.replicas.one import D, P, make_request
from vllm_pd_scheduler.admission.queue import Ticket
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.models import PDInstance
from vllm_pd_scheduler.replay.schedulers import Network, OneScheduler, make_schedulers
from vllm_pd_scheduler.replay.variant import Sharing, parse_variant
from vllm_pd_scheduler.sim.virtual import VirtualClock

END = 12.0


class Burst:
    """Schedulers over a fleet that takes a second for each 10,000 tokens of a prompt."""

    def __init__(self, strategy: str, sharing: Sharing, seed: int) -> None:
        variant = parse_variant(strategy).shared(sharing)
        self.clock = VirtualClock()
        self.schedulers = make_schedulers(variant, variant.config(), seed)
        self.network = Network(self.clock, sharing, self.schedulers, Random(seed), self.dispatch)
        self.settled: list[Ticket] = []
        for one in self.schedulers:
            for number, role in enumerate((P, P, D)):
                instance = PDInstance(f"{role}-{number}", role, f"10.0.0.{number}", 8000)
                one.registry.probed(one.registry.add(instance), None)
        self.network.introduce()

    def submit(self, one: OneScheduler, tokens: int) -> None:
        request = make_request(self.clock.now, tokens, (tokens % 3, tokens))
        ticket = Ticket(request, P, on_settled=partial(self._on_settled, one))
        one.dispatcher.submit(ticket, self.clock.now)
        self.dispatch(one)

    def dispatch(self, one: OneScheduler) -> None:
        one.dispatcher.dispatch(self.clock.now)
        if one.wake_up is not None:
            one.wake_up.cancel()
        at = one.dispatcher.next_wake(self.clock.now)
        one.wake_up = None if at is None else self.clock.call_at(at, partial(self.dispatch, one))
        self.network.publish_soon(one)

    def _on_settled(self, one: OneScheduler, ticket: Ticket) -> None:
        self.settled.append(ticket)
        claim = ticket.outcome
        assert isinstance(claim, Reservation)
        assert not claim.tentative
        took = ticket.request.prompt_tokens / 10_000
        self.clock.call_at(self.clock.now + took, partial(self._end, one, claim, ticket))

    def _end(self, one: OneScheduler, claim: Reservation, ticket: Ticket) -> None:
        one.registry.work.prefilled(claim, round(ticket.request.prompt_tokens), 0, self.clock.now)
        self.dispatch(one)


@given(
    st.sampled_from(["predicted_latency", "predicted_latency+late_binding", "least_load"]),
    st.lists(st.tuples(st.integers(0, 2), st.floats(0.0, 0.1), st.integers(1, 5_000)), max_size=20),
    st.floats(0.0, 0.2),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 9),
)
@settings(derandomize=True, deadline=None, max_examples=15)
def test_each_request_is_given_one_p_and_all_counts_end_at_nothing(
    strategy: str, requests: list[tuple[int, float, int]], delay: float, loss: float, seed: int
) -> None:
    burst = Burst(strategy, Sharing(3, delay, loss), seed)
    for place, at, tokens in requests:
        burst.clock.call_at(at, partial(burst.submit, burst.schedulers[place], tokens))
    burst.clock.run_until(END)
    assert len(burst.settled) == len({id(each) for each in burst.settled}) == len(requests)
    for one in burst.schedulers:
        assert not one.dispatcher.pending
        for endpoint in one.registry:
            assert (endpoint.in_flight, endpoint.elsewhere, endpoint.tokens) == (0, 0, 0.0)
            assert not list(endpoint.prefill.pending)
            assert endpoint.prefill.queued == 0.0
