"""Endpoints in a known state, for tests of strategies."""

from typing import Any

from hypothesis import strategies as st

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot, PDInstance
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.strategies import Strategy, load_strategy

REQUEST = RequestContext("/v1/completions", model="m")


def build(*loads: dict[str, Any] | None) -> tuple[Registry, list[Endpoint]]:
    """Healthy decode instances d0, d1, …, each with the scrape that its dict describes, if any."""
    registry = Registry()
    for number, load in enumerate(loads):
        endpoint = registry.add(PDInstance(f"d{number}", InstanceRole.DECODE, "10.0.0.1", 8200 + number))
        registry.probed(endpoint, None)
        if load is not None:
            registry.scraped(endpoint, MetricsSnapshot(0.0, **load), 0)
    return registry, list(registry.routable(InstanceRole.DECODE))


def ids(endpoints: list[Endpoint]) -> list[str]:
    return [endpoint.id for endpoint in endpoints]


def strategy(name: str, **weights: float) -> Strategy:
    return load_strategy(name)(SchedulerConfig(strategy=name, **weights))


def picks(chosen: Strategy, registry: Registry, endpoints: list[Endpoint], count: int) -> list[str]:
    """Pick and reserve ``count`` times, as requests do that come at once."""
    found = []
    for _ in range(count):
        best = chosen.rank(endpoints, REQUEST, 1)[0]
        registry.work.reserve(best)
        found.append(best.id)
    return found


counts = st.integers(0, 1000)
scrapes = st.none() | st.fixed_dictionaries(
    {
        "running": counts,
        "waiting": counts,
        "kv_usage": st.floats(0, 1),
        "latency": st.none() | st.floats(0, 1e3),
    }
)
fleets = st.lists(st.tuples(scrapes, st.integers(0, 20)), min_size=1, max_size=8)
"""For each endpoint its scrape and how many requests were sent since."""
