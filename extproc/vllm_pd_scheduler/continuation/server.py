"""The way of a stream that goes on: between a client and the Envoy that has its request served.

Envoy sends those requests here whose client asks for that. Each goes back to Envoy as an ordinary one, so all
that counts for others counts for it: P, D, the hand-off, further attempts, limits, logs. If its answer breaks
off, a second request asks for the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from enum import StrEnum

import msgspec

from ..instance_http.errors import RequestFailed
from ..request import headers as names
from ..routing.going_on import Broken, GoingOn
from .answer import Answer, Ingress
from .asked import COMPLETIONS, Asked
from .envoy_side import Connection, Headers, Request
from .said import DONE, NONSENSE, Said

HEALTH_PATH = "/continuation/health"
EVENT_STREAM = "text/event-stream"
_TAIL = 4
"""Tokens at the end of which text may be missing: no character has more bytes than a token each."""
_ASK_S = 10.0
_MAX_TOLD_BYTES = 1 << 22


class Outcome(StrEnum):
    """What became of a stream that broke off: a label of ``pd_scheduler_streams_continued_total``."""

    CONTINUED = "continued"
    """Another D has written the rest, or nothing but the end was missing."""
    IMPOSSIBLE = "impossible"
    """It has something that no other D could go on with. It was cut."""
    FAILED = "failed"
    """No other D has written the rest. It was cut."""
    LEFT = "left"
    """The client left meanwhile."""


class _Card(msgspec.Struct):
    id: str = ""
    max_model_len: int | None = None


class _Told(msgspec.Struct):
    """What is read of the answer to a question."""

    prompt: str | None = None
    data: list[_Card] = []


Ended = Callable[[Outcome, Broken, str | None], None]
"""Called with what became of a stream, where it broke off, and the D that was to write the rest."""


class Continuation:
    """Serves what Envoy sends to its cluster ``continuation``. ``ingress`` is Envoy's, as ``http://HOST:PORT``.

    ``going_on`` has a scheduler choose another D for the rest of a stream that broke off, and ``ended`` is
    called for each.
    """

    def __init__(self, ingress: str, going_on: GoingOn, ended: Ended) -> None:
        self._ask = Ingress(ingress).ask
        self._going_on = going_on
        self._ended = ended
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self, port: int) -> None:
        """Listen at a port of this machine alone. Raises :exc:`OSError`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self._serve, self._connections), "127.0.0.1", port, backlog=1024
        )

    async def idle(self) -> None:
        """Wait until no stream runs."""
        await self._idle.wait()

    async def stop(self) -> None:
        """End all streams."""
        if self._server is not None:
            self._server.close()
            await asyncio.gather(*(each.close() for each in tuple(self._connections)))

    async def _serve(self, request: Request, reply: Connection) -> None:
        if request.method != b"POST":
            status, reason = (200, b"OK") if request.path == HEALTH_PATH else (405, b"Method Not Allowed")
            reply.begin(status, reason, (), 0)
            return
        self._running += 1
        self._idle.clear()
        try:
            await self._pass_on(request, reply)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _pass_on(self, request: Request, reply: Connection) -> None:
        asked = Asked.read(request.path, request.body)
        said = None if asked is None else Said(asked)
        body = request.body if asked is None else asked.body
        prompt = 0 if asked is None else self._going_on.prompt_of(request.path, request.body)
        headers = request.headers
        try:
            async with await self._ask(request.method, request.target, headers, body) as answer:
                if not _is_stream(answer):
                    await _copy(reply, answer)
                    return
                if said is None:
                    await self._cannot_go_on(reply, answer)
                    return
                del body, request
                reply.begin(answer.status, answer.reason, answer.headers, None)
                decode = answer.header(names.DECODE)
                await _first_part(said, reply, answer)
        except RequestFailed:
            reply.cut()
            return
        if not said.done:
            broken = Broken(decode, said.whole)
            outcome = Outcome.LEFT
            try:
                outcome = await self._go_on(said, headers, reply, broken)
            finally:
                self._ended(outcome, broken, said.lost_by)
                if outcome is Outcome.FAILED and said.lost_by is not None:
                    self._going_on.failed(prompt, (decode, said.lost_by))
            if outcome is not Outcome.CONTINUED and not said.error:
                reply.cut()
                return
        reply.end()

    async def _cannot_go_on(self, reply: Connection, answer: Answer) -> None:
        """Pass on a stream that asks for something with which no other D could go on, and count a break."""
        try:
            await _copy(reply, answer)
        except RequestFailed:
            self._ended(Outcome.IMPOSSIBLE, Broken(answer.header(names.DECODE), 0), None)
            raise

    async def _go_on(self, said: Said, headers: Headers, reply: Connection, broken: Broken) -> Outcome:
        """Have the rest of an answer written that has broken off, or say that it is no more."""
        outcome = await self._rest(said, headers, reply, broken)
        if outcome is not Outcome.CONTINUED and said.error:
            reply.write(said.error + DONE)
        elif outcome is Outcome.CONTINUED and not said.done:
            reply.write(said.ending())
        return outcome

    async def _rest(self, said: Said, headers: Headers, reply: Connection, broken: Broken) -> Outcome:
        asked = said.asked
        again = self._going_on.marked(headers, broken)
        if not said.began:  # the client has nothing yet: it is asked once more as it is
            said.rest_begins()
            with contextlib.suppress(RequestFailed):
                target = asked.path.encode("ascii")
                async with await self._ask(b"POST", target, again, asked.body) as answer:
                    if answer.status == 200:
                        said.lost_by = answer.header(names.DECODE)
                        await _first_part(said, reply, answer)
            return Outcome.CONTINUED if said.done else Outcome.FAILED
        if said.finish is not None:
            counts = not asked.usage or said.usage is not None or said.ids() is not None
            return Outcome.CONTINUED if counts else Outcome.IMPOSSIBLE
        ids = None if said.lost else await self._known(said, headers)
        if ids is None:
            return Outcome.IMPOSSIBLE
        limit = asked.max_tokens
        left = limit - said.whole if limit is not None else await self._room(asked, len(ids), headers)
        if left is None:
            return Outcome.IMPOSSIBLE
        if left < 1:
            return Outcome.CONTINUED
        said.rest_begins()

        def take(data: bytes) -> None:
            if shown := said.take_rest(data):
                reply.write(shown)
            if said.error:
                raise ValueError("its error")

        with contextlib.suppress(RequestFailed):
            rest = asked.rest(ids, left)
            async with await self._ask(b"POST", COMPLETIONS.encode("ascii"), again, rest) as answer:
                if _is_stream(answer):
                    said.lost_by = answer.header(names.DECODE)
                    await _passed(reply, answer, take)
        ended = said.finish is not None and not (asked.usage and said.usage is None)
        return Outcome.CONTINUED if said.done or ended else Outcome.FAILED

    async def _known(self, said: Said, headers: Headers) -> list[int] | None:
        """Return the tokens whose text is with the client, the prompt's included."""
        tail = said.doubtful
        if tail:
            for missing in range(_TAIL):
                body = msgspec.json.encode({"model": said.asked.model, "tokens": tail[: len(tail) - missing]})
                text = (await self._told(b"POST", b"/detokenize", headers, body)).prompt
                if text is None:
                    return None
                if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                    said.end_before(missing)
                    break
            else:
                return None
        return said.ids()

    async def _room(self, asked: Asked, tokens: int, headers: Headers) -> int | None:
        """Return how many tokens the model has room for after so many."""
        for card in (await self._told(b"GET", b"/v1/models", headers, b"")).data:
            if asked.model in (None, card.id) and card.max_model_len is not None:
                return card.max_model_len - tokens
        return None

    async def _told(self, method: bytes, target: bytes, headers: Headers, body: bytes) -> _Told:
        """Return what a question is answered; nothing if it is not."""
        with contextlib.suppress(RequestFailed, TimeoutError, *NONSENSE):
            async with asyncio.timeout(_ASK_S), await self._ask(method, target, headers, body) as answer:
                if answer.status == 200:
                    return msgspec.json.decode(await answer.read(_MAX_TOLD_BYTES), type=_Told)
        return _Told()


def _is_stream(answer: Answer) -> bool:
    """Whether an answer is a stream of events that can be read."""
    kind = answer.header("content-type").partition(";")[0].strip().lower()
    return answer.status == 200 and kind == EVENT_STREAM and not answer.header("content-encoding")


def _passed(reply: Connection, answer: Answer, take: Callable[[bytes], object]) -> Awaitable[None]:
    """Pass an answer on as it comes, as fast as the client takes it."""
    reply.take_from(answer)
    return answer.pass_to(take)


async def _copy(reply: Connection, answer: Answer) -> None:
    """Pass an answer on as it is."""
    length = answer.header("content-length")
    reply.begin(answer.status, answer.reason, answer.headers, int(length) if length.isdecimal() else None)
    await _passed(reply, answer, reply.write)
    reply.end()


async def _first_part(said: Said, reply: Connection, answer: Answer) -> None:
    """Pass on what an instance says, up to its end or until it breaks off; whole events alone."""

    def take(data: bytes) -> None:
        if shown := said.take(data):
            reply.write(shown)
        if said.error:
            raise ValueError("its error")

    with contextlib.suppress(RequestFailed):
        await _passed(reply, answer, take)
    said.read()
