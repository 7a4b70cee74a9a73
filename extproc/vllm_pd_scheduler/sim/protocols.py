"""The hand-off protocols that a simulated server can speak."""

from .ascend import AscendConnector
from .ascend_layerwise import LayerwiseConnector
from .handoff import Connector
from .mooncake import MooncakeConnector
from .moriio import MoriioConnector
from .nixl_push import PushConnector
from .offloading import OffloadingConnector
from .options import Options
from .sglang import SglangConnector


def connector_of(options: Options, rank: int = 0) -> Connector:
    """Return the connector that a server's options name, of one of its engines."""
    match options.kv_connector:
        case "nixl-push":
            return PushConnector()
        case "mooncake":
            return MooncakeConnector(options.role, options.profile.lease)
        case "ascend-mooncake":
            return AscendConnector()
        case "ascend-layerwise":
            return LayerwiseConnector(f"{options.kv_host}:{options.port}")
        case "moriio-read" | "moriio-write":
            address = f"{options.kv_host}:{options.port}"
            writes, size = options.kv_connector == "moriio-write", options.data_parallel_size
            return MoriioConnector(address, writes=writes, rank=rank, size=size)
        case "offloading-p2p":
            return OffloadingConnector(options.profile.lease, options.fail_delay)
        case "sglang":
            return SglangConnector(options.role, options.profile.lease)
        case _:
            return Connector()
