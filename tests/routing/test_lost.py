"""Which prompts are taken for the reason why instances died."""

import unittest

from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.request.fingerprint import ENDS_BYTES, fingerprint
from vllm_pd_scheduler.routing.lost import PAUSE_S, LostPrompts


class FingerprintTest(unittest.TestCase):
    def of(self, text: str) -> int:
        return fingerprint(JsonBody.parse(text.encode()))

    def test_it_is_of_the_prompt_alone(self) -> None:
        self.assertEqual(self.of('{"prompt":"a","max_tokens":1}'), self.of('{"max_tokens":2,"prompt":"a"}'))
        self.assertNotEqual(self.of('{"prompt":"a"}'), self.of('{"prompt":"b"}'))
        self.assertEqual(self.of("{}"), 0)

    def test_of_a_long_one_both_ends_and_the_length_count(self) -> None:
        def long(first: str, last: str, size: int = 4 * ENDS_BYTES) -> int:
            return self.of('{"prompt":"' + first + "x" * size + last + '"}')

        self.assertEqual(long("a", "b"), long("a", "b"))
        self.assertNotEqual(long("a", "b"), 0)
        self.assertEqual(len({long("a", "b"), long("c", "b"), long("a", "c"), long("a", "b", 200_000)}), 4)


class LostPromptsTest(unittest.TestCase):
    def setUp(self) -> None:
        self.lost = LostPrompts()

    def refused(self, now: float = 0.0, prompt: int = 7) -> bool:
        return self.lost.refused_for(prompt, now) > 0

    def test_two_instances_are_enough(self) -> None:
        self.lost.lost(7, "p0", 0.0)
        self.lost.lost(7, "p0", 0.0)
        self.assertFalse(self.refused(), "one that breaks every connection says nothing of the prompt")
        self.lost.lost(7, "d0", 0.0)
        self.assertTrue(self.refused(PAUSE_S - 1))
        self.assertFalse(self.refused(PAUSE_S))
        self.assertFalse(self.refused(0.0, 8))

    def test_each_further_loss_doubles_the_pause(self) -> None:
        now = 0.0
        self.lost.lost(7, "p0", now)
        for pause, instance in ((PAUSE_S, "d0"), (2 * PAUSE_S, "d1"), (4 * PAUSE_S, "p0")):
            self.lost.lost(7, instance, now)
            self.assertTrue(self.refused(now + pause - 1))
            now += pause
            self.assertFalse(self.refused(now))

    def test_those_that_were_on_their_way_are_one_loss(self) -> None:
        """Else a prompt that many clients send at once would be refused for minutes."""
        for instance in ("p0", "p0", "p0", "d0", "d0", "d0", "d1"):
            self.lost.lost(7, instance, 0.0)
        self.assertTrue(self.refused(PAUSE_S - 1))
        self.assertFalse(self.refused(PAUSE_S))

    def test_after_a_refusal_it_may_be_lost_once(self) -> None:
        self.lost.lost(7, "p0", 0.0)
        self.assertEqual(self.lost.spent(7), 0)
        self.lost.lost(7, "d0", 0.0)
        self.assertEqual((self.lost.spent(7), self.lost.spent(8)), (1, 0))
        self.lost.answered(7)
        self.assertEqual(self.lost.spent(7), 0)

    def test_an_answer_clears_it(self) -> None:
        self.lost.lost(7, "p0", 0.0)
        self.lost.suspect(7, "d0", 0.0)
        self.lost.answered(7)
        self.lost.died("d0", 1.0)
        self.lost.lost(7, "d1", 1.0)
        self.assertFalse(self.refused(1.0))

    def test_a_500_counts_only_if_its_instance_is_dead_soon_after(self) -> None:
        self.lost.lost(7, "p0", 0.0)
        self.lost.suspect(7, "d0", 0.0)
        self.lost.suspect(7, "d1", 0.0)
        self.assertFalse(self.refused())
        self.assertEqual(self.lost.suspected, {"d0", "d1"})
        self.lost.died("d0", 60.0)
        self.assertFalse(self.refused(60.0), "too long after")
        self.lost.suspect(7, "d1", 60.0)
        self.lost.died("d1", 61.0)
        self.assertTrue(self.refused(61.0))

    def test_what_has_no_fingerprint_is_not_remembered(self) -> None:
        for instance in ("p0", "d0"):
            self.lost.lost(0, instance, 0.0)
            self.lost.suspect(0, instance, 0.0)
        self.assertEqual(len(self.lost), 0)
