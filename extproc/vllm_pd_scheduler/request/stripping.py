"""Takes a client's hand-off out of a body, and refuses bodies in which one could hide."""

from __future__ import annotations

import json

from .errors import BodyError
from .handoff_key import is_suspect, refuse_name, without_key
from .json_text import AT_ONCE_BYTES, BOM, MAX_DEPTH, JsonText, Malformed, Steps, TooDeep

TOO_DEEP = f"The request body is nested too deeply: {MAX_DEPTH} levels are allowed."


def strip_handoff(body: bytes) -> Steps[bytes]:
    """Return a body of any kind without a hand-off key at any depth; the same object if it has none.

    Raises :exc:`.errors.BodyError` for a body that names the key but cannot be read as JSON, for encodings
    (UTF-16, UTF-32) in which the key could hide, since vLLM would read those, and for JSON that is nested too
    deeply.
    """
    check_encoding(body)
    if len(body) <= AT_ONCE_BYTES and not is_suspect(body) and not may_be_deep(body):
        return body
    text = JsonText(body)
    start = yield from text.space(len(BOM) if body.startswith(BOM) else 0)
    if body[start : start + 1] not in (b"[", b"{"):
        yield from refuse_name(body)
        return body
    clean = body
    try:
        clean = yield from without_handoff(body)
        yield from JsonText(clean).skip(start)
    except TooDeep:
        raise BodyError(TOO_DEEP) from None
    except Malformed:
        yield from refuse_name(clean)  # all else is the instance's to refuse
    return clean


def without_handoff(body: bytes) -> Steps[bytes]:
    """Return JSON text without a client's hand-off; text that is no JSON may not name it at all."""
    clean = yield from without_key(body)
    if len(clean) <= AT_ONCE_BYTES and is_suspect(clean):
        try:
            json.loads(clean)
        except (ValueError, RecursionError):
            yield from refuse_name(clean)
    return clean


def may_be_deep(body: bytes) -> bool:
    """Whether a body has so many brackets that it may be nested too deeply."""
    return body.count(b"[") + body.count(b"{") > MAX_DEPTH


def check_encoding(body: bytes) -> None:
    """Raise :exc:`.errors.BodyError` for UTF-16 and UTF-32, which vLLM would read too."""
    if b"\0" in body[:4] or body.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BodyError("The request body must be UTF-8 text.")
