"""What has happened lately: ``/events``, as JSON or as a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Annotated

from aiohttp import web
from pydantic import Field

from ..records.events import MAX_EVENTS, EventKind, Events
from .event_stream import MEDIA_TYPE, Streams, encode
from .others import Others
from .route import Query, Refused, Route, Shown, json_answer

_CHUNK_EVENTS = 100
"""Events that a stream sends at once: some 20 KB."""
_MAX_DIGITS = 18
"""Of a number that a reader says it has seen."""


OF_A_WORKER = frozenset({EventKind.STARTED, EventKind.DRAINING, EventKind.QUEUE_FULL})
"""What each worker tells of itself. The rest is of the fleet, and all tell the same."""


class EventsQuery(Query):
    """Which events to show."""

    limit: Annotated[int, Field(ge=1, le=MAX_EVENTS)] = MAX_EVENTS
    """How many at most: the newest."""
    since: Annotated[int, Field(ge=0)] | None = None
    """Only those after the one with this number."""


class EventAnswer(Shown):
    """Something that has happened."""

    number: int
    """1 for the first since the scheduler was started; of several schedulers microseconds since 1970."""
    time: str
    """RFC 3339."""
    kind: EventKind
    level: str
    """Of its log line."""
    subject: str | None
    """The instance's id, if it is about one."""
    text: str
    by: str
    """``admin`` and the client's address, ``probe``, ``request``, ``signal`` or ``start``."""


class EventsAnswer(Shown):
    """The events, the newest first."""

    events: list[EventAnswer]


class EventsApi:
    """Shows events, and streams them to those who ask for that.

    With ``others`` the events are those of the fleet, as this worker sees them, and of what each worker does.
    """

    def __init__(self, events: Events, streams: Streams, others: Others | None = None) -> None:
        self._events = events
        self._others = others
        self._streams = streams

    def routes(self) -> Iterator[Route]:
        """Return the route."""
        yield Route(
            "GET",
            "/events",
            "What has happened lately",
            self._get,
            {200: EventsAnswer},
            also=(MEDIA_TYPE,),
        )

    async def _get(self, request: web.Request, query: EventsQuery) -> web.StreamResponse:
        if request.method != "HEAD" and MEDIA_TYPE in request.headers.get("accept", ""):
            return await self._stream(request, query)
        found = self._events.after(query.since or 0)[-query.limit :]
        shown = [EventAnswer.model_validate(event.as_json()) for event in reversed(found)]
        if self._others is not None:
            for body in await self._others.get(f"/events?limit={MAX_EVENTS}&since={query.since or 0}"):
                told = EventsAnswer.model_validate_json(body).events
                shown += [event for event in told if event.kind in OF_A_WORKER]
            shown.sort(key=lambda event: event.number, reverse=True)
        return json_answer(EventsAnswer(events=shown[: query.limit]))

    async def _stream(self, request: web.Request, query: EventsQuery) -> web.StreamResponse:
        """Send the events after the last that the reader has seen; for a new reader, those from now on."""
        last = _last_seen(request) if "last-event-id" in request.headers else query.since
        sent = self._events.newest if last is None else last

        def read() -> bytes:
            nonlocal sent
            found = self._events.after(sent)[:_CHUNK_EVENTS]
            if found:
                sent = found[-1].number
            return b"".join(encode(json.dumps(event.as_json()), event.number) for event in found)

        return await self._streams.serve(request, self._events.subscribe, read, self._of_others(sent))

    def _of_others(self, last: int) -> AsyncIterator[bytes] | None:
        if self._others is None:
            return None
        events = self._others.follow("/events", {"accept": MEDIA_TYPE, "last-event-id": str(last)})
        return (event async for event in events if json.loads(_data(event))["kind"] in OF_A_WORKER)


def _data(event: bytes) -> bytes:
    """Return the data of a server-sent event of ours."""
    return next(line[6:] for line in event.splitlines() if line.startswith(b"data: "))


def _last_seen(request: web.Request) -> int:
    """Return the number in the header that a browser sends when it opens a stream again."""
    given = request.headers["last-event-id"]
    if not (given.isascii() and given.isdecimal() and len(given) <= _MAX_DIGITS):
        raise Refused(400, "last-event-id: must be the number of an event")
    return int(given)
