"""Counters and histograms of what happens to requests.

The other rooms call :class:`Telemetry` when something happens; it imports none of them. What can be read from
the fleet at any moment (gauges) is in ``admin/collectors.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from prometheus_client import CollectorRegistry, Counter, Histogram

from .answers import Answers
from .buckets import ANSWER_SECONDS, SECONDS
from .by_revision import ByRevision
from .counter import LeanCounter
from .decodes import Decodes
from .encodes import Encodes
from .handoffs import Handoffs
from .histogram import LeanHistogram
from .instances import Instances
from .outcomes import QueueOutcome, Served
from .prefills import Prefills
from .process import Process
from .totals import Totals

_PICK_SECONDS = (5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3, 0.025)
"""Buckets of a pick: from one among a few instances up to a strategy that holds up all requests."""


class Telemetry:
    """Counters and histograms of the request path, in a Prometheus registry of their own.

    ``docs/metrics.md`` describes each metric.
    """

    def __init__(self) -> None:
        self.prometheus = registry = CollectorRegistry()
        self.totals = Totals()
        self.answers = Answers(registry, self.totals)
        self.encodes = Encodes(registry)
        self.prefills = Prefills(registry, self.totals)
        self.handoffs = Handoffs(registry)
        self.decodes = Decodes(registry)
        self.instances = Instances(registry)
        self.process = Process(registry)
        self.by_revision = ByRevision(registry, ANSWER_SECONDS)
        self._requests = LeanCounter(
            "pd_scheduler_requests",
            "Requests sent to a decode instance, by how they were served.",
            ["decode", "served"],
            registry=registry,
        )
        self._rejected = Counter(
            "pd_scheduler_requests_rejected",
            "Requests answered with an error in place of an instance's answer.",
            ["status", "reason"],
            registry=registry,
        )
        self._queue_seconds = Histogram(
            "pd_scheduler_queue_wait_seconds",
            "Time in the scheduler's queue of requests that had to wait, by how they left it.",
            ["outcome"],
            buckets=SECONDS,
            registry=registry,
        )
        for outcome in QueueOutcome:  # all series exist from the start, so that rate() has a first value
            self._queue_seconds.labels(outcome)
        self._rewrites = Counter(
            "pd_scheduler_rewrites",
            "Requests whose model was chosen by a rule, by the rule's name and the model that they got.",
            ["rule", "model"],
            registry=registry,
        )
        self._picks = LeanHistogram(
            "pd_scheduler_pick_duration_seconds",
            "Time of a pick.",
            ["role"],
            buckets=_PICK_SECONDS,
            registry=registry,
        )

    def keep_only(self, instances: Collection[str]) -> None:
        """Forget the series of all other instances, which were removed: else they would add up for ever."""
        self._requests.keep("decode", frozenset(instances))
        for each in (self.encodes, self.prefills, self.handoffs, self.decodes, self.instances):
            each.keep_only(instances)

    def forwarded(self, decode: str, served: Served) -> None:
        """Count a request that was sent to a decode instance."""
        self._requests.series(decode, served).inc()
        self.totals.requests += 1

    def rejected(self, status: int, reason: str) -> None:
        """Count a request that the scheduler itself answered with an error."""
        self._rejected.labels(str(status), reason).inc()
        self.totals.requests += 1
        self.totals.errors[reason] += 1

    def rewritten(self, rule: str, model: str) -> None:
        """Count a request that has got a model by a rule."""
        self._rewrites.labels(rule, model).inc()

    def picks(self, role: str) -> Callable[[float], None]:
        """Return what records how long a pick for a role took, in seconds."""
        return self._picks.series(role).observe

    def waited(self, outcome: QueueOutcome, seconds: float) -> None:
        """Record how long a request waited in the scheduler's queue, and how that ended."""
        self._queue_seconds.labels(outcome).observe(seconds)
