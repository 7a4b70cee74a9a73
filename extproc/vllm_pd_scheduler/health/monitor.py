"""Watch the instances: one loop for each, so that a slow one delays no other.

An instance with data-parallel ranks is probed and scraped as one, by its first endpoint.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Sequence

import aiohttp

from ..config import SchedulerConfig
from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import By, InstanceRole
from ..telemetry.metrics import Telemetry
from .finding import Finding, digest_of
from .names import NameResolver
from .places import Places
from .probe import Answers, Misconfigured, NoAnswer, NoSuchPath, OurShortage, Probe, Scrapes
from .progress import STALLED_S
from .served_models import OddOnes
from .shared import Counts, Peers, Shared
from .silence import HUNG_TIMEOUTS, Silence
from .vllm_metrics import Scrape, snapshot
from .watched import Watched

log = logging.getLogger(__name__)

RECOVERY_INTERVAL_S = 1.0
"""How often an instance that cannot serve is probed, however long the usual interval is."""

JITTER = 0.1
"""Each pause is up to this share shorter, so that the loops spread out."""

MODELS_S = 15.0
MODELS_INTERVALS = 2.5
"""An instance that serves is asked for its models after ``MODELS_S`` seconds or so many intervals: at every
third probe. They seldom change, and to ask takes as long as to ask for its health."""

MODELS_AT_ONCE = 32
"""Instances that are asked for their models at the same time, when all of them are: a choice."""

KEPT_S = 30.0
KEPT_INTERVALS = 5
"""What an instance said of its load and its models is believed for ``KEPT_S`` seconds and so many intervals
when it says nothing new."""


class HealthMonitor:
    """Probes every instance in a registry, asks it for its load and its models, and tells the registry.

    ``session``, ``clock`` (monotonic seconds) and ``names`` are the caller's. ``timeout`` is that of a probe,
    and again that of a DNS name's first look-up. ``stalled_after`` is for how many seconds requests may run
    on a D without a step of its engine. ``hung`` is called for a P or an E that is unhealthy and answers
    nothing (see :class:`~.silence.Silence`): what was sent there will not be answered either. With ``peers``
    it probes its part of the instances for all replicas of the scheduler, and hears of the others (see
    :class:`~.shared.Shared`).
    """

    def __init__(
        self,
        registry: Registry,
        telemetry: Telemetry,
        session: aiohttp.ClientSession,
        *,
        interval: float,
        timeout: float,
        clock: Callable[[], float],
        stalled_after: float = STALLED_S,
        names: NameResolver | None = None,
        hung: Callable[[Endpoint], None] = lambda _: None,
        peers: Peers | None = None,
    ) -> None:
        self._registry = registry
        self._telemetry = telemetry
        self._probe = Probe(session, timeout)
        self._interval = interval
        self._timeout = timeout
        self._clock = clock
        self._stalled_after = stalled_after
        self._places = Places(registry, names or NameResolver(), clock)
        self._silence = Silence(self._probe, HUNG_TIMEOUTS * timeout, hung)
        self.shared = Shared(self, registry, clock, interval, peers)
        """Takes what other replicas tell."""
        self._watched: dict[Endpoint, Watched] = {}
        self._loops: dict[Endpoint, asyncio.Task[None]] = {}
        self._odd_ones = OddOnes(registry)
        self._stopped = False

    @classmethod
    def configured(
        cls,
        config: SchedulerConfig,
        registry: Registry,
        telemetry: Telemetry,
        session: aiohttp.ClientSession,
        hung: Callable[[Endpoint], None] = lambda _: None,
        peers: Peers | None = None,
    ) -> HealthMonitor:
        """Return a monitor with the configured interval and timeout, on the process's monotonic clock."""
        return cls(
            registry,
            telemetry,
            session,
            interval=config.health_check_interval,
            timeout=config.health_check_timeout,
            clock=time.monotonic,
            stalled_after=min(STALLED_S, config.stream_idle_timeout / 2),  # before its streams are cut
            hung=hung,
            peers=peers,
        )

    def reconfigured(self, config: SchedulerConfig) -> None:
        """Check as often, and wait as long, as is configured now; each loop does so after its next check."""
        self._interval, self._timeout = config.health_check_interval, config.health_check_timeout
        self.shared.interval = config.health_check_interval
        self._probe.timeout = config.health_check_timeout
        self._silence.seconds = HUNG_TIMEOUTS * config.health_check_timeout

    async def start(self) -> None:
        """Probe every instance once, then keep probing them, and those that are added, until ``stop``."""
        await self.check_all()
        self._registry.changes.subscribe(self._changed)
        self._follow_all()

    async def stop(self) -> None:
        """End all loops, for good."""
        self._stopped = True
        loops, self._loops = self._loops, {}
        for loop in loops.values():
            loop.cancel()
        look_ups = [watched.look_up for watched in self._watched.values() if watched.look_up is not None]
        for look_up in look_ups:
            look_up.cancel()
        await asyncio.gather(*loops.values(), *look_ups, return_exceptions=True)
        await self._silence.stop()

    async def check_all(self) -> None:
        """Probe every instance once. Raises nothing.

        What is found is one change: each change looks at all instances, so 1,000 of them would take seconds.
        """
        with self._registry.changes.as_one(By.PROBE):
            await asyncio.gather(*(self._check_fenced(endpoint) for endpoint in self._firsts()))
        self._odd_ones.compare()

    async def check(self, endpoint: Endpoint) -> None:
        """Probe one instance and ask for its load and its models."""
        watched = self._watched.setdefault(endpoint, Watched(self._clock()))
        problem = await self._places.find(endpoint, watched, self._timeout)
        if problem is not None:
            self._registry.probed(endpoint, problem, self._clock())
            self.shared.finds(endpoint, None)
            return
        ranks = self._registry.ranks_of(endpoint)
        counts = [(each.in_flight, each.tokens) for each in ranks]
        self.shared.asks(endpoint)
        answers = await self._probe.ask(endpoint, models=self._wants_models(endpoint, watched))
        if endpoint not in self._registry:
            return
        pages = answers.metrics
        self._take_health(endpoint, watched, answers)
        self._take_silence(endpoint, answers)
        if not isinstance(pages, NoAnswer) and self._registry.started(endpoint, pages[0].started_at):
            counts = [(0, 0.0)] * len(ranks)
        self._take_models(endpoint, watched, answers)
        self._take_metrics(endpoint, watched, answers, counts)
        self._tell(endpoint, answers)

    def _tell(self, endpoint: Endpoint, answers: Answers) -> None:
        """Tell the other replicas what was found; not what is missing here."""
        finding = None
        if isinstance(answers.health, OurShortage):
            return
        if not endpoint.probes.problem:
            pages = [] if isinstance(answers.metrics, NoAnswer) else answers.metrics
            finding = Finding(str(endpoint.address), digest_of(endpoint), pages)
        self.shared.finds(endpoint, finding)

    # -- what other replicas have found

    def heard(self, endpoint: Endpoint, finding: Finding, counts: Counts) -> None:
        """Take what another replica has found at an instance that is well and the one that we know."""
        now, watched = self._clock(), self._watched.setdefault(endpoint, Watched(self._clock()))
        self._registry.probed(endpoint, self._standstill(endpoint, watched, finding.pages, now), now)
        if finding.models:
            watched.models_at = now
        if finding.pages:
            self._take_pages(endpoint, watched, finding.pages, counts)
        elif self._too_old(endpoint.scraped_at, now):
            self._registry.forget_metrics(endpoint)

    def look(self, endpoint: Endpoint) -> None:
        """Probe an instance at once, unless its loop does so just now, and ask for its models too."""
        watched, loop = self._watched.get(endpoint), self._loops.get(endpoint)
        if watched is None or loop is None or watched.under_way or self._stopped:
            return
        loop.cancel()
        watched.models_at = -math.inf
        self._loops[endpoint] = asyncio.ensure_future(self._run(endpoint, 0.0))

    # -- on demand

    async def read_models(self) -> None:
        """Ask every instance that serves for its models, now; some at a time. Raises nothing."""
        at_once = asyncio.Semaphore(MODELS_AT_ONCE)

        async def read(endpoint: Endpoint) -> None:
            async with at_once:
                models = await self._probe.models(endpoint)
            watched = self._watched.get(endpoint)
            if watched is not None and endpoint in self._registry and not isinstance(models, NoAnswer):
                watched.models_at = self._clock()
                self._registry.models.listed(endpoint, models.names, models.adapters, models.cards)

        await asyncio.gather(*(read(each) for each in self._firsts() if each.routable))

    def _firsts(self) -> list[Endpoint]:
        """Return one endpoint of each instance."""
        return [ranks[0] for ranks in self._registry.instances()]

    # -- the loops

    def _changed(self) -> None:
        of = self._registry.changes.of
        if of is None:
            self._follow_all()
        else:
            self._follow(self._registry.ranks_of(of)[0])

    def _follow_all(self) -> None:
        gone = [each for each in (*self._loops, *self._watched) if each not in self._registry]
        for endpoint in (*gone, *self._firsts()):
            self._follow(endpoint)

    def _follow(self, endpoint: Endpoint) -> None:
        """Start or end the loop of an instance, so that there is exactly one for each that is registered."""
        if endpoint not in self._registry:
            if (loop := self._loops.pop(endpoint, None)) is not None:
                loop.cancel()
            if self._watched.pop(endpoint, None) is not None:
                self._silence.removed(endpoint)
                self.shared.removed(endpoint)
        elif endpoint not in self._loops and not self._stopped:
            # Those that the start has probed at once are spread over the interval.
            pause = 0.0 if endpoint.probes.healthy is None else self._pause(endpoint) * random.random()
            self._loops[endpoint] = asyncio.ensure_future(self._run(endpoint, pause))

    async def _run(self, endpoint: Endpoint, pause: float) -> None:
        watched = self._watched.setdefault(endpoint, Watched(self._clock()))
        while True:
            await asyncio.sleep(pause)
            if self.shared.looks(endpoint):
                models, watched.under_way = endpoint.models.listed, True
                await self._check_fenced(endpoint)
                watched.under_way = False
                if endpoint.models.listed != models:
                    self._odd_ones.compare()
            pause = self.shared.pause(endpoint, self._pause(endpoint))

    async def _check_fenced(self, endpoint: Endpoint) -> None:
        try:
            await self.check(endpoint)
        except Exception:  # one bad probe must end neither the start nor the loop, which finds a recovery
            log.exception("health check of %s failed", endpoint.instance.instance_id)

    def _pause(self, endpoint: Endpoint) -> float:
        pause = self._interval if endpoint.routable else min(self._interval, RECOVERY_INTERVAL_S)
        return pause * (1 - JITTER * random.random())

    # -- what it answers

    def _take_health(self, endpoint: Endpoint, watched: Watched, answers: Answers) -> None:
        problem = answers.health
        if isinstance(problem, OurShortage):
            self._telemetry.process.local_error("probe")
            watched.say(
                endpoint, "shortage", f"{problem}; this says nothing of the instance, which stays as it is"
            )
            return
        watched.say(endpoint, "shortage", None)
        now, pages, reason = self._clock(), answers.metrics, str(problem) if problem else None
        if isinstance(pages, Misconfigured):
            reason = reason or str(pages)
        elif not isinstance(pages, NoAnswer):
            stalled = self._standstill(endpoint, watched, pages, now)
            reason = reason or stalled
        self._registry.probed(endpoint, reason, now)

    def _take_silence(self, endpoint: Endpoint, answers: Answers) -> None:
        """Find a P or an E that hangs. What waits at a D is Envoy's, which has time limits alone."""
        if not answers.silent:
            self._silence.answered(endpoint)
        elif endpoint.probes.healthy is False and endpoint.instance.role is not InstanceRole.DECODE:
            self._silence.unanswered(endpoint)

    def _standstill(
        self, endpoint: Endpoint, watched: Watched, pages: Sequence[Scrape], now: float
    ) -> str | None:
        """Return what is wrong with an instance that answers, if requests run there and nothing moves.

        Only of D: all of its requests wait then, for as long as a stream may be silent. Others have a
        time limit.
        """
        still = [watched.progress_of(rank).seen(page, now) for rank, page in enumerate(pages)]
        seconds = max(still, default=0.0)
        if endpoint.instance.role is not InstanceRole.DECODE or seconds < self._stalled_after:
            return None
        return f"its engine stands still: it runs requests and has made no step for {seconds:.0f} s"

    def _wants_models(self, endpoint: Endpoint, watched: Watched) -> bool:
        """Whether it is time to ask for them, or the instance may be another one than before."""
        probes, listed = endpoint.probes, endpoint.models.listed
        known = listed is not None and probes.healthy is True and not probes.streak
        pause = min(MODELS_S, MODELS_INTERVALS * self._interval)
        return not known or self._clock() >= watched.models_at + pause

    def _take_models(self, endpoint: Endpoint, watched: Watched, answers: Answers) -> None:
        now, models = self._clock(), answers.models
        if models is None:
            return
        if not isinstance(models, NoAnswer):
            watched.models_at = now
            self._registry.models.listed(endpoint, models.names, models.adapters, models.cards)
            watched.say(endpoint, "models", None)
            return
        if self._too_old(watched.models_at, now):
            self._registry.models.listed(endpoint, None)
        if answers.health is None and not isinstance(models, (NoSuchPath, OurShortage)):
            watched.say(endpoint, "models", f"which models it serves is not known: {models}")

    def _take_metrics(self, endpoint: Endpoint, watched: Watched, answers: Answers, counts: Counts) -> None:
        pages = answers.metrics
        if not isinstance(pages, NoAnswer):
            watched.say(endpoint, "metrics", None)
            self._take_pages(endpoint, watched, pages, counts)
            return
        for each in self._registry.ranks_of(endpoint):
            self._telemetry.instances.scrape_failed(each.id)
        if self._too_old(endpoint.scraped_at, self._clock()):
            self._registry.forget_metrics(endpoint)
        if answers.health is None and not isinstance(pages, OurShortage):
            watched.say(endpoint, "metrics", f"its load is not known: {pages}")

    def _take_pages(self, endpoint: Endpoint, watched: Watched, pages: Scrapes, counts: Counts) -> None:
        """Take the load of an instance's ranks. ``counts``: what was there when it was asked."""
        now, ranks = self._clock(), self._registry.ranks_of(endpoint)
        before: Sequence[Scrape | None] = watched.scrapes or [None] * len(pages)
        watched.scrapes = pages
        for each, page, last, (in_flight, tokens) in zip(ranks, pages, before, counts, strict=True):
            taken = snapshot(page, last, each.metrics, each.instance.role, now)
            self._registry.scraped(each, taken, in_flight, tokens)

    def _too_old(self, said_at: float | None, now: float) -> bool:
        return said_at is not None and now - said_at > max(KEPT_S, KEPT_INTERVALS * self._interval)
