"""``grpc.health.v1``: what Envoy's health check of the scheduler asks."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from .limits import MAX_HEALTH_BYTES, BadMessage, parse

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class HealthService:
    """Answers that the scheduler serves, as long as its event loop does."""

    def __init__(self) -> None:
        self._servicer = health.aio.HealthServicer()

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler to register with a ``grpc.aio`` server."""
        encode = health_pb2.HealthCheckResponse.SerializeToString
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Check": grpc.unary_unary_rpc_method_handler(self._check, response_serializer=encode),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch, response_serializer=encode),
            },
        )

    async def _check(self, data: bytes, context: Any) -> health_pb2.HealthCheckResponse:
        return await self._servicer.Check(await _read(data, context), context)

    async def _watch(self, data: bytes, context: Any) -> None:
        await self._servicer.Watch(await _read(data, context), context)


async def _read(data: bytes, context: Any) -> health_pb2.HealthCheckRequest:
    try:
        return parse(health_pb2.HealthCheckRequest, data, MAX_HEALTH_BYTES)
    except BadMessage as error:
        await error.end(context)
