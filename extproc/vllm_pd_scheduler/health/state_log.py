"""Say every change of an instance's state, whoever causes it: a probe, a request, an operator."""

from __future__ import annotations

import logging
from typing import NamedTuple

from ..fleet.endpoint import EJECTED, TRIAL, Endpoint
from ..fleet.registry import Registry
from ..models import InstanceState
from ..telemetry.metrics import Telemetry

log = logging.getLogger(__name__)

_BAD = frozenset({InstanceState.UNHEALTHY.value, EJECTED})


class _Seen(NamedTuple):
    """What is told of an endpoint when it changes."""

    state: str
    address: str | None
    generation: int


class StateLog:
    """Logs and counts the changes in a registry from now on: one line each, at the default level."""

    def __init__(self, registry: Registry, telemetry: Telemetry) -> None:
        self._registry = registry
        self._telemetry = telemetry
        self._seen: dict[Endpoint, _Seen] = {}
        self._look()
        registry.subscribe(self._look)

    def _look(self) -> None:
        before = self._seen
        self._seen = {endpoint: _seen(endpoint) for endpoint in self._registry}
        for endpoint, now in self._seen.items():
            last = before.get(endpoint)
            if last is not None and last != now:
                self._tell(endpoint, last, now)

    def _tell(self, endpoint: Endpoint, last: _Seen, now: _Seen) -> None:
        if last.generation != now.generation:
            log.warning("%s was restarted", endpoint.id)
        if last.address is None and now.address is not None:
            log.info("%s is at %s", endpoint.id, now.address)
        elif last.address != now.address:
            log.info("%s is at %s, no longer at %s", endpoint.id, now.address, last.address)
        if last.state == now.state:
            return
        self._telemetry.state_changed(endpoint.id, endpoint.instance.role, now.state)
        trial = now.state == TRIAL
        # An ejection that a trial follows at once, since no other can serve, is told by this one line.
        bad = now.state in _BAD or (trial and last.state != EJECTED)
        text = f"{endpoint.id} is {'on trial' if trial else now.state}"
        if (bad or trial) and endpoint.reason:
            text += f": {endpoint.reason.removeprefix(f'{now.state}: ')}"
        log.log(logging.WARNING if bad else logging.INFO, "%s", text)


def _seen(endpoint: Endpoint) -> _Seen:
    return _Seen(endpoint.told_state, endpoint.address, endpoint.generation)
