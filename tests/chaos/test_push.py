"""Engines that push: what kills, hangs and leaves hand-offs behind is survived as where D pulls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.test_chaos import (
    test_a_hand_off_that_nobody_fetches_is_freed,
    test_hung_instance,
    test_killed_instance,
    test_killed_scheduler,
)
from tests.support.sim_fleet import Fleet

__all__ = [
    "test_a_hand_off_that_nobody_fetches_is_freed",
    "test_hung_instance",
    "test_killed_instance",
    "test_killed_scheduler",
]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    arguments = ["--decode-base=0.01", "--step-overhead=0.001", "--kv-connector=nixl-push"]
    with Fleet(2, 2, arguments=arguments, decode_arguments=["--load-fail-policy=recompute"]) as running:
        yield running
