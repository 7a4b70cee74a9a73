"""What a process of its own is asked: the fleet as it was learned, and the requests to replay on it."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from ..records.traffic import Recorded


class Size(Struct, frozen=True):
    """How many engines of each role. An instance with data-parallel ranks is several."""

    prefill: int
    decode: int


class Learned(Struct, frozen=True):
    """What an engine takes, as the load model has learned it: means over the instances. Times in seconds."""

    overhead: float
    """Of each prefill."""
    per_token: float
    """Of each token of a prompt that is computed."""
    per_pair: float
    """Of each pair of tokens that attention compares."""
    base: float
    """Of each decode step."""
    per_seq: float
    """Of each request in it."""
    per_kv_token: float
    """Of each token of their contexts."""
    transfer: float
    """Of each hand-off."""
    transfer_per_token: float
    """Of each token of it."""
    prefill_capacity: float
    """Tokens that the KV cache of a P holds."""
    decode_capacity: float
    """And that of a D."""


class Question(Struct, frozen=True):
    """All but the requests, which follow it."""

    sizes: list[Size]
    """The fleets to compare, the present one first."""
    learned: Learned
    rate: float
    """How many times as many requests came to the fleet as are replayed."""
    shared: float
    """Share of the prompts' tokens that P had cached, where the prompts' blocks were not hashed; else 0."""
    settings: dict[str, Any]
    """Of the scheduler's configuration."""
    seconds: float
    """CPU time that the answer may take."""
    count_since: float = 0.0
    """Arrival of the first request that counts. Those before it are replayed, so that the fleet is loaded."""


class Times(Struct, frozen=True):
    """Times that nine of ten requests do not exceed, in seconds; ``None``: no request has one."""

    ttft: float | None
    tpot: float | None
    in_limits: float
    """Share of the requests within ``ttft_slo`` and ``tpot_slo``, as far as they are configured."""


class Outcome(Struct, frozen=True):
    """What the replay of a fleet gave."""

    size: Size
    whole: Times
    latest: Times
    """Of the later half of the requests."""
    prefill_busy: float
    """Share of the time in which a P computed: mean over P."""
    decode_kv: float
    """Share of the KV cache that was in use: mean over D and the time. A D computes all the time."""
    rejected: int
    requests: int
    """That were counted. The first find an idle fleet with empty caches, and are left out."""


class Answer(Struct, frozen=True):
    """The outcome of each size that there was time for."""

    outcomes: list[Outcome]
    skipped_seconds: float = 0.0
    """Of the requests, the oldest, that there was no time for."""


Requests = list[Recorded]
