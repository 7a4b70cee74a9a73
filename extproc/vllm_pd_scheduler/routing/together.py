"""Prefills that run while D has their request: each is ended with it, or when it gets another one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ..connectors import Attempt
from ..fleet.endpoint import Endpoint
from ..handoff.interfaces import AbortLeg
from ..handoff.pending import PendingHandoff
from ..request.context import RequestContext

if TYPE_CHECKING:
    from .forward import Forward
    from .tried import Outcome, Tried

log = logging.getLogger(__name__)

LAST_WORD_S = 0.25
"""How long P's answer may come after the end of its request. P is done by then: D has had the blocks."""
OWN_REFUSAL_S = 1.0
"""How long D gets to refuse by itself what P has refused, before it is made to."""
REPEAT_S = 0.5
"""Pause between two aborts at D, which may not have had the request when the one before came."""

Send = Callable[[Callable[[], None]], Coroutine[Any, Any, "Outcome | None"]]
"""Makes a prefill, calls its argument when P has the request, and returns what has come of it."""


class Beside:
    """A prefill whose request D has at the same time, or will have in a moment."""

    def __init__(
        self,
        endpoint: Endpoint,
        attempt: Attempt,
        context: RequestContext,
        headers: Mapping[str, str],
        tried: Tried,
        abort: AbortLeg | None,
    ) -> None:
        self.endpoint = endpoint
        self.attempt = attempt
        self.context = context
        self.headers = headers
        self.tried = tried
        self.forward: Forward | None = None
        """The request at D."""
        self.failed = False
        """Whether P has failed or refused it, so that D waits in vain."""
        self._abort = abort
        self._losses = tried.losses
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[Outcome | None] | None = None

    @property
    def done(self) -> bool:
        """Whether P is at it no more."""
        return self._task is None or self._task.done()

    @property
    def sent(self) -> bool:
        """Whether P has said that D has all: what goes wrong then is D's fault."""
        return self.done and not self.failed

    async def begin(self, send: Send) -> Beside | Outcome | None:
        """Begin; return when P has the request, or what came of it if that was before."""
        self._task = asyncio.get_running_loop().create_task(send(self._has_it))
        ends: set[asyncio.Future[Any]] = {self._task, self._accepted}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self.stop()
            raise
        if not self._task.done():
            return self
        outcome = self._task.result()
        return self if isinstance(outcome, PendingHandoff) else outcome

    def _has_it(self) -> None:
        if not self._accepted.done():
            self._accepted.set_result(None)

    def attach(self, forward: Forward) -> None:
        """Say which request at D it is for: that ends if P fails, and P's leg when it has ended."""
        self.forward, forward.beside = forward, self
        if self._task is not None:
            self._task.add_done_callback(self._ended)

    def when_done(self, call: Callable[[], object]) -> None:
        """Call something when P is at it no more."""
        if self._task is None or self._task.done():
            call()
        else:
            self._task.add_done_callback(lambda _: call())

    def released(self) -> None:
        """Take it that the request has ended: P is given a moment to end too."""
        if not self.done:
            asyncio.get_running_loop().call_later(LAST_WORD_S, self.stop)

    def stop(self) -> None:
        """End P's leg, if it has not ended."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            self._abort_at(self.endpoint)

    def _ended(self, task: asyncio.Task[Outcome | None]) -> None:
        """Have D end what P has failed: it would wait for minutes."""
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            log.error("a prefill could not be made", exc_info=error)
        elif isinstance(task.result(), PendingHandoff):
            return
        self.failed = True
        if self.forward is not None:
            self.forward.losses += self.tried.losses - self._losses
        later = OWN_REFUSAL_S if self.tried.refusal is not None else 0.0
        asyncio.get_running_loop().call_later(later, partial(self._end_decode, asyncio.get_running_loop()))

    def _end_decode(self, loop: asyncio.AbstractEventLoop) -> None:
        forward = self.forward
        if forward is None or forward.ended or forward.beside is not self:
            return
        if forward.answering is not None:
            self._abort_at(forward.answering)
        loop.call_later(REPEAT_S, self._end_decode, loop)

    def _abort_at(self, endpoint: Endpoint) -> None:
        if self._abort is not None:
            self._abort(endpoint, self.attempt)
