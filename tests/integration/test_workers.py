"""Several workers with a real Envoy: one scheduler to clients."""

from __future__ import annotations

import asyncio
import sys
from itertools import count
from typing import Any

import aiohttp

from tests.support.processes import Client, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from tests.support.workers import (
    all_use,
    chosen_by,
    client,
    counts,
    deciders,
    fleet,
    requests,
    settings,
    split_by_all,
    stack,
    up,
)
from vllm_pd_scheduler.envoy.process import find_envoy

__all__ = ["client", "fleet", "settings", "stack", "up"]


async def test_all_share_the_requests_and_one_page_counts_them(client: Client) -> None:
    before = requests(await counts(client))
    answers = [await client.complete() for _ in range(40)]
    assert all("x-pd-prefill" in each.headers for each in answers)

    async def shared() -> bool:
        return await deciders(client, 40) == {"w0": 20, "w1": 20}

    await until(shared)  # a worker that does not answer the first one in time is left out

    async def counted() -> bool:
        found = await counts(client)
        ended = found["pd_scheduler_responses_total[('outcome', 'ok')]"]
        return requests(found) == before + 40 == ended

    await until(counted)  # what Envoy tells comes a second later


async def test_what_one_has_had_cached_another_knows(client: Client) -> None:
    """The first choice that a worker makes for a prompt already knows where another has sent it."""
    assert (await client.admin("PUT", "/strategy", {"strategy": "prefix_cache"}))[0] == 200
    await all_use(client, "prefix_cache")
    numbers = count()

    async def known() -> bool:
        """Of a new prompt, since they tell each other a moment later: a busy machine is too slow for some."""
        prompt = f"Prompt {next(numbers)} is long. " * 200
        where = (await client.complete(prompt=prompt)).headers["x-pd-prefill"]
        by = first = (await chosen_by(client))[0]
        while by == first:
            await client.complete(prompt=prompt)
            by, choice = await chosen_by(client)
        (picked, *_) = choice["candidates"]
        return picked["id"] == where and picked["terms"]["cached_blocks"] > 0

    await until(known)


async def test_workers_beside_an_envoy_that_runs_elsewhere(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, settings: dict[str, Any]
) -> None:
    """Each listens at a port of its own, from grpc_port on; ``envoy-config`` has them all."""
    command = stack.serve(settings)
    config, ports = command[-1], stack.ports
    options = [f"--port={ports.ingress}", f"--envoy-admin-port={ports.admin}", "--workers=3"]
    made = [sys.executable, "-m", "vllm_pd_scheduler", "envoy-config", "--config", config, *options]
    with spawned(made) as printing:
        assert await asyncio.to_thread(printing.wait) == 0
        path = stack.directory / "workers.yaml"
        path.write_text(printing.output)
    envoy = [find_envoy(), "-c", str(path), "--log-level", "warning", "--disable-hot-restart"]
    with (
        spawned([*command[:3], "serve", *command[3:], "--workers=3"]) as process,
        spawned(envoy) as beside,
    ):
        client = Client(session, stack, fleet)
        await ready(client, process)
        await split_by_all(client, 3)
        assert "lua" not in beside.output
