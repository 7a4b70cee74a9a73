"""Where the instances are: the addresses behind their DNS names, and which of them are one server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import canonical_ip, join_address
from .names import NameNotResolved, NameResolver
from .watched import Watched


class Places:
    """Keeps the addresses in a registry up to date. ``clock`` has monotonic seconds."""

    def __init__(self, registry: Registry, names: NameResolver, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._names = names
        self._clock = clock

    async def find(self, endpoint: Endpoint, watched: Watched, patience: float) -> str | None:
        """Keep the address behind a DNS name up to date; return why there is none to be used.

        A look-up is no part of a probe's time. When it fails, or takes its time, the last address is used;
        the first one may take ``patience`` seconds.
        """
        if canonical_ip(endpoint.instance.host) is None:
            if watched.look_up is None or watched.look_up.done():
                watched.look_up = asyncio.ensure_future(self._resolve(endpoint, watched))
            if endpoint.address is None:
                await asyncio.wait({watched.look_up}, timeout=patience)
            if endpoint.address is None:
                problem = watched.unresolved or f"no answer within {patience:g} s"
                return f"the name {endpoint.instance.host} cannot be resolved: {problem}"
        self._tell_of_another(endpoint, watched)
        return None

    def _tell_of_another(self, endpoint: Endpoint, watched: Watched) -> None:
        """Say that two instances are one server. Both get requests, so that the operator should know."""
        first = self._registry.at(endpoint.instance.role, str(endpoint.address))
        if first is None or first in self._registry.ranks_of(endpoint):
            watched.say(endpoint, "address", None)
        else:
            same = f"its address {endpoint.address} is that of {first.instance.instance_id}"
            watched.say(endpoint, "address", f"{same}: they are one server, and what fails counts for both")

    async def _resolve(self, endpoint: Endpoint, watched: Watched) -> None:
        instance = endpoint.instance
        try:
            found = await self._names.addresses(instance.host)
        except NameNotResolved as error:
            watched.unresolved = str(error)
            if endpoint.address is not None:
                kept = f"its last address {endpoint.address} stays in use"
                watched.say(endpoint, "name", f"the name {instance.host} cannot be resolved: {error}; {kept}")
            return
        watched.unresolved = None
        watched.say(endpoint, "name", None)
        if endpoint in self._registry:
            # Keep what is in use as long as the name still has it.
            used = [ip for ip in found if join_address(ip, instance.port) == endpoint.address]
            self._registry.resolved(endpoint, (used or found)[0], self._clock())
