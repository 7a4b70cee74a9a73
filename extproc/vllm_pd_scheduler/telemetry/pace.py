"""When a line may be logged again, where each request could bring one."""

from __future__ import annotations

from collections.abc import Callable, Hashable

LOG_INTERVAL_S = 60.0
"""Least time between two log lines that say the same."""
MAX_KEYS = 1000
"""Keys of the last minute at most: some have an address in them, of which callers may have any number."""


class Pace:
    """Lets what has the same key pass at most once a minute. ``clock`` returns monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next_at: dict[Hashable, float] = {}

    def due(self, key: Hashable) -> bool:
        """Whether it may be logged now; then not again for a minute."""
        now = self._clock()
        if now < self._next_at.get(key, now):
            return False
        if len(self._next_at) >= MAX_KEYS:
            self._next_at = {each: at for each, at in self._next_at.items() if at > now}
            if len(self._next_at) >= MAX_KEYS:
                return False  # a flood: it was told of often enough
        self._next_at[key] = now + LOG_INTERVAL_S
        return True
