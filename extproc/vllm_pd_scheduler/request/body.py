"""JSON request bodies: read what routing needs, change what the hand-off needs, leave the rest as it is.

Values stay the client's own bytes, so that P and D tokenise exactly the same prompt and an unknown field
passes unchanged. Bodies are read as vLLM reads them, with Python's ``json``: of doubled keys the last counts,
a UTF-8 BOM is skipped, ``NaN`` and lone surrogates are values like any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgspec

from .api import CHAT, COMPLETIONS, GENERATE, NATIVE, Api
from .errors import BodyError
from .handoff_key import is_suspect, refuse_name, without_key
from .json_text import (
    MAX_DEPTH,
    MAX_MEMBERS,
    JsonText,
    Malformed,
    Member,
    Steps,
    TooDeep,
    TooMany,
    Value,
    depth,
    finish,
)

AT_ONCE_BYTES = 1 << 15
"""Text up to this size is decoded in one step; longer text is walked in many (:mod:`.json_text`)."""

UNREAD: Final = object()
"""In place of a value that is malformed, or too long for what is asked of it."""

BOM = b"\xef\xbb\xbf"
_ABSENT = msgspec.Raw()
DECODED_BYTES = 4096
"""A value up to this size is decoded."""
_MOST_PLACES = 64

_TOO_DEEP = f"The request body is nested too deeply: {MAX_DEPTH} levels are allowed."
_TOO_MANY = f"The request body has too many fields: {MAX_MEMBERS} are allowed."
_NOT_JSON = "The request body is not a valid JSON object: "


class Fields(msgspec.Struct, frozen=True):
    """The texts of the fields that are read here. Others pass unread, and take no memory."""

    model: msgspec.Raw = _ABSENT
    prompt: msgspec.Raw = _ABSENT
    messages: msgspec.Raw = _ABSENT
    tools: msgspec.Raw = _ABSENT
    cache_salt: msgspec.Raw = _ABSENT
    user: msgspec.Raw = _ABSENT
    prompt_cache_key: msgspec.Raw = _ABSENT
    max_tokens: msgspec.Raw = _ABSENT
    max_completion_tokens: msgspec.Raw = _ABSENT
    min_tokens: msgspec.Raw = _ABSENT
    stop: msgspec.Raw = _ABSENT
    stop_token_ids: msgspec.Raw = _ABSENT
    stop_sequences: msgspec.Raw = _ABSENT
    stream: msgspec.Raw = _ABSENT
    stream_options: msgspec.Raw = _ABSENT
    n: msgspec.Raw = _ABSENT
    best_of: msgspec.Raw = _ABSENT
    use_beam_search: msgspec.Raw = _ABSENT
    echo: msgspec.Raw = _ABSENT
    prompt_logprobs: msgspec.Raw = _ABSENT
    prompt_embeds: msgspec.Raw = _ABSENT
    return_token_ids: msgspec.Raw = _ABSENT
    instructions: msgspec.Raw = _ABSENT
    input: msgspec.Raw = _ABSENT
    max_output_tokens: msgspec.Raw = _ABSENT
    background: msgspec.Raw = _ABSENT
    store: msgspec.Raw = _ABSENT
    previous_response_id: msgspec.Raw = _ABSENT
    request_id: msgspec.Raw = _ABSENT
    system: msgspec.Raw = _ABSENT
    token_ids: msgspec.Raw = _ABSENT
    sampling_params: msgspec.Raw = _ABSENT
    text: msgspec.Raw = _ABSENT
    input_ids: msgspec.Raw = _ABSENT
    logprob_start_len: msgspec.Raw = _ABSENT
    mm_processor_kwargs: msgspec.Raw = _ABSENT
    media_io_kwargs: msgspec.Raw = _ABSENT


_TRUE_WORDS = frozenset({"1", "on", "t", "true", "y", "yes"})
UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)
_KEYS = frozenset(Fields.__struct_fields__)
_LONG = frozenset(
    {"prompt", "messages", "tools", "prompt_embeds", "model", "user", "prompt_cache_key", "cache_salt"}
    | {"instructions", "input", "system", "token_ids", "sampling_params", "text", "input_ids"}
    | {"stop", "stop_token_ids", "stop_sequences", "mm_processor_kwargs", "media_io_kwargs"}
)
_decode = msgspec.json.Decoder(Fields).decode
_decode_all = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


class _Place(NamedTuple):
    """Where a field that is read stands; ``after`` is where the next one begins, or the object ends."""

    key: str
    start: int
    after: int


class _Walked(NamedTuple):
    """What is remembered of a body that was read in steps."""

    values: Mapping[str, Value]
    places: tuple[_Place, ...]
    start: int
    """Where the first member begins, or the object ends."""
    end: int
    """Where the object's last brace is."""
    prompt: Value | None


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
    walked: _Walked | None = None
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
            if len(body) <= AT_ONCE_BYTES and (fields := _at_once(body)) is not None:
                return cls(body, fields, api=api or _usual(fields))
            _check_encoding(body)
            clean = yield from _without_key(body)
            fields, walked = yield from _walk(clean)
        except Malformed as error:
            raise BodyError(f"{_NOT_JSON}{error}") from None
        except TooMany:
            raise BodyError(_TOO_MANY) from None
        except TooDeep:
            raise BodyError(_TOO_DEEP) from None
        return cls(clean, fields, clean is not body, walked, api or _usual(fields))

    def has(self, key: str) -> bool:
        """Whether the body has a field, null or not; one of :class:`Fields`, as with :meth:`get`."""
        return getattr(self.fields, key) is not _ABSENT

    def get(self, key: str) -> Any:
        """Return the decoded value of a field, ``None`` if it is absent or null.

        :data:`UNREAD` stands for one that is malformed, or longer than :data:`DECODED_BYTES`. ``key`` is one
        of :class:`Fields`; raise :exc:`AttributeError` for another. What else a body has is in ``raw`` alone.
        """
        raw = getattr(self.fields, key)
        if raw is _ABSENT:
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
        return None if prompt is None else finish(_only_prompt(prompt))

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
            _, walked = finish(_walk(self.raw))
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

    def _others(self, keys: Set[str], walked: _Walked) -> Iterator[bytes | memoryview]:
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
    return COMPLETIONS if fields.messages is _ABSENT else CHAT


