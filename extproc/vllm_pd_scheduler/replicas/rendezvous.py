"""Which replica does what is done once for all: rendezvous hashing, which needs no agreement.

Each replica weighs every living one for a thing, and the heaviest does it. Replicas that know the same others
choose the same. One that comes takes its share from all others and nothing else moves; one that goes leaves
its share to all others.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from hashlib import blake2b


def first(thing: str, replicas: Iterable[str], count: int = 1) -> tuple[str, ...]:
    """Return the heaviest replicas for a thing, by their names: the one that does it, then who would."""
    return tuple(heapq.nlargest(count, set(replicas), key=lambda replica: (_weight(thing, replica), replica)))


def _weight(thing: str, replica: str) -> bytes:
    return blake2b(f"{len(replica)} {replica}{thing}".encode(), digest_size=8).digest()
