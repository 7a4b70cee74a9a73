"""Searches the highest rate at which a fleet still meets its limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RateResult:
    """The result of a search. Rates are multiples of the trace's own; attainments are shares of requests."""

    rate: float | None
    """The highest rate tried that passed; None if even the lowest failed."""
    attainment: float
    """At ``rate`` or, without one, at the lowest rate tried."""
    tried: list[tuple[float, float]]
    """Each rate tried with its attainment, in the order of the runs."""
    open_ended: bool
    """Whether no rate failed: the highest one is above ``rate``."""


def find_rate(
    run: Callable[[float], float],
    target: float = 0.95,
    start: float = 1.0,
    precision: float = 0.02,
    doublings: int = 10,
) -> RateResult:
    """Return the highest rate for which ``run(rate)`` returns an attainment of at least ``target``.

    1. From ``start``, double the rate until a run fails, or halve it until one passes, at most ``doublings``
       times.
    2. Bisect between the two, in the logarithm, until they differ by less than the share ``precision``.

    With the defaults that takes at most 17 runs. The lower end has always passed and the upper one failed. So
    even if attainment does not fall steadily with the rate, the result is a rate that passed, next to one
    that did not. Raise ValueError if ``start`` or ``precision`` is not above 0.
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
    """Return a rate that passes and its double, which fails; None for one that was not found."""
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
