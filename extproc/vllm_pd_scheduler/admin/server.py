"""The admin HTTP server: strategies, shadow, instances, metrics, and the scheduler's own health."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from aiohttp import web
from prometheus_client import generate_latest
from pydantic import BaseModel, ConfigDict, ValidationError

from ..config import InstanceConfig, describe_error
from ..fleet.endpoint import Endpoint
from ..fleet.registry import DuplicateInstance, UnknownInstance
from ..models import InstanceRole
from ..router import PDRouter
from ..strategies import UnknownStrategy, load_strategy, strategy_names
from .changes import AdminChanges, NotKept
from .collectors import collectors
from .origin import foreign_host, foreign_origin
from .saved_changes import SavedInstance

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=BaseModel)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

DRAIN_POLL_S = 0.05
"""Seconds between two looks whether a drain is over, for a call that waits for it.

A choice: not felt by the person or script that waits, and too seldom to cost anything.
"""

SHUTDOWN_S = 1.0
"""Seconds that running calls get to end when the server stops.

Only those that wait for a drain run longer than a moment, and they notice the shutdown within
``DRAIN_POLL_S``.
"""

_OPEN_PATHS = frozenset({"/healthz", "/readyz"})
"""Paths that anybody may ask for, without a token and by any host: Kubernetes' probes have no token, and the
answers tell nothing of the fleet."""

_QUERY_KEYS = {"GET /instances": {"role"}, "POST /instances/{id}/drain": {"wait"}}
"""The keys that the query of a route may have. The other routes have none."""

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""


class _StrategyBody(BaseModel):
    """Body of ``PUT /strategy``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    strategy: str = ""
    """For both roles; a key for one role takes precedence."""
    prefill_strategy: str = ""
    decode_strategy: str = ""

    def by_role(self) -> dict[InstanceRole, str]:
        """Return the named strategies by role; raise :exc:`_ErrorAnswer` if the body names none."""
        given = self.model_dump(exclude_unset=True)
        if not given:
            raise _ErrorAnswer(400, 'give "strategy" for both roles, "prefill_strategy" or "decode_strategy"')
        names = {role: given.get(f"{role}_strategy", given.get("strategy")) for role in InstanceRole}
        return {role: name for role, name in names.items() if name is not None}


