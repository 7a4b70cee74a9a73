"""Filter, score, pick: who could serve, and who should."""

from __future__ import annotations

from collections.abc import Collection

from .config import SchedulerConfig
from .models import InstanceRole, RequestContext
from .registry import Endpoint, Registry
from .strategies import Strategy, load_strategy


class Scheduler:
    """Picks endpoints of a registry by a strategy that can be changed while requests run."""

    def __init__(self, config: SchedulerConfig, registry: Registry) -> None:
        self.config = config
        self.registry = registry
        self.strategy_name = ""
        self._strategies: dict[InstanceRole, Strategy] = {}
        self.use(config.strategy)

    def use(self, name: str) -> None:
        """Change the strategy; the next pick uses it.

        Raises :exc:`~vllm_pd_scheduler.strategies.UnknownStrategy` and keeps the old one.
        """
        strategy = load_strategy(name)
        self._strategies = {role: strategy(self.config) for role in InstanceRole}
        self.strategy_name = name

    def pick(
        self,
        role: InstanceRole,
        request: RequestContext,
        *,
        count: int = 1,
        exclude: Collection[Endpoint] = (),
    ) -> list[Endpoint]:
        """Return up to ``count`` endpoints of ``role``, best first; empty when none can serve."""
        candidates = self.registry.routable(role)
        if exclude:
            candidates = tuple(e for e in candidates if e not in exclude)
        if any(e.on_trial for e in candidates):
            # Its one trial request runs. Only if there is nobody else does it get another.
            candidates = tuple(e for e in candidates if not e.on_trial) or candidates
        if not candidates:
            return []
        return self._strategies[role].rank(candidates, request, count)
