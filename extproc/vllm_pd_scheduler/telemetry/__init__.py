"""The scheduler's own metrics."""

from .metrics import Left, Served, Telemetry

__all__ = ["Left", "Served", "Telemetry"]
