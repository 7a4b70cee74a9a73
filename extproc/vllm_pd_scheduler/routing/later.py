"""Calls that are made after a while, in the running event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

Later = Callable[[float, Callable[[], None]], object]
"""Calls something after so many seconds."""


def in_this_loop(delay: float, call: Callable[[], None]) -> object:
    """Call something in the running event loop after ``delay`` seconds.

    A script that uses the library has no loop between its calls: nothing is told later there.
    """
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop().call_later(delay, call)
    return None
