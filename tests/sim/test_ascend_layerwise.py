"""vllm-ascend's layer-wise connector between simulated engines: D asks, P writes, blocks wait for that."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from tests.support.sim import BODY, COMPLETIONS, Client
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile

KEYS = [
    "token_ids",
    "request_id",
    "do_remote_prefill",
    "do_remote_decode",
    "remote_block_ids",
    "remote_block_size",
    "remote_engine_id",
    "remote_host",
    "remote_port",
    "remote_tp_size",
    "remote_pcp_size",
    "remote_dcp_size",
    "remote_cached_tokens",
]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 2, profile=EngineProfile.instant(), connector="ascend-layerwise") as running:
        yield running


class Metaserver:
    """Notes what D say."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        self.calls.put_nowait(await request.json())
        return web.Response(status=500)  # which D does not read


@pytest_asyncio.fixture
async def metaserver() -> AsyncIterator[Metaserver]:
    found, app = Metaserver(), web.Application()
    app.router.add_post("/v1/metaserver", found.take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/metaserver"
    yield found
    await runner.cleanup()


def invited(metaserver: Metaserver) -> dict[str, Any]:
    params = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": metaserver.url}
    return {**BODY, "kv_transfer_params": params}


async def decoded(client: Client, fleet: Fleet, body: dict[str, Any]) -> Any:
    """Have D serve a request; return its text."""
    async with client.session.post(fleet["decode-0"].url + COMPLETIONS, json=body) as response:
        assert response.status == 200
        return (await response.json())["choices"][0]["text"]


def asked(client: Client, fleet: Fleet, said: dict[str, Any], **more: Any) -> Any:
    """Have P write what D has asked for, under the id that D has."""
    own = said["request_id"].removeprefix("cmpl-").removesuffix("-0")
    body = {**BODY, "max_tokens": 1, "min_tokens": 1, "kv_transfer_params": said, **more}
    return client.session.post(fleet["prefill-0"].url + COMPLETIONS, json=body, headers={"X-Request-Id": own})


async def stats(client: Client, fleet: Fleet, name: str = "decode-0") -> Any:
    return await client.stats(fleet[name])


async def test_d_asks_and_p_writes(fleet: Fleet, client: Client, metaserver: Metaserver) -> None:
    local = await client.text(fleet["decode-1"], BODY)
    answer = asyncio.ensure_future(decoded(client, fleet, invited(metaserver)))
    said = await metaserver.calls.get()
    assert list(said) == KEYS
    assert said["request_id"].startswith("cmpl-")
    async with asked(client, fleet, said) as response:
        found = await response.json()
    assert found["kv_transfer_params"] is None
    assert await answer == local
    assert (await stats(client, fleet, "prefill-0"))["pinned"] == 0


async def test_a_first_token_that_ends_the_text(fleet: Fleet, client: Client, metaserver: Metaserver) -> None:
    """P has written by then."""
    await client.post(fleet["prefill-0"], "/_sim/fault", {"eos": True})
    answer = asyncio.ensure_future(decoded(client, fleet, invited(metaserver)))
    async with asked(client, fleet, await metaserver.calls.get(), min_tokens=0) as response:
        assert (await response.json())["choices"][0]["finish_reason"] == "stop"
    await answer
    await client.post(fleet["prefill-0"], "/_sim/fault", {})


async def test_blocks_wait_for_p_when_the_client_has_left(
    fleet: Fleet, client: Client, metaserver: Metaserver
) -> None:
    answer = asyncio.ensure_future(decoded(client, fleet, invited(metaserver)))
    said = await metaserver.calls.get()
    answer.cancel()
    await client.text(fleet["decode-0"], BODY)  # it has heard of that
    assert (await stats(client, fleet))["deferred"] == 1
    async with asked(client, fleet, said) as response:
        assert response.status == 200

    async def freed() -> bool:
        return (await stats(client, fleet))["deferred"] == 0

    await until(freed)


async def test_what_is_written_twice_is_another_prompts_by_then(
    fleet: Fleet, client: Client, metaserver: Metaserver
) -> None:
    """The trap: blocks that D has given to another request."""
    before = (await stats(client, fleet))["hand_offs"].get("stale", 0)
    first = asyncio.ensure_future(decoded(client, fleet, invited(metaserver)))
    said = await metaserver.calls.get()
    async with asked(client, fleet, said):
        pass
    await first
    other = {**invited(metaserver), "prompt": "another one " * 40, "max_tokens": 4}
    second = asyncio.ensure_future(decoded(client, fleet, other))
    theirs = await metaserver.calls.get()
    both = {**said, "remote_block_ids": theirs["remote_block_ids"]}
    async with asked(client, fleet, both) as response:
        assert response.status == 200

    async def spoilt() -> bool:
        return (await stats(client, fleet))["hand_offs"].get("stale", 0) > before

    await until(spoilt)
    async with asked(client, fleet, theirs, prompt=other["prompt"]):
        pass
    await second


async def test_p_dies_of_a_call_that_is_not_whole(fleet: Fleet, client: Client) -> None:
    params = {"do_remote_decode": True, "remote_host": "127.0.0.1"}
    await client.post(fleet["prefill-0"], COMPLETIONS, {**BODY, "kv_transfer_params": params})
    await until(lambda: not fleet["prefill-0"].alive)
    fleet.restart("prefill-0")
