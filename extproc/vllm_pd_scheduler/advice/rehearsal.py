"""Replays the requests on fleets of several sizes, one after the other. Runs in a process of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from ..models import InstanceRole
from ..records.recording import BLOCK_TOKENS, hash_ids
from ..records.traffic import Recorded
from ..replay.fleet import FleetSpec, run_variant
from ..replay.result import RequestResult, RunResult, percentile
from ..replay.trace import Trace, TraceRequest
from ..replay.variant import Variant
from ..sim.profile import EngineProfile
from .question import Answer, Learned, Outcome, Question, Size, Times

WARM_UP = 0.2
"""Share of the time whose requests do not count at least: caches are empty then, and nothing is learned."""
_FIRST_SHARES = (0.25, 0.5)
"""Share of the time by which the first run must have ended; and by which one of half of the requests must."""
_MOST_BATCHED = 8192
"""Tokens that an engine computes in a step: vLLM's default on large GPUs. It does not say its own."""
_MOST_RUNNING = 1024
"""Requests that it runs at once: vLLM's default there."""
_OWN = 24
"""Bits of a block's id that its place takes, where it is a prompt's own."""
_KV_BYTES = 1
"""Of a token: the learned time of a hand-off is by token."""


class TooSlow(Exception):
    """Not even half of the requests can be replayed once in the time that there is."""


def rehearse(
    question: Question, requests: Sequence[Recorded], cpu: Callable[[], float] = time.process_time
) -> Answer:
    """Return what each size of the fleet would do with the requests; ``cpu`` returns seconds.

    If there is not enough time, the oldest requests are left out, and then the last sizes. Raises
    :exc:`TooSlow`, and :exc:`ValueError` for settings that cannot be used.
    """
    began, engines = cpu(), profiles(question.learned)
    variant = Variant("as configured", question.settings["prefill_strategy"], question.settings)
    kept, present = requests, question.sizes[0]
    for share in _FIRST_SHARES:
        trace = _trace(kept, question)
        first = _run(variant, trace, present, engines, _later(cpu, began + share * question.seconds))
        if first is not None:
            break
        kept = kept[len(kept) // 2 :]
    else:
        raise TooSlow
    start = kept[0].arrived
    outcomes = [_outcome(question, start, trace, present, first)]
    for size in question.sizes[1:]:
        run = _run(variant, trace, size, engines, _later(cpu, began + question.seconds))
        if run is None:
            break
        outcomes.append(_outcome(question, start, trace, size, run))
    return Answer(outcomes, max(0.0, start - max(requests[0].arrived, question.count_since)))


def _later(cpu: Callable[[], float], end: float) -> Callable[[], bool]:
    return lambda: cpu() > end


def profiles(learned: Learned) -> dict[InstanceRole, EngineProfile]:
    """Return the engines of which P and D are made."""
    rate = 1 / max(1e-9, learned.per_token)
    shared = EngineProfile(
        block_size=1,
        max_num_seqs=_MOST_RUNNING,
        max_num_batched_tokens=_MOST_BATCHED,
        step_overhead=0.0,
        prefill_rate=rate,
        prefill_per_kv_token=learned.per_pair,
        prefill_min=learned.overhead,
        decode_base=learned.base,
        decode_per_seq=learned.per_seq,
        decode_per_kv_token=learned.per_kv_token,
        kv_bytes_per_token=_KV_BYTES,
        transfer_latency=learned.transfer,
        transfer_bandwidth=_KV_BYTES / max(1e-12, learned.transfer_per_token),
    )
    prefill = replace(
        shared,
        num_blocks=max(1, int(learned.prefill_capacity)),
        step_overhead=learned.overhead,
        prefill_min=0.0,
    )
    decode = replace(shared, num_blocks=max(1, int(learned.decode_capacity)))
    return {InstanceRole.PREFILL: prefill, InstanceRole.DECODE: decode}


def _trace(requests: Sequence[Recorded], question: Question) -> Trace:
    known = [each.output_tokens for each in requests if each.output_tokens]
    usual = max(1, round(math.fsum(known) / len(known))) if known else 1
    start = requests[0].arrived if requests else 0.0
    found = [
        TraceRequest(
            (each.arrived - start) / question.rate,
            max(1, int(each.prompt_tokens)),
            each.output_tokens or usual,
            _blocks(each, number, question.shared),
        )
        for number, each in enumerate(requests)
    ]
    return Trace(found)


def _blocks(request: Recorded, number: int, shared: float) -> tuple[int, ...]:
    """Return an id for each block of a prompt.

    Where prompts were not hashed, all begin alike, as far as P had them cached on average.
    """
    tokens = int(request.prompt_tokens)
    if request.blocks:
        return tuple(hash_ids(request, tokens))
    count = tokens // BLOCK_TOKENS
    alike = min(count, round(shared * count))
    return (*range(1, alike + 1), *(number + 1 << _OWN | at for at in range(alike, count)))


def _run(
    variant: Variant,
    trace: Trace,
    size: Size,
    engines: dict[InstanceRole, EngineProfile],
    too_late: Callable[[], bool],
) -> RunResult | None:
    """Return the results of a run; ``None`` if there was not the time to end it."""
    stopped = False

    def stop(_: RequestResult) -> bool:
        nonlocal stopped
        stopped = stopped or too_late()
        return stopped

    fleet = FleetSpec(size.prefill, size.decode, engines=engines)
    run = run_variant(variant, trace, fleet, lambda _: None, stop)
    return None if stopped and len(run.results) < len(trace.requests) else run


def _outcome(question: Question, start: float, trace: Trace, size: Size, run: RunResult) -> Outcome:
    since = max(WARM_UP * trace.seconds, (question.count_since - start) / question.rate)
    counted = [each for each in run.results if each.arrival >= since]
    middle = since + (trace.seconds - since) / 2
    latest = [each for each in counted if each.arrival >= middle]
    return Outcome(
        size,
        _times(counted, question),
        _times(latest, question),
        _mean(run.prefill_busy.values()),
        _mean(each.kv_usage for each in run.samples if each.instance in run.decode_busy),
        sum(each.reason is not None for each in counted),
        len(counted),
    )


def _times(results: Sequence[RequestResult], question: Question) -> Times:
    """Return the times of some requests. One that was refused counts as if it had waited to the end."""
    settings = question.settings
    waited = settings["queue_timeout"]
    ttft = sorted(waited if each.ttft is None else each.ttft for each in results)
    tpot = sorted(each.tpot for each in results if each.tpot is not None)
    limits = settings.get("ttft_slo") or math.inf, settings.get("tpot_slo") or math.inf
    met = sum(each.meets(*limits) for each in results)
    return Times(
        percentile(ttft, 0.9) if ttft else None,
        percentile(tpot, 0.9) if tpot else None,
        met / len(results) if results else 1.0,
    )


def _mean(shares: Iterable[float]) -> float:
    known = list(shares)
    return math.fsum(known) / len(known) if known else 0.0
