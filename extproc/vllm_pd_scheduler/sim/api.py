"""The HTTP interface of a simulated instance: vLLM's routes, and ``/_sim/`` for other engines and tests."""

import asyncio
import hashlib
import os
import time

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from .adapters import Adapters
from .answers import Usage, model_list
from .encoding import PATH as ENCODINGS_PATH
from .encoding import Encodings
from .faults import ENTRY, HALF, MAX_JOURNAL_BODY, MUTE, Fault, Journal, drop_connection
from .generation import APIS, Generation
from .kv_api import KvApi
from .options import Options
from .protocol import (
    AdapterBody,
    ApiError,
    EmbeddingBody,
    TokenizeBody,
    read_body,
    split_inputs,
)
from .ranks import Ranks
from .sglang import metrics_page
from .starlette import Cors, Handler, Routes, request_id
from .text import read_prompt, render_chat, tokenize

VERSION = "0.33.0"
"""Of vLLM, whose behaviour is simulated."""
MAX_BODY = 128 * 1024 * 1024
"""Bytes of a request body: twice the scheduler's default limit, so that it is never this one that counts."""
UNRECORDED_PATHS = frozenset({"/health", "/metrics"})
"""Not in the journal: probes would soon push all other requests out of it."""


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
        self._encodings = Encodings(options, lambda: self.port)
        self._generation = Generation(options, ranks, self._adapters, self._encodings, lambda: self.port)
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
            **dict.fromkeys(APIS.keys() - {"/generate"}, self._generation.answer),
            "/v1/embeddings": self._embeddings,
            "/tokenize": self._tokenize,
            "/_sim/fault": self._set_fault,
            "/v1/load_lora_adapter": self._load_adapter,
            "/v1/unload_lora_adapter": self._unload_adapter,
        }
        handlers = {("GET", path): handler for path, handler in get.items()}
        handlers |= {("POST", path): handler for path, handler in post.items()}
        if self._sglang:
            native = {"/generate": self._generation.answer, "/abort_request": self._generation.abort}
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

    # -- vLLM's other routes --------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.Response:
        if request.path == "/health" and self._fault.health is not None:
            return web.Response(status=self._fault.health)
        return web.Response(status=503 if self._ranks.dead else 200)

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": VERSION})

    async def _server_load(self, request: web.Request) -> web.Response:
        return web.json_response({"server_load": self._generation.active})

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
        self._adapters.served(body.model, self._options.model)
        if body.prompt is None and body.messages is None:
            raise ApiError(400, "prompt or messages is required", "Bad Request", "prompt")
        tokens = tokenize(render_chat(body.messages or []) if body.prompt is None else body.prompt)
        length = self._options.max_model_len
        return web.json_response({"count": len(tokens), "max_model_len": length, "tokens": tokens})

    async def _embeddings(self, request: web.Request) -> web.Response:
        body = read_body(await request.read(), request.content_type, EmbeddingBody)
        model = self._adapters.served(body.model, self._options.model)
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


def _is_a_probe(request: web.BaseRequest) -> bool:
    """Whether nobody's request but a scheduler's question: Envoy gives an id to each that a client sends."""
    of_nobody = "X-Request-Id" not in request.headers
    return request.path in UNRECORDED_PATHS or (request.path == "/v1/models" and of_nobody)


async def _echo_request_id(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Request-Id"] = request_id(request)


def _vector(digest: str) -> list[float]:
    """Return an embedding: 16 numbers from -1 to 1 that depend on the prompt."""
    data = hashlib.blake2b(digest.encode(), digest_size=16).digest()
    return [round(byte / 127.5 - 1, 6) for byte in data]
