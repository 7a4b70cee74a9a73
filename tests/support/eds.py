"""Cluster load assignments in short."""

from envoy.config.endpoint.v3 import endpoint_pb2


def told(assignment: endpoint_pb2.ClusterLoadAssignment) -> list[tuple[str, str, int, int]]:
    """Id, address, port and health of each endpoint."""
    found = []
    (locality,) = assignment.endpoints
    for lb in locality.lb_endpoints:
        socket = lb.endpoint.address.socket_address
        name = lb.metadata.filter_metadata["vllm_pd"].fields["id"].string_value
        found.append((name, socket.address, socket.port_value, lb.health_status))
    return found
