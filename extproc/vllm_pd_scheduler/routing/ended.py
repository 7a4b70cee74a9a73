"""Requests whose answer has ended: what they count for is settled a moment later, then they are forgotten."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from ..telemetry import Ending
from .blame import Blame
from .forward import Forward
from .later import Later
from .never_sent import NeverSent
from .unused_handoffs import UnusedHandoffs

SETTLE_S = 0.25
"""How long after the end of a request its outcome is counted. Envoy tells of failures on another connection
than of ends: 0.2 ms later on an idle machine, seen up to some 10 ms on a busy one."""

REMEMBERED_S = 3.0
"""How long a request that has ended is remembered, for what Envoy may still tell of it."""

MAX_REMEMBERED_BYTES = 64 << 20
"""And how many bytes of hand-offs at most; one of a prompt of 128k tokens has some 50 KB."""


class EndedRequests:
    """Remembers forwards by their ids. What nobody has told of until it is settled is a success."""

    def __init__(
        self, blame: Blame, handoffs: UnusedHandoffs, clock: Callable[[], float], later: Later
    ) -> None:
        self.unsent = NeverSent()
        """What Envoy tells of requests that it never sent."""
        self._blame = blame
        self._handoffs = handoffs
        self._clock = clock
        self._later = later
        self._by_id: dict[str, Forward] = {}
        self._unsettled: deque[tuple[float, Forward]] = deque()
        self._remembered: deque[tuple[float, Forward]] = deque()
        self._remembered_bytes = 0
        self._waking = False

    def __iter__(self) -> Iterator[Forward]:
        return iter(self._by_id.values())

    def get(self, request: str) -> Forward | None:
        """Return the one with an id of ours, if it is remembered."""
        return self._by_id.get(request)

    def add(self, forward: Forward, now: float) -> None:
        """Remember one that has ended now."""
        self._by_id[forward.id] = forward
        self._unsettled.append((now, forward))
        if forward.pending is not None:
            self._remembered_bytes += len(forward.pending.handoff.params)
        self._remembered.append((now, forward))
        self.settle()

    def settle(self, after: float = SETTLE_S) -> None:
        """Count the requests that ended ``after`` seconds ago, and forget those of a while before."""
        now = self._clock()
        while self._unsettled and self._unsettled[0][0] <= now - after:
            self._settle(self._unsettled.popleft()[1])
        while self._remembered and (
            self._remembered[0][0] <= now - REMEMBERED_S or self._remembered_bytes > MAX_REMEMBERED_BYTES
        ):
            self._forget(self._remembered.popleft()[1])
        if (self._unsettled or self._remembered) and not self._waking:
            self._waking = True
            self._later(SETTLE_S if self._unsettled else REMEMBERED_S, self._wake)

    def _wake(self) -> None:
        self._waking = False
        self.settle()

    def _settle(self, forward: Forward) -> None:
        if self._never_sent(forward):
            forward.answering, forward.decision.ending = None, Ending.LEFT
            self._handoffs.take_back(forward)
        if forward.answering is not None:
            self._blame.served(forward, forward.answering)

    def _forget(self, forward: Forward) -> None:
        self._by_id.pop(forward.id, None)
        forward.close_trace(self._clock())
        if forward.pending is None:
            return
        self._remembered_bytes -= len(forward.pending.handoff.params)
        if self._never_sent(forward):
            self._handoffs.take_back(forward)

    def _never_sent(self, forward: Forward) -> bool:
        """Whether its client left before Envoy had our answer, so that no D has been asked."""
        if forward.failed_attempts or not self.unsent.left:  # as nearly always
            return False
        return self.unsent.has(forward.request_id, self._clock())
