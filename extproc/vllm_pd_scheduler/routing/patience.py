"""How patient to be with a fleet that is slow: slow is not broken, and trying elsewhere adds to the load.

A time limit finds instances that hang. When nearly all attempts run into it, none hangs: the fleet needs
longer than the limit allows. Then the limit grows, and what has timed out is not sent to another instance.
"""

from __future__ import annotations

GROWTH = 1.5
"""By which the limits are multiplied when an attempt runs into one and most of the others do too."""

SHRINKAGE = 0.95
"""By which they are multiplied, down to the configured ones, with each attempt that is answered in time."""

MAX_FACTOR = 10.0

WEIGHT = 0.2
"""Weight of the newest attempt in the share of those that timed out."""

MOST = 0.6
"""Share of time-outs from which the fleet is slow. With two instances of which one hangs it is 0.5."""

RETRY_SHARE = 0.2
"""Retries after a time-out, as a share of the requests: Envoy's retry budget has the same default."""

RETRY_RESERVE = 5.0
"""Retries that may be made at once: enough to find an instance that hangs, before it is ejected."""


class Patience:
    """Counts attempts of one role that were answered in time or were not."""

    def __init__(self) -> None:
        self.factor = 1.0
        """By which the configured limits are to be multiplied now."""
        self._timed_out = 0.0
        self._retries = RETRY_RESERVE

    def requested(self) -> None:
        """Count a request: it earns a share of a retry."""
        self._retries = min(RETRY_RESERVE, self._retries + RETRY_SHARE)

    def answered(self) -> None:
        """Count an attempt that was answered in time."""
        self._timed_out *= 1.0 - WEIGHT
        self.factor = max(1.0, self.factor * SHRINKAGE)

    def timed_out(self) -> None:
        """Count an attempt that was not."""
        self._timed_out += WEIGHT * (1.0 - self._timed_out)
        if self._timed_out > MOST:
            self.factor = min(MAX_FACTOR, self.factor * GROWTH)

    def may_retry(self) -> bool:
        """Return whether a request that has timed out may be tried elsewhere, and count it if so."""
        if self._retries < 1.0:
            return False
        self._retries -= 1.0
        return True
