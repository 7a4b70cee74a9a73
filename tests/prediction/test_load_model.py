"""The load model: what is queued where, and what is learned of it."""

import random
import unittest

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.prediction.load_model import (
    BYTES_PER_TOKEN,
    OUTPUT_TOKENS,
    DecodeLoad,
    FleetLoad,
)
from vllm_pd_scheduler.prediction.prefill_load import PrefillLoad, prefill_pairs
from vllm_pd_scheduler.prediction.regression import OnlineRegression
from vllm_pd_scheduler.sim import setups
from vllm_pd_scheduler.sim.profile import EngineProfile


def empty() -> PrefillLoad:
    return PrefillLoad(FleetLoad().prefill)


def seconds(profile: EngineProfile, tokens: int) -> float:
    """What a prompt takes of which nothing is cached, as if computed in one step."""
    return profile.step_time(tokens, 0, 0, prefill_pairs(tokens, tokens))


events = st.lists(
    st.tuples(
        st.sampled_from(["begin", "end", "cancel", "restart", "wait"]),
        st.integers(0, 5),
        st.floats(0, 10, allow_subnormal=False),
    ),
    max_size=50,
)


class PrefillQueueTest(unittest.TestCase):
    def setUp(self) -> None:
        self.load = empty()

    def test_first_come_first_served(self) -> None:
        """What is left at each moment, when everything takes as long as predicted."""
        load = self.load
        for key, cost in (("a", 2.0), ("b", 3.0), ("c", 1.0)):
            load.enqueue(key, cost, 10.0)
        self.assertEqual([load.remaining(now) for now in (10.0, 11.0, 12.0)], [6.0, 5.0, 4.0])
        self.assertEqual(load.complete("a", 12.0), 2.0)
        self.assertEqual([load.remaining(now) for now in (12.0, 14.0, 15.0)], [4.0, 2.0, 1.0])
        self.assertEqual(load.complete("b", 15.0), 3.0)
        self.assertEqual(load.complete("c", 16.0), 1.0)
        self.assertEqual((load.remaining(16.0), load.queued), (0.0, 0.0))

    def test_a_prefill_whose_cost_is_found_out_later(self) -> None:
        for key in "abc":
            self.load.enqueue(key, 2.0, 0.0)
        self.load.recost("a", 1.0)
        self.load.recost("c", 0.5)
        self.load.recost("no such", 9.0)
        self.assertEqual(list(self.load.pending), ["a", "b", "c"])
        self.assertEqual([self.load.remaining(now) for now in (0.0, 0.5, 5.0)], [3.5, 3.0, 2.5])
        self.load.complete("a", 1.0)
        self.assertEqual(self.load.remaining(1.0), 2.5)
        self.load.complete("b", 3.0)
        self.load.cancel("c", 3.0)
        self.assertEqual(self.load.queued, 0.0)

    def test_idle_time_is_nobodys(self) -> None:
        self.load.enqueue("a", 1.0, 0.0)
        self.load.complete("a", 1.0)
        self.load.enqueue("b", 1.0, 50.0)
        self.assertEqual(self.load.remaining(50.5), 0.5)
        self.assertEqual(self.load.complete("b", 51.5), 1.5)

    def test_one_that_hangs_does_not_make_it_look_free(self) -> None:
        self.load.enqueue("hangs", 1.0, 0.0)
        for number in range(4):
            self.load.enqueue(number, 2.0, 0.0)
        self.assertEqual(self.load.remaining(1000.0), 8.0)

    def test_who_gives_up_in_the_queue_does_not_reset_the_one_under_way(self) -> None:
        self.load.enqueue("a", 10.0, 0.0)
        self.load.enqueue("b", 5.0, 0.0)
        self.load.cancel("b", 9.0)
        self.assertEqual(self.load.remaining(9.0), 1.0)
        self.assertEqual(self.load.complete("a", 10.0), 10.0)

    def test_when_the_one_under_way_gives_up_the_next_begins(self) -> None:
        self.load.enqueue("a", 10.0, 0.0)
        self.load.enqueue("b", 5.0, 0.0)
        self.load.cancel("a", 2.0)
        self.assertEqual(self.load.remaining(4.0), 3.0)
        self.assertEqual(self.load.complete("b", 7.0), 5.0)

    def test_an_end_counts_once(self) -> None:
        self.load.enqueue("a", 1.0, 0.0)
        self.assertEqual(self.load.complete("a", 1.0), 1.0)
        self.assertIsNone(self.load.complete("a", 1.0))
        self.load.cancel("a", 1.0)
        self.assertEqual(self.load.queued, 0.0)

    def test_when_one_has_ended_those_before_it_have_as_the_time_shows(self) -> None:
        """A long one of another replica ends in the step of a short one of ours, and is told later."""
        for key, cost in (("before", 1.0), ("long", 15.0), ("short", 0.3), ("behind", 2.0)):
            self.load.enqueue(key, cost, 0.0)
        self.assertEqual(self.load.complete("before", 1.0), 1.0)
        short = self.load.complete("short", 16.3)
        assert short is not None
        self.assertAlmostEqual(short, 0.3)
        self.assertEqual(list(self.load.pending), ["behind"])
        self.assertAlmostEqual(self.load.remaining(16.3), 2.0)
        long = self.load.complete("long", 16.32)
        assert long is not None
        self.assertAlmostEqual(long, 15.0)
        self.assertIsNone(self.load.complete("long", 16.33))
        self.assertAlmostEqual(self.load.complete("behind", 18.3) or 0.0, 2.0)
        self.assertEqual(self.load.queued, 0.0)

    def test_one_that_has_overtaken_others_says_nothing_of_them(self) -> None:
        self.load.enqueue("long", 15.0, 0.0)
        self.load.enqueue("not sent", 0.7, 0.0, is_sent=False)
        self.load.enqueue("short", 0.3, 0.0)
        self.assertEqual(self.load.complete("short", 1.0), 1.0)
        self.assertEqual(list(self.load.pending), ["long", "not sent"])

    def test_one_that_is_sent_now_can_have_ended(self) -> None:
        self.load.enqueue("a", 1.0, 0.0, is_sent=False)
        self.load.enqueue("b", 1.0, 0.0)
        self.load.sent("a", 1.0)
        self.assertEqual(self.load.complete("b", 3.0), 1.0)
        self.assertEqual(self.load.queued, 0.0)

    def test_one_that_was_taken_for_done_may_end_otherwise(self) -> None:
        for end in (lambda: self.load.cancel("a", 2.0), self.load.reset):
            self.load.enqueue("a", 1.0, 0.0)
            self.load.enqueue("b", 1.0, 0.0)
            self.load.complete("b", 2.0)
            end()
            self.assertIsNone(self.load.complete("a", 3.0))
            self.assertEqual((self.load.queued, self.load.remaining(3.0)), (0.0, 0.0))

    @given(events)
    @settings(derandomize=True, deadline=None, max_examples=300)
    def test_any_order(self, calls: list[tuple[str, int, float]]) -> None:
        load, now, pending = empty(), 0.0, dict[int, float]()
        for what, key, number in calls:
            if what == "begin" and key not in pending:
                pending[key] = number
                load.enqueue(key, number, now)
            elif what == "end":
                self.assertEqual(load.complete(key, now) is None, pending.pop(key, None) is None)
            elif what == "cancel":
                pending.pop(key, None)
                load.cancel(key, now)
            elif what == "restart":
                pending.clear()
                load.reset()
            else:
                now += number
            self.assertLessEqual(set(load.pending), pending.keys())
            queued = [pending[key] for key in pending if key in set(load.pending)]
            left, total, head = load.remaining(now), sum(queued), next(iter(queued), 0.0)
            self.assertGreaterEqual(left, 0.0)
            self.assertLessEqual(left, total + 1e-9)
            self.assertGreaterEqual(left, total - head - 1e-9, "only the first can be under way")
        for key in list(pending):
            load.complete(key, now)
        self.assertEqual((load.queued, load.remaining(now), load.head_cost), (0.0, 0.0, 0.0))


