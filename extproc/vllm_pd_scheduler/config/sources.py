"""What the configuration says of the sources of instances beside its own lists and files."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from .instances import Port, StrictModel

RoleName = Literal["prefill", "decode"]


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


class DnsSource(StrictModel):
    """Instances of one role behind a DNS name."""

    type: Literal["dns"]
    """`"dns"`."""


class DockerSource(StrictModel):
    """Containers with labels."""

    type: Literal["docker"]
    """`"docker"`."""


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
    }
    """Values of that label for each role; a pod may have both. `""` stands for a pod without the label."""
    model_label: _LabelKey | None = None
    """Label of a pod that says which model it serves. Without it that is read from its `/v1/models`."""
    revision_label: _LabelKey | None = None
    """Label of a pod that says to which roll-out it belongs: P hands over only to D of the same one."""
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
    def name(self) -> str:
        """What operators call it: ``kubernetes:llm/pool/chat``."""
        where = [self.kubeconfig, self.context, self.namespace]
        if self.pool is not None:
            what = f"pool/{self.pool}"
        elif self.selector is not None:
            what = f"{self.selector}:{','.join(map(str, self.ports))}"
        else:
            what = ",".join(f"{role}={name}" for role, name in self.services.items())
        return "kubernetes:" + "/".join([*(each for each in where if each is not None), what])


SourceConfig = Annotated[DnsSource | DockerSource | KubernetesSource, Field(discriminator="type")]
