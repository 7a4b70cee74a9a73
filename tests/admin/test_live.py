"""The streams of the dashboard, and the history of its charts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

import aiohttp
import pytest_asyncio

from tests.support.admin import Admin
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.admin import live_feed
from vllm_pd_scheduler.admin.live_feed import KEPT_TICKS, LiveFeed, Look
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.records.decision import Decision
from vllm_pd_scheduler.records.decisions import Decisions
from vllm_pd_scheduler.records.events import EventKind, Events
from vllm_pd_scheduler.telemetry import Ending, Served


@pytest_asyncio.fixture
async def admin() -> AsyncIterator[Admin]:
    found = Admin()
    with mock.patch.object(live_feed, "TICK_S", 0.01):
        await found.serve()
        yield found
        await found.client.close()


class Reader:
    """Reads a stream of events that have names."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    @classmethod
    async def open(cls, admin: Admin) -> Reader:
        response = await admin.client.get("/live")
        assert (response.status, response.content_type) == (200, "text/event-stream")
        return cls(response)

    async def next(self) -> tuple[str, Any]:
        """Return name and data of the next event."""
        while True:
            async with asyncio.timeout(HUNG_S):
                text = (await self.response.content.readuntil(b"\n\n")).decode()
            if not text.startswith(":"):
                name, data = text.strip().split("\n")
                return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    async def until(self, wanted: str, **fields: Any) -> Any:
        """Return the data of the next event of this name in whose first instance these fields are so."""
        while True:
            name, data = await self.next()
            if name == wanted and (
                not fields or any(each.items() >= fields.items() for each in data["instances"])
            ):
                return data


class TestStream:
    async def test_begins_with_all(self, admin: Admin) -> None:
        name, data = await (await Reader.open(admin)).next()
        assert name == "snapshot"
        assert [each["id"] for each in data["instances"]] == ["p0", "d0"]
        assert data["metrics_age_s"] == [None, None]
        assert (await admin.ask("GET", "/status"))[1].keys() == data["status"].keys()
        _, listed = await admin.ask("GET", "/instances")
        ages = {"address_age", "metrics_age_s"}
        assert [each.keys() - ages for each in listed["instances"]] == [
            each.keys() for each in data["instances"]
        ]

    async def test_goes_on_with_what_has_changed(self, admin: Admin) -> None:
        reader = await Reader.open(admin)
        await reader.next()
        admin.healthy("d0")
        changes = await reader.until("changes", id="d0")
        fields = {"id": "d0", "state": "healthy", "shown_state": "healthy", "reason": None}
        assert changes["instances"] == [fields]
        assert changes["status"]["ready"] is True
        assert (await reader.until("changes"))["instances"] == []

    async def test_is_whole_again_when_instances_come_and_go(self, admin: Admin) -> None:
        reader = await Reader.open(admin)
        await reader.next()
        admin.router.register_instance(PDInstance("d1", InstanceRole.DECODE, "10.0.0.9", 1))
        assert [each["id"] for each in (await reader.until("snapshot"))["instances"]] == ["p0", "d0", "d1"]
        admin.router.unregister_instance("d0")
        assert [each["id"] for each in (await reader.until("snapshot"))["instances"]] == ["p0", "d1"]

    async def test_has_events(self, admin: Admin) -> None:
        admin.router.events.add(EventKind.STRATEGY, "before", by="test")
        reader = await Reader.open(admin)
        await reader.next()
        admin.router.events.add(EventKind.STRATEGY, "after", by="test")
        assert [each["text"] for each in await reader.until("events")] == ["after"]

    async def test_has_decisions_and_tells_their_end(self, admin: Admin) -> None:
        admin.router.decisions.add(Decision(request_id="before"))
        reader = await Reader.open(admin)
        await reader.next()
        decision = Decision(request_id="after", served=Served.SPLIT)
        admin.router.decisions.add(decision)
        (found,) = await reader.until("decisions")
        assert (found["number"], found["request_id"], found["outcome"]) == (2, "after", None)
        decision.ended(Ending.OK, 200, 0.1, 0.5, "d0")
        (found,) = await reader.until("decisions")
        assert (found["number"], found["outcome"], found["ttft_s"]) == (2, "ok", 0.1)

    async def test_has_no_secret(self, admin: Admin) -> None:
        _, data = await (await Reader.open(admin)).next()
        assert "sk-secret" not in json.dumps(data)

    async def test_nobody_looks_while_nobody_watches(self, admin: Admin) -> None:
        with mock.patch.object(live_feed.LiveFeed, "_changed", return_value=b"") as changed:
            reader = await Reader.open(admin)
            await until(lambda: changed.call_count > 2)
            feed = changed_by(admin)
            assert feed._ticking is not None
            reader.response.close()
            changed.return_value = b": tick\n\n"
            await until(lambda: feed._ticking is None)

    async def test_ends_when_the_server_does(self, admin: Admin) -> None:
        reader = await Reader.open(admin)
        stopped = asyncio.ensure_future(admin.client.server.close())
        async with asyncio.timeout(HUNG_S):
            await reader.response.content.read()
        await stopped

    async def test_head(self, admin: Admin) -> None:
        async with admin.client.head("/live") as response:
            assert (response.status, response.content_type) == (200, "text/event-stream")


