"""A fleet in virtual time: simulated engines behind the real registry, strategies and admission queue."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from random import Random

from ..admission.queue import Ticket
from ..fleet.endpoint import Endpoint
from ..fleet.reservation import Reservation
from ..models import PD_ROLES, InstanceRole
from ..request.context import RequestContext
from ..request.errors import Reject
from ..sim.request import EngineRequest, HandOff
from ..sim.virtual import Offer, VirtualClock
from .arrivals import Arrivals
from .cache_events import CacheEvents
from .index_events import IndexEvents
from .instances import Instances
from .peers import Peer, Site
from .request import RunningRequest
from .result import LoadSample, RequestResult, RunResult
from .schedulers import Network, OneScheduler, make_foreign, make_schedulers
from .spec import FleetSpec, pooled
from .topology import Topology
from .trace import Trace, TraceRequest
from .variant import LOWER_BOUND, Variant

__all__ = ["FleetSpec", "run_variant"]

HOP_S = 0.001
"""Seconds from the scheduler to an instance and back: a choice, that of hosts of one site."""
ESTIMATE_ERROR = 0.1
"""Standard deviation of the logarithm of (estimated / real) prompt tokens.

A scheduler sees a prompt's bytes and learns its tokens after the prefill. 0.1 is a choice: prompts of one
language and kind.
"""
NOTICED_S = 0.5
"""Seconds until Envoys ask a scheduler no more that is gone: the time between two of their health checks."""
_SAMPLES = 600
"""Moments of a run at which the load is recorded, for the figure: more than can be seen in it."""
_PROGRESS_EVERY = 100
"""Requests after which progress is reported: seldom enough to cost nothing."""


def run_variant(
    variant: Variant,
    trace: Trace,
    fleet: FleetSpec,
    progress: Callable[[int], None],
    stop_when: Callable[[RequestResult], bool] | None = None,
) -> RunResult:
    """Replay a trace and return the results.

    ``progress`` is called now and then with the number of requests that have ended. ``stop_when`` is called
    with the result of each request; once it returns ``True`` the run ends, with the results so far.
    """
    return _Run(variant, trace, fleet, progress, stop_when).run()


def _policies(one: OneScheduler) -> list[Peer]:
    """Return the objects of another router's policy, for P and for D; none of a strategy of ours."""
    strategies = [one.scheduler.strategies.of(role).strategy for role in PD_ROLES]
    return [each for each in strategies if isinstance(each, Peer)]


