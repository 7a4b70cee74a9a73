"""What the admin interface changed, as a value. ``difference`` finds it out, and ``moves.py`` makes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ..config import InstanceConfig, SchedulerConfig
from ..models import InstanceRole, PDInstance
from ..router import PDRouter


class SavedInstance(InstanceConfig):
    """An instance and its role. Of an API key it has the place where it is kept, never the key."""

    role: InstanceRole

    @classmethod
    def of(cls, instance: PDInstance) -> SavedInstance:
        """Return an instance without what it is spoken with."""
        return cls(id=instance.instance_id, role=instance.role, host=instance.host, port=instance.port)

    def is_at(self, instance: PDInstance) -> bool:
        """Whether that is this instance: the same id, role and address."""
        mine = (self.id, self.role, self.host, self.port)
        return mine == (instance.instance_id, instance.role, instance.host, instance.port)


class AdminState(BaseModel):
    """How a router differs from its configuration. A strategy is ``None`` when it does not.

    ``strategy`` is that of both roles. An instance of the configuration that was replaced is in both
    ``removed`` and ``added``.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    version: Literal[1]
    strategy: str | None = None
    prefill_strategy: str | None = None
    decode_strategy: str | None = None
    shadow_strategy: str | None = None
    """Empty: the configuration has one, and it is not used."""
    removed: list[SavedInstance] = []
    added: list[SavedInstance] = []
    drained: list[str] = []


@dataclass(slots=True)
class Steered:
    """All of a router that the admin interface can change."""

    strategies: dict[InstanceRole, str]
    shadow: str | None
    draining: dict[str, bool]
    """Whether each instance drains, by id."""
    added: dict[str, SavedInstance]
    """What the admin interface added, by id."""
    removed: list[PDInstance]
    """What it removed, and some source still names."""
    named: set[str]
    """Ids of what others name."""
    away: list[str]
    """Ids of instances that drain if they come back."""

    @classmethod
    def of(cls, router: PDRouter, added: Iterable[SavedInstance]) -> Steered:
        """Return what a router is steered to now."""
        shadow = router.scheduler.strategies.shadow
        return cls(
            dict(router.scheduler.strategies.names),
            shadow.name if shadow else None,
            {
                each.instance_id: router.membership.drained(each.instance_id)
                for each in router.get_instances()
            },
            {item.id: item for item in added},
            router.membership.removed(),
            set(router.membership.named()),
            router.membership.drained_and_away(),
        )


AS_CONFIGURED = AdminState(version=1)
"""Nothing was changed."""


def difference(steered: Steered, config: SchedulerConfig) -> AdminState:
    """Return how a router differs from its configuration."""
    configured = {item.id: item for item in _configured(config)}
    new = {
        item.id: item
        for item in steered.added.values()
        if item.id in steered.draining and item != configured.get(item.id)
    }
    gone = {key: configured[key] for key in new if key in configured}
    gone |= {each.instance_id: SavedInstance.of(each) for each in steered.removed}
    known = steered.named | new.keys()
    return AdminState(
        version=1,
        **_strategies(steered, config),
        removed=[item.model_copy(update={"api_key": None}) for item in gone.values()],
        added=list(new.values()),
        drained=[
            *(name for name, drains in steered.draining.items() if drains and name in known),
            *steered.away,
        ],
    )


def _strategies(steered: Steered, config: SchedulerConfig) -> dict[str, str]:
    """Return the keys of a state in which a router's strategies differ from the configuration's."""
    names = steered.strategies
    changed = {role: name for role, name in names.items() if name != config.strategy_of(role)}
    if len(changed) == len(names) and len(set(changed.values())) == 1:
        found = {"strategy": next(iter(changed.values()))}
    else:
        found = {f"{role}_strategy": name for role, name in changed.items()}
    shadow = steered.shadow
    return found if shadow == config.shadow_strategy else {**found, "shadow_strategy": shadow or ""}


def _configured(config: SchedulerConfig) -> list[SavedInstance]:
    return [SavedInstance(role=role, **dict(item)) for role, _, item in config.listed()]


def summary(state: AdminState) -> str:
    """Return a line for people."""
    lists = {"removed": [i.id for i in state.removed], "added": [i.id for i in state.added]}
    lists["drained"] = state.drained
    keys = ("strategy", "prefill_strategy", "decode_strategy", "shadow_strategy")
    parts = [f"{key} {name or 'none'}" for key in keys if (name := getattr(state, key)) is not None]
    parts += [f"{name} {', '.join(ids)}" for name, ids in lists.items() if ids]
    return "; ".join(parts) or "no changes"
