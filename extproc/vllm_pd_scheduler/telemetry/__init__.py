"""Prometheus metrics of what happens to requests."""

from .metrics import QueueOutcome, Served, Telemetry

__all__ = ["QueueOutcome", "Served", "Telemetry"]
