"""Envoy and a scheduler that want each other's certificates, as docs/security.md sets it up."""

from __future__ import annotations

import re
from pathlib import Path

import aiohttp
import yaml
from typer.testing import CliRunner

from tests.support.certificates import make_certificates
from tests.support.processes import Client, Stack, ready, spawned, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.cli import app
from vllm_pd_scheduler.envoy.configuration import render_config

GUIDE = Path(__file__).parents[2] / "docs" / "security.md"


async def test_mutual_tls(session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    text = re.search(r"```yaml\n(transport_socket:\n.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert text is not None
    files = {"ca.pem": made.ca, "envoy.pem": made.client["cert"], "envoy.key": made.client["key"]}
    socket = text[1].replace("scheduler.example", "127.0.0.1")
    for name, path in files.items():
        socket = socket.replace(f"/etc/envoy/{name}", path)
    stack = Stack(tmp_path)
    config = render_config(stack.ports)
    for cluster in config["static_resources"]["clusters"]:
        if cluster["name"] in ("scheduler", "xds"):
            cluster.update(yaml.safe_load(socket))
    command = stack.envoy()
    (tmp_path / "envoy.yaml").write_text(yaml.safe_dump(config))
    settings = {**fleet.config(), "grpc_tls": {**made.server, "client_ca": made.ca}}
    with spawned(command) as envoy, spawned(stack.serve(settings)) as scheduler:
        client = Client(session, stack, fleet)
        await ready(client, envoy)
        await client.until_split()  # ext_proc too; Envoy was up first, and must find the scheduler healthy
        assert "Traceback" not in scheduler.output


async def test_the_configuration_that_is_printed_for_it(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path
) -> None:
    """Two schedulers, of which each shows the same certificate as their Envoy."""
    made = make_certificates(tmp_path)
    tls = {**made.server, "client_ca": made.ca}
    stack = Stack(tmp_path)
    path = stack.write_config({**fleet.config(), "grpc_tls": tls, "grpc_port": stack.ports.grpc})
    addresses = [f"a=127.0.0.1:{stack.ports.grpc}", f"b=127.0.0.1:{unused_ports(1)[0]},1"]
    options = [f"--port={stack.ports.ingress}", f"--envoy-admin-port={stack.ports.admin}"]
    options += [f"--scheduler={each}" for each in addresses]
    printed = CliRunner().invoke(app, ["envoy-config", f"--config={path}", *options])
    assert printed.exit_code == 0, printed.output
    command = stack.envoy()
    (tmp_path / "envoy.yaml").write_text(printed.output)
    settings = {**fleet.config(), "grpc_tls": tls, "replicas": {"url": "valkey://127.0.0.1:1", "name": "a"}}
    with spawned(command) as envoy, spawned(stack.serve(settings)):
        client = Client(session, stack, fleet)
        await ready(client, envoy)
        await client.until_split()
        answer = await client.complete(stream=True)

        async def told() -> bool:
            _, found = await client.admin("GET", f"/decisions?request_id={answer.headers['x-request-id']}")
            return found["decisions"][-1]["outcome"] is not None

        await until(told)  # by the cluster of that scheduler alone
