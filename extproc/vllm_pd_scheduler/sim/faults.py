"""Test aids of a simulated server: faults to order, and a journal of what it was asked."""

import asyncio
import os
import socket
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec
from aiohttp import web

INFERENCE = ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]
KEPT_BODY = 256 * 1024
"""Bytes of a body that the journal keeps."""


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    """How a server misbehaves; the default is not at all.

    Requests for `paths` wait `delay` seconds and are then answered with `status`, or their connection is
    `reset` before a byte, or cut when `half` of the answer is written; if it is streamed and `mute`, nothing
    comes after the first `mute` tokens, and the connection stays. One whose body has `poison` in it ends the
    engine, or with `abrupt` the process. `times` is how many requests it
    hits (None: all). `/health` answers `health`.
    """

    status: int | None = None
    delay: float = 0.0
    reset: bool = False
    half: bool = False
    mute: int | None = None
    poison: str | None = None
    abrupt: bool = False
    health: int | None = None
    paths: list[str] = msgspec.field(default_factory=lambda: list(INFERENCE))
    times: int | None = None

    def hits(self, path: str) -> bool:
        """Say whether this request is hit, and count it if it is."""
        active = self.status is not None or self.delay or self.reset or self.half or self.mute is not None
        if not active or path not in self.paths or self.times == 0:
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass(slots=True)
class Entry:
    """One request as it came, how it was answered, and what became of its hand-offs."""

    number: int
    method: str
    path: str
    headers: dict[str, str]
    data: bytes = b""
    size: int = 0
    status: int | None = None
    hand_off: str | None = None
    """"send" or "receive"."""
    outcomes: list[str] = field(default_factory=list)
    """Of each hand-off received: good, stale, failed, recomputed or released."""

    def body(self) -> dict[str, Any]:
        """The entry as JSON; `body` is cut at `KEPT_BODY` bytes, `body_bytes` is its true size."""
        return {
            "number": self.number,
            "method": self.method,
            "path": self.path,
            "headers": self.headers,
            "body": self.data.decode("utf-8", "replace"),
            "body_bytes": self.size,
            "status": self.status,
            "hand_off": self.hand_off,
            "outcomes": self.outcomes,
        }


class Journal:
    """The last requests, oldest first."""

    def __init__(self, size: int = 200) -> None:
        self.total = 0
        self._entries: deque[Entry] = deque(maxlen=size)

    def open(self, request: web.BaseRequest) -> Entry:
        """Write down a request whose body has not been read yet."""
        self.total += 1
        entry = Entry(self.total, request.method, request.path, dict(request.headers))
        self._entries.append(entry)
        return entry

    def body(self) -> list[dict[str, Any]]:
        """All entries as JSON."""
        return [entry.body() for entry in self._entries]


async def cut(request: web.BaseRequest, *, written: bool = False) -> NoReturn:
    """End a request by ending its connection: by a reset, or after what was `written` has gone out."""
    transport = request.transport
    assert transport is not None
    if written:
        transport.close()
    else:
        with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as connection:
            # To linger for no time means to close by a reset.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    # The server cancels a handler whose connection has gone.
    await asyncio.Event().wait()
    raise AssertionError("unreachable")
