"""Where a request goes after routing, until its answer has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ..connectors import Splice
from ..fleet.endpoint import Endpoint, Reservation
from ..fleet.registry import Registry
from ..handoff.pending import PendingHandoff
from ..records.decision import Decision
from ..records.recording import Recorded
from ..request import headers as names
from ..telemetry import Served
from .attempts import KEY_REFUSED, OF_THE_INSTANCE

if TYPE_CHECKING:
    from ..tracing.request_trace import RequestTrace


@dataclass(slots=True, eq=False)
class Forward:
    """Where a request goes: to the first of ``decode``, or a further one if that fails.

    ``body`` replaces the client's; ``None`` if that stays as it is. ``splice`` is how the hand-off goes into
    it, on the first attempt. ``release`` must be called when the answer has ended, however it ended.
    """

    RETRIED: ClassVar[frozenset[int]] = frozenset({429, 500, 502, 503, 504})
    """Statuses after which Envoy tries the next of ``decode``, as ``envoy/envoy.yaml`` says."""

    id: str
    decode: list[Endpoint]
    reservation: Reservation
    body: bytes | None = None
    splice: Splice | None = None
    pending: PendingHandoff | None = None
    only: Sequence[Endpoint] | None = None
    """The D that can use the hand-off; ``None``: all."""
    freed: bool = False
    """Whether the hand-off has been given back to P."""
    first_byte_timeout: float | None = None
    served: Served = Served.SPLIT
    """How it is served."""
    stream: bool = False
    """Whether the answer is a stream of events."""
    remove_headers: list[str] = field(default_factory=list)
    comparable: bool = True
    """Whether refusals by its D can be compared with those of others: not on paths that nobody may serve."""
    refused_by: Endpoint | None = None
    """The P that has refused the request with ``refused_status``; what D says will show who is right."""
    refused_status: int = 0
    errors: tuple[Endpoint, ...] = ()
    """Who has answered 500, P and D. If several have, the request may be the reason."""
    prompt: int = 0
    """The prompt's fingerprint (see :mod:`..request.fingerprint`)."""
    losses: int = 0
    """Connections that it has lost after it was delivered, on P or D."""
    failed_attempts: int = 0
    """Attempts at D that have been reported as failed."""
    held_up: bool = False
    """Whether its newest attempt has timed out at a D that does no worse than the others."""
    decision: Decision = field(default_factory=Decision)
    """Where it is noted what becomes of it."""
    explanation: str = ""
    """What the answer says of the decision; empty: the client has not asked."""
    request_id: str = ""
    """Its ``X-Request-Id``."""
    ended_by_envoy: bool = False
    """Whether Envoy has ended the call itself: not the loss of a connection, after which D may go on."""
    recorded: Recorded | None = None
    """What is kept of it for a trace of the traffic, if somebody reads one."""
    trace: RequestTrace | None = None
    """Its spans, if it is traced."""
    on_release: Callable[[Forward], None] | None = None
    answering: Endpoint | None = field(init=False)
    """The one of ``decode`` that has the request, as far as is known; ``None`` when all have failed it."""

    def __post_init__(self) -> None:
        self.answering = self.decode[0]

    def __str__(self) -> str:
        """Say in a line for the log who serves it."""
        prefill = f"P {self.prefill.id}, " if self.prefill else ""
        decode = ", then ".join(endpoint.id for endpoint in self.decode)
        return f"{self.served}, {prefill}D {decode}; x-pd-id {self.id}"

    @property
    def prefill(self) -> Endpoint | None:
        """The instance that prefilled, if one did."""
        return self.pending.prefill if self.pending else None

    @property
    def retried(self) -> frozenset[int]:
        """Statuses of D after which Envoy tries another one."""
        return self.RETRIED | self.retried_refusals

    @property
    def retried_refusals(self) -> frozenset[int]:
        """Statuses of refusals after which another D is tried, since they are the instance's own mistake."""
        if self.pending is not None:
            return OF_THE_INSTANCE
        return KEY_REFUSED if self.decode[0].instance.api_key is not None else frozenset()

    def headers(self) -> dict[str, str]:
        """Headers to set on the request to decode."""
        found = {
            names.DESTINATION: ",".join(str(endpoint.address) for endpoint in self.decode),
            names.ID: self.id,
        }
        if self.pending is not None:
            found[names.PREFILL] = self.pending.prefill.id
            found |= self.pending.handoff.headers
            if names.REQUEST_ID in found and self.request_id:
                found[names.CLIENT_REQUEST_ID] = self.request_id
        if self.first_byte_timeout is not None:
            found[names.FIRST_BYTE_TIMEOUT] = str(max(1, int(self.first_byte_timeout * 1000)))
        if self.explanation:
            found[names.DECISION] = self.explanation
        if self.stream:
            found[names.STREAM] = "true"
        if refusals := self.retried_refusals:
            found[names.RETRIABLE_STATUS_CODES] = ",".join(map(str, sorted(refusals)))
        if (key := self.decode[0].instance.api_key) is not None:
            found["authorization"] = f"Bearer {key}"
        if self.trace is not None:
            found[names.TRACEPARENT] = self.trace.traceparent
        return found

    def moved(self, registry: Registry, address: str) -> None:
        """Count the request on the next of ``decode``, where Envoy sends it when the one before failed."""
        current = self.reservation
        failed = next((at for at, one in enumerate(self.decode) if one.address == address), 0)
        following = self.decode[failed + 1 :]
        self.answering = following[0] if following else None
        if current.active and following:
            self.reservation = registry.move(current, following[0])

    def sent(self) -> None:
        """Let go of what may be large, since Envoy has it."""
        self.body = self.splice = None

    def release(self) -> None:
        """Give back the reservation. Doing it twice is the same as once."""
        self.reservation.release()
        if self.on_release is not None:
            on_release, self.on_release = self.on_release, None
            on_release(self)
