"""What one ext_proc exchange costs: open, headers, body, end. Our server beside grpc.aio's, in one run.

The client is the same for both, in a process of its own; what is counted is the server's CPU. Nothing is
routed: a constant outcome is answered, so that only the transport and the messages remain. ``EXCHANGES`` is
how many are made, 16 at a time.
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

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.envoy.ext_proc import ExtProcService
from vllm_pd_scheduler.envoy.ext_proc.messages import SERVICE, decode, encode
from vllm_pd_scheduler.envoy.ext_proc.stream import Route, State, Stream
from vllm_pd_scheduler.request.errors import Reject, reject
from vllm_pd_scheduler.request.headers import ENVOY_CONFIG, ENVOY_CONFIG_VERSION
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.rpc import Server
from vllm_pd_scheduler.system.allocator import return_large_blocks

EXCHANGES = int(os.environ.get("EXCHANGES", "4000"))
AT_A_TIME = 16
ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "benchmarks.test_exchange"]
ANSWER = reject(503, "none", "no_decode")
OUR_ENVOY = ((ENVOY_CONFIG, ENVOY_CONFIG_VERSION),)
"""Whoever does not say this is a gateway, whose body comes in parts."""


@pytest.mark.parametrize("server", ["ours", "grpc.aio"])
def test_exchange(benchmark: Any, server: str) -> None:
    def measure() -> float:
        return float(subprocess.check_output([*COMMAND, server], cwd=ROOT))

    us = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["CPU us"] = us
    print(f"\n{server:10} {us:.0f} us of CPU an exchange")


class Constant(PDRouter):
    """Decides nothing."""

    async def route(  # type: ignore[override]
        self, headers: Mapping[str, str], body: bytes, subset: frozenset[str] | None = None
    ) -> Reject:
        return ANSWER


async def process(_: object, context: Any) -> None:
    """Serve an exchange as a grpc.aio handler."""
    stream = Stream()
    while stream.state is not State.CLOSED and (data := await context.read()) is not grpc.aio.EOF:
        action = stream.receive(decode(data))
        reply = stream.routed(ANSWER) if isinstance(action, Route) else action
        await context.write(b"".join(encode(reply)))


async def serve(kind: str) -> None:
    return_large_blocks()
    stop: Any
    if kind == "ours":
        ours = Server(ExtProcService(Constant(SchedulerConfig())).methods())
        port, stop = await ours.listen("127.0.0.1", 0), ours.stop
    else:
        theirs = grpc.aio.server()
        handlers = {"Process": grpc.stream_stream_rpc_method_handler(process)}
        theirs.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = theirs.add_insecure_port("127.0.0.1:0")
        await theirs.start()
        stop = lambda: theirs.stop(None)  # noqa: E731
    used = {}
    for count in (200, 200 + EXCHANGES):
        client = await asyncio.create_subprocess_exec(*COMMAND, "send", str(port), str(count), cwd=ROOT)
        before = time.process_time()
        await client.wait()
        used[count] = time.process_time() - before
    print((used[200 + EXCHANGES] - used[200]) / EXCHANGES * 1e6)
    await stop()


async def send(port: str, count: str) -> None:
    headers, body = pb.ProcessingRequest(), pb.ProcessingRequest()
    for name, value in ((":method", "POST"), (":path", "/v1/completions"), ("content-length", "200")):
        headers.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    body.request_body.body = json.dumps({"prompt": "p" * 185}).encode()
    body.request_body.end_of_stream = True
    first, second = headers.SerializeToString(), body.SerializeToString()
    left = int(count)

    async def one_after_another(channel: grpc.aio.Channel) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            call = channel.stream_stream(f"/{SERVICE}/Process")(metadata=OUR_ENVOY)
            await call.write(first)
            await call.read()
            await call.write(second)
            await call.read()
            await call.code()

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await asyncio.gather(*(one_after_another(channel) for _ in range(AT_A_TIME)))


if __name__ == "__main__":
    if sys.argv[1] == "send":
        uvloop.run(send(*sys.argv[2:]))
    else:
        uvloop.run(serve(sys.argv[1]))
