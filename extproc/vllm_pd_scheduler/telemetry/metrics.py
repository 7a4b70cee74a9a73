"""Counters and histograms of what happens to requests. It is told of them and knows nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Served(StrEnum):
    """How a request was served."""

    SPLIT = "split"
    """Prefill on P, decode on D."""
    WHOLE = "whole"
    """On D alone, since it cannot be split."""
    LOCAL = "local"
    """On D alone, since no P could prefill it."""
    ALONE = "alone"
    """On D alone, since that was predicted to be faster, or is configured."""
    PASSED = "passed"
    """Another path or method, on D as it is."""


class Left(StrEnum):
    """How a request left the scheduler's queue."""

    SERVED = "served"
    REFUSED = "refused"
    GONE = "gone"
    """Its client did not wait for it."""


class Telemetry:
    """Counters and histograms of the request path, in a Prometheus registry of their own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.prometheus = CollectorRegistry()
        self._clock = clock
        self._requests = Counter(
            "pd_requests",
            "Requests sent to a decode instance, by how they were served.",
            ["decode", "served"],
            registry=self.prometheus,
        )
        self._rejected = Counter(
            "pd_requests_rejected",
            "Requests answered with an error in place of an instance's answer.",
            ["status", "reason"],
            registry=self.prometheus,
        )
        self._queue_seconds = Histogram(
            "pd_queue_wait_seconds",
            "Time in the scheduler's queue of requests that had to wait, by how they left it.",
            ["outcome"],
            buckets=_SECONDS,
            registry=self.prometheus,
        )
        for outcome in Left:
            self._queue_seconds.labels(outcome)
        self._prefill_seconds = Histogram(
            "pd_prefill_duration_seconds",
            "Time of the prefill leg, as the scheduler sees it.",
            ["prefill"],
            buckets=_SECONDS,
            registry=self.prometheus,
        )
        self._predicted = Histogram(
            "pd_prefill_predicted_ratio",
            "Predicted over measured time of a prefill, queueing included: 1 is right.",
            ["prefill"],
            buckets=(0.1, 0.25, 0.5, 0.8, 0.9, 1.1, 1.25, 2, 4, 10),
            registry=self.prometheus,
        )
        self._prefill_failures = Counter(
            "pd_prefill_failures",
            "Prefill attempts that gave no hand-off.",
            ["prefill", "reason"],
            registry=self.prometheus,
        )
        self._attempts = Counter(
            "pd_decode_attempt_failures",
            "Attempts at a decode instance that failed; 'cut' is a stream that a client lost.",
            ["decode", "failure"],
            registry=self.prometheus,
        )
        self._handoffs = Counter(
            "pd_handoffs_unused",
            "Hand-offs that no decode used: freed on P at once, left to the lease, or too late to be used.",
            ["prefill", "outcome"],
            registry=self.prometheus,
        )
        self._scrape_failures = Counter(
            "pd_scrape_failures",
            "Scrapes of an instance's /metrics that failed.",
            ["instance"],
            registry=self.prometheus,
        )

        self._state_changes = Counter(
            "pd_instance_state_changes",
            "Changes of an instance's state, by the state that it came to; 'trial' follows an ejection.",
            ["instance", "role", "state"],
            registry=self.prometheus,
        )

    def forwarded(self, decode: str, served: Served) -> None:
        """Count a request that goes to decode."""
        self._requests.labels(decode, served).inc()

    def rejected(self, status: int, reason: str) -> None:
        """Count a request that was answered with an error."""
        self._rejected.labels(str(status), reason).inc()

    def left_queue(self, outcome: Left, seconds: float) -> None:
        """Take how long a request waited in the scheduler."""
        self._queue_seconds.labels(outcome).observe(seconds)

    @contextmanager
    def prefill(self, instance: str) -> Iterator[None]:
        """Time a prefill leg that gives an answer."""
        start = self._clock()
        yield
        self._prefill_seconds.labels(instance).observe(self._clock() - start)

    def prefill_predicted(self, instance: str, ratio: float) -> None:
        """Compare a prefill's predicted time with the one it took: ``ratio`` is the first over the second."""
        self._predicted.labels(instance).observe(ratio)

    def prefill_failed(self, instance: str, reason: str) -> None:
        """Count a prefill attempt that gave no hand-off."""
        self._prefill_failures.labels(instance, reason).inc()

    def attempt_failed(self, instance: str, failure: str) -> None:
        """Count an attempt at decode that failed."""
        self._attempts.labels(instance, failure).inc()

    def handoff_released(self, prefill: str) -> None:
        """Count a hand-off that was freed on P."""
        self._handoffs.labels(prefill, "released").inc()

    def handoff_stranded(self, prefill: str) -> None:
        """Count a hand-off that could not be freed."""
        self._handoffs.labels(prefill, "stranded").inc()

    def handoff_late(self, prefill: str) -> None:
        """Count a hand-off that was too old to be used."""
        self._handoffs.labels(prefill, "late").inc()

    def scrape_failed(self, instance: str) -> None:
        """Count a scrape that failed."""
        self._scrape_failures.labels(instance).inc()

    def state_changed(self, instance: str, role: str, state: str) -> None:
        """Count that an instance came to a state."""
        self._state_changes.labels(instance, role, state).inc()

    def page(self) -> bytes:
        """Return the Prometheus text page."""
        return generate_latest(self.prometheus)
