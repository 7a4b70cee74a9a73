"""Has an Envoy drain: load balancers turn away, nothing new comes, and what runs may end."""

from __future__ import annotations

import asyncio
import contextlib
import re

import aiohttp

DRAIN_TIME_S = 5
"""Seconds of a drain in which Envoy still takes new connections: load balancers notice a drain late."""

_ACTIVE = "/stats?filter=^http.ingress.downstream_rq_active$"
_POLL_S = 0.25


async def begin_drain(admin: str) -> bool:
    """Make Envoy answer ``GET /health`` with 503, close idle connections, and stop listening later.

    ``admin`` is the URL of its admin interface, without a path. Return whether anybody has answered there.
    """
    found = False
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
        for path in ("/healthcheck/fail", "/drain_listeners?graceful"):
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                await session.post(admin + path)
                found = True
    return found


async def finish_drain(admin: str, within: float) -> int:
    """Wait until Envoy has no request of a client, ``within`` s at most; return how many it has then.

    Before ``DRAIN_TIME_S`` new ones may come, so it takes as long at least. An Envoy that does not answer
    has none.
    """
    clock = asyncio.get_running_loop().time
    start, active = clock(), 0
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
        while (elapsed := clock() - start) < within:
            try:
                async with session.get(admin + _ACTIVE) as response:
                    found = re.search(r": (\d+)", await response.text())
            except (aiohttp.ClientError, TimeoutError):
                return 0
            active = int(found[1]) if found else 0
            if not active and elapsed >= DRAIN_TIME_S:
                break
            await asyncio.sleep(_POLL_S)
    return active
