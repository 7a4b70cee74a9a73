"""What the admin interface changed, as a value and in a file, so that a restart does not lose it.

``difference`` and ``apply`` are each other's inverse and do no I/O but to read an API key from where it is
kept; ``read_state`` and ``write_state`` are the file.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..config import InstanceConfig, SchedulerConfig, describe_error
from ..fleet.registry import DuplicateInstance, UnknownInstance
from ..models import InstanceRole, PDInstance, join_address
from ..router import PDRouter
from ..strategies import UnknownStrategy


class StateError(ValueError):
    """A state file cannot be used; the message says why."""


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
        shadow = router.scheduler.shadow
        return cls(
            dict(router.scheduler.names),
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


def apply(state: AdminState, router: PDRouter) -> tuple[list[SavedInstance], list[str]]:
    """Change a router that is as configured; return what was added, and a line for all that was skipped.

    Skipped is what the configuration has overtaken since, or what cannot be done any more.
    """
    problems = _use(state, router) + _remove(state.removed, router)
    added, failed = _add(state.added, router)
    problems += failed
    for name in state.drained:
        try:
            router.drain_instance(name)
        except UnknownInstance as error:
            if _may_come(router):
                router.membership.remember([name], [])
            else:
                problems.append(f"drained: {error}")
    return added, problems


def _may_come(router: PDRouter) -> bool:
    """Whether sources can name instances that are not there now."""
    return bool(router.config.instance_files or router.config.discovery)


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


def _use(state: AdminState, router: PDRouter) -> list[str]:
    problems = []
    use, use_shadow = router.scheduler.use, router.scheduler.use_shadow
    wanted: list[tuple[str, str | None, Callable[[str], None]]] = [
        ("strategy", state.strategy, use),
        ("prefill_strategy", state.prefill_strategy, partial(use, role=InstanceRole.PREFILL)),
        ("decode_strategy", state.decode_strategy, partial(use, role=InstanceRole.DECODE)),
        ("shadow_strategy", state.shadow_strategy, lambda name: use_shadow(name or None)),
    ]
    for key, name, change in wanted:
        if name is None:
            continue
        if not router.config.may_use(name):
            problems.append(f"{key}: {name!r} can be used only if the configuration names it")
            continue
        try:
            change(name)
        except UnknownStrategy as error:
            problems.append(f"{key}: {error}")
    return problems


def _remove(removed: list[SavedInstance], router: PDRouter) -> list[str]:
    problems = []
    for item in removed:
        try:
            instance = router.registry.get(item.id).instance
        except UnknownInstance:
            if _may_come(router):
                gone = PDInstance(item.id, item.role, item.host, item.port)
                router.membership.remember([], [gone])
            continue  # else it is not in the configuration any more either
        if item.is_at(instance):
            router.unregister_instance(item.id)
        else:
            problems.append(f"removed: {item.id!r} is {_where(instance)} now: it stays")
    return problems


def _add(added: list[SavedInstance], router: PDRouter) -> tuple[list[SavedInstance], list[str]]:
    done, problems = [], []
    present = {instance.instance_id: instance for instance in router.get_instances()}
    for item in added:
        if item.id in present and item.is_at(present[item.id]):
            continue  # the configuration has it by now
        try:
            router.register_instance(router.config.instance(item.role, item))
            done.append(item)
        except DuplicateInstance as error:
            problems.append(f"added: {item.id!r} at {join_address(item.host, item.port)}: {error}")
        except ValueError as error:
            problems.append(f"added: {item.id!r}: {error}")
    return done, problems


def _where(instance: PDInstance) -> str:
    return f"the {instance.role} instance {join_address(instance.host, instance.port)}"


def _configured(config: SchedulerConfig) -> list[SavedInstance]:
    return [SavedInstance(role=role, **dict(item)) for role, _, item in config.listed()]


def read_state(path: Path) -> AdminState | None:
    """Return what a file holds, ``None`` if there is no file; raises :exc:`StateError`."""
    try:
        return AdminState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise StateError("; ".join(map(describe_error, error.errors(include_url=False)))) from None


def write_state(path: Path, state: AdminState) -> None:
    """Replace a file at once and for good, readable by its owner only; raises :exc:`OSError`."""
    text = state.model_dump_json(indent=2, exclude_none=True) + "\n"
    new = path.with_name(f".{path.name}.new")
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)  # of a write that was killed
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(handle)
            os.replace(new, path)
        except BaseException:
            os.unlink(new)
            raise
        _sync(directory)
    finally:
        os.close(directory)


def _sync(directory: int) -> None:
    """Write a directory's entries to the disk: else a power failure brings the file before back."""
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing
            raise


def summary(state: AdminState) -> str:
    """Return a line for people."""
    lists = {"removed": [i.id for i in state.removed], "added": [i.id for i in state.added]}
    lists["drained"] = state.drained
    keys = ("strategy", "prefill_strategy", "decode_strategy", "shadow_strategy")
    parts = [f"{key} {name or 'none'}" for key in keys if (name := getattr(state, key)) is not None]
    parts += [f"{name} {', '.join(ids)}" for name, ids in lists.items() if ids]
    return "; ".join(parts) or "no changes"
