"""Limits on what may happen how often."""

from __future__ import annotations

from collections import deque

_WINDOW = 100


class ShareLimit:
    """Lets at most a share (0 to 1) of the last hundred requests be of some kind."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._recent: deque[bool] = deque()
        self._count = 0

    @property
    def reached(self) -> bool:
        """Whether a further request of the kind may not be served now."""
        forgotten = self._recent[0] if len(self._recent) == _WINDOW else 0
        return self._count - forgotten + 1 > self.share * _WINDOW

    def take(self, of_the_kind: bool) -> bool:
        """Record a request; return whether it may be served. One that may not is recorded as not of it."""
        allowed = not (of_the_kind and self.reached)
        if len(self._recent) == _WINDOW:
            self._count -= self._recent.popleft()
        counted = of_the_kind and allowed
        self._recent.append(counted)
        self._count += counted
        return allowed
