"""Tell an instance that hangs from one that is slow: the one does not answer at all, the other late."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..fleet.endpoint import Endpoint
from .probe import Probe

HUNG_TIMEOUTS = 5
"""For how many times the limit of a probe one more question must stay open for its instance to hang."""


class Silence:
    """Asks instances that are unhealthy, since they leave probes unanswered, once more: for ``/health``.

    A probe is given up when its time is over, so it cannot tell late from never. This question stays open for
    ``seconds``. If it is not answered, and no probe is meanwhile, ``hung`` is called. Whatever comes is an
    answer, an error too: the server works, or its connections end by themselves.
    """

    def __init__(self, probe: Probe, seconds: float, hung: Callable[[Endpoint], None]) -> None:
        self._probe = probe
        self.seconds = seconds
        self._hung = hung
        self._asking: dict[Endpoint, asyncio.Task[None]] = {}
        self._of_removed: set[asyncio.Task[None]] = set()
        self._found: set[Endpoint] = set()
        """Those that hang: they need not be asked again."""

    def unanswered(self, endpoint: Endpoint) -> None:
        """Ask an unhealthy instance that has just left a probe without any answer."""
        if endpoint not in self._found and endpoint not in self._asking:
            self._asking[endpoint] = asyncio.ensure_future(self._ask(endpoint))

    def answered(self, endpoint: Endpoint) -> None:
        """Take it that an instance has answered something."""
        self._found.discard(endpoint)
        question = self._asking.pop(endpoint, None)
        if question is not None:
            question.cancel()

    def removed(self, endpoint: Endpoint) -> None:
        """Forget an instance. A question that is open stays: requests may wait there."""
        self._found.discard(endpoint)
        question = self._asking.pop(endpoint, None)
        if question is not None:
            self._of_removed.add(question)
            question.add_done_callback(self._of_removed.discard)

    async def stop(self) -> None:
        """End all questions."""
        questions, self._asking = (*self._asking.values(), *self._of_removed), {}
        for question in questions:
            question.cancel()
        await asyncio.gather(*questions, return_exceptions=True)

    async def _ask(self, endpoint: Endpoint) -> None:
        silent = await self._probe.gets_no_answer(endpoint, self.seconds)
        watched = self._asking.pop(endpoint, None) is not None
        if silent:
            if watched:
                self._found.add(endpoint)
            self._hung(endpoint)
