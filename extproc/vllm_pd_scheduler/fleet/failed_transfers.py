"""Whose hand-offs fail at a D, where only its counters tell.

vLLM begins a stream with status 200 before it fetches the blocks, and computes a prompt itself if it is told
to. Then a hand-off that fails looks like an answer. D counts the transfers that have failed, but not by P.
Over several scrapes the numbers of hand-offs from each P tell: those of whom many came when many failed, and
few when few did.
"""

from __future__ import annotations

import math

from .endpoint import Endpoint
from .pairs import Pairs

_NOISE = 2.0
"""Variance of the failures in two intervals for other reasons: accidents, and what is counted later."""
_UNKNOWN = 0.25
"""Variance of a share of which nothing is known: it may be anything from 0 to 1."""
_DRIFT = 0.002
"""And by how much that of one grows again with each scrape, so that changes are learned."""
_NOTHING = 0.05
"""The share up to which none fails."""
_MAX_PREFILLS = 64
"""P at one D that are told apart."""

_Counts = dict[Endpoint, int]


class _Shares:
    """For each P, the share of its hand-offs to a D that fails.

    A Kalman filter of: failures = Σ count * share.
    """

    def __init__(self) -> None:
        self.mean: dict[Endpoint, float] = {}
        self._covariance: dict[Endpoint, dict[Endpoint, float]] = {}

    def fails(self, prefill: Endpoint) -> bool | None:
        """Whether most hand-offs of a P fail; ``None`` while that may be or not."""
        share, doubt = self.mean[prefill], 2.0 * math.sqrt(self._covariance[prefill][prefill])
        return True if share - doubt > 0.5 else False if share + doubt < 0.5 else None

    def learn(self, counts: _Counts, failures: float) -> None:
        """Learn from the hand-offs of each P while so many transfers have failed."""
        likely = min(1.0, failures / sum(counts.values()))
        for prefill in counts:
            if prefill not in self.mean:
                self.mean[prefill], self._covariance[prefill] = likely, {prefill: _UNKNOWN}
        mean, covariance = self.mean, self._covariance
        spread = {
            p: sum(row.get(o, 0.0) * count for o, count in counts.items()) for p, row in covariance.items()
        }
        variance = _NOISE + sum(count * spread[p] for p, count in counts.items())
        error = failures - sum(count * mean[p] for p, count in counts.items())
        for prefill, of in spread.items():
            mean[prefill] = min(max(0.0, mean[prefill] + of * error / variance), 1.0)
            row = covariance[prefill]
            for other, of_other in spread.items():
                row[other] = row.get(other, 0.0) - of * of_other / variance
            row[prefill] = min(max(0.0, row[prefill]) + _DRIFT, _UNKNOWN)

    def forget_all_but(self, count: int, used: _Counts) -> None:
        """Keep so many P: those ``used`` now, then those that fail most. It takes count² steps to learn."""
        others = sorted(self.mean.keys() - used.keys(), key=self.mean.__getitem__)
        for prefill in others[: max(0, len(self.mean) - count)]:
            self.forget(prefill)

    def forget(self, prefill: Endpoint) -> None:
        """Forget what was learned of a P."""
        self.mean.pop(prefill, None)
        self._covariance.pop(prefill, None)
        for row in self._covariance.values():
            row.pop(prefill, None)


class FailedTransfers:
    """Attributes the failed transfers of each D to the P that have handed over there.

    A transfer may fail a scrape after the request was sent. So the counts are those of two intervals.
    """

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        self._handed: dict[Endpoint, tuple[_Counts, _Counts]] = {}
        """For each D, the hand-offs of each P in the interval before the last scrape, and since then."""
        self._failed: dict[Endpoint, float] = {}
        """For each D with any, the transfers that had failed at the last scrape since the one before."""
        self._shares: dict[Endpoint, _Shares] = {}
        """Of the D at which transfers fail."""

    def fail_at(self, decode: Endpoint) -> bool:
        """Whether transfers have lately failed at a D, so that an answer shows nothing of its hand-off."""
        return decode in self._shares

    def handed_over(self, prefill: Endpoint, decode: Endpoint, count: int = 1) -> bool:
        """Count hand-offs that were sent to a D; return whether that is of use.

        Without a scrape that counts failures nothing is kept.
        """
        counts = self._handed.get(decode)
        if counts is None:
            return False
        counts[1][prefill] = counts[1].get(prefill, 0) + count
        return True

    def scraped(self, decode: Endpoint, failed: float, now: float) -> None:
        """Take how many transfers have failed at a D since the scrape before."""
        before, since = self._handed.get(decode, ({}, {}))
        self._handed[decode] = since, {}
        failures = failed + self._failed.pop(decode, 0.0)
        if failed > 0.0:
            self._failed[decode] = failed
        if failures == 0.0 and decode not in self._shares:
            return
        counts = {each: before.get(each, 0) + since.get(each, 0) for each in before | since}
        counts = dict(list(counts.items())[:_MAX_PREFILLS])
        if not counts:
            return
        failures = min(failures, float(sum(counts.values())))
        shares = self._shares.setdefault(decode, _Shares())
        tried = [each for each in counts if self._pairs.on_trial(each, decode)]
        if tried:  # what fails now says nothing of the others
            explained = sum(count * shares.mean.get(each, 0.0) for each, count in counts.items())
            for prefill in tried:
                explained -= counts[prefill] * shares.mean.get(prefill, 0.0)
            for prefill in tried:
                if prefill in before:  # else its failure may not be counted yet
                    works = failures - explained < 0.5
                    self._decide(prefill, decode, works, now)
                    if works:
                        shares.forget(prefill)
            return
        shares.learn(counts, failures)
        shares.forget_all_but(_MAX_PREFILLS, counts)
        for prefill in counts:
            fails = shares.fails(prefill)
            if fails is not None and not (fails and not failures):
                self._decide(prefill, decode, not fails, now)
        if max(shares.mean.values(), default=0.0) < _NOTHING:
            del self._shares[decode]

    def _decide(self, prefill: Endpoint, decode: Endpoint, works: bool, now: float) -> None:
        if works:
            self._pairs.succeeded(prefill, decode)
        else:
            self._pairs.failed(prefill, decode, now, served=True)

    def forget(self, endpoint: Endpoint) -> None:
        """Forget all of an instance: it is gone, or it is another process."""
        for known in (self._handed, self._failed, self._shares):
            known.pop(endpoint, None)
        for shares in self._shares.values():
            shares.forget(endpoint)
        for counts in self._handed.values():
            for each in counts:
                each.pop(endpoint, None)
