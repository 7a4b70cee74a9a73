"""Says which instances get nothing as a fleet is configured, although each of them is right by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..config import SchedulerConfig, connector_choice
from ..models import PD_ROLES, InstanceRole, PDInstance
from .pairing import Kind, kind_of

_NAMED = 5


def misfits(config: SchedulerConfig, instances: Iterable[PDInstance]) -> list[str]:
    """Return a line for each revision with a weight that nobody has, and for P that fit no D.

    None of them is an error: in a roll-out one half comes before the other.
    """
    split = [each for each in instances if each.role in PD_ROLES]
    weights = {name: weight for name, weight in config.revisions.items() if weight}
    lines = list(_without_instances(weights, split))
    if weights:
        split = [each for each in split if (each.revision or "") in weights]
    fleet = connector_choice(config.connector).name
    kinds: dict[InstanceRole, dict[Kind, list[str]]] = {role: {} for role in PD_ROLES}
    for each in split:
        kinds[each.role].setdefault(kind_of(each, fleet), []).append(each.instance_id)
    prefill, decode = (kinds[role] for role in PD_ROLES)
    if not decode:
        return lines
    apart = any(revision for revision, _ in prefill.keys() | decode.keys())
    theirs = " or ".join(_described(kind, apart) for kind in decode)
    for kind, ids in prefill.items():
        if kind not in decode:
            lines.append(
                f"{_listed(ids)} can hand over to no decode instance, so nothing is prefilled there: P is of "
                f"{_described(kind, apart)}, D of {theirs}; they must be of the same"
            )
    return lines


def _without_instances(weights: dict[str, int], split: list[PDInstance]) -> Iterator[str]:
    decode = {each.revision or "" for each in split if each.role is InstanceRole.DECODE}
    if weights and decode and decode.isdisjoint(weights):
        yield (
            f"no decode instance has a revision to which revisions gives a weight ({_quoted(weights)}), so "
            f"clients get 503: they have {_quoted(decode)}. One without a revision has the empty name"
        )
    elif weights and decode:
        for name in weights.keys() - {each.revision or "" for each in split}:
            yield f"no instance has the revision {name!r}, which has a weight: its share goes to the others"


def _described(kind: Kind, apart: bool) -> str:
    revision, connector = kind
    told = f"the connector {'auto or nixl' if connector == 'nixl' else connector}"
    if not apart:
        return told
    return told + (f" and the revision {revision!r}" if revision else " and no revision")


def _listed(ids: list[str]) -> str:
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(ids[:_NAMED]) + more


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))
