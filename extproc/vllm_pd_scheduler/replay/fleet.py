"""A fleet in virtual time: simulated engines, and the registry, strategies and line of the real scheduler."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import Any

from ..admission.dispatcher import Dispatcher
from ..admission.queue import Ticket
from ..config import ConfigError, parse_config
from ..fleet.endpoint import Endpoint, Reservation
from ..fleet.registry import Registry
from ..models import InstanceRole, MetricsSnapshot, PDInstance
from ..request.context import RequestContext
from ..request.errors import Reject
from ..scheduler import Scheduler
from ..scheduler.disaggregation import Disaggregation
from ..sim.engine import Engine
from ..sim.profile import EngineProfile
from ..sim.request import EngineRequest, HandOff
from ..sim.setups import setup
from ..sim.virtual import Offer, Snapshot, VirtualClock, VirtualInstance
from ..strategies import UnknownStrategy, load_strategy, strategy_names
from . import DEFAULT_SETUP
from .peers import PEERS
from .result import LoadSample, RequestResult, RunResult
from .trace import Trace, TraceRequest

LOWER_BOUND = "lower_bound"
"""All prefill instances as one that is N times as fast, all decode instances likewise, one cache for all;
the shortest prompt first, and a step costs no more than its tokens."""

HOP_S = 0.001
"""From the scheduler to an instance and back."""
ESTIMATE_ERROR = 0.1
"""Standard deviation of the logarithm of (estimated / real) prompt tokens: a scheduler only sees bytes."""
_STRATEGIES = ("strategy", "prefill_strategy", "decode_strategy")
_SAMPLES = 600
_PROGRESS_EVERY = 100
_LLM_D_SCRAPES_S = 0.05  # its default; the other peers do not scrape


@dataclass(frozen=True)
class FleetSpec:
    """How many instances of which set-up; ``seed`` decides all that is random.

    Raises :exc:`ValueError` for a set-up that nobody knows.
    """

    prefill: int
    decode: int
    setup: str = DEFAULT_SETUP
    seed: int = 0

    def __post_init__(self) -> None:
        self.profile(16)

    def profile(self, block_size: int) -> EngineProfile:
        """What one engine can do, with blocks of so many tokens."""
        return setup(self.setup, block_size=block_size)


@dataclass(frozen=True)
class Variant:
    """A strategy and settings of the scheduler: ``predicted_latency+late_binding``."""

    label: str
    strategy: str
    settings: dict[str, Any] = field(default_factory=dict)


def variant_names() -> list[str]:
    """Strategies that :func:`parse_variant` knows: ours, the peers', and the lower bound."""
    return [*strategy_names(), *PEERS, LOWER_BOUND]


def parse_variant(text: str) -> Variant:
    """Read ``strategy``, ``strategy+setting`` (true) or ``strategy+setting=value``, settings as configured.

    Raises :exc:`ValueError` with what is wrong.
    """
    name, *settings = (part.strip() for part in text.split("+"))
    if ":" not in name and name not in (known := variant_names()):
        raise ValueError(
            f"unknown strategy {name!r}; choose from {', '.join(known)}, or 'package.module:Class'"
        )
    found: dict[str, Any] = {}
    for one in settings:
        key, given, value = one.partition("=")
        try:
            found[key] = json.loads(value) if given else True
        except ValueError:
            found[key] = value
    if name == LOWER_BOUND:
        found = {"late_binding": True, **found}
    elif name not in PEERS:
        try:
            load_strategy(name)
        except UnknownStrategy as error:
            raise ValueError(str(error)) from None
    for key in _STRATEGIES if name in PEERS else _STRATEGIES[:1]:
        if key in found:
            raise ValueError(f"{key}: cannot be set beside {name}")
    try:
        _config(found)
    except ConfigError as error:
        raise ValueError("; ".join(error.problems)) from None
    return Variant(text, name, found)


