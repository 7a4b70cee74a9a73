"""``grpc.health.v1``: what Envoy, gateways and Kubernetes ask of the scheduler's health."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from ..rpc import CallError, Method, ServerStream, StatusCode, served_by
from .limits import MAX_HEALTH_BYTES, parse

SERVICE = "grpc.health.v1.Health"

_SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"
"""``HealthCheckResponse``: its field 1 is the status."""

LIVENESS = "liveness"
"""Whether the process runs."""

SERVER = ""
"""Whether requests are routed here, by the scheduler's own Envoy: also while it drains."""

READINESS = ("readiness", "envoy.service.ext_proc.v3.ExternalProcessor", "inference-extension")
"""Whether new requests should come here: these are what gateways and llm-d's charts ask for."""

WATCH_S = 0.25
"""How often is looked whether what somebody watches has changed."""


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
    """Answers by name whether the scheduler lives, serves, and should be sent anything new.

    ``knows`` says whether any source has told of instances, so that the scheduler knows more than an Envoy
    that ran before it was started; ``draining`` whether it is about to end.
    """

    def __init__(
        self, knows: Callable[[], bool] = lambda: True, draining: Callable[[], bool] = lambda: False
    ) -> None:
        self._knows = knows
        self._draining = draining

    def methods(self) -> dict[str, Method]:
        """Return what a server needs to serve this, by path."""
        return {
            f"/{SERVICE}/Check": served_by(self._check, MAX_HEALTH_BYTES),
            f"/{SERVICE}/Watch": served_by(self._watch, MAX_HEALTH_BYTES),
            f"/{SERVICE}/List": served_by(self._list, MAX_HEALTH_BYTES),
        }

    def _status(self, name: str) -> bytes:
        """Return the answer for a name."""
        if name == LIVENESS:
            return _SERVING
        if name == SERVER:
            return _SERVING if self._knows() else _NOT_SERVING
        if name in READINESS:
            return _SERVING if self._knows() and not self._draining() else _NOT_SERVING
        return _SERVICE_UNKNOWN

    async def _check(self, stream: ServerStream) -> None:
        name = parse(_Request, await stream.read()).service
        status = self._status(name)
        if status is _SERVICE_UNKNOWN:
            known = ", ".join((LIVENESS, *READINESS))
            raise CallError(StatusCode.NOT_FOUND, f"no service of that name: ask for '', {known}")
        await stream.write(status)

    async def _watch(self, stream: ServerStream) -> None:
        """Tell how it is, and each change of that."""
        name, told = parse(_Request, await stream.read()).service, b""
        while True:
            status = self._status(name)
            if status != told:
                told = status
                await stream.write(status)
            await asyncio.sleep(WATCH_S)

    async def _list(self, stream: ServerStream) -> None:
        await stream.read()
        await stream.write(b"".join(self._entries()))

    def _entries(self) -> Iterator[bytes]:
        """Yield the map entries of a ``HealthListResponse``: name and answer."""
        for name in (SERVER, LIVENESS, *READINESS):
            status = self._status(name)
            entry = _field(1, name.encode()) + _field(2, status)
            yield _field(1, entry)


def _field(number: int, content: bytes) -> bytes:
    """Return a short field of a message."""
    return bytes((number << 3 | 2, len(content))) + content
