"""Linear regression that learns from one sample at a time: what things cost, from how long they took."""

from __future__ import annotations

import math
from collections.abc import Sequence

_PRIOR_WEIGHT = 0.01
"""Weight of the prior against one sample whose features are 1."""
OUTLIER = 5.0
"""A sample counts as at most so many times what was expected, and at least as that part of it: one hang must
not teach a slow instance. Nor does a sample weigh more than so many usual ones."""
_WILD = 25.0
"""A sample that is off by so many times does not count at all, unless more than ``_WILD_IN_A_ROW`` are."""
_WILD_IN_A_ROW = 3
_LEAST_EXPECTED = 1e-3
"""What zero coefficients expect, so that a model can leave zero again."""
_RECENT = 0.1
"""Weight of the newest sample in the mean of what samples weigh."""
_LEAST_USUAL = 1e-3
"""What a usual sample weighs at least, so that samples of nothing do not end all learning."""
_SETTLED = 32
_SOLVE_EVERY = 8
"""Solving takes 20 us, more than all the rest: once there are some samples, one more changes little."""


class OnlineRegression:
    """Weighted least squares for ``y = Σ coefficient * x``, with no coefficient below zero.

    Every sample makes those before it count ``forget`` times as much, so that the model follows a change
    within some ``1 / (1 - forget)`` samples. ``scale`` brings each feature to about 1. What the samples
    leave open is near ``prior`` (ridge regression towards it).

    No sample is believed further than ``OUTLIER`` and ``_WILD`` say, so that nonsense is forgotten as fast
    as anything else is learned.
    """

    __slots__ = ("_forget", "_moments", "_normal", "_scale", "_usual", "_wild", "coefficients", "samples")

    def __init__(self, prior: Sequence[float], scale: Sequence[float], forget: float = 0.98) -> None:
        size = len(prior)
        self.coefficients = tuple(prior)
        self.samples = 0
        self._scale = tuple(scale)
        self._forget = forget
        # The normal equations of least squares, of scaled features: _normal = Σ w·x·xᵀ, _moments = Σ w·x·y.
        self._normal = [[0.0] * size for _ in range(size)]
        self._moments = [0.0] * size
        self._usual = 1.0
        """What a sample weighs, on average over recent ones: see ``learn``."""
        self._wild = 0
        """How many of the last samples in a row were off by ``_WILD`` or more."""

    def predict(self, x: Sequence[float]) -> float:
        """Return the predicted ``y`` of the features ``x``."""
        return sum(c * value for c, value in zip(self.coefficients, x, strict=True))

    def learn(self, x: Sequence[float], y: float, prior: Sequence[float]) -> None:
        """Take a sample; ``prior`` is what to believe where the samples say nothing.

        What is no number, or beyond all numbers when put together, is no sample.
        """
        expected = self.predict(x)
        scaled = [value / scale for value, scale in zip(x, self._scale, strict=True)]
        total, square = sum(scaled), sum(value * value for value in scaled)
        if not (math.isfinite(expected) and math.isfinite(square) and math.isfinite(y)):
            return
        self.samples += 1
        upper = max(expected, _LEAST_EXPECTED)
        self._wild = 0 if expected <= _WILD * y and y <= _WILD * upper else self._wild + 1
        if 0 < self._wild <= _WILD_IN_A_ROW:
            return
        y = min(max(y, expected / OUTLIER), OUTLIER * upper)
        weight = 1.0 / (1.0 + total)  # errors grow with the work; else the big ones would decide alone
        most = OUTLIER * max(self._usual, _LEAST_USUAL)
        if weight * square > most:
            weight = most / square
        self._usual += _RECENT * (weight * square - self._usual)
        for i, (row, xi) in enumerate(zip(self._normal, scaled, strict=True)):
            for j, xj in enumerate(scaled):
                row[j] = row[j] * self._forget + weight * xi * xj
            self._moments[i] = self._moments[i] * self._forget + weight * xi * y
        if self.samples <= _SETTLED or self.samples % _SOLVE_EVERY == 0:
            self.coefficients = self._solve([p * scale for p, scale in zip(prior, self._scale, strict=True)])

    def _solve(self, prior: Sequence[float]) -> tuple[float, ...]:
        """Return the coefficients; negative ones are set to zero, one by one, the worst first."""
        used = list(range(len(prior)))
        while True:
            matrix = [[self._normal[i][j] + (_PRIOR_WEIGHT if i == j else 0.0) for j in used] for i in used]
            right = [self._moments[i] + _PRIOR_WEIGHT * prior[i] for i in used]
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
