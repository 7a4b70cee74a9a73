"""What picks cost: the scheduler's choices for a prompt of 25 blocks, the prefix index being full.

``ROUNDS`` of each are measured.
"""

import itertools
import os
import random
from typing import Any

import pytest

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole, MetricsSnapshot, PDInstance
from vllm_pd_scheduler.replicas import FleetKey, Replica
from vllm_pd_scheduler.replicas.message import Message, Prefill, Share
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
ROUNDS = int(os.environ.get("ROUNDS", "500"))

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
                registry.work.reserve(endpoint, prompt)
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


class Others:
    """Other replicas, each with a request and a prefill on every instance."""

    def __init__(self, registry: Registry, count: int) -> None:
        self.key = FleetKey("fleet")
        self.replica = Replica(registry, "a", self.key)
        self.registry, self.count, self.messages = registry, count, 0
        ids = [endpoint.id for endpoint in registry]
        prefills = [place for place, endpoint in enumerate(registry) if endpoint.instance.role is P]
        for _ in range(count):
            self._hear(
                0.0,
                summary=True,
                endpoints=ids,
                shares=[Share(endpoint=place, requests=1, tokens=1000) for place in range(len(ids))],
                prefills=[
                    Prefill(number=number, endpoint=place, prompt=1000)
                    for number, place in enumerate(prefills, 1)
                ],
            )

    def tell(self, now: float) -> None:
        """Have one of them send a request, and hear of it; and tell what we have sent."""
        ids = [draw.choice(self.registry.endpoints(role)).id for role in PD_ROLES]
        shares = [Share(endpoint=place, requests=1 + self.messages % 2, tokens=2000) for place in range(2)]
        self._hear(now, summary=False, endpoints=ids, shares=shares)
        self.replica.publish(now)

    def leave(self) -> None:
        """Take away what is counted of them."""
        self.replica.publish(1e9)
        self.registry.journal = None
        assert not any(endpoint.elsewhere for endpoint in self.registry)

    def _hear(self, now: float, **told: Any) -> None:
        self.messages += 1
        name = f"other-{self.messages % self.count}"
        message = Message(replica=name, number=self.messages, waiting=(0, 0), **told)
        assert self.replica.receive(self.key.encode(message), now)


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param({}, id="plain"),
        pytest.param({"max_waiting": 4, "max_in_flight_tokens": 12_000}, id="limited"),
        pytest.param({"exclude": 1}, id="retried"),
        pytest.param({"explained": 1}, id="explained"),
        pytest.param({"replicas": 3}, id="replicas"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_two_picks(
    benchmark: Any, fleet: tuple[Registry, tuple[int, ...]], name: str, setting: dict[str, int]
) -> None:
    """As the router picks: one P, but a D with three more that Envoy may try. Each request changes the load.

    ``limited``: it looks first whether there is room. ``retried``: an instance of each role was tried before.
    ``explained``: it is noted how both were made, as for each request's decision. ``replicas``: so many
    others have requests on all instances, and tell of one more before each pick.
    """
    registry, blocks = fleet
    for watchers in registry._watchers.values():
        watchers.clear()  # of the schedulers before
    limits = {key: value for key, value in setting.items() if key.startswith("max")}
    scheduler = Scheduler(SchedulerConfig(strategy=name, **limits), registry, seed=1)
    exclude = {role: registry.endpoints(role)[: setting.get("exclude", 0)] for role in PD_ROLES}
    others = Others(registry, setting["replicas"]) if "replicas" in setting else None
    asked, explained = requests(blocks), "explained" in setting
    picked: list[Endpoint] = []
    claims: list[Reservation] = []

    def setup() -> tuple[tuple[RequestContext], dict[str, Any]]:
        request = next(asked)
        if others is not None:
            others.tell(request.now)
        for claim in claims:
            claim.release()
        claims[:] = [registry.work.reserve(endpoint, request) for endpoint in picked]
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
    if others is not None:
        others.leave()
    assert len(prefill) == 1
    assert 1 <= len(decode) <= 4, "with limits the others may be full"
