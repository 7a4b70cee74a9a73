"""Health and metrics of the instances: one loop for each, so that a slow one delays no other."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import aiohttp

from ..config import SchedulerConfig
from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import is_ip, join_address
from ..telemetry.metrics import Telemetry
from .vllm_metrics import NotVllmMetrics, Scrape, parse_metrics, snapshot

log = logging.getLogger(__name__)

RECOVERY_INTERVAL_S = 1.0
"""How often an instance that cannot serve is probed, however long the usual interval is."""

JITTER = 0.1
"""Each pause is up to this share shorter, so that the loops spread out."""


class HealthMonitor:
    """Probes ``/health`` and scrapes ``/metrics`` of every instance in a registry, and tells the registry.

    ``session`` and ``clock`` (monotonic seconds) are the caller's.
    """

    def __init__(
        self,
        registry: Registry,
        telemetry: Telemetry,
        session: aiohttp.ClientSession,
        *,
        interval: float,
        timeout: float,
        clock: Callable[[], float],
    ) -> None:
        self._registry = registry
        self._telemetry = telemetry
        self._session = session
        self._interval = interval
        self._timeout = timeout
        self._clock = clock
        self._loops: dict[Endpoint, asyncio.Task[None]] = {}
        self._scrapes: dict[Endpoint, Scrape] = {}
        self._stopped = False

    @classmethod
    def configured(
        cls, config: SchedulerConfig, registry: Registry, telemetry: Telemetry, session: aiohttp.ClientSession
    ) -> HealthMonitor:
        """Return a monitor with the configured interval and timeout, on the process's monotonic clock."""
        return cls(
            registry,
            telemetry,
            session,
            interval=config.health_check_interval,
            timeout=config.health_check_timeout,
            clock=time.monotonic,
        )

    async def start(self) -> None:
        """Probe every instance once, then keep probing them, and those that are added, until ``stop``."""
        await asyncio.gather(*(self.check(endpoint) for endpoint in self._registry))
        self._registry.subscribe(self._follow)
        self._follow()

    async def stop(self) -> None:
        """End all loops, for good."""
        self._stopped = True
        loops, self._loops = self._loops, {}
        for loop in loops.values():
            loop.cancel()
        await asyncio.gather(*loops.values(), return_exceptions=True)

    async def check(self, endpoint: Endpoint) -> None:
        """Probe and scrape one instance, each within the timeout. Raises nothing."""
        in_flight, tokens = endpoint.in_flight, endpoint.tokens
        problem, page = await asyncio.gather(self._probe(endpoint), self._scrape(endpoint))
        if endpoint not in self._registry:
            return
        before = endpoint.state
        self._registry.probed(endpoint, problem, self._clock())
        if endpoint.state is not before:
            level = logging.INFO if problem is None else logging.WARNING
            log.log(level, "%s is %s%s", endpoint.id, endpoint.state, f": {problem}" if problem else "")
        if page is None:
            self._telemetry.scrape_failed(endpoint.id)
            return
        if self._registry.started(endpoint, page.started_at):
            log.warning("%s was restarted", endpoint.id)
            in_flight, tokens = 0, 0.0
        last = self._scrapes.get(endpoint)
        taken = snapshot(page, last, endpoint.metrics, endpoint.instance.role, self._clock())
        self._scrapes[endpoint] = page
        self._registry.scraped(endpoint, taken, in_flight, tokens)

    def _follow(self) -> None:
        """Have exactly one loop for each registered instance."""
        for endpoint in [e for e in self._loops if e not in self._registry]:
            self._loops.pop(endpoint).cancel()
            self._scrapes.pop(endpoint, None)
        for endpoint in self._registry:
            if endpoint not in self._loops and not self._stopped:
                self._loops[endpoint] = asyncio.ensure_future(self._run(endpoint))

    async def _run(self, endpoint: Endpoint) -> None:
        pause = 0.0 if endpoint.healthy is None else self._pause(endpoint)
        while True:
            await asyncio.sleep(pause)
            try:
                await self.check(endpoint)
            except Exception:  # one bad probe must not end the loop: nothing would notice a recovery
                log.exception("health check of %s failed", endpoint.id)
            pause = self._pause(endpoint)

    def _pause(self, endpoint: Endpoint) -> float:
        pause = self._interval if endpoint.routable else min(self._interval, RECOVERY_INTERVAL_S)
        return pause * (1 - JITTER * random.random())

    async def _probe(self, endpoint: Endpoint) -> str | None:
        """Return what is wrong with an instance, or ``None``."""
        try:
            async with asyncio.timeout(self._timeout):
                if not is_ip(endpoint.instance.host):
                    await self._resolve(endpoint)
                async with self._get(endpoint, "/health") as response:
                    return None if response.status == 200 else f"/health answers {response.status}"
        except TimeoutError:
            return f"/health did not answer within {self._timeout:g} s"
        except socket.gaierror as error:
            return f"the name {endpoint.instance.host} cannot be resolved: {error.strerror}"
        except UnicodeError as error:  # a label that is empty or too long
            return f"the name {endpoint.instance.host} cannot be resolved: {error}"
        except aiohttp.ClientConnectorCertificateError as error:
            return f"its certificate is not trusted: {_verdict(error.certificate_error)}"
        except aiohttp.ServerDisconnectedError:
            return f"/health hung up without an answer: {_guess(endpoint)}"
        except (aiohttp.ClientError, OSError) as error:
            return f"/health cannot be reached: {error}"

    def _get(self, endpoint: Endpoint, path: str) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self._session.get(endpoint.url + path, server_hostname=endpoint.instance.tls_name)

    async def _resolve(self, endpoint: Endpoint) -> None:
        instance = endpoint.instance
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(instance.host, instance.port, type=socket.SOCK_STREAM)
        addresses = sorted({str(info[4][0]) for info in found})
        current = endpoint.address or ""
        # Keep what is in use as long as the name still has it.
        if not any(current == join_address(ip, instance.port) for ip in addresses):
            self._registry.resolved(endpoint, addresses[0])

    async def _scrape(self, endpoint: Endpoint) -> Scrape | None:
        """Return the metrics, or ``None`` if there are none to be had; the last ones then stay."""
        if endpoint.address is None:
            return None
        try:
            async with asyncio.timeout(self._timeout):
                async with self._get(endpoint, "/metrics") as response:
                    if response.status != 200:
                        return None
                    return parse_metrics(await response.text())
        except (TimeoutError, aiohttp.ClientError, OSError, UnicodeDecodeError) as error:
            log.debug("scrape of %s failed: %s", endpoint.id, error)
        except NotVllmMetrics as error:
            log.debug("scrape of %s: %s", endpoint.id, error)
        return None


def _guess(endpoint: Endpoint) -> str:
    """Return the usual reason of a server that accepts a connection and closes it."""
    if endpoint.instance.tls_name is None:
        return "if it serves TLS, set instance_tls"
    return "if it wants a client certificate, set cert and key in instance_tls to one that it trusts"


def _verdict(error: Exception) -> str:
    return error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else str(error)
