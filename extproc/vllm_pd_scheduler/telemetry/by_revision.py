"""What becomes of requests by the revision that served them, so that a canary can be judged."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from prometheus_client import CollectorRegistry, Counter

from .histogram import LeanHistogram
from .kept import keep_only


class ByRevision:
    """Counts for instances that have a revision; ``buckets`` are those of the time to the first token."""

    def __init__(self, registry: CollectorRegistry, buckets: Sequence[float]) -> None:
        self._requests = Counter(
            "pd_scheduler_revision_requests",
            "Requests sent to a decode instance of a revision.",
            ["revision"],
            registry=registry,
        )
        self._responses = Counter(
            "pd_scheduler_revision_responses",
            "Requests sent to a revision that have ended, by how.",
            ["revision", "outcome"],
            registry=registry,
        )
        self._ttft = LeanHistogram(
            "pd_scheduler_revision_time_to_first_token_seconds",
            "From the first byte of a client's request to the first of its answer, by Envoy's clock.",
            ["revision"],
            buckets=buckets,
            registry=registry,
        )

    def forwarded(self, revision: str | None) -> None:
        """Count a request that was sent to decode."""
        if revision is not None:
            self._requests.labels(revision).inc()

    def ended(self, revision: str | None, ending: str, ttft: float | None) -> None:
        """Count a request that has ended, with the seconds to its first token."""
        if revision is None:
            return
        self._responses.labels(revision, ending).inc()
        if ttft is not None:
            self._ttft.series(revision).observe(ttft)

    def keep_only(self, revisions: Collection[str]) -> None:
        """Forget the series of all others: a roll-out may name one for each day."""
        for counter in (self._requests, self._responses):
            keep_only(counter, "revision", revisions)
        self._ttft.keep("revision", frozenset(revisions))
