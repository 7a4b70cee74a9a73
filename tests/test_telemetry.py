"""The scheduler's own metrics page."""

import unittest

from prometheus_client.parser import text_string_to_metric_families

from vllm_pd_scheduler.errors import reject
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot, PDInstance
from vllm_pd_scheduler.registry import Endpoint, Registry
from vllm_pd_scheduler.telemetry import Served, Telemetry


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

    def test_two_routers_do_not_share_counters(self) -> None:
        other = Telemetry(self.registry)
        self.telemetry.forwarded(self.d0, Served.WHOLE)
        self.assertNotIn(b'served="whole"', other.page())


if __name__ == "__main__":
    unittest.main()
