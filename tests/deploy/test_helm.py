"""The Helm chart, by the real helm: Kubernetes, the scheduler and Envoy accept what it renders."""

import json
import re
import shlex
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from packaging.version import Version

from docs import generate_chart
from tests.support.certificates import make_certificates
from tests.support.helm import CHART, NAMESPACE, RELEASE, ToolMissing, objects, rendered, run, template, tool
from tests.support.kubernetes_schema import check_schema, containers, of_kind, pods, the_only
from tests.support.processes import spawned, unused_ports
from tests.support.valkey import SERVER, ask, needs_server, until_listening
from vllm_pd_scheduler import __version__
from vllm_pd_scheduler.cli import app
from vllm_pd_scheduler.config import SchedulerConfig, parse_config
from vllm_pd_scheduler.config.sources import KubernetesSource
from vllm_pd_scheduler.envoy.configuration import render_config
from vllm_pd_scheduler.envoy.drain import DRAIN_TIME_S
from vllm_pd_scheduler.envoy.ports import EnvoyPorts
from vllm_pd_scheduler.envoy.process import find_envoy
from vllm_pd_scheduler.envoy.schedulers import SchedulerAddress

Values = dict[str, Any]
Objects = list[dict[str, Any]]

NAME = f"{RELEASE}-vllm-pd-scheduler"
MOUNTS = "/etc/vllm-pd-scheduler"
DEFAULTS: Values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
EPP: Values = {"mode": "epp"}
ROUTED: Values = {**EPP, "httpRoute": {"parentRefs": [{"name": "gateway"}]}}
TLS: Values = {"tls": {"instances": {"enabled": True, "existingSecret": "vllm-tls"}}}
ADMIN: Values = {"admin": {"existingSecret": "admin"}}
SHARED: Values = {"valkey": {"enabled": True, "existingSecret": "valkey"}}
POLICY: Values = {"networkPolicy": {"enabled": True}}
PEERS = [{"podSelector": {"matchLabels": {"app": "x"}}}]


def merged(*several: Values) -> Values:
    found: Values = {}
    for values in several:
        for key, value in values.items():
            both = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = merged(found[key], value) if both else value
    return found


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


@pytest.fixture(autouse=True)
def _helm() -> None:
    try:
        tool("helm")
    except ToolMissing as error:
        pytest.skip(str(error))


@cache
def _rendered(values: str) -> Objects:
    return rendered(json.loads(values))


def render(values: Values) -> Objects:
    """The objects for these values; for the same ones once."""
    return _rendered(json.dumps(values, sort_keys=True))


def at(path: str, value: Any) -> Values:
    """Values in which one, by its dotted path, is set."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


def config_of(found: Objects) -> Values:
    loaded: Values = json.loads(the_only(found, "ConfigMap")["data"]["config.json"])
    return loaded


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pods have mounted."""
    folder = tmp_path_factory.mktemp("mounts")
    made = make_certificates(folder)
    for secret in ("admin-tls", "grpc-tls", "instance-tls"):
        (folder / secret).mkdir()
        (folder / secret / "ca.crt").write_bytes(Path(made.ca).read_bytes())
        (folder / secret / "tls.crt").write_bytes(Path(made.server["cert"]).read_bytes())
        (folder / secret / "tls.key").write_bytes(Path(made.server["key"]).read_bytes())
    secrets = ("admin", "token"), ("api-key", "api-key"), ("valkey", "password")
    for secret, name in secrets:
        (folder / secret).mkdir()
        for key in (name, "key"):
            (folder / secret / key).write_text("s3cret")
    return folder


def accepted(found: Objects, mounted: Path) -> SchedulerConfig:
    """The configuration of a rendered chart, as the scheduler reads it in its pod."""
    text = json.dumps(config_of(found)).replace(MOUNTS, str(mounted))
    return parse_config(json.loads(text))


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


