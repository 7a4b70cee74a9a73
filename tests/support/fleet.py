"""A small fleet that can serve, for tests that need no I/O."""

from typing import Any

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.scheduler import Scheduler

P, D = InstanceRole.PREFILL, InstanceRole.DECODE


def registry_of(prefill: int = 2, decode: int = 2) -> Registry:
    """Healthy instances p0, p1, … and d0, d1, …"""
    registry = Registry()
    for role, count in ((P, prefill), (D, decode)):
        for number in range(count):
            endpoint = registry.add(
                PDInstance(f"{role[0]}{number}", role, f"10.0.{number >> 8}.{number & 255}", 80)
            )
            registry.probed(endpoint, None)
    return registry


def scheduler_of(prefill: int = 2, decode: int = 2, **settings: Any) -> Scheduler:
    """The scheduler of such a fleet."""
    return Scheduler(SchedulerConfig(**settings), registry_of(prefill, decode), seed=1)


def prompt(tokens: float = 1000.0, **more: Any) -> RequestContext:
    return RequestContext("/v1/completions", prompt_tokens=tokens, output_tokens=100.0, **more)
