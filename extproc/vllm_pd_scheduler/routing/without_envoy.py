"""Serving without Envoy, for scripts and tests: what ``PDRouter``'s blocking methods do."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from ..fleet.endpoint import Endpoint
from ..handoff.prefill_leg import HttpPrefill
from ..handoff.release import HandoffReleaser
from ..health import HealthMonitor
from ..instance_http.bounded_read import read_at_most
from ..instance_http.pool import ConnectionPool
from ..instance_http.session import open_session
from ..models import InstanceState, PDInstance
from ..request.errors import Reject
from .attempts import NOT_ANSWERED, FailedAttempt, Failure, failure_of_status
from .core import RoutingCore
from .forward import Forward

_DECODE_TIMEOUT_S = 600.0
_MAX_ANSWER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class RouteResult:
    """How a request of :meth:`PDRouter.route_request` ended.

    ``instance`` is the decode instance that answered, ``prefill_instance`` the one that prefilled, if
    one did. ``response`` is the decoded answer; if there is none, ``error`` says why.
    """

    success: bool
    instance: PDInstance | None = None
    prefill_instance: PDInstance | None = None
    status: int = 0
    response: dict[str, Any] | None = None
    error: str | None = None


def check_all(core: RoutingCore) -> dict[str, bool]:
    """Probe every instance once; return whether each can serve, by id."""
    return asyncio.run(_check_all(core))


def serve_one(core: RoutingCore, body: Mapping[str, Any]) -> RouteResult:
    """Serve one request that is not streamed; see :meth:`PDRouter.route_request`."""
    if body.get("stream"):
        return RouteResult(False, status=400, error="route_request answers whole: leave 'stream' out")
    return asyncio.run(_serve_one(core, body))


async def _check_all(core: RoutingCore) -> dict[str, bool]:
    async with open_session(_trusted(core)) as session:
        await _check(core, session)
    # A streak means that the probe just made contradicts the state that the thresholds still keep.
    return {e.id: e.routable and not e.streak for e in core.registry}


def _trusted(core: RoutingCore) -> ssl.SSLContext | None:
    tls = core.config.instance_tls
    return None if tls is None else tls.context()


async def _check(core: RoutingCore, session: aiohttp.ClientSession) -> None:
    await HealthMonitor.configured(core.config, core.registry, core.telemetry, session).check_all()


async def _serve_one(core: RoutingCore, body: Mapping[str, Any]) -> RouteResult:
    try:
        data = msgspec.json.encode(body)
    except (TypeError, ValueError, RecursionError) as error:
        return RouteResult(False, status=400, error=f"the request cannot be written as JSON: {error}")
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    headers = {":method": "POST", ":path": path, "content-type": "application/json"}
    trusted = _trusted(core)
    async with open_session(trusted) as session, ConnectionPool(trusted) as pool:
        if any(endpoint.state is InstanceState.STARTING for endpoint in core.registry):
            await _check(core, session)
        leg, release = core.prefill.leg, core.in_flight.release_handoff
        releaser = HandoffReleaser(pool, core.registry, core.connector, core.telemetry)
        core.prefill.leg = HttpPrefill(pool, None, core.config.prefill_timeout)
        core.in_flight.release_handoff = releaser
        try:
            return await _attempts(core, session, headers, data)
        finally:
            core.in_flight.settle(0.0)
            await releaser.close()
            core.prefill.leg, core.in_flight.release_handoff = leg, release


async def _attempts(
    core: RoutingCore, session: aiohttp.ClientSession, headers: Mapping[str, str], data: bytes
) -> RouteResult:
    """Try up to ``max_retries`` more times, each with a prefill of its own: a hand-off is used once."""
    result = RouteResult(False, error="not tried")
    for _ in range(1 + core.config.max_retries):
        outcome = await core.route(headers, data)
        if isinstance(outcome, Reject):
            return RouteResult(False, status=outcome.status, error=_message(outcome.body))
        del outcome.decode[1:]  # another one gets a request, and a hand-off, of its own
        try:
            result, failure = await _decode(session, outcome, headers[":path"], data)
            if failure is not None:
                address = str(outcome.decode[0].address)
                core.in_flight.attempt_failed(
                    FailedAttempt(address, failure, outcome.id, status=result.status)
                )
        finally:
            outcome.release()
        if result.success or not (failure in NOT_ANSWERED or result.status in outcome.retried):
            break
    return result


async def _decode(
    session: aiohttp.ClientSession, forward: Forward, path: str, data: bytes
) -> tuple[RouteResult, Failure | None]:
    """Return what came of an attempt, and how the instance failed if it did."""
    endpoint, status = forward.decode[0], 0
    prefill = forward.prefill.instance if forward.prefill else None
    body = data if forward.body is None else forward.body
    if forward.splice is not None:
        body = forward.splice.into(body)
    try:
        async with session.post(
            endpoint.url + path,
            server_hostname=endpoint.instance.tls_name,
            data=body,
            headers={"content-type": "application/json", **forward.headers()},
            timeout=aiohttp.ClientTimeout(total=_DECODE_TIMEOUT_S),
            allow_redirects=False,
        ) as response:
            status = response.status
            answer = await read_at_most(response, _MAX_ANSWER_BYTES)
        if status == 200:
            decoded = msgspec.json.decode(answer, type=dict[str, Any])
            return RouteResult(True, endpoint.instance, prefill, status, decoded), None
    except (TimeoutError, aiohttp.ClientError, OSError, msgspec.DecodeError) as error:
        result = RouteResult(False, endpoint.instance, prefill, status, error=_failed(endpoint, error))
        return result, Failure.CUT if status else _failure(error)
    failure = failure_of_status(status)
    return RouteResult(False, endpoint.instance, prefill, status, error=_message(answer)), failure


def _failure(error: Exception) -> Failure:
    if isinstance(error, aiohttp.ClientConnectorError):
        return Failure.CONNECT
    return Failure.TIMEOUT if isinstance(error, TimeoutError) else Failure.RESET


def _failed(endpoint: Endpoint, error: Exception) -> str:
    return f"{endpoint.id} did not answer: {error or type(error).__name__}"


def _message(body: bytes) -> str:
    """Return what an OpenAI-shaped error says, or the body itself."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, LookupError, TypeError):
        return body.decode(errors="replace")
