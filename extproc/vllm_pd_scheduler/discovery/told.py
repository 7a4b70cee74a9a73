"""What each source names, found by place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from ..models import PDInstance, Place
from .merge import Named


class Told:
    """The sources in their order, and the instances of each in its order."""

    def __init__(self) -> None:
        self._by_source: dict[str, tuple[PDInstance, ...]] = {}
        self._at: dict[Place, dict[str, list[PDInstance]]] = {}
        """By place and source."""

    def __contains__(self, source: str) -> bool:
        return source in self._by_source

    def __len__(self) -> int:
        return len(self._by_source)

    def __getitem__(self, source: str) -> tuple[PDInstance, ...]:
        return self._by_source[source]

    def update(self, source: str, instances: tuple[PDInstance, ...]) -> set[Place]:
        """Take the whole set of a source; return the places that it names in another way than before."""
        out, new = _differing(self._by_source.get(source, ()), instances)
        self._by_source[source] = instances
        found: dict[Place, list[PDInstance]] = {each.place: [] for each in out}
        for each in new:
            found.setdefault(each.place, []).append(each)
        if sum(len(self._named_by(source, place)) for place in found) > len(out):
            found = {place: [] for place in found}  # one is named more than once, and not only here
            for each in instances:
                if each.place in found:
                    found[each.place].append(each)
        changed = {place for place, now in found.items() if now != self._named_by(source, place)}
        for place in changed:
            self._set(source, place, found[place])
        return changed

    def forget(self, source: str) -> set[Place]:
        """Take it that there is no such source any more; return the places that it has named."""
        if source not in self._by_source:
            return set()
        changed = self.update(source, ())
        del self._by_source[source]
        return changed

    def at(self, place: Place) -> Iterator[tuple[str, PDInstance]]:
        """Yield what is named at a place, and by which source."""
        by_source = self._at.get(place)
        if by_source:
            for source in self._by_source:
                for each in by_source.get(source, ()):
                    yield source, each

    def only(
        self, places: Collection[Place], hidden: Callable[[str, PDInstance], bool]
    ) -> dict[str, list[PDInstance]]:
        """Return what each source names at these places, in its order, without what is hidden."""
        found: dict[str, list[PDInstance]] = {}
        naming = {source for place in places for source in self._at.get(place, ())}
        for source, instances in self._by_source.items():
            if source in naming:
                named: Iterable[PDInstance] = instances
                if len(places) == 1:  # the usual change: no need to go through all of them
                    named = [each for place in places for each in self._named_by(source, place)]
                found[source] = [each for each in named if each.place in places and not hidden(source, each)]
        return found

    def is_named(self, name: Named, but_by: str) -> bool:
        """Whether another source than this one names an instance so."""
        return any(source != but_by and each.instance_id == name[0] for source, each in self.at(name[1]))

    def _named_by(self, source: str, place: Place) -> Sequence[PDInstance]:
        return self._at.get(place, {}).get(source, [])

    def _set(self, source: str, place: Place, instances: list[PDInstance]) -> None:
        if instances:
            self._at.setdefault(place, {})[source] = instances
            return
        at = self._at[place]
        del at[source]
        if not at:
            del self._at[place]


def _differing(
    before: tuple[PDInstance, ...], now: tuple[PDInstance, ...]
) -> tuple[tuple[PDInstance, ...], tuple[PDInstance, ...]]:
    """Return both without what they have alike at their beginnings and at their ends."""
    start = _alike(before, now)
    before, now = before[start:], now[start:]
    end = _alike(before[::-1], now[::-1])
    return before[: len(before) - end], now[: len(now) - end]


def _alike(one: tuple[PDInstance, ...], other: tuple[PDInstance, ...]) -> int:
    """Return with how many equal instances both begin."""
    for number, (each, its) in enumerate(zip(one, other, strict=False)):
        if each is not its and each != its:
            return number
    return min(len(one), len(other))
