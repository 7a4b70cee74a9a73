"""How a router gets from one state that operators want to another: at the start, and as other replicas do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import partial

from ..fleet.registry import DuplicateInstance, UnknownInstance
from ..models import PD_ROLES, InstanceRole, PDInstance, join_address
from ..router import PDRouter
from ..strategies import UnknownStrategy
from .saved_changes import AdminState, SavedInstance


def move(
    before: AdminState, after: AdminState, router: PDRouter, by: str
) -> tuple[list[SavedInstance], list[str]]:
    """Make what differs between two states; return what was added, and a line for all that was skipped.

    Skipped is what the configuration has overtaken since, or what cannot be done any more. No I/O is done but
    to read an API key from where it is kept.
    """
    problems = _use(before, after, router)
    _take_away(_only(before.added, after.added), router, by)
    problems += _remove(_only(after.removed, before.removed), router, by)
    _bring_back(_only(before.removed, after.removed), router, by)
    added, failed = _add(_only(after.added, before.added), router, by)
    problems += failed
    _undrain(sorted(set(before.drained) - set(after.drained)), router, by)
    problems += _drain([each for each in after.drained if each not in before.drained], router, by)
    return added, problems


def patch(base: AdminState, before: AdminState, after: AdminState) -> AdminState:
    """Return ``base`` with what differs between two other states, which are one replica's own.

    So its change keeps what it does not know: instances that it has not discovered, say.
    """
    strategies = {
        role: _strategy(base if _strategy(after, role) == _strategy(before, role) else after, role)
        for role in PD_ROLES
    }
    prefill, decode = (strategies[role] for role in PD_ROLES)
    same_shadow = after.shadow_strategy == before.shadow_strategy
    return AdminState(
        version=1,
        strategy=prefill if prefill == decode else None,
        prefill_strategy=None if prefill == decode else prefill,
        decode_strategy=None if prefill == decode else decode,
        shadow_strategy=(base if same_shadow else after).shadow_strategy,
        removed=_patched(base.removed, before.removed, after.removed),
        added=_patched(base.added, before.added, after.added),
        drained=sorted(set(base.drained) - set(before.drained) | set(after.drained)),
    )


def _patched(
    base: Iterable[SavedInstance], before: Iterable[SavedInstance], after: Iterable[SavedInstance]
) -> list[SavedInstance]:
    found = {_place(each): each for each in base}
    for each in before:
        found.pop(_place(each), None)
    return list((found | {_place(each): each for each in after}).values())


def _place(item: SavedInstance) -> tuple[str, InstanceRole, str, int]:
    return item.id, item.role, item.host, item.port


def _only(these: Iterable[SavedInstance], those: list[SavedInstance]) -> list[SavedInstance]:
    return [each for each in these if each not in those]


# -- strategies


def _strategy(state: AdminState, role: InstanceRole) -> str | None:
    """Return a role's strategy; ``None`` if it is as configured."""
    own = state.prefill_strategy if role is InstanceRole.PREFILL else state.decode_strategy
    return own or state.strategy


def _use(before: AdminState, after: AdminState, router: PDRouter) -> list[str]:
    config, scheduler = router.config, router.scheduler
    names = {
        role: _strategy(after, role) or config.strategy_of(role)
        for role in PD_ROLES
        if _strategy(after, role) != _strategy(before, role)
    }
    problems = []
    if len(names) == len(PD_ROLES) and len(set(names.values())) == 1:
        name = next(iter(names.values()))
        problems += _try("strategy", name, router, lambda: scheduler.strategies.use(name))
    else:
        for role, each in names.items():
            problems += _try(f"{role}_strategy", each, router, partial(scheduler.strategies.use, each, role))
    if after.shadow_strategy != before.shadow_strategy:
        shadow = config.shadow_strategy if after.shadow_strategy is None else after.shadow_strategy or None
        problems += _try("shadow_strategy", shadow, router, lambda: scheduler.strategies.use_shadow(shadow))
    return problems


def _try(key: str, name: str | None, router: PDRouter, change: Callable[[], None]) -> list[str]:
    if name is not None and not router.config.may_use(name):
        return [f"{key}: {name!r} can be used only if the configuration names it"]
    try:
        change()
    except UnknownStrategy as error:
        return [f"{key}: {error}"]
    return []


# -- instances


def _may_come(router: PDRouter) -> bool:
    """Whether sources can name instances that are not there now."""
    return bool(router.config.instance_files or router.config.discovery)


def _take_away(dropped: Iterable[SavedInstance], router: PDRouter, by: str) -> None:
    """Have what was added no more."""
    for item in dropped:
        with contextlib.suppress(UnknownInstance):
            if item.is_at(router.registry.get(item.id).instance):
                router.unregister_instance(item.id, by)


def _remove(removed: Iterable[SavedInstance], router: PDRouter, by: str) -> list[str]:
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
            router.unregister_instance(item.id, by)
        else:
            problems.append(f"removed: {item.id!r} is {_where(instance)} now: it stays")
    return problems


def _bring_back(back: Iterable[SavedInstance], router: PDRouter, by: str) -> None:
    """Have what was removed, and a source still names, again."""
    hidden = router.membership.removed()
    for item in back:
        for instance in filter(item.is_at, hidden):
            router.register_instance(instance, by)


def _add(added: Iterable[SavedInstance], router: PDRouter, by: str) -> tuple[list[SavedInstance], list[str]]:
    done, problems = [], []
    present = {instance.instance_id: instance for instance in router.get_instances()}
    for item in added:
        if item.id in present and item.is_at(present[item.id]):
            continue  # the configuration has it by now
        try:
            router.register_instance(router.config.instance(item.role, item), by)
            done.append(item)
        except DuplicateInstance as error:
            problems.append(f"added: {item.id!r} at {join_address(item.host, item.port)}: {error}")
        except ValueError as error:
            problems.append(f"added: {item.id!r}: {error}")
    return done, problems


def _drain(names: Iterable[str], router: PDRouter, by: str) -> list[str]:
    problems = []
    for name in names:
        try:
            router.drain_instance(name, by)
        except UnknownInstance as error:
            if _may_come(router):
                router.membership.remember([name], [])
            else:
                problems.append(f"drained: {error}")
    return problems


def _undrain(names: Iterable[str], router: PDRouter, by: str) -> None:
    for name in names:
        with contextlib.suppress(UnknownInstance):  # it was removed, or has not come yet
            router.undrain_instance(name, by)


def _where(instance: PDInstance) -> str:
    return f"the {instance.role} instance {join_address(instance.host, instance.port)}"
