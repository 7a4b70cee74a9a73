"""What a scheduler knows that follows sources of instances."""

from __future__ import annotations

import time
from typing import Any

from tests.support.waiting import until
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.discovery.sources import Sources
from vllm_pd_scheduler.models import PDInstance
from vllm_pd_scheduler.router import PDRouter


class Followed:
    """Sources, and the fleet that they make."""

    def __init__(self, *entries: dict[str, Any], **more: Any) -> None:
        self.router = PDRouter(parse_config({"discovery": list(entries), **more}))
        self.sources = Sources(self.router.config, self.router.membership, time.monotonic)
        self.sources.read()

    async def start(self) -> Followed:
        await self.sources.follow()
        return self

    @property
    def ids(self) -> set[str]:
        """Instances that do not leave."""
        leaves = self.router.membership.leaves
        return {each.instance_id for each in self.router.get_instances() if not leaves(each.instance_id)}

    def __getitem__(self, instance_id: str) -> PDInstance:
        return self.router.registry.get(instance_id).instance

    @property
    def events(self) -> list[str]:
        return [event.text for event in self.router.events.after(0)]

    @property
    def left_out(self) -> tuple[str, ...]:
        return self.router.membership.refused

    def age(self) -> float:
        """Return for how many seconds a source has said nothing."""
        return max(self.router.membership.ages(time.monotonic()).values())

    async def until(self, *ids: str) -> None:
        """Wait until these are the instances."""
        await until(lambda: self.ids == set(ids))

    async def until_event(self, text: str, times: int = 1) -> None:
        """Wait until so many events have a text in them; fails if there are more."""
        await until(lambda: sum(text in event for event in self.events) >= times)
        assert sum(text in event for event in self.events) == times, self.events
