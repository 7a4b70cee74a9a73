"""The stage before prefill: images, video and audio of a request are encoded on encode instances (E).

What no E has encoded, for whatever reason, P encodes itself: nothing here fails a request.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from ..config import SchedulerConfig
from ..connectors.encode import EncodeConnectorName, Encoded, encode_body, encode_connector, encoded, merged
from ..fleet.endpoint import Endpoint
from ..handoff.interfaces import EncodeLeg, PrefillAnswer, PrefillFailed, PrefillNotSent
from ..models import InstanceRole
from ..records.decision import OK, Decision
from ..request.body import JsonBody
from ..request.context import RequestContext
from ..request.handoff_key import ENCODED_KEY
from ..request.headers import REQUEST_ID, TRACEPARENT
from ..request.media import MediaItem, media_items
from ..scheduler import Scheduler
from ..telemetry import Telemetry
from ..tracing import current
from .attempts import KEY_REFUSED, Failure, failure_of_status
from .local_errors import LocalErrors
from .lost import LostPrompts
from .turns import Turns

AT_ONCE = 8
"""Items of one request that are encoded at the same time: a choice. A request with many must neither fill
all E, nor have copies of all its items in memory."""

ATTEMPTS = 2
"""E that are tried for an item: the first, and another one when that fails."""

KNOWN_ITEMS = 16_384
"""Items of which it is remembered who has encoded them last."""

SLACK = 4
"""By so many requests an E that knows an item may have more than the one that has the fewest: a choice. To
encode again costs more than a short queue, and less than a long one."""


@dataclass(frozen=True, slots=True)
class _Request:
    """What is sent of one request to each E."""

    leg: EncodeLeg
    context: RequestContext
    headers: Mapping[str, str]
    body: JsonBody
    decision: Decision


class EncodeStage:
    """Has the media items of requests encoded.

    ``leg`` sends a request to an E; without one, or without an E that can serve, nothing is looked at.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        scheduler: Scheduler,
        telemetry: Telemetry,
        lost: LostPrompts,
        turns: Turns,
        clock: Callable[[], float],
    ) -> None:
        self.leg: EncodeLeg | None = None
        self._config = config
        self._scheduler = scheduler
        self._registry = scheduler.registry
        self._telemetry = telemetry
        self._lost = lost
        self._turns = turns
        self._clock = clock
        self._local_errors = LocalErrors(telemetry, None, clock)
        self._sent_to: OrderedDict[int, Endpoint] = OrderedDict()
        """By an item's key, the E that it was sent to last."""

    async def run(
        self, context: RequestContext, headers: Mapping[str, str], body: JsonBody, decision: Decision
    ) -> JsonBody:
        """Return the body with what P needs to find its encoded items, in :attr:`.JsonBody.more`."""
        if self.leg is None or not self._registry.routable(InstanceRole.ENCODE):
            return body
        if self._config.prefill_leg == "sidecar":  # which has a stage of its own
            return body
        items = await self._turns.take(media_items(body))
        if not items:
            return body
        request, at_once = _Request(self.leg, context, headers, body, decision), asyncio.Semaphore(AT_ONCE)

        async def in_turn(number: int, item: MediaItem) -> Encoded | None:
            async with at_once:
                return await self._encoded(request, number, item)

        began = self._clock()
        tasks = [asyncio.ensure_future(in_turn(number, item)) for number, item in enumerate(items)]
        try:
            await asyncio.wait(tasks, timeout=ATTEMPTS * self._config.encode_timeout)
        finally:
            for task in tasks:
                task.cancel()
        ended = [task.result() for task in tasks if task.done() and not task.cancelled()]
        found = [each for each in ended if each is not None]
        decision.media_encoded(len(items), len(found), self._clock() - began)
        self._telemetry.encodes.items(len(found), len(items) - len(found))
        text = merged(found)
        return msgspec.structs.replace(body, more={ENCODED_KEY: text}) if text else body

    async def _encoded(self, request: _Request, number: int, item: MediaItem) -> Encoded | None:
        """Return where the encoding of an item is; ``None`` if P is to encode it."""
        tried: list[Endpoint] = []
        errors: list[Endpoint] = []
        attempts = 0
        while attempts < ATTEMPTS and (endpoint := self._choose(item, request.context, tried)) is not None:
            tried += self._registry.ranks_of(endpoint)
            attempts += 1
            found, try_another = await self._attempt(request, endpoint, number, item, errors)
            if found is not None or not try_another:
                return found
        return None

    def _choose(self, item: MediaItem, context: RequestContext, tried: Sequence[Endpoint]) -> Endpoint | None:
        """Return the E for an item: one that has had it lately, if it is not much busier than others."""
        candidates = self._scheduler.encoders(context.model, self._clock(), tried)
        if not candidates:
            return None
        chosen = min(candidates, key=lambda each: each.requests)
        known = self._sent_to.get(item.key)
        if known is not None and known in candidates and known.requests <= chosen.requests + SLACK:
            chosen = known
        self._sent_to[item.key] = chosen
        self._sent_to.move_to_end(item.key)
        if len(self._sent_to) > KNOWN_ITEMS:
            self._sent_to.popitem(last=False)
        return chosen

    async def _attempt(
        self, request: _Request, endpoint: Endpoint, number: int, item: MediaItem, errors: list[Endpoint]
    ) -> tuple[Encoded | None, bool]:
        """Send an item to an E; return what that hands over, else whether another one is to be tried.

        ``errors`` are those that have answered 500: of two the item may be the reason.
        """
        reservation = self._registry.work.reserve(endpoint)
        began, own = self._clock(), {}
        noted = request.decision.encode_begins(endpoint.id, began)
        if request.context.request_id:
            own[REQUEST_ID] = f"{request.context.request_id}-{number}"
        trace = current.get()
        span = None if trace is None else trace.encode_sent(endpoint.id, endpoint.url, began)
        if span is not None:
            own[TRACEPARENT] = span.traceparent
        noted.outcome = failure = "cancelled"
        try:
            sent = encode_body(request.body, item.part)
            answer = await request.leg(endpoint, request.context.path, request.headers, sent, own)
            noted.outcome = failure = OK if answer.status == 200 else f"status_{answer.status}"
            if answer.status != 200:
                return None, self._not_200(endpoint, answer, errors)
            found = encoded(self._connector_of(endpoint), answer.body)
            if found is None:
                noted.outcome = failure = "no_handoff"
                words = "no hand-off in its answer: has it an --ec-transfer-config?"
                self._failed(endpoint, "no_handoff", words)
                return None, True
            self._registry.ends.succeeded(endpoint)
            self._telemetry.encodes.took(endpoint.id, self._clock() - began)
            return found, False
        except PrefillNotSent as error:
            noted.outcome = failure = "not_sent"
            self._local_errors.add(str(error))
            return None, False
        except PrefillFailed as error:
            noted.outcome = failure = str(error)
            self._failed(endpoint, failure)
            if error.lost:  # the item may be the reason
                self._lost.lost(request.context.fingerprint, endpoint.instance.instance_id, self._clock())
            return None, not error.lost
        finally:
            now = self._clock()
            noted.took = now - began
            reservation.release(now)
            if span is not None:
                span.ended(now, "" if failure == OK else failure)

    def _connector_of(self, endpoint: Endpoint) -> EncodeConnectorName:
        own = endpoint.instance.connector
        return self._config.encode_connector if own is None else encode_connector(own)

    def _not_200(self, endpoint: Endpoint, answer: PrefillAnswer, errors: list[Endpoint]) -> bool:
        """Count an error of an E's; return whether another one may take the item."""
        failure, reason = failure_of_status(answer.status), f"status_{answer.status}"
        own_key = answer.status in KEY_REFUSED and endpoint.instance.api_key is not None
        if failure is Failure.OVERLOADED:
            self._telemetry.encodes.failed(endpoint.id, reason)
            self._registry.ends.overloaded(endpoint, self._clock(), answer.retry_after)
        elif failure is Failure.REFUSED and not own_key:
            self._telemetry.encodes.failed(endpoint.id, reason)
            return False  # what P says of the item is the client's answer
        elif answer.status == 500:
            self._telemetry.encodes.failed(endpoint.id, reason)
            self._registry.ends.errored(endpoint, errors, f"encode: {reason}", self._clock())
            errors.append(endpoint)
        else:
            self._failed(endpoint, reason)
        return True

    def _failed(self, endpoint: Endpoint, reason: str, words: str = "") -> None:
        self._telemetry.encodes.failed(endpoint.id, reason)
        self._registry.ends.failed(endpoint, f"encode: {words or reason}", self._clock())
