"""A vLLM that computes nothing: it answers at once, as prefill or as decode instance, at hardly any cost.

``python -m benchmarks.routers.fake_engine PORT …`` is one instance at each port. A request that asks for a
hand-off (NIXL) gets one; any other gets its tokens: all at once, or as a stream of one token a step, for all
streams in the same moment, as vLLM's steps do.
"""

from __future__ import annotations

import argparse
import asyncio
from functools import partial
from typing import Any

import msgspec
import uvloop

from . import http1

STEP_S = 0.01
"""Seconds between two tokens of a stream."""
BACKLOG = 4096
MODEL = "fake-model"

_EVENT_STREAM = http1.head(
    "HTTP/1.1 200 OK", content_type="text/event-stream; charset=utf-8", transfer_encoding="chunked"
)


def _event(data: str) -> bytes:
    return f"{len(data) + 8:x}\r\ndata: {data}\n\n\r\n".encode()


_TOKEN = _event(
    '{"id":"cmpl-fake","object":"text_completion","created":1700000000,"model":"fake-model",'
    '"choices":[{"index":0,"text":" token","logprobs":null,"finish_reason":null,"stop_reason":null}],'
    '"usage":null}'
)
_STREAM_END = _event("[DONE]") + http1.LAST_CHUNK


class Params(msgspec.Struct):
    """What a request says of its hand-off."""

    do_remote_decode: bool = False
    do_remote_prefill: bool = False
    remote_engine_id: str | None = None


class Request(msgspec.Struct):
    """The keys of a body that matter here."""

    prompt: msgspec.Raw = msgspec.Raw()
    max_tokens: int = 16
    stream: bool = False
    kv_transfer_params: Params | None = None


_decode = msgspec.json.Decoder(Request).decode
_encode = msgspec.json.encode


class Counts(msgspec.Struct):
    """How many requests of each kind the instances of a process have had."""

    prefills: int = 0
    hand_offs: int = 0
    """Requests that came with the hand-off of a prefill instance."""
    plain: int = 0
    """Requests that a decode instance had to prefill itself."""


class Engine:
    """All instances of a process: what they have counted, and the streams that run."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._streams: dict[Connection, int] = {}
        self._loop = asyncio.get_running_loop()

    def stream(self, connection: Connection, tokens: int) -> None:
        """Send the first of so many tokens now, and one more in each step."""
        connection.write(_EVENT_STREAM + _TOKEN)
        if not self._streams:
            self._loop.call_later(STEP_S, self._step, self._loop.time() + STEP_S)
        self._streams[connection] = tokens - 1

    def ended(self, connection: Connection) -> None:
        """Stop a stream whose client has left."""
        self._streams.pop(connection, None)

    def _step(self, due: float) -> None:
        finished = []
        for connection, left in self._streams.items():
            if left > 0:
                connection.write(_TOKEN)
                self._streams[connection] = left - 1
            else:
                connection.write(_STREAM_END)
                finished.append(connection)
        for connection in finished:
            del self._streams[connection]
        if self._streams:
            due = max(due + STEP_S, self._loop.time())
            self._loop.call_at(due, self._step, due)


class Connection(asyncio.Protocol):
    """One connection to an instance; requests come one after the other."""

    def __init__(self, engine: Engine, port: int) -> None:
        self._engine, self._port = engine, port
        self._received = bytearray()
        self._wanted = 0
        """Bytes of the request in ``_received``, or ``CHUNKED``; 0 while its head is not complete."""
        self._head = b""

    def connection_made(self, transport: Any) -> None:
        self.write = transport.write

    def connection_lost(self, error: Exception | None) -> None:
        self._engine.ended(self)

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        while received:
            if not self._head:
                end = received.find(http1.HEAD_END)
                if end < 0:
                    return
                end += len(http1.HEAD_END)
                self._head = bytes(received[:end])
                self._wanted = http1.content_length(self._head)
                del received[:end]
            if self._wanted == http1.CHUNKED:
                if not received.endswith(http1.LAST_CHUNK):
                    return
                body = http1.joined(bytes(received))
                received.clear()
            else:
                if len(received) < self._wanted:
                    return
                body = bytes(memoryview(received)[: self._wanted])
                del received[: self._wanted]
            head, self._head = self._head, b""
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        _, path, _ = head.split(b" ", 2)
        if path == b"/v1/completions":
            self._complete(_decode(body))
        elif path == b"/v1/completions/render":
            self._send(_rendered(_decode(body)))
        elif path == b"/counts":
            self._send(_encode(self._engine.counts))
        elif path == b"/v1/models":
            self._send(_encode({"object": "list", "data": [{"id": MODEL, "object": "model"}]}))
        elif path in (b"/health", b"/metrics"):
            self._send(b"", "text/plain")
        else:
            self._send(b"{}", status="404 Not Found")

    def _complete(self, request: Request) -> None:
        counts, params = self._engine.counts, request.kv_transfer_params
        if params is not None and params.do_remote_decode:
            counts.prefills += 1
            self._send(_completion(1, self._hand_off(counts.prefills)))
            return
        if params is not None and params.do_remote_prefill and params.remote_engine_id:
            counts.hand_offs += 1
        else:
            counts.plain += 1
        if request.stream:
            self._engine.stream(self, request.max_tokens)
        else:
            self._send(_completion(request.max_tokens, None))

    def _hand_off(self, number: int) -> dict[str, Any]:
        """What vLLM's NixlConnector answers with, where the transfer is a pull."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[1, 2, 3]],
            "remote_engine_id": f"engine-{self._port}",
            "remote_request_id": f"cmpl-{number}-0",
            "remote_host": "127.0.0.1",
            "remote_port": self._port,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": 48,
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
        }

    def _send(self, body: bytes, content_type: str = "application/json", status: str = "200 OK") -> None:
        head = http1.head(f"HTTP/1.1 {status}", content_type=content_type, content_length=len(body))
        self.write(head + body)


def _rendered(request: Request) -> bytes:
    """The prompt as tokens, one for four bytes: routers that look for shared prefixes may ask for them."""
    prompt = bytes(request.prompt)
    tokens = memoryview(prompt[: len(prompt) & ~1]).cast("H")[::2].tolist()
    return _encode([{"request_id": "cmpl-fake", "token_ids": tokens}])


def _completion(tokens: int, params: dict[str, Any] | None) -> bytes:
    return _encode(
        {
            "id": "cmpl-fake",
            "object": "text_completion",
            "created": 1700000000,
            "model": MODEL,
            "choices": [{"index": 0, "text": " token", "logprobs": None, "finish_reason": "length"}],
            "usage": {"prompt_tokens": 48, "total_tokens": 48 + tokens, "completion_tokens": tokens},
            "kv_transfer_params": params,
        }
    )


async def serve(ports: list[int]) -> list[asyncio.Server]:
    """Start an instance at each of these ports, all with the same counts. Port 0 is one that is free."""
    loop, engine = asyncio.get_running_loop(), Engine()
    return [
        await loop.create_server(partial(Connection, engine, port), "127.0.0.1", port, backlog=BACKLOG)
        for port in ports
    ]


async def _main(ports: list[int]) -> None:
    await serve(ports)
    await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("ports", type=int, nargs="+", metavar="PORT")
    uvloop.run(_main(parser.parse_args().ports))
