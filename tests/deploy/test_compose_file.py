"""The deployment's files fit together, and fit envoy.yaml and the configuration's defaults."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from docker.utils import exclude_paths

from tests.support.compose_file import (
    COMPOSE,
    OBSERVABILITY,
    ROOT,
    VLLM_COMPOSE,
    Service,
    mounts,
    read_services,
)
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.config import SchedulerConfig, load_config
from vllm_pd_scheduler.envoy.ports import EnvoyPorts

DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
PORTS = EnvoyPorts()
SERVICES = read_services(COMPOSE)
VLLM = read_services(VLLM_COMPOSE, {"HOST_IP": "192.0.2.1"})
OBSERVERS = read_services(OBSERVABILITY, {"GRAFANA_PASSWORD": "secret"})
INSTANCES = {name: service for name, service in SERVICES.items() if name.startswith(("prefill", "decode"))}


def mounted_at(service: Service, target: str) -> Any:
    return next(source for source, there in mounts(service, COMPOSE.parent) if there == f"{target}:ro")


@pytest.fixture(scope="module")
def config() -> SchedulerConfig:
    scheduler = SERVICES["scheduler"]
    return load_config(mounted_at(scheduler, scheduler["command"][-1]))


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_mounted_files_are_there() -> None:
    volumes = yaml.safe_load(OBSERVABILITY.read_text(encoding="utf-8"))["volumes"]
    for service in (*SERVICES.values(), *OBSERVERS.values()):
        for source, _ in mounts(service, COMPOSE.parent):
            assert source.is_file() or source.name in volumes, source


def test_envoy_and_scheduler_share_the_network_of_a_service_that_does_nothing_else() -> None:
    joined = {
        name: service["network_mode"] for name, service in SERVICES.items() if "network_mode" in service
    }
    assert joined == {"scheduler": "service:pod", "envoy": "service:pod"}
    assert SERVICES["pod"]["entrypoint"] == ["sleep", "infinity"]


def test_only_the_ingress_is_published_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"pod": [f"127.0.0.1:{PORTS.ingress}:{PORTS.ingress}"]}


def test_envoy_runs_the_repository_s_configuration() -> None:
    envoy = SERVICES["envoy"]
    source = mounted_at(envoy, option(envoy["command"], "-c"))
    assert source == ROOT / "envoy" / "envoy.yaml"


def test_envoy_and_scheduler_agree_on_ports(config: SchedulerConfig) -> None:
    envoy = yaml.safe_load((ROOT / "envoy" / "envoy.yaml").read_text(encoding="utf-8"))
    listeners = {
        listener["name"]: listener["address"]["socket_address"]
        for listener in envoy["static_resources"]["listeners"]
    }
    assert listeners["ingress"]["port_value"] == PORTS.ingress
    assert config.prefill_listener is None
    assert config.grpc_port == PORTS.grpc


def test_configuration_lists_exactly_the_simulated_instances(config: SchedulerConfig) -> None:
    listed = {instance.instance_id: instance for instance in config.instances()}
    assert listed.keys() == INSTANCES.keys()
    for name, service in INSTANCES.items():
        assert listed[name].host == name == service["hostname"]
        assert listed[name].role == option(service["command"], "--role")
        assert str(listed[name].port) == option(service["entrypoint"], "--port")


def test_health_is_asked_where_it_is_answered(config: SchedulerConfig) -> None:
    image = urlsplit(re.findall(r"HEALTH_URL=(\S+)", DOCKERFILE.read_text(encoding="utf-8"))[0])
    assert (image.port, image.path) == (config.admin_port, "/readyz")
    assert SERVICES["pod"]["environment"]["HEALTH_URL"] == f"http://127.0.0.1:{PORTS.ingress}/health"
    for service in INSTANCES.values():
        port = option(service["entrypoint"], "--port")
        assert service["environment"]["HEALTH_URL"] == f"http://127.0.0.1:{port}/health"


@pytest.mark.parametrize("name", SERVICES)
def test_containers_have_no_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == "65532:65532"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_scheduler_has_time_to_drain(config: SchedulerConfig) -> None:
    assert int(SERVICES["scheduler"]["stop_grace_period"].rstrip("s")) > config.drain_timeout


@pytest.mark.parametrize(("name", "role"), [("prefill", "kv_producer"), ("decode", "kv_consumer")])
def test_vllm_hands_off_by_nixl_under_a_new_engine_id_at_each_start(name: str, role: str) -> None:
    transfer = json.loads(option(VLLM[name]["command"], "--kv-transfer-config"))
    assert transfer["kv_connector"] == "NixlConnector"
    assert transfer["kv_role"] == role
    assert "engine_id" not in transfer
    assert VLLM[name]["environment"]["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "192.0.2.1"


def test_vllm_decode_recomputes_what_did_not_arrive() -> None:
    transfer = json.loads(option(VLLM["decode"]["command"], "--kv-transfer-config"))
    assert transfer["kv_load_failure_policy"] == "recompute"


def test_vllm_instances_of_one_host_share_no_port_and_no_gpu() -> None:
    def claims(service: Service) -> set[str]:
        (devices,) = service["deploy"]["resources"]["reservations"]["devices"]
        port = option(service["entrypoint"], "--port")
        return {port, service["environment"]["VLLM_NIXL_SIDE_CHANNEL_PORT"], *devices["device_ids"]}

    assert not claims(VLLM["prefill"]) & claims(VLLM["decode"])


def test_vllm_needs_to_be_told_the_host_s_address() -> None:
    with pytest.raises(KeyError, match="HOST_IP"):
        read_services(VLLM_COMPOSE)


def build_context() -> set[str]:
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    return {path for path in exclude_paths(str(ROOT), patterns) if (ROOT / path).is_file()}


def test_build_context_has_what_the_image_is_built_from() -> None:
    context = build_context()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert copied
    for source in " ".join(copied).split():
        assert any(path == source or path.startswith(source) for path in context), source


def test_build_context_has_nothing_else() -> None:
    whole = ("extproc/", "envoy/", "deploy/docker/wheels/")
    rest = {path for path in build_context() if not path.startswith(whole)}
    # the Docker client adds the two files that it needs itself
    assert rest - {".dockerignore", "deploy/docker/Dockerfile"} == {"pyproject.toml", "README.md", "LICENSE"}
    assert not [path for path in build_context() if "__pycache__" in path]


def test_readme_has_every_port(config: SchedulerConfig) -> None:
    readme = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    for port in (PORTS.ingress, PORTS.prefill, PORTS.admin, config.grpc_port, config.admin_port):
        assert f"\n| {port} |" in readme


def compose_command() -> list[str]:
    """Return how compose is called here; skip the test where it is not."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(command[0])
            and subprocess.run([*command, "version"], capture_output=True).returncode == 0
        ):
            return command
    pytest.skip("neither the docker compose plugin nor docker-compose is installed")


