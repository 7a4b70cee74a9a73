"""The fleet as it goes, for the dashboard: ``/history`` and ``/live``."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import msgspec
from aiohttp import web

from ..fleet.endpoint import Endpoint
from ..models import InstanceRole
from ..records.series import INTERVAL_S, Point, Reading, Series, summed
from ..router import PDRouter
from .event_stream import MEDIA_TYPE, Streams
from .instances_api import describe
from .live_feed import MAX_DECISIONS, LiveFeed, Look, Row
from .others import Others
from .process_api import StatusAnswer
from .route import Route, Shown, json_answer

_ROWS_A_TURN = 50
"""Instances that are looked at in one turn of the event loop: less than a millisecond."""


class HistoryAnswer(Shown):
    """The last 15 minutes."""

    interval_s: float
    """Seconds between two points."""
    points: list[Point]
    """The oldest first."""


class LiveApi:
    """Shows how the fleet goes and went. It takes a point each few seconds while its server runs.

    ``status`` returns how the scheduler is, ``source`` where an instance comes from. With ``others`` it
    counts for all workers.
    """

    def __init__(
        self,
        router: PDRouter,
        streams: Streams,
        status: Callable[[], Awaitable[StatusAnswer]],
        source: Callable[[str], str],
        others: Others | None = None,
    ) -> None:
        self._router = router
        self._streams = streams
        self._status = status
        self._source = source
        self._others = others
        self._readings: dict[str, Reading] = {}
        self._series = Series()
        self._feed = LiveFeed(self.look, router.events, router.decisions)

    def routes(self) -> Iterator[Route]:
        """Return the routes."""
        yield Route("GET", "/history", "The last 15 minutes in points", self._history, {200: HistoryAnswer})
        yield Route("GET", "/live", "A stream of what changes", self._live, {200: MEDIA_TYPE})

    async def sample(self, _: web.Application) -> AsyncIterator[None]:
        """Take a reading now and then while an application runs."""

        async def run() -> None:
            while True:
                self._series.add(await self._reading(), time.monotonic(), time.time())
                await asyncio.sleep(INTERVAL_S)

        task = asyncio.create_task(run())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _reading(self) -> Reading:
        """Return what was counted until now, by all workers."""
        before, self._readings = self._readings, {"": reading(self._router)}
        if self._others is not None:
            self._readings |= await self._others.readings()
        now = self._readings
        if before.keys() != now.keys() or any(now[name].requests < before[name].requests for name in now):
            self._series.interrupt()  # one came or went: the difference is no traffic
        return summed(self._readings[""], list(self._readings.values()))

    async def _history(self, _: web.Request) -> web.Response:
        return json_answer(HistoryAnswer(interval_s=INTERVAL_S, points=list(self._series.points)))

    async def _live(self, request: web.Request) -> web.StreamResponse:
        if request.method == "HEAD":
            return web.Response(content_type=MEDIA_TYPE)
        return await self._streams.serve(request, self._feed.subscribe, self._feed.reader())

    async def _decided_elsewhere(self) -> list[dict[str, Any]]:
        """Return the newest decisions of the other workers, the oldest first."""
        if self._others is None:
            return []
        answers = await self._others.get(f"/decisions?limit={MAX_DECISIONS}")
        told = [msgspec.json.decode(body) for body in answers]
        found = [decision for each in told for decision in each["decisions"]]
        return sorted(found, key=lambda each: int(each["number"]))

    async def look(self) -> Look:
        """Look at the fleet, in turns with the requests."""
        rows: dict[str, Row] = {}
        ages = []
        for at, endpoint in enumerate(self._router.registry.endpoints()):
            if at % _ROWS_A_TURN == 0:
                await asyncio.sleep(0)
                now = time.monotonic()
            rows[endpoint.id] = _row(endpoint, self._source(endpoint.instance.instance_id), now)
            ages.append(None if endpoint.scraped_at is None else round(now - endpoint.scraped_at, 1))
        elsewhere = await self._decided_elsewhere()
        status = (await self._status()).model_dump_json().encode()
        return Look(status, rows, ages, self._series.newest, elsewhere)


def _row(endpoint: Endpoint, source: str, now: float) -> Row:
    """Return an instance without its ages, and without digits that would only make it differ."""
    fields = describe(endpoint, source, now)
    del fields["address_age"], fields["metrics_age_s"]
    for values in (fields, fields["predicted"]):
        for key, value in values.items():
            if type(value) is float:
                values[key] = round(value, 4)
    return fields


def reading(router: PDRouter) -> Reading:
    """Return what a router has counted until now."""
    totals, registry = router.telemetry.totals, router.registry
    roles = {role: registry.endpoints(role) for role in InstanceRole}
    return Reading(
        requests=totals.requests,
        errors=dict(totals.errors),
        queue=len(router.dispatcher.queue),
        in_flight={role.value: sum(each.own_in_flight for each in found) for role, found in roles.items()},
        tpot=[
            (each.latency, each.metrics.running if each.metrics else 0.0)
            for each in roles[InstanceRole.DECODE]
            if each.latency is not None
        ],
        ttft=[(float(bound), count) for bound, count in totals.ttft.buckets],
        prompt_tokens=totals.prompt_tokens,
        cached_tokens=totals.cached_tokens,
    )
