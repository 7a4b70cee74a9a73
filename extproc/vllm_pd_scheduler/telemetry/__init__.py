"""Prometheus metrics of what happens to requests."""

from .metrics import Telemetry
from .outcomes import Ending, QueueOutcome, Served, Stray

__all__ = ["Ending", "QueueOutcome", "Served", "Stray", "Telemetry"]
