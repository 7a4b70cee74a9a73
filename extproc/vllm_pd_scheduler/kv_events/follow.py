"""Follows the KV events of all instances of a registry."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from ..config import KvEventsConfig
from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import join_address
from ..request.context import RequestContext
from ..telemetry import Telemetry
from .cached import Cached
from .listener import Listener, News, Prompt


class KvEvents:
    """Keeps the prefix index as the engines say it is.

    The engine of a rank publishes at its port plus its rank, as vLLM does.
    """

    def __init__(self, config: KvEventsConfig, registry: Registry, telemetry: Telemetry) -> None:
        self.cached = Cached()
        self._config = config
        self._registry = registry
        self._telemetry = telemetry
        self._followed: dict[Endpoint, str] = {}
        """Where each endpoint is listened to."""
        self._names: dict[str, Endpoint] = {}
        self._loop = asyncio.get_running_loop()
        self._listener = Listener(self._post, config.topic)

    def start(self) -> None:
        """Follow the instances, also those that come."""
        self._listener.start()
        self._registry.changes.subscribe(self._changed)
        self._follow_all()

    async def stop(self) -> None:
        """End all connections."""
        self._followed.clear()
        await asyncio.to_thread(self._listener.stop)

    def learn(self, context: RequestContext, token_ids: bytes) -> None:
        """Note what P has told of a prompt's tokens: a JSON array."""
        if context.blocks and self._followed:
            size = context.prompt_bytes
            self._listener.learn(Prompt(tuple(context.blocks), size, bytes(token_ids)))

    def _changed(self) -> None:
        of = self._registry.changes.of
        if of is None:
            self._follow_all()
        else:
            self._follow(self._registry.ranks_of(of))

    def _follow_all(self) -> None:
        self._follow([each for each in self._followed if each not in self._registry])
        self._follow(self._registry)

    def _follow(self, endpoints: Iterable[Endpoint]) -> None:
        """Follow those of some endpoints that are there, and the others no more."""
        for endpoint in endpoints:
            if endpoint not in self._registry:
                self._leave(endpoint)
            elif endpoint.address is not None and self._followed.get(endpoint) != endpoint.host:
                self._listen_to(endpoint)

    def _leave(self, endpoint: Endpoint) -> None:
        if self._followed.pop(endpoint, None) is not None:
            self._names.pop(endpoint.id, None)
            self.cached.forget(endpoint)
            self._listener.leave(endpoint.id)

    def _listen_to(self, endpoint: Endpoint) -> None:
        host, rank = endpoint.host, endpoint.rank or 0
        self._followed[endpoint], self._names[endpoint.id] = host, endpoint
        port, replay = endpoint.instance.kv_events_ports
        replay = replay or self._config.replay_port

        def at(base: int) -> str:
            return f"tcp://{join_address(host, base + rank)}"

        self._listener.follow(endpoint.id, at(port or self._config.port), at(replay) if replay else None)

    def _post(self, news: News) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take, news)

    def _take(self, news: News) -> None:
        self.cached.link(news.links)
        for name, changes in news.changes:
            if (endpoint := self._names.get(name)) is not None:
                self.cached.tell(endpoint, changes)
        for what, counted in (("read", news.batches), ("lost", news.lost), ("bad", news.bad)):
            for name, count in counted.items():
                if name in self._names:
                    self._telemetry.instances.kv_event_batches(name, what, count)
