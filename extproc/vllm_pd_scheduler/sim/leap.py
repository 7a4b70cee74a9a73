"""Computes many decode steps at once: while only the contexts grow, their times are an arithmetic series."""

from dataclasses import dataclass
from math import sqrt


@dataclass(slots=True)
class Leap:
    """Successive decode steps with the same batch, none of which is a request's last."""

    start: float
    """When the first step begins, in seconds of the caller's clock."""
    steps: int
    """Number of steps."""
    first: float
    """Seconds of the first step."""
    growth: float
    """Seconds by which each step is longer than the one before: every context has grown by a token."""
    batch: int
    """Requests in the batch."""
    applied: int = 0
    """Steps that have been applied to the engine."""

    def end(self, steps: int) -> float:
        """Return when the first ``steps`` steps have ended."""
        return self.start + steps * self.first + self.growth * (steps * (steps - 1) // 2)

    def started(self, now: float) -> int:
        """Return how many steps have started before ``now``, at least one.

        A step that would start at ``now`` itself has not.
        """
        elapsed = now - self.start
        # The root of growth/2 * n**2 + (first - growth/2) * n = elapsed, in the form that needs no division
        # by growth, which may be 0.
        half = self.first - self.growth / 2
        divisor = half + sqrt(half * half + 2 * self.growth * max(0.0, elapsed))
        count = self.steps if divisor <= 0 else int(min(self.steps, 2 * elapsed / divisor))
        # The root has rounding errors, so its neighbours are tried too.
        while count < self.steps and self.end(count) < now:
            count += 1
        while count > 1 and self.end(count - 1) >= now:
            count -= 1
        return max(1, count)
