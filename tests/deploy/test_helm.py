"""The Helm chart, by the real helm: Kubernetes, the scheduler and Envoy accept what it renders."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from packaging.version import Version

from tests.support.chart import (
    ADMIN,
    DEFAULTS,
    EPP,
    MOUNTS,
    NAME,
    ROUTED,
    SHARED,
    TLS,
    Values,
    accepted,
    merged,
    render,
)
from tests.support.helm import CHART, NAMESPACE, RELEASE, run
from tests.support.kubernetes_schema import containers, of_kind, pods, the_only
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler import __version__
from vllm_pd_scheduler.cli import app
from vllm_pd_scheduler.envoy.configuration import render_config
from vllm_pd_scheduler.envoy.drain import DRAIN_TIME_S
from vllm_pd_scheduler.envoy.ports import EnvoyPorts
from vllm_pd_scheduler.envoy.process import find_envoy
from vllm_pd_scheduler.envoy.schedulers import SchedulerAddress

pytestmark = pytest.mark.usefixtures("helm")


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
    done = subprocess.run([shell, flag, script], capture_output=True, text=True, timeout=HUNG_S)
    assert done.returncode == 0, done.stderr
    (envoy,) = pod["containers"]
    arguments = [each.replace("/etc/envoy", str(tmp_path)) for each in envoy["args"]]
    done = subprocess.run(
        [find_envoy(), *arguments, "--mode", "validate"], capture_output=True, text=True, timeout=HUNG_S
    )
    assert done.returncode == 0, done.stderr
    printed = yaml.safe_load((tmp_path / "envoy.yaml").read_text())
    ports = EnvoyPorts(
        prefill=None,
        address=values.get("listenHost", "0.0.0.0"),
        grpc_socket=config.grpc_socket,
        continuation=config.continuation_port,
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