def run_variant(
    variant: Variant,
    trace: Trace,
    fleet: FleetSpec,
    progress: Callable[[int], None],
    give_up: Callable[[RequestResult], bool] | None = None,
) -> RunResult:
    """Replay a trace; ``progress`` is told the number of requests that have ended, now and then.

    ``give_up`` is told each request that has ended; when it says so, the run ends with those.
    """
    run = _Run(variant, trace, fleet, progress)
    run.give_up = give_up
    return run.run()


def _config(settings: dict[str, Any]) -> Any:
    one = {"id": "one", "host": "127.0.0.1", "port": 1}
    return parse_config({"prefill_instances": [one], "decode_instances": [{**one, "id": "two"}], **settings})


def _pooled(profile: EngineProfile, times: int) -> EngineProfile:
    """One engine as fast and as big as so many, and no more is lost to what every step costs.

    A fleet with a queue has long steps, which share that; one that is never behind would have it each time.
    """
    return replace(
        profile,
        num_blocks=profile.num_blocks * times,
        max_num_seqs=profile.max_num_seqs * times,
        step_overhead=0.0,
        prefill_min=0.0,
        prefill_rate=profile.prefill_rate * times,
        prefill_per_kv_token=profile.prefill_per_kv_token / times,
        decode_base=profile.decode_base / times,
        decode_per_seq=profile.decode_per_seq / times,
        decode_per_kv_token=profile.decode_per_kv_token / times,
        transfer_bandwidth=profile.transfer_bandwidth * times,
    )


@dataclass(slots=True, eq=False)
class _Job:
    """A request on its way."""

    number: int
    asked: TraceRequest
    context: RequestContext
    prefill: Endpoint | None = None
    decode: Endpoint | None = None
    cached: int = 0
    first: float | None = None
    claim: Reservation | None = None


