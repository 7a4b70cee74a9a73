"""What Envoy tells a scheduler of requests that another one has: it is passed on, and who has them takes it.

Envoy tells whom it asks for new requests. Where its schedulers have no names, that may be another one than
the one that has the request, for a while after a failover.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import msgspec
from msgspec import Struct

from .attempts import FailedAttempt
from .result import Result

PASS_S = 0.01
"""Seconds in which what is told is put together."""
MAX_STRAYS = 1000
"""In one message; more than that is lost."""
_MAX_BYTES = 1 << 20
_MAX_ID = 100
_MAX_S = 1e7
_MAX_NUMBER = 1 << 53


class _Message(Struct, array_like=True, forbid_unknown_fields=True):
    attempts: list[FailedAttempt]
    results: list[Result]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Message)


class Strays:
    """Passes on what was told to the wrong scheduler, and takes what others pass on.

    ``send`` sends bytes to all others. ``attempt`` and ``result`` take what others were told; of a request
    that is not theirs they do nothing.
    """

    def __init__(
        self,
        send: Callable[[bytes], object],
        attempt: Callable[[FailedAttempt], None],
        result: Callable[[Result], object],
    ) -> None:
        self._send, self._attempt, self._result = send, attempt, result
        self._waiting = _Message([], [])

    def pass_on(self, told: FailedAttempt | Result) -> None:
        """Send what was told to all others, within ``PASS_S``.

        Without the client's id of a request: that is as long as the client likes, and nobody needs it.
        """
        if len(told.request or "") > _MAX_ID or len(told.address) > _MAX_ID:
            return  # no scheduler's request, and no instance
        waiting = self._waiting
        if not (waiting.attempts or waiting.results):
            asyncio.get_running_loop().call_later(PASS_S, self._flush)
        if len(waiting.attempts) + len(waiting.results) >= MAX_STRAYS:
            return
        if isinstance(told, Result):
            waiting.results.append(told)
        else:
            waiting.attempts.append(replace(told, request_id=""))

    def _flush(self) -> None:
        message, self._waiting = self._waiting, _Message([], [])
        self._send(_encoder.encode(message))

    def receive(self, data: bytes) -> bool:
        """Take what another scheduler was told; return ``False`` if that is nothing that can be."""
        if len(data) > _MAX_BYTES:
            return False
        try:
            message = _decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False
        few = len(message.attempts) + len(message.results) <= MAX_STRAYS
        if not (few and all(map(_attempt_can_be, message.attempts)) and all(map(_can_be, message.results))):
            return False
        for attempt in message.attempts:
            self._attempt(attempt)
        for result in message.results:
            self._result(result)
        return True


def _attempt_can_be(told: FailedAttempt) -> bool:
    return 0 <= told.status < 1000 and (told.retry_after is None or 0.0 <= told.retry_after <= _MAX_S)


def _can_be(told: Result) -> bool:
    times = (told.duration, told.ttft or 0.0, told.sent or 0.0)
    numbers = 0 <= told.status < 1000 and 0 <= told.answer_bytes < _MAX_NUMBER
    return numbers and all(0.0 <= each <= _MAX_S for each in times)
