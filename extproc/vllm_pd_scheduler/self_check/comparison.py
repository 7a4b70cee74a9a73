"""Whether two greedy answers to one prompt are of one KV cache."""

from __future__ import annotations

from enum import StrEnum

import msgspec

CLOSE = 1.0
"""How much less likely, as a difference of logarithms, the other token may be where two answers part.

Greedy answers part where two tokens are nearly as likely: another batch, another kernel or another size of
tensor parallelism rounds in another way, by some tenths at most. With a wrong cache they part where the right
one leaves no doubt.
"""
TOP = 5
"""Tokens of which an answer tells how likely they were, at each place."""


class Verdict(StrEnum):
    """What came of a try."""

    MATCH = "match"
    """Both answers are equal."""
    CLOSE = "close"
    """They part where two tokens were nearly as likely: that says nothing."""
    MISMATCH = "mismatch"
    """They part where they should not."""
    FAILED = "failed"
    """One of them did not come, or there was no hand-off."""
    SKIPPED = "skipped"
    """It was not tried: an instance had other things to do, or its protocol cannot be checked."""


class _Logprobs(msgspec.Struct):
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []


class _Choice(msgspec.Struct):
    text: str
    logprobs: _Logprobs | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]


_decode = msgspec.json.Decoder(_Answer).decode


def compare(split: bytes, whole: bytes) -> Verdict:
    """Return what two answers of ``/v1/completions`` say, both with status 200."""
    try:
        (one,), (other,) = _decode(split).choices, _decode(whole).choices
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        return Verdict.FAILED
    if not (one.text and other.text):
        return Verdict.FAILED
    if one.text == other.text:
        return Verdict.MATCH
    if one.logprobs is None or other.logprobs is None:
        return Verdict.MISMATCH
    for at, (mine, theirs) in enumerate(zip(one.logprobs.tokens, other.logprobs.tokens, strict=False)):
        if mine != theirs:
            near = _near(one.logprobs, at, theirs) and _near(other.logprobs, at, mine)
            return Verdict.CLOSE if near else Verdict.MISMATCH
    return Verdict.MISMATCH


def _near(said: _Logprobs, at: int, other: str) -> bool:
    """Whether another token was nearly as likely as the most likely one, which is what was chosen."""
    likely = said.top_logprobs[at] if at < len(said.top_logprobs) else None
    return likely is not None and other in likely and max(likely.values()) - likely[other] <= CLOSE
