"""The scheduler's own metrics."""

from .metrics import QueueOutcome, Served, Telemetry

__all__ = ["QueueOutcome", "Served", "Telemetry"]
