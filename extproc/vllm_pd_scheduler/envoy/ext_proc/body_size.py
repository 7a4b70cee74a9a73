"""How much of a message is a body, told from its wire format before it is parsed."""

from __future__ import annotations

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

_FIELDS = pb.ProcessingRequest.DESCRIPTOR.fields_by_name
_BODIES = {_FIELDS[name].number for name in ("request_body", "response_body")}
_MOST_FIELDS = 16
"""How many fields are looked at: the protocol knows ten."""
_VARINT, _LENGTH_DELIMITED = 0, 2
"""Types of fields; a ``ProcessingRequest`` has no others."""


def body_size(data: bytes) -> int:
    """Return how many bytes of a ``ProcessingRequest`` are a body.

    A body costs no more than its bytes to parse; as many bytes of headers cost a hundred times as much.
    """
    at = 0
    for _ in range(_MOST_FIELDS):
        tag, at = _varint(data, at)
        if tag & 7 == _VARINT:
            _, at = _varint(data, at)
        elif tag & 7 == _LENGTH_DELIMITED:
            size, at = _varint(data, at)
            if tag >> 3 in _BODIES:
                return min(size, len(data) - at)
            at += size
        else:
            break
    return 0


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that starts at an offset, and where it ends; 0 at the end of ``data``."""
    value = shift = 0
    for byte in data[at : at + 10]:
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return value, at