class _Run:
    """A replay of a trace, which takes requests through the same objects as ``routing`` does."""

    def __init__(
        self,
        variant: Variant,
        trace: Trace,
        fleet: FleetSpec,
        progress: Callable[[int], None],
        stop_when: Callable[[RequestResult], bool] | None,
    ) -> None:
        self._variant, self._trace = variant, trace
        self._progress, self._stop_when = progress, stop_when
        self._seed = fleet.seed
        self._random = Random(fleet.seed)
        self._clock = VirtualClock()
        self._config = config = variant.config()
        self._scrape_interval = config.health_check_interval
        self._own = make_schedulers(variant, config, fleet.seed)
        self._foreign = make_foreign(fleet.seed) if fleet.foreign else None
        self._foreign_share = fleet.foreign
        self._schedulers = [*self._own, *([self._foreign] if self._foreign else ())]
        self._spread = Random(fleet.seed + 1)
        """Whose turn it is, and what is lost: none of that changes what else is random."""
        self._network = Network(self._clock, variant.sharing, self._own, self._spread, self._dispatch)
        self._realistic = fleet.realistic
        network = fleet.leaves, fleet.oversubscription
        self._topology = Topology(self._clock, *network) if fleet.realistic else None
        self._arrivals = Arrivals(self._clock, trace, self._arrive, waits=fleet.realistic)
        policy = variant.policy()
        late = policy.event_delay_s if fleet.realistic and policy is not None else None
        self._events = None if late is None else CacheEvents(late)
        self._index_events = IndexEvents(self._clock, self._own) if config.kv_events is not None else None
        told = self._events or self._index_events
        self._decode_first = policy is not None and policy.decode_first
        self._instances = Instances(
            self._clock, self._schedulers, self._topology, told.happened if told is not None else None
        )
        self._under_way: dict[int, RunningRequest] = {}
        self._results: dict[int, RequestResult] = {}
        self._samples: list[LoadSample] = []
        profiles = {role: fleet.profile(trace.block_tokens, role) for role in PD_ROLES}
        for role, count in ((InstanceRole.PREFILL, fleet.prefill), (InstanceRole.DECODE, fleet.decode)):
            if variant.strategy == LOWER_BOUND:
                self._instances.add(role, 1, pooled(profiles[role], count))
            else:
                self._instances.add(role, count, profiles[role])
        self._policies = {one: _policies(one) for one in self._schedulers}
        """What other routers' policies choose by, P before D; none for our strategies."""
        for one in self._schedulers:
            for each in self._policies[one]:
                each.deployed(Site(profiles[InstanceRole.PREFILL], self._events))

    def run(self) -> RunResult:
        """Run to the end, or until ``stop_when`` returns ``True``, and return the results."""
        started = time.perf_counter()
        if self._trace.requests:
            self._arrivals.start()
            for one in self._schedulers:
                if one.alive:
                    self._begin_to_scrape(one)
            self._network.introduce()
            sharing = self._variant.sharing
            if sharing.dies is not None:
                self._clock.call_at(sharing.dies, partial(self._die, self._own[sharing.replicas - 1]))
            if sharing.joins is not None:
                self._clock.call_at(sharing.joins, partial(self._join, self._own[-1]))
            self._clock.call_at(0.0, self._sample)
        self._clock.run()
        self._progress(len(self._results))
        end = max((r.finished or 0.0 for r in self._results.values()), default=0.0)
        return RunResult(
            self._variant.label,
            [self._results[number] for number in sorted(self._results) if not self._is_foreign(number)],
            self._instances.busy(InstanceRole.PREFILL, end),
            self._instances.busy(InstanceRole.DECODE, end),
            self._samples,
            time.perf_counter() - started,
            sum(one.scheduler.strategies.failures.counts.total() for one in self._schedulers),
        )

    # -- the life of a request, as in routing/core.py

    def _arrive(self, number: int) -> None:
        traced = self._trace.requests[number]
        asked = [one for one in self._own if one.asked]
        one = asked[self._spread.randrange(len(asked)) if len(asked) > 1 else 0]
        if self._foreign is not None and self._is_foreign(number):
            one = self._foreign
        job = RunningRequest(number, traced, self._context(traced, one), one, self._clock.now)
        self._under_way[number] = job
        if not one.alive:
            self._serve_unscheduled(job)
            return
        alone = self._alone(job)
        if alone is not None:
            # Counted at once, as in routing: of a burst each one sees those before it.
            job.decode, job.reservation = alone, one.registry.work.reserve(alone, job.context)
            request = self._request(job, HandOff.NONE)
            self._clock.call_at(self._clock.now + HOP_S / 2, partial(self._decode, job, request, None))
            return
        if self._decode_first and one is not self._foreign:
            job.decode = one.scheduler.pick(InstanceRole.DECODE, job.context)[0]
            job.early = one.registry.work.reserve(job.decode, job.context)
        ticket = Ticket(job.context, InstanceRole.PREFILL, on_settled=partial(self._on_settled, job))
        one.dispatcher.submit(ticket, self._clock.now)
        self._set_wake_up(one)

    def _is_foreign(self, number: int) -> bool:
        """Whether another router sends a request: it does so with all of a session's."""
        if self._foreign is None:
            return False
        traced = self._trace.requests[number]
        key = traced.session or str(traced.blocks[1:2] or number)
        return Random(f"{self._seed} {key}").random() < self._foreign_share

    def _alone(self, job: RunningRequest) -> Endpoint | None:
        """Return the D that is to serve a request without a P, as the policy or the scheduler has it."""
        one, policies = job.at, self._policies[job.at]
        if not policies:
            return one.disaggregation.local_endpoint(job.context)
        job.context.look_up_in(one.registry.prefixes)
        return policies[-1].alone(one.registry.endpoints(InstanceRole.DECODE), job.context)

    def _context(self, traced: TraceRequest, one: OneScheduler) -> RequestContext:
        config, now = self._config, self._clock.now
        # Few traces name sessions. The second block stands for one, since many prompts share their first.
        private = traced.blocks[1:2] or traced.blocks[:1]
        session = traced.session if self._realistic else str(private[0]) if private else None
        error = math.exp(self._random.gauss(0.0, ESTIMATE_ERROR))
        return RequestContext(
            "/v1/completions",
            prompt_tokens=traced.prompt_tokens * error,
            output_tokens=one.registry.load.output_tokens,
            blocks=traced.blocks,
            block_tokens=self._trace.block_tokens * error,  # which the same bytes tell
            session=session,
            ttft_slo=config.ttft_slo,
            tpot_slo=config.tpot_slo,
            arrived=now,
            now=now,
        )

    def _on_settled(self, job: RunningRequest, ticket: Ticket) -> None:
        outcome = ticket.outcome
        if isinstance(outcome, Reservation):
            job.prefill, job.reservation = outcome.endpoint, outcome
            self._clock.call_at(self._clock.now + HOP_S / 2, partial(self._prefill, job))
        else:
            self._release_early(job)
            self._record(job, outcome.reason if isinstance(outcome, Reject) else "no_prefill")

    def _request(self, job: RunningRequest, hand_off: HandOff) -> EngineRequest:
        """Return what D gets of a request."""
        traced = job.traced
        blocks = traced.blocks + traced.answer if self._realistic else traced.blocks
        return EngineRequest(str(job.number), traced.prompt_tokens, traced.output_tokens, hand_off, blocks)

    def _decode(self, job: RunningRequest, request: EngineRequest, offer: Offer | None) -> None:
        assert job.decode is not None
        try:
            self._instances[job.decode.id].add(
                request,
                offer=offer,
                on_first_token=partial(self._on_first_token, job),
                on_finished=partial(self._on_finished, job),
            )
        except ValueError:
            if offer is not None:
                offer.source.release(offer.request_id)
            self._release(job)
            self._record(job, "too_long")
            return
        self._dispatch(job.at)

    def _prefill(self, job: RunningRequest) -> None:
        traced, endpoint = job.traced, job.prefill
        if endpoint is None:  # its scheduler has died meanwhile
            return
        request = EngineRequest(str(job.number), traced.prompt_tokens, 1, HandOff.SEND, traced.blocks)
        try:
            self._instances[endpoint.id].add(request, on_finished=partial(self._on_prefilled, job))
        except ValueError:
            self._release(job)
            self._release_early(job)
            self._record(job, "too_long")

    def _on_prefilled(self, job: RunningRequest, request: EngineRequest, _: float) -> None:
        job.cached = request.cached
        assert job.prefill is not None
        offer = self._instances[job.prefill.id].offer(request.request_id)
        self._clock.call_at(self._clock.now + HOP_S / 2, partial(self._pick_decode, job, offer))

    def _pick_decode(self, job: RunningRequest, offer: Offer) -> None:
        now, context, reservation = self._clock.now, job.context, job.reservation
        if job.prefill is None:  # its scheduler has died meanwhile
            return
        assert reservation is not None
        job.at.registry.work.prefilled(reservation, job.traced.prompt_tokens, job.cached, now)
        context.counted(job.traced.prompt_tokens)
        if self._index_events is not None:
            self._index_events.answered(job.at, job.traced.blocks)
        context.at(now)
        job.to_decode(now)
        self._decode(job, self._request(job, HandOff.RECEIVE), offer)

    def _on_first_token(self, job: RunningRequest, request: EngineRequest, at: float) -> None:
        job.answers(at)
        if job.prefill is None:
            job.cached = request.cached

    def _on_finished(self, job: RunningRequest, _: EngineRequest, at: float) -> None:
        traced, context, decode = job.traced, job.context, job.decode
        if self._realistic and decode is not None:
            told = traced.prompt_tokens, traced.output_tokens
            job.at.registry.work.answered(decode, context.blocks, context.block_tokens, *told)
        self._release(job)
        self._record(job, None)

    def _release(self, job: RunningRequest) -> None:
        assert job.reservation is not None
        job.reservation.release(self._clock.now)
        self._dispatch(job.at)

    def _release_early(self, job: RunningRequest) -> None:
        if job.early is not None:
            job.early.release(self._clock.now)

    def _record(self, job: RunningRequest, reason: str | None) -> None:
        self._results[job.number] = job.result(self._clock.now, reason)
        del self._under_way[job.number]
        self._arrivals.ended(job.number)
        if self._stop_when is not None and self._stop_when(self._results[job.number]):
            self._clock.stop()
        if self._done:
            self._network.stop()
        if len(self._results) % _PROGRESS_EVERY == 0:
            self._progress(len(self._results))

    # -- what happens beside requests

    @property
    def _done(self) -> bool:
        return len(self._results) == len(self._trace.requests)

    def _dispatch(self, one: OneScheduler) -> None:
        """Serve waiting requests after a change, as ``AdmissionController.wake``, and tell of the change."""
        if one.dispatcher.pending and one.alive:
            one.dispatcher.dispatch(self._clock.now)
            self._set_wake_up(one)
        else:
            self._network.publish_soon(one)

    def _set_wake_up(self, one: OneScheduler) -> None:
        if one.wake_up is not None:
            one.wake_up.cancel()
        at = one.dispatcher.next_wake(self._clock.now)
        one.wake_up = None if at is None else self._clock.call_at(at, partial(self._dispatch, one))
        self._network.publish_soon(one)

    def _begin_to_scrape(self, one: OneScheduler) -> None:
        """Have a scheduler scrape: not all at the same moment, as with its own loops."""
        place = self._schedulers.index(one) / len(self._schedulers)
        for number, endpoint in enumerate(one.registry):
            at = self._clock.now + (number + place) / len(self._instances) * self._scrape_interval
            self._clock.call_at(at, partial(self._scrape, one, endpoint))

    def _scrape(self, one: OneScheduler, endpoint: Endpoint) -> None:
        """Report to the registry what a scrape of the engine's ``/metrics`` would show."""
        if self._done or not one.alive:
            return
        seen = self._instances.scraped(one, endpoint)
        one.registry.scraped(endpoint, seen, endpoint.in_flight, endpoint.tokens)
        self._dispatch(one)
        self._clock.call_at(self._clock.now + self._scrape_interval, partial(self._scrape, one, endpoint))

    def _sample(self) -> None:
        """Record the load of all instances and of the queue, for the figure."""
        if self._done:
            return
        now = self._clock.now
        self._samples += self._instances.load()
        waiting = sum(len(one.dispatcher.queue) for one in self._schedulers if one.alive)
        self._samples.append(LoadSample(now, "scheduler", 0, waiting, 0.0))
        self._clock.call_at(now + max(1.0, self._trace.seconds / _SAMPLES), self._sample)

    # -- schedulers that die and join

    def _die(self, one: OneScheduler) -> None:
        """Have a scheduler die. Its requests, and those that come until that is noticed, go on without it."""
        one.die()
        self._clock.call_at(self._clock.now + NOTICED_S, one.leave)
        for job in list(self._under_way.values()):
            if job.at is one and job.decode is None:
                self._serve_unscheduled(job)

    def _serve_unscheduled(self, job: RunningRequest) -> None:
        """Let the D with the fewest requests prefill, as Envoy does without a scheduler. Nobody counts it."""
        request_id, registry, before = str(job.number), job.at.registry, job.prefill
        if before is not None and not self._instances[before.id].abort(request_id):
            self._instances[before.id].release(request_id)
        job.prefill = None
        job.decode = min(registry.endpoints(InstanceRole.DECODE), key=lambda endpoint: endpoint.in_flight)
        job.reservation = registry.work.reserve(job.decode, job.context)  # where nobody hears of it
        self._decode(job, self._request(job, HandOff.NONE), None)

    def _join(self, one: OneScheduler) -> None:
        """Have one more scheduler, which the others tell what they know."""
        one.join()
        self._begin_to_scrape(one)
        self._network.publish_soon(one)
