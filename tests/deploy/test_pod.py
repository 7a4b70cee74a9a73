"""The containers of the chart's pod as processes here: they serve, and end without cutting an answer."""

import asyncio
import json
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import pytest

from tests.support.helm import ToolMissing, rendered
from tests.support.kubernetes_schema import the_only
from tests.support.processes import Client, Process, Stack, spawned
from tests.support.sim_fleet import Fleet
from tests.support.stack import fleet, session, stack
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.envoy.process import find_envoy

__all__ = ["fleet", "session", "stack"]


@pytest.fixture
def pod(stack: Stack, fleet: Fleet, tmp_path: Path) -> dict[str, list[str]]:
    """The commands of the containers and of Envoy's hook, with what they have mounted here."""
    values = {
        "listenHost": "127.0.0.1",
        "config": {"drain_timeout": 60, "health_check_interval": 0.5, **fleet.config()},
        "envoy": {"port": stack.ports.ingress, "adminPort": stack.ports.admin},
    }
    try:
        found = rendered(values)
    except ToolMissing as error:
        pytest.skip(str(error))
    config = json.loads(the_only(found, "ConfigMap")["data"]["config.json"])
    (tmp_path / "config").mkdir()
    del config["metrics_port"]  # others may have it here
    config |= {"admin_port": stack.admin_port, "grpc_socket": str(tmp_path / "grpc")}
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    name = the_only(found, "Service")["metadata"]["name"]
    (_, _, asks) = the_only(found, "Pod")["spec"]["containers"][0]["command"]
    spec = the_only(found, "Deployment")["spec"]["template"]["spec"]
    prints, scheduler = spec["initContainers"]
    (envoy,) = spec["containers"]
    ours = [sys.executable, "-m", "vllm_pd_scheduler"]

    def here(command: list[str]) -> list[str]:
        paths = {"/etc/vllm-pd-scheduler": str(tmp_path), "/etc/envoy": str(tmp_path)}
        for there, place in paths.items():
            command = [word.replace(there, place) for word in command]
        return [word.replace("exec vllm-pd-scheduler", f"exec {shlex.join(ours)}") for word in command]

    subprocess.run(here(prints["command"]), check=True, timeout=HUNG_S)
    return {
        "scheduler": ours + here(scheduler["args"]),
        "envoy": [find_envoy(), *here(envoy["args"])],
        "helm test": [sys.executable, "-c", asks.replace(f"http://{name}:80", stack.url)],
        "preStop": ours + envoy["lifecycle"]["preStop"]["exec"]["command"][1:],
    }


async def test_it_serves_and_its_end_cuts_no_answer(
    pod: dict[str, list[str]], stack: Stack, fleet: Fleet, session: aiohttp.ClientSession
) -> None:
    client = Client(session, stack, fleet)

    async def healthy() -> bool:
        try:
            return (await client.send("GET", "/health")).status == 200
        except aiohttp.ClientError:
            return False

    async def turned_away() -> bool:
        return not await healthy()

    with spawned(pod["scheduler"]) as scheduler, spawned(pod["envoy"]) as envoy, ExitStack() as hooks:
        await until(healthy)
        await client.until_split()  # Envoy may know the instances before it has found the scheduler well
        split = {"x-pd-prefill", "x-pd-decode"}
        with spawned(pod["helm test"]) as test:
            assert await asyncio.to_thread(test.wait) == 0, test.output
        async with client.held_stream() as stream:
            (other,) = (each for each in fleet.decode if each.id != stream.headers["x-pd-decode"])
            await client.fault(other.id)
            hook = hooks.enter_context(spawned(pod["preStop"]))
            await until(turned_away)
            assert (await client.complete()).headers.keys() >= split  # while others hear of it
            assert hook.process.poll() is None
            assert (await stream.rest()).endswith(b"data: [DONE]\n\n")
            assert await asyncio.to_thread(hook.wait) == 0
        await _ends(envoy)
        await _ends(scheduler)


async def _ends(process: Process) -> None:
    process.signal(signal.SIGTERM)
    assert await asyncio.to_thread(process.wait) == 0
