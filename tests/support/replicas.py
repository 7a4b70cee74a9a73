"""Schedulers of one fleet in one process, joined by fake channels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.support.channels import FakeChannel, Meeting
from vllm_pd_scheduler.admin.changes import AdminChanges
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.records.events import EventKind
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.service.sharing import join
from vllm_pd_scheduler.sync.sync import Sync

FLEET: dict[str, Any] = {
    "prefill_instances": [{"id": f"p{n}", "host": "10.0.0.1", "port": 8000 + n} for n in range(2)],
    "decode_instances": [{"id": f"d{n}", "host": "10.0.0.2", "port": 8000 + n} for n in range(2)],
}


class Scheduler:
    """A router among others, by a fake channel. Its time stands still unless the test moves it."""

    def __init__(self, meeting: Meeting, name: str = "", secret: str = "", **more: Any) -> None:
        self.now = 100.0
        self.router = PDRouter(parse_config({**FLEET, **more}), clock=lambda: self.now)
        self.changes = AdminChanges(self.router)
        self.channel: FakeChannel = meeting.channel()
        self.news = 0
        self.router.wake = self._count
        self.sync: Sync = join(self.router, self.changes, self.channel, "fleet", name, secret)
        for endpoint in self.router.registry:
            self.router.registry.probed(endpoint, None)

    def _count(self) -> None:
        self.news += 1

    def reserve(self, endpoint: str = "d0") -> Any:
        request = RequestContext("/v1/completions", prompt_tokens=100.0, now=self.now)
        return self.router.registry.work.reserve(self.router.registry.get(endpoint), request)

    def in_flight(self, endpoint: str = "d0") -> int:
        return self.router.registry.get(endpoint).in_flight

    def said(self) -> list[str]:
        return [each.text for each in self.router.events.after(0) if each.kind is EventKind.REPLICAS]


@asynccontextmanager
async def running(*schedulers: Scheduler) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(each.sync.run()) for each in schedulers]
    await asyncio.sleep(0)
    for each in schedulers:
        each.channel.connect()
    try:
        yield
    finally:
        for each, task in zip(schedulers, tasks, strict=True):
            each.channel.problem = "it has ended"
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
