"""All sources that the configuration names: started, and stopped when it names them no more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

from ..config import SchedulerConfig, read_instances
from ..config.sources import DnsSource, DockerSource, KubernetesSource
from ..models import By
from .files import InstanceFile, source_of
from .membership import Membership
from .source import Beside, Report, Source

log = logging.getLogger(__name__)

FIRST_WORD_S = 10.0
"""Seconds that a start waits for sources that have told nothing yet."""

AGAIN_S = 5.0
"""Seconds until a source that has ended for a bug is followed again."""


class Sources:
    """Follows what the configuration names; ``clock`` returns monotonic seconds.

    What sources tell of beside instances goes to ``beside``.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        membership: Membership,
        clock: Callable[[], float],
        beside: Beside | None = None,
    ) -> None:
        self._beside = beside or Beside()
        self._config = config
        self._membership = membership
        self._clock = clock
        self._running: dict[str, asyncio.Task[None]] = {}
        self._reports: dict[str, Report] = {}

    def read(self) -> None:
        """Read the files once, at the start; raise :exc:`ConfigError` if one cannot be used."""
        for path in self._config.instance_files:
            self._membership.update(source_of(path), read_instances(path, self._config), By.START)
            self._membership.heard(source_of(path), self._clock())
        for source in self._named():
            self._membership.expect(source.name)

    async def follow(self, by: str = By.START) -> None:
        """Follow the sources that the configuration names now, all from the beginning."""
        named = {source.name: source for source in self._named()}
        before = set(self._running)
        await self.stop()
        for name in before.difference(named):
            self._membership.forget(name, by)
            self._beside.forget(name)
        for name, source in named.items():
            self._membership.expect(name)
            self._reports[name] = report = Report(name, self._membership, self._clock)
            self._running[name] = asyncio.ensure_future(_follow(source, report))

    async def first_words(self) -> None:
        """Wait until each source has told something, or for ``FIRST_WORD_S``."""
        try:
            async with asyncio.timeout(FIRST_WORD_S):
                for report in self._reports.values():
                    await report.first_word.wait()
        except TimeoutError:
            silent = ", ".join(sorted(self._membership.silent))
            log.warning("no word yet from %s: Envoy is not told of a role without instances", silent)

    async def stop(self) -> None:
        """Follow none any more."""
        running = list(self._running.values())
        self._running, self._reports = {}, {}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _named(self) -> Iterator[Source]:
        for path in dict.fromkeys(self._config.instance_files):
            yield InstanceFile(path, self._config)
        for entry in self._config.discovery:
            yield _made(entry, self._config, self._beside)


async def _follow(source: Source, report: Report) -> None:
    while True:
        try:
            await source.follow(report)
        except Exception:  # a bug in one is not to end the others, nor to be silent
            log.exception("%s", source.name)
            report.lost("its follower has failed")
        await asyncio.sleep(AGAIN_S)


def _made(
    entry: DnsSource | DockerSource | KubernetesSource, config: SchedulerConfig, beside: Beside
) -> Source:
    """Return the source that an entry describes. What it needs is only imported if it is used."""
    if isinstance(entry, DnsSource):
        from .dns import DnsNames

        return DnsNames(entry, config)
    if isinstance(entry, DockerSource):
        from .docker import DockerContainers

        return DockerContainers(entry, config)
    from .kubernetes import KubernetesPods

    return KubernetesPods(entry, config, beside)
