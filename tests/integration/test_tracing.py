"""A client's trace through Envoy, the scheduler, P and D, on real processes, with a collector of OTLP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest_asyncio
import yaml

from tests.support.otlp import Collector, collecting
from tests.support.processes import NO_EJECTION, Client, Stack, ready, spawned
from tests.support.sim_fleet import Fleet
from tests.support.tracing import SAMPLED, SPAN, TRACE, UNSAMPLED
from tests.support.waiting import until
from vllm_pd_scheduler.envoy.configuration import render_config
from vllm_pd_scheduler.envoy.process import find_envoy

BODY = {"prompt": "private words", "max_tokens": 4, "stream": True}
FAST = {"OTEL_BSP_SCHEDULE_DELAY": "50"}
TRACES = ("traceparent", "tracestate", "baggage")
SCHEDULER = "vllm-pd-scheduler"


@pytest_asyncio.fixture
async def collector() -> AsyncIterator[Collector]:
    async with collecting() as running:
        yield running


async def headers_at(client: Client, instance: str) -> dict[str, str]:
    """The headers of the last request there, those of traces alone."""
    seen = (await client.seen(instance))[-1]["headers"].items()
    return {key.lower(): value for key, value in seen if key.lower() in TRACES}


def settings(fleet: Fleet, **more: Any) -> dict[str, Any]:
    return {"strategy": "round_robin", **NO_EJECTION, **fleet.config(), **more}


async def test_a_trace_goes_through_p_and_d(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path, collector: Collector
) -> None:
    stack = Stack(tmp_path)
    config = settings(fleet, tracing={"endpoint": collector.url})
    with spawned(stack.up(config), **FAST) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)

        sent = {
            "traceparent": SAMPLED,
            "tracestate": "a=b",
            "baggage": "k=v",
            "authorization": "Bearer private",
        }
        answer = await client.post("/v1/completions", BODY, sent)
        prefill, decode = answer.headers["x-pd-prefill"], answer.headers["x-pd-decode"]
        at_p, at_d = await headers_at(client, prefill), await headers_at(client, decode)
        await until(lambda: len(collector.of(TRACE)) == 5)
        spans = collector.of(TRACE, SCHEDULER)
        request = spans["POST /v1/completions"]
        assert request.parent == SPAN
        assert {span.parent for span in spans.values() if span is not request} == {request.id}
        assert at_p["traceparent"] == f"00-{TRACE}-{spans['prefill'].id}-01"
        assert at_d["traceparent"] == f"00-{TRACE}-{spans['decode'].id}-01"
        for got in (at_p, at_d):
            assert (got["tracestate"], got["baggage"]) == ("a=b", "k=v")
        assert spans["prefill"].attributes["pd_scheduler.instance"] == prefill
        assert spans["decode"].attributes["pd_scheduler.instance"] == decode
        assert request.attributes["pd_scheduler.request_id"] == answer.headers["x-request-id"]
        assert request.attributes["pd_scheduler.outcome"] == "ok"
        assert request.attributes["gen_ai.latency.time_to_first_token"] > 0

        # Both D fail: Envoy tries one after the other, on the same leg.
        collector.spans.clear()
        for name in ("decode-0", "decode-1"):
            await client.fault(name, status=502)
        assert (await client.post("/v1/completions", BODY, {"traceparent": SAMPLED})).status >= 500
        await until(lambda: "POST /v1/completions" in collector.of(TRACE))
        attempts = [span for span in collector.spans if span.name == "decode attempt"]
        assert {each.attributes["pd_scheduler.instance"] for each in attempts} == {"decode-0", "decode-1"}
        assert all(span.failed and span.parent == collector.of(TRACE)["decode"].id for span in attempts)
        assert collector.of(TRACE)["POST /v1/completions"].failed
        for name in ("decode-0", "decode-1"):
            await client.fault(name)

        # What the client does not sample goes on as it is, and nothing is sent.
        collector.spans.clear()
        answer = await client.post("/v1/completions", BODY, {**sent, "traceparent": UNSAMPLED})
        for name in (answer.headers["x-pd-prefill"], answer.headers["x-pd-decode"]):
            assert await headers_at(client, name) == {
                "traceparent": UNSAMPLED,
                "tracestate": "a=b",
                "baggage": "k=v",
            }
    assert not collector.of(TRACE)
    assert b"private" not in collector.raw


async def test_without_the_section_nothing_is_sent(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path, collector: Collector
) -> None:
    stack = Stack(tmp_path)
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, **FAST}
    with spawned(stack.up(settings(fleet)), **environment) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        sent = {"traceparent": SAMPLED, "tracestate": "a=b", "baggage": "k=v"}
        answer = await client.post("/v1/completions", BODY, sent)
        for name in (answer.headers["x-pd-prefill"], answer.headers["x-pd-decode"]):
            assert await headers_at(client, name) == sent
    assert not collector.raw


async def test_a_collector_that_is_away_does_no_harm(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path
) -> None:
    stack = Stack(tmp_path)
    config = settings(fleet, tracing={"endpoint": f"http://127.0.0.1:{stack.ports.grpc}"})
    with spawned(stack.up(config), **FAST) as process:
        client = Client(session, stack, fleet)
        await ready(client, process)
        for _ in range(5):
            assert (await client.complete()).status == 200
        await until(lambda: "OpenTelemetry: " in process.output)
        process.process.terminate()
        assert process.wait() == 0
        assert process.output.count("OpenTelemetry: ") < 4


def with_tracer(config: dict[str, Any], port: int) -> dict[str, Any]:
    """Return an Envoy's configuration with what docs/tracing.md says to add for a tracer of its own."""
    text = (Path(__file__).parents[2] / "docs/tracing.md").read_text(encoding="utf-8")
    manager, cluster = (
        yaml.safe_load(part.split("```")[0].replace("4317", str(port)).replace("otel-collector", "127.0.0.1"))
        for part in text.split("```yaml\n")[1:3]
    )
    (ingress,) = [each for each in config["static_resources"]["listeners"] if each["name"] == "ingress"]
    ingress["filter_chains"][0]["filters"][0]["typed_config"].update(manager)
    config["static_resources"]["clusters"] += cluster
    return config


