"""Which instance holds which prompt prefix, as far as the requests sent there tell.

A prompt is a chain of blocks. A block's number is a hash of the whole prompt up to its end, so it stands for
the prefix and not for its own text alone. Whoever holds a block holds all before it, since a prompt is used
from its first block on and evicted from its last; so :meth:`PrefixIndex.match` looks only for the places at
which holders drop out, and visits few blocks of a long prompt.

For each block there is the set of its holders, as the bits of an int, and for each holder its blocks by last
use. That takes 150 to 220 bytes a block, as dicts grow in steps: 1.7 GiB for 1,000 holders of 10,000 each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import compress, islice

DEFAULT_CAPACITY = 10_000
"""Blocks that a holder keeps unless told. With 256 tokens in each, 2.5 million tokens: eight 80 GB GPUs have
room for about 1.3 million of Llama 3 70B's, at 320 KiB each."""

_TABLES = 256
_SPARSE = 12  # up to so many bits of a mask are looked at one by one, beyond that all at once
_BOOLEANS = bytes.maketrans(b"01", b"\0\1")


class PrefixIndex:
    """Holders by block. Blocks are ints from 0 to 2**60 - 1, spread evenly."""

    def __init__(self) -> None:
        # Many tables, since a dict with a million entries stops everything for 70 ms when it grows.
        self._tables: list[dict[int, int]] = [{} for _ in range(_TABLES)]
        self._holders: list[Holder] = []
        self._free: list[int] = []

    def add(self, capacity: int | None = None) -> Holder:
        """Return a new holder, of nothing yet.

        ``capacity`` is in blocks, by default :data:`DEFAULT_CAPACITY`; raises :exc:`ValueError` if negative.
        """
        slot = self._free[-1] if self._free else len(self._holders)
        holder = Holder(self, slot, DEFAULT_CAPACITY if capacity is None else capacity)
        self._holders[slot : slot + 1] = [holder]
        del self._free[-1:]
        return holder

    def match(self, blocks: Sequence[int]) -> dict[Holder, int]:
        """Return how many of the leading ``blocks`` each holder has, without those that have none.

        The holder of the longest prefix comes last. ``blocks`` is a chain, from a prompt's first block on.
        """
        depths: dict[Holder, int] = {}
        depth, mask = 0, self._mask(blocks[0]) if blocks else 0
        while mask:
            depth, after = self._next_change(blocks, depth, mask)
            depths.update(dict.fromkeys(self._holders_in(mask ^ after), depth))
            mask = after
        return depths

    def __len__(self) -> int:
        """Blocks held, over all holders."""
        return sum(map(len, self._holders))

    def _mask(self, block: int) -> int:
        return self._tables[block % _TABLES].get(block, 0)

    def _next_change(self, blocks: Sequence[int], low: int, mask: int) -> tuple[int, int]:
        """Return the first position after ``low`` that other holders have than ``mask``, and these.

        Holders only drop out along a chain, so where two masks are equal, so are all between them.
        """
        step, high, after = 1, len(blocks), 0
        while low + step < high:
            found = self._mask(blocks[low + step])
            if found != mask:
                high, after = low + step, found
                break
            low += step
            step *= 2
        while high - low > 1:
            middle = (low + high) // 2
            found = self._mask(blocks[middle])
            if found == mask:
                low = middle
            else:
                high, after = middle, found
        return high, after

    def _holders_in(self, mask: int) -> Iterable[Holder]:
        if mask.bit_count() > _SPARSE:
            return compress(self._holders, bin(mask)[:1:-1].encode().translate(_BOOLEANS))
        found = []
        while mask:
            holder = self._holders[mask.bit_length() - 1]
            found.append(holder)
            mask ^= holder._bit
        return found

    # Neighbours mostly have the same holders. Sharing one int among them saves time, and 160 bytes a block.

    def _mark(self, blocks: Iterable[int], bit: int) -> None:
        tables, before, after = self._tables, 0, bit
        for block in blocks:
            table = tables[block % _TABLES]
            mask = table.get(block, 0)
            if mask is not before:
                before, after = mask, mask | bit if mask else bit
            table[block] = after

    def _unmark(self, blocks: Iterable[int], bit: int) -> None:
        tables, before, after = self._tables, bit, 0
        for block in blocks:
            table = tables[block % _TABLES]
            mask = table[block]
            if mask is not before:
                before, after = mask, mask ^ bit
            if after:
                table[block] = after
            else:
                del table[block]


class Holder:
    """One instance's blocks, up to ``capacity``; made by :meth:`PrefixIndex.add`."""

    __slots__ = ("_bit", "_blocks", "_closed", "_index", "_slot", "capacity")

    def __init__(self, index: PrefixIndex, slot: int, capacity: int) -> None:
        self.capacity = _checked(capacity)
        self._index = index
        self._slot = slot
        self._bit = 1 << slot
        self._closed = False
        # The least recently used comes first. Values are the keys, to keep one int object for each block.
        self._blocks: dict[int, int] = {}

    def store(self, blocks: Sequence[int]) -> None:
        """Record that the instance holds a prompt's blocks and used them now; what is too much is evicted.

        As in vLLM, of blocks last used by one request the last go first, and of more than ``capacity`` the
        first are kept. Nothing happens on a closed holder: a request may end after its instance has left.
        """
        mine, chain = self._blocks, blocks[: self.capacity]
        known = bisect_left(chain, True, key=lambda block: block not in mine)
        new = chain[known:][::-1]
        used = list(map(mine.pop, chain[:known][::-1]))
        self._evict(len(mine) + len(chain) - self.capacity)
        self._index._mark(new, self._bit)
        mine.update(zip(new, new, strict=True))
        mine.update(zip(used, used, strict=True))

    def resize(self, capacity: int) -> None:
        """Change the capacity, in blocks; raises :exc:`ValueError` if it is negative."""
        if not self._closed:
            self.capacity = _checked(capacity)
            self._evict(len(self._blocks) - capacity)

    def clear(self) -> None:
        """Forget all blocks: the instance was restarted. 10,000 take 4 to 8 ms."""
        self._index._unmark(self._blocks, self._bit)
        self._blocks = {}

    def close(self) -> None:
        """Forget all blocks and take no more: the instance is gone. Doing it twice is the same as once."""
        if not self._closed:
            self.clear()
            self._closed, self.capacity = True, 0
            self._index._free.append(self._slot)

    def __len__(self) -> int:
        """Blocks held."""
        return len(self._blocks)

    def _evict(self, count: int) -> None:
        if count > 0:
            # One pass for all: each has to step over what was deleted at the dict's front.
            oldest = list(islice(self._blocks, count))
            self._index._unmark(oldest, self._bit)
            for block in oldest:
                del self._blocks[block]


def _checked(capacity: int) -> int:
    if capacity < 0:
        raise ValueError(f"a capacity of {capacity} blocks is negative")
    return capacity
