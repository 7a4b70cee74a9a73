"""What was sent to decode and has not ended, and what becomes of its hand-offs."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable

from ..fleet.endpoint import Endpoint, Reservation
from ..fleet.registry import Registry
from ..handoff.interfaces import ReleaseHandoff
from ..handoff.pending import PendingHandoff
from ..models import InstanceRole
from ..telemetry.metrics import Telemetry
from .attempts import FailedAttempt, Failure
from .forward import Forward

MAX_ENDED = 4096
"""Hand-offs of requests that have ended that are remembered, for a second or more: Envoy tells later why."""

_HANDOFF_IS_FREE = frozenset({Failure.CONNECT, Failure.RESET, Failure.STATUS})
"""How an attempt must have failed for nobody to be fetching its hand-off any more."""


class RequestsInFlight:
    """Keeps the forwards by the ids under which Envoy tells of their attempts.

    ``changed`` is called when one has ended. ``release_handoff`` frees a hand-off on its P; without it, it is
    left to the lease.
    """

    def __init__(
        self,
        registry: Registry,
        telemetry: Telemetry,
        clock: Callable[[], float],
        changed: Callable[[], None],
    ) -> None:
        self.release_handoff: ReleaseHandoff | None = None
        self._registry = registry
        self._telemetry = telemetry
        self._clock = clock
        self._changed = changed
        self._running: dict[str, Forward] = {}
        self._ended: dict[str, PendingHandoff] = {}
        self._run = secrets.token_hex(4)  # keeps our ids apart from those of a scheduler before a restart
        self._numbers = itertools.count()

    def start(
        self,
        decode: list[Endpoint],
        reservation: Reservation,
        body: bytes | None,
        first_byte_timeout: float | None,
        remove_headers: list[str],
    ) -> Forward:
        """Return a forward to the first of ``decode``, on which the reservation is; see :class:`Forward`."""
        forward = Forward(f"{self._run}-{next(self._numbers)}", decode, reservation, body)
        forward.first_byte_timeout = first_byte_timeout
        forward.remove_headers = remove_headers
        forward.on_release = self._released
        self._running[forward.id] = forward
        return forward

    def attempt_failed(self, attempt: FailedAttempt) -> None:
        """Take what Envoy tells of an attempt at decode that failed (see :mod:`.attempts`)."""
        if attempt.failure is Failure.LEFT:
            # A D that has not begun with the request drops it, and the hand-off without a word to P.
            if (pending := self._ended.pop(attempt.request or "", None)) is not None and attempt.first:
                self.free(pending)
            return
        endpoint = self._registry.at(InstanceRole.DECODE, attempt.address)
        if endpoint is None:
            return
        self._telemetry.attempt_failed(endpoint.id, attempt.failure)
        self._registry.failed(endpoint, f"decode: {attempt.failure}", self._clock())
        id_ = attempt.request or ""
        if (forward := self._running.get(id_)) is not None:
            if attempt.failure is Failure.CUT:
                forward.answering = None
            else:
                forward.moved(self._registry)
        # After a time-out that D may still be fetching: freeing the blocks then would spoil its prefix cache.
        if attempt.first and attempt.failure in _HANDOFF_IS_FREE:
            # A request can have ended before this is told: the next D was quick, or the client left.
            pending = self._ended.pop(id_, None) if forward is None else forward.pending
            if pending is not None:
                self.free(pending)

    def unused(self, forward: Forward) -> None:
        """Take that a forward will not be sent: the client left before Envoy could."""
        forward.release()
        if forward.pending is not None:
            self.free(forward.pending)

    def free(self, pending: PendingHandoff) -> None:
        """Have a hand-off freed that nobody will use."""
        if self.release_handoff is not None:
            self.release_handoff(pending)
        else:
            self._telemetry.handoff_stranded(pending.prefill.id)

    def _released(self, forward: Forward) -> None:
        self._running.pop(forward.id, None)
        if forward.pending is not None:
            forward.pending.prefill.pending_handoffs -= 1
            self._ended[forward.id] = forward.pending
            if len(self._ended) > MAX_ENDED:
                del self._ended[next(iter(self._ended))]
        if forward.answering is not None:
            self._registry.succeeded(forward.answering)
        self._changed()
