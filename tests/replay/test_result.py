"""The figures of a run, against values worked out by hand."""

import math

import pytest

from vllm_pd_scheduler.replay.result import RequestResult, RunResult, Spread, percentile, summary


def answered(arrival: float, ttft: float, tpot: float | None, prefill: str | None = "p0") -> RequestResult:
    return RequestResult(arrival, 100, 11, 20, ttft, tpot, prefill, "d0", arrival + ttft + 10 * (tpot or 0))


REJECTED = RequestResult(3.0, 100, 11, reason="queue_full")


class TestPercentile:
    def test_between_two_ranks(self) -> None:
        assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
        assert percentile([1.0, 2.0], 0.99) == pytest.approx(1.99)
        assert percentile([7.0], 0.9) == 7.0
        assert [percentile([1.0, 5.0, 9.0], share) for share in (0.0, 0.5, 1.0)] == [1, 5, 9]
        with pytest.raises(ValueError, match="no values"):
            percentile([], 0.5)

    def test_spread_does_not_need_order(self) -> None:
        assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 2.0, pytest.approx(2.8), pytest.approx(2.98))
        assert Spread.of([]) is None


class TestAttainment:
    @pytest.mark.parametrize(
        ("result", "met"),
        [
            (answered(0, 5.0, 0.05), True),
            (answered(0, 5.01, 0.05), False),
            (answered(0, 5.0, 0.051), False),
            (answered(0, 5.0, None), True),  # one token: there is no further one to be late
            (REJECTED, False),
            (RequestResult(0.0, 100, 11, ttft=1.0), False),  # never finished
        ],
    )
    def test_one_request(self, result: RequestResult, met: bool) -> None:
        assert result.meets(5.0, 0.05) is met

    def test_rejected_requests_count_as_missed(self) -> None:
        found = summary(RunResult("s", [answered(0, 1.0, 0.01), REJECTED], {"p0": 1.0}, {}), 5.0, 0.05)
        assert found.attainment == 0.5
        assert found.rejected == {"queue_full": 1}
        assert found.ttft == Spread(1.0, 1.0, 1.0, 1.0)


class TestSummary:
    def test_all_figures(self) -> None:
        results = [
            answered(1.0, 1.0, 0.01, "p0"),
            answered(2.0, 3.0, 0.03, "p0"),
            answered(2.5, 1.0, None, "p1"),
            REJECTED,
        ]
        run = RunResult("s", results, {"p0": 0.5, "p1": 0.25, "p2": 0.0}, {"d0": 0.4}, [], 0.125)
        found = summary(run, 2.0, 0.05)
        assert (found.strategy, found.requests, found.seconds) == ("s", 4, 0.125)
        assert found.ttft == Spread(
            pytest.approx(5 / 3), 1.0, pytest.approx(2.6), pytest.approx(1 + 2 * 0.98)
        )
        assert found.tpot is not None
        assert found.tpot.mean == pytest.approx(0.02)
        assert found.attainment == 0.5
        assert found.prefix_hits == pytest.approx(0.2)
        # 160, 80 and 0 tokens computed: mean 80, deviations 80, 0 and 80
        assert found.imbalance_max == 2.0
        assert found.imbalance_cv == pytest.approx(math.sqrt(2 / 3))
        assert (found.prefill_busy, found.decode_busy) == (0.25, 0.4)
        assert found.makespan == pytest.approx(2.0 + 3.0 + 0.3 - 1.0)

    def test_an_instance_that_is_gone_still_counts(self) -> None:
        run = RunResult("s", [answered(0, 1.0, 0.01, "left"), answered(0, 1.0, 0.01)], {"p0": 1.0}, {})
        assert summary(run, 5.0, 0.05).imbalance_max == 1.0

    def test_prefills_on_decode_instances_are_not_the_prefill_roles(self) -> None:
        run = RunResult("s", [answered(0, 1.0, 0.01, None)], {"p0": 0.0}, {"d0": 1.0})
        found = summary(run, 5.0, 0.05)
        assert (found.imbalance_max, found.imbalance_cv, found.attainment) == (None, None, 1.0)

    def test_nothing_served(self) -> None:
        for results in ([], [REJECTED]):
            found = summary(RunResult("s", results, {}, {}), 5.0, 0.05)
            assert (found.ttft, found.tpot, found.prefix_hits, found.prefill_busy) == (None,) * 4
            assert (found.attainment, found.makespan) == (0.0, 0.0)
