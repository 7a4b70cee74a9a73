"""The fleet in virtual time: repeatable, plausible, and it always ends."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from vllm_pd_scheduler.config import PRESETS
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.models import InstanceRole
from vllm_pd_scheduler.replay.fleet import FleetSpec, run_variant
from vllm_pd_scheduler.replay.job import TARGET, Conditions, Job
from vllm_pd_scheduler.replay.result import RequestResult, RunResult, summary
from vllm_pd_scheduler.replay.search import find_rate
from vllm_pd_scheduler.replay.trace import Trace, TraceRequest, read_trace
from vllm_pd_scheduler.replay.variant import LOWER_BOUND, Variant, parse_variant, variant_names
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.strategies.least_load import LeastLoad

FLEET = FleetSpec(3, 3, seed=5)
BLOCK = 512


def synthetic(count: int, rate: float, seed: int = 1) -> Trace:
    """Poisson arrivals; a few system prompts that are shared, and prompts of very unequal length."""
    draw = Random(seed)
    now, requests = 0.0, []
    for number in range(count):
        shared, own = draw.randrange(4), draw.choice((1, 2, 4, 16))
        blocks = (shared + 1, (shared + 1) * 100, *(10_000 + 100 * number + i for i in range(own)))
        requests.append(TraceRequest(now, len(blocks) * BLOCK + 7, draw.randrange(1, 120), blocks))
        now += draw.expovariate(rate)
    return Trace(requests, BLOCK)


TRACE = synthetic(120, 6.0)


def run(text: str, trace: Trace = TRACE, fleet: FleetSpec = FLEET) -> RunResult:
    return run_variant(parse_variant(text), trace, fleet, lambda finished: None)


def same(a: RunResult, b: RunResult) -> bool:
    """Equal in all but the wall time."""
    return replace(a, seconds=0.0) == replace(b, seconds=0.0)


def mean_ttft(found: RunResult) -> float:
    spread = summary(found, 5.0, 0.05).ttft
    assert spread is not None
    return spread.mean


@pytest.mark.parametrize("name", ["power_of_two", "random", "llm_d", "predicted_latency+late_binding"])
def test_a_run_can_be_repeated(name: str) -> None:
    first = run(name)
    assert same(first, run(name))
    assert not same(first, run(name, fleet=replace(FLEET, seed=6)))


@pytest.mark.parametrize("name", variant_names())
def test_every_request_ends_once_and_its_times_make_sense(name: str) -> None:
    told: list[int] = []
    found = run_variant(parse_variant(name), TRACE, FLEET, told.append)
    assert told[-1] == len(TRACE.requests) == len(found.results)
    for asked, result in zip(TRACE.requests, found.results, strict=True):
        assert (result.arrival, result.prompt_tokens) == (asked.arrival, asked.prompt_tokens)
        assert result.reason is None
        assert result.ttft is not None
        assert result.finished is not None
        assert 0 < result.ttft <= result.finished - result.arrival
        assert (result.tpot is None) == (asked.output_tokens == 1)
        assert 0 <= result.cached_tokens < result.prompt_tokens
    assert all(0 <= share <= 1 for share in (*found.prefill_busy.values(), *found.decode_busy.values()))
    assert {sample.instance for sample in found.samples} >= {*found.prefill_busy, *found.decode_busy}


class Broken(LeastLoad):
    """Cannot choose a prefill instance."""

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        if endpoints[0].instance.role is InstanceRole.PREFILL:
            raise RuntimeError("odd")
        return super().rank(endpoints, request, count)


def test_a_strategy_that_fails_is_told_of_and_replaced() -> None:
    found = run(f"{__name__}:Broken")
    assert summary(found, 5.0, 0.05).strategy_failures == len(TRACE.requests)
    expected = run("least_load")
    assert (found.results, expected.strategy_failures) == (expected.results, 0)


@pytest.mark.parametrize("name", variant_names())
def test_ids_that_name_a_blocks_own_content(name: str, tmp_path: Path) -> None:
    """One may come again in a prompt, and behind another beginning."""
    draw = Random(3)
    path = tmp_path / "trace.jsonl"
    with path.open("w") as file:
        for at in range(60):
            ids = [draw.randrange(4) for _ in range(draw.randrange(1, 9))]
            row = {"timestamp": 20 * at, "input_length": 512 * len(ids), "output_length": 5, "hash_ids": ids}
            print(json.dumps(row), file=file)
    found = run(name, read_trace(path))
    assert all(result.reason is None for result in found.results)


def test_looking_is_better_than_chance() -> None:
    assert mean_ttft(run("least_load+health_check_interval=0.1")) < mean_ttft(run("random"))
    assert mean_ttft(run("predicted_latency")) < mean_ttft(run("random"))


def short_prompts(count: int, rate: float) -> Trace:
    """Poisson arrivals of prompts that cost an engine little more than its steps do; nothing is shared."""
    draw, now, requests = Random(3), 0.0, []
    for _ in range(count):
        requests.append(TraceRequest(now, draw.randrange(16, 400), draw.randrange(1, 40)))
        now += draw.expovariate(rate)
    return Trace(requests, BLOCK)


@pytest.mark.parametrize("trace", [TRACE, short_prompts(1500, 220.0)], ids=["long", "short"])
def test_nobody_is_better_than_the_lower_bound(trace: Trace) -> None:
    bound = mean_ttft(run(LOWER_BOUND, trace))
    for name in variant_names():
        if name in PRESETS:
            name += "+disaggregation=always"  # the bound has no prefills on D
        assert bound <= mean_ttft(run(name, trace)), name


def test_settings() -> None:
    assert parse_variant(" least_load + late_binding ") == Variant(
        " least_load + late_binding ", "least_load", {"late_binding": True}
    )
    variant = parse_variant("slo+health_check_interval=1+ttft_slo=0.5+session_header=x-a")
    assert variant.settings == {"health_check_interval": 1, "ttft_slo": 0.5, "session_header": "x-a"}
    often, rarely = run("least_load+health_check_interval=0.1"), run("least_load+health_check_interval=30")
    assert not same(replace(often, strategy=""), replace(rarely, strategy=""))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "fastest",
            r"unknown strategy 'fastest'; choose from round_robin, .*lower_bound, or 'package.module:Class'$",
        ),
        ("no.such:Thing", r"strategy 'no.such:Thing' cannot be loaded: "),
        ("least_load+strategy=slo", r"^strategy: cannot be set beside least_load$"),
        ("dynamo+decode_strategy=slo", r"^decode_strategy: cannot be set beside dynamo$"),
        ("least_load+health_check_interval=0", r"^health_check_interval: "),
        ("least_load+health_check_interval=soon", r"^health_check_interval: "),
        ("least_load+late_bindin", r"late_bindin.*late_binding"),
        ("least_load+", "."),
        ("", "unknown strategy"),
        ("random+queue_size=-1", r"^queue_size: "),
        ("slo+prefill_strategy=fastest", r"^prefill_strategy: unknown strategy 'fastest'"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_variant(text)


def test_an_unknown_set_up() -> None:
    with pytest.raises(ValueError, match="no-such"):
        FleetSpec(1, 1, "no-such")


@pytest.mark.parametrize("name", ["least_load", "predicted_latency+late_binding", LOWER_BOUND])
def test_what_is_too_long_for_the_engine_is_rejected(name: str) -> None:
    huge = 50_000_000
    requests = [
        TraceRequest(0.0, huge, 5),
        TraceRequest(0.1, 1000, 5),
        TraceRequest(0.2, 1000, huge),
        TraceRequest(0.3, 1000, 5),
    ]
    found = run(name, Trace(requests, BLOCK))
    assert [each.reason for each in found.results] == ["too_long", None, "too_long", None]
    assert found.results[0].ttft is found.results[2].ttft is found.results[0].finished is None


def test_who_waits_too_long_is_rejected_and_the_run_ends() -> None:
    for settings, reason in (("queue_timeout=0.2", "queue_timeout"), ("queue_size=1", "queue_full")):
        found = run(f"least_load+max_waiting=1+{settings}", synthetic(80, 1000.0))
        reasons = {each.reason for each in found.results}
        assert reasons == {None, reason}
        assert len(found.results) == 80


def test_of_a_burst_each_sees_those_that_stay_on_a_decode_instance() -> None:
    """They come in the same instant, and are still on their way there."""
    burst = Trace([TraceRequest(0.0, 3000, 50) for _ in range(200)], BLOCK)
    alone = [each.prefill is None for each in run("predicted_latency+disaggregation=auto", burst).results]
    assert 0 < sum(alone) < 60


def test_nothing_to_do() -> None:
    found = run("least_load", Trace([], BLOCK))
    assert (found.results, found.samples) == ([], [])
    assert set(found.prefill_busy.values()) == {0.0}


def test_a_run_that_is_given_up_ends_there() -> None:
    whole, seen = run("least_load"), []

    def three(result: RequestResult) -> bool:
        seen.append(result)
        return len(seen) == 3

    part = run_variant(parse_variant("least_load"), TRACE, FLEET, lambda finished: None, three)
    assert len(part.results) == len(seen) == 3
    assert all(result in whole.results for result in part.results)


def test_a_search_that_gives_up_runs_finds_the_same_rate() -> None:
    limits = (1.0, 0.05)
    conditions = Conditions("synthetic", len(TRACE.requests), TRACE.seconds, FLEET, 1.0, *limits)
    found = (
        Job(TRACE, conditions, True, run_variant)
        .run(parse_variant("least_load"), lambda *_: None)
        .search_result
    )

    def attainment(rate: float) -> float:
        return summary(run("least_load", TRACE.scaled(rate)), *limits).attainment

    plain = find_rate(attainment, TARGET, 1.0)
    assert found is not None
    assert (found.rate, found.attainment) == (plain.rate, plain.attainment)
    assert [rate for rate, _ in found.tried] == [rate for rate, _ in plain.tried]
