"""Index of the prompt prefixes that instances have cached, as far as the requests sent there tell.

A prompt is a chain of blocks. A block's number is a hash of the prompt from its start to the end of that
block, so it stands for a whole prefix. An instance that holds a block also holds all blocks before it in the
chain, since prompts are used from their first block on and evicted from their last. So along a chain holders
only drop out, and :meth:`PrefixIndex.match` finds the places where they do by binary search: it reads few
blocks of a long prompt, and each block once where they drop out everywhere. What it returns keeps sets of
holders and looks at one holder only when it is asked for that one, so that its cost does not grow with the
fleet. It can be used again as long as it holds (:meth:`PrefixMatch.holds`).

The index keeps the set of holders of each block, as the bits of an int, and the blocks of each holder by last
use. That takes 150 to 220 bytes for each block of each holder, since dicts grow in steps: 1.7 GiB for 1,000
holders of 10,000 blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress, islice
from typing import Any

DEFAULT_CAPACITY = 10_000
"""Blocks that a holder keeps until its capacity is known.

With 256 tokens in each that is 2.5 million tokens. Eight 80 GB GPUs have room for about 1.3 million tokens of
Llama 3 70B, at 320 KiB each.
"""

_TABLE_COUNT = 256
"""Dicts among which the blocks are spread: one with a million entries would stop the process for 70 ms when
it grows."""
_DENSE_LEVELS = 8
"""Changes of the holders along a chain after which each block is read, if they were dense so far."""
_DENSE_BLOCKS = 12
"""Blocks for each change that are dense: to search for the next change would read as many."""
_FEW_LEVELS = 4
"""Changes up to which each holder's depth is found one after another, and not by bisection."""
_FEW_BITS = 12
"""Holders of a mask that are looked up one by one; with more, going over all bits at once is faster."""
_NO_SLOT = 1 << 60
"""Slot of a closed holder, beyond the bits of any mask."""
_BOOLEANS = bytes.maketrans(b"01", b"\0\1")


