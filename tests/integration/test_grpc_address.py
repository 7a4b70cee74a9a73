"""Where Envoy reaches the scheduler: a socket that only this user can open, or a port."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import aiohttp
import grpc
import psutil
import pytest
from envoy.service.discovery.v3 import discovery_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.processes import Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.envoy.eds import SERVICE as EDS
from vllm_pd_scheduler.envoy.limits import MAX_MESSAGE_BYTES
from vllm_pd_scheduler.sim.profile import EngineProfile


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 1, profile=EngineProfile.instant()) as running:
        yield running


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)


def listening(process: Process) -> tuple[list[int], set[str]]:
    """Ports and paths at which a process listens."""
    ports, paths = [], set()
    for connection in psutil.Process(process.process.pid).net_connections("all"):
        if connection.status == psutil.CONN_LISTEN:
            ports.append(connection.laddr.port)
        elif isinstance(connection.laddr, str) and connection.laddr:
            paths.add(connection.laddr)
    return ports, paths


async def split(client: Client) -> bool:
    answer = await client.complete()
    return answer.status == 200 and "x-pd-prefill" in answer.headers


async def test_up_speaks_over_a_socket_of_its_own(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, tmp_path: Path
) -> None:
    with spawned(stack.up(fleet.config()), TMPDIR=str(tmp_path)) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        await until(partial(split, client))
        ports, paths = listening(process)
        assert ports == [stack.admin_port]
        (path,) = [Path(each) for each in paths if each.startswith(str(tmp_path))]
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        process.signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait) == 0
        assert not path.parent.exists()


async def test_up_speaks_over_a_port_that_is_given(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet
) -> None:
    option, setting = [f"--grpc-port={stack.ports.grpc}"], {"grpc_port": stack.ports.grpc}
    for command in ([*stack.up(fleet.config()), *option], stack.up({**fleet.config(), **setting})):
        with spawned(command) as process:
            client = Client(session, stack, fleet)
            await ready(client, process)
            await until(partial(split, client))
            assert sorted(listening(process)[0]) == sorted([stack.admin_port, stack.ports.grpc])


async def test_serve_on_a_socket_beside_an_envoy(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet
) -> None:
    """Also when it was killed and is started again: what it left is replaced, and Envoy finds it."""
    path = stack.directory / "grpc"
    stack.ports = replace(stack.ports, grpc_socket=str(path))
    command = stack.serve({**fleet.config(), "grpc_socket": str(path)})
    with spawned(stack.envoy()) as envoy:
        client = Client(session, stack, fleet)
        for _ in range(2):
            with spawned(command) as process:
                await ready(client, envoy)
                await until(partial(split, client))
                assert listening(process)[0] == [stack.admin_port]
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                process.signal(signal.SIGKILL)
                await asyncio.to_thread(process.wait)
                assert path.exists()


async def test_a_socket_that_another_scheduler_serves(stack: Stack, fleet: Fleet, tmp_path: Path) -> None:
    path = str(stack.directory / "grpc")
    (tmp_path / "other").mkdir()
    first = stack.serve({**fleet.config(), "grpc_socket": path})
    second = Stack(tmp_path / "other").serve({**fleet.config(), "grpc_socket": path})
    with spawned(first) as process:

        async def there() -> bool:
            return "grpc" in os.listdir(stack.directory)

        await until(there)
        with spawned(second) as other:
            assert await asyncio.to_thread(other.wait) == 1
            assert f"grpc_socket: cannot listen on {path}: another process serves it" in other.output
            assert "Traceback" not in other.output
        assert process.process.poll() is None


async def test_what_envoy_would_never_send_holds_up_nobody(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet
) -> None:
    """Large messages of names, at EDS: each is refused before it is parsed, and requests go on."""
    port = stack.ports.grpc
    with spawned([*stack.up(fleet.config()), f"--grpc-port={port}"]) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        names = discovery_pb2.DiscoveryRequest(resource_names=["n"] * (20 * MAX_MESSAGE_BYTES // 3))
        large = names.SerializeToString()
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            for _ in range(3):
                call = channel.stream_stream(f"/{EDS}/StreamEndpoints")()
                await call.write(large)
                assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert await split(client)
            check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert (await check).status == health_pb2.HealthCheckResponse.SERVING
        assert "Traceback" not in process.output
