"""How long D takes with what P hands over, learned by pair from the times to D's first byte.

It does no I/O and reads no clock. Times are in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import NamedTuple

from .regression import OnlineRegression

MAX_PAIRS = 4096
"""Pairs that are remembered, those that were used last."""
SLOW = 4.0
"""Times the fleet's time from which on a pair is slow, and stays so down to half of that.

RDMA that has fallen back to TCP takes ten times as long, or more; a busy link or another rack's twice.
"""
SLOW_SAMPLES = 8
"""Hand-offs of a pair before it can be called slow."""
SLOW_EXCESS_S = 0.02
"""Seconds of a usual hand-off that a slow pair loses at least: what is less, nobody feels."""
_PRIOR = (0.02, 1e-5)
"""A hand-off before anything was measured: 20 ms, and 10 µs a token (128 KiB at 100 Gbit/s)."""
_SCALE = (10.0, 1024.0)
_LEAST_S = 1e-3
_MOST_TOKENS = 1e8
_MAX_FACTOR = 3.0
"""Logarithm of the factor up to which a hand-off is believed to be faster, or slower, than usual: 20."""
_MAX_STEP = 1.0
"""And by which one hand-off differs from what was learned before: so a few wild ones move little."""
_SHRINK = 4.0
"""Hand-offs for which the mean of P and D counts in what is believed of a pair, and for them the fleet's."""
_FOR_MEDIAN = 512
"""Pairs of which the median is taken, those that were used last: of all it would take the event loop 8 ms."""
_LEAST_GAIN = 0.05
"""Weight of the newest hand-off: some twenty count."""
_FADE = 0.97
"""Share that is left of what is believed of an unused pair after as many hand-offs as there are pairs. So one
that is avoided, since it is slow, is tried again: at ten times the usual after some 40 times as many. It is a
choice: with less, slow pairs are tried more often."""
_MOST_GAIN = 0.5
"""Weight of a hand-off of a pair of which nothing is believed any more."""
_SETTLED = 32
"""Hand-offs from which on what is learned of the fleet follows no outlier."""


class PairRate(NamedTuple):
    """What was learned of a pair."""

    prefill: str
    decode: str
    seconds_per_token: float
    times: float
    """Times as long as the fleet's median pair."""
    samples: int
    slow: bool


class KnownRates(NamedTuple):
    """What one scheduler has learned, for another one: see :class:`TransferRates`."""

    fleet: Sequence[float]
    instances: Mapping[str, float]
    """Logarithms of their factors."""
    pairs: Mapping[tuple[str, str], float]


@dataclass(slots=True)
class _Factor:
    """By how much something differs: the logarithm of a factor, drawn to that of all (0) by few samples."""

    value: float = 0.0
    samples: int = 0

    def learn(self, sample: float, least_gain: float = _LEAST_GAIN) -> None:
        self.samples += 1
        gain = max(1.0 / (self.samples + _SHRINK), least_gain)
        self.value += gain * _within(sample - self.value, _MAX_STEP)


@dataclass(slots=True)
class _Pair(_Factor):
    slow: bool = False
    left: float = 1.0
    """Share of what was learned that has not faded."""
    last: int = 0
    """Which of the fleet's hand-offs its last one was."""

    def learn_again(self, sample: float, number: int) -> None:
        """Learn more from a sample the more has faded, which comes back if the sample is like it."""
        before = self.value
        self.learn(sample, max(_LEAST_GAIN, _MOST_GAIN * (1.0 - self.left)))
        if abs(sample) >= abs(before) / 2:
            self.left = 1.0
        self.last = number


class _Times(dict[str, float]):
    """By D, how many times as long as usual the hand-offs of a P are believed to take, to choose by."""

    def __init__(self, usual: Mapping[str, float]) -> None:
        self._usual = usual

    def __missing__(self, decode: str) -> float:
        """Return it of a pair that is not known: as of D's others."""
        return self._usual.get(decode, 1.0)


