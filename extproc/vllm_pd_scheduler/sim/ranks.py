"""The data-parallel engines of a simulated instance, and which of them gets a request.

Source: ``v1/engine/core_client.py`` and ``entrypoints/generate/base/serving.py`` of vLLM 0.32.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .protocol import ApiError
from .worker import Worker

RANK_HEADER = "X-data-parallel-rank"
READ_NO_RANK = frozenset({"/v1/responses"})
"""Paths whose handlers read no rank."""


class Ranks:
    """The workers of an instance, one for each engine."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = workers

    def chosen(self, path: str, headers: Mapping[str, str]) -> Worker:
        """Return the engine that a request's header names, else the one with the fewest requests.

        Raise ApiError if there is no such rank. What is no number is as good as no header.
        """
        try:
            rank = int(headers[RANK_HEADER])
        except (KeyError, ValueError):
            rank = None
        if rank is None or path in READ_NO_RANK:
            return min(self.workers, key=lambda each: each.engine.running + each.engine.queued)
        size = len(self.workers)
        if not 0 <= rank < size:
            raise ApiError(400, f"data_parallel_rank {rank} is out of range [0, {size}).", "BadRequestError")
        return self.workers[rank]

    def of(self, engine_id: str) -> Worker:
        """Return the engine with an id; if there is none, the first, which then refuses."""
        return next((each for each in self.workers if each.engine_id == engine_id), self.workers[0])

    @property
    def dead(self) -> bool:
        """Whether one of them has died, with which the process ends."""
        return any(each.dead for each in self.workers)

    def observe(self) -> None:
        """End the leases that are over, on all of them."""
        for each in self.workers:
            each.observe()

    def stats(self) -> dict[str, Any]:
        """Return what is on all of them together."""
        self.observe()
        engines = [each.engine for each in self.workers]
        hand_offs: Counter[str] = sum((each.hand_offs for each in self.workers), Counter())
        return {
            "engine_id": self.workers[0].engine_id,
            "running": sum(each.running for each in engines),
            "waiting": sum(each.queued for each in engines),
            "deferred": sum(each.deferred for each in engines),
            "pinned": sum(each.pinned for each in engines),
            "blocks_used": sum(each.pool.used for each in engines),
            "num_blocks": sum(each.pool.size for each in engines),
            "kv_usage": sum(each.kv_usage for each in engines) / len(engines),
            "hand_offs": hand_offs,
        }
