"""The admin HTTP server: who may ask, and which groups of routes there are."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable
from typing import ClassVar

from aiohttp import web

from ..advice import Adviser
from ..handoff.role_switch import RoleSwitch
from ..router import PDRouter
from ..self_check import SelfCheck
from .advice_api import AdviceApi
from .balancing import Balancing
from .changes import AdminChanges
from .decisions_api import DecisionsApi
from .event_stream import Streams
from .events_api import EventsApi
from .http_server import Handler, HttpServer, add_routes, errors_as_json
from .index_api import IndexApi
from .instances_api import InstancesApi
from .live_api import LiveApi
from .models_api import ModelsApi
from .origin import foreign_host, foreign_origin
from .others import Others
from .page import wants_page
from .pairs_api import PairsApi
from .probes_api import ProbesApi
from .process_api import ProcessApi
from .reload_api import Reload, ReloadApi
from .route import Api, Route, error_answer
from .self_check_api import SelfCheckApi
from .strategy_api import StrategyApi
from .trace_api import TraceApi
from .turning import Turning

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""


class AdminServer(HttpServer):
    """Serves the admin interface of a router.

    ``changes`` makes and saves what callers change. ``is_ready`` returns ``False`` once the scheduler is
    shutting down. ``reload`` reads the configuration again, if it comes from a file, and ``self_check``
    checks pairs; ``switch`` tells engines of their new roles. With ``others`` it answers for all workers.
    ``token``, if given, is required as a bearer token for all routes but those that are open. Without one,
    whoever reaches the port may do everything, so requests must name this machine as their host. In any case
    a web page of another site may change nothing.
    """

    balances: ClassVar[bool] = True
    """Whether instances are turned by themselves where it runs, if that is configured."""

    def __init__(
        self,
        router: PDRouter,
        changes: AdminChanges | None = None,
        *,
        is_ready: Callable[[], bool],
        token: str | None = None,
        reload: Reload | None = None,
        self_check: SelfCheck | None = None,
        others: Others | None = None,
        switch: RoleSwitch | None = None,
    ) -> None:
        super().__init__()
        changes = changes or AdminChanges(router)
        self._router = router
        self._streams = Streams()
        process = ProcessApi(router, is_ready, others)
        self._live = LiveApi(router, self._streams, process.status_of_all, changes.source, others)
        turning = Turning(router, changes, is_ready, switch)
        adviser = Adviser(router, router.clock, others=others.traffic if others is not None else None)
        self._balancing = Balancing(router, changes, turning, adviser, is_ready, others is not None)
        self._instances = instances = InstancesApi(router, changes, is_ready, turning)
        groups: list[Api] = [
            IndexApi(lambda: self.routes),
            ProbesApi(router, is_ready, others),
            process,
            ReloadApi(reload, others),
            StrategyApi(router, changes, others),
            DecisionsApi(router.decisions, others),
            instances,
            ModelsApi(router),
            SelfCheckApi(router, self_check),
            PairsApi(router),
            AdviceApi(adviser),
            EventsApi(router.events, self._streams, others),
            self._live,
            TraceApi(router.recording, self._streams, others),
        ]
        self.routes: list[Route] = [route for group in groups for route in group.routes()]
        self._open = frozenset(route.path for route in self.routes if route.open)
        self._own_host = router.config.admin_host
        self._token = token

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(middlewares=[errors_as_json, self._from_here, self._authenticated])
        add_routes(app, self.routes)
        app.cleanup_ctx.append(self._live.sample)
        if self.balances:
            app.cleanup_ctx.append(self._balance)
        app.on_shutdown.append(self._streams.end)
        app.on_cleanup.append(self._instances.close)
        return app

    async def _balance(self, _: web.Application) -> AsyncIterator[None]:
        balancing = asyncio.ensure_future(self._balancing.run())
        yield
        balancing.cancel()
        await asyncio.wait([balancing])

    def _is_open(self, request: web.Request) -> bool:
        """Whether anybody may ask for this. A browser gets the page, which then asks for the token."""
        return request.path in self._open or wants_page(request.method, request.path, request.headers)

    @web.middleware
    async def _from_here(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        anybodys = self._token is not None or self._is_open(request)
        if not anybodys and (reason := foreign_host(request.headers, self._own_host)):
            return error_answer(421, reason)
        if request.method not in _READS and (reason := foreign_origin(request.headers)):
            return error_answer(403, reason)
        return await handler(request)

    @web.middleware
    async def _authenticated(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._token is not None and not self._is_open(request):
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            sent = given.encode(errors="surrogateescape")  # a header may hold any bytes
            # compare_digest takes the same time wherever the first difference is, so the time tells nothing.
            if scheme.lower() != "bearer" or not hmac.compare_digest(sent, self._token.encode()):
                if given:
                    return error_answer(401, "the admin token is not the right one")
                return error_answer(401, "this needs the admin token: Authorization: Bearer …")
        return await handler(request)
