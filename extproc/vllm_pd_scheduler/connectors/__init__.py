"""KV hand-off protocols: each makes the bodies of the prefill and the decode request from the client's."""

from .ascend_layerwise import AscendLayerwiseConnector
from .ascend_mooncake import AscendMooncakeConnector
from .attempt import Attempt
from .auto import AutoConnector
from .base import Abort, Connector, Handoff, Legs, Order, Peer, Question, Settings, Splice, Switch
from .fence import ConnectorFailed, ConnectorFence
from .in_use import Connectors
from .mooncake import MooncakeConnector
from .moriio import MoriioConnector
from .names import (
    UnknownConnector,
    connector_names,
    load_connector,
    make_connector,
    settings_of,
    takes_ranks,
)
from .nixl import NixlConnector
from .nixl_push import NixlPushConnector
from .offloading_p2p import OffloadingP2pConnector
from .sglang import SglangConnector
from .shared_store import SharedStoreConnector

__all__ = [
    "Abort", "AscendLayerwiseConnector", "AscendMooncakeConnector", "Attempt", "AutoConnector", "Connector",
    "ConnectorFailed", "ConnectorFence", "Connectors", "Handoff", "Legs", "MooncakeConnector",
    "MoriioConnector", "NixlConnector", "NixlPushConnector", "OffloadingP2pConnector", "Order", "Peer",
    "Question", "Settings", "SglangConnector",
    "SharedStoreConnector", "Splice", "Switch", "UnknownConnector", "connector_names", "load_connector",
    "make_connector", "settings_of", "takes_ranks",
]  # fmt: skip
