"""One other replica, and what is counted of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..fleet.endpoint import Endpoint
from ..fleet.reservation import Reservation
from .placements import Heard
from .plausible import Budget, Claim, Lessons
from .verdicts import Verdicts


@dataclass(slots=True)
class Counted:
    """What is counted of one replica on one endpoint."""

    generation: int
    requests: int = 0
    tokens: int = 0
    handoffs: int = 0
    queued: int = 0
    """Of its prefills there, those that are believed."""
    trial: Reservation | None = None
    claim: Claim = field(default_factory=Claim)


@dataclass(slots=True)
class Other:
    """One other replica, as it is known here."""

    name: str
    number: int
    heard_at: float
    messages: Budget
    draws: Budget
    back: bool = False
    """Whether it was known, and silent for some time."""
    waiting: tuple[int, int] = (0, 0)
    summarised: bool = False
    """Whether all that it had when it was first heard is known."""
    shares: dict[Endpoint, Counted] = field(default_factory=dict)
    prefills: dict[int, Reservation] = field(default_factory=dict)
    heard: Heard = field(default_factory=Heard)
    verdicts: Verdicts = field(default_factory=Verdicts)
    drawn: dict[tuple[int, bytes], float] = field(default_factory=dict)
    lessons: Lessons = field(default_factory=Lessons)
