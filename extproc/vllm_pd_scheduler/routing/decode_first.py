"""Requests whose D begins, and asks the scheduler for their prefill when it has room for them.

A place at P is kept from the queue on, so that D holds no blocks while all P are busy. P gets nothing before
D has called; it is chosen anew then. D waits with its blocks allocated until P has written all of them, and
vLLM keeps them until then, also when the client has left. So what D has asked for is done to its end. A call
that comes a moment after the end is answered for the same reason.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from msgspec.structs import replace

from ..admission.body_memory import BodyAllocation, BodyMemory
from ..config import SchedulerConfig
from ..connectors import ConnectorFailed, Connectors
from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..handoff.pending import PendingHandoff
from ..records.decision import Decision
from ..request.body import JsonBody
from ..request.context import RequestContext
from ..request.errors import Reject, reject
from ..telemetry import Served, Telemetry, log_lines
from ..telemetry.pace import Pace
from ..tracing import current
from .decode import DecodeStage
from .decode_choice import NoPartner, ToDecode
from .expected_call import ExpectedCall
from .forward import Forward
from .later import Later
from .prefill import PrefillStage
from .tried import AskedLater, WithoutHandoff

log = logging.getLogger(__name__)

GRACE_S = 3.0
"""How long after the end of a request its D may still ask for the prefill: D hears of that end, and its
engine at the end of a step, while the call is under way."""

_FAILED = reject(503, "The prefill of this request has failed.", "no_prefill")

_SPLICE_BYTES = 4096
"""More than an invitation adds to a body."""


class Called(StrEnum):
    """What a call was: the label ``outcome`` of ``pd_scheduler_metaserver_calls_total``."""

    ACCEPTED = "accepted"
    REPEATED = "repeated"
    """D has called before for the same request: nothing is done again."""
    UNKNOWN = "unknown"
    """Of no request that is in flight: it has ended, or there was none."""
    ELSEWHERE = "elsewhere"
    """Not from the address of the D that was chosen."""
    UNREADABLE = "unreadable"
    """What it says makes no sense."""


@dataclass(slots=True, eq=False)
class _Kept:
    """What is kept of a request until its D has called, and P has done the prefill."""

    id: str
    """The last part of the URL that D calls. Nobody can guess it."""
    decode: Endpoint
    later: AskedLater
    context: RequestContext
    headers: Mapping[str, str]
    body: JsonBody | None
    """``None`` when P has answered."""
    forward: Forward
    call: ExpectedCall
    memory: BodyAllocation
    leg: asyncio.Task[None] | None = None
    """The prefill, since D has called."""


class DecodeFirst:
    """Sends requests to a D that asks for their prefill, and does that when it is asked.

    ``url`` returns the base of the URL that a D at a host is to call; while it is ``None``, nobody listens.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        prefill: PrefillStage,
        decode: DecodeStage,
        registry: Registry,
        connectors: Connectors,
        memory: BodyMemory,
        telemetry: Telemetry,
        changed: Callable[[], None],
        clock: Callable[[], float],
        after: Later,
    ) -> None:
        self._config = config
        self._prefill = prefill
        self._decode = decode
        self._registry = registry
        self._connectors = connectors
        self._memory = memory
        self._telemetry = telemetry
        self._changed = changed
        self._clock = clock
        self._after = after
        self._pace = Pace(clock)
        self._url: Callable[[str], str] | None = None
        self._expected: dict[str, _Kept] = {}

    def __len__(self) -> int:
        """How many calls are expected, or answered and not over."""
        return len(self._expected)

    def listen(self, url: Callable[[str], str] | None) -> None:
        """Take calls at what ``url`` returns from now on, or no more."""
        self._url = url
        self._prefill.can_be_asked = url is not None

    async def idle(self) -> None:
        """Wait for the prefills that are under way: their D wait for them, also when no client does."""
        while legs := [kept.leg for kept in self._expected.values() if kept.leg and not kept.leg.done()]:
            await asyncio.wait(legs)

    async def close(self) -> None:
        """End the prefills that are under way."""
        legs = [kept.leg for kept in self._expected.values() if kept.leg is not None]
        for leg in legs:
            leg.cancel()
        await asyncio.gather(*legs, return_exceptions=True)

    # -- before the call

    def send(
        self,
        context: RequestContext,
        headers: Mapping[str, str],
        body: JsonBody,
        later: AskedLater,
        decision: Decision,
    ) -> Forward | Reject:
        """Send a request to a D that is to ask for its prefill; without one that fits P, to any D."""
        changed = body.raw if body.changed else None
        if self._url is None or len(body.raw) + _SPLICE_BYTES > self._config.max_body_bytes:
            return self._by_decode(context, changed, later, decision)
        # Of an answer in one piece, the first byte comes after the prefill.
        first = self._decode.limit(context) + (0.0 if context.stream else self._config.prefill_timeout)
        beside = later.reservation.endpoint
        try:
            forward = self._decode.send(
                ToDecode(context, decision, Served.SPLIT, changed, first, beside=beside)
            )
        except NoPartner:
            return self._by_decode(context, changed, later, decision)
        except Exception:
            later.end(self._clock())
            raise
        if isinstance(forward, Reject):
            later.end(self._clock())
            return forward
        self._expect(forward, context, headers, body, later, self._url, decision)
        return forward

    def _by_decode(
        self,
        context: RequestContext,
        body: bytes | None,
        later: AskedLater,
        decision: Decision,
    ) -> Forward | Reject:
        later.end(self._clock())
        return self._decode.without_handoff(context, body, WithoutHandoff(failed=False), decision)

    def _expect(
        self,
        forward: Forward,
        context: RequestContext,
        headers: Mapping[str, str],
        body: JsonBody,
        later: AskedLater,
        url: Callable[[str], str],
        decision: Decision,
    ) -> None:
        decode, id_ = forward.decode[0], secrets.token_urlsafe(16)
        attempt = later.attempt.towards(self._connectors.peer(decode))
        try:
            invited = attempt.invitation(f"{url(decode.host)}/v1/metaserver/{id_}")
            invitation = replace(invited, pinned=False)  # P has got nothing
            splice = attempt.splice(body, invitation)
            usable = self._decode.fits(splice)
        except (ConnectorFailed, OSError):  # or D cannot be reached from here
            usable = False
        if not usable:
            later.end(self._clock())  # whoever gets it prefills it
            forward.served = decision.served = Served.LOCAL
            decision.not_split = "splice"
            return
        forward.splice, prefill = splice, later.reservation.endpoint
        forward.pending = PendingHandoff(
            invitation, prefill, attempt, float("inf"), context.model, decode, later.tried.losses
        )
        forward.losses, forward.only, forward.freed = later.tried.losses, [decode], True
        memory = BodyAllocation(self._memory)
        memory.keep(len(body.raw))
        later = replace(later, attempt=attempt)
        call = ExpectedCall(lambda: self._request_ended(kept))
        kept = _Kept(id_, decode, later, context, headers, body, forward, call, memory)
        self._expected[id_], forward.call = kept, call

    # -- the call

    def not_for_us(self, id_: str, host: str) -> Called | None:
        """Return what a call is that needs no prefill, whatever it says; ``None`` for :meth:`called`."""
        outcome = self._needless(id_, host)
        if outcome is not None:
            self._telemetry.decodes.metaserver_called(outcome)
        return outcome

    def called(self, id_: str, host: str, said: bytes) -> Called:
        """Take a call from ``host``, an IP address, and begin the prefill that it asks for."""
        outcome = self._needless(id_, host) or self._taken(self._expected[id_], host, said)
        self._telemetry.decodes.metaserver_called(outcome)
        return outcome

    def _needless(self, id_: str, host: str) -> Called | None:
        kept = self._expected.get(id_)
        if kept is None:
            return self._complain(Called.UNKNOWN, "of no request that is in flight", host)
        decode = kept.decode
        if self._config.metaserver_callers == "decode" and host != decode.host:
            what = f"for a request of {decode.id}, which is at {decode.host} (see metaserver_callers)"
            return self._complain(Called.ELSEWHERE, what, host)
        return None if kept.leg is None else Called.REPEATED

    def _taken(self, kept: _Kept, host: str, said: bytes) -> Called:
        decode = kept.decode
        try:
            known = kept.later.attempt.asked(said)
        except ConnectorFailed:  # which says nothing of D
            self._give_up(kept, _FAILED)
            return Called.UNREADABLE
        if known is None:
            if not kept.call.refused:  # D tries again, as if the call had not come
                self._registry.ends.failed(
                    decode, "decode: its call for the prefill makes no sense", self._clock()
                )
            self._give_up(kept, reject(502, f"{decode.id} has asked for nonsense.", "metaserver_call"))
            return self._complain(Called.UNREADABLE, f"of {decode.id} that makes no sense", host)
        kept.leg = asyncio.ensure_future(self._do(kept, known))
        kept.leg.add_done_callback(lambda _: self._done(kept))
        return Called.ACCEPTED

    def _complain(self, outcome: Called, what: str, host: str) -> Called:
        if self._pace.due((outcome, host)):
            log.warning("metaserver: a call came from %s %s (logged at most once a minute)", host, what)
        return outcome

    async def _do(self, kept: _Kept, known: object) -> None:
        """Have the prompt prefilled; D has it then."""
        forward, body, pending = kept.forward, kept.body, kept.forward.pending
        assert body is not None
        assert pending is not None
        log_lines.request_id.set(kept.context.request_id)
        current.set(forward.trace)
        outcome = await self._prefill.asked(kept.later, known, kept.decode, kept.context, kept.headers, body)
        forward.losses = max(forward.losses, kept.later.tried.losses)
        if isinstance(outcome, PendingHandoff):
            pending.prefill, kept.call.known = outcome.prefill, True
            forward.decision.prompt_tokens = kept.context.prompt_tokens
        elif isinstance(outcome, Reject):
            self._give_up(kept, outcome)
        else:  # P's connector has failed
            self._give_up(kept, _FAILED)

    def _done(self, kept: _Kept) -> None:
        leg = kept.leg
        if leg is not None and not leg.cancelled() and (error := leg.exception()) is not None:
            log.error("a prefill that D has asked for could not be done", exc_info=error)
            self._give_up(kept, _FAILED)
        kept.body = None
        kept.memory.release()
        if kept.call.ended:
            self._expected.pop(kept.id, None)

    def _give_up(self, kept: _Kept, answer: Reject) -> None:
        """End a request whose D waits for what will not come: nothing else ends it as soon."""
        call, forward = kept.call, kept.forward
        if call.ended or call.refused:
            return
        call.refused = True
        forward.answering, forward.decision.reason = None, answer.reason
        if forward.refuse is not None:
            forward.refuse(answer)

    # -- the end

    def _request_ended(self, kept: _Kept) -> None:
        """Forget a request that has ended, a while later or when its prefill is done.

        One more try of a prefill is given up: if the first one has done it after all, D's blocks are another
        prompt's soon.
        """
        if kept.leg is None:
            kept.later.end(self._clock())
            self._changed()
            self._after(GRACE_S, lambda: self._forget(kept))
        elif kept.leg.done():
            self._expected.pop(kept.id, None)
        elif kept.later.tried.may_have_written:
            kept.leg.cancel()

    def _forget(self, kept: _Kept) -> None:
        """Expect no call any more, unless it has come."""
        if kept.leg is None:
            self._expected.pop(kept.id, None)
            kept.body = None
            kept.memory.release()
