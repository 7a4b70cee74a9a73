"""Calls that a coroutine serves: it reads and writes messages, and its end is the call's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from .call import Call, Method
from .status import CallError, StatusCode

log = logging.getLogger(__name__)


class ServerStream:
    """What a handler has of its call.

    The handler is cancelled when the call is over before it is. It ends the call with a status that is not
    OK by raising :exc:`CallError`.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._message: bytes | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None
        self._writing = False
        self._writer: asyncio.Future[None] | None = None

    @property
    def connection(self) -> object:
        """What all calls of one connection have in common."""
        return self._call.connection

    def metadata(self, name: str) -> str | None:
        """Return what the client has sent with the call under this lower-case name."""
        return self._call.metadata(name)

    async def read(self) -> bytes | None:
        """Return the next message; ``None`` after the last one."""
        self._call.next()
        while self._message is None and not self._ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        message, self._message = self._message, None
        return message

    async def write(self, data: bytes) -> None:
        """Send a message; returns when the client's windows have let it go."""
        self._writing, self._writer = True, None
        self._call.write(data)
        if self._writing:
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer


Handler = Callable[[ServerStream], Awaitable[None]]


def served_by(handler: Handler, max_bytes: int) -> Method:
    """Return the method whose calls ``handler`` serves, with messages of at most ``max_bytes``."""
    return Method(lambda call: _Coroutine(call, handler), max_bytes)


class _Coroutine(ServerStream):
    """Runs the handler of one call."""

    def __init__(self, call: Call, handler: Handler) -> None:
        super().__init__(call)
        self._task = asyncio.get_running_loop().create_task(self._run(handler))

    async def _run(self, handler: Handler) -> None:
        try:
            await handler(self)
        except CallError as error:
            self._call.finish(error.code, str(error))
        except Exception as error:
            log.exception("a call could not be served")
            self._call.finish(StatusCode.INTERNAL, type(error).__name__)
        else:
            self._call.finish()

    def accepts(self, size: int) -> bool:
        return True

    def message(self, data: bytes | bytearray) -> None:
        self._message = bytes(data)
        self._wake(self._waiter)

    def half_closed(self) -> None:
        self._ended = True
        self._wake(self._waiter)

    def written(self) -> None:
        self._writing = False
        self._wake(self._writer)

    def cancelled(self) -> None:
        self._task.cancel()

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
