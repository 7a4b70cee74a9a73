"""Instances to probe: real HTTP servers on unused ports, and the registry and monitors that watch them."""

import asyncio
import contextlib
import time
from collections.abc import Callable

import aiohttp
from aiohttp import web

from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import HealthPolicy, Registry
from vllm_pd_scheduler.health import HealthMonitor, StateLog
from vllm_pd_scheduler.health.names import NameResolver
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.records.events import Events
from vllm_pd_scheduler.telemetry import Telemetry


class Server:
    """A server that answers as it is told, and counts."""

    def __init__(self) -> None:
        self.port = 0
        self.status = 200
        self.page = "vllm:num_requests_running 3\nvllm:num_requests_waiting 2\nvllm:kv_cache_usage_perc 0.5\n"
        self.page_status = 200
        self.models: list[str] | None = ["tiny"]
        """What it serves; ``None``: it has no such path."""
        self.authorization: list[str | None] = []
        """Of those that asked for it."""
        self.probes = 0
        self.scrapes = 0
        self.held = 0
        """Probes that wait for ``go``."""
        self.go = asyncio.Event()
        self.go.set()
        self.muted = False
        """Whether ``/metrics`` waits for ``go`` too."""
        self.on_scrape: Callable[[], None] = lambda: None

    async def health(self, _: web.Request) -> web.Response:
        self.probes += 1
        self.held += 1
        try:
            await self.go.wait()
        finally:
            self.held -= 1
        return web.Response(status=self.status)

    def mute(self) -> None:
        """Answer nothing until ``go``."""
        self.muted = True
        self.go.clear()

    async def metrics(self, _: web.Request) -> web.Response:
        self.scrapes += 1
        if self.muted:
            await self.go.wait()
        self.on_scrape()
        return web.Response(status=self.page_status, text=self.page)

    async def list_models(self, request: web.Request) -> web.Response:
        self.authorization.append(request.headers.get("authorization"))
        if self.models is None:
            return web.Response(status=404)
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})


class Fixture:
    """A registry, its monitor, and servers to probe."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.registry = Registry(HealthPolicy(unhealthy_threshold=2, healthy_threshold=1))
        self.telemetry = Telemetry()
        self.state_log = StateLog(self.registry, self.telemetry, Events(time.time))
        self.session = session
        self.now = 10.0
        self.servers: list[Server] = []
        self.runners: list[web.AppRunner] = []
        self.monitors: list[HealthMonitor] = []
        self.raw_servers: list[asyncio.Server] = []

    def monitor(
        self,
        interval: float = 0.01,
        timeout: float = 5.0,
        names: NameResolver | None = None,
        hung: Callable[[Endpoint], None] = lambda _: None,
    ) -> HealthMonitor:
        self.monitors.append(
            HealthMonitor(
                self.registry,
                self.telemetry,
                self.session,
                interval=interval,
                timeout=timeout,
                clock=lambda: self.now,
                names=names,
                hung=hung,
            )
        )
        return self.monitors[-1]

    async def serve(self, name: str | None = "d0", host: str = "127.0.0.1") -> Server:
        """Start a server and, if it has a name, register it."""
        server = Server()
        self.servers.append(server)
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", server.health),
                web.get("/metrics", server.metrics),
                web.get("/v1/models", server.list_models),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=1, handler_cancellation=True)
        self.runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.port = runner.addresses[0][1]
        if name is not None:
            self.add(name, host, server.port)
        return server

    def add(
        self,
        name: str,
        host: str,
        port: int,
        api_key: str | None = None,
        role: InstanceRole = InstanceRole.DECODE,
        ranks: int = 1,
    ) -> Endpoint:
        return self.registry.add(PDInstance(name, role, host, port, api_key, data_parallel_size=ranks))

    async def serve_raw(
        self, name: str, answers: dict[str, bytes], endless: bytes = b"", slow: dict[str, bytes] | None = None
    ) -> None:
        """Register one that sends these bytes for these paths, and then ``endless`` for ever.

        After those of ``slow`` it sends nothing, and leaves the connection open.
        """

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ")[1].decode()
                if slow is not None and path in slow:
                    writer.write(slow[path])
                    await reader.read()
                writer.write(answers.get(path, raw_answer(status=b"404 Not Found")))
                while endless and path in answers and answers[path] != raw_answer():
                    writer.write(endless)
                    await writer.drain()
                await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        self.raw_servers.append(server)
        self.add(name, "127.0.0.1", server.sockets[0].getsockname()[1])

    def __getitem__(self, name: str) -> Endpoint:
        return self.registry.get(name)

    def failed_scrapes(self, name: str) -> float:
        value = self.telemetry.prometheus.get_sample_value(
            "pd_scheduler_scrape_failures_total", {"instance": name}
        )
        return value or 0.0


def raw_answer(
    body: bytes = b"", headers: bytes = b"", status: bytes = b"200 OK", length: int | None = None
) -> bytes:
    """An HTTP answer as it goes over the wire; ``headers`` are whole lines."""
    size = len(body) if length is None else length
    return b"HTTP/1.1 %s\r\ncontent-length: %d\r\n%s\r\n%s" % (status, size, headers, body)
