"""``grpc.health.v1``: what Envoy's health check of the scheduler asks."""

from __future__ import annotations

import asyncio
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from ..rpc import CallError, Method, ServerStream, StatusCode, served_by
from .limits import MAX_HEALTH_BYTES, parse

SERVICE = "grpc.health.v1.Health"

_SERVING, _SERVICE_UNKNOWN = b"\x08\x01", b"\x08\x03"
"""``HealthCheckResponse``: its field 1 is the status."""


def _request_type() -> type[Any]:
    """Return the class of ``HealthCheckRequest``, which has one field; in a pool of its own."""
    file = descriptor_pb2.FileDescriptorProto(name="health.proto", package="grpc.health.v1", syntax="proto3")
    field = file.message_type.add(name="HealthCheckRequest").field.add(name="service", number=1)
    field.type, field.label = field.TYPE_STRING, field.LABEL_OPTIONAL
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("grpc.health.v1.HealthCheckRequest"))


_Request = _request_type()


class HealthService:
    """Answers that the scheduler serves, as long as its event loop does. It knows no services apart."""

    def methods(self) -> dict[str, Method]:
        """Return what a server needs to serve this, by path."""
        return {
            f"/{SERVICE}/Check": served_by(self._check, MAX_HEALTH_BYTES),
            f"/{SERVICE}/Watch": served_by(self._watch, MAX_HEALTH_BYTES),
        }

    async def _check(self, stream: ServerStream) -> None:
        if parse(_Request, await stream.read()).service:
            raise CallError(StatusCode.NOT_FOUND, "only the server as a whole has a health: ask for ''")
        await stream.write(_SERVING)

    async def _watch(self, stream: ServerStream) -> None:
        """Tell how it is, and nothing more: while this runs, it does not change."""
        known = not parse(_Request, await stream.read()).service
        await stream.write(_SERVING if known else _SERVICE_UNKNOWN)
        await asyncio.get_running_loop().create_future()
