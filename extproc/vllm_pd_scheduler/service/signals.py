"""Waits for the signals that end the process, or ask it for something."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable

from ..envoy.process import EnvoyProcess
from ..system.terminal import has_terminal

log = logging.getLogger(__name__)


class Signals:
    """Waits for the signals that end the process.

    The first SIGTERM or SIGINT (Ctrl-C) asks for a drain. One after that ends the drain. SIGHUP calls
    ``hang_up``. From a terminal that is closed, which may send it more than once, and without ``hang_up``, it
    asks for a drain.
    """

    def __init__(self, hang_up: Callable[[], None] | None) -> None:
        self._hang_up = hang_up
        self._had_terminal = has_terminal()
        self._drain = asyncio.Event()
        self._end = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._receive)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
            loop.add_signal_handler(signal.SIGHUP, self._receive_hangup)

    def _receive(self) -> None:
        if self._drain.is_set():
            self._end.set()
        else:
            self._drain.set()

    def _receive_hangup(self) -> None:
        closed = self._had_terminal and not has_terminal()
        if closed or self._hang_up is None:
            self._drain.set()
        else:
            self._hang_up()

    async def wait(self) -> None:
        """Wait until a drain is asked for."""
        await self._drain.wait()

    async def run_drain(self, drain: Awaitable[object]) -> None:
        """Run a drain until it is done or a signal ends it."""
        draining: asyncio.Future[object] = asyncio.ensure_future(drain)
        end: asyncio.Future[object] = asyncio.ensure_future(self._end.wait())
        _, pending = await asyncio.wait({draining, end}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()


async def until_asked(signals: Signals, envoy: EnvoyProcess) -> bool:
    """Wait until a signal asks for a drain; return ``False`` if Envoy has ended before."""
    signal_came: asyncio.Future[object] = asyncio.ensure_future(signals.wait())
    envoy_ended: asyncio.Future[object] = asyncio.ensure_future(asyncio.shield(envoy.exited))
    await asyncio.wait({signal_came, envoy_ended}, return_when=asyncio.FIRST_COMPLETED)
    envoy_ended.cancel()
    if not envoy.exited.done():
        return True
    signal_came.cancel()
    log.error("Envoy ended with status %d: ending too", envoy.exited.result())
    return False
