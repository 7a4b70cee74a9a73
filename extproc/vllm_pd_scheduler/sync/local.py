"""The back end of workers: the parent's hub, over a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

from .channel import (
    APPEND_S,
    MAX_CHANGE_BYTES,
    START,
    UNSURE,
    Change,
    Dropped,
    Listener,
    NotKept,
    Overtaken,
    Position,
    Traffic,
)
from .frames import (
    Alive,
    Append,
    Appended,
    Connection,
    Drained,
    Frame,
    Newest,
    Ready,
    Told,
    encode,
)

RETRY_S = 0.05
"""Pause before the hub is tried again. It ends with the parent, and so do its workers."""

ALIVE_S = 1.0
"""Seconds between two signs of life."""

_UNSURE = UNSURE % "the parent goes on"


class LocalChannel:
    """Implements :class:`~.channel.Channel` by the parent of the workers, which listens at ``path``."""

    def __init__(self, path: str) -> None:
        self.traffic = Traffic()
        self._path = path
        self._problem = "the parent of the workers was not reached yet"
        self._connection: _ToHub | None = None
        self._listener: Listener | None = None
        self._known: Position = START
        self._calls = itertools.count()
        self._asked: dict[int, asyncio.Future[Position | None]] = {}

    @property
    def problem(self) -> str:
        """See :class:`~.channel.Channel`."""
        return self._problem

    def send(self, data: bytes) -> bool:
        """See :class:`~.channel.Channel`."""
        if self._connection is None:
            self.traffic.dropped[Dropped.AWAY] += 1
            return False
        if not self._connection.write(encode(Told(data))):
            self.traffic.dropped[Dropped.SLOW] += 1
            return False
        self.traffic.sent += 1
        self.traffic.sent_bytes += len(data)
        return True

    async def run(self, listener: Listener) -> None:
        """See :class:`~.channel.Channel`."""
        self._listener = listener
        while True:
            closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            try:
                await self._connect(closed)
                self._say("")
                self.traffic.connected += 1
                await closed
                self._say("the parent of the workers has closed the connection: it is made again")
            except OSError as error:
                self._say(f"the parent of the workers cannot be reached: {error.strerror}")
            finally:
                self._disconnect()
            await asyncio.sleep(RETRY_S)

    async def append(self, data: bytes, expected: Position) -> Position:
        """See :class:`~.channel.Channel`."""
        if len(data) > MAX_CHANGE_BYTES:
            raise NotKept(f"it has {len(data)} bytes: at most {MAX_CHANGE_BYTES} can be kept")
        call = next(self._calls)
        answered: asyncio.Future[Position | None] = asyncio.get_running_loop().create_future()
        if self._connection is None or not self._connection.write(encode(Append(call, expected, data))):
            raise NotKept(self._problem or "the parent of the workers does not read")
        self._asked[call] = answered
        try:
            async with asyncio.timeout(APPEND_S):
                position = await answered
        except TimeoutError:
            raise NotKept(f"the parent of the workers has not answered for {APPEND_S:g} s{_UNSURE}") from None
        finally:
            self._asked.pop(call, None)
        if position is None:
            raise Overtaken
        return position

    async def _connect(self, closed: asyncio.Future[None]) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: _ToHub(self, closed), self._path)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close("")
            self._connection = None
        for each in self._asked.values():
            if not each.done():
                each.set_exception(NotKept(f"the connection to the parent of the workers was lost{_UNSURE}"))

    def _say(self, problem: str) -> None:
        if problem != self._problem and self._listener is not None:
            self._problem = problem
            self._listener.connection(problem)

    def connected(self, connection: _ToHub) -> None:
        """Use a connection from now on."""
        self._connection = connection

    def received(self, frame: Frame) -> None:
        """Take a frame of the hub."""
        assert self._listener is not None
        match frame:
            case Told(data):
                self.traffic.received += 1
                self.traffic.received_bytes += len(data)
                self._listener.received(data)
            case Newest(position, data):
                if position != self._known:
                    self._known = position
                    self._listener.changed(Change(position, data))
            case Appended(call, position):
                if (answered := self._asked.get(call)) is not None and not answered.done():
                    answered.set_result(position)
            case _:
                pass


class _ToHub(Connection):
    """A worker's end of the connection."""

    def __init__(self, channel: LocalChannel, closed: asyncio.Future[None]) -> None:
        super().__init__()
        self._channel = channel
        self._closed = closed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._channel.connected(self)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if not self._closed.done():
            self._closed.set_result(None)

    def received(self, frame: Frame) -> None:
        self._channel.received(frame)


async def tell_ready(path: str, worker: str) -> None:
    """Tell the hub at a path that a worker serves; raise :exc:`OSError` if it cannot be reached."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(encode(Ready(worker)))
        writer.write_eof()
        await reader.read()  # until it has read all, and closes
    finally:
        writer.close()


async def leave_together(path: str, worker: str) -> None:
    """Tell the hub at a path that a worker is drained, and wait until all are, or the hub is gone."""
    with contextlib.suppress(OSError):
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(encode(Drained(worker)))
            while await reader.read(1 << 16):
                pass
        finally:
            writer.close()


async def tell_alive(path: str, worker: str) -> None:
    """Give the hub at a path signs of a worker's life until this is cancelled: one that hangs gives none."""
    sign = encode(Alive(worker))
    while True:
        try:
            _, writer = await asyncio.open_unix_connection(path)
        except OSError:
            await asyncio.sleep(RETRY_S)
            continue
        try:
            while not writer.is_closing():
                writer.write(sign)
                await asyncio.sleep(ALIVE_S)
        finally:
            writer.close()
