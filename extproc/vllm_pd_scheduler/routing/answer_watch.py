"""What the scheduler learns of an answer that passes through it, where no access log of Envoy's tells it."""

from __future__ import annotations

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import InstanceRole
from ..request import headers as names
from ..request.errors import Reject, reject
from ..telemetry import Ending
from .answer_head import AnswerHead
from .attempts import FailedAttempt, Failure, failure_of_status
from .forward import Forward
from .in_flight import RequestsInFlight
from .result import Result

_OWN_REASONS = (
    ("connection termination", Failure.RESET),
    ("remote reset", Failure.RESET),
    ("protocol error", Failure.RESET),
    ("connection failure", Failure.CONNECT),
    ("connection timeout", Failure.CONNECT),
    ("no healthy upstream", Failure.UNSENT),
    ("overflow", Failure.UNSENT),
    ("request timeout", Failure.TIMEOUT),
)
"""What Envoy writes in the answers that it gives in an instance's place, and what that means."""


class AnswerWatch:
    """Watches the answer to one request, and tells what came of it in place of Envoy's access logs.

    An answer that breaks off was cut by its instance or left by its client: a gateway does not say which. It
    is a doubt about the instance, as other ends that may be the client's are.
    """

    def __init__(
        self, in_flight: RequestsInFlight, registry: Registry, forward: Forward, began: float
    ) -> None:
        self._in_flight = in_flight
        self._registry = registry
        self._forward = forward
        self._by = forward.decode[0]
        """The one that has the request, as far as is known."""
        self._blamed = False
        self._began = began
        self.awaits_body = True
        """Whether no byte of the answer's body has come."""
        self.bytes = 0
        """Of the answer's body, so far: whoever sees them pass adds them."""
        self._sent: float | None = None
        self._ttft: float | None = None
        self._head: AnswerHead | None = None
        self._told = False

    def sent(self, now: float, tells_answers: bool) -> None:
        """The gateway has the request; it may tell when an answer to it begins."""
        self._sent = now
        if self._forward.sidecar is not None:
            self._forward.sidecar.begins_told = tells_answers and self._forward.stream

    def begun(self, head: AnswerHead, now: float) -> Reject | None:
        """Take the answer's headers; return what the client is to get in its place, if anything."""
        self._head = head
        forward = self._forward
        if not head.own:
            self._in_flight.answer_began(forward, head.status)
        if head.served:
            self._moved_to(head.served)
        if head.status != 200:
            if not head.own:
                self._failed(failure_of_status(head.status))
        elif head.attempts > 1 and forward.used_once:
            # The hand-off may have been used before, so this may be another prompt's text.
            message = "The gateway has sent this request twice, which it must not with a hand-off."
            return self._withheld(reject(503, message, "handoff_sent_twice"), now)
        elif head.served and not forward.fits(head.served):
            # What P has handed over is none of this one's, so this may be any text.
            message = "The gateway has sent this request to an instance that does not fit its hand-off."
            return self._withheld(reject(503, message, "handoff_misdirected"), now)
        return None

    def body_begun(self, first: bytes | bytearray | memoryview, now: float) -> None:
        """Take the first part of the answer's body, with or without what is around it in its message.

        In an answer of the gateway's own it says why there is no other.
        """
        self.awaits_body = False
        self._ttft = now - self._began
        head = self._head
        if head is not None and head.own and head.status != 200 and not self._blamed:
            words = bytes(first[:1000]).decode("utf-8", "replace")
            reason = next((failure for said, failure in _OWN_REASONS if said in words), None)
            self._failed(reason or failure_of_status(head.status))

    def client_headers(self) -> dict[str, str]:
        """Return headers that tell a client who has served it, as our own Envoy does."""
        forward, found = self._forward, {}
        if forward.prefill is not None:
            known = forward.call is None or forward.call.known
            found[names.PREFILL] = forward.prefill.id if known else names.LATER
        if (cached := forward.cached_tokens) is not None:
            found[names.CACHED_TOKENS] = str(cached)
        if self._head is not None and not self._head.own:
            found[names.DECODE] = self._by.id
        if forward.explanation:
            found[names.DECISION] = forward.explanation
        if forward.id_of_client:
            found[names.REQUEST_ID] = forward.id_of_client
        return found

    def late(self, now: float) -> Reject:
        """Return what the client gets, since no answer has begun in time."""
        self._failed(Failure.TIMEOUT)
        answer = reject(504, "No decode instance has answered in time.", "decode_timeout")
        return self._replaced(answer, now)

    def refused(self, answer: Reject, now: float) -> Reject:
        """Take the answer that the client gets in place of D's, through no fault of D's."""
        self._forward.answering = None
        return self._replaced(answer, now)

    def ended(self, complete: bool, by_gateway: bool, body_seen: bool, now: float) -> None:
        """The call is over: the answer is ``complete`` as far as it is seen, or has broken off.

        ``by_gateway`` tells whether the gateway has ended the call. If its connection was lost, the instance
        may go on. ``body_seen``: whether the answer's body comes here at all.
        """
        if self._told:
            return
        self._told = True
        head, forward = self._head, self._forward
        if head is None:
            if by_gateway:
                self._failed(Failure.LEFT)
                self._tell(Ending.LEFT, 0, now)
            else:
                forward.answering = None
                self._in_flight.handoffs.leave_to_lease(forward)
            return
        if head.own and not self._blamed:
            self._failed(failure_of_status(head.status))
        if head.status >= 500:
            self._tell(Ending.ERROR, head.status, now)
        elif head.status >= 400:
            self._tell(Ending.CLIENT_ERROR, head.status, now)
        elif complete or not body_seen:
            self._tell(Ending.OK, head.status, now)
        else:
            if by_gateway:
                self._failed(Failure.ABANDONED if self._ttft is None else Failure.BROKEN_OFF)
            else:
                forward.answering = None
            self._tell(Ending.LEFT, head.status, now)

    def _withheld(self, answer: Reject, now: float) -> Reject:
        """Give the client this in place of a text that may be wrong."""
        self._forward.answering = None
        self._in_flight.handoffs.leave_to_lease(self._forward)
        return self._replaced(answer, now)

    def _replaced(self, answer: Reject, now: float) -> Reject:
        self._told = True
        self._tell(Ending.ERROR, answer.status, now)
        return answer

    def _moved_to(self, address: str) -> None:
        """Count the request where it is, and what the gateway has passed over as in doubt."""
        forward = self._forward
        at = next((at for at, one in enumerate(forward.decode) if one.address == address), None)
        if at is None:
            endpoint = self._registry.at(InstanceRole.DECODE, address)
            if endpoint is not None:
                forward.taken_by(self._registry, endpoint)
                self._by = endpoint
            return
        self._by = forward.decode[at]
        for passed in forward.decode[:at]:
            self._in_flight.attempt_failed(self._attempt(Failure.PASSED_OVER, passed))

    def _failed(self, failure: Failure | None) -> None:
        """Tell that the request has failed at the one that has it, and that no other has it then."""
        if failure is None:
            return
        self._blamed = True
        self._forward.decode = [self._by]
        self._in_flight.attempt_failed(self._attempt(failure, self._by))

    def _attempt(self, failure: Failure, endpoint: Endpoint) -> FailedAttempt:
        head, forward = self._head, self._forward
        return FailedAttempt(
            "" if failure is Failure.UNSENT else endpoint.address or "",
            failure,
            forward.id,
            True,
            head.status if head is not None else 0,
            head.retry_after if head is not None else None,
            forward.request_id,
        )

    def _tell(self, ending: Ending, status: int, now: float) -> None:
        answered = self._head is not None and not self._head.own
        result = Result(
            self._forward.id,
            ending,
            status,
            now - self._began,
            self._ttft,
            None if self._sent is None else self._sent - self._began,
            (self._by.address or "") if answered else "",
            self.bytes,
        )
        self._in_flight.told(result)
