"""The queue of requests that wait in the scheduler.

It is bounded in requests and bytes. Higher priorities go first; within a priority tenants take turns, and
each tenant's shortest request goes first.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b

from msgspec import Struct

from ..fleet.reservation import Reservation
from ..models import InstanceRole
from ..records.decision import Choice
from ..request.context import RequestContext
from ..request.errors import Reject

_MAX_IDLE_TENANTS = 1024
"""Tenants without waiting requests whose served work is remembered, for each priority.

Clients choose the tenant's name, so the number must be bounded. 1024 is a choice, as large as the default
queue: a tenant that is forgotten starts level with the others when it comes back.
"""

SHORT_S = 0.1
"""Seconds of prefill, as predicted, up to which a request is short.

A choice: the fixed cost of an engine's step, some milliseconds, matters beside it. That cost itself would be
a bad measure, since it is hardly known while all prompts are alike.
"""

TenantKey = bytes
"""Eight that stand for a tenant, here and for other replicas of the scheduler."""


@lru_cache(2 * _MAX_IDLE_TENANTS)
def tenant_key(name: str) -> TenantKey:
    """Return the key of a tenant: a hash of its name."""
    return blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()


Outcome = Reservation | Reject | None
"""How a ticket ended: served, refused, or no endpoint can serve (``None``)."""


class Ticket(Struct, eq=False):
    """A request that asks for an endpoint of one role.

    The dispatcher calls :meth:`settle` exactly once. ``outcome`` has no meaning before that.
    """

    request: RequestContext
    role: InstanceRole
    size: int = 0
    """Bytes that stay in memory while the request waits."""
    cost: float = 0.0
    """Predicted seconds of prefill."""
    claim: Reservation | None = None
    """Its endpoint, while it is not known whether another replica of the scheduler has chosen that too."""
    claims: int = 0
    """How many it has had."""
    charged: bool = False
    """Whether its cost counts as work that its tenant was given."""
    settled: bool = False
    outcome: Outcome = None
    choice: Choice | None = None
    """How its endpoint was chosen, if it has got one."""
    waited: float = 0.0
    """Seconds that it was in the queue."""
    on_settled: Callable[[Ticket], None] | None = None

    def settle(self, outcome: Outcome) -> None:
        """Record the outcome and call ``on_settled``."""
        self.settled, self.outcome = True, outcome
        if self.on_settled is not None:
            self.on_settled(self)


@dataclass(slots=True)
class _Tenant:
    """The waiting requests of one tenant within one priority."""

    name: str
    served: float = 0.0
    """Work that the tenant was given while others waited, in predicted seconds, on other replicas too."""
    waiting: list[tuple[float, int, Ticket]] = field(default_factory=list)
    """Sorted: the strategy's order, the arrival number (so that tickets are never compared), the ticket."""


@dataclass(slots=True)
class _PriorityLevel:
    """The waiting requests of one priority."""

    tenants: dict[TenantKey, _Tenant] = field(default_factory=dict)
    """Tenants that have requests waiting, by :func:`tenant_key`."""
    served_idle: dict[TenantKey, float] = field(default_factory=dict)
    """``served`` of tenants without waiting requests.

    Without it a tenant could reset its count by waiting a moment until its queue is empty.
    """

    def __iter__(self) -> Iterator[Ticket]:
        """Yield tickets in the order in which to serve them.

        The next is always the first of the tenant with the least served work, where those yielded before
        count as served.
        """
        turns = [(tenant.served, tenant.name, key, 0) for key, tenant in self.tenants.items()]
        heapq.heapify(turns)
        while turns:
            served, name, key, index = turns[0]
            waiting = self.tenants[key].waiting
            if index == len(waiting):
                heapq.heappop(turns)
                continue
            ticket = waiting[index][2]
            heapq.heapreplace(turns, (served + ticket.cost, name, key, index + 1))
            yield ticket

    @property
    def least(self) -> float:
        """The work of the tenant that was given the least of those that wait."""
        return min((tenant.served for tenant in self.tenants.values()), default=0.0)

    def idles(self, key: TenantKey, served: float) -> None:
        """Remember what a tenant was served of which nothing waits."""
        self.served_idle[key] = served
        if len(self.served_idle) > _MAX_IDLE_TENANTS:
            del self.served_idle[next(iter(self.served_idle))]


