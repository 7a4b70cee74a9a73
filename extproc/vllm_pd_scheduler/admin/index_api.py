"""What can be asked for: ``/`` and ``/openapi.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

from aiohttp import web

from .. import __version__
from .openapi import document
from .page import HTML, page_answer, wants_page
from .route import Route, Shown, json_answer


class EndpointAnswer(Shown):
    """A request that can be made."""

    method: str
    path: str
    summary: str


class IndexAnswer(Shown):
    """The requests that can be made."""

    name: str
    version: str
    endpoints: list[EndpointAnswer]


class IndexApi:
    """Describes the interface itself. ``declared`` returns its routes, those of all groups."""

    def __init__(self, declared: Callable[[], Sequence[Route]]) -> None:
        self._declared = declared
        self._document: str | None = None

    def routes(self) -> Iterator[Route]:
        """Return the routes."""
        yield Route(
            "GET",
            "/",
            "The requests that can be made; for a browser the dashboard",
            self._index,
            {200: IndexAnswer},
            also=(HTML,),
        )
        yield Route(
            "GET", "/openapi.json", "This interface as OpenAPI 3.1", self._openapi, {200: "application/json"}
        )

    async def _index(self, request: web.Request) -> web.Response:
        if wants_page(request.method, request.path, request.headers):
            return page_answer(request)
        endpoints = [
            EndpointAnswer(method=each.method, path=each.path, summary=each.summary)
            for each in self._declared()
        ]
        return json_answer(IndexAnswer(name="vllm-pd-scheduler", version=__version__, endpoints=endpoints))

    async def _openapi(self, _: web.Request) -> web.Response:
        if self._document is None:
            self._document = json.dumps(document(self._declared()))
        return web.Response(text=self._document, content_type="application/json")
