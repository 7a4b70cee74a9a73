"""What routing may know of a prompt: its size and the hashes of its blocks. Nothing of the text is kept.

What vLLM would tokenise alike should give the same bytes here, and what extends a prompt there should extend
its bytes, so the content is read, not its JSON. A chat becomes a stream in the order that chat templates use:
the tools, then each message. Nothing closes it, so that the next turn's stream starts with this one's.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from .body import JsonBody

BLOCK_BYTES = 1024
"""Content in a block: about 256 tokens of English text."""

MEDIA_BYTES = 4096
"""What an image, audio or video part counts for: about 1,000 tokens, as of an image of a megapixel."""

MAX_BYTES = 8 << 20
"""Content that is looked at: two million tokens."""

_HASH_MASK = (1 << 60) - 1

# Marks in a chat's stream are bytes that UTF-8 never has. A fixed-length digest follows _MEDIA.
_MESSAGE, _NAME, _TOOL_CALLS, _TOOL_CALL_ID, _CONTENT = b"\xff", b"\xfe", b"\xfd", b"\xfc", b"\xfb"
_TOOLS, _MEDIA = b"\xfa", b"\xf9"
_MEDIA_PADDING = bytes(MEDIA_BYTES - len(_MEDIA) - 8)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of one request."""

    size: int
    """Bytes of content, up to about :data:`MAX_BYTES`. Of text, four are about a token; of token ids, six."""
    tokens: int | None
    """Tokens, where the prompt came as token ids."""
    blocks: tuple[int, ...]
    """For each whole block of :data:`BLOCK_BYTES` a hash, below 2**60, of the prompt up to its end.

    Only within this process: others hash with another key, so that nobody can make prompts that collide.
    """


class _Message(msgspec.Struct):
    role: str
    content: str | list[Any] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None


_NOTHING = Prompt(0, None, ())
_decode_messages = msgspec.json.Decoder(list[_Message]).decode
_decode_text = msgspec.json.Decoder(str).decode
_canonical = msgspec.json.Encoder(order="deterministic").encode


def read_prompt(body: JsonBody) -> Prompt:
    """Return what is known of the prompt of a request for a completion or a chat completion.

    One that is malformed, which vLLM will refuse, has no size and no blocks. Several prompts in a request
    have no blocks.
    """
    try:
        if "messages" in body.fields:
            return _prompt(body, "chat", _chat(body))
        text = bytes(body.fields.get("prompt", b""))
        if text.startswith(b'"'):
            return _prompt(body, "text", _decode_text(text).encode())
        if text.startswith(b"["):
            return _listed(body, text)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass
    return _NOTHING


def _listed(body: JsonBody, text: bytes) -> Prompt:
    """Read an array: of token ids, whose own text is their content, or of prompts.

    Decoding 100,000 numbers would take 4 ms; to count the commas, and to drop white space, takes one each.
    """
    if b'"' in text or b"{" in text or b"[" in text[1:]:
        return Prompt(min(len(text), MAX_BYTES), None, ())
    ids = text[1:-1]
    if b" " in ids or b"\n" in ids or b"\t" in ids or b"\r" in ids:
        ids = ids.translate(None, b" \n\t\r")
    return _prompt(body, "ids", ids, ids.count(b",") + 1 if ids else 0)


def _prompt(body: JsonBody, kind: str, content: bytes, tokens: int | None = None) -> Prompt:
    size = min(len(content), MAX_BYTES)
    if size < BLOCK_BYTES:
        return Prompt(size, tokens, ())
    # A LoRA adapter is a model of its own in vLLM, and what has another salt shares no cache there.
    seed = hash((kind, _name(body, "model"), _name(body, "cache_salt")))
    return Prompt(size, tokens, tuple(_hashes(seed, content, size)))


def _name(body: JsonBody, key: str) -> str | None:
    value = body.get(key)
    return value if isinstance(value, str) else None


def _hashes(chained: int, content: bytes, size: int) -> Iterator[int]:
    """Chain the blocks' hashes. Python's own is SipHash with a secret key: 400 KB take it 0.2 ms.

    SHA-256 takes 0.4 (on CPUs that have it built in), BLAKE2b 0.7.
    """
    for end in range(BLOCK_BYTES, size + 1, BLOCK_BYTES):
        chained = hash((chained, content[end - BLOCK_BYTES : end]))
        yield chained & _HASH_MASK


def _chat(body: JsonBody) -> bytes:
    pieces: list[bytes] = []
    size = 0
    for piece in _pieces(body):
        pieces.append(piece)
        size += len(piece)
        if size >= MAX_BYTES:
            break
    return b"".join(pieces)


def _pieces(body: JsonBody) -> Iterator[bytes]:
    messages = _decode_messages(body.fields["messages"])
    if tools := body.get("tools"):
        yield _TOOLS + _canonical(tools)
    for message in messages:
        yield _MESSAGE + message.role.encode()
        if message.name:
            yield _NAME + message.name.encode()
        if message.tool_calls:
            yield _TOOL_CALLS + _canonical(message.tool_calls)
        if message.tool_call_id:
            yield _TOOL_CALL_ID + message.tool_call_id.encode()
        if message.content:
            yield _CONTENT
            yield from _contents(message.content)


def _contents(content: str | list[Any]) -> Iterator[bytes]:
    """Yield texts, joined by line breaks as in vLLM's templates for strings; of other parts only a digest."""
    if isinstance(content, str):
        yield content.encode()
        return
    for number, part in enumerate(content):
        text = part
        if isinstance(part, dict) and part.get("type", "text") == "text":
            text = part.get("text")
        if not isinstance(text, str):
            yield _MEDIA + (hash(_frozen(part)) & _HASH_MASK).to_bytes(8, "little") + _MEDIA_PADDING
            continue
        if number:
            yield b"\n"
        yield text.encode()


def _frozen(value: Any) -> Hashable:
    """Return a JSON value as one that has a hash: megabytes of image data are then copied nowhere."""
    if isinstance(value, dict):
        return frozenset((key, _frozen(member)) for key, member in value.items())
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    return cast(Hashable, value)
