"""The fields that are read of a body: in one step, or in many where it is long or unusual."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from .errors import BodyError
from .handoff_key import is_suspect
from .json_text import BOM, MAX_DEPTH, JsonText, Malformed, Member, Steps, TooDeep, Value, is_deeper
from .stripping import check_encoding, may_be_deep

DECODED_BYTES = 4096
"""A value up to this size is decoded."""
_MOST_PLACES = 64
ABSENT = msgspec.Raw()
"""The text of a field that a body does not have."""


class Fields(msgspec.Struct, frozen=True):
    """The texts of the fields that are read here. Others pass unread, and take no memory."""

    model: msgspec.Raw = ABSENT
    prompt: msgspec.Raw = ABSENT
    messages: msgspec.Raw = ABSENT
    tools: msgspec.Raw = ABSENT
    cache_salt: msgspec.Raw = ABSENT
    user: msgspec.Raw = ABSENT
    prompt_cache_key: msgspec.Raw = ABSENT
    max_tokens: msgspec.Raw = ABSENT
    max_completion_tokens: msgspec.Raw = ABSENT
    min_tokens: msgspec.Raw = ABSENT
    stop: msgspec.Raw = ABSENT
    stop_token_ids: msgspec.Raw = ABSENT
    stop_sequences: msgspec.Raw = ABSENT
    stream: msgspec.Raw = ABSENT
    stream_options: msgspec.Raw = ABSENT
    n: msgspec.Raw = ABSENT
    best_of: msgspec.Raw = ABSENT
    use_beam_search: msgspec.Raw = ABSENT
    echo: msgspec.Raw = ABSENT
    prompt_logprobs: msgspec.Raw = ABSENT
    prompt_embeds: msgspec.Raw = ABSENT
    return_token_ids: msgspec.Raw = ABSENT
    instructions: msgspec.Raw = ABSENT
    input: msgspec.Raw = ABSENT
    max_output_tokens: msgspec.Raw = ABSENT
    background: msgspec.Raw = ABSENT
    store: msgspec.Raw = ABSENT
    previous_response_id: msgspec.Raw = ABSENT
    request_id: msgspec.Raw = ABSENT
    system: msgspec.Raw = ABSENT
    token_ids: msgspec.Raw = ABSENT
    sampling_params: msgspec.Raw = ABSENT
    text: msgspec.Raw = ABSENT
    input_ids: msgspec.Raw = ABSENT
    logprob_start_len: msgspec.Raw = ABSENT
    mm_processor_kwargs: msgspec.Raw = ABSENT
    media_io_kwargs: msgspec.Raw = ABSENT


_KEYS = frozenset(Fields.__struct_fields__)
_LONG = frozenset(
    {"prompt", "messages", "tools", "prompt_embeds", "model", "user", "prompt_cache_key", "cache_salt"}
    | {"instructions", "input", "system", "token_ids", "sampling_params", "text", "input_ids"}
    | {"stop", "stop_token_ids", "stop_sequences", "mm_processor_kwargs", "media_io_kwargs"}
)
_decode = msgspec.json.Decoder(Fields).decode


class Place(NamedTuple):
    """Where a field that is read stands; ``after`` is where the next one begins, or the object ends."""

    key: str
    start: int
    after: int


class Walked(NamedTuple):
    """What is remembered of a body that was read in steps."""

    values: Mapping[str, Value]
    places: tuple[Place, ...]
    start: int
    """Where the first member begins, or the object ends."""
    end: int
    """Where the object's last brace is."""
    prompt: Value | None


def at_once(body: bytes) -> Fields | None:
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
    if may_be_deep(body) and is_deeper(body, MAX_DEPTH):
        raise TooDeep
    return fields


def _check_json(body: bytes) -> None:
    """Raise :exc:`Malformed` for what vLLM does not read as an object either."""
    check_encoding(body)
    try:
        document = json.loads(body)
    except RecursionError:
        raise TooDeep from None
    except ValueError as error:
        raise Malformed(str(error)) from None
    if not isinstance(document, dict):
        raise Malformed("it is another value")


def walk(body: bytes) -> Steps[tuple[Fields, Walked]]:
    """Split a body of any size at its top level, in steps."""
    text = JsonText(body)
    brace = yield from text.space(len(BOM) if body.startswith(BOM) else 0)
    if body[brace : brace + 1] != b"{":
        raise Malformed("it does not begin with a brace")
    values: dict[str, Value] = {}
    places: list[Place] = []
    begin, read = 0, None
    for member in text.members(brace):
        if member is None:
            yield
            continue
        begin = begin or member.start
        if read is not None:
            places.append(Place(*read, member.start))
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
        places.append(Place(*read, end))
    if (yield from text.space(text.at)) < len(body):
        raise Malformed(f"there is more after its last brace, at byte {end}")
    prompt = (yield from only_prompt(values["prompt"])) if "prompt" in values else None
    view = memoryview(body)
    fields = Fields(**{key: msgspec.Raw(view[value.start : value.end]) for key, value in values.items()})
    return fields, Walked(MappingProxyType(values), tuple(places), begin or end, end, prompt)


def _check_short(member: Member) -> None:
    """Raise :exc:`Malformed` for what D would refuse although P, which does not get it, would not."""
    if member.value.size > DECODED_BYTES:
        raise Malformed(f"{member.key!r} is too long")
    try:
        json.loads(member.value.copy())
    except (ValueError, RecursionError):
        raise Malformed(f"the value of {member.key!r} at byte {member.value.start}") from None


def only_prompt(prompt: Value) -> Steps[Value | None]:
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
