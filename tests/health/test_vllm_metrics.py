"""vLLM's metrics page: current and older names, several engines, and pages that are none."""

import math
import unittest
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.health.vllm_metrics import (
    _WANTED,
    NotVllmMetrics,
    OtherEngines,
    Scrape,
    parse_metrics,
    parse_ranks,
    snapshot,
)
from vllm_pd_scheduler.models import InstanceRole

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


LORA = """\
# HELP vllm:lora_requests_info Running stats on lora requests.
# TYPE vllm:lora_requests_info gauge
vllm:lora_requests_info{max_lora="4",running_lora_adapters="",waiting_lora_adapters="old"} 1.7e+09
vllm:lora_requests_info{max_lora="4",running_lora_adapters="a,b/c",waiting_lora_adapters="d"} 1.7898284988e+09
vllm:lora_requests_info{max_lora="4",running_lora_adapters="older",waiting_lora_adapters=""} 1.7898284985e+09
"""


SGLANG = """\
# HELP sglang:num_running_reqs The number of running requests.
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{dp_rank="0",engine_type="decode",model_name="m",pp_rank="0",tp_rank="0"} 3.0
sglang:num_running_reqs{dp_rank="1",engine_type="decode",model_name="m",pp_rank="0",tp_rank="0"} 4.0
sglang:num_queue_reqs{dp_rank="0",engine_type="decode",model_name="m",pp_rank="0",tp_rank="0"} 2.0
sglang:num_running_reqs_offline_batch{dp_rank="0",model_name="m"} 9.0
sglang:token_usage{dp_rank="0",engine_type="decode",model_name="m",pp_rank="0",tp_rank="0"} 0.25
sglang:token_usage{dp_rank="1",engine_type="decode",model_name="m",pp_rank="0",tp_rank="0"} 0.75
sglang:max_total_num_tokens{dp_rank="0",model_name="m"} 1000.0
sglang:max_total_num_tokens{dp_rank="1",model_name="m"} 1000.0
sglang:max_total_num_tokens_swa{dp_rank="1",model_name="m"} 77.0
sglang:generation_tokens_total{model_name="m"} 55.0
sglang:num_requests_total{is_streaming="true",model_name="m"} 5.0
sglang:num_requests_total{is_streaming="false",model_name="m"} 6.0
sglang:time_to_first_token_seconds_sum{is_streaming="true",model_name="m"} 1.5
sglang:time_to_first_token_seconds_count{is_streaming="true",model_name="m"} 3.0
sglang:inter_token_latency_seconds_sum{model_name="m"} 2.0
sglang:inter_token_latency_seconds_count{model_name="m"} 8.0
"""


class AdaptersTest(unittest.TestCase):
    def test_sglang_has_other_names(self) -> None:
        scrape = parse_metrics(SGLANG)
        self.assertEqual((scrape.running, scrape.waiting, scrape.kv_usage), (7.0, 2.0, 0.5))
        self.assertEqual((scrape.kv_capacity, scrape.generated, scrape.finished), (2000.0, 55.0, 11.0))
        self.assertEqual(scrape.histograms, {TTFT: (1.5, 3.0), ITL: (2.0, 8.0)})

    def test_the_newest_series_counts(self) -> None:
        found = parse_metrics(CURRENT + LORA)
        self.assertEqual((found.adapters, found.adapter_slots), (("d", "a", "b/c"), 4))
        taken = snapshot(found, None, None, D, 1.0)
        self.assertEqual((taken.adapters, taken.adapter_slots), (("d", "a", "b/c"), 4))

    def test_there_is_none(self) -> None:
        found = parse_metrics(CURRENT)
        self.assertEqual((found.adapters, found.adapter_slots), ((), 0))

    def test_many_series(self) -> None:
        """One for each set that there ever was; that is no reason not to believe the rest."""
        line = (
            'vllm:lora_requests_info{max_lora="2",running_lora_adapters="%d",waiting_lora_adapters=""} %d.5'
        )
        found = parse_metrics(CURRENT + "\n".join(line % (number, number) for number in range(20_000)))
        self.assertEqual((found.adapters, found.running), (("19999",), 3.0))

    def test_junk(self) -> None:
        for labels, value in (
            ('max_lora="-1"', "1"), ('max_lora="99999999999"', "1"), ("", "1"), ('x="', "1"), ("}{", "1"),
            ('running_lora_adapters=",, ,"', "1"), ('running_lora_adapters="a"', "NaN"),
            ('running_lora_adapters="a"', "1.2.3"), ('running_lora_adapters="a"', "-1"),
        ):  # fmt: skip
            with self.subTest(labels, value=value):
                found = parse_metrics(f"{CURRENT}vllm:lora_requests_info{{{labels}}} {value}\n")
                self.assertEqual((found.adapters, found.adapter_slots, found.running), ((), 0, 3.0))


