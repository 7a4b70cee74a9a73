"""compose.replicas.yaml: its schedulers, its Envoys and its server fit together."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.deploy.test_compose_file import compose_command
from tests.support.compose_file import REPLICAS, Service, mounts, read_services
from tests.support.processes import spawned, unused_ports
from tests.support.valkey import SERVER, ask, needs_server, until_listening
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.cli import app
from vllm_pd_scheduler.config import SchedulerConfig, parse_config

SERVICES = read_services(REPLICAS)
SCHEDULERS = {name: service for name, service in SERVICES.items() if name.startswith("scheduler-")}
ENVOYS = {name: service for name, service in SERVICES.items() if name.startswith("envoy-")}
INSTANCES = {name for name in SERVICES if name.startswith(("prefill", "decode"))}


def config_of(service: Service, directory: Path) -> SchedulerConfig:
    """What a scheduler reads in its container."""
    files = {target.removesuffix(":ro"): source for source, target in mounts(service, REPLICAS.parent)}
    (directory / "valkey").write_text("s3cret")
    text = files[service["command"][-1]].read_text(encoding="utf-8")
    text = text.replace("/run/secrets", str(directory))
    for target, source in files.items():
        text = text.replace(target, str(source))
    return parse_config(json.loads(text))


def test_schedulers_differ_in_their_names_alone(tmp_path: Path) -> None:
    found = {name: config_of(service, tmp_path) for name, service in SCHEDULERS.items()}
    names = {name: config.replicas and config.replicas.name for name, config in found.items()}
    assert names == {name: name.removeprefix("scheduler-") for name in SCHEDULERS}
    shown = []
    for config in found.values():
        values = config.model_dump(mode="json")
        del values["replicas"]["name"]
        shown.append(values)
    assert shown[0] == shown[1] == shown[2]


def test_the_fleet_is_the_simulated_one() -> None:
    (fleet,) = {source for each in SCHEDULERS.values() for source, _ in mounts(each, REPLICAS.parent)[1:]}
    listed = json.loads(fleet.read_text(encoding="utf-8"))
    hosts = {each["host"] for role in listed.values() for each in role}
    assert hosts == INSTANCES == {SERVICES[name]["hostname"] for name in INSTANCES}


@pytest.mark.parametrize("name", ENVOYS)
def test_an_envoy_knows_all_schedulers_and_one_is_nearest(name: str, tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["envoy-config", *ENVOYS[name]["command"]])
    assert ended.exit_code == 0, ended.output
    clusters = {each["name"]: each for each in yaml.safe_load(ended.output)["static_resources"]["clusters"]}
    found: dict[int, set[str]] = {}
    for group in clusters["scheduler"]["load_assignment"]["endpoints"]:
        for each in group["lb_endpoints"]:
            address = each["endpoint"]["address"]["socket_address"]
            found.setdefault(group.get("priority", 0), set()).add(address["address"])
            config = config_of(SCHEDULERS[address["address"]], tmp_path)
            assert (config.grpc_host, config.grpc_port) == ("0.0.0.0", address["port_value"])
    assert set.union(*found.values()) == set(SCHEDULERS)
    assert len(found) == 2, "some are nearer"
    assert {f"scheduler_{each.removeprefix('scheduler-')}" for each in SCHEDULERS} <= clusters.keys()


def test_each_scheduler_is_nearest_to_an_envoy() -> None:
    nearest = {word.partition("=")[2] for each in ENVOYS.values() for word in each["command"] if "=" in word}
    assert {f"{name}:9002" for name in SCHEDULERS} <= nearest


@pytest.mark.parametrize("name", SERVICES)
def test_containers_have_no_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == "65532:65532"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_only_the_envoys_are_published_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"envoy-0": ["127.0.0.1:10000:10000"], "envoy-1": ["127.0.0.1:10001:10000"]}


@needs_server
def test_the_server_starts_with_its_password(tmp_path: Path) -> None:
    (port,) = unused_ports(1)
    (tmp_path / "valkey").write_text('a "pass" word')
    shell, option, script = SERVICES["valkey"]["entrypoint"]
    script = script.replace("$$", "$").replace("/run/secrets", str(tmp_path)).replace("/data", str(tmp_path))
    script = script.replace("valkey-server -", f"{SERVER} - --port {port} --bind 127.0.0.1")
    with spawned([shell, option, script]) as server:
        until_listening(port, server.process)
        assert ask(port, "PING").startswith("-NOAUTH")
        assert ask(port, "PING", password='a "pass" word') == "+PONG\r\n"
        server.signal(signal.SIGTERM)  # which the shell would not pass on
        assert server.wait() == 0


def test_compose_accepts_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VALKEY_PASSWORD_FILE", "/run/valkey-password")
    command = [*compose_command(), f"--file={REPLICAS}", "config", "--quiet"]
    done: Any = subprocess.run(command, capture_output=True, text=True, timeout=HUNG_S)
    assert done.returncode == 0, done.stderr
