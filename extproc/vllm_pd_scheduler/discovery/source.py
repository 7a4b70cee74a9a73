"""What a source of instances is, and how it tells of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from ..models import By, PDInstance
from ..request.objectives import Objectives
from ..request.rewrites import Rewrites
from .membership import Membership


class Report:
    """What one source tells; ``clock`` returns monotonic seconds."""

    def __init__(self, source: str, membership: Membership, clock: Callable[[], float]) -> None:
        self._source = source
        self._membership = membership
        self._clock = clock
        self.first_word = asyncio.Event()
        """Set once something was found, be it that there is nothing."""

    def found(self, instances: Iterable[PDInstance], left_out: Iterable[str] = ()) -> None:
        """Tell the whole set of instances that there are now, and a line for each that is of no use."""
        lines = [f"{self._source}: {line}" for line in left_out]
        self._membership.update(self._source, instances, f"{By.DISCOVERY} {self._source}", lines)
        self.unchanged()
        self.first_word.set()

    def unchanged(self) -> None:
        """Tell that what was told last is so still."""
        self._membership.heard(self._source, self._clock())

    def lost(self, reason: str) -> None:
        """Tell that nothing can be found out, or nothing of use: what was told last stays."""
        self._membership.lost(self._source, reason)


@dataclass(frozen=True, slots=True)
class Beside:
    """What a source may tell of beside instances."""

    objectives: Objectives = field(default_factory=Objectives)
    rewrites: Rewrites = field(default_factory=Rewrites)

    def forget(self, source: str) -> None:
        """Have nothing of a source any more."""
        self.objectives.update(source, {})
        self.rewrites.update(source, ())


class Source(Protocol):
    """Where instances come from."""

    @property
    def name(self) -> str:
        """What operators call it."""
        ...

    async def follow(self, report: Report) -> None:
        """Tell what there is, and each change of it, until this is cancelled.

        Whatever the world does raises nothing: it is reported as lost.
        """
        ...