def strip_handoff(body: bytes) -> Steps[bytes]:
    """Return a body of any kind without a hand-off key at any depth; the same object if it has none.

    Raises :exc:`.errors.BodyError` for a body that names the key but cannot be read as JSON, for encodings
    (UTF-16, UTF-32) in which the key could hide, since vLLM would read those, and for JSON that is nested too
    deeply.
    """
    _check_encoding(body)
    if len(body) <= AT_ONCE_BYTES and not is_suspect(body) and not _may_be_deep(body):
        return body
    text = JsonText(body)
    start = yield from text.space(len(BOM) if body.startswith(BOM) else 0)
    if body[start : start + 1] not in (b"[", b"{"):
        yield from refuse_name(body)
        return body
    clean = body
    try:
        clean = yield from _without_key(body)
        yield from JsonText(clean).skip(start)
    except TooDeep:
        raise BodyError(_TOO_DEEP) from None
    except Malformed:
        yield from refuse_name(clean)  # all else is the instance's to refuse
    return clean


def means_true(value: Any) -> bool:
    """Return whether vLLM, which reads its fields with pydantic, takes a value for true."""
    return value.lower() in _TRUE_WORDS if isinstance(value, str) else value in (True, 1)


def _without_key(body: bytes) -> Steps[bytes]:
    """Return JSON text without a client's hand-off; text that is no JSON may not name it at all."""
    clean = yield from without_key(body)
    if len(clean) <= AT_ONCE_BYTES and is_suspect(clean):
        try:
            json.loads(clean)
        except (ValueError, RecursionError):
            yield from refuse_name(clean)
    return clean


def _at_once(body: bytes) -> Fields | None:
    """Return the fields of a body in which nothing is unusual."""
    try:
        fields = _decode(body)
    except RecursionError:
        raise TooDeep from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        _check_json(body)
        return None
    if is_suspect(body):
        return None
    if _may_be_deep(body) and depth(body) > MAX_DEPTH:
        raise TooDeep
    return fields


def _may_be_deep(body: bytes) -> bool:
    return body.count(b"[") + body.count(b"{") > MAX_DEPTH


def _check_json(body: bytes) -> None:
    """Raise :exc:`Malformed` for what vLLM does not read as an object either."""
    _check_encoding(body)
    try:
        document = json.loads(body)
    except RecursionError:
        raise TooDeep from None
    except ValueError as error:
        raise Malformed(str(error)) from None
    if not isinstance(document, dict):
        raise Malformed("it is another value")


def _check_encoding(body: bytes) -> None:
    if b"\0" in body[:4] or body.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BodyError("The request body must be UTF-8 text.")


def _walk(body: bytes) -> Steps[tuple[Fields, _Walked]]:
    """Split a body of any size at its top level."""
    text = JsonText(body)
    brace = yield from text.space(len(BOM) if body.startswith(BOM) else 0)
    if body[brace : brace + 1] != b"{":
        raise Malformed("it does not begin with a brace")
    values: dict[str, Value] = {}
    places: list[_Place] = []
    begin, read = 0, None
    for member in text.members(brace):
        if member is None:
            yield
            continue
        begin = begin or member.start
        if read is not None:
            places.append(_Place(*read, member.start))
            read = None
        if member.key in _KEYS:
            if len(places) == _MOST_PLACES:
                raise BodyError("The request body has its fields too many times.")
            if member.key not in _LONG:
                _check_short(member)
            read = (member.key, member.start)
            values[member.key] = member.value
    end = text.at - 1
    if read is not None:
        places.append(_Place(*read, end))
    if (yield from text.space(text.at)) < len(body):
        raise Malformed(f"there is more after its last brace, at byte {end}")
    prompt = (yield from _only_prompt(values["prompt"])) if "prompt" in values else None
    view = memoryview(body)
    fields = Fields(**{key: msgspec.Raw(view[value.start : value.end]) for key, value in values.items()})
    return fields, _Walked(MappingProxyType(values), tuple(places), begin or end, end, prompt)


def _check_short(member: Member) -> None:
    """Raise :exc:`Malformed` for what D would refuse although P, which does not get it, would not."""
    if member.value.size > DECODED_BYTES:
        raise Malformed(f"{member.key!r} is too long")
    try:
        json.loads(member.value.copy())
    except (ValueError, RecursionError):
        raise Malformed(f"the value of {member.key!r} at byte {member.value.start}") from None


def _only_prompt(prompt: Value) -> Steps[Value | None]:
    """Return a prompt, or the one in a list; ``None`` for several."""
    text = JsonText(prompt.text)
    if prompt.first != b"[":
        return prompt
    start = yield from text.space(prompt.start + 1)
    if prompt.text[start : start + 1] not in (b'"', b"[", b"{", b"]"):
        return prompt  # token ids
    only = None
    for item in text.elements(prompt.start):
        if item is None:
            yield
        elif only is not None:
            return None
        else:
            only = item
    return only if only is not None and only.first in (b'"', b"[") else None
