"""Who is chosen: a P and a D for each request, by the strategies."""

from .picker import Scheduler

__all__ = ["Scheduler"]
