"""A hand-off between its prefill and its decode."""

from __future__ import annotations

from msgspec import Struct

from ..connectors import Attempt, Handoff
from ..fleet.endpoint import Endpoint


class PendingHandoff(Struct, eq=False, gc=False):
    """A hand-off that P holds for one decode: which P, until when it may be used, and for which model."""

    handoff: Handoff
    prefill: Endpoint
    attempt: Attempt
    """Of which it has come."""
    deadline: float
    """Monotonic seconds after which P's blocks may be someone else's."""
    model: str | None = None
    decode: Endpoint | None = None
    """The only D that it is for; ``None``: any."""
    losses: int = 0
    """Connections that the request has lost at other P after it was delivered there."""
