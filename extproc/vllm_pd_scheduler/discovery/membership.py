"""Keeps the registry as the sources and the operators want it: who comes, who drains and goes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator

from ..fleet.registry import DuplicateInstance, Registry, UnknownInstance
from ..models import By, InstanceRole, PDInstance
from ..records.events import EventKind, Events
from .merge import Named, named
from .merging import Merging, Settled

ADMIN = "admin"
"""The source that operators are. It counts most."""
CONFIG = "config"
"""The source that the configuration's own lists are. It counts more than all but the operators."""


class Membership:
    """Which instances there are, of all that sources tell. Does no I/O; times are the caller's seconds.

    A source tells its whole set each time, by :meth:`update`. An instance that no source names any more
    drains, and is removed when nothing is left on it. Named again before that, it serves again. What
    operators have drained or removed stays so, whatever the other sources say.
    """

    def __init__(self, registry: Registry, events: Events) -> None:
        self._registry = registry
        self._events = events
        self._set = Merging(self._hidden)
        self._told = self._set.told
        self._left_out: dict[str, tuple[str, ...]] = {}
        self._told_at: dict[str, float] = {}
        self._problems: dict[str, str] = {}
        self._silent: set[str] = set()
        self._leaving: set[str] = set()
        self._drained: set[str] = set()
        self._removed: dict[Named, PDInstance] = {}
        self._refused: tuple[str, ...] = ()
        for source in (ADMIN, CONFIG):
            self._set.tell(source, ())
        registry.changes.subscribe(self._let_go)

    # -- what sources tell

    def expect(self, source: str) -> None:
        """Take it that there is a source, which has told nothing yet."""
        if source not in self._told:
            self._set.tell(source, ())
            self._silent.add(source)

    @property
    def silent(self) -> frozenset[str]:
        """Sources that have told nothing yet."""
        return frozenset(self._silent)

    def knows(self, role: InstanceRole) -> bool:
        """Whether what is known of a role is more than that nobody has told anything."""
        return not self._silent or bool(self._registry.endpoints(role))

    def update(
        self,
        source: str,
        instances: Iterable[PDInstance],
        by: str = By.START,
        left_out: Iterable[str] = (),
    ) -> None:
        """Take the whole set of instances that a source knows, and a line for each that is of no use."""
        self._set.tell(source, instances)
        self._left_out[source] = tuple(left_out)
        self._heard_of(source, by)

    def forget(self, source: str, by: str = By.START) -> None:
        """Take it that there is no such source any more: nobody but the others names its instances."""
        self._set.forget(source)
        for known in (self._left_out, self._told_at, self._problems):
            known.pop(source, None)
        self._heard_of(source, by)

    def _heard_of(self, source: str, by: str) -> None:
        """Settle what a source has told, or that it tells nothing any more."""
        first = source in self._silent
        self._silent.discard(source)
        self._settle(by)
        if first:
            self._registry.changes.note()  # that a role has no instance is a word too

    def heard(self, source: str, now: float) -> None:
        """Note that what a source has told is how it is now."""
        self._told_at[source] = now
        if self._problems.pop(source, None) is not None:
            text = f"{source}: all is well again"
            self._events.add(EventKind.DISCOVERY, text, by=f"{By.DISCOVERY} {source}")

    def lost(self, source: str, reason: str) -> None:
        """Note that a source cannot be asked, or does not make sense: what it has told stays."""
        if self._problems.get(source) == reason:
            return
        self._problems[source] = reason
        text = f"{reason}; the instances that were known stay"
        self._events.add(EventKind.DISCOVERY, text, by=f"{By.DISCOVERY} {source}", level=logging.WARNING)

    @property
    def no_news(self) -> str | None:
        """How many of the sources cannot be asked, or have told nothing yet, for people; ``None`` if none."""
        quiet = self._silent | self._problems.keys()
        return f"no news from {len(quiet)} of {len(self._told) - 1} sources of instances" if quiet else None

    def ages(self, now: float) -> dict[str, float]:
        """Return for how many seconds nothing was heard of each source that can change."""
        return {source: now - at for source, at in self._told_at.items()}

    @property
    def refused(self) -> tuple[str, ...]:
        """A line for each instance that some source names and that cannot be in the fleet."""
        return self._refused

    def sources(self, instance_id: str) -> tuple[str, ...]:
        """Return who names an instance; nobody, if it drains to be removed."""
        member = self._set.members.get(instance_id)
        return () if member is None else member.sources

    def leaves(self, instance_id: str) -> bool:
        """Whether an instance is about to be removed, since no source names it any more."""
        return instance_id in self._leaving

    # -- what operators do

    def add(self, instance: PDInstance, by: str = By.ADMIN) -> None:
        """Add an instance; raises :exc:`~vllm_pd_scheduler.fleet.registry.DuplicateInstance`."""
        if instance.instance_id not in self._leaving:
            self._registry.refuse_double(instance)
        told = self._told[ADMIN]
        self._set.tell(ADMIN, (*told, instance))
        trial = self._set.look().after
        member = trial.members.get(instance.instance_id)
        if member is None or member.instance.place != instance.place:
            self._set.tell(ADMIN, told)
            raise DuplicateInstance(next((r for r in trial.refused if r not in self._refused), "it is there"))
        if self._removed.pop(named(instance), None) is not None:
            self._set.note(instance.place)
        self._settle(by)

    def remove(self, instance_id: str, by: str = By.ADMIN) -> None:
        """Remove an instance at once, whoever names it; raises :exc:`UnknownInstance`."""
        instance = self._registry.get(instance_id).instance
        instance_id = instance.instance_id
        self._remove(self.hides(instance_id))
        place = instance.place
        self._set.tell(ADMIN, (each for each in self._told[ADMIN] if each.place != place))
        self._drained.discard(instance_id)
        self._leaving.discard(instance_id)
        self._set.drop(instance_id)
        self._registry.remove(instance_id, by)
        self._settle(by)

    def hides(self, instance_id: str) -> list[PDInstance]:
        """Return what other sources than the operators name in an instance's place."""
        place = self._registry.get(instance_id).instance.place
        return [each for source, each in self._told.at(place) if source != ADMIN]

    def removed(self) -> list[PDInstance]:
        """Return what operators have removed and sources still name."""
        return list(self._removed.values())

    def drain(self, instance_id: str, by: str = By.ADMIN) -> None:
        """Send an instance nothing new until :meth:`undrain`; raises :exc:`UnknownInstance`."""
        self._drained.add(self._registry.drain(instance_id, by).instance.instance_id)

    def undrain(self, instance_id: str, by: str = By.ADMIN) -> None:
        """End a drain, unless no source names the instance any more; raises :exc:`UnknownInstance`.

        One that has not come yet does not drain when it comes, then.
        """
        self._drained.discard(instance_id)
        instance_id = self._registry.get(instance_id).instance.instance_id
        self._drained.discard(instance_id)
        if instance_id not in self._leaving:
            self._registry.undrain(instance_id, by)

    def remember(self, drained: Iterable[str], removed: Iterable[PDInstance]) -> None:
        """Take it that operators have drained and removed instances that no source has named yet."""
        self._drained.update(drained)
        self._remove(removed)

    def _remove(self, removed: Iterable[PDInstance]) -> None:
        for each in removed:
            self._removed[named(each)] = each
            self._set.note(each.place)

    def drained_and_away(self) -> list[str]:
        """Return the ids of those that operators have drained and that are not there now."""
        there = {endpoint.instance.instance_id for endpoint in self._registry}
        return sorted(self._drained - there)

    def drained(self, instance_id: str) -> bool:
        """Whether operators have drained an instance."""
        return instance_id in self._drained

    def named(self) -> Iterator[str]:
        """Yield the ids of the instances that some source but the operators names."""
        return (key for key, member in self._set.members.items() if member.sources != (ADMIN,))

    # -- the registry follows

    def _hidden(self, source: str, instance: PDInstance) -> bool:
        """Whether operators have removed what a source names."""
        return bool(self._removed) and source != ADMIN and named(instance) in self._removed

    def _settle(self, by: str) -> None:
        if not self._silent:  # who has told nothing yet may name them
            self._removed = {
                k: each for k, each in self._removed.items() if self._told.is_named(k, but_by=ADMIN)
            }
        settled = self._set.settle()
        with self._registry.changes.as_one(by):
            self._part(settled, by)
            for member in settled.after.members.values():
                self._have(member.instance, by)
        self._let_go()
        self._tell_refused((*settled.after.refused, *itertools.chain(*self._left_out.values())), by)

    def _part(self, settled: Settled, by: str) -> None:
        """Let those go that are not members any more: at once if another one needs their id or place."""
        for key in [*(member.instance.instance_id for member in settled.before), *self._leaving]:
            there = self._set.at(self._registry.get(key).instance.place)
            if there == key:
                continue
            if there is not None or key in self._set.members:
                self._leaving.discard(key)
                self._registry.remove(key, by)
            elif key not in self._leaving:
                self._leaving.add(key)
                self._registry.drain(key, by)

    def _have(self, instance: PDInstance, by: str) -> None:
        """Have a member in the registry, and as it is described now."""
        key = instance.instance_id
        try:
            known = self._registry.get(key).instance
        except UnknownInstance:
            self._add(instance, by)
            return
        if known.data_parallel_size != instance.data_parallel_size:
            self._leaving.discard(key)
            self._registry.remove(key, by)
            self._add(instance, by)
            return
        if known != instance:
            self._registry.describe(key, instance, by)
        if key in self._leaving:
            self._leaving.discard(key)
            if key not in self._drained:
                self._registry.undrain(key, by)

    def _add(self, instance: PDInstance, by: str) -> None:
        self._registry.add(instance, by)
        if instance.instance_id in self._drained:
            self._registry.drain(instance.instance_id, by)

    def _let_go(self) -> None:
        """Remove those that leave and have nothing left to do."""
        done = [key for key in self._leaving if self._registry.drained(key)]
        self._leaving.difference_update(done)
        if done:
            with self._registry.changes.as_one(self._registry.changes.by):
                for key in done:
                    self._registry.remove(key, self._registry.changes.by)

    def _tell_refused(self, refused: tuple[str, ...], by: str) -> None:
        before, self._refused = frozenset(self._refused), refused
        for line in refused:
            if line not in before:
                self._events.add(EventKind.DISCOVERY, line, by=by, level=logging.WARNING)
