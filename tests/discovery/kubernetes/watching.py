"""Who listens to a watch, and waits for what it knows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from tests.support.waiting import until
from vllm_pd_scheduler.discovery.kubernetes.objects import Pod
from vllm_pd_scheduler.discovery.kubernetes.watch import ListWatch


class Heard:
    """Who listens to a watch."""

    def __init__(self) -> None:
        self.changes = 0
        self.lives = 0
        self.reasons: list[str] = []

    def changed(self) -> None:
        self.changes += 1

    def alive(self) -> None:
        self.lives += 1

    def lost(self, reason: str) -> None:
        self.reasons.append(reason)


def names(watch: ListWatch[Pod]) -> set[str]:
    return set(watch.objects)


async def until_names(watch: ListWatch[Pod], *expected: str) -> None:
    await until(lambda: names(watch) == set(expected))


async def followed(watch: ListWatch[Pod], condition: Callable[[], object | Awaitable[object]]) -> None:
    """Follow until something is so."""
    following = asyncio.ensure_future(watch.follow())
    try:
        await until(condition)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
