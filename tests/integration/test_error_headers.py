"""Headers that errors bring, whoever makes them: the request's id, and what a web page needs to read them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.processes import Answer, Client, Process, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.sim.profile import EngineProfile

PAGE = "https://app.example"
OTHER = "https://other.example"
ALLOW = "access-control-allow-origin"
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Instances that let one web page read their answers."""
    arguments = ["--max-model-len=4096", f'--allowed-origins=["{PAGE}"]']
    with Fleet(2, 2, profile=EngineProfile.instant(), arguments=arguments) as running:
        yield running


async def from_page(client: Client, page: str, path: str, body: Any = None, method: str = "POST") -> Answer:
    """Send a request as a web page does, and check that its id comes back, once."""
    answer = await client.send(method, path, body, {"origin": page, "x-request-id": "the-id"})
    assert answer.headers["x-request-id"] == "the-id"
    return answer


def readable(answer: Answer) -> bool:
    exposed = answer.headers.get("access-control-expose-headers", "")
    return answer.headers.get(ALLOW) == "*" and "x-request-id" in exposed and "retry-after" in exposed


async def test_answers_are_the_instances_to_show(client: Client) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "p", "max_tokens": 2}),
        ("/v1/completions", {"prompt": "p", "max_tokens": 2, "n": 2}),
        ("/v1/completions", {"prompt": "p", "max_tokens": 2, "stream": True}),
        ("/tokenize", {"prompt": "p"}),
    ):
        assert (await from_page(client, PAGE, path, body)).headers[ALLOW] == PAGE
        assert ALLOW not in (await from_page(client, OTHER, path, body)).headers


@pytest_asyncio.fixture
async def strict(session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path) -> AsyncIterator[Client]:
    """A client of a stack in which D does not prefill, so that P's word is the answer."""
    stack = Stack(tmp_path)
    with spawned(stack.up({**fleet.config(), "on_prefill_failure": "fail"})) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        yield client


async def test_so_are_errors_of_p(strict: Client) -> None:
    for body in ({"prompt": 17}, {"prompt": {"no": "text"}}):
        answer = await from_page(strict, PAGE, "/v1/completions", body)
        assert (answer.status in (400, 404), answer.headers[ALLOW]) == (True, PAGE)
        assert "x-pd-decode" not in answer.headers
        assert ALLOW not in (await from_page(strict, OTHER, "/v1/completions", body)).headers


async def test_so_are_errors_of_d(client: Client) -> None:
    for body in ({"prompt": 17}, {"prompt": "p", "n": 0}):
        answer = await from_page(client, PAGE, "/v1/completions", body)
        assert (answer.status in (400, 404), answer.headers[ALLOW]) == (True, PAGE)
        assert ALLOW not in (await from_page(client, OTHER, "/v1/completions", body)).headers


async def test_a_page_asks_before_it_asks(client: Client) -> None:
    headers = {"origin": PAGE, **PREFLIGHT}
    answer = await client.send("OPTIONS", "/v1/chat/completions", headers=headers)
    assert (answer.status, answer.headers[ALLOW]) == (200, PAGE)
    assert answer.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
    answer = await client.send("OPTIONS", "/v1/chat/completions", headers={**headers, "origin": OTHER})
    assert (answer.status, ALLOW in answer.headers) == (400, False)


async def test_errors_of_the_schedulers(client: Client) -> None:
    for path, body in (("/v1/completions", b"{"), ("/tokenize", b"[" * 1000)):
        answer = await from_page(client, PAGE, path, body)
        assert (answer.status, readable(answer)) == (400, True)
    answer = await from_page(client, PAGE, "/v1/completions", {"prompt": "p", "model": "none"})
    assert (answer.status, readable(answer)) == (404, True)


async def test_errors_of_envoys(client: Client) -> None:
    for path, body, status in (
        ("/metrics", None, 404),
        ("/v1/completions%00", b"{}", 400),
        ("/v1/completions", b"p" * (65 << 20), 413),
    ):
        answer = await from_page(client, PAGE, path, body)
        assert (answer.status, readable(answer)) == (status, True)
        assert answer.error["message"]


async def test_an_id_is_made_for_those_that_bring_none(client: Client) -> None:
    found = [(await client.post("/v1/completions", body)).headers["x-request-id"] for body in (b"{", b"[")]
    assert len({*found, ""}) == 3


# -- with nobody to serve


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def forsaken(
    fleet: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Client, Process]]:
    """A stack whose fleet is elsewhere, and its scheduler."""
    stack = Stack(Path(tmp_path_factory.mktemp("forsaken")))
    gone = {
        f"{role}_instances": [{"id": role, "host": "127.0.0.1", "port": port}]
        for port, role in enumerate(("prefill", "decode"), 1)
    }
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=HUNG_S)) as session:
        client = Client(session, stack, fleet)
        with spawned(stack.envoy()), spawned(stack.serve(gone)) as scheduler:
            yield client, scheduler


@pytest.mark.asyncio(loop_scope="module")
async def test_nobody_can_serve(forsaken: tuple[Client, Process]) -> None:
    client, scheduler = forsaken
    answers: list[Answer] = []

    async def refused() -> bool:
        with contextlib.suppress(aiohttp.ClientConnectionError):
            answers.append(await from_page(client, PAGE, "/v1/completions", {"prompt": "p"}))
        return bool(answers) and answers[-1].headers.get("x-pd-reason") == "no_decode"

    await until(refused)
    answer = answers[-1]
    assert (answer.status, answer.headers["retry-after"], readable(answer)) == (503, "1", True)
    scheduler.process.kill()
    await asyncio.to_thread(scheduler.wait)
    answer = await from_page(client, PAGE, "/v1/completions", {"prompt": "p"})
    assert (answer.status, answer.headers["retry-after"], readable(answer)) == (503, "1", True)
    assert "x-pd-reason" not in answer.headers
    answer = await from_page(client, PAGE, "/v1/completions", {"kv_transfer_params": {}})
    assert (answer.status, readable(answer)) == (400, True)
