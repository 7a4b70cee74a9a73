"""The load model: predicts how long decode steps and transfers take, learned from how long they took.

How long prefills take is in :mod:`.prefill_load`.

It does no I/O and reads no clock: every time is an argument, in seconds of the caller's monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .prefill_load import PREFILL_PRIOR, PREFILL_SCALE
from .read_only import ReadOnly, set_own
from .regression import MAX_SURPRISE, OnlineRegression
from .transfer_rates import TransferRates

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


def _bounded(value: float, expected: float, times: float = MAX_SURPRISE) -> float:
    """Return ``value``, or the nearest to it that is believed where ``expected`` was predicted."""
    return min(max(value, expected / times), expected * times)


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

    prefill: OnlineRegression = field(default_factory=lambda: OnlineRegression(PREFILL_PRIOR, PREFILL_SCALE))
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
