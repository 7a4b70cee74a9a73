"""Which model a request gets that asks for an alias: rules with weights, from several sources."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

_TURN = (5**0.5 - 1) / 2
"""The golden ratio's fractional part. Its multiples, modulo 1, are spread as evenly as can be: of any number
of requests in a row each target gets its share, within one or two."""


@dataclass(frozen=True, slots=True)
class Target:
    """A model that requests get."""

    model: str
    weight: int = 1
    """Its share, among the weights of all targets; 0: none."""


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What requests for a model get in its place."""

    model: str | None
    """The name that they ask for; ``None``: any name for which there is no rule."""
    targets: Sequence[Target]
    """At least one, with a weight above 0."""
    created: float = 0.0
    """Unix seconds. Of two rules for one name the older one counts."""


@dataclass(slots=True)
class _Rule:
    rewrite: Rewrite
    turn: float = field(default=0.0)


class Rewrites:
    """The rules of all sources. Those for a name go before those for any, then the oldest, then the first."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[Rewrite, ...]] = {}
        self._exact: dict[str, _Rule] = {}
        self._any: _Rule | None = None
        self.active = False
        """Whether there are any."""
        self.version = 0
        """Changes with the rules."""

    def update(self, source: str, rewrites: Iterable[Rewrite]) -> None:
        """Have these rules of a source in place of those that it had."""
        self._told[source] = tuple(rewrites)
        self._exact, self._any = {}, None
        for each in sorted(itertools.chain(*self._told.values()), key=lambda each: each.created):
            if each.model is not None:
                self._exact.setdefault(each.model, _Rule(each))
            elif self._any is None:
                self._any = _Rule(each)
        self.version += 1
        self.active = bool(self._exact) or self._any is not None

    def aliases(self) -> Iterator[Rewrite]:
        """Yield the rules for a name that count."""
        return (rule.rewrite for rule in self._exact.values())

    def targets(self, model: str) -> list[str]:
        """Return the models that requests for a name may get, the largest share first; else the name."""
        rule = self._exact.get(model, self._any)
        if rule is None:
            return [model]
        return [
            each.model for each in sorted(rule.rewrite.targets, key=lambda each: -each.weight) if each.weight
        ]

    def choose(
        self, model: str, session: str | None, can_serve: Callable[[str], bool]
    ) -> tuple[str, str] | None:
        """Return the rule's name (``*`` if it is for any) and the model; ``None`` without a rule.

        Targets that cannot be served get nothing while others can. The requests of a session get the same
        model as long as the targets and their weights stay the same, from each scheduler; others take turns.
        """
        rule = self._exact.get(model, self._any)
        if rule is None:
            return None
        weighted = [each for each in rule.rewrite.targets if each.weight]
        if len(weighted) > 1:
            weighted = [each for each in weighted if can_serve(each.model)] or weighted
        name = rule.rewrite.model or "*"
        if len(weighted) == 1:
            return name, weighted[0].model
        if session is not None:
            point = _point(name, session)
        else:
            point = rule.turn = (rule.turn + _TURN) % 1.0
        return name, _at(weighted, point)


def _at(targets: Sequence[Target], point: float) -> str:
    """Return the model whose part of the line from 0 to 1 has a point."""
    left = point * sum(each.weight for each in targets)
    for each in targets:
        left -= each.weight
        if left < 0:
            return each.model
    return targets[-1].model


def _point(name: str, session: str) -> float:
    """Return a point from 0 to 1 that is always the same for a session: each scheduler finds the same one."""
    digest = hashlib.blake2b(f"{name}\0{session}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
