"""What all protocols have in common in which P answers one token of the client's own request."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated

import msgspec

from ..request.body import JsonBody
from .base import MAX_TOKENS

Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding an answer may raise."""

_DROPPED = frozenset({"min_tokens", "stream_options", "max_completion_tokens"})
"""Fields that P gets without, or with another value.

vLLM refuses ``min_tokens`` above ``max_tokens``, and ``stream_options`` without ``stream``.
"""
_STOPS = frozenset({"stop", "stop_token_ids"})


class _Details(msgspec.Struct):
    cached_tokens: Tokens | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: Tokens | None = None
    prompt_tokens_details: _Details | None = None


class _Answer(msgspec.Struct):
    usage: msgspec.Raw = msgspec.Raw(b"null")


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Choices(msgspec.Struct):
    choices: list[_Choice] = []


_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_choices = msgspec.json.Decoder(_Choices).decode
_decode_usage = msgspec.json.Decoder(_Usage | None).decode


def can_split(body: JsonBody) -> bool:
    """Whether a request has one prompt and one answer, and wants nothing that only P would know.

    P's answer is for one prompt, whatever ``n`` is and however many prompts there are. For ``echo`` and
    ``prompt_logprobs`` D would have to compute the whole prompt again.
    """
    if any(body.get(key) not in (None, 1) for key in ("n", "best_of")):
        return False
    if any(body.get(key) for key in ("use_beam_search", "echo")):
        return False
    if any(body.get(key) is not None for key in ("prompt_logprobs", "prompt_embeds")):
        return False
    return not body.has("prompt") or body.only_prompt() is not None


def one_token(body: JsonBody, more: Mapping[str, bytes], *, past_stop: bool = False) -> bytes:
    """Return the client's body with ``max_tokens`` 1, not streamed, and ``more`` fields (JSON texts).

    ``past_stop``: the token is neither an end of the text nor a stop. It is for engines that hand nothing
    over then. D gets the client's own fields, and finds the end by itself.
    """
    drop, add = _DROPPED, {"max_tokens": b"1", "stream": b"false", **more}
    if body.has("max_completion_tokens"):
        add["max_completion_tokens"] = b"1"
    if past_stop:
        drop |= _STOPS
        add["min_tokens"] = b"1"
    return body.replace(drop, add)


def has_stopped(answer: bytes) -> bool:
    """Whether the one token of an answer was an end of the text, or a stop."""
    try:
        choices = _decode_choices(answer).choices
    except UNREADABLE:
        return False
    return any(choice.finish_reason == "stop" for choice in choices)


def counted(answer: bytes) -> tuple[int | None, int | None]:
    """Return the tokens of an answer's prompt, and how many were cached; ``None`` for what makes no sense.

    They are for learning only: without them the hand-off is as good.
    """
    with suppress(*UNREADABLE):
        return counted_in(_decode_answer(answer).usage)
    return None, None


def counted_in(usage: msgspec.Raw, cached: int | None = None) -> tuple[int | None, int | None]:
    """Return the same of the text of ``usage``; ``cached`` is what is known better of the cached ones."""
    tokens = None
    with suppress(*UNREADABLE):
        found = _decode_usage(usage) or _Usage()
        tokens = found.prompt_tokens or None
        if cached is None and found.prompt_tokens_details is not None:
            cached = found.prompt_tokens_details.cached_tokens
    return tokens, cached if tokens is None or cached is None else min(cached, tokens)
