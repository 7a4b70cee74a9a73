"""TCP connections that end when their peer has vanished without a word: its machine lost power, say."""

from __future__ import annotations

import socket
from typing import Any

_OPTIONS = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 15_000}
"""As Envoy's connections to instances have them: 14 s of silence, 15 s (in ms) without an acknowledgement."""


def keepalive_socket(address: tuple[Any, ...]) -> socket.socket:
    """Return a socket for an address as ``getaddrinfo`` gives it; a ``socket_factory`` of aiohttp's."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _OPTIONS.items():
        if hasattr(socket, name):  # Linux has them all
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made
