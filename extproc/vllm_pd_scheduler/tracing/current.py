"""The trace of the request that the running task serves."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .request_trace import RequestTrace

current: ContextVar[RequestTrace | None] = ContextVar("current", default=None)
"""``None`` while tracing is off, and for a request that is not traced."""
