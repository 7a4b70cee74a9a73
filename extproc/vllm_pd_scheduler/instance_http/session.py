"""aiohttp's client, as instances are asked with it."""

from __future__ import annotations

import ssl

import aiohttp

from ..system.keepalive import keepalive_socket


def open_session(tls: ssl.SSLContext | None = None) -> aiohttp.ClientSession:
    """Return a client session for instances: no connection limit, no cookies, no headers of its own.

    ``tls`` says whom of those with TLS to trust, by default whom the system does.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=0, keepalive_timeout=60, ssl=tls or True, socket_factory=keepalive_socket
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("user-agent", "accept-encoding", "accept"),
        auto_decompress=False,
    )
