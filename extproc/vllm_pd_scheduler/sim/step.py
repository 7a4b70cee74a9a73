"""What an engine reports: the outcome of a step, and of a fetch of blocks by another engine."""

from dataclasses import dataclass, field
from enum import Enum

from .request import EngineRequest


class Fetch(Enum):
    """The outcome of a fetch of pinned blocks."""

    GOOD = "good"
    STALE = "stale"
    """Nothing is pinned for that request, or other blocks are: what was read is another prompt's KV."""
    INVALID = "invalid"
    """One of the block ids does not exist in this engine."""


@dataclass(frozen=True, slots=True)
class Output:
    """A new token, number ``index`` (from 0) of the request's answer; ``finished`` if it is the last."""

    request: EngineRequest
    index: int
    finished: bool


@dataclass(slots=True)
class Step:
    """What one iteration did. Its outputs exist ``duration`` seconds after its start."""

    duration: float = 0.0
    prefill_tokens: int = 0
    decoding: int = 0
    """Requests that decoded."""
    outputs: list[Output] = field(default_factory=list)
    transfers: list[EngineRequest] = field(default_factory=list)
    """Requests whose KV the caller must fetch; it then calls ``transfer_done`` or ``transfer_failed``."""
    preempted: list[EngineRequest] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)
    """Ids of requests whose hand-off was not fetched within the lease."""

    @property
    def idle(self) -> bool:
        """Whether nothing was done: then another step is of use only after something else has changed."""
        return not (self.prefill_tokens or self.decoding or self.preempted)
