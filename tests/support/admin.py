"""A router and its admin interface, asked over HTTP."""

import json
from typing import Any

from aiohttp.test_utils import TestClient, TestServer

from vllm_pd_scheduler.admin import AdminServer
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.router import PDRouter

NEW: dict[str, Any] = {"id": "d1", "role": "decode", "host": "10.0.0.3", "port": 8201}
P, D = InstanceRole.PREFILL, InstanceRole.DECODE
KEYS = ("PD_TEST_KEY", "PD_TEST_NOT_SET")
"""Variables that the configuration names as API keys; the second is not set."""


class Admin:
    """A router and its admin interface."""

    def __init__(self, **config: Any) -> None:
        self.router = PDRouter(SchedulerConfig(**config))
        named = [
            {"id": str(n), "host": "h", "port": 1, "api_key": {"env": key}} for n, key in enumerate(KEYS)
        ]
        self.router.config = SchedulerConfig(**config, decode_instances=named)
        for name, role, port in (("p0", InstanceRole.PREFILL, 8100), ("d0", InstanceRole.DECODE, 8200)):
            self.router.register_instance(PDInstance(name, role, "10.0.0.1", port, "sk-secret"))
        self.ready = True
        self.server: AdminServer
        self.client: TestClient[Any, Any]

    async def serve(self, token: str | None = None) -> None:
        self.server = AdminServer(self.router, is_ready=lambda: self.ready, token=token)
        self.client = TestClient(TestServer(self.server.application()))
        await self.client.start_server()

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **headers}
        async with self.client.request(method, path, data=data, headers=headers) as response:
            text = await response.text()
            return response.status, json.loads(text) if response.content_type == "application/json" else text

    def healthy(self, *names: str) -> None:
        for name in names:
            self.router.registry.probed(self.router.registry.get(name), None)
