"""The drain of an Envoy that somebody else runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aiohttp import web
from typer.testing import CliRunner

from tests.support.processes import unused_ports
from tests.support.waiting import until
from vllm_pd_scheduler.cli import app
from vllm_pd_scheduler.envoy import drain
from vllm_pd_scheduler.envoy.drain import begin_drain, finish_drain


class EnvoyAdmin:
    """What Envoy's admin is asked, and the numbers of requests that it tells, one after the other."""

    def __init__(self, *active: int) -> None:
        self.asked: list[str] = []
        self.active = list(active)
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(f"{request.method} {request.path_qs}")
        if request.method == "POST":
            return web.Response(text="OK\n")
        active = self.active.pop(0) if len(self.active) > 1 else self.active[0]
        return web.Response(text=f"http.ingress.downstream_rq_active: {active}\n")


@pytest_asyncio.fixture
async def envoy(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EnvoyAdmin]:
    monkeypatch.setattr(drain, "DRAIN_TIME_S", 0)
    monkeypatch.setattr(drain, "_POLL_S", 0.001)
    fake, server = EnvoyAdmin(2, 1, 0), web.Application()
    server.router.add_route("*", "/{path:.*}", fake.answer)
    runner = web.AppRunner(server)
    await runner.setup()
    (port,) = unused_ports(1)
    await web.TCPSite(runner, "127.0.0.1", port).start()
    fake.url = f"http://127.0.0.1:{port}"
    yield fake
    await runner.cleanup()


async def test_load_balancers_are_told_first(envoy: EnvoyAdmin) -> None:
    assert await begin_drain(envoy.url)
    assert envoy.asked == ["POST /healthcheck/fail", "POST /drain_listeners?graceful"]


async def test_it_waits_until_nothing_runs(envoy: EnvoyAdmin) -> None:
    assert await finish_drain(envoy.url, 60) == 0
    assert len(envoy.asked) == 3


async def test_it_says_what_still_runs(envoy: EnvoyAdmin) -> None:
    envoy.active = [7]
    assert await finish_drain(envoy.url, 0.05) == 7


async def test_it_waits_for_those_that_load_balancers_still_send(
    envoy: EnvoyAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain, "DRAIN_TIME_S", 3600)
    envoy.active = [0]
    waiting = asyncio.ensure_future(finish_drain(envoy.url, 3600))

    async def asked_again() -> bool:
        return len(envoy.asked) > 4

    await until(asked_again)
    assert not waiting.done()
    waiting.cancel()


async def test_an_envoy_that_has_ended_has_no_requests() -> None:
    (port,) = unused_ports(1)
    assert not await begin_drain(f"http://127.0.0.1:{port}")
    assert await finish_drain(f"http://127.0.0.1:{port}", 60) == 0


async def test_the_command_says_that_there_is_none() -> None:
    (port,) = unused_ports(1)
    done = await asyncio.to_thread(CliRunner().invoke, app, ["drain-envoy", f"--envoy-admin-port={port}"])
    assert done.exit_code == 0, "it has ended, which a pod's preStop may find"
    assert f"no Envoy answers at http://127.0.0.1:{port}" in done.stderr


async def test_the_command_fails_if_some_still_run(envoy: EnvoyAdmin) -> None:
    envoy.active = [7]
    port = envoy.url.rpartition(":")[2]
    command = ["drain-envoy", "--timeout=0.05", f"--envoy-admin-port={port}"]
    done = await asyncio.to_thread(CliRunner().invoke, app, command)
    assert done.exit_code == 1
    assert "7 requests still run in Envoy after 0.05 s" in done.output
