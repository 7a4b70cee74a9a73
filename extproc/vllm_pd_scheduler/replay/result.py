"""The results of a run of a trace, and the figures that sum them up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RequestResult:
    """The result of one request. All times are virtual, in seconds.

    A rejected request has a ``reason`` and neither ``ttft`` nor ``finished``.
    """

    arrival: float
    """Since the run's start."""
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    """Prompt tokens that were cached on the instance that did the prefill."""
    ttft: float | None = None
    """From the arrival to the first token."""
    tpot: float | None = None
    """Mean time of each further token; None for an answer of one token."""
    prefill: str | None = None
    """Id of the instance; None if the decode instance did the prefill."""
    decode: str | None = None
    """Id of the instance."""
    finished: float | None = None
    """Since the run's start."""
    reason: str | None = None
    """Why it was rejected."""

    def meets(self, ttft_slo: float, tpot_slo: float) -> bool:
        """Whether it was answered to the end, with both times within their limits (seconds)."""
        if self.reason is not None or self.finished is None or self.ttft is None:
            return False
        return self.ttft <= ttft_slo and (self.tpot is None or self.tpot <= tpot_slo)


@dataclass(frozen=True, slots=True)
class LoadSample:
    """The load of an instance at one moment: requests running and waiting, and KV use from 0 to 1."""

    time: float
    instance: str
    running: int
    waiting: int
    kv_usage: float


@dataclass(frozen=True, slots=True)
class RunResult:
    """The run of one strategy. ``prefill_busy`` and ``decode_busy`` have all instances of the role."""

    strategy: str
    results: list[RequestResult]
    prefill_busy: dict[str, float]
    """By instance: share of the run, 0 to 1, in which it computed."""
    decode_busy: dict[str, float]
    samples: list[LoadSample] = field(default_factory=list)
    seconds: float = 0.0
    """Wall time of the run."""
    strategy_failures: int = 0
    """Calls of the strategy that failed, and were answered without it."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The distribution of a time over the requests that have it, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Return the distribution of values; None if there are none."""
        ordered = sorted(values)
        if not ordered:
            return None
        return cls(
            math.fsum(ordered) / len(ordered),
            *(percentile(ordered, share) for share in (0.5, 0.9, 0.99)),
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a run. Shares are from 0 to 1; a figure that has no data is None."""

    strategy: str
    requests: int
    rejected: dict[str, int]
    """Rejected requests by reason."""
    ttft: Spread | None
    tpot: Spread | None
    attainment: float
    """Share of all requests, rejected ones included, that met both limits."""
    prefix_hits: float | None
    """Cached tokens / prompt tokens of the requests that were not rejected."""
    imbalance_max: float | None
    """Maximum / mean of the tokens that the prefill instances computed: 1 if all computed the same."""
    imbalance_cv: float | None
    """Standard deviation / mean of these tokens: 0 if all computed the same."""
    prefill_busy: float | None
    """Mean share of the run in which a prefill instance computed."""
    decode_busy: float | None
    makespan: float
    """Seconds from the first arrival to the last answer's end."""
    seconds: float
    """Wall time of the run."""
    strategy_failures: int
    """Calls of the strategy that failed, and were answered without it."""


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` (0 to 1) of the sorted values lies, interpolated linearly.

    The rank is ``share * (n - 1)``, as in NumPy's default and definition 7 of Hyndman and Fan, "Sample
    Quantiles in Statistical Packages", 1996. Raise ValueError if there are no values.
    """
    if not ordered:
        raise ValueError("no values have no percentile")
    rank = share * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def summary(run: RunResult, ttft_slo: float, tpot_slo: float) -> Summary:
    """Return the figures of a run, with limits in seconds for the first and for each further token."""
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
        strategy_failures=run.strategy_failures,
    )


def _imbalance(run: RunResult) -> tuple[float | None, float | None]:
    computed = dict.fromkeys(run.prefill_busy, 0)  # with those that got no request
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
