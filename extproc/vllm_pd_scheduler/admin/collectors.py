"""Prometheus collectors that read the fleet, the queue and the shadow strategy at each scrape.

Nothing is copied when a value changes, so these metrics cost nothing on the request path. ``docs/metrics.md``
describes each one.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from .. import __version__
from ..admission.queue import RequestQueue
from ..discovery import Membership
from ..fleet.condition import EJECTED, shown_state
from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import PD_ROLES, InstanceRole, InstanceState
from ..router import PDRouter
from ..scheduler import Scheduler
from ..scheduler.role_load import RoleLoad
from ..scheduler.shadow import GAIN_BUCKETS_S, Shadow
from ..telemetry.failures import Failures
from .replicas_collector import ReplicasCollector


def collectors(router: PDRouter, clock: Callable[[], float]) -> CollectorRegistry:
    """Return a Prometheus registry that reads a router when it is scraped; ``clock``: monotonic seconds."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_InfoCollector(router.scheduler))
    registry.register(_RegistryCollector(router.registry, clock))
    registry.register(_QueueCollector(router.dispatcher.queue, lambda: router.body_memory.used))
    registry.register(_RoleLoadCollector(RoleLoad(router.scheduler, router.dispatcher.queue), clock))
    registry.register(_DiscoveryCollector(router.membership, clock))
    registry.register(_ShadowCollector(lambda: router.scheduler.strategies.shadow))
    registry.register(ReplicasCollector(lambda: router.sync, clock))
    registry.register(_FailureCollector(router.scheduler.strategies.failures, router.connectors.failures))
    return registry


def _prefill_rate(endpoint: Endpoint, _: float) -> float | None:
    per_token = endpoint.prefill.per_token
    return 1 / per_token if per_token > 0 else None


_Getter = Callable[[Endpoint, float], float | None]
"""Returns a value of an endpoint at a time (monotonic seconds), or ``None`` if there is none yet."""

_Gauges = tuple[tuple[str, str, _Getter], ...]
"""Name, help text and value of each gauge."""

_GAUGES: _Gauges = (
    ("pd_scheduler_in_flight", "Requests of ours on an instance.", lambda e, _: e.own_in_flight),
    (
        "pd_scheduler_waiting",
        "Requests queued on an instance: scraped, plus sent since.",
        lambda e, _: e.waiting if e.metrics else None,
    ),
    (
        "pd_scheduler_kv_cache_usage",
        "KV-cache use, 0 to 1, as scraped.",
        lambda e, _: e.kv_usage if e.metrics else None,
    ),
    (
        "pd_scheduler_metrics_age_seconds",
        "Age of the last scrape that succeeded.",
        lambda e, now: now - e.scraped_at if e.scraped_at is not None else None,
    ),
    (
        "pd_scheduler_address_age_seconds",
        "Time since the DNS name of an instance was last resolved.",
        lambda e, now: now - e.resolved_at if e.resolved_at is not None else None,
    ),
    (
        "pd_scheduler_tokens_in_flight",
        "Tokens of our requests on an instance: to compute for prefill, prompt and answer for decode.",
        lambda e, _: e.own_tokens,
    ),
    (
        "pd_scheduler_kv_capacity_tokens",
        "Tokens that its KV cache holds, as scraped.",
        lambda e, _: e.kv_capacity,
    ),
    (
        "pd_scheduler_prefix_blocks",
        "Prompt blocks that are taken for cached there.",
        lambda e, _: len(e.holder),
    ),
)
_SHARED_GAUGES: _Gauges = (
    (
        "pd_scheduler_in_flight_elsewhere",
        "Requests of other replicas on an instance, as they tell.",
        lambda e, _: e.elsewhere,
    ),
)
"""With values only if there may be other replicas."""
_PREFILL_GAUGES: _Gauges = (
    (
        "pd_scheduler_prefill_rate",
        "Learned: prompt tokens a second, without attention's share.",
        _prefill_rate,
    ),
    (
        "pd_scheduler_prefill_overhead_seconds",
        "Learned: time of a prefill of no tokens.",
        lambda e, _: e.prefill.overhead,
    ),
    (
        "pd_scheduler_prefill_left_seconds",
        "Predicted time until the prefills that we and other replicas have sent there are done.",
        lambda e, now: e.prefill.remaining(now),
    ),
    (
        "pd_scheduler_prefix_trust",
        "Learned: share of the tokens taken for cached there that were.",
        lambda e, _: e.prefill.trust,
    ),
)
_DECODE_GAUGES: _Gauges = (
    (
        "pd_scheduler_decode_step_seconds",
        "Predicted time of a decode step with what runs there now.",
        lambda e, _: e.decode_step,
    ),
    (
        "pd_scheduler_transfer_bytes_per_second",
        "Bytes a second of the KV transfers to an instance, as last scraped.",
        lambda e, _: e.transfer_rate,
    ),
)


