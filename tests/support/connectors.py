"""Attempts to split a request, for tests that choose no P."""

from vllm_pd_scheduler.connectors import (
    Attempt,
    Connector,
    ConnectorFence,
    Legs,
    NixlConnector,
    Peer,
    Settings,
)

PEER = Peer("p0", "10.0.0.1", 8000, Settings())
LEGS = Legs("run-0", PEER)


def attempt(connector: Connector | None = None, legs: Legs = LEGS) -> Attempt:
    """One by a connector, NIXL if none is given."""
    return Attempt(ConnectorFence(connector or NixlConnector()), legs)
