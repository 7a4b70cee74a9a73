"""KV hand-off protocols: each makes the bodies of the prefill and the decode request from the client's."""

from .base import Connector, Handoff, Splice
from .fence import ConnectorFailed, ConnectorFence
from .nixl import NixlConnector

__all__ = ["Connector", "ConnectorFailed", "ConnectorFence", "Handoff", "NixlConnector", "Splice"]
