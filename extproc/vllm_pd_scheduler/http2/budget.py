"""Limits what costs the peer nothing and us something: frames that move no bytes, streams that are left."""

from __future__ import annotations

from .frames import ConnectionViolation, ErrorCode


class Budget:
    """Tokens that are spent one at a time, grow with time, and are earned by useful work. Reads no clock.

    ``most`` is how many there can be, and are at first; ``per_second`` how many come by themselves.
    ``excess`` says what there is too much of when none is left.
    """

    __slots__ = ("_at", "_excess", "_left", "_most", "_per_second")

    def __init__(self, most: float, per_second: float, excess: str) -> None:
        self._most = self._left = most
        self._per_second = per_second
        self._excess = excess
        self._at = 0.0

    def spend(self, now: float) -> None:
        """Take a token; raise :exc:`.frames.ConnectionViolation` if there is none."""
        self._left -= 1
        if self._left >= 0:
            return
        self._left = min(self._most, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 0:
            raise ConnectionViolation(ErrorCode.ENHANCE_YOUR_CALM, self._excess)

    def earn(self, tokens: float) -> None:
        """Add tokens."""
        self._left = min(self._most, self._left + tokens)
