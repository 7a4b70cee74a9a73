"""Which P and which D fit together: the hand-offs of one can be used by the other."""

from __future__ import annotations

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry

Kind = str | None
"""What a P and a D have in common that fit together. During a roll-out it is their revision."""


def kind_of(endpoint: Endpoint) -> Kind:
    """Return what an instance must have in common with the other half of a pair."""
    return endpoint.instance.revision


class Pairing:
    """Tells the kinds of a fleet apart. A fleet in which all instances fit together has one."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._version = -1
        """Of the registry, for which the following holds."""
        self._several = False

    @property
    def several(self) -> bool:
        """Whether there are instances that do not fit together."""
        if self._version != self._registry.models_version:
            self._version = self._registry.models_version
            self._several = len(set(map(kind_of, self._registry))) > 1
        return self._several
