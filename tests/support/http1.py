"""HTTP/1 as bytes, for what no client library sends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.processes import Answer, Client
from tests.support.waiting import HUNG_S


class Connection:
    """One connection to Envoy, on which requests follow each other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, data: bytes) -> Answer:
        """Send bytes and return the answer to them; raises ``IncompleteReadError`` if there is none."""
        self.writer.write(data)
        async with asyncio.timeout(HUNG_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {
                name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])
            }
            if "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                body = await self.reader.read() if headers.get("connection") == "close" else b""
        return Answer(int(head[0].split()[1]), headers, body)

    async def ended(self) -> bool:
        """Whether Envoy ends the connection and has sent nothing more on it."""
        async with asyncio.timeout(HUNG_S):
            return await self.reader.read() == b""


@asynccontextmanager
async def connection(client: Client, host: str = "127.0.0.1") -> AsyncIterator[Connection]:
    """Open a connection to the ingress."""
    reader, writer = await asyncio.open_connection(host, client.stack.ports.ingress)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


def request(line: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    """Return a request with these lines of headers, and its length if it has a body."""
    length = (b"Content-Length: %d" % len(body),) if body else ()
    return b"\r\n".join((line, *headers, *length, b"", b"")) + body


def post(path: bytes, body: bytes, *headers: bytes, version: bytes = b"HTTP/1.1") -> bytes:
    """Return a POST of JSON."""
    fixed = (b"Host: a", b"Content-Type: application/json")
    return request(b"POST %s %s" % (path, version), *fixed, *headers, body=body)
