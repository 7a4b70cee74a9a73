"""What the configuration says of instances: each with its address, and where its secrets are kept."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from ..models import MAX_RANKS, ConnectorChoice, InstanceRole, canonical_host, canonical_ip, is_ip
from .tls import LABEL, ServerName

ModelName = Annotated[str, Field(min_length=1, max_length=1024)]
"""The name of a model, as requests have it."""
Port = Annotated[int, Field(ge=1, le=65535)]
RankCount = Annotated[int, Field(ge=1, le=MAX_RANKS)]

_NAME = re.compile(rf"{LABEL}(?:\.{LABEL})*\.?")
_NUMBERS = re.compile(r"(?:(?:[0-9]+|0x[0-9a-f]*)\.)*(?:[0-9]+|0x[0-9a-f]*)\.?")
"""No server has such a name, and resolvers read it as an IPv4 address: 10.0.11 as 10.0.0.11."""

_SECRET_BYTES = 1 << 16
"""The most that a file with a secret may have."""

MASK = "***"
"""What is shown in place of a secret."""

INSTANCE_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"

Listed = tuple[InstanceRole, str, "InstanceConfig"]
"""Role, key path in the file, entry."""


class StrictModel(BaseModel):
    """A part of the configuration: no unknown keys, no conversions, and it cannot be changed."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )


class SecretSource(StrictModel):
    """Where a secret is kept: an environment variable or a file, never the configuration itself."""

    env: str | None = None
    """Name of an environment variable that holds the secret."""
    file: str | None = None
    """Path of a file that holds the secret, on one line. The scheduler reads it at start."""

    @field_serializer("env")
    def _mask(self, name: str | None, info: SerializationInfo) -> str | None:
        """Hide what should be a variable's name: some write the secret itself there."""
        return MASK if name is not None and (info.context or {}).get("masked") else name

    @model_validator(mode="after")
    def _one_of_both(self) -> SecretSource:
        if (self.env is None) == (self.file is None):
            raise ValueError('give either "env" or "file"')
        return self

    def read(self) -> str:
        """Return the secret; raises :exc:`ValueError` naming the place if there is none that can be sent."""
        if self.env is not None:
            place, value = f"environment variable {self.env}", os.environ.get(self.env, "").strip()
        else:
            place = f"secret file {self.file}"
            try:
                value = _read_text(str(self.file)).strip()
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                raise ValueError(f"{place}: {reason}") from None
        if not value:
            raise ValueError(f"{place} is {'not set' if self.env is not None else 'empty'}")
        if not (value.isascii() and value.isprintable()):
            raise ValueError(f"{place} holds more than one line, or characters that no header can carry")
        return value


class ConnectorConfig(StrictModel):
    """A connector with settings of its own: they stand beside `type`."""

    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, str | int | float | bool] = Field(init=False)

    type: str
    """Name of the [connector](connectors.md)."""


def _is_a_connector(setting: object) -> object:
    """Refuse what is none in one line, where a union would say of each of its types that it is not that."""
    if isinstance(setting, dict):
        plain = all(isinstance(each, str | int | float) for each in setting.values())
        right = plain and isinstance(setting.get("type"), str)
    else:
        right = isinstance(setting, str | ConnectorConfig)
    if not right:
        raise ValueError(
            'must be the name of a connector, or {"type": NAME} with its settings beside that: '
            "texts, numbers, true or false"
        )
    return setting


ConnectorSetting = Annotated[str | ConnectorConfig, BeforeValidator(_is_a_connector)]


def connector_choice(setting: str | ConnectorConfig) -> ConnectorChoice:
    """Return the connector that a setting names."""
    if isinstance(setting, str):
        return ConnectorChoice(setting)
    return ConnectorChoice(setting.type, tuple(sorted((setting.model_extra or {}).items())))


