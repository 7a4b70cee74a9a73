"""Filters the endpoints that can serve a request, and has a strategy rank them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random

from ..config import SchedulerConfig, connector_choice
from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import PD_ROLES, InstanceRole
from ..records.decision import Choice
from ..request.context import RequestContext
from ..strategies.least_load import LeastLoad
from .availability import Availability
from .candidates import LARGE_FLEET, Candidates, Offer
from .fence import StrategyFence
from .limits import Limits
from .pairing import Pairing
from .pools import Pools
from .ranking import Ranking
from .revisions import Revisions
from .shares import Shares
from .strategies_in_use import StrategiesInUse

LEAST_LOAD = "least_load"
"""Name of the strategy that ranks where another one has failed."""

_MAX_LAST_RESORTS = 16
"""Endpoints of each kind that are a last resort: to sort all of a large fleet takes a millisecond."""


class Scheduler:
    """Picks endpoints of a registry for requests.

    A strategy that fails is replaced by ``least_load`` for that pick (see :mod:`.fence`). ``seed`` makes
    choices at random repeatable.
    ``took`` is told of the time of each pick, by role and by ``stopwatch``.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        registry: Registry,
        seed: int | None = None,
        took: Mapping[InstanceRole, Callable[[float], None]] | None = None,
        stopwatch: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.config = config
        self.registry = registry
        self.strategies = StrategiesInUse(config, seed)
        self.limits = Limits(config)
        self._took = took
        self._stopwatch = stopwatch
        self._last: Ranking | None = None
        """The newest pick that has found somebody."""
        self._in_place = {role: StrategyFence(LeastLoad(config), _never) for role in PD_ROLES}
        """What ranks where a strategy has failed."""
        random, limits = Random(seed), self.limits
        self._availability = {
            role: Availability(registry, role, limits.saturated, limits.some) for role in InstanceRole
        }
        (prefill, decode), encode = PD_ROLES, InstanceRole.ENCODE
        pairing, of = Pairing(registry, lambda: connector_choice(config.connector).name), self._availability
        revisions = Revisions(lambda: config.revisions)
        partners = Pools(registry, decode, of[decode], random, pairing, revisions)
        self._pools = {
            prefill: Pools(registry, prefill, of[prefill], random, pairing, revisions, partners),
            decode: partners,
            encode: Pools(registry, encode, of[encode], random, pairing, Revisions(dict)),  # without shares
        }
        self._shares = Shares(self._pools, revisions)
        self._one_model = True
        self._models_known: tuple[object, ...] = (-1, None, None)
        """The fleet for which that was found."""

    def reconfigured(self) -> None:
        """Take the limits, the connector and the weights of the endpoints as they are configured now."""
        self.registry.models.changed()
        for availability in self._availability.values():
            availability.limit(self.limits.some)

    @property
    def reads_prefixes(self) -> bool:
        """Whether prompts must be hashed, because something in use reads ``request.cached``."""
        return self.config.disaggregation in ("auto", "tpot") or self.strategies.reads_prefixes

    def has_room(self, role: InstanceRole, now: float, model: str | None = None) -> bool:
        """Whether a request need not wait for a role: one endpoint is not saturated, or none can serve.

        In the second case there is nothing to wait for, and the request is refused by whoever picks.
        """
        return self._pools[role].of(model).has_room(now)

    def has_room_for(self, role: InstanceRole, request: RequestContext, now: float) -> bool:
        """Whether a request need not wait for a role; for P also whether it need not for the D after that."""
        exclude: Collection[Endpoint] = ()
        if role is InstanceRole.PREFILL and self.registry.left_out:
            exclude = self.barred(role, request, None)  # however idle they are
        if self.config.revisions:
            return self._shares.has_room(role, request, now, exclude)
        model = request.model
        has_room = self.has_room(InstanceRole.DECODE, now, model)
        return has_room and self._pools[role].of(model).has_room(now, exclude)

    def _candidates(
        self,
        role: InstanceRole,
        request: RequestContext,
        beside: Endpoint | None = None,
        exclude: Collection[Endpoint] = (),
    ) -> Candidates:
        if beside is None and self.config.revisions:
            return self._shares.candidates(role, request, exclude)
        return self._pools[role].of(request.model, beside)

    def room_at(self, now: float) -> float:
        """Return when the next endpoint is to be asked again that has said that it is full; else infinity."""
        return min(availability.room_at(now) for availability in self._availability.values())

    def can_serve(self, role: InstanceRole, model: str | None, subset: frozenset[str] | None = None) -> bool:
        """Whether an endpoint of a role could serve a model now, be it as a last resort.

        ``subset`` are the addresses to which the request may go (see :attr:`.RequestContext.subset`).
        """
        endpoints = self._pools[role].of(model).endpoints
        if subset is None:
            return bool(endpoints or self.last_resorts(role, (), model))
        outside = self.outside(role, subset)
        return any(e not in outside for e in endpoints) or bool(self.last_resorts(role, outside, model))

    def may_serve(self, endpoint: Endpoint, model: str | None) -> bool:
        """Whether an endpoint, in whatever state, is not known to lack a model that others serve."""
        return self._pools[endpoint.instance.role].may_serve(endpoint, model)

    def nobody_serves(self, role: InstanceRole, model: str | None) -> bool:
        """Whether no endpoint of a role, in whatever state, serves a model or may, as all have said."""
        return self._pools[role].nobody_serves(model)

    def fit(self, prefill: Endpoint, decode: Endpoint) -> bool:
        """Whether a P and a D fit together, in whatever state they are: see :mod:`.pairing`."""
        pools = self._pools[InstanceRole.DECODE]
        return not pools.several_kinds or pools.fitting(prefill, (decode,)) != []

    @property
    def several_kinds(self) -> bool:
        """Whether there are instances that do not fit together as P and D."""
        return self._pools[InstanceRole.DECODE].several_kinds

    def fitting(self, prefill: Endpoint, decode: Sequence[Endpoint]) -> Sequence[Endpoint] | None:
        """Return those D that can use what a P hands over; ``None`` if all of the fleet can."""
        found = self._pools[InstanceRole.DECODE].fitting(prefill, decode)
        if not (barred := self.registry.wrong_pairs.barred(prefill)):
            return found
        return [each for each in (decode if found is None else found) if each not in barred]

    @property
    def tells_apart(self) -> bool:
        """Whether it matters for D which model a request names."""
        return self._pools[InstanceRole.DECODE].apart

    def serving(
        self, role: InstanceRole, model: str | None, beside: Endpoint | None = None
    ) -> Sequence[Endpoint]:
        """Return the routable endpoints of a role that a request of a model may be sent to; see ``pick``."""
        return self._pools[role].of(model, beside).endpoints

    def one_model(self) -> bool:
        """Whether all instances that say which models they serve, P and D, serve the same.

        If not, a request that names none may mean one model to P and another one to D.
        """
        registry = self.registry
        known = (registry.models.version, *(registry.routable(role) for role in PD_ROLES))
        if any(a is not b for a, b in zip(known, self._models_known, strict=True)):
            self._models_known = known
            serving = (e for role in PD_ROLES for e in registry.endpoints(role))
            self._one_model = len({e.models.names for e in serving if e.models.names}) <= 1
        return self._one_model

    def some(self, role: InstanceRole, model: str | None = None) -> Sequence[Endpoint]:
        """Return the routable endpoints of a role, for a model; of many, a sample."""
        return self._pools[role].of(model).some()

    def most_cached(self, role: InstanceRole, request: RequestContext) -> Endpoint | None:
        """Return the routable endpoint with the longest cached prefix of a prompt, if one has any of it."""
        return self._candidates(role, request).most_cached(request)

    def longest_cached(
        self, role: InstanceRole, request: RequestContext, beside: Endpoint
    ) -> Sequence[Endpoint]:
        """Return some routable endpoints that have the longest cached prefixes, and fit ``beside``."""
        return self._pools[role].of(request.model, beside).longest_cached(request)

    def pick(
        self,
        role: InstanceRole,
        request: RequestContext,
        *,
        count: int = 1,
        exclude: Collection[Endpoint] = (),
        beside: Endpoint | None = None,
    ) -> list[Endpoint]:
        """Return up to ``count`` endpoints of ``role``, best first; none if none can serve.

        The strategy ranks those that are healthy and neither draining nor in ``exclude``, without those that
        are known to lack the request's model or, with ``beside``, do not fit that P or cannot take over from
        it. Left out are also P from which nobody can. Saturated ones, and ones
        whose trial request runs, are offered to it only if there are no others. Of many it is offered a
        sample, if it accepts that. Where it fails, or returns fewer, ``least_load`` ranks the rest.
        """
        if request.subset is not None:
            exclude = (*exclude, *self.outside(role, request.subset))
        if self.registry.left_out:
            exclude = (*exclude, *self.barred(role, request, beside))
        if self._took is None:
            return self._pick(role, request, count, exclude, beside)
        began = self._stopwatch()
        ranked = self._pick(role, request, count, exclude, beside)
        self._took[role](self._stopwatch() - began)
        return ranked

    def _pick(
        self,
        role: InstanceRole,
        request: RequestContext,
        count: int,
        exclude: Collection[Endpoint],
        beside: Endpoint | None,
    ) -> list[Endpoint]:
        self._last = None
        request.look_up_in(self.registry.prefixes)
        strategy, candidates = self.strategies.of(role), self._candidates(role, request, beside, exclude)
        offer = _offer(candidates, strategy, request, exclude)
        if not offer.endpoints:
            return []
        request.offer(offer.endpoints)
        if role is InstanceRole.DECODE:
            request.prefilled_by(None if beside is None else self.registry.load.transfers.of(beside.id))
        ranked = strategy.rank(offer, request, count)
        if ranked is not None and not ranked:  # it knows only excluded ones, though it was asked for more
            offer = Offer(candidates.all(request.now, exclude))
            ranked = strategy.rank(offer, request, count)
        by, name, offered, ranked = strategy, self.strategies.names[role], offer.endpoints, ranked or []
        if len(ranked) < count and (rest := _rest(candidates, offer, request, ranked)):
            if not ranked:
                by, name, offered = self._in_place[role], LEAST_LOAD, tuple(rest)
            ranked += self._in_place[role].strategy.rank(rest, request, count - len(ranked))
        if ranked:
            self._last = Ranking(by, name, candidates, offered, exclude, ranked)
        return ranked

    def barred(
        self, role: InstanceRole, request: RequestContext, beside: Endpoint | None
    ) -> Sequence[Endpoint]:
        """Return the D that may not take over from ``beside`` now, or the P from which no D may.

        That is so where hand-offs fail or gave wrong texts: see :mod:`vllm_pd_scheduler.fleet.left_out`.
        """
        left_out, now = self.registry.left_out, request.now
        if role is InstanceRole.DECODE:
            return () if beside is None else left_out.barred(beside, now)
        decode, model = self._pools[InstanceRole.DECODE], request.model
        return [p for p in left_out.suspects if left_out.useless(p, decode.of(model, p).endpoints, now)]

    def explain(self, role: InstanceRole, request: RequestContext) -> Choice | None:
        """Return how the newest pick was made, which must have been for this role and request.

        Call it for picks that are acted on, before the reservation changes the load. It is ``None`` if
        nobody could be picked.
        """
        last = self._last
        return None if last is None else last.choice(self.registry, role, request)

    def outside(self, role: InstanceRole, subset: frozenset[str] | None) -> Collection[Endpoint]:
        """Return the endpoints of a role that are left out by the subset that a request may go to."""
        if subset is None or role is not InstanceRole.DECODE:
            return ()
        return frozenset(e for e in self.registry.endpoints(role) if not _is_in(subset, e))

    def encoders(
        self, model: str | None, now: float, exclude: Collection[Endpoint] = ()
    ) -> Sequence[Endpoint]:
        """Return the encode instances that a model's items may be sent to, and that have room.

        No strategy ranks them. One of a roll-out's revision is left out while there are P or D of another
        one: what it computes may not be what they would.
        """
        candidates = self._pools[InstanceRole.ENCODE].of(model).all(now, exclude)
        found = [endpoint for endpoint in candidates if not self.limits.saturated(endpoint, now)]
        if all(endpoint.instance.revision is None for endpoint in found):
            return found
        served = {each.instance.revision for role in PD_ROLES for each in self.registry.routable(role)}
        return [e for e in found if e.instance.revision is None or served <= {e.instance.revision}]

    def last_resorts(
        self, role: InstanceRole, exclude: Collection[Endpoint], model: str | None = None
    ) -> list[Endpoint]:
        """Return endpoints to try when all in ``exclude``, which ``pick`` returned, have failed a request.

        First come those that ``pick`` leaves out while there are better ones (saturated or on trial), then
        those that it never returns (ejected). They may fail too, but without them the request surely does.
        None is known to lack the model. Of the ranks of a process there is one.
        """
        pools, registry = self._pools[role], self.registry
        routable = (e for e in pools.of(model).endpoints if e not in exclude and not e.rank)
        ejected = (e for e in registry.ejected(role) if e not in exclude and pools.may_serve(e, model))
        ejected = (e for e in ejected if not e.rank)
        others = [e for kind in (routable, ejected) for e in itertools.islice(kind, _MAX_LAST_RESORTS)]
        if registry.has_ranks:
            others = [min(registry.ranks_of(e), key=lambda rank: rank.requests) for e in others]
        return sorted(others, key=lambda e: (e.ejected, e.on_trial, e.requests))

    def compare_shadow(
        self,
        role: InstanceRole,
        request: RequestContext,
        picked: Endpoint,
        exclude: Collection[Endpoint] = (),
        beside: Endpoint | None = None,
    ) -> None:
        """Ask the shadow strategy, if there is one, what it would have picked in place of ``picked``.

        Call it for picks that are acted on, before the reservation changes the load that the shadow sees.
        """
        if (shadow := self.strategies.shadow) is not None:
            candidates = self._candidates(role, request, beside, exclude)
            if request.subset is not None:
                exclude = (*exclude, *self.outside(role, request.subset))
            if self.registry.left_out:
                exclude = (*exclude, *self.barred(role, request, beside))
            offer = _offer(candidates, shadow.strategy(role), request, exclude)
            shadow.compare(role, offer, request, picked)

    def preview(
        self, role: InstanceRole, request: RequestContext, *, count: int = 1, beside: Endpoint | None = None
    ) -> list[Endpoint]:
        """Return what the next ``pick`` would return, without taking a turn of the strategy."""
        with self.strategies.of(role).same_turn(), self._in_place[role].same_turn():
            return self.pick(role, request, count=count, beside=beside)


def _is_in(subset: frozenset[str], endpoint: Endpoint) -> bool:
    address = endpoint.address
    return address is not None and (address in subset or address.rpartition(":")[0].strip("[]") in subset)


def _offer(
    candidates: Candidates,
    strategy: StrategyFence,
    request: RequestContext,
    exclude: Collection[Endpoint],
) -> Offer:
    """Return what a strategy is to rank."""
    if len(candidates.endpoints) > LARGE_FLEET and strategy.accepts_sample(request):
        return candidates.offer_sample(request, exclude, prefixes=strategy.reads_prefixes)
    return candidates.offer_all(request.now, exclude)


def _never(error: Exception) -> None:
    raise error


def _rest(
    candidates: Candidates, offer: Offer, request: RequestContext, ranked: list[Endpoint]
) -> Sequence[Endpoint]:
    """Return what a strategy was offered and did not rank; of many, a sample."""
    if len(offer.endpoints) > LARGE_FLEET:
        taken = [*offer.exclude, *ranked]
        return [
            e for e in candidates.offer_sample(request, taken, prefixes=False).endpoints if e not in taken
        ]
    return [e for e in offer.endpoints if e not in ranked and e not in offer.exclude]
