"""The HTTP interface of a simulated instance: vLLM's routes, and ``/_sim/`` for other engines and tests."""

import asyncio
import hashlib
import os
import time
import uuid
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from .adapters import Adapters
from .answers import DONE, Shape, Usage, event, model_list
from .encoding import PATH as ENCODINGS_PATH
from .encoding import Encodings, media_hashes
from .engine import EngineRequest, HandOff
from .faults import MAX_JOURNAL_BODY, Entry, Fault, Journal, drop_connection
from .handoff import FatalHandOff, Offer
from .kv_api import KvApi
from .options import WITHOUT_PARAMS, Options
from .other_answers import GenerateShape, MessagesShape, NativeShape, ResponsesShape
from .protocol import (
    AbortBody,
    AdapterBody,
    AnyBody,
    ApiError,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    GenerateBody,
    Length,
    MessagesBody,
    NativeBody,
    ResponsesBody,
    TokenizeBody,
    TooLong,
    choose_length,
    read_body,
    split_inputs,
)
from .ranks import Ranks
from .sglang import metrics_page
from .starlette import Cors, Handler, Routes
from .text import Answer, read_prompt, render_chat, tokenize
from .worker import EngineFailed, Job, Worker

VERSION = "0.33.0"
"""Of vLLM, whose behaviour is simulated."""
MAX_BODY = 128 * 1024 * 1024
"""Bytes of a request body: twice the scheduler's default limit, so that it is never this one that counts."""
MAX_N = 16_384
"""Largest ``n``: vLLM's default ``VLLM_MAX_N_SEQUENCES``."""
UNRECORDED_PATHS = frozenset({"/health", "/metrics"})
"""Not in the journal: probes would soon push all other requests out of it."""
ENTRY = "entry"
"""Key of a request's journal entry in the request object."""
HALF = "half"
"""Key of the request object: whether the fault cuts this answer in half."""
MUTE = "mute"
"""Key of the request object: after how many tokens of a stream the fault sends nothing more."""


_APIS: dict[str, tuple[type[AnyBody], type[Shape]]] = {
    "/v1/completions": (CompletionBody, Shape),
    "/v1/chat/completions": (ChatBody, Shape),
    "/v1/responses": (ResponsesBody, ResponsesShape),
    "/v1/messages": (MessagesBody, MessagesShape),
    "/inference/v1/generate": (GenerateBody, GenerateShape),
    "/generate": (NativeBody, NativeShape),
}
"""What generates: the body that each path reads, and the answers that it gives."""


