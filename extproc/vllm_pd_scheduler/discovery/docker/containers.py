"""What a Docker engine says of a container, and where that container can be reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from ...models import MAX_RANKS, InstanceRole, canonical_ip, is_ip

ROLE_LABEL = "vllm-pd.role"
PORT_LABEL = "vllm-pd.port"
MODEL_LABEL = "vllm-pd.model"
REVISION_LABEL = "vllm-pd.revision"
RANKS_LABEL = "vllm-pd.data-parallel-size"

DEFAULT_PORT = 8000
"""Where vLLM listens if nobody says otherwise."""


class OddContainer(Exception):
    """A container cannot be an instance; ``args[0]`` says why, for people."""


class Attached(msgspec.Struct, frozen=True):
    """A container's place in one network."""

    ipv4: str = msgspec.field(name="IPAddress", default="")
    ipv6: str = msgspec.field(name="GlobalIPv6Address", default="")


class Published(msgspec.Struct, frozen=True):
    """A port of a container, and the one of its host that leads there."""

    private: int = msgspec.field(name="PrivatePort")
    public: int | None = msgspec.field(name="PublicPort", default=None)
    protocol: str = msgspec.field(name="Type", default="tcp")
    host: str = msgspec.field(name="IP", default="")


class _Networks(msgspec.Struct, frozen=True):
    networks: dict[str, Attached | None] | None = msgspec.field(name="Networks", default=None)


class _HostConfig(msgspec.Struct, frozen=True):
    network_mode: str = msgspec.field(name="NetworkMode", default="")


class Container(msgspec.Struct, frozen=True):
    """A container, as engines list it."""

    id: str = msgspec.field(name="Id")
    names: list[str] | None = msgspec.field(name="Names", default=None)
    labels: dict[str, str] | None = msgspec.field(name="Labels", default=None)
    ports: list[Published] | None = msgspec.field(name="Ports", default=None)
    settings: _Networks = msgspec.field(name="NetworkSettings", default=_Networks())
    host_config: _HostConfig = msgspec.field(name="HostConfig", default=_HostConfig())

    @classmethod
    def read(cls, listed: Any) -> Container:
        """Return a container as an engine has listed it; raise :exc:`OddContainer`."""
        try:
            return msgspec.convert(listed, cls)
        except msgspec.ValidationError as error:
            raise OddContainer(f"an entry of the engine's list makes no sense: {error}") from None

    @property
    def name(self) -> str:
        """Its own name, without those that links have given it."""
        own = [each[1:] for each in self.names or () if each.startswith("/") and "/" not in each[1:]]
        return own[0] if own else self.id[:12]

    @property
    def networks(self) -> Mapping[str, Attached]:
        """The networks in which it has an address."""
        known = self.settings.networks or {}
        return {name: at for name, at in known.items() if at is not None and (at.ipv4 or at.ipv6)}


@dataclass(frozen=True, slots=True)
class Change:
    """Something has happened to a container or its network."""

    container: str
    """Its id."""
    stops: bool
    """Whether it was asked to stop, and still runs."""
    ends: bool
    """Whether it has ended, or runs anew."""
    after: str
    """What to ask for to get the changes after this one."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How containers are reached from here."""

    network: str | None
    """The network whose addresses count, ``None`` for the only one that a container is in."""
    published: bool
    """Whether to go to the ports that the engine's host publishes, not to the containers themselves."""
    host: str
    """Address of the engine's host."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """What the labels of a container say, and where it is."""

    role: InstanceRole
    host: str
    port: int
    models: list[str] | None
    revision: str | None
    data_parallel_size: int = 1


def read_labels(container: Container, reach: Reach) -> Labelled:
    """Return what a container is in the fleet; raise :exc:`OddContainer`."""
    labels = container.labels or {}
    said = labels.get(ROLE_LABEL, "")
    try:
        role = InstanceRole(said)
    except ValueError:
        raise OddContainer(f"label {ROLE_LABEL} must be prefill, decode or encode, not {said!r}") from None
    host, port = _place(container, _port(labels), reach)
    models = None
    if MODEL_LABEL in labels:
        models = [name for each in labels[MODEL_LABEL].split(",") if (name := each.strip())]
        if not models:
            raise OddContainer(f"label {MODEL_LABEL} names no model")
    revision = labels.get(REVISION_LABEL)
    if revision == "":
        raise OddContainer(f"label {REVISION_LABEL} is empty")
    size = _number(labels, RANKS_LABEL, 1, MAX_RANKS, f"a number up to {MAX_RANKS}")
    return Labelled(role, host, port, models, revision, size)


def _port(labels: Mapping[str, str]) -> int:
    return _number(labels, PORT_LABEL, DEFAULT_PORT, 65535, "a port")


def _number(labels: Mapping[str, str], label: str, default: int, most: int, what: str) -> int:
    said = labels.get(label, str(default))
    if not (said.isascii() and said.isdigit() and len(said) <= 5 and 1 <= int(said) <= most):
        raise OddContainer(f"label {label} must be {what}, not {said!r}")
    return int(said)


def _place(container: Container, port: int, reach: Reach) -> tuple[str, int]:
    mode = container.host_config.network_mode
    if mode == "host":
        return reach.host, port
    if reach.published:
        return _published(container, port, reach)
    if mode.startswith("container:"):
        raise OddContainer("it has the network of another container: put the labels on that one")
    networks = container.networks
    if reach.network is not None:
        if reach.network not in networks:
            raise OddContainer(f"it has no address in network {reach.network!r}, but {_listed(networks)}")
        return _address(networks[reach.network]), port
    if len(networks) > 1:
        raise OddContainer(f"it has an address {_listed(networks)}: name one by the source's key network")
    if not networks:
        raise OddContainer("it has no address in any network")
    return _address(next(iter(networks.values()))), port


def _published(container: Container, port: int, reach: Reach) -> tuple[str, int]:
    """Return where the engine's host takes connections for a port, by IPv4 where it does."""
    found = [
        (each.host, each.public)
        for each in sorted(container.ports or (), key=lambda each: ":" in each.host)
        if each.private == port and each.protocol == "tcp" and each.public
    ]
    if not found:
        raise OddContainer(f"its port {port} is not published")
    host, public = found[0]
    return (host if canonical_ip(host) is not None else reach.host), public


def _address(at: Attached) -> str:
    return at.ipv4 if is_ip(at.ipv4) else at.ipv6


def _listed(networks: Mapping[str, Attached]) -> str:
    return f"in {', '.join(map(repr, sorted(networks)))}" if networks else "in none"
