"""What a request takes on a P that is not called from here: for how long, and whose fault its end is."""

from __future__ import annotations

from dataclasses import dataclass

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..fleet.reservation import Reservation
from ..records.decision import OK, Attempt
from .attempts import Failure

MAY_BE_PREFILLS = frozenset(
    {
        Failure.TIMEOUT,
        Failure.STATUS,
        Failure.OVERLOADED,
        Failure.REFUSED,
        Failure.LEFT,
        Failure.ABANDONED,
    }
)
"""How an attempt at D can end because of P: the sidecar gives P's errors to the client as if they were D's.
A connection that fails or is cut is the sidecar's own, and so D's."""


@dataclass(slots=True, eq=False)
class PrefillClaim:
    """What a request takes on the P that its sidecar asks.

    Nobody tells when the prefill has ended. It has when a streamed answer begins, if that is told
    (``begins_told``); else the claim ends after the time that was predicted, and in any case with the answer.
    """

    reservation: Reservation
    tokens: int
    """Of the prompt, as estimated."""
    registry: Registry
    noted: Attempt
    begins_told: bool = False
    """Whether the beginning of the answer will be told, and comes before its end: it is a stream."""

    @property
    def endpoint(self) -> Endpoint:
        """The P."""
        return self.reservation.endpoint

    @property
    def predicted(self) -> float:
        """Seconds from the choice of P until its prefill should have ended."""
        return self.reservation.wait + self.reservation.cost

    def began(self, whole: bool, queued: bool, now: float) -> None:
        """Note that an answer has begun.

        Nothing is learned from one that comes ``whole``, or whose D has had requests ``queued``: how long it
        took says nothing of P.
        """
        if self.reservation.active and not (whole or queued):
            self.registry.work.prefilled(self.reservation, self.tokens, None, now)
        self.end(now, OK)

    def took(self, seconds: float, queued: bool) -> None:
        """Learn from the time to the first token, if that is told when all is over.

        Only of a request that had P for itself: of others the wait is not known.
        """
        if seconds > 0 and not queued and self.reservation.wait == 0.0 and not self.begins_told:
            self.registry.learning.prefilled(self.reservation, self.tokens, None, seconds)

    def expired(self, now: float) -> None:
        """Count it no more, since it should have ended by now, unless its end will be told."""
        if not self.begins_told:
            self._release(now)

    def end(self, now: float, outcome: str | None = None) -> None:
        """Count it no more; ``outcome`` says what has become of it, if that is known."""
        self.noted.outcome = self.noted.outcome or outcome
        self._release(now)

    def served(self) -> None:
        """Note that the request was answered."""
        self.noted.outcome = self.noted.outcome or OK
        self.registry.ends.succeeded(self.endpoint)

    def doubtful(self, decode: Endpoint, reason: str, now: float) -> None:
        """Note an end that may be due to P or D: who has many of them, where its peers have few, is ejected.

        It says nothing of D if P does worse than its peers. Two that are always chosen together would else
        both be ejected; so, if it is D's fault, the next P that D is with shows it.
        """
        self.registry.ends.doubtful(self.endpoint, reason, now)
        if not self.registry.ends.stands_out(self.endpoint):
            self.registry.ends.doubtful(decode, reason, now)

    def _release(self, now: float) -> None:
        if self.reservation.active:
            self.noted.took = now - self.reservation.at
            self.reservation.finish(now)
