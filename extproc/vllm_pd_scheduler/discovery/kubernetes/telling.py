"""Tells of the instances that several watches have found together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from ...models import PDInstance
from ..source import Report

JOIN_S = 0.05
"""Seconds between two tellings, at least: what changes meanwhile is told together. After a quiet time a
change is told at once."""


class Telling:
    """Tells a :class:`Report` what ``instances`` returns: ``None`` as long as that is not known."""

    def __init__(self, report: Report, instances: Callable[[], Sequence[PDInstance] | None]) -> None:
        self._report = report
        self._instances = instances
        self._loop = asyncio.get_running_loop()
        self._told: Sequence[PDInstance] | None = None
        self._told_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._problems: dict[Part, str] = {}

    def changed(self) -> None:
        """Tell soon what there is now."""
        if self._timer is None:
            self._timer = self._loop.call_at(self._told_at + JOIN_S, self._tell)

    def alive(self, part: Part) -> None:
        """Note that all is well with a part; if so with all, tell that all is as it was told."""
        self._problems.pop(part, None)
        if self._problems:
            self._tell_lost()
        elif self._told is not None and self._timer is None:
            self._report.unchanged()

    def lost(self, part: Part, reason: str) -> None:
        """Note what is wrong with a part. Of several it is told of the first: they have mostly one cause."""
        self._problems[part] = reason
        self._tell_lost()

    def _tell_lost(self) -> None:
        self._report.lost(next(iter(self._problems.values())))

    def stop(self) -> None:
        """Tell no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _tell(self) -> None:
        self._timer = None
        found = self._instances()
        if found is not None and found != self._told:
            self._told = found
            self._report.found(found)
        self._told_at = self._loop.time()


class Part:
    """One of the watches, as the one that it tells."""

    def __init__(self, telling: Telling) -> None:
        self._telling = telling

    def changed(self) -> None:
        """See :class:`.watch.Watcher`."""
        self._telling.changed()

    def alive(self) -> None:
        """See :class:`.watch.Watcher`."""
        self._telling.alive(self)

    def lost(self, reason: str) -> None:
        """See :class:`.watch.Watcher`."""
        self._telling.lost(self, reason)
