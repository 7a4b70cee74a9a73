"""What a router that listens to KV events knows of each prefix cache: all of it, but late."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Cache:
    """The blocks of an instance as its events tell."""

    known: set[int] = field(default_factory=set)
    coming: deque[tuple[float, int, bool]] = field(default_factory=deque)
    """Events that the router has not seen yet: when they happened, which block, and whether it is cached."""
    expected: dict[int, float] = field(default_factory=dict)
    """Blocks that it takes for cached without an event, and until when."""


class CacheEvents:
    """The KV events of all instances, which arrive ``delay`` seconds after what they tell of."""

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._caches: dict[str, _Cache] = {}

    def happened(self, instance: str, changes: list[tuple[int, bool]], at: float) -> None:
        """Take what an instance has cached (True) or evicted (False) at a time."""
        coming = self._caches.setdefault(instance, _Cache()).coming
        coming.extend((at, block, cached) for block, cached in changes)

    def expect(self, instance: str, blocks: Sequence[int], until: float) -> None:
        """Take blocks for cached until a time, since their prompt was sent there."""
        expected = self._caches.setdefault(instance, _Cache()).expected
        for block in blocks:
            expected[block] = until

    def cached_blocks(self, instance: str, blocks: Sequence[int], now: float) -> int:
        """Return how many leading blocks of a prompt are cached there, as far as is known now."""
        cache = self._caches.get(instance)
        if cache is None:
            return 0
        known, coming, seen = cache.known, cache.coming, now - self._delay
        while coming and coming[0][0] <= seen:
            _, block, cached = coming.popleft()
            (known.add if cached else known.discard)(block)
        for number, block in enumerate(blocks):
            if block not in known and cache.expected.get(block, -1.0) < now:
                return number
        return len(blocks)
