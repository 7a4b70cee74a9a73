"""The admin HTTP server: who may ask, and which groups of routes there are."""

from __future__ import annotations

import hmac
import logging
import ssl
from collections.abc import Awaitable, Callable

from aiohttp import web

from ..fleet.registry import UnknownInstance
from ..router import PDRouter
from .changes import AdminChanges, LastRoutable, Leaving, NotKept
from .decisions_api import DecisionsApi
from .event_stream import Streams
from .events_api import EventsApi
from .index_api import IndexApi
from .instances_api import InstancesApi
from .live_api import LiveApi
from .models_api import ModelsApi
from .origin import foreign_host, foreign_origin
from .page import wants_page
from .probes_api import ProbesApi
from .process_api import ProcessApi
from .reload_api import Reload, ReloadApi
from .route import Api, Refused, Route, error_answer
from .strategy_api import StrategyApi
from .trace_api import TraceApi

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SHUTDOWN_S = 1.0
"""Seconds that running calls get to end when the server stops.

Only streams, which end at once, and those that wait for a drain run longer than a moment; the latter notice
the shutdown within :data:`.instances_api.DRAIN_POLL_S`.
"""

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""


class AdminServer:
    """Serves the admin interface of a router.

    ``changes`` makes and saves what callers change. ``is_ready`` returns ``False`` once the scheduler is
    shutting down. ``reload`` reads the configuration again, if it comes from a file. ``token``, if given, is
    required as a bearer token for all routes but those that are open. Without one, whoever reaches the port
    may do everything, so requests must name this machine as their host. In any case a web page of another
    site may change nothing.
    """

    def __init__(
        self,
        router: PDRouter,
        changes: AdminChanges | None = None,
        *,
        is_ready: Callable[[], bool],
        token: str | None = None,
        reload: Reload | None = None,
    ) -> None:
        changes = changes or AdminChanges(router)
        self._streams = Streams()
        process = ProcessApi(router, is_ready)
        self._live = LiveApi(router, self._streams, process.status, changes.source)
        groups: list[Api] = [
            IndexApi(lambda: self.routes),
            ProbesApi(router, is_ready),
            process,
            ReloadApi(reload),
            StrategyApi(router, changes),
            DecisionsApi(router.decisions),
            InstancesApi(router, changes, is_ready),
            ModelsApi(router),
            EventsApi(router.events, self._streams),
            self._live,
            TraceApi(router.recording, self._streams),
        ]
        self.routes: list[Route] = [route for group in groups for route in group.routes()]
        self._open = frozenset(route.path for route in self.routes if route.open)
        self._own_host = router.config.admin_host
        self._token = token
        self._runner: web.AppRunner | None = None

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(middlewares=[_errors_as_json, self._from_here, self._authenticated])
        for route in self.routes:
            for method in (route.method, "HEAD") if route.reads_only else (route.method,):
                app.router.add_route(method, route.path, route.checked())
        app.cleanup_ctx.append(self._live.sample)
        app.on_shutdown.append(self._streams.end)
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


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refused as error:
        return error_answer(*error.args)
    except UnknownInstance as error:
        return error_answer(404, str(error))
    except (LastRoutable, Leaving) as error:
        return error_answer(409, str(error))
    except NotKept as error:
        return error_answer(507, f"nothing was changed, since it could not be kept in state_file: {error}")
    except web.HTTPException as error:
        headers = {"allow": error.headers["allow"]} if "allow" in error.headers else None
        more = "; GET / lists what there is" if error.status == 404 else ""
        return error_answer(error.status, f"{request.method} {request.path}: {error.reason}{more}", headers)
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return error_answer(500, "the scheduler has failed: its log says where")
