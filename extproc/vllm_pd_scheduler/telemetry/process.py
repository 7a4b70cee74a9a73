"""How the scheduler's own process is."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram


class Process:
    """Counts what it lacks: time of its event loop, files and ports, somebody who reads what it prints."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._local_errors = Counter(
            "pd_scheduler_local_errors",
            "Requests to instances that could not be sent for a reason of this machine's own.",
            ["kind"],
            registry=registry,
        )
        self._log_lines_dropped = Counter(
            "pd_scheduler_log_lines_dropped",
            "Lines of output that were dropped, since nobody read what the process prints.",
            registry=registry,
        )
        self._event_loop_lag = Histogram(
            "pd_scheduler_event_loop_lag_seconds",
            "How late the event loop came to a timer: what each request waits for it, several times over.",
            # From what a short callback takes up to a stall.
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2),
            registry=registry,
        )
        self._event_loop_stalls = Counter(
            "pd_scheduler_event_loop_stalls",
            "Times that the event loop stood still, and requests went on without the scheduler.",
            registry=registry,
        )

    def local_error(self, kind: str) -> None:
        """Count a request that could not be sent for a reason of our own."""
        self._local_errors.labels(kind).inc()

    def log_lines_dropped(self, lines: int) -> None:
        """Count lines of output that were dropped."""
        self._log_lines_dropped.inc(lines)

    def event_loop_late(self, seconds: float) -> None:
        """Record how late the event loop came to a timer."""
        self._event_loop_lag.observe(seconds)

    def event_loop_stalled(self) -> None:
        """Count that the event loop stood still for so long that requests went on without it."""
        self._event_loop_stalls.inc()