class PrefixIndex:
    """The holders of each block. Blocks are hashes: evenly spread ints from 0 to 2**60 - 1."""

    def __init__(self) -> None:
        self._tables: list[dict[int, int]] = [{} for _ in range(_TABLE_COUNT)]
        """Block to mask: bit ``n`` is set if the holder in slot ``n`` has the block."""
        self._holders: list[Holder] = []
        """By slot."""
        self.version = 0
        """Changes whenever a block gets a holder, or loses one."""
        self._free: list[int] = []
        """Slots of closed holders, to be used again, so that masks stay short."""

    def add(self, capacity: int | None = None) -> Holder:
        """Return a new holder without blocks.

        ``capacity`` is in blocks, :data:`DEFAULT_CAPACITY` without it. Raise :exc:`ValueError` if it is
        negative.
        """
        slot = self._free[-1] if self._free else len(self._holders)
        holder = Holder(self, slot, DEFAULT_CAPACITY if capacity is None else capacity)
        self._holders[slot : slot + 1] = [holder]
        del self._free[-1:]
        return holder

    def match(self, blocks: Sequence[int]) -> PrefixMatch:
        """Return how many leading blocks each holder has.

        ``blocks`` is the chain of a prompt, from its first block on.
        """
        levels: list[tuple[int, int]] = []
        depth, mask = 0, self._mask(blocks[0]) if blocks else 0
        while mask:
            if len(levels) >= _DENSE_LEVELS and depth < _DENSE_BLOCKS * len(levels):
                self._walk(blocks, depth, mask, levels)
                break
            depth, after = self._next_change(blocks, depth, mask)
            levels.append((depth, mask))
            mask = after
        return PrefixMatch(self, levels[::-1])

    def mask_of(self, holders: Iterable[Holder]) -> int:
        """Return a set of holders in the form that :meth:`PrefixMatch.longest` takes."""
        mask = 0
        for holder in holders:
            mask |= holder._bit
        return mask

    def __len__(self) -> int:
        """Return the number of blocks of all holders together."""
        return sum(map(len, self._holders))

    def _mask(self, block: int) -> int:
        return self._tables[block % _TABLE_COUNT].get(block, 0)

    def _next_change(self, blocks: Sequence[int], low: int, mask: int) -> tuple[int, int]:
        """Return the first index after ``low`` whose mask differs from ``mask``, and that mask.

        Return ``len(blocks)`` and 0 if there is none. Holders only drop out along a chain, so between two
        equal masks all are equal: double the step until one differs, then bisect.
        """
        step, high, after = 1, len(blocks), 0
        while low + step < high:
            other = mask & self._mask(blocks[low + step])
            if other != mask:
                high, after = low + step, other
                break
            low += step
            step *= 2
        while high - low > 1:
            middle = (low + high) // 2
            other = mask & self._mask(blocks[middle])
            if other == mask:
                low = middle
            else:
                high, after = middle, other
        return high, after

    def _walk(self, blocks: Sequence[int], at: int, mask: int, levels: list[tuple[int, int]]) -> None:
        """Add a level for each change of the mask from an index on, looking at block after block."""
        tables, same = self._tables, mask
        for depth in range(at + 1, len(blocks)):
            block = blocks[depth]
            found = tables[block % _TABLE_COUNT].get(block, 0)
            if found is same:  # as successive blocks mostly are
                continue
            same, after = found, mask & found
            if after != mask:
                levels.append((depth, mask))
                mask = after
                if not mask:
                    return
        levels.append((len(blocks), mask))

    def _holders_in(self, mask: int) -> Iterable[Holder]:
        """Return the holders whose bits are set."""
        if mask.bit_count() > _FEW_BITS:
            return compress(self._holders, bin(mask)[:1:-1].encode().translate(_BOOLEANS))
        holders = []
        while mask:
            slot = mask.bit_length() - 1
            holders.append(self._holders[slot])
            mask ^= 1 << slot
        return holders

    # Successive blocks mostly have the same mask. In _mark and _unmark they then share one int object, which
    # saves the time to compute it and, with 1,000 holders, 160 bytes a block.

    def _mark(self, blocks: Iterable[int], bit: int) -> None:
        """Add the holder with this bit to blocks."""
        self.version += 1
        tables, before, after = self._tables, 0, bit
        for block in blocks:
            table = tables[block % _TABLE_COUNT]
            mask = table.get(block, 0)
            if mask is not before:
                before, after = mask, mask | bit if mask else bit
            table[block] = after

    def _unmark(self, blocks: Iterable[int], bit: int) -> None:
        """Remove the holder with this bit from blocks; forget blocks that nobody holds."""
        self.version += 1
        tables, before, after = self._tables, bit, 0
        for block in blocks:
            table = tables[block % _TABLE_COUNT]
            mask = table[block]
            if mask is not before:
                before, after = mask, mask ^ bit
            if after:
                table[block] = after
            else:
                del table[block]


