"""The case of tests whose D asks for the prefill."""

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from tests.support.routing import BODY, Case, answer, decode_body
from vllm_pd_scheduler.request.errors import Reject
from vllm_pd_scheduler.routing.decode_first import GRACE_S, Called

BASE = "http://10.0.0.5:9005"
NONE = answer(params=None)
RAW = len(json.dumps(BODY))


class AskedCase(Case):
    CONFIG: Mapping[str, Any] = {"connector": "ascend-layerwise"}
    CONNECTOR = staticmethod(lambda: None)  # type: ignore[assignment]

    def setUp(self) -> None:
        self.timers: list[tuple[float, Callable[[], None]]] = []
        super().setUp()
        self.fail_all(NONE)
        self.first = self.router.decode_first
        self.first.listen(lambda host: BASE)
        self.memory = self.router.body_memory

    def later(self, delay: float, call: Callable[[], None]) -> object:
        self.timers.append((delay, call))
        return None

    def pass_grace(self) -> None:
        for delay, call in self.timers:
            if delay == GRACE_S:
                call()

    async def begun(self, **headers: str) -> Any:
        forward = await self.route(**headers)
        self.refused: list[Reject] = []
        forward.refuse = self.refused.append
        return forward

    def call(self, forward: Any, host: str = "10.0.0.2", **changed: Any) -> Called:
        params = decode_body(forward)["kv_transfer_params"]
        self.said = {
            "request_id": f"cmpl-{forward.headers()['x-request-id']}-0",
            "do_remote_decode": True,
            "remote_block_ids": [[1, 2]],
            "remote_engine_id": "e",
            "remote_host": "10.0.0.2",
            "remote_port": 30100,
            "remote_cached_tokens": 0,
            **changed,
        }
        id_ = params["metaserver"].rpartition("/")[2]
        return self.first.called(id_, host, json.dumps(self.said).encode())

    async def settled(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)
