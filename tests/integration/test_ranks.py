"""Data-parallel ranks through real processes: balance, hand-offs, and what the end of a process means."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from tests.integration.test_apis import PATHS, REQUESTS, said
from tests.support.processes import Client, Process, Stack, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

PROMPT = "Each rank has a cache of its own, and all of them one process. " * 8
BODY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8}


@pytest.fixture(scope="module", params=["nixl", "mooncake", "moriio-write"])
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    arguments = ["--max-model-len=4096", "--load-fail-policy=recompute"]
    with Fleet(
        2,
        2,
        profile=EngineProfile.instant(),
        arguments=arguments,
        connector=request.param,
        data_parallel_size=2,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def up(fleet: Fleet, stack: Stack) -> Iterator[Process]:
    limits = {"strategy": "round_robin", "decode_first_byte_timeout": 5.0}
    with spawned(stack.up({**limits, **fleet.config()})) as process:
        yield process


@pytest_asyncio.fixture
async def client(client: Client) -> AsyncIterator[Client]:
    """A client whose requests are split; afterwards nothing may be in flight or pinned."""
    await client.until_split()
    yield client
    await client.until_in_flight(0)
    await client.until_freed()


async def ran(client: Client, leg: str) -> Counter[str]:
    """Return how many requests of a leg each engine had, as its instance says."""
    found: Counter[str] = Counter()
    for each in client.fleet.instances:
        if each.alive:
            seen = await client.seen(each.id)
            found.update(f"{each.id}:{one['rank']}" for one in seen if one["hand_off"] == leg)
    return found


async def test_each_rank_gets_its_share_and_its_own_handoffs(client: Client, fleet: Fleet) -> None:
    before = {leg: await ran(client, leg) for leg in ("send", "receive")}
    told: dict[str, Counter[str]] = {"x-pd-prefill": Counter(), "x-pd-decode": Counter()}
    texts = set()
    for _ in range(16):
        answer = await client.complete(**BODY)
        texts.add(answer.text)
        for name, counts in told.items():
            counts[answer.headers[name]] += 1
    assert len(texts) == 1
    for leg, name, role in (("send", "x-pd-prefill", "prefill"), ("receive", "x-pd-decode", "decode")):
        ids = [f"{role}-{number}:{rank}" for number in range(2) for rank in range(2)]
        assert told[name] == dict.fromkeys(ids, 4), (name, told[name])
        assert await ran(client, leg) - before[leg] == told[name], "it went where it was said to go"
    outcomes = {o for each in fleet.decode for one in await client.seen(each.id) for o in one["outcomes"]}
    assert outcomes == {"good"}
    hosts = await client.envoy_hosts()
    assert len([name for name in hosts if name.startswith(("prefill ", "decode "))]) == 4, "one a process"


async def test_every_api(client: Client) -> None:
    """Also those of which vLLM reads no rank: a hand-off that names one is not made there."""
    for path in PATHS:
        for stream in (False, True):
            answer = await client.post(path, {**REQUESTS[path], "stream": stream})
            assert said(answer), answer
            split = path != "/v1/responses" or client.fleet.connector == "nixl"
            assert ("x-pd-prefill" in answer.headers) is split


async def test_a_client_chooses_no_rank(client: Client) -> None:
    ranks = set()
    for _ in range(4):
        answer = await client.post("/v1/completions", BODY, {"x-data-parallel-rank": "7", "x-pd-rank": ":7"})
        assert answer.status == 200, answer
        ranks.add(answer.headers["x-pd-decode"])
    assert len(ranks) == 4


async def test_a_drain_is_of_all_ranks(client: Client) -> None:
    status, told = await client.admin("POST", "/instances/decode-0:1/drain?wait=true")
    assert (status, told["id"], told["drained"]) == (200, "decode-0:1", True)
    states = await client.states()
    assert (states["decode-0:0"], states["decode-0:1"]) == ("draining", "draining")
    for _ in range(4):
        assert (await client.complete(**BODY)).headers["x-pd-decode"].startswith("decode-1:")
    assert (await client.admin("POST", "/instances/decode-0/undrain"))[0] == 200

    async def back() -> bool:
        return set((await client.states()).values()) == {"healthy"}

    await until(back)


async def test_a_process_that_dies_takes_all_its_ranks_out(client: Client, fleet: Fleet) -> None:
    """A request that it has lost goes to another process, which takes it by a rank of its own."""
    for killed in ("prefill-1", "decode-1"):
        fleet.kill(killed)
    before = await ran(client, "receive")
    answers = await asyncio.gather(*(client.complete(**BODY) for _ in range(12)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    served = Counter(answer.headers["x-pd-decode"] for answer in answers)
    assert set(served) == {"decode-0:0", "decode-0:1"}, served
    handed = Counter(a.headers["x-pd-decode"] for a in answers if "x-pd-prefill" in a.headers)
    assert await ran(client, "receive") - before == handed
    seen = [one for one in await client.seen("decode-0") if one["status"] == 200][-12:]  # no release
    ranks = [{k.lower(): v for k, v in one["headers"].items()}["x-data-parallel-rank"] for one in seen]
    assert ranks == [str(one["rank"]) for one in seen]

    async def out() -> bool:
        states = await client.states()
        return {name for name, state in states.items() if state == "unhealthy"} == {
            f"{name}:{rank}" for name in ("prefill-1", "decode-1") for rank in range(2)
        }

    await until(out)
    for restarted in ("prefill-1", "decode-1"):
        fleet.restart(restarted)

    async def back() -> bool:
        return set((await client.states()).values()) == {"healthy"}

    await until(back)
    assert (await client.complete(**BODY)).status == 200
