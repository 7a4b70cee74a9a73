"""What the fleet knows of an instance, as its entry and the settings for all describe it."""

from __future__ import annotations

from ..connectors import UnknownConnector, make_connector, settings_of, takes_ranks
from ..connectors.encode import encode_connector
from ..models import ConnectorChoice, InstanceRole, PDInstance, is_ip
from .instances import ConnectorSetting, InstanceConfig, SecretSource, connector_choice
from .tls import InstanceTlsConfig


def fleet_instance(
    role: InstanceRole,
    item: InstanceConfig,
    source: SecretSource | None,
    tls: InstanceTlsConfig | None,
    ranks: int,
) -> PDInstance:
    """Return an instance of so many ranks; ``source`` has its API key.

    Raise :exc:`ValueError` naming the entry's key that cannot be used.
    """
    try:
        key = source.read() if source else None
    except ValueError as error:
        raise ValueError(f"api_key: {error}") from None
    models = None if item.models is None else frozenset(item.models)
    return PDInstance(
        item.id,
        role,
        item.host,
        item.port,
        key,
        tls_name(item, tls),
        models,
        item.revision,
        own_connector(role, item),
        ranks,
        (item.kv_events_port, item.kv_events_replay_port),
    )


def rank_count(item: InstanceConfig, connector: ConnectorSetting, prefill_leg: str) -> int:
    """Return how many ranks an instance has; raise :exc:`ValueError` if they cannot be chosen among.

    ``connector`` is that of all instances.
    """
    if item.data_parallel_size > 1 and prefill_leg == "sidecar":
        raise ValueError(
            "data_parallel_size: a sidecar cannot be told a rank of P: leave it out, or give each rank a "
            "port, which is an instance of its own"
        )
    name = connector_choice(item.connector or connector).name
    if item.data_parallel_size > 1 and not takes_ranks(name):
        raise ValueError(
            f"data_parallel_size: an instance of the connector {name!r} cannot be told a rank: "
            "leave it out, and its engine chooses among its ranks"
        )
    return item.data_parallel_size


def tls_name(item: InstanceConfig, tls: InstanceTlsConfig | None) -> str | None:
    """Return the name that an instance's certificate must be for, ``None`` without TLS."""
    if tls is None:
        for key, unused in (("tls", item.tls), ("server_name", item.server_name)):
            if unused:
                raise ValueError(f"{key}: needs instance_tls, {{}} to trust the system's authorities")
        return None
    if item.tls is False:
        return None
    name = item.server_name or tls.server_name or item.host.removesuffix(".")
    if is_ip(name):  # Envoy compares what it gets from EDS with DNS names only
        raise ValueError(
            f"server_name: needed because host {item.host} is an IP address, and certificates are "
            "checked for DNS names; give it here or in instance_tls"
        )
    return name


def own_connector(role: InstanceRole, item: InstanceConfig) -> ConnectorChoice | None:
    """Return an instance's own connector, if it names one; raise :exc:`ValueError` if none is called so."""
    if item.connector is None:
        return None
    choice = connector_choice(item.connector)
    try:
        check_connector(role, choice)
    except UnknownConnector as error:
        raise ValueError(f"connector: {error}") from None
    return choice


def check_connector(role: InstanceRole, choice: ConnectorChoice) -> None:
    """Raise :exc:`.connectors.UnknownConnector` for one that an instance of a role cannot have."""
    if role is InstanceRole.ENCODE:
        encode_connector(choice)
    else:
        make_connector(choice.name)
        settings_of(choice)
