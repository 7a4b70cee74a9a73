"""How requests that were sent to decode have ended, and when."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from .buckets import ANSWER_SECONDS
from .counter import LeanCounter
from .histogram import LeanHistogram, Series
from .outcomes import Ending, Served
from .totals import Totals

_ERRORS = frozenset({Ending.CLIENT_ERROR, Ending.ERROR, Ending.CUT})


class Answers:
    """Counts and times answers, as clients see them."""

    def __init__(self, registry: CollectorRegistry, totals: Totals) -> None:
        self._totals = totals
        responses = LeanCounter(
            "pd_scheduler_responses",
            "Requests sent to decode that have ended, by how.",
            ["outcome"],
            registry=registry,
        )
        self._responses = {ending: responses.series(ending) for ending in Ending}
        self._time_to_first_token = _by_served(
            registry,
            "pd_scheduler_time_to_first_token_seconds",
            "From the first byte of a client's request to the first of its answer's body, by Envoy's clock.",
        )
        self._request_seconds = _by_served(
            registry,
            "pd_scheduler_request_duration_seconds",
            "From the first byte of a client's request to the end of its answer, by Envoy's clock.",
        )

    def ended(self, served: Served, ending: Ending, ttft: float | None, duration: float) -> None:
        """Count a request that was sent to decode and has ended, with its times in seconds."""
        self._responses[ending].inc()
        if ending in _ERRORS:
            self._totals.errors[ending.value] += 1
        self._request_seconds[served].observe(duration)
        if ttft is not None:
            self._time_to_first_token[served].observe(ttft)
            self._totals.ttft.observe(ttft)


def _by_served(registry: CollectorRegistry, name: str, documentation: str) -> dict[Served, Series]:
    made = LeanHistogram(name, documentation, ["served"], buckets=ANSWER_SECONDS, registry=registry)
    return {served: made.series(served) for served in Served}
