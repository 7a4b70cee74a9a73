"""The content of a chat, as bytes.

What vLLM would tokenise alike gives the same bytes here. They come in the order that chat templates use: the
tools, then each message. Nothing closes them, so that the next turn's begin with this one's.

Values of up to ``AT_ONCE_BYTES`` are decoded. Longer text is decoded piece by piece, with the same result;
what else is so long counts as it is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from xxhash import xxh3_64

from .api import RESPONSES
from .body import JsonBody
from .json_text import AT_ONCE_BYTES, JsonText, Malformed, Steps, Value
from .pieces import Pieces, as_written, text_content

MEDIA_BYTES = 4096
"""What an image, audio or video part counts for: about 1,000 tokens, as of an image of a megapixel."""

MAX_ITEMS = 10_000
"""Messages of a chat, or parts of one message, that are looked at when they are many and long."""

MAX_MEDIA = 256
"""Images, audio and video parts that are looked at: what follows the last counts for nothing."""

# Marks in a chat's stream are bytes that UTF-8 never has. A fixed-length digest follows _MEDIA.
_MESSAGE, _NAME, _TOOL_CALLS, _TOOL_CALL_ID, _CONTENT = b"\xff", b"\xfe", b"\xfd", b"\xfc", b"\xfb"
_TOOLS, _MEDIA = b"\xfa", b"\xf9"
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA_PADDING = bytes(MEDIA_BYTES - len(_MEDIA) - 8)


class _Message(msgspec.Struct):
    role: str
    content: str | list[Any] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None


class _Item(msgspec.Struct):
    """A message of a response, or what was called in it and has come of that."""

    role: str = ""
    content: str | list[Any] | None = None
    name: str | None = None
    call_id: str | None = None
    arguments: str | None = None
    output: str | list[Any] | None = None


_decode = msgspec.json.decode
_decode_messages = msgspec.json.Decoder(list[_Message]).decode
_decode_item = msgspec.json.Decoder(_Item).decode
_decode_message = msgspec.json.Decoder(_Message).decode
_encode = msgspec.json.Encoder(order="deterministic").encode


def chat_content(body: JsonBody) -> Pieces:
    """Yield the content of a request that is a conversation."""
    media = 0
    for piece in _stream(body):
        if piece and piece.startswith(_MEDIA):
            media += 1
            if media > MAX_MEDIA:
                return
        yield piece


def _stream(body: JsonBody) -> Pieces:
    if tools := _loaded(body.value("tools")):
        yield _TOOLS
        yield from _canonical(tools)
    for key in body.api.prompt[:-1]:  # what stands before the conversation
        yield from _said(b"system", body.value(key))
    messages = body.value(body.api.prompt[-1])
    if body.api is RESPONSES and messages is not None:
        yield from _input(messages)
        return
    if messages is None or messages.size <= AT_ONCE_BYTES:
        for message in _decode_messages(messages.copy() if messages else b""):
            yield from _message(message)
        return
    for element in _elements(messages):
        if element is None:
            yield None
        elif element.size <= AT_ONCE_BYTES:
            yield from _message(_decode_message(element.copy()))
        else:
            yield from _long_message(element)


def _input(given: Value) -> Pieces:
    """Yield the input of a response: a text, or items."""
    if given.first == b'"':
        yield from _said(b"user", given)
        return
    for element in _elements(given):
        if element is None:
            yield None
        elif element.size <= AT_ONCE_BYTES:
            yield from _item(_decode_item(element.copy()))
        elif element.first == b"{":
            yield _MESSAGE
            yield from as_written(element)
        else:
            raise Malformed("an item of the input is no object")


def _said(role: bytes, given: Value | None) -> Pieces:
    """Yield what somebody has said, if anything: a text, or parts."""
    content = _loaded(given)
    if not content:
        return
    if not isinstance(content, str | list | Value):
        raise Malformed("neither a text nor parts")
    yield _MESSAGE + role
    yield _CONTENT
    yield from _contents(content)


def _item(item: _Item) -> Pieces:
    yield _MESSAGE + item.role.encode()
    if item.name:
        yield _NAME + item.name.encode()
    if item.call_id:
        yield _TOOL_CALL_ID + item.call_id.encode()
    for content in (item.content, item.arguments, item.output):
        if content:
            yield _CONTENT
            yield from _contents(content)


def _message(message: _Message) -> Pieces:
    yield _MESSAGE + message.role.encode()
    if message.name:
        yield _NAME + message.name.encode()
    if message.tool_calls:
        yield _TOOL_CALLS
        yield from _canonical(message.tool_calls)
    if message.tool_call_id:
        yield _TOOL_CALL_ID + message.tool_call_id.encode()
    if message.content:
        yield _CONTENT
        yield from _contents(message.content)


def _long_message(message: Value) -> Pieces:
    """Yield what :func:`_message` does, of a message that is not decoded as a whole."""
    fields: dict[str, Value] = {}
    for member in JsonText(message.text).members(message.start):
        if member is None:
            yield None
        elif member.key in _Message.__struct_fields__:
            fields[member.key] = member.value
    read = {key: _loaded(value) for key, value in fields.items()}
    long = {key: value for key, value in read.items() if isinstance(value, Value)}
    if not long.keys() <= {"content", "tool_calls"}:
        raise Malformed("a name is too long")
    decoded = msgspec.convert({key: read[key] for key in read.keys() - long.keys()}, _Message)
    for key, value in long.items():
        setattr(decoded, key, value)
    yield from _message(decoded)


def _canonical(value: Any) -> Pieces:
    """Yield a JSON value as it does not depend on how it is written, unless it is too long for that."""
    if not isinstance(value, Value):
        yield _encode(value)
    elif value.first != b"[":
        yield from as_written(value)
    else:
        before = b"["
        for element in _elements(value):
            if element is None:
                yield None
                continue
            yield before
            before = b","
            if element.size <= AT_ONCE_BYTES:
                yield _encode(_decode(element.copy()))
            else:
                yield from as_written(element)
        yield b"]"


def _contents(content: Any) -> Pieces:
    """Yield texts, joined by line breaks as in vLLM's templates for strings; of other parts only a digest."""
    if isinstance(content, str):
        yield content.encode()
    elif isinstance(content, list):
        for number, part in enumerate(content):
            yield from _part(part, number)
    elif content.first == b'"':
        yield from text_content(content)
    elif content.first == b"[":
        number = 0
        for element in _elements(content):
            if element is None:
                yield None
            else:
                yield from _part(_loaded(element), number)
                number += 1
    else:
        raise Malformed("neither a text nor parts")


