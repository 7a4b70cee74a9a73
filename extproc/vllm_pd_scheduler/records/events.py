"""What has happened to the fleet and the scheduler: each event is a log line, and is remembered a while."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from itertools import islice
from typing import Any

from ..models import By

log = logging.getLogger(__name__)

MAX_EVENTS = 1000
"""How many are remembered: a choice. Days of a calm fleet, and a few hundred kilobytes."""


class EventKind(StrEnum):
    """What an event is about."""

    STARTED = "started"
    DRAINING = "draining"
    """The scheduler ends, and lets running requests end first."""
    STATE = "state"
    """An instance came, went, or is in another state than before."""
    PAIR = "pair"
    """Hand-offs of a P to a D fail or are slow, or are well again."""
    DISCOVERY = "discovery"
    """A source of instances is lost, or back; or it names an instance that clashes with another one."""
    CONFIG = "config"
    """The configuration was read again: what has changed, or why it is refused."""
    STRATEGY = "strategy"
    SHADOW = "shadow"
    QUEUE_FULL = "queue_full"
    LOG_LEVEL = "log_level"
    REPLICAS = "replicas"
    """Another replica came or is silent, or is configured in another way; the connection to them is lost, or
    back."""
    SELF_CHECK = "self_check"
    """A pair of P and D gave a wrong text, or gives right ones again."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has happened."""

    number: int
    """1 for the first since the scheduler was started, unless there are several."""
    time: float
    """Unix seconds."""
    kind: EventKind
    level: int
    """The level of its log line."""
    subject: str | None
    """The id of the instance that it is about; ``None`` if it is about none."""
    text: str
    by: str
    """Who caused it: see :class:`~vllm_pd_scheduler.models.By`."""

    def as_json(self) -> dict[str, Any]:
        """Return the event as the admin interface shows it."""
        return {
            "number": self.number,
            "time": datetime.fromtimestamp(self.time, UTC).isoformat(timespec="milliseconds"),
            "kind": self.kind,
            "level": logging.getLevelName(self.level),
            "subject": self.subject,
            "text": self.text,
            "by": self.by,
        }


class Events:
    """The newest events of one scheduler, at most ``MAX_EVENTS``. ``clock`` returns Unix seconds.

    The numbers of one of ``several`` are as those of :class:`~.decisions.Decisions`.
    """

    def __init__(self, clock: Callable[[], float], several: bool = False) -> None:
        self._clock = clock
        self._several = several
        self.newest = 0
        """The number of the last one; 0 before the first."""
        self._kept: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._listeners: list[Callable[[], None]] = []

    def add(
        self, kind: EventKind, text: str, *, by: str, subject: str | None = None, level: int = logging.INFO
    ) -> None:
        """Log and remember an event, and tell the listeners. The log names an operator who caused it."""
        log.log(level, "%s (by %s)" if by.startswith(By.ADMIN) else "%s%.0s", text, by)
        now = self._clock()
        self.newest = max(self.newest + 1, round(now * 1e6) if self._several else 0)
        self._kept.append(Event(self.newest, now, kind, level, subject, text, by))
        for listener in tuple(self._listeners):
            listener()

    def after(self, number: int) -> list[Event]:
        """Return the events after the one with a number, the oldest first.

        A number that there has not been yet is one from before a restart: all are after that. That of one of
        several may be another's.
        """
        if number > self.newest and not self._several:
            number = 0
        at = bisect_right(self._kept, number, key=lambda each: each.number)
        return list(islice(self._kept, at, None))

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call ``listener`` after each event; return what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)
