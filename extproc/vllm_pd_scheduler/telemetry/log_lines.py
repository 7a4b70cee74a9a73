"""How a log line looks, as text or JSON, and which request it is about."""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that the code which runs now works on, as Envoy and the client know it; empty: on none.

Each task has its own. Whoever works on other requests for a while puts theirs here, and this one back.
"""

_MAX_ID = 128
"""Characters of a request's id, which clients choose, that a line has."""


class TextLines(logging.Formatter):
    """A line for people, with the request's id at its end."""

    def __init__(self, worker: str = "") -> None:
        super().__init__(f"%(asctime)s %(levelname)s {worker and f'{worker} '}%(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line, without the traceback that may follow it."""
        line = super().formatMessage(record)
        about = _about()
        return f"{line} [request {about}]" if about else line


class JsonLines(logging.Formatter):
    """An object on one line: ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``.

    ``worker`` is there if there are several, ``request_id`` if the line is about a request, and ``exception``
    if it tells of one.
    """

    def __init__(self, worker: str = "") -> None:
        super().__init__()
        self._worker = {"worker": worker} if worker else {}

    def format(self, record: logging.LogRecord) -> str:
        """Return the object."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._worker,
        }
        if about := _about():
            line["request_id"] = about
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _about() -> str:
    return request_id.get()[:_MAX_ID]


def formatter(kind: LogFormat, worker: str = "") -> logging.Formatter:
    """Return what makes lines of a format; among several workers each line names its own."""
    return JsonLines(worker) if kind == "json" else TextLines(worker)