class PrefixMatch(Mapping["Holder", int]):
    """How many leading blocks of one prompt each holder has, for those that have any.

    It is what the index knew when it was asked. The holder of the longest prefix comes last.
    """

    __slots__ = ("_index", "_levels", "_version")

    def __init__(self, index: PrefixIndex, levels: Sequence[tuple[int, int]]) -> None:
        self._index = index
        self._levels = levels
        """(depth, mask): the holders that have at least so many blocks. The longest prefix comes first."""
        self._version = index.version

    def holds(self, index: PrefixIndex) -> bool:
        """Whether it is still what an index knows."""
        return self._index is index and self._version == index.version

    def __getitem__(self, holder: Holder) -> int:
        if depth := self._depth(holder):
            return depth
        raise KeyError(holder)

    def get(self, holder: Holder, default: Any = None) -> Any:
        """Return the blocks that a holder has; the default if it has none."""
        return self._depth(holder) or default

    def _depth(self, holder: Holder) -> int:
        """Return the leading blocks that a holder has."""
        at = self._first(holder._bit)
        return self._levels[at][0] if at < len(self._levels) else 0

    def _first(self, bits: int) -> int:
        """Return the place of the first level with one of some holders, by bisection: later ones add more."""
        levels, low, high = self._levels, 0, len(self._levels)
        while low < high:
            middle = (low + high) // 2
            if levels[middle][1] & bits:
                high = middle
            else:
                low = middle + 1
        return low

    def __iter__(self) -> Iterator[Holder]:
        masks = [mask for _, mask in self._levels]
        for mask, longer in zip(masks[::-1], [*masks[-2::-1], 0], strict=False):
            yield from self._index._holders_in(mask ^ longer)

    def __len__(self) -> int:
        return self._levels[-1][1].bit_count() if self._levels else 0

    def among(self, holders: Iterable[Holder]) -> dict[Holder, int]:
        """Return the same for some holders only."""
        if len(self._levels) > _FEW_LEVELS:
            first, by_level = self._first, [*(depth for depth, _ in self._levels), 0]
            return {holder: depth for holder in holders if (depth := by_level[first(holder._bit)])}
        depths: dict[Holder, int] = {}
        for depth, mask in reversed(self._levels):
            holders = [holder for holder in holders if mask >> holder._slot & 1]  # unlike _bit it is short
            depths.update(dict.fromkeys(holders, depth))
        return depths

    def longest(self, count: int, within: int, turn: int = 0, common: float = math.inf) -> list[Holder]:
        """Return up to ``count`` holders of the longest prefixes, longest first.

        ``within`` is the set of holders to choose from, see :meth:`PrefixIndex.mask_of`. If more than
        ``count`` are equal, it returns those from slot ``turn`` on, in a ring. A prefix that more than
        ``common`` holders have does not count.
        """
        chosen: list[Holder] = []
        longer = 0
        for _, mask in islice(self._levels, self._first(within), None):
            mask &= within
            if mask.bit_count() > common:
                break
            exact, longer = mask ^ longer, mask
            for part in (exact >> turn << turn, exact & ((1 << turn) - 1)):
                while part and len(chosen) < count:
                    bit = part & -part
                    chosen.append(self._index._holders[bit.bit_length() - 1])
                    part ^= bit
            if len(chosen) == count:
                break
        return chosen


