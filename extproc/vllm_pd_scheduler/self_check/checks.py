"""Which pairs are checked and when, and what follows: a pair that is wrong is left out until it is right."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Protocol

from ..config import SchedulerConfig
from ..fleet.condition import TRIAL, told_state
from ..fleet.endpoint import Endpoint
from ..models import By, InstanceRole
from ..records.events import EventKind, Events
from ..scheduler import Scheduler
from ..telemetry import Telemetry
from .comparison import Verdict
from .pair_check import Try

log = logging.getLogger(__name__)

TRIES = 3
"""How many answers in a row, each to another prompt, must be wrong for a pair to be left out, and right for
it to be taken back. A choice: what comes of rounding differs now and then, a wrong cache each time."""
MAX_KV_USAGE = 0.8
"""An instance with more of its KV cache in use is left alone: a check must not make it preempt."""
MAX_RESULTS = 100
"""Results that are remembered: a choice."""
_P, _D = InstanceRole.PREFILL, InstanceRole.DECODE


class TryPair(Protocol):
    """Tries a pair once."""

    def __call__(self, model: str, prefill: Endpoint, decode: Endpoint) -> Awaitable[Try]:
        """Return what came of it; raises nothing."""
        ...


class CannotCheck(ValueError):
    """A pair that was asked for cannot be checked; the message says why."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of the check of a pair."""

    at: float
    """Unix seconds."""
    model: str
    prefill: str
    decode: str
    verdict: Verdict
    """Of the last try."""
    tries: int
    left_out: bool
    """Whether the pair is left out since."""
    reason: str
    """Why there is no other verdict; empty if there is nothing to say."""


