"""Writes ``docs/configuration.md`` from the configuration's models: ``make docs`` runs it.

What a key does, its type and its default come from ``config/schema.py`` and ``config/tls.py``. This file
decides which keys stand together, in which order, and has an example of each group.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.config.aliases import AliasConfig
from vllm_pd_scheduler.config.instances import ConnectorConfig, InstanceConfig, SecretSource
from vllm_pd_scheduler.config.kv_events import KvEventsConfig
from vllm_pd_scheduler.config.replicas import ReplicasConfig, ReplicasTlsConfig
from vllm_pd_scheduler.config.sources import DnsSource, DockerSource, DockerTls, KubernetesSource
from vllm_pd_scheduler.config.tls import InstanceTlsConfig, TlsConfig
from vllm_pd_scheduler.config.tracing import TracingConfig
from vllm_pd_scheduler.config.turning import TurningConfig

PAGE = Path(__file__).parent / "configuration.md"


@dataclass(frozen=True)
class Group:
    """Keys that are set together, and an example of them."""

    title: str
    about: str
    keys: tuple[str, ...]
    example: dict[str, Any]


GROUPS = (
    Group(
        "Instances",
        "The fleet. It needs at least one P and one D; everything else has a default. More of it can be in"
        " files that are watched: [Discovery](discovery.md).",
        ("prefill_instances", "decode_instances", "encode_instances", "instance_files", "discovery"),
        {
            "prefill_instances": [{"id": "prefill-0", "host": "10.0.0.11", "port": 8100}],
            "decode_instances": [
                {"id": "decode-0", "host": "10.0.0.21", "port": 8200},
                {"id": "decode-1", "host": "decode-1.vllm.internal", "port": 8200},
            ],
            "instance_files": ["/etc/pd/instances.yaml"],
        },
    ),
    Group(
        "Models",
        "Names that stand for others, and shares of a roll-out. What models there are is read from the"
        " instances: [Models](models.md).",
        ("models", "revisions"),
        {
            "models": {"chat": {"targets": {"chat-v1": 95, "chat-v2": 5}}},
            "revisions": {"blue": 90, "green": 10},
        },
    ),
    Group(
        "Strategies",
        "Who serves a request: [Strategies](strategies.md) helps to choose.",
        (
            "preset",
            "strategy",
            "prefill_strategy",
            "decode_strategy",
            "shadow_strategy",
            "session_header",
            "ttft_slo",
            "tpot_slo",
            "load_weight",
            "kv_cache_weight",
            "latency_weight",
        ),
        {
            "strategy": "least_load",
            "prefill_strategy": "predicted_latency",
            "shadow_strategy": "slo",
            "ttft_slo": 2.0,
        },
    ),
    Group(
        "Splitting and binding",
        "Which requests P prefills, when they are bound to one, and how it hands them over.",
        (
            *("disaggregation", "prefill_leg", "late_binding", "connector", "tokenize_once"),
            *("encode_connector", "encode_timeout", "kv_events", "turning"),
        ),
        {"strategy": "predicted_latency", "disaggregation": "auto", "late_binding": True},
    ),
    Group(
        "Queue and limits",
        "What happens when all instances are busy: [Overload](reliability.md#overload). Without the first"
        " three, requests wait in vLLM's own queues.",
        (
            "max_waiting",
            "max_in_flight_tokens",
            "max_kv_usage",
            "queue_size",
            "queue_bytes",
            "queue_timeout",
            "max_held_bytes",
            "max_body_bytes",
        ),
        {"max_waiting": 4, "max_kv_usage": 0.9, "queue_size": 500, "queue_timeout": 20.0},
    ),
    Group(
        "Failures",
        "How often and how long something is tried: [Reliability](reliability.md) says what clients see.",
        (
            "max_retries",
            "prefill_timeout",
            "on_prefill_failure",
            "max_local_prefill_share",
            "decode_first_byte_timeout",
            "stream_idle_timeout",
            "decode_seconds_per_token",
            "kv_lease_duration",
            "self_check_interval",
            "ejection_failures",
            "ejection_success_rate",
            "ejection_pause",
            "max_ejected_share",
            "drain_timeout",
        ),
        {"prefill_timeout": 60.0, "max_local_prefill_share": 0.2, "decode_first_byte_timeout": 10.0},
    ),
    Group(
        "Health checks",
        "How often instances are probed, and when the result counts.",
        ("health_check_interval", "health_check_timeout", "unhealthy_threshold", "healthy_threshold"),
        {"health_check_interval": 1.0, "health_check_timeout": 2.0, "unhealthy_threshold": 3},
    ),
    Group(
        "Listeners and state",
        "Where the scheduler listens, which way prefills take, and what it keeps.",
        (
            "grpc_host",
            "grpc_port",
            "grpc_health_port",
            "grpc_socket",
            "admin_host",
            "admin_port",
            "metrics_host",
            "metrics_port",
            "metaserver_host",
            "metaserver_port",
            "metaserver_url",
            "metaserver_callers",
            "prefill_listener",
            "continuation_port",
            "continuation_ingress",
            "state_file",
        ),
        {"grpc_port": 9102, "admin_port": 9103, "state_file": "scheduler_state.json"},
    ),
    Group(
        "Replicas",
        "Several schedulers of one fleet that choose as one would: [Replicas](replicas.md).",
        ("replicas",),
        {
            "replicas": {
                "url": "valkeys://scheduler@valkey.internal:6379",
                "password": {"file": "/run/secrets/valkey"},
                "key": "chat-fleet",
                "name": "a",
            }
        },
    ),
    Group(
        "Logs",
        "What the scheduler writes to stderr; [`--log-level`](cli.md#options) says how much.",
        ("log_format",),
        {"log_format": "json"},
    ),
    Group(
        "Traces",
        "Spans of each request by OpenTelemetry: [Tracing](tracing.md) says which.",
        ("tracing",),
        {"tracing": {"endpoint": "http://otel-collector:4318", "sample_ratio": 0.1}},
    ),
    Group(
        "Security",
        "Public paths, keys, tokens and TLS. [Security](security.md) says who is trusted, and what Envoy"
        " needs too.",
        (
            "public_paths",
            "explain_header",
            "api_key",
            "instance_tls",
            "admin_token",
            "admin_tls",
            "grpc_tls",
            "metaserver_tls",
        ),
        {
            "public_paths": ["/v1/models", "/v1/embeddings", "/v1/responses", "/v1/responses/*"],
            "explain_header": False,
            "api_key": {"env": "VLLM_API_KEY"},
            "instance_tls": {"ca": "/etc/pd/fleet-ca.pem"},
            "admin_host": "0.0.0.0",
            "admin_token": {"file": "/run/secrets/pd-admin"},
            "admin_tls": {"cert": "/etc/pd/scheduler.pem", "key": "/etc/pd/scheduler.key"},
        },
    ),
)

OBJECTS: dict[type[BaseModel], str] = {
    InstanceConfig: "instance",
    SecretSource: "secret",
    ConnectorConfig: "connector",
    InstanceTlsConfig: "instance TLS",
    TlsConfig: "server TLS",
    KvEventsConfig: "KV events",
    TurningConfig: "turning",
    TracingConfig: "tracing",
    ReplicasConfig: "replicas",
    ReplicasTlsConfig: "replicas TLS",
    AliasConfig: "alias",
    DnsSource: "DNS source",
    DockerSource: "Docker source",
    DockerTls: "Docker TLS",
    KubernetesSource: "Kubernetes source",
}
"""What a value that is an object is called, and where its keys are listed."""

HEAD = """\
# Configuration

