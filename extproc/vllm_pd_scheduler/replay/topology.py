"""The network of a fleet: which links the transfers between two instances share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..sim.links import Link, Links
from ..sim.virtual import VirtualClock, VirtualInstance
from . import OVERSUBSCRIPTION


@dataclass(slots=True)
class _Leaf:
    up: Link
    down: Link


@dataclass(slots=True)
class _Port:
    out: Link
    into: Link
    leaf: int


class Topology:
    """Leaf switches, each a rack or a rail of one, with the instances in turn.

    - A transfer shares the sender's port with all that the sender sends, and the receiver's likewise.
    - Between two leaves it also shares what the one has up to the spine, and the other down from it. Either
      has the bandwidth of all ports there / ``oversubscription``.
    """

    def __init__(self, clock: VirtualClock, leaves: int, oversubscription: float = OVERSUBSCRIPTION) -> None:
        self._links = Links(clock)
        self._leaves = [_Leaf(Link(0.0), Link(0.0)) for _ in range(leaves)]
        self._oversubscription = oversubscription
        self._ports: dict[VirtualInstance, _Port] = {}

    def add(self, instance: VirtualInstance, number: int, bandwidth: float) -> None:
        """Give the instance of a number within its role a port, of so many bytes a second each way."""
        place = number % len(self._leaves)
        self._ports[instance] = _Port(Link(bandwidth), Link(bandwidth), place)
        for cable in (self._leaves[place].up, self._leaves[place].down):
            cable.capacity += bandwidth / self._oversubscription

    def carry(
        self, source: VirtualInstance, target: VirtualInstance, size: float, on_end: Callable[[], None]
    ) -> None:
        """Carry so many bytes from one instance to another, and call ``on_end`` then."""
        sender, receiver = self._ports[source], self._ports[target]
        route = [sender.out, receiver.into]
        if sender.leaf != receiver.leaf:
            route += [self._leaves[sender.leaf].up, self._leaves[receiver.leaf].down]
        self._links.send(route, size, on_end)
