"""Docker containers as a source of instances."""

from __future__ import annotations

import asyncio

from ..config import SchedulerConfig
from ..config.sources import DockerSource
from .source import Report


class DockerContainers:
    """Follows the containers of a Docker engine."""

    def __init__(self, source: DockerSource, config: SchedulerConfig) -> None:
        self.name = "docker"

    async def follow(self, report: Report) -> None:
        """See :class:`.source.Source`."""
        report.lost("cannot be asked yet")
        await asyncio.get_running_loop().create_future()
