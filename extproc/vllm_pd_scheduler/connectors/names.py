"""Connectors by name: built-in ones, entry points of other packages, and dotted paths."""

from __future__ import annotations

from typing import Any

import msgspec

from ..models import ConnectorChoice
from ..system.loading import CannotLoad, Kind
from ..telemetry.failures import described, why_not_made
from .ascend_layerwise import AscendLayerwiseConnector
from .ascend_mooncake import AscendMooncakeConnector
from .auto import AutoConnector
from .base import Connector, Settings
from .mooncake import MooncakeConnector
from .moriio import MoriioConnector
from .nixl import NixlConnector
from .nixl_push import NixlPushConnector
from .offloading_p2p import OffloadingP2pConnector
from .sglang import SglangConnector
from .shared_store import SharedStoreConnector

ENTRY_POINT_GROUP = "vllm_pd_scheduler.connectors"
"""Group of entry points in which other packages name their connectors."""

_BUILT_IN: dict[str, type[Connector]] = {
    "auto": AutoConnector,
    "nixl": NixlConnector,
    "nixl-push": NixlPushConnector,
    "shared-store": SharedStoreConnector,
    "mooncake": MooncakeConnector,
    "ascend-mooncake": AscendMooncakeConnector,
    "ascend-layerwise": AscendLayerwiseConnector,
    "moriio": MoriioConnector,
    "offloading-p2p": OffloadingP2pConnector,
    "sglang": SglangConnector,
}


class UnknownConnector(ValueError):
    """The name stands for no connector, or one that cannot be imported or made, or its settings are wrong."""


_BASE: Any = Connector  # mypy takes no abstract class for a type
_KIND: Kind[Connector] = Kind("connector", _BASE, ENTRY_POINT_GROUP, _BUILT_IN)


def connector_names() -> list[str]:
    """Return the names that :func:`load_connector` accepts besides dotted paths."""
    return _KIND.names()


def load_connector(name: str) -> type[Connector]:
    """Return a connector class by its built-in name, its entry point or as ``package.module:Class``.

    Raise :exc:`UnknownConnector`, which lists the known names or says what went wrong on import.
    """
    try:
        return _KIND.load(name)
    except CannotLoad as error:
        raise UnknownConnector(str(error)) from error.__cause__


def make_connector(name: str) -> Connector:
    """Return a new connector; raise :exc:`UnknownConnector`, also if its class cannot be made."""
    found = load_connector(name)
    try:
        return found()
    except Exception as error:  # other people's code, as on import
        raise UnknownConnector(f"{name!r} cannot be made: {why_not_made(found, error)}") from error


def takes_ranks(name: str) -> bool:
    """Whether an instance can be told which of its ranks is meant; true of an unknown connector."""
    try:
        return bool(getattr(load_connector(name), "takes_ranks", True))
    except UnknownConnector:  # which is said elsewhere, or is that of an encode instance
        return True


def settings_of(choice: ConnectorChoice) -> Settings:
    """Return an instance's settings, checked; raise :exc:`UnknownConnector` saying what is wrong."""
    wanted: Any = load_connector(choice.name).settings_type
    if not (isinstance(wanted, type) and issubclass(wanted, Settings)):
        raise UnknownConnector(
            f"{choice.name!r} has a settings_type that is not a subclass of {__package__}.Settings"
        )
    given: dict[str, Any] = dict(choice.settings)
    fields = wanted.__struct_encode_fields__
    known = f"its settings are {', '.join(fields)}" if fields else "it has none"
    if unknown := [name for name in given if name not in fields]:
        raise UnknownConnector(f"{choice.name!r} has no setting {unknown[0]!r}; {known}")
    try:
        return msgspec.convert(given, wanted)
    except msgspec.ValidationError as error:
        raise UnknownConnector(f"of {choice.name!r}: {error}; {known}") from None
    except Exception as error:  # other people's code too
        raise UnknownConnector(f"of {choice.name!r}: {described(error, wanted)}") from error
