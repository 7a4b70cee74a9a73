"""KV hand-off protocols: bodies in, bodies out."""

from .base import Connector, Handoff
from .nixl import NixlConnector

__all__ = ["Connector", "Handoff", "NixlConnector"]
