"""Bytes of request bodies that this process holds: counted, and never more than it may."""

from __future__ import annotations


class BodyMemory:
    """What all requests hold together, at most ``limit``, and one of them at most ``largest``."""

    def __init__(self, limit: int, largest: int) -> None:
        self.limit = limit
        self.largest = min(limit, largest)
        self.total = 0


class HeldBody:
    """The part of one request. ``release`` must be called when its body is let go of."""

    __slots__ = ("_all", "_size")

    def __init__(self, held: BodyMemory) -> None:
        self._all = held
        self._size = 0

    def resize(self, size: int) -> bool:
        """HeldBody so many bytes; ``False``, with nothing changed, if that is too many, alone or in all."""
        total = self._all.total + size - self._size
        if size > self._all.largest or total > self._all.limit:
            return False
        self._all.total, self._size = total, size
        return True

    def release(self) -> None:
        """HeldBody nothing. Doing it twice is the same as once."""
        self.resize(0)
