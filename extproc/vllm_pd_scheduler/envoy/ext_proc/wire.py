"""Protobuf's wire format, for a field that is so large that it must not be copied more often than needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_VARINT, _LENGTH_DELIMITED = 0, 2


class Field(NamedTuple):
    """Where a field is in its message: its tag, and its content."""

    tag: int
    start: int
    end: int

    def without(self, data: bytes, start: int, end: int) -> bytes:
        """Return the message from ``start`` to ``end`` without this field."""
        return data[start : self.tag] + data[self.end : end]


def find(data: bytes, number: int, at: int, end: int) -> Field | None:
    """Return a length-delimited field of the message from ``at`` to ``end``; ``None`` if it has none."""
    while at < end:
        tag, start = _read_varint(data, at)
        if tag & 7 not in (_VARINT, _LENGTH_DELIMITED):
            return None
        size, start = _read_varint(data, start)
        after = start if tag & 7 == _VARINT else start + size
        if after > end:
            return None
        if tag == number << 3 | _LENGTH_DELIMITED:
            return Field(at, start, after)
        at = after
    return None


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


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at an offset, and where it ends."""
    value = 0
    for shift, byte in zip(range(0, 70, 7), data[at : at + 10], strict=False):
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    return value, at
