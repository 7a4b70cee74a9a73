"""PPD: a later turn is read where its KV is, if that hurts the others there less than it helps."""

from __future__ import annotations

from collections.abc import Sequence

from ...fleet.endpoint import Endpoint
from ...request.context import RequestContext
from ...strategies import StrategySettings
from .base import Peer, Pins, is_decode


class Ppd(Peer):
    """PPD-Dynamic, with its weights of 1.

    - The first turn goes over P to the D with the fewest requests, later ones to the same D.
    - A later turn stays on that D if less than ``bypass`` of its tokens are new, or if the better time to its
      first token is worth the worse time per token of the answers there: (pd - ppd) / pd > (ppd - pd) / pd of
      either. Its authors look both up in a table of their benchmarks; here they come from the fleet's real
      speeds, which is more exact.
    - What is new is the prompt without the turn before and its answer: the proxy knows the conversation.

    "Not All Prefills Are Equal: PPD Disaggregation for Multi-turn LLM Serving",
    https://arxiv.org/abs/2603.13358; rules and defaults: https://github.com/freelulul/vllm-ppd
    """

    bypass = 512.0

    def __init__(self, config: StrategySettings) -> None:
        super().__init__(config)
        self._pins = Pins()
        self._read: dict[str, float] = {}
        """Tokens of the last turn of each conversation, with its answer as expected."""

    def alone(self, decodes: Sequence[Endpoint], request: RequestContext) -> Endpoint | None:
        """Return the conversation's D, if the turn is to stay there."""
        decode = self._pins.find(decodes, request)
        session = request.session or ""
        new = request.prompt_tokens - self._read.get(session, 0.0)
        self._read[session] = request.prompt_tokens + request.output_tokens
        if decode is None:
            return None
        return decode if new < self.bypass or self._pays(decode, max(1.0, new), request) else None

    def _pays(self, decode: Endpoint, new: float, request: RequestContext) -> bool:
        assert self.site is not None
        profile, running = self.site.profile, int(decode.requests)
        context, tokens = decode.kv_tokens, int(request.prompt_tokens)
        compute = profile.step_time(int(new), 0, 0, new * (request.prompt_tokens - new / 2))
        over_p = compute + profile.transfer_time(tokens)
        step = profile.step_time(0, max(1, running), int(context))
        stalled = step + compute / max(1.0, request.output_tokens) if running else step
        return (over_p - compute) / over_p > (stalled - step) / step

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Return those with the least load; on D the conversation's own first."""
        ranked = super().rank(endpoints, request, count)
        if is_decode(endpoints):
            pinned = self._pins.find(endpoints, request)
            if pinned is not None:
                ranked = [pinned, *(each for each in ranked if each is not pinned)][:count]
            self._pins.pin(request, ranked[0])
        return ranked

    def score(self, endpoint: Endpoint, request: RequestContext) -> float:
        """Return the requests on D, or the tokens that wait for P."""
        return endpoint.requests if is_decode([endpoint]) else endpoint.tokens
