"""Envoy and a scheduler that want each other's certificates, as docs/security.md sets it up."""

from __future__ import annotations

import re
from pathlib import Path

import aiohttp
import yaml

from tests.support.certificates import make_certificates
from tests.support.processes import Client, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
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
