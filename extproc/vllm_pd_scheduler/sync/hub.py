"""Where the workers of a machine meet: the parent's Unix socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..rpc.listener import bind_socket, remove_socket
from .channel import START, Position
from .frames import Alive, Append, Appended, Connection, Drained, Frame, Newest, Ready, Told, encode

log = logging.getLogger(__name__)


class Hub:
    """Passes on what each worker says to all others, and keeps the log of operators' changes.

    Of the log it keeps the newest change, which leads to the whole state. A worker that does not read what it
    is sent is cut off; it connects again, and the messages after that mend what it has missed. ``ready`` is
    called with the name of a worker that serves, ``alive`` with that of one that gives a sign of life, and
    ``drained`` with that of one that is drained and waits for :meth:`let_go`.
    """

    def __init__(
        self, ready: Callable[[str], None], alive: Callable[[str], None], drained: Callable[[str], None]
    ) -> None:
        self._ready = ready
        self._alive = alive
        self._drained = drained
        self._connections: set[_Worker] = set()
        self._position: Position = START
        self._newest = b""
        self._count = 0
        self._server: asyncio.Server | None = None
        self._socket: tuple[str, int] | None = None

    async def start(self, path: str) -> None:
        """Listen at a path; raise :exc:`~vllm_pd_scheduler.rpc.ListenError`. Only this user can connect."""
        bound, inode = bind_socket(path)
        self._socket = path, inode
        self._server = await asyncio.get_running_loop().create_unix_server(lambda: _Worker(self), sock=bound)

    async def stop(self) -> None:
        """Stop listening, and close all connections."""
        if self._server is not None:
            self._server.close()
        for each in tuple(self._connections):
            each.close("the parent ends")
        if self._socket is not None:
            remove_socket(*self._socket)

    def connected(self, worker: _Worker) -> None:
        """Take in a connection, and tell it the log."""
        self._connections.add(worker)
        worker.write(encode(Newest(self._position, self._newest)))

    def lost(self, worker: _Worker) -> None:
        """Forget a connection."""
        self._connections.discard(worker)

    def received(self, worker: _Worker, frame: Frame) -> None:
        """Do what a worker asks for."""
        match frame:
            case Told():
                self._tell(encode(frame), worker)
            case Append(call, expected, data):
                worker.write(encode(Appended(call, self._append(expected, data))))
            case Ready(name):
                self._ready(name)
            case Alive(name):
                worker.listens = False
                self._alive(name)
            case Drained(name):
                worker.listens, worker.leaves = False, True
                self._drained(name)
            case _:
                worker.close(f"a worker sends no {type(frame).__name__}")

    def let_go(self) -> None:
        """Let all workers leave that are drained."""
        for each in tuple(self._connections):
            if each.leaves and each.transport is not None:
                each.transport.close()

    def _append(self, expected: Position, data: bytes) -> Position | None:
        if expected != self._position:
            return None
        self._count += 1
        self._position, self._newest = str(self._count), data
        self._tell(encode(Newest(self._position, data)), None)  # the one that asked too, before its answer
        return self._position

    def _tell(self, data: bytes, sender: _Worker | None) -> None:
        for each in tuple(self._connections):
            if each is not sender and each.listens and not each.write(data):
                each.close("it does not read what it is sent")


class _Worker(Connection):
    """The hub's end of a connection."""

    def __init__(self, hub: Hub) -> None:
        super().__init__()
        self._hub = hub
        self.listens = True
        """Whether it is told what the others say: not where it gives signs of life, or waits to leave."""
        self.leaves = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._hub.connected(self)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._hub.lost(self)

    def received(self, frame: Frame) -> None:
        self._hub.received(self, frame)

    def close(self, why: str) -> None:
        if self.transport is None or self.transport.is_closing():
            return  # it is lost: the event loop will say so, when it has read what others have sent
        log.warning("a worker's connection is closed: %s", why)
        super().close(why)
