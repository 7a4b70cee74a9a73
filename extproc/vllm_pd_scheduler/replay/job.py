"""What one strategy does under the conditions of a comparison: a run, or a search by many runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from .result import RequestResult, RunResult, Summary, summary
from .search import RateResult, find_rate
from .trace import Trace

if TYPE_CHECKING:
    from .fleet import FleetSpec, Variant

TARGET = 0.95
"""Share of the requests that must meet both limits for a rate to pass."""

GiveUp = Callable[[RequestResult], bool]
"""Told each request that has ended; whether the rest of the run does not matter."""


class Runner(Protocol):
    """Runs a variant on a trace: `fleet.run_variant`."""

    def __call__(
        self,
        variant: Variant,
        trace: Trace,
        fleet: FleetSpec,
        progress: Callable[[int], None],
        give_up: GiveUp | None = None,
    ) -> RunResult:
        """Tell ``progress`` how many requests have ended, now and then."""
        ...


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
            if rate == self.conditions.rate:
                return given.summary.attainment
            return self._attainment(variant, rate, progress)

        return replace(given, found=find_rate(attainment, TARGET, self.conditions.rate))

    def _attainment(self, variant: Variant, rate: float, progress: Progress) -> float:
        """Return the share of requests within the limits; once it cannot reach the target, a bound of it."""
        total = len(self.trace.requests)
        missed = 0

        def too_many(result: RequestResult) -> bool:
            nonlocal missed
            missed += not result.meets(self.conditions.ttft_slo, self.conditions.tpot_slo)
            return missed > (1 - TARGET) * total

        outcome = self._run(variant, rate, progress, too_many)
        if len(outcome.run.results) < total:
            return (total - missed) / total
        return outcome.summary.attainment

    def _run(
        self, variant: Variant, rate: float, progress: Progress, give_up: GiveUp | None = None
    ) -> Outcome:
        trace = self.trace.scaled(rate)
        progress(rate, 0)
        try:
            run = self.runner(
                variant, trace, self.conditions.fleet, lambda finished: progress(rate, finished), give_up
            )
        except ValueError as error:
            raise ReplayError(f"{variant.label}: {error}") from error
        progress(rate, len(trace.requests))
        return Outcome(run, summary(run, self.conditions.ttft_slo, self.conditions.tpot_slo))
