"""Whether D answers the same with a hand-off as without: ``/self-check``."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from aiohttp import web

from ..router import PDRouter
from ..self_check import CannotCheck, Checked, SelfCheck
from .route import Query, Refused, Route, Shown, asked_by, json_answer


class CheckQuery(Query):
    """Which pair to check; without one, that of each model whose turn it is."""

    prefill: str | None = None
    """Id of a P; its D must be given too."""
    decode: str | None = None
    """Id of a D."""
    model: str | None = None
    """Of a pair that is given; without it, one that both serve."""


class CheckAnswer(Shown):
    """What came of the check of a pair."""

    time: str
    """RFC 3339."""
    model: str
    prefill: str
    decode: str
    result: str
    """Of the last try: ``match``, ``close``, ``mismatch``, ``failed`` or ``skipped``."""
    tries: int
    """Prompts for which it was asked: one, unless an answer was wrong, or the pair is left out."""
    left_out: bool
    """Whether the pair gets no hand-offs since."""
    reason: str | None
    """Why there is no other result."""


class LeftOut(Shown):
    """A pair that gave wrong texts, and gets no hand-offs."""

    prefill: str
    decode: str
    why: str


class ChecksAnswer(Shown):
    """The last checks, the newest first."""

    interval: float | None
    """Seconds between two of a model; null: only those that are asked for."""
    left_out: list[LeftOut]
    checks: list[CheckAnswer]


class SelfCheckApi:
    """Shows what self-checks have found, and has pairs checked now."""

    def __init__(self, router: PDRouter, self_check: SelfCheck | None) -> None:
        self._router = router
        self._self_check = self_check

    def routes(self) -> Iterator[Route]:
        """Return the routes."""
        answers = {200: ChecksAnswer}
        path = "/self-check"
        yield Route("GET", path, "What the last self-checks have found", self._show, answers)
        yield Route("POST", path, "Check a pair now", self._check, answers, refusals=(404, 409))

    async def _show(self, _: web.Request) -> web.Response:
        return json_answer(self._answer(list(self._self_check.results) if self._self_check else []))

    async def _check(self, request: web.Request, query: CheckQuery) -> web.Response:
        check = self._self_check
        if check is None or self._router.config.prefill_leg == "sidecar":
            raise Refused(409, "the scheduler calls no P itself")
        if query.prefill is None and query.decode is None and query.model is None:
            return json_answer(self._answer(await check.round(asked_by(request))))
        if query.prefill is None or query.decode is None:
            raise Refused(400, "query: give both prefill and decode, or neither and no model")
        try:
            found = await check.check(query.prefill, query.decode, query.model, asked_by(request))
        except CannotCheck as error:
            raise Refused(409, str(error)) from None
        return json_answer(self._answer([found]))

    def _answer(self, checks: list[Checked]) -> ChecksAnswer:
        return ChecksAnswer(
            interval=self._router.config.self_check_interval,
            left_out=[
                LeftOut(prefill=prefill.id, decode=decode.id, why=why)
                for prefill, decode, why in self._router.registry.wrong_pairs
            ],
            checks=[_shown(each) for each in reversed(checks)],
        )


def _shown(checked: Checked) -> CheckAnswer:
    return CheckAnswer(
        time=datetime.fromtimestamp(checked.at, UTC).isoformat(timespec="milliseconds"),
        model=checked.model,
        prefill=checked.prefill,
        decode=checked.decode,
        result=checked.verdict,
        tries=checked.tries,
        left_out=checked.left_out,
        reason=checked.reason or None,
    )
