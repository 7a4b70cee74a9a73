"""Passive health: an instance whose requests fail is left out before the next probe would notice.

A circuit breaker (closed, open, half open) without a clock of its own::

    CLOSED ──── requests fail ────▶ OPEN ──── a pause, then a probe succeeds ────▶ HALF_OPEN
                                      ▲                                                │ │
    CLOSED ◀── a request succeeds ────┼────────────────────────────────────────────────┘ │
                                      └───────────────── a request fails ────────────────┘
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto

MAX_PAUSE_S = 30.0


class BreakerState(Enum):
    """Whether requests go to an instance."""

    CLOSED = auto()
    OPEN = auto()
    HALF_OPEN = auto()
    """One request at a time, to see how it ends."""


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When an instance is ejected.

    After ``failures`` in a row, or when of the last ``window`` requests less than ``success_rate`` (0 to
    1) succeeded. It stays out for ``pause`` seconds at least, twice as long each time that it fails again
    at once.
    """

    failures: int = 3
    success_rate: float = 0.5
    window: int = 20
    pause: float = 1.0


@dataclass(slots=True)
class Breaker:
    """The breaker of one instance. ``open`` is left to the caller, who knows how many others are out."""

    _policy: BreakerPolicy
    _state: BreakerState = BreakerState.CLOSED
    _not_before: float = 0.0
    _streak: int = 0
    _pause: float = 0.0
    _reason: str = ""
    _results: deque[bool] = field(default_factory=deque)

    @property
    def state(self) -> BreakerState:
        """Whether requests go there."""
        return self._state

    @property
    def not_before(self) -> float:
        """When the next state may follow OPEN, in the caller's time."""
        return self._not_before

    @property
    def reason(self) -> str:
        """Why the instance was last ejected, for people; empty if it never was."""
        return self._reason

    @property
    def failures(self) -> int:
        """Requests that failed in a row."""
        return self._streak

    @property
    def spotless(self) -> bool:
        """Whether it is closed, and none of the recent requests has failed."""
        return self._state is BreakerState.CLOSED and False not in self._results

    def follow(self, policy: BreakerPolicy) -> None:
        """Use another policy from now on."""
        self._policy = policy

    def succeeded(self) -> bool:
        """Record a request that went well; return whether the state changed.

        While OPEN it does not: the pause is a least time, and an instance that fails every other request
        would be back after each that it answers as the last resort. While HALF_OPEN any success closes it.
        """
        self._streak = 0
        self._record(True)
        if self._state is not BreakerState.HALF_OPEN:
            return False
        self._reset()
        return True

    def failed(self) -> bool:
        """Record a request that failed; return whether the instance should be ejected."""
        self._streak += 1
        self._record(False)
        if self._state is BreakerState.HALF_OPEN:
            return True
        if self._state is BreakerState.OPEN:
            return False
        full = len(self._results) >= self._policy.window
        rate = sum(self._results) / len(self._results)
        return self._streak >= self._policy.failures or (full and rate < self._policy.success_rate)

    def forgive(self) -> bool:
        """Take back a failure that was the request's, not the instance's; return whether the state changed.

        Ejected because of it, the instance may show at once that it works.
        """
        self._streak = max(0, self._streak - 1)
        if False in self._results:
            self._results.remove(False)
        if self._state is not BreakerState.OPEN or self._streak >= self._policy.failures:
            return False
        self._state = BreakerState.HALF_OPEN
        return True

    def open(self, now: float, reason: str = "") -> None:
        """Eject the instance, and note why."""
        self._reason = reason
        self._pause = min(MAX_PAUSE_S, self._pause * 2) if self._pause else self._policy.pause
        self._not_before = now + self._pause
        self._state = BreakerState.OPEN

    def probed(self, now: float) -> bool:
        """Record a health probe that succeeded; return whether the state changed."""
        if self._state is not BreakerState.OPEN or now < self._not_before:
            return False
        self._state = BreakerState.HALF_OPEN
        return True

    def readmit(self) -> None:
        """End the pause at once: there is no other instance left."""
        if self._state is BreakerState.OPEN:
            self._state = BreakerState.HALF_OPEN

    def restarted(self) -> None:
        """Forget everything: it is another process now."""
        self._reset()

    def _reset(self) -> None:
        self._state = BreakerState.CLOSED
        self._streak = 0
        self._pause = 0.0
        self._results.clear()

    def _record(self, success: bool) -> None:
        self._results.append(success)
        if len(self._results) > self._policy.window:
            self._results.popleft()
