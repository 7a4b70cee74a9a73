"""What follows from the replays of several fleets: which instance to move, if any, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from ..models import InstanceRole
from .observation import Observation
from .question import Answer, Outcome, Size, Times

WORTH = 0.1
"""Share by which p90 TTFT times p90 TPOT must fall for a move to be worth it: a choice. The replay is no
more exact, and a move costs the requests that a drain holds up."""
WORTH_IN_LIMITS = 0.01
"""Share of the requests that must come within the limits, where there are limits."""
LATEST = 0.5
"""Share of that which the later half of the requests must show too: else the load is changing."""
_SATURATED = 0.95
"""Share of the time in which P compute, or of the KV caches of D, from which on a role has no room."""


class Kind(StrEnum):
    """What is advised."""

    MOVE = "move"
    """Give an instance the other role."""
    KEEP = "keep"
    """Nothing."""
    UNKNOWN = "unknown"
    """Nothing can be said."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What is advised, and why. Times are in seconds."""

    kind: Kind
    text: str
    """In a line, for people."""
    why: list[str] = field(default_factory=list)
    observation: Observation | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    """Of each fleet that was replayed, the present one first."""
    move: Outcome | None = None
    """That of the fleet after the move."""
    gain: float = 0.0
    """What the move promises, in multiples of what makes one worth it."""

    @property
    def from_role(self) -> InstanceRole | None:
        """Of which role an instance is to be moved; ``None`` without a move."""
        if self.move is None or self.observation is None:
            return None
        fewer_prefill = self.move.size.prefill < self.observation.size.prefill
        return InstanceRole.PREFILL if fewer_prefill else InstanceRole.DECODE


def judge(observation: Observation, answer: Answer) -> Advice:
    """Return the advice that follows from the outcomes."""
    now, *others = answer.outcomes
    steps = _one_move(observation.question.sizes, now.size, others)
    limited = any(observation.question.settings.get(key) for key in ("ttft_slo", "tpot_slo"))
    gains = {each.size: gain(now.whole, each.whole, limited) for each in others}
    best = max(steps, key=lambda each: gains[each.size], default=None)
    why = list(_reasons(observation, answer))
    kind, move = Kind.KEEP, None
    if best is None:
        text = "keep the roles: no instance can be moved, since each role needs one"
        if any(_is_moved(each, now.size) for each in observation.question.sizes):
            kind, text = Kind.UNKNOWN, "there was not enough time to replay another fleet"
    elif gains[best.size] < 1.0:
        text = (
            f"keep {_named(now.size)}: no move makes p90 TTFT and TPOT better by {_percent(WORTH)} together"
        )
        if limited:
            more = f"{_percent(WORTH_IN_LIMITS)} more of the requests"
            text = f"keep {_named(now.size)}: no move brings {more} within the limits"
    elif gain(now.latest, best.latest, limited) < LATEST:
        text = f"keep {_named(now.size)}: the load is changing, and its later half does not ask for a move"
    else:
        kind, move = Kind.MOVE, best
        text = f"move one {_from_to(now.size, best.size)}: {_changes(now.whole, best.whole)} at this load"
    asked = next((each for each in others if each.size == observation.asked), None)
    if asked is not None:
        why.append(f"{_named(asked.size)}: {_changes(now.whole, asked.whole)}")
    if move is not None:
        why.append(f"after it, {_busy(move)}")
        moved = (each for each in others if _is_moved(each.size, now.size))
        further = max(moved, key=lambda each: gains[each.size])
        if further.size not in {each.size for each in steps} and gains[further.size] > gains[move.size] + 1:
            why.append(f"{_named(further.size)} would be better still: ask again after this move")
    gained = gains[move.size] if move is not None else 0.0
    return Advice(kind, text, why, observation, answer.outcomes, move, gained)


def gain(now: Times, then: Times, limited: bool) -> float:
    """Return by how much other times are better: from 1 on they are worth a move.

    Where there are limits, it is the requests within them that count, and the times only among fleets in
    which as many are. All within the limits is good enough.
    """
    if limited:
        missed, more = 1.0 - now.in_limits, then.in_limits - now.in_limits
        if missed < WORTH_IN_LIMITS or abs(more) >= WORTH_IN_LIMITS:
            return more / WORTH_IN_LIMITS
    pairs = ((now.ttft, then.ttft), (now.tpot, then.tpot))
    fall = math.fsum(math.log(old / new) for old, new in pairs if old and new)
    return fall / -math.log(1.0 - WORTH)


def _one_move(sizes: Sequence[Size], now: Size, others: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes of the fleets with one instance moved: the nearest in each direction."""
    found = []
    for sign in (-1, 1):
        moved = [each for each in sizes if _is_moved(each, now) and sign * (each.prefill - now.prefill) > 0]
        nearest = min(moved, key=lambda each: abs(each.prefill - now.prefill), default=None)
        found += [each for each in others if each.size == nearest]
    return found


def _is_moved(size: Size, now: Size) -> bool:
    """Whether a fleet is another one of as many engines."""
    return size != now and size.prefill + size.decode == now.prefill + now.decode


def _reasons(observation: Observation, answer: Answer) -> Iterator[str]:
    now, question = answer.outcomes[0], observation.question
    learned, prompt = question.learned, observation.prompt_tokens
    yield (
        f"{len(observation.requests)} requests in {observation.seconds:.0f} s, with {prompt:.0f} tokens in "
        f"and {observation.output_tokens:.0f} out on average"
    )
    if question.rate > 1.0:
        yield f"the instances have served {question.rate:.1f} times as many: other schedulers send them too"
    prefill = learned.overhead + learned.per_token * prompt + learned.per_pair * prompt * prompt / 2
    step = learned.base + learned.per_seq * 32 + learned.per_kv_token * 32 * prompt
    yield (
        f"a prefill of {prompt:.0f} tokens takes {prefill:.3g} s on a P if nothing is cached, and a step of "
        f"32 such requests {step * 1000:.3g} ms on a D"
    )
    yield f"now {_busy(now)}"
    for role, share in (("P", now.prefill_busy), ("D", now.decode_kv)):
        if share >= _SATURATED:
            yield f"{role} have no room: what waits for them grows as long as this load lasts"
    if observation.ttft is not None and now.whole.ttft is not None:
        yield (
            f"clients saw a p90 TTFT of {observation.ttft:.3g} s, the model says {now.whole.ttft:.3g} s: "
            "the nearer they are, the better it fits"
        )
    if answer.skipped_seconds:
        yield f"the first {answer.skipped_seconds:.0f} s were left out, since a replay of all takes too long"


def _busy(outcome: Outcome) -> str:
    prefill, decode = _percent(outcome.prefill_busy), _percent(outcome.decode_kv)
    return f"P compute {prefill} of the time, and the KV caches of D are {decode} full"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _named(size: Size) -> str:
    return f"{size.prefill} P + {size.decode} D"


def _from_to(now: Size, then: Size) -> str:
    return "P to D" if then.prefill < now.prefill else "D to P"


def _changes(now: Times, then: Times) -> str:
    parts = []
    for name, old, new in (("p90 TTFT", now.ttft, then.ttft), ("p90 TPOT", now.tpot, then.tpot)):
        if old and new:
            parts.append(f"{100 * (new / old - 1):+.0f} % {name}")
    if abs(more := 100 * (then.in_limits - now.in_limits)) >= 0.1:
        parts.append(f"{more:+.1f} % of the requests within the limits")
    return ", ".join(parts)
