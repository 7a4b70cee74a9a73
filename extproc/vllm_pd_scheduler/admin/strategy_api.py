"""The strategies in use and the shadow strategy: ``/strategy`` and ``/shadow``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aiohttp import web

from ..config.presets import hint
from ..models import PD_ROLES, InstanceRole
from ..router import PDRouter
from ..scheduler.shadow import MAX_DIFFERENCES
from ..strategies import UnknownStrategy, load_strategy, strategy_names
from .changes import AdminChanges
from .others import Others
from .route import Body, Refused, Route, Shown, asked_by, json_answer


class StrategyBody(Body):
    """Which strategies to use from the next request on."""

    strategy: str = ""
    """For both roles; a key for one role takes precedence."""
    prefill_strategy: str = ""
    decode_strategy: str = ""

    def by_role(self) -> dict[InstanceRole, str]:
        """Return the named strategies by role; raise :exc:`Refused` if the body names none."""
        given = self.model_dump(exclude_unset=True)
        if not given:
            raise Refused(400, 'give "strategy" for both roles, "prefill_strategy" or "decode_strategy"')
        names = {role: given.get(f"{role}_strategy", given.get("strategy")) for role in PD_ROLES}
        return {role: name for role, name in names.items() if name is not None}


class StrategyAnswer(Shown):
    """The strategies in use."""

    strategy: str
    """``prefill/decode`` where the two differ."""
    prefill_strategy: str
    decode_strategy: str
    available: list[str]


class ShadowBody(Body):
    """Which strategy to compare with the one in use."""

    strategy: str


class ShadowTally(Shown):
    """What came of the picks of a role that the shadow was asked for too."""

    agreed: int
    differed: int
    failed: int
    live_predicted_seconds: float | None
    shadow_predicted_seconds: float | None


class ShadowDifference(Shown):
    """A pick in which the two differed."""

    seconds_ago: float
    role: InstanceRole
    live: str
    shadow: str
    live_predicted_seconds: float
    shadow_predicted_seconds: float


class ShadowAnswer(Shown):
    """The comparison with the shadow strategy; without one, ``strategy`` alone, which is null."""

    strategy: str | None
    microseconds_per_pick: float | None = None
    prefill: ShadowTally | None = None
    decode: ShadowTally | None = None
    differences: tuple[ShadowDifference, ...] = ()
    """The newest first."""


def _together(answers: Sequence[ShadowAnswer]) -> ShadowAnswer:
    """Return what several workers have found with one shadow strategy."""
    tallies = {
        role: [tally for each in answers if (tally := getattr(each, role)) is not None] for role in PD_ROLES
    }
    picks = [sum(t.agreed + t.differed + t.failed for t in _tallies(each)) for each in answers]
    costs = [each.microseconds_per_pick for each in answers]
    differences = [one for each in answers for one in each.differences]
    return ShadowAnswer(
        strategy=answers[0].strategy,
        microseconds_per_pick=_mean(costs, picks),
        **{role.value: _sum(found) for role, found in tallies.items()},
        differences=tuple(sorted(differences, key=lambda each: each.seconds_ago)[:MAX_DIFFERENCES]),
    )


def _tallies(answer: ShadowAnswer) -> list[ShadowTally]:
    return [each for each in (answer.prefill, answer.decode) if each is not None]


def _sum(tallies: Sequence[ShadowTally]) -> ShadowTally:
    compared = [each.agreed + each.differed for each in tallies]
    return ShadowTally(
        agreed=sum(each.agreed for each in tallies),
        differed=sum(each.differed for each in tallies),
        failed=sum(each.failed for each in tallies),
        live_predicted_seconds=_mean([each.live_predicted_seconds for each in tallies], compared),
        shadow_predicted_seconds=_mean([each.shadow_predicted_seconds for each in tallies], compared),
    )


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    """Return the mean of values that count as often as their weights; ``None`` if there are none."""
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


class StrategyApi:
    """Shows and changes the strategies of a router.

    With ``others`` the results of the shadow strategy are those of all workers.
    """

    def __init__(self, router: PDRouter, changes: AdminChanges, others: Others | None = None) -> None:
        self._router = router
        self._others = others
        self._changes = changes

    def routes(self) -> Iterator[Route]:
        """Return the routes."""
        strategy, shadow = {200: StrategyAnswer}, {200: ShadowAnswer}
        yield Route("GET", "/strategy", "The strategies in use and those there are", self._show, strategy)
        yield Route("PUT", "/strategy", "Change the strategies", self._use, strategy, refusals=(507,))
        yield Route("GET", "/shadow", "What the shadow strategy would have chosen", self._show_shadow, shadow)
        yield Route("PUT", "/shadow", "Set a shadow strategy", self._use_shadow, shadow, refusals=(507,))
        yield Route(
            "DELETE", "/shadow", "Have no shadow strategy", self._remove_shadow, {204: None}, refusals=(507,)
        )

    async def _show(self, _: web.Request) -> web.Response:
        scheduler = self._router.scheduler
        return json_answer(
            StrategyAnswer(
                strategy=scheduler.strategies.name,
                prefill_strategy=scheduler.strategies.names[InstanceRole.PREFILL],
                decode_strategy=scheduler.strategies.names[InstanceRole.DECODE],
                available=strategy_names(),
            )
        )

    async def _use(self, request: web.Request, body: StrategyBody) -> web.Response:
        names = body.by_role()
        for key, name in body.model_dump(exclude_unset=True).items():
            self._check(key, name)
        try:
            await self._changes.use(names, by=asked_by(request))
        except UnknownStrategy as error:
            raise Refused(400, str(error)) from None
        return await self._show(request)

    async def _show_shadow(self, _: web.Request) -> web.Response:
        shadow = self._router.scheduler.strategies.shadow
        found = ShadowAnswer.model_validate({"strategy": None} if shadow is None else shadow.report())
        if shadow is not None and self._others is not None:
            told = map(ShadowAnswer.model_validate_json, await self._others.get("/shadow"))
            found = _together([found, *(each for each in told if each.strategy == found.strategy)])
        return json_answer(found)

    async def _use_shadow(self, request: web.Request, body: ShadowBody) -> web.Response:
        self._check("strategy", body.strategy)
        try:
            await self._changes.use_shadow(body.strategy, by=asked_by(request))
        except UnknownStrategy as error:
            raise Refused(400, str(error)) from None
        return await self._show_shadow(request)

    async def _remove_shadow(self, request: web.Request) -> web.Response:
        await self._changes.use_shadow(None, by=asked_by(request))
        return web.Response(status=204)

    def _check(self, key: str, name: str) -> None:
        """Raise :exc:`Refused` if a strategy cannot be used."""
        if not self._router.config.may_use(name):
            raise Refused(400, f"{key}: a dotted path can be used only if the configuration names it")
        try:
            load_strategy(name)
        except UnknownStrategy as error:
            raise Refused(400, f"{key}: {error}{hint(name)}") from None
