"""The load model: predicts how long prefills and decode steps take, learned from how long they took.

It does no I/O and reads no clock: every time is an argument, in seconds of the caller's monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from .read_only import ReadOnly, set_own
from .regression import MAX_SURPRISE, PRIOR_WEIGHT, OnlineRegression
from .transfer_rates import TransferRates

_PREFILL_PRIOR = (0.02, 1e-4, 3e-9)
"""Prefill before anything was measured: 20 ms, and 10,000 tokens/s, the order of a 70B model on 4 GPUs.

Seconds for each prefill, each token and each attended pair. A pair takes a 33,000th of a token; by models'
shapes it is a 7,000th (DeepSeek-V3) to a 54,000th (Llama 70B). Without it short prompts
alone would say that one of 100,000 tokens takes a fifth of what it does, and several would queue on one P.
"""
_PREFILL_SCALE = (10.0, 1024.0, 1024.0 * 16384.0)
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
_PULL_PRIOR = (0.02, 2e-5)
"""A pull of cached tokens by P from another instance before one was measured: 20 ms, and 20 µs a token.

That is 6.5 GB/s for the 131 kB that a token of an 8B model has: from memory to memory over one port of a
network of 100 Gb/s, half used.
"""
_PULL_SCALE = (1.0, 4096.0)
_DECODE_PRIOR = (0.02, 2e-4, 1e-8)
"""A decode step before anything was measured: 20 ms, 0.2 ms a request, 10 ns a KV token (a choice)."""
_DECODE_SCALE = (1.0, 32.0, 262144.0)
"""Typical values of a step's features: 32 requests with 8,192 tokens each."""
_DECODE_FORGET = 0.95
"""A sample is one scrape, the mean of many steps, so fewer are enough: some 20 scrapes count."""

_MAX_GROUP = 8
"""Prefills that are learned from together, at most: a choice, so that a busy instance is learned from too."""
_MIN_GROUP_S = 0.02
"""Seconds that a group must have taken before it is learned from.

It bounds the cost of learning: thousands of very short prefills can end in a second.
"""

_TAKEN_FOR_DONE = 2.0
"""Factor by which the time of several prefills may differ from what was predicted of them, so that all are
taken for done when the last one is: a choice. Where it differs more, one may have overtaken the others."""
_RECENT = 0.1
"""Weight of the newest sample in running means: a choice, some ten samples count."""

BYTES_PER_TOKEN = 4.0
"""Bytes of prompt for each token until a model's first ``usage``: English text with today's vocabularies."""
OUTPUT_TOKENS = 256.0
"""Tokens of an answer until the first one has ended: a choice."""
_MAX_MODELS = 1000
"""Models whose bytes per token are kept. Clients choose the name of the model, so it must be bounded."""
_LEAST_TRANSFER = 1e-3
"""Seconds that a KV transfer is expected to take at least."""


def prefill_pairs(tokens: float, context: float) -> float:
    """Return the pairs of a new token and a token it attends to, a measure of the cost of attention.

    The prompt has ``context`` tokens, of which the last ``tokens`` are new: of these the first attends to
    (context - tokens) others and the last to all, (context - tokens / 2) on average.
    """
    return tokens * (context - tokens / 2)


def _bounded(value: float, expected: float, times: float = MAX_SURPRISE) -> float:
    """Return ``value``, or the nearest to it that is believed where ``expected`` was predicted."""
    return min(max(value, expected / times), expected * times)


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
        set_own(self, "fit", OnlineRegression(prior.coefficients, _PREFILL_SCALE, hold=_HELD_TO_FLEET))
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
        a pause are learned from as one sample, up to ``_MAX_GROUP`` of them.
        """
        sample = (1.0, float(tokens), prefill_pairs(tokens, context), seconds)
        self._group[:] = [sum(pair) for pair in zip(self._group, sample, strict=True)]
        if self._group[0] < _MAX_GROUP and (self._pending or self._group[3] < _MIN_GROUP_S):
            return
        *x, seconds = self._group
        self._group[:] = [0.0, 0.0, 0.0, 0.0]
        fleet.learn(x, seconds)
        self.fit.learn(x, seconds, fleet.coefficients)
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


class DecodeLoad(ReadOnly):
    """What a decode step takes on one instance.

    Predicted seconds of a step = ``base`` + ``per_seq`` * batch + ``per_kv_token`` * KV tokens

    - *base*: reading the model's weights, and the fixed part of a step.
    - *batch*: requests that decode together.
    - *KV tokens*: length of all their contexts together, which attention reads.
    """

    __slots__ = ("base", "fit", "per_kv_token", "per_seq")

    fit: OnlineRegression
    base: float
    per_seq: float
    per_kv_token: float

    def __init__(self, prior: OnlineRegression) -> None:
        set_own(self, "fit", OnlineRegression(prior.coefficients, _DECODE_SCALE, forget=_DECODE_FORGET))
        self._use(prior.coefficients)

    def step(self, batch: float, kv_tokens: float) -> float:
        """Return the predicted seconds of a step, which is the time per output token of its requests."""
        return self.base + self.per_seq * batch + self.per_kv_token * kv_tokens

    def learn(self, batch: float, kv_tokens: float, seconds: float, fleet: OnlineRegression) -> None:
        """Learn from the mean seconds between two tokens while so much was running; ``fleet`` learns too."""
        x = (1.0, batch, kv_tokens)
        fleet.learn(x, seconds)
        self.fit.learn(x, seconds, fleet.coefficients)
        self._use(self.fit.coefficients)

    def adopt(self, fleet: OnlineRegression) -> None:
        """Use the fleet's coefficients. For an instance of which nothing was measured yet."""
        self.fit.adopt(fleet.coefficients)  # its first samples are compared with these
        self._use(fleet.coefficients)

    def _use(self, coefficients: tuple[float, ...]) -> None:
        for name, value in zip(("base", "per_seq", "per_kv_token"), coefficients, strict=True):
            set_own(self, name, value)


