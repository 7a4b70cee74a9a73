"""InferenceModelRewrites: other names for the models that requests ask for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

from ...request.rewrites import Rewrite, Target
from .api import Api
from .objects import InferenceModelRewrite, RewriteRule
from .watch import ListWatch, Resource

log = logging.getLogger(__name__)

REWRITES = Resource("llm-d.ai/v1alpha2", "inferencemodelrewrites", InferenceModelRewrite)


Rules = tuple[Rewrite, ...]
"""At most one for each model."""


class ModelRewrites:
    """Follows the rewrites of a pool, or all of a namespace, and tells of all the rules that count.

    There need not be such a kind in the cluster.
    """

    def __init__(self, api: Api, namespace: str, pool: str | None, told: Callable[[Rules], None]) -> None:
        self._pool = pool
        self._tell = told
        self._told: Rules = ()
        self._watch = ListWatch(api, REWRITES, namespace, self, optional=True)

    async def follow(self) -> None:
        """Keep in step until this is cancelled."""
        await self._watch.follow()

    def changed(self) -> None:
        """Tell what there is, if it is not what was told."""
        found = rules_of(each for each in self._watch.objects.values() if each.spec.is_for(self._pool))
        if found != self._told:
            self._told = found
            self._tell(found)

    def alive(self) -> None:
        """See :class:`.watch.Watcher`."""

    def lost(self, reason: str) -> None:
        """See :class:`.watch.Watcher`."""
        log.warning("%s; the rewrites that were known stay", reason)


def rules_of(rewrites: Iterable[InferenceModelRewrite]) -> Rules:
    """Return the rule that counts for each model: the first one of the oldest rewrite that names it."""
    rules: dict[str | None, Rewrite] = {}
    for rewrite in sorted(rewrites, key=_age):
        for each in rewrite.spec.rules:
            if targets := _targets(each):
                for model in _models(each):
                    rules.setdefault(model, Rewrite(model, targets))
    return tuple(rules.values())


def _age(rewrite: InferenceModelRewrite) -> tuple[str, str]:
    return rewrite.metadata.creation_timestamp or "", rewrite.metadata.name


def _models(rule: RewriteRule) -> Iterator[str | None]:
    if not rule.matches:
        yield None
    for match in rule.matches or ():
        if match.model is None:
            yield None
        elif match.model.type in (None, "Exact"):
            yield match.model.value


def _targets(rule: RewriteRule) -> tuple[Target, ...]:
    """Return the targets of a rule: all of one weight where none is given."""
    targets = rule.targets or ()
    unweighted = all(each.weight is None for each in targets)
    return tuple(
        Target(each.model_rewrite, 1 if unweighted else each.weight or 0)
        for each in targets
        if unweighted or (each.weight or 0) > 0
    )
