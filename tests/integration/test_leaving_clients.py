"""A client that leaves just when the scheduler answers: whether its hand-off is in use only Envoy knows."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.support.processes import Client, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.envoy.ext_proc.exchange import Exchange
from vllm_pd_scheduler.envoy.ext_proc.stream import Answer, Reply
from vllm_pd_scheduler.handoff.pending import PendingHandoff
from vllm_pd_scheduler.service.app import App

PATH = "/v1/completions"
STREAM = {"prompt": "Where is the cache?", "max_tokens": 2000, "ignore_eos": True, "stream": True}


class Stage:
    """A scheduler in this process, and a client of its Envoy."""

    def __init__(self, app: App, client: Client) -> None:
        self.app = app
        self.client = client
        self.freed: list[PendingHandoff] = []
        app.router.in_flight.handoffs.release = self.freed.append

    async def ended(self) -> None:
        async def no_stream() -> bool:
            return self.app.ext_proc.open_streams == 0

        await until(no_stream)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(1, 1, arguments=["--decode-base=0.02"]) as running:
        yield running


@pytest_asyncio.fixture
async def stage(fleet: Fleet, tmp_path: Path, session: aiohttp.ClientSession) -> AsyncIterator[Stage]:
    stack = Stack(tmp_path)
    where = {"grpc_port": stack.ports.grpc, "admin_port": stack.admin_port}
    async with App(parse_config({**fleet.config(), **where})) as app:
        with spawned(stack.envoy()) as envoy:
            client = Client(session, stack, fleet)
            await ready(client, envoy)

            await client.until_split()
            stage = Stage(app, client)
            await stage.ended()
            yield stage
            await client.fault("decode-0")


async def test_one_that_decode_uses_is_not_freed(stage: Stage) -> None:
    client = stage.client
    before = (await client.seen_by_all())["decode-0"]
    async with client.session.post(client.stack.url + PATH, json=STREAM) as response:
        assert response.headers["x-pd-prefill"] == "prefill-0"
        await response.content.readline()  # decode answers
    await stage.ended()  # Envoy has cancelled the call
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
    await stage.ended()

    async def freed() -> bool:
        return bool(stage.freed)

    await until(freed)
    assert len(stage.freed) == 1


@pytest.mark.parametrize("when", ["before", "after"])
async def test_one_that_leaves_as_the_answer_is_written(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Envoy finds that it has left before it reads the answer: it tells of a request without our id."""
    answer, clients = Exchange._answer, list[socket.socket]()

    def leave(exchange: Exchange, reply: Reply) -> None:
        if when == "before" and isinstance(reply, Answer):
            clients.pop().close()
        answer(exchange, reply)
        if when == "after" and isinstance(reply, Answer):
            clients.pop().close()

    monkeypatch.setattr(Exchange, "_answer", leave)
    count = 20
    body = json.dumps(STREAM).encode()
    head = b"POST %s HTTP/1.1\r\nhost: vllm\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    for _ in range(count):
        clients.append(socket.create_connection(("127.0.0.1", stage.client.stack.ports.ingress)))
        clients[-1].sendall(head % (PATH.encode(), len(body)) + body)
        await until(lambda: not clients)
        await stage.ended()
    await until(lambda: len(stage.freed) >= count)
    assert len({id(pending) for pending in stage.freed}) == len(stage.freed) == count
