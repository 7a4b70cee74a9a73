"""Reads the instances' lists of models again, before a request for an unknown one is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

PAUSE_S = 0.2
"""Seconds between the beginnings of two readings, at least: a choice. Whoever asks all the time for what is
not there has each instance of a small fleet asked so often."""
PATIENCE_S = 1.0
"""Seconds that a request waits for a reading to begin, at most."""
MAX_A_SECOND = 200.0
"""Instances that are asked a second at most; a reading of a fleet that has more is made less often."""
MAX_WAITING = 256
"""Requests that wait for a reading. Further ones are refused by what is known."""


class Rereading:
    """Reads the lists again for whoever calls it, at most once in ``PAUSE_S`` for all of them together.

    ``read`` does it, and raises nothing; without one, nothing is read. ``size`` returns the instances.
    """

    def __init__(self, size: Callable[[], int], clock: Callable[[], float]) -> None:
        self.read: Callable[[], Awaitable[None]] | None = None
        self._size = size
        self._clock = clock
        self._began = float("-inf")
        self._next: asyncio.Task[None] | None = None
        """A reading that has not begun."""
        self._running: set[asyncio.Task[None]] = set()
        self._waiting = 0

    async def __call__(self) -> None:
        """Return after a reading that has begun since the call, or at once if too many wait or are asked."""
        if self.read is None or self._waiting >= MAX_WAITING:
            return
        wait = self._wait()
        if wait > PATIENCE_S:
            return
        reading = self._planned(wait, self.read)
        self._waiting += 1
        try:
            await asyncio.wait({reading})
        finally:
            self._waiting -= 1

    def soon(self) -> None:
        """Have the lists read soon, and do not wait for that."""
        if self.read is not None:
            self._planned(self._wait(), self.read)

    def _wait(self) -> float:
        return self._began + max(PAUSE_S, self._size() / MAX_A_SECOND) - self._clock()

    def _planned(self, wait: float, read: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Return the next reading, which begins after ``wait`` seconds if it was not planned before."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._after(wait, read))
            self._running.add(self._next)
            self._next.add_done_callback(self._running.discard)
        return self._next

    async def _after(self, seconds: float, read: Callable[[], Awaitable[None]]) -> None:
        if seconds > 0:
            await asyncio.sleep(seconds)
        self._began, self._next = self._clock(), None
        await read()

    async def close(self) -> None:
        """End all readings."""
        self.read = None
        for each in self._running:
            each.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
