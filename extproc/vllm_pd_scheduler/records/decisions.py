"""The newest decisions: why requests went where they went, and what became of them."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any

from .decision import Decision
from .explained import explained

MAX_DECISIONS = 1000
"""How many are remembered: a choice. The last seconds of a busy scheduler, the last day of an idle one."""


class Decisions:
    """The newest decisions of one scheduler, at most ``MAX_DECISIONS``.

    ``clock`` returns the monotonic seconds that decisions have, ``wall_clock`` Unix seconds. The numbers of
    one of ``several`` schedulers are microseconds since 1970, or one more than the last: so all can be put in
    one order.
    """

    def __init__(
        self, clock: Callable[[], float], wall_clock: Callable[[], float], several: bool = False
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._several = several
        self.newest = 0
        """The number of the last one; 0 before the first."""
        self._kept: deque[Decision] = deque(maxlen=MAX_DECISIONS)

    def add(self, decision: Decision) -> None:
        """Remember a decision. What becomes of its request is written into it later."""
        self.newest = max(self.newest + 1, round(self._wall_clock() * 1e6) if self._several else 0)
        decision.number = self.newest
        self._kept.append(decision)

    def after(self, number: int) -> list[Decision]:
        """Return the decisions after the one with a number, the oldest first.

        A number that there has not been yet is one from before a restart: all are after that. That of one of
        several may be another's.
        """
        if number > self.newest and not self._several:
            number = 0
        at = bisect_right(self._kept, number, key=lambda each: each.number)
        return list(islice(self._kept, at, None))

    def as_json(self, decision: Decision) -> dict[str, Any]:
        """Return a decision as the admin interface shows it."""
        return explained(decision, self._wall_clock() - self._clock())
