from unittest import TestCase

from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_scheduler.routing.share_limit import ShareLimit


class ShareLimitTest(TestCase):
    def test_a_share_of_one_is_no_limit(self) -> None:
        limit = ShareLimit(1.0)
        self.assertTrue(all(limit.take(True) for _ in range(500)))

    def test_a_share_of_none_lets_nothing_of_the_kind_pass(self) -> None:
        limit = ShareLimit(0.0)
        self.assertFalse(limit.take(True))
        self.assertTrue(limit.take(False))

    @given(share=st.floats(0, 1), kinds=st.lists(st.booleans(), max_size=400))
    def test_no_hundred_requests_in_a_row_have_more(self, share: float, kinds: list[bool]) -> None:
        limit = ShareLimit(share)
        served = []
        for kind in kinds:
            reached = limit.reached
            allowed = limit.take(kind)
            self.assertEqual(allowed, not (kind and reached))
            served.append(kind and allowed)
        for start in range(len(served)):
            self.assertLessEqual(sum(served[start : start + 100]), share * 100)
