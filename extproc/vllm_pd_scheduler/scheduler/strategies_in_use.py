"""Which strategies rank for which role, and the one that is compared with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from ..config import SchedulerConfig
from ..models import PD_ROLES, InstanceRole
from ..strategies import Strategy, make_strategy
from ..telemetry.failures import Failures
from .fence import StrategyFence
from .shadow import Shadow


class StrategiesInUse:
    """A strategy for each role, as ``config`` names them; each can be changed while requests run.

    ``seed`` makes choices at random repeatable.
    """

    def __init__(self, config: SchedulerConfig, seed: int | None = None) -> None:
        self.names: dict[InstanceRole, str] = {}
        """Name of the strategy in use, by role."""
        self.shadow: Shadow | None = None
        """A second strategy, which is compared with the one in use and never followed."""
        self.failures = Failures("strategy %s failed for %s", "least_load serves its requests")
        """Failures of the strategies in use, by name and role."""
        self._config = config
        self._seed = seed
        self._by_role: dict[InstanceRole, StrategyFence] = {}
        self.use_each({role: config.strategy_of(role) for role in PD_ROLES})
        self.use_shadow(config.shadow_strategy)

    def of(self, role: InstanceRole) -> StrategyFence:
        """Return the strategy in use for a role, in its fence."""
        return self._by_role[role]

    @property
    def name(self) -> str:
        """The strategy's name, or both if the roles differ: ``prefill_name/decode_name``."""
        return "/".join(dict.fromkeys(self.names.values()))

    @property
    def reads_prefixes(self) -> bool:
        """Whether one of them, or the shadow, reads ``request.cached``."""
        return any(each.reads_prefixes for each in self._by_role.values()) or (
            self.shadow is not None and self.shadow.reads_prefixes
        )

    def use(self, name: str, role: InstanceRole | None = None) -> None:
        """Change the strategy of one role or, without ``role``, of both, from the next pick on.

        Raise :exc:`~vllm_pd_scheduler.strategies.UnknownStrategy` and change nothing if the name cannot be
        used.
        """
        self.use_each(dict.fromkeys(PD_ROLES if role is None else (role,), name))

    def use_each(self, names: Mapping[InstanceRole, str]) -> None:
        """Change the strategies of several roles, or none if one name cannot be used; raise as ``use``."""
        self.prepare(names)()

    def use_shadow(self, name: str | None) -> None:
        """Start a new comparison with a shadow strategy, or end it with ``None``; raise as ``use``."""
        self.prepare_shadow(name)()

    def prepare(self, names: Mapping[InstanceRole, str]) -> Callable[[], None]:
        """Make the strategies for :meth:`use_each`; return what puts them in use. Raise as ``use``."""
        made = {role: make_strategy(name, self._config) for role, name in names.items()}

        def put() -> None:
            for role, strategy in made.items():
                self._set(strategy, role, names[role])

        return put

    def prepare_shadow(self, name: str | None) -> Callable[[], None]:
        """Make the strategy for :meth:`use_shadow`; return what puts it in use. Raise as ``use``."""
        shadow = None if name is None else Shadow(name, self._config)

        def put() -> None:
            self.shadow = shadow

        return put

    def install(self, strategy: type[Strategy], role: InstanceRole, name: str) -> None:
        """Use a strategy class that cannot be loaded by name; ``name`` is only shown."""
        self._set(strategy(self._config), role, name)

    def _set(self, strategy: Strategy, role: InstanceRole, name: str) -> None:
        self.failures.expect(name, role.value)
        fence = StrategyFence(strategy, partial(self.failures.add, name, role.value, strategy))
        if self._seed is not None:
            fence.seed(self._seed)
        self._by_role[role], self.names[role] = fence, name