@dataclass(slots=True)
class FleetLoad:
    """What was learned from the whole fleet. A new instance starts from it.

    A request counts as at most ``MAX_SURPRISE`` times what was predicted of it, and as at least that part.
    """

    prefill: OnlineRegression = field(
        default_factory=lambda: OnlineRegression(_PREFILL_PRIOR, _PREFILL_SCALE)
    )
    decode: OnlineRegression = field(default_factory=lambda: OnlineRegression(_DECODE_PRIOR, _DECODE_SCALE))
    pull: OnlineRegression = field(default_factory=lambda: OnlineRegression(_PULL_PRIOR, _PULL_SCALE))
    """Seconds of a pull of cached tokens, and of each token."""
    output_tokens: float = OUTPUT_TOKENS
    """Mean tokens of an answer."""
    transfer: float = 0.02
    """Mean seconds of a KV transfer from P to D. 20 ms until one was measured: a choice."""
    transfers: TransferRates = field(default_factory=TransferRates)
    """What hand-offs take by pair of P and D, as their first bytes show."""
    _prompts: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Bytes and tokens of recent prompts, by model; older ones count less."""
    _answers: tuple[float, float] = (OUTPUT_TOKENS, 1.0)
    """Tokens generated and requests ended recently; older ones count less."""

    def bytes_per_token(self, model: str | None) -> float:
        """Return the mean bytes of a token in a model's recent prompts."""
        size, tokens = self._prompts.get(model or "", (BYTES_PER_TOKEN, 1.0))
        return size / tokens

    def learn_bytes(self, model: str | None, size: int, tokens: int) -> None:
        """Learn from a prompt of ``size`` bytes in which a model has found so many tokens."""
        name = model or ""
        if size > 0 and tokens > 0 and (name in self._prompts or len(self._prompts) < _MAX_MODELS):
            old_size, old_tokens = self._prompts.get(name, (0.0, 0.0))
            keep = 1 - _RECENT
            believed = _bounded(tokens, size / self.bytes_per_token(name))
            self._prompts[name] = (keep * old_size + size, keep * old_tokens + believed)

    def handoff(self, prefill: str, decode: str, tokens: float) -> float:
        """Return predicted seconds of a hand-off of so many tokens from P to D, by their ids."""
        known = self.transfers.has_learned
        return self.transfers.predict(prefill, decode, tokens) if known else self.transfer

    def learn_transfer(self, seconds: float) -> None:
        """Learn from the mean seconds of the KV transfers between two scrapes."""
        self.transfer += _RECENT * (_bounded(seconds, max(self.transfer, _LEAST_TRANSFER)) - self.transfer)

    def pull_time(self, tokens: float) -> float:
        """Return the predicted seconds in which P pulls tokens that another instance has cached."""
        return self.pull.predict((1.0, tokens))

    def learn_pull(self, tokens: float, seconds: float) -> None:
        """Learn from a pull of so many tokens that took ``seconds``."""
        self.pull.learn((1.0, tokens), seconds)

    def learn_output(self, tokens: float, requests: float) -> None:
        """Learn from the tokens that were generated and the requests that ended between two scrapes.

        Most of these tokens belong to requests that end later. So the mean length is the quotient of the sums
        over many scrapes, not of one scrape's values.
        """
        generated, ended = self._answers[0] + tokens, self._answers[1] + requests
        count = min(requests, 100.0)
        if requests > 0:
            times = MAX_SURPRISE * max(1.0, count)
            self.output_tokens = _bounded(generated / ended, self.output_tokens, times)
            generated = self.output_tokens * ended
        keep = (1 - _RECENT) ** count
        self._answers = keep * generated, keep * ended

    def bytes_per_token_by_model(self) -> dict[str, float]:
        """Return what was learned of each model; ``""`` stands for requests that name none."""
        return {model: self.bytes_per_token(model) for model in self._prompts}
