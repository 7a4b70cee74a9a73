"""What replicas tell each other of the instances that they probe, so that each is probed by one of them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from msgspec import structs

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from .directory import Directory
from .message import MAX_FOUND_BYTES, MAX_ITEMS, Found, Message
from .rendezvous import first

_MAX_TOLD_BYTES = 1 << 18
"""Of all that is told at once; what is more is not told, and found again."""
_MAX_KNOWN = 10_000
_TRUSTED = 2
"""How many replicas may tell of an instance: the one that probes it, and the one that did, or would."""


class Listener(Protocol):
    """Who is told what other replicas do and find; see :class:`vllm_pd_scheduler.health.shared.Shared`."""

    def asked(self, endpoint: Endpoint, by: str) -> None:
        """Take it that another replica asks an instance just now."""
        ...

    def found(self, endpoint: Endpoint, by: str, told: bytes) -> bool:
        """Take what another replica has found; return whether that is something that can be."""
        ...


class Probes:
    """Says who probes an instance, and collects what is to be told of those that this replica probes.

    An instance is named by the first of its endpoints. What was found is bytes that only ``listener`` reads.
    ``others`` returns the living ones, and ``wake`` is called when there is something to tell.
    """

    def __init__(
        self, directory: Directory, registry: Registry, name: str, others: Callable[[], Collection[str]]
    ) -> None:
        self.listener: Listener | None = None
        self.wake: Callable[[], None] = lambda: None
        self._directory = directory
        self._registry = registry
        self._name = name
        self._others = others
        self._living: frozenset[str] = frozenset()
        self._first: dict[str, tuple[str, ...]] = {}
        """By instance, who may tell of it; as long as the same replicas live."""
        self._asked: list[Endpoint] = []
        self._found: list[tuple[Endpoint, bytes]] = []
        self._bytes = 0

    # -- for who probes

    def ours(self, endpoint: Endpoint) -> bool:
        """Whether this replica is the one that probes an instance."""
        return self._trusted(endpoint)[0] == self._name

    def asks(self, endpoint: Endpoint) -> None:
        """Tell that this replica asks an instance now, if that is for the others too."""
        if self._listened_to(endpoint) and len(self._asked) < MAX_ITEMS:
            self._asked.append(endpoint)
            self.wake()

    def finds(self, endpoint: Endpoint, found: bytes) -> None:
        """Tell what it has answered; nothing: that it is not well."""
        if self._listened_to(endpoint) and len(found) <= MAX_FOUND_BYTES and len(self._found) < MAX_ITEMS:
            self._bytes += len(found)
            if self._bytes <= _MAX_TOLD_BYTES:
                self._found.append((endpoint, found))
                self.wake()

    def _listened_to(self, endpoint: Endpoint) -> bool:
        return bool(self._others()) and self.ours(endpoint)

    def _trusted(self, endpoint: Endpoint) -> tuple[str, ...]:
        living = frozenset(self._others())
        if living != self._living:
            self._living = living
            self._first.clear()
        name = endpoint.instance.instance_id
        found = self._first.get(name)
        if found is None:
            if len(self._first) >= _MAX_KNOWN:  # of most of them the instance is gone
                self._first.clear()
            found = self._first[name] = first(name, {self._name, *living}, _TRUSTED)
        return found

    # -- for the messages

    @property
    def untold(self) -> bool:
        """Whether there is something to tell."""
        return bool(self._asked or self._found)

    def add_to(self, message: Message, place: Callable[[Endpoint], int]) -> Message:
        """Return a message that has also what is to be told of probes, once.

        ``place`` puts an endpoint into the message's list and returns its place.
        """
        probing = [place(each) for each in self._asked if each in self._registry]
        found = [Found(place(each), told) for each, told in self._found if each in self._registry]
        self._asked, self._found, self._bytes = [], [], 0
        return structs.replace(message, probing=probing, found=found)

    def receive(self, message: Message) -> bool:
        """Pass on what another replica tells, if it may; return whether all of that can be."""
        listener, sound = self.listener, True
        if listener is None:
            return sound
        by, names = message.replica, message.endpoints
        for place in message.probing:
            if (endpoint := self._told_of(names[place], by)) is not None:
                listener.asked(endpoint, by)
        for each in message.found:
            if (endpoint := self._told_of(names[each.endpoint], by)) is not None:
                sound = listener.found(endpoint, by, each.told) and sound
        return sound

    def _told_of(self, name: int | str, replica: str) -> Endpoint | None:
        """Return the first endpoint of an instance of which a replica may tell."""
        found = self._directory.find(name)
        if found is None:
            return None
        endpoint = self._registry.ranks_of(found)[0]
        return endpoint if replica in self._trusted(endpoint) else None
