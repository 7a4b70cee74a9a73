"""Requests for the rest of an answer that has broken off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..fleet.endpoint import Endpoint
from .in_flight import RequestsInFlight


class GoingOn:
    """Knows which D has failed an answer whose rest is asked for.

    Both requests have one ``X-Request-Id``. A client that gives it to others of its own has these go
    elsewhere too, which harms nobody.
    """

    def __init__(self, in_flight: RequestsInFlight, clock: Callable[[], float]) -> None:
        self._in_flight = in_flight
        self._clock = clock
        self._failed_by: dict[str, tuple[str, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._failed_by)

    def begin(self, request_id: str, decode: str) -> None:
        """Note that the rest of an answer is asked for, which this D has failed."""
        self._failed_by[request_id] = decode, self._in_flight.prompt_of(request_id)

    def end(self, request_id: str, lost_by: str | None = None) -> None:
        """Note that the rest has come, or that another D has failed it too: then the prompt may be why."""
        decode, prompt = self._failed_by.pop(request_id, ("", 0))
        if lost_by is not None:
            for each in (decode, lost_by):
                self._in_flight.lost.lost(prompt, each, self._clock())

    def elsewhere(self, request_id: str, picked: Sequence[Endpoint]) -> list[Endpoint]:
        """Return D in the order in which they are tried: the one that has failed the answer at last."""
        failed, _ = self._failed_by.get(request_id, ("", 0))
        return sorted(picked, key=lambda endpoint: endpoint.id == failed)
