"""Which endpoints are at which address: several if several names lead there, or if they are one's ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..models import InstanceRole
from .endpoint import Endpoint


class Addresses:
    """The endpoints of each role by their addresses, ``ip:port``. Part of the registry.

    ``endpoints`` returns those of a role in the order in which they were added: of several at one address the
    first added comes first.
    """

    def __init__(self, endpoints: Callable[[InstanceRole], Iterable[Endpoint]]) -> None:
        self._endpoints = endpoints
        self._known: dict[InstanceRole, dict[str, list[Endpoint]]] = {}
        """Without the roles in which one has another address now."""

    def at(self, role: InstanceRole, address: str | None) -> Sequence[Endpoint]:
        """Return the endpoints of a role at an address."""
        known = self._known.get(role)
        if known is None:
            known = self._known[role] = {}
            for endpoint in self._endpoints(role):
                if endpoint.address is not None:
                    known.setdefault(endpoint.address, []).append(endpoint)
        return known.get(address, ()) if address is not None else ()

    def added(self, endpoint: Endpoint) -> None:
        """Note that an endpoint was added, behind all others."""
        known = self._known.get(endpoint.instance.role)
        if known is not None and endpoint.address is not None:
            known.setdefault(endpoint.address, []).append(endpoint)

    def removed(self, endpoint: Endpoint) -> None:
        """Note that an endpoint was removed."""
        known = self._known.get(endpoint.instance.role)
        if known is not None and endpoint.address is not None:
            there = known[endpoint.address]
            there.remove(endpoint)
            if not there:
                del known[endpoint.address]

    def moved(self, role: InstanceRole) -> None:
        """Note that an endpoint of a role has another address."""
        self._known.pop(role, None)
