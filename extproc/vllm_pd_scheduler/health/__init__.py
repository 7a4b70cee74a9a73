"""How the instances are: alive, loaded, where, and with which models."""

from .monitor import HealthMonitor
from .pair_log import PairLog
from .state_log import StateLog

__all__ = ["HealthMonitor", "PairLog", "StateLog"]
