"""The prefill leg over HTTP: through Envoy's loopback prefill listener, or straight to the instance."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
from collections.abc import Callable, Mapping

import aiohttp

from ..config.tls import InstanceTlsConfig
from ..fleet.endpoint import Endpoint
from ..instance_http.bounded_read import AnswerEncoded, AnswerTooLarge, read_at_most
from ..instance_http.shortage import is_our_shortage
from ..request import headers as names
from ..system.keepalive import keepalive_socket
from .interfaces import LocalShortage, PrefillAnswer, PrefillFailed, PrefillNotSent

LINGER_S = 1.0
"""How long a prefill goes on when its client has left. An answer that is not read pins P's blocks for the
lease: an abort that comes when P has just finished is too late, and only the answer says what to free."""


MAX_ANSWER_BYTES = 16 << 20
_LEAST_ANSWER_BYTES = 1 << 20
_ANSWER_PER_BODY_BYTE = 8
"""With ``return_token_ids`` P writes each token of the prompt as a number, and one can be a single byte."""
_PASSABLE = re.compile(r"[!-~][ -~]{0,199}")
"""A header of P's that can go to the client."""
_ENVOYS_SHORTAGE = re.compile(
    rb"reset reason: local connection failure|connect error: Cannot assign requested"
)
"""What Envoy answers in an instance's place when it has no file descriptor, or no port, left for it."""


class HttpPrefill:
    """A :class:`~vllm_pd_scheduler.handoff.interfaces.PrefillLeg` by aiohttp.

    ``listener`` is the base URL of Envoy's prefill listener, which sends the request to the endpoint
    that a header names; ``None`` means straight to the instance. When the call is cancelled, ``unwanted``
    gets the answer if it comes within ``LINGER_S``. After that, or at once without ``unwanted``, the
    connection is closed, which makes vLLM abort the request.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        listener: str | None,
        timeout: float,
        unwanted: Callable[[Endpoint, PrefillAnswer], None] | None = None,
    ) -> None:
        self._session = session
        self._listener = listener
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._unwanted = unwanted
        self._lingering: set[asyncio.Task[None]] = set()

    async def __call__(
        self, endpoint: Endpoint, path: str, headers: Mapping[str, str], body: bytes
    ) -> PrefillAnswer:
        """Send the request and read the whole answer."""
        if self._unwanted is None:
            return await self._send(endpoint, path, headers, body)
        sent = asyncio.ensure_future(self._send(endpoint, path, headers, body))
        try:
            return await asyncio.shield(sent)
        except asyncio.CancelledError:
            task = asyncio.ensure_future(self._linger(endpoint, sent, self._unwanted))
            self._lingering.add(task)
            task.add_done_callback(self._lingering.discard)
            raise

    async def close(self) -> None:
        """Wait for the prefills that linger."""
        await asyncio.gather(*self._lingering, return_exceptions=True)

    async def _linger(
        self,
        endpoint: Endpoint,
        sent: asyncio.Future[PrefillAnswer],
        unwanted: Callable[[Endpoint, PrefillAnswer], None],
    ) -> None:
        with contextlib.suppress(TimeoutError, PrefillFailed):
            unwanted(endpoint, await asyncio.wait_for(sent, LINGER_S))

    async def _send(
        self, endpoint: Endpoint, path: str, headers: Mapping[str, str], body: bytes
    ) -> PrefillAnswer:
        given = ((name, headers[name]) for name in names.FORWARDED_TO_PREFILL if name in headers)
        # What is not ASCII means nothing here, and would come to P as other bytes, three times as many.
        kept = {name: value for name, value in given if value.isascii()}
        if endpoint.instance.api_key is not None:
            kept["authorization"] = f"Bearer {endpoint.instance.api_key}"
        kept.setdefault("content-type", "application/json")
        if self._listener is None:
            base, name = endpoint.url, endpoint.instance.tls_name
        else:  # TLS to the instance is Envoy's
            base, name = self._listener, None
            kept[names.DESTINATION] = str(endpoint.address)
        try:
            async with self._session.post(
                base + path,
                data=body,
                headers=kept,
                timeout=self._timeout,
                allow_redirects=False,
                server_hostname=name,
            ) as response:
                answer = await read_at_most(response, largest_answer(body))
                _check_connection(response.headers.get(names.CONNECTION, ""), answer)
                retry_after = response.headers.get("retry-after", "")
                wait = float(retry_after) if retry_after.isdecimal() else None
                told = {} if response.status == 200 else _for_client(response.headers)
                return PrefillAnswer(response.status, _content_type(response), answer, wait, told)
        except TimeoutError:
            raise PrefillFailed("timeout") from None
        except (AnswerTooLarge, AnswerEncoded):
            raise PrefillFailed("unreadable") from None
        except (aiohttp.ClientError, OSError, MemoryError) as error:
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> PrefillFailed:
        """Return what became of a request that has no answer."""
        number = error.errno if isinstance(error, OSError) else None
        if is_our_shortage(error) or (self._listener is not None and number == errno.EADDRNOTAVAIL):
            return LocalShortage(errno.errorcode.get(number or errno.ENOMEM, "ENOMEM"))
        if isinstance(error, aiohttp.ClientConnectorError):
            return PrefillFailed("connect") if self._listener is None else PrefillNotSent("listener")
        # Straight to P it is P's connection. Envoy's own does not break when P's does.
        return PrefillFailed("reset", lost=self._listener is None)


def _check_connection(flags: str, answer: bytes) -> None:
    """Raise :exc:`PrefillFailed` if Envoy's flags say that an answer is its own, since P gave none."""
    found = set(flags.split(","))
    if "UF" in found and _ENVOYS_SHORTAGE.search(answer):
        raise LocalShortage("envoy")
    if found & {"UF", "UH", "NC", "NR"}:
        raise PrefillFailed("connect")
    if found & {"UC", "UR", "UPE"}:
        raise PrefillFailed("reset", lost=True)


def largest_answer(body: bytes) -> int:
    """Return the bytes that the answer to a prefill may have: one token, and where the blocks are.

    In proportion to the request, so that answers take no more memory than bodies, which are counted, do.
    """
    return min(MAX_ANSWER_BYTES, _LEAST_ANSWER_BYTES + _ANSWER_PER_BODY_BYTE * len(body))


def _content_type(response: aiohttp.ClientResponse) -> str:
    """Return the type of an answer, if it is one that can be passed on."""
    found = response.headers.get("content-type", "")
    return found if _PASSABLE.fullmatch(found) else "application/json"


def _for_client(headers: Mapping[str, str]) -> dict[str, str]:
    """Return what a client needs of an error's headers, where it is text that can be passed on."""
    given = ((name, headers.get(name, "")) for name in names.KEPT_FROM_PREFILL)
    return {name: value for name, value in given if _PASSABLE.fullmatch(value)}


def open_session(tls: InstanceTlsConfig | None = None) -> aiohttp.ClientSession:
    """Return a client session for instances: no connection limit, no cookies, no headers of its own.

    ``tls`` is what it wants of those with TLS, by default a certificate that the system trusts. Raises
    :exc:`ValueError` if a file of it cannot be read.
    """
    verified = tls.context() if tls is not None else True
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=0, keepalive_timeout=60, ssl=verified, socket_factory=keepalive_socket
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("user-agent", "accept-encoding", "accept"),
        auto_decompress=False,
    )
