"""Freeing hand-offs that nobody will use, so that P's blocks do not stay pinned for the lease."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from ..connectors import Attempt, ConnectorFailed
from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..instance_http.errors import RequestFailed
from ..instance_http.pool import ConnectionPool
from ..models import InstanceRole
from ..telemetry.metrics import Telemetry
from .interfaces import PrefillAnswer
from .pending import PendingHandoff

Fitting = Callable[[Endpoint, Sequence[Endpoint]], Sequence[Endpoint] | None]
"""Returns those D that can use what a P hands over; ``None`` if all can."""

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
SECOND_TRY_S = 5.0
"""Seconds after which a release that no D has taken is tried once more."""
MAX_ANSWER_BYTES = 1 << 20
"""Of the answer, a refusal or one token."""


class HandoffReleaser:
    """Sends a decode instance a request with the hand-off that takes nothing of it, or a block: P frees it.

    ``fitting`` says which D can read what a P hands over: to others it may be what ends them.

    What cannot be released is counted as stranded; P frees it itself when the lease ends.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        registry: Registry,
        telemetry: Telemetry,
        fitting: Fitting,
    ) -> None:
        self._pool = pool
        self._registry = registry
        self._fitting = fitting
        self._telemetry = telemetry
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    def __call__(self, pending: PendingHandoff) -> None:
        """Release a hand-off in the background."""
        task = asyncio.ensure_future(self._release(pending))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def unwanted(self, prefill: Endpoint, answer: PrefillAnswer, attempt: Attempt) -> None:
        """Release what a prefill has left, if anything, whose client did not wait for it."""
        try:
            handoff = attempt.handoff(answer.body) if answer.status == 200 else None
        except ConnectorFailed:
            self._telemetry.handoffs.stranded(prefill.id)  # there may be one
            return
        if handoff is not None and handoff.pinned:
            self(PendingHandoff(handoff, prefill, attempt, deadline=0.0))

    async def close(self) -> None:
        """Wait for the releases that are under way; those that wait for their second try have it now."""
        self._closing.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _release(self, pending: PendingHandoff) -> None:
        """Free a hand-off, at the second try if need be: those that nobody uses come of D that fail."""
        body = pending.attempt.release_body(pending.handoff, pending.model)
        if body is None:
            self._count(pending, False)
            return
        released = await self._given_back(pending, body)
        if not released and not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SECOND_TRY_S):
                    await self._closing.wait()
            released = await self._given_back(pending, body)
        self._count(pending, released)

    def _count(self, pending: PendingHandoff, released: bool) -> None:
        if pending.prefill not in self._registry:
            return  # what is gone has no series
        counted = self._telemetry.handoffs.released if released else self._telemetry.handoffs.stranded
        counted(pending.prefill.id)

    async def _given_back(self, pending: PendingHandoff, body: bytes) -> bool:
        """Send the request to one D after another; return whether one has answered as it must."""
        registry, decode = self._registry, InstanceRole.DECODE
        known = (*registry.routable(decode), *registry.ejected(decode))
        fitting = self._fitting(pending.prefill, known)
        found = known if fitting is None else fitting
        for endpoint in [each for each in found if not each.rank][:3]:  # a rank is no other process
            headers = {"content-type": "application/json", **pending.handoff.headers}
            headers |= endpoint.instance.authorization
            to = endpoint.destination
            try:
                answer = await self._pool.post(
                    to, pending.handoff.release_path, headers, body, limit=MAX_ANSWER_BYTES, timeout=TIMEOUT_S
                )
                if answer.status == pending.handoff.released_by:
                    return True
            except RequestFailed as error:
                log.debug("release of a hand-off of %s: %s", pending.prefill.id, error)
        return False
