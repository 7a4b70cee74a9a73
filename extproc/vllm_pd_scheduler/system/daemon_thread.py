"""Work that may block for ever, off the event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def in_daemon_thread(work: Callable[[], Result]) -> asyncio.Future[Result]:
    """Run ``work`` in a thread of its own; return a future of what it returns or raises.

    Unlike those of ``asyncio.to_thread`` the thread is never waited for: the process can end while it blocks.
    """
    outcome: concurrent.futures.Future[Result] = concurrent.futures.Future()
    outcome.set_running_or_notify_cancel()  # it goes on when nobody waits for it any more

    def run() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="blocking", daemon=True).start()
    return asyncio.wrap_future(outcome)
