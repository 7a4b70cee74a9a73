"""Real vLLM instances as processes and as servers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from tests.support.processes import Answer, Stack
from tests.support.waiting import until
from vllm_pd_scheduler.health.vllm_metrics import parse_metrics

MODEL = "tiny"
AGGREGATED = "http://127.0.0.1:28100"


@dataclass(frozen=True)
class Instance:
    """One vLLM server and the file with its process id."""

    port: int
    pid_file: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def entry(self, name: str) -> dict[str, Any]:
        """As the scheduler's configuration lists it."""
        return {"id": name, "host": "127.0.0.1", "port": self.port}

    def signal(self, number: int) -> None:
        """Send a signal to the server and its engine."""
        server = psutil.Process(int(self.pid_file.read_text()))
        for process in [server, *server.children(recursive=True)]:
            process.send_signal(number)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop it, and let it go on at the end of the block unless it was killed in it."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(psutil.NoSuchProcess):
                self.signal(signal.SIGCONT)

    async def kv_usage(self) -> float:
        async with aiohttp.ClientSession() as session, session.get(self.url + "/metrics") as response:
            return parse_metrics(await response.text()).kv_usage

    async def transferred(self) -> float:
        """Tokens that it has received from prefill so far."""
        async with aiohttp.ClientSession() as session, session.get(self.url + "/metrics") as response:
            page = await response.text()
        name = "vllm:prompt_tokens_by_source_total"
        lines = [line for line in page.splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if "external_kv_transfer" in line)

    async def freed(self, seconds: float) -> None:
        """Wait until its KV cache pins nothing, for less long than its lease if a call must have freed it."""

        async def empty() -> bool:
            return await self.kv_usage() == 0

        await until(empty, seconds)


@dataclass(frozen=True)
class Pair:
    """A prefill and a decode instance."""

    prefill: Instance
    decode: Instance


async def steer(stack: Stack, name: str, action: str) -> None:
    """Have the scheduler do something with an instance: drain, undrain."""
    force = {"force": "true"} if action == "drain" else {}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{stack.admin}/instances/{name}/{action}", params=force) as answer,
    ):
        assert answer.status < 300, await answer.text()


async def post(url: str, path: str, body: dict[str, Any] | bytes) -> Answer:
    """Send a request; its body may be JSON text."""
    data = body if isinstance(body, bytes) else json.dumps({"model": MODEL, **body}).encode()
    headers = {"content-type": "application/json"}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session,
        session.post(url + path, data=data, headers=headers) as response,
    ):
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Answer(response.status, headers, await response.read())


async def aggregated(body: dict[str, Any], path: str = "/v1/completions") -> str:
    """Return the text that an instance gives which does both."""
    return (await post(AGGREGATED, path, body)).text


async def ready(stack: Stack) -> None:
    """Wait until every instance of a stack is healthy, or draining, and Envoy knows."""

    async def healthy() -> bool:
        try:
            async with aiohttp.ClientSession() as session:
                async with session.get(stack.admin + "/instances") as response:
                    states = {each["state"] for each in (await response.json())["instances"]}
                async with session.get(stack.url + "/health") as response:
                    return response.status == 200 and states <= {"healthy", "draining"}
        except aiohttp.ClientConnectionError:
            return False

    await until(healthy)


def completion(name: str, **more: Any) -> dict[str, Any]:
    """Return a request for a greedy completion of a prompt of some 280 tokens that nobody had before."""
    sentence = "Prefill and decode number {} are apart; the KV cache moves over the wire."
    prompt = f"{name}-{os.getpid()} " + " ".join(sentence.format(number) for number in range(12))
    return {"prompt": prompt, "temperature": 0, "ignore_eos": True, "max_tokens": 16, **more}
