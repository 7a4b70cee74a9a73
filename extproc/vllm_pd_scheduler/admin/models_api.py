"""The models of the fleet: ``/models``."""

from __future__ import annotations

from collections.abc import Iterator

from aiohttp import web

from ..models import InstanceRole
from ..request.rewrites import Rewrite
from ..router import PDRouter
from .route import Route, Shown, json_answer


class ModelAnswer(Shown):
    """A model, or an alias, that clients can ask for."""

    name: str
    kind: str
    """`base`, `adapter` (LoRA) or `alias`."""
    health: str
    """`served`, `away` (nobody that has it can serve) or `unknown` (nobody has it)."""
    prefill: int
    """P that can serve it now."""
    decode: int
    """D that can serve it now."""
    decode_loaded: int
    """D on which it is taken for loaded, if it is an adapter."""
    targets: dict[str, int]
    """The models that requests for it get in its place, each with its weight."""


class ModelsAnswer(Shown):
    """What clients can ask for: base models, then adapters, then aliases."""

    models: list[ModelAnswer]


class ModelsApi:
    """Shows the models."""

    def __init__(self, router: PDRouter) -> None:
        self._router = router

    def routes(self) -> Iterator[Route]:
        """Return the route."""
        yield Route("GET", "/models", "The models, with who can serve them", self._list, {200: ModelsAnswer})

    async def _list(self, _: web.Request) -> web.Response:
        router = self._router
        rules = {rule.model: rule for rule in router.rewrites.aliases() if rule.model is not None}
        names = dict.fromkeys((*router.catalog.names(), *rules))
        return json_answer(ModelsAnswer(models=[self._shown(name, rules.get(name)) for name in names]))

    def _shown(self, name: str, rule: Rewrite | None) -> ModelAnswer:
        scheduler, decode = self._router.scheduler, InstanceRole.DECODE
        endpoints = self._router.registry.endpoints(decode)
        own = any(name in (e.models.names or ()) for e in endpoints)
        adapter = any(name in e.models.adapters for e in endpoints)
        return ModelAnswer(
            name=name,
            kind="adapter" if adapter else "base" if own else "alias",
            health=self._router.catalog.health(name).name.lower(),
            prefill=len(scheduler.serving(InstanceRole.PREFILL, name)) if own else 0,
            decode=len(scheduler.serving(decode, name)) if own else 0,
            decode_loaded=sum(name in e.models.loaded for e in endpoints),
            targets={each.model: each.weight for each in rule.targets} if rule else {},
        )
