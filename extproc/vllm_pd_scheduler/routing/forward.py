"""Where a request goes after routing, until its answer has ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from msgspec import Struct, field

from ..connectors import Splice
from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..fleet.reservation import Reservation
from ..handoff.pending import PendingHandoff
from ..records.decision import Decision
from ..records.traffic import Recorded
from ..request import gateway_names
from ..request import headers as names
from ..request.errors import Reject
from ..telemetry import Served
from .attempts import KEY_REFUSED, OF_THE_INSTANCE
from .expected_call import ExpectedCall
from .prefill_claim import PrefillClaim

if TYPE_CHECKING:
    from ..tracing.request_trace import RequestTrace


class PrefillBeside(Protocol):
    """A prefill that runs while D has the request: :class:`.together.Beside`, which is not of the core."""

    @property
    def endpoint(self) -> Endpoint:
        """The P."""
        ...

    @property
    def sent(self) -> bool:
        """Whether P has said that D has all."""
        ...

    @property
    def failed(self) -> bool:
        """Whether P has failed or refused it."""
        ...

    def when_done(self, call: Callable[[], object]) -> None:
        """Call something when P is at it no more."""
        ...

    def released(self) -> None:
        """Take it that the request has ended."""
        ...


class Forward(Struct, eq=False):
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
    transferred: float = 0.0
    """Tokens that D has to fetch, as far as is known."""
    step: float = 0.0
    """Predicted seconds of a decode step at D with it."""
    ranks: Mapping[str, int] | None = None
    """Which rank is meant of those of ``decode`` that have several, by address; ``None``: none has."""
    call: ExpectedCall | None = None
    """By which D asks for the prefill, if its protocol wants that."""
    refuse: Callable[[Reject], None] | None = None
    """Gives the client an error in place of D's answer, or cuts that, if it can be done."""
    sidecar: PrefillClaim | None = None
    """What it takes on the P that the sidecar at D asks, in place of a hand-off."""
    beside: PrefillBeside | None = None
    """The prefill that runs while D has the request. Its D can use that alone, once."""
    freed: bool = False
    """Whether the hand-off has been given back to P."""
    first_byte_timeout: float | None = None
    served: Served = Served.SPLIT
    """How it is served."""
    stream: bool = False
    """Whether the answer is a stream of events."""
    remove_headers: list[str] = []
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
    answering: Endpoint | None = None
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
        """The instance that prefilled, or that a sidecar asks to, if one does."""
        if self.pending is not None:
            return self.pending.prefill
        if self.beside is not None:
            return self.beside.endpoint
        return self.sidecar.endpoint if self.sidecar is not None else None

    @property
    def cached_tokens(self) -> int | None:
        """How many tokens of the prompt P had cached, if D cannot know it."""
        handoff = None if self.pending is None else self.pending.handoff
        return None if handoff is None or handoff.tells_cached else handoff.cached_tokens

    @property
    def used_once(self) -> bool:
        """Whether it carries a hand-off that no second D may use."""
        made = self.beside is not None or self.call is not None
        return made or (self.pending is not None and self.pending.handoff.pinned)

    @property
    def ended(self) -> bool:
        """Whether its answer has ended."""
        return self.on_release is None

    @property
    def prefilled(self) -> bool:
        """Whether P has done its part before D got the request."""
        return self.pending is not None and self.call is None

    @property
    def hands_over(self) -> Endpoint | None:
        """The P of which its first D is to fetch something, if there is one."""
        pending = self.pending if self.call is None else None
        return pending.prefill if pending is not None and pending.handoff.pinned else None

    @property
    def retried(self) -> frozenset[int]:
        """Statuses of D after which Envoy tries another one."""
        return self.RETRIED | self.retried_refusals

    @property
    def retried_refusals(self) -> frozenset[int]:
        """Statuses of refusals after which another D is tried, since they are the instance's own mistake."""
        if self.prefilled:
            return OF_THE_INSTANCE
        return KEY_REFUSED if self.decode[0].instance.api_key is not None else frozenset()

    @property
    def id_of_client(self) -> str:
        """The client's ``X-Request-Id`` where D gets another one; else empty."""
        another = self.pending is not None and names.REQUEST_ID in self.pending.handoff.headers
        return self.request_id if another else ""

    def headers(self) -> dict[str, str]:
        """Headers to set on the request to decode."""
        found = {
            names.DESTINATION: ",".join(str(endpoint.address) for endpoint in self.decode),
            names.ID: self.id,
        }
        if (pending := self.pending) is not None:
            found[names.PREFILL] = names.LATER if self.call is not None else pending.prefill.id
            found |= pending.handoff.headers
            if (cached := self.cached_tokens) is not None:
                found[names.CACHED_TOKENS] = str(cached)
            if self.id_of_client:
                found[names.CLIENT_REQUEST_ID] = self.id_of_client
        elif self.beside is not None:
            found[names.PREFILL] = self.beside.endpoint.id
        elif self.sidecar is not None:
            found[names.PREFILL] = self.sidecar.endpoint.id
            found[gateway_names.PREFILLER] = str(self.sidecar.endpoint.address)
        if self.first_byte_timeout is not None:
            found[names.FIRST_BYTE_TIMEOUT] = str(max(1, int(self.first_byte_timeout * 1000)))
        if (failed := self.decision.continues_from) is not None:
            found[names.CONTINUED_FROM] = f"{failed}/{self.decision.continues_after}"
        if self.explanation:
            found[names.DECISION] = self.explanation
        if self.stream:
            found[names.STREAM] = "true"
        if refusals := self.retried_refusals:
            found[names.RETRIABLE_STATUS_CODES] = ",".join(map(str, sorted(refusals)))
        found |= self.decode[0].instance.authorization
        if self.trace is not None:
            found[names.TRACEPARENT] = self.trace.traceparent
        return found

    def for_gateway(self, fallbacks: bool) -> None:
        """Leave in ``decode`` what a gateway is told: more than one only if it takes ``fallbacks``.

        With what is made for the first there is one in any case, since a gateway sends its retries with the
        same body and headers.
        """
        made = self.splice is not None or self.used_once or self.only is not None
        made = made or self.decode[0].rank is not None
        if len(self.decode) > 1 and (made or not fallbacks):
            self.decode = self.decision.decode_to = self.decode[:1]

    def fits(self, address: str) -> bool:
        """Whether a D may have what P has handed over, or may ask it: always if there is no P."""
        if self.prefill is None or self.only is None:
            return True
        return any(str(endpoint.address) == address for endpoint in self.only)

    def gateway_headers(self) -> dict[str, str]:
        """Headers to set on a request that goes back to a gateway: without those that our own Envoy reads.

        A hand-off is to be tried once.
        """
        found = {names.DESTINATION: ",".join(str(endpoint.address) for endpoint in self.decode)}
        if self.used_once:
            found[gateway_names.MAX_RETRIES] = "0"
        if self.pending is not None:
            found |= self.pending.handoff.headers
        if self.sidecar is not None:
            found[gateway_names.PREFILLER] = str(self.sidecar.endpoint.address)
        found |= self.decode[0].own_headers
        if self.trace is not None:
            found[names.TRACEPARENT] = self.trace.traceparent
        return found

    def taken_by(self, registry: Registry, endpoint: Endpoint) -> None:
        """Count the request on another instance, which a gateway has chosen itself."""
        self.decode, self.answering = [endpoint], endpoint
        if self.reservation.active:
            self.reservation = registry.work.move(self.reservation, endpoint)

    def moved(self, registry: Registry, address: str) -> None:
        """Count the request on the next of ``decode``, where Envoy sends it when the one before failed."""
        current = self.reservation
        failed = next((at for at, one in enumerate(self.decode) if one.address == address), 0)
        following = self.decode[failed + 1 :]
        self.answering = following[0] if following else None
        if current.active and following:
            self.reservation = registry.work.move(current, following[0])

    def sent(self) -> None:
        """Let go of what may be large, since Envoy has it."""
        self.body = self.splice = None

    def close_trace(self, now: float) -> None:
        """End its spans, if it is traced."""
        if self.trace is None:
            return
        if (answering := self.answering) is None:
            self.trace.close(now)
        else:
            self.trace.close(now, answering.id, answering.url)

    def release(self) -> None:
        """Give back the reservation. Doing it twice is the same as once."""
        self.reservation.release()
        if self.on_release is not None:
            on_release, self.on_release = self.on_release, None
            on_release(self)
