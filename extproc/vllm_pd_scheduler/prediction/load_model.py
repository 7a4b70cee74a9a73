"""The load model: how long an instance would need for what, learned from how long it did need.

Pure: every time comes as an argument, in seconds of the caller's monotonic clock.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from .regression import OUTLIER, OnlineRegression

_PREFILL_PRIOR = (0.02, 1e-4, 0.0)
"""Until something was measured: 20 ms a request and 10,000 tokens/s, the order of a 70B model on 4 GPUs."""
_PREFILL_SCALE = (10.0, 1024.0, 1024.0 * 16384.0)
"""The first is large so that the time of prompts that are all alike is put down to their tokens, not to what
any prompt costs."""
_DECODE_PRIOR = (0.02, 2e-4, 1e-8)
_DECODE_SCALE = (1.0, 32.0, 262144.0)

_TOGETHER = 8
"""Prefills that are learned from together, at most."""
_SHORT_S = 0.02
"""Seconds that are not enough to learn from."""

_RECENT = 0.1
"""Weight of the newest sample in running means."""

BYTES_PER_TOKEN = 4.0
"""Of a model's prompts, until its first usage report: English text with today's vocabularies."""
OUTPUT_TOKENS = 256.0
"""Length of an answer, until the first was seen to end."""
_MAX_MODELS = 1000
_LEAST_TRANSFER = 1e-3
"""Seconds that a KV transfer is expected to take at least."""


def prefill_pairs(tokens: float, context: float) -> float:
    """Pairs of (token, token it attends to) of ``tokens`` new tokens at the end of ``context`` tokens."""
    return tokens * (context - tokens / 2)


def _near(value: float, expected: float) -> float:
    """Return ``value``, or how far it can be believed beside what was expected."""
    return min(max(value, expected / OUTLIER), expected * OUTLIER)


class PrefillLoad:
    """What is queued for prefill on one instance, in predicted seconds, first come first served.

    seconds(request) = ``overhead`` + ``per_token`` * uncached tokens + ``per_pair`` * attended pairs;
    the last term is attention, which grows with the square of a prompt. vLLM computes prompts in the order
    in which they came, so what is ``left`` when a request arrives is its wait.
    """

    __slots__ = (
        "_group", "_pending", "fit", "head_at", "head_cost", "overhead", "per_pair", "per_token", "queued",
        "trust",
    )  # fmt: skip

    def __init__(self, prior: OnlineRegression) -> None:
        self.fit = OnlineRegression(prior.coefficients, _PREFILL_SCALE)
        self.overhead, self.per_token, self.per_pair = prior.coefficients
        self.trust = 1.0
        """Share of the prompt tokens we take for cached there that are: 0 without prefix caching."""
        self._pending: dict[Hashable, float] = {}
        self._group = [0.0, 0.0, 0.0, 0.0]
        """Requests, tokens, attended pairs and seconds that were not learned from yet."""
        self.queued = 0.0
        self.head_cost = 0.0
        self.head_at = 0.0

    def cost(self, tokens: float, context: float) -> float:
        """Seconds for a request of ``context`` prompt tokens of which ``tokens`` are not cached."""
        return self.overhead + self.per_token * tokens + self.per_pair * prefill_pairs(tokens, context)

    def left(self, now: float) -> float:
        """Seconds until what is queued is done; a first one that takes too long counts as done."""
        return max(0.0, self.queued - min(self.head_cost, max(0.0, now - self.head_at)))

    def begin(self, key: Hashable, cost: float, now: float) -> None:
        """Count a request of so many seconds."""
        if not self._pending:
            self.head_cost, self.head_at = cost, now
        self._pending[key] = cost
        self.queued += cost

    def end(self, key: Hashable, now: float) -> float | None:
        """Take out what the instance has done; return the seconds that it took; ``None``: it was not in.

        They count from when the one before was done, or from ``begin`` if there was none.
        """
        if key not in self._pending:
            return None
        spent = max(0.0, now - self.head_at)
        self._remove(key)
        self._begin_next(now)
        return spent

    def cancel(self, key: Hashable, now: float) -> None:
        """Take out what was given up: if the instance was at it, it begins the next one."""
        if key in self._pending:
            first = next(iter(self._pending))
            self._remove(key)
            if first == key:
                self._begin_next(now)

    def _remove(self, key: Hashable) -> None:
        cost = self._pending.pop(key)
        self.queued = self.queued - cost if self._pending else 0.0

    def _begin_next(self, now: float) -> None:
        self.head_at, self.head_cost = now, next(iter(self._pending.values()), 0.0)

    def learn(self, tokens: int, context: int, seconds: float, fleet: OnlineRegression) -> None:
        """Take how long a request of so many uncached of ``context`` tokens took, queueing not counted.

        Requests that follow each other can share a step of the engine, and both end with it: which of them
        took how long cannot be known, but how long they took together. So they are learned from together,
        as far as the queue was not empty in between, and eight at most. So are very short ones, since there
        can be thousands a second.
        """
        mine = (1.0, float(tokens), prefill_pairs(tokens, context), seconds)
        self._group = [sum(pair) for pair in zip(self._group, mine, strict=True)]
        if self._group[0] < _TOGETHER and (self._pending or self._group[3] < _SHORT_S):
            return
        *x, seconds = self._group
        self._group = [0.0, 0.0, 0.0, 0.0]
        fleet.learn(x, seconds, _PREFILL_PRIOR)
        self.fit.learn(x, seconds, fleet.coefficients)
        self.overhead, self.per_token, self.per_pair = self.fit.coefficients

    def follow(self, fleet: OnlineRegression) -> None:
        """Take over what the fleet has learned, as long as nothing was measured here."""
        self.overhead, self.per_token, self.per_pair = fleet.coefficients

    def believed(self, tokens: float, found: float) -> None:
        """Take how many of the tokens that we took for cached there were."""
        if tokens > 0:
            self.trust += _RECENT * (min(1.0, found / tokens) - self.trust)

    def restarted(self) -> None:
        """Forget what was queued; what the hardware can do stays known."""
        self._pending.clear()
        self._group = [0.0, 0.0, 0.0, 0.0]
        self.queued = self.head_cost = 0.0
        self.trust = 1.0


class DecodeLoad:
    """How long one decode step takes: ``base`` + ``per_seq`` * batch + ``per_kv_token`` * KV tokens."""

    __slots__ = ("base", "fit", "per_kv_token", "per_seq")

    def __init__(self, prior: OnlineRegression) -> None:
        self.fit = OnlineRegression(prior.coefficients, _DECODE_SCALE, forget=0.95)
        self.base, self.per_seq, self.per_kv_token = prior.coefficients

    def step(self, batch: float, kv_tokens: float) -> float:
        """Seconds of a step, which is the time per output token of each of its requests."""
        return self.base + self.per_seq * batch + self.per_kv_token * kv_tokens

    def learn(self, batch: float, kv_tokens: float, seconds: float, fleet: OnlineRegression) -> None:
        """Take the mean time between tokens while so much was running."""
        x = (1.0, batch, kv_tokens)
        fleet.learn(x, seconds, _DECODE_PRIOR)
        self.fit.learn(x, seconds, fleet.coefficients)
        self.base, self.per_seq, self.per_kv_token = self.fit.coefficients

    def follow(self, fleet: OnlineRegression) -> None:
        """Take over what the fleet has learned, as long as nothing was measured here."""
        self.base, self.per_seq, self.per_kv_token = fleet.coefficients


@dataclass(slots=True)
class FleetLoad:
    """What is known of the fleet as a whole; a new instance starts from it.

    No sample is believed to be more than ``OUTLIER`` times what was expected, or less than that part of it.
    """

    prefill: OnlineRegression = field(
        default_factory=lambda: OnlineRegression(_PREFILL_PRIOR, _PREFILL_SCALE)
    )
    decode: OnlineRegression = field(default_factory=lambda: OnlineRegression(_DECODE_PRIOR, _DECODE_SCALE))
    output_tokens: float = OUTPUT_TOKENS
    """Mean length of an answer."""
    transfer: float = 0.02
    """Mean seconds from prefill's answer until decode has the KV cache."""
    _prompts: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Recent prompts of each model: bytes and tokens."""
    _answers: tuple[float, float] = (OUTPUT_TOKENS, 1.0)
    """Recent answers: tokens generated and requests ended."""

    def bytes_per_token(self, model: str | None) -> float:
        """Bytes of prompt that make one token of a model, on average over recent tokens."""
        size, tokens = self._prompts.get(model or "", (BYTES_PER_TOKEN, 1.0))
        return size / tokens

    def learn_bytes(self, model: str | None, size: int, tokens: int) -> None:
        """Take the size in bytes and in tokens of a prompt that a model has read."""
        name = model or ""
        if size > 0 and tokens > 0 and (name in self._prompts or len(self._prompts) < _MAX_MODELS):
            old_size, old_tokens = self._prompts.get(name, (0.0, 0.0))
            keep = 1 - _RECENT
            believed = _near(tokens, size / self.bytes_per_token(name))
            self._prompts[name] = (keep * old_size + size, keep * old_tokens + believed)

    def learn_transfer(self, seconds: float) -> None:
        """Take the mean time of some KV transfers."""
        self.transfer += _RECENT * (_near(seconds, max(self.transfer, _LEAST_TRANSFER)) - self.transfer)

    def learn_output(self, tokens: float, requests: float) -> None:
        """Take how many tokens were generated, and how many requests ended, since the last time.

        Most tokens are those of requests that end some other time, so only the sums can be compared.
        """
        generated, ended = self._answers[0] + tokens, self._answers[1] + requests
        if requests > 0:
            self.output_tokens = _near(generated / ended, self.output_tokens)
            generated = self.output_tokens * ended
        keep = (1 - _RECENT) ** min(requests, 100.0)
        self._answers = keep * generated, keep * ended

    def ratios(self) -> dict[str, float]:
        """Bytes per token by model, a copy."""
        return {model: self.bytes_per_token(model) for model in self._prompts}
