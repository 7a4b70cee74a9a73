"""Names for what an engine has cached that are the same for all engines: hashes of tokens, chained.

Engines name a block by a hash of their own, which another engine or version computes in another way. Events
have the tokens too, so both names are known, and an event that only names blocks can be understood.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from xxhash import xxh3_64_intdigest

from .message import Cleared, EngineHash, Event, Removed, Stored

MARK_TOKENS = 256
"""Only blocks that end at a multiple of so many tokens are told, or all if they are as long: enough for the
scheduler's blocks of a prompt, which have about as many."""

MAX_BLOCKS = 1_000_000
"""Blocks of one engine that are remembered, some 150 bytes each; later ones are left out."""


def marks(token_ids: Sequence[int], block_size: int) -> dict[int, int]:
    """Return the names of a prompt's marked blocks, by the tokens up to their ends."""
    named = _chained(_root(block_size), 0, token_ids, block_size, ())
    return {end: name for end, name in named if _is_marked(end, block_size)}


class EngineBlocks:
    """What one engine has cached, as its events tell it."""

    def __init__(self) -> None:
        self.block_size = 0
        """Tokens; 0 until a block was stored."""
        self._known: dict[EngineHash, tuple[int, int]] = {}
        """The chained hash of each block, and the tokens up to its end."""

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forget all, since the engine is another one now, or has said so."""
        self._known.clear()

    def apply(self, events: Iterable[Event]) -> list[tuple[int, bool] | None]:
        """Return the marked blocks that came (true) or went, in their order; ``None``: all went."""
        changes: list[tuple[int, bool] | None] = []
        for event in events:
            match event:
                case Stored():
                    changes += self._store(event)
                case Removed():
                    gone = [self._known.pop(each) for each in event.hashes if each in self._known]
                    changes += [(name, False) for name, end in gone if _is_marked(end, self.block_size)]
                case Cleared():
                    self.clear()
                    changes = [None]
        return changes

    def _store(self, event: Stored) -> list[tuple[int, bool]]:
        if event.block_size != self.block_size:
            self.clear()  # another engine: none changes it while it runs
            self.block_size = event.block_size
        parent = (_root(event.block_size), 0) if event.parent is None else self._known.get(event.parent)
        if parent is None or len(self._known) + len(event.hashes) > MAX_BLOCKS:
            return []  # what is before it was not told, or there is too much
        found = []
        blocks = _chained(*parent, event.token_ids, event.block_size, event.extra)
        for engine_hash, (end, name) in zip(event.hashes, blocks, strict=True):
            self._known[engine_hash] = name, end
            if _is_marked(end, event.block_size):
                found.append((name, True))
        return found


def _root(block_size: int) -> int:
    return block_size


def _is_marked(end: int, block_size: int) -> bool:
    return end % MARK_TOKENS < block_size


def _chained(
    before: int, end: int, token_ids: Sequence[int], block_size: int, extra: Sequence[str]
) -> Iterable[tuple[int, int]]:
    """Yield for each whole block the tokens up to its end, and its name."""
    data = array("Q", token_ids).tobytes()
    width = 8 * block_size
    for number in range(len(token_ids) // block_size):
        content = data[number * width : (number + 1) * width]
        if extra and extra[number]:
            content += extra[number].encode()
        before = xxh3_64_intdigest(content, before)
        end += block_size
        yield end, before
