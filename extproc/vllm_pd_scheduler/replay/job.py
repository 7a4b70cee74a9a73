"""One variant under the conditions of a comparison: a run, or a search for the highest rate by many runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from .result import RequestResult, RunResult, Summary, summary
from .search import RateResult, find_rate
from .trace import Trace

if TYPE_CHECKING:
    from .fleet import FleetSpec
    from .variant import Variant

TARGET = 0.95
"""Share of the requests that must meet both limits for a rate to pass. A choice, usual for SLOs."""

StopWhen = Callable[[RequestResult], bool]
"""Called with each request that has ended; ``True`` ends the run, since the rest does not matter."""


class Runner(Protocol):
    """A function that runs a variant on a trace, as ``fleet.run_variant``."""

    def __call__(
        self,
        variant: Variant,
        trace: Trace,
        fleet: FleetSpec,
        progress: Callable[[int], None],
        stop_when: StopWhen | None = None,
    ) -> RunResult:
        """Return the results; call ``progress`` now and then with the number of requests that have ended."""
        ...


Progress = Callable[[float, int], None]
"""Called with the rate of a run and the number of its requests that have ended."""


class ReplayError(Exception):
    """A comparison could not be run; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What is the same for all variants of a comparison. Limits are in seconds."""

    trace: str
    """The trace's name."""
    requests: int
    trace_seconds: float
    """Seconds from the first arrival to the last, at the trace's own rate."""
    fleet: FleetSpec
    rate: float
    """Multiple of the trace's own rate."""
    ttft_slo: float
    tpot_slo: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """A variant's run at the conditions' rate, and the result of the search if there was one."""

    run: RunResult
    summary: Summary
    search_result: RateResult | None = None
    repeats: tuple[Summary, ...] = ()
    """Those of all seeds, that of ``run`` first; empty if there is one seed."""


class Source(Protocol):
    """Where a load comes from that is another one with each seed, as :class:`~.load.Load`."""

    def trace(self, seed: int) -> Trace:
        """Return the load of a seed."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """All that is needed to run variants. It can be pickled if ``runner`` is a function of a module."""

    trace: Trace
    conditions: Conditions
    search: bool
    runner: Runner
    seeds: int = 1
    """Runs with seeds one after the other, from that of the fleet on."""
    source: Source | None = None
    """Where the load of further seeds comes from; without it, it is the same."""

    def run(self, variant: Variant, progress: Progress) -> Outcome:
        """Run a variant with each seed, search its rate if asked to, and return the outcome.

        Raise :exc:`ReplayError` if the runner raises ValueError.
        """
        given = self._run(variant, self.conditions.rate, progress)
        if self.seeds > 1:
            further = (self._with_seed(more) for more in range(1, self.seeds))
            repeats = [each._run(variant, self.conditions.rate, progress).summary for each in further]
            given = replace(given, repeats=(given.summary, *repeats))
        if not self.search:
            return given

        def attainment(rate: float) -> float:
            # The search starts with this rate, which has been run.
            if rate == self.conditions.rate:
                return given.summary.attainment
            return self._attainment(variant, rate, progress)

        return replace(given, search_result=find_rate(attainment, TARGET, self.conditions.rate))

    def _with_seed(self, more: int) -> Job:
        """Return the same job with a seed that is so much higher."""
        fleet = self.conditions.fleet
        seed = fleet.seed + more
        trace = self.trace if self.source is None else self.source.trace(seed)
        return replace(
            self, trace=trace, conditions=replace(self.conditions, fleet=replace(fleet, seed=seed))
        )

    def _attainment(self, variant: Variant, rate: float, progress: Progress) -> float:
        """Return the share of requests that meet the limits at a rate.

        The run stops as soon as the share cannot reach ``TARGET`` any more. Then an upper bound is returned:
        the search only needs to know that the rate failed.
        """
        total = len(self.trace.requests)
        missed = 0

        def fails(result: RequestResult) -> bool:
            nonlocal missed
            missed += not result.meets(self.conditions.ttft_slo, self.conditions.tpot_slo)
            return missed > (1 - TARGET) * total

        outcome = self._run(variant, rate, progress, fails)
        if len(outcome.run.results) < total:
            return (total - missed) / total
        return outcome.summary.attainment

    def _run(
        self, variant: Variant, rate: float, progress: Progress, stop_when: StopWhen | None = None
    ) -> Outcome:
        trace = self.trace.scaled(rate)
        progress(rate, 0)
        try:
            run = self.runner(
                variant, trace, self.conditions.fleet, lambda finished: progress(rate, finished), stop_when
            )
        except ValueError as error:
            raise ReplayError(f"{variant.label}: {error}") from error
        progress(rate, len(trace.requests))
        return Outcome(run, summary(run, self.conditions.ttft_slo, self.conditions.tpot_slo))
