"""Counters and histograms of what happens to requests.

The other rooms call :class:`Telemetry` when something happens; it imports none of them. What can be read from
the fleet at any moment (gauges) is in ``admin/collectors.py``.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram

from .by_revision import ByRevision
from .histogram import LeanHistogram, Series

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Buckets of prefill legs and waits: from a cached prompt up to ``prefill_timeout``'s default."""

_ANSWER_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Buckets of what a client waits for: from an answer of one token up to one of many thousands."""
_FINE_SECONDS = tuple(0.001 * 1.1**step for step in range(140))
"""Bounds between which percentiles are right within a few percent, up to ten minutes."""
_PICK_SECONDS = (5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3, 0.025)
"""Buckets of a pick: from one among a few instances up to a strategy that holds up all requests."""
_ANSWER_TOKENS = (0, 1, 10, 50, 100, 500, 1000, 5000, 10_000, 50_000)

MAX_PAIRS = 1000
"""Pairs of P and D, or of two D, that have a series of their own; further ones count as of ``OTHER``."""
OTHER = "other"


class Served(StrEnum):
    """How a request was served: the label ``served`` of ``pd_scheduler_requests_total``."""

    SPLIT = "split"
    """Prefill on P, decode on D."""
    WHOLE = "whole"
    """On D alone, since it cannot be split."""
    LOCAL = "local"
    """On D alone, since no P could prefill it."""
    ALONE = "alone"
    """On D alone, since that was predicted to be faster, or is configured."""
    PASSED = "passed"
    """Another path or method, on D as it is."""


class Ending(StrEnum):
    """How a request ended that was sent to D: the label ``outcome`` of ``pd_scheduler_responses_total``."""

    OK = "ok"
    """A whole answer, of a status below 400."""
    CLIENT_ERROR = "client_error"
    """A 4xx."""
    ERROR = "error"
    """A 5xx, or no answer at all."""
    LEFT = "left"
    """The client left before the end."""
    CUT = "cut"
    """The answer had begun, and broke off."""


_ERRORS = frozenset({Ending.CLIENT_ERROR, Ending.ERROR, Ending.CUT})


class Stray(StrEnum):
    """What Envoy has told of, or asked for, a request of another run: the label ``what`` of
    ``pd_scheduler_strays_total``."""

    ATTEMPT = "attempt"
    """That an attempt has failed."""
    RESULT = "result"
    """How it has ended."""
    QUESTION = "question"
    """Whether it may be tried again."""


class QueueOutcome(StrEnum):
    """How a request left the queue: the label ``outcome`` of ``pd_scheduler_queue_wait_seconds``."""

    SERVED = "served"
    """It got an endpoint, or learned that none can serve."""
    REFUSED = "refused"
    GONE = "gone"
    """Its client left while it waited."""


@dataclass(slots=True)
class Totals:
    """Sums over all instances since the start: read in a moment, however many instances there are."""

    requests: int = 0
    """Requests sent to a decode instance or answered with an error."""
    errors: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Errors that clients got: reasons of the scheduler's own, and how D's answers ended."""
    ttft: Series = field(default_factory=lambda: Series(_FINE_SECONDS))
    """Time to first token."""
    prompt_tokens: float = 0.0
    """Tokens of the prompts of which P has said how many it had cached."""
    cached_tokens: float = 0.0
    """Those that it had."""


