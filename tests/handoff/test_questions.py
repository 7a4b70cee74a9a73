"""What P is asked before requests are split with it: once for each process, shared, and never for long."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from tests.support.processes import unused_ports
from tests.support.waiting import until
from vllm_pd_scheduler.connectors import Attempt, Connectors, Question
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.handoff import questions
from vllm_pd_scheduler.handoff.interfaces import LocalShortage, PrefillFailed
from vllm_pd_scheduler.handoff.questions import Questions
from vllm_pd_scheduler.models import ConnectorChoice, InstanceRole, PDInstance


def engines(name: str) -> dict[str, Any]:
    return {"0": {"engine_id": name, "worker_addr": {"0": {"0": "tcp://10.0.0.1:4"}}}}


class Bootstrap:
    """A bootstrap server that answers as it is told."""

    def __init__(self) -> None:
        self.asked = 0
        self.port = 0
        self.name = "e0"
        self.answer: Callable[[], web.StreamResponse] = lambda: web.json_response(engines(self.name))
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        assert request.path == "/query"
        self.asked += 1
        await self.go_on.wait()
        return self.answer()


class Stage:
    """One P, and who asks it."""

    def __init__(
        self, session: aiohttp.ClientSession, port: int, name: str = "mooncake", key: str = "bootstrap_port"
    ) -> None:
        choice = ConnectorChoice(name, ((key, port),))
        self.registry = Registry()
        self.endpoint = self.registry.add(
            PDInstance("p0", InstanceRole.PREFILL, "127.0.0.1", 8000, connector=choice)
        )
        self.connectors = Connectors(lambda: choice)
        self.questions = Questions(session, self.registry)

    def attempt(self) -> Attempt:
        return self.connectors.attempt(self.endpoint)

    async def ask(self, endpoint: Endpoint | None = None) -> Any:
        attempt = self.attempt()
        question = attempt.question()
        assert isinstance(question, Question)
        return await self.questions(endpoint or self.endpoint, question, attempt)


@pytest_asyncio.fixture
async def bootstrap() -> AsyncIterator[Bootstrap]:
    made = Bootstrap()
    runner = web.ServerRunner(web.Server(made), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.port = runner.addresses[0][1]
    yield made
    made.go_on.set()
    await runner.cleanup()


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


@pytest_asyncio.fixture
async def stage(session: aiohttp.ClientSession, bootstrap: Bootstrap) -> AsyncIterator[Stage]:
    made = Stage(session, bootstrap.port)
    yield made
    await made.questions.close()


async def test_each_process_is_asked_once(stage: Stage, bootstrap: Bootstrap) -> None:
    stage.registry.started(stage.endpoint, 100.0)
    assert [await stage.ask() for _ in range(3)] == [((0, "e0"),)] * 3
    assert bootstrap.asked == 1
    bootstrap.name = "e1"
    stage.registry.started(stage.endpoint, 200.0)
    assert [await stage.ask() for _ in range(3)] == [((0, "e1"),)] * 3
    assert bootstrap.asked == 2


async def test_one_that_has_failed_is_asked_again(stage: Stage, bootstrap: Bootstrap) -> None:
    await stage.ask()
    bootstrap.name = "e1"
    stage.questions.forget(stage.endpoint)
    assert await stage.ask() == ((0, "e1"),)


async def test_those_who_come_at_once_share_a_question(stage: Stage, bootstrap: Bootstrap) -> None:
    bootstrap.go_on.clear()
    asking = [asyncio.ensure_future(stage.ask()) for _ in range(5)]
    await until(lambda: bootstrap.asked)
    asking[0].cancel()  # the first one's client leaves
    await asyncio.wait([asking[0]])
    bootstrap.go_on.set()
    assert await asyncio.gather(*asking[1:]) == [((0, "e0"),)] * 4
    assert bootstrap.asked == 1


async def test_no_answer_in_time(stage: Stage, bootstrap: Bootstrap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "TIMEOUT_S", 0.05)
    bootstrap.go_on.clear()
    found = await asyncio.gather(*(stage.ask() for _ in range(3)), return_exceptions=True)
    assert [(type(each), str(each)) for each in found] == [(PrefillFailed, "question_timeout")] * 3
    assert bootstrap.asked == 1
    bootstrap.go_on.set()
    monkeypatch.setattr(questions, "TIMEOUT_S", 60.0)
    assert await stage.ask() == ((0, "e0"),), "a failure is not remembered"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda: web.Response(status=500), "question_status"),
        (lambda: web.Response(status=302, headers={"location": "/query"}), "question_status"),
        (lambda: web.Response(text="<html>"), "question_nonsense"),
        (lambda: web.json_response({}), "question_nonsense"),
        (lambda: web.Response(body=b"\x1f\x8b", headers={"content-encoding": "gzip"}), "question_nonsense"),
        (lambda: web.Response(body=b" " * (questions.MAX_ANSWER_BYTES + 1)), "question_nonsense"),
    ],
)
async def test_an_answer_that_is_none(
    stage: Stage, bootstrap: Bootstrap, answer: Callable[[], web.Response], reason: str
) -> None:
    bootstrap.answer = answer
    with pytest.raises(PrefillFailed) as caught:
        await stage.ask()
    assert str(caught.value) == reason
    assert not caught.value.lost


async def test_nobody_there(session: aiohttp.ClientSession) -> None:
    stage = Stage(session, unused_ports(1)[0])
    with pytest.raises(PrefillFailed, match="question_connect"):
        await stage.ask()


async def test_what_is_no_http(session: aiohttp.ClientSession) -> None:
    async def junk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        writer.close()

    async with await asyncio.start_server(junk, "127.0.0.1", 0) as server:
        stage = Stage(session, server.sockets[0].getsockname()[1])
        with pytest.raises(PrefillFailed, match="question_reset"):
            await stage.ask()


async def test_a_shortage_of_our_own_is_not_the_instances_fault(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise aiohttp.ClientConnectorError(None, OSError(24, "Too many open files"))  # type: ignore[arg-type]

    monkeypatch.setattr(stage.questions, "_session", type("Session", (), {"get": full})())
    with pytest.raises(LocalShortage):
        await stage.ask()


async def test_answers_of_instances_that_have_left_are_dropped(stage: Stage, bootstrap: Bootstrap) -> None:
    await stage.ask()
    stage.registry.remove("p0")
    choice = stage.endpoint.instance.connector
    other = stage.registry.add(PDInstance("p1", InstanceRole.PREFILL, "127.0.0.1", 8001, connector=choice))
    await stage.ask(other)
    assert list(stage.questions._answers) == [other]


async def test_a_wrong_port_is_logged_once(
    session: aiohttp.ClientSession, bootstrap: Bootstrap, caplog: pytest.LogCaptureFixture
) -> None:
    """A fleet of one P has no other sign of it: D serves all requests alone."""
    (unused,) = unused_ports(1)
    wrong = Stage(session, unused)
    for _ in range(3):
        with pytest.raises(PrefillFailed):
            await wrong.ask()
    assert [each.message for each in caplog.records] == [
        f"p0: http://127.0.0.1:{unused}/query does not answer as its connector needs it (question_connect); "
        "it prefills nothing for others"
    ]
    stage = Stage(session, bootstrap.port)
    good = bootstrap.answer
    for bad in (True, True, False, True):
        bootstrap.answer = (lambda: web.Response(status=500)) if bad else good
        with contextlib.suppress(PrefillFailed):
            await stage.ask()
        stage.questions.forget(stage.endpoint)
    assert len(caplog.records) == 3, "again after it has answered"


async def test_a_port_that_only_has_to_take_a_connection(
    session: aiohttp.ClientSession, bootstrap: Bootstrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Stage(session, bootstrap.port, "offloading-p2p", "p2p_port")
    assert [await there.ask() for _ in range(2)] == [True, True]
    away = Stage(session, unused_ports(1)[0], "offloading-p2p", "p2p_port")
    with pytest.raises(PrefillFailed, match="question_connect"):
        await away.ask()
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    monkeypatch.setattr(questions, "TIMEOUT_S", 0.1)
    with full, contextlib.ExitStack() as waiting:
        for _ in range(8):  # until the kernel takes no more
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        with pytest.raises(PrefillFailed, match="question_timeout"):
            await Stage(session, full.getsockname()[1], "offloading-p2p", "p2p_port").ask()
