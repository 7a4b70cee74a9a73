"""The configuration: every setting, its type and its default."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ..connectors.encode import EncodeConnectorName
from ..models import InstanceRole, PDInstance
from ..request.path import PUBLIC_PATH, PUBLIC_PATHS
from ..request.rewrites import Rewrite
from ..telemetry.log_lines import LogFormat
from .aliases import AliasConfig
from .fleet_instance import fleet_instance, rank_count
from .instances import ConnectorSetting, InstanceConfig, InstancesFile, ModelName, Port, SecretSource
from .kv_events import KvEventsConfig
from .presets import PresetName, filled
from .replicas import ReplicasConfig
from .sources import SourceConfig
from .tls import InstanceTlsConfig, TlsConfig
from .tracing import TracingConfig
from .turning import TurningConfig
from .values import (
    HEADER,
    PATH,
    SOCKET,
    WEEK_S,
    BaseUrl,
    Bytes,
    Disaggregating,
    ListenerUrl,
    ListenHost,
    Probes,
    Revision,
    Seconds,
    Share,
    Weight,
)


class NeedsRestart:
    """Marks a key of the configuration that counts only from the next start on. All others are live."""


_AT_START = NeedsRestart()


class SchedulerConfig(InstancesFile):
    """The whole configuration: ``docs/configuration.md`` is generated from it.

    A field's docstring is its documentation: Markdown, with links as from ``docs/``.
    """

    preset: PresetName | None = None
    """Settings that go well together: `low_latency` is `"strategy": "slo"`, `"disaggregation": "tpot"` and
    `"late_binding": true`. Those of them that are given beside it stay as given. See [One
    line](scheduling.md#one-line)."""
    strategy: str = "least_load"
    """How instances are chosen: the name of a [strategy](strategies.md), or `package.module:Class`. Change
    it when prompts differ much in length or share prefixes."""
    prefill_strategy: str | None = None
    """The strategy for P, if it is another one."""
    decode_strategy: str | None = None
    """The strategy for D, if it is another one."""
    shadow_strategy: str | None = None
    """A second strategy that is compared with the one in use on live requests and never followed; see
    [Shadow](shadow.md)."""
    load_weight: Weight = 0.5
    """Weight of the load, for the strategy `weighted`."""
    kv_cache_weight: Weight = 0.3
    """Weight of the KV-cache use, for the strategy `weighted`."""
    latency_weight: Weight = 0.2
    """Weight of the latency, for the strategy `weighted`."""

    health_check_interval: Annotated[float, Field(ge=0.05, le=3600)] = 5.0
    """Seconds between two health checks of an instance, which also read its load, and its models every third
    time. One that is down is checked at least every second. Lower it for fresher loads; a check takes half a
    millisecond of CPU."""
    health_check_timeout: Seconds = 2.0
    """Seconds that `/health`, `/metrics` and `/v1/models` of an instance may take together, and again the
    first look-up of its name. Raise it if busy instances fail checks. A P that is unhealthy and answers
    nothing for five times as long hangs: prefills that wait there are given up."""
    unhealthy_threshold: Probes = 2
    """Health checks that must fail in a row before an instance gets no more requests."""
    healthy_threshold: Probes = 1
    """Health checks that must succeed in a row before an instance gets requests again."""

    session_header: Annotated[str, Field(pattern=HEADER)] = "x-session-id"
    """The request header that names a conversation, for the strategy `session`."""
    ttft_slo: Seconds | None = None
    """Seconds to the first token that the strategy `slo` tries to keep, for requests without the header
    `x-pd-ttft-slo-ms`."""
    tpot_slo: Seconds | None = None
    """Seconds for each further token that the strategy `slo` tries to keep, for requests without the header
    `x-pd-tpot-slo-ms`."""
    disaggregation: Disaggregating = "always"
    """Which requests are split: `always` all that can be, `never` none, a number those with at least so
    many prompt tokens, `auto` those that cost less so, `tpot` those that D would not read
    sooner or would slow its answers down too much for. See [Conditional
    disaggregation](scheduling.md#conditional-disaggregation)."""
    prefill_leg: Literal["scheduler", "sidecar"] = "scheduler"
    """Who sends the prefill to P: the `scheduler`, or a `sidecar` at D as
    [llm-d has them](llm-d.md#with-llm-ds-sidecar). To a sidecar the scheduler names P in the header
    `x-prefiller-host-port`, and calls no P itself."""
    connector: ConnectorSetting = "auto"
    """The [connector](connectors.md) of the instances, as `"nixl"` or `{"type": "nixl"}`: how P hands a
    prompt's KV cache over to D. `auto` is NIXL's, pulled or pushed, as P's answers show."""
    encode_connector: EncodeConnectorName = "ec-nixl"
    """How the [encode instances](connectors/encode.md) hand over images, video and audio that they
    have encoded: `ec-nixl` by what E answers, which P gets (vLLM's `ECCPUConnector`), `ec-example` by storage
    that they share (`ECExampleConnector`)."""
    encode_timeout: Seconds = 30.0
    """Seconds that one attempt to encode an item may take; then another E is tried, and at last P encodes it.
    All items of a request together have twice as long."""
    tokenize_once: bool = True
    """Whether D gets a chat's token ids from P, where both are vLLM 0.28 or newer, and need not tokenize it a
    second time. See [Tokenize once](connectors.md#tokenize-once)."""
    late_binding: bool = False
    """Whether requests wait in the scheduler until a P is nearly free, the shortest first. Turn it on when
    prompts differ much in length and P has a queue; see [Late binding](scheduling.md#late-binding)."""

    max_waiting: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """An instance with so many waiting requests is full: it gets nothing more while others have less. 2 to
    4 keep P busy and little of the queue in vLLM."""
    max_kv_usage: Annotated[float, Field(gt=0, le=1)] | None = None
    """An instance with this share of its KV cache in use or reserved is full. 0.9 keeps D from preempting."""
    max_in_flight_tokens: Annotated[int, Field(ge=1, le=10**12)] | None = None
    """An instance with so many tokens of our requests is full: on P those to compute, on D prompt and
    expected answer. Better than `max_waiting` when prompts differ much in length."""
    queue_size: Annotated[int, Field(ge=0, le=1_000_000)] = 1024
    """Requests that may wait in the scheduler when all instances are full. More are answered 429, or
    displace one of a lower priority. 0 refuses at once."""
    queue_bytes: Bytes = 256 << 20
    """Bytes of the bodies of those requests; more are answered 429."""
    queue_timeout: Seconds = 30.0
    """Seconds that a request may wait in the scheduler before it is answered 429. Keep it below the
    clients' own time limit."""
    max_held_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 50)] = 1 << 30
    """Bytes of all bodies that the scheduler holds, waiting or in prefill; more are answered 429. It bounds
    the scheduler's [memory](reliability.md#memory) at about three times this."""

    max_retries: Annotated[int, Field(ge=0, le=16), _AT_START] = 3
    """Further P that are tried after a failed prefill, and further D that Envoy tries. `up` tells its Envoy;
    an Envoy of yours needs the same as `num_retries` (3 in `envoy/envoy.yaml`; `envoy-config --config` prints
    it)."""
    prefill_timeout: Seconds = 120.0
    """Seconds that one prefill attempt may take; then another P is tried. Raise it for prompts that take
    longer."""
    on_prefill_failure: Literal["local", "fail"] = "local"
    """What happens when no P can prefill: `local` lets D prefill, `fail` answers 503. `fail` protects the
    time per token of a D fleet that cannot take prefills."""
    max_local_prefill_share: Share = 1.0
    """At most this share of the last 100 requests is prefilled on D because P failed; the others get 503.
    Lower it for the same reason."""
    decode_first_byte_timeout: Seconds = 20.0
    """Seconds until the first byte of a streamed answer; then another D is tried. When most attempts of the
    fleet take longer than their limit, the limits grow, up to ten times."""
    stream_idle_timeout: Annotated[Seconds, _AT_START] = 300.0
    """Longest pause of a streamed answer in seconds, also before its first token: vLLM sends the headers
    before it has done anything. Then the stream is cut. `up` gives it to Envoy; an Envoy of yours has it as
    `per_try_idle_timeout` and, a second longer, `idle_timeout` of the same routes in `envoy/envoy.yaml`."""
    decode_seconds_per_token: Annotated[float, Field(ge=0, le=3600)] = 0.1
    """Seconds on top of that for each token of `max_tokens`, when the answer is not streamed."""
    kv_lease_duration: Seconds = 30.0
    """vLLM's setting of that name, in seconds: how long P keeps a hand-off. A hand-off is used within 80 %
    of it. It must not be above vLLM's, or a D can read blocks that are another prompt's by then."""
    ejection_failures: Annotated[int, Field(ge=1, le=1_000_000)] = 3
    """An instance is ejected after so many failed requests in a row."""
    ejection_success_rate: Share = 0.5
    """An instance is ejected when less than this share of its last 20 requests succeeded."""
    ejection_pause: Seconds = 1.0
    """Seconds that an ejection lasts at least. It doubles each time that the trial request fails, up to
    30."""
    max_ejected_share: Share = 0.5
    """At most this share of a role is ejected at once."""
    self_check_interval: Annotated[float, Field(ge=1, le=WEEK_S)] | None = None
    """Seconds between two [self-checks](reliability.md#self-check) of each model: whether a D answers the
    same with a hand-off as without. A pair of P and D that gives wrong texts gets no more hand-offs. Without
    it there are none. Each is two requests of some 300 tokens."""
    drain_timeout: Annotated[float, Field(ge=0, le=WEEK_S)] = 30.0
    """Seconds that running requests may take to end after SIGTERM, and that `drain?wait=true` waits.
    Whatever sends SIGKILL must wait longer."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 30), _AT_START] = 64 << 20
    """Largest request body in bytes, if `max_held_bytes` is not less; a larger one is answered 413. Envoy
    has limits of its own: `per_connection_buffer_limit_bytes` and `max_request_bytes` in
    `envoy/envoy.yaml`."""

    public_paths: Annotated[list[Annotated[str, Field(pattern=PUBLIC_PATH)]], _AT_START] = list(PUBLIC_PATHS)
    """[Paths that clients may ask for](security.md#public-paths), beside the two for completions, `/health`
    and `/ping`; all others are answered 404. `*` stands for one segment. Give an Envoy of yours the same
    list: `envoy-config --config` prints its configuration with it."""
    prefill_listener: Annotated[ListenerUrl | None, _AT_START] = None
    """Envoy's prefill listener, as `http://HOST:PORT`: `http://127.0.0.1:10001` for the one in
    `envoy/envoy.yaml`. With it the prefill leg takes [a way through Envoy](architecture.md#the-prefill-leg),
    without it the scheduler sends it to P itself, for less CPU. `up` and `envoy-config --config` give Envoy
    the listener if this is set, on its port."""
    continuation_port: Annotated[Port | None, _AT_START] = None
    """Port of this machine, such as 9004, at which the scheduler takes streams that
    [go on at another D](reliability.md#streams-that-go-on) when theirs dies: those of clients that send
    `x-pd-continue: true`. Without it that header says nothing. Envoy must be on the same machine, or in the
    same pod; `up` and `envoy-config --config` tell it. Such a stream ends with the scheduler. Of several
    [workers](workers.md) each has the next port."""
    continuation_ingress: Annotated[ListenerUrl, _AT_START] = "http://127.0.0.1:10000"
    """Where the scheduler reaches Envoy's ingress listener to ask for those streams, as `http://HOST:PORT`.
    `up` knows it."""
    grpc_host: Annotated[ListenHost, _AT_START] = "127.0.0.1"
    """Address that the gRPC server listens on: ext_proc, EDS and health for Envoy."""
    grpc_port: Annotated[Port, _AT_START] = 9002
    """Port of the gRPC server."""
    grpc_socket: Annotated[Annotated[str, Field(pattern=SOCKET)] | None, _AT_START] = None
    """Path of a Unix socket that the gRPC server listens on in place of `grpc_host` and `grpc_port`. Only the
    user that the scheduler runs as can open it. `up` makes one of its own unless one of the three is given;
    with `serve`, Envoy needs [its path](security.md#a-unix-socket)."""
    grpc_health_port: Annotated[Port | None, _AT_START] = None
    """A second port at `grpc_host`, without TLS, that answers [gRPC health checks](llm-d.md#health) and
    nothing else. Kubernetes' gRPC probes need it where `grpc_tls` is set."""
    grpc_tls: Annotated[TlsConfig | None, _AT_START] = None
    """TLS for the gRPC server. Use it when Envoy is on another machine; `up` does not take it."""
    admin_host: Annotated[ListenHost, _AT_START] = "127.0.0.1"
    """Address that the [admin interface](admin.md) listens on. Any but a loopback address needs
    `admin_token`."""
    admin_port: Annotated[Port, _AT_START] = 9003
    """Port of the admin interface."""
    admin_token: Annotated[SecretSource | None, _AT_START] = None
    """Where the bearer token of the admin interface is kept."""
    admin_tls: Annotated[TlsConfig | None, _AT_START] = None
    """TLS for the admin interface."""
    metaserver_host: Annotated[ListenHost, _AT_START] = "127.0.0.1"
    """Address that the listener of `metaserver_port` listens on: one at which all D can reach this process.
    With `0.0.0.0` or `::`, each D is told the address that this machine has towards it, in Kubernetes the
    pod's own."""
    metaserver_port: Annotated[Port | None, _AT_START] = None
    """Port at which D ask for prefills, which those of the connector
    [`ascend-layerwise`](connectors/ascend.md#ascend-layerwise) do. Without it, such D compute the prompts
    themselves."""
    metaserver_url: Annotated[BaseUrl | None, _AT_START] = None
    """What D are told in place of that address and port, as `http://HOST:PORT`, where they reach them by
    others. It must lead to this very process, not to any replica."""
    metaserver_callers: Literal["decode", "any"] = "decode"
    """Who may call there: `decode`, only from the IP address of the D that was chosen, or `any` who has the
    URL, of which 128 bits are random and new for each request. Choose `any` if D's calls come from another
    address than D's own."""
    metaserver_tls: Annotated[TlsConfig | None, _AT_START] = None
    """TLS for that listener."""
    models: Annotated[dict[ModelName, AliasConfig], Field(max_length=10_000)] = {}
    """[Aliases and canaries](models.md#aliases-and-canaries): by the name that requests ask for, the models
    that they get. `{"chat": {"targets": {"chat-v1": 95, "chat-v2": 5}}}` gives 5 % of the requests for `chat`
    to `chat-v2`."""
    revisions: Annotated[
        dict[Revision, Annotated[int, Field(ge=0, le=1_000_000)]], Field(max_length=1000)
    ] = {}
    """[Weights of the revisions](models.md#weights): `{"blue": 90, "green": 10}` gives those instances whose
    `revision` is `green` one in ten requests. What has no weight, or is not named, gets nothing; instances
    without a revision have the empty name. Without it the strategy chooses among all."""
    metrics_host: Annotated[ListenHost, _AT_START] = "127.0.0.1"
    """Address that the listener of `metrics_port` listens on."""
    metrics_port: Annotated[Port | None, _AT_START] = None
    """Port of a second listener with `/metrics`, `/healthz` and `/readyz` and nothing else, for a Prometheus
    that has no `admin_token`. The metrics name instances and models."""
    explain_header: bool = True
    """Whether a client that sends `x-pd-explain: 1` is told
    [why its request went where it went](scheduling.md#why-did-this-request-go-there), by the header
    `x-pd-decision` of the answer. It has ids of instances and their scores."""
    log_format: Annotated[LogFormat, _AT_START] = "text"
    """How a line of the log looks: [`text` for people, `json` for programs](admin.md#logs)."""
    state_file: Annotated[Annotated[str, Field(pattern=PATH)] | None, _AT_START] = None
    """File that [keeps changes made by the admin interface](admin.md#keep-changes-over-a-restart). Without
    it a restart forgets them."""

    turning: TurningConfig | None = None
    """Whether the scheduler itself gives instances with `both_roles` [the other role](ratio.md#by-itself), as
    `advise` says, and within which limits. Off without it."""
    kv_events: Annotated[KvEventsConfig | None, _AT_START] = None
    """Whether the engines' [KV events](scheduling.md#what-engines-tell) are heard, which tell what they have
    cached. Off without it."""
    replicas: Annotated[ReplicasConfig | None, _AT_START] = None
    """Where this scheduler meets the other [replicas](replicas.md) of the fleet, to choose as one with them.
    Without it, it is the only one."""
    tracing: Annotated[TracingConfig | None, _AT_START] = None
    """Whether requests are [traced](tracing.md), and where the traces go. Off without it."""

    api_key: SecretSource | None = None
    """Where the `--api-key` of the instances is kept. It replaces the client's `authorization`, so put
    authentication in Envoy. Without the scheduler it is not added, and instances that ask for one answer
    401 until it is back."""
    instance_tls: Annotated[InstanceTlsConfig | None, _AT_START] = None
    """TLS to the instances; `{}` trusts the system's authorities. See [TLS to the
    instances](security.md#to-the-instances)."""
    prefill_instances: list[InstanceConfig] = []
    """The P of the fleet, at least one, unless `instance_files` or `discovery` has some."""
    decode_instances: list[InstanceConfig] = []
    """The D of the fleet, at least one, unless `instance_files` or `discovery` has some."""
    encode_instances: list[InstanceConfig] = []
    """The [encode instances](connectors/encode.md) (E) of the fleet. Without any, P encodes what
    its requests have of images, video and audio."""
    instance_files: list[Annotated[str, Field(pattern=PATH)]] = []
    """JSON or YAML files with further instances, which are [watched](discovery.md#files): each has the three
    keys above."""
    discovery: list[SourceConfig] = []
    """Where else instances come from: DNS, Docker, Kubernetes. See [Discovery](discovery.md#sources)."""

    @model_validator(mode="before")
    @classmethod
    def _has_what_its_preset_says(cls, raw: Any) -> Any:
        return filled(raw)

    @field_validator("revisions")
    @classmethod
    def _gives_something(cls, weights: dict[str, int]) -> dict[str, int]:
        if weights and not any(weights.values()):
            raise ValueError("at least one weight must be above 0; {} has no weights")
        return weights

    @classmethod
    def needs_restart(cls, key: str) -> bool:
        """Whether a key counts only from the next start on."""
        return any(isinstance(mark, NeedsRestart) for mark in cls.model_fields[key].metadata)

    def take(self, other: SchedulerConfig, keys: Iterable[str]) -> None:
        """Have another configuration's values for some keys, from now on and wherever this object is read.

        Nothing else changes a configuration. All parts of a running scheduler read this one object, so that
        a value is either old or new for all, and to read it costs nothing more.
        """
        for key in keys:
            self.__dict__[key] = getattr(other, key)

    def differs(self, other: SchedulerConfig) -> list[str]:
        """Return the keys that have other values in another configuration."""
        return [key for key in type(self).model_fields if getattr(self, key) != getattr(other, key)]

    def strategy_of(self, role: InstanceRole) -> str:
        """Return the name of a role's strategy."""
        own = self.prefill_strategy if role is InstanceRole.PREFILL else self.decode_strategy
        return own or self.strategy

    def rewrites(self) -> list[Rewrite]:
        """Return the rules that the aliases are."""
        return [alias.rewrite(name) for name, alias in self.models.items()]

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
        source, ranks = item.api_key or self.api_key, rank_count(item, self.connector, self.prefill_leg)
        return fleet_instance(role, item, source, self.instance_tls, ranks)

    def masked(self) -> dict[str, Any]:
        """Return it as JSON for whoever may read it but shall learn no secret."""
        return self.model_dump(mode="json", context={"masked": True})

    def api_keys(self) -> list[SecretSource]:
        """Every source of an API key that is named, for all instances or for one."""
        sources = [self.api_key, *(item.api_key for _, _, item in self.listed())]
        sources += [getattr(source, "api_key", None) for source in self.discovery]
        return [source for source in sources if source is not None]
