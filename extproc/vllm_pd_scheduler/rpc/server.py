"""The gRPC server: where it listens, and its connections from the first to the last."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Mapping

from .call import Method
from .listener import ListenError, bind_port, bind_socket, remove_socket
from .protocol import GrpcProtocol

__all__ = ["ListenError", "Server"]

log = logging.getLogger(__name__)

COMPLAIN_EVERY_S = 10.0
"""A client that sends what is wrong may do so with each call: that is logged at most so often."""

BACKLOG = 512
TLS_HANDSHAKE_S = 10.0


class Server:
    """Serves methods, by their paths, at as many addresses as it is told to listen on."""

    def __init__(self, methods: Mapping[str, Method]) -> None:
        self._methods = {path.encode(): method for path, method in methods.items()}
        self._listeners: list[asyncio.Server] = []
        self._connections: set[GrpcProtocol] = set()
        self._closed = asyncio.Event()
        self._stopping = False
        self._next_complaint = 0.0
        self._socket: tuple[str, int] | None = None
        """Path and inode number."""

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Listen on a TCP port, in clear without TLS; return it: another one for 0.

        Raises :exc:`ListenError`.
        """
        loop = asyncio.get_running_loop()
        if tls is not None:
            tls.set_alpn_protocols(["h2"])
        for listening in await bind_port(host, port):
            self._listeners.append(
                await loop.create_server(
                    self._protocol,
                    sock=listening,
                    backlog=BACKLOG,
                    ssl=tls,
                    ssl_handshake_timeout=TLS_HANDSHAKE_S if tls else None,
                )
            )
            port = listening.getsockname()[1]
        return port

    async def listen_on_socket(self, path: str) -> None:
        """Listen on a Unix socket that only this user can open; raises :exc:`ListenError`.

        One that a process left behind is replaced, one that somebody serves is not.
        """
        loop = asyncio.get_running_loop()
        listening, inode = bind_socket(path)
        self._socket = (path, inode)
        self._listeners.append(await loop.create_unix_server(self._protocol, sock=listening, backlog=BACKLOG))

    def _protocol(self) -> GrpcProtocol:
        return GrpcProtocol(self._methods, self)

    def began(self, connection: GrpcProtocol) -> None:
        """Count a connection."""
        self._connections.add(connection)
        if self._stopping:
            connection.close()

    def ended(self, connection: GrpcProtocol) -> None:
        """Count it no more."""
        self._connections.discard(connection)
        if not self._connections:
            self._closed.set()

    def complain(self, what: str) -> None:
        """Log what a client does wrong."""
        now = asyncio.get_running_loop().time()
        if now >= self._next_complaint:
            self._next_complaint = now + COMPLAIN_EVERY_S
            log.warning("%s", what)

    async def stop(self, grace: float = 0.0) -> None:
        """Take no more calls, let those that run end for ``grace`` seconds, and end all connections."""
        self._stopping = True
        for listener in self._listeners:
            listener.close()
        if self._socket is not None:
            remove_socket(*self._socket)
        for connection in list(self._connections):
            connection.go_away()
        end = asyncio.get_running_loop().time() + grace
        while not all(each.is_idle for each in self._connections):
            if asyncio.get_running_loop().time() >= end:
                break
            await asyncio.sleep(0.01)
        self._closed.clear()
        for connection in list(self._connections):
            connection.close()
        if self._connections:
            await self._closed.wait()
