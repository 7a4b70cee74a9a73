"""Whether the fleet should have another number of P and D: ``/advice``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from aiohttp import web
from pydantic import Field

from ..advice import Advice, Adviser
from ..advice.observation import Observation
from ..advice.question import Outcome, Size, Times
from ..models import PD_ROLES
from .route import Query, Refused, Route, Shown, json_answer

_Engines = Annotated[int, Field(ge=1, le=256)]


class AdviceQuery(Query):
    """Of which requests, and of which other fleet."""

    minutes: Annotated[float, Field(ge=1, le=15)] = 5.0
    """Of traffic, the newest, that are replayed."""
    prefill: _Engines | None = None
    """Prefill engines of another fleet that is to be compared; ``decode`` must be given too."""
    decode: _Engines | None = None
    """Its decode engines."""


class MoveAnswer(Shown):
    """Which instance to move."""

    from_role: str
    to_role: str
    instances: int


class TrafficAnswer(Shown):
    """What was seen."""

    seconds: float
    requests: int
    rate: float
    """How many times as many the instances have served: above 1 where other schedulers send them too."""
    prompt_tokens: float
    """Mean."""
    output_tokens: float
    """Mean, estimated."""
    cached_share: float | None
    """Of the prompts' tokens, as P have said since the start."""
    ttft_p90_s: float | None
    """As clients have seen it."""


class FleetAnswer(Shown):
    """What a fleet would do with that traffic, by the model."""

    prefill: int
    """Engines: an instance with data-parallel ranks has several."""
    decode: int
    ttft_p90_s: float | None
    tpot_p90_s: float | None
    in_limits: float
    """Share of the requests within ``ttft_slo`` and ``tpot_slo``, as far as they are configured."""
    prefill_busy: float
    """Share of the time in which P compute."""
    decode_kv_usage: float
    """Share of D's KV caches that is in use."""
    rejected: int
    requests: int


class AdviceAnswer(Shown):
    """What is advised."""

    advice: str
    """``move``, ``keep`` or ``unknown``."""
    text: str
    """In a line, for people."""
    why: list[str]
    move: MoveAnswer | None
    traffic: TrafficAnswer | None
    """Null: not enough was seen."""
    fleets: list[FleetAnswer]
    """The present one first."""


class AdviceApi:
    """Answers with an advice, which takes some seconds to work out."""

    def __init__(self, adviser: Adviser) -> None:
        self._adviser = adviser

    def routes(self) -> Iterator[Route]:
        """Return the route."""
        summary = "Whether another number of P and D would serve the traffic of the last minutes better"
        yield Route("GET", "/advice", summary, self._show, {200: AdviceAnswer})

    async def _show(self, request: web.Request, query: AdviceQuery) -> web.Response:
        if (query.prefill is None) is not (query.decode is None):
            raise Refused(400, "query: give both prefill and decode, or neither")
        if request.method == "HEAD":  # none waits for a replay without reading what it says
            return web.Response(content_type="application/json")
        asked = Size(query.prefill, query.decode) if query.prefill and query.decode else None
        return json_answer(_shown(await self._adviser.advise(query.minutes * 60.0, asked)))


def _shown(advice: Advice) -> AdviceAnswer:
    move = None
    if (from_role := advice.from_role) is not None:
        (to_role,) = set(PD_ROLES) - {from_role}
        move = MoveAnswer(from_role=from_role, to_role=to_role, instances=1)
    return AdviceAnswer(
        advice=advice.kind,
        text=advice.text,
        why=advice.why,
        move=move,
        traffic=_traffic(advice.observation) if advice.observation else None,
        fleets=[_fleet(each, each.whole) for each in advice.outcomes],
    )


def _traffic(seen: Observation) -> TrafficAnswer:
    return TrafficAnswer(
        seconds=round(seen.seconds, 1),
        requests=len(seen.requests),
        rate=round(seen.question.rate, 3),
        prompt_tokens=round(seen.prompt_tokens, 1),
        output_tokens=round(seen.output_tokens, 1),
        cached_share=_rounded(seen.cached_share),
        ttft_p90_s=_rounded(seen.ttft),
    )


def _fleet(outcome: Outcome, times: Times) -> FleetAnswer:
    return FleetAnswer(
        prefill=outcome.size.prefill,
        decode=outcome.size.decode,
        ttft_p90_s=_rounded(times.ttft),
        tpot_p90_s=_rounded(times.tpot),
        in_limits=round(times.in_limits, 4),
        prefill_busy=round(outcome.prefill_busy, 4),
        decode_kv_usage=round(outcome.decode_kv, 4),
        rejected=outcome.rejected,
        requests=outcome.requests,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
