"""``GET /events``: as JSON, and as a stream over a real socket."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

import aiohttp
import pytest
import pytest_asyncio

from tests.support.admin import NEW, Admin
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.admin import event_stream
from vllm_pd_scheduler.models import By
from vllm_pd_scheduler.records.events import MAX_EVENTS, EventKind

ME = "admin 127.0.0.1"
STREAM = {"accept": "text/event-stream"}


@pytest_asyncio.fixture
async def admin() -> AsyncIterator[Admin]:
    found = Admin()
    await found.serve()
    yield found
    await found.client.close()


def add(admin: Admin, count: int = 1, text: str = "something") -> None:
    for _ in range(count):
        admin.router.events.add(EventKind.STATE, text, by=By.PROBE)


async def shown(admin: Admin, query: str = "") -> list[Any]:
    status, body = await admin.ask("GET", f"/events{query}")
    assert status == 200, body
    found: list[Any] = body["events"]
    return found


class TestJson:
    async def test_every_change_by_an_operator(self, admin: Admin, caplog: pytest.LogCaptureFixture) -> None:
        admin.healthy("d0")
        caplog.set_level(logging.INFO, "vllm_pd_scheduler")
        before = admin.router.events.newest
        await admin.ask("POST", "/instances", NEW)
        admin.healthy("d1")
        await admin.ask("POST", "/instances/d1/drain")
        await admin.ask("POST", "/instances/d1/undrain")
        await admin.ask("DELETE", "/instances/d1")
        await admin.ask("PUT", "/strategy", {"decode_strategy": "weighted"})
        await admin.ask("PUT", "/strategy", {"strategy": "weighted"})
        await admin.ask("PUT", "/shadow", {"strategy": "slo"})
        await admin.ask("DELETE", "/shadow")
        events = [
            ("state", "d1", "d1 was added: decode, 10.0.0.3:8201", ME),
            ("state", "d1", "d1 is healthy", "probe"),
            ("state", "d1", "d1 is draining", ME),
            ("state", "d1", "d1 is drained: nothing that was sent there is left", ME),
            ("state", "d1", "d1 is healthy", ME),
            ("state", "d1", "d1 was removed", ME),
            ("strategy", None, "strategy is least_load/weighted, no longer least_load", ME),
            ("strategy", None, "strategy is weighted, no longer least_load/weighted", ME),
            ("shadow", None, "shadow strategy is slo", ME),
            ("shadow", None, "shadow strategy is none, no longer slo", ME),
        ]
        found = await shown(admin, f"?since={before}")
        assert [(e["kind"], e["subject"], e["text"], e["by"]) for e in reversed(found)] == events
        logged = [record.getMessage().removesuffix(f" (by {ME})") for record in caplog.records]
        assert logged == [text for _, _, text, _ in events]

    async def test_the_log_level(self, admin: Admin) -> None:
        before = logging.getLogger().level
        try:
            await admin.ask("PUT", "/log-level", {"level": "DEBUG"})
        finally:
            logging.getLogger().setLevel(before)
        newest = (await shown(admin, "?limit=1"))[0]
        assert (newest["kind"], newest["text"], newest["by"]) == ("log_level", "log level is DEBUG", ME)

    async def test_what_is_refused_is_no_event(self, admin: Admin) -> None:
        before = admin.router.events.newest
        assert (await admin.ask("PUT", "/strategy", {"strategy": "fastest"}))[0] == 400
        assert (await admin.ask("POST", "/instances", {**NEW, "id": "d0"}))[0] == 409
        assert (await admin.ask("DELETE", "/instances/nobody"))[0] == 404
        assert admin.router.events.newest == before

    async def test_newest_first_and_no_more_than_asked_for(self, admin: Admin) -> None:
        add(admin, MAX_EVENTS + 5)
        newest = admin.router.events.newest
        numbers = [event["number"] for event in await shown(admin)]
        assert numbers == list(range(newest, newest - MAX_EVENTS, -1))
        assert [e["number"] for e in await shown(admin, "?limit=2")] == [newest, newest - 1]
        assert [e["number"] for e in await shown(admin, f"?since={newest - 1}")] == [newest]
        assert await shown(admin, f"?since={newest}") == []
        assert len(await shown(admin, f"?since={newest + 1}")) == MAX_EVENTS, "from before a restart"

    @pytest.mark.parametrize("query", ["limit=0", "limit=1001", "since=-1", "since=x", "limit=", "after=1"])
    async def test_a_query_that_cannot_be(self, admin: Admin, query: str) -> None:
        status, body = await admin.ask("GET", f"/events?{query}")
        assert status == 400
        assert body["error"].startswith(("limit: ", "since: ", "query: unknown key 'after'"))

    async def test_head_ends_whatever_is_accepted(self, admin: Admin) -> None:
        async with admin.client.request("HEAD", "/events", headers=STREAM) as response:
            assert (response.status, response.content_type) == (200, "application/json")


class Reader:
    """Reads a stream."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def next(self) -> str:
        """Return the next event or comment."""
        async with asyncio.timeout(HUNG_S):
            return (await self.response.content.readuntil(b"\n\n")).decode()

    async def number(self) -> int:
        """Return the number of the next event, comments left out."""
        while (text := await self.next()).startswith(":"):
            pass
        first, second, *_ = text.splitlines()
        event = json.loads(second.removeprefix("data: "))
        assert first == f"id: {event['number']}"
        return int(event["number"])


