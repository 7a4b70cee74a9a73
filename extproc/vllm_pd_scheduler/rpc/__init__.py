"""A gRPC server on asyncio: calls, their messages and statuses over :mod:`..http2`."""

from .call import Call, Method, Receiver
from .coroutine import ServerStream, served_by
from .server import ListenError, Server
from .status import CallError, StatusCode

__all__ = [
    "Call",
    "CallError",
    "ListenError",
    "Method",
    "Receiver",
    "Server",
    "ServerStream",
    "StatusCode",
    "served_by",
]
