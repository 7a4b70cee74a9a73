"""The better of two chosen at random."""

from __future__ import annotations

from collections.abc import Sequence

from ..fleet.endpoint import Endpoint
from ..request.context import RequestContext
from .base import Strategy


class PowerOfTwo(Strategy):
    """Fewer requests of two endpoints chosen at random; further ones, for retries, at random.

    Nearly as even as looking at all, and several schedulers that know nothing of each other do not all
    send to the same endpoint (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001).
    """

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Draw, and put the better of the first two first."""
        drawn = self.random.sample(endpoints, min(len(endpoints), max(2, count)))
        if len(drawn) > 1 and drawn[1].requests < drawn[0].requests:
            drawn[0], drawn[1] = drawn[1], drawn[0]
        return drawn[:count]
