"""NVIDIA Dynamo 1.6: the KV router's cost, linear and as a product, and conditional disaggregation."""

from __future__ import annotations

from collections.abc import Sequence

from ...fleet.endpoint import Endpoint
from ...models import InstanceRole
from ...request.context import RequestContext
from .base import Peer, is_decode


class Dynamo(Peer):
    """The least cost = ``prefill_scale`` * (active + new - ``credit`` * cached) + blocks in decode.

    - On P only the first part: it does not track what is decoded there. *active*: uncached tokens in flight.
    - On D only the second, the tokens of the requests there: overlap scoring and prefill tracking are off.
    - D is chosen when the prefill has ended.
    - What is cached is known by KV events. The event plane is taken to need 10 ms: a choice, which nobody has
      published. All else the router counts itself.

    Its queue, in which requests wait while each P has 16 steps of prompts, is left out.

    Cost, credit and scale (1 and 1; no decay, no weight of active requests, no temperature):
    https://docs.nvidia.com/dynamo/v1.6.2/knowledge-base/modular-components/router/routing-concepts. What is
    off for which role: ``…/router/disaggregated-serving``.
    """

    event_delay_s = 0.01
    credit = 1.0
    prefill_scale = 1.0

    def score(self, endpoint: Endpoint, request: RequestContext) -> float:
        """Return the cost in tokens."""
        if endpoint.instance.role is InstanceRole.DECODE:
            return endpoint.tokens
        return self.prefill_scale * self.prefill_tokens(endpoint, request)

    def prefill_tokens(self, endpoint: Endpoint, request: RequestContext) -> float:
        """Return the tokens that P would have to compute until this prompt is read."""
        credit = self.credit * self.cached_blocks(endpoint, request) * request.block_tokens
        return max(0.0, endpoint.tokens + request.prompt_tokens - credit)


class DynamoLmetric(Dynamo):
    """``router_selection_policy=lmetric``: cost = prefill tokens * (active + 1), after Blitz's LMetric.

    Its second factor is "decode blocks + 1". The documentation has a P not track those, which would leave the
    linear cost, in tokens: so the requests in flight on P stand for them here, as in the paper.
    """

    def score(self, endpoint: Endpoint, request: RequestContext) -> float:
        """Return the cost."""
        if endpoint.instance.role is InstanceRole.DECODE:
            return endpoint.tokens
        return self.prefill_tokens(endpoint, request) * (endpoint.in_flight + 1)


class DynamoConditional(Dynamo):
    """``--router-conditional-disagg`` with its default policy, ``isl_bounding``.

    A request stays on a D if it has less than ``eff_isl_threshold`` tokens there that are not cached, and
    these are less than ``eff_isl_ratio_threshold`` of its prompt. That D has the least of tokens in decode -
    cached tokens. No D is too busy for it: that threshold is unset.

    https://docs.nvidia.com/dynamo/v1.6.2/advanced-customizations/conditional-disaggregation
    """

    eff_isl_threshold = 2048.0
    eff_isl_ratio_threshold = 0.7

    def alone(self, decodes: Sequence[Endpoint], request: RequestContext) -> Endpoint | None:
        """Return the D with the least cost, if it has enough of the prompt."""
        best = min(decodes, key=lambda each: self._cost(each, request))
        new = request.prompt_tokens - self.cached(best, request)
        bounded = new < self.eff_isl_threshold and new < self.eff_isl_ratio_threshold * request.prompt_tokens
        return best if bounded else None

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Rank D with credit for what is cached there."""
        if is_decode(endpoints):
            return sorted(endpoints, key=lambda each: self._cost(each, request))[:count]
        return super().rank(endpoints, request, count)

    def _cost(self, endpoint: Endpoint, request: RequestContext) -> float:
        tokens = endpoint.tokens + request.prompt_tokens
        return max(0.0, tokens - self.credit * self.cached(endpoint, request))
