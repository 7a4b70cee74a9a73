"""The way of a stream that goes on: between a client and the Envoy that has its request served.

Envoy sends those requests here whose client asks for that. Each goes back to Envoy as an ordinary one, so all
that counts for others counts for it: P, D, the hand-off, further attempts, limits, logs. If its answer breaks
off, a second request asks for the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from enum import StrEnum
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from yarl import URL

from ..instance_http.session import open_session
from ..request import headers as names
from ..routing.going_on import GoingOn
from .asked import COMPLETIONS, Asked
from .said import DONE, Said

HEALTH_PATH = "/continuation/health"
EVENT_STREAM = "text/event-stream"
MAX_EVENT_BYTES = 4 << 20
"""An answer with a longer event is cut. The first has the prompt's token ids, before they are taken out."""
_TAIL = 4
"""Tokens at the end of which text may be missing: no character has more bytes than a token each."""
_ASK_S = 10.0
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
        "expect",
        "host",
    }
)


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


class Continuation:
    """Serves what Envoy sends to its cluster ``continuation``. ``ingress`` is Envoy's, as ``http://HOST:PORT``.

    ``going_on`` has the scheduler choose another D for the rest of a stream that broke off, and ``ended`` is
    called for each.
    """

    def __init__(self, ingress: str, going_on: GoingOn, ended: Callable[[Outcome], None]) -> None:
        self._ingress = ingress
        self._going_on = going_on
        self._ended = ended
        self._session: aiohttp.ClientSession
        self._runner: web.AppRunner | None = None
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self, port: int) -> None:
        """Listen at a port of this machine alone. Raises :exc:`OSError`."""
        app = web.Application(client_max_size=1 << 40)  # Envoy limits what comes
        app.router.add_get(HEALTH_PATH, _healthy)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._session = open_session()
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, keepalive_timeout=3600)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()

    async def idle(self) -> None:
        """Wait until no stream runs."""
        await self._idle.wait()

    async def stop(self) -> None:
        """End all streams."""
        if self._runner is not None:
            await self._runner.cleanup()
            await self._session.close()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self._running += 1
        self._idle.clear()
        try:
            return await self._pass_on(request)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        body = await request.content.read()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        asked = Asked.read(request.path, body) if request.method == "POST" else None
        response = web.StreamResponse()
        said = None if asked is None else Said(asked)
        if asked is not None:
            body = asked.body
        try:
            async with await self._ask(request.method, request.raw_path, headers, body) as answer:
                del body
                _begin(response, answer)
                streams = answer.status == 200 and answer.content_type == EVENT_STREAM
                if said is None or not streams or "content-encoding" in answer.headers:
                    await _copy(request, response, answer)
                    return response
                await response.prepare(request)
                await _first_part(said, response, answer)
        except aiohttp.ClientError:
            return _cut(request)
        except ClientLeft:
            return response
        if not said.done:
            outcome, number = Outcome.LEFT, request.headers.get(names.REQUEST_ID, "")
            self._going_on.begin(number, response.headers.get(names.DECODE, ""))
            try:
                outcome = await self._go_on(said, headers, response)
            except ClientLeft:
                return response
            finally:
                self._ended(outcome)
                self._going_on.end(number, said.lost_by if outcome is Outcome.FAILED else None)
            if outcome is not Outcome.CONTINUED and not said.error:
                return _cut(request)
        await response.write_eof()
        return response

    async def _ask(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> aiohttp.ClientResponse:
        return await self._session.request(
            method,
            URL(self._ingress + path, encoded=True),
            headers=headers,
            data=body or None,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=None),  # Envoy limits each leg
        )

    async def _go_on(self, said: Said, headers: Mapping[str, str], response: web.StreamResponse) -> Outcome:
        """Have the rest of an answer written that has broken off, or say that it is no more."""
        outcome = await self._rest(said, headers, response)
        if outcome is not Outcome.CONTINUED and said.error:
            await _write(response, said.error + DONE)
            return outcome
        if outcome is Outcome.CONTINUED and not said.done:
            await _write(response, said.ending())
        return outcome

    async def _rest(self, said: Said, headers: Mapping[str, str], response: web.StreamResponse) -> Outcome:
        asked = said.asked
        if not said.began:  # the client has nothing yet: it is asked once more as it is
            try:
                async with await self._ask("POST", asked.path, headers, asked.body) as answer:
                    if answer.status == 200:
                        said.lost_by = answer.headers.get(names.DECODE)
                        await _first_part(said, response, answer)
            except aiohttp.ClientError:
                pass
            return Outcome.CONTINUED if said.done else Outcome.FAILED
        if said.finish is not None:
            return Outcome.CONTINUED
        ids = None if said.lost else await self._known(said, headers)
        if ids is None:
            return Outcome.IMPOSSIBLE
        limit = asked.max_tokens
        left = limit - said.whole if limit is not None else await self._room(asked, len(ids), headers)
        if left is None:
            return Outcome.IMPOSSIBLE
        if left < 1:
            return Outcome.CONTINUED
        said.error = b""
        try:
            async with await self._ask("POST", COMPLETIONS, headers, asked.rest(ids, left)) as answer:
                if answer.status == 200 and answer.content_type == EVENT_STREAM:
                    said.lost_by = answer.headers.get(names.DECODE)
                    async for events in _events(answer):
                        await _write(response, b"".join(map(said.goes_on, events)))
                        if said.error:
                            break
        except (aiohttp.ClientError, ValueError):
            pass
        ended = said.finish is not None and not (asked.usage and said.usage is None)
        return Outcome.CONTINUED if said.done or ended else Outcome.FAILED

    async def _known(self, said: Said, headers: Mapping[str, str]) -> list[int] | None:
        """Return the tokens whose text is with the client, the prompt's included."""
        tail = said.doubtful
        if tail:
            for missing in range(_TAIL):
                body = msgspec.json.encode({"model": said.asked.model, "tokens": tail[: len(tail) - missing]})
                text = (await self._told("POST", "/detokenize", headers, body)).get("prompt")
                if not isinstance(text, str):
                    return None
                if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                    said.end_before(missing)
                    break
            else:
                return None
        return said.ids()

    async def _room(self, asked: Asked, tokens: int, headers: Mapping[str, str]) -> int | None:
        """Return how many tokens the model has room for after so many."""
        for card in (await self._told("GET", "/v1/models", headers, b"")).get("data") or ():
            if asked.model in (None, card.get("id")) and isinstance(card.get("max_model_len"), int):
                return int(card["max_model_len"]) - tokens
        return None

    async def _told(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
        """Return what a question is answered; nothing if it is not."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, msgspec.DecodeError):
            async with asyncio.timeout(_ASK_S), await self._ask(method, path, headers, body) as answer:
                if answer.status == 200:
                    return msgspec.json.decode(await answer.read(), type=dict[str, Any])
        return {}


class ClientLeft(Exception):
    """Nobody wants the answer any more."""


async def _healthy(_: web.Request) -> web.Response:
    return web.Response()


def _cut(request: web.Request) -> web.StreamResponse:
    """Break off the connection: Envoy then cuts the client's stream, or answers 503 if none has begun."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=503)


def _begin(response: web.StreamResponse, answer: aiohttp.ClientResponse) -> None:
    response.set_status(answer.status, answer.reason)
    for name, value in answer.headers.items():
        if name.lower() not in _HOP_BY_HOP:
            response.headers.add(name, value)


async def _write(response: web.StreamResponse, data: bytes) -> None:
    try:
        if data:
            await response.write(data)
    except ConnectionError as error:  # aiohttp's is one of its client's errors too
        raise ClientLeft from error


async def _copy(request: web.Request, response: web.StreamResponse, answer: aiohttp.ClientResponse) -> None:
    """Pass an answer on as it is."""
    if answer.content_length is not None:
        response.content_length = answer.content_length
    await response.prepare(request)
    async for data in answer.content.iter_any():
        await _write(response, data)
    await response.write_eof()


async def _first_part(said: Said, response: web.StreamResponse, answer: aiohttp.ClientResponse) -> None:
    """Pass on what the first instance says, up to its end or until it breaks off; whole events alone."""
    try:
        async for events in _events(answer):
            passed = b""
            for event in events:
                said.note(event)
                if said.error:
                    break
                passed += event + b"\n\n"
            await _write(response, said.shown(passed))
            if said.error:
                return
    except aiohttp.ClientError:
        pass
    except ValueError:
        said.lost = True


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[list[bytes]]:
    """Yield the events of an answer as they come. Raises :exc:`ValueError` if one is too long."""
    begun = b""
    async for data in answer.content.iter_any():
        *events, begun = (begun + data).split(b"\n\n")
        if events:
            yield events
        if len(begun) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of more than {MAX_EVENT_BYTES} bytes")
