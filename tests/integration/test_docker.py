"""Containers of a real Docker engine: with simulated instances in them, under requests, and by themselves."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import docker
import pytest
import pytest_asyncio
from docker.models.containers import Container
from docker.models.networks import Network

from tests.support.container_engine import Unavailable, base_image, running_engine
from tests.support.followed import Followed
from tests.support.waiting import until
from vllm_pd_scheduler.discovery.docker import source

SLOW_TO_STOP = "import signal, time; signal.signal(15, lambda *_: time.sleep(60)); time.sleep(600)"
HEALTH = {
    "test": ["CMD", "test", "-e", "/tmp/well"],
    "interval": 200_000_000,
    "retries": 1,
    "timeout": 10**10,
}

Run = Callable[..., Container]


@pytest.fixture(scope="module")
def client() -> Iterator[docker.DockerClient]:
    yield from running_engine()


@pytest.fixture(scope="module")
def image(client: docker.DockerClient) -> str:
    try:
        return base_image(client, "vllm-pd-scheduler-test-base")
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def network(client: docker.DockerClient) -> Iterator[Network]:
    made = client.networks.create(f"pd-{uuid.uuid4().hex[:8]}")
    yield made
    made.remove()


@pytest.fixture
def run(client: docker.DockerClient, image: str, network: Network) -> Iterator[Run]:
    """Start a container in the network; an argument of ``labels`` is a label of ours."""
    made: list[Container] = []

    def start(name: str, command: list[str], labels: dict[str, str], **more: Any) -> Container:
        ours = {f"vllm-pd.{key}": value for key, value in labels.items()}
        more = {"name": f"{network.name}-{name}", "network": network.name, "init": True, **more}
        made.append(client.containers.create(image, command, labels=ours, hostname=name, **more))
        made[-1].start()
        return made[-1]

    yield start
    for each in made:
        each.remove(force=True, v=True)


@pytest_asyncio.fixture
async def followed(
    client: docker.DockerClient, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Any]]:
    monkeypatch.setattr(source, "LOOK_S", 60.0)  # so that events tell it
    started: list[Followed] = []

    async def follow(**settings: Any) -> Followed:
        started.append(Followed({"type": "docker", "host": url(client), **settings}))
        await started[-1].start()
        await started[-1].sources.first_words()
        return started[-1]

    yield follow
    for each in started:
        await each.sources.stop()


def url(client: docker.DockerClient) -> str:
    return f"unix://{client.api._custom_adapter.socket_path}"


async def test_one_that_stops_drains_while_it_still_runs(
    run: Run, network: Network, followed: Callable[..., Any]
) -> None:
    fleet = await followed()
    python = ["python3", "-c", SLOW_TO_STOP]
    d = run("d", python, {"role": "decode", "port": "8200", "model": "chat", "revision": "v1"}, init=False)
    name = f"{network.name}-d"
    await fleet.until(name)
    d.reload()
    at = d.attrs["NetworkSettings"]["Networks"][network.name]["IPAddress"]
    found = fleet[name]
    assert (found.host, found.port, found.models, found.revision) == (at, 8200, {"chat"}, "v1")
    d.kill(signal="SIGHUP")  # which stops nobody
    d.pause()
    await fleet.until()
    d.unpause()
    await fleet.until(name)
    d.kill(signal="SIGTERM")  # as stop begins
    await fleet.until()
    d.reload()
    assert d.status == "running"
    late = await followed(name="late")  # who comes only now knows it too
    assert late.ids == set()
    d.kill()
    d.start()
    await fleet.until(name)
    await late.until(f"late.{name}")


async def test_health_and_networks(
    client: docker.DockerClient, run: Run, network: Network, followed: Callable[..., Any]
) -> None:
    fleet = await followed()
    chosen = await followed(network=network.name, name="chosen")
    d = run("d", ["sleep", "600"], {"role": "decode"}, healthcheck=HEALTH)
    run("odd", ["sleep", "600"], {"role": "both"})
    name = f"{network.name}-d"
    await fleet.until_event("container " + network.name + "-odd is left out: label vllm-pd.role must be")
    assert fleet.ids == set()
    d.exec_run(["touch", "/tmp/well"])
    await fleet.until(name)
    await chosen.until(f"chosen.{name}")
    other = client.networks.create(f"{network.name}-2")
    try:
        other.connect(d)
        await fleet.until_event(f"it has an address in '{network.name}', '{other.name}'")
        assert fleet.ids == set()
        other.disconnect(d)
        await fleet.until(name)
        network.disconnect(d)
        other.connect(d)
        network.connect(d)
        await until(lambda: "2" in str(chosen.left_out) or chosen.ids)
        await chosen.until(f"chosen.{name}")
    finally:
        other.disconnect(d)
        other.remove()
    await fleet.until(name)
    d.exec_run(["rm", "/tmp/well"])
    await fleet.until()


async def test_a_container_that_is_made_anew_has_the_same_id(
    run: Run, network: Network, followed: Callable[..., Any]
) -> None:
    fleet = await followed()
    name = f"{network.name}-d"
    d = run("d", ["sleep", "600"], {"role": "decode"})
    await fleet.until(name)
    before = fleet[name].host
    d.stop(timeout=1)
    await fleet.until()
    run("e", ["sleep", "600"], {"role": "decode"})  # takes its address
    await fleet.until(f"{network.name}-e")
    d.start()
    await fleet.until(name, f"{network.name}-e")
    assert fleet[name].host != before
    assert fleet[f"{network.name}-e"].host == before