def _part(part: Any, number: int) -> Pieces:
    text = part
    if isinstance(part, Value):
        text = yield from _long_text(part)
    elif isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS:
        text = part.get("text")
    if isinstance(text, str | Value):
        if number:
            yield b"\n"
        yield from _contents(text)
        return
    digest = xxh3_64()
    if isinstance(part, Value):
        for piece in as_written(part):
            digest.update(piece or b"")
            yield None
    else:
        digest.update(_encode(part))
    yield _MEDIA + digest.digest() + _MEDIA_PADDING


def _long_text(part: Value) -> Steps[str | Value | None]:
    """Return the text of a part that is not decoded as a whole; ``None`` if it is another part."""
    if part.first == b'"':
        return part
    if part.first != b"{":
        return None
    kind: Any = "text"
    text: Any = None
    for member in JsonText(part.text).members(part.start):
        if member is None:
            yield
        elif member.key == "type":
            kind = _loaded(member.value)
        elif member.key == "text":
            text = _loaded(member.value)
    is_text = isinstance(text, str) or (isinstance(text, Value) and text.first == b'"')
    return text if kind in _TEXT_PARTS and is_text else None


def _elements(array: Value) -> Iterator[Value | None]:
    """Yield the first elements of an array that is not decoded as a whole."""
    left = MAX_ITEMS
    for element in JsonText(array.text).elements(array.start):
        yield element
        if element is not None:
            left -= 1
            if not left:
                return


def _loaded(value: Value | None) -> Any:
    """Return what a value stands for or, if its text is long, the text."""
    if value is None or value.size > AT_ONCE_BYTES:
        return value
    return _decode(value.copy())