class HandOffs(NamedTuple):
    """What the hand-offs of one P take, to choose D by: (``overhead`` + ``per_token`` * tokens) * ``times``.

    Of a pair that was not used for a while less is believed, so that it is tried again some time.
    """

    overhead: float
    per_token: float
    times: Mapping[str, float]
    """By the ids of all D, whether known or not: ``get`` returns ``None`` for one that is not known."""
    usual: Mapping[str, float]
    """By the ids of D, what ``times`` has if it is not known: 1 for one that is not here either.

    For those who look at many D: ``times.get(id) or usual.get(id, 1.0)`` takes a third of ``times[id]`` then.
    """


class TransferRates:
    """Predicts the seconds from D's having a request with a hand-off to the first byte of its answer.

    seconds = (``overhead`` + ``per_token`` * transferred tokens) * factor of P * factor of D * factor of both

    The first two are the fleet's. What a decode step takes at D is not in it.
    """

    def __init__(self) -> None:
        self.on_slow: Callable[[PairRate], None] | None = None
        """Called when a pair has become slow, or is so no more."""
        self.slow: set[tuple[str, str]] = set()
        self._fleet = OnlineRegression(_PRIOR, _SCALE)
        self._instances: dict[str, _Factor] = {}
        self._pairs: dict[tuple[str, str], _Pair] = {}
        self._usual: dict[str, float] = {}
        """The factors of instances by themselves, not as logarithms: see :class:`HandOffs`."""
        self._times: dict[str, _Times] = {}
        """By P."""
        self._median = 0.0
        self._tokens = 0.0
        self._due = 0
        """After so many hand-offs the median is worked out anew."""
        self._turns: Iterator[tuple[str, str]] = iter(())
        """Pairs of which less is believed soon."""

    @property
    def samples(self) -> int:
        """Hand-offs that were learned from."""
        return self._fleet.samples

    @property
    def has_learned(self) -> bool:
        """Whether anything was learned, here or by another scheduler."""
        return bool(self._instances)

    def predict(self, prefill: str, decode: str, tokens: float) -> float:
        """Return the predicted seconds for so many tokens that D does not have."""
        return max(0.0, self._fleet.predict((1.0, tokens))) * math.exp(self._factor(prefill, decode))

    def of(self, prefill: str) -> HandOffs | None:
        """Return what the hand-offs of a P take; ``None`` if none of its was learned from."""
        times = self._times.get(prefill)
        if times is None:
            return None
        factor = math.exp(self._factor(prefill, ""))
        overhead, per_token = self._fleet.coefficients
        return HandOffs(factor * overhead, factor * per_token, times, self._usual)

    def learn(self, prefill: str, decode: str, tokens: float, seconds: float) -> None:
        """Learn from a hand-off of so many tokens that took so long."""
        if not (math.isfinite(seconds) and 1.0 <= tokens <= _MOST_TOKENS):
            return
        seconds = max(_LEAST_S, seconds)
        features = 1.0, tokens
        expected = max(_LEAST_S, self._fleet.predict(features))
        usual = seconds if self.samples < _SETTLED else min(max(seconds, expected / 2), expected * 2)
        self._fleet.learn(features, usual, _PRIOR)
        self._tokens += (tokens - self._tokens) / max(1, min(self.samples, 100))
        expected = max(_LEAST_S, self._fleet.predict(features))
        sample = _within(math.log(seconds / expected), _MAX_FACTOR)
        of_prefill, of_decode = (self._instances.setdefault(each, _Factor()) for each in (prefill, decode))
        of_prefill.learn(sample - of_decode.value)
        of_decode.learn(sample - of_prefill.value)
        self._usual[prefill], self._usual[decode] = _times(of_prefill.value), _times(of_decode.value)
        pair = self._pairs.pop((prefill, decode), None) or _Pair()
        self._pairs[prefill, decode] = pair
        pair.learn_again(sample - of_prefill.value - of_decode.value, self.samples)
        self._believe(prefill, decode, pair)
        if len(self._pairs) > MAX_PAIRS:
            self._forget_pair(next(iter(self._pairs)))
        self._judge(prefill, decode, pair)
        self._fade_next()

    def known(self, most: int) -> KnownRates:
        """Return what was learned, of so many pairs at most: those that differ most from the usual."""
        pairs = sorted(self._pairs.items(), key=lambda each: -abs(each[1].value))[:most]
        return KnownRates(
            self._fleet.coefficients,
            {name: _within(factor.value, _MAX_FACTOR) for name, factor in self._instances.items()},
            {names: _within(pair.value, _MAX_FACTOR) for names, pair in pairs},
        )

    def adopt(self, known: KnownRates) -> None:
        """Start with what another scheduler has learned, if nothing was learned here yet."""
        if self.samples or self._instances:
            return
        self._fleet.adopt(known.fleet)
        self._instances = {name: _Factor(value, 1) for name, value in known.instances.items()}
        self._usual.update((name, _times(value)) for name, value in known.instances.items())
        self._pairs = {names: _Pair(value, 1) for names, value in known.pairs.items()}
        for names, pair in self._pairs.items():
            self._believe(*names, pair)

    def forget(self, instance: str) -> None:
        """Forget all of an instance that is gone."""
        self._instances.pop(instance, None)
        self._usual.pop(instance, None)
        for pair in [each for each in self._pairs if instance in each]:
            self._forget_pair(pair)
        self._times.pop(instance, None)

    def slowest(self, count: int) -> list[PairRate]:
        """Return what was learned of the slowest pairs, those first."""
        found = [self._rate_of(*each) for each in self._pairs]
        return sorted(found, key=lambda each: -each.times)[:count]

    def _factor(self, prefill: str, decode: str) -> float:
        of, pairs = self._instances.get, self._pairs.get
        known = of(prefill), of(decode), pairs((prefill, decode))
        return _within(sum(each.value for each in known if each is not None), _MAX_FACTOR)

    def _believe(self, prefill: str, decode: str, pair: _Pair) -> None:
        """Take what is known of a pair for what a choice counts with."""
        of_decode = self._instances.get(decode)
        factor = pair.value + (of_decode.value if of_decode is not None else 0.0)
        times = self._times.setdefault(prefill, _Times(self._usual))
        times[decode] = _times(pair.left * factor)

    def _forget_pair(self, names: tuple[str, str]) -> None:
        del self._pairs[names]
        self._times[names[0]].pop(names[1], None)
        self.slow.discard(names)

    def _fade_next(self) -> None:
        """Believe less of one pair, in turn, if as many hand-offs as there are pairs were none of its own."""
        names = next(self._turns, None)
        if names is None:
            self._turns = iter(list(self._pairs))
        elif (pair := self._pairs.get(names)) is not None:
            if self.samples - pair.last > len(self._pairs):
                pair.left *= _FADE
            self._believe(*names, pair)

    def _rate_of(self, prefill: str, decode: str) -> PairRate:
        pair, factor = self._pairs[prefill, decode], self._factor(prefill, decode)
        tokens = max(1.0, self._tokens)
        per_token = self.predict(prefill, decode, tokens) / tokens
        return PairRate(prefill, decode, per_token, math.exp(factor - self._median), pair.samples, pair.slow)

    def _judge(self, prefill: str, decode: str, pair: _Pair) -> None:
        """Say whether a pair is slow, beside the median of all."""
        self._due -= 1
        if self._due <= 0:
            self._median = median(self._known()) if self._pairs else 0.0
            self._due = len(self._pairs)
        times = math.exp(self._factor(prefill, decode) - self._median)
        if pair.slow:
            slow = times >= SLOW / 2
        else:
            lost = self.predict(prefill, decode, self._tokens) * (1 - 1 / times)
            slow = (
                times >= SLOW
                and lost >= SLOW_EXCESS_S
                and pair.samples >= SLOW_SAMPLES
                and len(self._pairs) > 2  # of two, nobody knows which is slow
            )
        if slow is not pair.slow:
            pair.slow = slow
            (self.slow.add if slow else self.slow.discard)((prefill, decode))
            if self.on_slow is not None:
                self.on_slow(self._rate_of(prefill, decode))

    def _known(self) -> Iterator[float]:
        return (self._factor(*each) for each in islice(reversed(self._pairs), _FOR_MEDIAN))


def _times(logarithm: float) -> float:
    """Return a factor that is not wilder than is believed."""
    return math.exp(_within(logarithm, _MAX_FACTOR))


def _within(value: float, most: float) -> float:
    return min(max(value, -most), most)