TWO_ENGINES = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
process_start_time_seconds 1.79588212089e+09
vllm:num_requests_running{engine="0",model_name="tiny"} 1.0
vllm:num_requests_running{engine="1",model_name="tiny"} 4.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 0.0
vllm:num_requests_waiting{engine="1",model_name="tiny"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="tiny"} 0.75
vllm:generation_tokens_total{engine="0",model_name="tiny"} 3.0
vllm:generation_tokens_total{engine="1",model_name="tiny"} 5.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"} 1.0
vllm:request_success_total{engine="1",finished_reason="stop",model_name="tiny"} 0.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"} 3.0
vllm:request_success_total{engine="1",finished_reason="length",model_name="tiny"} 5.0
vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="8192"} 1.0
vllm:cache_config_info{block_size="32",engine="1",kv_cache_size_tokens="131000",num_gpu_blocks="8192"} 1.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="tiny"} 40.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="tiny"} 8.0
vllm:time_to_first_token_seconds_count{engine="1",model_name="tiny"} 4.0
vllm:time_to_first_token_seconds_sum{engine="1",model_name="tiny"} 2.0
vllm:admission_rejections_total{model_name="tiny",reason="max_num_queued_reqs"} 0.0
"""
"""As vLLM 0.32 with --data-parallel-size 2 writes it, shortened."""


class RanksTest(unittest.TestCase):
    def test_each_rank_has_its_own_and_what_is_of_all(self) -> None:
        zero, one = parse_ranks(TWO_ENGINES.encode(), 2)
        self.assertEqual((zero.running, zero.waiting, zero.kv_usage), (1.0, 0.0, 0.25))
        self.assertEqual((one.running, one.waiting, one.kv_usage), (4.0, 2.0, 0.75))
        self.assertEqual((zero.generated, zero.finished), (3.0, 4.0))
        self.assertEqual((one.generated, one.finished), (5.0, 5.0))
        self.assertEqual((zero.histograms[TTFT], one.histograms[TTFT]), ((8.0, 40.0), (2.0, 4.0)))
        self.assertEqual((zero.kv_capacity, one.kv_capacity), (131_072.0, 131_000.0))
        self.assertEqual({zero.started_at, one.started_at}, {1.79588212089e9})

    def test_together_they_are_the_whole(self) -> None:
        whole, ranks = parse_metrics(TWO_ENGINES), parse_ranks(TWO_ENGINES.encode(), 2)
        for name in ("running", "waiting", "generated", "finished", "kv_capacity"):
            self.assertEqual(sum(getattr(each, name) for each in ranks), getattr(whole, name), name)
        self.assertEqual(sum(each.kv_usage for each in ranks) / 2, whole.kv_usage)

    def test_the_order_of_the_lines_does_not_matter(self) -> None:
        turned = "\n".join(reversed(TWO_ENGINES.splitlines())).encode()
        self.assertEqual(parse_ranks(turned, 2), parse_ranks(TWO_ENGINES.encode(), 2))

    def test_engines_of_another_node_than_the_first(self) -> None:
        """With hybrid load balancing."""
        page = TWO_ENGINES.replace('engine="1"', 'engine="5"').replace('engine="0"', 'engine="4"')
        self.assertEqual(parse_ranks(page.encode(), 2), parse_ranks(TWO_ENGINES.encode(), 2))

    def test_another_number_of_engines(self) -> None:
        for page, size, said in (
            (TWO_ENGINES, 3, "engine 0, 1, and the data_parallel_size of the instance is 3"),
            (TWO_ENGINES, 1, "engine 0, 1,"),
            (TWO_ENGINES.replace('engine="1"', 'engine="7"'), 2, "engine 0, 7,"),
            (TWO_ENGINES.replace('engine="1"', 'engine="99999999"'), 2, "engine 0,"),
            (OLDER, 2, "no engine"),
        ):
            with self.subTest(size=size), self.assertRaises(OtherEngines) as caught:
                parse_ranks(page.encode(), size)
            self.assertIn(said, str(caught.exception))

    def test_one_that_says_nothing_of_its_requests(self) -> None:
        page = TWO_ENGINES.replace('vllm:num_requests_running{engine="1"', 'vllm:other{engine="1"')
        page = page.replace('vllm:num_requests_waiting{engine="1"', 'vllm:other{engine="1"')
        with self.assertRaises(NotVllmMetrics):
            parse_ranks(page.encode(), 2)


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
vllm:num_requests_running{engine="1"} 2
vllm:kv_cache_usage_perc NaN
vllm:time_to_first_token_seconds_sum NaN
vllm:time_to_first_token_seconds_count 3
vllm:generation_tokens_total -1
vllm:request_success_total 1e300
process_start_time_seconds +Inf
"""
        self.assertEqual(parse_metrics(page), Scrape(2.0, 0.0, 0.0, {}))

    def test_requests_are_a_number_of_requests(self) -> None:
        """A page with another is refused as a whole: what would be left of it looks like an idle instance."""
        for value in ("NaN", "+Inf", "-Inf", "-1", "1e7", "1e200", "1e999", "9" * 400, "-" + "9" * 400):
            for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
                with self.subTest(name, value=value), self.assertRaisesRegex(NotVllmMetrics, name):
                    parse_metrics(f'vllm:num_requests_running 1\n{name}{{engine="1"}} {value}\n')

    def test_the_cache_is_between_empty_and_full(self) -> None:
        for value, expected in (("-3", 0.0), ("0.5", 0.5), ("1.0000001", 1.0), ("1e200", 1.0), ("NaN", 0.0)):
            page = f"vllm:num_requests_running 1\nvllm:kv_cache_usage_perc {value}\n"
            self.assertEqual(parse_metrics(page).kv_usage, expected)

    def test_a_series_counts_once(self) -> None:
        page = 'vllm:num_requests_running{engine="0"} 3\n' * 3 + 'vllm:num_requests_running{engine="1"} 1\n'
        self.assertEqual(parse_metrics(page).running, 4.0)

    def test_forms_that_the_format_allows(self) -> None:
        for line in (
            "vllm:num_requests_running 3 1700000000000",
            "vllm:num_requests_running\t3",
            'vllm:num_requests_running{engine="0"}3',
            'vllm:num_requests_running{ engine = "0" , } 3',
            "vllm:num_requests_running{} 3",
            'vllm:num_requests_running{a="}",b="\\"",c="\\\\"} 3.0 # {trace_id="x"} 1',
            "vllm:num_requests_running 3e0 \r",
        ):
            with self.subTest(line):
                self.assertEqual(parse_metrics(line).running, 3.0)
        self.assertEqual(parse_metrics(line.encode()).running, 3.0)

    @given(
        page=st.text('vlm:nu_requestingw{}"=,. 0123456789eE+-NaInf\\#\n\t', max_size=80)
        | st.tuples(
            st.sampled_from(sorted(_WANTED)),
            st.sampled_from(["", '{engine="0"}', '{block_size="', '{kv_cache_size_tokens="', "{"]),
            st.text('{}"=,. a0123456789eE+-NaInf\\#\t', max_size=30) | st.floats().map(" {}".format),
        ).map("".join)
        | st.binary(max_size=60)
    )
    @settings(derandomize=True, deadline=None, max_examples=300)
    def test_junk_is_a_scrape_of_numbers_or_refused(self, page: str | bytes) -> None:
        data = page.encode() if isinstance(page, str) else page
        try:
            scrape = parse_metrics(b"vllm:num_requests_running 1\n" + data)
        except NotVllmMetrics:
            return
        numbers = [scrape.running, scrape.waiting, scrape.kv_usage, scrape.generated, scrape.finished]
        numbers += [number for pair in scrape.histograms.values() for number in pair]
        numbers += [number for number in (scrape.started_at, scrape.kv_capacity) if number is not None]
        self.assertTrue(all(math.isfinite(number) and number >= 0.0 for number in numbers), scrape)
        self.assertTrue(scrape.running <= 1e6 and scrape.waiting <= 1e6 and scrape.kv_usage <= 1.0, scrape)

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
            ([one, one.replace('"0"', '"1"')], 16_000.0),  # engines, each with the blocks of both
            ([one.replace("1000", "None")], None),  # its memory is not measured yet
            (['block_size="16"'], None),
            (['num_gpu_blocks="16"'], None),
            # of a hybrid model: some layers need less than a block for as many tokens
            ([f'{one},kv_cache_size_tokens="4000"'], 4_000.0),
            ([f'kv_cache_size_tokens="4000",{one}'], 4_000.0),
            ([f'{one},kv_cache_size_tokens="None"'], 16_000.0),
            ([f'{one},kv_cache_size_tokens="0"'], 16_000.0),
            (['kv_cache_size_tokens="4000"'], 4_000.0),
            ([f'{one},kv_cache_size_tokens="4000"', one.replace('"0"', '"1"')], 12_000.0),
            # nonsense
            (['block_size="16",num_gpu_blocks="-5"'], None),
            ([f'block_size="16",num_gpu_blocks="{"9" * 400}"'], None),
            ([f'block_size="{"9" * 15}",num_gpu_blocks="{"9" * 15}"'], None),
            ([f'kv_cache_size_tokens="{"9" * 5000}"'], None),
            (['x="a,kv_cache_size_tokens=\\"7\\"",engine="0"'], None),
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
