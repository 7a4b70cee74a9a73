"""The image, built without a network, and the stack of compose.yaml, run on a real engine."""

import http.client
import io
import json
import re
import tarfile
import time
import uuid
from collections.abc import Iterator
from typing import Any

import docker
import pytest
from docker.models.containers import Container
from docker.utils import exclude_paths

from tests.support.compose_file import COMPOSE, ROOT, create_arguments, read_services
from tests.support.container_engine import Unavailable, base_image, running_engine, wheels
from vllm_pd_scheduler.envoy.ports import EnvoyPorts

IMAGE = "vllm-pd-scheduler-test"
BASE_IMAGE = f"{IMAGE}-base"
READY_S = 60.0
PROMPT = "What are prefill and decode? " * 20


@pytest.fixture(scope="module")
def client() -> Iterator[docker.DockerClient]:
    yield from running_engine()


@pytest.fixture(scope="module")
def image(client: docker.DockerClient) -> str:
    try:
        base, wheelhouse = base_image(client, BASE_IMAGE), wheels()
    except Unavailable as reason:
        pytest.skip(str(reason))
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        for path in sorted(exclude_paths(str(ROOT), patterns, "deploy/docker/Dockerfile")):
            tar.add(ROOT / path, path, recursive=False)
        for wheel in wheelhouse.iterdir():
            tar.add(wheel, f"deploy/docker/wheels/{wheel.name}")
    context.seek(0)
    client.images.build(
        fileobj=context,
        custom_context=True,
        dockerfile="deploy/docker/Dockerfile",
        buildargs={"BASE_IMAGE": base, "PIP_OPTIONS": "--no-index --no-compile"},
        network_mode="none",
        tag=IMAGE,
        rm=True,
        forcerm=True,
    )
    return IMAGE


class Stack:
    """The containers of compose.yaml, by the names of their services, and where the ingress is."""

    def __init__(self, containers: dict[str, Container]) -> None:
        self.containers = containers

    def request(self, method: str, path: str, body: Any = None) -> tuple[http.client.HTTPResponse, str]:
        """Send a request to Envoy's ingress; return the answer and all of its body."""
        self.containers["pod"].reload()
        (published,) = self.containers["pod"].ports[f"{EnvoyPorts().ingress}/tcp"]
        connection = http.client.HTTPConnection("127.0.0.1", int(published["HostPort"]), timeout=20)
        headers = {"content-type": "application/json", "connection": "close"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response, response.read().decode()

    def until_prefilled(self) -> tuple[http.client.HTTPResponse, str]:
        """Stream a chat as soon as it goes through P and D, and return that answer."""
        body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 20, "stream": True}
        deadline, last = time.monotonic() + READY_S, "nothing was answered"
        while time.monotonic() < deadline:
            try:
                response, text = self.request("POST", "/v1/chat/completions", body)
            except (OSError, http.client.HTTPException) as error:
                last = repr(error)
            else:
                if response.status == 200 and response.getheader("x-pd-prefill"):
                    return response, text
                last = f"{response.status} {response.getheaders()} {text}"
            time.sleep(0.2)
        logs = [f"--- {name}\n{c.logs(tail=20).decode()}" for name, c in self.containers.items()]
        raise AssertionError("\n".join([f"not ready after {READY_S:g} s: {last}", *logs]))

    def until_runs(self, service: str, *command: str) -> None:
        """Run a command in a container until it succeeds: one of several instances may start later."""
        end = time.monotonic() + READY_S
        while self.containers[service].exec_run(list(command))[0] != 0:
            assert time.monotonic() < end, self.run(service, *command)
            time.sleep(0.5)

    def run(self, service: str, *command: str) -> str:
        """Run a command in a container and return what it prints."""
        status, output = self.containers[service].exec_run(list(command))
        assert status == 0, output.decode()
        return str(output.decode())


@pytest.fixture(scope="module")
def stack(client: docker.DockerClient, image: str) -> Iterator[Stack]:
    # the official Envoy image cannot be pulled everywhere; ours has the same command
    services = read_services(COMPOSE, {"SCHEDULER_IMAGE": image, "ENVOY_IMAGE": image})
    network = client.networks.create(f"vllm-pd-test-{uuid.uuid4().hex[:8]}")
    containers: dict[str, Container] = {}
    try:
        for name in sorted(services, key=lambda name: "network_mode" in services[name]):
            alias = client.api.create_endpoint_config(aliases=[name])
            joined = {"network": network.name, "networking_config": {network.name: alias}}
            arguments = create_arguments(
                services[name], COMPOSE.parent, joined, lambda other: str(containers[other].id)
            )
            containers[name] = client.containers.create(name=f"{network.name}-{name}", **arguments)
            containers[name].start()
        yield Stack(containers)
    finally:
        for container in containers.values():
            container.remove(force=True, v=True)
        network.remove()


def test_streamed_chat_is_prefilled_and_decoded(stack: Stack) -> None:
    response, text = stack.until_prefilled()
    assert str(response.getheader("content-type")).startswith("text/event-stream")
    assert re.fullmatch(r"prefill-[01]", str(response.getheader("x-pd-prefill")))
    assert re.fullmatch(r"decode-[01]", str(response.getheader("x-pd-decode")))
    assert text.rstrip().endswith("data: [DONE]")


def test_kv_cache_travels_between_containers(stack: Stack) -> None:
    response, _ = stack.until_prefilled()
    fetch = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/metrics').read().decode())"
    metrics = stack.run(str(response.getheader("x-pd-decode")), "python3", "-c", fetch)
    arrived = re.search(
        r"^vllm:prompt_tokens_by_source_total\{.*external_kv_transfer.*\} (\S+)$", metrics, re.M
    )
    assert arrived is not None
    assert float(arrived[1]) > 0


def test_every_container_is_healthy_and_not_root(client: docker.DockerClient, stack: Stack) -> None:
    stack.until_prefilled()
    # at once, as the engine would only do it after the first interval
    check = client.images.get(IMAGE).attrs["Config"]["Healthcheck"]["Test"][1:]
    for name in stack.containers:
        assert stack.run(name, "id", "-u").strip() == "65532"
        if name != "envoy":
            stack.until_runs(name, *check)


def test_scheduler_and_envoy_restart_apart(stack: Stack) -> None:
    stack.until_prefilled()
    for name in ("envoy", "scheduler"):
        stack.containers[name].restart(timeout=10)
        stack.until_prefilled()


def test_scheduler_ends_with_0_when_it_is_stopped(stack: Stack) -> None:
    scheduler = stack.containers["scheduler"]
    scheduler.stop(timeout=20)
    scheduler.reload()
    assert scheduler.attrs["State"]["ExitCode"] == 0
    # and clients notice nothing: Envoy goes on without it
    response, _ = stack.request("POST", "/v1/completions", {"prompt": "Hello", "max_tokens": 4})
    assert response.status == 200
    assert response.getheader("x-pd-decode") is not None
