"""Instances, scrapes and requests in few words, for tests of the registry."""

from tests.support.given import give
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot, PDInstance
from vllm_pd_scheduler.request.context import RequestContext

P, D = InstanceRole.PREFILL, InstanceRole.DECODE
BLOCKS = tuple(range(1, 9))


def instance(
    name: str = "d0", role: InstanceRole = D, host: str = "10.0.0.1", port: int = 8200
) -> PDInstance:
    return PDInstance(name, role, host, port)


def loaded(running: float = 0.0, waiting: float = 0.0) -> MetricsSnapshot:
    return MetricsSnapshot(0.0, running, waiting)


def prompt(tokens: float = 1000.0, now: float = 0.0, registry: Registry | None = None) -> RequestContext:
    """A request; with a registry, one whose blocks may be cached somewhere."""
    request = RequestContext("/", prompt_tokens=tokens, output_tokens=100.0, now=now)
    if registry is not None:
        give(request, blocks=BLOCKS, block_tokens=tokens / len(BLOCKS))
        request.look_up_in(registry.prefixes)
    return request
