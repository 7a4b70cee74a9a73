"""The scheduler's own metrics page."""

import unittest

from prometheus_client.parser import text_string_to_metric_families

from vllm_pd_scheduler.errors import reject
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot, PDInstance, RequestContext
from vllm_pd_scheduler.registry import Endpoint, Registry
from vllm_pd_scheduler.telemetry import Left, Served, Telemetry
from vllm_pd_scheduler.waiting import Ticket, WaitingLine


class TelemetryTest(unittest.TestCase):
    def setUp(self) -> None:
        self.now = 100.0
        self.registry = Registry()
        self.telemetry = Telemetry(self.registry, clock=lambda: self.now)
        self.p0 = self.add("p0", InstanceRole.PREFILL)
        self.d0 = self.add("d0", InstanceRole.DECODE)

    def add(self, name: str, role: InstanceRole) -> Endpoint:
        return self.registry.add(PDInstance(name, role, "10.0.0.1", 80))

    def read(self, name: str) -> dict[tuple[str, ...], float]:
        """The samples of a name: their label values, in order of the labels' names."""
        return {
            tuple(value for _, value in sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.telemetry.page().decode())
            for sample in family.samples
            if sample.name == name
        }

    def test_requests(self) -> None:
        self.telemetry.forwarded(self.d0, Served.SPLIT)
        self.telemetry.forwarded(self.d0, Served.SPLIT)
        self.telemetry.forwarded(self.d0, Served.LOCAL)
        self.assertEqual(self.read("pd_requests_total"), {("d0", "split"): 2.0, ("d0", "local"): 1.0})

    def test_rejections(self) -> None:
        self.telemetry.rejected(reject(503, "x", "no_decode"))
        self.assertEqual(self.read("pd_requests_rejected_total"), {("no_decode", "503"): 1.0})

    def test_prefill(self) -> None:
        with self.telemetry.prefill(self.p0):
            self.now += 0.75
        with self.assertRaises(ValueError), self.telemetry.prefill(self.p0):
            raise ValueError
        self.telemetry.prefill_failed(self.p0, "timeout")
        self.assertEqual(self.read("pd_prefill_duration_seconds_sum"), {("p0",): 0.75})
        self.assertEqual(self.read("pd_prefill_duration_seconds_count"), {("p0",): 1.0})
        self.assertEqual(self.read("pd_prefill_failures_total"), {("p0", "timeout"): 1.0})

    def test_scrapes(self) -> None:
        self.telemetry.scrape_failed(self.d0)
        self.assertEqual(self.read("pd_scrape_failures_total"), {("d0",): 1.0})

    def test_gauges_are_the_registry_as_it_is_now(self) -> None:
        states = ("starting", "healthy", "unhealthy", "draining")
        self.assertEqual(
            self.read("pd_instance_state"),
            {
                (name, role, state): float(state == "starting")
                for name, role in (("p0", "prefill"), ("d0", "decode"))
                for state in states
            },
        )
        self.assertEqual(self.read("pd_routable_instances"), {("prefill",): 0.0, ("decode",): 0.0})
        self.assertEqual(self.read("pd_waiting"), {}, "not known before the first scrape")
        self.registry.probed(self.d0, None)
        self.registry.scraped(self.d0, MetricsSnapshot(90.0, 3.0, 2.0, 0.5), 0)
        held = self.registry.reserve(self.d0)
        labels = ("d0", "decode")
        self.assertEqual(self.read("pd_instance_state")[*labels, "healthy"], 1.0)
        self.assertEqual(self.read("pd_instance_state")[*labels, "starting"], 0.0)
        self.assertEqual(self.read("pd_in_flight"), {labels: 1.0, ("p0", "prefill"): 0.0})
        self.assertEqual(self.read("pd_waiting"), {labels: 3.0})
        self.assertEqual(self.read("pd_kv_cache_usage"), {labels: 0.5})
        self.assertEqual(self.read("pd_metrics_age_seconds"), {labels: 10.0})
        self.assertEqual(self.read("pd_routable_instances"), {("prefill",): 0.0, ("decode",): 1.0})
        held.release()
        self.registry.remove("d0")
        self.assertEqual(self.read("pd_in_flight"), {("p0", "prefill"): 0.0})

    def test_the_load_model(self) -> None:
        p0, d0 = ("p0", "prefill"), ("d0", "decode")
        self.assertEqual(self.read("pd_kv_capacity_tokens"), {}, "not known before the first scrape")
        self.registry.scraped(self.p0, MetricsSnapshot(90.0, kv_capacity=4096.0), 0)
        self.p0.prefill.per_token, self.p0.prefill.overhead, self.p0.prefill.trust = 1 / 8000, 0.5, 0.75
        self.p0.prefill.per_pair = 0.0
        self.d0.decode.base, self.d0.decode.per_seq, self.d0.decode.per_kv_token = 0.25, 0.5, 0.0
        request = RequestContext("/", now=99.0, prompt_tokens=4000.0, output_tokens=100.0, blocks=(1, 2, 3))
        self.registry.reserve(self.p0, request)
        self.registry.reserve(self.d0, request)
        self.assertEqual(self.read("pd_prefill_rate"), {p0: 8000.0})
        self.assertEqual(self.read("pd_prefill_overhead_seconds"), {p0: 0.5})
        self.assertEqual(self.read("pd_prefill_left_seconds"), {p0: 0.0}, "one second of work, one ago")
        self.now = 99.25
        self.assertEqual(self.read("pd_prefill_left_seconds"), {p0: 0.75})
        self.assertEqual(self.read("pd_prefix_trust"), {p0: 0.75})
        self.assertEqual(self.read("pd_decode_step_seconds"), {d0: 0.75})
        self.assertEqual(self.read("pd_tokens_in_flight"), {p0: 4000.0, d0: 4100.0})
        self.assertEqual(self.read("pd_kv_capacity_tokens"), {p0: 4096.0})
        self.assertEqual(self.read("pd_prefix_blocks"), {p0: 3.0, d0: 3.0})

    def test_a_prefill_that_costs_nothing_by_the_token_has_no_rate(self) -> None:
        self.p0.prefill.per_token = 0.0
        self.assertEqual(self.read("pd_prefill_rate"), {})

    def test_bytes_per_token(self) -> None:
        self.registry.load.learn_bytes('a "model"\n', 300, 100)
        self.registry.load.learn_bytes(None, 500, 100)
        self.assertEqual(self.read("pd_bytes_per_token"), {('a "model"\n',): 3.0, ("",): 5.0})

    def test_the_queue(self) -> None:
        line = WaitingLine(10, 1000)
        self.telemetry.watch(line, lambda: 77)
        self.assertEqual(self.read("pd_queue_requests"), {("0",): 0.0})
        for priority in (5, 0, 5):
            line.push(Ticket(RequestContext("/", priority=priority), InstanceRole.PREFILL, 100), 0.0)
        self.assertEqual(self.read("pd_queue_requests"), {("0",): 1.0, ("5",): 2.0})
        self.assertEqual(self.read("pd_queue_bytes"), {(): 300.0})
        self.assertEqual(self.read("pd_held_bytes"), {(): 77.0})

    def test_the_time_in_the_queue(self) -> None:
        counts = "pd_queue_wait_seconds_count"
        self.assertEqual(self.read(counts), {(one.value,): 0.0 for one in Left})
        self.telemetry.left_queue(Left.SERVED, 0.5)
        self.telemetry.left_queue(Left.GONE, 2.0)
        self.assertEqual(self.read(counts), {("served",): 1.0, ("refused",): 0.0, ("gone",): 1.0})
        self.assertEqual(self.read("pd_queue_wait_seconds_sum")["gone",], 2.0)

    def test_two_routers_do_not_share_counters(self) -> None:
        other = Telemetry(self.registry)
        self.telemetry.forwarded(self.d0, Served.WHOLE)
        self.assertNotIn(b'served="whole"', other.page())


if __name__ == "__main__":
    unittest.main()
