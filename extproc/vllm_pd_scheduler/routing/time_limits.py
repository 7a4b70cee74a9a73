"""How long an instance may take: for the first byte of an answer, and with a hand-off."""

from __future__ import annotations

import math

from ..config import SchedulerConfig
from ..request.context import RequestContext

LEASE_SHARE = 0.8
"""Share of the lease (``kv_lease_duration``) in which a hand-off may be used; the rest is for what cannot be
seen: the way of P's answer to us, and D's own queue."""

MAX_TOKENS = 10_000_000
"""More than any context has: a client that asks for more tokens than this gets no longer limit for it."""

UNKNOWN_TOKENS = 32_768
"""What an answer in one piece may have whose client names no limit, before its D is taken to hang."""


def handoff_deadline(config: SchedulerConfig, now: float, lease: float | None = None) -> float:
    """Return until when a hand-off that has come at ``now`` may be used, in the same clock's seconds.

    ``lease`` is for how long P keeps it, in seconds, if its connector says so.
    """
    return now + (config.kv_lease_duration if lease is None else lease) * LEASE_SHARE


def first_byte_timeout(
    config: SchedulerConfig, context: RequestContext, factor: float = 1.0, left: float = math.inf
) -> float:
    """Return how many seconds D may take to its first byte: with a stream that is its headers, else all.

    ``factor`` multiplies the configured limits (see :mod:`.patience`). ``left`` is how long the hand-off may
    be used: a byte that comes later may be of one that is too old, fetched by a D that was frozen meanwhile.
    Only an answer in one piece that takes longer by itself gets more.
    """
    limit = config.decode_first_byte_timeout * factor
    if context.stream:
        return min(limit, left)
    tokens = context.answer_limit or UNKNOWN_TOKENS
    decoding = min(tokens, MAX_TOKENS) * config.decode_seconds_per_token * factor
    return limit + decoding if decoding > left else min(limit + decoding, left)


def passed_timeout(config: SchedulerConfig, size: int, stream: bool, factor: float = 1.0) -> float:
    """Return how many seconds D may take to the first byte of what is not split, with a body of ``size``.

    How long such an answer takes is not known, so one in one piece has the time of :data:`UNKNOWN_TOKENS`.
    Without a body nothing is generated.
    """
    tokens = 0 if stream or not size else UNKNOWN_TOKENS
    return (config.decode_first_byte_timeout + tokens * config.decode_seconds_per_token) * factor
