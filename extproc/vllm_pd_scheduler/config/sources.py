"""What the configuration says of the sources of instances beside its own lists and files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .instances import Port, StrictModel

_Name = Annotated[str, Field(min_length=1, max_length=253)]


class DnsSource(StrictModel):
    """Instances of one role behind a DNS name."""

    type: Literal["dns"]
    """`"dns"`."""


class DockerSource(StrictModel):
    """Containers with labels."""

    type: Literal["docker"]
    """`"docker"`."""


class KubernetesSource(StrictModel):
    """Pods of one namespace."""

    type: Literal["kubernetes"]
    """`"kubernetes"`."""
    namespace: _Name | None = None
    """Namespace of the pods; without it the scheduler's own, or that of the kubeconfig's context."""
    selector: str | None = None
    """Label selector of the pods, as `kubectl get pods --selector` takes it."""
    ports: list[Port] = []
    """With `selector`: ports of each pod; each is an instance."""
    pool: _Name | None = None
    """Name of an `InferencePool`, which has selector and ports."""
    services: dict[Literal["prefill", "decode"], _Name] = {}
    """A service for each role, whose EndpointSlices are watched."""


SourceConfig = Annotated[DnsSource | DockerSource | KubernetesSource, Field(discriminator="type")]
