"""What is believed of what another replica claims.

The judge is the instance: after each scrape, what a replica claims to have there is compared with what the
instance says that it has. Between two scrapes what is new is believed, within bounds.
"""

from __future__ import annotations

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
OLD_S = 5.0
"""Seconds after which a prefill that is queued on a P is surely known there."""
MESSAGES_PER_S = 250.0
"""Of one replica. It sends 100 and some."""
_MESSAGES_AT_ONCE = 1000.0
DRAWS_PER_S = 2.0
"""Predicted seconds of work a second that a replica may have each P give tenants."""
DRAWS_AHEAD_S = 30.0
"""Seconds of work of each P that a replica may give tenants at once: what was queued and became free."""


def most_requests(scraped: float) -> int:
    """Return how many requests a replica may have where an instance says that it has so many."""
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

    @property
    def trusted(self) -> bool:
        """Whether the last scrape has not contradicted it."""
        return self.growth > 0

    def believed(self, endpoint: Endpoint) -> tuple[int, int]:
        """Return the requests and tokens that are believed."""
        requests = self._grown(0, self.growth)
        if not requests:
            return 0, 0
        fits = endpoint.kv_capacity
        longest = LONGEST_PROMPT if fits is None else int(fits)
        if endpoint.instance.role is InstanceRole.PREFILL or fits is None:
            most = requests * longest
        else:
            most = longest  # those that run there fit together
        return requests, min(self._grown(1, most if self.trusted else 0), most)

    def scraped(self, endpoint: Endpoint) -> bool:
        """Compare it with what an endpoint has just said of itself; return whether it can be so."""
        metrics = endpoint.metrics
        if metrics is None:
            return True
        requests, tokens = self.told
        most = most_requests(metrics.running + metrics.waiting)
        fits = requests <= most
        believed = min(requests, most), tokens if fits else tokens * most // max(1, requests)
        if endpoint.instance.role is InstanceRole.DECODE and endpoint.kv_capacity is not None:
            # Prompts that have a beginning in common take its tokens once.
            used = int(endpoint.kv_capacity * (4 * metrics.kv_usage + 1 / 16))
            believed = believed[0], min(believed[1], used)
        self.at_scrape, self.believed_then = self.told, believed
        self.growth = GROWTH if fits else 0
        return fits

    def _grown(self, part: int, growth: int) -> int:
        new = min(max(0, self.told[part] - self.at_scrape[part]), growth)
        return min(self.told[part], self.believed_then[part] + new)


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
