"""Serving without Envoy, for scripts and tests: what ``PDRouter``'s blocking methods do."""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from ..handoff.abort import HttpAbort
from ..handoff.prefill_leg import HttpPrefill
from ..handoff.questions import Questions
from ..handoff.release import HandoffReleaser
from ..health import HealthMonitor
from ..instance_http.errors import ConnectionLost, NotConnected, RequestFailed, TimedOut
from ..instance_http.pool import ConnectionPool
from ..instance_http.session import open_session
from ..instance_http.shortage import is_our_shortage
from ..models import InstanceState, PDInstance
from ..request import gateway_names
from ..request.errors import Reject
from .attempts import NOT_ANSWERED, FailedAttempt, Failure, Retry, failure_of_status
from .core import RoutingCore
from .forward import Forward

_DECODE_TIMEOUT_S = 600.0
_MAX_ANSWER_BYTES = 64 << 20
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_GOES_ON = (Retry.ALLOWED, Retry.LAST)


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
    every = (ranks[0] for ranks in core.registry.instances())
    return {e.instance.instance_id: e.routable and not e.probes.streak for e in every}


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
        leg, ask, release = core.prefill.leg, core.prefill.ask, core.in_flight.handoffs.release
        encode_leg = core.encode.leg
        releaser = HandoffReleaser(pool, core.registry, core.telemetry, core.fitting)
        core.prefill.leg = HttpPrefill(pool, None, core.config.prefill_timeout)
        core.encode.leg = HttpPrefill(pool, None, core.config.encode_timeout).send
        core.prefill.ask = questions = Questions(session, core.registry)
        core.in_flight.handoffs.release = releaser
        core.prefill.abort = abort = HttpAbort(pool)
        try:
            return await _attempts(core, pool, headers, data)
        finally:
            core.in_flight.ended.settle(0.0)
            await questions.close()
            await releaser.close()
            await abort.close()
            core.prefill.abort = None
            core.prefill.leg, core.prefill.ask, core.in_flight.handoffs.release = leg, ask, release
            core.encode.leg = encode_leg


async def _attempts(
    core: RoutingCore, pool: ConnectionPool, headers: Mapping[str, str], data: bytes
) -> RouteResult:
    """Try up to ``max_retries`` more times, each with a prefill of its own: a hand-off is used once."""
    result, losses = RouteResult(False, error="not tried"), 0
    for _ in range(1 + core.config.max_retries):
        outcome = await core.route(headers, data)
        if isinstance(outcome, Reject):
            return RouteResult(False, status=outcome.status, error=_message(outcome.body))
        del outcome.decode[1:]  # another one gets a request, and a hand-off, of its own
        outcome.losses += losses
        again: Retry | None = None
        try:
            result, failure = await _decode(pool, outcome, headers[":path"], data)
            if failure is not None:
                address = str(outcome.decode[0].address)
                core.in_flight.attempt_failed(
                    FailedAttempt(address, failure, outcome.id, status=result.status)
                )
                again = core.in_flight.may_try_again(outcome.id, 1)
        finally:
            outcome.release()
        if not (failure in NOT_ANSWERED or result.status in outcome.retried) or again not in _GOES_ON:
            break
        losses = outcome.losses
    return result


async def _decode(
    pool: ConnectionPool, forward: Forward, path: str, data: bytes
) -> tuple[RouteResult, Failure | None]:
    """Return what came of an attempt, and how the instance failed if it did."""
    endpoint = forward.decode[0]
    prefill = forward.prefill.instance if forward.prefill else None
    body = data if forward.body is None else forward.body
    if forward.splice is not None:
        body = forward.splice.into(body)
    headers = {"content-type": "application/json", **endpoint.own_headers}
    if forward.sidecar is not None:
        headers[gateway_names.PREFILLER] = str(forward.sidecar.endpoint.address)
    limit = forward.first_byte_timeout or _DECODE_TIMEOUT_S
    status = 0
    try:
        answer = await pool.post(
            endpoint.destination, path, headers, body, limit=_MAX_ANSWER_BYTES, timeout=limit
        )
        status = answer.status
        if status == 200:
            decoded = msgspec.json.decode(answer.body, type=dict[str, Any])
            return RouteResult(True, endpoint.instance, prefill, status, decoded), None
    except (RequestFailed, *_UNREADABLE) as error:
        words = f"{endpoint.id} did not answer: {error or type(error).__name__}"
        return RouteResult(False, endpoint.instance, prefill, status, error=words), _failure(error)
    failure = failure_of_status(status)
    return RouteResult(False, endpoint.instance, prefill, status, error=_message(answer.body)), failure


def _failure(error: Exception) -> Failure:
    """Return what an answer that has not come, or cannot be read, says of its instance."""
    if isinstance(error, NotConnected):
        return Failure.UNSENT if error.cause and _is_ours(error.cause) else Failure.CONNECT
    if isinstance(error, TimedOut):
        return Failure.TIMEOUT
    return Failure.RESET if isinstance(error, ConnectionLost) else Failure.CUT


def _is_ours(error: BaseException) -> bool:
    """Whether it is this machine that lacks what a connection needs, a port for it included."""
    no_port = isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL
    return no_port or is_our_shortage(error)


def _message(body: bytes) -> str:
    """Return what an OpenAI-shaped error says, or the body itself."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (*_UNREADABLE, LookupError, TypeError):
        return body.decode(errors="replace")
