"""The highest rate at which a fleet still meets its limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RateResult:
    """What a search found. Rates are multiples of the trace's own; attainments are shares of all requests."""

    rate: float | None
    """The highest rate tried that passed; None when even the lowest failed."""
    attainment: float
    """At ``rate``; at the lowest rate tried when there is none."""
    tried: list[tuple[float, float]]
    """Every rate tried and its attainment, in the order of the runs."""
    open_ended: bool
    """No rate failed: the true one is above ``rate``."""


def find_rate(
    run: Callable[[float], float],
    target: float = 0.95,
    start: float = 1.0,
    precision: float = 0.02,
    doublings: int = 10,
) -> RateResult:
    """Find the highest rate for which ``run(rate)`` returns an attainment of ``target`` or more.

    From ``start`` the rate is doubled until a run fails (or halved until one passes), ``doublings`` times at
    most; then the gap is halved, in the logarithm, until its ends differ by less than ``precision``. With
    the defaults that takes 17 runs at the most. At every moment the lower end has passed and the upper one
    failed, so an attainment that is not quite monotone still gives a rate that passed, beside one that did
    not. Raises ValueError for a start or a precision that is not above 0.
    """
    if not (start > 0 and precision > 0):
        raise ValueError(f"start and precision must be above 0, got {start} and {precision}")
    tried: dict[float, float] = {}

    def passes(rate: float) -> bool:
        tried[rate] = run(rate)
        return tried[rate] >= target

    low, high = _bracket(passes, start, doublings)
    while low is not None and high is not None and high / low > 1 + precision:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if passes(middle) else (low, middle)
    attainment = tried[min(tried) if low is None else low]
    return RateResult(low, attainment, list(tried.items()), open_ended=high is None)


def _bracket(
    passes: Callable[[float], bool], start: float, doublings: int
) -> tuple[float | None, float | None]:
    """A rate that passes and its double that fails; None for one that was not found."""
    if passes(start):
        low = start
        for _ in range(doublings):
            if not passes(low * 2):
                return low, low * 2
            low *= 2
        return low, None
    high = start
    for _ in range(doublings):
        if passes(high / 2):
            return high / 2, high
        high /= 2
    return None, high
