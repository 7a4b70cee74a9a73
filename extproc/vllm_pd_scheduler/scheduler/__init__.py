"""Chooses a prefill and a decode instance for each request, by strategies."""

from .picker import Scheduler

__all__ = ["Scheduler"]
