"""The scheduler's own traffic as a trace for ``replay``: ``/trace``."""

from __future__ import annotations

from collections.abc import Iterator

from aiohttp import web

from ..records.recording import Recording
from .event_stream import MEDIA_TYPE, Streams, encode
from .others import Others
from .route import Route, Shown, json_answer

_CHUNK_LINES = 200
"""Lines that a stream sends at once: some 40 KB with prompts of 8,000 tokens."""


class TraceAnswer(Shown):
    """Whether requests are being recorded."""

    readers: int
    """How many streams are open. Without any, nothing is recorded."""


class TraceApi:
    """Streams a line for each request whose answer has ended, to those who ask for a stream.

    With ``others`` it is one for each request of all workers.
    """

    def __init__(self, recording: Recording, streams: Streams, others: Others | None = None) -> None:
        self._recording = recording
        self._others = others
        self._streams = streams

    def routes(self) -> Iterator[Route]:
        """Return the route."""
        summary = "The requests to come as a trace for replay (a stream), without any text"
        yield Route("GET", "/trace", summary, self._get, {200: TraceAnswer}, also=(MEDIA_TYPE,))

    async def _get(self, request: web.Request) -> web.StreamResponse:
        if request.method == "HEAD" or MEDIA_TYPE not in request.headers.get("accept", ""):
            return json_answer(TraceAnswer(readers=self._recording.readers))
        sent = self._recording.newest

        def read() -> bytes:
            nonlocal sent
            lines = self._recording.after(sent, _CHUNK_LINES)
            if lines is None:  # a trace with a gap would be taken for whole
                raise ConnectionError("the reader is too slow")
            first, sent = sent + 1, sent + len(lines)
            return b"".join(encode(line.decode(), number) for number, line in enumerate(lines, first))

        others = self._others.follow("/trace", {"accept": MEDIA_TYPE}) if self._others is not None else None
        return await self._streams.serve(request, self._recording.subscribe, read, others)
