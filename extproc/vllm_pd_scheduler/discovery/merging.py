"""Keeps the merged set of what sources name: of a change, only what it touches is merged again.

Pure. The set is at all times what :func:`~.merge.merge` makes of all that is told.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..models import InstanceRole, PDInstance, Place
from .merge import Member, Merged, merge
from .told import Told


class Settled(NamedTuple):
    """A part of the set: of all that is not in it, nothing has changed."""

    before: list[Member]
    """Those that were in the set."""
    after: Merged
    """Those that are in it now, and a line for each of the whole set that cannot be."""
    refused: set[Place]
    """The places of those that cannot be."""


class Merging:
    """What sources name, but for what is hidden, and the set that comes of it.

    Whether a place is in the set, and how, depends on the members that have an id or an address of its own,
    on those that these depend on, and on who else is refused; on nothing else. These are merged together.
    Who is refused is merged each time, since that may give another reason.
    """

    def __init__(self, hidden: Callable[[str, PDInstance], bool]) -> None:
        self.told = Told()
        self.members: dict[str, Member] = {}
        """The set, by id."""
        self._hidden = hidden
        self._ids: dict[Place, str] = {}
        """Of the members, by their places."""
        self._turns: dict[str, int] = {}
        """By id: numbers that grow in the order of the set."""
        self._turn = itertools.count()
        self._changed: set[Place] = set()
        self._refused: set[Place] = set()

    def tell(self, source: str, instances: Iterable[PDInstance]) -> None:
        """Take the whole set of instances that a source names."""
        self._changed |= self.told.update(source, tuple(instances))

    def forget(self, source: str) -> None:
        """Take it that there is no such source any more."""
        self._changed |= self.told.forget(source)

    def note(self, place: Place) -> None:
        """Take it that what is hidden at a place is not what was."""
        self._changed.add(place)

    def drop(self, instance_id: str) -> None:
        """Take a member out of the set: if its place is named still, as if it had not been there."""
        if (member := self.members.get(instance_id)) is not None:
            self._remove(instance_id, member)
            self._changed.add(member.instance.place)

    def at(self, place: Place) -> str | None:
        """Return the id of the member at a place."""
        return self._ids.get(place)

    def look(self) -> Settled:
        """Return what will be settled."""
        places = self._connected()
        told = self.told.only(places, self._hidden)
        standing = [self.members[self._ids[place]] for place in places if place in self._ids]
        standing.sort(key=lambda member: self._turns[member.instance.instance_id])
        merged = merge(told, standing)
        refused = {each.place for found in told.values() for each in found}
        refused.difference_update(member.instance.place for member in merged.members.values())
        return Settled(standing, merged, refused)

    def settle(self) -> Settled:
        """Let the set follow what was told; return what may have changed."""
        settled = self.look()
        members = settled.after.members
        for member in settled.before:
            key = member.instance.instance_id
            now = members.get(key)
            if now is None or _place_and_giver(now) != _place_and_giver(member):
                self._remove(key, member)
        for key, member in members.items():
            if key not in self._turns:
                self._turns[key] = next(self._turn)
            self.members[key] = member
            self._ids[member.instance.place] = key
        self._refused = settled.refused
        self._changed.clear()
        return settled

    def _remove(self, key: str, member: Member) -> None:
        del self.members[key], self._turns[key], self._ids[member.instance.place]

    def _connected(self) -> set[Place]:
        """Return the places to merge: changed or refused ones, and all that are connected with them."""
        found: set[Place] = set()
        left = [*self._changed, *self._refused]
        while left:
            place = left.pop()
            if place in found:
                continue
            names = {each.instance_id for _, each in self.told.at(place)}
            if names or place in self._ids:
                found.add(place)
                left += [(role, *place[1:]) for role in InstanceRole]
                left += [self.members[name].instance.place for name in names if name in self.members]
        return found


def _place_and_giver(member: Member) -> tuple[Place, str]:
    """Return what a member that stays keeps beside its id. Any other is a new one, at the end of the set."""
    return member.instance.place, member.named_by
