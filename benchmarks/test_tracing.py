"""What tracing costs the event loop: 100 split requests, with a P that costs nothing and without Envoy.

Only the CPU time of the loop's own thread counts, not that of the thread that sends spans.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.connectors import Attempt
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.handoff.interfaces import PrefillAnswer
from vllm_pd_scheduler.handoff.traced_leg import TracedLeg
from vllm_pd_scheduler.models import PD_ROLES, PDInstance
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.routing.ended import REMEMBERED_S
from vllm_pd_scheduler.routing.forward import Forward
from vllm_pd_scheduler.tracing.export import SpanExport

PARAMS = {
    "do_remote_prefill": True,
    "remote_block_ids": [list(range(32))],
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_host": "10.0.0.1",
    "remote_port": 5600,
}
ANSWER = json.dumps({"usage": {"prompt_tokens": 500}, "kv_transfer_params": PARAMS}).encode()
BODY = json.dumps({"model": "m", "prompt": "word " * 400, "max_tokens": 100}).encode()
HEADERS = {":method": "POST", ":path": "/v1/completions", "x-request-id": "0123456789abcdef"}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0"


class Nowhere(SpanExporter):
    def export(self, spans: Any) -> SpanExportResult:
        return SpanExportResult.SUCCESS


async def prefill(
    endpoint: Endpoint, path: str, headers: Mapping[str, str], body: bytes, attempt: Attempt, sent: Any = None
) -> PrefillAnswer:
    return PrefillAnswer(200, "application/json", ANSWER)


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize(
    ("ratio", "parent"),
    [(None, None), (0.0, None), (0.0, "0"), (1.0, None), (1.0, "1")],
    ids=["off", "not sampled", "not sampled by the client", "sampled", "sampled by the client"],
)
def test_request(benchmark: Any, ratio: float | None, parent: str | None) -> None:
    router = PDRouter(
        SchedulerConfig(strategy="round_robin"),
        prefill_leg=prefill,
        clock=lambda: time.monotonic() + ahead,
        later=lambda *_: None,
    )
    for role in PD_ROLES:
        for number in range(4):
            router.register_instance(
                PDInstance(f"{role}-{number}", role, "10.0.0.1", 8000 + len(router.get_instances()))
            )
    for endpoint in router.registry:
        router.registry.probed(endpoint, None)
    headers = {**HEADERS, **({} if parent is None else {"traceparent": PARENT + parent})}
    exporting = None if ratio is None else SpanExport("", ratio, exporter=Nowhere())
    if exporting is not None:
        router.tracer, router.prefill_leg = exporting.tracer, TracedLeg(prefill, time.monotonic)

    ahead = 0.0

    async def requests() -> None:
        nonlocal ahead
        for _ in range(100):
            forward = await router.route(headers, BODY)
            assert isinstance(forward, Forward)
            assert forward.prefill is not None
            forward.headers()
            forward.release()
        ahead += 2 * REMEMBERED_S
        router.in_flight.ended.settle()

    with asyncio.Runner() as runner:
        benchmark(lambda: runner.run(requests()))
        if exporting is not None:
            runner.run(exporting.close())
