"""Several schedulers for one fleet that choose as one would: each tells the others what it does."""

from .message import Disbelieved, FleetKey, Ignored
from .replica import BATCH_S, SILENT_S, SUMMARY_S, Replica

__all__ = ["BATCH_S", "SILENT_S", "SUMMARY_S", "Disbelieved", "FleetKey", "Ignored", "Replica"]
