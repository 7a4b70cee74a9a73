"""An instance that is ejected but alive gets a request when all others have failed it, and not before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.processes import Client, Process, Stack, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until

AT_ONCE = {"ejection_failures": 1, "strategy": "round_robin"}
FOR_LONG = {**AT_ONCE, "ejection_pause": 300.0}
ROUNDS = 12


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """One for each test, since what a scheduler has ejected stays so."""
    return Stack(tmp_path)


@pytest.fixture
def up(fleet: Fleet, stack: Stack, request: pytest.FixtureRequest) -> Iterator[Process]:
    settings = {"health_check_interval": 0.2, **request.param, **fleet.config()}
    with spawned(stack.up(settings)) as process:
        yield process


@pytest_asyncio.fixture
async def client(client: Client, fleet: Fleet, up: Process) -> AsyncIterator[Client]:
    """Restarts what was killed."""
    yield client
    assert "Traceback" not in up.output
    for instance in fleet.instances:
        if not instance.alive:
            await asyncio.to_thread(fleet.restart, instance.id)


async def eject(client: Client, name: str) -> None:
    """Have an instance fail once, which is enough, and wait until Envoy knows."""
    await client.fault(name, status=500, times=1)
    role = name.partition("-")[0]
    host = f"{role} 127.0.0.1:{client.fleet[name].port}"

    async def ejected() -> bool:
        assert (await client.complete()).status == 200
        return (await client.envoy_hosts())[host] == "UNHEALTHY"

    await until(ejected)
    assert (await client.instance(name))["reason"].startswith("ejected: ")


@pytest.mark.parametrize("up", [FOR_LONG], indirect=True)
@pytest.mark.parametrize("fault", [{"status": 500}, {"reset": True}, "killed"])
async def test_an_ejected_decode_instance_answers_what_the_others_have_failed(
    client: Client, fault: dict[str, Any] | str
) -> None:
    expected = (await client.complete()).text
    await eject(client, "decode-0")
    answers = [await client.complete() for _ in range(ROUNDS)]
    assert {answer.headers["x-pd-decode"] for answer in answers} == {"decode-1"}, "never first"

    if isinstance(fault, dict):
        await client.fault("decode-1", **fault)
    else:
        client.fleet.kill("decode-1")
    answers = [await client.complete() for _ in range(ROUNDS)]
    assert {(a.text, a.headers["x-pd-decode"]) for a in answers} == {(expected, "decode-0")}
    assert "x-pd-prefill" not in answers[0].headers, "a rescue"
    for answer in answers:
        # Once the killed one is known to be dead, nothing is left but the ejected one: then it is first.
        first = "x-pd-prefill" in answer.headers
        assert (await client.request_of(answer))["hand_off"] == ("receive" if first else None), "used once"

    await client.until_freed()


@pytest.mark.parametrize("up", [{**AT_ONCE, "ejection_pause": 1.0}], indirect=True)
async def test_one_on_trial_answers_what_the_others_have_failed(client: Client) -> None:
    """And what it has answered so ends the trial, though it is never without a request."""
    await eject(client, "decode-0")
    await client.fault("decode-1", status=500)

    async def back() -> bool:
        answers = await asyncio.gather(*(client.complete() for _ in range(4)))
        assert {answer.headers["x-pd-decode"] for answer in answers} == {"decode-0"}
        return (await client.instance("decode-1"))["reason"] == "ejected: decode: status"

    await until(back)


@pytest.mark.parametrize("up", [{**FOR_LONG, "on_prefill_failure": "fail"}], indirect=True)
async def test_an_ejected_prefill_instance_is_tried_before_a_request_is_refused(client: Client) -> None:
    await eject(client, "prefill-0")
    answers = [await client.complete() for _ in range(ROUNDS)]
    assert {answer.headers["x-pd-prefill"] for answer in answers} == {"prefill-1"}, "never first"
    await client.fault("prefill-1", status=500)
    answers = [await client.complete() for _ in range(ROUNDS)]
    assert {answer.headers.get("x-pd-prefill") for answer in answers} == {"prefill-0"}
