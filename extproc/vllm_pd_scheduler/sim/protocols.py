"""The hand-off protocols that a simulated server can speak."""

from .ascend import AscendConnector
from .handoff import Connector
from .mooncake import MooncakeConnector
from .options import Options


def connector_of(options: Options) -> Connector:
    """Return the connector that a server's options name."""
    match options.kv_connector:
        case "mooncake":
            return MooncakeConnector(options.role, options.profile.lease)
        case "ascend-mooncake":
            return AscendConnector()
        case _:
            return Connector()
