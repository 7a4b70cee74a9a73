"""Whom a request of a model may be sent to: instances that serve it and that have a partner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import InstanceRole
from .affinity import AdapterCandidates
from .availability import Availability
from .candidates import Candidates
from .pairing import Kind, Pairing
from .revisions import Revisions


class Pools:
    """The candidates of ``role`` in ``registry``, for each model.

    - An instance is known to serve the models that it lists, or that are configured. One of which neither is
      known, and one that is configured to serve any, may serve all.
    - A model that no instance of the role lists may be served by those alone. If there are none, nobody
      serves it: that is known once all instances have listed their models.
    - While all that list models list the same, there is one pool, found without a look at the instances.
      The LoRA adapters among them have pools of their own (:mod:`.affinity`).
    - With ``decode``, the pools of the other role, an instance is left out that fits none of theirs
      (:mod:`.pairing`).
    - An instance whose revision may get nothing is in no pool (:mod:`.revisions`).
    """

    def __init__(
        self,
        registry: Registry,
        role: InstanceRole,
        availability: Availability,
        random: Random,
        pairing: Pairing,
        revisions: Revisions,
        decode: Pools | None = None,
    ) -> None:
        self._registry = registry
        self._role = role
        self._lineup, self._lineup_of_decode = registry.lineup(role), registry.lineup(InstanceRole.DECODE)
        self._availability = availability
        self._random = random
        self._pairing = pairing
        self._revisions = revisions
        self._decode = decode
        self._routable: tuple[Endpoint, ...] = ()
        self._members: tuple[Endpoint, ...] = ()
        """Those of ``_routable`` whose revision may get requests."""
        self._partners: tuple[Endpoint, ...] | None = None
        """The routable D, if it matters which there are."""
        self._several = False
        """Whether there are instances that do not fit together."""
        self._models_version = -1
        """Of the registry, as are ``_routable`` and ``_partners``, for which the following holds."""
        self._all = self._pool((), None)
        self._common: frozenset[str | None] = frozenset()
        """Models for which nobody is left out; also what stands for no name."""
        self._named: frozenset[str] = frozenset()
        """Models that some instance is known to serve, be it one that is down."""
        self._all_known = False
        """Whether no instance may serve what is not in ``_named``."""
        self._by_model: dict[str | None, Candidates] = {}
        """Of ``_named``, and under ``None`` that of all others."""
        self._by_members: dict[tuple[Endpoint, ...], Candidates] = {}
        self._beside: dict[tuple[Candidates, Kind], Candidates] = {}
        self._by_revision: dict[Candidates, Mapping[str, Candidates]] = {}

    def of(self, model: str | None, beside: Endpoint | None = None) -> Candidates:
        """Return the candidates for a model. They are to be used at once: the fleet changes.

        With ``beside``, an instance of the other role, those that fit it.
        """
        self._refresh()
        if model in self._common:
            pool = self._all
        else:
            key = self.known(model)
            pool = self._by_model.get(key) or self._of_model(key)
        if beside is None or not self._several:
            return pool
        return self._of_kind(pool, model, self._pairing.kind_of(beside))

    def by_revision(self, model: str | None) -> Mapping[str, Candidates]:
        """Return the candidates for a model by their revision; those without one have the empty name."""
        pool = self.of(model)
        found = self._by_revision.get(pool)
        if found is None:
            members: dict[str, list[Endpoint]] = {}
            for each in pool.endpoints:
                members.setdefault(each.instance.revision or "", []).append(each)
            found = {name: self._some_of(tuple(each), model) for name, each in members.items()}
            self._by_revision[pool] = found
        return found

    def fitting(self, beside: Endpoint, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint] | None:
        """Return those that fit one of the other role; ``None`` if all do, whoever there is."""
        if not self._several:
            return None
        kind = self._pairing.kind_of(beside)
        return [each for each in endpoints if self._pairing.kind_of(each) == kind]

    @property
    def several_kinds(self) -> bool:
        """Whether there are instances that do not fit together."""
        self._refresh()
        return self._several

    def known(self, model: str | None) -> str | None:
        """Return a model's name, or ``None`` for all that no instance is known to serve."""
        return model if model in self._named else None

    @property
    def apart(self) -> bool:
        """Whether there are models that not all endpoints of the role are offered for."""
        self._refresh()
        return not self._named <= self._common

    def may_serve(self, endpoint: Endpoint, model: str | None) -> bool:
        """Whether an endpoint of the role, in whatever state, is not left out for a model."""
        self._refresh()
        if not self._revisions.may_get(endpoint.instance.revision):
            return False
        if not (self._partners is None or self._pairing.kind_of(endpoint) in self._kinds(model)):
            return False
        if not model or model in self._named:
            return not model or _may_serve(endpoint, model)
        return not self._all_known

    def nobody_serves(self, model: str | None) -> bool:
        """Whether a model is one that no instance of the role serves, in whatever state, nor may serve."""
        self._refresh()
        return bool(model) and self._all_known and model not in self._named

    def _refresh(self) -> None:
        registry = self._registry
        routable, version = self._lineup.routable, registry.models.version
        if (
            self._routable is routable
            and self._models_version == version
            and (self._partners is None or self._partners is self._lineup_of_decode.routable)
        ):
            return
        self._routable, self._models_version = routable, version
        self._members = tuple(e for e in routable if self._revisions.may_get(e.instance.revision))
        self._several = self._pairing.several()
        paired = self._several and self._decode is not None
        self._partners = self._lineup_of_decode.routable if paired else None
        # Also those that are down: that a model's only instance restarts does not send it to others.
        endpoints = registry.endpoints(self._role)
        every = [each.models for each in endpoints]
        lists = [models.names for models in every if models.names]
        self._named = frozenset[str]().union(*lists)
        self._all_known = bool(every) and all(models.names and not models.serves_any for models in every)
        common = frozenset[str | None]((None, ""))
        if lists and not paired:  # else each model may have other partners
            adapters = frozenset[str]().union(*(models.adapters for models in every))
            common |= frozenset.intersection(*lists) - adapters
        self._common = common
        self._by_model, self._beside, self._by_revision = {}, {}, {}
        self._all = self._pool(self._fitting(self._members, None), None)
        self._by_members = {self._all.endpoints: self._all}

    def _of_model(self, model: str | None) -> Candidates:
        """Make the pool of a model that some serve and others do not; with ``None``, that of all others."""
        if model is None:
            members = () if self._all_known else tuple(e for e in self._members if _may_serve(e, ""))
            if not (members or self._all_known):
                members = self._members  # those that could know it are away: the answer is the engines'
        else:
            members = tuple(e for e in self._members if _may_serve(e, model))
        members = self._fitting(members, model)
        if model is not None and any(model in e.models.adapters for e in members):
            pool = self._pool(members, model)
        else:
            pool = self._by_members.get(members) or self._pool(members, None)
            self._by_members[members] = pool
        self._by_model[model] = pool
        return pool

    def _of_kind(self, pool: Candidates, model: str | None, kind: Kind) -> Candidates:
        found = self._beside.get((pool, kind))
        if found is None:
            members = tuple(e for e in pool.endpoints if self._pairing.kind_of(e) == kind)
            found = self._beside[pool, kind] = self._some_of(members, model)
        return found

    def _some_of(self, members: tuple[Endpoint, ...], model: str | None) -> Candidates:
        """Make a pool of some that are in that of a model."""
        return self._pool(members, model if any(model in e.models.adapters for e in members) else None)

    def _fitting(self, members: tuple[Endpoint, ...], model: str | None) -> tuple[Endpoint, ...]:
        """Return those that have a partner for a model: all, where it does not matter."""
        if self._partners is None:
            return members
        kinds = self._kinds(model)
        return tuple(e for e in members if self._pairing.kind_of(e) in kinds)

    def _kinds(self, model: str | None) -> set[Kind]:
        return (
            set()
            if self._decode is None
            else {self._pairing.kind_of(e) for e in self._decode.of(model).endpoints}
        )

    def _pool(self, endpoints: tuple[Endpoint, ...], adapter: str | None) -> Candidates:
        if adapter is not None:
            return AdapterCandidates(endpoints, self._availability, self._registry, self._random, adapter)
        return Candidates(endpoints, self._availability, self._registry.prefixes, self._random)


def _may_serve(endpoint: Endpoint, model: str) -> bool:
    models = endpoint.models
    return not models.names or model in models.names or models.serves_any
