"""Tries the configured strategies on a small fleet that is made up, before any request depends on them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from ..config import SchedulerConfig
from ..fleet.registry import Registry
from ..models import PD_ROLES, InstanceRole, MetricsSnapshot, PDInstance
from ..request.context import RequestContext
from ..strategies import UnknownStrategy, make_strategy
from ..telemetry.failures import described
from .candidates import Offer
from .fence import StrategyFence

LIMIT_S = 10.0
"""How long all of it may take. A pick takes microseconds; all requests wait for one that does not return."""

_ENDPOINTS = 3


def rehearse(config: SchedulerConfig) -> list[str]:
    """Return a line for each strategy that cannot be made, raises, or does not return what it should."""
    problems: list[str] = []
    current = ""

    def run() -> None:
        nonlocal current
        for key, name, role in _named(config):
            current = f"{key}: strategy {name!r}"
            try:
                strategy = make_strategy(name, config)
            except UnknownStrategy as error:
                problems.append(f"{key}: {error}")
                continue
            try:
                _try(StrategyFence(strategy, _raised), role)
            except Exception as error:  # someone else's code
                problems.append(f"{current} fails for {role}: {described(error, strategy)}")

    thread = threading.Thread(target=run, daemon=True)  # not waited for if it never returns
    thread.start()
    thread.join(LIMIT_S)
    if thread.is_alive():
        problems.append(f"{current} does not return: all requests would wait for it")
    return list(dict.fromkeys(problems))


def _named(config: SchedulerConfig) -> Iterator[tuple[str, str, InstanceRole]]:
    for role in PD_ROLES:
        key = f"{role}_strategy"
        yield (key if getattr(config, key) else "strategy", config.strategy_of(role), role)
        if config.shadow_strategy is not None:
            yield "shadow_strategy", config.shadow_strategy, role


def _raised(error: Exception) -> None:
    raise error


def _try(strategy: StrategyFence, role: InstanceRole) -> None:
    """Ask a strategy all that it can be asked, before and after the instances were scraped.

    Raise what would be fenced off while it is in use.
    """
    registry = Registry()
    endpoints = [
        registry.add(PDInstance(f"{role}-{number}", role, f"192.0.2.{number}", 8000))
        for number in range(1, _ENDPOINTS + 1)
    ]
    _ = strategy.reads_prefixes
    for scrape in range(3):
        request = _request(float(scrape), registry)
        strategy.accepts_sample(request)
        for offered, count in (*((endpoints, n) for n in range(1, _ENDPOINTS + 1)), (endpoints[:1], 1)):
            with strategy.same_turn():
                strategy.rank(Offer(tuple(offered)), request, count)
        strategy.explained(_ENDPOINTS, endpoints[0], request)
        strategy.order(request, 0.5)
        strategy.hopeless(request, 0.5)
        for number, endpoint in enumerate(endpoints):
            registry.work.reserve(endpoint, request)
            load = MetricsSnapshot(float(scrape), number, number, 0.1 * number, kv_capacity=1e5)
            registry.scraped(endpoint, load, endpoint.in_flight, endpoint.tokens)


def _request(now: float, registry: Registry) -> RequestContext:
    request = RequestContext(
        "/v1/completions",
        model="model",
        body_bytes=500,
        prompt_bytes=400,
        prompt_tokens=100.0,
        output_tokens=50.0,
        blocks=(1, 2, 3),
        block_tokens=32.0,
        session="session" if now else None,
        ttft_slo=1.0 if now else None,
        now=now,
    )
    request.look_up_in(registry.prefixes)
    return request
