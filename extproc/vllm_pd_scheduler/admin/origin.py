"""Where a request to the admin interface comes from: web pages may not steer it through a reader's browser.

A page of any site can have its reader's browser send requests to a loopback port. A browser says so, in
headers that no page can set; ``curl`` and probes send none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from ..config import is_loopback

_PORTS = {"http": 80, "https": 443}


def foreign_host(headers: Mapping[str, str], own: str) -> str | None:
    """Return why a request's ``Host`` is not this machine, or ``None`` if it is.

    A site whose name is made to lead here (DNS rebinding) counts as one origin with us for its browser, but
    the name stays in ``Host``. ``own`` is the address that the interface listens at.
    """
    given = headers.get("host")
    if given is None:  # HTTP/1.0: no browser
        return None
    try:
        name = (urlsplit(f"//{given}").hostname or "").rstrip(".")
    except ValueError:
        name = ""
    if is_loopback(name) or name == own.lower():
        return None
    return f"Host: {given!r} is not this machine: without admin_token use localhost, 127.0.0.1 or admin_host"


def foreign_origin(headers: Mapping[str, str]) -> str | None:
    """Return why a change is asked for by a page of another site, or ``None`` if it is not."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is None and origin is None:
        return None
    if site in ("same-origin", "none") or (site is None and _is_same(origin or "", headers.get("host", ""))):
        return None
    return f"a page of another site ({origin or site}) may change nothing here"


def _is_same(origin: str, host: str) -> bool:
    try:
        asking, asked = urlsplit(origin), urlsplit(f"//{host}")
        port = _PORTS.get(asking.scheme)
        return (asking.hostname, asking.port or port) == (asked.hostname, asked.port or port)
    except ValueError:
        return False
