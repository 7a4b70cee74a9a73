"""``epp`` with the flags of llm-d's chart: a pool of an API server, and a gateway before it."""

from __future__ import annotations

import sys
from pathlib import Path

import aiohttp

from tests.support.gateway import Gateway, GatewayStack
from tests.support.kubernetes import ApiServer
from tests.support.kubernetes_objects import pod, pool
from tests.support.processes import Client, spawned, unused_ports
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until
from vllm_pd_scheduler.sim.profile import EngineProfile


async def test_from_a_pool_to_a_split_answer(session: aiohttp.ClientSession, tmp_path: Path) -> None:
    stack = GatewayStack(tmp_path, gateway=Gateway(tls=True))
    health, metrics = unused_ports(2)
    with Fleet(1, 1, profile=EngineProfile.instant()) as fleet:
        async with ApiServer() as server:
            ports = {each.id: each.port for each in fleet.instances}
            server.put("inferencepools", pool("chat", *ports.values(), app="vllm"))
            for name, port in ports.items():
                active = {"llm-d.ai/active-ports": str(port)}  # all are at one address here
                role = name.partition("-")[0]
                server.put("pods", pod(name, "127.0.0.1", role, annotations=active))
            config = stack.write_config({"admin_port": stack.admin_port})
            flags = [
                *("--pool-name", "chat", "--pool-namespace", "llm", "--zap-encoder", "json"),
                *("--pool-group", "inference.networking.k8s.io", "--config-file", "/config/plugins.yaml"),
                *("--grpc-health-port", str(health), "--tracing=false", f"--grpc-port={stack.ports.grpc}"),
                *(f"--metrics-port={metrics}", f"--config={config}"),
            ]
            command = [sys.executable, "-m", "vllm_pd_scheduler", "epp", *flags]
            credentials = server.kubeconfig(tmp_path / "kubeconfig")
            with spawned(command, KUBECONFIG=credentials) as picker, spawned(stack.envoy()):
                client = Client(session, stack, fleet)

                async def split() -> bool:
                    assert picker.process.poll() is None, picker.output
                    try:
                        answer = await client.complete()
                    except aiohttp.ClientConnectionError:
                        return False
                    return answer.status == 200 and "x-pd-prefill" in answer.headers

                await until(split)
                assert "Traceback" not in picker.output
