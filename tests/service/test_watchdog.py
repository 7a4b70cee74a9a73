"""What is measured of the event loop."""

import asyncio
import time

from prometheus_client import generate_latest

from tests.support.waiting import until
from vllm_pd_scheduler.service.watchdog import LoopWatchdog
from vllm_pd_scheduler.telemetry import Telemetry


async def test_how_late_the_loop_is() -> None:
    late: list[float] = []
    watchdog = LoopWatchdog(lambda: None, late.append)
    watchdog.start()
    try:
        await until(lambda: bool(late))
        late.clear()
        time.sleep(0.5)  # noqa: ASYNC251
        await until(lambda: bool(late))
    finally:
        watchdog.stop()
    assert late[0] > 0.25, "it was due 0.125 s after the one before, at the latest"
    told = len(late)
    await asyncio.sleep(0)
    assert len(late) == told


def test_it_is_a_histogram() -> None:
    telemetry = Telemetry()
    for seconds in (0.0, 0.003, 0.7):
        telemetry.process.event_loop_late(seconds)
    page = generate_latest(telemetry.prometheus).decode()
    for bound, count in (("0.001", 1), ("0.005", 2), ("1.0", 3)):
        assert f'pd_scheduler_event_loop_lag_seconds_bucket{{le="{bound}"}} {count}.0' in page