class SelfCheck:
    """Checks pairs, one at a time: one of each model each ``self_check_interval``, and any that is asked for.

    ``try_pair`` sends the requests, ``queued`` returns how many wait in the scheduler, ``clock`` monotonic
    and ``now`` Unix seconds.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        scheduler: Scheduler,
        telemetry: Telemetry,
        events: Events,
        try_pair: TryPair,
        queued: Callable[[], int],
        clock: Callable[[], float],
        now: Callable[[], float],
    ) -> None:
        self.results: deque[Checked] = deque(maxlen=MAX_RESULTS)
        """The newest last."""
        self._config = config
        self._scheduler = scheduler
        self._registry = scheduler.registry
        self._telemetry = telemetry
        self._events = events
        self._try_pair = try_pair
        self._queued = queued
        self._clock = clock
        self._now = now
        self._one_at_a_time = asyncio.Lock()
        self._changed = asyncio.Event()
        self._turns: dict[str, int] = {}
        self._random = Random()

    def reconfigured(self) -> None:
        """Take the interval as it is configured now. A check that runs goes on."""
        self._changed.set()

    async def run(self) -> None:
        """Check a pair of each model at each interval, until this is cancelled."""
        last = self._clock()
        while True:
            interval = self._config.self_check_interval
            left = None if interval is None else max(0.0, last + interval - self._clock())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()
                self._changed.clear()  # what is due goes on to be due
                continue
            last = self._clock()
            try:
                await self.round(By.PROBE)
            except Exception:  # whatever it is, the next check comes
                log.exception("the self-check failed")

    async def round(self, by: str) -> list[Checked]:
        """Check the pair of each model whose turn it is."""
        pairs = [pair for model in self._models() if (pair := self._next_pair(model)) is not None]
        return [await self._check(*pair, by) for pair in pairs]

    async def check(self, prefill: str, decode: str, model: str | None, by: str) -> Checked:
        """Check one pair, by their ids, whether it is in use or not.

        Raises :exc:`CannotCheck`, and :exc:`~vllm_pd_scheduler.fleet.registry.UnknownInstance`.
        """
        p, d = self._registry.get(prefill), self._registry.get(decode)
        for endpoint, role in ((p, _P), (d, _D)):
            if endpoint.instance.role is not role:
                raise CannotCheck(f"{endpoint.id} is no {role} instance")
        if not self._scheduler.fit(p, d):
            raise CannotCheck(f"{p.id} and {d.id} do not fit together: another revision, or connector")
        adapters = p.models.adapters | d.models.adapters
        both = sorted((p.models.names or frozenset()) & (d.models.names or frozenset()) - adapters)
        if model is None and not both:
            raise CannotCheck(f"{p.id} and {d.id} are not known to serve the same model")
        return await self._check(model or both[0], p, d, by)

    def _models(self) -> Iterator[str]:
        """Yield a name of each base model that some P and D serve."""
        names = {name for e in self._registry for name in (e.models.names or frozenset()) - e.models.adapters}
        seen = set()
        for name in sorted(names):
            served = tuple(self._scheduler.serving(_P, name)), tuple(self._scheduler.serving(_D, name))
            if all(served) and served not in seen:
                seen.add(served)
                yield name
        self._turns = {name: turn for name, turn in self._turns.items() if name in names}

    def _next_pair(self, model: str) -> tuple[str, Endpoint, Endpoint] | None:
        """Return the pair whose turn it is: each P in turn, each time with another D.

        So each instance is in one of the next few pairs, and after as many checks as there are pairs, all
        were checked.
        """
        turn = self._turns.get(model, self._random.randrange(1 << 20))  # other schedulers are elsewhere
        self._turns[model] = turn + 1
        prefill = self._scheduler.serving(_P, model)
        time, at = divmod(turn, len(prefill))
        decode = self._scheduler.serving(_D, model, prefill[at])
        return (model, prefill[at], decode[(time + at) % len(decode)]) if decode else None

    async def _check(self, model: str, prefill: Endpoint, decode: Endpoint, by: str) -> Checked:
        async with self._one_at_a_time:
            wrong, processes = self._registry.wrong_pairs, (prefill.generation, decode.generation)
            was_out = decode in wrong.barred(prefill)
            goes_on = Verdict.MATCH if was_out else Verdict.MISMATCH
            made, mismatches, tries = Try(Verdict.SKIPPED), 0, 0
            while tries < TRIES:
                tries += 1
                made = await self._tried(model, prefill, decode)
                self._telemetry.instances.self_checked(made.verdict)
                mismatches += made.verdict is Verdict.MISMATCH
                if made.verdict is not goes_on:
                    break
            same = processes == (prefill.generation, decode.generation)
            decided = made.verdict is goes_on and same and {prefill, decode} <= set(self._registry)
            if decided and was_out:
                self._take_back(prefill, decode, by)
            elif decided:
                self._leave_out(model, prefill, decode, by)
            elif mismatches and not was_out:
                self._doubt(model, prefill, decode, by)
            left_out = decode in wrong.barred(prefill)
            result = Checked(
                self._now(), model, prefill.id, decode.id, made.verdict, tries, left_out, made.reason
            )
            self.results.append(result)
            return result

    async def _tried(self, model: str, prefill: Endpoint, decode: Endpoint) -> Try:
        reason = self._busy(prefill) or self._busy(decode)
        if not reason and self._queued():
            reason = "requests wait in the scheduler"
        if reason:
            return Try(Verdict.SKIPPED, reason)
        return await self._try_pair(model, prefill, decode)

    def _busy(self, endpoint: Endpoint) -> str:
        """Return why an instance is to be left alone; empty if it has nothing else to do."""
        metrics = endpoint.metrics
        if not endpoint.routable or told_state(endpoint) == TRIAL:
            return f"{endpoint.id} is {told_state(endpoint)}"
        if metrics is None:
            return f"the load of {endpoint.id} is not known"
        if metrics.waiting or (endpoint.instance.role is _P and endpoint.waiting):
            return f"requests wait at {endpoint.id}"
        if endpoint.kv_usage > MAX_KV_USAGE or self._scheduler.limits.saturated(endpoint, self._clock()):
            return f"{endpoint.id} is full"
        return ""

    def _leave_out(self, model: str, prefill: Endpoint, decode: Endpoint, by: str) -> None:
        why = f"{TRIES} of {TRIES} answers of {model} were wrong"
        self._registry.wrong_pairs.leave_out(prefill, decode, why)
        self._add(
            f"WRONG TEXTS: {decode.id} answers wrongly with what {prefill.id} hands over ({why}): it gets no "
            f"more hand-offs from there",
            by,
            logging.ERROR,
        )

    def _take_back(self, prefill: Endpoint, decode: Endpoint, by: str) -> None:
        self._registry.wrong_pairs.take_back(prefill, decode)
        self._add(f"{decode.id} answers rightly with what {prefill.id} hands over, and gets it again", by)

    def _doubt(self, model: str, prefill: Endpoint, decode: Endpoint, by: str) -> None:
        self._add(
            f"an answer of {model} with what {prefill.id} hands over to {decode.id} is not the one that "
            f"{decode.id} gives alone; not each of them is wrong, so the pair stays",
            by,
            logging.WARNING,
        )

    def _add(self, text: str, by: str, level: int = logging.INFO) -> None:
        self._events.add(EventKind.SELF_CHECK, text, by=by, level=level)
