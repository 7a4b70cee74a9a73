"""A file with instances as a source: it is watched, and taken as a whole or not at all."""

from __future__ import annotations

import contextlib
import logging
from functools import partial

from ..config import ConfigError, SchedulerConfig, read_instances
from ..system.daemon_thread import in_daemon_thread
from .source import Report
from .watch import WatchedFile

log = logging.getLogger(__name__)


def source_of(path: str) -> str:
    """Return the name of a file as a source."""
    return f"file:{path}"


class InstanceFile:
    """Follows a file."""

    def __init__(self, path: str, config: SchedulerConfig) -> None:
        self.name = source_of(path)
        self._path = path
        self._config = config

    async def follow(self, report: Report) -> None:
        """Read the file, and again each time that its content has changed: see :class:`.source.Source`."""
        good = False
        async with contextlib.aclosing(WatchedFile(self._path).looks()) as looks:
            async for changed in looks:
                if changed:
                    good = await self._read(report)
                elif good:
                    report.unchanged()

    async def _read(self, report: Report) -> bool:
        """Take what is in the file now, or say why it cannot be used; return whether it was taken."""
        try:
            report.found(await in_daemon_thread(partial(read_instances, self._path, self._config)))
        except ConfigError as error:
            report.lost("; ".join(str(error).splitlines()))
            return False
        except Exception:  # whatever one file does ends no watch
            log.exception("%s cannot be read", self._path)
            report.lost(f"{self._path}: cannot be read")
            return False
        return True
