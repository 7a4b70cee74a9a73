"""Errors as a client of an OpenAI-compatible server expects them."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from .headers import DROPPED_REASON, REASON

RETRY_AFTER_S = 1
"""What a client is told to wait when nothing can serve it; an instance can be back within 2 s."""

_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    413: "RequestEntityTooLargeError",
    429: "TooManyRequestsError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}

_DROPPED = {
    "no_decode": "rejected-no-endpoints",
    "no_prefill": "rejected-no-endpoints",
    "queue_full": "rejected-saturated",
    "memory": "rejected-saturated",
    "slo_missed": "rejected-saturated",
    "queue_timeout": "rejected-ttl-expired",
    "queue_displaced": "evicted-priority",
    "draining": "rejected-shutting-down",
}
"""What llm-d calls some of our reasons."""


class BodyError(ValueError):
    """The body is not one that can be served; the message is for the client."""


@dataclass(frozen=True, slots=True)
class Reject:
    """An answer that is given in place of an instance's."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    reason: str = ""
    """A short name, for metrics and Envoy's access log."""

    def __str__(self) -> str:
        """Say it in a line for the log."""
        return f"refused with {self.status}, {self.reason}"


@dataclass(frozen=True, slots=True)
class OwnAnswer(Reject):
    """What the scheduler answers of itself, as it was asked to: no request was refused."""


def own_answer(status: int, body: bytes) -> OwnAnswer:
    """Return JSON that the scheduler answers with."""
    return OwnAnswer(status, body, {"content-type": "application/json"}, "own")


def reject(
    status: int, message: str, reason: str, retry_after: int = RETRY_AFTER_S, param: str | None = None
) -> Reject:
    """Return an OpenAI-shaped error, with ``Retry-After`` (seconds) where trying again can help.

    ``param`` is the field of the request that is wrong.
    """
    error = {
        "message": message,
        "type": _TYPES.get(status, "InternalServerError"),
        "param": param,
        "code": status,
    }
    headers = {"content-type": "application/json", REASON: reason}
    if status in (429, 503):
        headers["retry-after"] = str(retry_after)
    if reason in _DROPPED:
        headers[DROPPED_REASON] = _DROPPED[reason]
    return Reject(status, msgspec.json.encode({"error": error}), headers, reason)
