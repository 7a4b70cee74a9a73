"""A router whose prefill leg is no I/O, and what it decides, for tests of ext_proc messages."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.connectors import Attempt
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.handoff.interfaces import PrefillAnswer
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.request.errors import Reject
from vllm_pd_scheduler.router import PDRouter

COMPLETION = {":method": "POST", ":path": "/v1/completions"}
MODELS = {":method": "GET", ":path": "/v1/models"}
PARAMS = {
    "do_remote_prefill": True,
    "remote_block_ids": [[1, 2]],
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_host": "10.0.0.2",
    "remote_port": 5600,
}


async def prefill(
    endpoint: Endpoint, path: str, headers: Mapping[str, str], body: bytes, attempt: Attempt, sent: Any = None
) -> PrefillAnswer:
    return PrefillAnswer(200, "application/json", json.dumps({"kv_transfer_params": PARAMS}).encode())


def build() -> PDRouter:
    """One prefill instance p0 and two decode instances, 10.0.0.1:80 and :81, all healthy."""
    router = PDRouter(SchedulerConfig(strategy="round_robin"), prefill_leg=prefill, later=lambda *_: None)
    router.register_instance(PDInstance("p0", InstanceRole.PREFILL, "10.0.0.2", 90))
    for number in range(2):
        router.register_instance(PDInstance(f"d{number}", InstanceRole.DECODE, "10.0.0.1", 80 + number))
    for endpoint in router.registry:
        router.registry.probed(endpoint, None)
    return router


def forward(router: PDRouter, headers: Mapping[str, str] = MODELS, body: bytes = b"") -> Any:
    outcome = asyncio.run(router.route(headers, body))
    assert not isinstance(outcome, Reject), outcome
    return outcome


def in_flight(router: PDRouter) -> int:
    return sum(endpoint.in_flight for endpoint in router.registry)
