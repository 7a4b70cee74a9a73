"""A gRPC server in this process, and a client that others have written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from vllm_pd_scheduler.rpc import Method, Server

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@asynccontextmanager
async def served(*services: Any, methods: dict[str, Method] | None = None) -> AsyncIterator[grpc.aio.Channel]:
    """Serve on a port, and give a channel to it."""
    server = Server({**(methods or {}), **{k: v for each in services for k, v in each.methods().items()}})
    port = await server.listen("127.0.0.1", 0)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
            yield channel
    finally:
        await server.stop()


def code_of(error: grpc.aio.AioRpcError) -> str:
    return str(error.code().name)
