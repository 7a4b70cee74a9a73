"""The instances of the fleet: ``/instances``."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from aiohttp import web

from ..fleet.condition import reason, told_state
from ..fleet.endpoint import Endpoint
from ..fleet.registry import DuplicateInstance
from ..models import InstanceRole, InstanceState
from ..router import PDRouter
from .changes import AdminChanges
from .route import Flag, Query, Refused, Route, Shown, asked_by, json_answer
from .saved_changes import SavedInstance
from .turning import Turning

_AT_ONCE = 50
"""Instances that are written in one turn of the event loop."""
DRAIN_POLL_S = 0.05
"""Seconds between two looks whether a drain is over, for a call that waits for it.

A choice: not felt by the person or script that waits, and too seldom to cost anything.
"""


class InstancesQuery(Query):
    """Which instances to show."""

    role: InstanceRole | None = None


class DrainQuery(Query):
    """How to drain."""

    wait: Flag = False
    """Whether to answer only when nothing is left on the instance, or after ``drain_timeout``."""
    force: Flag = False
    """Whether to drain even the last instance of its role that can serve."""


class TurnQuery(Query):
    """How to turn."""

    wait: Flag = False
    """Whether to answer only when it has the other role, or after ``drain_timeout``."""


class RemoveQuery(Query):
    """How to remove."""

    force: Flag = False
    """Whether to remove even the last instance of its role that can serve."""


class Predicted(Shown):
    """What the load model predicts: of a P the first, of a D the second."""

    prefill_left_s: float | None = None
    """Seconds until the prefills that we and other replicas have sent there are done."""
    decode_step_s: float | None = None
    """Seconds of a decode step with what runs there now."""


class InstanceAnswer(Shown):
    """An instance, or a rank of it, with its state and load."""

    id: str
    """Of a rank ``INSTANCE:RANK``. Whatever is done to that is done to the instance, all ranks."""
    instance: str
    """The instance's id."""
    rank: int | None
    """Which of its data-parallel engines it is; null: it has one."""
    role: InstanceRole
    host: str
    port: int
    address: str | None
    """``ip:port``; null until its DNS name was resolved."""
    address_age: float | None
    """Seconds since its DNS name was last resolved."""
    state: InstanceState
    shown_state: str
    """``state``, or ``ejected`` or ``trial``: its requests failed, or the next one will show."""
    source: str
    """Where it comes from: ``config``, ``admin`` or ``file:…``, several with ``, `` between. Empty: nobody
    names it any more, and it goes when its requests have ended."""
    reason: str | None
    """Why it is not healthy."""
    in_flight: int
    """Requests there, of this scheduler and of its other replicas."""
    in_flight_elsewhere: int
    """Those of them that other replicas have sent."""
    pending_handoffs: int
    """Hand-offs that a P holds for requests whose answer has not ended, of all replicas."""
    drained: bool
    """Whether it is draining and has nothing left to do."""
    waiting: float
    """Requests queued there."""
    requests: float
    """Requests running or queued there, those of others too."""
    running: float | None
    """Requests in its batch, as scraped."""
    tokens_in_flight: float
    """Tokens of the requests in flight: on P those to compute, on D prompt and expected answer."""
    kv_capacity_tokens: float | None
    """Tokens that its KV cache holds."""
    kv_cache_usage: float | None
    """Share of its KV cache in use."""
    latency: float | None
    """Mean seconds to the first token (P) or per token (D)."""
    predicted: Predicted
    failures: int
    """Requests that failed in a row."""
    metrics_age_s: float | None
    """Seconds since the last scrape that succeeded."""
    models: list[str] | None
    """Names of the models that it serves; null: not known."""
    adapters_loaded: list[str]
    """LoRA adapters that are taken for loaded there, the one used last at the end."""
    revision: str | None
    """Of its roll-out."""


class InstancesAnswer(Shown):
    """The instances, in the order in which they were added."""

    instances: list[InstanceAnswer]


