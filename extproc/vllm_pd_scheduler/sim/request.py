"""A request as the engine sees it: tokens to read and to write, and what becomes of its KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class HandOff(Enum):
    """What a request does with its KV cache beyond this engine."""

    NONE = "none"
    SEND = "send"
    """`do_remote_decode`: the blocks stay pinned after the last token, for another engine to fetch."""
    RECEIVE = "receive"
    """`do_remote_prefill`: the prompt's KV comes from another engine."""


class State(Enum):
    """Where a request is."""

    WAITING = "waiting"
    DEFERRED = "deferred"
    RUNNING = "running"
    PINNED = "pinned"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class EngineRequest:
    """A request and how far it has come. The caller fills the first five, the engine all others.

    `prompt_tokens` and `output_tokens` are at least 1. `block_hashes` are the chained hashes of the prompt's
    full blocks, first first: equal hashes mean equal tokens up to there; none means that nothing of it is
    shared or kept. Times are in the caller's clock.
    """

    request_id: str
    prompt_tokens: int
    output_tokens: int
    hand_off: HandOff = HandOff.NONE
    block_hashes: Sequence[int] = ()
    state: State = State.WAITING
    computed: int = 0
    generated: int = 0
    cached: int = 0
    """Prompt tokens that were in this engine's cache when the request was first scheduled."""
    remote: bool = False
    """The prompt's KV has come from another engine (or its coming has failed): do not ask for it again."""
    transfer_tokens: int = 0
    """Prompt tokens whose KV another engine is asked for: those beyond the cached ones."""
    arrived: float = 0.0
    started: float | None = None
    first_token: float | None = None
    last_token: float = 0.0

    @property
    def todo(self) -> int:
        """Tokens to compute before the next one is known: 1 while decoding."""
        return self.prompt_tokens + self.generated - self.computed
