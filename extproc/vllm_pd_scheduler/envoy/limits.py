"""What the gRPC services accept: how large a message may be, and which status ends a bad one's stream.

gRPC has one limit for all methods of a server, and ext_proc needs it as large as a request's body. So each
service looks at a message's size itself before it parses it: parsing costs many times the bytes.
"""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

MAX_MESSAGE_BYTES = 1 << 20
"""Limit of every message but a request's body. Envoy's largest is the first one of a stream: its ``node``
lists its extensions, 60 KB of them."""

MAX_HEALTH_BYTES = 64 << 10
"""Limit of a health check: it has one name in it."""

MessageType = TypeVar("MessageType", bound=Message)


class BadMessage(Exception):
    """A message is too large or cannot be read. ``code`` is the status that its stream ends with."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code

    async def end(self, context: Any) -> NoReturn:
        """End the call with this status, by the exception that ``context.abort`` raises."""
        await context.abort(self.code, str(self))
        raise AssertionError("abort raises")


def parse(kind: type[MessageType], data: bytes, limit: int = MAX_MESSAGE_BYTES) -> MessageType:
    """Return the message in ``data``; raises :exc:`BadMessage` before it parses more than ``limit`` bytes."""
    check_size(kind.DESCRIPTOR.name, len(data), limit)
    try:
        return kind.FromString(data)
    except DecodeError:
        raise BadMessage(grpc.StatusCode.INVALID_ARGUMENT, f"not a {kind.DESCRIPTOR.name}") from None


def check_size(name: str, size: int, limit: int) -> None:
    """Raise :exc:`BadMessage` if a message of ``size`` bytes is over ``limit``."""
    if size > limit:
        reason = f"a {name} of {size} bytes: at most {limit} are read"
        raise BadMessage(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
