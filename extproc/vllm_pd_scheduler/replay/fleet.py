"""A fleet in virtual time: simulated engines behind the real registry, strategies and admission queue."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from ..admission.queue import Ticket
from ..fleet.endpoint import Endpoint, Reservation
from ..models import InstanceRole, MetricsSnapshot, PDInstance
from ..request.context import RequestContext
from ..request.errors import Reject
from ..sim.engine import Engine
from ..sim.profile import EngineProfile
from ..sim.request import EngineRequest, HandOff
from ..sim.setups import setup
from ..sim.virtual import Offer, VirtualClock, VirtualInstance
from . import DEFAULT_SETUP
from .result import LoadSample, RequestResult, RunResult
from .schedulers import Network, OneScheduler, make_schedulers
from .trace import Trace, TraceRequest
from .variant import LOWER_BOUND, Variant

HOP_S = 0.001
"""Seconds from the scheduler to an instance and back: a choice, that of hosts of one site."""
ESTIMATE_ERROR = 0.1
"""Standard deviation of the logarithm of (estimated / real) prompt tokens.

A scheduler sees a prompt's bytes and learns its tokens after the prefill. 0.1 is a choice: prompts of one
language and kind.
"""
_SAMPLES = 600
"""Moments of a run at which the load is recorded, for the figure: more than can be seen in it."""
_PROGRESS_EVERY = 100
"""Requests after which progress is reported: seldom enough to cost nothing."""


@dataclass(frozen=True)
class FleetSpec:
    """A fleet: how many instances of which set-up. ``seed`` makes all that is random repeatable.

    The constructor raises :exc:`ValueError` for an unknown set-up.
    """

    prefill: int
    decode: int
    setup: str = DEFAULT_SETUP
    seed: int = 0
    engines: Mapping[InstanceRole, EngineProfile] | None = None
    """In place of those of the set-up."""

    def __post_init__(self) -> None:
        self.profile(16, InstanceRole.PREFILL)

    def profile(self, block_size: int, role: InstanceRole) -> EngineProfile:
        """Return the profile of each engine of a role, with blocks of ``block_size`` tokens."""
        if self.engines is None:
            return setup(self.setup, block_size=block_size)
        engine = self.engines[role]
        return replace(engine, block_size=block_size, num_blocks=max(1, engine.capacity // block_size))


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


def _pooled(profile: EngineProfile, count: int) -> EngineProfile:
    """Return the profile of one engine as fast and as large as ``count``, for the lower bound.

    Its steps have no fixed cost. A fleet with a queue shares that among the many tokens of long steps; one
    fast engine that never has a queue would pay it for each prompt, and be slower than a bound may be.
    """
    return replace(
        profile,
        num_blocks=profile.num_blocks * count,
        max_num_seqs=profile.max_num_seqs * count,
        step_overhead=0.0,
        prefill_min=0.0,
        prefill_rate=profile.prefill_rate * count,
        prefill_per_kv_token=profile.prefill_per_kv_token / count,
        decode_base=profile.decode_base / count,
        decode_per_seq=profile.decode_per_seq / count,
        decode_per_kv_token=profile.decode_per_kv_token / count,
        transfer_bandwidth=profile.transfer_bandwidth * count,
    )


@dataclass(slots=True, eq=False)
class _Job:
    """A request of the trace, from its arrival to its end."""

    number: int
    """Its place in the trace."""
    traced: TraceRequest
    context: RequestContext
    at: OneScheduler
    """Which scheduler has it."""
    prefill: Endpoint | None = None
    decode: Endpoint | None = None
    cached: int = 0
    """Prompt tokens that were cached where the prefill was done."""
    first_token: float | None = None
    reservation: Reservation | None = None
    """On P until the prefill has ended, then on D."""


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
        self._random = Random(fleet.seed)
        self._clock = VirtualClock()
        self._config = config = variant.config()
        self._scrape_interval = config.health_check_interval
        self._schedulers = make_schedulers(variant, config, fleet.seed)
        self._spread = Random(fleet.seed + 1)
        """Whose turn it is, and what is lost: none of that changes what else is random."""
        self._network = Network(self._clock, variant.sharing, self._schedulers, self._spread, self._dispatch)
        self._instances: dict[str, VirtualInstance] = {}
        self._results: dict[int, RequestResult] = {}
        self._samples: list[LoadSample] = []
        for role, count in ((InstanceRole.PREFILL, fleet.prefill), (InstanceRole.DECODE, fleet.decode)):
            self._populate(role, count, fleet.profile(trace.block_tokens, role))

    def _populate(self, role: InstanceRole, count: int, profile: EngineProfile) -> None:
        """Register the instances of a role, all healthy."""
        if self._variant.strategy == LOWER_BOUND:
            count, profile = 1, _pooled(profile, count)
        for number in range(count):
            host = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
            described = PDInstance(f"{role}-{number}", role, host, 8000)
            self._instances[described.instance_id] = VirtualInstance(Engine(profile), self._clock)
            for one in self._schedulers:
                endpoint = one.registry.add(described)
                one.registry.probed(endpoint, None)
                endpoint.holder.resize(profile.num_blocks)

    def run(self) -> RunResult:
        """Run to the end, or until ``stop_when`` returns ``True``, and return the results."""
        started = time.perf_counter()
        if self._trace.requests:
            self._clock.call_at(0.0, partial(self._arrive, 0))
            for place, one in enumerate(self._schedulers):
                for number, endpoint in enumerate(one.registry):
                    # Not all at the same moment, as with the scheduler's own loops.
                    turn = (number + place / len(self._schedulers)) / len(self._instances)
                    self._clock.call_at(turn * self._scrape_interval, partial(self._scrape, one, endpoint))
                self._network.publish_soon(one)
            self._clock.call_at(0.0, self._sample)
        self._clock.run()
        self._progress(len(self._results))
        return RunResult(
            self._variant.label,
            [self._results[number] for number in sorted(self._results)],
            self._busy(InstanceRole.PREFILL),
            self._busy(InstanceRole.DECODE),
            self._samples,
            time.perf_counter() - started,
            sum(one.scheduler.failures.counts.total() for one in self._schedulers),
        )

    def _busy(self, role: InstanceRole) -> dict[str, float]:
        """Return the share of the run in which each instance computed."""
        end = max((r.finished or 0.0 for r in self._results.values()), default=0.0)
        endpoints = self._schedulers[0].registry.endpoints(role)
        return {e.id: self._instances[e.id].snapshot().busy / end if end else 0.0 for e in endpoints}

    # -- the life of a request, as in routing/core.py

    def _arrive(self, number: int) -> None:
        traced = self._trace.requests[number]
        if number + 1 < len(self._trace.requests):
            self._clock.call_at(self._trace.requests[number + 1].arrival, partial(self._arrive, number + 1))
        few = len(self._schedulers)
        one = self._schedulers[self._spread.randrange(few) if few > 1 else 0]
        job = _Job(number, traced, self._context(traced, one), one)
        alone = one.disaggregation.local_endpoint(job.context)
        if alone is not None:
            self._clock.call_at(self._clock.now + HOP_S / 2, partial(self._serve_alone, job, alone))
            return
        ticket = Ticket(job.context, InstanceRole.PREFILL, on_settled=partial(self._on_settled, job))
        one.dispatcher.submit(ticket, self._clock.now)
        self._set_wake_up(one)

    def _context(self, traced: TraceRequest, one: OneScheduler) -> RequestContext:
        config, now = self._config, self._clock.now
        # A trace names no sessions. The second block stands for one, since many prompts share their first.
        private = traced.blocks[1:2] or traced.blocks[:1]
        return RequestContext(
            "/v1/completions",
            prompt_tokens=traced.prompt_tokens * math.exp(self._random.gauss(0.0, ESTIMATE_ERROR)),
            output_tokens=one.registry.load.output_tokens,
            blocks=traced.blocks,
            block_tokens=self._trace.block_tokens,
            session=str(private[0]) if private else None,
            ttft_slo=config.ttft_slo,
            tpot_slo=config.tpot_slo,
            arrived=now,
            now=now,
        )

    def _on_settled(self, job: _Job, ticket: Ticket) -> None:
        outcome = ticket.outcome
        if isinstance(outcome, Reservation):
            job.prefill, job.reservation = outcome.endpoint, outcome
            self._clock.call_at(self._clock.now + HOP_S / 2, partial(self._prefill, job))
        else:
            self._record(job, outcome.reason if isinstance(outcome, Reject) else "no_prefill")

    def _serve_alone(self, job: _Job, decode: Endpoint) -> None:
        traced = job.traced
        job.context.at(self._clock.now)
        job.decode, job.reservation = decode, job.at.registry.reserve(decode, job.context)
        request = EngineRequest(
            str(job.number), traced.prompt_tokens, traced.output_tokens, HandOff.NONE, traced.blocks
        )
        self._decode(job, request, None)

    def _decode(self, job: _Job, request: EngineRequest, offer: Offer | None) -> None:
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

    def _prefill(self, job: _Job) -> None:
        traced, endpoint = job.traced, job.prefill
        assert endpoint is not None
        request = EngineRequest(str(job.number), traced.prompt_tokens, 1, HandOff.SEND, traced.blocks)
        try:
            self._instances[endpoint.id].add(request, on_finished=partial(self._on_prefilled, job))
        except ValueError:
            self._release(job)
            self._record(job, "too_long")

    def _on_prefilled(self, job: _Job, request: EngineRequest, _: float) -> None:
        job.cached = request.cached
        assert job.prefill is not None
        offer = self._instances[job.prefill.id].offer(request.request_id)
        self._clock.call_at(self._clock.now + HOP_S / 2, partial(self._pick_decode, job, offer))

    def _pick_decode(self, job: _Job, offer: Offer) -> None:
        now, context, reservation = self._clock.now, job.context, job.reservation
        assert reservation is not None
        registry, scheduler = job.at.registry, job.at.scheduler
        registry.prefilled(reservation, job.traced.prompt_tokens, job.cached, now)
        context.counted(job.traced.prompt_tokens)
        context.at(now)
        job.decode = scheduler.pick(InstanceRole.DECODE, context)[0]
        job.reservation = registry.reserve(job.decode, context)
        traced = job.traced
        request = EngineRequest(
            str(job.number), traced.prompt_tokens, traced.output_tokens, HandOff.RECEIVE, traced.blocks
        )
        self._decode(job, request, offer)

    def _on_first_token(self, job: _Job, request: EngineRequest, at: float) -> None:
        job.first_token = at
        if job.prefill is None:
            job.cached = request.cached

    def _on_finished(self, job: _Job, _: EngineRequest, at: float) -> None:
        self._release(job)
        self._record(job, None)

    def _release(self, job: _Job) -> None:
        assert job.reservation is not None
        job.reservation.release(self._clock.now)
        self._dispatch(job.at)

    def _record(self, job: _Job, reason: str | None) -> None:
        traced, first, now = job.traced, job.first_token, self._clock.now
        tpot = None
        if reason is None and first is not None and traced.output_tokens > 1:
            tpot = (now - first) / (traced.output_tokens - 1)
        self._results[job.number] = RequestResult(
            traced.arrival,
            traced.prompt_tokens,
            traced.output_tokens,
            job.cached,
            None if first is None or reason is not None else first - traced.arrival,
            tpot,
            job.prefill.id if job.prefill else None,
            job.decode.id if job.decode else None,
            now if reason is None else None,
            reason,
        )
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
        if one.dispatcher.pending:
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

    def _scrape(self, one: OneScheduler, endpoint: Endpoint) -> None:
        """Report to the registry what a scrape of the engine's ``/metrics`` would show."""
        if self._done:
            return
        now = self._clock.now
        instance, before = self._instances[endpoint.id], one.scraped.get(endpoint)
        seen = one.scraped[endpoint] = instance.snapshot()
        gaps = seen.gaps - before.gaps if before else 0
        one.registry.scraped(
            endpoint,
            MetricsSnapshot(
                now,
                seen.running,
                seen.waiting,
                seen.kv_usage,
                kv_capacity=instance.engine.profile.capacity,
                step_time=(seen.gap_seconds - before.gap_seconds) / gaps if before and gaps else None,
                output_tokens=seen.generation_tokens - before.generation_tokens if before else 0.0,
                finished=seen.finished - before.finished if before else 0.0,
            ),
            endpoint.in_flight,
            endpoint.tokens,
        )
        self._dispatch(one)
        self._clock.call_at(now + self._scrape_interval, partial(self._scrape, one, endpoint))

    def _sample(self) -> None:
        """Record the load of all instances and of the queue, for the figure."""
        if self._done:
            return
        now = self._clock.now
        for name, instance in self._instances.items():
            seen = instance.snapshot()
            self._samples.append(LoadSample(now, name, seen.running, seen.waiting, seen.kv_usage))
        waiting = sum(len(one.dispatcher.queue) for one in self._schedulers)
        self._samples.append(LoadSample(now, "scheduler", 0, waiting, 0.0))
        self._clock.call_at(now + max(1.0, self._trace.seconds / _SAMPLES), self._sample)
