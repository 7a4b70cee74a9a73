"""What all protocols have in common in which P answers one token of the client's own request, in any API."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Annotated, Any

import msgspec

from ..request.api import GENERATE, NATIVE, RESPONSES
from ..request.body import JsonBody
from ..request.fields import ABSENT
from .base import MAX_TOKENS

Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding an answer may raise."""


class _Details(msgspec.Struct):
    cached_tokens: Tokens | None = None


class _Usage(msgspec.Struct):
    """Tokens, as each API calls them."""

    prompt_tokens: Tokens | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens: Tokens | None = None
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: Tokens | None = None
    cache_creation_input_tokens: Tokens | None = None


class _Answer(msgspec.Struct):
    usage: msgspec.Raw = msgspec.Raw(b"null")


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _End(msgspec.Struct):
    """Why an answer has ended, as each API says it."""

    choices: list[_Choice] = []
    status: str | None = None
    stop_reason: str | None = None


class _Tool(msgspec.Struct):
    type: str | None = None


_MOST_TOOL_BYTES = 1 << 20
_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_end = msgspec.json.Decoder(_End).decode
_decode_tools = msgspec.json.Decoder(list[_Tool] | None).decode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_tokens = msgspec.json.Decoder(Tokens | None).decode
_decode_usage = msgspec.json.Decoder(_Usage | None).decode

_RARE = ("n", "best_of", "use_beam_search", "echo", "prompt_logprobs", "prompt_embeds")
"""Fields that say what :func:`can_split` looks for. Nearly all requests have none of them."""
_rare_fields = attrgetter(*_RARE)
_NONE_OF_THEM = (ABSENT,) * len(_RARE)


def can_split(body: JsonBody) -> bool:
    """Whether a request has one prompt and one answer, and wants nothing that only P would know.

    P's answer is for one prompt, whatever ``n`` is and however many prompts there are. For ``echo`` and
    ``prompt_logprobs`` D would have to compute the whole prompt again.
    """
    if _rare_fields(body.fields) != _NONE_OF_THEM and _wants_more(body):
        return False
    if body.api is RESPONSES:
        return _is_one_turn(body)
    if body.api is GENERATE:
        return _has_one_answer(body)
    if body.api is NATIVE:  # vLLM has no such path
        return False
    return not body.has("prompt") or body.only_prompt() is not None


def _wants_more(body: JsonBody) -> bool:
    """Whether a request wants several answers, or something that only P would know."""
    return (
        any(body.get(key) not in (None, 1) for key in ("n", "best_of"))
        or any(body.get(key) for key in ("use_beam_search", "echo"))
        or any(body.get(key) is not None for key in ("prompt_logprobs", "prompt_embeds"))
    )


def _is_one_turn(body: JsonBody) -> bool:
    """Whether a response is one run of the engine, whose prompt is in the request.

    With a tool of its own (``code_interpreter``, ``mcp``), vLLM runs the engine again with what the tool has
    said, and the same hand-off.
    """
    if body.get("background") or body.get("previous_response_id") is not None:
        return False
    tools = body.value("tools")
    if tools is None:
        return True
    try:
        found = _decode_tools(tools.copy()) if tools.size <= _MOST_TOOL_BYTES else [_Tool()]
    except UNREADABLE:
        return False
    return all(tool.type == "function" for tool in found or ())


def _has_one_answer(body: JsonBody) -> bool:
    params = body.get("sampling_params")
    if not isinstance(params, dict) or not body.has("token_ids"):
        return False
    return params.get("n") in (None, 1) and params.get("prompt_logprobs") is None


def one_token(body: JsonBody, more: Mapping[str, bytes], *, past_stop: bool = False) -> bytes:
    """Return the client's body for one token, not streamed, with ``more`` fields (JSON texts).

    ``past_stop``: the token is neither an end of the text nor a stop, as far as the API can ask for that. It
    is for engines that hand nothing over then. D gets the client's own fields, and finds the end by itself.
    """
    api = body.api
    drop, add = api.dropped, {**api.one_token, **more}
    if body.has("max_completion_tokens"):
        add["max_completion_tokens"] = b"1"
    if api is GENERATE:
        add["sampling_params"] = _of_one_token(body, past_stop)
    if past_stop:
        drop |= api.stops
        add |= api.past_stop
    return body.replace(drop, add)


def _of_one_token(body: JsonBody, past_stop: bool) -> bytes:
    """Return the text of ``sampling_params`` for one token."""
    params: dict[str, Any] = dict(_decode_object(bytes(body.fields.sampling_params)))
    params.pop("min_tokens", None)
    if past_stop:
        params = {key: value for key, value in params.items() if key not in ("stop", "stop_token_ids")}
        params["min_tokens"] = 1
    return msgspec.json.encode({**params, "max_tokens": 1})


def was_cut(answer: bytes) -> bool:
    """Whether an answer is one token that was cut off at its limit.

    A chat's can be part of a call of a tool as well.
    """
    try:
        end = _decode_end(answer)
    except UNREADABLE:
        return False
    if end.status == "incomplete" or end.stop_reason == "max_tokens":
        return True
    return len(end.choices) == 1 and end.choices[0].finish_reason in ("length", "tool_calls")


def has_stopped(answer: bytes) -> bool:
    """Whether the one token of an answer was an end of the text, or a stop."""
    try:
        end = _decode_end(answer)
    except UNREADABLE:
        return False
    if end.status == "completed" or end.stop_reason in ("end_turn", "stop_sequence", "tool_use"):
        return True
    return any(choice.finish_reason == "stop" for choice in end.choices)


def never_served(params: bytes, model: str | None) -> bytes:
    """Return a completion request for more tokens than any context has, with ``kv_transfer_params``.

    vLLM answers it with 400, has its connector tell P that the hand-off was rejected, and transfers nothing.
    """
    name = b"" if model is None else b'"model":' + msgspec.json.encode(model) + b","
    return b"".join((b"{", name, b'"prompt":"x","max_tokens":2147483647,"kv_transfer_params":', params, b"}"))


def counted(answer: bytes) -> tuple[int | None, int | None]:
    """Return the tokens of an answer's prompt, and how many were cached; ``None`` for what makes no sense.

    They are for learning and for usage: without them the hand-off is as good.
    """
    try:
        return _counted(_decode_answer(answer).usage, None)
    except UNREADABLE:
        return None, None


def counted_with(usage: msgspec.Raw, cached: msgspec.Raw) -> tuple[int | None, int | None, bool]:
    """Return the same of the text of ``usage``, and whether D learns how many were cached.

    ``cached`` is ``remote_prefill_cached_tokens`` of P's ``kv_transfer_params``, which D gets and, as vLLM
    0.32 does, reports as its own. They say it also where ``usage`` does not.
    """
    told = _number(cached) if cached else None
    return *_counted(usage, told), told is not None


def _number(text: msgspec.Raw) -> int | None:
    try:
        number: int | None = _decode_tokens(text)
    except UNREADABLE:
        return None
    return number


def _counted(usage: msgspec.Raw, cached: int | None) -> tuple[int | None, int | None]:
    try:
        found = _decode_usage(usage) or _Usage()
    except UNREADABLE:
        return None, cached
    beside = (found.cache_read_input_tokens or 0) + (found.cache_creation_input_tokens or 0)
    tokens = found.prompt_tokens or (found.input_tokens or 0) + beside or None
    details = found.prompt_tokens_details or found.input_tokens_details
    if cached is None:
        cached = details.cached_tokens if details is not None else found.cache_read_input_tokens
    return tokens, cached if tokens is None or cached is None else min(cached, tokens)
