"""One try of a check: a prompt once split, with a P and a D, and once whole, at the same D."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec

from ..config import SchedulerConfig
from ..connectors import Attempt, ConnectorFailed, Connectors, Order
from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..handoff.interfaces import AskPrefill, PrefillFailed, PrefillLeg
from ..handoff.pending import PendingHandoff
from ..instance_http.errors import RequestFailed, TimedOut
from ..instance_http.pool import ConnectionPool
from ..models import InstanceRole
from ..request import headers as names
from ..request.api import COMPLETIONS
from ..request.body import JsonBody
from ..request.context import RequestContext
from ..routing.in_flight import RequestsInFlight
from ..routing.time_limits import handoff_deadline
from ..routing.turns import Turns
from ..telemetry import Telemetry
from .comparison import TOP, Verdict, compare
from .prompt import new_prompt

TOKENS = 16
"""Of an answer: a choice. A wrong cache shows at the first one, as a rule."""
TIMEOUT_S = 30.0
"""For each of the three requests: an instance that has nothing else to do takes less than a second."""
_PROMPT_TOKENS = 200.0
_MAX_ANSWER_BYTES = 1 << 20
_MAX_REASON = 200


@dataclass(frozen=True, slots=True)
class Try:
    """What came of one."""

    verdict: Verdict
    reason: str = ""
    """Why there is no other verdict, for people."""


class NoAnswer(Exception):
    """A try has failed: ``args[0]`` says why, for people."""


class NotForThis(Exception):
    """A pair's protocol cannot be checked: ``args[0]`` says why, for people."""


