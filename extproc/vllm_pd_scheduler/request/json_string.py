"""The content of a long JSON string, decoded piece by piece."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from .json_text import STEP_BYTES, Value

_LONGEST_LETTER = len(rb"\ud83d\ude00")
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")

_decode = msgspec.json.Decoder(str).decode


def string_content(string: Value) -> Iterator[bytes]:
    """Yield what a string stands for, as UTF-8, in pieces of up to ``STEP_BYTES``.

    Raises :exc:`msgspec.DecodeError` or :exc:`UnicodeDecodeError` if it stands for nothing: for a lone
    surrogate, say. Without escapes it is not checked.
    """
    at, end = string.start + 1, string.end - 1
    while at < end:
        piece = string.text[at : min(at + STEP_BYTES, end)]
        if at + len(piece) < end:
            piece = piece[: _last_boundary(piece)]
        at += len(piece)
        yield _decode(b'"' + piece + b'"').encode() if b"\\" in piece else piece


def _last_boundary(piece: bytes) -> int:
    """Return how much of a string's text can be decoded alone, whatever comes after it."""
    escape = piece.rfind(b"\\", -_LONGEST_LETTER)
    if escape >= 0 and _begins_escape(piece, escape):
        high = escape - len(rb"\ud83d")
        if _HIGH_SURROGATE.fullmatch(piece, high, escape) and _begins_escape(piece, high):
            return high
        return escape
    last = len(piece) - 1
    while piece[last] & 0xC0 == 0x80 and last > len(piece) - 4:
        last -= 1
    return last if piece[last] >= 0xC0 else len(piece)


def _begins_escape(piece: bytes, at: int) -> bool:
    """Whether the backslash at ``at`` is not itself escaped."""
    return (at + 1 - len(piece[: at + 1].rstrip(b"\\"))) & 1 == 1
