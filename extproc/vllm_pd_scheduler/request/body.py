"""JSON request bodies: read what routing needs, change what the hand-off needs, leave the rest as it is.

Values stay the client's own bytes, so that P and D tokenise exactly the same prompt and an unknown field
passes unchanged. Bodies are read as vLLM reads them, with Python's ``json``: of doubled keys the last counts,
a UTF-8 BOM is skipped, ``NaN`` and lone surrogates are values like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from types import MappingProxyType
from typing import Any, Final

import msgspec

from .api import CHAT, COMPLETIONS, GENERATE, NATIVE, Api
from .errors import BodyError
from .fields import ABSENT, DECODED_BYTES, Fields, Walked, at_once, only_prompt, walk
from .json_text import (
    AT_ONCE_BYTES,
    MAX_MEMBERS,
    Malformed,
    Steps,
    TooDeep,
    TooMany,
    Value,
    finish,
)
from .stripping import TOO_DEEP, check_encoding, without_handoff

UNREAD: Final = object()
"""In place of a value that is malformed, or too long for what is asked of it."""

_TOO_MANY = f"The request body has too many fields: {MAX_MEMBERS} are allowed."
_NOT_JSON = "The request body is not a valid JSON object: "


UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)
_TRUE_WORDS = frozenset({"1", "on", "t", "true", "y", "yes"})
_decode_all = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


class JsonBody(msgspec.Struct, frozen=True, eq=False):
    """A JSON object, split at its top level. Connectors, which may be code of the operator's, only read it.

    ``raw`` is the body without a client's hand-off key at any depth; ``changed`` says whether it is another
    one than the client's.
    ``api`` is what it is a request of. ``more`` are fields (JSON texts) that each body has which is made of
    this one for an instance, where it may have fields of ours.
    """

    raw: bytes
    fields: Fields
    changed: bool = False
    walked: Walked | None = None
    api: Api = COMPLETIONS
    more: Mapping[str, bytes] = MappingProxyType({})

    @classmethod
    def parse(cls, body: bytes, api: Api | None = None) -> JsonBody:
        """Split ``body`` without a stop; raises :exc:`.errors.BodyError` if it is not a JSON object.

        Without an ``api`` it is a chat completion if it has messages, else a completion.
        """
        return finish(cls.read(body, api))

    @classmethod
    def read(cls, body: bytes, api: Api | None = None) -> Steps[JsonBody]:
        """Do the same in steps."""
        if not body:
            raise BodyError("The request has no body; a JSON object is needed.")
        try:
            if len(body) <= AT_ONCE_BYTES and (fields := at_once(body)) is not None:
                return cls(body, fields, api=api or _usual(fields))
            check_encoding(body)
            clean = yield from without_handoff(body)
            fields, walked = yield from walk(clean)
        except Malformed as error:
            raise BodyError(f"{_NOT_JSON}{error}") from None
        except TooMany:
            raise BodyError(_TOO_MANY) from None
        except TooDeep:
            raise BodyError(TOO_DEEP) from None
        return cls(clean, fields, clean is not body, walked, api or _usual(fields))

    def has(self, key: str) -> bool:
        """Whether the body has a field, null or not; one of :class:`Fields`, as with :meth:`get`."""
        return getattr(self.fields, key) is not ABSENT

    def get(self, key: str) -> Any:
        """Return the decoded value of a field, ``None`` if it is absent or null.

        :data:`UNREAD` stands for one that is malformed, or longer than :data:`DECODED_BYTES`. ``key`` is one
        of :class:`Fields`; raise :exc:`AttributeError` for another. What else a body has is in ``raw`` alone.
        """
        raw = getattr(self.fields, key)
        if raw is ABSENT:
            return None
        if memoryview(raw).nbytes > DECODED_BYTES:
            return UNREAD
        try:
            return msgspec.json.decode(raw)
        except UNREADABLE:
            return UNREAD

    @property
    def wants_stream(self) -> bool:
        """Whether the answer is to be a stream of events."""
        return means_true(self.get("stream"))

    @property
    def answer_limit(self) -> int | None:
        """Tokens that the client allows the answer; ``None`` without a limit."""
        given = next(filter(None, map(self.get, self.api.limits)), None)
        if self.api in (GENERATE, NATIVE) and isinstance(params := self.get("sampling_params"), dict):
            given = params.get("max_tokens" if self.api is GENERATE else "max_new_tokens")
        return given if type(given) is int and given > 0 else None

    def length(self, key: str) -> int:
        """Return the bytes of a field's text, without decoding it; 0 if it is absent."""
        return memoryview(getattr(self.fields, key)).nbytes

    def value(self, key: str) -> Value | None:
        """Return a field's text, without decoding it; ``None`` if it is absent."""
        if self.walked is not None:
            return self.walked.values.get(key)
        text = bytes(getattr(self.fields, key))
        return Value(text, 0, len(text)) if text else None

    def only_prompt(self) -> Value | None:
        """Return the field ``prompt``, without the list that it may be the only one in.

        ``None`` if there are several, or no such field, as in a chat (``messages``). It is a text or, as
        another list, token ids; if it is malformed it may be anything.
        """
        if self.walked is not None:
            return self.walked.prompt
        prompt = self.value("prompt")
        if prompt is None or prompt.first != b"[":
            return prompt
        return finish(only_prompt(prompt))

    def one_more(self, key: str, value: bytes) -> tuple[int, bytes]:
        """Return what makes one more field the body's last: an offset, and what replaces all from there on.

        ``value`` is JSON text.
        """
        end, empty = self.end()
        comma = b"" if empty else b","
        return end, b"".join((comma, _encode(key), b":", value, b"}"))

    def end(self) -> tuple[int, bool]:
        """Return where the object's last brace is, and whether there is no field before it."""
        raw, walked = self.raw, self.walked
        if walked is not None:
            return walked.end, walked.start == walked.end
        end = raw.rindex(b"}")
        return end, raw[:end].rstrip().endswith(b"{")

    def for_model(self, name: str) -> Steps[JsonBody]:
        """Return the same request for another model, in steps."""
        made = yield from JsonBody.read(self.replace(frozenset(), {"model": _encode(name)}), self.api)
        return msgspec.structs.replace(made, changed=True)

    def replace(self, drop: Set[str], add: Mapping[str, bytes]) -> bytes:
        """Return the body without the fields in ``drop``, those of ``more`` and ``add`` at its end.

        All of them are fields of :class:`Fields`, or none that a body can have; ``add`` has at least one.
        """
        parts: list[bytes | memoryview] = [b"{"]
        add = {**self.more, **add}
        keys = drop | add.keys()
        try:
            walked = self.walked
            members = _decode_all(self.raw) if walked is None else {}
        except UnicodeDecodeError:  # in a key; P will say so
            _, walked = finish(walk(self.raw))
            members = {}
        for key, raw in members.items():
            if key not in keys:
                parts += (_encode(key), b":", memoryview(raw), b",")
        if walked is not None:
            parts += self._others(keys, walked)
        for key, value in add.items():
            parts += (_encode(key), b":", value, b",")
        parts[-1] = b"}"
        return b"".join(parts)

    def _others(self, keys: Set[str], walked: Walked) -> Iterator[bytes | memoryview]:
        """Yield the text of all members but those with these keys, up to a comma or the object's start."""
        text, begin = memoryview(self.raw), walked.start
        for key, start, after in walked.places:
            if key in keys:
                yield text[begin:start]
                begin = after
        if begin < walked.end:
            yield text[begin : walked.end]
            yield b","


def _usual(fields: Fields) -> Api:
    return COMPLETIONS if fields.messages is ABSENT else CHAT


def means_true(value: Any) -> bool:
    """Return whether vLLM, which reads its fields with pydantic, takes a value for true."""
    return value.lower() in _TRUE_WORDS if isinstance(value, str) else value in (True, 1)
