"""Prometheus metrics of what passes between this scheduler and the other replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..replicas import Disbelieved, Ignored
from ..sync.channel import Dropped
from ..sync.sync import Sync


class ReplicasCollector(Collector):
    """What passes between this scheduler and the other replicas; no metrics if there are none."""

    def __init__(self, sync: Callable[[], Sync | None], clock: Callable[[], float]) -> None:
        self._sync = sync
        self._clock = clock

    def describe(self) -> list[Metric]:
        """Return nothing: it collects when it is scraped, and not before."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        sync = self._sync()
        if sync is None:
            return
        replica, traffic = sync.replica, sync.channel.traffic
        yield GaugeMetricFamily(
            "pd_scheduler_replicas_connected",
            "1 if the server by which replicas meet is connected.",
            float(not sync.channel.problem),
        )
        silent = replica.silent_for(self._clock())
        yield GaugeMetricFamily("pd_scheduler_replicas", "Other replicas that are heard.", len(silent))
        yield GaugeMetricFamily(
            "pd_scheduler_replicas_silent_seconds",
            "Time since something was heard of the other replica that has been silent for longest.",
            max(silent.values(), default=0.0),
        )
        yield GaugeMetricFamily(
            "pd_scheduler_replicas_differing",
            "Other replicas that are configured in another way than this one.",
            len(sync.greetings.differing()),
        )
        yield _counted(
            "pd_scheduler_replica_messages",
            "Messages sent and received.",
            "direction",
            {"sent": traffic.sent, "received": traffic.received},
        )
        yield _counted(
            "pd_scheduler_replica_message_bytes",
            "Bytes of these messages.",
            "direction",
            {"sent": traffic.sent_bytes, "received": traffic.received_bytes},
        )
        yield _counted(
            "pd_scheduler_replica_messages_dropped",
            "Messages that were not sent, by reason.",
            "reason",
            {each.value: traffic.dropped[each] for each in Dropped},
        )
        yield _counted(
            "pd_scheduler_replica_messages_ignored",
            "Messages that were received and not used, by reason.",
            "reason",
            {each.value: replica.ignored[each] for each in Ignored},
        )
        yield _counted(
            "pd_scheduler_replica_claims_disbelieved",
            "Claims in messages that were used, which were not believed or not in full, by kind.",
            "kind",
            {each.value: replica.disbelieved[each] for each in Disbelieved},
        )


def _counted(name: str, text: str, label: str, counts: Mapping[str, float]) -> Metric:
    """Return a counter with a count for each value of its label."""
    found = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        found.add_metric([value], count)
    return found
