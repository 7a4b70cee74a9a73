"""Envoy's question whether it may try a request on one more instance.

Envoy retries by itself, and cannot tell how an attempt has failed from how the one before it did. A request
that has cost two instances must not have a third, one that was never delivered may. So the Lua filter of
cluster decode asks here before each further attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..request import headers as names
from ..routing.attempts import Retry
from ..rpc import CallError, Method, ServerStream, StatusCode, served_by
from .limits import MAX_MESSAGE_BYTES

SERVICE = "vllm_pd_scheduler.Retries"

REPORTS_S = 0.1
"""How long to wait for Envoy's reports of the attempts before, which come on another connection."""

_POLL_S = 0.005

_LAST = b"\x08\x01"
"""``true`` as the first field of a message."""

_REFUSALS = {
    Retry.LOST: (StatusCode.PERMISSION_DENIED, "two instances have lost the request"),
    Retry.SLOW: (StatusCode.RESOURCE_EXHAUSTED, "the fleet is slow"),
}


class RetryCheck:
    """Serves ``vllm_pd_scheduler.Retries/Allowed``: a message if allowed, else a gRPC error.

    The message is empty unless this is the last attempt if it ends in a 500, which then goes to the client.

    ``allowed`` is asked with a request's id and the number of attempts that were made; ``None`` means that
    not all of them have been reported yet. A report that does not come in time is not waited for.
    """

    def __init__(self, allowed: Callable[[str, int], Retry | None]) -> None:
        self._allowed = allowed

    def methods(self) -> dict[str, Method]:
        """Return what a server needs to serve this, by path."""
        return {f"/{SERVICE}/Allowed": served_by(self._check, MAX_MESSAGE_BYTES)}

    async def _check(self, stream: ServerStream) -> None:
        request, attempt = stream.metadata(names.ID) or "", stream.metadata(names.ATTEMPT) or ""
        made = int(attempt[:9]) - 1 if attempt.isdecimal() else 0
        answer = self._allowed(request, made)
        for _poll in range(round(REPORTS_S / _POLL_S)):
            if answer is not None:
                break
            await asyncio.sleep(_POLL_S)
            answer = self._allowed(request, made)
        answer = answer or self._allowed(request, 0)
        if answer in _REFUSALS:
            raise CallError(*_REFUSALS[answer])
        await stream.write(_LAST if answer is Retry.LAST else b"")
