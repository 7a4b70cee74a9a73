"""Linear regression that learns from one sample at a time: what things cost, from how long they took."""

from __future__ import annotations

from collections.abc import Sequence

_PRIOR_WEIGHT = 0.01
"""Weight of the prior against one sample whose features are 1.

A choice: small enough that a few samples override it, large enough that it decides where they say nothing,
and that the equations always have one solution.
"""
_MAX_SURPRISE = 5.0
"""A sample counts as at most so many times its prediction, so that one hang does not count as slowness.

An instance that has really become slower is still learned, in several steps.
"""
_MIN_SAMPLES = 8
"""Samples before predictions bound others in this way (a choice): the prior may be far off."""
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
    """

    __slots__ = ("_forget", "_moments", "_normal", "_scale", "coefficients", "samples")

    def __init__(self, prior: Sequence[float], scale: Sequence[float], forget: float = 0.98) -> None:
        size = len(prior)
        self.coefficients = tuple(prior)
        self.samples = 0
        self._scale = tuple(scale)
        self._forget = forget
        # The normal equations of least squares, of scaled features: _normal = Σ w·x·xᵀ, _moments = Σ w·x·y.
        self._normal = [[0.0] * size for _ in range(size)]
        self._moments = [0.0] * size

    def predict(self, x: Sequence[float]) -> float:
        """Return the predicted ``y`` of the features ``x``."""
        return sum(c * value for c, value in zip(self.coefficients, x, strict=True))

    def learn(self, x: Sequence[float], y: float, prior: Sequence[float]) -> None:
        """Learn from a sample; ``prior`` has the coefficients to prefer where samples say nothing."""
        expected = self.predict(x)
        if self.samples >= _MIN_SAMPLES and expected > 0.0:
            y = min(y, _MAX_SURPRISE * expected)
        scaled = [value / scale for value, scale in zip(x, self._scale, strict=True)]
        # Errors grow with the work, so a large prefill would otherwise outweigh many small ones.
        weight = 1.0 / (1.0 + sum(scaled))
        for i, (row, xi) in enumerate(zip(self._normal, scaled, strict=True)):
            for j, xj in enumerate(scaled):
                row[j] = row[j] * self._forget + weight * xi * xj
            self._moments[i] = self._moments[i] * self._forget + weight * xi * y
        self.samples += 1
        if self.samples <= _SOLVE_EACH_UNTIL or self.samples % _SOLVE_EVERY == 0:
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
