"""Follows a Docker engine: its containers with our labels are instances."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from ...config import SchedulerConfig
from ...config.sources import DockerSource
from ...models import PDInstance
from ...system.daemon_thread import in_daemon_thread
from ..source import Report
from .containers import Change
from .engine import Engine, EngineAway
from .view import View

log = logging.getLogger(__name__)

LOOK_S = 10.0
"""Seconds between two lists of all containers when no event asks for one."""

SETTLE_S = 0.1
"""Seconds from an event to the list that it asks for: a roll-out makes many."""

SOONEST_S = 1.0
"""Seconds until an engine that was lost is asked again; then twice as long each time, up to ``LOOK_S``."""

OPEN_S = 1.0
"""Seconds in which a stream of events is there, with those of before."""

SHORT_S = 5.0
"""Seconds in which a stream of events that is one does not end."""

STOP_S = 600.0
"""Seconds that a container may take to stop, so that one which does at our start is known."""

WHOLE_S = 30.0
"""Seconds that a whole answer of the engine may take."""

Result = TypeVar("Result")


class DockerContainers:
    """Follows an engine; see :class:`..source.Source`."""

    def __init__(self, source: DockerSource, config: SchedulerConfig) -> None:
        self.name = source.label
        self._source = source
        self._view = View(source, config)
        self._after = f"{time.time() - STOP_S:.9f}"
        self._told: tuple[list[PDInstance], list[str]] | None = None
        self._complaint: str | None = None

    async def follow(self, report: Report) -> None:
        """Tell which containers there are, when that changes and every ``LOOK_S``."""
        pause = SOONEST_S
        while True:
            began = time.monotonic()
            try:
                engine = await _answered(partial(Engine, self._source))
                try:
                    await self._listen(engine, report)
                finally:
                    await in_daemon_thread(engine.close)
            except EngineAway as error:
                report.lost(f"{self.name}: {error}")
            lasted = time.monotonic() - began > LOOK_S
            pause = SOONEST_S if lasted else min(2 * pause, LOOK_S)
            await asyncio.sleep(pause)

    async def _listen(self, engine: Engine, report: Report) -> None:
        """Follow the engine until its events end; raise :exc:`EngineAway`."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def heard(change: Change) -> None:
            self._after = change.after
            if self._view.note(change):
                self._tell(engine, report)  # it drains now, not when the list has come
            news.set()

        def listen() -> None:
            engine.listen(self._after)
            loop.call_soon_threadsafe(news.set)
            for change in engine.changes():
                loop.call_soon_threadsafe(heard, change)

        def ended(listening: asyncio.Future[None]) -> None:
            if not listening.cancelled():
                listening.exception()  # is looked at below, if anybody still looks
            news.set()

        began, listening = loop.time(), in_daemon_thread(listen)
        listening.add_done_callback(ended)
        patience = OPEN_S  # so that who was asked to stop before is known when the first list comes
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await news.wait()
                await asyncio.sleep(SETTLE_S)
            news.clear()
            self._view.listed = await _answered(engine.containers)
            self._tell(engine, report)
            if listening.done():
                break
            patience = LOOK_S
        if loop.time() - began < SHORT_S:  # the SDK makes an end of a refusal
            self._complain(str(listening.exception() or "its events end at once"))

    def _tell(self, engine: Engine, report: Report) -> None:
        try:
            told = self._view.instances(engine.host)
        except ValueError as error:
            report.lost(f"{self.name}: {error}")
            return
        if told is None:  # an event has come before the first list
            return
        if told == self._told:
            report.unchanged()
        else:
            self._told = told
            report.found(*told)

    def _complain(self, reason: str) -> None:
        """Log, once, why changes are seen late."""
        if reason != self._complaint:
            self._complaint = reason
            log.warning("%s: %s; its containers are listed every %g s", self.name, reason, LOOK_S)


async def _answered(ask: Callable[[], Result]) -> Result:
    """Return what an engine answers; raise :exc:`EngineAway` if that takes too long."""
    try:
        async with asyncio.timeout(WHOLE_S):
            return await in_daemon_thread(ask)
    except TimeoutError:
        raise EngineAway(f"no whole answer within {WHOLE_S:g} s") from None
