"""Traces: when requests arrived, how long they were, and which prefixes they shared."""

from __future__ import annotations

import codecs
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Annotated

import msgspec

from ..records.recording import BLOCK_TOKENS

_MAX_DAYS = 366
"""The fleet is scraped every few seconds of virtual time, whether requests come or not."""

_NUMBER = (1 << 60) - 1  # the largest that a block may have


class TraceError(Exception):
    """A trace cannot be used; the message says which file, which line, and what is wrong."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. Both lengths are at least 1."""

    arrival: float
    """Seconds from the trace's start."""
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """Ids of the prompt's full blocks, each of the trace's ``block_tokens``.

    An id stands for the prompt up to the block's end: requests with the same id have the same prefix.
    """
    session: str | None = None
    """The conversation or the agent that it belongs to."""
    name: str = ""
    """By which others name it in ``after``; empty if none does."""
    after: tuple[str, ...] = ()
    """Names of the requests whose answers must have ended before it is sent."""
    pause: float = 0.0
    """Seconds from the last of these answers until it is sent: a user thinks, or a tool runs."""
    answer: tuple[int, ...] = ()
    """Ids of the full blocks that follow the prompt's, as far as a later prompt tells of them."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival, the first at 0."""

    requests: list[TraceRequest]
    block_tokens: int = BLOCK_TOKENS

    @property
    def seconds(self) -> float:
        """Seconds from the first arrival to the last; 0 without requests."""
        return self.requests[-1].arrival if self.requests else 0.0

    def scaled(self, rate: float) -> Trace:
        """Return the same requests ``rate`` times as fast; raise ValueError unless ``rate`` is above 0."""
        if not rate > 0:
            raise ValueError(f"a rate must be above 0, got {rate}")
        return replace(self, requests=[replace(each, arrival=each.arrival / rate) for each in self.requests])

    def spread(self, seconds: float, seed: int) -> Trace:
        """Return the same requests, each at random up to ``seconds`` later.

        In a trace with coarse times, those that came within such a time seem to come at the same instant.
        """
        random = Random(seed)
        moved = (replace(each, arrival=each.arrival + seconds * random.random()) for each in self.requests)
        requests = sorted(moved, key=lambda each: each.arrival)
        start = requests[0].arrival if requests else 0.0
        return replace(self, requests=[replace(each, arrival=each.arrival - start) for each in requests])

    def limited(self, count: int) -> Trace:
        """Return the first ``count`` requests, or all if there are fewer."""
        return replace(self, requests=self.requests[:count])


def read_trace(path: Path, limit: int | None = None) -> Trace:
    """Return the trace in a file: Mooncake's JSONL or Azure's LLM inference CSV, told by the first line.

    - A length of 0 becomes 1: published traces have such rows, and an engine always computes one token.
    - Rows need not be in the order of time.
    - With a ``limit``, only the first so many by time are kept, and no more are in memory at once. All rows
      are checked nevertheless.

    Raise :exc:`TraceError` for a file that cannot be read, has no requests, or has a malformed line.
    """
    jsonl = _Jsonl()
    try:
        with path.open("rb") as file:
            requests = _by_arrival(_requests(path, file, jsonl), limit)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from None
    if not requests:
        raise TraceError(f"{path}: there are no requests in it")
    check_span(path, requests)
    start = requests[0].arrival
    return Trace([replace(each, arrival=each.arrival - start) for each in requests], jsonl.block_tokens)


def check_span(path: Path, requests: Sequence[TraceRequest]) -> None:
    """Raise :exc:`TraceError` if requests, in their order, span more than can be replayed."""
    days = (requests[-1].arrival - requests[0].arrival) / 86_400
    if days > _MAX_DAYS:
        raise TraceError(f"{path}: it spans {days:.4g} days, more than {_MAX_DAYS}: what unit has its time?")


_Parse = Callable[[bytes], TraceRequest]
"""Reads a line; raises ValueError, which says what is wrong with it."""


def _by_arrival(requests: Iterable[TraceRequest], limit: int | None) -> list[TraceRequest]:
    if limit is None:
        return sorted(requests, key=lambda each: each.arrival)
    return heapq.nsmallest(limit, requests, key=lambda each: each.arrival)  # as stable as sorted()


def _requests(path: Path, lines: Iterable[bytes], jsonl: _Jsonl) -> Iterator[TraceRequest]:
    parse: _Parse | None = None
    for number, line in enumerate(lines, 1):
        text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
        if not text:
            continue
        try:
            if parse is None:
                parse = _format_of(text, jsonl)
                if parse is not jsonl:
                    continue  # a CSV's first line is its header
            request = parse(text)
        except ValueError as error:
            raise TraceError(f"{path}: line {number}: {error}") from None
        yield request


