"""Our own Prometheus metrics. Gauges are read from the registry when they are scraped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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

    def forwarded(self, decode: Endpoint, served: Served) -> None:
        """Count a request that goes to decode."""
        self._requests.labels(decode.id, served).inc()

    def rejected(self, answer: Reject) -> None:
        """Count a request that was answered with an error."""
        self._rejected.labels(str(answer.status), answer.reason).inc()

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


class _RegistryCollector(Collector):
    def __init__(self, registry: Registry, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._clock = clock

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        labels = ["instance", "role"]
        state = GaugeMetricFamily(
            "pd_instance_state", "1 for the state that an instance is in.", labels=[*labels, "state"]
        )
        in_flight = GaugeMetricFamily("pd_in_flight", "Requests of ours on an instance.", labels=labels)
        waiting = GaugeMetricFamily(
            "pd_waiting", "Requests queued on an instance: scraped, plus sent since.", labels=labels
        )
        kv_usage = GaugeMetricFamily("pd_kv_cache_usage", "KV-cache use, 0 to 1, as scraped.", labels=labels)
        age = GaugeMetricFamily(
            "pd_metrics_age_seconds", "Age of the last scrape that succeeded.", labels=labels
        )
        now = self._clock()
        for endpoint in self._registry:
            values = [endpoint.id, endpoint.instance.role.value]
            for one in InstanceState:
                state.add_metric([*values, one.value], float(endpoint.state is one))
            in_flight.add_metric(values, endpoint.in_flight)
            if endpoint.metrics is not None:
                waiting.add_metric(values, endpoint.waiting)
                kv_usage.add_metric(values, endpoint.kv_usage)
                age.add_metric(values, now - endpoint.metrics.taken_at)
        ready = GaugeMetricFamily("pd_routable_instances", "Instances that can serve.", labels=["role"])
        for role in InstanceRole:
            ready.add_metric([role.value], len(self._registry.routable(role)))
        yield from (state, in_flight, waiting, kv_usage, age, ready)


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
