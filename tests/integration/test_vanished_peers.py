"""A peer that vanished without a word: it closes nothing, and answers nothing. What it held is given back."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from tests.support.processes import Client, Process, Stack, ready, spawned, unused_ports
from tests.support.proxy import proxy
from tests.support.sim_fleet import Fleet
from tests.support.sockets import gives_up_after, peer_of, sockets_of
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.rpc import protocol
from vllm_pd_scheduler.service.app import App

STREAM = {"prompt": "p", "max_tokens": 2000, "ignore_eos": True, "stream": True}
FOUND_WITHIN_S = 15.0


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    """A fleet that takes its time: 20 ms a token."""
    with Fleet(1, 1, arguments=["--decode-base=0.02"]) as running_fleet:
        yield running_fleet


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler of this process looks after its peers more often."""
    monkeypatch.setattr(protocol, "KEEPALIVE_INTERVAL_S", 0.5)
    monkeypatch.setattr(protocol, "KEEPALIVE_TIMEOUT_S", 0.5)


def test_an_envoy_is_found_in_time() -> None:
    assert protocol.KEEPALIVE_INTERVAL_S + protocol.KEEPALIVE_TIMEOUT_S < FOUND_WITHIN_S


@asynccontextmanager
async def scheduler(stack: Stack, fleet: Fleet, **where: object) -> AsyncIterator[App]:
    """A scheduler in this process."""
    config = {**fleet.config(), "admin_port": stack.admin_port, **where}
    async with App(parse_config(config)) as app:
        yield app


async def streaming(client: Client, envoy: Process) -> aiohttp.ClientResponse:
    """An answer that has begun, and that the scheduler knows of."""
    await ready(client, envoy)

    async def routed() -> aiohttp.ClientResponse | None:
        response = await client.session.post(client.stack.url + "/v1/completions", json=STREAM)
        if "x-pd-prefill" in response.headers:
            await response.content.readline()
            return response
        response.close()  # Envoy had not found the scheduler yet
        return None

    async with asyncio.timeout(HUNG_S):
        while (response := await routed()) is None:  # noqa: ASYNC110 - the event is in another process
            await asyncio.sleep(0.05)
    await client.until_in_flight(1)
    return response


async def test_an_envoy_that_cannot_be_reached_any_more(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, impatient: None
) -> None:
    """All that it had open is closed: ext_proc, EDS, the access log. When it is back, all is as before."""
    port = unused_ports(1)[0]
    async with scheduler(stack, fleet, grpc_port=port) as app, proxy(stack.ports.grpc, port) as between:
        with spawned(stack.envoy()) as envoy:
            client = Client(session, stack, fleet)
            response = await streaming(client, envoy)
            between.freeze()
            await client.until_in_flight(0)
            await until(lambda: app.ext_proc.open_streams == 0)

            def no_call() -> bool:
                return not any("_Coroutine._run" in repr(task.get_coro()) for task in asyncio.all_tasks())

            await until(no_call)
            assert app.router.body_memory.used == 0
            await response.content.readline()  # the answer goes on
            between.thaw()

            await client.until_split()
            response.close()


async def test_an_envoy_that_is_stopped_on_a_socket(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, impatient: None
) -> None:
    """The kernel keeps the connection: only an answer to a ping tells that somebody is there."""
    path = str(stack.directory / "grpc")
    stack.ports = replace(stack.ports, grpc_socket=path)
    async with scheduler(stack, fleet, grpc_socket=path) as app:
        with spawned(stack.envoy()) as envoy:
            client = Client(session, stack, fleet)
            response = await streaming(client, envoy)
            os.kill(envoy.process.pid, signal.SIGSTOP)
            try:
                await client.until_in_flight(0)
            finally:
                os.kill(envoy.process.pid, signal.SIGCONT)
            await until(lambda: app.ext_proc.open_streams == 0)
            await response.content.readline()
            response.close()


@pytest.mark.parametrize("way", ["straight", "listener"])
async def test_every_connection_to_an_instance_or_a_client_looks_after_its_peer(
    session: aiohttp.ClientSession, stack: Stack, fleet: Fleet, way: str
) -> None:
    """Envoy and the scheduler have pings for each other; for all others there is TCP's keepalive."""
    config = fleet.config() | (stack.listener if way == "listener" else {})
    with spawned(stack.serve(config)) as process, spawned(stack.envoy()) as envoy:
        response = await streaming(Client(session, stack, fleet), envoy)
        instances = {each.port for each in fleet.instances}
        listeners = {stack.ports.ingress, stack.ports.prefill}
        seen = set()
        for name, pid in (("scheduler", process.process.pid), ("envoy", envoy.process.pid)):
            with sockets_of(pid) as sockets:
                for one in sockets:
                    peer = peer_of(one)
                    if not isinstance(peer, tuple):
                        continue
                    to, at = peer[1], one.getsockname()[1]
                    if to in instances or (name == "scheduler" and to in listeners):
                        seen.add((name, "to"))
                        silent, sending = gives_up_after(one)
                        assert 0 < sending <= FOUND_WITHIN_S, (name, to)
                    elif name == "envoy" and at in listeners:
                        seen.add((name, "from"))
                        silent, _ = gives_up_after(one)
                    else:
                        continue
                    assert silent <= FOUND_WITHIN_S, (name, at, to)
        assert seen == {("scheduler", "to"), ("envoy", "to"), ("envoy", "from")}
        response.close()
