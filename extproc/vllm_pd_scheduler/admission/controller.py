"""Connects the dispatcher, which knows no event loop, with the coroutines that wait for its decisions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..fleet.reservation import Reservation
from ..request.errors import Reject
from ..telemetry import QueueOutcome, Telemetry
from ..tracing import current
from .dispatcher import Dispatcher
from .queue import Outcome, Ticket


class AdmissionController:
    """Lets requests await an endpoint.

    It runs the dispatcher when a request arrives, when :meth:`wake` is called (a request ended, an
    instance was scraped) and, by a timer, at the time that :meth:`Dispatcher.next_wake` returns.
    ``clock`` returns monotonic seconds.
    """

    def __init__(
        self, dispatcher: Dispatcher, clock: Callable[[], float], telemetry: Telemetry | None = None
    ) -> None:
        self._dispatcher = dispatcher
        self._clock = clock
        self._telemetry = telemetry
        self._timer: asyncio.TimerHandle | None = None

    async def admit(self, ticket: Ticket) -> Outcome:
        """Wait for an endpoint and return the ticket's outcome.

        Return a reservation, a refusal, or ``None`` if no endpoint can serve. Cancelling the call removes the
        request from the queue.
        """
        self._dispatcher.submit(ticket, self._clock())
        if not ticket.settled:
            await self._wait(ticket)
        return ticket.outcome

    async def _wait(self, ticket: Ticket) -> None:
        settled, since = asyncio.Event(), self._clock()
        ticket.on_settled = lambda _: settled.set()
        self._set_timer()
        try:
            await settled.wait()
            refused = isinstance(ticket.outcome, Reject)
            self._count_wait(ticket, QueueOutcome.REFUSED if refused else QueueOutcome.SERVED, since)
        except asyncio.CancelledError:
            self._count_wait(ticket, QueueOutcome.GONE, since)
            self._dispatcher.withdraw(ticket)
            # The ticket can be settled in the same turn of the event loop in which the client leaves. Then
            # nobody else would release its reservation.
            if isinstance(ticket.outcome, Reservation):
                ticket.outcome.release(self._clock())
            self.wake()
            raise

    def _count_wait(self, ticket: Ticket, outcome: QueueOutcome, since: float) -> None:
        now = self._clock()
        ticket.waited = now - since
        if self._telemetry is not None:
            self._telemetry.waited(outcome, ticket.waited)
        if (trace := current.get()) is not None:
            trace.waited(ticket.role, outcome, since, now)

    def wake(self) -> None:
        """Serve waiting requests that can be served now. Call it when load or health of the fleet changed.

        That an instance which drains has nothing left is told as well: whatever ends comes by here.
        """
        self._dispatcher.registry.tell_drained()
        if self._dispatcher.pending:
            self._dispatcher.dispatch(self._clock())
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._clock()
        at = self._dispatcher.next_wake(now)
        if at is not None:
            self._timer = asyncio.get_running_loop().call_later(at - now, self.wake)
