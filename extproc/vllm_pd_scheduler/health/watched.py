"""What the monitor remembers of one instance between two probes."""

from __future__ import annotations

import asyncio
import logging

from ..fleet.endpoint import Endpoint
from .probe import Scrapes
from .progress import Progress

log = logging.getLogger(__name__)


class Watched:
    """An instance that is watched since ``now``."""

    def __init__(self, now: float) -> None:
        self.look_up: asyncio.Task[None] | None = None
        self.unresolved: str | None = None
        """Why its name could not be resolved the last time."""
        self.scrapes: Scrapes = []
        """The last ones, of its ranks or of the whole."""
        self._progress: list[Progress] = []
        self.models_at = now
        self.under_way = False
        """Whether a probe by its loop is."""
        self.said: dict[str, str] = {}
        """Complaints that stand, by what they are about: each is logged once."""

    def progress_of(self, rank: int) -> Progress:
        """Return what watches the engine of a rank."""
        while len(self._progress) <= rank:
            self._progress.append(Progress())
        return self._progress[rank]

    def say(self, endpoint: Endpoint, about: str, problem: str | None) -> None:
        """Log that there is a problem, or that it is over."""
        if problem is None:
            if self.said.pop(about, None) is not None:
                log.info("%s: %s: all is well again", endpoint.instance.instance_id, about)
        else:
            if about not in self.said:
                log.warning("%s: %s", endpoint.instance.instance_id, problem)
            self.said[about] = problem