@pytest.mark.parametrize("own", [True, False], ids=["own", "existing"])
def test_schedulers_that_share_know_each_other(own: bool, mounted: Path) -> None:
    """Each Envoy asks its own scheduler, and those of the other pods while that is away."""
    elsewhere: Values = {
        "config": {"replicas": {"url": "valkeys://valkey.example", "key": "blue"}},
        "valkey": {"existingSecret": "valkey"},
    }
    found = render({**(SHARED if own else elsewhere), **POLICY, "replicas": 3})
    check_schema(found)
    config = accepted(found, mounted)
    assert config.replicas is not None
    assert config.replicas.password is not None
    assert config.replicas.password.read() == "s3cret"
    ((host, port),) = config.replicas.meeting().addresses
    services = {each["metadata"]["name"]: each["spec"] for each in of_kind(found, "Service")}
    pod = the_only(found, "Deployment")["spec"]["template"]
    if own:
        server = the_only(found, "StatefulSet")["spec"]["template"]
        assert services[host]["selector"] == server["metadata"]["labels"]
        assert services[host]["ports"] == [{"name": "valkey", "port": port, "targetPort": "valkey"}]
        assert not services[host]["selector"].items() <= pod["metadata"]["labels"].items()
    else:
        assert not of_kind(found, "StatefulSet")
        assert (host, port, config.replicas.key) == ("valkey.example", 6379, "blue")
    peers = services[f"{NAME}-schedulers"]
    assert peers["clusterIP"] == "None"
    assert peers["selector"].items() <= pod["metadata"]["labels"].items()
    assert (config.grpc_host, config.grpc_port, config.grpc_socket) == ("0.0.0.0", 9002, None)
    (script,) = [each["command"][-1] for each in containers(pod["spec"]) if each["name"] == "envoy-config"]
    asked = [word for word in script.split() if word.endswith((":9002", ":9002,1"))]
    assert asked == ["127.0.0.1:9002", f"{NAME}-schedulers:9002,1"]
    assert not any(
        mount["name"] == "socket" for each in containers(pod["spec"]) for mount in each["volumeMounts"]
    )
    (spread,) = pod["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == peers["selector"]
    (policy,) = [each for each in of_kind(found, "NetworkPolicy") if each["metadata"]["name"] == NAME]
    (grpc,) = [rule for rule in policy["spec"]["ingress"] if rule["ports"] == [{"port": "grpc"}]]
    assert grpc["from"] == [{"podSelector": {"matchLabels": peers["selector"]}}]


def test_envoy_and_schedulers_show_each_other_certificates() -> None:
    found = render({**SHARED, "tls": {"grpc": "grpc-tls"}})
    assert config_of(found)["grpc_tls"] == {
        "cert": f"{MOUNTS}/grpc-tls/tls.crt",
        "key": f"{MOUNTS}/grpc-tls/tls.key",
        "client_ca": f"{MOUNTS}/grpc-tls/ca.crt",
    }
    for container in containers(the_only(found, "Deployment")["spec"]["template"]["spec"]):
        assert "grpc-tls" in [mount["name"] for mount in container["volumeMounts"]], container["name"]


def test_the_server_is_as_restricted_as_the_rest() -> None:
    pod = the_only(render(SHARED), "StatefulSet")["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"] == DEFAULTS["podSecurityContext"]
    (container,) = pod["containers"]
    assert container["securityContext"] == DEFAULTS["securityContext"]


@needs_server
def test_the_server_starts_with_its_password(tmp_path: Path) -> None:
    (container,) = the_only(render(SHARED), "StatefulSet")["spec"]["template"]["spec"]["containers"]
    shell, option, script = container["command"]
    (port,) = unused_ports(1)
    password = 'a "pass" \\ word #1'
    (tmp_path / "password").write_text(password)
    script = script.replace("/etc/valkey", str(tmp_path)).replace("/data", str(tmp_path))
    script = script.replace("valkey-server -", f"{SERVER} - --port {port} --bind 127.0.0.1")
    with spawned([shell, option, script]) as server:
        until_listening(port, server.process)
        assert ask(port, "PING").startswith("-NOAUTH")
        assert ask(port, "PING", password=password) == "+PONG\r\n"
        assert "always" in ask(port, "CONFIG", "GET", "appendfsync", password=password)
        server.signal(signal.SIGTERM)  # which the shell would not pass on
        assert server.wait() == 0


def test_a_way_to_the_admin_without_a_token_is_refused() -> None:
    done = template({"tls": {"admin": "admin-tls"}})
    assert done.returncode != 0
    assert "tls.admin: needs admin.existingSecret" in done.stderr


@pytest.mark.parametrize("values", [{}, EPP], ids=["standalone", "epp"])
def test_every_container_is_as_restricted_as_can_be(values: Values) -> None:
    found = render(values)
    several = list(pods(found))
    assert len(several) == 2  # the scheduler's, and the test's
    for pod in several:
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 65532
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        for container in containers(pod):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "privileged" not in context


def test_the_scheduler_alone_has_a_token_for_the_api_server() -> None:
    pod = the_only(render({}), "Deployment")["spec"]["template"]["spec"]
    with_token = [
        each["name"]
        for each in containers(pod)
        if any("serviceaccount" in mount["mountPath"] for mount in each["volumeMounts"])
    ]
    assert with_token == ["scheduler"]


def test_secrets_are_files_that_its_user_can_read() -> None:
    values = merged(ADMIN, TLS, {"apiKey": {"existingSecret": "vllm"}})
    found = render(values)
    pod = the_only(found, "Deployment")["spec"]["template"]["spec"]
    secrets = {each["name"]: each["secret"] for each in pod["volumes"] if "secret" in each}
    assert {name: each["secretName"] for name, each in secrets.items()} == {
        "admin": "admin",
        "api-key": "vllm",
        "instance-tls": "vllm-tls",
    }
    assert {each["defaultMode"] for each in secrets.values()} == {0o440}
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    assert "env" not in json.dumps([each.get("env") for each in containers(pod)])


SOURCES: dict[str, tuple[Values, Values]] = {
    "pods": ({"selector": "app=vllm", "ports": [8000]}, {"": {"pods"}}),
    "services": (
        {"services": {"prefill": "p", "decode": "d"}},
        {"discovery.k8s.io": {"endpointslices"}},
    ),
    "pool": (
        {"pool": "chat"},
        {
            "": {"pods"},
            "inference.networking.k8s.io": {"inferencepools"},
            "inference.networking.x-k8s.io": {"inferenceobjectives"},
            "llm-d.ai": {"inferencemodelrewrites", "inferenceobjectives"},
        },
    ),
}
"""A Kubernetes source, and what has to be read for it."""


def granted(found: Objects) -> dict[str, dict[str, set[str]]]:
    """What may be read: namespace, API group, resources."""
    for each in of_kind(found, "Role"):
        for rule in each["rules"]:
            assert rule["verbs"] == ["get", "list", "watch"]
    assert not of_kind(found, "ClusterRole")
    return {
        each["metadata"]["namespace"]: {
            group: set(rule["resources"]) for rule in each["rules"] for group in rule["apiGroups"]
        }
        for each in of_kind(found, "Role")
    }


@pytest.mark.parametrize("kind", SOURCES)
def test_the_role_has_what_the_sources_need(kind: str) -> None:
    entry, needed = SOURCES[kind]
    assert granted(render({"config": {"discovery": [{"type": "kubernetes", **entry}]}})) == {
        NAMESPACE: needed
    }


def test_each_namespace_of_a_source_has_a_role() -> None:
    (pods_entry, pods_needed), (services, services_needed) = SOURCES["pods"], SOURCES["services"]
    entries = [
        {"type": "kubernetes", "namespace": "a", **pods_entry},
        {"type": "kubernetes", "namespace": "b", **services},
        {"type": "kubernetes", "namespace": "b", **pods_entry},
    ]
    found = render({"config": {"discovery": entries}})
    assert granted(found) == {"a": pods_needed, "b": {**pods_needed, **services_needed}}
    for each in of_kind(found, "RoleBinding"):
        assert each["metadata"]["namespace"] in ("a", "b")
        assert each["subjects"] == [{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}]


def test_without_a_source_in_kubernetes_there_is_nothing_to_read() -> None:
    instances = {
        f"{role}_instances": [{"id": role, "host": "10.0.0.1", "port": port}]
        for role, port in (("prefill", 8000), ("decode", 8001))
    }
    found = render({"config": instances})
    assert not granted(found)
    assert "serviceAccountToken" not in json.dumps(found)
    assert config_of(found)["discovery"] == []


@pytest.mark.parametrize("values", [{}, EPP], ids=["standalone", "epp"])
def test_the_sources_are_the_pods_of_the_fleet(values: Values, mounted: Path) -> None:
    found = render(merged(values, {"fleet": {"matchLabels": {"app": "vllm"}, "ports": [8000, 8001]}}))
    (source,) = accepted(found, mounted).discovery
    assert isinstance(source, KubernetesSource)
    if values == EPP:
        pool = the_only(found, "InferencePool")
        assert source.pool == pool["metadata"]["name"]
        assert pool["spec"]["selector"]["matchLabels"] == {"app": "vllm"}
        assert pool["spec"]["targetPorts"] == [{"number": 8000}, {"number": 8001}]
    else:
        assert source.selector == "app=vllm"
        assert source.ports == [8000, 8001]


def test_a_gateway_finds_the_scheduler() -> None:
    found = render(merged(ROUTED, {"provider": "istio"}))
    service = the_only(found, "Service")
    (port,) = service["spec"]["ports"]
    assert the_only(found, "InferencePool")["spec"]["endpointPickerRef"] == {
        "name": service["metadata"]["name"],
        "port": {"number": port["port"]},
        "failureMode": "FailClose",
    }
    (rule,) = the_only(found, "HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"] == [
        {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": NAME}
    ]
    assert the_only(found, "DestinationRule")["spec"] == {
        "host": f"{NAME}.{NAMESPACE}.svc.cluster.local",
        "trafficPolicy": {"tls": {"mode": "SIMPLE", "insecureSkipVerify": True}},
    }


@pytest.mark.parametrize("values", [{}, EPP], ids=["standalone", "epp"])
def test_ports_and_paths_are_those_of_the_code(values: Values, mounted: Path) -> None:
    found = render(merged(values, ADMIN))
    config = accepted(found, mounted)
    pod = the_only(found, "Deployment")["spec"]["template"]["spec"]
    named = {
        port["name"]: port["containerPort"] for each in containers(pod) for port in each.get("ports", ())
    }
    assert named.pop("admin") == config.admin_port
    assert named.pop("metrics") == config.metrics_port
    assert named == ({"grpc": config.grpc_port} if values else {"http": EnvoyPorts().ingress})
    assert DEFAULTS["envoy"]["adminPort"] == EnvoyPorts().admin
    (scheduler,) = [each for each in containers(pod) if each["name"] == "scheduler"]
    command, *arguments = scheduler["args"]
    group: Any = typer.main.get_command(app)
    with group.commands[command].make_context(command, list(arguments)) as context:
        assert str(context.params["config"]) == f"{MOUNTS}/config/config.json"


def test_the_service_has_no_pods_but_ours() -> None:
    found = render({})
    selector = the_only(found, "Service")["spec"]["selector"].items()
    assert selector <= the_only(found, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    assert not selector <= the_only(found, "Pod")["metadata"]["labels"].items()


def test_there_is_time_to_drain(mounted: Path) -> None:
    for values in ({}, {"config": {"drain_timeout": 120}}, {"config": {"drain_timeout": 0}}, EPP):
        found = render(values)
        pod = the_only(found, "Deployment")["spec"]["template"]["spec"]
        timeout = accepted(found, mounted).drain_timeout
        (hook,) = [each["lifecycle"]["preStop"] for each in containers(pod) if "lifecycle" in each]
        command = hook["exec"]["command"]
        before = max(timeout, DRAIN_TIME_S) if values != EPP else timeout + float(command[1])
        assert pod["terminationGracePeriodSeconds"] >= before + 10


def test_envoy_is_drained_before_its_sigterm_and_the_scheduler_stops_after_it() -> None:
    pod = the_only(render({"config": {"drain_timeout": 90}}), "Deployment")["spec"]["template"]["spec"]
    prints, scheduler = pod["initContainers"]
    (envoy,) = pod["containers"]
    assert "restartPolicy" not in prints
    assert scheduler["restartPolicy"] == "Always"  # a sidecar: it starts before Envoy and stops after it
    assert "lifecycle" not in scheduler  # its restart alone must not drain Envoy
    program, command, *arguments = envoy["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "vllm-pd-scheduler"
    group: Any = typer.main.get_command(app)
    with group.commands[command].make_context(command, list(arguments)) as context:
        assert context.params["timeout"] == 90
        assert context.params["envoy_admin_port"] == EnvoyPorts().admin
    assert float(envoy["args"][envoy["args"].index("--drain-time-s") + 1]) == DRAIN_TIME_S


def test_envoy_is_one_that_can_drain_and_choose() -> None:
    """Both containers are of one image, which the Dockerfile builds."""
    pod = the_only(render({}), "Deployment")["spec"]["template"]["spec"]
    assert {each["image"] for each in containers(pod)} == {f"vllm-pd-scheduler:{__version__}"}
    printed = subprocess.run([find_envoy(), "--version"], capture_output=True, text=True).stdout
    (version,) = re.findall(r"/(\d+\.\d+\.\d+)/", printed)
    assert Version(version) >= Version("1.37")


@pytest.mark.parametrize(
    "values",
    [
        {},
        SHARED,
        {**SHARED, "tls": {"grpc": "grpc-tls"}},
        merged(TLS, {"envoy": {"statistics": {"enabled": True}}, "listenHost": "::"}),
    ],
    ids=["default", "shared", "shared by TLS", "all"],
)
def test_envoy_starts_with_what_the_pod_prints(values: Values, mounted: Path, tmp_path: Path) -> None:
    found = render(values)
    config = accepted(found, mounted)
    text = the_only(found, "ConfigMap")["data"]["config.json"].replace(MOUNTS, str(mounted))
    (mounted / "config").mkdir(exist_ok=True)
    (mounted / "config" / "config.json").write_text(text)
    pod = the_only(found, "Deployment")["spec"]["template"]["spec"]
    shell, flag, script = pod["initContainers"][0]["command"]
    script = script.replace(MOUNTS, str(mounted)).replace("/etc/envoy", str(tmp_path))
    script = script.replace(
        "exec vllm-pd-scheduler", f"exec {shlex.quote(sys.executable)} -m vllm_pd_scheduler"
    )
    done = subprocess.run([shell, flag, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (envoy,) = pod["containers"]
    arguments = [each.replace("/etc/envoy", str(tmp_path)) for each in envoy["args"]]
    done = subprocess.run(
        [find_envoy(), *arguments, "--mode", "validate"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    printed = yaml.safe_load((tmp_path / "envoy.yaml").read_text())
    ports = EnvoyPorts(
        prefill=None, address=values.get("listenHost", "0.0.0.0"), grpc_socket=config.grpc_socket
    )
    peers = [
        SchedulerAddress("127.0.0.1:9002"),
        SchedulerAddress(f"{NAME}-schedulers:9002", priority=1),
    ]
    assert printed == render_config(
        ports,
        config.instance_tls,
        config.stream_idle_timeout,
        config.max_retries,
        config.public_paths,
        peers if config.replicas else (),
        config.grpc_tls,
    )


def test_the_statistics_are_those_of_the_readme() -> None:
    text = (CHART.parents[1] / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## Prometheus and Grafana\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    found = render({"envoy": {"statistics": {"enabled": True}}})
    arguments = the_only(found, "Deployment")["spec"]["template"]["spec"]["containers"][0]["args"]
    added = json.loads(arguments[arguments.index("--config-yaml") + 1])
    assert added["static_resources"] == yaml.safe_load(block)


@pytest.mark.parametrize("kind", ["PodMonitor", "ServiceMonitor"])
def test_what_is_scraped_is_there(kind: str) -> None:
    found = render({"monitor": {"enabled": True, "kind": kind}, "envoy": {"statistics": {"enabled": True}}})
    spec = the_only(found, kind)["spec"]
    asked = spec["podMetricsEndpoints" if kind == "PodMonitor" else "endpoints"]
    assert [(each["port"], each["path"]) for each in asked] == [
        ("metrics", "/metrics"),
        ("statistics", "/stats/prometheus"),
    ]
    wanted = spec["selector"]["matchLabels"].items()
    if kind == "PodMonitor":
        pod = the_only(found, "Deployment")["spec"]["template"]
        assert wanted <= pod["metadata"]["labels"].items()
        offered = {port["name"] for each in containers(pod["spec"]) for port in each.get("ports", ())}
    else:
        (service,) = [
            each for each in of_kind(found, "Service") if wanted <= each["metadata"]["labels"].items()
        ]
        offered = {port["name"] for port in service["spec"]["ports"]}
    assert {each["port"] for each in asked} <= offered


def test_a_change_of_the_configuration_replaces_the_pods_unless_told_not_to() -> None:
    def annotations(values: Values) -> Any:
        return the_only(render(values), "Deployment")["spec"]["template"]["metadata"]["annotations"]

    one, other = ({"config": {"queue_size": size}} for size in (1, 2))
    assert annotations(one) != annotations(other)
    live = {"restartOnConfigChange": False}
    assert annotations({**one, **live}) == annotations({**other, **live})


@pytest.mark.parametrize("values", [{}, EPP], ids=["standalone", "epp"])
def test_the_scripts_of_the_test_pod_are_python(values: Values) -> None:
    (container,) = the_only(render(values), "Pod")["spec"]["containers"]
    _, _, script = container["command"]
    compile(script, "test", "exec")


def test_the_notes_say_how_to_ask() -> None:
    for values, asked in (
        ({}, "/v1/chat/completions"),
        (EPP, "set httpRoute.parentRefs"),
        (ROUTED, "status"),
    ):
        arguments = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        done = run(
            *("helm", "install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--dry-run=client"),
            *(each for one in arguments for each in ("--set-json", one)),
        )
        assert done.returncode == 0, done.stderr
        assert asked in done.stdout.partition("NOTES:")[2]
