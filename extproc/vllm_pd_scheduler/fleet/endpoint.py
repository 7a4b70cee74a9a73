"""An instance as the scheduler sees it: its state, its load, and the requests that have a claim on it.

One that has several engines behind its port (data parallelism) is as many endpoints, its ranks. Load is a
rank's own; health, drains and failures are those of the process, which all of its ranks share.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct, field
from msgspec.structs import force_setattr as _set

from ..connectors.spoken import Spoken
from ..models import InstanceState, MetricsSnapshot, PDInstance
from ..prediction.load_model import DecodeLoad, FleetLoad
from ..prediction.prefill_load import PrefillLoad
from ..prediction.prefix_index import Holder, PrefixIndex
from ..request.context import RequestContext
from ..request.headers import RANK
from .breaker import Breaker, BreakerPolicy, BreakerState
from .endpoint_models import EndpointModels
from .full_pause import FullPause
from .peers import DoubtfulEnds
from .probes import Probes
from .reservation import Reservation


class Endpoint(Struct, frozen=True, eq=False):
    """An instance, or one rank of it, and all that is known of it.

    Strategies, which may be code of the operator's, read it. So no attribute can be set: each change is a
    method that says what has happened, and the registry calls it.
    """

    instance: PDInstance
    address: str | None = None
    """``ip:port``, the name by which Envoy knows the host; ``None`` until a DNS name was resolved."""
    resolved_at: float | None = None
    """When a DNS name was last resolved, in the caller's time; ``None``: never, or it is an IP address."""
    metrics: MetricsSnapshot | None = None
    """What the last scrape said; ``None`` before the first, and when that is too long ago to be believed."""
    scraped_at: float | None = None
    """When it was last scraped, in the caller's time."""
    models: EndpointModels = field(default_factory=lambda: EndpointModels(None))
    """Which models it lists and serves, and which adapters are loaded."""
    in_flight: int = 0
    """Requests that we, or another replica of the scheduler, sent there and that have not ended."""
    elsewhere: int = 0
    """Those of ``in_flight`` that other replicas sent."""
    draining: bool = False
    drain_told: bool = False
    """Whether the registry's listeners know that it is drained."""
    probes: Probes = field(default_factory=Probes)
    """What health probes found."""
    in_flight_at_scrape: int = 0
    breaker: Breaker = field(default_factory=lambda: Breaker(BreakerPolicy()))
    doubts: DoubtfulEnds = field(default_factory=DoubtfulEnds)
    pause: FullPause = field(default_factory=FullPause)
    """For how long it is left alone because it said that it is full."""
    started_at: float | None = None
    """Start time of its process as it tells it, Unix seconds: another one means that it was restarted."""
    generation: int = 0
    """How often it was seen to restart. Reservations of an earlier generation count no more."""
    spoken: Spoken = field(default_factory=Spoken)
    """Which protocol its last hand-off had."""
    pending_handoffs: int = 0
    """Hand-offs that a P holds for requests whose answer has not ended."""
    handoffs_elsewhere: int = 0
    """Those that it holds for requests of other replicas, as these last told."""
    tokens: float = 0.0
    """Tokens of the requests in flight: for prefill those to compute, for decode prompt and answer."""
    tokens_elsewhere: float = 0.0
    """Those of ``tokens`` that belong to requests of other replicas."""
    tokens_at_scrape: float = 0.0
    others_requests: float = 0.0
    """Requests running or queued there, as last scraped, that are none of ``in_flight``."""
    others_tokens: float = 0.0
    """Tokens of KV cache in use, as last scraped, that are none of ``tokens``."""
    kv_capacity: float | None = None
    """Tokens that its KV cache holds, as last scraped."""
    transfer_rate: float | None = None
    """Bytes a second of the KV transfers to it, as last scraped with any."""
    prefill: PrefillLoad = field(default_factory=lambda: PrefillLoad(FleetLoad().prefill))
    decode: DecodeLoad = field(default_factory=lambda: DecodeLoad(FleetLoad().decode))
    holder: Holder = field(default_factory=lambda: PrefixIndex().add())
    """The prompt prefixes that are taken for cached there."""
    watchers: Sequence[set[Endpoint]] = ()
    """Sets to which it is added when its load has changed, see :meth:`Registry.watch`."""
    rank: int | None = None
    """Which engine of the instance it is, if that has several."""
    id: str = ""
    """The instance's id; of a rank with that behind it, ``p1:0``, as no instance is called."""
    _trial: Reservation | None = None
    """The request that was sent to see whether it works again, if it was ejected."""

    def __post_init__(self) -> None:
        name = self.instance.instance_id
        _set(self, "id", name if self.rank is None else f"{name}:{self.rank}")
        self.models.configure(self.instance.models)

    def __repr__(self) -> str:
        return f"Endpoint({self.id!r})"

    @property
    def url(self) -> str:
        """Base URL by its address, which must be known."""
        return f"{self.instance.scheme}://{self.address}"

    @property
    def host(self) -> str:
        """IP address without brackets, or the name as long as it has none."""
        return self.instance.host if self.address is None else self.address.rpartition(":")[0].strip("[]")

    @property
    def destination(self) -> tuple[str, str | None]:
        """Where its requests go: its address, which must be known, and the name in its certificate."""
        return str(self.address), self.instance.tls_name

    @property
    def own_headers(self) -> dict[str, str]:
        """Headers of each request that is meant for it: its key, and its rank if it is one of several."""
        key = self.instance.authorization
        return key if self.rank is None else {RANK: str(self.rank), **key}

    @property
    def state(self) -> InstanceState:
        """Draining wins over health, since it is what the operator asked for."""
        if self.draining:
            return InstanceState.DRAINING
        if self.probes.healthy is None:
            return InstanceState.STARTING
        if self.probes.healthy and self.breaker.state is not BreakerState.OPEN:
            return InstanceState.HEALTHY
        return InstanceState.UNHEALTHY

    @property
    def decode_step(self) -> float:
        """Predicted seconds of a decode step with what runs there now."""
        return self.decode.step(self.requests, self.kv_tokens)

    @property
    def routable(self) -> bool:
        """Whether a new request may go there."""
        return self.state is InstanceState.HEALTHY and self.address is not None

    @property
    def ejected(self) -> bool:
        """Whether only its breaker keeps requests away: it is alive, and a last resort."""
        alive = self.probes.healthy is True and not self.draining and self.address is not None
        return alive and self.breaker.state is BreakerState.OPEN

    @property
    def own_in_flight(self) -> int:
        """Those of the requests in flight that we sent."""
        return self.in_flight - self.elsewhere

    @property
    def own_tokens(self) -> float:
        """The tokens of these."""
        return max(0.0, self.tokens - self.tokens_elsewhere)

    @property
    def handoffs(self) -> int:
        """Hand-offs that a P holds for requests whose answer has not ended, ours and other replicas'."""
        return self.pending_handoffs + self.handoffs_elsewhere

    @property
    def drained(self) -> bool:
        """Whether it is draining, and nothing is left on it that anybody sent or that waits to be fetched."""
        return self.draining and not self.in_flight and not self.handoffs

    @property
    def on_trial(self) -> bool:
        """Whether it was ejected and its trial request runs: no other goes there first meanwhile.

        Requests from before the ejection, which may run for minutes, are no trial.
        """
        trial = self._trial
        return self.breaker.state is BreakerState.HALF_OPEN and trial is not None and trial.active

    @property
    def on_our_trial(self) -> bool:
        """Whether its trial request is one of ours, not of another replica of the scheduler."""
        return self.on_trial and self._trial is not None and not self._trial.elsewhere

    @property
    def waiting(self) -> float:
        """Requests queued there: the last scrape's, plus what we have sent since and it cannot know of.

        The second part is what keeps a burst between two scrapes from herding to one instance.
        """
        scraped = self.metrics.waiting if self.metrics else 0.0
        return max(0.0, scraped + self.in_flight - self.in_flight_at_scrape)

    @property
    def requests(self) -> float:
        """Requests running or queued there: ours exactly, and others' (another scheduler's) as last seen."""
        return self.in_flight + self.others_requests

    def prefill_cost(self, request: RequestContext) -> float:
        """Predicted seconds of prefill for a request, as far as its prompt is not cached there."""
        load = self.prefill
        return load.cost(request.uncached(self.holder, load.trust), request.prompt_tokens)

    @property
    def kv_tokens(self) -> float:
        """Tokens of KV cache in use: ours as reserved, others' as last seen."""
        return self.tokens + self.others_tokens

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use at the last scrape, 0 to 1."""
        return self.metrics.kv_usage if self.metrics else 0.0

    @property
    def latency(self) -> float | None:
        """See :attr:`MetricsSnapshot.latency`."""
        return self.metrics.latency if self.metrics else None

    def resolved(self, now: float) -> None:
        """Note that its name was looked up."""
        _set(self, "resolved_at", now)

    def described(self, instance: PDInstance) -> None:
        """Take how it is described now: its key, TLS name, models and revision."""
        _set(self, "instance", instance)
        self.models.configure(instance.models)

    def move(self, address: str, breaker: Breaker) -> None:
        """Put it at another address, where this breaker counts."""
        _set(self, "address", address)
        _set(self, "breaker", breaker)

    def drain(self, draining: bool) -> bool:
        """Keep new requests away, or no more; return whether that is a change."""
        if self.draining is draining:
            return False
        self._load_changes()  # what it holds for us is told to other replicas
        _set(self, "draining", draining)
        _set(self, "drain_told", self.drained)
        return True

    def drain_ended(self) -> bool:
        """Whether it is drained, and was not yet when it began to drain or this was last asked."""
        if self.drain_told or not self.drained:
            return False
        _set(self, "drain_told", True)
        return True

    def scraped(self, snapshot: MetricsSnapshot, in_flight: int, tokens: float) -> None:
        """Note a scrape, and what of ours was there when it was asked for."""
        self._load_changes()
        _set(self, "metrics", snapshot)
        _set(self, "scraped_at", snapshot.taken_at)
        _set(self, "in_flight_at_scrape", in_flight)
        _set(self, "tokens_at_scrape", tokens)
        if snapshot.kv_capacity is not None:
            _set(self, "kv_capacity", snapshot.kv_capacity)
        if snapshot.transfer_rate is not None:
            _set(self, "transfer_rate", snapshot.transfer_rate)
        if snapshot.adapter_slots:
            self.models.holds(snapshot.adapter_slots)
        self._see_others()

    def forget_metrics(self) -> None:
        """Take its load for not known any more."""
        self._load_changes()
        _set(self, "metrics", None)
        _set(self, "in_flight_at_scrape", 0)
        _set(self, "tokens_at_scrape", 0.0)
        self._see_others()

    def _see_others(self) -> None:
        """Work out what is there of others, which many picks read between two scrapes."""
        metrics, requests, tokens = self.metrics, 0.0, 0.0
        if metrics is not None:
            requests = max(0.0, metrics.running + metrics.waiting - self.in_flight_at_scrape)
            if self.kv_capacity is not None:
                tokens = max(0.0, metrics.kv_usage * self.kv_capacity - self.tokens_at_scrape)
        _set(self, "others_requests", requests)
        _set(self, "others_tokens", tokens)

    def take(self, reservation: Reservation) -> None:
        """Count a request from now on."""
        self._load_changes()
        _set(self, "drain_told", False)
        _set(self, "in_flight", self.in_flight + 1)
        _set(self, "tokens", self.tokens + reservation.tokens)
        if self.breaker.state is BreakerState.HALF_OPEN and not self.on_trial:
            _set(self, "_trial", reservation)

    def joins_trial(self, sibling: Endpoint) -> None:
        """Take a sibling's trial request for its own: their process is on trial."""
        self._load_changes()
        _set(self, "_trial", sibling._trial)

    def tried_elsewhere(self, trial: Reservation) -> None:
        """Take another replica's request for the trial, if none of ours is."""
        self._load_changes()
        if not self.on_trial:
            _set(self, "_trial", trial)

    def sent_elsewhere(self, requests: int, tokens: int) -> None:
        """Count so many requests and tokens of other replicas more, or less."""
        self._load_changes()
        if requests > 0:
            _set(self, "drain_told", False)
        _set(self, "in_flight", self.in_flight + requests)
        _set(self, "elsewhere", self.elsewhere + requests)
        _set(self, "tokens_elsewhere", max(0.0, self.tokens_elsewhere + tokens))
        _set(self, "tokens", max(0.0, self.tokens + tokens) if self.in_flight else 0.0)

    def never_there(self, requests: int, tokens: int) -> None:
        """Take back so many requests and tokens that other replicas claim, and that no scrape has shown."""
        self.sent_elsewhere(-requests, -tokens)
        _set(self, "in_flight_at_scrape", max(0, self.in_flight_at_scrape - requests))
        _set(self, "tokens_at_scrape", max(0.0, self.tokens_at_scrape - tokens))
        self._see_others()

    def holds_elsewhere(self, handoffs: int) -> None:
        """Count so many hand-offs of other replicas more, or less."""
        if handoffs > 0:
            _set(self, "drain_told", False)
        _set(self, "handoffs_elsewhere", max(0, self.handoffs_elsewhere + handoffs))

    def work_changes(self) -> None:
        """Note that its queue of prefills has others' work."""
        self._load_changes()

    def recount(self, tokens: float) -> None:
        """Count so many tokens more, or less, for a request that is there."""
        self._load_changes()
        _set(self, "tokens", max(0.0, self.tokens + tokens))

    def give_back(self, reservation: Reservation) -> None:
        """Count a request no more."""
        self._load_changes()
        _set(self, "in_flight", self.in_flight - 1)
        _set(self, "tokens", max(0.0, self.tokens - reservation.tokens) if self.in_flight else 0.0)

    def keep_handoff(self) -> None:
        """Count a hand-off that it holds for a decode instance."""
        _set(self, "drain_told", False)
        _set(self, "pending_handoffs", self.pending_handoffs + 1)
        if self.draining:
            self._load_changes()

    def end_handoff(self) -> None:
        """Count a hand-off no more: its request's answer has ended."""
        _set(self, "pending_handoffs", self.pending_handoffs - 1)
        if self.draining:
            self._load_changes()

    def served(self) -> None:
        """Note a request that went well."""
        self.doubts.clear()
        self.pause.served()

    def say_full(self, now: float, retry_after: float | None) -> None:
        """Leave it alone for a while, since it says that it is full."""
        self._load_changes()
        self.pause.begin(now, retry_after)

    def started(self, started_at: float | None) -> bool:
        """Note when its process was started; return whether it is another one than before."""
        before = self.started_at
        _set(self, "started_at", started_at)
        if before is None or started_at is None or before == started_at:
            return False
        self.prefill.reset()
        self.holder.clear()
        self.breaker.restarted()
        self.doubts.reset()
        anew: dict[str, object] = {
            "generation": self.generation + 1,
            "in_flight": 0, "in_flight_at_scrape": 0, "tokens": 0.0, "tokens_at_scrape": 0.0,
            "elsewhere": 0, "tokens_elsewhere": 0.0, "handoffs_elsewhere": 0,
        }  # fmt: skip
        for name, value in anew.items():
            _set(self, name, value)
        self.models.forget()
        self.pause.forget()
        self.spoken.forget()
        self._see_others()
        return True

    def _load_changes(self) -> None:
        for changed in self.watchers:
            changed.add(self)
