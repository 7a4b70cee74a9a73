"""The values of the Helm chart: each counts, a wrong one is refused, and all are described."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import generate_chart
from tests.support.chart import (
    ADMIN,
    EPP,
    POLICY,
    ROUTED,
    SHARED,
    TLS,
    Values,
    accepted,
    merged,
    render,
)
from tests.support.helm import CHART, objects, run, template
from tests.support.kubernetes_schema import check_schema, of_kind
from vllm_pd_scheduler import __version__

pytestmark = pytest.mark.usefixtures("helm")


PEERS = [{"podSelector": {"matchLabels": {"app": "x"}}}]

TOGGLES: list[tuple[str, Any, Values]] = [
    ("mode", "epp", {}),
    ("nameOverride", "pd", {}),
    ("fullnameOverride", "pd", {}),
    ("image.repository", "registry.example/pd", {}),
    ("image.tag", "0.2.0", {}),
    ("image.digest", f"sha256:{'0' * 64}", {}),
    ("image.pullPolicy", "Always", {}),
    ("imagePullSecrets", [{"name": "registry"}], {}),
    ("replicas", 2, {}),
    ("valkey.enabled", True, {"valkey": {"existingSecret": "valkey"}}),
    ("valkey.enabled", True, {**EPP, "valkey": {"existingSecret": "valkey"}}),
    ("valkey.existingSecret", "valkey", {"config": {"replicas": {"url": "valkey://valkey.example"}}}),
    ("valkey.secretKey", "key", SHARED),
    ("valkey.image.repository", "registry.example/valkey", SHARED),
    ("valkey.image.tag", "7.2", SHARED),
    ("valkey.storage", "1Gi", SHARED),
    ("valkey.storageClassName", "ssd", merged(SHARED, {"valkey": {"storage": "1Gi"}})),
    ("valkey.resources", {"limits": {"memory": "512Mi"}}, SHARED),
    ("fleet.matchLabels", {"app": "vllm", "team": "x"}, {}),
    ("fleet.ports", [8000, 8001], EPP),
    ("config.strategy", "predicted_latency", {}),
    ("config.drain_timeout", 120.5, {}),
    ("restartOnConfigChange", False, {}),
    ("listenHost", "::", {}),
    ("admin.existingSecret", "admin", {}),
    ("admin.secretKey", "key", ADMIN),
    ("apiKey.existingSecret", "vllm", {}),
    ("apiKey.secretKey", "key", {"apiKey": {"existingSecret": "vllm"}}),
    ("tls.admin", "admin-tls", ADMIN),
    ("tls.grpc", "grpc-tls", EPP),
    ("tls.grpc", "grpc-tls", SHARED),
    ("tls.instances.enabled", True, {}),
    ("tls.instances.existingSecret", "vllm-tls", {"tls": {"instances": {"enabled": True}}}),
    ("tls.instances.clientCertificate", True, TLS),
    ("tls.instances.serverName", "vllm.example", TLS),
    ("envoy.port", 8080, {}),
    ("envoy.adminPort", 9801, {}),
    ("envoy.concurrency", 4, {}),
    ("envoy.logLevel", "info", {}),
    ("envoy.statistics.enabled", True, {}),
    ("envoy.statistics.port", 9802, {"envoy": {"statistics": {"enabled": True}}}),
    ("envoy.resources", {"requests": {"cpu": "4"}}, {}),
    ("envoy.extraArgs", ["--component-log-level", "http:debug"], {}),
    ("envoy.extraVolumeMounts", [{"name": "config", "mountPath": "/x"}], {}),
    ("service.type", "LoadBalancer", {}),
    ("service.port", 8443, {}),
    ("service.port", 9102, EPP),
    ("service.appProtocol", "http2", EPP),
    ("service.annotations", {"example.com/internal": "true"}, {}),
    ("inferencePool.create", False, EPP),
    ("inferencePool.name", "chat", EPP),
    ("inferencePool.failureMode", "FailOpen", EPP),
    ("httpRoute.parentRefs", [{"name": "gateway"}], EPP),
    ("httpRoute.hostnames", ["llm.example"], ROUTED),
    ("httpRoute.pathPrefix", "/v1", ROUTED),
    ("httpRoute.requestTimeout", "3600s", ROUTED),
    ("httpRoute.annotations", {"example.com/x": "z"}, ROUTED),
    ("provider", "istio", EPP),
    ("objectives", [{"name": "batch", "priority": -1}], EPP),
    ("resources", {"requests": {"cpu": "500m"}}, {}),
    ("probes.liveness", {"periodSeconds": 20}, {}),
    ("probes.readiness", {"periodSeconds": 20}, {}),
    ("probes.startup", {"failureThreshold": 90}, {}),
    ("terminationGracePeriodSeconds", 600, {}),
    ("strategy", {"type": "Recreate", "rollingUpdate": None}, {}),
    ("podDisruptionBudget.enabled", True, {}),
    ("podDisruptionBudget.maxUnavailable", "50%", {"podDisruptionBudget": {"enabled": True}}),
    ("podDisruptionBudget.minAvailable", 1, {"podDisruptionBudget": {"enabled": True}}),
    ("autoscaling.enabled", True, {}),
    ("autoscaling.minReplicas", 3, {"autoscaling": {"enabled": True}}),
    ("autoscaling.maxReplicas", 9, {"autoscaling": {"enabled": True}}),
    ("autoscaling.targetCPUUtilizationPercentage", 80, {"autoscaling": {"enabled": True}}),
    (
        "autoscaling.metrics",
        [{"type": "Pods", "pods": {"metric": {"name": "x"}, "target": {"type": "Value", "value": "3"}}}],
        {"autoscaling": {"enabled": True}},
    ),
    (
        "autoscaling.behavior",
        {"scaleDown": {"stabilizationWindowSeconds": 600}},
        {"autoscaling": {"enabled": True}},
    ),
    ("monitor.enabled", True, {}),
    ("monitor.kind", "ServiceMonitor", {"monitor": {"enabled": True}}),
    ("monitor.interval", "30s", {"monitor": {"enabled": True}}),
    ("monitor.labels", {"release": "prometheus"}, {"monitor": {"enabled": True}}),
    ("networkPolicy.enabled", True, EPP),
    ("networkPolicy.clients", PEERS, POLICY),
    ("networkPolicy.monitoring", PEERS, POLICY),
    ("networkPolicy.operators", PEERS, {**POLICY, **ADMIN}),
    ("networkPolicy.instances", PEERS, {**POLICY, "config": {"metaserver_port": 9005}}),
    ("networkPolicy.egress", [{"ports": [{"port": 8000}]}], POLICY),
    ("serviceAccount.create", False, {}),
    ("serviceAccount.name", "pd", {}),
    ("serviceAccount.annotations", {"example.com/role": "x"}, {}),
    ("rbac.create", False, {}),
    ("podSecurityContext", {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000}, {}),
    ("securityContext", {"runAsUser": 1000}, {}),
    ("podLabels", {"team": "x"}, {}),
    ("podAnnotations", {"example.com/x": "z"}, {}),
    ("commonLabels", {"team": "x"}, {}),
    ("nodeSelector", {"pool": "cpu"}, {}),
    ("tolerations", [{"key": "x", "operator": "Exists"}], {}),
    ("affinity", {"nodeAffinity": {}}, {}),
    (
        "topologySpreadConstraints",
        [{"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}],
        {},
    ),
    ("priorityClassName", "high", {}),
    ("extraArgs", ["--log-level", "DEBUG"], {}),
    ("extraEnv", [{"name": "A", "value": "b"}], {}),
    ("extraVolumes", [{"name": "state", "emptyDir": {}}], {}),
    ("extraVolumeMounts", [{"name": "config", "mountPath": "/x"}], {}),
]
"""A value, another one than its default, and the values with which it counts."""


def at(path: str, value: Any) -> Values:
    """Values in which one, by its dotted path, is set."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


