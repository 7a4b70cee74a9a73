"""Prometheus metrics of what happens to requests."""

from .metrics import Ending, QueueOutcome, Served, Stray, Telemetry

__all__ = ["Ending", "QueueOutcome", "Served", "Stray", "Telemetry"]
