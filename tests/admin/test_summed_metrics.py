"""The metrics of several workers on one page: sums that never fall when a worker dies."""

from __future__ import annotations

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_pd_scheduler.admin.collectors import collectors
from vllm_pd_scheduler.admin.summed_metrics import FIRSTS, MAX_KEPT, SUMMED_GAUGES, Counted, SummedMetrics
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.router import PDRouter


class Worker:
    """A worker's metrics, of the kinds that there are."""

    def __init__(self, started: float) -> None:
        self.registry = CollectorRegistry()
        self.started = Gauge("process_start_time_seconds", "Start.", registry=self.registry)
        self.started.set(started)
        self.requests = Counter("requests", "Requests.", ["decode"], registry=self.registry)
        self.seconds = Histogram("seconds", "Seconds.", registry=self.registry, buckets=(1, 2))
        self.queue = Gauge("pd_scheduler_queue_requests", "Queue.", ["priority"], registry=self.registry)
        self.load = Gauge("pd_scheduler_waiting", "Of the fleet.", registry=self.registry)
        self.changes = Counter("pd_scheduler_instance_state_changes", "Fleet.", registry=self.registry)

    @property
    def page(self) -> bytes:
        page: bytes = generate_latest(self.registry)
        return b"\n".join(line for line in page.split(b"\n") if b"_created" not in line)


def read(summed: SummedMetrics, first: str, **workers: Worker) -> dict[str, float]:
    text = b"".join(summed.page(first, {name: each.page for name, each in workers.items()})).decode()
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counts_are_sums_and_the_fleet_is_the_firsts() -> None:
    w0, w1 = Worker(10), Worker(11)
    w0.requests.labels("d0").inc(2)
    w1.requests.labels("d0").inc(3)
    w1.requests.labels('d "1"\\\n').inc(1)
    w0.seconds.observe(0.5)
    w1.seconds.observe(1.5)
    w0.queue.labels("0").set(4)
    w1.queue.labels("0").set(5)
    w1.queue.labels("7").set(6)
    w0.load.set(7)
    w1.load.set(8)
    w0.changes.inc(3)
    w1.changes.inc(4)
    found = read(SummedMetrics(), "w0", w0=w0, w1=w1)
    assert found["requests_total{d0}"] == 5
    assert found['requests_total{d "1"\\\n}'] == 1
    assert [found[f"seconds_bucket{{{bound}}}"] for bound in ("1.0", "2.0", "+Inf")] == [1, 2, 2]
    assert (found["seconds_count"], found["seconds_sum"]) == (2, 2.0)
    assert found["pd_scheduler_queue_requests{0}"] == 9
    assert found["pd_scheduler_queue_requests{7}"] == 6
    assert found["pd_scheduler_waiting"] == 7
    assert found["pd_scheduler_instance_state_changes_total"] == 3
    assert found["process_start_time_seconds"] == 10


def test_requests_of_other_workers_are_not_elsewhere() -> None:
    """The first sees those of another worker, 3, and those of a replica on another machine, 4."""
    pages = {}
    for worker, own, elsewhere in (("w0", 2, 7), ("w1", 3, 6)):
        registry = CollectorRegistry()
        for name, value in (("pd_scheduler_in_flight", own), ("pd_scheduler_in_flight_elsewhere", elsewhere)):
            Gauge(name, "Requests.", ["instance", "role"], registry=registry).labels("d0", "decode").set(
                value
            )
        pages[worker] = generate_latest(registry)
    text = b"".join(SummedMetrics().page("w0", pages)).decode()
    assert 'pd_scheduler_in_flight{instance="d0",role="decode"} 5.0' in text
    assert 'pd_scheduler_in_flight_elsewhere{instance="d0",role="decode"} 4.0' in text


def test_what_a_dead_worker_has_told_still_counts_and_counts_once() -> None:
    summed, w0, w1 = SummedMetrics(), Worker(10), Worker(11)
    w0.requests.labels("d0").inc(2)
    w1.requests.labels("d0").inc(3)
    assert read(summed, "w0", w0=w0, w1=w1)["requests_total{d0}"] == 5
    assert read(summed, "w0", w0=w0)["requests_total{d0}"] == 5, "it is dead, or hangs"
    assert read(summed, "w0", w0=w0, w1=w1)["requests_total{d0}"] == 5, "it did hang"
    again = Worker(12)
    again.requests.labels("d0").inc(1)
    for _ in range(2):
        assert read(summed, "w0", w0=w0, w1=again)["requests_total{d0}"] == 6


def test_the_next_first_worker_goes_on_from_there() -> None:
    summed, w0, w1 = SummedMetrics(), Worker(10), Worker(11)
    w0.requests.labels("d0").inc(2)
    w1.requests.labels("d0").inc(3)
    read(summed, "w0", w0=w0, w1=w1)
    kept = msgspec.msgpack.decode(msgspec.msgpack.encode(summed.counted), type=Counted)
    summed, again = SummedMetrics(kept), Worker(12)
    assert read(summed, "w1", w1=w1)["requests_total{d0}"] == 5
    again.requests.labels("d1").inc(1)
    found = read(summed, "w1", w0=again, w1=w1)
    assert (found["requests_total{d0}"], found["requests_total{d1}"]) == (5, 1)


def test_what_is_kept_of_the_dead_is_bounded() -> None:
    summed = SummedMetrics()
    for start in range(4):
        worker = Worker(start)
        for number in range(MAX_KEPT // 2):
            worker.requests.labels(f"d{start}-{number}").inc()
        read(summed, "w0", w0=worker)
    assert sum(map(len, summed.counted.ended.values())) <= MAX_KEPT


def test_the_names_are_those_of_metrics_that_there_are() -> None:
    router = PDRouter(SchedulerConfig())
    names = {
        family.name + ("_total" if family.type == "counter" else "")
        for registry in (router.telemetry.prometheus, collectors(router, lambda: 0.0))
        for family in registry.collect()
    }
    assert names >= SUMMED_GAUGES | FIRSTS
