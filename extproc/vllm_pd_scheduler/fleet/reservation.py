"""One request's claim on an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from .endpoint import Endpoint


class Reservation(Struct, eq=False):
    """One request's claim on an endpoint, counted from the moment of the pick until ``release``."""

    endpoint: Endpoint
    generation: int
    tokens: float = 0.0
    cost: float = 0.0
    """Predicted seconds of prefill."""
    wait: float = 0.0
    """Predicted seconds until its prefill begins."""
    at: float = 0.0
    """When it was made."""
    cached: float = 0.0
    """Prompt tokens that are taken for cached there."""
    blocks: Sequence[int] = ()
    """Of its prompt, if P reads that."""
    cached_blocks: int = 0
    """Of these, how many leading ones were taken for cached."""
    source: Endpoint | None = None
    """Another instance, from which it pulls what that has cached of the prompt."""
    pulled: float = 0.0
    """Prompt tokens that it is taken to pull."""
    alone: float = 0.0
    """Predicted seconds of prefill if it pulled nothing."""
    active: bool = True
    tentative: bool = False
    """Whether it may be given up for another P: then its prompt is not yet taken for cached there."""
    replica: str = ""
    """Which other replica's it is, if it is a place in a queue."""
    elsewhere: bool = False
    """Whether it is another replica's: then it stands for a place in a queue, or a trial, and no more."""

    @property
    def stands(self) -> bool:
        """Whether it has not ended, nor the process that it is a claim on."""
        return self.active and self.generation == self.endpoint.generation

    def release(self, now: float | None = None) -> None:
        """End the claim. Doing it twice is the same as once; after a restart of the instance, nothing."""
        if self._end():
            load = self.endpoint.prefill
            load.cancel(self, load.head_at if now is None else self.cancelled_at(now))

    def cancelled_at(self, now: float) -> float:
        """Return since when what is behind it can run, if it is given up ``now``.

        One that was not sent has kept P from nothing.
        """
        return self.endpoint.prefill.head_at if self.tentative else now

    def finish(self, now: float) -> float | None:
        """End a claim on prefill that was done; return the seconds it took, if the claim had not ended."""
        return self.endpoint.prefill.complete(self, now) if self._end() else None

    def _end(self) -> bool:
        """Return whether it had not ended, nor the process that it was a claim on."""
        if not self.active:
            return False
        self.active = False
        endpoint = self.endpoint
        if self.generation != endpoint.generation:
            return False
        endpoint.give_back(self)
        return True
