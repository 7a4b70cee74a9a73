"""A real vLLM pair and a decode instance that breaks: what is rescued is right, what is unused is freed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp
import pytest

from tests.processes import Stack, spawned, until
from tests.vllm.test_real_pair import AGGREGATED, DECODE, PREFILL, _post, _prompt, _ready, pair
from vllm_pd_scheduler.metrics import parse_metrics

__all__ = ["pair"]

pytestmark = pytest.mark.vllm


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


@pytest.fixture(scope="module")
def broken() -> Iterator[int]:
    """The port of an instance that breaks."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(scope="module")
def stack(pair: None, broken: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(Path(tmp_path_factory.mktemp("stack")))
    config = {
        "strategy": "round_robin",
        "prefill_instances": [{"id": "p", "host": "127.0.0.1", "port": PREFILL}],
        "decode_instances": [
            {"id": "d", "host": "127.0.0.1", "port": DECODE},
            {"id": "broken", "host": "127.0.0.1", "port": broken},
        ],
        "ejection_failures": 1_000_000,
        "ejection_success_rate": 0.0,
    }
    with spawned(stack.up(config)):
        yield stack


async def _kv_usage(port: int) -> float:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/metrics") as response,
    ):
        return parse_metrics(await response.text()).kv_usage


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_decode_instance_that_breaks(stack: Stack, stream: bool) -> None:
    await _ready(stack)
    rescued = 0
    for number in range(4):
        prompt = _prompt(f"broken-{stream}-{number}-{os.getpid()}")
        body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "max_tokens": 16, "stream": stream}
        expected = await _post(f"http://127.0.0.1:{AGGREGATED}", "/v1/completions", body)
        answer = await _post(stack.url, "/v1/completions", body)
        assert answer.text == expected.text
        assert answer.headers["x-pd-decode"] == "d"
        rescued += "x-pd-prefill" not in answer.headers
    assert rescued == 2

    async def freed() -> bool:
        return await _kv_usage(PREFILL) == 0

    await until(freed, 5)  # the lease is 30 s
