"""How requests go, as the labels of metrics have it."""

from __future__ import annotations

from enum import StrEnum


class Served(StrEnum):
    """How a request was served: the label ``served`` of ``pd_scheduler_requests_total``."""

    SPLIT = "split"
    """Prefill on P, decode on D."""
    WHOLE = "whole"
    """On D alone, since it cannot be split."""
    LOCAL = "local"
    """On D alone, since no P could prefill it."""
    ALONE = "alone"
    """On D alone, since that was predicted to be faster, or is configured."""
    PASSED = "passed"
    """Another path or method, on D as it is."""


class Ending(StrEnum):
    """How a request ended that was sent to D: the label ``outcome`` of ``pd_scheduler_responses_total``."""

    OK = "ok"
    """A whole answer, of a status below 400."""
    CLIENT_ERROR = "client_error"
    """A 4xx."""
    ERROR = "error"
    """A 5xx, or no answer at all."""
    LEFT = "left"
    """The client left before the end."""
    CUT = "cut"
    """The answer had begun, and broke off."""


class Stray(StrEnum):
    """What Envoy has told of, or asked for, a request of another run: the label ``what`` of
    ``pd_scheduler_strays_total``."""

    ATTEMPT = "attempt"
    """That an attempt has failed."""
    RESULT = "result"
    """How it has ended."""
    QUESTION = "question"
    """Whether it may be tried again."""


class QueueOutcome(StrEnum):
    """How a request left the queue: the label ``outcome`` of ``pd_scheduler_queue_wait_seconds``."""

    SERVED = "served"
    """It got an endpoint, or learned that none can serve."""
    REFUSED = "refused"
    GONE = "gone"
    """Its client left while it waited."""
