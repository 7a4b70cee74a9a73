"""What becomes of EndpointSlices: each usable endpoint of a role's service may be an instance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from ...models import InstanceRole
from .candidates import Candidate, LeftOut
from .objects import Endpoint, EndpointSlice
from .watch import Resource

SLICES = Resource("discovery.k8s.io/v1", "endpointslices", EndpointSlice)

SERVICE = "kubernetes.io/service-name"
"""The label of a slice that says whose it is."""

PORT_NAME = "http"
"""Name of the port that is meant where a service has several."""


def selector_of(services: Iterable[str]) -> str:
    """Return the label selector of the slices of some services."""
    return f"{SERVICE} in ({','.join(sorted(set(services)))})"


def read_slices(
    slices: Iterable[EndpointSlice], services: Mapping[InstanceRole, str]
) -> tuple[list[Candidate], Mapping[str, list[str]]]:
    """Return what may be instances, and which slices are left out for what reasons.

    An endpoint may be in two slices while it moves from one to the other, and has one for each family of
    addresses: it counts once, at its IPv4 address if it has one, and not at all once it is terminating.
    """
    found: dict[tuple[InstanceRole, str, int], Candidate] = {}
    ending: set[tuple[InstanceRole, str, int]] = set()
    left_out: dict[str, list[str]] = defaultdict(list)
    for each in sorted(slices, key=lambda one: (one.address_type, one.metadata.name)):
        service = each.metadata.label(SERVICE) or ""
        roles = [role for role, name in services.items() if name == service]
        try:
            port = _port(each)
        except LeftOut as reason:
            left_out[str(reason)].append(each.metadata.name)
            continue
        for endpoint in each.endpoints or ():
            name, reference = _name(endpoint), endpoint.target_ref
            for role in roles:
                key = (role, (reference and reference.uid) or name, port)
                if _is_ending(endpoint):
                    ending.add(key)
                elif _is_ready(endpoint) and endpoint.addresses:
                    found.setdefault(key, Candidate(role, name, endpoint.addresses[0], port))
    return [candidate for key, candidate in found.items() if key not in ending], left_out


def _port(each: EndpointSlice) -> int:
    ports = [port for port in each.ports or () if port.port is not None]
    chosen = [port for port in ports if port.name == PORT_NAME] if len(ports) > 1 else ports
    if not chosen or chosen[0].port is None:
        raise LeftOut(
            f"it has {len(ports)} ports, and none is named {PORT_NAME!r}" if ports else "it has no port"
        )
    return chosen[0].port


def _name(endpoint: Endpoint) -> str:
    reference = endpoint.target_ref
    if reference is not None and reference.kind == "Pod" and reference.name:
        return reference.name
    address = (endpoint.addresses or [""])[0]
    return f"ip-{address.replace('.', '-').replace(':', '-')}"


def _is_ending(endpoint: Endpoint) -> bool:
    return endpoint.conditions is not None and endpoint.conditions.terminating is True


def _is_ready(endpoint: Endpoint) -> bool:
    return endpoint.conditions is None or endpoint.conditions.ready is not False
