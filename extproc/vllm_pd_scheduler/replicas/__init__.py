"""Several schedulers for one fleet that choose as one would: each tells the others what it does."""

from .message import Disbelieved, FleetKey, Ignored
from .replica import AT_ONCE, BATCH_S, SILENT_S, SUMMARY_S, Replica

__all__ = ["AT_ONCE", "BATCH_S", "SILENT_S", "SUMMARY_S", "Disbelieved", "FleetKey", "Ignored", "Replica"]
