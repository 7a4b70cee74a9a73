"""Who is served next: late binding and admission control, with one line for both.

Pure: it reads no clock and does no I/O. The caller calls ``pump`` when something has changed (a request
has ended, an instance was scraped) and at ``wake_at``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from ..fleet.endpoint import Endpoint, Reservation
from ..models import InstanceRole
from ..prediction.load_model import PrefillLoad
from ..request.context import RequestContext
from ..request.errors import Reject, reject
from ..scheduler import Scheduler
from .queue import RequestQueue, Ticket

SLACK_S = 0.01
"""A prefill instance is about to be free when so little is left: it must not stand idle until we know, and
what is sent earlier waits there, where nothing shorter can pass it."""
SHARING = 16.0
"""A prefill has a fixed cost: of a step of the engine, which all prompts in it share, and of the way there,
during which the instance should be busy. So a short prompt, that costs at most so many of these, may wait on
the instance behind as many: else each would have a step of its own, and the instance a pause after each."""
_MOST_SHARED_S = 0.25
"""But no more than this: the fixed cost is hard to tell from the rest when all prompts are of one length."""
_SOONEST_S = 0.001
"""Pause before the next look, at least: what should be free by then can be late."""
_LOOK_AT = 16
"""Requests, from the front of the line, that are tried when something has changed."""
_LONGEST_RETRY_S = 60


class Dispatcher:
    """Gives requests an endpoint, at once or when there is one for them.

    A request waits while all endpoints of its role (for prefill also: of decode) are saturated, and with
    ``late_binding`` while the prefill instance that is best for it has still more than ``SLACK_S`` to do
    (short ones: see ``SHARING``): what waits here can still go elsewhere, and the shortest first.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        config = scheduler.config
        self.queue = RequestQueue(config.queue_size, config.queue_bytes)
        self._scheduler = scheduler
        self._registry = scheduler.registry
        self._late_binding = config.late_binding
        self._timeout = config.queue_timeout
        self._closed = False

    def submit(self, ticket: Ticket, now: float) -> None:
        """Take a request; it is settled at once if it need not wait, or cannot."""
        request = ticket.request
        # What only decode is for need not wait behind those that wait for prefill.
        if not self.queue.waiting(ticket.role):
            self._try(ticket, now)
            if ticket.settled:
                return
        ticket.cost = self._cost(request)
        strategy = self._scheduler.strategy(InstanceRole.PREFILL)
        request.now = now
        if request.priority < 0 and strategy.hopeless(request, ticket.cost):
            ticket.settle(self._refusal(ticket, "slo_missed", "No instance can meet its SLO now"))
            return
        if self._closed:
            ticket.settle(_ending())
            return
        displaced = self.queue.push(ticket, strategy.order(request, ticket.cost))
        if displaced is None:
            ticket.settle(self._refusal(ticket, "queue_full", "All instances are busy and the queue is full"))
            return
        for other in displaced:
            other.settle(self._refusal(other, "queue_displaced", "Requests of a higher priority came"))
        self.pump(now)

    def close(self) -> None:
        """Refuse all that wait, and from now on whoever would have to."""
        self._closed = True
        for ticket in list(self.queue.by_arrival()):
            self.queue.remove(ticket)
            ticket.settle(_ending())

    def withdraw(self, ticket: Ticket) -> None:
        """Forget a request that waits: its client is gone."""
        if ticket in self.queue:
            self.queue.remove(ticket)

    def pump(self, now: float) -> None:
        """Settle all that need not wait any longer."""
        for ticket in list(self._overdue(now)):
            self.queue.remove(ticket)
            ticket.settle(self._refusal(ticket, "queue_timeout", "It waited too long for a free instance"))
        while self._serve_one(now):
            pass

    def wake_at(self, now: float) -> float | None:
        """When to call ``pump`` though nothing happens; ``None``: never, for nobody waits."""
        first = next(self.queue.by_arrival(), None)
        if first is None:
            return None
        times = [first.request.arrived + self._timeout]
        if now < self._registry.busy_until:
            times += (e.busy_until for e in self._registry if e.busy_until > now)
        if self._late_binding:
            for load in (e.prefill for e in self._registry.routable(InstanceRole.PREFILL)):
                # What is queued behind the first one does not get less before that has ended.
                left, behind = load.left(now), load.queued - load.head_cost
                slacks = (slack for slack in (_shared_slack(load), SLACK_S) if left > slack >= behind)
                times += (load.head_at + load.queued - slack for slack in slacks)
        return max(now + _SOONEST_S, min(times))

    def _overdue(self, now: float) -> itertools.takewhile[Ticket]:
        return itertools.takewhile(
            lambda ticket: ticket.request.arrived + self._timeout <= now, self.queue.by_arrival()
        )

    def _serve_one(self, now: float) -> bool:
        """Return whether to look again: one was served, or has let the others pass.

        Those that go on waiting for an instance are counted there as long as others are tried: else all
        would wait for it that have their prefix there, though others are idle.
        """
        counted: list[tuple[PrefillLoad, Ticket]] = []
        try:
            return self._first_served(now, counted)
        finally:
            for load, ticket in counted:
                load.cancel(ticket, now)

    def _first_served(self, now: float, counted: list[tuple[PrefillLoad, Ticket]]) -> bool:
        passed, most = False, self._most_cost(now) if self._late_binding else math.inf
        for ticket in self._next(now):
            if ticket.role is InstanceRole.PREFILL and ticket.cost > most:
                continue
            request = ticket.request
            request.now = now
            hopeless = self._scheduler.strategy(InstanceRole.PREFILL).hopeless(request, ticket.cost)
            if hopeless and self.queue.let_pass(ticket):
                passed = True
                continue
            awaited = self._try_safely(ticket, now)
            if ticket.settled:
                return True
            if awaited is not None:
                awaited.prefill.begin(ticket, awaited.prefill_cost(request), now)
                counted.append((awaited.prefill, ticket))
        return passed

    def _next(self, now: float) -> Iterator[Ticket]:
        """Yield the front of the line, then those for whom a free decode instance is enough."""
        yield from list(itertools.islice(self.queue, _LOOK_AT))
        decode = InstanceRole.DECODE
        if self.queue.waiting(decode) and self._scheduler.open(decode, now):
            alone = (ticket for ticket in self.queue if ticket.role is decode)
            yield from list(itertools.islice(alone, _LOOK_AT))

    def _try_safely(self, ticket: Ticket, now: float) -> Endpoint | None:
        """Try one that waits. A strategy of the operator's own that raises fails it, and no other."""
        try:
            return self._try(ticket, now)
        except Exception as error:
            self.queue.remove(ticket)
            ticket.settle(error)
            return None

    def _most_cost(self, now: float) -> float:
        """Seconds of prefill up to which it is worth to ask the strategy: -1 if it is for none.

        It is for all if an instance is free, and when none is left to wait for.
        """
        most, routable = -1.0, self._registry.routable(InstanceRole.PREFILL)
        for load in (e.prefill for e in routable):
            left = load.left(now)
            if left <= SLACK_S:
                return math.inf
            shared = _shared_slack(load)
            if left <= shared > most:
                most = shared
        return most if routable else math.inf

    def _try(self, ticket: Ticket, now: float) -> Endpoint | None:
        """Settle a request if there is an endpoint for it, or will never be; else return which it waits for.

        While all are saturated it waits for none in particular.
        """
        request, role = ticket.request, ticket.role
        if not self._scheduler.open(InstanceRole.DECODE, now) or not self._scheduler.open(role, now):
            return None
        outcome: Reservation | None = None
        request.now = now
        picked = self._scheduler.pick(role, request)
        if picked:
            late = self._late_binding and role is InstanceRole.PREFILL
            if late and picked[0].prefill.left(now) > _slack(picked[0], request):
                return picked[0]
            if role is InstanceRole.PREFILL:
                self._scheduler.decided(role, request, picked[0])
            outcome = self._registry.reserve(picked[0], request)
        if ticket in self.queue:
            self.queue.remove(ticket, served=True)
        ticket.settle(outcome)
        return None

    def _cost(self, request: RequestContext) -> float:
        """Least predicted seconds of prefill, wherever that is."""
        routable, blocks = self._registry.routable(InstanceRole.PREFILL), 0
        if request.blocks:
            cached = self._registry.prefixes.match(request.blocks)
            blocks = max((cached.get(e.holder, 0) for e in routable), default=0) if cached else 0
        new = max(1.0, request.prompt_tokens - blocks * request.block_tokens)
        return min((e.prefill.cost(new, request.prompt_tokens) for e in routable[:16]), default=0.0)

    def _refusal(self, ticket: Ticket, reason: str, message: str) -> Reject:
        serving = max(1, len(self._registry.routable(InstanceRole.PREFILL)))
        retry_after = min(_LONGEST_RETRY_S, max(1, math.ceil(self.queue.work / serving)))
        return reject(429, f"{message}; try again in {retry_after} s.", reason, retry_after)


def _shared_slack(load: PrefillLoad) -> float:
    """Seconds of work behind which a short prompt may wait on an instance, and that it may cost at most."""
    return min(_MOST_SHARED_S, SHARING * load.overhead)


def _slack(endpoint: Endpoint, request: RequestContext) -> float:
    """Seconds of work behind which a request may wait on an instance."""
    shared = _shared_slack(endpoint.prefill)
    return max(SLACK_S, shared) if endpoint.prefill_cost(request) <= shared else SLACK_S


def _ending() -> Reject:
    return reject(503, "The scheduler is shutting down and has no time left for this request.", "draining")