class TestStream:
    async def open(self, admin: Admin, query: str = "", **headers: str) -> Reader:
        response = await admin.client.request("GET", f"/events{query}", headers={**STREAM, **headers})
        assert (response.status, response.content_type) == (200, "text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        reader = Reader(response)
        assert (await reader.next()).startswith(":")
        return reader

    async def test_a_new_reader_hears_of_what_happens_from_now_on(self, admin: Admin) -> None:
        add(admin, 3)
        newest = admin.router.events.newest
        reader = await self.open(admin)
        add(admin, 2)
        assert [await reader.number() for _ in range(2)] == [newest + 1, newest + 2]

    async def test_one_that_comes_again_misses_nothing(self, admin: Admin) -> None:
        add(admin, 150)
        newest = admin.router.events.newest
        by_query = await self.open(admin, f"?since={newest - 130}")
        by_header = await self.open(admin, "?since=1", **{"last-event-id": str(newest - 130)})
        for reader in (by_query, by_header):
            expected = list(range(newest - 129, newest + 1))
            assert [await reader.number() for _ in expected] == expected

    @pytest.mark.parametrize("number", ["x", "-1", "1" * 19, "\u0661"])
    async def test_a_last_event_id_that_cannot_be(self, admin: Admin, number: str) -> None:
        headers = {**STREAM, "last-event-id": number}
        async with admin.client.request("GET", "/events", headers=headers) as response:
            assert response.status == 400
            assert (await response.json())["error"] == "last-event-id: must be the number of an event"

    async def test_silence_is_kept_alive(self, admin: Admin) -> None:
        with mock.patch.object(event_stream, "KEEP_ALIVE_S", 0.01):
            reader = await self.open(admin)
            assert await reader.next() == ": still here\n\n"
            add(admin)
            assert await reader.number() == admin.router.events.newest

    async def test_one_that_leaves_is_forgotten(self, admin: Admin) -> None:
        with mock.patch.object(event_stream, "KEEP_ALIVE_S", 0.01):
            reader = await self.open(admin)
            assert admin.router.events._listeners
            reader.response.close()
            await until(lambda: not admin.router.events._listeners)

    async def test_a_slow_one_is_cut_off(self, admin: Admin) -> None:
        """Nothing is put by for it: while it reads nothing, the server waits with one chunk."""
        with mock.patch.object(event_stream, "SLOW_S", 0.2):
            host, port = str(admin.client.server.host), int(admin.client.server.port or 0)
            with socket.socket() as slow:
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                slow.connect((host, port))
                slow.sendall(b"GET /events HTTP/1.1\r\nhost: localhost\r\naccept: text/event-stream\r\n\r\n")
                await until(lambda: admin.router.events._listeners)

                def dropped() -> bool:
                    add(admin, 20, "x" * 10_000)
                    return not admin.router.events._listeners

                await until(dropped)
        assert (await admin.ask("GET", "/healthz"))[0] == 200

    async def test_all_end_when_the_server_stops(self, admin: Admin) -> None:
        readers = [await self.open(admin) for _ in range(3)]
        stopped = asyncio.ensure_future(admin.client.server.close())
        for reader in readers:
            async with asyncio.timeout(HUNG_S):
                assert await reader.response.content.read() == b"", "ended, not cut"
        await stopped
        assert not admin.router.events._listeners
