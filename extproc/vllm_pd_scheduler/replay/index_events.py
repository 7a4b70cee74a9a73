"""What our own schedulers are told of prefix caches by KV events, as ``kv_events`` has it configured."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..kv_events.cached import Cached
from ..sim.virtual import VirtualClock
from .schedulers import OneScheduler

DELAY_S = 0.01
"""From what an engine does to what the index knows of it: a choice. Batches are published at each step, and
read in a thread."""


class IndexEvents:
    """Corrects the prefix index of each scheduler by what all engines tell, a little later.

    As in a real fleet, a block is known by its name once a P has answered a request with it: of what only
    other routers send, nothing is known.
    """

    def __init__(self, clock: VirtualClock, schedulers: Sequence[OneScheduler]) -> None:
        self._clock = clock
        self._cached = [(one, Cached()) for one in schedulers]

    def happened(self, instance: str, changes: list[tuple[int, bool]], at: float) -> None:
        """Take what an instance has cached (True) or evicted (False) at a time."""
        when = max(self._clock.now, at + DELAY_S)
        self._clock.call_at(when, partial(self._tell, instance, list(changes)))

    def _tell(self, instance: str, changes: list[tuple[int, bool]]) -> None:
        for one, cached in self._cached:
            cached.tell(one.registry.get(instance), changes)

    def answered(self, scheduler: OneScheduler, blocks: Sequence[int]) -> None:
        """Take it that a P has told which tokens a prompt has."""
        for one, cached in self._cached:
            if one is scheduler:
                cached.link((block, block) for block in blocks)
