"""Compares a second strategy with the one in use, on live requests, without following it.

Its choices are not acted on, so the queues, load and cached prefixes that it sees come from the live
strategy's choices.
"""

from __future__ import annotations

import copy
import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..config import SchedulerConfig
from ..fleet.endpoint import Endpoint
from ..models import PD_ROLES, InstanceRole
from ..request.context import RequestContext
from ..strategies import make_strategy
from ..telemetry.failures import described
from .candidates import Offer
from .fence import StrategyFence

log = logging.getLogger(__name__)

GAIN_BUCKETS_S = (
    -10.0, -2.5, -0.5, -0.1, -0.025, -0.005, -0.001, -0.0001,
    0.0001, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0,
)  # fmt: skip
"""Upper bounds of the histogram of gains, alike on both sides of zero.

From 0.1 ms, below which a difference does not matter, to 10 s, a long queue of prefills.
"""

MAX_DIFFERENCES = 50
"""Differing picks that are kept, the newest ones: a page full for a person who looks."""

WARNING_INTERVAL_S = 60.0
"""Least time between two warnings about a strategy that fails: it may fail with each request."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A pick in which the shadow chose another endpoint. It has nothing of the request."""

    role: InstanceRole
    live: str
    """Id of the instance that the live strategy chose."""
    shadow: str
    """Id of the instance that the shadow chose."""
    live_seconds: float
    """Predicted for the live choice, see :func:`predicted_seconds`."""
    shadow_seconds: float
    """Predicted for the shadow's choice."""
    at: float
    """When, by the shadow's clock."""


@dataclass(slots=True)
class Tally:
    """Counts of the picks of one role, and sums of the predicted seconds over those that were compared."""

    agreed: int = 0
    differed: int = 0
    failed: int = 0
    live_seconds: float = 0.0
    shadow_seconds: float = 0.0
    gains: list[int] = field(default_factory=lambda: [0] * (len(GAIN_BUCKETS_S) + 1))
    """Differing picks by gain (predicted seconds, live less shadow) in the buckets :data:`GAIN_BUCKETS_S`."""

    def report(self) -> dict[str, Any]:
        """Return it as JSON for the admin interface, with means in place of the sums."""
        compared = self.agreed + self.differed
        means = (self.live_seconds / compared, self.shadow_seconds / compared) if compared else (None, None)
        return {
            "agreed": self.agreed,
            "differed": self.differed,
            "failed": self.failed,
            "live_predicted_seconds": means[0],
            "shadow_predicted_seconds": means[1],
        }


class Shadow:
    """A shadow strategy and the results of comparing it with the live one.

    It makes strategy objects of its own, one for each role. ``clock`` measures what a pick costs. The
    constructor raises :exc:`~vllm_pd_scheduler.strategies.UnknownStrategy`.
    """

    def __init__(
        self, name: str, config: SchedulerConfig, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.name = name
        self.tallies = {role: Tally() for role in PD_ROLES}
        self.differences: deque[Difference] = deque(maxlen=MAX_DIFFERENCES)
        self._strategies = {
            role: StrategyFence(make_strategy(name, config), partial(self._failed, role)) for role in PD_ROLES
        }
        self._clock = clock
        self._seconds_spent = 0.0
        self._next_warning_at = float("-inf")

    @property
    def reads_prefixes(self) -> bool:
        """Whether prompts must be hashed for the strategy."""
        return any(strategy.reads_prefixes for strategy in self._strategies.values())

    def strategy(self, role: InstanceRole) -> StrategyFence:
        """Return the strategy for a role, in its fence."""
        return self._strategies[role]

    def compare(
        self,
        role: InstanceRole,
        offer: Offer,
        request: RequestContext,
        live: Endpoint,
    ) -> None:
        """Rank what is offered, and count whether the choice differs from the live strategy's.

        What the strategy raises is counted and logged.
        """
        start = self._clock()
        live_seconds = predicted_seconds(live, request)
        # A copy: whatever a strategy writes into it does not reach the live request.
        own = copy.copy(request)
        own.offer(offer.endpoints)
        ranked = self._strategies[role].rank(offer, own, 1)
        if ranked:
            self._count(role, live, ranked[0], live_seconds, request, start)
        self._seconds_spent += self._clock() - start

    def _count(
        self,
        role: InstanceRole,
        live: Endpoint,
        choice: Endpoint,
        live_seconds: float,
        request: RequestContext,
        now: float,
    ) -> None:
        shadow_seconds = live_seconds
        tally = self.tallies[role]
        if choice is live:
            tally.agreed += 1
        else:
            shadow_seconds = predicted_seconds(choice, request)
            tally.differed += 1
            tally.gains[bisect_left(GAIN_BUCKETS_S, live_seconds - shadow_seconds)] += 1
            self.differences.append(Difference(role, live.id, choice.id, live_seconds, shadow_seconds, now))
        tally.live_seconds += live_seconds
        tally.shadow_seconds += shadow_seconds

    def _failed(self, role: InstanceRole, error: Exception) -> None:
        self.tallies[role].failed += 1
        now = self._clock()
        if now < self._next_warning_at:
            return
        self._next_warning_at = now + WARNING_INTERVAL_S
        failures = sum(tally.failed for tally in self.tallies.values())
        log.warning(
            "shadow strategy %s failed to pick a %s instance: %s (%d failures so far; requests are not "
            "affected, and this is said once a minute)",
            self.name,
            role,
            described(error, self._strategies[role].strategy),
            failures,
            exc_info=error if log.isEnabledFor(logging.DEBUG) else None,
        )

    def report(self) -> dict[str, Any]:
        """Return the results as JSON for the admin interface, the newest differences first."""
        now = self._clock()
        picks = sum(t.agreed + t.differed + t.failed for t in self.tallies.values())
        return {
            "strategy": self.name,
            "microseconds_per_pick": 1e6 * self._seconds_spent / picks if picks else None,
            **{role.value: tally.report() for role, tally in self.tallies.items()},
            "differences": [
                {
                    "seconds_ago": round(now - each.at, 3),
                    "role": each.role,
                    "live": each.live,
                    "shadow": each.shadow,
                    "live_predicted_seconds": each.live_seconds,
                    "shadow_predicted_seconds": each.shadow_seconds,
                }
                for each in reversed(self.differences)
            ],
        }


def predicted_seconds(endpoint: Endpoint, request: RequestContext) -> float:
    """Return what the load model predicts if a request goes to an endpoint, in seconds.

    On prefill that is the time to the first token, from ``request.now`` on; on decode the time of a step
    with the request in its batch.
    """
    if endpoint.instance.role is InstanceRole.DECODE:
        kv_tokens = endpoint.kv_tokens + request.prompt_tokens + request.output_tokens
        return endpoint.decode.step(endpoint.requests + 1, kv_tokens)
    return endpoint.prefill.remaining(request.now) + endpoint.prefill_cost(request)
