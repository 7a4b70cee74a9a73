"""The model that learns as it goes: what it finds, and what it does not fall for."""

import math
import random
import unittest

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.prediction.regression import OnlineRegression

SCALE = (1.0, 1000.0)
extreme = st.one_of(
    st.sampled_from([0.0, 1e-300, 1.0, 1e6, 1e9, 1e15, 1e150, 1e200, 1e300, 1.7e308, math.inf, math.nan]),
    st.floats(0, 1e12),
)
PRIOR = (0.05, 3e-5)


def new(*prior: float) -> OnlineRegression:
    return OnlineRegression(prior, SCALE)


class OnlineRegressionTest(unittest.TestCase):
    def setUp(self) -> None:
        self.draw = random.Random(3)

    def teach(self, fit: OnlineRegression, a: float, b: float, times: int, prior: tuple[float, ...]) -> None:
        for _ in range(times):
            x = self.draw.uniform(1, 4000)
            fit.learn((1.0, x), a + b * x, prior)

    def assertKnows(self, fit: OnlineRegression, a: float, b: float) -> None:
        self.assertAlmostEqual(fit.coefficients[0], a, delta=0.08 * a)
        self.assertAlmostEqual(fit.coefficients[1], b, delta=0.08 * b)

    def test_before_the_first_sample_it_is_the_prior(self) -> None:
        self.assertEqual(new(0.5, 0.25).predict((1.0, 2.0)), 1.0)

    @given(a=st.floats(0.01, 0.1), b=st.floats(1e-5, 1e-3), seed=st.integers(0, 999))
    @settings(derandomize=True, deadline=None, max_examples=50)
    def test_it_finds_what_gave_the_samples(self, a: float, b: float, seed: int) -> None:
        self.draw.seed(seed)
        prior = (2 * a, b / 2)
        fit = OnlineRegression(prior, SCALE)
        self.teach(fit, a, b, 300, prior)
        self.assertKnows(fit, a, b)

    def test_it_follows_a_change(self) -> None:
        for factor in (0.1, 3.0, 20.0):
            with self.subTest(factor):
                fit = new(*PRIOR)
                self.teach(fit, 0.02, 1e-4, 200, PRIOR)
                self.teach(fit, 0.02 * factor, 1e-4 * factor, 400, PRIOR)
                self.assertKnows(fit, 0.02 * factor, 1e-4 * factor)

    def test_it_leaves_zero_again(self) -> None:
        """An engine whose first answers took no time that could be measured."""
        fit = new(0.0, 0.0)
        for _ in range(20):
            fit.learn((1.0, 1000.0), 0.0, (0.0, 0.0))
        self.assertEqual(fit.predict((1.0, 1000.0)), 0.0)
        self.teach(fit, 0.02, 1e-4, 300, (0.0, 0.0))
        self.assertKnows(fit, 0.02, 1e-4)

    def test_one_hang_does_not_spoil_it(self) -> None:
        fit = new(*PRIOR)
        self.teach(fit, 0.02, 1e-4, 100, PRIOR)
        before = fit.predict((1.0, 2000.0))
        fit.learn((1.0, 2000.0), 120.0, PRIOR)
        self.assertLess(fit.predict((1.0, 2000.0)), 1.5 * before)

    def sane(self) -> list[tuple[tuple[float, float], float]]:
        return [((1.0, x), 0.02 + 1e-4 * x) for x in (self.draw.uniform(1, 4000) for _ in range(300))]

    @given(
        before=st.integers(0, 200),
        lies=st.lists(
            st.tuples(st.tuples(st.floats(1, 8) | st.just(math.nan), extreme), extreme),
            min_size=1,
            max_size=3,
        ),
    )
    @settings(derandomize=True, deadline=None, max_examples=60)
    def test_lies_are_forgotten_as_fast_as_the_rest(
        self, before: int, lies: list[tuple[tuple[float, float], float]]
    ) -> None:
        """Whatever they are, among sane samples or as the first, some time later hardly anything is left."""
        self.draw.seed(before)
        fit = new(*PRIOR)
        for x, y in self.sane()[:before]:
            fit.learn(x, y, PRIOR)
        for x, y in lies:
            fit.learn(x, y, PRIOR)
            self.assertTrue(all(math.isfinite(c) and c >= 0.0 for c in fit.coefficients), fit.coefficients)
        for x, y in self.sane():
            fit.learn(x, y, PRIOR)
        for x in (100.0, 1000.0, 4000.0):
            self.assertAlmostEqual(fit.predict((1.0, x)), 0.02 + 1e-4 * x, delta=0.2 * (0.02 + 1e-4 * x))

    def test_one_lie_changes_little(self) -> None:
        for x, y in (((1.0, 1e199), 0.02), ((1.0, 1e9), 1e-9), ((1.0, 1.0), 1e300), ((1.0, 4000.0), 0.0)):
            with self.subTest(x=x, y=y):
                fit = new(*PRIOR)
                self.teach(fit, 0.02, 1e-4, 100, PRIOR)
                fit.learn(x, y, PRIOR)
                self.teach(fit, 0.02, 1e-4, 8, PRIOR)  # until it solves again
                for size in (100.0, 1000.0, 4000.0):
                    honest = 0.02 + 1e-4 * size
                    self.assertTrue(honest / 3 < fit.predict((1.0, size)) < honest * 3)

    def test_the_prior_decides_what_no_sample_tells(self) -> None:
        """All samples are of one size, so that any mixture of the two terms would do."""
        for prior in ((0.1, 0.0), (0.0, 1e-4)):
            with self.subTest(prior):
                fit = OnlineRegression(prior, SCALE)
                for _ in range(100):
                    fit.learn((1.0, 1000.0), 0.1, prior)
                for found, expected, scale in zip(fit.coefficients, prior, SCALE, strict=True):
                    self.assertAlmostEqual(found * scale, expected * scale, delta=0.001)

    def test_what_was_learned_elsewhere_outlives_the_first_sample(self) -> None:
        fit = OnlineRegression(PRIOR, SCALE)
        fit.adopt((0.01, 2e-5))
        fit.learn((1.0, 1000.0), 0.03)
        self.assertAlmostEqual(fit.predict((1.0, 150_000.0)), 3.01, delta=0.01)

    def test_of_one_size_it_still_learns_the_sum(self) -> None:
        fit = new(0.02, 1e-4)
        for _ in range(100):
            fit.learn((1.0, 1000.0), 0.5, (0.02, 1e-4))
        self.assertAlmostEqual(fit.predict((1.0, 1000.0)), 0.5, delta=0.005)

    @given(
        st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e9), st.floats(0, 1e4)), min_size=1, max_size=60)
    )
    @settings(derandomize=True, deadline=None, max_examples=150)
    def test_no_coefficient_is_ever_negative(self, samples: list[tuple[float, float, float]]) -> None:
        fit = OnlineRegression((0.02, 1e-4, 1e-9), (1.0, 1024.0, 1e7))
        for tokens, pairs, seconds in samples:
            fit.learn((1.0, tokens, pairs), seconds, (0.02, 1e-4, 1e-9))
            self.assertTrue(all(c >= 0.0 for c in fit.coefficients), fit.coefficients)


if __name__ == "__main__":
    unittest.main()
