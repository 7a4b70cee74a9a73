"""Protobuf's wire format, for messages that are too large to parse unseen, or to copy once more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

_MOST_FIELDS = 16
"""How many fields of a message are looked at: the protocol knows ten."""
_VARINT, _LENGTH_DELIMITED = 0, 2
"""Types of fields; a ``ProcessingRequest`` has no others."""

_RESPONSE_BODY = bytes((pb.ProcessingRequest.RESPONSE_BODY_FIELD_NUMBER << 3 | _LENGTH_DELIMITED,))
_METADATA = pb.ProcessingRequest.METADATA_CONTEXT_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_BODY = pb.HttpBody.BODY_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_END_OF_STREAM = bytes((pb.HttpBody.END_OF_STREAM_FIELD_NUMBER << 3 | _VARINT, 1))
"""As a field of an ``HttpBody`` and, under the same number, of a ``StreamedBodyResponse``."""


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


class BodyPart(NamedTuple):
    """Where a message has a part of a response's body: its ``HttpBody``, and how that goes on."""

    start: int
    end: int
    size: int
    """Bytes of the body."""
    end_of_stream: bool


def response_part(data: bytes | bytearray) -> BodyPart | None:
    """Return where a message has a part of a response's body; ``None`` if it is not seen at a glance.

    It is in what Envoy writes: the part comes first, its bytes before ``end_of_stream``, and after it nothing
    but the stream's metadata.
    """
    if data[:1] != _RESPONSE_BODY:
        return None
    size, start = _read_length(data, 1)
    end = at = start + size
    if end > len(data) or start < 2 or data[start - 1] > 0x7F:
        return None
    if size and data[start] == _BODY:
        size, at = _read_length(data, start + 1)
        at += size
    else:
        size, at = 0, start
    if at != end and (at > end or data[at:end] != _END_OF_STREAM):
        return None
    if end != len(data):
        length, after = _read_length(data, end + 1)
        if data[end] != _METADATA or after + length != len(data):
            return None
    return BodyPart(start, end, size, at != end)


def part_message(
    numbers: Sequence[int], parts: Sequence[bytes | memoryview], last: bool
) -> list[bytes | memoryview]:
    """Return a message that sends these bytes as a part of a body, nested as :func:`prefix` does.

    ``last`` is ``end_of_stream``. Nothing is copied.
    """
    size, end = sum(map(len, parts)), _END_OF_STREAM if last else b""
    before = prefix((pb.StreamedBodyResponse.BODY_FIELD_NUMBER,), size) if size else b""
    return [prefix(numbers, len(before) + size + len(end)) + before, *parts, end]


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


def _read_length(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """Return the number at an offset, as :func:`_read_varint` does; of one or two bytes it is faster."""
    if at + 1 < len(data):
        low, high = data[at], data[at + 1]
        if low < 0x80:
            return low, at + 1
        if high < 0x80:
            return low & 0x7F | high << 7, at + 2
    return _read_varint(data, at)


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
