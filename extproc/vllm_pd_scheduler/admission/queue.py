"""The requests that wait in the scheduler: bounded, by priority, in turn by tenant, shortest first."""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from ..fleet.endpoint import Reservation
from ..models import InstanceRole
from ..request.context import RequestContext
from ..request.errors import Reject

_REMEMBERED = 1024
"""Tenants with nothing waiting of whom is known what they were given, in each priority."""


Outcome = Reservation | Reject | Exception | None
"""How a ticket ended; an exception is what the strategy raised."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that wants to go to an endpoint of a role, and how that ended.

    ``settle`` is called once, by the dispatcher. The outcome is a reservation, an error, or ``None`` if no
    endpoint can serve.
    """

    request: RequestContext
    role: InstanceRole
    size: int = 0
    """Bytes that are kept while it waits."""
    cost: float = 0.0
    """Predicted seconds of work."""
    settled: bool = False
    outcome: Outcome = None
    on_settled: Callable[[Ticket], None] | None = None

    def settle(self, outcome: Outcome) -> None:
        """Say how it ended."""
        self.settled, self.outcome = True, outcome
        if self.on_settled is not None:
            self.on_settled(self)


@dataclass(slots=True)
class _Tenant:
    served: float = 0.0
    """Work it was given while others waited, in predicted seconds."""
    waiting: list[tuple[float, int, Ticket]] = field(default_factory=list)


@dataclass(slots=True)
class _Class:
    """The requests of one priority."""

    tenants: dict[str, _Tenant] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)
    """What tenants with nothing waiting were given: who comes back at once has not been given less."""

    def __iter__(self) -> Iterator[Ticket]:
        """Yield them as they should be served: always the next of the tenant that has had the least."""
        turns = [(tenant.served, name, 0) for name, tenant in self.tenants.items()]
        heapq.heapify(turns)
        while turns:
            served, name, at = turns[0]
            waiting = self.tenants[name].waiting
            if at == len(waiting):
                heapq.heappop(turns)
                continue
            ticket = waiting[at][2]
            heapq.heapreplace(turns, (served + ticket.cost, name, at + 1))
            yield ticket


@dataclass(slots=True, eq=False)
class RequestQueue:
    """At most ``size`` requests of ``size_bytes`` bytes together.

    Priorities are strict. Within one, tenants share what is served by predicted work (a virtual token
    counter: Sheng et al., "Fairness in Serving Large Language Models", 2024); a tenant that comes anew
    starts level with the one that has had the least, if it has not had more. Within a tenant the least
    ``order`` goes first.
    """

    size: int
    size_bytes: int
    bytes: int = 0
    work: float = 0.0
    """Predicted seconds of all that wait."""
    _roles: Counter[InstanceRole] = field(default_factory=Counter)
    _places: dict[Ticket, tuple[int, float, int]] = field(default_factory=dict)
    """Priority, order and arrival number of each, in the order of arrival."""
    _classes: dict[int, _Class] = field(default_factory=dict)
    _late: dict[Ticket, None] = field(default_factory=dict)
    _number: int = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket in self._places

    def __iter__(self) -> Iterator[Ticket]:
        """Yield all as they should be served; those that were let pass come last."""
        for priority in sorted(self._classes, reverse=True):
            yield from self._classes[priority]
        yield from self._late

    def waiting(self, role: InstanceRole) -> int:
        """Return how many wait for a role."""
        return self._roles[role]

    def by_arrival(self) -> Iterator[Ticket]:
        """Yield all, the one that has waited longest first."""
        return iter(self._places)

    def push(self, ticket: Ticket, order: float) -> Collection[Ticket] | None:
        """Take a request in. Return those that it displaces, or ``None`` if there is no room for it.

        It displaces the last ones of a lower priority, and only if that makes room. First to go are those
        that were let pass, of its own priority too.
        """
        displaced: list[Ticket] = []
        room, room_bytes = self.size - len(self), self.size_bytes - self.bytes
        lower = self._last_first(ticket.request.priority)
        while room < 1 or room_bytes < ticket.size:
            victim = next(lower, None)
            if victim is None:
                return None
            displaced.append(victim)
            room, room_bytes = room + 1, room_bytes + victim.size
        for victim in displaced:
            self.remove(victim)
        self._insert(ticket, order)
        return displaced

    def _insert(self, ticket: Ticket, order: float) -> None:
        self._number += 1
        priority = ticket.request.priority
        one = self._classes.setdefault(priority, _Class())
        tenants = one.tenants
        tenant = tenants.get(ticket.request.tenant)
        if tenant is None:
            level = min((t.served for t in tenants.values()), default=0.0)
            tenant = _Tenant(max(level, one.left.pop(ticket.request.tenant, 0.0)))
            tenants[ticket.request.tenant] = tenant
        bisect.insort(tenant.waiting, (order, self._number, ticket))
        self._places[ticket] = (priority, order, self._number)
        self.bytes += ticket.size
        self.work += ticket.cost
        self._roles[ticket.role] += 1

    def remove(self, ticket: Ticket, *, served: bool = False) -> None:
        """Take a request out; ``served`` counts its work for its tenant."""
        priority, order, number = self._places.pop(ticket)
        self.bytes -= ticket.size
        self.work = max(0.0, self.work - ticket.cost) if self._places else 0.0
        self._roles[ticket.role] -= 1
        if ticket in self._late:
            del self._late[ticket]
        else:
            self._leave_class(ticket, priority, order, number, served)

    def let_pass(self, ticket: Ticket) -> bool:
        """Have a request wait until nobody else does; return whether it did not yet."""
        if ticket in self._late:
            return False
        self._leave_class(ticket, *self._places[ticket], served=False)
        self._late[ticket] = None
        return True

    def _leave_class(self, ticket: Ticket, priority: int, order: float, number: int, served: bool) -> None:
        one = self._classes[priority]
        tenants = one.tenants
        tenant = tenants[ticket.request.tenant]
        del tenant.waiting[bisect.bisect_left(tenant.waiting, (order, number))]
        if served:
            tenant.served += ticket.cost
        if not tenant.waiting:
            del tenants[ticket.request.tenant]
            one.left[ticket.request.tenant] = tenant.served
            if len(one.left) > _REMEMBERED:
                del one.left[next(iter(one.left))]
            if not tenants:
                del self._classes[priority]

    def _last_first(self, priority: int) -> Iterator[Ticket]:
        """Yield those below a priority, the least important first."""
        late = [t for t in self._late if t.request.priority <= priority]
        yield from reversed(late)
        for lower in sorted(p for p in self._classes if p < priority):
            yield from reversed(list(self._classes[lower]))
