"""The prefill leg over HTTP: straight to the instance, or through Envoy's prefill listener."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from ..connectors import Attempt
from ..fleet.endpoint import Endpoint
from ..instance_http.errors import AnswerRefused, GivenUp, NotConnected, RequestFailed, TimedOut
from ..instance_http.exchange import Answer
from ..instance_http.pool import ConnectionPool
from ..instance_http.shortage import is_our_shortage
from ..models import join_address
from ..request import headers as names
from .interfaces import LocalShortage, PrefillAnswer, PrefillFailed, PrefillNotSent

LINGER_S = 1.0
"""How long a prefill goes on when its client has left. An answer that is not read pins P's blocks for the
lease: an abort that comes when P has just finished is too late, and only the answer says what to free."""


MAX_ANSWER_BYTES = 16 << 20
_LEAST_ANSWER_BYTES = 1 << 20
_ANSWER_PER_BODY_BYTE = 8
"""With ``return_token_ids`` P writes each token of the prompt as a number, and one can be a single byte."""
LISTENER_IDLE_S = 60.0
"""How long a connection to Envoy may be idle, which would keep it for an hour. One that is open is there when
Envoy has no file descriptor left for a new one."""
_SENDABLE = re.compile(r"[\t -~]*")
"""A header of the client's that can go to P."""
_NAME = re.compile(r"[A-Za-z0-9_.:-]{16,100}")
"""An ``X-Request-Id`` that vLLM repeats as it is, after ``cmpl-`` or ``chatcmpl-`` in its answer's ``id``."""
_PASSABLE = re.compile(r"[!-~][ -~]{0,199}")
"""A header of P's that can go to the client."""
_ENVOYS_SHORTAGE = re.compile(
    rb"reset reason: local connection failure|connect error: Cannot assign requested"
)
"""What Envoy answers in an instance's place when it has no file descriptor, or no port, left for it."""


