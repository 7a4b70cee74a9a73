"""What requests are on the fleet: where one is counted, with which work, until when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..models import InstanceRole
from ..request.context import RequestContext
from .endpoint import Endpoint
from .reservation import Reservation

if TYPE_CHECKING:
    from .registry import Registry


class Work:
    """Makes, changes and ends the claims of our requests. Part of the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def reserve(
        self, endpoint: Endpoint, request: RequestContext | None = None, *, tentative: bool = False
    ) -> Reservation:
        """Count a request on an endpoint from now on (``request.now``), with the work that it brings.

        A ``tentative`` one is to be confirmed, or released.
        """
        registry = self._registry
        reservation = Reservation(endpoint, endpoint.generation, tentative=tentative)
        if request is not None:
            registry.learning.weigh(reservation, request)  # what fails, fails before anything is counted
        endpoint.take(reservation)
        if registry.trials and endpoint.rank is not None:
            for sibling in registry.ranks_of(endpoint):
                sibling.joins_trial(endpoint)
        if request is not None:
            if endpoint.models.adapters and request.model is not None:
                registry.models.adapter_used(endpoint, request.model)
            if request.blocks and not tentative:
                endpoint.holder.store(request.blocks)
            if endpoint.instance.role is InstanceRole.PREFILL:
                endpoint.prefill.enqueue(reservation, reservation.cost, request.now, is_sent=not tentative)
                if registry.pairs.in_doubt:
                    registry.pairs.tried(endpoint, None, reservation)
            if registry.journal is not None:
                registry.journal.reserved(reservation, request)
        return reservation

    def confirm(self, reservation: Reservation, now: float) -> None:
        """Let a request stay where it is, and go there now: its prompt will be cached there."""
        reservation.tentative = False
        reservation.endpoint.prefill.sent(reservation, now)
        if reservation.blocks:
            reservation.endpoint.holder.store(reservation.blocks)
        if (journal := self._registry.journal) is not None:
            journal.confirmed(reservation)

    def pull(
        self, reservation: Reservation, request: RequestContext, source: Endpoint, tokens: float, takes: float
    ) -> None:
        """Have P pull prompt tokens from a source, in ``takes`` predicted seconds, and not compute them."""
        endpoint = reservation.endpoint
        if not reservation.stands:
            return
        before = reservation.tokens
        self._registry.learning.weigh_pull(reservation, request, source, tokens, takes)
        endpoint.recount(reservation.tokens - before)
        endpoint.prefill.recost(reservation, reservation.cost)

    def move(self, reservation: Reservation, endpoint: Endpoint) -> Reservation:
        """End a claim, and make one with as many tokens on another endpoint, where the request is now."""
        reservation.release()
        moved = Reservation(endpoint, endpoint.generation, reservation.tokens)
        endpoint.take(moved)
        return moved

    def handed_over(self, prefill: Endpoint, decode: Endpoint) -> None:
        """Record that what a P holds is on its way to a D."""
        registry = self._registry
        if prefill in registry:
            first = registry.ranks_of(prefill)[0]
            if registry.failed_transfers.handed_over(first, decode) and registry.journal is not None:
                registry.journal.handed_over(first, decode)

    def prefilled(
        self, reservation: Reservation, prompt_tokens: int, cached_tokens: int | None, now: float
    ) -> None:
        """End a claim on prefill with what the instance says it read, and learn from how long it took.

        ``cached_tokens`` is ``None`` if it does not say; then what was predicted is taken for true.
        """
        seconds = reservation.finish(now)
        if seconds is not None:
            reservation.endpoint.prefill.computed(seconds)
            self._registry.learning.prefilled(reservation, prompt_tokens, cached_tokens, seconds)
            if (journal := self._registry.journal) is not None:
                journal.prefilled(reservation, prompt_tokens, cached_tokens)

    def answered(
        self, endpoint: Endpoint, blocks: Sequence[int], block_tokens: float, prompt: float, answer: float
    ) -> None:
        """Note that D has in its cache the answer of so many tokens to a prompt with these blocks.

        ``block_tokens`` may be estimated: a prompt has room for all of its blocks, and for no further one.
        The last token of an answer is not cached, since nothing was computed from it.
        """
        if blocks:
            known = len(blocks)
            size = max(1.0, prompt / (known + 1), min(block_tokens, prompt / known))
            endpoint.holder.answered(blocks, int((prompt + answer - 1) / size) - known)
