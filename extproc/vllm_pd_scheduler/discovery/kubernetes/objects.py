"""What is read of Kubernetes' objects: the fields that count here, and nothing else of them.

An API server writes ``null`` where another one leaves a field out, so both are read alike.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Raw, Struct, field


class Part(Struct, gc=False, rename="camel"):
    """A part of an object, or one as a whole."""


class Metadata(Part):
    """What every object has."""

    name: str
    uid: str = ""
    resource_version: str = ""
    creation_timestamp: str | None = None
    """RFC 3339 in UTC with whole seconds, so that the order of the texts is that of the times."""
    deletion_timestamp: str | None = None
    """Set as soon as somebody deletes it. It stays until it has ended, by its grace period."""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None

    def label(self, key: str) -> str | None:
        """Return the value of a label, ``None`` if there is no such label or nothing in it."""
        return (self.labels or {}).get(key) or None

    def annotation(self, key: str) -> str | None:
        """Return the value of an annotation, ``None`` if there is no such annotation."""
        return (self.annotations or {}).get(key)


class HasMetadata(Protocol):
    """An object of any kind."""

    @property
    def metadata(self) -> Metadata:
        """Return what every object has."""


class Named(Part):
    """Any object, of which the rest is not read."""

    metadata: Metadata


class Condition(Part):
    """Whether something is so."""

    type: str
    status: str


class PodIP(Part):
    """One of a pod's addresses."""

    ip: str | None = None


class PodStatus(Part):
    """How a pod is."""

    pod_ip: str | None = field(default=None, name="podIP")
    pod_ips: list[PodIP] | None = field(default=None, name="podIPs")
    conditions: list[Condition] | None = None


class Pod(Part):
    """A pod."""

    metadata: Metadata
    status: PodStatus = field(default_factory=PodStatus)

    @property
    def ip(self) -> str | None:
        """Its address, the first of several."""
        status = self.status
        return status.pod_ip or next((each.ip for each in status.pod_ips or () if each.ip), None)

    @property
    def usable(self) -> bool:
        """Whether new requests may go there: it is ready, and nobody has deleted it."""
        if self.metadata.deletion_timestamp is not None or self.ip is None:
            return False
        return any(each.type == "Ready" and each.status == "True" for each in self.status.conditions or ())


class TargetRef(Part):
    """The object that an endpoint stands for."""

    kind: str | None = None
    name: str | None = None
    uid: str | None = None


class EndpointConditions(Part):
    """How an endpoint is. What is not said is taken to be well."""

    ready: bool | None = None
    terminating: bool | None = None


class Endpoint(Part):
    """A server behind a service."""

    addresses: list[str]
    conditions: EndpointConditions | None = None
    target_ref: TargetRef | None = None


class EndpointPort(Part):
    """A port of all endpoints of a slice."""

    name: str | None = None
    port: int | None = None


class EndpointSlice(Part):
    """Some of the endpoints of a service (``discovery.k8s.io/v1``)."""

    metadata: Metadata
    address_type: str = "IPv4"
    endpoints: list[Endpoint] | None = None
    ports: list[EndpointPort] | None = None


class LabelSelector(Part):
    """Which labels an object must have, with these very values."""

    match_labels: dict[str, str] | None = None


class TargetPort(Part):
    """A port at which each pod of a pool serves."""

    number: int


class InferencePoolSpec(Part):
    """Which pods a pool has, and at which ports."""

    selector: LabelSelector
    target_ports: list[TargetPort]


class InferencePool(Part):
    """A pool of model servers (``inference.networking.k8s.io/v1``)."""

    metadata: Metadata
    spec: InferencePoolSpec


class PoolRef(Part):
    """The pool that an object is for."""

    name: str
    group: str | None = None


class InferenceObjectiveSpec(Part):
    """How much the requests that name an objective count."""

    priority: int | None = None
    """Higher goes first; below 0 such requests may be dropped. Not said: 0."""
    pool_ref: PoolRef | None = None
    pool_refs: list[PoolRef] | None = None
    """Newer versions have several in place of the one."""

    def is_for(self, pool: str | None) -> bool:
        """Whether it is for a pool; ``None``: whichever there is."""
        pools = [each for each in (self.pool_ref, *(self.pool_refs or ())) if each is not None]
        return pool is None or any(each.name == pool for each in pools)


class InferenceObjective(Part):
    """What requests can name to be more or less urgent (``llm-d.ai/v1alpha2``)."""

    metadata: Metadata
    spec: InferenceObjectiveSpec


class ModelMatch(Part):
    """A name of a model. There is one kind, ``Exact``."""

    value: str
    type: str | None = None


class RewriteMatch(Part):
    """What requests a rule is for."""

    model: ModelMatch | None = None


class RewriteTarget(Part):
    """What a model is called instead, for a share of the requests."""

    model_rewrite: str
    weight: int | None = None


class RewriteRule(Part):
    """A rule of a rewrite. Without matches it is for all requests."""

    matches: list[RewriteMatch] | None = None
    targets: list[RewriteTarget] | None = None


class InferenceModelRewriteSpec(Part):
    """The rules of a rewrite."""

    rules: list[RewriteRule]
    pool_ref: PoolRef | None = None

    def is_for(self, pool: str | None) -> bool:
        """Whether it is for a pool; ``None``: whichever there is."""
        return pool is None or (self.pool_ref is not None and self.pool_ref.name == pool)


class InferenceModelRewrite(Part):
    """Other names for the models that requests ask for (``llm-d.ai/v1alpha2``)."""

    metadata: Metadata
    spec: InferenceModelRewriteSpec


class StatusDetails(Part):
    """More of a failure."""

    retry_after_seconds: int | None = None


class Status(Part):
    """Why the API server does not do what it was asked for."""

    code: int | None = None
    reason: str | None = None
    message: str | None = None
    details: StatusDetails | None = None


class ListMetadata(Part):
    """What every list has."""

    resource_version: str = ""
    continue_: str | None = field(default=None, name="continue")
    """Where the next page begins, if there is one."""


class Bookmark(Part):
    """What a bookmark has in place of an object: how far the watch has come."""

    metadata: ListMetadata


class ObjectList(Part):
    """A page of a list, with its objects not read yet: one of them that makes no sense spoils no other."""

    metadata: ListMetadata
    items: list[Raw] | None = None


class Event(Part):
    """A line of a watch."""

    type: str
    object: Raw
