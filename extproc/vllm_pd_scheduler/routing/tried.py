"""What a request has tried on its way to a prefill, and what can come of that."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ..connectors import Attempt, Order
from ..fleet.endpoint import Endpoint
from ..fleet.reservation import Reservation
from ..handoff.pending import PendingHandoff
from ..records.decision import Attempt as NotedAttempt
from ..records.decision import Decision
from ..request.context import RequestContext
from ..request.errors import Reject, reject

RESERVED = "reserved"
"""How an attempt is noted that has kept a place at P until D has asked for the prefill."""


class PrefillTry(Struct, eq=False):
    """One attempt to have a request prefilled: where, and what is noted of it."""

    endpoint: Endpoint
    """The P."""
    reservation: Reservation
    context: RequestContext
    tried: Tried
    noted: NotedAttempt
    sent_at: float = 0.0
    """When it was sent, in monotonic seconds."""


class Ready(Struct, frozen=True, gc=False):
    """What P is to be sent: the attempt, and the body for it."""

    attempt: Attempt
    body: bytes


class WithoutHandoff(Struct, frozen=True, gc=False):
    """Decode is to prefill the request itself.

    ``failed`` says whether that is because P failed, which only a share of the requests may have. Else P has
    refused the request (``refused_by``, with an HTTP ``status``) or has nothing to hand over, or it is the
    connector that failed.
    """

    failed: bool = True
    refused_by: Endpoint | None = None
    status: int = 0
    losses: int = 0
    """Connections that the request has lost at P after it was delivered."""
    errors: tuple[Endpoint, ...] = ()
    """P that have answered 500."""


class AskedLater(Struct, frozen=True, gc=False):
    """D is to ask for the prefill (``Order.DECODE_FIRST``): until then nothing is sent to P."""

    attempt: Attempt
    reservation: Reservation
    """What it will take on P, as far as is known now."""
    noted: NotedAttempt
    tried: Tried

    def end(self, now: float) -> None:
        """Note that P is not needed, or chosen anew."""
        self.noted.outcome, self.noted.took = RESERVED, now - self.reservation.at
        self.reservation.release(now)


Outcome = PendingHandoff | WithoutHandoff | Reject


class Tried(Struct, eq=False):
    """The endpoints that a request was sent to, and what came of it."""

    losses: int
    """Connections that it has lost, and those of ``MAX_LOSSES`` that it did not have."""
    decision: Decision
    """Where all of it is noted."""
    endpoints: list[Endpoint] = []
    processes: list[Endpoint] = []
    """All ranks of their processes: what has failed on one is not tried on another."""
    only_full: bool = True
    order: Order = Order.PREFILL_FIRST
    """Of the newest attempt."""
    decode: Endpoint | None = None
    """The only D that the newest attempt is for, if it is for one only."""
    refusal: Reject | None = None
    errors: tuple[Endpoint, ...] = ()
    """Those that have answered 500."""
    later: bool = False
    """Whether D is to ask for what the newest attempt would send."""
    may_have_written: bool = False
    """Whether a P that has failed may have done the prefill all the same."""
    asked: Attempt | None = None
    """The attempt whose D waits for P, and has said where."""
    unfit: Sequence[Endpoint] = ()
    """P that the D which waits does not fit."""

    @property
    def excluded(self) -> Sequence[Endpoint]:
        """Those that are not to be tried."""
        return [*self.processes, *self.unfit] if self.unfit else self.processes

    def give_back(self, endpoint: Endpoint) -> None:
        """Let one that has not failed be tried again."""
        self.endpoints.remove(endpoint)
        self.processes = [each for each in self.processes if each.instance is not endpoint.instance]

    def clear(self) -> None:
        """Let all be tried again."""
        self.endpoints.clear()
        self.processes.clear()


def lost_twice(retry_after: int) -> Reject:
    """Return the answer to a request that two instances have lost, or whose prompt others have."""
    message = (
        "Two instances ended while they had this request or one with its prompt, and none has answered it: "
        f"it is not tried again for {retry_after} s."
    )
    return reject(503, message, "lost", retry_after)


def no_prefill() -> Reject:
    """Return the answer to a request that no P can prefill, and D may not."""
    return reject(503, "No prefill instance can serve this request now.", "no_prefill")
