"""For how long an endpoint that has said that it is full is left alone."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import force_setattr as _set

BUSY_PAUSE_S = 0.5
"""Seconds for which an instance that is full is left alone at first: a slot comes free about so soon."""
MAX_BUSY_PAUSE_S = 15.0
"""And at most: it may be free long before."""


class FullPause(Struct, frozen=True, eq=False):
    """The pause of one endpoint. Strategies can only read it."""

    until: float = 0.0
    """When it ends, in the caller's time."""
    answers: int = 0
    """How often the endpoint has said that it is full since it last served a request."""

    def begin(self, now: float, retry_after: float | None) -> None:
        """Begin one: as long as the endpoint asks, else longer each time until it serves a request."""
        pause = BUSY_PAUSE_S * 2 ** min(self.answers, 5) if retry_after is None else retry_after
        _set(self, "answers", self.answers + 1)
        _set(self, "until", now + min(max(pause, BUSY_PAUSE_S), MAX_BUSY_PAUSE_S))

    def served(self) -> None:
        """Note a request that went well: the next pause is a short one."""
        _set(self, "answers", 0)

    def forget(self) -> None:
        """End it: the process is another one."""
        _set(self, "until", 0.0)
        _set(self, "answers", 0)
