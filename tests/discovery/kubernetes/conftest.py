"""An API server, and no patience with it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.discovery.kubernetes.watching import Heard
from tests.support.kubernetes import ApiServer
from tests.support.kubernetes_objects import pod
from tests.support.waiting import until
from vllm_pd_scheduler.discovery.kubernetes import api as api_module
from vllm_pd_scheduler.discovery.kubernetes import backoff, telling, watch
from vllm_pd_scheduler.discovery.kubernetes.api import Api
from vllm_pd_scheduler.discovery.kubernetes.credentials import Credentials
from vllm_pd_scheduler.discovery.kubernetes.objects import Pod
from vllm_pd_scheduler.discovery.kubernetes.pods import PODS
from vllm_pd_scheduler.discovery.kubernetes.watch import ListWatch


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all pauses be short."""
    monkeypatch.setattr(backoff, "FIRST_S", 0.01)
    monkeypatch.setattr(backoff, "MOST_S", 0.03)
    monkeypatch.setattr(watch, "STEADY_S", 0.1)
    monkeypatch.setattr(telling, "JOIN_S", 0.01)
    monkeypatch.setattr(api_module, "MAX_RETRY_AFTER_S", 0.05)


@pytest_asyncio.fixture
async def server() -> AsyncIterator[ApiServer]:
    async with ApiServer() as running:
        yield running


@pytest.fixture
def kubeconfig(server: ApiServer, tmp_path: Path) -> str:
    return server.kubeconfig(tmp_path / "kubeconfig")


@pytest_asyncio.fixture
async def api(kubeconfig: str) -> AsyncIterator[Api]:
    async with Api(Credentials(kubeconfig)) as opened:
        yield opened


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest_asyncio.fixture
async def pods(api: Api, server: ApiServer, heard: Heard) -> AsyncIterator[ListWatch[Pod]]:
    """A watch that has begun, of a server with two pods that it is about, and one that it is not."""
    server.put("pods", pod("p1"))
    server.put("pods", pod("p2"))
    server.put("pods", pod("other", app="other"))
    watch = ListWatch(api, PODS, "llm", heard, labels="app=vllm")
    following = asyncio.ensure_future(watch.follow())
    await until(lambda: server.watches)
    yield watch
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
