"""Follows a DNS name: its addresses, or the servers of its SRV records, are instances."""

from __future__ import annotations

import asyncio
from functools import partial

from ...config import InstanceConfig, SchedulerConfig
from ...config.sources import DnsSource, resolver_address
from ...models import InstanceRole, PDInstance, canonical_ip
from ...system.daemon_thread import in_daemon_thread
from ..source import Report
from .lookup import Found, LookUpFailed, Question, Server, look_up

SOONEST_S, LATEST_S = 1.0, 30.0
"""Seconds between two look-ups at least and at most, whatever the records' TTL is."""

AGAIN_S = 10.0
"""Seconds between two look-ups at most while DNS cannot be asked."""

EMPTY_AGAIN_S = 5.0
"""Seconds after which an answer without servers must be the same once more to be believed."""


class DnsNames:
    """Follows a name; see :class:`..source.Source`."""

    def __init__(self, source: DnsSource, config: SchedulerConfig) -> None:
        self.name = source.label
        resolver = resolver_address(source.resolver) if source.resolver is not None else None
        self._question = Question(source.srv or source.name or "", source.port, resolver)
        self._source = source
        self._config = config
        self._known: dict[Server, PDInstance] = {}
        self._told: frozenset[Server] | None = None

    async def follow(self, report: Report) -> None:
        """Ask again whenever the answer before has expired; tell what it says."""
        failures, was_empty = 0, False
        while True:
            try:
                found = await in_daemon_thread(partial(look_up, self._question))
                failures = 0
            except LookUpFailed as error:
                report.lost(str(error))
                await asyncio.sleep(min(SOONEST_S * 2**failures, AGAIN_S))
                failures = min(failures + 1, 10)
                continue
            empty = not found.servers
            doubted = empty and not was_empty and self._told != found.servers
            was_empty = empty
            if doubted:  # one server of several that knows nothing is not to drain the fleet
                await asyncio.sleep(EMPTY_AGAIN_S)
                continue
            self._tell(found, report)
            await asyncio.sleep(min(max(found.ttl, SOONEST_S), LATEST_S))

    def _tell(self, found: Found, report: Report) -> None:
        if found.servers == self._told:
            report.unchanged()
            return
        usable, left_out = [], []
        for server in sorted(found.servers):
            if canonical_ip(server.host) is None:
                left_out.append(f"{server.name} is left out: {server.host} is no server's own address")
            elif server.port == 0:
                left_out.append(f"{server.name} is left out: its port is 0")
            else:
                usable.append(server)
        try:
            self._known = {server: self._known.get(server) or self._instance(server) for server in usable}
        except ValueError as error:
            report.lost(f"{self.name}: {error}")
            return
        report.found(self._known.values(), left_out)
        self._told = found.servers

    def _instance(self, server: Server) -> PDInstance:
        """Return the instance that a server is: named by its address, so that it is the same again."""
        source, tls = self._source, self._config.instance_tls
        name = source.server_name
        if name is None and tls is not None and tls.server_name is None:
            name = server.name.removesuffix(".")
        entry = InstanceConfig(
            id=f"{source.role}-{server.host.replace(':', '-')}-{server.port}",
            host=server.host,
            port=server.port,
            api_key=source.api_key,
            server_name=name,
            data_parallel_size=source.data_parallel_size,
        )
        return self._config.instance(InstanceRole(source.role), entry)
