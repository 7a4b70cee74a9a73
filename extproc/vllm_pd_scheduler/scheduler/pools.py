"""Whom a request of a model may be sent to: instances known not to serve it are left out if others do."""

from __future__ import annotations

from random import Random

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import InstanceRole
from .availability import Availability
from .candidates import Candidates


class Pools:
    """The candidates of ``role`` in ``registry``, for each model.

    - An instance is known to serve the models that it lists. One that lists none may serve all.
    - A model that no instance of the role lists may be served by all: the answer is the engine's to give.
    - While all that list models list the same, there is one pool, found without a look at the instances.
    """

    def __init__(
        self, registry: Registry, role: InstanceRole, availability: Availability, random: Random
    ) -> None:
        self._registry = registry
        self._role = role
        self._availability = availability
        self._random = random
        self._routable: tuple[Endpoint, ...] = ()
        self._models_version = -1
        """Of the registry, as is ``_routable``, for which the following holds."""
        self._all = self._pool(())
        self._listed: frozenset[str] = frozenset()
        """Models that some instance lists and another does not."""
        self._by_model: dict[str, Candidates] = {}
        self._by_members: dict[tuple[Endpoint, ...], Candidates] = {}

    def of(self, model: str | None) -> Candidates:
        """Return the candidates for a model. They are to be used at once: the fleet changes."""
        self._refresh()
        if model is None or model not in self._listed:
            return self._all
        pool = self._by_model.get(model)
        if pool is None:
            members = tuple(e for e in self._routable if _may_serve(e, model))
            pool = self._by_members.get(members) or self._pool(members)
            self._by_model[model] = self._by_members[members] = pool
        return pool

    def may_serve(self, endpoint: Endpoint, model: str | None) -> bool:
        """Whether an endpoint of the role, in whatever state, is not left out for a model."""
        self._refresh()
        return model is None or model not in self._listed or _may_serve(endpoint, model)

    def _refresh(self) -> None:
        registry = self._registry
        routable, version = registry.routable(self._role), registry.models_version
        if self._routable is routable and self._models_version == version:
            return
        self._routable, self._models_version = routable, version
        self._all = self._pool(routable)
        self._by_model, self._by_members = {}, {routable: self._all}
        # Also those that are down: that a model's only instance restarts does not send it to others.
        lists = {e.models for e in registry.endpoints(self._role) if e.models}
        self._listed = frozenset[str]().union(*lists)
        if lists:
            self._listed -= frozenset.intersection(*lists)

    def _pool(self, endpoints: tuple[Endpoint, ...]) -> Candidates:
        return Candidates(endpoints, self._availability, self._registry.prefixes, self._random)


def _may_serve(endpoint: Endpoint, model: str) -> bool:
    return not endpoint.models or model in endpoint.models