@dataclass(slots=True, eq=False)
class RequestQueue:
    """Waiting requests, at most ``max_requests`` of together ``max_bytes`` bytes.

    - Priorities are strict: a lower one is served only when no higher one waits.
    - Within a priority, tenants share by predicted work (a virtual token counter: Sheng et al., "Fairness
      in Serving Large Language Models", OSDI 2024). A tenant that arrives starts level with the tenant that
      was given the least, unless it was given more itself before. What other replicas of the scheduler give
      it counts as if it were given here (:meth:`drawn_elsewhere`), so the shares are those of the fleet.
    - Within a tenant, the request with the least ``order`` goes first; the strategy says the order.
    - Deferred requests (see :meth:`defer`) come after all others, whatever their priority.
    """

    max_requests: int
    max_bytes: int
    bytes: int = 0
    """Sum of the waiting requests' ``size``."""
    work: float = 0.0
    """Sum of the waiting requests' ``cost``, in predicted seconds."""
    _roles: Counter[InstanceRole] = field(default_factory=Counter)
    _long: int = 0
    """Requests for prefill that are not short."""
    _positions: dict[Ticket, tuple[int, float, int]] = field(default_factory=dict)
    """Priority, order and arrival number of every waiting ticket, in the order of arrival."""
    _levels: dict[int, _PriorityLevel] = field(default_factory=dict)
    """By priority; without those in which nothing waits."""
    _deferred: dict[Ticket, None] = field(default_factory=dict)
    """An ordered set."""
    _arrivals: int = 0

    def __len__(self) -> int:
        return len(self._positions)

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket in self._positions

    def __iter__(self) -> Iterator[Ticket]:
        """Yield all tickets in the order in which to serve them; deferred ones come last."""
        for priority in sorted(self._levels, reverse=True):
            yield from self._levels[priority]
        yield from self._deferred

    @property
    def only_short(self) -> bool:
        """Whether no request waits for prefill that takes longer than ``SHORT_S``."""
        return not self._long

    def waiting(self, role: InstanceRole) -> int:
        """Return how many requests wait for an endpoint of a role."""
        return self._roles[role]

    def work_of(self, role: InstanceRole) -> float:
        """Return the predicted seconds of prefill of the requests that wait for an endpoint of a role."""
        return math.fsum(ticket.cost for ticket in self._positions if ticket.role is role)

    def by_arrival(self) -> Iterator[Ticket]:
        """Yield all tickets, the one that has waited longest first."""
        return iter(self._positions)

    def push(self, ticket: Ticket, order: float) -> Collection[Ticket] | None:
        """Add a ticket. Return the tickets that were removed to make room, or ``None`` if it was not added.

        Only tickets of a lower priority, and deferred ones of the same priority or lower, give way to it:
        deferred ones first, then those that would be served last. If that would not make enough room,
        nothing changes.
        """
        displaced: list[Ticket] = []
        room, room_bytes = self.max_requests - len(self), self.max_bytes - self.bytes
        candidates = self._displaceable(ticket.request.priority)
        while room < 1 or room_bytes < ticket.size:
            victim = next(candidates, None)
            if victim is None:
                return None
            displaced.append(victim)
            room, room_bytes = room + 1, room_bytes + victim.size
        for victim in displaced:
            self.remove(victim)
        self._insert(ticket, order)
        return displaced

    def _insert(self, ticket: Ticket, order: float) -> None:
        self._arrivals += 1
        name, priority = ticket.request.tenant, ticket.request.priority
        level, key = self._levels.setdefault(priority, _PriorityLevel()), tenant_key(name)
        tenant = level.tenants.get(key)
        if tenant is None:
            # Not from zero: the newcomer would have all turns until it had caught up with the others.
            tenant = _Tenant(name, max(level.least, level.served_idle.pop(key, 0.0)))
            level.tenants[key] = tenant
        bisect.insort(tenant.waiting, (order, self._arrivals, ticket))
        self._positions[ticket] = (priority, order, self._arrivals)
        self.bytes += ticket.size
        self.work += ticket.cost
        self._roles[ticket.role] += 1
        self._long += _is_long(ticket)

    def remove(self, ticket: Ticket, *, served: bool = False) -> None:
        """Remove a ticket. With ``served`` its cost counts as work that its tenant was given."""
        priority, order, number = self._positions.pop(ticket)
        self.bytes -= ticket.size
        # An empty queue has exactly no work: rounding errors must not add up over the life of the process.
        self.work = max(0.0, self.work - ticket.cost) if self._positions else 0.0
        self._roles[ticket.role] -= 1
        self._long -= _is_long(ticket)
        if ticket in self._deferred:
            del self._deferred[ticket]
        else:
            self._remove_from_level(ticket, priority, order, number, served)

    def drawn_elsewhere(self, priority: int, key: TenantKey, work: float) -> None:
        """Count work that a tenant was given by another replica, if somebody waits here in its priority."""
        level = self._levels.get(priority)
        if level is None:
            return
        if (tenant := level.tenants.get(key)) is not None:
            tenant.served += work
        else:
            level.idles(key, max(level.least, level.served_idle.pop(key, 0.0)) + work)

    def defer(self, ticket: Ticket) -> bool:
        """Move a ticket behind all that are not deferred; return ``False`` if it is there already."""
        if ticket in self._deferred:
            return False
        self._remove_from_level(ticket, *self._positions[ticket], served=False)
        self._deferred[ticket] = None
        return True

    def _remove_from_level(
        self, ticket: Ticket, priority: int, order: float, number: int, served: bool
    ) -> None:
        key, level = tenant_key(ticket.request.tenant), self._levels[priority]
        tenant = level.tenants[key]
        del tenant.waiting[bisect.bisect_left(tenant.waiting, (order, number))]
        if served:
            tenant.served += ticket.cost
        if not tenant.waiting:
            del level.tenants[key]
            level.idles(key, tenant.served)
            if not level.tenants:
                # Counts matter only among those that wait together: when nobody does, all start anew.
                del self._levels[priority]

    def _displaceable(self, priority: int) -> Iterator[Ticket]:
        """Yield the tickets that may give way to one of ``priority``, the least important first."""
        deferred = [t for t in self._deferred if t.request.priority <= priority]
        yield from reversed(deferred)
        for lower in sorted(p for p in self._levels if p < priority):
            yield from reversed(list(self._levels[lower]))


def _is_long(ticket: Ticket) -> bool:
    return ticket.role is InstanceRole.PREFILL and ticket.cost > SHORT_S
