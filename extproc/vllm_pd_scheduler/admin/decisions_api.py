"""Why the latest requests went where they went: ``/decisions``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import islice
from typing import Annotated

from aiohttp import web
from pydantic import Field

from ..records.decision import Decision
from ..records.decisions import MAX_DECISIONS, Decisions
from ..telemetry import Served
from .others import Others
from .route import Query, Route, Shown, json_answer

_CHUNK = 20
"""Decisions that are worked out in one turn of the event loop: a millisecond or so."""
_DEFAULT_LIMIT = 100


class DecisionsQuery(Query):
    """Which decisions to show."""

    request_id: str | None = None
    """Only those of the request with this `x-request-id`, or this `x-pd-id`."""
    limit: Annotated[int, Field(ge=1, le=MAX_DECISIONS)] = _DEFAULT_LIMIT
    """How many at most: the newest."""
    since: Annotated[int, Field(ge=0)] | None = None
    """Only those after the one with this number."""


Score = float | list[float | None] | None
"""The least is the best. Several numbers are compared one after another."""


class CandidateAnswer(Shown):
    """An instance that could have been chosen."""

    id: str
    score: Score
    """`null`: the strategy gives none, or it is infinite."""
    terms: dict[str, float | None]
    """What the score is made of, for the one that was picked."""


class AttemptAnswer(Shown):
    """A request at one instance."""

    instance: str
    outcome: str | None
    """`ok`, or how it failed; `null` while it runs."""


class ChoiceAnswer(Shown):
    """How an instance of one role was chosen, the last time that one was."""

    strategy: str | None
    """`null` if none was asked."""
    by: str
    """What has chosen: `strategy`, `disaggregation` or `last_resort`."""
    picked: str | None
    of: int
    """How many the strategy was offered."""
    candidates: list[CandidateAnswer]
    """The best of them."""
    left_out: dict[str, list[str]]
    """Who could not be chosen, by why."""
    attempts: list[AttemptAnswer]


class EncodeAnswer(Shown):
    """What encode instances have done for it."""

    items: int
    """Images, videos and sounds that they were asked for."""
    encoded: int
    """Those that they have encoded; the prefill encodes the others."""
    took_s: float
    attempts: list[AttemptAnswer]
    """The first of them."""


class SourceAnswer(Shown):
    """An instance from which P was to pull a part of the prompt."""

    instance: str
    tokens: int


class PrefillAnswer(ChoiceAnswer):
    """The choice of P."""

    predicted_s: float | None
    """From the last choice of P to its answer."""
    took_s: float | None
    source: SourceAnswer | None
    """`null` if P had to pull nothing."""


class DecodeAnswer(ChoiceAnswer):
    """The choice of D."""

    then: list[str]
    """Those that Envoy tries when an attempt fails."""


class ContinuesAnswer(Shown):
    """Where the answer has broken off of which a request is the rest."""

    decode: str | None
    """The D that has failed it."""
    tokens: int
    """How many tokens its client had."""


class DecisionAnswer(Shown):
    """Why a request went where it went, and what became of it."""

    number: int
    """1 for the first since the scheduler was started; of several schedulers microseconds since 1970."""
    time: datetime
    """When the request came."""
    request_id: str
    id: str | None
    """The scheduler's own, `x-pd-id`; `null` if it was not sent to decode."""
    path: str
    model: str | None
    """The one that served it."""
    asked_model: str | None
    """The name that its client has used, if that is an alias."""
    stream: bool
    prompt_tokens: int
    served: Served | str | None
    """As in the metrics, or `rejected`; `null` if its client left before it was decided."""
    not_split: str | None
    """Why D was to do all of it: `connector`, `no_model`, `disaggregation`, `prefill`, `late`, `splice` or
    `no_decode`; else `null`."""
    status: int | None
    reason: str | None
    """Why the scheduler has refused it."""
    continues: ContinuesAnswer | None
    """`null`: it is a request of its own."""
    waited_s: float
    """In the scheduler's queue."""
    encode: EncodeAnswer | None
    """`null`: none was asked."""
    prefill: PrefillAnswer | None
    decode: DecodeAnswer | None
    predicted_ttft_s: float | None
    ttft_s: float | None
    """To the first byte of the answer's body, by Envoy's clock."""
    duration_s: float | None
    outcome: str | None
    """`ok`, `client_error`, `error`, `left`, `cut` or `rejected`; `null` until Envoy tells."""


class DecisionsAnswer(Shown):
    """The decisions, the newest first."""

    decisions: list[DecisionAnswer]


class DecisionsApi:
    """Shows decisions; with ``others`` those of all workers."""

    def __init__(self, decisions: Decisions, others: Others | None = None) -> None:
        self._decisions = decisions
        self._others = others

    def routes(self) -> Iterator[Route]:
        """Return the route."""
        summary = "Why the latest requests went where they went, and what became of them"
        yield Route("GET", "/decisions", summary, self._get, {200: DecisionsAnswer})

    async def _get(self, request: web.Request, query: DecisionsQuery) -> web.Response:
        decisions, now = self._decisions, time.time()
        asked: Iterable[Decision] = reversed(decisions.after(query.since or 0))
        if query.request_id is not None:
            asked = (each for each in asked if each.is_of(query.request_id))
        found = list(islice(asked, query.limit))
        shown = []
        for at, decision in enumerate(found):
            if at % _CHUNK == 0:
                await asyncio.sleep(0)  # requests go on meanwhile
            shown.append(DecisionAnswer.model_validate(decisions.as_json(decision)))
        if self._others is not None:
            for body in await self._others.get(request.path_qs):
                shown += DecisionsAnswer.model_validate_json(body).decisions
            shown = _of_all(shown, now, time.time())[: query.limit]
        return json_answer(DecisionsAnswer(decisions=shown))


def _of_all(shown: list[DecisionAnswer], asked_at: float, answered_at: float) -> list[DecisionAnswer]:
    """Return the decisions of all workers that were there when the others were asked, the newest first.

    Who asks again for what is later would miss some of those that were made meanwhile. Once the clock was set
    back, all numbers are later than now: then none is left out.
    """
    if all(each.number <= answered_at * 1e6 for each in shown):
        shown = [each for each in shown if each.number <= asked_at * 1e6]
    return sorted(shown, key=lambda each: each.number, reverse=True)
