"""Where the replicas of the scheduler meet: the server that carries what they tell each other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from ..models import canonical_host
from ..system.extras import install_command
from .instances import SecretSource, StrictModel, is_host
from .tls import InstanceTlsConfig, ServerName

_URL = re.compile(r"(valkey|valkeys|redis|rediss)://(?:([^@/?#:\s]+)@)?([^@/?#\s]+?)(?:/([0-9]{1,5}))?/?")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:,]+)(?::([0-9]{1,5}))?")
_PORT, _SENTINEL_PORT = 6379, 26379
_MEANT = (
    "must be valkey://[USER@]HOST[:PORT][,HOST[:PORT]…][/DATABASE], or valkeys:// for TLS (redis:// and "
    "rediss:// are the same)"
)
_NO_PASSWORD = '; put the password into replicas.password, as {"env": NAME} or {"file": PATH}'

FLEET_KEY = r"^[A-Za-z0-9._:-]{1,64}$"
REPLICA_NAME = r"^[a-z0-9]{1,16}$"

OF_EACH = frozenset(
    {
        "grpc_host", "grpc_port", "grpc_socket", "grpc_health_port", "grpc_tls",
        "admin_host", "admin_port", "admin_token", "admin_tls",
        "metaserver_host", "metaserver_port", "metaserver_url", "metaserver_tls",
        "metrics_host", "metrics_port", "prefill_listener", "drain_timeout",
        "log_format", "state_file", "tracing", "explain_header", "replicas",
        "continuation_port", "continuation_ingress",
    }
)  # fmt: skip
"""Keys of the configuration that may differ from replica to replica. All others should be the same."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """What a URL says."""

    addresses: tuple[tuple[str, int], ...]
    user: str
    database: int
    tls: bool

    def fleet(self, key: str) -> str:
        """Return a fleet's name, which pub/sub, that knows no databases, shall keep apart too."""
        return f"{key}/{self.database}" if self.database else key


class ReplicasTlsConfig(InstanceTlsConfig):
    """TLS to the server of the replicas. The PEM files are [read again](security.md#tls) when they change."""

    ca: str | None = None
    """Authorities that sign the server's certificate; without it those that the system trusts."""
    cert: str | None = None
    """Certificate to show to a server that asks for one."""
    key: str | None = None
    """Its private key, not encrypted; belongs to `cert`."""
    server_name: ServerName | None = None
    """DNS name that the server's certificate must be for, if it is not the host of `url`."""


class ReplicasConfig(StrictModel):
    """The server by which several schedulers of one fleet [share what they do](replicas.md): Valkey from 7.2
    or Redis from 6.2 on."""

    url: str
    """`valkey://HOST:PORT`, or `valkeys://` for TLS; `redis://` and `rediss://` are the same. An ACL user
    comes before the host (`valkey://scheduler@10.0.0.5:6379`), a database after it (`/3`). Of several hosts,
    with commas between them, the first that can be written to is used. A node of a Cluster leads to the right
    one."""
    password: SecretSource | None = None
    """Where the user's password is kept."""
    key: Annotated[str, Field(pattern=FLEET_KEY)] = "vllm-pd"
    """Name of the fleet at the server. All that is kept and sent there begins with `{NAME}`. Give two fleets
    on one server different ones."""
    name: Annotated[str, Field(pattern=REPLICA_NAME)] | None = None
    """This replica's name, which no other has: the ids of its requests begin with it, so that Envoy reports
    to the right replica. 1 to 16 lower-case letters and digits."""
    tls: ReplicasTlsConfig | None = None
    """TLS to the server, with a `valkeys://` URL; without it, the system's authorities are trusted."""
    sentinel: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """The name by which Sentinels know the server. The hosts of `url` are Sentinels then (port 26379 if none
    is given)."""
    sentinel_password: SecretSource | None = None
    """Where the Sentinels' own password is kept, if they ask for one."""

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        read_url(url, _PORT)
        return url

    @model_validator(mode="after")
    def _fits(self) -> ReplicasConfig:
        if self.tls is not None and not self.meeting().tls:
            raise ValueError("tls: needs a url that begins with valkeys:// or rediss://")
        if self.sentinel_password is not None and self.sentinel is None:
            raise ValueError("sentinel_password: needs sentinel, the name by which Sentinels know the server")
        return self

    def meeting(self) -> Meeting:
        """Return what the URL says: of the Sentinels, if there are any, else of the servers."""
        return read_url(self.url, _PORT if self.sentinel is None else _SENTINEL_PORT)

    def check(self) -> None:
        """Raise :exc:`ValueError` if nothing can be shared with these settings here."""
        if find_spec("hiredis") is None:
            raise ValueError(f"hiredis is not installed: `{install_command('replicas')}` installs it")
        for key in ("password", "sentinel_password"):
            source: SecretSource | None = getattr(self, key)
            try:
                if source is not None:
                    source.read()
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        if self.meeting().tls:
            try:
                self.tls_settings().context()
            except ValueError as error:
                raise ValueError(f"tls: {error}") from None

    def tls_settings(self) -> ReplicasTlsConfig:
        """Return the settings of TLS, if the URL asks for it."""
        return self.tls or ReplicasTlsConfig()


def read_url(url: str, port: int) -> Meeting:
    """Return what a URL says; raise :exc:`ValueError`. ``port`` is that of hosts that name none."""
    found = _URL.fullmatch(url)
    if found is None:
        more = _NO_PASSWORD if re.match(r"[a-z]+://[^@/]*:[^@/]*@", url) else ""
        raise ValueError(_MEANT + more)
    scheme, user, hosts, database = found.groups()
    addresses = []
    for each in hosts.split(","):
        host = _HOST.fullmatch(each)
        name = canonical_host(host[1].strip("[]")) if host else ""
        number = int(host[2]) if host and host[2] else port
        if not is_host(name) or not 0 < number < 65536:
            raise ValueError(_MEANT)
        addresses.append((name, number))
    return Meeting(tuple(addresses), user or "", int(database or 0), scheme in ("valkeys", "rediss"))
