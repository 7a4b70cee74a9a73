"""The fields that carry hand-offs: found in a client's body in any spelling, at any depth, and cut out.

They are ours to set: a client's own can crash an engine. It is cut out of the bytes, so that all else
stays as the client wrote it, and in steps, so that a body that is full of it stops nothing.
"""

from __future__ import annotations

import re
from typing import Final

from .errors import BodyError
from .json_text import STEP_BYTES, JsonText, Malformed, Steps

HANDOFF_KEY: Final = "kv_transfer_params"
"""Where a prompt's KV cache is."""

ENCODED_KEY: Final = "ec_transfer_params"
"""Where encoded images, video and audio are."""

MAX_CUTS = 1000
"""Places at which one body may have one of them."""

_KEYS = (HANDOFF_KEY.encode(), ENCODED_KEY.encode())
_NAME = b"_transfer_params"
"""What both have in common: one search finds either."""
# Letters of the name can be written as \u escapes, with hex digits of either case; all are ASCII.
_ESCAPED_LETTER = re.compile(rb"\\u00(?:5[fF]|6[1356bBdDeE]|7[02346])")
_SPELLED_NAME = re.compile(
    b"(?:"
    + b"|".join(b"".join(b"(?:%c|\\\\u00(?i:%x))" % (letter, letter) for letter in key) for key in _KEYS)
    + b")"
)
_SPELLED_STRING = re.compile(b'"' + _SPELLED_NAME.pattern + b'"')
_LONGEST_SPELLING = len(rb'"\u0000"') * len(_KEYS[0])
_SEARCH_BYTES = 1 << 17
"""Bytes between two steps of a search that runs at the speed of memory."""
_LOOK_BACK_BYTES = 4096

_REFUSAL = f"The request body names {HANDOFF_KEY!r} or {ENCODED_KEY!r}, which only the router sets."


def is_suspect(body: bytes) -> bool:
    """Whether a name, or a letter of it as an escape, is in ``body``; if not, neither key is there."""
    return _NAME in body or _ESCAPED_LETTER.search(body) is not None


def refuse_name(body: bytes) -> Steps[None]:
    """Raise :exc:`.errors.BodyError` if a name is in text that is no JSON, in any spelling."""
    at = yield from _first_suspect(body)
    if (yield from _search(_SPELLED_NAME, JsonText(body), at)) is not None:
        raise BodyError(_REFUSAL)


def without_key(body: bytes) -> Steps[bytes]:
    """Return JSON text without the keys and their values; the same object if it has none.

    Raises :exc:`.errors.BodyError` for text that is no JSON where the key stands, or has it too often, and
    :exc:`.json_text.TooDeep`.
    """
    kept: list[tuple[int, int]] = []
    text = JsonText(body)
    at = yield from _first_suspect(body)
    begin = cuts = 0
    try:
        while (found := (yield from _next_key(text, at))) is not None:
            cuts += 1
            if cuts > MAX_CUTS:
                raise BodyError(f"The request body has hand-offs in more than {MAX_CUTS} places.")
            start, value = found
            value = yield from text.space(value)
            end = yield from text.skip(value)
            at = yield from text.space(end)
            kept.append((begin, start))
            if body[at : at + 1] == b",":
                at = yield from text.space(at + 1)
            else:
                _drop_comma(body, kept)
            begin = at
    except Malformed:
        raise BodyError(_REFUSAL) from None
    if not cuts:
        return body
    kept.append((begin, len(body)))
    view = memoryview(body)
    clean = b"".join([view[start:end] for start, end in kept])
    # The neighbours of a member that was cut out of JSON cannot make the key anew; those in other text can.
    if (yield from _next_key(JsonText(clean), 0)) is not None:
        raise BodyError(_REFUSAL)
    return clean


def _first_suspect(body: bytes) -> Steps[int]:
    """Return an offset before which the key does not begin: that of the end if it is not there."""
    for start in range(0, len(body), _SEARCH_BYTES):
        stop = start + _SEARCH_BYTES + _LONGEST_SPELLING
        if body.find(_NAME, start, stop) >= 0 or _ESCAPED_LETTER.search(body, start, stop):
            return max(0, start - _LONGEST_SPELLING)
        if stop < len(body):
            yield
    return len(body)


def _search(pattern: re.Pattern[bytes], text: JsonText, at: int) -> Steps[re.Match[bytes] | None]:
    """Return the first match that begins at ``at`` or later."""
    while at < len(text.text):
        stop = min(at + STEP_BYTES + _LONGEST_SPELLING, len(text.text))
        found = pattern.search(text.text, at, stop)
        if text.spend((stop if found is None else found.end()) - at):
            yield
        if found is not None:
            return found
        at += STEP_BYTES
    return None


def _next_key(text: JsonText, at: int) -> Steps[tuple[int, int] | None]:
    """Return where the next key of these names begins, and where what comes after its colon.

    A quote that is not escaped begins a string here: if it ended one, letters would follow a string, and
    that is no JSON.
    """
    while (found := (yield from _search(_SPELLED_STRING, text, at))) is not None:
        at = found.start() + 1
        if not _is_escaped(text.text, found.start()):
            colon = yield from text.space(found.end())
            if text.text[colon : colon + 1] == b":":
                return found.start(), colon + 1
    return None


def _is_escaped(body: bytes, at: int) -> bool:
    """Whether a backslash before ``at`` escapes what is there."""
    before = body[max(0, at - _LOOK_BACK_BYTES) : at]
    backslashes = len(before) - len(before.rstrip(b"\\"))
    if backslashes == _LOOK_BACK_BYTES:
        raise BodyError(_REFUSAL)
    return bool(backslashes & 1)


def _drop_comma(body: bytes, kept: list[tuple[int, int]]) -> None:
    """Shorten what is kept by the comma before a member that was the last of its object."""
    while kept:
        start, end = kept.pop()
        looked_at = max(start, end - _LOOK_BACK_BYTES)
        before = body[looked_at:end].rstrip(b" \t\r\n")
        if before:
            kept.append((start, looked_at + len(before) - before.endswith(b",")))
            return
        if looked_at > start:
            raise BodyError(_REFUSAL)
