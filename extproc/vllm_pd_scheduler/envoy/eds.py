"""EDS: tells Envoy which instances there are and how they are, on the scheduler's gRPC port."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any

import grpc
from envoy_data_plane.envoy.config.core.v3 import Address, HealthStatus, Metadata, SocketAddress
from envoy_data_plane.envoy.config.endpoint.v3 import (
    ClusterLoadAssignment,
    LbEndpoint,
    LocalityLbEndpoints,
)
from envoy_data_plane.envoy.config.endpoint.v3 import Endpoint as EnvoyEndpoint
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryRequest, DiscoveryResponse
from envoy_data_plane.google.protobuf import Any as AnyMessage
from envoy_data_plane.google.protobuf import Struct, Value

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import InstanceRole, InstanceState

log = logging.getLogger(__name__)

SERVICE = "envoy.service.endpoint.v3.EndpointDiscoveryService"
TYPE_URL = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
TLS_NAMESPACE = "envoy.transport_socket_match"
METADATA_NAMESPACE = "vllm_pd"
"""Filter metadata of each endpoint, with its id under ``id``: Envoy's access log and answers show it."""

_HEALTH = {
    InstanceState.HEALTHY: HealthStatus.HEALTHY,
    InstanceState.DRAINING: HealthStatus.DRAINING,
    InstanceState.UNHEALTHY: HealthStatus.UNHEALTHY,
    InstanceState.EJECTED: HealthStatus.UNHEALTHY,
    InstanceState.STARTING: HealthStatus.UNHEALTHY,
}


def load_assignment(registry: Registry, role: InstanceRole) -> ClusterLoadAssignment:
    """Return the endpoints of Envoy's cluster for a role; the cluster is named as the role.

    An instance whose name has not been resolved is left out: EDS takes IP addresses only.
    """
    endpoints = [_lb_endpoint(e) for e in registry.endpoints(role) if e.address is not None]
    return ClusterLoadAssignment(
        cluster_name=role.value, endpoints=[LocalityLbEndpoints(lb_endpoints=endpoints)]
    )


def _lb_endpoint(endpoint: Endpoint) -> LbEndpoint:
    host = str(endpoint.address).rpartition(":")[0].strip("[]")
    address = SocketAddress(address=host, port_value=endpoint.instance.port)
    tls_name = endpoint.instance.tls_name
    metadata = {METADATA_NAMESPACE: Struct(fields={"id": Value(string_value=endpoint.id)})}
    if tls_name is not None:  # Envoy's transport_socket_matches has the rest
        metadata[TLS_NAMESPACE] = Struct(fields={"tls": Value(bool_value=True)})
    return LbEndpoint(
        endpoint=EnvoyEndpoint(address=Address(socket_address=address), hostname=tls_name or ""),
        health_status=_HEALTH[endpoint.state],
        metadata=Metadata(filter_metadata=metadata),
    )


class EndpointDiscovery:
    """The EDS service (state of the world, gRPC). Every change in the registry is sent at once."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._version = 1
        self._changed = asyncio.Event()
        self._nonces = itertools.count(1)
        registry.subscribe(self._on_change)

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler to register with a ``grpc.aio`` server."""
        return grpc.method_handlers_generic_handler(
            SERVICE, {"StreamEndpoints": grpc.stream_stream_rpc_method_handler(self._stream)}
        )

    def _on_change(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def _stream(self, _: object, context: Any) -> None:
        names: list[str] = []
        sent = 0
        reading = asyncio.ensure_future(context.read())
        try:
            while True:
                if names and sent != self._version:
                    sent = self._version
                    await context.write(self._response(names))
                    continue
                changed = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait({reading, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                if reading.done():
                    data = reading.result()
                    if data is grpc.aio.EOF:
                        return
                    request = DiscoveryRequest.parse(data)
                    if request.error_detail is not None:
                        log.error("Envoy refused the endpoints: %s", request.error_detail.message)
                    elif request.resource_names != names:
                        names, sent = request.resource_names, 0
                    reading = asyncio.ensure_future(context.read())
        finally:
            reading.cancel()

    def _response(self, names: list[str]) -> bytes:
        resources = [
            AnyMessage(type_url=TYPE_URL, value=bytes(load_assignment(self._registry, InstanceRole(name))))
            for name in names
            if name in list(InstanceRole)
        ]
        return bytes(
            DiscoveryResponse(
                version_info=str(self._version),
                resources=resources,
                type_url=TYPE_URL,
                nonce=str(next(self._nonces)),
            )
        )
