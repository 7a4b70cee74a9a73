"""Answers of real vLLM servers, made comparable with each other."""

from __future__ import annotations

import json
from functools import reduce
from itertools import groupby
from typing import Any

from tests.support.processes import Answer

OWN = frozenset(
    {"id", "created", "created_at", "completed_at", "request_id", "item_id", "call_id", "system_fingerprint"}
    | {"kv_transfer_params", "sequence_number"}
)
"""Fields that differ from answer to answer and from server to server, and the hand-off."""
_WRITTEN = frozenset({"cache_write_tokens", "created_cache_tokens"})
"""What D has fetched, it has not written to its cache."""
_GROWS = frozenset({"text", "content", "arguments", "partial_json", "delta"})
"""Texts of which each event of a stream has a piece."""
_BESIDE = frozenset({"choices", "tool_calls"})
"""Lists whose members go on in the next event. All other lists grow."""


def answered(answer: Answer) -> Any:
    """Return an answer's JSON; of a stream, that of its events, as few as they can be."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return answer.json
    data = [line[6:] for line in answer.body.decode().splitlines() if line.startswith("data: ")]
    events = [{"type": line} if line == "[DONE]" else json.loads(line) for line in data]
    groups = [(kind, list(group)) for kind, group in groupby(events, lambda event: str(event.get("type")))]
    # How many tokens an event has depends on when they came.
    return [
        part
        for kind, group in groups
        for part in ([reduce(_joined, group)] if kind == "None" or kind.endswith("delta") else group)
    ]


def _joined(one: Any, more: Any, key: str = "") -> Any:
    """Return what two events of a stream say together."""
    if more is None or one is None:
        return one if more is None else more
    if isinstance(one, dict) and isinstance(more, dict):
        return {k: _joined(one.get(k), more.get(k), k) for k in {**one, **more}}
    if isinstance(one, list) and isinstance(more, list):
        if key in _BESIDE and len(one) == len(more):
            return [_joined(a, b) for a, b in zip(one, more, strict=True)]
        return one + more
    return one + more if isinstance(one, str) and key in _GROWS else more


def comparable(value: Any) -> Any:
    """Return an answer without what differs from answer to answer, at any depth."""
    if isinstance(value, dict):
        value = {key: each for key, each in value.items() if key not in OWN | _WRITTEN}
        if value.get("cache_creation_input_tokens") is not None:  # which are not in input_tokens
            value["input_tokens"] += value.pop("cache_creation_input_tokens")
        return {key: comparable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [comparable(each) for each in value]
    return round(value, 3) if isinstance(value, float) else value


def found(value: Any, *keys: str) -> list[Any]:
    """Return what an answer has under some keys, at any depth, in its order; not what is null."""
    if isinstance(value, list):
        return [each for one in value for each in found(one, *keys)]
    if not isinstance(value, dict):
        return []
    own = [value[key] for key in keys if value.get(key) is not None]
    return own + [each for one in value.values() for each in found(one, *keys)]
