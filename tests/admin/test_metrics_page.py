"""The metrics page is written in steps, and is the one that prometheus_client writes."""

import asyncio

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vllm_pd_scheduler.admin.metrics_page import STEP_SAMPLES, metrics_page


def registry(series: int) -> CollectorRegistry:
    found = CollectorRegistry()
    requests = Counter("requests", 'Of "all"\nkinds.', ["instance"], registry=found)
    waits = Histogram("wait_seconds", "Waits.", ["instance"], registry=found)
    for number in range(series):
        requests.labels(f'a"{number}\\').inc(number)
        waits.labels(str(number)).observe(number)
    Gauge("empty", "Has no series.", ["instance"], registry=found)
    return found


def without_created(page: bytes) -> list[str]:
    """The lines of a page, less those that say when a series began."""
    return [line for line in page.decode().splitlines() if "_created" not in line]


async def test_it_is_prometheus_clients() -> None:
    for series in (0, 1, STEP_SAMPLES, STEP_SAMPLES + 1):
        made = registry(series)
        expected = [*without_created(generate_latest(made)), *without_created(generate_latest(registry(2)))]
        page = await metrics_page((made, registry(2)))
        assert page.decode().splitlines() == expected


async def test_others_run_meanwhile() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    other = asyncio.ensure_future(count())
    await metrics_page([registry(10 * STEP_SAMPLES)])
    other.cancel()
    assert turns >= 10
