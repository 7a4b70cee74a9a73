"""Ending a leg at its instance, where the end of its connection alone would take it a while to notice."""

from __future__ import annotations

import asyncio
import logging

from ..connectors import Attempt
from ..fleet.endpoint import Endpoint
from ..instance_http.errors import RequestFailed
from ..instance_http.pool import ConnectionPool

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
MAX_ANSWER_BYTES = 1 << 16


class HttpAbort:
    """An :class:`~.interfaces.AbortLeg` by the POST that an attempt's connector names."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, endpoint: Endpoint, attempt: Attempt) -> None:
        """Start to end it; nobody hears whether it has worked."""
        task = asyncio.ensure_future(self._abort(endpoint, attempt))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait for those that are under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _abort(self, endpoint: Endpoint, attempt: Attempt) -> None:
        abort = attempt.abort()
        if abort is None:
            return
        headers = {"content-type": "application/json", **endpoint.instance.authorization}
        limit, to = MAX_ANSWER_BYTES, endpoint.destination
        try:
            await self._pool.post(to, abort.path, headers, abort.body, limit=limit, timeout=TIMEOUT_S)
        except RequestFailed as error:
            log.debug("abort of a leg at %s: %s", endpoint.id, error)
