"""A P and a D that cannot hand over to each other, or only slowly, though both do with others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Client, Process, Stack, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile


@pytest.fixture(scope="module", params=["recompute"])
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """What D does when a hand-off does not arrive: only its counters tell of ``recompute``."""
    arguments = ["--max-model-len=4096", "--load-fail-delay=0.01", "--no-prefix-caching"]
    arguments.append(f"--load-fail-policy={request.param}")
    with Fleet(2, 2, profile=EngineProfile.instant(), arguments=arguments) as running:
        yield running


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """One for each test, since what a scheduler has learned stays so."""
    return Stack(tmp_path)


@pytest.fixture
def up(fleet: Fleet, stack: Stack) -> Iterator[Process]:
    settings = {"health_check_interval": 0.2, "strategy": "power_of_two", **fleet.config()}
    with spawned(stack.up(settings)) as process:
        yield process


async def pairs(client: Client) -> dict[str, Any]:
    status, found = await client.admin("GET", "/pairs")
    assert status == 200
    return dict(found)


async def metric(client: Client, line: str) -> bool:
    async with client.session.get(client.stack.admin + "/metrics") as response:
        return f"\n{line}\n" in await response.text()


@pytest.mark.parametrize("fleet", ["fail", "recompute"], indirect=True)
async def test_hand_offs_of_one_pair_that_fail(
    client: Client, fleet: Fleet, up: Process, request: pytest.FixtureRequest
) -> None:
    only_counted = request.node.callspec.params["fleet"] == "recompute"
    await client.until_split()
    expected = (await client.complete()).text
    await client.fault("decode-0", refuses=[fleet["prefill-0"].port])

    async def answered(count: int) -> set[tuple[str | None, str]]:
        answers = await asyncio.gather(*(client.complete() for _ in range(count)))
        assert {(answer.status, answer.text) for answer in answers} == {(200, expected)}
        return {(answer.headers.get("x-pd-prefill"), answer.headers["x-pd-decode"]) for answer in answers}

    async def found() -> bool:
        await answered(8)
        out = [(each["prefill"], each["decode"]) for each in (await pairs(client))["out"]]
        assert set(out) <= {("prefill-0", "decode-0")}
        return bool(out)

    if only_counted:  # where all P hand over as much as each other, it takes a minute
        await client.admin("POST", "/instances/prefill-1/drain")
    await until(found)
    await client.admin("POST", "/instances/prefill-1/undrain")
    assert await metric(client, 'pd_scheduler_pairs_out{what="pair"} 1.0')
    await up.says("hand-offs from prefill-0 to decode-0 fail")

    async def both_serve_others() -> bool:
        used = await answered(8)
        return {("prefill-0", "decode-1"), ("prefill-1", "decode-0")} <= used

    await until(both_serve_others)
    await client.fault("decode-0")

    async def back() -> bool:
        return ("prefill-0", "decode-0") in await answered(4) and not (await pairs(client))["out"]

    await until(back)
    await up.says("hand-offs from prefill-0 to decode-0 work again")
    if not only_counted:  # else D has told nobody
        await client.until_freed()


async def test_hand_offs_of_one_pair_that_are_slow(client: Client, fleet: Fleet, up: Process) -> None:
    await client.until_split()
    await client.fault("decode-0", slow_from={str(fleet["prefill-0"].port): 0.25})

    async def found() -> bool:
        await asyncio.gather(*(client.complete(stream=True, prompt="Which link? " * 99) for _ in range(16)))
        slowest = (await pairs(client))["slowest"]
        return bool(slowest) and slowest[0]["slow"]

    await until(found)
    slowest = (await pairs(client))["slowest"]
    assert [(each["prefill"], each["decode"]) for each in slowest if each["slow"]] == [
        ("prefill-0", "decode-0")
    ]
    assert await metric(client, "pd_scheduler_slow_pairs 1.0")
    await up.says("UCX_TLS")
