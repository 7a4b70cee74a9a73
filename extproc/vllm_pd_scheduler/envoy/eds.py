"""EDS: tell Envoy which instances there are and how they are, on the scheduler's gRPC port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from weakref import WeakKeyDictionary

from envoy.service.discovery.v3 import discovery_pb2

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import PD_ROLES, InstanceRole
from ..rpc import Method, ServerStream, served_by
from .limits import MAX_MESSAGE_BYTES, BadMessage, parse
from .load_assignment import TYPE_URL, LoadAssignment

log = logging.getLogger(__name__)

SERVICE = "envoy.service.endpoint.v3.EndpointDiscoveryService"

SERVING = "serving"
"""Name of the cluster that has a host while a P and a D can serve: Envoy's ``GET /health`` asks it."""

_ROLES = frozenset(role.value for role in PD_ROLES)

APART_S = 1.0
"""How long a stream for :data:`SERVING` waits for the streams of its connection that ask who there is. Of an
Envoy with several schedulers those may be with another one."""

JOIN_S = 0.05
"""Seconds between two pushes, at least. After a quiet time a change is told at once."""


class Told(set[str]):
    """Names of the clusters that one Envoy was told of, on whichever of its streams."""


class Subscription:
    """What one stream of Envoy's has asked for and has been sent (xDS, state of the world). No I/O.

    ``told`` is what Envoy's streams share: it hears who can serve after who there is.
    """

    def __init__(self, assignments: dict[str, LoadAssignment], told: Told) -> None:
        self._assignments = assignments
        self._told = told
        self._names: set[str] = set()
        self._sent: dict[str, int] = {}
        """Versions, by the names that are asked for."""
        self._nonce = 0

    def asked(self, request: discovery_pb2.DiscoveryRequest) -> None:
        """Read a request: a first one, an acknowledgement, a refusal, or other names than before.

        One that answers an older response than the last is void: Envoy answers the last one too. What Envoy
        refuses is not sent again; the next change is.
        """
        if request.response_nonce not in ("", str(self._nonce)):
            return
        if request.HasField("error_detail"):
            log.error("Envoy refused the endpoints: %s", request.error_detail.message[:1000])
        names = set(request.resource_names)
        unknown = names - self._names - self._assignments.keys()
        if unknown:
            shown = ", ".join(repr(name[:100]) for name in sorted(unknown)[:4])
            known = ", ".join(repr(name) for name in self._assignments)
            log.warning("Envoy asks for the endpoints of %s: its EDS clusters must be of %s", shown, known)
        self._names = names
        self._sent = {name: version for name, version in self._sent.items() if name in names}

    def response(self) -> bytes | None:
        """Return what Envoy does not have yet of the clusters that it asked for, if there is something."""
        known = {name: each for name, each in self._assignments.items() if each.version}
        asked = {name: each for name, each in known.items() if name in self._names}
        news = {name: each for name, each in asked.items() if self._sent.get(name) != each.version}
        if not self._told.union(news) >= _ROLES:
            news.pop(SERVING, None)
        if not news:
            return None
        self._told.update(news)
        self._sent |= {name: each.version for name, each in news.items()}
        self._nonce += 1
        response = discovery_pb2.DiscoveryResponse(
            version_info=".".join(str(each.version) for each in asked.values()),
            resources=[each.resource for each in news.values()],
            type_url=TYPE_URL,
            nonce=str(self._nonce),
        )
        return bytes(response.SerializeToString())


def _one_if_served(registry: Registry) -> Sequence[Endpoint]:
    """Return one D if a P and a D can serve, else nobody."""
    return registry.routable(InstanceRole.DECODE)[:1] if registry.routable(InstanceRole.PREFILL) else ()


class EndpointDiscovery:
    """Serves ``envoy.service.endpoint.v3.EndpointDiscoveryService`` (gRPC, state of the world).

    A change in the registry is encoded once, for all streams, and told to those that asked for its role.
    A role of which nothing is known yet (``knows``) is not told: an Envoy that has run for longer knows more.
    """

    def __init__(self, registry: Registry, knows: Callable[[InstanceRole], bool] = lambda _: True) -> None:
        self._knows = knows
        self._assignments = {
            role.value: LoadAssignment(role.value, partial(registry.endpoints, role)) for role in PD_ROLES
        }
        self._assignments[SERVING] = LoadAssignment(SERVING, partial(_one_if_served, registry))
        self._told: WeakKeyDictionary[object, Told] = WeakKeyDictionary()
        """By connection. Envoy has a stream for each cluster, and after a start they come when they like."""
        self._stale = True
        self._news: set[asyncio.Event] = set()
        """Of each open stream: set when there may be something to send."""
        self._push: asyncio.TimerHandle | None = None
        self._pushed_at = 0.0
        registry.changes.subscribe(self._on_change)

    def methods(self) -> dict[str, Method]:
        """Return what a server needs to serve this, by path."""
        return {f"/{SERVICE}/StreamEndpoints": served_by(self._stream, MAX_MESSAGE_BYTES)}

    def _on_change(self) -> None:
        self._stale = True
        if self._news and self._push is None:
            loop = asyncio.get_running_loop()
            self._push = loop.call_at(self._pushed_at + JOIN_S, self._push_now)

    def _push_now(self) -> None:
        self._push = None
        self._pushed_at = asyncio.get_running_loop().time()
        self._wake()

    def _wake(self) -> None:
        for news in self._news:
            news.set()

    def _response(self, subscription: Subscription) -> bytes | None:
        if self._stale:
            self._stale = False
            for name, assignment in self._assignments.items():
                if name not in _ROLES or self._knows(InstanceRole(name)):
                    assignment.refresh()
        return subscription.response()

    async def _stream(self, stream: ServerStream) -> None:
        told = self._told.setdefault(stream.connection, Told())
        subscription, news = Subscription(self._assignments, told), asyncio.Event()
        problem: BadMessage | None = None
        self._news.add(news)

        def wait_no_more() -> None:
            told.update(_ROLES)
            news.set()

        apart = asyncio.get_running_loop().call_later(APART_S, wait_no_more)
        try:
            async with asyncio.TaskGroup() as tasks:
                writing = tasks.create_task(self._write(stream, subscription, news))
                await self._read(stream, subscription, news)
                writing.cancel()
        except* BadMessage as errors:
            problem = errors.exceptions[0]  # type: ignore[assignment]  # one task reads
        finally:
            apart.cancel()
            self._news.discard(news)
        if problem is not None:
            log.warning("an EDS stream was ended: %s", problem)
            raise problem

    async def _read(self, stream: ServerStream, subscription: Subscription, news: asyncio.Event) -> None:
        while (data := await stream.read()) is not None:
            subscription.asked(parse(discovery_pb2.DiscoveryRequest, data))
            news.set()

    async def _write(self, stream: ServerStream, subscription: Subscription, news: asyncio.Event) -> None:
        """Send what is new. A stream that is read slowly gets the newest state, not each one in between."""
        while await news.wait():
            news.clear()
            if (response := self._response(subscription)) is not None:
                await stream.write(response)
                self._wake()  # a stream may have waited for this one
