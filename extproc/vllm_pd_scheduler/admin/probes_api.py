"""What Kubernetes and Prometheus ask for: ``/healthz``, ``/readyz`` and ``/metrics``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from aiohttp import web

from ..models import InstanceRole
from ..router import PDRouter
from ..routing.catalog import Health
from .collectors import collectors
from .metrics_page import metrics_page
from .others import Others
from .route import Query, Refused, Route, Shown, json_answer


class ProbeAnswer(Shown):
    """That all is well."""

    status: str
    discovery: str | None = None
    """How many of the sources of instances cannot be asked: what they told before is used."""
    replicas: str | None = None
    """Whether the other replicas are heard, if this is one of several."""


class ReadyQuery(Query):
    """What is to be ready."""

    model: str | None = None
    """A model, or an alias; without it, the scheduler."""


class ProbesApi:
    """Answers probes and scrapes. ``is_ready`` returns ``False`` once the scheduler is shutting down.

    With ``others`` the metrics are those of all workers.
    """

    def __init__(self, router: PDRouter, is_ready: Callable[[], bool], others: Others | None = None) -> None:
        self._router = router
        self._others = others
        self._is_ready = is_ready
        self._collectors = collectors(router, time.monotonic)

    def routes(self) -> Iterator[Route]:
        """Return the routes.

        The probes are open, since Kubernetes' have no token, and tell nothing of the fleet.
        """
        healthy = {200: ProbeAnswer}
        yield Route("GET", "/healthz", "Whether the process runs", self._healthz, healthy, open=True)
        yield Route(
            "GET",
            "/readyz",
            "Whether the scheduler can serve, or can serve one model: it is not draining, and a D can serve",
            self._readyz,
            healthy,
            refusals=(404, 503),
            open=True,
        )
        yield Route("GET", "/metrics", "Prometheus metrics", self._metrics, {200: "text/plain"})

    async def _healthz(self, _: web.Request) -> web.Response:
        return json_answer(ProbeAnswer(status="ok"))

    async def _readyz(self, _: web.Request, query: ReadyQuery) -> web.Response:
        if not self._is_ready():
            raise Refused(503, "draining")
        if query.model is not None:
            health = self._router.catalog.health(query.model)
            if health is not Health.SERVED:
                raise Refused(
                    health.value,
                    "the model is not served by any instance"
                    if health is Health.UNKNOWN
                    else "no instances that serve the model can serve now",
                )
        no_news = self._router.membership.no_news
        if not self._router.registry.routable(InstanceRole.DECODE):
            raise Refused(503, f"no decode instance can serve{f'; {no_news}' if no_news else ''}")
        more = {"discovery": no_news} if no_news else {}
        if self._router.sync is not None:
            more["replicas"] = self._router.sync.summary()
        return json_answer(ProbeAnswer(status="ready", **more))

    async def _metrics(self, _: web.Request) -> web.Response:
        body = await metrics_page((self._router.telemetry.prometheus, self._collectors))
        if self._others is not None:
            body = await self._others.metrics(body)
        return web.Response(body=body, content_type="text/plain", charset="utf-8")
