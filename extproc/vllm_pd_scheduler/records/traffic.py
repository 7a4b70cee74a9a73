"""The requests of the last minutes, as far as a replay needs them: times, lengths and hashes, no text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

import msgspec

MAX_AGE_S = 900.0
"""Seconds for which a request is kept: a choice. The load of longer ago says little of the load to come."""
MAX_REQUESTS = 10_000
"""Requests that are kept: a choice. A replay of so many takes some seconds."""
MAX_BLOCKS = 200_000
"""Hashes of blocks that are kept, of all requests together: some 10 MB."""


class Recorded(msgspec.Struct, gc=False):
    """What is kept of a request that was sent to D."""

    arrived: float
    """Monotonic seconds."""
    prompt_tokens: float
    stream: bool
    blocks: Sequence[int] = ()
    """Of its prompt: see :class:`~vllm_pd_scheduler.request.context.RequestContext`."""
    block_tokens: float = 0.0
    fingerprint: int = 0
    finished: float = 0.0
    """Requests that had ended on the fleet's D by then, whoever sent them."""
    ended: int = 0
    """Those of this scheduler that had ended well by then."""
    output_tokens: int = 0
    """Of its answer, estimated when that has ended; 0 until then, and if it was no success."""
    ttft: float | None = None
    """Seconds to its first token, as Envoy saw it; ``None``: not known."""
    read: bool = False
    """Whether somebody was reading a trace when it was sent."""


class Traffic:
    """The newest requests. Bounded in time, in requests, and in hashes."""

    def __init__(self) -> None:
        self._requests: deque[Recorded] = deque()
        self._blocks = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Recorded]:
        """Yield them in the order in which they were sent to D."""
        return iter(self._requests)

    def add(self, request: Recorded) -> None:
        """Keep a request, and drop what is too old or too much."""
        self._requests.append(request)
        self._blocks += len(request.blocks)
        oldest = request.arrived - MAX_AGE_S
        while (
            len(self._requests) > MAX_REQUESTS
            or self._blocks > MAX_BLOCKS
            or self._requests[0].arrived < oldest
        ):
            self._blocks -= len(self._requests.popleft().blocks)
            if not self._requests:
                break

    def since(self, time: float) -> list[Recorded]:
        """Return those that have arrived at a time or later, in the order of their arrival."""
        first = 0
        for request in reversed(self._requests):
            if request.arrived < time - MAX_AGE_S / 10:  # those that waited long are among later ones
                break
            first += 1
        found = islice(self._requests, len(self._requests) - first, None)
        return sorted((each for each in found if each.arrived >= time), key=_arrival)


def _arrival(request: Recorded) -> float:
    return request.arrived
