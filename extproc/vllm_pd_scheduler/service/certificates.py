"""Certificates that are read again when their files change, without a restart."""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import Iterable
from typing import Any, Protocol

from ..discovery.watch import WatchedFile
from ..models import By
from ..records.events import EventKind, Events
from ..system.daemon_thread import in_daemon_thread
from .parts import Parts


class TlsSettings(Protocol):
    """What the configuration says of certificates."""

    def context(self) -> ssl.SSLContext:
        """Return a context made of the files as they are now; raise :exc:`ValueError` naming a bad one."""
        ...

    def files(self) -> tuple[str, ...]:
        """Return the paths of the files."""
        ...


class RenewedContext(ssl.SSLContext):
    """Stands for a context that is replaced: each new connection begins with the newest one."""

    newest: ssl.SSLContext
    _protocols: Iterable[str] = ()

    def __new__(cls, first: ssl.SSLContext) -> RenewedContext:
        """Return one that stands for ``first``."""
        made = super().__new__(cls, first.protocol)
        made.newest = first
        return made

    def __init__(self, first: ssl.SSLContext) -> None: ...

    def set_alpn_protocols(self, alpn_protocols: Iterable[str]) -> None:
        """Offer these protocols, now and later."""
        self._protocols = alpn_protocols
        self.newest.set_alpn_protocols(alpn_protocols)

    def renew(self, context: ssl.SSLContext) -> None:
        """Stand for another one from now on."""
        if self._protocols:
            context.set_alpn_protocols(self._protocols)
        self.newest = context

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """Begin a connection, as event loops do."""
        return self.newest.wrap_bio(*args, **options)


class Certificates:
    """Follows the files of one setting, ``key``.

    New ones count as a whole or not at all: a certificate that does not fit its key is refused with an event,
    and the context stays as it was.
    """

    def __init__(self, key: str, settings: TlsSettings, events: Events) -> None:
        self._key = key
        self._settings = settings
        self._events = events
        self.context = RenewedContext(settings.context())

    async def follow(self) -> None:
        """Read the files again each time that one has changed, until this is cancelled."""
        if not (files := self._settings.files()):
            return
        started = True
        async with contextlib.aclosing(WatchedFile(*files).looks()) as looks:
            async for changed in looks:
                if changed:
                    await self._read_again(told=not started)
                started = False

    async def _read_again(self, told: bool) -> None:
        """Read them; success is an event only if it is to be told: not for those that may have just come."""
        by = f"{By.DISCOVERY} {self._key}"
        try:
            self.context.renew(await in_daemon_thread(self._settings.context))
        except ValueError as error:
            text = f"{self._key}: the certificates of before stay: {error}"
            self._events.add(EventKind.CONFIG, text, by=by, level=logging.ERROR)
            return
        if told:
            text = f"{self._key}: the certificates were read again; new connections have them"
            self._events.add(EventKind.CONFIG, text, by=by)


def followed(key: str, settings: TlsSettings | None, events: Events, parts: Parts) -> ssl.SSLContext | None:
    """Return the context for a setting, if it is set; its files are followed while the parts run."""
    if settings is None:
        return None
    certificates = Certificates(key, settings, events)
    parts.keep_running(certificates.follow())
    return certificates.context