class _AtScrape(Collector):
    """Collects when it is scraped, and not before."""

    def describe(self) -> list[Metric]:
        return []  # else a registry would call collect() when the collector is registered


class _InfoCollector(_AtScrape):
    """What runs: the version, and the strategies in use. Each is a series of value 1, for joins."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily(
            "pd_scheduler_build_info", "1; the labels say which version runs.", labels=["version", "python"]
        )
        build.add_metric([__version__, platform.python_version()], 1)
        strategy = GaugeMetricFamily(
            "pd_scheduler_strategy_info",
            "1; the labels say which strategy is in use for a role.",
            labels=["role", "strategy"],
        )
        for role, name in self._scheduler.strategies.names.items():
            strategy.add_metric([role.value, name], 1)
        yield from (build, strategy)


class _RegistryCollector(_AtScrape):
    """The instances, and what the load model has learned of them."""

    def __init__(self, registry: Registry, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        yield from self._states()
        yield from self._values(_GAUGES, tuple(self._registry))
        alone = self._registry.journal is None
        yield from self._values(_SHARED_GAUGES, () if alone else tuple(self._registry))
        yield from self._values(_PREFILL_GAUGES, self._registry.endpoints(InstanceRole.PREFILL))
        yield self._busy()
        yield from self._values(_DECODE_GAUGES, self._registry.endpoints(InstanceRole.DECODE))
        ratios = GaugeMetricFamily(
            "pd_scheduler_bytes_per_token", "Learned: bytes of prompt that make a token.", labels=["model"]
        )
        for model, ratio in self._registry.load.bytes_per_token_by_model().items():
            ratios.add_metric([model], ratio)
        yield ratios
        yield from self._pairs()

    def _busy(self) -> Metric:
        busy = CounterMetricFamily(
            "pd_scheduler_prefill_busy_seconds",
            "Time in which a prefill instance was busy with our prefills.",
            labels=["instance", "role"],
        )
        for endpoint in self._registry.endpoints(InstanceRole.PREFILL):
            busy.add_metric([endpoint.id, endpoint.instance.role.value], endpoint.prefill.busy)
        return busy

    def _pairs(self) -> Iterator[Metric]:
        out = GaugeMetricFamily(
            "pd_scheduler_pairs_out",
            "Pairs of P and D that are left out since their hand-offs fail; 'prefill': all of a P's do.",
            labels=["what"],
        )
        whole = [decode is None for _, decode, _ in self._registry.pairs.out()]
        out.add_metric(["pair"], whole.count(False))
        out.add_metric(["prefill"], whole.count(True))
        slow = len(self._registry.load.transfers.slow)
        text = "Pairs of P and D whose hand-offs take several times as long as the median pair's."
        yield from (out, GaugeMetricFamily("pd_scheduler_slow_pairs", text, slow))

    def _states(self) -> Iterator[Metric]:
        state = GaugeMetricFamily(
            "pd_scheduler_instance_state",
            "1 for the state that an instance is in.",
            labels=["instance", "role", "state"],
        )
        for endpoint in self._registry:
            shown = shown_state(endpoint)
            for one in (*InstanceState, EJECTED):
                state.add_metric([endpoint.id, endpoint.instance.role.value, one], float(shown == one))
        ready = GaugeMetricFamily(
            "pd_scheduler_routable_instances", "Instances that can serve.", labels=["role"]
        )
        encodes = bool(self._registry.endpoints(InstanceRole.ENCODE))
        for role in InstanceRole if encodes else PD_ROLES:
            ready.add_metric([role.value], sum(not e.rank for e in self._registry.routable(role)))
        wrong = GaugeMetricFamily(
            "pd_scheduler_wrong_pairs",
            "1 for a pair that gave wrong texts, and gets no hand-offs any more.",
            labels=["prefill", "decode"],
        )
        for prefill, decode, _ in self._registry.wrong_pairs:
            wrong.add_metric([prefill.id, decode.id], 1)
        yield from (state, ready, wrong)

    def _values(self, gauges: _Gauges, endpoints: Sequence[Endpoint]) -> Iterator[Metric]:
        now = self._clock()
        for name, text, get in gauges:
            family = GaugeMetricFamily(name, text, labels=["instance", "role"])
            for endpoint in endpoints:
                if (value := get(endpoint, now)) is not None:
                    family.add_metric([endpoint.id, endpoint.instance.role.value], value)
            yield family


class _RoleLoadCollector(_AtScrape):
    """How much work each role has, for those who scale them."""

    def __init__(self, load: RoleLoad, clock: Callable[[], float]) -> None:
        self._load = load
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        now, load = self._clock(), self._load
        backlog = GaugeMetricFamily(
            "pd_scheduler_backlog_seconds",
            "Predicted time until a role has done what waits for it of ours, here and at its instances.",
            labels=["role"],
        )
        backlog.add_metric([InstanceRole.PREFILL.value], load.prefill_backlog(now))
        backlog.add_metric([InstanceRole.DECODE.value], load.decode_backlog(now))
        slack = GaugeMetricFamily(
            "pd_scheduler_slack_seconds",
            "What a request that came now would have left of ttft_slo (prefill) or tpot_slo (decode).",
            labels=["role"],
        )
        limits = ((InstanceRole.PREFILL, load.ttft_slack(now)), (InstanceRole.DECODE, load.tpot_slack()))
        for role, left in limits:
            if left is not None:
                slack.add_metric([role.value], left)
        use = GaugeMetricFamily(
            "pd_scheduler_decode_utilization_ratio",
            "Share of all decode instances that our requests use: of the KV cache, of tpot_slo.",
            labels=["resource"],
        )
        for resource, share in load.decode_use():
            use.add_metric([resource], share)
        yield from (backlog, slack, use)


class _DiscoveryCollector(_AtScrape):
    """The sources of instances."""

    def __init__(self, membership: Membership, clock: Callable[[], float]) -> None:
        self._membership = membership
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        age = GaugeMetricFamily(
            "pd_scheduler_discovery_age_seconds",
            "Time since a source of instances could last be read and used.",
            labels=["source"],
        )
        for source, seconds in self._membership.ages(self._clock()).items():
            age.add_metric([source], seconds)
        yield age
        yield GaugeMetricFamily(
            "pd_scheduler_discovery_refused",
            "Instances that a source names and that clash with others.",
            len(self._membership.refused),
        )


class _QueueCollector(_AtScrape):
    """The queue, and the memory of request bodies."""

    def __init__(self, queue: RequestQueue, body_bytes: Callable[[], int]) -> None:
        self._queue = queue
        self._body_bytes = body_bytes

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily(
            "pd_scheduler_queue_requests", "Requests that wait in the scheduler.", labels=["priority"]
        )
        counts = Counter(ticket.request.priority for ticket in self._queue.by_arrival())
        for priority, count in ({0: 0} | counts).items():
            waiting.add_metric([str(priority)], count)
        yield waiting
        yield GaugeMetricFamily("pd_scheduler_queue_bytes", "Bytes of their bodies.", self._queue.bytes)
        yield GaugeMetricFamily(
            "pd_scheduler_held_bytes",
            "Bytes of request bodies between arrival and decode.",
            self._body_bytes(),
        )


class _ShadowCollector(_AtScrape):
    """The comparison with the shadow strategy; no metrics while there is none."""

    def __init__(self, shadow: Callable[[], Shadow | None]) -> None:
        self._shadow = shadow

    def collect(self) -> Iterator[Metric]:
        shadow = self._shadow()
        if shadow is None:
            return
        labels = ["strategy", "role"]
        picks = CounterMetricFamily(
            "pd_scheduler_shadow_picks",
            "Picks that the shadow strategy was asked for too, by what came of it.",
            labels=[*labels, "outcome"],
        )
        gains = HistogramMetricFamily(
            "pd_scheduler_shadow_gain_seconds",
            "Predicted seconds by which the shadow's choice, where it differed, would have been better.",
            labels=labels,
        )
        for role, tally in shadow.tallies.items():
            values = [shadow.name, role.value]
            for outcome in ("agreed", "differed", "failed"):
                picks.add_metric([*values, outcome], getattr(tally, outcome))
            bounds = [*map(str, GAIN_BUCKETS_S), "+Inf"]
            gains.add_metric(values, list(zip(bounds, accumulate(tally.gains), strict=True)), None)
        yield from (picks, gains)


class _FailureCollector(_AtScrape):
    """What the strategies in use, and the connector, have raised."""

    def __init__(self, strategies: Failures, connector: Failures) -> None:
        self._strategies = strategies
        self._connector = connector

    def collect(self) -> Iterator[Metric]:
        strategies = CounterMetricFamily(
            "pd_scheduler_strategy_failures",
            "Calls of a strategy that raised an error or returned nonsense, and were answered without it.",
            labels=["strategy", "role"],
        )
        connector = CounterMetricFamily(
            "pd_scheduler_connector_failures",
            "Calls of the connector that raised an error or returned nonsense.",
            labels=["connector", "call"],
        )
        for family, failures in ((strategies, self._strategies), (connector, self._connector)):
            for labels, count in failures.counts.items():
                family.add_metric(labels, count)
            yield family