class _Run:
    def __init__(
        self, variant: Variant, trace: Trace, fleet: FleetSpec, progress: Callable[[int], None]
    ) -> None:
        self._variant, self._trace, self._progress = variant, trace, progress
        self._random = Random(fleet.seed)
        self._clock = VirtualClock()
        config = _config(variant.settings)
        if variant.strategy not in (*PEERS, LOWER_BOUND):
            config = config.model_copy(update={"strategy": variant.strategy})
        elif variant.strategy == LOWER_BOUND:
            config = config.model_copy(update={"strategy": "predicted_latency"})
        elif variant.strategy == "llm_d" and "health_check_interval" not in variant.settings:
            config = config.model_copy(update={"health_check_interval": _LLM_D_SCRAPES_S})
        self.give_up: Callable[[RequestResult], bool] | None = None
        self._interval = config.health_check_interval
        self._config = config
        self._registry = Registry()
        self._scheduler = Scheduler(config, self._registry, seed=fleet.seed)
        if variant.strategy in PEERS:
            for role in InstanceRole:
                self._scheduler.install(PEERS[variant.strategy], role, variant.strategy)
        self._dispatcher = Dispatcher(self._scheduler)
        self._disaggregation = Disaggregation(config, self._scheduler)
        self._instances: dict[Endpoint, VirtualInstance] = {}
        self._scraped: dict[Endpoint, Snapshot] = {}
        self._wake: Any = None
        self._results: dict[int, RequestResult] = {}
        self._samples: list[LoadSample] = []
        profile = fleet.profile(trace.block_tokens)
        self._populate(InstanceRole.PREFILL, fleet.prefill, profile)
        self._populate(InstanceRole.DECODE, fleet.decode, profile)

    def _populate(self, role: InstanceRole, count: int, profile: EngineProfile) -> None:
        if self._variant.strategy == LOWER_BOUND:
            count, profile = 1, _pooled(profile, count)
        for number in range(count):
            host = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
            endpoint = self._registry.add(PDInstance(f"{role}-{number}", role, host, 8000))
            self._registry.probed(endpoint, None)
            self._instances[endpoint] = VirtualInstance(Engine(profile), self._clock)
            endpoint.holder.resize(profile.num_blocks)

    def run(self) -> RunResult:
        started = time.perf_counter()
        if self._trace.requests:
            self._clock.call_at(0.0, partial(self._arrive, 0))
            for number, endpoint in enumerate(self._instances):
                self._clock.call_at(
                    number / len(self._instances) * self._interval, partial(self._scrape, endpoint)
                )
            self._clock.call_at(0.0, self._sample)
        self._clock.run()
        self._progress(len(self._results))
        ended = max((r.finished or 0.0 for r in self._results.values()), default=0.0)
        busy = {
            role: {
                e.id: self._instances[e].snapshot().busy / ended if ended else 0.0
                for e in self._registry.endpoints(role)
            }
            for role in InstanceRole
        }
        return RunResult(
            self._variant.label,
            [self._results[number] for number in sorted(self._results)],
            busy[InstanceRole.PREFILL],
            busy[InstanceRole.DECODE],
            self._samples,
            time.perf_counter() - started,
        )

    # -- a request, as router.py takes it through its life

    def _arrive(self, number: int) -> None:
        asked = self._trace.requests[number]
        if number + 1 < len(self._trace.requests):
            self._clock.call_at(self._trace.requests[number + 1].arrival, partial(self._arrive, number + 1))
        job = _Job(number, asked, self._context(asked))
        alone = self._disaggregation.local_endpoint(job.context)
        if alone is not None:
            self._clock.call_at(self._clock.now + HOP_S / 2, partial(self._serve_alone, job, alone))
            return
        self._dispatcher.submit(
            Ticket(job.context, InstanceRole.PREFILL, on_settled=partial(self._settled, job)), self._clock.now
        )
        self._wake_in_time()

    def _context(self, asked: TraceRequest) -> RequestContext:
        config, now = self._config, self._clock.now
        private = asked.blocks[1:2] or asked.blocks[:1]
        return RequestContext(
            "/v1/completions",
            prompt_tokens=asked.prompt_tokens * math.exp(self._random.gauss(0.0, ESTIMATE_ERROR)),
            output_tokens=self._registry.load.output_tokens,
            blocks=asked.blocks,
            block_tokens=self._trace.block_tokens,
            session=str(private[0]) if private else None,
            ttft_slo=config.ttft_slo,
            tpot_slo=config.tpot_slo,
            arrived=now,
            now=now,
        )

    def _settled(self, job: _Job, ticket: Ticket) -> None:
        outcome = ticket.outcome
        if isinstance(outcome, Reservation):
            job.prefill, job.claim = outcome.endpoint, outcome
            self._clock.call_at(self._clock.now + HOP_S / 2, partial(self._prefill, job))
        else:
            self._end(job, outcome.reason if isinstance(outcome, Reject) else "no_prefill")

    def _serve_alone(self, job: _Job, decode: Endpoint) -> None:
        asked = job.asked
        job.context.now = self._clock.now
        job.decode, job.claim = decode, self._registry.reserve(decode, job.context)
        request = EngineRequest(
            str(job.number), asked.prompt_tokens, asked.output_tokens, HandOff.NONE, asked.blocks
        )
        self._decode(job, request, None)

    def _decode(self, job: _Job, request: EngineRequest, offer: Offer | None) -> None:
        assert job.decode is not None
        try:
            self._instances[job.decode].add(
                request,
                offer=offer,
                on_first_token=partial(self._began, job),
                on_finished=partial(self._decoded, job),
            )
        except ValueError:
            if offer is not None:
                offer.source.release(offer.request_id)
            self._release(job)
            self._end(job, "too_long")
            return
        self._changed()

    def _prefill(self, job: _Job) -> None:
        asked, endpoint = job.asked, job.prefill
        assert endpoint is not None
        request = EngineRequest(str(job.number), asked.prompt_tokens, 1, HandOff.SEND, asked.blocks)
        try:
            self._instances[endpoint].add(request, on_finished=partial(self._prefilled, job))
        except ValueError:
            self._release(job)
            self._end(job, "too_long")

    def _prefilled(self, job: _Job, request: EngineRequest, _: float) -> None:
        job.cached = request.cached
        assert job.prefill is not None
        offer = self._instances[job.prefill].offer(request.request_id)
        self._clock.call_at(self._clock.now + HOP_S / 2, partial(self._hand_over, job, offer))

    def _hand_over(self, job: _Job, offer: Offer) -> None:
        now, context, claim = self._clock.now, job.context, job.claim
        assert claim is not None
        self._registry.prefilled(claim, job.asked.prompt_tokens, job.cached, now)
        context.prompt_tokens, context.now = job.asked.prompt_tokens, now
        job.decode = self._scheduler.pick(InstanceRole.DECODE, context)[0]
        job.claim = self._registry.reserve(job.decode, context)
        asked = job.asked
        request = EngineRequest(
            str(job.number), asked.prompt_tokens, asked.output_tokens, HandOff.RECEIVE, asked.blocks
        )
        self._decode(job, request, offer)

    def _began(self, job: _Job, request: EngineRequest, at: float) -> None:
        job.first = at
        if job.prefill is None:
            job.cached = request.cached

    def _decoded(self, job: _Job, _: EngineRequest, at: float) -> None:
        self._release(job)
        self._end(job, None)

    def _release(self, job: _Job) -> None:
        assert job.claim is not None
        job.claim.release(self._clock.now)
        self._changed()

    def _end(self, job: _Job, reason: str | None) -> None:
        asked, first, now = job.asked, job.first, self._clock.now
        tpot = None
        if reason is None and first is not None and asked.output_tokens > 1:
            tpot = (now - first) / (asked.output_tokens - 1)
        self._results[job.number] = RequestResult(
            asked.arrival,
            asked.prompt_tokens,
            asked.output_tokens,
            job.cached,
            None if first is None or reason is not None else first - asked.arrival,
            tpot,
            job.prefill.id if job.prefill else None,
            job.decode.id if job.decode else None,
            now if reason is None else None,
            reason,
        )
        if self.give_up is not None and self.give_up(self._results[job.number]):
            self._clock.stop()
        if len(self._results) % _PROGRESS_EVERY == 0:
            self._progress(len(self._results))

    # -- what goes on beside

    @property
    def _done(self) -> bool:
        return len(self._results) == len(self._trace.requests)

    def _changed(self) -> None:
        if len(self._dispatcher.queue):
            self._dispatcher.dispatch(self._clock.now)
            self._wake_in_time()

    def _wake_in_time(self) -> None:
        if self._wake is not None:
            self._wake.cancel()
        at = self._dispatcher.next_wake(self._clock.now)
        self._wake = None if at is None else self._clock.call_at(at, self._changed)

    def _scrape(self, endpoint: Endpoint) -> None:
        """Read what the engine's ``/metrics`` would say."""
        if self._done:
            return
        now = self._clock.now
        seen, before = self._instances[endpoint].snapshot(), self._scraped.get(endpoint)
        self._scraped[endpoint] = seen
        gaps = seen.gaps - before.gaps if before else 0
        self._registry.scraped(
            endpoint,
            MetricsSnapshot(
                now,
                seen.running,
                seen.waiting,
                seen.kv_usage,
                kv_capacity=self._instances[endpoint].engine.profile.capacity,
                step_time=(seen.gap_seconds - before.gap_seconds) / gaps if before and gaps else None,
                output_tokens=seen.generation_tokens - before.generation_tokens if before else 0.0,
                finished=seen.finished - before.finished if before else 0.0,
            ),
            endpoint.in_flight,
            endpoint.tokens,
        )
        self._changed()
        self._clock.call_at(now + self._interval, partial(self._scrape, endpoint))

    def _sample(self) -> None:
        if self._done:
            return
        now = self._clock.now
        for endpoint, instance in self._instances.items():
            seen = instance.snapshot()
            self._samples.append(LoadSample(now, endpoint.id, seen.running, seen.waiting, seen.kv_usage))
        self._samples.append(LoadSample(now, "scheduler", 0, len(self._dispatcher.queue), 0.0))
        self._clock.call_at(now + max(1.0, self._trace.seconds / _SAMPLES), self._sample)
