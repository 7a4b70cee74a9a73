"""Attempts at a decode instance that failed, whoever tells of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Failure(StrEnum):
    """How an attempt failed."""

    CONNECT = "connect"
    """No connection: the request was not delivered."""
    RESET = "reset"
    """The connection ended before an answer began."""
    TIMEOUT = "timeout"
    """No answer began in time; the instance may still be at it."""
    STATUS = "status"
    """The answer was 5xx."""
    CUT = "cut"
    """The answer had begun: the client's stream was cut."""
    LEFT = "left"
    """Nothing failed: the client left before an answer began."""


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """One attempt that failed: at which ``ip:port``, how, and for which of our requests (``names.ID``)."""

    address: str
    failure: Failure
    request: str | None = None
    first: bool = True
    """Whether it was the request's first attempt, the one that carries the hand-off."""
