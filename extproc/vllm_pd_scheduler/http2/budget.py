"""Limits what costs the peer nothing and us something: frames that move no bytes, streams that are left."""

from __future__ import annotations


class Budget:
    """Tokens that are spent one at a time, grow with time, and are earned by useful work. Reads no clock.

    ``most`` is how many there can be, and are at first; ``per_second`` how many come by themselves.
    """

    __slots__ = ("_at", "_left", "_most", "_per_second")

    def __init__(self, most: float, per_second: float) -> None:
        self._most = self._left = most
        self._per_second = per_second
        self._at = 0.0

    def spend(self, now: float) -> bool:
        """Take a token; return whether there was one."""
        self._left -= 1
        if self._left >= 0:
            return True
        self._left = min(self._most, self._left + (now - self._at) * self._per_second)
        self._at = now
        return self._left >= 0

    def earn(self, tokens: float) -> None:
        """Add tokens."""
        self._left = min(self._most, self._left + tokens)
