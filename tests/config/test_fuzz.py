"""Whatever a configuration says: the scheduler starts and serves, or says why not."""

import asyncio
import json
import math
import re
from typing import Any

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.processes import unused_ports
from vllm_pd_scheduler.config import ConfigError, SchedulerConfig, parse_config
from vllm_pd_scheduler.models import InstanceRole
from vllm_pd_scheduler.request.errors import Reject
from vllm_pd_scheduler.routing.forward import Forward
from vllm_pd_scheduler.service.app import App, StartupError

FIELDS = list(SchedulerConfig.model_fields)
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, -(10**400)),
    *(0.0, -0.0, 1e-9, 1e-323, 1e9, 1e308, math.inf, -math.inf, math.nan),
    *("", " ", "\0", "\n", "\ud800", "x" * 10_000, "10.0.11", "127.0.0.1", "localhost", "::1", "::", "[::1]"),
    *("least_load", "os:getcwd", "a:b:c", ":", "always", "local", "/", "/dev/null", "http://h:1", "http://["),
    *([], [[]], [None], ["d0"], {}, {"env": ""}, {"env": "HOME"}, {"file": "/dev/zero"}, {"file": "\0"}),
    *({"env": "A", "file": "B"}, {"cert": "/", "key": "/"}, {"cert": "\0", "key": "\0"}, {"ca": "/dev/zero"}),
]
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["p0", "d0", "x", "", *ODD]),
        "host": st.sampled_from(["10.0.0.1", "h", *ODD]),
        "port": st.sampled_from([8100, 9002, *ODD]),
        "api_key": st.sampled_from(ODD),
        "tls": st.sampled_from(ODD),
        "server_name": st.sampled_from(["h", *ODD]),
        "more": st.sampled_from(ODD),
    },
)
ANYTHING = st.dictionaries(
    st.sampled_from([*FIELDS, "more", "", "a\nb"]),
    st.one_of(st.sampled_from(ODD), st.lists(ENTRY, max_size=4)),
    max_size=12,
)


@given(ANYTHING)
@settings(max_examples=400, deadline=None)
def test_it_is_read_or_refused_with_a_reason(raw: dict[str, Any]) -> None:
    problems: list[str] = ["accepted"]
    try:
        config = parse_config(raw, "c.json")
        assert parse_config(json.loads(config.model_dump_json())) == config
    except ConfigError as error:
        problems = error.problems
    assert problems
    assert all(problems)


def numbers() -> dict[str, st.SearchStrategy[Any]]:
    """For each setting that is a number, all that it may be, the bounds more often than the rest."""
    found: dict[str, st.SearchStrategy[Any]] = {}
    for name, schema in SchedulerConfig.model_json_schema()["properties"].items():
        for kind in schema.get("anyOf", [schema]):
            if kind.get("type") in ("integer", "number") and not name.endswith("_port"):
                least, most = kind.get("minimum", kind.get("exclusiveMinimum")), kind["maximum"]
                whole = kind["type"] == "integer"
                if "exclusiveMinimum" in kind:
                    least = math.nextafter(least, 1)
                between = st.integers(least, most) if whole else st.floats(least, most)
                found[name] = st.one_of(st.sampled_from([least, most]), between)
    return found


def test_every_number_has_bounds() -> None:
    assert len(numbers()) > 25


CHOICES: dict[str, st.SearchStrategy[Any]] = {
    **numbers(),
    "strategy": st.sampled_from(
        ["round_robin", "weighted", "power_of_two", "session", "prefix_cache", "slo"]
    ),
    "shadow_strategy": st.sampled_from(["predicted_latency", "least_load"]),
    "disaggregation": st.sampled_from(["always", "never", "auto", 1, 10**9]),
    "late_binding": st.booleans(),
    "on_prefill_failure": st.sampled_from(["local", "fail"]),
    "session_header": st.sampled_from(["a", "host", "-", "x" * 100]),
    "grpc_host": st.sampled_from(
        ["127.0.0.1", "localhost", "::1", "192.0.2.1", "no-such-name.invalid", "::"]
    ),
    "admin_host": st.sampled_from(["127.0.0.1", "localhost", "::1", "127.9.9.9"]),
    "prefill_listener": st.sampled_from(["http://127.0.0.1:1", "http://[::1]:1", "http://localhost"]),
}


async def serve(config: SchedulerConfig) -> None:
    async with App(config) as app:
        host = f"[{config.grpc_host}]" if ":" in config.grpc_host else config.grpc_host
        async with grpc.aio.insecure_channel(f"{host}:{config.grpc_port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        for endpoint in app.router.registry:
            app.router.registry.probed(endpoint, None)
        body = json.dumps({"model": "m", "prompt": "p" * 100, "max_tokens": 5}).encode()
        outcome = await app.router.route({":method": "POST", ":path": "/v1/completions"}, body)
        assert isinstance(outcome, Forward | Reject)
        if isinstance(outcome, Forward):
            outcome.release()
        app.router.dispatcher.close()


@given(st.fixed_dictionaries({}, optional=CHOICES))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_accepted_serves(raw: dict[str, Any]) -> None:
    """An instance that refuses connections is enough: what counts is that each request is decided."""
    grpc_port, admin_port, p, d = unused_ports(4)
    lists = {
        f"{role}_instances": [{"id": role, "host": "127.0.0.1", "port": port}]
        for role, port in ((InstanceRole.PREFILL, p), (InstanceRole.DECODE, d))
    }
    config = parse_config({**raw, **lists, "grpc_port": grpc_port, "admin_port": admin_port})

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await serve(config)

    why = ""
    try:
        uvloop.run(bounded())
    except StartupError as error:
        why = str(error)
    if why:
        assert re.match(r"(grpc|admin)_port: cannot listen on ", why)
        assert config.grpc_host not in ("127.0.0.1", "localhost") or config.admin_host == "::1"
