"""Fewest waiting requests."""

from __future__ import annotations

from ..endpoint import Endpoint
from ..models import RequestContext
from .base import Strategy


class LeastLoad(Strategy):
    """Least (waiting, running + waiting), compared in this order.

    ``waiting`` is the last scrape's plus what was sent since (see :attr:`Endpoint.waiting`), so that
    picks between two scrapes count at once.
    """

    def score(self, endpoint: Endpoint, request: RequestContext) -> tuple[float, float]:
        """Fewest waiting, then fewest in all."""
        return endpoint.waiting, endpoint.requests
