"""What is believed of what other replicas claim.

The judge is the instance. After each scrape, what all claim to have there is compared with what the instance
says that it has; what is too much is taken from the claims in proportion. Between two scrapes what is new is
believed, within bounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..fleet.endpoint import Endpoint
from ..models import InstanceRole

SLACK = 16
"""Requests that an instance may not know of: they are on their way, or their text is made tokens."""
GROWTH = 256
"""New requests of a replica on one endpoint that are believed between two scrapes."""
UNSCRAPED = 1024
"""Requests of a replica that are believed on an endpoint that was never scraped."""
LONGEST_PROMPT = 1_000_000
"""Tokens of a prompt that are believed where it is not known how many fit."""
OLD_S = 2.0
"""Seconds after which a prefill that is queued on a P is known there."""
TRIAL_S = 60.0
"""Seconds for which the trial request of another keeps ours away."""
SETTLED = 32
"""Prefills after which what another's have taken is compared with what is predicted."""
UNTAUGHT = 64
"""Prefills of another replica that are learned from beyond twice as many of our own."""
_BELIEVED_TIMES = 2.0
"""By which the seconds of its prefills, all told, may differ from those predicted here."""
_RECENT = 0.01
_FEW = 32
MESSAGES_PER_S = 250.0
"""Of one replica. It sends 100 and some."""
_MESSAGES_AT_ONCE = 1000.0
DRAWS_PER_S = 2.0
"""Predicted seconds of work a second that a replica may have each P give tenants."""
DRAWS_AHEAD_S = 30.0
"""Seconds of work of each P that a replica may give tenants at once: what was queued and became free."""


def most_requests(scraped: float) -> int:
    """Return how many requests all may have where an instance says that it has so many."""
    return int(scraped + scraped // 4) + SLACK


@dataclass(slots=True)
class Claim:
    """What one replica claims of one endpoint, and what is believed of that."""

    told: tuple[int, int] = (0, 0)
    """Requests and tokens as it last said."""
    at_scrape: tuple[int, int] = (0, 0)
    """As it had said when the endpoint was last scraped."""
    believed_then: tuple[int, int] = (0, 0)
    growth: int = UNSCRAPED
    """New requests that are believed until the next scrape."""

    @property
    def trusted(self) -> bool:
        """Whether it can be so, as the last scrape has shown."""
        return self.growth > 0

    def believed(self, endpoint: Endpoint) -> tuple[int, int]:
        """Return the requests and tokens that are believed."""
        fits = LONGEST_PROMPT if endpoint.kv_capacity is None else int(endpoint.kv_capacity)
        told = self.told
        if self.believed_then == self.at_scrape and told[0] <= self.at_scrape[0] + self.growth:
            requests = told[0]
            if requests and told[1] <= fits and self.growth:  # as it mostly is
                return told
        else:
            requests = self._grown(0, self.growth)
        if not requests:
            return 0, 0
        # Those that run on a D fit together.
        most = fits if endpoint.instance.role is InstanceRole.DECODE else requests * fits
        return requests, min(self._grown(1, most if self.trusted else 0), most)

    def _grown(self, part: int, growth: int) -> int:
        new = min(max(0, self.told[part] - self.at_scrape[part]), growth)
        return min(self.told[part], self.believed_then[part] + new)


def settle(endpoint: Endpoint, claims: Sequence[tuple[Claim, int]]) -> bool:
    """Compare the claims of all others with what an endpoint has just said; return whether they can be so.

    Each comes with the number of prefills that it claims besides.
    """
    metrics = endpoint.metrics
    if metrics is None:
        return True
    most = most_requests(metrics.running + metrics.waiting)
    ours = min(endpoint.own_in_flight, max(0, endpoint.in_flight_at_scrape - endpoint.elsewhere))
    room = max(0, most - ours)
    told = {id(claim): max(claim.told[0], queued) for claim, queued in claims}
    alone = [claim for claim, _ in claims if told[id(claim)] <= most]
    beyond = [claim for claim, _ in claims if told[id(claim)] > most]
    left = room - _share(alone, room, told, most // 4)
    _share(beyond, left, told, 0)
    _fit_tokens(endpoint, [claim for claim, _ in claims])
    return not beyond and sum(told.values()) <= room


def _share(claims: Sequence[Claim], room: int, told: Mapping[int, int], growth: int) -> int:
    """Believe so many requests of some claims at most, all of them as much; return how many."""
    total = sum(told[id(claim)] for claim in claims)
    part = min(1.0, room / total) if total else 1.0
    for claim in claims:
        claim.at_scrape = claim.told
        claim.believed_then = int(claim.told[0] * part), int(claim.told[1] * part)
        claim.growth = GROWTH if part == 1.0 and growth else growth
    return min(total, room)


def _fit_tokens(endpoint: Endpoint, claims: Sequence[Claim]) -> None:
    """Believe no more tokens on a D than its cache can have for them."""
    metrics, tokens = endpoint.metrics, sum(claim.believed_then[1] for claim in claims)
    if metrics is None or endpoint.kv_capacity is None or endpoint.instance.role is not InstanceRole.DECODE:
        return
    # Prompts that have a beginning in common take its tokens once.
    used = endpoint.kv_capacity * (4 * metrics.kv_usage + 1 / 16)
    if tokens > used:
        for claim in claims:
            requests, believed = claim.believed_then
            claim.believed_then = requests, int(believed * used / tokens)


@dataclass(slots=True)
class Lessons:
    """What the prefills of one replica teach.

    One by one they say little, since those that share a step of the engine end together. So it is their sum
    that is compared with what is predicted.
    """

    learned: int = 0
    """Prefills that were learned from."""
    _seen: int = 0
    _seconds: float = 0.0
    _expected: float = 0.0

    def believed(self, seconds: float, expected: float) -> bool:
        """Note what one has taken, and was predicted to; return whether the last ones can be so."""
        self._seen += 1
        self._seconds += _RECENT * (seconds - self._seconds)
        self._expected += _RECENT * (expected - self._expected)
        less, more = sorted((self._seconds, self._expected))
        return self._seen < _FEW or more <= _BELIEVED_TIMES * less


@dataclass(slots=True)
class Budget:
    """Something of which there is so much a second, and some at once."""

    left: float
    at: float

    def take(self, amount: float, per_s: float, at_once: float, now: float) -> float:
        """Return how much of an amount there is, and use that up."""
        self.left = min(at_once, self.left + per_s * max(0.0, now - self.at))
        self.at = now
        got = min(amount, max(0.0, self.left))
        self.left -= got
        return got


def messages(now: float) -> Budget:
    """Return the budget of one replica's messages: ask with :func:`may_send`."""
    return Budget(_MESSAGES_AT_ONCE, now)


def may_send(budget: Budget, now: float) -> bool:
    """Whether one more message of a replica can be true."""
    return budget.take(1.0, MESSAGES_PER_S, _MESSAGES_AT_ONCE, now) >= 1.0
