"""vLLM's metrics page: current and older names, several engines, and pages that are none."""

import math
import unittest
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.health.vllm_metrics import NotVllmMetrics, Scrape, parse_metrics, snapshot
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot

P, D = InstanceRole.PREFILL, InstanceRole.DECODE
ITL = "vllm:inter_token_latency_seconds"
TTFT = "vllm:time_to_first_token_seconds"
TPOT = "vllm:request_time_per_output_token_seconds"
OLD_TPOT = "vllm:time_per_output_token_seconds"

CURRENT = """\
# HELP python_gc_objects_collected_total Objects collected during gc
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 1091.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny, {the} \\"best\\""} 3.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="tiny"} 21.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 20.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="deferred"} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="tiny"} 0.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="tiny"} 40.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="tiny"} 40.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="tiny"} 8.0
# TYPE vllm:time_to_first_token_seconds_created gauge
vllm:time_to_first_token_seconds_created{engine="0",model_name="tiny"} 1.7e+09
# TYPE vllm:request_time_per_output_token_seconds histogram
vllm:request_time_per_output_token_seconds_count{engine="0",model_name="tiny"} 10.0
vllm:request_time_per_output_token_seconds_sum{engine="0",model_name="tiny"} 0.5
"""

OLDER = """\
vllm:num_requests_running{model_name="tiny"} 2.0
vllm:num_requests_waiting{model_name="tiny"} 0.0
vllm:gpu_cache_usage_perc{model_name="tiny"} 0.75
vllm:time_per_output_token_seconds_sum{model_name="tiny"} 3.0
vllm:time_per_output_token_seconds_count{model_name="tiny"} 60.0
"""

ENGINES = """\
vllm:num_requests_running{engine="0"} 3.0
vllm:num_requests_running{engine="1"} 4.0
vllm:num_requests_waiting{engine="0"} 1.0
vllm:num_requests_waiting{engine="1"} 0.0
vllm:kv_cache_usage_perc{engine="0"} 0.2
vllm:kv_cache_usage_perc{engine="1"} 0.6
vllm:time_to_first_token_seconds_sum{engine="0"} 1.0
vllm:time_to_first_token_seconds_sum{engine="1"} 2.0
vllm:time_to_first_token_seconds_count{engine="0"} 10.0
vllm:time_to_first_token_seconds_count{engine="1"} 20.0
"""