class _ShadowBody(BaseModel):
    """Body of ``PUT /shadow``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    strategy: str


class _NoBody(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _InstanceBody(InstanceConfig):
    """Body of ``POST /instances``: an entry of the configuration, and the role."""

    role: str


class AdminServer:
    """Serves the admin interface of a router.

    ``changes`` makes and saves what callers change. ``is_ready`` returns ``False`` once the scheduler is
    shutting down. ``token``, if given, is required as a bearer token on all paths but ``/healthz`` and
    ``/readyz``. Without one, whoever reaches the port may do everything, so requests must name this machine
    as their host. In any case a web page of another site may change nothing.
    """

    def __init__(
        self,
        router: PDRouter,
        changes: AdminChanges | None = None,
        *,
        is_ready: Callable[[], bool],
        token: str | None = None,
    ) -> None:
        self._router = router
        self._changes = changes or AdminChanges(router)
        self._collectors = collectors(router, time.monotonic)
        self._is_ready = is_ready
        self._token = token
        self._runner: web.AppRunner | None = None

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(
            middlewares=[_errors_as_json, self._from_here, self._authenticated, _checked_query]
        )
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.get("/strategy", self._get_strategy),
                web.put("/strategy", self._put_strategy),
                web.get("/shadow", self._get_shadow),
                web.put("/shadow", self._put_shadow),
                web.delete("/shadow", self._remove_shadow),
                web.get("/instances", self._list_instances),
                web.post("/instances", self._add_instance),
                web.get("/instances/{id}", self._get_instance),
                web.delete("/instances/{id}", self._remove_instance),
                web.post("/instances/{id}/drain", self._drain_instance),
                web.post("/instances/{id}/undrain", self._undrain_instance),
            ]
        )
        return app

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        """Listen on an address, without TLS if ``tls`` is ``None``; raise :exc:`OSError` if that fails."""
        self._runner = web.AppRunner(self.application(), access_log=None, shutdown_timeout=SHUTDOWN_S)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port, ssl_context=tls).start()

    async def stop(self) -> None:
        """Stop listening and close open connections."""
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _from_here(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        anybodys = self._token is not None or request.path in _OPEN_PATHS
        if not anybodys and (reason := foreign_host(request.headers, self._router.config.admin_host)):
            return _error(421, reason)
        if request.method not in _READS and (reason := foreign_origin(request.headers)):
            return _error(403, reason)
        return await handler(request)

    @web.middleware
    async def _authenticated(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._token is not None and request.path not in _OPEN_PATHS:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            sent = given.encode(errors="surrogateescape")  # a header may hold any bytes
            # compare_digest takes the same time wherever the first difference is, so the time tells nothing.
            if scheme.lower() != "bearer" or not hmac.compare_digest(sent, self._token.encode()):
                return _error(401, "this needs the admin token: Authorization: Bearer …")
        return await handler(request)

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _readyz(self, _: web.Request) -> web.Response:
        if not self._is_ready():
            return _error(503, "draining")
        if not self._router.registry.routable(InstanceRole.DECODE):
            return _error(503, "no decode instance can serve")
        return web.json_response({"status": "ready"})

    async def _metrics(self, _: web.Request) -> web.Response:
        body = self._router.telemetry.expose() + generate_latest(self._collectors)
        return web.Response(body=body, content_type="text/plain", charset="utf-8")

    async def _get_strategy(self, _: web.Request) -> web.Response:
        scheduler = self._router.scheduler
        by_role = {f"{role}_strategy": name for role, name in scheduler.names.items()}
        return web.json_response(
            {"strategy": scheduler.strategy_name, **by_role, "available": strategy_names()}
        )

    async def _put_strategy(self, request: web.Request) -> web.Response:
        body = await _read_body(request, _StrategyBody)
        names = body.by_role()
        for key, name in body.model_dump(exclude_unset=True).items():
            self._check_strategy(key, name)
        try:
            await self._changes.use(names)
        except UnknownStrategy as error:
            raise _ErrorAnswer(400, str(error)) from None
        log.info("strategy is %s", self._router.scheduler.strategy_name)
        return await self._get_strategy(request)

    async def _get_shadow(self, _: web.Request) -> web.Response:
        shadow = self._router.scheduler.shadow
        return web.json_response({"strategy": None} if shadow is None else shadow.report())

    async def _put_shadow(self, request: web.Request) -> web.Response:
        body = await _read_body(request, _ShadowBody)
        self._check_strategy("strategy", body.strategy)
        try:
            await self._changes.use_shadow(body.strategy)
        except UnknownStrategy as error:
            raise _ErrorAnswer(400, str(error)) from None
        log.info("shadow strategy is %s", body.strategy)
        return await self._get_shadow(request)

    async def _remove_shadow(self, request: web.Request) -> web.Response:
        await _refuse_body(request)
        await self._changes.use_shadow(None)
        log.info("there is no shadow strategy")
        return web.Response(status=204)

    def _check_strategy(self, key: str, name: str) -> None:
        """Raise :exc:`_ErrorAnswer` if a strategy cannot be used."""
        if not self._router.config.may_use(name):
            raise _ErrorAnswer(400, f"{key}: a dotted path can be used only if the configuration names it")
        try:
            load_strategy(name)
        except UnknownStrategy as error:
            raise _ErrorAnswer(400, f"{key}: {error}") from None

    async def _list_instances(self, request: web.Request) -> web.Response:
        try:
            role = InstanceRole(request.query["role"]) if "role" in request.query else None
        except ValueError:
            raise _ErrorAnswer(400, "role: must be 'prefill' or 'decode'") from None
        endpoints = self._router.registry.endpoints(role)
        return web.json_response({"instances": [_describe(endpoint) for endpoint in endpoints]})

    async def _add_instance(self, request: web.Request) -> web.Response:
        body = await _read_body(request, _InstanceBody)
        try:
            role = InstanceRole(body.role)
        except ValueError:
            raise _ErrorAnswer(400, "role: must be 'prefill' or 'decode'") from None
        if body.api_key is not None and body.api_key not in self._router.config.api_keys():
            # Else whoever may call this could have any file or variable of the scheduler sent to their host.
            raise _ErrorAnswer(400, "api_key: must be one that the configuration names")
        try:
            await self._changes.add(SavedInstance(**{**dict(body), "role": role}))
        except DuplicateInstance as error:
            raise _ErrorAnswer(409, str(error)) from None
        except ValueError as error:
            raise _ErrorAnswer(400, str(error)) from None
        log.info("%s added", body.id)
        return web.json_response(_describe(self._router.registry.get(body.id)), status=201)

    async def _get_instance(self, request: web.Request) -> web.Response:
        return web.json_response(_describe(self._endpoint(request)))

    async def _remove_instance(self, request: web.Request) -> web.Response:
        await _refuse_body(request)
        endpoint = self._endpoint(request)
        await self._changes.remove(endpoint.id)
        log.info("%s removed", endpoint.id)
        return web.Response(status=204)

    async def _drain_instance(self, request: web.Request) -> web.Response:
        await _refuse_body(request)
        wait = request.query.get("wait", "false")
        if wait not in ("true", "false"):
            raise _ErrorAnswer(400, "wait: must be 'true' or 'false'")
        endpoint = self._endpoint(request)
        await self._changes.drain(endpoint.id)
        if wait == "false":
            return web.json_response(_describe(endpoint), status=202)
        await self._wait_for_drain(endpoint)
        remaining = {"in_flight": endpoint.in_flight, "pending_handoffs": endpoint.pending_handoffs}
        undone = {} if endpoint.drained else {"remaining": remaining}
        return web.json_response({**_describe(endpoint), **undone})

    async def _wait_for_drain(self, endpoint: Endpoint) -> None:
        """Wait until an endpoint is drained, is undrained, ``drain_timeout`` is over or the scheduler ends.

        When the scheduler ends, the streams that it counts by end too, though the requests run on. To wait
        further would report them as finished.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._router.config.drain_timeout):
                while endpoint.draining and not endpoint.drained and self._is_ready():  # noqa: ASYNC110
                    await asyncio.sleep(DRAIN_POLL_S)  # no event tells that a request has ended

    async def _undrain_instance(self, request: web.Request) -> web.Response:
        await _refuse_body(request)
        endpoint = self._endpoint(request)
        await self._changes.drain(endpoint.id, drains=False)
        return web.json_response(_describe(endpoint))

    def _endpoint(self, request: web.Request) -> Endpoint:
        return self._router.registry.get(request.match_info["id"])


