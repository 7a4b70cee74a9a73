"""KV hand-off protocols: each makes the bodies of the prefill and the decode request from the client's."""

from .ascend_layerwise import AscendLayerwiseConnector
from .ascend_mooncake import AscendMooncakeConnector
from .attempt import Attempt
from .auto import AutoConnector
from .base import Connector, Handoff, Legs, Order, Peer, Question, Settings, Splice
from .fence import ConnectorFailed, ConnectorFence
from .in_use import Connectors
from .mooncake import MooncakeConnector
from .moriio import MoriioConnector
from .names import UnknownConnector, connector_names, load_connector, make_connector, settings_of
from .nixl import NixlConnector
from .nixl_push import NixlPushConnector
from .offloading_p2p import OffloadingP2pConnector
from .shared_store import SharedStoreConnector

__all__ = [
    "AscendLayerwiseConnector", "AscendMooncakeConnector", "Attempt", "AutoConnector", "Connector",
    "ConnectorFailed", "ConnectorFence", "Connectors", "Handoff", "Legs", "MooncakeConnector",
    "MoriioConnector", "NixlConnector", "NixlPushConnector", "OffloadingP2pConnector", "Order", "Peer",
    "Question", "Settings",
    "SharedStoreConnector", "Splice", "UnknownConnector", "connector_names", "load_connector",
    "make_connector", "settings_of",
]  # fmt: skip
