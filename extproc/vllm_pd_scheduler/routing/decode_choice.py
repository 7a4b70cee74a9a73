"""Which D get a request: the first, and those that Envoy tries after it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from msgspec import Struct

from ..config import SchedulerConfig
from ..connectors import Connectors
from ..fleet.endpoint import Endpoint
from ..models import InstanceRole
from ..records.decision import Decision
from ..request.context import RequestContext
from ..request.errors import Reject, reject
from ..scheduler import Scheduler
from ..telemetry import Served
from .catalog import Catalog
from .tried import no_prefill


class NoPartner(Exception):
    """No D that fits P can serve any more: its hand-off cannot be used."""


class ToDecode(Struct, eq=False):
    """A request that is to be sent to D.

    It goes to ``preferred``, if that has room, else to the strategy's choice. One that is ``bound`` goes to
    ``preferred`` as it is.
    """

    context: RequestContext
    decision: Decision
    served: Served
    body: bytes | None = None
    """In place of the client's; ``None``: that stays as it is."""
    limit: float | None = None
    """Seconds to the first byte of the answer; ``None``: no limit."""
    preferred: Endpoint | None = None
    own: Endpoint | None = None
    """What the strategy chose for it, if it was asked already."""
    bound: bool = False
    beside: Endpoint | None = None
    """The P that hands it over: only a D that fits it gets the hand-off. Further attempts, which have none,
    may go to all."""