class InstanceConfig(StrictModel):
    """One vLLM server of the fleet."""

    id: Annotated[str, Field(pattern=INSTANCE_ID)]
    """A name of your choice, one for each instance of the fleet. Metrics, logs and the headers
    `x-pd-prefill` and `x-pd-decode` show it."""
    host: Annotated[str, Field(max_length=253)]
    """IP address or DNS name. A name is looked up again with each health check; when that fails, its last
    address is used. An IP address may have any spelling, but no zone (`fe80::1%eth0`)."""
    port: Port
    """Port of vLLM's HTTP server."""
    api_key: SecretSource | None = None
    """Where this instance's `--api-key` is kept, if it is not the `api_key` of all."""
    tls: bool | None = None
    """With `instance_tls`: `false` if this instance speaks plain HTTP."""
    server_name: ServerName | None = None
    """With `instance_tls`: the DNS name that this instance's certificate must be for. Needed when `host` is
    an IP address and `instance_tls` has no `server_name`."""
    models: Annotated[list[ModelName], Field(min_length=1, max_length=4096)] | None = None
    """Names of the models that it serves. Without it, what its `/v1/models` says, [read every 15
    s](models.md). With `"*"` among them it may also serve names that it does not list: for a vLLM that loads
    adapters on request."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Its revision during a [roll-out](models.md#roll-outs): P hands over only to D of the same one."""
    connector: ConnectorSetting | None = None
    """Its [connector](connectors.md), if it is not the `connector` of all; of an E that in place of
    `encode_connector`."""
    both_roles: bool = False
    """Whether its vLLM can be a P and a D, so that it may be [turned](ratio.md#turn-an-instance): with NIXL
    that is `"kv_role": "kv_both"`."""
    data_parallel_size: RankCount = 1
    """Its `--data-parallel-size`, if its engines share its one port: the scheduler then chooses among them
    ([data-parallel ranks](connectors/ranks.md)). Engines with ports of their own are instances
    of their own."""
    kv_events_port: Port | None = None
    """With `kv_events`: the `port` of this instance, if it is another one than that of all."""
    kv_events_replay_port: Port | None = None
    """With `kv_events`: the `replay_port` of this instance, if it is another one than that of all."""

    @field_validator("host")
    @classmethod
    def _is_a_host(cls, host: str) -> str:
        found = canonical_host(host)
        if canonical_ip(found) is not None:
            return found
        if is_ip(found.partition("%")[0]):
            why = "has a zone, and that is another on each machine" if "%" in found else "is no server's own"
            raise ValueError(f"the IP address {host} {why}")
        if _NUMBERS.fullmatch(found):
            raise ValueError(f"{host} is neither an IP address in full nor a DNS name")
        if not _NAME.fullmatch(found):
            raise ValueError("must be an IP address or a DNS name, without scheme or port")
        return found


class InstancesFile(StrictModel):
    """A file with instances."""

    prefill_instances: list[InstanceConfig] = []
    """P of the fleet."""
    decode_instances: list[InstanceConfig] = []
    """D of the fleet."""
    encode_instances: list[InstanceConfig] = []
    """E of the fleet."""

    def listed(self) -> Iterator[Listed]:
        """Yield every entry of the two lists."""
        for role in InstanceRole:
            key = f"{role}_instances"
            for index, item in enumerate(getattr(self, key)):
                yield role, f"{key}[{index}]", item


def is_host(host: str) -> bool:
    """Whether a text is an IP address or a DNS name."""
    return is_ip(host) or bool(_NAME.fullmatch(host) and not _NUMBERS.fullmatch(host.lower()))


def _read_text(path: str) -> str:
    """Return what a small file holds; raises :exc:`OSError`, or :exc:`ValueError` for what is none."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ValueError("is not a file")  # a pipe would keep us waiting, a device have no end
    with open(path, "rb") as file:
        data = file.read(_SECRET_BYTES + 1)
    if len(data) > _SECRET_BYTES:
        raise ValueError(f"is larger than {_SECRET_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError("is not text") from None
