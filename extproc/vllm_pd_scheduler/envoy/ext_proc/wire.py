"""Protobuf's wire format, for messages that are too large to parse unseen, or to copy once more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

_MOST_FIELDS = 16
"""How many fields of a message are looked at: the protocol knows ten."""
_VARINT, _LENGTH_DELIMITED = 0, 2
"""Types of fields; a ``ProcessingRequest`` has no others."""


class Field(NamedTuple):
    """Where a field is in its message: its tag, and its content."""

    tag: int
    start: int
    end: int

    def without(self, data: bytes | bytearray, start: int, end: int) -> bytes:
        """Return the message from ``start`` to ``end`` without this field."""
        return bytes(data[start : self.tag] + data[self.end : end])


def find(data: bytes | bytearray, number: int, start: int, end: int) -> Field | None:
    """Return a length-delimited field of the message from ``start`` to ``end``; ``None`` if it has none."""
    at = start
    for _ in range(_MOST_FIELDS):
        tag, content = _read_varint(data, at)
        if at >= end or tag & 7 not in (_VARINT, _LENGTH_DELIMITED):
            return None
        size, content = _read_varint(data, content)
        after = content if tag & 7 == _VARINT else content + size
        if after > end:
            return None
        if tag == number << 3 | _LENGTH_DELIMITED:
            return Field(at, content, after)
        at = after
    return None


def body_size(data: bytes | bytearray) -> int:
    """Return how many bytes of a ``ProcessingRequest`` are a body.

    A body costs no more than its bytes to parse; as many bytes of headers cost a hundred times as much.
    """
    for number in (
        pb.ProcessingRequest.REQUEST_BODY_FIELD_NUMBER,
        pb.ProcessingRequest.RESPONSE_BODY_FIELD_NUMBER,
    ):
        field = find(data, number, 0, len(data))
        if field is not None:
            return field.end - field.start
    return 0


def prefix(numbers: Sequence[int], size: int) -> bytes:
    """Return what comes before ``size`` bytes that are nested in messages, as fields of these numbers.

    What follows another message of the same type, with other fields inside, is merged with it by whoever
    parses both as one.
    """
    written = b""
    for number in reversed(numbers):
        written = _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(written) + size) + written
    return written


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def _read_varint(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """Return the number at an offset, and where it ends; 0 at the end of ``data``."""
    value = shift = 0
    for byte in data[at : at + 10]:
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return value, at
