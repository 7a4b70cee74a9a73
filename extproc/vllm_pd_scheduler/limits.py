"""Limits on what may happen how often."""

from __future__ import annotations

from collections import deque

_WINDOW = 100


class ShareLimit:
    """Lets at most a share (0 to 1) of the last hundred requests be of some kind."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._recent: deque[bool] = deque()
        self._count = 0

    def take(self, of_the_kind: bool) -> bool:
        """Record a request; return whether it may be served. One that may not is recorded as not of it."""
        if len(self._recent) == _WINDOW:
            self._count -= self._recent.popleft()
        allowed = not of_the_kind or self._count + 1 <= self._share * _WINDOW
        counted = of_the_kind and allowed
        self._recent.append(counted)
        self._count += counted
        return allowed
