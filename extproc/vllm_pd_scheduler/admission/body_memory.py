"""Account of the bytes of request bodies that this process keeps in memory, so that they stay bounded."""

from __future__ import annotations


class BodyMemory:
    """The budget that all request bodies share.

    ``limit`` bounds their sum in bytes, ``largest`` a single one. ``used`` is their sum now.
    """

    def __init__(self, limit: int, largest: int) -> None:
        self.used = 0
        self.resize(limit, largest)

    def resize(self, limit: int, largest: int) -> None:
        """Have other bounds from now on. What is kept already stays."""
        self.limit = limit
        self.largest = min(limit, largest)


class BodyAllocation:
    """The bytes of :class:`BodyMemory` that one request uses.

    It starts with none. Whoever makes one calls ``release`` when the body is no longer in memory.
    """

    __slots__ = ("_memory", "size")

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self.size = 0

    def resize(self, size: int) -> bool:
        """Set the allocation to ``size`` bytes and return whether there was room.

        Without room (for this body alone, or for the sum of all) nothing changes.
        """
        used = self._memory.used + size - self.size
        if size > self._memory.largest or used > self._memory.limit:
            return False
        self._memory.used, self.size = used, size
        return True

    def keep(self, size: int) -> None:
        """Count a body that is in memory already, whether there is room or not."""
        self._memory.used += size - self.size
        self.size = size

    def release(self) -> None:
        """Give all bytes back. Further calls do nothing."""
        if self.size:
            self.resize(0)
