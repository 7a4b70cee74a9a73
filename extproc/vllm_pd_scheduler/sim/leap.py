"""Many decode steps at once: steps that differ only in the length of the contexts, in closed form."""

from dataclasses import dataclass
from math import sqrt


@dataclass(slots=True)
class Leap:
    """Steps that follow each other from `start` with the same batch; none of them is a request's last.

    The first lasts `first` seconds, and each one `growth` seconds longer than the one before, since every
    context has grown by a token. `taken` of them have been applied to the engine.
    """

    start: float
    steps: int
    first: float
    growth: float
    batch: int
    taken: int = 0

    def end(self, steps: int) -> float:
        """When the first `steps` steps have ended: an arithmetic series."""
        return self.start + steps * self.first + self.growth * (steps * (steps - 1) // 2)

    def begun(self, now: float) -> int:
        """Steps that have begun before `now`, at least one: a step that would begin at `now` has not."""
        elapsed = now - self.start
        # The root of growth/2 * n**2 + (first - growth/2) * n = elapsed, in the form that bears growth 0.
        half = self.first - self.growth / 2
        divisor = half + sqrt(half * half + 2 * self.growth * max(0.0, elapsed))
        count = self.steps if divisor <= 0 else int(min(self.steps, 2 * elapsed / divisor))
        # The root is rounded, so look whether its neighbours fit better.
        while count < self.steps and self.end(count) < now:
            count += 1
        while count > 1 and self.end(count - 1) >= now:
            count -= 1
        return max(1, count)
