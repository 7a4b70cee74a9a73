"""Our API server answers as a real one did, of which there are recordings."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import pytest_asyncio

from tests.support.kubernetes import ApiServer
from tests.support.kubernetes_objects import Json
from vllm_pd_scheduler.discovery.kubernetes.objects import EndpointSlice, Event, ObjectList, Pod, Status

BESIDE = Path(__file__).parents[4] / "shared/k8s/traces"
RECORDINGS = Path(os.environ.get("KUBERNETES_RECORDINGS", BESIDE))

pytestmark = pytest.mark.skipif(
    not RECORDINGS.is_dir(), reason=f"{RECORDINGS} has no recordings of a real API server"
)

PODS = "/api/v1/namespaces/tr/pods"


def recorded(name: str) -> Any:
    text = (RECORDINGS / name).read_text()
    return [json.loads(each) for each in text.splitlines()] if name.endswith("l") else json.loads(text)


def headers(name: str) -> tuple[int, dict[str, str]]:
    """Return the status and the headers that say something of the content."""
    first, *rest = (RECORDINGS / f"{name}.headers").read_text().strip().splitlines()
    fields = dict(line.split(": ", 1) for line in rest)
    kept = ("content-type", "retry-after")
    return int(first.split()[1]), {key: value for key, value in fields.items() if key in kept}


@pytest_asyncio.fixture
async def server() -> AsyncIterator[ApiServer]:
    """A server with what the real one had when its recording began."""
    async with ApiServer() as running:
        for each in recorded("list.json")["items"]:
            running.version = int(each["metadata"]["resourceVersion"]) - 1
            running.put("pods", each, namespace="tr")
        yield running


@pytest_asyncio.fixture
async def session(server: ApiServer) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(server.url) as opened:
        yield opened


async def asked(session: aiohttp.ClientSession, path: str, **parameters: str) -> tuple[int, Any, str]:
    async with session.get(path, params=parameters) as response:
        kept = {
            key: response.headers[key] for key in ("content-type", "retry-after") if key in response.headers
        }
        return response.status, kept, await response.text()


async def test_a_list_and_its_pages(server: ApiServer, session: aiohttp.ClientSession) -> None:
    status, found, text = await asked(session, PODS)
    assert (status, found) == headers("list")
    assert json.loads(text) == recorded("list.json")
    first = recorded("list-page1.json")
    assert json.loads((await asked(session, PODS, limit="2"))[2]) == first
    token = first["metadata"]["continue"]
    assert json.loads((await asked(session, PODS, **{"limit": "2", "continue": token}))[2]) == recorded(
        "list-page2.json"
    )


async def test_a_watch(server: ApiServer, session: aiohttp.ClientSession) -> None:
    """The server is taken through what the real one told, and must tell the same of it."""
    events = recorded("watch.jsonl")
    parameters = {
        "watch": "1",
        "resourceVersion": "238",
        "allowWatchBookmarks": "true",
        "timeoutSeconds": "1",
    }
    watching = asyncio.ensure_future(asked(session, PODS, labelSelector="app=vllm", **parameters))
    relabelled = json.loads((RECORDINGS / "watch-initial-rv0.json").read_text().splitlines()[0])["object"]
    for event in events:
        found: Json = event["object"]
        if event["type"] == "MODIFIED":
            server.put("pods", found, namespace="tr")
        elif event["type"] == "DELETED" and found["metadata"]["name"] == "p1":
            server.put("pods", relabelled, namespace="tr")  # to which the selector does not apply
        elif event["type"] == "DELETED":
            server.remove("pods", found["metadata"]["name"], namespace="tr")
    status, kept, text = await watching
    assert (status, kept) == headers("watch")
    assert [json.loads(line) for line in text.splitlines()] == events


async def test_a_watch_without_a_version(server: ApiServer, session: aiohttp.ClientSession) -> None:
    lines = (RECORDINGS / "watch-initial-rv0.json").read_text().splitlines()
    server.remove("pods", "p0", namespace="tr")
    server.version = 240
    server.put("pods", json.loads(lines[0])["object"], namespace="tr")
    parameters = {"watch": "1", "resourceVersion": "0", "timeoutSeconds": "1"}
    _, _, text = await asked(session, PODS, **parameters)
    assert [json.loads(line) for line in text.splitlines()] == [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("watch-too-old", {"watch": "1", "resourceVersion": "1"}),
        ("watch-streaming-list", {"watch": "1", "sendInitialEvents": "true"}),
        ("watch-future-rv", {"watch": "1", "resourceVersion": "999999999", "timeoutSeconds": "1"}),
        ("list-future-rv", {"resourceVersion": "999999999"}),
        ("bad-rv", {"watch": "1", "resourceVersion": "abc"}),
        ("forbidden", {}),
        ("unauthorized", {}),
        ("not-found", {}),
        ("no-crd", {}),
    ],
)
async def test_refusals(
    server: ApiServer, session: aiohttp.ClientSession, name: str, parameters: dict[str, str]
) -> None:
    path = PODS
    server.version = 244
    match name:
        case "watch-too-old":
            server.compacted = 257
        case "forbidden":
            server.forbidden = {("list", "pods")}
        case "unauthorized":
            server.tokens = {"another"}
        case "not-found":
            path += "/nope"
        case "no-crd":
            path = "/apis/llm-d.ai/v1alpha2/namespaces/tr/nonesuch"
    status, kept, text = await asked(session, path, **parameters)
    assert (status, kept) == headers(name)
    expected = (RECORDINGS / f"{name}.json").read_text()
    assert text == expected if name == "no-crd" else parsed(text) == parsed(expected)


def parsed(text: str) -> Any:
    return json.loads(text) if text.strip() else None


class TestWeReadThem:
    """And what we read of the recordings is there."""

    def test_pods(self) -> None:
        body = (RECORDINGS / "list.json").read_bytes()
        page = msgspec.json.decode(body, type=ObjectList)
        pods = [msgspec.json.decode(raw, type=Pod) for raw in page.items or ()]
        assert page.metadata.resource_version == "238"
        assert [(pod.metadata.name, pod.ip, pod.usable) for pod in pods] == [
            (f"p{number}", None, False) for number in range(3)
        ]

    def test_events(self) -> None:
        events = [
            msgspec.json.decode(line, type=Event)
            for line in (RECORDINGS / "watch.jsonl").read_bytes().splitlines()
        ]
        pods = [msgspec.json.decode(each.object, type=Pod) for each in events if each.type != "BOOKMARK"]
        assert [(pod.metadata.name, pod.ip, pod.usable) for pod in pods] == [
            ("p0", "10.1.2.3", False),
            ("p0", "10.1.2.3", True),
            ("p1", None, False),
            *[("p0", "10.1.2.3", False)] * 3,
        ]

    def test_a_slice(self) -> None:
        found = msgspec.json.decode((RECORDINGS / "endpointslice.json").read_bytes(), type=EndpointSlice)
        assert found.ports is not None
        assert found.ports[0].port == 8000
        assert found.endpoints is not None
        assert found.endpoints[0].conditions is not None
        assert found.endpoints[0].conditions.terminating

    def test_a_refusal(self) -> None:
        found = msgspec.json.decode((RECORDINGS / "list-future-rv.json").read_bytes(), type=Status)
        assert found.details is not None
        assert found.details.retry_after_seconds == 1
