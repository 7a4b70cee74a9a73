"""How long the answers of decode instances stood still lately, since those read prompts by themselves."""

from __future__ import annotations

import math

from ..fleet.endpoint import Endpoint

FORGET_S = 600.0
"""Seconds after which what was given to an instance is forgotten: answers that ran then have ended."""


class Stalls:
    """The seconds of prefill that decode instances were given, as predicted, and that fade.

    Of what was given one mean answer's time ago a share of 1/e is left: by then most answers that stood still
    for it have ended.
    """

    def __init__(self) -> None:
        self._of: dict[Endpoint, tuple[float, float, float]] = {}
        """Seconds, as of when, and when the last prefill is predicted to end; those used last at the end."""

    def __len__(self) -> int:
        """Return of how many instances something is kept."""
        return len(self._of)

    def recent(self, decode: Endpoint, now: float, answer_s: float) -> float:
        """Return how long an answer that runs there has stood still; ``answer_s``: seconds that one takes."""
        seconds, at, _ = self._of.get(decode, (0.0, now, 0.0))
        return seconds * math.exp(min(0.0, at - now) / answer_s)

    def wait(self, decode: Endpoint, now: float) -> float:
        """Return the predicted seconds until the prefills that were given there are done."""
        return max(0.0, self._of.get(decode, (0.0, now, now))[2] - now)

    def add(self, decode: Endpoint, now: float, answer_s: float, seconds: float) -> None:
        """Note that a prefill of so many seconds was given to an instance."""
        recent, wait = self.recent(decode, now, answer_s), self.wait(decode, now)
        self._of.pop(decode, None)
        self._of[decode] = recent + seconds, now, now + wait + seconds
        oldest = next(iter(self._of))
        if self._of[oldest][1] + FORGET_S < now:
            del self._of[oldest]
