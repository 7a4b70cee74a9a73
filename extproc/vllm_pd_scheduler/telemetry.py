"""Our own Prometheus metrics. Gauges are read from what they tell of when they are scraped."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from .errors import Reject
from .models import InstanceRole, InstanceState
from .registry import Endpoint, Registry, Reservation
from .shadow import GAINS_S, Shadow
from .waiting import WaitingLine

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Served(StrEnum):
    """How a request was served."""

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


class Left(StrEnum):
    """How a request left the scheduler's queue."""

    SERVED = "served"
    REFUSED = "refused"
    GONE = "gone"
    """Its client did not wait for it."""


class Telemetry:
    """Counters and histograms of the request path, in a Prometheus registry of their own."""

    def __init__(self, registry: Registry, clock: Callable[[], float] = time.monotonic) -> None:
        self.prometheus = CollectorRegistry()
        self._clock = clock
        self._requests = Counter(
            "pd_requests",
            "Requests sent to a decode instance, by how they were served.",
            ["decode", "served"],
            registry=self.prometheus,
        )
        self._rejected = Counter(
            "pd_requests_rejected",
            "Requests answered with an error in place of an instance's answer.",
            ["status", "reason"],
            registry=self.prometheus,
        )
        self._queue_seconds = Histogram(
            "pd_queue_wait_seconds",
            "Time in the scheduler's queue of requests that had to wait, by how they left it.",
            ["outcome"],
            buckets=_SECONDS,
            registry=self.prometheus,
        )
        for outcome in Left:
            self._queue_seconds.labels(outcome)
        self._prefill_seconds = Histogram(
            "pd_prefill_duration_seconds",
            "Time of the prefill leg, as the scheduler sees it.",
            ["prefill"],
            buckets=_SECONDS,
            registry=self.prometheus,
        )
        self._predicted = Histogram(
            "pd_prefill_predicted_ratio",
            "Predicted over measured time of a prefill, queueing included: 1 is right.",
            ["prefill"],
            buckets=(0.1, 0.25, 0.5, 0.8, 0.9, 1.1, 1.25, 2, 4, 10),
            registry=self.prometheus,
        )
        self._prefill_failures = Counter(
            "pd_prefill_failures",
            "Prefill attempts that gave no hand-off.",
            ["prefill", "reason"],
            registry=self.prometheus,
        )
        self._attempts = Counter(
            "pd_decode_attempt_failures",
            "Attempts at a decode instance that failed; 'cut' is a stream that a client lost.",
            ["decode", "failure"],
            registry=self.prometheus,
        )
        self._handoffs = Counter(
            "pd_handoffs_unused",
            "Hand-offs that no decode used: freed on P at once, left to the lease, or too late to be used.",
            ["prefill", "outcome"],
            registry=self.prometheus,
        )
        self._scrape_failures = Counter(
            "pd_scrape_failures",
            "Scrapes of an instance's /metrics that failed.",
            ["instance"],
            registry=self.prometheus,
        )
        self.prometheus.register(_RegistryCollector(registry, clock))

    def watch(self, line: WaitingLine, held: Callable[[], int]) -> None:
        """Show who waits in a line, and the bytes of bodies that ``held`` says are held in all."""
        self.prometheus.register(_QueueCollector(line, held))

    def forwarded(self, decode: Endpoint, served: Served) -> None:
        """Count a request that goes to decode."""
        self._requests.labels(decode.id, served).inc()

    def rejected(self, answer: Reject) -> None:
        """Count a request that was answered with an error."""
        self._rejected.labels(str(answer.status), answer.reason).inc()

    def left_queue(self, outcome: Left, seconds: float) -> None:
        """Take how long a request waited in the scheduler."""
        self._queue_seconds.labels(outcome).observe(seconds)

    @contextmanager
    def prefill(self, endpoint: Endpoint) -> Iterator[None]:
        """Time a prefill leg that gives an answer."""
        start = self._clock()
        yield
        self._prefill_seconds.labels(endpoint.id).observe(self._clock() - start)

    def prefill_predicted(self, reservation: Reservation, now: float) -> None:
        """Compare what was predicted of a prefill that ends now with what it took."""
        took = now - reservation.at
        if took > 0:
            ratio = (reservation.wait + reservation.cost) / took
            self._predicted.labels(reservation.endpoint.id).observe(ratio)

    def prefill_failed(self, endpoint: Endpoint, reason: str) -> None:
        """Count a prefill attempt that gave no hand-off."""
        self._prefill_failures.labels(endpoint.id, reason).inc()

    def attempt_failed(self, endpoint: Endpoint, failure: str) -> None:
        """Count an attempt at decode that failed."""
        self._attempts.labels(endpoint.id, failure).inc()

    def handoff_released(self, prefill: Endpoint) -> None:
        """Count a hand-off that was freed on P."""
        self._handoffs.labels(prefill.id, "released").inc()

    def handoff_stranded(self, prefill: Endpoint) -> None:
        """Count a hand-off that could not be freed."""
        self._handoffs.labels(prefill.id, "stranded").inc()

    def handoff_late(self, prefill: Endpoint) -> None:
        """Count a hand-off that was too old to be used."""
        self._handoffs.labels(prefill.id, "late").inc()

    def scrape_failed(self, endpoint: Endpoint) -> None:
        """Count a scrape that failed."""
        self._scrape_failures.labels(endpoint.id).inc()

    def watch_shadow(self, shadow: Callable[[], Shadow | None]) -> None:
        """Have the page show what the shadow strategy of the moment, if there is one, has found."""
        self.prometheus.register(_ShadowCollector(shadow))

    def page(self) -> bytes:
        """Return the Prometheus text page."""
        return generate_latest(self.prometheus)


