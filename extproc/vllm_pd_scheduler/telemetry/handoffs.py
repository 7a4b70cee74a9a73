"""What becomes of hand-offs."""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter

from .buckets import SECONDS
from .histogram import LeanHistogram
from .kept import keep_only

MAX_PAIRS = 1000
"""Pairs of P and D, or of two D, that have a series of their own; further ones count as of ``OTHER``."""
OTHER = "other"


class Handoffs:
    """Times those that a decode instance uses, and counts the others."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._handoff_seconds = LeanHistogram(
            "pd_scheduler_handoff_duration_seconds",
            "From the moment when D had a request with a hand-off to the first byte of its answer's body.",
            ["prefill", "decode"],
            buckets=SECONDS,
            registry=registry,
        )
        self._handoffs = Counter(
            "pd_scheduler_handoffs_unused",
            "Hand-offs that no decode used: freed on P at once, left to the lease, or too late to be used.",
            ["prefill", "outcome"],
            registry=registry,
        )

    def used(self, prefill: str, decode: str, seconds: float) -> None:
        """Record how long it took from D's having a hand-off to its first byte."""
        pairs = self._handoff_seconds
        if len(pairs) >= MAX_PAIRS and not pairs.has(prefill, decode):
            prefill = decode = OTHER
        pairs.series(prefill, decode).observe(seconds)

    def released(self, prefill: str) -> None:
        """Count an unused hand-off whose blocks were freed on P."""
        self._handoffs.labels(prefill, "released").inc()

    def stranded(self, prefill: str) -> None:
        """Count an unused hand-off that was not freed: P keeps its blocks until the lease ends."""
        self._handoffs.labels(prefill, "stranded").inc()

    def late(self, prefill: str) -> None:
        """Count a hand-off that was too old to be used when D was to get it."""
        self._handoffs.labels(prefill, "late").inc()

    def keep_only(self, instances: Collection[str]) -> None:
        """Forget the series of all other instances, which were removed."""
        for label in ("prefill", "decode"):
            self._handoff_seconds.keep(label, frozenset((*instances, OTHER)))
        keep_only(self._handoffs, "prefill", instances)
