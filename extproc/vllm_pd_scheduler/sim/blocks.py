"""The KV blocks of one engine: which request holds which, and which are cached for later prompts."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice


class BlockPool:
    """Allocates blocks to holders (requests), with reference counts and prefix caching as in vLLM.

    Ids are 1 to ``size``; vLLM keeps 0 as the null block. A block that was registered under a hash stays
    cached when nobody holds it any more, until it is allocated again. The one that was freed first is
    allocated first. Holders share cached blocks.
    """

    def __init__(self, size: int, *, caching: bool = True) -> None:
        self.size = size
        self._caching = caching
        # In the order in which they are allocated again; a dict, since a cached block can be reused from the
        # middle.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, size + 1))
        self._blocks: dict[str, list[int]] = {}
        self._ref_counts = [0] * (size + 1)
        self._hash_of: dict[int, int] = {}
        # Usually one block for each hash. Two requests that compute the same prompt at the same time have one
        # each.
        self._cached: dict[int, list[int]] = {}
        self.changes: list[tuple[int, bool]] | None = None
        """If it is a list: each hash that was cached (True) or is not any more (False), for who watches."""

    @property
    def used(self) -> int:
        """Number of blocks that are held."""
        return self.size - len(self._free)

    @property
    def free(self) -> int:
        """Number of blocks that nobody holds, cached or not."""
        return len(self._free)

    def find(self, hashes: Sequence[int], limit: int) -> list[int]:
        """Return the cached blocks of the first ``limit`` hashes, up to the first one that is not cached."""
        found: list[int] = []
        for key in islice(hashes, limit) if self._caching else ():
            copies = self._cached.get(key)
            if copies is None:
                break
            found.append(copies[0])
        return found

    def fits(self, holder: str, total: int, shared: Sequence[int] = ()) -> bool:
        """Whether ``grow`` with these arguments would succeed."""
        return self._blocks_to_allocate(holder, total, shared) + self._unreferenced(shared) <= len(self._free)

    def grow(self, holder: str, total: int, shared: Sequence[int] = ()) -> bool:
        """Allocate blocks to a holder until it has ``total``; return whether enough were free.

        If not, nothing changes. A holder that has none yet can start with ``shared`` blocks, which ``find``
        has just returned.
        """
        missing = self._blocks_to_allocate(holder, total, shared)
        if missing <= 0 and not shared:
            return True
        if missing + self._unreferenced(shared) > len(self._free):
            return False
        blocks = self._blocks.setdefault(holder, [])
        for block in shared:
            if not self._ref_counts[block]:
                del self._free[block]
            self._ref_counts[block] += 1
        blocks.extend(shared)
        blocks.extend(self._allocate() for _ in range(missing))
        return True

    def register(self, holder: str, hashes: Sequence[int], start: int, stop: int) -> None:
        """Cache the holder's blocks from index ``start`` to before ``stop`` under the hashes there."""
        if not self._caching:
            return
        blocks = self._blocks[holder]
        for index in range(start, min(stop, len(hashes))):
            block, key = blocks[index], hashes[index]
            if block not in self._hash_of:
                self._hash_of[block] = key
                copies = self._cached.setdefault(key, [])
                copies.append(block)
                if self.changes is not None and len(copies) == 1:
                    self.changes.append((key, True))

    def release(self, holder: str) -> None:
        """Free all blocks of a holder, if it has any.

        As in vLLM 0.32 (``FreeKVCacheBlockQueue``), cached ones are allocated again last, the end of a prompt
        before its beginning, so that common prefixes stay longest. The others are allocated again first.
        """
        for block in reversed(self._blocks.pop(holder, ())):
            self._ref_counts[block] -= 1
            if not self._ref_counts[block]:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def blocks(self, holder: str) -> list[int]:
        """Return a copy of the holder's block ids, in the order of its tokens."""
        return list(self._blocks.get(holder, ()))

    def counts(self) -> dict[str, int]:
        """Return the number of blocks of each holder."""
        return {holder: len(blocks) for holder, blocks in self._blocks.items()}

    def _blocks_to_allocate(self, holder: str, total: int, shared: Sequence[int]) -> int:
        blocks = self._blocks.get(holder)
        return total - (len(blocks) if blocks else len(shared))

    def _unreferenced(self, shared: Sequence[int]) -> int:
        """Return how many of these blocks are free now and would have to be taken from the free ones."""
        return sum(not self._ref_counts[block] for block in shared)

    def _allocate(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._ref_counts[block] = 1
        key = self._hash_of.pop(block, None)
        if key is not None:
            copies = self._cached[key]
            copies.remove(block)
            if not copies:
                del self._cached[key]
                if self.changes is not None:
                    self.changes.append((key, False))
        return block
