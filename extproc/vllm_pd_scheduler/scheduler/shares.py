"""The candidates of a request where revisions have weights: those of the revision that is chosen for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..fleet.endpoint import Endpoint
from ..models import InstanceRole
from ..request.context import RequestContext
from .candidates import Candidates
from .pools import Pools
from .revisions import Revisions


class Shares:
    """Gives each revision its share of the requests, of those that have somebody for them.

    A request's revision is chosen when its candidates are first asked for, so by its P if it is split, and
    holds for all that follows. It is chosen anew only where the first has nobody left for it, or is full.
    """

    def __init__(self, pools: Mapping[InstanceRole, Pools], revisions: Revisions) -> None:
        self._pools = pools
        self._revisions = revisions

    def candidates(
        self, role: InstanceRole, request: RequestContext, exclude: Collection[Endpoint] = ()
    ) -> Candidates:
        """Return those of its revision, not all of which are in ``exclude``; if that cannot be, of all."""
        pools, model = self._pools[role], request.model
        found = pools.by_revision(model)
        own = None if request.revision is None else found.get(request.revision)
        if own is not None and not _all_in(own, exclude):
            return own
        among = [name for name, pool in found.items() if not _all_in(pool, exclude)]
        if not among:
            return own or pools.of(model)
        return found[self._choose(role, request, among, request.session)]

    def has_room(
        self, role: InstanceRole, request: RequestContext, now: float, exclude: Collection[Endpoint] = ()
    ) -> bool:
        """Whether a request need not wait for one that is not in ``exclude``.

        One whose revision is full goes to another one that is not.
        """
        decode = self._pools[InstanceRole.DECODE]
        beside, all_decode = decode.by_revision(request.model), decode.of(request.model)

        def room(pool: Candidates, revision: str | None) -> bool:
            partners = beside.get(revision or "", all_decode)
            return pool.has_room(now, exclude) and (role is InstanceRole.DECODE or partners.has_room(now))

        if room(self.candidates(role, request, exclude), request.revision):
            return True
        found = self._pools[role].by_revision(request.model)
        free = [name for name, pool in found.items() if room(pool, name) and not _all_in(pool, exclude)]
        if free:
            self._choose(role, request, free, None)  # its session stays where it is
        return bool(free)

    def _choose(
        self, role: InstanceRole, request: RequestContext, among: list[str], session: str | None
    ) -> str:
        turns_of = role, self._pools[role].known(request.model)
        chosen = self._revisions.choose(sorted(among), session, turns_of)
        request.goes_to(chosen)
        return chosen


def _all_in(pool: Candidates, exclude: Collection[Endpoint]) -> bool:
    return all(each in exclude for each in pool.endpoints)
