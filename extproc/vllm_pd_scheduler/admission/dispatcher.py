"""Decides when a request gets an endpoint: admission control and late binding, with one queue for both.

It reads no clock and does no I/O. The caller calls :meth:`Dispatcher.dispatch` when something has changed (a
request ended, an instance was scraped) and at the time that :meth:`Dispatcher.next_wake` returns.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Iterator

from ..fleet.claims import HEARD_S
from ..fleet.endpoint import Endpoint
from ..fleet.reservation import Reservation
from ..models import By, InstanceRole
from ..prediction.prefill_load import PrefillLoad
from ..records.events import EventKind, Events
from ..request.context import RequestContext
from ..request.errors import Reject, reject
from ..scheduler import Scheduler
from ..telemetry import log_lines
from .queue import SHORT_S, RequestQueue, Ticket, tenant_key

NEARLY_FREE_S = 0.01
"""A prefill instance with at most so many seconds of work left counts as free.

With less, the instance would stand idle until its answer has reached us and the next request has reached it;
with more, requests wait there, where no shorter one can overtake them. 10 ms is a choice: enough for both
ways between hosts of one site.
"""
SHORT_PROMPT_OVERHEADS = 16.0
"""A prompt whose prefill costs at most so many times the instance's fixed cost per prefill is short.

Every step of the engine has a fixed cost, which all prompts in that step share. Short prompts bound one by
one would each pay for a step of their own, and the instance would idle for the way there and back after each.
So a short prompt may be bound while the instance has as much work left as a short prompt may cost. Measured
in the simulator, 3 P at 95 % load: without this, binding late has four times the mean TTFT of binding at once
(0.42 s and 0.12 s). 16 is a choice: with more, late binding loses its effect on ever longer prompts.
"""
_MAX_SHORT_PROMPT_S = 0.25
"""A prompt that takes longer than this is never short, whatever the fixed cost.

While all prompts are of one length, the regression can hardly tell the fixed cost from the cost by token, and
may put it far too high. The number is a choice: it bounds what such an error costs a request in waiting.
"""
_FULL_STEP_S = 0.25
"""Seconds of work that an instance may have left for a short prompt while a crowd of short ones waits.

Those gain little from their order, and the instance more from steps that many share: near its limit it cannot
do without. It is a choice, and how much longer a long prompt, or one of a higher priority, may have to wait.
"""
_MIN_WAKE_DELAY_S = 0.001
"""Least time until the next look: an instance that should be free by now, and is late, must not cause a busy
loop."""
_MAX_TRIED = 16
"""Requests, from the front of the queue, for which a strategy is asked when something has changed.

