"""What two scrapes of an instance tell of the time between them."""

import unittest
from dataclasses import replace

from vllm_pd_scheduler.health.vllm_metrics import (
    LATENCY_KEPT_S,
    Scrape,
    parse_metrics,
    snapshot,
)
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot

P, D = InstanceRole.PREFILL, InstanceRole.DECODE


def scrape(**histograms: tuple[float, float]) -> Scrape:
    return Scrape(1.0, 2.0, 0.5, {f"vllm:{name}": value for name, value in histograms.items()})


class SnapshotTest(unittest.TestCase):
    LAST = MetricsSnapshot(1.0, latency=0.4)

    def latency(
        self, now: Scrape, before: Scrape | None, last: MetricsSnapshot | None = LAST, role: InstanceRole = P
    ) -> float | None:
        return snapshot(now, before, last, role, 2.0).latency

    def test_gauges(self) -> None:
        self.assertEqual(
            snapshot(scrape(), None, None, P, 7.0),
            MetricsSnapshot(taken_at=7.0, running=1.0, waiting=2.0, kv_usage=0.5, latency=None),
        )

    def test_the_latency_is_that_of_the_requests_in_between(self) -> None:
        before = scrape(time_to_first_token_seconds=(100.0, 50.0))
        now = scrape(time_to_first_token_seconds=(101.0, 54.0))
        self.assertEqual(self.latency(now, before), 0.25)

    def test_one_scrape_tells_no_latency(self) -> None:
        self.assertIsNone(self.latency(scrape(time_to_first_token_seconds=(100.0, 50.0)), None, None))

    def test_without_requests_in_between_the_last_one_stays(self) -> None:
        same = scrape(time_to_first_token_seconds=(100.0, 50.0))
        self.assertEqual(self.latency(same, same), 0.4)
        self.assertIsNone(self.latency(same, same, None))

    def test_a_latency_of_long_ago_is_forgotten(self) -> None:
        """One that was slow once would get no request that shows it to be fast."""
        same = scrape(time_to_first_token_seconds=(100.0, 50.0))
        before = scrape(time_to_first_token_seconds=(40.0, 49.0))
        last = snapshot(same, before, None, P, 10.0)
        self.assertEqual((last.latency, last.latency_at), (60.0, 10.0))
        for now, expected in ((20.0, 60.0), (10.0 + LATENCY_KEPT_S, 60.0), (10.5 + LATENCY_KEPT_S, None)):
            last = snapshot(same, same, last, P, now)
            self.assertEqual(last.latency, expected)

    def test_no_mean_takes_days(self) -> None:
        before = scrape(time_to_first_token_seconds=(0.0, 0.0))
        self.assertIsNone(self.latency(scrape(time_to_first_token_seconds=(1e15, 1.0)), before))

    def test_a_restart_forgets_it(self) -> None:
        before = scrape(time_to_first_token_seconds=(100.0, 50.0))
        self.assertIsNone(self.latency(scrape(time_to_first_token_seconds=(0.3, 2.0)), before))

    def test_a_page_that_lost_the_histogram_keeps_it(self) -> None:
        before = scrape(time_to_first_token_seconds=(100.0, 50.0))
        self.assertEqual(self.latency(scrape(), before), 0.4)
        self.assertEqual(self.latency(before, scrape()), 0.4)

    def test_each_role_has_its_own(self) -> None:
        before = scrape(
            time_to_first_token_seconds=(0.0, 0.0), request_time_per_output_token_seconds=(0.0, 0.0)
        )
        now = scrape(
            time_to_first_token_seconds=(4.0, 2.0), request_time_per_output_token_seconds=(0.06, 2.0)
        )
        self.assertEqual(self.latency(now, before, role=P), 2.0)
        self.assertEqual(self.latency(now, before, role=D), 0.03)

    def test_decode_under_its_older_name(self) -> None:
        before = scrape(time_per_output_token_seconds=(1.0, 10.0))
        now = scrape(time_per_output_token_seconds=(1.5, 20.0))
        self.assertEqual(self.latency(now, before, role=D), 0.05)
        self.assertEqual(self.latency(now, before, role=P), 0.4)

    def test_it_is_never_negative(self) -> None:
        before = scrape(time_to_first_token_seconds=(5.0, 10.0))
        self.assertEqual(self.latency(scrape(time_to_first_token_seconds=(4.9, 11.0)), before), 0.0)

    def counted(self, generated: float, finished: float, **histograms: tuple[float, float]) -> Scrape:
        return replace(scrape(**histograms), generated=generated, finished=finished, kv_capacity=64.0)

    def test_what_happened_in_between(self) -> None:
        before = self.counted(
            1000, 10, inter_token_latency_seconds=(5.0, 500.0), nixl_xfer_time_seconds=(1.0, 10.0)
        )
        now = self.counted(
            1600, 13, inter_token_latency_seconds=(11.0, 800.0), nixl_xfer_time_seconds=(1.6, 12.0)
        )
        found = snapshot(now, before, None, D, 2.0)
        self.assertEqual((found.output_tokens, found.finished, found.kv_capacity), (600.0, 3.0, 64.0))
        self.assertAlmostEqual(found.step_time or 0.0, 0.02)
        self.assertAlmostEqual(found.transfer or 0.0, 0.3)

    def test_what_was_transferred_in_between(self) -> None:
        before = scrape(nixl_xfer_time_seconds=(1.0, 10.0), nixl_bytes_transferred=(1e9, 10.0))
        now = scrape(nixl_xfer_time_seconds=(1.5, 12.0), nixl_bytes_transferred=(3e9, 12.0))
        self.assertEqual(snapshot(now, before, None, D, 2.0).transfer_rate, 4e9)
        self.assertIsNone(snapshot(now, now, None, D, 2.0).transfer_rate)
        for counted, expected in ((9.0, 4.0), (5.0, 0.0), (3.0, 0.0), (None, None)):
            found = replace(now, failed_transfers=counted)
            found_before = replace(before, failed_transfers=5.0)
            self.assertEqual(snapshot(found, found_before, None, D, 2.0).failed_transfers, expected)
        self.assertIsNone(snapshot(replace(now, failed_transfers=9.0), None, None, D, 2.0).failed_transfers)

    def test_failed_transfers_are_read(self) -> None:
        page = b'vllm:num_requests_running 1\nvllm:nixl_num_failed_transfers_total{engine="0"} 3.0\n'
        self.assertEqual(parse_metrics(page).failed_transfers, 3.0)
        self.assertIsNone(parse_metrics(b"vllm:num_requests_running 1\n").failed_transfers)

    def test_nothing_in_between_is_nothing_known(self) -> None:
        same = self.counted(5, 5, inter_token_latency_seconds=(5.0, 5.0), nixl_xfer_time_seconds=(1.0, 1.0))
        for before in (None, same):
            found = snapshot(same, before, self.LAST, D, 2.0)
            self.assertEqual((found.output_tokens, found.finished), (0.0, 0.0))
            self.assertEqual((found.step_time, found.transfer), (None, None))

    def test_counters_that_went_back_count_nothing(self) -> None:
        before = self.counted(1000, 10, inter_token_latency_seconds=(5.0, 500.0))
        for now in (
            self.counted(10, 1, inter_token_latency_seconds=(0.1, 9.0)),
            self.counted(2000, 1, inter_token_latency_seconds=(0.1, 9.0)),
        ):
            found = snapshot(now, before, None, D, 2.0)
            self.assertEqual((found.output_tokens, found.finished, found.step_time), (0.0, 0.0, None))

    def test_steps_under_their_older_name(self) -> None:
        before = self.counted(0, 0, time_per_output_token_seconds=(1.0, 10.0))
        now = self.counted(0, 0, time_per_output_token_seconds=(1.5, 20.0))
        self.assertEqual(snapshot(now, before, None, D, 2.0).step_time, 0.05)


if __name__ == "__main__":
    unittest.main()