def test_prometheus_and_grafana_are_for_this_machine_and_have_no_privileges() -> None:
    assert OBSERVERS["pod"] == {"ports": ["127.0.0.1:9090:9090"]}
    assert OBSERVERS["grafana"]["ports"] == ["127.0.0.1:3000:3000"]
    for name in ("prometheus", "grafana"):
        service = OBSERVERS[name]
        assert not service["user"].startswith("0")
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_grafana_has_no_known_password() -> None:
    with pytest.raises(KeyError, match="GRAFANA_PASSWORD"):
        read_services(OBSERVABILITY)


def test_prometheus_reads_the_instances_that_run() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/scrape.yml").read_text(encoding="utf-8"))
    (job,) = [job for job in config["scrape_configs"] if job["job_name"] == "vllm"]
    scraped = {tuple(group["targets"]): group["labels"] for group in job["static_configs"]}
    assert scraped == {
        (f"{name}:{option(service['entrypoint'], '--port')}",): {
            "instance": name,
            "role": option(service["command"], "--role"),
        }
        for name, service in INSTANCES.items()
    }


@pytest.mark.parametrize(
    "paths", [[COMPOSE], [VLLM_COMPOSE], [COMPOSE, OBSERVABILITY]], ids=lambda paths: paths[-1].name
)
def test_compose_accepts_the_file(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST_IP", "192.0.2.1")
    monkeypatch.setenv("GRAFANA_PASSWORD", "secret")
    command = [*compose_command(), *(f"--file={path}" for path in paths), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG_S)
    assert done.returncode == 0, done.stderr
