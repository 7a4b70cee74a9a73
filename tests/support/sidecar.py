"""What llm-d runs beside each D: it has a request prefilled on the P that a header names, then served by D.

As far as a router can tell it from the real one: headers, bodies and statuses.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from tests.support.processes import unused_ports
from tests.support.sim_fleet import Fleet

PREFILLER = "x-prefiller-host-port"
SPLIT = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
DO_PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
HOP_BY_HOP = frozenset({"host", "content-length", "transfer-encoding", "connection", "keep-alive"})


class Sidecar:
    """Listens at ``port`` for the D at ``decode``."""

    def __init__(self, decode: str, port: int) -> None:
        self.decode = decode
        self.port = port
        self.asked: list[str | None] = []
        """The P of each request that can be split; ``None``: D has done both."""
        self.bodies: list[bytes] = []
        """What came for them."""
        self._session: aiohttp.ClientSession

    def entry(self, instance_id: str) -> dict[str, Any]:
        """The D as a scheduler's configuration lists it."""
        return {"id": instance_id, "host": "127.0.0.1", "port": self.port}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Sidecar]:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True), auto_decompress=False
        ) as self._session:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", self.port).start()
            try:
                yield self
            finally:
                await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in {*HOP_BY_HOP, PREFILLER}]
        if request.path in SPLIT and request.method == "POST":
            # Of a list it takes the first.
            prefill = request.headers.get(PREFILLER, "").partition(",")[0] or None
            self.asked.append(prefill)
            self.bodies.append(body)
            if prefill is not None:
                headers.append(("x-request-id", str(uuid.uuid4())))
                refused, body = await self._prefill(request, prefill, headers, body)
                if refused is not None:
                    return refused
        return await self._pass(request, headers, body)

    async def _prefill(
        self, request: web.Request, prefill: str, headers: list[tuple[str, str]], body: bytes
    ) -> tuple[web.Response | None, bytes]:
        """Return P's error, or the body for D."""
        decoded = json.loads(body)
        asked = {k: v for k, v in decoded.items() if k != "stream_options"}
        asked |= {"stream": False, "max_tokens": 1, "max_completion_tokens": 1}
        asked["kv_transfer_params"] = DO_PREFILL
        url = f"http://{prefill}{request.path_qs}"
        try:
            async with self._session.post(url, data=json.dumps(asked), headers=headers) as answer:
                content = await answer.read()
                if answer.status >= 400:
                    return web.Response(
                        status=answer.status, body=content, content_type=answer.content_type
                    ), body
                params = json.loads(content).get("kv_transfer_params")
        except aiohttp.ClientError:
            return web.Response(status=502), body
        return None, json.dumps({**decoded, "kv_transfer_params": params}).encode()

    async def _pass(
        self, request: web.Request, headers: list[tuple[str, str]], body: bytes
    ) -> web.StreamResponse:
        try:
            async with self._session.request(
                request.method, self.decode + request.path_qs, data=body or None, headers=headers
            ) as answer:
                kept = [(k, v) for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP]
                passed = web.StreamResponse(status=answer.status)
                passed.headers.extend(kept)
                await passed.prepare(request)
                async for part in answer.content.iter_any():
                    await passed.write(part)
                await passed.write_eof()
                return passed
        except aiohttp.ClientConnectionError:
            return web.Response(status=502)


@asynccontextmanager
async def sidecars(fleet: Fleet) -> AsyncIterator[dict[str, Sidecar]]:
    """Run one beside each D of a fleet."""
    async with AsyncExitStack() as stack:
        yield {
            each.id: await stack.enter_async_context(Sidecar(each.url, unused_ports(1)[0]).running())
            for each in fleet.decode
        }


def config_with(fleet: Fleet, beside: dict[str, Sidecar]) -> dict[str, Any]:
    """Return a fleet's configuration whose D are reached through their sidecars."""
    return {
        **fleet.config(),
        "prefill_leg": "sidecar",
        "decode_instances": [sidecar.entry(name) for name, sidecar in beside.items()],
    }
