"""A Docker engine, by the SDK. All of it blocks: it is for threads of its own."""

from __future__ import annotations

import http.client
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import msgspec
import requests
import urllib3
from docker import APIClient
from docker.context import ContextAPI
from docker.errors import APIError, DockerException
from docker.tls import TLSConfig
from docker.types import CancellableStream
from docker.utils import kwargs_from_env

from ...config.sources import DockerSource
from .containers import ROLE_LABEL, Change

CALL_S = 5.0
"""Seconds that the engine may be silent in a call."""

_SERVING = {"label": [ROLE_LABEL], "status": ["running"], "health": ["healthy", "none"]}
"""Which containers can be instances: not those that are paused, restart, or fail their own health check."""

_LISTENED_TO = {
    "type": ["container", "network"],
    "event": [
        *("start", "restart", "die", "stop", "destroy", "kill", "pause", "unpause"),
        *("rename", "health_status", "connect", "disconnect"),
    ],
}

_ENDS = frozenset(("die", "stop", "destroy", "start", "restart"))
"""Events after which a container that was asked to stop has ended, or runs anew."""

_STOPS = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL))
"""Signals that ask whatever container to stop."""

_WRONG = (DockerException, requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)
"""What the SDK raises for an engine that is away or makes no sense."""


class EngineAway(Exception):
    """The engine cannot be asked; ``args[0]`` says why, for people."""


class _Actor(msgspec.Struct, frozen=True):
    id: str = msgspec.field(name="ID", default="")
    attributes: dict[str, str] = msgspec.field(name="Attributes", default_factory=dict)


class _Event(msgspec.Struct, frozen=True):
    kind: str = msgspec.field(name="Type")
    action: str = msgspec.field(name="Action")
    actor: _Actor = msgspec.field(name="Actor", default=_Actor())
    time: int = 0
    time_ns: int = msgspec.field(name="timeNano", default=0)


class _Client(APIClient):  # type: ignore[misc]  # the SDK has no types
    """Goes straight to the engine, with the certificates that it was given.

    Else requests would take a proxy and, in place of them, the authorities that the environment names.
    """

    @property
    def trust_env(self) -> bool:
        """What requests asks."""
        return False

    @trust_env.setter
    def trust_env(self, _: bool) -> None:
        """What requests sets when it begins."""


class Engine:
    """One engine. Every method raises :exc:`EngineAway` when it cannot be asked."""

    def __init__(self, source: DockerSource) -> None:
        where: dict[str, Any] = {}
        try:
            where = _where(source)
            self._client = _Client(version="auto", timeout=CALL_S, **where)
        except _WRONG as error:
            place = f"{where['base_url']}: " if where.get("base_url") and source.host is None else ""
            raise EngineAway(place + _why(error)) from None
        url = urlsplit(str(where.get("base_url") or ""))
        self.host = url.hostname if url.scheme in ("tcp", "http", "https") and url.hostname else "127.0.0.1"
        """Address of the machine that it runs on."""
        self._stream: CancellableStream | None = None
        self._closed = False

    def containers(self) -> list[Any]:
        """Return the containers that can be instances now, as the engine lists them."""
        try:
            found = self._client.containers(filters=_SERVING)
        except _WRONG as error:
            raise EngineAway(_why(error)) from None
        if not isinstance(found, list):
            raise EngineAway("its list of containers makes no sense")
        return found

    def listen(self, after: str) -> None:
        """Have the engine tell what happens from now on, and what has since a time in Unix seconds.

        Of what has happened it only knows the last few hundred things.
        """
        try:
            self._stream = self._client.events(since=after, filters=_LISTENED_TO, decode=True)
            if self._closed:
                self._stream.close()
        except _WRONG as error:
            raise EngineAway(f"its events cannot be listened to: {_why(error)}") from None

    def changes(self) -> Iterator[Change]:
        """Yield what happens to containers with our labels, until the engine ends that or :meth:`close`."""
        try:
            for each in self._stream or ():
                event = msgspec.convert(each, _Event)
                if event.kind == "network" or ROLE_LABEL in event.actor.attributes:
                    yield self._change(event)
        except _WRONG as error:
            raise EngineAway(f"its events make no sense: {_why(error)}") from None

    def close(self) -> None:
        """End all that goes on."""
        self._closed = True
        with suppress(*_WRONG, AttributeError):  # the SDK looks for a socket that may be gone
            if self._stream is not None:
                self._stream.close()
        self._client.close()

    def _change(self, event: _Event) -> Change:
        seconds, rest = divmod(event.time_ns + 1, 10**9) if event.time_ns else (event.time, 0)
        after = f"{seconds}.{rest:09d}"
        if event.kind == "network":
            return Change(event.actor.attributes.get("container", ""), False, False, after)
        stops = event.action == "kill" and self._asks_to_stop(event.actor)
        return Change(event.actor.id, stops, event.action in _ENDS, after)

    def _asks_to_stop(self, container: _Actor) -> bool:
        number = _signal_number(container.attributes.get("signal", ""))
        if number in _STOPS:
            return True
        try:
            found = self._client.inspect_container(container.id)
            return number is not None and number == _signal_number(found["Config"]["StopSignal"])
        except (*_WRONG, KeyError, TypeError):  # it is gone, or has no signal of its own
            return False


def _where(source: DockerSource) -> dict[str, Any]:
    """Return what the SDK takes to find the engine: as the source says, else as the command ``docker``."""
    if source.host is not None:
        tls = source.tls and TLSConfig(
            client_cert=(source.tls.cert, source.tls.key), ca_cert=source.tls.ca, verify=True
        )
        return {"base_url": source.host, **({"tls": tls} if tls else {})}
    if source.context is None and os.environ.get("DOCKER_HOST"):
        return dict(kwargs_from_env())
    name = source.context or os.environ.get("DOCKER_CONTEXT")
    context = ContextAPI.get_context(name)
    if context is None:
        raise DockerException(f"there is no context {name!r}")
    where: dict[str, Any] = {"base_url": context.Host}
    if context.TLSConfig is not None:
        where["tls"] = context.TLSConfig
    return where


def _signal_number(text: str) -> int | None:
    """Return the number of a signal as engines write it: ``15``, ``SIGTERM``, ``TERM``, ``SIGRTMIN+3``."""
    if text.isascii() and text.isdigit():
        return int(text)
    base, _, more = text.upper().removeprefix("SIG").partition("+")
    found = getattr(signal, f"SIG{base}", None)
    return None if found is None else int(found) + (int(more) if more.isdigit() else 0)


def _why(error: BaseException) -> str:
    """Return what is wrong in words that stay the same: the SDK's own have addresses of objects."""
    for each in _causes(error):
        if isinstance(each, APIError):
            return f"it answers {each.status_code}: {each.explanation or 'nothing more'}"
        if isinstance(each, requests.Timeout | urllib3.exceptions.TimeoutError):
            return f"no answer within {CALL_S:g} s"
        if isinstance(each, http.client.RemoteDisconnected):
            return "it ends the connection"
        if isinstance(each, OSError) and each.strerror:
            return each.strerror
    if isinstance(error, ValueError):
        return "its answer makes no sense"
    return str(error) if isinstance(error, DockerException) else type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what has led to it: the SDK, requests and urllib3 each wrap it in their own way."""
    seen: set[int] = set()
    left = [error]
    while left:
        each = left.pop(0)
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            inner = (*each.args, getattr(each, "reason", None), each.__cause__, each.__context__)
            left += [one for one in inner if isinstance(one, BaseException)]
