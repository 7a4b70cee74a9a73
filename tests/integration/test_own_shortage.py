"""This machine has no file descriptors left: no instance is blamed for it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from tests.support.processes import Client, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.waiting import until

SLOW_PREFILL = ["--prefill-min=0.15"]


def limited(command: list[str], files: int) -> list[str]:
    return ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *command]


@pytest.mark.parametrize("way", ["straight", "listener"])
async def test_the_schedulers(session: aiohttp.ClientSession, tmp_path: Path, way: str) -> None:
    stack = Stack(tmp_path)
    with Fleet(2, 1, arguments=SLOW_PREFILL) as fleet:
        config = {**fleet.config(), "strategy": "round_robin", "health_check_interval": 0.1}
        config |= stack.listener if way == "listener" else {}
        with spawned(stack.envoy()) as envoy, spawned(limited(stack.serve(config), 60)) as scheduler:
            client = Client(session, stack, fleet)
            await ready(client, envoy)
            await client.until_split()
            await client.states()  # the connection to the admin interface stays open, as a scraper's does
            answers = await asyncio.gather(*(client.complete() for _ in range(100)))
            statuses = Counter(answer.status for answer in answers)
            assert set(statuses) == {200, 503}
            for answer in answers:
                if answer.status == 503:
                    assert answer.headers["x-pd-reason"] == "local_resources"
                    assert answer.headers["retry-after"]
                    assert answer.error["message"] == "The scheduler's machine is short of resources."
            assert set((await client.states()).values()) == {"healthy"}
            _, page = await client.admin("GET", "/metrics")
            assert f'pd_scheduler_local_errors_total{{kind="EMFILE"}} {float(statuses[503])}' in page
            assert "pd_scheduler_prefill_failures_total{" not in page
            told = "sent, which is no instance's fault: EMFILE on this"
            await scheduler.says(told)
            assert scheduler.output.count(told) == 1
            for _ in range(4):
                assert "x-pd-prefill" in (await client.complete()).headers
            assert "Traceback" not in scheduler.output


async def test_envoys(session: aiohttp.ClientSession, tmp_path: Path) -> None:
    """It answers in the prefill instance's place, and says by what words whose fault it was."""
    stack = Stack(tmp_path)
    with Fleet(1, 1) as fleet, contextlib.ExitStack() as held:
        config = {**fleet.config(), "health_check_interval": 3600, **stack.listener}
        command = limited([*stack.envoy(), "--concurrency", "1"], 80)
        with spawned(command) as envoy, spawned(stack.serve(config)):
            client = Client(session, stack, fleet)
            await ready(client, envoy)

            async def short() -> bool:
                """Take what there is, and what the connections to instances, closed after 4 s, leave."""
                for _ in range(60):
                    with contextlib.suppress(OSError):
                        held.enter_context(socket.create_connection(("127.0.0.1", stack.ports.ingress), 0.1))
                await asyncio.sleep(5)
                answer = await client.complete()
                return answer.headers.get("x-pd-reason") == "local_resources"

            await client.until_split()
            await until(short)
            assert set((await client.states()).values()) == {"healthy"}
            _, page = await client.admin("GET", "/metrics")
            assert 'pd_scheduler_local_errors_total{kind="envoy"}' in page
            held.close()
            await client.until_split()


async def test_a_prefill_listener_that_is_not_there(session: aiohttp.ClientSession, tmp_path: Path) -> None:
    """A wrong ``prefill_listener``: decode prefills itself, and no prefill instance is ejected."""
    stack = Stack(tmp_path)
    with Fleet(1, 1, arguments=["--prefill-min=0"]) as fleet, spawned(stack.envoy()) as envoy:
        command = stack.serve(fleet.config())
        wrong = stack.write_config(
            {
                **fleet.config(),
                "grpc_port": stack.ports.grpc,
                "admin_port": stack.admin_port,
                "prefill_listener": "http://127.0.0.1:1",
            }
        )
        command[-1] = str(wrong)
        with spawned(command) as scheduler:
            client = Client(session, stack, fleet)
            await ready(client, envoy)
            for _ in range(10):
                answer = await client.complete()
                assert (answer.status, "x-pd-prefill" in answer.headers) == (200, False)
            assert set((await client.states()).values()) == {"healthy"}
            _, page = await client.admin("GET", "/metrics")
            assert 'pd_scheduler_local_errors_total{kind="listener"}' in page
            assert "pd_scheduler_prefill_failures_total{" not in page
            line = "nobody listens at prefill_listener http://127.0.0.1:1: decode instances prefill"
            await scheduler.says(line)
            assert scheduler.output.count(line) == 1
