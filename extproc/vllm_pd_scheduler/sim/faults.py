"""Test aids of a simulated server: faults that a test orders, and a journal of requests."""

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
"""Paths that a fault hits if it names none."""
MAX_JOURNAL_BODY = 256 * 1024
"""Bytes of a body that the journal keeps: enough for tests, and bounded in a long soak test."""

ENTRY = "entry"
"""Key of a request's journal entry in the request object."""
HALF = "half"
"""Key of the request object: whether the fault cuts this answer in half."""
MUTE = "mute"
"""Key of the request object: after how many tokens of a stream the fault sends nothing more."""


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    """How a server misbehaves, as a test orders by ``POST /_sim/fault``; by default it does not.

    - ``paths``: requests that are hit. ``times``: how many of them; None for all.
    - ``delay``: seconds before anything else happens to a request.
    - ``status``: answer with this error.
    - ``reset``: reset the connection before the answer's first byte.
    - ``half``: close the connection when half of the answer is written.
    - ``health``: status that ``/health`` answers.
    - ``mute``: send so many tokens of a stream, then nothing, and leave the connection open.
    - ``stuck``: the engine makes no step. Only the server still answers.
    - ``refuses``: hand-offs of senders at these ports fail, as over a fabric that does not connect them.
    - ``slow_from``: by its port, seconds more that each transfer from a sender takes.
    - ``eos``: each answer ends with its first token, if the request allows that.
    - ``garbled``: ports of instances from which whatever is fetched is wrong, without any error.
    - ``poison``: a request whose body has this text in it ends the engine, or with ``abrupt`` the process.
    """

    status: int | None = None
    delay: float = 0.0
    reset: bool = False
    half: bool = False
    mute: int | None = None
    stuck: bool = False
    refuses: list[int] = []
    slow_from: dict[int, float] = {}
    eos: bool = False
    garbled: list[int] = msgspec.field(default_factory=list)
    poison: str | None = None
    abrupt: bool = False
    health: int | None = None
    paths: list[str] = msgspec.field(default_factory=lambda: list(INFERENCE))
    times: int | None = None

    def hits(self, path: str) -> bool:
        """Return whether the fault hits this request, and count it if so."""
        active = self.status is not None or self.delay or self.reset or self.half or self.mute is not None
        if not active or path not in self.paths or self.times == 0:
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass(slots=True)
class Entry:
    """One request of the journal: how it came, its status, and the outcomes of its hand-offs."""

    number: int
    method: str
    path: str
    headers: dict[str, str]
    data: bytes = b""
    size: int = 0
    status: int | None = None
    hand_off: str | None = None
    """"send" for a request that prefills for another engine, "receive" for one that fetches its KV."""
    rank: int = 0
    """Of the engine that had it."""
    outcomes: list[str] = field(default_factory=list)
    """For each hand-off received: good, stale, failed, recomputed or released."""

    def as_json(self) -> dict[str, Any]:
        """Return the entry as JSON; ``body`` is cut at ``MAX_JOURNAL_BODY`` bytes, ``body_bytes`` is not."""
        return {
            "number": self.number,
            "method": self.method,
            "path": self.path,
            "headers": self.headers,
            "body": self.data.decode("utf-8", "replace"),
            "body_bytes": self.size,
            "status": self.status,
            "hand_off": self.hand_off,
            "rank": self.rank,
            "outcomes": self.outcomes,
        }


class Journal:
    """The last ``size`` requests, oldest first; ``total`` counts all."""

    def __init__(self, size: int = 200) -> None:
        self.total = 0
        self._entries: deque[Entry] = deque(maxlen=size)

    def record(self, request: web.BaseRequest) -> Entry:
        """Add a request whose body has not been read yet, and return its entry."""
        self.total += 1
        entry = Entry(self.total, request.method, request.path, dict(request.headers))
        self._entries.append(entry)
        return entry

    def as_json(self) -> list[dict[str, Any]]:
        """Return all entries as JSON."""
        return [entry.as_json() for entry in self._entries]


async def drop_connection(request: web.BaseRequest, *, flush: bool = False) -> NoReturn:
    """End a request's connection by a reset or, with ``flush``, after what was written has been sent."""
    transport = request.transport
    assert transport is not None
    if flush:
        transport.close()
    else:
        with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as connection:
            # A connection that lingers for 0 s is closed by a reset.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    # The server cancels the handler of a connection that has ended, so this await does not return.
    await asyncio.Event().wait()
    raise AssertionError("unreachable")
