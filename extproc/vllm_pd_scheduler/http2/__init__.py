"""The server's side of HTTP/2 (RFC 9113) as a state machine without I/O: bytes in, events and bytes out."""

from .connection import Connection

__all__ = ["Connection"]
