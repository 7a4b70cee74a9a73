"""Makes one set of instances of what several sources name. Pure: it keeps nothing, and knows no time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..models import PDInstance, Place, join_address

Named = tuple[str, Place]
"""An instance as a source names it: its id, and its place."""


@dataclass(frozen=True, slots=True)
class Member:
    """An instance that is in the merged set."""

    instance: PDInstance
    sources: tuple[str, ...]
    """All that name its place now, the one that counts most first."""
    named_by: str
    """The source whose id for it is used."""


@dataclass(frozen=True, slots=True)
class Merged:
    """The merged set."""

    members: dict[str, Member]
    """By id."""
    refused: tuple[str, ...]
    """A line for each instance that a source names and that cannot be in the set."""


def named(instance: PDInstance) -> Named:
    """Return an instance as a source names it."""
    return instance.instance_id, instance.place


def merge(told: Mapping[str, Iterable[PDInstance]], standing: Iterable[Member] = ()) -> Merged:
    """Return the set of what all sources name.

    ``told`` has the sources in their order: where two name one place, the first says how it is spoken with
    (its key, its TLS name). ``standing`` is the set until now. It decides clashes, so that nobody can take
    an id or an address from an instance that serves; among new instances the order of the sources decides.

    An instance keeps its id as long as some source names its place, unless the source that gave the id
    gives another one now.
    """
    at: dict[Place, list[tuple[str, PDInstance]]] = {}
    for source, instances in told.items():
        for instance in instances:
            at.setdefault(instance.place, []).append((source, instance))
    found = _Found()
    for member in standing:
        place, own_id = member.instance.place, member.instance.instance_id
        candidates = at.get(place, [])
        by_giver = [one.instance_id for source, one in candidates if source == member.named_by]
        if candidates and (not by_giver or own_id in by_giver):
            found.take(place, candidates, own_id, member.named_by)
            del at[place]
    for place, candidates in at.items():
        source, instance = candidates[0]
        found.take(place, candidates, instance.instance_id, source)
    return Merged(found.members, tuple(found.refused))


class _Found:
    """The set as it is put together."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.refused: list[str] = []
        self._addresses: dict[tuple[str, int], Member] = {}

    def take(self, place: Place, candidates: list[tuple[str, PDInstance]], own_id: str, giver: str) -> None:
        """Add an instance, or say why it cannot be added."""
        instance = candidates[0][1]
        sources = tuple(dict.fromkeys(source for source, _ in candidates))
        other = self.members.get(own_id)
        if other is None:  # one source may name a server that does both, as two instances
            other = self._addresses.get(place[1:])
            if other is not None and set(sources) & set(other.sources):
                other = None
        if other is not None:
            self.refused.append(_clash(own_id, instance, ", ".join(sources), other))
            return
        if instance.instance_id != own_id:
            instance = replace(instance, instance_id=own_id)
        self.members[own_id] = self._addresses[place[1:]] = Member(instance, sources, giver)


def _clash(own_id: str, instance: PDInstance, sources: str, other: Member) -> str:
    taken = other.instance
    address = join_address(instance.host, instance.port)
    what = f"{sources}: the {instance.role} instance {own_id!r} at {address} is left out: "
    if taken.instance_id == own_id:
        where = f"the {taken.role} instance at {join_address(taken.host, taken.port)}"
        return f"{what}{', '.join(other.sources)} has this id for {where}"
    return f"{what}{', '.join(other.sources)} has the {taken.role} instance {taken.instance_id!r} there"
