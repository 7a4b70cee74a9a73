"""What other replicas of the scheduler do with the same fleet, counted so that a strategy sees one load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ..models import By
from ..request.context import RequestContext
from .breaker import BreakerState
from .endpoint import Endpoint, Reservation

if TYPE_CHECKING:
    from .registry import Registry


class Journal(Protocol):
    """What is told of all that this scheduler does, so that others can know it."""

    def reserved(self, reservation: Reservation, request: RequestContext) -> None:
        """Note a request that was given an endpoint."""
        ...

    def prefilled(self, reservation: Reservation, prompt_tokens: int, cached_tokens: int | None) -> None:
        """Note a prefill that was done, and what P has read."""
        ...

    def ejected(self, endpoint: Endpoint) -> None:
        """Note that requests of ours have failed so often that the endpoint is out."""
        ...

    def recovered(self, endpoint: Endpoint) -> None:
        """Note that a trial request of ours went well."""
        ...


class Elsewhere:
    """The changes that others' requests make. Part of the registry; tells no :class:`Journal` of them."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def enqueue(
        self,
        endpoint: Endpoint,
        prompt_tokens: float,
        cached: tuple[float, int],
        blocks: Sequence[int],
        now: float,
    ) -> Reservation:
        """Count a prefill that another replica has sent, at the place in P's queue where it is heard of.

        ``cached`` are the prompt's tokens and blocks that were taken for cached there. Its seconds are
        predicted here, by what this scheduler has learned.
        """
        load, tokens = endpoint.prefill, max(1.0, prompt_tokens - endpoint.prefill.trust * cached[0])
        claim = Reservation(
            endpoint,
            endpoint.generation,
            tokens,
            load.cost(tokens, prompt_tokens),
            load.remaining(now),
            now,
            cached[0],
            blocks,
            cached[1],
            elsewhere=True,
        )
        load.enqueue(claim, claim.cost, now)
        endpoint.work_changes()
        return claim

    def prefilled(
        self, claim: Reservation, prompt_tokens: int, cached_tokens: int | None, now: float
    ) -> None:
        """End such a prefill, which was done, and learn from it.

        Its seconds are measured here. Two that end in one step of the engine would else count twice: either
        replica hears too late of the other's to know that it was done in its own time.
        """
        seconds = claim.endpoint.prefill.complete(claim, now) if self._end(claim) else None
        if seconds is not None:
            self._registry.learning.prefilled(claim, prompt_tokens, cached_tokens, seconds)

    def cancel(self, claim: Reservation, now: float) -> None:
        """End such a prefill, of which nothing is known but that it is queued no more."""
        if self._end(claim):
            claim.endpoint.prefill.cancel(claim, now)

    def _end(self, claim: Reservation) -> bool:
        active, claim.active = claim.active, False
        claim.endpoint.work_changes()
        return active

    def eject(self, endpoint: Endpoint, now: float) -> None:
        """Eject an instance at which others' requests fail, as if ours had failed: within the same bounds."""
        self._registry.eject(endpoint, "requests of another replica of the scheduler fail there", now)

    def readmit(self, endpoint: Endpoint) -> None:
        """Let an instance serve again at which another replica's trial request went well."""
        breaker = endpoint.breaker
        if breaker.state is not BreakerState.CLOSED:
            breaker.readmit()
            breaker.succeeded()
            self._registry.tell(By.REQUEST)