class Remaining(Shown):
    """What an instance that drains has left."""

    in_flight: int
    """Of all replicas of the scheduler."""
    pending_handoffs: int


class DrainAnswer(InstanceAnswer):
    """An instance that drains."""

    remaining: Remaining | None = None
    """There only if it was waited for and something is left."""


def describe(endpoint: Endpoint, source: str, now: float) -> dict[str, Any]:
    """Return the fields of :class:`InstanceAnswer`; ``now`` is monotonic seconds."""
    instance, metrics = endpoint.instance, endpoint.metrics
    if instance.role is InstanceRole.PREFILL:
        predicted = {"prefill_left_s": endpoint.prefill.remaining(now)}
    elif instance.role is InstanceRole.DECODE:
        predicted = {"decode_step_s": endpoint.decode_step}
    else:
        predicted = {}
    return {
        "id": endpoint.id,
        "instance": instance.instance_id,
        "rank": endpoint.rank,
        "role": instance.role,
        "host": instance.host,
        "port": instance.port,
        "address": endpoint.address,
        "address_age": None if endpoint.resolved_at is None else now - endpoint.resolved_at,
        "state": endpoint.state,
        "shown_state": told_state(endpoint),
        "source": source,
        "reason": reason(endpoint) or None,
        "in_flight": endpoint.in_flight,
        "in_flight_elsewhere": endpoint.elsewhere,
        "pending_handoffs": endpoint.handoffs,
        "drained": endpoint.drained,
        "waiting": endpoint.waiting,
        "requests": endpoint.requests,
        "running": metrics.running if metrics else None,
        "tokens_in_flight": endpoint.tokens,
        "kv_capacity_tokens": endpoint.kv_capacity,
        "kv_cache_usage": metrics.kv_usage if metrics else None,
        "latency": metrics.latency if metrics else None,
        "predicted": predicted,
        "failures": endpoint.breaker.failures,
        "metrics_age_s": None if endpoint.scraped_at is None else now - endpoint.scraped_at,
        "models": None if endpoint.models.names is None else sorted(endpoint.models.names),
        "adapters_loaded": list(endpoint.models.loaded),
        "revision": instance.revision,
    }


