"""How instances are, as it is found out beside requests."""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter

from .kept import keep_only


class Instances:
    """Counts their states, and what was read or tried there to know of them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._scrape_failures = Counter(
            "pd_scheduler_scrape_failures",
            "Scrapes of an instance's /metrics that failed.",
            ["instance"],
            registry=registry,
        )
        self._state_changes = Counter(
            "pd_scheduler_instance_state_changes",
            "Changes of an instance's state, by the state that it came to; 'trial' follows an ejection.",
            ["instance", "role", "state"],
            registry=registry,
        )
        self._kv_events = Counter(
            "pd_scheduler_kv_event_batches",
            "Batches of KV events of an endpoint: read, lost on the way, or bad.",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self._turns = Counter(
            "pd_scheduler_turns",
            "Instances that were to have another role, by who has asked, and by whether they have it.",
            ["role", "by", "outcome"],
            registry=registry,
        )
        self._self_checks = Counter(
            "pd_scheduler_self_checks",
            "Tries of self-checks, by what came of them.",
            ["result"],
            registry=registry,
        )

    def scrape_failed(self, instance: str) -> None:
        """Count a scrape of an instance's metrics that failed."""
        self._scrape_failures.labels(instance).inc()

    def state_changed(self, instance: str, role: str, state: str) -> None:
        """Count that an instance came to a state."""
        self._state_changes.labels(instance, role, state).inc()

    def kv_event_batches(self, endpoint: str, outcome: str, count: int) -> None:
        """Count batches of KV events; ``outcome`` is ``read``, ``lost`` or ``bad``."""
        self._kv_events.labels(endpoint, outcome).inc(count)

    def turned(self, role: str, by: str, *, done: bool) -> None:
        """Count an instance that was to have another ``role``, as an operator or the advice has asked."""
        self._turns.labels(role, by, "turned" if done else "failed").inc()

    def self_checked(self, result: str) -> None:
        """Count a try of a self-check; ``result`` as in ``docs/metrics.md``."""
        self._self_checks.labels(result).inc()

    def keep_only(self, instances: Collection[str]) -> None:
        """Forget the series of all other instances, which were removed."""
        for metric in (self._scrape_failures, self._state_changes):
            keep_only(metric, "instance", instances)