async def test_an_envoy_that_traces_too(
    session: aiohttp.ClientSession, fleet: Fleet, tmp_path: Path, collector: Collector
) -> None:
    stack = Stack(tmp_path)
    path = tmp_path / "traced.yaml"
    path.write_text(yaml.safe_dump(with_tracer(render_config(stack.ports), collector.grpc_port)))
    command = [find_envoy(), "-c", str(path), "--log-level", "warning", "--disable-hot-restart"]
    scheduler = stack.serve(settings(fleet, tracing={"endpoint": collector.url}))
    with spawned(scheduler, **FAST), spawned(command) as envoy:
        client = Client(session, stack, fleet)
        await ready(client, envoy)
        await client.until_split()
        answer = await client.post("/v1/completions", BODY, {"traceparent": SAMPLED, "tracestate": "a=b"})
        at_p = await headers_at(client, answer.headers["x-pd-prefill"])
        at_d = await headers_at(client, answer.headers["x-pd-decode"])
        await until(lambda: len(collector.of(TRACE, SCHEDULER)) == 5)
        await until(lambda: any(span.parent == SPAN for span in collector.of(TRACE, "envoy").values()))
        spans = collector.of(TRACE, SCHEDULER)
        envoys = {span.id for span in collector.spans if span.service == "envoy"}
        assert at_p["traceparent"] == f"00-{TRACE}-{spans['prefill'].id}-01"
        assert at_d["traceparent"].split("-")[1] == TRACE
        assert at_d["traceparent"].split("-")[2] in envoys
        await until(
            lambda: (
                spans["POST /v1/completions"].parent
                in {each.id for each in collector.spans if each.service == "envoy"}
            )
        )

        # A client without a trace: Envoy begins it, for P and D alike.
        answer = await client.post("/v1/completions", BODY)
        at_p = await headers_at(client, answer.headers["x-pd-prefill"])
        at_d = await headers_at(client, answer.headers["x-pd-decode"])
        assert at_p["traceparent"].split("-")[1] == at_d["traceparent"].split("-")[1] != TRACE
