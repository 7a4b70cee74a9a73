"""Attempts to split a request, for tests that choose no P."""

from typing import get_args

from vllm_pd_scheduler.connectors import (
    Attempt,
    Connector,
    ConnectorFence,
    Legs,
    NixlConnector,
    Peer,
    Settings,
)
from vllm_pd_scheduler.sim.options import KvConnector

PROTOCOLS = tuple(name for name in get_args(KvConnector) if name != "none")
"""The hand-off protocols that a simulated fleet can speak."""
WAITS_FOR_THE_DEAD = frozenset({"mooncake", "nixl-push"})
"""Those in which a D waits for a P that has ended, with a stream begun and no token in it."""
PEER = Peer("p0", "10.0.0.1", 8000, Settings())
LEGS = Legs("run-0", PEER)


def attempt(connector: Connector | None = None, legs: Legs = LEGS) -> Attempt:
    """One by a connector, NIXL if none is given."""
    return Attempt(ConnectorFence(connector or NixlConnector()), legs)
