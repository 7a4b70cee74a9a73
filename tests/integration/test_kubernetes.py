"""Pods of a cluster as the fleet of a real scheduler and a real Envoy, under requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.kubernetes import ApiServer
from tests.support.kubernetes_objects import endpoint, endpoint_slice, pod, pool
from tests.support.load import load
from tests.support.pods import Pods
from tests.support.processes import Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until

SETTINGS = {"decode_first_byte_timeout": 60.0, "health_check_timeout": 60.0}


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)


@pytest_asyncio.fixture
async def server() -> AsyncIterator[ApiServer]:
    async with ApiServer() as running:
        yield running


@pytest_asyncio.fixture
async def pods(server: ApiServer) -> AsyncIterator[Pods]:
    """Two P and two D."""
    async with Pods(server, ["--decode-base=0.005"]) as running:
        names = [(f"{role}-{number}", role) for role in ("prefill", "decode") for number in range(2)]
        await asyncio.gather(*(running.run(*each) for each in names))
        yield running


def source(server: ApiServer, tmp_path: Path, **entry: Any) -> dict[str, Any]:
    """Return a configuration with one source."""
    entry = {"type": "kubernetes", "kubeconfig": server.kubeconfig(tmp_path / "kubeconfig"), **entry}
    return {**SETTINGS, "discovery": [entry]}


@asynccontextmanager
async def running(
    session: aiohttp.ClientSession, stack: Stack, settings: dict[str, Any]
) -> AsyncIterator[tuple[Client, Process]]:
    with spawned(stack.up(settings)) as process:
        client = Client(session, stack, Fleet())
        await ready(client, process)
        await client.until_split()
        yield client, process
        assert "Traceback" not in process.output


async def until_states(client: Client, **expected: str) -> None:
    """Wait until the instances have these states, and there are no others."""

    async def so() -> bool:
        return await client.states() == {name.replace("_", "-"): state for name, state in expected.items()}

    await until(so)


HEALTHY = {f"{role}_{number}": "healthy" for role in ("prefill", "decode") for number in range(2)}


async def test_pods_that_come_and_go_cost_no_request(
    session: aiohttp.ClientSession, stack: Stack, server: ApiServer, pods: Pods, tmp_path: Path
) -> None:
    """A roll-out: each pod is replaced by another one, and ends when nothing is left on it."""
    settings = source(server, tmp_path, selector="app=vllm", ports=[pods.port])
    async with running(session, stack, settings) as (client, _):
        await until_states(client, **HEALTHY)
        async with load(client, 4, stream=True, tokens=20) as seen:
            for role in ("prefill", "decode"):
                for number in range(2):
                    old, new = f"{role}-{number}", f"{role}-new-{number}"
                    await pods.run(new, role)

                    async def serves() -> bool:
                        return (await client.states()).get(new) == "healthy"  # noqa: B023

                    await until(serves)
                    pods.delete(old)

                    async def gone() -> bool:
                        return old not in await client.states()  # noqa: B023

                    await until(gone)
                    await pods.end(old)
            await seen.more()
        seen.assert_clean()
        assert set(await client.states()) == {f"{r}-new-{n}" for r in ("prefill", "decode") for n in range(2)}


async def test_a_stream_on_a_pod_that_is_deleted_ends_first(
    session: aiohttp.ClientSession, stack: Stack, server: ApiServer, pods: Pods, tmp_path: Path
) -> None:
    settings = source(server, tmp_path, selector="app=vllm", ports=[pods.port])
    async with running(session, stack, settings) as (client, _):
        await until_states(client, **HEALTHY)
        async with client.held_stream([pods[f"decode-{number}"] for number in range(2)]) as stream:
            name = stream.headers["x-pd-decode"]
            pods.delete(name)
            await until_states(client, **{**HEALTHY, name.replace("-", "_"): "draining"})
            assert (await stream.rest()).endswith(b"data: [DONE]\n\n")

        async def gone() -> bool:
            return name not in await client.states()

        await until(gone)


async def test_while_the_api_server_is_away_nothing_is_lost(
    session: aiohttp.ClientSession, stack: Stack, server: ApiServer, pods: Pods, tmp_path: Path
) -> None:
    server.put("inferencepools", pool("chat", pods.port, app="vllm"))
    settings = source(server, tmp_path, pool="chat")
    async with running(session, stack, settings) as (client, process):
        await until_states(client, **HEALTHY)
        assert await client.admin("GET", "/readyz") == (200, {"status": "ready"})
        async with load(client, 4) as seen:
            await server.down()
            lost = {"status": "ready", "discovery": "no news from 1 of 2 sources of instances"}

            async def told() -> bool:
                return await client.admin("GET", "/readyz") == (200, lost)

            await until(told)
            await seen.more()
            server.put("pods", pod("decode-2", "127.0.0.99"))  # there is no process
            server.delete("pods", "decode-1")
            await server.up()
            await until_states(
                client, prefill_0="healthy", prefill_1="healthy", decode_0="healthy", decode_2="unhealthy"
            )
            await seen.more()
        seen.assert_clean()
        await process.says("the API server cannot be asked")
        assert process.output.count("the API server cannot be asked") == 1
        await until(lambda: "all is well again" in process.output)
        assert await client.admin("GET", "/readyz") == (200, {"status": "ready"})


async def test_services(
    session: aiohttp.ClientSession, stack: Stack, server: ApiServer, pods: Pods, tmp_path: Path
) -> None:
    def tell(role: str, *names: str) -> None:
        endpoints = [endpoint(pods[name].host, name) for name in names]
        server.put("endpointslices", endpoint_slice(role, f"vllm-{role}", *endpoints, ports={"": pods.port}))

    tell("prefill", "prefill-0", "prefill-1")
    tell("decode", "decode-0")
    settings = source(server, tmp_path, services={"prefill": "vllm-prefill", "decode": "vllm-decode"})
    async with running(session, stack, settings) as (client, _):
        await until_states(client, prefill_0="healthy", prefill_1="healthy", decode_0="healthy")
        tell("decode", "decode-1")
        await until_states(client, prefill_0="healthy", prefill_1="healthy", decode_1="healthy")
        assert (await client.complete()).headers["x-pd-decode"] == "decode-1"


@pytest.fixture
def with_envoy(stack: Stack) -> Iterator[ExitStack]:
    with ExitStack() as processes:
        yield processes


async def test_a_scheduler_that_starts_without_the_api_server_spoils_nothing(
    session: aiohttp.ClientSession, stack: Stack, server: ApiServer, pods: Pods, tmp_path: Path
) -> None:
    """Envoy knows the fleet from the scheduler before it, and goes on with that."""
    settings = source(server, tmp_path, selector="app=vllm", ports=[pods.port])
    client = Client(session, stack, Fleet())
    with spawned(stack.envoy()):
        with spawned(stack.serve(settings)) as first:
            await ready(client, first)
            await until_states(client, **HEALTHY)
            await client.until_split()
        await server.down()
        hosts = {name for name in await client.envoy_hosts() if name.startswith("decode ")}
        with spawned(stack.serve(settings)) as second:
            await until(lambda: "no word yet from kubernetes:" in second.output)
            await until(lambda: "serving ext_proc" in second.output)
            assert hosts <= set(await client.envoy_hosts())
            status, found = await client.admin("GET", "/readyz")
            assert (status, "no news from 1 of 2 sources" in str(found)) == (503, True), found
            answer = await client.complete()
            assert answer.status == 200, answer
            await server.up()
            await until_states(client, **HEALTHY)
            await client.until_split()
