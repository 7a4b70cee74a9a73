"""How an attempt at a decode instance ended when it did not end in a whole answer with status 200."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto


class Failure(StrEnum):
    """How an attempt failed the client, or the client left it."""

    CONNECT = "connect"
    """No connection: the request was not delivered."""
    RESET = "reset"
    """The connection ended after the request was delivered and before an answer began."""
    TIMEOUT = "timeout"
    """No answer began in time; the instance may still be at it."""
    STATUS = "status"
    """The answer was the instance's error: 5xx but 503, or what no vLLM answers (1xx, 204, a redirect)."""
    OVERLOADED = "overloaded"
    """The answer was 429 or 503: the instance is full."""
    REFUSED = "refused"
    """The answer was another 4xx: the instance does not take this request."""
    CUT = "cut"
    """The answer had begun: the client's stream was cut."""
    LEFT = "left"
    """The client left before an answer began."""
    ABANDONED = "abandoned"
    """The client left after the status had come, and nothing of the answer's body had."""
    BROKEN_OFF = "broken_off"
    """The answer had begun, and a gateway that does not say why has ended it: cut, or its client has left."""
    PASSED_OVER = "passed_over"
    """A gateway that does not say why has gone on to another instance."""
    UNSENT = "unsent"
    """No attempt was made: Envoy answered itself, or the client left, after the scheduler's answer."""


HANDOFF_NOT_FETCHED = frozenset(
    {
        Failure.CONNECT,
        Failure.RESET,
        Failure.STATUS,
        Failure.OVERLOADED,
        Failure.REFUSED,
        Failure.UNSENT,
    }
)
"""How an attempt must have failed for nobody to be fetching its hand-off. Not after a time-out: that D may
still be at it, and freeing the blocks then would give it another prompt's."""

NOT_ANSWERED = frozenset({Failure.CONNECT, Failure.RESET, Failure.TIMEOUT, Failure.CUT, Failure.PASSED_OVER})
"""Where no whole answer has come, whatever the status."""

DOUBTS = frozenset(
    {Failure.LEFT, Failure.ABANDONED, Failure.TIMEOUT, Failure.BROKEN_OFF, Failure.PASSED_OVER}
)
"""What may be the instance's failure or not: it counts when its peers have few of them."""

KEY_REFUSED = frozenset({401, 403})
"""Statuses that speak of the API key."""

OF_THE_INSTANCE = frozenset({*KEY_REFUSED, 404})
"""Refusals that do not depend on how many tokens are asked for, or whether they are streamed: where one role
says 200 to a request and the other one of these, the instance that refuses is not what the fleet is."""

COMPARED_REFUSALS = frozenset({*OF_THE_INSTANCE, 422})
"""Refusals that may be the client's mistake or the instance's: what its peers say decides. Not 400 and 413,
which are hardly ever the instance's."""


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """One attempt: at which ``ip:port``, how it failed, and for which of our requests (``names.ID``)."""

    address: str
    failure: Failure
    request: str | None = None
    first: bool = True
    """Whether it was the request's first attempt, the one that carries the hand-off."""
    status: int = 0
    """The HTTP status of the answer, if one began."""
    retry_after: float | None = None
    """Seconds for which a full instance asks to be left alone, if it does."""
    request_id: str = ""
    """The request's ``X-Request-Id``: the client's or Envoy's, known also where Envoy has no id of ours."""


class Retry(Enum):
    """Whether a request may be sent to one more D."""

    ALLOWED = auto()
    LAST = auto()
    """Yes; but if that loses it, or answers 500, it is sent to no further one."""
    LOST = auto()
    """No: two instances have lost it."""
    SLOW = auto()
    """No: it has timed out, as others have, and one more attempt would add to the load."""
    UNKNOWN = auto()
    """Another scheduler knows, or one before a restart did: as careful as without any."""


def failure_of_status(status: int) -> Failure | None:
    """Return how an answer with this status failed; ``None`` for 200."""
    if status == 200:
        return None
    if status in (429, 503):
        return Failure.OVERLOADED
    if 400 <= status < 500 and status != 408:
        return Failure.REFUSED
    return Failure.STATUS
