"""Points of the last quarter of an hour, made of readings."""

from datetime import UTC, datetime
from typing import Any

import pytest

from vllm_pd_scheduler.records.series import INTERVAL_S, MAX_POINTS, Percentiles, Point, Reading, Series


def reading(**fields: Any) -> Reading:
    return Reading(**{"requests": 0, "errors": {}, "queue": 0, "in_flight": {}, **fields})


def point(*readings: Reading, seconds: float = INTERVAL_S) -> Point:
    """Return the last point of readings that come one after another."""
    series = Series()
    for number, each in enumerate(readings):
        series.add(each, 100.0 + number * seconds, 1e9 + number * seconds)
    found = series.newest
    assert found is not None
    return found


def test_the_first_reading_makes_no_point() -> None:
    series = Series()
    series.add(reading(requests=7), 1.0, 1.0)
    assert series.newest is None


def test_rates_are_of_the_time_that_has_passed() -> None:
    before = reading(requests=100, errors={"no_decode": 3, "memory": 1})
    now = reading(requests=120, errors={"no_decode": 13, "memory": 1, "cut": 5})
    found = point(before, now, seconds=10.0)
    assert found.requests_per_s == 2.0
    assert found.errors_per_s == {"no_decode": 1.0, "cut": 0.5}
    assert found.time == datetime.fromtimestamp(1e9 + 10, UTC)


def test_what_is_so_now() -> None:
    found = point(reading(queue=9), reading(queue=4, in_flight={"prefill": 2, "decode": 3}))
    assert (found.queue, found.in_flight) == (4, {"prefill": 2, "decode": 3})


def test_what_nothing_was_measured_for_is_not_zero() -> None:
    found = point(reading(), reading())
    assert (found.ttft_s, found.tpot_s, found.prefix_hit_share) == (None, None, None)
    idle = reading(ttft=[(1.0, 5.0), (float("inf"), 5.0)], prompt_tokens=10.0, cached_tokens=5.0)
    found = point(idle, idle)
    assert (found.ttft_s, found.prefix_hit_share) == (None, None)


def test_time_to_first_token_is_that_of_the_requests_since() -> None:
    before = reading(ttft=[(0.1, 1000.0), (0.2, 1000.0), (0.4, 1000.0), (float("inf"), 1000.0)])
    now = reading(ttft=[(0.1, 1050.0), (0.2, 1090.0), (0.4, 1098.0), (float("inf"), 1100.0)])
    assert point(before, now).ttft_s == Percentiles(0.1, 0.2, 0.4)


def test_a_bucket_is_taken_for_evenly_filled() -> None:
    now = reading(ttft=[(0.1, 0.0), (0.2, 100.0), (float("inf"), 100.0)])
    assert point(reading(), now).ttft_s == Percentiles(0.15, 0.19, 0.199)


def test_time_per_token_counts_as_often_as_requests_run() -> None:
    now = reading(tpot=[(0.02, 95.0), (0.5, 5.0), (9.0, 0.0)])
    assert point(reading(), now).tpot_s == Percentiles(0.02, 0.02, 0.5)


def test_prefix_hits() -> None:
    before = reading(prompt_tokens=1000.0, cached_tokens=900.0)
    now = reading(prompt_tokens=1200.0, cached_tokens=950.0)
    assert point(before, now).prefix_hit_share == 0.25


@pytest.mark.parametrize("monotonic", [100.0, 99.0])
def test_no_time_has_passed(monotonic: float) -> None:
    series = Series()
    series.add(reading(), 100.0, 1.0)
    series.add(reading(), monotonic, 2.0)
    assert series.newest is None


def test_the_oldest_are_forgotten() -> None:
    series = Series()
    for number in range(MAX_POINTS + 10):
        series.add(reading(requests=number), float(number), float(number))
    assert len(series.points) == MAX_POINTS
    assert series.points[0].time == datetime.fromtimestamp(10, UTC)