Bounds the time that a change takes the event loop. It is a choice: what is further back is tried when those
before it are gone.
"""
_MAX_COSTED = 16
"""Instances whose cost is compared to estimate a request's work: a choice that bounds the time in a large
fleet, where the least of 16 is close to the least of all."""
_MAX_RETRY_AFTER_S = 60
"""Largest ``Retry-After``: predictions of a longer wait are not worth much, and the fleet may have grown."""
_MAX_CLAIMS = 4
"""Times that a request claims a P before it stays where it is: a choice, that bounds how long it waits."""
_BURST_S = 60.0
"""Seconds without a refusal after which a queue that is full is an event again: a choice. An overload of an
hour is one event, and its metrics tell the rest."""


class Dispatcher:
    """Gives each request an endpoint: at once, or when there is one for it.

    A request waits

    - while all endpoints of its role are saturated (a prefill also while all of decode are: its hand-off
      would wait on P), and
    - with ``late_binding``, while the prefill instance that the strategy prefers has more than
      ``NEARLY_FREE_S`` of work left (a short prompt: see ``SHORT_PROMPT_OVERHEADS`` and ``_FULL_STEP_S``). A
      request that waits here can still go to another instance, and shorter ones can overtake it; one that
      waits in an instance's own queue cannot.
    """

    def __init__(self, scheduler: Scheduler, events: Events | None = None) -> None:
        config = scheduler.config
        self.queue = RequestQueue(config.queue_size, config.queue_bytes)
        self._scheduler = scheduler
        self.registry = scheduler.registry
        self.registry.elsewhere.on_drawn = self.queue.drawn_elsewhere
        self._config = config
        self._events = events
        self._full_at = -math.inf
        """When a request was last refused since the queue is full."""
        self._closed = False
        self._claimed: deque[Ticket] = deque()
        """Those that have claimed a P, in the order in which they did."""

    def submit(self, ticket: Ticket, now: float) -> None:
        """Settle a request at once if it need not wait, or must not; else add it to the queue."""
        # A request for decode alone need not wait behind requests that wait for prefill.
        if not self.queue.waiting(ticket.role):
            self._place(ticket, now)
            if ticket.settled or ticket.claim is not None:
                return
        self._enqueue(ticket, now)
        if not ticket.settled:
            self.dispatch(now)

    def _enqueue(self, ticket: Ticket, now: float) -> None:
        """Add a request to the queue, or refuse it."""
        request = ticket.request
        ticket.cost = self._predicted_work(request)
        strategy = self._scheduler.strategies.of(InstanceRole.PREFILL)
        request.at(now)
        if request.priority < 0 and strategy.hopeless(request, ticket.cost):
            ticket.settle(self._refusal(ticket, "slo_missed", "No instance can meet its SLO now"))
            return
        if self._closed:
            ticket.settle(_draining())
            return
        displaced = self.queue.push(ticket, strategy.order(request, ticket.cost))
        if displaced is None or displaced:
            self._tell_full(now)
        if displaced is None:
            ticket.settle(self._refusal(ticket, "queue_full", "All instances are busy and the queue is full"))
            return
        for other in displaced:
            other.settle(self._refusal(other, "queue_displaced", "Requests of a higher priority came"))

    def _tell_full(self, now: float) -> None:
        """Make an event of the first refusal for a full queue after ``_BURST_S`` without one."""
        last, self._full_at = self._full_at, now
        if self._events is None or now - last < _BURST_S:
            return
        queue = self.queue
        self._events.add(
            EventKind.QUEUE_FULL,
            f"the queue is full ({len(queue)} requests, {queue.bytes} bytes): others get a 429",
            by=By.REQUEST,
            level=logging.WARNING,
        )

    def reconfigured(self) -> None:
        """Take the queue's limits as they are configured now. What waits already stays."""
        self.queue.max_requests, self.queue.max_bytes = self._config.queue_size, self._config.queue_bytes

    def close(self) -> None:
        """Refuse all waiting requests, and from now on every request that would have to wait."""
        self._closed = True
        for ticket in list(self.queue.by_arrival()):
            self.queue.remove(ticket)
            ticket.settle(_draining())

    def withdraw(self, ticket: Ticket) -> None:
        """Remove a request whose client has left; do nothing if it is not in the queue."""
        if ticket in self.queue:
            self.queue.remove(ticket)
        elif ticket.claim is not None:
            self._claimed.remove(ticket)
            ticket.claim.release()
            ticket.claim = None

    @property
    def pending(self) -> bool:
        """Whether something waits for :meth:`dispatch`."""
        return bool(self._claimed or len(self.queue))

    def dispatch(self, now: float) -> None:
        """Confirm claims, refuse what has waited too long, give endpoints to those that can have one."""
        before = log_lines.request_id.set("")
        try:
            while self._claimed and self._due(self._claimed[0]) <= now:
                self._confirm(self._claimed.popleft(), now)
            for ticket in list(self._overdue(now)):
                self.queue.remove(ticket)
                ticket.settle(
                    self._refusal(ticket, "queue_timeout", "It waited too long for a free instance")
                )
            while self._dispatch_one(now):
                pass
        finally:
            log_lines.request_id.reset(before)

    def next_wake(self, now: float) -> float | None:
        """Return when to call ``dispatch`` if nothing happens before; ``None`` while nothing waits.

        That is when the oldest request times out or, with ``late_binding``, when an instance is predicted
        to have so little work left that a request may be bound to it.
        """
        due = [self._due(self._claimed[0])] if self._claimed else []
        oldest = next(self.queue.by_arrival(), None)
        if oldest is None:
            return max(now, *due) if due else None
        times = [*due, oldest.request.arrived + self._config.queue_timeout, self._scheduler.room_at(now)]
        if self._config.late_binding:
            lead, crowd = self.registry.claims.lead, self._is_crowd()
            for load in (e.prefill for e in self._scheduler.some(InstanceRole.PREFILL)):
                # What is queued behind the prefill that runs does not shrink before that one ends. Then there
                # is an event anyway, so no time is set for a slack that only comes after it.
                remaining, behind = load.remaining(now), load.queued - load.head_cost
                allowed = (s + lead for s in (_shared_steps(load, crowd)[1], NEARLY_FREE_S))
                slacks = (s for s in allowed if remaining > s >= behind)
                times += (load.head_at + load.queued - slack for slack in slacks)
        return max(now + _MIN_WAKE_DELAY_S, min(times))

    def _overdue(self, now: float) -> itertools.takewhile[Ticket]:
        return itertools.takewhile(
            lambda ticket: ticket.request.arrived + self._config.queue_timeout <= now, self.queue.by_arrival()
        )

    def _dispatch_one(self, now: float) -> bool:
        """Serve one waiting request; return whether to look again, since one was served or deferred.

        A request that goes on waiting for an instance counts as work there while those behind it are tried.
        Else all whose prefix is cached on one instance would wait for it, though others are idle.
        """
        counted: list[tuple[PrefillLoad, Ticket]] = []
        try:
            return self._serve_first(now, counted)
        finally:
            for load, ticket in counted:
                load.cancel(ticket, now)

    def _serve_first(self, now: float, counted: list[tuple[PrefillLoad, Ticket]]) -> bool:
        deferred, max_cost = False, self._max_cost(now) if self._config.late_binding else math.inf
        for ticket in self._candidates(now):
            if ticket.role is InstanceRole.PREFILL and ticket.cost > max_cost:
                continue
            request = ticket.request
            log_lines.request_id.set(request.request_id)
            request.at(now)
            hopeless = self._scheduler.strategies.of(InstanceRole.PREFILL).hopeless(request, ticket.cost)
            if hopeless and self.queue.defer(ticket):
                deferred = True
                continue
            awaited = self._place(ticket, now)
            if ticket.settled or ticket.claim is not None:
                return True
            if awaited is not None:
                awaited.prefill.enqueue(ticket, awaited.prefill_cost(request), now)
                counted.append((awaited.prefill, ticket))
        return deferred

    def _candidates(self, now: float) -> Iterator[Ticket]:
        """Yield the front of the queue, then requests that need only a decode instance if one has room.

        The latter may lie behind many that wait for prefill.
        """
        yield from list(itertools.islice(self.queue, _MAX_TRIED))
        decode = InstanceRole.DECODE
        if self.queue.waiting(decode) and self._scheduler.has_room(decode, now):
            decode_only = (ticket for ticket in self.queue if ticket.role is decode)
            yield from list(itertools.islice(decode_only, _MAX_TRIED))

    def _max_cost(self, now: float) -> float:
        """Return the seconds of prefill up to which a waiting request could be bound now.

        It saves asking the strategy for requests that would go on waiting in any case. -1 if none could be
        bound; infinite if an instance is free, or if there is no instance to wait for.
        """
        max_cost, routable = -1.0, self._scheduler.some(InstanceRole.PREFILL)
        lead, crowd = self.registry.claims.lead, self._is_crowd()
        for load in (e.prefill for e in routable):
            remaining = load.remaining(now) - lead
            if remaining <= NEARLY_FREE_S:
                return math.inf
            short, backlog = _shared_steps(load, crowd)
            if remaining <= backlog and short > max_cost:
                max_cost = short
        return max_cost if routable else math.inf

    def _place(self, ticket: Ticket, now: float) -> Endpoint | None:
        """Settle a request if there is an endpoint for it, or if no endpoint can serve it at all.

        Else return the endpoint that it waits for: with late binding the strategy's choice, which is still
        busy; ``None`` while all are saturated, since it then waits for any.
        """
        request, role = ticket.request, ticket.role
        if not self._scheduler.has_room_for(role, request, now):
            return None
        outcome: Reservation | None = None
        waits, uncharged = ticket in self.queue, not ticket.charged
        if not waits and self.registry.elsewhere.waiting[role is InstanceRole.DECODE]:
            ticket.cost = self._predicted_work(request)  # it is served before those who wait elsewhere
        request.at(now)
        picked = self._scheduler.pick(role, request)
        if picked:
            late = self._config.late_binding and role is InstanceRole.PREFILL
            backlog = picked[0].prefill.remaining(now) - self.registry.claims.lead if late else 0.0
            if late and backlog > self._allowed_backlog(picked[0], request):
                return picked[0]
            ticket.choice = self._scheduler.explain(role, request)
            if role is InstanceRole.PREFILL:
                outcome = self._reserve_prefill(ticket, picked[0], now)
            else:
                outcome = self.registry.work.reserve(picked[0], request)
        if waits:
            self.queue.remove(ticket, served=uncharged)
        if outcome is not None and uncharged and ticket.cost and self.registry.journal is not None:
            self.registry.journal.drawn(request.priority, tenant_key(request.tenant), ticket.cost)
        # One that was served at once, while nobody waited, is charged if it must wait after all.
        ticket.charged = ticket.charged or bool(ticket.cost)
        if ticket.claim is None:
            ticket.settle(outcome)
        return None

    def _allowed_backlog(self, endpoint: Endpoint, request: RequestContext) -> float:
        """Return the seconds of work that an endpoint may have left when a request is bound to it."""
        short, backlog = _shared_steps(endpoint.prefill, self._is_crowd())
        is_short = backlog > NEARLY_FREE_S and endpoint.prefill_cost(request) <= short
        return backlog if is_short else NEARLY_FREE_S

    def _is_crowd(self) -> bool:
        """Whether more requests wait for prefill than there are instances, and all are short.

        With fewer, work on an instance would only keep those from it that come a moment later.
        """
        waiting = self.queue.waiting(InstanceRole.PREFILL)
        return self.queue.only_short and waiting > len(self.registry.routable(InstanceRole.PREFILL))

    def _reserve_prefill(self, ticket: Ticket, endpoint: Endpoint, now: float) -> Reservation:
        """Reserve a P, or claim it if another replica of the scheduler may do so at this moment."""
        claims = self.registry.claims
        if not ticket.claims:
            self._scheduler.compare_shadow(InstanceRole.PREFILL, ticket.request, endpoint)
        contested = ticket.claims < _MAX_CLAIMS and claims.contested(endpoint, now)
        reservation = self.registry.work.reserve(endpoint, ticket.request, tentative=contested)
        claims.made(reservation)
        if contested:
            ticket.claim, ticket.claims = reservation, ticket.claims + 1
            self._claimed.append(ticket)
        return reservation

    def _due(self, ticket: Ticket) -> float:
        """Return when a claim can be confirmed."""
        return math.inf if ticket.claim is None else ticket.claim.at + HEARD_S

    def _confirm(self, ticket: Ticket, now: float) -> None:
        """Settle a request that has claimed a P, or give it another one if a replica is there before it."""
        claim, ticket.claim = ticket.claim, None
        if claim is None:
            return
        log_lines.request_id.set(ticket.request.request_id)
        if claim.stands and claim.endpoint.routable and not self.registry.claims.overtaken(claim):
            self.registry.work.confirm(claim, now)
            ticket.settle(claim)
            return
        claim.release(now)
        self._place(ticket, now)
        if not ticket.settled and ticket.claim is None:
            self._enqueue(ticket, now)

    def _predicted_work(self, request: RequestContext) -> float:
        """Return the least predicted seconds of prefill, on whichever instance that would be."""
        routable = self.registry.routable(InstanceRole.PREFILL)
        request.look_up_in(self.registry.prefixes)
        best = self._scheduler.most_cached(InstanceRole.PREFILL, request)
        new = max(1.0, request.prompt_tokens) if best is None else request.uncached(best.holder)
        costs = (e.prefill.cost(new, request.prompt_tokens) for e in routable[:_MAX_COSTED])
        return min(costs, default=0.0)

    def _refusal(self, ticket: Ticket, reason: str, message: str) -> Reject:
        # When the queue is done, if all instances share what waits now.
        serving = max(1, len(self.registry.routable(InstanceRole.PREFILL)))
        # Those that wait at other replicas of the scheduler are served meanwhile too.
        waiting, elsewhere = max(1, len(self.queue)), sum(self.registry.elsewhere.waiting)
        seconds = self.queue.work * (waiting + elsewhere) / waiting / serving
        retry_after = min(_MAX_RETRY_AFTER_S, max(1, math.ceil(min(seconds, _MAX_RETRY_AFTER_S))))
        return reject(429, f"{message}; try again in {retry_after} s.", reason, retry_after)


def _shared_steps(load: PrefillLoad, crowd: bool) -> tuple[float, float]:
    """Return up to how many seconds a prompt is short on an instance, and what may be left there for it."""
    short = min(_MAX_SHORT_PROMPT_S, SHORT_PROMPT_OVERHEADS * load.overhead)
    return (max(SHORT_S, short), _FULL_STEP_S) if crowd else (short, short)


def _draining() -> Reject:
    return reject(503, "The scheduler is shutting down and has no time left for this request.", "draining")
