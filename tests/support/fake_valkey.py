"""What answers in place of a Valkey or Redis server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def fake(answers: dict[bytes, bytes]) -> AsyncIterator[str]:
    """Serve answers to commands by their first word; whoever gets none waits."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(4096):
                for word, answer in answers.items():
                    if word in data:
                        writer.write(answer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"valkey://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


def hello(version: str, role: str = "master") -> bytes:
    words = "version", version, "mode", "standalone", "role", role
    return ("%3\r\n" + "".join(f"${len(each)}\r\n{each}\r\n" for each in words)).encode()


USABLE = {
    b"HELLO": hello("7.2.4"),
    b"SUBSCRIBE": b">3\r\n$9\r\nsubscribe\r\n$1\r\nx\r\n:1\r\n",
    b"PUBLISH": b":1\r\n",
}