class InstancesApi:
    """Shows and changes the instances; ``turning`` turns them.

    ``is_ready`` returns ``False`` once the scheduler is shutting down.
    """

    def __init__(
        self, router: PDRouter, changes: AdminChanges, is_ready: Callable[[], bool], turning: Turning
    ) -> None:
        self._router = router
        self._changes = changes
        self._is_ready = is_ready
        self._turning = turning

    def routes(self) -> Iterator[Route]:
        """Return the routes."""
        one = "/instances/{id}"
        yield Route(
            "GET", "/instances", "The instances, or those of a role", self._list, {200: InstancesAnswer}
        )
        yield Route(
            "POST", "/instances", "Add an instance", self._add, {201: InstanceAnswer}, refusals=(409, 507)
        )
        yield Route("GET", one, "One instance", self._get, {200: InstanceAnswer}, refusals=(404,))
        yield Route("DELETE", one, "Remove an instance", self._remove, {204: None}, refusals=(404, 409, 507))
        yield Route(
            "POST",
            f"{one}/drain",
            "Send an instance no new requests",
            self._drain,
            {200: DrainAnswer, 202: InstanceAnswer},
            refusals=(404, 409, 507),
        )
        yield Route(
            "POST",
            f"{one}/turn",
            "Drain an instance, and give it the other role when nothing is left on it",
            self._turn,
            {200: InstanceAnswer, 202: InstanceAnswer},
            refusals=(404, 409, 507),
        )
        yield Route(
            "POST",
            f"{one}/undrain",
            "Send an instance requests again",
            self._undrain,
            {200: InstanceAnswer},
            refusals=(404, 409, 507),
        )

    async def _list(self, _: web.Request, query: InstancesQuery) -> web.Response:
        now = time.monotonic()
        shown: list[str] = []
        for endpoint in self._router.registry.endpoints(query.role):
            if len(shown) % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)  # a thousand of them take 40 ms
            one = InstanceAnswer(**self._fields(endpoint, now))
            shown.append(one.model_dump_json(exclude_unset=True))
        text = f'{{"instances":[{",".join(shown)}]}}'
        return web.Response(text=text, content_type="application/json")

    async def _add(self, request: web.Request, body: SavedInstance) -> web.Response:
        if body.api_key is not None and body.api_key not in self._router.config.api_keys():
            # Else whoever may call this could have any file or variable of the scheduler sent to their host.
            raise Refused(400, "api_key: must be one that the configuration names")
        try:
            await self._changes.add(body, by=asked_by(request))
        except DuplicateInstance as error:
            raise Refused(409, str(error)) from None
        except ValueError as error:
            raise Refused(400, str(error)) from None
        return json_answer(self._shown(self._router.registry.get(body.id)), 201)

    async def _get(self, request: web.Request) -> web.Response:
        return json_answer(self._shown(self._endpoint(request)))

    async def _remove(self, request: web.Request, query: RemoveQuery) -> web.Response:
        endpoint = self._endpoint(request)
        await self._changes.remove(endpoint.instance.instance_id, force=query.force, by=asked_by(request))
        return web.Response(status=204)

    async def _drain(self, request: web.Request, query: DrainQuery) -> web.Response:
        endpoint = self._endpoint(request)
        await self._changes.drain(endpoint.instance.instance_id, force=query.force, by=asked_by(request))
        if not query.wait:
            return json_answer(self._shown(endpoint), 202)
        ranks = self._router.registry.ranks_of(endpoint)
        await self._wait_for_drain(ranks)
        if all(each.drained for each in ranks):
            return json_answer(self._shown(endpoint))
        remaining = Remaining(
            in_flight=sum(each.in_flight for each in ranks),
            pending_handoffs=sum(each.handoffs for each in ranks),
        )
        return json_answer(DrainAnswer(**self._fields(endpoint, time.monotonic()), remaining=remaining))

    async def _wait_for_drain(self, ranks: Sequence[Endpoint]) -> None:
        """Wait until an instance is drained, is undrained, ``drain_timeout`` is over or the scheduler ends.

        When the scheduler ends, the streams that it counts by end too, though the requests run on. To wait
        further would report them as finished.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._router.config.drain_timeout):
                while any(e.draining and not e.drained for e in ranks) and self._is_ready():  # noqa: ASYNC110
                    await asyncio.sleep(DRAIN_POLL_S)  # no event tells that a request has ended

    async def _turn(self, request: web.Request, query: TurnQuery) -> web.Response:
        name, role = (instance := self._endpoint(request).instance).instance_id, instance.role
        await self._turning.begin(name, asked_by(request))
        if query.wait:
            await self._turning.wait(self._router.config.drain_timeout)
        endpoint = self._router.registry.get(name)
        return json_answer(self._shown(endpoint), 202 if endpoint.instance.role is role else 200)

    async def close(self, _: web.Application) -> None:
        """Give up what goes on, since the server ends."""
        await self._turning.close()

    async def _undrain(self, request: web.Request) -> web.Response:
        endpoint = self._endpoint(request)
        await self._changes.undrain(endpoint.instance.instance_id, by=asked_by(request))
        return json_answer(self._shown(endpoint))

    def _endpoint(self, request: web.Request) -> Endpoint:
        return self._router.registry.get(request.match_info["id"])

    def _shown(self, endpoint: Endpoint) -> InstanceAnswer:
        return InstanceAnswer(**self._fields(endpoint, time.monotonic()))

    def _fields(self, endpoint: Endpoint, now: float) -> dict[str, Any]:
        return describe(endpoint, self._changes.source(endpoint.instance.instance_id), now)
