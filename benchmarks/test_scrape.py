"""What it costs to watch instances: the CPU time of a probe, with a client, a page and a parser as they are.

The instances are sockets of another process. A run is three probes of each of them, five seconds apart by the
scheduler's clock. ``percent_of_a_core`` is what 1,000 instances take, each probed every 5 s. ``INSTANCES`` is
how many are probed.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.health import HealthMonitor
from vllm_pd_scheduler.health.vllm_metrics import parse_metrics
from vllm_pd_scheduler.instance_http.session import open_session
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.system.open_files import raise_open_files_limit
from vllm_pd_scheduler.telemetry import Telemetry

INSTANCES = int(os.environ.get("INSTANCES", "200"))
INTERVAL_S = 5.0
FLEET = 1000

GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
COUNTERS = ("generation_tokens_total", "request_success_total", *(f"other_{n}_total" for n in range(40)))
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "request_time_per_output_token_seconds",
    "inter_token_latency_seconds",
    *(f"other_{number}_seconds" for number in range(19)),
)
MODELS = b'{"object":"list","data":[{"id":"m","object":"model","created":1,"owned_by":"vllm","root":"/m"}]}'


def page(engines: int) -> bytes:
    """A page as vLLM's: some 58 KB and 700 lines for each engine, of which 13 matter."""
    lines = [f'python_gc_objects_collected_total{{generation="{number}"}} 1.0' for number in range(30)]
    lines.append("process_start_time_seconds 1.76e+09")
    for engine in range(engines):
        labels = f'engine="{engine}",model_name="meta-llama/Llama-3.3-70B-Instruct"'
        lines.append(f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="4096",{labels}}} 1.0')
        for name in (*GAUGES, *COUNTERS):
            lines += [f"# HELP vllm:{name} What it is.", f"vllm:{name}{{{labels}}} 0.5"]
        for name in HISTOGRAMS:
            lines += [f"# HELP vllm:{name} What it is.", f"# TYPE vllm:{name} histogram"]
            lines += [f'vllm:{name}_bucket{{{labels},le="{bound}"}} {bound}.0' for bound in range(20)]
            lines += [f"vllm:{name}_sum{{{labels}}} 12.5", f"vllm:{name}_count{{{labels}}} 100.0"]
    return "\n".join(lines).encode() + b"\n"


@pytest.fixture(params=[1, 4], ids="{}-engines".format)
def ports(request: pytest.FixtureRequest) -> Iterator[list[int]]:
    """Ports of instances in another process."""
    with instances(request.param, INSTANCES) as found:
        yield found


@contextmanager
def instances(engines: int, count: int) -> Iterator[list[int]]:
    """Serve so many in another process; give their ports."""
    command = [sys.executable, __file__, str(engines), str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield [int(port) for port in process.stdout.readline().split()]
        process.terminate()


@pytest.mark.benchmark(timer=time.process_time)
def test_probe(benchmark: Any, ports: list[int]) -> None:
    """CPU seconds of ``3 * INSTANCES`` probes."""
    now, registry = 0.0, Registry()
    for port in ports:
        role = InstanceRole.PREFILL if port % 2 else InstanceRole.DECODE
        registry.add(PDInstance(f"i{port}", role, "127.0.0.1", port))

    async def probes(monitor: HealthMonitor) -> None:
        nonlocal now
        for _ in range(3):
            for endpoint in registry:  # one after another, as they are due
                await monitor.check(endpoint)
            now += INTERVAL_S

    async def made() -> HealthMonitor:
        session = open_session()
        return HealthMonitor(
            registry, Telemetry(), session, interval=INTERVAL_S, timeout=2.0, clock=lambda: now
        )

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        monitor = runner.run(made())
        runner.run(probes(monitor))
        assert all(endpoint.routable and endpoint.metrics and endpoint.models.names for endpoint in registry)
        benchmark.pedantic(lambda: runner.run(probes(monitor)), rounds=7)
        runner.run(monitor._probe._session.close())
    probe = benchmark.stats.stats.median / (3 * len(ports))
    benchmark.extra_info["microseconds_per_probe"] = round(1e6 * probe)
    benchmark.extra_info["percent_of_a_core"] = round(100 * probe * FLEET / INTERVAL_S, 1)
    print(benchmark.extra_info)


def labelled(kilobytes: int) -> bytes:
    """A page of one engine so long, since it has many labels: of series that do not matter."""
    text = page(1)
    for number in range(100_000):
        if len(text) >= kilobytes << 10:
            break
        labels = f'engine="0",model_name="meta-llama/Llama-3.3-70B-Instruct",lora_name="adapter-{number}"'
        text += b"".join(
            f'vllm:time_in_lora_seconds_bucket{{{labels},le="{bound}"}} {bound}.0\n'.encode()
            for bound in range(20)
        )
    return text


PAGES = {
    "1-engine": page(1),
    "3-engines": page(3),
    "5-engines": page(5),
    "150-KB-of-labels": labelled(150),
    "300-KB-of-labels": labelled(300),
}


@pytest.mark.parametrize("kind", PAGES)
def test_parse(benchmark: Any, kind: str) -> None:
    """A page alone, and how many times as long ``prometheus_client`` takes for all of it."""
    text = PAGES[kind]
    scrape = benchmark(parse_metrics, text)
    assert scrape.running >= 0.5
    begun = time.process_time()
    assert len(list(text_string_to_metric_families(text.decode()))) > 50
    times = (time.process_time() - begun) / benchmark.stats.stats.median
    benchmark.extra_info |= {"kilobytes": len(text) >> 10, "times_prometheus_client": round(times)}
    print(benchmark.extra_info)


class _Instance(asyncio.Protocol):
    """Answers as uvicorn does."""

    answers: dict[bytes, bytes]

    def connection_made(self, transport: Any) -> None:
        self._transport, self._buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
            self._transport.write(self.answers[head.split(b" ")[1]])


def _answer(body: bytes, content_type: bytes) -> bytes:
    return (
        b"HTTP/1.1 200 OK\r\ndate: Sat, 28 Nov 2026 06:00:00 GMT\r\nserver: uvicorn\r\n"
        b"content-length: %d\r\ncontent-type: %s\r\n\r\n%s" % (len(body), content_type, body)
    )


async def _serve(engines: int, count: int) -> None:
    _Instance.answers = {
        b"/health": _answer(b"", b"text/plain"),
        b"/metrics": _answer(page(engines), b"text/plain; version=0.0.4; charset=utf-8"),
        b"/v1/models": _answer(MODELS, b"application/json"),
    }
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(_Instance, "127.0.0.1", 0) for _ in range(count)]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    raise_open_files_limit()
    uvloop.run(_serve(*map(int, sys.argv[1:])))