class _ErrorAnswer(Exception):
    """Ends a handler with an error: its arguments are the HTTP status and the message."""


def _describe(endpoint: Endpoint) -> dict[str, Any]:
    """Return an instance as JSON."""
    instance, metrics = endpoint.instance, endpoint.metrics
    return {
        "id": instance.instance_id,
        "role": instance.role,
        "host": instance.host,
        "port": instance.port,
        "address": endpoint.address,
        "address_age": None if endpoint.resolved_at is None else time.monotonic() - endpoint.resolved_at,
        "state": endpoint.state,
        "reason": endpoint.reason or None,
        "in_flight": endpoint.in_flight,
        "pending_handoffs": endpoint.pending_handoffs,
        "drained": endpoint.drained,
        "waiting": endpoint.waiting,
        "requests": endpoint.requests,
        "kv_cache_usage": metrics.kv_usage if metrics else None,
        "latency": metrics.latency if metrics else None,
        "models": None if endpoint.models is None else sorted(endpoint.models),
    }


async def _read_body(request: web.Request, model: type[Model]) -> Model:
    """Return the JSON body of a request; raise :exc:`_ErrorAnswer` with everything that is wrong with it."""
    if request.content_type != "application/json":
        # Against cross-site request forgery: a web page can make its visitor's browser send other types to a
        # loopback port, but for this one the browser asks the server first (CORS).
        raise _ErrorAnswer(415, "the body must be JSON, with content-type: application/json")
    try:
        return model.model_validate_json(await request.read())
    except ValidationError as error:
        raise _ErrorAnswer(400, "; ".join(map(describe_error, error.errors(include_url=False)))) from None


async def _refuse_body(request: web.Request) -> None:
    """Raise :exc:`_ErrorAnswer` if a body asks for something, where none is looked at."""
    if await request.read():
        await _read_body(request, _NoBody)


@web.middleware
async def _checked_query(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what a handler would not look at: ``drain?wiat=true`` is no drain without waiting."""
    resource = request.match_info.route.resource
    if resource is not None:
        method = "GET" if request.method == "HEAD" else request.method
        known = _QUERY_KEYS.get(f"{method} {resource.canonical}", set())
        for key in request.query:
            if key not in known:
                raise _ErrorAnswer(
                    400, f"query: unknown key {key!r}; there is {' and '.join(known) or 'none'}"
                )
            if len(request.query.getall(key)) > 1:
                raise _ErrorAnswer(400, f"query: {key} is given twice")
    return await handler(request)


def _error(status: int, reason: str) -> web.Response:
    return web.json_response({"error": reason}, status=status)


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except _ErrorAnswer as error:
        return _error(*error.args)
    except UnknownInstance as error:
        return _error(404, str(error))
    except NotKept as error:
        return _error(507, f"nothing was changed, since it could not be kept in state_file: {error}")
    except web.HTTPException as error:
        headers = {"allow": error.headers["allow"]} if "allow" in error.headers else None
        reason = f"{request.method} {request.path}: {error.reason}"
        return web.json_response({"error": reason}, status=error.status, headers=headers)
