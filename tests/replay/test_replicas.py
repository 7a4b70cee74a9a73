"""Several schedulers over one fleet in virtual time."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.replay.test_fleet import FLEET, TRACE, synthetic
from vllm_pd_scheduler.cli import app
from vllm_pd_scheduler.replay.fleet import NOTICED_S, run_variant
from vllm_pd_scheduler.replay.result import RunResult, Summary, summary
from vllm_pd_scheduler.replay.trace import Trace
from vllm_pd_scheduler.replay.variant import Sharing, parse_variant


def run(strategy: str, sharing: Sharing | None = None) -> RunResult:
    variant = parse_variant(strategy)
    variant = variant if sharing is None else variant.shared(sharing)
    return run_variant(variant, TRACE, FLEET, lambda finished: None)


def figures(strategy: str, sharing: Sharing | None = None) -> Summary:
    return summary(run(strategy, sharing), 5.0, 0.05)


@pytest.mark.parametrize("strategy", ["predicted_latency", "least_load+late_binding", "round_robin"])
@pytest.mark.parametrize(
    "sharing", [Sharing(3), Sharing(3, 0.05, 0.3), Sharing(3, None), Sharing(2, 0.0, 1.0)]
)
def test_each_request_is_answered_and_a_run_can_be_repeated(strategy: str, sharing: Sharing) -> None:
    first, second = run(strategy, sharing), run(strategy, sharing)
    assert len(first.results) == len(TRACE.requests)
    assert all(each.finished is not None for each in first.results)
    assert first.results == second.results


def test_one_scheduler_among_one_is_one_scheduler() -> None:
    assert run("predicted_latency", Sharing(1)).results == run("predicted_latency").results


def test_those_that_tell_each_other_choose_almost_as_one_would() -> None:
    one = figures("predicted_latency")
    shared, alone = figures("predicted_latency", Sharing(4)), figures("predicted_latency", Sharing(4, None))
    assert one.ttft
    assert shared.ttft
    assert alone.ttft
    assert shared.ttft.mean < alone.ttft.mean
    assert shared.ttft.mean - one.ttft.mean < (alone.ttft.mean - one.ttft.mean) / 2


def in_bursts(trace: Trace, seconds: float) -> Trace:
    """The same requests, all of each so many seconds in one instant."""
    requests = [replace(each, arrival=each.arrival // seconds * seconds) for each in trace.requests]
    return replace(trace, requests=requests)


def test_requests_of_one_instant_are_not_all_sent_to_the_same_p() -> None:
    """Schedulers that get one each can know nothing of each other when they choose."""
    trace, fleet = in_bursts(synthetic(600, 8.0), 2.0), replace(FLEET, prefill=8, decode=8)

    def mean(sharing: Sharing) -> float:
        variant = parse_variant("predicted_latency")
        variant = variant if sharing.replicas == 1 else variant.shared(sharing)
        found = summary(run_variant(variant, trace, fleet, lambda finished: None), 5.0, 0.05)
        assert found.ttft
        return found.ttft.mean

    assert mean(Sharing(4)) < 1.15 * mean(Sharing())


def test_a_label_says_what_is_shared() -> None:
    variant = parse_variant("least_load")
    kinds = Sharing(4), Sharing(4, 0.5, 0.1), Sharing(4, None), Sharing(4, dies=600.0, joins=900.5)
    labels = [variant.shared(each).label for each in kinds]
    assert labels == [
        "least_load x4 (10 ms)",
        "least_load x4 (500 ms, 0.1 lost)",
        "least_load x4 (alone)",
        "least_load x4 (10 ms, one dies at 600 s, one joins at 900.5 s)",
    ]
    assert replace(variant.shared(Sharing(4)), label="", sharing=Sharing()) == replace(variant, label="")


@pytest.mark.parametrize("late_binding", ["", "+late_binding"])
@pytest.mark.parametrize(
    "sharing", [Sharing(3, dies=8.0), Sharing(3, joins=8.0), Sharing(2, 0.02, 0.1, dies=6.0, joins=12.0)]
)
def test_one_that_dies_and_one_that_joins_lose_no_request(late_binding: str, sharing: Sharing) -> None:
    strategy = f"predicted_latency{late_binding}"
    first, second = run(strategy, sharing), run(strategy, sharing)
    assert len(first.results) == len(TRACE.requests)
    assert all(each.finished is not None for each in first.results)
    assert first.results == second.results


def test_requests_of_one_that_dies_are_prefilled_by_d_until_that_is_noticed() -> None:
    found = run("predicted_latency", Sharing(2, dies=10.0)).results
    unscheduled = [each for each in found if each.prefill is None]
    assert unscheduled
    assert all(each.arrival < 10.0 + NOTICED_S for each in unscheduled)
    assert not [each for each in run("predicted_latency", Sharing(2)).results if each.prefill is None]


@pytest.mark.parametrize("option", ["--replica-dies", "--replica-joins"])
def test_one_that_would_die_or_join_when_all_is_over(option: str, trace_file: Path) -> None:
    arguments = ["replay", "--trace", str(trace_file), "--strategies=least_load", "--prefill=1", "--decode=1"]
    ended = CliRunner().invoke(
        app, [*arguments, "--replicas=2", f"{option}=6s", "--rate=2"], env={"COLUMNS": "200"}
    )
    assert ended.exit_code == 2
    assert f"{option}: 6s: the load ends before, after 5s" in ended.stderr
