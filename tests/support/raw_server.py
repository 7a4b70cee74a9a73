"""A server whose connections a test plays by hand, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.waiting import HUNG_S


class Peer:
    """The server's end of one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._unread = b""

    async def request(self) -> bytes:
        """Return the next request, head and body."""
        async with asyncio.timeout(HUNG_S):
            while b"\r\n\r\n" not in self._unread:
                await self._more()
            head, _, _ = self._unread.partition(b"\r\n\r\n")
            found = re.search(rb"content-length: (\d+)", head)
            assert found is not None
            size = len(head) + 4 + int(found[1])
            while len(self._unread) < size:
                await self._more()
        request, self._unread = self._unread[:size], self._unread[size:]
        return request

    async def _more(self) -> None:
        data = await asyncio.get_running_loop().sock_recv(self.connection, 1 << 16)
        assert data, "the client has closed the connection"
        self._unread += data

    async def say(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.connection, data)

    async def ended(self) -> bool:
        """Wait for the client's next bytes; return whether it has ended the connection instead."""
        async with asyncio.timeout(HUNG_S):
            try:
                return not await asyncio.get_running_loop().sock_recv(self.connection, 1 << 16)
            except ConnectionResetError:
                return True

    def close(self) -> None:
        """Send a FIN at once; an RST if there is something that was not read."""
        self.connection.close()

    def reset(self) -> None:
        """Send an RST at once."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


class RawServer:
    """Takes connections in the order in which they come."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.peers: list[Peer] = []

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def to(self) -> tuple[str, None]:
        host = str(self._listener.getsockname()[0])
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}", None

    async def accept(self) -> Peer:
        """Wait for the next connection."""
        async with asyncio.timeout(HUNG_S):
            connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        connection.setblocking(False)
        self.peers.append(Peer(connection))
        return self.peers[-1]


@asynccontextmanager
async def raw_server(host: str = "127.0.0.1") -> AsyncIterator[RawServer]:
    """A server on an unused port; its connections are closed at the end of the block."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((host, 0), family=family))
        listener.setblocking(False)
        server = RawServer(listener)
        try:
            yield server
        finally:
            for peer in server.peers:
                peer.close()
