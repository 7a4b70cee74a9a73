"""Counters and histograms of the request path."""

import unittest

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_pd_scheduler.telemetry import Ending, QueueOutcome, Served, Telemetry


class TelemetryTest(unittest.TestCase):
    def setUp(self) -> None:
        self.telemetry = Telemetry()

    def read(self, name: str) -> dict[tuple[str, ...], float]:
        """The samples of a name: their label values, in order of the labels' names."""
        return {
            tuple(value for _, value in sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(generate_latest(self.telemetry.prometheus).decode())
            for sample in family.samples
            if sample.name == name
        }

    def test_requests(self) -> None:
        self.telemetry.forwarded("d0", Served.SPLIT)
        self.telemetry.forwarded("d0", Served.SPLIT)
        self.telemetry.forwarded("d0", Served.LOCAL)
        self.assertEqual(
            self.read("pd_scheduler_requests_total"), {("d0", "split"): 2.0, ("d0", "local"): 1.0}
        )

    def test_rejections(self) -> None:
        self.telemetry.rejected(503, "no_decode")
        self.assertEqual(self.read("pd_scheduler_requests_rejected_total"), {("no_decode", "503"): 1.0})

    def test_prefill(self) -> None:
        self.telemetry.prefills.took("p0", 0.75)
        self.telemetry.prefills.failed("p0", "timeout")
        self.assertEqual(self.read("pd_scheduler_prefill_duration_seconds_sum"), {("p0",): 0.75})
        self.assertEqual(self.read("pd_scheduler_prefill_duration_seconds_count"), {("p0",): 1.0})
        self.assertEqual(self.read("pd_scheduler_prefill_failures_total"), {("p0", "timeout"): 1.0})

    def test_scrapes(self) -> None:
        self.telemetry.instances.scrape_failed("d0")
        self.assertEqual(self.read("pd_scheduler_scrape_failures_total"), {("d0",): 1.0})

    def test_the_time_in_the_queue(self) -> None:
        counts = "pd_scheduler_queue_wait_seconds_count"
        self.assertEqual(self.read(counts), {(one.value,): 0.0 for one in QueueOutcome})
        self.telemetry.waited(QueueOutcome.SERVED, 0.5)
        self.telemetry.waited(QueueOutcome.GONE, 2.0)
        self.assertEqual(self.read(counts), {("served",): 1.0, ("refused",): 0.0, ("gone",): 1.0})
        self.assertEqual(self.read("pd_scheduler_queue_wait_seconds_sum")["gone",], 2.0)

    def test_removed_instances_leave_no_series(self) -> None:
        for name in ("d0", "d1"):
            self.telemetry.forwarded(name, Served.SPLIT)
            self.telemetry.decodes.attempt_failed(name, "reset")
            self.telemetry.handoffs.late(name)
            self.telemetry.prefills.predicted(name, 1.0)
        self.telemetry.keep_only({"d1"})
        self.assertNotIn("d0", generate_latest(self.telemetry.prometheus).decode())
        self.assertEqual(self.read("pd_scheduler_requests_total"), {("d1", "split"): 1.0})
        for name in ("d0", "d1"):  # one that is back begins anew
            self.telemetry.forwarded(name, Served.SPLIT)
        self.assertEqual(
            self.read("pd_scheduler_requests_total"), {("d0", "split"): 1.0, ("d1", "split"): 2.0}
        )

    def test_totals_of_all_instances(self) -> None:
        for name in ("d0", "d1"):
            self.telemetry.forwarded(name, Served.SPLIT)
        self.telemetry.rejected(503, "no_decode")
        for ending in Ending:
            self.telemetry.answers.ended(Served.SPLIT, ending, 0.105, 1.0)
        self.telemetry.prefills.prompt_read(100.0, 90.0, 40.0)
        self.telemetry.prefills.prompt_read(100.0, 90.0, None)
        totals = self.telemetry.totals
        self.assertEqual(totals.requests, 3)
        self.assertEqual(dict(totals.errors), dict.fromkeys(("no_decode", "client_error", "error", "cut"), 1))
        self.assertEqual((totals.prompt_tokens, totals.cached_tokens), (100.0, 40.0))
        counts = {count for bound, count in totals.ttft.buckets if 0.1 < float(bound) < 0.12}
        self.assertEqual(counts, {float(len(Ending))}, "within a tenth")

    def test_two_routers_do_not_share_counters(self) -> None:
        other = Telemetry()
        self.telemetry.forwarded("d0", Served.WHOLE)
        self.assertNotIn(b'decode="d0"', generate_latest(other.prometheus))


if __name__ == "__main__":
    unittest.main()
