"""Priorities by the name of an objective, as a cluster's ``InferenceObjective`` objects give them."""

from __future__ import annotations

from collections.abc import Mapping

MAX_PRIORITY = 100
"""Priorities are from minus this to this."""


class Objectives:
    """The priority of each objective that there is; one that is not known has 0, as without any."""

    def __init__(self) -> None:
        self._told: dict[str, Mapping[str, int]] = {}
        self._priorities: dict[str, int] = {}

    def update(self, source: str, priorities: Mapping[str, int]) -> None:
        """Have these of a source in place of those that it had.

        Any whole numbers may be given; see :func:`in_our_range`. Of one name the first source's counts.
        """
        self._told[source] = priorities
        merged: dict[str, int] = {}
        for told in reversed(self._told.values()):
            merged |= told
        self._priorities = in_our_range(merged)

    def priority(self, name: str) -> int:
        """Return the priority of an objective."""
        return self._priorities.get(name, 0)

    def __len__(self) -> int:
        return len(self._priorities)


def in_our_range(priorities: Mapping[str, int]) -> dict[str, int]:
    """Return priorities within ``MAX_PRIORITY`` that have the order of those given.

    Those within stay as they are, unless they would come level with one that is beyond: 5, 500 and 1000
    become 5, 99 and 100. The sign stays too: what is negative is the first to be refused. Of more than
    ``MAX_PRIORITY`` different ones of a sign, those next to 0 come level.
    """
    found = {0: 0}
    for sign in (1, -1):
        most = MAX_PRIORITY
        for size in sorted({sign * each for each in priorities.values() if sign * each > 0}, reverse=True):
            found[sign * size] = sign * min(size, most)
            most = max(1, min(size, most) - 1)
    return {name: found[each] for name, each in priorities.items()}
