"""Which P and which D fit together: the hand-offs of one can be used by the other."""

from __future__ import annotations

from collections.abc import Callable

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import PD_ROLES, PDInstance

_SAME = {"auto": "nixl"}
"""Connectors that fit those of another name: with the first, only P's answers say which of its kind it is."""

Kind = tuple[str | None, str]
"""What a P and a D have in common that fit together: their revision, and the name of their connector."""


def kind_of(instance: PDInstance, connector: str) -> Kind:
    """Return the kind of an instance of a fleet with this ``connector``."""
    name = connector if instance.connector is None else instance.connector.name
    return instance.revision, _SAME.get(name, name)


class Pairing:
    """Tells the kinds of a fleet apart. A fleet in which all instances fit together has one.

    ``connector`` returns the name of the connector of those that have none of their own.
    """

    def __init__(self, registry: Registry, connector: Callable[[], str]) -> None:
        self._registry = registry
        self._connector = connector

    def kind_of(self, endpoint: Endpoint) -> Kind:
        """Return what an instance must have in common with the other half of a pair."""
        return kind_of(endpoint.instance, self._connector())

    def several(self) -> bool:
        """Return whether there are instances that do not fit together."""
        split = (endpoint for role in PD_ROLES for endpoint in self._registry.endpoints(role))
        return len(set(map(self.kind_of, split))) > 1
