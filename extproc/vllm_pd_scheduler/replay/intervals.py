"""How sure the figures of several runs are: means with 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .result import Spread, Summary

_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)  # fmt: skip
"""Student's t for two sides of 2.5 %, from 1 degree of freedom on."""
_NORMAL = 1.96


@dataclass(frozen=True, slots=True)
class Interval:
    """The mean of a figure over runs with different seeds, and where the true one is with 95 % confidence.

    That takes the figures for normally distributed, which means of many requests are nearly.
    """

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half its width."""
        return (self.high - self.low) / 2

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval | None:
        """Return the interval of at least two values; ``None`` for fewer."""
        count = len(values)
        if count < 2:
            return None
        mean = math.fsum(values) / count
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
        half = (_T[count - 2] if count - 2 < len(_T) else _NORMAL) * deviation / math.sqrt(count)
        return cls(mean, mean - half, mean + half)


FIGURES: dict[str, Callable[[Summary], float | None]] = {
    "attainment": lambda summary: summary.attainment,
    "ttft_mean": lambda summary: _of(summary.ttft, "mean"),
    "ttft_p90": lambda summary: _of(summary.ttft, "p90"),
    "ttft_p99": lambda summary: _of(summary.ttft, "p99"),
    "tpot_mean": lambda summary: _of(summary.tpot, "mean"),
    "tpot_p90": lambda summary: _of(summary.tpot, "p90"),
    "tpot_p99": lambda summary: _of(summary.tpot, "p99"),
    "prefix_hits": lambda summary: summary.prefix_hits,
}
"""What is told of several runs together."""


def intervals(summaries: Sequence[Summary]) -> dict[str, Interval | None]:
    """Return each figure of several runs; ``None`` for one that not all of them have."""
    return {name: _interval([figure(each) for each in summaries]) for name, figure in FIGURES.items()}


def ratio(summaries: Sequence[Summary], others: Sequence[Summary]) -> Interval | None:
    """Return the mean TTFT as a multiple of that of other runs, each of which had the same load."""
    figure = FIGURES["ttft_mean"]
    pairs = [(figure(one), figure(other)) for one, other in zip(summaries, others, strict=True)]
    return _interval([None if one is None or not other else one / other for one, other in pairs])


def _interval(values: Sequence[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    return Interval.of(known) if len(known) == len(values) else None


def _of(spread: Spread | None, name: str) -> float | None:
    return None if spread is None else float(getattr(spread, name))
