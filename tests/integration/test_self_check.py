"""The self-check in real processes: a pair whose hand-offs come wrong is found, left out and taken back."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import NO_EJECTION, Client, Process, Stack, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

KEY = "a-key-of-the-instances"
WRONG = ("prefill-0", "decode-1")


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    arguments = ["--max-model-len=4096", f"--api-key={KEY}"]
    with Fleet(2, 2, profile=EngineProfile.instant(), arguments=arguments) as running:
        yield running


@pytest.fixture(scope="module")
def config(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = Path(tmp_path_factory.mktemp("secrets")) / "key"
    file.write_text(KEY)
    return {
        **{"strategy": "round_robin", "api_key": {"file": str(file)}},
        **NO_EJECTION,
        **fleet.config(),
    }


@pytest.fixture(scope="module")
def up(stack: Stack, config: dict[str, Any]) -> Iterator[Process]:
    with spawned(stack.up(config)) as process:
        yield process


async def left_out(client: Client) -> set[tuple[str, str]]:
    _, found = await client.admin("GET", "/self-check")
    return {(each["prefill"], each["decode"]) for each in found["left_out"]}


async def use(client: Client, config: dict[str, Any]) -> None:
    client.stack.write_config(config)
    status, answer = await client.admin("POST", "/reload")
    assert (status, answer["needs_restart"]) == (200, [])


async def garble(client: Client, wrong: bool) -> None:
    """Have what the one hands over to the other be wrong from now on, or right."""
    prefill, decode = WRONG
    await client.fault(decode, garbled=[client.fleet[prefill].port] if wrong else [])


async def test_a_pair_that_is_asked_for(client: Client) -> None:
    before = await client.seen_by_all()
    one = await client.self_check("prefill-1", "decode-0")
    assert (one["result"], one["prefill"], one["decode"]) == ("match", "prefill-1", "decode-0"), one
    assert (one["model"], one["tries"], one["left_out"]) == ("sim-model", 1, False)
    prefilled = await client.seen_since("prefill-1", before["prefill-1"])
    decoded = await client.seen_since("decode-0", before["decode-0"])
    assert [each["hand_off"] for each in prefilled] == ["send"]
    assert [each["outcomes"] for each in decoded] == [["good"], []], "split, then whole"
    for path, code in (
        ("?prefill=nobody&decode=decode-0", 404),
        ("?prefill=decode-0&decode=decode-1", 409),
        ("?prefill=prefill-0", 400),
    ):
        assert (await client.admin("POST", f"/self-check{path}"))[0] == code


async def test_a_wrong_pair_is_found_and_only_that(
    client: Client, config: dict[str, Any], up: Process
) -> None:
    await client.until_known()
    await garble(client, True)
    await use(client, {**config, "self_check_interval": 1})

    async def found() -> bool:
        return await left_out(client) == {WRONG}

    await until(found)
    await up.says("WRONG TEXTS: decode-1 answers wrongly with what prefill-0 hands over")
    expected = (await client.complete(n=2)).json["choices"][0]["text"]
    pairs = set()
    for _ in range(5):
        for answer in await asyncio.gather(*(client.complete() for _ in range(4))):
            assert (answer.status, answer.text) == (200, expected)
            pairs.add((answer.headers["x-pd-prefill"], answer.headers["x-pd-decode"]))
    assert WRONG not in pairs
    assert {prefill for prefill, _ in pairs} == {"prefill-0", "prefill-1"}
    _, page = await client.admin("GET", "/metrics")
    assert 'pd_scheduler_wrong_pairs{decode="decode-1",prefill="prefill-0"} 1.0' in page
    assert 'pd_scheduler_self_checks_total{result="mismatch"}' in page
    await garble(client, False)

    async def right() -> bool:
        return await left_out(client) == set()

    await until(right)
    await use(client, config)
    await client.until_in_flight(0)
    await client.until_freed()


async def test_the_command(client: Client) -> None:
    command = [sys.executable, "-m", "vllm_pd_scheduler", "self-check", f"--url={client.stack.admin}"]

    async def run(*arguments: str) -> tuple[int, str]:
        with spawned([*command, *arguments]) as process:
            status = await asyncio.to_thread(process.wait)
            return status, process.output

    await client.self_check("prefill-1", "decode-1")
    status, said = await run("--last")
    assert (status, "prefill-1" in said, "match" in said) == (0, True, True), said
    assert (await run())[0] == 0
    status, said = await run("prefill-0", "nobody")
    assert (status, "nobody" in said) == (1, True), said
    assert (await run("prefill-0"))[0] == 2
    await garble(client, True)
    await client.self_check(*WRONG)
    status, said = await run(*WRONG)
    assert (status, "left out: prefill-0 to decode-1" in said) == (1, True), said
    await garble(client, False)
    await client.self_check(*WRONG)
    assert await left_out(client) == set()


async def test_a_d_that_does_not_answer(client: Client) -> None:
    """What P keeps is freed, and no instance is blamed."""
    for status in (500, 429):
        await client.fault("decode-0", status=status, paths=["/v1/completions"], times=1)
        one = await client.self_check("prefill-0", "decode-0")
        assert (one["result"], one["reason"]) == ("failed", f"D answers {status}")
        await client.until_freed()  # by a request to the same D, which would take the next fault
    await client.fault("decode-0", reset=True, paths=["/v1/completions"], times=1)
    assert (await client.self_check("prefill-0", "decode-0"))["result"] == "failed"
    await client.until_in_flight(0)
    await client.until_freed()
    assert set((await client.states()).values()) == {"healthy"}