class Telemetry:
    """Counters and histograms of the request path, in a Prometheus registry of their own.

    ``docs/metrics.md`` describes each metric. ``clock`` returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.prometheus = CollectorRegistry()
        self.totals = Totals()
        self._clock = clock
        self._requests = Counter(
            "pd_scheduler_requests",
            "Requests sent to a decode instance, by how they were served.",
            ["decode", "served"],
            registry=self.prometheus,
        )
        self._rejected = Counter(
            "pd_scheduler_requests_rejected",
            "Requests answered with an error in place of an instance's answer.",
            ["status", "reason"],
            registry=self.prometheus,
        )
        self._queue_seconds = Histogram(
            "pd_scheduler_queue_wait_seconds",
            "Time in the scheduler's queue of requests that had to wait, by how they left it.",
            ["outcome"],
            buckets=_SECONDS,
            registry=self.prometheus,
        )
        for outcome in QueueOutcome:  # all series exist from the start, so that rate() has a first value
            self._queue_seconds.labels(outcome)
        self._rewrites = Counter(
            "pd_scheduler_rewrites",
            "Requests whose model was chosen by a rule, by the rule's name and the model that they got.",
            ["rule", "model"],
            registry=self.prometheus,
        )
        self._encode_seconds = Histogram(
            "pd_scheduler_encode_duration_seconds",
            "Time that an encode instance took for an item, as the scheduler sees it.",
            ["encode"],
            buckets=_SECONDS,
            registry=self.prometheus,
        )
        self._encode_failures = Counter(
            "pd_scheduler_encode_failures",
            "Attempts to encode an item that handed nothing over.",
            ["encode", "reason"],
            registry=self.prometheus,
        )
        self._media_items = Counter(
            "pd_scheduler_media_items",
            "Images, videos and sounds in requests: encoded by an encode instance, or left to the prefill.",
            ["outcome"],
            registry=self.prometheus,
        )
        for kind in ("encoded", "left"):
            self._media_items.labels(kind)
        self._prefill_seconds = Histogram(
            "pd_scheduler_prefill_duration_seconds",
            "Time of the prefill leg, as the scheduler sees it.",
            ["prefill"],
            buckets=_SECONDS,
            registry=self.prometheus,
        )
        self._predicted = Histogram(
            "pd_scheduler_prefill_predicted_ratio",
            "Predicted over measured time of a prefill, queueing included: 1 is right.",
            ["prefill"],
            # Fine around 1, which is right, and up to ten times too much or too little.
            buckets=(0.1, 0.25, 0.5, 0.8, 0.9, 1.1, 1.25, 2, 4, 10),
            registry=self.prometheus,
        )
        self._prefill_failures = Counter(
            "pd_scheduler_prefill_failures",
            "Prefill attempts that gave no hand-off.",
            ["prefill", "reason"],
            registry=self.prometheus,
        )
        self._attempts = Counter(
            "pd_scheduler_decode_attempt_failures",
            "Attempts at a decode instance that failed; 'cut' is a stream that a client lost.",
            ["decode", "failure"],
            registry=self.prometheus,
        )
        self._kv_events = Counter(
            "pd_scheduler_kv_event_batches",
            "Batches of KV events of an endpoint: read, lost on the way, or bad.",
            ["endpoint", "outcome"],
            registry=self.prometheus,
        )
        self._handoffs = Counter(
            "pd_scheduler_handoffs_unused",
            "Hand-offs that no decode used: freed on P at once, left to the lease, or too late to be used.",
            ["prefill", "outcome"],
            registry=self.prometheus,
        )
        self._scrape_failures = Counter(
            "pd_scheduler_scrape_failures",
            "Scrapes of an instance's /metrics that failed.",
            ["instance"],
            registry=self.prometheus,
        )
        self._local_errors = Counter(
            "pd_scheduler_local_errors",
            "Requests to instances that could not be sent for a reason of this machine's own.",
            ["kind"],
            registry=self.prometheus,
        )
        self._streams_broken_off = Counter(
            "pd_scheduler_streams_continued",
            "Streams with x-pd-continue that broke off at their D, by what became of them.",
            ["outcome"],
            registry=self.prometheus,
        )
        self._went_on = LeanHistogram(
            "pd_scheduler_continued_after_tokens",
            "Tokens of a stream with x-pd-continue that its client had when another D went on with it.",
            ["failed", "decode"],
            buckets=_ANSWER_TOKENS,
            registry=self.prometheus,
        )
        self._turns = Counter(
            "pd_scheduler_turns",
            "Instances that were to have another role, by who has asked, and by whether they have it.",
            ["role", "by", "outcome"],
            registry=self.prometheus,
        )
        self._log_lines_dropped = Counter(
            "pd_scheduler_log_lines_dropped",
            "Lines of output that were dropped, since nobody read what the process prints.",
            registry=self.prometheus,
        )
        self._event_loop_lag = Histogram(
            "pd_scheduler_event_loop_lag_seconds",
            "How late the event loop came to a timer: what each request waits for it, several times over.",
            # From what a short callback takes up to a stall.
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2),
            registry=self.prometheus,
        )
        self._event_loop_stalls = Counter(
            "pd_scheduler_event_loop_stalls",
            "Times that the event loop stood still, and requests went on without the scheduler.",
            registry=self.prometheus,
        )

        self._self_checks = Counter(
            "pd_scheduler_self_checks",
            "Tries of self-checks, by what came of them.",
            ["result"],
            registry=self.prometheus,
        )
        self._state_changes = Counter(
            "pd_scheduler_instance_state_changes",
            "Changes of an instance's state, by the state that it came to; 'trial' follows an ejection.",
            ["instance", "role", "state"],
            registry=self.prometheus,
        )

        self._time_to_first_token = self._by_served(
            "pd_scheduler_time_to_first_token_seconds",
            "From the first byte of a client's request to the first of its answer's body, by Envoy's clock.",
        )
        self._request_seconds = self._by_served(
            "pd_scheduler_request_duration_seconds",
            "From the first byte of a client's request to the end of its answer, by Envoy's clock.",
        )
        self._handoff_seconds = LeanHistogram(
            "pd_scheduler_handoff_duration_seconds",
            "From the moment when D had a request with a hand-off to the first byte of its answer's body.",
            ["prefill", "decode"],
            buckets=_SECONDS,
            registry=self.prometheus,
        )
        strays = Counter(
            "pd_scheduler_strays",
            "What Envoy has told or asked of requests that another scheduler has, or had before a restart.",
            ["what"],
            registry=self.prometheus,
        )
        self._strays = {what: strays.labels(what) for what in Stray}
        responses = Counter(
            "pd_scheduler_responses",
            "Requests sent to decode that have ended, by how.",
            ["outcome"],
            registry=self.prometheus,
        )
        self._responses = {ending: responses.labels(ending) for ending in Ending}
        self.by_revision = ByRevision(self.prometheus, _ANSWER_SECONDS)
        self._picks = LeanHistogram(
            "pd_scheduler_pick_duration_seconds",
            "Time of a pick.",
            ["role"],
            buckets=_PICK_SECONDS,
            registry=self.prometheus,
        )
        self._metaserver_calls = Counter(
            "pd_scheduler_metaserver_calls",
            "Calls by which decode instances have asked for prefills.",
            ["outcome"],
            registry=self.prometheus,
        )
        self._prompt_tokens = Counter(
            "pd_scheduler_prompt_tokens",
            "Tokens of prompts that P has computed or had cached.",
            registry=self.prometheus,
        )
        cached = Counter(
            "pd_scheduler_cached_prompt_tokens",
            "Tokens of prompts in P's cache: as predicted, and as P has said.",
            ["kind"],
            registry=self.prometheus,
        )
        self._pulled_tokens = Counter(
            "pd_scheduler_pulled_prompt_tokens",
            "Tokens of prompts that P was told to pull from another instance, which had them cached.",
            ["source", "outcome"],
            registry=self.prometheus,
        )
        self._cached = {kind: cached.labels(kind) for kind in ("predicted", "actual")}

        self._by_instance: tuple[tuple[Counter | Histogram, str], ...] = (
            (self._requests, "decode"),
            (self._encode_seconds, "encode"),
            (self._encode_failures, "encode"),
            (self._prefill_seconds, "prefill"),
            (self._predicted, "prefill"),
            (self._prefill_failures, "prefill"),
            (self._attempts, "decode"),
            (self._handoffs, "prefill"),
            (self._pulled_tokens, "source"),
            (self._scrape_failures, "instance"),
            (self._state_changes, "instance"),
        )

    def _by_served(self, name: str, documentation: str) -> dict[Served, Series]:
        made = LeanHistogram(
            name, documentation, ["served"], buckets=_ANSWER_SECONDS, registry=self.prometheus
        )
        return {served: made.series(served) for served in Served}

    def keep_only(self, instances: Collection[str]) -> None:
        """Forget the series of all other instances, which were removed: else they would add up for ever."""
        for label in ("prefill", "decode"):
            self._handoff_seconds.keep(label, frozenset((*instances, OTHER)))
        for label in ("failed", "decode"):
            self._went_on.keep(label, frozenset((*instances, OTHER)))
        for metric, label in self._by_instance:
            seen = {sample.labels[label] for family in metric.collect() for sample in family.samples}
            for gone in seen.difference(instances):
                metric.remove_by_labels({label: gone})

    def forwarded(self, decode: str, served: Served) -> None:
        """Count a request that was sent to a decode instance."""
        self._requests.labels(decode, served).inc()
        self.totals.requests += 1

    def rejected(self, status: int, reason: str) -> None:
        """Count a request that the scheduler itself answered with an error."""
        self._rejected.labels(str(status), reason).inc()
        self.totals.requests += 1
        self.totals.errors[reason] += 1

    def rewritten(self, rule: str, model: str) -> None:
        """Count a request that has got a model by a rule."""
        self._rewrites.labels(rule, model).inc()

    def picks(self, role: str) -> Callable[[float], None]:
        """Return what records how long a pick for a role took, in seconds."""
        return self._picks.series(role).observe

    def ended(self, served: Served, ending: Ending, ttft: float | None, duration: float) -> None:
        """Count a request that was sent to decode and has ended, with its times in seconds."""
        self._responses[ending].inc()
        if ending in _ERRORS:
            self.totals.errors[ending.value] += 1
        self._request_seconds[served].observe(duration)
        if ttft is not None:
            self._time_to_first_token[served].observe(ttft)
            self.totals.ttft.observe(ttft)

    def strayed(self, what: Stray) -> None:
        """Count what came here of a request that is not of this run."""
        self._strays[what].inc()

    def handed_off(self, prefill: str, decode: str, seconds: float) -> None:
        """Record how long it took from D's having a hand-off to its first byte."""
        pairs = self._handoff_seconds
        if len(pairs) >= MAX_PAIRS and not pairs.has(prefill, decode):
            prefill = decode = OTHER
        pairs.series(prefill, decode).observe(seconds)

    def prompt_read(self, tokens: float, predicted: float, actual: float | None) -> None:
        """Count a prompt that P has read, and how many of its tokens were said to be, and were, cached."""
        self._prompt_tokens.inc(tokens)
        self._cached["predicted"].inc(predicted)
        if actual is not None:
            self._cached["actual"].inc(actual)
            self.totals.prompt_tokens += tokens
            self.totals.cached_tokens += actual

    def prefix_pulled(self, source: str, tokens: float, paid: bool) -> None:
        """Count tokens that P was told to pull from another instance, and whether that has paid."""
        self._pulled_tokens.labels(source, "ok" if paid else "in_vain").inc(tokens)

    def waited(self, outcome: QueueOutcome, seconds: float) -> None:
        """Record how long a request waited in the scheduler's queue, and how that ended."""
        self._queue_seconds.labels(outcome).observe(seconds)

    def encoded(self, instance: str, seconds: float) -> None:
        """Record an item that an encode instance has encoded, and how long it took."""
        self._encode_seconds.labels(instance).observe(seconds)

    def encode_failed(self, instance: str, reason: str) -> None:
        """Count an attempt to encode an item that failed; ``reason`` as in ``docs/metrics.md``."""
        self._encode_failures.labels(instance, reason).inc()

    def media_items(self, encoded: int, left: int) -> None:
        """Count a request's items: those that were encoded before the prefill, and those that were not."""
        self._media_items.labels("encoded").inc(encoded)
        self._media_items.labels("left").inc(left)

    @contextmanager
    def time_prefill(self, instance: str) -> Iterator[None]:
        """Measure the block, a prefill leg. One that raises an exception is not measured."""
        start = self._clock()
        yield
        self._prefill_seconds.labels(instance).observe(self._clock() - start)

    def prefill_predicted(self, instance: str, ratio: float) -> None:
        """Record predicted over measured time of a prefill."""
        self._predicted.labels(instance).observe(ratio)

    def prefill_failed(self, instance: str, reason: str) -> None:
        """Count a prefill attempt that returned no hand-off; ``reason`` as in ``docs/metrics.md``."""
        self._prefill_failures.labels(instance, reason).inc()

    def attempt_failed(self, instance: str, failure: str) -> None:
        """Count an attempt at a decode instance that failed; ``failure`` as in ``docs/metrics.md``."""
        self._attempts.labels(instance, failure).inc()

    def metaserver_called(self, outcome: str) -> None:
        """Count a call by which somebody has asked for a prefill."""
        self._metaserver_calls.labels(outcome).inc()

    def kv_event_batches(self, endpoint: str, outcome: str, count: int) -> None:
        """Count batches of KV events; ``outcome`` is ``read``, ``lost`` or ``bad``."""
        self._kv_events.labels(endpoint, outcome).inc(count)

    def handoff_released(self, prefill: str) -> None:
        """Count an unused hand-off whose blocks were freed on P."""
        self._handoffs.labels(prefill, "released").inc()

    def handoff_stranded(self, prefill: str) -> None:
        """Count an unused hand-off that was not freed: P keeps its blocks until the lease ends."""
        self._handoffs.labels(prefill, "stranded").inc()

    def handoff_late(self, prefill: str) -> None:
        """Count a hand-off that was too old to be used when D was to get it."""
        self._handoffs.labels(prefill, "late").inc()

    def scrape_failed(self, instance: str) -> None:
        """Count a scrape of an instance's metrics that failed."""
        self._scrape_failures.labels(instance).inc()

    def state_changed(self, instance: str, role: str, state: str) -> None:
        """Count that an instance came to a state."""
        self._state_changes.labels(instance, role, state).inc()

    def self_checked(self, result: str) -> None:
        """Count a try of a self-check; ``result`` as in ``docs/metrics.md``."""
        self._self_checks.labels(result).inc()

    def local_error(self, kind: str) -> None:
        """Count a request that could not be sent for a reason of our own."""
        self._local_errors.labels(kind).inc()

    def stream_broke_off(self, outcome: str, failed: str, decode: str | None, tokens: int) -> None:
        """Count a stream that broke off at its D after so many tokens; ``decode`` has written the rest."""
        self._streams_broken_off.labels(outcome).inc()
        if decode is not None:
            pairs = self._went_on
            if len(pairs) >= MAX_PAIRS and not pairs.has(failed, decode):
                failed = decode = OTHER
            pairs.series(failed, decode).observe(tokens)

    def turned(self, role: str, by: str, *, done: bool) -> None:
        """Count an instance that was to have another ``role``, as an operator or the advice has asked."""
        self._turns.labels(role, by, "turned" if done else "failed").inc()

    def log_lines_dropped(self, lines: int) -> None:
        """Count lines of output that were dropped."""
        self._log_lines_dropped.inc(lines)

    def event_loop_late(self, seconds: float) -> None:
        """Record how late the event loop came to a timer."""
        self._event_loop_lag.observe(seconds)

    def event_loop_stalled(self) -> None:
        """Count that the event loop stood still for so long that requests went on without it."""
        self._event_loop_stalls.inc()