class PairCheck:
    """Tries pairs. ``leg`` and ``ask`` speak with P, ``pool`` with D.

    Its requests are in flight as those of clients are, and its hand-offs used once, in time, or freed. No
    instance's failures are counted, and nothing is learned from it.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        registry: Registry,
        connectors: Connectors,
        in_flight: RequestsInFlight,
        telemetry: Telemetry,
        pool: ConnectionPool,
        leg: PrefillLeg,
        ask: AskPrefill,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._registry = registry
        self._connectors = connectors
        self._in_flight = in_flight
        self._telemetry = telemetry
        self._pool = pool
        self._leg = leg
        self._ask = ask
        self._clock = clock
        self._random = Random(secrets.randbits(128))  # else a restarted scheduler finds its prompts cached

    async def __call__(self, model: str, prefill: Endpoint, decode: Endpoint) -> Try:
        """Try a pair with a new prompt."""
        try:
            fields = self._fields(model)
            split = await self._split(fields, prefill, decode)
            # What was handed over may be in D's cache now. With another salt D computes the prompt itself.
            fields["cache_salt"] = secrets.token_hex(16)
            whole = await self._whole(fields, decode)
        except NotForThis as why:
            return Try(Verdict.SKIPPED, str(why))
        except (NoAnswer, ConnectorFailed, PrefillFailed, RequestFailed) as error:
            return Try(Verdict.FAILED, (str(error) or type(error).__name__)[:_MAX_REASON])
        verdict = compare(split, whole)
        return Try(verdict, "an answer cannot be read" if verdict is Verdict.FAILED else "")

    def _fields(self, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": new_prompt(self._random),
            "max_tokens": TOKENS,
            "temperature": 0,
            "seed": 0,
            "ignore_eos": True,
            "logprobs": TOP,
            "cache_salt": secrets.token_hex(16),
        }

    async def _split(self, fields: Mapping[str, Any], prefill: Endpoint, decode: Endpoint) -> bytes:
        body = await Turns().take(JsonBody.read(msgspec.json.encode(fields), COMPLETIONS))
        if not self._connectors.can_split(body):
            raise NotForThis("its connector splits no such request")
        headers = {names.REQUEST_ID: f"self-check-{secrets.token_hex(8)}"}
        pending = await self._prefilled(body, headers, prefill, decode)
        left = pending.deadline - self._clock()
        unused = True
        try:
            splice = pending.attempt.splice(body, pending.handoff)
            if left <= 0:
                self._telemetry.handoffs.late(prefill.id)
                raise NoAnswer("the hand-off was too old to be used")
            sent = body.raw if splice is None else splice.into(body.raw)
            with self._handed_over(pending, decode, body):
                answer = await self._ask_decode(
                    decode, sent, {**headers, **pending.handoff.headers}, min(left, TIMEOUT_S)
                )
            unused = False
            return answer
        except TimedOut:
            unused = False  # D may be using it: it is left to the lease
            if pending.handoff.pinned:
                self._telemetry.handoffs.stranded(prefill.id)
            raise
        finally:
            if unused:
                self._in_flight.handoffs.free(pending)

    @contextmanager
    def _handed_over(self, pending: PendingHandoff, decode: Endpoint, body: JsonBody) -> Iterator[None]:
        with self._counted(decode, body):
            pinned = pending.handoff.pinned
            if pinned:
                pending.prefill.keep_handoff()
            try:
                yield
            finally:
                if pinned:
                    pending.prefill.end_handoff()

    async def _prefilled(
        self, body: JsonBody, headers: Mapping[str, str], prefill: Endpoint, decode: Endpoint
    ) -> PendingHandoff:
        attempt = await self._attempt(prefill, decode)
        sent = attempt.prefill_body(body)
        if sent is None:
            raise NoAnswer("P can do nothing for such a request")
        try:
            with self._counted(prefill, body):
                async with asyncio.timeout(TIMEOUT_S):
                    answer = await self._leg(prefill, COMPLETIONS.path, headers, sent, attempt)
        except TimeoutError:
            raise NoAnswer(f"P does not answer within {TIMEOUT_S:g} s") from None
        if answer.status != 200:
            raise NoAnswer(f"P answers {answer.status}")
        try:
            handoff = attempt.handoff(answer.body)
        except ConnectorFailed:
            self._telemetry.handoffs.stranded(prefill.id)  # there may be one
            raise
        if handoff is None:
            raise NoAnswer("P hands nothing over")
        self._registry.speaks(prefill, handoff.protocol, handoff.takes_token_ids)
        deadline = handoff_deadline(self._config, self._clock(), handoff.lease)
        only = None if attempt.legs.decode is None else decode
        return PendingHandoff(handoff, prefill, attempt, deadline, body.get("model"), only)

    async def _attempt(self, prefill: Endpoint, decode: Endpoint) -> Attempt:
        attempt = self._connectors.attempt(prefill)
        order = attempt.order()
        if order is Order.TOWARDS_DECODE:
            attempt = attempt.towards(self._connectors.peer(decode))
        elif order is not Order.PREFILL_FIRST:
            raise NotForThis(f"its connector's order is {order.value}")
        if (question := attempt.question()) is not None:
            attempt = attempt.knowing(await self._ask(prefill, question, attempt))
        return attempt

    async def _whole(self, fields: Mapping[str, Any], decode: Endpoint) -> bytes:
        body = await Turns().take(JsonBody.read(msgspec.json.encode(fields), COMPLETIONS))
        with self._counted(decode, body):
            return await self._ask_decode(decode, body.raw, {}, TIMEOUT_S)

    async def _ask_decode(
        self, decode: Endpoint, body: bytes, headers: Mapping[str, str], limit: float
    ) -> bytes:
        sent = {"content-type": "application/json", **headers, **decode.own_headers}
        to, path = decode.destination, COMPLETIONS.path
        answer = await self._pool.post(to, path, sent, body, limit=_MAX_ANSWER_BYTES, timeout=limit)
        if answer.status != 200:
            raise NoAnswer(f"D answers {answer.status}")
        return answer.body

    @contextmanager
    def _counted(self, endpoint: Endpoint, body: JsonBody) -> Iterator[None]:
        """Count a request as in flight at an instance while the block runs."""
        now = self._clock()
        context = RequestContext(
            COMPLETIONS.path,
            model=body.get("model"),
            body_bytes=len(body.raw),
            prompt_tokens=_PROMPT_TOKENS,
            output_tokens=1.0 if endpoint.instance.role is InstanceRole.PREFILL else TOKENS,
            arrived=now,
            now=now,
        )
        reservation = self._registry.work.reserve(endpoint, context)
        try:
            yield
        finally:
            reservation.release(self._clock())
