import unittest
from dataclasses import replace

from vllm_pd_scheduler.sim.options import parse_options
from vllm_pd_scheduler.sim.setups import A100, FP8, H100, LLAMA_8B, LLAMA_70B, NAMES, profile, setup


class SetupTest(unittest.TestCase):
    def test_8b_on_one_h100_is_what_one_knows_of_it(self) -> None:
        it = setup("llama-3.1-8b-h100")
        self.assertTrue(20_000 < it.prefill_rate < 40_000)
        self.assertTrue(0.006 < it.step_time(0, 1, 1000) < 0.012)
        self.assertEqual(it.kv_bytes_per_token, 131_072)
        self.assertTrue(400_000 < it.capacity < 480_000)

    def test_8b_on_an_a100_40gb_decodes_as_measured(self) -> None:
        # The data sheet's 1,555 GB/s; 13.3 ms, see setups.py.
        it = profile(LLAMA_8B, replace(A100, bandwidth=1.555e12, memory=40 * 2**30))
        self.assertAlmostEqual(it.step_time(0, 1, 1088) / (1 / 75), 1, delta=0.05)

    def test_70b_in_fp8_on_two_h100_is_near_to_what_was_measured(self) -> None:
        it = setup("llama-3.3-70b-fp8-2xh100")
        first_token = it.step_time(5000, 0, 0, 5000 * 2500)
        self.assertAlmostEqual(first_token / 0.40677, 1, delta=0.10)
        self.assertAlmostEqual(it.step_time(0, 1, 5250) / 0.01858, 1, delta=0.25)

    def test_every_setup_is_plausible(self) -> None:
        for name in NAMES:
            with self.subTest(name):
                it = setup(name)
                self.assertGreater(it.capacity, 50_000)
                self.assertTrue(0.005 < it.step_time(0, 1, 0) < 0.030)
                self.assertTrue(4_000 < it.prefill_rate < 60_000)
                # At 128k tokens, attention outweighs the rest of a prefill, but not by an order of magnitude.
                self.assertTrue(0.3 < it.prefill_per_kv_token * 64_000 * it.prefill_rate < 10)

    def test_a_larger_block_changes_the_number_of_blocks_only(self) -> None:
        small, large = setup("qwen2.5-32b-2xh100"), setup("qwen2.5-32b-2xh100", block_size=512)
        self.assertEqual(replace(large, block_size=16, num_blocks=small.num_blocks), small)
        self.assertAlmostEqual(large.capacity / small.capacity, 1, delta=0.01)

    def test_a_server_can_be_started_with_one(self) -> None:
        for it in (setup("qwen2.5-32b-2xh100"), replace(setup("llama-3.1-8b-a100"), prefix_caching=False)):
            self.assertEqual(parse_options(["--port=0", *it.arguments()]).profile, it)

    def test_an_unknown_name_is_told_the_known_ones(self) -> None:
        with self.assertRaisesRegex(ValueError, r"gpt-9.*llama-3\.1-8b-h100.*qwen"):
            setup("gpt-9")

    def test_what_does_not_fit_or_does_not_exist(self) -> None:
        with self.assertRaisesRegex(ValueError, "no room"):
            profile(LLAMA_70B, H100)
        with self.assertRaisesRegex(ValueError, "arithmetic"):
            profile(LLAMA_8B, A100, weight_bytes=FP8)


if __name__ == "__main__":
    unittest.main()
