"""Waiting for a condition, in this process or in another."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable

HUNG_S = 120.0
"""Only ends a test that hangs: whatever is waited for comes far sooner, also on a busy machine."""


async def until(condition: Callable[[], Awaitable[object] | object], seconds: float = HUNG_S) -> None:
    """Wait until a condition holds; raise TimeoutError if it does not come to that.

    How long that took is not returned: on a busy machine it says nothing.
    """
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if await found if inspect.isawaitable(found) else found:
                return
            await asyncio.sleep(0.02)
