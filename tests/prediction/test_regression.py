"""The model that learns as it goes: what it finds, and what it does not fall for."""

import random
import unittest

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.prediction.regression import OnlineRegression

SCALE = (1.0, 1000.0)
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

    def test_the_prior_decides_what_no_sample_tells(self) -> None:
        """All samples are of one size, so that any mixture of the two terms would do."""
        for prior in ((0.1, 0.0), (0.0, 1e-4)):
            with self.subTest(prior):
                fit = OnlineRegression(prior, SCALE)
                for _ in range(100):
                    fit.learn((1.0, 1000.0), 0.1, prior)
                for found, expected, scale in zip(fit.coefficients, prior, SCALE, strict=True):
                    self.assertAlmostEqual(found * scale, expected * scale, delta=0.001)

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
