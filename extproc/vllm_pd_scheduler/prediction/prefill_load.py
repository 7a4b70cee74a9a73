"""The prefills of one instance: what is queued there, and how long each takes, learned from those that ended.

It does no I/O and reads no clock: every time is an argument, in seconds of the caller's monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

from .read_only import ReadOnly, set_own
from .regression import PRIOR_WEIGHT, OnlineRegression

PREFILL_PRIOR = (0.02, 1e-4, 3e-9)
"""Prefill before anything was measured: 20 ms, and 10,000 tokens/s, the order of a 70B model on 4 GPUs.

Seconds for each prefill, each token and each attended pair. A pair takes a 33,000th of a token; by models'
shapes it is a 7,000th (DeepSeek-V3) to a 54,000th (Llama 70B). Without it short prompts
alone would say that one of 100,000 tokens takes a fifth of what it does, and several would queue on one P.
"""
PREFILL_SCALE = (10.0, 1024.0, 1024.0 * 16384.0)
"""Typical values of a prefill's features, by which the regression divides them.

The last two are those of 1,024 new tokens in a context of 16,384. The first feature is always 1, and dividing
it by 10 makes it small, so that the prior holds its coefficient in place more than the others: while all
prompts are alike, their time is put down to their tokens, not to a fixed cost.
"""
_HELD_TO_FLEET = (PRIOR_WEIGHT, 0.1, 0.1)
"""Weight of the fleet's coefficients in the fit of one P.

Ten times what is usual for tokens and pairs: its first prefills are short, and of prompts of 100,000 tokens
the fleet knows more. Not for what each prefill costs: by that a slower P is known when prompts are short.
"""

_MAX_GROUP = 8
"""Prefills that are learned from together, at most: a choice, so that a busy instance is learned from too."""
_SEVERAL_STEPS = 32_768
"""Tokens of a group in which it hardly matters who has shared a step with whom: vLLM computes 8,192 in one at
most, if it is not told otherwise."""
_SURPRISING = 1.5
"""Factor by which the time of so many tokens must differ from what was predicted, to be learned from at once:
a choice. An instance that is taken for too fast gets all long prompts, and eight of them take minutes."""
_MIN_GROUP_S = 0.02
"""Seconds that a group must have taken before it is learned from.

