"""Requests as a trace for ``replay``: when they came, how long they were, which prefixes they share. No text.

A line is one of Mooncake's (https://github.com/kvcache-ai/Mooncake, FAST25-release/traces): ``timestamp`` in
milliseconds, ``input_length`` and ``output_length`` in tokens, and ``hash_ids``, one for each block of
:data:`BLOCK_TOKENS`, which stands for the prompt up to the block's end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

import msgspec

from ..request.context import RequestContext
from .traffic import Recorded, Traffic

BLOCK_TOKENS = 512
"""Tokens that one of Mooncake's ``hash_ids`` stands for."""

MAX_LINES = 4096
"""Lines that are kept for readers: a choice. Some seconds of a busy scheduler."""

_ID_MASK = (1 << 60) - 1
_PRIOR_ANSWERS = 8.0
"""How many answers of an ordinary size are taken for seen, before the first."""
_PRIOR_BYTES = {True: 220.0, False: 5.0}
"""Bytes of an answer for each token, with and without ``stream``, as vLLM writes them."""
_MAX_ANSWERS = 200.0
"""About how many of the last answers the mean size is of."""


class Line(msgspec.Struct):
    """One request of the trace."""

    timestamp: int
    input_length: int
    output_length: int
    hash_ids: list[int]


class Prompt(Protocol):
    """What is known of a prompt's blocks."""

    @property
    def blocks(self) -> Sequence[int]:
        """Hashes of its leading blocks."""
        ...

    @property
    def block_tokens(self) -> float:
        """Tokens of each of them."""
        ...

    @property
    def fingerprint(self) -> int:
        """By which the same prompt is known again."""
        ...


class Recording:
    """Keeps the newest requests, and makes lines of those whose answers have ended while somebody reads.

    ``clock`` returns the monotonic seconds that requests have, ``wall_clock`` Unix seconds. ``output_tokens``
    returns how many tokens the fleet's answers have on average, ``finished`` how many requests have ended on
    its D.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        output_tokens: Callable[[], float],
        finished: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.traffic = Traffic()
        self.ended = 0
        """Requests whose answers have ended well."""
        self._finished = finished
        self._clock = clock
        self._wall_clock = wall_clock
        self._sizes = {stream: _AnswerSize(stream, output_tokens) for stream in (True, False)}
        self._readers: set[Callable[[], None]] = set()
        self._lines: deque[bytes] = deque(maxlen=MAX_LINES)
        self.newest = 0
        """The number of the last line; 0 before the first."""

    @property
    def readers(self) -> int:
        """How many read. Without any, no lines are made."""
        return len(self._readers)

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Have ``listener`` called at each new line; return what ends that."""

        def new_line() -> None:  # one that is like no other, should a listener come twice
            listener()

        self._readers.add(new_line)
        return lambda: self._readers.discard(new_line)

    def after(self, number: int, count: int) -> list[bytes] | None:
        """Return up to ``count`` lines after the one with a number; ``None`` if some are lost by now."""
        forgotten = self.newest - len(self._lines)
        if number < forgotten:
            return None
        return list(islice(self._lines, number - forgotten, number - forgotten + count))

    def begin(self, context: RequestContext) -> Recorded:
        """Return what is kept of a request that is sent to D."""
        request = Recorded(
            context.arrived,
            max(1.0, context.prompt_tokens),
            context.stream,
            context.blocks,
            context.block_tokens,
            context.fingerprint,
            self._finished(),
            self.ended,
            read=bool(self._readers),
        )
        self.traffic.add(request)
        return request

    def answered(self, request: Recorded, answer_bytes: int, ttft: float | None = None) -> int:
        """Note that a request's answer has ended, and write its line for those who read since it was sent.

        Return the tokens that the answer is taken to have.
        """
        tokens = self._sizes[request.stream].tokens(answer_bytes)
        request.output_tokens, request.ttft = tokens, ttft
        self.ended += 1
        if not (self._readers and request.read):
            return tokens
        began = self._wall_clock() - self._clock() + request.arrived
        prompt = int(request.prompt_tokens)
        line = Line(round(began * 1000), prompt, tokens, hash_ids(request, prompt))
        self._lines.append(msgspec.json.encode(line))
        self.newest += 1
        for new_line in tuple(self._readers):
            new_line()
        return tokens


class _AnswerSize:
    """Estimates the tokens of an answer by its bytes, since no token passes through here.

    The mean answer has the mean tokens, which the instances count.
    """

    def __init__(self, stream: bool, output_tokens: Callable[[], float]) -> None:
        self._output_tokens = output_tokens
        self._per_token = _PRIOR_BYTES[stream]
        self._bytes = 0.0
        self._answers = 0.0

    def tokens(self, answer_bytes: int) -> int:
        """Return the tokens of an answer, and learn from its size."""
        self._bytes += answer_bytes
        self._answers += 1.0
        if self._answers > _MAX_ANSWERS:
            self._bytes /= 2.0
            self._answers /= 2.0
        mean_tokens = self._output_tokens()
        mean_bytes = self._bytes + _PRIOR_ANSWERS * self._per_token * mean_tokens
        mean_bytes /= self._answers + _PRIOR_ANSWERS
        return max(1, round(answer_bytes * mean_tokens / mean_bytes))


def hash_ids(prompt: Prompt, tokens: int) -> list[int]:
    """Return an id for each whole block of :data:`BLOCK_TOKENS` of a prompt.

    Our blocks have another size. An id is that of the first of ours that ends where Mooncake's block does, or
    later. Behind the last one of ours it is the prompt's own, so that nothing seems to be shared that is not.
    """
    ours, size = prompt.blocks, prompt.block_tokens
    ids = []
    for number in range(1, tokens // BLOCK_TOKENS + 1):
        at = math.ceil(number * BLOCK_TOKENS / size) - 1 if size else len(ours)
        ids.append(ours[at] if at < len(ours) else hash((prompt.fingerprint, number)) & _ID_MASK)
    return ids