def changed_by(admin: Admin) -> LiveFeed:
    """Return the feed of a server."""
    routes = {route.path: route.handler for route in admin.server.routes}
    feed: LiveFeed = routes["/live"].__self__._feed  # type: ignore[attr-defined]
    return feed


class TestFeed:
    """The feed alone: what readers of one process share."""

    def feed(self) -> LiveFeed:
        feed = LiveFeed(mock.AsyncMock(), Events(lambda: 0.0), Decisions(lambda: 0.0, lambda: 0.0))
        feed.tick(look(0))
        return feed

    def test_nothing_is_sent_before_the_first_look(self) -> None:
        feed = LiveFeed(mock.AsyncMock(), Events(lambda: 0.0), Decisions(lambda: 0.0, lambda: 0.0))
        read = feed.reader()
        assert read() == b""
        feed.tick(look(0))
        assert read().startswith(b"event: snapshot")

    def test_all_are_sent_the_same(self) -> None:
        feed = self.feed()
        readers = [feed.reader(), feed.reader()]
        assert len({read() for read in readers}) == 1
        feed.tick(look(1))
        (found,) = {read() for read in readers}
        assert b'"instances":[{"id":"a","n":1}]' in found, "of b nothing has changed"

    def test_one_that_is_behind_is_sent_all_that_it_has_missed(self) -> None:
        feed = self.feed()
        read = feed.reader()
        read()
        for number in range(1, KEPT_TICKS + 1):
            feed.tick(look(number))
        found = read()
        assert [b'"n":%d}' % number in found for number in range(1, KEPT_TICKS + 1)] == [True] * KEPT_TICKS
        assert b"snapshot" not in found
        assert read() == b""

    def test_one_that_is_far_behind_begins_anew(self) -> None:
        feed = self.feed()
        read = feed.reader()
        read()
        for number in range(KEPT_TICKS + 1):
            feed.tick(look(number))
        assert read().startswith(b"event: snapshot")
        assert read() == b""


def look(number: int) -> Look:
    return Look(b"{}", {"a": {"id": "a", "n": number}, "b": {"id": "b"}}, (None, 0.1), None)


class TestHistory:
    async def test_begins_empty(self, admin: Admin) -> None:
        assert await admin.ask("GET", "/history") == (200, {"interval_s": 5.0, "points": []})

    async def test_has_points(self) -> None:
        admin = Admin()
        with mock.patch("vllm_pd_scheduler.admin.live_api.INTERVAL_S", 0.02):
            await admin.serve()
            admin.router.telemetry.rejected(503, "no_decode")

            async def counted() -> bool:
                _, found = await admin.ask("GET", "/history")
                return any("no_decode" in each["errors_per_s"] for each in found["points"])

            await until(counted)
            _, found = await admin.ask("GET", "/history")
        point = found["points"][-1]
        assert point["in_flight"] == {"prefill": 0, "decode": 0, "encode": 0}
        assert (point["ttft_s"], point["prefix_hit_share"]) == (None, None)
        await admin.client.close()
