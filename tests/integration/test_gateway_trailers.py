"""Trailers of requests and of answers, through a gateway: some servers and clients end a body by them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest_asyncio

from tests.support.gateway import Gateway, Running, gateway_ready, gateway_running
from tests.support.processes import Client
from tests.support.sim_fleet import Fleet
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.sim.profile import EngineProfile

BODY = json.dumps({"prompt": "Where is the cache?", "max_tokens": 4, "stream": True}).encode()


class DecodeWithTrailers:
    """A D that answers everything with two tokens and a trailer, and keeps what it was sent."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await self._head(reader):
            if not head.startswith(b"POST"):
                writer.write(b"HTTP/1.1 200 OK\r\ndate: today\r\ncontent-length: 2\r\n\r\n{}")
                continue
            self.requests.append(head + await self._chunked(reader))
            writer.write(
                b"HTTP/1.1 200 OK\r\ndate: today\r\ncontent-type: text/event-stream\r\n"
                b"trailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n"
                b"9\r\ndata: a\n\n\r\n9\r\ndata: b\n\n\r\n0\r\nx-sum: 2\r\n\r\n"
            )
        writer.close()

    async def _head(self, reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return b""

    async def _chunked(self, reader: asyncio.StreamReader) -> bytes:
        body = b""
        while (size := int(await reader.readline(), 16)) > 0:
            body += (await reader.readexactly(size + 2))[:-2]
        trailers = b""
        while (line := await reader.readline()) != b"\r\n":
            trailers += line
        return body + trailers


@pytest_asyncio.fixture
async def decode() -> AsyncIterator[tuple[DecodeWithTrailers, int]]:
    played = DecodeWithTrailers()
    server = await asyncio.start_server(played.serve, "127.0.0.1", 0)
    yield played, server.sockets[0].getsockname()[1]
    server.close()


async def raw(running: Running, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", running.stack.port)
    writer.write(request)
    async with asyncio.timeout(HUNG_S):
        found = await reader.readuntil(b"\r\n0\r\n")
        while not found.endswith(b"\r\n\r\n"):
            found += await reader.readline()
    writer.close()
    return found


async def test_trailers_go_both_ways(decode: tuple[DecodeWithTrailers, int], tmp_path: Path) -> None:
    played, port = decode
    with Fleet(1, 1, profile=EngineProfile.instant()) as fleet:
        config = {
            **fleet.config(),
            "decode_instances": [{"id": "decode-0", "host": "127.0.0.1", "port": port}],
        }
        with gateway_running(tmp_path, Gateway(trailers=True), config) as running:
            async with aiohttp.ClientSession() as session:
                client = Client(session, running.stack, fleet)
                await gateway_ready(client, running)
                head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                chunked = b"transfer-encoding: chunked\r\ntrailer: x-mine\r\n\r\n"
                parts = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:20], BODY[20:]))
                answer = await raw(running, head + chunked + parts + b"0\r\nx-mine: 1\r\n\r\n")
                assert answer.startswith(b"HTTP/1.1 200 OK")
                assert b"data: a" in answer
                assert b"data: b" in answer
                assert answer.endswith(b"x-sum: 2\r\n\r\n")
                (seen,) = played.requests
                assert b"remote_block_ids" in seen
                assert seen.endswith(b"x-mine: 1\r\n")
                await client.until_in_flight(0)
                assert "Traceback" not in running.scheduler.output
