"""Corrects the prefix index by what engines tell.

The index names what is cached by hashes of a prompt's bytes, since those are known when a request comes.
Engines name it by tokens. P's answers have the tokens of prompts whose bytes are known, so that the two names
can be *linked*: from then on, what any engine tells of these tokens is known of these bytes. So the index
learns of what engines evict, and of what they have cached from requests that other routers sent.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from ..fleet.endpoint import Endpoint
from ..request.prompt import BLOCK_BYTES

MAX_LINKS = 200_000
"""Links that are remembered, some 250 bytes each: of 50 million tokens. The oldest are forgotten first."""

Change = tuple[int, bool] | None
"""A block that came (true) or went, by its name; ``None``: all went."""


def links(
    blocks: Sequence[int], prompt_bytes: int, tokens: int, marks: Mapping[int, int]
) -> list[tuple[int, int]]:
    """Return the engines' name for each of a prompt's ``blocks``.

    ``marks`` are the names by the tokens up to their ends. A block is taken for cached with the first mark
    that is not before its end, which is estimated: tokens are taken for equally long.
    """
    ends, found = sorted(marks), []
    for number, block in enumerate(blocks, 1):
        at = bisect_left(ends, number * BLOCK_BYTES * tokens / prompt_bytes)
        if at == len(ends):
            break  # the last tokens fill no block
        found.append((marks[ends[at]], block))
    return found


class Cached:
    """What engines say that they have cached, and which of the index's blocks that is."""

    def __init__(self, max_links: int = MAX_LINKS) -> None:
        self._max_links = max_links
        self._blocks: dict[int, tuple[int, ...]] = {}
        """The index's blocks by the engines' names, the oldest first."""
        self._holders: dict[int, tuple[Endpoint, ...]] = {}
        self._names: dict[Endpoint, set[int]] = {}

    @property
    def links(self) -> int:
        """How many names are linked."""
        return len(self._blocks)

    def link(self, found: Iterable[tuple[int, int]]) -> None:
        """Remember which blocks have which names."""
        for name, block in found:
            known = self._blocks.get(name, ())
            if block in known:
                continue
            self._blocks[name] = (*known[-3:], block)  # chats and completions, several aliases of a model
            for endpoint in self._holders.get(name, ()):
                endpoint.holder.keep(block)
        while len(self._blocks) > self._max_links:
            del self._blocks[next(iter(self._blocks))]

    def tell(self, endpoint: Endpoint, changes: Iterable[Change]) -> None:
        """Take in what an engine tells."""
        names = self._names.setdefault(endpoint, set())
        for change in changes:
            if change is None:
                self._forget(endpoint, names)
                endpoint.holder.clear()
                continue
            name, came = change
            if came and name not in names:
                names.add(name)
                self._holders[name] = (*self._holders.get(name, ()), endpoint)
                for block in self._blocks.get(name, ()):
                    endpoint.holder.keep(block)
            elif not came and name in names:
                names.discard(name)
                self._let_go(endpoint, name)
                for block in self._blocks.get(name, ()):
                    endpoint.holder.drop(block)

    def forget(self, endpoint: Endpoint) -> None:
        """Forget an endpoint, of which nothing more is heard; what is taken for cached there stays."""
        self._forget(endpoint, self._names.pop(endpoint, set()))

    def _forget(self, endpoint: Endpoint, names: set[int]) -> None:
        for name in names:
            self._let_go(endpoint, name)
        names.clear()

    def _let_go(self, endpoint: Endpoint, name: int) -> None:
        left = tuple(each for each in self._holders[name] if each is not endpoint)
        if left:
            self._holders[name] = left
        else:
            del self._holders[name]
