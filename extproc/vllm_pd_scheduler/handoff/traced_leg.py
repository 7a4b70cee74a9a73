"""The prefill leg while tracing is on: each attempt is a span, which P's own spans continue."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..connectors import Attempt
from ..fleet.endpoint import Endpoint
from ..request import headers as names
from ..tracing import current
from .interfaces import PrefillAnswer, PrefillFailed, PrefillLeg


class TracedLeg:
    """A :class:`~.interfaces.PrefillLeg` that sends by ``leg``. ``clock`` is that of the request path."""

    def __init__(self, leg: PrefillLeg, clock: Callable[[], float]) -> None:
        self._leg = leg
        self._clock = clock

    async def __call__(
        self,
        endpoint: Endpoint,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        attempt: Attempt,
        sent: Callable[[], object] | None = None,
    ) -> PrefillAnswer:
        """Send the request, with the ``traceparent`` of this attempt in place of the client's."""
        trace = current.get()
        if trace is None:
            return await self._leg(endpoint, path, headers, body, attempt, sent)
        parent = trace.prefill_sent(endpoint.id, endpoint.url, self._clock())
        try:
            headers = {**headers, names.TRACEPARENT: parent}
            answer = await self._leg(endpoint, path, headers, body, attempt, sent)
        except PrefillFailed as error:
            trace.prefill_answered(self._clock(), failure=str(error))
            raise
        except BaseException:  # cancelled, since the client has left
            trace.prefill_answered(self._clock(), failure="cancelled")
            raise
        trace.prefill_answered(self._clock(), answer.status)
        return answer
