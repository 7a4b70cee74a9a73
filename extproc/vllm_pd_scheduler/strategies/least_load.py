"""Fewest waiting requests."""

from __future__ import annotations

from collections.abc import Sequence

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext
from .base import Strategy, all_requests


class LeastLoad(Strategy):
    """Least (waiting, running + waiting), compared in this order.

    ``waiting`` is the last scrape's plus what was sent since (see :attr:`Endpoint.waiting`), so that
    picks between two scrapes count at once.
    """

    def score(self, endpoint: Endpoint, request: RequestContext) -> tuple[float, float]:
        """Fewest waiting, then fewest in all."""
        return endpoint.waiting, endpoint.requests

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> Sequence[tuple[float, float]]:
        """Return the score of each."""
        waiting = []
        for endpoint in endpoints:
            metrics, since = endpoint.metrics, endpoint.in_flight - endpoint.in_flight_at_scrape
            queued = metrics.waiting + since if metrics is not None else since
            waiting.append(queued if queued > 0.0 else 0.0)
        return list(zip(waiting, all_requests(endpoints), strict=True))
