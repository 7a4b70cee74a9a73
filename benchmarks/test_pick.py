"""What picks cost: the scheduler's choices for a prompt of 25 blocks, the prefix index being full."""

import itertools
import random
from typing import Any

import pytest

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint, Reservation
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole, MetricsSnapshot, PDInstance
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.scheduler import Scheduler

P, D = InstanceRole.PREFILL, InstanceRole.DECODE
NAMES = (
    "round_robin", "least_load", "weighted", "power_of_two",
    "prefix_cache", "session", "predicted_latency", "slo",
)  # fmt: skip
BLOCKS = 25
SHARED = 8
"""Blocks that all instances have: a system prompt."""
KEPT = 2000
"""Blocks that each instance keeps."""
ROUNDS = 500

draw = random.Random(1)


def chain(length: int, start: tuple[int, ...] = ()) -> tuple[int, ...]:
    return start + tuple([draw.getrandbits(60) for _ in range(length - len(start))])


@pytest.fixture(scope="module", params=[16, 250, 1000], ids="{}-of-a-role".format)
def fleet(request: pytest.FixtureRequest) -> tuple[Registry, tuple[int, ...]]:
    """A busy fleet: every instance scraped, with requests of ours and a full cache. And a prompt's blocks."""
    registry, start = Registry(), chain(SHARED)
    for role in PD_ROLES:
        for number in range(request.param):
            host = f"10.0.{number >> 8}.{number & 255}"
            endpoint = registry.add(PDInstance(f"{role}-{number}", role, host, 8000))
            registry.probed(endpoint, None)
            endpoint.holder.resize(KEPT)
            for _ in range(KEPT // 400 + 1):
                endpoint.holder.store(chain(400, start))
            for _ in range(draw.randrange(4)):
                prompt = RequestContext("/", prompt_tokens=draw.randrange(1, 9000), output_tokens=200.0)
                registry.reserve(endpoint, prompt)
            metrics = MetricsSnapshot(0.0, 3.0, draw.random(), 0.1, 0.3, KEPT * 256.0)
            registry.scraped(endpoint, metrics, endpoint.in_flight, endpoint.tokens)
    blocks = chain(BLOCKS, start)
    next(iter(registry)).holder.store(blocks)
    return registry, blocks


def requests(blocks: tuple[int, ...]) -> Any:
    """Requests of many sessions, one a millisecond."""
    for number in itertools.count(1):
        yield RequestContext(
            "/v1/completions", prompt_tokens=6400.0, output_tokens=200.0, blocks=blocks, block_tokens=256.0,
            session=f"somebody-{number}", ttft_slo=1.0, tpot_slo=0.03, now=number / 1000,
        )  # fmt: skip


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param({}, id="plain"),
        pytest.param({"max_waiting": 4, "max_in_flight_tokens": 12_000}, id="limited"),
        pytest.param({"exclude": 1}, id="retried"),
        pytest.param({"explained": 1}, id="explained"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_two_picks(
    benchmark: Any, fleet: tuple[Registry, tuple[int, ...]], name: str, setting: dict[str, int]
) -> None:
    """As the router picks: one P, but a D with three more that Envoy may try. Each request changes the load.

    ``limited``: it looks first whether there is room. ``retried``: an instance of each role was tried before.
    ``explained``: it is noted how both were made, as for each request's decision.
    """
    registry, blocks = fleet
    for watchers in registry._watchers.values():
        watchers.clear()  # of the schedulers before
    limits = {key: value for key, value in setting.items() if key.startswith("max")}
    scheduler = Scheduler(SchedulerConfig(strategy=name, **limits), registry, seed=1)
    exclude = {role: registry.endpoints(role)[: setting.get("exclude", 0)] for role in PD_ROLES}
    asked, explained = requests(blocks), "explained" in setting
    picked: list[Endpoint] = []
    claims: list[Reservation] = []

    def setup() -> tuple[tuple[RequestContext], dict[str, Any]]:
        request = next(asked)
        for claim in claims:
            claim.release()
        claims[:] = [registry.reserve(endpoint, request) for endpoint in picked]
        return (request,), {}

    def two_picks(request: RequestContext) -> tuple[list[Endpoint], list[Endpoint]]:
        if limits:
            for role in (D, P):
                scheduler.has_room(role, request.now)
        prefill = scheduler.pick(P, request, exclude=exclude[P])
        if explained:
            scheduler.explain(P, request)
        decode = scheduler.pick(D, request, count=4, exclude=exclude[D])
        if explained:
            scheduler.explain(D, request)
        picked[:] = prefill[0], decode[0]
        return prefill, decode

    prefill, decode = benchmark.pedantic(two_picks, setup=setup, rounds=ROUNDS, warmup_rounds=20)
    assert len(prefill) == 1
    assert 1 <= len(decode) <= 4, "with limits the others may be full"