class HttpPrefill:
    """A :class:`~vllm_pd_scheduler.handoff.interfaces.PrefillLeg` over HTTP/1.1.

    It goes straight to the instance, or to ``listener``, the base URL of Envoy's prefill listener, which
    sends it on to the endpoint that a header names. When the call is cancelled, ``unwanted`` gets the answer
    if it comes within ``LINGER_S``. After that, or at once without ``unwanted``, the connection is closed,
    which makes vLLM abort the request.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        listener: str | None,
        timeout: float,
        unwanted: Callable[[Endpoint, PrefillAnswer, Attempt], None] | None = None,
    ) -> None:
        self._pool = pool
        self._listener = None if listener is None else _destination(listener)
        self.timeout = timeout
        """Seconds that one may take."""
        self._unwanted = unwanted
        self._lingering: set[asyncio.Task[None]] = set()
        self._under_way: dict[asyncio.Future[Answer], Endpoint] = {}

    async def __call__(
        self,
        endpoint: Endpoint,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        attempt: Attempt,
        sent: Callable[[], object] | None = None,
    ) -> PrefillAnswer:
        """Send the request and read the whole answer."""
        own = attempt.prefill_headers()
        answer = self._send(endpoint, path, headers, body, own, sent)
        if self._unwanted is None:
            return await self._read(answer)
        try:
            return await self._read(asyncio.shield(answer))
        except asyncio.CancelledError:
            if attempt.legs.decode is not None and not attempt.leaves_something:
                answer.cancel()  # P writes to a D, which does not wait for it any more
                raise
            task = asyncio.ensure_future(self._linger(endpoint, answer, attempt, self._unwanted))
            self._lingering.add(task)
            task.add_done_callback(self._lingering.discard)
            raise

    async def send(
        self,
        endpoint: Endpoint,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        own: Mapping[str, str],
    ) -> PrefillAnswer:
        """Send a request of which nothing is left if the call is cancelled: an ``EncodeLeg``."""
        return await self._read(self._send(endpoint, path, headers, body, own))

    def give_up(self, endpoint: Endpoint) -> None:
        """End all requests that wait at an instance, since it hangs: it has them, and does not answer."""
        for sent, where in tuple(self._under_way.items()):
            if where.instance is endpoint.instance and not sent.done():  # on whichever rank
                sent.set_exception(GivenUp(f"{endpoint.instance.instance_id} hangs"))

    async def close(self) -> None:
        """Wait for the prefills that linger."""
        await asyncio.gather(*self._lingering, return_exceptions=True)

    async def _linger(
        self,
        endpoint: Endpoint,
        sent: asyncio.Future[Answer],
        attempt: Attempt,
        unwanted: Callable[[Endpoint, PrefillAnswer, Attempt], None],
    ) -> None:
        with contextlib.suppress(TimeoutError, PrefillFailed):
            async with asyncio.timeout(LINGER_S):
                answer = await self._read(sent)
            unwanted(endpoint, answer, attempt)

    def _send(
        self,
        endpoint: Endpoint,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        own: Mapping[str, str],
        sent: Callable[[], object] | None = None,
    ) -> asyncio.Future[Answer]:
        given = ((name, headers[name]) for name in names.FORWARDED_TO_PREFILL if name in headers)
        # What is not ASCII means nothing here, and P would read it as other characters.
        kept = {name: value for name, value in given if _SENDABLE.fullmatch(value)}
        kept |= own
        kept |= endpoint.own_headers
        kept.setdefault("content-type", "application/json")
        to = endpoint.destination
        if self._listener is not None:  # TLS to the instance is Envoy's
            kept[names.DESTINATION] = to[0]
            to = (self._listener, None)
        request_id = kept.get(names.REQUEST_ID, "")
        name = b"cmpl-" + request_id.encode() if _NAME.fullmatch(request_id) else b""
        limit = largest_answer(body)
        answer = self._pool.post(
            to, path, kept, body, limit=limit, timeout=self.timeout, name=name, sent=sent
        )
        self._under_way[answer] = endpoint
        answer.add_done_callback(self._under_way.pop)
        return answer

    async def _read(self, sent: asyncio.Future[Answer]) -> PrefillAnswer:
        try:
            answer = await sent
        except TimedOut:
            raise PrefillFailed("timeout") from None
        except GivenUp:
            raise PrefillFailed("hung", lost=True) from None
        except AnswerRefused:
            raise PrefillFailed("unreadable") from None
        except RequestFailed as error:
            raise self._failure(error) from None
        if self._listener is not None:
            _check_connection(answer)
        retry_after = answer.header("retry-after")
        wait = float(retry_after) if retry_after.isdecimal() else None
        told = {} if answer.status == 200 else _for_client(answer)
        return PrefillAnswer(answer.status, _content_type(answer), answer.body, wait, told)

    def _failure(self, error: RequestFailed) -> PrefillFailed:
        """Return what became of a request that has no answer."""
        cause, straight = error.cause, self._listener is None
        number = cause.errno if isinstance(cause, OSError) else None
        if cause is not None and is_our_shortage(cause):
            return LocalShortage(errno.errorcode.get(number or errno.ENOMEM, "ENOMEM"))
        if number == errno.EADDRNOTAVAIL and isinstance(error, NotConnected):
            # No port is left here for connections to that address; for those to another P there may be.
            return PrefillNotSent("EADDRNOTAVAIL") if straight else LocalShortage("EADDRNOTAVAIL")
        if isinstance(error, NotConnected):
            return PrefillFailed("connect") if straight else PrefillNotSent("listener")
        # Straight to P it is P's connection. Envoy's own does not break when P's does.
        return PrefillFailed("reset", lost=straight)


def _check_connection(answer: Answer) -> None:
    """Raise :exc:`PrefillFailed` if Envoy's flags say that an answer is its own, since P gave none."""
    found = set(answer.header(names.CONNECTION).split(","))
    if "UF" in found and _ENVOYS_SHORTAGE.search(answer.body):
        raise LocalShortage("envoy")
    if found & {"UF", "UH", "NC", "NR"}:
        raise PrefillFailed("connect")
    if found & {"UC", "UR", "UPE"}:
        raise PrefillFailed("reset", lost=True)


def _destination(listener: str) -> str:
    """Return ``host:port`` of a URL."""
    parts = urlsplit(listener)
    return join_address(parts.hostname or "", parts.port or 80)


def largest_answer(body: bytes) -> int:
    """Return the bytes that the answer to a prefill may have: one token, and where the blocks are.

    In proportion to the request, so that answers take no more memory than bodies, which are counted, do.
    """
    return min(MAX_ANSWER_BYTES, _LEAST_ANSWER_BYTES + _ANSWER_PER_BODY_BYTE * len(body))


def _content_type(answer: Answer) -> str:
    """Return the type of an answer, if it is one that can be passed on."""
    found = answer.header("content-type")
    return found if _PASSABLE.fullmatch(found) else "application/json"


def _for_client(answer: Answer) -> dict[str, str]:
    """Return what a client needs of an error's headers, where it is text that can be passed on."""
    given = ((name, answer.header(name)) for name in names.KEPT_FROM_PREFILL)
    return {name: value for name, value in given if _PASSABLE.fullmatch(value)}
