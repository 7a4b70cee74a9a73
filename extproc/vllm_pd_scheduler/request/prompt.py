"""What routing may know of a prompt: its size and the hashes of its blocks. Nothing of the text is kept.

What vLLM would tokenise alike should give the same bytes here, and what extends a prompt there should extend
its bytes, so the content is read, not its JSON. A chat becomes a stream in the order that chat templates use:
the tools, then each message. Nothing closes it, so that the next turn's stream starts with this one's.

Values of up to ``AT_ONCE_BYTES`` are decoded. Longer text is decoded piece by piece, with the same result;
what else is so long counts as it is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from xxhash import xxh3_64, xxh3_64_intdigest

from .api import COMPLETIONS, GENERATE, RESPONSES
from .body import AT_ONCE_BYTES, UNREAD, JsonBody
from .json_string import string_content
from .json_text import JsonText, Malformed, Steps, Value

BLOCK_BYTES = 1024
"""Content in a block: about 256 tokens of English text."""

MEDIA_BYTES = 4096
"""What an image, audio or video part counts for: about 1,000 tokens, as of an image of a megapixel."""

MAX_BYTES = 8 << 20
"""Content that is looked at: two million tokens."""

MAX_ITEMS = 10_000
"""Messages of a chat, or parts of one message, that are looked at when they are many and long."""

MAX_MEDIA = 256
"""Images, audio and video parts that are looked at: what follows the last counts for nothing."""

_CHUNK_BYTES = 1 << 16
_HASH_MASK = (1 << 60) - 1

# Marks in a chat's stream are bytes that UTF-8 never has. A fixed-length digest follows _MEDIA.
_MESSAGE, _NAME, _TOOL_CALLS, _TOOL_CALL_ID, _CONTENT = b"\xff", b"\xfe", b"\xfd", b"\xfc", b"\xfb"
_TOOLS, _MEDIA = b"\xfa", b"\xf9"
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA_PADDING = bytes(MEDIA_BYTES - len(_MEDIA) - 8)

Pieces = Iterator[bytes | None]
"""A prompt's content, piece by piece. ``None`` is a step, between which other work can be done."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of one request."""

    size: int
    """Bytes of content, up to about :data:`MAX_BYTES`. Of text, four are about a token; of token ids, six."""
    tokens: int | None
    """Tokens, where the prompt came as token ids."""
    blocks: tuple[int, ...]
    """For each whole block of :data:`BLOCK_BYTES` a hash, below 2**60, of the prompt up to its end."""


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


_NOTHING = Prompt(0, None, ())
_STEP: Final = object()

_decode = msgspec.json.decode
_decode_text = msgspec.json.Decoder(str).decode
_decode_messages = msgspec.json.Decoder(list[_Message]).decode
_decode_item = msgspec.json.Decoder(_Item).decode
_decode_message = msgspec.json.Decoder(_Message).decode
_encode = msgspec.json.Encoder(order="deterministic").encode


def read_prompt(body: JsonBody, key: int = 0) -> Steps[Prompt]:
    """Return what is known of the prompt of a request. ``key``, below 2**64, goes into its blocks' hashes.

    One that is malformed, which vLLM will refuse, has no size and no blocks. Several prompts in a request
    have no blocks.
    """
    try:
        if body.api is not COMPLETIONS and body.api is not GENERATE:
            return (yield from _hashed(body, key, "chat", _chat(body)))
        prompt = body.only_prompt() if body.api is COMPLETIONS else body.value("token_ids")
        if prompt is None:
            return Prompt(min(body.length("prompt"), MAX_BYTES), None, ())
        if prompt.first == b'"' and body.api is COMPLETIONS:
            return (yield from _hashed(body, key, "text", _text(prompt)))
        if prompt.first == b"[":
            tokens = yield from _count_ids(prompt)
            if tokens is not None:
                return (yield from _hashed(body, key, "ids", _ids(prompt), tokens))
            return Prompt(min(prompt.size, MAX_BYTES), None, ())
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass
    return _NOTHING


def _hashed(body: JsonBody, key: int, kind: str, pieces: Pieces, tokens: int | None = None) -> Steps[Prompt]:
    """Chain the hashes of the content's blocks, as it comes: no more than a chunk of it is held.

    XXH3 takes 0.17 us for a block; Python's own hash takes more, and is another one in each process.
    """
    blocks: list[int] = []
    size = chained = 0
    for chunk in _chunks(pieces):
        if chunk is None:
            yield
            continue
        if len(chunk) >= BLOCK_BYTES and not blocks:
            # A LoRA adapter is a model of its own in vLLM, and what has another salt shares no cache there.
            names = kind, _name(body, "model"), _name(body, "cache_salt")
            chained = xxh3_64_intdigest(_encode(names), key)
        size += len(chunk)
        for end in range(BLOCK_BYTES, len(chunk) + 1, BLOCK_BYTES):
            chained = xxh3_64_intdigest(chunk[end - BLOCK_BYTES : end], chained)
            blocks.append(chained & _HASH_MASK)
        if size >= MAX_BYTES:
            break
    return Prompt(min(size, MAX_BYTES), tokens, tuple(blocks[: MAX_BYTES // BLOCK_BYTES]))


def _chunks(pieces: Pieces) -> Pieces:
    """Join pieces to whole blocks; only the last chunk may have less."""
    held = bytearray()
    for piece in pieces:
        if piece is None:
            yield None
            continue
        held += piece
        if len(held) >= _CHUNK_BYTES:
            whole = len(held) - len(held) % BLOCK_BYTES
            yield bytes(held[:whole])
            yield None
            del held[:whole]
    yield bytes(held)


def _name(body: JsonBody, key: str) -> str | None:
    """Return a name; raises :exc:`ValueError` for one that cannot be told from others."""
    value = body.get(key)
    if value is UNREAD:
        raise ValueError(key)
    return value if isinstance(value, str) else None


def _text(string: Value) -> Pieces:
    if string.size <= AT_ONCE_BYTES:
        yield _decode_text(string.copy()).encode()
        return
    for piece in string_content(string):
        yield piece
        yield None


def _as_written(value: Value) -> Pieces:
    for start in range(value.start, value.end, _CHUNK_BYTES):
        yield value.text[start : min(start + _CHUNK_BYTES, value.end)]
        if value.size > _CHUNK_BYTES:
            yield None


def _count_ids(ids: Value) -> Steps[int | None]:
    """Return how many token ids are in an array; ``None`` if there is something else."""
    commas = 0
    for piece in _as_written(ids._replace(start=ids.start + 1)):
        if piece is None:
            yield
        elif b'"' in piece or b"{" in piece or b"[" in piece:
            return None
        else:
            commas += piece.count(b",")
    return commas + 1


def _ids(ids: Value) -> Pieces:
    """Yield token ids: their own text is their content. Decoding 100,000 numbers would take 4 ms."""
    for piece in _as_written(Value(ids.text, ids.start + 1, ids.end - 1)):
        yield piece and piece.translate(None, b" \n\t\r")


def _chat(body: JsonBody) -> Pieces:
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
            yield from _as_written(element)
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
        yield from _as_written(value)
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
                yield from _as_written(element)
        yield b"]"


def _contents(content: Any) -> Pieces:
    """Yield texts, joined by line breaks as in vLLM's templates for strings; of other parts only a digest."""
    if isinstance(content, str):
        yield content.encode()
    elif isinstance(content, list):
        for number, part in enumerate(content):
            yield from _part(part, number)
    elif content.first == b'"':
        yield from _text(content)
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
        for piece in _as_written(part):
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
