"""What may be an instance: a port of a pod or of an endpoint, in one role."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...config import InstanceConfig, SchedulerConfig
from ...models import InstanceRole, PDInstance, canonical_ip, join_address

log = logging.getLogger(__name__)

_LONGEST_ID = 128
_MOST_LOGGED = 5
"""Reasons that are logged at once: a mistake may concern each of a thousand pods in its own words."""


class LeftOut(Exception):
    """Something is no instance, though it should be one. The text, which says why, has no name in it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A server in one role."""

    role: InstanceRole
    name: str
    """Its id, unless it has both roles."""
    host: str
    port: int
    since: str = ""
    """When what it runs in was made: of two at one address the newer one is there."""
    model: str | None = None
    revision: str | None = None
    data_parallel_size: int = 1


class Candidates:
    """Makes instances of candidates: the same ones again as long as nothing about them changes."""

    def __init__(self, source: str, config: SchedulerConfig) -> None:
        self._source = source
        self._config = config
        self._made: dict[tuple[str, Candidate], PDInstance] = {}
        self._logged: set[str] = set()

    def instances(
        self, candidates: Iterable[Candidate], left_out: Mapping[str, Iterable[str]]
    ) -> list[PDInstance]:
        """Return the instances, one for each address in a role.

        A server with both roles is two. Of what is ``left_out``, and of which names, each reason is logged
        once.
        """
        reasons = defaultdict(list, {why: list(names) for why, names in left_out.items()})
        found = _one_for_each_address(candidates, reasons)
        decodes = {each.name for each in found if each.role is InstanceRole.DECODE}
        made: dict[tuple[str, Candidate], PDInstance] = {}
        for each in found:
            both = each.role is InstanceRole.PREFILL and each.name in decodes
            key = (_id(each.name, ".prefill" if both else ""), each)
            try:
                made[key] = self._made.get(key) or self._make(*key)
            except ValueError as error:
                reasons[str(error)].append(each.name)
        self._made = made
        self._log(reasons)
        return list(made.values())

    def _make(self, instance_id: str, candidate: Candidate) -> PDInstance:
        if canonical_ip(candidate.host) is None:
            raise ValueError(f"{candidate.host!r} is no address that a server has")
        item = InstanceConfig(
            id=instance_id,
            host=candidate.host,
            port=candidate.port,
            models=None if candidate.model is None else [candidate.model],
            revision=candidate.revision,
            data_parallel_size=candidate.data_parallel_size,
        )
        return self._config.instance(candidate.role, item)

    def _log(self, reasons: Mapping[str, list[str]]) -> None:
        new = [why for why in reasons if why not in self._logged]
        for why in new[:_MOST_LOGGED]:
            names = sorted(reasons[why])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            log.warning("%s: %s%s left out: %s", self._source, ", ".join(names[:3]), more, why)
        if len(new) > _MOST_LOGGED:
            log.warning("%s: %d more are left out for like reasons", self._source, len(new) - _MOST_LOGGED)
        self._logged = set(reasons)


def _one_for_each_address(candidates: Iterable[Candidate], reasons: dict[str, list[str]]) -> list[Candidate]:
    """Return the candidates without those at whose address a newer one is: they cannot be there too."""
    everyone = list(candidates)
    newest: dict[tuple[str, int], Candidate] = {}
    for each in everyone:
        other = newest.setdefault((each.host, each.port), each)
        if (other.since, other.name) < (each.since, each.name):
            newest[each.host, each.port] = each
    found: list[Candidate] = []
    for each in everyone:
        there = newest[each.host, each.port].name
        if each.name == there:
            found.append(each)
        else:
            address = join_address(each.host, each.port)
            reasons[f"{address} is also the address of {there}, which is newer"].append(each.name)
    return found


def _id(name: str, suffix: str) -> str:
    """Return an id for a name: that of a pod may be longer than one can be."""
    if len(name) + len(suffix) <= _LONGEST_ID:
        return name + suffix
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name[: _LONGEST_ID - len(suffix) - 13]}-{digest}{suffix}"