def test_lint() -> None:
    for values in ("mode=standalone", "mode=epp"):
        done = run("helm", "lint", "--strict", str(CHART), "--set", values)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["123", "0x10", "true", "null"])
@pytest.mark.parametrize("values", [POLICY, ROUTED], ids=["standalone", "epp"])
def test_a_name_that_yaml_would_take_for_something_else(values: Values, name: str) -> None:
    """Kubernetes takes all of them for names, of releases, accounts and pools."""
    more: Values = {"fullnameOverride": name, "nameOverride": name, "serviceAccount": {"name": name}}
    more |= {"admin": {"existingSecret": name}}
    if values is ROUTED:
        more |= {
            "inferencePool": {"create": True, "name": name},
            "objectives": [{"name": name, "priority": 1}],
        }
    done = template(merged(values, more), release=name)
    assert done.returncode == 0, done.stderr
    found = objects(done.stdout)
    check_schema(found)
    for each in found:
        metadata = each["metadata"]
        assert all(isinstance(text, str) for text in (metadata["name"], *metadata["labels"].values()))


def test_its_version_is_the_schedulers() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__


@pytest.mark.parametrize(
    ("path", "value", "context"),
    TOGGLES,
    ids=[f"{path}-{number}" for number, (path, *_) in enumerate(TOGGLES)],
)
def test_each_value_counts(path: str, value: Any, context: Values, mounted: Path) -> None:
    found = render(merged(context, at(path, value)))
    assert found != render(context)
    check_schema(found)
    accepted(found, mounted)
    assert not of_kind(found, "Secret")


