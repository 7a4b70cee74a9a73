"""JSON request bodies: read what routing needs, change what the hand-off needs, leave the rest as it is.

Values are kept as the client's own bytes (``msgspec.Raw``), so that P and D tokenise exactly the same
prompt and an unknown field passes unchanged. Splitting a body of 10 MB so takes 2.5 ms; decoding and
encoding it again, 30.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from .json_depth import nested_deeper

HANDOFF_KEY = "kv_transfer_params"
"""The field that carries a KV hand-off. Ours to set: a client's own can crash a decode engine."""

MAX_DEPTH = 200
"""Levels of nesting that a body may have; vLLM's own parser recurses. Chat requests need about ten."""

MAX_REWRITTEN_BYTES = 8 << 20
"""Largest body that is written anew without the key. That takes up to a second, and nothing else runs."""

_TOO_DEEP = f"The request body is nested too deeply: {MAX_DEPTH} levels are allowed."

_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode

# The key can be written with \u escapes for some of its letters, which are all ASCII.
_KEY = HANDOFF_KEY.encode()
_ESCAPED_LETTER = re.compile(rb"\\u00(?:5[fF]|6[156bBdDeE]|7[02346])")
_ESCAPE = re.compile(rb"\\u00([0-7][0-9a-fA-F])")
_LOOKS_LIKE_JSON = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*[\[{]")


class BodyError(ValueError):
    """The body is not one that can be served; the message is for the client."""


@dataclass(frozen=True, slots=True)
class JsonBody:
    """A JSON object, split at its top level.

    ``raw`` is the object's own text, without a client's hand-off key at any depth; ``fields`` maps each
    key to its value's text. ``stripped`` says whether such a key was there.
    """

    raw: bytes
    fields: Mapping[str, msgspec.Raw]
    stripped: bool = False

    @classmethod
    def parse(cls, body: bytes) -> JsonBody:
        """Split ``body``; raises :exc:`BodyError` if it is not a JSON object."""
        if not body:
            raise BodyError("The request has no body; a JSON object is needed.")
        try:
            fields = _decode(body)
            _check_depth(body)
            clean = _without_key(body)
            if clean is not body:
                fields = _decode(clean)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BodyError(f"The request body is not a valid JSON object: {error}") from None
        except RecursionError:
            raise BodyError(_TOO_DEEP) from None
        return cls(clean, fields, clean is not body)

    def get(self, key: str) -> Any:
        """Return the decoded value of a top-level field; ``None`` if it is absent, null or malformed."""
        raw = self.fields.get(key)
        if raw is None:
            return None
        try:
            return msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None

    def length(self, key: str) -> int:
        """Return the bytes of a field's text, without decoding it; 0 if it is absent."""
        raw = self.fields.get(key)
        return 0 if raw is None else memoryview(raw).nbytes

    def starts_with(self, key: str, char: bytes) -> bool:
        """Whether the text of a field begins with ``char``, without decoding it."""
        raw = self.fields.get(key)
        return raw is not None and bytes(memoryview(raw)[:1]) == char

    def with_field(self, key: str, value: bytes) -> tuple[bytes, int]:
        """Return the body with one more field as its last, and the offset at which that field starts.

        Nothing else changes: the bytes before the offset and a ``}`` are the body as it was. ``value`` is
        JSON text.
        """
        head = self.raw.rstrip()[:-1]
        comma = b"," if self.fields else b""
        return b"".join((head, comma, _encode(key), b":", value, b"}")), len(head)

    def replace(self, drop: Collection[str], add: Mapping[str, bytes]) -> bytes:
        """Return the body without the fields in ``drop``, those of ``add`` (JSON texts) at its end."""
        parts: list[bytes | memoryview] = []
        for key, raw in self.fields.items():
            if key not in drop and key not in add:
                parts += (b"," if parts else b"{", _encode(key), b":", memoryview(raw))
        for key, value in add.items():
            parts += (b"," if parts else b"{", _encode(key), b":", value)
        return b"".join(parts) + b"}" if parts else b"{}"


def strip_handoff(body: bytes) -> bytes:
    """Return a body of any kind without a hand-off key at any depth; the same object if it has none.

    Raises :exc:`BodyError` for a body that names the key but cannot be read as JSON, for encodings (UTF-16,
    UTF-32) in which the key could hide, since vLLM would read those, and for JSON that is nested too deeply.
    """
    if b"\0" in body[:4] or body.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BodyError("The request body must be UTF-8 text.")
    if _LOOKS_LIKE_JSON.match(body):
        _check_depth(body)
    return _without_key(body)


def _check_depth(body: bytes) -> None:
    if nested_deeper(body, MAX_DEPTH):
        raise BodyError(_TOO_DEEP)


def _without_key(body: bytes) -> bytes:
    """Drop the key wherever it stands. Python's own ``json`` keeps what vLLM, which uses it, would see."""
    if _KEY not in body and not _ESCAPED_LETTER.search(body):
        return body
    if len(body) > MAX_REWRITTEN_BYTES:
        limit = f"{MAX_REWRITTEN_BYTES >> 20} MiB"
        raise BodyError(f"A request body of more than {limit} may not have {HANDOFF_KEY!r}, in any spelling.")
    found = False

    def drop_key(members: dict[str, Any]) -> dict[str, Any]:
        nonlocal found
        if HANDOFF_KEY in members:
            found = True
            del members[HANDOFF_KEY]
        return members

    try:
        document = json.loads(body, object_hook=drop_key)
    except RecursionError:
        raise BodyError(_TOO_DEEP) from None
    except ValueError:
        # vLLM should not be able to read it either, but no spelling of the key rides on that.
        if _KEY in _ESCAPE.sub(lambda escape: bytes((int(escape[1], 16),)), body):
            raise BodyError(f"The request body names {HANDOFF_KEY!r}, which only the router sets.") from None
        return body
    return json.dumps(document, ensure_ascii=True, separators=(",", ":")).encode() if found else body
