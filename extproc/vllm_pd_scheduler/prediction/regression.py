"""Linear regression that learns from one sample at a time: what things cost, from how long they took."""

from __future__ import annotations

import math
from collections.abc import Sequence

PRIOR_WEIGHT = 0.01
"""Weight of the prior against one sample whose features are 1, if no other is given.

A choice: small enough that a few samples override it, large enough that it decides where they say nothing,
and that the equations always have one solution.
"""
MAX_SURPRISE = 5.0
"""A sample counts as at most so many times its prediction, and as at least that part of it (a choice).

So one hang does not count as slowness. An instance that has really become slower is still learned, in
several steps. A sample also weighs no more than so many usual ones.
"""
_MIN_PREDICTION = 1e-3
"""What counts as predicted at least, in place of the 0 of zero coefficients, so that they can grow again."""
_WILD = 25.0
"""A sample that is off by so many times is not believed at all, unless others before it were too."""
_MAX_WILD = 3
"""Wild samples in a row that are not believed (a choice): a lie comes once, a change stays."""
_RECENT = 0.1
"""Weight of the newest sample in the mean of what samples weigh."""
_MIN_WEIGHT = 1e-3
"""What a usual sample weighs at least, so that samples of no work do not end all learning."""
_SOLVE_EACH_UNTIL = 32
"""Up to so many samples the coefficients are computed anew for each one."""
_SOLVE_EVERY = 8
"""Later only at each eighth: solving takes 20 µs, more than all the rest, and one sample changes little."""


class OnlineRegression:
    """Weighted least squares for ``y = Σ coefficient * x``, with no coefficient below zero.

    - Each sample multiplies the weight of all earlier ones by ``forget``, so that about the last
      ``1 / (1 - forget)`` samples count.
    - ``scale`` has a typical value of each feature; the features are divided by it, so that the prior weighs
      on all coefficients alike.
    - Ridge regression draws the coefficients towards ``prior``, which decides what the samples leave open.
      ``hold`` has the weight of each.
    - No sample is believed further than ``MAX_SURPRISE`` and ``_WILD`` say, so that nonsense is forgotten as
      fast as anything else is learned.
    """

    __slots__ = (
        "_coefficients",
        "_forget",
        "_hold",
        "_moments",
        "_normal",
        "_prior",
        "_samples",
        "_scale",
        "_solved_for",
        "_usual",
        "_wild",
    )

    def __init__(
        self,
        prior: Sequence[float],
        scale: Sequence[float],
        forget: float = 0.98,
        hold: Sequence[float] | None = None,
    ) -> None:
        size = len(prior)
        self._hold = (PRIOR_WEIGHT,) * size if hold is None else tuple(hold)
        self._coefficients = self._prior = tuple(prior)
        self._solved_for = self._prior
        self._samples = 0
        self._scale = tuple(scale)
        self._forget = forget
        # The normal equations of least squares, of scaled features: _normal = Σ w·x·xᵀ, _moments = Σ w·x·y.
        self._normal = [[0.0] * size for _ in range(size)]
        self._moments = [0.0] * size
        self._usual = 1.0  # the mean of w·xᵀx over recent samples
        self._wild = 0  # how many of the last samples in a row were wild

    @property
    def coefficients(self) -> tuple[float, ...]:
        """One for each feature."""
        return self._coefficients

    @property
    def samples(self) -> int:
        """How many were learned from."""
        return self._samples

    def adopt(self, coefficients: Sequence[float]) -> None:
        """Begin with what was learned elsewhere; does nothing after the first sample."""
        if not self._samples:
            self._coefficients = self._prior = tuple(coefficients)

    def predict(self, x: Sequence[float]) -> float:
        """Return the predicted ``y`` of the features ``x``."""
        return sum(c * value for c, value in zip(self._coefficients, x, strict=True))

    def learn(self, x: Sequence[float], y: float, prior: Sequence[float] | None = None) -> None:
        """Learn from a sample; ``prior`` has the coefficients to prefer where samples say nothing.

        By default those that it began with. What is no number, or beyond all numbers when put together, is no
        sample.
        """
        expected = self.predict(x)
        scaled = [value / scale for value, scale in zip(x, self._scale, strict=True)]
        square = sum(value * value for value in scaled)
        if not (math.isfinite(expected) and math.isfinite(square) and math.isfinite(y)):
            return
        self._samples += 1
        upper = max(expected, _MIN_PREDICTION)
        self._wild = 0 if expected <= _WILD * y and y <= _WILD * upper else self._wild + 1
        if 0 < self._wild <= _MAX_WILD:
            return
        y = min(max(y, expected / MAX_SURPRISE), MAX_SURPRISE * upper)
        # Errors grow with the work, so a large prefill would otherwise outweigh many small ones.
        weight = 1.0 / (1.0 + sum(scaled))
        most = MAX_SURPRISE * max(self._usual, _MIN_WEIGHT)
        if weight * square > most:
            weight = most / square
        self._usual += _RECENT * (weight * square - self._usual)
        for i, (row, xi) in enumerate(zip(self._normal, scaled, strict=True)):
            for j, xj in enumerate(scaled):
                row[j] = row[j] * self._forget + weight * xi * xj
            self._moments[i] = self._moments[i] * self._forget + weight * xi * y
        if self._samples <= _SOLVE_EACH_UNTIL or self._samples % _SOLVE_EVERY == 0:
            self._solve_for(self._prior if prior is None else tuple(prior))

    def refit(self, prior: Sequence[float]) -> None:
        """Prefer other coefficients where its samples say nothing; does nothing before the first sample."""
        if self._samples and self._solved_for != (preferred := tuple(prior)):
            self._solve_for(preferred)

    def _solve_for(self, prior: tuple[float, ...]) -> None:
        self._solved_for = prior
        self._coefficients = self._solve([p * s for p, s in zip(prior, self._scale, strict=True)])

    def _solve(self, prior: Sequence[float]) -> tuple[float, ...]:
        """Return the coefficients; negative ones are set to zero, one by one, the worst first."""
        used, hold = list(range(len(prior))), self._hold
        while True:
            matrix = [[self._normal[i][j] + (hold[i] if i == j else 0.0) for j in used] for i in used]
            right = [self._moments[i] + hold[i] * prior[i] for i in used]
            solution = dict(zip(used, _eliminate(matrix, right), strict=True))
            worst = min(solution, key=solution.__getitem__)
            if solution[worst] >= 0.0 or len(used) == 1:
                return tuple(max(0.0, solution.get(i, 0.0)) / s for i, s in enumerate(self._scale))
            used.remove(worst)


def _eliminate(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Return the solution of ``matrix * x = right``; changes both arguments.

    Gaussian elimination without pivoting, which the positive definite matrices here do not need.
    """
    size = len(right)
    for i in range(size):
        for k in range(i + 1, size):
            factor = matrix[k][i] / matrix[i][i]
            for j in range(i, size):
                matrix[k][j] -= factor * matrix[i][j]
            right[k] -= factor * right[i]
    for i in reversed(range(size)):
        right[i] = (right[i] - sum(matrix[i][j] * right[j] for j in range(i + 1, size))) / matrix[i][i]
    return right
