"""Finds out which requests of a trace continue which, where it does not say.

A turn of a conversation has in its prompt that of the turn before, and its answer. So the blocks that a
prompt has more than the one it continues are first those of an answer, and then those of a message.
"""

from __future__ import annotations

from dataclasses import replace

from .trace import Trace, TraceRequest


def linked(trace: Trace) -> Trace:
    """Return the trace with ``session``, ``name``, ``after`` and ``answer`` as far as prompts tell of them.

    - A request continues an earlier one if its prompt has all full blocks of that one's, and room for its
      answer. Of several it is the longest.
    - A prompt whose last full block was seen before is not one that can be continued: all prompts that share
      a beginning would seem to. Nor is one that has been continued already.
    - What the trace says itself is kept. It is taken for granted that a turn repeats the answer word by word.
    """
    before: list[int | None] = _continued(trace)
    size, requests = trace.block_tokens, trace.requests
    answers: dict[int, tuple[int, ...]] = {}
    for place, at in enumerate(before):
        if at is not None:
            earlier = requests[at]
            whole = (earlier.prompt_tokens + earlier.output_tokens) // size
            answers[at] = requests[place].blocks[len(earlier.blocks) : whole]
    sessions: list[str] = []
    told: list[TraceRequest] = []
    for place, (request, at) in enumerate(zip(requests, before, strict=True)):
        sessions.append(request.session or (str(place) if at is None else sessions[at]))
        told.append(
            replace(
                request,
                session=sessions[-1],
                name=request.name or str(place),
                after=request.after or (() if at is None else (told[at].name,)),
                answer=answers.get(place, ()),
            )
        )
    return replace(trace, requests=told)


def _continued(trace: Trace) -> list[int | None]:
    """Return for each request the place of the one that it continues."""
    ends: dict[int, int] = {}
    """Places of the requests that can be continued, by their last full block."""
    seen: set[int] = set()
    found: list[int | None] = []
    for place, request in enumerate(trace.requests):
        found.append(_longest(trace.requests, ends, request))
        if request.blocks and request.blocks[-1] not in seen:
            ends[request.blocks[-1]] = place
        seen.update(request.blocks)
    return found


def _longest(requests: list[TraceRequest], ends: dict[int, int], request: TraceRequest) -> int | None:
    for block in reversed(request.blocks):
        place = ends.get(block)
        if place is None:
            continue
        earlier = requests[place]
        if earlier.prompt_tokens + earlier.output_tokens <= request.prompt_tokens:
            del ends[block]
            return place
    return None
