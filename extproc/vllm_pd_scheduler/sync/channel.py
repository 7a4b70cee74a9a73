"""What a back end is: it carries messages to all other replicas and keeps the log of operators' changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

Position = str
"""A place in the log. Only the back end knows what it means; others compare it."""

START: Position = ""
"""The place before the first change."""

APPEND_S = 5.0
"""Seconds that a change may take to be in the log."""
MAX_CHANGE_BYTES = 1 << 20
"""Of what may be appended to the log."""


@dataclass(frozen=True, slots=True)
class Change:
    """An entry of the log; at ``START`` the word that the log is empty, with no data."""

    position: Position
    data: bytes


UNSURE = "; nobody knows whether the change is kept: if it is, it is made when %s"
"""Ends the message of :exc:`NotKept` where the change was sent, and no answer has come."""


class Overtaken(Exception):
    """The log has a newer change than the caller knew: it is told, and the caller may try again after it."""


class NotKept(Exception):
    """A change is not in the log, or nobody knows whether it is; the message says why and what to do."""


class Dropped(StrEnum):
    """Why a message was not sent."""

    AWAY = "not connected"
    SLOW = "too slow"
    """Too much waits to be sent."""


@dataclass(slots=True)
class Traffic:
    """What has passed through a channel since the start."""

    sent: int = 0
    """Messages."""
    sent_bytes: int = 0
    received: int = 0
    """Messages, without those of our own that come back."""
    received_bytes: int = 0
    dropped: Counter[Dropped] = field(default_factory=Counter)
    """Messages that were not sent."""
    connected: int = 0
    """How often a connection was made."""


class Listener(Protocol):
    """Whom a channel tells. It is called in the event loop, never blocks and never raises."""

    def received(self, data: bytes) -> None:
        """Take a message of another replica. One of our own may come back."""
        ...

    def changed(self, change: Change) -> None:
        """Take a change of the log.

        Each comes once, in the log's order, our own too. When a connection is made, the newest comes if it is
        not the one that came last: each leads to the whole state, so those before it need not be known. If
        the log is empty and should not be, ``Change(START, b"")`` comes, so that what was lost is put back.
        """
        ...

    def connection(self, problem: str) -> None:
        """Take it that the connection is lost or cannot be made, and why; with ``""``, that it is there."""
        ...


class Channel(Protocol):
    """Carries what replicas tell each other. No request ever waits for it."""

    traffic: Traffic

    @property
    def problem(self) -> str:
        """Empty while connected; else what is wrong, and what to do."""
        ...

    def send(self, data: bytes) -> bool:
        """Send a message to all other replicas; return ``False`` if it was dropped. Never waits.

        It is dropped while there is no connection, and when too much waits to be sent.
        """
        ...

    async def run(self, listener: Listener) -> None:
        """Connect, and again after each failure, until this is cancelled; tell a listener what comes."""
        ...

    async def append(self, data: bytes, expected: Position) -> Position:
        """Put a change at the end of the log, if its newest is still ``expected``, and return its position.

        The listener has been told of it before this returns. Raise :exc:`Overtaken` if there is a newer one,
        and :exc:`NotKept` if the log cannot be reached or refuses it; wait a few seconds at most for either.
        """
        ...
