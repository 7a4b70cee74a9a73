"""What those who watch the fleet are sent: computed once a second for all, and only while somebody does."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..models import PD_ROLES
from ..records.decision import Decision
from ..records.decisions import Decisions
from ..records.events import Events
from ..records.series import Point
from .event_stream import encode

TICK_S = 1.0
"""Seconds between two looks: a choice. People soon see what they have done, and it costs hardly any CPU."""

KEPT_TICKS = 16
"""Seconds that a reader may be behind and still be told the changes alone. The streams cut it off before."""

MAX_EVENTS = 100
"""Events that are sent a second: the newest, as many as a page shows."""

MAX_DECISIONS = 10
"""Decisions that are sent a second: the newest. Nobody reads more, and each costs as much as a pick."""

MAX_RUNNING = 20
"""Decisions of whose requests the end is told when it comes: as many as a page shows."""

Row = Mapping[str, Any]
"""An instance, as far as it is the same until something happens."""


@dataclass(frozen=True, slots=True)
class Look:
    """The fleet at a moment."""

    status: bytes
    """JSON of ``GET /status``."""
    rows: Mapping[str, Row]
    """The instances by id, in their order."""
    ages: Sequence[float | None]
    """Seconds since the last scrape of each. They are never the same, so they are no part of the rows."""
    point: Point | None
    """The newest one."""
    elsewhere: Sequence[dict[str, Any]] = ()
    """The newest decisions of other workers, as the admin interface shows them."""


class LiveFeed:
    """Looks at the fleet for all who watch.

    A reader gets a ``snapshot`` first, and then each second ``changes``: of each instance the fields that are
    others than a second before. When instances came or went, all get a snapshot again.
    """

    def __init__(self, look: Callable[[], Awaitable[Look]], events: Events, decisions: Decisions) -> None:
        self._look_at_fleet = look
        self._events = events
        self._decisions = decisions
        self._listeners: list[Callable[[], None]] = []
        self._ticking: asyncio.Task[None] | None = None
        self._look: Look | None = None
        self._ticks: deque[bytes] = deque(maxlen=KEPT_TICKS)
        self._number = 0
        self._event = self._decision = 0
        """Numbers of the last that were sent."""
        self._running: list[Decision] = []
        self._told_elsewhere: dict[int, bool] = {}
        """Whether the requests of decisions of other workers were over when they were sent, by number."""

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call ``listener`` after each look; return what ends that. Without listeners nobody looks."""
        if not self._listeners:
            self._event, self._decision = self._events.newest, self._decisions.newest
            self._ticking = asyncio.create_task(self._run())
        self._listeners.append(listener)
        return lambda: self._unsubscribe(listener)

    def _unsubscribe(self, listener: Callable[[], None]) -> None:
        self._listeners.remove(listener)
        if not self._listeners and self._ticking is not None:
            self._ticking.cancel()
            self._ticking = self._look = None
            self._ticks.clear()
            self._running.clear()

    def reader(self) -> Callable[[], bytes]:
        """Return what returns that which is new since its last call, for one reader."""
        sent: int | None = None

        def read() -> bytes:
            nonlocal sent
            if self._look is None:
                return b""
            behind = None if sent is None else self._number - sent
            sent = self._number
            if behind is None or behind > len(self._ticks):
                return self._snapshot(self._look)
            return b"".join(list(self._ticks)[len(self._ticks) - behind :])

        return read

    async def _run(self) -> None:
        while True:
            self.tick(await self._look_at_fleet())
            await asyncio.sleep(TICK_S)

    def tick(self, look: Look) -> None:
        """Work out what is new since the last look, and tell the listeners."""
        before, self._look = self._look, look
        if before is not None:
            self._number += 1
            new = (self._changed(before, look), *self._happened(), *self._decided(look))
            self._ticks.append(b"".join(new))
        for listener in tuple(self._listeners):
            listener()

    def _changed(self, before: Look, now: Look) -> bytes:
        if list(before.rows) != list(now.rows):
            return self._snapshot(now)
        changed = [_fresh(before.rows[key], row) for key, row in now.rows.items() if row != before.rows[key]]
        found: dict[str, Any] = {
            "status": msgspec.Raw(now.status),
            "instances": changed,
            "metrics_age_s": now.ages,
        }
        if now.point is not before.point:
            found["point"] = now.point
        return _encode("changes", found)

    def _snapshot(self, look: Look) -> bytes:
        return _encode(
            "snapshot",
            {
                "status": msgspec.Raw(look.status),
                "instances": list(look.rows.values()),
                "metrics_age_s": look.ages,
                "point": look.point,
            },
        )

    def _happened(self) -> Iterator[bytes]:
        if events := self._events.after(self._event)[-MAX_EVENTS:]:
            self._event = events[-1].number
            yield _encode("events", [event.as_json() for event in events])

    def _decided(self, look: Look) -> Iterator[bytes]:
        fresh = self._decisions.after(self._decision)[-MAX_DECISIONS:]
        self._decision = self._decisions.newest
        over = [each for each in self._running if _is_over(each)]
        running = [each for each in (*self._running, *fresh) if not _is_over(each)]
        self._running = running[-MAX_RUNNING:]
        shown = [_brief(self._decisions.as_json(each)) for each in (*over, *fresh)]
        if shown := [*shown, *self._decided_elsewhere(look)]:
            yield _encode("decisions", shown)

    def _decided_elsewhere(self, look: Look) -> list[dict[str, Any]]:
        """Return the decisions of other workers that are new, or whose requests are over now."""
        before, self._told_elsewhere = self._told_elsewhere, {}
        found = []
        for each in look.elsewhere:
            over = each["outcome"] is not None
            self._told_elsewhere[each["number"]] = over
            if before.get(each["number"]) is not over:
                found.append(_brief(each))
        return found


def _is_over(decision: Decision) -> bool:
    return decision.ending is not None or decision.reason is not None


def _brief(decision: dict[str, Any]) -> dict[str, Any]:
    """Return a decision without what a list of them does not show."""
    for role in PD_ROLES:
        if (choice := decision[role]) is not None:
            del choice["candidates"], choice["left_out"]
    return decision


def _fresh(before: Row, now: Row) -> Row:
    """Return the fields that are others than before, and the id."""
    return {key: value for key, value in now.items() if key == "id" or before.get(key) != value}


def _encode(name: str, data: object) -> bytes:
    return encode(msgspec.json.encode(data).decode(), event=name)