class Api:
    """Routes and handlers. ``port`` is the port that hand-offs name; set it when it is known."""

    def __init__(self, options: Options, ranks: Ranks) -> None:
        self.port = options.port
        self._options = options
        self._ranks = ranks
        self._journal = Journal()
        self._fault = Fault()
        self._cors = Cors(options.allowed_origins)
        self._adapters = Adapters(options.enable_lora, options.max_loras, dict(options.lora_modules))
        self._sglang = options.kv_connector == "sglang"
        self._by_rid: dict[str, tuple[Worker, list[Job]]] = {}
        """Of SGLang's requests that say how they are called."""
        self._encodings = Encodings(options, lambda: self.port)
        self._active_requests = 0
        self._started = int(time.time())

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._guard])
        app.on_response_prepare.extend((_echo_request_id, self._cors.mark))
        get = {
            "/health": self._health,
            "/ping": self._health,
            "/version": self._version,
            "/load": self._server_load,
            "/metrics": self._scrape,
            "/v1/models": self._models,
            "/v1/realtime": self._realtime,
            "/_sim/requests": self._requests,
            "/_sim/stats": self._stats,
        }
        post = {
            "/ping": self._health,
            **dict.fromkeys(_APIS.keys() - {"/generate"}, self._generate),
            "/v1/embeddings": self._embeddings,
            "/tokenize": self._tokenize,
            "/_sim/fault": self._set_fault,
            "/v1/load_lora_adapter": self._load_adapter,
            "/v1/unload_lora_adapter": self._unload_adapter,
        }
        handlers = {("GET", path): handler for path, handler in get.items()}
        handlers |= {("POST", path): handler for path, handler in post.items()}
        if self._sglang:
            native = {"/generate": self._generate, "/abort_request": self._abort}
            handlers |= {("POST", path): handler for path, handler in native.items()}
        handlers |= KvApi(self._options, self._ranks, lambda: self.port).handlers()
        app.router.add_get(ENCODINGS_PATH, self._encodings.give)
        app.add_routes([web.route("*", "/{path:.*}", Routes(handlers).__call__)])
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Run a handler, with the journal before it and errors turned into vLLM's answers after it."""
        if request.path.startswith("/_sim/"):
            return await handler(request)
        if _is_a_probe(request) and request.path not in self._fault.paths:
            return await self._handle(request, handler)
        entry = request[ENTRY] = self._journal.record(request)
        try:
            data = await request.read()
            entry.data, entry.size = data[:MAX_JOURNAL_BODY], len(data)
            response = await self._handle(request, handler)
        except ApiError as error:
            response = web.json_response(error.body(), status=error.status)
        except web.HTTPException as error:
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
            response = web.json_response({"detail": error.reason}, status=error.status, headers=headers)
        entry.status = response.status
        return response

    async def _handle(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Run a handler unless the API key is wrong or a fault answers in its place."""
        if (preflight := self._cors.preflight(request)) is not None:
            return preflight
        key = self._options.api_key
        if key and request.path.startswith("/v1") and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        fault = self._fault
        if fault.poison is not None and fault.poison.encode() in await request.read():
            if fault.abrupt:
                os._exit(1)
            self._ranks.workers[0].die("a prompt that it cannot take")
        if fault.hits(request.path):
            await asyncio.sleep(fault.delay)
            if fault.reset:
                await drop_connection(request)
            if fault.status is not None:
                kind = "InternalServerError" if fault.status >= 500 else "BadRequestError"
                raise ApiError(fault.status, "Simulated fault", kind)
            request[HALF], request[MUTE] = fault.half, fault.mute
        return await handler(request)

    # -- generation -----------------------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        kind, shaped = _APIS[request.path]
        body: AnyBody = read_body(await request.read(), request.content_type, kind)
        model = self._model(body.model)
        name = _request_id(request)
        if isinstance(body, ResponsesBody):
            name = body.request_id or f"resp_{uuid.uuid4().hex}"
        shape = shaped(name, model, kind in (ChatBody, MessagesBody))
        hashes = await self._encode(body)
        worker = self._ranks.chosen(request.path, request.headers)
        request[ENTRY].rank = self._ranks.workers.index(worker)
        jobs = self._make_jobs(body, shape, request[ENTRY], worker)
        requests = [job.request for job in jobs]
        if self._sglang and body.rid:
            self._by_rid[body.rid] = worker, jobs
        self._adapters.begin(model, requests)
        self._active_requests += 1
        try:
            if body.return_token_ids:
                shape = replace(shape, token_ids=jobs[0].prompt.token_ids())
            if body.stream:
                return await self._stream(request, body, shape, jobs, worker)
            return await self._whole(request, shape, jobs, worker, self._encodings.answer(hashes))
        finally:
            self._active_requests -= 1
            if self._sglang and body.rid:
                self._by_rid.pop(body.rid, None)
            self._adapters.end(model, requests)

    def _model(self, model: str | None) -> str:
        """Return the model that serves a request, which may be an adapter; raise ApiError for another one."""
        if not model or model == self._options.model:
            return self._options.model
        if model not in self._adapters.paths:
            raise ApiError(404, f"The model `{model}` does not exist.", "NotFoundError", "model")
        return model

    def _make_jobs(self, body: AnyBody, shape: Shape, entry: Entry, worker: Worker) -> list[Job]:
        """Return the jobs of a request, one for each choice; raise ApiError if it cannot be run."""
        if body.n is not None and not 1 <= body.n <= MAX_N:
            raise ApiError(400, f"n must be 1 to {MAX_N}, got {body.n}.", "BadRequestError", "n")
        all_params = worker.connector.params(body) if self._options.kv_connector not in WITHOUT_PARAMS else {}
        connector, profile = worker.connector, worker.engine.profile
        hand_off = _kind_of(all_params, worker)
        jobs: list[Job] = []
        try:
            for prompt in body.prompts(shape.model):
                for number in range(body.n or 1):
                    params = connector.nth(all_params, len(jobs))
                    answer = Answer(prompt, number)
                    natural = 1 if self._fault.eos else answer.natural_length
                    length = choose_length(body, prompt, natural, self._options.max_model_len)
                    if hand_off is HandOff.SEND and connector.answers_when_fetched:
                        length = Length(1, "length")
                    if hand_off is HandOff.SEND and length.finish_reason == "stop":
                        hand_off = HandOff.SEND if connector.sends_stopped else HandOff.NONE
                    # A name of its own, even if a client sends the same X-Request-Id twice.
                    name = f"{shape.answer_id}-{len(jobs)}-{uuid.uuid4().hex[:8]}"
                    if hand_off is HandOff.SEND:
                        name = connector.request_id(params) or name
                    pushes = hand_off is HandOff.SEND and not connector.lends
                    salt = body.cache_salt or ""
                    hashes = prompt.block_hashes(profile.block_size, salt) if profile.prefix_caching else ()
                    kept = HandOff.NONE if pushes else hand_off
                    if worker.publisher is not None:
                        worker.publisher.knows(prompt, hashes)
                    request = EngineRequest(name, prompt.tokens, length.tokens, kept, hashes)
                    job = Job(request, prompt, len(jobs), length.finish_reason, answer, params=params)
                    job.pushes = pushes
                    jobs.append(job)
        except TooLong:
            # As in vLLM, a request that is rejected releases the sender's blocks.
            if hand_off is HandOff.RECEIVE:
                _release_hand_off(all_params, entry, worker)
            raise
        if hand_off is not HandOff.NONE:
            entry.hand_off = hand_off.value
        if hand_off is HandOff.RECEIVE:
            _attach_hand_off(jobs, entry, worker)
        return jobs

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
                        await worker.handed_over(job)
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
        offer = Offer(worker.engine_id, request.request_id, self._options.kv_host, self.port, blocks)
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

    # -- vLLM's other routes --------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.Response:
        if request.path == "/health" and self._fault.health is not None:
            return web.Response(status=self._fault.health)
        return web.Response(status=503 if self._ranks.dead else 200)

    async def _abort(self, request: web.Request) -> web.Response:
        """SGLang's: end a request by the name that it was given. One that is not known is no error."""
        body = read_body(await request.read(), request.content_type, AbortBody)
        if found := self._by_rid.get(body.rid):
            worker, jobs = found
            for job in jobs:
                worker.abort(job)
        return web.Response()

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": VERSION})

    async def _server_load(self, request: web.Request) -> web.Response:
        return web.json_response({"server_load": self._active_requests})

    async def _scrape(self, request: web.Request) -> web.Response:
        self._ranks.observe()
        metrics = self._ranks.workers[0].metrics
        if self._adapters.enabled:
            metrics.adapters(self._adapters)
        page = metrics.expose()
        if self._sglang:
            page = metrics_page(page, self._ranks.workers[0].engine.profile.capacity)
        return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _models(self, request: web.Request) -> web.Response:
        length, adapters = self._options.max_model_len, self._adapters.paths
        return web.json_response(model_list(self._options.model, length, self._started, adapters))

    async def _load_adapter(self, request: web.Request) -> web.Response:
        body = read_body(await self._of_adapters(request), request.content_type, AdapterBody)
        return web.Response(text=self._adapters.load(body.lora_name, body.lora_path, body.load_inplace))

    async def _unload_adapter(self, request: web.Request) -> web.Response:
        body = read_body(await self._of_adapters(request), request.content_type, AdapterBody)
        return web.Response(text=self._adapters.unload(body.lora_name))

    async def _of_adapters(self, request: web.Request) -> bytes:
        """Return the body of a request about adapters; there is no such path without ``--enable-lora``."""
        if not self._adapters.enabled:
            raise web.HTTPNotFound
        return await request.read()

    async def _realtime(self, request: web.Request) -> web.StreamResponse:
        """A WebSocket that says hello and gives back what it gets."""
        socket = web.WebSocketResponse()
        if not socket.can_prepare(request):
            raise web.HTTPNotFound
        await socket.prepare(request)
        await socket.send_json({"type": "session.created"})
        async for message in socket:
            await socket.send_str(message.data)
        return socket

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = read_body(await request.read(), request.content_type, TokenizeBody)
        self._model(body.model)
        if body.prompt is None and body.messages is None:
            raise ApiError(400, "prompt or messages is required", "Bad Request", "prompt")
        tokens = tokenize(render_chat(body.messages or []) if body.prompt is None else body.prompt)
        length = self._options.max_model_len
        return web.json_response({"count": len(tokens), "max_model_len": length, "tokens": tokens})

    async def _embeddings(self, request: web.Request) -> web.Response:
        body = read_body(await request.read(), request.content_type, EmbeddingBody)
        model = self._model(body.model)
        inputs = [body.input] if isinstance(body.input, str) else split_inputs(body.input, "input")
        prompts = [read_prompt(model, item) for item in inputs]
        data = [
            {"index": index, "object": "embedding", "embedding": _vector(prompt.digest)}
            for index, prompt in enumerate(prompts)
        ]
        usage = Usage(sum(prompt.tokens for prompt in prompts), 0).body()
        return web.json_response({"object": "list", "model": model, "data": data, "usage": usage})

    # -- for tests ------------------------------------------------------------------------------------

    async def _requests(self, request: web.Request) -> web.Response:
        return web.json_response(self._journal.as_json())

    async def _stats(self, request: web.Request) -> web.Response:
        stats = {
            **self._ranks.stats(),
            "role": self._options.role,
            "requests_total": self._journal.total,
            "encodings": self._encodings.counts,
        }
        return web.json_response(stats)

    async def _set_fault(self, request: web.Request) -> web.Response:
        try:
            self._fault = msgspec.json.decode(await request.read(), type=Fault)
            for worker in self._ranks.workers:
                worker.stick(self._fault.stuck)
                worker.fault = self._fault
        except msgspec.DecodeError as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.Response(body=msgspec.json.encode(self._fault), content_type="application/json")


def _kind_of(params: dict[str, Any], worker: Worker) -> HandOff:
    try:
        return worker.connector.kind(params)
    except FatalHandOff as error:
        worker.die(str(error))
        return HandOff.NONE


def _attach_hand_off(jobs: list[Job], entry: Entry, worker: Worker) -> None:
    for job in jobs:
        params = job.params
        try:
            blocks = worker.engine.profile.blocks_for(job.prompt.tokens)
            connector = worker.connector
            job.offer = connector.named(
                connector.read(params, blocks), job.request.request_id, job.prompt.digest
            )
        except FatalHandOff as error:
            worker.die(str(error))
        cached = params.get("remote_prefill_cached_tokens")
        job.remote_cached = cached if type(cached) is int else None
        job.on_hand_off = entry.outcomes.append


def _release_hand_off(params: dict[str, Any], entry: Entry, worker: Worker) -> None:
    if worker.connector.pushes:  # a request that is rejected tells the sender nothing
        return
    try:
        offer = worker.connector.read(params, blocks_needed=0)
    except FatalHandOff:
        return
    if offer:
        entry.outcomes.append("released")
        worker.release(offer)


def _is_a_probe(request: web.BaseRequest) -> bool:
    """Whether nobody's request but a scheduler's question: Envoy gives an id to each that a client sends."""
    of_nobody = "X-Request-Id" not in request.headers
    return request.path in UNRECORDED_PATHS or (request.path == "/v1/models" and of_nobody)


async def _echo_request_id(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Request-Id"] = _request_id(request)


def _request_id(request: web.BaseRequest) -> str:
    """Return the client's X-Request-Id, a character for each byte as vLLM reads headers, or a new id."""
    given = request.headers.get("X-Request-Id", "")
    return given.encode("utf-8", "surrogateescape").decode("latin-1") or uuid.uuid4().hex


def _usage(jobs: list[Job]) -> Usage:
    # A prompt counts once however many choices it has, with the cached tokens of its first choice.
    prompts = {id(job.prompt): job for job in reversed(jobs)}.values()
    return Usage(
        sum(job.prompt.tokens for job in prompts),
        sum(job.request.generated for job in jobs),
        sum(job.cached for job in prompts),
    )


def _vector(digest: str) -> list[float]:
    """Return an embedding: 16 numbers from -1 to 1 that depend on the prompt."""
    data = hashlib.blake2b(digest.encode(), digest_size=16).digest()
    return [round(byte / 127.5 - 1, 6) for byte in data]
