"""What values hold, piece by piece, so that no long one is decoded as a whole."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from .json_string import string_content
from .json_text import AT_ONCE_BYTES, Value

CHUNK_BYTES = 1 << 16

Pieces = Iterator[bytes | None]
"""Content, piece by piece. ``None`` is a step, between which other work can be done."""

_decode_text = msgspec.json.Decoder(str).decode


def text_content(string: Value) -> Pieces:
    """Yield what a string says, as UTF-8."""
    if string.size <= AT_ONCE_BYTES:
        yield _decode_text(string.copy()).encode()
        return
    for piece in string_content(string):
        yield piece
        yield None


def as_written(value: Value) -> Pieces:
    """Yield the text of a value."""
    for start in range(value.start, value.end, CHUNK_BYTES):
        yield value.text[start : min(start + CHUNK_BYTES, value.end)]
        if value.size > CHUNK_BYTES:
            yield None
