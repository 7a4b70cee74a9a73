"""Health and metrics of the instances."""

from .monitor import HealthMonitor

__all__ = ["HealthMonitor"]
