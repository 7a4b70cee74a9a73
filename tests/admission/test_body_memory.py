import unittest

from vllm_pd_scheduler.admission.body_memory import BodyMemory, HeldBody


class BodyMemoryTest(unittest.TestCase):
    def setUp(self) -> None:
        self.memory = BodyMemory(100, 95)
        self.one, self.other = HeldBody(self.memory), HeldBody(self.memory)

    def test_all_together_hold_no_more_than_the_limit(self) -> None:
        self.assertTrue(self.one.resize(60))
        self.assertFalse(self.other.resize(41))
        self.assertEqual(self.memory.total, 60)
        self.assertTrue(self.other.resize(40))
        self.assertEqual(self.memory.total, 100)

    def test_a_body_that_has_come_takes_the_place_of_the_one_announced(self) -> None:
        self.assertTrue(self.one.resize(60))
        self.assertTrue(self.one.resize(90))
        self.assertFalse(self.one.resize(96))
        self.assertEqual(self.memory.total, 90)
        self.assertTrue(self.one.resize(10))
        self.assertEqual(self.memory.total, 10)

    def test_what_is_released_is_free_once(self) -> None:
        self.one.resize(60)
        self.other.resize(40)
        self.one.release()
        self.one.release()
        self.assertEqual(self.memory.total, 40)


if __name__ == "__main__":
    unittest.main()