class ParseTest(unittest.TestCase):
    def test_current_names(self) -> None:
        self.assertEqual(
            parse_metrics(CURRENT), Scrape(3.0, 21.0, 0.25, {TTFT: (8.0, 40.0), TPOT: (0.5, 10.0)})
        )

    def test_older_names(self) -> None:
        self.assertEqual(parse_metrics(OLDER), Scrape(2.0, 0.0, 0.75, {OLD_TPOT: (3.0, 60.0)}))

    def test_the_current_name_wins(self) -> None:
        both = "vllm:gpu_cache_usage_perc 0.9\nvllm:kv_cache_usage_perc 0.1\nvllm:num_requests_running 0\n"
        self.assertEqual(parse_metrics(both).kv_usage, 0.1)

    def test_requests_of_engines_add_up_and_their_caches_average(self) -> None:
        scrape = parse_metrics(ENGINES)
        self.assertEqual((scrape.running, scrape.waiting, scrape.histograms), (7.0, 1.0, {TTFT: (3.0, 30.0)}))
        self.assertAlmostEqual(scrape.kv_usage, 0.4)

    def test_little_is_enough(self) -> None:
        self.assertEqual(parse_metrics("vllm:num_requests_running 1"), Scrape(1.0, 0.0, 0.0, {}))
        self.assertEqual(parse_metrics("vllm:num_requests_waiting 1"), Scrape(0.0, 1.0, 0.0, {}))

    def test_half_a_histogram_is_none(self) -> None:
        page = f"vllm:num_requests_running 1\n{TTFT}_sum 5\n{TPOT}_count 5\n"
        self.assertEqual(parse_metrics(page).histograms, {})

    def test_pages_of_something_else(self) -> None:
        for page in (
            "",
            "\n\n",
            "<html><body>Not Found</body></html>",
            '{"detail": "Not Found"}',
            'python_info{version="3.11"} 1.0\n',
            "vllm:kv_cache_usage_perc 0.5\n",
            "vllm:num_requests_running_total 5\n",
            "# vllm:num_requests_running 5\n",
            "my_vllm:num_requests_running 5\n",
        ):
            with self.subTest(page), self.assertRaisesRegex(NotVllmMetrics, "is this a vLLM server"):
                parse_metrics(page)

    def test_pages_that_are_broken(self) -> None:
        for line in (
            "vllm:num_requests_running",
            "vllm:num_requests_running many",
            'vllm:num_requests_running{engine="0',
            'vllm:num_requests_running{engine="0"}',
            "vllm:num_requests_running{engine} 1",
            'vllm:num_requests_running{="0"} 1',
        ):
            with self.subTest(line), self.assertRaisesRegex(NotVllmMetrics, "cannot be parsed"):
                parse_metrics("vllm:num_requests_waiting 1\n" + line + "\n")

    def test_values_that_are_no_numbers_are_left_out(self) -> None:
        """One NaN would make every comparison of loads false, and one instance the choice for good."""
        page = """\
vllm:num_requests_running{engine="0"} NaN
vllm:num_requests_running{engine="1"} 2
vllm:num_requests_waiting +Inf
vllm:kv_cache_usage_perc NaN
vllm:time_to_first_token_seconds_sum NaN
vllm:time_to_first_token_seconds_count 3
"""
        self.assertEqual(parse_metrics(page), Scrape(2.0, 0.0, 0.0, {}))

    @given(
        page=st.text('vlm:nu_requestingw{}"=,. 0123456789eE+-NaInf\\#\n\t', max_size=80)
        | st.tuples(
            st.sampled_from(["vllm:num_requests_running", "vllm:num_requests_waiting", f"{TTFT}_sum"]),
            st.text('{}"=,. a0123456789eE+-NaInf\\#\t', max_size=30),
        ).map("".join)
    )
    @settings(derandomize=True, deadline=None, max_examples=300)
    def test_junk_is_a_scrape_of_numbers_or_refused(self, page: str) -> None:
        try:
            scrape = parse_metrics(page)
        except NotVllmMetrics:
            return
        numbers = [scrape.running, scrape.waiting, scrape.kv_usage]
        numbers += [number for pair in scrape.histograms.values() for number in pair]
        self.assertTrue(all(map(math.isfinite, numbers)), scrape)

    def test_whole_pages_of_a_real_vllm(self) -> None:
        directory = Path(__file__).parents[3] / "shared" / "vllm"
        pages = sorted(directory.glob("metrics_*.txt"))
        if not pages:
            self.skipTest(f"no whole scrapes in {directory}")
        for page in pages:
            with self.subTest(page.name):
                text = page.read_text(encoding="utf-8")
                scrape = parse_metrics(text)
                self.assertLessEqual({TTFT, TPOT, ITL}, set(scrape.histograms))
                self.assertEqual(scrape.kv_capacity, 32 * 4096)
                self.assertTrue(0.0 <= scrape.kv_usage <= 1.0)
                self.assertGreater(scrape.histograms[TTFT][1], 0)
                self.assertEqual(scrape.running, self.only_value(text, "vllm:num_requests_running"))
                self.assertEqual(scrape.waiting, self.only_value(text, "vllm:num_requests_waiting"))

    def only_value(self, page: str, name: str) -> float:
        (line,) = [line for line in page.splitlines() if line.startswith(name + "{")]
        return float(line.rsplit(" ", 1)[1])

    def capacity(self, *labels: str) -> float | None:
        lines = [f"vllm:cache_config_info{{{each}}} 1.0\n" for each in labels]
        return parse_metrics("vllm:num_requests_running 1\n" + "".join(lines)).kv_capacity

    def test_tokens_that_the_cache_holds(self) -> None:
        one = 'block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="1000"'
        for labels, expected in (
            ([], None),
            ([one], 16_000.0),
            ([one, one.replace("1000", "500")], 24_000.0),  # engines
            ([one.replace("1000", "None")], None),  # its memory is not measured yet
            (['block_size="16"'], None),
            (['num_gpu_blocks="16"'], None),
        ):
            with self.subTest(labels):
                self.assertEqual(self.capacity(*labels), expected)

    def test_counters_of_engines_and_reasons_add_up(self) -> None:
        page = """\
vllm:num_requests_running 1
vllm:generation_tokens_total{engine="0"} 100
vllm:generation_tokens_total{engine="1"} 50
vllm:request_success_total{engine="0",finished_reason="stop"} 3
vllm:request_success_total{engine="0",finished_reason="length"} 4
process_start_time_seconds 1700000000.5
"""
        scrape = parse_metrics(page)
        self.assertEqual((scrape.generated, scrape.finished), (150.0, 7.0))
        self.assertEqual(scrape.started_at, 1700000000.5)


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
