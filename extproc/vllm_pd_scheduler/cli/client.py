"""Asks the admin interface of a scheduler, for the operators' commands."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from .. import __version__
from ..system.keepalive import keep_alive

TIMEOUT_S = 10.0
"""How long an answer may take, but where the scheduler is asked to wait for something."""

SILENT_S = 45.0
"""How long a stream may be silent: three times as long as the scheduler is."""

REFUSED = 1
"""Exit status: the scheduler has refused, or it could not be done."""
UNREACHABLE = 3
"""Exit status: there is no scheduler, or none that this program understands."""

_GIVE_URL = "Give its address by --url or PD_SCHEDULER_URL"
_OTHER_SERVER = f"is this a scheduler's admin interface? {_GIVE_URL}"


class Failure(Exception):
    """What was asked for did not happen; the message says why, where and what to do."""

    def __init__(self, message: str, status: int = REFUSED) -> None:
        super().__init__(message)
        self.status = status
        """The exit status."""


class AdminClient:
    """Asks one scheduler. ``url`` has a scheme and a host; raises :exc:`ValueError` if it has not."""

    def __init__(self, url: str, token: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"{url!r} is not a URL like http://127.0.0.1:9003")
        self._secure = parts.scheme == "https"
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path
        self._tls = tls
        self._token = token

    def get(self, path: str, **query: object) -> bytes:
        """Return the JSON of an answer; raises :exc:`Failure`. What is ``None`` is no part of the query."""
        return self.ask("GET", path, query)

    def ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, object] | None = None,
        body: Mapping[str, object] | None = None,
        *,
        timeout: float | None = TIMEOUT_S,
    ) -> bytes:
        """Return what is answered, as it is; raises :exc:`Failure` if that is an error, or nothing."""
        with self._asked(method, path, query, body, timeout) as response:
            text = response.read()
            if response.status != 204:
                self.parsed(text)
            return text

    def stream(self, path: str, until: float | None = None, **query: object) -> Iterator[str]:
        """Yield the data of server-sent events until the scheduler ends them; raises :exc:`Failure`.

        With ``until``, a time of ``time.monotonic``, they end then, or at the next sign of life after it.
        """
        with self._asked("GET", path, query, None, SILENT_S, "text/event-stream") as response:
            if response.headers.get_content_type() != "text/event-stream":
                raise self._not_ours(f"it sent {response.headers.get_content_type()}")
            for line in response:
                if until is not None and time.monotonic() >= until:
                    return
                if line.startswith(b"data:"):
                    yield line.decode(errors="replace").removeprefix("data:").strip()

    @contextmanager
    def _asked(
        self,
        method: str,
        path: str,
        query: Mapping[str, object] | None,
        body: Mapping[str, object] | None,
        timeout: float | None,
        accept: str = "application/json",
    ) -> Iterator[http.client.HTTPResponse]:
        given = {key: value for key, value in (query or {}).items() if value is not None}
        target = quote(self._path + path, safe="/%") + (f"?{urlencode(given)}" if given else "")
        headers = {"accept": accept, "user-agent": f"vllm-pd-scheduler/{__version__}"}
        if self._token is not None:
            headers["authorization"] = f"Bearer {self._token}"
        if body is not None:
            headers["content-type"] = "application/json"
        connection = self._connection()
        try:
            with self._failures(timeout):
                connection.connect()
                keep_alive(connection.sock)
                connection.sock.settimeout(timeout)
                connection.request(method, target, None if body is None else json.dumps(body), headers)
                response = connection.getresponse()
                if response.status >= 300:
                    raise self._refusal(method, path, response.status, response.read())
                yield response
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if not self._secure:
            return http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
        return http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT_S, context=self._tls)

    @contextmanager
    def _failures(self, timeout: float | None) -> Iterator[None]:
        """Say what went wrong with a connection."""
        try:
            yield
        except ssl.SSLCertVerificationError as error:
            message = f"its certificate cannot be verified ({error.verify_message}): name its CA by --ca-file"
            raise self._unreachable(message) from None
        except ssl.SSLError as error:
            raise self._unreachable(f"TLS fails ({error.reason}): does it need http://?") from None
        except TimeoutError:
            within = f" within {timeout:g} s" if timeout else ""
            raise self._unreachable(f"no answer{within}") from None
        except (http.client.HTTPException, ConnectionResetError):
            secure = "" if self._secure else "; does it need https://?"
            raise self._not_ours(f"it does not answer in HTTP{secure}") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise self._unreachable(f"{reason}. Does it run there? {_GIVE_URL}") from None

    def _refusal(self, method: str, path: str, status: int, text: bytes) -> Failure:
        """Return what an error of the server means."""
        try:
            reason = str(json.loads(text)["error"])
        except (ValueError, KeyError, TypeError):
            return self._not_ours(f"it answers {method} {path} with status {status}")
        if status == 401:
            reason += ": give it by --token-file or PD_SCHEDULER_TOKEN"
        missing = status == 404 and reason.startswith(f"{method} ")
        if missing or (status == 400 and reason.startswith("query: unknown key")):
            what = f"no {method} {path}" if missing else f"less in {method} {path} ({reason})"
            reason = f"the scheduler at {self.url} is older and has {what}: this needs {__version__} or later"
        return Failure(reason)

    def parsed(self, text: bytes) -> Any:
        """Return what JSON says; raises :exc:`Failure` if a text is none."""
        try:
            return json.loads(text)
        except ValueError:
            raise self._not_ours("it does not answer in JSON") from None

    def _unreachable(self, why: str) -> Failure:
        return Failure(f"the scheduler at {self.url} cannot be reached: {why}", UNREACHABLE)

    def _not_ours(self, why: str) -> Failure:
        return Failure(f"{self.url}: {why}: {_OTHER_SERVER}", UNREACHABLE)


def instance_path(instance_id: str, action: str = "") -> str:
    """Return the path of an instance."""
    return f"/instances/{quote(instance_id, safe='')}{action}"
