"""Where prompts are cached, as it was told lately: to refer to it, and to tell it once more."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from ..fleet.endpoint import Endpoint

_MAX_KEPT = 1024
_MAX_KEPT_BLOCKS = 25_000

Placed = tuple[Endpoint, Sequence[int]]


class Told:
    """What we have told, of which the others know at least as much (see :class:`Heard`)."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, Endpoint, Sequence[int]]] = deque()
        """Message, endpoint and blocks, the oldest first."""
        self._blocks = 0
        self._prefills: dict[int, int] = {}
        """The number of the prefill that has told a chain of blocks, by the hash of its last one."""

    def add(self, message: int, endpoint: Endpoint, blocks: Sequence[int], prefill: int = 0) -> None:
        """Note that a message tells of a prompt: by a prefill, if it has a number."""
        kept = self._kept
        kept.append((message, endpoint, blocks))
        self._blocks += len(blocks)
        if prefill:
            self._prefills[blocks[-1]] = prefill
        while self._blocks > _MAX_KEPT_BLOCKS or len(kept) > _MAX_KEPT:
            oldest = kept.popleft()[2]
            self._blocks -= len(oldest)
            self._prefills.pop(oldest[-1], None)

    def prefill_of(self, blocks: Sequence[int]) -> int:
        """Return the number of a prefill that has told these blocks; 0 if none has."""
        return self._prefills.get(blocks[-1], 0)

    def by(self, first: int, last: int) -> Iterator[Placed]:
        """Yield what messages with these numbers have told, the newest first."""
        for message, endpoint, blocks in reversed(self._kept):
            if message < first:
                return
            if message <= last:
                yield endpoint, blocks


class Heard:
    """The blocks of one other's newest prefills, to which it may refer."""

    def __init__(self) -> None:
        self._blocks: dict[int, Sequence[int]] = {}
        self._count = 0

    def add(self, prefill: int, blocks: Sequence[int]) -> None:
        """Keep the blocks of a prefill: of twice as many as the other keeps."""
        known = self._blocks
        if prefill in known:
            self._count -= len(known.pop(prefill))
        known[prefill] = blocks
        self._count += len(blocks)
        while len(known) > 2 * _MAX_KEPT or self._count > 2 * _MAX_KEPT_BLOCKS:
            self._count -= len(known.pop(next(iter(known))))

    def get(self, prefill: int) -> Sequence[int]:
        """Return the blocks of a prefill; none if they are not known."""
        return self._blocks.get(prefill, ())
