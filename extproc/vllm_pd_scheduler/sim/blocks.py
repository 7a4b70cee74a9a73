"""The KV blocks of one engine: who holds which, and which prompt blocks are still cached."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice


class BlockPool:
    """Hands out block ids 1…size to named holders. Id 0 is never used: vLLM keeps it as the null block.

    A block that was registered under a hash stays cached when nobody holds it any more, until it is taken
    for something else: the least recently freed one first. Holders may share cached blocks.
    """

    def __init__(self, size: int, *, caching: bool = True) -> None:
        self.size = size
        self._caching = caching
        # The next to be taken first; a dict because a cached block is taken out of the middle.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, size + 1))
        self._held: dict[str, list[int]] = {}
        self._holders = [0] * (size + 1)
        self._hash: dict[int, int] = {}
        # Blocks by hash. Usually one; two requests that computed one prompt at the same time have one each.
        self._cached: dict[int, list[int]] = {}

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.size - len(self._free)

    @property
    def free(self) -> int:
        """Blocks that nobody holds, cached or not."""
        return len(self._free)

    def find(self, hashes: Sequence[int], limit: int) -> list[int]:
        """The cached blocks of the first `limit` hashes, up to the first that is not cached."""
        found: list[int] = []
        for key in islice(hashes, limit) if self._caching else ():
            blocks = self._cached.get(key)
            if blocks is None:
                break
            found.append(blocks[0])
        return found

    def fits(self, holder: str, total: int, shared: Sequence[int] = ()) -> bool:
        """Whether `grow` would succeed."""
        return self._missing(holder, total, shared) + self._idle(shared) <= len(self._free)

    def grow(self, holder: str, total: int, shared: Sequence[int] = ()) -> bool:
        """Let the holder have `total` blocks in all; False, with nothing changed, when too few are free.

        A holder that has none yet may begin with `shared` blocks, which `find` has just found.
        """
        missing = self._missing(holder, total, shared)
        if missing <= 0 and not shared:
            return True
        if missing + self._idle(shared) > len(self._free):
            return False
        held = self._held.setdefault(holder, [])
        for block in shared:
            if not self._holders[block]:
                del self._free[block]
            self._holders[block] += 1
        held.extend(shared)
        held.extend(self._take() for _ in range(missing))
        return True

    def register(self, holder: str, hashes: Sequence[int], start: int, stop: int) -> None:
        """The holder's blocks number `start` to `stop` (not included) now hold what these hashes name."""
        if not self._caching:
            return
        held = self._held[holder]
        for index in range(start, min(stop, len(hashes))):
            block, key = held[index], hashes[index]
            if block not in self._hash:
                self._hash[block] = key
                self._cached.setdefault(key, []).append(block)

    def release(self, holder: str) -> None:
        """Let go of all that the holder has; nothing happens when it has nothing.

        As in vLLM 0.32, what is cached goes to the end of the line, the last block of a prompt before its
        first, so that common beginnings live longest; what is not cached is taken again first.
        """
        for block in reversed(self._held.pop(holder, ())):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                if block not in self._hash:
                    self._free.move_to_end(block, last=False)

    def blocks(self, holder: str) -> list[int]:
        """The holder's block ids in the order of its tokens, a copy."""
        return list(self._held.get(holder, ()))

    def holders(self) -> dict[str, int]:
        """Blocks by holder."""
        return {holder: len(blocks) for holder, blocks in self._held.items()}

    def _missing(self, holder: str, total: int, shared: Sequence[int]) -> int:
        held = self._held.get(holder)
        return total - (len(held) if held else len(shared))

    def _idle(self, shared: Sequence[int]) -> int:
        return sum(not self._holders[block] for block in shared)

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._holders[block] = 1
        key = self._hash.pop(block, None)
        if key is not None:
            copies = self._cached[key]
            copies.remove(block)
            if not copies:
                del self._cached[key]
        return block
