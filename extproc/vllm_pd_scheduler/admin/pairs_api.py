"""The pairs of P and D that are left out, and the slowest: ``/pairs``."""

from __future__ import annotations

from collections.abc import Iterator

from aiohttp import web
from pydantic import Field

from ..router import PDRouter
from .route import Query, Route, Shown, json_answer


class PairsQuery(Query):
    """How many to show."""

    limit: int = Field(default=20, ge=1, le=1000)


class PairOut(Shown):
    """A pair whose hand-offs fail."""

    prefill: str
    decode: str | None
    """Null: all that this P hands over."""
    failures: int
    """Hand-offs that failed in a row."""
    next_try_s: float
    """Seconds until one is tried; 0: at once, or one is on its way."""


class PairRateAnswer(Shown):
    """What was learned of a pair."""

    prefill: str
    decode: str
    seconds_per_token: float
    """From D's having a usual hand-off to its first token, for each token that D fetches."""
    times: float
    """Times as long as the median pair."""
    samples: int
    """Hand-offs that this was learned from."""
    slow: bool


class PairsAnswer(Shown):
    """The pairs of which something is unusual."""

    out: list[PairOut]
    slowest: list[PairRateAnswer]


class PairsApi:
    """Shows the pairs."""

    def __init__(self, router: PDRouter) -> None:
        self._router = router

    def routes(self) -> Iterator[Route]:
        """Return the route."""
        text = "The pairs of P and D whose hand-offs fail, and the slowest"
        yield Route("GET", "/pairs", text, self._list, {200: PairsAnswer})

    async def _list(self, _: web.Request, query: PairsQuery) -> web.Response:
        registry, now = self._router.registry, self._router.clock()
        out = [
            PairOut(
                prefill=prefill.instance.instance_id,
                decode=None if decode is None else decode.instance.instance_id,
                failures=doubt.breaker.failures,
                next_try_s=max(0.0, doubt.breaker.not_before - now),
            )
            for prefill, decode, doubt in registry.pairs.out()
        ]
        slowest = [PairRateAnswer(**each._asdict()) for each in registry.load.transfers.slowest(query.limit)]
        return json_answer(PairsAnswer(out=out, slowest=slowest))
