"""Files with instances, as a source: each is watched, and taken as a whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial

from ..config import ConfigError, SchedulerConfig, read_instances
from ..models import By, PDInstance
from ..system.daemon_thread import in_daemon_thread
from .membership import Membership
from .watch import WatchedFile

log = logging.getLogger(__name__)


def source_of(path: str) -> str:
    """Return the name of a file as a source."""
    return f"file:{path}"


class InstanceFiles:
    """Follows the files that the configuration names; ``clock`` returns monotonic seconds."""

    def __init__(self, config: SchedulerConfig, membership: Membership, clock: Callable[[], float]) -> None:
        self._config = config
        self._membership = membership
        self._clock = clock
        self._watches: dict[str, asyncio.Task[None]] = {}

    def read(self) -> None:
        """Read all once, at the start; raise :exc:`ConfigError` if one cannot be used."""
        for path in self._config.instance_files:
            self._take(path, read_instances(path, self._config), By.START)

    async def follow(self, by: str = By.START) -> None:
        """Watch the files that the configuration names now, and read them all again."""
        paths = list(dict.fromkeys(self._config.instance_files))
        before = set(self._watches)
        await self.stop()
        for path in before.difference(paths):
            self._membership.forget(source_of(path), by)
        self._watches = {path: asyncio.ensure_future(self._watch(path)) for path in paths}

    async def stop(self) -> None:
        """Watch no file any more."""
        watches, self._watches = self._watches.values(), {}
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)

    async def _watch(self, path: str) -> None:
        source, good = source_of(path), False
        async with contextlib.aclosing(WatchedFile(path).looks()) as looks:
            async for changed in looks:
                if changed:
                    good = await self._read_again(path, source)
                elif good:
                    self._membership.heard(source, self._clock())

    async def _read_again(self, path: str, source: str) -> bool:
        """Take what is in a file now, or say why it cannot be used; return whether it was taken."""
        try:
            found = await in_daemon_thread(partial(read_instances, path, self._config))
            self._take(path, found, f"{By.DISCOVERY} {source}")
        except ConfigError as error:
            self._membership.lost(source, "; ".join(str(error).splitlines()))
            return False
        except Exception:  # whatever one file does ends no watch
            log.exception("%s cannot be read", path)
            self._membership.lost(source, f"{path}: cannot be read")
            return False
        return True

    def _take(self, path: str, found: Sequence[PDInstance], by: str) -> None:
        source = source_of(path)
        self._membership.update(source, found, by)
        self._membership.heard(source, self._clock())
