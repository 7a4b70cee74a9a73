"""The configuration: every setting, its type and its default."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from ..models import InstanceRole, PDInstance, is_ip
from .tls import LABEL, InstanceTlsConfig, ServerName, TlsConfig

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_HOST = re.compile(rf"{LABEL}(?:\.{LABEL})*\.?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")

_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
_HEADER = r"^[a-z0-9-]+$"
_LISTENER = r"^http://[^/\s]+$"
_PATH = r"^[^\x00]+$"
MEANING = {
    _ID: "must be 1 to 128 letters, digits, '.', '_' and '-', a letter or digit first",
    _HEADER: "must be the name of a header in lower case: letters, digits and '-'",
    _LISTENER: "must be http://HOST:PORT, without a path",
    _PATH: "must be a path",
}
"""What is wrong with a string that one of these patterns does not match."""


Listed = tuple[InstanceRole, str, "InstanceConfig"]
"""Role, key path in the file, entry."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


class SecretSource(_Model):
    """Where a secret is kept: an environment variable or a file, never the configuration itself."""

    env: str | None = None
    file: str | None = None

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
                value = Path(str(self.file)).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "is not text"
                raise ValueError(f"{place}: {reason}") from None
        if not value:
            raise ValueError(f"{place} is {'not set' if self.env is not None else 'empty'}")
        if not (value.isascii() and value.isprintable()):
            raise ValueError(f"{place} holds more than one line, or characters that no header can carry")
        return value


class InstanceConfig(_Model):
    """One vLLM server of the fleet.

    With ``instance_tls``, ``tls: false`` says that this one speaks plain HTTP.
    """

    id: Annotated[str, Field(pattern=_ID)]
    host: Annotated[str, Field(max_length=253)]
    port: Port
    api_key: SecretSource | None = None
    tls: bool | None = None
    server_name: ServerName | None = None

    @field_validator("host")
    @classmethod
    def _is_a_host(cls, host: str) -> str:
        bare = host.removeprefix("[").removesuffix("]")
        if not _HOST.fullmatch(bare) or (":" in bare and not is_ip(bare)):
            raise ValueError("must be an IP address or a DNS name, without scheme or port")
        return bare


