"""KV events of a simulated engine, as vLLM 0.33 publishes them (``vllm/distributed/kv_events.py``)."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

import msgspec
import zmq

from .blocks import BlockPool
from .text import Prompt

FLUSH_S = 0.005
"""How often what has changed is published."""
BUFFER_STEPS = 10_000
"""Batches that can be given again."""
_END = b"\xff" * 8


class Publisher:
    """Publishes what one engine caches and evicts; ``replay_port`` gives that again."""

    def __init__(
        self, pool: BlockPool, block_size: int, host: str, port: int, replay_port: int | None, rank: int
    ) -> None:
        pool.changes = []
        self._pool = pool
        self._block_size = block_size
        self._rank = rank
        self._tokens: dict[int, tuple[int | None, list[int]]] = {}
        """The block before it, and its tokens, by hash."""
        self._sent: deque[tuple[int, bytes]] = deque(maxlen=BUFFER_STEPS)
        self._number = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._live = self._bound(zmq.PUB, host, port)
        self._replay = None if replay_port is None else self._bound(zmq.ROUTER, host, replay_port)

    def _bound(self, kind: int, host: str, port: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(f"tcp://{host}:{port}")
        return socket

    def knows(self, prompt: Prompt, hashes: Sequence[int]) -> None:
        """Remember the tokens of a prompt's blocks."""
        new = [index for index, each in enumerate(hashes) if each not in self._tokens]
        if not new:
            return
        ids, size = prompt.token_ids(), self._block_size
        for index in new:
            before = hashes[index - 1] if index else None
            self._tokens[hashes[index]] = before, ids[index * size : (index + 1) * size]

    async def run(self) -> None:
        """Publish until it is cancelled."""
        try:
            while True:
                self._flush()
                self._answer_replay()
                await asyncio.sleep(FLUSH_S)
        finally:
            self._context.destroy(linger=0)

    def _flush(self) -> None:
        changes, self._pool.changes = self._pool.changes, []
        events = [event for name, came in changes or () if (event := self._event(name, came)) is not None]
        if not events:
            return
        data = msgspec.msgpack.encode([time.time(), events, self._rank])
        self._sent.append((self._number, data))
        self._live.send_multipart([b"", self._number.to_bytes(8, "big"), data])
        self._number += 1

    def _event(self, name: int, came: bool) -> dict[str, object] | None:
        if not came:
            return {"type": "BlockRemoved", "block_hashes": [name], "medium": "GPU"}
        if (known := self._tokens.get(name)) is None:
            return None
        return {
            "type": "BlockStored",
            "block_hashes": [name],
            "parent_block_hash": known[0],
            "token_ids": known[1],
            "block_size": self._block_size,
            "medium": "GPU",
        }

    def _answer_replay(self) -> None:
        while self._replay is not None and self._replay.poll(0):
            client, *_, start = self._replay.recv_multipart()
            first = int.from_bytes(start, "big")
            for number, data in self._sent:
                if number >= first:
                    self._replay.send_multipart([client, b"", b"", number.to_bytes(8, "big"), data])
            self._replay.send_multipart([client, b"", b"", _END, b""])
