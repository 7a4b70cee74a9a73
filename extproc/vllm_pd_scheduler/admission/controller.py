"""Where requests wait in an event loop until the dispatcher has an endpoint for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..fleet.endpoint import Reservation
from ..request.errors import Reject
from ..telemetry.metrics import Left, Telemetry
from .dispatcher import Dispatcher
from .queue import Ticket


class AdmissionController:
    """Turns the dispatcher's decisions into something to await, and wakes it when its time has come."""

    def __init__(
        self, dispatcher: Dispatcher, clock: Callable[[], float], telemetry: Telemetry | None = None
    ) -> None:
        self._dispatcher = dispatcher
        self._clock = clock
        self._telemetry = telemetry
        self._timer: asyncio.TimerHandle | None = None

    async def admit(self, ticket: Ticket) -> Reservation | Reject | None:
        """Return the ticket's outcome; raises what a strategy has raised.

        Cancelling the call takes the request out of the line.
        """
        self._dispatcher.submit(ticket, self._clock())
        if not ticket.settled:
            await self._wait(ticket)
        if isinstance(ticket.outcome, Exception):
            raise ticket.outcome
        return ticket.outcome

    async def _wait(self, ticket: Ticket) -> None:
        settled, since = asyncio.Event(), self._clock()
        ticket.on_settled = lambda _: settled.set()
        self._wake_in_time()
        try:
            await settled.wait()
            self._left(Left.REFUSED if isinstance(ticket.outcome, Reject) else Left.SERVED, since)
        except asyncio.CancelledError:
            self._left(Left.GONE, since)
            self._dispatcher.withdraw(ticket)
            if isinstance(ticket.outcome, Reservation):
                ticket.outcome.release(self._clock())
            self.wake()
            raise

    def _left(self, outcome: Left, since: float) -> None:
        if self._telemetry is not None:
            self._telemetry.left_queue(outcome, self._clock() - since)

    def wake(self) -> None:
        """Look whether one of those that wait can go now: a request has ended, an instance was scraped."""
        if len(self._dispatcher.queue):
            self._dispatcher.pump(self._clock())
            self._wake_in_time()

    def _wake_in_time(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._clock()
        at = self._dispatcher.wake_at(now)
        if at is not None:
            self._timer = asyncio.get_running_loop().call_later(at - now, self.wake)
