"""Filter, score, pick: who could serve, and who should."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

from ..config import SchedulerConfig
from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import InstanceRole
from ..request.context import RequestContext
from ..strategies import Strategy, make_strategy
from .shadow import Shadow

_LOOK_AT = 16
"""Of the routable, for a last resort: to look at all of a large saturated fleet takes a millisecond."""


class Scheduler:
    """Picks endpoints of a registry, each role's by a strategy that can be changed while requests run.

    ``seed`` makes the strategies that choose at random repeatable.
    """

    def __init__(self, config: SchedulerConfig, registry: Registry, seed: int | None = None) -> None:
        self.config = config
        self.registry = registry
        self.names: dict[InstanceRole, str] = {}
        self.shadow: Shadow | None = None
        """The strategy that is asked too, without being followed."""
        self._seed = seed
        self._strategies: dict[InstanceRole, Strategy] = {}
        self.use_each({role: config.strategy_of(role) for role in InstanceRole})
        self.use_shadow(config.shadow_strategy)
        self._limited = (config.max_waiting, config.max_kv_usage, config.max_in_flight_tokens) != (None,) * 3

    @property
    def strategy_name(self) -> str:
        """The strategy's name, or both if the roles differ: ``prefill_name/decode_name``."""
        return "/".join(dict.fromkeys(self.names.values()))

    @property
    def reads_prefixes(self) -> bool:
        """Whether requests should come with their prompt's block hashes."""
        return (
            self.config.disaggregation == "auto"
            or any(s.reads_prefixes for s in self._strategies.values())
            or (self.shadow is not None and self.shadow.reads_prefixes)
        )

    def use(self, name: str, role: InstanceRole | None = None) -> None:
        """Change the strategy of a role or, without one, of both; the next pick uses it.

        Raises :exc:`~vllm_pd_scheduler.strategies.UnknownStrategy` and keeps the old one.
        """
        self.use_each(dict.fromkeys(InstanceRole if role is None else (role,), name))

    def use_each(self, names: Mapping[InstanceRole, str]) -> None:
        """Change the strategies of some roles: all or, if one cannot be used, none; raises as ``use``."""
        made = {role: make_strategy(name, self.config) for role, name in names.items()}
        for role, strategy in made.items():
            self._put(strategy, role, names[role])

    def use_shadow(self, name: str | None) -> None:
        """Begin anew with a shadow strategy, or have none; raises as ``use``."""
        self.shadow = None if name is None else Shadow(name, self.config)

    def install(self, strategy: type[Strategy], role: InstanceRole, name: str) -> None:
        """Use a strategy that no name is known for."""
        self._put(strategy(self.config), role, name)

    def _put(self, strategy: Strategy, role: InstanceRole, name: str) -> None:
        if self._seed is not None:
            strategy.random.seed(self._seed)
        self._strategies[role], self.names[role] = strategy, name

    def strategy(self, role: InstanceRole) -> Strategy:
        """Return the strategy object of a role."""
        return self._strategies[role]

    def saturated(self, endpoint: Endpoint, now: float) -> bool:
        """Whether an endpoint has as much as the configuration lets it have, or has said that it is full."""
        config = self.config
        return (
            now < endpoint.busy_until
            or (config.max_waiting is not None and _waiting(endpoint) >= config.max_waiting)
            or (config.max_kv_usage is not None and _kv_usage(endpoint) >= config.max_kv_usage)
            or (config.max_in_flight_tokens is not None and endpoint.tokens >= config.max_in_flight_tokens)
        )

    def open(self, role: InstanceRole, now: float) -> bool:
        """Whether some endpoint of a role is not saturated, or none can serve at all."""
        if not self._may_be_saturated(now):
            return True
        candidates = self._candidates(role, ())
        return not candidates or not all(self.saturated(e, now) for e in candidates)

    def _may_be_saturated(self, now: float) -> bool:
        return self._limited or now < self.registry.busy_until

    def pick(
        self,
        role: InstanceRole,
        request: RequestContext,
        *,
        count: int = 1,
        exclude: Collection[Endpoint] = (),
    ) -> list[Endpoint]:
        """Return up to ``count`` endpoints of ``role``, best first; empty when none can serve.

        Saturated ones are left out as long as there are others.
        """
        candidates = self._unsaturated(role, exclude, request.now)
        if not candidates:
            return []
        request.look_up_in(self.registry.prefixes)
        return self._strategies[role].rank(candidates, request, count)

    def last_resorts(self, role: InstanceRole, exclude: Collection[Endpoint]) -> list[Endpoint]:
        """Return others of ``role`` that are alive, for a request that those of ``exclude`` have failed.

        First what ``pick`` passes over while there is better (saturated, on trial), then what it never
        returns: ejected ones. Any may answer, where to try none is sure to fail.
        """
        routable = (e for e in self.registry.routable(role) if e not in exclude)
        ejected = (e for e in self.registry.ejected(role) if e not in exclude)
        others = [*itertools.islice(routable, _LOOK_AT), *ejected]
        return sorted(others, key=lambda e: (e.ejected, e.on_trial, e.requests))

    def decided(
        self,
        role: InstanceRole,
        request: RequestContext,
        picked: Endpoint,
        exclude: Collection[Endpoint] = (),
    ) -> None:
        """Take that the pick just made counts, before it is reserved: the shadow is asked the same."""
        if self.shadow is not None:
            self.shadow.compare(role, self._unsaturated(role, exclude, request.now), request, picked)

    def preview(self, role: InstanceRole, request: RequestContext, *, count: int = 1) -> list[Endpoint]:
        """Return what ``pick`` would, when nothing will be sent there for it: nobody's turn has passed."""
        strategy = self._strategies[role]
        with strategy.same_turn():
            return self.pick(role, request, count=count)

    def _unsaturated(
        self, role: InstanceRole, exclude: Collection[Endpoint], now: float
    ) -> Sequence[Endpoint]:
        candidates = self._candidates(role, exclude)
        if self._may_be_saturated(now):
            candidates = tuple(e for e in candidates if not self.saturated(e, now)) or candidates
        return candidates

    def _candidates(self, role: InstanceRole, exclude: Collection[Endpoint]) -> Sequence[Endpoint]:
        candidates: Sequence[Endpoint] = self.registry.routable(role)
        if exclude:
            candidates = tuple(e for e in candidates if e not in exclude)
        if self.registry.trials:
            # Its one trial request runs. Only if there is nobody else does it get another.
            candidates = tuple(e for e in candidates if not e.on_trial) or candidates
        return candidates


def _waiting(endpoint: Endpoint) -> float:
    """Requests queued there. A decode instance runs at once what it has room for.

    So what was sent there since the last scrape counts only if others had to wait then.
    """
    if endpoint.instance.role is InstanceRole.DECODE and not (endpoint.metrics and endpoint.metrics.waiting):
        return 0.0
    return endpoint.waiting


def _kv_usage(endpoint: Endpoint) -> float:
    """Share of the KV cache in use: as scraped, or by what has been sent since if that is more."""
    if not endpoint.kv_capacity:
        return endpoint.kv_usage
    return max(endpoint.kv_usage, endpoint.kv_tokens / endpoint.kv_capacity)
