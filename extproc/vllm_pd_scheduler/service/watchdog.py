"""Notices from outside of the event loop that it stands still, and says where."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable

log = logging.getLogger(__name__)

LIMIT_S = 2.0
"""How late the loop may be. A body of 64 MiB takes less than a second of it."""

_TICK_S = 0.25


class LoopWatchdog:
    """A thread that watches the running event loop, from ``start`` to ``stop``.

    A loop that stands still answers none of Envoy's pings, so Envoy lets the requests pass without us, also
    those in flight. ``stalled`` is called once each time, by the thread. ``late`` is told some times a
    second, by the loop, how many seconds late it is.
    """

    def __init__(self, stalled: Callable[[], None], late: Callable[[float], None]) -> None:
        self._stalled = stalled
        self._late = late
        self._due = 0.0
        self._beats = 0
        self._timer: asyncio.TimerHandle | None = None
        self._watched = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Watch the loop that runs here."""
        self._watched = threading.get_ident()
        self._next_beat()
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        self._beats += 1
        self._late(max(0.0, asyncio.get_running_loop().time() - self._due))
        self._next_beat()

    def _next_beat(self) -> None:
        loop = asyncio.get_running_loop()
        self._due = loop.time() + _TICK_S / 2
        self._timer = loop.call_at(self._due, self._beat)

    def _watch(self) -> None:
        beats, late, last = self._beats, 0.0, time.monotonic()
        while not self._stop.wait(_TICK_S):
            now = time.monotonic()
            # A machine that slept, or a process that was stopped, says nothing about the loop.
            passed, last = min(now - last, 2 * _TICK_S), now
            if self._beats != beats:
                if late > LIMIT_S:
                    log.warning("the event loop runs again, after %.1f s", late)
                beats, late = self._beats, 0.0
                continue
            if late <= LIMIT_S < late + passed:
                self._stalled()
                log.error(
                    "the event loop stands still for %g s, in %s: requests go on without the scheduler",
                    LIMIT_S,
                    self._place(),
                )
            late += passed

    def _place(self) -> str:
        """Where the loop's thread is now."""
        frame = sys._current_frames().get(self._watched)
        if frame is None:
            return "no Python code"
        last = traceback.extract_stack(frame)[-1]
        return f"{last.name} ({last.filename}:{last.lineno})"
