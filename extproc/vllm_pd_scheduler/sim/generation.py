"""Requests that generate: each goes to an engine, and its tokens come back as an answer or a stream."""

import asyncio
import uuid
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import msgspec
from aiohttp import web

from .adapters import Adapters
from .answers import DONE, Shape, Usage, event
from .encoding import Encodings, media_hashes
from .engine import HandOff
from .faults import ENTRY, HALF, MUTE, drop_connection
from .handoff import FatalHandOff, Offer
from .intake import Intake
from .job import EngineFailed, Job
from .options import Options
from .other_answers import GenerateShape, MessagesShape, NativeShape, ResponsesShape
from .protocol import (
    AbortBody,
    AnyBody,
    ApiError,
    ChatBody,
    CompletionBody,
    GenerateBody,
    MessagesBody,
    NativeBody,
    ResponsesBody,
    read_body,
)
from .ranks import Ranks
from .starlette import request_id
from .worker import Worker

APIS: dict[str, tuple[type[AnyBody], type[Shape]]] = {
    "/v1/completions": (CompletionBody, Shape),
    "/v1/chat/completions": (ChatBody, Shape),
    "/v1/responses": (ResponsesBody, ResponsesShape),
    "/v1/messages": (MessagesBody, MessagesShape),
    "/inference/v1/generate": (GenerateBody, GenerateShape),
    "/generate": (NativeBody, NativeShape),
}
"""What generates: the body that each path reads, and the answers that it gives."""


class Generation:
    """Answers requests at the engines of an instance. ``port`` tells which one hand-offs name."""

    def __init__(
        self,
        options: Options,
        ranks: Ranks,
        adapters: Adapters,
        encodings: Encodings,
        port: Callable[[], int],
    ) -> None:
        self.active = 0
        """Requests that are not answered yet."""
        self._options = options
        self._ranks = ranks
        self._adapters = adapters
        self._encodings = encodings
        self._port = port
        self._sglang = options.kv_connector == "sglang"
        self._by_rid: dict[str, tuple[Worker, list[Job]]] = {}
        """Of SGLang's requests that say how they are called."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer a request of one of :data:`APIS`."""
        kind, shaped = APIS[request.path]
        body: AnyBody = read_body(await request.read(), request.content_type, kind)
        model = self._adapters.served(body.model, self._options.model)
        name = request_id(request)
        if isinstance(body, ResponsesBody):
            name = body.request_id or f"resp_{uuid.uuid4().hex}"
        shape = shaped(name, model, kind in (ChatBody, MessagesBody))
        hashes = await self._encode(body)
        worker = self._ranks.chosen(request.path, request.headers)
        request[ENTRY].rank = self._ranks.workers.index(worker)
        jobs = Intake(body, shape, request[ENTRY], worker, self._options).jobs()
        requests = [job.request for job in jobs]
        if self._sglang and body.rid:
            self._by_rid[body.rid] = worker, jobs
        self._adapters.begin(model, requests)
        self.active += 1
        try:
            if body.return_token_ids:
                shape = replace(shape, token_ids=jobs[0].prompt.token_ids())
            if body.stream:
                return await self._stream(request, body, shape, jobs, worker)
            return await self._whole(request, shape, jobs, worker, self._encodings.answer(hashes))
        finally:
            self.active -= 1
            if self._sglang and body.rid:
                self._by_rid.pop(body.rid, None)
            self._adapters.end(model, requests)

    async def _encode(self, body: AnyBody) -> list[str]:
        """Have the encodings of a request's media items; return their hashes."""
        if not isinstance(body, ChatBody | MessagesBody) or self._options.ec_connector == "none":
            return []
        hashes = media_hashes(body.messages, body.mm_processor_kwargs)
        try:
            await self._encodings.have(hashes, body.ec_transfer_params)
        except FatalHandOff as error:
            for worker in self._ranks.workers:
                worker.die(str(error))
        return hashes

    async def _whole(
        self,
        request: web.Request,
        shape: Shape,
        jobs: list[Job],
        worker: Worker,
        encoded: dict[str, Any] | None = None,
    ) -> web.StreamResponse:
        words: list[list[str]] = [[] for _ in jobs]
        try:
            async with aclosing(worker.generate(jobs)) as tokens:
                async for token in tokens:
                    words[token.choice].append(token.text)
            if worker.connector.answers_when_fetched:
                for job in jobs:
                    if job.request.hand_off is HandOff.SEND:
                        await worker.lending.handed_over(job)
        except EngineFailed as error:
            raise ApiError(500, str(error), "InternalServerError") from error
        choices = [shape.choice(job.choice, "".join(words[job.choice]), job.finish_reason) for job in jobs]
        data = shape.whole(choices, _usage(jobs), self._offer(jobs[0], worker))
        if encoded is not None:
            data = data[:-1] + b',"ec_transfer_params":' + msgspec.json.encode(encoded) + b"}"
        if not request.get(HALF):
            return web.Response(body=data, content_type="application/json")
        response = web.StreamResponse(
            headers={"Content-Type": "application/json", "Content-Length": str(len(data))}
        )
        await response.prepare(request)
        await response.write(data[: len(data) // 2])
        await drop_connection(request, flush=True)

    def _offer(self, job: Job, worker: Worker) -> dict[str, Any] | None:
        request = job.request
        if request.hand_off is not HandOff.SEND:
            return None
        blocks = worker.engine.pinned_blocks(request.request_id)
        offer = Offer(worker.engine_id, request.request_id, self._options.kv_host, self._port(), blocks)
        return worker.connector.answer(offer, job.params, request.computed, request.cached)

    async def _stream(
        self, request: web.Request, body: AnyBody, shape: Shape, jobs: list[Job], worker: Worker
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        # As with vLLM, status 200 is sent before anything can fail.
        if not worker.connector.headers_with_first_token:
            await response.prepare(request)
        sent = 0
        try:
            async with aclosing(worker.generate(jobs)) as tokens:
                async for token in tokens:
                    if sent == request.get(MUTE):
                        await asyncio.Event().wait()
                    if not sent:
                        if not response.prepared:
                            await response.prepare(request)
                        await response.write(b"".join(shape.opening(job.choice) for job in jobs))
                    await response.write(shape.token(token.choice, token.text, token.finish_reason, not sent))
                    sent += 1
                    if sent == 2 and request.get(HALF):
                        await drop_connection(request, flush=True)
            wanted = body.stream_options is not None and bool(body.stream_options.include_usage)
            await response.write(shape.closing(_usage(jobs), wanted))
        except EngineFailed as error:
            if not response.prepared:
                await response.prepare(request)
            await response.write(event(ApiError(500, str(error), "InternalServerError").body()) + DONE)
        except ConnectionError:
            return response  # the client has left; closing the generator has aborted its request
        await response.write_eof()
        return response

    async def abort(self, request: web.Request) -> web.Response:
        """SGLang's: end a request by the name that it was given. One that is not known is no error."""
        body = read_body(await request.read(), request.content_type, AbortBody)
        if found := self._by_rid.get(body.rid):
            worker, jobs = found
            for job in jobs:
                worker.abort(job)
        return web.Response()


def _usage(jobs: list[Job]) -> Usage:
    # A prompt counts once however many choices it has, with the cached tokens of its first choice.
    prompts = {id(job.prompt): job for job in reversed(jobs)}.values()
    return Usage(
        sum(job.prompt.tokens for job in prompts),
        sum(job.request.generated for job in jobs),
        sum(job.cached for job in prompts),
    )
