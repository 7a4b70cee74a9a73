"""Reads the configuration again while the scheduler runs: all of it counts, or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..config import ConfigError, Reloaded, SchedulerConfig, compare, find_problems, load_config
from ..discovery import CONFIG
from ..discovery.sources import Sources
from ..discovery.watch import WatchedFile
from ..models import By
from ..records.events import EventKind
from ..router import PDRouter
from ..scheduler.rehearsal import rehearse
from ..system.daemon_thread import in_daemon_thread

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The file that the configuration comes from."""

    path: Path
    started: SchedulerConfig
    """What the scheduler was started with."""
    adjust: Callable[[SchedulerConfig], SchedulerConfig]
    """Puts in what the command line says in place of the file."""
    complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """Puts in what the file needs of the command line to be a configuration at all."""

    def load(self) -> SchedulerConfig:
        """Read it; raise :exc:`ConfigError` with all that the command ``check`` would say."""
        found = self.adjust(load_config(self.path, self.complete))
        if problems := rehearse(found):
            raise ConfigError(str(self.path), problems)
        return found


class Reload:
    """Reads a configuration file again: when asked, and when it has changed.

    ``applied`` is called when a change counts, for the parts that keep something of the configuration.
    """

    def __init__(
        self, file: ConfigFile, router: PDRouter, sources: Sources, applied: Callable[[], None]
    ) -> None:
        self._file = file
        self._router = router
        self._sources = sources
        self._applied = applied
        self._known = file.started.model_copy()
        """What the file and the command line say, of keys that need a restart what they said at the start."""
        self._one_at_a_time = asyncio.Lock()

    async def reload(self, by: str, *, asked: bool = True) -> Reloaded:
        """Read the file again and use it; raise :exc:`ConfigError` and change nothing if that cannot be.

        Each makes an event. One that was not ``asked`` for and changes nothing makes none.
        """
        async with self._one_at_a_time:
            try:
                found = await in_daemon_thread(self._file.load)
                outcome = await self._use(found, by)
            except ConfigError as error:
                text = "the configuration is refused, all stays as it was: "
                text += "; ".join(str(error).splitlines())
                self._router.events.add(EventKind.CONFIG, text, by=by, level=logging.ERROR)
                raise
            self._router.membership.heard(CONFIG, time.monotonic())
            await self._sources.follow(by)
        if asked or outcome.changed or outcome.needs_restart:
            self._router.events.add(EventKind.CONFIG, _said(outcome), by=by)
            self._router.tell_misfits(by)
        return outcome

    async def _use(self, found: SchedulerConfig, by: str) -> Reloaded:
        outcome, router = compare(self._known, found), self._router
        if outcome.needs_restart:  # so that what counts is neither the file's nor the one before
            trial = router.config.model_copy()
            trial.take(found, outcome.changed)
            why = f"a change of {', '.join(outcome.needs_restart)} needs a restart"
            if problems := await in_daemon_thread(partial(find_problems, trial)):
                raise ConfigError(str(self._file.path), [f"{each} ({why})" for each in problems])
        try:
            router.reconfigure(found, outcome.changed, by)
        except ValueError as error:
            raise ConfigError(str(self._file.path), [str(error)]) from None
        self._known.take(found, outcome.changed)
        self._applied()
        return outcome

    async def watch(self) -> None:
        """Read the file again each time that it has changed, until this is cancelled."""
        good = True
        async with contextlib.aclosing(WatchedFile(str(self._file.path)).looks()) as looks:
            async for changed in looks:
                if not changed:
                    if good:
                        self._router.membership.heard(CONFIG, time.monotonic())
                    continue
                try:
                    await self.reload(f"{By.DISCOVERY} {CONFIG}", asked=False)
                    good = True
                except ConfigError:
                    good = False
                except Exception:  # whatever the file does ends no watch
                    log.exception("the configuration cannot be read again")
                    good = False


def _said(outcome: Reloaded) -> str:
    changed = f"{', '.join(outcome.changed)} changed" if outcome.changed else "nothing has changed"
    restart = f"; needs a restart: {', '.join(outcome.needs_restart)}" if outcome.needs_restart else ""
    return f"the configuration was read again: {changed}{restart}"
