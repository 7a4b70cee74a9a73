"""Fleets of any load, and the times that ``predicted_latency`` and ``slo`` go by, written out naively."""

from typing import Any

from hypothesis import strategies as st

from tests.support.fleet import D, P, prompt, registry_of
from tests.support.given import give
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import MetricsSnapshot
from vllm_pd_scheduler.strategies.predicted_latency import NO_ROOM_PENALTY

BLOCKS = tuple(range(1, 11))

loads = st.lists(
    st.fixed_dictionaries(
        {
            "queued": st.lists(st.integers(1, 20_000), max_size=3),
            "cached": st.integers(0, 10),
            "trust": st.sampled_from([0.0, 0.5, 1.0]),
            "overhead": st.sampled_from([0.0, 0.01, 0.05]),
            "others": st.integers(0, 5),
            "usage": st.sampled_from([0.0, 0.3, 0.99]),
            "capacity": st.sampled_from([None, 5000.0, 1e6]),
        }
    ),
    min_size=1,
    max_size=6,
)


def fleet(described: list[dict[str, Any]]) -> Registry:
    registry = registry_of(len(described), len(described))
    for role in (P, D):
        for endpoint, one in zip(registry.endpoints(role), described, strict=True):
            endpoint.holder.store(BLOCKS[: one["cached"]])
            give(endpoint.prefill, trust=one["trust"], overhead=one["overhead"])
            metrics = MetricsSnapshot(0.0, one["others"], kv_usage=one["usage"], kv_capacity=one["capacity"])
            endpoint.scraped(metrics, 0, 0.0)
            for tokens in one["queued"]:
                registry.work.reserve(endpoint, prompt(float(tokens)))
    return registry


def ttft(endpoint: Endpoint, request: Any, work_weight: float) -> float:
    load = endpoint.prefill
    cached = load.trust * request.cached.get(endpoint.holder, 0) * request.block_tokens
    cost = load.cost(max(1.0, request.prompt_tokens - cached), request.prompt_tokens)
    return load.remaining(request.now) + (1 + work_weight) * cost


def step(endpoint: Endpoint, request: Any) -> float:
    tokens = endpoint.kv_tokens + request.prompt_tokens + request.output_tokens
    missing = max(0.0, tokens - endpoint.kv_capacity) if endpoint.kv_capacity is not None else 0.0
    return endpoint.decode.step(endpoint.requests + 1, tokens) + (
        NO_ROOM_PENALTY + missing if missing else 0.0
    )
