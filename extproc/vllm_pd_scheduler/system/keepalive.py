"""TCP connections that end when their peer has vanished without a word: its machine lost power, say."""

from __future__ import annotations

import socket
from typing import Any

_OPTIONS = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 12_000}
"""As Envoy's connections to instances have them: such a peer is found in 13 s if the connection is silent,
and in 12 s (here in ms) if something was sent to it."""


def keep_alive(connection: socket.socket) -> None:
    """Have the operating system look after a connection's peer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _OPTIONS.items():
        if hasattr(socket, name):  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def keepalive_socket(address: tuple[Any, ...]) -> socket.socket:
    """Return a socket for an address as ``getaddrinfo`` gives it; a ``socket_factory`` of aiohttp's."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    keep_alive(made)
    return made
