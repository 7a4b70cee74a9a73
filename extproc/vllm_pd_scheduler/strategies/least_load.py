"""``least_load``: fewest waiting requests, then fewest in all."""

from __future__ import annotations

from collections.abc import Sequence

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext
from .base import Strategy, request_counts


class LeastLoad(Strategy):
    """Score = (waiting, waiting + running), compared in this order.

    - *waiting*: requests queued on the instance, see :attr:`Endpoint.waiting`. What was sent since the last
      scrape counts, so that the requests of a burst between two scrapes do not all go to one instance.
    - *waiting + running*: all requests there, see :attr:`Endpoint.requests`. It decides while no instance
      has a queue.
    """

    def accepts_sample(self, request: RequestContext) -> bool:
        """Return ``True``: a low load is enough, it need not be the lowest."""
        return True

    def score(self, endpoint: Endpoint, request: RequestContext) -> tuple[float, float]:
        """Return (waiting, waiting + running)."""
        return endpoint.waiting, endpoint.requests

    def terms(self, endpoint: Endpoint, request: RequestContext) -> dict[str, float]:
        """Return both parts of the score."""
        return {"waiting": endpoint.waiting, "requests": endpoint.requests}

    def scores(self, endpoints: Sequence[Endpoint], request: RequestContext) -> Sequence[tuple[float, float]]:
        """Return the score of each; repeats the code of :attr:`Endpoint.waiting` to save calls."""
        waiting = []
        for endpoint in endpoints:
            metrics, since = endpoint.metrics, endpoint.in_flight - endpoint.in_flight_at_scrape
            queued = metrics.waiting + since if metrics is not None else since
            waiting.append(queued if queued > 0.0 else 0.0)
        return list(zip(waiting, request_counts(endpoints), strict=True))
