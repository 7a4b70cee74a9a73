"""One variant's job."""

from collections.abc import Callable

import pytest

from tests.support.fake_replay import Variant
from vllm_pd_scheduler.replay.job import Job, ReplayError

Make = Callable[[bool], Job]


def test_a_run(job: Make) -> None:
    told: list[tuple[float, int]] = []
    outcome = job(False).run(Variant("fast"), lambda rate, finished: told.append((rate, finished)))
    assert outcome.search_result is None
    assert outcome.summary.attainment == 1.0
    assert outcome.run.strategy == outcome.summary.strategy == "fast"
    assert (told[0], told[-1]) == ((1.0, 0), (1.0, 11))


def test_a_search_keeps_the_run_at_the_rate_that_was_asked_for(job: Make) -> None:
    rates: list[float] = []
    outcome = job(True).run(Variant("fast"), lambda rate, finished: rates.append(rate))
    found = outcome.search_result
    assert found is not None
    # The first token takes 1.1 s at the trace's rate, and more in proportion.
    assert found.rate == pytest.approx(5 / 1.1, rel=0.02)
    assert outcome.run.results[0].ttft == pytest.approx(1.1)
    assert outcome.summary.makespan == pytest.approx(10 + 1.1)
    assert list(dict.fromkeys(rates)) == [rate for rate, _ in found.tried]


def test_what_the_fleet_refuses(job: Make) -> None:
    with pytest.raises(ReplayError, match=r"^odd: a prompt is longer than the engines' memory$"):
        job(False).run(Variant("odd"), lambda rate, finished: None)
