"""A real vLLM pair among instances that break: what is rescued is right, what is unused is freed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Stack, spawned
from tests.support.real_vllm import Pair, aggregated, completion, post, ready, steer

pytestmark = pytest.mark.vllm

PREFILL_TIMEOUT_S = 2.0


class _Broken(BaseHTTPRequestHandler):
    """Healthy by its own account, but hangs up on every request."""

    def do_GET(self) -> None:
        page = b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
        self.send_response(200)
        self.send_header("content-length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def do_POST(self) -> None:
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Failing(_Broken):
    """Answers 500."""

    def do_POST(self) -> None:
        self.send_response(500)
        self.send_header("content-length", "0")
        self.end_headers()


class _Hanging(_Broken):
    """Answers nothing in time."""

    def do_POST(self) -> None:
        time.sleep(2 * PREFILL_TIMEOUT_S)
        self.close_connection = True


@contextmanager
def _serving(handler: type[_Broken]) -> Iterator[dict[str, Any]]:
    """An instance that breaks, as the configuration lists it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"id": handler.__name__.strip("_").lower(), "host": "127.0.0.1", "port": server.server_port}
        server.shutdown()


@contextmanager
def _up(
    directory: Path, pair: Pair, prefill: list[dict[str, Any]], decode: list[dict[str, Any]]
) -> Iterator[Stack]:
    stack = Stack(directory)
    config = {
        "strategy": "round_robin",
        "prefill_instances": [*prefill, pair.prefill.entry("p")],
        "decode_instances": [pair.decode.entry("d"), *decode],
        "prefill_timeout": PREFILL_TIMEOUT_S,
        "ejection_failures": 1_000_000,
        "ejection_success_rate": 0.0,
    }
    with spawned(stack.up(config)):
        yield stack


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_decode_instance_that_breaks(pair: Pair, tmp_path: Path, stream: bool) -> None:
    with _serving(_Broken) as broken, _up(tmp_path, pair, [], [broken]) as stack:
        await ready(stack)
        rescued = 0
        for number in range(4):
            body = completion(f"broken-{stream}-{number}", stream=stream)
            expected = await aggregated(body)
            answer = await post(stack.url, "/v1/completions", body)
            assert answer.text == expected
            assert answer.headers["x-pd-decode"] == "d"
            rescued += "x-pd-prefill" not in answer.headers
        assert rescued == 2
        await pair.prefill.freed(5)  # the lease is 30 s


@pytest.mark.parametrize("handler", [_Broken, _Failing, _Hanging])
async def test_a_prefill_instance_that_breaks(pair: Pair, tmp_path: Path, handler: type[_Broken]) -> None:
    with _serving(handler) as broken, _up(tmp_path, pair, [broken], []) as stack:
        await ready(stack)
        for stream in (False, True):
            body = completion(f"prefill-{handler.__name__}-{stream}", stream=stream)
            expected = await aggregated(body)
            answer = await post(stack.url, "/v1/completions", body)
            assert answer.text == expected
            assert answer.headers["x-pd-prefill"] == "p"


async def test_no_prefill_instance_but_those_that_break(pair: Pair, tmp_path: Path) -> None:
    with ExitStack() as exits:
        broken = [exits.enter_context(_serving(handler)) for handler in (_Broken, _Failing)]
        stack = exits.enter_context(_up(tmp_path, pair, broken, []))
        await ready(stack)
        await steer(stack, "p", "drain")
        for stream in (False, True):
            body = completion(f"none-{stream}", stream=stream)
            expected = await aggregated(body)
            answer = await post(stack.url, "/v1/completions", body)
            assert answer.text == expected
            assert "x-pd-prefill" not in answer.headers
