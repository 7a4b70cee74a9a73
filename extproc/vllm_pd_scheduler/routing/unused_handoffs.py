"""Hand-offs that nobody will use: they are freed on their P, or left to the end of their lease."""

from __future__ import annotations

from ..fleet.registry import Registry
from ..handoff.interfaces import ReleaseHandoff
from ..handoff.pending import PendingHandoff
from ..telemetry import Telemetry
from .forward import Forward


class UnusedHandoffs:
    """Gives back hand-offs, each of them once."""

    def __init__(self, registry: Registry, telemetry: Telemetry) -> None:
        self.release: ReleaseHandoff | None = None
        """Frees one on its P; without it, each is left to its lease."""
        self._registry = registry
        self._telemetry = telemetry

    def free(self, pending: PendingHandoff) -> None:
        """Free a hand-off that nobody will use."""
        if not pending.handoff.pinned:
            return
        if self.release is not None:
            self.release(pending)
        else:
            self._stranded(pending)

    def free_of(self, forward: Forward) -> None:
        """Free a forward's hand-off, once."""
        if forward.pending is not None and not forward.freed:
            forward.freed = True
            self.free(forward.pending)

    def take_back(self, forward: Forward) -> None:
        """Free the hand-off of a request that was never sent; leave it to the lease if that is not sure."""
        if forward.ended_by_envoy:
            self.free_of(forward)
        else:
            self.leave_to_lease(forward)

    def leave_to_lease(self, forward: Forward) -> None:
        """Free the hand-off of a request by nothing but the end of its lease: its D may be using it."""
        if forward.pending is not None and not forward.freed:
            forward.freed = True
            self._stranded(forward.pending)

    def _stranded(self, pending: PendingHandoff) -> None:
        if pending.prefill in self._registry:  # what is gone has no series
            self._telemetry.handoffs.stranded(pending.prefill.id)
