"""Envoy's question whether it may try a request on one more instance.

Envoy retries by itself, and cannot tell how an attempt has failed from how the one before it did. A request
that has cost two instances must not have a third, one that was never delivered may. So the Lua filter of
cluster decode asks here before each further attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ..request import headers as names
from ..routing.attempts import Retry
from ..rpc import CallError, Method, ServerStream, StatusCode, served_by

SERVICE = "vllm_pd_scheduler.Retries"

REPORTS_S = 0.1
"""How long to wait for Envoy's reports of the attempts before, which come on another connection."""

_POLL_S = 0.005

_LAST = b"\x08\x01"
"""``true`` as the first field of a message."""
_SPLICE, _PREFILL = b"\x12", b"\x1a"
"""Before texts that are the second and the third."""
_MOST_AROUND = 1 << 10
"""Bytes of a message beside the request's body."""

_REFUSALS = {
    Retry.LOST: (StatusCode.PERMISSION_DENIED, "two instances have lost the request"),
    Retry.SLOW: (StatusCode.RESOURCE_EXHAUSTED, "the fleet is slow"),
    # The filter takes this for no answer: it makes one further attempt, no more.
    Retry.UNKNOWN: (
        StatusCode.NOT_FOUND,
        "another scheduler has the request, or one had it before a restart",
    ),
}


class RetryCheck:
    """Serves ``vllm_pd_scheduler.Retries/Allowed``: a message if allowed, else a gRPC error.

    The message says whether this is the last attempt if it ends in a 500, which then goes to the client. A
    request that no D serves without a prefill beside it comes with the host that was chosen and its body.
    Its message has what that body ends with there, and the P; without these nobody prefills it.

    ``allowed`` is asked with a request's id and the number of attempts that were made; ``None`` means that
    not all of them have been reported yet. A report that does not come in time is not waited for. ``again``
    has such a request, of ``largest`` bytes at most, prefilled anew.

    ``Begins`` is asked when the answer to such a request begins with 200. It is an error if the request is
    ``in_vain``: SGLang says what has failed a stream in its first event, after which there is no retry.
    """

    def __init__(
        self,
        allowed: Callable[[str, int], Retry | None],
        again: Callable[[str, str, bytes], Awaitable[tuple[bytes, str] | None]],
        in_vain: Callable[[str], bool],
        largest: int,
    ) -> None:
        self._allowed = allowed
        self._again = again
        self._in_vain = in_vain
        self._largest = largest + _MOST_AROUND

    def methods(self) -> dict[str, Method]:
        """Return what a server needs to serve this, by path."""
        return {
            f"/{SERVICE}/Allowed": served_by(self._check, self._largest),
            f"/{SERVICE}/Begins": served_by(self._begins, _MOST_AROUND),
        }

    async def _begins(self, stream: ServerStream) -> None:
        if self._in_vain(stream.metadata(names.ID) or ""):
            raise CallError(StatusCode.ABORTED, "P has failed the request")
        await stream.write(b"")

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
        said = _LAST if answer is Retry.LAST else b""
        if host := stream.metadata(names.HOST):
            begun = await self._again(request, host, await stream.read() or b"")
            if begun is not None:
                said += _SPLICE + _text(begun[0]) + _PREFILL + _text(begun[1].encode())
        await stream.write(said)


def _text(value: bytes) -> bytes:
    """Return a text as protobuf writes it: its length, seven bits a byte, and itself."""
    length, left = bytearray(), len(value)
    while left > 127:
        length.append(left & 127 | 128)
        left >>= 7
    return bytes((*length, left)) + value