class DecodeChoice:
    """Chooses D for requests."""

    def __init__(
        self, config: SchedulerConfig, scheduler: Scheduler, connectors: Connectors, catalog: Catalog
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._registry = scheduler.registry
        self._connectors = connectors
        self._catalog = catalog

    def choose(self, way: ToDecode) -> list[Endpoint] | Reject:
        """Return the D of a request, that of the first attempt first, or the answer if there is none.

        Raise :exc:`NoPartner` if there are D, but none that could use what its P hands over.
        """
        context, decision, beside = way.context, way.decision, way.beside
        count = 1 + self._config.max_retries
        outside = self._scheduler.outside(InstanceRole.DECODE, context.subset)
        picked, own = self._picked(way, outside, count)
        if beside is not None and not picked and self._has_no_partner(context, beside):
            raise NoPartner
        picked = picked or self._scheduler.last_resorts(InstanceRole.DECODE, outside, context.model)
        if not picked:
            return self.no_decode(context, decision)
        if decision.continues_from and not way.bound:  # the one that has failed the answer comes last
            picked = sorted(picked, key=lambda endpoint: endpoint.id == decision.continues_from)
        decode = self._in_turn(context, picked[:count], count)
        if way.served is not Served.PASSED and self._connectors.some_need_prefill:
            decode = self._able(decode, context, way.served, beside, count)
            if not decode:
                return no_prefill() if way.served is Served.LOCAL else _indivisible()
        if decode[0] is own:  # not what another rule has chosen
            self._scheduler.compare_shadow(InstanceRole.DECODE, context, decode[0], beside=beside)
        return decode

    def _picked(
        self, way: ToDecode, outside: Collection[Endpoint], count: int
    ) -> tuple[list[Endpoint], Endpoint | None]:
        """Return the D that are picked: the preferred one, if it takes the request, then the strategy's.

        And the one among them that the strategy has chosen to be the first.
        """
        context, decision, preferred = way.context, way.decision, way.preferred
        pick = self._scheduler.preview if preferred else self._scheduler.pick
        picked = pick(InstanceRole.DECODE, context, count=count, beside=way.beside)
        choice = self._scheduler.explain(InstanceRole.DECODE, context)
        if preferred is None or preferred in outside or not (way.bound or self._has_room(preferred, context)):
            decision.decode = choice
            return picked, picked[0] if picked else None
        if preferred is not way.own:  # else that was another pick
            decision.decode = choice
        return [preferred, *(e for e in picked if e is not preferred)], way.own

    def _has_room(self, endpoint: Endpoint, context: RequestContext) -> bool:
        return endpoint.routable and not self._scheduler.limits.saturated(endpoint, context.now)

    def serves_alone(self, endpoint: Endpoint) -> bool:
        """Whether a D can serve a request that no P prefills."""
        return not self._connectors.of(endpoint.instance).needs_prefill

    def _able(
        self,
        decode: list[Endpoint],
        context: RequestContext,
        served: Served,
        beside: Endpoint | None,
        count: int,
    ) -> list[Endpoint]:
        """Return those D that can serve a request, further attempts included."""
        if beside is not None and not self.serves_alone(beside):
            fitting = self._scheduler.fitting(beside, decode)
            return decode if fitting is None else [each for each in decode if each in fitting]
        able = [each for each in decode if self.serves_alone(each) or (each is decode[0] and beside)]
        if able:
            return able
        outside = self._scheduler.outside(InstanceRole.DECODE, context.subset)
        others = self._scheduler.last_resorts(InstanceRole.DECODE, outside, context.model)
        return [each for each in others if self.serves_alone(each)][:count]

    def _has_no_partner(self, context: RequestContext, prefill: Endpoint) -> bool:
        """Whether there are D, but none that could use what a P hands over."""
        scheduler, role = self._scheduler, InstanceRole.DECODE
        return scheduler.several_kinds or bool(scheduler.barred(role, context, prefill))

    def _in_turn(self, context: RequestContext, picked: list[Endpoint], count: int) -> list[Endpoint]:
        """Return up to ``count`` that Envoy tries one after another: those picked, then the last resorts."""
        role = InstanceRole.DECODE
        # A further attempt has the same headers: same key only.
        key = picked[0].instance.api_key
        found = [endpoint for endpoint in picked if endpoint.instance.api_key == key]
        if self._registry.has_ranks:
            found = _of_each_process(found)
            picked = [rank for each in picked for rank in self._registry.ranks_of(each)]
        if len(found) < count and not self._are_all(picked):
            taken = [*picked, *self._scheduler.outside(role, context.subset)]
            others = self._scheduler.last_resorts(role, taken, context.model)
            found += [endpoint for endpoint in others if endpoint.instance.api_key == key]
        return found[:count]

    def _are_all(self, picked: list[Endpoint]) -> bool:
        """Whether there are no other D, be it as a last resort."""
        registry, role = self._registry, InstanceRole.DECODE
        if registry.has_ranks or registry.ejected(role):
            return False
        return len(picked) == len(registry.routable(role))

    def no_decode(self, context: RequestContext, decision: Decision) -> Reject:
        """Return the answer to a request that no D can serve."""
        unknown = self._catalog.unknown(decision.asked_model, context.model)
        if unknown is not None:  # an adapter may have been unloaded meanwhile
            return unknown
        registered = self._registry.endpoints(InstanceRole.DECODE)
        endpoints = [e for e in registered if self._scheduler.may_serve(e, context.model)]
        nobody = (
            "none that has the model is of a revision with a weight" if registered else "none is registered"
        )
        states = ", ".join(f"{e.id} is {e.state}" for e in endpoints[:8]) or nobody
        return reject(503, f"No decode instance can serve this request now: {states}.", "no_decode")


def _indivisible() -> Reject:
    """Return the answer to a request that only a D that prefills could serve, where no D does."""
    words = (
        "This request cannot be split between prefill and decode instances, and no decode instance here "
        "serves one alone."
    )
    return reject(501, words, "indivisible")


def _of_each_process(endpoints: Iterable[Endpoint]) -> list[Endpoint]:
    """Return the first endpoint of each process: a request that one has failed is not for its other ranks."""
    found: dict[str, Endpoint] = {}
    for endpoint in endpoints:
        found.setdefault(endpoint.instance.instance_id, endpoint)
    return list(found.values())
