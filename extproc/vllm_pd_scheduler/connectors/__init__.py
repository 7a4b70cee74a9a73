"""KV hand-off protocols: each makes the bodies of the prefill and the decode request from the client's."""

from .base import Connector, Handoff
from .nixl import NixlConnector

__all__ = ["Connector", "Handoff", "NixlConnector"]