def _format_of(first: bytes, jsonl: _Jsonl) -> _Parse:
    """Return the parser for a file with this first line; raise ValueError if there is none."""
    if first.startswith(b"{"):
        return jsonl
    columns = [name.strip() for name in first.split(b",")]
    if b"TIMESTAMP" in columns:
        return _azure(columns)
    raise ValueError(
        'neither Mooncake JSONL ({"timestamp": …, "input_length": …, "output_length": …, "hash_ids": […]}) '
        f"nor Azure CSV with the header {','.join(_AZURE_COLUMNS)}"
    )


_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Line(msgspec.Struct):
    """A line of Mooncake's traces, https://github.com/kvcache-ai/Mooncake (FAST25-release/traces).

    ``timestamp`` is in milliseconds. The last five are ours: tokens that a block has if not ``BLOCK_TOKENS``,
    the conversation, the request's own id, those of the requests whose answers it needs, and the
    milliseconds between the last of these and it.
    """

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: _Count
    output_length: _Count
    hash_ids: list[int] = []
    block_size: Annotated[int, msgspec.Meta(ge=1)] = BLOCK_TOKENS
    session_id: str | int | None = None
    request_id: str | int | None = None
    after: list[str | int] = []
    delay: Annotated[float, msgspec.Meta(ge=0, le=86_400_000)] = 0.0


_decoder = msgspec.json.Decoder(_Line)


class _Jsonl:
    """Reads lines of Mooncake's format."""

    def __init__(self) -> None:
        self.block_tokens = BLOCK_TOKENS
        self._known = False

    def __call__(self, text: bytes) -> TraceRequest:
        """Return the request of a line; raise ValueError, which says what is wrong with it."""
        try:
            line = _decoder.decode(text)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"not valid JSON: {error}") from None
        if self._known and line.block_size != self.block_tokens:
            raise ValueError(f"block_size: {line.block_size}, but {self.block_tokens} before")
        size = self.block_tokens = line.block_size
        self._known = True
        full, part = divmod(line.input_length, size)
        # The last id may stand for a block that is not full. Any other count means blocks of another size.
        if line.hash_ids and not full <= len(line.hash_ids) <= full + bool(part):
            raise ValueError(
                f"hash_ids: {len(line.hash_ids)} ids, but {line.input_length} tokens are "
                f"{full + bool(part)} blocks of {size}"
            )
        return TraceRequest(
            line.timestamp / 1000,
            max(1, line.input_length),
            max(1, line.output_length),
            prefixes(line.hash_ids[:full]),
            None if line.session_id is None else str(line.session_id),
            "" if line.request_id is None else str(line.request_id),
            tuple(map(str, line.after)),
            line.delay / 1000,
        )


def prefixes(hash_ids: Sequence[int], scope: int = 0) -> tuple[int, ...]:
    """Return a number for each block that names the whole prompt up to its end, as vLLM's hashes do.

    Mooncake's ids do that themselves. The ids of other traces may name a block by its own content: one can
    come twice in a prompt, and behind different beginnings. Equal ids of two scopes give different numbers.
    """
    chained = accumulate(hash_ids, lambda prefix, block: hash((prefix, block)) & _NUMBER, initial=scope)
    return tuple(chained)[1:]


_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""Columns of the LLM inference traces of https://github.com/Azure/AzurePublicDataset, 2023 and 2024."""


def _azure(columns: list[bytes]) -> _Parse:
    for name in _AZURE_COLUMNS:
        if name.encode() not in columns:
            raise ValueError(f"the header has no column {name}")
    at_time, at_prompt, at_output = (columns.index(name.encode()) for name in _AZURE_COLUMNS)

    def parse(text: bytes) -> TraceRequest:
        fields = text.decode().split(",")
        if len(fields) != len(columns):
            raise ValueError(f"{len(fields)} fields, but the header has {len(columns)}")
        return TraceRequest(
            _seconds(fields[at_time].strip()),
            max(1, _count(_AZURE_COLUMNS[1], fields[at_prompt])),
            max(1, _count(_AZURE_COLUMNS[2], fields[at_output])),
        )

    return parse


def _seconds(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)  # drops digits beyond microseconds
    except ValueError:
        raise ValueError(f"TIMESTAMP: {text!r} is no date and time like 2023-11-16 18:15:46.68") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _count(name: str, text: str) -> int:
    try:
        number = int(text.replace("_", "?"))  # int() would read 1_000 as 1000
    except ValueError:
        raise ValueError(f"{name}: {text.strip()!r} is not a whole number") from None
    if number < 0:
        raise ValueError(f"{name}: must not be negative, got {number}")
    return number
