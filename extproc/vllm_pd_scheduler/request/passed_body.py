"""What is read of the body of a request that is not split: whether it asks for a stream, and the model."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from .body import UNREADABLE, means_true
from .fields import DECODED_BYTES
from .json_text import AT_ONCE_BYTES, BOM, JsonText, Malformed, Steps, TooDeep, TooMany


class _Stream(msgspec.Struct):
    stream: Any = None


class _Named(msgspec.Struct):
    model: Any = None


_decode_stream = msgspec.json.Decoder(_Stream).decode
_decode_named = msgspec.json.Decoder(_Named).decode


def asks_for_stream(body: bytes) -> Steps[bool]:
    """Return whether a body of any kind is a JSON object that asks for a stream of events."""
    try:
        if len(body) <= AT_ONCE_BYTES:
            return b"stream" in body and means_true(_decode_stream(body).stream)
        text, found = JsonText(body), False
        brace = yield from text.space(len(BOM) if body.startswith(BOM) else 0)
        if body[brace : brace + 1] != b"{":
            return False
        for member in text.members(brace):
            if member is None:
                yield
            elif member.key == "stream":
                short = member.value.size <= DECODED_BYTES
                found = short and means_true(json.loads(member.value.copy()))
    except (Malformed, TooMany, TooDeep, *UNREADABLE):
        return False  # the instance's to refuse
    return found


def named_model(body: bytes) -> Steps[str | None]:
    """Return the model that a body of any kind names; ``None`` if it is no JSON object, or names none."""
    name: Any = None
    try:
        if len(body) <= AT_ONCE_BYTES:
            name = _decode_named(body).model
        else:
            text = JsonText(body)
            brace = yield from text.space(len(BOM) if body.startswith(BOM) else 0)
            for member in text.members(brace) if body[brace : brace + 1] == b"{" else ():
                if member is None:
                    yield
                elif member.key == "model":
                    name = json.loads(member.value.copy()) if member.value.size <= DECODED_BYTES else None
    except (Malformed, TooMany, TooDeep, *UNREADABLE):
        return None  # the instance's to refuse
    return name if isinstance(name, str) else None
