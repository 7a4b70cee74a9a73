"""What another strategy would have chosen, asked beside the one in use and never followed.

Its own choices are not acted on, so what it sees (queues, load, cached prefixes) is what the live strategy
has made of the fleet.
"""

from __future__ import annotations

import copy
import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import SchedulerConfig
from ..fleet.endpoint import Endpoint
from ..models import InstanceRole
from ..request.context import RequestContext
from ..strategies import make_strategy

log = logging.getLogger(__name__)

GAINS_S = (
    -10.0, -2.5, -0.5, -0.1, -0.025, -0.005, -0.001, -0.0001,
    0.0001, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0,
)  # fmt: skip
"""Upper bounds of the histogram of gains; what lies between the middle two makes no difference."""

MAX_DIFFERENCES = 50
"""Last differing picks that are kept."""

LOG_PAUSE_S = 60.0
"""Seconds between two warnings of a strategy that fails."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A pick in which the shadow differed. Nothing of the request."""

    role: InstanceRole
    live: str
    shadow: str
    live_seconds: float
    """Predicted: the time to the first token for prefill, that of a decode step for decode."""
    shadow_seconds: float
    at: float


@dataclass(slots=True)
class Tally:
    """What came of the picks of one role; the sums are of predicted seconds over all that were compared."""

    agreed: int = 0
    differed: int = 0
    failed: int = 0
    live_seconds: float = 0.0
    shadow_seconds: float = 0.0
    gains: list[int] = field(default_factory=lambda: [0] * (len(GAINS_S) + 1))
    """How many differing picks had which gain (live less shadow), by :data:`GAINS_S`."""

    def report(self) -> dict[str, Any]:
        """Return it for people, with the means in place of the sums."""
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
    """A strategy with objects of its own for each role, and what became of comparing it with the live one.

    Raises :exc:`~vllm_pd_scheduler.strategies.UnknownStrategy`.
    """

    def __init__(
        self, name: str, config: SchedulerConfig, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.name = name
        self.tallies = {role: Tally() for role in InstanceRole}
        self.differences: deque[Difference] = deque(maxlen=MAX_DIFFERENCES)
        self._strategies = {role: make_strategy(name, config) for role in InstanceRole}
        self._clock = clock
        self._spent = 0.0
        self._quiet_until = float("-inf")

    @property
    def reads_prefixes(self) -> bool:
        """Whether requests should come with their prompt's block hashes."""
        return any(strategy.reads_prefixes for strategy in self._strategies.values())

    def compare(
        self, role: InstanceRole, candidates: Sequence[Endpoint], request: RequestContext, live: Endpoint
    ) -> None:
        """Ask what the live strategy was just asked, and count how the answers differ. Never raises."""
        start = self._clock()
        try:
            self._compare(role, candidates, request, live, start)
        except Exception as error:  # someone else's code, and nothing depends on it
            self._failed(role, error, start)
        self._spent += self._clock() - start

    def _compare(
        self,
        role: InstanceRole,
        candidates: Sequence[Endpoint],
        request: RequestContext,
        live: Endpoint,
        now: float,
    ) -> None:
        live_seconds = shadow_seconds = predicted(live, request)
        # A copy, so that what a strategy writes into a request changes nothing for the live one.
        choice = self._strategies[role].rank(candidates, copy.copy(request), 1)[0]
        if choice not in candidates:
            raise ValueError("it chose what was not offered")
        tally = self.tallies[role]
        if choice is live:
            tally.agreed += 1
        else:
            shadow_seconds = predicted(choice, request)
            tally.differed += 1
            tally.gains[bisect_left(GAINS_S, live_seconds - shadow_seconds)] += 1
            self.differences.append(Difference(role, live.id, choice.id, live_seconds, shadow_seconds, now))
        tally.live_seconds += live_seconds
        tally.shadow_seconds += shadow_seconds

    def _failed(self, role: InstanceRole, error: Exception, now: float) -> None:
        self.tallies[role].failed += 1
        if now < self._quiet_until:
            return
        self._quiet_until = now + LOG_PAUSE_S
        failures = sum(tally.failed for tally in self.tallies.values())
        log.warning(
            "shadow strategy %s failed to pick a %s instance: %s: %s (%d failures so far; requests are not "
            "affected, and this is said once a minute)",
            self.name,
            role,
            type(error).__name__,
            error,
            failures,
            exc_info=error if log.isEnabledFor(logging.DEBUG) else None,
        )

    def report(self) -> dict[str, Any]:
        """Return all that was found, as the admin interface shows it; the newest differences first."""
        now = self._clock()
        picks = sum(t.agreed + t.differed + t.failed for t in self.tallies.values())
        return {
            "strategy": self.name,
            "microseconds_per_pick": 1e6 * self._spent / picks if picks else None,
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


def predicted(endpoint: Endpoint, request: RequestContext) -> float:
    """Return the seconds that the load model predicts of a choice.

    For prefill the time to the first token from now on, for decode that of a step with the request.
    """
    if endpoint.instance.role is InstanceRole.DECODE:
        kv_tokens = endpoint.kv_tokens + request.prompt_tokens + request.output_tokens
        return endpoint.decode.step(endpoint.requests + 1, kv_tokens)
    return endpoint.prefill.left(request.now) + endpoint.prefill_cost(request)
