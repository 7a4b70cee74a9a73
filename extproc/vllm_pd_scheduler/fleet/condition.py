"""The condition of an endpoint, in words for metrics, logs and people."""

from __future__ import annotations

from ..models import InstanceState
from .breaker import BreakerState
from .endpoint import Endpoint

EJECTED = "ejected"
"""Shown in place of "unhealthy" for an instance that is alive, and out only because requests to it failed."""

TRIAL = "trial"
"""Beside the states: healthy, but ejected until now, and about to show whether it can serve."""


def shown_state(endpoint: Endpoint) -> str:
    """Return the state for metrics and logs, which also tell who is ``ejected``."""
    return EJECTED if endpoint.ejected else endpoint.state.value


def told_state(endpoint: Endpoint) -> str:
    """Return the state for people, who are also told of a ``trial``."""
    shown = shown_state(endpoint)
    if shown == InstanceState.HEALTHY and endpoint.breaker.state is BreakerState.HALF_OPEN:
        return TRIAL
    return shown


def reason(endpoint: Endpoint) -> str:
    """Return why it does not serve as it should; empty if nothing is known to be wrong."""
    probes = endpoint.probes
    if (
        probes.healthy is False
        or endpoint.breaker.state is BreakerState.CLOSED
        or not endpoint.breaker.reason
    ):
        return probes.problem
    return f"ejected: {endpoint.breaker.reason}"
