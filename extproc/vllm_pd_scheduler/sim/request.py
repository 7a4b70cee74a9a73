"""A request as the engine sees it: tokens to read and to write, its state, and where its KV cache goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class HandOff(Enum):
    """Whether a request's KV cache goes to another engine or comes from one."""

    NONE = "none"
    SEND = "send"
    """``do_remote_decode``: after the last token its blocks stay pinned for another engine to fetch."""
    RECEIVE = "receive"
    """``do_remote_prefill``: the prompt's KV is fetched from another engine."""


class State(Enum):
    """The state of a request in the engine::

        WAITING ─▶ RUNNING ─▶ GONE              without a hand-off
        WAITING ─▶ RUNNING ─▶ PINNED ─▶ GONE    SEND: pinned until fetched, released or expired
        WAITING ─▶ DEFERRED ─▶ WAITING ─▶ …     RECEIVE: deferred until its KV has come

    A preempted request goes from RUNNING back to WAITING; an aborted one from any state to GONE.
    """

    WAITING = "waiting"
    DEFERRED = "deferred"
    RUNNING = "running"
    PINNED = "pinned"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class EngineRequest:
    """A request and its progress. The caller sets the first five fields, the engine all others.

    Times are in seconds of the caller's clock.
    """

    request_id: str
    prompt_tokens: int
    """At least 1."""
    output_tokens: int
    """Tokens to generate, at least 1."""
    hand_off: HandOff = HandOff.NONE
    block_hashes: Sequence[int] = ()
    """Chained hashes of the full blocks of the prompt: equal hashes mean equal tokens up to there.

    Those of the answer's blocks may follow, if they are known before: then the engine that writes the answer
    caches it too, for a prompt that continues it. Without hashes the prompt uses no cached blocks and leaves
    none.
    """
    state: State = State.WAITING
    computed: int = 0
    """Tokens, of the prompt and the answer, whose KV is in the engine's blocks."""
    generated: int = 0
    """Tokens of the answer."""
    cached: int = 0
    """Prompt tokens that were in this engine's cache when the request was first scheduled."""
    transfer_ended: bool = False
    """Whether its KV has come, or the transfer failed, or the KV was lost: it is not fetched again."""
    transfer_tokens: int = 0
    """Prompt tokens whose KV is fetched: those that are not cached here."""
    arrived: float = 0.0
    started: float | None = None
    """When it was first scheduled."""
    first_token: float | None = None
    last_token: float = 0.0

    @property
    def uncomputed(self) -> int:
        """Tokens to compute before the next token is known: 1 while decoding."""
        return self.prompt_tokens + self.generated - self.computed
