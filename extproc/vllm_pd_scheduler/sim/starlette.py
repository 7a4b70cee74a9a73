"""What uvicorn and Starlette do around vLLM's handlers: decode paths and ids, and say who may read."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Routes:
    """Handlers by method and decoded path; a slash too many or too few at the end is a redirect."""

    def __init__(self, handlers: Mapping[tuple[str, str], Handler]) -> None:
        self._handlers = handlers

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        """Answer a request; raise ``HTTPNotFound`` or ``HTTPMethodNotAllowed``."""
        path = request.path
        handler = self._handlers.get((request.method, path))
        if handler is not None:
            return await handler(request)
        if allowed := self._methods(path):
            raise web.HTTPMethodNotAllowed(request.method, allowed)
        other = path[:-1] if path.endswith("/") else f"{path}/"
        if self._methods(other):
            return web.Response(status=307, headers={"Location": str(request.url.with_path(other))})
        raise web.HTTPNotFound

    def _methods(self, path: str) -> list[str]:
        return [method for method, known in self._handlers if known == path]


class Cors:
    """Starlette's CORS middleware with vLLM's settings: which origins' web pages may read answers."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._all = "*" in origins
        self._origins = origins

    def preflight(self, request: web.Request) -> web.Response | None:
        """Return the answer to a browser that asks before it asks; ``None`` if this is no such request."""
        asked = request.headers.get("Access-Control-Request-Method")
        if request.method != "OPTIONS" or asked is None or "Origin" not in request.headers:
            return None
        if not self._allows(request):
            return web.Response(status=400, text="Disallowed CORS origin")
        headers = {"Access-Control-Allow-Methods": asked, "Access-Control-Max-Age": "600"}
        if wanted := request.headers.get("Access-Control-Request-Headers"):
            headers["Access-Control-Allow-Headers"] = wanted
        return web.Response(text="OK", headers=headers)

    async def mark(self, request: web.Request, response: web.StreamResponse) -> None:
        """Say in an answer that the page may read it, if it may."""
        if "Origin" in request.headers and self._allows(request):
            origin = "*" if self._all else request.headers["Origin"]
            response.headers["Access-Control-Allow-Origin"] = origin

    def _allows(self, request: web.Request) -> bool:
        return self._all or request.headers["Origin"] in self._origins


def request_id(request: web.BaseRequest) -> str:
    """Return the client's X-Request-Id, a character for each byte as vLLM reads headers, or a new id."""
    given = request.headers.get("X-Request-Id", "")
    return given.encode("utf-8", "surrogateescape").decode("latin-1") or uuid.uuid4().hex
