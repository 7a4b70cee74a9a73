"""Which models the fleet serves, as its instances list them, and how often that has changed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from .endpoint import Endpoint

if TYPE_CHECKING:
    from .registry import Registry


class FleetModels:
    """Takes note of what instances list. Part of the registry."""

    def __init__(self, registry: Registry) -> None:
        self.version = 0
        """Changes when an instance serves other models than before, and when there are others than before."""
        self.adapters_version = 0
        """Changes when other LoRA adapters are loaded on an instance than before."""
        self.cards: dict[str, bytes] = {}
        """By name, what an instance that lists a model says of it: JSON."""
        self._registry = registry

    def changed(self) -> None:
        """Note that other models are served than before, or by others."""
        self.version += 1

    def listed(
        self,
        endpoint: Endpoint,
        models: frozenset[str] | None,
        adapters: frozenset[str] = frozenset(),
        cards: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """Record which models an instance lists; ``None``: it has not said so for too long.

        ``adapters`` are those of them that are LoRA adapters, ``cards`` is what it says of each.
        """
        self.cards.update(cards)
        changed = [each.models.found(models, adapters) for each in self._registry.ranks_of(endpoint)]
        if any(changed):
            self.version += 1
            self.adapters_version += 1
            if len(self.cards) > len(cards):
                self._drop_cards()

    def _drop_cards(self) -> None:
        """Forget what was said of models that nobody lists any more."""
        listed = frozenset[str]().union(*(e.models.listed for e in self._registry if e.models.listed))
        self.cards = {name: card for name, card in self.cards.items() if name in listed}

    def adapter_used(self, endpoint: Endpoint, name: str) -> None:
        """Note that a request on an endpoint uses a model, which may be an adapter there."""
        if name in endpoint.models.adapters and endpoint.models.used(name):
            self.adapters_version += 1
