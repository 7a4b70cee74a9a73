"""Ask an instance how it is, by ``/health``, ``/metrics`` and ``/v1/models``, in bounded time and bytes."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import aiohttp
from yarl import URL

from ..fleet.endpoint import Endpoint
from ..instance_http.bounded_read import AnswerEncoded, read_at_most
from ..instance_http.shortage import is_our_shortage
from .served_models import ServedModels, parse_models
from .vllm_metrics import OtherEngines, Scrape, parse_metrics, parse_ranks

T = TypeVar("T")
Scrapes = list[Scrape]

MAX_METRICS_BYTES = 4 << 20
"""Of a ``/metrics`` page. vLLM's has 60 KB, some 50 KB more for each further engine."""
MAX_MODELS_BYTES = 1 << 20
_MAX_HEALTH_BYTES = 1 << 16
_BIG_PAGE_BYTES = 256 << 10
"""From here on a page is parsed in a thread: so much takes a millisecond."""
_SLICES = 4
_NO_TIMEOUT = aiohttp.ClientTimeout()
"""For a request: the probe has its own."""
_MAX_REASON = 300
"""Characters of what a library says of an answer, which can quote it."""


class NoAnswer(Exception):
    """An instance did not say what it was asked; ``args[0]`` says why, for people."""


class OurShortage(NoAnswer):
    """It could not be asked, for want of something on this machine."""


class Unanswered(NoAnswer):
    """It said nothing in time."""


class Misconfigured(NoAnswer):
    """It is another server than is configured."""


class NoSuchPath(NoAnswer):
    """It answers 404: it is not made to say this."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What an instance said, or why it did not."""

    health: NoAnswer | None
    """``None``: it is well."""
    metrics: Scrapes | NoAnswer
    """Of each of its ranks, or of the whole."""
    models: ServedModels | NoAnswer | None
    """``None``: it was not asked."""

    @property
    def silent(self) -> bool:
        """Whether nothing at all came in time."""
        return isinstance(self.health, Unanswered) and isinstance(self.metrics, Unanswered)


class Probe:
    """Asks instances. ``timeout`` is the seconds that all answers of one instance may take together."""

    def __init__(self, session: aiohttp.ClientSession, timeout: float) -> None:
        self._session = session
        self.timeout = timeout

    async def ask(self, endpoint: Endpoint, *, models: bool = True) -> Answers:
        """Ask all at once, but the models after the health, on the same connection. Raises nothing."""
        health = asyncio.ensure_future(self._health(endpoint))
        size = endpoint.instance.data_parallel_size
        parse = _parse_whole if size == 1 else partial(parse_ranks, size=size)
        metrics = asyncio.ensure_future(self._read(endpoint, "/metrics", MAX_METRICS_BYTES, parse))
        names = asyncio.ensure_future(self._models(endpoint, health)) if models else None
        await _wait_for(self.timeout, health, metrics, *([] if names is None else [names]))
        return Answers(
            self._problem(health, endpoint, "/health"),
            self._problem(metrics, endpoint, "/metrics") or metrics.result(),
            None if names is None else self._problem(names, endpoint, "/v1/models") or names.result(),
        )

    async def gets_no_answer(self, endpoint: Endpoint, seconds: float) -> bool:
        """Ask for the health alone; return whether nothing has come within ``seconds``."""
        health = asyncio.ensure_future(self._health(endpoint))
        await _wait_for(seconds, health)
        return health.cancelled()

    async def _health(self, endpoint: Endpoint) -> None:
        async with self._get(endpoint, "/health") as response:
            if response.status != 200:
                raise NoAnswer(f"/health answers {response.status}")
            with suppress(AnswerEncoded):  # what it says beside its status does not matter
                await read_at_most(response, _MAX_HEALTH_BYTES)

    async def models(self, endpoint: Endpoint) -> ServedModels | NoAnswer:
        """Ask for the models alone. Raises nothing."""
        asked = asyncio.ensure_future(self._read(endpoint, "/v1/models", MAX_MODELS_BYTES, parse_models))
        await _wait_for(self.timeout, asked)
        return self._problem(asked, endpoint, "/v1/models") or asked.result()

    async def _models(self, endpoint: Endpoint, health: asyncio.Future[None]) -> ServedModels:
        await asyncio.wait({health})
        if health.cancelled() or health.exception() is not None:
            raise NoAnswer("it is not healthy")
        return await self._read(endpoint, "/v1/models", MAX_MODELS_BYTES, parse_models)

    async def _read(self, endpoint: Endpoint, path: str, limit: int, parse: Callable[[bytes], T]) -> T:
        async with self._get(endpoint, path) as response:
            if response.status == 404:
                raise NoSuchPath(f"{path} answers 404")
            if response.status != 200:
                raise NoAnswer(f"{path} answers {response.status}")
            body = await read_at_most(response, limit)
        return parse(body) if len(body) < _BIG_PAGE_BYTES else await asyncio.to_thread(parse, body)

    def _get(self, endpoint: Endpoint, path: str) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        instance = endpoint.instance
        return self._session.get(
            URL(endpoint.url + path, encoded=True),
            headers=instance.authorization if path.startswith("/v1/") else None,
            server_hostname=instance.tls_name,
            allow_redirects=False,
            read_bufsize=_BIG_PAGE_BYTES,
            timeout=_NO_TIMEOUT,
        )

    def _problem(self, asked: asyncio.Future[T], endpoint: Endpoint, path: str) -> NoAnswer | None:
        if asked.cancelled():
            return Unanswered(f"{path} did not answer within {self.timeout:g} s")
        error = asked.exception()
        if error is None or isinstance(error, NoAnswer):
            return error
        if isinstance(error, OtherEngines):
            return Misconfigured(f"{path}: {error}"[:_MAX_REASON])
        if is_our_shortage(error):
            return OurShortage(f"{path} cannot be asked: {error or type(error).__name__}"[:_MAX_REASON])
        return NoAnswer(_reason(error, endpoint, path)[:_MAX_REASON])


def _parse_whole(page: bytes) -> Scrapes:
    return [parse_metrics(page)]


async def _wait_for(seconds: float, *asked: asyncio.Future[Any]) -> None:
    """Wait until all are done, and cancel those that are not by then.

    The time is counted in slices. One in which our own loop stood still, whatever held it up, counts as one
    slice however long it was: else all instances would be late at once for what is ours.
    """
    waiting: set[asyncio.Future[Any]] = set(asked)
    try:
        for _ in range(_SLICES):
            _, waiting = await asyncio.wait(waiting, timeout=seconds / _SLICES)
            if not waiting:
                return
    finally:
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def _reason(error: BaseException, endpoint: Endpoint, path: str) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        verdict = error.certificate_error
        said = verdict.verify_message if isinstance(verdict, ssl.SSLCertVerificationError) else str(verdict)
        return f"its certificate is not trusted: {said}"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return f"{path} hung up without an answer: {_guess(endpoint)}"
    if type(error) is aiohttp.ClientConnectorError and error.os_error.errno is not None:
        return f"{path} cannot be reached: {os.strerror(error.os_error.errno)}"
    if isinstance(error, (aiohttp.ClientConnectionError, aiohttp.ClientResponseError, OSError)):
        return f"{path} cannot be reached: {error}"
    return f"{path} gives no answer that can be used: {error or type(error).__name__}"


def _guess(endpoint: Endpoint) -> str:
    """Return the usual reason of a server that accepts a connection and closes it."""
    if endpoint.instance.tls_name is None:
        return "if it serves TLS, set instance_tls"
    return "if it wants a client certificate, set cert and key in instance_tls to one that it trusts"
