"""The search for the highest rate, on curves that are known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_scheduler.replay.search import find_rate


@given(st.floats(min_value=0.002, max_value=500), st.floats(min_value=0.5, max_value=2))
def test_a_step_is_found_within_the_precision(edge: float, start: float) -> None:
    found = find_rate(lambda rate: 1.0 if rate <= edge else 0.5, start=start)
    assert found.rate is not None
    assert found.rate <= edge < found.rate * 1.0201
    assert len(found.tried) <= 17
    assert not found.open_ended


def test_the_attainment_is_that_of_the_rate() -> None:
    found = find_rate(lambda rate: 1 / (1 + rate / 100), target=0.9, precision=0.001)
    assert found.rate == pytest.approx(100 / 9, rel=0.001)
    assert found.attainment == 1 / (1 + found.rate / 100)
    assert found.tried[:3] == [(rate, 1 / (1 + rate / 100)) for rate in (1.0, 2.0, 4.0)]
    assert (found.rate, found.attainment) in found.tried


def test_a_curve_that_is_not_quite_monotone() -> None:
    """Ripples near the edge move the result no further than they reach themselves."""

    def run(rate: float) -> float:
        return 0.95 + 0.1 * (3 - rate) + 0.01 * math.sin(60 * rate)

    found = find_rate(run)
    assert found.rate is not None
    assert found.rate == pytest.approx(3.0, abs=0.12)
    assert found.attainment >= 0.95


def test_no_rate_passes() -> None:
    found = find_rate(lambda rate: 0.9 - rate / 100, doublings=4)
    assert (found.rate, found.open_ended) == (None, False)
    assert [rate for rate, _ in found.tried] == [1, 0.5, 0.25, 0.125, 0.0625]
    assert found.attainment == found.tried[-1][1]


def test_every_rate_passes() -> None:
    found = find_rate(lambda rate: 1.0, start=0.5, doublings=3)
    assert (found.rate, found.open_ended, found.attainment) == (4.0, True, 1.0)


def test_what_makes_no_sense() -> None:
    for start, precision in ((0.0, 0.1), (-1.0, 0.1), (1.0, 0.0), (float("nan"), 0.1)):
        with pytest.raises(ValueError, match="above 0"):
            find_rate(lambda rate: 1.0, start=start, precision=precision)
