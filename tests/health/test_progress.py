"""An engine that hangs behind a server that answers."""

from __future__ import annotations

import pytest

from vllm_pd_scheduler.fleet.condition import reason
from vllm_pd_scheduler.health.progress import STALLED_S, Progress
from vllm_pd_scheduler.health.vllm_metrics import parse_metrics
from vllm_pd_scheduler.models import InstanceRole, InstanceState, PDInstance

from .instances import Fixture

PAGE = """\
vllm:num_requests_running{{engine="0"}} {running}
vllm:generation_tokens_total{{engine="0"}} {tokens}
vllm:request_success_total{{engine="0",finished_reason="stop"}} {finished}
vllm:iteration_tokens_total_count{{engine="0"}} {steps}
"""


def page(running: int = 1, tokens: int = 7, finished: int = 2, steps: int = 9) -> str:
    return PAGE.format(running=running, tokens=tokens, finished=finished, steps=steps)


def still(*pages: str) -> float:
    """Seconds without a step after the last of these pages, which are ten seconds apart."""
    progress, seconds = Progress(), 0.0
    for number, each in enumerate(pages):
        seconds = progress.seen(parse_metrics(each), 100.0 + 10.0 * number)
    return seconds


@pytest.mark.parametrize(
    ("pages", "seconds"),
    [
        ([page()], 0.0),
        ([page(), page(), page()], 20.0),
        ([page(), page(running=9), page(running=3)], 20.0),
        ([page(), page(), page(tokens=8)], 0.0),
        ([page(), page(), page(finished=3)], 0.0),
        ([page(), page(), page(steps=10), page(steps=10)], 10.0),
        ([page(running=0), page(running=0), page()], 10.0),
        ([page(), page(tokens=0, finished=0, steps=0)], 0.0),
    ],
    ids=["first", "still", "more came", "token", "end", "step of a long prompt", "idle", "restarted"],
)
def test_seconds_without_a_step(pages: list[str], seconds: float) -> None:
    assert still(*pages) == seconds


@pytest.mark.parametrize("role", InstanceRole)
async def test_a_decode_instance_that_stands_still_gets_no_request(
    fleet: Fixture, role: InstanceRole
) -> None:
    server = await fleet.serve(name=None)
    server.page = page()
    endpoint = fleet.registry.add(PDInstance("still", role, "127.0.0.1", server.port))
    monitor = fleet.monitor()
    for at in (0.0, STALLED_S - 1.0):
        fleet.now = at
        await monitor.check(endpoint)
        assert endpoint.state is InstanceState.HEALTHY
    for at in (STALLED_S, STALLED_S + 1.0):
        fleet.now = at
        await monitor.check(endpoint)
    if role is InstanceRole.DECODE:
        assert endpoint.state is InstanceState.UNHEALTHY
        assert reason(endpoint).startswith("its engine stands still: ")
    else:
        assert endpoint.state is InstanceState.HEALTHY, "P has a time limit, and may read a prompt for longer"
    server.page = page(tokens=8)
    await monitor.check(endpoint)
    assert endpoint.state is InstanceState.HEALTHY
