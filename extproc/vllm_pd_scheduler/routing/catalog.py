"""Which models clients can ask for: their list, the health of one, and the answer for an unknown one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import unquote_plus

import msgspec

from ..models import PD_ROLES, InstanceRole
from ..request.errors import OwnAnswer, Reject, own_answer, reject
from ..request.path import HEALTH_PATH, MODELS_PATH, PING_PATH
from ..request.rewrites import Rewrites
from ..scheduler import Scheduler
from .rereading import Rereading

OWNER = "vllm-pd-scheduler"
"""``owned_by`` of what no instance has described."""


_FIELD = "model"
"""Of a request's body."""


class Health(Enum):
    """How a model is."""

    SERVED = 200
    """A D can serve it, and a P that fits it, if any P has it."""
    AWAY = 503
    """Those that have it cannot serve now, or it is not known whether there are any."""
    UNKNOWN = 404
    """All instances have said which models they serve, and nobody has it."""


@dataclass(frozen=True, slots=True)
class _Listed:
    """What the list was made of, and the answer; ``None`` where each D would answer the same."""

    version: tuple[int, int]
    answer: OwnAnswer | None


class Catalog:
    """Knows the models of the fleet and their aliases. ``clock`` returns monotonic seconds."""

    def __init__(self, scheduler: Scheduler, rewrites: Rewrites, clock: Callable[[], float]) -> None:
        registry = scheduler.registry
        self.read_again = Rereading(lambda: len(registry.endpoints()), clock)
        self._scheduler = scheduler
        self._registry = registry
        self._rewrites = rewrites
        self._listed = _Listed((-1, -1), None)

    def own_answer(self, path: str, headers: Mapping[str, str]) -> OwnAnswer | None:
        """Return the answer to a question about models or health; ``None`` if it is for a D, or none."""
        if headers.get(":method") != "GET":
            return None
        if path == MODELS_PATH:
            return self._list()
        if path == PING_PATH:
            return _health_answer(self._fleet_health())
        if path == HEALTH_PATH:
            asked = _asked_model(headers.get(":path", "").partition("?")[2])
            return _health_answer(self.health(asked) if asked else self._fleet_health())
        return None

    def names(self) -> list[str]:
        """Return the models that some D is known to serve: base models, then adapters."""
        endpoints = self._registry.endpoints(InstanceRole.DECODE)
        adapters = frozenset[str]().union(*(e.models.adapters for e in endpoints))
        names = frozenset[str]().union(*(e.models.names for e in endpoints if e.models.names))
        return sorted(names, key=lambda name: (name in adapters, name))

    def aliases(self) -> dict[str, str]:
        """Return the names that stand for others, each with the model that most of its requests get.

        A name that is a model's too, and one whose targets nobody has, is not among them.
        """
        names = frozenset(self.names())
        found = {}
        for rule in self._rewrites.aliases():
            if rule.model is not None and rule.model not in names:
                served = (each for each in self._rewrites.targets(rule.model) if each in names)
                if target := next(served, None):
                    found[rule.model] = target
        return found

    def health(self, name: str) -> Health:
        """Return how a model is, or an alias: as the best of its targets."""
        found = [self._health(target) for target in self._rewrites.targets(name)]
        return min(found, key=list(Health).index)

    def _fleet_health(self) -> Health:
        """Return how the fleet is, whichever its models: gateways ask here what our own Envoy answers."""
        served = all(self._registry.routable(role) for role in PD_ROLES)
        return Health.SERVED if served else Health.AWAY

    def _health(self, model: str) -> Health:
        scheduler, prefill, decode = self._scheduler, InstanceRole.PREFILL, InstanceRole.DECODE
        if scheduler.nobody_serves(decode, model):
            return Health.UNKNOWN
        prefilled = scheduler.serving(prefill, model) or scheduler.nobody_serves(prefill, model)
        return Health.SERVED if prefilled and scheduler.serving(decode, model) else Health.AWAY

    async def refusal(self, asked: str | None, model: str | None) -> Reject | None:
        """Return the answer to a request for ``model``, asked for as ``asked``, if nobody serves that.

        An adapter may have been loaded a moment ago, so the lists are read again before.
        """
        if self.unknown(asked, model) is not None:
            await self.read_again()
        return self.unknown(asked, model)

    def unknown(self, asked: str | None, model: str | None) -> Reject | None:
        """Return the same, by what is known already."""
        if not self._scheduler.nobody_serves(InstanceRole.DECODE, model):
            return None
        message = f"The model `{asked or model}` does not exist."  # in vLLM's words
        return reject(404, message, "unknown_model", param=_FIELD)

    def _list(self) -> OwnAnswer | None:
        version = self._registry.models.version, self._rewrites.version
        if self._listed.version != version:
            self._listed = _Listed(version, self._made())
        return self._listed.answer

    def _made(self) -> OwnAnswer | None:
        endpoints = self._registry.endpoints(InstanceRole.DECODE)
        lists = {e.models.names for e in endpoints} | {e.models.listed for e in endpoints}
        names, aliases = self.names(), self.aliases()
        if not names or (len(lists) == 1 and not aliases):
            return None  # each D answers the same, or nothing is known
        cards = self._registry.models.cards
        found = [cards.get(name) or _card(name) for name in names]
        for alias, target in aliases.items():
            known: dict[str, Any] = msgspec.json.decode(cards.get(target) or _card(target))
            found.append(msgspec.json.encode({**known, "id": alias}))
        return own_answer(200, b'{"object":"list","data":[' + b",".join(found) + b"]}")


def _health_answer(health: Health) -> OwnAnswer:
    return own_answer(health.value, msgspec.json.encode({"status": health.name.lower()}))


def _asked_model(query: str) -> str | None:
    """Return the model that a query names first, however many fields it has."""
    fields = (field.partition("=") for field in query.split("&"))
    return next((unquote_plus(value) for name, _, value in fields if name == "model" and value), None)


def _card(name: str) -> bytes:
    """Return the entry of a model that no instance has described."""
    return msgspec.json.encode(
        {"id": name, "object": "model", "created": 0, "owned_by": OWNER, "root": name, "parent": None}
    )
