"""The probes and the metrics alone, for those who have no token."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from ..router import PDRouter
from .http_server import HttpServer, add_routes, errors_as_json
from .others import Others
from .probes_api import ProbesApi


class ProbesServer(HttpServer):
    """Serves ``/healthz``, ``/readyz`` and ``/metrics`` of a router to anybody, and nothing else.

    Nothing can be changed by them, and they have no prompt, key or address of a client. With ``others`` the
    metrics are those of all workers.
    """

    def __init__(self, router: PDRouter, is_ready: Callable[[], bool], others: Others | None = None) -> None:
        super().__init__()
        self._api = ProbesApi(router, is_ready, others)

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(middlewares=[errors_as_json])
        add_routes(app, self._api.routes())
        return app
