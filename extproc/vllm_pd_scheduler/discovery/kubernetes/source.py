"""Pods as a source of instances."""

from __future__ import annotations

import asyncio

from ...config import SchedulerConfig
from ...config.sources import KubernetesSource
from ..source import Report


class KubernetesPods:
    """Follows the pods of a namespace."""

    def __init__(self, source: KubernetesSource, config: SchedulerConfig) -> None:
        self.name = "kubernetes"

    async def follow(self, report: Report) -> None:
        """See :class:`~..source.Source`."""
        report.lost("cannot be asked yet")
        await asyncio.get_running_loop().create_future()
