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
"""Seconds that a start waits for sources that have told nothing yet, and those that they replace stay."""

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
        self._gone: set[str] = set()
        """Sources that are named no more, whose instances stay until those that are have had their word."""
        self._replacing: asyncio.Task[None] | None = None

    def read(self) -> None:
        """Read the files once, at the start; raise :exc:`ConfigError` if one cannot be used."""
        for path in self._config.instance_files:
            self._membership.update(source_of(path), read_instances(path, self._config), By.START)
            self._membership.heard(source_of(path), self._clock())
        for source in self._named():
            self._membership.expect(source.name)

    async def follow(self, by: str = By.START) -> None:
        """Follow the sources that the configuration names now, all from the beginning.

        What only those tell of that it names no more drains: now or, if a new one may tell of it as well,
        when that has had its first word, or ``FIRST_WORD_S`` for it.
        """
        named = {source.name: source for source in self._named()}
        gone = (self._gone | set(self._running)).difference(named)
        await self.stop()
        self._gone = gone
        for name, source in named.items():
            self._membership.expect(name)
            self._reports[name] = report = Report(name, self._membership, self._clock)
            self._running[name] = asyncio.ensure_future(_follow(source, report))
        if gone and self._membership.silent:
            self._replacing = asyncio.ensure_future(self._replace(by))
        else:
            self._forget_the_gone(by)

    async def _replace(self, by: str) -> None:
        await self._spoken()
        self._forget_the_gone(by)

    def _forget_the_gone(self, by: str) -> None:
        for name in self._gone:
            self._membership.forget(name, by)
            self._beside.forget(name)
        self._gone = set()

    async def first_words(self) -> None:
        """Wait until each source has told something, or for ``FIRST_WORD_S``."""
        if not await self._spoken():
            silent = ", ".join(sorted(self._membership.silent))
            log.warning("no word yet from %s: Envoy is not told of a role without instances", silent)

    async def _spoken(self) -> bool:
        """Wait as :meth:`first_words`; return whether each has."""
        try:
            async with asyncio.timeout(FIRST_WORD_S):
                for report in self._reports.values():
                    await report.first_word.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Follow none any more."""
        ending = [*self._running.values(), *((self._replacing,) if self._replacing else ())]
        for report in self._reports.values():
            report.end()
        self._running, self._reports, self._replacing = {}, {}, None
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

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
