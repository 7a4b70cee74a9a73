"""What a Kubernetes API server answers: objects, and failures as it writes them."""

from __future__ import annotations

import json

from aiohttp import web

from tests.support.kubernetes_objects import Json


def line(found: Json) -> bytes:
    return json.dumps(found, separators=(",", ":")).encode() + b"\n"


def answer(found: Json, headers: dict[str, str] | None = None) -> web.Response:
    code = found["code"] if found["kind"] == "Status" else 200
    return web.Response(
        status=code, body=line(found), headers={"content-type": "application/json", **(headers or {})}
    )


def status_of(code: int, reason: str | None, message: str, details: Json | None = None) -> Json:
    """Return a failure as the API server writes it."""
    found: Json = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    found["message"] = message
    if reason is not None:
        found["reason"] = reason
    if details is not None:
        found["details"] = details
    found["code"] = code
    return found


def forbidden(verb: str, group: str, plural: str, namespace: str) -> Json:
    text = (
        f'{plural}{"." + group if group else ""} is forbidden: User "test-user" cannot {verb}'
        f' resource "{plural}" in API group "{group}" in the namespace "{namespace}"'
    )
    details = {"group": group, "kind": plural} if group else {"kind": plural}
    return status_of(403, "Forbidden", text, details=details)


def too_large(asked: int, current: int) -> Json:
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    text = f"Timeout: Too large resource version: {asked}, current: {current}"
    return status_of(504, "Timeout", text, details={"causes": [cause], "retryAfterSeconds": 1})
