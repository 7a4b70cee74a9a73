"""A part of the load is another router's: what KV events are worth then."""

from vllm_pd_scheduler.replay.fleet import FleetSpec, run_variant
from vllm_pd_scheduler.replay.result import RunResult
from vllm_pd_scheduler.replay.trace import Trace, TraceRequest
from vllm_pd_scheduler.replay.variant import parse_variant

WHOLE = parse_variant("prefix_cache")
TOLD = parse_variant("prefix_cache+kv_events={}")


def requests(count: int = 60) -> Trace:
    """Sessions of two, each with a long prompt of its own that both share."""
    found = []
    for number in range(count):
        blocks = tuple(range(number * 64, number * 64 + 64))
        for turn in range(2):
            at = 0.3 * number + 3.0 * turn
            found.append(TraceRequest(at, 1024, 4, blocks, session=f"s{number}"))
    return Trace(sorted(found, key=lambda each: each.arrival), block_tokens=16)


def run(variant: object, foreign: float, seed: int = 0) -> RunResult:
    spec = FleetSpec(2, 1, seed=seed, realistic=True, foreign=foreign)
    return run_variant(variant, requests(), spec, lambda _: None)  # type: ignore[arg-type]


def test_only_ones_own_requests_are_in_the_results() -> None:
    assert len(run(WHOLE, 0.0).results) == 120
    ours = run(WHOLE, 0.5).results
    assert 20 < len(ours) < 100
    assert len(ours) % 2 == 0, "a session is one router's"
    assert all(each.reason is None for each in ours)


def test_the_same_ones_for_each_variant() -> None:
    arrivals = [[each.arrival for each in run(each, 0.5).results] for each in (WHOLE, TOLD)]
    assert arrivals[0] == arrivals[1]
    assert arrivals[0] != [each.arrival for each in run(WHOLE, 0.5, seed=1).results]


def test_what_an_engine_evicts_is_known() -> None:
    """Events change what the index knows, not whether requests are served."""
    told = run(TOLD, 0.0).results
    assert any(each.cached_tokens for each in told)
    assert all(each.reason is None for each in told)