class SchedulerConfig(_Model):
    """The whole configuration. Times are in seconds; see ``scheduler_config.example.json``."""

    strategy: str = "least_load"
    prefill_strategy: str | None = None
    decode_strategy: str | None = None
    shadow_strategy: str | None = None
    load_weight: Weight = 0.5
    kv_cache_weight: Weight = 0.3
    latency_weight: Weight = 0.2

    health_check_interval: Seconds = 5.0
    health_check_timeout: Seconds = 2.0
    unhealthy_threshold: Annotated[int, Field(ge=1)] = 2
    healthy_threshold: Annotated[int, Field(ge=1)] = 1

    session_header: Annotated[str, Field(pattern=_HEADER)] = "x-session-id"
    ttft_slo: Seconds | None = None
    tpot_slo: Seconds | None = None
    disaggregation: Literal["always", "never", "auto"] | Annotated[int, Field(ge=1)] = "always"
    late_binding: bool = False

    max_waiting: Annotated[int, Field(ge=1)] | None = None
    max_kv_usage: Annotated[float, Field(gt=0, le=1)] | None = None
    max_in_flight_tokens: Annotated[int, Field(ge=1)] | None = None
    queue_size: Annotated[int, Field(ge=0, le=1_000_000)] = 1024
    queue_bytes: Annotated[int, Field(ge=0)] = 256 << 20
    queue_timeout: Seconds = 30.0
    max_held_bytes: Annotated[int, Field(ge=1 << 20)] = 1 << 30

    max_retries: Annotated[int, Field(ge=0, le=16)] = 3
    prefill_timeout: Seconds = 120.0
    on_prefill_failure: Literal["local", "fail"] = "local"
    max_local_prefill_share: Share = 1.0
    decode_first_byte_timeout: Seconds = 20.0
    decode_seconds_per_token: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    kv_lease_duration: Seconds = 30.0
    ejection_failures: Annotated[int, Field(ge=1)] = 3
    ejection_success_rate: Share = 0.5
    ejection_pause: Seconds = 1.0
    max_ejected_share: Share = 0.5
    drain_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 64 << 20

    prefill_listener: Annotated[str, Field(pattern=_LISTENER)] = "http://127.0.0.1:10001"
    grpc_host: str = "127.0.0.1"
    grpc_port: Port = 9002
    grpc_tls: TlsConfig | None = None
    admin_host: str = "127.0.0.1"
    admin_port: Port = 9003
    admin_token: SecretSource | None = None
    admin_tls: TlsConfig | None = None
    state_file: Annotated[str, Field(pattern=_PATH)] | None = None

    api_key: SecretSource | None = None
    instance_tls: InstanceTlsConfig | None = None
    prefill_instances: list[InstanceConfig] = []
    decode_instances: list[InstanceConfig] = []

    @field_validator("disaggregation", mode="wrap")
    @classmethod
    def _one_problem(cls, value: Any, read: ValidatorFunctionWrapHandler) -> Any:
        try:
            return read(value)
        except ValidationError:  # one for each kind of value that it may have
            raise ValueError(
                "must be 'always', 'never', 'auto' or a whole number of tokens above 0"
            ) from None

    def strategy_of(self, role: InstanceRole) -> str:
        """Return the name of a role's strategy."""
        own = self.prefill_strategy if role is InstanceRole.PREFILL else self.decode_strategy
        return own or self.strategy

    def may_use(self, strategy: str) -> bool:
        """Whether a strategy may be used from now on by those who do not write the configuration.

        A dotted path runs code on import, so only one that the configuration names.
        """
        named = (self.strategy, self.prefill_strategy, self.decode_strategy, self.shadow_strategy)
        return ":" not in strategy or strategy in named

    def instances(self) -> Iterator[PDInstance]:
        """Every configured instance, with its API key read from its source."""
        for role, _, item in self.listed():
            yield self.instance(role, item)

    def instance(self, role: InstanceRole, item: InstanceConfig) -> PDInstance:
        """Return an instance as an entry and the settings for all describe it.

        Raises :exc:`ValueError` naming the entry's key that cannot be used.
        """
        source = item.api_key or self.api_key
        try:
            key = source.read() if source else None
        except ValueError as error:
            raise ValueError(f"api_key: {error}") from None
        return PDInstance(item.id, role, item.host, item.port, key, self.tls_name(item))

    def tls_name(self, item: InstanceConfig) -> str | None:
        """Return the name that an instance's certificate must be for, ``None`` without TLS."""
        if self.instance_tls is None:
            for key, unused in (("tls", item.tls), ("server_name", item.server_name)):
                if unused:
                    raise ValueError(f"{key}: needs instance_tls, {{}} to trust the system's authorities")
            return None
        if item.tls is False:
            return None
        name = item.server_name or self.instance_tls.server_name or item.host.removesuffix(".")
        if is_ip(name):  # Envoy compares what it gets from EDS with DNS names only
            raise ValueError(
                f"server_name: needed because host {item.host} is an IP address, and certificates are "
                "checked for DNS names; give it here or in instance_tls"
            )
        return name

    def api_keys(self) -> list[SecretSource]:
        """Every source of an API key that is named, for all instances or for one."""
        sources = [self.api_key, *(item.api_key for _, _, item in self.listed())]
        return [source for source in sources if source is not None]

    def listed(self) -> Iterator[Listed]:
        """Yield every entry of the two lists of instances."""
        for role in InstanceRole:
            key = f"{role}_instances"
            for index, item in enumerate(getattr(self, key)):
                yield role, f"{key}[{index}]", item


def is_loopback(host: str) -> bool:
    """Whether a listener bound to ``host`` can be reached from this machine only."""
    return host == "localhost" or (is_ip(host) and ipaddress.ip_address(host).is_loopback)
