"""The gRPC server: where it listens, and its connections from the first to the last."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping

from .call import Method
from .listener import ListenError, bind_port, bind_socket, remove_socket
from .protocol import GrpcProtocol

__all__ = ["ListenError", "Server"]

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
        return GrpcProtocol(self._methods, self._began, self._ended)

    def _began(self, protocol: GrpcProtocol) -> None:
        self._connections.add(protocol)
        if self._stopping:
            protocol.close()

    def _ended(self, protocol: GrpcProtocol) -> None:
        self._connections.discard(protocol)
        if not self._connections:
            self._closed.set()

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