def _prefill_rate(endpoint: Endpoint, _: float) -> float | None:
    per_token = endpoint.prefill.per_token
    return 1 / per_token if per_token > 0 else None


def _decode_step(endpoint: Endpoint, _: float) -> float:
    return endpoint.decode.step(endpoint.requests, endpoint.kv_tokens)


_Read = Callable[[Endpoint, float], float | None]
"""Reads a value of an endpoint at a time; ``None``: there is none yet."""

_OF_ALL: tuple[tuple[str, str, _Read], ...] = (
    ("pd_in_flight", "Requests of ours on an instance.", lambda e, _: e.in_flight),
    (
        "pd_waiting",
        "Requests queued on an instance: scraped, plus sent since.",
        lambda e, _: e.waiting if e.metrics else None,
    ),
    (
        "pd_kv_cache_usage",
        "KV-cache use, 0 to 1, as scraped.",
        lambda e, _: e.kv_usage if e.metrics else None,
    ),
    (
        "pd_metrics_age_seconds",
        "Age of the last scrape that succeeded.",
        lambda e, now: now - e.metrics.taken_at if e.metrics else None,
    ),
    (
        "pd_tokens_in_flight",
        "Tokens of our requests on an instance: to compute for prefill, prompt and answer for decode.",
        lambda e, _: e.tokens,
    ),
    ("pd_kv_capacity_tokens", "Tokens that its KV cache holds, as scraped.", lambda e, _: e.kv_capacity),
    ("pd_prefix_blocks", "Prompt blocks that are taken for cached there.", lambda e, _: len(e.holder)),
)
_OF_PREFILL: tuple[tuple[str, str, _Read], ...] = (
    ("pd_prefill_rate", "Learned: prompt tokens a second, without attention's share.", _prefill_rate),
    (
        "pd_prefill_overhead_seconds",
        "Learned: time of a prefill of no tokens.",
        lambda e, _: e.prefill.overhead,
    ),
    (
        "pd_prefill_left_seconds",
        "Predicted time until the prefills that we have sent there are done.",
        lambda e, now: e.prefill.left(now),
    ),
    (
        "pd_prefix_trust",
        "Learned: share of the tokens taken for cached there that were.",
        lambda e, _: e.prefill.trust,
    ),
)
_OF_DECODE: tuple[tuple[str, str, _Read], ...] = (
    ("pd_decode_step_seconds", "Predicted time of a decode step with what runs there now.", _decode_step),
)


