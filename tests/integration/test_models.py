"""A fleet whose instances serve different models: each request goes to those that have its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.processes import NO_EJECTION, Client, Process, Stack, spawned
from tests.support.sim_fleet import Fleet
from vllm_pd_scheduler.sim.profile import EngineProfile

OTHER = "other-model"
ROUNDS = 12


@pytest.fixture(scope="module")
def others() -> Iterator[Fleet]:
    length = ["--max-model-len=4096"]
    with Fleet(1, 1, model=OTHER, profile=EngineProfile.instant(), arguments=length) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def up(fleet: Fleet, others: Fleet, stack: Stack) -> Iterator[Process]:
    instances: dict[str, Any] = fleet.config()
    for role, entries in others.config().items():
        instances[role] += [{**each, "id": f"other-{each['id']}"} for each in entries]
    with spawned(stack.up({"strategy": "round_robin", **NO_EJECTION, **instances})) as process:
        yield process


async def served(client: Client, **body: Any) -> tuple[set[int], set[str]]:
    """Return the statuses of some requests, and which instances served them."""
    answers = [await client.complete(**body) for _ in range(ROUNDS)]
    used = {a.headers[f"x-pd-{role}"] for a in answers for role in ("prefill", "decode")}
    return {answer.status for answer in answers}, used


async def test_each_model_has_its_own_instances(client: Client) -> None:
    assert await served(client, model=OTHER) == ({200}, {"other-prefill-0", "other-decode-0"})
    statuses, used = await served(client, model="sim-model")
    assert statuses == {200}
    assert used == {"prefill-0", "prefill-1", "decode-0", "decode-1"}


async def test_a_model_that_nobody_has_is_the_engines_to_refuse(client: Client) -> None:
    answer = await client.complete(model="nobody-has-it")
    assert answer.status == 404
    assert "does not exist" in answer.body.decode()


async def test_a_models_only_d_that_drains_is_no_404(client: Client) -> None:
    assert (await client.admin("POST", "/instances/other-decode-0/drain"))[0] == 202
    answer = await client.complete(model=OTHER)
    assert (answer.status, answer.headers["x-pd-reason"]) == (503, "no_decode")
    assert (await client.admin("POST", "/instances/other-decode-0/undrain"))[0] == 200
    assert await served(client, model=OTHER) == ({200}, {"other-prefill-0", "other-decode-0"})
