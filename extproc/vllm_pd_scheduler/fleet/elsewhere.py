"""What other replicas of the scheduler do with the same fleet, counted so that a strategy sees one load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from ..models import By
from ..request.context import RequestContext
from .breaker import BreakerState
from .endpoint import Endpoint
from .reservation import Reservation

if TYPE_CHECKING:
    from .registry import Registry


EARLY_S = 0.25
"""By which a pause that began later here than there may be over early."""


class Journal(Protocol):
    """What is told of all that this scheduler does, so that others can know it."""

    def reserved(self, reservation: Reservation, request: RequestContext) -> None:
        """Note a request that was given an endpoint."""
        ...

    def confirmed(self, reservation: Reservation) -> None:
        """Note that a request stays with the P that it was given for the time being."""
        ...

    def prefilled(self, reservation: Reservation, prompt_tokens: int, cached_tokens: int | None) -> None:
        """Note a prefill that was done, and what P has read."""
        ...

    def handed_over(self, prefill: Endpoint, decode: Endpoint) -> None:
        """Note a hand-off that is on its way."""
        ...

    def drawn(self, priority: int, tenant: bytes, work: float) -> None:
        """Note work that a tenant was given, here by its hash, while requests waited: predicted seconds."""
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
        self.waiting: tuple[int, int] = (0, 0)
        """Requests in the queues of other replicas, for P and for D."""
        self.on_drawn: Callable[[int, bytes, float], None] | None = None
        """Called with the work that another replica has given a tenant: priority, hash, predicted seconds."""
        self.on_scraped: Callable[[Endpoint], None] | None = None
        """Called after each scrape, which shows what is there."""
        self._registry = registry

    def scraped(self, endpoint: Endpoint) -> None:
        """See what an endpoint says of itself."""
        if self.on_scraped is not None:
            self.on_scraped(endpoint)

    def drawn(self, priority: int, tenant: bytes, work: float) -> None:
        """Count what a tenant was given elsewhere for its turn here."""
        if self.on_drawn is not None:
            self.on_drawn(priority, tenant, work)

    def enqueue(
        self,
        endpoint: Endpoint,
        prompt_tokens: float,
        cached: tuple[float, int],
        blocks: Sequence[int],
        now: float,
        replica: str = "",
        *,
        is_sent: bool = True,
    ) -> Reservation:
        """Count a prefill that another replica has sent, at the place in P's queue where it is heard of.

        One that has only claimed its place is told of with :meth:`sent`, or is cancelled.

        ``cached`` are the prompt's tokens and blocks that were taken for cached there. Its seconds are
        predicted here, by what this scheduler has learned. Call ``work_changes`` of the endpoint after it,
        and after :meth:`done` and :meth:`cancel`: once for all that a message tells of it.
        """
        load = endpoint.prefill
        tokens = max(1.0, prompt_tokens - load.trust * cached[0])
        cost = load.cost(tokens, prompt_tokens)
        claim = Reservation(
            endpoint,
            endpoint.generation,
            tokens,
            cost,
            at=now,
            cached=cached[0],
            blocks=blocks,
            cached_blocks=cached[1],
            tentative=not is_sent,
            replica=replica,
            elsewhere=True,
        )
        load.enqueue(claim, cost, now, is_sent=is_sent)
        return claim

    def sent(self, claim: Reservation, blocks: Sequence[int], now: float) -> None:
        """Note that such a prefill, which had claimed its place, is on its way now, with these blocks."""
        if claim.tentative and claim.active:
            claim.tentative, claim.blocks = False, blocks
            claim.endpoint.prefill.sent(claim, now)

    def done(
        self, claim: Reservation, prompt_tokens: int, cached_tokens: int | None, now: float
    ) -> tuple[float, float] | None:
        """End such a prefill, which was done; return the seconds that it took and those predicted for it.

        They are measured here. Two that end in one step of the engine would else count twice: either replica
        hears too late of the other's to know that it was done in its own time. ``None`` if it has ended.
        """
        load = claim.endpoint.prefill
        active, claim.active = claim.active, False
        seconds = load.complete(claim, now) if active else None
        if seconds is None:
            return None
        new = max(1.0, prompt_tokens - (claim.cached if cached_tokens is None else cached_tokens))
        return seconds, load.cost(new, prompt_tokens)

    def learn(
        self, claim: Reservation, prompt_tokens: int, cached_tokens: int | None, seconds: float
    ) -> None:
        """Learn from such a prefill as from one of ours."""
        self._registry.learning.prefilled(claim, prompt_tokens, cached_tokens, seconds)

    def cancel(self, claim: Reservation, now: float) -> None:
        """End such a prefill, of which nothing is known but that it is queued no more."""
        if claim.active:
            claim.active = False
            claim.endpoint.prefill.cancel(claim, claim.cancelled_at(now))

    def eject(self, endpoint: Endpoint, now: float) -> bool:
        """Eject an instance at which others' requests fail, as if ours had failed: within the same bounds.

        Return whether it is out since now.
        """
        why = "requests of another replica of the scheduler fail there"
        return self._registry.ends.eject(endpoint, why, now)

    def readmit(self, endpoint: Endpoint, now: float) -> bool:
        """Let an instance serve again at which another replica's trial request went well.

        Return ``False`` if its pause is not over, so that there can have been no trial.
        """
        breaker = endpoint.breaker
        if breaker.state is BreakerState.CLOSED:
            return True
        if breaker.state is BreakerState.OPEN and now < breaker.not_before - EARLY_S:
            return False
        breaker.readmit()
        breaker.succeeded()
        self._registry.changes.note(By.REQUEST, endpoint)
        return True

    def leave_out(self, prefill: Endpoint, decode: Endpoint | None, wrong: bool, now: float) -> None:
        """Leave out a pair, or all of a P, that fails elsewhere, or a pair whose texts were ``wrong``."""
        if not wrong:
            self._registry.pairs.leave_out_elsewhere(prefill, decode, now)
        elif decode is not None:
            why = "another replica of the scheduler got wrong answers"
            self._registry.wrong_pairs.leave_out_elsewhere(prefill, decode, why)

    def take_back(self, prefill: Endpoint, decode: Endpoint | None, wrong: bool) -> None:
        """Use a pair again that works, as another replica has found."""
        if not wrong:
            self._registry.pairs.take_back_elsewhere(prefill, decode)
        elif decode is not None:
            self._registry.wrong_pairs.take_back_elsewhere(prefill, decode)

    def is_out(self, prefill: Endpoint, decode: Endpoint | None, wrong: bool) -> bool:
        """Whether a pair is left out."""
        if not wrong:
            return self._registry.pairs.is_out(prefill, decode)
        return decode is not None and decode in self._registry.wrong_pairs.barred(prefill)

    def handed_over(self, prefill: Endpoint, decode: Endpoint, count: int) -> None:
        """Count hand-offs of another replica: the failures that D counts are of these too."""
        self._registry.failed_transfers.handed_over(prefill, decode, count)
