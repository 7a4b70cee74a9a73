"""What came of one run of a trace, and the figures that sum it up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RequestResult:
    """One request. All times are virtual, in seconds; ``arrival`` and ``finished`` since the run's start.

    ``ttft`` is from the arrival to the first token, ``tpot`` the mean time of each further one (None for an
    answer of one token). ``prefill`` and ``decode`` are ids of instances; ``prefill`` is None when D did the
    prefill. A rejected request has a ``reason`` and neither ``ttft`` nor ``finished``.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    """Of the prompt's tokens, those that were in the cache of who did the prefill."""
    ttft: float | None = None
    tpot: float | None = None
    prefill: str | None = None
    decode: str | None = None
    finished: float | None = None
    reason: str | None = None

    def meets(self, ttft_slo: float, tpot_slo: float) -> bool:
        """Answered to the end, and both times (seconds) within their limits."""
        if self.reason is not None or self.finished is None or self.ttft is None:
            return False
        return self.ttft <= ttft_slo and (self.tpot is None or self.tpot <= tpot_slo)


@dataclass(frozen=True, slots=True)
class LoadSample:
    """What one instance had to do at one moment: requests running and waiting, and its KV use from 0 to 1."""

    time: float
    instance: str
    running: int
    waiting: int
    kv_usage: float


@dataclass(frozen=True, slots=True)
class RunResult:
    """One strategy's run. ``prefill_busy`` and ``decode_busy`` name all instances of the role."""

    strategy: str
    results: list[RequestResult]
    prefill_busy: dict[str, float]
    """Share of the run, from 0 to 1, in which each instance computed."""
    decode_busy: dict[str, float]
    samples: list[LoadSample] = field(default_factory=list)
    seconds: float = 0.0
    """Wall time of the run."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How a time is spread over the requests that have one, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """The spread of ``values``; None when there are none."""
        ordered = sorted(values)
        if not ordered:
            return None
        return cls(
            math.fsum(ordered) / len(ordered),
            *(percentile(ordered, share) for share in (0.5, 0.9, 0.99)),
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one run; None where nothing can be said. Shares are from 0 to 1."""

    strategy: str
    requests: int
    rejected: dict[str, int]
    """Rejected requests by reason."""
    ttft: Spread | None
    tpot: Spread | None
    attainment: float
    """Share of all requests, rejected ones too, that met both limits."""
    prefix_hits: float | None
    """Cached tokens / prompt tokens, of the requests that were not rejected."""
    imbalance_max: float | None
    """Most / mean of the tokens that a prefill instance computed: 1 when all computed the same."""
    imbalance_cv: float | None
    """Standard deviation / mean of the same: 0 when all computed the same."""
    prefill_busy: float | None
    """Mean over the prefill instances."""
    decode_busy: float | None
    makespan: float
    """Seconds from the first arrival to the last answer's end."""
    seconds: float
    """Wall time of the run."""


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of ``ordered`` lies, interpolated linearly.

    The rank is ``share * (n - 1)``, as in NumPy's default and Hyndman and Fan's definition 7. Raises
    ValueError when there are no values.
    """
    if not ordered:
        raise ValueError("no values have no percentile")
    rank = share * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def summary(run: RunResult, ttft_slo: float, tpot_slo: float) -> Summary:
    """Sum up ``run`` with limits in seconds: for the first token, and for each further one."""
    results = run.results
    served = [each for each in results if each.reason is None]
    prompt = sum(each.prompt_tokens for each in served)
    met = sum(each.meets(ttft_slo, tpot_slo) for each in results)
    imbalance_max, imbalance_cv = _imbalance(run)
    ends = [each.finished for each in served if each.finished is not None]
    return Summary(
        strategy=run.strategy,
        requests=len(results),
        rejected=dict(Counter(each.reason for each in results if each.reason is not None)),
        ttft=Spread.of(each.ttft for each in served if each.ttft is not None),
        tpot=Spread.of(each.tpot for each in served if each.tpot is not None),
        attainment=met / len(results) if results else 0.0,
        prefix_hits=sum(each.cached_tokens for each in served) / prompt if prompt else None,
        imbalance_max=imbalance_max,
        imbalance_cv=imbalance_cv,
        prefill_busy=_mean(run.prefill_busy.values()),
        decode_busy=_mean(run.decode_busy.values()),
        makespan=max(ends) - min(each.arrival for each in results) if ends else 0.0,
        seconds=run.seconds,
    )


def _imbalance(run: RunResult) -> tuple[float | None, float | None]:
    computed = dict.fromkeys(run.prefill_busy, 0)  # an instance that was given nothing counts too
    for each in run.results:
        if each.prefill is not None and each.reason is None:
            computed[each.prefill] = computed.get(each.prefill, 0) + each.prompt_tokens - each.cached_tokens
    mean = _mean(computed.values())
    if not mean:
        return None, None
    variance = math.fsum((tokens - mean) ** 2 for tokens in computed.values()) / len(computed)
    return max(computed.values()) / mean, math.sqrt(variance) / mean


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return math.fsum(known) / len(known) if known else None
