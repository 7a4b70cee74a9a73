"""P for requests whose prefill a sidecar at D sends: it is chosen here, and never called."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..config import SchedulerConfig
from ..fleet.registry import Registry
from ..records.decision import Decision
from ..request.context import RequestContext
from ..request.errors import Reject
from .lost import LostPrompts
from .prefill import PrefillStage
from .prefill_claim import PrefillClaim
from .tried import WithoutHandoff, lost_twice, no_prefill


class SidecarPrefill:
    """Chooses P, as the prefill stage does, for requests whose sidecar sends the prefill."""

    def __init__(
        self,
        config: SchedulerConfig,
        stage: PrefillStage,
        registry: Registry,
        lost: LostPrompts,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._stage = stage
        self._registry = registry
        self._lost = lost
        self._clock = clock

    async def choose(
        self, context: RequestContext, decision: Decision
    ) -> PrefillClaim | WithoutHandoff | Reject:
        """Return the claim on a P, that decode should prefill, or the answer in place of both."""
        reservation = await self._stage.admit(context, decision)
        if isinstance(reservation, Reject):
            return reservation
        if reservation is None:
            return no_prefill() if self._config.on_prefill_failure == "fail" else WithoutHandoff()
        now = self._clock()
        refused_for = self._lost.refused_for(context.fingerprint, now)
        if refused_for:  # others with its prompt were lost while it has waited
            reservation.release(now)
            return lost_twice(math.ceil(refused_for))
        self._stage.trace_pick(reservation, context)
        predicted = reservation.wait + reservation.cost
        noted = decision.prefill_begins(reservation.endpoint.id, reservation.at, predicted)
        return PrefillClaim(reservation, max(1, round(context.prompt_tokens)), self._registry, noted)
