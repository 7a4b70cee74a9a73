"""Conversations of coding agents, in the format of Weka's kv-cache-tester that the AgentX benchmark uses.

A conversation is a JSON object: ``id``, ``block_size``, ``hash_id_scope`` and ``requests``. An entry of
``requests`` is a call (``type`` ``n``, or ``s`` with a stream) with ``t`` (seconds since the beginning),
``in`` and ``out`` (tokens), ``hash_ids``, ``api_time`` (seconds) and more; or a sub-agent (``subagent``) with
``requests`` of its own. https://docs.nvidia.com/aiperf/tutorials/datasets-inputs/replay-weka-agentic-coding-traces

A file has one conversation, or one a line; a folder has one in each of its ``.json`` files.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ..records.recording import BLOCK_TOKENS
from .trace import Trace, TraceError, TraceRequest, check_span, prefixes

SESSIONS = 16
"""Conversations that are held at the same time: a choice."""
STAGGER_S = 1.0
"""Seconds between the beginnings of the first ones: a choice, so that they do not begin as one."""

_HEAD = 65_536
"""Bytes of a file that are looked at."""

_Seconds = Annotated[float, msgspec.Meta(ge=0)]
_Tokens = Annotated[int, msgspec.Meta(ge=0)]


class _Call(msgspec.Struct, tag_field="type", tag="n"):
    t: _Seconds
    prompt: _Tokens = msgspec.field(name="in")
    output: _Tokens = msgspec.field(name="out")
    hash_ids: list[int] = []
    api_time: _Seconds | None = None

    @property
    def end(self) -> float:
        return self.t + (self.api_time or 0.0)


class _StreamedCall(_Call, tag="s"):
    pass


class _SubAgent(msgspec.Struct, tag_field="type", tag="subagent"):
    t: _Seconds
    requests: list[_Call | _StreamedCall | _SubAgent]
    agent_id: str = ""
    status: str = ""


class _Conversation(msgspec.Struct):
    id: str
    block_size: Annotated[int, msgspec.Meta(ge=1)]
    requests: list[_Call | _StreamedCall | _SubAgent]
    hash_id_scope: Literal["local", "global"] = "local"


_Entries = Sequence[_Call | _StreamedCall | _SubAgent]
_decoder = msgspec.json.Decoder(_Conversation)


def is_weka(path: Path) -> bool:
    """Whether a path is a folder, or a file that begins as a conversation does.

    A file that cannot be read is none.
    """
    if path.is_dir():
        return True
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD).lstrip()
    except OSError:
        return False
    return head.startswith(b"{") and b'"block_size"' in head and b'"requests"' in head


def read_conversations(path: Path, sessions: int = SESSIONS) -> Trace:
    """Return the calls of all conversations, of which ``sessions`` are held at the same time.

    The next one begins where one has ended, as recorded; the first ones begin ``STAGGER_S`` apart. Each call
    is sent when its agent has had the answer before, its sub-agents have come back, and the recorded pause
    has passed.

    Raise :exc:`TraceError` for what cannot be read, has no calls, or is malformed.
    """
    found = list(_conversations(path))
    sizes = {conversation.block_size for _, conversation in found}
    if len(sizes) > 1:
        raise TraceError(f"{path}: conversations have blocks of {', '.join(map(str, sorted(sizes)))} tokens")
    relative = any(_begins_anew(conversation.requests) for _, conversation in found)
    free = [(number * STAGGER_S, number) for number in range(sessions)]
    requests: list[TraceRequest] = []
    last: dict[int, str] = {}
    for number, (_, conversation) in enumerate(found):
        calls = _Calls(conversation, number, relative).calls
        if not calls:
            continue
        began, place = heapq.heappop(free)
        start = began - min(call.request.arrival for call in calls)
        for call in calls:
            after = call.request.after or ((last[place],) if place in last else ())
            requests.append(replace(call.request, arrival=call.request.arrival + start, after=after))
        end = max(calls, key=lambda call: call.end)
        last[place] = end.request.name
        heapq.heappush(free, (end.end + start, place))
    if not requests:
        raise TraceError(f"{path}: there are no requests in it")
    requests.sort(key=lambda each: each.arrival)
    check_span(path, requests)
    size = sizes.pop()
    return Trace(requests, _blocks_together(size) * size)


def _blocks_together(size: int) -> int:
    """Return how many blocks are taken for one, so that long prompts do not have thousands."""
    return max(1, BLOCK_TOKENS // size)


def _conversations(path: Path) -> Iterator[tuple[Path, _Conversation]]:
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    for file in files:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise TraceError(f"{file}: cannot be read: {error.strerror}") from None
        try:
            yield file, _decoder.decode(data)
            continue
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            whole = error
        lines = [line for line in data.splitlines() if line.strip()]
        try:
            first = _decoder.decode(lines[0])
        except (msgspec.DecodeError, UnicodeDecodeError, IndexError):
            raise TraceError(f"{file}: not a conversation: {whole}") from None
        yield file, first
        for number, line in enumerate(lines[1:], 2):
            try:
                yield file, _decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise TraceError(f"{file}: conversation {number}: {error}") from None


def _begins_anew(entries: _Entries) -> bool:
    """Whether the times of a sub-agent count from its own beginning: some come before that of the sub-agent.

    Both kinds are published: kv-cache-tester counts so, AgentX from the beginning of the conversation.
    """
    for entry in entries:
        if isinstance(entry, _SubAgent):
            times = [inner.t for inner in entry.requests]
            if times and min(times) < entry.t - 1e-3:
                return True
            if _begins_anew(entry.requests):
                return True
    return False


@dataclass(frozen=True, slots=True)
class _Placed:
    """A call as a request of the trace, which begins with its conversation."""

    request: TraceRequest
    end: float
    """When its answer had ended, as recorded."""


class _Calls:
    """The calls of one conversation, and which of them needs whose answers."""

    def __init__(self, conversation: _Conversation, number: int, relative: bool) -> None:
        self._conversation, self._number, self._relative = conversation, number, relative
        self._scope = number + 1 if conversation.hash_id_scope == "local" else 0
        self._together = _blocks_together(conversation.block_size)
        self.calls: list[_Placed] = []
        self._agent(conversation.requests, f"{number}", 0.0, [])

    def _agent(self, entries: _Entries, name: str, origin: float, parent: list[_Placed]) -> list[_Placed]:
        """Add the calls of an agent that ``parent`` had done when it began; return its last ones."""
        done, awaited = list(parent), list[_Placed]()
        for number, entry in enumerate(entries):
            if isinstance(entry, _SubAgent):
                began = origin + (entry.t if self._relative else 0.0)
                last = self._agent(
                    entry.requests, f"{name}.{number}", began, self._latest(done, origin + entry.t)
                )
                if entry.status != "async_launched":
                    awaited += last
                continue
            at = origin + entry.t
            needs = [*self._latest(done, at), *(each for each in awaited if each.end <= at + 1e-3)]
            awaited = [each for each in awaited if each.end > at + 1e-3]
            done.append(self._add(entry, f"{name}/{number}", name, at, needs))
        return [max(done, key=lambda each: each.end)] if len(done) > len(parent) else []

    @staticmethod
    def _latest(done: list[_Placed], at: float) -> list[_Placed]:
        """Return the last call that had ended by then, or none: those that overlap do not wait."""
        ended = [each for each in done if each.end <= at + 1e-3]
        return [max(ended, key=lambda each: each.end)] if ended else []

    def _add(self, call: _Call, name: str, session: str, at: float, needs: list[_Placed]) -> _Placed:
        size = self._conversation.block_size
        blocks = prefixes(call.hash_ids[: call.prompt // size], self._scope)
        ended = max((each.end for each in needs), default=at)
        request = TraceRequest(
            at,
            max(1, call.prompt),
            max(1, call.output),
            blocks[self._together - 1 :: self._together],
            session,
            name,
            tuple(each.request.name for each in needs),
            max(0.0, at - ended),
        )
        placed = _Placed(request, at + (call.api_time or 0.0))
        self.calls.append(placed)
        return placed
