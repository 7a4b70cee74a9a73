"""An instance is turned while requests run: Envoy follows, no answer is cut, and all of them are split."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.support.processes import NO_EJECTION, Answer, Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.stack import session
from tests.support.waiting import until

__all__ = ["session"]


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with Fleet(3, 1) as running:
        yield running


@pytest.fixture
def up(fleet: Fleet, tmp_path: Path) -> Iterator[tuple[Stack, Process]]:
    listed = fleet.config()
    for each in listed["prefill_instances"]:
        each["both_roles"] = True
    stack = Stack(tmp_path)
    with spawned(stack.up({"strategy": "round_robin", **listed})) as process:
        yield stack, process


async def test_a_prefill_instance_becomes_a_decode_instance_and_again(
    session: aiohttp.ClientSession, fleet: Fleet, up: tuple[Stack, Process]
) -> None:
    client = Client(session, up[0], fleet)
    await ready(client, up[1])
    answers: list[Answer] = []
    turning = True

    async def ask() -> None:
        while turning:
            answers.append(await client.complete(max_tokens=40))

    asking = [asyncio.create_task(ask()) for _ in range(4)]
    try:
        for role in ("decode", "prefill"):
            status, found = await client.admin("POST", "/instances/prefill-1/turn?wait=true")
            assert (status, found["role"]) == (200, role)
            begin = len(answers)

            async def serves(header: str = f"x-pd-{role}", begin: int = begin) -> bool:
                return any(each.headers.get(header) == "prefill-1" for each in answers[begin:])

            await until(serves)
    finally:
        turning = False
        await asyncio.gather(*asking)
    assert {each.status for each in answers} == {200}
    assert all("x-pd-prefill" in each.headers for each in answers), "all were split"
    texts = {each.json["choices"][0]["text"] for each in answers}
    assert len(texts) == 1, "each has the right text"
    await client.until_freed()


@pytest.fixture
def sglang(tmp_path: Path) -> Iterator[tuple[Fleet, Stack, Process]]:
    with Fleet(3, 1, connector="sglang") as running:
        listed = running.config()
        for each in listed["prefill_instances"]:
            each["both_roles"] = True
        stack = Stack(tmp_path)
        with spawned(stack.up({"strategy": "round_robin", **NO_EJECTION, **listed})) as process:
            yield running, stack, process


async def test_an_engine_of_sglang_is_told_which_role_it_has(
    session: aiohttp.ClientSession, sglang: tuple[Fleet, Stack, Process]
) -> None:
    fleet, stack, process = sglang
    client = Client(session, stack, fleet)
    await ready(client, process)
    right = (await client.complete(max_tokens=20)).json["choices"][0]["text"]
    await client.fault("prefill-1", status=500, paths=["/pd_role_switch"])
    status, found = await client.admin("POST", "/instances/prefill-1/turn?wait=true")
    assert (status, found["role"], found["state"]) == (202, "prefill", "draining"), "its role is not known"
    await client.undo_faults()
    await client.admin("POST", "/instances/prefill-1/undrain")
    status, found = await client.admin("POST", "/instances/prefill-1/turn?wait=true")
    assert (status, found["role"]) == (200, "decode")
    answers: list[Answer] = []

    async def both_decode() -> bool:
        answers.append(await client.complete(max_tokens=20))
        return {"decode-0", "prefill-1"} <= {each.headers.get("x-pd-decode") for each in answers}

    await until(both_decode)
    assert {each.status for each in answers} == {200}
    assert {each.json["choices"][0]["text"] for each in answers} == {right}
    assert "prefill-1" not in {each.headers["x-pd-prefill"] for each in answers}
