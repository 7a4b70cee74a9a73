"""A server for each test, and the event loop that the scheduler runs on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from tests.support.valkey import Server, running


@pytest.fixture(scope="module")
def event_loop_policy() -> uvloop.EventLoopPolicy:
    """Have the event loop that the scheduler runs on."""
    return uvloop.EventLoopPolicy()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path / "server") as started:
        yield started
