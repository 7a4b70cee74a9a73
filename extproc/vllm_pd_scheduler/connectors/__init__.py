"""KV hand-off protocols: each makes the bodies of the prefill and the decode request from the client's."""

from .attempt import Attempt
from .auto import AutoConnector
from .base import Connector, Handoff, Legs, Peer, Settings, Splice
from .fence import ConnectorFailed, ConnectorFence
from .in_use import Connectors
from .names import UnknownConnector, connector_names, load_connector, settings_of
from .nixl import NixlConnector
from .nixl_push import NixlPushConnector
from .shared_store import SharedStoreConnector

__all__ = [
    "Attempt", "AutoConnector", "Connector", "ConnectorFailed", "ConnectorFence", "Connectors", "Handoff",
    "Legs", "NixlConnector", "NixlPushConnector", "Peer", "Settings", "SharedStoreConnector", "Splice",
    "UnknownConnector", "connector_names", "load_connector", "settings_of",
]  # fmt: skip
