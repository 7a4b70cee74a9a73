"""The service that Envoy's ext_proc filter calls: one call for each HTTP request."""

from __future__ import annotations

import asyncio
import logging
from weakref import WeakSet

from ...request.headers import ENVOY_CONFIG_VERSION, ENVOY_CONFIGS_THAT_WORK
from ...router import PDRouter
from ...rpc import Call, Method
from ..limits import MAX_MESSAGE_BYTES
from .exchange import Exchange
from .messages import SERVICE

log = logging.getLogger(__name__)

COMPLAIN_EVERY_S = 10.0
"""An Envoy with a wrong mode sends what is wrong with each request: that is logged at most so often."""


class ExtProcService:
    """Serves ``envoy.service.ext_proc.v3.ExternalProcessor``."""

    def __init__(self, router: PDRouter) -> None:
        self.router = router
        self.open_streams = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._next_complaint = 0.0
        self._take_lists: WeakSet[object] = WeakSet()
        """Connections of gateways that have told who has served a request."""
        self._tell_answers: WeakSet[object] = WeakSet()
        """Connections of gateways that have told of an answer."""
        self._old_configs: set[str] = set()
        """Versions that work and that were complained of."""

    def methods(self) -> dict[str, Method]:
        """Return what a server needs to serve this, by path: the largest message has a request's body."""
        return {
            f"/{SERVICE}/Process": Method(self._open, self.router.config.max_body_bytes + MAX_MESSAGE_BYTES)
        }

    async def idle(self) -> None:
        """Wait until no stream is open, that is, until every response has ended."""
        await self._idle.wait()

    def _open(self, call: Call) -> Exchange:
        self.open_streams += 1
        self._idle.clear()
        return Exchange(call, self)

    def speaks_buffered(self, version: str | None) -> None:
        """Complain of an Envoy that should be as ``envoy/envoy.yaml`` says, if of another ``version``."""
        if version != ENVOY_CONFIG_VERSION:
            self._complain_of_config(version)

    def ended(self) -> None:
        """Count a stream that has ended."""
        self.open_streams -= 1
        if not self.open_streams:
            self._idle.set()

    def takes_list(self, connection: object) -> bool:
        """Whether the gateway at a connection takes a list of destinations.

        An Envoy whose cluster is an ORIGINAL_DST takes one only, and answers 503 to a list. So there is one
        until a gateway has told who has served a request, as the protocol wants it: such an Envoy does not.
        """
        return connection in self._take_lists

    def tells_answers(self, connection: object) -> bool:
        """Whether the gateway at a connection has told of an answer."""
        return connection in self._tell_answers

    def told_answer(self, connection: object, served: bool) -> None:
        """Learn that the gateway at a connection tells of an answer, and perhaps who has ``served`` it."""
        self._tell_answers.add(connection)
        if served:
            self._take_lists.add(connection)

    def complain(self, error: Exception) -> None:
        """Log what an Envoy sends that it should not."""
        self._warn(f"an ext_proc stream was ended, and Envoy lets its request pass: {error}")

    def _complain_of_config(self, version: str | None) -> None:
        if version not in ENVOY_CONFIGS_THAT_WORK:
            self._warn(
                "Envoy's configuration does not fit this scheduler, and hand-offs may not reach D: "
                "see what has changed in envoy/envoy.yaml"
            )
        elif version not in self._old_configs:
            self._old_configs.add(version)
            log.warning(
                "Envoy's configuration is of the earlier version %s: requests are served, but %s: see what "
                "has changed in envoy/envoy.yaml",
                version,
                ENVOY_CONFIGS_THAT_WORK[version],
            )

    def _warn(self, words: str) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._next_complaint:
            self._next_complaint = now + COMPLAIN_EVERY_S
            log.warning("%s", words)
