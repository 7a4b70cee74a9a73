"""Asks an API server: one answer as a whole, or a watch line by line."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import replace

import aiohttp
import msgspec

from ...instance_http.bounded_read import read_at_most
from ...system.keepalive import keepalive_socket
from .access import Access, CredentialsError
from .credentials import Credentials
from .objects import Status

CONNECT_S = 10.0
"""Seconds until the API server must have taken a connection."""

ANSWER_S = 30.0
"""Seconds for which it may be silent before and in an answer."""

SILENCE_S = 150.0
"""Seconds for which a watch may be silent. An API server sends a bookmark about once a minute."""

MAX_ANSWER_BYTES = 128 << 20
MAX_LINE_BYTES = 16 << 20
"""The most that is read. An object has at most 1.5 MiB, by etcd's limit."""

MAX_RETRY_AFTER_S = 60.0

CUT = "cut"
"""Kind of the problem that a watch ended before its time. What it told until then is whole."""

SILENT = "silent"
"""Kind of the problem that a watch told nothing for too long."""

Parameters = Mapping[str, str]

_STATUS = msgspec.json.Decoder(Status)


class Problem(Exception):
    """The API server has not done what it was asked for; the text says why.

    ``kind`` is the same for problems that differ only by their text.
    """

    def __init__(self, kind: str, text: str, code: int | None = None, retry_after: float = 0.0) -> None:
        super().__init__(text)
        self.kind = kind
        self.code = code
        """HTTP status, or that of an error inside a watch."""
        self.retry_after = retry_after
        """Seconds for which it asks to be left alone."""


class Api:
    """An API server's client. ``async with`` opens and closes its connections.

    Credentials are read for each request, since their files change; a connection is used again as long as
    they say the same.
    """

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._tls: tuple[Access, ssl.SSLContext] | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Api:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(socket_factory=keepalive_socket),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"accept": "application/json", "accept-encoding": "identity"},
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def namespace(self) -> str:
        """Return the namespace that is meant where none is named; raises :exc:`Problem`."""
        return (await self._access()).namespace

    async def get(self, path: str, parameters: Parameters) -> bytes:
        """Return an answer; raises :exc:`Problem`."""
        async with await self._asked(path, parameters, ANSWER_S) as response:
            try:
                return await read_at_most(response, MAX_ANSWER_BYTES)
            except (TimeoutError, aiohttp.ClientError) as error:
                raise _unasked(error) from None

    async def watch(self, path: str, parameters: Parameters) -> Watch:
        """Begin a watch; raises :exc:`Problem`."""
        return Watch(await self._asked(path, parameters, SILENCE_S))

    async def _asked(self, path: str, parameters: Parameters, silence: float) -> aiohttp.ClientResponse:
        """Return an answer that is a 200, with its body still to be read; raises :exc:`Problem`."""
        try:
            response = await self._send(path, parameters, silence)
            if response.status == 401:  # there may be a new token since
                response.close()
                self._credentials.refused()
                response = await self._send(path, parameters, silence)
            if response.status == 200:
                return response
            async with response:
                raise _refusal(response, await read_at_most(response, MAX_LINE_BYTES))
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            raise _unasked(error) from None

    async def _access(self) -> Access:
        try:
            return await self._credentials.read()
        except CredentialsError as error:
            raise Problem("credentials", str(error)) from None

    async def _send(self, path: str, parameters: Parameters, silence: float) -> aiohttp.ClientResponse:
        access = await self._access()
        assert self._session is not None, "async with opens it"
        return await self._session.get(
            access.server + path,
            params=parameters,
            headers={} if access.token is None else {"authorization": f"Bearer {access.token}"},
            timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_S, sock_read=silence),
            ssl=self._context(access),
            server_hostname=access.server_name,
            proxy=access.proxy,
            allow_redirects=False,
        )

    def _context(self, access: Access) -> ssl.SSLContext:
        """Return a context for TLS, the same one while the certificates are the same."""
        without_token = replace(access, token=None)
        if self._tls is None or self._tls[0] != without_token:
            try:
                self._tls = without_token, access.tls()
            except CredentialsError as error:
                raise Problem("credentials", str(error)) from None
        return self._tls[1]


class Watch:
    """A watch that has begun. ``async with`` ends it."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._rest = b""
        """The beginning of a line that has not come as a whole yet."""

    async def __aenter__(self) -> Watch:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._response.close()

    async def lines(self) -> list[bytes] | None:
        """Return the next lines, however long, as many as have come; ``None`` if it ended in good order.

        Raises :exc:`Problem` when it is cut or silent.
        """
        try:
            while chunk := await self._response.content.readany():
                *lines, self._rest = (self._rest + chunk).split(b"\n")
                if lines:
                    return [line for line in lines if line.strip()]
                if len(self._rest) > MAX_LINE_BYTES:
                    raise Problem("line", f"the API server sends a line of more than {MAX_LINE_BYTES} bytes")
        except TimeoutError:
            raise Problem(SILENT, f"the watch was silent for {SILENCE_S:g} s") from None
        except aiohttp.ClientError as error:
            raise Problem(CUT, f"the watch was cut: {_why(error)}") from None
        if self._rest.strip():
            raise Problem(CUT, "the watch was cut in the middle of a line")
        return None


def refusal(status: Status, code: int) -> Problem:
    """Return a refusal that the API server explains."""
    reason = status.reason or ""
    after = status.details.retry_after_seconds if status.details else None
    text = f"{code} {reason}: {(status.message or '')[:500]}".replace(" :", ":")
    return Problem(f"{code} {reason}", text, code=code, retry_after=min(after or 0.0, MAX_RETRY_AFTER_S))


def _refusal(response: aiohttp.ClientResponse, body: bytes) -> Problem:
    """Return what an answer other than 200 says. It need not be a Status: a proxy may have written it."""
    try:
        status = _STATUS.decode(body)
    except (msgspec.DecodeError, msgspec.ValidationError):
        first = (body.decode(errors="replace").strip().splitlines() or [""])[0]
        status = Status(message=first[:200])
    found = refusal(status, response.status)
    if (after := response.headers.get("retry-after", "")).isdecimal():
        found.retry_after = min(float(after[:9]), MAX_RETRY_AFTER_S)
    return found


def _unasked(error: Exception) -> Problem:
    if isinstance(error, TimeoutError):
        return Problem("timeout", "the API server does not answer")
    return Problem(type(error).__name__, f"the API server cannot be asked: {_why(error)}")


def _why(error: Exception) -> str:
    return str(error)[:300] or type(error).__name__
