"""One choice of a request, while an engine has it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .engine import EngineRequest
from .text import Answer, Prompt


class EngineFailed(Exception):
    """The engine cannot finish a request: its KV did not come, or the engine has died."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a choice: its text and, if it is the last, the finish reason "stop" or "length"."""

    choice: int
    text: str
    finish_reason: str | None


@dataclass(slots=True)
class Job:
    """One choice of an HTTP request. ``offer`` is the hand-off that it fetches, if any."""

    request: EngineRequest
    prompt: Prompt
    choice: int
    finish_reason: str
    answer: Answer
    offer: Any = None
    params: dict[str, Any] = field(default_factory=dict)
    """``kv_transfer_params`` of the request."""
    pushes: bool = False
    """Whether its KV is written to another engine as soon as it is computed."""
    remote_cached: int | None = None
    """Prompt tokens that the hand-off's sender had in its cache, if it says so."""
    on_hand_off: Callable[[str], None] = lambda outcome: None
    """Called with the outcome of the hand-off."""
    stream: "asyncio.Queue[Token | EngineFailed]" = field(default_factory=asyncio.Queue)
    loading: "asyncio.Task[None] | None" = None
    last_token: float = 0.0

    @property
    def cached(self) -> int:
        """Cached prompt tokens as vLLM reports them to clients: those of the engine that did the prefill."""
        return self.request.cached if self.remote_cached is None else self.remote_cached
