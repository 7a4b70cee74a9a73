"""The load of a replay: a recorded trace in one of the formats that are read, or one that is made up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from .conversations import linked
from .shapes import SHAPES, make
from .trace import Trace, TraceError, TraceRequest, read_trace
from .weka import SESSIONS, is_weka, read_conversations

MADE_REQUESTS = 5000
"""Requests of a load that is made up, if nobody says how many: a choice, some minutes of a small fleet."""
_PREFIX = "made:"


@dataclass(frozen=True, slots=True)
class Load:
    """What ``--trace`` names. It can be pickled, and drawn anew by each process."""

    text: str
    """A path, or ``made:`` and a shape."""
    limit: int | None = None
    """Only the first so many requests; of what is made up, about so many."""
    sessions: int = SESSIONS
    """Conversations that are held at the same time, where the trace has no times for them."""

    @property
    def shape(self) -> str | None:
        """The shape of a load that is made up; ``None`` for a recorded one."""
        return self.text.removeprefix(_PREFIX) if self.text.startswith(_PREFIX) else None

    @property
    def name(self) -> str:
        """What to call it."""
        return self.text if self.shape else Path(self.text).name

    def trace(self, seed: int) -> Trace:
        """Return the requests, with what they say of each other; ``seed`` changes only what is made up.

        Raise :exc:`TraceError` for what cannot be used.
        """
        if self.shape is not None:
            if self.shape not in SHAPES:
                raise TraceError(f"{self.text}: there is no such shape; there are {', '.join(SHAPES)}")
            return linked(make(self.shape, self.limit or MADE_REQUESTS, seed))
        path = Path(self.text)
        if not is_weka(path):
            return linked(read_trace(path, self.limit))
        trace = read_conversations(path, self.sessions)
        return linked(trace.limited(self.limit) if self.limit else trace)


def lines(trace: Trace) -> bytes:
    """Return a trace as JSONL, which :func:`read_trace` reads back."""
    encoder = msgspec.json.Encoder()
    return b"".join(encoder.encode(_line(each, trace.block_tokens)) + b"\n" for each in trace.requests)


def _line(request: TraceRequest, block_tokens: int) -> dict[str, object]:
    return {
        "timestamp": round(request.arrival * 1000, 3),
        "input_length": request.prompt_tokens,
        "output_length": request.output_tokens,
        "hash_ids": request.blocks,
        "block_size": block_tokens,
        "session_id": request.session,
        "request_id": request.name,
        "after": request.after,
        "delay": round(request.pause * 1000, 3),
    }
