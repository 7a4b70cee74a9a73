"""A real vLLM pair with NIXL behind the real Envoy: greedy output equals an aggregated instance's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.processes import Answer, Stack, spawned, until
from vllm_pd_scheduler.metrics import parse_metrics

pytestmark = pytest.mark.vllm

SCRIPT = Path(__file__).parents[3] / "shared" / "vllm" / "run_pd_pair.sh"
PREFILL, DECODE, AGGREGATED = 28201, 28202, 28100
MODEL = "tiny"


@pytest.fixture(scope="module")
def pair() -> Iterator[None]:
    """Start prefill, decode and aggregated instances, unless they run already; end what was started."""
    if not SCRIPT.exists():
        pytest.skip(f"{SCRIPT} is not there: it installs and starts a vLLM pair on this CPU")
    environment = {**os.environ, "AGG": "1"}
    status = subprocess.run([SCRIPT, "status"], capture_output=True, text=True, check=False).stdout
    started = subprocess.run([SCRIPT, "up"], env=environment, capture_output=True, text=True, timeout=1500)
    assert started.returncode == 0, started.stdout[-2000:] + started.stderr[-2000:]
    yield
    if "pid" not in status:
        subprocess.run([SCRIPT, "down"], env=environment, capture_output=True, check=False)


@pytest.fixture(scope="module")
def stack(pair: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(Path(tmp_path_factory.mktemp("stack")))
    config = {
        "prefill_instances": [{"id": "p", "host": "127.0.0.1", "port": PREFILL}],
        "decode_instances": [{"id": "d", "host": "127.0.0.1", "port": DECODE}],
    }
    with spawned(stack.up(config)):
        yield stack


async def _post(url: str, path: str, body: dict[str, Any]) -> Answer:
    timeout = aiohttp.ClientTimeout(total=120)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(url + path, json={"model": MODEL, **body}) as response,
    ):
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Answer(response.status, headers, await response.read())


async def _transferred() -> float:
    """Tokens that decode has received from prefill so far."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{DECODE}/metrics") as response,
    ):
        page = await response.text()
    parse_metrics(page)
    name = "vllm:prompt_tokens_by_source_total"
    lines = [line for line in page.splitlines() if line.startswith(name) and "external_kv_transfer" in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def _ready(stack: Stack) -> None:
    async def healthy() -> bool:
        try:
            async with aiohttp.ClientSession() as session, session.get(stack.url + "/health") as response:
                return response.status == 200
        except aiohttp.ClientConnectionError:
            return False

    await until(healthy, 30)


def _prompt(name: str) -> str:
    sentence = "Prefill and decode number {} are apart; the KV cache moves over the wire."
    return f"{name} " + " ".join(sentence.format(number) for number in range(12))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize("number", range(3))
async def test_greedy_output_equals_the_aggregated_instances(
    stack: Stack, chat: bool, stream: bool, number: int
) -> None:
    await _ready(stack)
    prompt = _prompt(f"{chat}-{stream}-{number}-{os.getpid()}")
    content: dict[str, Any] = (
        {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    )
    body = {**content, "temperature": 0, "ignore_eos": True, "max_tokens": 24, "stream": stream}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    expected = await _post(f"http://127.0.0.1:{AGGREGATED}", path, body)
    before = await _transferred()
    answer = await _post(stack.url, path, body)
    assert answer.text == expected.text
    assert answer.text
    assert (answer.headers["x-pd-prefill"], answer.headers["x-pd-decode"]) == ("p", "d")

    async def risen() -> bool:
        return await _transferred() - before > 200

    await until(risen)


@pytest.mark.parametrize(
    ("extra", "status"),
    [({"model": "no-such-model"}, 404), ({"prompt": "word " * 9000}, 400), ({"max_tokens": -1}, 400)],
    ids=["unknown model", "prompt too long", "bad value"],
)
async def test_its_own_errors_pass_unchanged(stack: Stack, extra: dict[str, Any], status: int) -> None:
    await _ready(stack)
    body = {"prompt": "p", "max_tokens": 4, **extra}
    expected = await _post(f"http://127.0.0.1:{AGGREGATED}", "/v1/completions", body)
    answer = await _post(stack.url, "/v1/completions", body)
    assert (answer.status, answer.json) == (status, expected.json)


async def test_a_clients_own_hand_off_does_not_reach_it(stack: Stack) -> None:
    """It would end the decode engine: after each of these, the pair still answers right."""
    await _ready(stack)
    body = {"prompt": _prompt("evil"), "max_tokens": 4, "temperature": 0}
    expected = await _post(f"http://127.0.0.1:{AGGREGATED}", "/v1/completions", body)
    for evil in ({"do_remote_prefill": True}, {"do_remote_prefill": True, "remote_block_ids": [1]}):
        answer = await _post(stack.url, "/v1/completions", {**body, "kv_transfer_params": evil})
        assert answer.text == expected.text
        sampled = {**body, "n": 2, "temperature": 1, "kv_transfer_params": evil}
        assert (await _post(stack.url, "/v1/completions", sampled)).status == 200
    assert (await _post(stack.url, "/v1/completions", body)).text == expected.text