class PrefillCostTest(unittest.TestCase):
    def test_pairs(self) -> None:
        for tokens, context, expected in ((4, 4, 8), (1, 100, 99.5), (10, 100, 950)):
            self.assertEqual(prefill_pairs(tokens, context), expected)

    def test_it_learns_what_a_prompt_costs(self) -> None:
        load, fleet = empty(), FleetLoad()
        for number in range(200):
            context = 200 * (1 + number * 7 % 90)
            tokens = context // (1 + number % 4)
            seconds = 0.01 + 5e-5 * tokens + 2e-9 * prefill_pairs(tokens, context)
            load.learn(tokens, context, seconds, fleet.prefill)
        for tokens, context in ((1000, 1000), (16000, 16000), (1000, 16000)):
            expected = 0.01 + 5e-5 * tokens + 2e-9 * prefill_pairs(tokens, context)
            self.assertAlmostEqual(load.cost(tokens, context), expected, delta=0.1 * expected)
        newcomer = PrefillLoad(fleet.prefill)
        self.assertAlmostEqual(newcomer.cost(8000, 8000), load.cost(8000, 8000), delta=0.05)

    def test_prompts_that_are_alike_cost_what_their_tokens_do(self) -> None:
        fleet, load = FleetLoad(), empty()
        for _ in range(50):
            load.learn(500, 500, 0.25, fleet.prefill)
        self.assertAlmostEqual(load.cost(500, 500), 0.25, delta=0.01)
        self.assertLess(load.overhead, 0.03)  # 20 ms until then
        self.assertGreater(load.cost(1000, 1000), 0.45)

    def test_few_short_prompts_tell_what_a_long_one_takes(self) -> None:
        """Within a factor, for each model and machine: attention is expected before it is measured."""
        for name in setups.NAMES:
            profile, fleet, load = setups.setup(name), FleetLoad(), empty()
            for _ in range(3):
                load.learn(6000, 6000, seconds(profile, 6000), fleet.prefill)
            for tokens in (30_000, 100_000):
                with self.subTest(name, tokens=tokens):
                    ratio = load.cost(tokens, tokens) / seconds(profile, tokens)
                    self.assertTrue(0.6 < ratio < 1.7, ratio)

    def test_one_kind_that_is_twice_as_slow_is_learned_in_a_few_prefills(self) -> None:
        """What both kinds have in common comes from the fleet, and does not hold a kind to its mean."""
        draw, fleet = random.Random(5), FleetLoad()
        kinds = [(factor, PrefillLoad(fleet.prefill)) for factor in (1.0, 2.0) * 4]
        profile = setups.setup("deepseek-v3-fp8-8xh200")
        for _ in range(15):
            for factor, load in kinds:
                tokens = int(draw.lognormvariate(8.9, 1.0))
                took = factor * seconds(profile, tokens) * draw.lognormvariate(0.0, 0.1)
                load.learn(tokens, tokens, took, fleet.prefill)
        for factor, load in kinds:
            for tokens in (8000, 30_000):
                expected = factor * seconds(profile, tokens)
                self.assertAlmostEqual(load.cost(tokens, tokens), expected, delta=0.25 * expected)

    def test_a_few_short_prompts_say_little_of_long_ones(self) -> None:
        """What one P took for its first ones, beside others, is no reason to forget what the fleet knows."""
        profile = setups.setup("deepseek-v3-fp8-8xh200")
        for seed in range(10):
            draw, fleet = random.Random(seed), FleetLoad()
            known, new = PrefillLoad(fleet.prefill), PrefillLoad(fleet.prefill)
            for _ in range(100):
                tokens = int(draw.lognormvariate(8.9, 1.0))
                known.learn(tokens, tokens, seconds(profile, tokens), fleet.prefill)
            new.adopt(fleet.prefill)
            for _ in range(3):
                tokens = int(draw.uniform(1000, 3000))
                took = seconds(profile, tokens) * draw.uniform(1.0, 1.5)
                new.learn(tokens, tokens, took, fleet.prefill)
            expected = seconds(profile, 100_000)
            self.assertAlmostEqual(new.cost(100_000, 100_000), expected, delta=0.2 * expected)

    def test_one_that_is_taken_for_too_fast_is_known_by_its_first_long_prompt(self) -> None:
        """Several wait there, since it seems to be the best: it is not the last of them that corrects it."""
        profile = setups.setup("deepseek-v3-fp8-8xh200")
        fleet = FleetLoad()
        fleet.prefill.adopt((0.0, 3e-5, 0.0))
        load, tokens = PrefillLoad(fleet.prefill), 80_000
        true = seconds(profile, tokens)
        self.assertLess(load.cost(tokens, tokens), 0.5 * true)
        for number in range(6):
            load.enqueue(number, load.cost(tokens, tokens), 0.0)
        load.complete(0, true)
        load.learn(tokens, tokens, true, fleet.prefill)
        self.assertGreater(load.cost(tokens, tokens), 0.7 * true)

    def test_short_ones_of_one_step_are_learned_from_together(self) -> None:
        """A slow and an instant one say nothing alone, however much they surprise."""
        fleet = FleetLoad()
        load = PrefillLoad(fleet.prefill)
        before = load.cost(4000, 4000)
        load.enqueue("a", before, 0.0)
        load.enqueue("b", before, 0.0)
        load.complete("a", 2 * before)
        load.learn(4000, 4000, 2 * before, fleet.prefill)
        self.assertEqual(fleet.prefill.samples, 0)
        load.complete("b", 2 * before)
        load.learn(4000, 4000, 0.0, fleet.prefill)
        self.assertAlmostEqual(load.cost(4000, 4000), before, delta=0.05 * before)

    def test_what_the_fleet_has_learned_since_counts_where_it_has_learned_nothing(self) -> None:
        """Its own few samples are of short prompts, from when nobody had seen a long one."""
        profile = setups.setup("deepseek-v3-fp8-8xh200")
        fleet = FleetLoad()
        fleet.prefill.adopt((0.0, 2e-5, 0.0))
        early, late = PrefillLoad(fleet.prefill), PrefillLoad(fleet.prefill)
        late.refit(fleet.prefill)  # it follows the fleet anyway until its first sample
        early.learn(1000, 1000, seconds(profile, 1000), fleet.prefill)
        for tokens in (3000, 100_000, 10_000, 50_000, 20_000) * 4:
            late.learn(tokens, tokens, seconds(profile, tokens), fleet.prefill)
        true = seconds(profile, 100_000)
        self.assertLess(early.cost(100_000, 100_000), 0.5 * true)
        early.refit(fleet.prefill)
        self.assertAlmostEqual(early.cost(100_000, 100_000), true, delta=0.25 * true)

    def test_trust(self) -> None:
        load = empty()
        for _ in range(50):
            load.learn_cached(1000.0, 0)
        self.assertLess(load.trust, 0.01)
        load.learn_cached(0.0, 0)  # nothing was predicted: nothing is learned
        before = load.trust
        for _ in range(50):
            load.learn_cached(1000.0, 5000)
        self.assertLess(before, load.trust)
        self.assertLessEqual(load.trust, 1.0)
        load.learn_cached(1000.0, 0)
        load.reset()
        self.assertEqual(load.trust, 1.0)


