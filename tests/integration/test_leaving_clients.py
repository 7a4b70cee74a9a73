"""A client that leaves just when the scheduler answers: whether its hand-off is in use only Envoy knows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.processes import Client, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.envoy.ext_proc import ExtProcService
from vllm_pd_scheduler.handoff.pending import PendingHandoff
from vllm_pd_scheduler.service.app import App

PATH = "/v1/completions"
STREAM = {"prompt": "Where is the cache?", "max_tokens": 2000, "ignore_eos": True, "stream": True}


class Call:
    """A call of Envoy's. Its answer goes out at once; that it did is known when ``known`` is set."""

    known = asyncio.Event()

    def __init__(self, context: Any) -> None:
        self._context = context
        self._written = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, data: bytes) -> None:
        await self._context.write(data)
        self._written += 1
        if self._written == 2:  # the first one answers the headers
            await Call.known.wait()


class Stage:
    """A scheduler in this process, and a client of its Envoy."""

    def __init__(self, app: App, client: Client) -> None:
        self.app = app
        self.client = client
        self.freed: list[PendingHandoff] = []
        app.router.in_flight.release_handoff = self.freed.append

    async def ended(self) -> None:
        async def no_stream() -> bool:
            return self.app.ext_proc.open_streams == 0

        await until(no_stream)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 1, arguments=["--decode-base=0.02"]) as running:
        yield running


@pytest_asyncio.fixture
async def stage(
    fleet: Fleet, tmp_path: Path, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Stage]:
    stack = Stack(tmp_path)
    where = {"grpc_port": stack.ports.grpc, "admin_port": stack.admin_port}
    process = ExtProcService._process

    async def slow_to_learn(service: ExtProcService, _: object, context: Any) -> None:
        await process(service, _, Call(context))

    monkeypatch.setattr(ExtProcService, "_process", slow_to_learn)
    Call.known = asyncio.Event()
    Call.known.set()
    async with App(parse_config({**fleet.config(), **where})) as app:
        with spawned(stack.envoy()) as envoy:
            client = Client(session, stack, fleet)
            await ready(client, envoy)

            await client.until_split()
            stage = Stage(app, client)
            await stage.ended()
            Call.known.clear()
            yield stage
            await client.fault("decode-0")


async def test_one_that_decode_uses_is_not_freed(stage: Stage) -> None:
    client = stage.client
    before = (await client.seen_by_all())["decode-0"]
    async with client.session.post(client.stack.url + PATH, json=STREAM) as response:
        assert response.headers["x-pd-prefill"] == "prefill-0"
        await response.content.readline()  # decode answers
    await asyncio.sleep(0.1)  # Envoy cancels the call
    assert stage.freed == []
    Call.known.set()
    await stage.ended()
    assert ["good"] in [each["outcomes"] for each in await client.seen_since("decode-0", before)]
    assert stage.freed == []


async def test_one_that_decode_has_not_begun_with_is_freed_once_when_envoy_tells(stage: Stage) -> None:
    client = stage.client
    before = (await client.seen_by_all())["decode-0"]
    await client.fault("decode-0", delay=30)
    request = asyncio.ensure_future(client.post(PATH, STREAM))

    async def forwarded() -> bool:
        return bool(await client.seen_since("decode-0", before))

    await until(forwarded)
    request.cancel()
    await asyncio.sleep(0.1)
    assert stage.freed == [], "that the client has left says nothing of what Envoy has"
    Call.known.set()
    await stage.ended()

    async def freed() -> bool:
        return bool(stage.freed)

    await until(freed)
    assert len(stage.freed) == 1
