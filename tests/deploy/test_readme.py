"""What deploy/README.md shows for an Envoy of yours is accepted by a real one."""

import re
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.support.certificates import make_certificates
from tests.support.compose_file import ROOT
from tests.support.processes import Stack, spawned, unused_ports
from tests.support.stack import session
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.envoy.configuration import render_config
from vllm_pd_scheduler.envoy.ports import EnvoyPorts
from vllm_pd_scheduler.envoy.process import find_envoy
from vllm_pd_scheduler.request.headers import ENVOY_CONFIG, ENVOY_CONFIG_VERSION

__all__ = ["session"]

README = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
ENVOY_YAML = (ROOT / "envoy" / "envoy.yaml").read_text(encoding="utf-8")


def shown(heading: str) -> Any:
    """The YAML below a heading."""
    text = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    return yaml.safe_load(block)


def address(cluster: dict[str, Any]) -> dict[str, Any]:
    """Where the only endpoint of a cluster is."""
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    found: dict[str, Any] = endpoint["endpoint"]["address"]["socket_address"]
    return found


def is_accepted(config: dict[str, Any], directory: Path) -> None:
    path = directory / "envoy.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [find_envoy(), "--mode", "validate", "-c", str(path), "--disable-hot-restart"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG_S)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)


@pytest.fixture
def config() -> dict[str, Any]:
    return dict(yaml.safe_load(ENVOY_YAML))


def test_the_listener_of_statistics(config: dict[str, Any], tmp_path: Path) -> None:
    added = shown("Prometheus and Grafana")
    for kind in ("listeners", "clusters"):
        config["static_resources"][kind] += added[kind]
    is_accepted(config, tmp_path)
    (admin,) = added["clusters"]
    assert address(admin)["port_value"] == EnvoyPorts().admin


async def test_it_has_statistics_and_nothing_else(
    session: aiohttp.ClientSession, stack: Stack, tmp_path: Path
) -> None:
    added, config = shown("Prometheus and Grafana"), render_config(stack.ports)
    (port,) = unused_ports(1)
    (listener,), (cluster,) = added["listeners"], added["clusters"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    address(cluster)["port_value"] = stack.ports.admin
    # not after the endpoints, which no scheduler sends here
    config["static_resources"] = {"listeners": [listener], "clusters": [cluster]}
    path = tmp_path / "envoy.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with spawned([find_envoy(), "-c", str(path), "--log-level", "error", "--disable-hot-restart"]):

        async def status(method: str, path: str) -> int:
            try:
                async with session.request(method, f"http://127.0.0.1:{port}{path}") as response:
                    return response.status
            except OSError:
                return 0

        async def listens() -> bool:
            return await status("GET", "/stats/prometheus?usedonly") == 200

        await until(listens)
        for method, asked in (
            ("POST", "/quitquitquit"),
            ("GET", "/config_dump"),
            ("POST", "/stats/prometheus"),
        ):
            assert await status(method, asked) == 404


def test_tls_of_clients(config: dict[str, Any], tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    socket = shown("TLS")["transport_socket"]
    (certificate,) = socket["typed_config"]["common_tls_context"]["tls_certificates"]
    certificate["certificate_chain"]["filename"] = made.server["cert"]
    certificate["private_key"]["filename"] = made.server["key"]
    (ingress,) = [each for each in config["static_resources"]["listeners"] if each["name"] == "ingress"]
    (chain,) = ingress["filter_chains"]
    chain["transport_socket"] = socket
    is_accepted(config, tmp_path)


def test_the_version_that_the_upgrade_speaks_of_is_where_it_says() -> None:
    line = f'initial_metadata: [{{key: {ENVOY_CONFIG}, value: "%s"}}]'
    assert line % ENVOY_CONFIG_VERSION in ENVOY_YAML
    (shown_version,) = re.findall(r'"envoy_config": "(\d+)"', README)  # an example, of one version
    assert line % shown_version in README
