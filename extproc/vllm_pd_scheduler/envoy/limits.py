"""What the gRPC services accept: how large a message may be, and which status ends a bad one's stream.

A message's size is known before the message comes, so one that is too large is not taken into memory.
"""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from ..rpc import CallError, StatusCode

MAX_MESSAGE_BYTES = 1 << 20
"""Limit of every message but a request's body. Envoy's largest is the first one of a stream: its ``node``
lists its extensions, 60 KB of them."""

MAX_HEALTH_BYTES = 64 << 10
"""Limit of a health check: it has one name in it."""

MessageType = TypeVar("MessageType", bound=Message)


class BadMessage(CallError):
    """A message is too large or cannot be read. ``code`` is the status that its stream ends with."""


def parse(kind: type[MessageType], data: bytes | None) -> MessageType:
    """Return the message in ``data``; raises :exc:`BadMessage` if it is none, or has not come."""
    try:
        if data is None:
            raise DecodeError
        return kind.FromString(data)
    except DecodeError:
        raise BadMessage(StatusCode.INVALID_ARGUMENT, f"not a {kind.DESCRIPTOR.name}") from None


def check_size(name: str, size: int, limit: int) -> None:
    """Raise :exc:`BadMessage` if a message of ``size`` bytes is over ``limit``."""
    if size > limit:
        reason = f"a {name} of {size} bytes: at most {limit} are read"
        raise BadMessage(StatusCode.RESOURCE_EXHAUSTED, reason)
