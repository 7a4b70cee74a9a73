"""Gauges of the metrics page, read from the fleet, the queue and the shadow as they are then."""

import platform
import unittest

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.given import give
from vllm_pd_scheduler import __version__
from vllm_pd_scheduler.admin.collectors import collectors
from vllm_pd_scheduler.admission.queue import Ticket
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot, PDInstance
from vllm_pd_scheduler.replicas import FleetKey, Replica
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.router import PDRouter


class CollectorsTest(unittest.TestCase):
    def setUp(self) -> None:
        self.now = 100.0
        self.router = PDRouter(SchedulerConfig())
        self.registry = self.router.registry
        self.gauges = collectors(self.router, lambda: self.now)
        self.p0 = self.add("p0", InstanceRole.PREFILL)
        self.d0 = self.add("d0", InstanceRole.DECODE)

    def add(self, name: str, role: InstanceRole) -> Endpoint:
        return self.registry.add(PDInstance(name, role, "10.0.0.1", 80))

    def read(self, name: str) -> dict[tuple[str, ...], float]:
        """The samples of a name: their label values, in order of the labels' names."""
        return {
            tuple(value for _, value in sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(generate_latest(self.gauges).decode())
            for sample in family.samples
            if sample.name == name
        }

    def test_what_runs(self) -> None:
        self.assertEqual(
            self.read("pd_scheduler_build_info"), {(platform.python_version(), __version__): 1.0}
        )
        self.router.scheduler.strategies.prepare({InstanceRole.DECODE: "weighted"})()
        self.assertEqual(
            self.read("pd_scheduler_strategy_info"),
            {("prefill", "least_load"): 1.0, ("decode", "weighted"): 1.0},
        )
        self.assertGreater(self.read("process_resident_memory_bytes")[()], 0)

    def test_gauges_are_the_registry_as_it_is_now(self) -> None:
        states = ("starting", "healthy", "unhealthy", "draining", "ejected")
        self.assertEqual(
            self.read("pd_scheduler_instance_state"),
            {
                (name, role, state): float(state == "starting")
                for name, role in (("p0", "prefill"), ("d0", "decode"))
                for state in states
            },
        )
        self.assertEqual(self.read("pd_scheduler_routable_instances"), {("prefill",): 0.0, ("decode",): 0.0})
        self.assertEqual(self.read("pd_scheduler_waiting"), {}, "not known before the first scrape")
        self.registry.probed(self.d0, None)
        self.registry.scraped(self.d0, MetricsSnapshot(90.0, 3.0, 2.0, 0.5), 0)
        held = self.registry.work.reserve(self.d0)
        labels = ("d0", "decode")
        self.assertEqual(self.read("pd_scheduler_instance_state")[*labels, "healthy"], 1.0)
        self.assertEqual(self.read("pd_scheduler_instance_state")[*labels, "starting"], 0.0)
        self.assertEqual(self.read("pd_scheduler_in_flight"), {labels: 1.0, ("p0", "prefill"): 0.0})
        self.assertEqual(self.read("pd_scheduler_waiting"), {labels: 3.0})
        self.assertEqual(self.read("pd_scheduler_kv_cache_usage"), {labels: 0.5})
        self.assertEqual(self.read("pd_scheduler_metrics_age_seconds"), {labels: 10.0})
        self.assertEqual(self.read("pd_scheduler_routable_instances"), {("prefill",): 0.0, ("decode",): 1.0})
        held.release()
        self.registry.remove("d0")
        self.assertEqual(self.read("pd_scheduler_in_flight"), {("p0", "prefill"): 0.0})

    def test_what_replicas_sum_is_our_own(self) -> None:
        self.assertEqual(self.read("pd_scheduler_in_flight_elsewhere"), {})
        Replica(self.registry, "a", FleetKey("fleet"))
        self.registry.work.reserve(self.d0, RequestContext("/", prompt_tokens=90.0, output_tokens=10.0))
        self.d0.sent_elsewhere(3, 3000)
        labels = ("d0", "decode")
        self.assertEqual(self.read("pd_scheduler_in_flight")[labels], 1.0)
        self.assertEqual(self.read("pd_scheduler_in_flight_elsewhere")[labels], 3.0)
        self.assertEqual(self.read("pd_scheduler_tokens_in_flight")[labels], 100.0)

    def test_the_load_model(self) -> None:
        p0, d0 = ("p0", "prefill"), ("d0", "decode")
        self.assertEqual(
            self.read("pd_scheduler_kv_capacity_tokens"), {}, "not known before the first scrape"
        )
        self.registry.scraped(self.p0, MetricsSnapshot(90.0, kv_capacity=4096.0), 0)
        give(self.p0.prefill, per_token=1 / 8000, overhead=0.5, trust=0.75, per_pair=0.0)
        give(self.d0.decode, base=0.25, per_seq=0.5, per_kv_token=0.0)
        request = RequestContext("/", now=99.0, prompt_tokens=4000.0, output_tokens=100.0, blocks=(1, 2, 3))
        self.registry.work.reserve(self.p0, request)
        self.registry.work.reserve(self.d0, request)
        self.assertEqual(self.read("pd_scheduler_prefill_rate"), {p0: 8000.0})
        self.assertEqual(self.read("pd_scheduler_prefill_overhead_seconds"), {p0: 0.5})
        self.assertEqual(
            self.read("pd_scheduler_prefill_left_seconds"), {p0: 0.0}, "one second of work, one ago"
        )
        self.now = 99.25
        self.assertEqual(self.read("pd_scheduler_prefill_left_seconds"), {p0: 0.75})
        self.assertEqual(self.read("pd_scheduler_prefix_trust"), {p0: 0.75})
        self.assertEqual(self.read("pd_scheduler_decode_step_seconds"), {d0: 0.75})
        self.assertEqual(self.read("pd_scheduler_tokens_in_flight"), {p0: 4000.0, d0: 4100.0})
        self.assertEqual(self.read("pd_scheduler_kv_capacity_tokens"), {p0: 4096.0})
        self.assertEqual(self.read("pd_scheduler_prefix_blocks"), {p0: 3.0, d0: 3.0})

    def test_a_prefill_that_costs_nothing_by_the_token_has_no_rate(self) -> None:
        give(self.p0.prefill, per_token=0.0)
        self.assertEqual(self.read("pd_scheduler_prefill_rate"), {})

    def test_bytes_per_token(self) -> None:
        self.registry.load.learn_bytes('a "model"\n', 300, 100)
        self.registry.load.learn_bytes(None, 500, 100)
        self.assertEqual(self.read("pd_scheduler_bytes_per_token"), {('a "model"\n',): 3.0, ("",): 5.0})

    def test_the_queue(self) -> None:
        queue, self.router.body_memory.used = self.router.dispatcher.queue, 77
        self.assertEqual(self.read("pd_scheduler_queue_requests"), {("0",): 0.0})
        for priority in (5, 0, 5):
            queue.push(Ticket(RequestContext("/", priority=priority), InstanceRole.PREFILL, 100), 0.0)
        self.assertEqual(self.read("pd_scheduler_queue_requests"), {("0",): 1.0, ("5",): 2.0})
        self.assertEqual(self.read("pd_scheduler_queue_bytes"), {(): 300.0})
        self.assertEqual(self.read("pd_scheduler_held_bytes"), {(): 77.0})


if __name__ == "__main__":
    unittest.main()
