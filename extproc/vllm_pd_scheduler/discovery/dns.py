"""DNS names as a source of instances."""

from __future__ import annotations

import asyncio

from ..config import SchedulerConfig
from ..config.sources import DnsSource
from .source import Report


class DnsNames:
    """Follows a DNS name."""

    def __init__(self, source: DnsSource, config: SchedulerConfig) -> None:
        self.name = "dns"

    async def follow(self, report: Report) -> None:
        """See :class:`.source.Source`."""
        report.lost("cannot be asked yet")
        await asyncio.get_running_loop().create_future()