class Holder:
    """The blocks that one instance has cached, at most ``capacity``. Made by :meth:`PrefixIndex.add`."""

    __slots__ = ("_answers", "_bit", "_blocks", "_capacity", "_closed", "_index", "_slot")

    def __init__(self, index: PrefixIndex, slot: int, capacity: int) -> None:
        self._capacity = _checked(capacity)
        self._index = index
        self._slot = slot
        self._bit = 1 << slot
        self._closed = False
        # In the order of last use, oldest first: a dict is an ordered set here. Each value is its key, so
        # that store() can move on the int object that the index has too, and not keep a second one.
        self._blocks: dict[int, int] = {}
        self._answers: dict[int, int] = {}
        """By the last block of a prompt: how many blocks more the rest of it and its answer fill."""

    @property
    def capacity(self) -> int:
        """The most blocks that are recorded."""
        return self._capacity

    def store(self, blocks: Sequence[int]) -> None:
        """Record that a prompt with these blocks was computed there, and evict what exceeds the capacity.

        Eviction follows vLLM (``FreeKVCacheBlockQueue`` in ``vllm/v1/core/kv_cache_utils.py``): least
        recently used first, and of the blocks that one request used last, the end of the prompt before its
        beginning. Of a prompt that is longer than the capacity, the beginning is kept. Does nothing on a
        closed holder, since a request can end after its instance has left.
        """
        mine, chain = self._blocks, blocks[self._capacity - 1 :: -1] if self._capacity else ()
        new: Sequence[int] = chain
        used: Sequence[int] = ()
        if not mine.keys().isdisjoint(chain):
            new = [block for block in chain if block not in mine]
            used = [mine.pop(block) for block in chain if block in mine]
        if new:
            self._evict(len(mine) + len(chain) - self._capacity)
            self._index._mark(new, self._bit)
            mine.update(zip(new, new, strict=True))
        if used:
            mine.update(zip(used, used, strict=True))

    def answered(self, blocks: Sequence[int], more: int) -> None:
        """Record that the rest of a prompt and the answer to it fill ``more`` blocks after the prompt's last.

        Nobody has seen these blocks, so they have no hashes. They go when the prompt's last one does, which
        is a little late: an engine evicts an answer before the prompt.
        """
        last = blocks[-1] if blocks else None
        if last is None or last not in self._blocks:
            return
        if more > 0:
            self._answers[last] = more
        else:
            self._answers.pop(last, None)

    def with_answer(self, blocks: Sequence[int], depth: int) -> int:
        """Return how many leading blocks are cached there if a prompt goes on with the answer.

        ``depth`` is how many of its ``blocks`` are recorded. Where these end as a prompt that was answered
        here, the blocks that follow are taken for that answer.
        """
        if not self._answers or not 0 < depth < len(blocks):
            return depth
        return min(len(blocks), depth + self._answers.get(blocks[depth - 1], 0))

    def newest(self, count: int) -> list[int]:
        """Return so many blocks, those used last first: so of each prompt its beginning before its end."""
        return list(islice(reversed(self._blocks), count))

    def restore(self, blocks: Iterable[int]) -> None:
        """Record blocks as :meth:`newest` of another index has returned them: as used before all here.

        Those that exceed the capacity are left out. Takes 10 ms for 10,000 blocks.
        """
        mine = self._blocks
        room = max(0, self._capacity - len(mine))
        new = list(islice((block for block in dict.fromkeys(blocks) if block not in mine), room))
        self._index._mark(new, self._bit)
        new.reverse()
        self._blocks = dict(zip(new, new, strict=True)) | mine

    def keep(self, block: int) -> None:
        """Record that a block is cached there, as the engine says."""
        if block not in self._blocks and self._capacity:
            self._evict(len(self._blocks) + 1 - self._capacity)
            self._index._mark((block,), self._bit)
            self._blocks[block] = block

    def drop(self, block: int) -> None:
        """Record that a block is cached there no more. It need not have been."""
        if self._blocks.pop(block, None) is not None:
            self._answers.pop(block, None)
            self._index._unmark((block,), self._bit)

    def resize(self, capacity: int) -> None:
        """Change the capacity, in blocks, and evict what exceeds it; raise :exc:`ValueError` if negative."""
        if not self._closed:
            self._capacity = _checked(capacity)
            self._evict(len(self._blocks) - capacity)

    def clear(self) -> None:
        """Forget all blocks, since the instance was restarted. Takes 4 to 8 ms for 10,000 blocks."""
        self._index._unmark(self._blocks, self._bit)
        self._blocks = {}
        self._answers.clear()

    def close(self) -> None:
        """Forget all blocks and store no more, since the instance is gone. Further calls do nothing."""
        if not self._closed:
            self.clear()
            self._closed, self._capacity = True, 0
            self._index._free.append(self._slot)
            self._bit, self._slot = 0, _NO_SLOT  # the slot is another holder's from now on

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._blocks)

    def _evict(self, count: int) -> None:
        if count > 0:
            # All in one pass: a deleted entry stays in the dict as a gap, and each new look at the oldest one
            # would step over all of them.
            mine, answers = self._blocks, self._answers
            oldest = list(islice(mine, count))
            self._index._unmark(oldest, self._bit)
            for block in oldest:
                del mine[block]
                if answers and block in answers:
                    del answers[block]


def _checked(capacity: int) -> int:
    if capacity < 0:
        raise ValueError(f"a capacity of {capacity} blocks is negative")
    return capacity