class DecodeLoadTest(unittest.TestCase):
    def test_it_learns_what_a_step_takes(self) -> None:
        load, fleet = DecodeLoad(FleetLoad().decode), FleetLoad()
        for number in range(200):
            batch = 1.0 + number * 13 % 60
            kv_tokens = batch * (500 + number * 37 % 2000)
            load.learn(batch, kv_tokens, 0.01 + 1e-4 * batch + 2e-8 * kv_tokens, fleet.decode)
        for batch, kv_tokens in ((1, 1000), (50, 100_000)):
            expected = 0.01 + 1e-4 * batch + 2e-8 * kv_tokens
            self.assertAlmostEqual(load.step(batch, kv_tokens), expected, delta=0.05 * expected)


class FleetLoadTest(unittest.TestCase):
    def test_each_model_has_its_tokens(self) -> None:
        load = FleetLoad()
        self.assertEqual(load.bytes_per_token("any"), BYTES_PER_TOKEN)
        load.learn_bytes("chinese", 3000, 1500)
        load.learn_bytes(None, 1000, 100)
        self.assertEqual(load.bytes_per_token("chinese"), 2.0)
        self.assertEqual(load.bytes_per_token(None), 10.0)
        self.assertEqual(load.bytes_per_token("any"), BYTES_PER_TOKEN)
        for _ in range(100):
            load.learn_bytes("chinese", 3000, 1000)
        self.assertAlmostEqual(load.bytes_per_token("chinese"), 3.0, places=3)
        self.assertEqual(set(load.bytes_per_token_by_model()), {"chinese", ""})

    def test_nothing_is_learned_of_nothing(self) -> None:
        load = FleetLoad()
        load.learn_bytes("m", 0, 5)
        load.learn_bytes("m", 5, 0)
        self.assertEqual(load.bytes_per_token_by_model(), {})

    def test_names_are_bounded(self) -> None:
        load = FleetLoad()
        for number in range(3000):
            load.learn_bytes(f"m{number}", 4, 1)
        self.assertLessEqual(len(load.bytes_per_token_by_model()), 1000)

    def test_the_mean_answer(self) -> None:
        load = FleetLoad()
        self.assertEqual(load.output_tokens, OUTPUT_TOKENS)
        for _ in range(100):
            load.learn_output(4000.0, 8.0)
        self.assertAlmostEqual(load.output_tokens, 500.0, delta=1.0)

    def test_an_answer_that_lasts_for_many_scrapes_counts_whole(self) -> None:
        """One of 500 tokens ends in every fifth scrape, and a fifth of it is generated in each."""
        load = FleetLoad()
        for _ in range(60):
            for _ in range(4):
                load.learn_output(100.0, 0.0)
            load.learn_output(100.0, 1.0)
        self.assertAlmostEqual(load.output_tokens, 500.0, delta=10.0)

    def test_transfers(self) -> None:
        load = FleetLoad()
        for _ in range(100):
            load.learn_transfer(0.3)
        self.assertAlmostEqual(load.transfer, 0.3, places=3)

    def test_one_lie_is_forgotten_as_fast_as_it_was_learned(self) -> None:
        lies = (1e15, 1e9, 1e-9, 0.0)
        for before in (0, 50):
            for lie in lies:
                with self.subTest(before=before, lie=lie):
                    load = FleetLoad()
                    for number in range(before + 100):
                        if number == before:
                            load.learn_bytes("m", 4000, int(max(1.0, lie)))
                            load.learn_bytes("m", 1, int(max(1.0, lie)))
                            load.learn_output(lie, 1.0)
                            load.learn_output(lie, 0.0)
                            load.learn_transfer(lie)
                        load.learn_bytes("m", 4000, 1000)
                        load.learn_output(2000.0, 5.0)
                        load.learn_transfer(0.05)
                        if number == before + 20:
                            self.assertTrue(3.0 < load.bytes_per_token("m") < 5.0)
                            self.assertTrue(300.0 < load.output_tokens < 500.0)
                    self.assertAlmostEqual(load.bytes_per_token("m"), 4.0, delta=0.1)
                    self.assertAlmostEqual(load.output_tokens, 400.0, delta=10.0)
                    self.assertAlmostEqual(load.transfer, 0.05, delta=0.005)

    def test_who_has_measured_nothing_follows_the_fleet(self) -> None:
        prefill, decode = empty(), DecodeLoad(FleetLoad().decode)
        prefill.adopt(OnlineRegression((1.0, 2.0, 3.0), (1.0, 1.0, 1.0)))
        decode.adopt(OnlineRegression((4.0, 5.0, 6.0), (1.0, 1.0, 1.0)))
        self.assertEqual(prefill.cost(2, 2), 1.0 + 2.0 * 2 + 3.0 * 2)
        self.assertEqual(decode.step(1, 1), 15.0)

    def test_its_first_samples_are_compared_with_what_the_fleet_knows(self) -> None:
        """By what it was made with, a long prompt of a tenth of that would count five times as long."""
        fleet = FleetLoad()
        prefill = PrefillLoad(fleet.prefill)
        fleet.prefill.adopt((0.01, 2e-5, 0.0))
        prefill.adopt(fleet.prefill)
        prefill.learn(150_000, 150_000, 3.01, fleet.prefill)
        self.assertAlmostEqual(prefill.cost(150_000, 150_000), 3.01, delta=0.1)


if __name__ == "__main__":
    unittest.main()
