"""When the requests of a trace are sent: at their times, or when what they need has been answered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..sim.virtual import VirtualClock
from .trace import Trace


class Arrivals:
    """Sends the requests of a trace, which it names by their places in it.

    With ``waits``, one that needs the answers of others is sent when the last of these has ended and its
    pause is over, and not before its time. So whoever serves slowly gets the next turns later, as from real
    users and agents. A name that nobody has is ignored: a trace may be cut.
    """

    def __init__(
        self, clock: VirtualClock, trace: Trace, send: Callable[[int], None], *, waits: bool
    ) -> None:
        self._clock, self._requests, self._send = clock, trace.requests, send
        self._missing: dict[int, int] = {}
        """How much each request still waits for: answers, and its time."""
        self._waiting: dict[int, list[int]] = {}
        """Who waits for the answer of each."""
        if waits:
            self._link()

    def _link(self) -> None:
        places = {each.name: place for place, each in enumerate(self._requests) if each.name}
        for place, request in enumerate(self._requests):
            # Only what comes before: nobody can wait for himself, nor two for each other.
            needs = {places[name] for name in request.after if places.get(name, place) < place}
            if needs:
                self._missing[place] = len(needs) + 1
            for needed in needs:
                self._waiting.setdefault(needed, []).append(place)

    def start(self) -> None:
        """Begin with the trace's first request."""
        self._clock.call_at(0.0, partial(self._come, 0))

    def ended(self, place: int) -> None:
        """Note that the answer of a request has ended, or will never come."""
        for waiting in self._waiting.pop(place, ()):
            pause = self._requests[waiting].pause
            self._clock.call_at(self._clock.now + pause, partial(self._one_less, waiting))

    def _come(self, place: int) -> None:
        if place + 1 < len(self._requests):
            self._clock.call_at(self._requests[place + 1].arrival, partial(self._come, place + 1))
        self._one_less(place)

    def _one_less(self, place: int) -> None:
        missing = self._missing.get(place, 1) - 1
        if missing:
            self._missing[place] = missing
        else:
            self._missing.pop(place, None)
            self._send(place)
