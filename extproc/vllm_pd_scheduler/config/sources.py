"""What the configuration says of the sources of instances beside its own lists and files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from ..models import canonical_host, canonical_ip, is_ip
from ..system.extras import install_command
from .instances import INSTANCE_ID, Port, RankCount, SecretSource, StrictModel, is_host
from .tls import ServerName

RoleName = Literal["prefill", "decode", "encode"]


def _is_a_kubernetes_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", name):
        raise ValueError("must be a name as Kubernetes has them: lower-case letters, digits, '-' and '.'")
    return name


def _is_a_label(key: str) -> str:
    if not re.fullmatch(r"([a-z0-9][a-z0-9.-]{0,252}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?", key):
        raise ValueError("must be the key of a label, like 'llm-d.ai/role'")
    return key


_KubernetesName = Annotated[str, AfterValidator(_is_a_kubernetes_name)]
_LabelKey = Annotated[str, AfterValidator(_is_a_label)]

_Name = Annotated[str, Field(min_length=1, max_length=253)]

_RESOLVER = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)):([0-9]{1,5})")
_DNS_PORT = 53


def _is_a_dns_name(name: str) -> str:
    if is_ip(name) or not is_host(name):
        raise ValueError("must be a DNS name")
    return name.lower()


def _is_an_address(host: str) -> str:
    if not is_host(host):
        raise ValueError("must be an IP address or a DNS name, without scheme or port")
    return canonical_host(host)


def _is_a_resolver(text: str) -> str:
    resolver_address(text)
    return text


def resolver_address(text: str) -> tuple[str, int]:
    """Return address and port of a DNS server; raises :exc:`ValueError`."""
    found = _RESOLVER.fullmatch(text)
    host, port = (found[1] or found[2], int(found[3])) if found else (text, _DNS_PORT)
    address = canonical_ip(host)
    if address is None or not 1 <= port <= 65535:
        raise ValueError("must be the IP address of a DNS server, with a port if not 53: 10.96.0.10:5353")
    return address, port


_DnsName = Annotated[str, Field(max_length=253), AfterValidator(_is_a_dns_name)]
_Address = Annotated[str, Field(max_length=253), AfterValidator(_is_an_address)]


class DnsSource(StrictModel):
    """Instances of one role behind a DNS name. Give `name` and `port`, or `srv`."""

    type: Literal["dns"]
    """`"dns"`."""
    role: RoleName
    """What the instances are for."""
    name: _DnsName | None = None
    """A name whose A or AAAA records are the instances, as that of a headless service. A dot at the end keeps
    the search list of `/etc/resolv.conf` out of it."""
    port: Port | None = None
    """With `name`: the port of each."""
    srv: _DnsName | None = None
    """A name whose SRV records are the instances, with their ports: `_http._tcp.vllm-decode.llm.svc`."""
    resolver: Annotated[str, AfterValidator(_is_a_resolver)] | None = None
    """Address of the DNS server, with a port if that is not 53. Names are then complete as they stand.
    Without it, the system's own."""
    api_key: SecretSource | None = None
    """Where the `--api-key` of these instances is kept, if it is not the `api_key` of all."""
    server_name: ServerName | None = None
    """With `instance_tls`: the DNS name that their certificates must be for. Without it the one of
    `instance_tls`, else `name`, else the target of each SRV record."""
    data_parallel_size: RankCount = 1
    """The [`data_parallel_size`](connectors/ranks.md) of each of these instances."""

    @property
    def label(self) -> str:
        """What operators call it: ``dns:decode.llm.svc:8000``."""
        return f"dns:{self.srv}" if self.port is None else f"dns:{self.name}:{self.port}"

    @model_validator(mode="after")
    def _one_question(self) -> DnsSource:
        if (self.name is None) == (self.srv is None):
            raise ValueError('give either "name" and "port", or "srv"')
        if self.name is not None and self.port is None:
            raise ValueError('"name" needs a "port", that of each instance')
        if self.name is None and self.port is not None:
            raise ValueError('"port" belongs to "name": SRV records have their own')
        return self


class DockerTls(StrictModel):
    """PEM files for a Docker engine that is reached by TCP."""

    ca: str
    """Authority that has signed the engine's certificate."""
    cert: str
    """The scheduler's certificate."""
    key: str
    """Its private key."""


def _is_an_engine(host: str) -> str:
    try:
        parts = urlsplit(host)
        name, _ = parts.hostname or "", parts.port
    except ValueError:
        parts, name = urlsplit(""), ""
    if parts.scheme == "unix" and not name and parts.path.startswith("/"):
        return host
    if parts.scheme == "tcp" and is_host(name) and not parts.path.strip("/"):
        return host
    raise ValueError("must be unix:///PATH or tcp://HOST:PORT")


