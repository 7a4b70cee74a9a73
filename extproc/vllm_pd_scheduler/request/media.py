"""Images, video and audio in the messages of a request: where each stands in the body, undecoded.

Their bytes go to an encode instance as they stand, so that it and P read exactly the same item. What is not
found here (a type written with escapes, an item inside a tool's result) is encoded by P, as all of it is
without encode instances.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from .api import CHAT, MESSAGES, Api
from .body import JsonBody
from .json_text import AT_ONCE_BYTES, JsonText, Malformed, Steps, TooDeep, TooMany, Value

MAX_ITEMS = 256
"""Items of one request that are found: vLLM takes far fewer by default."""

MAX_LOOKED_AT = 10_000
"""Messages and parts of messages that are looked at."""

_TYPES: Final = {
    CHAT: frozenset({"image_url", "video_url", "audio_url", "input_audio"}),
    MESSAGES: frozenset({"image"}),
}
"""What ``type`` of a part says, by API."""
_MARKS: Final = {CHAT: (b'_url"', b'input_audio"'), MESSAGES: (b'image"',)}
"""One of these is in each body that has an item."""
_LONGEST_MARK = 16
_SEARCH_BYTES = 1 << 17
_CHUNK_BYTES = 1 << 16
_LONGEST_TYPE = 64
_NAMES: Final = {b'"%s"' % name.encode(): name for names in _TYPES.values() for name in names}


class MediaItem(NamedTuple):
    """One item, as the part of a message that it is."""

    key: int
    """By which the same text is known again, in this process."""
    part: Value


def media_items(body: JsonBody) -> Steps[list[MediaItem]]:
    """Return the items of a chat, each once, in steps; none of what is malformed, which P will refuse."""
    messages = body.value("messages") if body.api in _TYPES else None
    if messages is None or messages.first != b"[" or not (yield from _has_mark(messages, body.api)):
        return []
    found: dict[int, MediaItem] = {}
    text, left = JsonText(messages.text), MAX_LOOKED_AT
    try:
        for message in text.elements(messages.start):
            if message is None:
                yield
                continue
            left -= 1
            content = yield from _member(text, message, "content")
            if content is None or content.first != b"[":
                continue
            for part in text.elements(content.start):
                if part is None:
                    yield
                    continue
                left -= 1
                if left < 0 or len(found) == MAX_ITEMS:
                    return list(found.values())
                if (yield from _is_media(text, part, body.api)):
                    key = yield from _key(part)
                    found.setdefault(key, MediaItem(key, part))
            if left < 0:
                break
    except (Malformed, TooDeep, TooMany):
        return []
    return list(found.values())


def _has_mark(value: Value, api: Api) -> Steps[bool]:
    """Whether it is worth while to look at what the messages say: a search at the speed of memory."""
    for start in range(value.start, value.end, _SEARCH_BYTES):
        stop = min(start + _SEARCH_BYTES + _LONGEST_MARK, value.end)
        if any(value.text.find(mark, start, stop) >= 0 for mark in _MARKS[api]):
            return True
        if stop < value.end:
            yield
    return False


def _member(text: JsonText, value: Value, key: str) -> Steps[Value | None]:
    """Return a member of an object: the last of that name, as Python's ``json`` has it."""
    if value.first != b"{":
        return None
    found = None
    for member in text.members(value.start):
        if member is None:
            yield
        elif member.key == key:
            found = member.value
    return found


def _is_media(text: JsonText, part: Value, api: Api) -> Steps[bool]:
    kind = yield from _member(text, part, "type")
    if kind is None or kind.size > _LONGEST_TYPE:
        return False
    return _NAMES.get(kind.copy()) in _TYPES[api]


def _key(part: Value) -> Steps[int]:
    digest = 0
    for start in range(part.start, part.end, _CHUNK_BYTES):
        digest = hash((digest, part.text[start : min(start + _CHUNK_BYTES, part.end)]))
        if part.size > AT_ONCE_BYTES:
            yield
    return digest
