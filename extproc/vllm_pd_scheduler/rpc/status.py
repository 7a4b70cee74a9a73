"""How a call ends: gRPC's status codes, and the trailers that carry them."""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from urllib.parse import quote_from_bytes

from ..http2.header_block import write_block

MAX_MESSAGE_BYTES = 1000
"""A longer explanation is cut."""

_UNQUOTED = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


class StatusCode(IntEnum):
    """How a call has ended."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class CallError(Exception):
    """Ends a call with a status that is not OK; the message is for the client."""

    def __init__(self, code: StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


_HEADERS = [(b":status", b"200"), (b"content-type", b"application/grpc")]

HEADERS = write_block(_HEADERS)
"""Begins every answer that has messages."""


@cache
def http_error(status: int) -> bytes:
    """Return the whole answer, as a header block, to what is no gRPC call."""
    return write_block([(b":status", str(status).encode())])


def trailers(code: StatusCode, message: str, alone: bool) -> bytes:
    """Return the header block that ends a call; ``alone`` if it is the whole answer."""
    if not message:
        return _without_message(code, alone)
    text = quote_from_bytes(message.encode("utf-8", "replace")[:MAX_MESSAGE_BYTES], safe=_UNQUOTED)
    fields = [(b"grpc-status", str(int(code)).encode()), (b"grpc-message", text.strip().encode())]
    return write_block(_HEADERS + fields if alone else fields)


@cache
def _without_message(code: StatusCode, alone: bool) -> bytes:
    fields = [(b"grpc-status", str(int(code)).encode())]
    return write_block(_HEADERS + fields if alone else fields)
