"""``power_of_two``: the better of two endpoints drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext
from .base import Strategy


class PowerOfTwo(Strategy):
    """Draws two endpoints at random and takes the one with fewer requests.

    Load gets nearly as even as by comparing all endpoints, and several schedulers that know nothing of each
    other do not all choose the same one (Mitzenmacher, "The Power of Two Choices in Randomized Load
    Balancing", IEEE TPDS 2001).
    """

    def terms(self, endpoint: Endpoint, request: RequestContext) -> dict[str, float]:
        """Return the requests there."""
        return {"requests": endpoint.requests}

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Draw endpoints and put the better of the first two first; those for retries stay as drawn."""
        drawn = self.random.sample(endpoints, min(len(endpoints), max(2, count)))
        if len(drawn) > 1 and drawn[1].requests < drawn[0].requests:
            drawn[0], drawn[1] = drawn[1], drawn[0]
        return drawn[:count]
