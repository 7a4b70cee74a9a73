"""What a large body costs others: how late the event loop gets while one of 64 MiB passes, and the memory.

Each body goes to a scheduler in a process of its own, over gRPC as Envoy sends it. ``BODY_MIB`` is its size.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import uvloop
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from tests.support.bodies import REFUSED, SHAPES

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.connectors import Attempt
from vllm_pd_scheduler.envoy.ext_proc import ExtProcService
from vllm_pd_scheduler.envoy.ext_proc.messages import SERVICE
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.handoff.interfaces import PrefillAnswer
from vllm_pd_scheduler.models import PD_ROLES, PDInstance
from vllm_pd_scheduler.request.headers import ENVOY_CONFIG, ENVOY_CONFIG_VERSION
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.rpc import Server
from vllm_pd_scheduler.system.allocator import return_large_blocks

MIB = int(os.environ.get("BODY_MIB", "64"))
LIMIT = (MIB << 20) + (1 << 20)
OPTIONS = [("grpc.max_receive_message_length", LIMIT), ("grpc.max_send_message_length", LIMIT)]
TICK_S = 0.001
PARAMS = {
    "do_remote_prefill": True,
    "remote_engine_id": "e",
    "remote_block_ids": [[1]],
    "remote_host": "h",
    "remote_port": 1,
    "remote_request_id": "r",
}
ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "benchmarks.test_bodies"]
OUR_ENVOY = ((ENVOY_CONFIG, ENVOY_CONFIG_VERSION),)
"""Whoever does not say this is a gateway, whose body comes in parts."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"], ids=["split", "passed"])
def test_body(benchmark: Any, shape: str, path: str) -> None:
    def measure() -> dict[str, Any]:
        return dict(json.loads(subprocess.check_output([*COMMAND, shape, path], cwd=ROOT)))

    measured = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(measured)
    print(f"\n{shape:20} {path:16}", ", ".join(f"{key} {value}" for key, value in measured.items()))
    assert measured["answer"] == "forwarded" or shape in REFUSED


async def prefill(
    endpoint: Endpoint, path: str, headers: Mapping[str, str], body: bytes, attempt: Attempt, sent: Any = None
) -> PrefillAnswer:
    """Answer as vLLM does, after a moment."""
    await asyncio.sleep(0.05)
    return PrefillAnswer(200, "application/json", json.dumps({"kv_transfer_params": PARAMS}).encode())


def kib(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))


async def serve(shape: str, path: str) -> None:
    """Serve one body that another process sends; print how late the loop was, and the memory.

    On a machine that does other things too, the loop is later than by what it has itself been busy with.
    """
    return_large_blocks()
    router = PDRouter(SchedulerConfig(strategy="prefix_cache"), prefill_leg=prefill)
    for role in PD_ROLES:
        router.registry.probed(router.registry.add(PDInstance(role, role, "127.0.0.1", 1)), None)
    service = ExtProcService(router)
    server = Server(service.methods())
    port = await server.listen("127.0.0.1", 0)
    before, late, busy = kib("VmRSS"), 0.0, 0.0

    async def tick() -> None:
        nonlocal late, busy
        while True:
            start, used = time.perf_counter(), time.thread_time()
            await asyncio.sleep(TICK_S)
            late = max(late, time.perf_counter() - start - TICK_S)
            busy = max(busy, time.thread_time() - used)

    ticking = asyncio.ensure_future(tick())
    start = time.perf_counter()
    client = await asyncio.create_subprocess_exec(
        *COMMAND, "send", str(port), shape, path, cwd=ROOT, stdout=subprocess.PIPE
    )
    answer, _ = await client.communicate()
    took = time.perf_counter() - start
    ticking.cancel()
    await server.stop()
    print(
        json.dumps(
            {
                "answer": answer.decode().strip(),
                "late ms": round(late * 1000),
                "busy ms": round(busy * 1000),
                "took s": round(took, 2),
                "peak, in bodies": round((kib("VmHWM") - before) / 1024 / MIB, 2),
            }
        )
    )


async def send(port: str, shape: str, path: str) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
        call = channel.stream_stream(f"/{SERVICE}/Process")(metadata=OUR_ENVOY)
        request, body = pb.ProcessingRequest(), SHAPES[shape](MIB << 20)
        for name, value in ((":method", "POST"), (":path", path), ("content-length", str(len(body)))):
            request.request_headers.headers.headers.add(key=name, raw_value=value.encode())
        await call.write(request.SerializeToString())
        await call.read()
        request.request_body.body, request.request_body.end_of_stream = body, True
        await call.write(request.SerializeToString())
        answer = pb.ProcessingResponse.FromString(await call.read())
        print(answer.immediate_response.status.code or "forwarded")
        await call.done_writing()
        await call.read()


if __name__ == "__main__":
    if sys.argv[1] == "send":
        uvloop.run(send(*sys.argv[2:]))
    else:
        uvloop.run(serve(*sys.argv[1:]))
