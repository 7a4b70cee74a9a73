"""Priorities of objectives: any whole numbers of a cluster's, in our range and in their order."""

import unittest

from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_scheduler.request.objectives import MAX_PRIORITY, Objectives, in_our_range

INT32 = st.integers(-(2**31), 2**31 - 1)


class ObjectivesTest(unittest.TestCase):
    def test_table(self) -> None:
        for given_, expected in (
            ({}, {}),
            ({"a": 0, "b": 100, "c": -100, "d": 7}, {"a": 0, "b": 100, "c": -100, "d": 7}),
            ({"a": 5, "b": 500, "c": 1000}, {"a": 5, "b": 99, "c": 100}),
            ({"a": 99, "b": 100, "c": 101}, {"a": 98, "b": 99, "c": 100}),
            ({"a": -(2**31), "b": 2**31 - 1, "c": -1}, {"a": -100, "b": 100, "c": -1}),
            ({"a": -1000, "b": -1000, "c": -100}, {"a": -100, "b": -100, "c": -99}),
        ):
            with self.subTest(given_):
                self.assertEqual(in_our_range(given_), expected)

    @given(st.dictionaries(st.text(max_size=8), INT32, max_size=90))
    def test_order_and_sign_stay(self, priorities: dict[str, int]) -> None:
        found = in_our_range(priorities)
        self.assertEqual(set(found), set(priorities))
        for name, one in found.items():
            self.assertLessEqual(abs(one), MAX_PRIORITY)
            for other, two in found.items():
                self.assertEqual(one < two, priorities[name] < priorities[other])
            self.assertEqual((one > 0, one < 0), (priorities[name] > 0, priorities[name] < 0))

    def test_more_than_there_is_room_for(self) -> None:
        found = in_our_range({str(each): each for each in range(-500, 501)})
        self.assertEqual((found["0"], found["500"], found["-500"], found["1"]), (0, 100, -100, 1))
        ordered = [found[str(each)] for each in range(-500, 501)]
        self.assertEqual(ordered, sorted(ordered))

    def test_the_newest_set_counts(self) -> None:
        objectives = Objectives()
        self.assertEqual(objectives.priority("chat"), 0)
        objectives.update("cluster", {"chat": 10, "batch": -1})
        self.assertEqual([objectives.priority(name) for name in ("chat", "batch", "", "x")], [10, -1, 0, 0])
        objectives.update("cluster", {"batch": -2})
        self.assertEqual([objectives.priority(name) for name in ("chat", "batch")], [0, -2])


if __name__ == "__main__":
    unittest.main()
