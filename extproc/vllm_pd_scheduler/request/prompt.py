"""What routing may know of a prompt: its size and the hashes of its blocks. Nothing of the text is kept.

What vLLM would tokenise alike should give the same bytes here, and what extends a prompt there should extend
its bytes, so the content is read, not its JSON.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from xxhash import xxh3_64_intdigest

from .api import COMPLETIONS, GENERATE
from .body import UNREAD, JsonBody
from .chat import chat_content
from .json_text import Steps, Value
from .pieces import CHUNK_BYTES, Pieces, as_written, text_content

BLOCK_BYTES = 1024
"""Content in a block: about 256 tokens of English text."""

MAX_BYTES = 8 << 20
"""Content that is looked at: two million tokens."""

_HASH_MASK = (1 << 60) - 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of one request."""

    size: int
    """Bytes of content, up to about :data:`MAX_BYTES`. Of text, four are about a token; of token ids, six."""
    tokens: int | None
    """Tokens, where the prompt came as token ids."""
    blocks: tuple[int, ...]
    """For each whole block of :data:`BLOCK_BYTES` a hash, below 2**60, of the prompt up to its end."""


_NOTHING = Prompt(0, None, ())
_encode = msgspec.json.Encoder(order="deterministic").encode


def read_prompt(body: JsonBody, key: int = 0) -> Steps[Prompt]:
    """Return what is known of the prompt of a request. ``key``, below 2**64, goes into its blocks' hashes.

    One that is malformed, which vLLM will refuse, has no size and no blocks. Several prompts in a request
    have no blocks.
    """
    try:
        if body.api is not COMPLETIONS and body.api is not GENERATE:
            return (yield from _hashed(body, key, "chat", chat_content(body)))
        prompt = body.only_prompt() if body.api is COMPLETIONS else body.value("token_ids")
        if prompt is None:
            return Prompt(min(body.length("prompt"), MAX_BYTES), None, ())
        if prompt.first == b'"' and body.api is COMPLETIONS:
            return (yield from _hashed(body, key, "text", text_content(prompt)))
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
        if len(held) >= CHUNK_BYTES:
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


def _count_ids(ids: Value) -> Steps[int | None]:
    """Return how many token ids are in an array; ``None`` if there is something else."""
    commas = 0
    for piece in as_written(ids._replace(start=ids.start + 1)):
        if piece is None:
            yield
        elif b'"' in piece or b"{" in piece or b"[" in piece:
            return None
        else:
            commas += piece.count(b",")
    return commas + 1


def _ids(ids: Value) -> Pieces:
    """Yield token ids: their own text is their content. Decoding 100,000 numbers would take 4 ms."""
    for piece in as_written(Value(ids.text, ids.start + 1, ids.end - 1)):
        yield piece and piece.translate(None, b" \n\t\r")
