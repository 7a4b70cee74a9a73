"""``GET /decisions``: which are shown, in which order, and what is refused."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from tests.support.admin import Admin
from vllm_pd_scheduler.admin.decisions_api import DecisionsApi
from vllm_pd_scheduler.admin.http_server import add_routes
from vllm_pd_scheduler.records.decisions import MAX_DECISIONS, Decisions

COMPLETION = {":method": "POST", ":path": "/v1/completions"}


@pytest_asyncio.fixture
async def admin() -> AsyncIterator[Admin]:
    found = Admin()
    await found.serve()
    found.healthy("p0", "d0")
    yield found
    await found.client.close()


async def route(admin: Admin, count: int = 1) -> None:
    for number in range(count):
        await admin.router.route({**COMPLETION, "x-request-id": f"r{number}"}, b'{"prompt": "why?"}')


async def numbers(admin: Admin, query: str = "") -> list[int]:
    status, found = await admin.ask("GET", f"/decisions{query}")
    assert status == 200, found
    return [each["number"] for each in found["decisions"]]


async def test_the_newest_come_first(admin: Admin) -> None:
    assert await numbers(admin) == []
    await route(admin, 5)
    assert await numbers(admin) == [5, 4, 3, 2, 1]
    assert await numbers(admin, "?limit=2") == [5, 4]
    assert await numbers(admin, "?since=3") == [5, 4]
    assert await numbers(admin, "?since=5") == []
    assert await numbers(admin, "?request_id=r1") == [2]
    assert await numbers(admin, "?request_id=r1&since=2") == []
    assert await numbers(admin, "?request_id=nobody") == []


async def test_after_a_restart_all_are_new(admin: Admin) -> None:
    await route(admin, 3)
    assert await numbers(admin, "?since=4711") == [3, 2, 1]


@pytest.mark.parametrize("set_back_s", [0.0, 3600.0])
async def test_those_of_all_workers_are_shown_also_when_the_clock_was_set_back(
    admin: Admin, set_back_s: float
) -> None:
    await route(admin, 3)
    decisions = Decisions(time.monotonic, lambda: time.time() + set_back_s, several=True)
    for each in admin.router.decisions.after(0):
        decisions.add(each)
    _, others_answer = await admin.ask("GET", "/decisions?limit=1")
    others = mock.Mock()
    others.get = mock.AsyncMock(return_value=[json.dumps(others_answer).encode()])
    app = web.Application()
    add_routes(app, DecisionsApi(decisions, others).routes())
    async with TestClient(TestServer(app)) as client, client.get("/decisions") as answer:
        found = await answer.json()
    assert len(found["decisions"]) == 4


async def test_no_more_than_asked_for(admin: Admin) -> None:
    await route(admin, MAX_DECISIONS + 1)
    assert len(await numbers(admin)) == 100
    assert len(await numbers(admin, f"?limit={MAX_DECISIONS}")) == MAX_DECISIONS


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "since=-1", "since=x", "id=r1", "limit=1&limit=2"]
)
async def test_what_is_wrong_is_refused(admin: Admin, query: str) -> None:
    status, found = await admin.ask("GET", f"/decisions?{query}")
    assert status == 400
    assert query.partition("=")[0] in found["error"]


async def test_nothing_secret_is_shown(admin: Admin) -> None:
    headers: dict[str, Any] = {**COMPLETION, "authorization": "Bearer sk-client", "cookie": "own"}
    await admin.router.route(headers, b'{"prompt": "whose secret?", "user": "somebody"}')
    _, found = await admin.ask("GET", "/decisions")
    for secret in ("sk-client", "sk-secret", "own", "whose", "somebody"):
        assert secret not in str(found)
