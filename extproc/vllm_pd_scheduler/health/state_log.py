"""Say every change of an instance's state, whoever causes it: a probe, a request, an operator."""

from __future__ import annotations

import logging
from typing import NamedTuple

from ..fleet.condition import EJECTED, TRIAL, reason, told_state
from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import InstanceState, join_address
from ..records.events import EventKind, Events
from ..telemetry.metrics import Telemetry

_BAD = frozenset({InstanceState.UNHEALTHY.value, EJECTED})


class _Seen(NamedTuple):
    """What is told of an endpoint when it changes."""

    state: str
    address: str | None
    generation: int
    drained: bool
    speaks: str


class StateLog:
    """Counts the changes in a registry from now on, and makes an event of each."""

    def __init__(self, registry: Registry, telemetry: Telemetry, events: Events) -> None:
        self._registry = registry
        self._telemetry = telemetry
        self._events = events
        self._seen = self._see()
        registry.changes.subscribe(self._look)

    def _look(self) -> None:
        if self._registry.changes.of is None:
            self._look_at_all()
        else:
            self._look_at(self._registry.changes.of)

    def _look_at(self, changed: Endpoint) -> None:
        ranks = self._registry.ranks_of(changed)
        endpoint, last = ranks[0], self._seen.get(ranks[0])
        if endpoint in self._registry:
            now = self._seen[endpoint] = _seen(ranks)
            self._compare(endpoint, last, now)
        elif last is not None:
            del self._seen[endpoint]
            self._add(endpoint, "was removed")

    def _look_at_all(self) -> None:
        before = self._seen
        self._seen = self._see()
        for endpoint in [each for each in before if each not in self._seen]:
            self._add(endpoint, "was removed")
        for endpoint, now in list(self._seen.items()):
            self._compare(endpoint, before.get(endpoint), now)

    def _compare(self, endpoint: Endpoint, last: _Seen | None, now: _Seen) -> None:
        if last is None:
            self._add(endpoint, f"was added: {_place(endpoint)}")
        elif last != now:
            self._tell(endpoint, last, now)

    def _see(self) -> dict[Endpoint, _Seen]:
        """Return what there is to tell of each instance, by its first endpoint."""
        return {ranks[0]: _seen(ranks) for ranks in self._registry.instances()}

    def _tell(self, endpoint: Endpoint, last: _Seen, now: _Seen) -> None:
        if last.generation != now.generation:
            self._add(endpoint, "was restarted", logging.WARNING)
        if last.address is None and now.address is not None:
            self._add(endpoint, f"is at {now.address}")
        elif last.address != now.address:
            self._add(endpoint, f"is at {now.address}, no longer at {last.address}")
        if last.state != now.state:
            self._tell_state(endpoint, last.state, now.state)
        if now.speaks and last.speaks != now.speaks:
            self._add(endpoint, f"hands over by {now.speaks}, as its answer shows")
        if now.drained and not last.drained:
            self._add(endpoint, "is drained: nothing that was sent there is left")

    def _tell_state(self, endpoint: Endpoint, last: str, now: str) -> None:
        self._telemetry.instances.state_changed(endpoint.instance.instance_id, endpoint.instance.role, now)
        trial = now == TRIAL
        # An ejection that a trial follows at once, since no other can serve, is told by this one line.
        bad = now in _BAD or (trial and last != EJECTED)
        text = f"is {'on trial' if trial else now}"
        if (bad or trial) and reason(endpoint):
            text += f": {reason(endpoint).removeprefix(f'{now}: ')}"
        self._add(endpoint, text, logging.WARNING if bad else logging.INFO)

    def _add(self, endpoint: Endpoint, what: str, level: int = logging.INFO) -> None:
        name = endpoint.instance.instance_id
        self._events.add(
            EventKind.STATE,
            f"{name} {what}",
            by=self._registry.changes.by,
            subject=name,
            level=level,
        )


def _place(endpoint: Endpoint) -> str:
    instance = endpoint.instance
    return f"{instance.role}, {join_address(instance.host, instance.port)}"


def _seen(ranks: tuple[Endpoint, ...]) -> _Seen:
    first, drained = ranks[0], all(each.drained for each in ranks)
    speaks = next((each.spoken.protocol for each in ranks if each.spoken.protocol), "")
    return _Seen(told_state(first), first.address, first.generation, drained, speaks)
