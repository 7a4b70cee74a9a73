"""The last quarter of an hour in points, one each few seconds: rates and percentiles for charts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise

INTERVAL_S = 5.0
"""Seconds between two points: a choice. A change is seen soon, and a point has enough requests to count."""

MAX_POINTS = 180
"""How many are kept: 15 minutes."""

Buckets = Sequence[tuple[float, float]]
"""A histogram as Prometheus has it: upper bounds, rising, with the number of values up to each."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What was counted since the scheduler was started, and what is so now."""

    requests: float
    """Requests that were answered by an instance or by the scheduler itself."""
    errors: Mapping[str, float]
    """Answers that a client takes for errors, by reason."""
    queue: int
    """Requests that wait in the scheduler."""
    in_flight: Mapping[str, int]
    """Requests of ours on the instances, by role."""
    tpot: Sequence[tuple[float, float]] = ()
    """Seconds per output token of each D, and how many requests run there."""
    ttft: Buckets = ()
    """Seconds to the first token."""
    prompt_tokens: float = 0.0
    """Tokens of prompts."""
    cached_tokens: float = 0.0
    """Those of them that P had cached."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """How seconds are distributed."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Point:
    """A few seconds. What nothing was measured for is ``None``."""

    time: datetime
    """When they ended."""
    requests_per_s: float
    errors_per_s: Mapping[str, float]
    """By reason; without those that there was none of."""
    ttft_s: Percentiles | None
    """Time to first token of the requests that ended."""
    tpot_s: Percentiles | None
    """Time per output token over the D instances, each as often as requests run there."""
    queue: int
    prefix_hit_share: float | None
    """Share of the prompts' tokens that P had cached."""
    in_flight: Mapping[str, int]


@dataclass(slots=True)
class Series:
    """The newest points. The caller gives readings, ``INTERVAL_S`` apart, with the time of each."""

    points: deque[Point] = field(default_factory=lambda: deque(maxlen=MAX_POINTS))
    """The oldest first."""
    _before: tuple[float, Reading] | None = None

    @property
    def newest(self) -> Point | None:
        """The last point; ``None`` before the second reading."""
        return self.points[-1] if self.points else None

    def interrupt(self) -> None:
        """Have the next reading make no point, as if it were the first."""
        self._before = None

    def add(self, reading: Reading, monotonic: float, wall: float) -> None:
        """Make a point of the time since the reading before; the first one makes none.

        ``monotonic`` and ``wall`` are the time in seconds, the second one since 1970.
        """
        before, self._before = self._before, (monotonic, reading)
        if before is not None and monotonic > before[0]:
            seconds = monotonic - before[0]
            self.points.append(_point(before[1], reading, seconds, datetime.fromtimestamp(wall, UTC)))


def summed(first: Reading, every: Sequence[Reading]) -> Reading:
    """Return what several workers have counted; what each sees of the fleet is as the ``first`` sees it."""
    errors: dict[str, float] = {}
    ttft: dict[float, float] = {}
    in_flight: dict[str, int] = {}
    for each in every:
        for role, number in each.in_flight.items():
            in_flight[role] = in_flight.get(role, 0) + number
        for reason, count in each.errors.items():
            errors[reason] = errors.get(reason, 0.0) + count
        for bound, count in each.ttft:
            ttft[bound] = ttft.get(bound, 0.0) + count
    return replace(
        first,
        requests=sum(each.requests for each in every),
        errors=errors,
        queue=sum(each.queue for each in every),
        in_flight=in_flight,
        ttft=list(ttft.items()),
        prompt_tokens=sum(each.prompt_tokens for each in every),
        cached_tokens=sum(each.cached_tokens for each in every),
    )


def _point(before: Reading, now: Reading, seconds: float, time: datetime) -> Point:
    errors = {reason: count - before.errors.get(reason, 0.0) for reason, count in now.errors.items()}
    return Point(
        time=time,
        requests_per_s=_rounded((now.requests - before.requests) / seconds),
        errors_per_s={reason: _rounded(count / seconds) for reason, count in errors.items() if count > 0},
        ttft_s=_of_buckets(_since(before.ttft, now.ttft)),
        tpot_s=_weighted(now.tpot),
        queue=now.queue,
        prefix_hit_share=_share(before, now),
        in_flight=now.in_flight,
    )


def _share(before: Reading, now: Reading) -> float | None:
    tokens = now.prompt_tokens - before.prompt_tokens
    return _rounded((now.cached_tokens - before.cached_tokens) / tokens) if tokens > 0 else None


def _since(before: Buckets, now: Buckets) -> Buckets:
    earlier = dict(before)
    return [(bound, count - earlier.get(bound, 0.0)) for bound, count in now]


def _of_buckets(buckets: Buckets) -> Percentiles | None:
    """Return percentiles, interpolated within a bucket as Prometheus does; ``None`` if there is no value."""
    total = buckets[-1][1] if buckets else 0.0
    return _percentiles(lambda rank: _in_buckets(buckets, rank * total)) if total > 0 else None


def _in_buckets(buckets: Buckets, rank: float) -> float:
    for (low, below), (high, count) in pairwise([(0.0, 0.0), *buckets]):
        if count >= rank and count > below:
            # The last bucket has no end: of its values no more is known than where it begins.
            return low if high == float("inf") else low + (high - low) * (rank - below) / (count - below)
    return buckets[-1][0]


def _weighted(values: Iterable[tuple[float, float]]) -> Percentiles | None:
    """Return percentiles of values that each count as often as their weight; ``None`` without any."""
    ranked = sorted((value, weight) for value, weight in values if weight > 0)
    total = sum(weight for _, weight in ranked)

    def at(rank: float) -> float:
        seen = 0.0
        for value, weight in ranked:
            seen += weight
            if seen >= rank * total:
                return value
        return ranked[-1][0]

    return _percentiles(at) if ranked else None


def _percentiles(at: Callable[[float], float]) -> Percentiles:
    return Percentiles(*(_rounded(at(rank)) for rank in (0.5, 0.9, 0.99)))


def _rounded(value: float) -> float:
    """Return a value without the digits that no chart shows."""
    return float(f"{value:.4g}")
