"""How long to wait before something is tried again."""

from __future__ import annotations

import random

FIRST_S = 0.8
MOST_S = 10.0
"""Seconds of the first pause, after one attempt that follows at once, and of the longest."""


class Backoff:
    """Pauses that double, and are each cut short by chance so that no two clients stay in step."""

    def __init__(self) -> None:
        self._failures = 0

    def pause(self) -> float:
        """Return for how many seconds to wait after a failure. After the first in a row that is 0."""
        self._failures += 1
        if self._failures == 1:
            return 0.0
        return min(MOST_S, FIRST_S * 2.0 ** min(self._failures - 2, 10)) * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Note that all is well."""
        self._failures = 0
