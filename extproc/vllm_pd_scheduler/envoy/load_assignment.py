"""Endpoints as Envoy reads them: a ``ClusterLoadAssignment``, encoded once for each change."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from envoy.config.core.v3 import health_check_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from google.protobuf import any_pb2

from ..fleet.endpoint import Endpoint
from ..models import InstanceState

TYPE_URL = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
TLS_NAMESPACE = "envoy.transport_socket_match"
METADATA_NAMESPACE = "vllm_pd"
"""Filter metadata of each endpoint, with its id under ``id``: Envoy's access log and answers show it."""

_HEALTH = {
    InstanceState.HEALTHY: health_check_pb2.HEALTHY,
    InstanceState.DRAINING: health_check_pb2.DRAINING,
}
"""All other states are unhealthy."""

_Key = tuple[str, str, InstanceState, str | None]
"""All that Envoy is told of an endpoint: id, ``ip:port``, state, TLS name."""


class LoadAssignment:
    """The resource of one of Envoy's clusters, from whoever its endpoints are at the moment.

    ``version`` grows by one with each change in what Envoy is told, and with no other. 0: it was never told.
    """

    def __init__(self, cluster: str, endpoints: Callable[[], Iterable[Endpoint]]) -> None:
        self.version = 0
        self.resource = any_pb2.Any()
        self._cluster = cluster
        self._endpoints = endpoints
        self._encoded: dict[_Key, endpoint_components_pb2.LbEndpoint] | None = None

    def refresh(self) -> None:
        """Follow the endpoints."""
        keys = self._keys()
        if self._encoded is not None and keys == list(self._encoded):
            return
        known = self._encoded or {}
        self._encoded = {key: known.get(key) or _lb_endpoint(*key) for key in keys}
        message = endpoint_pb2.ClusterLoadAssignment(cluster_name=self._cluster)
        message.endpoints.add().lb_endpoints.extend(self._encoded.values())
        self.resource = any_pb2.Any(type_url=TYPE_URL, value=message.SerializeToString())
        self.version += 1

    def _keys(self) -> list[_Key]:
        """Return what to tell of each address: ranks have one, and are one host.

        An instance whose name has not been resolved is left out: EDS takes IP addresses only.
        """
        found: dict[str, Endpoint] = {}
        for endpoint in self._endpoints():
            address = endpoint.address
            if address is None:
                continue
            other = found.setdefault(address, endpoint)
            if endpoint.state == InstanceState.HEALTHY != other.state:
                found[address] = endpoint  # of two with one address Envoy would take the first, well or not
        return [
            (e.instance.instance_id, address, e.state, e.instance.tls_name) for address, e in found.items()
        ]


def _lb_endpoint(
    id_: str, address: str, state: InstanceState, tls_name: str | None
) -> endpoint_components_pb2.LbEndpoint:
    host, _, port = address.rpartition(":")
    message = endpoint_components_pb2.LbEndpoint(health_status=_HEALTH.get(state, health_check_pb2.UNHEALTHY))
    socket = message.endpoint.address.socket_address
    socket.address, socket.port_value = host.strip("[]"), int(port)
    metadata = message.metadata.filter_metadata
    metadata[METADATA_NAMESPACE].fields["id"].string_value = id_
    if tls_name is not None:  # Envoy's transport_socket_matches has the rest
        message.endpoint.hostname = tls_name
        metadata[TLS_NAMESPACE].fields["tls"].bool_value = True
    return message
