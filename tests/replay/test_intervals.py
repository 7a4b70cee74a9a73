"""Means of several runs, and how sure they are."""

import json
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from tests.replay.test_report import shown
from tests.support import fake_replay as fake
from vllm_pd_scheduler.replay.intervals import Interval, intervals, ratio
from vllm_pd_scheduler.replay.job import Job
from vllm_pd_scheduler.replay.report import as_json
from vllm_pd_scheduler.replay.trace import Trace, TraceRequest


def test_an_interval_is_students() -> None:
    found = Interval.of([1.0, 2.0, 3.0, 4.0])
    assert found is not None
    assert found.mean == 2.5
    assert found.half == pytest.approx(3.182 * 1.2909944 / 2, rel=1e-4)  # 3 degrees of freedom
    assert Interval.of([1.0]) is None


def test_it_has_the_true_mean_in_19_of_20_cases() -> None:
    draw, hits = Random(1), 0
    for _ in range(2000):
        found = Interval.of([draw.gauss(5.0, 2.0) for _ in range(5)])
        assert found is not None
        hits += found.low <= 5.0 <= found.high
    assert hits / 2000 == pytest.approx(0.95, abs=0.02)


class Source:
    """A load that is faster with each seed."""

    def trace(self, seed: int) -> Trace:
        return Trace([TraceRequest(at / seed, 100, 5) for at in range(11)])


def test_each_seed_has_a_run_and_a_load_of_its_own(job: Callable[[bool], Job]) -> None:
    plain = job(False)
    seeded = replace(plain, trace=Source().trace(7), seeds=3, source=Source())
    outcomes = [seeded.run(fake.Variant(name), lambda *_: None) for name in ("fast", "slow")]
    means = [each.ttft.mean for each in outcomes[0].repeats if each.ttft]
    assert means == pytest.approx([1.1 * seed for seed in (7, 8, 9)])
    assert outcomes[0].repeats[0] == outcomes[0].summary
    found = ratio(outcomes[1].repeats, outcomes[0].repeats)
    assert found is not None
    assert (found.mean, found.half) == pytest.approx((2.0, 0.0))
    text = shown(outcomes, seeded)
    assert "Over 3 seeds: mean ± half of the 95 % confidence interval" in text
    assert "2.00 ± 0.00" in text
    entry = json.loads(json.dumps(as_json(outcomes, seeded.conditions)))["strategies"][0]
    assert entry["intervals"]["ttft_mean"]["mean"] == pytest.approx(8.8)


def test_without_seeds_there_are_none(job: Callable[[bool], Job]) -> None:
    outcome = job(False).run(fake.Variant("fast"), lambda *_: None)
    assert outcome.repeats == ()
    assert as_json([outcome], job(False).conditions)["strategies"][0]["intervals"] is None
    assert "seeds:" not in shown([outcome], job(False))


def test_a_figure_that_one_run_lacks_has_no_interval(job: Callable[[bool], Job]) -> None:
    outcome = replace(job(False), seeds=2).run(fake.Variant("fast"), lambda *_: None)
    one, two = outcome.repeats
    found = intervals([one, replace(two, tpot=None)])
    assert found["tpot_mean"] is None
    assert found["ttft_mean"] is not None