def test_each_value_is_tried() -> None:
    documented = {row.split("`")[1] for row in generate_chart.rows()}
    assert documented <= {path for path, *_ in TOGGLES} | {"config"}


@pytest.mark.parametrize(
    "written", [generate_chart.README, generate_chart.SCHEMA], ids=lambda each: each.name
)
def test_what_is_made_of_it_is_up_to_date(written: Path) -> None:
    make = {generate_chart.README: generate_chart.readme, generate_chart.SCHEMA: generate_chart.schema}[
        written
    ]
    text = written.read_text(encoding="utf-8")
    assert text == make(text), "stale: run `make docs`"


@pytest.mark.parametrize(
    "wrong",
    [
        {"replica": 2},
        {"mode": "sidecar"},
        {"image": {"tags": "1"}},
        {"image": {"digest": "0123"}},
        {"envoy": {"port": "10000"}},
        {"envoy": {"host": "::"}},
        {"config": {"strategie": "x"}},
        {"config": {"max_retries": "3"}},
        {"config": {"grpc_port": 9002}},
        {"config": {"discovery": [{"type": "kubernetes", "selektor": "a=b", "ports": [1]}]}},
        {"fleet": {"ports": []}},
        {"listenHost": "0.0.0.0; id"},
        {"inferencePool": {"failureMode": "Open"}},
        {"objectives": [{"name": "x"}]},
    ],
    ids=str,
)
def test_a_typo_is_refused(wrong: Values) -> None:
    done = template(wrong)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"valkey": {"enabled": True}}, "needs valkey.existingSecret"),
        (
            {**SHARED, "config": {"replicas": {"url": "valkey://valkey.example"}}},
            "config.replicas.url names another server",
        ),
    ],
)
def test_half_a_server_is_refused(values: Values, said: str) -> None:
    done = template(values)
    assert done.returncode != 0
    assert said in done.stderr


def test_a_way_to_the_admin_without_a_token_is_refused() -> None:
    done = template({"tls": {"admin": "admin-tls"}})
    assert done.returncode != 0
    assert "tls.admin: needs admin.existingSecret" in done.stderr
