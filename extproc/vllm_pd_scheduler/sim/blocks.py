"""The KV blocks of one engine: who holds which."""

from collections import deque


class BlockPool:
    """Hands out block ids 1…size to named holders. Id 0 is never used: vLLM keeps it as the null block."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = deque(range(1, size + 1))
        self._held: dict[str, list[int]] = {}

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.size - len(self._free)

    def grow(self, holder: str, total: int) -> bool:
        """Let the holder have `total` blocks in all; False, with nothing changed, when too few are free."""
        held = self._held.get(holder)
        missing = total - (len(held) if held else 0)
        if missing <= 0:
            return True
        if missing > len(self._free):
            return False
        taken = [self._free.popleft() for _ in range(missing)]
        if held is None:
            self._held[holder] = taken
        else:
            held.extend(taken)
        return True

    def release(self, holder: str) -> None:
        """Free all that the holder has; nothing happens when it has nothing."""
        # First in, first out, as vLLM does: a freed block is written again as late as possible.
        self._free.extend(self._held.pop(holder, ()))

    def blocks(self, holder: str) -> list[int]:
        """The holder's block ids in the order of its tokens, a copy."""
        return list(self._held.get(holder, ()))

    def holders(self) -> dict[str, int]:
        """Blocks by holder."""
        return {holder: len(blocks) for holder, blocks in self._held.items()}