It bounds the cost of learning: thousands of very short prefills can end in a second.
"""

_TAKEN_FOR_DONE = 2.0
"""Factor by which the time of several prefills may differ from what was predicted of them, so that all are
taken for done when the last one is: a choice. Where it differs more, one may have overtaken the others."""
_RECENT = 0.1
"""Weight of the newest sample in a running mean: a choice, some ten samples count."""


def prefill_pairs(tokens: float, context: float) -> float:
    """Return the pairs of a new token and a token it attends to, a measure of the cost of attention.

    The prompt has ``context`` tokens, of which the last ``tokens`` are new: of these the first attends to
    (context - tokens) others and the last to all, (context - tokens / 2) on average.
    """
    return tokens * (context - tokens / 2)


def _factor(one: float, other: float) -> float:
    """Return how many times the larger of two numbers is the smaller."""
    less, more = sorted((one, other))
    return more / less if less > 0.0 else math.inf


class PrefillLoad(ReadOnly):
    """The prefills that are queued on one instance, and what a prefill takes there.

    Predicted seconds of a prefill = ``overhead`` + ``per_token`` * uncached tokens + ``per_pair`` * pairs

    - *overhead*: what every prefill costs: the fixed part of an engine's step and the way there and back.
    - *uncached tokens*: tokens of the prompt that must be computed.
    - *pairs*: see :func:`prefill_pairs`; attention, which grows with the square of a prompt.

    The queue is first come, first served, as vLLM computes prompts. So :meth:`remaining` is how long a
    request that arrives now waits for its prefill to begin.
    """

    __slots__ = (
        "_done", "_group", "_pending", "_unsent", "busy", "fit", "head_at", "head_cost", "overhead",
        "per_pair", "per_token", "queued", "trust",
    )  # fmt: skip

    fit: OnlineRegression
    overhead: float
    per_token: float
    per_pair: float
    trust: float
    """Share of the tokens predicted as cached there that were; 0 for a P without prefix caching."""
    queued: float
    """Predicted seconds of all queued prefills."""
    head_cost: float
    """Predicted seconds of the prefill that runs, the first of those queued."""
    head_at: float
    """When that prefill began."""
    busy: float
    """Seconds that the prefills which were done there took, without their waits. It only grows."""
    _pending: dict[Hashable, float]
    """Predicted seconds of each queued prefill, in the order in which they run."""
    _unsent: set[Hashable]
    """Those of them that are not on their way yet."""
    _done: dict[Hashable, float]
    """The seconds of those that are taken for done, since one behind them is, and were not told yet."""
    _group: list[float]
    """Sums over the prefills that are still to be learned from: their number, tokens, pairs, seconds."""

    def __init__(self, prior: OnlineRegression) -> None:
        set_own(self, "fit", OnlineRegression(prior.coefficients, PREFILL_SCALE, hold=_HELD_TO_FLEET))
        self._use(prior.coefficients)
        set_own(self, "_pending", {})
        set_own(self, "_unsent", set())
        set_own(self, "_done", {})
        set_own(self, "head_at", 0.0)
        set_own(self, "busy", 0.0)
        self.reset()

    def cost(self, tokens: float, context: float) -> float:
        """Return the predicted seconds of a prefill of ``context`` tokens, ``tokens`` of them not cached."""
        return self.overhead + self.per_token * tokens + self.per_pair * prefill_pairs(tokens, context)

    def remaining(self, now: float) -> float:
        """Return the predicted seconds until all queued prefills are done.

        A prefill that takes longer than predicted counts as about to end.
        """
        return max(0.0, self.queued - min(self.head_cost, max(0.0, now - self.head_at)))

    def enqueue(self, key: Hashable, cost: float, now: float, *, is_sent: bool = True) -> None:
        """Add a prefill of ``cost`` predicted seconds to the queue; ``key`` names it from now on.

        One that is not on its way yet is told of with :meth:`sent`.
        """
        if not self._pending:
            set_own(self, "head_cost", cost)
            set_own(self, "head_at", now)
        self._pending[key] = cost
        set_own(self, "queued", self.queued + cost)
        if not is_sent:
            self._unsent.add(key)

    def sent(self, key: Hashable, now: float) -> None:
        """Note that a prefill which was queued is on its way only now: if it is the first, it begins now."""
        self._unsent.discard(key)
        if self._pending and next(iter(self._pending)) == key:
            set_own(self, "head_at", now)

    @property
    def pending(self) -> Iterable[Hashable]:
        """The names of the queued prefills."""
        return self._pending.keys()

    def recost(self, key: Hashable, cost: float) -> None:
        """Change the predicted seconds of a prefill that is queued; no more than that if it is not."""
        if key not in self._pending:
            return
        if next(iter(self._pending)) == key:
            set_own(self, "head_cost", cost)
        set_own(self, "queued", self.queued - self._pending[key] + cost)
        self._pending[key] = cost

    def complete(self, key: Hashable, now: float) -> float | None:
        """Remove a prefill that the instance has done; return the seconds it took, without its wait.

        They count from the end of the prefill before it, or from ``enqueue`` if the queue was empty. Return
        ``None`` if it is not in the queue.

        The ends of other replicas' prefills are told late, and so may those of one step of the engine be. So
        if the time is rather that of this one and of those before it, these are taken for done too, and each
        has taken its part of the time.
        """
        if (known := self._done.pop(key, None)) is not None:
            return known
        if key not in self._pending:
            return None
        spent = max(0.0, now - self.head_at)
        done = self._done_by(key, spent)
        total = sum(self._pending[each] for each in done)
        for each in done:
            self._done[each] = spent * self._pending[each] / total if total > 0.0 else spent / len(done)
            self._remove(each)
        self._begin_next(now)
        return self._done.pop(key)

    def _done_by(self, key: Hashable, spent: float) -> list[Hashable]:
        """Return which prefills were done in the last seconds: ``key``, and so many of those before it that
        what was predicted of them all is nearest to these seconds, by factors."""
        total, before, found = self._pending[key], list[Hashable](), 0
        nearest = _factor(spent, total)
        for other, cost in self._pending.items():
            if other == key:
                break
            if other in self._unsent:
                continue
            before.append(other)
            total += cost
            factor = _factor(spent, total)
            if factor < nearest and factor <= _TAKEN_FOR_DONE:
                nearest, found = factor, len(before)
        return [*before[:found], key]

    def computed(self, seconds: float) -> None:
        """Count the seconds of a prefill that was done."""
        set_own(self, "busy", self.busy + seconds)

    def cancel(self, key: Hashable, now: float) -> None:
        """Remove a prefill that was given up. If it was the one that runs, the next one begins now."""
        self._done.pop(key, None)
        if key in self._pending:
            first = next(iter(self._pending))
            self._remove(key)
            if first == key:
                self._begin_next(now)

    def _remove(self, key: Hashable) -> None:
        self._unsent.discard(key)
        cost = self._pending.pop(key)
        set_own(self, "queued", self.queued - cost if self._pending else 0.0)

    def _begin_next(self, now: float) -> None:
        set_own(self, "head_at", now)
        set_own(self, "head_cost", next(iter(self._pending.values()), 0.0))

    def learn(self, tokens: int, context: int, seconds: float, fleet: OnlineRegression) -> None:
        """Learn from a prefill of ``context`` tokens, ``tokens`` of them not cached, that took ``seconds``.

        Waiting does not count as part of it. ``fleet`` learns too, and supplies what this instance's samples
        leave open.

        Prefills that share a step of the engine end together, so only the time of all of them can be known.
        One by one they would look like a slow and an instant one. So prefills that follow each other without
        a pause are learned from as one sample, up to ``_MAX_GROUP`` of them, or fewer if they show that
        predictions are wrong.
        """
        group = self._group  # added up by hand: it is done for each prefill of each replica
        group[0] += 1.0
        group[1] += tokens
        group[2] += prefill_pairs(tokens, context)
        group[3] += seconds
        *x, seconds = group
        if not self._must_learn(x, seconds) and (self._pending or seconds < _MIN_GROUP_S):
            return
        group[:] = [0.0, 0.0, 0.0, 0.0]
        fleet.learn(x, seconds)
        self.fit.learn(x, seconds, fleet.coefficients)
        self._use(self.fit.coefficients)

    def _must_learn(self, x: Sequence[float], seconds: float) -> bool:
        """Whether a group is learned from though more may belong to it."""
        prefills, tokens, _ = x
        if prefills >= _MAX_GROUP:
            return True
        return tokens >= _SEVERAL_STEPS and _factor(seconds, self.fit.predict(x)) > _SURPRISING

    def refit(self, fleet: OnlineRegression) -> None:
        """Use what the fleet has learned since this instance's last sample, where its own say nothing."""
        self.fit.refit(fleet.coefficients)
        self._use(self.fit.coefficients)

    def adopt(self, fleet: OnlineRegression) -> None:
        """Use the fleet's coefficients. For an instance of which nothing was measured yet."""
        self.fit.adopt(fleet.coefficients)  # its first samples are compared with these
        self._use(fleet.coefficients)

    def _use(self, coefficients: tuple[float, ...]) -> None:
        for name, value in zip(("overhead", "per_token", "per_pair"), coefficients, strict=True):
            set_own(self, name, value)

    def learn_cached(self, predicted: float, actual: float) -> None:
        """Correct ``trust`` by a prefill for which so many tokens were predicted as cached, and were."""
        if predicted > 0:
            set_own(self, "trust", self.trust + _RECENT * (min(1.0, actual / predicted) - self.trust))

    def reset(self) -> None:
        """Forget the queue, since the instance was restarted; what its hardware can do stays known."""
        for known in (self._pending, self._unsent, self._done):
            known.clear()
        set_own(self, "_group", [0.0, 0.0, 0.0, 0.0])
        set_own(self, "queued", 0.0)
        set_own(self, "head_cost", 0.0)
        set_own(self, "trust", 1.0)
