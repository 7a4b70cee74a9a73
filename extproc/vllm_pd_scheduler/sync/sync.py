"""The loop of a replica among others: it sends what happens here when it is due, and takes in what comes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from msgspec.structs import replace

from ..config import SchedulerConfig
from ..models import By
from ..records.events import EventKind, Events
from ..replicas import Ignored, Replica
from ..replicas.plausible import Budget
from ..telemetry.pace import Pace
from .channel import Change, Channel
from .greeting import MAGIC, Greeting, Greetings, settings_of

GREET_S = 10.0
"""Seconds between two greetings, beside those for a replica that has just come."""
ASK = MAGIC + b"?"
"""Begins the question for all that the others have."""
STRAY = b"PDS"
"""Begins what Envoy has told of requests that another replica has."""
_ASKS_PER_S, _ASKS_AT_ONCE = 10.0, 64.0
"""Questions for all that are answered, from all replicas together: each that connects has one."""
_NEWS_PER_S, _NEWS_AT_ONCE = 1.0, 128.0
"""Replicas that come or go, of which is told: who may send here can have any number of names."""
_LEAST_S = 0.001
"""Timers of event loops are no finer; one that comes early would come again at once."""

log = logging.getLogger(__name__)


class Sync:
    """Joins a replica to the others by a channel. No request waits for it.

    ``waiting`` returns the requests in the queue, for P and for D. ``news`` is called when another replica
    has told something that counts, ``changed`` with each change of the log. ``stray`` takes what another one
    has passed on by :meth:`pass_on`, and returns whether that can be. ``clock`` returns monotonic seconds.
    """

    def __init__(
        self,
        replica: Replica,
        channel: Channel,
        greeting: Greeting,
        events: Events,
        *,
        waiting: Callable[[], tuple[int, int]],
        news: Callable[[], None],
        changed: Callable[[Change], None],
        stray: Callable[[bytes], bool] = lambda _: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replica = replica
        self.channel = channel
        self.greetings = Greetings(greeting)
        self._events = events
        self._waiting = waiting
        self._news = news
        self._changed = changed
        self._stray = stray
        self._clock = clock
        self._pace = Pace(clock)
        self._greeted_pace = Pace(clock)
        """Of what greetings bring: a flood of them must not hide what else is said."""
        self._asks = Budget(_ASKS_AT_ONCE, clock())
        self._news_of_others = Budget(_NEWS_AT_ONCE, clock())
        self._others: frozenset[str] = frozenset()
        self._others_changes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        """When it fires."""
        self._armed = False
        """Whether that is soon, since something has happened here."""
        self._greeted_at = -1e9
        self._away_since: float | None = clock()
        self._told_away = False
        self._joined = asyncio.Event()

    @property
    def others(self) -> frozenset[str]:
        """The replicas of which something was heard in the last seconds."""
        return self._others

    @property
    def away_s(self) -> float | None:
        """For how many seconds there has been no connection; ``None`` if there is one."""
        return None if self._away_since is None else self._clock() - self._away_since

    def summary(self) -> str:
        """Return in one line, without names and addresses, how it is."""
        if (away := self.away_s) is not None:
            return f"no connection to the other replicas for {away:.0f} s; this one goes on by itself"
        count = len(self._others)
        return f"connected; {count} other {'replica is' if count == 1 else 'replicas are'} heard"

    async def run(self) -> None:
        """Send and receive until this is cancelled."""
        self.replica.wake_by(self._wake)
        self._publish()
        try:
            while True:
                try:
                    await self.channel.run(self)
                except Exception:  # it is to go on whatever happens
                    self._failed("the connection of the replicas has failed")
                    await asyncio.sleep(1)
        finally:
            self.replica.wake_by(_nothing)
            if self._timer is not None:
                self._timer.cancel()

    async def joined(self, timeout_s: float) -> bool:
        """Wait until there was a connection, so long at most; return whether there was one."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._joined.wait()
        except TimeoutError:
            return False
        return True

    def reconfigured(self, config: SchedulerConfig) -> None:
        """Tell the others how this replica is configured now."""
        settings = {**self.greetings.own.settings, **settings_of(config)}
        self.greetings.own = replace(self.greetings.own, settings=settings)
        self._greet()

    # -- what is sent

    def _wake(self) -> None:
        """Send soon. It is called for each thing that happens to a request."""
        if not self._armed:
            self._armed = True
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        now = self._clock()
        self._due = self.replica.next_publish(now)
        delay = max(_LEAST_S, self._due - now)
        self._timer = asyncio.get_running_loop().call_later(delay, self._publish)

    def _publish(self) -> None:
        now = self._clock()
        try:
            for data in self.replica.publish(now, self._waiting()):
                self.channel.send(data)
            self._look_at_others()
            if now >= self._greeted_at + GREET_S:
                self._greet()
        except Exception:
            self._failed("what happens here cannot be told to the other replicas")
        self._armed = False
        self._arm()

    def pass_on(self, data: bytes) -> None:
        """Send all others what Envoy has told of requests that one of them has."""
        self.channel.send(STRAY + data)

    def _greet(self) -> None:
        self._greeted_at = self._clock()
        self.channel.send(self.greetings.encode())

    # -- what comes: the channel's listener

    def received(self, data: bytes) -> None:
        """See :class:`~vllm_pd_scheduler.sync.channel.Listener`."""
        now = self._clock()
        try:
            if data.startswith(ASK):
                self._asked(now)
            elif data.startswith(MAGIC):
                self._greeted(data)
            elif data.startswith(STRAY):
                self._strayed(data)
            elif self.replica.receive(data, now):
                if self.replica.others_changes != self._others_changes:
                    self._look_at_others()
                    self._greet()
                must = not self._armed and self.replica.must_tell
                if must and self.replica.next_publish(now) < self._due:
                    self._arm()  # it asks something, or has just come
                self._news()
        except Exception:
            self._failed("a message of another replica cannot be used")

    def changed(self, change: Change) -> None:
        """See :class:`~vllm_pd_scheduler.sync.channel.Listener`."""
        try:
            self._changed(change)
        except Exception:
            self._failed("a change that all replicas should make cannot be made")

    def connection(self, problem: str) -> None:
        """See :class:`~vllm_pd_scheduler.sync.channel.Listener`."""
        now = self._clock()
        if problem:
            self._away_since = now if self._away_since is None else self._away_since
            if self._pace.due(problem):
                self._told_away = True
                self._event(
                    f"no connection to the other replicas: {problem}; this one goes on with what it sees",
                    logging.WARNING,
                )
            return
        away, self._away_since = self._away_since, None
        if self._told_away or not self._joined.is_set():
            after = f", after {now - away:.1f} s" if away is not None and self._joined.is_set() else ""
            self._event(f"connected to the other replicas{after}")
        self._told_away = False
        self._joined.set()
        # All that it has is told at once: what was told meanwhile has reached nobody.
        self.channel.send(self.replica.snapshot(now, self._waiting()))
        self._greet()
        # And they are asked: to those who were there, this one was not away for long enough to be new.
        self.channel.send(ASK + self.replica.name.encode())

    def _asked(self, now: float) -> None:
        """Tell all that there is, unless so many have asked that the others would take it for nonsense."""
        if self._asks.take(1.0, _ASKS_PER_S, _ASKS_AT_ONCE, now) < 1.0:
            self.replica.ignored[Ignored.TOO_OFTEN] += 1
            return
        self.replica.tell_all()
        self._arm()

    def _strayed(self, data: bytes) -> None:
        if not self._stray(data[len(STRAY) :]):
            self.replica.ignored[Ignored.GARBAGE] += 1

    def _greeted(self, data: bytes) -> None:
        lines = self.greetings.receive(data)
        if lines is None:
            self.replica.ignored[Ignored.GARBAGE] += 1
            return
        for line in lines:
            if self._greeted_pace.due(line):
                self._event(line, logging.WARNING)

    def _look_at_others(self) -> None:
        if self.replica.others_changes == self._others_changes:
            return
        self._others_changes, others = self.replica.others_changes, frozenset(self.replica.others)
        came, gone, self._others = others - self._others, self._others - others, others
        for name in sorted(gone):
            self._tell_of(f"{self._shown(name)} is silent: its requests count no more", logging.WARNING)
        for name in sorted(came):
            self._tell_of(f"{self._shown(name)} is heard", logging.INFO)
        self.greetings.forget(gone)

    def _tell_of(self, text: str, level: int) -> None:
        """Tell of a replica that has come or gone, unless that would hide all else that is told."""
        if self._news_of_others.take(1.0, _NEWS_PER_S, _NEWS_AT_ONCE, self._clock()) >= 1.0:
            self._event(text, level)

    def _shown(self, replica: str) -> str:
        known = self.greetings.known.get(replica)
        return known.shown() if known else f"replica {replica}"

    def _event(self, text: str, level: int = logging.INFO) -> None:
        self._events.add(EventKind.REPLICAS, text, by=By.REPLICA, level=level)

    def _failed(self, what: str) -> None:
        if self._pace.due(what):
            log.exception("%s", what)


def _nothing() -> None:
    """Send nothing any more."""