class _RegistryCollector(Collector):
    def __init__(self, registry: Registry, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._clock = clock

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._states()
        yield from self._values(_OF_ALL, tuple(self._registry))
        yield from self._values(_OF_PREFILL, self._registry.endpoints(InstanceRole.PREFILL))
        yield from self._values(_OF_DECODE, self._registry.endpoints(InstanceRole.DECODE))
        ratios = GaugeMetricFamily(
            "pd_bytes_per_token", "Learned: bytes of prompt that make a token.", labels=["model"]
        )
        for model, ratio in self._registry.load.ratios().items():
            ratios.add_metric([model], ratio)
        yield ratios

    def _states(self) -> Iterator[Metric]:
        state = GaugeMetricFamily(
            "pd_instance_state",
            "1 for the state that an instance is in.",
            labels=["instance", "role", "state"],
        )
        for endpoint in self._registry:
            for one in InstanceState:
                values = [endpoint.id, endpoint.instance.role.value, one.value]
                state.add_metric(values, float(endpoint.state is one))
        ready = GaugeMetricFamily("pd_routable_instances", "Instances that can serve.", labels=["role"])
        for role in InstanceRole:
            ready.add_metric([role.value], len(self._registry.routable(role)))
        yield from (state, ready)

    def _values(
        self, table: tuple[tuple[str, str, _Read], ...], endpoints: Sequence[Endpoint]
    ) -> Iterator[Metric]:
        now = self._clock()
        for name, text, read in table:
            family = GaugeMetricFamily(name, text, labels=["instance", "role"])
            for endpoint in endpoints:
                if (value := read(endpoint, now)) is not None:
                    family.add_metric([endpoint.id, endpoint.instance.role.value], value)
            yield family


class _QueueCollector(Collector):
    def __init__(self, line: WaitingLine, held: Callable[[], int]) -> None:
        self._line = line
        self._held = held

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily(
            "pd_queue_requests", "Requests that wait in the scheduler.", labels=["priority"]
        )
        tally = Tally(ticket.request.priority for ticket in self._line.by_arrival())
        for priority, count in ({0: 0} | tally).items():
            waiting.add_metric([str(priority)], count)
        yield waiting
        yield GaugeMetricFamily("pd_queue_bytes", "Bytes of their bodies.", self._line.bytes)
        yield GaugeMetricFamily(
            "pd_held_bytes", "Bytes of request bodies between arrival and decode.", self._held()
        )


class _ShadowCollector(Collector):
    def __init__(self, shadow: Callable[[], Shadow | None]) -> None:
        self._shadow = shadow

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        shadow = self._shadow()
        if shadow is None:
            return
        labels = ["strategy", "role"]
        picks = CounterMetricFamily(
            "pd_shadow_picks",
            "Picks that the shadow strategy was asked for too, by what came of it.",
            labels=[*labels, "outcome"],
        )
        gains = HistogramMetricFamily(
            "pd_shadow_gain_seconds",
            "Predicted seconds by which the shadow's choice, where it differed, would have been better.",
            labels=labels,
        )
        for role, tally in shadow.tallies.items():
            values = [shadow.name, role.value]
            for outcome in ("agreed", "differed", "failed"):
                picks.add_metric([*values, outcome], getattr(tally, outcome))
            bounds = [*map(str, GAINS_S), "+Inf"]
            gains.add_metric(values, list(zip(bounds, accumulate(tally.gains), strict=True)), None)
        yield from (picks, gains)