class DockerSource(StrictModel):
    """Containers of a Docker engine that have the label `vllm-pd.role`."""

    type: Literal["docker"]
    """`"docker"`."""
    name: Annotated[str, Field(pattern=INSTANCE_ID)] | None = None
    """What this engine is called, if there are several: `gpu1` makes `gpu1.vllm-decode-0` of a container."""
    host: Annotated[str, AfterValidator(_is_an_engine)] | None = None
    """Where the engine listens: `unix:///var/run/docker.sock`, `tcp://gpu1:2376`. Without it as for the
    command `docker`: `DOCKER_HOST`, else the current context, else the socket of this machine."""
    tls: DockerTls | None = None
    """With `host`: certificates."""
    context: _Name | None = None
    """A context of the command `docker`, in place of `host`."""
    network: _Name | None = None
    """Name of the network in which the containers are reached. Needed when they are in several."""
    published: bool = False
    """Whether they are reached by the ports that the engine's host publishes."""
    address: _Address | None = None
    """Address of the engine's host, for published ports and for containers in the host's network. Without it
    the one in `host`, and `127.0.0.1` for a socket."""
    api_key: SecretSource | None = None
    """Where the `--api-key` of these instances is kept, if it is not the `api_key` of all."""
    server_name: ServerName | None = None
    """With `instance_tls`: the DNS name that their certificates must be for."""

    @property
    def label(self) -> str:
        """What operators call it: ``docker``, ``docker:gpu1``."""
        where = self.name or self.host or self.context
        return "docker" if where is None else f"docker:{where}"

    @model_validator(mode="after")
    def _one_engine(self) -> DockerSource:
        if self.host is not None and self.context is not None:
            raise ValueError('give either "host" or "context"')
        if self.tls is not None and not (self.host or "").startswith("tcp:"):
            raise ValueError('"tls" needs a "host" that begins with tcp://')
        if self.published and self.network is not None:
            raise ValueError('give either "network" or "published"')
        return self

    def check(self) -> None:
        """Raise :exc:`ValueError` if no engine can be asked from here."""
        if find_spec("docker") is None:
            raise ValueError(f"the Docker SDK is not installed: `{install_command('docker')}` installs it")


class KubernetesSource(StrictModel):
    """Pods of one namespace. Give one of `selector`, `pool` and `services`."""

    type: Literal["kubernetes"]
    """`"kubernetes"`."""
    namespace: _KubernetesName | None = None
    """Namespace of the pods; without it the scheduler's own, or that of the kubeconfig's context."""
    selector: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Label selector of the pods, as `kubectl get pods --selector` takes it."""
    ports: Annotated[list[Port], Field(max_length=64)] = []
    """With `selector`: ports of each pod; each is an instance. A pod's annotation `llm-d.ai/active-ports` may
    say which of them it has."""
    pool: _KubernetesName | None = None
    """Name of an `InferencePool` (`inference.networking.k8s.io/v1`), which has selector and ports."""
    services: dict[RoleName, _KubernetesName] = {}
    """A service for each role, whose EndpointSlices are watched. Of a service with several ports the one
    named `http` counts."""
    role_label: _LabelKey = "llm-d.ai/role"
    """Label of a pod that says its role."""
    roles: dict[RoleName, list[Annotated[str, Field(max_length=63)]]] = {
        "prefill": ["prefill", "encode-prefill", "prefill-decode", "both", "encode-prefill-decode"],
        "decode": ["decode", "prefill-decode", "both", "encode-prefill-decode", ""],
        "encode": ["encode"],
    }
    """Values of that label for each role; a pod may have both. `""` stands for a pod without the label."""
    model_label: _LabelKey | None = None
    """Label of a pod that says which model it serves. Without it that is read from its `/v1/models`."""
    revision_label: _LabelKey | None = None
    """Label of a pod that says to which roll-out it belongs: P hands over only to D of the same one."""
    data_parallel_size_label: _LabelKey | None = None
    """Label of a pod that says its [`data_parallel_size`](connectors/ranks.md). Without it each
    port has one engine."""
    kubeconfig: Annotated[str, Field(min_length=1)] | None = None
    """Path of a kubeconfig file. Without it the scheduler uses its pod's service account or, outside a
    cluster, `KUBECONFIG` or `~/.kube/config`."""
    context: Annotated[str, Field(min_length=1)] | None = None
    """Context of a kubeconfig file, if it is not the file's current one."""

    @model_validator(mode="after")
    def _one_way(self) -> KubernetesSource:
        if sum((self.selector is not None, self.pool is not None, bool(self.services))) != 1:
            raise ValueError('give one of "selector", "pool" and "services"')
        if bool(self.ports) != (self.selector is not None):
            raise ValueError('"selector" and "ports" belong together: give both, or neither')
        if len(set(self.ports)) != len(self.ports):
            raise ValueError("ports: one is given twice")
        return self

    @property
    def label(self) -> str:
        """What operators call it: ``kubernetes:llm/pool/chat``."""
        where = [self.kubeconfig, self.context, self.namespace]
        if self.pool is not None:
            what = f"pool/{self.pool}"
        elif self.selector is not None:
            what = f"{self.selector}:{','.join(map(str, self.ports))}"
        else:
            what = ",".join(f"{role}={name}" for role, name in self.services.items())
        return "kubernetes:" + "/".join([*(each for each in where if each is not None), what])


SOURCE_TYPES = ("dns", "docker", "kubernetes")
"""What ``type`` of a source may be."""
SourceConfig = Annotated[DnsSource | DockerSource | KubernetesSource, Field(discriminator="type")]


def source_problems(sources: Iterable[SourceConfig]) -> list[str]:
    """Return a line for each source that cannot be followed here, or that is there already."""
    problems: list[str] = []
    seen: list[str] = []
    for index, source in enumerate(sources):
        key = f"discovery[{index}]"
        if source.label in seen:  # an instance has one role, and a source is known by its name
            problems.append(f"{key}: is {source.label} as well as discovery[{seen.index(source.label)}]")
        seen.append(source.label)
        try:
            if isinstance(source, DockerSource):
                source.check()
        except ValueError as error:
            problems.append(f"{key}: {error}")
        try:
            if isinstance(source, DnsSource | DockerSource) and source.api_key is not None:
                source.api_key.read()
        except ValueError as error:
            problems.append(f"{key}.api_key: {error}")
    return problems
