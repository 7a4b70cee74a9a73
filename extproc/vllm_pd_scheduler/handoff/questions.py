"""What P is asked before requests are split with it: once for each of its processes."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import aiohttp
from yarl import URL

from ..connectors import Attempt, Peer, Question
from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..instance_http.bounded_read import AnswerEncoded, AnswerTooLarge, read_at_most
from ..instance_http.shortage import is_our_shortage
from ..models import join_address
from .interfaces import LocalShortage, PrefillFailed

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
"""For the whole answer, with the connection: somebody waits, and another P may be there."""
MAX_ANSWER_BYTES = 1 << 20
"""A server with 1,000 engines on as many machines says less."""
_NO_TIMEOUT = aiohttp.ClientTimeout()


@dataclass(frozen=True, slots=True)
class _Of:
    """Whom an answer is of: a process, by what was seen of its restarts."""

    peer: Peer
    generation: int
    started_at: float | None
    question: Question


class Questions:
    """An :class:`~.interfaces.AskPrefill` over HTTP, which remembers what each P has answered.

    Those who want the same answer at the same time share one request. An answer is forgotten when its P was
    restarted, is elsewhere, or has failed to answer a prefill.
    """

    def __init__(self, session: aiohttp.ClientSession, registry: Registry) -> None:
        self._session = session
        self._registry = registry
        self._answers: dict[Endpoint, tuple[_Of, asyncio.Future[Any]]] = {}
        self._logged: dict[Endpoint, str] = {}
        """What is wrong with a P, since it has answered last."""

    async def __call__(self, endpoint: Endpoint, question: Question, attempt: Attempt) -> Any:
        """Return what P's answer says, from memory if it is there."""
        of = _Of(attempt.legs.prefill, endpoint.generation, endpoint.started_at, question)
        known = self._answers.get(endpoint)
        if known is None or known[0] != of:
            asked = asyncio.ensure_future(self._ask(endpoint, question, attempt))
            asked.add_done_callback(lambda done: self._forget_failure(endpoint, done))
            known = self._answers[endpoint] = of, asked
            for kept in (self._answers, self._logged):
                for gone in [each for each in kept if each not in self._registry]:
                    del kept[gone]
        return await asyncio.shield(known[1])  # who leaves does not take it from the others

    def forget(self, endpoint: Endpoint) -> None:
        """Ask a P again before the next request: its process may be another one."""
        self._answers.pop(endpoint, None)

    async def close(self) -> None:
        """End what is under way."""
        asked = [future for _, future in self._answers.values()]
        for future in asked:
            future.cancel()
        await asyncio.gather(*asked, return_exceptions=True)

    def _forget_failure(self, endpoint: Endpoint, asked: asyncio.Future[Any]) -> None:
        if asked.cancelled() or asked.exception() is not None:
            known = self._answers.get(endpoint)
            if known is not None and known[1] is asked:
                del self._answers[endpoint]

    async def _ask(self, endpoint: Endpoint, question: Question, attempt: Attempt) -> Any:
        address = join_address(endpoint.host, question.port)
        where = address if question.path is None else f"http://{address}{question.path}"
        try:
            if question.path is None:
                answer = await self._connected(endpoint.host, question.port)
            else:
                answer = await self._answered(where)
            understood = attempt.understood(answer)
            if understood is None:
                raise PrefillFailed("question_nonsense")
        except PrefillFailed as error:
            wrong = f"{where} does not answer as its connector needs it ({error})"
            if self._logged.get(endpoint) != wrong:
                self._logged[endpoint] = wrong
                log.warning("%s: %s; it prefills nothing for others", endpoint.id, wrong)
            raise
        self._logged.pop(endpoint, None)
        return understood

    async def _connected(self, host: str, port: int) -> bytes:
        """Return nothing as soon as a connection is made."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                _, writer = await asyncio.open_connection(host, port)
        except TimeoutError:
            raise PrefillFailed("question_timeout") from None
        except OSError as error:
            if is_our_shortage(error):
                raise LocalShortage("question") from None
            raise PrefillFailed("question_connect") from None
        writer.close()
        return b""

    async def _answered(self, url: str) -> bytes:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                async with self._session.get(
                    URL(url, encoded=True), allow_redirects=False, timeout=_NO_TIMEOUT
                ) as response:
                    if response.status != 200:
                        raise PrefillFailed("question_status")
                    return await read_at_most(response, MAX_ANSWER_BYTES)
        except TimeoutError:
            raise PrefillFailed("question_timeout") from None
        except (AnswerTooLarge, AnswerEncoded):
            raise PrefillFailed("question_nonsense") from None
        except aiohttp.ClientConnectorError as error:
            if is_our_shortage(error.os_error):
                raise LocalShortage("question") from None
            raise PrefillFailed("question_connect") from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise PrefillFailed("question_reset") from None
