"""ConServe: the conversation, not the turn, is what is scheduled."""

from __future__ import annotations

from collections.abc import Sequence

from ...fleet.endpoint import Endpoint
from ...request.context import RequestContext
from ...strategies import StrategySettings
from .base import Peer, Pins, is_decode


class Conversation(Peer):
    """The first turn is read on P and handed over; then the conversation stays on its D to its end.

    - P: the fewest uncached tokens in flight.
    - D of the first turn: the least KV cache in use, as scraped every second (a choice: "directly
      observable") and with what was sent there since.
    - Later turns: that D reads what is new of them too. Nothing is predicted, and nothing moves.

    "Observation, Not Prediction: Conversation-Level Disaggregated Scheduling for Agentic Serving",
    https://arxiv.org/abs/2606.01839
    """

    scrape_interval_s = 1.0

    def __init__(self, config: StrategySettings) -> None:
        super().__init__(config)
        self._pins = Pins()

    def alone(self, decodes: Sequence[Endpoint], request: RequestContext) -> Endpoint | None:
        """Return the D of the conversation, if it has begun."""
        return self._pins.find(decodes, request)

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Return those with the least load, and pin the conversation to D."""
        ranked = super().rank(endpoints, request, count)
        if is_decode(endpoints):
            self._pins.pin(request, ranked[0])
        return ranked

    def score(self, endpoint: Endpoint, request: RequestContext) -> float:
        """Return the tokens of KV cache in use on D, or those that wait for P."""
        return endpoint.kv_tokens if is_decode([endpoint]) else endpoint.tokens