<!-- Written by docs/generate_configuration.py from config/schema.py. Change those and run `make docs`. -->

The scheduler reads one JSON file, `--config FILE`. This is the least it needs:

```json
{
  "prefill_instances": [{"id": "prefill-0", "host": "10.0.0.11", "port": 8100}],
  "decode_instances": [{"id": "decode-0", "host": "10.0.0.21", "port": 8200}]
}
```

`vllm-pd-scheduler check --config FILE` prints the configuration with all its defaults. Unknown keys, wrong
types, keys that are given twice and the like are errors; it shows all of them at once, each with the path of
its key. Times are in seconds, sizes in bytes. A dash means that there is no default: the key is off unless it
is set. The examples below go beside the instances.

The file is [read again](discovery.md#change-the-configuration-while-it-runs) when it changes, on SIGHUP and
when asked. What it says then counts at once, but for the keys whose text ends in *needs a restart*.
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *(line for group in GROUPS for line in _group(group)), *_objects()])


def _group(group: Group) -> Iterator[str]:
    yield f"## {group.title}\n\n{group.about}\n"
    yield f"```json\n{_pretty(group.example)}\n```\n"
    yield from _table(SchedulerConfig, group.keys)


def _objects() -> Iterator[str]:
    yield "## Objects\n\nSome values are JSON objects with keys of their own.\n"
    for model, name in OBJECTS.items():
        yield f"### {name[0].upper()}{name[1:]}\n\n{model.__doc__}\n"
        yield from _table(model, tuple(model.model_fields))


def _table(model: type[BaseModel], keys: tuple[str, ...]) -> Iterator[str]:
    schema = model.model_json_schema()
    yield "| key | type | default | what it does |\n|---|---|---|---|"
    for key in keys:
        field = model.model_fields[key]
        if not field.description:
            raise ValueError(f"{model.__name__}.{key} has no docstring: say under it what it does")
        default = (
            "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        )
        text = " ".join(field.description.split()).replace("|", "\\|")
        if model is SchedulerConfig and SchedulerConfig.needs_restart(key):
            text += " *Needs a restart.*"
        yield f"| `{key}` | {_kind(schema['properties'][key])} | {default} | {text} |"
    yield ""


def _default(value: Any) -> str:
    if value is None or value in ([], {}):
        return "\N{EN DASH}"
    size = f" ({value >> 20} MiB)" if isinstance(value, int) and value >> 20 else ""
    return f"`{json.dumps(value)}`{size}"


def _kind(schema: dict[str, Any]) -> str:
    """Return what a value may be, in words."""
    if choice := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_kind(one) for one in choice if one != {"type": "null"})
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "$ref" in schema:
        names = {model.__name__: name for model, name in OBJECTS.items()}
        name = names[schema["$ref"].rpartition("/")[2]]
        return f"[{name}](#{name.lower().replace(' ', '-')})"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if schema["type"] == "array":
        return f"list of {_kind(schema['items'])}"
    if schema["type"] == "object":
        return f"object with a {_kind(schema['additionalProperties'])} a key"
    words = {"boolean": "true or false", "integer": "whole number"}
    return words.get(schema["type"], str(schema["type"])) + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    if "exclusiveMinimum" in schema:
        return f" above {schema['exclusiveMinimum']}" + (f", at most {most}" if most is not None else "")
    if least is not None and most is not None:
        return f", {least:,} to {most:,}"
    return f", at least {least:,}" if least is not None else ""


def _pretty(example: dict[str, Any]) -> str:
    """Return JSON with a line for each key, and for each entry of a list."""
    lines = []
    for key, value in example.items():
        if isinstance(value, list):
            entries = ",\n".join(f"    {json.dumps(entry)}" for entry in value)
            lines.append(f"  {json.dumps(key)}: [\n{entries}\n  ]")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
