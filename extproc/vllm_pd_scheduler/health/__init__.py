"""How the instances are: alive, loaded, where, and with which models."""

from .monitor import HealthMonitor
from .state_log import StateLog

__all__ = ["HealthMonitor", "StateLog"]
