"""What a strategy is. Write ``score``; the rest is done here."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..models import RequestContext
from ..registry import Endpoint

if TYPE_CHECKING:
    from ..config import SchedulerConfig


class Strategy:
    """Ranks the endpoints of one role for one request. Each role has an object of its own.

    A strategy of your own overrides :meth:`score` (or :meth:`rank`, if it does not think in scores) and
    is named in the configuration by dotted path, ``"my_package.my_module:MyStrategy"``, or by the name
    of an entry point in the group ``vllm_pd_scheduler.strategies``.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._turn = 0

    def score(self, endpoint: Endpoint, request: RequestContext) -> Any:
        """How bad ``endpoint`` would be for ``request``: the least wins. Any comparable value will do."""
        raise NotImplementedError(f"{type(self).__name__} defines neither score() nor rank()")

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Return the ``count`` best of ``endpoints`` (never empty), best first.

        Equal scores take turns, so that an idle fleet is used evenly.
        """
        self._turn += 1
        offset = self._turn % len(endpoints)
        rotated = [*endpoints[offset:], *endpoints[:offset]]
        if count == 1:
            return [min(rotated, key=lambda endpoint: self.score(endpoint, request))]
        return heapq.nsmallest(count, rotated, key=lambda endpoint: self.score(endpoint, request))
