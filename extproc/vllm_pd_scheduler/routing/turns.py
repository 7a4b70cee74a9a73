"""Turns in which long work is done, so that the event loop does other things in between."""

from __future__ import annotations

import asyncio

from ..request.json_text import Steps, T


class Turns:
    """Does one step of one piece of work, then whatever else the loop has to do, then the next one's."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def take(self, steps: Steps[T]) -> T:
        """Return the result of ``steps``. What has only one is done at once."""
        try:
            next(steps)
            while True:
                async with self._turn:
                    await asyncio.sleep(0)
                    next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
