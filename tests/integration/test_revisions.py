"""A roll-out behind real Envoy: P and D of two revisions, and no hand-off from one to the other."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.support.processes import NO_EJECTION, Answer, Client, Process, Stack, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

_numbers = itertools.count()


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(4, 4, profile=EngineProfile.instant(), arguments=["--max-model-len=4096"]) as running:
        yield running


def revision_of(instance: str) -> str:
    """The first two of each role are the old ones."""
    return "old" if int(instance[-1]) < 2 else "new"


@pytest.fixture(scope="module", params=["least_load", "prefix_cache"])
def config(fleet: Fleet, request: pytest.FixtureRequest) -> dict[str, Any]:
    instances = {
        role: [{**each, "revision": revision_of(each["id"])} for each in entries]
        for role, entries in fleet.config().items()
    }
    return {"strategy": request.param, **NO_EJECTION, **instances}


@pytest.fixture(scope="module")
def up(stack: Stack, config: dict[str, Any]) -> Iterator[Process]:
    with spawned(stack.up(config)) as process:
        yield process


@asynccontextmanager
async def weights(client: Client, config: dict[str, Any], **revisions: int) -> AsyncIterator[None]:
    """Give the revisions weights while the block runs."""
    for found in (revisions, {}):
        client.stack.write_config({**config, "revisions": found})
        status, answer = await client.admin("POST", "/reload")
        assert (status, answer["needs_restart"]) == (200, [])
        if found:
            yield


async def served(client: Client, count: int = 60) -> list[Answer]:
    """Some requests, several at a time."""
    answers: list[Answer] = []
    for _ in range(count // 6):
        # Each prompt is new: one that two instances have lost is refused for a while.
        one = (client.complete(prompt=f"prompt {next(_numbers)} " * 20) for _ in range(6))
        answers += await asyncio.gather(*one)
    assert Counter(answer.status for answer in answers) == {200: len(answers)}
    return answers


def pairs(answers: list[Answer]) -> Counter[tuple[str, str]]:
    """Revisions of the P and the D of those with a hand-off."""
    split = [answer.headers for answer in answers if "x-pd-prefill" in answer.headers]
    return Counter((revision_of(each["x-pd-prefill"]), revision_of(each["x-pd-decode"])) for each in split)


async def outcomes(client: Client) -> Counter[str]:
    """What has become of the hand-offs, as the instances that got them tell."""
    found: Counter[str] = Counter()
    for each in client.fleet.decode:
        found += Counter((await client.json(each.url + "/_sim/stats"))["hand_offs"])
    return found


async def test_no_hand_off_goes_to_another_revision(client: Client) -> None:
    await client.until_known()
    found = pairs(await served(client))
    assert set(found) == {("old", "old"), ("new", "new")}
    assert sum(found.values()) == 60


async def test_a_revision_without_d_gets_no_prefills(client: Client) -> None:
    for instance in ("decode-2", "decode-3"):
        assert (await client.admin("POST", f"/instances/{instance}/drain?force=true"))[0] == 202
    assert pairs(await served(client)) == {("old", "old"): 60}
    for instance in ("decode-2", "decode-3"):
        assert (await client.admin("POST", f"/instances/{instance}/undrain"))[0] == 200
    assert set(pairs(await served(client))) == {("old", "old"), ("new", "new")}


async def test_a_revision_without_p_decodes_what_it_prefills_itself(client: Client) -> None:
    """Its D are there for whatever needs no hand-off, such as two answers to one prompt."""
    for instance in ("prefill-2", "prefill-3"):
        assert (await client.admin("POST", f"/instances/{instance}/drain?force=true"))[0] == 202
    assert pairs(await served(client)) == {("old", "old"): 60}
    alone = [await client.complete(n=2) for _ in range(8)]
    assert {revision_of(answer.headers["x-pd-decode"]) for answer in alone} <= {"old", "new"}
    for instance in ("prefill-2", "prefill-3"):
        assert (await client.admin("POST", f"/instances/{instance}/undrain"))[0] == 200


async def test_a_d_that_fails_is_replaced_without_the_hand_off(client: Client) -> None:
    """By any D, of either revision."""
    await client.fault("decode-2", status=500, paths=["/v1/completions"])
    answers = await served(client)
    await client.fault("decode-2")
    assert "decode-2" not in {answer.headers["x-pd-decode"] for answer in answers}
    assert set(pairs(answers)) <= {("old", "old"), ("new", "new")}
    assert sum(pairs(answers).values()) < len(answers), "what comes from another D has no hand-off"


async def test_each_revision_gets_its_share(client: Client, config: dict[str, Any]) -> None:
    async with weights(client, config, old=3, new=1):
        assert pairs(await served(client)) == {("old", "old"): 45, ("new", "new"): 15}
        alone = [await client.complete(n=2) for _ in range(8)]
        assert Counter(revision_of(each.headers["x-pd-decode"]) for each in alone) == {"old": 6, "new": 2}
        _, page = await client.admin("GET", "/metrics")
        assert 'pd_scheduler_revision_requests_total{revision="new"}' in page
    async with weights(client, config, old=0, new=1):
        assert pairs(await served(client)) == {("new", "new"): 60}


async def test_a_session_stays_with_its_revision(client: Client, config: dict[str, Any]) -> None:
    async def where() -> list[str]:
        found = [await client.post("/v1/completions", {"prompt": "Hi", "user": f"u{n}"}) for n in range(12)]
        return [revision_of(each.headers["x-pd-decode"]) for each in found]

    async with weights(client, config, old=1, new=1):
        before = await where()
        assert set(before) == {"old", "new"}
    async with weights(client, config, old=1, new=1000):
        assert await where() == before
    async with weights(client, config, new=1):
        assert set(await where()) == {"new"}


async def test_a_revision_that_dies_gives_its_share_away(client: Client, config: dict[str, Any]) -> None:
    """No request fails meanwhile, whether its P or its D have gone."""
    async with weights(client, config, old=1, new=1):
        for role in ("prefill", "decode"):
            running = asyncio.ensure_future(served(client, 120))
            for number in (2, 3):
                assert (await client.admin("POST", f"/instances/{role}-{number}/drain?force=true"))[0] == 202
            await running
            assert pairs(await served(client)) == {("old", "old"): 60}
            for number in (2, 3):
                assert (await client.admin("POST", f"/instances/{role}-{number}/undrain"))[0] == 200
        assert pairs(await served(client)) == {("old", "old"): 30, ("new", "new"): 30}
        for instance in ("prefill-2", "prefill-3"):
            await client.fault(instance, status=500, paths=["/v1/completions"])
        assert set(pairs(await served(client))) == {("old", "old")}


async def test_all_of_a_revision_die_under_load(client: Client) -> None:
    before = await outcomes(client)
    running = asyncio.ensure_future(served(client, 120))
    for instance in ("decode-2", "decode-3"):
        assert (await client.admin("DELETE", f"/instances/{instance}?force=true"))[0] == 204
    answers = await running
    assert set(pairs(answers)) <= {("old", "old"), ("new", "new")}
    after = await outcomes(client)
    assert after["stale"] == before["stale"], "no D has read what was not for it"

    async def gone() -> bool:
        return set(pairs(await served(client, 6))) == {("old", "old")}

    await until(gone)
