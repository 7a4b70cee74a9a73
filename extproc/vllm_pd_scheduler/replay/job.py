"""What one strategy does under the conditions of a comparison: a run, or a search by many runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .result import RunResult, Summary, summary
from .search import RateResult, find_rate
from .trace import Trace

if TYPE_CHECKING:
    from .fleet import FleetSpec, Variant

TARGET = 0.95
"""Share of the requests that must meet both limits for a rate to pass."""

Runner = Callable[["Variant", Trace, "FleetSpec", Callable[[int], None]], RunResult]
"""Runs a variant on a trace; tells the last argument how many requests have ended. `fleet.run_variant`."""
Progress = Callable[[float, int], None]
"""Told the rate of the run and how many of its requests have ended."""


class ReplayError(Exception):
    """A comparison could not be run; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What all strategies of a comparison have in common. Limits are in seconds."""

    trace: str
    """The trace's name."""
    requests: int
    trace_seconds: float
    """From the first arrival to the last at the trace's own rate."""
    fleet: FleetSpec
    rate: float
    """Multiple of the trace's own rate."""
    ttft_slo: float
    tpot_slo: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """A strategy's run at the conditions' rate, and what the search found if there was one."""

    run: RunResult
    summary: Summary
    found: RateResult | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """All that is needed to run a variant; can be sent to another process when ``runner`` is a module's."""

    trace: Trace
    conditions: Conditions
    search: bool
    runner: Runner

    def run(self, variant: Variant, progress: Progress) -> Outcome:
        """Run ``variant`` once, or as often as the search needs.

        Raises :exc:`ReplayError` for what the fleet refuses with a ValueError.
        """
        given = self._run(variant, self.conditions.rate, progress)
        if not self.search:
            return given

        def attainment(rate: float) -> float:
            # The search begins with the rate that was run already.
            outcome = given if rate == self.conditions.rate else self._run(variant, rate, progress)
            return outcome.summary.attainment

        return replace(given, found=find_rate(attainment, TARGET, self.conditions.rate))

    def _run(self, variant: Variant, rate: float, progress: Progress) -> Outcome:
        trace = self.trace.scaled(rate)
        progress(rate, 0)
        try:
            run = self.runner(
                variant, trace, self.conditions.fleet, lambda finished: progress(rate, finished)
            )
        except ValueError as error:
            raise ReplayError(f"{variant.label}: {error}") from error
        progress(rate, len(trace.requests))
        return Outcome(run, summary(run, self.conditions.ttft_slo, self.conditions.tpot_slo))
