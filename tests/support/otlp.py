"""A collector of traces, by OTLP over HTTP and gRPC, that keeps what it gets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


@dataclass(frozen=True)
class Span:
    """A span as it was sent."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    failed: bool


class Collector(TraceServiceServicer):
    """Takes spans by OTLP. ``url`` is that of its HTTP receiver, ``grpc_port`` the other one's."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.raw = b""
        """All that was sent by HTTP."""
        self.url = ""
        self.grpc_port = 0

    def of(self, trace: str, service: str | None = None) -> dict[str, Span]:
        """Return the spans of a trace, by name."""
        return {
            span.name: span for span in self.spans if span.trace == trace and service in (None, span.service)
        }

    async def Export(self, request: Any, _: Any) -> Any:
        self._take(request)
        return ExportTraceServiceResponse()

    async def post(self, request: web.Request) -> web.Response:
        data = await request.read()
        self.raw += data
        self._take(ExportTraceServiceRequest.FromString(data))
        answer = ExportTraceServiceResponse().SerializeToString()
        return web.Response(body=answer, content_type="application/x-protobuf")

    def _take(self, request: Any) -> None:
        for resource in request.resource_spans:
            service = _plain(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                for span in scope.spans:
                    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                    failed = span.status.code == span.status.STATUS_CODE_ERROR
                    self.spans.append(Span(service, span.name, *ids, _plain(span.attributes), failed))


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """Run a collector."""
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.post)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    collector.url = "http://{}:{}".format(*runner.addresses[0])
    server = grpc.aio.server()
    add_TraceServiceServicer_to_server(collector, server)
    collector.grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield collector
    finally:
        await server.stop(0)
        await runner.cleanup()
