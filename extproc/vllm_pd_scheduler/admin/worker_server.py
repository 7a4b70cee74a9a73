"""The admin interface of one worker, which the first of them asks."""

from __future__ import annotations

import msgspec
from aiohttp import web

from ..advice.seen import seen_by
from .live_api import reading
from .others import READING_PATH, TRAFFIC_PATH
from .server import AdminServer


class WorkerServer(AdminServer):
    """Serves a worker's own admin interface, at a socket that only this user can open; so without a token."""

    balances = False

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = super().application()
        app.router.add_get(READING_PATH, self._reading)
        app.router.add_get(TRAFFIC_PATH, self._traffic)
        return app

    async def _reading(self, _: web.Request) -> web.Response:
        return web.Response(body=msgspec.msgpack.encode(reading(self._router)))

    async def _traffic(self, request: web.Request) -> web.Response:
        return web.Response(body=msgspec.msgpack.encode(seen_by(self._router, float(request.query["since"]))))
