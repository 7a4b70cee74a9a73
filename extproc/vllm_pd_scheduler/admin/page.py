"""The dashboard's page: one answer with its style and scripts in it, which loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources

from aiohttp import web

HTML = "text/html"

_STYLE = re.compile(r'<link rel="stylesheet" href="([\w.-]+)" />')
_SCRIPT = re.compile(r'<script src="([\w.-]+)"></script>')


def wants_page(method: str, path: str, headers: Mapping[str, str]) -> bool:
    """Whether a request is a browser's for the dashboard, and not a program's for the index."""
    return path == "/" and method in ("GET", "HEAD") and _prefers_html(headers.get("accept", ""))


def page_answer(request: web.Request) -> web.Response:
    """Return the page. It holds nothing of the fleet, so anybody may have it."""
    text, headers = _page()
    if request.headers.get("if-none-match") == headers["etag"]:
        return web.Response(status=304, headers=headers)
    answer = web.Response(text=text, content_type=HTML, headers=headers)
    answer.enable_compression()
    return answer


def _prefers_html(accept: str) -> bool:
    """Whether an ``Accept`` header names HTML, and nothing that JSON is with a higher weight."""
    html = json = 0.0
    for item in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        weight = _weight(parameters)
        if kind == HTML:
            html = max(html, weight)
        elif kind in ("application/json", "application/*"):
            json = max(json, weight)
    return html > 0 and html >= json


def _weight(parameters: list[str]) -> float:
    given = next((each[2:] for each in parameters if each.startswith("q=")), "1")
    return float(given) if re.fullmatch(r"[01](\.\d{0,3})?", given) else 0.0


@cache
def _page() -> tuple[str, Mapping[str, str]]:
    """Return the page, and the headers by which a browser runs what is in it and nothing else."""
    files = resources.files(__package__) / "dashboard"
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def inline(tag: str) -> Callable[[re.Match[str]], str]:
        def element(found: re.Match[str]) -> str:
            content = (files / found[1]).read_text(encoding="utf-8")
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            hashes[tag].append(f"'sha256-{digest}'")
            return f"<{tag}>{content}</{tag}>"

        return element

    text = (files / "index.html").read_text(encoding="utf-8")
    text = _SCRIPT.sub(inline("script"), _STYLE.sub(inline("style"), text))
    policy = (
        "default-src 'none'",
        f"script-src {' '.join(hashes['script'])}",
        f"style-src {' '.join(hashes['style'])}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
    return text, {
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
        "vary": "accept",
        "etag": f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"',
    }
